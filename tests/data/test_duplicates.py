"""`--dedup` drops copies and near copies of earlier documents, and lists them."""

import importlib.util
import json
import random

import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.duplicates import shingles
from minigpt_hf.data.files import Share
from minigpt_hf.data.prepared import PreparedText
from minigpt_hf.errors import MiniGPTError
from tests.data.test_corpus import write_files

needs_rensa = pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="needs rensa, of the extra `dedup`")


def documents() -> list[str]:
    """40 documents of 300 words; 5 and 15 are copies of 2, and in 25 three words of 4 are changed."""
    source, words = random.Random(0), [f"word{number}" for number in range(2000)]
    texts = [" ".join(source.choices(words, k=300)) for _ in range(40)]
    texts[5] = texts[15] = texts[2]
    changed = texts[4].split()
    for position in (10, 100, 200):
        changed[position] = "another"
    texts[25] = " ".join(changed)
    return texts


DROPPED = {"exact": {5: 2, 15: 2}, "near": {5: 2, 15: 2, 25: 4}}


@pytest.mark.parametrize("kind", ["exact", pytest.param("near", marks=needs_rensa)])
@pytest.mark.parametrize("source", ["files", "rows"])
def test_duplicates_are_dropped_and_listed(kind, source, tmp_path, caplog):
    caplog.set_level("INFO", "minigpt_hf")
    texts = documents()
    if source == "files":
        data = write_files(tmp_path / "text", {f"{number:02}.txt": one for number, one in enumerate(texts)})
        names = [f"{data}/{number:02}.txt" for number in range(40)]
    else:
        data, names = str(tmp_path / "rows.jsonl"), [f"row {number + 1}" for number in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    for _ in range(2):  # the second time from the cache
        corpus = load_corpus(data, 0, dedup=kind, cache_dir=tmp_path / "cache")
        assert list(corpus.train) == [one for number, one in enumerate(texts) if number not in DROPPED[kind]]
        (listing,) = corpus.duplicates
        assert [json.loads(line) for line in listing.read_text().splitlines()] == [
            {"document": names[dropped], "duplicate_of": names[kept]} for dropped, kept in DROPPED[kind].items()
        ]
        note = f"{len(DROPPED[kind])} of 40 documents dropped as {kind} duplicates"
        assert note in corpus.split_description
        assert f"{data}: {note}, which are listed in {listing}" in caplog.messages


@pytest.mark.parametrize("kind", ["exact", pytest.param("near", marks=needs_rensa)])
def test_a_text_without_duplicates_is_not_changed(kind, tmp_path):
    texts = [one for number, one in enumerate(documents()) if number not in DROPPED["near"]]
    data = write_files(tmp_path / "text", {f"{number:02}.txt": one for number, one in enumerate([*texts, "a", "b"])})
    corpus = load_corpus(data, 0, dedup=kind, cache_dir=tmp_path / "cache")
    assert list(corpus.train) == [*texts, "a", "b"]
    assert "dropped" not in corpus.split_description


def test_the_list_of_duplicates_is_part_of_a_prepared_text_and_of_a_shard(tmp_path):
    data = write_files(tmp_path / "text", {f"{number:02}.txt": one for number, one in enumerate(documents())})
    argv = ["tokenize", "--data", data, "--tokenizer", "bytes", "--dedup", "exact", "--validation_fraction", "0"]
    assert main([*argv, "--output_dir", str(tmp_path / "prepared")]) == 0
    assert main([*argv, "--shard", "0/1", "--output_dir", str(tmp_path / "shards")]) == 0
    assert main(["tokenize", "--merge", str(tmp_path / "shards")]) == 0
    for folder in (tmp_path / "prepared", tmp_path / "shards" / "shard-00000-of-00001"):
        assert len((folder / "duplicates.jsonl").read_text().splitlines()) == 2
    prepared, merged = (PreparedText.open(folder) for folder in (tmp_path / "prepared", tmp_path / "shards" / "index"))
    assert "2 of 40 documents dropped as exact duplicates" in prepared.split_description
    assert "2 documents dropped as exact duplicates of others in their shards" in merged.split_description
    assert prepared.train.tokens[:].tolist() == merged.train.tokens[:].tolist()


def test_evaluate_holds_out_the_same_documents_as_training(recipe_file, text, tmp_path, capsys):
    texts = [text[start : start + 800] for start in range(0, 32_000, 800)]
    data = write_files(tmp_path / "text", {f"{number:03}.txt": one for number, one in enumerate(3 * texts)})
    argv = ["--recipe", str(recipe_file), "--data", data, "--dedup", "exact", "--max_steps", "2", "--eval_steps", "2"]
    assert main(["train", *argv, "--save_steps", "2", "--output_dir", str(tmp_path / "run")]) == 0
    about = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())
    assert "80 of 120 documents dropped as exact duplicates" in about["data"]["cut"]
    capsys.readouterr()
    argv = ["evaluate", str(tmp_path / "run" / "model"), "--data", data, "--split", "validation", "--json"]
    assert main(argv) == 0
    score = json.loads(capsys.readouterr().out)
    assert {name: score[name] for name in about["results"]} == about["results"]


