"""Choose the settings that were not given: for a time budget, a number of parameters, or the text alone.

The rules are in `scaling`. Settings given on the command line, as keywords or in a recipe file are never replaced, and every
choice is logged with its reason. The choices for `minutes` depend on the speed of the machine, so a resumed run reads them
from its recipe. The choices for `size: auto` are a function of the text, so all ranks make the same.
"""

import itertools
import logging
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.blocks import SequenceDataset
from ..data.chat_format import ChatFormat
from ..data.corpus import Corpus
from ..data.packing import ConversationDataset
from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..data.tokenizer import vocabulary_size
from ..errors import MiniGPTError
from ..model.modeling_minigpt import MiniGPTForCausalLM
from .arguments import (
    AUTO,
    UNSUPPORTED_WITH,
    DataArguments,
    MiniGPTTrainingArguments,
    ModelArguments,
    Settings,
    is_used,
    log_on_main_process,
)
from .auxiliary_head import add_auxiliary_loss, attach_auxiliary_head
from .initialize import build_config, build_model
from .optimizer import optimizer_factory
from .positional_heads import fitting_positional_heads
from .recipe import read_recipe
from .report import device_name, duration, tokens_per_step, trained_sequences, used_sequences
from .run_folder import RunFolder
from .scaling import (
    MAX_AUTO_PARAMETERS,
    MAX_EFFECTIVE_EPOCHS,
    PARAMETERS_PER_BYTE,
    WIDTHS,
    Shape,
    batch_tokens,
    block_size_for,
    distance_from_optimal,
    dropout,
    finetuning_factor,
    heads_for,
    learning_rates,
    mtp_loss_weight,
    optimal_tokens,
    parse_size,
    positional_heads,
    shape_for,
    size_for_text,
    tokens_for_size,
    vocabulary_for,
    vocabulary_for_text,
    weight_decay,
)
from .sharding import data_parallel_size

MEASURED_SHARE = 0.1  # maximum share of the time budget for measuring speeds
TRAINER_OVERHEAD = 1.03  # time of a Trainer step divided by that of the measured loop
OTHER_SECONDS = 10  # imports before the clock starts; checkpoints, model folder and figures at the end
STREAM_CHARACTERS = 1_000_000_000  # assumed length of a streamed text, whose length is unknown until it has been read
MAX_CHARACTER_LEVEL_TEXT = 4_000_000  # characters; in shorter texts, most word tokens of a BPE would occur too rarely
MIN_RECOMMENDED_TEXT = 100_000  # characters; from shorter texts, a model mainly learns the text itself
MIN_SEQUENCES, MIN_BLOCK_SIZE = 8, 16  # a text needs more than 8 · 16 = 128 tokens, or batches would hardly differ
# Estimates of the characters trained on and scored per minute, before the speed is measured.
CHARACTERS_PER_MINUTE = {"cpu": 2e6, "accelerator": 2e8}
VALIDATION_CHARACTERS_PER_MINUTE = {"cpu": 5e4, "accelerator": 1e6}


