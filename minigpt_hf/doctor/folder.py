"""Read the regular files of a folder that is not trusted.

Links are listed but not followed, so no file outside the folder is opened. Each read has a size limit. What cannot be read
raises `Unreadable` with the reason.
"""

import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .row import NotApplicable

MEBI = 1 << 20
# Vocabularies are large (up to about 33 MiB); files with slower parsers have lower limits.
MAX_SIZE: dict[str, float] = {
    "tokenizer.json": 64,
    "vocab.json": 64,
    "merges.txt": 64,
    "model.safetensors.index.json": 64,
}
MAX_SIZE |= {".py": 1, ".jinja": 1, ".md": 0.25, ".yaml": 0.25, ".yml": 0.25}  # MiB, by name or suffix; 16 for others
MAX_ENTRIES = 10_000
# Links created after listing are not followed, and opening a pipe does not block.
NO_FOLLOW = 0 if os.name == "nt" else os.O_NOFOLLOW | os.O_NONBLOCK


class Unreadable(NotApplicable):
    """A file is missing, too large or invalid. The checks `files complete` and `files readable` report it."""


class Folder:
    """The files of a folder, by relative path (`figures/loss.png`).

    Args:
        path: The folder; the path may contain links.
        follow: Treat a link as its target if the target is in the folder or, for a snapshot in the cache of the Hub, among
            the blobs of the repository. Other links remain in `others`.

    Raises:
        ValueError: if there is no such folder, or it cannot be a model folder.
    """

    def __init__(self, path: str | os.PathLike[str], follow: bool = False):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"{path}: no such folder; give a model folder (one of the Hub: `hf download USER/NAME --local-dir FOLDER`)"
            )
        self.files: dict[str, int] = {}  # relative path -> size in bytes
        self.others: dict[str, str] = {}  # links, devices etc.: relative path -> description
        self._parsed: dict[str, dict[str, Any]] = {}
        self._link_targets: list[Path] = []  # folders that may contain the targets of links
        if follow:
            home = self.path.resolve()
            self._link_targets = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        self._list(self.path, "")
        if "config.json" not in self.files and "model/config.json" in self.files:
            raise ValueError(f"{path}: this is a run folder; its model folder is {self.path / 'model'}")

    def _list(self, path: Path, prefix: str) -> None:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    target = Path(entry.path).resolve()
                    if target.is_file() and any(target.is_relative_to(home) for home in self._link_targets):
                        self.files[name] = target.stat().st_size
                    else:
                        self.others[name] = "a link"
                elif stat.S_ISREG(status.st_mode):
                    self.files[name] = status.st_size
                elif stat.S_ISDIR(status.st_mode):
                    if name.count("/") < 8:
                        self._list(Path(entry.path), name + "/")
                    else:
                        self.others[name] = "a folder nine levels deep"
                else:
                    self.others[name] = "a device, a pipe or a socket"
                if len(self.files) + len(self.others) > MAX_ENTRIES:
                    raise ValueError(f"{self.path}: more than {MAX_ENTRIES:,} files; give a model folder")

    def open(self, name: str) -> BinaryIO:
        """Open a regular file of the folder for reading."""
        if name not in self.files:
            raise Unreadable(f"{name} is {self.others.get(name, 'missing')}")
        path = (self.path / name).resolve() if self._link_targets else self.path / name
        file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | NO_FOLLOW))  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise Unreadable(f"{name} is not a regular file")
        return file

    def bytes(self, name: str) -> bytes:
        """The content of a file, if it does not exceed the size limit."""
        most = int(MAX_SIZE.get(name, MAX_SIZE.get(PurePosixPath(name).suffix, 16)) * MEBI)
        with self.open(name) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise Unreadable(f"{name} has more than {most:,} bytes")
        return content

    def text(self, name: str) -> str:
        """The content of a UTF-8 file."""
        try:
            return self.bytes(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable(f"{name} is not UTF-8 (byte {error.start})") from error

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file. It is cached and must not be modified."""
        if name not in self._parsed:
            self._parsed[name] = parse_object(self.text(name), name)
        return self._parsed[name]

    def json_if_there(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, or an empty one if there is no such file."""
        return self.json(name) if name in self.files else {}


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object. Duplicate keys are an error, because parsers resolve them differently."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"duplicate key {key!r}")
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{name} is not a JSON object")
    return content


def is_minigpt(folder: Folder) -> bool:
    """Whether a folder is a MiniGPT or the native twin of one."""
    return folder.json_if_there("config.json").get("model_type") == "minigpt" or "minigpt.json" in folder.files
