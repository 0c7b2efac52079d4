"""Automatic settings: chosen for the text and logged with a reason; given settings are never replaced."""

import json
import logging
import re
import time
from dataclasses import MISSING, FrozenInstanceError, fields

import pytest
import yaml
from safetensors import safe_open
from transformers import TrainingArguments

import minigpt_hf
from minigpt_hf.cli import main
from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.data.tokenizer import vocabulary_size
from minigpt_hf.training import autoconfig as dial
from minigpt_hf.training import train as module
from minigpt_hf.training.arguments import MiniGPTTrainingArguments
from minigpt_hf.training.autoconfig import AutoConfigurator
from minigpt_hf.training.initialize import build_config, build_model
from minigpt_hf.training.recipe import (
    CHOSEN_FROM_THE_TEXT,
    effective_defaults,
    parse_arguments,
    read_recipe,
    recipe_notes,
    resolved,
)
from minigpt_hf.training.report import describe, trained_tokens
from minigpt_hf.training.run_folder import RunFolder
from minigpt_hf.training.scaling import (
    MAX_AUTO_EPOCHS,
    MAX_AUTO_PARAMETERS,
    MAX_AUTO_TOKENS,
    MAX_EFFECTIVE_EPOCHS,
    MIN_AUTO_TOKENS,
    PARAMETERS_PER_BYTE,
    heads_for,
    shape_for,
    size_for_text,
    typical_layers,
    vocabulary_for_text,
)
from minigpt_hf.training.text import prepare_text
from tests.conftest import representative

