"""Attention by any kernel is the same function; rotary scaling extends a trained folder by its configuration alone."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from minigpt_hf import MiniGPTForCausalLM
from tests.compatibility.conftest import twin_of
from tests.conftest import random_ids, tiny_config, tiny_model

KERNELS = ["eager", "sdpa", "flex_attention"]
WINDOWS = pytest.mark.parametrize("window", [None, 8], ids=["full", "sliding"])


@pytest.fixture(autouse=True)
def flex_as_written():
    """Flex attention is made to be compiled, which takes minutes on a CPU; uncompiled it computes the same function."""
    with torch.compiler.set_stance("force_eager"):
        yield


def attending(kernel: str, window: int | None) -> MiniGPTForCausalLM:
    return tiny_model(attn_implementation=kernel, use_sliding_window=window is not None, sliding_window=window)


def padded(ids: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


# -- kernels ------------------------------------------------------------------------------------------------------------


@WINDOWS
@pytest.mark.parametrize("kernel", KERNELS[1:])
@torch.no_grad()
def test_a_kernel_gives_the_logits_of_the_written_out_attention(kernel, window):
    batch = padded(random_ids(2, 24), 5)
    logits = [attending(name, window)(**batch).logits[batch["attention_mask"].bool()] for name in ("eager", kernel)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


@WINDOWS
def test_sdpa_gives_the_gradients_of_the_written_out_attention(window):
    """Flex attention has no backward pass on a CPU."""
    batch, gradients = padded(random_ids(2, 24), 5), []
    # The token after the padding is not learnt: what stands before it sees nothing, and each kernel fills that in its way.
    labels = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    for kernel in ("eager", "sdpa"):
        model = attending(kernel, window)
        model(**batch, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@WINDOWS
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_a_kernel_continues_from_a_cache(kernel, window):
    model, ids = attending(kernel, window), random_ids(2, 24)
    cache, reference = DynamicCache(config=model.config), attending("eager", window)(ids).logits
    logits = [model(part, past_key_values=cache).logits for part in ids.split([13, 1, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), reference, atol=1e-5, rtol=0)


@WINDOWS
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other_with_a_kernel(kernel, window):
    model, ids = attending(kernel, window), random_ids(1, 24)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [attending("eager", window)(part).logits for part in ids.split([9, 15], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_kernel_can_be_changed_at_any_time():
    model, ids = attending("eager", None), random_ids(1, 24)
    for kernel in KERNELS:
        model.set_attn_implementation(kernel)
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {kernel}
        assert torch.equal(model(ids).logits, attending(kernel, None)(ids).logits)
    with pytest.raises(ValueError, match="attn_implementation"):
        model.set_attn_implementation("no_such_kernel")


# -- rotary scaling -----------------------------------------------------------------------------------------------------

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 4.0, **LLAMA3},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_trained_folder_is_extended_by_its_configuration_alone(kind, tmp_path):
    """Four times the context of 64: logits, cached or not, and text, are those of the twin under the same scaling."""
    tiny_model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind]}
    if kind != "dynamic":  # which reads off the length how far it has to reach
        settings["max_position_embeddings"] = 256
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(1, 200)
    twin = twin_of(model)
    for length in (200, 20):  # the short one last: dynamic scaling has to come back
        assert torch.equal(model(ids[:, :length]).logits, twin(ids[:, :length]).logits)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids[:, :100], **options), twin.generate(ids[:, :100], **options))
    assert not torch.allclose(model(ids).logits, tiny_model()(ids).logits, atol=1e-2)


def test_scaled_angles_are_those_of_the_papers():
    """θ^(-2i/D) for D = 8; context 64, four times as long."""

    def frequencies(kind: str) -> list[float]:
        rope = {"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind]}
        return MiniGPTForCausalLM(tiny_config(rope_parameters=rope)).model.rotary_emb.inv_freq.tolist()

    plain = [1.0, 0.1, 0.01, 0.001]
    assert frequencies("linear") == pytest.approx([f / 4 for f in plain])
    # llama3: wavelengths below 64 / 4 = 16 stay, those above 64 / 1 are stretched by 4. 2π/1 = 6.3 and 2π/0.1 = 62.8:
    # between the two it slides, by (64 / 62.8 - 1) / (4 - 1).
    slide = (64 / (2 * math.pi / 0.1) - 1) / 3
    expected = [1.0, (1 - slide) * 0.1 / 4 + slide * 0.1, 0.01 / 4, 0.001 / 4]
    assert frequencies("llama3") == pytest.approx(expected)