def test_the_sources_of_a_mixture_are_not_compared_with_each_other(tmp_path, caplog):
    data = write_files(tmp_path, {"one.jsonl": '{"text": "a b"}\n' * 2, "other.jsonl": '{"text": "a b"}\n' * 3})
    corpus = load_corpus(f"{data}/one.jsonl:0.5,{data}/other.jsonl:0.5", 0, dedup="exact", cache_dir=tmp_path / "cache")
    assert list(corpus.train) == ["a b"] * 2
    assert "dedup exact: finds duplicates within each source of a mixture, not across its sources" in caplog.text


def test_unknown_kinds_and_streams_are_rejected(hub, tmp_path):
    with pytest.raises(MiniGPTError, match="dedup is 'all': it must be one of none, exact, near"):
        load_corpus("stdlib", dedup="all")
    hub.put("user/rows", {"train.jsonl": b'{"text": "a"}\n' * 3}, repo_type="datasets")
    with pytest.raises(MiniGPTError, match="user/rows: --dedup exact requires all documents: omit --streaming"):
        load_corpus("user/rows", streaming=True, dedup="exact")


def test_sequences_of_characters_represent_texts_with_few_or_long_words():
    assert list(shingles("a b c d e f")) == ["a b c d e", "b c d e f"]
    assert list(shingles("abcdefg")) == ["abcde", "bcdef", "cdefg"]
    assert list(shingles("ab")) == ["ab"]
    assert set(map(len, shingles("中文" * 100))) == {5}


def test_the_list_names_the_rows_of_the_table_that_is_read(tmp_path):
    texts = [f"document {number} with some words" for number in range(30)]
    texts += [texts[20], texts[3], texts[22]]  # of these, a shard of half of the rows finds the first and the last
    rows = [json.dumps({"text": one}) + "\n" for one in texts]
    data = write_files(tmp_path, {"one.jsonl": "".join(rows), "other.jsonl": '{"text": ""}\n' * 2 + "".join(rows)})

    def listed(name: str, share: Share | None = None) -> list[tuple[str, str]]:
        corpus = load_corpus(f"{data}/{name}", 0, dedup="exact", share=share, cache_dir=tmp_path / "cache")
        return [tuple(json.loads(line).values()) for line in corpus.duplicates[0].read_text().splitlines()]

    assert listed("one.jsonl") == [("row 31", "row 21"), ("row 32", "row 4"), ("row 33", "row 23")]
    assert listed("other.jsonl") == [("row 33", "row 23"), ("row 34", "row 6"), ("row 35", "row 25")]
    assert listed("one.jsonl", Share(1, 2)) == [("row 31", "row 21"), ("row 33", "row 23")]


@needs_rensa
def test_nearly_all_documents_are_found_that_share_clearly_more_than_the_threshold(tmp_path):
    source, words = random.Random(0), [f"word{number}" for number in range(5000)]
    texts = [source.choices(words, k=400) for _ in range(100)]
    changed = [list(one) for one in texts]
    for one in changed:
        for position in range(40, 400, 60):  # in 30 of 396 sequences: 366 of 396 + 30 are shared, 86 %
            one[position] = "changed"
    rows = [json.dumps({"text": " ".join(one)}) + "\n" for one in texts + changed]
    data = write_files(tmp_path, {"rows.jsonl": "".join(rows)})
    corpus = load_corpus(f"{data}/rows.jsonl", 0, dedup="near", cache_dir=tmp_path / "cache")
    assert 100 <= len(list(corpus.train)) <= 102
