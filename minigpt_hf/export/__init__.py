"""A model folder -> the same model in the words of other programs. One file a format.

What every export does: it reads a MiniGPT folder through this door, writes beside the place where the result is to stand,
holds what it wrote against the model that it came from, and only then moves it there. It refuses, with the reason, what a
format cannot say; nothing is left behind then.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..trust import checked_folder, loading


def load_model(folder: Path) -> MiniGPTForCausalLM:
    """The model of a MiniGPT folder, in the dtype of its weights, in `eval()`, with attention written out.

    No kernel: which one is taken depends on whether there is a mask, and each rounds in its own way.

    Raises:
        MiniGPTError: if there is none, or if its weights are not all there, or not finite.
    """
    if not (folder / "config.json").is_file():
        if (folder / "model" / "config.json").is_file():
            raise MiniGPTError(f"{folder}: this is a run; its model is in {folder / 'model'}")
        raise MiniGPTError(f"{folder}: there is no config.json in it; give a model folder")
    checked_folder(str(folder))
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != MiniGPTConfig.model_type:
        raise MiniGPTError(f"{folder}: a model of type {model_type!r}; only MiniGPT folders are exported")
    with loading(str(folder)):
        model, report = MiniGPTForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", use_safetensors=True
        )
    with loading(str(folder), "tokenizer", "an export needs the tokenizer of the model"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            raise MiniGPTError(f"{folder}: {fault.replace('_', ' ')} in its weights: {sorted(map(str, report[fault]))}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise MiniGPTError(f"{folder}: {name} has values that are not finite; the model is not exported")
    return model.eval()


def longest_context(config: MiniGPTConfig) -> int:
    """Tokens up to which no window hides any: attention through a window and attention to all are one function there."""
    if "sliding_attention" in config.layer_types:
        return min(config.max_position_embeddings, config.sliding_window)
    return config.max_position_embeddings


def check_context(config: MiniGPTConfig, context: int | None) -> None:
    """Refuse a context in which a window, or the end of the positions, would be felt."""
    longest = longest_context(config)
    if context is not None and not 1 <= context <= longest:
        windows = "sliding_attention" in config.layer_types
        reason = f"its layers slide a window of {config.sliding_window} tokens" if windows else "that is its context"
        raise MiniGPTError(f"--context {context}: give 1 to {longest} tokens for this model; {reason}")


@contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends without an error it is moved to `out`, otherwise it is removed.

    Raises:
        MiniGPTError: if `out` is there already.
    """
    if out.exists() or out.is_symlink():
        raise MiniGPTError(f"{out}: is there already; remove it, or name another place with --output_dir")
    if (out.resolve().parent / "config.json").is_file():
        raise MiniGPTError(f"{out}: lies in a model folder; name a place outside of it with --output_dir")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what an export that was killed left
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check(is_so: bool, claim: str) -> None:
    """What an export says of itself is so, or there is no export.

    Raises:
        MiniGPTError: naming the claim that does not hold.
    """
    if not is_so:
        raise MiniGPTError(f"the export was made, but it does not hold that {claim}; nothing was written")
