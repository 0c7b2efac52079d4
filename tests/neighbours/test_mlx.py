"""MLX loads the native twin: same ids, same logits, same greedy text."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import load, stream_generate

from minigpt_hf.publish.export.native import export_native
from tests.neighbours.conftest import TRAINING

CONTEXT = 64  # mlx-lm's Qwen3 knows no sliding window: the twin is made for the context within which it hides nothing


@pytest.fixture(scope="module")
def twin(trained, tmp_path_factory):
    folder = export_native(trained, tmp_path_factory.mktemp("twin") / "model", context=CONTEXT)
    assert f"block_size: {CONTEXT}" in TRAINING
    return load(str(folder))


def test_ids_are_those_of_our_tokenizer(twin, tokenizer, prompts):
    for prompt in prompts:
        assert twin[1].encode(prompt) == tokenizer.encode(prompt)
        assert twin[1].decode(twin[1].encode(prompt)) == prompt


def test_logits_are_ours(twin, model, tokenizer, prompts):
    """Another library's float32: sums in another order, 1e-5 relative to the largest logit."""
    text = "\n".join(prompts)
    ids = tokenizer(text).input_ids[:CONTEXT]
    assert len(ids) == CONTEXT
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].numpy()
    theirs = np.array(twin[0](mx.array([ids])).astype(mx.float32))[0]
    print("largest difference", np.abs(theirs - ours).max(), "of", np.abs(ours).max())
    np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=0)


def test_greedy_texts_are_those_of_generate(twin, model, tokenizer, prompts):
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
        theirs = [part.token for part in stream_generate(*twin, prompt, max_tokens=30)]
        assert theirs == written
