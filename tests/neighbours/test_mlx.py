"""MLX loads the exported Qwen3 model: equal token ids, logits and greedy text."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import load, stream_generate

from minigpt_hf.export.native import export_native
from tests.neighbours.conftest import RECIPE

CONTEXT = 64  # mlx-lm's Qwen3 does not support sliding windows: export with a context within the window


@pytest.fixture(scope="module")
def twin(trained, tmp_path_factory):
    folder = export_native(trained, tmp_path_factory.mktemp("twin") / "model", context=CONTEXT)
    assert f"block_size: {CONTEXT}" in RECIPE
    return load(str(folder))


def test_token_ids_equal_those_of_the_tokenizer(twin, tokenizer, prompts):
    for prompt in prompts:
        assert twin[1].encode(prompt) == tokenizer.encode(prompt)
        assert twin[1].decode(twin[1].encode(prompt)) == prompt


def test_logits_equal_those_of_the_model(twin, model, tokenizer, prompts):
    """Both compute in float32, with sums in different order: absolute tolerance 1e-5."""
    text = "\n".join(prompts)
    ids = tokenizer(text).input_ids[:CONTEXT]
    assert len(ids) == CONTEXT
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    logits = np.array(twin[0](mx.array([ids])).astype(mx.float32))[0]
    print("maximum difference", np.abs(logits - expected).max(), "maximum logit", np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


def test_greedy_tokens_equal_those_of_generate(twin, model, tokenizer, prompts):
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
        assert [response.token for response in stream_generate(*twin, prompt, max_tokens=30)] == expected
