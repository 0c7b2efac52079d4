"""Package structure: allowed imports, public names and the content of the wheel."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import minigpt_hf
from tests.conftest import ROOT

PACKAGE = ROOT / "minigpt_hf"
EVERYTHING = {
    *(
        "errors",
        "atomic",
        "output",
        "trust",
        "data",
        "model",
        "training",
        "inference",
        "publish",
        "export",
        "integrations",
    ),
    *("doctor", "tasks", "api", "training_text"),
}
# Modules and packages that each package may import. All may import `errors`.
MAY_IMPORT = {
    "errors": set(),
    "model": set(),
    "atomic": set(),
    "output": set(),
    "trust": {"data.hub_access", "doctor"},
    "data": {"atomic", "trust"},
    "inference": {
        *("data.chat_format", "data.encoding", "data.matching", "data.stream", "data.tokenizer", "trust"),
    },
    "training": {"atomic", "data", "inference", "model", "output", "publish", "training_text", "trust", "__version__"},
    "publish": {"atomic", "data.chat_format", "doctor.card", "doctor.folder", "doctor.weights", "model", "trust"},
    "export": {
        *("__version__", "atomic", "data", "inference", "model", "publish.card", "publish.model_folder"),
        *("training.run_folder", "trust"),
    },
    "integrations": {"atomic", "data", "publish.model_folder"},
    "doctor": set(),
    "launch": set(),
    "tasks": set(),
    "training_text": {"data", "trust"},
    "api": EVERYTHING,
    "cli": EVERYTHING | {"__version__"},
    "__init__": {"model", "api"},
}


def test_the_design_document_lists_every_module():
    """Those of `cli` and `doctor` are listed as packages."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = [file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    missing = [str(file) for file in files if file.parts[0] not in ("cli", "doctor") and file.name not in text]
    assert missing == [] and len(files) > 80


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports, as dotted names relative to the package."""
    package = file.relative_to(PACKAGE).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            names |= {".".join(base)} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minigpt_hf"):
            names.add(node.module.removeprefix("minigpt_hf").lstrip("."))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("minigpt_hf")}
    return names


def package_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_are_allowed_by_the_table(file):
    package = package_of(file)
    foreign = {name for name in imports_of(file) if name.split(".")[0] != package}
    allowed = MAY_IMPORT[package]
    disallowed = {name for name in foreign - {"errors"} if name not in allowed and name.split(".")[0] not in allowed}
    assert disallowed == set()


def test_every_package_is_in_the_table():
    assert {package_of(file) for file in PACKAGE.rglob("*.py")} == set(MAY_IMPORT)


def test_the_model_files_import_only_torch_transformers_and_huggingface_hub():
    for file in (PACKAGE / "model").glob("*_minigpt.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tried = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body}
        for node in set(ast.walk(tree)) - tried:
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, node.module) == (1, "configuration_minigpt")
            elif isinstance(node, ast.ImportFrom):
                allowed = {"torch", "transformers", "collections", "huggingface_hub"}
                assert node.module.split(".")[0] in allowed, node.module


def test_only_the_command_line_and_the_progress_callback_print():
    """`export/onnx_runner.py` is a program of its own, copied into exports; the rest of the library logs."""
    printing = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                printing.add(file.relative_to(PACKAGE).as_posix())
    commands = {name for name in printing if name.startswith("cli/")}
    assert printing - commands - {"export/onnx_runner.py"} == {"training/callbacks.py"}


def test_the_package_exports_exactly_its_public_names():
    assert sorted(minigpt_hf.__all__) == [
        "MiniGPTConfig",
        "MiniGPTForCausalLM",
        "MiniGPTForQuestionAnswering",
        "MiniGPTForSequenceClassification",
        "MiniGPTForTokenClassification",
        "MiniGPTModel",
        "ModelFolder",
        "__version__",
        "evaluate",
        "evaluate_tasks",
        "generate",
        "load",
        "measure_copying",
        "score_answers",
        "train",
    ]


@pytest.mark.slow
def test_the_wheel_alone_in_a_new_environment_trains(recipe_file, text_file, tmp_path):
    """The wheel is built and installed in a virtual environment with the dependencies of this one."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("minigpt_hf-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"py.typed", "publish/model_card.md", "training/recipes/demo.yaml", "model/modeling_minigpt.py"}
    expected |= {"export/page/index.html", "export/page/gpt.js", "export/page/style.css"}
    assert {"minigpt_cli.py", *(f"minigpt_hf/{name}" for name in expected)} <= names
    assert not any(name.startswith(("tests", "scripts")) for name in names)

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    zipfile.ZipFile(wheel).extractall(site)  # equals installing a pure Python wheel
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"]
    argv += ["--max_steps", "2", "--logging_steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # it could contain the sources
    done = subprocess.run(
        [python, "-m", "minigpt_cli", *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    where = [python, "-c", "from importlib.util import find_spec; print(find_spec('minigpt_hf').origin)"]
    assert str(site) in subprocess.check_output(where, cwd=tmp_path, text=True, env=environment)
    assert json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["training"]["steps"] == 2
