"""Conversations for supervised fine-tuning: rows of a table → messages → token stream.

A row has one of these layouts, which are recognized by the names of its columns:

    messages                        [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]
    conversations                   [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]  (ShareGPT)
    prompt, completion              a question and its answer; strings, or lists of messages
    instruction, input, output      an instruction, optionally with an input, and its answer  (Alpaca)

A column `system` is the system message of a row. Other columns, and other values in a message, are not read.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .cache import cached
from .chat_format import ChatFormat, EncodedConversations, Message
from .documents import Documents
from .stream import TokenStream, stream_fingerprint
from .tokenizer import bos_token_id, vocabulary_size

ROLES = dict.fromkeys(("system",), "system") | dict.fromkeys(("user", "human"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "bot"), "assistant")
SYSTEM = "system"
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", SYSTEM)
LAYOUTS = "messages; conversations; prompt and completion; instruction and output"
VERSION = 1  # version of the token layout, part of the fingerprint of a stream

# -- rows → messages --------------------------------------------------------------------------------------------------


def messages_of(row: dict[str, Any], system: str | None = None) -> list[Message]:
    """Return the messages of a row of a table.

    Args:
        row: Values by column.
        system: Content of a system message for conversations that have none.

    Raises:
        ValueError: with the reason, if the row has none of the layouts or cannot be trained on.
    """
    columns = columns_of(row)
    if columns == ("instruction", "input", "output"):
        context = "" if row.get("input") is None else _string(row, "input")
        question = _string(row, "instruction") + (f"\n\n{context}" if context else "")
        messages = [_as_message("user", question), _as_message("assistant", _string(row, "output"))]
    elif columns == ("prompt", "completion"):
        messages = _side(row, "prompt", "user") + _side(row, "completion", "assistant")
    else:
        messages = [_message(each) for each in _list(row, columns[0])]
    has_system = bool(messages) and messages[0]["role"] == "system"
    if row.get(SYSTEM) not in (None, ""):
        if has_system:
            raise ValueError(f"has a system message in the column {SYSTEM!r} and another in its messages")
        messages.insert(0, _as_message("system", _string(row, SYSTEM)))
    elif system is not None and messages and not has_system:
        messages.insert(0, _as_message("system", system))
    _check(messages)
    return messages


def columns_of(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns of the layout of a row.

    Raises:
        ValueError: if it has none of the layouts.
    """
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return (column,)
    if row.get("prompt") is not None and "completion" in row:
        return "prompt", "completion"
    if row.get("instruction") is not None and "output" in row:
        return "instruction", "input", "output"
    raise ValueError(f"is not a conversation: it has the columns {', '.join(row) or 'none'}, not {LAYOUTS}")


@dataclass
class Unread:
    """Names of what rows have in addition to their conversations.

    Attributes:
        columns: Columns with values.
        of_messages: Keys of messages with values.
    """

    columns: set[str] = field(default_factory=set)
    of_messages: set[str] = field(default_factory=set)

    def add(self, row: dict[str, Any]) -> None:
        """Add the names of a row for which `messages_of` raises no error."""
        columns = columns_of(row)
        self.columns |= _names_of_values(row) - {*columns, SYSTEM}
        for messages in (row[column] for column in columns if isinstance(row.get(column), list)):
            for message in messages:
                read = ("role", "content") if "role" in message else ("from", "value")
                self.of_messages |= _names_of_values(message) - {*read}

    def __str__(self) -> str:
        of_messages = f"of messages: {', '.join(sorted(self.of_messages))}" if self.of_messages else ""
        return "; ".join(filter(None, (", ".join(sorted(self.columns)), of_messages)))


def _names_of_values(values: dict[str, Any]) -> set[str]:
    """Names of values that are not missing; an empty field of CSV is."""
    return {name for name, value in values.items() if value is not None and value != ""}


