"""Steps shared by all export formats: check the output folder, load and validate the model, limit the context, verify."""

import json
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from ..atomic import check_links, check_new_folder
from ..data.tokenizer import tokenizer_mismatch
from ..errors import MiniGPTError
from ..inference.generation import only_settings
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..publish.card import hub_id
from ..publish.model_folder import warn_if_weights_differ
from ..trust import checked_folder, loading, read_metadata

logger = logging.getLogger(__name__)

# Settings of `generation_config.json` that do not affect the text, or are converted otherwise.
WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config"),
    *("disable_compile", "continuous_batching_config", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "return_dict_in_generate", "max_length", "max_new_tokens", "do_sample"),
}


def load_model(folder: Path) -> MiniGPTForCausalLM:
    """Load the model of a MiniGPT folder, or of its native twin, in the dtype of its weights and in evaluation mode.

    Attention is eager: which SDPA kernel is used depends on the mask, and the kernels round differently.

    Raises:
        MiniGPTError: if there is no MiniGPT model, its weights are incomplete or not finite, or an EOS token is not in the
            vocabulary.
    """
    if not (folder / "config.json").is_file():
        if (folder / "model" / "config.json").is_file():
            raise MiniGPTError(f"{folder}: this is a run folder; its model folder is {folder / 'model'}")
        raise MiniGPTError(f"{folder}: it has no config.json; give a model folder")
    checked_folder(str(folder))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_type = settings.get("model_type")
    if model_type not in (MiniGPTConfig.model_type, "qwen3"):
        raise MiniGPTError(f"{folder}: its model type is {model_type!r}; only MiniGPT and Qwen3 models can be exported")
    if settings.get("quantization_config"):
        raise MiniGPTError(f"{folder}: its weights are quantized; export the model before quantization")
    with loading(str(folder)):
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # with the defaults of its own class
        model, report = MiniGPTForCausalLM.from_pretrained(
            folder,
            config=MiniGPTConfig.from_dict(found.to_dict()),
            output_loading_info=True,
            attn_implementation="eager",
            use_safetensors=True,
        )
    with loading(str(folder), "tokenizer", "an export needs the tokenizer of the model"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if mismatch := tokenizer_mismatch(model.config, tokenizer):
        raise MiniGPTError(f"{folder}: {mismatch}")
    check_stop_tokens(folder, model, stop_tokens(model))
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            raise MiniGPTError(f"{folder}: {key.replace('_', ' ')} in its weights: {sorted(map(str, report[key]))}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise MiniGPTError(f"{folder}: {name} has values that are not finite; the model is not exported")
    warn_if_weights_differ(folder)
    return model.eval()


def stop_tokens(model: MiniGPTForCausalLM) -> list[int]:
    """Return the tokens at which `generate` stops."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def check_stop_tokens(folder: Path, model: MiniGPTForCausalLM, stops: list[int]) -> None:
    """Check that the vocabulary contains the EOS tokens.

    Raises:
        MiniGPTError: if not; generation would never stop.
    """
    for stop in stops:
        if not 0 <= stop < model.config.vocab_size:
            raise MiniGPTError(
                f"{folder}: its EOS token {stop} exceeds the vocabulary ({model.config.vocab_size:,} tokens): correct "
                "eos_token_id in generation_config.json"
            )


def file_name(folder: Path) -> str:
    """Return the name in `minigpt.json`, or else of the folder, reduced to characters that are safe in a file name."""
    name = read_metadata(folder).get("name")
    if not isinstance(name, str) or not name:
        name = folder.resolve().name
    return re.sub(r"[^\w.-]+", "-", name)[:100]


def sampling_settings(settings: GenerationConfig) -> dict[str, Any]:
    """Return temperature (0 for greedy), top_k, top_p and repetition_penalty of `generation_config.json`.

    Unset options get the defaults of transformers, because those of other programs differ. A warning is logged if there are
    other settings that affect the text.
    """
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    chosen = {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "repetition_penalty": settings.repetition_penalty,
    }
    if not settings.do_sample:
        chosen |= {"temperature": 0.0, "top_k": 1, "top_p": 1.0}
    of_transformers = settings._get_default_generation_params()
    lost = [
        f"{name} {value}"
        for name, value in settings.to_diff_dict().items()
        if name not in {*defaults, *WITHOUT_EFFECT} and value not in (None, of_transformers.get(name))
    ]
    if lost:
        logger.warning(
            f"generation_config.json: the export has no equivalent of {', '.join(lost)}; it generates without"
        )
    return {name: default if chosen[name] is None else chosen[name] for name, default in defaults.items()}


def greedy_continuation(
    model: MiniGPTForCausalLM, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, eos: Any
) -> torch.Tensor:
    """Return token ids [B, T] of prompts and `new_tokens` new ones; `generation_config.json` does not apply.

    Args:
        eos: Tokens at which generation stops.
    """
    with only_settings(model, eos_token_id=eos, pad_token_id=0):
        return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens)


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


def check_output(out: Path, folder: Path) -> None:
    """Check that an export can be written to `out`, before the model in `folder` is loaded.

    Raises:
        MiniGPTError: if `out` exists, cannot be created, or is, contains or is inside a model folder.
    """
    check_links(out)
    source, target = folder.resolve(), out.resolve()
    relation = "is" if target == source else "is inside" if target.is_relative_to(source) else "contains"
    if (source / "config.json").is_file() and (source.is_relative_to(target) or target.is_relative_to(source)):
        raise MiniGPTError(f"{out}: {relation} the model folder {folder}; choose an --output_dir outside of it")
    if (target.parent / "config.json").is_file():
        raise MiniGPTError(f"{out}: is inside a model folder; choose an --output_dir outside of it")
    check_new_folder(out)


def write_card(folder: Path, out: Path, library: str, text: str) -> None:
    """Write the card of a converted model, whose metadata names the model it was converted from, if that is on the Hub.

    Args:
        library: The Hub's name of the library that reads the format.
        text: What the folder contains, in Markdown.
    """
    metadata = read_metadata(folder)
    base = hub_id(metadata.get("name"))
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,  # the Hub's relation for conversions, of any precision
        language=metadata.get("language") or None,
        library_name=library,
        license=metadata.get("license"),
        pipeline_tag="text-generation",
        tags=["minigpt"],
    )
    branch = metadata.get("hub_revision")
    tree = f"/tree/{quote(str(branch), safe='')}" if branch else ""
    source = f"[{base}{tree}](https://huggingface.co/{base}{tree})" if base else "A MiniGPT"
    card = f"---\n{data.to_yaml()}\n---\n\n{source}, converted by minigpt-hf.\n\n{text}\n"
    (out / "README.md").write_text(card, encoding="utf-8")


def verify(is_true: bool, claim: str) -> None:
    """Check a claim about an export before it is published.

    Raises:
        MiniGPTError: if the claim is false.
    """
    if not is_true:
        raise MiniGPTError(f"the export failed verification: it is not true that {claim}; nothing was written")