LETTER = "Liebe Grete, ich schreibe dir aus Köln.\nDer Rhein steht hoch, und die Glocken läuten früh.\n"
SHORT = {"max_steps": 2, "sample_tokens": 2, "use_cpu": True}


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """4 kB of German."""
    file = tmp_path_factory.mktemp("letters") / "briefe.txt"
    file.write_text("".join(f"{LETTER}Nummer {i}.\n" for i in range(38)), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def choices_are_logged(caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")


def fitted(folder, argv=(), recipe=None, **overrides):
    """The resolved settings of a command, and its text."""
    arguments = parse_arguments([*map(str, argv)], recipe, use_cpu=True, num_proc=1, **overrides)
    configurator = AutoConfigurator(arguments, RunFolder(folder / "run"), time.perf_counter())
    text = prepare_text(configurator.data, configurator.choose_tokenizer, configurator.choose_block_size)
    return configurator.choose_remaining(text), text


def everything(arguments) -> dict:
    return {name: value for group in arguments for name, value in vars(group).items()}


def test_a_text_without_a_recipe_gets_a_small_model_and_no_identity_of_another_text(letters, tmp_path, capsys):
    argv = ["train", "--data", str(letters), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--sample_tokens", "9"]
    assert main(argv) == 0
    err = capsys.readouterr().err
    folder = tmp_path / "run" / "model"
    about = json.loads((folder / "minigpt.json").read_text())
    assert (about["language"], about["license"]) == ([], None)
    assert about["sample"]["prompt"] == "Liebe Grete, ich"
    assert about["training"]["parameters"] < 30_000
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert "language" not in header
    assert header["widget"] == [{"text": "Liebe Grete, ich"}]
    assert "def " not in card
    # Every automatic setting is logged with its reason.
    for name in CHOSEN_FROM_THE_TEXT:
        assert re.search(rf"^(.*, )?{name} \S.*: \S", err, re.MULTILINE), name
    assert "expect misspelled words and verbatim repetitions of the text" in err
    # A short text is trained on for many epochs: with frequent evaluations, publishing the best checkpoint.
    losses = [
        row["eval_loss"] for row in map(json.loads, (tmp_path / "run" / "log.jsonl").open()) if "eval_loss" in row
    ]
    assert len(losses) >= 5
    assert about["results"]["loss"] == pytest.approx(min(losses))


def test_the_run_of_a_text_without_a_recipe_is_repeated_by_its_recipe_and_found_finished(letters, tmp_path, capsys):
    argv = ["train", "--data", str(letters), "--use_cpu", "--max_steps", "2", "--sample_tokens", "2", "--no_figures"]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    recipe = tmp_path / "run" / "recipe.yaml"
    assert not {"size", "minutes"} & yaml.safe_load(recipe.read_text()).keys()
    assert main(["train", "--recipe", str(recipe), "--use_cpu", "--output_dir", str(tmp_path / "again")]) == 0
    first, again = (json.loads((tmp_path / name / "model" / "minigpt.json").read_text()) for name in ("run", "again"))
    assert first["results"] == again["results"]
    capsys.readouterr()
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    assert "this run is already finished" in capsys.readouterr().err


def test_python_and_the_command_choose_the_same_settings(letters, tmp_path):
    folder = minigpt_hf.train(data=str(letters), output_dir=tmp_path / "run", **SHORT)
    (_, architecture, _), _ = fitted(tmp_path, ["--data", letters])
    assert folder.metadata["recipe"]["hidden_size"] == architecture.hidden_size
    assert folder.metadata["sample"]["prompt"] == "Liebe Grete, ich"


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        ([], {"minutes": None, "size": None, "init_from": None}),
        ([], {"chat": False, "lora_rank": 0}),
        ([], {"chat": "false", "lora_rank": "0"}),
        (["--chat", "false", "--lora_rank", "0"], {}),
    ],
)
def test_a_setting_without_a_value_does_not_change_the_recipe(argv, overrides, letters):
    expected = parse_arguments([], data=str(letters))
    assert expected.training.size == "auto"
    assert resolved(parse_arguments(argv, data=str(letters), **overrides)) == resolved(expected)


def test_without_a_text_the_settings_are_those_of_the_recipe_demo():
    bare, demo = resolved(parse_arguments([])), read_recipe("demo")
    assert {name: bare[name] for name in demo} == demo
    assert bare == resolved(parse_arguments([], recipe="demo"))


def test_settings_are_chosen_for_a_prepared_text_too(letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tokenize", "--data", str(letters), "--output_dir", "prepared"]) == 0
    (data, architecture, training), text = fitted(tmp_path, ["--data", "prepared"])
    (_, same, _), directly = fitted(tmp_path, ["--data", letters])
    assert vocabulary_size(text.tokenizer) == vocabulary_size(directly.tokenizer) == vocabulary_for_text(3600)
    assert architecture.hidden_size == same.hidden_size
    assert (data.block_size, training.sample_prompt) == (32, "Liebe Grete, ich")


@pytest.mark.slow
def test_two_processes_choose_the_settings_of_one_with_half_the_batch_size(letters, tmp_path):
    from tests.training.test_two_processes import finish, start

    flags = ["--data", letters, "--use_cpu", "--max_steps", "2", "--sample_tokens", "0"]
    flags += ["--cache_dir", tmp_path / "cache"]
    output = finish(start("auto", letters, tmp_path / "two", *flags))
    assert (
        output.count("sample_prompt 'Liebe Grete, ich'") == output.count("hidden_size ") == 1
    )  # logged by rank 0 only
    assert main([*map(str, ["train", *flags, "--output_dir", tmp_path / "one"])]) == 0
    one, two = (yaml.safe_load((tmp_path / name / "recipe.yaml").read_text()) for name in ("one", "two"))
    rows = "per_device_train_batch_size"
    assert one.pop(rows) == 2 * two.pop(rows)
    assert {name: two[name] for name in CHOSEN_FROM_THE_TEXT if name in two} == {
        name: one[name] for name in CHOSEN_FROM_THE_TEXT if name in one
    }


@pytest.mark.parametrize(
    ("size", "tokens", "expected"),
    [
        (4_000, 2_000, (16_000, 40_000)),  # 4 · 4,000 parameters; 20 epochs
        (20_000, 10_000, (80_000, 150_000)),  # epochs up to 150,000 tokens
        (100_000, 45_000, (400_000, 180_000)),  # 4 epochs
        (1_000_000, 400_000, (1_000_000, 1_500_000)),
        (10**9, 3 * 10**8, (1_000_000, 1_500_000)),
    ],
)
def test_the_size_of_a_text_determines_parameters_and_tokens(size, tokens, expected):
    assert size_for_text(size, tokens) == expected


def test_the_recipe_states_the_rules_that_are_applied():
    notes = recipe_notes("auto")
    rules = (PARAMETERS_PER_BYTE, f"{MAX_AUTO_PARAMETERS:,}")
    assert notes["parameters"].startswith("{} · bytes of text, at most {}: ".format(*rules))
    rules = (MAX_EFFECTIVE_EPOCHS, MAX_AUTO_EPOCHS, f"{MIN_AUTO_TOKENS:,}", f"{MAX_AUTO_TOKENS:,}")
    assert notes["tokens"] == (
        "{} epochs; short texts up to {} epochs, until {} tokens; at most {} tokens".format(*rules)
    )
    demo = re.search(r"([\d,]+) \+ 192 = ([\d,]+)|= ([\d,]+)$", recipe_notes("demo")["parameters"])[0].split("= ")[1]
    tokens = re.search(r"= ([\d,]+) tokens", recipe_notes("demo")["tokens"])[1]
    assert notes["cost"].endswith(f"`demo`: {demo} · {tokens}")
    compute = int(demo.replace(",", "")) * int(tokens.replace(",", ""))
    assert compute < MAX_AUTO_PARAMETERS * MAX_AUTO_TOKENS < 2 * compute


def test_minutes_choose_a_width_whose_heads_share_the_given_key_and_value_heads(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(dial, "MEASURED_SHARE", 0.01)
    flags = ["--data", letters, "--minutes", 1, "--num_key_value_heads", 2, "--sample_tokens", 0]
    (_, architecture, _), _ = fitted(tmp_path, flags)
    assert architecture.num_attention_heads % 2 == 0


@pytest.mark.parametrize(
    "vocabulary", [67, *(pytest.param(size, marks=pytest.mark.slow) for size in (258, 1024, 4096, 32768))]
)
def test_a_size_is_met_within_15_percent_unless_the_embeddings_alone_exceed_it(vocabulary):
    for number in (1e5 * 2000 ** (i / 60) for i in range(61)):  # 100 k to 200 m
        shape = shape_for(number, vocabulary)
        assert shape.width % 8 == 0
        assert abs(shape.parameters(vocabulary) / number - 1) <= 0.15 or vocabulary * 32 > 0.8 * number
        assert typical_layers(shape.width) / 2 <= shape.layers <= 1.5 * typical_layers(shape.width)
        heads = shape.settings()["num_attention_heads"]
        assert shape.width % heads == 0
        assert shape.width // heads % 8 == 0


@pytest.mark.parametrize("size", representative(["100k", "500k", "2m", "5m"], "100k", "2m"))
@pytest.mark.parametrize("vocabulary", [300, 1024])
def test_the_model_that_is_built_has_the_size_or_the_reason_is_logged(size, vocabulary, text_file, tmp_path, caplog):
    flags = ["--data", text_file, "--size", size, "--vocab_size", vocabulary, "--max_steps", 2]
    (data, architecture, _), text = fitted(tmp_path, flags)
    model = build_model(build_config(architecture, data.block_size, text.tokenizer), architecture)
    requested = float(size[:-1]) * {"k": 1e3, "m": 1e6}[size[-1]]
    assert (abs(model.num_parameters() / requested - 1) <= 0.15) != ("the closest model has" in caplog.text)


def test_a_size_may_be_a_number_in_python_and_yaml(letters, tmp_path):
    widths = [
        fitted(tmp_path, ["--data", letters], size=size)[0][1].hidden_size for size in (200_000, "200000", "200k")
    ]
    assert widths[0] == widths[1] == widths[2]


def test_a_size_that_the_embedding_alone_exceeds_is_reported(text_file, tmp_path, caplog):
    fitted(tmp_path, ["--data", text_file, "--size", "30k", "--vocab_size", "2000", "--max_steps", "2"])
    (numbers,) = re.findall(
        r"the closest model has ([\d,]+) parameters, ([\d,]+) of them in the embedding of 2,000", caplog.text
    )
    parameters, embedding = (int(number.replace(",", "")) for number in numbers)
    assert embedding == 2000 * 32 < parameters


# -- given settings ----------------------------------------------------------------------------------------------------

GIVEN = {
    "tokenizer": "bytes",
    "vocab_size": 300,
    "block_size": 24,
    "validation_characters": 321,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 96,
    "use_sliding_window": False,
    "residual_dropout": 0.05,
    "tie_word_embeddings": False,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "num_train_epochs": 2.0,
    "warmup_steps": 3.0,
    "logging_steps": 5.0,
    "learning_rate": 0.003,
    "muon_learning_rate": 0.01,
    "weight_decay": 0.01,
    "eval_steps": 0.3,
    "save_steps": 0.6,
    "sample_prompt": "Der",
    "language": ["de"],
    "license": "mit",
    "validation_fraction": 0.2,
}
OF_THE_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize(
    ("where", "size"),
    representative(
        [("flag", "auto"), ("keyword", "auto"), ("recipe", "auto"), ("flag", "40k"), ("recipe", "40k")],
        ("flag", "auto"),
        ("recipe", "40k"),
    ),
)
@pytest.mark.parametrize("name", GIVEN)
def test_a_given_setting_is_not_replaced_and_not_logged_as_chosen(name, size, where, letters, tmp_path, caplog):
    value = GIVEN[name]
    argv, keywords, recipe = ["--data", str(letters)], {}, None
    if where == "flag":
        argv += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]
        argv += ["--size", size] if size != "auto" else []
    elif where == "keyword":
        keywords = {name: value} | ({"size": size} if size != "auto" else {})
    else:
        recipe = str(tmp_path / "own.yaml")
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({name: value, "size": size}))
    if name in OF_THE_SHAPE and size != "auto":
        with pytest.raises(ValueError, match=f"{name} is part of the architecture, which minutes and size determine"):
            fitted(tmp_path, argv, recipe, **keywords)
        return
    arguments, text = fitted(tmp_path, argv, recipe, **keywords)
    assert everything(arguments)[name] == value
    assert not re.search(rf"^(.*, )?{name} \S.*: \S", caplog.text, re.MULTILINE) or name == "vocab_size"
    _, architecture, training = arguments
    config = build_config(architecture, arguments[0].block_size, text.tokenizer)  # the architecture is valid
    assert config.num_hidden_layers == architecture.num_hidden_layers
    if name == "num_train_epochs":
        assert training.max_steps == -1
    if name == "max_steps":
        assert training.warmup_steps < 7


def test_width_and_depth_can_be_given_together(letters, tmp_path):
    flags = ["--data", letters, "--hidden_size", 72, "--num_hidden_layers", 1]
    (_, architecture, _), _ = fitted(tmp_path, flags)
    assert (architecture.hidden_size, architecture.num_hidden_layers, architecture.num_attention_heads) == (72, 1, 3)


@pytest.mark.parametrize(
    ("flags", "dropout", "decay"),
    [
        (["--max_steps", 1], 0.0, 0.0),
        (["--num_train_epochs", 4], 0.0, 0.0),
        (["--num_train_epochs", 6], 0.1, 0.1),
        (["--num_train_epochs", 12], 0.2, 0.1),
        ([], 0.2, 0.1),
    ],
)
@pytest.mark.parametrize("size", [[], ["--size", "40k"]], ids=["auto", "40k"])
def test_dropout_and_weight_decay_follow_from_the_number_of_epochs_that_will_be_trained(
    flags, dropout, decay, size, letters, tmp_path
):
    (_, architecture, training), _ = fitted(tmp_path, ["--data", letters, *size, *flags])
    assert (architecture.residual_dropout, training.weight_decay) == (dropout, decay)
    assert training.eval_steps == (0.1 if dropout and not size else 0.25)  # often enough for early stopping


def test_the_number_of_steps_of_given_epochs_is_stated_as_approximate(letters, tmp_path, caplog):
    """The Trainer rounds the steps of an epoch up, and those of the run."""
    caplog.set_level(logging.INFO, "minigpt_hf")
    fitted(tmp_path, ["--data", letters, "--num_train_epochs", 2.5])
    chosen = [record.message for record in caplog.records if " steps" in record.message]
    assert chosen and all(re.search(r": (for )?about [0-9,]+ steps", message) for message in chosen)
    caplog.clear()
    fitted(tmp_path, ["--data", letters])
    assert " steps of " in caplog.text and not re.search(r"about [0-9,]+ steps", caplog.text)


def test_without_a_number_of_steps_the_default_number_of_epochs_determines_the_regularization(
    letters, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "minigpt_hf")
    (_, architecture, training), _ = fitted(tmp_path, ["--data", letters, "--max_steps", -1])
    assert (training.max_steps, training.num_train_epochs) == (-1, 3)
    assert (architecture.residual_dropout, training.weight_decay) == (0, 0)
    assert "small text" not in caplog.text and "max_steps" not in caplog.text


@pytest.mark.parametrize("characters", range(43_000, 55_000, 1_500))
def test_four_epochs_are_not_exceeded_by_rounding_to_whole_steps(characters, letters, tmp_path):
    """Dropout and weight decay start beyond four epochs, so rounding up would switch them on."""
    (tmp_path / "text.txt").write_text((letters.read_text(encoding="utf-8") * 20)[:characters], encoding="utf-8")
    flags = ["--data", tmp_path / "text.txt", "--tokenizer", "bytes", "--cache_dir", tmp_path]
    (data, architecture, training), text = fitted(tmp_path, flags)
    step = training.per_device_train_batch_size * data.block_size
    tokens = trained_tokens(training, SequenceDataset(text.train, data.block_size, seed=0), training.max_steps)
    assert 4 * len(text.train) - step < tokens <= 4 * len(text.train)
    assert (architecture.residual_dropout, training.weight_decay) == (0, 0)


@pytest.mark.parametrize(("steps", "warmup", "logging"), [(9, 1, 1), (79, 7, 1), (120, 12, 3), (400, 20, 10)])
def test_a_tenth_of_the_steps_is_warm_up_and_the_log_has_about_forty_lines(steps, warmup, logging, letters, tmp_path):
    (_, _, training), _ = fitted(tmp_path, ["--data", letters, "--max_steps", steps])
    assert (training.warmup_steps, training.logging_steps) == (warmup, logging)


def test_a_larger_batch_or_accumulation_means_fewer_steps_with_the_same_number_of_tokens(letters, tmp_path):
    def tokens(*flags):
        (data, _, training), text = fitted(tmp_path, ["--data", letters, *flags])
        return trained_tokens(training, SequenceDataset(text.train, data.block_size, seed=0), training.max_steps)

    plain = tokens()
    assert tokens("--per_device_train_batch_size", 2) == pytest.approx(plain, rel=0.02)
    assert tokens("--gradient_accumulation_steps", 3) == pytest.approx(plain, rel=0.02)
    assert tokens("--block_size", 32) == pytest.approx(plain, rel=0.02)


def test_the_choice_of_a_character_tokenizer_is_logged(letters, tmp_path, caplog):
    (data, _, _), _ = fitted(tmp_path, ["--data", letters, "--size", "40k"])
    different = len(set(letters.read_text(encoding="utf-8")))
    assert data.tokenizer == "characters"
    assert re.search(rf"tokenizer characters: the text has {different} distinct characters", caplog.text)


def test_epochs_in_a_recipe_file_are_not_overridden_by_the_default_max_steps(tmp_path):
    (tmp_path / "own.yaml").write_text("num_train_epochs: 2\n")
    recipe = str(tmp_path / "own.yaml")
    assert parse_arguments([], recipe)[2].max_steps == -1
    assert parse_arguments(["--max_steps", "5"], recipe)[2].max_steps == 5
    (tmp_path / "own.yaml").write_text("num_train_epochs: 2\nmax_steps: 9\n")
    assert parse_arguments([], recipe)[2].max_steps == 9
    assert parse_arguments(["--num_train_epochs", "1"], recipe)[2].max_steps == -1


# -- recipes and other texts -------------------------------------------------------------------------------------------


def test_language_license_and_prompt_of_a_recipe_are_not_applied_to_another_text(letters, tmp_path, caplog):
    (data, _, training), _ = fitted(tmp_path, ["--data", letters, "--max_steps", 2], "shakespeare-char")
    assert (data.language, training.sample_prompt) == ([], "Liebe Grete, ich")
    assert "ignored from the recipe: language ['en'], sample_prompt 'ROMEO:'" in caplog.text
    assert "sample_prompt 'Liebe Grete, ich': the first words of the text" in caplog.text
    caplog.clear()
    given = ["--language", "de", "--sample_prompt", "Der Rhein", "--max_steps", 2]
    (data, _, training), _ = fitted(tmp_path, ["--data", letters, *given], "shakespeare-char")
    assert (data.language, training.sample_prompt) == (["de"], "Der Rhein")
    assert "ignored" not in caplog.text
    # A given prompt is used, and the language of the recipe is still discarded.
    given = ["--sample_prompt", "Der Rhein", "--max_steps", 2]
    (data, _, training), _ = fitted(tmp_path, ["--data", letters, *given], "shakespeare-char")
    assert (data.language, training.sample_prompt) == ([], "Der Rhein")


def test_language_and_prompt_of_a_recipe_apply_to_the_text_of_the_recipe():
    data, _, training = parse_arguments(["--data", "stdlib"], "demo")
    assert (data.language, training.sample_prompt) == (["code"], "def __init__(self")


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("ROMEO:\nBut soft, what light", "ROMEO:"),
        ("\n \n  Es war einmal ein König\n", "Es war einmal"),
        ("1. e4 e5 2. Nf3\n", "1. e4 e5"),
        ("山路を登りながら、こう考えた。" * 9, ("山路を登りながら、こう考えた。" * 9)[:40]),
        ("a\x1b[2Jb c\n", "a"),
        ("\u202e\n-\n", "Liebe Grete, ich"),  # lines without letters and digits are skipped
    ],
)
@pytest.mark.parametrize("tokenizer", representative(["bpe", "bytes", "characters"], "bytes"))
def test_the_prompt_is_the_first_words_of_the_text(text, prompt, tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(text + "\n" + LETTER * 20, encoding="utf-8")
    flags = ["--data", file, "--tokenizer", tokenizer, "--max_steps", 2]
    (_, _, training), _ = fitted(tmp_path, flags, "auto")
    if tokenizer == "bytes":
        prompt = prompt.encode()[:200].decode(errors="ignore")
    assert training.sample_prompt == prompt


def test_the_prompt_does_not_join_documents(tmp_path):
    rows = tmp_path / "names.csv"
    rows.write_text("text\n-\n" + "".join(f"name{i}\n" for i in range(200)))
    (_, _, training), _ = fitted(tmp_path, ["--data", rows, "--tokenizer", "bytes", "--max_steps", 2], "auto")
    assert re.fullmatch(r"name\d+", training.sample_prompt)


@pytest.mark.parametrize(("characters", "block_size"), [(160, 16), (600, 32), (3000, 128)])
def test_short_texts_get_sequences_of_at_least_16_tokens(characters, block_size, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 200)
    data = tmp_path / "text.txt"
    data.write_text(data.read_text()[:characters])
    flags = ["--data", data, "--tokenizer", "bytes", "--validation_fraction", 0, "--max_steps", 2]
    assert fitted(tmp_path, flags, "auto")[0].data.block_size == block_size


def test_the_prompt_of_a_text_without_words_is_empty(tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    (tmp_path / "text.txt").write_text("+-*/ <>!?\n" * 200)
    (_, _, training), _ = fitted(tmp_path, ["--data", tmp_path / "text.txt", "--max_steps", 2], "auto")
    assert training.sample_prompt == ""
    assert "sample_prompt is empty, so samples start a document: the text does not start with words" in caplog.text


# -- architecture ------------------------------------------------------------------------------------------------------


def test_heads_follow_a_width_that_the_recipes_heads_do_not_divide(caplog):
    recipe = "shakespeare-char-gpu"  # 6 heads
    _, architecture, _ = parse_arguments(["--hidden_size", "64"], recipe)
    assert architecture.num_attention_heads == 2
    assert "num_attention_heads 2: hidden_size 64 does not divide into 6 heads" in caplog.text
    caplog.clear()
    assert parse_arguments(["--hidden_size", "96"], recipe)[1].num_attention_heads == 6  # head dimension 16
    assert parse_arguments(["--hidden_size", "64", "--num_attention_heads", "6"], recipe)[1].num_attention_heads == 6
    assert not caplog.text
    assert [heads_for(width) for width in (32, 64, 128, 192, 256, 768, 100)] == [1, 2, 4, 6, 4, 12, 2]
    assert heads_for(128, key_value_heads=3) is None
    assert heads_for(192, key_value_heads=4) == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", 64, "--num_attention_heads", 6], "`hidden_size` 64 does not divide into 6 heads"),
        (["--num_attention_heads", 5, "--recipe", "demo"], "`hidden_size` 96 does not divide into 5 heads"),
        (["--num_hidden_layers", -1], "`num_hidden_layers` is -1"),
        (["--attention_dropout", 7], "`attention_dropout` is 7.0"),
        (["--hidden_size", 90, "--num_key_value_heads", 7], "hidden_size 90 does not divide into a number of heads"),
        (["--block_size", 64, "--max_position_embeddings", 32], "less than block_size 64"),
        (["--hidden_size", 1000000], "parameters, which need about"),
        (["--intermediate_size", 0, "--size", "1m"], "`intermediate_size` is 0"),
    ],
)
def test_an_invalid_architecture_is_rejected_before_the_text_is_read(flags, message, tmp_path, capsys):
    argv = ["train", "--data", str(tmp_path / "absent.txt"), "--output_dir", str(tmp_path / "run"), *map(str, flags)]
    assert main([*argv, "--use_cpu"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "absent.txt" not in err.replace(f"data {tmp_path / 'absent.txt'} replaces", "")
    assert not (tmp_path / "run").exists()


# -- reports -----------------------------------------------------------------------------------------------------------


def test_a_short_run_shows_its_loss_and_evaluates_and_saves_its_last_step(letters, recipe_file, tmp_path, capsys):
    argv = ["train", "--data", letters, "--recipe", recipe_file, "--max_steps", 5, "--output_dir", tmp_path / "run"]
    assert main([*map(str, argv), "--eval_steps", "0.4"]) == 0
    out, err = capsys.readouterr()
    assert "logging_steps 1: 10 exceeds the number of steps, 5" in err
    assert len(re.findall(r"^step \d/5   loss ", out, re.MULTILINE)) == 5
    assert re.findall(r"^step (\d)/5   validation loss", out, re.MULTILINE) == ["2", "4", "5"]
    with safe_open(tmp_path / "run" / "checkpoint-5" / "model.safetensors", "pt") as weights:
        assert weights.keys()


def test_given_logging_steps_are_used_and_a_log_without_losses_is_reported(letters, recipe_file, tmp_path, caplog):
    (_, _, training), _ = fitted(
        tmp_path, ["--data", letters, "--max_steps", 5, "--logging_steps", 9], str(recipe_file)
    )
    assert training.logging_steps == 9
    assert "logging_steps 9: there are only 5 steps, so no training loss is logged" in caplog.text


def test_a_warmup_as_long_as_the_run_causes_a_warning(letters, recipe_file, tmp_path, caplog):
    fitted(tmp_path, ["--data", letters, "--max_steps", 20], str(recipe_file))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "warmup_steps 20: there are only 20 steps, so the learning rate does not reach its peak" in warnings
    caplog.clear()
    fitted(tmp_path, ["--data", letters, "--max_steps", 21], str(recipe_file))
    assert "warmup_steps" not in caplog.text


def test_a_run_that_ends_before_its_first_evaluation_causes_a_warning(letters, recipe_file, tmp_path, caplog):
    flags = ["--data", letters, "--max_steps", 21]
    fitted(tmp_path, [*flags, "--eval_delay", 22], str(recipe_file))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "eval_delay 22: there are only 21 steps, so the model is not evaluated" in warnings
    caplog.clear()
    fitted(tmp_path, [*flags, "--eval_delay", 21], str(recipe_file))
    assert "eval_delay" not in caplog.text


def test_a_vocabulary_smaller_than_requested_is_reported(letters, tmp_path, caplog):
    _, text = fitted(tmp_path, ["--data", letters, "--vocab_size", 9000, "--max_steps", 2])
    size = vocabulary_size(text.tokenizer)
    assert size < 9000
    assert f"vocab_size {size:,}: the text is too short for 9,000 tokens" in caplog.text
    caplog.clear()
    fitted(tmp_path, ["--data", letters, "--vocab_size", 300, "--tokenizer", "bytes", "--max_steps", 2])
    assert "vocab_size 300: no effect, tokenizer bytes has 258 tokens" in caplog.text


def test_help_shows_the_effective_defaults(capsys):
    main(["train", "--help-all"])
    _, options = " ".join(capsys.readouterr().out.split()).split("options:")
    for name, (without, alone) in effective_defaults().items():
        shown = re.search(rf" --{name} \[?{name.upper()}.*?\(default: (.*?)\)", options)[1]
        assert shown == (without if without == alone else f"{without}; with --data alone: {alone}"), name
    demo = everything(parse_arguments([]))
    demo["positional_heads"] = " ".join(",".join(map(str, each)) for each in demo["positional_heads"])
    for name, (without, _) in effective_defaults().items():
        if without != "none":
            assert without in (str(demo[name]), *map(str, demo[name] if isinstance(demo[name], list) else [])), name


def test_only_the_settings_documented_in_the_help_depend_on_the_text(letters, text_file, tmp_path):
    untouched = resolved(parse_arguments(["--data", str(letters), "--use_cpu"]))
    changed = set()
    for file in (letters, text_file):
        chosen = resolved(fitted(tmp_path, ["--data", file])[0])
        changed |= {name for name in chosen if chosen[name] != untouched.get(name)}
    assert changed - {"data", "save_steps"} <= {*CHOSEN_FROM_THE_TEXT}  # save_steps follows eval_steps
    assert {"vocab_size", "block_size", "hidden_size", "max_steps", "sample_prompt", "residual_dropout"} <= changed


# -- the recipe that a run stores --------------------------------------------------------------------------------------

# Settings whose default differs from transformers', with transformers' default; and settings of other types.
STORED = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-5,
    "adam_beta2": 0.999,
    "warmup_steps": 0,
    "logging_steps": 500,
    "eval_strategy": "no",
    "save_steps": 500,
    "save_total_limit": None,
    "load_best_model_at_end": False,
    "dataloader_drop_last": True,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "max_steps": -1,
    "num_train_epochs": 3.0,
}


def test_every_setting_with_a_default_other_than_transformers_is_in_the_table():
    changed = {
        each.name
        for each in fields(TrainingArguments)
        if each.name in MiniGPTTrainingArguments.__annotations__
        and each.default is not MISSING
        and each.default != MiniGPTTrainingArguments.__dataclass_fields__[each.name].default
    }
    not_numeric = {"logging_nan_inf_filter", "remove_unused_columns", "ddp_find_unused_parameters", "disable_tqdm"}
    assert changed - not_numeric - {"bf16", "eval_steps"} <= STORED.keys()


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("recipe", ["demo", None])
def test_the_stored_recipe_reproduces_the_settings(name, recipe, text_file, tmp_path):
    """Including values that equal transformers' default but not ours, and two mappings that are the same object."""
    given = {name: STORED[name]}
    given |= {"max_steps": -1} if name == "num_train_epochs" else {}
    given |= {"lr_scheduler_type": STORED["lr_scheduler_type"]} if name == "lr_scheduler_kwargs" else {}
    given |= {"lr_scheduler_kwargs": STORED["lr_scheduler_kwargs"]} if name == "lr_scheduler_type" else {}
    given |= {"gradient_checkpointing": True} if name == "gradient_checkpointing_kwargs" else {}
    given |= {"load_best_model_at_end": False} if name == "save_steps" else {}
    first = parse_arguments(["--use_cpu", "--data", str(text_file)], recipe, **given)
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(resolved(first)))
    second = parse_arguments([], str(tmp_path / "stored.yaml"))
    assert resolved(second) == resolved(first)
    for setting in given:
        assert getattr(second[2], setting) == getattr(first[2], setting)


