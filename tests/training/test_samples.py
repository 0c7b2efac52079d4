"""Samples written during training: escaping in Markdown, and the steps at which they are written."""

import html
import json

from tests.training.conftest import go_back, train


def test_a_sample_with_markup_quotes_and_lines_is_one_cell_of_the_table(recipe, words, tmp_path):
    folder, prompt = tmp_path / "run", "\"<b>|\n'&"
    flags = ["--sample_prompt", prompt, "--sample_tokens", "4", "--validation_fraction", "0.3", "--eval_steps", "4"]
    assert train(recipe, words, folder, *flags) == 0
    head, rule, *table = (folder / "samples.md").read_text().splitlines()
    assert (head, rule) == ("| step | validation loss | sample |", "|---|---|---|")
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    samples = [(row["step"], row["sample"]) for row in logged if "sample" in row]
    losses = {row["step"]: row["eval_loss"] for row in logged if "eval_loss" in row}
    assert [step for step, _ in samples] == [0, 4, 8]
    for row, (step, sample) in zip(table, samples, strict=True):
        _, first, second, third, last = row.split("|")
        assert (int(first), second.strip(), last) == (step, f"{losses[step]:.4f}" if step in losses else "", "")
        assert third.strip(" ").startswith("\"&lt;b&gt;&#124;<br>'&amp;")
        assert len(sample) <= len(prompt) + 4  # of four bytes there are four characters at most
        assert html.unescape(third.replace("<br>", "\n")).strip(" ") == sample.strip(" ")


def test_without_validation_there_is_a_sample_at_each_checkpoint(recipe, words, tmp_path):
    assert train(recipe, words, tmp_path / "run", "--sample_tokens", "4", "--save_steps", "3") == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "sample" in row] == [0, 3, 6, 8]


def test_an_evaluation_at_the_start_has_the_sample_before_training(recipe, words, tmp_path, capsys):
    flags = ("--sample_tokens", "4", "--validation_fraction", "0.3", "--eval_steps", "4", "--eval_on_start", "true")
    assert train(recipe, words, tmp_path / "run", *flags) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "sample" in row] == [0, 4, 8]
    assert capsys.readouterr().out.count("--- sample before training:") == 1


def test_a_resumed_run_repeats_the_sample_of_its_checkpoint(recipe, words, tmp_path, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(recipe, words, straight, "--sample_tokens", "4") == 0
    assert "--- sample before training:" in capsys.readouterr().out
    go_back(straight, resumed, 4)
    assert train(recipe, words, resumed, "--sample_tokens", "4") == 0
    out = capsys.readouterr().out
    assert "--- sample at step 4:" in out
    assert "before training:" not in out
    assert (resumed / "samples.md").read_text() == (straight / "samples.md").read_text()
