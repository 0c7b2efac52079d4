"""Any model folder + prompt -> text, through `AutoModelForCausalLM` alone.

In: a folder (or Hub id) of any causal LM, a prompt or none, and the options of transformers' `GenerationConfig`. Out: text,
as it is written. It refuses options that `generate` does not have,
and it never replaces `generate`.
"""

import copy
import difflib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from .network import cache_alone_if_unreachable


def load(folder: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub id, on the accelerator if there is one, ready to generate.

    Args:
        trust_remote_code: Whether to run code that other models bring along; a MiniGPT needs none of it here.

    Raises:
        ValueError: if there is no model there, or it brings code that is not trusted.
    """
    try:
        with nullcontext() if Path(folder).is_dir() else cache_alone_if_unreachable():
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        if (Path(folder) / "model" / "config.json").is_file():
            raise ValueError(f"{folder}: this is a run; its model is in {Path(folder) / 'model'}") from error
        raise ValueError(
            f"{folder}: no model can be loaded from it ({str(error).splitlines()[0]}); give a model folder or a Hub id"
        ) from error
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    extra_options: Callable[[int, dict], dict] = lambda prompt_tokens, options: {},
    **options,
) -> list[str]:
    """Continue a prompt, or begin a document if there is none.

    Args:
        prompt: What the text starts with.
        seed: Makes sampling repeatable.
        streamer: Shown the text while it is written (one sequence only).
        extra_options: Returns additional keyword arguments for `model.generate`, given the length of the prompt in
            tokens and `options`; see `fast.CompiledModel.generation_options`.
        options: Any attribute of `GenerationConfig`: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, …

    Returns:
        `num_return_sequences` texts, each with its prompt.

    Raises:
        ValueError: for an option that `GenerationConfig` does not have, a prompt that the tokenizer cannot encode, or
            sequences longer than the cache of a compiled model.
    """
    known = set(vars(GenerationConfig()))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"generation has no option {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    try:
        copy.deepcopy(model.generation_config).update(**options)  # looks at them together with the model's own
    except TypeError as error:
        raise ValueError(f"generation options cannot be used: {error}") from error
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    if seed is not None:
        set_seed(seed)
    inputs = encode_prompt(tokenizer, prompt).to(model.device)
    check_ids(model, tokenizer, inputs.input_ids)
    options |= extra_options(inputs.input_ids.shape[1], options)
    # The Trainer turns the cache off while it trains; here it is what makes writing fast.
    sequences = model.generate(**inputs, streamer=streamer, **{"use_cache": True, **options})
    return tokenizer.batch_decode(sequences, skip_special_tokens=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str):
    """Prompt -> `input_ids` and `attention_mask` [1, T]; the end-of-text token, which opens a document, if it is empty."""
    opening = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    if not prompt and opening is None:
        raise ValueError("this model's tokenizer has no token that opens a document: give a prompt")
    try:
        return tokenizer(prompt or opening, return_tensors="pt", return_token_type_ids=False)
    except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
        vocabulary = tokenizer.get_vocab()
        for character in prompt:
            if character not in vocabulary:
                raise ValueError(
                    f"the prompt has a character that this model's tokenizer does not know: {character!r} "
                    f"(U+{ord(character):04X}); leave it out"
                ) from error
        raise


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> None:
    """Whether a model can take a prompt [1, T].

    Raises:
        ValueError: if it is as long as the context, or holds ids that the model does not have.
    """
    longest = model.config.max_position_embeddings
    if ids.shape[1] >= longest:
        raise ValueError(
            f"the prompt has {ids.shape[1]:,} tokens, and this model's context is {longest:,}: leave room for what it is to "
            "write"
        )
    if int(ids.max()) >= model.config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise ValueError(
            f"token {int(ids.max())} ({token!r}) of the prompt is beyond the vocabulary of this model "
            f"({model.config.vocab_size:,}): the tokenizer is not the one it was trained with"
        )
