"""The model, compared with references, identities and manual calculations."""

import math

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.model.modeling_minigpt import MiniGPTRMSNorm, apply_rotary_pos_emb, repeat_kv, rotate_half
from tests.conftest import random_ids, tiny_config, tiny_model

ATTENTION = ["eager", "sdpa"]


# -- modules ----------------------------------------------------------------------------------------------------------


def test_rms_norm_equals_torch():
    norm, reference, x = MiniGPTRMSNorm(32, eps=1e-6), nn.RMSNorm(32, eps=1e-6), torch.randn(2, 5, 32)
    norm.weight.data.normal_()
    reference.weight.data.copy_(norm.weight.data)
    torch.testing.assert_close(norm(x), reference(x))


def test_rotate_half_rotates_each_pair_by_90_degrees():
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3.0, -4.0, 1.0, 2.0]


def test_scores_with_rope_depend_only_on_the_distance():
    rotary = tiny_model().model.rotary_emb
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query_position: int, key_position: int) -> float:
        rotated_query, _ = apply_rotary_pos_emb(query, query, *rotary(query, torch.tensor([[query_position]])))
        _, rotated_key = apply_rotary_pos_emb(key, key, *rotary(key, torch.tensor([[key_position]])))
        return (rotated_query * rotated_key).sum().item()

    assert score(7, 3) == pytest.approx(score(24, 20), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_repeat_kv_repeats_each_head_for_its_group():
    x = torch.arange(2.0).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    assert repeat_kv(x, 2)[0, :, 0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


# -- forward pass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_is_causal(attention):
    model, ids = tiny_model(attn_implementation=attention), random_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = random_ids(1, 30)[0, -8:]
    assert torch.equal(model(ids).logits[:, :12], model(changed).logits[:, :12])
    assert not torch.equal(model(ids).logits[:, 12:], model(changed).logits[:, 12:])


@pytest.mark.parametrize("tied", [True, False])
def test_the_initial_loss_is_that_of_a_uniform_distribution(tied):
    model, ids = MiniGPTForCausalLM(tiny_config(tie_word_embeddings=tied)), random_ids(8, 32)
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(99), abs=0.1)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("window", [None, 8])
def test_cached_equals_uncached(attention, window):
    model = tiny_model(attn_implementation=attention, use_sliding_window=window is not None, sliding_window=window)
    ids, cache, logits = random_ids(2, 24), DynamicCache(config=model.config), []
    for chunk in ids.split([9, 1, 1, 5, 8], dim=1):
        logits.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_left_padded_batch_equals_single_sequences(attention):
    model, ids = tiny_model(attn_implementation=attention), random_ids(1, 12)
    padded = torch.cat([torch.full((1, 5), model.config.pad_token_id), ids], dim=1)
    batch = torch.cat([padded, random_ids(1, 17)])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0, 5:], model(ids).logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1:], model(batch[1:]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("window", [None, 8])
def test_a_document_does_not_attend_to_the_previous_one(attention, window):
    model = tiny_model(attn_implementation=attention, use_sliding_window=window is not None, sliding_window=window)
    ids = random_ids(1, 20)
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    changed = ids.clone()
    changed[0, :9] = random_ids(1, 29)[0, -9:]
    assert torch.equal(model(changed, position_ids=positions, use_cache=False).logits[:, 9:], packed[:, 9:])
    torch.testing.assert_close(packed[:, 9:], model(ids[:, 9:]).logits, atol=1e-5, rtol=0)


def test_sliding_attention_equals_full_attention_within_the_window():
    full, sliding = tiny_model(), tiny_model(use_sliding_window=True, sliding_window=17)
    ids = random_ids(2, 40)
    assert torch.equal(full(ids[:, :16]).logits, sliding(ids[:, :16]).logits)
    assert not torch.allclose(full(ids).logits, sliding(ids).logits, atol=1e-3)


@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_implementations_agree(attention):
    ids = random_ids(2, 20)
    reference = tiny_model(attn_implementation="eager")(ids).logits
    torch.testing.assert_close(tiny_model(attn_implementation=attention)(ids).logits, reference, atol=1e-5, rtol=0)


def test_inputs_embeds_and_logits_to_keep_give_the_same_logits():
    model, ids = tiny_model(), random_ids(2, 10)
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, logits)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    positions = torch.tensor([1, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=positions).logits, logits[:, positions])
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, ids = tiny_model(), random_ids(2, 10)
    output = model(ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    labels = random_ids(2, 11)[:, 1:].contiguous()
    summed = model(ids, labels=ids, shift_labels=labels, num_items_in_batch=5).loss
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum") / 5
    torch.testing.assert_close(summed, expected)


def test_hidden_states_and_attentions_are_returned():
    model, ids = tiny_model(attn_implementation="eager"), random_ids(2, 10)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 10, 32)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 10, 10)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 10))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


# -- Qwen3 twin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_loads_the_unchanged_weights_and_gives_bit_identical_logits(tied, kv_heads, window, attention, tmp_path):
    model = tiny_model(
        tie_word_embeddings=tied,
        num_key_value_heads=kv_heads,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=1,
        attn_implementation=attention,
    )
    model.save_pretrained(tmp_path)
    config = model.config.to_dict()
    shared = {name: config[name] for name in Qwen3Config().to_dict() if name in config and name != "model_type"}
    qwen3, report = Qwen3ForCausalLM.from_pretrained(
        tmp_path, config=Qwen3Config(**shared), attn_implementation=attention, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = random_ids(2, 40)
    assert torch.equal(qwen3(ids).logits, model(ids).logits)
    assert torch.equal(
        qwen3.generate(ids[:1, :5], max_new_tokens=30, do_sample=False),
        model.generate(ids[:1, :5], max_new_tokens=30, do_sample=False),
    )


# -- initialization ---------------------------------------------------------------------------------------------------


def test_initial_weights_have_the_documented_distributions():
    """Each row of the table in the docstring of MiniGPTPreTrainedModel, with r = 0.05 and L = 2."""
    model = MiniGPTForCausalLM(
        tiny_config(vocab_size=4000, hidden_size=256, head_dim=64, tie_word_embeddings=False, initializer_range=0.05)
    )
    modules = set()
    for name, weight in model.named_parameters():
        module = name.split(".")[-2]
        modules.add(module)
        if "norm" in module:
            assert (weight == 1).all(), name
            continue
        if module == "embed_tokens":
            assert not weight[model.config.pad_token_id].any()
        expected = 0.05 / 2 if module in ("o_proj", "down_proj") else 0.05
        assert weight.mean().item() == pytest.approx(0, abs=2e-3), name
        assert weight.std().item() == pytest.approx(expected, rel=0.03), name
    projections = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head"
    norms = "norm q_norm k_norm input_layernorm post_attention_layernorm"
    assert modules == {*projections.split(), *norms.split()}


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding_dropout", "residual_dropout", "attention_dropout"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_each_dropout_is_active_only_in_training(name, attention):
    model, ids = tiny_model(**{name: 0.5}, attn_implementation=attention), random_ids(2, 20)
    expected = tiny_model(attn_implementation=attention)(ids).logits
    assert torch.equal(model.eval()(ids).logits, expected)
    assert not torch.allclose(model.train()(ids).logits, expected, atol=1e-2)


def test_a_training_step_changes_every_parameter():
    model, ids = MiniGPTForCausalLM(tiny_config(tie_word_embeddings=False)).train(), random_ids(8, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    unchanged = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert unchanged == []
