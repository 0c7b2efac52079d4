"""Shards: a text that is tokenized in shares and merged equals one that is tokenized by one process."""

import errno
import json
import os
import pickle
import random
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest

from minigpt_hf.atomic import seal
from minigpt_hf.cli import main
from minigpt_hf.data import sharded
from minigpt_hf.data.blocks import SequenceDataset, SequenceSampler
from minigpt_hf.data.prepared import PreparedText, find_prepared
from minigpt_hf.data.sharded import Part, ShardedArray
from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer, character_tokenizer, load_tokenizer
from minigpt_hf.errors import MiniGPTError
from tests.data.test_interrupted_cache import SLOW, leftovers, start, wait_for


def run(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def corpus(text, tmp_path_factory) -> Path:
    """60 files of different lengths, among them an empty one, and a tokenizer trained on them."""
    folder, source = tmp_path_factory.mktemp("corpus"), random.Random(0)
    (folder / "text").mkdir()
    for number in range(60):
        start = source.randrange(len(text))
        (folder / "text" / f"{number:02}.txt").write_text(text[start : start + source.randrange(3000)] * (number != 7))
    flags = ["--validation_fraction", "0", "--tokenizer", "bpe", "--vocab_size", "300"]
    assert run("tokenize", "--data", folder / "text", *flags, "--output_dir", folder / "whole") == 0
    return folder


def write_shards(output: Path, data, tokenizer, count: int, *flags, numbers=None) -> None:
    for number in range(count) if numbers is None else numbers:
        argv = ["--data", data, "--tokenizer", tokenizer, "--shard", f"{number}/{count}", "--output_dir", output]
        assert run("tokenize", *argv, *flags) == 0


@pytest.fixture(scope="module")
def merged(corpus) -> Path:
    write_shards(corpus / "shards", corpus / "text", corpus / "whole/tokenizer", 4, "--validation_fraction", "0")
    assert run("tokenize", "--merge", corpus / "shards") == 0
    return corpus / "shards"


def opened(folder: Path) -> PreparedText:
    found = find_prepared(str(folder))
    assert found is not None
    return PreparedText.open(found)


def test_shards_reserve_the_tokens_of_chatml(corpus, tmp_path):
    flags = ["--validation_fraction", "0", "--chat_tokens"]
    write_shards(tmp_path, corpus / "text", corpus / "whole/tokenizer", 2, *flags)
    assert run("tokenize", "--merge", tmp_path) == 0
    tokenizer, without = opened(tmp_path).tokenizer, opened(corpus / "whole").tokenizer
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [len(without), len(without) + 1]
    assert opened(tmp_path).train.tokens[:].tolist() == opened(corpus / "whole").train.tokens[:].tolist()


def test_merged_shards_equal_the_stream_of_one_process(corpus, merged):
    whole, shards = opened(corpus / "whole").train, opened(merged).train
    assert shards.tokens[:].tolist() == whole.tokens[:].tolist()
    assert shards.documents[:].tolist() == whole.documents[:].tolist()
    assert (shards.characters, shards.bytes, shards.targets) == (whole.characters, whole.bytes, whole.targets)
    assert [ids.tolist() for ids in shards.iterate_documents()] == [ids.tolist() for ids in whole.iterate_documents()]
    ours, theirs = (SequenceDataset(stream, 32, seed=0) for stream in (shards, whole))
    for epoch in range(2):
        for index in range(len(ours)):
            pair = (dataset[epoch, index]["shift_labels"] for dataset in (ours, theirs))
            assert np.array_equal(*pair)


def test_a_sequence_may_straddle_any_number_of_parts():
    numbers, source = np.arange(200, dtype="<u2"), random.Random(0)
    for _ in range(100):
        cuts = sorted(source.choices(range(201), k=source.randrange(12)))
        pieces = np.split(numbers, cuts)
        array = ShardedArray([Part(len(piece), lambda piece=piece: piece) for piece in pieces], "<u2", max_open=2)
        assert len(array) == 200
        for _ in range(20):
            start, stop = sorted(source.choices(range(210), k=2))
            assert array[start:stop].tolist() == numbers[start:stop].tolist()
            assert array[start:stop].dtype == numbers.dtype


def test_training_on_merged_shards_equals_training_on_one_stream_and_resumes_exactly(
    corpus, merged, recipe_file, tmp_path
):
    flags = ["train", "--recipe", recipe_file, "--max_steps", 12, "--save_steps", 6, "--residual_dropout", 0.1]
    for name, data in (("whole", corpus / "whole"), ("shards", merged)):
        assert run(*flags, "--data", data, "--output_dir", tmp_path / name) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "shards")]
    assert weights[0] == weights[1]
    shutil.copytree(tmp_path / "shards", tmp_path / "resumed")
    for gone in ("model", "checkpoint-12"):
        shutil.rmtree(tmp_path / "resumed" / gone)
    assert run(*flags, "--data", merged, "--dataloader_num_workers", 2, "--output_dir", tmp_path / "resumed") == 0
    assert (tmp_path / "resumed" / "model" / "model.safetensors").read_bytes() == weights[0]


