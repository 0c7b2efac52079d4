"""Progress output during training: log lines, `log.jsonl`, and generated samples.

The callbacks do not influence training: samples restore all random states.
"""

import html
import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..atomic import write_files
from ..errors import NonFiniteLossError
from ..inference.generation import check_ids, encode_prompt, generate
from .report import duration
from .run_folder import append_to_log, read_log
from .stopping import StopAtBoundary

logger = logging.getLogger(__name__)

SAMPLE_TEMPERATURE = 0.8


class ProgressLogger(TrainerCallback):
    """A line for each log and each validation, with units and the time left; and `log.jsonl`.

    Must exist because the Trainer's own printing shows raw dictionaries and neither bits per byte nor the time left.

    Args:
        tokens_per_step: Tokens in an optimizer step, over all processes.
        tokens_per_byte: Of the training text, to tell loss as bits per byte.
        with_bar: Show a bar instead of the lines about training, as notebooks like it.
    """

    def __init__(self, file: Path, tokens_per_step: int, tokens_per_byte: float, with_bar: bool = False):
        self.file = file
        self.with_bar = with_bar
        self.tokens_per_step = tokens_per_step
        self.tokens_per_byte = tokens_per_byte

    def on_train_begin(self, args, state, control, **kwargs):
        rows = [row for row in read_log(self.file) if "seconds" in row] if self.file.is_file() else []
        self.earlier = rows[-1]["seconds"] if rows else 0.0  # what a run that goes on took before
        self.began = time.perf_counter()
        self.first_step = self.last_step = state.global_step
        self.busy = 0.0  # seconds of training since the last line; validating, saving and sampling are left out
        self.all_busy = 0.0  # the same since the start
        self.mark = None
        show = self.with_bar and state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step") if show else None

    @property
    def seconds(self) -> float:
        """How long this run has taken, over all the times that it went on."""
        return self.earlier + time.perf_counter() - self.began

    def on_step_begin(self, args, state, control, **kwargs):
        if self.mark is None:
            self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.busy, self.mark = self.busy + now - self.mark, now
        if self.bar is not None:
            self.bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = None

    def on_save(self, args, state, control, **kwargs):
        self.mark = None

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs):
        if not state.is_world_process_zero:
            return
        step = state.global_step
        row = {"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.seconds, 3), **logs}
        place = f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            print(
                f"{place}   validation loss {logs['eval_loss']:.4f}   perplexity {logs['eval_perplexity']:.2f}"
                f"   {logs['eval_bits_per_byte']:.3f} bits/byte",
                flush=True,
            )
        elif "loss" in logs:
            row["bits_per_byte"] = logs["loss"] / math.log(2) * self.tokens_per_byte
            row["tokens_per_second"] = round((step - self.last_step) * self.tokens_per_step / self.busy, 1)
            left = self._seconds_left(step, state.max_steps)
            said = f"loss {logs['loss']:.4f}   {row['bits_per_byte']:.3f} bits/byte   lr {logs['learning_rate']:.1e}"
            said += f"   {row['tokens_per_second']:,.0f} tokens/s"
            if self.bar is not None:
                self.bar.set_postfix_str(said)
            else:
                print(f"{place}   {said}   {duration(left)} left", flush=True)
        append_to_log(self.file, row)

    def _seconds_left(self, step: int, max_steps: int) -> float:
        """Steps at the speed since the last log line, and everything else (evaluations, checkpoints) at its mean so far."""
        per_step = self.busy / (step - self.last_step)
        self.all_busy += self.busy
        others = (time.perf_counter() - self.began - self.all_busy) / (step - self.first_step)
        self.last_step, self.busy = step, 0.0
        return (per_step + others) * (max_steps - step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class SampleLogger(TrainerCallback):
    """What the model writes before, during and after training.

    Must exist because a loss does not show whether the text reads like the text it learnt from. All of them stand side by
    side in `samples.md`.
    """

    def __init__(
        self,
        log: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        tokens: int,
        stop: StopAtBoundary,
    ):
        self.log, self.tokenizer, self.prompt, self.tokens, self.stop = log, tokenizer, prompt, tokens, stop
        self.latest = ""
        try:
            check_ids(model, tokenizer, encode_prompt(tokenizer, prompt).input_ids)
        except ValueError as error:  # a prompt with characters that the text does not have, or as long as the context
            self.prompt = ""
            print(f"samples begin a document: {error}", flush=True)

    def on_train_begin(self, args, state, control, model, **kwargs):
        if self._is_due_at_start(args, state):
            self._show(f"at step {state.global_step}" if state.global_step else "before training", state, model)

    def _is_due_at_start(self, args, state) -> bool:
        """At step 0; and at the step of a checkpoint, whose samples are removed from the log, where there was one.

        A checkpoint that was saved for a signal, in between, has none: a resumed run logs what a straight one does.
        """
        step = state.global_step
        if step == 0 or step >= state.max_steps:
            return step == 0
        if args.eval_strategy != "no":  # an evaluation that is made up brings its own sample
            return any(row["step"] == step and "eval_loss" in row for row in state.log_history)
        if args.save_strategy == "steps":
            return step % state.save_steps == 0
        return args.save_strategy == "epoch" and float(state.epoch).is_integer()

    def on_evaluate(self, args, state, control, model, **kwargs):
        if state.global_step < state.max_steps:
            self._show(f"after {state.global_step} steps", state, model)

    def on_save(self, args, state, control, model, **kwargs):
        if args.eval_strategy == "no" and state.global_step < state.max_steps and not self.stop.stopped:
            self._show(f"after {state.global_step} steps", state, model)

    def on_train_end(self, args, state, control, model, **kwargs):
        if not self.stop.stopped:  # else who stopped it is waiting
            self._show("after training", state, model)

    def first_seeds(self, model: PreTrainedModel) -> list[str]:
        """What goes into the card: seeds 0, 1 and 2, so that nobody has chosen.

        Raises:
            NonFiniteLossError: if the model cannot generate text.
        """
        seeds = range(3 if self.tokens else 0)
        try:
            return [sample(model, self.tokenizer, self.prompt, self.tokens, seed) for seed in seeds]
        except Exception as error:
            raise NonFiniteLossError(
                f"the trained model cannot generate text ({error}); no model is published; start again with a lower "
                "--learning_rate and --muon_learning_rate and --fresh"
            ) from error

    def _show(self, when: str, state, model: PreTrainedModel) -> None:
        if self.tokens and state.is_world_process_zero:
            try:
                self.latest = sample(model, self.tokenizer, self.prompt, self.tokens)
            except Exception as error:
                reason = (str(error).strip() or "no message").splitlines()[0]
                logger.warning(f"step {state.global_step}: no sample was written ({type(error).__name__}: {reason})")
                return
            print(
                f"--- it writes, {when}:",
                *("  " + line for line in self.latest.splitlines()),
                "---",
                sep="\n",
                flush=True,
            )
            append_to_log(self.log, {"step": state.global_step, "sample": self.latest})
            write_files({self.log.with_name("samples.md"): side_by_side(read_log(self.log))})


def side_by_side(log: list[dict[str, Any]]) -> str:
    """The samples of a log as a table in Markdown, with the validation loss at which each was written."""
    losses = {row["step"]: f"{row['eval_loss']:.4f}" for row in log if "eval_loss" in row}
    samples = {row["step"]: html.escape(row["sample"], quote=False) for row in log if "sample" in row}
    lines = [
        f"| {step} | {losses.get(step, '')} | {text.replace('|', '&#124;').replace(chr(10), '<br>')} |\n"
        for step, text in samples.items()
    ]
    return "| step | validation loss | it writes |\n|---|---|---|\n" + "".join(lines)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int = 0) -> str:
    """One text, always the same for a seed, that leaves model and random states as they were."""
    was_training = model.training
    model.eval()
    try:
        with random_state_kept():
            return generate(
                model,
                tokenizer,
                prompt,
                seed=seed,
                max_new_tokens=tokens,
                do_sample=True,
                temperature=SAMPLE_TEMPERATURE,
                use_cache=True,
            )[0]
    finally:
        model.train(was_training)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give Python, NumPy and torch their random states back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
