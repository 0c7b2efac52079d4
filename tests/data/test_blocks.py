"""Within an epoch each token is predicted exactly once, except a tail shorter than a sequence."""

import itertools
import pickle
import random
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from minigpt_hf.data import blocks
from minigpt_hf.data.blocks import SequenceDataset, SequenceSampler, permutation_keys, permute
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.sharded import Part, ShardedArray
from minigpt_hf.data.stream import TokenStream, build_stream
from minigpt_hf.data.tokenizer import byte_tokenizer
from tests.conftest import tiny_model


def stream_of(lengths: list[int]) -> TokenStream:
    """Documents of the given lengths. Each token id is its position in the stream, except the BOS token (0)."""
    tokens, starts = [], []
    for length in lengths:
        starts.append(len(tokens))
        tokens += [0, *range(len(tokens) + 1, len(tokens) + 1 + length)]
    return TokenStream(Path(), np.array(tokens), np.array(starts), 0, 1, 1, 1, "")


documents = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) + len(lengths) > 3)


@settings(max_examples=200, deadline=None)
@given(lengths=documents, block_size=st.integers(1, 10), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_each_token_is_predicted_once_except_a_tail_shorter_than_a_sequence(lengths, block_size, seed, epoch):
    stream = stream_of(lengths)
    size = len(stream)
    if size < block_size + 1:
        with pytest.raises(ValueError, match="a sequence with its labels needs"):
            SequenceDataset(stream, block_size, seed)
        return
    dataset = SequenceDataset(stream, block_size, seed)
    sampler = SequenceSampler(len(dataset), seed)
    sampler.set_epoch(epoch)
    predicted = Counter()
    for address in sampler:
        sequence = dataset[address]
        start = (dataset.epoch_offset(epoch) + address[1] * block_size) % size
        positions = [(start + t) % size for t in range(block_size + 1)]
        assert sequence["input_ids"].tolist() == stream.tokens[positions[:-1]].tolist()
        assert sequence["shift_labels"].tolist() == stream.tokens[positions[1:]].tolist()
        predicted.update(positions[1:])
    assert set(predicted.values()) == {1}
    assert size - len(predicted) == size % block_size


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_the_order_is_a_permutation(size, seed, epoch):
    assert np.sort(permute(np.arange(size), size, permutation_keys(seed, epoch))).tolist() == list(range(size))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(4, 60), block_size=st.integers(1, 10), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_is_the_circular_stream_starting_at_its_offset(size, block_size, seed, epoch):
    """Compared with a rotated copy of the stream: sequence i has the tokens from i·T to (i + 1)·T inclusive."""
    tokens = np.arange(size) + 100
    stream = TokenStream(Path(), tokens, np.array([0]), 0, 1, 1, 1, "")
    if size <= block_size:
        return
    dataset = SequenceDataset(stream, block_size, seed)
    offset = random.Random(f"shift {seed} {epoch}").randrange(size)
    rotated = np.concatenate([np.roll(tokens, -offset), np.roll(tokens, -offset)[:1]]).tolist()
    for index in range(len(dataset)):
        sequence, begin = dataset[epoch, index], index * block_size
        assert sequence["input_ids"].tolist() == rotated[begin : begin + block_size]
        assert sequence["shift_labels"].tolist() == rotated[begin + 1 : begin + block_size + 1]


def test_epoch_offsets_take_every_value():
    dataset = SequenceDataset(stream_of([4]), 2, seed=0)
    assert {dataset.epoch_offset(epoch) for epoch in range(200)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("position", range(8))
def test_position_ids_restart_at_any_position_of_a_sequence(position):
    dataset = SequenceDataset(stream_of([20]), 8, seed=0)
    row = np.arange(1, 9)
    row[position] = 0
    batch = dataset.collate([{"input_ids": row, "shift_labels": row}])
    expected = [*range(position), *range(8 - position)]
    assert batch.get("position_ids", torch.arange(8)[None]).tolist() == [expected]
    assert ("position_ids" in batch) == (position > 0)


def test_the_order_resembles_a_random_permutation():
    """Consecutive positions are mapped far apart: the mean distance of two random positions of n is n / 3."""
    size, keys = 10_000, permutation_keys(0, 0)
    order = permute(np.arange(size), size, keys)
    assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.03)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03


def test_epochs_differ_in_offset_and_order_and_are_reproducible():
    dataset = SequenceDataset(stream_of([1000]), 10, seed=3)
    sampler = SequenceSampler(len(dataset), 3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] == orders[2] != orders[1]
    assert dataset.epoch_offset(0) != dataset.epoch_offset(1)
    assert dataset.epoch_offset(0) == SequenceDataset(stream_of([1000]), 10, seed=3).epoch_offset(0)


def test_a_resumed_sampler_omits_used_sequences_and_yields_the_same_remaining_ones():
    uninterrupted = list(SequenceSampler(3000, seed=0))
    resumed = SequenceSampler(3000, seed=0)
    for skipped in (37, 1024, 1025, 2999, 3000):
        resumed.num_skipped = skipped
        assert list(resumed) == uninterrupted[skipped:]
        assert list(resumed) == uninterrupted  # later epochs are complete


def test_position_ids_restart_where_a_document_starts():
    dataset = SequenceDataset(stream_of([3, 2, 9]), 8, seed=0)
    rows = [np.array([5, 6, 0, 8, 9, 0, 11, 12]), np.array([1, 2, 3, 4, 5, 6, 7, 8])]
    batch = dataset.collate([{"input_ids": row, "shift_labels": row} for row in rows])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_position_ids_are_omitted_if_no_document_starts_inside_a_sequence():
    """A BOS token at position 0 needs no restart, because no token precedes it."""
    dataset = SequenceDataset(stream_of([20]), 4, seed=0)
    rows = [np.array([0, 1, 2, 3]), np.array([7, 8, 9, 10])]
    assert "position_ids" not in dataset.collate([{"input_ids": row, "shift_labels": row} for row in rows])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_does_not_cross_documents_in_the_model(attention):
    model = tiny_model(attn_implementation=attention)
    dataset = SequenceDataset(stream_of([20]), 8, seed=0)

    def logits(row):
        batch = dataset.collate([{"input_ids": np.array(row), "shift_labels": np.array(row)}])
        return model(**batch, use_cache=False).logits

    one, other = logits([5, 6, 7, 0, 9, 10, 11, 12]), logits([25, 36, 47, 0, 9, 10, 11, 12])
    assert torch.equal(one[:, 3:], other[:, 3:])
    assert not torch.equal(one[:, :3], other[:, :3])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same_sequences(workers, text_file, tmp_path):
    stream = build_stream(load_corpus(str(text_file), 0).train, byte_tokenizer(), tmp_path)
    dataset = SequenceDataset(stream, 64, seed=0)
    assert len(pickle.dumps(dataset)) < 1000  # workers receive the path of the stream, not its tokens
    loader = DataLoader(
        dataset, 8, sampler=SequenceSampler(len(dataset), 0), collate_fn=dataset.collate, num_workers=workers
    )
    batches = list(loader)
    expected = [dataset[0, i]["input_ids"].tolist() for _, i in SequenceSampler(len(dataset), 0)]
    assert [row.tolist() for batch in batches for row in batch["input_ids"]] == expected


# -- several processes ------------------------------------------------------------------------------------------------


def share(num_sequences: int, batch_size: int, rank: int, num_ranks: int, window: int = 0) -> SequenceSampler:
    sampler = SequenceSampler(num_sequences, seed=3, window=window)
    sampler.batch_size, sampler.rank, sampler.num_ranks = batch_size, rank, num_ranks
    return sampler


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 400), batch_size=st.integers(1, 5), num_ranks=st.integers(1, 7), window=st.sampled_from([0, 9])
)
def test_the_shares_of_the_ranks_are_those_of_accelerate(size, batch_size, num_ranks, window):
    for rank in range(num_ranks):
        whole = BatchSampler(SequenceSampler(size, 3, window), batch_size, drop_last=num_ranks > 1)
        theirs = BatchSamplerShard(whole, num_ranks, rank) if num_ranks > 1 else whole
        sampler = share(size, batch_size, rank, num_ranks, window)
        ours = BatchSampler(sampler, batch_size, drop_last=num_ranks > 1)
        assert (list(ours), len(ours)) == (list(theirs), len(theirs))
        assert len(list(sampler)) == len(sampler)