def test_a_text_that_occurs_twice_is_another_text(corpus, recipe_file, text, tmp_path, capsys):
    """Copies of a file in several shards are part of the identity of the merged text: a run is not resumed on them."""
    for count in (1, 2):
        (folder := tmp_path / f"texts-{count}").mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_text(text[:3000])
        write_shards(tmp_path / str(count), folder, corpus / "whole/tokenizer", count, "--validation_fraction", "0")
        assert run("tokenize", "--merge", tmp_path / str(count)) == 0
    once, twice = (opened(tmp_path / name).train for name in ("1", "2"))
    assert len(twice) == 2 * len(once)
    flags = ["train", "--recipe", recipe_file, "--max_steps", 2, "--output_dir", tmp_path / "run"]
    assert run(*flags, "--data", tmp_path / "1") == 0
    assert "contains another run" in fails(capsys, *flags, "--data", tmp_path / "2")


def test_a_larger_validation_split_than_that_of_the_shards_is_reported(corpus, recipe_file, tmp_path, capsys):
    write_shards(tmp_path / "shards", corpus / "text", "bytes", 2)
    assert run("tokenize", "--merge", tmp_path / "shards") == 0
    flags = ["--recipe", recipe_file, "--data", tmp_path / "shards", "--max_steps", 1, "--output_dir", tmp_path / "run"]
    assert run("train", *flags) == 0
    for fraction, is_reported in ((0.1, False), (0.4, True)):
        capsys.readouterr()
        flags = ["--data", corpus / "text", "--split", "validation", "--validation_fraction", fraction]
        assert run("evaluate", tmp_path / "run" / "model", *flags) == 0
        assert ("contains text that the model was trained on" in capsys.readouterr().err) == is_reported


def test_a_complete_shard_is_not_written_again(corpus, merged, capsys):
    file = merged / "shard-00001-of-00004" / "train" / "tokens.bin"
    before = file.stat()
    capsys.readouterr()
    write_shards(merged, corpus / "text", merged / "tokenizer", 4, "--validation_fraction", "0", numbers=[1])
    assert "already complete" in capsys.readouterr().out
    assert file.stat() == before
    assert run("tokenize", "--merge", merged) == 0
    assert "already merged" in capsys.readouterr().out


def test_every_document_is_in_one_split_and_the_published_model_repeats_the_split(
    corpus, recipe_file, tmp_path, capsys
):
    """The number of shards does not change which documents are held out."""
    held_out = []
    for count in (1, 3):
        output = tmp_path / str(count)
        flags = ["--validation_fraction", "0.3", "--validation_characters", 1_000_000]
        write_shards(output, corpus / "text", corpus / "whole/tokenizer", count, *flags)
        assert run("tokenize", "--merge", output) == 0
        prepared = opened(output)
        train, validation = (
            [prepared.tokenizer.decode(ids) for ids in stream.iterate_documents()]
            for stream in (prepared.train, prepared.validation)
        )
        assert 5 < len(validation) < 35
        texts = [file.read_text() for file in sorted((corpus / "text").iterdir())]
        assert sorted(train + validation) == sorted(one for one in texts if one)
        held_out.append((train, validation))
        assert prepared.scored.of_documents == prepared.scored.documents == len(validation)
    assert held_out[0] == held_out[1]
    flags = ["--recipe", recipe_file, "--data", tmp_path / "3", "--max_steps", 4, "--eval_steps", 4, "--save_steps", 4]
    assert run("train", *flags, "--output_dir", tmp_path / "run") == 0
    argv = ["evaluate", tmp_path / "run" / "model", "--data", corpus / "text", "--split", "validation", "--json"]
    capsys.readouterr()
    assert run(*argv) == 0
    score = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"]
    assert {name: score[name] for name in results} == results


