"""The story of a training: corpus -> tokenizer -> stream -> model -> trainer -> folder.

In: the three dataclasses of `training.arguments`. Out: a run folder with checkpoints, log and recipe, and in it `model/`,
the folder that is published. It refuses to write into a folder that holds anything but the same run, which then goes on.
"""

import json
import re
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from . import __version__
from .data.blocks import Blocks
from .data.corpus import Corpus, load_corpus
from .data.stream import TokenStream, build_stream
from .data.tokenizer import (
    byte_level_bpe,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from .evaluation import Score, summarize
from .model.configuration_minigpt import MiniGPTConfig
from .model.modeling_minigpt import MiniGPTForCausalLM
from .publish.folder import write_model_folder
from .publish.push import push_folder
from .training.arguments import Arguments, DataArguments, ModelArguments, resolved
from .training.callbacks import SAMPLE_TEMPERATURE, Lines, Samples
from .training.checkpoint import FINGERPRINT
from .training.plan import assumed_power, device_name, duration, show_plan, tokens_per_step
from .training.resume import checkpoint_to_resume, claim_run_folder, fingerprint_of, read_log, say_that_it_is_finished
from .training.stops import Interrupted, StopAtBoundary
from .training.trainer import MiniGPTTrainer


def train(arguments: Arguments) -> Path:
    """Train a GPT from scratch and return its model folder; a run that was interrupted goes on, exactly.

    Raises:
        ValueError: if the text, the configuration or the output folder cannot be used, or settings have changed.
        RunStopped: if the run ended early: by a signal, a full disk, or a loss that is no number.
    """
    data, architecture, training = arguments
    run = claim_run_folder(training)
    set_seed(training.seed)

    corpus = load_corpus(data.data, data.validation_fraction, data.encoding)
    tokenizer = make_tokenizer(corpus, data)
    config = make_config(architecture, data.block_size, tokenizer)
    with training.main_process_first(desc="token streams"):  # the other processes find what the first one made
        stream, validation = make_streams(corpus, tokenizer, data)
    blocks = Blocks(stream, data.block_size, training.seed)
    fingerprint = {**fingerprint_of(arguments, stream, validation, tokenizer, config), "minigpt_hf": __version__}
    if (run / "model").exists():
        say_that_it_is_finished(run, fingerprint)
        return run / "model"
    with training.main_process_first(desc="checkpoint"):
        checkpoint = checkpoint_to_resume(run, fingerprint, training)
    model = make_model(config)

    lines = Lines(run / "log.jsonl", tokens_per_step(training, data.block_size), len(stream) / stream.bytes)
    samples = Samples(tokenizer, training.sample_prompt, training.sample_tokens)
    stop = StopAtBoundary()
    story = partial(describe, arguments, corpus, tokenizer, stream, validation, lines, samples)
    trainer = MiniGPTTrainer(model, training, blocks, validation, tokenizer, [lines, samples, stop], fingerprint, story)
    if trainer.is_world_process_zero():
        trainer.check_room()
        (run / "recipe.yaml").write_text(yaml.safe_dump(resolved(arguments), sort_keys=False), encoding="utf-8")
        (run / FINGERPRINT).write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        show_plan(trainer, corpus, stream)

    with stop.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.number is not None:
        raise Interrupted(stop.number, trainer.state.global_step)
    if trainer.is_world_process_zero():
        about = story(trainer, finished=True)
        write_model_folder(run / "model", trainer.model, tokenizer, about, read_log(run / "log.jsonl"))
        print(f"the model is in {run / 'model'}", flush=True)
        if training.push_to_hub:
            print(*push_folder(run / "model", trainer.hub_model_id, training.hub_revision), flush=True)
    return run / "model"


def make_tokenizer(corpus: Corpus, data: DataArguments) -> PreTrainedTokenizerBase:
    """Learn a tokenizer from the training text, or take an existing one."""
    if data.tokenizer == "bpe":
        return byte_level_bpe(corpus.train, data.vocab_size)
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    if data.tokenizer == "characters":
        # Of the validation text, too: that a character exists gives nothing away, and one without an id would end it all.
        return character_tokenizer(text for part in (corpus.train, corpus.validation) for text in part)
    return load_tokenizer(data.tokenizer)


def make_config(architecture: ModelArguments, block_size: int, tokenizer: PreTrainedTokenizerBase) -> MiniGPTConfig:
    """The architecture, with what follows from block size and tokenizer filled in."""
    settings = dict(vars(architecture))
    rope_theta, longest = settings.pop("rope_theta"), settings.pop("max_position_embeddings")
    if architecture.use_sliding_window:
        # No layer looks further back than training did, so the model can write on past its block. One token more than a
        # block: then no block needs a mask for the window, and attention keeps its fast path.
        settings["sliding_window"] = settings["sliding_window"] or block_size + 1
        longest = longest or 16 * block_size
    config = MiniGPTConfig(
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=longest or block_size,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        **settings,
    )
    if config.max_position_embeddings < block_size:
        raise ValueError(
            f"--max_position_embeddings {config.max_position_embeddings} is less than --block_size {block_size}: "
            "the model could not take its own training blocks"
        )
    tokenizer.model_max_length = config.max_position_embeddings
    return config


def make_streams(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> tuple[TokenStream, TokenStream | None]:
    """Training and validation text as token streams, found again if they were made before."""
    cache = Path(data.cache_dir) if data.cache_dir else Path(datasets.config.HF_CACHE_HOME) / "minigpt"
    with tqdm(
        total=corpus.train.characters, desc="tokenizing", unit=" characters", unit_scale=True, delay=2, leave=False
    ) as bar:
        stream = build_stream(corpus.train, tokenizer, cache, data.num_proc, progress=bar.update)
    if not len(corpus.validation):
        return stream, None
    return stream, build_stream(corpus.validation.head(data.validation_characters), tokenizer, cache, data.num_proc)


def make_model(config: MiniGPTConfig) -> MiniGPTForCausalLM:
    """Fresh weights, and how `generate` samples unless it is told otherwise."""
    model = MiniGPTForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def score_of(trainer: MiniGPTTrainer, validation: TokenStream | None, block_size: int, finished: bool) -> Score | None:
    """The validation score of the weights there are: at the end of the best evaluation, which they were taken from."""
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    if not finished:
        evaluations = [row for row in evaluations if row["step"] == trainer.state.global_step]
    if validation is None or not evaluations:
        return None
    best = (
        min(evaluations, key=lambda row: row["eval_loss"]) if trainer.args.load_best_model_at_end else evaluations[-1]
    )
    tokens = len(validation) - len(validation.documents)
    return summarize(best["eval_loss"] * tokens, tokens, validation.bytes, len(validation.documents), block_size, None)


def describe(
    arguments: Arguments,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    stream: TokenStream,
    validation: TokenStream | None,
    lines: Lines,
    samples: Samples,
    trainer: MiniGPTTrainer,
    finished: bool = False,
) -> dict[str, Any]:
    """Everything that a model folder tells about where it comes from: the content of `minigpt.json`.

    Args:
        finished: Whether training has ended, so that the trainer holds the weights that are published.
    """
    data, _, training = arguments
    step = tokens_per_step(training, data.block_size)
    seconds, power = lines.seconds, assumed_power(training)
    results = score_of(trainer, validation, data.block_size, finished)
    return {
        "name": trainer.hub_model_id or Path(training.output_dir).absolute().name,
        "date": datetime.now(UTC).date().isoformat(),
        "language": data.language,
        "license": data.license,
        "minigpt_version": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": {**resolved(arguments), "data": public(data.data), "tokenizer": public(data.tokenizer)},
        "data": {
            "name": public(corpus.name),
            "dataset": corpus.name if is_on_the_hub(corpus.name) else None,
            "cut": corpus.cut,
            "train": describe_stream(stream),
            "validation": describe_stream(validation) if validation else None,
        },
        "tokenizer": {
            "kind": {"bpe": "byte-level BPE"}.get(data.tokenizer, data.tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "bytes_per_token": stream.bytes / (len(stream) - len(stream.documents)),
            "opening": tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token,
            "fingerprint": tokenizer_fingerprint(tokenizer),
        },
        "training": {
            "parameters": trainer.model.num_parameters(),
            "steps": trainer.state.global_step,
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
            "texts": samples.first_seeds(trainer.model) if finished else [text for text in [samples.latest] if text],
        },
    }


def is_on_the_hub(data: str) -> bool:
    """Whether a text that could be read is the data repository USER/NAME: no file is called that."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", data) is not None and not Path(data).exists()


def public(data: str) -> str:
    """What may be published of where a text lies: a file without the folders above it, all of a URL or a name."""
    return Path(data).absolute().name if Path(data).exists() else data


def describe_stream(stream: TokenStream) -> dict[str, Any]:
    """Counts and fingerprint of a text and its tokens."""
    return {
        "documents": len(stream.documents),
        "characters": stream.characters,
        "bytes": stream.bytes,
        "tokens": len(stream),
        "fingerprint": stream.fingerprint,
    }
