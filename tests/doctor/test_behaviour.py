"""Models with one behavioral fault each are reported by the corresponding check; valid models pass."""

import types

import pytest
import torch

from minigpt_hf.doctor import behaviour, loading
from tests.conftest import tiny_model
from tests.doctor.conftest import Broken


def valid_model():
    model = tiny_model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model


def result_of(check, model) -> tuple[str, str]:
    row = check(types.SimpleNamespace(model=model))
    return row.state, row.reason


@pytest.mark.parametrize("check", behaviour.CHECKS, ids=lambda check: check.row_name)
def test_a_valid_model_passes(check):
    assert result_of(check, valid_model())[0] == "pass"


def test_a_model_whose_most_probable_token_is_an_eos_token_stops_at_the_end():
    model = tiny_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits are equal, so the first token is chosen
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [0, 1], 2
    model.generation_config.do_sample = True
    for seed in range(20):
        torch.manual_seed(seed)
        assert result_of(behaviour.stops, model)[0] == "pass"


@pytest.mark.parametrize(
    "settings", [{"num_return_sequences": 2}, {"stop_strings": ["a"]}, {"repetition_penalty": 5.0}]
)
@pytest.mark.parametrize("check", behaviour.CHECKS[1:], ids=lambda check: check.row_name)
def test_settings_of_generation_do_not_affect_the_checks(check, settings):
    model = valid_model()
    model.generation_config.update(do_sample=True, **settings)
    assert result_of(check, model)[0] == "pass"
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())


def modify_forward(model, change) -> None:
    """Apply `change` to the keyword arguments of every forward pass."""
    original = model.forward

    def forward(*args, **kwargs):
        return original(*args, **change(kwargs))

    model.forward = forward


def test_cached_decoding_with_wrong_positions_is_detected():
    def restart_positions(kwargs):
        length = kwargs["input_ids"].shape[1]
        return {**kwargs, "position_ids": torch.arange(length)[None]}

    model = valid_model()
    modify_forward(model, restart_positions)
    state, reason = result_of(behaviour.cached_equals_uncached, model)
    assert state == "fail"
    assert "differ by" in reason


def test_a_model_that_attends_to_padding_is_detected():
    model = valid_model()
    original = model.model.forward
    model.model.forward = lambda *args, **kwargs: original(*args, **{**kwargs, "attention_mask": None})
    state, reason = result_of(behaviour.left_padded_equals_single, model)
    assert state == "fail"
    assert "logits of new token 1" in reason


def test_a_suppressed_or_missing_eos_token_is_detected():
    model = valid_model()
    model.generation_config.suppress_tokens = [0]
    assert result_of(behaviour.stops, model) == (
        "fail",
        "`generate` continues after token 0 with the settings of the folder",
    )
    model.generation_config.suppress_tokens = None
    model.generation_config.eos_token_id = None
    assert result_of(behaviour.stops, model)[0] == "fail"


def test_a_model_that_fails_with_several_beams_is_detected():
    model = valid_model()
    original = model.forward

    def forward(*args, **kwargs):
        if kwargs["input_ids"].shape[0] > 1:
            raise NotImplementedError("batch size 1 only")
        return original(*args, **kwargs)

    model.forward = forward
    assert result_of(behaviour.beams, model) == ("fail", "the model fails: NotImplementedError: batch size 1 only")


# -- loading, in this process -----------------------------------------------------------------------------------------


@pytest.fixture
def subject(broken) -> loading.LoadedFolder:
    return loading.LoadedFolder(broken.path)


def test_a_buffer_that_is_not_initialized_when_loading_is_detected(subject):
    assert loading.natively(subject).state == loading.with_the_package(subject).state == "pass"
    assert loading.meta_equals_plain(subject).state == "pass"
    subject.own.model.rotary_emb.inv_freq.mul_(2)  # like uninitialized memory
    row = loading.meta_equals_plain(subject)
    assert (row.state, row.reason) == ("fail", "different: model.rotary_emb.inv_freq")


def test_a_model_that_differs_from_its_twin_is_detected(broken):
    broken.json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    subject = loading.LoadedFolder(broken.path)
    subject.config = {**subject.config, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert loading.natively(subject).state == "pass"
    row = loading.with_the_package(subject)
    assert row.state == "fail"
    assert "from the native model's" in row.reason


def test_unexpected_weights_are_detected(broken):
    broken.tensors(lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    row = loading.natively(loading.LoadedFolder(broken.path))
    assert (row.state, row.reason) == ("fail", "loading failed: ValueError: unexpected: model.extra.weight")


def test_a_model_larger_than_the_memory_is_not_created(broken):
    broken.json("config.json", intermediate_size=9_000_000, hidden_size=900_000)
    row = loading.natively(loading.LoadedFolder(broken.path))
    assert row.state == "fail"
    assert "config.json defines 48," in row.reason


def test_a_tokenizer_that_loads_as_another_class_is_detected(broken: Broken):
    broken.json("tokenizer_config.json", tokenizer_class="GPT2Tokenizer")  # has another pre-tokenizer
    row = loading.tokenizer_loads(loading.LoadedFolder(broken.path))
    assert row.state == "fail"
    assert "differently from tokenizer.json" in row.reason


@pytest.mark.parametrize(
    "name, settings",
    [("tokenizer_config.json", {"additional_special_tokens": ["ab"]}), ("added_tokens.json", {"ab": 200})],
)
def test_a_text_that_is_made_a_token_by_another_file_than_the_tokenizer_is_detected(name, settings, broken: Broken):
    """It is encoded differently within a word, and omitted from decoded text if it is special."""
    if not (broken.path / name).exists():
        broken.write(name, "{}")
    broken.json(name, **settings)
    row = loading.tokenizer_loads(loading.LoadedFolder(broken.path))
    assert row.state == "fail"
    assert "makes 'ab' a token, which tokenizer.json does not" in row.reason


def test_a_tokenizer_that_splits_the_special_tokens_of_a_conversation_is_detected(broken: Broken):
    broken.json("tokenizer_config.json", split_special_tokens=True)
    row = loading.tokenizer_loads(loading.LoadedFolder(broken.path))
    assert row.state == "fail"
    assert "encodes '<|endoftext|><|pad|>' differently from tokenizer.json" in row.reason
    assert "split_special_tokens" in row.remedy
