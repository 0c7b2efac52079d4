"""Runs with random settings that are interrupted at random steps equal uninterrupted ones bit for bit."""

import json
import os
import random
import signal

import pytest
from safetensors.torch import load_file

from minigpt_hf.training.run_folder import RunFolder
from minigpt_hf.training.trainer import MiniGPTTrainer
from tests.conftest import representative
from tests.training.conftest import assert_equal, state_of, train

SCHEDULES = [
    "--save_steps 2 --validation_fraction 0.3 --eval_steps 2",
    "--save_steps 2",
    "--save_steps 3 --validation_fraction 0.3 --eval_steps 3",
    "--save_steps 0.25 --validation_fraction 0.3 --eval_steps 4",
    "--save_strategy epoch --validation_fraction 0.3 --eval_strategy epoch",
    "--save_strategy epoch --validation_fraction 0.3 --eval_steps 3",
    "--save_strategy best --metric_for_best_model loss --validation_fraction 0.3 --eval_steps 2",
    "--save_steps 2 --validation_fraction 0.3 --eval_strategy epoch",
    "--save_steps 2 --validation_fraction 0.3 --eval_steps 2 --load_best_model_at_end false",
]
# Each group contributes one of its alternatives; the first one, nothing, has more than half of the probability.
SETTINGS = [
    ["", "--max_steps 13", "--max_steps -1 --num_train_epochs 1.5", "--max_steps -1 --num_train_epochs 2"],
    ["", "--logging_steps 3", "--logging_steps 3 --logging_first_step true", "--logging_strategy epoch"],
    ["", "--per_device_train_batch_size 4", "--per_device_train_batch_size 8"],
    ["", "--gradient_accumulation_steps 2", "--gradient_accumulation_steps 3"],
    ["", "--dataloader_drop_last true", "--shuffle_window 8"],
    ["", "--dataloader_num_workers 1", "--dataloader_num_workers 2 --dataloader_persistent_workers true"],
    ["", "--async_checkpoints true", "--save_total_limit 1", "--save_total_limit 2"],
    ["", "--muon false", "--muon false --optim adafactor", "--muon false --optim sgd", "--muon_learning_rate 0.5"],
    [
        "",
        "--lr_scheduler_type cosine",
        "--lr_scheduler_type inverse_sqrt",
        '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":3}',
    ],
    ["", "--label_smoothing_factor 0.1", "--mtp_loss_weight 0.3", "--logits_chunk_size 40", "--neftune_noise_alpha 5"],
    ["", "--gradient_checkpointing true", "--max_grad_norm 0.5", "--tie_word_embeddings false"],
    ["", "--include_num_input_tokens_seen true", "--eval_on_start true", "--eval_delay 3"],
    ["", "--early_stopping_patience 1", "--early_stopping_patience 2"],
    ["", "--sample_tokens 4", "--on_bad_loss skip"],
]
EVENTS = ["training_step", "evaluate", "log"]
ENDS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, RuntimeError]


@pytest.mark.parametrize("seed", representative(range(100), 0))
def test_an_interrupted_run_equals_an_uninterrupted_one(seed, recipe, words, tmp_path, monkeypatch):
    """The weights, the newest checkpoint, and each row of the log but its times are compared."""
    draw = random.Random(seed)
    chosen = [draw.choice(["", draw.choice(group)]) for group in SETTINGS]
    flags = " ".join([draw.choice(SCHEDULES), *chosen]).split()
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert train(recipe, words, straight, *flags) == 0
    last = max(row["step"] for row in log(straight))
    codes = []
    for _ in range(draw.randint(1, 5)):
        ends_at(draw.choice(EVENTS), draw.randrange(last), draw.choice(ENDS), monkeypatch)
        try:
            codes.append(train(recipe, words, folder, *flags))
        except RuntimeError as error:
            codes.append(error.args)
        monkeypatch.undo()
    codes.append(train(recipe, words, folder, *flags))
    assert codes[-1] == 0
    assert log(folder) == log(straight), (flags, codes)
    weights = [load_file(run / "model" / "model.safetensors") for run in (folder, straight)]
    assert_equal(*weights)
    newest = [RunFolder(run).checkpoints()[-1] for run in (folder, straight)]
    assert newest[0].name == newest[1].name
    assert_equal(*map(state_of, newest))


def ends_at(event, step, end, monkeypatch) -> None:
    """End the process by a signal or an error at the first call of a method of the Trainer at this step or a later one."""
    real, called = getattr(MiniGPTTrainer, event), []

    def method(self, *args, **kwargs):
        if self.state.global_step >= step and not called:
            called.append(step)
            if end is RuntimeError:
                raise RuntimeError("at step", self.state.global_step)
            os.kill(os.getpid(), end)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPTTrainer, event, method)


def log(folder) -> list[dict]:
    """The rows of the log without measurements of time."""
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if "second" not in name and "time" not in name} for row in logged
    ]
