"""Decide whether a run can be resumed, and from which checkpoint.

A run is resumed only if its fingerprint, i.e. everything that determines its results, is unchanged, except for changes
allowed by name (`allow_change`), and for the number of processes if every step keeps its sequences.
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

from ..atomic import check_links, rename_aside, temporary_name, write_files
from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..data.tokenizer import tokenizer_fingerprint, vocabulary_size
from ..errors import MiniGPTError
from ..publish.model_folder import damage, warn_if_weights_differ
from .arguments import AUTO, MiniGPTTrainingArguments, Settings
from .checkpoint import newest_valid, verification_error
from .initialize import content_hash
from .lock import LOCK, FolderLock
from .report import tokens_per_step
from .run_folder import DESCRIPTIONS, FINGERPRINT, RunFolder, is_model_of, read_json, truncate_log
from .scaling import parse_size
from .sharding import data_parallel_size, replicas, tensor_parallel_size

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def locked_run_folder(training: MiniGPTTrainingArguments) -> Iterator[FolderLock]:
    """Lock `output_dir` within the block. In distributed training, rank 0 holds the lock.

    Raises:
        MiniGPTError: on all ranks, if another process holds the lock, or if the folder is neither empty nor a run folder.
    """
    run = RunFolder(Path(training.output_dir))
    lock = FolderLock(run.path)

    def acquire() -> None:
        check_links(run.path)
        if run.path.exists() and not run.path.is_dir():
            raise MiniGPTError(f"output_dir {run.path}: this is a file; give a folder")
        if run.exists() and (run.path / "trainer_state.json").is_file():
            raise MiniGPTError(
                f"output_dir {run.path}: this is a checkpoint; give the folder of its run, {run.path.absolute().parent}"
            )
        if run.model.is_dir() and not os.access(run.path, os.W_OK):
            return  # finished and read-only: no lock can or need be acquired
        lock.acquire()
        names = {path.name for path in run.path.iterdir()} - {LOCK, temporary_name(run.recipe).name}
        if temporary_name(run.fingerprint).name in names:  # an earlier process was killed while writing its first files
            names -= {temporary_name(run.fingerprint).name, run.recipe.name}
        restore_fingerprint(run)
        if names and not run.exists():
            raise MiniGPTError(f"output_dir {run.path}: neither empty nor a run folder; use another folder")

    try:
        from_main_process(training, acquire)
        yield lock
    finally:
        lock.release()


def start_over(lock: FolderLock) -> None:
    """Rename the run folder, and create and lock a new one in its place."""
    run = lock.folder
    folder = run.resolve() if run.is_symlink() else run  # the link remains, and the new run is where it points to
    aside = rename_aside(folder)
    logger.info(f"renamed the existing run {run} to {aside}")
    lock.moved_to(aside)
    lock.release()
    lock.moved_to(folder)
    lock.acquire()


def from_main_process(training: MiniGPTTrainingArguments, compute: Callable[[], T]) -> T:
    """Compute on rank 0, and return the result or raise the error on all ranks."""
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
    """Whether the run has published its model. A damaged model folder is renamed, so that it is published again.

    Raises:
        MiniGPTError: if the folder contains another run, or a damaged model and no valid checkpoint.
    """
    old = read_fingerprint(run.fingerprint)
    changed = changes(old, fingerprint)
    if "effective_batch" not in changed:
        changed.pop("world_size", None)
    if changed:
        raise MiniGPTError(
            f"output_dir {run.path}: contains another run, which is finished "
            f"({describe_changes(changed, old, fingerprint)}); use another folder, or --fresh"
        )
    fault = damage(run.model) or (None if is_model_of(run.model, old) else "it is the model of another run")
    if fault is None:
        logger.info(f"this run is already finished; the model is in {run.model}")
        warn_if_weights_differ(run.model)
        return True
    if all(verification_error(checkpoint) for checkpoint in run.checkpoints()):
        raise MiniGPTError(
            f"output_dir {run.path}: the model is damaged ({fault}), and there is no valid checkpoint to publish it from; "
            f"restore {run.model} from a copy, or train again with --fresh"
        )
    renamed = rename_aside(run.model)
    logger.warning(f"{run.model} is damaged ({fault}); renamed to {renamed.name}, and publishing the model again")
    return False


def checkpoint_to_resume(
    run: RunFolder, fingerprint: dict[str, Any], training: MiniGPTTrainingArguments, count: Callable[[], int]
) -> Path | None:
    """Return the checkpoint to resume from: the newest valid one, or `resume_from_checkpoint`; `None` to start at step 0.

    Args:
        count: Returns the number of training sequences per epoch.

    Raises:
        MiniGPTError: if the fingerprint of the run differs in more than the allowed changes.
    """
    if not run.exists():
        if training.resume_from_checkpoint:
            raise MiniGPTError(f"resume_from_checkpoint: there is no run to resume in {run.path}")
        return None
    checkpoint: Path | None
    if training.resume_from_checkpoint:
        checkpoint = Path(training.resume_from_checkpoint)
        if fault := verification_error(checkpoint):
            raise MiniGPTError(f"resume_from_checkpoint {checkpoint}: invalid checkpoint ({fault})")
    else:
        checkpoint, messages = newest_valid(run)
        for message in messages:
            logger.warning(message)
    old = read_fingerprint((checkpoint or run.path) / FINGERPRINT)
    changed = changes(old, fingerprint)

    def described(pairs: dict[str, tuple[Any, Any]]) -> str:
        return describe_changes(pairs, old, fingerprint)

    if fixed := {
        name: pair for name, pair in changed.items() if name.startswith("config.") and name not in CHANGEABLE_CONFIG
    }:
        if "config.vocab_size" in fixed and "tokenizer" in changed:
            fixed = {"tokenizer": changed["tokenizer"], **fixed}
        raise MiniGPTError(
            f"output_dir {run.path}: contains a run with another architecture ({described(fixed)}); use another folder, or "
            "--fresh"
        )
    if "positional_heads" in changed:
        raise MiniGPTError(
            f"output_dir {run.path}: contains a run with another initialization "
            f"({described({'positional_heads': changed['positional_heads']})}): it has no effect after step 0; give the "
            "previous value, or use another folder or --fresh"
        )
    has_adapter = fingerprint["lora_rank"] or old.get("lora_rank")
    if adapted := {name: pair for name, pair in changed.items() if has_adapter and name in ADAPTER}:
        raise MiniGPTError(
            f"output_dir {run.path}: contains a run with another adapter or without one ({described(adapted)}): LoRA factors "
            "fit only the model and the rank that they were trained with; give the previous value, or use another folder or "
            "--fresh"
        )
    if moved := {name: pair for name, pair in changed.items() if name in POSITION}:
        advice = "give the previous value; or "
        if changed.keys() >= {"effective_batch", "world_size"}:
            advice = another_world_size(old, training, 0)
        raise MiniGPTError(
            f"output_dir {run.path}: contains a run with other sequences per step ({described(moved)}), which determine its "
            f"position in the text: {advice}train the model further in another folder, with --init_from"
        )
    known = [name for name in fingerprint if name != DESCRIPTIONS]
    for name in training.allow_change:
        if name not in known:
            raise MiniGPTError(f"allow_change {name}: not an entry of the fingerprint; available: {', '.join(known)}")
    if budget := {name: pair for name, pair in changed.items() if name in BUDGET and pair[1] is not None}:
        unset = [name for name in BUDGET if old.get(name) is not None]
        raise MiniGPTError(
            f"output_dir {run.path}: contains a run that has begun, and {described(budget)}, which has no effect: its model "
            "and its number of steps have been chosen; give the earlier value, or --fresh, or continue to another number of "
            f"steps with --recipe {run.recipe} --max_steps N --allow_change {' '.join(['max_steps', *unset])}"
        )
    refused = {name: pair for name, pair in changed.items() if name not in training.allow_change}
    advice = ""
    if "world_size" in refused:
        advice = another_world_size(old, training, count())
        if not advice:
            del refused["world_size"]
    if refused:
        raise MiniGPTError(
            f"output_dir {run.path}: contains a run with other settings ({described(refused)}); {advice}use another folder, "
            f"--fresh, or --allow_change {' '.join(refused)}"
        )
    if changed:
        logger.info(f"changed settings: {described(changed)}; the card of the model will state them")
        if reordered := [name for name in changed if name in ORDER]:
            logger.warning(
                f"{', '.join(reordered)}: the rest of the epoch has another order, so sequences that were used may be used "
                "again in this epoch, and others not at all"
            )
    step = step_of(checkpoint) if checkpoint else -1
    if training.resume_from_checkpoint:  # otherwise the next start would resume from a later checkpoint
        for later in [path for path in run.checkpoints() if int(path.name.removeprefix("checkpoint-")) > step]:
            logger.info(
                f"{later.name} is later than the checkpoint to resume from; renamed to {rename_aside(later).name}"
            )
    if checkpoint is None and (log := run.log).is_file() and log.stat().st_size:
        logger.warning(
            f"{run.path}: no valid checkpoint, so training starts from step 0; log renamed to {rename_aside(log).name}"
        )
    history = read_json(checkpoint / "trainer_state.json")["log_history"] if checkpoint else []
    scores = {(row["step"], repr(row["eval_loss"])) for row in history if "eval_loss" in row}
    truncate_log(run.log, step, scores, not changed.keys().isdisjoint(("validation", "block_size")))
    if checkpoint:
        logger.info(f"resuming from step {step} ({checkpoint})")
    return checkpoint


def another_world_size(old: dict[str, Any], training: MiniGPTTrainingArguments, sequences: int) -> str:
    """Whether a run may continue with another number of processes: each step must have the same sequences as before.

    Args:
        old: Fingerprint of the run.
        sequences: Number of training sequences per epoch.

    Returns:
        An empty string if so, otherwise advice.
    """
    batch, size, processes = old["effective_batch"], training.per_device_train_batch_size, data_parallel_size(training)
    if batch != size * training.gradient_accumulation_steps * processes:
        steps, remainder = divmod(batch, size * processes)
        if remainder:
            return f"give batches whose product with {processes} processes is {batch} sequences, as before; or "
        return f"give --gradient_accumulation_steps {steps} to keep {batch} sequences per step; or "
    complete = sequences // batch
    if complete and (
        sequences % batch == 0
        or (old.get("dataloader_drop_last") and training.dataloader_drop_last)
        or 0 < training.max_steps <= complete
    ):
        return ""
    return (
        f"several processes omit the incomplete last step of an epoch ({sequences % batch} of {batch} sequences), which "
        "changes the order of the data from the second epoch on; start with --dataloader_drop_last true to avoid it; or "
    )


def keep_omitting(settings: Settings, run: RunFolder) -> Settings:
    """Continue to omit the incomplete last step of an epoch on one process, in a run that several processes began."""
    training = settings.training
    if training.world_size > 1 or training.fresh or "dataloader_drop_last" in training.given or not run.exists():
        return settings
    omits = read_fingerprint(run.fingerprint).get("dataloader_drop_last")
    return settings.replace(dataloader_drop_last=True) if omits else settings


def step_of(checkpoint: Path) -> int:
    """Number of optimizer steps before a checkpoint was saved."""
    return read_json(checkpoint / "trainer_state.json")["global_step"]


# Entries of the model configuration that may be allowed to change; the others determine the weight shapes or the computation.
CHANGEABLE_CONFIG = {"config.attention_dropout", "config.embedding_dropout", "config.residual_dropout"}


def fingerprint_of(arguments: Settings, text: PreparedText, config: PreTrainedConfig) -> dict[str, Any]:
    """Return everything that determines the results of a run, by name."""
    data, architecture, training = arguments
    model = config.to_dict()
    shape = {f"config.{name}": model[name] for name in vars(architecture) if name in model}
    return {
        "data": text.train.fingerprint,
        "validation": text.validation.fingerprint if text.validation else None,
        "tokenizer": tokenizer_fingerprint(text.tokenizer),
        "block_size": data.block_size,
        "shuffle_window": data.shuffle_window,
        "effective_batch": tokens_per_step(training, data.block_size) // data.block_size,
        **shape,
        "config.vocab_size": config.vocab_size,
        "init_from": content_hash(architecture.init_from) if architecture.init_from else None,
        "lora_rank": architecture.lora_rank,
        "positional_heads": architecture.positional_heads,
        "config.rope_theta": model["rope_parameters"]["rope_theta"],
        **numeric_settings(training),
        "world_size": training.world_size,
        "device": training.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        DESCRIPTIONS: {
            "data": f"{text.name} ({describe_size(text.train)})",
            "validation": f"{text.split_description} ({describe_size(text.validation)})" if text.validation else None,
            "tokenizer": f"{text.kind} ({vocabulary_size(text.tokenizer):,} tokens)",
            "init_from": architecture.init_from,
        },
    }


# Settings that affect neither the weights nor the scores of a run. All other settings of `TrainingArguments`,
# including those of later versions of transformers, are part of the fingerprint.
NOT_IN_FINGERPRINT = {
    # Location and start of a run. The device is a separate entry.
    *("output_dir", "fresh", "allow_change", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "use_cpu"),
    *("local_rank", "debug", "ddp_timeout"),
    # Reports.
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "skip_memory_metrics"),
    *("sample_prompt", "sample_tokens", "figures"),
    # Evaluations and checkpoints, which consume no random numbers. Their intervals may change when a run is resumed.
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps", "save_total_limit"),
    *("save_on_each_node", "save_only_model", "enable_jit_checkpoint", "async_checkpoints"),
    # Gathering of predictions, which the evaluation of this package does not use.
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics"),
    # Loss, perplexity and bits per byte rank checkpoints identically.
    *("metric_for_best_model", "greater_is_better"),
    # Handling of steps that would otherwise have stopped the run.
    "on_bad_loss",
    # Transfer of batches to the device, and freeing of memory.
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
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

# The effect of an earlier version that lacked a setting whose default has another effect, or did not record it.
BEFORE_INTRODUCTION = {"muon_beta2": 0.0, "positional_heads": [], "shuffle_window": 0, "config.vocab_size": None}

# The position in the text counts in these units, so they cannot change when a run is resumed.
POSITION = {"effective_batch", "block_size"}

# With LoRA, the frozen weights and the shapes of the factors, which checkpoints do not contain or cannot change.
ADAPTER = {"init_from", "lora_rank"}

# Settings that determine the order of the sequences.
ORDER = {"data", "seed", "data_seed", "shuffle_window"}

# Settings from which others are chosen when a run begins. They have no effect afterwards.
BUDGET = ("minutes", "size")

# If an entry has changed, these entries follow from it and need not be allowed separately.
IMPLIED = {
    "effective_batch": {"per_device_train_batch_size", "gradient_accumulation_steps"},
    "world_size": {"per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last"},
    "fsdp_config": {"per_device_train_batch_size", "gradient_accumulation_steps"},  # tp_size
}


def numeric_settings(training: MiniGPTTrainingArguments) -> dict[str, Any]:
    """Return the settings that affect the results of a run, as JSON values."""
    values = {name: value for name, value in training.to_dict().items() if name not in NOT_IN_FINGERPRINT}
    if values["accelerator_config"].items() <= AcceleratorConfig().to_dict().items():
        values["accelerator_config"] = None  # the default, filled in by `TrainingArguments`
    layout = {"dp_replicate_size": replicas(training), "tp_size": tensor_parallel_size(training)}
    values["fsdp_config"] = {name: size for name, size in layout.items() if size > 1} or None  # others have no effect
    if training.lr_scheduler_type == "reduce_lr_on_plateau":  # evaluations determine the learning rate
        values |= {name: training.to_dict()[name] for name in ("eval_strategy", "eval_steps", "eval_delay")}
    return json.loads(json.dumps(values, default=str))


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences between two fingerprints: {name: (old, new)}.

    A setting that an earlier version did not record counts as unchanged if it has its default or is derived from others.
    """
    changed = differences(old, new)
    if "size" in changed and not {None, AUTO} & {*changed["size"]}:
        before, after = map(parse_size, changed["size"])
        if before == after:  # 30k and 30000
            del changed["size"]
    defaults = {each.name: each.default for each in fields(MiniGPTTrainingArguments)} | BEFORE_INTRODUCTION
    derived = {"load_best_model_at_end", "dataloader_drop_last", "config.vocab_size"}
    for name in [name for name in changed if name not in old and name in defaults]:
        # A default of None may have been replaced by False.
        if new[name] == defaults[name] or not (new[name] or defaults[name]) or name in derived:
            del changed[name]
    for name, implied in IMPLIED.items():
        if name in changed:
            changed = {each: pair for each, pair in changed.items() if each not in implied}
    return changed


