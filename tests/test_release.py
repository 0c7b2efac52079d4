"""What a release consists of: versions agree, and the workflows, the distributions and the documentation site are valid."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import minigpt_hf
from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def run(*argv: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, argv)), cwd=cwd, capture_output=True, encoding="utf-8", timeout=300)


def test_citation_and_changelog_name_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == minigpt_hf.__version__
    releases = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert releases[0] == minigpt_hf.__version__


# -- workflows --------------------------------------------------------------------------------------------------------


def test_the_workflows_test_three_systems_and_publish_without_a_stored_token():
    workflows = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in WORKFLOWS}
    assert workflows.keys() == {"ci", "release"}
    systems = workflows["ci"]["jobs"]["test"]["strategy"]["matrix"]["os"]
    assert {system.partition("-")[0] for system in systems} == {"ubuntu", "macos", "windows"}
    publish = workflows["release"]["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    for name, workflow in workflows.items():
        text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
        assert "secrets." not in text
        assert workflow["permissions"] == {}
        actions = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in actions)
        assert all("timeout-minutes" in job for job in workflow["jobs"].values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zizmor", path=Path(sys.executable).parent) is None, reason="needs zizmor")
def test_zizmor_reports_nothing():
    done = run(Path(sys.executable).with_name("zizmor"), "--offline", "--no-progress", *WORKFLOWS)
    assert done.returncode == 0, done.stdout
    assert "No findings to report" in done.stdout + done.stderr


# -- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs("twine")
def test_wheel_and_sdist_are_valid_and_the_sdist_builds_the_same_wheel(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-d"]
    assert run(*build, tmp_path / "dist").returncode == 0
    version = minigpt_hf.__version__
    wheel, sdist = (
        tmp_path / f"dist/minigpt_hf-{version}-py3-none-any.whl",
        tmp_path / f"dist/minigpt_hf-{version}.tar.gz",
    )
    done = run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    assert done.returncode == 0, done.stdout
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = run(*build, tmp_path / "again", "-t", "wheel", cwd=tmp_path / f"minigpt_hf-{version}")
    assert again.returncode == 0, again.stderr
    assert content(tmp_path / "again" / wheel.name) == content(wheel)


def content(wheel: Path) -> dict[str, bytes]:
    archive = zipfile.ZipFile(wheel)
    return {name: archive.read(name) for name in archive.namelist()}


# -- documentation site -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs("mkdocs")
@needs("mkdocstrings")
def test_the_documentation_site_builds_without_warnings(tmp_path):
    done = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    reference = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("train", "evaluate", "generate", "load", "ModelFolder"):
        assert f'id="minigpt_hf.api.{name}"' in reference
    assert "Return its model folder" in reference or "return its model folder" in reference  # from a docstring
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith(("data:", "mailto:", "/")):
                assert (page.parent / target).exists(), (page, target)
