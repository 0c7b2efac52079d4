"""Multi-token prediction: the gradient of the auxiliary loss, exact resuming, and published folders without the head."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from minigpt_hf.cli import main
from minigpt_hf.training.auxiliary_head import FILE, add_auxiliary_loss, attach_auxiliary_head, detach_auxiliary_head
from tests.conftest import random_ids, representative, tiny_model
from tests.training.conftest import assert_equal, go_back, rows, state_of, train

MTP = ["--mtp_loss_weight", "0.5"]


def test_the_value_of_the_loss_is_unchanged_and_its_gradient_is_that_of_the_weighted_sum():
    model, ids = tiny_model(), random_ids(2, 9)
    attach_auxiliary_head(model)
    inputs, next_tokens = ids[:, :-1], ids[:, 1:].clone()
    next_tokens[1, 5] = -100  # at position 4, the token after the next one is ignored
    gradients = []
    for is_ours in (True, False):
        model.zero_grad()
        outputs = model(inputs, labels=inputs, shift_labels=next_tokens, output_hidden_states=True)
        if is_ours:
            loss = add_auxiliary_loss(outputs.loss, model, outputs.hidden_states[-1], next_tokens, 0.25, 1 / 15)
            assert torch.equal(loss, outputs.loss)
        else:  # by hand: positions 0 to 6 of the hidden states before the language modeling head, labels two tokens later
            hidden_states = model.model(inputs).last_hidden_state
            sums = [
                cross_entropy(model.auxiliary_head(hidden_states[b, t]), next_tokens[b, t + 1], reduction="sum")
                for b in range(2)
                for t in range(7)
                if next_tokens[b, t + 1] != -100
            ]
            assert len(sums) == 13
            loss = outputs.loss + 0.25 * sum(sums) / 15
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert "auxiliary_head.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_a_model_is_unchanged_by_a_head_that_is_attached_and_detached():
    model, before = tiny_model(), tiny_model().state_dict()
    attach_auxiliary_head(model)
    assert set(model.state_dict()) - set(before) == {"auxiliary_head.weight"}
    detach_auxiliary_head(model)
    detach_auxiliary_head(model)
    assert_equal(dict(model.state_dict()), dict(before))


@pytest.fixture(scope="module")
def finished(recipe, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp") / "run"
    assert train(recipe, words, folder, *MTP, "--gradient_accumulation_steps", "2") == 0
    return folder


def test_a_resumed_run_equals_an_uninterrupted_one(finished, recipe, words, tmp_path):
    go_back(finished, tmp_path / "run", 4)
    assert train(recipe, words, tmp_path / "run", *MTP, "--gradient_accumulation_steps", "2") == 0
    assert rows(tmp_path / "run") == rows(finished)
    checkpoints = [folder / "checkpoint-8" for folder in (tmp_path / "run", finished)]
    assert_equal(*map(state_of, checkpoints))
    assert_equal(*(dict(torch.load(checkpoint / FILE)) for checkpoint in checkpoints))


def test_the_head_is_trained_and_stored_next_to_the_model_only(finished, tmp_path):
    heads = [torch.load(finished / f"checkpoint-{step}" / FILE)["weight"] for step in (2, 4)]
    assert not torch.equal(*heads)
    for file in finished.rglob("model.safetensors"):
        assert not [name for name in load_file(file) if "auxiliary" in name]
    assert not list((finished / "model").glob("auxiliary*"))
    assert (
        main(["export", str(finished / "checkpoint-8"), "--to", "native", "--output_dir", str(tmp_path / "native")])
        == 0
    )
    assert [file.name for file in (tmp_path / "native").glob("*.safetensors")] == ["model.safetensors"]
    assert not list((tmp_path / "native").glob("auxiliary*"))


def test_the_weight_falls_linearly_to_zero(recipe, words, tmp_path):
    """With SGD, the change of the head in a step is proportional to the weight, and its gradient is otherwise constant."""
    sgd = ["--no_muon", "--optim", "sgd", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]
    flags = [*MTP, *sgd, "--warmup_steps", "0", "--max_grad_norm", "0", "--save_steps", "1"]
    assert train(recipe, words, tmp_path / "run", *flags) == 0
    heads = [torch.load(tmp_path / "run" / f"checkpoint-{step}" / FILE)["weight"] for step in range(1, 9)]
    changes = [(new - old).norm().item() for old, new in itertools.pairwise(heads)]
    of_full_weight = [change / (1 - step / 8) for step, change in enumerate(changes, start=1)]
    assert of_full_weight == pytest.approx([of_full_weight[0]] * 7, rel=0.3)


def test_the_plan_and_the_metadata_count_the_head_separately(recipe, words, tmp_path, capsys):
    counts = []
    for name, flags in (("with", MTP), ("without", [])):
        assert train(recipe, words, tmp_path / name, *flags) == 0
        counts.append(json.loads((tmp_path / name / "model" / "minigpt.json").read_text())["training"]["parameters"])
        out = capsys.readouterr().out
        assert f"model         {counts[-1]:,} parameters" in out
        assert ("8,256 more in the auxiliary head, not published" in out) == (name == "with")  # 258 · 32
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_smoothing_factor", "0.1"], "mtp_loss_weight is not supported with label_smoothing_factor"),
        (["--mtp_loss_weight", "-1"], "mtp_loss_weight is -1.0: it must be at least 0 and finite"),
    ],
)
def test_unsupported_combinations_are_reported_in_one_line(flags, message, recipe, words, tmp_path, capsys):
    assert train(recipe, words, tmp_path / "run", *MTP, *flags) == 2
    assert capsys.readouterr().err.startswith(f"minigpt train: {message}")


@pytest.mark.parametrize("weights", representative([["0", "0.5"], ["0.5", "0"], ["0.5", "0.25"]], ["0.5", "0.25"]))
def test_the_weight_may_change_between_start_and_resume(weights, recipe, words, tmp_path, capsys):
    """Adding or removing the head changes the parameters of the optimizer, which then starts without its moments."""
    before, after = (["--mtp_loss_weight", weight] for weight in weights)
    assert train(recipe, words, tmp_path / "run", *before) == 0
    go_back(tmp_path / "run", tmp_path / "resumed", 4)
    assert train(recipe, words, tmp_path / "resumed", *after) == 2
    assert "mtp_loss_weight was" in capsys.readouterr().err
    assert train(recipe, words, tmp_path / "resumed", *after, "--allow_change", "mtp_loss_weight") == 0
    err = capsys.readouterr().err
    assert ("the optimizer starts without its moments" in err) == ("0" in weights)
    assert rows(tmp_path / "resumed")[:4] == rows(tmp_path / "run")[:4]
    assert rows(tmp_path / "resumed")[4:] != rows(tmp_path / "run")[4:]
    assert (tmp_path / "resumed" / "checkpoint-8" / FILE).is_file() == (weights[1] != "0")
