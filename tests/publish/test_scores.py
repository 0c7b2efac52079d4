"""Scores of generated answers in the metadata and the card of a model folder."""

import io
import json
import shutil

import pytest
from huggingface_hub import ModelCard

import minigpt_hf
from minigpt_hf import doctor
from minigpt_hf.cli import main
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.export.native import export_native
from minigpt_hf.inference import answers
from minigpt_hf.model.configuration_minigpt import MiniGPTConfig
from minigpt_hf.publish.card import render_card
from minigpt_hf.publish.push import push_folder
from tests.conftest import representative


@pytest.fixture
def folder(chat_run, tmp_path):
    """A copy of a model folder whose model answers questions."""
    return shutil.copytree(chat_run / "model", tmp_path / "model")


@pytest.fixture
def questions(chats, tmp_path):
    """The first 12 conversations."""
    file = tmp_path / "test.jsonl"
    file.write_text("".join(chats.read_text().splitlines(keepends=True)[:12]))
    return file


def evaluate(folder, data, *flags, metric="exact") -> int:
    return main(["evaluate", str(folder), "--data", str(data), "--score", metric, *flags])


def scores_of(folder) -> list[dict]:
    return json.loads((folder / "minigpt.json").read_text())["scores"]


def content(folder) -> dict:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_score_is_in_the_metadata_the_card_and_its_model_index(folder, questions, capsys):
    before = content(folder)
    assert evaluate(folder, questions) == 0
    assert f"saved in minigpt.json and README.md of {folder}" in capsys.readouterr().err
    after = content(folder)
    assert before.keys() == after.keys()
    assert {str(file) for file in after if after[file] != before[file]} == {"README.md", "minigpt.json"}

    expected, _ = minigpt_hf.score_answers(folder, questions, "exact")
    (stored,) = scores_of(folder)
    data = stored.pop("data")
    assert stored == expected.to_dict()
    assert (data["name"], data["split"], len(data["fingerprint"])) == ("test.jsonl", "all", 64)

    card = ModelCard((folder / "README.md").read_text())
    (row,) = (line for line in card.text.splitlines() if line.startswith("| exact match "))
    assert f"`test.jsonl`, `{data['fingerprint'][:16]}`" in row and "| 12 |" in row
    values = [100 * value for value in (expected.score, expected.low, expected.high, expected.ended)]
    assert all(f" {value:.1f} %" in row for value in values)
    assert f"{100 * max(expected.baselines.values()):.1f} % (" in row
    (result,) = (result for result in card.data.eval_results if result.metric_type == "exact_match")
    assert (result.metric_value, result.dataset_name) == (round(expected.score, 4), "test.jsonl")
    assert result.dataset_revision == data["fingerprint"]
    assert "compared with the last training text of this model, and not with that of its base model" in card.text
    assert result.metric_args["answers"] == 12 and {*result.metric_args["baselines"]} == {*expected.baselines}
    assert {"loss", "perplexity", "bits_per_byte"} < {result.metric_type for result in card.data.eval_results}
    assert doctor.failures(doctor.examine_files(folder)) == []


def test_a_score_replaces_that_of_the_same_data_and_metric_only(folder, questions, chats, tmp_path):
    pytest.importorskip("rouge_score")
    assert evaluate(folder, questions) == evaluate(folder, questions, metric="rouge") == 0
    before = scores_of(folder)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    (tmp_path / "renamed.json").write_text(json.dumps(rows))  # the same conversations
    assert evaluate(folder, tmp_path / "renamed.json") == 0
    before[0]["data"]["name"] = "renamed.json"
    assert scores_of(folder) == before
    assert evaluate(folder, chats, "--split", "validation") == 0
    assert scores_of(folder)[:2] == before
    assert [score["data"]["split"] for score in scores_of(folder)] == ["all", "all", "validation"]
    card = (folder / "README.md").read_text()
    assert card.count("\n| exact match |") == 2 and card.count("\n| ROUGE-L |") == 1
    results = ModelCard(card).data.eval_results
    named = {(result.dataset_name, result.dataset_split, result.metric_type) for result in results}
    assert {("renamed.json", None, "rouge"), ("chats.jsonl", "validation", "exact_match")} < named


