"""Fewer bits, on CPU: torchao, bitsandbytes and the quantized cache stay within a stated distance of the float32 logits.

The distance is the root mean square of the difference of two models' logits, each relative to the mean of its position,
over the standard deviation of the float32 ones: 0 is equal, 1 is as far as the logits differ among themselves.
"""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantizedCache, TorchAoConfig

from minigpt_hf import MiniGPTForCausalLM

# method -> (settings, largest distance, largest share of the float32 bytes of the matrices)
METHODS = {
    "torchao int8 weight-only": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 0.01, 0.30),
    "bitsandbytes int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.015, 0.30),
    # bitsandbytes 0.50 cannot take a width on CPU that is not a multiple of 64, its block: here `down_proj`, of 352.
    "bitsandbytes nf4": (
        lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "down_proj"]
        ),
        0.1,
        0.40,
    ),
}


def distance(logits: torch.Tensor, exact: torch.Tensor) -> float:
    logits, exact = (part - part.mean(-1, keepdim=True) for part in (logits.float(), exact))
    return ((logits - exact).pow(2).mean().sqrt() / exact.std()).item()


@pytest.fixture
def ids(tokenizer, prompts) -> torch.Tensor:
    return tokenizer("\n".join(prompts), return_tensors="pt").input_ids


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_quantized_weights_are_near_and_the_same_after_saving(method, trained, model, ids, tmp_path):
    make, limit, share = METHODS[method]
    exact = model(ids).logits
    small = AutoModelForCausalLM.from_pretrained(
        trained, quantization_config=make(), dtype=torch.float32, device_map="cpu"
    ).eval()
    small.save_pretrained(tmp_path)  # before it computes: bitsandbytes 0.50 repacks 4 bits at the first use on CPU
    logits = small(ids).logits
    far = distance(logits, exact)
    agree = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
    print(f"{method}: distance {far:.4f}, same best token at {agree:.1%} of the positions")
    assert 0 < far < limit

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu").eval()
    assert torch.equal(reloaded(ids).logits, logits)
    # What is not quantized (embeddings, norms) stays as large as it was; the matrices shrink.
    kept = sum(
        weight.nbytes for name, weight in model.state_dict().items() if "proj" not in name and "lm_head" not in name
    )
    full = sum(weight.nbytes for name, weight in model.state_dict().items() if "proj" in name)
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    print(f"saved {saved:,} bytes; whole {kept:,}; matrices {full:,} in float32")
    assert saved < kept + share * full + 50_000
    greedy = reloaded.generate(ids[:, :20], max_new_tokens=5, do_sample=False)
    assert greedy.shape == (1, 25)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.003), (4, 0.04)])
@torch.no_grad()
def test_a_cache_quantized_by_hqq_is_near(bits, limit, trained, tokenizer, prompts):
    """transformers quantizes caches of full attention only. Within the window of 65 tokens it is the same function."""
    model = MiniGPTForCausalLM.from_pretrained(
        trained, use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 4
    ).eval()
    ids = tokenizer("\n".join(prompts), return_tensors="pt").input_ids[:, :64]
    exact = model(ids).logits
    settings = {"nbits": bits, "q_group_size": 32, "residual_length": 8, "axis_key": 1, "axis_value": 1}
    cache = QuantizedCache("hqq", model.config, **settings)
    logits = [model(ids[:, :20], past_key_values=cache).logits]
    logits += [model(ids[:, [place]], past_key_values=cache).logits for place in range(20, 64)]
    logits = torch.cat(logits, dim=1)
    far = distance(logits[:, 20:], exact[:, 20:])
    agree = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
    print(f"hqq cache, {bits} bits: distance {far:.4f}, same best token at {agree:.1%} of the positions")
    assert 0 < far < limit

    # And `generate` takes it by name: the first token is computed before anything is quantized.
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    by_name = {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", **settings}}
    quantized, plain = model.generate(ids[:, :20], **by_name, **options), model.generate(ids[:, :20], **options)
    assert type(quantized.past_key_values) is QuantizedCache
    assert torch.equal(quantized.logits[0], plain.logits[0])
    assert 0 < distance(quantized.logits[1], plain.logits[1]) < limit
