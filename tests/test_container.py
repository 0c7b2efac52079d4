"""The Dockerfile: what it copies exists and is not excluded, versions are those of the tests, and it does not run as root."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILE = ROOT / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", FILE.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def test_every_copied_path_exists_and_is_in_the_build_context():
    included = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {path for name, rest in instructions() if name == "COPY" for path in rest.split()[:-1]}
    assert copied == included
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        *build["only-include"],
        *build["force-include"],
        project["project"]["readme"],
        "LICENSE",
        "pyproject.toml",
    }
    assert needed <= copied


def test_versions_and_extras_are_those_of_the_project():
    commands = " ".join(rest for name, rest in instructions() if name == "RUN")
    constraints = (ROOT / "constraints.txt").read_text()
    (torch,) = re.findall(r"\btorch==(\S+)", commands)
    assert re.search(rf"^torch=={re.escape(torch)}(\+\w+)?$", constraints, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"/src\[(.*?)\]", commands)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    (image,) = [rest for name, rest in instructions() if name == "FROM"]
    assert re.fullmatch(r"python:3\.1[1-9]-slim-\w+", image)


def test_the_command_runs_without_root_in_a_mounted_folder():
    settings = dict(instructions())
    assert settings["ENTRYPOINT"] == '["minigpt"]'
    assert settings["WORKDIR"] == "/work"
    assert not settings["USER"].startswith(("0", "root"))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: the extra release")
def test_hadolint_reports_nothing():
    done = subprocess.run([HADOLINT, FILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
