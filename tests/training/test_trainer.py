"""MiniGPTTrainer compared with manual computations, the bare loop and `evaluate`; the files of a run folder."""

import inspect
import json
import shutil
import time

import bare_loop
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.stream import build_stream
from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.inference.evaluation import evaluate_texts
from minigpt_hf.inference.generation import load
from minigpt_hf.training.arguments import MiniGPTTrainingArguments
from minigpt_hf.training.callbacks import preserved_random_state
from minigpt_hf.training.recipe import parse_arguments
from minigpt_hf.training.trainer import MiniGPTTrainer
from minigpt_hf.training.trainer_checkpoints import CheckpointingTrainer
from tests.conftest import tiny_model
from tests.training.conftest import go_back, train


@pytest.fixture(scope="module")
def streams(text_file, tmp_path_factory):
    corpus, cache = load_corpus(str(text_file)), tmp_path_factory.mktemp("cache")
    return [build_stream(part, byte_tokenizer(), cache) for part in (corpus.train, corpus.validation.head(2000))]


def trained(streams, folder, *, model=None, **settings) -> MiniGPTTrainer:
    defaults = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "use_cpu": True}
    settings = {**defaults, "load_best_model_at_end": False, **settings}
    args = MiniGPTTrainingArguments(output_dir=str(folder), **settings)
    model = model or tiny_model(vocab_size=258)
    dataset = SequenceDataset(streams[0], 32, seed=args.seed)
    trainer = MiniGPTTrainer(model, args, dataset, streams[1], byte_tokenizer(), callbacks=[])
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_eight_by_one_equals_one_by_eight(streams, tmp_path):
    """A step of 8 sequences in one batch or in eight differs only in the order of float32 sums."""
    runs = [
        trained(streams, tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        for size in (8, 2, 1)
    ]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), abs=1e-3)
    # Unlike Muon, AdamW does not round to bfloat16, so the tolerance is smaller.
    runs = [
        trained(
            streams,
            tmp_path / f"adamw-{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            muon=False,
            learning_rate=1e-3,
        )
        for size in (8, 1)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)


def test_training_is_reproducible_bit_for_bit_and_depends_on_the_seed(streams, tmp_path):
    settings = {"per_device_train_batch_size": 2, "max_steps": 3}
    runs = [
        trained(
            streams, tmp_path / str(i), seed=seed, model=tiny_model(vocab_size=258, residual_dropout=0.1), **settings
        )
        for i, seed in enumerate([1, 1, 2])
    ]
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])


def test_one_sequence_can_be_memorized(streams, tmp_path):
    """A stream of one sequence, repeated: the loss approaches 0."""
    text = tmp_path / "line.txt"
    text.write_text("abcdefghijklmnopqrstuvwxyz012345")
    stream = build_stream(load_corpus(str(text), 0).train, byte_tokenizer(), tmp_path / "cache")
    args = MiniGPTTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=120,
        logging_steps=120,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        use_cpu=True,
        per_device_train_batch_size=1,
    )
    trainer = MiniGPTTrainer(
        tiny_model(vocab_size=258), args, SequenceDataset(stream, 32, 0), None, byte_tokenizer(), []
    )
    trainer.train()
    score = evaluate_texts(trainer.model.eval(), byte_tokenizer(), [text.read_text()], block_size=32)
    assert score.loss < 0.05


def test_validation_during_training_equals_evaluate(streams, text, tmp_path):
    trainer = trained(streams, tmp_path, max_steps=2)
    metrics = trainer.evaluate()
    validation = text[int(len(text) * 0.9) :][:2000]
    score = evaluate_texts(trainer.model, byte_tokenizer(), [validation], block_size=32, batch_size=7)
    assert metrics["eval_loss"] == pytest.approx(score.loss, rel=1e-6)
    assert metrics["eval_bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    other = trainer.evaluate(streams[0])
    training = text[: int(len(text) * 0.9)]
    score = evaluate_texts(trainer.model, byte_tokenizer(), [training], block_size=32)
    assert other["eval_loss"] == pytest.approx(score.loss, rel=1e-6)


def test_without_muon_the_optimizer_is_that_of_the_trainer(streams, tmp_path):
    trainer = trained(streams, tmp_path, max_steps=1, muon=False, optim="adamw_torch")
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


@pytest.mark.slow
def test_compiled_training_gives_equal_losses_and_unprefixed_parameter_names(streams, tmp_path):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2}
    plain = trained(streams, tmp_path / "plain", **settings)
    compiled = trained(
        streams,
        tmp_path / "run",
        torch_compile=True,
        torch_compile_backend="aot_eager",
        save_strategy="steps",
        **settings,
    )
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    names = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert set(names) == set(dict(plain.model.named_parameters()))


