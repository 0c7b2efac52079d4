"""After a signal a run saves a checkpoint, without evaluation and samples."""

import json
import os
import signal

import pytest
from transformers import Trainer

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


@pytest.mark.parametrize("step", [3, 4, 8])
def test_without_validation_a_resumed_run_logs_the_samples_of_an_uninterrupted_one(
    step, recipe, words, tmp_path, monkeypatch
):
    """A sample is written at each regular checkpoint, but not at one saved because of a signal."""
    straight, folder, real = tmp_path / "straight", tmp_path / "run", Trainer.training_step
    flags = ["--save_steps", "2", "--sample_tokens", "4"]
    assert train(recipe, words, straight, *flags) == 0

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert train(recipe, words, folder, *flags) == 143
    assert steps_with(folder, "sample") == [0, 2][: step - 1] if step < 8 else [0, 2, 4, 6]
    monkeypatch.setattr(Trainer, "training_step", real)
    assert train(recipe, words, folder, *flags) == 0
    samples = [
        [(row["step"], row["sample"]) for row in map(json.loads, (run / "log.jsonl").open()) if "sample" in row]
        for run in (folder, straight)
    ]
    assert samples[0] == samples[1]
    assert [number for number, _ in samples[0]] == [0, 2, 4, 6, 8]


def steps_with(folder, name: str) -> list[int]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if name in row]
