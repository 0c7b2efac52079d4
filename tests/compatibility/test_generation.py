"""The generation features of transformers: each against the Qwen3 twin and against an independent computation."""

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
from tests.conftest import random_ids, representative, tiny_model

GREEDY = {"do_sample": False}
SAMPLE = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 4, "length_penalty": 0.8, **GREEDY}
STRATEGIES = {
    "greedy": GREEDY,
    "no cache": {"use_cache": False, **GREEDY},
    "sampling": SAMPLE,
    "temperature": {**SAMPLE, "temperature": 0.6},
    "top-k": {**SAMPLE, "top_k": 5},
    "top-p": {**SAMPLE, "top_p": 0.7},
    "min-p": {**SAMPLE, "min_p": 0.1},
    "typical": {**SAMPLE, "typical_p": 0.6},
    "beam search": BEAMS,
    "beam sampling": {**BEAMS, "do_sample": True},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.5},
    "no repeated bigrams": {**GREEDY, "no_repeat_ngram_size": 2},
    "several sequences": {**SAMPLE, "num_return_sequences": 3},
    "several beam hypotheses": {**BEAMS, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static", **GREEDY},
    "chunked prefill": {"prefill_chunk_size": 3, **GREEDY},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, **GREEDY},
}
NEW_TOKENS = 14


