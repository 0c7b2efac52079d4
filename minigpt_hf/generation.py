"""Any model folder + prompt -> text, through `AutoModelForCausalLM` alone.

In: a folder (or Hub id) of any causal LM, a prompt or none, and the options of transformers' `GenerationConfig`. Out: text,
as it is written. It refuses options that `generate` does not have,
and it never replaces `generate`.
"""

import copy
import difflib
import math
from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from .trust import checked_folder, loading


def load(folder: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub id, on the accelerator if there is one, ready to generate.

    Args:
        trust_remote_code: Whether to run code that other models bring along; a MiniGPT needs none of it here.

    Raises:
        ValueError: if there is no model there, it is incomplete, or it brings code that is not trusted.
    """
    path = checked_folder(folder, trust_remote_code)
    with loading(folder, trust_remote_code=trust_remote_code):
        model, report = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    with loading(folder, "tokenizer", trust_remote_code=trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if missing := sorted(map(str, report["missing_keys"])):  # transformers would fill them with random numbers
        raise ValueError(f"{folder}: its weights are incomplete: {missing[0]} and {len(missing) - 1} more are missing")
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    seed: int | None = None,
    special_tokens: bool = False,
    streamer: BaseStreamer | None = None,
    extra_options: Callable[[int, dict], dict] = lambda prompt_tokens, options: {},
    **options,
) -> list[str]:
    """Continue a prompt, or begin a document if there is none.

    Args:
        prompt: What the text starts with.
        seed: Makes sampling repeatable.
        special_tokens: Whether a prompt that spells a special token such as `<|endoftext|>` stands for that token; by
            default it is text, as in training.
        streamer: Shown the text while it is written (one sequence only).
        extra_options: Returns additional keyword arguments for `model.generate`, given the length of the prompt in
            tokens and `options`; see `fast.CompiledModel.generation_options`.
        options: Any attribute of `GenerationConfig`: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, …

    Returns:
        `num_return_sequences` texts, each with its prompt.

    Raises:
        ValueError: for an option that `GenerationConfig` does not have, a prompt that the tokenizer cannot encode, or
            sequences longer than the cache of a compiled model, or settings that generation is impossible with.
    """
    known = set(vars(GenerationConfig()))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"generation has no option {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
        if isinstance(options[name], float) and not math.isfinite(options[name]):
            raise ValueError(f"generation option {name} is {options[name]}: a finite number is required")
    try:
        copy.deepcopy(model.generation_config).update(**options)  # looks at them together with the model's own
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"generation options cannot be used: {error}") from error
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    if seed is not None:
        set_seed(seed)
    inputs = encode_prompt(tokenizer, prompt, special_tokens).to(model.device)
    check_ids(model, tokenizer, inputs.input_ids)
    options |= extra_options(inputs.input_ids.shape[1], options)
    # The Trainer turns the cache off while it trains; here it is what makes writing fast.
    try:
        sequences = model.generate(**inputs, streamer=streamer, **{"use_cache": True, **options})
    except ValueError:
        raise  # `generate` says what is wrong
    except Exception as error:  # settings of a wrong type or range, of which `generate` checks only some
        raise ValueError(
            f"no text can be generated with these options and the model's generation_config.json "
            f"({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}); change the options"
        ) from error
    return tokenizer.batch_decode(sequences, skip_special_tokens=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, special_tokens: bool = False) -> BatchEncoding:
    """Prompt -> `input_ids` and `attention_mask` [1, T]; the BOS token, which opens a document, if the prompt is empty.

    Args:
        special_tokens: Whether text that spells a special token stands for it. By default it is encoded as training encodes
            the same characters.
    """
    opening = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    if not prompt and opening is None:
        raise ValueError("this model's tokenizer has no token that opens a document: give a prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # the command line passes bytes that are not UTF-8 as lone surrogates
        raise ValueError(f"the prompt is not valid UTF-8 at position {error.start}: give it as UTF-8 text") from error
    split = bool(prompt) and not special_tokens
    try:
        return tokenizer(
            prompt or opening, return_tensors="pt", return_token_type_ids=False, split_special_tokens=split
        )
    except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
        vocabulary = tokenizer.get_vocab()
        for character in prompt:
            if character not in vocabulary:
                raise ValueError(
                    f"the prompt has a character that this model's tokenizer does not know: {character!r} "
                    f"(U+{ord(character):04X}); leave it out"
                ) from error
        raise ValueError(
            f"the prompt cannot be encoded by this model's tokenizer ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); give another prompt"
        ) from error


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
