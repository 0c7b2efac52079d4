"""The settings of a training run: three frozen dataclasses, one of which extends transformers' `TrainingArguments`.

Every setting of `TrainingArguments` is supported; some have a different default. Values are validated on construction.
"""

import copy
import dataclasses
import logging
import os
import re
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available

from ..data.files import FORMATS, SHARD_CACHE, TABLE_EXTENSIONS
from ..errors import MiniGPTError
from .scaling import parse_size
from .sharding import check_config, launcher_config

# Values that the Hub accepts in the metadata of a model card; the Hub validates license identifiers itself.
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

AUTO = "auto"  # value of `size`: choose the settings from the text
METRICS = ("loss", "perplexity", "bits_per_byte")  # metrics of the validation split; lower is better for each

logger = logging.getLogger(__name__)

# Valid intervals of numbers, by setting. Others are validated where they are used.
INTERVALS = {
    **dict.fromkeys(("block_size", "validation_characters", "num_proc", "max_tokens"), "[1, inf)"),
    "shard_cache": "(0, inf)",
    "shuffle_window": "[0, inf)",
    "max_position_embeddings": "[1, inf)",
    "sliding_window": "[2, inf)",  # with a window of 1, the caches of transformers keep all tokens
    **dict.fromkeys(("max_window_layers", "lora_rank", "sample_tokens", "early_stopping_patience"), "[0, inf)"),
    "logits_chunk_size": "[0, inf)",
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "[1, inf)"),
    **dict.fromkeys(("gradient_accumulation_steps",), "[1, inf)"),
    **dict.fromkeys(("dataloader_num_workers", "save_total_limit", "eval_delay", "warmup_steps"), "[0, inf)"),
    **dict.fromkeys(("learning_rate", "muon_learning_rate", "adam_epsilon", "weight_decay"), "[0, inf)"),
    **dict.fromkeys(("max_grad_norm", "neftune_noise_alpha", "mtp_loss_weight"), "[0, inf)"),
    **dict.fromkeys(("muon_momentum", "muon_beta2", "adam_beta1", "adam_beta2", "label_smoothing_factor"), "[0, 1)"),
    **dict.fromkeys(("minutes", "num_train_epochs", "initializer_range"), "(0, inf)"),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), "(0, inf)"),
    "rope_theta": "(1, inf)",
    "rms_norm_eps": "(0, 0.1)",
    "seed": "[0, 4294967296)",
}

# Settings of the loss that exclude others.
UNSUPPORTED_WITH = {
    "mtp_loss_weight": ("fsdp", "deepspeed", "label_smoothing_factor"),
    "logits_chunk_size": ("fsdp", "deepspeed", "label_smoothing_factor", "fp16"),  # gradients would underflow in fp16
}


def is_used(training: TrainingArguments, name: str) -> bool:
    """Whether a setting is given; `accelerate launch` requests DeepSpeed by a variable instead."""
    is_requested = name == "deepspeed" and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    return bool(getattr(training, name)) or is_requested


