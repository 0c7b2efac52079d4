"""Find sequences of tokens verbatim in a token stream of any length: the longest match from each of their positions.

The stream is read once, in blocks. Every window of ℓ tokens of a block has a polynomial hash (Karp and Rabin 1987),

    (S[p + ℓ] - S[p]) · B^-p  with  S[p] = Σ_{j<p} token_j · B^j  (mod 2^64),

so that one cumulative sum per block gives the hashes of all lengths. Position i of a sequence, from which a match of m tokens
is known, is compared with windows of m + 1 tokens. A window with an equal hash is compared token by token and extended as far
as it matches: hashes exclude windows, and never decide that they match. Windows of at least `MIN_LENGTH` tokens are searched
only where their first `MIN_LENGTH` tokens occur in a sequence. Memory depends on block and sequences, not on the stream.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MIN_LENGTH = 8  # from this length on, the longest match is known for each position
BLOCK = 1 << 17  # tokens of the stream per block
MULTIPLIER = 0x9E3779B97F4A7C15  # B, an odd number: 2^64 divided by the golden ratio
SPREAD = 0xD6E8FEB86659FD93  # odd; multiplied with a hash, it distributes the high bits, which index the flags
MAX_FLAG_BITS = 22
COMPARED = 16  # tokens that are compared at a time


class Tokens(Protocol):
    """Token ids, of which slices are read: an array or an `ArrayFile`."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Matches:
    """The matches of one sequence.

    Args:
        lengths: Number of tokens of the longest match from each position [N]: exact from `MIN_LENGTH` tokens on, otherwise at
            most the exact one. Their maximum is exact.
        places: Where in the stream this match starts [N]; -1 for none.
    """

    lengths: np.ndarray
    places: np.ndarray

    @property
    def longest(self) -> int:
        """Number of tokens of the longest match."""
        return int(self.lengths.max(initial=0))

    def covered(self, length: int) -> np.ndarray:
        """Mark the tokens [N] that are in a match of at least `length` ≥ `MIN_LENGTH` tokens."""
        starts = np.flatnonzero(self.lengths >= length)
        change = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.add.at(change, starts, 1)
        np.add.at(change, starts + self.lengths[starts], -1)
        return np.cumsum(change[:-1]) > 0

    def maximal(self, length: int = MIN_LENGTH) -> list[tuple[int, int, int]]:
        """Return (start, number of tokens, place) of the matches of at least `length` tokens that are in no longer one."""
        ends = np.arange(len(self.lengths)) + self.lengths
        extends = ends > np.concatenate([[0], ends[:-1]])
        starts = np.flatnonzero((self.lengths >= length) & extends).tolist()
        return [(start, int(self.lengths[start]), int(self.places[start])) for start in starts]


def find_matches(
    tokens: Tokens,
    sequences: Sequence[np.ndarray],
    progress: Callable[[int], None] = lambda tokens: None,
    block: int = BLOCK,
) -> list[Matches]:
    """Find the longest matches of sequences in a stream.

    Args:
        tokens: The stream. BOS tokens match only BOS tokens, so that a sequence without them matches within documents.
        sequences: Ids of each sequence [N]; negative ids match nothing.
        progress: Called with the number of tokens of each block.
        block: Tokens per block.
    """
    search = _Search(sequences)
    overlap = int(search.room.max(initial=0)) - 1
    if overlap >= 0:
        powers = _powers(MULTIPLIER, block + overlap)
        inverses = _powers(pow(MULTIPLIER, -1, 1 << 64), block + overlap) * np.uint64(SPREAD)
        for start in range(0, len(tokens), block):
            ids = tokens[start : start + block + overlap]
            search.search(_Block(ids.astype(np.int64), start, block, _sums(ids, powers), inverses))
            progress(min(block, len(tokens) - start))
    return list(search.results())


def _powers(base: int, number: int) -> np.ndarray:
    """base^0, base^1, … mod 2^64."""
    powers = np.full(number, base, dtype=np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers)


