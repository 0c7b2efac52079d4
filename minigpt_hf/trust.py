"""Check a folder or Hub repository before the loaders of transformers open it.

`checked_folder` returns the folder, or the cached snapshot of a repository (JSON, tokenizer files and safetensors only).
Unless its code is trusted, loading the result opens no file outside the folder, downloads nothing and runs no code.
Malformed settings, implausible sizes and inconsistent weight indices are rejected.
"""

import math
import os
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

# Files that the loaders of transformers read; `.py` files are added only if code is trusted.
SETTINGS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)
TRUST = ", or add --trust_remote_code if you trust its author"
DTYPES = re.compile(r"(torch\.)?(float|double|half|bfloat16|float(16|32|64)|float8_\w+)|auto")
# Generation settings that multiply the memory of each step.
MULTIPLIERS = ("num_beams", "num_return_sequences", "num_beam_groups")
MAX_SEQUENCES = 256
MAX_LABELS = 100_000


def checked_folder(
    name: str, trust_remote_code: bool | None = None, *, what: str = "model", with_weights: bool = True
) -> Path:
    """Return the local folder of a model or tokenizer, after checking it.

    Args:
        name: Folder or Hub id.
        trust_remote_code: Allow settings that download or run code; None if the caller has no such option.
        what: What is loaded, for error messages.
        with_weights: Download and check the weights as well.

    Raises:
        MiniGPTError: if the folder or repository does not exist, or a check fails.
    """
    if not name:
        raise MiniGPTError(f"no {what} can be loaded from an empty name; give a folder or a Hub id")
    remedy = "restore the file from its source"
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
    except ValueError as error:  # raised by `Folder` for a path that is not a model folder
        raise MiniGPTError(str(error)) from error
    if fault:
        raise MiniGPTError(f"{name}: no {what} can be loaded from it ({plain(fault)}); {remedy}")
    return path


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of `minigpt.json`, or an empty dictionary if the folder has none.

    Raises:
        MiniGPTError: if it is not a JSON object of at most 16 MiB.
    """
    if not (Path(folder) / "minigpt.json").exists():
        return {}
    try:
        return Folder(folder, follow=True).json("minigpt.json")
    except Unreadable as error:
        raise MiniGPTError(f"{folder}: {plain(str(error))}; restore it from its source") from error


def recipe_text(folder: Path, name: str) -> str:
    """Return a text of the recipe in `minigpt.json`; empty if there is none."""
    recipe = read_metadata(folder).get("recipe")
    value = recipe.get(name) if isinstance(recipe, dict) else None
    return value if isinstance(value, str) else ""


def weight_files(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files from which loaders read the weights: one file, or an index and the shards that it names.

    Raises:
        MiniGPTError: if there is no such folder, or its index cannot be read or names files outside the folder.
    """
    try:
        content = Folder(folder, follow=True)
        if WEIGHTS in content.files:
            return [WEIGHTS]
        return [INDEX, *sorted(set(places_of(content).values()))] if INDEX in content.files else []
    except (Unreadable, Unsound) as error:
        raise MiniGPTError(f"{folder}: {plain(str(error))}; restore it from its source") from error
    except ValueError as error:  # raised by `Folder` for a path that is not a folder
        raise MiniGPTError(str(error)) from error


