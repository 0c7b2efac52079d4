"""Loss, perplexity and bits per byte of any causal LM on a text.

Every token of every document is scored exactly once, in windows of at most `block_size` input tokens. The first window of
a document starts with the BOS token, so that the first token is predicted as well. Each following window starts with the
last token of the previous one. With `stride` < `block_size`, windows overlap and each scores only its last `stride`
tokens, which then have a longer context. BOS tokens are not scored, because they are not text.
"""

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat_format import CHAT_TEMPLATE, IGNORE_INDEX, ChatFormat, EncodedConversations, Message
from ..data.encoding import unknown_character_error
from ..errors import MiniGPTError
from .generation import context_length, text_config

logger = logging.getLogger(__name__)

DEFAULT_WINDOW = 2048  # tokens, for a model whose configuration does not limit the sequence length


@dataclass(frozen=True)
class Score:
    """Result of an evaluation, and the conditions under which it was measured.

    Attributes:
        loss: Mean negative log-likelihood in nats per token.
        perplexity: exp(loss); infinite if that exceeds the largest float (loss above 709.78).
        bits_per_byte: Total negative log-likelihood in bits, divided by `bytes`.
        tokens: Number of tokens scored.
        bytes: Size of the text in UTF-8.
        documents: Number of documents that are not empty.
        excerpts: Number of parts of these documents that were scored; equal to `documents` if they were scored entirely.
        block_size: Maximum number of input tokens in a window.
        stride: Maximum number of tokens scored in a window after the first; 0 for conversations, which are not divided.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    excerpts: int
    block_size: int
    stride: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def changed_arithmetic(device_type: str, tf32: bool = False) -> str | None:
    """Return the global setting of torch that changes float32 results on this kind of device, and the remedy; or None.

    Args:
        tf32: Whether TF32 was requested.
    """
    if torch.is_autocast_enabled(device_type):
        return "autocast is enabled; leave its context"
    if device_type == "cpu" and not torch.backends.mkldnn.enabled:
        return "mkldnn is disabled; set torch.backends.mkldnn.enabled = True"
    backend = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device_type)
    precision = backend.matmul.fp32_precision if backend else "none"  # "none": the default, which equals "ieee"
    if precision in ("none", "ieee") or (tf32 and precision == "tf32"):
        return None
    return f"float32 matmul precision is {precision}; call torch.set_float32_matmul_precision('highest')"


def longest_context(model: PreTrainedModel) -> int:
    """Return the maximum sequence length in tokens, `DEFAULT_WINDOW` for models without a limit."""
    return context_length(model) or DEFAULT_WINDOW


def evaluate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    documents: int | None = None,
) -> Score:
    """Evaluate a causal LM on documents.

    Args:
        texts: Documents or excerpts of them. A string such as `<|endoftext|>` in a document is encoded as ordinary text.
        block_size: Maximum number of input tokens in a window. Default: the maximum sequence length of the model.
        stride: Number of tokens scored in a window. Default: `block_size`.
        batch_size: Number of windows per forward pass.
        documents: Number of documents that the texts are excerpts of. Default: the number of texts that are not empty.

    Raises:
        MiniGPTError: if there is no text, neither tokenizer nor model defines a BOS token, the window or the stride is
            invalid, or the loss is not finite.
    """
    longest = longest_context(model)
    block_size = longest if block_size is None else block_size
    if not 1 <= block_size <= longest:
        raise MiniGPTError(f"block_size is {block_size}: this model supports windows of 1 to {longest} tokens")
    config = text_config(model)
    bos_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos_token_id is None:  # nanoGPT's tokenizers have no special tokens; the configuration names the line feed
        bos_token_id = config.bos_token_id
    if bos_token_id is None:
        raise MiniGPTError(
            "neither the tokenizer nor the configuration of the model defines a BOS token: add one to either"
        )
    if not 0 <= bos_token_id < config.vocab_size:
        raise MiniGPTError(
            f"the BOS token has id {bos_token_id}, which exceeds the vocabulary of the model ({config.vocab_size:,} "
            "tokens): use the tokenizer that it was trained with"
        )
    num_bytes = 0

    def encoded() -> Iterator[np.ndarray]:
        nonlocal num_bytes
        for text in texts:
            num_bytes += len(text.encode())
            ids = np.array(_encode(tokenizer, text), dtype=np.int64)
            if len(ids) and ids.max() >= config.vocab_size:
                raise MiniGPTError(
                    f"token id {ids.max()} exceeds the vocabulary of the model ({config.vocab_size:,} tokens): use the "
                    "tokenizer that it was trained with"
                )
            yield ids

    nats, tokens, excerpts = score_documents(model, encoded(), bos_token_id, block_size, stride, batch_size)
    if not math.isfinite(nats):
        raise MiniGPTError(f"the loss of the model on this text is {nats}: its weights or activations are not finite")
    if tokens == 0:
        raise MiniGPTError("there is no text to evaluate: give a text that is not empty")
    return summarize(nats / tokens, tokens, num_bytes, documents or excerpts, excerpts, block_size, stride)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
        if unknown := unknown_character_error(text, tokenizer.get_vocab(), "the text"):
            raise unknown from error
        raise


def summarize(
    loss: float, tokens: int, num_bytes: int, documents: int, excerpts: int, block_size: int, stride: int | None
) -> Score:
    """Compute every metric of a `Score` from the mean loss, so that a published score can be reproduced exactly.

    Args:
        loss: Mean negative log-likelihood in nats per token.
        tokens: Number of tokens scored.
        num_bytes: Size of the text in UTF-8.
        documents: Number of documents that are not empty.
        excerpts: Number of parts of these documents that were scored.
        block_size: Maximum number of input tokens in a window.
        stride: Number of tokens scored in a window; 0 for conversations. Default: `block_size`.
    """
    bits_per_byte = loss * tokens / math.log(2) / num_bytes
    perplexity = math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf
    stride = block_size if stride is None else stride
    return Score(loss, perplexity, bits_per_byte, tokens, num_bytes, documents, excerpts, block_size, stride)


def score_documents(
    model: nn.Module,
    documents: Iterable[np.ndarray],
    bos_token_id: int,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[float, int, int]:
    """Sum the negative log-likelihood of documents.

    Args:
        documents: Token ids of each document, without BOS token.
        bos_token_id: Token that precedes each document.
        block_size: Maximum number of input tokens in a window.
        stride: Number of tokens scored in a window. Default: `block_size`.
        batch_size: Number of windows per forward pass.
        rank: Index of this process, which evaluates batches `rank`, `rank + world_size`, …
        world_size: Number of processes.

    Returns:
        Negative log-likelihood in nats and number of tokens, of the batches of this process; number of non-empty documents,
        of all processes.

    Raises:
        MiniGPTError: if `batch_size` or `stride` is out of range.
    """
    stride = block_size if stride is None else stride
    if batch_size < 1:
        raise MiniGPTError(f"batch_size is {batch_size}: it must be at least 1")
    if not 1 <= stride <= block_size:
        raise MiniGPTError(f"stride is {stride}: it must be between 1 and the block size, {block_size}")
    num_documents = 0

    def all_windows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal num_documents
        for document in documents:
            num_documents += len(document) > 0
            yield from windows(document, bos_token_id, block_size, stride)

    nats, tokens = _score(model, _batches(all_windows(), batch_size, bos_token_id), rank, world_size)
    return nats, tokens, num_documents


def score_conversations(
    model: nn.Module,
    conversations: Iterable[np.ndarray],
    chat_format: ChatFormat,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[float, int, int]:
    """Sum the negative log-likelihood of the answers of conversations, including the `<|im_end|>` of each.

    Args:
        conversations: Token ids of each; see `EncodedConversations`.
        chat_format: Marks the answers. For the other arguments see `score_documents`.

    Returns:
        Negative log-likelihood in nats and number of tokens, of the batches of this process; number of conversations.
    """
    num_conversations = 0

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal num_conversations
        for ids in conversations:
            num_conversations += 1
            ids = ids.astype(np.int64)
            yield ids[:-1], np.where(chat_format.is_answer(ids), ids, IGNORE_INDEX)[1:]

    nats, tokens = _score(model, _batches(pairs(), batch_size, chat_format.end), rank, world_size)
    return nats, tokens, num_conversations


def evaluate_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[list[Message]],
    block_size: int | None = None,
    batch_size: int = 16,
) -> Score:
    """Evaluate a model on the answers of conversations; see `score_conversations`.

    Args:
        block_size: Conversations with more input tokens are omitted, which is logged. Default: the maximum sequence length of
            the model.

    Raises:
        MiniGPTError: if the tokenizer has no tokens of ChatML, or no conversation is left, or the loss is not finite.
    """
    longest = longest_context(model)
    block_size = longest if block_size is None else min(block_size, longest)
    chat_format = ChatFormat(tokenizer)
    if tokenizer.chat_template not in (None, CHAT_TEMPLATE):
        logger.warning(
            "the conversations are encoded in ChatML, not by the chat template of the model, which differs: "
            "this is not the loss of answers to its own prompts"
        )
    encoded = EncodedConversations(conversations, chat_format, block_size)
    nats, tokens, count = score_conversations(model, encoded, chat_format, batch_size)
    if encoded.omitted:
        logger.warning(
            "%s of %s conversations have more than %s tokens and are not scored",
            *(f"{encoded.omitted:,}", f"{encoded.omitted + count:,}", f"{block_size:,}"),
        )
    if not count:
        raise MiniGPTError("there is no conversation to evaluate: give shorter ones, or a higher --block_size")
    if not math.isfinite(nats):
        raise MiniGPTError(f"the loss of the model is {nats}: its weights or activations are not finite")
    return summarize(nats / tokens, tokens, encoded.answer_bytes, count, count, block_size, 0)


def _score(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], rank: int, world_size: int
) -> tuple[float, int]:
    """Sum the negative log-likelihood of labels in nats, and count them, in every `world_size`-th batch from `rank` on.

    All ranks make equally many forward passes, because sharded parameters (FSDP) are gathered by all ranks together.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, tokens, index = torch.zeros((), dtype=torch.float64), 0, -1
    for index, (inputs, labels) in enumerate(batches):
        if index % world_size == rank:
            with torch.no_grad():
                logits = model(input_ids=inputs.to(device), use_cache=False).logits
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten().to(device), ignore_index=IGNORE_INDEX, reduction="none"
            )
            nats += losses.cpu().double().sum()
            tokens += int((labels != IGNORE_INDEX).sum())
    if rank > index % world_size:  # the last round has a batch for the first ranks only
        with torch.no_grad():
            model(input_ids=inputs.to(device), use_cache=False)
    model.train(was_training)
    return nats.item(), tokens


