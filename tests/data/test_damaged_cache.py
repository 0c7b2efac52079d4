"""A damaged cache is rebuilt and said so; a damaged prepared text is refused; neither is ever trained on."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.prepared import PreparedText, prepare
from minigpt_hf.data.tokenizer import tokenizer_fingerprint


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
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
    """Nine documents in a table, so that their index is cached, too."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [text[place * 3000 : (place + 1) * 3000] for place in range(9)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def prepared(file: Path, cache: Path, kind: str = "bpe") -> PreparedText:
    return prepare(load_corpus(str(file), cache_dir=cache), kind, 300, cache, block_size=16, validation_characters=1000)


def content(text: PreparedText) -> tuple:
    streams = [
        (stream.tokens.tolist(), stream.documents.tolist(), stream.fingerprint, stream.bytes, stream.characters)
        for stream in (text.train, text.validation)
    ]
    return *streams, tokenizer_fingerprint(text.tokenizer)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A cache with a tokenizer, an index of documents and two streams, and what a training is given of it."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    return cache, content(prepared(texts, cache))


def files_of(cache: Path) -> list[Path]:
    return [
        file
        for kind in ("tokenizers", "streams", "documents", "tables")
        for file in (cache / kind).rglob("*.*")
        if file.is_file()
    ]


def test_the_cache_holds_what_the_damage_is_tried_on(whole):
    cache, _ = whole
    names = sorted(file.name for file in files_of(cache))
    assert [name for name in names if not name.startswith("index")] == sorted(
        [*STREAM, *STREAM, "manifest.json", "tokenizer.json", "rows.arrow", *["manifest.json"] * (len(names) - 10 - 2)]
    )


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["tokenizers", "streams", "documents", "tables"])
def test_each_damaged_file_of_the_cache_is_rebuilt_and_reported(kind, damage, whole, texts, tmp_path, caplog):
    original, expected = whole
    caplog.set_level(logging.INFO, "minigpt_hf")
    for number, file in enumerate(sorted(file for file in files_of(original) if kind in file.parts)):
        cache = tmp_path / str(number)
        shutil.copytree(original, cache)
        damaged = cache / file.relative_to(original)
        DAMAGE[damage](damaged)
        for start in range(2):
            caplog.clear()
            assert content(prepared(texts, cache)) == expected, file.name
            said = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
            assert len(said) == (start == 0), file.name
            if start == 0:
                assert said[0].startswith(f"{damaged.parent}: the cached ")
                assert said[0].endswith("it is rebuilt")
                assert file.name in said[0] or file.name == "manifest.json"  # a damaged sum tells of the file it is of
        assert {path.name for path in (cache / kind).iterdir()} == {path.name for path in (original / kind).iterdir()}


def test_a_flipped_byte_is_noticed_though_size_and_modification_time_are_as_before(whole, texts, tmp_path):
    """Also where the sum has been verified before, long enough ago for that to be remembered."""
    original, expected = whole
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    prepared(texts, cache)
    time.sleep(2.1)
    prepared(texts, cache)
    assert list((cache / "verified").iterdir())
    (tokens, *_) = (cache / "streams").rglob("tokens.bin")
    before = tokens.stat()
    flip(tokens, 100)
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content(prepared(texts, cache)) == expected


def test_an_unchanged_file_is_hashed_once(whole, texts, tmp_path, monkeypatch):
    original, expected = whole
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    time.sleep(2.1)
    prepared(texts, cache)
    opened = []
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kwargs: opened.append(self.name) or real(self, *args, **kwargs)
    )
    assert content(prepared(texts, cache)) == expected
    assert "tokens.bin" not in opened


def test_files_that_do_not_fit_together_are_rebuilt_though_their_sums_are_right(whole, texts, tmp_path):
    """As a faulty program would have written them: the manifest agrees, the offsets do not point to documents."""
    from minigpt_hf.atomic import seal

    original, expected = whole
    for number, change in enumerate(
        (lambda places: places + 1, lambda places: places[::-1], lambda places: places[1:])
    ):
        cache = tmp_path / str(number)
        shutil.copytree(original, cache)
        for file in (cache / "streams").rglob("documents.npy"):
            np.save(file, change(np.load(file)))
            seal(file.parent)
        assert content(prepared(texts, cache)) == expected


def test_an_entry_of_an_earlier_version_without_a_manifest_is_rebuilt(whole, texts, tmp_path, caplog):
    original, expected = whole
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    for file in cache.rglob("manifest.json"):
        file.unlink()
    assert content(prepared(texts, cache)) == expected
    assert "manifest.json is missing" in caplog.text


# -- a prepared text, which has no source to be rebuilt from ----------------------------------------------------------


@pytest.fixture(scope="module")
def kept(texts, recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "kept"
    argv = ["tokenize", "--recipe", recipe_file, "--data", texts, "--output_dir", folder]
    assert main([str(word) for word in argv]) == 0
    return folder


def trained(recipe, folder, run) -> int:
    argv = ["train", "--recipe", recipe, "--data", folder, "--output_dir", run, "--cache_dir", run.parent / "cache"]
    return main([str(word) for word in [*argv, "--max_steps", "2", "--eval_strategy", "no"]])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_prepared_text_is_refused_in_one_line(damage, kept, recipe_file, tmp_path, capsys):
    for number, file in enumerate(sorted(file for file in kept.rglob("*") if file.is_file())):
        folder = tmp_path / str(number)
        shutil.copytree(kept, folder)
        DAMAGE[damage](folder / file.relative_to(kept))
        if file.name == "prepared.json" and damage == "missing":
            continue  # then it is not a prepared text
        assert trained(recipe_file, folder, tmp_path / "run") == 2, file.name
        err = capsys.readouterr().err
        (said,) = [line for line in err.splitlines() if line.startswith("minigpt")]
        assert str(folder) in said
        assert "`minigpt tokenize`" in said
        assert "Traceback" not in err


def test_a_run_does_not_resume_on_a_damaged_prepared_text(kept, recipe_file, tmp_path, capsys):
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    assert trained(recipe_file, folder, tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run" / "model")
    tokens = folder / "train" / "tokens.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    assert trained(recipe_file, folder, tmp_path / "run") == 2
    assert "the content of train/tokens.bin has changed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_a_prepared_text_of_the_format_without_a_manifest_is_refused(kept, recipe_file, tmp_path, capsys):
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    (folder / "manifest.json").unlink()
    about = json.loads((folder / "prepared.json").read_text())
    del about["version"]
    (folder / "prepared.json").write_text(json.dumps(about))
    assert trained(recipe_file, folder, tmp_path / "run") == 2
    assert "has format 1, and 3 is required: create it again with `minigpt tokenize`" in capsys.readouterr().err


def test_a_stream_of_another_tokenizer_is_refused_though_all_sums_are_right(kept, recipe_file, tmp_path, capsys):
    from minigpt_hf.atomic import seal
    from minigpt_hf.data.tokenizer import byte_tokenizer

    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    shutil.rmtree(folder / "tokenizer")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    seal(folder)
    assert trained(recipe_file, folder, tmp_path / "run") == 2
    assert "train/ was not made with tokenizer/" in capsys.readouterr().err
