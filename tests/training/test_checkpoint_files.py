"""Files of checkpoints: selection of the newest, required files, durability."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import representative
from tests.training.conftest import assert_equal, go_back, state_of, train


@pytest.fixture(scope="module")
def finished(recipe, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(recipe, words, folder, "--max_steps", "11", "--save_steps", "1", "--save_total_limit", "99") == 0
    return folder


def resume(recipe, words, folder) -> int:
    return train(recipe, words, folder, "--max_steps", "11", "--save_steps", "1", "--save_total_limit", "99")


def test_a_run_resumes_from_the_checkpoint_with_the_highest_number(finished, recipe, words, tmp_path):
    """Checkpoint 10 is newer than 9. Log entries of steps that are not repeated are unchanged."""
    folder = tmp_path / "run"
    go_back(finished, folder, 10)
    taken = [row for row in logged(folder) if row["step"] <= 10]
    assert resume(recipe, words, folder) == 0
    assert [row for row in logged(folder) if row["step"] <= 10] == taken
    assert_equal(state_of(folder / "checkpoint-11"), state_of(finished / "checkpoint-11"))


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name",
    representative(
        ["config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "fingerprint.json"], "scheduler.pt"
    ),
)
def test_a_checkpoint_whose_manifest_lacks_a_required_file_is_not_used(name, finished, recipe, words, tmp_path, capsys):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    checkpoint = folder / "checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest[name]
    (checkpoint / name).unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert resume(recipe, words, folder) == 0
    assert (folder / "checkpoint-4.aside-1").is_dir()
    assert name in capsys.readouterr().err
    assert_equal(state_of(folder / "checkpoint-11"), state_of(finished / "checkpoint-11"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="resolves the paths of file descriptors in /proc")
def test_checkpoints_and_model_are_fsynced_before_their_rename_and_the_parent_folder_after_it(
    recipe, words, tmp_path, monkeypatch
):
    """A rename is durable only after the fsync of the parent folder."""
    folder, events, fsync, rename = tmp_path / "run", [], os.fsync, os.rename

    def recorded_fsync(descriptor):
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        return fsync(descriptor)

    def recorded_rename(source, target, **kwargs):
        events.append(("rename", str(source), str(target)))
        return rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    assert train(recipe, words, folder, "--max_steps", "4") == 0
    begin = 0
    for name in ("checkpoint-2", "checkpoint-4", "model"):
        checkpoint = folder / name
        (at,) = [place for place, event in enumerate(events) if event[0] == "rename" and event[2] == str(checkpoint)]
        staged = events[at][1]
        before = {event[1] for event in events[begin:at]}
        required = {staged, *(f"{staged}/{path.relative_to(checkpoint)}" for path in checkpoint.rglob("*"))}
        assert required <= before
        assert ("fsync", str(folder)) in events[at:]
        assert at < events.index(("fsync", str(folder)), at)
        following = [place for place, event in enumerate(events) if event[0] == "rename" and place > at]
        assert events.index(("fsync", str(folder)), at) < min(following, default=len(events))
        begin = at
