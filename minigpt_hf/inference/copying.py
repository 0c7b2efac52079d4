"""Measure how much of a text occurs verbatim in the training text (memorization, Carlini et al. 2023).

The figures of a sample are the length of its longest stretch of consecutive tokens that occurs in the training stream, and
the share of its tokens in stretches of at least 8, 16 and 32 tokens. Any two texts of the same kind share common phrases, so
the baseline is the same figures for held-out text of equal length.

A stretch lies within one document. For conversations, the answers are measured, and compared with the complete stream. Texts
are encoded again, so a stretch ends where the tokens differ, even if the next token begins with the same characters.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.chat_format import ChatFormat
from ..data.encoding import Encoder
from ..data.matching import Matches, find_matches
from ..data.stream import TokenStream

THRESHOLDS = (8, 16, 32)  # tokens of a stretch
CONTEXT = 48  # tokens of the training text before and after a passage
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Stretch:
    """The longest stretch of one sample that occurs in the training text.

    Attributes:
        tokens: Its length.
        text: Its text.
        of_tokens: Length of the sample.
    """

    tokens: int
    text: str
    of_tokens: int


@dataclass(frozen=True)
class Overlap:
    """Figures of several texts.

    Attributes:
        tokens: Length of all texts.
        longest: Length of the longest stretch that occurs in the training text, in tokens.
        shares: Share of the tokens in stretches of at least 8, 16 and 32 tokens, by this number.
    """

    tokens: int
    longest: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Copying:
    """How much samples share with the training text.

    Attributes:
        training_tokens: Length of the training text.
        samples: Figures of the samples.
        held_out: Figures of held-out text of equal length; None if there is none.
        stretches: The longest stretch of each sample.
    """

    training_tokens: int
    samples: Overlap
    held_out: Overlap | None
    stretches: list[Stretch]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Passage:
    """A stretch of a sample, and the place in the training text where it occurs first.

    Attributes:
        start: Position of its first token in the sample.
        tokens: Its length.
        document: Number of the document, from 1.
        before, text, after: The passage with its surroundings in the document.
    """

    start: int
    tokens: int
    document: int
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class CopiedSample:
    """A sample and the passages that it shares with the training text.

    Attributes:
        given: Its beginning, which was not generated.
        ids: The other tokens.
        passages: Passages of at least 8 tokens, by position in the sample.
    """

    given: str
    ids: list[int]
    passages: list[Passage]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_copying(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[np.ndarray],
    train: TokenStream,
    validation: TokenStream | None,
    is_chat: bool = False,
) -> Copying:
    """Compare samples, and held-out text of equal length, with the training text.

    Args:
        samples: Ids of each sample [N]; see `encode_samples`.
        train: The training text.
        validation: Held-out text, if any.
        is_chat: Whether the streams are conversations.
    """
    lengths = [len(ids) for ids in samples]
    excerpts = held_out_excerpts(validation, lengths, ChatFormat(tokenizer) if is_chat else None) if validation else []
    matches = _find(train, [*samples, *excerpts])
    own, others = matches[: len(samples)], matches[len(samples) :]
    stretches = []
    for ids, match in zip(samples, own, strict=True):
        start = int(match.lengths.argmax()) if len(ids) else 0
        text = tokenizer.decode(ids[start : start + match.longest].tolist())
        stretches.append(Stretch(match.longest, text, len(ids)))
    return Copying(
        training_tokens=len(train),
        samples=_overlap(samples, own),
        held_out=_overlap(excerpts, others) if excerpts else None,
        stretches=stretches,
    )


def copied_samples(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[tuple[str, str]],
    train: TokenStream,
    is_chat: bool = False,
) -> list[CopiedSample]:
    """Find the passages of the training text that samples share with it; for the arguments see `encode_samples`."""
    encoded = encode_samples(tokenizer, samples, is_chat)

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(train.tokens[start:end].tolist())

    found = []
    for (given, _), ids, match in zip(samples, encoded, _find(train, encoded), strict=True):
        passages = []
        for start, tokens, place in match.maximal():
            document, begin, end = _document_at(train, place)
            passages.append(
                Passage(
                    start=start,
                    tokens=tokens,
                    document=document + 1,
                    # The first and the last token of an excerpt may be a part of a character.
                    before=decode(max(begin, place - CONTEXT), place).lstrip(REPLACEMENT),
                    text=decode(place, place + tokens),
                    after=decode(place + tokens, min(end, place + tokens + CONTEXT)).rstrip(REPLACEMENT),
                )
            )
        found.append(CopiedSample(given, ids.tolist(), passages))
    return found


def encode_samples(
    tokenizer: PreTrainedTokenizerBase, samples: Iterable[tuple[str, str]], is_chat: bool = False
) -> list[np.ndarray]:
    """Return the token ids of the generated part of samples.

    Args:
        samples: For each sample, the prompt or question that was given, and the text, which starts with it.
        is_chat: Whether the generated texts are answers.
    """
    texts = [text.removeprefix(given) for given, text in samples]
    if not is_chat:
        encoder = Encoder(tokenizer.backend_tokenizer.to_str())
        return [encoder(text).astype(np.int64) for text in texts]
    chat_format = ChatFormat(tokenizer)
    answers = [chat_format.encode([{"role": "assistant", "content": text}]) for text in texts]
    return [ids[chat_format.is_answer(ids)][:-1] for ids in answers]  # without <|im_end|>


def held_out_excerpts(
    validation: TokenStream, lengths: Sequence[int], chat_format: ChatFormat | None = None
) -> list[np.ndarray]:
    """Take evenly spaced excerpts of held-out text; shorter ones where they would overlap.

    An excerpt starts at the start of a document, as a sample does; if there are fewer documents than excerpts, anywhere.

    Args:
        lengths: Number of tokens of each excerpt.
        chat_format: For conversations, of which only the answers are taken.

    Returns:
        Ids of each excerpt, -1 between documents.
    """
    number, documents = len(lengths), len(validation.documents)
    if documents >= number or chat_format is not None:
        starts = [_start(validation, i * documents // number) for i in range(number)]
    else:
        starts = [i * len(validation) // number for i in range(number)]
    excerpts = []
    for start, end, length in zip(starts, [*starts[1:], len(validation)], lengths, strict=True):
        parts, position, missing = [np.empty(0, dtype=np.int64)], start, length
        while missing > 0 and position < end:
            stop = min(end, position + 2 * missing)
            if chat_format is not None:  # answers are recognized in complete conversations
                stop = _document_at(validation, position)[2]
            ids = validation.tokens[position:stop].astype(np.int64)
            is_text = ids != validation.bos_token_id
            if chat_format is not None:
                is_text = chat_format.is_answer(ids) & (ids != chat_format.end)
            parts.append(np.where(is_text, ids, -1)[np.cumsum(is_text) <= missing])
            missing -= int((parts[-1] >= 0).sum())
            position = stop
        excerpts.append(np.concatenate(parts))
    return excerpts


def _find(train: TokenStream, samples: Sequence[np.ndarray]) -> list[Matches]:
    with tqdm(total=len(train), desc="searching", unit=" tokens", unit_scale=True, delay=2, leave=False) as bar:
        return find_matches(train.tokens, samples, bar.update)


def _overlap(texts: Sequence[np.ndarray], matches: Sequence[Matches]) -> Overlap:
    tokens = sum(int((ids >= 0).sum()) for ids in texts)
    covered = {str(number): sum(int(match.covered(number).sum()) for match in matches) for number in THRESHOLDS}
    return Overlap(
        tokens=tokens,
        longest=max((match.longest for match in matches), default=0),
        shares={name: count / max(tokens, 1) for name, count in covered.items()},
    )


def _start(stream: TokenStream, document: int) -> int:
    return int(stream.documents[document : document + 1][0])


def _document_at(stream: TokenStream, position: int) -> tuple[int, int, int]:
    """Return number, start of the text and end of the document at a position of a stream."""
    number = bisect_right(range(len(stream.documents)), position, key=lambda i: _start(stream, i)) - 1
    end = _start(stream, number + 1) if number + 1 < len(stream.documents) else len(stream)
    return number, _start(stream, number) + 1, end
