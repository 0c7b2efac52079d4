"""Load a model folder through every Auto class in a process without this package; compare, train, save and reload it.

    python load_elsewhere.py MODEL_FOLDER NATIVE_FOLDER OUTPUT_FOLDER EXPECTED.pt

EXPECTED.pt holds the reference outputs of the process that saved the folder; its native twin in NATIVE_FOLDER is loaded
without `trust_remote_code`. Prints one line on success; any difference is an AssertionError. Started by
`tests/model/test_remote_code.py` and `scripts/compat.py`.
"""

import sys

import torch
import transformers

sys.modules["minigpt_hf"] = None  # makes importing it fail: only the remote code in the folder is available

folder, native, output_folder, expected = *sys.argv[1:4], torch.load(sys.argv[4])
torch.set_num_threads(1)
ids = expected["ids"]
HEADS = "CausalLM SequenceClassification TokenClassification QuestionAnswering"
for name in ("AutoModel", *(f"AutoModelFor{head}" for head in HEADS.split())):
    auto = getattr(transformers, name)
    model = auto.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    base_model = model if name == "AutoModel" else model.model
    for buffer in ("inv_freq", "original_inv_freq"):
        assert torch.equal(base_model.rotary_emb.get_buffer(buffer), expected["inv_freq"]), (name, buffer)
    output = model(input_ids=ids)
    if name == "AutoModelForCausalLM":
        assert torch.equal(output.logits, expected["logits"])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for strategy, options, tokens in expected["generated"]:
            assert torch.equal(model.generate(ids, **options), tokens), strategy
    # One training step, then save and reload, through this class and through AutoModel.
    output[0].float().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.save_pretrained(f"{output_folder}/{name}")
    reloaded = auto.from_pretrained(f"{output_folder}/{name}", trust_remote_code=True)
    assert torch.equal(reloaded(input_ids=ids)[0], model(input_ids=ids)[0]), name
    transformers.AutoModel.from_pretrained(f"{output_folder}/{name}", trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
from_config = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert from_config(input_ids=ids).logits.shape == expected["logits"].shape
assert transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("ab").input_ids == expected["tokens"]
twin = transformers.AutoModelForCausalLM.from_pretrained(native)
assert type(twin).__name__ == "Qwen3ForCausalLM"
assert torch.equal(twin(input_ids=ids).logits, expected["logits"])
for strategy, options, tokens in expected["generated"]:
    assert torch.equal(twin.generate(ids, **options), tokens), strategy
assert transformers.AutoTokenizer.from_pretrained(native)("ab").input_ids == expected["tokens"]
transformers.pipeline("text-generation", native)("ab", max_new_tokens=3)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: every Auto class loaded, all outputs equal")
