"""What a run still does after it was asked to stop: it saves, and neither validates nor writes a sample."""

import json
import os
import signal

import pytest
from transformers import Trainer

from tests.training.conftest import train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_run_only_saves(number, recipe, words, tmp_path, monkeypatch):
    """The signal arrives in step 4, after which a validation is due; who sent it may kill the process soon."""
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
    assert steps_with(folder, "eval_loss") == [4, 8]  # the evaluation that was left out is made up first
    assert steps_with(folder, "sample") == [0, 4, 4, 8]  # and so is its sample, beside the one at the start


def steps_with(folder, name: str) -> list[int]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if name in row]
