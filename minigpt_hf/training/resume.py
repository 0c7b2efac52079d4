"""Whether a run may be resumed, and from which checkpoint.

A run is resumed only if everything that determines its numbers (its fingerprint) is unchanged, or a change was allowed by
name.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import AcceleratorConfig

from ..atomic import rename_aside, temporary_name, write_files
from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..data.tokenizer import tokenizer_fingerprint, vocabulary_size
from ..errors import MiniGPTError
from ..publish.model_folder import damage
from .arguments import MiniGPTTrainingArguments, Settings
from .checkpoint import newest_valid, verification_error
from .initialize import content_of
from .lock import LOCK, FolderLock
from .report import tokens_per_step
from .run_folder import FINGERPRINT, RunFolder, read_json, truncate_log

logger = logging.getLogger(__name__)

T = TypeVar("T")

DESCRIBED = "described"  # entry of a fingerprint: names and sizes for messages, not compared


@contextmanager
def locked_run_folder(training: MiniGPTTrainingArguments) -> Iterator[FolderLock]:
    """Lock `output_dir` within the block; with several processes the main process holds the lock for all.

    Raises:
        MiniGPTError: on every process, if another training holds the lock, or the folder is not empty and holds no run.
    """
    run = RunFolder(Path(training.output_dir))
    lock = FolderLock(run.path)

    def acquire() -> None:
        if run.path.exists() and not run.path.is_dir():
            raise MiniGPTError(f"--output_dir {run.path}: this is a file; name a folder")
        if run.exists() and (run.path / "trainer_state.json").is_file():
            raise MiniGPTError(
                f"--output_dir {run.path}: this is a checkpoint; name the folder of its run, {run.path.absolute().parent}"
            )
        if run.model.is_dir() and not os.access(run.path, os.W_OK):
            return  # finished and read-only: nothing can be written there
        lock.acquire()
        names = {path.name for path in run.path.iterdir()} - {LOCK, temporary_name(run.recipe).name}
        if temporary_name(run.fingerprint).name in names:  # an earlier start was killed while it wrote its first files
            names -= {temporary_name(run.fingerprint).name, run.recipe.name}
        restore_fingerprint(run)
        if names and not run.exists():
            raise MiniGPTError(f"--output_dir {run.path}: is not empty and holds no run; name another folder")

    try:
        from_main_process(training, acquire)
        yield lock
    finally:
        lock.release()


def start_over(lock: FolderLock) -> None:
    """Rename the run folder, and lock a new one in its place."""
    run = lock.folder
    print(f"the run that was in {run} is kept as {(aside := rename_aside(run))}", flush=True)
    lock.moved_to(aside)
    lock.release()
    lock.moved_to(run)
    lock.acquire()


def from_main_process(training: MiniGPTTrainingArguments, compute: Callable[[], T]) -> T:
    """What the main process computes, or the error it raises, on every process."""
    if training.world_size == 1:
        return compute()
    outcome: list[Any] = [None, None]
    if training.process_index == 0:
        try:
            outcome[0] = compute()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def is_finished(run: RunFolder, fingerprint: dict[str, Any]) -> bool:
    """Whether the run has its model; a damaged one is set aside, to be published again from a checkpoint.

    Raises:
        MiniGPTError: if the folder holds another run, or a damaged model and no checkpoint to publish it from.
    """
    old = read_fingerprint(run.fingerprint)
    if changed := changes(old, fingerprint):
        raise MiniGPTError(
            f"--output_dir {run.path}: holds another run, which is finished ({in_words(changed, old, fingerprint)}); name "
            "another folder, or say --fresh"
        )
    if (fault := damage(run.model)) is None:
        print(f"this run is finished; the model is in {run.model}", flush=True)
        return True
    if all(verification_error(checkpoint) for checkpoint in run.checkpoints()):
        raise MiniGPTError(
            f"--output_dir {run.path}: its model is damaged ({fault}), and no checkpoint is left to publish it from; restore "
            f"{run.model} from a copy, or train again with --fresh"
        )
    kept = rename_aside(run.model)
    logger.warning(f"{run.model} is damaged ({fault}); it is kept as {kept.name}, and is published again")
    return False


def checkpoint_to_resume(
    run: RunFolder, fingerprint: dict[str, Any], training: MiniGPTTrainingArguments
) -> Path | None:
    """The newest checkpoint that is whole, if the run was started with the same settings."""
    if not run.exists():
        if training.resume_from_checkpoint:
            raise MiniGPTError(f"--resume_from_checkpoint: there is no run in {run.path} that could go on")
        return None
    if training.resume_from_checkpoint:
        checkpoint = Path(training.resume_from_checkpoint)
        if fault := verification_error(checkpoint):
            raise MiniGPTError(f"--resume_from_checkpoint {checkpoint}: it is broken ({fault})")
    else:
        checkpoint, lines = newest_valid(run)
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    old = read_fingerprint((checkpoint or run.path) / FINGERPRINT)
    changed = changes(old, fingerprint)

    def said(pairs: dict[str, tuple[Any, Any]]) -> str:
        return in_words(pairs, old, fingerprint)

    if fixed := {name: pair for name, pair in changed.items() if name.startswith("config.") and name not in MAY_CHANGE}:
        raise MiniGPTError(
            f"--output_dir {run.path}: holds another run, its model is another ({said(fixed)}); name another folder, or "
            "say --fresh"
        )
    known = [name for name in fingerprint if name != DESCRIBED]
    for name in training.allow_change:
        if name not in known:
            raise MiniGPTError(f"--allow_change {name}: a run is not known by that; there are {', '.join(known)}")
    refused = {name: pair for name, pair in changed.items() if name not in training.allow_change}
    if refused:
        raise MiniGPTError(
            f"--output_dir {run.path}: holds another run, or this one with other settings ({said(refused)}); name "
            f"another folder, say --fresh, or allow it with --allow_change {' '.join(refused)}"
        )
    if changed:
        print(f"changed: {said(changed)}", flush=True)
    step = step_of(checkpoint) if checkpoint else -1
    if training.resume_from_checkpoint:  # else a later start would take the newer ones, which this run leaves behind
        for later in [path for path in run.checkpoints() if int(path.name.removeprefix("checkpoint-")) > step]:
            logger.info(
                f"{later.name} is later than the checkpoint to resume from; it is kept as {rename_aside(later).name}"
            )
    if checkpoint is None and (log := run.log).is_file() and log.stat().st_size:
        logger.warning(
            f"{run.path}: no checkpoint is left, so the run starts from step 1; its log is kept as {rename_aside(log).name}"
        )
    truncate_log(run.log, step)
    if 0 < training.max_steps < step:
        logger.warning(
            f"max_steps {training.max_steps}: the run has already taken {step} steps; no further step is taken, and the "
            "model that is published is that of the steps taken"
        )
    if checkpoint:
        print(f"going on from step {step} ({checkpoint})", flush=True)
    return checkpoint


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that were taken when a checkpoint was saved."""
    return read_json(checkpoint / "trainer_state.json")["global_step"]