def windows(
    document: np.ndarray, bos_token_id: int, block_size: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the inputs and labels of each window of a document, two arrays of equal length ≤ `block_size`.

    d₁ d₂ d₃ in windows of 2 tokens, E the BOS token: (E d₁, d₁ d₂), (d₂, d₃); with stride 1: (E d₁, d₁ d₂), (d₁ d₂, – d₃).
    """
    sequence = np.concatenate([[bos_token_id], document])  # position t is the input whose label is position t + 1
    num_scored = 0
    for start in range(0, len(document), stride):
        end = min(start + block_size, len(document))
        labels = sequence[start + 1 : end + 1].copy()
        labels[: num_scored - start] = IGNORE_INDEX
        yield sequence[start:end], labels
        if end == len(document):
            break
        num_scored = end


def _batches(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], batch_size: int, padding_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Collate windows into inputs and labels [B, T], padded on the right, which does not affect causal attention."""
    batch: list[tuple[np.ndarray, np.ndarray]] = []

    def collated() -> tuple[torch.Tensor, torch.Tensor]:
        length = max(len(inputs) for inputs, _ in batch)
        batch_inputs = np.full((len(batch), length), padding_id, dtype=np.int64)
        batch_labels = np.full((len(batch), length), IGNORE_INDEX, dtype=np.int64)
        for row, (inputs, labels) in enumerate(batch):
            batch_inputs[row, : len(inputs)] = inputs
            batch_labels[row, : len(labels)] = labels
        return torch.from_numpy(batch_inputs), torch.from_numpy(batch_labels)

    for pair in pairs:
        batch.append(pair)
        if len(batch) == batch_size:
            yield collated()
            batch = []
    if batch:
        yield collated()