# -- 64-bit addresses -------------------------------------------------------------------------------------------------

TRILLION = 10**12
# Around the limits of signed and unsigned 32-bit integers, of integers in float64, and of signed 64-bit integers.
SIZES = [2**31 - 1, 2**31 + 1, 2**32 + 1, TRILLION, 2**53 + 1, 2**62 + 1, 2**63 - 1]
sizes = st.one_of(st.sampled_from(SIZES), st.integers(1, 2**63 - 1))


def exact_image(position: int, size: int, keys: list[int], inverse: bool = False) -> int:
    """`permute`, or its inverse, in integers of unlimited size."""
    half = ((size - 1).bit_length() + 1) // 2
    mask = 2**half - 1
    while True:
        left, right = position >> half, position & mask
        if inverse:
            left, right = right, left
        for key in reversed(keys) if inverse else keys:
            left, right = right, left ^ (((right ^ key) * 0x9E3779B97F4A7C15 % 2**64) >> 32 & mask)
        if inverse:
            left, right = right, left
        position = left << half | right
        if position < size:
            return position


@settings(max_examples=200, deadline=None)
@given(size=sizes, seed=st.integers(0, 99), data=st.data())
def test_the_order_of_any_number_of_sequences_has_an_inverse_and_no_overflow(size, seed, data):
    positions = [0, size - 1, *data.draw(st.lists(st.integers(0, size - 1), max_size=20))]
    keys = permutation_keys(seed, 0)
    images = permute(np.array(positions), size, keys).tolist()
    assert images == [exact_image(position, size, keys) for position in positions]
    assert [exact_image(image, size, keys, inverse=True) for image in images] == positions
    assert min(images) >= 0 and max(images) < size


