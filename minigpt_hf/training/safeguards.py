"""Checks that protect a run: non-finite and exploded losses, untrained models, batches and disk space.

Everything here returns without effect, warns or raises; only `LossGuard` with `on_bad_loss skip` changes a training step.
"""

import copy
import errno
import json
import logging
import math
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import gather_object
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainerCallback

from ..atomic import DISK_FULL, file_size_limit
from ..errors import (
    DiskFullError,
    MiniGPTError,
    NonFiniteLossError,
    StorageError,
    TrainingStopped,
    UnreadableFileError,
    UntrainedModelError,
)
from ..inference.evaluation import changed_arithmetic
from ..publish.model_folder import non_finite_parameter
from .arguments import MiniGPTTrainingArguments, log_on_main_process
from .callbacks import preserved_random_state
from .run_folder import RunFolder
from .schedule import learning_rate_schedule
from .sharding import data_parallel_size

if TYPE_CHECKING:
    from .trainer import MiniGPTTrainer

logger = logging.getLogger(__name__)

# A uniform guess costs ln(vocabulary size) nats per token; a loss above this multiple of it has exploded.
EXPLOSION = 10
# The argument of an optimizer for each setting of Adam.
ADAM_SETTINGS = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
WITH_TARGET_MODULES = ("galore", "apollo")  # optimizers that use `optim_target_modules`
WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


