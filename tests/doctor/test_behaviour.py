"""Models that misbehave in one way each, found out by their rows; and the rows of a model in order, for comparison."""

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
    """Let `change` at the keyword arguments of every forward pass."""
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
        "`generate` writes on after token 0, with the folder's own settings",
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
def patient(broken) -> loading.Patient:
    return loading.Patient(broken.path)


def test_a_buffer_that_loading_forgets_is_found(patient):
    assert loading.natively(patient).state == loading.with_the_package(patient).state == "pass"
    assert loading.meta_equals_plain(patient).state == "pass"
    patient.own.model.rotary_emb.inv_freq.mul_(2)  # as memory that nobody filled
    row = loading.meta_equals_plain(patient)
    assert (row.state, row.reason) == ("fail", "not the same: model.rotary_emb.inv_freq")


def test_a_model_that_differs_from_its_twin_is_found(broken):
    broken.json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    patient = loading.Patient(broken.path)
    patient.config = {**patient.config, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert loading.natively(patient).state == "pass"
    row = loading.with_the_package(patient)
    assert row.state == "fail"
    assert "away from the native ones" in row.reason


def test_weights_that_a_model_does_not_ask_for_are_found(broken):
    broken.tensors(lambda kept: kept.update({"model.extra.weight": torch.zeros(3)}))
    row = loading.natively(loading.Patient(broken.path))
    assert (row.state, row.reason) == ("fail", "it does not load: ValueError: not asked for: model.extra.weight")


def test_a_configuration_that_would_fill_the_memory_is_not_built(broken):
    broken.json("config.json", intermediate_size=9_000_000, hidden_size=900_000)
    row = loading.natively(loading.Patient(broken.path))
    assert row.state == "fail"
    assert "config.json asks for 48," in row.reason


def test_a_tokenizer_that_loads_as_another_is_found(broken: Broken):
    broken.json("tokenizer_config.json", tokenizer_class="GPT2Tokenizer")  # whose words are cut in another way
    row = loading.tokenizer_loads(loading.Patient(broken.path))
    assert row.state == "fail"
    assert "other ids than tokenizer.json" in row.reason
