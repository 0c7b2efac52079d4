"""lm-evaluation-harness reports the metrics of this package, and `minigpt evaluate --tasks` those of the harness."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from minigpt_hf.cli import main
from minigpt_hf.export.native import export_native
from minigpt_hf.inference.evaluation import evaluate_texts
from tests.neighbours.conftest import EMAIL

WINDOW = 64
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{prefix}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def texts_of_full_windows(tokenizer) -> list[str]:
    """Return texts of exactly one, two and three windows.

    For a partial last window, the harness extends the context to the left, unlike `minigpt evaluate`.
    """
    source = (EMAIL / "generator.py").read_text(encoding="utf-8")
    texts, start = [], 0
    for windows in (1, 2, 3):
        end = start + 1
        while len(tokenizer(source[start:end]).input_ids) < windows * WINDOW or source[end - 1].isspace():
            end += 1
        texts.append(source[start:end])
        start = end
    return texts


def questions() -> list[dict]:
    """Return multiple-choice questions: which of four endings does a line of source code have?"""
    lines = (EMAIL / "header.py").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if len(line.strip()) > 40][:24]
    splits = [len(line[: line.rindex(" ", 0, 25)].rstrip()) for line in lines]  # endings must start with the space
    endings = [line[split:] for line, split in zip(lines, splits, strict=True)]
    return [
        {
            "prefix": lines[i][: splits[i]],
            "endings": [endings[(i - i % 4 + k) % len(lines)] for k in range(4)],
            "answer": i % 4,
        }
        for i in range(len(lines))
    ]


@torch.no_grad()
def log_likelihood(model, tokenizer, prefix: str, ending: str) -> float:
    """Return the log-likelihood of `ending` after `prefix`, in nats."""
    ids = tokenizer(prefix + ending, return_tensors="pt").input_ids
    prefix_length = len(tokenizer(prefix).input_ids)
    log_probabilities = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return log_probabilities[prefix_length - 1 :].sum().item()


@pytest.fixture(scope="module")
def results(trained, tokenizer, tmp_path_factory):
    """The metrics of the harness, and its samples of the multiple-choice task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = {"minigpt_rolling": [{"text": text} for text in texts_of_full_windows(tokenizer)]}
    rows["minigpt_choice"] = questions()
    for name, task in (("minigpt_rolling", ROLLING), ("minigpt_choice", CHOICE)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + task, encoding="utf-8")
    argv = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    argv += ["--model_args", f"pretrained={trained},trust_remote_code=True,dtype=float32,max_length={WINDOW}"]
    argv += ["--tasks", "minigpt_rolling,minigpt_choice", "--include_path", folder, "--output_path", folder / "out"]
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    argv += ["--log_samples"]
    process = subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-5000:]
    (summary,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_minigpt_choice_*.jsonl")
    return (
        json.loads(summary.read_text())["results"],
        sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"]),
    )


def test_rolling_log_likelihood_equals_minigpt_evaluate(results, model, tokenizer):
    expected = evaluate_texts(model, tokenizer, texts_of_full_windows(tokenizer), block_size=WINDOW)
    metrics = results[0]["minigpt_rolling"]
    assert metrics["bits_per_byte,none"] == pytest.approx(expected.bits_per_byte, abs=1e-5)
    assert math.log2(metrics["byte_perplexity,none"]) == pytest.approx(expected.bits_per_byte, abs=1e-5)


def test_multiple_choice_scores_and_accuracies_equal_those_of_the_model(results, model, tokenizer):
    correct, correct_normalized = [], []
    for question, row in zip(questions(), results[1], strict=True):
        scores = [log_likelihood(model, tokenizer, question["prefix"], ending) for ending in question["endings"]]
        assert [float(response[0][0]) for response in row["resps"]] == pytest.approx(scores, abs=1e-3)
        normalized = [score / len(ending) for score, ending in zip(scores, question["endings"], strict=True)]
        correct.append(scores.index(max(scores)) == question["answer"])
        correct_normalized.append(normalized.index(max(normalized)) == question["answer"])
    assert results[0]["minigpt_choice"]["acc,none"] == pytest.approx(sum(correct) / len(correct))
    expected = sum(correct_normalized) / len(correct)
    assert results[0]["minigpt_choice"]["acc_norm,none"] == pytest.approx(expected)


# -- minigpt evaluate --tasks -----------------------------------------------------------------------------------------

PAIRS = """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
num_fewshot: 0
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


def minimal_pairs() -> list[dict]:
    """Return lines of source code, and the same with two adjacent words exchanged, in the manner of BLiMP."""
    lines = [line.strip() for line in (EMAIL / "header.py").read_text(encoding="utf-8").splitlines()]
    words = [words for line in lines if len(words := line.split()) > 4]
    return [{"good": " ".join(w), "bad": " ".join([*w[:1], w[2], w[1], *w[3:]])} for w in words[:60] if w[1] != w[2]]


@pytest.fixture(scope="module")
def tasks(tokenizer, tmp_path_factory):
    """A folder of local tasks: minimal pairs, rolling likelihoods, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"pairs": minimal_pairs(), "rolling": [{"text": text} for text in texts_of_full_windows(tokenizer)]}
    for name, task in (("pairs", PAIRS), ("rolling", ROLLING)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + task, encoding="utf-8")
    group = "group: suite\ntask: [pairs]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "suite.yaml").write_text(group, encoding="utf-8")
    return folder


