"""The short help of `minigpt train` and `minigpt tokenize`: the common settings with their defaults, one line each."""

import textwrap
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

WIDTH = 120  # characters

# Settings of `minigpt train --help`, by group. `minigpt tokenize --help` shows those of `TOKENIZE`.
COMMON = {
    "data": {
        "data": "file, folder, URL or Hub dataset",
        "text_column": "column of a table that holds the text",
        "chat": "conversations: learn only the answers",
        "dedup": "drop duplicates: none, exact or near",
        "validation_fraction": "share of the text in the validation split",
        "tokenizer": "bpe, characters, bytes, or a folder or Hub id",
        "vocab_size": "maximum vocabulary size of bpe",
        "chat_tokens": "reserve ChatML tokens for a later chat model",
        "block_size": "tokens per training sequence",
    },
    "model": {
        "init_from": "pretrained MiniGPT or Qwen3: folder or Hub id",
        "lora_rank": "rank of LoRA; 0 trains all weights",
        "hidden_size": "width of the residual stream",
        "num_hidden_layers": "number of layers",
        "num_attention_heads": "number of query heads",
        "residual_dropout": "dropout of each sublayer's output",
    },
    "optimization": {
        "minutes": "time budget; unset settings are chosen to fit",
        "size": "parameters, e.g. 10m; unset settings chosen to fit",
        "max_steps": "optimizer steps; -1: use num_train_epochs",
        "num_train_epochs": "passes over the training split",
        "per_device_train_batch_size": "sequences per device and forward pass",
        "gradient_accumulation_steps": "forward passes per optimizer step",
        "muon": "Muon for matrices; --no_muon: AdamW for all",
        "muon_learning_rate": "peak learning rate of Muon",
        "learning_rate": "peak learning rate of AdamW",
        "warmup_steps": "steps of linear warmup; below 1: share of all",
        "weight_decay": "decoupled weight decay",
        "early_stopping_patience": "evaluations without improvement; 0: never stop",
        "seed": "seed of initialization, data order and dropout",
    },
    "output": {
        "output_dir": "run folder",
        "fresh": "do not resume; rename an existing run",
        "logging_steps": "steps between log lines; below 1: share of all",
        "eval_steps": "steps between evaluations; below 1: share of all",
        "save_steps": "steps between checkpoints; below 1: share of all",
        "sample_tokens": "tokens of the generated samples; 0: no samples",
    },
    "hardware": {
        "use_cpu": "ignore accelerators",
        "bf16": "bfloat16 autocast",
        "torch_compile": "compile the model",
        "num_proc": "threads that tokenize",
    },
}
TOKENIZE = ({*COMMON["data"]} - {"chat"}) | {"output_dir", "num_proc"}
# Flags of `minigpt tokenize --help` that are not settings.
SHARDS = {
    "--shard I/N": "tokenize share I of N, from 0, with an existing tokenizer",
    "--merge FOLDER": "verify the shards in FOLDER and write their index; no other flag is required",
}
# Defaults that are computed when a run starts, where the dataclass has `None`.
COMPUTED = {
    "output_dir": "runs/RECIPE",
    "bf16": "if possible",
    "save_steps": "eval_steps",
    "num_proc": "all cores",
    "early_stopping_patience": "auto",
}


def short_help(command: str) -> str:
    """Return the text of `minigpt train --help` or `minigpt tokenize --help`.

    Columns: flag, default without flags (recipe `demo`), default with `--data` (recipe `auto`) where it differs,
    default of transformers' `TrainingArguments` where it differs, description.
    """
    from ..training.arguments import GROUPS
    from ..training.recipe import effective_defaults, recipe_names

    effective = effective_defaults()
    own = {each.name: shown_default(each.default) for group in GROUPS for each in fields(group)}
    inherited = transformers_defaults()
    groups = COMMON
    required = ""
    if command == "tokenize":
        groups = {
            group: {name: text for name, text in settings.items() if name in TOKENIZE}
            for group, settings in COMMON.items()
        }
        required = " --output_dir FOLDER"
    lines = [
        f"usage: minigpt {command} [--recipe NAME | --recipe FILE.yaml] [--data TEXT]{required} [--SETTING VALUE …]",
        *textwrap.wrap(f"recipes: {', '.join(recipe_names())}", WIDTH, subsequent_indent="  ", break_on_hyphens=False),
        "",
        _row("", "default", "with --data", "transformers", ""),
    ]
    for group, settings in groups.items():
        lines += [group] if settings else []
        for name, description in settings.items():
            default, with_data = effective.get(name, (own[name], own[name]))
            if default == "none":
                default = COMPUTED.get(name, default)
            with_data = {"none": default, "chosen from the text": "auto"}.get(with_data, with_data)
            theirs = inherited.get(name, default)
            with_data, theirs = ("" if value == default else value for value in (with_data, theirs))
            lines.append(_row(f"  --{name}", default, with_data, theirs, description))
    if command == "tokenize":
        lines += ["shards"] + [f"  {usage:<29} {text}" for usage, text in SHARDS.items()]
    lines += ["", f"auto: chosen from the text. `minigpt {command} --help-all` lists every setting."]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def transformers_defaults() -> dict[str, str]:
    """Defaults of `TrainingArguments`, by name of the setting, as the help shows them."""
    from transformers import TrainingArguments

    return {each.name: shown_default(each.default) for each in fields(TrainingArguments) if each.init}


def shown_default(default: Any) -> str:
    """The default of a dataclass field as the help shows it."""
    if default is None or default is MISSING or default == "":
        return "none"
    return str(default.value if isinstance(default, Enum) else default)


def _row(flag: str, default: str, with_data: str, transformers: str, description: str) -> str:
    return f"{flag:<31} {default:<11} {with_data:<11} {transformers:<13} {description}"
