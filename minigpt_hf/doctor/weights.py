"""Checks of the weights: headers are consistent with the files, all tensors exist, all values are finite.

The safetensors files are parsed here rather than by a loader: sizes in a header are compared with the size of the file, and
no memory is allocated according to a header.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from .config import faults
from .files import INDEX, WEIGHTS
from .folder import MEBI, Folder, Unreadable, parse_object
from .row import NotApplicable, Row, check, failed, passed, plain, some

MAX_HEADER = 32 * MEBI  # an entry has about 130 bytes: 250,000 tensors
RENEW = "save the weights again with `save_pretrained`"
# dtype -> bytes per value, NumPy type of its words, and the bits that are all set exactly for infinity and NaN (0: a type
# without them).
TYPES = {
    "F64": (8, "<u8", 0x7FF0_0000_0000_0000),
    "F32": (4, "<u4", 0x7F80_0000),
    "C64": (8, "<u4", 0x7F80_0000),
    "F16": (2, "<u2", 0x7C00),
    "BF16": (2, "<u2", 0x7F80),
    "F8_E5M2": (1, "u1", 0x7C),
    "F8_E4M3": (1, "u1", 0x7F),
    "F8_E8M0": (1, "u1", 0xFF),
    **dict.fromkeys(("I64", "U64"), (8, "u1", 0)),
    **dict.fromkeys(("I32", "U32"), (4, "u1", 0)),
    **dict.fromkeys(("I16", "U16"), (2, "u1", 0)),
    **dict.fromkeys(("I8", "U8", "BOOL"), (1, "u1", 0)),
}


class Unsound(Exception):
    """A header or index is inconsistent with the files."""


@dataclass(frozen=True)
class Tensor:
    """Location of a tensor: bytes `start` to `stop` of `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(folder: Folder, name: str) -> dict[str, Tensor]:
    """Read the header of a file, which consists of 8 bytes of length, a JSON header and the contiguous tensors.

    Raises:
        Unsound: if lengths, types, shapes or offsets are invalid, or tensors overlap, leave gaps or exceed the file.
    """
    total = folder.files.get(name, 0)
    with folder.open(name) as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(total - 8, MAX_HEADER):
            raise Unsound(f"{name} has a header of {length:,} bytes in a file of {total:,}")
        try:
            header = parse_object(file.read(length), "the header")
        except Unreadable as error:
            raise Unsound(f"{name}: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Unsound(f"{name}: the metadata are not strings")
    first = 8 + length
    tensors = {tensor: _tensor(name, tensor, claim, first) for tensor, claim in header.items()}
    place = first
    for tensor, where in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if where.start != place:
            raise Unsound(f"{name}: {tensor} does not start at the end of the previous tensor")
        place = where.stop
    if place != total:
        raise Unsound(f"{name}: the tensors end at byte {place:,}, the file at {total:,}")
    return tensors


def _tensor(file: str, name: str, claim: Any, first: int) -> Tensor:
    if not isinstance(claim, dict) or claim.get("dtype") not in TYPES:
        raise Unsound(f"{file}: {name} has an unknown dtype")
    shape, place = claim.get("shape"), claim.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2 or len(shape) > 8:
        raise Unsound(f"{file}: {name} has an invalid shape or offset")
    width = TYPES[claim["dtype"]][0]
    for n in shape:
        width *= n
    if place[1] - place[0] != width:
        raise Unsound(f"{file}: {name} has shape {shape} and dtype {claim['dtype']} in {place[1] - place[0]:,} bytes")
    return Tensor(file, claim["dtype"], tuple(shape), first + place[0], first + place[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def files_of(folder: Folder) -> list[str]:
    """The safetensors files at the top of a folder, without those of subfolders."""
    found = [name for name in folder.files if name.endswith(".safetensors") and "/" not in name]
    if not found:
        raise NotApplicable("there are no safetensors files")
    return found


def tensors_of(folder: Folder) -> dict[str, Tensor]:
    """The tensors of all files. Raises `NotApplicable` for an invalid header, which another check reports."""
    found: dict[str, Tensor] = {}
    for name in files_of(folder):
        try:
            found |= read_header(folder, name)
        except Unsound as error:
            raise NotApplicable(f"{name} is invalid") from error
    return found


@check("weights header")
def header(folder: Folder) -> Row:
    number = 0
    for name in files_of(folder):
        try:
            number += len(read_header(folder, name))
        except Unsound as error:
            return failed(str(error), RENEW)
    return passed(f"{number} contiguous tensors, which fill the files")


@check("weights index")
def index(folder: Folder) -> Row:
    """The index agrees with the shards, which are files of the folder; without an index there is one file."""
    files = files_of(folder)
    if INDEX not in folder.files:
        if files != [WEIGHTS]:
            return failed(f"no {INDEX}, and the weights are {some(files)}", RENEW)
        raise NotApplicable("one file, no index")
    try:
        places = places_of(folder)
    except Unsound as error:
        return failed(str(error), RENEW)
    shards = set(places.values())
    if missing := sorted(shards - set(files)):
        return failed(f"{INDEX} names {some(missing)}, which does not exist", RENEW)
    if extra := sorted(set(files) - shards):
        return failed(f"{some(extra)} is not in the index", "delete it, or save the weights again")
    stored = {name: where.file for name, where in tensors_of(folder).items()}
    if len(stored) < sum(len(read_header(folder, name)) for name in files):
        return failed("a tensor is in two shards", RENEW)
    if wrong := sorted(name for name in stored.keys() | places.keys() if stored.get(name) != places.get(name)):
        return failed(f"{INDEX} and the shards disagree about {some(wrong)}", RENEW)
    return passed(f"{len(shards)} shards")


def places_of(folder: Folder) -> dict[str, str]:
    """The weight map of the index: {name of a tensor: name of the file in the folder}.

    Raises:
        Unsound: if there is no weight map, or if it names files outside the folder.
    """
    places = folder.json(INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise Unsound(f"{INDEX} has no `weight_map`")
    shards = set(places.values())
    if outside := sorted(shard for shard in shards if not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII)):
        raise Unsound(f"{INDEX} names files outside the folder: {some(outside)}")
    return places


def is_tied(config: dict[str, Any]) -> bool:
    """Whether head and embedding share weights. Default: false for Qwen3, true for other architectures."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") != "qwen3"))


def expected(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a MiniGPT's tensors, which are those of Qwen3; `lm_head` only if it is not tied."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not is_tied(config):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


@check("tensors")
def tensors(folder: Folder) -> Row:
    config = folder.json("config.json")
    if config.get("model_type") not in ("minigpt", "qwen3") or config.get("attention_bias"):
        raise NotApplicable(
            "the required tensors are known for MiniGPT and Qwen3 only; see the checks that load the model"
        )
    written = (
        "hidden_size vocab_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    if next(faults(config), None) or any(type(config.get(name)) is not int for name in written.split()):
        raise NotApplicable("config.json is invalid")
    wanted, stored = expected(config), tensors_of(folder)
    if missing := sorted(wanted.keys() - stored.keys()):
        return failed(f"missing: {some(missing)}", RENEW)
    if extra := sorted(stored.keys() - wanted.keys() - ({"lm_head.weight"} if is_tied(config) else set())):
        return failed(f"unexpected: {some(extra)}", RENEW)
    wrong = [f"{n} is {stored[n].shape}, not {shape}" for n, shape in wanted.items() if stored[n].shape != shape]
    if wrong:
        return failed(some(wrong), "restore config.json from the original folder")
    return passed(f"{len(stored)} tensors, none missing or unexpected")


@check("tensors finite")
def finite(folder: Folder) -> Row:
    if bad := [name for name, where in tensors_of(folder).items() if not _is_finite(folder, where)]:
        return failed(f"NaN or infinity in {some(bad)}", "publish an earlier checkpoint")
    return passed("all values are finite")


@check("tied weights")
def ties(folder: Folder) -> Row:
    """Tied weights that are stored twice must be equal."""
    stored, is_one = tensors_of(folder), is_tied(folder.json("config.json"))
    head = next((name for name in stored if name.endswith("lm_head.weight")), None)
    table = next((name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if not is_one and table and head is None:
        return failed("`tie_word_embeddings` is false, but there is no lm_head.weight", RENEW)
    if not is_one or head is None or table is None:
        return passed("tied" if is_one else "not tied")
    pairs = zip(_chunks(folder, stored[head]), _chunks(folder, stored[table]), strict=True)
    if stored[head].shape != stored[table].shape or any(a != b for a, b in pairs):
        return failed(f"`tie_word_embeddings` is true, but {head} and {table} differ", "set it to false, or delete one")
    return passed("stored twice with equal values")


@check("weights recorded")
def recorded(folder: Folder) -> Row:
    """The weights are those that the results in `minigpt.json` and the card describe."""
    written = folder.json_if_there("minigpt.json").get("weights")
    if not isinstance(written, str):
        raise NotApplicable("minigpt.json records no weights")
    if (found := weights_fingerprint(folder)) != written:
        return failed(
            f"the weights are {found[:12]}…, and minigpt.json describes {plain(written[:12])}…: its results, scores and "
            "samples are those of other weights",
            "restore the weights; if the change is intended, remove `weights` from minigpt.json, and correct results, "
            "samples and card",
        )
    return passed(f"{found[:12]}…, as in minigpt.json")


def weights_fingerprint(folder: Folder) -> str:
    """SHA-256 of names, types, shapes and values of the tensors that loaders read, however they are divided into files.

    Raises `NotApplicable` for an invalid header, which another check reports.
    """
    content = hashlib.sha256()
    try:
        stored = read_header(folder, WEIGHTS) if WEIGHTS in folder.files else tensors_of(folder)
    except Unsound as error:
        raise NotApplicable(f"{WEIGHTS} is invalid") from error
    for name, where in sorted(stored.items()):
        content.update(f"{name} {where.dtype} {where.shape}\n".encode())
        for chunk in _chunks(folder, where):
            content.update(chunk)
    return content.hexdigest()


def _chunks(folder: Folder, where: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor, in chunks of 16 MiB."""
    with folder.open(where.file) as file:
        file.seek(where.start)
        for place in range(where.start, where.stop, 16 * MEBI):
            yield file.read(min(16 * MEBI, where.stop - place))


def _is_finite(folder: Folder, where: Tensor) -> bool:
    _, words, exponent = TYPES[where.dtype]
    chunks = _chunks(folder, where) if exponent else ()
    return not any(((np.frombuffer(chunk, words) & exponent) == exponent).any() for chunk in chunks)


CHECKS = (header, index, tensors, finite, ties, recorded)
