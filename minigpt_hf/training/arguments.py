"""The settings of a training run: three frozen dataclasses, one of which extends transformers' `TrainingArguments`.

Every flag of `TrainingArguments` works; some have another default. Invalid values are refused on construction.
"""

import copy
import dataclasses
import logging
import math
import os
import re
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available

from ..errors import MiniGPTError
from .scaling import number_of

# What the Hub takes in the metadata of a card; it knows the names of licences itself.
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

AUTO = "auto"  # the value of `size` with which the text decides
METRICS = ("loss", "perplexity", "bits_per_byte")  # of the validation text; lower is better for each

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataArguments:
    """What to learn from."""

    data: str = field(
        default="stdlib",
        metadata={
            "help": "What to learn from: a file, folder, glob or URL of text (each file is a document) or of tables (jsonl, "
            "json, csv, tsv, parquet, arrow: each row is one), plain or gz, zst, xz; a folder that `save_to_disk` or "
            "`minigpt tokenize` wrote; a Hub dataset, user/name or user/name:config; `stdlib`, the Python standard "
            "library's source on this disk; - for standard input; or a mixture by characters, one:0.7,other:0.3. A name is "
            "a pattern (* ? [ ] **) only if no file or folder has exactly that name."
        },
    )
    data_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of a dataset, e.g. train[:5%%]; default: train, and its own validation split if it has one."
        },
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of a table that is text; default: `text`, or the only one."}
    )
    data_format: str | None = field(
        default=None,
        metadata={
            "help": "Read files as text, json, csv, parquet or arrow, whatever their endings; of a folder, all files that "
            "are not hidden."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Take documents of a Hub dataset as they arrive, until --max_tokens; keep none."},
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Take at most this many tokens of the training text, those that open documents included."},
    )
    encoding: str = field(
        default="utf-8",
        metadata={"help": "Encoding of text, csv and json files; utf-8-sig is UTF-8 without its byte order mark."},
    )
    encoding_errors: str = field(
        default="strict",
        metadata={"help": "Bytes that are no text in it: `strict` refuses their file; or `replace` or `ignore` them."},
    )
    newline: Literal["preserve", "universal"] = field(
        default="preserve",
        metadata={"help": "Line ends of text files: `preserve` every byte, or `universal`: CRLF and CR become LF."},
    )
    language: list[str] = field(
        default_factory=list,
        metadata={"help": "For the card: ISO 639 codes of the text's languages, e.g. en; `code`, `multilingual`."},
    )
    license: str | None = field(
        default=None, metadata={"help": "For the card: the model's licence, as the Hub names it, e.g. mit, cc-by-4.0."}
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share held out, if no validation split comes with the data: of 20 documents or more, those with the "
            "lowest hash of their content; of fewer, the tail of the text. 0 for none."
        },
    )
    validation_characters: int = field(
        default=1_000_000,
        metadata={
            "help": "Number of characters of the validation text that are scored, sampled from all its documents."
        },
    )
    tokenizer: str = field(
        default="bpe",
        metadata={"help": "`bpe` (byte-level), `characters`, `bytes`, or a folder or Hub id of an existing tokenizer."},
    )
    vocab_size: int = field(
        default=4096, metadata={"help": "Tokens that `bpe` learns, at most. Others have their own."}
    )
    block_size: int = field(
        default=256, metadata={"help": "Tokens in a training block: the longest context it learns."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where tokenizers and token streams are kept; default: `minigpt` in the Hugging Face cache."},
    )
    num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; default: one for each core."}
    )

    def __post_init__(self):
        if not self.data.strip():
            raise MiniGPTError(
                f"data is {self.data!r}: it names no text; give a file, a folder (`.` for this one) or a URL"
            )
        for name in ("block_size", "validation_characters", "num_proc", "max_tokens"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise MiniGPTError(f"{name} is {value}: it must be at least 1")
        if self.streaming and self.max_tokens is None:
            raise MiniGPTError("--streaming needs --max_tokens: how much of the stream to take")
        if isinstance(self.language, str):
            object.__setattr__(self, "language", [self.language])
        for code in self.language:
            if not isinstance(code, str) or not LANGUAGE.fullmatch(code):
                hint = " (in a recipe, Norwegian is 'no' in quotes)" if code is False else ""
                raise MiniGPTError(f"language {code!r}: expected an ISO 639 code such as en or deu, or `code`{hint}")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise MiniGPTError(
                f"license {self.license!r}: expected a name of the Hub's, such as mit, cc-by-4.0 or other"
            )


@dataclass(frozen=True)
class ModelArguments:
    """The architecture; names and meanings are those of `MiniGPTConfig`. Or a model to go on from, which has its own."""

    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from the weights, architecture and tokenizer of this MiniGPT or Qwen3 folder or Hub id; the "
            "default recipe is then `finetune`."
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Learn factors of this rank beside frozen matrices (LoRA), merged at the end; 0: learn it all."
        },
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Number of blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Number of query heads."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Key and value heads; default: as many."})
    head_dim: int | None = field(default=None, metadata={"help": "Width of a head; default: hidden_size / heads."})
    intermediate_size: int | None = field(
        default=None,
        metadata={"help": "Width of the feed-forward layer; default: 8/3 of hidden_size, to a multiple of 32."},
    )
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Longest sequence that the model is said to take; default: block_size."}
    )
    use_sliding_window: bool = field(
        default=False, metadata={"help": "Layers from max_window_layers on see only the last sliding_window tokens."}
    )
    sliding_window: int | None = field(default=None, metadata={"help": "How many tokens such a layer sees."})
    max_window_layers: int = field(default=0, metadata={"help": "The first layers, which see everything."})
    rope_theta: float = field(default=10_000.0, metadata={"help": "Longest wavelength of the rotary positions."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "The output head is the embedding matrix."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of fresh weights."})
    rms_norm_eps: float = field(default=1e-6, metadata={"help": "Added to the mean square in each norm."})
    attention_dropout: float = field(default=0.0, metadata={"help": "Share of attention weights dropped in training."})
    embedding_dropout: float = field(default=0.0, metadata={"help": "Share of embedding values dropped in training."})
    residual_dropout: float = field(
        default=0.0, metadata={"help": "Share of each branch's output dropped in training."}
    )


@dataclass
class MiniGPTTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the defaults of a small GPT, Muon, and samples while it trains."""

    minutes: float | None = field(
        default=None,
        metadata={"help": "How long all of it may take: every setting that is not given is chosen for that."},
    )
    size: str | None = field(
        default=None,
        metadata={
            "help": "About how many parameters, e.g. 10m: what is not given is chosen for that. `auto`: as many as fit the "
            "text, and 1,000,000 at most."
        },
    )
    # Names that a recipe, a flag or a keyword gave: the others may be chosen by `minutes` and `size`.
    given: frozenset[str] = field(default=frozenset(), init=False)
    # Those of them that a flag or a keyword gave: what a recipe gave may be fitted to the rest, which is logged.
    given_in_command: frozenset[str] = field(default=frozenset(), init=False)

    muon: bool = field(
        default=True,
        metadata={"help": "Muon for the matrices of the layers, AdamW for the rest. --no_muon: `optim` for all."},
    )
    muon_learning_rate: float = field(
        default=0.02, metadata={"help": "Learning rate of Muon; AdamW has learning_rate."}
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Momentum of Muon."})
    sample_prompt: str | None = field(
        default=None,
        metadata={
            "help": "What the samples shown while training start with; default: the first words of the text. An empty one "
            "begins a document."
        },
    )
    sample_tokens: int = field(default=120, metadata={"help": "Tokens in such a sample; 0 for no samples."})

    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End after so many evaluations without a better one; 0: never; default: 5 if the text is passed more "
            "than once, else never."
        },
    )
    fresh: bool = field(
        default=False, metadata={"help": "Start over: a run that is in output_dir is renamed, not deleted."}
    )
    allow_change: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings that may differ from those a run was started with, when it goes on."},
    )
    on_bad_loss: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "What a step does whose loss or gradient is not finite, or has exploded."}
    )

    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "How slowly AdamW forgets squared gradients."})
    warmup_steps: float = field(
        default=20, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Blocks in a batch, per device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Windows in a validation batch, per device."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps; -1: num_train_epochs decides."})
    bf16: bool = field(
        default=None, metadata={"help": "bfloat16 autocast over float32 weights; default: where the device has it."}
    )
    logging_steps: float = field(default=20, metadata={"help": "A line every so many steps; below 1, a share of all."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to validate: no, steps or epoch."})
    eval_steps: float | None = field(default=0.25, metadata={"help": "Validate every so many steps; below 1, a share."})
    save_steps: float = field(default=None, metadata={"help": "Save every so many steps; default: as eval_steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep: the best and the last."})
    load_best_model_at_end: bool = field(
        default=None,
        metadata={
            "help": "Publish the best by validation loss; default: if it is validated and saved at the same steps."
        },
    )
    # A loss that is not a number is to be seen; the Trainer would log 0.0 in its place.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    # The Trainer would drop `shift_labels`, which `forward` takes through its keyword arguments.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop what `forward` does not name."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search each step for parameters without gradient; MiniGPT has none."}
    )
    # Lines in our own format instead of a bar: they can be read an hour later.
    disable_tqdm: bool | None = field(default=True, metadata={"help": "No progress bar of the Trainer's."})

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_is_frozen") and not name.startswith("_"):
            raise FrozenInstanceError(f"cannot assign to {name}: settings are frozen once resolved")
        super().__setattr__(name, value)

    def mutable_copy(self) -> "MiniGPTTrainingArguments":
        """A copy for the Trainer, which assigns to its arguments."""
        copied = copy.copy(self)
        copied._is_frozen = False
        return copied

    def __post_init__(self):
        self._is_frozen = False
        self._resolve()
        self._is_frozen = True

    def _resolve(self) -> None:
        """Validate, and fill in what follows from the hardware or from other settings."""
        smallest = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
        smallest |= {"early_stopping_patience": 0, "learning_rate": 0, "muon_learning_rate": 0, "sample_tokens": 0}
        for name, least in smallest.items():
            value = vars(self)[name]
            if value is not None and not least <= value < math.inf:  # nor is it nan
                raise MiniGPTError(f"{name} is {value}: it must be at least {least}, and a number")
        if not 0 <= self.seed < 1 << 32:
            raise MiniGPTError(f"seed is {self.seed}: it must be at least 0 and less than 2^32")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise MiniGPTError(f"minutes is {self.minutes}: it must be more than 0")
        if self.minutes is not None and self.size not in (None, "auto"):
            raise MiniGPTError("--minutes and --size both choose the model: give one of them")
        if self.size is not None and str(self.size) != "auto":
            number_of(str(self.size))
        if self.max_steps == 0 or self.max_steps < -1:
            raise MiniGPTError(
                f"max_steps is {self.max_steps}: give a number of steps, or -1 to train for num_train_epochs"
            )
        if self.muon and self.optim != TrainingArguments.optim:
            raise MiniGPTError(f"optim {self.optim} has no effect beside Muon: add --no_muon")
        for name in ("optim_args", "optim_target_modules"):
            if self.muon and getattr(self, name) is not None:
                raise MiniGPTError(f"{name} has no effect on Muon: add --no_muon")
        if self.train_sampling_strategy != "random":
            raise MiniGPTError(
                f"train_sampling_strategy {self.train_sampling_strategy} is not supported: each epoch takes the sequences in "
                "an order computed from the seed; leave it out"
            )
        if not self.dataloader_in_order:
            raise MiniGPTError(
                "dataloader_in_order false is not supported: the order of the data would differ from run to run; leave it out"
            )
        if self.label_names is not None:
            raise MiniGPTError(f"label_names {self.label_names} is not supported: a language model predicts its input")
        if self.ignore_data_skip:
            raise MiniGPTError(
                "ignore_data_skip is not supported: the position in the data is computed, so nothing is read again when a "
                "run resumes; leave it out"
            )
        if self.data_seed is not None:
            raise MiniGPTError(
                f"data_seed {self.data_seed} is not supported: seed decides the order of the data; give --seed"
            )
        if self.metric_for_best_model is not None and self.metric_for_best_model.removeprefix("eval_") not in METRICS:
            raise MiniGPTError(
                f"metric_for_best_model {self.metric_for_best_model}: there is no such metric; give {', '.join(METRICS)}"
            )
        if self.greater_is_better:
            raise MiniGPTError(
                f"greater_is_better is {self.greater_is_better}: lower is better for {', '.join(METRICS)}; leave it out"
            )
        if self.metric_for_best_model is not None:
            self.greater_is_better = False  # transformers infers True from every name that does not end in `loss`
        if self.hub_token:
            raise MiniGPTError("hub_token is not taken: log in once with `hf auth login`, or set HF_TOKEN")
        if self.push_to_hub and self.hub_strategy not in ("every_save", "end"):
            raise MiniGPTError(
                f"hub_strategy {self.hub_strategy} would upload optimizer states, which are pickles: say every_save or end"
            )
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and not self.fp16 and is_torch_bf16_gpu_available()
        if self.save_steps is None:
            self.save_steps = self.eval_steps
        if self.load_best_model_at_end is None:
            together = self.save_strategy == self.eval_strategy and self.save_steps == self.eval_steps
            self.load_best_model_at_end = self.eval_strategy != "no" and together
        self.check_intervals()
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate takes each process of the launcher for the only one
        super().__post_init__()
        for name in self.report_to:
            if name not in (available := get_available_reporting_integrations()):
                installed = ", ".join(available) or "none"
                raise MiniGPTError(
                    f"report_to {name}: is unknown or not installed; install it, or name one of: {installed}"
                )
        if self.device.type == "cpu" and self.fp16:
            raise MiniGPTError("fp16 needs an accelerator, and there is none here: leave it out")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinned memory speeds up copies to an accelerator; there is none
        if self.world_size > 1:
            # Else accelerate shows some blocks twice, to give each process as many. What is left out moves each epoch.
            self.dataloader_drop_last = True

    def check_intervals(self) -> None:
        """Whether each checkpoint is validated, where the best one is to be published.

        Raises:
            MiniGPTError: if not.
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
                f"load_best_model_at_end needs a validation at each checkpoint: save_steps is {save:g}, and must be a "
                f"multiple of eval_steps, which is {evaluate:g}; give --save_steps {evaluate:g}, or --load_best_model_at_end "
                "false to publish the last step"
            )


GROUPS = (DataArguments, ModelArguments, MiniGPTTrainingArguments)


class Settings(NamedTuple):
    """All settings of a training run. Frozen: `replace` returns new settings."""

    data: DataArguments
    model: ModelArguments
    training: MiniGPTTrainingArguments

    def replace(self, **values: Any) -> "Settings":
        """Settings with other values, validated again.

        Args:
            values: By name; a name belongs to exactly one of the three groups.
        """
        groups = []
        for group in self:
            own = {name: values.pop(name) for name in [*values] if name in group.__dataclass_fields__}
            given = {name: own.pop(name) for name in ("given", "given_in_command") if name in own}
            new = dataclasses.replace(group, **own) if own else group
            if isinstance(group, MiniGPTTrainingArguments) and (own or given):
                new = new.mutable_copy()
                for name in ("given", "given_in_command"):
                    setattr(new, name, given.get(name, getattr(group, name)))
                new._is_frozen = True
            groups.append(new)
        assert not values, f"unknown settings: {', '.join(values)}"
        return Settings(*groups)


# What an existing model brings along; the rest of `ModelArguments` is a matter of training.
OF_THE_MODEL = {each.name for each in fields(ModelArguments)} - {
    *("init_from", "lora_rank", "attention_dropout", "embedding_dropout", "residual_dropout")
}


def log_once(training: MiniGPTTrainingArguments, message: str, level: int = logging.INFO) -> None:
    """Log a choice in the first process only: the others make the same."""
    if training.process_index == 0:
        logger.log(level, message)


def settings_known() -> dict[str, Any]:
    """Every setting there is, by name, with its type."""
    # Not `field.type`: `HfArgumentParser` replaces some of these while it adds its flags.
    types = {name: kind for group in GROUPS for name, kind in get_type_hints(group).items()}
    return {each.name: types[each.name] for group in GROUPS for each in fields(group) if each.init}
