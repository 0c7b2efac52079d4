"""A gigabyte in one file is prepared within bounds of memory, and found again in a blink. Opt-in: a quarter of an hour.

MINIGPT_GIGABYTES=1 .venv/bin/python -m pytest tests/data/test_gigabyte.py
"""

import json
import os
import subprocess
import sys

import pytest

GIGABYTES = float(os.environ.get("MINIGPT_GIGABYTES", "0"))
PREPARE = """
import json, sys, time
from pathlib import Path
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.prepared import prepare

began, cache = time.perf_counter(), Path(sys.argv[2])
corpus = load_corpus(sys.argv[1], 0.01, cache_dir=cache)
text = prepare(corpus, "bpe", 8192, cache, block_size=256, validation_characters=100_000)
own = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": 1024 * int(own.split()[1]), "text": text.train.bytes}))
"""


@pytest.mark.skipif(not GIGABYTES, reason="takes a quarter of an hour: set MINIGPT_GIGABYTES=1")
def test_a_gigabyte_is_prepared_within_bounds_and_found_again_in_two_seconds(text, tmp_path):
    lines, size = text.splitlines(keepends=True), 0
    with (tmp_path / "large.txt").open("w", encoding="utf-8") as file:
        while size < GIGABYTES * 1e9:
            for shift in range(0, len(lines), 7):  # each copy in another order, so that no two stretches are alike
                size += file.write("".join(lines[shift:] + lines[:shift]))
                if size >= GIGABYTES * 1e9:
                    break
    argv = [sys.executable, "-c", PREPARE, str(tmp_path / "large.txt"), str(tmp_path / "cache")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    first, second = (
        json.loads(subprocess.check_output(argv, text=True, env=environment).splitlines()[-1]) for _ in range(2)
    )
    assert first["text"] == second["text"] > 0.9 * GIGABYTES * 1e9
    assert first["bytes"] < 1.5e9
    assert second["seconds"] < 2
