"""Rules for settings by width and number of tokens, at and next to the bounds of each rule."""

import math
from itertools import pairwise

import pytest

from minigpt_hf.training.scaling import (
    FINE_WIDTHS,
    WIDTHS,
    Shape,
    distance_from_optimal,
    dropout,
    learning_rates,
    mtp_loss_weight,
    optimal_tokens,
    positional_heads,
    shape_for,
    tokens_for_size,
    weight_decay,
)


@pytest.mark.parametrize(
    ("width", "layers", "heads"),
    [(64, 2, 2), (96, 3, 3), (128, 4, 4), (192, 4, 6), (256, 5, 4), (448, 8, 7), (768, 12, 12), (1536, 21, 24)],
)
def test_a_width_determines_layers_and_heads(width, layers, heads):
    """One layer per 32 of width up to 128, then one per 80; head dimension 32 below a width of 256, then 64."""
    expected = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    assert Shape(width).settings() == expected


def test_every_width_that_is_chosen_is_a_multiple_of_8():
    """Matrix kernels are faster for multiples of 8."""
    chosen = {shape_for(10_000 * 1.35**step, 1000).width for step in range(34)}
    assert len(chosen) > 20
    assert all(width % 8 == 0 for width in {*chosen, *WIDTHS})


def test_widths_increase_by_8_and_by_an_eighth_of_a_power_of_two_from_128_to_512():
    assert (FINE_WIDTHS[0], FINE_WIDTHS[-1]) == (32, 4096)
    for width, larger in pairwise(FINE_WIDTHS):
        power = 2 ** int(math.log2(width))
        assert larger - width == min(max(8, power // 8), 64)


def test_regularization_increases_with_the_number_of_epochs():
    """None up to 4 epochs, more above 10."""
    assert [dropout(epochs) for epochs in (0.5, 4, 4.01, 10, 10.01)] == [0.0, 0.0, 0.1, 0.1, 0.2]
    assert [weight_decay(epochs) for epochs in (0.5, 4, 4.01, 100)] == [0.0, 0.0, 0.1, 0.1]


def test_the_learning_rate_of_adamw_is_inversely_proportional_to_the_root_of_the_width():
    assert learning_rates(64)["learning_rate"] == pytest.approx(1e-2 * 2**0.5, rel=1e-3)
    assert learning_rates(256)["learning_rate"] == pytest.approx(1e-2 / 2**0.5, rel=1e-3)


def test_the_optimal_number_of_tokens_per_parameter_grows_with_the_cube_root_of_the_size():
    assert [optimal_tokens(p) / p for p in (1e5, 8e5, 6.4e6, 1e8)] == pytest.approx([1, 2, 4, 10])


def test_small_models_of_a_given_size_are_trained_longer():
    assert [tokens_for_size(p) for p in (4e4, 1.5e5, 3e5, 8e5, 6.4e6)] == pytest.approx(
        [4e5, 1.5e6, 1.5e6, 1.6e6, 4 * 6.4e6]
    )


def test_a_shape_is_optimal_for_its_number_of_tokens_and_twice_as_many_are_as_far_off_as_half():
    """Compute is C = D · P, so a factor in C is the same factor in D."""
    shape = Shape(128)
    parameters = shape.parameters(1000)
    compute = 2 * parameters**2 * (parameters / 8e5) ** (1 / 3)
    assert distance_from_optimal(shape, 1000, compute) == pytest.approx(0, abs=1e-9)
    twice, half = (distance_from_optimal(shape, 1000, factor * compute) for factor in (2, 0.5))
    assert twice == pytest.approx(half) == pytest.approx(0.6931, abs=1e-3)


def test_small_vocabularies_have_an_auxiliary_loss():
    """A byte vocabulary has 258 tokens; that of the smallest BPE of `minutes` has 1,024."""
    assert [mtp_loss_weight(vocabulary) for vocabulary in (65, 258, 1024)] == [0.5, 0.5, 0.0]


def test_positional_heads_leave_a_quarter_of_the_heads_random_and_more_of_a_few_with_a_large_vocabulary():
    for vocabulary in (67, 1024):
        assert positional_heads(4, 4, vocabulary) == [[1, 2, 3], [1, 2, 4], [1, 2]]
        assert positional_heads(2, 6, vocabulary) == [[1, 2, 3, 4], [1, 2, 4]]
        assert positional_heads(1, 2, vocabulary) == [[1]]
        assert positional_heads(6, 1, vocabulary) == []
    assert positional_heads(3, 3, 320) == [[1, 2], [1, 2], [1, 2]]
    assert positional_heads(3, 3, 321) == [[1], [1]]
    assert positional_heads(3, 4, 321) == [[1, 2, 3], [1, 2, 4]]
