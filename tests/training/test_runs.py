"""Run folders: locking, damage, logging, signals, and resumed runs that equal uninterrupted ones."""

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from minigpt_hf import evaluate, generate
from minigpt_hf.cli import main
from minigpt_hf.training import checkpoint
from minigpt_hf.training.run_folder import RunFolder
from minigpt_hf.training.trainer import MiniGPTTrainer
from tests.conftest import representative
from tests.training.conftest import assert_equal, go_back, rows, state_of, train


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def final(folder) -> dict:
    """The last row of a finished run, with `train_loss`."""
    return log_of(folder)[-1]


def files_of(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(recipe, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(recipe, words, folder) == 0
    return folder


EVALUATED = ["--validation_fraction", "0.3", "--eval_steps", "2", "--early_stopping_patience", "9"]


@pytest.fixture(scope="module")
def evaluated(recipe, words, tmp_path_factory):
    """Evaluated and saved every two steps. The learning rate rises until the loss does: the last step is not the best."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(recipe, words, folder, *EVALUATED, *STEEP) == 0
    best = min((row for row in log_of(folder) if "eval_loss" in row), key=lambda row: row["eval_loss"])
    assert best["step"] < 8
    return folder


STEEP = ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "16"]
STEEP += ["--learning_rate", "2", "--muon_learning_rate", "2"]  # half of it at step 8


# -- one run per folder -----------------------------------------------------------------------------------------------


def start(recipe, data, folder, *flags, **settings) -> subprocess.Popen:
    argv = [sys.executable, "-m", "minigpt_hf.cli", "train", "--recipe", recipe, "--data", data, "--output_dir", folder]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    return subprocess.Popen([str(word) for word in [*argv, *flags]], **settings)


def wait_for(condition, is_alive, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        assert is_alive(), "the process has ended"
        time.sleep(0.05)


def steps_logged(folder) -> int:
    log = folder / "log.jsonl"
    return log.read_bytes().count(b'"loss"') if log.exists() else 0


def test_a_run_folder_is_locked_until_its_process_ends_or_is_killed(recipe, words, finished, tmp_path, capsys):
    """While a process trains or is suspended, commands for its folder are rejected; after SIGKILL they resume the run."""
    folder = tmp_path / "runs" / "one"
    flags = ["--max_steps", "100000", "--save_steps", "20", "--save_total_limit", "2"]
    process = multiprocessing.get_context("fork").Process(target=train, args=(recipe, words, folder, *flags))
    process.start()
    try:
        wait_for(lambda: list(folder.glob("checkpoint-*")), process.is_alive)
        os.kill(process.pid, signal.SIGSTOP)  # a suspended process still holds its lock
        time.sleep(0.2)
        before = files_of(folder)
        for more in ([], ["--fresh"], ["--max_steps", "7"]):
            assert train(recipe, words, folder, *flags, *more) == 2
            (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("minigpt")]
            assert f"output_dir {folder}: another process (pid {process.pid} on host " in line
            assert line.endswith("wait for it, stop it, or use another folder")
        assert files_of(folder) == before
        count = steps_logged(folder)
        os.kill(process.pid, signal.SIGCONT)
        wait_for(lambda: steps_logged(folder) > count + 5, process.is_alive)
    finally:
        process.kill()
        process.join()
    log = log_of(folder)
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(log))
    # After the kill the lock is free, and the run is resumed with fewer steps.
    newest = RunFolder(folder).checkpoints()[-1]
    steps = str(int(newest.name.split("-")[1]) + 1)
    assert train(recipe, words, folder, "--max_steps", steps, "--save_steps", "20", "--allow_change", "max_steps") == 0
    assert f"resuming from step {int(steps) - 1}" in capsys.readouterr().err
    assert not (folder / ".lock").exists()


def test_a_link_at_the_path_of_the_lock_file_is_not_followed(recipe, words, finished, tmp_path, capsys):
    target, folder = tmp_path / "target", shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "model")
    target.write_text("content")
    (folder / ".lock").symlink_to(target)
    before = files_of(folder)
    assert train(recipe, words, folder) == 2
    assert f"output_dir {folder}: cannot be written (" in capsys.readouterr().err
    assert files_of(folder) == before
    assert target.read_text() == "content"


def test_a_run_below_its_data_is_resumed(recipe, words, tmp_path, monkeypatch, capsys):
    shutil.copy(words, tmp_path / "words.md")
    monkeypatch.chdir(tmp_path)
    for data in (".", "**/*.md"):
        run, again = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        assert train(recipe, data, run) == 0
        go_back(run, again, 4)
        assert train(recipe, data, again) == 0
        assert "resuming from step 4" in capsys.readouterr().err
        assert_equal(state_of(again / "checkpoint-8"), state_of(run / "checkpoint-8"))


def test_a_folder_created_for_a_rejected_run_is_removed(recipe, tmp_path):
    assert train(recipe, tmp_path / "absent.txt", tmp_path / "runs" / "a" / "b") == 2
    assert list(tmp_path.iterdir()) == []


def test_fresh_renames_nothing_if_the_new_run_is_rejected(recipe, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = files_of(tmp_path)
    assert train(recipe, tmp_path / "absent.txt", folder, "--fresh") == 2
    assert files_of(tmp_path) == before


def test_a_fresh_run_is_where_a_link_points_to(recipe, words, finished, tmp_path):
    store = shutil.copytree(finished, tmp_path / "store" / "run")
    link = tmp_path / "link"
    link.symlink_to(store)
    before = files_of(store)
    assert train(recipe, words, link, "--fresh", "--max_steps", "2") == 0
    assert link.is_symlink()
    assert (store / "checkpoint-2").is_dir() and not (store / "checkpoint-8").exists()
    assert files_of(store.with_name("run.aside-1")) == before


@pytest.mark.parametrize("content", representative([b"", b"{", b'{"pid": 1}', b"\xff\0"], b'{"pid": 1}', b"\xff\0"))
def test_a_lock_file_without_a_holder_blocks_nothing(content, recipe, words, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_bytes(content)
    assert train(recipe, words, tmp_path / "run", "--max_steps", "1") == 0


def test_a_file_system_without_locks_causes_a_warning(recipe, words, tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert train(recipe, words, tmp_path / "run", "--max_steps", "1") == 0
    assert "this file system does not support locks (No locks available)" in capsys.readouterr().err


def test_a_checkpoint_that_changes_after_its_step_was_printed_is_rejected(
    recipe, words, finished, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)

    def changed(*args):
        shutil.copy(finished / "checkpoint-2" / "trainer_state.json", folder / "checkpoint-4")

    monkeypatch.setattr("minigpt_hf.training.train.plan_table", changed)
    assert train(recipe, words, folder) == 2
    assert "was saved at step 4, but loaded at step 2" in capsys.readouterr().err


# -- skipped steps ----------------------------------------------------------------------------------------------------


def bad(steps, factor, monkeypatch):
    """Multiply the loss of these steps."""
    real = MiniGPTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * factor if self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(MiniGPTTrainer, "compute_loss", compute_loss)


def test_a_run_of_skipped_steps_publishes_nothing_even_when_it_is_resumed(recipe, words, tmp_path, capsys, monkeypatch):
    bad(range(1, 9), math.nan, monkeypatch)
    folder = tmp_path / "run"
    for _ in range(2):
        assert train(recipe, words, folder, "--on_bad_loss", "skip") == 65
        assert "no optimizer step was taken: 8 of 8 steps were skipped" in capsys.readouterr().err
        assert not (folder / "model").exists()
    assert not any("train_loss" in row for row in log_of(folder))
    assert not any(row.get("loss") == 0 for row in log_of(folder))


def test_the_count_of_skipped_steps_is_preserved_when_a_run_is_resumed(recipe, words, tmp_path, monkeypatch):
    bad((2, 3, 7), math.nan, monkeypatch)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--on_bad_loss", "skip", "--logging_steps", "3"]
    assert train(recipe, words, straight, *flags) == 0
    go_back(straight, resumed, 4)
    assert train(recipe, words, resumed, *flags) == 0
    assert [row.get("skipped_steps") for row in log_of(straight) if "loss" in row] == [2, 2]
    assert rows(resumed) == rows(straight)
    assert [row.get("skipped_steps") for row in log_of(resumed) if "loss" in row] == [2, 2]
    assert final(resumed)["train_loss"] == final(straight)["train_loss"]
    assert 5 < final(straight)["train_loss"] < 6  # mean over the five steps taken; ln 258 = 5.55


@pytest.mark.parametrize(("share", "code"), [(0.99, 0), (1.01, 65)])
def test_a_loss_has_exploded_above_ten_times_that_of_a_uniform_distribution(
    share, code, recipe, words, tmp_path, monkeypatch
):
    real, limit = MiniGPTTrainer.compute_loss, 10 * math.log(258)

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * (share * limit / loss.item()) if self.state.global_step == 1 else loss

    monkeypatch.setattr(MiniGPTTrainer, "compute_loss", compute_loss)
    assert train(recipe, words, tmp_path / "run", "--max_steps", "2") == code


# -- a finished run ----------------------------------------------------------------------------------------------------


def damaged(model, how: str) -> None:
    weights = model / "model.safetensors"
    if how == "emptied":
        shutil.rmtree(model)
        model.mkdir()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "no tokenizer":
        (model / "tokenizer.json").unlink()
    elif how == "no config":
        (model / "config.json").write_text("{")
    elif how == "lost tensor":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "other shape":
        tensors = load_file(weights)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        save_file(tensors, weights, metadata={"format": "pt"})


DAMAGE = ["emptied", "cut", "empty weights", "no tokenizer", "no config", "lost tensor", "other shape"]


@pytest.mark.parametrize("how", representative(DAMAGE, "cut", "lost tensor"))
def test_a_damaged_model_of_a_finished_run_is_renamed_and_published_again(
    how, recipe, words, evaluated, tmp_path, capsys
):
    folder = shutil.copytree(evaluated, tmp_path / "run")
    damaged(folder / "model", how)
    left = files_of(folder / "model")
    assert train(recipe, words, folder, *EVALUATED, *STEEP) == 0
    captured = capsys.readouterr()
    assert "is damaged (" in captured.err
    assert "renamed to model.aside-1" in captured.err
    assert "this run is already finished" not in captured.err
    assert files_of(folder / "model.aside-1") == left
    assert_equal(*[load_file(run / "model" / "model.safetensors") for run in (folder, evaluated)])
    assert train(recipe, words, folder, *EVALUATED, *STEEP) == 0
    assert "this run is already finished" in capsys.readouterr().err


def test_other_weights_in_the_model_of_a_finished_run_are_reported(recipe, words, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    weights = load_file(folder / "model" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model" / "model.safetensors")
    assert train(recipe, words, folder) == 0
    assert "this run is already finished" in (reported := capsys.readouterr().err)
    assert "its results, scores and samples are those of other weights; restore the weights" in reported


def test_a_damaged_model_without_a_checkpoint_is_an_error(recipe, words, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    damaged(folder / "model", "cut")
    for path in RunFolder(folder).checkpoints():
        shutil.rmtree(path)
    before = files_of(folder)
    assert train(recipe, words, folder) == 2
    assert "the model is damaged (" in (err := capsys.readouterr().err)
    assert err.splitlines()[-1].endswith(
        "there is no valid checkpoint to publish it from; "
        f"restore {folder / 'model'} from a copy, or train again with --fresh"
    )
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "difference", representative(["text", "number of steps", "seed", "learning rate"], "text", "seed")
)
def test_the_model_of_another_run_is_renamed_and_that_of_the_run_published(
    difference, recipe, words, finished, tmp_path, capsys
):
    folder, other, reversed_words = shutil.copytree(finished, tmp_path / "run"), tmp_path / "other", tmp_path / "w.txt"
    reversed_words.write_text(words.read_text()[::-1])
    data = reversed_words if difference == "text" else words
    flags = {"number of steps": ["--max_steps", 6], "seed": ["--seed", 7], "learning rate": ["--learning_rate", 1e-3]}
    assert train(recipe, data, other, *flags.get(difference, [])) == 0
    shutil.rmtree(folder / "model")
    shutil.copytree(other / "model", folder / "model")
    assert train(recipe, words, folder) == 0
    assert "is damaged (it is the model of another run); renamed to model.aside-1" in capsys.readouterr().err
    assert_equal(*[load_file(run / "model" / "model.safetensors") for run in (folder, finished)])


@pytest.mark.parametrize("content", [None, ""])
def test_a_log_without_the_steps_before_the_checkpoint_is_reported(content, recipe, words, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    (folder / "log.jsonl").unlink()
    if content is not None:
        (folder / "log.jsonl").write_text(content)
    assert train(recipe, words, folder) == 0
    assert f"{folder / 'log.jsonl'}: has no rows up to step 4; the times" in capsys.readouterr().err


def test_a_finished_run_whose_card_was_edited_is_still_finished(recipe, words, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "model" / "README.md").write_text("mine")
    (folder / "model" / "LICENSE").write_text("MIT")
    before = files_of(folder)
    assert train(recipe, words, folder) == 0
    assert "this run is already finished" in capsys.readouterr().err
    assert files_of(folder) == before


def test_card_settings_of_a_finished_run_are_reported_as_not_applied(recipe, words, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert train(recipe, words, folder, "--language", "de", "--license", "mit") == 0
    err = capsys.readouterr().err
    assert "--language ['de']: not applied, the model was published with language []" in err
    assert "--license mit: not applied, the model was published with license None" in err


# -- the log ----------------------------------------------------------------------------------------------------------


def test_incomplete_lines_of_the_log_are_removed_with_a_message(recipe, words, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines.insert(2, b'{"step": 3, "lo\xff\n')
    (folder / "log.jsonl").write_bytes(b"".join(lines[:5]) + b'{"step": 4, "tok')
    assert main(["plot", str(folder), "--output", str(tmp_path / "a.png")]) == 0
    assert train(recipe, words, folder) == 0
    assert (
        "removed incomplete or invalid rows, e.g. of an interrupted write (line 3, line 6)" in capsys.readouterr().err
    )
    assert rows(folder) == rows(finished)


@pytest.mark.parametrize(
    "line",
    representative(
        [
            {"step": 2, "sample": 3},
            {"step": 4, "eval_loss": "x"},
            {"step": True},
            {"step": -1},
            {"step": 2, "seconds": None},
            {"step": 2, "eval_loss": 10**400},
        ],
        *({"step": 4, "eval_loss": "x"}, {"step": True}, {"step": 2, "eval_loss": 10**400}),
    ),
)
def test_lines_of_the_log_with_wrong_types_are_removed_with_a_message(line, recipe, words, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    with (folder / "log.jsonl").open("r+") as file:
        lines = file.readlines()
        file.seek(0)
        file.writelines([*lines[:4], json.dumps(line) + "\n"])
        file.truncate()
    assert train(recipe, words, folder, "--sample_tokens", "2") == 0
    assert "removed incomplete or invalid rows, e.g. of an interrupted write (line 5)" in capsys.readouterr().err
    assert rows(folder) == rows(finished)


def test_a_run_that_was_killed_before_its_first_checkpoint_logs_each_step_once(recipe, words, finished, tmp_path):
    folder = tmp_path / "run"
    go_back(finished, folder, 0)
    assert train(recipe, words, folder) == 0
    assert rows(folder) == rows(finished)


class FullDisk:
    """`Path.open` whose writes to `log.jsonl` fail after some rows: half a line is written, then ENOSPC."""

    def __init__(self, after: int):
        self.left, self.real = after, Path.open

    def open(self, path, *args, **kwargs):
        opened = self.real(path, *args, **kwargs)
        if path.name != "log.jsonl" or args[:1] != ("ab",):
            return opened
        return _FullFile(opened, self)


class _FullFile:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, line):
        self.disk.left -= 1
        if self.disk.left > 0:
            return self.file.write(line)
        if self.disk.left == 0:
            return self.file.write(line[: len(line) // 2])
        raise OSError(28, "No space left on device")


def test_a_full_disk_while_logging_is_reported_with_sizes_and_leaves_complete_lines(
    recipe, words, finished, tmp_path, capsys
):
    folder, disk, patch = tmp_path / "run", FullDisk(6), pytest.MonkeyPatch()
    patch.setattr(Path, "open", lambda path, *args, **kwargs: disk.open(path, *args, **kwargs))
    try:
        assert train(recipe, words, folder) == 28
    finally:
        patch.undo()
    assert "a checkpoint needs about 0." in (err := capsys.readouterr().err)
    assert "MB are free" in err
    assert rows(folder) == rows(finished)[:5]
    assert train(recipe, words, folder) == 0
    assert rows(folder) == rows(finished)


def test_files_of_a_run_are_replaced_atomically(recipe, words, tmp_path, monkeypatch):
    """Interrupted before each rename: the file is the old one or the new one. An interrupted start can be repeated."""
    folder, real = tmp_path / "run", Path.replace
    for num_renamed in range(2):
        left = [num_renamed]

        def interrupted_replace(path, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(path, target)

        monkeypatch.setattr(Path, "replace", interrupted_replace)
        assert train(recipe, words, folder) == 130
        monkeypatch.setattr(Path, "replace", real)
        assert (folder / "recipe.yaml").exists() == (num_renamed == 1)
        assert not (folder / "fingerprint.json").exists()
    assert train(recipe, words, folder) == 0


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("event", ["training_step", "evaluate"])
def test_a_run_whose_folder_was_replaced_writes_nothing_into_the_new_one(
    event, kept, recipe, words, tmp_path, capsys, monkeypatch
):
    """As by `mv run old` or `rm -r run`, and another run in its place."""
    run, called = tmp_path / "run", getattr(MiniGPTTrainer, event)

    def replacing(self, *args, **kwargs):
        if not (run / "new").exists():
            run.rename(tmp_path / "old")
            if not kept:
                shutil.rmtree(tmp_path / "old")
            run.mkdir()
            (run / "new").touch()
        return called(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, event, replacing)
    assert train(recipe, words, run, *EVALUATED) == 74
    assert "moved, removed or replaced" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["new"]


def test_a_run_folder_that_vanishes_ends_the_run_with_a_message(recipe, words, tmp_path, capsys, monkeypatch):
    real = MiniGPTTrainer.training_step

    def vanishes(self, *args, **kwargs):
        if self.state.global_step == 3:
            shutil.rmtree(self.args.output_dir)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", vanishes)
    assert train(recipe, words, tmp_path / "run") == 74
    err = capsys.readouterr().err
    assert "(after step 4); once" in err
    assert err.count("\n") == 1


# -- a resumed run logs what an uninterrupted one does -----------------------------------------------------------------


@pytest.mark.slow
def test_losses_are_averaged_over_the_same_steps_after_a_resume(recipe, words, tmp_path, capsys):
    """Logged every 3 steps, interrupted at 2, 4 and 8: equal rows and `train_loss`; the plan states the remaining steps."""
    straight, flags = tmp_path / "straight", ["--logging_steps", "3"]
    assert train(recipe, words, straight, *flags) == 0
    for cut in (2, 4, 8):
        resumed = tmp_path / f"cut-{cut}"
        go_back(straight, resumed, cut)
        capsys.readouterr()
        assert train(recipe, words, resumed, *flags) == 0
        assert rows(resumed) == rows(straight)
        assert final(resumed)["train_loss"] == final(straight)["train_loss"]
        assert [row["step"] for row in log_of(resumed)] == [row["step"] for row in log_of(straight)]
        captured = capsys.readouterr()
        assert f"for the remaining {8 - cut} steps" in captured.out
        assert "do not match" not in captured.err
    losses = {row["step"]: row["loss"] for row in rows(straight)}
    each = tmp_path / "each"
    assert train(recipe, words, each) == 0
    single = [row["loss"] for row in rows(each)]
    assert losses[3] == pytest.approx(sum(single[:3]) / 3, rel=1e-6)
    assert final(straight)["train_loss"] == pytest.approx(sum(single) / 8, rel=1e-6)


def test_persistent_workers_end_with_the_training(recipe, words, tmp_path):
    """They ignore SIGTERM, so Python would wait for them at its exit."""
    flags = ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true", "--max_steps", "2"]
    assert train(recipe, words, tmp_path / "done", *flags) == 0
    assert multiprocessing.active_children() == []
    flags += ["--learning_rate", "1e30", "--muon_learning_rate", "1e30", "--lr_scheduler_type", "constant"]
    assert train(recipe, words, tmp_path / "failed", *flags, "--warmup_steps", "0") == 65
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_run_with_persistent_workers_is_resumed_exactly(recipe, words, tmp_path):
    """13 steps per epoch; interrupted in the second and ending in the third; with dropout."""
    flags = ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true", "--max_steps", "30"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(recipe, words, straight, *flags, "--save_steps", "15") == 0
    go_back(straight, resumed, 15)
    assert train(recipe, words, resumed, *flags, "--save_steps", "15") == 0
    assert rows(resumed) == rows(straight)
    assert_equal(state_of(resumed / "checkpoint-30"), state_of(straight / "checkpoint-30"))


@pytest.mark.slow
def test_intervals_given_as_fractions_cause_no_warning_when_resuming_and_new_intervals_are_applied(
    recipe, words, tmp_path, capfd
):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    flags = ["--eval_steps", "0.25", "--save_steps", "0.25", "--logging_steps", "0.125", "--validation_fraction", "0.3"]
    assert train(recipe, words, straight, *flags) == 0
    go_back(straight, folder, 4)
    capfd.readouterr()
    # Other intervals disable load_best_model_at_end, a change that has to be allowed by name.
    changes = ["--save_steps", "3", "--allow_change", "load_best_model_at_end"]
    assert train(recipe, words, folder, *flags, *changes) == 0
    err = capfd.readouterr().err
    assert "do not match" not in err
    assert "save_steps was 2 and is 3 from this step on" in err
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert json.loads((folder / "model" / "minigpt.json").read_text())["recipe"]["eval_steps"] == 0.25


def test_changed_data_is_reported_with_its_size(recipe, words, finished, tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    go_back(finished, folder, 4)
    other.write_text(words.read_text()[:400])
    assert train(recipe, other, folder) == 2
    message = f"data was {words} (420 characters, 421 tokens) and is {other} (400 characters, 401 tokens)"
    assert message in capsys.readouterr().err
    same = tmp_path / words.name
    same.write_text(words.read_text()[::-1])
    os.chdir(tmp_path)
    assert train(recipe, same, folder) == 2
    assert "data was " in (err := capsys.readouterr().err)
    assert json.loads((folder / "fingerprint.json").read_text())["data"] not in err


def test_a_moved_run_publishes_its_best_checkpoint(recipe, words, evaluated, tmp_path):
    """The weights of the original folder are deleted, so that nothing can be read from it."""
    original, moved = tmp_path / "original", tmp_path / "elsewhere" / "moved"
    go_back(evaluated, original, 6)
    shutil.copytree(original, moved)
    for file in original.rglob("model.safetensors"):
        file.unlink()
    assert train(recipe, words, moved, *EVALUATED, *STEEP) == 0
    published = [load_file(run / "model" / "model.safetensors") for run in (moved, evaluated)]
    assert_equal(*published)
    about = [json.loads((run / "model" / "minigpt.json").read_text())["results"] for run in (moved, evaluated)]
    assert about[0] == about[1]
    assert str(original) not in (moved / "checkpoint-8" / "trainer_state.json").read_text()


def test_a_missing_best_checkpoint_is_reported_and_the_next_best_is_published_with_its_score(
    recipe, words, evaluated, tmp_path, capsys
):
    folder = tmp_path / "run"
    go_back(evaluated, folder, 8)
    losses = {row["step"]: row["eval_loss"] for row in log_of(evaluated) if "eval_loss" in row}
    best, second = sorted(losses, key=losses.get)[:2]
    shutil.rmtree(folder / f"checkpoint-{best}")
    assert train(recipe, words, folder, *EVALUATED, *STEEP) == 0
    assert (
        f"checkpoint-{best}, the best checkpoint, is missing, invalid or of another run; checkpoint-{second} is"
        in capsys.readouterr().err
    )
    weights = [load_file(folder / name / "model.safetensors") for name in ("model", f"checkpoint-{second}")]
    assert_equal(*weights)
    results = json.loads((folder / "model" / "minigpt.json").read_text())["results"]
    assert results["loss"] == pytest.approx(losses[second], rel=1e-12)


@pytest.mark.parametrize("exchanged", ["with the same step of another run", "with another step of this run"])
def test_an_exchanged_best_checkpoint_is_reported_and_not_published_with_its_score(
    exchanged, recipe, words, evaluated, tmp_path, capsys
):
    folder, other = tmp_path / "run", tmp_path / "other"
    go_back(evaluated, folder, 8)
    losses = {row["step"]: row["eval_loss"] for row in log_of(evaluated) if "eval_loss" in row}
    best, second = sorted(losses, key=losses.get)[:2]
    shutil.rmtree(folder / f"checkpoint-{best}")
    if exchanged.startswith("with the same"):
        assert train(recipe, words, other, *EVALUATED, *STEEP, "--seed", "7") == 0
        shutil.copytree(other / f"checkpoint-{best}", folder / f"checkpoint-{best}")
    else:
        last = sorted(losses, key=losses.get)[-1]
        shutil.copytree(folder / f"checkpoint-{last}", folder / f"checkpoint-{best}")
    assert train(recipe, words, folder, *EVALUATED, *STEEP) == 0
    assert (
        f"checkpoint-{best}, the best checkpoint, is missing, invalid or of another run; checkpoint-{second}"
        in capsys.readouterr().err
    )
    weights = [load_file(folder / name / "model.safetensors") for name in ("model", f"checkpoint-{second}")]
    assert_equal(*weights)
    results = json.loads((folder / "model" / "minigpt.json").read_text())["results"]
    assert results["loss"] == pytest.approx(losses[second], rel=1e-12)


def test_a_checkpoint_renamed_to_another_step_is_not_resumed_from(recipe, words, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-6")
    assert train(recipe, words, folder) == 0
    err = capsys.readouterr().err
    assert "checkpoint-6 is invalid (it was saved at step 2); renamed to checkpoint-6.aside-1" in err
    assert f"resuming from step 4 ({folder / 'checkpoint-4'})" in err
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


@pytest.mark.parametrize("step", [6, 8])
def test_scores_of_another_validation_text_are_neither_compared_nor_published(
    step, recipe, words, evaluated, tmp_path, capsys
):
    """After an allowed change of the validation text, the published score is that of `minigpt evaluate`."""
    folder = tmp_path / "run"
    go_back(evaluated, folder, step)
    flags = ["--early_stopping_patience", "9", "--eval_steps", "2", *STEEP, "--validation_fraction", "0.15"]
    assert train(recipe, words, folder, *flags, "--allow_change", "data", "validation") == 0
    assert "the validation text has changed: earlier scores cannot be compared" in capsys.readouterr().err
    published = json.loads((folder / "model" / "minigpt.json").read_text())["results"]
    score = evaluate(folder / "model", str(words), split="validation")
    drawn = [row["step"] for row in log_of(folder) if "eval_loss" in row]
    assert drawn == [*range(step, 9, 2)]
    assert [row["step"] for row in log_of(folder) if "earlier_eval_loss" in row] == [*range(2, step + 1, 2)]
    assert published["tokens"] == score.tokens
    assert published["loss"] == score.loss
    weights = [load_file(folder / name / "model.safetensors") for name in ("model", "checkpoint-8")]
    assert_equal(*weights)


def test_scores_of_the_validation_text_are_drawn_again_after_an_attempt_with_another_one(
    recipe, words, evaluated, tmp_path
):
    folder = tmp_path / "run"
    go_back(evaluated, folder, 4)
    flags = ["--early_stopping_patience", "9", "--eval_steps", "2", *STEEP, "--validation_fraction", "0.15"]
    assert train(recipe, words, folder, *flags, "--allow_change", "data", "validation") == 0
    shutil.rmtree(folder / "model")
    go_back_to = ["--resume_from_checkpoint", str(folder / "checkpoint-4")]
    assert train(recipe, words, folder, *EVALUATED, *STEEP, *go_back_to) == 0
    scores = [
        [(row["step"], row["eval_loss"]) for row in log_of(run) if "eval_loss" in row] for run in (folder, evaluated)
    ]
    assert scores[0] == scores[1]
    assert not any("earlier_eval_loss" in row for row in log_of(folder))


@pytest.mark.parametrize("metric", representative(["loss", "eval_perplexity", "bits_per_byte"], "eval_perplexity"))
def test_the_lowest_of_every_metric_is_the_best(metric, recipe, words, evaluated, tmp_path):
    folder = tmp_path / "run"
    assert train(recipe, words, folder, *EVALUATED, *STEEP, "--metric_for_best_model", metric) == 0
    lowest = min(row["eval_loss"] for row in log_of(folder) if "eval_loss" in row)
    assert json.loads((folder / "model" / "minigpt.json").read_text())["results"]["loss"] == pytest.approx(lowest)
    assert_equal(*[load_file(run / "model" / "model.safetensors") for run in (folder, evaluated)])


def test_early_stopping_is_final(recipe, words, tmp_path, capsys):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    flags = ["--validation_fraction", "0.3", "--eval_steps", "2", "--early_stopping_patience", "1", *STEEP]
    assert train(recipe, words, straight, *flags, "--max_steps", "20") == 0
    last = max(row["step"] for row in log_of(straight))
    assert last < 20
    go_back(straight, folder, 99)
    capsys.readouterr()
    assert train(recipe, words, folder, *flags, "--max_steps", "20") == 0
    assert "early stopping" in capsys.readouterr().err
    assert rows(folder) == rows(straight)
    assert max(row["step"] for row in log_of(folder)) == last
    models = [load_file(run / "model" / "model.safetensors") for run in (folder, straight)]
    assert_equal(*models)
    # A higher patience is a change to be allowed, after which training continues.
    shutil.rmtree(folder / "model")
    more = ["--early_stopping_patience", "30", "--allow_change", "early_stopping_patience"]
    assert train(recipe, words, folder, *flags, "--max_steps", "20", *more) == 0
    assert max(row["step"] for row in log_of(folder)) == 20


def test_resuming_from_an_earlier_checkpoint_renames_the_later_ones(recipe, words, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    go_back(finished, folder, 99)
    flags = ["--resume_from_checkpoint", folder / "checkpoint-4", "--max_steps", "5", "--allow_change", "max_steps"]
    assert train(recipe, words, folder, *flags) == 0
    assert "checkpoint-8 is later than the checkpoint to resume from" in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        *("checkpoint-2", "checkpoint-4", "checkpoint-5", "checkpoint-6.aside-1", "checkpoint-8.aside-1")
    ]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_only_folders_named_exactly_as_checkpoints_are_resumed_from_and_deleted(
    recipe, words, finished, tmp_path, capsys
):
    """Sorted numerically; folders with similar names are neither resumed from nor deleted nor counted."""
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    ours = [
        "checkpoint-10-old",
        "checkpoint-3.aside-1",
        "checkpoint-٣",
        "checkpoint-010",
        "checkpoint-",
        "checkpoint-9x",
    ]
    for name in ours:
        shutil.copytree(finished / "checkpoint-8", folder / name)
    (folder / "checkpoint-99999").mkdir()
    assert (
        train(recipe, words, folder, "--max_steps", "12", "--allow_change", "max_steps", "--save_total_limit", "1") == 0
    )
    assert "resuming from step 4" in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == sorted(
        [*ours, "checkpoint-12", "checkpoint-99999.aside-1"]
    )
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["checkpoint-12"]


def test_a_link_to_a_checkpoint_is_resumed_from(recipe, words, finished, tmp_path, capsys):
    folder, store = tmp_path / "run", tmp_path / "store"
    go_back(finished, folder, 4)
    (folder / "checkpoint-4").rename(store)
    (folder / "checkpoint-4").symlink_to(store, target_is_directory=True)
    assert train(recipe, words, folder, "--save_total_limit", "1") == 0
    assert "resuming from step 4" in capsys.readouterr().err
    assert checkpoint.verification_error(store) is None
    assert rows(folder) == rows(finished)


# -- signals ----------------------------------------------------------------------------------------------------------


def signal_at(step: int, number: int, monkeypatch):
    real = MiniGPTTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", training_step)
    return lambda: monkeypatch.setattr(MiniGPTTrainer, "training_step", real)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["steps", "steps after a delay", "epoch"])
def test_an_evaluation_skipped_because_of_a_signal_is_performed_when_the_run_is_resumed(
    strategy, recipe, words, tmp_path, capsys, monkeypatch
):
    """With save_total_limit 1: the best checkpoint and the one saved because of the signal are both retained."""
    flags = [*EVALUATED, *STEEP, "--save_total_limit", "1"]
    if strategy == "epoch":  # 9 steps per epoch
        flags += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--max_steps", "20"]
    elif strategy == "steps after a delay":
        flags += ["--eval_delay", "6"]
    straight = tmp_path / "straight"
    assert train(recipe, words, straight, *flags) == 0
    evaluations = [(row["step"], row["eval_loss"]) for row in log_of(straight) if "eval_loss" in row]
    for step in {"steps": (4, 5, 8), "steps after a delay": (4, 6), "epoch": (5, 9, 18)}[strategy]:
        folder = tmp_path / str(step)
        undo = signal_at(step, signal.SIGHUP, monkeypatch)
        assert train(recipe, words, folder, *flags) == 129
        undo()
        assert f"stopped by SIGHUP and saved at step {step}" in capsys.readouterr().err
        assert not any(row["step"] == step and "eval_loss" in row for row in log_of(folder))
        assert (folder / f"checkpoint-{step}").is_dir()
        assert not list(folder.glob("*.aside-*"))
        assert train(recipe, words, folder, *flags) == 0
        assert rows(folder) == rows(straight)
        assert [(row["step"], row["eval_loss"]) for row in log_of(folder) if "eval_loss" in row] == evaluations
        assert_equal(*[load_file(run / "model" / "model.safetensors") for run in (folder, straight)])


def test_a_run_that_something_else_ends_is_not_published_and_can_be_resumed(
    recipe, words, tmp_path, capsys, monkeypatch
):
    """Callbacks of transformers can end training, such as that of `enable_jit_checkpoint` on SIGTERM."""
    flags = ["--max_steps", "8", "--save_steps", "2", "--eval_steps", "2"]
    assert train(recipe, words, tmp_path / "straight", *flags) == 0
    real = MiniGPTTrainer.training_step

    def training_step(self, *args, **kwargs):
        self.control.should_training_stop = self.state.global_step == 4
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", training_step)
    folder = tmp_path / "run"
    assert train(recipe, words, folder, *flags) == 2
    assert "training ended at step 5 of 8, neither by a signal nor by early stopping" in capsys.readouterr().err
    assert not (folder / "model").exists()
    monkeypatch.setattr(MiniGPTTrainer, "training_step", real)
    assert train(recipe, words, folder, *flags) == 0
    assert_equal(*[load_file(run / "model" / "model.safetensors") for run in (folder, tmp_path / "straight")])


@pytest.mark.parametrize("where", ["prepare_text", "plan_table"])
def test_a_signal_before_training_ends_the_command_and_leaves_nothing(
    where, recipe, words, tmp_path, capsys, monkeypatch
):
    import minigpt_hf.training.train

    real = getattr(minigpt_hf.training.train, where)

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(minigpt_hf.training.train, where, signalled)
    assert train(recipe, words, tmp_path / "run") == 143
    err = capsys.readouterr().err
    assert "stopped by SIGTERM (before training began); run the same command again" in err
    assert (tmp_path / "run").exists() == (where == "plan_table")
    monkeypatch.setattr(minigpt_hf.training.train, where, real)
    assert train(recipe, words, tmp_path / "run") == 0


def test_a_signal_that_was_ignored_stays_ignored(recipe, words, tmp_path, monkeypatch):
    """As SIGHUP by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(2, signal.SIGHUP, monkeypatch)
        assert train(recipe, words, tmp_path / "run", "--max_steps", "3") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_publishing_is_completed_after_a_signal(recipe, words, tmp_path, monkeypatch):
    import minigpt_hf.training.train

    real = minigpt_hf.training.train.write_model_folder

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(minigpt_hf.training.train, "write_model_folder", signalled)
    assert train(recipe, words, tmp_path / "run", "--max_steps", "1") == 0
    assert generate(tmp_path / "run" / "model", "a", max_new_tokens=1)


# -- around a run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_continues_without_its_output_and_saves_when_its_process_group_is_terminated(recipe, words, tmp_path):
    """`minigpt train … <&- 2>&1 | head -3`, with data loader workers; then SIGTERM twice to the process group."""
    folder = tmp_path / "run"
    flags = ["--max_steps", "100000", "--save_steps", "50000", "--dataloader_num_workers", "2"]
    process = start(
        recipe, words, folder, *flags, stdin=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        process.stdin.close()
        for _ in range(3):
            assert process.stdout.readline()
        process.stdout.close()
        wait_for(lambda: steps_logged(folder) > 20, lambda: process.poll() is None)
        workers = []

        def has_workers() -> bool:
            workers[:] = psutil.Process(process.pid).children()
            return len(workers) >= 2

        wait_for(has_workers, lambda: process.poll() is None)  # each epoch starts new ones
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (saved,) = RunFolder(folder).checkpoints()
    assert checkpoint.verification_error(saved) is None
    assert int(saved.name.split("-")[1]) == rows(folder)[-1]["step"]
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_text_that_standard_output_cannot_encode_is_escaped(recipe, tmp_path, monkeypatch):
    """Samples, scores and generated text on standard output with ASCII encoding."""
    data, folder = tmp_path / "é.txt", tmp_path / "run"
    data.write_text("é→ü " * 200, encoding="utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    flags = ["--tokenizer", "characters", "--sample_tokens", "8", "--max_steps", "2", "--validation_fraction", "0.2"]
    assert train(recipe, data, folder, *flags) == 0
    assert main(["generate", str(folder / "model"), "--prompt", "é→", "--max_new_tokens", "3"]) == 0
    assert main(["evaluate", str(folder / "model"), "--data", str(data)]) == 0
    stdout.flush()
    written = stdout.buffer.getvalue().decode("ascii")
    assert "\\xe9\\u2192" in written
    assert "\\xe9.txt" in written


def test_other_commands_end_when_their_output_pipe_is_closed(monkeypatch, capfd):
    """As after `| head`: exit code of SIGPIPE, no message."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["recipes"]) == 141
    assert capfd.readouterr().err == ""


def test_logged_times_are_monotonic_when_the_system_clock_is_set(recipe, words, tmp_path, monkeypatch):
    """One day back at step 3, two days forward at step 6."""
    real, step, clock = MiniGPTTrainer.training_step, [0], time.time

    def training_step(self, *args, **kwargs):
        step[0] = self.state.global_step + 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", training_step)
    monkeypatch.setattr(time, "time", lambda: clock() + 86400 * (-1 if 3 <= step[0] < 6 else step[0] >= 6))
    began = time.perf_counter()
    assert train(recipe, words, tmp_path / "run") == 0
    seconds = time.perf_counter() - began
    log = log_of(tmp_path / "run")
    assert all(0 <= a["seconds"] <= b["seconds"] <= seconds for a, b in pairwise(log))
    assert 0 < log[-1]["train_runtime"] <= seconds
    assert all(row["tokens_per_second"] > 0 for row in log if "loss" in row)


@pytest.mark.slow
def test_a_compiled_run_is_resumed_exactly_and_not_without_compilation(recipe, words, tmp_path, capsys):
    """With the backend `aot_eager`, because inductor takes a minute."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager", "--max_steps", "4"]
    assert train(recipe, words, straight, *flags) == 0
    go_back(straight, resumed, 2)
    assert train(recipe, words, resumed, "--max_steps", "4") == 2
    assert "torch_compile was True and is False" in capsys.readouterr().err
    assert train(recipe, words, resumed, *flags) == 0
    assert rows(resumed) == rows(straight)
    assert_equal(state_of(resumed / "checkpoint-4"), state_of(straight / "checkpoint-4"))


def test_tokens_and_epochs_count_the_sequences_of_incomplete_steps(recipe, words, tmp_path, capsys):
    """26 sequences of 16 tokens in batches of 4: 7 per epoch, which are 3 steps of 12, 12 and 2 sequences."""
    flags = "--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --num_train_epochs 2".split()
    assert train(recipe, words, tmp_path, *flags) == 0
    assert "6 steps of at most 192 tokens = 832 tokens, 1.98 epochs" in capsys.readouterr().out  # 832 of 2 · 421 tokens
    tokens = [row["tokens"] for row in log_of(tmp_path) if "loss" in row]
    assert tokens == [16 * sequences for sequences in (12, 24, 26, 38, 50, 52)]
    published = json.loads((tmp_path / "model" / "minigpt.json").read_text())["training"]
    assert (published["steps"], published["tokens"], published["epochs"]) == (6, 832, 832 / 421)
    assert "| tokens per step | at most 192 |" in (tmp_path / "model" / "README.md").read_text()
