"""MuonAdamW: Muon for the weight matrices of the layers and AdamW for all other parameters, in one optimizer.

Both algorithms share one `torch.optim.Optimizer`, so that the Trainer's scheduler, checkpoints and resuming apply to both.

AdamW scales every element of a weight individually. Muon orthogonalizes the update of a matrix: it replaces the momentum
M = U·S·Vᵀ by U·Vᵀ, so that all singular directions, including those with rare gradients, get a step of equal size (Keller
Jordan et al., https://kellerjordan.github.io/posts/muon/). This applies to linear maps. Embeddings, the output head and
norm weights use AdamW (arXiv:1711.05101).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..errors import MiniGPTError
from .arguments import MiniGPTTrainingArguments

# Quintic Newton-Schulz iteration: p(s) = 3.4445 s - 4.775 s³ + 2.0315 s⁵ maps singular values in (0, 1] towards 1, with
# the largest slope at 0. Five iterations bring them into about [0.7, 1.2], which suffices in practice (Jordan et al.).
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximate U·Vᵀ of M = U·S·Vᵀ with Newton-Schulz iterations instead of an SVD.

    The iteration is insensitive to rounding and runs in bfloat16, as in `torch.optim.Muon`.

    Args:
        matrices: [n, r, c] with r ≤ c.

    Returns:
        A tensor of the same shape and dtype.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    # The Frobenius norm bounds every singular value, so all are in [0, 1].
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # [n, r, r]: the smaller of the two Gram matrices, since r ≤ c
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Optimizer whose parameter groups each select Muon or AdamW.

    Args:
        param_groups: Dictionaries with `params`, `algorithm` ("muon" or "adamw") and `lr`. Muon groups accept `momentum`
            and `second_moment_decay` (0: none), AdamW groups `betas` and `eps`, and both `weight_decay` (decoupled: each
            step multiplies the weight by 1 - lr · weight_decay). Parameters of Muon groups are matrices [rows, columns].
        lr: Learning rate of groups without one, and `defaults["lr"]`, to which transformers' schedules relate `min_lr`.

    Raises:
        MiniGPTError: for an unknown algorithm, or a Muon parameter that is not a matrix.
    """

    def __init__(self, param_groups: Iterable[dict], lr: float = 1e-3):
        muon, adamw = {"momentum": 0.95, "second_moment_decay": 0.0}, {"betas": (0.9, 0.95), "eps": 1e-8}
        defaults = {"lr": lr, "weight_decay": 0.0, **muon, **adamw}
        super().__init__(param_groups, defaults)
        for group in self.param_groups:
            if group.get("algorithm") not in ("muon", "adamw"):
                raise MiniGPTError(f"a parameter group has algorithm {group.get('algorithm')!r}: use 'muon' or 'adamw'")
            for parameter in group["params"]:
                if group["algorithm"] == "muon" and parameter.ndim != 2:
                    raise MiniGPTError(
                        f"Muon requires matrices, but a parameter has shape {tuple(parameter.shape)}: use 'adamw'"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["algorithm"] == "muon" else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov momentum

        # Matrices of equal shape, up to transposition, share one batched iteration: q, k, v, o of all layers, and gate,
        # up, down of all layers.
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(parameters):
            by_shape.setdefault((min(p.shape), max(p.shape)), []).append(i)
        for indices in by_shape.values():
            wide = [
                directions[i] if parameters[i].shape[0] < parameters[i].shape[1] else directions[i].mT for i in indices
            ]
            updates = orthogonalize(torch.stack(wide))
            if group["second_moment_decay"]:
                updates = self._normalized(updates, [parameters[i] for i in indices], group["second_moment_decay"])
            for i, update in zip(indices, updates, strict=True):
                rows, columns = parameters[i].shape
                # If rows > columns, the root mean square of U·Vᵀx is √(columns / rows) times that of x: compensate.
                scale = max(1.0, rows / columns) ** 0.5
                parameters[i].mul_(1 - group["lr"] * group["weight_decay"])
                parameters[i].add_(update if rows < columns else update.mT, alpha=-group["lr"] * scale)

    def _normalized(self, updates: torch.Tensor, parameters: list[nn.Parameter], decay: float) -> torch.Tensor:
        """Divide each column by its root mean square, averaged over steps, and restore the norm of each matrix.

        Neurons whose updates are usually large get smaller ones (NorMuon, arXiv:2510.05491).

        Args:
            updates: [n, r, c] with r ≤ c. Their columns are the rows of a parameter, or its columns if there are more.
        """
        for p in parameters:
            if "second_moment" not in self.state[p]:
                self.state[p]["second_moment"] = torch.zeros(updates.shape[2], device=p.device)
        moments = [self.state[p]["second_moment"] for p in parameters]
        torch._foreach_lerp_(moments, list(updates.square().mean(dim=1)), 1 - decay)
        # The bias of the first steps is the same for all columns, so restoring the norm corrects it.
        scaled = updates * torch.stack(moments).clamp(min=1e-10).rsqrt()[:, None]
        norms = updates.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10)
        return scaled * norms

    def _adamw(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def expected_states(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the states that a parameter has after its first step; none for optimizers other than AdamW's and
    Muon's."""
    shape = tuple(parameter.shape)
    if group.get("algorithm") == "muon":
        return {"momentum_buffer": shape, "second_moment": (max(shape),)}
    if group.get("algorithm") == "adamw" or isinstance(optimizer, torch.optim.Adam):
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    return {}


def muon_adamw(
    model: nn.Module,
    *,
    lr: float,
    muon_lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    second_moment_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> MuonAdamW:
    """Create the optimizer of a causal language model: Muon for the matrices inside `layers`, AdamW for all others.

    Weight decay applies to matrices and embeddings, not to vectors (norm weights). The AdamW groups come first, because
    the Trainer logs the learning rate of the first group.

    Args:
        lr: Learning rate of AdamW.
        muon_lr: Learning rate of Muon.
        second_moment_decay: Decay rate of the second moments with which Muon normalizes its updates; 0: none.
    """
    embeddings: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = vectors if parameter.ndim < 2 else matrices if ".layers." in name else embeddings
            group.append(parameter)
    adamw_group = {"algorithm": "adamw", "lr": lr, "betas": betas, "eps": eps}
    return MuonAdamW(
        [
            {**adamw_group, "params": embeddings, "weight_decay": weight_decay},
            {**adamw_group, "params": vectors, "weight_decay": 0.0},
            {
                "params": matrices,
                "algorithm": "muon",
                "lr": muon_lr,
                "momentum": momentum,
                "second_moment_decay": second_moment_decay,
                "weight_decay": weight_decay,
            },
        ],
        lr=lr,
    )


def optimizer_factory(args: MiniGPTTrainingArguments) -> tuple[Callable[[], Callable[..., MuonAdamW]], dict[str, Any]]:
    """`muon_adamw` and its arguments, in the form in which the Trainer accepts an optimizer for the whole model."""
    settings = {
        "lr": args.learning_rate,
        "muon_lr": args.muon_learning_rate,
        "momentum": args.muon_momentum,
        "second_moment_decay": args.muon_beta2,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return (lambda: muon_adamw), settings