TABLES = {
    "fewer files than shards": lambda folder, rows: (folder / "a.jsonl").write_text(lines(rows)),
    "more files than shards": lambda folder, rows: [
        (folder / f"{number:02}.jsonl").write_text(lines(rows[4 * number : 4 * number + 4])) for number in range(10)
    ],
}


def lines(rows: list[str]) -> str:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_tables_are_shared(kind, corpus, text, tmp_path):
    rows = [text[number * 100 : number * 100 + 90] for number in range(40)]
    (tmp_path / "rows").mkdir()
    TABLES[kind](tmp_path / "rows", rows)
    flags = ["--validation_fraction", "0"]
    argv = ["--data", tmp_path / "rows", "--tokenizer", "bytes", *flags, "--output_dir", tmp_path / "whole"]
    assert run("tokenize", *argv) == 0
    write_shards(tmp_path / "shards", tmp_path / "rows", "bytes", 3, *flags)
    assert run("tokenize", "--merge", tmp_path / "shards") == 0
    assert opened(tmp_path / "shards").train.tokens[:].tolist() == opened(tmp_path / "whole").train.tokens[:].tolist()


def fails(capsys, *words) -> str:
    capsys.readouterr()
    assert run(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt")]
    return line


def change_metadata(folder: Path, **values) -> None:
    metadata = json.loads((folder / "shard.json").read_text())
    (folder / "shard.json").write_text(json.dumps(metadata | values))
    seal(folder)


def remove_shard(output: Path) -> None:
    shutil.rmtree(output / "shard-00002-of-00004")


def flip(output: Path) -> None:
    content = bytearray((file := output / "shard-00002-of-00004/train/tokens.bin").read_bytes())
    content[100] ^= 1
    file.unlink()  # a hard link
    file.write_bytes(content)


def copy_shard(output: Path) -> None:
    remove_shard(output)
    shutil.copytree(output / "shard-00001-of-00004", output / "shard-00002-of-00004")


def add_division(output: Path) -> None:
    shutil.copytree(output / "shard-00001-of-00004", output / "shard-00001-of-00008")


MERGING = {
    "missing": (remove_shard, "missing shards: 1 of 4 (2): write them with `minigpt tokenize --shard 2/4`"),
    "damaged": (flip, "damaged shards: 1 of 4 (shard-00002-of-00004: the content of train/tokens.bin has changed)"),
    "copied": (copy_shard, "shard-00002-of-00004: is a copy of shard 1 of 4: remove it, and write this shard"),
    "of another division": (add_division, "has shards of runs with different numbers of shards (4, 8)"),
    "of another tokenizer": (
        lambda output: change_metadata(output / "shard-00003-of-00004", tokenizer="0"),
        "shard-00003-of-00004: has other tokenizer than shard-00000-of-00004",
    ),
    "of other files": (
        lambda output: change_metadata(output / "shard-00003-of-00004", inputs="0"),
        "shard-00003-of-00004: has other inputs than",
    ),
    "of another format": (
        lambda output: change_metadata(output / "shard-00003-of-00004", version=0),
        "shard-00003-of-00004: this shard has format 0, and 1 is required",
    ),
    "none": (lambda output: [shutil.rmtree(path) for path in output.iterdir()], "has neither shards nor .ds files"),
}


@pytest.mark.parametrize("kind", MERGING)
def test_shards_that_do_not_fit_together_are_not_merged(kind, merged, tmp_path, capsys):
    damage, message = MERGING[kind]
    shutil.copytree(merged, tmp_path / "shards", ignore=shutil.ignore_patterns("index"))
    damage(tmp_path / "shards")
    assert message in fails(capsys, "tokenize", "--merge", tmp_path / "shards")
    assert not (tmp_path / "shards" / "index").exists()
    assert leftovers(tmp_path) == []


def test_invalid_shards_are_rejected_in_one_line(corpus, merged, tmp_path, capsys):
    argv = ["tokenize", "--data", corpus / "text", "--output_dir", merged, "--validation_fraction", "0"]
    tokenizer = ["--tokenizer", merged / "tokenizer"]
    for shard in ("4/4", "1", "a/b", "1/0", "1/100000"):
        assert "expected I/N" in fails(capsys, *argv, *tokenizer, "--shard", shard)
    assert "--shard requires a tokenizer that all shards share" in fails(capsys, *argv, "--shard", "0/4")
    assert "has shards of another tokenizer" in fails(capsys, *argv, "--tokenizer", "bytes", "--shard", "1/5")
    other = load_tokenizer(str(merged / "tokenizer"))
    other.bos_token = other.pad_token  # in tokenizer_config.json only
    other.save_pretrained(tmp_path / "other")
    assert "has shards of another tokenizer" in fails(
        capsys, *argv, "--tokenizer", tmp_path / "other", "--shard", "1/5"
    )
    assert "was written with other newline" in fails(
        capsys, *argv, *tokenizer, "--shard", "1/4", "--newline", "universal"
    )
    assert "has 60 text files, which are not divided, and cannot be shared by 61" in fails(
        capsys, *argv, *tokenizer, "--shard", "0/61"
    )
    assert "is a mixture, which has no shards" in fails(
        capsys, *argv, *tokenizer, "--shard", "0/5", "--data", f"{corpus / 'text'}:0.5,stdlib:0.5"
    )
    assert "write all shards first" in fails(capsys, *argv, *tokenizer, "--shard", "0/4", "--merge", merged)
    shutil.copytree(merged, tmp_path / "shards", ignore=shutil.ignore_patterns("index"))
    argv = ["train", "--data", tmp_path / "shards", "--output_dir", tmp_path / "run"]
    assert "has shards that are not merged: run `minigpt tokenize --merge" in fails(capsys, *argv)


def test_a_merged_folder_is_verified_when_it_is_opened_and_its_index_stays_in_the_folder(merged, tmp_path, capsys):
    shutil.copytree(merged, tmp_path / "shards")
    flip(tmp_path / "shards")
    argv = ["train", "--data", tmp_path / "shards", "--output_dir", tmp_path / "run"]
    assert "the content of ../shard-00002-of-00004/train/tokens.bin has changed" in fails(capsys, *argv)
    assert "damaged shards: 1 of 4" in fails(capsys, "tokenize", "--merge", tmp_path / "shards")
    shutil.copytree(merged, tmp_path / "other")
    manifest = json.loads((tmp_path / "other/index/manifest.json").read_text())
    name = "../shard-00002-of-00004/train/tokens.bin"
    manifest[f"../../shards/{name[3:]}"] = manifest.pop(name)
    (tmp_path / "other/index/manifest.json").write_text(json.dumps(manifest))
    argv = ["train", "--data", tmp_path / "other", "--output_dir", tmp_path / "run"]
    assert "which is not in its folder" in fails(capsys, *argv)
    shutil.copytree(merged, tmp_path / "third")
    stream = json.loads((tmp_path / "third/index/train/stream.json").read_text())
    stream["shards"][0]["path"] = "../shards/shard-00000-of-00004/train"
    (tmp_path / "third/index/train/stream.json").write_text(json.dumps(stream))
    seal(tmp_path / "third" / "index")
    argv = ["train", "--data", tmp_path / "third", "--output_dir", tmp_path / "run"]
    assert "the manifest of its index has no" in fails(capsys, *argv)


def test_shards_without_text_are_merged(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number, content in enumerate(["", "one", "", "two", "", ""]):
        (tmp_path / "text" / f"{number}.txt").write_text(content)
    write_shards(tmp_path / "shards", tmp_path / "text", "bytes", 6, "--validation_fraction", "0.1")
    assert run("tokenize", "--merge", tmp_path / "shards") == 0
    assert "no document is held out" in capsys.readouterr().err
    prepared = opened(tmp_path / "shards")
    assert prepared.train.tokens[:].tolist() == [0, *(byte + 2 for byte in b"one"), 0, *(byte + 2 for byte in b"two")]
    assert (prepared.validation, prepared.scored) == (None, None)


SHARD = (
    SLOW
    + """
from minigpt_hf.cli import main

sys.exit(main(["tokenize", "--num_proc", "1", "--cache_dir", sys.argv[1], *sys.argv[3:]]))
"""
)


@pytest.fixture
def shard_arguments(text, tmp_path) -> list:
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text((text * 2)[number : 120_000 + number])
    return ["--data", folder, "--tokenizer", "bytes", "--shard", "0/2", "--output_dir", tmp_path / "shards"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_killed_process_leaves_nothing_that_the_next_one_does_not_remove(shard_arguments, tmp_path):
    killed = start(SHARD, tmp_path / "cache", 0.5, *shard_arguments)
    wait_for(Path(f"{tmp_path / 'cache'}.began").exists)
    wait_for(lambda: leftovers(tmp_path))
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "shards" / "shard-00000-of-00002").exists()
    two = [start(SHARD, tmp_path / "cache", 0.05, *shard_arguments) for _ in range(2)]  # at the same time
    outputs = [process.communicate(timeout=120) for process in two]
    assert [process.returncode for process in two] == [0, 0], outputs
    assert sorted("already complete" in out for out, _ in outputs) == [False, True], outputs
    assert leftovers(tmp_path) == []
    assert run("tokenize", *shard_arguments, "--cache_dir", tmp_path / "cache") == 0


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.slow
def test_sigterm_leaves_no_files(shard_arguments, tmp_path):
    process = start(SHARD, tmp_path / "cache", 0.5, *shard_arguments)
    wait_for(Path(f"{tmp_path / 'cache'}.began").exists)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert [line for line in err.splitlines() if line.startswith("minigpt")] == [
        "minigpt tokenize: stopped by SIGTERM; nothing was saved"
    ]
    assert leftovers(tmp_path) == []
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"tokenizer"}


def test_a_full_disk_exits_with_code_28_and_leaves_no_partial_shard(shard_arguments, tmp_path, capsys, monkeypatch):
    real = os.fsync

    def full(descriptor):
        if os.fstat(descriptor).st_ino in {file.stat().st_ino for file in (tmp_path / "shards").rglob("tokens.bin")}:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run("tokenize", *shard_arguments) == 28
    assert "shard-00000-of-00002: no space left on this disk; free some space" in capsys.readouterr().err
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "shards" / "shard-00000-of-00002").exists()
    monkeypatch.setattr(os, "fsync", real)
    assert run("tokenize", *shard_arguments) == 0


