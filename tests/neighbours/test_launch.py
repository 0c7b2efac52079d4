"""`accelerate launch` with the configurations in `scripts/launch/`.

Training runs on two CPU processes. Configurations that require GPUs are parsed by accelerate and applied to a model.
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
from minigpt_hf.training.sharding import check_config, launcher_config
from tests.conftest import ROOT, tiny_model

LAUNCH = ROOT / "scripts" / "launch"
# Without dropout and with AdamW, as in tests/training/test_two_processes.py, so that two processes equal one.
FLAGS = "--attention_dropout 0 --embedding_dropout 0 --residual_dropout 0 --muon false --max_steps 6 --logging_steps 1"


def losses(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("file", ["two_cpu_processes.yaml", "fsdp_two_cpu_processes.yaml"])
def test_two_cpu_processes_give_the_losses_of_one(file, recipe_file, text_file, tmp_path):
    """Gradients are summed in another order: 1e-5 in a loss of 5 (float32)."""
    flags = ["--recipe", str(recipe_file), "--data", str(text_file), "--use_cpu", "true", *FLAGS.split()]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(LAUNCH / file), "--main_process_port", "0"]
    commands = {
        2: [*launch, *config, ROOT / "scripts" / "train.py", "--per_device_train_batch_size", "2"],
        1: [sys.executable, ROOT / "scripts" / "train.py", "--per_device_train_batch_size", "4"],
    }
    for processes, command in commands.items():
        run = tmp_path / f"on_{processes}"
        argv = [str(argument) for argument in [*command, *flags, "--output_dir", run]]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        fingerprint = json.loads((run / "fingerprint.json").read_text())
        assert fingerprint["world_size"] == processes
        assert bool(fingerprint["fsdp"]) == (processes == 2 and file.startswith("fsdp"))
        assert (run / "model" / "model.safetensors").is_file()
    assert losses(tmp_path / "on_2") == pytest.approx(losses(tmp_path / "on_1"), abs=1e-5)
    assert len(losses(tmp_path / "on_1")) == 6


def launch_arguments(file: str):
    """Parse a configuration file as `accelerate launch` does."""
    parsed = launch_command_parser().parse_args(
        ["--config_file", str(LAUNCH / file), "--num_processes", "8", "train.py"]
    )
    return _validate_launch_command(parsed)[0]


@pytest.mark.parametrize(("file", "groups"), [("fsdp.yaml", 1), ("hsdp.yaml", 2)])
def test_the_fsdp_configuration_wraps_each_decoder_layer(file, groups, monkeypatch):
    arguments = launch_arguments(file)
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    assert int((launcher_config() or {}).get("dp_replicate_size", 1)) == groups
    check_config(launcher_config())
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
