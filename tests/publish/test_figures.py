"""Figures of runs, comparisons of runs, and the table of samples and validation losses."""

import json
import shutil

from PIL import Image

from minigpt_hf.cli import main
from minigpt_hf.publish.figures import columns, draw_learning, short
from minigpt_hf.training.callbacks import samples_table
from minigpt_hf.training.run_folder import read_log


def test_every_figure_is_drawn_and_each_curve_has_points(run_folder):
    log = read_log(run_folder / "log.jsonl")
    for name in ("loss", "bits_per_byte", "eval_loss", "eval_bits_per_byte", "learning_rate", "grad_norm"):
        tokens, values = columns(log, name)
        assert len(tokens) == len(values) >= 2, name
    for name in ("loss", "training"):
        with Image.open(run_folder / "model" / "figures" / f"{name}.png") as picture:
            assert picture.width == 1350
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # not blank


def test_the_loss_with_label_smoothing_is_named_and_not_drawn_in_bits_per_byte(run_folder, tmp_path):
    """SVG files of matplotlib contain each text as a comment."""
    plain = read_log(run_folder / "log.jsonl")
    smoothed = [{name: value for name, value in row.items() if name != "bits_per_byte"} for row in plain]
    for log, plain_labels, smoothed_labels in ((plain, 2, 0), (smoothed, 0, 1)):
        draw_learning(log, tmp_path / "loss.svg")
        svg = (tmp_path / "loss.svg").read_text(encoding="utf-8")
        assert svg.count("<!-- training -->") == plain_labels
        assert svg.count("<!-- training, smoothed labels -->") == smoothed_labels
        assert svg.count("<!-- validation -->") == 2


def test_figures_are_omitted_from_folder_and_card_on_request(run_folder, recipe_file, text_file, tmp_path):
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run", "--max_steps", "1"]
    assert main([str(word) for word in [*argv, "--no_figures"]]) == 0
    assert not (tmp_path / "run" / "model" / "figures").exists()
    for folder, count in ((tmp_path / "run", 0), (run_folder, 2)):
        assert (folder / "model" / "README.md").read_text(encoding="utf-8").count("](figures/") == count


def test_samples_are_listed_with_their_validation_loss(run_folder):
    lines = (run_folder / "samples.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| step | validation loss | sample |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0", "| 20", "| 40"]
    losses = [row["eval_loss"] for row in read_log(run_folder / "log.jsonl") if "eval_loss" in row]
    assert f"| {losses[0]:.4f} |" in lines[3]
    assert samples_table([{"step": 1, "sample": "a|b\n<c>"}]).endswith("| 1 |  | a&#124;b<br>&lt;c&gt; |\n")


def test_runs_are_compared_in_one_figure(run_folder, tmp_path, capsys):
    other = tmp_path / "other" / "tiny"
    other.mkdir(parents=True)
    shutil.copy(run_folder / "log.jsonl", other)
    assert main(["plot", str(run_folder), str(other), "--output", str(tmp_path / "both.png")]) == 0
    assert "the figure is in" in capsys.readouterr().out
    assert main(["plot", str(run_folder), "--output", str(tmp_path / "one.png")]) == 0
    both, one = ((tmp_path / name).read_bytes() for name in ("both.png", "one.png"))
    assert both != one
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.jsonl").write_text(json.dumps({"step": 1, "tokens": 2, "sample": "x"}) + "\n")
    assert main(["plot", str(tmp_path / "new"), "--output", str(tmp_path / "new.svg")]) == 0


def test_large_numbers_have_decimal_prefixes():
    assert [short(n) for n in (7, 1_500, 1_500_000, 2e9)] == ["7", "1.5 k", "1.5 M", "2 G"]
