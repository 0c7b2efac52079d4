"""Take steps with sharded, replicated and tensor-parallel parameters, and whole ones for comparison; then run commands.

Rank 0 saves the parameters and states of MuonAdamW to FOLDER/muon.pt. Each rank executes `minigpt train` with each list of
arguments in FOLDER/commands.json, and writes to FOLDER/rank-R.json the exit codes, the placements of the parameters in
training, and the differences between models that tensor parallelism divides and whole ones. The argument `--with_ddp` stands
for an accelerate that ignores FSDP. Called by `test_sharded.py`.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
from minigpt_hf.cli import main
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.training import trainer
from minigpt_hf.training.optimizer import MuonAdamW
from minigpt_hf.training.sharding import shard_like
from minigpt_hf.training.tensor_parallel import divide_among_ranks
from minigpt_hf.training.trainer import MiniGPTTrainer

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
    """Take three steps with given gradients, and return the parameters and states of the optimizer."""
    settings = {"algorithm": "muon", "lr": 0.02, "weight_decay": 0.1, "second_moment_decay": second_moment_decay}
    groups = [{"params": [*model.muon], **settings}, {"params": [*model.adamw], "algorithm": "adamw", "lr": 0.01}]
    optimizer = MuonAdamW(groups, replicas=replicas)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = shard_like(gradient, p)
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


def differences(tied: bool, ranks: int, rank: int) -> dict[str, float]:
    """Train a model whole and divided over (ranks / 2, 2) ranks; the largest differences of losses, gradients and norms.

    The vocabulary has fewer rows than a multiple of the ranks, and key heads are shared.
    """
    torch.manual_seed(0)
    config = MiniGPTConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    whole = MiniGPTForCausalLM(config)
    model, mesh = copy.deepcopy(whole), dist.init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("fsdp", "tp"))
    divide_among_ranks(model, mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    assert all(isinstance(p, DTensor) and p.device_mesh.ndim == 2 for p in model.parameters())
    pairs = list(zip(whole.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(one, full(other)) for one, other in pairs)
    assert all(torch.equal(shard_like(one, other).to_local(), other.to_local()) for one, other in pairs)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (whole, model)]
    largest = dict.fromkeys(("loss", "gradient", "norm"), 0.0)
    for step in range(3):
        ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(step))
        losses, norms = [], []
        for each, rows in ((whole, ids), (model, ids.chunk(ranks // 2)[rank // 2])):
            loss = each(input_ids=rows, labels=rows).loss
            loss.backward()
            losses.append(loss.detach())
            norms.append(full(nn.utils.clip_grad_norm_(each.parameters(), 1.0)))
        dist.all_reduce(losses[1])
        largest["loss"] = max(largest["loss"], abs(losses[1] / ranks - losses[0]).item())
        largest["norm"] = max(largest["norm"], abs(norms[1] - norms[0]).item())
        apart = [(one.grad - full(other.grad)).abs().max().item() for one, other in pairs]
        largest["gradient"] = max(largest["gradient"], *apart)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for each in model.parameters():  # replicated parameters have not diverged
        weight = full(each.detach())
        copies = [torch.empty_like(weight) for _ in range(ranks)]
        dist.all_gather(copies, weight)
        assert all(torch.equal(copy, weight) for copy in copies)
    return largest


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(rank: int, folder: Path) -> None:
    """Take the steps and run the commands on one rank."""
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
    if rank == 0:
        torch.save(results, folder / "muon.pt")
    tensor_parallel = [differences(tied, ranks, rank) for tied in (True, False)]

    placements: dict[str, str] = {}
    prepare, sharding_accelerator = MiniGPTTrainer._prepare_for_training, trainer.sharding_accelerator

    def recorded(self, *args):
        prepared = prepare(self, *args)
        placements.update({name: str(p.placements) for name, p in self.model.named_parameters()})
        return prepared

    MiniGPTTrainer._prepare_for_training = recorded
    codes = []
    for command in json.loads((folder / "commands.json").read_text()):
        trainer.sharding_accelerator = nullcontext if "--with_ddp" in command else sharding_accelerator
        codes.append(main(["train", *(word for word in command if word != "--with_ddp")]))
    report = {"codes": codes, "placements": placements, "tensor_parallel": tensor_parallel}
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
