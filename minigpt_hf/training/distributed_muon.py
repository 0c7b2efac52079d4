"""Distribution of Muon's orthogonalization over ranks.

The update of a matrix depends on all of its elements, while FSDP gives each rank some of its rows. Each matrix is therefore
gathered on one rank, orthogonalized there and returned, so that no rank repeats the work of another:

```text
rank 0: rows of A, B, C, D  ──┐ all-to-all ┌── A, B: orthogonalize ──┐ all-to-all ┌── rows of the updates of A, B, C, D
rank 1: rows of A, B, C, D  ──┘            └── C, D: orthogonalize ──┘            └── rows of the updates of A, B, C, D
```

With replicated matrices (DDP) every rank has them whole, orthogonalizes some, and the results are all-gathered.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..errors import MiniGPTError


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor on this rank, which shares its memory; other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_group(tensors: Sequence[torch.Tensor]) -> dist.ProcessGroup | None:
    """The group over which the rows of tensors are divided, the same for all; `None` if they are not sharded.

    Raises:
        MiniGPTError: if they are divided in any other way, e.g. by tensor parallelism.
    """
    layouts = {(each.device_mesh, each.placements) if isinstance(each, DTensor) else None for each in tensors}
    if layouts == {None}:
        return None
    for mesh, placements in (each for each in layouts if each is not None):
        divided = [(dim, placement) for dim, placement in enumerate(placements) if not placement.is_replicate()]
        if len(layouts) == 1 and len(divided) == 1 and divided[0][1].is_shard(0):
            return mesh.get_group(divided[0][0])
    shown = " and ".join(sorted(str(each and each[1]) for each in layouts))
    raise MiniGPTError(
        f"Muon supports parameters whose rows are sharded once (FSDP, HSDP), not {shown}; use --muon false"
    )


def balanced_owners(costs: Iterable[float], ranks: int) -> list[int]:
    """Assign each matrix to a rank: the most expensive ones first, each to the rank with the least work so far."""
    work = [(0.0, rank) for rank in range(ranks)]
    owners: dict[int, int] = {}
    for index, cost in sorted(enumerate(costs), key=lambda pair: (-pair[1], pair[0])):
        least, owners[index] = work[0]
        heapq.heapreplace(work, (least + cost, owners[index]))
    return [owners[index] for index in range(len(owners))]


class Exchange:
    """Moves tensors between the ranks that have some of their rows and the one rank that owns each.

    Args:
        shapes: Shapes of the whole tensors. torch gives the first ranks ⌈rows / ranks⌉ rows each, and the last ones the rest.
        owners: Rank of the owner of each tensor.
        group: The group over which they are sharded.
        device: Their device.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], owners: Sequence[int], group: dist.ProcessGroup, device: torch.device
    ):
        self.shapes, self.group, self.device = shapes, group, device
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.owned_by = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(self.ranks)]
        self.owned = self.owned_by[self.rank]

    def to_owners(self, shards: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Start to send rows to the owners.

        Args:
            shards: The rows of each tensor on this rank.

        Returns:
            A function that waits for the tensors owned by this rank, in the order of `owned`.
        """
        sent = [[shards[i] for i in indices] for indices in self.owned_by]
        shapes = [[self._shard_shape(i, rank) for i in self.owned] for rank in range(self.ranks)]
        receive = self._all_to_all(sent, shapes, shards[0].dtype)
        return lambda: [torch.cat(rows) for rows in zip(*receive(), strict=True)]

    def to_shards(self, whole: Sequence[torch.Tensor], dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
        """Start to send rows of the tensors owned by this rank, in the order of `owned`, to the ranks that have these rows.

        Args:
            dtype: Data type of the tensors, the same on all ranks.

        Returns:
            A function that waits for the rows on this rank, of all tensors.
        """
        rows = [[self._shard_shape(i, rank)[0] for rank in range(self.ranks)] for i in self.owned]
        parts = [tensor.split(share) for tensor, share in zip(whole, rows, strict=True)]
        sent = [[part[rank] for part in parts] for rank in range(self.ranks)]
        shapes = [[self._shard_shape(i, self.rank) for i in indices] for indices in self.owned_by]
        receive = self._all_to_all(sent, shapes, dtype)

        def wait() -> list[torch.Tensor]:
            by_index = dict(zip(chain(*self.owned_by), chain(*receive()), strict=True))
            return [by_index[i] for i in range(len(self.shapes))]

        return wait

    def _shard_shape(self, index: int, rank: int) -> torch.Size:
        rows, *others = self.shapes[index]
        share = -(-rows // self.ranks)
        return torch.Size([max(0, min(share, rows - rank * share)), *others])

    def _all_to_all(
        self, sent: list[list[torch.Tensor]], shapes: list[list[torch.Size]], dtype: torch.dtype
    ) -> Callable[[], list[list[torch.Tensor]]]:
        """Start to send `sent[k]` to rank k; the returned function waits for the tensors from all ranks, of `shapes[k]`."""
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
        expected = [sum(shape.numel() for shape in each) for each in shapes]
        nothing = torch.empty(0, dtype=dtype, device=self.device)
        outgoing = torch.cat([nothing, *(tensor.flatten() for tensors in sent for tensor in tensors)])
        incoming = nothing.new_empty(sum(expected))
        work = dist.all_to_all_single(incoming, outgoing, expected, sizes, group=self.group, async_op=True)

        def wait() -> list[list[torch.Tensor]]:
            nonlocal outgoing
            work.wait()
            del outgoing  # must exist until it is sent
            return [
                [flat.view(shape) for flat, shape in zip(part.split([s.numel() for s in each]), each, strict=True)]
                for part, each in zip(incoming.split(expected), shapes, strict=True)
            ]

        return wait


def orthogonalize_in_turns(
    orthogonalize: Callable[[torch.Tensor], torch.Tensor], matrices: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Orthogonalize matrices that all ranks of a group have, ⌈n / ranks⌉ of them on each, and all-gather the results.

    Every rank receives all results, its own among them, in the bfloat16 in which they were computed, so that replicas
    remain identical bit for bit.

    Args:
        orthogonalize: Maps [m, r, c] to the same shape.
        matrices: [n, r, c].
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-len(matrices) // ranks)
    own = matrices.new_zeros((share, *matrices.shape[1:]), dtype=torch.bfloat16)
    given = matrices[rank * share : (rank + 1) * share]
    own[: len(given)] = orthogonalize(given)
    results = own.new_empty((ranks, *own.shape))
    dist.all_gather(list(results.unbind()), own, group=group)
    return results.flatten(0, 1)[: len(matrices)].to(matrices.dtype)
