"""Chooses settings that were not given: for a training time, a number of parameters, or the text alone.

The rules are those of `scaling`. What was given on the command line, as a keyword or in a recipe file is never replaced, and
every choice is logged with its reason. What `--minutes` measures depends on the machine, so a resumed run reads the choices
from its recipe; what `size: auto` chooses is a function of the text, and therefore the same on every rank.
"""

import itertools
import logging
import math
import re
import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.blocks import SequenceDataset
from ..data.corpus import Corpus
from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..data.tokenizer import vocabulary_size
from ..errors import MiniGPTError
from .arguments import AUTO, DataArguments, MiniGPTTrainingArguments, ModelArguments, Settings, log_once
from .initialize import build_config, build_model
from .optimizer import optimizer_factory
from .recipe import read_recipe
from .report import device_name, duration, tokens_per_step
from .run_folder import RunFolder
from .scaling import (
    LARGEST_UNASKED,
    MAX_EFFECTIVE_EPOCHS,
    PARAMETERS_PER_BYTE,
    TOKENS_PER_PARAMETER,
    WIDTHS,
    Shape,
    block_size_for,
    distance_from_optimal,
    dropout,
    heads_for,
    learning_rates,
    number_of,
    shape_for,
    size_for_text,
    tokens_in_a_step,
    vocabulary_for,
    vocabulary_for_text,
    weight_decay,
)

MEASURED_SHARE = 0.1  # of the time asked, at most
TRAINER_OVERHEAD = 1.03  # of the Trainer over the loop that is measured here
OTHER_SECONDS = 10  # imports before the clock starts; checkpoints, the model folder and its figures at the end
STREAMED_TEXT = 1_000_000_000  # characters: what is taken of a stream is known when it has been taken
SMALL_TEXT = 4_000_000  # characters: below, a BPE with room for whole words would see too little of each
LITTLE_TEXT = 100_000  # characters: below, a model learns little but the text itself
# A text of so few tokens gives no two batches that differ.
FEWEST_BLOCKS, SHORTEST_BLOCK = 8, 16
# Characters that one minute reads, and that can be validated in it, before the machine is measured.
READ_A_MINUTE = {"cpu": 2e6, "accelerator": 2e8}
VALIDATED_A_MINUTE = {"cpu": 5e4, "accelerator": 1e6}


