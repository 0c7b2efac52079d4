"""Whether a run may go on, and from where.

In: an output folder and what a run is about to do. Out: the checkpoint to go on from, or none. It refuses to mix two runs:
a run goes on only where everything that decides its numbers is the same, or where a change was allowed by name.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig

from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..data.tokenizer import tokenizer_fingerprint, vocabulary_size
from ..publish.folder import damage
from .arguments import Arguments, MiniGPTTrainingArguments
from .checkpoint import (
    DESCRIBED,
    FINGERPRINT,
    checkpoints,
    differences,
    newest_valid,
    set_aside,
    temporary,
    what_is_wrong,
    write_atomically,
)
from .lock import LOCK, FolderLock
from .plan import tokens_per_step

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def run_folder(training: MiniGPTTrainingArguments) -> Iterator[FolderLock]:
    """Lock `output_dir` within the block; with several processes the main process holds the lock for all.

    Raises:
        ValueError: on every process, if another training holds the lock, or the folder is not empty and holds no run.
    """
    run = Path(training.output_dir)
    lock = FolderLock(run)

    def acquire() -> None:
        if run.exists() and not run.is_dir():
            raise ValueError(f"--output_dir {run}: this is a file; name a folder")
        if (run / "model").is_dir() and not os.access(run, os.W_OK):
            return  # finished and read-only: nothing can be written there
        lock.acquire()
        names = {path.name for path in run.iterdir()} - {LOCK, temporary(run / "recipe.yaml").name}
        if temporary(run / FINGERPRINT).name in names:  # an earlier start was killed while it wrote its first files
            names -= {temporary(run / FINGERPRINT).name, "recipe.yaml"}
        if names and FINGERPRINT not in names:
            raise ValueError(f"--output_dir {run}: is not empty and holds no run; name another folder")

    try:
        from_main_process(training, acquire)
        yield lock
    finally:
        lock.release()


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


def start_over(lock: FolderLock) -> None:
    """Rename the run folder, and lock a new one in its place."""
    run = lock.folder
    print(f"the run that was in {run} is kept as {(kept := set_aside(run))}", flush=True)
    lock.moved_to(kept)
    lock.release()
    lock.moved_to(run)
    lock.acquire()


def is_finished(run: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the run has its model; a damaged one is set aside, to be published again from a checkpoint.

    Raises:
        ValueError: if the folder holds another run, or a damaged model and no checkpoint to publish it from.
    """
    old = read_json(run / FINGERPRINT)
    if changed := differences(old, fingerprint):
        raise ValueError(
            f"--output_dir {run}: holds another run, which is finished ({in_words(changed, old, fingerprint)}); name "
            "another folder, or say --fresh"
        )
    if (fault := damage(run / "model")) is None:
        print(f"this run is finished; the model is in {run / 'model'}", flush=True)
        return True
    if all(what_is_wrong(checkpoint) for checkpoint in checkpoints(run)):
        raise ValueError(
            f"--output_dir {run}: its model is damaged ({fault}), and no checkpoint is left to publish it from; restore "
            f"{run / 'model'} from a copy, or train again with --fresh"
        )
    kept = set_aside(run / "model")
    logger.warning(f"{run / 'model'} is damaged ({fault}); it is kept as {kept.name}, and is published again")
    return False


