"""Fully sharded data parallelism (FSDP2) and hybrid sharding (HSDP): settings, CPU, and whole checkpoints.

Each rank stores a part of every parameter, gradient and optimizer state; a layer is gathered while it is used. accelerate
shards the model with torch's `fully_shard`. Checkpoints have the same files and contents as those of unsharded training:
rank 0 writes whole tensors, and each rank reads its part of them, so that a run may be resumed with any number of
processes, sharded or not.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import MiniGPTError
from .distributed_muon import local

if TYPE_CHECKING:
    from .arguments import MiniGPTTrainingArguments

# Values of `fsdp_config` other than these are not supported, with the reason and what to do instead.
SUPPORTED = {
    "version": (2, "FSDP1 has been removed from transformers; use 2"),
    "state_dict_type": ("FULL_STATE_DICT", "checkpoints contain whole weights, which from_pretrained loads; omit it"),
    "cpu_offload": (False, "parameters stay on their device; omit it"),
    "activation_checkpointing": (False, "use --gradient_checkpointing true"),
    "cpu_ram_efficient_loading": (False, "each rank initializes the same model; omit it"),
    "xla": (False, "XLA devices are not supported; omit it"),
    **dict.fromkeys(("cp_size", "sp_size"), (1, "sequences are not divided among ranks in training; use 1")),
}
# Settings of `accelerate launch` and the entries of `fsdp_config` that they determine.
FROM_LAUNCHER = {
    "FSDP_VERSION": "version",
    "FSDP_STATE_DICT_TYPE": "state_dict_type",
    "FSDP_OFFLOAD_PARAMS": "cpu_offload",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_AUTO_WRAP_POLICY": "auto_wrap_policy",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "transformer_layer_cls_to_wrap",
    **{f"PARALLELISM_CONFIG_{name.upper()}": name for name in ("dp_replicate_size", "tp_size", "cp_size", "sp_size")},
}
REQUESTED = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`


# -- settings ---------------------------------------------------------------------------------------------------------


def launcher_config() -> dict[str, Any] | None:
    """`fsdp_config` as requested by `accelerate launch`, `None` if it does not request FSDP.

    accelerate reads these variables itself; as settings they are checked, recorded and compared when a run is resumed.
    """
    if os.environ.get(REQUESTED, "").lower() != "true":
        return None
    booleans = {"true": True, "false": False}
    given = {name: os.environ[variable] for variable, name in FROM_LAUNCHER.items() if variable in os.environ}
    return {name: booleans.get(value.lower(), value) for name, value in given.items()}


def check_config(config: dict[str, Any]) -> None:
    """Check `fsdp_config`.

    Raises:
        MiniGPTError: for the first entry that is not supported.
    """
    for name, (supported, reason) in SUPPORTED.items():
        value = config.get(name, supported)
        if str(value).lower() != str(supported).lower():
            raise MiniGPTError(f"fsdp_config: {name} {value} is not supported: {reason}")
    for name in ("dp_replicate_size", "tp_size"):
        if not str(value := config.get(name, 1)).isdecimal() or int(value) < 1:
            raise MiniGPTError(f"fsdp_config: {name} {value} is not a number of ranks: give a positive integer")


def replicas(training: "MiniGPTTrainingArguments") -> int:
    """Number of groups of ranks of which each shares all parameters; more than 1 for hybrid sharding (HSDP).

    Within a group, e.g. a node, parameters are gathered; between groups, only gradients are averaged.
    """
    return int((training.fsdp_config or {}).get("dp_replicate_size", 1)) if training.fsdp else 1


def tensor_parallel_size(training: "MiniGPTTrainingArguments") -> int:
    """Number of ranks that divide each matrix multiplication and receive the same sequences."""
    return int((training.fsdp_config or {}).get("tp_size", 1)) if training.fsdp else 1


def data_parallel_size(training: "MiniGPTTrainingArguments") -> int:
    """Number of ranks, or groups of tensor-parallel ranks, that receive different sequences."""
    return training.world_size // tensor_parallel_size(training)


def check_sharded_run(training: "MiniGPTTrainingArguments", lora_rank: int) -> None:
    """Check settings that cannot be combined with FSDP.

    Raises:
        MiniGPTError: for the first one.
    """
    if not training.fsdp:
        return
    groups, tp_size = replicas(training), tensor_parallel_size(training)
    if tp_size > 1 and training.muon:
        raise MiniGPTError(
            f"fsdp_config: tp_size {tp_size} is not supported with Muon, which exchanges whole rows: use --muon false"
        )
    if tp_size > 1 and groups > 1:
        raise MiniGPTError(
            f"fsdp_config: tp_size {tp_size} is not supported with dp_replicate_size {groups}: omit one of them"
        )
    if training.world_size == 1:
        raise MiniGPTError(
            "fsdp shards a model over several processes, and this is the only one: start N of them with `torchrun "
            "--nproc_per_node N` or `accelerate launch`, or add --fsdp false"
        )
    name, size = ("tp_size", tp_size) if tp_size > 1 else ("dp_replicate_size", groups)
    if size >= training.world_size or training.world_size % size:
        raise MiniGPTError(
            f"fsdp_config: {name} is {size}: it must divide the number of processes, {training.world_size}, and "
            "be less, so that FSDP shards the model over several of them"
        )
    if training.device.type == "cpu" and torch.accelerator.is_available():
        raise MiniGPTError(
            "use_cpu is not supported with fsdp on a machine with an accelerator, where torch shards: hide it, e.g. with "
            "CUDA_VISIBLE_DEVICES= in the environment"
        )
    for name, value in (("lora_rank", lora_rank), ("torch_compile", training.torch_compile)):
        if value:
            raise MiniGPTError(f"{name} is not supported with fsdp: omit one of them")
    if training.push_to_hub and training.hub_strategy != "end":
        raise MiniGPTError(f"hub_strategy {training.hub_strategy} is not supported with fsdp: use --hub_strategy end")


# -- sharding ---------------------------------------------------------------------------------------------------------


@contextmanager
def sharding_accelerator(training: "MiniGPTTrainingArguments") -> Iterator[None]:
    """Let an `Accelerator` created within the block shard models on a CPU as it does on other devices, if FSDP is requested.

    accelerate 1.15 ignores its FSDP plugin on CPU and trains with DDP: `AcceleratorState` reads the plugin only for
    distributed types such as `MULTI_GPU`. It also leaves `ACCELERATE_USE_FSDP` in the environment, which would apply to
    later runs in this process.
    """
    state, requested = PartialState(), os.environ.get(REQUESTED)
    before = state.distributed_type
    if training.fsdp and before == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
    if training.fsdp and training.bf16:  # gradients and the loss are in float32, as with DDP; by default in bfloat16
        assert training.fsdp_plugin_args is not None
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        training.fsdp_plugin_args = training.fsdp_plugin_args | {"mixed_precision_policy": policy}
    groups, tp_size = replicas(training), tensor_parallel_size(training)
    if groups * tp_size > 1:
        training.parallelism_config = ParallelismConfig(
            dp_replicate_size=groups, dp_shard_size=training.world_size // (groups * tp_size), tp_size=tp_size
        )
    try:
        yield
    finally:
        state.distributed_type = before
        os.environ.pop(REQUESTED, None)
        if requested is not None:
            os.environ[REQUESTED] = requested


def check_is_sharded(model: nn.Module) -> None:
    """Check that the model is sharded: training with DDP instead would need several times as much memory.

    Raises:
        MiniGPTError: if a parameter is not divided among the ranks.
    """
    for name, parameter in sharded_parameters(model).items():
        if not (isinstance(parameter, DTensor) and any(each.is_shard() for each in parameter.placements)):
            raise MiniGPTError(
                f"fsdp was requested, but {name} is not sharded: accelerate has not applied FSDP to this model; check its "
                "version and fsdp_config, or add --fsdp false"
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether the forward pass of a model gathers parameters, so that all ranks must call it."""
    return isinstance(model, FSDPModule)


