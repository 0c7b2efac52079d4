"""Stream -> training blocks, each found in constant time from (epoch, index).

In: a `TokenStream`. Out: blocks of T inputs and T labels. It refuses a stream that is shorter than one block.

The N tokens of a stream form a circle, and each epoch cuts it anew, at a seeded place `shift(epoch)`:

    block i of epoch e  =  stream[shift(e) + i·T : … + T + 1]      (indices modulo N)

So within an epoch each token is predicted exactly once, but for a tail of N mod T tokens, which lies elsewhere in the next
epoch, as all cuts do. The order of the blocks is a seeded permutation that is computed, not stored: where training
stands is two numbers, and to resume is arithmetic.
"""

import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import MiniGPTError
from .stream import TokenStream


class Blocks(Dataset):
    """Training blocks of a stream, addressed by (epoch, index)."""

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        if len(stream) < block_size + 1:
            raise MiniGPTError(
                f"the training text has {len(stream):,} tokens, less than one block of {block_size:,} and its labels: "
                "give more text, or a smaller --block_size"
            )
        self.stream = stream
        self.block_size = block_size
        self.seed = seed

    def __len__(self) -> int:
        """Blocks in an epoch."""
        return len(self.stream) // self.block_size

    def shift(self, epoch: int) -> int:
        """Where the circle is cut in this epoch."""
        return random.Random(f"shift {self.seed} {epoch}").randrange(len(self.stream))

    def __getitem__(self, address: tuple[int, int]) -> dict[str, np.ndarray]:
        """(epoch, index) -> `input_ids` and `shift_labels`, [T] each: the label of an input is the token after it."""
        epoch, index = address
        size, start = len(self.stream), self.shift(epoch) + index * self.block_size
        start %= size
        tokens = self.stream.tokens[start : start + self.block_size + 1]
        if missing := self.block_size + 1 - len(tokens):
            tokens = np.concatenate([tokens, self.stream.tokens[:missing]])
        tokens = tokens.astype(np.int64)
        return {"input_ids": tokens[:-1], "shift_labels": tokens[1:]}

    def collate(self, blocks: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Blocks -> a batch [B, T].

        `labels` make the model compute a loss; `shift_labels` say what it is: all T labels of T inputs, where the usual
        shift inside the loss would lose one of each block. Where a document begins inside a block, `position_ids`
        restart, which keeps attention from crossing; without one they are left out, and attention is plainly causal.
        """
        input_ids = torch.from_numpy(np.stack([block["input_ids"] for block in blocks]))
        shift_labels = torch.from_numpy(np.stack([block["shift_labels"] for block in blocks]))
        batch = {"input_ids": input_ids, "labels": input_ids, "shift_labels": shift_labels}
        begins = input_ids == self.stream.end_of_text  # [B, T]
        if begins[:, 1:].any():
            position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            batch["position_ids"] = position - torch.where(begins, position, 0).cummax(dim=1).values
        return batch


class BlockSampler(Sampler):
    """Yields (epoch, index) for every block of an epoch, in a seeded order that differs from epoch to epoch.

    `passed` says how many of the next epoch are behind us: a resumed loop counts them off without looking, so they are
    not computed, and the millionth step starts as fast as the first.
    """

    def __init__(self, number_of_blocks: int, seed: int):
        self.number_of_blocks = number_of_blocks
        self.seed = seed
        self.epoch = 0
        self.passed = 0

    def __len__(self) -> int:
        return self.number_of_blocks

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says so at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        keys = permutation_keys(self.seed, self.epoch)
        passed, self.passed = self.passed, 0
        yield from itertools.repeat((self.epoch, 0), passed)
        for place in range(passed, self.number_of_blocks):
            yield self.epoch, permute(place, self.number_of_blocks, keys)


def permutation_keys(seed: int, epoch: int) -> list[int]:
    """One key for each of the four rounds of `permute`."""
    source = random.Random(f"order {seed} {epoch}")
    return [source.getrandbits(64) for _ in range(4)]


def permute(place: int, size: int, keys: list[int]) -> int:
    """Where `place` goes in a pseudo-random permutation of range(size), in constant time and memory.

    A Feistel network (Luby and Rackoff 1988) permutes a range of 4^k numbers, whatever function mixes its halves;
    numbers beyond `size` are sent through again until they fall inside (at most 4 rounds on average).
    """
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for key in keys:
            mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF  # multiply by 2^64 / golden ratio …
            left, right = right, left ^ (mixed >> 32 & mask)  # … and take bits from its middle
        place = left << half_bits | right
        if place < size:
            return place
