"""Derived values, validation and serialization of MiniGPTConfig."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError

from minigpt_hf import MiniGPTConfig
from minigpt_hf.model.configuration_minigpt import AUTO_MAP
from tests.conftest import tiny_config


def test_missing_values_are_derived():
    config = MiniGPTConfig(hidden_size=128, num_attention_heads=4, num_hidden_layers=2)
    assert config.head_dim == 32
    assert config.num_key_value_heads == 4
    assert config.intermediate_size == 352  # 8/3 · 128 = 341.3, rounded up to a multiple of 32
    assert config.layer_types == ["full_attention"] * 2
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}


def test_sliding_layers_start_at_max_window_layers():
    config = tiny_config(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert config.layer_types == ["full_attention", "full_attention", "sliding_attention"]


def test_sliding_window_is_none_without_use_sliding_window():
    assert tiny_config(sliding_window=8).sliding_window is None


def test_a_saved_configuration_names_every_auto_class_and_loads_equal(tmp_path):
    config = tiny_config(embedding_dropout=0.1, use_sliding_window=True, sliding_window=8)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert MiniGPTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30}, "does not divide into 4 heads"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` is -1"),
        ({"vocab_size": 0}, "`vocab_size` is 0"),
        ({"max_position_embeddings": 0}, "`max_position_embeddings` is 0"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "must be even"),
        ({"eos_token_id": 99}, "ids run from 0 to 98"),
        ({"eos_token_id": [0, 99]}, "ids run from 0 to 98"),
        ({"pad_token_id": -1}, "`pad_token_id` -1"),
        ({"attention_dropout": 7}, "`attention_dropout` is 7"),
        ({"embedding_dropout": -0.1}, "`embedding_dropout` is -0.1"),
        ({"residual_dropout": 1.0}, "`residual_dropout` is 1.0"),
        ({"use_sliding_window": True}, "`sliding_window` is None"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_an_invalid_configuration_raises_an_error_that_names_the_argument(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**settings)


def test_head_dim_may_differ_from_hidden_size_divided_by_heads():
    assert tiny_config(hidden_size=34, head_dim=16).head_dim == 16
