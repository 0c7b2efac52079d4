"""The reference of these tests: a model of the library that holds the same weights.

MiniGPT's logits equal those of `Qwen3ForCausalLM` bit for bit (tests/model/test_modeling.py), so whatever transformers
does with one it has to do with the other, to the last bit and the last token.
"""

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from minigpt_hf import MiniGPTForCausalLM
from tests.conftest import tiny_model


def twin_of(model: MiniGPTForCausalLM) -> Qwen3ForCausalLM:
    ours = model.config.to_dict()
    shared = {name: ours[name] for name in Qwen3Config().to_dict() if name in ours and name != "model_type"}
    twin = Qwen3ForCausalLM._from_config(Qwen3Config(**shared), attn_implementation=model.config._attn_implementation)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = model.generation_config
    return twin.eval()


@pytest.fixture(params=[None, 8], ids=["full", "sliding"])
def pair(request) -> tuple[MiniGPTForCausalLM, Qwen3ForCausalLM]:
    """A model and its twin: attention over everything, or through a window of eight tokens."""
    model = tiny_model(use_sliding_window=request.param is not None, sliding_window=request.param)
    return model, twin_of(model)
