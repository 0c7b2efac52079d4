"""Tensor parallelism in training: each matrix multiplication is divided among the ranks of a group.

The plan is that of the model (`tp_plan`), applied with the classes of transformers: a rank has some heads, some neurons of
the feed-forward network and some rows of the embeddings. The ranks of a group receive the same sequences, and sum the outputs
of each sublayer. FSDP then divides the parts among groups, so that each parameter is a `DTensor` on the mesh (FSDP, TP):

```text
             sequences 0, 1          sequences 2, 3
heads 0, 1   rank 0: half of    ◄─►  rank 2: half of    ┐ FSDP: gather these heads, reduce their gradients
             these heads             these heads        ┘
                 ▲ TP: sum               ▲ TP: sum
heads 2, 3   rank 1             ◄─►  rank 3
```
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import TensorParallelLayer

from ..errors import MiniGPTError
from .sharding import tensor_parallel_size

if TYPE_CHECKING:
    from .arguments import MiniGPTTrainingArguments


def check_divisible(config: PreTrainedConfig, training: "MiniGPTTrainingArguments") -> None:
    """Check that a model can be divided among the ranks of a group, and that these compute the same.

    Raises:
        MiniGPTError: if not.
    """
    size = tensor_parallel_size(training)
    if size == 1:
        return
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (number := getattr(config, name)) % size:
            raise MiniGPTError(
                f"fsdp_config: tp_size {size} does not divide {name}, {number}: choose a multiple of {size}"
            )
    for name in ("attention_dropout", "embedding_dropout", "residual_dropout"):
        if probability := getattr(config, name):
            raise MiniGPTError(
                f"{name} {probability:g} is not supported with tp_size {size}: the ranks of a group would draw different "
                f"masks; use --{name} 0"
            )


class Replicated(TensorParallelLayer):
    """A module whose parameters each rank has whole: a `DTensor` like the others, so that all are on the same mesh.

    Args:
        gradient: `Replicate` if each rank of the group computes the same gradient; `Partial` if gradients must be summed, as
            those of the norms of a rank's heads. FSDP does so.
    """

    def __init__(self, gradient: Placement):
        self.gradient = gradient

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters[param]
        assert whole is not None
        tensor = distribute_tensor(whole.detach(), mesh, [Replicate()], src_data_rank=None)
        module._parameters[param] = nn.Parameter(tensor, whole.requires_grad)

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        """Compute with plain tensors."""
        parameters = dict(module._parameters)
        module._parameters.update({name: p.to_local(grad_placements=[self.gradient]) for name, p in parameters.items()})
        try:
            yield
        finally:
            module._parameters.update(parameters)


REPLICATED = "replicated"  # modules that are not in the plan
STYLES = {
    REPLICATED: Replicated(Replicate()),
    "replicated_with_grad_allreduce": Replicated(Partial()),
    **{
        name: ALL_PARALLEL_STYLES[name] for name in ("colwise", "rowwise", "colwise_gather_output", "embedding_rowwise")
    },
}


def divide_among_ranks(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide a model among the ranks of a mesh with one dimension, before the optimizer is created and FSDP is applied.

    Each rank takes its part of its own weights, which are the same on all ranks; none sends anything.
    """
    for name, module in model.named_modules():
        if module._parameters:
            style = STYLES[model.tp_plan.get(replace_layer_number_by_wildcard(name), REPLICATED)]
            for parameter in module._parameters:
                style.shard_param(module, parameter, mesh)
            style.install_forward(module, mesh)
    model.tie_weights()
