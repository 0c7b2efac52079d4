"""Values in `log.jsonl`, compared with manual computations."""

import json
import math

import pytest

from tests.training.conftest import assert_equal, rows, state_of, train


def test_each_logged_step_has_its_tokens_and_bits_per_byte(recipe, words, tmp_path):
    """420 bytes of text are 421 tokens, including the BOS token: 26 sequences of 16 tokens and the token after them.

    A step has 3 · 2 sequences, but the fifth one, the last of the first epoch, only the remaining two.
    """
    folder = tmp_path / "run"
    assert train(recipe, words, folder, "--gradient_accumulation_steps", "3", "--logging_steps", "2") == 0
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = [row for row in logged if "loss" in row]
    assert [(row["step"], row["tokens"]) for row in logged] == [(2, 192), (4, 384), (6, 416 + 96), (8, 416 + 288)]
    for row in logged:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) * 421 / 420, rel=1e-9)


def test_samples_and_validation_do_not_change_the_training(recipe, words, tmp_path):
    """With dropout, so that an RNG state or training mode that is not restored would change the losses."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    flags = ["--validation_fraction", "0.3", "--sample_prompt", "def"]
    assert train(recipe, words, plain, *flags, "--eval_strategy", "no") == 0
    assert train(recipe, words, watched, *flags, "--eval_steps", "2", "--sample_tokens", "5") == 0
    assert rows(watched) == rows(plain)
    assert_equal(state_of(watched / "checkpoint-8"), state_of(plain / "checkpoint-8"))


@pytest.mark.parametrize("level, is_shown", [("info", True), ("error", False)])
def test_log_level_decides_what_is_shown(level, is_shown, recipe, words, tmp_path, capsys):
    flags = ["--max_steps", "1", "--logging_steps", "20", "--log_level", level]
    assert train(recipe, words, tmp_path / "run", *flags) == 0
    captured = capsys.readouterr()
    assert ("the model is in" in captured.out) == ("1 steps of 32 tokens" in captured.out) == is_shown
    assert ("no training loss is logged" in captured.err) == is_shown
