"""What is known of a run -> the content of `minigpt.json`: recipe, text, tokenizer, training, results, samples.

In: the arguments, the text, the trainer and what it has shown. Out: a dictionary, at any moment of a training. It refuses to
tell where on this machine a text lies.
"""

import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from ..data.corpus import public_name
from ..data.prepared import PreparedText
from ..data.sources import names_hub_dataset
from ..data.stream import TokenStream
from ..data.tokenizer import tokenizer_fingerprint, vocabulary_size
from ..inference.evaluation import Score, summarize
from .arguments import Arguments
from .callbacks import SAMPLE_TEMPERATURE, Lines, Samples
from .plan import assumed_power, device_name, duration, tokens_per_step
from .recipe import resolved
from .trainer import MiniGPTTrainer

WHERE = ("data", "tokenizer", "init_from")  # settings that may name a place on this machine


def describe(
    arguments: Arguments,
    text: PreparedText,
    lines: Lines,
    samples: Samples,
    trainer: MiniGPTTrainer,
    finished: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Everything that a model folder tells about where it comes from.

    Args:
        finished: The model that is published, if training has ended.
    """
    data, _, training = arguments
    step = tokens_per_step(training, data.block_size)
    seconds, power = lines.seconds, assumed_power(training)
    results = score_of(trainer, text.validation, data.block_size, finished is not None)
    latest = [samples.latest] if samples.latest else []
    return {
        "name": trainer.hub_model_id or Path(training.output_dir).absolute().name,
        "date": datetime.now(UTC).date().isoformat(),
        "language": data.language,
        "license": data.license,
        "minigpt_version": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": {name: public_name(value) if name in WHERE else value for name, value in resolved(arguments).items()},
        "data": {
            "name": public_name(text.name),
            "dataset": text.name.partition(":")[0] if names_hub_dataset(text.name) else None,
            "cut": text.split_description,
            "train": describe_stream(text.train),
            "validation": describe_validation(text) if text.validation else None,
        },
        "tokenizer": {
            "kind": {"bpe": "byte-level BPE"}.get(text.kind, public_name(text.kind)),
            "vocab_size": vocabulary_size(text.tokenizer),
            "bytes_per_token": text.train.bytes / (len(text.train) - len(text.train.documents)),
            "opening": text.tokenizer.eos_token if text.tokenizer.bos_token is None else text.tokenizer.bos_token,
            "fingerprint": tokenizer_fingerprint(text.tokenizer),
            "lossy": text.lossy,
        },
        "training": {
            "parameters": (finished or trainer.model).num_parameters(),
            "steps": trainer.state.global_step,
            "skipped_steps": trainer.skipped_steps,
            "planned_steps": trainer.state.max_steps,
            "tokens_per_step": step,
            "tokens": trainer.state.global_step * step,
            "seconds": round(seconds, 1),
            "time": duration(seconds),
            "device": device_name(training),
            "power": power,
            "energy_wh": seconds * power["devices"] * power["watts"] / 3600,
        },
        "results": results.to_dict() if results else {},
        "sample": {
            "prompt": samples.prompt,
            "temperature": SAMPLE_TEMPERATURE,
            "tokens": samples.tokens,
            "texts": samples.first_seeds(finished) if finished else latest,
        },
    }


def score_of(trainer: MiniGPTTrainer, validation: TokenStream | None, block_size: int, finished: bool) -> Score | None:
    """The validation score of the weights there are: at the end of the best evaluation, which they were taken from."""
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    if not finished:
        evaluations = [row for row in evaluations if row["step"] == trainer.state.global_step]
    if validation is None or not evaluations:
        return None
    best = evaluations[-1]
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        best = next((row for row in evaluations if row["step"] == trainer.state.best_global_step), best)
    if not math.isfinite(best["eval_loss"]):
        return None
    tokens = len(validation) - len(validation.documents)
    return summarize(best["eval_loss"], tokens, validation.bytes, len(validation.documents), block_size, None)


def describe_validation(text: PreparedText) -> dict[str, Any]:
    """Counts and fingerprint of the text that is scored, and how much of the validation text it is."""
    return {
        **describe_stream(text.validation),
        "documents": text.scored.documents,
        "excerpts": len(text.validation.documents),
        "of_documents": text.scored.of_documents,
        "of_characters": text.scored.of_characters,
        "window_characters": text.scored.window,
        "scored": str(text.scored),
    }


def describe_stream(stream: TokenStream) -> dict[str, Any]:
    """Counts and fingerprint of a text and its tokens."""
    return {
        "documents": len(stream.documents),
        "characters": stream.characters,
        "bytes": stream.bytes,
        "tokens": len(stream),
        "fingerprint": stream.fingerprint,
    }
