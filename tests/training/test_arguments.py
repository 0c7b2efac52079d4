"""Recipes and flags are resolved to settings."""

import json
import logging
import sys

import pytest
import torch
import yaml

import minigpt_hf
from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.tokenizer import byte_tokenizer, character_tokenizer
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.training.initialize import build_config
from minigpt_hf.training.recipe import parse_arguments, read_recipe, recipe_names, recipe_notes, resolved
from minigpt_hf.training.report import duration
from minigpt_hf.training.train import train
from tests.conftest import representative

# The 65 characters of Tiny Shakespeare: letters, eleven punctuation marks, "3", space and newline.
SHAKESPEARE_LETTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"finetune", "lora", "chat", "auto"}))
def test_every_recipe_has_as_many_parameters_and_tokens_as_its_arithmetic_says(name):
    data, architecture, training = parse_arguments([], recipe=name)
    assert training.output_dir == f"runs/{name}"
    # The vocabulary with the text of the recipe: 65 characters and two special tokens.
    tokenizer = character_tokenizer([SHAKESPEARE_LETTERS]) if data.tokenizer == "characters" else byte_tokenizer()
    config = build_config(architecture, data.block_size, tokenizer)
    if data.tokenizer == "bpe":
        config.vocab_size = data.vocab_size + (2 if data.chat else 0)  # the tokens of ChatML
    with torch.device("meta"):
        model = MiniGPTForCausalLM(config)
    notes = recipe_notes(name)
    assert notes["parameters"].endswith(f" = {model.num_parameters():,}")
    gpus = 8 if "8 GPUs" in notes["tokens"] else 1
    step = training.train_batch_size * training.gradient_accumulation_steps * data.block_size * gpus
    assert f" = {step * training.max_steps:,} " in notes["tokens"]
    assert set(notes) == {"what", "parameters", "tokens", "cost", "result"}


