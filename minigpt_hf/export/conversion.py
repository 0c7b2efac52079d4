"""Steps shared by all export formats: load and validate the model, limit the context, write atomically, verify."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config

from ..data.tokenizer import tokenizer_mismatch
from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..trust import checked_folder, loading, read_metadata

QWEN3_EXTRAS = ("attention_bias", "quantization_config")  # settings of Qwen3 that MiniGPT lacks


def load_model(folder: Path, or_qwen3: bool = False) -> MiniGPTForCausalLM:
    """Load the model of a MiniGPT folder in the dtype of its weights and in evaluation mode.

    Attention is eager: which SDPA kernel is used depends on the mask, and the kernels round differently.

    Args:
        or_qwen3: Also accept a Qwen3 folder, whose weights have the same names.

    Raises:
        MiniGPTError: if there is no MiniGPT model, or its weights are incomplete or not finite.
    """
    if not (folder / "config.json").is_file():
        if (folder / "model" / "config.json").is_file():
            raise MiniGPTError(f"{folder}: this is a run folder; its model folder is {folder / 'model'}")
        raise MiniGPTError(f"{folder}: it has no config.json; give a model folder")
    checked_folder(str(folder))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type, options = settings.get("model_type"), {}
    if or_qwen3 and model_type == "qwen3" and not {name for name in QWEN3_EXTRAS if settings.get(name)}:
        with loading(str(folder)):
            options["config"] = _minigpt_config(folder)
    elif model_type != MiniGPTConfig.model_type:
        which = "MiniGPT models and Qwen3 models without biases and quantization" if or_qwen3 else "MiniGPT models"
        raise MiniGPTError(f"{folder}: its model type is {model_type!r}; only {which} can be exported")
    with loading(str(folder)):
        model, report = MiniGPTForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", use_safetensors=True, **options
        )
    with loading(str(folder), "tokenizer", "an export needs the tokenizer of the model"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if mismatch := tokenizer_mismatch(model.config, tokenizer):
        raise MiniGPTError(f"{folder}: {mismatch}")
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            raise MiniGPTError(f"{folder}: {key.replace('_', ' ')} in its weights: {sorted(map(str, report[key]))}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise MiniGPTError(f"{folder}: {name} has values that are not finite; the model is not exported")
    return model.eval()


def _minigpt_config(folder: Path) -> MiniGPTConfig:
    """Return the configuration of a Qwen3 folder as that of its MiniGPT twin."""
    settings = Qwen3Config.from_pretrained(folder).to_dict()
    own = {field.name for field in fields(MiniGPTConfig)} - {"architectures", "auto_map"}
    return MiniGPTConfig(**{name: value for name, value in settings.items() if name in own})


def file_name(folder: Path) -> str:
    """Return the name in `minigpt.json`, or else of the folder, reduced to characters that are safe in a file name."""
    name = read_metadata(folder).get("name")
    if not isinstance(name, str) or not name:
        name = folder.resolve().name
    return re.sub(r"[^\w.-]+", "-", name)[:100]


def sampling_settings(settings: GenerationConfig) -> dict[str, Any]:
    """Return temperature (0 for greedy), top_k, top_p and repetition_penalty of `generation_config.json`.

    Unset options get the defaults of transformers, because those of other programs differ.
    """
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    chosen = {name: getattr(settings, name) for name in defaults}
    if not settings.do_sample:
        chosen |= {"temperature": 0.0, "top_k": 1, "top_p": 1.0}
    return {name: default if chosen[name] is None else chosen[name] for name, default in defaults.items()}


def has_sliding_window(config: MiniGPTConfig) -> bool:
    """Whether any layer attends only to a window of tokens."""
    assert config.layer_types is not None  # `MiniGPTConfig` derives it if it is not given
    return "sliding_attention" in config.layer_types


def longest_full_context(config: MiniGPTConfig) -> int:
    """Return the longest context in tokens up to which sliding-window and full attention are the same function."""
    if not has_sliding_window(config):
        return config.max_position_embeddings
    assert config.sliding_window is not None  # without it, the model cannot be evaluated
    return min(config.max_position_embeddings, config.sliding_window)


def check_context(config: MiniGPTConfig, context: int | None) -> None:
    """Check that a context exceeds neither the sliding window nor the maximum sequence length.

    Raises:
        MiniGPTError: otherwise.
    """
    longest = longest_full_context(config)
    if context is not None and not 1 <= context <= longest:
        reason = (
            f"its sliding window is {config.sliding_window} tokens"
            if has_sliding_window(config)
            else "its maximum sequence length"
        )
        raise MiniGPTError(f"--context {context}: give 1 to {longest} tokens for this model ({reason})")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `out` after the block, or removed if the block raises an exception.

    Raises:
        MiniGPTError: if `out` exists or would be inside a model folder.
    """
    if out.exists() or out.is_symlink():
        raise MiniGPTError(f"{out}: already exists; remove it, or choose another --output_dir")
    if (out.resolve().parent / "config.json").is_file():
        raise MiniGPTError(f"{out}: is inside a model folder; choose an --output_dir outside of it")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an export that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def verify(is_true: bool, claim: str) -> None:
    """Check a claim about an export before it is published.

    Raises:
        MiniGPTError: if the claim is false.
    """
    if not is_true:
        raise MiniGPTError(f"the export failed verification: it is not true that {claim}; nothing was written")