class AutoConfigurator:
    """Completes the settings of a run; `settings` is what is known so far.

    Args:
        settings: As given.
        run: The run folder; if it holds a run, the choices of that run apply.
        began: `time.perf_counter()` when the command started: `--minutes` includes the time since then.

    Raises:
        MiniGPTError: if a setting that it would choose was given, or there are several processes.
    """

    def __init__(self, settings: Settings, run: RunFolder, began: float):
        self.settings, self.began = settings, began
        self.asked_vocabulary = self.data.vocab_size
        self.by_text = self.training.size == AUTO
        self.tokens_per_second: float | None = None  # of the chosen shape, if it was measured
        self.enabled = bool(self.training.minutes or self.training.size)
        if not self.enabled:
            return
        for name in () if self.by_text else Shape(64).settings():
            if name in self.training.given:
                raise MiniGPTError(
                    f"--{name} is part of the shape, which --minutes and --size choose: leave out one of them"
                )
        if self.training.world_size > 1 and not self.by_text:
            raise MiniGPTError("--minutes and --size measure one process: name the settings themselves for several")
        if run.exists() and not self.training.fresh:
            stored = settings_of(run)
            names = {name for group in settings for name in vars(group)}
            self._fill_in({name: value for name, value in stored.items() if name in names})
            self._say(f"settings that are not given are those that this run was started with: {run.recipe}")
            self.training.check_intervals()
            self.enabled = False
            return
        # Until the text is known: what is given can be validated together with these.
        self._fill_in({"block_size": self._at_most_the_context(128)})
        if self.by_text:
            self._fill_in(self._shape(LARGEST_UNASKED, vocabulary=2048).settings())

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
        """Choose tokenizer, vocabulary and validation sample, before anything is tokenized or measured."""
        if self.enabled:
            self._choose_tokenizer(corpus)
        return self.data

    def _choose_tokenizer(self, corpus: Corpus) -> None:
        characters = corpus.train.characters or STREAMED_TEXT
        if self.by_text:
            if self.data.tokenizer == "bpe":
                length = f"{characters:,} characters" if corpus.train.characters else "a stream"
                why = f"320, and one more for each 1,000 characters, at most 2,048; the training text is {length}"
                self._choose(why, vocab_size=vocabulary_for_text(characters))
            return
        kind = "cpu" if self.training.device.type == "cpu" else "accelerator"
        is_small = characters <= SMALL_TEXT and "vocab_size" not in self.training.given
        different = len(set().union(*corpus.train, *(corpus.validation or []))) if is_small else 0
        if is_small and different <= 256:
            why = (
                f"the text is at most {SMALL_TEXT:,} characters long and has {different} different ones; the model will "
                "refuse any other character, --tokenizer bpe none"
            )
            self._choose(why, tokenizer="characters")
        else:
            long = f"the text is longer than {SMALL_TEXT:,} characters, or has more than 256 different ones"
            self._choose("vocab_size is given" if "vocab_size" in self.training.given else long, tokenizer="bpe")
        if self.training.minutes:
            characters = min(characters, self.training.minutes * READ_A_MINUTE[kind])
            validated = int(min(1e6, max(2e4, self.training.minutes * VALIDATED_A_MINUTE[kind])))
            self._choose("as much as the time allows", validation_characters=validated)
        self._fill_in({"vocab_size": vocabulary_for(characters)})
        if self.data.tokenizer == "bpe" and "vocab_size" not in self.training.given:
            self._say(f"vocab_size {self.data.vocab_size:,}: about one token for each 8,000 characters that are read")
        self.characters = characters

    def choose_remaining(self, text: PreparedText) -> Settings:
        """Choose shape, batch size, learning rates, steps and regularization.

        Without `--minutes` and `--size` only `logging_steps` and `sample_prompt`, which change no loss, are fitted.

        Raises:
            MiniGPTError: if the time asked is too short, or the text.
        """
        if self.enabled:
            self.stream, self.validation, self.tokenizer = text.train, text.validation, text.tokenizer
            self.vocabulary = vocabulary_size(text.tokenizer)
            if self.by_text:
                self._choose_for_the_text(text)
            else:
                self._choose_for_size_or_time()
        self._fit_reports(text)
        return self.settings

    def _choose_for_size_or_time(self) -> None:
        characters = getattr(self, "characters", self.stream.characters)  # a prepared text brings its own tokenizer
        self._choose_block(block_size_for(characters), f"for a text of {characters:,.0f} characters")
        if self.training.minutes:
            groups = self.architecture.num_key_value_heads
            shapes = [Shape(width, key_value_heads=groups) for width in WIDTHS if heads_for(width, groups or 1)]
            if not shapes:
                raise MiniGPTError(
                    f"num_key_value_heads is {groups}: none of the widths that --minutes chooses among divides into a "
                    "multiple of it; give another number"
                )
            shape, tokens, lines = self._fit(shapes)
            self._say(*lines)
            why = "of the shapes measured the one that comes nearest to the tokens for each parameter that are best"
        else:
            size = number_of(str(self.training.size))  # YAML and Python may give a number
            shape = self._shape(size)
            tokens = TOKENS_PER_PARAMETER * shape.parameters(self.vocabulary)
            why = f"for {size:,.0f} parameters"
        self._choose_for(shape, tokens, why)
        if self.training.size:
            self._compare_with(size, shape)

    def _choose_for_the_text(self, text: PreparedText) -> None:
        stream = text.train
        block_size = 128
        while block_size > SHORTEST_BLOCK and len(stream) < 16 * block_size:
            block_size //= 2
        if len(stream) <= FEWEST_BLOCKS * SHORTEST_BLOCK:
            raise MiniGPTError(
                f"{text.name}: the training part has {stream.characters:,} characters, which are {len(stream):,} tokens: "
                f"more than {FEWEST_BLOCKS * SHORTEST_BLOCK} are needed to train on, and some 100,000 characters to learn "
                "from; give more text"
            )
        self._choose_block(block_size, f"the training text has {len(stream):,} tokens")
        parameters, tokens = size_for_text(stream.bytes, len(stream))
        why = (
            f"for {PARAMETERS_PER_BYTE} parameters for each of the {stream.bytes:,} bytes of training text, at most about "
            f"{LARGEST_UNASKED:,}"
        )
        self._choose_for(self._shape(parameters), tokens, why)
        if stream.characters < LITTLE_TEXT:
            self._warn(
                f"{text.name}: {stream.characters:,} characters of training text are little; a model learns to spell from "
                f"some {LITTLE_TEXT:,}, and repeats a shorter text rather than continuing it"
            )
        if "max_steps" not in self.training.given:
            self._say(
                "this is for a training of minutes; --minutes 30 or --size 10m choose for a longer one, see "
                "`minigpt recipes`"
            )

    def _choose_for(self, shape: Shape, tokens: float, why: str) -> None:
        """Choose everything that follows from a shape and a number of training tokens."""
        training = self.training
        self._fill_in(shape.settings())
        self._say_chosen(shape.settings(), f"{self._parameters():,} parameters, {why}")
        self._choose("the model can write past its block, as no layer looks further back", use_sliding_window=True)
        if "num_train_epochs" in training.given and training.max_steps < 0:
            tokens = training.num_train_epochs * len(self.stream)
        schedule, steps = self._schedule(shape, tokens)
        step = schedule["per_device_train_batch_size"] * self._rows_beside() * self.data.block_size
        tokens = steps * step  # what will really be learnt from
        readings = tokens / len(self.stream)
        batch = {name: schedule.pop(name) for name in ("per_device_train_batch_size", "max_steps")}
        self._fill_in(batch)
        self._say_chosen(
            batch,
            f"{steps:,} steps of {step:,} tokens = {tokens:,} tokens, {tokens / self._parameters():.2f} for each parameter; "
            f"the text is read {readings:.2f} times",
        )
        rates = {name: schedule.pop(name) for name in ("learning_rate", "muon_learning_rate")}
        self._choose(f"for width {shape.width}", **rates)
        self._choose(f"for {steps:,} steps", **schedule)
        is_small = readings > MAX_EFFECTIVE_EPOCHS
        why = f"the text is read {'more' if is_small else 'at most'} {'than ' * is_small}{MAX_EFFECTIVE_EPOCHS} times"
        self._choose(why, residual_dropout=dropout(readings))
        self._choose(why, weight_decay=weight_decay(readings))
        if is_small:
            if self.by_text and self.validation is not None:
                self._choose_evaluations()
            self._say(
                f"small text: it is read {readings:.1f} times, and readings beyond {MAX_EFFECTIVE_EPOCHS} teach less: "
                "more text would help more than more time"
            )

    def _choose_evaluations(self) -> None:
        """Evaluate ten times, so that early stopping with a patience of five can act."""
        training = self.training
        if training.given & {"eval_steps", "save_steps", "eval_strategy", "save_strategy", "load_best_model_at_end"}:
            return
        why = "the best checkpoint by validation loss is published, and 5 evaluations without a better one end the training"
        self._choose(why, eval_steps=0.1, save_steps=0.1)

    def _compare_with(self, size: float, shape: Shape) -> None:
        """Warn if the number of parameters differs by more than 15 % from the one that was asked for, with the reason."""
        parameters = self._parameters()
        if abs(parameters / size - 1) <= 0.15:
            return
        embeddings = self.vocabulary * shape.width * (1 if self.architecture.tie_word_embeddings else 2)
        self._warn(
            f"--size {self.training.size}: the nearest model has {parameters:,} parameters, {embeddings:,} of them the "
            f"embedding of {self.vocabulary:,} tokens at width {shape.width}; a smaller --vocab_size, or settings of the "
            "architecture that are not given, bring it nearer"
        )

    def _fit_reports(self, text: PreparedText) -> None:
        """Fit what a run reports to its text and length; nothing here changes a loss."""
        data, training = self.data, self.training
        given, steps = training.given_in_command, self._planned_steps(text.train)
        if 1 <= steps < training.logging_steps and training.logging_strategy == "steps":
            if "logging_steps" in given:
                self._say(f"logging_steps {training.logging_steps:g}: no training loss is shown in {steps:,} steps")
            else:
                fitted = max(1, steps // 10)
                self._say(f"logging_steps {fitted}: {training.logging_steps:g} would be more than the {steps:,} steps")
                self.settings = self.settings.replace(logging_steps=fitted)
        if 1 <= steps <= training.warmup_steps:
            self._warn(
                f"warmup_steps {training.warmup_steps:g}: there are {steps:,} steps, so the learning rate does not reach "
                "its peak"
            )
        vocabulary = vocabulary_size(text.tokenizer)
        if text.kind == "bpe" and vocabulary < data.vocab_size:
            self._say(
                f"vocab_size {vocabulary:,}: the text does not give the {data.vocab_size:,} tokens that were asked for"
            )
        elif "vocab_size" in given and vocabulary != self.asked_vocabulary:
            self._say(
                f"vocab_size {self.asked_vocabulary:,}: not used, tokenizer {text.kind} has {vocabulary:,} tokens"
            )
        if training.sample_prompt is None:
            self.settings = self.settings.replace(sample_prompt=first_words(text))
            if self.training.sample_prompt:
                self._say(f"sample_prompt {self.training.sample_prompt!r}: the first words of the text")
            else:
                self._say("sample_prompt is empty, so samples begin a document: the text does not begin with words")

    def _planned_steps(self, stream: TokenStream) -> int:
        training = self.training
        if training.max_steps > 0:
            return training.max_steps
        blocks = len(stream) // self.data.block_size
        batches = -(-blocks // (training.train_batch_size * training.world_size))
        return math.ceil(-(-batches // training.gradient_accumulation_steps) * training.num_train_epochs)

    def _shape(self, parameters: float, vocabulary: int | None = None) -> Shape:
        """The shape for a number of parameters, with what is given of it."""
        names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
        names["key_value_heads"] = "num_key_value_heads"
        given = {argument: vars(self.architecture)[name] for argument, name in names.items()}
        # What is not positive is refused with the whole architecture.
        given = {
            argument: value
            for argument, value in given.items()
            if names[argument] in self.training.given and value is not None and value >= 1
        }
        copies = 1 if self.architecture.tie_word_embeddings else 2
        return shape_for(parameters, copies * (self.vocabulary if vocabulary is None else vocabulary), **given)

    def _parameters(self) -> int:
        """Of the architecture as it is now."""
        with torch.random.fork_rng([]), torch.device("meta"):
            return self._build(self.architecture).num_parameters()

    def _build(self, architecture: ModelArguments) -> PreTrainedModel:
        return build_model(build_config(architecture, self.data.block_size, self.tokenizer), architecture)

    def _choose_block(self, block_size: int, why: str) -> None:
        self._choose(why, block_size=self._at_most_the_context(block_size))

    def _at_most_the_context(self, block_size: int) -> int:
        return min(block_size, self.architecture.max_position_embeddings or block_size)

    def _rows_beside(self) -> int:
        """Batches of `per_device_train_batch_size` in an optimizer step."""
        return self.training.gradient_accumulation_steps * self.training.world_size

    def _choose(self, why: str, **values: Any) -> None:
        """Set what is not given, and log it with the reason."""
        self._fill_in(values)
        self._say_chosen(values, why)

    def _say_chosen(self, values: dict[str, Any], why: str) -> None:
        chosen = ", ".join(f"{name} {value}" for name, value in values.items() if name not in self.training.given)
        if chosen:
            self._say(f"{chosen}: {why}")

    def _warn(self, line: str) -> None:
        log_once(self.training, line, logging.WARNING)

    def _say(self, *lines: str) -> None:
        for line in lines:
            log_once(self.training, line)

    def _fit(self, shapes: list[Shape]) -> tuple[Shape, float, list[str]]:
        """The best shape and number of tokens for the time: measure one, predict the best one, measure that, and so on."""
        asked = 60 * self.training.minutes
        started = time.perf_counter()
        allowed = MEASURED_SHARE * asked
        before = started - self.began
        self._left(allowed + OTHER_SECONDS)
        measured: dict[Shape, tuple[float, float]] = {}
        shape = min(shapes, key=lambda shape: abs(shape.width - 128))
        while shape not in measured:
            # Each shape gets half of the time that is left for measuring.
            until = started + allowed * (1 - 0.5 ** (len(measured) + 1))
            speed, beside = measured[shape] = self._measure(shape, until)
            compute = speed * (asked - before - allowed - beside - OTHER_SECONDS) * shape.parameters(self.vocabulary)
            is_over = len(measured) == 4 or time.perf_counter() > started + 0.9 * allowed
            among = list(measured) if is_over else shapes
            shape = min(among, key=lambda shape: distance_from_optimal(shape, self.vocabulary, compute))
        speed, beside = measured[shape]
        self.tokens_per_second = speed
        seconds = self._left(beside + OTHER_SECONDS)
        measuring = time.perf_counter() - started
        speeds = ", ".join(f"{speed:,.0f} at width {shape.width}" for shape, (speed, _) in measured.items())
        return (
            shape,
            seconds * speed,
            [
                f"asked         {self.training.minutes:g} min on {device_name(self.training)}: {before:.0f} s for the text, "
                f"{measuring:.0f} s of measuring, {seconds:.0f} s to learn, {beside + OTHER_SECONDS:.0f} s for the rest",
                f"measured      tokens a second: {speeds}",
            ],
        )

    def _left(self, rest: float) -> float:
        """Seconds left for training steps if everything else takes `rest` seconds."""
        asked, passed = 60 * self.training.minutes, time.perf_counter() - self.began
        if (left := asked - passed - rest) < asked / 4:
            raise MiniGPTError(
                f"--minutes {self.training.minutes:g}: {duration(passed)} have passed, {duration(rest)} are for measuring, "
                "evaluations, samples and saving: too little is left to learn in; ask for more, or give less text"
            )
        return left

    def _measure(self, shape: Shape, until: float) -> tuple[float, float]:
        """Tokens a second in whole steps; seconds of all evaluations and samples. At least three steps are taken."""
        training = self.training
        with torch.random.fork_rng([training.device] if training.device.type == "cuda" else []):
            model = self._build(ModelArguments(**vars(self.architecture) | self._architecture(shape))).to(
                training.device
            )
        settings, _ = self._schedule(shape, TOKENS_PER_PARAMETER * shape.parameters(self.vocabulary))
        blocks = SequenceDataset(self.stream, self.data.block_size, training.seed)
        rows = settings["per_device_train_batch_size"]
        batch = blocks.collate([blocks[0, i % len(blocks)] for i in range(rows)])
        batch = {name: tensor.to(training.device) for name, tensor in batch.items()}
        ids = batch["input_ids"]
        factory, rates = optimizer_factory(training)
        optimizer = factory()(model, **rates)

        def learn() -> None:
            with torch.autocast(training.device.type, dtype=torch.bfloat16, enabled=bool(training.bf16)):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device

        def look() -> None:
            with torch.no_grad():
                model(ids, use_cache=False).logits.sum().item()

        def write() -> None:
            model.eval().generate(ids[:1, :1], max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True)
            model.train()

        each = {}
        for do, times in ((look, 2), (write, 2), (learn, 3)):
            seconds = []
            while len(seconds) < times or (do is learn and time.perf_counter() < until):
                began = time.perf_counter()
                do()
                seconds.append(time.perf_counter() - began)
            each[do] = statistics.mean(seconds[1:])  # the first one allocates; what slows down some now will later, too
        looks = 0 if self.validation is None else 1 / training.eval_steps
        windows = 0 if self.validation is None else len(self.validation) / ids.numel()
        written = (looks + 1) * training.sample_tokens / 8
        return ids.numel() / (each[learn] * TRAINER_OVERHEAD), looks * windows * each[look] + written * each[write]

    def _architecture(self, shape: Shape) -> dict[str, Any]:
        return {**shape.settings(), "use_sliding_window": True}  # so that it can write past its block

    def _schedule(self, shape: Shape, tokens: float) -> tuple[dict[str, Any], int]:
        """Batch, steps and learning rates for so many tokens, as training arguments; and the steps that will be taken."""
        training, block_size = self.training, self.data.block_size
        rows = max(1, round(tokens_in_a_step(tokens) / (block_size * self._rows_beside())))
        if self.by_text:
            blocks = len(self.stream) // block_size
            rows = max(1, min(rows, blocks // (2 * self._rows_beside())))  # two steps or more in an epoch
        elif training.device.type != "cpu":
            rows = max(rows, 16384 // block_size)  # fewer would leave an accelerator idle (not measured)
        if "per_device_train_batch_size" in training.given:
            rows = training.per_device_train_batch_size
        steps = max(1, round(tokens / (rows * self._rows_beside() * block_size)))
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
        """Set what was chosen, except for what was given."""
        if new := {name: value for name, value in chosen.items() if name not in self.training.given}:
            self.settings = self.settings.replace(**new)


def settings_of(run: RunFolder) -> dict[str, Any]:
    """What a run was started with.

    Raises:
        MiniGPTError: if its recipe is missing, empty or damaged.
    """
    file = run.recipe
    try:
        settings = read_recipe(str(file))
        if not settings:
            raise MiniGPTError(f"recipe {file}: is empty")
    except ValueError as error:
        raise MiniGPTError(
            f"{error}; this run needs the settings in it: restore it, name another --output_dir, or say --fresh"
        ) from error
    return settings


def first_words(text: PreparedText) -> str:
    """The first three words of the training text, of its first line that has any, and no more than 40 characters."""
    beginning = text.tokenizer.decode(text.train.tokens[:200].tolist(), skip_special_tokens=True)
    line = next((line.strip() for line in beginning.splitlines() if any(map(str.isalnum, line))), "")
    words = re.match(r"\S+(?:[ \t]+\S+){0,2}", line)
    prompt = words[0][:40] if words else ""
    # What decoding broke off in the middle of a character, and what steers terminals, is no word.
    return "".join(itertools.takewhile(lambda c: c.isprintable() and c != "\N{REPLACEMENT CHARACTER}", prompt)).rstrip()
