"""Shared fixtures: a tiny model (2 layers, width 32), a text, a local Hub, and a run folder trained once per session."""

import os
import tempfile

from tests.hub_server import HUB, TOKEN, HubServer

# Set before any Hugging Face library is imported: no network, separate caches, and the Hub server on loopback.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="minigpt-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_ENDPOINT"] = HUB.endpoint

import argparse
import gc
import json
import shutil
import signal
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch

from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
from minigpt_hf.cli import main

ROOT = Path(__file__).parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

TINY_RECIPE = """
tokenizer: bpe
vocab_size: 300
block_size: 32
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 2
use_sliding_window: true
per_device_train_batch_size: 4
max_steps: 40
logging_steps: 10
eval_steps: 20
save_steps: 20
validation_characters: 20000
sample_tokens: 10
sample_prompt: "def "
figures: false
use_cpu: true
"""


# A fine-tuning run on conversations.
CHAT_FLAGS = (
    "--recipe chat --use_cpu --block_size 64 --per_device_train_batch_size 2 --warmup_steps 2 "
    "--max_steps 8 --save_steps 2 --eval_steps 4 --logging_steps 1 --save_total_limit 9 --no_figures"
).split()


def representative(cases, *fast) -> list:
    """Values for `pytest.mark.parametrize`: `make test` runs the cases `fast`, `make test-slow` the others."""
    assert {*map(repr, fast)} <= {*map(repr, cases)}
    slow = pytest.mark.slow
    return [
        case if case in fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow)
        for case in cases
    ]


def pytest_configure():
    """Restore signals that are ignored when pytest is started by `nohup` or in the background of a script."""
    for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_finish():
    """Exclude the imported libraries from garbage collection, which the Trainer starts after each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def freeze():
    """Exclude what the tests of a module have imported, too."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def limit_file_size():
    """A function that sets the file size limit of this process, `ulimit -f`, until the end of the test."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> HubServer:
    """An empty Hub on loopback, and this process online with nothing cached, logged in as `user`. See `hub_server.py`."""
    HUB.reset(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return HUB


def tiny_config(**overrides) -> MiniGPTConfig:
    settings = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return MiniGPTConfig(**{**settings, **overrides})


def tiny_model(**overrides) -> MiniGPTForCausalLM:
    """A deterministic model with perturbed weights, so that norm weights differ from 1 and logits are not uniform."""
    torch.manual_seed(0)
    model = MiniGPTForCausalLM(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids without special tokens (0 and 1)."""
    return torch.randint(2, 99, shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def text() -> str:
    """A text available on every machine: the source code of argparse."""
    return Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "argparse.py"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(TINY_RECIPE, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def run_folder(text_file, recipe_file, tmp_path_factory) -> Path:
    """A run folder trained by `minigpt train`."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", folder, "--figures"]
    assert main([str(word) for word in argv]) == 0
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """60 additions, each followed by thanks."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with file.open("w") as lines:
        for i in range(60):
            contents = [f"{i} + 1", str(i + 1), "Thanks", "Bye."]
            roles = ["user", "assistant"] * 2
            messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="session")
def chat_run(run_folder, chats, tmp_path_factory) -> Path:
    """`run_folder`, fine-tuned for 8 steps with dropout."""
    return fine_tune(run_folder, chats, tmp_path_factory.mktemp("runs") / "chat", "--residual_dropout", "0.1")


def fine_tune(base: Path, chats: Path, folder: Path, *flags) -> Path:
    """Fine-tune the model of a run folder on conversations; return the new run folder."""
    argv = ["train", *CHAT_FLAGS, "--init_from", base / "model", "--data", chats, "--output_dir", folder, *flags]
    assert main([str(word) for word in argv]) == 0
    return folder