def test_minigpt_evaluate_equals_the_command_of_the_harness(trained, tasks, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "model")
    assert main(["evaluate", str(folder), "--tasks", "suite,rolling", "--task_path", str(tasks), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    twin = export_native(trained, tmp_path / "twin")
    argv = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "16"]
    argv += ["--model_args", f"pretrained={twin},dtype=float32", "--tasks", "suite,rolling", "--include_path", tasks]
    argv += ["--output_path", tmp_path / "out"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    (summary,) = (tmp_path / "out").rglob("results_*.json")
    expected = json.loads(summary.read_text())["results"]
    compared = set()
    for result in found:
        metrics, key = expected[result["task"]], f"{result['metric']},{result['filter']}"
        assert result["value"] == pytest.approx(metrics[key], abs=1e-6)
        stderr = metrics[f"{result['metric']}_stderr,{result['filter']}"]
        assert result["stderr"] == (None if stderr == "N/A" else pytest.approx(stderr, abs=1e-6))
        compared.add((result["task"], result["metric"], result["samples"]))
    pairs = len(minimal_pairs())
    assert {("suite", "acc", pairs), ("pairs", "acc", pairs), ("rolling", "bits_per_byte", 3)} <= compared
    (accuracy,) = [result for result in found if result["task"] == "pairs"]
    assert 0.5 < accuracy["value"] <= 1 and 0 < accuracy["stderr"] < 0.1
    assert json.loads((folder / "minigpt.json").read_text())["tasks"] == found
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        f"| `pairs`, version 1.0 | `acc` | {accuracy['value']:.4f} | {accuracy['stderr']:.4f} | {pairs} | 0 |" in card
    )
    assert "| `rolling` | `bits_per_byte` |" in card  # its definition states no version


def test_an_unknown_task_and_missing_data_are_reported_in_one_line(trained, tasks, tmp_path, capsys):
    broken = TASK.format(name="broken", file=tmp_path / "absent.jsonl") + PAIRS
    (tmp_path / "broken.yaml").write_text(broken, encoding="utf-8")
    for flags, message in (
        (["--tasks", "blumpf"], "unknown task 'blumpf': `lm_eval ls tasks` lists the names, and --task_path adds"),
        (["--tasks", "broken", "--task_path", str(tmp_path)], "tasks broken: a definition or its data cannot be read"),
        (["--tasks", "x", "--task_path", "absent"], "absent: no such folder; give a folder of tasks"),
    ):
        assert main(["evaluate", str(trained), "--no_save", *flags]) == 2
        error = capsys.readouterr().err
        assert f"minigpt evaluate: {message}" in error.splitlines()[-1]


def test_the_examples_of_a_group_are_those_of_its_tasks(trained, tasks, tmp_path, capsys):
    """The harness states the number of one of the tasks for the group."""
    file = tasks / "pairs.jsonl"
    examples = PAIRS.replace("num_fewshot: 0", "num_fewshot: 2") + "fewshot_split: test\n"
    for name, task in (("none", PAIRS), ("two", examples), ("too", examples)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + task, encoding="utf-8")
    aggregate = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    for name, members in (("mixed", "none, two"), ("equal", "too")):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: [{members}]\n{aggregate}", encoding="utf-8")
    folder = shutil.copytree(trained, tmp_path / "model")
    assert main(["evaluate", str(folder), "--tasks", "mixed,equal", "--task_path", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert {each["task"]: each["shots"] for each in found} == {"none": 0, "two": 2, "too": 2, "mixed": None, "equal": 2}
    assert {each["task"]: each["version"] for each in found if each["task"] in ("none", "mixed")} == {
        "none": "1.0",
        "mixed": "",
    }
    (row,) = [row for row in (folder / "README.md").read_text().splitlines() if row.startswith("| `mixed`")]
    assert row.endswith("| differ |")


GENERATED = """
output_type: generate_until
doc_to_text: "{{prefix}}"
doc_to_target: "{{ending}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: NUMBER
metric_list:
  - metric: exact_match
"""


def test_shortened_questions_are_counted_and_answers_longer_than_the_context_rejected(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": WINDOW}))
    rows = [
        {"prefix": "import " * number, "ending": " os", "endings": [" os", " re"], "answer": 0}
        for number in (1, 90, 90)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"choice": CHOICE, "short": GENERATED.replace("NUMBER", "8"), "long": GENERATED.replace("NUMBER", "64")}
    for name, task in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + task)
    flags = ["--task_path", str(tmp_path), "--no_save", "--json"]
    assert main(["evaluate", str(folder), "--tasks", "choice,short", *flags]) == 0
    out, err = capsys.readouterr()
    for name in ("choice", "short"):
        assert f"{name}: 2 of 3 questions exceed the context of the model; their start was omitted" in err
    assert {result["shortened"] for result in json.loads(out.splitlines()[-1])["tasks"]} == {2}
    assert main(["evaluate", str(folder), "--tasks", "long", *flags]) == 2
    assert "task long: an answer has up to 64 tokens, and the context of the model is 64" in capsys.readouterr().err


def test_a_character_that_the_tokenizer_does_not_know_is_reported_in_one_line(tmp_path, capsys):
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("abc cab bca " * 200)
    questions.write_text(json.dumps({"prefix": "abc ", "endings": ["cab", "d\u00e9j\u00e0"], "answer": 0}) + "\n")
    (tmp_path / "choice.yaml").write_text(TASK.format(name="choice", file=questions) + CHOICE)
    shape = ("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "1", "--block_size", "16")
    train = ["train", "--data", str(text), "--tokenizer", "characters", *shape, "--max_steps", "1"]
    assert main([*train, "--output_dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    evaluate = ["evaluate", str(tmp_path / "run" / "model"), "--tasks", "choice", "--task_path", str(tmp_path)]
    assert main(evaluate) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt evaluate: "))
    of_tasks = "a question, an answer or a stop string of the tasks"
    assert f"{of_tasks} has a character that the tokenizer does not know: 'd' (U+0064)" in line
    questions.write_text(json.dumps({"prefix": "abc ", "ending": "cab"}) + "\n")
    (tmp_path / "choice.yaml").write_text(TASK.format(name="choice", file=questions) + GENERATED.replace("NUMBER", "2"))
    assert main(evaluate) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt evaluate: "))
    assert f"{of_tasks} has a character that the tokenizer does not know: '\\n' (U+000A)" in line


def test_tokens_that_a_tokenizer_appends_to_every_text_are_not_scored(trained, tmp_path, capsys, monkeypatch):
    """The harness alone would score them instead of the last tokens of an answer, and so give equal answers to all."""
    folder, file = shutil.copytree(trained, tmp_path / "model"), tmp_path / "rows.jsonl"
    rows = [{**question, "ending": question["endings"][0], "text": question["prefix"]} for question in questions()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    warnings: list[str] = []
    monkeypatch.setattr("lm_eval.models.huggingface.eval_logger.warning", lambda text, *_: warnings.append(text))
    rest = context - max(len(tokenizer(row["prefix"]).input_ids) for row in rows)  # the longest question fits exactly
    tasks = {"choice": CHOICE, "generated": GENERATED.replace("NUMBER", str(rest)), "rolling": ROLLING}
    for name, task in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + task)
    flags = ["--tasks", ",".join(tasks), "--task_path", str(tmp_path), "--no_save", "--json"]
    assert main(["evaluate", str(folder), *flags]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[end])
    backend.save(str(folder / "tokenizer.json"))
    assert main(["evaluate", str(folder), *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"] == expected
    assert not [warning for warning in warnings if "Left truncation" in warning]


def test_an_answer_that_the_tokenizer_joins_with_the_question_is_an_error(trained, tmp_path, capsys):
    row = {"prefix": "i", "endings": ["n", "q"], "answer": 0}  # `in` is one token
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "choice.yaml").write_text(TASK.format(name="choice", file=tmp_path / "rows.jsonl") + CHOICE)
    assert main(["evaluate", str(trained), "--tasks", "choice", "--task_path", str(tmp_path), "--no_save"]) == 2
    assert "task choice: an answer has no tokens of its own" in capsys.readouterr().err
