"""Graceful stopping: signals that save a checkpoint at the next step boundary, and early stopping."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from ..errors import TrainingInterrupted, TrainingStopped

logger = logging.getLogger(__name__)

SIGNALS = [
    signal.SIGTERM,
    signal.SIGINT,
    *(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)),
]
NOTICE = getattr(signal, "SIGUSR1", None)  # announces that the job will end, e.g. Slurm's --signal=USR1@120
REPEAT_SECONDS = 1.0  # `timeout`, and launchers on Ctrl-C, deliver the same signal twice within this time


class _Stop(KeyboardInterrupt):
    """Raised by a signal outside training. A `KeyboardInterrupt`, so that no `except Exception` catches it."""


class StopAtBoundary(TrainerCallback):
    """On SIGTERM, SIGINT, SIGHUP or SIGUSR1, saves a checkpoint at the next step boundary and ends the run.

    A second signal ends the process immediately; so does the first one before training begins, with cleanup. SIGUSR1 is a
    notice: another one has no effect, and the SIGTERM that a scheduler sends later does not count as the second signal.
    Signals ignored when the run started (`nohup`) stay ignored. transformers' `enable_jit_checkpoint` covers SIGTERM only,
    and not the time before training.

    Attributes:
        number: The first signal received.
        stopped: Whether it ended training.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.stopped = False
        self.training = False  # whether training has begun: from then on signals wait for a step boundary
        self.demanded: float | None = None  # time of the first signal other than SIGUSR1
        self.process = 0
        self.group = None  # see `_stop_if_signaled`

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block. Python allows this in the main thread only; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.process = os.getpid()
        now = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in now.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._handle)
        try:
            yield
        except BaseException as error:
            if self.number is None or isinstance(error, TrainingStopped):
                raise
            lost = "steps since the last checkpoint are lost" if self.training else "before training began"
            raise TrainingInterrupted(self.number, f"({lost}); run the same command again to continue") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True
        if args.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_if_signaled(args, control)
        if self.stopped:
            control.should_evaluate = False  # the process must end soon; a resumed run evaluates first

    def on_evaluate(self, args, state, control, **kwargs):
        self._stop_if_signaled(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # training ended, and was saved, within this epoch or at its last step
            control.should_log = control.should_evaluate = control.should_save = False

    def _stop_if_signaled(self, args, control) -> None:
        """Stop all ranks at the same step, although each receives the signal at a different time.

        The exchange uses the CPU backend, so that no rank waits for its accelerator.
        """
        number = self.number
        if args.world_size > 1:
            received_number = torch.tensor(number or 0)
            torch.distributed.all_reduce(received_number, torch.distributed.ReduceOp.MAX, self.group)
            number = int(received_number) or None
        if number is not None:  # a signal during the exchange waits in `self.number` for the next step
            self.number, self.stopped = number, True
            control.should_save = control.should_training_stop = True

    def _handle(self, number: int, frame) -> None:
        now, is_demand = time.monotonic(), number != NOTICE
        repeated = is_demand and self.demanded is not None and now - self.demanded >= REPEAT_SECONDS
        if repeated or os.getpid() != self.process:  # a second signal, or a forked child, which has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if is_demand and self.demanded is None:
            self.demanded = now
        if self.number is None:
            self.number = number
            if not self.training:
                raise _Stop


def ignore_signals(initialize: Callable[[int], None] | None, worker: int) -> None:
    """Initialize a data loader worker: on a signal to the process group, the main process stops and ends its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


class EarlyStopping(TrainerCallback):
    """Ends training after `patience` evaluations without a lower validation loss.

    transformers' `EarlyStoppingCallback` restarts its count when a run is resumed; this one counts in the log history.

    Args:
        patience: Number of evaluations; 0 for no early stopping.

    Attributes:
        stopped: Whether it ended training.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._stop_if_no_better(state, control)  # a run that was stopped early, and killed before it was published

    def on_evaluate(self, args, state, control, **kwargs):
        self._stop_if_no_better(state, control)

    def _stop_if_no_better(self, state, control) -> None:
        by_step = {row["step"]: row["eval_loss"] for row in state.log_history if "eval_loss" in row}
        losses = [loss if math.isfinite(loss) else math.inf for loss in by_step.values()]
        if not losses:
            return
        since_best = len(losses) - 1 - losses.index(min(losses))
        if self.patience and since_best >= self.patience and state.global_step < state.max_steps:
            control.should_training_stop = self.stopped = True
            if state.is_world_process_zero:
                logger.info(f"early stopping: the validation loss has not improved for {since_best} evaluations")
