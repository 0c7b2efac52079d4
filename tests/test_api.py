"""The Python interface gives the same results as the command line."""

import json
import logging
import os
import random
import shutil
import threading
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import minigpt_hf
from minigpt_hf.cli import main
from minigpt_hf.training import callbacks
from minigpt_hf.training import train as train_module
from minigpt_hf.training.recipe import parse_arguments

SHORT = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "sample_tokens": 3}


def test_train_equals_the_command(recipe_file, text_file, run_folder, tmp_path):
    folder = minigpt_hf.train(data=str(text_file), recipe=recipe_file, output_dir=tmp_path / "run")
    assert os.fspath(folder) == str(tmp_path / "run" / "model")
    model, other = folder.load()[0], AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == folder.metadata["training"]["parameters"]


def test_a_model_folder_evaluates_and_generates(run_folder, text_file, capsys):
    folder = minigpt_hf.ModelFolder(run_folder / "model")
    score = folder.evaluate(str(text_file), split="validation")
    assert score.loss == pytest.approx(folder.results["loss"], rel=1e-6)
    texts = folder.generate("def ", seed=1, max_new_tokens=8, num_return_sequences=2)
    assert len(texts) == 2
    assert main(["generate", str(folder), "--prompt", "def ", "--seed", "1", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    (one,) = folder.generate("def ", seed=1, max_new_tokens=8)
    assert one.startswith("def ")


def test_scoring_a_training_split_of_which_only_the_start_was_used_is_reported(run_folder, text_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    minigpt_hf.evaluate(folder, text_file, split="train", max_characters=500)
    assert "the complete training split is scored" not in caplog.text
    about = json.loads((folder / "minigpt.json").read_text())
    about["recipe"]["max_tokens"] = 10**9  # more than the text has
    (folder / "minigpt.json").write_text(json.dumps(about))
    minigpt_hf.evaluate(folder, text_file, split="train", max_characters=500)
    assert "the complete training split is scored" not in caplog.text
    about["recipe"]["max_tokens"] = 1000
    about["data"]["train"] |= {"tokens": 998, "characters": 2000}
    (folder / "minigpt.json").write_text(json.dumps(about))
    minigpt_hf.evaluate(folder, text_file, split="train", max_characters=500)
    assert "the model was trained on 998 tokens of it" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: minigpt_hf.train(data="absent.txt"), "absent.txt: no such file or folder"),
        (lambda: minigpt_hf.train(hiden_size=8), "unknown setting 'hiden_size'; did you mean hidden_size"),
        (lambda: minigpt_hf.train(max_steps=3.7), "max_steps is 3.7: expected an integer"),
        (lambda: minigpt_hf.train(max_steps="many"), "max_steps.* invalid int value: 'many'"),
        (lambda: minigpt_hf.train(muon=3), "muon is 3: expected bool"),
        (lambda: minigpt_hf.train(learning_rate="fast"), "learning_rate is 'fast': expected a number"),
        (lambda: minigpt_hf.train(tokenizer=None), "tokenizer is None"),
        (lambda: minigpt_hf.train(recipe="dmeo"), "unknown recipe 'dmeo'; did you mean demo"),
        (lambda: minigpt_hf.train(recipe=5), "recipe is 5: expected str or path"),
        (lambda: minigpt_hf.train(output_dir=5), "output_dir is 5: expected str or path"),
        (lambda: minigpt_hf.train(language={"en"}), "language is {'en'}: expected a list"),
        (lambda: minigpt_hf.train(on_bad_loss="zz"), "on_bad_loss is 'zz': expected stop, skip"),
        (lambda: minigpt_hf.train(log_level="zz"), "log_level is 'zz': expected .*info"),
        (lambda: minigpt_hf.load(3), "model is 3: expected str or path"),
        (lambda: minigpt_hf.evaluate("absent", "stdlib", encoding=5), "encoding is 5: expected str"),
        (lambda: minigpt_hf.evaluate("absent", "stdlib", block_size=3.5), "block_size is 3.5: expected int"),
        (lambda: minigpt_hf.evaluate("absent", "stdlib", batch_size=True), "batch_size is True: expected int"),
        (lambda: minigpt_hf.generate("absent", extra_options=None), "unknown option extra_options"),
        (lambda: minigpt_hf.load("absent"), "absent: no model can be loaded"),
        (lambda: minigpt_hf.evaluate("absent", "stdlib"), "absent: no model can be loaded"),
        (lambda: minigpt_hf.generate("absent"), "absent: no model can be loaded"),
    ],
)
def test_invalid_input_is_a_value_error(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call()


def test_a_second_thread_cannot_train_at_the_same_time(recipe_file, text_file, tmp_path, monkeypatch):
    """accelerate has one state per process, which parsing arguments resets."""
    errors, real = [], callbacks.ProgressLogger.on_step_begin

    def train(name: str) -> None:
        minigpt_hf.train(data=text_file, recipe=recipe_file, output_dir=tmp_path / name, **SHORT)

    def second() -> None:
        try:
            train("second")
        except ValueError as error:
            errors.append(str(error))

    def on_step_begin(self, *args, **kwargs):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(callbacks.ProgressLogger, "on_step_begin", on_step_begin)
    train("first")
    assert errors == [message for message in errors if message.startswith("another thread of this process is training")]
    assert len(errors) == SHORT["max_steps"]
    assert not (tmp_path / "second").exists()
    monkeypatch.setattr(callbacks.ProgressLogger, "on_step_begin", real)
    train("second")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_random_numbers_that_another_thread_draws_between_steps_are_reported_if_they_affect_dropout(
    dropout, recipe_file, text_file, tmp_path, monkeypatch, caplog
):
    real = callbacks.ProgressLogger.on_log

    def on_log(self, args, state, control, logs, **kwargs):
        if 1 < state.global_step < 4:
            thread = threading.Thread(target=torch.rand, args=[1])
            thread.start()
            thread.join()
        return real(self, args, state, control, logs, **kwargs)

    settings = {"data": text_file, "recipe": recipe_file, **SHORT, "residual_dropout": dropout}
    minigpt_hf.train(**settings, output_dir=tmp_path / "undisturbed")
    assert "random" not in caplog.text
    monkeypatch.setattr(callbacks.ProgressLogger, "on_log", on_log)
    minigpt_hf.train(**settings, output_dir=tmp_path / "disturbed")
    reported = [line for line in caplog.messages if "drew random numbers" in line]
    assert len(reported) == (dropout > 0)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("undisturbed", "disturbed")]
    assert (weights[0] == weights[1]) == (dropout == 0)


