"""Non-finite and exploded losses, gradients, weights and validation losses; skipped steps."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from minigpt_hf.training import callbacks
from minigpt_hf.training.safeguards import LossGuard
from tests.conftest import representative
from tests.training.conftest import assert_equal, rows, state_of, train

UNIFORM = math.log(258)  # loss in nats of a uniform distribution over the byte tokenizer's vocabulary


def multiply_loss(monkeypatch, *steps: int, factor: float) -> None:
    """Multiply the loss of these steps, and hence their gradients."""
    real = Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * factor if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("factor, exit_code", [(9.5, 0), (10.5, 65)])
def test_a_loss_above_ten_times_that_of_a_uniform_distribution_counts_as_exploded(
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


def test_skipped_steps_are_excluded_from_the_logged_mean_and_counted(recipe, words, tmp_path, monkeypatch):
    """The mean over four steps equals the mean of the losses logged at each step, except those of steps 3, 5 and 8."""
    multiply_loss(monkeypatch, 3, 5, 8, factor=math.nan)
    each, mean = tmp_path / "each", tmp_path / "mean"
    flags = ["--on_bad_loss", "skip", "--max_steps", "12", "--logging_nan_inf_filter"]  # which has no effect
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


def test_a_non_finite_gradient_stops_the_run_and_every_batch_of_the_step_is_recorded(
    recipe, words, tmp_path, monkeypatch, capsys
):
    """The losses are finite; the gradient is infinite after the second of two accumulated batches of step 3."""
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


EVALUATED = ["--validation_fraction", "0.3", "--eval_steps", "2"]


@pytest.mark.parametrize("steps, exit_code", [((2, 4, 6, 8), 0), ((2, 4, 6, 7, 8), 65)])
def test_a_run_with_more_than_half_of_its_steps_skipped_is_not_published_and_fewer_are_reported(
    steps, exit_code, recipe, words, tmp_path, monkeypatch, capsys
):
    """Four and five of eight steps."""
    multiply_loss(monkeypatch, *steps, factor=math.nan)
    folder = tmp_path / "run"
    assert train(recipe, words, folder, "--on_bad_loss", "skip") == exit_code
    message = f"{len(steps)} of 8 steps were skipped because of a non-finite or exploded loss"
    assert message in capsys.readouterr().err
    assert (folder / "model").exists() == (exit_code == 0)
    if exit_code == 0:
        card = (folder / "model" / "README.md").read_text()
        assert f"| skipped steps (non-finite or exploded loss) | {len(steps)} |" in card
        assert "| tokens, including those of skipped steps | " in card
        assert json.loads((folder / "model" / "minigpt.json").read_text())["training"]["skipped_steps"] == 4


def test_a_card_of_a_run_without_skipped_steps_does_not_mention_any(recipe, words, tmp_path, capsys):
    assert train(recipe, words, tmp_path / "run", "--max_steps", "1") == 0
    assert "skipped" not in (tmp_path / "run" / "model" / "README.md").read_text() + capsys.readouterr().err


def break_weights(monkeypatch, step: int) -> None:
    """Set one weight to NaN after an optimizer step."""
    real = callbacks.ProgressLogger.on_step_end

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == step:
            with torch.no_grad():
                next(model.parameters())[0, 0] = math.nan
        return real(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(callbacks.ProgressLogger, "on_step_end", on_step_end)


# A step with an evaluation and a checkpoint, a step without, the last step.
STEPS = [(4, "stop"), (5, "skip"), (8, "stop")]
EVALUATED_AND_SAMPLED = [*EVALUATED, "--sample_tokens", "4"]
SAVED_ONLY = ["--eval_strategy", "no"]
NOT_SAVED = [*SAVED_ONLY, "--save_strategy", "no"]
SAMPLED_ONLY = [*NOT_SAVED, "--sample_tokens", "4"]


@pytest.mark.parametrize(
    ("flags", "step", "on_bad_loss"),
    representative(
        [(flags, *step) for flags in (EVALUATED_AND_SAMPLED, SAVED_ONLY, NOT_SAVED, SAMPLED_ONLY) for step in STEPS],
        *((EVALUATED_AND_SAMPLED, 4, "stop"), (SAVED_ONLY, 4, "stop"), (SAVED_ONLY, 5, "skip")),
        *((NOT_SAVED, 8, "stop"), (SAMPLED_ONLY, 5, "skip")),
    ),
)
def test_non_finite_weights_end_the_run_and_are_neither_saved_nor_published(
    flags, step, on_bad_loss, recipe, words, tmp_path, monkeypatch, capsys
):
    break_weights(monkeypatch, step)
    folder = tmp_path / "run"
    assert train(recipe, words, folder, *flags, "--on_bad_loss", on_bad_loss) == 65
    err = capsys.readouterr().err
    assert f"step {step}: model.embed_tokens.weight has non-finite values" in err
    assert "--learning_rate" in err
    assert not (folder / "model").exists()
    saved = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
    assert sorted(saved) == ([] if "--save_strategy" in flags else list(range(2, step, 2)))


def nan_evaluations(monkeypatch, *steps: int, value: float = math.nan) -> None:
    """Replace the validation loss after these steps."""
    from minigpt_hf.training import trainer

    real = trainer.score_documents

    def score_documents(*args, **kwargs):
        evaluations.append(2 * len(evaluations) + 2)
        nats, tokens, documents = real(*args, **kwargs)
        return (value * tokens if evaluations[-1] in steps else nats), tokens, documents

    evaluations = []
    monkeypatch.setattr(trainer, "score_documents", score_documents)


def test_a_non_finite_validation_loss_stops_the_run(recipe, words, tmp_path, monkeypatch, capsys):
    nan_evaluations(monkeypatch, 4)
    assert train(recipe, words, tmp_path / "run", *EVALUATED) == 65
    assert "step 4: the validation loss is nan" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_non_finite_validation_loss_never_selects_the_best_checkpoint(recipe, words, tmp_path, monkeypatch, capsys):
    """NaN at the first of four evaluations: no later loss would compare as lower than NaN."""
    nan_evaluations(monkeypatch, 2)
    flags = [*EVALUATED, "--on_bad_loss", "skip", "--early_stopping_patience", "2"]
    assert train(recipe, words, tmp_path / "run", *flags) == 0
    assert "step 2: the validation loss is nan" in capsys.readouterr().err
    about = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())
    losses = [
        row["eval_loss"]
        for row in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
        if "eval_loss" in row
    ]
    assert len(losses) == 4
    assert about["results"]["loss"] == pytest.approx(min(losses[1:]), rel=1e-9)


def test_after_a_bad_loss_the_newest_checkpoint_better_than_uniform_is_recommended(
    recipe, words, tmp_path, monkeypatch, capsys
):
    """Checkpoints 2 and 4 are better than a uniform distribution, 6 is worse; following the advice finishes the run."""
    nan_evaluations(monkeypatch, 6, value=UNIFORM + 0.1)
    multiply_loss(monkeypatch, 7, factor=math.nan)
    folder = tmp_path / "run"
    assert train(recipe, words, folder, *EVALUATED) == 65
    err = capsys.readouterr().err
    assert f"--resume_from_checkpoint {folder / 'checkpoint-4'}, and" in err
    monkeypatch.undo()
    flags = [*EVALUATED, "--resume_from_checkpoint", folder / "checkpoint-4"]
    assert train(recipe, words, folder, *flags) == 0


def test_after_a_bad_loss_no_checkpoint_is_recommended_if_the_newest_is_better_than_uniform(
    recipe, words, tmp_path, monkeypatch, capsys
):
    multiply_loss(monkeypatch, 7, factor=math.nan)
    assert train(recipe, words, tmp_path / "run", *EVALUATED) == 65
    assert "--resume_from_checkpoint" not in (err := capsys.readouterr().err)
    assert "resume with a lower --learning_rate" in err


def test_a_sample_that_fails_is_reported_in_one_line_and_does_not_affect_training(
    recipe, words, tmp_path, monkeypatch, capsys
):
    """With dropout: an RNG state or training mode that is not restored would change the losses."""

    def fails(model, *args, **kwargs):
        random.random(), np.random.random(), torch.rand(1)
        raise RuntimeError("out of memory\nsecond line")

    plain, folder = tmp_path / "plain", tmp_path / "run"
    assert train(recipe, words, plain, *EVALUATED) == 0
    real = callbacks.generate
    monkeypatch.setattr(callbacks, "generate", fails)
    capsys.readouterr()
    assert train(recipe, words, folder, *EVALUATED, "--sample_tokens", "4") == 65  # the card needs samples
    lines = capsys.readouterr().err.splitlines()
    reported = [line for line in lines if "no sample generated (RuntimeError: out of memory)" in line]
    assert [line.split(":")[0] for line in reported] == ["step 0", "step 2", "step 4", "step 6", "step 8"]
    assert "the trained model cannot generate text (out of memory" in lines[-1]
    assert rows(folder) == rows(plain)
    assert_equal(state_of(folder / "checkpoint-8"), state_of(plain / "checkpoint-8"))
    monkeypatch.setattr(callbacks, "generate", real)
    assert train(recipe, words, folder, *EVALUATED, "--sample_tokens", "4") == 0


# -- accelerators: losses are read one step later ---------------------------------------------------------------------


def defer_checks(monkeypatch) -> None:
    """Check losses one step later, as on CUDA, where the host does not wait for the device in every step."""
    real = LossGuard.__init__

    def init(self, trainer):
        real(self, trainer)
        self.deferred = True

    monkeypatch.setattr(LossGuard, "__init__", init)


@pytest.mark.parametrize("step", [3, 4, 8])
def test_a_deferred_check_saves_no_weights_of_a_bad_step_and_shows_its_data(
    step, recipe, words, tmp_path, monkeypatch, capsys
):
    """Between two saves, at a step with a save, and at the last step."""
    multiply_loss(monkeypatch, step, factor=math.nan)
    immediate, deferred = tmp_path / "immediate", tmp_path / "deferred"
    flags = ["--save_steps", "4"]
    assert train(recipe, words, immediate, *flags) == 65
    defer_checks(monkeypatch)
    assert train(recipe, words, deferred, *flags) == 65
    assert capsys.readouterr().err.count(f"step {step}: the loss is nan") == 2
    saved = [f"checkpoint-{each}" for each in (4, 8) if each < step]
    for folder in (immediate, deferred):
        assert [path.name for path in folder.glob("checkpoint-*")] == saved
        assert not (folder / "model").exists()
        assert [path.name for path in folder.glob("bad-step-*")] == [f"bad-step-{step}.json"]
    shown = [json.loads((folder / f"bad-step-{step}.json").read_text()) for folder in (immediate, deferred)]
    assert shown[0]["input_ids"] == shown[1]["input_ids"]


class HostReads(TorchDispatchMode):
    """Counts the values that the host reads from tensors: each read waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_with_deferred_checks_the_host_reads_no_tensor_in_a_step(recipe, words, tmp_path, monkeypatch):
    defer_checks(monkeypatch)
    flags = ["--save_strategy", "no", "--logging_strategy", "no"]
    reads = []
    for steps in (4, 12):
        with HostReads() as mode:
            assert train(recipe, words, tmp_path / str(steps), *flags, "--max_steps", str(steps)) == 0
        reads.append(mode.count)
    assert reads[0] == reads[1]
