"""Two processes, with gloo on this machine's cores, learn what one learns, and lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import TrainerControl

from minigpt_hf.data.blocks import BlockSampler
from minigpt_hf.training.checkpoint import checkpoints
from minigpt_hf.training.stops import StopAtBoundary
from tests.conftest import ROOT
from tests.training.conftest import assert_equal, go_back, rows, train

PLAIN = "--attention_dropout 0 --embedding_dropout 0 --residual_dropout 0 --muon false --max_steps 10".split()


# A process that ends inside a group of gloo is sometimes aborted by torch, and a finished run is told as failed.
LAST_WORD = """
import atexit, sys, torch
from minigpt_hf.cli import main
atexit.register(lambda: print("at the end in a group:", torch.distributed.is_initialized()))
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start(recipe, words, folder, *flags, script=ROOT / "scripts" / "train.py") -> subprocess.Popen:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv += [script, "--recipe", recipe, "--data", words, "--output_dir", folder]
    argv += flags
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in argv], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def test_two_by_two_equals_one_by_four_and_a_resumed_run_equals_both(recipe, words, tmp_path):
    """Gradients are averaged in another order, so sums differ in their last bits: 1e-5 in a loss of 5 (float32).

    AdamW without dropout: Muon rounds to bfloat16, and each process draws its own dropout.
    """
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    assert train(recipe, words, one, "--per_device_train_batch_size", "4", *PLAIN) == 0
    finish(start(recipe, words, two, *PLAIN))
    assert json.loads((two / "fingerprint.json").read_text())["world_size"] == 2
    assert json.loads((two / "fingerprint.json").read_text())["effective_batch"] == 4
    assert [row["loss"] for row in rows(two)[:6]] == pytest.approx([row["loss"] for row in rows(one)[:6]], abs=1e-5)

    # The same two processes again, cut after four steps: bit for bit the same.
    go_back(two, resumed, 4)
    assert "going on from step 4" in finish(start(recipe, words, resumed, *PLAIN))
    assert rows(resumed) == rows(two)
    last = "checkpoint-10"
    for rank in (0, 1):
        states = [torch.load(run / last / f"rng_state_{rank}.pth", weights_only=False) for run in (resumed, two)]
        assert_equal(*states)
    names = ("optimizer.pt", "scheduler.pt", "model.safetensors")
    for name in names:
        assert (resumed / last / name).read_bytes() == (two / last / name).read_bytes()


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


def test_a_signal_that_comes_while_the_processes_agree_counts_at_the_next_step(monkeypatch):
    """Gloo with one process stands for the group; the signal comes after this step's number was handed over."""
    stop, args = StopAtBoundary(), SimpleNamespace(world_size=2, device="cpu")
    all_reduce = torch.distributed.all_reduce

    def interrupted(*args):
        all_reduce(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with stop.listening():
            monkeypatch.setattr(torch.distributed, "all_reduce", interrupted)
            stop.on_step_end(args, None, first := TrainerControl())
            monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
            stop.on_step_end(args, None, second := TrainerControl())
    finally:
        torch.distributed.destroy_process_group()
    assert (first.should_training_stop, second.should_training_stop) == (False, True)
    assert stop.number == signal.SIGTERM


def test_a_signal_stops_both_processes_at_one_step_and_the_run_goes_on_exactly(recipe, words, tmp_path):
    flags = ["--max_steps", "150", "--save_steps", "100"]
    if not torch.accelerator.is_available():
        flags += ["--use_cpu", "false"]  # there is nothing else: it is used
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    (tmp_path / "last_word.py").write_text(LAST_WORD)
    out = finish(start(recipe, words, straight, *flags, script=tmp_path / "last_word.py"))
    assert out.count("at the end in a group: False") == 2
    process = start(recipe, words, stopped, *flags)
    deadline = time.monotonic() + 60
    while not (stopped / "log.jsonl").exists():
        assert time.monotonic() < deadline, "the training did not start"
        time.sleep(0.05)
    process.terminate()  # the launcher hands it on to both
    out, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM and saved at step" in out
    assert len(checkpoints(stopped)) == 1
    assert not (stopped / "model").exists()
    finish(start(recipe, words, stopped, *flags))
    for name in ("optimizer.pt", "model.safetensors"):
        last = "checkpoint-150"
        assert (stopped / last / name).read_bytes() == (straight / last / name).read_bytes()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("blocks", [24, 29])
def test_no_block_is_doubled_over_processes_and_none_lost_but_of_an_incomplete_step(blocks, processes):
    seen = Counter()
    for rank in range(processes):
        sampler = BatchSampler(BlockSampler(blocks, seed=0), 2, drop_last=processes > 1)
        batches = BatchSamplerShard(sampler, processes, rank) if processes > 1 else sampler
        seen.update(index for batch in batches for _, index in batch)
    assert set(seen.values()) == {1}
    assert blocks - len(seen) < 2 * processes
    if processes == 1:
        assert len(seen) == blocks


def test_another_number_of_processes_keeps_the_order_of_blocks():
    """The step is what it was; only who takes which block of it changes."""

    def steps(processes: int, batch: int) -> list[set]:
        shards = [
            list(BatchSamplerShard(BatchSampler(BlockSampler(24, seed=0), batch, drop_last=True), processes, rank))
            for rank in range(processes)
        ]
        return [set().union(*map(set, step)) for step in zip(*shards, strict=True)]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)