def test_a_score_with_another_system_message_than_in_training_states_it(folder, questions):
    """A file may have several scores, and a score cannot be repeated without its system message."""
    for flags in ([], ["--system", "Be brief | kind."]):
        assert evaluate(folder, questions, *flags) == 0
    assert ["system" in score["data"] for score in scores_of(folder)] == [False, True]
    card = ModelCard((folder / "README.md").read_text())
    rows = [line for line in card.text.splitlines() if line.startswith("| exact match ")]
    assert [r"system message `Be brief \| kind.`" in row for row in rows] == [False, True]
    names = [result.dataset_name for result in card.data.eval_results if result.metric_type == "exact_match"]
    assert names == ["test.jsonl", "test.jsonl (with another system message than in training)"]


def test_no_save_leaves_the_folder_unchanged(folder, questions, capsys):
    before = content(folder)
    assert evaluate(folder, questions, "--no_save") == 0
    assert content(folder) == before
    assert main(["evaluate", str(folder), "--data", str(questions), "--no_save"]) == 2
    assert "--no_save requires --score" in capsys.readouterr().err


def test_an_edited_card_is_not_changed(folder, questions, caplog, capsys):
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    before = card.read_bytes()
    assert evaluate(folder, questions) == 0
    assert card.read_bytes() == before and len(scores_of(folder)) == 1
    assert "README.md: has been edited and is left unchanged" in caplog.text
    assert f"saved in minigpt.json of {folder}" in capsys.readouterr().err


def test_after_a_kill_between_the_two_files_the_same_command_completes_them(folder, questions):
    before = (folder / "minigpt.json").read_bytes()
    assert evaluate(folder, questions) == 0
    complete = content(folder)
    (folder / "minigpt.json").write_bytes(before)
    assert evaluate(folder, questions) == 0
    assert content(folder) == complete


def test_a_native_twin_names_the_score_and_is_not_changed(folder, questions, capsys):
    assert evaluate(folder, questions) == 0
    twin = export_native(folder, folder.parent / "twin")
    assert "\n| exact match |" in (twin / "README.md").read_text()
    before = content(twin)
    assert evaluate(twin, questions) == 0
    printed = capsys.readouterr()
    assert "ended by the model" in printed.out and "not saved: " in printed.err
    assert content(twin) == before


@pytest.mark.parametrize("scores", representative([1, [1], [{"metric": "exact"}]], [{"metric": "exact"}]))
def test_malformed_scores_are_reported_and_the_new_score_is_printed(scores, folder, questions, capsys):
    metadata = json.loads((folder / "minigpt.json").read_text())
    (folder / "minigpt.json").write_text(json.dumps({**metadata, "scores": scores}))
    before = content(folder)
    assert evaluate(folder, questions) == 0
    printed = capsys.readouterr()
    assert "ended by the model" in printed.out and "minigpt.json is malformed" in printed.err
    assert content(folder) == before


@pytest.mark.parametrize("split", representative(["all", "train", "validation"], "all", "validation"))
def test_a_score_on_the_training_text_is_marked(folder, chats, capsys, split):
    assert evaluate(folder, chats, "--split", split) == 0
    assert ("contains the training text of the model" in capsys.readouterr().err) == (split != "validation")
    (score,) = scores_of(folder)
    assert score["data"].get("of_training", False) == (split != "validation")
    card = ModelCard((folder / "README.md").read_text())
    (row,) = (line for line in card.text.splitlines() if line.startswith("| exact match "))
    assert (", contains the training text |" in row) == (split != "validation")
    (result,) = (result for result in card.data.eval_results if result.metric_type == "exact_match")
    assert result.dataset_name.endswith(" (contains the training text)") == (split != "validation")


def test_the_text_is_described_once_although_it_is_compared_with_that_of_training(folder, questions, capsys):
    rows = [json.loads(line) | {"source": "a book"} for line in questions.read_text().splitlines()]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(folder, questions, "--system", "Be brief.") == 0
    assert capsys.readouterr().err.count("columns that are not read: source") == 1