def _check(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError("has no message of an assistant, so there is nothing to learn from it")
    for number, (message, previous) in enumerate(zip(messages, [None, *roles], strict=False), 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"has an empty answer (message {number})")
        if message["role"] == "assistant" == previous:
            raise ValueError(f"has two assistant messages in a row (message {number})")
        if message["role"] == "system" and number > 1:
            raise ValueError(f"has a system message that is not the first message (message {number})")


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"has a message that is {_abbreviated(value)}, not an object")
    role_key, content_key = ("role", "content") if "role" in value else ("from", "value")
    if value.get(role_key) not in ROLES:
        raise ValueError(f"has a message of role {_abbreviated(value.get(role_key))}; known roles: {', '.join(ROLES)}")
    return _as_message(ROLES[value[role_key]], _string(value, content_key))


def _side(row: dict[str, Any], column: str, role: str) -> list[Message]:
    """The messages of `prompt` or `completion`."""
    if isinstance(row[column], list):
        return [_message(each) for each in row[column]]
    return [_as_message(role, _string(row, column))]


def _as_message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _list(row: dict[str, Any], column: str) -> list[Any]:
    if not isinstance(row[column], list):
        raise ValueError(f"has the value {_abbreviated(row[column])} in {column!r}, not a list of messages")
    return row[column]


def _string(values: dict[str, Any], name: str) -> str:
    if not isinstance(value := values.get(name), str):
        raise ValueError(f"has the value {_abbreviated(value)} in {name!r}, not a string")
    return value


def _abbreviated(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:40]}…"


def serialize(messages: list[Message]) -> str:
    """Return messages as a document: the JSON of [[role, content], …]."""
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def deserialize(document: str) -> list[Message]:
    """Return the messages of a document written by `serialize`."""
    return [_as_message(role, content) for role, content in json.loads(document)]


def conversations_in(documents: Documents) -> Iterator[list[Message]]:
    """Yield the conversations of serialized documents."""
    document = ""
    for starts_document, text in documents.parts():
        if starts_document and document:
            yield deserialize(document)
            document = ""
        document += text
    if document:
        yield deserialize(document)


def has_system_message(documents: Documents, system: str) -> bool:
    """Whether a serialized conversation starts with this system message."""
    start = [_as_message("system", system)]
    return any(messages[:1] == start for messages in conversations_in(documents))


def contents_of(documents: Documents) -> Iterator[str]:
    """Yield the contents of the messages of serialized conversations, preceded by their roles as in ChatML."""
    for messages in conversations_in(documents):
        for message in messages:
            yield f"{message['role']}\n{message['content']}"


# -- messages → token stream -------------------------------------------------------------------------------------------


def build_conversation_stream(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    cache_dir: Path,
    progress: Callable[[int], None] = lambda conversations: None,
) -> TokenStream:
    """Encode conversations into a token stream, or return the cached one; see `stream` for the files.

    `targets` and `bytes` of the stream refer to the answers.

    Args:
        documents: Serialized conversations.
        block_size: Longer conversations are omitted.
        progress: Called with 1 after each conversation, including omitted ones.
    """
    fingerprint = f"{stream_fingerprint(documents, tokenizer)}-chat{VERSION}-{block_size}"

    def conversations() -> Iterator[list[Message]]:
        for messages in conversations_in(documents):
            yield messages
            progress(1)

    def write(folder: Path) -> None:
        dtype = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2**16 else "<u4")
        chat_format, bos = ChatFormat(tokenizer), bos_token_id(tokenizer)
        encoded = EncodedConversations(conversations(), chat_format, block_size)
        offsets, written, targets = [], 0, 0
        with (folder / "tokens.bin").open("wb") as file:
            for ids in encoded:
                offsets.append(written)
                file.write(np.concatenate([[bos], ids]).astype(dtype).data)
                written += 1 + len(ids)
                targets += int(chat_format.is_answer(ids).sum())
        np.save(folder / "documents.npy", np.array(offsets, dtype=np.int64))
        metadata = {
            "dtype": dtype.str,
            "end_of_text": bos,
            "tokens": written,
            "documents": len(offsets),
            "targets": targets,
            "characters": encoded.characters,
            "bytes": encoded.answer_bytes,
            "fingerprint": fingerprint,
        }
        (folder / "stream.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")

    return cached(cache_dir / "streams" / fingerprint, write, TokenStream.open, cache_dir, "token stream")