# -- remote folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(merged, tmp_path):
    """The merged folder on a server on loopback: URL, folder, and the paths that were requested."""
    requested, folder = [], tmp_path / "remote"
    shutil.copytree(merged, folder)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, message, *arguments):
            if self.command == "GET":
                requested.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, requested
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_training_on_remote_shards_equals_training_on_local_ones(merged, remote, recipe_file, tmp_path):
    """With room for one shard in the cache, and two workers that read the same shards."""
    url, _, requested = remote
    cache = tmp_path / "cache"
    sizes = [file.stat().st_size for file in merged.glob("shard-*/train/tokens.bin")]
    flags = ["--recipe", recipe_file, "--max_steps", 20, "--shuffle_window", 40, "--validation_fraction", "0"]
    flags = ["train", *flags, "--cache_dir", cache]
    assert run(*flags, "--data", merged, "--output_dir", tmp_path / "local") == 0
    for workers in (0, 2):
        output = tmp_path / f"remote-{workers}"
        argv = ["--shard_cache", max(sizes) * 1.5 / 1e9, "--dataloader_num_workers", workers, "--output_dir", output]
        assert run(*flags, "--data", url, *argv) == 0
        weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "local", output)]
        assert weights[0] == weights[1]
        stored = [file for file in (cache / "shards").iterdir() if file.name != ".lock"]
        assert 0 < sum(file.stat().st_size for file in stored) <= max(sizes) * 1.5
    assert len({path for path in requested if path.endswith("tokens.bin")}) > 1
    assert leftovers(cache) == []


