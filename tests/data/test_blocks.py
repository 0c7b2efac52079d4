"""Within an epoch each token is predicted exactly once, except a tail shorter than a sequence."""

import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from minigpt_hf.data.blocks import SequenceDataset, SequenceSampler, permutation_keys, permute
from minigpt_hf.data.corpus import load_corpus
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
    keys = permutation_keys(seed, epoch)
    assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


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
    order = np.array([permute(i, size, keys) for i in range(size)])
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


def test_a_resumed_sampler_skips_used_sequences_and_yields_the_same_remaining_ones():
    uninterrupted = list(SequenceSampler(100, seed=0))
    resumed = SequenceSampler(100, seed=0)
    resumed.num_skipped = 37
    assert list(resumed)[37:] == uninterrupted[37:]
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