# -- losses, gradients and weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """An optimizer step whose loss and gradient norm are still to be checked.

    Args:
        number: Counted from 1.
        metrics: [ranks, 2]: loss in nats per token and gradient norm of each rank.
        batches: Token ids [B, T] of this rank, one tensor per micro-batch.
        copied: Recorded after the copy of `metrics` to the host was queued; `None` if they can be read at once.
    """

    number: int
    metrics: torch.Tensor
    batches: list[torch.Tensor]
    copied: torch.cuda.Event | None


class LossGuard:
    """Detects optimizer steps with a non-finite loss or gradient, or an exploded loss, and stops or skips them.

    Reading a loss makes the host wait for the device. On CUDA with `on_bad_loss stop`, loss and gradient norm are therefore
    copied asynchronously and checked one step later, when the copy is complete; every save, evaluation and the end of
    training check what is pending, so that the weights of a bad step are never saved. Otherwise they are checked before
    the update.

    Attributes:
        deferred: Whether steps are checked one step later.
        skipped_steps: Steps skipped in this run.
        skipped_since_log: Those since the last logged loss.
    """

    def __init__(self, trainer: "MiniGPTTrainer"):
        self.trainer = trainer
        self.deferred = trainer.args.device.type == "cuda" and trainer.args.on_bad_loss == "stop"
        self.skipped_steps = self.skipped_since_log = 0
        self._batches: list[torch.Tensor] = []  # micro-batches of the current step
        self._loss_before = torch.zeros(())  # accumulated loss at the beginning of the current step
        self._pending: list[_Step] = []

    def record(self, input_ids: torch.Tensor, accumulated_loss: torch.Tensor) -> None:
        """Record a micro-batch before its forward pass.

        Args:
            input_ids: Token ids [B, T].
            accumulated_loss: The Trainer's sum of losses since it last logged one.
        """
        if not self._batches:
            self._loss_before = accumulated_loss.clone()
        self._batches.append(input_ids)

    def check(self, model: torch.nn.Module, accumulated_loss: torch.Tensor, norm: torch.Tensor | float) -> None:
        """Check a step between its backward pass and its update.

        Args:
            accumulated_loss: As in `record`, with the loss of this step.
            norm: Gradient norm before clipping.

        Raises:
            NonFiniteLossError: on every rank, for a bad step with `on_bad_loss stop`.
        """
        trainer, device = self.trainer, accumulated_loss.device
        loss = accumulated_loss - self._loss_before
        metrics = torch.stack([loss, torch.as_tensor(norm, dtype=loss.dtype, device=device)])[None]
        if trainer.args.world_size > 1:
            metrics = trainer.accelerator.gather(metrics)
        batches, self._batches = self._batches, []
        copied = None
        if device.type == "cuda":
            metrics, copied = metrics.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._pending.append(_Step(trainer.state.global_step + 1, metrics, batches, copied))
        for _ in range(len(self._pending) - self.deferred):
            if not self._is_good(self._pending.pop(0)):
                self._skip(model, accumulated_loss)

    def check_pending(self) -> None:
        """Check the steps that `check` has deferred.

        Raises:
            NonFiniteLossError: as `check`.
        """
        while self._pending:
            self._is_good(self._pending.pop(0))

    def _is_good(self, step: _Step) -> bool:
        """Whether a step may change the weights; raises if it may not and `on_bad_loss` is `stop`."""
        args = self.trainer.args
        if step.copied is not None:
            step.copied.synchronize()
        losses, norms = step.metrics.T.tolist()
        # The loss of each rank is scaled such that their mean is the loss of the step, as with one process.
        loss = sum(losses) / len(losses)
        exploded = loss > EXPLOSION * math.log(self.trainer.model.config.vocab_size)
        # With fp16, accelerate finds the loss scale by skipping steps with non-finite gradients.
        if math.isfinite(loss) and not exploded and (args.fp16 or all(map(math.isfinite, norms))):
            return True
        if not self.deferred:
            check_weights(self.trainer)  # broken by an earlier update: the data of this step are not the cause
        fault = f"step {step.number}: the loss is {loss:.4g} and the gradient norm {norms[0]:.4g}"
        if len(losses) > 1:
            fault += f" (loss by rank: {', '.join(f'{each:.4g}' for each in losses)})"
        if args.on_bad_loss == "skip":
            self.skipped_steps += 1
            self.skipped_since_log += 1
            if self.trainer.is_world_process_zero():
                logger.warning(f"{fault}; the step is skipped ({self.skipped_steps} so far)")
            return False
        file = self._write_batches(step, fault, losses)
        raise NonFiniteLossError(
            f"{fault}; no weight changed by it is saved, its data are in {file}, earlier checkpoints are intact; "
            f"{advice(self.trainer)}, or add --on_bad_loss skip"
        )

    def _skip(self, model: torch.nn.Module, accumulated_loss: torch.Tensor) -> None:
        """Undo the effects of the current step."""
        accumulated_loss.copy_(self._loss_before)
        model.zero_grad(set_to_none=True)  # the optimizer ignores parameters without a gradient

    def _write_batches(self, step: _Step, fault: str, losses: list[float]) -> Path:
        """Write the sequences of all ranks to a JSON file."""
        trainer = self.trainer
        file = RunFolder(Path(trainer.args.output_dir)).bad_step(step.number)
        rows = [(trainer.args.process_index, row) for batch in step.batches for row in batch.tolist()]
        if trainer.args.world_size > 1:
            rows = gather_object(rows)
        if trainer.is_world_process_zero():
            ranks, ids = zip(*rows, strict=True)
            texts = trainer.processing_class.batch_decode(ids)
            content = {"what": fault, "ranks": ranks, "losses": losses, "input_ids": ids, "texts": texts}
            file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        trainer.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one fails
        return file


def check_weights(trainer: "MiniGPTTrainer") -> None:
    """Check on all ranks that the weights are finite.

    Raises:
        NonFiniteLossError: on every rank, whatever `on_bad_loss` is: no later step can repair such weights.
    """
    name = non_finite_parameter(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    names = gather_object([name]) if trainer.args.world_size > 1 else [name]
    if found := next((each for each in names if each), None):
        raise NonFiniteLossError(
            f"step {trainer.state.global_step}: {found} has non-finite values; these weights are neither saved nor "
            f"published, earlier checkpoints are intact; {advice(trainer)}"
        )


def check_trained(trainer: "MiniGPTTrainer") -> None:
    """Check that at least half of the optimizer steps were taken and that the weights are finite.

    Raises:
        UntrainedModelError: if most steps were skipped: such a model is never published.
        NonFiniteLossError: if a weight is not finite.
    """
    skipped, steps = trainer.guard.skipped_steps, trainer.state.global_step
    if steps <= skipped or skipped > steps / 2:
        fault = "no optimizer step was taken" if steps <= skipped else "most optimizer steps were not taken"
        raise UntrainedModelError(
            f"{fault}: {skipped} of {steps} steps were skipped because of a non-finite or exploded loss or gradient; no "
            "model is published; start again with a lower --learning_rate and --muon_learning_rate and --fresh, or inspect "
            "the text"
        )
    if skipped and trainer.is_world_process_zero():
        logger.warning(f"{skipped} of {steps} steps were skipped because of a non-finite or exploded loss")
    check_weights(trainer)


def advice(trainer: "MiniGPTTrainer") -> str:
    """From which checkpoint, and with which settings, to resume after a non-finite or exploded loss."""
    uniform_guess = math.log(trainer.model.config.vocab_size)
    history = trainer.state.log_history
    losses = {f"checkpoint-{row['step']}": row["eval_loss"] for row in history if "eval_loss" in row}
    checkpoints = list(reversed(RunFolder(Path(trainer.args.output_dir)).checkpoints()))
    if not checkpoints:
        return "there is no checkpoint: start again with a lower --learning_rate and --muon_learning_rate and --fresh"
    lower = "a lower --learning_rate and --muon_learning_rate (--allow_change)"
    loss = losses.get(checkpoints[0].name, 0.0)  # a checkpoint that was not evaluated is assumed to be good
    good = next((path for path in checkpoints if losses.get(path.name, math.inf) < uniform_guess), None)
    if not loss < uniform_guess and good:
        return (
            f"the validation loss of {checkpoints[0].name} is {loss:.4g} and that of a uniform guess {uniform_guess:.4g}: "
            f"resume from an earlier checkpoint with --resume_from_checkpoint {good}, and {lower}"
        )
    return f"resume with {lower}"


# -- random numbers ---------------------------------------------------------------------------------------------------


class RandomStateCheck(TrainerCallback):
    """Warns once if another thread of this process draws random numbers between steps, if these determine dropout.

    torch has one random state per process and device. Within a step, its use by other threads cannot be distinguished from
    that by dropout.
    """

    def __init__(self):
        self.state: torch.Tensor | None = None  # after the previous step of this epoch
        self.was_reported = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.state = None  # the data loader draws a seed at the beginning of an epoch

    def on_step_begin(self, args, state, control, model, **kwargs):
        config = model.config
        dropout = config.attention_dropout or config.embedding_dropout or config.residual_dropout
        if self.state is None or self.was_reported or not (dropout or args.neftune_noise_alpha):
            return
        if not torch.equal(self.state, _random_state(args.device)):
            self.was_reported = True
            logger.warning(
                f"step {state.global_step}: another thread of this process drew random numbers, which changes dropout: the "
                "run cannot be repeated exactly; train in a process of its own"
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.state = _random_state(args.device)


def _random_state(device: torch.device) -> torch.Tensor:
    """The state of the random number generator of a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


