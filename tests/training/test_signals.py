"""After a signal a run saves a checkpoint, without evaluation and samples."""

import json
import os
import signal

import pytest
from transformers import Trainer

from minigpt_hf.training import trainer
from tests.training.conftest import train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_run_only_saves(number, recipe, words, tmp_path, monkeypatch):
    """The signal arrives in step 4, after which an evaluation is due; the sender may kill the process soon."""
    folder, real = tmp_path / "run", Trainer.training_step
    flags = ["--validation_fraction", "0.3", "--eval_steps", "4", "--save_steps", "4", "--sample_tokens", "4"]

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert train(recipe, words, folder, *flags) == 128 + number
    assert (folder / "checkpoint-4").is_dir()
    assert steps_with(folder, "eval_loss") == []
    assert steps_with(folder, "sample") == [0]
    monkeypatch.setattr(Trainer, "training_step", real)
    assert train(recipe, words, folder, *flags) == 0
    assert steps_with(folder, "eval_loss") == [4, 8]  # the skipped evaluation is performed first
    assert steps_with(folder, "sample") == [0, 4, 8]


@pytest.mark.parametrize(
    ("flags", "stops", "due"),
    [
        ("--save_steps 2", [3, 4, 8], [0, 2, 4, 6, 8]),
        # 26 sequences: 4 steps per epoch.
        pytest.param(
            "--save_strategy epoch --per_device_train_batch_size 8", [3, 4], [0, 4, 8], marks=pytest.mark.slow
        ),
        pytest.param("--validation_fraction 0.3 --eval_steps 2", [3, 4], [0, 2, 4, 6, 8], marks=pytest.mark.slow),
    ],
    ids=["checkpoints", "epochs", "evaluations"],
)
def test_a_stopped_and_resumed_run_logs_the_samples_of_an_uninterrupted_one(
    flags, stops, due, recipe, words, tmp_path, monkeypatch
):
    """A sample is due at each evaluation or regular checkpoint, and none at one that was saved for a signal in between."""
    straight, folder, real = tmp_path / "straight", tmp_path / "run", Trainer.training_step
    flags = [*flags.split(), "--sample_tokens", "4"]
    assert train(recipe, words, straight, *flags) == 0
    for stop in stops:

        def training_step(self, *args, stop=stop, **kwargs):
            if self.state.global_step == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)
        assert train(recipe, words, folder, *flags) == 143
        assert steps_with(folder, "sample") == [step for step in due if step < stop]
    monkeypatch.setattr(Trainer, "training_step", real)
    assert train(recipe, words, folder, *flags) == 0
    samples = [
        [(row["step"], row["sample"]) for row in map(json.loads, (run / "log.jsonl").open()) if "sample" in row]
        for run in (folder, straight)
    ]
    assert samples[0] == samples[1]
    assert [step for step, _ in samples[0]] == due


@pytest.mark.parametrize(("event", "step"), [("training_step", 2), ("evaluate", 3), ("training_step", 4)])
@pytest.mark.parametrize("number", [signal.SIGTERM, None], ids=["signal", "error"])
def test_the_losses_of_epochs_are_those_of_an_uninterrupted_run(
    number, event, step, recipe, words, tmp_path, monkeypatch
):
    """3 steps per epoch, with an evaluation and a checkpoint after the last one."""
    straight, folder, real = tmp_path / "straight", tmp_path / "run", getattr(trainer.MiniGPTTrainer, event)
    flags = "--logging_strategy epoch --per_device_train_batch_size 8 --validation_fraction 0.3".split()
    flags += ["--eval_steps", "3", "--save_steps", "3"]
    assert train(recipe, words, straight, *flags) == 0
    sent = []

    def ends(self, *args, **kwargs):
        if self.state.global_step == step and not sent:
            sent.append(number)
            if number is None:
                raise RuntimeError
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.MiniGPTTrainer, event, ends)
    if number is None:
        with pytest.raises(RuntimeError):
            train(recipe, words, folder, *flags)
    else:
        assert train(recipe, words, folder, *flags) == 143
    assert train(recipe, words, folder, *flags) == 0
    losses = [
        [(row["step"], row["loss"]) for row in map(json.loads, (run / "log.jsonl").open()) if "loss" in row]
        for run in (folder, straight)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [3, 6, 8]


def test_a_run_that_early_stopping_ends_within_an_epoch_when_it_is_resumed_has_the_log_of_an_uninterrupted_one(
    recipe, words, tmp_path, monkeypatch
):
    straight, folder, real = tmp_path / "straight", tmp_path / "run", trainer.MiniGPTTrainer.evaluate
    flags = "--logging_strategy epoch --early_stopping_patience 1 --eval_steps 1 --save_steps 1".split()
    flags += "--validation_fraction 0.3 --muon_learning_rate 1 --learning_rate 1".split()
    assert train(recipe, words, straight, *flags) == 0
    (*_, last) = steps_with(straight, "eval_loss")
    assert last < 8

    def evaluate(self, *args, **kwargs):
        if self.state.global_step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.MiniGPTTrainer, "evaluate", evaluate)
    assert train(recipe, words, folder, *flags) == 143
    monkeypatch.setattr(trainer.MiniGPTTrainer, "evaluate", real)
    assert train(recipe, words, folder, *flags) == 0
    for name in ("loss", "eval_loss", "train_loss"):
        assert steps_with(folder, name) == steps_with(straight, name)


def test_a_loss_with_the_tokens_seen_is_kept_when_a_run_is_resumed_at_its_step(recipe, words, tmp_path, monkeypatch):
    """transformers adds `train_runtime` to such rows, as to the one at the end of training."""
    folder, real = tmp_path / "run", Trainer.training_step
    flags = ["--include_num_input_tokens_seen", "true", "--logging_steps", "1"]

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert train(recipe, words, folder, *flags) == 143
    monkeypatch.setattr(Trainer, "training_step", real)
    assert train(recipe, words, folder, *flags) == 0
    assert steps_with(folder, "loss") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert steps_with(folder, "train_loss") == [8]


def test_a_signal_during_an_evaluation_saves_a_checkpoint_that_is_not_the_best(
    recipe, words, tmp_path, capsys, monkeypatch
):
    """With save_strategy best, the Trainer would save at step 4 only if its score were better than that of step 2."""
    folder, real, nats = tmp_path / "run", trainer.score_documents, [1.0, 2.0, 3.0, 4.0]
    flags = "--validation_fraction 0.3 --eval_steps 2 --save_strategy best --metric_for_best_model loss".split()

    def score_documents(*args):
        if len(nats) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return nats.pop(0), *real(*args)[1:]

    monkeypatch.setattr(trainer, "score_documents", score_documents)
    assert train(recipe, words, folder, *flags) == 75
    assert "saved at step 4" in capsys.readouterr().err
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert train(recipe, words, folder, *flags) == 0
    assert steps_with(folder, "eval_loss") == [2, 4, 6, 8]
    assert json.loads((folder / "model/minigpt.json").read_text())["training"]["published_step"] == 2


def steps_with(folder, name: str) -> list[int]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if name in row]
