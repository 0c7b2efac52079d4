"""Training sequences of a token stream, addressed by (epoch, index), and the sampler that orders them.

The N tokens of a stream are read as circular. Each epoch starts at a pseudo-random position `epoch_offset(epoch)`:

    sequence i of epoch e  =  stream[epoch_offset(e) + i·T : epoch_offset(e) + (i + 1)·T + 1]      (indices modulo N)

A sequence has T input tokens and T labels, T = `block_size`. Within an epoch each token is predicted exactly once, except a
tail of N mod T tokens. Because the offset changes, this tail and the boundaries of the sequences differ between epochs.

The order of the sequences is a seeded permutation that is computed instead of stored, so the position of a run is given by
(epoch, index), and resuming takes constant time.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import MiniGPTError
from .stream import TokenStream

ADDRESSED = 1024  # sequences whose addresses are computed together


class SequenceDataset(Dataset):
    """Training sequences of a token stream. Items are addressed by (epoch, index).

    Args:
        stream: N tokens.
        block_size: T, the number of input tokens of a sequence.
        seed: Determines the offset of each epoch.

    Raises:
        MiniGPTError: if the stream has fewer than T + 1 tokens.
    """

    def __init__(self, stream: TokenStream, block_size: int, seed: int):
        if len(stream) < block_size + 1:
            raise MiniGPTError(
                f"the training text has {len(stream):,} tokens, and a sequence with its labels needs {block_size + 1:,}: "
                "provide more text or reduce --block_size"
            )
        self.stream = stream
        self.block_size = block_size
        self.seed = seed

    def __len__(self) -> int:
        """Number of sequences per epoch: N // T."""
        return len(self.stream) // self.block_size

    @property
    def tokens_per_epoch(self) -> int:
        """Number of tokens in the stream, N."""
        return len(self.stream)

    def epoch_offset(self, epoch: int) -> int:
        """Position in the stream at which the sequences of an epoch start, in [0, N)."""
        return random.Random(f"shift {self.seed} {epoch}").randrange(len(self.stream))

    def __getitem__(self, address: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return one sequence.

        Args:
            address: (epoch, index).

        Returns:
            `input_ids` [T] and `shift_labels` [T]; the label of an input token is the token that follows it.
        """
        epoch, index = address
        size, start = len(self.stream), self.epoch_offset(epoch) + index * self.block_size
        start %= size
        tokens = self.stream.tokens[start : start + self.block_size + 1]
        if missing := self.block_size + 1 - len(tokens):
            tokens = np.concatenate([tokens, self.stream.tokens[:missing]])
        tokens = tokens.astype(np.int64)
        return {"input_ids": tokens[:-1], "shift_labels": tokens[1:]}

    def collate(self, sequences: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Stack B sequences into a batch of tensors [B, T].

        `labels` makes the model compute a loss; `shift_labels` provides labels that are already shifted, because shifting
        inside the loss would drop one of the T labels of each sequence. If a document starts inside a sequence, the batch
        has `position_ids` that restart there, which prevents attention across documents. Otherwise they are omitted, and
        the model uses plain causal attention.
        """
        ids = np.stack([sequence["input_ids"] for sequence in sequences])
        input_ids = torch.from_numpy(ids)
        shift_labels = torch.from_numpy(np.stack([sequence["shift_labels"] for sequence in sequences]))
        batch = {"input_ids": input_ids, "labels": input_ids, "shift_labels": shift_labels}
        starts_document = ids == self.stream.bos_token_id  # [B, T]
        if starts_document[:, 1:].any():
            position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            last_start = np.maximum.accumulate(np.where(starts_document, position, 0), axis=1)
            batch["position_ids"] = torch.from_numpy(position - last_start)
        return batch


class SequenceSampler(Sampler):
    """Yields the (epoch, index) of the sequences of an epoch, in a seeded order that differs between epochs.

    With R processes, batch k of an epoch belongs to rank k mod R. Batches of an incomplete last round, which not every rank
    would get, are omitted.

    Args:
        num_sequences: Number of sequences per epoch.
        seed: Determines the order.
        window: Permute the windows of this many consecutive sequences, and the sequences within each; an incomplete window
            comes last. For a text that is larger than the local cache of its shards. 0: permute all sequences.
        step: Number of sequences in a step of all ranks, if those of an incomplete last step are omitted. The steps of an
            epoch are then the same for every division of a step among ranks and accumulated batches.

    Attributes:
        batch_size, rank, num_ranks: The share of this process, B, r and R. Default: all sequences.
        num_skipped: Number of sequences of the share to omit at the start of the next epoch, because they were used before
            a resume. This takes constant time.
    """

    def __init__(self, num_sequences: int, seed: int, window: int = 0, step: int = 1):
        self.num_sequences = num_sequences
        self.num_used = num_sequences // step * step or num_sequences
        self.seed = seed
        self.window = window
        self.epoch = 0
        self.batch_size, self.rank, self.num_ranks = 1, 0, 1
        self.num_skipped = 0

    def __len__(self) -> int:
        """Number of sequences of the share per epoch."""
        if self.num_ranks == 1:
            return self.num_used
        return self.num_used // (self.batch_size * self.num_ranks) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch; called by the Trainer at the start of each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.num_skipped = self.num_skipped, 0
        for begin in range(start, len(self), ADDRESSED):
            for index in self.indices(begin, min(begin + ADDRESSED, len(self))).tolist():
                yield self.epoch, index

    def indices(self, begin: int, end: int) -> np.ndarray:
        """Return the sequences at positions `begin` to `end` of the share of this epoch, int64 [end - begin]."""
        own = np.arange(begin, end, dtype=np.int64)
        batches = own // self.batch_size * self.num_ranks + self.rank
        positions = batches * self.batch_size + own % self.batch_size
        keys = permutation_keys(self.seed, self.epoch)
        if not self.window:
            return permute(positions, self.num_sequences, keys)
        numbers, offsets = np.divmod(positions, self.window)
        complete = self.num_sequences // self.window
        is_complete = numbers < complete
        numbers[is_complete] = permute(numbers[is_complete], complete, keys)
        for number in np.unique(numbers).tolist():
            size = self.window if number < complete else self.num_sequences % self.window
            chosen = numbers == number
            offsets[chosen] = permute(offsets[chosen], size, permutation_keys(self.seed, self.epoch, number))
        return numbers * self.window + offsets


def permutation_keys(seed: int, epoch: int, window: int | None = None) -> list[int]:
    """Return the keys of the four rounds of `permute`, 64 bits each; `window`: for the sequences of a window."""
    source = random.Random(f"order {seed} {epoch}" + ("" if window is None else f" {window}"))
    return [source.getrandbits(64) for _ in range(4)]


def permute(positions: np.ndarray, size: int, keys: list[int]) -> np.ndarray:
    """Return the images of positions under a pseudo-random permutation of range(size), in constant time and memory each.

    A Feistel network (Luby and Rackoff 1988) is a permutation of a range of 4^k numbers for any round function. A result
    outside range(size) is permuted again until it falls inside (cycle walking), four times on average at most.

    Args:
        positions: int64, in range(size).
        size: At most 2^63.

    Returns:
        int64, of the shape of `positions`.
    """
    half_bits = ((size - 1).bit_length() + 1) // 2
    half, mask, middle = np.uint64(half_bits), np.uint64((1 << half_bits) - 1), np.uint64(32)
    images = positions.astype(np.uint64)
    outside = np.arange(len(images))  # places in `images` of the numbers to permute
    while len(outside):
        number = images[outside]
        left, right = number >> half, number & mask
        for key in keys:
            # Round function: multiplicative hashing with 2^64 / golden ratio; the middle bits of the product are used. The
            # product is that of unsigned 64-bit integers, modulo 2^64.
            mixed = (right ^ np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
            left, right = right, left ^ (mixed >> middle & mask)
        number = left << half | right
        images[outside] = number
        outside = outside[number >= np.uint64(size)]
    return images.astype(np.int64)