def checkpoint_to_resume(run: Path, fingerprint: dict[str, Any], training: MiniGPTTrainingArguments) -> Path | None:
    """The newest checkpoint that is whole, if the run was started with the same settings."""
    if not (run / FINGERPRINT).is_file():
        if training.resume_from_checkpoint:
            raise ValueError(f"--resume_from_checkpoint: there is no run in {run} that could go on")
        return None
    if training.resume_from_checkpoint:
        checkpoint = Path(training.resume_from_checkpoint)
        if fault := what_is_wrong(checkpoint):
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: it is broken ({fault})")
    else:
        checkpoint, lines = newest_valid(run)
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    old = read_json((checkpoint or run) / FINGERPRINT)
    changed = differences(old, fingerprint)

    def said(pairs: dict[str, tuple[Any, Any]]) -> str:
        return in_words(pairs, old, fingerprint)

    if fixed := {name: pair for name, pair in changed.items() if name.startswith("config.") and name not in MAY_CHANGE}:
        raise ValueError(
            f"--output_dir {run}: holds another run, its model is another ({said(fixed)}); name another folder, or "
            "say --fresh"
        )
    known = [name for name in fingerprint if name != DESCRIBED]
    for name in training.allow_change:
        if name not in known:
            raise ValueError(f"--allow_change {name}: a run is not known by that; there are {', '.join(known)}")
    refused = {name: pair for name, pair in changed.items() if name not in training.allow_change}
    if refused:
        raise ValueError(
            f"--output_dir {run}: holds another run, or this one with other settings ({said(refused)}); name another folder, "
            f"say --fresh, or let it go on with --allow_change {' '.join(refused)}"
        )
    if changed:
        print(f"changed: {said(changed)}", flush=True)
    step = step_of(checkpoint) if checkpoint else -1
    if training.resume_from_checkpoint:  # else a later start would take the newer ones, which this run leaves behind
        for later in [path for path in checkpoints(run) if int(path.name.removeprefix("checkpoint-")) > step]:
            logger.info(
                f"{later.name} is later than the checkpoint to resume from; it is kept as {set_aside(later).name}"
            )
    keep_log_until(run / "log.jsonl", step)
    if checkpoint:
        print(f"going on from step {step} ({checkpoint})", flush=True)
    return checkpoint


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that were taken when a checkpoint was saved."""
    return read_json(checkpoint / "trainer_state.json")["global_step"]


# What may change about a model that goes on training; the rest is what it is.
MAY_CHANGE = {"config.attention_dropout", "config.embedding_dropout", "config.residual_dropout"}


def fingerprint_of(arguments: Arguments, text: PreparedText, config: PreTrainedConfig) -> dict[str, Any]:
    """Everything that decides which numbers a run computes, by name; a run goes on only where it is the same."""
    data, architecture, training = arguments
    model = config.to_dict()
    shape = {f"config.{name}": model[name] for name in vars(architecture) if name in model}
    names = "learning_rate muon_learning_rate muon_momentum muon optim weight_decay adam_beta1 adam_beta2 adam_epsilon "
    names += "max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps num_train_epochs seed "
    names += "early_stopping_patience label_smoothing_factor bf16 fp16 world_size minutes size "
    names += "torch_compile torch_compile_backend torch_compile_mode"
    values = {**training.to_dict(), "world_size": training.world_size}
    return {
        "data": text.train.fingerprint,
        "validation": text.validation.fingerprint if text.validation else None,
        "tokenizer": tokenizer_fingerprint(text.tokenizer),
        "block_size": data.block_size,
        "effective_batch": tokens_per_step(training, data.block_size) // data.block_size,
        **shape,
        "init_from": architecture.init_from,
        "lora_rank": architecture.lora_rank,
        "config.rope_theta": model["rope_parameters"]["rope_theta"],
        **{name: values[name] for name in names.split()},
        "device": training.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        DESCRIBED: {
            "data": f"{text.name} ({sizes(text.train)})",
            "validation": f"{text.cut} ({sizes(text.validation)})" if text.validation else None,
            "tokenizer": f"{text.kind} ({vocabulary_size(text.tokenizer):,} tokens)",
        },
    }


def sizes(stream: TokenStream) -> str:
    """Of a text, for messages."""
    return f"{stream.characters:,} characters, {len(stream):,} tokens"


def in_words(changed: dict[str, tuple[Any, Any]], old: dict[str, Any], new: dict[str, Any]) -> str:
    """{"seed": (1, 2)} -> "seed was 1 and is 2"; what is compared by a hash is named with its size."""
    words = []
    for name, (before, after) in changed.items():
        known = [each.get(DESCRIBED, {}).get(name) for each in (old, new)]
        if not all(known):
            words.append(f"{name} was {before} and is {after}")
        elif known[0] == known[1]:
            words.append(f"{name} was {known[0]} and is another of the same name and size")
        else:
            words.append(f"{name} was {known[0]} and is {known[1]}")
    return ", ".join(words)


def keep_log_until(file: Path, step: int) -> None:
    """Drop the rows of lost steps, which will be taken again, and what a resumed run writes again at this one."""

    def stays(row: dict[str, Any]) -> bool:
        return row["step"] < step or (row["step"] == step and not row.keys() & {"sample", "train_runtime"})

    if not file.is_file():
        return
    rows, faults = rows_and_faults(file)
    if faults:
        lines = ", ".join(f"line {number}" for number in faults)
        logger.warning(f"{file}: removed what is not a complete row, as an interruption leaves it ({lines})")
    write_log(file, [row for row in rows if stays(row)])


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of this package's making."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON ({error}); restore it, or say --fresh") from error


def read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of `log.jsonl`; a line that is incomplete, as a kill or a full disk leaves it, is left out."""
    return rows_and_faults(file)[0]


def rows_and_faults(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of `log.jsonl`, and the numbers of its lines that are incomplete or hold values of a wrong type."""
    rows, faults = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_row(row):
            rows.append(row)
        else:
            faults.append(number)
    return rows, faults


def is_row(row: Any) -> bool:
    """Whether a line of `log.jsonl` is what this package writes: numbers, and a sample that is text."""

    def is_number(value: Any) -> bool:
        return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)

    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and row["step"] >= 0
        and all(is_number(row[name]) for name in ("step", "seconds", "eval_loss") if name in row)
        and isinstance(row.get("sample", ""), str)
    )


def write_log(file: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `log.jsonl`."""
    write_atomically({file: "".join(json.dumps(row) + "\n" for row in rows)})


def append_to_log(file: Path, row: dict[str, Any]) -> None:
    """Add a row to `log.jsonl`: the whole line or, if that fails, nothing."""
    line = (json.dumps(row) + "\n").encode()
    with file.open("ab", buffering=0) as opened:
        size = opened.seek(0, os.SEEK_END)
        try:
            written = opened.write(line)
            while written < len(line):  # a nearly full disk takes a part, and refuses the next
                written += opened.write(line[written:])
        except OSError:
            opened.truncate(size)
            raise
