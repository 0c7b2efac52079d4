"""`--minutes` and `--size` choose the settings that are not given, by rules that can be computed manually."""

import json
import logging
import re
import shutil
import time

import pytest
import torch
import yaml

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.cli import main
from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.training import autoconfig
from minigpt_hf.training.autoconfig import OTHER_SECONDS, AutoConfigurator, parse_size
from minigpt_hf.training.recipe import parse_arguments, resolved
from minigpt_hf.training.report import trained_tokens
from minigpt_hf.training.run_folder import RunFolder
from minigpt_hf.training.scaling import (
    WIDTHS,
    Shape,
    batch_tokens,
    block_size_for,
    distance_from_optimal,
    learning_rates,
    vocabulary_for,
)
from minigpt_hf.training.text import prepare_text
from tests.conftest import SHAKESPEARE, representative
from tests.training.conftest import go_back


def automatic_settings(argv, folder, began=None):
    """The resolved settings of a command, and the token stream they were chosen for."""
    arguments = parse_arguments([*argv, "--output_dir", str(folder / "run"), "--use_cpu", "--cache_dir", str(folder)])
    configurator = AutoConfigurator(
        arguments, RunFolder(folder / "run"), time.perf_counter() if began is None else began
    )
    text = prepare_text(configurator.data, configurator.choose_tokenizer, configurator.choose_block_size)
    return configurator.choose_remaining(text), text.train