def test_a_smaller_limit_removes_copies_of_earlier_processes(merged, remote, tmp_path):
    url, _, _ = remote
    sizes = [file.stat().st_size for file in merged.glob("shard-*/train/tokens.bin")]

    def tokens(max_bytes: int) -> list[int]:
        text = PreparedText.open(find_prepared(url, tmp_path), tmp_path, max_bytes / 1e9)
        return text.train.tokens[:].tolist()

    def stored() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "shards").iterdir() if file.name != ".lock")

    everything = tokens(10**9)
    assert stored() >= sum(sizes)
    assert tokens(1) == everything  # a shard that is larger than the limit is kept while it is read
    assert stored() <= max(sizes)
    assert tokens(10**9) == tokens(max(sizes)) == everything
    assert stored() <= max(sizes)


def test_a_shard_that_does_not_fit_on_the_disk_exits_with_code_28(remote, recipe_file, tmp_path, capsys, monkeypatch):
    url, _, _ = remote
    usage = shutil.disk_usage

    def full(path):
        return usage(path)._replace(free=100) if Path(path).name == "shards" else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
    flags = ["--recipe", recipe_file, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    assert run("train", *flags, "--data", url) == 28
    assert "MB does not fit" in capsys.readouterr().err


KILLED = """
import sys, time
from pathlib import Path
from minigpt_hf.data import sharded, shards
from minigpt_hf.data.prepared import PreparedText, find_prepared

def waits(*arguments):
    Path(sys.argv[1] + ".began").touch()
    time.sleep(100)

cache = Path(sys.argv[1])
if sys.argv[3] == "merge":
    shards.seal = waits
    shards.merge_shards(Path(sys.argv[4]), cache)
else:
    sharded.ShardStore._copy = waits
    PreparedText.open(find_prepared(sys.argv[4], cache), cache).train.tokens[:10]
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("what", ["merge", "copy"])
def test_nothing_remains_of_a_merge_or_copy_that_was_killed(what, remote, tmp_path):
    url, folder, _ = remote
    if what == "merge":
        shutil.rmtree(folder / "index")
    process = start(KILLED, tmp_path / "cache", 0, what, folder if what == "merge" else url)
    wait_for(Path(f"{tmp_path / 'cache'}.began").exists)
    assert leftovers(tmp_path) != []
    process.kill()
    process.communicate()
    if what == "merge":
        assert run("tokenize", "--merge", folder) == 0
        assert len(opened(folder).train) > 0
    else:
        found = find_prepared(url, tmp_path / "cache")
        assert len(PreparedText.open(found, tmp_path / "cache").train.tokens[:10]) == 10
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_remote_shard_that_differs_from_the_index_is_an_error(fault, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "RETRIED_AFTER", (0, None))
    url, folder, _ = remote
    for file in folder.glob("shard-*/train/tokens.bin"):
        content = file.read_bytes()
        file.unlink()
        if fault == "changed":
            file.write_bytes(content[::-1])
    found = find_prepared(url, tmp_path / "cache")
    prepared = PreparedText.open(found, tmp_path / "cache")
    message = {"changed": "its content differs from the index", "missing": "is missing"}[fault]
    with pytest.raises(MiniGPTError, match=f"tokens.bin: {message}"):
        prepared.train.tokens[:10]
    assert leftovers(tmp_path) == []


def test_a_damaged_copy_of_a_remote_shard_is_copied_again(remote, tmp_path, caplog):
    """Its size is unchanged. Another process verifies the content of a copy once."""
    url, _, _ = remote
    cache = tmp_path / "cache"

    def first_tokens() -> list[int]:
        return PreparedText.open(find_prepared(url, cache), cache).train.tokens[:100].tolist()

    expected = first_tokens()
    for copy in (cache / "shards").iterdir():
        if copy.name != ".lock":
            copy.write_bytes(bytes(copy.stat().st_size))
    assert first_tokens() == expected
    assert "differs from the index and is copied again" in caplog.text


def test_a_remote_shard_is_copied_once_and_the_least_recently_used_is_removed(remote, tmp_path):
    url, folder, requested = remote
    found = find_prepared(url, tmp_path / "cache")
    assert find_prepared(url + "/", tmp_path / "cache") == found
    sizes = [file.stat().st_size for file in sorted(folder.glob("shard-*/train/tokens.bin"))]
    stream = PreparedText.open(found, tmp_path / "cache", 2.2 * max(sizes) / 1e9).train
    starts = np.cumsum([0, *sizes]) // 2
    requested.clear()
    for shard in (0, 1, 0, 2, 0, 1):
        again = pickle.loads(pickle.dumps(stream))  # as in a worker, which has opened no file
        assert len(again.tokens[starts[shard] : starts[shard] + 5]) == 5
    copied = [int(path.split("-")[1]) for path in requested if path.endswith("tokens.bin")]
    assert copied == [0, 1, 2, 1]


def test_files_and_folders_of_an_object_store_are_read_and_shared(corpus, merged, tmp_path):
    """`memory://` stands for s3:// and others, which `fsspec` reads in the same way."""
    store = fsspec.filesystem("memory")
    store.put(str(corpus / "text"), "/bucket/text", recursive=True)
    store.pipe("/bucket/text/README.unknown", b"ignored")
    try:
        for data in ("memory://bucket/text", "memory://bucket/text/*.txt"):
            output = tmp_path / str(len(data))
            write_shards(output, data, merged / "tokenizer", 3, "--validation_fraction", "0")
            assert run("tokenize", "--merge", output) == 0
            assert opened(output).train.tokens[:].tolist() == opened(merged).train.tokens[:].tolist()
        assert run("tokenize", "--data", "memory://bucket/none", "--output_dir", tmp_path / "none") == 2
    finally:
        store.rm("/bucket", recursive=True)


# -- the order of sequences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "window"), [(100, 10), (103, 10), (7, 10), (10, 10), (50, 1)])
def test_a_shuffle_window_permutes_windows_and_the_sequences_in_them(size, window):
    orders = []
    for epoch in range(2):
        sampler = SequenceSampler(size, seed=0, window=window)
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler]
        assert sorted(order) == list(range(size))
        complete = size // window
        windows = [sorted(order[start : start + window]) for start in range(0, size, window)]
        for number, one in enumerate(windows):
            assert one == list(range(one[0], one[0] + len(one)))
            assert one[0] % window == 0
            assert number < complete or one[0] == complete * window
        for skipped in (1, 13, size - 1):
            if skipped < size:
                sampler.num_skipped = skipped
                assert [index for _, index in sampler] == order[skipped:]
        orders.append(order)
    assert orders[0] != orders[1]