def test_a_system_message_without_effect_is_reported_and_not_stated(folder, questions, capsys):
    """Every conversation has its own."""
    rows = [json.loads(line) | {"system": "Count."} for line in questions.read_text().splitlines()]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(folder, questions, "--system", "Be brief.") == 0
    assert "--system has no effect on" in capsys.readouterr().err
    assert "system" not in scores_of(folder)[0]["data"]

    del rows[0]["system"]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(folder, questions, "--system", "Be brief.") == 0
    assert "--system has no effect on" not in capsys.readouterr().err
    assert scores_of(folder)[-1]["data"]["system"] == "Be brief."


@pytest.mark.parametrize(
    ("flags", "is_of_training"),
    [
        (["--split", "validation", "--validation_fraction", "0.5"], True),
        (["--split", "train", "--system", "Be brief."], True),
        (["--split", "validation", "--validation_fraction", "0.05"], False),
        (["--split", "validation", "--newline", "universal"], False),
    ],
)
def test_a_score_on_training_text_that_is_divided_or_read_in_another_way_is_marked(
    flags, is_of_training, folder, chats, capsys
):
    assert evaluate(folder, chats, *flags) == 0
    assert ("contains the training text of the model" in capsys.readouterr().err) == is_of_training
    assert scores_of(folder)[0]["data"].get("of_training", False) == is_of_training


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_a_validation_split_that_differs_from_that_of_training_is_reported(
    kind, run_folder, text_file, folder, chats, capsys
):
    model, data = (run_folder / "model", text_file) if kind == "text" else (folder, chats)
    argv = ["evaluate", str(model), "--data", str(data), "--split", "validation", "--max_characters", "500"]
    argv = argv if kind == "text" else argv[:-2]
    for fraction, is_reported in (("0.05", False), ("0.1", False), ("0.3", True)):
        assert main([*argv, "--validation_fraction", fraction]) == 0
        message = "is read or divided in another way than in the training of the model"
        assert (message in capsys.readouterr().err) == is_reported