def check_host_memory(bytes_of_checkpoint: int) -> None:
    """Check that rank 0 can hold a whole checkpoint in the memory of its host.

    Raises:
        MiniGPTError: before training, if not.
    """
    free = psutil.virtual_memory().available
    if bytes_of_checkpoint > free:
        raise MiniGPTError(
            f"a checkpoint of this model has about {bytes_of_checkpoint / 1e9:,.1f} GB, which rank 0 gathers in the memory "
            f"of its host, and {free / 1e9:,.1f} GB are free: use a host with more memory, or a smaller model"
        )


# -- whole tensors ----------------------------------------------------------------------------------------------------


def gathered(tensors: dict[Any, torch.Tensor], keep: bool) -> dict[Any, torch.Tensor]:
    """Gather sharded tensors, one after another, on the CPU of the ranks that `keep` them; called on all ranks."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.cpu()
    return whole


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a sharded model, tied ones once. After an evaluation, those of the head are still gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Gather the weights of a sharded model; see `gathered`."""
    return gathered({name: parameter.detach() for name, parameter in sharded_parameters(model).items()}, keep)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """The state of an optimizer of sharded parameters, as that of an optimizer of whole ones; see `gathered`."""
    state = optimizer.state_dict()
    return state | {"state": {number: gathered(each, keep) for number, each in state["state"].items()}}


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of the part of a whole tensor that belongs to the part of a parameter on this rank; no rank sends anything."""
    if isinstance(parameter, DTensor) and tensor.ndim:
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.clone()  # so that the whole tensor, or the file it is in, is released


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the whole weights in a folder into a sharded model. Their names and shapes have been checked."""
    parameters = sharded_parameters(model)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  # not a dictionary
                local(parameters[name]).copy_(local(shard_like(content.get_tensor(name), parameters[name])))


def load_optimizer_state(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Load the whole state in a file into an optimizer of sharded parameters."""
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(saved_group["params"], group["params"], strict=True):
            state = saved["state"].get(number, {})
            state.update({name: shard_like(value, parameter) for name, value in state.items()})
    optimizer.load_state_dict(saved)
