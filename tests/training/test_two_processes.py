"""Training with two gloo processes on CPU: equivalence with one process, signals, failures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import TrainerControl

from minigpt_hf.cli import main
from minigpt_hf.data.blocks import SequenceSampler
from minigpt_hf.training import text
from minigpt_hf.training.lock import FolderLock
from minigpt_hf.training.resume import from_main_process
from minigpt_hf.training.run_folder import RunFolder
from minigpt_hf.training.stopping import StopAtBoundary
from minigpt_hf.training.trainer import MiniGPTTrainer
from tests.conftest import ROOT
from tests.training.conftest import assert_equal, call_on_ranks, go_back, rows, train

PLAIN = "--attention_dropout 0 --embedding_dropout 0 --residual_dropout 0 --muon false --max_steps 10".split()
MTP = ["--mtp_loss_weight", "0.5"]


# torch sometimes aborts a process that exits inside a gloo process group, so that a finished run appears to have failed.
REPORT_GROUP_AT_EXIT = """
import atexit, os, torch, sys
from minigpt_hf.cli import main
# A single write, because both processes exit at the same time.
atexit.register(lambda: os.write(1, f"at the end in a group: {torch.distributed.is_initialized()}\\n".encode()))
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start(recipe, words, folder, *flags, script=ROOT / "scripts" / "train.py") -> subprocess.Popen:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv += [
        "--signals_to_handle",
        "SIGTERM,SIGINT,SIGUSR1",
        script,
        "--recipe",
        recipe,
        "--data",
        words,
        "--output_dir",
        folder,
    ]
    argv += flags
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in argv], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", ["0", "7"])
def test_two_by_two_equals_one_by_four_and_a_resumed_run_equals_both(recipe, words, tmp_path, chunk_size):
    """Gradients are averaged in another order, so float32 sums differ in their last bits: 1e-5 in a loss of 5.

    AdamW without dropout, because Muon rounds to bfloat16 and each process draws other dropout masks.
    """
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    flags = [*PLAIN, *MTP, "--logits_chunk_size", chunk_size]
    assert train(recipe, words, one, "--per_device_train_batch_size", "4", *flags) == 0
    finish(start(recipe, words, two, *flags))
    assert json.loads((two / "fingerprint.json").read_text())["world_size"] == 2
    assert json.loads((two / "fingerprint.json").read_text())["effective_batch"] == 4
    assert json.loads((two / "fingerprint.json").read_text())["dataloader_drop_last"] is True
    for name, tolerance in (
        ("loss", 1e-5),
        ("grad_norm", 1e-4),
    ):  # the norm includes the gradient of the auxiliary loss
        values = [[row[name] for row in rows(run)[:6]] for run in (two, one)]
        assert values[0] == pytest.approx(values[1], abs=tolerance)

    # Interrupted in the second epoch, which begins after six steps, and resumed with two processes: equal bit for bit.
    go_back(two, resumed, 8)
    assert "resuming from step 8" in finish(start(recipe, words, resumed, *flags))
    assert rows(resumed) == rows(two)
    last = "checkpoint-10"
    for rank in (0, 1):
        states = [torch.load(run / last / f"rng_state_{rank}.pth", weights_only=False) for run in (resumed, two)]
        assert_equal(*states)
    names = ("optimizer.pt", "scheduler.pt", "model.safetensors", "auxiliary_head.pt")
    for name in names:
        assert (resumed / last / name).read_bytes() == (two / last / name).read_bytes()


@pytest.mark.slow
def test_a_killed_process_ends_the_job_within_ten_seconds_with_a_message(recipe, words, tmp_path):
    process = start(recipe, words, tmp_path / "run", "--max_steps", "100000", "--save_steps", "50")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert time.monotonic() < deadline, "the training did not start"
        time.sleep(0.2)
    workers = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    out, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    assert "SIGKILL" in out or "exitcode" in out


