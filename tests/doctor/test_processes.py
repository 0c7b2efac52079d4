"""The separate process: isolation of the folder's code, and processes that hang, crash or write invalid rows."""

import json
import pickle
import time

import pytest

from minigpt_hf import doctor
from minigpt_hf.doctor import child
from tests.doctor.test_attacks import Touch, touching

GIB = 1 << 30


def test_untrusted_code_is_not_executed_and_pickles_are_not_loaded(broken):
    for name in ("modeling_minigpt.py", "configuration_minigpt.py"):
        broken.append(name, "\n" + touching(broken.canary))
    broken.write("custom_generate/generate.py", touching(broken.canary))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        broken.write(name, pickle.dumps(Touch(broken.canary)))
    rows = doctor.examine(broken.path)
    assert sorted(row.name for row in doctor.failures(rows)) == ["files known", "no pickle"]
    states = {row.name: row.state for row in rows}
    assert {states[name] for name in (*doctor.LOADS, *doctor.BEHAVIOUR)} == {"pass"}
    assert states[doctor.OWN_CODE] == "not applicable"
    assert not broken.canary.exists()


RECORD_ENVIRONMENT = """
import os, pathlib, sys
pathlib.Path({canary!r}).write_text(repr(dict(
    stdin=sys.stdin.read(), cwd=os.listdir(), secrets=[name for name, value in os.environ.items() if "secret" in value],
    package="minigpt_hf" in sys.modules and sys.modules["minigpt_hf"], path=sys.path,
)))
"""


@pytest.mark.slow
def test_trusted_code_runs_isolated_and_a_faulty_cache_of_it_is_detected(broken, monkeypatch, capfd):
    """Both in one process, because starting one takes seconds."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    broken.append("modeling_minigpt.py", RECORD_ENVIRONMENT.format(canary=str(broken.canary)))
    # Positions that restart at 0 in each step.
    broken.replace("modeling_minigpt.py", "past_key_values.get_seq_length()", "0 * past_key_values.get_seq_length()")
    names = (doctor.OWN_CODE, *doctor.BEHAVIOUR)
    rows = child.rows_of("loading", broken.path, names, 600, 12 * GIB, "own")
    assert [row.name for row in rows] == list(names)
    states = {row.name: row.state for row in rows}
    assert states[doctor.OWN_CODE] == "pass", rows
    assert states["cached = uncached"] == "fail"
    seen = eval(broken.canary.read_text())
    assert (seen["stdin"], seen["secrets"], seen["package"]) == ("", [], None)
    assert "" not in seen["path"]
    assert not {"pyproject.toml", "minigpt_hf"} & set(seen["cwd"])
    assert not any(path.rstrip("/").endswith("minigpt_hf") for path in seen["path"])
    assert capfd.readouterr() == ("", "")


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    counter = tmp_path / "counter"
    count = f"[(time.sleep(0.05), pathlib.Path({str(counter)!r}).write_text(str(i))) for i in range(900)]"
    monkeypatch.setattr(child, "START", f"import os, pathlib, time\nif os.fork():\n time.sleep(60)\nelse:\n {count}")
    first, second = child.rows_of("tokenizer", tmp_path, ("a", "b"), 2, GIB)
    assert (first.state, first.reason) == ("fail", "the process took more than 2 s")
    assert (second.state, second.reason) == ("not applicable", "not reached: the process took more than 2 s")
    before = counter.read_text()
    time.sleep(0.3)
    assert counter.read_text() == before


def test_a_process_that_exits_fails_the_current_row(tmp_path, monkeypatch):
    row = json.dumps({"name": "a", "state": "pass", "reason": "fine", "remedy": ""})
    program = f"import sys, os; f = open(sys.argv[3], 'w'); f.write({row!r} + chr(10)); f.flush(); os._exit(7)"
    monkeypatch.setattr(child, "START", program)
    a, b, c = child.rows_of("tokenizer", tmp_path, ("a", "b", "c"), 60, GIB)
    assert (a.state, b.state, c.state) == ("pass", "fail", "not applicable")
    assert b.reason == "the process ended with exit code 7"


@pytest.mark.parametrize(
    "answer",
    [
        "nonsense",
        "[]",
        '{"name": "a", "state": "splendid", "reason": "", "remedy": ""}',
        '{"name": "a", "state": "pass"}',
        '{"name": ["a"], "state": "pass", "reason": "", "remedy": ""}',
        '{"name": "a", "state": "pass", "reason": 7, "remedy": ""}',
    ],
)
def test_invalid_rows_of_the_process_are_ignored(answer, tmp_path):
    (tmp_path / "rows").write_text(answer + "\n")
    assert child._read(tmp_path / "rows") == {}


def test_control_characters_in_rows_of_the_process_are_escaped(tmp_path):
    row = {"name": "a", "state": "pass", "reason": "\x1b[2J", "remedy": ""}
    (tmp_path / "rows").write_text(json.dumps(row) + "\n")
    assert child._read(tmp_path / "rows")["a"].reason == r"\x1b[2J"


def test_a_process_that_exceeds_its_memory_limit_fails(broken):
    assert child.rows_of("tokenizer", broken.path, doctor.TOKENIZER, 60, GIB)[0].state == "pass"
    assert child.rows_of("tokenizer", broken.path, doctor.TOKENIZER, 60, GIB >> 10)[0].state == "fail"
