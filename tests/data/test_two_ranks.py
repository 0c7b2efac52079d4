"""Training does not start if ranks have read different texts."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Each rank runs in a different folder, where the same name refers to a different file.
SCRIPT = """
import os, sys
os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
from minigpt_hf.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_ranks_that_have_read_different_texts_are_stopped_before_training(recipe_file, text, tmp_path):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "growing.log").write_text(text[: 8000 + rank])
    (tmp_path / "script.py").write_text(SCRIPT)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv += [tmp_path / "script.py", tmp_path, "--recipe", recipe_file, "--data", "growing.log"]
    argv += ["--output_dir", tmp_path / "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run([str(word) for word in argv], env=env, text=True, capture_output=True, timeout=300)
    assert finished.returncode != 0
    assert "growing.log: the 2 processes have read different texts; wait until nothing writes" in finished.stderr
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
