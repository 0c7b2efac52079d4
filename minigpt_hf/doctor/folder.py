"""A folder on disk -> its regular files, read with care.

Nothing outside the folder is opened: links are listed, never followed. Nothing that a file claims about its size is
believed: each read has a limit of its own. What cannot be read raises `Unreadable`, with the reason.
"""

import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .row import NotApplicable

MEBI = 1 << 20
# Vocabularies may be long (the largest have some 33 MiB); what is parsed as a language has to be shorter.
LONGEST = {"tokenizer.json": 64, "vocab.json": 64, "merges.txt": 64, "model.safetensors.index.json": 64}
LONGEST |= {".py": 1, ".jinja": 1, ".md": 0.25, ".yaml": 0.25, ".yml": 0.25}  # MiB, by name or suffix; 16 for others
MOST_ENTRIES = 10_000
# A link that appears between listing and opening is refused, and opening a pipe does not wait for its other end.
NO_FOLLOW = 0 if os.name == "nt" else os.O_NOFOLLOW | os.O_NONBLOCK


class Unreadable(NotApplicable):
    """A file that is absent, too big or not of its form. The rows `files complete` and `files readable` fail for it."""


class Folder:
    """The files of a folder, by their path in it (`figures/loss.png`).

    Args:
        path: The folder itself may be reached through a link; nothing in it may.
        follow: Count a link as the file it stands for if that file lies in the folder, or, for a snapshot in the cache of
            the Hub, among the blobs of its repository. Other links stay in `others`.

    Raises:
        ValueError: if there is no such folder, or it cannot be a model folder.
    """

    def __init__(self, path: str | Path, follow: bool = False):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"{path}: no such folder; give a model folder (one of the Hub: `hf download USER/NAME --local-dir FOLDER`)"
            )
        self.files: dict[str, int] = {}  # path in the folder -> bytes
        self.others: dict[str, str] = {}  # what is neither file nor folder -> what it is
        self._parsed: dict[str, dict[str, Any]] = {}
        self._homes: list[Path] = []  # where the target of a link may lie
        if follow:
            home = self.path.resolve()
            self._homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        self._list(self.path, "")
        if "config.json" not in self.files and "model/config.json" in self.files:
            raise ValueError(f"{path}: this is a run; its model is in {self.path / 'model'}")

    def _list(self, path: Path, prefix: str) -> None:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    target = Path(entry.path).resolve()
                    if target.is_file() and any(target.is_relative_to(home) for home in self._homes):
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
                if len(self.files) + len(self.others) > MOST_ENTRIES:
                    raise ValueError(f"{self.path}: more than {MOST_ENTRIES:,} files; give a model folder")

    def open(self, name: str) -> BinaryIO:
        """A regular file of the folder, for reading."""
        if name not in self.files:
            raise Unreadable(f"{name} is {self.others.get(name, 'missing')}")
        path = (self.path / name).resolve() if self._homes else self.path / name
        file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | NO_FOLLOW))  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise Unreadable(f"{name} is no regular file")
        return file

    def bytes(self, name: str) -> bytes:
        """The whole of a file, if it is no longer than a text may be."""
        most = int(LONGEST.get(name, LONGEST.get(PurePosixPath(name).suffix, 16)) * MEBI)
        with self.open(name) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise Unreadable(f"{name} has more than {most:,} bytes")
        return content

    def text(self, name: str) -> str:
        """A UTF-8 file."""
        try:
            return self.bytes(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable(f"{name} is not UTF-8 (byte {error.start})") from error

    def json(self, name: str) -> dict[str, Any]:
        """A file that holds one JSON object; it is parsed once, and not to be changed."""
        if name not in self._parsed:
            self._parsed[name] = parse_object(self.text(name), name)
        return self._parsed[name]

    def json_if_there(self, name: str) -> dict[str, Any]:
        """The same, or nothing if there is no such file."""
        return self.json(name) if name in self.files else {}


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """JSON -> a dict. A key that is there twice is refused: two programs would read two different things."""

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"the key {key!r} is there twice")
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{name} is not sound JSON: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{name} holds no JSON object")
    return content


def is_minigpt(folder: Folder) -> bool:
    """Whether a folder is one of ours: a MiniGPT, or the native twin of one."""
    return folder.json_if_there("config.json").get("model_type") == "minigpt" or "minigpt.json" in folder.files
