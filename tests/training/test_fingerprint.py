"""The fingerprint of a run: a run is resumed only with the settings it was started with."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from minigpt_hf.atomic import seal
from tests.conftest import representative
from tests.training.conftest import go_back, rows, train

FLAGS = ["--validation_fraction", "0.3", "--eval_steps", "2"]
CHANGES = {
    "early_stopping_patience": ["--early_stopping_patience", "3"],
    "num_train_epochs": ["--num_train_epochs", "2"],
    "lr_scheduler_kwargs": ["--lr_scheduler_kwargs", '{"num_cycles": 2}'],
    "validation": ["--validation_characters", "40"],  # another validation text, the same training text
    "optim": ["--muon", "false", "--optim", "sgd"],
    "bf16": ["--bf16", "true"],
    "neftune_noise_alpha": ["--neftune_noise_alpha", "5"],
    "gradient_accumulation_steps": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"],
    "per_device_eval_batch_size": ["--per_device_eval_batch_size", "3"],
    "dataloader_drop_last": ["--dataloader_drop_last", "true"],
    # With other workers, each epoch draws their seed from the random state that determines dropout.
    "dataloader_persistent_workers": ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"],
    "load_best_model_at_end": ["--load_best_model_at_end", "false"],
    "full_determinism": ["--full_determinism", "true"],
    "average_tokens_across_devices": ["--average_tokens_across_devices", "false"],
}


@pytest.fixture(scope="module")
def interrupted(recipe, words, tmp_path_factory):
    """A run with validation, interrupted after step 4."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    assert train(recipe, words, folder, *FLAGS) == 0
    go_back(folder, folder.with_name("stopped"), 4)
    return folder.with_name("stopped")


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_resume_with_a_changed_setting(name, interrupted, recipe, words, capsys):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    assert train(recipe, words, interrupted, *FLAGS, *CHANGES[name]) == 2
    captured = capsys.readouterr()
    assert f"{name} was " in captured.err
    assert captured.err.count("\nminigpt train: ") == 1  # preceded by the warning about a small text
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["eval_steps", "eval_delay"])
def test_evaluations_that_determine_the_learning_rate_are_part_of_the_fingerprint(
    name, recipe, words, tmp_path, capsys
):
    plateau = [*FLAGS, "--lr_scheduler_type", "reduce_lr_on_plateau", "--warmup_steps", "0"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(recipe, words, straight, *plateau) == 0
    go_back(straight, stopped, 4)
    assert train(recipe, words, stopped, *plateau, f"--{name}", "4") == 2
    assert f"{name} was " in capsys.readouterr().err


def test_a_setting_that_an_earlier_version_did_not_record_is_unchanged_if_it_has_its_default(
    interrupted, recipe, words, tmp_path, capsys
):
    run = shutil.copytree(interrupted, tmp_path / "run")
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    fingerprint = json.loads((run / "fingerprint.json").read_text())
    for name in (
        *("neftune_noise_alpha", "gradient_accumulation_steps", "load_best_model_at_end", "full_determinism"),
        *("accelerator_config", "activation_checkpointing", "fsdp_config", "gradient_checkpointing", "deepspeed"),
    ):
        del fingerprint[name]
    (run / "fingerprint.json").write_text(json.dumps(fingerprint))
    without_muon_beta2 = {name: value for name, value in fingerprint.items() if name != "muon_beta2"}
    (run / "fingerprint.json").write_text(json.dumps(without_muon_beta2))  # Muon without second moments
    assert train(recipe, words, run, *FLAGS) == 2
    assert "(muon_beta2 was not recorded and is 0.95)" in capsys.readouterr().err
    (run / "fingerprint.json").write_text(json.dumps(fingerprint))
    assert train(recipe, words, run, *FLAGS, "--neftune_noise_alpha", "5") == 2
    assert "(neftune_noise_alpha was not recorded and is 5.0)" in capsys.readouterr().err
    assert train(recipe, words, run, *FLAGS, "--max_steps", "2", "--allow_change", "max_steps") == 0


def test_another_optimizer_that_is_allowed_starts_without_moments(interrupted, recipe, words, tmp_path, capsys):
    """The learning rate is that of the schedule at the step of the checkpoint."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    changed = ["--no_muon", "--optim", "sgd", "--allow_change", "muon", "optim"]
    assert train(recipe, words, run, *FLAGS, *changed) == 0
    assert "the optimizer starts without its moments" in capsys.readouterr().err
    rates = [row["learning_rate"] for row in rows(run)]
    assert rates == [row["learning_rate"] for row in rows(interrupted.with_name("run"))]
    # SGD is stateless: an update is the gradient times the learning rate.
    names = ("checkpoint-4", "checkpoint-6")
    before, after = (load_file(run / name / "model.safetensors") for name in names)
    assert any(not torch.equal(before[name], after[name]) for name in before)


POSITIONS = {
    "effective_batch": ["--gradient_accumulation_steps", "2"],
    "block_size": ["--block_size", "8", "--max_position_embeddings", "16"],
}


@pytest.mark.parametrize("name", POSITIONS)
def test_what_determines_the_position_in_the_text_cannot_be_changed(name, interrupted, recipe, words, tmp_path, capsys):
    """Sequences would be used twice or not at all, and the number of tokens would be wrong."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    allowed = ["effective_batch", "block_size"]
    assert train(recipe, words, run, *FLAGS, *POSITIONS[name], "--allow_change", *allowed) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"other sequences per step ({name} was " in line and "--init_from" in line


def test_changes_are_in_the_metadata_and_the_card_also_after_another_resume(
    interrupted, recipe, words, tmp_path, capsys
):
    run = shutil.copytree(interrupted, tmp_path / "run")
    flags = ["--learning_rate", "0.001", "--seed", "7"]
    assert train(recipe, words, run, *FLAGS, *flags, "--allow_change", "learning_rate", "seed") == 0
    assert "seed: the rest of the epoch has another order" in capsys.readouterr().err
    go_back(run, tmp_path / "again", 6)
    assert (
        train(
            recipe, words, tmp_path / "again", *FLAGS, *flags, "--weight_decay", "0.2", "--allow_change", "weight_decay"
        )
        == 0
    )
    expected = [(4, "learning_rate", 0.004, 0.001), (4, "seed", 42, 7), (6, "weight_decay", 0.0, 0.2)]
    for folder, count in ((run, 2), (tmp_path / "again", 3)):
        metadata = json.loads((folder / "model" / "minigpt.json").read_text())
        stated = [
            (each["step"], each["setting"], each["before"], each["after"]) for each in metadata["training"]["changes"]
        ]
        assert sorted(stated) == sorted(expected[:count])
        card = (folder / "model" / "README.md").read_text()
        assert "`seed` from `42` to `7` after step 4" in card and "so it does not reproduce the model" in card
        assert "Not a score of unseen text" not in card


def test_a_score_is_not_one_of_unseen_text_if_the_training_text_was_changed(interrupted, recipe, words, tmp_path):
    run = shutil.copytree(interrupted, tmp_path / "run")
    flags = ["--validation_fraction", "0.5", "--eval_steps", "2"]
    assert train(recipe, words, run, *flags, "--allow_change", "data", "validation") == 0
    card = ModelCard((run / "model" / "README.md").read_text())
    assert "**Not a score of unseen text**: the training text was changed during training" in card.text
    assert not card.data.eval_results
    (first,) = [
        each
        for each in json.loads((run / "model" / "minigpt.json").read_text())["training"]["changes"]
        if each["setting"] == "data"
    ]
    assert first == {"step": 4, "setting": "data", "before": None, "after": None}


def test_another_division_of_the_same_effective_batch_can_be_allowed(interrupted, recipe, words, tmp_path):
    run = shutil.copytree(interrupted, tmp_path / "run")
    parts = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    allowed = ["--allow_change", "per_device_train_batch_size", "gradient_accumulation_steps"]
    assert train(recipe, words, run, *FLAGS, *parts, *allowed) == 0


def test_the_initial_model_is_identified_by_its_content(interrupted, recipe, words, tmp_path, capsys, monkeypatch):
    """A moved model is unchanged, a replaced one of the same name is changed; for interrupted and finished runs."""
    monkeypatch.chdir(tmp_path)
    assert train(recipe, words, "made", "--max_steps", "2") == 0
    shutil.copytree("made/model", "base")
    shutil.copytree("made/model", "moved")
    flags = ["--recipe", "finetune", "--block_size", "16", "--max_steps", "4", "--save_steps", "2", "--use_cpu"]
    flags += ["--validation_fraction", "0", "--sample_tokens", "0", "--per_device_train_batch_size", "2"]
    assert train(recipe, words, "run", *flags, "--init_from", "base") == 0
    shutil.copytree("run", "stopped", ignore=shutil.ignore_patterns("model", "checkpoint-4"))
    weights = load_file("base/model.safetensors")
    save_file(
        {name: tensor + torch.ones(1) * 1e-3 for name, tensor in weights.items()},
        "base/model.safetensors",
        {"format": "pt"},
    )
    capsys.readouterr()
    for run in ("run", "stopped"):
        assert train(recipe, words, run, *flags, "--init_from", "base") == 2
        assert "(init_from was base and is a different model of the same name)" in capsys.readouterr().err
    assert train(recipe, words, "run", *flags, "--init_from", "moved") == 0
    assert train(recipe, words, "stopped", *flags, "--init_from", "moved") == 0
    assert "resuming from step 2" in capsys.readouterr().err


@pytest.mark.parametrize("content", representative(["[]", "{", None], "{"))
def test_a_damaged_fingerprint_is_restored_from_a_checkpoint(content, interrupted, recipe, words, tmp_path, capsys):
    run = shutil.copytree(interrupted, tmp_path / "run")
    good = (run / "fingerprint.json").read_text()
    (run / "fingerprint.json").unlink()
    if content is not None:
        (run / "fingerprint.json").write_text(content)
    assert train(recipe, words, run, *FLAGS) == 0
    captured = capsys.readouterr()
    assert "; restored from checkpoint-4" in captured.err
    assert "resuming from step 4" in captured.err
    assert (run / "fingerprint.json").read_text() == good
    renamed = run / "fingerprint.json.aside-1"
    assert (renamed.read_text() if renamed.exists() else None) == content


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"described": 3}'])
def test_a_damaged_fingerprint_without_checkpoints_is_reported_in_one_line(
    content, interrupted, recipe, words, tmp_path, capsys
):
    run = shutil.copytree(interrupted, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / "fingerprint.json").write_text(content)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(recipe, words, run, *FLAGS) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt train: ")]
    assert f"{run / 'fingerprint.json'}: not " in line
    assert "--fresh" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_folder_is_rejected_as_a_run_folder(interrupted, recipe, words, capsys):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    for more in ([], ["--fresh"]):
        assert train(recipe, words, interrupted / "checkpoint-4", *FLAGS, *more) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt train: ")]
        assert line.endswith(f"checkpoint-4: this is a checkpoint; give the folder of its run, {interrupted}")
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_a_run_without_checkpoints_starts_again_and_renames_its_log(interrupted, recipe, words, tmp_path, capsys):
    run = shutil.copytree(interrupted, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    log = (run / "log.jsonl").read_bytes()
    assert train(recipe, words, run, *FLAGS) == 0
    assert "no valid checkpoint, so training starts from step 0; log renamed to log.jsonl.aside-1" in (
        capsys.readouterr().err
    )
    assert (run / "log.jsonl.aside-1").read_bytes() == log


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (["--max_steps", "1"], "max_steps 1"),
        (["--max_steps", "3"], "max_steps 3"),
        (["--max_steps", "-1", "--num_train_epochs", "0.2"], "num_train_epochs 0.2, max_steps 2"),
    ],
)
def test_a_number_of_steps_below_those_already_taken_is_reported(
    flags, given, interrupted, recipe, words, tmp_path, capsys
):
    run = shutil.copytree(interrupted, tmp_path / "run")
    allowed = ["--allow_change", *(flag.removeprefix("--") for flag in flags if flag.startswith("--"))]
    assert train(recipe, words, run, *FLAGS, *flags, *allowed) == 0
    message = f"{given}: the run has already taken 4 steps; its model is published without further training"
    assert message in capsys.readouterr().err


def test_a_tokenizer_of_another_size_is_another_architecture(interrupted, recipe, words, tmp_path, capsys):
    run = shutil.copytree(interrupted, tmp_path / "run")
    flags = ["--tokenizer", "characters", "--allow_change", "tokenizer", "data", "validation"]
    assert train(recipe, words, run, *FLAGS, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "contains a run with another architecture (tokenizer" in line and "config.vocab_size" in line
    assert line.endswith("use another folder, or --fresh")


def test_a_run_of_an_earlier_version_that_did_not_record_the_vocabulary_is_resumed(
    interrupted, recipe, words, tmp_path, capsys
):
    run = shutil.copytree(interrupted, tmp_path / "run")
    for file in (run / "fingerprint.json", run / "checkpoint-4" / "fingerprint.json"):
        fingerprint = json.loads(file.read_text())
        assert fingerprint.pop("config.vocab_size") == 258
        file.write_text(json.dumps(fingerprint))
    (run / "checkpoint-4" / "manifest.json").unlink()
    seal(run / "checkpoint-4")
    assert train(recipe, words, run, *FLAGS) == 0
    assert "resuming from step 4" in capsys.readouterr().err
