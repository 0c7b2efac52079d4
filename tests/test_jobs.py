"""The script for Hugging Face Jobs: its inline metadata, and a run that publishes to the local Hub server."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import minigpt_hf
from tests.conftest import ROOT
from tests.hub_server import TOKEN

SCRIPT = ROOT / "scripts" / "jobs" / "train.py"


def metadata() -> dict:
    """The block `script` of PEP 723, read with the regular expression of its specification."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (match,) = re.finditer(pattern, SCRIPT.read_text(encoding="utf-8"))
    assert match["type"] == "script"
    lines = match["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def test_the_inline_dependencies_are_those_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata()["requires-python"] == project["requires-python"]
    dependencies = {each.name: each for each in map(Requirement, metadata()["dependencies"])}
    assert dependencies.keys() == {"minigpt-hf", "trackio"}
    assert Version(minigpt_hf.__version__) in dependencies["minigpt-hf"].specifier
    assert dependencies["minigpt-hf"].extras <= project["optional-dependencies"].keys()
    (pinned,) = re.findall(r"^trackio==(.*)$", (ROOT / "tests/neighbours/requirements.txt").read_text(), re.MULTILINE)
    assert Version(pinned) in dependencies["trackio"].specifier


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, SCRIPT, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=180, env=environment)


@pytest.mark.slow
def test_a_run_publishes_the_model(hub, recipe_file, text_file, tmp_path):
    flags = ["--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run", "--max_steps", "2"]
    flags += ["--logging_steps", "1", "--hub_model_id", "user/job"]
    done = run(*map(str, flags), HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("user/job"))


def test_a_run_that_would_be_lost_is_rejected():
    done = run("--recipe", "demo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train.py: give --hub_model_id USER/NAME: the disk of a job is deleted at its end\n"
