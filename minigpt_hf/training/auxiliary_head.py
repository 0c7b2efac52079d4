"""Multi-token prediction: an auxiliary head predicts the token after the next one, during training only.

The hidden state at position t predicts token t + 1 through the language modeling head, and token t + 2 through the auxiliary
head. The second task makes the hidden states more informative (arXiv:2404.19737). The weight of its loss falls linearly to 0,
so that the end of training is devoted to the actual task, and the head is then discarded. It is stored in checkpoints next to
the model, in a file of its own, and never in a model folder.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import changed_error, load_checked
from .chunked_loss import chunked_cross_entropy

NAME = "auxiliary_head"  # attribute of the model, and prefix of the parameter's name
FILE = "auxiliary_head.pt"  # not .safetensors: some programs load every file of this type in a folder


def attach_auxiliary_head(model: PreTrainedModel) -> None:
    """Add the head to a model, as a submodule, so that it is optimized and distributed like the rest."""
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    nn.init.normal_(head.weight, std=model.config.initializer_range)
    model.add_module(NAME, head)


def detach_auxiliary_head(model: PreTrainedModel) -> None:
    """Remove the head, if there is one."""
    if hasattr(model, NAME):
        delattr(model, NAME)


def auxiliary_parameters(model: PreTrainedModel) -> int:
    """Number of parameters of the head, 0 without one."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(f"{NAME}."))


def without_auxiliary_head(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the model alone."""
    return {name: weight for name, weight in state_dict.items() if not name.startswith(f"{NAME}.")}


def add_auxiliary_loss(
    loss: torch.Tensor,
    model: PreTrainedModel,
    hidden_states: torch.Tensor,
    shift_labels: torch.Tensor,
    weight: float,
    scale: float | torch.Tensor,
    chunk_size: int = 0,
) -> torch.Tensor:
    """Add the gradient of the auxiliary loss to a loss, whose value is unchanged, bit for bit.

    Args:
        loss: Scalar, the loss of the next tokens.
        hidden_states: [B, T, H], after the final norm.
        shift_labels: [B, T], the next tokens; -100 is ignored.
        weight: Weight of the auxiliary loss.
        scale: Factor of the sum over tokens, as in `loss`: the reciprocal of the number of tokens in the step.
        chunk_size: Number of tokens whose logits are computed at a time; 0 for all.
    """
    states, labels = hidden_states[:, :-1], shift_labels[:, 1:]  # [B, T - 1, H], and the tokens after the next ones
    if chunk_size:
        auxiliary = chunked_cross_entropy(states, getattr(model, NAME).weight, labels, scale, chunk_size)
    else:
        logits = getattr(model, NAME)(states)  # [B, T - 1, V]
        auxiliary = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") * scale
    return loss + weight * (auxiliary - auxiliary.detach())


def save_auxiliary_head(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights of the head into a checkpoint."""
    torch.save(getattr(model, NAME).state_dict(), folder / FILE)


def load_auxiliary_head(model: PreTrainedModel, folder: Path) -> None:
    """Load the weights of the head from a checkpoint.

    Raises:
        MiniGPTError: if they do not fit.
    """
    head, saved = getattr(model, NAME), load_checked(folder, FILE)
    expected = {name: (weight.dtype, weight.shape) for name, weight in head.state_dict().items()}
    if {name: (weight.dtype, weight.shape) for name, weight in saved.items()} != expected:
        raise changed_error(folder, f"{FILE} has other tensors than the auxiliary head of the model")
    head.load_state_dict(saved)
