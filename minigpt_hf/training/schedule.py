"""The learning-rate schedule: shared by `MiniGPTTrainer` and `scripts/bare_loop.py`."""

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from .arguments import MiniGPTTrainingArguments


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, training: MiniGPTTrainingArguments, steps: int
) -> LRScheduler:
    """Create the schedule of a run: linear warmup, then the decay named by `lr_scheduler_type`.

    Args:
        optimizer: Its learning rates are the peaks of the schedule.
        training: `lr_scheduler_type`, `lr_scheduler_kwargs` and `warmup_steps` (steps, or a share of all steps below 1).
        steps: Optimizer steps of the whole run.
    """
    return get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
