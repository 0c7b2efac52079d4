"""TransformerLens and nnsight, on the native twin, see the residual stream and attention that this package computes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.export.native import export_native

LAYER = 1


@pytest.fixture(scope="module")
def twin(trained, tmp_path_factory) -> Path:
    return export_native(trained, tmp_path_factory.mktemp("native") / "twin")


@pytest.fixture(scope="module")
def ids(tokenizer) -> torch.Tensor:
    """More tokens than the sliding window, which is 65."""
    return torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer("def message(self, header):\n    return " * 12).input_ids]]
    )


@pytest.fixture(scope="module")
def outputs(trained, ids):
    model = MiniGPTForCausalLM.from_pretrained(trained, attn_implementation="eager").eval()
    assert ids.shape[1] > model.config.sliding_window
    with torch.no_grad():
        return model(ids, output_hidden_states=True, output_attentions=True)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4, rtol=0)


def test_residual_stream_and_attention_of_transformer_lens_are_equal(twin, ids, outputs):
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    lens = bridge.boot_transformers(str(twin), device="cpu")
    with torch.no_grad():
        logits, cache = lens.run_with_cache(ids)
    assert close(logits, outputs.logits)
    assert len(outputs.attentions) == 4
    for layer, attention in enumerate(outputs.attentions):
        assert close(cache[f"blocks.{layer}.hook_resid_pre"], outputs.hidden_states[layer])
        assert close(cache[f"blocks.{layer}.attn.hook_pattern"], attention)
    for layer in range(3):  # the last state is normalized in transformers
        assert close(cache[f"blocks.{layer}.hook_resid_post"], outputs.hidden_states[layer + 1])


def test_a_head_ablated_by_transformer_lens_contributes_nothing(twin, ids):
    """As if the rows of its output matrix were 0."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    lens = bridge.boot_transformers(str(twin), device="cpu")

    def ablate(value, hook):
        value[:, :, 0] = 0  # [B, T, heads, head dimension]
        return value

    with torch.no_grad():
        ablated = lens.run_with_hooks(ids, fwd_hooks=[(f"blocks.{LAYER}.attn.hook_z", ablate)])
        model = AutoModelForCausalLM.from_pretrained(twin, attn_implementation="eager").eval()
        intact = model(ids).logits
        model.model.layers[LAYER].self_attn.o_proj.weight[:, : model.config.head_dim] = 0
        expected = model(ids).logits
    assert close(ablated, expected)
    assert not close(ablated, intact)


def test_nnsight_reads_and_changes_the_residual_stream(twin, ids, outputs, tmp_path, monkeypatch):
    # By default, its import adds a method `save` to every object of the process, which hides the lazy `onnx_ir.save`.
    (tmp_path / "config.yaml").write_text("APP:\n  PYMOUNT: false\n")
    monkeypatch.setenv("NNSIGHT_CONFIG", str(tmp_path / "config.yaml"))
    nnsight = pytest.importorskip("nnsight")
    model = AutoModelForCausalLM.from_pretrained(twin, attn_implementation="eager").eval()
    sight = nnsight.TransformersModel(model, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(twin))
    with torch.no_grad(), sight.trace(ids):
        stream = nnsight.save(sight.model.layers[LAYER].output)
        logits = nnsight.save(sight.lm_head.output)
    assert close(stream, outputs.hidden_states[LAYER + 1])
    assert close(logits, outputs.logits)
    with torch.no_grad(), sight.trace(ids):
        sight.model.layers[LAYER].mlp.output[:] = 0
        changed = nnsight.save(sight.lm_head.output)
    with torch.no_grad():
        model.model.layers[LAYER].mlp.down_proj.weight.zero_()
        assert close(changed, model(ids).logits)