# What may change about a model that goes on training; the rest is what it is.
MAY_CHANGE = {"config.attention_dropout", "config.embedding_dropout", "config.residual_dropout"}


def fingerprint_of(arguments: Settings, text: PreparedText, config: PreTrainedConfig) -> dict[str, Any]:
    """Everything that decides which numbers a run computes, by name; a run goes on only where it is the same."""
    data, architecture, training = arguments
    model = config.to_dict()
    shape = {f"config.{name}": model[name] for name in vars(architecture) if name in model}
    return {
        "data": text.train.fingerprint,
        "validation": text.validation.fingerprint if text.validation else None,
        "tokenizer": tokenizer_fingerprint(text.tokenizer),
        "block_size": data.block_size,
        "effective_batch": tokens_per_step(training, data.block_size) // data.block_size,
        **shape,
        "init_from": content_of(architecture.init_from) if architecture.init_from else None,
        "lora_rank": architecture.lora_rank,
        "config.rope_theta": model["rope_parameters"]["rope_theta"],
        **numeric_settings(training),
        "world_size": training.world_size,
        "device": training.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        DESCRIBED: {
            "data": f"{text.name} ({sizes(text.train)})",
            "validation": f"{text.split_description} ({sizes(text.validation)})" if text.validation else None,
            "tokenizer": f"{text.kind} ({vocabulary_size(text.tokenizer):,} tokens)",
            "init_from": architecture.init_from,
        },
    }


# Settings that do not change the numbers that a run computes or what it publishes. Every other setting of
# `TrainingArguments`, those of a later transformers included, is part of the fingerprint.
IRRELEVANT = {
    # Where a run lies, and how it is started. The device is an entry of its own.
    *("output_dir", "fresh", "allow_change", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "use_cpu"),
    *("local_rank", "debug", "ddp_timeout"),
    # What it reports, and where to.
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "skip_memory_metrics"),
    *("sample_prompt", "sample_tokens"),
    # When it validates and saves: neither draws a random number. Intervals may change between two starts.
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps", "save_total_limit"),
    *("save_on_each_node", "save_only_model", "enable_jit_checkpoint"),
    # How validation gathers predictions: the validation of this package gathers none.
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics"),
    # Loss, perplexity and bits per byte of one text order checkpoints in the same way.
    *("metric_for_best_model", "greater_is_better"),
    # What a step does that would have ended the run.
    "on_bad_loss",
    # How batches get to the device, and when memory is freed.
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "torch_empty_cache_steps"),
    # The Hub.
    *(
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
}

