"""Disk space checked before the first step: retained checkpoints, one being written, and the model folder."""

import re
import shutil

import pytest

from tests.conftest import representative
from tests.training.conftest import train


def size_of(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("limit", representative([1, 6], 6))
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


def test_muon_needs_room_for_one_number_per_parameter_of_a_matrix_and_adamw_for_two(
    recipe, words, tmp_path, monkeypatch, capsys
):
    """Two layers of four matrices 32 × 32 and three 32 × 96; six checkpoints and the one being written; 4 bytes a number."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    needed = []
    for muon in (True, False):
        assert train(recipe, words, tmp_path / str(muon), f"--muon={muon}", "--save_total_limit", "6") == 28
        needed.append(float(re.search(r"need about ([\d.]+) MB", capsys.readouterr().err)[1]))
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 96)
    assert needed[1] - needed[0] == pytest.approx(7 * 4 * matrices / 1e6, abs=0.11)
