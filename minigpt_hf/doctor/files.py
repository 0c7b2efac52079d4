"""What lies in a folder: is all of it there, and nothing else?

In: a `Folder`. Out: rows about its files, without a look at what they mean. Nothing is unpickled: a pickle is known by its
name and its first bytes, and named.
"""

import re
from collections.abc import Iterator

from .folder import Folder, Unreadable, is_minigpt
from .row import NotApplicable, Row, check, failed, is_invisible, passed, some

REQUIRED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "minigpt.json",
)
SUITCASE = ("configuration_minigpt.py", "modeling_minigpt.py")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KNOWN = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|README\.md|LICENSE|minigpt\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|\.gitattributes"
    r"|figures/[\w.-]+\.(png|svg)|\.eval_results/[\w.-]+\.ya?ml|\.cache/huggingface/.+"  # the last: the Hub's client's
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz")
# Protocol 2 and later open with 0x80 and their number; torch puts a pickle into a zip; the older protocols are not told
# apart from text by two bytes, and go by their name.
PICKLED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
TEXTS = (".json", ".md", ".py", ".txt", ".yaml", ".yml", ".jinja", ".jsonl", ".cfg", ".toml", ".svg", "LICENSE", ".env")
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{30,}",
    "an API key": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}|\bAIza[A-Za-z0-9_-]{35}|\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"https?://[^\s/:@\"'<>]+:[^\s/:@\"'<>]+@",
    "a token": r"\"hub_token\": *\"[^\"<]+\"",
}


@check("files complete")
def complete(folder: Folder) -> Row:
    required = ["config.json", *(REQUIRED if is_minigpt(folder) else ())]
    if folder.json_if_there("config.json").get("model_type") == "minigpt":
        required += SUITCASE
    missing = sorted({name for name in required if name not in folder.files})
    if not any(name in folder.files for name in (WEIGHTS, INDEX)):
        missing.append(WEIGHTS)
    if missing:
        return failed(
            f"missing: {some(missing, 9)}", "write the folder anew with what made it, or copy the missing files"
        )
    return passed(f"{len(folder.files)} files")


@check("files known")
def known(folder: Folder) -> Row:
    if not is_minigpt(folder):
        raise NotApplicable("what belongs to a folder is known of MiniGPT folders")
    code = SUITCASE if folder.json_if_there("config.json").get("model_type", "minigpt") == "minigpt" else ()
    foreign = [name for name in folder.files if not KNOWN.fullmatch(name) and name not in code]
    if foreign:
        return failed(f"foreign: {some(foreign, 9)}", "delete them, or keep them elsewhere")
    return passed("nothing but what belongs to a model")


@check("no pickle")
def no_pickle(folder: Folder) -> Row:
    pickles = []
    for name in folder.files:
        with folder.open(name) as file:
            if name.lower().endswith(PICKLES) or PICKLED.match(file.read(4)):
                pickles.append(name)
    if pickles:
        return failed(
            f"pickles or archives: {some(pickles, 9)}; to open one is to run what it says",
            "delete them; keep weights in safetensors",
        )
    return passed("none")


@check("no link")
def no_link(folder: Folder) -> Row:
    if folder.others:
        found = [f"{name} is {kind}" for name, kind in folder.others.items()]
        return failed(
            some(found),
            "put the file itself there (from a cache of the Hub: `hf download USER/NAME --local-dir FOLDER`)",
        )
    return passed("files and folders only")


@check("file names")
def names(folder: Folder) -> Row:
    odd = [name for name in (*folder.files, *folder.others) if any(map(is_invisible, name)) or "\\" in name]
    if odd:
        return failed(f"names with characters that cannot be seen: {some(odd)}", "delete or rename these files")
    return passed("plain")


@check("files readable")
def readable(folder: Folder) -> Row:
    faults = list(_unreadable(folder))
    if faults:
        return failed(some(faults), "restore the file from where the folder was made")
    return passed("every text is UTF-8 and every JSON sound")


@check("no secret")
def no_secret(folder: Folder) -> Row:
    for name in folder.files:
        if not name.endswith(TEXTS):
            continue
        text = folder.bytes(name).decode("utf-8", errors="replace")
        for kind, pattern in SECRETS.items():
            if match := re.search(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                return failed(
                    f"{name}, line {line}: {kind} ({match[0][:6]}…)",
                    "revoke it where it was issued, then delete it here",
                )
    return passed("no token, key or password in any text")


def _unreadable(folder: Folder) -> Iterator[str]:
    for name in folder.files:
        try:
            if name.startswith(".cache/"):
                continue
            if name.endswith(".json"):
                folder.json(name)
            elif name.endswith(TEXTS):
                folder.text(name)
        except Unreadable as reason:
            yield str(reason)


CHECKS = (complete, known, no_pickle, no_link, names, readable, no_secret)
