"""Settings that contradict each other, which are rejected, and settings without effect, which are reported."""

import logging
from typing import Any

from transformers import TrainingArguments

from ..errors import MiniGPTError
from .arguments import (
    ARCHITECTURE_SETTINGS,
    AUTO,
    UNSUPPORTED_WITH,
    DataArguments,
    MiniGPTTrainingArguments,
    Settings,
    log_on_main_process,
)

# Settings that must not be empty, e.g. because a variable of the shell is not set: most of them would have no effect.
NOT_EMPTY = {
    *("output_dir", "init_from", "resume_from_checkpoint", "text_column", "data_split", "cache_dir", "deepspeed"),
    *("hub_model_id", "hub_revision"),
}
# Conversations are not truncated, and shape and length of training are not chosen for them.
NOT_FOR_CHAT = {"max_tokens", "minutes", "size", "mtp_loss_weight"}
# Settings that have an effect only with another one.
EFFECTIVE_WITH = {
    "muon": {"muon_learning_rate", "muon_momentum", "muon_beta2"},
    "use_sliding_window": {"sliding_window", "max_window_layers"},
    "push_to_hub": {"hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push"},
    "activation_checkpointing": {"activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"},
    "fsdp": {"fsdp_config"},
    "report_to": {"run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"},
}
# Settings that have an effect only if the model is evaluated during training, unless their value is none, false or 0.
OF_EVALUATIONS = ("early_stopping_patience", "eval_delay")
OF_VALIDATION_TEXT = ("eval_strategy", "eval_on_start", "load_best_model_at_end", *OF_EVALUATIONS)
# Settings of `TrainingArguments` that the Trainer of this package does not use, and the values that describe what it does.
WITHOUT_EFFECT = {
    "do_train": True,
    "do_predict": False,
    "fp16_full_eval": False,
    "bf16_full_eval": False,
    "prediction_loss_only": False,
    "logging_nan_inf_filter": False,
    "batch_eval_metrics": False,
    "include_for_metrics": [],
    "eval_accumulation_steps": None,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "length_column_name": TrainingArguments.length_column_name,
    "liger_kernel_config": None,
}
# Keys of `accelerator_config`: each process computes the addresses of its sequences itself.
WITHOUT_EFFECT_IN_ACCELERATE = ("even_batches", "use_seedable_sampler")


def settings_of_base(init_from: str) -> dict[str, Any]:
    """Settings of the text that are determined by a pretrained model."""
    return {"tokenizer": init_from, "vocab_size": DataArguments.vocab_size, "chat_tokens": False}


def reject_contradictions(settings: Settings, recipe: str | None, recipe_values: dict[str, Any]) -> None:
    """Check that settings do not contradict each other.

    Args:
        recipe: Name or YAML file of the recipe, if there is one.
        recipe_values: Its values.

    Raises:
        MiniGPTError: if they do, naming them.
    """
    data, model, training = settings
    values, given = {**vars(data), **vars(model), **vars(training)}, training.given_in_command
    for name in sorted(NOT_EMPTY):
        if values[name] == "":
            raise MiniGPTError(f"{name} is empty: give a value, or omit it")
    if model.init_from:
        if training.minutes or training.size:
            raise MiniGPTError(
                "minutes and size determine the architecture, which init_from determines as well: omit one of them"
            )
        if fixed := sorted(given & (ARCHITECTURE_SETTINGS | settings_of_base(model.init_from).keys())):
            raise MiniGPTError(f"{fixed[0]} is determined by the model of init_from {model.init_from}: omit it")
    elif model.lora_rank or recipe in ("finetune", "chat"):
        raise MiniGPTError("there is no pretrained model to start from: give a folder or a Hub id with --init_from")
    if data.chat:
        for name in NOT_FOR_CHAT & (given | recipe_values.keys()):
            if values[name]:
                raise MiniGPTError(f"{name} is not supported with chat: omit one of them")
    if model.lora_rank:
        for name in UNSUPPORTED_WITH:
            if values[name]:
                raise MiniGPTError(f"{name} is not supported with lora_rank, which freezes the model: omit one of them")
        if training.muon:
            raise MiniGPTError(
                "lora_rank: LoRA is trained with AdamW, not with Muon; add --no_muon, or use --recipe lora"
            )
        if training.push_to_hub and training.hub_strategy != "end":
            raise MiniGPTError(
                "hub_strategy every_save is not supported with lora_rank, whose checkpoints have the factors but not the "
                "weights of the model: use --hub_strategy end, which uploads the merged model"
            )
    if training.minutes:
        _reject_contradictions_of_minutes(training, recipe)


