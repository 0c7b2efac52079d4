"""`accelerate launch` with the files of `scripts/launch/`: two CPU processes for real; what needs GPUs is parsed.

Parsed by the programs that the files are for, down to what they would do with this model.
"""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from minigpt_hf.model.modeling_minigpt import MiniGPTDecoderLayer
from tests.conftest import ROOT, tiny_model

LAUNCH = ROOT / "scripts" / "launch"
# Without dropout and with AdamW, as in tests/training/test_two_processes.py: then two processes equal one.
PLAIN = "--attention_dropout 0 --embedding_dropout 0 --residual_dropout 0 --muon false --max_steps 6 --logging_steps 1"


def losses(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_cpu_processes_start_and_learn_what_one_learns(recipe_file, text_file, tmp_path):
    """Gradients are averaged in another order, so sums differ in their last bits: 1e-5 in a loss of 5 (float32)."""
    flags = ["--recipe", str(recipe_file), "--data", str(text_file), "--use_cpu", "true", *PLAIN.split()]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(LAUNCH / "two_cpu_processes.yaml"), "--main_process_port", "0"]
    starts = {
        2: [*launch, *config, ROOT / "scripts" / "train.py", "--per_device_train_batch_size", "2"],
        1: [sys.executable, ROOT / "scripts" / "train.py", "--per_device_train_batch_size", "4"],
    }
    for processes, start in starts.items():
        run = tmp_path / f"on_{processes}"
        argv = [str(word) for word in [*start, *flags, "--output_dir", run]]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads((run / "fingerprint.json").read_text())["world_size"] == processes
        assert (run / "model" / "model.safetensors").is_file()
    assert losses(tmp_path / "on_2") == pytest.approx(losses(tmp_path / "on_1"), abs=1e-5)
    assert len(losses(tmp_path / "on_1")) == 6


def launched_with(file: str):
    """What `accelerate launch` makes of a configuration file."""
    parsed = launch_command_parser().parse_args(
        ["--config_file", str(LAUNCH / file), "--num_processes", "8", "train.py"]
    )
    return _validate_launch_command(parsed)[0]


def test_the_fsdp_file_wraps_each_block_of_this_model(monkeypatch):
    arguments = launched_with("fsdp.yaml")
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    model = tiny_model()
    plugin.set_auto_wrap_policy(model)
    wrapped = [
        module for module in model.modules() if plugin.auto_wrap_policy(module, recurse=False, nonwrapped_numel=0)
    ]
    assert [type(module) for module in wrapped] == [MiniGPTDecoderLayer] * 2
