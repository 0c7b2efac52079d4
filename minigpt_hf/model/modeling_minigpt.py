"""MiniGPT, a decoder-only transformer: token ids in, logits of the next token out.

A language model predicts the next token. An embedding turns each token id into a vector of H numbers, and a stack of L
decoder layers refines these vectors. Each layer has two sublayers: *self-attention* moves information between positions, from
earlier tokens to later ones, and the *feed-forward network* transforms the vector of every position separately. Both add
their output to their input, so the vectors flow through the entire stack along one path, the *residual stream*. A final
linear layer, the language modeling head, maps each vector to V logits.

The computation and the parameter names are those of Qwen3 in transformers, so the same weights run wherever Qwen3 runs.
Dropout is the only addition, and it is inactive in `eval()`. This file is copied into every model folder; it imports nothing
from the package except the configuration next to it.

Shapes in the comments:
    B  batch size       H  hidden_size           N  num_attention_heads     D  head_dim
    T  query positions  F  intermediate_size     K  num_key_value_heads     V  vocab_size
    S  key positions: the T current tokens and those in the cache           L  num_hidden_layers
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_minigpt import MiniGPTConfig


@use_kernel_forward_from_hub("RMSNorm")
class MiniGPTRMSNorm(nn.Module):
    """Root mean square normalization with a learned scale (arXiv:1910.07467): [..., H] -> [..., H].

    Every vector is rescaled to a root mean square of 1, so the input of a sublayer does not grow with the residual stream.
    The mean is computed in float32, because squares overflow in half precision.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.to(torch.float32)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x32.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MiniGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding (RoPE, arXiv:2104.09864).

    Attention alone is invariant to the order of the tokens. RoPE rotates the pair (x_i, x_{i + D/2}) of a query or key at
    position t by the angle t · θ^(-2i/D), with the base θ = `rope_theta`. The dot product of a rotated query and a rotated
    key then depends on their positions only through the distance between them.

    The attribute names are those that transformers' scaled RoPE types read and update (see `dynamic_rope_update`).
    """

    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.config = config
        # `dynamic` scaling updates `inv_freq` when a sequence exceeds `max_seq_len_cached`, the length that `inv_freq` is
        # currently computed for, and restores the original frequencies below `original_max_seq_len`, the trained length.
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = self.compute_default_rope_parameters
        if self.rope_type != "default":  # linear, dynamic, yarn, llama3, …: scaled types that extend the context
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)  # [D/2]
        # `original_inv_freq` holds the frequencies that `dynamic` scaling restores for short sequences. Neither buffer is
        # saved: both follow from the configuration, and `PreTrainedModel._init_weights` recomputes them on loading.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MiniGPTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Frequency of each of the D/2 pairs, in radians per position: from 1 down to θ^(-(D-2)/D).

        The longest wavelength is 2π · θ^((D-2)/D) positions. The second value scales cosines and sines; it is 1 here.
        """
        theta = config.rope_parameters["rope_theta"]
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / theta**exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B, T] -> cosines and sines, each [B, T, D], in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)  # [B, T, D/2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, T, D]: both elements of a pair have the same angle
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotate every pair (x_i, x_{i + D/2}) by 90 degrees: [1, 2, 3, 4] -> [-3, -4, 1, 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries [B, N, T, D] and keys [B, K, T, D] by the angles of their positions, given as [B, T, D]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, T, D]: shared by all heads
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat each key or value head for the query heads that share it: [B, K, S, D] -> [B, N, S, D], N = K · groups."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention (arXiv:1706.03762), the reference for the optimized kernels.

    Every position has a query, a key and a value. The attention weights of a position are the softmax of the dot products of
    its query with all keys, and its output is the average of the values with these weights. As an analogy: the query is a
    question, the key a label that says what a token has to offer, and the value the message that is passed on.

    Args:
        query: [B, N, T, D].
        key, value: [B, K, S, D].
        attention_mask: [B, 1, T, S], added to the scores: 0 where attention is allowed, and a large negative number at later
            tokens, at padding and at other documents.
        scaling: Factor of the scores, 1/√D.

    Returns:
        The output [B, T, N, D] and the attention weights [B, N, T, S].
    """
    key = repeat_kv(key, module.num_key_value_groups)  # [B, N, S, D]
    value = repeat_kv(value, module.num_key_value_groups)  # [B, N, S, D]

    # A dot product over D elements of unit variance has variance D; `scaling` = 1/√D keeps the softmax from saturating.
    scores = query @ key.transpose(2, 3) * scaling  # [B, N, T, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)  # each row sums to 1
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # [B, T, N, D]


class MiniGPTAttention(nn.Module):
    """Causal multi-head self-attention with grouped keys and values (GQA, arXiv:2305.13245) and QK-norm.

    N heads attend independently, each with its own projections. Each of the K key and value heads serves N / K query heads,
    which makes the cache smaller by that factor.
    """

    def __init__(self, config: MiniGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # index of this layer in the cache
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True  # read by the sdpa and flash attention implementations
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.o_proj.residual_projection = True  # initialized with a smaller standard deviation, see `_init_weights`
        # QK-norm (arXiv:2010.04245): queries and keys of fixed norm bound the scores, which stabilizes high learning rates.
        self.q_norm = MiniGPTRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = MiniGPTRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]  # B, T
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)  # [B, N, T, D]
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)  # [B, K, T, D]
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, K, T, D]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, K, S, D]

        # eager (above), sdpa, flash, flex, paged, …: selected by `attn_implementation`; all compute the same function.
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()  # [B, T, N·D]: heads concatenated
        return self.o_proj(attn_output), attn_weights  # [B, T, H]


class MiniGPTMLP(nn.Module):
    """Feed-forward network of each position, SwiGLU (arXiv:2002.05202): [B, T, H] -> [B, T, H].

    The elementwise product lets the activated projection, the gate, control how much of the other one passes.
    """

    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.residual_projection = True  # initialized with a smaller standard deviation, see `_init_weights`
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # [B, T, F] inside


class MiniGPTDecoderLayer(GradientCheckpointingLayer):
    """One layer: attention, then the feed-forward network, each on the normalized residual stream and added to it (pre-norm).

    As an analogy: in attention the tokens communicate, in the feed-forward network each of them computes on its own.
    """

    def __init__(self, config: MiniGPTConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = MiniGPTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MiniGPTAttention(config, layer_idx)
        self.post_attention_layernorm = MiniGPTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MiniGPTMLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,  # some attention kernels derive the boundaries of packed documents from it
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attn_output)  # [B, T, H]
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))  # [B, T, H]


class MiniGPTPreTrainedModel(PreTrainedModel):
    """Base class of all MiniGPT models: weight initialization, and the features of transformers that they support.

    Initialization, with r = `initializer_range` and L = `num_hidden_layers`:

    | parameter                         | distribution     | reason                                             |
    |-----------------------------------|------------------|----------------------------------------------------|
    | `embed_tokens` (and a tied head)  | N(0, r²)         | small logits: the first prediction is near uniform |
    | … its row of `pad_token_id`       | 0                | padding carries no information                     |
    | `q_proj` `k_proj` `v_proj`        | N(0, r²)         | the norms around them set the scale                |
    | `gate_proj` `up_proj`             | N(0, r²)         | the norm before them sets the scale                |
    | `o_proj` `down_proj`              | N(0, r² / 2L)    | 2L sublayers add up to the variance of one (GPT-2) |
    | `lm_head`, if not tied            | N(0, r²)         | as for the embeddings                              |
    | all norm weights                  | 1                | plain normalization                                |
    | `score` `qa_outputs` (heads)      | N(0, r²), bias 0 | the default of transformers                        |

    `minigpt train` can also initialize selected heads so that they attend to previous tokens (`--positional_heads`).
    """

    config: MiniGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MiniGPTDecoderLayer, "attentions": MiniGPTAttention}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)  # N(0, r²) for matrices and embeddings, 0 for the padding row, 1 for norms
        # `residual_projection` marks `o_proj` and `down_proj`. The attribute is set on the `nn.Linear` itself, because for
        # classes outside the library transformers calls this method only for modules that own parameters, hence not for
        # the attention or MLP module that contains the projection.
        if module.__dict__.get("residual_projection"):
            init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5)


class MiniGPTModel(MiniGPTPreTrainedModel):
    """Embeddings, the stack of decoder layers and a final norm: token ids [B, T] -> hidden states [B, T, H]."""

    def __init__(self, config: MiniGPTConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([MiniGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MiniGPTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MiniGPTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Compute the hidden state of every position.

        Args:
            input_ids: [B, T]. Alternatively `inputs_embeds` [B, T, H].
            attention_mask: [B, S], 1 for tokens and 0 for padding; or a dictionary of masks [B, 1, T, S], one per layer type.
            position_ids: [B, T]. Positions that restart at 0 mark the beginning of a new document, and attention does not
                cross into the previous one. This requires `use_cache=False` and no `attention_mask`.
            past_key_values: Cache with the keys and values of previous tokens.
            use_cache: Whether to return `past_key_values`.

        Returns:
            `last_hidden_state` [B, T, H], after the final norm, and `past_key_values`.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` is required")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, H]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        masks = attention_mask
        if not isinstance(masks, dict):  # `generate` with a static cache passes one mask per layer type
            mask_inputs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,  # if given, searched for document boundaries, a device synchronization
            }
            masks = {"full_attention": create_causal_mask(**mask_inputs)}
            if "sliding_attention" in self.config.layer_types:
                masks["sliding_attention"] = create_sliding_window_causal_mask(**mask_inputs)

        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)  # [1, T]

        hidden_states = self.dropout(inputs_embeds)  # [B, T, H]
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        layers = self.layers[: self.config.num_hidden_layers]  # decoding with `assistant_early_exit` drafts with fewer
        for layer, layer_type in zip(layers, self.config.layer_types, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class MiniGPTForCausalLM(MiniGPTPreTrainedModel, GenerationMixin):
    """Causal language model: token ids [B, T] -> logits of the next tokens [B, T, V], and the loss if labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniGPTConfig):
        super().__init__(config)
        self.model = MiniGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the next token at every position.

        Args:
            labels: [B, T], usually equal to `input_ids`: the loss shifts them by one position and ignores -100.
            logits_to_keep: Compute logits only for this number of last positions, or for the positions in a tensor; 0 for
                all. Generation needs only the last position.
            kwargs: Passed on to the loss (`num_items_in_batch`; `shift_labels` [B, T], labels that are already shifted) and
                to the attention kernels. The other arguments are those of `MiniGPTModel.forward`.

        Returns:
            `logits` [B, T, V], and `loss` in nats: the cross-entropy averaged over the labels, or its sum divided by
            `num_items_in_batch`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, slice_indices, :])  # [B, T, V]

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Other heads on the same base model. `forward` is inherited from the generic classes of transformers. Their `__init__`
# creates the base model through `AutoModel`, which does not know it when this file runs as remote code: it is created here.
class MiniGPTForSequenceClassification(GenericForSequenceClassification, MiniGPTPreTrainedModel):
    """One label per sequence, predicted from its last token."""

    def __init__(self, config: MiniGPTConfig):
        MiniGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MiniGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MiniGPTForTokenClassification(GenericForTokenClassification, MiniGPTPreTrainedModel):
    """One label per token."""

    def __init__(self, config: MiniGPTConfig):
        MiniGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MiniGPTModel(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MiniGPTForQuestionAnswering(GenericForQuestionAnswering, MiniGPTPreTrainedModel):
    """Start and end position of the answer in a text."""

    def __init__(self, config: MiniGPTConfig):
        MiniGPTPreTrainedModel.__init__(self, config)
        self.model = MiniGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "MiniGPTForCausalLM",
    "MiniGPTForQuestionAnswering",
    "MiniGPTForSequenceClassification",
    "MiniGPTForTokenClassification",
    "MiniGPTModel",
    "MiniGPTPreTrainedModel",
]

try:  # default targets of LoRA: PEFT reads them from this table by model type and offers no way to register them
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGET_MODULES
except ImportError:  # PEFT is not installed, or does not support this version of transformers; no model needs it to run
    LORA_TARGET_MODULES = {}
LORA_TARGET_MODULES["minigpt"] = ["q_proj", "v_proj"]  # as for Qwen3