def test_label_smoothing_covers_every_label_of_a_sequence(streams, tmp_path):
    """With smoothing ε the loss is (1-ε) · NLL of the label + ε · mean NLL over the vocabulary."""
    trainer = trained(streams, tmp_path, max_steps=1, label_smoothing_factor=0.1)
    dataset = trainer.train_dataset
    batch = dataset.collate([dataset[0, i] for i in range(2)])
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    log_shares = model(batch["input_ids"]).logits.log_softmax(-1)
    right = -log_shares.gather(-1, batch["shift_labels"][..., None]).mean()
    expected = 0.9 * right + 0.1 * -log_shares.mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(4 * 32))  # half of a larger step
    torch.testing.assert_close(loss, expected / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_returned_with_the_outputs_on_request(smoothing, streams, tmp_path):
    """As callers of `Trainer.compute_loss` expect."""
    trainer = trained(streams, tmp_path, max_steps=1, label_smoothing_factor=smoothing)
    blocks = trainer.train_dataset
    batch = blocks.collate([blocks[0, i] for i in range(2)])
    model = trainer.model.eval()
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert torch.equal(loss, trainer.compute_loss(model, dict(batch)))
    assert torch.equal(outputs.logits, model(batch["input_ids"]).logits)


def test_losses_and_weights_of_the_bare_loop_equal_those_of_the_trainer(run_folder, recipe_file, text_file, tmp_path):
    arguments = parse_arguments(
        ["--data", str(text_file), "--output_dir", str(tmp_path / "bare")], recipe=str(recipe_file)
    )
    bare = bare_loop.train(arguments)
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    logged = [row["loss"] for row in rows if "loss" in row]
    means = [sum(bare[i : i + 10]) / 10 for i in range(0, 40, 10)]
    assert logged == pytest.approx(means, rel=1e-6)  # the logged value is a rounded float32 sum
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "bare").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(run_folder / "checkpoint-40").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- the run folder ---------------------------------------------------------------------------------------------------


def test_every_checkpoint_loads_and_contains_no_pickled_arguments(run_folder):
    checkpoints = sorted(run_folder.glob("checkpoint-*"))
    assert [checkpoint.name for checkpoint in checkpoints] == ["checkpoint-20", "checkpoint-40"]
    for checkpoint in checkpoints:
        model, tokenizer = load(str(checkpoint))
        assert len(tokenizer) == model.config.vocab_size
        assert model.config.use_cache is True
        assert not (checkpoint / "training_args.bin").exists()


def test_the_published_model_is_the_best_checkpoint(run_folder):
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    published = load_file(run_folder / "model" / "model.safetensors")
    checkpoint = load_file(run_folder / f"checkpoint-{best['step']}" / "model.safetensors")
    assert all(torch.equal(published[name], checkpoint[name]) for name in checkpoint)
    results = json.loads((run_folder / "model" / "minigpt.json").read_text())["results"]
    assert results["loss"] == pytest.approx(best["eval_loss"], rel=1e-12)


def test_the_recipe_of_a_run_reproduces_its_settings(run_folder, recipe_file, text_file, tmp_path):
    recipe = run_folder / "recipe.yaml"
    flags = ["--output_dir", str(tmp_path), "--use_cpu"]
    again = parse_arguments(flags, recipe=str(recipe))
    first = parse_arguments(["--data", str(text_file), "--figures", *flags], recipe=str(recipe_file))
    assert again[:2] == first[:2]
    assert again[2].to_dict() == first[2].to_dict()
    assert yaml.safe_load(recipe.read_text())["max_steps"] == 40


def test_the_log_contains_every_value(run_folder):
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [10, 20, 30, 40]
    assert [row["tokens"] for row in training] == [step * 4 * 32 for step in (10, 20, 30, 40)]
    expected = {"loss", "grad_norm", "learning_rate", "bits_per_byte", "tokens_per_second", "seconds", "epoch"}
    assert expected <= set(training[0])
    assert [row["step"] for row in rows if "eval_loss" in row] == [20, 40]
    assert training[-1]["loss"] < training[0]["loss"]


