"""Convert a tokenizer to the vocabulary of a GGUF file.

llama.cpp implements byte-level BPE: the text is split into words by a pre-tokenizer that it knows by name, each word is
written as bytes (each byte as a printable character), and adjacent pairs are merged. Tokenizers to which llama.cpp would
assign other token ids are rejected.

A character tokenizer can be expressed as byte-level BPE: each character is a token, and its merges join its UTF-8 bytes.
No merge joins bytes of two characters, since no character begins with a continuation byte; so every character
becomes one token, regardless of its neighbors.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from ..errors import MiniGPTError
from .tokenizer_kinds import BYTE_LEVEL, CHARACTERS, PRE_TOKENIZERS, bpe_obstacle, pre_tokenizer_name, serialized

# llama.cpp treats tokens with names such as `<eos>`, `[EOT]`, `_<EOT>` as special, even if the file marks them as normal.
SPECIAL_NAME = re.compile(r"_?[<\[].*[A-Za-z].*[>\[\]]")
# llama.cpp requires at least one merge. These two bytes do not occur in UTF-8.
UNUSED_MERGE = "ÿ À"


@dataclass
class Vocabulary:
    """Vocabulary of a GGUF file.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: Token of each id.
        types: Type of each id.
        merges: Merges "left right" by decreasing priority.
    """

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Convert a tokenizer.

    Args:
        rows: Number of embeddings of the model; those without a token are marked as unused.

    Raises:
        MiniGPTError: if llama.cpp would not encode every text to the same token ids.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = settings["model"], settings["added_tokens"]
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise MiniGPTError(
            f"the largest token id is {largest}, but the model has only {rows} embeddings: use its tokenizer"
        )
    if settings["normalizer"] is not None:
        raise _unsupported(f"its normalizer {settings['normalizer']['type']} is not supported by llama.cpp")
    if tokenizer.num_special_tokens_to_add():
        raise _unsupported("it adds special tokens to every text")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _unsupported(f"its token {token['content']!r} includes adjacent white space (lstrip, single_word …)")
    if model["type"] == "BPE":
        pre, tokens, merges = _byte_level_bpe(model, settings["pre_tokenizer"])
    elif model["type"] == "WordLevel" and settings["pre_tokenizer"] == serialized(CHARACTERS):
        if model["unk_token"] in model["vocab"]:
            raise _unsupported(f"it encodes unknown characters as {model['unk_token']!r}, llama.cpp drops them")
        pre, tokens, merges = _characters(model, {token["content"] for token in added})
    else:
        raise _unsupported(f"llama.cpp has no {model['type']} tokenizer with this pre-tokenizer")

    vocabulary = Vocabulary(
        pre, [f"[unused{i}]" for i in range(rows)], [TokenType.UNUSED] * rows, merges or [UNUSED_MERGE]
    )
    names = {token["content"] for token in added}
    for token, i in tokens.items():
        if token not in names and SPECIAL_NAME.fullmatch(token):
            raise _unsupported(f"its ordinary token {token!r} would be treated as special by llama.cpp")
        vocabulary.tokens[i], vocabulary.types[i] = token, TokenType.NORMAL
    for token in added:
        vocabulary.tokens[token["id"]] = token["content"]
        vocabulary.types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return vocabulary


def _byte_level_bpe(model: dict, words: dict | None) -> tuple[str, dict[str, int], list[str]]:
    """Return llama.cpp's name of the pre-tokenizer, the ids by token, and the merges."""
    if obstacle := bpe_obstacle(model):
        raise _unsupported(obstacle)
    if pre := pre_tokenizer_name(words):
        return pre, model["vocab"], [" ".join(pair) for pair in model["merges"]]
    raise _unsupported(f"its pre-tokenizer is not one of {', '.join(PRE_TOKENIZERS)}")


def _characters(model: dict, added: set[str]) -> tuple[str, dict[str, int], list[str]]:
    """Express a character tokenizer as byte-level BPE; see `_byte_level_bpe` for the result."""
    tokens: dict[str, int] = {}
    merges: dict[str, None] = {}  # an ordered set
    for character, i in model["vocab"].items():
        if character in added:
            continue
        ((spelling, _),) = BYTE_LEVEL.pre_tokenize_str(character)
        tokens[spelling] = i
        merges |= {f"{spelling[:end]} {spelling[end]}": None for end in range(1, len(spelling))}
    return "qwen2", tokens, list(merges)


def merged(word: str, ranks: dict[str, int]) -> list[str]:
    """Apply BPE to a word by its definition: repeatedly merge the adjacent pair of lowest rank.

    >>> merged("abc", {"b c": 0, "a b": 1})
    ['a', 'bc']
    """
    parts = list(word)
    while pairs := [f"{left} {right}" for left, right in pairwise(parts)]:
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def encoded(text: str, vocabulary: Vocabulary) -> list[int | None]:
    """Encode a text without special tokens, using only the vocabulary; `None` for a part that is not a token."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    ranks = {merge: i for i, merge in enumerate(vocabulary.merges)}
    words = [word for word, _ in PRE_TOKENIZERS[vocabulary.pre].pre_tokenize_str(text)]
    return [ids.get(part) for word in words for part in merged(word, ranks)]


def _unsupported(reason: str) -> MiniGPTError:
    return MiniGPTError(f"the tokenizer cannot be represented in GGUF: {reason}; use `--to native` or `--to onnx`")
