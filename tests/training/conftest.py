"""A small training run, and functions that interrupt runs and compare them bit for bit."""

import json
import os
import shutil
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from minigpt_hf.cli import main

SMALL = """
tokenizer: bytes
block_size: 16
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
attention_dropout: 0.1
embedding_dropout: 0.1
residual_dropout: 0.1
validation_fraction: 0.0
per_device_train_batch_size: 2
max_steps: 8
warmup_steps: 2
logging_steps: 1
save_steps: 2
save_total_limit: 9
sample_tokens: 0
sample_prompt: ""
figures: false
use_cpu: true
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="session")
def words(tmp_path_factory, text):
    """421 tokens with the BOS token: 26 sequences of 16, so 13 steps of two sequences per epoch."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(text[:420])
    return file


def train(recipe, data, folder, *flags) -> int:
    argv = ["train", "--recipe", recipe, "--data", data, "--output_dir", folder, *flags]
    return main([str(word) for word in argv])


def call_on_ranks(function, number: int, folder: Path, *arguments) -> str:
    """Fork processes that call a function as the ranks of a run, with the imports of this process; return their output.

    Args:
        function: Called with the rank and the arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    output = folder / "output.txt"
    output.touch()
    # autograd cannot be used in a forked process after it has started threads for an accelerator.
    method = "spawn" if torch.accelerator.is_available() else "fork"
    arguments = (function, output, common, arguments)
    torch.multiprocessing.start_processes(_call_as_rank, arguments, nprocs=number, start_method=method)
    return output.read_text()


def _call_as_rank(rank: int, function, output: Path, common: dict, arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()})
    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainings in the parent process
    with output.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        function(rank, *arguments)


def rows(folder) -> list[dict]:
    """Loss, gradient norm and learning rate of each step, as logged."""
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: row[name] for name in names} for row in logged if "loss" in row]


def state_of(checkpoint) -> dict:
    """Weights, optimizer moments, schedule and RNG states of a checkpoint."""
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    files = {name: torch.load(checkpoint / name, weights_only=False) for name in names}
    return {"weights": load_file(checkpoint / "model.safetensors"), **files}


def assert_equal(one, other):
    """Compare nested containers and tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert (one == other) if not hasattr(one, "shape") else (one == other).all()


def go_back(folder, copy, step):
    """Copy a finished run to the state after an interruption right after the checkpoint of this step."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "model")
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
