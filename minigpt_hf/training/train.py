"""The story of a training: corpus -> tokenizer -> stream -> model -> trainer -> folder.

In: the three dataclasses of `training.arguments`. Out: a run folder with checkpoints, log and recipe, and in it `model/`,
the folder that is published. It refuses to write into a folder that holds anything but the same run, which then goes on.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import is_in_notebook

from .. import __version__
from ..data.blocks import Blocks
from ..data.corpus import CACHE, Corpus, load_corpus
from ..data.prepared import PreparedText, is_prepared, prepare
from ..data.tokenizer import byte_tokenizer, load_tokenizer, tokenizer_fingerprint, vocabulary_size
from ..errors import MiniGPTError, StorageError, TrainingInterrupted, TrainingStopped
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..output import guarded_output
from ..publish.model_folder import write_model_folder
from ..publish.push import push_folder
from ..trust import read_metadata
from .arguments import Arguments, DataArguments, MiniGPTTrainingArguments, ModelArguments
from .autoconfig import Dial
from .callbacks import Lines, Samples
from .checkpoint import FINGERPRINT, write_atomically
from .initialize import existing_config, existing_model, merged, with_lora
from .plan import check_memory, show_plan, tokens_per_step
from .recipe import resolved
from .report import describe
from .resume import (
    checkpoint_to_resume,
    fingerprint_of,
    from_main_process,
    is_finished,
    read_log,
    run_folder,
    start_over,
    step_of,
)
from .run_folder import FolderLock
from .stopping import StopAtBoundary, StopWhenNoBetter, is_disk_full
from .trainer import MiniGPTTrainer

logger = logging.getLogger(__name__)


def train(arguments: Arguments, began: float | None = None) -> Path:
    """Train a GPT from scratch and return its model folder; a run that was interrupted goes on, exactly.

    Args:
        began: `time.perf_counter()` when the command started, for `--minutes`; default: now.

    Raises:
        MiniGPTError: if the text, the configuration or the output folder cannot be used, or settings have changed.
        TrainingStopped: if the run ended early: by a signal, a full disk, or a non-finite loss.
    """
    stop, began = StopAtBoundary(), began or time.perf_counter()
    with guarded_output(lasting=True), stop.listening(), run_folder(arguments[2]) as lock:
        return train_in(lock, arguments, stop, began)


def train_in(lock: FolderLock, arguments: Arguments, stop: StopAtBoundary, began: float) -> Path:
    """Train in a folder that is locked; see `train`."""
    data, architecture, training = arguments
    run = lock.folder
    starts_over = training.fresh and (run / FINGERPRINT).is_file()
    if training.save_only_model:
        raise MiniGPTError(
            "save_only_model is not supported: such checkpoints cannot be resumed from or verified; leave it out, and limit "
            "the disk space with --save_total_limit"
        )
    set_seed(training.seed)

    if architecture.init_from:
        existing_config(architecture)  # what cannot be gone on from is said before the text is read
    dial = Dial(arguments, run, began)
    if not architecture.init_from:  # an invalid architecture is refused before the text is read
        check_memory(make_config(architecture, data.block_size, byte_tokenizer()), architecture, training)
    with training.main_process_first(desc="text"):  # the other processes find what the first one made
        text = prepare_text(data, dial.choose_tokenizer)
    raise_unless_same_text(text, training)
    if architecture.init_from and is_prepared(data.data):
        existing = load_tokenizer(architecture.init_from)
        if tokenizer_fingerprint(existing) != tokenizer_fingerprint(text.tokenizer):
            raise MiniGPTError(
                f"--data {data.data}: was prepared with another tokenizer than that of --init_from {architecture.init_from}; "
                f"prepare the text with `minigpt tokenize --tokenizer {architecture.init_from}`"
            )
    dial.choose_the_rest(
        text,
        lambda shape: make_model(make_config(shape, data.block_size, text.tokenizer), shape),
    )
    config = make_config(architecture, data.block_size, text.tokenizer)
    check_memory(config, architecture, training)
    blocks = Blocks(text.train, data.block_size, training.seed)
    fingerprint = {**fingerprint_of(arguments, text, config), "minigpt_hf": __version__}
    has_model = (run / "model").exists() and not starts_over
    if has_model and from_main_process(training, lambda: is_finished(run, fingerprint)):
        if training.process_index == 0:
            warn_about_the_card(run / "model", data)
        return run / "model"
    checkpoint = None
    if not starts_over:
        checkpoint = from_main_process(training, lambda: checkpoint_to_resume(run, fingerprint, training))
    done = step_of(checkpoint) if checkpoint else 0
    model = make_model(config, architecture)

    lines = Lines(
        run / "log.jsonl",
        tokens_per_step(training, data.block_size),
        len(text.train) / text.train.bytes,
        is_in_notebook(),
    )
    samples = Samples(run / "log.jsonl", model, text.tokenizer, training.sample_prompt, training.sample_tokens, stop)
    callbacks = [lines, samples, stop, StopWhenNoBetter(patience(training, blocks))]
    story = partial(describe, arguments, text, lines, samples)
    trainer = MiniGPTTrainer(model, training, blocks, text.validation, text.tokenizer, callbacks, fingerprint, story)
    trainer.check_batches()
    with storage_errors(trainer):
        if trainer.is_world_process_zero():
            trainer.check_room()
            if starts_over:
                start_over(lock)
            recipe = yaml.safe_dump(resolved(arguments), sort_keys=False)
            write_atomically({run / "recipe.yaml": recipe, run / FINGERPRINT: json.dumps(fingerprint, indent=2) + "\n"})
            show_plan(trainer, text, done)

        trainer.announced_step = done if checkpoint else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        step = trainer.state.global_step
        where = f"and saved at step {step}; the same command goes on from there" if step else "before the first step"
        stopped = TrainingInterrupted(stop.number, where)
        if training.world_size > 1:  # a launcher ends all processes as soon as one fails
            if trainer.is_world_process_zero():
                logger.warning(str(stopped))
            stopped.was_reported = True
            leave_process_group(training)
        raise stopped
    trainer.check_trained()
    if trainer.is_world_process_zero():
        with storage_errors(trainer):
            model = merged(trainer.model) if architecture.lora_rank else trainer.model
            about = story(trainer, finished=model)
            write_model_folder(run / "model", model, text.tokenizer, about, read_log(run / "log.jsonl"))
        print(f"the model is in {run / 'model'}", flush=True)
        if training.push_to_hub:
            if stop.number is not None:
                raise TrainingInterrupted(
                    stop.number, f"before the push; push with `minigpt push {run / 'model'} USER/NAME`"
                )
            print(*push_folder(run / "model", trainer.hub_model_id, training.hub_revision), flush=True)
    leave_process_group(training)
    return run / "model"


@contextmanager
def storage_errors(trainer: MiniGPTTrainer) -> Iterator[None]:
    """Say what a full disk, or a run folder that cannot be written any more, means for the run."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainingStopped):
            raise
        if is_disk_full(error):
            raise trainer.disk_full(f"what a run writes ({error})") from error
        if isinstance(error, OSError):
            raise StorageError(
                f"{error} (after step {trainer.state.global_step}); once {trainer.args.output_dir} can be written again, the "
                "same command resumes from the newest checkpoint in it"
            ) from error
        raise


