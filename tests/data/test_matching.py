"""Verbatim matches in a token stream, compared with an exhaustive search and with cases computed by hand."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt_hf.data.matching import MIN_LENGTH, find_matches
from minigpt_hf.data.stream import ArrayFile


def longest_match(stream: list[int], sequence: list[int], start: int) -> int:
    """Compare each position of the stream token by token."""
    best = 0
    for place in range(len(stream)):
        length = 0
        while (
            start + length < len(sequence)
            and place + length < len(stream)
            and sequence[start + length] == stream[place + length] >= 0
        ):
            length += 1
        best = max(best, length)
    return best


def check(stream: list[int], sequences: list[list[int]], block: int) -> None:
    """Compare lengths, places, longest matches, maximal matches and covered tokens with those of `longest_match`."""
    found = find_matches(np.array(stream, dtype=np.uint16), [np.array(ids) for ids in sequences], block=block)
    for sequence, match in zip(sequences, found, strict=True):
        expected = [longest_match(stream, sequence, start) for start in range(len(sequence))]
        assert match.longest == max(expected, default=0)
        for start, (length, place) in enumerate(zip(match.lengths.tolist(), match.places.tolist(), strict=True)):
            assert length == expected[start] if expected[start] >= MIN_LENGTH else length <= expected[start]
            assert length == 0 or stream[place : place + length] == sequence[start : start + length]
        for threshold in (8, 16, 32):
            covered = [
                any(expected[i] >= max(threshold, j - i + 1) for i in range(j + 1)) for j in range(len(sequence))
            ]
            assert match.covered(threshold).tolist() == covered
        maximal = [
            (start, length)
            for start, length in enumerate(expected)
            if length >= MIN_LENGTH and (start == 0 or start + length > start - 1 + expected[start - 1])
        ]
        assert [(start, length) for start, length, _ in match.maximal()] == maximal


def tokens(low: int, high: int, most: int):
    return st.lists(st.integers(low, high), max_size=most)


@settings(max_examples=300, deadline=None)
@given(stream=tokens(0, 3, 120), sequences=st.lists(tokens(-1, 3, 40), max_size=4), block=st.integers(1, 50))
@example(stream=[], sequences=[[1]], block=1)
@example(stream=[1], sequences=[], block=1)
@example(stream=[1], sequences=[[], [-1]], block=1)
def test_matches_are_those_of_a_search_of_all_places(stream, sequences, block):
    check(stream, sequences, block)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), block=st.integers(1, 60))
def test_long_passages_of_the_stream_are_found(data, block):
    """Passages of a random stream, some with a changed token, next to each other."""
    stream = data.draw(st.lists(st.integers(0, 9), min_size=60, max_size=200))
    sequences = []
    for _ in range(data.draw(st.integers(1, 3))):
        sequence = []
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(stream) - 1))
            passage = stream[start : start + data.draw(st.integers(1, 60))]
            if data.draw(st.booleans()):
                passage[data.draw(st.integers(0, len(passage) - 1))] = 9
            sequence += passage
        sequences.append(sequence)
    check(stream, sequences, block)


@settings(max_examples=100, deadline=None)
@given(period=st.integers(1, 4), length=st.integers(30, 90), cut=st.integers(0, 60), block=st.integers(1, 40))
def test_repeated_text_is_matched_at_its_full_length(period, length, cut, block):
    stream = [i % period for i in range(length)]
    check(stream, [[i % period for i in range(100)], [*stream[:cut], 7, *stream[cut:]]], block)


@pytest.mark.parametrize("block", [1, 7, 16, 1000])
def test_matches_at_both_ends_of_the_stream_and_across_blocks(block):
    stream = np.arange(100)
    sequences = [
        np.arange(12),  # at the start
        np.arange(88, 100),  # at the end
        np.arange(90, 105),  # continues after the end
        np.concatenate([[500], np.arange(3), [500]]),  # short
        np.arange(100),  # everything
    ]
    found = find_matches(stream, sequences, block=block)
    assert [match.longest for match in found] == [12, 12, 10, 3, 100]
    assert [int(match.places[match.lengths.argmax()]) for match in found] == [0, 88, 90, 0, 0]


def test_a_sequence_without_bos_tokens_matches_within_documents():
    bos, one, two = 0, list(range(1, 11)), list(range(11, 21))
    stream = np.array([bos, *one, bos, *two])
    across, with_bos, separated = find_matches(
        stream, [np.array(one + two), np.array([*one, bos, *two]), np.array([*one, -1, *two])]
    )
    assert across.maximal() == [(0, 10, 1), (10, 10, 12)]
    assert with_bos.maximal() == [(0, 21, 1)]
    assert separated.maximal() == [(0, 10, 1), (11, 10, 12)]


def test_the_longest_match_is_exact_below_the_length_from_which_each_is_known():
    stream = np.array([1, 2, 3, 9, 4, 5, 6, 7, 8, 9])
    (match,) = find_matches(stream, [np.array([1, 2, 3, 4, 5, 6, 7, 9])])
    assert match.longest == 4
    assert (match.lengths.argmax(), match.places[match.lengths.argmax()]) == (3, 4)


@pytest.mark.slow
def test_equal_hashes_of_different_windows_are_no_match():
    """Windows of 1,024 tokens of the Thue-Morse sequence and of its complement have equal polynomial hashes modulo 2^64."""
    thue_morse = np.array([bin(i).count("1") % 2 for i in range(1024)]) + 1
    complement = 3 - thue_morse
    for stream, expected in (
        (np.concatenate([thue_morse[:1023], [0], complement]), 1023),
        (np.concatenate([thue_morse[:1023], [0], complement, [0], thue_morse]), 1024),
    ):
        (match,) = find_matches(stream, [thue_morse])
        assert match.longest == expected
        place = int(match.places[0])
        assert np.array_equal(stream[place : place + expected], thue_morse[:expected])


def test_ids_of_a_large_vocabulary_are_distinguished():
    stream = np.arange(2**32 - 50, 2**32, dtype=np.uint32)
    for shift, expected in ((0, 20), (2**31, 0)):
        (match,) = find_matches(stream, [np.arange(2**32 - 40, 2**32 - 20, dtype=np.int64) - shift])
        assert match.longest == expected


def test_memory_does_not_depend_on_the_length_of_the_stream(tmp_path):
    sequences = [np.arange(100) % 7, np.arange(300)]
    peaks = []
    for tokens in (10**6, 10**7):
        np.resize(np.arange(1000, dtype="<u2"), tokens).tofile(tmp_path / "tokens.bin")
        stream = ArrayFile(tmp_path / "tokens.bin", "<u2")
        tracemalloc.start()
        assert [match.longest for match in find_matches(stream, sequences)] == [7, 300]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.01 * peaks[0] < 20e6


def test_progress_counts_each_token_once():
    counts = []
    find_matches(np.arange(25), [np.arange(30)], counts.append, block=10)
    assert counts == [10, 10, 5]
