"""No document is in both splits, within one source or in a mixture of overlapping sources."""

import json
import logging
import random
import re

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_hf
from minigpt_hf.cli import main
from minigpt_hf.data.corpus import load_corpus
from tests.data.test_corpus import write_files

WORDS = [f"document {i}: {'word ' * (i % 9)}" for i in range(120)]


def write_folder(folder, contents: list[str]) -> str:
    return write_files(folder, {f"{i:03}.txt": text for i, text in enumerate(contents)})


def splits(corpus) -> tuple[set[str], set[str]]:
    """The documents of each split, except one that is divided between both."""
    train, validation = list(corpus.train), list(corpus.validation or ())
    parts = [*corpus.train.components, *(corpus.validation.components if corpus.validation else ())]
    complete = {
        text
        for part in parts
        for one, text in zip(part.index, part, strict=True)
        if one["begin"] == 0 and text in WORDS
    }
    return set(train) & complete, set(validation) & complete


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    fraction=st.sampled_from([0.05, 0.1, 0.3, 0.6]),
)
def test_overlapping_texts_share_no_document_between_train_and_validation(tmp_path_factory, seed, sizes, fraction):
    source = random.Random(seed)
    folder = tmp_path_factory.mktemp("mixture")
    names = [write_folder(folder / str(i), source.choices(WORDS, k=size)) for i, size in enumerate(sizes)]
    try:
        corpus = load_corpus(",".join(f"{name}:{source.random() + 0.1}" for name in names), fraction)
    except ValueError as error:
        assert "all of its documents are copies of validation documents" in str(error)
        return
    train, validation = splits(corpus)
    assert train.isdisjoint(validation)
    # A document that is divided between the splits does not occur complete in training either.
    held_out = {
        digest.tobytes()
        for part in (corpus.validation.components if corpus.validation else ())
        for digest in part.index["digest"]
    }
    for part in corpus.train.components:
        for one, text in zip(part.index, part, strict=True):
            assert one["digest"].tobytes() not in held_out or text not in WORDS
    assert corpus.validation is None or corpus.validation.characters > 0


def test_copies_of_validation_documents_are_removed_from_training_and_counted(tmp_path, caplog):
    """One source is split by hash; the other, of 19 documents, by position: the last 30% of its characters."""
    one = write_folder(tmp_path / "one", WORDS[:50])
    few = write_folder(tmp_path / "few", WORDS[:19])
    held_out = set(load_corpus(one, 0.3).validation)
    assert len(held_out) == 15
    end, total = 0, sum(map(len, WORDS[:19]))
    complete = [text for text in WORDS[:19] if (end := end + len(text)) <= int(total * 0.7)]
    expected = [text for text in complete if text not in held_out]
    assert len(complete) > len(expected) > 0
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(f"{one}:0.5,{few}:0.5", 0.3)
    assert list(corpus.train.components[1])[: len(expected)] == expected
    assert set(corpus.train.components[0]).isdisjoint(WORDS[len(complete) : 19])
    copies = [text for text in WORDS[len(complete) : 19] if text not in held_out]
    in_part_of_few = WORDS[len(complete)] in held_out  # the divided document is also held out from the other source
    one_description, few_description = (part.split("; ")[-1] for part in corpus.split_description.split("; of few: "))
    assert one_description == f"{len(copies)} copies of validation documents excluded from training"
    number = len(complete) - len(expected) + in_part_of_few
    assert (
        few_description
        == f"{number} {'copy' if number == 1 else 'copies'} of validation documents excluded from training"
    )
    assert one_description in caplog.text


def test_copies_among_few_documents_split_by_position_are_removed_from_training(tmp_path):
    folder = write_folder(tmp_path / "a", ["same text here", "another", "same text here"])
    corpus = load_corpus(folder, 0.3)
    assert (list(corpus.train), list(corpus.validation)) == (["another", "sam"], ["e text here"])
    assert (
        corpus.split_description
        == "the last 11 of 35 characters; 1 copy of validation documents excluded from training"
    )
    with pytest.raises(ValueError, match="all of its documents are copies of validation documents"):
        load_corpus(write_folder(tmp_path / "b", ["same", "same"]), 0.5)


def test_a_source_without_held_out_documents_is_absent_from_validation(tmp_path):
    """The common threshold may lie below the hashes of all of its 20 documents."""
    many = write_folder(tmp_path / "many", WORDS[:100])
    held_out = set(load_corpus(many, 0.05).validation)
    rest = [text for text in WORDS[:100] if text not in held_out][:20]
    corpus = load_corpus(f"{many}:0.5,{write_folder(tmp_path / 'rest', rest)}:0.5", 0.05)
    assert set(corpus.validation) == held_out
    assert "of rest: none of 20 documents" in corpus.split_description
    assert corpus.validation.shares == [1.0]


def test_the_description_of_a_split_does_not_contain_paths(tmp_path):
    names = [write_folder(tmp_path / name, WORDS[:3]) for name in ("one", "two")]
    assert str(tmp_path) not in load_corpus(f"{names[0]}:0.5,{names[1]}:0.5").split_description


def test_the_used_share_of_each_source_of_a_mixture_is_logged(tmp_path, caplog):
    folder = write_files(tmp_path, {"a.txt": "a" * 1000, "b.txt": "b" * 1000})
    with caplog.at_level(logging.INFO):
        load_corpus(f"{folder}/a.txt:3,{folder}/b.txt:1", 0)
    assert "the mixture uses 333 of 1,000 characters" in caplog.text
    assert "b.txt: it ends with the source that is exhausted first" in caplog.text


