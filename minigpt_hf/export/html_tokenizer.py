"""Express a tokenizer and a chat template as data of the HTML page, for `page/tokenizer.js` and `page/gpt.js`.

Tokenizers to which the page would assign other token ids are rejected. Of the chat templates, only ChatML is supported; a
model with another one continues text.
"""

import json
from typing import Any

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from ..errors import MiniGPTError
from .tokenizer_kinds import BYTE_LEVEL, CHARACTERS, bpe_obstacle, pre_tokenizer_name, serialized

# What a template may consist of to be rendered: it cannot call anything, nest loops, or let a variable grow.
TEMPLATE_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.CondExpr),
    *(nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Const, nodes.Compare, nodes.Operand, nodes.Test),
    *(nodes.Add, nodes.Concat, nodes.And, nodes.Or, nodes.Not),
)
GROWING = (nodes.Add, nodes.Concat)


class NotInPage(MiniGPTError):
    """The page cannot represent a model or its tokenizer."""


def page_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """Return the arguments of the constructor of `Tokenizer` in `page/tokenizer.js`.

    Args:
        rows: Number of embeddings of the model.

    Raises:
        NotInPage: if the page would not encode and decode every text to the same token ids and back.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = settings["model"], settings["added_tokens"]
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise MiniGPTError(
            f"the largest token id is {largest}, but the model has only {rows} embeddings: use its tokenizer"
        )
    normalizer = (settings["normalizer"] or {"type": None})["type"]
    if normalizer not in (None, "NFC"):
        raise _unsupported(f"it has the normalizer {normalizer}")
    if tokenizer.num_special_tokens_to_add():
        raise _unsupported("it adds special tokens to every text")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"]:
            raise _unsupported(f"its token {token['content']!r} includes adjacent white space (lstrip, single_word …)")
    decoder = (settings["decoder"] or {"type": None})["type"]
    vocabulary, merges, pattern = model.get("vocab"), [], None
    if model["type"] == "BPE":
        if obstacle := bpe_obstacle(model):
            raise _unsupported(obstacle)
        if missing := [byte for byte in BYTE_LEVEL.alphabet() if byte not in vocabulary]:
            raise _unsupported(f"it has no token for {len(missing)} of the 256 bytes")
        pattern = pre_tokenizer_name(settings["pre_tokenizer"])
        merges = [[vocabulary[left], vocabulary[right], vocabulary[left + right]] for left, right in model["merges"]]
        is_known = pattern is not None and decoder == "ByteLevel"
    else:
        is_known = model["type"] == "WordLevel" and settings["pre_tokenizer"] == serialized(CHARACTERS)
        is_known = is_known and decoder == "Fuse" and model["unk_token"] not in vocabulary
    if not is_known:
        raise _unsupported(
            f"it is neither byte-level BPE as in Qwen2 or GPT-2 nor a character tokenizer ({model['type']})"
        )
    tokens: list[str | None] = [None] * rows
    for token, i in [*vocabulary.items(), *((token["content"], token["id"]) for token in added)]:
        tokens[i] = token
    return {
        "kind": "bpe" if model["type"] == "BPE" else "characters",
        "pattern": pattern,
        "nfc": normalizer == "NFC",
        "tokens": tokens,
        "merges": merges,
        "added": [token["id"] for token in added if not token["special"]],
        "special": [token["id"] for token in added if token["special"]],
    }


def chat_format(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return ids and default system message of a ChatML template; None if the tokenizer has no template or another one."""
    template, special = tokenizer.chat_template, set(tokenizer.all_special_ids)
    start, end = (tokenizer.get_vocab().get(token) for token in ("<|im_start|>", "<|im_end|>"))
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not isinstance(template, str) or start not in special or end not in special or not _is_bounded(template):
        return None

    def rendered(*messages: tuple[str, str]) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    def chatml(*messages: tuple[str, str]) -> str:
        turns = (f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
        return "".join(turns) + "<|im_start|>assistant\n"

    question, several = ("user", " a\n"), [("user", "b"), ("assistant", " c "), ("user", "d")]
    try:
        prompt, system = rendered(question), None
        if prompt != chatml(question):
            system = prompt.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n" + chatml(question))
        default = [] if system is None else [("system", system)]
        is_chatml = all(
            rendered(*messages) == chatml(*([] if messages[0][0] == "system" else default), *messages)
            for messages in ([question], several, [("system", "e"), *several])
        )
    except Exception:  # a template may raise any exception
        return None
    return {"start": start, "end": end, "system": system} if is_chatml else None


def _is_bounded(template: str) -> bool:
    """Whether rendering takes time and memory in proportion to the template and the messages."""
    try:
        tree = jinja2.Environment().parse(template)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return False

    def is_bounded(node: nodes.Node, in_loop: bool) -> bool:
        if isinstance(node, nodes.Call):
            return isinstance(node.node, nodes.Name) and node.node.name == "raise_exception"
        if isinstance(node, nodes.Filter):
            return node.name == "trim" and all(is_bounded(child, in_loop) for child in node.iter_child_nodes())
        if not isinstance(node, TEMPLATE_NODES) or (in_loop and isinstance(node, nodes.For)):
            return False
        if isinstance(node, nodes.Assign) and (isinstance(node.node, GROWING) or list(node.node.find_all(GROWING))):
            return False
        children = node.iter_child_nodes()
        return all(is_bounded(child, in_loop or isinstance(node, nodes.For)) for child in children)

    return len(template) < 100_000 and is_bounded(tree, False)


def _unsupported(reason: str) -> NotInPage:
    return NotInPage(f"the tokenizer cannot be represented in the page: {reason}")
