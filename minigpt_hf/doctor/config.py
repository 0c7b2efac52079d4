"""Checks of the JSON configuration: the model can be built, and no setting refers to anything outside the folder.

Only JSON is parsed; no model class is needed.
"""

import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, TypeGuard

from .folder import Folder, is_minigpt
from .row import NotApplicable, Row, check, failed, passed, some

# Names of each size in different architectures, and an upper limit, above which a configuration only exhausts memory.
SIZES = {
    "vocab_size": (("vocab_size",), 10_000_000),
    "hidden_size": (("hidden_size", "n_embd", "d_model"), 1_000_000),
    "intermediate_size": (("intermediate_size", "n_inner", "ffn_dim"), 10_000_000),
    "num_hidden_layers": (("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000),
    "num_attention_heads": (("num_attention_heads", "n_head", "n_heads", "num_heads"), 10_000),
    "num_key_value_heads": (("num_key_value_heads",), 10_000),
    "head_dim": (("head_dim",), 100_000),
    "max_position_embeddings": (("max_position_embeddings", "n_positions"), 100_000_000),
    "sliding_window": (("sliding_window",), 100_000_000),
}
ALWAYS = ("vocab_size", "hidden_size", "num_hidden_layers")
# Implementations in transformers. Other names refer to kernels, i.e. code that is downloaded from the Hub and executed. With
# the package `kernels`, so do the names of flash attention, unless flash_attn is installed.
ATTENTION = {"eager", "sdpa", "flex_attention"}
if find_spec("kernels") is None or find_spec("flash_attn") is not None:
    ATTENTION |= {"flash_attention_2", "flash_attention_3", "flash_attention_4"}
ATTENTION |= {f"paged|{name}" for name in ATTENTION}
EXPERTS = {"eager", "batched_mm", "grouped_mm"}
IMPLEMENTATIONS = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation", "_attn_implementation_internal"), ATTENTION),
    **dict.fromkeys(("experts_implementation", "_experts_implementation", "_experts_implementation_internal"), EXPERTS),
}
ELSEWHERE = ("fusion_config", "kernel_config", "custom_generate", "compile_config", "cache_config")
# Methods implemented by installed packages; others download kernels from the Hub.
QUANTIZATION = {"bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "awq", "torchao", "hqq", "quanto"}
QUANTIZATION |= {"compressed-tensors", "aqlm", "eetq", "vptq", "bitnet"}
LEFTOVERS = ("special_tokens_map_file",)  # written by older versions and not read
OURS = (*SIZES, "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "use_sliding_window")


def size(config: dict[str, Any], name: str) -> int | None:
    """A size under any of its names; `None` if it is absent or a list with one value per layer."""
    found = next((config[alias] for alias in SIZES[name][0] if config.get(alias) is not None), None)
    return None if isinstance(found, list) else found


def size_faults(config: dict[str, Any]) -> Iterator[str]:
    """Sizes that are not integers or out of range."""
    for name, (_, most) in SIZES.items():
        number = size(config, name)
        if number is not None and (type(number) is not int or not 1 <= number <= most):
            yield f"`{name}` is {number!r}: must be an integer from 1 to {most:,}"


def faults(config: dict[str, Any]) -> Iterator[str]:
    """Faults that make a configuration invalid or ambiguous."""
    if wrong := next(size_faults(config), None):
        yield wrong
        return  # the checks below need valid sizes
    vocabulary, hidden, depth = (size(config, name) for name in ALWAYS)
    if vocabulary is None or hidden is None or depth is None:
        yield from (f"no `{name}`" for name in ALWAYS if size(config, name) is None)
        return
    heads, groups, width = (size(config, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads and groups and heads % groups:
        yield f"{heads} heads are not a multiple of {groups} key and value heads"
    if heads and width is None and hidden % heads:
        yield f"`hidden_size` {hidden} does not divide into {heads} heads"
    if width is not None and width % 2 and "rope_parameters" in config:
        yield f"`head_dim` {width} is odd, but RoPE rotates pairs"
    for name, value in config.items():
        if name.endswith(("dropout", "pdrop")) and value is not None and not (_is_number(value) and 0 <= value < 1):
            yield f"`{name}` is {value!r}: must be in [0, 1)"
        if name.endswith(("norm_eps", "norm_epsilon")) and not (_is_number(value) and 0 < value < 0.1):
            yield f"`{name}` is {value!r}: must be in (0, 0.1)"
    yield from _positions(config)
    yield from _token_ids(config, vocabulary)
    layers = config.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or len(layers) != depth):
        yield f"`layer_types` does not have one entry for each of {depth} layers"
    window = config.get("sliding_window")
    if config.get("use_sliding_window") and not (type(window) is int and window >= 1):
        yield f"`sliding_window` is {window!r}, but `use_sliding_window` is true"


def _positions(config: dict[str, Any]) -> Iterator[str]:
    rope = config.get("rope_parameters")
    if rope is None:
        if config.get("model_type") == "qwen3" and "rope_theta" not in config:
            yield "no `rope_parameters`: Qwen3 would use a RoPE base of 1,000,000"
        return
    # One for all layers, or one per layer type.
    of_layers = (
        [*rope.values()] if isinstance(rope, dict) and "rope_type" not in rope and "rope_theta" not in rope else [rope]
    )
    for parameters in of_layers:
        theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
        if not (_is_number(theta) and theta > 1):
            yield f"`rope_theta` is {theta!r}: must be a number above 1"
        elif config.get("rope_theta") not in (None, theta) and len(of_layers) == 1:
            yield f"`rope_theta` is {config['rope_theta']!r}, but {theta!r} in `rope_parameters`: engines read either"


def _token_ids(settings: dict[str, Any], vocabulary: int) -> Iterator[str]:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and (type(token) is not int or not 0 <= token < vocabulary):
                yield f"`{name}` {token!r} is not in the vocabulary of {vocabulary}"


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


@check("config")
def sane(folder: Folder) -> Row:
    config = folder.json("config.json")
    if "text_config" in config and not is_minigpt(folder):
        raise NotApplicable("the configuration of a composite model")
    found = list(faults(config))
    if not isinstance(config.get("model_type"), str):
        found.append("no `model_type`")
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and all(isinstance(name, str) for name in architectures)):
        found.append("no `architectures`")
    elif not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        found.append(f"`architectures` is {architectures[0]!r}, not a causal language model")
    if is_minigpt(folder):
        found += [f"no `{name}`: its default may differ elsewhere" for name in OURS if name not in config]
        found += [f"`{name}` is a list" for name in SIZES if isinstance(config.get(name), list)]
        slides = "sliding_attention" in (config.get("layer_types") or [])
        if slides != bool(config.get("use_sliding_window")):
            found.append("`layer_types` and `use_sliding_window` disagree")
    if found:
        return failed(some(found), "correct config.json, or restore it from the original folder")
    return passed(
        f"{config['model_type']}, {size(config, 'num_hidden_layers')} layers of width {size(config, 'hidden_size')}"
    )


@check("recipe")
def recipe(folder: Folder) -> Row:
    """Compare with the settings of training in `minigpt.json`: the shapes do not determine e.g. the RoPE base."""
    if "minigpt.json" not in folder.files:
        raise NotApplicable("no minigpt.json")
    config, trained = folder.json("config.json"), folder.json("minigpt.json").get("recipe")
    if not isinstance(trained, dict):
        return failed("minigpt.json has no recipe", "restore minigpt.json from the original folder")
    rope = config.get("rope_parameters")
    now = {**config, "rope_theta": rope.get("rope_theta") if isinstance(rope, dict) else config.get("rope_theta")}
    names = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta"),
        *("rms_norm_eps", "use_sliding_window", "sliding_window", "tie_word_embeddings", "intermediate_size"),
        *("hidden_act", "rope_type", "max_position_embeddings"),
    )
    now["rope_type"] = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    trained = {"hidden_act": "silu"} | trained
    block_size = trained.get("block_size")
    # Values that training derives if the recipe has none.
    if not trained.get("init_from") and isinstance(block_size, int):
        slides = trained.get("use_sliding_window")
        derived = {"rope_type": "default", "max_position_embeddings": block_size * (16 if slides else 1)}
        derived |= {"sliding_window": block_size + 1} if slides else {}
        trained |= {name: value for name, value in derived.items() if trained.get(name) is None}
    changed = [
        f"`{name}` is {now.get(name)!r}, trained with {trained[name]!r}"
        for name in names
        if trained.get(name) is not None and now.get(name) != trained[name]
    ]
    if changed:
        return failed(some(changed), "restore config.json from the original folder")
    return passed("config.json agrees with the recipe in minigpt.json")


@check("settings stay inside")
def inside(folder: Folder) -> Row:
    """Settings that make a loader open a file must name a file of this folder, without a path."""
    if outside := list(leads_outside(folder)):
        return failed(some(outside), "remove these settings: they may only name files of the folder")
    return passed("no setting refers to anything outside the folder")


def leads_outside(folder: Folder) -> Iterator[str]:
    """Settings that make a loader open, download or execute anything other than the files of the folder."""
    if "adapter_config.json" in folder.files:
        base = folder.json("adapter_config.json").get("base_model_name_or_path")
        yield f"adapter_config.json refers to the base model {base!r}"
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings = folder.json_if_there(file)
        for name, value in settings.items():
            if name == "transformers_weights" or (name.endswith(("_file", "_files")) and name not in LEFTOVERS):
                for entry in value if isinstance(value, list) else [value]:
                    if not _is_here(folder, entry):
                        yield f"{file}: `{name}` is {entry!r}, which is not a file of the folder"
        for name, value in _nested(settings) if file != "tokenizer_config.json" else ():
            if value is None:
                continue
            if name in IMPLEMENTATIONS:
                # One for the model, or one per submodel.
                for entry in value.values() if isinstance(value, dict) else [value]:
                    if entry is not None and str(entry) not in IMPLEMENTATIONS[name]:
                        yield f"{file}: `{name}` is {entry!r}, which is not part of transformers"
            elif name in ELSEWHERE:
                yield f"{file}: `{name}` refers to code outside the folder"
            elif name == "quantization_config":
                method = value.get("quant_method") if isinstance(value, dict) else value
                if str(method) not in QUANTIZATION:
                    yield f"{file}: `quantization_config` names {method!r}, which may download kernels"


def _nested(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings by name, including nested ones."""
    queue = [settings]
    while queue:
        for name, value in queue.pop().items():
            yield name, value
            if isinstance(value, dict):
                queue.append(value)


def _is_here(folder: Folder, entry: Any) -> bool:
    if entry is None:
        return True
    return isinstance(entry, str) and re.fullmatch(r"[\w.-]+", entry) is not None and entry in folder.files


@check("generation config")
def generation(folder: Folder) -> Row:
    from transformers import GenerationConfig  # slow to import, and needed only here

    settings, vocabulary = folder.json("generation_config.json"), size(folder.json("config.json"), "vocab_size")
    if type(vocabulary) is not int:
        raise NotApplicable("config.json is invalid")
    unknown = sorted(set(settings) - set(vars(GenerationConfig())) - {"transformers_version", "_from_model_config"})
    if unknown and is_minigpt(folder):
        return failed(f"unknown: {some(unknown)}", "delete them: `generate` rejects or ignores unknown options")
    ids = list(_token_ids(settings, vocabulary))
    if ids:
        return failed(some(ids), "correct generation_config.json")
    try:
        GenerationConfig.from_dict(settings).validate(strict=True)
    except (ValueError, TypeError) as error:
        return failed(" ".join(str(error).split()), "correct generation_config.json")
    return passed("sampling" if settings.get("do_sample") else "greedy")


CHECKS = (sane, recipe, inside, generation)