def generate(model, ids, seed: int = 0, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(ids, max_new_tokens=NEW_TOKENS, **options)


def greedy_reference(model, ids, steps: int = NEW_TOKENS) -> torch.Tensor:
    """Greedy decoding without a cache: one forward pass over the complete sequence per token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if (ids[:, -1] == model.config.eos_token_id).all():
            break
    return ids


# -- decoding strategies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_generates_the_tokens_of_the_twin(pair, strategy):
    model, twin = pair
    ids = random_ids(1, 12)
    options = STRATEGIES[strategy]
    assert torch.equal(generate(model, ids, **options), generate(twin, ids, **options))


@pytest.mark.parametrize("strategy", ["greedy", "no cache", "static cache", "chunked prefill", "prompt lookup"])
def test_greedy_decoding_is_independent_of_the_cache(pair, strategy):
    model, _ = pair
    ids = random_ids(1, 12)
    assert torch.equal(generate(model, ids, **STRATEGIES[strategy]), greedy_reference(model, ids))


def test_beam_search_over_the_vocabulary_finds_the_most_probable_bigram():
    """99 beams retain every first token, so two steps of beam search equal an exhaustive search."""
    model, ids = tiny_model(), random_ids(1, 6)
    options = {"num_beams": 99, "max_new_tokens": 2, "min_new_tokens": 2, "length_penalty": 0.0}
    found = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options, **GREEDY)
    firsts = torch.arange(1, 99)  # 0 is the EOS token, excluded by `min_new_tokens`
    first = model(ids).logits[0, -1].log_softmax(-1)[firsts]
    second = model(torch.cat([ids.expand(98, -1), firsts[:, None]], 1)).logits[:, -1].log_softmax(-1)[:, 1:]
    total = first[:, None] + second  # [98, 98]: the second token may not be EOS either
    best = divmod(total.argmax().item(), 98)
    assert found.sequences[0, -2:].tolist() == [best[0] + 1, best[1] + 1]
    torch.testing.assert_close(found.sequences_scores[0], total.max())


class ExcludeMostProbable(LogitsProcessor):
    """Exclude the most probable token."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -float("inf"))


def test_a_logits_processor_is_applied(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    processed = generate(model, ids, logits_processor=LogitsProcessorList([ExcludeMostProbable()]), **GREEDY)
    expected = ids
    while expected.shape[1] < processed.shape[1]:
        second = model(expected, use_cache=False).logits[:, -1].topk(2).indices[:, 1:]
        expected = torch.cat([expected, second], dim=1)
    assert torch.equal(processed, expected)


# -- stopping ----------------------------------------------------------------------------------------------------------


class StopAtToken(StoppingCriteria):
    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token_id


@pytest.fixture(scope="module")
def character_model():
    """A character-level model without an EOS token, a prompt, and its greedy continuation."""
    tokenizer = character_tokenizer(["abcdefghijklmnopqrstuvwxyz .,\n"])
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    ids = tokenizer("once upon", return_tensors="pt").input_ids
    return model, tokenizer, ids, generate(model, ids, **GREEDY)


def test_a_stopping_criterion_and_an_eos_token_end_generation(character_model):
    model, _, ids, complete = character_model
    token = complete[0, -4].item()
    end = complete[0, ids.shape[1] :].tolist().index(token) + ids.shape[1] + 1
    stopped = generate(model, ids, stopping_criteria=StoppingCriteriaList([StopAtToken(token)]), **GREEDY)
    assert torch.equal(stopped, complete[:, :end])
    assert torch.equal(generate(model, ids, eos_token_id=token, **GREEDY), complete[:, :end])


def test_a_stop_string_ends_generation_at_its_first_occurrence(character_model):
    model, tokenizer, ids, complete = character_model
    text = tokenizer.decode(complete[0, ids.shape[1] :])
    stop = text[9:12]
    stopped = tokenizer.decode(
        generate(model, ids, stop_strings=stop, tokenizer=tokenizer, **GREEDY)[0, ids.shape[1] :]
    )
    assert stopped == text[: text.index(stop) + len(stop)]


def test_the_eos_token_is_not_generated_before_min_new_tokens(character_model):
    model, _, ids, complete = character_model
    end = complete[0, ids.shape[1]].item()  # the first greedy token becomes the EOS token
    assert generate(model, ids, eos_token_id=end, **GREEDY).shape[1] == ids.shape[1] + 1
    continuation = generate(model, ids, eos_token_id=end, min_new_tokens=7, **GREEDY)[0, ids.shape[1] :]
    assert len(continuation) >= 7
    assert end not in continuation[:7]


def test_max_time_ends_generation_early(character_model):
    model, _, ids, complete = character_model

    class Slow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            time.sleep(0.05)
            return scores

    truncated = generate(model, ids, max_time=0.2, logits_processor=LogitsProcessorList([Slow()]), **GREEDY)
    # 0.2 s / 0.05 s = 4 steps, and the step that exceeds the limit.
    assert ids.shape[1] < truncated.shape[1] <= ids.shape[1] + 5
    assert torch.equal(truncated, complete[:, : truncated.shape[1]])


# -- streaming, additional outputs and inputs --------------------------------------------------------------------------


def test_a_streamer_receives_every_token_in_order(character_model):
    model, tokenizer, ids, complete = character_model

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    collect = Collect()
    generate(model, ids, streamer=collect, **GREEDY)
    assert (collect.tokens, collect.ended) == (complete[0].tolist(), True)
    text = TextIteratorStreamer(tokenizer, skip_prompt=True)
    generate(model, ids, streamer=text, **GREEDY)
    assert "".join(text) == tokenizer.decode(complete[0, ids.shape[1] :])


@pytest.mark.parametrize("window", [None, 8], ids=["full", "sliding"])
def test_generation_outputs_equal_those_of_one_forward_pass(window):
    model = tiny_model(use_sliding_window=window is not None, sliding_window=window, attn_implementation="eager")
    ids = random_ids(2, 6)
    output = generate(
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
    complete = model(output.sequences[:, :-1], use_cache=False, output_attentions=True, output_hidden_states=True)
    logits = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(logits, complete.logits[:, 5:], atol=1e-5, rtol=0)
    # The repetition penalty divides positive and multiplies negative logits of tokens in the context.
    in_context = nn.functional.one_hot(output.sequences[:, :-1], 99).cumsum(1)[:, 5:] > 0
    penalized = torch.where(logits > 0, logits / 1.3, logits * 1.3)
    torch.testing.assert_close(torch.stack(output.scores, dim=1), torch.where(in_context, penalized, logits))
    for step, layer in itertools.product(range(1, logits.shape[1]), range(2)):
        weights = output.attentions[step][layer][:, :, 0]  # the keys in the cache
        expected = complete.attentions[layer][:, :, 5 + step, : 6 + step][..., -weights.shape[-1] :]
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    for step, layer in itertools.product(range(1, logits.shape[1]), range(3)):
        hidden = output.hidden_states[step][layer][:, 0]
        torch.testing.assert_close(hidden, complete.hidden_states[layer][:, 5 + step], atol=1e-5, rtol=0)


def test_a_prompt_given_as_embeddings_generates_the_same_tokens(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    embedded = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(embedded, generate(model, ids, **GREEDY)[:, 12:])


# -- assisted decoding and caches --------------------------------------------------------------------------------------


def test_assisted_decoding_generates_the_greedy_tokens(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    for assistant in (tiny_model(num_hidden_layers=1, hidden_size=16), model):
        assert torch.equal(generate(model, ids, assistant_model=assistant, **GREEDY), greedy_reference(model, ids))


def test_early_exit_decoding_generates_the_greedy_tokens(pair):
    """Self-speculative decoding: the first layers draft (arXiv:2404.16710)."""
    for model in pair:
        ids, layers = random_ids(1, 12), model.config.num_hidden_layers
        assert torch.equal(generate(model, ids, assistant_early_exit=1, **GREEDY), greedy_reference(model, ids))
        assert model.config.num_hidden_layers == layers
        assert torch.equal(generate(model, ids, **GREEDY), greedy_reference(model, ids))


def test_generation_continues_from_a_returned_cache(pair):
    model, _ = pair
    ids = random_ids(1, 12)
    first = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW_TOKENS - 8, **GREEDY
    )
    assert torch.equal(rest, generate(model, ids, **GREEDY))


def test_a_sliding_cache_holds_only_its_window():
    model = tiny_model(use_sliding_window=True, sliding_window=8)
    cache = DynamicCache(config=model.config)
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    ids = random_ids(1, 30)
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split(5, dim=1)]
    assert cache.layers[0].keys.shape == (1, 2, 7, 8)  # the current token is the eighth of the window
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


def test_a_cache_can_be_cropped_and_reordered(pair):
    model, _ = pair
    ids, other, after = random_ids(2, 12), random_ids(2, 30)[:, -4:], random_ids(2, 1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # sliding layers retain tokens outside the window, for cropping
    model(torch.cat([ids, other], 1), past_key_values=cache)
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(after, past_key_values=cache).logits
    expected = model(torch.cat([ids[[1, 0]], after], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_a_static_cache_gives_the_logits_of_no_cache(pair):
    model, _ = pair
    ids, cache = random_ids(2, 20), StaticCache(config=model.config, max_cache_len=24)
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split([9, 1, 1, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


# -- batches -----------------------------------------------------------------------------------------------------------


# Prompt lookup supports a batch size of 1 only.
@pytest.mark.parametrize(
    "strategy",
    representative(
        [strategy for strategy in STRATEGIES if strategy != "prompt lookup"],
        *("greedy", "sampling", "beam search", "several sequences", "static cache", "chunked prefill"),
    ),
)
def test_a_left_padded_batch_generates_what_single_prompts_generate(pair, strategy):
    """Deterministic strategies: equal tokens. Sampling depends on the batch: equal scores of the first token."""
    model, _ = pair
    options = {"return_dict_in_generate": True, "output_scores": True, **STRATEGIES[strategy]}
    prompts = [random_ids(1, 30)[:, -length:] for length in (4, 9, 12)]
    pad = model.config.pad_token_id
    batch = torch.cat([nn.functional.pad(prompt, (12 - prompt.shape[1], 0), value=pad) for prompt in prompts])
    batched = generate(model, batch, attention_mask=(batch != pad).long(), **options)
    per_prompt = len(batched.sequences) // 3
    for row, prompt in enumerate(prompts):
        single = generate(model, prompt, **options)
        if not options["do_sample"]:
            continuation = batched.sequences[row * per_prompt : (row + 1) * per_prompt, 12:]
            expected = single.sequences[:, prompt.shape[1] :]
            length = expected.shape[1]
            assert torch.equal(continuation[:, :length], expected)
            assert (continuation[:, length:] == pad).all()
        beams = len(single.scores[0])
        scores = batched.scores[0][row * beams : (row + 1) * beams]
        torch.testing.assert_close(scores, single.scores[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "attention", ["eager", "sdpa"]
)  # continuous batching replaces them by `paged|eager` and `paged|sdpa`
@pytest.mark.parametrize("window", [None, 8], ids=["full", "sliding"])
def test_continuous_batching_generates_the_greedy_tokens(attention, window):
    model = tiny_model(attn_implementation=attention, use_sliding_window=window is not None, sliding_window=window)
    prompts = [random_ids(1, 30)[0, -length:].tolist() for length in (4, 9, 12)]
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=0, pad_token_id=1, **GREEDY)
    paged = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=paged)
    requests = sorted(outputs, key=lambda name: int(name.split("_")[-1]))
    expected = [generate(model, torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist() for prompt in prompts]
    assert [outputs[request].generated_tokens for request in requests] == expected


def test_the_model_overrides_no_method_of_generation_mixin():
    names = {name for name in vars(GenerationMixin) if not name.startswith("__")}
    for cls in MiniGPTForCausalLM.__mro__[: MiniGPTForCausalLM.__mro__.index(GenerationMixin)]:
        if cls.__module__.startswith("minigpt_hf"):
            assert names & set(vars(cls)) == set(), cls