@pytest.mark.parametrize("name", representative(recipe_names(), "demo", "shakespeare-char", "chat"))
def test_every_recipe_takes_two_steps(name, run_folder, text_file, tmp_path):
    """With a small model and text; all other settings are those of the recipe."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
    if name in ("finetune", "lora", "chat"):
        small = {"init_from": str(run_folder / "model")}
    elif parse_arguments([], recipe=name)[0].tokenizer == "characters":
        del small["vocab_size"]
    if name in ("chat", "task"):
        text_file = tmp_path / "chats.jsonl"
        rows = [{"prompt": f"{i}?", "completion": str(i)} for i in range(60)]
        text_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = parse_arguments(
        [],
        name,
        **small,
        data=str(text_file),
        streaming=False,
        max_tokens=None,
        validation_fraction=0.1,
        block_size=64 if name == "chat" else 32,
        max_steps=2,
        per_device_train_batch_size=2,
        validation_characters=1000,
        sample_tokens=5,
        eval_steps=1,
        save_steps=1,
        use_cpu=True,
        torch_compile=False,
        output_dir=str(tmp_path / "run"),
    )
    folder = train(arguments)
    results = json.loads((folder / "minigpt.json").read_text())["results"]
    assert 0 < results["loss"] < 7


def test_shakespeare_char_has_the_budget_of_nanogpts_cpu_example():
    data, architecture, training = parse_arguments([], recipe="shakespeare-char")
    assert data.data.startswith("https://")
    assert (architecture.num_hidden_layers, architecture.hidden_size, data.block_size) == (4, 128, 64)
    tokens = training.train_batch_size * training.gradient_accumulation_steps * data.block_size * training.max_steps
    assert tokens == 12 * 64 * 2000


def test_flags_override_a_recipe():
    _, architecture, training = parse_arguments(
        ["--hidden_size=64", "--max-steps", "7", "--no_muon"], "shakespeare-char"
    )
    assert (architecture.hidden_size, training.max_steps, training.muon) == (64, 7, False)
    assert architecture.num_hidden_layers == 4


def test_a_strategy_that_yaml_reads_as_false_is_no_and_one_name_is_a_list(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("eval_strategy: no\nallow_change: muon_learning_rate\n")
    training = parse_arguments([], str(file), output_dir=str(tmp_path)).training
    assert training.eval_strategy == "no"
    assert training.allow_change == ["muon_learning_rate"]


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("learning_rate: 4e-3\n")
    assert read_recipe(str(file)) == {"learning_rate": 0.004}


@pytest.mark.parametrize(
    ("flags", "save_steps", "best"),
    [
        ([], 0.25, True),
        (["--eval_steps", "100"], 100, True),
        (["--save_steps", "50"], 50, False),
        (["--eval_strategy", "no"], 0.25, False),
        (["--validation_fraction", "0"], 0.25, False),
        (["--load_best_model_at_end", "false"], 0.25, False),
        (["--save_strategy", "best"], 0.25, True),
    ],
)
def test_checkpoints_follow_validation_so_that_the_best_can_be_published(flags, save_steps, best):
    _, _, training = parse_arguments(["--use_cpu", *flags], recipe="demo")
    assert (training.save_steps, training.load_best_model_at_end) == (save_steps, best)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "found a list"),
        ("a: [1\n", "invalid YAML"),
        ("", "is empty"),
        ("# a comment\n", "is empty"),
    ],
)
def test_a_recipe_that_is_not_a_mapping_is_rejected(text, message, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(str(file))


def test_the_sliding_window_is_one_token_longer_than_a_sequence():
    """A sequence of T inputs attends at most T - 1 tokens back, so a window of T + 1 needs no mask in training."""
    data, architecture, _ = parse_arguments([], recipe="shakespeare-char")
    config = build_config(architecture, data.block_size, byte_tokenizer())
    assert config.sliding_window == 65
    assert set(config.layer_types) == {"sliding_attention"}
    assert config.max_position_embeddings == 16 * 64


def test_durations_are_formatted_in_seconds_minutes_and_hours():
    assert [duration(s) for s in (0.4, 45, 200, 7500)] == ["0 s", "45 s", "3 min 20 s", "2 h 5 min"]


@pytest.mark.parametrize(
    ("name", "invalid", "valid"),
    [
        ("max_grad_norm", ["nan", "-1", "inf"], "0"),
        ("adam_beta1", ["1.5", "1", "-0.1"], "0"),
        ("adam_epsilon", ["-1", "nan"], "1e-9"),
        ("muon_momentum", ["1.5", "-1", "nan"], "0.9"),
        ("muon_beta2", ["1", "-1", "nan"], "0.9"),
        ("weight_decay", ["-1", "nan"], "0"),
        ("eval_steps", ["-1", "nan", "0"], "0.5"),
        ("logging_steps", ["nan", "-3"], "0.1"),
        ("eval_delay", ["nan", "-1"], "0"),
        ("warmup_steps", ["nan", "-1"], "0.1"),
        ("num_train_epochs", ["0", "-1", "nan"], "0.5"),
        ("label_smoothing_factor", ["2", "1", "-0.1"], "0.1"),
        ("neftune_noise_alpha", ["nan", "-1"], "5"),
        ("dataloader_num_workers", ["-1"], "0"),
        ("seed", ["-1", "4294967296"], "4294967295"),
        ("rope_theta", ["inf", "1", "0.5", "nan", "0"], "500000"),
        ("rms_norm_eps", ["-1", "0", "0.1"], "1e-5"),
        ("initializer_range", ["-1", "nan", "0"], "0.05"),
        ("sliding_window", ["0", "-1", "1"], "2"),
        ("max_position_embeddings", ["0", "-1"], "512"),
        ("max_window_layers", ["-1"], "0"),
        ("lora_rank", ["-1"], "0"),
        ("attention_dropout", ["nan"], "0.1"),
    ],
)
def test_a_number_outside_its_interval_is_rejected(name, invalid, valid):
    for value in invalid:
        with pytest.raises(MiniGPTError, match=f"{name} is .*: it must be"):
            parse_arguments([f"--{name}", value], "demo")
    settings = parse_arguments([f"--{name}", valid], "demo")
    assert float(resolved(settings).get(name, valid)) == float(valid)


def test_one_process_learns_from_every_block_of_an_epoch(tmp_path):
    """Several processes leave out an incomplete batch, which one process does only on request."""
    given = [parse_arguments(flags)[2].dataloader_drop_last for flags in ([], ["--dataloader_drop_last", "true"])]
    assert given == [False, True]


def test_a_file_next_to_the_program_adds_no_arguments(tmp_path, monkeypatch):
    """`HfArgumentParser` would read `minigpt.args` next to a program `minigpt`."""
    (tmp_path / "minigpt.args").write_text("--max_steps 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "minigpt")])
    assert parse_arguments([])[2].max_steps == parse_arguments([], "demo")[2].max_steps != 7


def test_a_setting_is_empty_only_if_its_default_is(tmp_path):
    file = tmp_path / "empty.yaml"
    optional = ("minutes", "max_tokens", "bf16", "save_steps", "head_dim")
    file.write_text("".join(f"{name}:\n" for name in optional))
    assert read_recipe(str(file)) == dict.fromkeys(optional)
    for name in ("max_steps", "muon", "tokenizer", "newline", "dedup", "on_bad_loss"):
        file.write_text(f"{name}:\n")
        with pytest.raises(ValueError, match=f"{name} is None: expected"):
            read_recipe(str(file))


def test_without_eval_steps_the_model_is_evaluated_and_saved_at_each_log():
    training = parse_arguments([], eval_steps=None, logging_steps=7)[2]
    assert (training.eval_steps, training.save_steps) == (7, 7)


def test_one_language_may_be_given_as_a_string():
    assert parse_arguments([], language="de")[0].language == ["de"]


def test_settings_without_effect_are_reported(caplog):
    parse_arguments(["--no_muon", "--muon_beta2", "0.5", "--sliding_window", "8"], recipe="gpt2-124m")
    assert "muon_beta2: no effect without muon" in caplog.text
    assert "sliding_window: no effect without use_sliding_window" in caplog.text
    parse_arguments(["--use_sliding_window", "--sliding_window", "4", "--max_window_layers", "4"])
    assert "sliding_window: no effect, because max_window_layers 4 includes every layer" in caplog.text
    unused = {
        "do_train": False,
        "do_eval": False,
        "do_predict": True,
        "prediction_loss_only": True,
        "logging_nan_inf_filter": True,
        "hub_revision": "v1",
        "fsdp_config": {"tp_size": 2},
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "run_name": "first",
    }
    parse_arguments([], **unused)
    for name in unused:
        assert f"{name}: no effect" in caplog.text
    caplog.clear()
    parse_arguments(["--do_train", "--do_predict", "false", "--hub_revision", "v1", "--push_to_hub"])
    parse_arguments(["--muon_beta2", "0.5", "--sliding_window", "8"], recipe="shakespeare-char")
    assert "no effect" not in caplog.text


def test_settings_of_evaluations_are_reported_if_there_are_none(caplog):
    unused = {"early_stopping_patience": 3, "eval_delay": 2}
    settings = {**unused, "eval_on_start": True}
    assert parse_arguments([], eval_strategy="no", **settings).training.eval_on_start
    assert [record.message for record in caplog.records] == [
        f"{name}: no effect with eval_strategy no" for name in unused
    ]
    caplog.clear()
    settings |= {"eval_strategy": "steps", "load_best_model_at_end": True}
    without = parse_arguments([], validation_fraction=0, validation_characters=50, **settings)
    assert not without.training.eval_on_start
    assert {record.message for record in caplog.records} == {
        f"{name}: no effect with validation_fraction 0" for name in (*settings, "validation_characters")
    }
    caplog.clear()
    parse_arguments([], validation_fraction=0, eval_strategy="no", early_stopping_patience=0, eval_on_start=False)
    parse_arguments([], **settings)
    assert not caplog.records


def test_intervals_in_steps_are_reported_if_reports_or_checkpoints_are_not_by_steps(caplog):
    parse_arguments("--save_steps 3 --save_strategy no --logging_steps 2 --logging_strategy epoch".split())
    assert [record.message for record in caplog.records] == [
        "logging_steps: no effect with logging_strategy epoch",
        "save_steps: no effect with save_strategy no",
    ]
    caplog.clear()
    parse_arguments("--save_steps 3 --logging_steps 2".split())
    parse_arguments("--save_strategy no --logging_strategy epoch".split())  # the intervals of the recipe are not given
    parse_arguments("--eval_steps 3 --eval_strategy no".split())  # the default of `save_steps`
    assert not caplog.records
    parse_arguments("--eval_steps 3 --eval_strategy epoch --save_strategy epoch".split())
    parse_arguments("--eval_steps 3 --validation_fraction 0 --save_steps 2".split())
    assert [record.message for record in caplog.records] == [
        f"eval_steps: no effect with eval_strategy {strategy}" for strategy in ("epoch", "no")
    ]


def test_settings_without_effect_in_a_recipe_file_are_reported(tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    file = tmp_path / "own.yaml"
    file.write_text(
        "muon: false\nmuon_beta2: 0.5\nsliding_window: 8\ndo_eval: false\ndo_predict: true\nhub_revision: v1\n"
    )
    parse_arguments([], recipe=str(file))
    for name in ("muon_beta2", "sliding_window", "do_eval", "do_predict", "hub_revision"):
        assert f"{name}: no effect" in caplog.text
    file.write_text("chat: true\nvalidation_characters: 10\n")
    parse_arguments(["--data", "chat.jsonl"], recipe=str(file))
    assert "validation_characters 10: no effect" in caplog.text
    caplog.clear()
    file.write_text(
        "logging_strategy: epoch\nlogging_steps: 5\neval_strategy: epoch\neval_steps: 3\n"
        "save_strategy: epoch\nsave_steps: 6\n"
        "max_steps: 9\nnum_train_epochs: 2\naccelerator_config: {even_batches: false, use_seedable_sampler: false}\n"
    )
    parse_arguments([], recipe=str(file))
    assert [record.message for record in caplog.records] == [
        "accelerator_config: even_batches: no effect",
        "accelerator_config: use_seedable_sampler: no effect",
        "logging_steps: no effect with logging_strategy epoch",
        "eval_steps: no effect with eval_strategy epoch",
        "save_steps: no effect with save_strategy epoch",
        "max_steps 9 takes precedence over num_train_epochs",
    ]


def test_settings_of_a_recipe_file_that_optimizer_schedule_and_tokenizer_do_not_use_are_reported(
    words, tmp_path, caplog
):
    file = tmp_path / "own.yaml"
    file.write_text(
        "hidden_size: 32\nnum_hidden_layers: 1\nnum_attention_heads: 2\nblock_size: 16\nmax_steps: 1\ntokenizer: bytes\n"
        "vocab_size: 500\nmuon: false\noptim: adafactor\nadam_beta1: 0.8\nlr_scheduler_type: constant\nwarmup_steps: 3\n"
    )
    with caplog.at_level(logging.INFO, "minigpt_hf"):
        minigpt_hf.train(words, file, tmp_path / "run")
    for message in (
        "adam_beta1: no effect with optim adafactor",
        "warmup_steps: no effect with lr_scheduler_type constant",
        "vocab_size 500: no effect, tokenizer bytes has 258 tokens",
    ):
        assert message in caplog.text


@pytest.mark.parametrize(
    ("optim", "unused"),
    [
        ("adamw_torch", ["optim_args alpha=0.9", "optim_args momentum=0.5", "optim_target_modules"]),
        ("sgd", ["optim_args alpha=0.9", "optim_target_modules"]),
        ("rmsprop", ["optim_target_modules"]),
    ],
)
def test_arguments_that_the_optimizer_does_not_use_are_reported(optim, unused, words, recipe, tmp_path, caplog):
    settings = {"muon": False, "optim": optim, "optim_args": "momentum=0.5, alpha=0.9", "max_steps": 1}
    with caplog.at_level(logging.INFO, "minigpt_hf"):
        minigpt_hf.train(words, recipe, tmp_path / "run", optim_target_modules="all-linear", **settings)
    reported = [record.message for record in caplog.records if "no effect" in record.message]
    assert reported == [f"{name}: no effect with optim {optim}" for name in unused]


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"finetune", "lora", "chat"}))
def test_a_recorded_recipe_contains_every_setting_and_reports_none_as_without_effect(name, tmp_path, caplog):
    settings = parse_arguments([], recipe=name)
    (file := tmp_path / "recorded.yaml").write_text(yaml.safe_dump(resolved(settings)))
    caplog.clear()
    parse_arguments([], recipe=str(file))
    assert "no effect" not in caplog.text
