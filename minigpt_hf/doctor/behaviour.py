"""Checks of a loaded model: the cache, padding and beam search do not change the logits, and generation stops.

The model is in float32 and of any architecture; token ids are drawn with a fixed seed. The tolerance is relative to the
largest logit, since each computation adds its terms in another order.
"""

from typing import Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .row import NotApplicable, Row, check, failed, passed

TOLERANCE = 1e-4  # relative to the largest logit: float32 precision, 6e-8, times 1,000 for sums in another order
NEW = 4  # tokens to generate
REMEDY = "correct the model's code: "


class Subject(Protocol):
    """An object with a model; the attribute raises `NotApplicable` if no model could be loaded."""

    model: PreTrainedModel


def prompt(model: PreTrainedModel, length: int | None = None) -> torch.Tensor:
    """Token ids [1, T]; by default longer than a small sliding window, and never longer than the model supports."""
    settings = model.config.to_dict()
    window = settings.get("sliding_window") or 0
    longest = settings.get("max_position_embeddings") or settings.get("n_positions") or 64
    wanted = length or max(24, window + 8 if window <= 512 else 0)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, max(2, min(wanted, longest - NEW))), generator=generator)


def _relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Maximum difference of the logits, relative to the largest logit."""
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


def _pad(model: PreTrainedModel) -> int:
    ids = (model.generation_config.pad_token_id, model.config.pad_token_id)
    return next((number for number in ids if number is not None), 0)


def _greedy(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **options):
    configured = model.generation_config
    config = GenerationConfig(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        eos_token_id=configured.eos_token_id,
        pad_token_id=_pad(model),
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    model.generation_config = config  # as an argument, it would be completed with the settings of the folder
    try:
        return model.generate(input_ids=ids, attention_mask=mask)
    finally:
        model.generation_config = configured


@check("cached = uncached", "the model fails")
def cached_equals_uncached(subject: Subject) -> Row:
    model = subject.model
    ids, cache, parts = prompt(model), None, []
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for part in ids.split([ids.shape[1] - 3, 1, 1, 1], dim=1):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    if cache is None:
        raise NotApplicable("the model has no cache")
    distance = _relative_difference(torch.cat(parts, dim=1), whole)
    if not distance <= TOLERANCE:
        return failed(f"logits differ by {distance:.2g}", REMEDY + "positions and masks must include the cached tokens")
    return passed(f"logits within {distance:.1g}")


@check("left-padded = single", "the model fails")
def left_padded_equals_single(subject: Subject) -> Row:
    model = subject.model
    long = prompt(model, 24)
    single = long[:, : long.shape[1] // 2]
    padding = torch.full((1, long.shape[1] - single.shape[1]), _pad(model))
    batch = torch.cat([torch.cat([padding, single], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, : padding.shape[1]] = 0
    alone, padded = _greedy(model, single, torch.ones_like(single)), _greedy(model, batch, mask)
    for step in range(NEW):
        distance = _relative_difference(padded.logits[step][0], alone.logits[step][0])
        if not distance <= TOLERANCE:
            return failed(
                f"logits of new token {step + 1} differ by {distance:.2g}",
                REMEDY + "use the given `attention_mask` and `position_ids`",
            )
        if padded.sequences[0, long.shape[1] + step] != alone.sequences[0, single.shape[1] + step]:
            break  # two tokens have equal scores: the texts may differ from here on
    return passed("a left-padded text has the logits of the single text")


@check("beams", "the model fails")
def beams(subject: Subject) -> Row:
    model = subject.model
    ids = prompt(model, 12)
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = _greedy(model, ids, torch.ones_like(ids), **options).sequences
    if found.shape != (2, ids.shape[1] + NEW) or torch.equal(found[0], found[1]):
        return failed(f"two of three beams have shape {tuple(found.shape)}", REMEDY + "reorder the cache")
    return passed("two of three beams, of full length")


class EndAt(LogitsProcessor):
    """Makes EOS tokens impossible below a given length, and from there on the first one the most probable token, unless it
    is suppressed."""

    def __init__(self, ends: list[int], length: int):
        self.ends, self.length = ends, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            scores[:, self.ends[0]] += 1e9
        else:
            scores[:, self.ends] = -torch.inf
        return scores


@check("stops at the end", "the model fails")
def stops(subject: Subject) -> Row:
    model = subject.model
    ends = model.generation_config.eos_token_id
    if ends is None:
        return failed(
            "generation_config.json has no eos_token_id, so generation never stops before the limit", "set it"
        )
    ends, ids = (ends if isinstance(ends, list) else [ends]), prompt(model, 12)
    processors = LogitsProcessorList([EndAt(ends, ids.shape[1] + 1)])
    options = {"max_new_tokens": 8, "num_beams": 1, "num_return_sequences": 1, "do_sample": False, "stop_strings": None}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **options)
    if found.shape[1] != ids.shape[1] + 2:
        return failed(
            f"`generate` continues after token {ends[0]} with the settings of the folder",
            "correct generation_config.json: eos_token_id, min_length, suppress_tokens",
        )
    return passed(f"`generate` stops at token {ends[0]}")


CHECKS = (cached_equals_uncached, left_padded_equals_single, beams, stops)