def test_a_signal_during_the_all_reduce_takes_effect_at_the_next_step(monkeypatch):
    """A gloo group of one process; the signal arrives after the all-reduce of this step."""
    stop, args = StopAtBoundary(), SimpleNamespace(world_size=2)
    all_reduce = torch.distributed.all_reduce

    def interrupted(*args):
        all_reduce(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with stop.listening():
            stop.on_train_begin(args, None, TrainerControl())
            monkeypatch.setattr(torch.distributed, "all_reduce", interrupted)
            stop.on_step_end(args, None, first := TrainerControl())
            monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
            stop.on_step_end(args, None, second := TrainerControl())
    finally:
        torch.distributed.destroy_process_group()
    assert (first.should_training_stop, second.should_training_stop) == (False, True)
    assert stop.number == signal.SIGTERM


@pytest.mark.slow
def test_a_signal_stops_both_processes_at_the_same_step_and_the_run_is_resumed_exactly(recipe, words, tmp_path):
    """SIGTERM to the launcher, which forwards it to both processes, and SIGUSR1 to one process."""
    flags = ["--max_steps", "300", "--save_steps", "150", "--save_total_limit", "9"]
    if not torch.accelerator.is_available():
        flags += ["--use_cpu", "false"]  # without an accelerator the CPU is used anyway
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    (tmp_path / "report_group.py").write_text(REPORT_GROUP_AT_EXIT)
    out = finish(start(recipe, words, straight, *flags, script=tmp_path / "report_group.py"))
    assert out.count("at the end in a group: False") == 2
    last_step = 0
    for number, to_one in ((signal.SIGTERM, False), (signal.SIGUSR1, True)):
        process = start(recipe, words, stopped, *flags)
        deadline = time.monotonic() + 60
        while not (stopped / "log.jsonl").exists() or len(rows(stopped)) <= last_step:
            assert time.monotonic() < deadline, "the training did not start"
            time.sleep(0.05)
        if to_one:
            workers = [
                each for each in psutil.Process(process.pid).children() if "train.py" in " ".join(each.cmdline())
            ]
            workers[1].send_signal(number)
        else:
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        (step,) = re.findall(rf"stopped by {number.name} and saved at step (\d+)", out)
        if to_one:
            assert "exitcode  : 75" in out  # of the processes; that of the launcher is 1
        last_step = int(step)
        assert RunFolder(stopped).checkpoints()[-1].name == f"checkpoint-{step}"
        assert not (stopped / "model").exists()
    finish(start(recipe, words, stopped, *flags))
    for name in ("optimizer.pt", "model.safetensors"):
        last = "checkpoint-300"
        assert (stopped / last / name).read_bytes() == (straight / last / name).read_bytes()


def test_only_the_main_process_computes_what_all_processes_use():
    """A file is not read, renamed or locked by several processes."""
    computed = []
    for rank in (0, 1):
        training = SimpleNamespace(world_size=2, process_index=rank)
        from_main_process(training, lambda rank=rank: computed.append(rank))
    assert computed == [0]
    assert from_main_process(SimpleNamespace(world_size=2, process_index=0), lambda: "outcome") == "outcome"
    with pytest.raises(ValueError, match="refused"):
        from_main_process(SimpleNamespace(world_size=2, process_index=0), refuse)


def refuse():
    raise ValueError("refused")


def share(sequences: int, batch: int, processes: int, rank: int) -> list[int]:
    """The sequences of one epoch that a process uses, in order."""
    sampler = SequenceSampler(sequences, seed=0)
    sampler.batch_size, sampler.rank, sampler.num_ranks = batch, rank, processes
    return [index for _, index in sampler]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("sequences", [24, 29])
def test_no_sequence_is_used_by_two_processes_and_only_those_of_an_incomplete_step_are_omitted(sequences, processes):
    seen = Counter(index for rank in range(processes) for index in share(sequences, 2, processes, rank))
    assert set(seen.values()) == {1}
    assert sequences - len(seen) < 2 * processes
    if processes == 1:
        assert len(seen) == sequences


def test_another_number_of_processes_preserves_the_order_of_sequences():
    """Each step has the same sequences; only their assignment to processes changes."""

    def steps(processes: int, batch: int) -> list[set]:
        shares = [share(24, batch, processes, rank) for rank in range(processes)]
        starts = range(0, len(shares[0]), batch)
        return [{index for indices in shares for index in indices[start : start + batch]} for start in starts]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)


