"""Every encoder gives the ids of `tokenizers`; an encoder that does not is not used."""

import importlib.util
import json
import logging
import random
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from minigpt_hf.data import stream
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.encoding import DIFFICULT, FAST_ENGINES, Encoder, difficult_texts, fastest_encoder
from minigpt_hf.data.stream import build_stream
from minigpt_hf.data.tokenizer import END_OF_TEXT, byte_level_bpe, byte_tokenizer, character_tokenizer
from minigpt_hf.errors import MiniGPTError
from tests.conftest import representative
from tests.data.test_corpus import write_files

ENGINES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}, of the extra `fast`"),
    )
    for name in FAST_ENGINES
]


@pytest.fixture(scope="module")
def trained(text):
    """Tokenizers of several vocabulary sizes."""
    learned = [text[:100_000], "".join(difficult_texts()), "A" * 1000, "ACGT" * 300, "中文" * 300]
    return {size: byte_level_bpe(learned, size).backend_tokenizer for size in (258, 259, 300, 1000, 5000)}


def reference(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]


def ids(arrays: list[np.ndarray]) -> list[list[int]]:
    assert all(array.dtype == np.uint32 for array in arrays)
    return [array.tolist() for array in arrays]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", representative([258, 259, 300, 1000, 5000], 258, 1000))
def test_fast_encoders_give_the_ids_of_tokenizers(engine, size, trained, text):
    source = random.Random(size)
    texts = ["", END_OF_TEXT, text[:50_000], text[:50_000].replace("\n", "\r\n"), text[:50_000].replace("\n", "\r")]
    for _ in range(500):
        texts.append("".join(source.choices(DIFFICULT, k=source.randint(1, 40))))
        texts.append("".join(chr(n) for n in source.choices(range(0x32000), k=20) if not 0xD800 <= n < 0xE000))
    encoder = Encoder(trained[size].to_str(), engine)
    assert ids(encoder.encode_batch(texts)) == reference(trained[size], texts)
    assert ids([encoder(one) for one in texts[:20]]) == reference(trained[size], texts[:20])


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.lists(st.one_of(st.text(), st.sampled_from(DIFFICULT)), max_size=30).map("".join), max_size=5))
def test_fast_encoders_give_the_ids_of_tokenizers_for_any_text(engine, trained, texts):
    assert ids(Encoder(trained[1000].to_str(), engine).encode_batch(texts)) == reference(trained[1000], texts)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_fast_encoders_assign_every_character_to_the_same_class(engine, trained):
    assigned = [*range(0xD800), *range(0xE000, 0x32400), *range(0xE0000, 0xE0200)]  # of Unicode 16, with space above
    everything = [chr(number) for number in assigned]
    texts = [f"x{c}1 {c}{c}'{c}\n{c}\na{c} {c} b" for c in everything]
    encoder = Encoder(trained[1000].to_str(), engine)
    for start in range(0, len(texts), 50_000):
        part = texts[start : start + 50_000]
        assert ids(encoder.encode_batch(part)) == reference(trained[1000], part)


@pytest.mark.parametrize("engine", ENGINES)
def test_several_threads_may_use_one_encoder(engine, trained, text):
    encoder, texts = Encoder(trained[1000].to_str(), engine), [text[i : i + 20_000] for i in range(0, 20_000, 500)]
    expected, found = reference(trained[1000], texts), {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: ids(encoder.encode_batch(texts[n::3]))})) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(3)] == [expected[n::3] for n in range(3)]


@pytest.mark.parametrize("engine", ENGINES)
def test_runs_of_white_space_longer_than_an_encoder_supports_have_the_same_ids(engine, trained):
    """tiktoken raises an error for a million spaces."""
    texts = [" " * 1_000_000 + "x"]
    assert ids(Encoder(trained[300].to_str(), engine)._engine(texts)) == reference(trained[300], texts)


def test_the_fastest_encoder_that_is_installed_is_used_without_a_message(trained, text, caplog):
    pytest.importorskip("fastokens")
    caplog.set_level(logging.INFO, "minigpt_hf")
    encoder = fastest_encoder(trained[1000].to_str(), [text])
    assert encoder._engine.__qualname__.startswith("_fastokens_engine")
    assert not caplog.messages