def test_rules_at_sizes_computed_manually():
    small = Shape(128)
    assert small.settings() == {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    assert small.parameters(67) == 4 * (4 * 128 * 128 + 3 * 128 * 352) + 67 * 128
    assert [Shape(width).layers for width in (64, 256, 384, 768)] == [2, 5, 7, 12]
    assert [block_size_for(tokens) for tokens in (1e5, 1e7, 1.1e7, 2e8, 5e9, 1e12)] == [128, 128, 256, 512, 1024, 1024]
    assert [vocabulary_for(characters) for characters in (1e6, 8_400_000, 17_000_000, 1e12)] == [
        1024,
        1024,
        2048,
        32768,
    ]
    assert [batch_tokens(tokens) for tokens in (1e5, 262_144, 1e6, 1e8)] == [768, 768, 1500, 15_000]
    assert learning_rates(128) == {"learning_rate": 1e-2, "muon_learning_rate": 0.02}
    assert learning_rates(512) == {"learning_rate": 5e-3, "muon_learning_rate": 0.02}


def test_sizes_accept_the_suffixes_k_and_m():
    assert [parse_size(size) for size in ("10m", "800k", "0.8M", "800000")] == [1e7, 8e5, 8e5, 8e5]
    with pytest.raises(ValueError, match="size ten: not a number of parameters; give one like 800k"):
        parse_size("ten")


def test_a_text_of_many_distinct_characters_has_a_vocabulary_that_fits_its_length(tmp_path, caplog):
    """1,024 tokens, the fewest, instead of the default of 4,096."""
    caplog.set_level(logging.INFO, "minigpt_hf")
    letters = [chr(0x4E00 + number) for number in range(300)]
    (file := tmp_path / "text.txt").write_text("".join(a + b for a in letters for b in letters), encoding="utf-8")
    (data, _, _), _ = automatic_settings(["--size", "60k", "--data", str(file)], tmp_path)
    assert (data.tokenizer, data.vocab_size) == ("bpe", 1024)
    assert "vocab_size 1,024: about one token per 8,000 characters of training text" in caplog.text


def test_minutes_measure_for_a_tenth_of_the_time_and_plan_the_rest(text_file, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "minigpt_hf")
    monkeypatch.setattr(autoconfig, "MEASURED_SHARE", 0.01)  # instead of 18 seconds
    argv = ["--minutes", "3", "--data", str(text_file), "--sample_tokens", "0"]
    argv += ["--validation_characters", "500", "--learning_rate", "0.003"]
    began = time.perf_counter()
    (data, architecture, training), stream = automatic_settings(argv, tmp_path, began)
    assert (data.tokenizer, data.block_size) == ("characters", 128)
    out = caplog.text
    assert f"at width {architecture.hidden_size}" in out
    (asked,) = [message for message in caplog.messages if message.startswith("time budget ")]
    seconds = [int(word) for word in asked.split() if word.isdigit()]  # text, measurement, training, other
    assert abs(sum(seconds[-4:]) - 180) <= 2  # each is rounded
    assert seconds[-1] >= OTHER_SECONDS
    assert seconds[-3] <= 18 or out.count("at width") <= 2  # on a stalled machine no further shapes are measured
    assert (training.learning_rate, training.muon_learning_rate) == (0.003, 0.02)  # given settings are not replaced
    epochs = trained_tokens(training, SequenceDataset(stream, data.block_size, seed=0), training.max_steps) / len(
        stream
    )
    assert (
        ("small text" in out) == (epochs > 4) == (training.weight_decay == 0.1) == (architecture.residual_dropout > 0)
    )


@pytest.fixture
def machine(monkeypatch):
    """A machine of known speed: each forward pass advances the clock by 5e-9 s per parameter and token.

    The list has, for each forward pass, the clock after it, the width of the model and the number of tokens.
    """
    passes = [(0.0, 0, 0)]

    def hook(module, arguments, output):
        if isinstance(module, MiniGPTForCausalLM):
            tokens = output.logits.shape[:2].numel()
            seconds = 5e-9 * module.num_parameters() * tokens
            passes.append((passes[-1][0] + seconds, module.config.hidden_size, tokens))

    monkeypatch.setattr(time, "perf_counter", lambda: passes[-1][0])
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    yield passes
    handle.remove()


def test_minutes_choose_the_shape_and_the_steps_that_a_machine_of_known_speed_takes(
    text_file, tmp_path, caplog, monkeypatch, machine
):
    caplog.set_level(logging.INFO, "minigpt_hf")
    monkeypatch.setattr(autoconfig, "MEASURED_SHARE", 0.012)  # 18 s by the clock of that machine
    argv = ["--minutes", "25", "--per_device_train_batch_size", "2", "--data", str(text_file)]
    argv += ["--sample_tokens", "8000", "--validation_characters", "9000"]
    random_state = torch.get_rng_state()
    (data, architecture, training), _ = automatic_settings(argv, tmp_path, began=0.0)
    assert torch.equal(torch.get_rng_state(), random_state)
    # Parameters times training tokens that fit into the remaining time, for any shape.
    compute = (1500 - 18 - OTHER_SECONDS) / (1.03 * 5e-9)
    vocabulary = data_vocabulary(text_file)
    best = min(map(Shape, WIDTHS), key=lambda shape: distance_from_optimal(shape, vocabulary, compute))
    assert architecture.hidden_size == best.width == 96
    assert re.findall(r"at width (\d+)", caplog.text) == ["128", "96"]
    first = [now for now, width, _ in machine if width == 128]
    assert 9 <= first[-1] < 9 + first[-1] - first[-2]  # half of the time for measuring
    # The time requested: measuring, four evaluations, five samples, optimizer steps, and the rest.
    head = vocabulary * architecture.hidden_size  # of the auxiliary loss
    second = 1 / (5e-9 * (parameters(data, architecture, vocabulary) + head))  # tokens in a second
    step = training.per_device_train_batch_size * data.block_size
    others = machine[-1][0] + (4 * 9001 + 5 * 8000) / second + OTHER_SECONDS
    assert training.max_steps == pytest.approx((1500 - others) * second / 1.03 / step, abs=0.51)


def parameters(data, architecture, vocabulary: int) -> int:
    """Of a tied model: matrices and embedding, and norms of two per layer, of queries and keys, and the last one."""
    shape = Shape(architecture.hidden_size)
    head = shape.width // architecture.num_attention_heads
    return shape.parameters(vocabulary) + shape.layers * (2 * shape.width + 2 * head) + shape.width


def test_minutes_of_which_less_than_a_quarter_is_left_are_refused_before_anything_is_measured(
    text_file, tmp_path, machine
):
    """Of 60 s, 6 are for measuring and 10 for the rest: after 29 s a quarter is left."""
    argv = ["--minutes", "1", "--data", str(text_file), "--sample_tokens", "0"]
    with pytest.raises(
        ValueError, match=r"30 s have passed and 16 s are required for .*so too little time is left for training"
    ):
        automatic_settings(argv, tmp_path, began=-29.5)
    assert len(machine) == 1


def test_a_size_chooses_the_nearest_shape_and_its_optimal_number_of_tokens(text_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    (data, architecture, training), stream = automatic_settings(["--size", "0.8m", "--data", str(text_file)], tmp_path)
    assert (architecture.hidden_size, architecture.num_hidden_layers, architecture.use_sliding_window) == (128, 4, True)
    tokens = trained_tokens(training, SequenceDataset(stream, data.block_size, seed=0), training.max_steps)
    assert tokens == pytest.approx(2 * 8e5, rel=0.03)
    assert training.mtp_loss_weight == 0.5
    assert "small text" in caplog.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [[1, 2, 3], [1, 2, 4], [1, 2]]),
        (["--block_size", "3"], [[1, 2], [1, 2], [1, 2]]),
        (["--block_size", "1"], []),
        (["--sliding_window", "2", "--max_window_layers", "1"], [[1, 2, 3], [1], [1]]),
    ],
)
def test_the_chosen_positional_heads_fit_the_other_settings(flags, expected, text_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    argv = ["--data", str(text_file), "--num_hidden_layers", "4", "--num_attention_heads", "4", "--hidden_size", "64"]
    (_, architecture, _), _ = automatic_settings([*argv, *flags], tmp_path)
    assert architecture.positional_heads == expected
    assert ("attend to previous tokens from the start" in caplog.text) == bool(expected)


def test_the_auxiliary_loss_is_not_chosen_with_settings_that_exclude_it(text_file, tmp_path):
    argv = ["--size", "0.8m", "--data", str(text_file), "--label_smoothing_factor", "0.1"]
    (_, _, training), _ = automatic_settings(argv, tmp_path)
    assert training.mtp_loss_weight == 0


def test_an_epoch_of_a_short_text_has_at_least_two_steps(tmp_path):
    """The training text has 28 sequences of 128; with a longer text, a model of this size has 33 per step."""
    (tmp_path / "short.txt").write_text("To be, or not to be, that is the question.\n" * 93)
    (_, _, training), stream = automatic_settings(["--size", "3m", "--data", str(tmp_path / "short.txt")], tmp_path)
    assert len(stream) // 128 == 28
    assert training.per_device_train_batch_size == 14


def test_a_text_of_few_tokens_is_trained_on_if_sequences_of_a_given_length_fit(tmp_path):
    (tmp_path / "short.txt").write_text("To be, or not to be, that is the question.")
    argv = ["--data", str(tmp_path / "short.txt"), "--tokenizer", "characters", "--validation_fraction", "0"]
    with pytest.raises(
        ValueError, match=r"more than 128 tokens are required.*; provide more text, or give --block_size"
    ):
        automatic_settings(argv, tmp_path)
    (data, _, training), _ = automatic_settings([*argv, "--block_size", "8"], tmp_path)
    assert data.block_size == 8
    assert training.max_steps > 0


@pytest.mark.parametrize("argv", [["--size", "0.8m"], []])
def test_every_chosen_setting_is_logged(argv, text_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    argv = ["--data", str(text_file), *argv]
    chosen, _ = automatic_settings(argv, tmp_path)
    given = parse_arguments([*argv, "--output_dir", str(tmp_path / "run"), "--use_cpu", "--cache_dir", str(tmp_path)])
    number = 0
    for before, after in zip(given, chosen, strict=True):
        for name, value in vars(after).items():
            is_setting = isinstance(value, str | int | float) and name != "run_name"
            is_setting = is_setting and (name, chosen[0].tokenizer) != ("vocab_size", "characters")  # has no effect
            if is_setting and value != vars(before)[name]:
                assert f"{name} {value}" in caplog.text or f"{name} {value!r}" in caplog.text, name
                number += 1
    assert number > 8
    if not argv[2:]:
        characters = len(text_file.read_text()) * 0.9  # without the last tenth, up to the end of a line
        (shown,) = re.findall(r"the training text has ([\d,]+) characters$", caplog.text, re.MULTILINE)
        assert int(shown.replace(",", "")) == pytest.approx(characters, abs=200)


@pytest.mark.parametrize("argv", [[], ["--hidden_size", "256"]])
def test_the_intended_and_the_actual_number_of_parameters_are_logged(argv, tmp_path, caplog):
    """They differ for the smallest model and with given settings of the architecture."""
    caplog.set_level(logging.INFO, "minigpt_hf")
    (tmp_path / "short.txt").write_text("To be, or not to be, that is the question.\n" * 90)
    automatic_settings(["--data", str(tmp_path / "short.txt"), "--validation_fraction", "0", *argv], tmp_path)
    actual, intended, ratio, size = re.search(
        r"([\d,]+) parameters, intended ([\d,]+), (\d+) per byte of training text \(([\d,]+) bytes\)", caplog.text
    ).groups()
    actual, intended, ratio, size = (int(number.replace(",", "")) for number in (actual, intended, ratio, size))
    assert size == 43 * 90
    assert intended == ratio * size
    assert actual > 1.4 * intended


def data_vocabulary(text_file) -> int:
    return len(set(text_file.read_text())) + 2


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tinyshakespeare.txt")
def test_the_tokenizer_follows_from_the_text_unless_it_is_given(tmp_path):
    for argv, expected in (
        ([], ("characters", 1024)),
        (["--vocab_size", "600"], ("bpe", 600)),
        (["--tokenizer", "bytes"], ("bytes", 1024)),
    ):
        arguments = parse_arguments(["--minutes", "3", "--data", str(SHAKESPEARE), *argv])
        data = AutoConfigurator(arguments, RunFolder(tmp_path), 0.0).choose_tokenizer(
            load_corpus(str(SHAKESPEARE), 0.1)
        )
        assert (data.tokenizer, data.vocab_size) == expected


def test_a_run_resumes_with_the_chosen_settings_and_another_size_is_rejected(text_file, tmp_path, capsys):
    argv = ["train", "--size", "110k", "--max_steps", "2", "--sample_tokens", "0", "--validation_characters", "500"]
    argv += ["--data", str(text_file), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert main(argv) == 0
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["hidden_size"], recipe["num_hidden_layers"], recipe["tokenizer"]) == (64, 2, "characters")
    assert not {"size", "minutes"} & recipe.keys()  # the recipe reproduces this training
    again = AutoConfigurator(parse_arguments(argv[1:]), RunFolder(tmp_path / "run"), 0.0).settings
    assert {name: recipe[name] for name in resolved(again)} == resolved(again)
    assert main(argv) == 0
    assert "this run is already finished" in capsys.readouterr().err
    argv[2] = "800k"
    assert main(argv) == 2
    assert "contains another run, which is finished (size was 110k and is 800k)" in capsys.readouterr().err


def test_the_validation_sample_of_a_chosen_sequence_length_is_that_of_the_recorded_one(text, tmp_path):
    """The text is so short that the sequence length is below 128; the sample consists of windows of this length."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i}.txt").write_text(text[i * 100 : i * 105 + 90])
    flags = ["--data", str(folder), "--validation_characters", "200", "--use_cpu", "--max_steps", "2"]
    runs = [tmp_path / "run", tmp_path / "again"]
    argv = ["train", *flags, "--sample_tokens", "0", "--no_figures", "--output_dir", str(runs[0])]
    assert main(argv) == 0
    recipe = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    assert recipe["block_size"] == 64
    assert main(["train", "--recipe", str(runs[0] / "recipe.yaml"), "--output_dir", str(runs[1])]) == 0
    one, other = (json.loads((run / "model" / "minigpt.json").read_text()) for run in runs)
    assert one["data"]["validation"] == other["data"]["validation"] and one["results"] == other["results"]
    assert one["data"]["validation"]["characters"] < one["data"]["validation"]["of_characters"]
    shutil.rmtree(runs[0] / "model")
    assert main(argv) == 0  # resumed with the recorded settings
    assert json.loads((runs[0] / "model" / "minigpt.json").read_text())["results"] == one["results"]


def test_a_prepared_text_has_the_validation_sample_of_the_original_with_automatic_settings(text, tmp_path):
    """The chosen sequence length is 64, not 128."""
    (folder := tmp_path / "documents").mkdir()
    for i in range(24):
        (folder / f"{i}.txt").write_text(text[i * 100 : i * 105 + 90])
    data, prepared = ["--data", str(folder), "--validation_characters", "200"], str(tmp_path / "prepared")
    assert main(["tokenize", *data, "--output_dir", prepared]) == 0
    results = []
    for argv in (data, ["--data", prepared]):
        run = tmp_path / f"run{len(results)}"
        flags = "--use_cpu --max_steps 2 --sample_tokens 0 --no_figures --output_dir".split()
        assert main(["train", *argv, *flags, str(run)]) == 0
        metadata = json.loads((run / "model" / "minigpt.json").read_text())
        results.append((metadata["results"], metadata["data"]["validation"]))
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def sized(text_file, tmp_path_factory):
    """A command without a recipe, and its run folder."""
    run = tmp_path_factory.mktemp("sized") / "run"
    argv = ["train", "--size", "110k", "--max_steps", "2", "--sample_tokens", "0", "--validation_characters", "500"]
    argv += ["--data", str(text_file), "--use_cpu", "--eval_steps", "1"]
    assert main([*argv, "--output_dir", str(run)]) == 0
    return argv, run


@pytest.mark.parametrize(
    ("flag", "name"),
    representative(
        [("--no_muon", "muon"), ("--no-muon", "muon"), ("--no_tie_word_embeddings", "tie_word_embeddings")],
        *(("--no-muon", "muon"), ("--no_tie_word_embeddings", "tie_word_embeddings")),
    ),
)
def test_a_setting_that_is_switched_off_counts_as_given_when_resuming(flag, name, sized, tmp_path, capsys):
    argv, finished = sized
    interrupted = tmp_path / "interrupted"
    go_back(finished, interrupted, 1)
    for run in (finished, interrupted):
        assert main([*argv, "--output_dir", str(run), flag]) == 2
        assert f"{name} was True and is False" in capsys.readouterr().err
    if name == "muon":  # another architecture cannot be resumed
        assert main([*argv, "--output_dir", str(interrupted), flag, "--allow_change", name]) == 0
        assert yaml.safe_load((interrupted / "recipe.yaml").read_text())["muon"] is False


def test_an_automatically_configured_run_may_continue_without_validation(sized, tmp_path, capsys):
    argv, finished = sized
    run = tmp_path / "run"
    go_back(finished, run, 1)
    argv = [*argv[:-2], "--output_dir", str(run), "--validation_fraction", "0"]  # without --eval_steps
    assert main([*argv, "--allow_change", "data", "validation", "load_best_model_at_end"]) == 0
    assert "resuming from step 1" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--minutes", "5.0"), ("--size", "800k")])
def test_another_budget_of_a_run_that_has_begun_is_rejected_because_it_would_have_no_effect(
    flag, value, sized, tmp_path, capsys
):
    """The message contains the flags that change the number of steps instead."""
    argv, finished = sized
    run, name = tmp_path / "run", flag.removeprefix("--")
    go_back(finished, run, 1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    if flag == "--minutes":  # excludes --size, --max_steps and --eval_steps
        argv = ["train", *argv[5:-2]]
    argv = [*argv, "--output_dir", str(run), flag, value]
    assert main([*argv, "--allow_change", "size", "minutes", "max_steps"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt train: ")]
    assert f"{name} was {'None' if flag == '--minutes' else '110k'} and is {value}" in line
    assert "has no effect" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    instead = line[line.index("--recipe") :].replace("N", "3").split()
    assert main(["train", *instead, "--output_dir", str(run), "--use_cpu"]) == 0
    assert json.loads((run / "model" / "minigpt.json").read_text())["training"]["steps"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (None, "no such file"),
        (b"- a\n", "found a list"),
        (b"\xff\xfe\x00", "invalid YAML"),
    ],
)
def test_a_run_folder_with_an_unreadable_recipe_is_reported_in_one_line(content, message, sized, tmp_path, capsys):
    argv, finished = sized
    run = tmp_path / "run"
    go_back(finished, run, 1)
    if content is None:
        (run / "recipe.yaml").unlink()
    else:
        (run / "recipe.yaml").write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*argv, "--output_dir", str(run)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt train: ")]
    assert f"recipe {run / 'recipe.yaml'}: " in line
    assert message in line
    assert "--fresh" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_evaluation_interval_that_save_steps_is_not_a_multiple_of_is_reported_in_one_line(sized, tmp_path, capsys):
    """`load_best_model_at_end` is the default, and only `eval_steps` is given."""
    argv, finished = sized
    run = tmp_path / "run"
    go_back(finished, run, 1)
    for command in ([*argv, "--eval_steps", "2"], ["train", "--recipe", str(run / "recipe.yaml"), "--eval_steps", "2"]):
        assert main([*command, "--output_dir", str(run)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt train: ")]
        assert "save_steps is 1 and must be a multiple of eval_steps, which is 2; use --save_steps 2" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--minutes", "3", "--max_steps", "5"],
            "minutes and max_steps both determine the length of training: omit one of them",
        ),
        (["--minutes", "3", "--recipe", "shakespeare-char"], "omit the recipe shakespeare-char, which sets max_steps"),
        (
            ["--minutes", "3", "--num_train_epochs", "2"],
            "minutes and num_train_epochs both determine the length of training",
        ),
        (["--minutes", "3", "--size", "auto"], "minutes and size auto both determine the length of training"),
        (
            ["--minutes", "3", "--hidden_size", "64"],
            "hidden_size is part of the architecture, which minutes and size determine",
        ),
        (["--minutes", "3", "--eval_steps", "2"], "eval_steps 2: the number of steps is chosen for minutes"),
        (
            ["--minutes", "3", "--save_steps", "2", "--load_best_model_at_end", "false"],
            "save_steps 2: the number of steps is chosen for minutes",
        ),
        (["--minutes", "0"], "minutes is 0.0: it must be more than 0"),
        (
            ["--minutes", "0.1", "--sample_tokens", "0"],
            "minutes 0.1: .* too little time is left for training; increase --minutes",
        ),
    ],
)
def test_contradictory_flags_are_reported_in_one_line(argv, message, text_file, tmp_path, capsys):
    argv = ["train", *argv, "--data", str(text_file), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert [line.partition(":")[0] for line in error.splitlines()][-1] == "minigpt train"
    assert error.count("minigpt train") == 1  # settings chosen before the error are logged above it


def test_the_same_size_in_another_notation_resumes_a_run(sized, tmp_path, capsys):
    argv, finished = sized
    go_back(finished, tmp_path / "run", 1)
    argv = [*(word if word != "110k" else "110000" for word in argv), "--output_dir", str(tmp_path / "run")]
    assert "110000" in argv and main(argv) == 0
    assert "resuming from step 1" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--size", "30k"], ["--gradient_accumulation_steps", "3"]])
def test_the_length_of_training_counts_incomplete_steps(argv, tmp_path, caplog, text):
    """Short texts have few steps per epoch, the last of them incomplete: the announced epochs are those of the plan."""
    caplog.set_level(logging.INFO, "minigpt_hf")
    (file := tmp_path / "text.txt").write_text(text[:5000])
    settings, stream = automatic_settings([*argv, "--data", str(file)], tmp_path)
    data, training = settings.data, settings.training
    sequences = SequenceDataset(stream, data.block_size, seed=0)
    tokens = trained_tokens(training, sequences, training.max_steps)
    epochs = tokens / len(stream)
    (choice,) = [message for message in caplog.messages if " max_steps " in message]
    assert f"{training.max_steps:,} steps of at most " in choice
    assert f" = {tokens:,} tokens, " in choice and f", {epochs:.2f} epochs" in choice
    assert f"small text: {epochs:.1f} epochs" in caplog.text
    if "--size" not in argv:
        assert 19 < epochs <= 20


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["--size", "5k"], ""),  # a character tokenizer has a fixed vocabulary
        (["--size", "20k", "--tokenizer", "bpe"], "; to get closer, reduce --vocab_size"),
        (["--size", "5k", "--intermediate_size", "512"], "; to get closer, omit settings of the architecture"),
    ],
)
def test_a_size_that_is_not_met_names_only_settings_that_would_help(argv, remedy, text_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    automatic_settings([*argv, "--data", str(text_file)], tmp_path)
    (warning,) = [message for message in caplog.messages if "the closest model has" in message]
    assert re.search(r" at width \d+(.*)", warning)[1] == remedy
