"""All extras and third-party programs except vLLM can be installed in one environment, with the pinned versions."""

import subprocess
import sys
import tomllib

import minigpt_hf
from tests.conftest import ROOT
from tests.neighbours.conftest import CACHE

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def test_installed_packages_have_no_conflicts():
    assert str(CACHE / "venv") in sys.prefix
    process = subprocess.run([*PIP, "check"], capture_output=True, text=True, timeout=300)
    assert process.stdout == "No broken requirements found.\n"


def test_resolving_all_extras_and_requirements_changes_nothing():
    """A dry run of pip with the pinned versions; Gradio, TensorBoard, trackio and matplotlib must be included."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    argv = [*PIP, "install", "--dry-run", "--no-build-isolation", "--constraint", ROOT / "constraints.txt"]
    argv += ["--requirement", ROOT / "tests" / "neighbours" / "requirements.txt", f"{ROOT}[{','.join(extras)}]"]
    process = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    would_install = [line for line in process.stdout.splitlines() if line.startswith("Would install")]
    assert [line.split()[2:] for line in would_install] in ([], [[f"minigpt-hf-{minigpt_hf.__version__}"]])
    for name in ("gradio", "tensorboard", "trackio", "matplotlib"):
        assert f"Requirement already satisfied: {name}" in process.stdout
