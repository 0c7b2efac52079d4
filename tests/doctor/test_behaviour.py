"""Models with one behavioral fault each are reported by the corresponding check; valid models pass."""

import types

import pytest
import torch

from minigpt_hf.doctor import behaviour, loading
from tests.conftest import tiny_model
from tests.doctor.conftest import Broken


def healthy():
    model = tiny_model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model


def look(check, model) -> tuple[str, str]:
    row = check(types.SimpleNamespace(model=model))
    return row.state, row.reason


@pytest.mark.parametrize("check", behaviour.CHECKS, ids=lambda check: check.row_name)
def test_a_model_in_order_passes(check):
    assert look(check, healthy())[0] == "pass"


def spoil_forward(model, change) -> None:
    """Apply `change` to the keyword arguments of every forward pass."""
    right = model.forward

    def forward(*args, **kwargs):
        return right(*args, **change(kwargs))

    model.forward = forward


def test_a_cache_without_positions_is_found():
    def forget_positions(kwargs):
        length = kwargs["input_ids"].shape[1]
        return {**kwargs, "position_ids": torch.arange(length)[None]}

    model = healthy()
    spoil_forward(model, forget_positions)
    state, reason = look(behaviour.cached_equals_uncached, model)
    assert state == "fail"
    assert "apart" in reason


def test_a_model_that_sees_padding_is_found():
    model = healthy()
    right = model.model.forward
    model.model.forward = lambda *args, **kwargs: right(*args, **{**kwargs, "attention_mask": None})
    state, reason = look(behaviour.left_padded_equals_single, model)
    assert state == "fail"
    assert "logits of new token 1" in reason


def test_an_end_that_is_forbidden_is_found():
    model = healthy()
    model.generation_config.suppress_tokens = [0]
    assert look(behaviour.stops, model) == (
        "fail",
        "`generate` continues after token 0 with the settings of the folder",
    )
    model.generation_config.suppress_tokens = None
    model.generation_config.eos_token_id = None
    assert look(behaviour.stops, model)[0] == "fail"


def test_beams_that_do_not_run_are_found():
    model = healthy()
    right = model.forward

    def forward(*args, **kwargs):
        if kwargs["input_ids"].shape[0] > 1:
            raise NotImplementedError("one text at a time")
        return right(*args, **kwargs)

    model.forward = forward
    assert look(behaviour.beams, model) == ("fail", "the model fails: NotImplementedError: one text at a time")


# -- loading, in this process -----------------------------------------------------------------------------------------


@pytest.fixture
def subject(broken) -> loading.LoadedFolder:
    return loading.LoadedFolder(broken.path)


def test_a_buffer_that_loading_forgets_is_found(subject):
    assert loading.natively(subject).state == loading.with_the_package(subject).state == "pass"
    assert loading.meta_equals_plain(subject).state == "pass"
    subject.own.model.rotary_emb.inv_freq.mul_(2)  # like uninitialized memory
    row = loading.meta_equals_plain(subject)
    assert (row.state, row.reason) == ("fail", "different: model.rotary_emb.inv_freq")


def test_a_model_that_differs_from_its_twin_is_found(broken):
    broken.json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    subject = loading.LoadedFolder(broken.path)
    subject.config = {**subject.config, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert loading.natively(subject).state == "pass"
    row = loading.with_the_package(subject)
    assert row.state == "fail"
    assert "from the native model's" in row.reason


def test_weights_that_a_model_does_not_ask_for_are_found(broken):
    broken.tensors(lambda kept: kept.update({"model.extra.weight": torch.zeros(3)}))
    row = loading.natively(loading.LoadedFolder(broken.path))
    assert (row.state, row.reason) == ("fail", "loading failed: ValueError: unexpected: model.extra.weight")


def test_a_configuration_that_would_fill_the_memory_is_not_built(broken):
    broken.json("config.json", intermediate_size=9_000_000, hidden_size=900_000)
    row = loading.natively(loading.LoadedFolder(broken.path))
    assert row.state == "fail"
    assert "config.json defines 48," in row.reason


def test_a_tokenizer_that_loads_as_another_is_found(broken: Broken):
    broken.json("tokenizer_config.json", tokenizer_class="GPT2Tokenizer")  # which has another pre-tokenizer
    row = loading.tokenizer_loads(loading.LoadedFolder(broken.path))
    assert row.state == "fail"
    assert "differently from tokenizer.json" in row.reason
