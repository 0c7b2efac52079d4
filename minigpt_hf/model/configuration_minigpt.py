"""The configuration of a MiniGPT model: its architecture, validated when it is created.

This file is copied into every model folder; it imports nothing from the package.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# The class that each Auto class loads when a model folder is used as remote code, without this package installed.
AUTO_MAP = {
    "AutoConfig": "configuration_minigpt.MiniGPTConfig",
    "AutoModel": "modeling_minigpt.MiniGPTModel",
    "AutoModelForCausalLM": "modeling_minigpt.MiniGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minigpt.MiniGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_minigpt.MiniGPTForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_minigpt.MiniGPTForQuestionAnswering",
    # Decisions are derived from the logits of their labels. `transformers serve` loads models through this class.
    "AutoModelForDecision": "modeling_minigpt.MiniGPTForCausalLM",
}


@strict
class MiniGPTConfig(PreTrainedConfig):
    """Configuration of a MiniGPT model. Fields that Qwen3 has as well have the same meaning.

    Args:
        vocab_size: Number of token ids, including special tokens.
        hidden_size: Dimension of the residual stream. It need not equal `num_attention_heads` · `head_dim`.
        intermediate_size: Dimension of the feed-forward network. Default: 8/3 · `hidden_size`, rounded up to a multiple of
            32. SwiGLU has three matrices and the MLP of GPT-2 two, so 8/3 gives the parameter count of GPT-2's factor of 4.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads, each shared by a group of query heads (GQA, arXiv:2305.13245).
            Default: `num_attention_heads`.
        head_dim: Dimension of a head. Default: `hidden_size / num_attention_heads`.
        hidden_act: Activation function of the gate in the feed-forward network (`silu` makes it SwiGLU, arXiv:2002.05202).
        max_position_embeddings: Maximum sequence length in tokens.
        initializer_range: Standard deviation of the initial weights; for exceptions see `MiniGPTPreTrainedModel`.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        use_cache: Whether to return keys and values for the next generation step.
        tie_word_embeddings: Whether the language modeling head shares the embedding matrix (arXiv:1608.05859).
        rope_parameters: `rope_type`, `rope_theta` and the parameters of a scaled type, as defined by transformers.
        use_sliding_window, sliding_window, max_window_layers: If enabled, the layers from index `max_window_layers` on attend
            only to the last `sliding_window` tokens, including the current one.
        layer_types: `full_attention` or `sliding_attention` for each layer. Default: derived from the sliding window fields.
        attention_dropout: Dropout probability of attention weights.
        embedding_dropout: Dropout probability of embedding values.
        residual_dropout: Dropout probability of the output of each sublayer, before it is added to the residual stream.
        tokenizer_fingerprint: Hash of the tokenizer that the model was trained with. It is saved with the weights, so that a
            different tokenizer, whose ids have a different meaning, can be detected.

    Raises:
        ValueError, or `huggingface_hub.errors.StrictDataclassError` with one as its cause: if the architecture is invalid.
    """

    model_type = "minigpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    # Tensor parallelism: heads and feed-forward columns are split, and the output projection of each sublayer reduces. The
    # per-head norms are replicated but see only the heads of their rank, so their gradients are all-reduced.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # Pipeline parallelism: inputs and outputs of each stage.
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    layer_types: list[str] | None = None
    attention_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    tokenizer_fingerprint: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // (3 * 32)) * 32
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            heads = max(1, self.num_attention_heads)  # zero heads are rejected by `validate_architecture`
            if self.hidden_size % heads:
                raise ValueError(
                    f"`hidden_size` {self.hidden_size} does not divide into {heads} heads: "
                    "choose a multiple, or set `head_dim`"
                )
            self.head_dim = self.hidden_size // heads
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.layer_types is None:
            self.layer_types = [
                "sliding_attention" if self.sliding_window and layer >= self.max_window_layers else "full_attention"
                for layer in range(self.num_hidden_layers)
            ]
        super().__post_init__(**kwargs)
        # transformers would write only the entry of the class that is saved; a folder must load through every Auto class.
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read `config.json`. That of the native twin, of type `qwen3`, is accepted: its fields have the same meaning."""
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("model_type") == "qwen3":
            if settings.pop("attention_bias", False):
                raise ValueError("`attention_bias` is true, but MiniGPT has no biases: load the model as Qwen3")
            settings["model_type"] = cls.model_type
        return settings, kwargs

    def validate_architecture(self):
        """Check fields against each other. `@strict` calls this after construction and before saving."""
        super().validate_architecture()
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings"
        )
        for name in sizes.split():
            if (size := self.__dict__[name]) < 1:
                raise ValueError(f"`{name}` is {size}: it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` {self.num_attention_heads} is not a multiple of "
                f"`num_key_value_heads` {self.num_key_value_heads}: every key head serves a group of equal size"
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` is {self.head_dim}: rotary embeddings rotate pairs, so it must be even")
        if self.use_sliding_window and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(
                f"`sliding_window` is {self.sliding_window}: with `use_sliding_window` it must be at least 1"
            )
        for name in ("attention_dropout", "embedding_dropout", "residual_dropout"):
            if not 0 <= (share := self.__dict__[name]) < 1:
                raise ValueError(f"`{name}` is {share}: a dropout probability must be in [0, 1)")
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, ids in (("bos", [self.bos_token_id]), ("eos", eos), ("pad", [self.pad_token_id])):
            for token_id in ids:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"`{name}_token_id` {token_id} is not in the vocabulary: ids run from 0 to {self.vocab_size - 1}"
                    )


__all__ = ["MiniGPTConfig"]
