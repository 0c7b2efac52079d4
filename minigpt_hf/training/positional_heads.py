"""Positional-head initialization: selected heads of a fresh model attend to the token a fixed distance back.

A randomly initialized transformer must first learn that the previous tokens matter most. Here, selected heads of the first
layers attend to them at initialization: their queries and keys contain a part that is the same for every token, whose
contribution to the scores depends only on the distance of two tokens. These are ordinary weights; the architecture and the
training are unchanged.

1. Every embedding gets the same constant c·r in each of its H elements, with r = `initializer_range`. RMSNorm preserves this
   direction, so the vector 1 = (1, …, 1) is part of the input of every layer. A tied output head adds the same number to all
   logits, which does not change their softmax.
2. In a selected head, row i of W_q and of W_k gets a constant in place of its component along 1. Applied to the vector 1, it
   yields element i of a template. The template of the query is a in the first element of each pair and 0 in the second one.
   That of the key is the same, rotated by the angle ω·δ, where ω is the RoPE frequency of the pair and δ the distance.
3. RoPE rotates the query at position t by ω·t and the key at position s by ω·s. The dot product of the templates is therefore

       score(t, s) = Σ_ω a² cos(ω (t - s - δ)),

   which has its maximum at s = t - δ.

Related: mimetic initialization (arXiv:2305.09828) and structured initialization of vision transformers (arXiv:2404.01139).
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import MiniGPTError
from ..model.modeling_minigpt import MiniGPTForCausalLM
from .arguments import ModelArguments, parse_positional_heads

EMBEDDING_CONSTANT = 2.0  # c: constant of an embedding over the standard deviation of its random part
TEMPLATE_SHARE = 0.95  # share of the template in the sum of its mean square and that of a random query or key
QK_NORM_WEIGHT = 1.5  # weights of q_norm and k_norm in these layers; sharpens the attention of their heads
MIN_FREQUENCY = 0.1  # radians per token; slower pairs hardly distinguish neighboring tokens and are not used


MAX_OTHER_SCORE = 0.95  # maximum score of a nearer distance, relative to the score of the intended one


def check_positional_heads(architecture: ModelArguments, block_size: int) -> None:
    """Check that a model has the heads that are to be initialized, and that they can attend to their distances.

    Raises:
        MiniGPTError: if there are more lists than layers, more distances than key heads, or a distance beyond the training
            sequences of `block_size` tokens or the sliding window, or longer than the period of the rotary frequencies.
    """
    distances, layers = parse_positional_heads(architecture.positional_heads), architecture.num_hidden_layers
    heads = architecture.num_key_value_heads or architecture.num_attention_heads
    if len(distances) > layers:
        raise MiniGPTError(
            f"positional_heads has {len(distances)} lists, one per layer, but num_hidden_layers is {layers}: omit "
            f"{len(distances) - layers} of them"
        )
    for layer, of_layer in enumerate(distances):
        if len(of_layer) > heads:
            raise MiniGPTError(
                f"positional_heads has {len(of_layer)} distances for layer {layer}, but it has only {heads} key heads: "
                f"give at most {heads}"
            )
        for distance in of_layer:
            if fault := _fault(distance, layer, architecture, block_size):
                raise MiniGPTError(f"positional_heads has the distance {distance}, {fault}")


def fitting_positional_heads(
    distances: Sequence[Sequence[int]], architecture: ModelArguments, block_size: int
) -> list[list[int]]:
    """Omit the distances that `check_positional_heads` would reject."""
    heads = architecture.num_key_value_heads or architecture.num_attention_heads
    fitting = [
        [distance for distance in of_layer[: max(0, heads)] if not _fault(distance, layer, architecture, block_size)]
        for layer, of_layer in enumerate(distances[: max(0, architecture.num_hidden_layers)])
    ]
    while fitting and not fitting[-1]:
        fitting.pop()
    return fitting


def _fault(distance: int, layer: int, architecture: ModelArguments, block_size: int) -> str | None:
    """Why no head of a layer attends to the token this distance back in training; None if it can."""
    if distance >= block_size:
        return f"but block_size is {block_size}: distances must be less"
    window = architecture.sliding_window
    if architecture.use_sliding_window and window and layer >= architecture.max_window_layers and distance >= window:
        return f"but layer {layer} has a sliding_window of {window}: distances must be less"
    head_dim = architecture.head_dim or architecture.hidden_size // max(1, architecture.num_attention_heads)
    if head_dim < 1:
        return None  # `build_config` rejects the architecture
    frequency = (architecture.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)  # [D/2]
    frequency = frequency[frequency >= MIN_FREQUENCY]
    offsets = np.arange(distance) - distance  # distances of the nearer tokens from the intended one
    scores = np.cos(np.outer(offsets, frequency)).sum(1) / len(frequency)
    if (other := np.flatnonzero(scores > MAX_OTHER_SCORE)).size:
        return (
            f"but heads of dimension {head_dim} with rope_theta {architecture.rope_theta:g} also attend to the distance "
            f"{other[0]}: reduce the distance, or increase head_dim"
        )
    return None


@torch.no_grad()
def initialize_positional_heads(model: MiniGPTForCausalLM, distances: Sequence[Sequence[int]]) -> None:
    """Make heads of a fresh model attend to the token a fixed distance back. The other heads remain random.

    Args:
        distances: For each of the first layers, the distances δ ≥ 1, in tokens, of its first key heads. With grouped
            queries (GQA), all query heads of a group have the distance of their key head. See `check_positional_heads`.
    """
    config = model.config
    assert config.head_dim and config.num_key_value_heads  # set by the configuration itself
    hidden_size, head_dim = config.hidden_size, config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads

    model.model.embed_tokens.weight += EMBEDDING_CONSTANT * config.initializer_range
    # Mean of the elements of a normalized embedding, z + c with z ~ N(0, 1) before normalization.
    mean = EMBEDDING_CONSTANT / (1 + EMBEDDING_CONSTANT**2) ** 0.5

    frequency = model.model.rotary_emb.inv_freq.float()  # [D/2]
    is_used = (frequency >= MIN_FREQUENCY).float()
    # The mean square of a template is that of a random query or key, times this ratio.
    random_rms = config.initializer_range * hidden_size**0.5
    ratio = TEMPLATE_SHARE / (1 - TEMPLATE_SHARE)
    amplitude = random_rms * (is_used * ratio * head_dim / is_used.sum()) ** 0.5  # [D/2]
    query = torch.cat([amplitude, torch.zeros_like(amplitude)])  # [D]; `rotate_half` pairs elements i and i + D/2

    for layer, of_layer in zip(model.model.layers, distances, strict=False):
        attention = layer.self_attn
        attention.q_norm.weight.fill_(QK_NORM_WEIGHT)
        attention.k_norm.weight.fill_(QK_NORM_WEIGHT)
        for head, distance in enumerate(of_layer):
            angle = frequency * distance
            key = torch.cat([amplitude * angle.cos(), amplitude * angle.sin()])  # [D]
            _set_template(attention.k_proj.weight, head, key, mean)
            for query_head in range(head * groups, (head + 1) * groups):
                _set_template(attention.q_proj.weight, query_head, query, mean)


def _set_template(weight: torch.Tensor, head: int, template: torch.Tensor, mean: float) -> None:
    """Make a head map an input with this mean of its elements to a template [D], in addition to its random part."""
    rows = weight[head * len(template) : (head + 1) * len(template)]  # [D, H]
    rows += template[:, None] / (mean * rows.shape[1]) - rows.mean(dim=1, keepdim=True)
