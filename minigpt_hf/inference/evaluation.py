"""Any causal LM + text -> loss, perplexity, bits per byte.

In: a model, and texts as token ids. Out: figures that can be compared, because it is said what was counted: every token
of every text exactly once, with a stated context. It refuses texts without tokens.

A window holds at most `block_size` inputs. The first of a text begins with the end-of-text token, which opens every
document, so the text's first token has something to be predicted from. The next window begins with the last token of
the window before, and sees no more; with a `stride` below `block_size`, windows overlap and each scores only its last
`stride` tokens, which then have a longer context. End-of-text tokens themselves are not scored: they are not text.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import unknown_character_error
from ..errors import MiniGPTError

UNLIMITED_CONTEXT = 2048  # window of a model whose configuration names no longest sequence
IGNORED = -100  # the label that `cross_entropy` leaves out


@dataclass(frozen=True)
class Score:
    """`loss` in nats per token, `perplexity` = exp(loss), `bits_per_byte` of UTF-8 text; and what they are of.

    The perplexity is infinite if exp(loss) exceeds the largest float (a loss above 709.78).
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    block_size: int
    stride: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def longest_context(model: PreTrainedModel) -> int:
    """Longest window of a model, in tokens; `UNLIMITED_CONTEXT` for architectures without a limit (ALiBi, state spaces)."""
    return getattr(model.config, "max_position_embeddings", UNLIMITED_CONTEXT)


def evaluate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
) -> Score:
    """Score texts with any causal LM and its tokenizer.

    Args:
        texts: Documents. Text that spells a special token is read as text.
        block_size: Inputs in a window; default: the longest sequence of the model.
        stride: Tokens scored in a window; default: `block_size`.

    Raises:
        MiniGPTError: if there is no text, the tokenizer has no token to open a document with, the window is impossible, or
            the loss is not finite.
    """
    longest = longest_context(model)
    block_size = longest if block_size is None else block_size
    if not 1 <= block_size <= longest:
        raise MiniGPTError(f"block_size is {block_size}: this model takes windows of 1 to {longest} tokens")
    opening = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if opening is None:
        opening = model.config.bos_token_id  # a model from nanoGPT knows no special tokens; a line end opens its texts
    if opening is None:
        raise MiniGPTError("neither the tokenizer nor the model names a token to open a document with")
    size = 0

    def encoded() -> Iterator[np.ndarray]:
        nonlocal size
        for text in texts:
            size += len(text.encode())
            ids = np.array(_encode(tokenizer, text), dtype=np.int64)
            if len(ids) and ids.max() >= model.config.vocab_size:
                raise MiniGPTError(
                    f"token {ids.max()} of the text is beyond the vocabulary of this model ({model.config.vocab_size:,}): "
                    "the tokenizer is not the one it was trained with"
                )
            yield ids

    nats, tokens, documents = score_documents(model, encoded(), opening, block_size, stride, batch_size)
    if not math.isfinite(nats):
        raise MiniGPTError(f"the loss of this model on this text is {nats}: its weights or activations are not finite")
    if tokens == 0:
        raise MiniGPTError("there is no text to evaluate")
    return summarize(nats / tokens, tokens, size, documents, block_size, stride)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
        if unknown := unknown_character_error(text, tokenizer.get_vocab(), "the text"):
            raise unknown from error
        raise


def summarize(loss: float, tokens: int, size: int, documents: int, block_size: int, stride: int | None) -> Score:
    """The figures of a `Score`, all computed from the mean loss, so that a published score is repeated to the last digit.

    Args:
        loss: Mean negative log-likelihood in nats per token.
        size: Number of UTF-8 bytes of the text.
        stride: Default: `block_size`.
    """
    bits_per_byte = loss * tokens / math.log(2) / size
    perplexity = math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf
    return Score(loss, perplexity, bits_per_byte, tokens, size, documents, block_size, stride or block_size)


@torch.no_grad()
def score_documents(
    model: nn.Module,
    documents: Iterable[np.ndarray],
    opening: int,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 16,
    share: tuple[int, int] = (0, 1),
) -> tuple[float, int, int]:
    """The surprise of a model at documents, each an array of token ids: (nats, tokens, documents), summed.

    Args:
        opening: The token that stands before each document.
        share: (r, n) scores only batches r, r + n, r + 2n, …: what process r of n does of the work.

    Raises:
        MiniGPTError: if the stride is not within the window.
    """
    stride = block_size if stride is None else stride
    if batch_size < 1:
        raise MiniGPTError(f"batch_size is {batch_size}: it must be at least 1")
    if not 1 <= stride <= block_size:
        raise MiniGPTError(f"stride is {stride}: it must be between 1 and the block size, {block_size}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    tokens = number = 0

    def all_windows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal number
        for document in documents:
            number += len(document) > 0
            yield from windows(document, opening, block_size, stride)

    for place, (inputs, labels) in enumerate(_batches(all_windows(), batch_size, opening)):
        if place % share[1] == share[0]:
            logits = model(input_ids=inputs.to(device), use_cache=False).logits
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten().to(device), ignore_index=IGNORED, reduction="none"
            )
            nats += losses.cpu().double().sum()
            tokens += int((labels != IGNORED).sum())
    model.train(was_training)
    return nats.item(), tokens, number


def windows(
    document: np.ndarray, opening: int, block_size: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a document into inputs and labels.

    d₁ d₂ d₃ in windows of 2 -> (E d₁, d₁ d₂), (d₂, d₃); with stride 1 -> (E d₁, d₁ d₂), (d₁ d₂, – d₃).
    """
    sequence = np.concatenate([[opening], document])  # its token t is the input whose label is token t + 1
    scored = 0
    for begin in range(0, len(document), stride):
        end = min(begin + block_size, len(document))
        labels = sequence[begin + 1 : end + 1].copy()
        labels[: scored - begin] = IGNORED
        yield sequence[begin:end], labels
        if end == len(document):
            break
        scored = end


def _batches(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], batch_size: int, filler: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows -> [B, T] inputs and labels. Short ones are filled up on the right, where nothing scored can see it."""
    batch: list[tuple[np.ndarray, np.ndarray]] = []

    def stacked() -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(inputs) for inputs, _ in batch)
        inputs = np.full((len(batch), longest), filler, dtype=np.int64)
        labels = np.full((len(batch), longest), IGNORED, dtype=np.int64)
        for row, (some_inputs, some_labels) in enumerate(batch):
            inputs[row, : len(some_inputs)] = some_inputs
            labels[row, : len(some_labels)] = some_labels
        return torch.from_numpy(inputs), torch.from_numpy(labels)

    for pair in pairs:
        batch.append(pair)
        if len(batch) == batch_size:
            yield stacked()
            batch = []
    if batch:
        yield stacked()
