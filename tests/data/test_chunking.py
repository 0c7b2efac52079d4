"""Encoding text in chunks of bounded size gives the same tokens, whatever the length of its lines and words."""

import logging
import random
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_hf.data import chunking, encoding
from minigpt_hf.data import tokenizer as module
from minigpt_hf.data.chunking import LETTER, PUNCTUATION, split_into_chunks
from minigpt_hf.data.encoding import Encoder
from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer, character_tokenizer
from tests.conftest import ROOT

# Characters of each class of the pre-tokenizer pattern, and strings at the boundaries of classes.
EDGE_CASES = [
    *"aZzſK'’\"=;.-_(){}0179²Ⅷ٣½",
    *" \t\n\r\v\f\0\x1c\x1f\x85\xa0\xad\u2028\u200b\u200d\u3000\ufeff\u0301\u0300éßñяא中々〇、。！ア",
    *[
        "'s",
        "'S",
        "'re",
        "'LL",
        "'ſ",
        "''",
        "\r\n",
        "\n\n",
        "  ",
        "   ",
        "\n  ",
        "  \n",
        " '",
        "e\u0301",
        "👍🏽",
        "🇩🇪",
        "𝐀",
        "\U0001e030",
        "\U000323af",
    ],
    *["<|endoftext|>", "don't", "x=1;", "AAAAAAAA", "========"],
]


@pytest.fixture(scope="module")
def bpe(text):
    """Trained on code, long runs, and edge cases."""
    source = random.Random(1)
    edge_cases = "".join(source.choices(EDGE_CASES, k=20_000))
    return byte_level_bpe([text[:30_000], edge_cases, "A" * 1000, "=" * 999, "ACGT" * 300, "中文" * 300], 900)


@pytest.fixture(scope="module")
def encoder(bpe):
    return Encoder(bpe.backend_tokenizer.to_str())


@pytest.fixture
def small(monkeypatch):
    """Set the size of chunks and windows to a few characters, so that a short text has many."""

    def sizes(chunk: int, long: int = 10**9, overlap: int = 8) -> None:
        monkeypatch.setattr(chunking, "CHUNK_CHARACTERS", chunk)
        monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", chunk)
        monkeypatch.setattr(encoding, "LONG_WORD", long)
        monkeypatch.setattr(encoding, "OVERLAP", overlap)
        monkeypatch.setattr(module, "LONG_WORD", long)

    return sizes


def in_parts(text: str, bounds: list[int]) -> list[tuple[bool, str]]:
    bounds = [0, *sorted(min(bound, len(text)) for bound in bounds), len(text)]
    return [(number == 0, text[a:b]) for number, (a, b) in enumerate(pairwise(bounds))]


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("aaaa bbbb", ["aaaa bbbb"]),
        ("aaaa bbbb ", ["aaaa bbbb "]),  # exactly the size of a chunk
        ("aaaa bbbb cccc\ndddd eeee", ["aaaa bbbb cccc\n", "dddd eeee"]),  # at a line end rather than before a space
        ("aaaa bbbb cccc ddd\neeee", ["aaaa bbbb cccc ddd\n", "eeee"]),  # the last line end before twice the size
        ("aaaa bbbb cccc dddd\neeee", ["aaaa bbbb cccc", " dddd\neeee"]),  # too far
        ("aaaa bbbb cccc\n\n\ndddd", ["aaaa bbbb cccc\n\n\n", "dddd"]),  # not before a blank line
        ("a" * 30 + " b", ["a" * 30, " b"]),  # no boundary before
        ("a" * 30, ["a" * 30]),
        ("aaaa\nbbbb\ncccc\n" * 3, ["aaaa\nbbbb\ncccc\n"] * 3),
    ],
)
def test_chunks_end_at_the_first_line_end_before_twice_their_size_or_at_the_next_boundary(text, chunks, small):
    small(10)
    documents = [(True, ""), (True, text), (True, ""), (True, "b" * 4), (False, "b" * 6), (True, "")]
    first = [(number == 0, chunk) for number, chunk in enumerate(chunks)]
    assert list(split_into_chunks(documents)) == [*first, (True, "b" * 10)]


