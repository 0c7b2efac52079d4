"""The notebooks are valid, stored without outputs, and run; training shows the table of losses of transformers."""

import ast
import json
import re

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_opens_in_colab_and_is_stored_without_outputs(file):
    notebook = json.loads(file.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert source(code[0]) == "%pip install --quiet minigpt-hf"
    for cell in code[1:]:
        ast.parse(source(cell))


def test_both_notebooks_train_the_same_run():
    """So that the second one uses the model of the first."""
    calls = set()
    for file in NOTEBOOKS:
        code = "\n".join(map(source, json.loads(file.read_text(encoding="utf-8"))["cells"]))
        calls.add(re.search(r"minigpt_hf\.train\(\n.*?\n\)", code, re.DOTALL)[0])
    assert len(NOTEBOOKS) == 2
    assert len(calls) == 1


@pytest.mark.slow
def test_the_notebooks_run_in_order_and_show_training_and_validation_losses(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebooks")
    pytest.importorskip("ipykernel", reason="needs the extra notebooks")
    shown = {}
    for name in ("quickstart", "look-inside"):  # the second one uses the model of the first
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
        client.execute(cwd=tmp_path)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        shown[name] = [(cell.source, cell.outputs) for cell in cells]
    training = next(outputs for code, outputs in shown["quickstart"] if "minigpt_hf.train(" in code)
    tables = [output.data["text/html"] for output in training if "text/html" in output.get("data", {})]
    (table,) = [html for html in tables if "<table" in html]
    for column in ("Step", "Training Loss", "Validation Loss", "Perplexity", "Bits Per Byte"):
        assert f"<th>{column}</th>" in table
    assert re.findall(r"<tr>\s*<td>(\d+)</td>\s*<td>\d\.\d+</td>\s*<td>\d\.\d+</td>", table) == [
        "100",
        "200",
        "300",
        "400",
    ]
    text = "".join(output.get("text", "") for output in training)
    assert "--- sample after training:" in text
    assert "tokens/s" not in text  # no lines in addition to the table
    printed = ["".join(output.get("text", "") for output in outputs) for _, outputs in shown["look-inside"]]
    assert any("Qwen3ForCausalLM equal: True" in text for text in printed)
    images = [out for _, outputs in shown["look-inside"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(images) == 2
    assert (tmp_path / "runs" / "quickstart" / "page" / "quickstart.html").is_file()
