"""Why a run may stop before its end, each with an exit code of its own, and how it stops in order.

In: signals, a full disk, a loss that is no number. Out: an exception that says in one line what happened and how to go on.
It refuses to lose a checkpoint that was there.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback


class RunStopped(Exception):
    """A run ended early, in order. `exit_code` is what the command returns."""

    exit_code = 1


class Interrupted(RunStopped):
    """A signal asked the run to stop. The code is that of shells: 128 + the number of the signal."""

    def __init__(self, number: int, step: int):
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} and saved at step {step}; the same command goes on from there")


class DiskFull(RunStopped):
    """There is no room for the next checkpoint. The code is the number of the error, ENOSPC."""

    exit_code = 28


class BadLoss(RunStopped):
    """A loss or gradient is not finite, or has exploded. The code is EX_DATAERR of sysexits.h."""

    exit_code = 65


class StopAtBoundary(TrainerCallback):
    """SIGTERM and SIGINT save at the next step boundary and end the run; a second one ends it at once.

    Must exist because the Trainer ends at once on either, and saves nothing.
    """

    def __init__(self):
        self.number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the two signals within the block; must be entered in the main thread."""
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        number = self.number
        if args.world_size > 1:  # the signal reaches each process at another time; all are to stop at the same step
            asked = torch.tensor(number or 0, device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            number = int(asked) or None
        if number is not None:  # one that came during the exchange waits in `self.number` for the next step
            self.number = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # who asked is waiting

    def _asked(self, number: int, frame) -> None:
        self.number = number
        for each in (signal.SIGTERM, signal.SIGINT):  # the second time there is no waiting
            signal.signal(each, signal.SIG_DFL)


class StopWhenNoBetter(TrainerCallback):
    """End after so many evaluations without a better one; 0 for never.

    Must exist because transformers' `EarlyStoppingCallback` counts from zero again when a run goes on; this one looks at
    what is written down.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args, state, control, **kwargs):
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if self.patience and since_best >= self.patience and state.global_step < state.max_steps:
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"no better validation loss in {since_best} evaluations: training ends here", flush=True)
