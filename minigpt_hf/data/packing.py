"""Training sequences of conversations: complete conversations, packed into sequences of a fixed length.

Each conversation is in exactly one sequence. Positions restart at 0 with each conversation, which prevents attention across
conversations. The conversations, in a seeded order, are assigned by best fit: each to the sequence in which it leaves the
least space. The assignment is the same in every epoch, and the order of the sequences differs (see `SequenceSampler`), so
that sequences are addressed by (epoch, index) and a run resumes exactly.
"""

from bisect import bisect_left, insort

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import MiniGPTError
from .chat_format import IGNORE_INDEX, ChatFormat
from .stream import TokenStream


class ConversationDataset(Dataset):
    """Training sequences of packed conversations. Items are addressed by (epoch, index).

    Args:
        stream: Conversations of at most T input tokens, as written by `build_conversation_stream`.
        chat_format: Marks the answers.
        block_size: T, the length of a sequence.
        seed: Determines which conversations share a sequence.

    Raises:
        MiniGPTError: if there is no conversation.
    """

    def __init__(self, stream: TokenStream, chat_format: ChatFormat, block_size: int, seed: int):
        if not len(stream.documents):
            raise MiniGPTError(
                f"no conversation fits into a sequence of block_size {block_size} tokens: raise --block_size"
            )
        self.stream, self.chat_format, self.block_size, self.seed = stream, chat_format, block_size, seed
        self.padding_id = stream.bos_token_id
        self.starts = stream.documents[:]
        # Input tokens of each conversation: without BOS and the last `<|im_end|>`.
        self.lengths = np.diff(self.starts, append=len(stream)) - 2
        self.members = pack(self.lengths, block_size, seed)

    def __len__(self) -> int:
        """Number of sequences per epoch."""
        return len(self.members)

    @property
    def tokens_per_epoch(self) -> int:
        """Number of positions in all sequences, padding included."""
        return len(self) * self.block_size

    @property
    def filled(self) -> float:
        """Share of positions that hold a token of a conversation."""
        return float(self.lengths.sum()) / (len(self) * self.block_size)

    def __getitem__(self, address: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return one sequence.

        Args:
            address: (epoch, index).

        Returns:
            `input_ids`, `shift_labels` and `position_ids` [T]. Only tokens of answers have labels; padding has none.
        """
        _, index = address
        input_ids = np.full(self.block_size, self.padding_id, dtype=np.int64)
        labels = np.full(self.block_size, IGNORE_INDEX, dtype=np.int64)
        positions = np.zeros(self.block_size, dtype=np.int64)
        start = 0
        for member in self.members[index]:
            size, offset = int(self.lengths[member]), int(self.starts[member]) + 1
            ids = self.stream.tokens[offset : offset + size + 1].astype(np.int64)
            span = slice(start, start + size)
            input_ids[span] = ids[:size]
            labels[span] = np.where(self.chat_format.is_answer(ids), ids, IGNORE_INDEX)[1 : size + 1]
            positions[span] = np.arange(size)
            start += size
        positions[start:] = np.arange(self.block_size - start)
        return {"input_ids": input_ids, "shift_labels": labels, "position_ids": positions}

    def collate(self, sequences: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Stack B sequences into a batch of tensors [B, T].

        `labels` are the shifted labels: the Trainer counts those that are not ignored, to average the loss over them.
        """
        batch = {name: torch.from_numpy(np.stack([sequence[name] for sequence in sequences])) for name in sequences[0]}
        return {**batch, "labels": batch["shift_labels"]}


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Assign items to bins by best fit, in a seeded order.

    Args:
        lengths: Size of each item, at most `capacity`.

    Returns:
        The items of each bin.
    """
    order = np.random.default_rng([0x9AC4, seed]).permutation(len(lengths))
    shortest = int(lengths.min())
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, bin) of the bins with space for an item, sorted
    for item in order.tolist():
        length = int(lengths[item])
        found = bisect_left(room, (length, -1))
        if found < len(room):
            free, number = room.pop(found)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if free - length >= shortest:
            insort(room, (free - length, number))
    return bins