def test_without_a_window_the_order_is_unchanged():
    assert [index for _, index in SequenceSampler(10, seed=0)] == [index for _, index in SequenceSampler(10, 0, 0)]


def test_a_run_with_a_shuffle_window_resumes_exactly_and_not_with_another(merged, recipe_file, tmp_path, capsys):
    flags = ["train", "--recipe", recipe_file, "--data", merged, "--max_steps", 8, "--save_steps", 4]
    window = ["--shuffle_window", 24, "--output_dir"]
    assert run(*flags, *window, tmp_path / "run") == 0
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    for gone in ("model", "checkpoint-8"):
        shutil.rmtree(tmp_path / "resumed" / gone)
    assert "shuffle_window was 24 and is 25" in fails(
        capsys, *flags, "--shuffle_window", 25, "--output_dir", tmp_path / "resumed"
    )
    assert run(*flags, *window, tmp_path / "resumed") == 0
    ours, theirs = ((tmp_path / one / "model" / "model.safetensors").read_bytes() for one in ("run", "resumed"))
    assert ours == theirs


# -- files of datatrove -----------------------------------------------------------------------------------------------


def write_datatrove(file: Path, documents: list[list[int]], separator: int = 0, dtype: str = "<u2") -> None:
    """Write documents as datatrove's `TokenizedFile` does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.array([number for ids in documents for number in [*ids, separator]], dtype).tofile(file)
    np.cumsum([len(ids) + 1 for ids in documents], dtype="<u8").tofile(file.with_name(f"{file.name}.index"))


@pytest.fixture
def datatrove_files(corpus, tmp_path) -> tuple[Path, list[list[int]], list[str]]:
    """Three files and an empty one, with their documents and texts."""
    prepared = opened(corpus / "whole")
    documents = [ids.tolist() for ids in prepared.train.iterate_documents()]
    for name, first, last in (("a/0.ds", 0, 20), ("a/1.ds", 20, 20), ("b/0.ds", 20, 21), ("b/1.ds", 21, 60)):
        write_datatrove(tmp_path / "files" / name, documents[first:last])
    return tmp_path / "files", documents, [prepared.tokenizer.decode(ids) for ids in documents]


def test_files_of_datatrove_are_read_as_a_stream_with_the_separator_first(
    corpus, datatrove_files, recipe_file, tmp_path
):
    folder, documents, texts = datatrove_files
    assert run("tokenize", "--merge", folder, "--tokenizer", corpus / "whole/tokenizer") == 0
    whole, stream = opened(corpus / "whole").train, opened(folder).train
    assert stream.tokens[:].tolist() == whole.tokens[:].tolist()
    assert stream.documents[:].tolist() == whole.documents[:].tolist()
    assert [ids.tolist() for ids in stream.iterate_documents()] == documents
    assert (stream.characters, stream.bytes) == (sum(map(len, texts)), sum(len(one.encode()) for one in texts))
    for first in range(0, len(whole), 97):
        assert stream.tokens[first : first + 150].tolist() == whole.tokens[first : first + 150].tolist()
    flags = ["train", "--recipe", recipe_file, "--max_steps", 4, "--save_steps", 4]
    for name, data in (("ours", corpus / "whole"), ("theirs", folder)):
        assert run(*flags, "--data", data, "--output_dir", tmp_path / name) == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert weights[0] == weights[1]


def test_characters_and_bytes_of_datatrove_files_are_counted_for_every_tokenizer(tmp_path):
    texts = ["Übermäßig 🍎", "a", "中文 text\n"]
    tokenizers = {"characters": character_tokenizer(texts), "bytes": byte_tokenizer()}
    tokenizers["bpe"] = byte_level_bpe(texts * 10, 280)
    for name, tokenizer in tokenizers.items():
        write_datatrove(tmp_path / name / "0.ds", [tokenizer(one).input_ids for one in texts])
        tokenizer.save_pretrained(tmp_path / name / "tokenizer")
        assert run("tokenize", "--merge", tmp_path / name, "--tokenizer", tmp_path / name / "tokenizer") == 0
        stream = opened(tmp_path / name).train
        assert (stream.characters, stream.bytes) == (sum(map(len, texts)), sum(len(one.encode()) for one in texts))


def test_damaged_files_of_datatrove_are_rejected(corpus, datatrove_files, tmp_path, capsys):
    folder, documents, _ = datatrove_files
    argv = ["tokenize", "--merge", folder]
    assert "which do not contain their tokenizer; give --tokenizer" in fails(capsys, *argv)
    argv += ["--tokenizer", corpus / "whole/tokenizer"]
    file = folder / "b" / "1.ds"
    write_datatrove(file, documents, separator=5)
    assert "b/1.ds: document 1 does not end with the token 0" in fails(capsys, *argv)
    write_datatrove(file, [[2], [300, 3]])
    assert "or has an unknown id; give the tokenizer" in fails(capsys, *argv)
    write_datatrove(file, documents, dtype="<u4")
    assert "tokens of 2 bytes: it is truncated, or was written with another tokenizer" in fails(capsys, *argv)
    write_datatrove(file, documents)
    np.array([5, 5, sum(map(len, documents)) + len(documents)], "<u8").tofile(folder / "b" / "1.ds.index")
    assert "the ends of the documents do not increase" in fails(capsys, *argv)
    (folder / "b" / "1.ds.index").unlink()
    assert "1.ds: has no 1.ds.index" in fails(capsys, *argv)
    assert not (folder / "index").exists()


# -- datasets ---------------------------------------------------------------------------------------------------------


def test_rows_of_saved_and_hub_datasets_are_shared(hub, text, tmp_path):
    rows = [f"{number}: {text[number * 50 : number * 50 + 90]}" for number in range(40)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
    content = {}
    for number in range(3):
        part = datasets.Dataset.from_dict({"text": rows[14 * number : 14 * number + 14]})
        part.to_parquet(tmp_path / "rows.parquet")
        content[f"train-{number:05}-of-00003.parquet"] = (tmp_path / "rows.parquet").read_bytes()
    hub.put("user/rows", content, repo_type="datasets")
    expected = [number for row in rows for number in [0, *(byte + 2 for byte in row.encode())]]
    flags = ["--validation_fraction", "0"]
    streaming = ["--streaming", "--max_tokens", 1_000_000]
    for name, data, more in (("a", tmp_path / "saved", []), ("b", "user/rows", []), ("c", "user/rows", streaming)):
        write_shards(tmp_path / name, data, "bytes", 3, *flags, *more)
        assert run("tokenize", "--merge", tmp_path / name) == 0
        assert opened(tmp_path / name).train.tokens[:].tolist() == expected
    argv = ["--data", "user/rows", "--tokenizer", "bytes", "--shard", "0/4", "--output_dir", tmp_path / "d", *flags]
    assert run("tokenize", *argv, *streaming) == 2
