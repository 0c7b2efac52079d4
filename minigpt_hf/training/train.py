"""The entry point of training: resolve the settings, train, publish.

`train` takes the three settings dataclasses and returns a model folder. Checkpoints, log and recipe are written to the run
folder, from which an interrupted run resumes.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, set_seed
from transformers.utils import is_in_notebook

from .. import __version__
from ..atomic import write_files
from ..data.blocks import SequenceDataset
from ..data.chat_format import ChatFormat
from ..data.packing import ConversationDataset
from ..data.prepared import PreparedText
from ..data.tokenizer import byte_tokenizer
from ..errors import MiniGPTError, TrainingInterrupted
from ..inference.generation import Prompt
from ..model.configuration_minigpt import MiniGPTConfig
from ..output import guarded_output
from ..publish.model_folder import write_model_folder
from ..publish.push import push_folder
from ..trust import read_metadata
from .arguments import DataArguments, MiniGPTTrainingArguments, Settings
from .autoconfig import AutoConfigurator
from .auxiliary_head import detach_auxiliary_head
from .callbacks import ProgressLogger, SampleLogger
from .initialize import (
    build_config,
    build_model,
    merge_lora,
    with_pretrained_architecture,
)
from .lock import FolderLock, LockCheck
from .recipe import resolved
from .report import check_memory, describe, plan_table, trained_tokens, training_result
from .resume import (
    checkpoint_to_resume,
    fingerprint_of,
    from_main_process,
    is_finished,
    keep_omitting,
    locked_run_folder,
    start_over,
    step_of,
)
from .run_folder import RunFolder, read_log
from .safeguards import (
    RandomStateCheck,
    check_batches,
    check_disk_space,
    check_optimizer_and_schedule,
    check_torch_settings,
    check_trained,
    checkpoint_bytes,
    rejected_settings,
    storage_errors,
)
from .sharding import check_host_memory, check_sharded_run
from .stopping import EarlyStopping, StopAtBoundary
from .tensor_parallel import check_divisible
from .text import prepare_text, raise_unless_same_text, raise_unless_same_tokenizer, with_unseen_fraction
from .trainer import MiniGPTTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run, resolved before its first step.

    Args:
        settings: Complete and frozen.
        config: Architecture of the model.
        fingerprint: Everything that determines the results of the run.
        seconds_per_step: If it was measured to choose the settings.
        checkpoint: Checkpoint to resume from; `None` for step 0.
        starts_over: Whether a previous run in the folder is renamed first.
        is_finished: Whether the run has published its model, so that nothing is left to do.
    """

    settings: Settings
    text: PreparedText
    config: MiniGPTConfig
    fingerprint: dict[str, Any]
    seconds_per_step: float | None
    checkpoint: Path | None
    starts_over: bool
    is_finished: bool


def train(settings: Settings, began: float | None = None) -> Path:
    """Train a GPT and return its model folder. An interrupted run resumes exactly; a finished one is not changed, but
    pushed with `push_to_hub`.

    Args:
        began: `time.perf_counter()` when the command started, for `--minutes`; default: now.

    Raises:
        MiniGPTError: if the text, the configuration or the output folder cannot be used, or settings have changed.
        TrainingStopped: if the run ended early: by a signal, a full disk, or a non-finite loss.
    """
    stop, began, training = StopAtBoundary(), began or time.perf_counter(), settings.training
    check_torch_settings(training)
    with (
        guarded_output(lasting=True),
        logging_level(training),
        stop.listening(),
        locked_run_folder(training) as lock,
    ):
        run = RunFolder(lock.folder)
        plan = resolve(settings, run, began)
        if not plan.is_finished:
            trainer = run_training(plan, lock, stop)
            publish(plan, trainer, lock, stop)
        elif training.push_to_hub and training.process_index == 0:
            push_finished(run, training)
        leave_process_group(plan.settings.training)
        return run.model


# -- resolve ----------------------------------------------------------------------------------------------------------


