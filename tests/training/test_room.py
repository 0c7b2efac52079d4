"""Disk space checked before the first step: retained checkpoints, one being written, and the model folder."""

import shutil

import pytest

from tests.training.conftest import train


def size_of(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("limit", [1, 6])
@pytest.mark.parametrize("muon", [True, False])
def test_a_run_needs_space_for_one_checkpoint_more_than_it_retains(muon, limit, recipe, words, tmp_path, monkeypatch):
    """The estimate exceeds the size of a checkpoint by at most 60 %."""
    flags = ["--max_steps", "1", "--save_total_limit", str(limit), f"--muon={muon}"]
    assert train(recipe, words, tmp_path / "first", *flags) == 0
    needed = (limit + 1) * size_of(tmp_path / "first" / "checkpoint-1") + size_of(tmp_path / "first" / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    too_little = train(recipe, words, tmp_path / "second", *flags)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.6 * needed)))
    enough = train(recipe, words, tmp_path / "third", *flags)
    assert (too_little, enough) == (28, 0)
