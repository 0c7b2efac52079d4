"""Every way of generating that transformers has: each against the twin, and against a computation done another way."""

import itertools
import time

import pytest
import torch
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.tokenizer import character_tokenizer
from tests.conftest import random_ids, tiny_model

GREEDY = {"do_sample": False}
SAMPLE = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 4, "length_penalty": 0.8, **GREEDY}
WAYS = {
    "greedy": GREEDY,
    "no cache": {"use_cache": False, **GREEDY},
    "sampling": SAMPLE,
    "temperature": {**SAMPLE, "temperature": 0.6},
    "top-k": {**SAMPLE, "top_k": 5},
    "top-p": {**SAMPLE, "top_p": 0.7},
    "min-p": {**SAMPLE, "min_p": 0.1},
    "typical": {**SAMPLE, "typical_p": 0.6},
    "beams": BEAMS,
    "beam sampling": {**BEAMS, "do_sample": True},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.5},
    "no repeated pairs": {**GREEDY, "no_repeat_ngram_size": 2},
    "several sequences": {**SAMPLE, "num_return_sequences": 3},
    "several beams": {**BEAMS, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static", **GREEDY},
    "chunked prefill": {"prefill_chunk_size": 3, **GREEDY},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, **GREEDY},
}
NEW = 14


def written(model, ids, seed: int = 0, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(ids, max_new_tokens=NEW, **options)


def step_by_step(model, ids, steps: int = NEW) -> torch.Tensor:
    """Greedy decoding written out, the whole text anew for every token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if (ids[:, -1] == model.config.eos_token_id).all():
            break
    return ids


# -- choosing the next token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing_writes_what_the_twin_writes(pair, way):
    model, twin = pair
    ids = random_ids(1, 12)
    assert torch.equal(written(model, ids, **WAYS[way]), written(twin, ids, **WAYS[way]))


@pytest.mark.parametrize("way", ["greedy", "no cache", "static cache", "chunked prefill", "prompt lookup"])
def test_greedy_takes_the_likeliest_token_whatever_the_cache(pair, way):
    model, _ = pair
    ids = random_ids(1, 12)
    assert torch.equal(written(model, ids, **WAYS[way]), step_by_step(model, ids))


def test_beams_as_wide_as_the_vocabulary_find_the_likeliest_pair_of_all():
    """99 beams hold every first token, so nothing is cut: the result is that of trying all 98 · 99 pairs."""
    model, ids = tiny_model(), random_ids(1, 6)
    wide = {"num_beams": 99, "max_new_tokens": 2, "min_new_tokens": 2, "length_penalty": 0.0}
    found = model.generate(ids, return_dict_in_generate=True, output_scores=True, **wide, **GREEDY)
    firsts = torch.arange(1, 99)  # 0 ends the text, and `min_new_tokens` forbids it
    first = model(ids).logits[0, -1].log_softmax(-1)[firsts]
    second = model(torch.cat([ids.expand(98, -1), firsts[:, None]], 1)).logits[:, -1].log_softmax(-1)[:, 1:]
    total = first[:, None] + second  # [98, 98]: the second may not be 0 either
    best = divmod(total.argmax().item(), 98)
    assert found.sequences[0, -2:].tolist() == [best[0] + 1, best[1] + 1]
    torch.testing.assert_close(found.sequences_scores[0], total.max())


class Forbid(LogitsProcessor):
    """The likeliest token may not be taken."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -float("inf"))


def test_a_logits_processor_has_its_way(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    processed = written(model, ids, logits_processor=LogitsProcessorList([Forbid()]), **GREEDY)
    expected = ids
    while expected.shape[1] < processed.shape[1]:
        second = model(expected, use_cache=False).logits[:, -1].topk(2).indices[:, 1:]
        expected = torch.cat([expected, second], dim=1)
    assert torch.equal(processed, expected)


# -- stopping -----------------------------------------------------------------------------------------------------------


class Until(StoppingCriteria):
    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token_id


@pytest.fixture(scope="module")
def lettered():
    """A model whose tokens are letters, and what it writes when nothing stops it."""
    tokenizer = character_tokenizer(["abcdefghijklmnopqrstuvwxyz .,\n"])
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    ids = tokenizer("once upon", return_tensors="pt").input_ids
    return model, tokenizer, ids, written(model, ids, **GREEDY)


def test_a_stopping_criterion_and_an_end_of_text_end_at_their_token(lettered):
    model, _, ids, whole = lettered
    token = whole[0, -4].item()
    end = whole[0, ids.shape[1] :].tolist().index(token) + ids.shape[1] + 1
    stopped = written(model, ids, stopping_criteria=StoppingCriteriaList([Until(token)]), **GREEDY)
    assert torch.equal(stopped, whole[:, :end])
    assert torch.equal(written(model, ids, eos_token_id=token, **GREEDY), whole[:, :end])


def test_a_stop_string_ends_the_text_at_its_first_occurrence(lettered):
    model, tokenizer, ids, whole = lettered
    text = tokenizer.decode(whole[0, ids.shape[1] :])
    stop = text[9:12]
    stopped = tokenizer.decode(written(model, ids, stop_strings=stop, tokenizer=tokenizer, **GREEDY)[0, ids.shape[1] :])
    assert stopped == text[: text.index(stop) + len(stop)]


def test_an_end_of_text_is_not_written_before_min_new_tokens(lettered):
    model, _, ids, whole = lettered
    end = whole[0, ids.shape[1]].item()  # what it would write first now ends the text
    assert written(model, ids, eos_token_id=end, **GREEDY).shape[1] == ids.shape[1] + 1
    longer = written(model, ids, eos_token_id=end, min_new_tokens=7, **GREEDY)[0, ids.shape[1] :]
    assert len(longer) >= 7
    assert end not in longer[:7]


def test_max_time_ends_a_text_early(lettered):
    model, _, ids, whole = lettered

    class Slow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            time.sleep(0.05)
            return scores

    cut = written(model, ids, max_time=0.2, logits_processor=LogitsProcessorList([Slow()]), **GREEDY)
    assert ids.shape[1] < cut.shape[1] <= ids.shape[1] + 5  # 4 steps of 0.05 s, and the one in which time runs out
    assert torch.equal(cut, whole[:, : cut.shape[1]])


# -- what comes along ---------------------------------------------------------------------------------------------------


def test_a_streamer_gets_every_token_in_order(lettered):
    model, tokenizer, ids, whole = lettered

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    collect = Collect()
    written(model, ids, streamer=collect, **GREEDY)
    assert (collect.tokens, collect.ended) == (whole[0].tolist(), True)
    text = TextIteratorStreamer(tokenizer, skip_prompt=True)
    written(model, ids, streamer=text, **GREEDY)
    assert "".join(text) == tokenizer.decode(whole[0, ids.shape[1] :])


@pytest.mark.parametrize("window", [None, 8], ids=["full", "sliding"])
def test_scores_logits_attentions_and_hidden_states_are_those_of_one_forward_pass(window):
    model = tiny_model(use_sliding_window=window is not None, sliding_window=window, attn_implementation="eager")
    ids = random_ids(2, 6)
    told = written(
        model,
        ids,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
        repetition_penalty=1.3,
        **GREEDY,
    )
    whole = model(told.sequences[:, :-1], use_cache=False, output_attentions=True, output_hidden_states=True)
    logits = torch.stack(told.logits, dim=1)
    torch.testing.assert_close(logits, whole.logits[:, 5:], atol=1e-5, rtol=0)
    # The penalty divides what is positive and multiplies what is negative, for the tokens that were there.
    seen = nn.functional.one_hot(told.sequences[:, :-1], 99).cumsum(1)[:, 5:] > 0
    penalised = torch.where(logits > 0, logits / 1.3, logits * 1.3)
    torch.testing.assert_close(torch.stack(told.scores, dim=1), torch.where(seen, penalised, logits))
    for step, layer in itertools.product(range(1, logits.shape[1]), range(2)):
        last = told.attentions[step][layer][:, :, 0]  # the keys that the cache held
        row = whole.attentions[layer][:, :, 5 + step, : 6 + step][..., -last.shape[-1] :]
        torch.testing.assert_close(last, row, atol=1e-5, rtol=0)
    for step, layer in itertools.product(range(1, logits.shape[1]), range(3)):
        hidden = told.hidden_states[step][layer][:, 0]
        torch.testing.assert_close(hidden, whole.hidden_states[layer][:, 5 + step], atol=1e-5, rtol=0)


def test_the_first_token_is_drawn_from_the_prompt_as_embeddings_too(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    embedded = written(model, None, inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(embedded, written(model, ids, **GREEDY)[:, 12:])


# -- helpers and caches -------------------------------------------------------------------------------------------------


def test_a_smaller_minigpt_assists_without_a_change_in_the_text(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    for assistant in (tiny_model(num_hidden_layers=1, hidden_size=16), model):
        assert torch.equal(written(model, ids, assistant_model=assistant, **GREEDY), step_by_step(model, ids))


def test_a_text_goes_on_from_its_cache(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    first = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 8, **GREEDY)
    assert torch.equal(rest, written(model, ids, **GREEDY))


def test_a_sliding_cache_holds_no_more_than_its_window():
    model = tiny_model(use_sliding_window=True, sliding_window=8)
    cache = DynamicCache(config=model.config)
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    ids = random_ids(1, 30)
    logits = [model(part, past_key_values=cache).logits for part in ids.split(5, dim=1)]
    assert cache.layers[0].keys.shape == (1, 2, 7, 8)  # the token at hand is the eighth
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


def test_a_cropped_cache_has_forgotten_and_a_reordered_one_has_swapped(pair):
    model, _ = pair
    ids, other, after = random_ids(2, 12), random_ids(2, 30)[:, -4:], random_ids(2, 1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # a window keeps what it has slid past
    model(torch.cat([ids, other], 1), past_key_values=cache)
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(after, past_key_values=cache).logits
    expected = model(torch.cat([ids[[1, 0]], after], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_static_cache_of_fixed_size_scores_as_no_cache_does(pair):
    model, _ = pair
    ids, cache = random_ids(2, 20), StaticCache(config=model.config, max_cache_len=24)
    logits = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


# -- several texts at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in WAYS if way != "prompt lookup"])  # that one takes one text at a time
def test_left_padded_texts_are_written_as_single_ones_are(pair, way):
    """Greedy ways: the same tokens. Drawing uses up random numbers: there, the scores that are drawn from."""
    model, _ = pair
    options = {"return_dict_in_generate": True, "output_scores": True, **WAYS[way]}
    texts = [random_ids(1, 30)[:, -length:] for length in (4, 9, 12)]
    pad = model.config.pad_token_id
    batch = torch.cat([nn.functional.pad(text, (12 - text.shape[1], 0), value=pad) for text in texts])
    together = written(model, batch, attention_mask=(batch != pad).long(), **options)
    per_text = len(together.sequences) // 3
    for row, text in enumerate(texts):
        alone = written(model, text, **options)
        mine = slice(row * per_text, (row + 1) * per_text)
        if not options["do_sample"]:
            ours = together.sequences[mine, 12:]
            single = alone.sequences[:, text.shape[1] :]
            length = single.shape[1]
            assert torch.equal(ours[:, :length], single)
            assert (ours[:, length:] == pad).all()
        beams = len(alone.scores[0])
        scores = together.scores[0][row * beams : (row + 1) * beams]
        torch.testing.assert_close(scores, alone.scores[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])  # which it turns into `paged|eager` and `paged|sdpa`
@pytest.mark.parametrize("window", [None, 8], ids=["full", "sliding"])
def test_continuous_batching_writes_what_generate_writes(attention, window):
    model = tiny_model(attn_implementation=attention, use_sliding_window=window is not None, sliding_window=window)
    texts = [random_ids(1, 30)[0, -length:].tolist() for length in (4, 9, 12)]
    settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=0, pad_token_id=1, **GREEDY)
    paged = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    answers = model.generate_batch(texts, generation_config=settings, continuous_batching_config=paged)
    ours = [answers[request].generated_tokens for request in sorted(answers, key=lambda name: int(name.split("_")[-1]))]
    single = [written(model, torch.tensor([text]), **GREEDY)[0, len(text) :].tolist() for text in texts]
    assert ours == single


def test_nothing_of_generation_is_overridden():
    names = {name for name in vars(GenerationMixin) if not name.startswith("__")}
    for cls in MiniGPTForCausalLM.__mro__[: MiniGPTForCausalLM.__mro__.index(GenerationMixin)]:
        if cls.__module__.startswith("minigpt_hf"):
            assert names & set(vars(cls)) == set(), cls
