"""A model folder -> a MiniGPT to go on training, whole or beside frozen matrices (LoRA).

In: a folder or Hub id of a MiniGPT, or of a Qwen3, its twin. Out: a `MiniGPTForCausalLM` in float32. It refuses other
architectures, weights that are missing, and settings that MiniGPT does not have.
"""

import hashlib
from dataclasses import fields

import torch
from transformers import AutoConfig, PreTrainedModel

from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..trust import checked_folder, loading
from .arguments import OF_THE_MODEL, ModelArguments


def existing_config(architecture: ModelArguments) -> MiniGPTConfig:
    """The configuration of `init_from`, as a MiniGPT's; it is filled into `architecture`, all but the dropouts.

    Raises:
        MiniGPTError: if there is no model there, or it is neither a MiniGPT nor a Qwen3.
    """
    folder = architecture.init_from
    path = checked_folder(folder)
    with loading(folder):
        found = AutoConfig.from_pretrained(path, trust_remote_code=False)
    settings = found.to_dict()
    if found.model_type not in ("minigpt", "qwen3") or settings.get("attention_bias") or found.hidden_act != "silu":
        raise MiniGPTError(
            f"--init_from {folder}: this is a {found.model_type}; only MiniGPT and Qwen3 models are of this shape"
        )
    if settings.get("quantization_config"):
        raise MiniGPTError(
            f"--init_from {folder}: its weights are quantized, and cannot be trained; give the model before quantization"
        )
    known = {each.name for each in fields(MiniGPTConfig)} - {
        "auto_map",
        "architectures",
        "dtype",
        "transformers_version",
    }
    config = MiniGPTConfig(**{name: value for name, value in settings.items() if name in known})
    for name in ("attention_dropout", "embedding_dropout", "residual_dropout"):
        setattr(config, name, vars(architecture)[name])
    for name in OF_THE_MODEL - {"rope_theta"}:
        setattr(architecture, name, settings[name] if name in settings else vars(config)[name])
    architecture.rope_theta = config.rope_parameters["rope_theta"]
    return config


def content_of(folder: str) -> str:
    """SHA-256 of the configuration and the weights of a folder or Hub id, wherever it lies.

    Raises:
        MiniGPTError: if there is no model there.
    """
    path, content = checked_folder(folder), hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]):
        with file.open("rb") as opened:
            content.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()


def existing_model(folder: str, config: MiniGPTConfig) -> MiniGPTForCausalLM:
    """The weights of a folder or Hub id, in float32, whatever they were saved in."""
    path = checked_folder(folder)
    with loading(folder):
        model, about = MiniGPTForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    if wrong := sorted([*about["missing_keys"], *about["unexpected_keys"], *about["mismatched_keys"]]):
        raise MiniGPTError(f"--init_from {folder}: its weights are not those of its configuration ({wrong[0]}, …)")
    return model


def with_lora(model: MiniGPTForCausalLM, rank: int) -> PreTrainedModel:
    """Freeze the model, and put trainable factors A [rank, in] and B [out, rank] beside each matrix of its layers.

    W becomes W + 2 · B · A, and B starts at zero: at first nothing changes (Hu et al. 2021, arXiv:2106.09685).
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise MiniGPTError("--lora_rank needs PEFT, which is not installed: pip install peft") from error
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=["lm_head"],
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, settings)


def merged(model: PreTrainedModel) -> MiniGPTForCausalLM:
    """The factors multiplied out into the matrices: a model like any other."""
    return model.merge_and_unload()
