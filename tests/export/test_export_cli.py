"""`minigpt export`: the commands of docs/export.md, and what a person reads."""

import re
import shlex
import sys

import pytest

from minigpt_hf.cli import main
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.fixture
def runs(run_folder, tmp_path, monkeypatch):
    """The folder that the page speaks of; the model's window is 33 tokens here."""
    (tmp_path / "runs" / "bard").mkdir(parents=True)
    (tmp_path / "runs" / "bard" / "model").symlink_to(run_folder / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("minigpt")]


def test_the_commands_of_the_page_run(runs, capsys):
    """But for ONNX, which tests/export/test_onnx.py does once; it takes ten seconds."""
    ran = []
    for words in commands():
        if "onnx" not in words:
            assert main([word.replace("65", "33") for word in words[1:]]) == 0, capsys.readouterr().err
            ran.append(words[words.index("--to") + 1])
    assert sorted(set(ran)) == ["gguf", "native"]
    assert {path.name for path in runs.joinpath("bard").iterdir()} == {"model", "native", "mlx", "gguf", "small"}


def test_it_says_where_the_export_is_what_was_verified_and_its_bounds(runs, capsys):
    assert main(["export", "runs/bard/model", "--to", "native", "--output_dir", "out", "--context", "20"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the export is in out",
        "verified: Qwen3ForCausalLM without custom code; identical weights, bitwise equal logits",
        "maximum context: 20 tokens",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "gguf"], r"slide a window of 33 tokens .* Say --context 33"),
        (["--to", "gguf", "--context", "34"], "--context 34: give 1 to 33 tokens"),
        (["--to", "native", "--dtype", "float16"], "--to native copies the weights unchanged"),
        (["--to", "onnx", "--dtype", "q8_0"], "ONNX in q8_0"),
        (["--to", "native", "--output_dir", "runs"], "runs: is there already"),
        (["--to", "tflite"], "invalid choice: 'tflite'"),
        ([], "the following arguments are required: --to"),
    ],
)
def test_what_cannot_be_gets_one_line_and_leaves_nothing(flags, message, runs, capsys):
    before = sorted(runs.parent.rglob("*"))
    assert main(["export", "runs/bard/model", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"minigpt export: .*{message}.*\n", captured.err), captured.err
    assert sorted(runs.parent.rglob("*")) == before


@pytest.mark.parametrize(("to", "missing"), [("gguf", "gguf"), ("onnx", "onnxruntime")])
def test_without_the_extra_it_is_named(to, missing, runs, capsys, monkeypatch):
    for module in ("gguf", "gguf_vocabulary", "onnx", "onnx_runner"):
        monkeypatch.delitem(sys.modules, f"minigpt_hf.export.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", "runs/bard/model", "--to", to, "--context", "33"]) == 2
    error = capsys.readouterr().err
    assert error == f"minigpt export: --to {to} needs {missing}, which is not installed: pip install {missing}\n"
