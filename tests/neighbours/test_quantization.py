"""Quantization on CPU with torchao, bitsandbytes and a quantized cache: distance from the float32 logits.

The distance is the root mean square of the difference of the logits, after subtracting the mean of each position,
divided by the standard deviation of the float32 logits: 0 means equal logits, 1 a difference as large as their standard
deviation.
"""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantizedCache, TorchAoConfig

from minigpt_hf import MiniGPTForCausalLM

# method -> (configuration, maximum distance, maximum size of the matrices relative to float32)
METHODS = {
    "torchao int8 weight-only": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 0.01, 0.30),
    "bitsandbytes int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.015, 0.30),
    # bitsandbytes 0.50 on CPU requires widths that are multiples of its block size, 64: exclude `down_proj` (352).
    "bitsandbytes nf4": (
        lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "down_proj"]
        ),
        0.1,
        0.40,
    ),
}


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    logits, reference = (values - values.mean(-1, keepdim=True) for values in (logits.float(), reference))
    return ((logits - reference).pow(2).mean().sqrt() / reference.std()).item()


@pytest.fixture
def ids(tokenizer, prompts) -> torch.Tensor:
    return tokenizer("\n".join(prompts), return_tensors="pt").input_ids


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_quantized_weights_stay_within_the_distance_and_load_equal(method, trained, model, ids, tmp_path):
    make_config, limit, size_limit = METHODS[method]
    reference = model(ids).logits
    quantized = AutoModelForCausalLM.from_pretrained(
        trained, quantization_config=make_config(), dtype=torch.float32, device_map="cpu"
    ).eval()
    # Save before inference: on CPU, bitsandbytes 0.50 repacks 4-bit weights at the first use.
    quantized.save_pretrained(tmp_path)
    logits = quantized(ids).logits
    difference = distance(logits, reference)
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
    print(f"{method}: distance {difference:.4f}, equal top-1 tokens at {agreement:.1%} of the positions")
    assert 0 < difference < limit

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu").eval()
    assert torch.equal(reloaded(ids).logits, logits)
    # Only the matrices are quantized; embeddings and norm weights keep their size.
    unquantized = sum(
        weight.nbytes for name, weight in model.state_dict().items() if "proj" not in name and "lm_head" not in name
    )
    matrices = sum(weight.nbytes for name, weight in model.state_dict().items() if "proj" in name)
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    print(f"saved {saved:,} bytes; not quantized {unquantized:,}; matrices {matrices:,} in float32")
    assert saved < unquantized + size_limit * matrices + 50_000
    greedy = reloaded.generate(ids[:, :20], max_new_tokens=5, do_sample=False)
    assert greedy.shape == (1, 25)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.003), (4, 0.04)])
@torch.no_grad()
def test_a_cache_quantized_by_hqq_stays_within_the_distance(bits, limit, trained, tokenizer, prompts):
    """transformers quantizes only full attention caches; within the window of 65 tokens full attention is equal."""
    model = MiniGPTForCausalLM.from_pretrained(
        trained, use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 4
    ).eval()
    ids = tokenizer("\n".join(prompts), return_tensors="pt").input_ids[:, :64]
    reference = model(ids).logits
    settings = {"nbits": bits, "q_group_size": 32, "residual_length": 8, "axis_key": 1, "axis_value": 1}
    cache = QuantizedCache("hqq", model.config, **settings)
    logits = [model(ids[:, :20], past_key_values=cache).logits]
    logits += [model(ids[:, [position]], past_key_values=cache).logits for position in range(20, 64)]
    logits = torch.cat(logits, dim=1)
    difference = distance(logits[:, 20:], reference[:, 20:])
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
    print(f"hqq cache, {bits} bits: distance {difference:.4f}, equal top-1 tokens at {agreement:.1%} of the positions")
    assert 0 < difference < limit

    # `generate` accepts the cache by name. The prefill does not use quantized keys and values, so the first logits are
    # equal.
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache_options = {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", **settings}}
    batch = ids[:, :60].reshape(3, 20)  # a single position may deviate more than the mean
    quantized, unquantized = model.generate(batch, **cache_options, **options), model.generate(batch, **options)
    assert type(quantized.past_key_values) is QuantizedCache
    assert torch.equal(quantized.logits[0], unquantized.logits[0])
    assert 0 < distance(quantized.logits[1], unquantized.logits[1]) < limit
