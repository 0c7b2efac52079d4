"""PEFT: LoRA with default target modules trains, and gives equal logits after saving, loading and merging."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from minigpt_hf.export.native import export_native

PROMPT = "def get_payload(self, i=None, decode=False):"


def train(model: nn.Module, ids: torch.Tensor, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=["package", "native twin"])
def base(request, trained, tmp_path):
    return trained if request.param == "package" else export_native(trained, tmp_path / "twin")


def test_lora_without_target_modules_trains_saves_loads_and_merges(base, tokenizer, tmp_path):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    base_model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = {name: weight.clone() for name, weight in base_model.state_dict().items()}
    logits = base_model(ids).logits
    tuned = get_peft_model(base_model, LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted = {name.rsplit(".", 1)[-1] for name in tuned.base_model.targeted_module_names}
    assert adapted == {"q_proj", "v_proj"}
    assert torch.equal(tuned(input_ids=ids).logits, logits)  # B is initialized to 0

    losses = train(tuned, ids)
    assert losses[-1] < losses[0] - 0.1
    tuned.eval()
    after = tuned(input_ids=ids).logits
    assert (after - logits).abs().max() > 0.1
    tuned.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000

    base_model = AutoModelForCausalLM.from_pretrained(base).eval()
    loaded = PeftModel.from_pretrained(base_model, tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=ids).logits, after)
    with loaded.disable_adapter():
        assert torch.equal(loaded(input_ids=ids).logits, logits)

    # (W + BA)x and Wx + B(Ax) are rounded differently: 1e-4 in logits of about 10 (float32).
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, after, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(reloaded(input_ids=ids).logits, merged(input_ids=ids).logits)
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.rsplit(".", 2)[1] for name in changed} == {"q_proj", "v_proj"}


def test_an_adapter_folder_loads_through_the_auto_class(trained, tokenizer, tmp_path):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(trained), LoraConfig(task_type="CAUSAL_LM", r=4))
    train(tuned, ids, 3)
    tuned.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, tuned(input_ids=ids).logits)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["minigpt_hf"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
from peft import LoraConfig, get_peft_model  # imported after the model, to test that the order does not matter
tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
print(sorted({name.rsplit(".", 1)[-1] for name in tuned.base_model.targeted_module_names}))
"""


def test_remote_code_defines_default_target_modules(trained, tmp_path):
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    argv = [sys.executable, "-c", WITHOUT_THE_PACKAGE, trained]
    process = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.stdout == "['q_proj', 'v_proj']\n", process.stderr
