"""DeepSpeed: the launch files are parsed by accelerate, completed by transformers and parsed by DeepSpeed.

A training step requires GPUs and is not tested here.
"""

from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import propagate_args_to_deepspeed

from minigpt_hf.training.recipe import parse_arguments
from tests.conftest import ROOT, tiny_model

FLAGS = "--muon false --bf16 true --use_cpu true"
FLAGS += " --per_device_train_batch_size 3 --gradient_accumulation_steps 5 --max_grad_norm 0.7"


@pytest.mark.parametrize("stage", [2, 3])
def test_auto_values_are_filled_in_from_the_training_arguments(stage, monkeypatch, tmp_path):
    config_file = ["--config_file", str(ROOT / "minigpt_hf" / "launch" / f"deepspeed_zero{stage}.yaml")]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*config_file, "-m", "minigpt_cli"]))
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ""
    for name, value in prepare_deepspeed_cmd_env(arguments)[1].items():  # the environment of the ranks
        monkeypatch.setenv(name, value)

    _, _, training = parse_arguments([*FLAGS.split(), "--output_dir", str(tmp_path)])
    plugin = training.deepspeed_plugin
    propagate_args_to_deepspeed(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), training)
    plugin.hf_ds_config.trainer_config_finalize(training, tiny_model(), 10)
    config = plugin.hf_ds_config.config
    assert config["train_batch_size"] == 15  # 3 · 5 with one process
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"] == {"enabled": True}
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    parsed = DeepSpeedConfig(config)
    assert (parsed.train_batch_size, parsed.gradient_clipping, parsed.zero_optimization_stage) == (15, 0.7, stage)
