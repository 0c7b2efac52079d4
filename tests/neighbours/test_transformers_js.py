"""transformers.js in node loads the ONNX export from the local Hub server and writes the text that the model writes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from minigpt_hf.export.onnx import export_onnx
from tests.neighbours.conftest import CACHE

NPM = CACHE / "npm"  # created by `make neighbours`
TOKENS = 40  # the longest prompt and its continuation exceed the window of 65 tokens
pytestmark = pytest.mark.skipif(
    not (NPM / "node_modules" / "@huggingface" / "transformers").is_dir(), reason="transformers.js is not installed"
)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    return export_onnx(trained, tmp_path_factory.mktemp("onnx") / "tiny")


def continuations(exported: Path, hub, dtype: str, prompts: list[str], place: Path) -> list[str]:
    files = [file for file in exported.rglob("*") if file.is_file()]
    hub.put("user/tiny", {file.relative_to(exported).as_posix(): file.read_bytes() for file in files})
    shutil.copy(Path(__file__).with_name("generate.mjs"), NPM)  # imports are resolved from the folder of the script
    argv = ["node", "generate.mjs", hub.endpoint, "user/tiny", dtype, str(TOKENS), place / "cache"]
    done = subprocess.run(argv, cwd=NPM, input=json.dumps(prompts), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def greedy(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_greedy_texts_of_twenty_prompts_are_equal_in_float32(exported, hub, model, tokenizer, prompts, tmp_path):
    prompts = [*prompts[:19], "".join(prompts)[:120]]
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    assert max(lengths) + TOKENS > model.config.sliding_window > min(lengths)
    assert continuations(exported, hub, "fp32", prompts, tmp_path) == [
        greedy(model, tokenizer, text) for text in prompts
    ]


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 18), ("q8", 8)])
def test_most_greedy_texts_are_equal_in_smaller_precisions(
    dtype, least, exported, hub, model, tokenizer, prompts, tmp_path, record_property
):
    texts = continuations(exported, hub, dtype, prompts, tmp_path)
    equal = sum(text == greedy(model, tokenizer, prompt) for text, prompt in zip(texts, prompts, strict=True))
    record_property("equal", equal)
    assert equal >= least
