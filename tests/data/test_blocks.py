"""Over an epoch each token is predicted exactly once, but for a tail shorter than a block."""

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

from minigpt_hf.data.blocks import Blocks, BlockSampler, permutation_keys, permute
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.stream import TokenStream, build_stream
from minigpt_hf.data.tokenizer import byte_tokenizer
from tests.conftest import tiny_model


def stream_of(lengths: list[int]) -> TokenStream:
    """Documents of so many tokens; every token is its own place in the stream, but for the E (0) of each document."""
    tokens, starts = [], []
    for length in lengths:
        starts.append(len(tokens))
        tokens += [0, *range(len(tokens) + 1, len(tokens) + 1 + length)]
    return TokenStream(Path(), np.array(tokens), np.array(starts), 0, 1, 1, "")


documents = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) + len(lengths) > 3)


@settings(max_examples=200, deadline=None)
@given(lengths=documents, block_size=st.integers(1, 10), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_each_token_is_predicted_once_but_for_a_tail_shorter_than_a_block(lengths, block_size, seed, epoch):
    stream = stream_of(lengths)
    size = len(stream)
    if size < block_size + 1:
        with pytest.raises(ValueError, match="less than one block"):
            Blocks(stream, block_size, seed)
        return
    blocks = Blocks(stream, block_size, seed)
    sampler = BlockSampler(len(blocks), seed)
    sampler.set_epoch(epoch)
    predicted = Counter()
    for address in sampler:
        block = blocks[address]
        start = (blocks.shift(epoch) + address[1] * block_size) % size
        places = [(start + t) % size for t in range(block_size + 1)]
        assert block["input_ids"].tolist() == stream.tokens[places[:-1]].tolist()
        assert block["shift_labels"].tolist() == stream.tokens[places[1:]].tolist()
        predicted.update(places[1:])
    assert set(predicted.values()) == {1}
    assert size - len(predicted) == size % block_size


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_the_order_is_a_permutation(size, seed, epoch):
    keys = permutation_keys(seed, epoch)
    assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(4, 60), block_size=st.integers(1, 10), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_is_the_circle_cut_at_its_shift(size, block_size, seed, epoch):
    """Against a reference that turns the circle: block i is tokens shift + i·T up to and with shift + (i + 1)·T."""
    tokens = np.arange(size) + 100
    stream = TokenStream(Path(), tokens, np.array([0]), 0, 1, 1, "")
    if size <= block_size:
        return
    blocks = Blocks(stream, block_size, seed)
    shift = random.Random(f"shift {seed} {epoch}").randrange(size)
    turned = np.concatenate([np.roll(tokens, -shift), np.roll(tokens, -shift)[:1]]).tolist()
    for index in range(len(blocks)):
        block, begin = blocks[epoch, index], index * block_size
        assert block["input_ids"].tolist() == turned[begin : begin + block_size]
        assert block["shift_labels"].tolist() == turned[begin + 1 : begin + block_size + 1]


def test_shifts_take_every_value():
    """Also 0 and the last one."""
    blocks = Blocks(stream_of([4]), 2, seed=0)
    assert {blocks.shift(epoch) for epoch in range(200)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("place", range(8))
def test_positions_restart_at_each_place_of_a_block(place):
    blocks = Blocks(stream_of([20]), 8, seed=0)
    row = np.arange(1, 9)
    row[place] = 0
    batch = blocks.collate([{"input_ids": row, "shift_labels": row}])
    expected = [*range(place), *range(8 - place)]
    assert batch.get("position_ids", torch.arange(8)[None]).tolist() == [expected]
    assert ("position_ids" in batch) == (place > 0)


def test_the_order_looks_random():
    """Neighbours end up far apart: the mean distance of two random places of n is n / 3."""
    size, keys = 10_000, permutation_keys(0, 0)
    order = np.array([permute(i, size, keys) for i in range(size)])
    assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.03)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03


def test_epochs_differ_in_cut_and_order_and_seeds_repeat():
    blocks = Blocks(stream_of([1000]), 10, seed=3)
    sampler = BlockSampler(len(blocks), 3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] == orders[2] != orders[1]
    assert blocks.shift(0) != blocks.shift(1)
    assert blocks.shift(0) == Blocks(stream_of([1000]), 10, seed=3).shift(0)


def test_what_is_behind_a_resumed_run_is_passed_over_and_the_rest_is_the_same():
    whole = list(BlockSampler(100, seed=0))
    resumed = BlockSampler(100, seed=0)
    resumed.passed = 37
    assert list(resumed)[37:] == whole[37:]
    assert list(resumed) == whole  # the next epoch is whole again


def test_positions_restart_where_a_document_begins():
    blocks = Blocks(stream_of([3, 2, 9]), 8, seed=0)
    rows = [np.array([5, 6, 0, 8, 9, 0, 11, 12]), np.array([1, 2, 3, 4, 5, 6, 7, 8])]
    batch = blocks.collate([{"input_ids": row, "shift_labels": row} for row in rows])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_plain_causal_attention_is_kept_where_each_block_holds_one_document():
    """An E at the very start begins the block's document; nothing before it can be seen anyway."""
    blocks = Blocks(stream_of([20]), 4, seed=0)
    rows = [np.array([0, 1, 2, 3]), np.array([7, 8, 9, 10])]
    assert "position_ids" not in blocks.collate([{"input_ids": row, "shift_labels": row} for row in rows])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_batch_keeps_documents_apart_in_the_model(attention):
    model = tiny_model(attn_implementation=attention)
    blocks = Blocks(stream_of([20]), 8, seed=0)

    def logits(row):
        batch = blocks.collate([{"input_ids": np.array(row), "shift_labels": np.array(row)}])
        return model(**batch, use_cache=False).logits

    one, other = logits([5, 6, 7, 0, 9, 10, 11, 12]), logits([25, 36, 47, 0, 9, 10, 11, 12])
    assert torch.equal(one[:, 3:], other[:, 3:])
    assert not torch.equal(one[:, :3], other[:, :3])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same_blocks(workers, text_file, tmp_path):
    stream = build_stream(load_corpus(str(text_file), 0).train, byte_tokenizer(), tmp_path)
    blocks = Blocks(stream, 64, seed=0)
    assert len(pickle.dumps(blocks)) < 1000  # a process is sent the place of the stream, not the tokens
    loader = DataLoader(blocks, 8, sampler=BlockSampler(len(blocks), 0), collate_fn=blocks.collate, num_workers=workers)
    batches = list(loader)
    expected = [blocks[0, i]["input_ids"].tolist() for _, i in BlockSampler(len(blocks), 0)]
    assert [row.tolist() for batch in batches for row in batch["input_ids"]] == expected
