"""ChatML, the chat format of Qwen: messages → token ids, and which of them belong to answers.

    <|im_start|>user
    What is the capital of France?<|im_end|>
    <|im_start|>assistant
    Paris<|im_end|>

The loss is that of the answers: the tokens of the contents of assistant messages and their `<|im_end|>`. The content of a
message is encoded as text, so a string such as `<|im_end|>` in it never becomes a special token.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import MiniGPTError
from .encoding import Encoder, UnknownCharacterError

START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
IGNORE_INDEX = -100  # label of tokens that have no loss

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}


def with_reserved_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add the special tokens of ChatML to a tokenizer that lacks them, without a chat template.

    Ordinary tokens of these names become special tokens.
    """
    missing = [token for token in (START, END) if token not in special_tokens(tokenizer)]
    tokenizer.add_special_tokens({"additional_special_tokens": missing} if missing else {})
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the special tokens, which `split_special_tokens=True` never produces from text."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def with_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add the tokens of ChatML to a tokenizer that lacks them, and set the chat template and the EOS token `<|im_end|>`."""
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token  # continues to separate documents
    with_reserved_tokens(tokenizer)
    tokenizer.eos_token = END
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def last_question(messages: Iterable[Message]) -> str:
    """Return the content of the last message of a user; "" if there is none."""
    return next((message["content"] for message in reversed([*messages]) if message["role"] == "user"), "")


def system_message(messages: Iterable[Message]) -> str | None:
    """Return the content of the system message; `None` if there is none."""
    return next((message["content"] for message in messages if message["role"] == "system"), None)


class ChatFormat:
    """Encodes conversations with a tokenizer that has the tokens of ChatML.

    Raises:
        MiniGPTError: if the tokenizer lacks them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        vocabulary = tokenizer.get_vocab()
        if not {START, END} <= special_tokens(tokenizer):
            raise MiniGPTError(
                f"the tokenizer has no special tokens {START} and {END}: train the model with --recipe chat, or give another "
                "one"
            )
        self.tokenizer = tokenizer
        self.start, self.end = vocabulary[START], vocabulary[END]
        self.encoder = Encoder(tokenizer.backend_tokenizer.to_str())
        self.assistant = self._text("assistant\n")

    def __reduce__(self):
        return ChatFormat, (self.tokenizer,)  # the engine of an encoder cannot be pickled

    def encode(self, messages: Iterable[Message], add_generation_prompt: bool = False) -> np.ndarray:
        """Return the ids of messages, those that the chat template produces for contents without special tokens.

        Args:
            add_generation_prompt: Append the start of an assistant message, which the model continues.
        """
        parts: list[Any] = []
        newline = self._text("\n")
        for message in messages:
            parts += [[self.start], self._message(message), [self.end], newline]
        if add_generation_prompt:
            parts += [[self.start], self.assistant]
        return np.concatenate(parts).astype(np.int64)

    def _message(self, message: Message) -> np.ndarray:
        ids = self._text(f"{message['role']}\n{message['content']}")
        prefix = self.assistant
        if message["role"] == "assistant" and not np.array_equal(ids[: len(prefix)], prefix):
            # The first token of the answer would include the line feed before it. In generation, the prompt ends there.
            return np.concatenate([prefix, self._text(message["content"])])
        return ids

    def is_answer(self, ids: np.ndarray) -> np.ndarray:
        """Mark the answers in the ids of conversations: contents of assistant messages and their `<|im_end|>`.

        Args:
            ids: [N], complete messages.

        Returns:
            [N], boolean.
        """
        starts, ends = np.flatnonzero(ids == self.start), np.flatnonzero(ids == self.end)
        header = np.arange(1, len(self.assistant) + 1)
        of_assistant = (ids[np.minimum(starts[:, None] + header, len(ids) - 1)] == self.assistant).all(axis=1)
        change = np.zeros(len(ids) + 1, dtype=np.int8)
        change[starts[of_assistant] + len(self.assistant) + 1] += 1
        change[ends[of_assistant] + 1] -= 1
        return np.cumsum(change[:-1]).astype(bool)

    def question(self, ids: np.ndarray) -> list[Message]:
        """Return the messages of a conversation before its first answer, given its ids; empty if it starts with an answer."""
        ids = np.asarray(ids)
        starts, ends = np.flatnonzero(ids == self.start), np.flatnonzero(ids == self.end)
        messages = []
        for start, end in zip(starts, ends, strict=True):
            role, _, content = self.tokenizer.decode(ids[start + 1 : end].tolist()).partition("\n")
            if role == "assistant":
                break
            messages.append({"role": role, "content": content})
        return messages

    def have_other_system(self, conversations: Iterable[np.ndarray], system: str | None) -> bool:
        """Whether a conversation, given its ids, starts with a system message other than `system`."""
        try:
            header = np.array([self.start, *self._text("system")])
        except UnknownCharacterError:  # no conversation has a system message
            return False
        known = None
        if system is not None:
            with suppress(UnknownCharacterError):  # no conversation has this one
                known = self.encode([{"role": "system", "content": system}])[:-1]
        return any(
            np.array_equal(ids[: len(header)], header)
            and (known is None or not np.array_equal(ids[: len(known)], known))
            for ids in conversations
        )

    def questions(self, conversations: Iterable[np.ndarray], number: int) -> list[Any]:
        """Return `question` of each of the first `number` conversations."""
        return [self.question(ids) for ids in islice(conversations, number)]

    def _text(self, text: str) -> np.ndarray:
        return np.asarray(self.encoder(text), dtype=np.int64)


@dataclass
class EncodedConversations:
    """Iterates over the ids of conversations, up to their last `<|im_end|>`, and counts them.

    Conversations of more than `block_size` input tokens are omitted; the last `<|im_end|>` is only a label.

    Attributes:
        answer_bytes: UTF-8 bytes of the answers so far.
        characters: Characters of all contents so far.
        omitted: Number of omitted conversations so far.
    """

    conversations: Iterable[list[Message]]
    chat_format: ChatFormat
    block_size: int
    answer_bytes: int = 0
    characters: int = 0
    omitted: int = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for messages in self.conversations:
            ids = self.chat_format.encode(messages)
            ids = ids[: np.flatnonzero(ids == self.chat_format.end)[-1] + 1]
            if len(ids) - 1 > self.block_size:
                self.omitted += 1
                continue
            contents = [(message["role"], message["content"]) for message in messages]
            self.characters += sum(len(content) for _, content in contents)
            self.answer_bytes += sum(len(content.encode()) for role, content in contents if role == "assistant")
            yield ids
