"""The cache remains correct if tokenization is killed, interrupted, run concurrently, or runs out of disk space."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt_hf.atomic import PREFIX
from minigpt_hf.cli import main
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")

# Delays the encoding of each batch, and creates a file when encoding has started.
SLOW = """
import sys, time
from pathlib import Path
from minigpt_hf.data import encoding, stream

cache, slow = Path(sys.argv[1]), float(sys.argv[2])
encode = encoding.Encoder.encode_batch
stream.BATCH_CHARACTERS = 100_000

def slowly(self, texts):
    if slow:
        Path(f"{cache}.began").touch()
        time.sleep(slow)
    return encode(self, texts)

encoding.Encoder.encode_batch = slowly
"""
PREPARE = (
    SLOW
    + """
import hashlib
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.prepared import prepare

corpus = load_corpus(sys.argv[3], cache_dir=cache)
text = prepare(corpus, "bpe", 300, cache, block_size=16, validation_characters=1000, num_proc=2)
print("sum", hashlib.sha256(text.train.tokens[:].tobytes() + text.validation.tokens[:].tobytes()).hexdigest())
"""
)
TOKENIZE = (
    SLOW
    + """
from minigpt_hf.cli import main

sys.exit(main(["tokenize", "--tokenizer", "bytes", "--num_proc", "2", "--cache_dir", sys.argv[1], *sys.argv[3:]]))
"""
)


@pytest.fixture(scope="module")
def large(text, tmp_path_factory) -> Path:
    """2.4 million characters, a tenth of them held out: enough for several threads."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(24):
        (folder / f"{number:02}.txt").write_text((text * 2)[number : 100_000 + number])
    return folder


def start(program: str, cache: Path, slow: float, *argv: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, [cache, slow, *argv])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def result(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    (line,) = [line for line in out.splitlines() if line.startswith("sum")]
    return line


def wait_for(what, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def leftovers(cache: Path) -> list[str]:
    return [str(path) for path in cache.rglob(f"{PREFIX}*")]


@pytest.fixture(scope="module")
def expected(large, tmp_path_factory) -> str:
    return result(start(PREPARE, tmp_path_factory.mktemp("expected") / "cache", 0, large))


@pytest.mark.slow
def test_concurrent_processes_use_one_result(large, expected, tmp_path):
    processes = [start(PREPARE, tmp_path / "cache", 0, large) for _ in range(4)]
    assert [result(process) for process in processes] == [expected] * 4
    assert leftovers(tmp_path / "cache") == []
    assert len(list((tmp_path / "cache" / "streams").iterdir())) == 2
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1


@pytest.mark.slow
def test_the_next_process_removes_the_files_of_a_killed_one(large, expected, tmp_path):
    """SIGKILL while two threads tokenize. The temporary directory of another running process is not removed."""
    cache = tmp_path / "cache"
    killed = start(PREPARE, cache, 0.2, large)
    wait_for(Path(f"{cache}.began").exists)
    (dead,) = wait_for(lambda: [path for path in leftovers(cache) if not path.endswith(".lock")])
    alive = start(PREPARE, cache, 0.2, large)
    wait_for(lambda: [path for path in leftovers(cache) if not path.endswith(".lock") and path != dead])
    killed.kill()
    killed.communicate()
    assert result(start(PREPARE, cache, 0, large)) == expected
    assert not Path(dead).exists()
    assert result(alive) == expected  # impossible if its directory had been removed
    assert leftovers(cache) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGTERM, False)], ids=str
)
def test_a_signal_during_tokenization_ends_the_process_and_leaves_no_files(number, group, large, tmp_path):
    """`minigpt tokenize` in its own process group; Ctrl+C is sent to the entire group."""
    flags = ["--data", large, "--output_dir", tmp_path / "prepared"]
    process = start(TOKENIZE, tmp_path / "cache", 0.2, *flags)
    wait_for(Path(f"{tmp_path / 'cache'}.began").exists)
    (os.killpg if group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("minigpt")]) == 1
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("kind", ["cache", "prepared text"])
def test_a_full_disk_exits_with_code_28_and_leaves_no_files(
    kind, text_file, recipe_file, tmp_path, capsys, monkeypatch
):
    real, place = os.fsync, tmp_path / ("cache" if kind == "cache" else "prepared")

    def full(descriptor):
        if os.fstat(descriptor).st_ino in {file.stat().st_ino for file in place.rglob("tokens.bin")}:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    argv = ["tokenize", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "prepared" / "text"]
    argv = [str(word) for word in [*argv, "--cache_dir", tmp_path / "cache"]]
    assert main(argv) == 28
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt")]
    assert str(place) in line
    assert "MB are free" in line or "no space left" in line
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "prepared").exists()
    monkeypatch.setattr(os, "fsync", real)
    assert main(argv) == 0


