"""Valid folders pass every applicable check."""

import json
import re

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from minigpt_hf import doctor
from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import byte_level_bpe, tokenizer_fingerprint
from minigpt_hf.doctor import behaviour, card, code, config, loading, tokenizer, weights
from minigpt_hf.doctor import files as file_checks
from minigpt_hf.inference.generation import AutoTokenizer
from minigpt_hf.model.configuration_minigpt import AUTO_MAP
from minigpt_hf.publish.model_folder import REQUIRED
from tests.conftest import ROOT
from tests.doctor.conftest import make_twin

NUM_CHECKS = 40


def states(rows) -> dict[str, str]:
    assert [f"{row.name}: {row.reason}" for row in doctor.failures(rows)] == []
    assert len({row.name for row in rows}) == len(rows) == NUM_CHECKS
    return {row.name: row.state for row in rows}


def not_applicable(rows) -> set[str]:
    return {name for name, state in states(rows).items() if state == "not applicable"}


@pytest.mark.slow
def test_a_minigpt_with_bpe_passes_every_check_including_its_remote_code(run_folder):
    rows = doctor.examine(run_folder / "model", trust_remote_code=True)
    assert not_applicable(rows) == {"chat template", "chat format", "weights index"}


@pytest.mark.slow
def test_a_minigpt_with_a_character_tokenizer_passes(recipe_file, text_file, tmp_path, capsys):
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"]
    argv += ["--tokenizer", "characters", "--max_steps", 2, "--logging_steps", 1, "--validation_characters", 500]
    assert main([str(word) for word in argv]) == 0
    capsys.readouterr()
    # Through the command line, in JSON.
    code = main(["doctor", str(tmp_path / "run" / "model"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["failed"]) == (0, 0), report
    assert not_applicable([doctor.Row(**row) for row in report["rows"]]) == {
        "chat template",
        "chat format",
        "weights index",
        "loads without the package",
    }


@pytest.mark.slow
def test_a_model_trained_on_markup_passes(recipe_file, tmp_path):
    """The sample prompt is the beginning of the text; the card has it in code blocks only."""
    (tmp_path / "page.html").write_text(
        "".join(f'<script src="{number}.js"></script>\n<p>{number}</p>\n' for number in range(400))
    )
    data = ["--data", str(tmp_path / "page.html"), "--data_format", "text", "--output_dir", str(tmp_path / "run")]
    assert (
        main(["train", *data, "--recipe", str(recipe_file), "--max_steps", "2", "--sample_prompt", "<script src"]) == 0
    )
    assert json.loads((tmp_path / "run/model/minigpt.json").read_text())["sample"]["prompt"] == "<script src"
    assert doctor.failures(doctor.examine_files(tmp_path / "run" / "model")) == []


def test_the_native_twin_passes_and_needs_no_code(run_folder, tmp_path):
    rows = doctor.examine(make_twin(run_folder / "model", tmp_path / "twin"))
    without_code = {"auto_map", "code", "loads with the package", "loads without the package"}
    assert not_applicable(rows) == {"chat template", "chat format", "weights index"} | without_code


def vocabulary_and_merges(text) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(byte_level_bpe([text], 300).backend_tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examine_here(folder) -> list[doctor.Row]:
    """`examine`, but loading in this process, since other architectures need no isolation from the package."""
    found = doctor.examine_files(folder)
    not_run = doctor.Row(doctor.OWN_CODE, "not applicable", "the folder contains no code")
    return [*found, *loading.rows(folder, "package"), not_run]


NOT_APPLICABLE_TO_OTHERS = {
    "files known",
    "recipe",
    "auto_map",
    "code",
    "chat template",
    "chat format",
    "tensors",
    "weights recorded",
    "fingerprint",
    "prompts inert",
}
NOT_APPLICABLE_TO_OTHERS |= {
    "card",
    "card filled in",
    "card inert",
    "loads with the package",
    "loads without the package",
}


def test_a_gpt2_of_transformers_passes(text, tmp_path):
    vocabulary, merges = vocabulary_and_merges(text)
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=end, eos_token_id=end
    )
    folder = save(GPT2LMHeadModel(config), tokenizer, tmp_path / "gpt2")
    assert not_applicable(examine_here(folder)) == NOT_APPLICABLE_TO_OTHERS | {"weights index"}


def test_a_llama_of_transformers_in_shards_passes(text, tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"etaoinshrdluE,.!'"]
    tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert not_applicable(examine_here(folder)) == NOT_APPLICABLE_TO_OTHERS


# -- values that the doctor repeats, because it imports nothing of the package -----------------------------------------


def test_the_fingerprint_is_that_of_training(run_folder):
    folder = doctor.Folder(run_folder / "model")
    row = tokenizer.fingerprint(folder)
    assert row.state == "pass"
    assert row.reason.startswith(tokenizer_fingerprint(AutoTokenizer.from_pretrained(run_folder / "model"))[:12])


def test_a_tokenizer_that_was_saved_after_padding_has_the_fingerprint_of_training(broken):
    saved = AutoTokenizer.from_pretrained(broken.path)
    saved(["a", "b c"], padding=True, truncation=True, max_length=2)
    saved.save_pretrained(broken.path)
    assert broken.get("tokenizer.json")["padding"] is not None
    assert tokenizer.fingerprint(doctor.Folder(broken.path)).state == "pass"


def test_names_of_files_and_classes_are_those_of_the_model_and_publish():
    assert set(code.AUTO_CLASSES) == set(AUTO_MAP)
    assert {*file_checks.REQUIRED, *file_checks.CODE, file_checks.WEIGHTS} == set(REQUIRED)


def test_the_expected_rows_of_each_process_are_those_of_its_checks():
    assert tuple(check.row_name for check in tokenizer.CHECKS) == doctor.TOKENIZER
    loads = (loading.natively, loading.with_the_package, loading.tokenizer_loads)
    assert tuple(check.row_name for check in loads) == doctor.LOADS
    assert loading.without_the_package.row_name == doctor.OWN_CODE
    checks = (loading.meta_equals_plain, *behaviour.CHECKS)
    assert tuple(check.row_name for check in checks) == doctor.BEHAVIOUR


def test_the_document_lists_exactly_the_checks():
    table = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([^`]+)` \|(?: (yes) \|)?", table, re.MULTILINE)
    files = [check.row_name for module in (file_checks, config, code, weights) for check in module.CHECKS]
    cards = [check.row_name for check in card.CHECKS]
    loads = [*doctor.LOADS, doctor.OWN_CODE, *doctor.BEHAVIOUR]
    assert [name for name, _ in documented] == [*files, *doctor.TOKENIZER, *cards, *loads]
    assert {name for name, required in documented if required} == set(doctor.BEFORE_LOADING)


def test_for_a_run_folder_the_error_names_the_model_folder(run_folder, capsys):
    assert main(["doctor", str(run_folder)]) == 2
    assert "this is a run folder; its model folder is" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["absent", "README.md"])
def test_a_path_that_is_not_a_folder_is_reported_in_one_line(given, run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder / "model")
    code = main(["doctor", given])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert f"{given}: no such folder; give a model folder" in err