def _sums(ids: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """S in the docstring of the module [number of ids + 1]."""
    sums = np.zeros(len(ids) + 1, dtype=np.uint64)
    np.cumsum(ids.astype(np.uint64) * powers[: len(ids)], out=sums[1:])
    return sums


@dataclass(frozen=True)
class _Block:
    """A block of the stream.

    Args:
        ids: Its tokens and as many of the following ones as the longest match needs, int64.
        start: Position in the stream.
        length: Number of positions at which windows start.
        sums: See the docstring of the module.
        inverses: SPREAD · B^-p.
    """

    ids: np.ndarray
    start: int
    length: int
    sums: np.ndarray
    inverses: np.ndarray

    def positions(self, length: int, positions: np.ndarray | None) -> np.ndarray | None:
        """The positions at which there are windows of `length` tokens; None for all."""
        return None if positions is None else positions[positions + length <= len(self.ids)]

    def hashes(self, length: int, positions: np.ndarray | None) -> np.ndarray:
        """Hashes of the windows of `length` tokens at some positions, or at all of them."""
        if positions is not None:
            return (self.sums[positions + length] - self.sums[positions]) * self.inverses[positions]
        number = max(0, min(self.length, len(self.ids) - length + 1))
        return (self.sums[length : length + number] - self.sums[:number]) * self.inverses[:number]


class _Hashes:
    """A set of hashes, with flags that exclude most others by one access to memory each."""

    def __init__(self, hashes: np.ndarray):
        self.hashes = np.unique(hashes)
        bits = min(MAX_FLAG_BITS, len(hashes).bit_length() + 8)
        self.shift = np.uint64(64 - bits)
        self.flags = np.zeros(1 << bits, dtype=bool)
        self.flags[self._places(hashes)] = True

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self.shift).view(np.int64)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Indices of the hashes that are in the set."""
        candidates = np.flatnonzero(self.flags[self._places(hashes)])
        return candidates[self.contains(hashes[candidates])]

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each hash is in the set."""
        ranks = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return self.hashes[ranks] == hashes