class PositionTokens:
    """A shard of any length, whose tokens are computed: `token_at` of their position in the stream."""

    def __init__(self, start: int, length: int):
        self.start, self.length = start, length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.length)
        return np.array([token_at(self.start + i) for i in range(start, stop)], np.uint16)


def token_at(position: int) -> int:
    return position * 0x9E3779B97F4A7C15 % 2**64 >> 48


def stream_of_shards(lengths: list[int]) -> TokenStream:
    starts = [0, *itertools.accumulate(lengths)]
    parts = [Part(n, partial(PositionTokens, start, n)) for start, n in zip(starts, lengths, strict=False)]
    return TokenStream(Path(), ShardedArray(parts, np.uint16), np.array([0]), 0, 1, 1, 1, "")


shard_lengths = st.lists(
    st.one_of(st.integers(1, 9), st.integers(2**31 - 4, 2**31 + 4), st.integers(1, 2**53)), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(lengths=shard_lengths, block_size=st.integers(1, 8), epoch=st.integers(0, 2**40), data=st.data())
def test_a_sequence_of_a_stream_of_any_length_has_the_tokens_of_its_address(lengths, block_size, epoch, data):
    """Also where it straddles shards, at the end of the stream, and beyond 2^31 and 2^53 tokens."""
    size = sum(lengths)
    if size < block_size + 1:
        return
    dataset = SequenceDataset(stream_of_shards(lengths), block_size, seed=1)
    offset = random.Random(f"shift 1 {epoch}").randrange(size)
    assert len(dataset) == size // block_size
    boundaries = [(start - offset) % size // block_size for start in itertools.accumulate(lengths)]
    drawn = data.draw(st.integers(0, len(dataset) - 1))
    for index in {0, drawn, len(dataset) - 1, *(index for index in boundaries if index < len(dataset))}:
        sequence = dataset[epoch, index]
        expected = [token_at((offset + index * block_size + t) % size) for t in range(block_size + 1)]
        assert sequence["input_ids"].tolist() == expected[:-1]
        assert sequence["shift_labels"].tolist() == expected[1:]


@pytest.mark.parametrize("window", [0, 10**6])
@pytest.mark.parametrize("num_ranks", [1, 512])
def test_resuming_at_step_1_000_000_000_computes_as_many_addresses_as_resuming_at_step_1(
    num_ranks, window, monkeypatch
):
    """The sequences of the resumed step are those at its position in the order, in integers of unlimited size."""
    batch_size, real, computed = 2, blocks.permute, []
    size = 4 * 10**9 * batch_size * num_ranks

    def counted(positions, *args):
        computed.append(len(positions))
        return real(positions, *args)

    monkeypatch.setattr(blocks, "permute", counted)
    counts = []
    for step in (1, 10**9):
        computed.clear()
        sampler = share(size, batch_size, num_ranks - 1, num_ranks, window)
        sampler.num_skipped = step * batch_size
        found = list(itertools.islice(sampler, batch_size))
        counts.append(sum(computed))
        expected = []
        for position in range((step * num_ranks + num_ranks - 1) * batch_size, (step + 1) * num_ranks * batch_size):
            number, place = divmod(position, window or size)
            number = exact_image(number, size // window, permutation_keys(3, 0)) if window else 0
            keys = permutation_keys(3, 0, number if window else None)
            expected.append((0, number * window + exact_image(place, window or size, keys)))
        assert found == expected
    assert counts[0] <= 2 * 1024 and counts[1] <= 2 * 1024
