"""Tokenizers and token streams are cached, or saved as a folder for other machines."""

import errno
import json
import os
import shutil

import pytest

from minigpt_hf.atomic import seal
from minigpt_hf.cli import main
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.prepared import PreparedText, ValidationSample, prepare
from minigpt_hf.errors import MiniGPTError


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_a_tokenizer_is_trained_once_per_text(kind, text, tmp_path):
    def prepare_file(name: str, words: str) -> PreparedText:
        (tmp_path / name).write_text(words)
        corpus = load_corpus(str(tmp_path / name), cache_dir=tmp_path / "cache")
        return prepare(corpus, kind, 300, tmp_path / "cache", block_size=16, validation_characters=100)

    first = prepare_file("a.txt", text)
    other = prepare_file("b.txt", text[:5000])
    assert other.tokenizer.get_vocab() != first.tokenizer.get_vocab()
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "tokenizers").rglob("tokenizer.json")}
    assert len(files) == 2
    again = prepare_file("c.txt", text)
    unchanged = (tmp_path / "cache" / "tokenizers").rglob("tokenizer.json")
    assert {file: file.stat().st_mtime_ns for file in unchanged} == files
    assert again.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()
    assert again.train.folder == first.train.folder


def test_max_tokens_limits_the_training_tokens(text_file, tmp_path):
    corpus = load_corpus(str(text_file), cache_dir=tmp_path)
    streams = [
        prepare(corpus, "bytes", 0, tmp_path, block_size=16, validation_characters=100, max_tokens=limit).train
        for limit in (None, 1000, 1001)
    ]
    assert [len(stream) for stream in streams[1:]] == [1000, 1001]
    assert streams[1].tokens[:].tolist() == streams[0].tokens[:1000].tolist()
    assert len({stream.folder for stream in streams}) == 3


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_counts_describe_the_text_truncated_by_max_tokens(kind, tmp_path):
    """Two documents; the second is truncated, possibly before a character of several bytes."""
    words = "Übermäßig größere Äpfel 🍎🍎 rollen; "
    for name, times in (("a", 3), ("b", 400)):
        (tmp_path / f"{name}.txt").write_text(words * times, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "[ab].txt"), 0, cache_dir=tmp_path)
    complete = prepare(corpus, kind, 300, tmp_path, block_size=16, validation_characters=100).train
    first = int(complete.documents[:2][1])  # number of tokens of the first document, including BOS
    for limit in (first - 1, first, first + 1, first + 2, first + 40, first + 41, len(complete) - 1, len(complete)):
        text = prepare(corpus, kind, 300, tmp_path, block_size=16, validation_characters=100, max_tokens=limit)
        stream, decoded = text.train, [text.tokenizer.decode(ids) for ids in text.train.iterate_documents()]
        assert limit - 4 < len(stream) <= limit  # a character has at most 4 bytes
        assert "".join(decoded) == (words * 403)[: stream.characters]
        assert stream.bytes == len("".join(decoded).encode())
        assert all(decoded)
        assert len(decoded) == (1 if len(stream) <= first else 2)
    assert stream.tokens[:].tolist() == complete.tokens[:].tolist()


def test_training_on_a_prepared_text_equals_training_on_the_original(text_file, recipe_file, tmp_path, capsys):
    """After `minigpt tokenize` the original is not needed."""
    short = "--max_steps 4 --eval_steps 2 --save_steps 2 --warmup_steps 2".split()
    copy = str(shutil.copy(text_file, tmp_path / "argparse.py"))
    prepared = tmp_path / "prepared"
    recipe = ["--recipe", str(recipe_file)]
    assert main(["tokenize", *recipe, "--data", copy, "--output_dir", str(prepared)]) == 0
    assert f"minigpt train --data {prepared}" in capsys.readouterr().out
    (tmp_path / "argparse.py").unlink()
    for data, folder in ((prepared, "run"), (text_file, "other")):
        assert main(["train", *recipe, *short, "--data", str(data), "--output_dir", str(tmp_path / folder)]) == 0
    ours, theirs = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "other"))
    assert ours == theirs
    assert main(["evaluate", str(tmp_path / "other" / "model"), "--data", str(prepared)]) == 2
    assert "is a prepared text, which only training accepts, and not in a mixture" in capsys.readouterr().err
    about = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())
    assert (about["tokenizer"]["kind"], about["recipe"]["tokenizer"]) == ("byte-level BPE", "bpe")

    assert main(["tokenize", *recipe, "--data", str(text_file), "--output_dir", str(prepared)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["tokenize", *recipe, "--data", str(text_file)]) == 2
    assert "--output_dir FOLDER is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "vocab_size 300: no effect, tokenizer bytes has 258 tokens"), (["--shard", "0/2"], "vocab_size: no effect")],
    ids=["whole", "shard"],
)
def test_a_vocabulary_that_the_tokenizer_does_not_have_is_reported(flags, message, text, tmp_path, capsys):
    (tmp_path / "table.jsonl").write_text("".join(json.dumps({"text": text[:300]}) + "\n" for _ in range(4)))
    data = [
        "--data",
        str(tmp_path / "table.jsonl"),
        "--validation_fraction",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["tokenize", *data, *flags, "--tokenizer", "bytes", "--vocab_size", "300"]) == 0
    assert message in capsys.readouterr().err