def _reject_contradictions_of_minutes(training: MiniGPTTrainingArguments, recipe: str | None) -> None:
    if "num_train_epochs" in training.given:
        raise MiniGPTError("minutes and num_train_epochs both determine the length of training: omit one of them")
    if "max_steps" in training.given:
        is_given = "max_steps" in training.given_in_command
        remedy = "omit one of them" if is_given else f"omit the recipe {recipe}, which sets max_steps"
        raise MiniGPTError(f"minutes and max_steps both determine the length of training: {remedy}")
    for name, strategy in (("eval_steps", training.eval_strategy), ("save_steps", training.save_strategy)):
        if strategy == "steps" and name in training.given and vars(training)[name] >= 1:
            raise MiniGPTError(
                f"{name} {vars(training)[name]:g}: the number of steps is chosen for minutes, and evaluations and "
                "checkpoints count towards that time: give a share of the steps below 1, e.g. 0.1"
            )
    if training.size == AUTO:
        raise MiniGPTError("minutes and size auto both determine the length of training: omit one of them")


def report_settings_without_effect(settings: Settings, recipe_values: dict[str, Any]) -> None:
    """Log settings that have no effect in combination with the others.

    Args:
        recipe_values: Values of the recipe.
    """
    data, model, training = settings
    values = {**vars(data), **vars(model), **vars(training)}
    given, written = training.given_in_command, training.written

    def warn(name: str, cause: str = "", level: int = logging.WARNING) -> None:
        log_on_main_process(training, f"{name}: no effect{cause}", level)

    if model.init_from:
        for name, value in settings_of_base(model.init_from).items():
            if (replaced := recipe_values.get(name, value)) != value:
                warn(f"{name} {replaced}", f", the tokenizer of init_from {model.init_from} is used")
    if data.chat and "validation_characters" in written:
        name = f"validation_characters {data.validation_characters}"
        warn(name, ", all conversations are scored", logging.INFO)
    for condition, names in EFFECTIVE_WITH.items():
        if not values[condition]:
            for name in sorted(written & names):
                warn(name, f" without {condition}")
    knows_layers = "num_hidden_layers" in given or not (training.size or training.minutes)  # else chosen later
    all_are_full = knows_layers and model.max_window_layers >= model.num_hidden_layers
    if "sliding_window" in written and model.use_sliding_window and all_are_full:
        warn("sliding_window", f", because max_window_layers {model.max_window_layers} includes every layer")
    for name, value in WITHOUT_EFFECT.items():
        if name in written and values[name] != value:
            warn(name)
    for name in WITHOUT_EFFECT_IN_ACCELERATE:
        if "accelerator_config" in written and not vars(training.accelerator_config)[name]:
            warn(f"accelerator_config: {name}")
    # Recorded recipes contain true.
    if "do_eval" in given or recipe_values.get("do_eval") is False:
        warn("do_eval", "; eval_strategy determines when to evaluate")
    _report_intervals(data, training)
    if written >= {"max_steps", "num_train_epochs"} and training.max_steps > 0:
        log_on_main_process(training, f"max_steps {training.max_steps} takes precedence over num_train_epochs")


def _report_intervals(data: DataArguments, training: MiniGPTTrainingArguments) -> None:
    """Log settings of evaluations, checkpoints and log that have no effect."""
    given, written = training.given_in_command, training.written

    def warn(name: str, cause: str) -> None:
        log_on_main_process(training, f"{name}: no effect with {cause}", logging.WARNING)

    unused: tuple[str, ...] = ()
    if data.validation_fraction == 0:
        cause, unused = "validation_fraction 0", OF_VALIDATION_TEXT
        if "validation_characters" in given and not data.chat:
            warn("validation_characters", cause)
    elif training.eval_strategy == "no":
        cause, unused = "eval_strategy no", OF_EVALUATIONS
    for name in unused:
        if name in written and vars(training)[name] not in (None, False, 0, "no"):
            warn(name, cause)
    for kind in ("logging", "eval", "save"):
        strategy = vars(training)[f"{kind}_strategy"]
        if kind == "eval" and data.validation_fraction == 0:
            strategy = "no"
        is_default_of_save_steps = (
            kind == "eval" and training.save_strategy == "steps" and "save_steps" not in training.given
        )
        is_written = f"{kind}_steps" in (given if f"{kind}_strategy" in given else written)
        if kind == "save" and "save_steps" not in given and training.save_steps == training.eval_steps:
            is_written = False  # the default, which a recorded recipe contains
        if is_written and strategy != "steps" and not is_default_of_save_steps:
            warn(f"{kind}_steps", f"{kind}_strategy {getattr(strategy, 'value', strategy)}")
