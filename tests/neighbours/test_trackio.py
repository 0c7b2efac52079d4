"""`minigpt train --report_to trackio` writes every logged loss to the local database of trackio."""

import json
import os
import subprocess
import sys

import pytest

trackio = pytest.importorskip("trackio")


def test_the_losses_of_the_log_are_in_the_database(recipe_file, text_file, tmp_path):
    argv = [sys.executable, "-m", "minigpt_cli", "train", "--recipe", recipe_file, "--data", text_file]
    argv += ["--output_dir", tmp_path / "run", "--report_to", "trackio", "--project", "plays", "--run_name", "first"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    read = [sys.executable, "-c", READ]
    found = json.loads(subprocess.check_output(read, env=environment, encoding="utf-8", timeout=120).splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for key, name in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("eval_bits_per_byte", "eval/bits_per_byte")):
        logged = {row["step"]: row[key] for row in rows if key in row}
        stored = {row["train/global_step"]: row[name] for row in found["rows"] if name in row}
        assert stored == pytest.approx(logged)
    assert found["config"]["model_type"] == "minigpt"


READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
storage = SQLiteStorage
print(json.dumps({"rows": storage.get_logs("plays", "first"), "config": storage.get_run_config("plays", "first")}))
"""