def test_a_dataset_with_its_own_validation_split_is_unchanged_and_duplicates_are_reported(tmp_path, caplog):
    rows = {"train": WORDS[:30], "validation": [*WORDS[25:30], "other"]}
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts}) for name, texts in rows.items()})
    both.save_to_disk(tmp_path / "saved")
    corpus = load_corpus(str(tmp_path / "saved"))
    assert (list(corpus.train), list(corpus.validation)) == (rows["train"], rows["validation"])
    assert "5 documents of its training split also occur in its validation split" in caplog.text
    mixed = load_corpus(f"{tmp_path / 'saved'}:0.5,{write_folder(tmp_path / 'few', WORDS[20:30])}:0.5")
    assert [text for text in mixed.train.components[1] if text in WORDS[25:30]] == []


def test_a_mixture_of_streams_shares_no_document_between_splits(hub, tmp_path):
    datasets.Dataset.from_dict({"text": WORDS}).to_parquet(tmp_path / "rows.parquet")
    hub.put("user/words", {"train.parquet": (tmp_path / "rows.parquet").read_bytes()}, repo_type="datasets")
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in WORDS[:40]))
    datasets.Dataset.from_dict({"text": WORDS[:40]}).to_parquet(tmp_path / "more.parquet")
    hub.put("user/more", {"train.parquet": (tmp_path / "more.parquet").read_bytes()}, repo_type="datasets")
    corpus = load_corpus("user/words:0.5,user/more:0.5", 0.2, streaming=True)
    train, validation = (
        {text for part in side.components for text in part} for side in (corpus.train, corpus.validation)
    )
    assert train.isdisjoint(validation)
    assert train | validation == set(WORDS)


def test_a_mixture_of_streams_that_ends_before_the_given_number_of_tokens_is_logged(hub, tmp_path, capsys):
    for name, texts in (("few", WORDS[:20]), ("many", WORDS[20:])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "rows.parquet")
        hub.put(f"user/{name}", {"train.parquet": (tmp_path / "rows.parquet").read_bytes()}, repo_type="datasets")
    flags = "--data user/few:0.5,user/many:0.5 --streaming --tokenizer bytes --validation_fraction 0".split()
    for tokens, is_logged in (("50", False), ("100000", True)):
        output = tmp_path / tokens
        assert main(["tokenize", *flags, "--max_tokens", tokens, "--output_dir", str(output)]) == 0
        message = re.search(r"the mixture has [\d,]+ of 100,000 tokens: it ends with", capsys.readouterr().err)
        assert (message is not None) == is_logged


def test_streams_mixed_in_other_shares_are_another_text(hub, tmp_path):
    """Neither the cached token stream of the first mixture is used for the second, nor a run resumed on it."""
    for name, texts in (("one", WORDS[:40]), ("other", WORDS[40:80])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "rows.parquet")
        hub.put(f"user/{name}", {"train.parquet": (tmp_path / "rows.parquet").read_bytes()}, repo_type="datasets")
    tokens = []
    for number, shares in enumerate(((1, 1), (9, 1), (1, 1))):
        data, output = "user/one:{},user/other:{}".format(*shares), tmp_path / f"prepared-{number}"
        argv = ["tokenize", "--data", data, "--streaming", "--max_tokens", "400", "--tokenizer", "bytes"]
        argv += ["--validation_fraction", "0", "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(output)]
        assert main(argv) == 0
        tokens.append((output / "train" / "tokens.bin").read_bytes())
    assert tokens[0] == tokens[2] != tokens[1]


def test_max_tokens_that_would_change_the_shares_of_a_mixture_is_an_error(tmp_path, capsys):
    """The sources follow one another, so the first tokens would be those of the first source."""
    data = write_files(tmp_path, {"one.txt": "one " * 500, "other.txt": "other " * 500})
    argv = ["tokenize", "--data", f"{data}/one.txt:0.5,{data}/other.txt:0.5", "--tokenizer", "bytes"]
    argv += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "prepared"), "--max_tokens"]
    assert main([*argv, "1000"]) == 2
    assert "max_tokens 1,000 would use 999 of the 3,600 characters of this mixture" in capsys.readouterr().err
    assert not (tmp_path / "prepared").exists()
    assert main([*argv, "4000"]) == 0


@pytest.mark.parametrize("source", ["rows", "rows/*.jsonl"])
def test_evaluate_reads_the_split_of_a_mixture_that_training_read(source, recipe_file, tmp_path, caplog):
    """Otherwise it would score the validation file, which was trained on."""
    rows = {
        name: "".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in WORDS)
        for name in ("train", "validation")
    }
    write_files(tmp_path / "rows", {f"{name}.jsonl": lines for name, lines in rows.items()})
    write_files(tmp_path, {"words.txt": " ".join(WORDS)})
    data = f"{tmp_path}/{source}:0.5,{tmp_path}/words.txt:0.5"
    argv = ["train", "--recipe", str(recipe_file), "--data", data, "--data_split", "validation", "--max_steps", "2"]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    without_split = [message for message in caplog.messages if "--data_split validation has no effect on" in message]
    assert len(without_split) == 1 and "words.txt" in without_split[0]
    published = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"]
    assert minigpt_hf.evaluate(tmp_path / "run" / "model", data=data, split="validation").to_dict() == published
