"""Generated tasks: correct answers, splits without overlap, the files and the command."""

import json
from datetime import date, timedelta

import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.conversations import conversations_in
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.tasks import GENERATED, build
from minigpt_hf.tasks.generated import in_words
from minigpt_hf.tasks.task import SPLITS, row, split_by_group

HAND_CHECKED = {
    "arithmetic": {"12 + 34": "46", "0 + 0": "0", "99 + 99": "198"},
    "dates": {
        "the day after 2024-02-28": "2024-02-29",
        "the day after 2023-02-28": "2023-03-01",
        "the day after 1999-12-31": "2000-01-01",
    },
    "numbers": {
        "0": "zero",
        "13": "thirteen",
        "40": "forty",
        "115": "one hundred fifteen",
        "9021": "nine thousand twenty-one",
        "2345": "two thousand three hundred forty-five",
    },
}


def answer_to(question: str) -> str:
    """An independent solution of the tasks that are not numbers in words."""
    words = question.split()
    if words[0] == "spell":
        return " ".join(words[1])
    if words[0] == "sort":
        return " ".join(str(digit) for digit in range(10) for _ in range(words.count(str(digit))))
    if words[0] == "the":
        return (date.fromisoformat(words[3]) + timedelta(days=1)).isoformat()
    return str(int(words[0]) + int(words[2]))


@pytest.mark.parametrize("name", GENERATED)
def test_the_answers_are_correct_and_the_splits_do_not_overlap(name):
    rows = build(name).rows
    prompts = [{each["prompt"] for each in rows[split]} for split in SPLITS]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == sum(len(rows[split]) for split in SPLITS)
    answers = {each["prompt"]: each["completion"] for split in SPLITS for each in rows[split]}
    assert answers.items() >= HAND_CHECKED.get(name, {}).items()
    if name == "numbers":
        assert len(set(answers.values())) == len(answers)
    else:
        assert all(answer_to(question) == answer for question, answer in answers.items())
    assert 300 <= len(rows["validation"]) <= 600 and 600 <= len(rows["test"]) <= 1100


@pytest.mark.parametrize("name", GENERATED)
def test_a_task_is_determined_by_its_seed(name):
    assert build(name, 1).rows == build(name, 1).rows
    assert build(name, 1).rows["test"] != build(name, 2).rows["test"]


def test_the_order_of_the_numbers_does_not_separate_sums():
    rows = build("arithmetic").rows
    groups = [{frozenset(each["prompt"].split(" + ")) for each in rows[split]} for split in SPLITS]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


def test_permutations_of_a_list_are_in_one_split():
    rows = build("sorting").rows
    train, _, test = ({each["completion"] for each in rows[split]} for split in SPLITS)
    assert not train & test


def test_numbers_in_words_are_distinct_and_composed_of_known_words():
    assert in_words(1000) == "one thousand"
    assert {word for number in range(10_000) for word in in_words(number).replace("-", " ").split()} >= {
        "zero",
        "ninety",
    }


def test_rows_of_a_group_stay_together_and_prompts_are_unique():
    rows = [(str(number // 3), row(f"question {number}", str(number))) for number in range(900)]
    splits = split_by_group([*rows, ("other group", row("question 0", "another answer"))], seed=0)
    for split in SPLITS:
        numbers = {int(each["completion"]) for each in splits[split]}
        assert numbers == {3 * group + i for group in {number // 3 for number in numbers} for i in range(3)}
    assert sum(map(len, splits.values())) == 900
    with pytest.raises(MiniGPTError, match="2 rows are too few for three splits"):
        split_by_group(rows[:2], seed=0)


def test_the_folder_is_read_by_training_without_its_test_split(tmp_path, capsys, caplog):
    folder = tmp_path / "sums"
    assert main(["data", "arithmetic", "--output_dir", str(folder), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*(f"{split}.jsonl" for split in SPLITS), "README.md"]
    )
    rows = {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()] for split in SPLITS
    }
    assert rows == build("arithmetic", 3).rows
    assert f"{len(rows['train']):,} for training" in printed and "--score exact" in printed
    readme = (folder / "README.md").read_text()
    assert "seed 3" in readme and f"| `test.jsonl` | {len(rows['test']):,} |" in readme and "CC0-1.0" in readme
    corpus = load_corpus(str(folder), chat=True, cache_dir=tmp_path / "cache")
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
        pairs = [tuple(message["content"] for message in messages) for messages in conversations_in(documents)]
        assert pairs == [(each["prompt"], each["completion"]) for each in rows[split]]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["poetry"], "invalid choice: 'poetry'"),
        (["arithmetic", "--language", "it"], "--language it does not apply to arithmetic"),
        (["arithmetic", "--source", "files"], "arithmetic is generated and has no source"),
        (["translation", "--language", "en"], "give the code of another language than English"),
        (["translation", "--language", "../it"], "give the code of another language than English"),
    ],
)
def test_invalid_arguments_are_reported(flags, message, tmp_path, capsys):
    assert main(["data", *flags, "--output_dir", str(tmp_path / "task")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "task").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["data", "arithmetic", "--output_dir", str(tmp_path)]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