def test_a_full_disk_exits_with_code_28_if_the_text_of_a_table_does_not_fit(tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "To be"}\n' * 30)
    real, place = os.fsync, tmp_path / "cache" / "tables"

    def full(descriptor):
        if os.fstat(descriptor).st_ino in {file.stat().st_ino for file in place.rglob("*.arrow")}:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    argv = [
        "tokenize",
        "--data",
        tmp_path / "rows.jsonl",
        "--tokenizer",
        "bytes",
        "--output_dir",
        tmp_path / "prepared",
    ]
    assert main([str(word) for word in [*argv, "--cache_dir", tmp_path / "cache"]]) == 28
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt")]
    assert "the text column of a table cannot be written to this cache" in line and "MB are free" in line
    assert line.endswith("another folder with --cache_dir or, without this option, HF_HOME")  # as in `minigpt evaluate`


def test_a_read_only_cache_can_be_used(text_file, recipe_file, tmp_path, capsys, monkeypatch):
    """An entry missing from it is an error that states what to do."""
    argv = ["tokenize", "--recipe", recipe_file, "--data", text_file, "--cache_dir", tmp_path / "cache"]
    assert main([str(word) for word in [*argv, "--output_dir", tmp_path / "one"]]) == 0
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if str(path).startswith(str(tmp_path / "cache")) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    assert main([str(word) for word in [*argv, "--output_dir", tmp_path / "two"]]) == 0
    capsys.readouterr()
    flags = ["--output_dir", tmp_path / "three", "--tokenizer", "bytes"]
    assert main([str(word) for word in [*argv, *flags]]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt")]
    assert f"{tmp_path / 'cache'}: the token stream cannot be written" in line
    assert "--cache_dir" in line


def test_there_may_be_more_threads_than_batches(large, tmp_path):
    argv = ["tokenize", "--tokenizer", "bytes", "--data", large, "--num_proc", "16", "--cache_dir", tmp_path / "cache"]
    assert main([str(word) for word in [*argv, "--output_dir", tmp_path / "prepared"]]) == 0


TRUNCATE = """
import sys
from pathlib import Path
from minigpt_hf.cli import main
from minigpt_hf.training.trainer import MiniGPTTrainer

cache, size = Path(sys.argv[1]), int(sys.argv[2])
step = MiniGPTTrainer.training_step

def truncated(self, *arguments, **keywords):
    if self.state.global_step == 3:
        for file in cache.rglob("tokens.bin"):
            with file.open("r+b") as opened:
                opened.truncate(size)
    return step(self, *arguments, **keywords)

MiniGPTTrainer.training_step = truncated
sys.exit(main(["train", "--cache_dir", str(cache), *sys.argv[3:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "workers"), [(1000, 0), (0, 0), (1000, 2)])
def test_a_stream_that_is_truncated_during_training_ends_it_in_one_line(
    size, workers, text_file, recipe_file, tmp_path, capsys
):
    """With a memory map, the process would end by SIGBUS, or read zeros up to the end of a page."""
    argv = ["--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run", "--eval_strategy", "no"]
    argv += [
        "--load_best_model_at_end=false",
        "--save_steps=2",
        "--max_steps=40",
        f"--dataloader_num_workers={workers}",
    ]
    process = start(TRUNCATE, tmp_path / "cache", size, *argv)
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if "truncated" in line]
    assert process.returncode == 74, err
    assert "Traceback" not in err
    assert len(lines) == 1
    pattern = (
        r"minigpt train: (\S+tokens\.bin): was truncated while it was in use; .* resumes from .* \(after step \d+\)"
    )
    assert re.fullmatch(pattern, lines[0]), lines[0]
    assert list((tmp_path / "run").glob("checkpoint-*"))
    argv = ["train", "--cache_dir", tmp_path / "cache", *argv, "--max_steps=40"]
    assert main([str(word) for word in argv]) == 0
    err = capsys.readouterr().err
    assert "will be rebuilt" in err
    assert "resuming from step " in err
