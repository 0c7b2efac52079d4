"""A stream holds every document in order, wherever and by however many processes it was made."""

import numpy as np
import pytest

from minigpt_hf.data import stream as module
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.stream import TokenStream, build_stream
from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer
from tests.data.test_corpus import write_files

TEXTS = ["first\n", "<|endoftext|> is not a token here", "日本\n\nthird", "x"]


@pytest.fixture
def corpus(tmp_path):
    return load_corpus(write_files(tmp_path / "text", {f"{i}.txt": t for i, t in enumerate(TEXTS)}), 0)


def test_a_stream_is_every_document_in_order_each_opened_by_end_of_text(corpus, tmp_path):
    tokenizer = byte_tokenizer()
    stream = build_stream(corpus.train, tokenizer, tmp_path / "cache")
    expected = [i for text in TEXTS for i in [0, *(byte + 2 for byte in text.encode())]]
    assert stream.tokens.tolist() == expected
    assert stream.tokens.dtype == np.uint16
    assert [tokenizer.decode(ids) for ids in stream.texts()] == TEXTS
    assert stream.tokens[stream.documents].tolist() == [0] * len(TEXTS)
    assert stream.characters == sum(map(len, TEXTS))
    assert stream.bytes == sum(len(text.encode()) for text in TEXTS)


def test_processes_make_the_same_stream_as_one(text, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "text", {f"{i:02}.py": text[i * 100 :] for i in range(30)})
    documents = load_corpus(folder, 0).train
    assert documents.characters > 2_000_000  # enough for a pool to be started
    tokenizer = byte_level_bpe([text], 400)
    alone = build_stream(documents, tokenizer, tmp_path / "alone", num_proc=1)
    many = build_stream(documents, tokenizer, tmp_path / "many", num_proc=2)
    assert (alone.folder / "tokens.bin").read_bytes() == (many.folder / "tokens.bin").read_bytes()
    assert (alone.folder / "stream.json").read_bytes() == (many.folder / "stream.json").read_bytes()


def test_a_stream_is_found_again_by_content(corpus, tmp_path, monkeypatch):
    first = build_stream(corpus.train, byte_tokenizer(), tmp_path / "cache")
    monkeypatch.setattr(module, "_write_stream", lambda *args: pytest.fail("encoded again"))
    moved = load_corpus(write_files(tmp_path / "moved", {f"{i}.txt": t for i, t in enumerate(TEXTS)}), 0)
    assert build_stream(moved.train, byte_tokenizer(), tmp_path / "cache").folder == first.folder


def test_other_text_or_another_tokenizer_makes_another_stream(corpus, tmp_path):
    folders = {
        build_stream(documents, tokenizer, tmp_path / "cache").folder
        for documents in (corpus.train, corpus.train.head(10))
        for tokenizer in (byte_tokenizer(), byte_level_bpe(TEXTS, 260))
    }
    assert len(folders) == 4


def test_a_stream_is_whole_or_absent(corpus, tmp_path, monkeypatch):
    def fail(job):
        raise ValueError("no")

    monkeypatch.setattr(module, "_encode_piece", fail)
    with pytest.raises(ValueError, match="no"):
        build_stream(corpus.train, byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache" / "streams").iterdir()) == []


def test_opening_a_stream_gives_what_was_built(corpus, tmp_path):
    built = build_stream(corpus.train, byte_tokenizer(), tmp_path / "cache")
    opened = TokenStream.open(built.folder)
    assert opened.tokens.tolist() == built.tokens.tolist()
    assert (opened.fingerprint, opened.bytes, opened.end_of_text) == (built.fingerprint, built.bytes, 0)
