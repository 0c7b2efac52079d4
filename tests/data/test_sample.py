"""A sample of the validation split covers all documents in proportion, in excerpts of complete windows."""

import itertools
import json
import random
from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_hf.cli import main
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.documents import INDEX_DTYPE, MIN_EXCERPTS, StreamedDocuments, document_batches

WINDOW = 8


def corpus_of(lengths: list[int], folder, seed: int = 0):
    """A table whose rows are random letters of the given lengths, distinct in practice."""
    letters = random.Random(seed)
    texts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for length in lengths]
    file = folder / f"{len(lengths)}-{seed}-{sum(lengths)}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return load_corpus(str(file), validation_fraction=0, cache_dir=folder).train, texts


def excerpts_by_document(sample, texts: list[str]) -> dict[int, list[tuple[int, int]]]:
    """Return {document: [(begin, end) of each excerpt]}."""
    found: dict[int, list[tuple[int, int]]] = {}
    for excerpt in sample:
        (number,) = [number for number, text in enumerate(texts) if excerpt in text]
        begin = texts[number].index(excerpt)
        found.setdefault(number, []).append((begin, begin + len(excerpt)))
    return found


def test_every_document_contributes_the_same_share(tmp_path):
    lengths = [4000, 400, 40, 1000, 200, 100]
    documents, texts = corpus_of(lengths, tmp_path)
    sample = documents.sample(1435, WINDOW)  # a quarter
    found = excerpts_by_document(sample, texts)
    taken = [sum(end - begin for begin, end in found[number]) for number in range(len(texts))]
    assert all(abs(size - length / 4) <= WINDOW for size, length in zip(taken, lengths, strict=True))
    assert abs(sample.characters - 1435) <= WINDOW
    assert sample.number_of_documents == documents.number_of_documents == 6


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
def test_batches_are_as_large_as_possible(block, monkeypatch):
    """Compared with adding one document at a time, whatever the number of documents that are inspected at once."""
    monkeypatch.setattr("minigpt_hf.data.documents.PART_CHARACTERS", 100)
    monkeypatch.setattr("minigpt_hf.data.documents.BLOCK", block)
    lengths = random.Random(block)
    for number in (0, 1, 7, 60):
        index = np.zeros(number, INDEX_DTYPE)
        index["row"] = range(number)
        index["begin"] = 3
        index["end"] = [3 + lengths.choice([1, 10, 40, 50, 99, 100, 101, 500]) for _ in range(number)]
        expected: list[list[int]] = []
        for row, length in zip(range(number), index["end"] - index["begin"], strict=True):
            if expected and sum(index["end"][expected[-1]] - 3) + length <= 100:
                expected[-1].append(row)
            else:
                expected.append([row])
        assert [batch["row"].tolist() for batch in document_batches(index)] == expected


def test_a_long_document_is_sampled_from_all_its_sections(tmp_path):
    documents, texts = corpus_of([10_000], tmp_path)
    ranges = sorted(excerpts_by_document(documents.sample(1000, WINDOW), texts)[0])
    assert len(ranges) >= MIN_EXCERPTS
    for section in range(10):  # an excerpt starts in each tenth of the document
        assert any(section * 1000 <= begin < (section + 1) * 1000 for begin, _ in ranges)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ranges))  # no overlap


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    share=st.floats(0.02, 0.99),
    window=st.integers(1, 40),
)
def test_a_sample_has_the_requested_size_and_consists_of_complete_windows(tmp_path_factory, lengths, share, window):
    folder = tmp_path_factory.getbasetemp() / "samples"
    folder.mkdir(exist_ok=True)
    documents, texts = corpus_of(lengths, folder)
    characters = max(1, int(documents.characters * share))
    sample = documents.sample(characters, window)
    assert sum(map(len, sample)) == sample.characters
    assert abs(sample.characters - characters) <= window * (1 + len(lengths))  # at most one rounding error per document
    assert all(len(excerpt) % window == 0 or excerpt in texts for excerpt in sample)
    assert list(documents.sample(characters, window)) == list(sample)
    if characters >= sum(max(window, length) for length in lengths):
        assert sample.number_of_documents == len(lengths)


def test_short_documents_are_sampled_entirely_and_in_proportion(tmp_path):
    documents, texts = corpus_of([20] * 100, tmp_path)
    sample = documents.sample(500, window=64)  # a document is shorter than a window
    assert list(sample) == [text for text in texts if text in set(sample)]
    assert sample.characters == 500


def test_a_text_not_longer_than_the_limit_is_scored_completely(tmp_path):
    documents, texts = corpus_of([30, 20], tmp_path)
    assert list(documents.sample(50, WINDOW)) == texts
    assert list(documents.sample(10**9, WINDOW)) == texts


@pytest.mark.parametrize("lengths", [[1500], [40, 900, 30]])
def test_the_smallest_sample_is_one_window(lengths, tmp_path):
    documents, texts = corpus_of(lengths, tmp_path)
    (excerpt,) = documents.sample(100, window=800)
    assert len(excerpt) == 800
    assert excerpt in max(texts, key=len)


