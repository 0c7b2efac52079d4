"""Take steps of MuonAdamW with sharded, doubly distributed and replicated parameters, and whole ones for comparison.

    python -m torch.distributed.run --nproc_per_node 2 muon_on_ranks.py FILE

Rank 0 saves the results to FILE. Started by `test_sharded.py`.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from minigpt_hf.errors import MiniGPTError
from minigpt_hf.training.optimizer import MuonAdamW

# Rows that the ranks cannot share equally, fewer rows than ranks, and several matrices of a shape.
SHAPES = [(32, 32), (96, 32), (96, 32), (32, 96), (16, 32), (7, 32), (1, 32), (32, 1), (32, 32)]


class Matrices(nn.Module):
    """Matrices for Muon, and a vector and an embedding for AdamW."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.muon = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES)
        self.adamw = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 8), (3,)])


def take_steps(model: nn.Module, second_moment_decay: float, replicas: dist.ProcessGroup | None = None) -> dict:
    """Take five steps with given gradients, and return the parameters and states of the optimizer."""
    settings = {"algorithm": "muon", "lr": 0.02, "weight_decay": 0.1, "second_moment_decay": second_moment_decay}
    groups = [{"params": [*model.muon], **settings}, {"params": [*model.adamw], "algorithm": "adamw", "lr": 0.01}]
    optimizer = MuonAdamW(groups, replicas=replicas)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        optimizer.step()
    states = optimizer.state_dict()["state"].values()
    return {
        "parameters": [full(p.detach()) for p in model.parameters()],
        "states": [{name: full(value) for name, value in state.items()} for state in states],
        "placements": [str(p.placements) if isinstance(p, DTensor) else "" for p in model.parameters()],
        "state placements": [
            str(value.placements) if isinstance(value, DTensor) else ""
            for state in states
            for name, value in state.items()
            if name != "step"
        ],
    }


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


torch.set_num_threads(1)
dist.init_process_group("gloo")
ranks = dist.get_world_size()
meshes = {"sharded": dist.init_device_mesh("cpu", (ranks,))}
if ranks == 4:
    meshes["HSDP"] = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
results = {}
for decay in (0.0, 0.95):
    results["whole", decay] = take_steps(Matrices(), decay)
    results["replicated", decay] = take_steps(Matrices(), decay, dist.group.WORLD)
    for name, mesh in meshes.items():
        results[name, decay] = take_steps(fully_shard(Matrices(), mesh=mesh), decay)
by_columns = Matrices()
by_columns.muon[0] = nn.Parameter(distribute_tensor(by_columns.muon[0].detach(), meshes["sharded"], [Shard(1)]))
try:
    take_steps(by_columns, 0.0)
except MiniGPTError as error:
    results["error"] = str(error)
if dist.get_rank() == 0:
    torch.save(results, sys.argv[1])
dist.barrier()
dist.destroy_process_group()
