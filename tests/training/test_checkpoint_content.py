"""A checkpoint whose manifest is valid, but whose content does not fit the run, is rejected before it is loaded."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt_hf.atomic import MANIFEST, seal
from minigpt_hf.training import safeguards
from tests.conftest import representative
from tests.training.conftest import go_back, rows, train

FLAGS = ["--mtp_loss_weight", "0.5"]


@pytest.fixture(scope="module")
def finished(recipe, words, tmp_path_factory):
    folders = {"muon": FLAGS, "adamw": ["--no_muon"]}
    parent = tmp_path_factory.mktemp("finished")
    for name, flags in folders.items():
        assert train(recipe, words, parent / name, *flags) == 0
    return parent


def resume(finished, folder, recipe, words, damage, flags=FLAGS, run="muon") -> int:
    """Resume a run from step 4 after damaging that checkpoint and renewing its manifest."""
    go_back(finished / run, folder, 4)
    damage(folder / "checkpoint-4")
    (folder / "checkpoint-4" / MANIFEST).unlink()
    seal(folder / "checkpoint-4")
    return train(recipe, words, folder, *flags)


def edit(name: str, change):
    """A function that changes the content of a file of a checkpoint, which `torch.save` has written."""

    def damage(checkpoint) -> None:
        content = torch.load(checkpoint / name, weights_only=False)
        torch.save(content if (new := change(content)) is None else new, checkpoint / name)

    return damage


def states(name: str, change):
    """A function that replaces each tensor of this name in the optimizer state, or removes it."""

    def of_all(content) -> None:
        for state in content["state"].values():
            if name in state:
                new = change(state.pop(name))
                state |= {} if new is None else {name: new}

    return edit("optimizer.pt", of_all)


def weights(change):
    def damage(checkpoint) -> None:
        file = checkpoint / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return damage


def swapped_groups(content) -> None:
    first, second, *_ = content["param_groups"]
    first["params"], second["params"] = second["params"], first["params"]


DAMAGES = {
    "no states": (
        edit("optimizer.pt", lambda content: content["state"].clear()),
        "optimizer.pt lacks step of model.embed_tokens.weight",
    ),
    "one state missing": (
        edit("optimizer.pt", lambda content: content["state"].popitem() and None),
        "optimizer.pt lacks ",
    ),
    "no second moments": (states("second_moment", lambda _: None), "optimizer.pt lacks second_moment of model.layers"),
    "a vector too short": (states("second_moment", lambda t: t[:1]), "second_moment of model.layers"),
    "another shape": (states("momentum_buffer", lambda t: t.T[:, :1].contiguous()), "momentum_buffer of model.layers"),
    "scalars": (states("exp_avg", lambda t: torch.zeros(())), "exp_avg of model.embed_tokens.weight is float32 ()"),
    "half precision": (states("exp_avg_sq", torch.Tensor.half), "exp_avg_sq of model.embed_tokens.weight is float16"),
    "steps in half precision": (states("step", torch.Tensor.half), "step of model.embed_tokens.weight is float16 ()"),
    "a number": (states("exp_avg", lambda t: 1.0), "optimizer.pt lacks exp_avg of model.embed_tokens.weight"),
    "swapped groups": (edit("optimizer.pt", swapped_groups), "the parameter groups of optimizer.pt are not those"),
    "another optimizer": (
        edit("optimizer.pt", lambda content: [1, 2]),
        "optimizer.pt is not the state of an optimizer",
    ),
    "another step": (edit("scheduler.pt", lambda content: content.update(last_epoch=1)), "scheduler.pt is at step 1"),
    "no schedule": (edit("scheduler.pt", lambda content: [1, 2]), "scheduler.pt is not the state of a schedule"),
    "no random state": (lambda checkpoint: (checkpoint / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "another random state": (edit("rng_state.pth", lambda content: content.update(cpu=torch.ones(3))), "rng_state.pth"),
    "no auxiliary head": (
        lambda checkpoint: (checkpoint / "auxiliary_head.pt").unlink(),
        "auxiliary_head.pt is missing",
    ),
    "another head": (edit("auxiliary_head.pt", lambda content: {"weight": torch.zeros(3, 3)}), "auxiliary_head.pt"),
    "another tensor": (weights(lambda found: found | {"extra": torch.ones(2)}), "the weights have in addition extra"),
    "a tensor missing": (weights(lambda found: dict(list(found.items())[1:])), "the weights lack model."),
    "weights in half precision": (weights(lambda found: {k: v.half() for k, v in found.items()}), "is F16 ("),
    "a weight of another shape": (weights(lambda found: {k: v[:1] for k, v in found.items()}), "model.safetensors: "),
    "no safetensors": (lambda checkpoint: (checkpoint / "model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
    "no pickle": (lambda checkpoint: (checkpoint / "optimizer.pt").write_bytes(b"x" * 99), "cannot be read"),
}


@pytest.mark.parametrize(
    "name",
    representative(
        DAMAGES,
        *("one state missing", "another shape", "half precision", "swapped groups", "another step", "no random state"),
        *("another head", "a tensor missing", "weights in half precision", "no safetensors", "no pickle"),
    ),
)
def test_a_checkpoint_that_does_not_fit_the_run_is_rejected_in_one_line(
    name, finished, recipe, words, tmp_path, capsys
):
    damage, message = DAMAGES[name]
    assert resume(finished, tmp_path / "run", recipe, words, damage) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt")]
    assert line.startswith(f"minigpt train: {tmp_path / 'run' / 'checkpoint-4'}: ")
    assert message in line
    assert line.endswith("it was changed after it was saved; restore it, or delete it to resume from an earlier one")


@pytest.mark.parametrize(
    "name",
    representative(
        ["no states", "one state missing", "scalars", "half precision", "another step"], "no states", "scalars"
    ),
)
def test_a_checkpoint_of_adamw_is_checked_as_well(name, finished, recipe, words, tmp_path, capsys):
    damage, message = DAMAGES[name]
    assert resume(finished, tmp_path / "run", recipe, words, damage, ["--no_muon"], "adamw") == 2
    assert message in capsys.readouterr().err


def test_an_allowed_second_moment_starts_at_zero(finished, recipe, words, tmp_path):
    """A checkpoint without second moments is valid if it was trained without."""
    assert train(recipe, words, tmp_path / "run", *FLAGS, "--muon_beta2", "0") == 0
    go_back(tmp_path / "run", tmp_path / "stopped", 4)
    assert train(recipe, words, tmp_path / "stopped", *FLAGS, "--allow_change", "muon_beta2") == 0


def test_a_checkpoint_of_skipped_steps_has_no_states_and_is_resumed(recipe, words, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(safeguards, "EXPLOSION", 0)
        assert train(recipe, words, run, *FLAGS, "--on_bad_loss", "skip") == 65  # no step is taken, no model published
    assert not torch.load(run / "checkpoint-2" / "optimizer.pt")["state"]
    for step in (4, 6, 8):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert train(recipe, words, run, *FLAGS, "--on_bad_loss", "skip") == 0
    assert rows(run)[-1]["step"] == 8
