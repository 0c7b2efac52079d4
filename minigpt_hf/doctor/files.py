"""Checks of the files of a folder: complete, known, readable, without pickles, links and secrets.

Pickles are recognized by name and magic number; they are never loaded.
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
CODE = ("configuration_minigpt.py", "modeling_minigpt.py")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KNOWN = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|README\.md|LICENSE|minigpt\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|\.gitattributes"
    r"|figures/[\w.-]+\.(png|svg)|\.eval_results/[\w.-]+\.ya?ml|\.cache/huggingface/.+"  # .cache: of huggingface_hub
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz")
# Protocol 2 and later start with 0x80 and the protocol number; torch stores a pickle in a zip file. Older protocols have no
# magic number and are recognized by name only.
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
        required += CODE
    missing = sorted({name for name in required if name not in folder.files})
    if not any(name in folder.files for name in (WEIGHTS, INDEX)):
        missing.append(WEIGHTS)
    if missing:
        return failed(f"missing: {some(missing, 9)}", "export the folder again, or copy the missing files")
    return passed(f"{len(folder.files)} files")


@check("files known")
def known(folder: Folder) -> Row:
    if not is_minigpt(folder):
        raise NotApplicable("only MiniGPT folders have a known set of files")
    code = CODE if folder.json_if_there("config.json").get("model_type", "minigpt") == "minigpt" else ()
    unknown = [name for name in folder.files if not KNOWN.fullmatch(name) and name not in code]
    if unknown:
        return failed(f"not files of a model folder: {some(unknown, 9)}", "move or delete them")
    return passed("no other files")


@check("no pickle")
def no_pickle(folder: Folder) -> Row:
    pickles = []
    for name in folder.files:
        with folder.open(name) as file:
            if name.lower().endswith(PICKLES) or PICKLED.match(file.read(4)):
                pickles.append(name)
    if pickles:
        return failed(
            f"pickles or archives: {some(pickles, 9)}; loading a pickle can execute code",
            "delete them; store weights in safetensors",
        )
    return passed("none")


@check("no link")
def no_link(folder: Folder) -> Row:
    if folder.others:
        found = [f"{name} is {kind}" for name, kind in folder.others.items()]
        return failed(
            some(found),
            "replace it by the file itself (for a cache of the Hub: `hf download USER/NAME --local-dir FOLDER`)",
        )
    return passed("regular files and folders only")


@check("file names")
def names(folder: Folder) -> Row:
    odd = [name for name in (*folder.files, *folder.others) if any(map(is_invisible, name)) or "\\" in name]
    if odd:
        return failed(f"names with invisible characters or backslashes: {some(odd)}", "delete or rename these files")
    return passed("printable")


@check("files readable")
def readable(folder: Folder) -> Row:
    faults = list(_unreadable(folder))
    if faults:
        return failed(some(faults), "restore the file from the original folder")
    return passed("all text files are UTF-8, all JSON files are valid")


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
                    "revoke it, then delete it here",
                )
    return passed("no token, key or password in text files")


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
