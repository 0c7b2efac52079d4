"""Fixtures: a copy of a valid model folder to damage, its native twin, and a record of opened files."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config


class Broken:
    """A copy of a valid model folder, to be damaged by a test, next to a folder `outside/`."""

    def __init__(self, source: Path, place: Path):
        self.path = place / "folder"
        self.outside = place / "outside"
        self.outside.mkdir(parents=True)
        self.canary = self.outside / "canary"  # created if code of the folder is executed
        shutil.copytree(source, self.path)

    def json(self, name: str, **changes) -> None:
        """Set keys of a JSON file; `None` deletes a key."""
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
        """Modify the weights, given as a dict of tensors."""
        stored = load_file(self.path / "model.safetensors")
        change(stored)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, self.path / "model.safetensors")


class Watch:
    """Records the files that this process opens. Audit hooks cannot be removed, so all tests share one."""

    def __init__(self):
        self.opened: list[str] | None = None
        sys.addaudithook(self._record)

    def _record(self, event: str, args: tuple) -> None:
        if event == "open" and self.opened is not None:
            self.opened.append(str(args[0]))


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def broken(run_folder, tmp_path) -> Broken:
    return Broken(run_folder / "model", tmp_path)


def make_twin(source: Path, folder: Path) -> Path:
    """Create the native twin: the same weights with a Qwen3 configuration and without code."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py"))
    ours = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shared = {name: ours[name] for name in Qwen3Config().to_dict() if name in ours and name != "model_type"}
    Qwen3Config(**{**shared, "architectures": ["Qwen3ForCausalLM"]}).save_pretrained(folder)
    return folder
