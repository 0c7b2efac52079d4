"""Orderly stops: signals that save a checkpoint at the next step boundary, and early stopping."""

import errno
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

SIGNALS = [signal.SIGTERM, signal.SIGINT] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
SAME_REQUEST = 1.0  # seconds: `timeout`, and launchers on Ctrl-C, deliver one request twice


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of Python or of safetensors, says that there is no room."""
    full = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    return getattr(error, "errno", None) in full or "No space left" in str(error)


class _Stop(KeyboardInterrupt):
    """Raised by a signal outside training. As a `KeyboardInterrupt` it passes every `except Exception`."""


class StopAtBoundary(TrainerCallback):
    """Save a checkpoint at the next step boundary on SIGTERM, SIGINT or SIGHUP, and end the run; at once on a second signal.

    Before training begins, a signal ends the run immediately, with cleanup. A signal that was ignored when the run started
    (`nohup`) stays ignored. transformers' `enable_jit_checkpoint` covers SIGTERM only, and not the time before training.
    """

    def __init__(self):
        self.number: int | None = None  # the signal that came
        self.stopped = False  # whether training was ended for it
        self.training = False  # whether training has begun: from then on a signal waits for a boundary
        self.came = -1.0  # when the signal came
        self.process = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals within the block; outside the main thread Python cannot, and they act as before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.process = os.getpid()
        now = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in now.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._asked)
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

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_if_asked(args, control)
        if self.stopped:
            control.should_evaluate = False  # who asked is waiting; a resumed run evaluates first

    def on_evaluate(self, args, state, control, **kwargs):
        self._stop_if_asked(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # training was ended, and saved, in the middle of this epoch or at its last step
            control.should_log = control.should_evaluate = control.should_save = False

    def _stop_if_asked(self, args, control) -> None:
        number = self.number
        if args.world_size > 1:  # the signal reaches each process at another time; all are to stop at the same step
            asked = torch.tensor(number or 0, device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            number = int(asked) or None
        if number is not None:  # one that came during the exchange waits in `self.number` for the next step
            self.number, self.stopped = number, True
            control.should_save = control.should_training_stop = True

    def _asked(self, number: int, frame) -> None:
        again = self.number is not None and time.monotonic() - self.came >= SAME_REQUEST
        if again or os.getpid() != self.process:  # the second request, or a forked child, which has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.number is None:
            self.number, self.came = number, time.monotonic()
            if not self.training:
                raise _Stop


def ignore_signals(initialize: Callable[[int], None] | None, worker: int) -> None:
    """For a loader worker: what is sent to the process group stops the main process, which then ends its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


class EarlyStopping(TrainerCallback):
    """End after so many evaluations without a better one; 0 for never.

    Must exist because transformers' `EarlyStoppingCallback` counts from zero again when a run goes on; this one looks at
    what is written down.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        self._stop_if_no_better(state, control)  # a run that this ended, and that was killed before it was published

    def on_evaluate(self, args, state, control, **kwargs):
        self._stop_if_no_better(state, control)

    def _stop_if_no_better(self, state, control) -> None:
        by_step = {row["step"]: row["eval_loss"] for row in state.log_history if "eval_loss" in row}
        losses = [loss if math.isfinite(loss) else math.inf for loss in by_step.values()]
        if not losses:
            return
        since_best = len(losses) - 1 - losses.index(min(losses))
        if self.patience and since_best >= self.patience and state.global_step < state.max_steps:
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"no better validation loss in {since_best} evaluations: training ends here", flush=True)
