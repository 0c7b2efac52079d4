"""A text is prepared once: tokenizer and streams are found again, or kept as a folder for other machines."""

import json
import shutil

import pytest

from minigpt_hf.cli import main
from minigpt_hf.data import prepared
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.prepared import PreparedText, prepare


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_a_tokenizer_is_learnt_once_and_again_for_other_text(kind, text, tmp_path, monkeypatch):
    def prepare_file(name: str, words: str) -> PreparedText:
        (tmp_path / name).write_text(words)
        corpus = load_corpus(str(tmp_path / name), cache_dir=tmp_path / "cache")
        return prepare(corpus, kind, 300, tmp_path / "cache", block_size=16, validation_characters=100)

    first = prepare_file("a.txt", text)
    other = prepare_file("b.txt", text[:5000])
    assert other.tokenizer.get_vocab() != first.tokenizer.get_vocab()
    monkeypatch.setattr(prepared, "byte_level_bpe", lambda *args: pytest.fail("learnt again"))
    monkeypatch.setattr(prepared, "character_tokenizer", lambda *args: pytest.fail("learnt again"))
    again = prepare_file("c.txt", text)
    assert again.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()
    assert again.train.folder == first.train.folder


def test_no_more_tokens_are_taken_than_asked_for(text_file, tmp_path):
    corpus = load_corpus(str(text_file), cache_dir=tmp_path)
    streams = [
        prepare(corpus, "bytes", 0, tmp_path, block_size=16, validation_characters=100, max_tokens=most).train
        for most in (None, 1000, 1001)
    ]
    assert [len(stream) for stream in streams[1:]] == [1000, 1001]
    assert streams[1].tokens.tolist() == streams[0].tokens[:1000].tolist()
    assert len({stream.folder for stream in streams}) == 3


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_counts_describe_the_text_that_max_tokens_left(kind, tmp_path):
    """Two documents, the second cut short, perhaps where a character of several bytes begins."""
    words = "Übermäßig größere Äpfel 🍎🍎 rollen; "
    for name, times in (("a", 3), ("b", 400)):
        (tmp_path / f"{name}.txt").write_text(words * times, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "[ab].txt"), 0, cache_dir=tmp_path)
    whole = prepare(corpus, kind, 300, tmp_path, block_size=16, validation_characters=100).train
    first = int(whole.documents[1])  # tokens of the first document, its E included
    for most in (first - 1, first, first + 1, first + 2, first + 40, first + 41, len(whole) - 1, len(whole)):
        text = prepare(corpus, kind, 300, tmp_path, block_size=16, validation_characters=100, max_tokens=most)
        stream, decoded = text.train, [text.tokenizer.decode(ids) for ids in text.train.texts()]
        assert most - 4 < len(stream) <= most  # a character has at most 4 bytes
        assert "".join(decoded) == (words * 403)[: stream.characters]
        assert stream.bytes == len("".join(decoded).encode())
        assert all(decoded)
        assert len(decoded) == (1 if len(stream) <= first else 2)
    assert stream.tokens.tolist() == whole.tokens.tolist()


def test_training_on_a_kept_text_equals_training_on_the_text(text_file, recipe_file, run_folder, tmp_path, capsys):
    """`minigpt tokenize`, then the text is needed no more."""
    copy = str(shutil.copy(text_file, tmp_path / "argparse.py"))
    kept = tmp_path / "kept"
    recipe = ["--recipe", str(recipe_file)]
    assert main(["tokenize", *recipe, "--data", copy, "--output_dir", str(kept)]) == 0
    assert f"minigpt train --data {kept}" in capsys.readouterr().out
    (tmp_path / "argparse.py").unlink()
    assert main(["train", *recipe, "--data", str(kept), "--output_dir", str(tmp_path / "run")]) == 0
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", run_folder))
    assert ours == theirs
    assert main(["evaluate", str(run_folder / "model"), "--data", str(kept)]) == 2
    assert "is a prepared text, tokens which only training takes" in capsys.readouterr().err
    about = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())
    assert (about["tokenizer"]["kind"], about["recipe"]["tokenizer"]) == ("byte-level BPE", "bpe")

    assert main(["tokenize", *recipe, "--data", str(text_file), "--output_dir", str(kept)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["tokenize", *recipe, "--data", str(text_file)]) == 2
    assert "--output_dir FOLDER is required" in capsys.readouterr().err


def test_a_prepared_text_is_published_and_evaluated_as_it_was_read(text, recipe_file, tmp_path, capsys):
    """Everything that differs from a default here would change the score or fail, if `evaluate` did not know it."""
    original, kept, run = tmp_path / "plays.dat", tmp_path / "kept", tmp_path / "run"
    original.write_bytes(("café\r\n" + text[:30_000].replace("\n", "\r\n")).encode("latin-1"))
    settings = {"encoding": "latin-1", "newline": "universal", "data_format": "text", "validation_fraction": 0.3}
    settings |= {"validation_characters": 3000, "tokenizer": "bpe", "vocab_size": 290, "max_tokens": 5000}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    recipe = ["--recipe", str(recipe_file)]
    short = "--max_steps 4 --eval_steps 2 --save_steps 2 --sample_tokens 0".split()
    assert main(["tokenize", *recipe, "--data", str(original), *flags, "--output_dir", str(kept)]) == 0
    train = ["train", *recipe, "--data", str(kept), *short, "--output_dir", str(run)]
    for differing, stored in (("--encoding utf-8", "encoding latin-1"), ("--vocab_size 300", "vocab_size 290")):
        capsys.readouterr()
        assert main([*train, "--newline", "universal", *differing.split()]) == 2
        assert f"{differing}: {kept} was prepared with {stored}; leave out" in capsys.readouterr().err
        assert not run.exists()
    assert main([*train, "--newline", "universal", "--validation_fraction", "0.3"]) == 0
    about = json.loads((run / "model" / "minigpt.json").read_text())
    assert {name: about["recipe"][name] for name in settings} == settings
    assert about["data"]["name"] == "plays.dat"
    capsys.readouterr()
    assert main(["evaluate", str(run / "model"), "--data", str(original), "--split", "validation", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert {name: score[name] for name in about["results"]} == about["results"]


def test_a_text_prepared_without_validation_is_trained_on_without_evaluations(text_file, recipe_file, tmp_path, capsys):
    recipe, kept = ["--recipe", str(recipe_file)], str(tmp_path / "kept")
    none = ["--validation_fraction", "0"]
    assert main(["tokenize", *recipe, "--data", str(text_file), *none, "--output_dir", kept]) == 0
    assert main(["train", *recipe, "--data", kept, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"] == {}
