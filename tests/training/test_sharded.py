"""Fully sharded training (FSDP2) on gloo processes: Muon, the Trainer, checkpoints, signals and failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.conftest import assert_equal


def run_on(ranks: int, script: Path, *arguments) -> str:
    """Run a script on several processes and return its output."""
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        ranks,
        script,
        *arguments,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [str(word) for word in argv]
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_steps_on_sharded_and_on_replicated_matrices_equal_those_on_whole_ones(ranks, tmp_path):
    """Bit for bit: each matrix is orthogonalized whole, on one rank."""
    run_on(ranks, Path(__file__).with_name("muon_on_ranks.py"), tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")
    message = "Muon supports parameters whose rows are sharded once (FSDP, HSDP), not (Shard(dim=1),) and None"
    assert results.pop("error") == f"{message}; use --muon false"
    assert {name for name, _ in results} >= {"whole", "replicated", "sharded"}
    assert ("HSDP", 0.95) in results or ranks == 2
    for (name, decay), result in results.items():
        for part in ("parameters", "states"):
            assert_equal(result[part], results["whole", decay][part])
        is_sharded = name in ("sharded", "HSDP")
        for placement in [*result["placements"], *result["state placements"]]:
            assert ("Shard(dim=0)" in placement) == is_sharded, (name, placement)
