"""Build the model to train: configuration, fresh or pretrained weights, LoRA.

Pretrained weights come from a MiniGPT or Qwen3 model folder or Hub id, and are loaded in float32.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import fields

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_mismatch, vocabulary_size
from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..trust import checked_folder, loading
from .arguments import (
    ARCHITECTURE_SETTINGS,
    ModelArguments,
    Settings,
    log_on_main_process,
    parse_positional_heads,
)
from .positional_heads import check_positional_heads, initialize_positional_heads


def pretrained_config(architecture: ModelArguments) -> MiniGPTConfig:
    """Return the configuration of `init_from` as a `MiniGPTConfig`, with the dropout probabilities of `architecture`.

    Raises:
        MiniGPTError: if `init_from` has no model, a quantized one, or one that is neither MiniGPT nor Qwen3.
    """
    folder = architecture.init_from
    assert folder is not None
    path = checked_folder(folder)
    with loading(folder):
        found = AutoConfig.from_pretrained(path, trust_remote_code=False)
    settings = found.to_dict()
    if found.model_type not in ("minigpt", "qwen3"):
        raise MiniGPTError(
            f"init_from {folder}: this is a {found.model_type} model; only MiniGPT and Qwen3 models are supported"
        )
    for name, supported in (("attention_bias", False), ("hidden_act", "silu")):
        if settings.get(name, supported) != supported:
            raise MiniGPTError(
                f"init_from {folder}: its {name} is {settings[name]!r}; only models with {supported!r} are supported"
            )
    if settings.get("quantization_config"):
        raise MiniGPTError(
            f"init_from {folder}: quantized weights cannot be trained; give the model before quantization"
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
    return config


def with_pretrained_architecture(settings: Settings) -> Settings:
    """Replace the architecture by that of `init_from`, and log which values of the recipe have no effect therefore.

    Raises:
        MiniGPTError: if the model cannot be trained.
    """
    config = pretrained_config(settings.model)
    assert config.rope_parameters is not None  # set by the configuration itself
    values = {name: vars(config)[name] for name in ARCHITECTURE_SETTINGS if name in vars(config)}
    values["rope_theta"] = config.rope_parameters["rope_theta"]
    of_recipe = {name: vars(settings.model)[name] for name in sorted(settings.training.given & values.keys())}
    ignored = {name: value for name, value in of_recipe.items() if value not in (None, values[name])}
    if heads := parse_positional_heads(settings.model.positional_heads):
        ignored["positional_heads"] = heads  # those of fresh weights
    if ignored:
        log_on_main_process(
            settings.training,
            f"{', '.join(f'{name} {value}' for name, value in ignored.items())}: no effect, init_from "
            f"{settings.model.init_from} determines the architecture",
            logging.WARNING,
        )
    return settings.replace(**values, positional_heads=[])


def build_config(
    architecture: ModelArguments, block_size: int, tokenizer: PreTrainedTokenizerBase, chat: bool = False
) -> MiniGPTConfig:
    """Return the configuration of the model to train: that of `init_from`, or a new one.

    Sets `model_max_length` of the tokenizer.

    Args:
        chat: The tokens of ChatML may have been added to the tokenizer of `init_from`.

    Raises:
        MiniGPTError: if the architecture is invalid, its maximum sequence length is less than `block_size` (in tokens), or
            its vocabulary is smaller than that of the tokenizer.
    """
    config = (
        pretrained_config(architecture) if architecture.init_from else fresh_config(architecture, block_size, tokenizer)
    )
    if config.max_position_embeddings < block_size:
        raise MiniGPTError(
            f"max_position_embeddings {config.max_position_embeddings} is less than block_size {block_size}: training "
            "sequences would exceed the maximum sequence length of the model; reduce --block_size"
        )
    # A new configuration records no tokenizer.
    of_model = load_tokenizer(architecture.init_from) if chat and architecture.init_from else tokenizer
    if mismatch := tokenizer_mismatch(config, of_model):
        raise MiniGPTError(f"--init_from {architecture.init_from}: {mismatch}")
    size = vocabulary_size(tokenizer)
    if chat:
        config.vocab_size = max(config.vocab_size, size)
        config.eos_token_id = tokenizer.eos_token_id
    if chat or tokenizer.bos_token_id is not None:  # the configuration of another program may name another token
        config.bos_token_id = tokenizer.bos_token_id
    if config.vocab_size < size:
        raise MiniGPTError(
            f"the tokenizer has {size:,} tokens, but the vocabulary of the model has only {config.vocab_size:,}"
        )
    tokenizer.model_max_length = config.max_position_embeddings
    config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    return config


def fresh_config(architecture: ModelArguments, block_size: int, tokenizer: PreTrainedTokenizerBase) -> MiniGPTConfig:
    """Return the configuration of a model with fresh weights."""
    settings = dict(vars(architecture))
    for name in ("init_from", "lora_rank", "positional_heads"):
        del settings[name]
    rope_theta, max_length = settings.pop("rope_theta"), settings.pop("max_position_embeddings")
    if architecture.use_sliding_window:
        # With a window of about the training sequence length, the model can generate longer texts, because no layer attends
        # further back than in training. The window is one token longer than a training sequence, so that training needs no
        # mask for it, and attention uses its fast path.
        settings["sliding_window"] = settings["sliding_window"] or block_size + 1
        max_length = max_length or 16 * block_size
    try:
        config = MiniGPTConfig(
            vocab_size=vocabulary_size(tokenizer),
            max_position_embeddings=max_length or block_size,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    except StrictDataclassError as error:  # its cause has the message without the name of the validator
        raise MiniGPTError(str(error.__cause__ or error)) from error
    except ValueError as error:
        raise MiniGPTError(str(error)) from error
    check_positional_heads(architecture, block_size)
    return config


def build_model(
    config: MiniGPTConfig, architecture: ModelArguments, chat_tokens: Sequence[int] = ()
) -> PreTrainedModel:
    """Create the model to train: fresh or pretrained weights in float32, optional LoRA, and a generation configuration.

    Args:
        chat_tokens: Ids of the tokens of ChatML, for conversations. With LoRA, their embeddings are trained as well. The
            default of the generation configuration is then greedy decoding instead of sampling.
    """
    folder = architecture.init_from
    if folder:
        model = pretrained_model(folder, config)
    else:
        model = MiniGPTForCausalLM(config)
        if distances := parse_positional_heads(architecture.positional_heads):
            initialize_positional_heads(model, distances)
    bos, eos = config.bos_token_id, config.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=not chat_tokens,
        temperature=None if chat_tokens else 0.8,
        bos_token_id=bos,
        # A BOS token that differs from EOS separates documents in the training text.
        eos_token_id=eos if bos in (None, eos) or isinstance(eos, list) else [eos, bos],
        pad_token_id=config.pad_token_id,
    )
    return with_lora(model, architecture.lora_rank, chat_tokens) if architecture.lora_rank else model


def content_hash(folder: str) -> str:
    """Return the SHA-256 of the configuration and weights of a model folder or Hub id, independent of its location.

    Raises:
        MiniGPTError: if there is no such model.
    """
    path, content = checked_folder(folder), hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]):
        with file.open("rb") as opened:
            content.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()


def pretrained_model(folder: str, config: MiniGPTConfig) -> MiniGPTForCausalLM:
    """Load the weights of a model folder or Hub id in float32, whichever dtype they were saved in.

    If the vocabulary of `config` is larger than that of the model, the added tokens get the mean embedding plus noise.
    """
    path, size = checked_folder(folder), config.vocab_size
    with loading(folder):
        config.vocab_size = AutoConfig.from_pretrained(path, trust_remote_code=False).vocab_size
        model, info = MiniGPTForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    if size > config.vocab_size:
        add_tokens(model, size)
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]):
        raise MiniGPTError(f"init_from {folder}: the weights do not match the configuration ({wrong[0]}, …)")
    return model


@torch.no_grad()
def add_tokens(model: MiniGPTForCausalLM, vocab_size: int) -> None:
    """Enlarge the vocabulary. New rows of the embedding and of an untied head are the mean of the old rows plus noise.

    The mean keeps the constant component on which positional heads rely. transformers' own `mean_resizing` draws from the
    distribution of the old rows, which requires more rows than columns.
    """
    old = model.config.vocab_size
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    matrices = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for matrix in matrices.values():
        noise = torch.randn(vocab_size - old, matrix.shape[1]) * model.config.initializer_range
        matrix[old:] = matrix[:old].mean(dim=0) + noise


def with_lora(model: MiniGPTForCausalLM, rank: int, trained_tokens: Sequence[int] = ()) -> PreTrainedModel:
    """Freeze the model, and add trainable factors A [rank, in] and B [out, rank] to each matrix of its layers.

    W becomes W + 2 · B · A. B is initialized to zero, so the model is initially unchanged (Hu et al. 2021, arXiv:2106.09685).
    The rows of `trained_tokens` in the embedding, and in an untied head, are trained as well.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise MiniGPTError("lora_rank requires PEFT, which is not installed: `pip install peft`") from error
    matrices = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=["lm_head"],
        task_type=TaskType.CAUSAL_LM,
        trainable_token_indices={name: list(trained_tokens) for name in matrices} if trained_tokens else None,
    )
    return get_peft_model(model, settings)


def merge_lora(model: PreTrainedModel) -> MiniGPTForCausalLM:
    """Merge the LoRA factors into the matrices."""
    return model.merge_and_unload()
