"""A model or tokenizer named by a user -> a local folder that may be given to the loaders of transformers.

Input: a folder or a Hub id. Output: the folder, or the snapshot of the repository in the cache of the Hub (JSON, tokenizer
files and safetensors only). Its settings are checked before any loader sees them: loading it opens no file outside the
folder, downloads nothing and runs no code. It refuses a folder for which that does not hold, unless its code is trusted,
and one whose settings, sizes or weights index are malformed.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .data.hub_access import offline_if_unreachable
from .doctor.config import leads_outside, size, size_faults
from .doctor.files import INDEX, WEIGHTS
from .doctor.folder import Folder, Unreadable
from .doctor.row import plain
from .doctor.weights import Unsound, places_of
from .errors import MiniGPTError

# What the loaders of transformers read by its name; only `.py` files are left out unless they are trusted.
SETTINGS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)
TRUST = ", or add --trust_remote_code if you trust whoever made it"
DTYPES = re.compile(r"(torch\.)?(float|double|half|bfloat16|float(16|32|64)|float8_\w+)|auto")
# Settings of generation that multiply the memory of each step.
MULTIPLIERS = ("num_beams", "num_return_sequences", "num_beam_groups")
MOST_SEQUENCES = 256
MOST_LABELS = 100_000


def checked_folder(
    name: str, trust_remote_code: bool | None = None, *, what: str = "model", with_weights: bool = True
) -> Path:
    """The local folder of a model or tokenizer, checked.

    Args:
        name: A folder or a Hub id.
        trust_remote_code: Allow settings that download or run code; None where that is not an option.
        what: What is looked for, as messages call it.
        with_weights: Download the weights of a Hub id, and check the weights.

    Raises:
        MiniGPTError: if there is no such folder or repository, or it must not be loaded.
    """
    if not name:
        raise MiniGPTError(f"no {what} can be loaded from an empty name; give a folder or a Hub id")
    remedy = "restore the file from where the model was made"
    try:
        path = Path(name)
        if not path.is_dir():
            path = _snapshot(name, what, (*SETTINGS, *(["*.py"] if trust_remote_code else [])))
            if with_weights:
                path = _snapshot(name, what, _weights(Folder(path, follow=True)), revision=path.name)
        folder = Folder(path, follow=True)
        fault = next(_malformed(folder, with_weights), None)
        if fault is None and not trust_remote_code and (fault := next(leads_outside(folder), None)):
            remedy = f"remove this setting{TRUST if trust_remote_code is not None else ''}"
    except (Unreadable, Unsound, SafetensorError) as error:
        raise MiniGPTError(f"{name}: no {what} can be loaded from it ({plain(str(error))}); {remedy}") from error
    except MiniGPTError:
        raise
    except ValueError as error:  # of `Folder`: not a folder, or one of another kind
        raise MiniGPTError(str(error)) from error
    if fault:
        raise MiniGPTError(f"{name}: no {what} can be loaded from it ({plain(fault)}); {remedy}")
    return path


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The content of `minigpt.json`; empty if the folder has none.

    Raises:
        MiniGPTError: if it is not a JSON object of at most 16 MiB.
    """
    if not (Path(folder) / "minigpt.json").exists():
        return {}
    try:
        return Folder(folder, follow=True).json("minigpt.json")
    except Unreadable as error:
        raise MiniGPTError(f"{folder}: {plain(str(error))}; restore it from where the model was trained") from error