def resolve(settings: Settings, run: RunFolder, began: float) -> Plan:
    """Complete the settings from the text and the hardware, and decide where the run starts.

    Args:
        settings: As given; not changed.
        run: The run folder.
        began: See `train`.
    """
    training = settings.training
    starts_over = training.fresh and run.exists()
    if training.save_only_model:
        raise MiniGPTError(
            "save_only_model is not supported: such checkpoints cannot be resumed from or verified; leave it out, and limit "
            "the disk space with --save_total_limit"
        )
    if training.enable_jit_checkpoint:  # it would end a run on SIGTERM as if it were complete
        raise MiniGPTError(
            "enable_jit_checkpoint is not supported: a checkpoint is saved on SIGTERM in any case; omit it"
        )
    check_sharded_run(training, settings.model.lora_rank)
    # Settings that are invalid for any text are rejected before the text is read.
    if settings.model.init_from:
        settings = with_pretrained_architecture(settings)
    configurator = AutoConfigurator(settings, run, began)
    settings = configurator.settings
    if not settings.model.init_from:
        config = build_config(settings.model, settings.data.block_size, byte_tokenizer())
        check_memory(config, settings.model, training)
        check_divisible(config, training)

    with training.main_process_first(desc="text"):  # the other processes find the result in the cache
        text = prepare_text(
            settings.data, configurator.choose_tokenizer, configurator.choose_block_size, training.world_size
        )
        text = with_unseen_fraction(text, settings)
    raise_unless_same_text(text, training)
    raise_unless_same_tokenizer(text, settings)
    settings = configurator.choose_remaining(text)
    config = build_config(settings.model, settings.data.block_size, text.tokenizer, settings.data.chat)
    check_memory(config, settings.model, training)
    check_divisible(config, training)

    settings = keep_omitting(settings, run)
    fingerprint = {**fingerprint_of(settings, text, config), "minigpt_hf": __version__}
    finished, checkpoint = False, None
    if not starts_over:
        if run.model.exists():
            finished = from_main_process(training, lambda: is_finished(run, fingerprint))
        if finished and training.process_index == 0:
            warn_about_the_card(run.model, settings.data)
        if not finished:
            checkpoint = from_main_process(
                training,
                lambda: checkpoint_to_resume(
                    run, fingerprint, settings.training, lambda: len(training_sequences(settings, text))
                ),
            )
    return Plan(settings, text, config, fingerprint, configurator.seconds_per_step, checkpoint, starts_over, finished)


def warn_about_the_card(model: Path, data: DataArguments) -> None:
    """Report settings of the card that differ from those that a finished model was published with."""
    published = read_metadata(model)
    for name in ("language", "license"):
        if (given := vars(data)[name]) and name in published and given != published[name]:
            logger.warning(
                f"--{name} {given}: not applied, the model was published with {name} {published[name]}; change "
                f"{model / 'README.md'}, or train again with --fresh"
            )


# -- train ------------------------------------------------------------------------------------------------------------


def run_training(plan: Plan, lock: FolderLock, stop: StopAtBoundary) -> MiniGPTTrainer:
    """Train according to the plan.

    Raises:
        TrainingStopped: if the run ended early.
        MiniGPTError: if something else than early stopping or a signal ended it.
    """
    settings, text, run = plan.settings, plan.text, RunFolder(lock.folder)
    data, training = settings.data, settings.training
    chat_format = ChatFormat(text.tokenizer) if data.chat else None
    model = initialized_model(plan, (chat_format.start, chat_format.end) if chat_format else ())
    sequences = training_sequences(settings, text)
    progress = ProgressLogger(
        run.log,
        partial(trained_tokens, training, sequences),
        (text.train.targets if data.chat else len(text.train)) / text.train.bytes,
        with_lines=not is_in_notebook(),
        quiet=not shows_progress(training),
    )
    prompts: list[Prompt] = [training.sample_prompt or ""]
    fallback: list[Prompt] = [""]
    if data.chat:
        fallback = first_questions(text)
        prompts = [question_of(training.sample_prompt, data.system)] if training.sample_prompt else fallback
    samples = SampleLogger(progress, model, text.tokenizer, prompts, training.sample_tokens, stop, fallback)
    early = EarlyStopping(patience(training, sequences))
    callbacks = [LockCheck(lock), progress, samples, stop, early, RandomStateCheck()]
    if is_in_notebook() and not progress.quiet:
        from transformers.utils.notebook import NotebookProgressCallback  # needs IPython

        callbacks.append(NotebookProgressCallback())  # a bar, and a table of training and validation losses
    with rejected_settings():
        trainer = MiniGPTTrainer(
            model, training, sequences, text.validation, text.tokenizer, callbacks, plan.fingerprint, settings, text
        )
        check_optimizer_and_schedule(trainer)
        check_batches(trainer)
    done = step_of(plan.checkpoint) if plan.checkpoint else 0
    with storage_errors(trainer):
        if trainer.is_world_process_zero():
            check_disk_space(trainer)
            if training.fsdp:
                check_host_memory(checkpoint_bytes(trainer))
            lock.check()
            if plan.starts_over:
                start_over(lock)
            recipe = yaml.safe_dump(resolved(settings), sort_keys=False)
            fingerprint = json.dumps(plan.fingerprint, indent=2) + "\n"
            write_files({run.recipe: recipe, run.fingerprint: fingerprint})
            progress.print(plan_table(trainer, text, done, plan.seconds_per_step))
        trainer.announced_step = done if plan.checkpoint else None
        with trainer.saving:  # waits for the last checkpoint, also after an exception
            trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
    if stop.stopped:
        step = trainer.state.global_step
        where = f"and saved at step {step}; the same command resumes from there" if step else "before the first step"
        assert stop.number is not None
        stopped = TrainingInterrupted(stop.number, where)
        if training.world_size > 1:  # a launcher ends all processes as soon as one fails
            if trainer.is_world_process_zero():
                logger.warning(str(stopped))
            stopped.was_reported = True
            leave_process_group(training)
        raise stopped
    state = trainer.state
    if state.global_step < state.max_steps and not early.stopped:  # another callback of transformers ended training
        raise MiniGPTError(
            f"training ended at step {state.global_step:,} of {state.max_steps:,}, neither by a signal nor by early "
            "stopping: no model is published; the same command resumes from the last checkpoint"
        )
    check_trained(trainer)
    return trainer