def check_numbers(settings: Any) -> None:
    """Check that the numbers of a settings dataclass are finite and in their intervals.

    Raises:
        MiniGPTError: for the first one that is not.
    """
    for name in (each.name for each in fields(settings)):
        value = getattr(settings, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        interval = INTERVALS.get(name, "(-inf, inf)")
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        is_inside = low < value < high or (value == low and interval[0] == "[")  # false for NaN
        if not is_inside:
            raise MiniGPTError(f"{name} is {value}: it must be {describe_interval(interval)}")


def describe_interval(interval: str) -> str:
    """ "[0, inf)" -> "at least 0"; "(0, 0.1)" -> "more than 0 and less than 0.1"."""
    low, high = interval[1:-1].split(", ")
    parts = [] if low == "-inf" else [f"{'at least' if interval[0] == '[' else 'more than'} {low}"]
    parts += ["finite"] if high == "inf" else [f"less than {high}"]
    return " and ".join(parts)


@dataclass(frozen=True)
class DataArguments:
    """The text, its validation split and its tokenization."""

    data: str = field(
        default="stdlib",
        metadata={
            "help": "Text to train on: a file, folder, glob pattern or URL of text files (each file is a document) or of "
            f"tables ({', '.join(each[1:] for each in TABLE_EXTENSIONS)}: each row is a document), uncompressed or gz, "
            "zst, xz; a folder written by `save_to_disk` or `minigpt tokenize`; a Hub dataset, user/name or "
            "user/name:config; `stdlib`, the source code of the Python standard library; - for standard input; or a "
            "mixture with shares of characters, one:0.7,other:0.3. A name is a pattern (* ? [ ] **) only if no file or "
            "folder has exactly that name."
        },
    )
    data_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of a dataset, e.g. train[:5%%]; default: train, with the dataset's own validation split if it has "
            "one."
        },
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of a table that holds the text; default: `text`, or the only column."}
    )
    data_format: str | None = field(
        default=None,
        metadata={
            "help": f"Format of the files, regardless of their extensions: {', '.join(FORMATS)}; in a folder, all files that "
            "are not hidden are read."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Stream a Hub dataset until max_tokens have been read, without storing its documents."},
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum number of training tokens, including the token that precedes each document."},
    )
    chat: bool = field(
        default=False,
        metadata={
            "help": "Train on conversations, the rows of tables, and learn only the answers. Columns: `messages`; "
            "`conversations`; `prompt` and `completion`; or `instruction`, `input` and `output`."
        },
    )
    system: str | None = field(
        default=None, metadata={"help": "With chat: system message of conversations that have none."}
    )
    encoding: str = field(
        default="utf-8",
        metadata={
            "help": "Encoding of text, csv and json files; utf-8-sig is UTF-8 with a byte order mark, which is removed."
        },
    )
    encoding_errors: str = field(
        default="strict",
        metadata={
            "help": "Handling of undecodable bytes: `strict` rejects the file, `replace` inserts U+FFFD, `ignore` drops them."
        },
    )
    newline: Literal["preserve", "universal"] = field(
        default="preserve",
        metadata={
            "help": "Line endings of text files: `preserve` keeps every byte; `universal` converts CRLF and CR to LF."
        },
    )
    dedup: Literal["none", "exact", "near"] = field(
        default="none",
        metadata={
            "help": "Drop documents that are copies of earlier ones (`exact`), or also those that share most sequences of "
            "five words (`near`; requires the extra `dedup`); they are listed in a file."
        },
    )
    language: list[str] = field(
        default_factory=list,
        metadata={"help": "Languages of the text, for the model card: ISO 639 codes, e.g. en; `code`, `multilingual`."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "License of the model, for the model card: an identifier of the Hub, e.g. mit, cc-by-4.0."},
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the text in the validation split, if the data has no validation split: with 20 documents "
            "or more, those with the lowest content hashes; with fewer, the end of the text. 0: no validation."
        },
    )
    validation_characters: int = field(
        default=1_000_000,
        metadata={
            "help": "Number of characters of the validation split that are scored, sampled from all its documents."
        },
    )
    tokenizer: str = field(
        default="bpe",
        metadata={"help": "`bpe` (byte-level), `characters`, `bytes`, or a folder or Hub id of an existing tokenizer."},
    )
    vocab_size: int = field(
        default=4096, metadata={"help": "Maximum vocabulary size of `bpe`; other tokenizers have a fixed one."}
    )
    chat_tokens: bool = field(
        default=False,
        metadata={
            "help": "Reserve the special tokens of ChatML in the vocabulary, so that the recipe chat later neither extends "
            "the tokenizer nor resizes the embeddings."
        },
    )
    block_size: int = field(default=256, metadata={"help": "Number of tokens in a training sequence."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Cache of tokenizers and token streams; default: `minigpt` in the Hugging Face cache."},
    )
    shard_cache: float = field(
        default=SHARD_CACHE, metadata={"help": "Maximum size of local copies of remote shards in the cache, in GB."}
    )
    shuffle_window: int = field(
        default=0,
        metadata={
            "help": "Permute the sequences within windows of this many consecutive ones, and the windows, so that few shards "
            "are read at a time; 0: permute all sequences."
        },
    )
    num_proc: int | None = field(
        default=None, metadata={"help": "Number of threads that tokenize; default: the number of cores, at most 16."}
    )

    def __post_init__(self):
        if not self.data.strip():
            raise MiniGPTError(
                f"data is {self.data!r}: it must not be empty; give a file, a folder (`.` for the current one) or a URL"
            )
        check_numbers(self)
        if self.streaming and self.max_tokens is None:
            raise MiniGPTError("streaming requires max_tokens, the number of tokens to read: set --max_tokens")
        if not isinstance(self.language, str | list):
            raise MiniGPTError(f"language is {self.language!r}: expected a list of codes, such as ['en']")
        if isinstance(self.language, str):
            object.__setattr__(self, "language", [self.language])
        for code in self.language:
            if not isinstance(code, str) or not LANGUAGE.fullmatch(code):
                hint = " (in a recipe, write Norwegian as 'no' in quotes)" if code is False else ""
                raise MiniGPTError(f"language {code!r}: expected an ISO 639 code such as en or deu, or `code`{hint}")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise MiniGPTError(
                f"license {self.license!r}: expected a license identifier of the Hub, such as mit, cc-by-4.0 or other"
            )


@dataclass(frozen=True)
class ModelArguments:
    """The architecture, with the names of `MiniGPTConfig`, or a pretrained model, which determines its own."""

    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from the weights, architecture and tokenizer of this MiniGPT or Qwen3 folder or Hub id; the "
            "default recipe is then `finetune`, with lora_rank `lora`, with chat `chat`."
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA: train low-rank factors of frozen matrices, merged at the end; 0: train all weights."
        },
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Number of decoder layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Number of query heads."})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Number of key and value heads; default: num_attention_heads."}
    )
    head_dim: int | None = field(
        default=None, metadata={"help": "Dimension of each head; default: hidden_size / num_attention_heads."}
    )
    intermediate_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the feed-forward network; default: 8/3 of hidden_size, rounded up to a multiple of 32."
        },
    )
    max_position_embeddings: int | None = field(
        default=None,
        metadata={"help": "Maximum sequence length; default: block_size, or 16 · block_size with use_sliding_window."},
    )
    use_sliding_window: bool = field(
        default=False,
        metadata={"help": "Layers from max_window_layers on attend to the last sliding_window tokens only."},
    )
    sliding_window: int | None = field(
        default=None, metadata={"help": "Number of tokens in the sliding window; default: block_size + 1."}
    )
    max_window_layers: int = field(default=0, metadata={"help": "Number of initial layers that have full attention."})
    rope_theta: float = field(default=10_000.0, metadata={"help": "Base θ of the rotary frequencies (RoPE)."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "The output head shares the embedding matrix."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    positional_heads: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Heads that initially attend to the token a fixed distance back: for each of the first layers, the "
            "distances of its first heads, e.g. 1,2,3 1,2,4 1,2. `none`: no heads."
        },
    )
    rms_norm_eps: float = field(default=1e-6, metadata={"help": "Epsilon, added to the mean square in each RMSNorm."})
    attention_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of attention weights."})
    embedding_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of embeddings."})
    residual_dropout: float = field(
        default=0.0, metadata={"help": "Dropout probability of the output of each sublayer."}
    )

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "positional_heads", parse_positional_heads(self.positional_heads))


