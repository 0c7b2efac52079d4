"""The program of a Space, started as on the Hub with the real Gradio, against the local Hub server."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradio_client import Client
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.publish.push import push_folder
from tests.neighbours.conftest import CHAT_TEMPLATE

TOKENS = 12


@contextmanager
def running(space: str, hub, place: Path) -> Iterator[Client]:
    """Download a Space, start its `app.py` in a process without this package, and connect to it."""
    folder = snapshot_download(space, repo_type="space", local_dir=place / "space")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "home")}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-P", "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (place / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield Client(f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False)
    finally:
        server.terminate()
        server.wait(timeout=30)


def greedy(folder: Path, ids) -> str:
    tokens = MiniGPTForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return AutoTokenizer.from_pretrained(folder).decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_demo_continues_a_text_greedily_as_the_model_does(run_folder, hub, tmp_path):
    model = run_folder / "model"
    push_folder(model, "user/tiny", space="user/tiny")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with running("user/tiny", hub, tmp_path) as client:
        for prompt in ("def f", "a<|endoftext|>b", "é" * 300):  # the last one is longer than half of the context
            ids = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).input_ids[:, -256:]
            assert client.predict(prompt, TOKENS, 0, api_name="/continue") == prompt + greedy(model, ids)
        ids = tokenizer(tokenizer.bos_token, return_tensors="pt").input_ids
        assert client.predict("", TOKENS, 0, api_name="/continue") == greedy(model, ids)
        assert client.predict("def f", TOKENS, 1.0, api_name="/continue").startswith("def f")


def test_the_demo_of_a_model_with_a_chat_template_is_a_chat(run_folder, hub, tmp_path):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["recipe"]["system"] = "Be brief."
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    push_folder(folder, "user/chat", space="user/chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def reply(*messages: str) -> str:
        system = {"role": "system", "content": "Be brief."}
        turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(messages)]
        ids = tokenizer.apply_chat_template([system, *turns], add_generation_prompt=True, return_tensors="pt").input_ids
        return greedy(folder, ids)

    with running("user/chat", hub, tmp_path) as client:
        first = client.predict("hello", TOKENS, 0, api_name="/chat")
        assert first == reply("hello")
        # The client keeps the history of the conversation.
        assert client.predict("more", TOKENS, 0, api_name="/chat") == reply("hello", first, "more")
