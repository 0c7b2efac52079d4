"""Recipes and flags become settings, and what is printed while training reads well."""

import pytest
import torch

from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.run import make_config
from minigpt_hf.training.arguments import parse_arguments, read_recipe, recipe_names
from minigpt_hf.training.plan import duration


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_its_model_can_be_built(name):
    from minigpt_hf import MiniGPTForCausalLM

    data, architecture, training = parse_arguments([], recipe=name)
    assert training.output_dir == f"runs/{name}"
    with torch.device("meta"):
        model = MiniGPTForCausalLM(make_config(architecture, data.block_size, byte_tokenizer()))
    assert model.num_parameters() > 0
    assert (training.max_steps > 0) or (training.num_train_epochs > 0)


def test_shakespeare_char_has_the_budget_of_nanogpts_cpu_example():
    data, architecture, training = parse_arguments([], recipe="shakespeare-char")
    assert data.data.startswith("https://")
    assert (architecture.num_hidden_layers, architecture.hidden_size, data.block_size) == (4, 128, 64)
    assert (training.train_batch_size, training.max_steps, training.gradient_accumulation_steps) == (12, 2000, 1)


def test_flags_override_a_recipe():
    _, architecture, training = parse_arguments(
        ["--hidden_size=64", "--max-steps", "7", "--no_muon"], "shakespeare-char"
    )
    assert (architecture.hidden_size, training.max_steps, training.muon) == (64, 7, False)
    assert architecture.num_hidden_layers == 4


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("learning_rate: 4e-3\n")
    assert read_recipe(str(file)) == {"learning_rate": 0.004}


@pytest.mark.parametrize(
    ("flags", "save_steps", "best"),
    [
        ([], 0.25, True),
        (["--eval_steps", "100"], 100, True),
        (["--save_steps", "50"], 50, False),
        (["--eval_strategy", "no"], 0.25, False),
        (["--validation_fraction", "0"], 0.25, False),
        (["--load_best_model_at_end", "false"], 0.25, False),
    ],
)
def test_checkpoints_follow_validation_so_that_the_best_can_be_published(flags, save_steps, best):
    _, _, training = parse_arguments(["--use_cpu", *flags], recipe="demo")
    assert (training.save_steps, training.load_best_model_at_end) == (save_steps, best)


@pytest.mark.parametrize(("text", "message"), [("- a\n- b\n", "found a list"), ("a: [1\n", "not YAML")])
def test_a_recipe_that_is_no_mapping_is_refused(text, message, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(str(file))


def test_a_sliding_window_is_one_block_and_one_token():
    """With T inputs in a block the furthest look back is T - 1 tokens, so a window of T + 1 never hides one of them."""
    data, architecture, _ = parse_arguments([], recipe="shakespeare-char")
    config = make_config(architecture, data.block_size, byte_tokenizer())
    assert config.sliding_window == 65
    assert set(config.layer_types) == {"sliding_attention"}
    assert config.max_position_embeddings == 16 * 64


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 45, 200, 7500)] == ["0 s", "45 s", "3 min 20 s", "2 h 5 min"]
