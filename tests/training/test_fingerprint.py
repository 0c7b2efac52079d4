"""A run only resumes with the settings that it was started with: each of them is compared."""

import pytest

from tests.training.conftest import go_back, train

FLAGS = ["--validation_fraction", "0.3", "--eval_steps", "2"]
CHANGES = {
    "early_stopping_patience": ["--early_stopping_patience", "3"],
    "num_train_epochs": ["--num_train_epochs", "2"],
    "lr_scheduler_kwargs": ["--lr_scheduler_kwargs", '{"num_cycles": 2}'],
    "validation": ["--validation_characters", "40"],  # another validation text, the same training text
    "optim": ["--muon", "false", "--optim", "sgd"],
    "bf16": ["--bf16", "true"],
    "block_size": ["--block_size", "8", "--max_position_embeddings", "16"],
}


@pytest.fixture(scope="module")
def interrupted(recipe, words, tmp_path_factory):
    """A run with validation, as it is after step 4."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    assert train(recipe, words, folder, *FLAGS) == 0
    go_back(folder, folder.with_name("stopped"), 4)
    return folder.with_name("stopped")


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_resume_with_another(name, interrupted, recipe, words, capsys):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    assert train(recipe, words, interrupted, *FLAGS, *CHANGES[name]) == 2
    captured = capsys.readouterr()
    assert f"{name} was " in captured.err
    assert captured.err.count("\nminigpt train: ") == 1  # after the warning about a small text
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before