# Entries that follow from another one that has changed, and are allowed with it.
IMPLIED = {
    "effective_batch": {"per_device_train_batch_size", "gradient_accumulation_steps"},
    "world_size": {"per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last"},
}


def numeric_settings(training: MiniGPTTrainingArguments) -> dict[str, Any]:
    """The settings that may change the numbers of a run, as JSON has them."""
    values = {name: value for name, value in training.to_dict().items() if name not in IRRELEVANT}
    if values["accelerator_config"].items() <= AcceleratorConfig().to_dict().items():
        values["accelerator_config"] = None  # filled in where none was given
    if not training.fsdp:
        values["fsdp_config"] = None
    if training.lr_scheduler_type == "reduce_lr_on_plateau":  # validation decides the learning rate
        values |= {name: training.to_dict()[name] for name in ("eval_strategy", "eval_steps", "eval_delay")}
    return json.loads(json.dumps(values, default=str))


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two fingerprints: name -> (old, new).

    A setting that an earlier version did not record counts as unchanged where it has its default, or follows from others.
    """
    changed = differences(old, new)
    defaults = {each.name: each.default for each in fields(MiniGPTTrainingArguments)}
    following = {"load_best_model_at_end", "dataloader_drop_last"}
    for name in [name for name in changed if name not in old and name in defaults]:
        # What is None by default may be filled in as False.
        if new[name] == defaults[name] or not (new[name] or defaults[name]) or name in following:
            del changed[name]
    for name, implied in IMPLIED.items():
        if name in changed:
            changed = {each: pair for each, pair in changed.items() if each not in implied}
    return changed


def read_fingerprint(file: Path) -> dict[str, Any]:
    """The fingerprint of a run or checkpoint.

    Raises:
        MiniGPTError: if it is missing or damaged.
    """
    if not file.is_file():
        raise MiniGPTError(f"{file}: is missing; restore it, name another --output_dir, or say --fresh")
    fingerprint = read_json(file)
    if not isinstance(fingerprint, dict) or not isinstance(fingerprint.get(DESCRIBED, {}), dict):
        raise MiniGPTError(
            f"{file}: is not the fingerprint of a run; restore it, name another --output_dir, or say --fresh"
        )
    return fingerprint


def restore_fingerprint(run: RunFolder) -> None:
    """Replace a missing or damaged fingerprint by the copy in the newest checkpoint that is whole, if there is one."""
    file = run.fingerprint
    try:
        read_fingerprint(file)
    except ValueError as error:
        whole = (each for each in reversed(run.checkpoints()) if verification_error(each) is None)
        if (checkpoint := next(whole, None)) is None:
            return  # told by whoever reads it
        kept = f" (kept as {rename_aside(file).name})" if file.is_file() else ""
        write_files({file: (checkpoint / FINGERPRINT).read_text(encoding="utf-8")})
        reason = str(error).partition(";")[0]
        logger.warning(f"{reason}{kept}: it is restored from {checkpoint.name}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of two fingerprints that differ: name -> (old, new)."""
    names = sorted({*old, *new} - {DESCRIBED})
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def sizes(stream: TokenStream) -> str:
    """Of a text, for messages."""
    return f"{stream.characters:,} characters, {len(stream):,} tokens"


def in_words(changed: dict[str, tuple[Any, Any]], old: dict[str, Any], new: dict[str, Any]) -> str:
    """{"seed": (1, 2)} -> "seed was 1 and is 2"; what is compared by a hash is named with its size."""
    words = []
    for name, (before, after) in changed.items():
        known = [each.get(DESCRIBED, {}).get(name) or value for each, value in ((old, before), (new, after))]
        if name not in old:
            words.append(f"{name} was not recorded and is {known[1]}")
        elif known[0] != known[1]:
            words.append(f"{name} was {known[0]} and is {known[1]}")
        elif name == "init_from":
            words.append(f"{name} was {known[0]} and is another model of the same name")
        else:
            words.append(f"{name} was {known[0]} and is another of the same name and size")
    return ", ".join(words)