def test_random_numbers_that_another_thread_draws_while_the_text_is_read_do_not_change_the_model(
    recipe_file, text_file, tmp_path, monkeypatch
):
    real, settings = train_module.prepare_text, {"data": text_file, "recipe": recipe_file, **SHORT}

    def prepare_text(*args):
        thread = threading.Thread(target=torch.manual_seed, args=[1])
        thread.start()
        thread.join()
        return real(*args)

    undisturbed = minigpt_hf.train(**settings, output_dir=tmp_path / "undisturbed")
    monkeypatch.setattr(train_module, "prepare_text", prepare_text)
    disturbed = minigpt_hf.train(**settings, output_dir=tmp_path / "disturbed")
    weights = [(folder.path / "model.safetensors").read_bytes() for folder in (undisturbed, disturbed)]
    assert weights[0] == weights[1]


def test_random_numbers_that_are_drawn_while_a_model_is_initialized_in_a_thread_are_reported(
    recipe_file, text_file, tmp_path, monkeypatch, caplog
):
    real, drawn = train_module.build_model, []

    def build_model(*args):
        if not drawn:  # by the other thread, at the first call
            drawn.append(torch.rand(1))
        return real(*args)

    def train(name: str) -> None:
        minigpt_hf.train(data=text_file, recipe=recipe_file, output_dir=tmp_path / name, **SHORT)

    for disturbed in (False, True):
        if disturbed:
            monkeypatch.setattr(train_module, "build_model", build_model)
        thread = threading.Thread(target=train, args=[str(disturbed)])
        thread.start()
        thread.join()
        assert ("drew random numbers or loaded a model while the model was initialized" in caplog.text) == disturbed


def global_state() -> dict:
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "environment": dict(os.environ),
        "verbosity": (transformers.logging.get_verbosity(), logging.getLogger("minigpt_hf").level),
    }


def test_training_leaves_global_settings_and_random_states_as_they_were(recipe_file, text_file, tmp_path):
    settings = {"data": text_file, "recipe": recipe_file, **SHORT}
    minigpt_hf.train(**settings, output_dir=tmp_path / "first")  # imports libraries, which set variables
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = global_state()
    minigpt_hf.train(**settings, output_dir=tmp_path / "run", full_determinism=True, log_level="error")
    assert global_state() == before


def test_a_device_without_values_is_rejected(recipe_file, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ValueError, match="ACCELERATE_TORCH_DEVICE is meta"):
        minigpt_hf.train(data=text_file, recipe=recipe_file, output_dir=tmp_path / "run", use_cpu=False, **SHORT)
    assert not (tmp_path / "run").exists()


