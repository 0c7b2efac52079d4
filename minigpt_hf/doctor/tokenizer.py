"""Checks of the tokenizer: it loads, is lossless, fits the embedding, and its EOS token stops generation.

They use the `tokenizers` library and run in a separate process, because a crafted `tokenizer.json` can hang or crash it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .code import GENERATION_TAG, chat_template, chat_templates
from .config import size
from .folder import Folder, Unreadable, is_minigpt
from .row import NotApplicable, Row, check, failed, in_one_line, passed, some

TEXTS = (
    "Hello, world! It's 2026.",
    "def f(x):\n\treturn {'a': x[0] ** 2}  # two  spaces\r\n\n",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e, \u05e9\u05dc\u05d5\u05dd, \U0001f600\u200d\U0001f4bb",
    "e\u0301 and \u00e9 are two spellings",
)
LONGEST_PADDING = 1_000_000  # tokens
OWN_KINDS = ("byte-level BPE", "bytes", "characters")  # `kind` of the tokenizer in `minigpt.json`
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


def load(folder: Folder) -> Tokenizer:
    """The tokenizer of `tokenizer.json`, without padding and truncation."""
    try:
        tokenizer = Tokenizer.from_str(folder.text("tokenizer.json"))
    except Unreadable:
        raise
    except Exception as error:  # `tokenizers` raises plain `Exception`
        raise NotApplicable(f"tokenizer.json does not load: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def specials(folder: Folder) -> dict[str, str]:
    """The special tokens of `tokenizer_config.json`: {"eos_token": "<|endoftext|>", …}."""
    settings = folder.json("tokenizer_config.json")
    named = {name: settings.get(name) for name in SPECIALS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def texts_of(tokenizer: Tokenizer) -> list[str]:
    """Test texts: `TEXTS`, or all characters of a character-level vocabulary that does not contain those of `TEXTS`."""
    try:
        for text in TEXTS:
            tokenizer.encode(text, add_special_tokens=False)
        return list(TEXTS)
    except Exception:  # `tokenizers` raises plain `Exception` for a character without an id
        return ["".join(sorted(token for token in tokenizer.get_vocab(with_added_tokens=False) if len(token) == 1))]


def described(folder: Folder) -> dict[str, Any]:
    """What `minigpt.json` states of the tokenizer; empty if it states nothing."""
    about: Any = folder.json_if_there("minigpt.json").get("tokenizer")
    return about if isinstance(about, dict) else {}


def has_own_tokenizer(folder: Folder) -> bool:
    """Whether the tokenizer is one of this package, as far as is known, and not that of another model."""
    return is_minigpt(folder) and described(folder).get("kind", OWN_KINDS[0]) in OWN_KINDS


@check("tokenizer")
def loads(folder: Folder) -> Row:
    text = folder.text("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises plain `Exception`
        return failed(f"tokenizer.json does not load: {error}", "restore it from the original folder")
    padding = tokenizer.padding or {}
    length = max(padding.get("length") or 0, padding.get("pad_to_multiple_of") or 0)
    if length > LONGEST_PADDING:
        return failed(f"tokenizer.json pads every text to {length:,} tokens", "set `padding` to null in tokenizer.json")
    return passed(f"{type(tokenizer.model).__name__}, {tokenizer.get_vocab_size()} tokens")


@check("tokenizer round trip")
def round_trip(folder: Folder) -> Row:
    """MiniGPT tokenizers are lossless. Others may normalize a text (leading space, lower case), but must be idempotent,
    unless `minigpt.json` states what the tokenizer that the model was trained with loses."""
    tokenizer, ours = load(folder), has_own_tokenizer(folder)
    if described(folder).get("lossy"):
        return passed("does not reproduce every text, as minigpt.json states")
    tokenizer.encode_special_tokens = True

    def there_and_back(text: str) -> str:
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)

    for text in texts_of(tokenizer):
        back = there_and_back(text)
        if (ours and back != text) or there_and_back(back) != back or not back.strip():
            return failed(f"{text!r} is decoded as {back!r}", "restore tokenizer.json from the original folder")
    return passed("decoding inverts encoding" if ours else "encoding and decoding are idempotent")


@check("vocabulary")
def vocabulary(folder: Folder) -> Row:
    tokens, rows = load(folder).get_vocab(), size(folder.json("config.json"), "vocab_size")
    if type(rows) is not int:
        raise NotApplicable("config.json has no vocab_size")
    if beyond := sorted(token for token, number in tokens.items() if number >= rows):
        return failed(
            f"{some(beyond)}: ids beyond the {rows} rows of the embedding",
            "use the tokenizer that the model was trained with",
        )
    if len(set(tokens.values())) < len(tokens):
        return failed("two tokens have the same id", "use the tokenizer that the model was trained with")
    return passed(f"ids up to {max(tokens.values())}, of {rows}")


@check("special tokens")
def distinct(folder: Folder) -> Row:
    tokenizer, named, ours = load(folder), specials(folder), has_own_tokenizer(folder)
    ids = {name: tokenizer.token_to_id(text) for name, text in named.items()}
    if unknown := [f"{name} {named[name]!r}" for name, number in ids.items() if number is None]:
        return failed(f"not in the vocabulary: {some(unknown)}", "use the tokenizer that the model was trained with")
    for file in ("config.json", "generation_config.json"):
        settings = folder.json_if_there(file)
        for name, number in ids.items():
            configured = settings.get(f"{name}_id")
            if configured is not None and number not in (configured if isinstance(configured, list) else [configured]):
                return failed(f"{name} is {number}, but {file} has {configured}", f"correct {file}")
    if ours and ids.get("pad_token") in (None, ids.get("eos_token"), ids.get("bos_token")):
        return failed("there is no separate padding token", "use the tokenizer that the model was trained with")
    marked = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if ours and (plain_ones := [named[name] for name, number in ids.items() if number not in marked]):
        return failed(f"not marked as special: {some(plain_ones)}", "restore tokenizer.json")
    return passed(", ".join(f"{name.removesuffix('_token')} {number}" for name, number in ids.items()) or "none")


@check("end of text")
def end_of_text(folder: Folder) -> Row:
    """The EOS token of the tokenizer stops `generate` and is not suppressed."""
    text = specials(folder).get("eos_token")
    if text is None:
        return failed("the tokenizer has no eos_token", "set it in tokenizer_config.json")
    number = load(folder).token_to_id(text)
    settings = folder.json_if_there("generation_config.json")
    stops = settings.get("eos_token_id", folder.json("config.json").get("eos_token_id"))
    if number is None or number not in (stops if isinstance(stops, list) else [stops]):
        return failed(f"{text!r} is {number}, but `generate` stops at {stops}", "correct eos_token_id")
    for name in ("suppress_tokens", "bad_words_ids"):
        for entry in settings.get(name) or []:
            if entry in (number, [number]):
                return failed(f"`{name}` suppresses {text!r}", "remove it from generation_config.json")
    return passed(f"{text!r} ({number}) stops `generate`")


@check("chat format")
def chat_format(folder: Folder) -> Row:
    """In the ids of a conversation, the answer follows those of the prompt, and then a token that stops `generate`."""
    templates = [template for place, template in chat_templates(folder) if place == "chat_template.jinja"]
    if not templates:
        raise NotApplicable("no chat_template.jinja")
    if chat_template(folder).state == "fail":
        raise NotApplicable("not rendered, because `chat template` failed")
    tokenizer = load(folder)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    question = {"role": "user", "content": "2"}
    answer = texts_of(tokenizer)[0]

    def ids(messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt, **specials(folder)}
        text = environment.from_string(GENERATION_TAG.sub("", templates[0])).render(values)
        return tokenizer.encode(text, add_special_tokens=False).ids

    try:
        prompt = ids([question], True)
        whole = ids([question, {"role": "assistant", "content": answer}], False)
    except Exception as error:  # raised by the template, or by `tokenizers` for a character without an id
        return failed(f"a conversation cannot be encoded: {in_one_line(error)}", "correct the template")
    if whole[: len(prompt)] != prompt:
        return failed(
            "the ids of a prompt are not the start of those of the conversation",
            "end the prompt where the answer starts",
        )
    settings = folder.json_if_there("generation_config.json")
    stops = settings.get("eos_token_id", folder.json("config.json").get("eos_token_id"))
    after = whole[len(prompt) + len(tokenizer.encode(answer, add_special_tokens=False).ids) :]
    if not after or after[0] not in (stops if isinstance(stops, list) else [stops]):
        token = tokenizer.id_to_token(after[0]) if after else None
        return failed(f"an answer ends with {token!r}, which does not stop `generate`", "add its id to eos_token_id")
    return passed(f"an answer follows its prompt and ends with {tokenizer.id_to_token(after[0])!r}")


@check("fingerprint")
def fingerprint(folder: Folder) -> Row:
    """Compare the hash of the tokenizer with those that training stored in `minigpt.json` and `config.json`."""
    recorded = {"minigpt.json": described(folder).get("fingerprint")} if "minigpt.json" in folder.files else {}
    if (of_config := folder.json_if_there("config.json").get("tokenizer_fingerprint")) is not None:
        recorded["config.json"] = of_config
    if not recorded:
        raise NotApplicable("neither minigpt.json nor config.json records it")
    tokenizer = load(folder)
    end = tokenizer.token_to_id(specials(folder).get("eos_token", ""))
    found = hashlib.sha256(f"{tokenizer.to_str()} {end}".encode()).hexdigest()
    for name, written in recorded.items():
        if written != found:
            return failed(
                f"{name} has {str(written)[:12]}…, tokenizer.json {found[:12]}…",
                "use the tokenizer that the model was trained with",
            )
    return passed(f"{found[:12]}…, as in {' and '.join(recorded)}")


CHECKS = (loads, round_trip, vocabulary, distinct, end_of_text, chat_format, fingerprint)


def rows(path: Path) -> Iterator[Row]:
    """Run all checks of the tokenizer."""
    folder = Folder(path)
    for one in CHECKS:
        yield one(folder)
