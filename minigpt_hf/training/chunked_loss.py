"""Cross-entropy of the language modeling head without materializing the logits of all tokens.

The logits of a batch have V elements per token. With a vocabulary of 50,304, those of 32,768 tokens take 6.6 GB in float32,
and their gradient as much again: more than all other activations of a small model. Here the head and the loss are computed
for one chunk of tokens at a time, together with their gradients, so that only the logits of one chunk exist, as in Liger
(arXiv:2410.10989). The number of operations is the same.

`torch.nn.functional.linear_cross_entropy` chunks as well, but ignores autocast, and its loss has the dtype of its inputs: the
sum of a batch in bfloat16 is off by up to 0.4 %.
"""

from typing import Any

import torch


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """`scale` times the summed cross-entropy of `hidden_states @ weight.T`, in nats and float32.

    Matrix products have the dtype of autocast where it is enabled.

    Args:
        hidden_states: [..., H].
        weight: [V, H], of the head.
        labels: [...], indices of the correct tokens; -100 is ignored.
        scale: Factor of the sum, usually the reciprocal of the number of labels.
        chunk_size: Number of tokens whose logits are computed at a time.
    """
    return _ChunkedCrossEntropy.apply(hidden_states.flatten(0, -2), weight, labels.flatten(), scale, chunk_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits of a chunk exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,  # [N, H]
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float | torch.Tensor,
        chunk_size: int,
    ) -> torch.Tensor:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        head = weight.to(dtype)
        hidden_gradient, weight_gradient = torch.empty_like(hidden_states), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        with torch.autocast(device, enabled=False):
            chunks = zip(*(x.split(chunk_size) for x in (hidden_states, labels, hidden_gradient)), strict=True)
            for states, targets, gradient in chunks:
                states, counts = states.to(dtype), targets != -100
                logits = (states @ head.T).float()  # [chunk, V]
                log_sums = logits.logsumexp(dim=1, keepdim=True)
                index = targets.clamp(min=0)[:, None]
                total += ((log_sums - logits.gather(1, index))[:, 0] * counts).sum()
                # The gradient of the loss with respect to the logits: probabilities, minus 1 at the correct token.
                difference = logits.sub_(log_sums).exp_()
                difference.scatter_add_(1, index, torch.full_like(log_sums, -1.0))
                difference = difference.mul_(counts[:, None] * scale).to(dtype)
                gradient.copy_(difference @ head)
                weight_gradient += difference.T @ states
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return gradient * hidden_gradient, gradient * weight_gradient, None, None, None
