"""scripts/mutants.py reports mutants that no test detects, and does not change the working tree."""

import json
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

pytest.importorskip("mutmut", reason="requires the extra `mutants`")
import mutants

SOURCE = '''\
"""A docstring with a number, 7."""

LIMIT = 3


def is_short(text: str | None) -> bool:
    print("checking", text, 1 + 1)
    if text is None:
        raise ValueError(f"no text, {1 + 1}")
    return len(text) < LIMIT


def untested(number):
    return number * 2
'''

TEST = """
import subprocess, sys
import pytest
from minigpt_hf.data.short import is_short

def test_the_limit():
    assert is_short("ab") and not is_short("abc")

def test_none_is_rejected_in_a_subprocess():
    code = "from minigpt_hf.data.short import is_short; is_short(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in done.stderr

def test_that_fails():
    assert False
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    files = {"minigpt_hf/__init__.py": "", "minigpt_hf/data/short.py": SOURCE, "tests/test_short.py": TEST}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "mutants_pytest.py", tmp_path / "scripts")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    return tmp_path


def test_strings_annotations_and_reports_are_not_mutated(project):
    sample, _ = mutants.sample_mutants([project / "minigpt_hf" / "data" / "short.py"], project, count=0, seed=0)
    changed = sorted((mutant.line, mutant.mutated.splitlines()[mutant.line - 1].strip()) for mutant in sample)
    assert changed == [
        (3, "LIMIT = 4"),
        (8, "if (text is None) and False:"),
        (8, "if (text is None) or True:"),
        (8, "if text is not None:"),
        (9, "pass"),
        (10, "return len(text) <= LIMIT"),
        (14, "return number * 3"),
        (14, "return number / 2"),
    ]


def test_equivalent_changes_are_left_out_and_other_mutants_of_their_lines_are_not(project, monkeypatch):
    monkeypatch.setattr(mutants, "EQUIVALENT_CHANGES", {r"< LIMIT -> .*<= LIMIT": "", r"number \* 2 -> .* / 2": ""})
    sample, _ = mutants.sample_mutants([project / "minigpt_hf" / "data" / "short.py"], project, count=0, seed=0)
    changed = sorted((mutant.line, mutant.mutated.splitlines()[mutant.line - 1].strip()) for mutant in sample)
    assert [line for number, line in changed if number in (10, 14)] == ["return number * 3"]


@pytest.mark.slow
def test_survivors_are_listed_with_their_diff_and_the_sources_are_unchanged(project, capsys):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    report = project.parent / f"{project.name}.jsonl"
    argv = ["--sample", "0", "--jobs", "1", "--tests", "tests", "--report", str(report)]
    assert mutants.main(argv) == 1  # 2 of 8 mutants survive, more than 10 %
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before
    survivors = [row for row in map(json.loads, report.read_text().splitlines()) if row["outcome"] == "SURVIVED"]
    assert [(row["file"], row["line"]) for row in survivors] == [("minigpt_hf/data/short.py", 14)] * 2
    out = capsys.readouterr().out
    assert "failed without a mutant and is left out: tests/test_short.py::test_that_fails" in out
    assert "+    return number / 2" in out
    assert "2 of 8 mutants survived (25.0%; at most 10%); seed 0" in out