def test_a_streamed_text_is_sampled_from_many_documents():
    rows = datasets.Dataset.from_dict({"text": ["x" * 1000, "y" * 3, "z" * 1000] * 20}).to_iterable_dataset()
    streamed = StreamedDocuments(rows, "name")
    sample = list(streamed.sample(200, WINDOW))
    assert sum(map(len, sample)) == 200
    assert max(map(len, sample)) == 8  # a twentieth of the limit, in complete windows
    assert streamed.sample(200, WINDOW).fingerprint != streamed.head(200).fingerprint
    assert replace(streamed, max_characters=200).fingerprint == streamed.head(200).fingerprint


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory, text):
    """300 documents of very different lengths."""
    folder = tmp_path_factory.mktemp("many")
    lengths = random.Random(1)
    for number in range(300):
        begin = lengths.randrange(len(text) - 5000)
        (folder / f"{number:03}.txt").write_text(text[begin : begin + lengths.choice([400, 1000, 4000])])
    return folder


def test_the_published_score_covers_all_held_out_documents_and_evaluate_repeats_it(
    many_documents, recipe_file, tmp_path, capsys
):
    run = tmp_path / "run"
    argv = ["train", "--recipe", str(recipe_file), "--data", str(many_documents), "--output_dir", str(run)]
    assert main([*argv, "--max_steps", "4", "--validation_characters", "8000"]) == 0
    captured = capsys.readouterr()
    metadata = json.loads((run / "model" / "minigpt.json").read_text())
    validation, results = metadata["data"]["validation"], metadata["results"]
    assert validation["of_documents"] == 30
    assert validation["documents"] == 30
    assert abs(validation["characters"] - 8000) < 100
    assert validation["of_characters"] > 20_000
    stated = f"excerpts from {validation['documents']} of 30 documents"
    assert stated in captured.out  # the plan
    assert stated in (run / "model" / "README.md").read_text()
    assert f"a validation score on only {results['tokens']:,} tokens" in captured.err

    assert main(["evaluate", str(run / "model"), "--data", str(many_documents), "--split", "validation", "--json"]) == 0
    captured = capsys.readouterr()
    score = json.loads(captured.out)
    assert {name: score[name] for name in ("tokens", "bytes", "documents", "excerpts")} == {
        name: results[name] for name in ("tokens", "bytes", "documents", "excerpts")
    }
    assert results["documents"] == 30
    assert results["excerpts"] == validation["excerpts"] > 30
    assert {name: score[name] for name in results} == results  # to the last digit
    assert stated in captured.err


def test_excerpts_of_one_document_count_as_one_document(run_folder, text_file, capsys):
    flags = ["--data", str(text_file), "--max_characters", "4000"]
    assert main(["evaluate", str(run_folder / "model"), *flags]) == 0
    captured = capsys.readouterr()
    assert "excerpts from 1 of 1 documents" in captured.err
    assert "1 documents (25 excerpts), without BOS tokens" in captured.out
    assert main(["evaluate", str(run_folder / "model"), "--data", str(text_file)]) == 0
    assert "1 documents, without BOS tokens" in capsys.readouterr().out


def test_a_sampled_score_is_close_to_that_of_the_complete_text(many_documents, recipe_file, tmp_path, capsys):
    """A score of the first documents only could differ much more."""
    run = tmp_path / "run"
    argv = ["train", "--recipe", str(recipe_file), "--data", str(many_documents), "--output_dir", str(run)]
    assert main([*argv, "--max_steps", "4", "--sample_tokens", "0", "--save_total_limit", "1"]) == 0
    scores = {}
    for characters in (10_000, 10**9):
        command = ["evaluate", str(run / "model"), "--data", str(many_documents), "--split", "validation", "--json"]
        capsys.readouterr()
        assert main([*command, "--max_characters", str(characters)]) == 0
        scores[characters] = json.loads(capsys.readouterr().out)
    assert scores[10_000]["bytes"] < scores[10**9]["bytes"] / 2
    assert scores[10_000]["bits_per_byte"] == pytest.approx(scores[10**9]["bits_per_byte"], rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_documents_are_read_in_batches_of_bounded_length(seed):
    """Each document once and in order; a batch has as many documents as fit, or a single longer one."""
    lengths = random.Random(seed).choices([1, 300_000, 500_000, 999_999, 1_000_000, 3_000_000], k=40)
    index = np.zeros(len(lengths), dtype=INDEX_DTYPE)
    index["row"], index["end"] = np.arange(len(lengths)), lengths
    batches = [batch["end"].tolist() for batch in document_batches(index)]
    assert [length for batch in batches for length in batch] == lengths
    assert all(sum(batch) <= 1_000_000 or len(batch) == 1 for batch in batches)
    assert all(sum(batch) + following[0] > 1_000_000 for batch, following in itertools.pairwise(batches))
