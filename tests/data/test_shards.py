"""Shards: a text that is tokenized in shares and merged equals one that is tokenized by one process."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.array_file import ArrayFile
from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.data.prepared import PreparedText, find_prepared
from minigpt_hf.data.sharded import Part, ShardedArray


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
    flags = ["--recipe", recipe_file, "--tokenizer", corpus / "whole/tokenizer", "--max_steps", 12, "--save_steps", 6]
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


def test_a_complete_shard_is_not_written_again(corpus, merged, capsys):
    file = merged / "shard-00001-of-00004" / "train" / "tokens.bin"
    before = file.stat()
    capsys.readouterr()
    write_shards(merged, corpus / "text", merged / "tokenizer", 4, "--validation_fraction", "0", numbers=[1])
    assert "already complete" in capsys.readouterr().out
    assert file.stat() == before
    assert run("tokenize", "--merge", merged) == 0
    assert "already merged" in capsys.readouterr().out


def test_every_document_is_in_one_split_and_the_published_model_repeats_the_split(corpus, recipe_file, tmp_path):
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
    assert run(*argv) == 0


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


def test_a_streamed_dataset_and_a_saved_one_are_shared(hub, text, tmp_path):
    pass
