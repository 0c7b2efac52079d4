"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer that saves and loads as one.

In: a model (or parameter groups) and learning rates. Out: a `torch.optim.Optimizer`. It refuses to guess which rule a
parameter follows: the group says it.

Why two rules. Adam scales every number of a matrix by itself. Muon looks at the matrix as a whole: it replaces the
momentum M = U·S·Vᵀ by U·Vᵀ, so that all directions in which the matrix could move get a step of the same length, the rare
ones too (Keller Jordan et al., https://kellerjordan.github.io/posts/muon/). That suits matrices that map vectors to
vectors. Embeddings, the output head and the norm weights are lists of vectors, and stay with AdamW (arXiv:1711.05101).
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw

# Quintic Newton-Schulz: p(s) = 3.4445 s - 4.775 s³ + 2.0315 s⁵ pushes every singular value in (0, 1] to about 1, and
# small ones fastest. Five rounds leave them within [0.7, 1.2], which is near enough.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """M = U·S·Vᵀ -> about U·Vᵀ for a batch of matrices [n, r, c] with r ≤ c, without computing an SVD.

    The iteration corrects its own rounding, so it runs in bfloat16, as `torch.optim.Muon` does.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.to(torch.bfloat16)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # all singular values into (0, 1]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # [n, r, r]: as small as it gets, since r ≤ c
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer, two rules; each parameter group names its own.

    Args:
        param_groups: dicts with `params`, `algorithm` ("muon" or "adamw") and `lr`; Muon groups may set `momentum`,
            AdamW groups `betas` and `eps`; both `weight_decay` (decoupled: the weight shrinks by lr · weight_decay a
            step). Parameters of Muon groups are matrices [rows, columns].

    Raises:
        ValueError: for an unknown algorithm, or a Muon parameter that is not a matrix.
    """

    def __init__(self, param_groups: Iterable[dict]):
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8}
        super().__init__(param_groups, defaults)
        for group in self.param_groups:
            if group.get("algorithm") not in ("muon", "adamw"):
                raise ValueError(f"parameter group has algorithm {group.get('algorithm')!r}: use 'muon' or 'adamw'")
            for parameter in group["params"]:
                if group["algorithm"] == "muon" and parameter.ndim != 2:
                    raise ValueError(f"Muon turns matrices; a parameter of shape {tuple(parameter.shape)} is not one")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on every parameter that has a gradient."""
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
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov: look one step ahead

        # One batched iteration for all matrices of one shape, tall ones lying on their side: q, k, v, o of all layers
        # together, and gate, up, down of all layers together.
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(parameters):
            by_shape.setdefault((min(p.shape), max(p.shape)), []).append(i)
        for indices in by_shape.values():
            wide = [
                directions[i] if parameters[i].shape[0] <= parameters[i].shape[1] else directions[i].mT for i in indices
            ]
            for i, update in zip(indices, orthogonalize(torch.stack(wide)), strict=True):
                rows, columns = parameters[i].shape
                # An orthogonal matrix with more rows than columns gives shorter vectors; √(rows / columns) makes up.
                scale = max(1.0, rows / columns) ** 0.5
                parameters[i].mul_(1 - group["lr"] * group["weight_decay"])
                parameters[i].add_(update if rows <= columns else update.mT, alpha=-group["lr"] * scale)

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


def muon_adamw(
    model: nn.Module,
    *,
    lr: float,
    muon_lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> MuonAdamW:
    """Sort the parameters of a causal LM: matrices inside `layers` to Muon at `muon_lr`, the rest to AdamW at `lr`.

    Weight decay falls on matrices and embeddings; vectors (the norm weights) have none. The AdamW groups come first:
    the learning rate that the Trainer logs is that of the first group.
    """
    embeddings, vectors, matrices = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = vectors if parameter.ndim < 2 else matrices if ".layers." in name else embeddings
            kind.append(parameter)
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
                "weight_decay": weight_decay,
            },
        ]
    )
