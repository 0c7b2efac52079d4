"""Losses and validation scores do not depend on the world size."""

import json
import math

import pytest

from tests.training.conftest import train
from tests.training.test_two_processes import PLAIN, finish, start


def logged(folder, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.slow
def test_two_processes_report_the_smoothed_loss_and_the_validation_score_of_one(recipe, words, tmp_path):
    """Float32 sums in another order differ by about 1e-5 in a loss of 5."""
    flags = [*PLAIN, "--max_steps=4", "--label_smoothing_factor=0.1", "--validation_fraction=0.3"]
    flags += ["--eval_steps=2", "--save_steps=2", "--per_device_eval_batch_size=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(recipe, words, one, "--per_device_train_batch_size=4", *flags) == 0
    finish(start(recipe, words, two, *flags))
    for name, count in {"loss": 4, "eval_loss": 2, "eval_bits_per_byte": 2, "eval_perplexity": 2}.items():
        assert len(logged(one, name)) == count
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-5), name
    assert logged(one, "eval_perplexity") == pytest.approx([math.exp(loss) for loss in logged(one, "eval_loss")])
    published = [json.loads((run / "model" / "minigpt.json").read_text())["results"] for run in (one, two)]
    assert published[1]["loss"] == pytest.approx(published[0]["loss"], rel=1e-5)
    assert published[1]["bits_per_byte"] == pytest.approx(published[0]["bits_per_byte"], rel=1e-5)