def parse_positional_heads(value: Any) -> list[list[int]]:
    """["1,2,3", "1,2"] or [[1, 2, 3], [1, 2]] -> [[1, 2, 3], [1, 2]]; ["none"] -> [].

    Raises:
        MiniGPTError: for anything else, and for a distance below 1.
    """
    if value in (["none"], "none"):
        return []
    try:
        if not isinstance(value, list):
            raise TypeError
        parsed = [[int(d) for d in each.split(",")] if isinstance(each, str) else list(each) for each in value]
    except (TypeError, ValueError):
        parsed = [[0]]
    if not all(isinstance(d, int) and not isinstance(d, bool) and d >= 1 for of_layer in parsed for d in of_layer):
        raise MiniGPTError(
            f"positional_heads is {value!r}: expected a list of distances ≥ 1 for each layer, such as 1,2,3 1,2 "
            "(in a recipe: [[1, 2, 3], [1, 2]])"
        )
    return parsed


@dataclass
class MiniGPTTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with defaults for a small GPT, Muon, and samples generated during training."""

    minutes: float | None = field(
        default=None,
        metadata={"help": "Time budget of the whole run in minutes; settings that are not given are chosen to fit."},
    )
    size: str | None = field(
        default=None,
        metadata={
            "help": "Approximate number of parameters, e.g. 10m; settings that are not given are chosen to fit. `auto`: "
            "chosen from the size of the text, at most 1,000,000."
        },
    )
    # Names of the settings given by a recipe, flag or keyword; `minutes` and `size` choose only the others.
    given: frozenset[str] = field(default=frozenset(), init=False)
    # The subset given by a flag or keyword. Values of a recipe may be adjusted to other settings, which is logged.
    given_in_command: frozenset[str] = field(default=frozenset(), init=False)
    # Those, and the ones that a recipe file sets to another value than the default: someone's choice. (A recipe that a run
    # has recorded contains every setting.)
    written: frozenset[str] = field(default=frozenset(), init=False)

    muon: bool = field(
        default=True,
        metadata={
            "help": "Muon for the matrices of the layers, AdamW for all other parameters. --no_muon: `optim` for all."
        },
    )
    muon_learning_rate: float = field(
        default=0.02, metadata={"help": "Peak learning rate of Muon; learning_rate is that of AdamW."}
    )
    muon_momentum: float = field(default=0.9, metadata={"help": "Momentum of Muon."})
    muon_beta2: float = field(
        default=0.95,
        metadata={
            "help": "Decay rate of Muon's second moments, one per row or column of a matrix (NorMuon, arXiv:2510.05491); "
            "0: none."
        },
    )
    mtp_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Multi-token prediction: initial weight of the loss of an auxiliary head that predicts the token after "
            "the next one; the weight falls linearly to 0, and the head is not published. 0: none."
        },
    )
    logits_chunk_size: int = field(
        default=0,
        metadata={
            "help": "Number of tokens whose logits and loss are computed at a time, which saves memory with large "
            "vocabularies; 0: all."
        },
    )
    sample_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of the samples generated during training; default: the first words of the text. An empty prompt "
            "starts a document."
        },
    )
    sample_tokens: int = field(default=120, metadata={"help": "Number of tokens in each sample; 0: no samples."})
    figures: bool = field(
        default=True,
        metadata={"help": "Draw losses, learning rate and throughput for the model card, with matplotlib."},
    )

    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this number of evaluations without improvement; 0: never; default: 5 if training takes more "
            "than one epoch and the best checkpoint is published, else 0."
        },
    )
    fresh: bool = field(
        default=False, metadata={"help": "Start from step 0: a run that exists in output_dir is renamed, not deleted."}
    )
    allow_change: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of settings that may differ from those of the run that is resumed."},
    )
    async_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Continue training while a checkpoint is hashed, synchronized to disk and renamed; until then the "
            "previous one is the newest."
        },
    )
    on_bad_loss: Literal["stop", "skip"] = field(
        default="stop",
        metadata={
            "help": "What to do if the loss or gradient of a step is non-finite or has exploded: stop the run, or skip the "
            "step."
        },
    )

    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second-moment decay rate of AdamW."})
    warmup_steps: float = field(default=20, metadata={"help": "Steps of linear warmup; below 1, share of all steps."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences per device and forward pass."})
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Windows per device and forward pass in evaluations."}
    )
    max_steps: int = field(default=1000, metadata={"help": "Number of optimizer steps; -1: use num_train_epochs."})
    bf16: bool = field(  # type: ignore[assignment]  # `_resolve` replaces None
        default=None, metadata={"help": "bfloat16 autocast over float32 weights; default: if the device supports it."}
    )
    fsdp: bool = field(  # type: ignore[assignment]  # transformers still accepts strings, and expects None for False
        default=None,
        metadata={
            "help": "Shard parameters, gradients and optimizer states over the processes (FSDP2); fsdp_config refines it."
        },
    )
    logging_steps: float = field(default=20, metadata={"help": "Steps between log lines; below 1, share of all steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(
        default=0.25, metadata={"help": "Steps between evaluations; below 1, share of all steps."}
    )
    save_steps: float = field(  # type: ignore[assignment]  # `_resolve` replaces None
        default=None, metadata={"help": "Steps between checkpoints; below 1, share of all steps; default: eval_steps."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Number of checkpoints to keep, 0 for all; the best and the last are always kept."}
    )
    load_best_model_at_end: bool = field(  # type: ignore[assignment]  # `_resolve` replaces None
        default=None,
        metadata={
            "help": "Publish the checkpoint with the lowest validation loss; default: if every checkpoint is evaluated."
        },
    )
    # With the filter, the Trainer would log the mean of the previous losses in place of a non-finite one.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace non-finite losses in the log by the mean of the previous ones."}
    )
    # The Trainer would remove `shift_labels`, which `forward` accepts as one of its **kwargs.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that are not named arguments of `forward`."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for parameters without gradient in every step; MiniGPT has none."}
    )
    # `ProgressLogger` prints lines instead, which remain readable in a file.
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Disable the Trainer's progress bar."})

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_is_frozen") and not name.startswith("_"):
            raise FrozenInstanceError(f"cannot assign to {name}: settings are frozen once resolved")
        super().__setattr__(name, value)

    def mutable_copy(self) -> "MiniGPTTrainingArguments":
        """Return a copy that is not frozen, for the Trainer, which assigns to its arguments."""
        copied = copy.copy(self)
        copied._is_frozen = False
        return copied

    def __post_init__(self):
        self._is_frozen = False
        self._resolve()
        self._is_frozen = True

    def _resolve(self) -> None:
        """Validate the settings, and set those derived from the hardware or from other settings."""
        check_numbers(self)
        if self.fresh and self.resume_from_checkpoint:
            raise MiniGPTError(
                f"fresh starts at step 0, and resume_from_checkpoint {self.resume_from_checkpoint} continues a run: omit one "
                "of them; to start a new run from the weights of a checkpoint, use --init_from"
            )
        if self.minutes is not None and self.size not in (None, AUTO):
            raise MiniGPTError("minutes and size both determine the model: give only one of them")
        if self.size is not None and str(self.size) != AUTO:
            parse_size(str(self.size))
        if self.max_steps == 0 or self.max_steps < -1:
            raise MiniGPTError(
                f"max_steps is {self.max_steps}: give a number of steps, or -1 to train for num_train_epochs"
            )
        if self.muon and self.optim != TrainingArguments.optim:
            raise MiniGPTError(f"optim {self.optim} has no effect with Muon: add --no_muon")
        for name in ("optim_args", "optim_target_modules"):
            if self.muon and getattr(self, name) is not None:
                raise MiniGPTError(f"{name} has no effect with Muon: add --no_muon")
        if self.train_sampling_strategy != "random":
            raise MiniGPTError(
                f"train_sampling_strategy {self.train_sampling_strategy} is not supported: the order of the sequences "
                "is computed from the seed; omit it"
            )
        if self.torch_compile_mode is not None and self.torch_compile_mode not in torch._inductor.list_mode_options():
            modes = ", ".join(torch._inductor.list_mode_options())
            raise MiniGPTError(f"torch_compile_mode is {self.torch_compile_mode!r}: expected {modes}")
        if self.remove_unused_columns:
            raise MiniGPTError("remove_unused_columns is not supported: it would remove the labels; omit it")
        if self.auto_find_batch_size:
            raise MiniGPTError(
                "auto_find_batch_size is not supported: the batch size determines the position in the text, and cannot "
                "change in a run; omit it, and lower per_device_train_batch_size if the memory does not suffice"
            )
        if not self.dataloader_in_order:
            raise MiniGPTError(
                "dataloader_in_order false is not supported: the order of the data would not be reproducible; omit it"
            )
        if self.use_liger_kernel:
            raise MiniGPTError("use_liger_kernel is not supported: Liger has no kernels for this architecture; omit it")
        if self.label_names is not None:
            raise MiniGPTError(
                f"label_names {self.label_names} is not supported: a language model predicts its input; omit it"
            )
        if not self.fsdp and (requested := launcher_config()) is not None:
            if vars(self)["fsdp_config"]:
                raise MiniGPTError(
                    "fsdp_config: `accelerate launch` configures FSDP as well: add --fsdp to use fsdp_config only, or omit it"
                )
            self.fsdp, self.fsdp_config = True, requested
        self.fsdp = self.fsdp or None  # type: ignore[assignment]
        for setting, others in UNSUPPORTED_WITH.items():
            for name in others:
                if getattr(self, setting) and is_used(self, name):
                    raise MiniGPTError(f"{setting} is not supported with {name}: omit one of them")
        if self.ignore_data_skip:
            raise MiniGPTError(
                "ignore_data_skip is not supported: the position in the data is computed, so resuming reads no data that "
                "was already used; omit it"
            )
        if self.data_seed is not None:
            raise MiniGPTError(
                f"data_seed {self.data_seed} is not supported: seed determines the order of the data; use --seed"
            )
        if self.metric_for_best_model is not None and self.metric_for_best_model.removeprefix("eval_") not in METRICS:
            raise MiniGPTError(
                f"metric_for_best_model {self.metric_for_best_model}: unknown metric; available: {', '.join(METRICS)}"
            )
        if self.greater_is_better:  # type: ignore[has-type]  # inherited
            raise MiniGPTError(f"greater_is_better is true: lower is better for {', '.join(METRICS)}; omit it")
        if self.metric_for_best_model is not None:
            self.greater_is_better = False  # transformers infers True from every name that does not end in `loss`
        if self.hub_token:
            raise MiniGPTError("hub_token is not accepted: log in with `hf auth login`, or set HF_TOKEN")
        if self.push_to_hub and self.hub_strategy not in ("every_save", "end"):
            raise MiniGPTError(
                f"hub_strategy {self.hub_strategy} would upload optimizer states, which are pickles: use every_save or end"
            )
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and not self.fp16 and is_torch_bf16_gpu_available()
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps  # as in transformers
        if self.save_steps is None:
            self.save_steps = self.eval_steps
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise MiniGPTError(
                "save_strategy best: checkpoints are saved after evaluations, and there are none with eval_strategy no or "
                "validation_fraction 0; use --save_strategy steps"
            )
        if self.load_best_model_at_end is None:
            is_same_schedule = self.save_strategy == self.eval_strategy and self.save_steps == self.eval_steps
            is_evaluated = is_same_schedule or self.save_strategy == "best"
            self.load_best_model_at_end = self.eval_strategy != "no" and is_evaluated
        self.check_intervals()
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise accelerate treats each process of the launcher as the only one
        super().__post_init__()
        if self.fsdp:
            check_config(self.fsdp_config)
        stated = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        if self.mixed_precision != stated:  # transformers takes it from the environment
            raise MiniGPTError(
                f"ACCELERATE_MIXED_PRECISION is {self.mixed_precision}, but the settings state float32: unset this variable "
                "(with `accelerate launch`: --mixed_precision no), or give --bf16 or --fp16"
            )
        if (compiler := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no" and not self.torch_compile:
            raise MiniGPTError(
                f"ACCELERATE_DYNAMO_BACKEND is {compiler}, but the settings state no compilation: unset this variable (with "
                "`accelerate launch`: --dynamo_backend no), or give --torch_compile"
            )
        for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            if self.torch_compile and os.environ.get(name) == "1":
                raise MiniGPTError(
                    f"{name} is 1, so nothing would be compiled: unset this variable, or omit torch_compile"
                )
        own = str(self.gradient_accumulation_steps)
        valid = ("1", own, "auto") if self.deepspeed_plugin is not None else ("1", own)  # DeepSpeed fills in "auto"
        if (steps := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", own)) not in valid:
            raise MiniGPTError(
                f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, but gradient_accumulation_steps is {own}: unset this "
                f"variable, or give --gradient_accumulation_steps {steps}"
            )
        if self.accelerator_config.split_batches:
            raise MiniGPTError("accelerator_config: split_batches is not supported; use --per_device_train_batch_size")
        if self.accelerator_config.dispatch_batches:
            raise MiniGPTError(
                "accelerator_config: dispatch_batches is not supported: each process reads its own batches"
            )
        if self.accelerator_config.gradient_accumulation_kwargs:
            raise MiniGPTError(
                "accelerator_config: gradient_accumulation_kwargs is not supported; use --gradient_accumulation_steps"
            )
        for name in self.report_to:
            if name not in (available := get_available_reporting_integrations()):
                installed = ", ".join(available) or "none"
                raise MiniGPTError(
                    f"report_to {name}: unknown or not installed; install it, or use one of: {installed}"
                )
        if self.device.type == "cpu" and self.fp16:
            raise MiniGPTError("fp16 requires an accelerator, and none is available: omit it")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinned memory only speeds up copies to an accelerator
        if self.world_size > 1:
            # Otherwise accelerate repeats sequences to give all ranks equally many. The dropped tail differs between epochs.
            self.dataloader_drop_last = True

    def check_intervals(self) -> None:
        """Check that every checkpoint is evaluated if the best one is to be published.

        Raises:
            MiniGPTError: if `save_steps` is not a multiple of `eval_steps`.
        """
        if not self.load_best_model_at_end or self.save_strategy != "steps" or self.eval_strategy != "steps":
            return
        save, evaluate = self.save_steps, self.eval_steps
        if not save or not evaluate:
            return
        shares = (save < 1, evaluate < 1)
        ratio = save / evaluate
        if (any(shares) and not all(shares)) or abs(ratio - round(ratio)) > 1e-9:
            raise MiniGPTError(
                f"load_best_model_at_end requires an evaluation at each checkpoint: save_steps is {save:g} and must be a "
                f"multiple of eval_steps, which is {evaluate:g}; use --save_steps {evaluate:g}, or --load_best_model_at_end "
                "false to publish the last checkpoint"
            )


GROUPS = (DataArguments, ModelArguments, MiniGPTTrainingArguments)


class Settings(NamedTuple):
    """All settings of a training run. They are immutable; `replace` returns new ones."""

    data: DataArguments
    model: ModelArguments
    training: MiniGPTTrainingArguments

    def replace(self, **values: Any) -> "Settings":
        """Return settings with other values, validated again.

        Args:
            values: New values by name. A name belongs to exactly one of the three groups.
        """
        own = [{name: values.pop(name) for name in [*values] if name in group.__dataclass_fields__} for group in self]
        assert not values, f"unknown settings: {', '.join(values)}"
        data, model, training = own
        given = {
            name: training.pop(name, getattr(self.training, name)) for name in ("given", "given_in_command", "written")
        }
        new = dataclasses.replace(self.training, **training) if training else self.training
        new = new.mutable_copy()
        for name, value in given.items():  # not arguments of the constructor
            setattr(new, name, value)
        new._is_frozen = True
        return Settings(
            dataclasses.replace(self.data, **data) if data else self.data,
            dataclasses.replace(self.model, **model) if model else self.model,
            new,
        )


# Settings that a pretrained model determines; the others of `ModelArguments` apply to training only.
ARCHITECTURE_SETTINGS = {each.name for each in fields(ModelArguments)} - {
    *("init_from", "lora_rank", "attention_dropout", "embedding_dropout", "residual_dropout")
}


def log_on_main_process(training: MiniGPTTrainingArguments, message: str, level: int = logging.INFO) -> None:
    """Log a message on rank 0 only; all ranks resolve the same settings."""
    if training.process_index == 0:
        logger.log(level, message)


def setting_types() -> dict[str, Any]:
    """Return the types of all settings by name."""
    # Not `field.type`, which `HfArgumentParser` overwrites for some fields.
    types = {name: kind for group in GROUPS for name, kind in get_type_hints(group).items()}
    return {each.name: types[each.name] for group in GROUPS for each in fields(group) if each.init}
