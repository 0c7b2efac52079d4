"""`transformers serve FOLDER` and the OpenAI client: completions and chat, plain and streamed, sixteen at once."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from openai import OpenAI

from tests.neighbours.conftest import CHAT_TEMPLATE

TOKENS = 12
GREEDY = {"temperature": 0, "max_tokens": TOKENS}


@pytest.fixture(scope="module")
def folder(trained, tokenizer, tmp_path_factory) -> Path:
    """The trained folder with a chat template, as its maker would publish it for chats."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("served") / "model")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def client(folder):
    """The server runs the code that the folder carries: it does not import this package."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port), "--device", "cpu"]
    argv += ["--host", "127.0.0.1", "--trust-remote-code"]
    env = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"}
    with (folder.parent / "server.log").open("w") as log:
        server = subprocess.Popen(argv, env=env, cwd=folder.parent, stdout=log, stderr=subprocess.STDOUT)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None, (folder.parent / "server.log").read_text()
        try:
            with urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
            break
        except URLError:
            assert time.monotonic() < deadline, (folder.parent / "server.log").read_text()
            time.sleep(1)
    yield client
    server.terminate()
    server.wait(timeout=30)


def greedy(model, tokenizer, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    written = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


def joined(stream, text_of) -> str:
    return "".join(text_of(part.choices[0]) or "" for part in stream if part.choices)


def at_once(ask, questions: list[str]) -> list[str]:
    assert len(questions) == 16
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, questions))


@pytest.mark.parametrize("streamed", [False, True])
def test_sixteen_completions_at_once_are_what_generate_writes(streamed, client, folder, model, tokenizer, prompts):
    def ask(prompt: str) -> str:
        answer = client.completions.create(model=str(folder), prompt=prompt, stream=streamed, **GREEDY)
        return joined(answer, lambda choice: choice.text) if streamed else answer.choices[0].text

    assert at_once(ask, prompts[:16]) == [greedy(model, tokenizer, prompt) for prompt in prompts[:16]]


@pytest.mark.parametrize("streamed", [False, True])
def test_sixteen_chats_at_once_are_what_generate_writes(streamed, client, folder, model, tokenizer, prompts):
    def ask(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(model=str(folder), messages=messages, stream=streamed, **GREEDY)
        if streamed:
            return joined(answer, lambda choice: choice.delta.content)
        assert answer.usage.prompt_tokens == len(tokenizer(f"user: {prompt}\nassistant:").input_ids)
        return answer.choices[0].message.content

    expected = [greedy(model, tokenizer, f"user: {prompt}\nassistant:") for prompt in prompts[:16]]
    assert at_once(ask, prompts[:16]) == expected


def test_the_server_heeds_temperature_and_seed_because_the_folder_samples(client, folder):
    def ask(temperature: float, seed: int) -> str:
        options = {"temperature": temperature, "seed": seed, "max_tokens": TOKENS}
        return client.completions.create(model=str(folder), prompt="def ", **options).choices[0].text

    assert ask(1.0, 1) == ask(1.0, 1)
    assert len({ask(1.0, seed) for seed in range(4)}) > 1
    assert len({ask(0.01, seed) for seed in range(4)}) == 1
