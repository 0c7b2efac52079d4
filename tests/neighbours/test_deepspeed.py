"""DeepSpeed: the configuration in `scripts/launch/` is parsed by accelerate, transformers and DeepSpeed.

A training step requires GPUs and is not tested here.
"""

import json

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from minigpt_hf.training.recipe import parse_arguments
from tests.conftest import ROOT, tiny_model

FLAGS = "--muon false --bf16 true --use_cpu true"
FLAGS += " --per_device_train_batch_size 3 --gradient_accumulation_steps 5 --max_grad_norm 0.7"


def test_auto_values_are_filled_in_from_the_training_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config_file = ["--config_file", "scripts/launch/deepspeed.yaml", "--num_processes", "8", "scripts/train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(config_file))
    assert arguments.use_deepspeed
    assert arguments.deepspeed_config_file == "scripts/launch/deepspeed.json"

    _, _, training = parse_arguments([*FLAGS.split(), "--output_dir", str(tmp_path)])
    config = HfTrainerDeepSpeedConfig(arguments.deepspeed_config_file)
    config.trainer_config_process(training)
    config.trainer_config_finalize(training, tiny_model(), num_training_steps=10)
    assert config.config == {
        "train_batch_size": 15,  # 3 · 5 with one process
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    }
    (tmp_path / "resolved.json").write_text(json.dumps(config.config))
    parsed = DeepSpeedConfig(str(tmp_path / "resolved.json"))
    assert (parsed.train_batch_size, parsed.gradient_clipping, parsed.zero_optimization_stage) == (15, 0.7, 2)
