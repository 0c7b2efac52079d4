"""Early stopping. With learning rates of 0 the validation loss never improves."""

import json
import shutil

import pytest

from minigpt_hf.cli import main
from tests.conftest import representative
from tests.training.conftest import go_back, rows, train

FLAGS = "--learning_rate 0 --muon_learning_rate 0 --validation_fraction 0.3 --eval_steps 1 --save_steps 1".split()


@pytest.mark.parametrize(
    ("patience", "last"), representative([("1", 2), ("3", 4), ("7", 8), ("0", 8)], ("3", 4), ("0", 8))
)
def test_a_run_ends_after_as_many_evaluations_without_improvement_as_its_patience(
    patience, last, recipe, words, tmp_path
):
    folder = tmp_path / "run"
    assert train(recipe, words, folder, *FLAGS, "--early_stopping_patience", patience) == 0
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "eval_loss" in row] == [*range(1, last + 1)]
    about = json.loads((folder / "model" / "minigpt.json").read_text())
    assert (about["training"]["steps"], about["training"]["planned_steps"]) == (last, 8)
    assert (about["training"]["finished"], about["training"]["published_step"]) == (True, 1)
    card = (folder / "model" / "README.md").read_text()
    assert "Training is in progress" not in card
    assert f"| steps | {last}{'' if last == 8 else ' of 8, ended by early stopping'} |" in card
    assert "| published weights | those after step 1, the checkpoint with the lowest validation loss |" in card


def test_the_default_patience_is_5_if_a_run_has_more_than_one_epoch(recipe, words, tmp_path):
    """294 tokens are 18 sequences of 16, so an epoch has nine steps of two sequences."""
    ends = []
    for steps in ("9", "11"):
        folder = tmp_path / steps
        assert train(recipe, words, folder, *FLAGS, "--max_steps", steps) == 0
        ends.append(json.loads((folder / "model" / "minigpt.json").read_text())["training"]["steps"])
    assert ends == [9, 6]


def test_the_evaluation_at_the_start_is_not_repeated_when_a_run_is_resumed(recipe, words, tmp_path):
    """A repeated evaluation would count as one without improvement."""
    flags = ["--validation_fraction", "0.3", "--eval_steps", "2", "--eval_on_start", "true"]
    flags += ["--early_stopping_patience", "1", "--learning_rate", "1e-3", "--muon_learning_rate", "1e-3"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(recipe, words, straight, *flags) == 0
    go_back(straight, resumed, 4)
    assert train(recipe, words, resumed, *flags) == 0
    assert rows(resumed) == rows(straight)
    assert rows(resumed)[-1]["step"] == 8
    evaluated = [
        [
            row["step"]
            for line in (run / "log.jsonl").read_text().splitlines()
            if "eval_loss" in (row := json.loads(line))
        ]
        for run in (straight, resumed)
    ]
    assert evaluated == [[0, 2, 4, 6, 8]] * 2


def test_an_evaluation_at_the_start_that_is_requested_of_a_resumed_run_is_reported_as_not_made(
    recipe, words, tmp_path, capsys
):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--validation_fraction", "0.3", "--eval_steps", "2"]
    for at_start in ("true", "false"):
        run, continued = straight / at_start, resumed / at_start
        assert train(recipe, words, run, *flags, "--eval_on_start", at_start) == 0
        go_back(run, continued, 4)
        capsys.readouterr()
        assert train(recipe, words, continued, *flags, "--eval_on_start", "true") == 0
        assert rows(continued) == rows(run)
        assert ("eval_on_start: no effect, because the run is resumed" in capsys.readouterr().err) == (
            at_start == "false"
        )


def test_without_evaluations_after_a_resume_no_score_of_earlier_weights_is_published(recipe, words, tmp_path, capsys):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    evaluated = ["--validation_fraction", "0.3", "--eval_steps", "2"]
    assert train(recipe, words, straight, *evaluated) == 0
    go_back(straight, folder, 4)
    flags = ["--validation_fraction", "0.3", "--eval_strategy", "no"]
    assert train(recipe, words, folder, *flags) == 2
    assert "load_best_model_at_end was True and is False" in capsys.readouterr().err
    assert train(recipe, words, folder, *flags, "--allow_change", "load_best_model_at_end") == 0
    assert json.loads((straight / "model" / "minigpt.json").read_text())["results"]["loss"] > 0
    assert json.loads((folder / "model" / "minigpt.json").read_text())["results"] == {}


def test_an_automatically_configured_run_is_resumed_without_evaluations(words, tmp_path, capsys):
    """Whether the best checkpoint is published follows from the strategies, not from the stored recipe."""
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(words.read_text() * 5)
    flags = "--tokenizer bytes --hidden_size 32 --num_hidden_layers 2 --max_steps 4 --sample_tokens 0 --use_cpu".split()
    argv = ["train", "--data", str(text), "--output_dir", str(folder), *flags]
    assert main(argv) == 0
    shutil.rmtree(folder / "model")
    assert main([*argv, "--eval_strategy", "no", "--save_strategy", "no"]) == 2
    assert "load_best_model_at_end was True and is False" in capsys.readouterr().err
