"""Which loss counts as exploded, and what the log says about steps that were skipped."""

import json
import math

import pytest
from transformers import Trainer

from tests.training.conftest import rows, train

UNIFORM = math.log(258)  # the loss of a uniform guess over the byte tokenizer's vocabulary, and of fresh weights


def multiply_loss(monkeypatch, *steps: int, factor: float) -> None:
    """The loss of these steps, and with it their gradients, is multiplied."""
    real = Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * factor if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("factor, exit_code", [(9.5, 0), (10.5, 65)])
def test_a_loss_above_ten_times_that_of_a_uniform_guess_is_an_explosion(
    factor, exit_code, recipe, words, tmp_path, monkeypatch, capsys
):
    multiply_loss(monkeypatch, 1, factor=factor)
    folder = tmp_path / "run"
    assert train(recipe, words, folder, "--max_steps", "1", "--warmup_steps", "0") == exit_code
    if exit_code == 0:
        assert rows(folder)[0]["loss"] == pytest.approx(factor * UNIFORM, rel=0.02)
    else:
        assert "step 1" in capsys.readouterr().err
        assert not (folder / "model").exists()


def test_skipped_steps_are_left_out_of_the_logged_mean_and_counted(recipe, words, tmp_path, monkeypatch):
    """A mean over four steps is that of the losses that were logged one by one, without those of steps 3, 5 and 8."""
    multiply_loss(monkeypatch, 3, 5, 8, factor=math.nan)
    each, mean = tmp_path / "each", tmp_path / "mean"
    flags = ["--on_bad_loss", "skip", "--max_steps", "12"]
    assert train(recipe, words, each, *flags, "--logging_steps", "1") == 0
    assert train(recipe, words, mean, *flags, "--logging_steps", "4") == 0
    single = {row["step"]: row["loss"] for row in rows(each)}
    assert [step for step, loss in single.items() if not math.isfinite(loss)] == [3, 5, 8]
    first, second, third = rows(mean)
    assert first["loss"] == pytest.approx(sum(single[step] for step in (1, 2, 4)) / 3, rel=1e-6)
    assert second["loss"] == pytest.approx(sum(single[step] for step in (6, 7)) / 2, rel=1e-6)
    assert third["loss"] == pytest.approx(sum(single[step] for step in (9, 10, 11, 12)) / 4, rel=1e-6)
    logged = [json.loads(line) for line in (mean / "log.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in logged if "loss" in row] == [1, 3, 3]


def test_a_gradient_that_is_not_finite_stops_the_run_and_every_batch_of_its_step_is_shown(
    recipe, words, tmp_path, monkeypatch, capsys
):
    """The loss is finite; the gradient is not after the second of two accumulated batches of step 3."""
    batches, real = [], Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 2:
            batches.append(inputs["input_ids"].tolist())
            if len(batches) == 2:
                next(model.parameters()).grad[0] = math.inf
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    folder = tmp_path / "run"
    assert train(recipe, words, folder, "--gradient_accumulation_steps", "2") == 65
    assert "step 3" in capsys.readouterr().err
    assert [row["step"] for row in rows(folder)] == [1, 2]
    shown = json.loads((folder / "bad-step-3.json").read_text())
    assert shown["input_ids"] == batches[0] + batches[1]
    text = words.read_text()
    assert all(part in text * 2 for row in shown["texts"] for part in row.split("<|endoftext|>"))
