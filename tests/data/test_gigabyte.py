"""A gigabyte in one file is tokenized in bounded memory, and then read from the cache. Opt-in: takes 15 minutes.

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


@pytest.mark.skipif(not GIGABYTES, reason="takes 15 minutes: set MINIGPT_GIGABYTES=1")
def test_a_gigabyte_is_tokenized_in_bounded_memory_and_read_from_the_cache_in_two_seconds(text, tmp_path):
    lines, size = text.splitlines(keepends=True), 0
    with (tmp_path / "large.txt").open("w", encoding="utf-8") as file:
        while size < GIGABYTES * 1e9:
            for start in range(0, len(lines), 7):  # each copy is rotated, so that no two long passages are equal
                size += file.write("".join(lines[start:] + lines[:start]))
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
