"""One of two processes: load a folder split over both, use it, and let the first write down what came out.

In: a folder with a model in `tied/` and one in `untied/` and the inputs. Out: `results.pt` in it. It is started by
`test_parallel.py`, through `torch.distributed.run`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import minigpt_hf  # noqa: F401  (registers the Auto classes)

torch.set_num_threads(1)
here = Path(sys.argv[1])
ids = torch.load(here / "ids.pt")  # [4, T]
results = {}


def placements(model) -> dict[str, str]:
    """How each parameter lies on the two processes; nothing for one that is no DTensor."""
    return {name: str(p.placements) if isinstance(p, DTensor) else "" for name, p in model.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


for name in ("tied", "untied"):
    for kind, split in (("tp", {"tp_size": 2}), ("pp", {"pp_size": 2})):
        model = AutoModelForCausalLM.from_pretrained(here / name, distributed_config=DistributedConfig(**split)).eval()
        with torch.no_grad():
            results[f"{kind} {name}"] = {
                "placements": placements(model),
                "modules": [type(layer).__name__ for layer in model.model.layers],
                "logits": whole(model(ids).logits),
                "written": model.generate(ids, max_new_tokens=12, do_sample=False),
            }
        if kind == "tp":
            model(ids, labels=ids).loss.backward()
            results[f"{kind} {name}"]["gradients"] = {n: whole(p.grad) for n, p in model.named_parameters()}


for name, way in (("tied", "torch"), ("untied", "torch"), ("untied", "transformers")):
    if way == "torch":
        model = AutoModelForCausalLM.from_pretrained(here / name)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=dist.init_device_mesh("cpu", (2,)))
    else:  # by the plan of the model
        model = AutoModelForCausalLM.from_pretrained(here / name, distributed_config=DistributedConfig(fsdp_size=2))
    mine = ids.chunk(2)[dist.get_rank()]
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
    for _ in range(10):
        loss = model(mine, labels=mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item() / 2)
    weights = {n: whole(p).detach() for n, p in model.named_parameters()}
    results[f"fsdp {name} {way}"] = {"placements": placements(model), "losses": losses, "weights": weights}

results["world size"] = dist.get_world_size()
if dist.get_rank() == 0:
    torch.save(results, here / "results.pt")
dist.barrier()
dist.destroy_process_group()
