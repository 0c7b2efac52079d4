"""One dial: so many minutes, or so many parameters -> every setting that was not given.

In: the arguments, the corpus, then its tokens and a function that builds a model. Out: the same arguments with tokenizer,
shape, batch, learning rates and steps filled in, by the rules of `scaling`, and lines that say which and why. It refuses a
time too short to learn anything in, a part of the shape beside the dial, and several processes.

What it measures depends on the machine, so a run that goes on is not measured again: it takes what its recipe says.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from ..data.blocks import Blocks
from ..data.corpus import Corpus
from ..data.stream import TokenStream
from .arguments import Arguments, ModelArguments
from .checkpoint import FINGERPRINT
from .plan import device_name, duration
from .scaling import (
    READINGS_AS_GOOD_AS_NEW,
    TOKENS_PER_PARAMETER,
    WIDTHS,
    Shape,
    block_size_for,
    distance_from_optimal,
    dropout,
    learning_rates,
    tokens_in_a_step,
    vocabulary_for,
    weight_decay,
)
from .trainer import optimizer_factory

MEASURED_SHARE = 0.1  # of the time asked, at most
TRAINER_OVERHEAD = 1.03  # of the Trainer over the loop that is measured here
OTHER_SECONDS = 10  # imports before the clock starts; checkpoints, the model folder and its figures at the end
STREAMED_TEXT = 1_000_000_000  # characters: what is taken of a stream is known when it has been taken
SMALL_TEXT = 4_000_000  # characters: below, a BPE with room for whole words would see too little of each
# Characters that one minute reads, and that can be validated in it, before the machine is measured.
READ_A_MINUTE = {"cpu": 2e6, "accelerator": 2e8}
VALIDATED_A_MINUTE = {"cpu": 5e4, "accelerator": 1e6}

Build = Callable[[ModelArguments], PreTrainedModel]


class Dial:
    """The arguments of a run, being filled in.

    Args:
        run: Its folder; if a run is in it, what that one chose holds.
        began: `time.perf_counter()` when the command started: what has passed counts.

    Raises:
        ValueError: if what it would choose was given, or there are several processes.
    """

    def __init__(self, arguments: Arguments, run: Path, began: float):
        self.data, self.architecture, self.training = arguments
        self.began = began
        self.is_turned = bool(self.training.minutes or self.training.size)
        if not self.is_turned:
            return
        for name in Shape(64).settings():
            if name in self.training.given:
                raise ValueError(
                    f"--{name} is part of the shape, which --minutes and --size choose: leave out one of them"
                )
        if self.training.world_size > 1:
            raise ValueError("--minutes and --size measure one process: name the settings themselves for several")
        if (run / FINGERPRINT).is_file() and not self.training.fresh:
            chosen = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
            for group in arguments:
                self._fill_in(group, {name: chosen[name] for name in vars(group) if name in chosen})
            self.is_turned = False

    def choose_tokenizer(self, corpus: Corpus) -> None:
        """Tokenizer, vocabulary, block, and how much is validated: before anything is tokenized or measured."""
        if not self.is_turned:
            return
        kind = "cpu" if self.training.device.type == "cpu" else "accelerator"
        characters = corpus.train.characters or STREAMED_TEXT
        chosen: dict[str, Any] = {"tokenizer": "bpe"}
        is_small = characters <= SMALL_TEXT and "vocab_size" not in self.training.given
        if is_small and len(set().union(*corpus.train, *(corpus.validation or []))) <= 256:
            chosen["tokenizer"] = "characters"
        if self.training.minutes:
            characters = min(characters, self.training.minutes * READ_A_MINUTE[kind])
            chosen["validation_characters"] = int(min(1e6, max(2e4, self.training.minutes * VALIDATED_A_MINUTE[kind])))
        chosen |= {"vocab_size": vocabulary_for(characters), "block_size": block_size_for(characters)}
        self._fill_in(self.data, chosen)

    def choose_the_rest(
        self, stream: TokenStream, validation: TokenStream | None, vocabulary: int, build: Build
    ) -> None:
        """Shape, batch, learning rates, steps and regularisation; printed, with the reasons.

        Args:
            vocabulary: Number of token ids.
            build: Makes a model of an architecture.

        Raises:
            ValueError: if the time asked is too short.
        """
        if not self.is_turned:
            return
        self.stream, self.validation, self.vocabulary, self.build = stream, validation, vocabulary, build
        shapes = [Shape(width) for width in WIDTHS]
        if self.training.size:
            size = number_of(self.training.size)
            shapes = [min(shapes, key=lambda shape: abs(shape.parameters(vocabulary) - size))]
        lines = []
        if self.training.minutes:
            shape, tokens, lines = self._fit(shapes)
        else:
            shape = shapes[0]
            tokens = TOKENS_PER_PARAMETER * shape.parameters(vocabulary)
        readings = tokens / len(stream)
        self._fill_in(self.architecture, self._architecture(shape) | {"residual_dropout": dropout(readings)})
        self._fill_in(self.training, self._schedule(shape, tokens) | {"weight_decay": weight_decay(readings)})
        lines.append(
            f"chosen        {tokens / shape.parameters(vocabulary):.1f} tokens for each parameter, of shapes at hand the "
            f"nearest to {TOKENS_PER_PARAMETER}; learning rates {self.training.learning_rate:.1e} (AdamW) and "
            f"{self.training.muon_learning_rate:.1e} (Muon)"
        )
        if readings > READINGS_AS_GOOD_AS_NEW:
            lines.append(
                f"small text    it is read {readings:.1f} times, and what is read more than {READINGS_AS_GOOD_AS_NEW} times "
                f"teaches less: dropout {self.architecture.residual_dropout}, weight decay {self.training.weight_decay}, and "
                "the best checkpoint is published; more text would help more than more time"
            )
        print(*lines, sep="\n", flush=True)

    def _fit(self, shapes: list[Shape]) -> tuple[Shape, float, list[str]]:
        """The shape and the number of tokens that fill the time: measure one, compute the best one, measure that."""
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
        """Seconds to learn in, when `rest` will go by beside it."""
        asked, passed = 60 * self.training.minutes, time.perf_counter() - self.began
        if (left := asked - passed - rest) < asked / 4:
            raise ValueError(
                f"--minutes {self.training.minutes:g}: {duration(passed)} have passed, {duration(rest)} are for measuring, "
                "evaluations, samples and saving: too little is left to learn in; ask for more, or give less text"
            )
        return left

    def _measure(self, shape: Shape, until: float) -> tuple[float, float]:
        """Tokens a second in whole steps; seconds of all evaluations and samples. At least three steps are taken."""
        training = self.training
        with torch.random.fork_rng([training.device] if training.device.type == "cuda" else []):
            model = self.build(ModelArguments(**vars(self.architecture) | self._architecture(shape))).to(
                training.device
            )
        settings = self._schedule(shape, TOKENS_PER_PARAMETER * shape.parameters(self.vocabulary))
        blocks = Blocks(self.stream, self.data.block_size, training.seed)
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

    def _schedule(self, shape: Shape, tokens: float) -> dict[str, Any]:
        """Batch, steps and learning rates for so many tokens, as fields of the training arguments."""
        training, block_size = self.training, self.data.block_size
        rows = max(1, round(tokens_in_a_step(tokens) / block_size))
        if training.device.type != "cpu":
            rows = max(rows, 16384 // block_size)  # fewer would leave an accelerator idle (not measured)
        if "per_device_train_batch_size" in training.given:
            rows = training.per_device_train_batch_size
        steps = max(1, round(tokens / (rows * training.gradient_accumulation_steps * block_size)))
        return {
            "per_device_train_batch_size": rows,
            "max_steps": steps,
            "warmup_steps": max(1, min(20, steps // 10)),
            "logging_steps": max(1, steps // 40),
            **learning_rates(shape.width),
        }

    def _fill_in(self, group: Any, chosen: dict[str, Any]) -> None:
        """Set what was chosen, but for what was given."""
        for name, value in chosen.items():
            if name not in self.training.given:
                setattr(group, name, value)


def number_of(size: str) -> float:
    """ "10m" -> 10,000,000; "800k", "0.8M" and "800000" are the same.

    Raises:
        ValueError: if it is no number of parameters.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    try:
        number = float(size.rstrip("kmbKMB")) * units.get(size[-1:].lower(), 1)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise ValueError(f"--size {size}: this is no number of parameters; give one like 800k, 10m or 124m")
    return number
