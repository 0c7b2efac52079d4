"""Whether a run may go on, and from where.

In: an output folder and what a run is about to do. Out: the checkpoint to go on from, or none. It refuses to mix two runs:
a run goes on only where everything that decides its numbers is the same, or where a change was allowed by name.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from ..data.prepared import PreparedText
from ..data.tokenizer import tokenizer_fingerprint
from .arguments import Arguments, MiniGPTTrainingArguments
from .checkpoint import FINGERPRINT, differences, newest_valid, set_aside, what_is_wrong
from .plan import tokens_per_step


def claim_run_folder(training: MiniGPTTrainingArguments) -> Path:
    """The run folder, empty, absent, or with a run of ours that may go on; with --fresh that run is renamed."""
    run = Path(training.output_dir)
    if run.exists() and not run.is_dir():
        raise ValueError(f"--output_dir {run}: this is a file; name a folder")
    if not training.should_save or not run.is_dir() or not any(run.iterdir()):
        return run
    if not (run / FINGERPRINT).is_file():
        raise ValueError(f"--output_dir {run}: is not empty and holds no run; name another folder")
    if training.fresh:
        print(f"the run that was in {run} is kept as {set_aside(run)}", flush=True)
    return run


def say_that_it_is_finished(run: Path, fingerprint: dict[str, Any]) -> None:
    """A run that is asked for again is not run again; another one does not take its place."""
    if changed := differences(read_json(run / FINGERPRINT), fingerprint):
        raise ValueError(
            f"--output_dir {run}: holds another run, which is finished ({in_words(changed)}); name another folder, or "
            "say --fresh"
        )
    print(f"this run is finished; the model is in {run / 'model'}", flush=True)


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
    changed = differences(read_json((checkpoint or run) / FINGERPRINT), fingerprint)
    if fixed := {name: pair for name, pair in changed.items() if name.startswith("config.") and name not in MAY_CHANGE}:
        raise ValueError(
            f"--output_dir {run}: holds another run, its model is another ({in_words(fixed)}); name another folder, or say "
            "--fresh"
        )
    for name in training.allow_change:
        if name not in fingerprint:
            raise ValueError(f"--allow_change {name}: a run is not known by that; there are {', '.join(fingerprint)}")
    refused = {name: pair for name, pair in changed.items() if name not in training.allow_change}
    if refused:
        raise ValueError(
            f"--output_dir {run}: holds another run, or this one with other settings ({in_words(refused)}); name another "
            f"folder, say --fresh, or let it go on with --allow_change {' '.join(refused)}"
        )
    if changed:
        print(f"changed: {in_words(changed)}", flush=True)
    if checkpoint:
        step = read_json(checkpoint / "trainer_state.json")["global_step"]
        keep_log_until(run / "log.jsonl", step)
        print(f"going on from step {step} ({checkpoint})", flush=True)
    return checkpoint


# What may change about a model that goes on training; the rest is what it is.
MAY_CHANGE = {"config.attention_dropout", "config.embedding_dropout", "config.residual_dropout"}


def fingerprint_of(arguments: Arguments, text: PreparedText, config: PreTrainedConfig) -> dict[str, Any]:
    """Everything that decides which numbers a run computes, by name; a run goes on only where it is the same."""
    data, architecture, training = arguments
    model = config.to_dict()
    shape = {f"config.{name}": model[name] for name in vars(architecture) if name in model}
    names = "learning_rate muon_learning_rate muon_momentum muon optim weight_decay adam_beta1 adam_beta2 adam_epsilon "
    names += "max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps num_train_epochs seed "
    names += "early_stopping_patience label_smoothing_factor bf16 fp16 world_size minutes size"
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
    }


def in_words(changed: dict[str, tuple[Any, Any]]) -> str:
    """{"seed": (1, 2)} -> "seed was 1 and is 2"."""
    return ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())


def keep_log_until(file: Path, step: int) -> None:
    """Drop the rows of steps that were lost: they will be taken again."""
    rows = [row for row in read_log(file) if row["step"] <= step] if file.is_file() else []
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of this package's making."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of `log.jsonl`."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
