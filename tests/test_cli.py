"""The command line: results and output of each command, help, and the start of the process."""

import gc
import json
import os
import platform
import re
import subprocess
import sys

import pytest

import minigpt_cli
from minigpt_cli import COMMANDS
from minigpt_hf.cli import main
from minigpt_hf.cli.settings_help import COMMON
from minigpt_hf.training.recipe import argument_parser, read_recipe
from tests.conftest import ROOT


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# -- commands ---------------------------------------------------------------------------------------------------------


def test_evaluate_reproduces_the_published_results(run_folder, text_file, capsys):
    folder = run_folder / "model"
    code, out, _ = run(capsys, "evaluate", folder, "--data", text_file, "--split", "validation", "--json")
    results = json.loads((folder / "minigpt.json").read_text())["results"]
    score = json.loads(out)
    assert code == 0
    assert score["loss"] == pytest.approx(results["loss"], rel=1e-6)
    assert {name: score[name] for name in ("tokens", "bytes", "block_size")} == {
        name: results[name] for name in ("tokens", "bytes", "block_size")
    }


def test_evaluate_prints_the_loss_and_the_sizes_of_the_splits_add_up(run_folder, text_file, text, capsys):
    folder = run_folder / "model"
    sizes = []
    for split in ("train", "validation", "all"):
        code, out, _ = run(capsys, "evaluate", folder, "--data", text_file, "--split", split)
        assert code == 0
        assert re.search(r"loss +\d\.\d{4} nats per token\n", out)
        sizes.append(int(re.search(r"([\d,]+) bytes", out)[1].replace(",", "")))
    assert sizes[0] + sizes[1] == sizes[2] == len(text.encode())


def test_generate_streams_text_that_is_determined_by_the_seed(run_folder, capsys):
    folder = run_folder / "model"
    argv = ("generate", folder, "--prompt", "def ", "--max_new_tokens", 20)
    texts = [run(capsys, *argv, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")
    # Greedy text is equal with and without streaming.
    code, several, _ = run(capsys, *argv, "--seed", 1, "--num_return_sequences", 2)
    assert code == 0
    assert several.count("\n---\n") == 2
    greedy = [run(capsys, *argv, "--do_sample", "false", *more)[1] for more in ([], ["--num_beams", 1])]
    assert greedy[0] == greedy[1]


def test_a_prompt_is_printed_once_all_options_are_accepted(run_folder, capsys):
    argv = ["generate", str(run_folder / "model"), "--prompt", "def ", "--max_new_tokens", "2"]
    for option in ("--temperature=-1", "--repetition_penalty=-1", "--top_k=-3"):
        assert main([*argv, option]) == 2
        assert capsys.readouterr().out == ""
    assert main([*argv, "--temperature", "1e-3", "--seed", "1"]) == 0
    greedy = capsys.readouterr().out
    assert main([*argv, "--temperature", "0.001", "--seed", "1"]) == 0
    assert capsys.readouterr().out == greedy
    assert greedy.startswith("def ")


def test_generate_without_a_prompt_starts_with_the_bos_token(run_folder, capsys):
    code, out, _ = run(capsys, "generate", run_folder / "model", "--max_new_tokens", 12, "--seed", 1)
    assert code == 0
    assert out.strip()
    assert "<|endoftext|>" not in out


def test_interactive_generation_continues_each_line(run_folder, capsys, monkeypatch):
    lines = iter(["def ", "class "])

    def next_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    code, out, err = run(capsys, "generate", run_folder / "model", "--interactive", "--max_new_tokens", 5)
    assert code == 0
    assert out.startswith("def ")
    assert "\nclass " in out
    assert "Ctrl-D" in err


def test_training_prints_its_plan_its_progress_and_the_model_folder(recipe_file, text_file, tmp_path, capsys):
    code, out, err = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"),
        *(
            "--max_steps",
            8,
            "--warmup_steps",
            2,
            "--logging_steps",
            2,
            "--tokenizer",
            "characters",
            "--eval_steps",
            4,
            "--save_steps",
            4,
        ),
    )
    assert code == 0
    assert re.fullmatch("a validation score on only .*\n", err)  # the text is small
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["device", "text", "model", "training", "time"]
    assert "8 steps of 128 tokens = 1,024 tokens" in lines[3]
    assert len(re.findall(r"^step \d/8   loss .* bits/byte   lr .* tokens/s .* left$", out, re.MULTILINE)) == 4
    assert re.findall(r"^step (\d)/8   validation loss", out, re.MULTILINE) == ["4", "8"]
    assert [when in out for when in ("before training", "after 4 steps", "after training")] == [True] * 3
    assert lines[-1] == f"the model is in {tmp_path / 'run' / 'model'}"


def test_without_validation_the_last_weights_are_published(recipe_file, text_file, tmp_path, capsys):
    code, out, _ = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"),
        *("--max_steps", 2, "--logging_steps", 1, "--validation_fraction", 0, "--tokenizer", "bytes"),
    )
    assert code == 0
    assert "validation loss" not in out
    assert json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"] == {}