def test_settings_are_frozen_and_replaced_by_new_ones(text_file):
    """The settings of a run equal those stored in its recipe."""
    settings = parse_arguments(["--use_cpu", "--data", str(text_file)])
    for group, name in zip(settings, ("block_size", "hidden_size", "max_steps"), strict=True):
        with pytest.raises(FrozenInstanceError):
            setattr(group, name, 24)
    changed = settings.replace(block_size=24, hidden_size=48, max_steps=24)
    assert (changed.data.block_size, changed.model.hidden_size, changed.training.max_steps) == (24, 48, 24)
    assert changed.training.given == settings.training.given
    assert resolved(changed) == resolved(settings) | {"block_size": 24, "hidden_size": 48, "max_steps": 24}


def test_training_does_not_modify_its_settings(letters, tmp_path, monkeypatch):
    """The Trainer, which assigns to its arguments, gets a copy."""
    seen = []
    monkeypatch.setattr(module, "describe", lambda *arguments: seen.append(arguments[0]) or describe(*arguments))
    settings = parse_arguments(
        ["--use_cpu", "--data", str(letters), "--output_dir", str(tmp_path / "run")], None, **SHORT
    )
    before = everything(settings)
    module.train(settings)
    assert everything(settings) == before
    (used,) = seen
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == json.loads(json.dumps(resolved(used)))
