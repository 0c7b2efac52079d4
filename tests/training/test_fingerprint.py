"""The fingerprint of a run: a run is resumed only with the settings it was started with."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    "load_best_model_at_end": ["--load_best_model_at_end", "false"],
    "full_determinism": ["--full_determinism", "true"],
    "average_tokens_across_devices": ["--average_tokens_across_devices", "false"],
    "block_size": ["--block_size", "8", "--max_position_embeddings", "16"],
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


@pytest.mark.parametrize("content", ["[]", "{", None])
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


@pytest.mark.parametrize("steps", [1, 3])
def test_a_max_steps_below_the_steps_already_taken_is_reported(steps, interrupted, recipe, words, tmp_path, capsys):
    run = shutil.copytree(interrupted, tmp_path / "run")
    assert train(recipe, words, run, *FLAGS, "--max_steps", str(steps), "--allow_change", "max_steps") == 0
    message = f"max_steps {steps}: the run has already taken 4 steps; its model is published without further training"
    assert message in capsys.readouterr().err