def test_an_encoder_is_not_used_if_it_gives_other_ids_for_the_beginning_of_the_text(trained, text, caplog, monkeypatch):
    """The other ids are those of one word, which `difficult_texts` does not contain."""
    fastokens = pytest.importorskip("fastokens")
    pytest.importorskip("tiktoken")
    correct = fastokens.Tokenizer

    class Faulty:
        from_json_str = staticmethod(lambda tokenizer_json: Faulty(correct.from_json_str(tokenizer_json)))

        def __init__(self, encoder):
            self.encoder = encoder

        def encode_batch_flat(self, texts, **kwargs):
            return self.encoder.encode_batch_flat([one.replace("argparse", "ARGPARSE") for one in texts], **kwargs)

    monkeypatch.setattr(fastokens, "Tokenizer", Faulty)
    caplog.set_level(logging.INFO, "minigpt_hf")
    tokenizer_json = trained[1000].to_str()
    assert fastest_encoder(tokenizer_json, ["def f(): pass"])._engine.__qualname__.startswith("_fastokens_engine")
    assert caplog.messages == []
    encoder = fastest_encoder(tokenizer_json, ["import argparse"])
    assert encoder._engine.__qualname__.startswith("_tiktoken_engine")
    (line,) = caplog.messages
    assert line.startswith("encoding with tiktoken: fastokens 0.")
    assert "gives other ids" in line
    assert ids([encoder("import argparse")]) == reference(trained[1000], ["import argparse"])


def not_installed(*arguments):
    raise ImportError


def test_without_other_encoders_tokenizers_is_used_with_one_line_in_the_log(trained, text, caplog, monkeypatch):
    for name in FAST_ENGINES:
        monkeypatch.setitem(FAST_ENGINES, name, not_installed)
    caplog.set_level(logging.INFO, "minigpt_hf")
    encoder = fastest_encoder(trained[1000].to_str(), [text])
    assert caplog.messages == [
        "encoding with tokenizers: fastokens is not installed, tiktoken is not installed (the extra `fast` installs the "
        "fastest encoder)"
    ]
    assert ids([encoder(text)]) == reference(trained[1000], [text])


def changed(tokenizer: Tokenizer, **model) -> Tokenizer:
    """A copy of a tokenizer with other options or tokens of its model."""
    state = json.loads(tokenizer.to_str())
    state["model"] |= model
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("kind", ["ignore_merges", "dropout", "an unused token", "an added token", "a normalizer"])
def test_other_tokenizers_are_encoded_by_tokenizers(kind, trained, text):
    """Their options or tokens could be interpreted differently."""
    backend = Tokenizer.from_str(trained[1000].to_str())
    vocabulary = json.loads(backend.to_str())["model"]["vocab"]
    if kind == "ignore_merges":
        backend = changed(backend, ignore_merges=True)
    elif kind == "dropout":
        backend = changed(backend, dropout=0.1)
    elif kind == "an unused token":  # no merges produce it, but an encoder may find it as a word
        backend = changed(backend, vocab={**vocabulary, "ĠnamespaceĠ": 1000})
    elif kind == "an added token":
        backend.add_tokens([AddedToken("def f", special=False)])
    else:
        backend.normalizer = normalizers.NFC()
    encoder = fastest_encoder(backend.to_str(), [text])
    assert encoder._engine.__qualname__.startswith("_tokenizers_engine")


def test_merges_in_another_order_than_their_ids_are_not_given_to_tiktoken(trained):
    pytest.importorskip("tiktoken")
    merges = json.loads(trained[300].to_str())["model"]["merges"]
    with pytest.raises(ValueError, match="not in the order of the ids"):
        Encoder(changed(trained[300], merges=merges[::-1]).to_str(), "tiktoken")


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.lists(st.one_of(st.text(), st.sampled_from(DIFFICULT)), max_size=30).map("".join), max_size=5))
def test_tables_of_characters_and_bytes_give_the_ids_of_tokenizers(texts):
    for tokenizer in (byte_tokenizer(), character_tokenizer([*texts, "a"])):
        backend = tokenizer.backend_tokenizer
        assert ids(Encoder(backend.to_str()).encode_batch(texts)) == reference(backend, texts)


def test_a_table_of_characters_gives_the_unknown_token_if_there_is_one():
    backend = Tokenizer.from_str(character_tokenizer(["abc"]).backend_tokenizer.to_str())
    backend.model = models.WordLevel({"a": 0, "b": 1, "?": 2, "\U0010ffff": 3}, unk_token="?")
    texts = ["abécab", "\U0010ffff\0", ""]
    assert (
        ids(Encoder(backend.to_str()).encode_batch(texts))
        == reference(backend, texts)
        == [[0, 1, 2, 2, 0, 1], [3, 2], []]
    )