def run_commands(rank: int, commands: list, folder) -> None:
    """Run commands one after another, and write their exit codes. The loss of rank 1 explodes at step 3."""
    real, text.MAX_CHARACTERS_TO_TOKENIZE = MiniGPTTrainer.compute_loss, 900

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * 1e3 if rank == 1 and self.state.global_step == 2 else loss

    MiniGPTTrainer.compute_loss = compute_loss
    codes = [main(["train", *map(str, command)]) for command in commands]
    (folder / f"codes-{rank}.json").write_text(json.dumps(codes))


def test_both_processes_fail_stop_and_skip_together(recipe, words, tmp_path, monkeypatch):
    """A locked folder, a text without a full batch, one that is too long to be tokenized while a process waits, and a loss
    that explodes on one rank, with stop and with skip.

    The skipped steps and the losses equal those of one process with the same sequences.
    """
    real = MiniGPTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * 1e3 if self.state.global_step == 2 else loss

    with monkeypatch.context() as patch:
        patch.setattr(MiniGPTTrainer, "compute_loss", compute_loss)
        skip = [*PLAIN, "--on_bad_loss", "skip"]
        assert train(recipe, words, tmp_path / "one", "--per_device_train_batch_size", "4", *skip) == 0

    (tmp_path / "small.txt").write_text(words.read_text()[:60])
    (tmp_path / "long.txt").write_text(words.read_text() * 3)
    common = ["--recipe", recipe, "--data", words, *PLAIN, "--output_dir"]
    commands = [
        [*common, tmp_path / "locked"],
        [*common, tmp_path / "small", "--data", tmp_path / "small.txt"],
        [*common, tmp_path / "long", "--data", tmp_path / "long.txt"],
        [*common, tmp_path / "stopped"],
        [*common, tmp_path / "skipped", "--on_bad_loss", "skip"],
    ]
    lock = FolderLock(tmp_path / "locked")
    lock.acquire()
    try:
        out = call_on_ranks(run_commands, 2, tmp_path, commands, tmp_path)
    finally:
        lock.release()
    assert [json.loads((tmp_path / f"codes-{rank}.json").read_text()) for rank in (0, 1)] == [[2, 2, 2, 65, 0]] * 2
    assert out.count(f"locked: another process (pid {os.getpid()} on host") == 2
    said = "has 3 sequences of 16 tokens, and a step needs 4: per_device_train_batch_size 2 × 2 processes"
    assert out.count(said) == 2
    assert out.count(f"{tmp_path / 'long.txt'}: 1,260 characters are too many to tokenize while") == 2
    assert out.count("run `minigpt tokenize` with the same recipe and --data") == 2
    assert not (tmp_path / "small").exists() and not (tmp_path / "long").exists()

    shown = json.loads((tmp_path / "stopped" / "bad-step-3.json").read_text())
    assert shown["ranks"] == [0, 0, 1, 1]
    assert shown["losses"][1] > 500 * shown["losses"][0]
    assert len({tuple(row) for row in shown["input_ids"]}) == len(shown["texts"]) == 4

    one, two = rows(tmp_path / "one"), rows(tmp_path / "skipped")
    # The first epoch without step 3, which was skipped.
    losses = [[row["loss"] for row in log[:2] + log[3:6]] for log in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    counts = [
        [json.loads(line).get("skipped_steps") for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "skipped")
    ]
    assert counts[0][:10] == counts[1][:10] == [None] * 2 + [1] * 8