@contextmanager
def loading(
    name: str,
    what: str = "model",
    advice: str = "give a folder or a Hub id",
    trust_remote_code: bool | None = None,
) -> Iterator[None]:
    """Convert any exception of a loader in the block to a `MiniGPTError` with a one-line message.

    The exceptions of loaders for malformed files are not documented: `tokenizers` raises a plain `Exception` or panics;
    transformers raises `KeyError`, `AttributeError` and `RecursionError`, among others.

    Args:
        name, what, trust_remote_code: As for `checked_folder`.
        advice: Remedy, at the end of the message.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join((str(error).strip() or "no message").split("\n\n")[0].split())
        if "trust_remote_code" in str(error):
            reason = "it needs custom code, which is not run"
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
    """Return the names of the safetensors files to download."""
    explicit = folder.json_if_there("config.json").get("transformers_weights")
    shards = sorted(set(places_of(folder).values())) if INDEX in folder.files else []
    return (str(explicit or WEIGHTS), *shards)


def _malformed(folder: Folder, with_weights: bool) -> Iterator[str]:
    """Yield what would make a loader hang, exhaust memory, read outside the folder or fail without a clear message."""
    for file, kind in folder.others.items():
        if "folder" not in kind:
            yield f"{file} is {kind}, not a file of the folder"
    settings = {file: folder.json_if_there(file) for file in JSON_FILES}
    config = settings["config.json"]
    if "model_type" in config and not isinstance(config["model_type"], str):
        yield f"config.json: `model_type` is {config['model_type']!r}, not a string"
    yield from (f"config.json: {fault}" for fault in size_faults(config))
    rope = config.get("rope_parameters")
    if rope is not None and not isinstance(rope, dict):
        yield f"config.json: `rope_parameters` is {rope!r}, not an object"
    if rope and config.get("model_type") in ("minigpt", "qwen3"):  # other architectures define their own types
        kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 10_000)
        if str(kind) not in ("default", *ROPE_INIT_FUNCTIONS):
            yield f"config.json: `rope_type` is {kind!r}, which is unknown"
        if not (type(theta) in (int, float) and 1 < theta < math.inf):
            yield f"config.json: `rope_theta` is {theta!r}: a number above 1 is required"
    if config.get("model_type") in ("minigpt", "qwen3"):
        epsilon, layers = config.get("rms_norm_eps", 1e-6), config.get("layer_types")
        if not (type(epsilon) in (int, float) and 0 < epsilon < 0.1):
            yield f"config.json: `rms_norm_eps` is {plain(repr(epsilon))}: a number between 0 and 0.1 is required"
        if isinstance(layers, list) and "sliding_attention" in layers and not config.get("use_sliding_window"):
            yield "config.json: `layer_types` has sliding attention, but `use_sliding_window` is not true"
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"config.json: `{key}` is {value!r}: a finite number is required"
    labels = config.get("num_labels")
    if labels is not None and not (type(labels) is int and 1 <= labels <= MAX_LABELS):
        yield f"config.json: `num_labels` is {labels!r}: an integer from 1 to {MAX_LABELS:,} is required"
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        for each in value.values() if isinstance(value, dict) else [value]:  # one per submodel, or a single one
            if each is not None and not (isinstance(each, str) and DTYPES.fullmatch(each)):
                yield f"config.json: `{key}` is {each!r}, not a floating-point type"
    longest = settings["tokenizer_config.json"].get("model_max_length")
    if longest is not None and type(longest) not in (int, float):
        yield f"tokenizer_config.json: `model_max_length` is {longest!r}, not a number"
    for file in ("generation_config.json", "config.json"):
        for key in MULTIPLIERS:
            value = settings[file].get(key)
            if value is not None and not (type(value) is int and 1 <= value <= MAX_SEQUENCES):
                yield f"{file}: `{key}` is {value!r}: an integer from 1 to {MAX_SEQUENCES} is required"
    if with_weights:
        yield from _weights_faults(folder, config)


def _weights_faults(folder: Folder, config: dict[str, Any]) -> Iterator[str]:
    if WEIGHTS in folder.files:
        places, files = {}, {WEIGHTS}
    elif INDEX in folder.files:
        places = dict(places_of(folder))
        files = set(places.values())
        for shard in sorted(files - folder.files.keys()):
            yield f"{INDEX} names {shard}, which is missing"
        if not isinstance(folder.json(INDEX).get("metadata", {}), dict):
            yield f"{INDEX}: `metadata` is not an object"
    else:
        return  # the loader reports missing weights
    is_float = config.get("model_type") in ("minigpt", "qwen3") and "quantization_config" not in config
    for shard in sorted(files):
        with safe_open(folder.path / shard, "np") as file:
            for name in file.keys():  # noqa: SIM118  # not a dictionary
                if is_float and not (dtype := file.get_slice(name).get_dtype()).startswith(("F", "BF")):
                    yield f"{shard}: {name} is of the type {dtype}, not a floating-point type"
                if places.setdefault(name, shard) != shard:  # the loader uses the copy that it reads last
                    yield f"{INDEX} and the shards disagree about {name}"
    names = set(places)
    layers, num_bytes = size(config, "num_hidden_layers"), sum(folder.files[file] for file in files)
    if layers is not None and layers > len(names):
        yield f"config.json specifies {layers:,} layers, but the weights have only {len(names):,} tensors"
    numbers = (size(config, "vocab_size") or 0) * (size(config, "hidden_size") or 0)
    if numbers > 4 * num_bytes:  # quantization stores at most four values per byte
        yield f"config.json specifies an embedding of {numbers:,} values, but the weights have only {num_bytes:,} bytes"
