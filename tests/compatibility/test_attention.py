"""Attention implementations agree; RoPE scaling extends the context of a trained model by its configuration alone."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from minigpt_hf import MiniGPTForCausalLM
from tests.compatibility.conftest import twin_of
from tests.conftest import random_ids, tiny_config, tiny_model

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
WINDOWS = pytest.mark.parametrize("window", [None, 8], ids=["full", "sliding"])


@pytest.fixture(autouse=True)
def uncompiled_flex_attention():
    """Compiling flex attention takes minutes on a CPU; uncompiled it computes the same function."""
    with torch.compiler.set_stance("force_eager"):
        yield


def model_with(implementation: str, window: int | None) -> MiniGPTForCausalLM:
    return tiny_model(attn_implementation=implementation, use_sliding_window=window is not None, sliding_window=window)


def padded(ids: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


# -- implementations ---------------------------------------------------------------------------------------------------


@WINDOWS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@torch.no_grad()
def test_logits_equal_those_of_eager_attention(implementation, window):
    batch = padded(random_ids(2, 24), 5)
    logits = [
        model_with(name, window)(**batch).logits[batch["attention_mask"].bool()] for name in ("eager", implementation)
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


@WINDOWS
def test_sdpa_gradients_equal_those_of_eager_attention(window):
    """Flex attention does not support the backward pass on a CPU."""
    batch, gradients = padded(random_ids(2, 24), 5), []
    # The first token after the padding is not a label: its input is a padding position, which attends to nothing and
    # whose output differs between implementations.
    labels = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    for implementation in ("eager", "sdpa"):
        model = model_with(implementation, window)
        model(**batch, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@WINDOWS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_decoding_with_a_cache_equals_one_forward_pass(implementation, window):
    model, ids = model_with(implementation, window), random_ids(2, 24)
    cache, reference = DynamicCache(config=model.config), model_with("eager", window)(ids).logits
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split([13, 1, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), reference, atol=1e-5, rtol=0)


@WINDOWS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_packed_documents_do_not_attend_to_each_other(implementation, window):
    model, ids = model_with(implementation, window), random_ids(1, 24)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    single = [model_with("eager", window)(document).logits for document in ids.split([9, 15], dim=1)]
    torch.testing.assert_close(packed, torch.cat(single, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_set_attn_implementation_switches_every_layer():
    model, ids = model_with("eager", None), random_ids(1, 24)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {implementation}
        assert torch.equal(model(ids).logits, model_with(implementation, None)(ids).logits)
    with pytest.raises(ValueError, match="attn_implementation"):
        model.set_attn_implementation("unknown")


# -- RoPE scaling ------------------------------------------------------------------------------------------------------

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 4.0, **LLAMA3},
}


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_rope_scaling_in_config_json_extends_a_trained_model(rope_type, tmp_path):
    """Four times the context of 64: logits and generated tokens equal those of the Qwen3 twin with the same scaling."""
    tiny_model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALINGS[rope_type]}
    if rope_type != "dynamic":  # dynamic scaling derives its factor from the sequence length
        settings["max_position_embeddings"] = 256
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(1, 200)
    twin = twin_of(model)
    for length in (200, 20):  # the short one last: dynamic scaling must return to the original frequencies
        assert torch.equal(model(ids[:, :length]).logits, twin(ids[:, :length]).logits)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids[:, :100], **options), twin.generate(ids[:, :100], **options))
    assert not torch.allclose(model(ids).logits, tiny_model()(ids).logits, atol=1e-2)


def test_scaled_frequencies_equal_the_formulas_of_the_papers():
    """θ^(-2i/D) for D = 8, with the context of 64 extended by a factor of 4."""

    def frequencies(rope_type: str) -> list[float]:
        rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALINGS[rope_type]}
        return MiniGPTForCausalLM(tiny_config(rope_parameters=rope)).model.rotary_emb.inv_freq.tolist()

    original = [1.0, 0.1, 0.01, 0.001]
    assert frequencies("linear") == pytest.approx([f / 4 for f in original])
    # llama3: wavelengths below 64 / 4 = 16 are unchanged, those above 64 / 1 are multiplied by 4. The first two are
    # 2π/1 = 6.3 and 2π/0.1 = 62.8; the latter is interpolated with weight (64 / 62.8 - 1) / (4 - 1).
    weight = (64 / (2 * math.pi / 0.1) - 1) / 3
    expected = [1.0, (1 - weight) * 0.1 / 4 + weight * 0.1, 0.01 / 4, 0.001 / 4]
    assert frequencies("llama3") == pytest.approx(expected)
