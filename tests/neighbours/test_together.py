"""All extras and all neighbours but vLLM stand in one environment, with the versions that are pinned and no conflict."""

import subprocess
import sys
import tomllib

from tests.conftest import ROOT
from tests.neighbours.conftest import KEPT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def test_what_is_installed_has_no_conflict():
    assert str(KEPT / "venv") in sys.prefix
    checked = subprocess.run([*PIP, "check"], capture_output=True, text=True, timeout=300)
    assert checked.stdout == "No broken requirements found.\n"


def test_one_resolve_of_all_extras_and_neighbours_changes_nothing():
    """Gradio, TensorBoard, trackio and matplotlib among them: with one more, the resolver would install or refuse it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    argv = [*PIP, "install", "--dry-run", "--no-build-isolation", "--constraint", ROOT / "constraints.txt"]
    argv += ["--requirement", ROOT / "tests" / "neighbours" / "requirements.txt", f"{ROOT}[{','.join(extras)}]"]
    resolved = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert resolved.returncode == 0, resolved.stderr
    would_install = [line for line in resolved.stdout.splitlines() if line.startswith("Would install")]
    assert [line.split()[2:] for line in would_install] in ([], [["minigpt-hf-0.1.0"]])
    for name in ("gradio", "tensorboard", "trackio", "matplotlib"):
        assert f"Requirement already satisfied: {name}" in resolved.stdout