def test_the_loss_with_label_smoothing_is_not_converted_to_bits_per_byte(recipe, words, tmp_path, capsys):
    """It is not a negative log-likelihood; that of the validation split is."""
    flags = ("--label_smoothing_factor", "0.1", "--max_steps", "2", "--logging_steps", "1")
    flags += ("--validation_fraction", "0.1", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2")
    assert train(recipe, words, tmp_path / "run", *flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row for row in rows if {"loss", "eval_loss"} & set(row)]
    assert [[name for name in row if "bits_per_byte" in name] for row in losses] == [[], [], ["eval_bits_per_byte"]]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert ["smoothed labels" in line for line in lines] == [True, True, False]
    assert ["bits/byte" in line for line in lines] == [False, False, True]


def test_the_time_of_a_resumed_run_includes_the_time_before_the_interruption(recipe, words, tmp_path):
    assert train(recipe, words, tmp_path / "first") == 0
    go_back(tmp_path / "first", tmp_path / "second", 4)
    log = tmp_path / "second" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [{**row, "seconds": 1000.0} if row["step"] == 4 else row for row in rows]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(recipe, words, tmp_path / "second") == 0
    later = [row for row in map(json.loads, log.read_text().splitlines()) if row["step"] > 4]
    assert later[0]["seconds"] >= 1000
    about = json.loads((tmp_path / "second" / "model" / "minigpt.json").read_text())["training"]
    assert about["seconds"] >= later[-1]["seconds"] - 0.1  # rounded


def test_the_time_includes_steps_that_were_not_logged_before_the_interruption(recipe, words, tmp_path, monkeypatch):
    """Without a row in the log before the checkpoint, the time is that of the checkpoint."""
    step, run = Trainer.training_step, tmp_path / "run"
    flags = ["--logging_steps", "8"]

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", slow)
    assert train(recipe, words, run, *flags, "--max_steps", "4") == 0
    shutil.rmtree(run / "model")
    monkeypatch.setattr(Trainer, "training_step", step)
    assert train(recipe, words, run, *flags, "--allow_change", "max_steps") == 0
    assert json.loads((run / "model" / "minigpt.json").read_text())["training"]["seconds"] >= 1.2


def test_generating_samples_restores_all_rng_states():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = draw()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with preserved_random_state():
        draw()
    assert draw() == expected


# Methods of the Trainer that MiniGPTTrainer overrides or calls, so that an incompatible release is detected here.
SIGNATURES = {
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "_get_train_sampler": "train_dataset",
    "get_train_dataloader": "",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "get_batch_samples": "epoch_iterator num_batches device",
    "_evaluate": "trial ignore_keys_for_eval skip_scheduler",
    "_finalize_training": "trial num_train_samples start_time",
    "_determine_best_metric": "metrics trial",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "create_scheduler": "num_training_steps optimizer",
    "training_step": "model inputs num_items_in_batch",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "_get_grad_norm": "model grad_norm",
    "log": "logs start_time",
    "_save_checkpoint": "model trial",
    "_save": "output_dir state_dict",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_issue_warnings_after_load": "load_result",
    "init_hf_repo": "token private",
    "_push_from_checkpoint": "checkpoint_folder",
    "create_accelerator_and_postprocess": "",
    "_prepare_for_training": "max_steps train_dataloader resume_from_checkpoint",
    "_save_optimizer_and_scheduler": "output_dir",
    "save_model": "output_dir _internal_call",
    "_load_best_model": "",
}


def test_the_trainer_has_the_methods_that_are_overridden_with_these_parameters():
    found = {name: " ".join([*inspect.signature(getattr(Trainer, name)).parameters][1:]) for name in SIGNATURES}
    assert found == SIGNATURES


def test_every_override_is_in_the_table_and_states_why_it_is_needed():
    own = {**vars(CheckpointingTrainer), **vars(MiniGPTTrainer)}
    overrides = {name: method for name, method in own.items() if name in vars(Trainer)}
    overrides = {name: method for name, method in overrides.items() if not name.startswith("__")}
    assert set(overrides) == set(SIGNATURES)
    assert all(method.__doc__.startswith("Overridden ") for method in overrides.values())