@contextmanager
def loading(
    name: str,
    what: str = "model",
    advice: str = "give a folder or a Hub id",
    trust_remote_code: bool | None = None,
) -> Iterator[None]:
    """Turn whatever a loader raises within the block into a `MiniGPTError` of one line.

    Args:
        name, what, trust_remote_code: As for `checked_folder`.
        advice: What to give instead.

    What loaders raise over malformed files is not documented: `tokenizers` raises a bare `Exception`, or panics; `KeyError`,
    `AttributeError` and `RecursionError` of transformers were seen.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join((str(error).strip() or "no message").split("\n\n")[0].split())
        if "trust_remote_code" in str(error):
            reason = "it needs custom code of its own, which is not run"
            advice += TRUST if trust_remote_code is not None else ""
        elif not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise MiniGPTError(f"{name}: no {what} can be loaded from it ({plain(reason)}); {advice}") from error


def _snapshot(name: str, what: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise MiniGPTError(
            f"{name}: no {what} can be loaded from it (no such folder); give a folder or a Hub id"
        ) from error
    with loading(name, what), offline_if_unreachable():
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def _weights(folder: Folder) -> tuple[str, ...]:
    """Names of the safetensors files to download."""
    explicit = folder.json_if_there("config.json").get("transformers_weights")
    shards = sorted(set(places_of(folder).values())) if INDEX in folder.files else []
    return (str(explicit or WEIGHTS), *shards)


def _malformed(folder: Folder, with_weights: bool) -> Iterator[str]:
    """What would make a loader hang, exhaust the memory, read outside the folder or fail without a useful message."""
    for file, kind in folder.others.items():
        if "folder" not in kind:
            yield f"{file} is {kind}, not a file of the folder"
    settings = {file: folder.json_if_there(file) for file in JSON_FILES}
    config = settings["config.json"]
    if "model_type" in config and not isinstance(config["model_type"], str):
        yield f"config.json: `model_type` is {config['model_type']!r}, not text"
    yield from (f"config.json: {fault}" for fault in size_faults(config))
    rope = config.get("rope_parameters")
    if rope is not None and not isinstance(rope, dict):
        yield f"config.json: `rope_parameters` is {rope!r}, not an object"
    if rope and config.get("model_type") in ("minigpt", "qwen3"):  # other architectures have types of their own
        kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 10_000)
        if str(kind) not in ("default", *ROPE_INIT_FUNCTIONS):
            yield f"config.json: `rope_type` is {kind!r}, which is unknown"
        if not (type(theta) in (int, float) and 1 < theta < math.inf):
            yield f"config.json: `rope_theta` is {theta!r}: a number above 1 is required"
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"config.json: `{key}` is {value!r}: a finite number is required"
    labels = config.get("num_labels")
    if labels is not None and not (type(labels) is int and 1 <= labels <= MOST_LABELS):
        yield f"config.json: `num_labels` is {labels!r}: a whole number from 1 to {MOST_LABELS:,} is required"
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        for each in value.values() if isinstance(value, dict) else [value]:  # one for each part, or for all
            if each is not None and not (isinstance(each, str) and DTYPES.fullmatch(each)):
                yield f"config.json: `{key}` is {each!r}, not a floating-point type"
    longest = settings["tokenizer_config.json"].get("model_max_length")
    if longest is not None and type(longest) not in (int, float):
        yield f"tokenizer_config.json: `model_max_length` is {longest!r}, not a number"
    for file in ("generation_config.json", "config.json"):
        for key in MULTIPLIERS:
            value = settings[file].get(key)
            if value is not None and not (type(value) is int and 1 <= value <= MOST_SEQUENCES):
                yield f"{file}: `{key}` is {value!r}: a whole number from 1 to {MOST_SEQUENCES} is required"
    if with_weights:
        yield from _weights_faults(folder, config)


def _weights_faults(folder: Folder, config: dict[str, Any]) -> Iterator[str]:
    if WEIGHTS in folder.files:
        with safe_open(folder.path / WEIGHTS, "np") as file:
            names, files = set(file.keys()), {WEIGHTS}
            if config.get("model_type") in ("minigpt", "qwen3") and "quantization_config" not in config:
                for name in names:
                    if not (dtype := file.get_slice(name).get_dtype()).startswith(("F", "BF")):
                        yield f"{WEIGHTS}: {name} is of the type {dtype}, not a floating-point type"
    elif INDEX in folder.files:
        places = places_of(folder)
        names, files = set(places), set(places.values())
        for shard in sorted(files - folder.files.keys()):
            yield f"{INDEX} names {shard}, which is missing"
        if not isinstance(folder.json(INDEX).get("metadata", {}), dict):
            yield f"{INDEX}: `metadata` is not an object"
    else:
        return  # the loader says that there are none
    layers, held = size(config, "num_hidden_layers"), sum(folder.files[file] for file in files)
    if layers is not None and layers > len(names):
        yield f"config.json asks for {layers:,} layers, and the weights are {len(names):,} tensors"
    numbers = (size(config, "vocab_size") or 0) * (size(config, "hidden_size") or 0)
    if numbers > 4 * held:  # four numbers in a byte: no quantization is denser
        yield f"config.json asks for an embedding of {numbers:,} numbers, and the weights are {held:,} bytes"