def test_a_sample_prompt_with_unknown_characters_is_replaced_by_the_bos_token(recipe_file, tmp_path, capsys):
    text = tmp_path / "greek.txt"
    text.write_text("μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος\n" * 30, encoding="utf-8")
    code, _, err = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text, "--output_dir", tmp_path / "run"),
        *("--max_steps", 2, "--logging_steps", 1, "--tokenizer", "characters"),
    )
    assert code == 0
    assert (
        "samples start a new document, without the prompt: the prompt has a character that the tokenizer does not"
        in err
    )
    code, out, _ = run(capsys, "evaluate", tmp_path / "run" / "model", "--data", text, "--copying", "--json")
    published = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["copying"]
    assert code == 0 and {name: json.loads(out)[name] for name in published} == published != {}
    latin = tmp_path / "latin.txt"
    latin.write_text("arma virumque cano")
    code, _, err = run(capsys, "evaluate", tmp_path / "run" / "model", "--data", latin)
    assert (code, err.count("\n")) == (2, 1)
    assert "the text has a character that the tokenizer does not know: 'a' (U+0061)" in err


def test_an_existing_tokenizer_can_be_used(recipe_file, run_folder, text_file, tmp_path, capsys):
    code, _, _ = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"),
        *("--max_steps", 1, "--logging_steps", 1, "--tokenizer", run_folder / "model"),
    )
    assert code == 0
    written = (tmp_path / "run" / "model" / "tokenizer.json").read_text()
    assert written == (run_folder / "model" / "tokenizer.json").read_text()


def test_given_epochs_take_precedence_over_the_steps_of_the_recipe(recipe_file, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("a line of text to learn\n" * 40)
    code, out, _ = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text, "--output_dir", tmp_path / "run"),
        *("--num_train_epochs", 2, "--tokenizer", "bytes", "--logging_steps", 1),
    )
    assert code == 0
    sequences = (864 + 1) // 32  # nine tenths of 960 bytes, and the BOS token
    steps = 2 * -(-sequences // 4)  # the last step of an epoch has only three sequences
    assert f"{steps} steps of at most 128 tokens = {2 * sequences * 32:,} tokens" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr().out
    assert code == 0
    assert out.startswith(f"usage: minigpt {command}")


@pytest.mark.parametrize("command", ["train", "tokenize"])
def test_the_help_has_at_most_50_lines_and_refers_to_the_complete_help(command, capsys):
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    assert f"minigpt {command} --help-all" in lines[-1]


def test_the_help_of_train_groups_common_settings_with_their_defaults(capsys):
    main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line in ("data", "model", "optimization", "output", "hardware")]
    assert headings == ["data", "model", "optimization", "output", "hardware"]
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  --")}
    # The default of recipe demo, that of recipe auto, and that of transformers.
    demo = read_recipe("demo")
    assert rows["--learning_rate"][:3] == [str(demo["learning_rate"]), "auto", "5e-05"]
    assert rows["--max_steps"][:3] == [str(demo["max_steps"]), "auto", "-1"]
    assert rows["--eval_steps"][:3] == ["0.25", "auto", "none"]
    assert rows["--seed"][0] == "42"
    assert rows["--seed"][1] == "seed"  # equal in all three, hence no further columns
    assert rows["--hidden_size"][:3] == [str(demo["hidden_size"]), "auto", "width"]  # not a setting of transformers
    assert rows["--output_dir"][:2] == ["runs/RECIPE", "none"]


