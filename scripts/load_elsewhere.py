"""A folder in a process that does not have this package: load it through every Auto class, use it, train it, save it.

In: a folder, a folder to save into, and `expected.pt`, what the model computes where the package is. Out: one line, or an
error. `tests/model/test_remote_code.py` and `scripts/compat.py` start it, with an empty cache of modules and with other
releases of transformers.
"""

import sys

import torch
import transformers

sys.modules["minigpt_hf"] = None  # importing it fails: the folder has to do without

folder, again, expected = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
torch.set_num_threads(1)
ids = expected["ids"]
HEADS = "CausalLM SequenceClassification TokenClassification QuestionAnswering"
for name in ("AutoModel", *(f"AutoModelFor{head}" for head in HEADS.split())):
    auto = getattr(transformers, name)
    model = auto.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    body = model if name == "AutoModel" else model.model
    for buffer in ("inv_freq", "original_inv_freq"):
        assert torch.equal(body.rotary_emb.get_buffer(buffer), expected["inv_freq"]), (name, buffer)
    output = model(input_ids=ids)
    if name == "AutoModelForCausalLM":
        assert torch.equal(output.logits, expected["logits"])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for way, options, written in expected["written"]:
            assert torch.equal(model.generate(ids, **options), written), way
    # Fine-tune one step, save, load what was saved: through this class, and through another.
    output[0].float().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.save_pretrained(f"{again}/{name}")
    reloaded = auto.from_pretrained(f"{again}/{name}", trust_remote_code=True)
    assert torch.equal(reloaded(input_ids=ids)[0], model(input_ids=ids)[0]), name
    transformers.AutoModel.from_pretrained(f"{again}/{name}", trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert fresh(input_ids=ids).logits.shape == expected["logits"].shape
assert transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("ab").input_ids == expected["tokens"]
print(f"transformers {transformers.__version__}, torch {torch.__version__}: all loaded, all equal")
