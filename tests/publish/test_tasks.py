"""Results of evaluation suites in `minigpt.json`, in the card and in its `model-index`; flags that do not apply."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from minigpt_hf.cli import main
from minigpt_hf.doctor.folder import Folder
from minigpt_hf.doctor.weights import recorded
from minigpt_hf.inference.suites import TaskResult
from minigpt_hf.publish.model_folder import save_tasks
from tests.hub_repository import model_card_errors

ACCURACY = TaskResult(
    task="blimp",
    version="2.0",
    metric="acc",
    filter="none",
    value=0.61803,
    stderr=0.00421,
    samples=67_000,
    shots=0,
    dataset="nyu-mll/blimp",
    harness="0.4.13",
)
PERPLEXITY = TaskResult("plays|1", "1", "word_perplexity", "none", 31.5, None, 12, 2, None, "0.4.13")


@pytest.fixture
def folder(run_folder, tmp_path):
    return shutil.copytree(run_folder / "model", tmp_path / "model")


def test_results_are_in_the_metadata_the_card_and_the_model_index_with_standard_errors(folder):
    save_tasks(folder, [ACCURACY.to_dict(), PERPLEXITY.to_dict()])
    assert json.loads((folder / "minigpt.json").read_text())["tasks"] == [ACCURACY.to_dict(), PERPLEXITY.to_dict()]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| `blimp`, version 2.0 | `acc` | 0.6180 | 0.0042 | 67,000 | 0 |\n" in card
    assert "| `plays\\|1`, version 1 | `word_perplexity` | 31.5000 | not estimated | 12 | 2 |\n" in card
    assert "lm-evaluation-harness 0.4.13; `minigpt evaluate … --tasks` reproduces these values" in card
    assert model_card_errors(card) == []
    results = {result.dataset_name: result for result in ModelCard(card).data.eval_results}
    assert (results["blimp"].dataset_type, results["blimp"].metric_type) == ("nyu-mll/blimp", "acc")
    assert results["blimp"].metric_value == 0.61803
    assert results["blimp"].metric_args["stderr"] == 0.00421
    assert "stderr" not in results["plays|1"].metric_args


def test_a_task_without_a_version_is_stated_without_one(folder):
    save_tasks(folder, [{**ACCURACY.to_dict(), "version": ""}])
    assert "| `blimp` | `acc` | 0.6180 |" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["run_folder", "chat_run"])
def test_the_card_of_a_chat_model_states_that_the_prompts_had_no_chat_template(kind, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(kind) / "model", tmp_path / "model")
    save_tasks(folder, [ACCURACY.to_dict()])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("The prompts were plain text, without the chat template." in card) == (kind == "chat_run")


def test_shortened_questions_are_stated_in_the_card_once_per_task(folder):
    results = [{**ACCURACY.to_dict(), "metric": metric, "shortened": 1_234} for metric in ("acc", "acc_norm")]
    save_tasks(folder, [*results, PERPLEXITY.to_dict()])
    card = (folder / "README.md").read_text(encoding="utf-8")
    sentence = "The start of 1,234 of the 67,000 questions of `blimp` was omitted, because they exceed the context"
    assert card.count(sentence) == 1
    assert card.count("The start of ") == 1


def test_a_result_of_the_same_task_and_metric_is_replaced(folder):
    save_tasks(folder, [ACCURACY.to_dict(), PERPLEXITY.to_dict()])
    again = {**ACCURACY.to_dict(), "value": 0.7}
    save_tasks(folder, [again])
    assert json.loads((folder / "minigpt.json").read_text())["tasks"] == [again, PERPLEXITY.to_dict()]
    assert "| 0.7000 |" in (folder / "README.md").read_text()
    assert "| 0.6180 |" not in (folder / "README.md").read_text()


def test_an_edited_card_is_left_unchanged(folder, caplog):
    (folder / "README.md").write_text("mine")
    save_tasks(folder, [ACCURACY.to_dict()])
    assert (folder / "README.md").read_text() == "mine"
    assert "has been edited and is left unchanged; the tasks are in minigpt.json only" in caplog.text
    assert json.loads((folder / "minigpt.json").read_text())["tasks"] == [ACCURACY.to_dict()]


def test_results_next_to_those_of_other_weights_are_reported(folder, caplog):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    save_tasks(folder, [ACCURACY.to_dict()])
    assert caplog.text == ""
    model.model.norm.weight.data += 1
    model.save_pretrained(folder)
    save_tasks(folder, [PERPLEXITY.to_dict()])
    assert "its results, scores and samples are those of other weights" in caplog.text


def test_the_recorded_weights_do_not_depend_on_their_files(folder):
    assert recorded(Folder(folder)).state == "pass"
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    assert recorded(Folder(folder)).state == "pass"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --data, a text to score, or --tasks, names of tasks"),
        (["--data", "x.txt", "--tasks", "blimp"], "give either --data, a text to score, or --tasks, names of tasks"),
        (["--data", "x.txt", "--task_path", "."], "--task_path requires --tasks"),
        (["--tasks", "blimp", "--stride", "3"], "--stride does not apply to --tasks: omit it"),
        (["--tasks", "blimp", "--score", "exact"], "--score does not apply to --tasks: omit it"),
        (["--tasks", " , "], "tasks is []: give a list of names"),
        (["--tasks", "blimp", "--batch_size", "0"], "batch_size is 0: it must be at least 1"),
    ],
)
def test_flags_that_do_not_apply_are_rejected(flags, message, folder, capsys):
    assert main(["evaluate", str(folder), *flags]) == 2
    assert capsys.readouterr().err == f"minigpt evaluate: {message}\n"
