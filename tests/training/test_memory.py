"""A model is rejected before the first step only if its training state exceeds the available memory."""

import psutil
import pytest

from tests.training.conftest import train

# Width 32, 2 layers, 4 heads of width 8, feed-forward 8/3 · 32 = 85.3 -> 96, 258 tokens; without norms.
FEED_FORWARD = 3 * 32 * 96
PARAMETERS = {
    "tied embeddings": ([], 2 * (4 * 32 * 32 + FEED_FORWARD) + 258 * 32),
    "untied embeddings": (["--tie_word_embeddings", "false"], 2 * (4 * 32 * 32 + FEED_FORWARD) + 2 * 258 * 32),
    "grouped queries": (["--num_key_value_heads", "2"], 2 * (3 * 32 * 32 + FEED_FORWARD) + 258 * 32),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sixteen_bytes_per_parameter_are_sufficient_and_one_byte_less_is_not(
    name, recipe, words, tmp_path, monkeypatch, capsys
):
    """Weight, gradient and two optimizer moments in float32: 4 · 4 = 16 bytes."""
    flags, parameters = PARAMETERS[name]
    memory = psutil.virtual_memory()
    available = 16 * parameters - 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=available))
    assert train(recipe, words, tmp_path / "run", "--max_steps", "1", *flags) == 2
    assert f"{parameters:,} parameters" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    available += 1
    assert train(recipe, words, tmp_path / "run", "--max_steps", "1", *flags) == 0
