"""Run the JavaScript of an exported page under node."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt_hf.export.html import export_html
from minigpt_hf.publish.model_folder import save_model_files

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def ask(page: Path, *requests: dict[str, Any]) -> list[Any]:
    """Return the results of requests to `page.js`."""
    argv = ["node", Path(__file__).with_name("page.js"), page]
    done = subprocess.run(argv, input=json.dumps(requests), capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def exported_page(model, tokenizer, folder: Path, dtype: str | None = "float32") -> Path:
    """Save a model and export it, and return the page."""
    save_model_files(model, tokenizer, folder / "model")
    (page,) = export_html(folder / "model", folder / "page", dtype).iterdir()
    return page


def greedy(model, prompt: list[int], new_tokens: int) -> list[int]:
    """The new tokens of `generate`."""
    inputs = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(inputs), "do_sample": False, "max_new_tokens": new_tokens}
    return model.generate(inputs, **options)[0, len(prompt) :].tolist()
