"""A model folder is written atomically and contains exactly the documented files."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from minigpt_hf.data.tokenizer import byte_tokenizer, character_tokenizer
from minigpt_hf.publish import model_folder as module
from minigpt_hf.publish.model_folder import REQUIRED, save_model_files, write_model_folder
from tests.conftest import random_ids, tiny_model


@pytest.fixture
def metadata(run_folder):
    return json.loads((run_folder / "model" / "minigpt.json").read_text())


def files_of(folder) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_the_folder_contains_exactly_the_documented_files(run_folder):
    assert files_of(run_folder / "model") == {*REQUIRED, "figures/loss.png", "figures/training.png"}
    assert {path.name for path in run_folder.iterdir()} == {
        *("checkpoint-20", "checkpoint-40", "model", "recipe.yaml", "fingerprint.json", "log.jsonl", "samples.md")
    }


def test_the_trained_folder_loads_as_qwen3_with_another_config(run_folder):
    folder = run_folder / "model"
    ours = AutoModelForCausalLM.from_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    shared = {name: settings[name] for name in Qwen3Config().to_dict() if name in settings and name != "model_type"}
    twin = Qwen3ForCausalLM.from_pretrained(folder, config=Qwen3Config(**shared))
    ids = random_ids(2, 80)  # longer than the sliding window of 33 tokens
    assert torch.equal(twin(ids).logits, ours(ids).logits)


def test_minigpt_json_describes_data_and_training(metadata):
    assert metadata["recipe"]["block_size"] == 32
    assert metadata["recipe"]["validation_fraction"] == 0.1
    assert metadata["data"]["cut"].startswith("the last ")
    assert metadata["data"]["train"]["tokens"] > metadata["data"]["validation"]["tokens"] > 0
    assert metadata["training"]["steps"] == 40
    assert metadata["training"]["tokens"] == 40 * 4 * 32


def test_the_figure_has_the_width_of_a_card(run_folder):
    with Image.open(run_folder / "model" / "figures" / "loss.png") as picture:
        assert picture.size == (1350, 540)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # not blank


def test_a_folder_whose_writing_fails_does_not_exist(metadata, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module, "render_card", fail)
    with pytest.raises(OSError, match="disk full"):
        write_model_folder(tmp_path / "model", tiny_model(), character_tokenizer(["ab"]), metadata, [])
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    write_model_folder(tmp_path / "model", tiny_model(), character_tokenizer(["ab"]), metadata, [])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_non_finite_weights_are_never_published(metadata, tmp_path):
    model = tiny_model()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values that are not finite"):
        write_model_folder(tmp_path / "model", model, character_tokenizer(["ab"]), metadata, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_published_tokenizer_returns_no_token_types(run_folder, tmp_path):
    """`generate` rejects them."""
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "model", model_input_names=["input_ids", "token_type_ids"])
    assert "token_type_ids" in tokenizer("def")
    save_model_files(tiny_model(), tokenizer, tmp_path)
    assert set(AutoTokenizer.from_pretrained(tmp_path)("def")) == {"input_ids"}


def test_matplotlib_is_imported_only_when_figures_are_drawn():
    code = (
        "import sys; import minigpt_hf.publish.push, minigpt_hf.training.train; sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_umask_decides_the_mode_of_every_file(tmp_path):
    before = os.umask(0o027)
    try:
        save_model_files(tiny_model(), byte_tokenizer(), tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o640}
