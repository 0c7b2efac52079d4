"""Run models with tensor, pipeline and fully sharded data parallelism on two ranks.

    python -m torch.distributed.run --nproc_per_node 2 split_in_two.py FOLDER

FOLDER holds models in `tied/` and `untied/` and the inputs in `ids.pt`. Rank 0 saves the results to `results.pt`.
Started by `test_parallel.py`.
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
folder = Path(sys.argv[1])
ids = torch.load(folder / "ids.pt")  # [4, T]
results = {}


def placements(model) -> dict[str, str]:
    """Return the DTensor placements of each parameter; an empty string for a plain tensor."""
    return {name: str(p.placements) if isinstance(p, DTensor) else "" for name, p in model.named_parameters()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


for name in ("tied", "untied"):
    for parallelism, sizes in (("tp", {"tp_size": 2}), ("pp", {"pp_size": 2})):
        config = DistributedConfig(**sizes)
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config).eval()
        with torch.no_grad():
            results[f"{parallelism} {name}"] = {
                "placements": placements(model),
                "modules": [type(layer).__name__ for layer in model.model.layers],
                "logits": full(model(ids).logits),
                "generated": model.generate(ids, max_new_tokens=12, do_sample=False),
            }
        if parallelism == "tp":
            model(ids, labels=ids).loss.backward()
            results[f"{parallelism} {name}"]["gradients"] = {n: full(p.grad) for n, p in model.named_parameters()}


for name, method in (("tied", "torch"), ("untied", "torch"), ("untied", "transformers")):
    if method == "torch":
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=dist.init_device_mesh("cpu", (2,)))
    else:  # the model's `fsdp_plan`
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(fsdp_size=2))
    local_ids = ids.chunk(2)[dist.get_rank()]
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
    for _ in range(10):
        loss = model(local_ids, labels=local_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item() / 2)
    weights = {n: full(p).detach() for n, p in model.named_parameters()}
    results[f"fsdp {name} {method}"] = {"placements": placements(model), "losses": losses, "weights": weights}

results["world size"] = dist.get_world_size()
if dist.get_rank() == 0:
    torch.save(results, folder / "results.pt")
dist.barrier()
dist.destroy_process_group()