class AutoConfigurator:
    """Complete the settings of a run in three steps: `choose_tokenizer`, `choose_block_size` and `choose_remaining`.

    Args:
        settings: The given settings. The attribute `settings` holds the current state.
        run: The run folder; if it contains a run, the choices of that run apply.
        began: `time.perf_counter()` when the command started; the time budget `minutes` starts then.

    Raises:
        MiniGPTError: if a setting that would be chosen was given, or if the speed would have to be measured on several ranks.
    """

    def __init__(self, settings: Settings, run: RunFolder, began: float):
        self.settings, self.began = settings, began
        self.requested_vocab_size = self.data.vocab_size
        self.is_auto = self.training.size == AUTO
        self.tokens_per_second: float | None = None  # speed of the chosen shape, if it was measured
        self.enabled = bool(self.training.minutes or self.training.size)
        self.has_block_size = False
        if not self.enabled:
            return
        for name in () if self.is_auto else Shape(64).settings():
            if name in self.training.given:
                raise MiniGPTError(
                    f"{name} is part of the architecture, which minutes and size determine: omit one of them"
                )
        if self.training.world_size > 1 and not self.is_auto:
            raise MiniGPTError("minutes and size support one process only: give the individual settings instead")
        if run.exists() and not self.training.fresh:
            stored = stored_settings(run)
            if self.training.given_in_command & {"eval_strategy", "save_strategy"}:
                stored.pop("load_best_model_at_end", None)  # follows from the strategies unless it is given
            if self.data.validation_fraction == 0:  # an allowed change; there is nothing to evaluate
                for name in ("eval_strategy", "eval_on_start", "do_eval", "load_best_model_at_end"):
                    stored.pop(name, None)
            names = {name for group in settings for name in vars(group)}
            self._fill_in({name: value for name, value in stored.items() if name in names})
            self._log(f"settings that are not given are read from the recipe of this run, {run.recipe}")
            self.training.check_intervals()
            self.enabled = False
            return
        # Preliminary values, with which the given settings can be validated before the text is read.
        self._fill_in({"block_size": self._limit_to_context(128)})
        if self.is_auto:
            self._fill_in(self._shape(MAX_AUTO_PARAMETERS, vocabulary=2048).settings())

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds of an optimizer step, if they were measured to choose the settings."""
        if self.tokens_per_second is None:
            return None
        return tokens_per_step(self.training, self.data.block_size) / self.tokens_per_second

    @property
    def data(self) -> DataArguments:
        return self.settings.data

    @property
    def architecture(self) -> ModelArguments:
        return self.settings.model

    @property
    def training(self) -> MiniGPTTrainingArguments:
        return self.settings.training

    def choose_tokenizer(self, corpus: Corpus) -> DataArguments:
        """Choose the tokenizer, its vocabulary size and the validation sample, before the text is tokenized."""
        if self.enabled:
            self._choose_tokenizer(corpus)
        return self.data

    def _choose_tokenizer(self, corpus: Corpus) -> None:
        characters = corpus.train.characters or STREAM_CHARACTERS
        if self.is_auto:
            if self.data.tokenizer == "bpe":
                length = f"{characters:,} characters" if corpus.train.characters else "unknown length (streaming)"
                reason = f"320 + 1 per 1,000 characters, at most 2,048; the training text has {length}"
                self._choose(reason, vocab_size=vocabulary_for_text(characters))
            return
        kind = "cpu" if self.training.device.type == "cpu" else "accelerator"
        is_small = characters <= MAX_CHARACTER_LEVEL_TEXT and "vocab_size" not in self.training.given
        distinct = len(set().union(*corpus.train, *(corpus.validation or []))) if is_small else 0
        if is_small and distinct <= 256:
            reason = (
                f"the text has {distinct} distinct characters, and at most {MAX_CHARACTER_LEVEL_TEXT:,} in total; other "
                "characters cannot be encoded, unlike with --tokenizer bpe"
            )
            self._choose(reason, tokenizer="characters")
        else:
            reason = f"the text has more than {MAX_CHARACTER_LEVEL_TEXT:,} characters, or more than 256 distinct ones"
            self._choose("vocab_size is given" if "vocab_size" in self.training.given else reason, tokenizer="bpe")
        if self.training.minutes:
            characters = min(characters, int(self.training.minutes * CHARACTERS_PER_MINUTE[kind]))
            scored = int(min(1e6, max(2e4, self.training.minutes * VALIDATION_CHARACTERS_PER_MINUTE[kind])))
            self._choose(f"for a time budget of {self.training.minutes:g} min", validation_characters=scored)
        self._fill_in({"vocab_size": vocabulary_for(characters)})
        if self.data.tokenizer == "bpe" and "vocab_size" not in self.training.given:
            self._log(f"vocab_size {self.data.vocab_size:,}: about one token per 8,000 characters of training text")
        self.characters = characters

    def choose_block_size(self, train: TokenStream) -> int:
        """Choose the length of a sequence, before the validation sample is taken, which consists of windows of it."""
        if self.enabled and not self.has_block_size:
            self._choose_block_size(train)
            self.has_block_size = True
        return self.data.block_size

    def choose_remaining(self, text: PreparedText) -> Settings:
        """Choose the architecture, batch size, learning rates, steps and regularization.

        Without `minutes` and `size`, only `logging_steps` and `sample_prompt` are adjusted, which do not affect the loss.

        Raises:
            MiniGPTError: if the time budget or the text is too short.
        """
        if self.enabled:
            self.stream, self.validation, self.tokenizer = text.train, text.validation, text.tokenizer
            self.choose_block_size(text.train)  # a prepared text has its sample
            self.vocabulary = vocabulary_size(text.tokenizer)
            if self.is_auto:
                self._choose_for_text(text)
            else:
                self._choose_for_size_or_time()
        if self.data.chat and self.architecture.init_from:
            self._choose_finetuning_rates(text)
        self._adjust_reports(text)
        return self.settings

    def _choose_finetuning_rates(self, text: PreparedText) -> None:
        """Choose the learning rates for conversations from the size of the model."""
        with torch.device("meta"):
            config = build_config(self.architecture, self.data.block_size, text.tokenizer, chat=True)
            parameters = MiniGPTForCausalLM(config).num_parameters()
        if self.architecture.lora_rank:
            self._choose("for LoRA", learning_rate=1e-3)
            return
        factor = finetuning_factor(parameters)
        rates = {"learning_rate": 4e-3, "muon_learning_rate": 2e-2} if self.training.muon else {"learning_rate": 4e-3}
        rates = {name: float(f"{rate * factor:.2g}") for name, rate in rates.items()}
        self._choose(f"for fine-tuning {parameters:,} parameters", **rates)

    def _choose_for_size_or_time(self) -> None:
        excluded = any(is_used(self.training, name) for name in UNSUPPORTED_WITH["mtp_loss_weight"])
        if (weight := mtp_loss_weight(self.vocabulary)) and not excluded:
            self._choose(f"the vocabulary has only {self.vocabulary:,} tokens", mtp_loss_weight=weight)
        if self.training.minutes:
            groups = self.architecture.num_key_value_heads
            shapes = [Shape(width, key_value_heads=groups) for width in WIDTHS if heads_for(width, groups or 1)]
            if not shapes:
                raise MiniGPTError(
                    f"num_key_value_heads is {groups}: none of the candidate widths divides into a number of heads that is a "
                    "multiple of it; choose another number"
                )
            shape, tokens, lines = self._fit(shapes)
            self._log(*lines)
            reason = "of the measured shapes, the one closest to the optimal ratio of tokens to parameters"
        else:
            size = parse_size(str(self.training.size))  # YAML and Python may give a number
            shape = self._shape(size)
            tokens = tokens_for_size(shape.parameters(self.vocabulary))
            reason = f"for {size:,.0f} parameters"
        self._choose_for_shape(shape, tokens, reason)
        if self.training.size:
            self._compare_with(size, shape)

    def _choose_for_text(self, text: PreparedText) -> None:
        stream = text.train
        if "block_size" not in self.training.given and len(stream) <= MIN_SEQUENCES * MIN_BLOCK_SIZE:
            raise MiniGPTError(
                f"{text.name}: the training split has {len(stream):,} tokens ({stream.characters:,} characters), but more "
                f"than {MIN_SEQUENCES * MIN_BLOCK_SIZE} tokens are required, and {MIN_RECOMMENDED_TEXT:,} characters "
                "recommended; provide more text, or give --block_size"
            )
        parameters, tokens = size_for_text(stream.bytes, len(stream))
        reason = (
            f"intended {parameters:,.0f}, {PARAMETERS_PER_BYTE} per byte of training text ({stream.bytes:,} bytes), at most "
            f"{MAX_AUTO_PARAMETERS:,}"
        )
        self._choose_for_shape(self._shape(parameters), tokens, reason)
        if stream.characters < MIN_RECOMMENDED_TEXT:
            self._log(
                f"{text.name}: the training text has only {stream.characters:,} characters; with fewer than "
                f"{MIN_RECOMMENDED_TEXT:,}, expect misspelled words and verbatim repetitions of the text",
                level=logging.WARNING,
            )
        if "max_steps" not in self.training.given:
            self._log(
                "these choices are for training of a few minutes; for longer training, use e.g. --minutes 30 or --size 10m"
            )

    def _choose_for_shape(self, shape: Shape, tokens: float, reason: str) -> None:
        """Choose the settings that depend on a shape and a number of training tokens."""
        training = self.training
        self._fill_in(shape.settings())
        self._log_chosen(shape.settings(), f"{self._parameters():,} parameters, {reason}")
        self._choose(f"for sequences of {self.data.block_size} tokens", rope_theta=float(4 * self.data.block_size))
        self._choose("allows generating texts longer than block_size", use_sliding_window=True)
        architecture = self.architecture
        heads = architecture.num_key_value_heads or architecture.num_attention_heads
        distances = positional_heads(architecture.num_hidden_layers, heads, self.vocabulary)
        distances = fitting_positional_heads(distances, architecture, self.data.block_size)
        reason = (
            "these heads attend to previous tokens from the start" if distances else "too few heads or tokens for any"
        )
        self._choose(reason, positional_heads=distances)
        approximately = ""
        if training.max_steps < 0:  # given, so that `num_train_epochs`, which may be the default, determines the length
            tokens = training.num_train_epochs * len(self.stream)
            approximately = "about "  # the last step of an epoch may be incomplete, or be omitted
        schedule, steps = self._schedule(shape, tokens)
        step = schedule["per_device_train_batch_size"] * self._batches_per_step()
        tokens_per_step = step * self.data.block_size
        # The exact number, after rounding.
        tokens = trained_sequences(training, steps, self._sequences(), step) * self.data.block_size
        at_most = "at most " if tokens < steps * tokens_per_step else ""
        epochs = tokens / len(self.stream)
        batch = {name: schedule.pop(name) for name in ("per_device_train_batch_size", "max_steps")}
        self._fill_in(batch)
        self._log_chosen(
            batch,
            f"{approximately}{steps:,} steps of {at_most}{tokens_per_step:,} tokens = {tokens:,} tokens, "
            f"{tokens / self._parameters():.2f} per parameter, {epochs:.2f} epochs",
        )
        rates = {name: schedule.pop(name) for name in ("learning_rate", "muon_learning_rate")}
        self._choose(f"for width {shape.width}", **rates)
        self._choose(f"for {approximately}{steps:,} steps", **schedule)
        is_repeated = epochs > MAX_EFFECTIVE_EPOCHS
        reason = f"{'more than' if is_repeated else 'at most'} {MAX_EFFECTIVE_EPOCHS} epochs"
        self._choose(reason, residual_dropout=dropout(epochs))
        self._choose(reason, weight_decay=weight_decay(epochs))
        if is_repeated:
            if self.is_auto and self.validation is not None:
                self._choose_evaluations()
            self._log(
                f"small text: {epochs:.1f} epochs; beyond {MAX_EFFECTIVE_EPOCHS} epochs, more text improves the model more "
                "than longer training"
            )

    def _choose_evaluations(self) -> None:
        """Evaluate ten times, so that early stopping with a patience of 5 can take effect."""
        training = self.training
        if training.given & {"eval_steps", "save_steps", "eval_strategy", "save_strategy", "load_best_model_at_end"}:
            return
        reason = "the checkpoint with the lowest validation loss is published; early stopping has a patience of 5 evaluations"
        self._choose(reason, eval_steps=0.1, save_steps=0.1)

    def _compare_with(self, size: float, shape: Shape) -> None:
        """Warn if the number of parameters differs from the requested one by more than 15 %."""
        parameters = self._parameters()
        if abs(parameters / size - 1) <= 0.15:
            return
        embeddings = self.vocabulary * shape.width * (1 if self.architecture.tie_word_embeddings else 2)
        remedies = ["reduce --vocab_size"] if parameters > size and self.data.tokenizer == "bpe" else []
        if self.training.given & {"num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings"}:
            remedies.append("omit settings of the architecture")
        self._log(
            f"size {self.training.size}: the closest model has {parameters:,} parameters, {embeddings:,} of them in the "
            f"embedding of {self.vocabulary:,} tokens at width {shape.width}"
            f"{'; to get closer, ' if remedies else ''}{' or '.join(remedies)}",
            level=logging.WARNING,
        )

    def _adjust_reports(self, text: PreparedText) -> None:
        """Adjust the reports of a run to its length and text; this does not affect the loss."""
        data, training = self.data, self.training
        given, steps = training.given_in_command, self._planned_steps(text)
        if 1 <= steps < training.logging_steps and training.logging_strategy == "steps":
            if "logging_steps" in given:
                self._log(
                    f"logging_steps {training.logging_steps:g}: there are only {steps:,} steps, so no training loss is logged"
                )
            else:
                adjusted = max(1, steps // 10)
                self._log(
                    f"logging_steps {adjusted}: {training.logging_steps:g} exceeds the number of steps, {steps:,}"
                )
                self.settings = self.settings.replace(logging_steps=adjusted)
        if 1 <= steps <= training.warmup_steps:
            self._log(
                f"warmup_steps {training.warmup_steps:g}: there are only {steps:,} steps, so the learning rate does not "
                "reach its peak",
                level=logging.WARNING,
            )
        if training.eval_strategy == "steps" and 1 <= steps < training.eval_delay:
            self._log(
                f"eval_delay {training.eval_delay:g}: there are only {steps:,} steps, so the model is not evaluated",
                level=logging.WARNING,
            )
        self.report_vocabulary(text)
        if training.sample_prompt is None and not data.chat:
            self.settings = self.settings.replace(sample_prompt=first_words(text))
            if self.training.sample_prompt:
                self._log(f"sample_prompt {self.training.sample_prompt!r}: the first words of the text")
            else:
                self._log("sample_prompt is empty, so samples start a document: the text does not start with words")

    def report_vocabulary(self, text: PreparedText) -> None:
        """Log if the vocabulary does not have the requested size."""
        vocabulary = vocabulary_size(text.tokenizer)
        if text.kind == "bpe" and vocabulary < self.data.vocab_size:
            self._log(f"vocab_size {vocabulary:,}: the text is too short for {self.data.vocab_size:,} tokens")
            return
        given = self.training.given_in_command
        is_written = "vocab_size" in (given if "tokenizer" in given else self.training.written)
        if is_written and vocabulary != self.requested_vocab_size:
            self._log(
                f"vocab_size {self.requested_vocab_size:,}: no effect, tokenizer {text.kind} has {vocabulary:,} tokens"
            )

    def _planned_steps(self, text: PreparedText) -> int:
        training, block_size = self.training, self.data.block_size
        if training.max_steps > 0:
            return training.max_steps
        sequences = len(text.train) // block_size
        if self.data.chat:
            sequences = len(ConversationDataset(text.train, ChatFormat(text.tokenizer), block_size, training.seed))
        batches = -(-sequences // (training.train_batch_size * data_parallel_size(training)))
        return math.ceil(-(-batches // training.gradient_accumulation_steps) * training.num_train_epochs)

    def _shape(self, parameters: float, vocabulary: int | None = None) -> Shape:
        """Choose a shape with this number of parameters, with the given settings of the architecture."""
        names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
        names["key_value_heads"] = "num_key_value_heads"
        given = {argument: vars(self.architecture)[name] for argument, name in names.items()}
        # Values below 1 are rejected later, by `build_config`.
        given = {
            argument: value
            for argument, value in given.items()
            if names[argument] in self.training.given and value is not None and value >= 1
        }
        copies = 1 if self.architecture.tie_word_embeddings else 2
        return shape_for(parameters, copies * (self.vocabulary if vocabulary is None else vocabulary), **given)

    def _parameters(self) -> int:
        """Number of parameters of the current architecture."""
        with torch.random.fork_rng([]), torch.device("meta"):
            return self._build(self.architecture).num_parameters()

    def _build(self, architecture: ModelArguments) -> PreTrainedModel:
        return build_model(build_config(architecture, self.data.block_size, self.tokenizer), architecture)

    def _choose_block_size(self, stream: TokenStream) -> None:
        if self.is_auto:
            block_size, reason = 128, f"the training text has {len(stream):,} tokens"
            while block_size > MIN_BLOCK_SIZE and len(stream) < 16 * block_size:
                block_size //= 2
        else:
            # `choose_tokenizer` is not called for a prepared text, which has its own tokenizer.
            characters = getattr(self, "characters", stream.characters)
            block_size, reason = block_size_for(characters), f"for a text of {characters:,.0f} characters"
        self._choose(reason, block_size=self._limit_to_context(block_size))

    def _limit_to_context(self, block_size: int) -> int:
        return min(block_size, self.architecture.max_position_embeddings or block_size)

    def _sequences(self) -> int:
        """Sequences of an epoch."""
        return max(1, len(self.stream) // self.data.block_size)

    def _batches_per_step(self) -> int:
        """Batches of `per_device_train_batch_size` sequences per optimizer step."""
        return self.training.gradient_accumulation_steps * data_parallel_size(self.training)

    def _choose(self, reason: str, **values: Any) -> None:
        """Set those of the values that are not given, and log them with the reason."""
        self._fill_in(values)
        self._log_chosen(values, reason)

    def _log_chosen(self, values: dict[str, Any], reason: str) -> None:
        chosen = ", ".join(f"{name} {value}" for name, value in values.items() if name not in self.training.given)
        if chosen:
            self._log(f"{chosen}: {reason}")

    def _log(self, *lines: str, level: int = logging.INFO) -> None:
        for line in lines:
            log_on_main_process(self.training, line, level)

    def _fit(self, shapes: list[Shape]) -> tuple[Shape, float, list[str]]:
        """Choose the shape and the number of training tokens for the time budget.

        Alternates between measuring the speed of a shape and predicting the best shape from it, until the predicted shape
        has been measured.

        Returns:
            The shape, the number of tokens, and lines to log.
        """
        budget = self._budget()
        started = time.perf_counter()
        allowed = MEASURED_SHARE * budget
        before = started - self.began
        self._training_seconds(allowed + OTHER_SECONDS)
        measured: dict[Shape, tuple[float, float]] = {}
        shape = min(shapes, key=lambda shape: abs(shape.width - 128))
        while shape not in measured:
            # Each measurement takes half of the remaining time for measurements.
            until = started + allowed * (1 - 0.5 ** (len(measured) + 1))
            speed, evaluation = measured[shape] = self._measure(shape, until)
            compute = (
                speed * (budget - before - allowed - evaluation - OTHER_SECONDS) * shape.parameters(self.vocabulary)
            )
            is_last = len(measured) == 4 or time.perf_counter() > started + 0.9 * allowed
            candidates = list(measured) if is_last else shapes
            shape = min(candidates, key=lambda shape: distance_from_optimal(shape, self.vocabulary, compute))
        speed, evaluation = measured[shape]
        self.tokens_per_second = speed
        seconds = self._training_seconds(evaluation + OTHER_SECONDS)
        measuring = time.perf_counter() - started
        speeds = ", ".join(f"{speed:,.0f} at width {shape.width}" for shape, (speed, _) in measured.items())
        return (
            shape,
            seconds * speed,
            [
                f"time budget   {self.training.minutes:g} min on {device_name(self.training)}: {before:.0f} s preparing the "
                f"text, {measuring:.0f} s measuring, {seconds:.0f} s training, {evaluation + OTHER_SECONDS:.0f} s other",
                f"measured      tokens/s: {speeds}",
            ],
        )

    def _budget(self) -> float:
        """The time budget in seconds."""
        assert self.training.minutes is not None
        return 60 * self.training.minutes

    def _training_seconds(self, other: float) -> float:
        """Seconds left for training steps if everything else takes `other` seconds.

        Raises:
            MiniGPTError: if this is less than a quarter of the time budget.
        """
        budget, passed = self._budget(), time.perf_counter() - self.began
        if (left := budget - passed - other) < budget / 4:
            raise MiniGPTError(
                f"minutes {self.training.minutes:g}: {duration(passed)} have passed and {duration(other)} are required for "
                "measurements, evaluations, samples and checkpoints, so too little time is left for training; increase "
                "--minutes, or provide less text"
            )
        return left

    def _measure(self, shape: Shape, until: float) -> tuple[float, float]:
        """Measure training speed in tokens/s, and estimate the seconds of all evaluations and samples of the run."""
        training, weight = self.training, self.training.mtp_loss_weight
        with torch.random.fork_rng([training.device] if training.device.type == "cuda" else []):
            model = self._build(ModelArguments(**vars(self.architecture) | self._architecture(shape)))
            if weight:
                attach_auxiliary_head(model)
            model.to(training.device)
        settings, _ = self._schedule(shape, optimal_tokens(shape.parameters(self.vocabulary)))
        dataset = SequenceDataset(self.stream, self.data.block_size, training.seed)
        rows = settings["per_device_train_batch_size"]
        batch = dataset.collate([dataset[0, i % len(dataset)] for i in range(rows)])
        batch = {name: tensor.to(training.device) for name, tensor in batch.items()}
        ids = batch["input_ids"]
        factory, rates = optimizer_factory(training)
        optimizer = factory()(model, **rates)

        def train() -> None:
            with torch.autocast(training.device.type, dtype=torch.bfloat16, enabled=bool(training.bf16)):
                outputs = model(**batch, use_cache=False, output_hidden_states=bool(weight))
                loss = outputs.loss
                if weight:
                    states, labels = outputs.hidden_states[-1], batch["shift_labels"]
                    loss = add_auxiliary_loss(loss, model, states, labels, weight, 1 / labels.numel())
            loss.backward()
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device

        def evaluate() -> None:
            with torch.no_grad():
                model(ids, use_cache=False).logits.sum().item()

        def generate() -> None:
            model.eval().generate(ids[:1, :1], max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True)
            model.train()

        means: dict[Callable[[], None], float] = {}
        for function, times in ((evaluate, 2), (generate, 2), (train, 3)):
            seconds: list[float] = []
            while len(seconds) < times or (function is train and time.perf_counter() < until):
                began = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - began)
            # Without the first call, which allocates memory. The mean, because slowdowns will also occur during training.
            means[function] = statistics.mean(seconds[1:])
        evaluations = 0 if self.validation is None or not training.eval_steps else 1 / training.eval_steps
        batches = 0 if self.validation is None else len(self.validation) / ids.numel()
        generations = (evaluations + 1) * training.sample_tokens / 8
        other = evaluations * batches * means[evaluate] + generations * means[generate]
        return ids.numel() / (means[train] * TRAINER_OVERHEAD), other

    def _architecture(self, shape: Shape) -> dict[str, Any]:
        return {**shape.settings(), "use_sliding_window": True}

    def _schedule(self, shape: Shape, tokens: float) -> tuple[dict[str, Any], int]:
        """Return batch size, steps and learning rates as training arguments, and the number of steps."""
        training, block_size = self.training, self.data.block_size
        rows = max(1, round(batch_tokens(tokens) / (block_size * self._batches_per_step())))
        if not self.is_auto and training.device.type != "cpu":
            rows = max(rows, 16384 // block_size)  # assumed to be necessary to utilize an accelerator; not measured
        sequences = self._sequences()
        rows = max(1, min(rows, sequences // (2 * self._batches_per_step())))  # at least 2 steps per epoch
        if "per_device_train_batch_size" in training.given:
            rows = training.per_device_train_batch_size
        step = rows * self._batches_per_step()
        used = used_sequences(training, sequences, step)
        epochs, remaining = divmod(tokens / block_size, used)
        if training.minutes:  # an incomplete step may take as long as a complete one
            epochs, remaining = 0, tokens / block_size
        steps = max(1, int(epochs) * math.ceil(used / step) + int(remaining / step))  # not more epochs than intended
        if "max_steps" in training.given and training.max_steps > 0:
            steps = training.max_steps
        return {
            "per_device_train_batch_size": rows,
            "max_steps": steps,
            "warmup_steps": max(1, min(20, steps // 10)),
            "logging_steps": max(1, steps // 40),
            **learning_rates(shape.width),
        }, steps

    def _fill_in(self, chosen: dict[str, Any]) -> None:
        """Set the chosen values, except those of given settings."""
        if new := {name: value for name, value in chosen.items() if name not in self.training.given}:
            self.settings = self.settings.replace(**new)


def stored_settings(run: RunFolder) -> dict[str, Any]:
    """Read the resolved settings of a run from its recipe.

    Raises:
        MiniGPTError: if the recipe is missing, empty or damaged.
    """
    try:
        return read_recipe(str(run.recipe))
    except ValueError as error:
        raise MiniGPTError(
            f"{error}; the run cannot be resumed without it: restore the file, or use another --output_dir or --fresh"
        ) from error


def first_words(text: PreparedText) -> str:
    """Return the first three words of the first line of the training text that has any, at most 40 characters.

    Words of different documents are not joined.
    """
    ids = text.train.tokens[:200]
    starts = text.train.documents[:200]
    documents = (part.tolist() for part in np.split(ids, starts[starts < len(ids)]))
    beginnings = (text.tokenizer.decode(document, skip_special_tokens=True) for document in documents)
    lines = (line.strip() for beginning in beginnings for line in beginning.splitlines())
    line = next((line for line in lines if any(map(str.isalnum, line))), "")
    words = re.match(r"\S+(?:[ \t]+\S+){0,2}", line)
    prompt = words[0][:40] if words else ""
    # Stop at a character that is incomplete after 200 tokens, and at terminal control characters.
    return "".join(itertools.takewhile(lambda c: c.isprintable() and c != "\N{REPLACEMENT CHARACTER}", prompt)).rstrip()
