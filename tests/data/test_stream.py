"""A token stream contains every document in order, independent of the number of threads that encode it."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt_hf import evaluate, train
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.stream import TokenStream, build_stream
from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer
from tests.data.test_corpus import write_files

TEXTS = ["first\n", "<|endoftext|> is not a token here", "日本\n\nthird", "x"]


@pytest.fixture
def corpus(tmp_path):
    return load_corpus(write_files(tmp_path / "text", {f"{i}.txt": t for i, t in enumerate(TEXTS)}), 0)


def test_a_stream_is_every_document_in_order_each_preceded_by_bos(corpus, tmp_path):
    tokenizer = byte_tokenizer()
    stream = build_stream(corpus.train, tokenizer, tmp_path / "cache")
    expected = [i for text in TEXTS for i in [0, *(byte + 2 for byte in text.encode())]]
    assert stream.tokens[:].tolist() == expected
    assert stream.tokens.dtype == np.uint16
    assert [tokenizer.decode(ids) for ids in stream.iterate_documents()] == TEXTS
    assert stream.tokens[:][stream.documents[:]].tolist() == [0] * len(TEXTS)
    assert stream.characters == sum(map(len, TEXTS))
    assert stream.bytes == sum(len(text.encode()) for text in TEXTS)


def test_several_threads_write_the_same_stream_as_one(text, tmp_path, monkeypatch):
    folder = write_files(tmp_path / "text", {f"{i:02}.py": text[i * 100 :] for i in range(30)})
    documents = load_corpus(folder, 0).train
    assert documents.characters > 2_000_000  # enough for several threads
    tokenizer = byte_level_bpe([text], 400)
    alone = build_stream(documents, tokenizer, tmp_path / "alone", num_proc=1)
    many = build_stream(documents, tokenizer, tmp_path / "many", num_proc=2)
    assert (alone.folder / "tokens.bin").read_bytes() == (many.folder / "tokens.bin").read_bytes()
    assert (alone.folder / "stream.json").read_bytes() == (many.folder / "stream.json").read_bytes()


def test_a_stream_is_cached_by_content(corpus, tmp_path):
    first = build_stream(corpus.train, byte_tokenizer(), tmp_path / "cache")
    moved = load_corpus(write_files(tmp_path / "moved", {f"{i}.txt": t for i, t in enumerate(TEXTS)}), 0)
    encoded_again = lambda characters: pytest.fail("encoded again")  # noqa: E731
    again = build_stream(moved.train, byte_tokenizer(), tmp_path / "cache", progress=encoded_again)
    assert again.folder == first.folder


def tokenizer_of_size(size: int, bos: str | None = None) -> PreTrainedTokenizerFast:
    """A vocabulary of `</s>` (EOS), `<s>`, and words `w2`, `w3`, … up to id `size` - 1."""
    vocabulary = {"</s>": 0, "<s>": 1, **{f"w{number}": number for number in range(2, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>")


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1])
def test_the_largest_id_is_stored_correctly_at_the_limit_of_two_bytes(size, tmp_path):
    (tmp_path / "text.txt").write_text(f"w{size - 1} w5")
    texts = load_corpus(str(tmp_path / "text.txt"), 0).train
    stream = build_stream(texts, tokenizer_of_size(size), tmp_path / "cache")
    assert stream.tokens[:].tolist() == [0, size - 1, 5]
    assert stream.tokens.dtype == (np.uint16 if size <= 2**16 else np.uint32)
    assert (stream.folder / "tokens.bin").stat().st_size == 3 * (2 if size <= 2**16 else 4)


def test_documents_are_preceded_by_bos_where_it_differs_from_eos(tmp_path):
    """As in `evaluate` and `generate`; a tokenizer without BOS uses EOS."""
    folder = write_files(tmp_path / "text", {"a.txt": "w5 w6", "b.txt": "w7"})
    texts = load_corpus(folder, 0).train
    both, eos = (build_stream(texts, tokenizer_of_size(9, bos), tmp_path / "cache") for bos in ("<s>", None))
    assert (both.tokens[:].tolist(), both.bos_token_id) == ([1, 5, 6, 1, 7], 1)
    assert (eos.tokens[:].tolist(), eos.bos_token_id) == ([0, 5, 6, 0, 7], 0)
    assert both.folder != eos.folder


def test_validation_while_training_equals_evaluation_where_bos_differs_from_eos(tmp_path, recipe_file):
    """The published loss equals that of `minigpt evaluate`, with the same BOS token."""
    words = " ".join(f"w{2 + number * number % 37}" for number in range(3000))
    (tmp_path / "text.txt").write_text(words)
    tokenizer_of_size(40, "<s>").save_pretrained(tmp_path / "tokenizer")
    folder = train(
        str(tmp_path / "text.txt"),
        str(recipe_file),
        tmp_path / "run",
        tokenizer=str(tmp_path / "tokenizer"),
        max_steps=10,
        eval_steps=10,
        save_steps=10,
        learning_rate=0.01,
    )
    scored = evaluate(folder, str(tmp_path / "text.txt"), split="validation")
    assert scored.loss == pytest.approx(folder.results["loss"], rel=1e-6)
    model, tokenizer = folder.load()
    held_out = load_corpus(str(tmp_path / "text.txt")).validation
    (text,) = held_out.head(20_000)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    block_size = scored.block_size
    sequence, nats = [1, *ids], 0.0
    for begin in range(0, len(ids), block_size):
        window = torch.tensor(sequence[begin : begin + block_size + 1])
        logits = model(window[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert scored.loss == pytest.approx(nats / len(ids), rel=1e-5)
    assert {0, 1} <= set(model.generation_config.eos_token_id)  # either token ends generation


def test_streams_of_different_texts_or_tokenizers_differ(corpus, tmp_path):
    folders = {
        build_stream(documents, tokenizer, tmp_path / "cache").folder
        for documents in (corpus.train, corpus.train.head(10))
        for tokenizer in (byte_tokenizer(), byte_level_bpe(TEXTS, 260))
    }
    assert len(folders) == 4


def test_no_partial_stream_remains_after_an_error(corpus, tmp_path):
    def fail(characters):
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        build_stream(corpus.train, byte_tokenizer(), tmp_path / "cache", progress=fail)
    assert list((tmp_path / "cache" / "streams").iterdir()) == []


def test_an_opened_stream_equals_the_built_one(corpus, tmp_path):
    built = build_stream(corpus.train, byte_tokenizer(), tmp_path / "cache")
    opened = TokenStream.open(built.folder)
    assert opened.tokens[:].tolist() == built.tokens[:].tolist()
    assert (opened.fingerprint, opened.bytes, opened.bos_token_id) == (built.fingerprint, built.bytes, 0)
