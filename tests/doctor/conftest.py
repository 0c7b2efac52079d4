"""Whole folders to look over, and what it takes to break one."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config


class Broken:
    """A copy of a whole folder, beside which lies `outside/`: to be spoilt in one way."""

    def __init__(self, source: Path, place: Path):
        self.path = place / "folder"
        self.outside = place / "outside"
        self.outside.mkdir(parents=True)
        self.canary = self.outside / "canary"  # exists once something has run
        shutil.copytree(source, self.path)

    def json(self, name: str, **changes) -> None:
        """Set keys of a JSON file; None deletes one."""
        content = json.loads((self.path / name).read_text(encoding="utf-8"))
        content = {
            key: value for key, value in {**content, **changes}.items() if value is not None or key not in changes
        }
        (self.path / name).write_text(json.dumps(content), encoding="utf-8")

    def get(self, name: str) -> dict:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text(encoding="utf-8")
        assert old in text, old
        (self.path / name).write_text(text.replace(old, new), encoding="utf-8")

    def append(self, name: str, text: str) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def write(self, name: str, content: bytes | str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def delete(self, name: str) -> None:
        (self.path / name).unlink()

    def tensors(self, change) -> None:
        """Load the weights, change the dict of tensors, save them."""
        kept = load_file(self.path / "model.safetensors")
        change(kept)
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, self.path / "model.safetensors")


class Watch:
    """Which files this process opens, by Python's own audit: a hook cannot be taken away, so there is one for all tests."""

    def __init__(self):
        self.opened: list[str] | None = None
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple) -> None:
        if event == "open" and self.opened is not None:
            self.opened.append(str(args[0]))


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def broken(run_folder, tmp_path) -> Broken:
    return Broken(run_folder / "model", tmp_path)


def make_twin(source: Path, folder: Path) -> Path:
    """The native twin: another configuration beside the same weights, and no code."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py"))
    ours = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shared = {name: ours[name] for name in Qwen3Config().to_dict() if name in ours and name != "model_type"}
    Qwen3Config(**{**shared, "architectures": ["Qwen3ForCausalLM"]}).save_pretrained(folder)
    return folder