def warn_about_the_card(model: Path, data: DataArguments) -> None:
    """Report settings of the card that differ from those that a finished model was published with."""
    published = read_metadata(model)
    for name in ("language", "license"):
        if (given := vars(data)[name]) and name in published and given != published[name]:
            logger.warning(
                f"--{name} {given}: not applied, the model was published with {name} {published[name]}; change "
                f"{model / 'README.md'}, or train again with --fresh"
            )


def leave_process_group(training: MiniGPTTrainingArguments) -> None:
    """Wait for all processes, then leave the group together: torch aborts a process that ends while others are in it."""
    if training.world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def raise_unless_same_text(text: PreparedText, training: MiniGPTTrainingArguments) -> None:
    """Each rank has read the text by itself; a file that is written to meanwhile would give each another one.

    Raises:
        MiniGPTError: if the ranks have read different texts.
    """
    if training.world_size == 1:
        return
    streams = (text.train, text.validation)
    read = gather_object([[stream.fingerprint for stream in streams if stream is not None]])
    if any(one != read[0] for one in read):
        raise MiniGPTError(
            f"{text.name}: the {len(read)} processes have read different texts; wait until nothing writes to it, and give "
            "the same files to all machines"
        )


def prepare_text(data: DataArguments, choose_tokenizer: Callable[[Corpus], None] = lambda corpus: None) -> PreparedText:
    """Text, tokenizer and token streams; what was prepared before is found again."""
    cache_dir = Path(data.cache_dir) if data.cache_dir else CACHE
    if is_prepared(data.data):
        return PreparedText.open(Path(data.data), cache_dir)  # `parse_arguments` has taken over its settings
    corpus = load_corpus(
        data.data,
        data.validation_fraction,
        data.encoding,
        encoding_errors=data.encoding_errors,
        newline=data.newline,
        split=data.data_split,
        text_column=data.text_column,
        data_format=data.data_format,
        streaming=data.streaming,
        cache_dir=cache_dir,
    )
    choose_tokenizer(corpus)
    return prepare(
        corpus,
        data.tokenizer,
        data.vocab_size,
        cache_dir,
        block_size=data.block_size,
        validation_characters=data.validation_characters,
        num_proc=data.num_proc,
        max_tokens=data.max_tokens,
    )