def test_a_prepared_text_is_published_and_evaluated_with_its_settings(text, recipe_file, tmp_path, capsys):
    """Each of these settings changes the score or is an error if `evaluate` does not use it."""
    original, prepared, run = tmp_path / "plays.dat", tmp_path / "prepared", tmp_path / "run"
    original.write_bytes(("café\r\n" + text[:30_000].replace("\n", "\r\n")).encode("latin-1"))
    settings = {"encoding": "latin-1", "newline": "universal", "data_format": "text", "validation_fraction": 0.3}
    settings |= {"validation_characters": 3000, "tokenizer": "bpe", "vocab_size": 290, "max_tokens": 5000}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    recipe = ["--recipe", str(recipe_file)]
    short = "--max_steps 4 --eval_steps 2 --save_steps 2 --sample_tokens 0".split()
    assert main(["tokenize", *recipe, "--data", str(original), *flags, "--output_dir", str(prepared)]) == 0
    train = ["train", *recipe, "--data", str(prepared), *short, "--output_dir", str(run)]
    for differing, stored in (("encoding utf-8", "encoding latin-1"), ("vocab_size 300", "vocab_size 290")):
        capsys.readouterr()
        assert main([*train, "--newline", "universal", *f"--{differing}".split()]) == 2
        assert f"{differing}: {prepared} was prepared with {stored}; omit the setting" in capsys.readouterr().err
        assert not run.exists()
    assert main([*train, "--newline", "universal", "--validation_fraction", "0.3"]) == 0
    about = json.loads((run / "model" / "minigpt.json").read_text())
    assert {name: about["recipe"][name] for name in settings} == settings
    assert about["data"]["name"] == "plays.dat"
    capsys.readouterr()
    assert main(["evaluate", str(run / "model"), "--data", str(original), "--split", "validation", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert {name: score[name] for name in about["results"]} == about["results"]


@pytest.mark.parametrize("links", [True, False])
def test_the_files_of_a_stream_are_linked_or_else_copied(links, text_file, tmp_path, monkeypatch, capsys):
    """Without links, as between two file systems."""

    def fail(*arguments, **keywords):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    argv = ["tokenize", "--data", text_file, "--tokenizer", "bytes", "--cache_dir", tmp_path / "cache"]
    assert main([str(word) for word in [*argv, "--output_dir", tmp_path / "prepared"]]) == 0
    cached = {file.stat().st_ino for file in (tmp_path / "cache" / "streams").rglob("tokens.bin")}
    files = list((tmp_path / "prepared").rglob("tokens.bin"))
    assert len(files) == len(cached) == 2
    assert {file.stat().st_ino in cached for file in files} == {links}
    opened = PreparedText.open(tmp_path / "prepared", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert len(PreparedText.open(tmp_path / "prepared", tmp_path / "cache").train) == len(opened.train)


def test_training_on_a_text_prepared_without_validation_runs_no_evaluations(text_file, recipe_file, tmp_path, capsys):
    recipe, prepared = ["--recipe", str(recipe_file)], str(tmp_path / "prepared")
    none = ["--validation_fraction", "0"]
    assert main(["tokenize", *recipe, "--data", str(text_file), *none, "--output_dir", prepared]) == 0
    assert main(["train", *recipe, "--data", prepared, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"] == {}


def test_a_prepared_text_whose_metadata_are_incomplete_is_an_error(text_file, tmp_path, capsys):
    """As written by a faulty program: the manifest is correct."""
    prepared = tmp_path / "prepared"
    argv = ["--data", str(text_file), "--tokenizer", "bytes", "--output_dir", str(prepared)]
    assert main(["tokenize", *argv]) == 0
    metadata = json.loads((prepared / "prepared.json").read_text())
    del metadata["cut"]
    (prepared / "prepared.json").write_text(json.dumps(metadata))
    seal(prepared)
    with pytest.raises(MiniGPTError, match=r"this prepared text cannot be read \('cut'\): create it again"):
        PreparedText.open(prepared, tmp_path / "cache")


@pytest.mark.parametrize(
    ("sample", "description"),
    [
        (ValidationSample(3, 3, 2000, 2000, 64), "all 2,000 characters"),
        (ValidationSample(3, 1400, 1999, 2000, 64), "1,999 of 2,000 characters, excerpts from 3 of 1,400 documents"),
        (ValidationSample(3, None, 2000, None, 64), "2,000 characters of 3 documents of the stream"),
    ],
)
def test_a_validation_sample_describes_which_part_is_scored(sample, description):
    assert str(sample) == description


@pytest.mark.parametrize(("tokens", "warns"), [(9_999, True), (10_000, False)])
def test_a_score_of_fewer_than_10_000_tokens_causes_a_warning(tokens, warns, tmp_path, caplog):
    (tmp_path / "text.txt").write_text("0123456789" * 4_000)
    corpus = load_corpus(str(tmp_path / "text.txt"), 0.5)
    text = prepare(corpus, "bytes", 0, tmp_path / "cache", block_size=tokens, validation_characters=tokens)
    assert text.validation.characters == tokens
    assert ("a validation score on only" in caplog.text) == warns


@pytest.mark.parametrize(
    ("characters", "is_provided", "remedy"),
    [
        (500, False, "raise --validation_characters"),
        (500, True, "raise --validation_characters"),
        (5_000, False, "provide more text, or raise --validation_fraction"),
        (5_000, True, "provide a validation split with more text"),
    ],
)
def test_the_warning_names_a_setting_that_adds_text_to_the_sample(characters, is_provided, remedy, tmp_path, caplog):
    row = json.dumps({"text": "0123456789" * 200}) + "\n"
    (tmp_path / "train.jsonl").write_text(row)
    if is_provided:
        (tmp_path / "validation.jsonl").write_text(row)
    corpus = load_corpus(str(tmp_path), 0.5, cache_dir=tmp_path / "cache")
    prepare(corpus, "bytes", 0, tmp_path / "cache", block_size=32, validation_characters=characters)
    assert f"for a more reliable score, {remedy}\n" in caplog.text