# -- settings -----------------------------------------------------------------------------------------------------------


@contextmanager
def rejected_settings() -> Iterator[None]:
    """Convert exceptions that libraries raise for the settings to `MiniGPTError`; used before anything is written."""
    try:
        yield
    except MiniGPTError:
        raise
    except (ValueError, ImportError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        raise MiniGPTError(f"these settings cannot be used: {reason}") from error


# Environment variables that the Trainer sets for `full_determinism`.
DETERMINISM = (
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
    "FLASH_ATTENTION_DETERMINISTIC",
)


@contextmanager
def preserved_global_state() -> Iterator[None]:
    """Restore, at the end of the block, all random states and the global settings that the Trainer changes for
    `full_determinism`, `tf32` and `log_level`."""
    environment = {name: os.environ.get(name) for name in DETERMINISM}
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    precision, verbosity = torch.backends.fp32_precision, transformers.logging.get_verbosity()
    try:
        with preserved_random_state():
            yield
    finally:
        os.environ |= {name: value for name, value in environment.items() if value is not None}
        for name in [name for name, value in environment.items() if value is None]:
            os.environ.pop(name, None)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.backends.fp32_precision = precision
        transformers.logging.set_verbosity(verbosity)


def check_torch_settings(training: MiniGPTTrainingArguments) -> None:
    """Check global settings of torch that the caller of the Python interface may have made.

    Raises:
        MiniGPTError: if one of them would change the results of training, or prevent it.
    """
    device, fault = training.device.type, None
    if device == "meta":
        raise MiniGPTError(
            "ACCELERATE_TORCH_DEVICE is meta: tensors on this device have no values; unset this variable"
        )
    if (dtype := torch.get_default_dtype()) != torch.float32:
        fault = f"default dtype is {dtype}; call torch.set_default_dtype(torch.float32)"
    elif (default := torch.get_default_device().type) not in ("cpu", device):
        fault = f"default device is {default}; call torch.set_default_device(None), and leave its context"
    elif not torch.is_grad_enabled():
        fault = "gradients are disabled; leave torch.no_grad or torch.inference_mode"
    else:  # `TrainingArguments` itself selects TF32 for these settings
        fault = changed_arithmetic(device, tf32=device == "cuda" and bool(training.tf32 or training.torch_compile))
    if fault:
        raise MiniGPTError(f"torch's {fault} before training")


def check_optimizer_and_schedule(trainer: Trainer) -> None:
    """Create the optimizer class and a schedule once, since the Trainer does so after the run folder is written.

    Settings of the command or of a recipe file that the optimizer or the schedule does not use are reported.

    Raises:
        MiniGPTError: if the schedule rejects its settings.
        ValueError, ImportError: if the optimizer does.
    """
    args = trainer.args
    unused = {}
    if not args.muon:
        _, used = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        names = {name: name for name, argument in ADAM_SETTINGS.items() if argument not in used}
        names |= {f"optim_args {pair}": "optim_args" for pair in unused_optim_args(trainer)}
        if not args.optim.value.startswith(WITH_TARGET_MODULES):
            names["optim_target_modules"] = "optim_target_modules"
        unused = {each: f"optim {args.optim.value}" for each, name in names.items() if name in args.written}
    if args.warmup_steps and args.lr_scheduler_type in WITHOUT_WARMUP and "warmup_steps" in args.written:
        unused["warmup_steps"] = f"lr_scheduler_type {args.lr_scheduler_type.value}"
    for name in sorted(unused):
        log_on_main_process(args, f"{name}: no effect with {unused[name]}", logging.WARNING)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        learning_rate_schedule(optimizer, args, max(1, args.max_steps))
    except (ValueError, TypeError) as error:
        raise MiniGPTError(
            f"lr_scheduler_type {args.lr_scheduler_type.value} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}"
        ) from error


def unused_optim_args(trainer: Trainer) -> list[str]:
    """Return the assignments in `optim_args` without which the optimizer gets the same arguments."""

    def arguments(pairs: list[str]) -> tuple[Any, Any]:
        args = copy.copy(trainer.args)
        args.optim_args = ",".join(pairs)
        return trainer.get_optimizer_cls_and_kwargs(args, trainer.model)

    pairs = (trainer.args.optim_args or "").replace(" ", "").split(",")
    return [pair for i, pair in enumerate(pairs) if pair and arguments(pairs) == arguments(pairs[:i] + pairs[i + 1 :])]


# -- batches ----------------------------------------------------------------------------------------------------------


def check_batches(trainer: Trainer) -> None:
    """Check that an epoch has at least one full batch for each process, if incomplete batches are dropped.

    Raises:
        MiniGPTError: if not: no optimizer step would be taken.
    """
    if len(trainer.get_train_dataloader()) == 0:
        args, sequences = trainer.args, trainer.train_dataset
        size, processes = args.train_batch_size, data_parallel_size(args)
        raise MiniGPTError(
            f"the training text has {len(sequences):,} sequences of {sequences.block_size:,} tokens, and a step needs "
            f"{size * processes:,}: per_device_train_batch_size {size} × {processes} processes; lower "
            "--per_device_train_batch_size or --block_size, start fewer processes, or give more text"
        )


# -- disk space -------------------------------------------------------------------------------------------------------


def checkpoint_bytes(trainer: Trainer) -> int:
    """Estimate the size of a checkpoint: float32 weights, one moment of Muon or two of AdamW, and the small files."""
    model: PreTrainedModel = trainer.model
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    total = model.num_parameters()
    moments = matrices + 2 * (total - matrices) if trainer.args.muon else 2 * total
    return 4 * (total + moments) + len(trainer.processing_class.backend_tokenizer.to_str().encode()) + 200_000


def check_disk_space(trainer: Trainer) -> None:
    """Check that all checkpoints of the run, one being written, and the model folder fit on the disk.

    Raises:
        DiskFullError: if not, or if the weights alone exceed the file size limit.
    """
    args = trainer.args
    limit = file_size_limit()
    if limit is not None and limit < 4 * trainer.model.num_parameters():
        raise too_large(trainer, "the weights")
    if args.save_strategy == "no":
        return
    checkpoints = args.save_total_limit or math.ceil(1 / args.save_steps if args.save_steps < 1 else 1)
    copies = 2 if args.push_to_hub else 1  # the model folder, and the copy that is uploaded
    needed = (checkpoints + 1) * checkpoint_bytes(trainer) + 4 * trainer.model.num_parameters() * copies
    free = shutil.disk_usage(args.output_dir).free
    if free < needed:
        raise DiskFullError(
            f"not enough disk space for this run in {args.output_dir}: {checkpoints} checkpoints, one being written and the "
            f"model need about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; free some space, or use another "
            "--output_dir"
        )


def disk_full(trainer: Trainer, content: str) -> DiskFullError:
    """The error to raise if there is no space for `content`."""
    subject = "it" if content.startswith("checkpoint") else "a checkpoint"
    needed, free = checkpoint_bytes(trainer), shutil.disk_usage(trainer.args.output_dir).free
    return DiskFullError(
        f"not enough disk space for {content}: {subject} needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are "
        "free; earlier checkpoints are intact; free some space, and run the same command again to resume"
    )


def too_large(trainer: Trainer, content: str) -> DiskFullError:
    """The error to raise if a file of `content` is larger than this process, or the file system, allows."""
    if (limit := file_size_limit()) is None:
        cause, remedy = "the file system supports", f"move {trainer.args.output_dir} to another file system"
    else:
        cause, remedy = f"the file size limit of this process ({limit:,} bytes, `ulimit -f`)", "raise the limit"
    return DiskFullError(
        f"{content}: a file is larger than {cause}; earlier checkpoints are intact; {remedy}, and run the same command again"
    )


def no_space(trainer: Trainer, error: Exception, content: str, guess: bool = False) -> DiskFullError | None:
    """The error to raise instead of `error` if it means that `content` cannot be stored; otherwise `None`.

    Args:
        guess: Whether to infer the cause of an error that states none, as those of torch, from the space for a checkpoint.
    """
    number, limit = getattr(error, "errno", None), file_size_limit()
    if number == errno.EFBIG or "File too large" in str(error):
        return too_large(trainer, content)
    if number in DISK_FULL or "No space left" in str(error):
        return disk_full(trainer, content)
    if guess and limit is not None and limit < checkpoint_bytes(trainer):
        return too_large(trainer, content)
    if guess and shutil.disk_usage(trainer.args.output_dir).free < checkpoint_bytes(trainer):
        return disk_full(trainer, content)
    return None


@contextmanager
def storage_errors(trainer: Trainer) -> Iterator[None]:
    """Convert errors of the file system in the block to errors that state how to resume.

    Raises:
        DiskFullError: if the disk is full, or a file is too large.
        StorageError: if the run folder is no longer writable, or a token stream is no longer readable.
    """
    try:
        yield
    except TrainingStopped:
        raise
    except Exception as error:
        step = trainer.state.global_step
        if isinstance(error, UnreadableFileError):
            stopped: TrainingStopped | None = StorageError(
                f"{_message(error)}, and resumes from the newest checkpoint (after step {step})"
            )
        else:
            stopped = no_space(trainer, error, f"the files of this run ({error})")
        if stopped is None and isinstance(error, OSError):
            stopped = StorageError(
                f"{error} (after step {step}); once {trainer.args.output_dir} is writable again, the same command resumes "
                "from the newest checkpoint in it"
            )
        if stopped is None:
            raise
        # An exception from a data loader worker is referred to by its own frames, which also hold the data loader. Without
        # it, the workers end; otherwise the process would wait for them at its end.
        traceback.clear_frames(error.__traceback__)
        raise stopped from error


def _message(error: Exception) -> str:
    """The message of an exception. That of a data loader worker contains the traceback, which ends with its message."""
    return str(error).strip().splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]