@pytest.mark.parametrize("character", ["é", "\0", "\U0010ffff", "\n", "𝐀"])
def test_an_unknown_character_in_any_text_of_a_batch_is_an_error_that_names_it(character):
    encoder = Encoder(character_tokenizer(["abc"]).backend_tokenizer.to_str())
    with pytest.raises(ValueError, match=re.escape(f"does not know: {character!r} (U+{ord(character):04X})")):
        encoder.encode_batch(["abc", f"ab{character}c", "c"])


@pytest.mark.parametrize("engine", [*ENGINES, "tokenizers"])
@pytest.mark.parametrize("newline", representative(["\n", "\r\n", "\r"], "\r\n"))
def test_a_long_text_has_the_same_stream_with_every_encoder(
    engine, newline, trained, text, tmp_path, monkeypatch, caplog
):
    """Documents of all lengths, literal special tokens, empty documents, and a word longer than a chunk."""
    for name in FAST_ENGINES:
        if name != engine:
            monkeypatch.setitem(FAST_ENGINES, name, not_installed)
    monkeypatch.setattr(stream, "SHORT_CHARACTERS", 0)
    monkeypatch.setattr(stream, "COMPARED_CHARACTERS", 1000)
    monkeypatch.setattr(stream, "BATCH_CHARACTERS", 150_000)
    caplog.set_level(logging.INFO, "minigpt_hf")
    source = random.Random(0)
    texts = [text[:60_000].replace("\n", newline), END_OF_TEXT, "", "A" * 310_000 + newline, "x", f"{newline}{newline}"]
    texts += ["".join(source.choices(DIFFICULT, k=source.randint(1, 50))) for _ in range(60)]
    folder = tmp_path / "text"
    folder.mkdir()
    for number, one in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(one.encode())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained[1000], eos_token=END_OF_TEXT)
    built = [
        build_stream(load_corpus(str(folder), 0).train, tokenizer, tmp_path / str(num_proc), num_proc)
        for num_proc in (1, 3)
    ]
    expected = [number for one in reference(trained[1000], [one for one in texts if one]) for number in [0, *one]]
    assert [one.tokens[:].tolist() for one in built] == [expected] * 2
    assert built[0].documents[:].tolist() == np.flatnonzero(np.array(expected) == 0).tolist()
    assert any(f"encoding with {engine}" in line for line in caplog.messages) == (engine != "fastokens")


@pytest.mark.parametrize("kind", ["bpe", "characters", "bytes"])
def test_offsets_are_stored_as_numpy_stores_an_array(kind, trained, tmp_path):
    texts = [f"document {number}" for number in range(40)]
    folder = write_files(tmp_path / "text", {f"{number:02}.txt": one for number, one in enumerate(texts)})
    tokenizer = {"bpe": lambda: byte_level_bpe(texts, 300), "bytes": byte_tokenizer}.get(
        kind, lambda: character_tokenizer(texts)
    )()
    built = build_stream(load_corpus(folder, 0).train, tokenizer, tmp_path / "cache")
    np.save(tmp_path / "expected.npy", np.flatnonzero(built.tokens[:] == 0))
    assert (built.folder / "documents.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


@pytest.mark.parametrize("num_proc", [1, 3])
@pytest.mark.parametrize("kind", ["text", "table", "mixture"])
def test_the_error_for_an_unknown_character_states_its_document_and_position(kind, num_proc, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BATCH_CHARACTERS", 1000)
    texts = ["abc" * 50_000, "cba", "ab" * 1000 + "é" + "abcé", "é"]
    folder = write_files(tmp_path / "text", {f"{number}.txt": one for number, one in enumerate(texts)})
    position = f"{folder}/2.txt, character 2,001"
    if kind == "table":
        folder = str(tmp_path / "rows.jsonl")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
        position = "row 3, character 2,001"
    if kind == "mixture":
        write_files(tmp_path / "more", {"a.txt": "abc" * 60_000})
        folder = f"{tmp_path / 'more'}:0.5,{folder}:0.5"
    documents = load_corpus(folder, 0, cache_dir=tmp_path / "cache").train
    message = f"{position}: the text has a character that the tokenizer does not know: 'é' (U+00E9); remove it"
    with pytest.raises(MiniGPTError, match=f"^{re.escape(message)}"):
        build_stream(documents, character_tokenizer(["abc"]), tmp_path / "cache", num_proc)