def check_chunks(encoder, bpe, text: str, bounds: list[int]) -> int:
    chunks = [chunk for _, chunk in split_into_chunks(in_parts(text, bounds))]
    assert "".join(chunks) == text
    ids = [i for chunk in chunks for i in encoder(chunk)]
    assert ids == bpe(text, split_special_tokens=True).input_ids, repr(text)
    assert chunks == [chunk for _, chunk in split_into_chunks([(True, text)])]  # independent of the parts
    return len(chunks)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(EDGE_CASES), max_size=60).map("".join), size=st.integers(1, 9), data=st.data())
def test_chunks_of_edge_cases_give_the_tokens_of_the_complete_text(encoder, bpe, text, size, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_CHARACTERS", size)
        check_chunks(encoder, bpe, text, data.draw(st.lists(st.integers(0, 60), max_size=4)))


@pytest.mark.parametrize("alphabet", ["edge cases", "any character"])
def test_chunks_of_thousands_of_random_texts_give_the_tokens_of_the_complete_text(alphabet, encoder, bpe, small):
    small(2)
    source, chunks = random.Random(0), 0
    for _ in range(2000):
        if alphabet == "edge cases":
            text = "".join(source.choices(EDGE_CASES, k=source.randint(1, 30)))
        else:
            others = [chr(number) for number in source.choices(range(0x30000), k=20) if not 0xD800 <= number < 0xE000]
            text = "".join(source.choices([*others, *others, *EDGE_CASES], k=40))
        chunks += check_chunks(encoder, bpe, text, [source.randint(0, 40) for _ in range(2)])
    assert chunks > 2 * 2000


def test_character_classes_agree_with_the_pre_tokenizer():
    """Every character of the classes, compared with the regular expressions of `tokenizers`."""
    import re

    from tokenizers import Regex, pre_tokenizers

    def matched(pattern: str, characters: str) -> set[str]:
        split = pre_tokenizers.Split(Regex(pattern), behavior="removed")
        return set(characters) - set("".join(word for word, _ in split.pre_tokenize_str(characters)))

    everything = "".join(chr(number) for number in range(0x32000) if not 0xD800 <= number < 0xE000)
    letters = "".join(re.findall(f"[{LETTER}]", everything))
    punctuation = "".join(re.findall(f"[{PUNCTUATION}]", everything))
    assert matched(r"\p{L}", letters) == set(letters)
    assert matched(r"[^\s\p{L}\p{N}]", punctuation) == set(punctuation)
    assert matched(r"\p{N}", "0123456789") == set("0123456789")
    no_space = "".join(re.findall(r"[^\s\x1c-\x1f\x85\u180e\u200b]", everything))
    assert matched(r"\S", no_space) == set(no_space)


LONG = {
    "one word": lambda source: "".join(source.choices("ACGT", k=3000)),
    "one letter": lambda source: "A" * 3000,
    "a token longer than a window": lambda source: "A" * source.randint(250, 600) + "=" * source.randint(250, 600),
    "letters of three bytes": lambda source: "".join(source.choices("中文字", k=3000)),
    "punctuation": lambda source: "".join(source.choices("=-=#", k=3000)),
    "smileys": lambda source: "".join(source.choices("😀😁!", k=3000)),
    "white space": lambda source: " " * 1500 + "\t" * 1500,
    "blank lines": lambda source: "\n" * 1500 + " \n" * 700,
    "words between": lambda source: "x = 1; " * 50 + "A" * 900 + " don't " + "=" * 900 + "don't\n\n" + "A" * 999 + "'s",
    "everything": lambda source: "".join(
        character * source.choice([1, 2, 50, 300]) for character in source.choices(EDGE_CASES, k=60)
    ),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("size", [40, 150])
def test_long_words_are_encoded_in_windows_to_the_same_tokens(kind, size, encoder, bpe, small):
    small(size, long=size, overlap=12)
    source = random.Random(2)
    for _ in range(6):
        text = LONG[kind](source)
        assert list(encoder(text)) == bpe(text, split_special_tokens=True).input_ids


@settings(max_examples=150, deadline=None)
@given(word=st.text(alphabet="AB", min_size=30, max_size=400), overlap=st.integers(1, 20))
def test_windows_whose_tokens_differ_are_enlarged(word, overlap):
    """Merges of two letters of many lengths, so that the boundaries of tokens depend on distant letters."""
    tokenizer = byte_level_bpe(["AB" * 64, "A" * 128, "BA" * 30, "AAB" * 40], 300)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CHUNK_CHARACTERS", 20), ("LONG_WORD", 20), ("OVERLAP", overlap)):
            patch.setattr(encoding, name, value)
        assert list(encoder(word)) == tokenizer(word).input_ids


def test_documents_are_not_split_for_a_tokenizer_with_added_tokens_that_are_not_special(bpe):
    """Such a token is matched before the pre-tokenizer runs, even across a chunk boundary."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("tool_call 1;", special=False)])
    encoder = Encoder(backend.to_str())
    text = "a tool_call 1; b\n" * 20_000
    assert [text] == [chunk for _, chunk in encoder.split_into_chunks([(True, text)])]


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), character_tokenizer(["ab"])], ids=["bytes", "characters"])
def test_one_long_line_is_split_for_tokenizers_without_merges(tokenizer, small):
    small(100, long=300)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    text = "ab" * 5000
    chunks = [chunk for _, chunk in encoder.split_into_chunks([(True, text[:7000]), (False, text[7000:])])]
    assert [i for chunk in chunks for i in encoder(chunk)] == tokenizer(text).input_ids
    if tokenizer.convert_ids_to_tokens(2) == "a":
        assert {len(chunk) for chunk in chunks} == {100}


MEASURE = """
import random, resource, string
from minigpt_hf.data.encoding import Encoder
from minigpt_hf.data.tokenizer import byte_level_bpe

source = random.Random(0)
words = ["".join(source.choices(string.ascii_lowercase, k=source.randint(1, 10))) for _ in range(2000)]

def line(between):
    return "".join(word + source.choice(between) for word in source.choices(words, k=320_000))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

lines = {
    "text8": line([" "]),
    "minified": line(["(", ");", "{", "==", "&&", ".", ",", '"']),
    "DNA": "".join(source.choices("ACGT", k=2_000_000)),
}
before = peak()
for text in lines.values():
    encoder = Encoder(byte_level_bpe([text], 300).backend_tokenizer.to_str())
    assert sum(len(encoder(chunk)) for _, chunk in encoder.split_into_chunks([(True, text)])) > 500_000
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_depend_on_the_length_of_a_line():
    """Lines of two million characters: without chunks they take about 400 MB, and training merges of DNA takes hours."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, cwd=ROOT, timeout=300
    )
    assert float(done.stdout) < 120


def test_learning_merges_of_long_words_from_a_sample_is_logged(small, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "minigpt_hf")
    monkeypatch.setattr(module, "MAX_SAMPLES", 10)
    small(1000, long=3000)
    tokenizer = byte_level_bpe(["ACGT" * 25_000, "plain words"], 262)
    assert "words of more than 3,000 characters: merges are learned from" in caplog.text
    assert "of their 100,000 characters" in caplog.text
    assert "ACGT" in tokenizer.get_vocab()


def test_merges_of_a_word_that_is_not_longer_than_the_limit_are_learned_from_all_of_it(small, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    small(1000, long=3000)
    byte_level_bpe(["ACGT" * 750], 262)
    assert "merges are learned" not in caplog.text
    byte_level_bpe(["ACGT" * 750 + "A"], 262)
    assert "merges are learned from 3,001 of their 3,001 characters" in caplog.text
