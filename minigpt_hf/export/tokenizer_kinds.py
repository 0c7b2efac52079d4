"""Identify the tokenizers that the export formats can express: byte-level BPE with a known pre-tokenizer, and characters."""

import json
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# Usual name -> equivalent pre-tokenizer. Others, such as `gpt-4o`, are similar but not equivalent.
PRE_TOKENIZERS = {
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"), BYTE_LEVEL]),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
CHARACTERS = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")


def pre_tokenizer_name(words: dict[str, Any] | None) -> str | None:
    """Return the key of `PRE_TOKENIZERS` that equals the `pre_tokenizer` of a `tokenizer.json`; None if there is none."""
    equal = (name for name, known in PRE_TOKENIZERS.items() if _normalized(words) == _normalized(serialized(known)))
    return next(equal, None)


def bpe_obstacle(model: dict[str, Any]) -> str | None:
    """Return the first option of a BPE model that plain byte-level BPE lacks; None if there is none."""
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            return f"its BPE model has {name} {model[name]!r}"
    for name in ("fuse_unk", "byte_fallback", "ignore_merges"):
        if model[name]:
            return f"its BPE model has {name}"
    return None


def serialized(pre_tokenizer: pre_tokenizers.PreTokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json` for a pre-tokenizer."""
    return json.loads(pre_tokenizer.__getstate__())


def _normalized(words: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove `trim_offsets`, which does not affect token ids."""
    if words is None:
        return None
    steps = [_normalized(step) for step in words.get("pretokenizers", [])]
    return {name: value for name, value in words.items() if name not in ("trim_offsets", "pretokenizers")} | {
        "steps": steps
    }