def read_fingerprint(file: Path) -> dict[str, Any]:
    """Read the fingerprint of a run or checkpoint.

    Raises:
        MiniGPTError: if it is missing or damaged.
    """
    if not file.is_file():
        raise MiniGPTError(f"{file}: missing; restore it, or use another --output_dir or --fresh")
    fingerprint = read_json(file)
    if not isinstance(fingerprint, dict) or not isinstance(fingerprint.get(DESCRIPTIONS, {}), dict):
        raise MiniGPTError(f"{file}: not the fingerprint of a run; restore it, or use another --output_dir or --fresh")
    return fingerprint


def restore_fingerprint(run: RunFolder) -> None:
    """Replace a missing or damaged fingerprint by the copy in the newest valid checkpoint, if there is one."""
    file = run.fingerprint
    try:
        read_fingerprint(file)
    except ValueError as error:
        valid = (each for each in reversed(run.checkpoints()) if verification_error(each) is None)
        if (checkpoint := next(valid, None)) is None:
            return  # a later `read_fingerprint` raises the error
        renamed = f" (renamed to {rename_aside(file).name})" if file.is_file() else ""
        write_files({file: (checkpoint / FINGERPRINT).read_text(encoding="utf-8")})
        reason = str(error).partition(";")[0]
        logger.warning(f"{reason}{renamed}; restored from {checkpoint.name}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the entries that differ between two fingerprints: {name: (old, new)}."""
    names = sorted({*old, *new} - {DESCRIPTIONS})
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def describe_size(stream: TokenStream) -> str:
    """Size of a text, for messages."""
    return f"{stream.characters:,} characters, {len(stream):,} tokens"


def changes_since(checkpoint: Path, fingerprint: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """Return the settings that differ from those of a checkpoint, for the metadata of the model.

    Returns:
        A dictionary for each with `step`, `setting`, `before` and `after`; the values of hashes are `None`.
    """
    changed = changes(read_fingerprint(checkpoint / FINGERPRINT), fingerprint)
    hashes = {*fingerprint[DESCRIPTIONS]}
    return [
        {"step": step, "setting": name, "before": before, "after": after}
        for name, (before, after) in (
            (name, (None, None) if name in hashes else pair) for name, pair in changed.items()
        )
    ]


def describe_changes(changed: dict[str, tuple[Any, Any]], old: dict[str, Any], new: dict[str, Any]) -> str:
    """{"seed": (1, 2)} -> "seed was 1 and is 2"; entries that are hashes are described by name and size."""
    parts = []
    for name, (before, after) in changed.items():
        shown = [each.get(DESCRIPTIONS, {}).get(name) or value for each, value in ((old, before), (new, after))]
        if name not in old:
            parts.append(f"{name} was not recorded and is {shown[1]}")
        elif shown[0] != shown[1]:
            parts.append(f"{name} was {shown[0]} and is {shown[1]}")
        elif name == "init_from":
            parts.append(f"{name} was {shown[0]} and is a different model of the same name")
        else:
            parts.append(f"{name} was {shown[0]} and is a different text or tokenizer of the same name and size")
    return ", ".join(parts)
