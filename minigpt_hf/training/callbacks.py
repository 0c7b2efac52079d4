"""Progress output during training: printed lines, `log.jsonl`, and generated samples.

`ProgressLogger` is the only part of the library that prints; everything else uses `logging`. The callbacks do not influence
training: samples restore all random states.
"""

import html
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..atomic import write_files
from ..data.chat_format import Message, last_question
from ..errors import NonFiniteLossError
from ..inference.generation import Prompt, check_ids, encode_prompt, generate
from .report import duration
from .run_folder import append_to_log, read_log
from .sharding import is_sharded
from .stopping import StopAtBoundary

logger = logging.getLogger(__name__)

SAMPLE_TEMPERATURE = 0.8


class ProgressLogger(TrainerCallback):
    """Prints a line for each log and each evaluation, with units and the time left, and writes `log.jsonl`.

    The Trainer's `PrinterCallback` prints raw dictionaries, with neither bits per byte nor the time left.

    Args:
        file: `log.jsonl`.
        tokens_after: Returns the training tokens of the first optimizer steps, over all processes.
        tokens_per_byte: Tokens per UTF-8 byte of the training text; converts the loss to bits per byte.
        with_lines: Print the lines. Not in notebooks, where transformers shows a table of the losses.
        quiet: Print nothing.
    """

    def __init__(
        self,
        file: Path,
        tokens_after: Callable[[int], int],
        tokens_per_byte: float,
        with_lines: bool = True,
        quiet: bool = False,
    ):
        self.file = file
        self.with_lines = with_lines
        self.quiet = quiet
        self.tokens_after = tokens_after
        self.tokens_per_byte = tokens_per_byte

    def print(self, text: str) -> None:
        """Print progress to standard output, unless the run is quiet."""
        if not self.quiet:
            print(text, flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        rows = [row for row in read_log(self.file) if "seconds" in row] if self.file.is_file() else []
        self.earlier = rows[-1]["seconds"] if rows else 0.0  # seconds of the run before it was resumed
        self.began = time.perf_counter()
        self.first_step = self.last_step = state.global_step
        self.busy = 0.0  # seconds of training steps since the last log, without evaluation, saving and sampling
        self.all_busy = 0.0  # the same since training began
        self.mark = None

    @property
    def seconds(self) -> float:
        """Training time of the run so far, including the time before it was resumed."""
        return self.earlier + time.perf_counter() - self.began

    def on_step_begin(self, args, state, control, **kwargs):
        if self.mark is None:
            self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.busy, self.mark = self.busy + now - self.mark, now
        if args.logging_strategy == "epoch" and (
            float(state.epoch).is_integer() or state.global_step >= state.max_steps
        ):
            control.should_log = True  # before a checkpoint of this step is saved, and not at `on_epoch_end`

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.logging_strategy == "epoch":
            control.should_log = False  # also if training ends within an epoch: its checkpoint has no such row

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = None

    def on_save(self, args, state, control, **kwargs):
        self.mark = None

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs):
        if not state.is_world_process_zero:
            return
        step = state.global_step
        row = {"step": step, "tokens": self.tokens_after(step), "seconds": round(self.seconds, 3), **logs}
        position = f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}"
        line = None
        if "eval_loss" in logs:
            line = f"validation loss {logs['eval_loss']:.4f}   perplexity {logs['eval_perplexity']:.4g}"
            line += f"   {logs['eval_bits_per_byte']:.3f} bits/byte"
        elif "loss" in logs:
            if args.label_smoothing_factor:  # not a likelihood of the text
                loss = f"loss {logs['loss']:.4f} (smoothed labels)"
            else:
                row["bits_per_byte"] = logs["loss"] / math.log(2) * self.tokens_per_byte
                loss = f"loss {logs['loss']:.4f}   {row['bits_per_byte']:.3f} bits/byte"
            tokens = row["tokens"] - self.tokens_after(self.last_step)
            row["tokens_per_second"] = round(tokens / self.busy, 1)
            left = self._seconds_left(step, state.max_steps)
            line = f"{loss}   lr {logs['learning_rate']:.1e}   {row['tokens_per_second']:,.0f} tokens/s"
            line += f"   {duration(left)} left"
        if line is not None and self.with_lines:
            self.print(f"{position}   {line}")
        append_to_log(self.file, row)

    def _seconds_left(self, step: int, max_steps: int) -> float:
        """Estimate the remaining time: steps at the speed since the last log, everything else at its mean so far."""
        per_step = self.busy / (step - self.last_step)
        self.all_busy += self.busy
        other = (time.perf_counter() - self.began - self.all_busy) / (step - self.first_step)
        self.last_step, self.busy = step, 0.0
        return (per_step + other) * (max_steps - step)