@contextmanager
def torch_setting(set_value, value, default):
    set_value(value)
    try:
        yield
    finally:
        set_value(default)


def precision(name: str):
    return torch_setting(torch.set_float32_matmul_precision, name, "highest")


def without_mkldnn():
    return torch_setting(partial(setattr, torch.backends.mkldnn, "enabled"), False, True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            lambda: torch_setting(torch.set_default_dtype, torch.float64, torch.float32),
            "default dtype is torch.float64",
        ),
        (lambda: torch.device("meta"), "default device is meta"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is enabled"),
        (torch.no_grad, "gradients are disabled"),
        (torch.inference_mode, "gradients are disabled"),
        (lambda: precision("medium"), "float32 matmul precision is bf16; call torch.set_float32_matmul_precision"),
        (lambda: precision("high"), "float32 matmul precision is tf32"),
        (without_mkldnn, "mkldnn is disabled"),
    ],
)
def test_training_is_rejected_if_a_setting_of_torch_would_change_its_results(
    setting, message, recipe_file, text_file, tmp_path
):
    with setting(), pytest.raises(ValueError, match=f"torch's {message}.*before training"):
        minigpt_hf.train(data=text_file, recipe=recipe_file, output_dir=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is enabled"),
        (lambda: precision("medium"), "float32 matmul precision is bf16"),
        (without_mkldnn, "mkldnn is disabled"),
    ],
)
def test_a_setting_of_torch_under_which_a_score_cannot_be_repeated_is_reported(
    setting, message, run_folder, text_file, caplog
):
    with setting():
        minigpt_hf.evaluate(run_folder / "model", str(text_file), split="validation")
    (line,) = [line for line in caplog.messages if line.startswith("torch's")]
    assert message in line
    caplog.clear()
    minigpt_hf.evaluate(run_folder / "model", str(text_file), split="validation")
    assert "torch's" not in caplog.text


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_variable_that_prevents_the_requested_compilation_is_rejected(
    variable, recipe_file, text_file, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, "1")
    settings = {"data": text_file, "recipe": recipe_file, "output_dir": tmp_path / "run", **SHORT}
    with pytest.raises(ValueError, match=f"{variable} is 1, so nothing would be compiled"):
        minigpt_hf.train(torch_compile=True, **settings)
    assert not (tmp_path / "run").exists()
    minigpt_hf.train(**settings)


def test_mixed_precision_of_the_environment_that_the_settings_do_not_state_is_rejected(
    recipe_file, text_file, tmp_path, monkeypatch
):
    """`accelerate launch` sets this variable; accelerate would train in bfloat16, and the plan would state float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION is bf16, but the settings state float32"):
        minigpt_hf.train(data=text_file, recipe=recipe_file, output_dir=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variable", "value", "message", "consistent"),
    [
        ("DYNAMO_BACKEND", "INDUCTOR", "inductor, but the settings state no compilation", {"torch_compile": True}),
        (
            "GRADIENT_ACCUMULATION_STEPS",
            "4",
            "4, but gradient_accumulation_steps is 1",
            {"gradient_accumulation_steps": 4},
        ),
    ],
)
def test_variables_of_accelerate_must_agree_with_the_settings(variable, value, message, consistent, monkeypatch):
    """accelerate would compile the model, and ignore the number of batches, whatever the settings state."""
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ValueError, match=f"ACCELERATE_{variable} is {message}"):
        parse_arguments([])
    parse_arguments([], **consistent)
    monkeypatch.setenv(f"ACCELERATE_{variable}", "NO" if variable == "DYNAMO_BACKEND" else "1")
    parse_arguments([])


@pytest.mark.parametrize("seed", [-1, 1 << 32, "x", True])
def test_an_invalid_seed_is_a_value_error(seed, run_folder):
    with pytest.raises(ValueError, match=r"seed is .*: an integer from 0 to 4294967295"):
        minigpt_hf.generate(run_folder / "model", seed=seed)


def test_options_without_effect_are_reported(run_folder, caplog):
    options = {"seed": 1, "bos_token_id": 3, "num_beam_groups": 2}
    minigpt_hf.generate(run_folder / "model", "def ", max_new_tokens=2, do_sample=False, **options)
    assert "num_beam_groups, bos_token_id: no effect" in caplog.text
    assert "seed: no effect without --do_sample true" in caplog.text


def test_a_model_folder_can_be_made_from_a_string(run_folder):
    folder = minigpt_hf.ModelFolder(str(run_folder / "model"))
    assert folder == minigpt_hf.ModelFolder(run_folder / "model")
    assert folder.results == minigpt_hf.ModelFolder(run_folder / "model").results != {}