def make_config(architecture: ModelArguments, block_size: int, tokenizer: PreTrainedTokenizerBase) -> MiniGPTConfig:
    """The architecture, with what follows from block size and tokenizer filled in; or that of the model to go on from."""
    config = (
        existing_config(architecture) if architecture.init_from else new_config(architecture, block_size, tokenizer)
    )
    if config.max_position_embeddings < block_size:
        raise MiniGPTError(
            f"--max_position_embeddings {config.max_position_embeddings} is less than --block_size {block_size}: "
            "the model could not take its own training blocks"
        )
    if config.vocab_size < (size := vocabulary_size(tokenizer)):
        raise MiniGPTError(f"the tokenizer has {size:,} tokens, and the model's vocabulary only {config.vocab_size:,}")
    tokenizer.model_max_length = config.max_position_embeddings
    config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    return config


def new_config(architecture: ModelArguments, block_size: int, tokenizer: PreTrainedTokenizerBase) -> MiniGPTConfig:
    """What the recipe says."""
    settings = dict(vars(architecture))
    for name in ("init_from", "lora_rank"):
        del settings[name]
    rope_theta, longest = settings.pop("rope_theta"), settings.pop("max_position_embeddings")
    if architecture.use_sliding_window:
        # No layer looks further back than training did, so the model can write on past its block. One token more than a
        # block: then no block needs a mask for the window, and attention keeps its fast path.
        settings["sliding_window"] = settings["sliding_window"] or block_size + 1
        longest = longest or 16 * block_size
    try:
        return MiniGPTConfig(
            vocab_size=vocabulary_size(tokenizer),
            max_position_embeddings=longest or block_size,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    except StrictDataclassError as error:  # its cause is the error of the check, without the name of the check
        raise MiniGPTError(str(error.__cause__ or error)) from error
    except ValueError as error:
        raise MiniGPTError(str(error)) from error


def make_model(config: MiniGPTConfig, architecture: ModelArguments) -> PreTrainedModel:
    """Fresh weights, or those to go on from; and how `generate` samples unless it is told otherwise."""
    folder = architecture.init_from
    model = existing_model(folder, config) if folder else MiniGPTForCausalLM(config)
    bos, eos = config.bos_token_id, config.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        bos_token_id=config.bos_token_id,
        # Where BOS is a token of its own, it is what the training text has between documents.
        eos_token_id=eos if bos in (None, eos) or isinstance(eos, list) else [eos, bos],
        pad_token_id=config.pad_token_id,
    )
    return with_lora(model, architecture.lora_rank) if architecture.lora_rank else model


def patience(training: MiniGPTTrainingArguments, blocks: Blocks) -> int:
    """Evaluations without a better one after which to stop; 0 for never: what is read once is not learnt by heart."""
    if training.early_stopping_patience is not None:
        return training.early_stopping_patience
    steps_per_epoch = len(blocks) * blocks.block_size / tokens_per_step(training, blocks.block_size)
    epochs = training.max_steps / steps_per_epoch if training.max_steps > 0 else training.num_train_epochs
    return 5 if epochs > 1 and training.load_best_model_at_end else 0
