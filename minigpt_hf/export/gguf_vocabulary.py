"""A tokenizer -> the vocabulary of a GGUF file, in llama.cpp's words.

In: a fast tokenizer. Out: its tokens by id, what each is for, its merges, and the name under which llama.cpp knows how it
cuts text into words. It refuses every tokenizer of which llama.cpp would make other ids.

llama.cpp has byte-level BPE: each word is spelt in bytes (each byte written as a printable character), then merged pair
by pair. A character tokenizer is one of these, too: a character is a token, and the bytes it is spelt with in UTF-8 are
merged into it and into nothing else. No merge joins the bytes of two characters, since none begins with a continuation
byte; so what comes out is one token a character, whatever stands beside it.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise

from gguf import TokenType
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from ..errors import MiniGPTError

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# How llama.cpp cuts words, under the name it has for each. Others look alike and are not (`gpt-4o` differs, for one).
WORDS = {
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"), BYTES]),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
CHARACTERS = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
# llama.cpp knows special tokens by names such as `<eos>`, `[EOT]`, `_<EOT>`, also where the file calls them ordinary.
SPECIAL_NAME = re.compile(r"_?[<\[].*[A-Za-z].*[>\[\]]")
# llama.cpp opens no vocabulary without merges. These two bytes occur in no UTF-8 text.
NEVER = "ÿ À"


@dataclass
class Vocabulary:
    """`tokens[i]` and `types[i]` describe id i; a merge is "left right", the most urgent first."""

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer for a model with `rows` embeddings; rows without a token are marked as unused.

    Raises:
        MiniGPTError: if llama.cpp would not make the same ids of every text that this tokenizer can encode.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = settings["model"], settings["added_tokens"]
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise MiniGPTError(f"the tokenizer has ids up to {largest}, and the model embeddings for {rows} of them")
    if settings["normalizer"] is not None:
        raise _refusal(f"it rewrites text first ({settings['normalizer']['type']}), which llama.cpp does not")
    if tokenizer.num_special_tokens_to_add():
        raise _refusal("it adds tokens of its own to every text")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refusal(f"its token {token['content']!r} takes the white space beside it along")
    if model["type"] == "BPE":
        pre, tokens, merges = _byte_level_bpe(model, settings["pre_tokenizer"])
    elif model["type"] == "WordLevel" and settings["pre_tokenizer"] == _described(CHARACTERS):
        pre, tokens, merges = _characters(model, {token["content"] for token in added})
    else:
        raise _refusal(f"llama.cpp has no tokenizer of the kind {model['type']} that cuts words like this one")

    vocabulary = Vocabulary(
        pre, [f"[unused{i}]" for i in range(rows)], [TokenType.UNUSED] * rows, [" ".join(pair) for pair in merges]
    )
    names = {token["content"] for token in added}
    for token, i in tokens.items():
        if token not in names and SPECIAL_NAME.fullmatch(token):
            raise _refusal(f"its token {token!r} is an ordinary one, which llama.cpp would take for a special one")
        vocabulary.tokens[i], vocabulary.types[i] = token, TokenType.NORMAL
    for token in added:
        vocabulary.tokens[token["id"]] = token["content"]
        vocabulary.types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    vocabulary.merges = vocabulary.merges or [NEVER]
    return vocabulary


def _byte_level_bpe(model: dict, words: dict | None) -> tuple[str, dict[str, int], list[list[str]]]:
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise _refusal(f"it is a BPE with {name} {model[name]!r}")
    for name in ("fuse_unk", "byte_fallback", "ignore_merges"):
        if model[name]:
            raise _refusal(f"it is a BPE with {name}")
    for pre, known in WORDS.items():
        if _plain(words) == _plain(_described(known)):
            return pre, model["vocab"], model["merges"]
    raise _refusal(f"of the ways to cut words, llama.cpp is known to share those of {' and '.join(WORDS)}")


def _characters(model: dict, added: set[str]) -> tuple[str, dict[str, int], list[tuple[str, str]]]:
    tokens, merges = {}, {}  # a dict for an ordered set
    for character, i in model["vocab"].items():
        if character in added:
            continue
        ((spelling, _),) = BYTES.pre_tokenize_str(character)
        tokens[spelling] = i
        merges |= {(spelling[:end], spelling[end]): None for end in range(1, len(spelling))}
    return "qwen2", tokens, list(merges)


def merged(word: str, urgency: dict[str, int]) -> list[str]:
    """What BPE makes of a word, straight from its definition: of all neighbours, join the most urgent pair; again.

    >>> merged("abc", {"b c": 0, "a b": 1})
    ['a', 'bc']
    """
    parts = list(word)
    while pairs := [f"{left} {right}" for left, right in pairwise(parts)]:
        best = min(pairs, key=lambda pair: urgency.get(pair, len(urgency)))
        if best not in urgency:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def encoded(text: str, vocabulary: Vocabulary) -> list[int | None]:
    """Ids of a text without special tokens, computed from the vocabulary alone; `None` for a part that is no token."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    urgency = {merge: i for i, merge in enumerate(vocabulary.merges)}
    words = [word for word, _ in WORDS[vocabulary.pre].pre_tokenize_str(text)]
    return [ids.get(part) for word in words for part in merged(word, urgency)]


def _described(pre_tokenizer: pre_tokenizers.PreTokenizer) -> dict:
    """What `tokenizer.json` says of it."""
    return json.loads(pre_tokenizer.__getstate__())


def _plain(described: dict | None) -> dict | None:
    """Without `trim_offsets`, which moves no token."""
    if described is None:
        return None
    steps = [_plain(step) for step in described.get("pretokenizers", [])]
    return {name: value for name, value in described.items() if name not in ("trim_offsets", "pretokenizers")} | {
        "steps": steps
    }


def _refusal(reason: str) -> MiniGPTError:
    return MiniGPTError(f"this tokenizer has no faithful form in GGUF: {reason}; `--to native` and `--to onnx` keep it")
