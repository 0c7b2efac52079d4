"""Settings that a recipe does not contain have the documented defaults, independent of the text."""

import yaml

from tests.training.conftest import train


def test_a_recipe_without_a_tokenizer_trains_a_byte_level_bpe_of_the_default_size(text_file, tmp_path):
    """The text has few distinct characters; for it --size would choose a character tokenizer and another block size."""
    recipe = tmp_path / "short.yaml"
    recipe.write_text("hidden_size: 32\nnum_hidden_layers: 1\nnum_attention_heads: 2\nmax_steps: 1\nsample_tokens: 0\n")
    flags = ["--use_cpu", "--per_device_train_batch_size", "1", "--validation_characters", "500"]
    assert train(recipe, text_file, tmp_path / "run", *flags) == 0
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert {name: resolved[name] for name in ("tokenizer", "vocab_size", "block_size")} == {
        "tokenizer": "bpe",
        "vocab_size": 4096,
        "block_size": 256,
    }