def training_sequences(settings: Settings, text: PreparedText) -> SequenceDataset | ConversationDataset:
    """The sequences of an epoch."""
    data, seed = settings.data, settings.training.seed
    if data.chat:
        return ConversationDataset(text.train, ChatFormat(text.tokenizer), data.block_size, seed)
    return SequenceDataset(text.train, data.block_size, seed)


def question_of(text: str, system: str | None) -> Prompt:
    """A conversation that consists of a question."""
    return [*([] if system is None else [{"role": "system", "content": system}]), {"role": "user", "content": text}]


def first_questions(text: PreparedText) -> list[Prompt]:
    """The first three questions held out or, if there are none, of the text."""
    stream = text.train if text.validation is None else text.validation
    return ChatFormat(text.tokenizer).questions(stream.iterate_documents(), 3)


def initialized_model(plan: Plan, chat_tokens: Sequence[int]) -> PreTrainedModel:
    """The model to train; for `chat_tokens` see `build_model`.

    In a thread, a fresh one is initialized twice, to detect the use of random numbers by others.
    """

    def build() -> PreTrainedModel:
        set_seed(plan.settings.training.seed)
        return build_model(plan.config, plan.settings.model, chat_tokens)

    model = build()
    others_run = threading.current_thread() is not threading.main_thread() and not plan.settings.model.init_from
    if others_run and any(
        not torch.equal(*pair) for pair in zip(model.parameters(), build().parameters(), strict=True)
    ):
        logger.warning(
            "another thread of this process drew random numbers or loaded a model while the model was initialized: the run "
            "cannot be repeated exactly; train in a process of its own"
        )
    return model


@contextmanager
def logging_level(training: MiniGPTTrainingArguments) -> Iterator[None]:
    """Apply `log_level` to the package's logger within the block; `passive`, the default, leaves it as it is."""
    package_logger = logging.getLogger("minigpt_hf")
    before = package_logger.level
    if training.log_level != "passive":
        package_logger.setLevel(training.get_process_log_level())
    try:
        yield
    finally:
        package_logger.setLevel(before)


def shows_progress(training: MiniGPTTrainingArguments) -> bool:
    """Whether `log_level` admits progress output; by default it does."""
    return training.log_level in ("passive", "debug", "detail", "info")


def patience(training: MiniGPTTrainingArguments, sequences: SequenceDataset | ConversationDataset) -> int:
    """Evaluations without improvement before early stopping; 0 for none.

    By default 5 if the text is seen more than once, otherwise 0: a text seen once is not memorized.
    """
    if training.early_stopping_patience is not None:
        return training.early_stopping_patience
    epochs = training.num_train_epochs
    if training.max_steps > 0:
        epochs = trained_tokens(training, sequences, training.max_steps) / (len(sequences) * sequences.block_size)
    return 5 if epochs > 1 and training.load_best_model_at_end else 0


def leave_process_group(training: MiniGPTTrainingArguments) -> None:
    """Leave the process group together: torch aborts a process that ends while others are still in the group."""
    if training.world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# -- publish ----------------------------------------------------------------------------------------------------------


def publish(plan: Plan, trainer: MiniGPTTrainer, lock: FolderLock, stop: StopAtBoundary) -> None:
    """Write the model folder and, with `push_to_hub`, upload it, on the main process only."""
    training = plan.settings.training
    model = trainer.whole_model()
    if not trainer.is_world_process_zero():
        return
    run, progress = RunFolder(lock.folder), trainer.progress
    folder = run.model
    assert progress is not None
    with storage_errors(trainer):
        detach_auxiliary_head(model)
        model = merge_lora(model) if plan.settings.model.lora_rank else model
        metadata = describe(plan.settings, plan.text, training_result(trainer, model))
        lock.check()
        log = read_log(run.log) if training.figures else None
        write_model_folder(folder, model, plan.text.tokenizer, metadata, log)
    progress.print(f"the model is in {folder}")
    if training.push_to_hub:
        if stop.number is not None:
            raise TrainingInterrupted(
                stop.number, f"before the push; push with `minigpt push {folder} --repo-id USER/NAME`"
            )
        for url in push_folder(folder, trainer.hub_model_id, training.hub_revision):
            progress.print(url)


def push_finished(run: RunFolder, training: MiniGPTTrainingArguments) -> None:
    """Upload the model of a finished run: its push may have failed. Branches that hold it already are not changed."""
    name = training.hub_model_id or run.path.absolute().name
    for url in push_folder(run.model, name, training.hub_revision, bool(training.hub_private_repo)):
        logger.info(url)
