"""`transformers serve` and the OpenAI client: concurrent completions and chat completions, also streamed."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minigpt_hf.export.native import export_native
from tests.neighbours.server import serving

TOKENS = 12
# ChatML. For models of type `qwen3`, the server extracts the reply from this format, unless the tokenizer defines another.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY = {"temperature": 0, "max_tokens": TOKENS}


@pytest.fixture(scope="module", params=["remote code", "native twin"])
def folder(request, trained, tokenizer, tmp_path_factory) -> Path:
    """The trained model folder with a chat template, or its native twin, which is what `minigpt push` publishes."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("served") / "model")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder if request.param == "remote code" else export_native(folder, folder.parent / "native")


@pytest.fixture(scope="module")
def client(folder):
    """Client of a server that does not import this package and runs the code of the folder, if there is any."""
    with serving(folder) as client:
        yield client


def chat(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def greedy(model, tokenizer, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    continuation = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(continuation, skip_special_tokens=True)


def join_stream(stream, text_of) -> str:
    return "".join(text_of(chunk.choices[0]) or "" for chunk in stream if chunk.choices)


def concurrently(complete, prompts: list[str]) -> list[str]:
    assert len(prompts) == 16
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(complete, prompts))


@pytest.mark.parametrize("streamed", [False, True])
def test_sixteen_concurrent_completions_equal_generate(streamed, client, folder, model, tokenizer, prompts):
    def complete(prompt: str) -> str:
        response = client.completions.create(model=str(folder), prompt=prompt, stream=streamed, **GREEDY)
        return join_stream(response, lambda choice: choice.text) if streamed else response.choices[0].text

    assert concurrently(complete, prompts[:16]) == [greedy(model, tokenizer, prompt) for prompt in prompts[:16]]


@pytest.mark.parametrize("streamed", [False, True])
def test_sixteen_concurrent_chat_completions_equal_generate(streamed, client, folder, model, tokenizer, prompts):
    def complete(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        response = client.chat.completions.create(model=str(folder), messages=messages, stream=streamed, **GREEDY)
        if streamed:
            return join_stream(response, lambda choice: choice.delta.content)
        assert response.usage.prompt_tokens == len(tokenizer(chat(prompt)).input_ids)
        return response.choices[0].message.content

    expected = [greedy(model, tokenizer, chat(prompt)) for prompt in prompts[:16]]
    # The server strips complete replies of models of type `qwen3`.
    assert [text.strip() for text in concurrently(complete, prompts[:16])] == [text.strip() for text in expected]


def test_the_server_applies_temperature_and_seed(client, folder):
    """The generation config of the folder enables sampling."""

    def complete(temperature: float, seed: int) -> str:
        options = {"temperature": temperature, "seed": seed, "max_tokens": TOKENS}
        return client.completions.create(model=str(folder), prompt="def ", **options).choices[0].text

    assert complete(1.0, 1) == complete(1.0, 1)
    assert len({complete(1.0, seed) for seed in range(4)}) > 1
    assert len({complete(0.001, seed) for seed in range(4)}) == 1
