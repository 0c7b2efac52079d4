"""The repositories of the Hub on loopback, as files.

In: content by path. Out: `blobs/OID`, and for each repository `KIND/USER/NAME/commits/SHA.json` (parent, title, time,
path -> blob and size) and `refs/BRANCH` (a SHA). A branch moves when a commit is whole. It refuses what is not there.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from urllib.parse import quote, unquote

import yaml

# What the Hub keeps by its SHA-256 and serves from its storage, in part.
LARGE = re.compile(r"\.(safetensors|bin|pt|gguf|onnx|parquet|arrow|zip)$")
LICENSES = {"mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "unknown", "other"}  # in part


class Refusal(Exception):
    """An answer that is no success: status, the Hub's error code (which clients turn into exceptions), and words."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message or code


class Repository:
    """Commits and branches of one repository."""

    def __init__(self, root: Path, kind: str, repo_id: str):
        self.folder, self.blobs = root / kind / repo_id, root / "blobs"

    @property
    def private(self) -> bool:
        return (self.folder / "private").exists()

    def create(self, private: bool = False) -> None:
        for name in ("commits", "refs"):
            (self.folder / name).mkdir(parents=True)
        if private:
            (self.folder / "private").touch()
        self.commit(
            "main",
            {".gitattributes": self.store(".gitattributes", b"*.safetensors filter=lfs\n")},
            [],
            "initial commit",
        )

    def branches(self) -> dict[str, str]:
        refs = [file for file in sorted((self.folder / "refs").iterdir()) if not file.name.startswith(".")]
        return {unquote(ref.name): ref.read_text() for ref in refs}

    def point(self, branch: str, sha: str) -> None:
        """Move a branch, at once."""
        ref = self.folder / "refs" / quote(branch, safe="")
        unfinished = ref.with_name(f".{ref.name}")
        unfinished.write_text(sha)
        unfinished.rename(ref)

    def read(self, revision: str) -> dict:
        """The commit that a branch or a SHA names."""
        sha = self.branches().get(revision, revision)
        file = self.folder / "commits" / f"{sha}.json"
        if not re.fullmatch("[0-9a-f]{40}", sha) or not file.is_file():
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return {"sha": sha, **json.loads(file.read_text())}

    def history(self, revision: str = "main") -> list[dict]:
        """Commits, newest first."""
        commits = [self.read(revision)]
        while commits[-1]["parent"]:
            commits.append(self.read(commits[-1]["parent"]))
        return commits

    def store(self, path: str, content: bytes) -> dict:
        """Keep content under its name: the SHA-256 of a large file, else git's SHA-1 of a blob."""
        large = bool(LARGE.search(path))
        name = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
        (self.blobs / name.hexdigest()).write_bytes(content)
        return {"oid": name.hexdigest(), "size": len(content), "large": large}

    def commit(self, branch: str, added: dict[str, dict], deleted: list[str], title: str) -> str:
        """Write a commit on top of a branch, then move the branch. A deleted folder ends in a slash."""
        parent = self.branches().get(branch)
        files = self.read(parent)["files"] if parent else {}
        kept = {path: file for path, file in files.items() if not any(path.startswith(each) for each in deleted)}
        text = json.dumps({"parent": parent, "title": title, "time": time.time(), "files": {**kept, **added}})
        sha = hashlib.sha1(text.encode()).hexdigest()
        (self.folder / "commits" / f"{sha}.json").write_text(text)
        self.point(branch, sha)
        return sha


def faults_of_card(text: str) -> list[str]:
    """What the Hub finds wrong with the metadata of a card, in part."""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    faults = []
    languages = data.get("language", [])
    for code in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch("[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", code):
            faults.append(f'"language" must be an ISO 639 code, not {code}')
    if data.get("license", "mit") not in LICENSES:
        faults.append(f'"license" must be one of {sorted(LICENSES)}')
    for result in [result for model in data.get("model-index", []) for result in model["results"]]:
        if not {"task", "dataset", "metrics"} <= set(result) or not {"type", "name"} <= set(result["dataset"]):
            faults.append('"model-index" lacks a task, a dataset or metrics')
    return faults