class _Search:
    """The matches found so far. All sequences are concatenated, each followed by a separator, which matches nothing."""

    def __init__(self, sequences: Sequence[np.ndarray]):
        separated = [np.append(np.asarray(ids, dtype=np.int64), -1) for ids in sequences]
        self.ids = np.concatenate([np.empty(0, dtype=np.int64), *separated])
        self.bounds = np.cumsum([0, *map(len, separated)])
        self.owner = np.repeat(np.arange(len(sequences)), np.diff(self.bounds))
        self.lengths = np.zeros(len(self.ids), dtype=np.int64)
        self.places = np.full(len(self.ids), -1, dtype=np.int64)
        # Tokens from each position up to the next one that matches nothing.
        positions = np.arange(len(self.ids))
        ends = np.where(self.ids < 0, positions, len(self.ids))
        self.room = np.minimum.accumulate(ends[::-1])[::-1] - positions
        self.sums = _sums(self.ids, _powers(MULTIPLIER, len(self.ids)))
        self.inverses = _powers(pow(MULTIPLIER, -1, 1 << 64), len(self.ids)) * np.uint64(SPREAD)
        # Hashes of all windows of `MIN_LENGTH`, 2 · `MIN_LENGTH`, 4 · `MIN_LENGTH`, … tokens.
        self.beginnings: dict[int, _Hashes] = {}
        length = MIN_LENGTH
        while len(starts := np.flatnonzero(self.room >= length)):
            self.beginnings[length] = _Hashes(self._hashes(length, starts))
            length *= 2
        # Positions by the length of the windows to search, and the hashes of these windows.
        self.wanted: dict[int, tuple[np.ndarray, _Hashes]] = {}
        self._update_wanted()

    def results(self) -> Iterator[Matches]:
        """Yield the matches of each sequence."""
        for start, end in zip(self.bounds[:-1], self.bounds[1:] - 1, strict=True):
            yield Matches(self.lengths[start:end], self.places[start:end])

    def search(self, block: _Block) -> None:
        """Extend the matches by those with windows of a block."""
        positions: np.ndarray | None = None  # where windows are searched; None: everywhere
        length = searched = 0
        while lengths := [wanted for wanted in self.wanted if wanted > length]:
            length = min(lengths)
            for begin in [each for each in self.beginnings if searched < each <= length]:
                positions = block.positions(begin, positions)
                found = self.beginnings[begin].find(block.hashes(begin, positions))
                positions, searched = found if positions is None else positions[found], begin
            positions = block.positions(length, positions)
            if self._extend(block, length, positions):
                self._update_wanted()

    def _extend(self, block: _Block, length: int, positions: np.ndarray | None) -> bool:
        """Search for windows of one length at some positions of a block; return whether a match was extended."""
        wanted, hashes = self.wanted[length]
        found = block.hashes(length, positions)
        hits = hashes.find(found)
        if not len(hits):
            return False
        found, places = found[hits], hits if positions is None else positions[hits]
        unique, first = np.unique(found, return_index=True)
        own = self._hashes(length, wanted)
        ranks = np.minimum(np.searchsorted(unique, own), len(unique) - 1)
        is_found = unique[ranks] == own
        wanted, own, matched = wanted[is_found], own[is_found], places[first[ranks[is_found]]]
        common = self._compare(block, wanted, matched)
        for row in np.flatnonzero(common < length):  # equal hashes of different windows
            others = places[found == own[row]]
            each = self._compare(block, np.full(len(others), wanted[row]), others)
            common[row], matched[row] = each.max(), others[each.argmax()]
        is_longer = common >= length
        wanted = wanted[is_longer]
        self.lengths[wanted] = common[is_longer]
        self.places[wanted] = block.start + matched[is_longer]
        return bool(len(wanted))

    def _compare(self, block: _Block, positions: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Count the equal tokens from positions of the sequences and places of a block on."""
        limits = np.minimum(self.room[positions], len(block.ids) - places)
        common = np.zeros(len(positions), dtype=np.int64)
        active = np.arange(len(positions))
        steps = np.arange(COMPARED)
        while len(active):
            offsets = common[active, None] + steps
            inside = offsets < limits[active, None]
            left = self.ids[np.where(inside, positions[active, None] + offsets, 0)]
            right = block.ids[np.where(inside, places[active, None] + offsets, 0)]
            equal = inside & (left == right)
            run = np.where(equal.all(axis=1), COMPARED, equal.argmin(axis=1))
            common[active] += run
            active = active[run == COMPARED]
        return common

    def _hashes(self, length: int, positions: np.ndarray) -> np.ndarray:
        return (self.sums[positions + length] - self.sums[positions]) * self.inverses[positions]

    def _update_wanted(self) -> None:
        """Derive the matches that others contain, and the lengths of the windows to search."""
        positions = np.arange(len(self.ids))
        # A match of m tokens contains one of m - 1 tokens from the next position on. (Its end never exceeds its sequence.)
        ends = positions + self.lengths
        reached = np.maximum.accumulate(ends)
        source = np.maximum.accumulate(np.where(ends == reached, positions, 0))
        derived = np.flatnonzero(source != positions)
        derived = derived[reached[derived] > ends[derived]]
        self.lengths[derived] = reached[derived] - derived
        self.places[derived] = self.places[source[derived]] + derived - source[derived]
        # Below `MIN_LENGTH`, only a match that is longer than all others of the sequence is of interest.
        longest = np.zeros(len(self.bounds) - 1, dtype=np.int64)
        np.maximum.at(longest, self.owner, self.lengths)
        lengths = np.maximum(self.lengths, np.minimum(longest, MIN_LENGTH - 1)[self.owner]) + 1
        possible = np.flatnonzero(lengths <= self.room)
        order = possible[np.argsort(lengths[possible], kind="stable")]
        values, starts = np.unique(lengths[order], return_index=True)
        groups = np.split(order, starts[1:]) if len(values) else []
        self.wanted = {
            int(length): (group, _Hashes(self._hashes(int(length), group)))
            for length, group in zip(values, groups, strict=True)
        }
