"""Any model folder + prompt -> text, through `AutoModelForCausalLM` alone.

In: a folder (or Hub id) of any causal LM, a prompt or none, and the options of transformers' `GenerationConfig`. Out: text,
as it is written. It refuses options that `generate` does not have,
and it never replaces `generate`.
"""

import copy
import difflib
import logging
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..data.tokenizer import unknown_character_error
from ..errors import MiniGPTError
from ..trust import checked_folder, loading

logger = logging.getLogger(__name__)

CAUSAL_LMS = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), "MiniGPTForCausalLM"}
BOOLEANS = {
    *("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states"),
}


def load(folder: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub id, on the accelerator if there is one, ready to generate.

    Args:
        trust_remote_code: Whether to run code that other models bring along; a MiniGPT needs none of it here.

    Raises:
        MiniGPTError: if there is no model there, it is incomplete, or it brings code that is not trusted.
    """
    path = checked_folder(folder, trust_remote_code)
    with loading(folder, trust_remote_code=trust_remote_code):
        model, report = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    with loading(folder, "tokenizer", trust_remote_code=trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    architectures = model.config.architectures or [type(model).__name__]
    if not trust_remote_code and not any(name in CAUSAL_LMS for name in architectures):
        raise MiniGPTError(
            f"{folder}: a {architectures[0]}, which is not a causal language model: its predictions of a token depend on "
            "the token itself; give a causal language model"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise MiniGPTError(
                f"{folder}: its weights are not finite ({name}); give a model that was trained without errors"
            )
    if unexpected := sorted(map(str, report["unexpected_keys"])):
        what = f"{len(unexpected)} tensors that the model does not have are ignored ({unexpected[0]}, …)"
        logger.warning("%s: %s", folder, what)
    if missing := sorted(map(str, report["missing_keys"])):  # transformers would fill them with random numbers
        raise MiniGPTError(
            f"{folder}: its weights are incomplete: {missing[0]} and {len(missing) - 1} more are missing"
        )
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
        MiniGPTError: for an option that `GenerationConfig` does not have, a prompt that the tokenizer cannot encode, or
            sequences longer than the cache of a compiled model, or settings that generation is impossible with.
    """
    if not isinstance(prompt, str):
        raise MiniGPTError(f"the prompt is a {type(prompt).__name__}: text is required")
    known = set(vars(GenerationConfig()))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise MiniGPTError(f"generation has no option {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
        if name in BOOLEANS and not isinstance(options[name], bool):
            raise MiniGPTError(f"generation option {name} is {options[name]!r}: true or false is required")
        if name == "return_dict_in_generate":
            raise MiniGPTError("generation option return_dict_in_generate is not available: texts are returned")
        if isinstance(options[name], float) and not math.isfinite(options[name]):
            raise MiniGPTError(f"generation option {name} is {options[name]}: a finite number is required")
    try:
        copy.deepcopy(model.generation_config).update(**options)  # looks at them together with the model's own
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MiniGPTError(f"generation options cannot be used: {error}") from error
    if options.get("stop_strings") is not None or model.generation_config.stop_strings:
        options["tokenizer"] = tokenizer
    if seed is not None:
        set_seed(seed)
    inputs = encode_prompt(tokenizer, prompt, special_tokens).to(model.device)
    check_ids(model, tokenizer, inputs.input_ids)
    options |= extra_options(inputs.input_ids.shape[1], options)
    # The Trainer disables the cache during training; generation needs it to be fast.
    options = {"use_cache": True, **options, "return_dict_in_generate": False}
    try:
        sequences = model.generate(**inputs, streamer=streamer, **options)
    except MiniGPTError:
        raise
    except ValueError as error:  # `generate` says what is wrong
        raise MiniGPTError(str(error)) from error
    except Exception as error:  # settings of a wrong type or range, of which `generate` checks only some
        raise MiniGPTError(
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
        raise MiniGPTError("this model's tokenizer has no token that opens a document: give a prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # the command line passes bytes that are not UTF-8 as lone surrogates
        raise MiniGPTError(f"the prompt is not valid UTF-8 at position {error.start}: give it as UTF-8 text") from error
    split = bool(prompt) and not special_tokens
    try:
        return tokenizer(
            prompt or opening, return_tensors="pt", return_token_type_ids=False, split_special_tokens=split
        )
    except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
        if unknown := unknown_character_error(prompt, tokenizer.get_vocab(), "the prompt"):
            raise unknown from error
        raise MiniGPTError(
            f"the prompt cannot be encoded by this model's tokenizer ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); give another prompt"
        ) from error


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> None:
    """Whether a model can take a prompt [1, T].

    Raises:
        MiniGPTError: if it is as long as the context, or holds ids that the model does not have.
    """
    longest = getattr(model.config, "max_position_embeddings", None)  # ALiBi and state space models have no limit
    if longest is not None and ids.shape[1] >= longest:
        raise MiniGPTError(
            f"the prompt has {ids.shape[1]:,} tokens, and this model's context is {longest:,}: leave room for what it is to "
            "write"
        )
    if int(ids.max()) >= model.config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise MiniGPTError(
            f"token {int(ids.max())} ({token!r}) of the prompt is beyond the vocabulary of this model "
            f"({model.config.vocab_size:,}): the tokenizer is not the one it was trained with"
        )
