"""The documentation is correct: commands run, links resolve, and quoted values exist."""

import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.files import prepared_folder
from minigpt_hf.training.recipe import recipe_names
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# Not run here: `make docs-check` runs `make demo`, `make test` and the installation.
ELSEWHERE = ("make ", "source ", "python -m venv", ".venv/bin/python -m pip", ".venv/bin/python -m pytest")
SHORT = "--max_steps 2 --logging_steps 1 --validation_characters 500 --sample_tokens 5 --use_cpu".split()
SMALL = "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --per_device_train_batch_size 2".split()


def commands(document: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", document, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def run_in_order(lines: list[list[str]], capsys, small: Sequence[str] = ()) -> int:
    """Run all commands except those of `ELSEWHERE`, with few steps. Returns their number."""
    ran = 0
    for words in lines:
        line = " ".join(words)
        if line.startswith(ELSEWHERE):
            continue
        if words[0] == "python":
            argv = [sys.executable, str(ROOT / words[1]), *words[2:]]
            argv += SHORT if words[1].endswith("bare_loop.py") else []
            done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        else:
            assert words[0] in ("minigpt", ".venv/bin/minigpt"), line
            is_training = words[1] == "train" and not {"--help", "--help-all"} & {*words}
            shape = [] if "--init_from" in words else small  # an existing model defines the architecture
            is_prepared = "--data" in words and prepared_folder(words[words.index("--data") + 1]) is not None
            short = [word for word in SHORT if not (is_prepared and word in ("--validation_characters", "500"))]
            assert main(words[1:] + [*short, *shape] * is_training) == 0, capsys.readouterr().err
            if words[1] == "data":
                shorten_task(Path(words[words.index("--output_dir") + 1]))
        ran += 1
    return ran


def shorten_task(folder: Path) -> None:
    """Keep few rows of each split, because a model that is not trained writes long answers."""
    for file, rows in (("train", 300), ("validation", 8), ("test", 8)):
        lines = (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{file}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_order(text, tmp_path, monkeypatch, capsys):
    """In a folder with the files that the README assumes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 2\n"))  # of `minigpt chat`
    for name in ("tinyshakespeare.txt", "notes.txt", "my_folder/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("ROMEO: " + text[:20_000], encoding="utf-8")
    assert main(["train", "--output_dir", "runs/demo", *SHORT]) == 0  # the result of `make demo`
    assert run_in_order(commands(README), capsys) >= 9


@pytest.mark.slow
def test_every_command_of_your_own_text_runs_in_order(text, tmp_path, monkeypatch, capsys):
    """With small files of each kind of text, and small models."""
    monkeypatch.chdir(tmp_path)
    files = {
        "tinyshakespeare.txt": "ROMEO:\nBut soft, what light through yonder window breaks?\n" * 300,
        "games.csv": "id,moves\n" + "".join(f'{i},"1. e4 e{i % 5} 2. Nf3 Nc6 3. Bb5 a6 "\n' for i in range(300)),
        "system.log": "".join(
            f"2026-11-23 12:{i % 60:02} sshd[{i}]: Accepted publickey for user\n" for i in range(400)
        ),
        "genome.fa": ">chr1\n" + "ACGTTGCAGGATCCGATTACAGGCATGAGCCACCGCGCCCGGCCTTTTTAAGGTAC\n" * 300,
        "letters.txt": text[:20_000],
        "my_code/a/one.py": text[:30_000],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "briefe.txt").write_text("Schöne Grüße aus Köln, dein Jürgen.\n" * 500, encoding="latin-1")
    document = (ROOT / "docs" / "your-own-text.md").read_text(encoding="utf-8")
    assert run_in_order(commands(document), capsys, SMALL) >= 14


def test_every_command_of_large_corpora_runs_in_order(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clean").mkdir()
    rows = [json.dumps({"text": text[start : start + 600]}) + "\n" for start in range(0, 60_000, 600)]
    for name, first, last in (("sample.jsonl", 0, 50), ("clean/0.jsonl", 0, 50), ("clean/1.jsonl", 50, 100)):
        (tmp_path / name).write_text("".join(rows[first:last]), encoding="utf-8")
    document = (ROOT / "docs" / "large-corpora.md").read_text(encoding="utf-8")
    assert run_in_order(commands(document), capsys, SMALL) == 5


@pytest.mark.slow
def test_every_command_of_chat_runs_in_order(tmp_path, monkeypatch, capsys):
    """With few rows and steps, and the first Python snippet at the end; `tests/neighbours/test_trl.py` runs the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 2\n/exit\n2 + 3\n"))  # of `minigpt chat`, twice
    document = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    assert run_in_order(commands(document), capsys) == 7
    snippet, *_ = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    exec(snippet, {})


@pytest.mark.slow
def test_every_command_and_snippet_for_coding_agents_runs(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    document = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert run_in_order(commands(document), capsys, SMALL) == 4
    (snippet,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    exec(snippet.replace("max_steps=300", "max_steps=2, sample_tokens=5, use_cpu=True"), {})


def test_generated_documents_are_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["docs.py", "--check"])
    docs = runpy.run_path(str(ROOT / "scripts" / "docs.py"))
    decimal = r"-?\d+\.\d+(?:e-?\d+)?"
    new, old = docs["walkthrough"](), (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    assert re.sub(decimal, "#", new) == re.sub(decimal, "#", old)
    numbers = [[float(number) for number in re.findall(decimal, text)] for text in (new, old)]
    assert numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=2e-3)  # other builds of torch round differently
    for name, document in (("cli", "cli.md"), ("plan", "scale.md")):
        assert docs[name]() == (ROOT / "docs" / document).read_text(encoding="utf-8")


def test_quoted_code_in_the_walkthrough_is_in_the_package():
    quoted = re.findall(
        r"```python (\S+)\n(.*?)```", (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(quoted) >= 5
    for file, lines in quoted:
        assert lines in (ROOT / file).read_text(encoding="utf-8"), (file, lines)


def test_the_python_snippets_of_the_readme_run(run_folder, text, tmp_path, monkeypatch):
    """Loading is unmodified; training has fewer steps."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run_folder)
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    loading, training = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(loading, names)
    ids = names["tokenizer"]("def ", return_tensors="pt").input_ids
    assert names["model"].generate(ids, max_new_tokens=3).shape == (1, ids.shape[1] + 3)
    exec(training.replace("max_steps=300", "max_steps=2, sample_tokens=5, use_cpu=True"), names)
    assert names["folder"].results["bits_per_byte"] > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_link_resolves_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http", "figures/")):
            assert (document.parent / target).exists(), target


def test_the_readme_lists_every_recipe():
    assert set(re.findall(r"^\| `([a-z0-9-]+)`", README, re.MULTILINE)) == set(recipe_names())


def test_the_loss_in_the_readme_is_in_the_results():
    (figure,) = re.findall(r"\*\*(\d\.\d+) nats per character\*\*", README)
    assert figure in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
