"""A saved folder loads in a process that does not have this package, through every Auto class, and saves again."""

import os
import subprocess
import sys

import torch

from tests.conftest import random_ids, tiny_model

IN_A_CLEAN_PROCESS = """
import sys
sys.modules["minigpt_hf"] = None  # importing it fails: the folder has to do without
import torch, transformers
folder, again, ids, expected, buffer = sys.argv[1], sys.argv[2], *torch.load(sys.argv[3])
names = "AutoModel AutoModelForCausalLM AutoModelForSequenceClassification"
names += " AutoModelForTokenClassification AutoModelForQuestionAnswering"
for name in names.split():
    auto = getattr(transformers, name)
    model = auto.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    body = model if name == "AutoModel" else model.model
    assert torch.equal(body.rotary_emb.inv_freq, buffer), name
    assert torch.equal(body.rotary_emb.original_inv_freq, buffer), name
    tuned = model(input_ids=ids)
    if name == "AutoModelForCausalLM":
        assert torch.equal(tuned.logits, expected)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert greedy.shape == (2, ids.shape[1] + 5)
    # Fine-tune one step, save, load what was saved.
    output = tuned[0].float().sum()
    output.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.save_pretrained(f"{again}/{name}")
    reloaded = auto.from_pretrained(f"{again}/{name}", trust_remote_code=True)
    assert torch.equal(reloaded(input_ids=ids)[0], model(input_ids=ids)[0]), name
    # And through another class than the one that was saved.
    transformers.AutoModel.from_pretrained(f"{again}/{name}", trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert fresh(input_ids=ids).logits.shape == expected.shape
print("all loaded")
"""


def test_a_process_without_the_package_loads_trains_and_saves_every_class(tmp_path):
    model, ids = tiny_model(), random_ids(2, 10)
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    torch.save([ids, model(ids).logits, model.model.rotary_emb.inv_freq], tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CLEAN_PROCESS, folder, tmp_path / "again", tmp_path / "expected.pt"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("all loaded\n"), done.stderr
