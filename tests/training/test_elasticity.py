"""Resuming with another number of processes at the same number of sequences per step."""

import itertools
import json
import os
import subprocess
import sys

import pytest
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from minigpt_hf.data.blocks import SequenceSampler
from tests.training.conftest import go_back, rows, train

# 26 sequences: six steps of four per epoch, and two sequences that are omitted.
FLAGS = "--attention_dropout 0 --embedding_dropout 0 --residual_dropout 0 --muon false --max_steps 14 --save_steps 1".split()
FLAGS += ["--save_total_limit", "99"]

# Several commands, one after another, in each process.
COMMANDS = """
import json, sys
from pathlib import Path
from minigpt_hf.cli import main

codes = [main(["train", *command]) for command in json.loads(Path(sys.argv[1]).read_text())]
print(f"codes {codes}.", flush=True)
"""


def on(processes: int, commands: list[list], folder) -> tuple[list[int], str]:
    """Run commands with torchrun. Returns their exit codes, which are the same in all processes, and the log."""
    (folder / "commands.py").write_text(COMMANDS)
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in command] for command in commands]))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    argv += [folder / "commands.py", folder / "commands.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (codes,) = {part.partition(".")[0] for part in done.stdout.split("codes ")[1:]}
    assert done.stdout.count("codes ") == processes
    return json.loads(codes), done.stderr


@pytest.mark.slow
def test_one_two_four_and_one_process_in_turn_equal_one_process(recipe, words, tmp_path):
    """Over two epoch boundaries. Gradients are summed in another order: 1e-5 in a loss of 5 and in weights of up to 1."""
    one, two, four, last = (tmp_path / name for name in ("one", "two", "four", "last"))
    omit = ["--dataloader_drop_last", "true"]
    assert train(recipe, words, one, *FLAGS, "--gradient_accumulation_steps", "2", *omit) == 0

    def command(folder, *flags) -> list:
        return ["--recipe", recipe, "--data", words, "--output_dir", folder, *FLAGS, *flags]

    go_back(one, two, 4)
    complete = tmp_path / "complete"  # began with an incomplete last step in each epoch
    assert train(recipe, words, complete, *FLAGS, "--gradient_accumulation_steps", "2") == 0
    go_back(complete, tmp_path / "incomplete", 4)
    codes, log = on(
        2,
        [command(two, "--gradient_accumulation_steps", "2"), command(tmp_path / "incomplete"), command(two)],
        tmp_path,
    )
    assert codes == [2, 2, 0]
    assert (
        "effective_batch was 4 and is 8), which determine its position in the text: give --gradient_accumulation_steps 1 to "
        "keep 4 " in log
    )
    assert "several processes omit the incomplete last step of an epoch (2 of 4 sequences)" in log
    assert "do not match the ones" not in log
    assert log.count("changed settings: world_size was 1 and is 2") == 1

    go_back(two, four, 8)
    codes, log = on(4, [command(four, "--per_device_train_batch_size", "1")], tmp_path)
    assert codes == [0]
    assert "changed settings: world_size was 2 and is 4" in log
    for step in (11, 13):  # the second time within the run of one process
        go_back(four if step == 11 else last, tmp_path / f"last-{step}", step)
        last = tmp_path / f"last-{step}"
        assert train(recipe, words, last, *FLAGS, "--per_device_train_batch_size", "4") == 0

    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        values = [[row[name] for row in rows(run)] for run in (last, one)]
        assert len(values[0]) == 14
        assert values[0] == pytest.approx(values[1], abs=tolerance)
    weights = [load_file(run / "checkpoint-14" / "model.safetensors") for run in (last, one)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-5


@pytest.mark.slow
def test_four_processes_that_are_resumed_equal_four_that_are_not(recipe, words, tmp_path):
    """The sum over more than two processes depends on their order, hence on the position of a gradient in its bucket."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--recipe", recipe, "--data", words, *FLAGS, "--per_device_train_batch_size", "1", "--output_dir"]
    assert on(4, [[*flags, straight]], tmp_path)[0] == [0]
    go_back(straight, resumed, 8)
    codes, log = on(4, [[*flags, resumed]], tmp_path)
    assert codes == [0] and "resuming from step 8" in log
    assert rows(resumed) == rows(straight)
    for name in ("model.safetensors", "optimizer.pt"):
        assert (resumed / "checkpoint-14" / name).read_bytes() == (straight / "checkpoint-14" / name).read_bytes(), name


@pytest.mark.parametrize("sequences", [24, 26, 29])
@pytest.mark.parametrize(("processes", "size", "accumulated"), [(1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1)])
def test_a_step_has_the_same_sequences_for_every_division(sequences, processes, size, accumulated):
    """With those of an incomplete last step omitted, over two epochs."""
    for epoch in (0, 1):
        expected = SequenceSampler(sequences, seed=0)
        expected.set_epoch(epoch)
        order = list(expected)
        shards = []
        for rank in range(processes):
            sampler = SequenceSampler(sequences, seed=0, step=4)
            sampler.set_epoch(epoch)
            batches = BatchSampler(sampler, size, drop_last=True)
            shards.append(list(BatchSamplerShard(batches, processes, rank) if processes > 1 else batches))
        steps = len(shards[0]) / accumulated
        assert steps == sequences // 4
        for step in range(int(steps)):
            taken = [batch for shard in shards for batch in shard[step * accumulated : (step + 1) * accumulated]]
            assert sorted(itertools.chain(*taken)) == sorted(order[4 * step : 4 * step + 4])
