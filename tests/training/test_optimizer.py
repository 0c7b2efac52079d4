"""MuonAdamW compared with torch.optim.Muon and torch.optim.AdamW."""

import copy
import math
import re

import pytest
import torch

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.cli import main
from minigpt_hf.training.optimizer import MuonAdamW, muon_adamw, orthogonalize
from minigpt_hf.training.run_folder import read_log
from tests.conftest import random_ids, tiny_config, tiny_model
from tests.training.conftest import train

SHAPES = [(32, 32), (96, 32), (96, 32), (32, 96), (16, 32)]


def parameters_with_gradients(shapes, seed=0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def renew_gradients(groups, seed):
    for parameters in groups:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_steps_equal_those_of_torch_optim_muon(weight_decay):
    ours, reference = parameters_with_gradients(SHAPES), parameters_with_gradients(SHAPES)
    muon = MuonAdamW(
        [{"params": ours, "algorithm": "muon", "lr": 0.02, "momentum": 0.95, "weight_decay": weight_decay}]
    )
    torchs = torch.optim.Muon(reference, lr=0.02, momentum=0.95, weight_decay=weight_decay)
    for step in range(5):
        renew_gradients([ours, reference], step)
        muon.step()
        torchs.step()
    for a, b in zip(ours, reference, strict=True):
        # Both iterate in bfloat16 (relative precision 2⁻⁸); batched products may round the last bit differently.
        torch.testing.assert_close(a, b, atol=5 * 0.02 * 2**-6, rtol=0)


def test_adamw_steps_equal_those_of_torch_optim_adamw():
    ours, reference = parameters_with_gradients([(7, 5), (3,)]), parameters_with_gradients([(7, 5), (3,)])
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adamw = MuonAdamW([{"params": ours, "algorithm": "adamw", **settings}])
    torchs = torch.optim.AdamW(reference, fused=True, **settings)
    for step in range(5):
        renew_gradients([ours, reference], step)
        adamw.step()
        torchs.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_orthogonalization_gives_singular_values_near_one_and_preserves_singular_vectors():
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    for matrix, orthogonal in zip(matrices, result, strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.linalg.svdvals(orthogonal).min() > 0.6
        assert torch.linalg.svdvals(orthogonal).max() < 1.3
        aligned = (left.T @ orthogonal @ right.T).diagonal()  # U·S'·Vᵀ with the same U and V
        assert (aligned > 0.6).all()
        assert values.max() / values.min() > 2  # unlike those of the input


def test_a_saved_and_loaded_optimizer_continues_bit_for_bit():
    def take_steps(model, optimizer, first, last):
        for step in range(first, last):
            ids = random_ids(4, 16 + step)[:, step:]
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = tiny_model().train()
    optimizer = muon_adamw(straight, lr=1e-2, muon_lr=0.02, weight_decay=0.1)
    take_steps(straight, optimizer, 0, 3)
    resumed = copy.deepcopy(straight)
    other = muon_adamw(resumed, lr=9.0, muon_lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(straight, optimizer, 3, 6)
    take_steps(resumed, other, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_each_parameter_has_the_intended_algorithm_learning_rate_and_weight_decay():
    model = MiniGPTForCausalLM(tiny_config(tie_word_embeddings=False))
    optimizer = muon_adamw(model, lr=4e-3, muon_lr=0.02, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rules = {
        names[id(parameter)]: (group["algorithm"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(rules) == set(names.values())
    for name, rule in rules.items():
        if "norm" in name:
            assert rule == ("adamw", 4e-3, 0.0), name
        elif "layers" in name:
            assert rule == ("muon", 0.02, 0.1), name
        else:
            assert rule == ("adamw", 4e-3, 0.1), name


def test_vectors_with_muon_and_groups_without_an_algorithm_are_rejected():
    with pytest.raises(ValueError, match="Muon requires matrices"):
        MuonAdamW([{"params": parameters_with_gradients([(3,)]), "algorithm": "muon"}])
    with pytest.raises(ValueError, match="use 'muon' or 'adamw'"):
        MuonAdamW([{"params": parameters_with_gradients([(3, 3)])}])


def test_min_lr_of_a_schedule_is_the_absolute_learning_rate(text_file, recipe_file, tmp_path):
    """transformers divides `min_lr` by the optimizer's default learning rate."""
    argv = ["train", "--recipe", str(recipe_file), "--data", str(text_file), "--output_dir", str(tmp_path / "run")]
    argv += ["--max_steps", "6", "--warmup_steps", "0", "--logging_steps", "1", "--learning_rate", "8e-3"]
    argv += ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 2e-3}']
    assert main(argv) == 0
    rates = [row["learning_rate"] for row in read_log(tmp_path / "run" / "log.jsonl") if "learning_rate" in row]
    # Step k of 6 has the rate after k - 1 steps, on half a cosine from peak to minimum.
    expected = [2e-3 + 6e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (
            "--optim sgd --adam_beta1 0.8 --adam_epsilon 1e-6 --adam_beta2 0.9",
            ["adam_beta1", "adam_beta2", "adam_epsilon"],
        ),
        ("--optim rmsprop --lr_scheduler_type constant --warmup_steps 1", ["warmup_steps"]),
        ("--optim adamw_torch --adam_beta2 0.9 --adam_epsilon 1e-6 --warmup_steps 1", []),
        ("--optim sgd --lr_scheduler_type constant --warmup_steps 0", []),
    ],
)
def test_settings_that_optimizer_and_schedule_do_not_use_are_reported(flags, unused, recipe, words, tmp_path, capsys):
    assert train(recipe, words, tmp_path / "run", "--no_muon", "--max_steps", "2", *flags.split()) == 0
    reported = re.findall(r"(\w+): no effect with (?:optim|lr_scheduler_type) \w+\n", capsys.readouterr().err)
    assert reported == unused
