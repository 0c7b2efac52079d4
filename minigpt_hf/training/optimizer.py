"""MuonAdamW: Muon for the weight matrices of the layers and AdamW for all other parameters, in one optimizer.

Both algorithms share one `torch.optim.Optimizer`, so that the Trainer's scheduler, checkpoints and resuming apply to both.

AdamW scales every element of a weight individually. Muon orthogonalizes the update of a matrix: it replaces the momentum
M = U·S·Vᵀ by U·Vᵀ, so that all singular directions, including those with rare gradients, get a step of equal size (Keller
Jordan et al., https://kellerjordan.github.io/posts/muon/). This applies to linear maps. Embeddings, the output head and
norm weights use AdamW (arXiv:1711.05101).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, zeros
from torch.optim.adamw import adamw

from ..errors import MiniGPTError
from .arguments import MiniGPTTrainingArguments
from .distributed_muon import Exchange, balanced_owners, local, orthogonalize_in_turns, sharding_group

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

    Parameters may be sharded along their rows (FSDP, HSDP); all states except the number of steps are then sharded in the
    same way. AdamW acts on each element alone, Muon on whole matrices: see `distributed_muon`. With M elements in all
    matrices and W ranks, each rank has S = M / W elements of the matrices, and

    - keeps 4 S bytes of momentum (float32), between steps;
    - allocates up to 24 S bytes during a step: directions (4 S), directions as sent, received and put together (3 · 2 S),
      updates as computed, sent and received (3 · 4 S), and the bfloat16 temporaries of the matrices of one shape;
    - sends and receives (2 + 4) · S · (W - 1) / W bytes in a step, or (2 + 2) without second moments. For the 84,934,656
      elements of GPT-2 124M on 8 ranks: 6 · 10,616,832 · 7 / 8 = 55,738,368 bytes, 4% of what FSDP itself sends
      (three times 4 · 124 · 10⁶ · 7 / 8).

    With `replicas`, M / W elements are orthogonalized on each rank, and 2 · M · (W - 1) / W bytes are received in a step.

    Args:
        param_groups: Dictionaries with `params`, `algorithm` ("muon" or "adamw") and `lr`. Muon groups accept `momentum`
            and `second_moment_decay` (0: none), AdamW groups `betas` and `eps`, and both `weight_decay` (decoupled: each
            step multiplies the weight by 1 - lr · weight_decay). Parameters of Muon groups are matrices [rows, columns].
        lr: Learning rate of groups without one, and `defaults["lr"]`, to which transformers' schedules relate `min_lr`.
        replicas: Group of ranks that take identical steps (DDP) and divide the orthogonalization.

    Raises:
        MiniGPTError: for an unknown algorithm, or a Muon parameter that is not a matrix.
    """

    def __init__(self, param_groups: Iterable[dict], lr: float = 1e-3, replicas: dist.ProcessGroup | None = None):
        self.replicas = replicas
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
        decay = group["second_moment_decay"]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if decay and "second_moment" not in self.state[p]:
                self.state[p]["second_moment"] = _vector_like(p)
        gradients = [local(p.grad) for p in parameters]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov momentum
        moments = [local(self.state[p]["second_moment"]) for p in parameters] if decay else []

        # Matrices of equal shape, up to transposition, share one batched iteration: q, k, v, o of all layers, and gate,
        # up, down of all layers.
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(parameters):
            by_shape.setdefault((min(p.shape), max(p.shape)), []).append(i)
        batches = list(by_shape.values())
        if ranks := sharding_group(parameters):
            updates = _sharded_updates([p.shape for p in parameters], batches, directions, moments, decay, ranks)
        else:
            updates = _whole_updates(batches, directions, moments, decay, self.replicas)
        for i, update in updates:
            p = parameters[i]
            rows, columns = p.shape
            # If rows > columns, the root mean square of U·Vᵀx is √(columns / rows) times that of x: compensate.
            scale = max(1.0, rows / columns) ** 0.5
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _adamw(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
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


def _vector_like(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros for each row or column of a matrix, whichever are more, sharded like the matrix."""
    size = max(parameter.shape)
    if isinstance(parameter, DTensor):
        return zeros(size, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(size, device=parameter.device)


def _updates(
    directions: list[torch.Tensor], moments: list[torch.Tensor], decay: float, replicas: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """Orthogonalize matrices of equal shape, up to transposition, and normalize them if `decay` is not 0.

    Args:
        directions: [r, c] or [c, r] each.
        moments: Second moments of each, [c] with r ≤ c; updated. Unused without normalization.
        replicas: Group of ranks that have the same matrices and divide the work.
    """
    wide = torch.stack([each if each.shape[0] < each.shape[1] else each.mT for each in directions])
    result = orthogonalize(wide) if replicas is None else orthogonalize_in_turns(orthogonalize, wide, replicas)
    if decay:
        result = _normalized(result.float(), moments, decay)
    return [
        update if each.shape[0] < each.shape[1] else update.mT for each, update in zip(directions, result, strict=True)
    ]


def _normalized(updates: torch.Tensor, moments: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Divide each column by its root mean square, averaged over steps, and restore the norm of each matrix.

    Neurons whose updates are usually large get smaller ones (NorMuon, arXiv:2510.05491).

    Args:
        updates: [n, r, c] with r ≤ c. Their columns are the rows of a parameter, or its columns if there are more.
        moments: n vectors [c]: mean squares of the columns, averaged over steps; updated.
    """
    torch._foreach_lerp_(moments, list(updates.square().mean(dim=1)), 1 - decay)
    # The bias of the first steps is the same for all columns, so restoring the norm corrects it.
    scaled = updates * torch.stack(moments).clamp(min=1e-10).rsqrt()[:, None]
    norms = updates.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10)
    return scaled * norms


def _whole_updates(
    batches: list[list[int]],
    directions: list[torch.Tensor],
    moments: list[torch.Tensor],
    decay: float,
    replicas: dist.ProcessGroup | None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the index and the update of each matrix; see `_updates`.

    Args:
        batches: Indices of the matrices of each shape.
    """
    for indices in batches:
        chosen = [moments[i] for i in indices] if decay else []
        yield from zip(indices, _updates([directions[i] for i in indices], chosen, decay, replicas), strict=True)


def _sharded_updates(
    shapes: list[torch.Size],
    batches: list[list[int]],
    directions: list[torch.Tensor],
    moments: list[torch.Tensor],
    decay: float,
    group: dist.ProcessGroup,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the index of each matrix and the rows of its update on this rank.

    While the matrices of one shape are orthogonalized, those of the others are on their way. Directions are sent in the
    bfloat16 in which they are orthogonalized, and so are updates that are not normalized, so that no bit is lost.

    Args:
        shapes: Shapes of the whole matrices.
        batches: Indices of the matrices of each shape.
        directions: The rows of each matrix on this rank.
        moments: The part of each vector of second moments on this rank; updated.
    """
    device = directions[0].device
    # Multiply-adds of a Newton-Schulz iteration.
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    owners = balanced_owners(costs, dist.get_world_size(group))
    on_their_way = []
    for indices in batches:
        ranks = [owners[i] for i in indices]
        matrices = Exchange([shapes[i] for i in indices], ranks, group, device)
        vectors = Exchange([torch.Size([max(shapes[i])]) for i in indices], ranks, group, device)
        rows = matrices.to_owners([directions[i].to(torch.bfloat16) for i in indices])
        parts = vectors.to_owners([moments[i] for i in indices]) if decay else list
        on_their_way.append((indices, matrices, vectors, rows, parts))
    returning = []
    for indices, matrices, vectors, rows, parts in on_their_way:
        whole, whole_moments = rows(), parts()
        updates = _updates(whole, whole_moments, decay) if whole else []
        rows = matrices.to_shards(updates, torch.float32 if decay else torch.bfloat16)
        parts = vectors.to_shards(whole_moments, torch.float32) if decay else list
        returning.append((indices, rows, parts))
    for indices, rows, parts in returning:
        for i, part in zip(indices, parts(), strict=False):
            moments[i].copy_(part)
        yield from zip(indices, rows(), strict=True)


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
    replicas: dist.ProcessGroup | None = None,
) -> MuonAdamW:
    """Create the optimizer of a causal language model: Muon for the matrices inside `layers`, AdamW for all others.

    Weight decay applies to matrices and embeddings, not to vectors (norm weights). The AdamW groups come first, because
    the Trainer logs the learning rate of the first group.

    Args:
        lr: Learning rate of AdamW.
        muon_lr: Learning rate of Muon.
        second_moment_decay: Decay rate of the second moments with which Muon normalizes its updates; 0: none.
        replicas: See `MuonAdamW`.
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
        replicas=replicas,
    )


def optimizer_factory(
    args: MiniGPTTrainingArguments, replicas: dist.ProcessGroup | None = None
) -> tuple[Callable[[], Callable[..., MuonAdamW]], dict[str, Any]]:
    """`muon_adamw` and its arguments, in the form in which the Trainer accepts an optimizer for the whole model."""
    settings = {
        "lr": args.learning_rate,
        "muon_lr": args.muon_learning_rate,
        "momentum": args.muon_momentum,
        "second_moment_decay": args.muon_beta2,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "replicas": replicas,
    }
    return (lambda: muon_adamw), settings