class SampleLogger(TrainerCallback):
    """Generates samples before training, after each evaluation (without evaluations, after each checkpoint) and at the end.

    A loss does not show whether the text resembles the training text. The samples are printed, appended to `log.jsonl`, and
    collected in `samples.md`.

    Args:
        progress: Prints the samples.
        prompts: Start of each sample, or the questions of conversations, each of which is answered.
        fallback: Replaces prompts that the tokenizer cannot encode or that fill the context.
        tokens: Length of a sample; 0 for none.
        stop: Stopped runs generate no further sample.
    """

    temperature = SAMPLE_TEMPERATURE

    def __init__(
        self,
        progress: ProgressLogger,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        tokens: int,
        stop: StopAtBoundary,
        fallback: Sequence[Prompt] = ("",),
    ):
        self.progress, self.tokenizer, self.tokens, self.stop = progress, tokenizer, tokens, stop
        self.prompts = usable_prompts(model, tokenizer, prompts, fallback)
        self.latest: list[str] = []
        self.latest_step = 0
        self.sampled_after_training: PreTrainedModel | None = None

    def on_train_begin(self, args, state, control, model, **kwargs):
        if self._is_due_at_start(args, state):
            self._show(f"at step {state.global_step}" if state.global_step else "before training", state, model)

    def _is_due_at_start(self, args, state) -> bool:
        """Whether a sample belongs to the step at which this process starts.

        True for step 0, unless an evaluation follows at once, and for the step of a checkpoint after which a sample was
        logged (resuming has removed it from the log). A checkpoint saved for a signal has none, so that the log of a resumed
        run equals that of an uninterrupted one.
        """
        step = state.global_step
        if step == 0:
            return not args.eval_on_start
        if step >= state.max_steps:
            return False
        if args.eval_strategy != "no":  # an evaluation that is made on resuming logs its own sample
            return any(row["step"] == step and "eval_loss" in row for row in state.log_history)
        if args.save_strategy == "steps":
            return step % state.save_steps == 0
        return args.save_strategy == "epoch" and float(state.epoch).is_integer()

    def on_evaluate(self, args, state, control, model, **kwargs):
        if state.global_step < state.max_steps:
            self._show(f"after {state.global_step} steps" if state.global_step else "before training", state, model)

    def on_save(self, args, state, control, model, **kwargs):
        if args.eval_strategy == "no" and state.global_step < state.max_steps and not self.stop.stopped:
            self._show(f"after {state.global_step} steps", state, model)

    def on_train_end(self, args, state, control, model, **kwargs):
        if not self.stop.stopped and self._show("after training", state, model):  # a stopped run ends without delay
            self.sampled_after_training = model

    def final_samples(self, model: PreTrainedModel) -> list[str]:
        """The samples of the model card, not selected: seeds 0, 1 and 2, or the answer to each question.

        Raises:
            NonFiniteLossError: if the model cannot generate text.
        """
        samples = self.latest if model is self.sampled_after_training else []
        try:
            if not samples and self.tokens:
                samples = self._samples(model)
            seeds = (1, 2) if self.tokens and isinstance(self.prompts[0], str) else ()
            return samples + [sample(model, self.tokenizer, self.prompts[0], self.tokens, seed) for seed in seeds]
        except Exception as error:
            raise NonFiniteLossError(
                f"the trained model cannot generate text ({error}); no model is published; start again with a lower "
                "--learning_rate and --muon_learning_rate and --fresh"
            ) from error

    @property
    def prompt(self) -> str:
        """The prompt, or the first question."""
        first = self.prompts[0]
        return first if isinstance(first, str) else last_question(first)

    def given(self, number: int) -> list[str]:
        """What each of `number` final samples starts with; see `given_text`."""
        prompts = self.prompts + self.prompts[:1] * (number - len(self.prompts))
        return [given_text(prompt) for prompt in prompts]

    def conversations(self) -> list[list[Message]]:
        """The messages that each sample answers; empty if the prompts are texts."""
        return [[*prompt] for prompt in self.prompts if not isinstance(prompt, str)]

    def _samples(self, model: PreTrainedModel) -> list[str]:
        """Generate a sample with seed 0 for each prompt."""
        return [sample(model, self.tokenizer, prompt, self.tokens) for prompt in self.prompts]

    def _show(self, when: str, state, model: PreTrainedModel) -> bool:
        """Generate, print and log a sample, on the main process only. Returns whether there is one.

        If the model is sharded, all ranks generate the same sample, since they gather its parameters together.
        """
        if self.tokens and (state.is_world_process_zero or is_sharded(model)):
            try:
                self.latest, self.latest_step = self._samples(model), state.global_step
            except Exception as error:
                reason = (str(error).strip() or "no message").splitlines()[0]
                logger.warning(f"step {state.global_step}: no sample generated ({type(error).__name__}: {reason})")
                return False
            if not state.is_world_process_zero:
                return False
            text = "\n\n".join(self.latest)
            lines = (f"  {line}" for line in text.splitlines())
            self.progress.print("\n".join([f"--- sample {when}:", *lines, "---"]))
            log = self.progress.file
            append_to_log(log, {"step": state.global_step, "sample": text})
            write_files({log.with_name("samples.md"): samples_table(read_log(log))})
            return True
        return False


