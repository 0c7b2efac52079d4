"""What a run reports: the plan printed before training, and the metadata of a model folder (`minigpt.json`)."""

import math
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from .. import __version__
from ..data.blocks import SequenceDataset
from ..data.chat_format import ChatFormat, Message
from ..data.corpus import hub_datasets, public_name
from ..data.packing import ConversationDataset
from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..data.tokenizer import tokenizer_fingerprint, vocabulary_size
from ..errors import MiniGPTError
from ..inference.copying import Copying, encode_samples, measure_copying
from ..inference.evaluation import Score, summarize
from ..trust import checked_folder, read_metadata
from .arguments import MiniGPTTrainingArguments, ModelArguments, Settings
from .auxiliary_head import auxiliary_parameters
from .recipe import resolved
from .run_folder import identity_of
from .sharding import data_parallel_size, replicas

if TYPE_CHECKING:
    from .trainer import MiniGPTTrainer

LOCAL_PATHS = ("data", "tokenizer", "init_from")  # settings that may be paths on this machine


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run so far.

    Args:
        name: Repository or run name.
        run: Identity of the run, see `identity_of`.
        parameters: Number of parameters of the published model.
        steps, skipped_steps, planned_steps: Optimizer steps.
        finished: Whether no step follows: all planned steps were taken, or early stopping has ended training.
        published_step: The step whose weights are described: the last one or that of the best checkpoint.
        tokens: Training tokens of these steps, including padding.
        tokens_per_epoch, padding: Tokens of all sequences, and the share of them that is padding.
        changes: Settings that were changed when the run was resumed; see `changes_since`.
        seconds: Training time, over all starts of the run.
        evaluation: Log row of the evaluation of these weights; `None` if they were not evaluated.
        prompt, temperature, sample_tokens, samples: Generated texts and how they were generated.
        sample_step: The step whose weights generated them.
        given: What each sample starts with, which was not generated.
        conversations: The messages that each sample answers; empty if the samples continue a text.
        copying: What the samples of the finished model share with the training text.
    """

    name: str
    run: str
    parameters: int
    steps: int
    skipped_steps: int
    planned_steps: int
    finished: bool
    published_step: int
    tokens: int
    changes: list[dict[str, Any]]
    tokens_per_epoch: int
    padding: float
    seconds: float
    evaluation: dict[str, Any] | None
    prompt: str
    temperature: float
    sample_tokens: int
    sample_step: int
    samples: list[str]
    given: list[str]
    conversations: list[list[Message]]
    copying: Copying | None


def training_result(trainer: "MiniGPTTrainer", finished: PreTrainedModel | None = None) -> TrainingResult:
    """The outcome of a run so far.

    Args:
        finished: The model to publish, if training has ended; its samples are generated.
    """
    samples, progress, sequences = trainer.samples, trainer.progress, trainer.train_dataset
    assert samples is not None and progress is not None  # a trainer that publishes has both callbacks
    texts = samples.final_samples(finished) if finished else samples.latest
    return TrainingResult(
        name=trainer.hub_model_id or Path(trainer.args.output_dir).absolute().name,
        run=identity_of(trainer.fingerprint),
        parameters=(finished or trainer.model).num_parameters() - auxiliary_parameters(finished or trainer.model),
        steps=trainer.state.global_step,
        skipped_steps=trainer.guard.skipped_steps,
        planned_steps=trainer.state.max_steps,
        finished=finished is not None or trainer.state.global_step >= trainer.state.max_steps,
        published_step=_step_of_weights(trainer, finished is not None),
        tokens=trained_tokens(trainer.args, trainer.train_dataset, trainer.state.global_step),
        changes=trainer.changes,
        tokens_per_epoch=sequences.tokens_per_epoch,
        padding=1 - sequences.filled if isinstance(sequences, ConversationDataset) else 0.0,
        seconds=progress.seconds,
        evaluation=_evaluation_of_weights(trainer, finished is not None),
        prompt=samples.prompt,
        temperature=samples.temperature,
        sample_tokens=samples.tokens,
        sample_step=_step_of_weights(trainer, True) if finished else samples.latest_step,
        samples=texts,
        given=samples.given(len(texts)),
        conversations=samples.conversations(),
        copying=_copying(trainer, texts) if finished and texts else None,
    )


def _copying(trainer: "MiniGPTTrainer", texts: list[str]) -> Copying:
    """Compare the samples with the training text, and held-out text of equal length with it."""
    assert trainer.samples is not None and trainer.text is not None and trainer.settings is not None
    text, is_chat = trainer.text, trainer.settings.data.chat
    given = trainer.samples.given(len(texts))
    samples = encode_samples(text.tokenizer, zip(given, texts, strict=True), is_chat)
    return measure_copying(text.tokenizer, samples, text.train, text.validation, is_chat)


def _step_of_weights(trainer: Trainer, finished: bool) -> int:
    """The step of the current weights, which at the end may be those of the best checkpoint."""
    state = trainer.state
    is_best = finished and trainer.args.load_best_model_at_end and state.best_model_checkpoint
    return state.best_global_step if is_best else state.global_step


def _evaluation_of_weights(trainer: Trainer, finished: bool) -> dict[str, Any] | None:
    """The log row of the evaluation of the current weights."""
    step = _step_of_weights(trainer, finished)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row and row["step"] == step]
    return evaluations[-1] if evaluations else None


def describe(settings: Settings, text: PreparedText, result: TrainingResult) -> dict[str, Any]:
    """The content of `minigpt.json`: how the model was trained. Local paths are reduced to their last component."""
    data, _, training = settings
    power = assumed_power(training)
    score = score_of(result, text, data.block_size)
    branch = training.hub_revision if training.push_to_hub and training.hub_revision != "main" else None
    return {
        "name": result.name,
        **({"hub_revision": branch} if branch else {}),
        "run": result.run,
        "date": datetime.now(UTC).date().isoformat(),
        "language": data.language,
        "license": data.license,
        "minigpt_version": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": {
            name: public_name(value) if name in LOCAL_PATHS else value for name, value in resolved(settings).items()
        },
        "data": {
            "name": public_name(text.name),
            "datasets": hub_datasets(text.name),
            "cut": text.split_description,
            "shards": text.shards,
            "train": describe_stream(text.train),
            "validation": describe_validation(text),
            **({"compared_with_base_model": text.is_compared} if settings.model.init_from else {}),
            **({} if text.unseen_fraction is None else {"unseen_fraction": text.unseen_fraction}),
            **({"has_other_systems": has_other_systems(text, data.system)} if data.chat else {}),
        },
        "tokenizer": {
            "kind": kind_of_tokenizer(text.kind, settings.model.init_from),
            "vocab_size": vocabulary_size(text.tokenizer),
            "bytes_per_token": text.train.bytes / text.train.targets,
            "opening": text.tokenizer.eos_token if text.tokenizer.bos_token is None else text.tokenizer.bos_token,
            "fingerprint": tokenizer_fingerprint(text.tokenizer),
            "lossy": text.lossy,
        },
        "training": {
            "parameters": result.parameters,
            "steps": result.steps,
            "skipped_steps": result.skipped_steps,
            "planned_steps": result.planned_steps,
            "finished": result.finished,
            "published_step": result.published_step,
            "changes": result.changes,
            "tokens_per_step": tokens_per_step(training, data.block_size),
            "tokens": result.tokens,
            "padding": result.padding,
            "epochs": result.tokens / result.tokens_per_epoch,
            "seconds": round(result.seconds, 1),
            "time": duration(result.seconds),
            "device": device_name(training),
            "processes": training.world_size,
            "precision": "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
            "power": power,
            "energy_wh": result.seconds * power["devices"] * power["watts"] / 3600,
        },
        "results": score.to_dict() if score else {},
        "sample": {
            "prompt": result.prompt,
            "temperature": result.temperature,
            "tokens": result.sample_tokens,
            "step": result.sample_step,
            "given": result.given,
            "conversations": result.conversations,
            "texts": result.samples,
        },
        "copying": result.copying.to_dict() if result.copying else {},
    }


def kind_of_tokenizer(name: str, init_from: str | None) -> str:
    """Return the kind of a tokenizer of this package, also if it is that of another model, or else its name.

    Args:
        name: A kind, or the folder or Hub id that it was loaded from.
        init_from: The model that training started from.
    """
    if name not in (kinds := {"bpe": "byte-level BPE", "bytes": "bytes", "characters": "characters"}):
        source = checked_folder(init_from, with_weights=False) if init_from else Path(name)
        about = read_metadata(source).get("tokenizer")
        kind = about.get("kind") if isinstance(about, dict) else None
        return str(kind if kind in kinds.values() else public_name(name))
    return kinds[name]


def score_of(result: TrainingResult, text: PreparedText, block_size: int) -> Score | None:
    """The validation score of the published weights, if they were evaluated and it is finite."""
    validation = text.validation
    if validation is None or result.evaluation is None or not math.isfinite(result.evaluation["eval_loss"]):
        return None
    excerpts = len(validation.documents)
    documents = text.scored.documents if text.scored else excerpts
    loss, tokens = result.evaluation["eval_loss"], validation.targets
    stride = None if text.scored is None or text.scored.window else 0
    return summarize(loss, tokens, validation.bytes, documents, excerpts, block_size, stride)


def describe_validation(text: PreparedText) -> dict[str, Any] | None:
    """Counts and fingerprint of the evaluated text, and its share of the validation split, if there is one."""
    if text.validation is None or text.scored is None:
        return None
    return {
        **describe_stream(text.validation),
        "documents": text.scored.documents,
        "excerpts": len(text.validation.documents),
        "of_documents": text.scored.of_documents,
        "of_characters": text.scored.of_characters,
        "window_characters": text.scored.window,
        "scored": str(text.scored),
    }


def has_other_systems(text: PreparedText, system: str | None) -> bool:
    """Whether conversations of the training have system messages of their own, other than that of the settings."""
    return ChatFormat(text.tokenizer).have_other_system(text.train.iterate_documents(), system)


def describe_stream(stream: TokenStream) -> dict[str, Any]:
    """Counts and fingerprint of a token stream."""
    return {
        "documents": len(stream.documents),
        "characters": stream.characters,
        "bytes": stream.bytes,
        "tokens": len(stream),
        "targets": stream.targets,
        "fingerprint": stream.fingerprint,
    }


# -- the plan ---------------------------------------------------------------------------------------------------------


def tokens_per_step(training: MiniGPTTrainingArguments, block_size: int) -> int:
    """Training tokens of a complete optimizer step, over all processes."""
    sequences = training.train_batch_size * training.gradient_accumulation_steps * data_parallel_size(training)
    return sequences * block_size


def trained_tokens(
    training: MiniGPTTrainingArguments, sequences: SequenceDataset | ConversationDataset, steps: int
) -> int:
    """Training tokens of the first optimizer steps of a run: the last step of an epoch has only the remaining sequences."""
    step = tokens_per_step(training, sequences.block_size) // sequences.block_size
    return trained_sequences(training, steps, len(sequences), step) * sequences.block_size


def trained_sequences(training: MiniGPTTrainingArguments, steps: int, sequences: int, step: int) -> int:
    """Sequences of the first optimizer steps of a run, given those of an epoch and of a complete step."""
    used = used_sequences(training, sequences, step)
    epochs, remaining = divmod(steps, math.ceil(used / step))
    return epochs * used + min(remaining * step, used)


def used_sequences(training: MiniGPTTrainingArguments, sequences: int, step: int) -> int:
    """Sequences that are used in an epoch: those of an incomplete last step may be omitted."""
    if not training.dataloader_drop_last:
        return sequences
    batch = step // training.gradient_accumulation_steps
    return sequences // step * step or sequences // batch * batch or sequences  # `check_batches` rejects 0


def check_memory(config: PreTrainedConfig, architecture: ModelArguments, training: MiniGPTTrainingArguments) -> None:
    """Check that weights, gradients and two moments per parameter fit into memory, in float32: 16 bytes per parameter.

    With LoRA few parameters are trained, and 4 bytes suffice; with FSDP the processes that shard a model divide it.

    Raises:
        MiniGPTError: before anything is allocated, if they do not fit.
    """
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    parameters = config.num_hidden_layers * layer + embeddings
    on_gpu = training.device.type == "cuda"
    free = torch.cuda.mem_get_info(training.device)[0] if on_gpu else psutil.virtual_memory().available
    shards = training.world_size // replicas(training) if training.fsdp else 1
    needed = (4 if architecture.lora_rank else 16) * parameters / shards
    if needed > free:
        raise MiniGPTError(
            f"this model has {parameters:,} parameters, which need about {needed / 1e9:,.1f} GB to train, and "
            f"{free / 1e9:,.1f} GB are free: lower --hidden_size, --num_hidden_layers or --vocab_size"
        )


def plan_table(trainer: Trainer, text: PreparedText, done: int = 0, seconds_per_step: float | None = None) -> str:
    """The plan of a run in human-readable form: device, text, model, steps and time.

    Args:
        done: Optimizer steps taken before, if the run is resumed; the time is that of the remaining ones.
        seconds_per_step: If it has been measured; otherwise it is measured here.
    """
    args, model, stream = trainer.args, trainer.model, text.train
    *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    tokens, auxiliary = trained_tokens(args, trainer.train_dataset, steps), auxiliary_parameters(model)
    step = tokens_per_step(args, trainer.train_dataset.block_size)
    remaining = f" for the remaining {steps - done:,} steps" if done else ""
    precision = "bf16 autocast over float32 weights" if args.bf16 else "fp16 autocast" if args.fp16 else "float32"
    if trainer.is_fsdp_enabled:  # a step takes all processes, and this function is called in one
        duration_line = "not estimated with FSDP"
    else:
        seconds = (steps - done) * (seconds_per_step or measure_step(trainer))
        without = "evaluations" if seconds_per_step else "the optimizer and evaluations"
        duration_line = f"about {duration(seconds)}{remaining}, without {without}"
    sequences = trainer.train_dataset
    content = f"{stream.characters:,} characters -> {len(stream):,} tokens of {stream.bytes / len(stream):.2f} bytes"
    if isinstance(sequences, ConversationDataset):
        content = (
            f"{len(stream.documents):,} conversations, {stream.targets:,} of {len(stream):,} tokens in answers -> "
            f"{len(sequences):,} sequences, {sequences.filled:.0%} full"
        )
    return (
        f"device        {device_name(args)}, {precision}\n"
        f"text          {text.name}: {content}; validation: {text.split_description}"
        f"{f'; scored: {text.scored}' if text.scored and args.eval_strategy != 'no' else ''}\n"
        f"model         {model.num_parameters() - auxiliary:,} parameters, {model.config.num_hidden_layers} layers of "
        f"width {model.config.hidden_size}, vocabulary {model.config.vocab_size:,}{trainable_share(model)}"
        f"{f'; {auxiliary:,} more in the auxiliary head, not published' if auxiliary else ''}\n"
        f"training      {steps:,} steps of {'at most ' if tokens < steps * step else ''}{step:,} tokens = {tokens:,} tokens, "
        f"{tokens / sequences.tokens_per_epoch:.2f} epochs\n"
        f"time          {duration_line}"
    )


def trainable_share(model: PreTrainedModel) -> str:
    """How many parameters are trained, if not all are."""
    trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    return f"; {trainable:,} of them are trained ({trainable / total:.1%})" if trainable < total else ""


def measure_step(trainer: Trainer) -> float:
    """Seconds of the forward and backward passes of an optimizer step: the fastest of three on one batch.

    The optimizer takes a fifth of a step in small models, and less in larger ones. Gradients are discarded, and random
    states are restored.
    """
    args = trainer.args
    rows = min(args.train_batch_size, len(trainer.train_dataset))
    batch = trainer.train_dataset.collate([trainer.train_dataset[0, i] for i in range(rows)])
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    devices = [args.device] if args.device.type == "cuda" else []
    seconds = []
    with torch.random.fork_rng(devices):  # dropout draws random numbers
        for _ in range(3):
            began = time.perf_counter()
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model.train(), {**batch, "use_cache": False})
            loss.backward()
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    trainer.model.zero_grad()
    return min(seconds) * args.gradient_accumulation_steps


def device_name(args: MiniGPTTrainingArguments) -> str:
    """The hardware of a run in human-readable form."""
    if args.device.type == "cuda":
        return f"{args.world_size} × {torch.cuda.get_device_name(args.device)}"
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    return f"{args.device.type}{threads}{processes}"


def assumed_power(args: MiniGPTTrainingArguments) -> dict[str, Any]:
    """The assumptions of the energy estimate; nothing is measured.

    The watts are those of Green Algorithms (arXiv:2007.07610) for a processor core and an accelerator of unknown type.
    """
    if args.device.type == "cpu":
        return {"devices": torch.get_num_threads() * args.world_size, "kind": "processor core", "watts": 12}
    return {"devices": args.world_size, "kind": "accelerator", "watts": 200}


def duration(seconds: float) -> str:
    """Format seconds: 45 -> "45 s"; 200 -> "3 min 20 s"; 7500 -> "2 h 5 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
