"""A model that answers, in other programs: it is prompted with its template, and its answers end by themselves.

`transformers serve` with the OpenAI client, which is what Open WebUI uses, and vLLM. llama.cpp: `test_llama_cpp.py`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.cli import main
from minigpt_hf.export.native import export_native
from tests.neighbours.conftest import CACHE
from tests.neighbours.server import serving

WORDS = "red green blue white black one two three four five six seven eight nine ten".split()
LIMIT = 60  # tokens; more than any answer has


@pytest.fixture(scope="module")
def answering(trained, tmp_path_factory) -> Path:
    """The model folder of the recipe `chat`: repeats a word twice."""
    folder = tmp_path_factory.mktemp("answering")
    rows = [{"prompt": f"repeat {word}", "completion": f"{word} {word}"} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--recipe", "chat", "--init_from", trained, "--data", folder / "rows.jsonl", "--use_cpu"]
    argv += ["--validation_fraction", "0", "--block_size", "64", "--per_device_train_batch_size", "4"]
    argv += ["--max_steps", "60", "--output_dir", folder / "run"]
    assert main([str(word) for word in argv]) == 0
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def expected(answering) -> dict[str, list[int]]:
    """Question → ids of the answer, with the token that ends it."""
    model, tokenizer = (auto.from_pretrained(answering) for auto in (MiniGPTForCausalLM, AutoTokenizer))
    answers = {}
    for word in WORDS:
        messages = [{"role": "user", "content": f"repeat {word}"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = model.generate(**ids, max_new_tokens=LIMIT)[0, ids["input_ids"].shape[1] :].tolist()
        assert new[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and len(new) < LIMIT
        answers[f"repeat {word}"] = new
    return answers


@pytest.mark.parametrize("kind", ["remote code", "native twin"])
def test_answers_of_transformers_serve_end_by_themselves(kind, answering, expected, tmp_path):
    folder = answering if kind == "remote code" else export_native(answering, tmp_path / "native")
    tokenizer = AutoTokenizer.from_pretrained(answering)
    with serving(folder) as client:
        for question, ids in expected.items():
            options = {"model": str(folder), "messages": [{"role": "user", "content": question}], "max_tokens": LIMIT}
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            (choice,) = client.chat.completions.create(**options, temperature=0).choices
            assert (choice.message.content.strip(), choice.finish_reason) == (answer.strip(), "stop")
        pieces = [*client.chat.completions.create(**options, temperature=0, stream=True)]
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == answer
        assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "stop"


@pytest.mark.skipif(not (CACHE / "vllm").is_dir(), reason="vLLM is not installed: make neighbours")
def test_answers_of_vllm_end_by_themselves(answering, expected, tmp_path):
    twin = export_native(answering, tmp_path / "native")
    (tmp_path / "prompts.json").write_text(json.dumps([*expected]))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_NO_USAGE_STATS": "1"}
    script, python = Path(__file__).with_name("vllm_writes.py"), CACHE / "vllm" / "bin" / "python"
    argv = [python, script, twin, tmp_path / "prompts.json", tmp_path / "out.json", "--chat", "--tokens", str(LIMIT)]
    process = subprocess.run(argv, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=900)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == [*expected.values()]
