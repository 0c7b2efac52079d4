"""Identities of optimizer steps with Muon and AdamW."""

import itertools

import pytest
import torch

from minigpt_hf.training.optimizer import MuonAdamW

SHAPES = [(32, 32), (96, 32), (32, 96)]


def stepped(weights, gradients, algorithm="muon", **settings) -> list[torch.Tensor]:
    """Weights after one step for each set of gradients."""
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = MuonAdamW([{"params": parameters, "algorithm": algorithm, "lr": 0.5, **settings}])
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def random_matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_weight_decay_shrinks_the_weights_and_not_their_update(algorithm):
    """w ← w · (1 - lr · decay) - lr · update: decay changes the result by lr · decay · w, hence not at all for w = 0."""
    zeros, gradients = [torch.zeros(shape) for shape in SHAPES], random_matrices(1)
    plain, decayed = (stepped(zeros, [gradients], algorithm, weight_decay=decay) for decay in (0.0, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(plain, decayed, strict=True))
    weights = random_matrices(0)
    plain, decayed = (stepped(weights, [gradients], algorithm, weight_decay=decay) for decay in (0.0, 0.5))
    for weight, without, with_decay in zip(weights, plain, decayed, strict=True):
        torch.testing.assert_close(without - with_decay, 0.5 * 0.5 * weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_muon_does_not_depend_on_the_scale_of_the_gradients(scale):
    """Scaling floating point numbers by powers of two is exact, so the weights are equal bit for bit."""
    weights, gradients = random_matrices(0), [random_matrices(seed) for seed in (1, 2, 3)]
    scaled = [[gradient * scale for gradient in step] for step in gradients]
    for a, b in zip(stepped(weights, gradients), stepped(weights, scaled), strict=True):
        assert torch.equal(a, b)


def test_the_update_of_a_matrix_does_not_depend_on_the_gradients_of_the_others():
    """Matrices of equal shape are orthogonalized in one batch, independently of each other."""
    generator = torch.Generator().manual_seed(0)
    weights, gradients = (torch.randn(3, 16, 32, generator=generator) for _ in range(2))
    together = stepped([*weights], [[gradients[0], gradients[1] * 1000, gradients[2] * 0.001]])
    for weight, gradient, result in zip(weights, gradients, together, strict=True):
        (alone,) = stepped([weight], [[gradient]])
        torch.testing.assert_close(result, alone, atol=0.5 * 2**-5, rtol=0)  # bfloat16, summed in another order


def test_second_moments_scale_rows_or_columns_and_preserve_the_norm():
    """The updates of plain Muon, normalized by hand, with one moment per row, or per column of a wide matrix."""
    weights = [torch.zeros(shape) for shape in SHAPES]
    gradients, decay = [random_matrices(seed) for seed in (1, 2, 3)], 0.75
    for step in gradients:  # neurons with gradients of different scales
        for gradient in step:
            gradient[0] *= 100
            gradient[:, 1] *= 100
    plain = [stepped(weights, gradients[:number]) for number in range(4)]
    expected, moments = weights, [0.0, 0.0, 0.0]
    for before, after in itertools.pairwise(plain):
        updates = [new - old for old, new in zip(before, after, strict=True)]
        means = [update.square().mean(dim, keepdim=True) for update, dim in zip(updates, (1, 1, 0), strict=True)]
        moments = [decay * old + (1 - decay) * mean for old, mean in zip(moments, means, strict=True)]
        scaled = [update / moment.sqrt() for update, moment in zip(updates, moments, strict=True)]
        scaled = [each * update.norm() / each.norm() for each, update in zip(scaled, updates, strict=True)]
        expected = [old + each for old, each in zip(expected, scaled, strict=True)]
    for a, b in zip(stepped(weights, gradients, second_moment_decay=decay), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_is_returned():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = MuonAdamW([{"params": [parameter], "algorithm": "adamw", "lr": 0.5}])

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 0.5))  # the first step of Adam has length lr
    assert optimizer.step() is None


def test_muon_does_not_change_weights_whose_gradient_is_zero():
    weights = random_matrices(0)
    for a, b in zip(weights, stepped(weights, [[torch.zeros(shape) for shape in SHAPES]]), strict=True):
        assert torch.equal(a, b)
