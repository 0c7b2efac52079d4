"""Repositories of the local Hub server, stored as files.

Contents are stored in `blobs/OID`, and the commits and branches of a repository in `TYPE/USER/NAME/commits/SHA.json`
(parent, title, time, and blob and size of each path) and `refs/BRANCH` (a commit SHA). A branch is updated after its
commit is complete.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from urllib.parse import quote, unquote

import yaml

# Files stored with LFS, identified by their SHA-256 (a subset of the Hub's rules).
LFS = re.compile(r"\.(safetensors|bin|pt|gguf|onnx|parquet|arrow|zip)$")
LARGE = 10_000_000  # bytes; larger files are stored with LFS, whatever their name
LICENSES = {"mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "gpl-3.0", "unknown", "other"}  # a subset


class HubError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        code: The Hub's error code (`X-Error-Code`), which clients map to an exception class.
        message: Error message.
    """

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message or code


class Repository:
    """Commits and branches of one repository."""

    def __init__(self, root: Path, repo_type: str, repo_id: str):
        self.folder, self.blobs = root / repo_type / repo_id, root / "blobs"

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

    def set_branch(self, branch: str, sha: str) -> None:
        """Create or update a branch atomically."""
        ref = self.folder / "refs" / quote(branch, safe="")
        temporary = ref.with_name(f".{ref.name}")
        temporary.write_text(sha)
        temporary.rename(ref)

    def read(self, revision: str) -> dict:
        """Return the commit of a branch or SHA."""
        sha = self.branches().get(revision, revision)
        file = self.folder / "commits" / f"{sha}.json"
        if not re.fullmatch("[0-9a-f]{40}", sha) or not file.is_file():
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return {"sha": sha, **json.loads(file.read_text())}

    def history(self, revision: str = "main") -> list[dict]:
        """Return the commits of a revision, newest first."""
        commits = [self.read(revision)]
        while commits[-1]["parent"]:
            commits.append(self.read(commits[-1]["parent"]))
        return commits

    def store(self, path: str, content: bytes) -> dict:
        """Store content by its object id: the SHA-256 of an LFS file, otherwise git's SHA-1 of a blob."""
        lfs = bool(LFS.search(path))
        digest = hashlib.sha256(content) if lfs else hashlib.sha1(b"blob %d\0" % len(content) + content)
        (self.blobs / digest.hexdigest()).write_bytes(content)
        return {"oid": digest.hexdigest(), "size": len(content), "lfs": lfs}

    def commit(self, branch: str, added: dict[str, dict], deleted: list[str], title: str) -> str:
        """Write a commit to a branch and return its SHA. A path in `deleted` that ends in a slash is a folder."""
        parent = self.branches().get(branch)
        files = self.read(parent)["files"] if parent else {}
        remaining = {path: file for path, file in files.items() if not any(path.startswith(name) for name in deleted)}
        text = json.dumps({"parent": parent, "title": title, "time": time.time(), "files": {**remaining, **added}})
        sha = hashlib.sha1(text.encode()).hexdigest()
        (self.folder / "commits" / f"{sha}.json").write_text(text)
        self.set_branch(branch, sha)
        return sha


def model_card_errors(text: str) -> list[str]:
    """Return the errors that the Hub reports for the metadata of a model card (a subset)."""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    errors = []
    languages = data.get("language", [])
    for code in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch("[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", code):
            errors.append(f'"language" must be an ISO 639 code, not {code}')
    if data.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for name in ("datasets", "base_model"):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                errors.append(f'"{name}" must be a Hub id, not {value}')
    if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of finetune, adapter, merge, quantized')
    if "base_model_relation" in data and "base_model" not in data:
        errors.append('"base_model_relation" requires "base_model"')
    emissions = data.get("co2_eq_emissions", 0)
    if not isinstance(emissions.get("emissions") if isinstance(emissions, dict) else emissions, int | float):
        errors.append('"co2_eq_emissions.emissions" must be a number')
    texts = ("source", "training_type", "geographical_location", "hardware_used")
    if isinstance(emissions, dict) and not all(isinstance(emissions.get(name, ""), str) for name in texts):
        errors.append('"co2_eq_emissions" must have text fields')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index" lacks a name')
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= set(result) or not {"type", "name"} <= set(result["dataset"]):
                errors.append('"model-index" lacks a task, a dataset or metrics')
            if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [])):
                errors.append('"model-index" has a metric without a type or value')
    return errors


COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def space_card_errors(text: str) -> list[str]:
    """Return the errors that the Hub reports for the metadata of a Space (a subset)."""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    data = yaml.safe_load(front[1]) if front else {}
    errors = [f'"{name}" is required' for name in ("title", "sdk") if not isinstance(data.get(name), str)]
    errors += [f'"{name}" must be a color' for name in ("colorFrom", "colorTo") if data.get(name, "red") not in COLORS]
    if data.get("sdk") == "gradio" and not isinstance(data.get("sdk_version"), str):
        errors.append('"sdk_version" must be a string')
    if len(data.get("short_description", "")) > 60:
        errors.append('"short_description" must have at most 60 characters')
    return errors
