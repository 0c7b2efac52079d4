"""ONNX: onnxruntime computes what torch computes, with a cache, in batches, beyond the window."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.data.tokenizer import END_OF_TEXT, byte_tokenizer, character_tokenizer
from minigpt_hf.export import onnx as module
from minigpt_hf.export.native import comparison_ids
from minigpt_hf.export.onnx import export_onnx
from minigpt_hf.export.onnx_runner import Runner, cache_names
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import random_ids, representative, tiny_model


@pytest.fixture(scope="module", params=representative(["one layer", "trained"], "one layer"))
def folder(request, tmp_path_factory):
    """A model folder with a sliding window of 33 tokens. Most of the time of an export is proportional to the layers."""
    if request.param == "trained":
        return request.getfixturevalue("run_folder") / "model"
    folder = tmp_path_factory.mktemp("onnx") / "model"
    model = tiny_model(vocab_size=258, num_hidden_layers=1, use_sliding_window=True, sliding_window=33)
    save_model_files(model, byte_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    return export_onnx(folder, tmp_path_factory.mktemp("onnx") / "out")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.slow
def test_the_folder_is_self_contained(exported):
    files = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    assert files == {
        *("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"),
        *("run_onnx.py", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "README.md"),
    }


def test_greedy_continuations_of_twenty_prompts_are_equal_beyond_the_window(exported, folder, model, text):
    runner, tokenizer = Runner(exported), AutoTokenizer.from_pretrained(folder)
    for start in range(0, 20_000, 1000):
        ids = runner.tokenizer.encode(text[start : start + 20]).ids
        assert ids == tokenizer(text[start : start + 20]).input_ids
        inputs = torch.tensor([ids])
        greedy = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=30)
        assert list(runner.generate(ids, 30)) == [token for token in greedy[0, len(ids) :].tolist() if token != 0]


def test_a_padded_batch_has_the_logits_of_its_rows(exported, model):
    session = Runner(exported).session
    ids, padding, layers = random_ids(2, 50), 7, model.config.num_hidden_layers
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, :padding] = 0
    cache = {name: np.zeros((2, 2, 0, 8), dtype=np.float32) for name in cache_names("past_key_values", layers)}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **cache}
    logits = session.run(["logits"], feed)[0]
    with torch.no_grad():
        np.testing.assert_allclose(logits[0], model(ids[:1]).logits[0], atol=1e-4, rtol=0)
        np.testing.assert_allclose(logits[1, padding:], model(ids[1:, padding:]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("graph", "largest"), [("model_fp16.onnx", 0.01), ("model_quantized.onnx", 0.1)])
def test_the_smaller_graphs_deviate_by_what_the_card_states(graph, largest, exported, model):
    """Token by token with the cache, beyond the window: the deviation is that of one pass over all tokens."""
    size = (exported / "onnx" / graph).stat().st_size
    assert size < (exported / "onnx" / "model.onnx").stat().st_size
    stated = float(re.search(rf"\| `onnx/{graph}` \| .* \| (\S+) \|", (exported / "README.md").read_text())[1])
    ids, runner, past, rows = comparison_ids(model.config), Runner(exported, graph), None, []
    for position in range(ids.shape[1]):
        logits, past = runner.forward(ids[:, position : position + 1].numpy(), past)
        rows.append(logits)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    difference = np.concatenate(rows, axis=1) - expected
    deviation = np.sqrt(np.square(difference).mean()) / expected.std()
    assert 0 < stated < largest
    assert deviation == pytest.approx(stated, rel=0.5)  # activations are quantized by their range in each call


def test_the_runner_drops_tokens_that_a_tokenizer_appends_to_a_prompt(exported):
    runner = Runner(exported)
    ids, end = runner.tokenizer.encode("def ").ids, runner.tokenizer.id_to_token(0)
    template = f"{end} $A {end}"
    runner.tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[(end, 0)])
    assert (runner.encode("def "), runner.encode("")) == ([0, *ids], [runner.bos_token_id])


def test_the_runner_writes_the_same_text_without_torch_or_transformers(exported, folder, model, tmp_path):
    code = "import sys, runpy; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['minigpt_hf'] = None; "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = [sys.executable, "-c", code, exported / "run_onnx.py", "--prompt", "def ", "--max_new_tokens", "40"]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    greedy = model.generate(**tokenizer("def ", return_tensors="pt"), do_sample=False, max_new_tokens=40)
    assert done.stdout == tokenizer.decode(greedy[0], skip_special_tokens=True) + "\n"


def test_the_runner_rejects_what_it_cannot_generate(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    character_tokenizer(["ab"]).save_pretrained(tmp_path / "out")
    for options, message in (
        (
            ["--graph", "absent.onnx"],
            "--graph absent.onnx: no such file in the folder onnx; it has model.onnx, model_fp16",
        ),
        (["--prompt", "z"], "the tokenizer cannot encode the prompt: "),
        (["--temperature", "-1"], "--temperature -1.0: must be at least 0"),
        (["--temperature", "nan"], "--temperature nan: must be at least 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
    ):
        argv = [sys.executable, tmp_path / "out" / "run_onnx.py", *options]
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr.splitlines()[-1]


def test_the_runner_warns_beyond_the_context(exported, folder, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    prompt = len(AutoTokenizer.from_pretrained(folder)("de").input_ids)
    full, sliding = (
        config | {"max_position_embeddings": 6, "layer_types": [f"{kind}_attention"]} for kind in ("full", "sliding")
    )
    for settings, new_tokens, warnings in ((full, 6 - prompt, 0), (full, 7 - prompt, 1), (sliding, 7 - prompt, 0)):
        (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
        argv = [sys.executable, tmp_path / "out" / "run_onnx.py", "--prompt", "de", "--max_new_tokens", str(new_tokens)]
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60, check=True)
        assert done.stderr.count("more than the 6 tokens of the context, beyond which the text may be") == warnings


def test_the_runner_and_the_card_state_that_the_chat_template_is_not_applied(chat_run, tmp_path, exported):
    out = export_onnx(chat_run / "model", tmp_path / "onnx")
    argv = [sys.executable, out / "run_onnx.py", "--prompt", "3 + 1", "--max_new_tokens", "1"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and "has a chat template, which this program does not apply" in done.stderr
    assert "it does not apply the chat template." in (out / "README.md").read_text()
    assert "chat template" not in (exported / "README.md").read_text()


def test_sampling_is_determined_by_the_seed(exported):
    runner = Runner(exported)
    drawn = [list(runner.generate([5, 6], 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_graph_of_another_model_fails_verification(exported, model):
    other = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(ValueError, match=r"its logits equal the model's within 0\.0001"):
        module._verify(exported, other)


def test_settings_of_generation_do_not_affect_the_verification(exported, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model.generation_config.update(repetition_penalty=5.0, num_return_sequences=2, stop_strings=["a"], do_sample=True)
    module._verify(exported, model)


def test_half_precision_is_rejected_and_weights_are_not_converted_implicitly(run_folder, tmp_path):
    with pytest.raises(ValueError, match="the ONNX export supports only float32, not float16"):
        export_onnx(run_folder / "model", tmp_path / "out", "float16")
    save_model_files(tiny_model(vocab_size=258).to(torch.bfloat16), byte_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"not bfloat16: .*--dtype float32 converts them without loss"):
        export_onnx(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_prompt_is_neither_truncated_nor_padded_and_generation_stops_where_generate_does(tmp_path):
    """A tokenizer is saved with the truncation and padding of its last call; `generation_config.json` has its own EOS."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=16, pad_id=1, pad_token="<|pad|>")
    tokenizer.bos_token = None  # documents are then separated by the EOS token
    model = tiny_model(vocab_size=258)
    prompt, special = "what is the", END_OF_TEXT
    ids = byte_tokenizer()(prompt, return_tensors="pt").input_ids
    continuation = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
    stop = continuation[5]
    model.generation_config.eos_token_id = [stop]
    save_model_files(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    out = export_onnx(tmp_path / "model", tmp_path / "out")

    runner = Runner(out)
    assert runner.bos_token_id == tokenizer.eos_token_id
    assert runner.tokenizer.encode(prompt).ids == ids[0].tolist()
    assert runner.tokenizer.encode(special).ids == [byte + 2 for byte in special.encode()]  # as text
    assert list(runner.generate(ids[0].tolist(), 20)) == continuation[: continuation.index(stop)]


def test_dynamic_rope_is_rejected(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    save_model_files(tiny_model(vocab_size=258, rope_parameters=rope), byte_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"scaled \(dynamic\) by the length of the sequence"):
        export_onnx(tmp_path / "model", tmp_path / "out")
