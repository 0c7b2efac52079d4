"""lm-evaluation-harness, by its command and with remote code, gets the figures that this package gets."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from minigpt_hf.evaluation import evaluate_texts
from tests.neighbours.conftest import EMAIL

WINDOW = 64
TASKS = """
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
doc_to_text: "{{beginning}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def texts_of_whole_windows(tokenizer) -> list[str]:
    """Texts of one, two and three windows: in a last window that is not full, the harness looks back, and we do not."""
    source = (EMAIL / "generator.py").read_text(encoding="utf-8")
    texts, begin = [], 0
    for windows in (1, 2, 3):
        end = begin + 1
        while len(tokenizer(source[begin:end]).input_ids) < windows * WINDOW or source[end - 1].isspace():
            end += 1
        texts.append(source[begin:end])
        begin = end
    return texts


def questions() -> list[dict]:
    """Which of four endings does a line of source have?"""
    lines = (EMAIL / "header.py").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if len(line.strip()) > 40][:24]
    cuts = [len(line[: line.rindex(" ", 0, 25)].rstrip()) for line in lines]  # the harness wants spaces in the ending
    endings = [line[cut:] for line, cut in zip(lines, cuts, strict=True)]
    return [
        {
            "beginning": lines[i][: cuts[i]],
            "endings": [endings[(i - i % 4 + k) % len(lines)] for k in range(4)],
            "right": i % 4,
        }
        for i in range(len(lines))
    ]


@torch.no_grad()
def log_likelihood(model, tokenizer, beginning: str, ending: str) -> float:
    ids = tokenizer(beginning + ending, return_tensors="pt").input_ids
    known = len(tokenizer(beginning).input_ids)
    chances = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return chances[known - 1 :].sum().item()


@pytest.fixture(scope="module")
def results(trained, tokenizer, tmp_path_factory):
    """What the harness reports and, row by row, what it saw."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = {"minigpt_rolling": [{"text": text} for text in texts_of_whole_windows(tokenizer)]}
    rows["minigpt_choice"] = questions()
    for name, task in (("minigpt_rolling", ROLLING), ("minigpt_choice", CHOICE)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASKS.format(name=name, file=file) + task, encoding="utf-8")
    argv = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    argv += ["--model_args", f"pretrained={trained},trust_remote_code=True,dtype=float32,max_length={WINDOW}"]
    argv += ["--tasks", "minigpt_rolling,minigpt_choice", "--include_path", folder, "--output_path", folder / "out"]
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run([*argv, "--log_samples"], env=env, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    (summary,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_minigpt_choice_*.jsonl")
    return (
        json.loads(summary.read_text())["results"],
        sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"]),
    )


def test_rolling_likelihood_is_the_figure_of_minigpt_evaluate(results, model, tokenizer):
    ours = evaluate_texts(model, tokenizer, texts_of_whole_windows(tokenizer), block_size=WINDOW)
    theirs = results[0]["minigpt_rolling"]
    assert theirs["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, abs=1e-5)
    assert math.log2(theirs["byte_perplexity,none"]) == pytest.approx(ours.bits_per_byte, abs=1e-5)


def test_multiple_choice_scores_each_ending_as_the_model_does(results, model, tokenizer):
    best, best_by_length = [], []
    for question, row in zip(questions(), results[1], strict=True):
        ours = [log_likelihood(model, tokenizer, question["beginning"], ending) for ending in question["endings"]]
        theirs = [float(answer[0][0]) for answer in row["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-3)
        by_length = [score / len(ending) for score, ending in zip(ours, question["endings"], strict=True)]
        best.append(ours.index(max(ours)) == question["right"])
        best_by_length.append(by_length.index(max(by_length)) == question["right"])
    assert results[0]["minigpt_choice"]["acc,none"] == pytest.approx(sum(best) / len(best))
    assert results[0]["minigpt_choice"]["acc_norm,none"] == pytest.approx(sum(best_by_length) / len(best))
