"""vLLM on CPU, in its own environment, generates the greedy tokens of `generate`.

The trained model is loaded as remote code, with the plugin of this package, and as native Qwen3 model. 100 tokens are
generated, more than the sliding window of 65, with one process and with tensor parallelism on two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt_hf.export.native import export_native
from tests.conftest import ROOT
from tests.neighbours.conftest import CACHE

PYTHON = CACHE / "vllm" / "bin" / "python"
TOKENS = 100


@pytest.fixture(scope="module")
def twin(trained, tmp_path_factory) -> Path:
    return export_native(trained, tmp_path_factory.mktemp("twin") / "model")


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """This package installed without dependencies, including its entry points."""
    folder = tmp_path_factory.mktemp("package")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", folder, ROOT], check=True, timeout=120)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", ["remote code", "plugin", "native twin"])
def test_twenty_greedy_continuations_equal_those_of_generate(
    method, processes, trained, twin, package, model, tokenizer, prompts, tmp_path
):
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    (tmp_path / "prompts.json").write_text(json.dumps(ids))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "VLLM_NO_USAGE_STATS": "1"}
    folder, flags = trained, ["--tokens", str(TOKENS), "--tensor_parallel_size", str(processes)]
    if method == "remote code":
        flags.append("--trust_remote_code")
    elif method == "plugin":
        env["PYTHONPATH"] = str(package)
    else:
        folder = twin
    script = Path(__file__).with_name("vllm_writes.py")
    argv = [PYTHON, script, folder, tmp_path / "prompts.json", tmp_path / "out.json", *flags]
    process = subprocess.run(argv, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=900)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]

    out = json.loads((tmp_path / "out.json").read_text())
    engine = "Qwen3ForCausalLM" if method == "native twin" else "TransformersForCausalLM"
    assert (out["class"], out["workers"]) == (engine, processes)
    expected = []
    for row in ids:
        sequences = model.generate(input_ids=torch.tensor([row]), max_new_tokens=TOKENS, do_sample=False)
        expected.append(sequences[0, len(row) :].tolist())
    assert out["tokens"] == expected