def samples_table(log: list[dict[str, Any]]) -> str:
    """The samples of a log as a Markdown table, with the validation loss of their step."""
    losses = {row["step"]: f"{row['eval_loss']:.4f}" for row in log if "eval_loss" in row}
    samples = {row["step"]: html.escape(row["sample"], quote=False) for row in log if "sample" in row}
    lines = [
        f"| {step} | {losses.get(step, '')} | {text.replace('|', '&#124;').replace(chr(10), '<br>')} |\n"
        for step, text in samples.items()
    ]
    return "| step | validation loss | sample |\n|---|---|---|\n" + "".join(lines)


def usable_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], fallback: Sequence[Prompt]
) -> list[Prompt]:
    """Return `prompts`, or `fallback` if the tokenizer cannot encode one of them or it fills the context, which is logged."""
    try:
        for prompt in prompts:
            check_ids(model, tokenizer, encode_prompt(tokenizer, prompt).input_ids)
        return [*prompts]
    except ValueError as error:
        instead = "start a new document" if [*fallback] == [""] else "answer the first questions"
        logger.warning(f"samples {instead}, without the prompt: {error}")
        return [*fallback]


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tokens: int, seed: int = 0
) -> str:
    """Generate one text, determined by the seed, and restore the mode of the model and all random states.

    For a conversation, the text is `given_text` and an answer generated by greedy decoding.
    """
    options = (
        {"do_sample": True, "temperature": SAMPLE_TEMPERATURE} if isinstance(prompt, str) else {"do_sample": False}
    )
    was_training = model.training
    model.eval()
    try:
        with preserved_random_state():
            (text,) = generate(
                model,
                tokenizer,
                prompt,
                seed=seed,
                extra_options=lambda length, given: {"synced_gpus": True} if is_sharded(model) else {},
                max_new_tokens=tokens,
                use_cache=True,
                **options,
            )
            return text if isinstance(prompt, str) else given_text(prompt) + text
    finally:
        model.train(was_training)


def given_text(prompt: Prompt) -> str:
    """The beginning of a sample that is not generated: the prompt, or the messages without that of the system, in lines."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{message['content']}\n" for message in prompt if message["role"] != "system")


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch at the end of the block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
