"""vLLM on CPU, in an environment of its own, writes greedily what `generate` writes, token for token.

A trained folder is loaded in the three ways there are: with remote code; with this package's plugin and no remote code; and
as native twin with no code of ours at all. 100 tokens are written, past the window of 65, alone and on two processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt_hf.publish.export.native import export_native
from tests.conftest import ROOT
from tests.neighbours.conftest import KEPT

PYTHON = KEPT / "vllm" / "bin" / "python"
TOKENS = 100


@pytest.fixture(scope="module")
def twin(trained, tmp_path_factory) -> Path:
    return export_native(trained, tmp_path_factory.mktemp("twin") / "model")


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """This package and no dependencies, as installing its wheel lays it down: with its entry points."""
    folder = tmp_path_factory.mktemp("package")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", folder, ROOT], check=True, timeout=120)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("way", ["remote code", "plugin", "native twin"])
def test_twenty_greedy_texts_are_those_of_generate(
    way, processes, trained, twin, package, model, tokenizer, prompts, tmp_path
):
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    (tmp_path / "prompts.json").write_text(json.dumps(ids))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "VLLM_NO_USAGE_STATS": "1"}
    folder, flags = trained, ["--tokens", str(TOKENS), "--tensor_parallel_size", str(processes)]
    if way == "remote code":
        flags.append("--trust_remote_code")
    elif way == "plugin":
        env["PYTHONPATH"] = str(package)
    else:
        folder = twin
    script = Path(__file__).with_name("vllm_writes.py")
    argv = [PYTHON, script, folder, tmp_path / "prompts.json", tmp_path / "out.json", *flags]
    done = subprocess.run(argv, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    out = json.loads((tmp_path / "out.json").read_text())
    engine = "Qwen3ForCausalLM" if way == "native twin" else "TransformersForCausalLM"
    assert (out["class"], out["workers"]) == (engine, processes)
    expected = []
    for row in ids:
        written = model.generate(input_ids=torch.tensor([row]), max_new_tokens=TOKENS, do_sample=False)
        expected.append(written[0, len(row) :].tolist())
    assert out["tokens"] == expected
