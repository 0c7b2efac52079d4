"""`minigpt export`: the commands of docs/export.md, its output and its errors; the registry of formats."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from minigpt_hf.cli import main
from minigpt_hf.cli.export import parser
from minigpt_hf.export import FORMATS, export_model
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.fixture
def runs(run_folder, tmp_path, monkeypatch):
    """The folder that docs/export.md uses, with a model whose sliding window is 33 tokens instead of 65."""
    (tmp_path / "runs" / "bard").mkdir(parents=True)
    (tmp_path / "runs" / "bard" / "model").symlink_to(run_folder / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("minigpt")]


def test_the_commands_of_the_page_run(runs, capsys):
    """Except ONNX, which takes ten seconds and is covered by tests/export/test_onnx.py."""
    ran = []
    for words in commands():
        if "onnx" not in words:
            assert main([word.replace("65", "33") for word in words[1:]]) == 0, capsys.readouterr().err
            ran.append(words[words.index("--to") + 1])
    assert sorted(set(ran)) == ["gguf", "html", "native"]
    assert {path.name for path in runs.joinpath("bard").iterdir()} == {
        "model",
        "native",
        "mlx",
        "gguf",
        "small",
        "page",
    }


def test_the_output_states_the_folder_what_was_verified_and_the_maximum_context(runs, capsys):
    assert main(["export", "runs/bard/model", "--to", "native", "--output_dir", "out", "--context", "20"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the export is in out",
        "verified: loads as Qwen3ForCausalLM without remote code; equal weights; logits equal bit for bit",
        "maximum context: 20 tokens",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "gguf"], r"sliding window of 33 tokens.* --context 33"),
        (["--to", "gguf", "--context", "34"], "--context 34: give 1 to 33 tokens"),
        (
            ["--to", "native", "--dtype", "float16"],
            "native, which stores the weights unchanged: omit --dtype",
        ),
        (["--to", "onnx", "--dtype", "q8_0"], "--dtype q8_0 is not supported by --to onnx: use float32"),
        (["--to", "native", "--output_dir", "runs"], "runs: already exists"),
        (["--to", "tflite"], "invalid choice: 'tflite'"),
        ([], "the following arguments are required: --to"),
    ],
)
def test_an_invalid_request_is_reported_in_one_line_and_writes_nothing(flags, message, runs, capsys):
    before = sorted(runs.parent.rglob("*"))
    assert main(["export", "runs/bard/model", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"minigpt export: .*{message}.*\n", captured.err), captured.err
    assert sorted(runs.parent.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_file_and_the_exit_code_states_it(number, run_folder, tmp_path):
    """The signal arrives while the new folder is written or verified."""
    process = start_export(run_folder, tmp_path / "a" / "native")
    wait_for(tmp_path / "a", "*/content/config.json")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert len(err.splitlines()) == 1, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_a_killed_export_has_left_is_removed_by_the_next_one(run_folder, tmp_path):
    process = start_export(run_folder, tmp_path / "native")
    wait_for(tmp_path, "*/content/config.json")
    process.kill()
    process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) != []
    assert main(["export", str(run_folder / "model"), "--to", "native", "--output_dir", str(tmp_path / "other")]) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


def start_export(run_folder, out) -> subprocess.Popen:
    argv = ["-m", "minigpt_cli", "export", run_folder / "model", "--to", "native", "--output_dir", out]
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(folder, pattern) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("to", FORMATS)
def test_a_stop_token_beyond_the_vocabulary_is_rejected(to, run_folder, tmp_path, capsys):
    model = shutil.copytree(run_folder / "model", tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 99999]}')
    assert main(["export", str(model), "--to", to, "--output_dir", str(tmp_path / "out")]) == 2
    assert "its EOS token 99999 exceeds the vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "missing"), [("gguf", "gguf"), ("onnx", "onnxruntime")])
def test_a_missing_optional_package_is_named(to, missing, runs, capsys, monkeypatch):
    for module in ("gguf", "gguf_vocabulary", "onnx", "onnx_runner"):
        monkeypatch.delitem(sys.modules, f"minigpt_hf.export.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", "runs/bard/model", "--to", to, "--context", "33"]) == 2
    error = capsys.readouterr().err
    assert error == f"minigpt export: --to {to} needs {missing}, which is not installed: pip install {missing}\n"


def test_the_command_line_offers_every_registered_format_and_dtype():
    actions = {action.dest: action for action in parser()._actions}
    assert list(actions["to"].choices) == list(FORMATS) == ["native", "gguf", "onnx", "html"]
    assert set(actions["dtype"].choices) == {dtype for each in FORMATS.values() for dtype in each.dtypes}
    assert all(f"{name}: {each.help}" in actions["to"].help for name, each in FORMATS.items())


def test_a_format_needs_only_a_module_and_an_entry_of_the_registry(runs, tmp_path, monkeypatch):
    """A module that is registered under a new name is found by the command and its options are checked."""
    module = type(sys)("minigpt_hf.export.text")
    module.VERIFIED = "nothing"
    module.export_text = lambda folder, out, dtype, context: out.write_text(f"{folder} {dtype} {context}") and out
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FORMATS, "text", type(FORMATS["gguf"])("a text file", ("float32",)))
    assert main(["export", "runs/bard/model", "--to", "text", "--output_dir", "out", "--dtype", "float32"]) == 0
    assert (tmp_path / "out").read_text() == "runs/bard/model float32 None"
    with pytest.raises(ValueError, match="--dtype q8_0 is not supported by --to text: use float32"):
        export_model(tmp_path, tmp_path / "other", "text", "q8_0")


def test_listing_the_formats_imports_neither_torch_nor_the_formats():
    source = (ROOT / "minigpt_hf" / "export" / "__init__.py").read_text(encoding="utf-8")
    top_level = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
    assert set(top_level) <= {"dataclasses", "importlib", "pathlib", "..errors"}
