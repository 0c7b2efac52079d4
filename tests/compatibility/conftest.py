"""The reference of these tests: a `Qwen3ForCausalLM` with the same weights.

Logits of MiniGPT are bit-identical to those of its Qwen3 twin (tests/model/test_modeling.py). Every feature of
transformers must therefore give the same tokens and the same values with both.
"""

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from minigpt_hf import MiniGPTForCausalLM
from tests.conftest import tiny_model


def twin_of(model: MiniGPTForCausalLM) -> Qwen3ForCausalLM:
    """Return the Qwen3 model with the same configuration and weights."""
    config = model.config.to_dict()
    shared = {name: config[name] for name in Qwen3Config().to_dict() if name in config and name != "model_type"}
    twin = Qwen3ForCausalLM._from_config(Qwen3Config(**shared), attn_implementation=model.config._attn_implementation)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = model.generation_config
    return twin.eval()


@pytest.fixture(params=[None, 8], ids=["full", "sliding"])
def pair(request) -> tuple[MiniGPTForCausalLM, Qwen3ForCausalLM]:
    """A model and its Qwen3 twin, with full attention or a sliding window of 8 tokens."""
    model = tiny_model(use_sliding_window=request.param is not None, sliding_window=request.param)
    return model, twin_of(model)
