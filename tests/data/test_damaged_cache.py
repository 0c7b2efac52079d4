"""A damaged cache entry is rebuilt with a warning; a damaged prepared text is an error. Neither is trained on."""

import json
import logging
import os
import shutil
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import minigpt_hf.atomic
import minigpt_hf.data.cache
from minigpt_hf.cli import main
from minigpt_hf.data import documents
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.prepared import PreparedText, prepare
from minigpt_hf.data.tokenizer import tokenizer_fingerprint
from minigpt_hf.errors import MiniGPTError
from tests.conftest import representative


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "a tenth": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 10]),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "first byte flipped": lambda file: flip(file, 0),
    "a byte in the middle flipped": lambda file: flip(file, file.stat().st_size // 2),
    "garbage appended": lambda file: file.write_bytes(file.read_bytes() + b"\0garbage"),
    "garbage": lambda file: file.write_bytes(b"\xff\xfe{["),
    "another JSON": lambda file: file.write_text("[]"),
    "an empty object": lambda file: file.write_text("{}"),
}
STREAM = ("manifest.json", "stream.json", "documents.npy", "tokens.bin")


@pytest.fixture(scope="module")
def texts(tmp_path_factory, text):
    """Nine documents in a table, so that the cache also contains an index of documents."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [text[start : start + 3000] for start in range(0, 27_000, 3000)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def prepared(file: Path, cache: Path, kind: str = "bpe") -> PreparedText:
    return prepare(load_corpus(str(file), cache_dir=cache), kind, 300, cache, block_size=16, validation_characters=1000)


def content(text: PreparedText) -> tuple:
    streams = [
        (stream.tokens[:].tolist(), stream.documents[:].tolist(), stream.fingerprint, stream.bytes, stream.characters)
        for stream in (text.train, text.validation)
    ]
    return *streams, tokenizer_fingerprint(text.tokenizer)


@pytest.fixture(scope="module")
def intact(texts, tmp_path_factory):
    """A cache with a tokenizer, a table, an index of documents and two streams, and the content read from it."""
    cache = tmp_path_factory.mktemp("intact") / "cache"
    return cache, content(prepared(texts, cache))


def files_of(cache: Path) -> list[Path]:
    return [
        file
        for kind in ("tokenizers", "streams", "documents", "tables")
        for file in (cache / kind).rglob("*.*")
        if file.is_file()
    ]


def test_the_cache_contains_the_expected_files(intact):
    cache, _ = intact
    names = sorted(file.name for file in files_of(cache))
    assert [name for name in names if not name.startswith("index")] == sorted(
        [*STREAM, *STREAM, "manifest.json", "tokenizer.json", "rows.arrow", *["manifest.json"] * (len(names) - 10 - 2)]
    )


KINDS = ("tokenizers", "streams", "documents", "tables")
FAST = [
    *product(["tokenizers"], DAMAGE),
    *product(KINDS, ["missing", "a byte in the middle flipped", "an empty object"]),
]


@pytest.mark.parametrize(("kind", "damage"), representative([*product(KINDS, DAMAGE)], *FAST))
def test_a_damaged_file_of_the_cache_is_rebuilt_and_reported(kind, damage, intact, texts, tmp_path, caplog):
    original, expected = intact
    caplog.set_level(logging.INFO, "minigpt_hf")
    for number, file in enumerate(sorted(file for file in files_of(original) if kind in file.parts)):
        cache = tmp_path / str(number)
        shutil.copytree(original, cache)
        damaged = cache / file.relative_to(original)
        DAMAGE[damage](damaged)
        for start in range(2):
            caplog.clear()
            assert content(prepared(texts, cache)) == expected, file.name
            warnings = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
            assert len(warnings) == (start == 0), file.name
            if start == 0:
                assert warnings[0].startswith(f"{damaged.parent}: the cached ")
                assert warnings[0].endswith("will be rebuilt")
                # A damaged manifest is reported as a difference in one of the other files.
                assert file.name in warnings[0] or file.name == "manifest.json"
        assert {path.name for path in (cache / kind).iterdir()} == {path.name for path in (original / kind).iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_under_the_name_of_another_one_is_rebuilt_and_reported(kind, texts, tmp_path, caplog):
    """For example after files were recovered or restored under wrong names."""
    other = tmp_path / "texts.jsonl"
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    other.write_text("".join(json.dumps({"text": row[::-1]}) + "\n" for row in rows))
    cache, expected = tmp_path / "cache", []
    for file in (texts, other):
        expected.append(content(prepared(file, cache)))
    entries = sorted((cache / kind).iterdir())
    for entry in entries:
        entry.rename(tmp_path / entry.name)
    for entry, name in zip(entries, [*entries[1:], entries[0]], strict=True):
        (tmp_path / entry.name).rename(name)
    with caplog.at_level(logging.INFO, "minigpt_hf"):
        assert [content(prepared(file, cache)) for file in (texts, other)] == expected
    assert "is damaged (it is a copy of the entry" in caplog.text


@pytest.fixture
def later(monkeypatch):
    """Advance the clock of this process; files keep their times."""
    clock = time.time
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: clock() + seconds)


def test_a_flipped_byte_is_detected_although_size_and_modification_time_are_unchanged(intact, texts, tmp_path, later):
    """Even if the file was verified earlier, long enough ago for its state to be recorded."""
    original, expected = intact
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    later(-1)
    prepared(texts, cache)
    assert not (
        cache / "verified"
    ).exists()  # the files may change once more within the tick of the file system's clock
    later(2.1)
    prepared(texts, cache)
    assert list((cache / "verified").iterdir())
    (tokens, *_) = (cache / "streams").rglob("tokens.bin")
    before = tokens.stat()
    flip(tokens, 100)
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content(prepared(texts, cache)) == expected


def test_a_cache_entry_that_is_unchanged_for_two_seconds_is_hashed_once(intact, texts, tmp_path, monkeypatch, later):
    original, expected = intact
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    for file in cache.rglob("tokens.bin"):
        file.touch()
    later(2.1)
    prepared(texts, cache)
    opened = []
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kwargs: opened.append(self.name) or real(self, *args, **kwargs)
    )
    assert content(prepared(texts, cache)) == expected
    assert "tokens.bin" not in opened


def test_inconsistent_files_are_rebuilt_although_their_sums_are_correct(intact, texts, tmp_path):
    """As written by a faulty program: the manifest is correct, but the offsets do not point to BOS tokens."""
    from minigpt_hf.atomic import seal

    original, expected = intact
    for number, change in enumerate(
        (lambda offsets: offsets + 1, lambda offsets: offsets[::-1], lambda offsets: offsets[1:])
    ):
        cache = tmp_path / str(number)
        shutil.copytree(original, cache)
        for file in (cache / "streams").rglob("documents.npy"):
            np.save(file, change(np.load(file)))
            seal(file.parent)
        assert content(prepared(texts, cache)) == expected


def test_an_entry_of_an_earlier_version_without_a_manifest_is_rebuilt(intact, texts, tmp_path, caplog):
    original, expected = intact
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    for file in cache.rglob("manifest.json"):
        file.unlink()
    assert content(prepared(texts, cache)) == expected
    assert "manifest.json is missing" in caplog.text


# -- prepared texts, which cannot be rebuilt --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared_folder(texts, recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    argv = ["tokenize", "--recipe", recipe_file, "--data", texts, "--output_dir", folder]
    assert main([str(word) for word in argv]) == 0
    return folder


def trained(recipe, folder, run) -> int:
    argv = ["train", "--recipe", recipe, "--data", folder, "--output_dir", run, "--cache_dir", run.parent / "cache"]
    return main([str(word) for word in [*argv, "--max_steps", "2", "--eval_strategy", "no"]])


@pytest.mark.parametrize(
    "damage", representative(DAMAGE, "missing", "halved", "a byte in the middle flipped", "garbage", "another JSON")
)
def test_a_damaged_prepared_text_is_reported_in_one_line(damage, prepared_folder, recipe_file, tmp_path, capsys):
    for number, file in enumerate(sorted(file for file in prepared_folder.rglob("*") if file.is_file())):
        folder = tmp_path / str(number)
        shutil.copytree(prepared_folder, folder)
        DAMAGE[damage](folder / file.relative_to(prepared_folder))
        if file.name == "prepared.json" and damage == "missing":
            continue  # no longer a prepared text
        assert trained(recipe_file, folder, tmp_path / "run") == 2, file.name
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if line.startswith("minigpt")]
        assert str(folder) in line
        assert "`minigpt tokenize`" in line
        assert "Traceback" not in err


def test_a_run_does_not_resume_on_a_damaged_prepared_text(prepared_folder, recipe_file, tmp_path, capsys):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared_folder, folder)
    assert trained(recipe_file, folder, tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run" / "model")
    tokens = folder / "train" / "tokens.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    assert trained(recipe_file, folder, tmp_path / "run") == 2
    assert "the content of train/tokens.bin has changed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_a_prepared_text_of_an_earlier_format_without_a_manifest_is_an_error(
    prepared_folder, recipe_file, tmp_path, capsys
):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared_folder, folder)
    (folder / "manifest.json").unlink()
    about = json.loads((folder / "prepared.json").read_text())
    del about["version"]
    (folder / "prepared.json").write_text(json.dumps(about))
    assert trained(recipe_file, folder, tmp_path / "run") == 2
    assert "has format 1, and 3 is required: create it again with `minigpt tokenize`" in capsys.readouterr().err


def test_a_stream_of_another_tokenizer_is_an_error_although_sums_are_correct(
    prepared_folder, recipe_file, tmp_path, capsys
):
    from minigpt_hf.atomic import seal
    from minigpt_hf.data.tokenizer import byte_tokenizer

    folder = tmp_path / "prepared"
    shutil.copytree(prepared_folder, folder)
    shutil.rmtree(folder / "tokenizer")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    seal(folder)
    assert trained(recipe_file, folder, tmp_path / "run") == 2
    assert "train/ was not encoded with tokenizer/" in capsys.readouterr().err


def test_the_cached_index_of_a_large_text_is_not_used_for_other_content(text, tmp_path, monkeypatch):
    """Of the same name, size and modification time, including one that does not decode."""
    monkeypatch.setattr(documents, "CACHED_BYTES", 1000)
    file, cache = tmp_path / "text.txt", tmp_path / "cache"
    file.write_text(text)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    first = load_corpus(str(file), 0, cache_dir=cache).train
    assert len(list((cache / "documents").iterdir())) == 1
    changed = ("é" + text[2:]).encode()
    file.write_bytes(changed)
    os.utime(file, ns=times)
    second = load_corpus(str(file), 0, cache_dir=cache).train
    assert "".join(second) == changed.decode()
    assert (first.fingerprint == second.fingerprint, second.characters) == (False, len(text) - 1)
    assert load_corpus(str(file), 0, newline="universal", cache_dir=cache).train.characters == len(text) - 1
    file.write_bytes(b"\xff" + changed[1:])
    os.utime(file, ns=times)
    with pytest.raises(MiniGPTError, match="not utf-8 text: byte 0xff at position 0"):
        load_corpus(str(file), 0, cache_dir=cache)


@pytest.mark.parametrize("settings", [{}, {"newline": "universal"}, {"encoding": "latin-1"}, {"encoding": "utf-16"}])
def test_the_cached_index_of_a_large_text_equals_the_computed_one(settings, text, tmp_path, monkeypatch, caplog):
    """Also what is logged: byte order marks, zero characters and converted line ends."""
    caplog.set_level(logging.INFO, "minigpt_hf")
    folder, cache = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    for number, one in enumerate([text, "\ufeffa\r\nb", "\0", ""]):
        (folder / f"{number}.txt").write_bytes(one.encode(settings.get("encoding", "utf-8"), "ignore"))

    def read() -> tuple:
        caplog.clear()
        read = load_corpus(str(folder), 0, cache_dir=cache, **settings).train
        return read.index.tolist(), list(read), caplog.messages

    computed = read()
    monkeypatch.setattr(documents, "CACHED_BYTES", 1000)
    first, second = read(), read()
    assert first == second == computed
    assert len(list((cache / "documents").iterdir())) == 1


def test_a_large_stream_is_hashed_once(text_file, tmp_path, monkeypatch):
    """Its state is stored when it is written, and a change after that is found."""
    hashed = []
    real = minigpt_hf.atomic.sha256
    for module in (minigpt_hf.atomic, minigpt_hf.data.cache):
        monkeypatch.setattr(module, "sha256", lambda file: hashed.append(file.name) or real(file))
    monkeypatch.setattr(minigpt_hf.data.cache, "RECORDED_BYTES", 1000)
    monkeypatch.setattr(minigpt_hf.data.cache, "TICK_SECONDS", 0.2)
    first = prepared(text_file, tmp_path / "cache", "bytes")
    expected = content(first)
    assert hashed.count("tokens.bin") == 2
    prepared(text_file, tmp_path / "cache", "bytes")
    assert hashed.count("tokens.bin") == 2
    flip(first.train.folder / "tokens.bin", 100)
    repaired = prepared(text_file, tmp_path / "cache", "bytes")
    assert content(repaired) == expected