def test_a_score_on_all_of_the_training_text_is_reported(run_folder, text_file, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("To be, or not to be, that is the question.\n" * 200)
    for data, split, is_reported in ((text_file, "all", True), (text_file, "validation", False), (other, "all", False)):
        flags = ["--split", split, *(["--max_characters", "2000"] if split == "all" else [])]
        assert main(["evaluate", str(run_folder / "model"), "--data", str(data), *flags]) == 0
        message = f"{data}: contains the training text of the model, so the score is not one of unseen text"
        assert (message in capsys.readouterr().err) == is_reported


def test_the_validation_split_of_a_changed_text_is_reported(run_folder, text_file, tmp_path, capsys):
    """The last tenth of a shortened text was trained on."""
    text = text_file.read_bytes().decode()
    copy, shortened = tmp_path / "copy.txt", tmp_path / "shortened.txt"
    copy.write_bytes(text.encode())
    shortened.write_bytes(text[: len(text) // 2].encode())
    for data, flags, is_reported in (
        (copy, [], False),
        (copy, ["--validation_fraction", "0.05"], False),
        (shortened, [], True),
        (shortened, ["--validation_fraction", "0.05"], True),
        (shortened, ["--split", "all"], False),
    ):
        argv = ["evaluate", str(run_folder / "model"), "--data", str(data), "--split", "validation"]
        assert main([*argv, "--max_characters", "500", *flags]) == 0
        assert (
            "is not the text that the model was trained on, or it has changed" in capsys.readouterr().err
        ) == is_reported


def test_a_part_of_the_training_split_of_a_dataset_is_reported_as_training_text(
    recipe_file, text_file, tmp_path, capsys
):
    """The dataset has a validation split, and `--data_split train` divides its training split."""
    lines = [json.dumps({"text": line}) + "\n" for line in text_file.read_text().splitlines() if line]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(lines[40:]))
    (data / "validation.jsonl").write_text("".join(lines[:40]))
    argv = ["train", "--recipe", recipe_file, "--data", data, "--output_dir", tmp_path / "run", "--max_steps", "1"]
    assert main([str(word) for word in argv]) == 0
    argv = ["evaluate", str(tmp_path / "run" / "model"), "--data", str(data), "--split", "validation"]
    for flags, is_reported in (([], False), (["train"], True), (["validation"], False)):
        capsys.readouterr()
        assert main([*argv, *(["--data_split", *flags] if flags else [])]) == 0
        assert ("contains text that the model was trained on" in capsys.readouterr().err) == is_reported


def test_a_score_on_other_conversations_is_not_marked(folder, questions, capsys):
    assert evaluate(folder, questions) == 0
    assert "training text" not in capsys.readouterr().err
    assert "of_training" not in scores_of(folder)[0]["data"]


def test_a_score_is_not_stored_in_a_folder_whose_weights_were_replaced_meanwhile(
    folder, questions, capsys, monkeypatch
):
    def replaced_during(*args):
        shutil.copy(folder / "model.safetensors", folder / "new")
        (folder / "new").rename(folder / "model.safetensors")
        return generate_answers(*args)

    generate_answers = answers.generate_answers
    monkeypatch.setattr(answers, "generate_answers", replaced_during)
    before = content(folder)
    assert evaluate(folder, questions) == 0
    out = capsys.readouterr()
    assert out.out.startswith("exact ")
    assert f"not saved: {folder}: was changed during the evaluation" in out.err
    assert content(folder) == before


@pytest.mark.parametrize("is_edited", [False, True])
def test_the_loss_of_a_model_with_another_chat_template_is_reported_as_that_of_chatml(
    is_edited, folder, questions, capsys
):
    template = folder / "chat_template.jinja"
    if is_edited:
        template.write_text(template.read_text().replace("assistant", "helper"))
    assert main(["evaluate", str(folder), "--data", str(questions)]) == 0
    assert ("not by the chat template of the model, which differs" in capsys.readouterr().err) == is_edited


def test_answers_that_cannot_be_written_are_an_error_before_they_are_generated(folder, questions, tmp_path, capsys):
    before = content(folder)
    assert evaluate(folder, questions, "--answers", str(tmp_path / "missing" / "answers.jsonl")) == 2
    out = capsys.readouterr()
    assert "No such file or directory" in out.err and out.out == ""
    assert evaluate(folder, questions, "--answers", str(tmp_path)) == 2
    assert "Is a directory" in capsys.readouterr().err
    assert content(folder) == before


def test_answers_do_not_overwrite_the_questions(folder, questions, capsys, monkeypatch):
    before = questions.read_bytes()
    monkeypatch.chdir(questions.parent)
    assert evaluate(folder, questions, "--answers", questions.name) == 2
    assert "is the file of --data, which would be overwritten" in capsys.readouterr().err
    assert questions.read_bytes() == before


def test_a_card_without_that_mark_is_not_marked(folder, questions):
    """Another program may have written the entry."""
    assert evaluate(folder, questions) == 0
    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["scores"][0]["data"]["of_training"] = False
    card = render_card(metadata, MiniGPTConfig.from_pretrained(folder))
    assert "exact match" in card and "contains the training text" not in card


def test_a_model_of_the_hub_is_used_with_the_settings_of_its_training(
    folder, chats, hub, tmp_path, capsys, monkeypatch
):
    """Its `minigpt.json` states its training text and system message."""
    push_folder(folder, "user/sums")
    assert evaluate("user/sums", chats, "--split", "train") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("exact ") and "contains the training text" in printed.err
    assert "not saved: user/sums: is not a local folder" in printed.err

    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["recipe"]["system"] = "Add."
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    push_folder(folder, "user/sums")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"1 + 1\n/save {tmp_path / 'chat.jsonl'}\n"))
    assert main(["chat", "user/sums", "--max_new_tokens", "4"]) == 0
    (row,) = map(json.loads, (tmp_path / "chat.jsonl").read_text().splitlines())
    assert [message["content"] for message in row["messages"][:2]] == ["Add.", "1 + 1"]


@pytest.mark.parametrize("model", [5, None, ""])
def test_a_model_that_is_not_a_name_is_an_error(model, questions):
    for evaluation in (
        lambda: minigpt_hf.score_answers(model, questions, "exact"),
        lambda: minigpt_hf.evaluate_tasks(model, ["blimp"]),
    ):
        with pytest.raises(MiniGPTError, match=r"model is|no model can be loaded"):
            evaluation()
