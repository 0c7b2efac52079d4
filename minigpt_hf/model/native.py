"""The configuration of the native twin: the same model as `Qwen3ForCausalLM` of transformers, with the same weights."""

from typing import Any

from transformers import Qwen3Config

from .configuration_minigpt import MiniGPTConfig


def qwen3_settings(config: MiniGPTConfig, context: int | None = None) -> dict[str, Any]:
    """Return the content of the twin's `config.json`.

    Every value of the architecture is stated, because the defaults of Qwen3 differ (head dimension 128, no sliding window).

    Args:
        context: Maximum context in tokens, for engines without sliding windows: the twin gets full attention, which is the
            same function up to the length of the window. Default: the sliding windows of the model.
    """
    source = config.to_dict()
    settings = {name: source[name] for name in Qwen3Config.__annotations__ if name in source}
    settings |= {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": source["dtype"],
        "transformers_version": source["transformers_version"],
        "attention_bias": False,
        "rope_theta": source["rope_parameters"]["rope_theta"],  # read by transformers 4 and older engines
        "tokenizer_fingerprint": source["tokenizer_fingerprint"],  # ignored by Qwen3, and checked by `--init_from`
    }
    for name in ("initializer_range", "rms_norm_eps"):
        settings[name] = float(settings[name])  # declared as floats by Qwen3
    if context is not None:
        settings |= {
            "max_position_embeddings": context,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
        }
    return settings
