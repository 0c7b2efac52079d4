"""Checkpoints: written atomically, verified before use, and resumed from exactly."""

import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import torture
from safetensors.torch import load_file

from minigpt_hf.atomic import MANIFEST, rename_aside, seal
from minigpt_hf.cli import main
from minigpt_hf.data import blocks
from minigpt_hf.training import stopping
from minigpt_hf.training.checkpoint import atomic_checkpoint, newest_valid, verification_error
from minigpt_hf.training.lock import LOCK
from minigpt_hf.training.run_folder import RunFolder
from minigpt_hf.training.trainer import MiniGPTTrainer
from tests.conftest import ROOT, representative
from tests.training.conftest import assert_equal, go_back, rows, state_of, train

# -- exact resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulation", "muon", "workers"),
    [
        pytest.param(*case, marks=() if case == (2, True, 0) else pytest.mark.slow)
        for case in product((1, 2, 3), (True, False), (0, 2))
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(accumulation, muon, workers, recipe, words, tmp_path):
    """Interrupted in the first epoch, at an epoch boundary, in a later epoch and at the last step, with dropout."""
    flags = [f"--gradient_accumulation_steps={accumulation}", f"--muon={muon}", f"--dataloader_num_workers={workers}"]
    steps_per_epoch = math.ceil(421 // 16 / 2 / accumulation)
    last = 2 * steps_per_epoch + 2
    flags += [f"--max_steps={last}", "--save_steps=1", "--save_total_limit=99"]
    straight = tmp_path / "straight"
    assert train(recipe, words, straight, *flags) == 0
    for cut in (2, steps_per_epoch, steps_per_epoch + 1, last - 1, last):
        resumed = tmp_path / f"cut-{cut}"
        go_back(straight, resumed, cut)
        assert train(recipe, words, resumed, *flags) == 0
        assert multiprocessing.active_children() == []  # workers ignore SIGTERM: at the end, Python would wait for them
        assert rows(resumed) == rows(straight)
        assert_equal(state_of(resumed / f"checkpoint-{last}"), state_of(straight / f"checkpoint-{last}"))


def test_a_finished_run_is_reported_as_finished_and_not_overwritten_by_another(
    run_folder, recipe_file, text_file, capsys
):
    argv = ["train", "--recipe", str(recipe_file), "--data", str(text_file), "--output_dir", str(run_folder)]
    before = sorted((path, path.stat().st_mtime_ns) for path in run_folder.rglob("*"))
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert f"this run is already finished; the model is in {run_folder / 'model'}" in captured.err.splitlines()
    assert captured.out == ""
    assert main([*argv, "--seed", "7"]) == 2
    assert "another run, which is finished (seed was 42 and is 7)" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in run_folder.rglob("*")) == before


def test_fresh_starts_over_and_deletes_nothing(recipe, words, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert train(recipe, words, folder) == 0
    (folder / "my notes.txt").write_text("some notes")
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def locked(self, *args, **kwargs):
        assert (folder / LOCK).is_file()
        return TRAINING_STEP(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", locked)
    assert train(recipe, words, folder, "--fresh", "--seed", "7") == 0
    renamed = tmp_path / "run.aside-1"
    assert {path.relative_to(renamed): path.read_bytes() for path in renamed.rglob("*") if path.is_file()} == before
    assert json.loads((folder / "fingerprint.json").read_text())["seed"] == 7


# -- atomic writes and verification -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(recipe, words, folder) == 0
    return folder


def test_resuming_computes_no_address_before_its_position(recipe, words, finished, tmp_path, monkeypatch):
    """6 of 13 steps of 2 sequences have been taken: the data loader does not repeat them."""
    folder, real, computed = tmp_path / "run", blocks.permute, []
    go_back(finished, folder, 6)

    def recorded(positions, *args):
        computed.extend(positions.tolist())
        return real(positions, *args)

    monkeypatch.setattr(blocks, "permute", recorded)
    assert train(recipe, words, folder) == 0
    assert sorted(computed) == list(range(6 * 2, 26))
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


def test_each_damaged_file_is_detected_and_the_previous_checkpoint_used(finished, tmp_path, capsys):
    """Each file missing, empty, truncated, zeroed, or with one byte flipped; no damaged checkpoint is used or deleted."""
    assert torture.corrupt_every_file(finished, tmp_path) == []
    assert capsys.readouterr().out.count("passed") >= 45


def test_a_damaged_checkpoint_is_reported_in_one_line_and_the_final_state_is_equal(
    recipe, words, finished, tmp_path, capsys
):
    folder = tmp_path / "run"
    go_back(finished, folder, 6)
    torture.CORRUPTIONS["flipped"](folder / "checkpoint-6" / "optimizer.pt")
    assert train(recipe, words, folder) == 0
    err = capsys.readouterr().err
    message = "checkpoint-6 is invalid (the content of optimizer.pt has changed); renamed to checkpoint-6.aside-1"
    assert message in err.splitlines()
    assert "resuming from step 4" in err
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


def test_a_save_interrupted_at_any_point_leaves_the_previous_checkpoint(finished, tmp_path, monkeypatch):
    """The save is interrupted after 0, 1, 2, … files have been fsynced, and before the rename."""
    files = [path for path in (finished / "checkpoint-8").iterdir() if path.name != MANIFEST]
    real = os.fsync
    for num_synced in range(len(files) + 3):
        run = tmp_path / str(num_synced)
        shutil.copytree(finished / "checkpoint-6", run / "checkpoint-6")
        left = num_synced

        def interrupted_fsync(descriptor):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            real(descriptor)

        monkeypatch.setattr(os, "fsync", interrupted_fsync)
        try:
            with atomic_checkpoint(run / "checkpoint-8") as folder:
                for file in files:
                    shutil.copy(file, folder)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "fsync", real)
        found, lines = newest_valid(RunFolder(run))
        assert lines == []
        # The rename follows the fsync of all files, the manifest and the folder.
        complete = num_synced >= len(files) + 2
        assert found == run / ("checkpoint-8" if complete else "checkpoint-6")
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-6"] + ["checkpoint-8"] * complete


def test_a_stray_folder_that_looks_like_a_checkpoint_does_not_block_the_run(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-6", run / "checkpoint-6")
    (run / "checkpoint-99999").mkdir()
    found, lines = newest_valid(RunFolder(run))
    assert found == run / "checkpoint-6"
    (line,) = lines
    assert line.startswith(f"checkpoint-99999 is invalid ({MANIFEST} cannot be read")


def test_a_sealed_folder_is_valid_until_a_byte_changes(tmp_path):
    for name in ("config.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "fingerprint.json"):
        (tmp_path / name).write_text("{}")
    seal(tmp_path)
    assert verification_error(tmp_path) is None
    (tmp_path / "optimizer.pt").write_text("{ ")
    assert verification_error(tmp_path) == "the content of optimizer.pt has changed"


def test_renaming_aside_never_overwrites(tmp_path):
    for _ in range(3):
        (tmp_path / "x").mkdir()
        rename_aside(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.aside-1", "x.aside-2", "x.aside-3"]


def test_save_total_limit_retains_the_last_and_the_best_checkpoint(recipe, words, tmp_path):
    folder = tmp_path / "run"
    assert train(recipe, words, folder, "--save_total_limit", "2") == 0
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_of_evaluations_between_checkpoints_none_decides_which_checkpoint_is_the_best(
    recipe, words, tmp_path, monkeypatch, capsys
):
    """The lowest loss is that of step 3, which has no checkpoint; among those that have one, it is that of step 4."""
    from minigpt_hf.training import trainer

    losses, real = iter([3.0, 2.9, 1.0, 2.0, 2.6, 2.5, 2.4, 2.3]), trainer.score_documents

    def score_documents(*args, **kwargs):
        _, tokens, documents = real(*args, **kwargs)
        return next(losses) * tokens, tokens, documents

    monkeypatch.setattr(trainer, "score_documents", score_documents)
    flags = "--validation_fraction 0.3 --eval_steps 1 --save_steps 2 --save_total_limit 1".split()
    flags += "--load_best_model_at_end true --early_stopping_patience 0".split()
    assert train(recipe, words, tmp_path / "run", *flags) == 0
    assert "missing" not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    about = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())
    assert about["results"]["loss"] == pytest.approx(2.0, rel=1e-9)
    weights = [tmp_path / "run" / name / "model.safetensors" for name in ("checkpoint-4", "model")]
    assert_equal(*map(load_file, weights))


def test_checkpoints_contain_nothing_that_executes_code_when_loaded(finished):
    for file in (finished / "checkpoint-8").iterdir():
        assert file.name != "training_args.bin"
        if file.suffix == ".pt":
            torch.load(file, weights_only=True)


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"), representative([("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75)], ("SIGTERM", 143))
)
def test_a_signal_saves_at_the_next_step_boundary_and_the_run_is_resumed_exactly(
    name, code, recipe, words, tmp_path, capsys, monkeypatch
):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(recipe, words, straight) == 0
    real = MiniGPTTrainer.training_step

    def signal_at_step_3(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", signal_at_step_3)
    assert train(recipe, words, stopped) == code
    assert f"stopped by {name} and saved at step 4" in capsys.readouterr().err
    assert not (stopped / "model").exists()
    monkeypatch.setattr(MiniGPTTrainer, "training_step", real)
    assert train(recipe, words, stopped) == 0
    assert "resuming from step 4" in capsys.readouterr().err
    assert rows(stopped) == rows(straight)
    assert_equal(state_of(stopped / "checkpoint-8"), state_of(straight / "checkpoint-8"))


def test_sigterm_after_the_notice_of_a_scheduler_does_not_count_as_a_second_signal(
    recipe, words, tmp_path, monkeypatch
):
    """Slurm sends SIGUSR1 before the time limit, possibly twice, and SIGTERM at the limit; the checkpoint is still saved."""
    real = MiniGPTTrainer.training_step

    def signals_at_step_3(self, *args, **kwargs):
        if self.state.global_step == 3:
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(stopping, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(MiniGPTTrainer, "training_step", signals_at_step_3)
    assert train(recipe, words, tmp_path / "run") == 75
    assert newest_valid(RunFolder(tmp_path / "run")) == (tmp_path / "run" / "checkpoint-4", [])


def test_a_second_signal_ends_the_run_immediately_and_loses_no_checkpoint(recipe, words, tmp_path):
    """The first signal arrives in a step that never ends, so only the second one can end the process."""
    child = os.fork()
    if child == 0:
        MiniGPTTrainer.training_step = endless_after_step_3
        os._exit(train(recipe, words, tmp_path / "run"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "step-3").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    time.sleep(1.5)  # a second signal within a second counts as the same request
    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # the process waits for the end of the step
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    assert newest_valid(RunFolder(tmp_path / "run")) == (tmp_path / "run" / "checkpoint-2", [])


def endless_after_step_3(self, *args, **kwargs):
    if self.state.global_step == 3:
        (Path(self.args.output_dir) / "step-3").touch()
        while True:
            time.sleep(0.1)
    return TRAINING_STEP(self, *args, **kwargs)


TRAINING_STEP = MiniGPTTrainer.training_step


# -- in the background ------------------------------------------------------------------------------------------------

ASYNC = ["--async_checkpoints"]


def test_a_run_with_saves_in_the_background_equals_one_without(recipe, words, finished, tmp_path):
    folder = tmp_path / "run"
    assert train(recipe, words, folder, *ASYNC) == 0
    assert rows(folder) == rows(finished)
    for step in (2, 4, 6, 8):
        one, other = folder / f"checkpoint-{step}", finished / f"checkpoint-{step}"
        assert verification_error(one) is None
        assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
        assert_equal(state_of(one), state_of(other))
    assert not (folder / ".unfinished").exists()


def hold_checkpoint_4(monkeypatch, until):
    """Let the first fsync of checkpoint-4 wait for an event, at most 60 seconds."""
    real = os.fsync

    def held(descriptor):
        if "checkpoint-4" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            assert until.wait(60)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", held)


def at_step(number, monkeypatch, act):
    """Call a function with the trainer before the step that follows `number` steps."""
    real = MiniGPTTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == number:
            act(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", training_step)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="resolves file descriptors in /proc")


@needs_proc
def test_training_continues_while_a_checkpoint_is_written_and_the_next_save_waits_for_it(
    recipe, words, finished, tmp_path, monkeypatch
):
    """The save of step 4 ends only after step 5 has been taken, and before that of step 6 begins."""
    folder, until, seen = tmp_path / "run", threading.Event(), []

    def act(trainer):
        seen.append((folder / "checkpoint-4").exists())
        until.set()

    hold_checkpoint_4(monkeypatch, until)
    at_step(5, monkeypatch, act)
    at_step(6, monkeypatch, lambda trainer: seen.append((folder / "checkpoint-4").exists()))
    assert train(recipe, words, folder, *ASYNC) == 0
    assert seen == [False, True]
    assert_equal(state_of(folder / "checkpoint-4"), state_of(finished / "checkpoint-4"))
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


@pytest.mark.slow
@needs_proc
def test_a_signal_and_an_error_wait_for_the_checkpoint_that_is_being_written(
    recipe, words, finished, tmp_path, capsys, monkeypatch
):
    """SIGTERM in step 4 saves and waits; a non-finite loss in step 5 leaves the checkpoint of step 4 complete."""
    folder, until = tmp_path / "signal", threading.Event()
    threading.Timer(3, until.set).start()
    hold_checkpoint_4(monkeypatch, until)
    with monkeypatch.context() as context:
        at_step(3, context, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert train(recipe, words, folder, *ASYNC) == 128 + signal.SIGTERM
    assert "saved at step 4" in capsys.readouterr().err
    assert until.is_set()
    assert verification_error(folder / "checkpoint-4") is None

    folder, until = tmp_path / "error", threading.Event()
    threading.Timer(3, until.set).start()
    hold_checkpoint_4(monkeypatch, until)
    with monkeypatch.context() as context:
        bad_at_step(5, float("nan"), context)
        assert train(recipe, words, folder, *ASYNC) == 65
    assert verification_error(folder / "checkpoint-4") is None
    assert not (folder / ".unfinished").exists()
    assert train(recipe, words, folder, *ASYNC) == 0
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


@needs_proc
@pytest.mark.parametrize("killed_at", representative([0, 6, 13], 6))
def test_a_kill_while_a_checkpoint_is_written_in_the_background_leaves_the_previous_one(
    killed_at, recipe, words, finished, tmp_path
):
    """SIGKILL at an fsync of the thread; step 5 may have been taken."""
    folder, count, real = tmp_path / "run", 0, os.fsync

    def killing(descriptor):
        nonlocal count
        if "checkpoint-4" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            if count == killed_at:
                assert threading.current_thread() is not threading.main_thread()
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        real(descriptor)

    child = os.fork()
    if child == 0:
        os.fsync = killing
        os._exit(train(recipe, words, folder, *ASYNC))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert newest_valid(RunFolder(folder)) == (folder / "checkpoint-2", [])
    assert train(recipe, words, folder, *ASYNC) == 0
    assert rows(folder) == rows(finished)
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="resolves the paths of file descriptors in /proc")
@pytest.mark.parametrize(
    ("fails_at", "flags"),
    representative([*((n, []) for n in range(10)), (0, ASYNC), (9, ASYNC)], (0, []), (9, []), (9, ASYNC)),
)
def test_a_full_disk_leaves_the_previous_checkpoint(
    fails_at, flags, recipe, words, finished, tmp_path, capsys, monkeypatch
):
    """ENOSPC in the fsync of the n-th file of the second checkpoint."""
    folder, count, real = tmp_path / "run", 0, os.fsync

    def full(descriptor):
        nonlocal count
        if "checkpoint-4" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            count += 1
            if count > fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert train(recipe, words, folder, *flags) == 28
    err = capsys.readouterr().err
    assert "not enough disk space for checkpoint-4: it needs about" in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert verification_error(folder / "checkpoint-2") is None
    assert not (folder / ".unfinished").exists()
    monkeypatch.setattr(os, "fsync", real)
    assert train(recipe, words, folder, *flags) == 0
    assert rows(folder) == rows(finished)
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


def test_a_checkpoint_that_cannot_be_written_for_another_reason_is_not_reported_as_a_full_disk(
    recipe, words, finished, tmp_path, capsys
):
    """The name of the folder in which checkpoints are written is taken by a file."""
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    (folder / ".unfinished").write_text("")
    assert train(recipe, words, folder) == 74
    err = capsys.readouterr().err
    assert ".unfinished" in err
    assert "not enough disk space" not in err


def test_disk_space_is_checked_before_the_first_step(recipe, words, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert train(recipe, words, tmp_path / "run") == 28
    captured = capsys.readouterr()
    assert "not enough disk space for this run" in captured.err
    assert "step" not in captured.out


def test_the_disk_space_required_is_about_that_of_the_checkpoints(finished, monkeypatch, recipe, words, tmp_path):
    """With `save_total_limit 1`: two checkpoints, one of them being written, and the model folder."""
    size = sum(file.stat().st_size for file in (finished / "checkpoint-8").iterdir())
    model = (finished / "model" / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    flags = ["--max_steps", "1", "--save_total_limit", "1"]
    for free, code in ((2 * size, 28), (int(1.6 * 2 * size) + model, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert train(recipe, words, tmp_path / f"{code}", *flags) == code


# -- a file size limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "file"),
    representative(
        [(20_000, "modeling_minigpt.py"), (100_000, "model.safetensors"), (160_000, "optimizer.pt")],
        *((100_000, "model.safetensors"), (160_000, "optimizer.pt")),
    ),
)
def test_a_file_size_limit_leaves_the_previous_checkpoint(
    limit, file, recipe, words, finished, tmp_path, capsys, monkeypatch, limit_file_size
):
    """The limit is lowered in step 4; the writers of the first file beyond it report this in different ways."""
    assert (finished / "checkpoint-4" / file).stat().st_size > limit
    folder, real = tmp_path / "run", MiniGPTTrainer.training_step

    def limited(self, *args, **kwargs):
        if self.state.global_step == 3:
            limit_file_size(limit)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, "training_step", limited)
    assert train(recipe, words, folder) == 28
    err = capsys.readouterr().err
    cause = f"checkpoint-4: a file is larger than the file size limit of this process ({limit:,} bytes, `ulimit -f`)"
    assert cause in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert verification_error(folder / "checkpoint-2") is None
    assert not (folder / ".unfinished").exists()
    monkeypatch.setattr(MiniGPTTrainer, "training_step", real)
    limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert train(recipe, words, folder) == 0
    assert rows(folder) == rows(finished)
    assert_equal(state_of(folder / "checkpoint-8"), state_of(finished / "checkpoint-8"))


def test_a_file_size_limit_below_the_size_of_the_weights_is_reported_before_the_first_step(
    recipe, words, tmp_path, capsys, limit_file_size
):
    limit_file_size(100_000)
    assert train(recipe, words, tmp_path / "run") == 28
    captured = capsys.readouterr()
    assert "the file size limit of this process (100,000 bytes, `ulimit -f`)" in captured.err
    assert captured.err.count("\n") == 1
    assert "step" not in captured.out


# -- non-finite losses ------------------------------------------------------------------------------------------------


def bad_at_step(number: int, value: float, monkeypatch):
    """Multiply the loss of one step, and hence its gradients, by `value`."""
    real = MiniGPTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * value if self.state.global_step == number - 1 else loss

    monkeypatch.setattr(MiniGPTTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("value", representative([math.nan, math.inf, 1e4], math.nan, 1e4))
def test_a_non_finite_or_exploded_loss_stops_the_run_before_the_weights_change(
    value, recipe, words, tmp_path, capsys, monkeypatch
):
    bad_at_step(6, value, monkeypatch)
    folder = tmp_path / "run"
    assert train(recipe, words, folder) == 65
    err = capsys.readouterr().err
    assert err.startswith("minigpt train: step 6: the loss is ")
    assert err.count("\n") == 1
    shown = json.loads((folder / "bad-step-6.json").read_text())
    assert [len(row) for row in shown["input_ids"]] == [16, 16]
    assert len(shown["texts"]) == 2
    weights = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5]
    assert not (folder / "model").exists()


def test_a_step_with_a_non_finite_loss_can_be_skipped(recipe, words, tmp_path, capsys, monkeypatch):
    bad_at_step(3, float("nan"), monkeypatch)
    folder = tmp_path / "run"
    assert train(recipe, words, folder, "--on_bad_loss", "skip", "--logging_steps", "2") == 0
    assert (
        "step 3: the loss is nan and the gradient norm nan; the step is skipped (1 so far)" in capsys.readouterr().err
    )
    assert all(math.isfinite(row["loss"]) and row["loss"] > 1 for row in rows(folder))
    before, after = (torch.load(folder / f"checkpoint-{step}" / "optimizer.pt") for step in (2, 4))
    taken = [
        {int(state["step"]) for state in moments["state"].values() if "step" in state} for moments in (before, after)
    ]
    assert taken == [{2}, {3}]  # of steps 3 and 4, one was taken


# -- changes between start and resuming -------------------------------------------------------------------------------

CHANGES = {
    "learning_rate": ["--learning_rate", "0.001"],
    "muon_learning_rate": ["--muon_learning_rate", "0.01"],
    "muon_momentum": ["--muon_momentum", "0.95"],
    "muon_beta2": ["--muon_beta2", "0.9"],
    "weight_decay": ["--weight_decay", "0.1"],
    "adam_beta1": ["--adam_beta1", "0.8"],
    "adam_beta2": ["--adam_beta2", "0.99"],
    "adam_epsilon": ["--adam_epsilon", "1e-6"],
    "max_grad_norm": ["--max_grad_norm", "0.5"],
    "lr_scheduler_type": ["--lr_scheduler_type", "cosine"],
    "warmup_steps": ["--warmup_steps", "3"],
    "max_steps": ["--max_steps", "9"],
    "seed": ["--seed", "7"],
    "config.attention_dropout": ["--attention_dropout", "0.2"],
    "config.embedding_dropout": ["--embedding_dropout", "0.2"],
    "config.residual_dropout": ["--residual_dropout", "0.2"],
    "label_smoothing_factor": ["--label_smoothing_factor", "0.1"],
}


@pytest.mark.parametrize(
    "name",
    representative(CHANGES, "learning_rate", "muon_beta2", "max_steps", "config.attention_dropout"),
)
def test_a_changed_setting_is_rejected_by_name_or_applied(name, recipe, words, finished, tmp_path, capsys):
    folder, flags = tmp_path / "run", CHANGES[name]
    go_back(finished, folder, 4)
    before = (folder / "log.jsonl").read_text()
    old = json.loads((folder / "fingerprint.json").read_text())[name]
    assert train(recipe, words, folder, *flags) == 2
    assert f"{name} was {old} and is " in capsys.readouterr().err
    assert (folder / "log.jsonl").read_text() == before  # nothing is written

    assert train(recipe, words, folder, *flags, "--allow_change", name) == 0
    assert f"changed settings: {name} was {old} and is " in capsys.readouterr().err
    assert rows(folder)[:4] == rows(finished)[:4]
    weights = [load_file(run / "checkpoint-8" / "model.safetensors") for run in (folder, finished)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_an_allowed_learning_rate_follows_the_new_schedule(recipe, words, finished, tmp_path):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    flags = ["--learning_rate", "0.001", "--max_steps", "10", "--warmup_steps", "0"]
    assert train(recipe, words, folder, *flags, "--allow_change", "learning_rate", "max_steps", "warmup_steps") == 0
    expected = [0.001 * (1 - step / 10) for step in range(4, 10)]  # linear to zero over ten steps
    assert [row["learning_rate"] for row in rows(folder)[4:]] == pytest.approx(expected)


def test_another_text_or_architecture_is_rejected(recipe, words, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    go_back(finished, folder, 4)
    other = tmp_path / "other.txt"
    other.write_text(words.read_text()[::-1])
    assert train(recipe, other, folder) == 2
    assert "data was " in capsys.readouterr().err
    assert train(recipe, words, folder, "--hidden_size", "64", "--allow_change", "config.hidden_size") == 2
    assert "contains a run with another architecture" in capsys.readouterr().err
    assert train(recipe, words, folder, "--allow_change", "colour") == 2
    assert "allow_change colour: not an entry of the fingerprint" in capsys.readouterr().err


def test_versions_are_part_of_the_fingerprint(finished):
    fingerprint = json.loads((finished / "checkpoint-8" / "fingerprint.json").read_text())
    assert {"torch", "transformers", "minigpt_hf", "device", "world_size", "data", "tokenizer"} <= set(fingerprint)


# -- kills ------------------------------------------------------------------------------------------------------------


def test_a_kill_does_not_change_the_final_state(tmp_path):
    assert torture.torture(1, tmp_path, seed=0) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "flags"), [(10, []), (10, ASYNC)])
def test_kills_do_not_change_the_final_state(kills, flags, tmp_path):
    """scripts/torture.py; `make torture` does the same with 100 kills."""
    done = subprocess.run(
        [sys.executable, "scripts/torture.py", "--kills", str(kills), "--folder", tmp_path / "torture", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