def test_every_setting_of_the_help_exists(capsys):
    parser = argument_parser()
    assert all(f"--{name}" in parser._option_string_actions for settings in COMMON.values() for name in settings)


def test_the_complete_help_of_train_names_every_flag_and_the_recipes(capsys):
    main(["train", "--help-all"])
    out = capsys.readouterr().out
    for flag in (
        "--recipe",
        "shakespeare-char",
        "--data",
        "--hidden_size",
        "--muon",
        "--no_muon",
        "--learning_rate",
        "--fsdp",
    ):
        assert flag in out


def test_help_and_version_are_printed_and_a_missing_command_is_an_error(capsys):
    from minigpt_hf import __version__

    assert minigpt_cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert minigpt_cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: minigpt")
    assert minigpt_cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minigpt {__version__}\n"


# -- start of the process ----------------------------------------------------------------------------------------------


def test_the_help_imports_neither_the_package_nor_its_dependencies():
    program = "import sys, minigpt_cli; minigpt_cli.main(['--help']); print(*sys.modules)"
    *lines, modules = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT).splitlines()
    assert lines[0].startswith("usage: minigpt")
    assert not {"minigpt_hf", "torch", "transformers", "numpy", "argparse", "logging"} & {*modules.split()}


def test_the_entry_point_runs_the_commands(capsys):
    assert minigpt_cli.main(["recipes", "show", "demo"]) == 0
    assert "max_steps" in capsys.readouterr().out
    assert gc.isenabled()  # disabled only while modules are imported


def test_an_openmp_policy_is_set_unless_the_environment_sets_one(monkeypatch):
    for given, expected in (
        ({}, {"GOMP_SPINCOUNT": "8000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ):
        monkeypatch.setattr(os, "environ", dict(given))
        minigpt_cli.set_openmp_policy()
        assert os.environ == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_is_kept_for_reuse_unless_the_environment_configures_the_allocator():
    program = """
import minigpt_cli, os
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
minigpt_cli.keep_freed_memory()
before = resident()
blocks = [b"x" * 2**23 for _ in range(10)]  # 80 MiB
del blocks
print(resident() - before)
"""
    kept = {}
    for given in ({}, {"MALLOC_TRIM_THRESHOLD_": "1000000"}):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | given
        output = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT, env=environment)
        kept[bool(given)] = float(output)
    assert kept[False] > 70 and kept[True] < 10


@pytest.mark.slow
def test_a_command_sets_the_openmp_policy_before_torch_is_loaded_and_an_import_does_not():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = "import minigpt_cli; minigpt_cli.main(['recipes', 'show', 'demo'])"
    for program, expected in ((command, "8000"), ("import minigpt_hf", None)):
        # At the first import of torch, print the variable.
        hook = """
import os, sys
class Finder:
    def find_spec(name, *_):
        if name == "torch":
            print("before torch:", os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
sys.meta_path.insert(0, Finder)
"""
        argv = [sys.executable, "-c", f"{hook}\n{program}\nprint('at the end:', os.environ.get('GOMP_SPINCOUNT'))"]
        output = subprocess.check_output(argv, text=True, cwd=ROOT, env=environment)
        assert f"before torch: {expected} False" in output
        assert f"at the end: {expected}" in output
