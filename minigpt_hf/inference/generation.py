"""Load any causal LM and generate text with transformers' own `generate`, after validating prompt and options."""

import copy
import difflib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..data.chat_format import CHAT_TEMPLATE, ChatFormat, Message
from ..data.encoding import unknown_character_error
from ..data.tokenizer import tokenizer_mismatch
from ..errors import MiniGPTError
from ..trust import checked_folder, loading

logger = logging.getLogger(__name__)

Prompt = str | list[Message]
CAUSAL_LMS = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), "MiniGPTForCausalLM"}
BOOLEANS = {
    *("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states"),
}


FLOATS = {"temperature", "repetition_penalty"}  # transformers rejects integers
NOT_CAUSAL = (
    "is not a causal language model, so its scores and texts would be meaningless; give a causal language model"
)
# Options of sampling, without effect if the most probable token is chosen.
SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Options of group beam search, of contrastive search, of an earlier beam search, of other architectures, of `generate`
# without a prompt, and of an assistant with another tokenizer.
WITHOUT_EFFECT = (
    *("diversity_penalty", "num_beam_groups", "penalty_alpha", "low_memory", "decoder_start_token_id", "bos_token_id"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
)
# Options that have an effect only with another one.
REQUIRED = {
    "max_matching_ngram_size": "prompt_lookup_num_tokens",
    "num_assistant_tokens": "assistant_early_exit",
    "num_assistant_tokens_schedule": "assistant_early_exit",
    "assistant_confidence_threshold": "assistant_early_exit",
}


def load(folder: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer of a folder or Hub id in evaluation mode, on the accelerator if there is one.

    Args:
        trust_remote_code: Run the code in the repository; not needed for MiniGPT models.

    Raises:
        MiniGPTError: if there is no causal LM, its weights are incomplete or not finite, or its code is not trusted.
    """
    path = checked_folder(folder, trust_remote_code)
    with loading(folder, trust_remote_code=trust_remote_code):
        model, report = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    with loading(folder, "tokenizer", trust_remote_code=trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if mismatch := tokenizer_mismatch(model.config, tokenizer):
        logger.warning("%s: %s", folder, mismatch)
    architectures = model.config.architectures or [type(model).__name__]
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise MiniGPTError(f"{folder}: architectures in config.json is {architectures!r}, not a list of names")
    if not trust_remote_code and not any(name in CAUSAL_LMS for name in architectures):
        raise MiniGPTError(f"{folder}: {architectures[0]} {NOT_CAUSAL}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise MiniGPTError(
                f"{folder}: its weights are not finite ({name}); give a model that was trained without errors"
            )
    if unexpected := sorted(map(str, report["unexpected_keys"])):
        logger.warning("%s: %d unexpected tensors are ignored (%s, …)", folder, len(unexpected), unexpected[0])
    if missing := sorted(map(str, report["missing_keys"])):  # transformers would initialize them randomly
        raise MiniGPTError(
            f"{folder}: its weights are incomplete: {missing[0]} and {len(missing) - 1} more are missing"
        )
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    if not is_causal(model.eval()):  # e.g. BERT without `is_decoder`
        raise MiniGPTError(f"{folder}: {type(model).__name__}, with these settings, {NOT_CAUSAL}")
    return model, tokenizer


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Test whether the logits of a position are independent of the next token; they may differ by rounding.

    Logits that are not finite are reported where they are used.
    """
    if context_length(model) == 1:
        return True
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device) % text_config(model).vocab_size
    first, second = model(input_ids=ids).logits[:, 0].float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    return not bool((first - second).abs().max() > tolerance * first.std())  # false for NaN


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt = "",
    *,
    seed: int | None = None,
    special_tokens: bool = False,
    streamer: BaseStreamer | None = None,
    extra_options: Callable[[int, dict], dict] = lambda prompt_tokens, options: {},
    **options,
) -> list[str]:
    """Generate a continuation of a prompt, or a new document if the prompt is empty, or the answer in a conversation.

    Args:
        prompt: Start of the text, or the messages of a conversation, for a model with the tokens of ChatML.
        seed: Seed for sampling. Default: the current state of the random number generators.
        special_tokens: Encode strings such as `<|endoftext|>` in the prompt as special tokens. By default they are ordinary
            text, as in training.
        streamer: Receives the tokens as they are generated (one sequence only).
        extra_options: Returns additional keyword arguments for `model.generate`, given the length of the prompt in
            tokens and `options`; see `compiled.CompiledModel.generation_options`.
        options: Any attribute of `GenerationConfig`: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, …

    Returns:
        `num_return_sequences` texts, each including the prompt, or answers.

    Raises:
        MiniGPTError: if an option is unknown or invalid, the tokenizer cannot encode the prompt, or a sequence would exceed
            the cache of a compiled model.
    """
    if seed is not None and (type(seed) is not int or not 0 <= seed < 1 << 32):
        raise MiniGPTError(f"seed is {seed!r}: an integer from 0 to 4294967295 is required")
    if not isinstance(prompt, str | list):
        raise MiniGPTError(f"the prompt is a {type(prompt).__name__}: text, or a list of messages, is required")
    known = set(vars(GenerationConfig()))
    for name in options:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=3)
            raise MiniGPTError(
                f"generation has no option {name!r}" + (f"; did you mean {' or '.join(similar)}?" if similar else "")
            )
        if name in BOOLEANS and not isinstance(options[name], bool):
            raise MiniGPTError(f"generation option {name} is {options[name]!r}: true or false is required")
        if name == "return_dict_in_generate":
            raise MiniGPTError("generation option return_dict_in_generate is not available: texts are returned")
        if name in FLOATS and type(options[name]) is int:
            options[name] = float(options[name])
        if isinstance(options[name], float) and not math.isfinite(options[name]):
            raise MiniGPTError(f"generation option {name} is {options[name]}: a finite number is required")
        if name == "top_p" and isinstance(options[name], int | float) and options[name] > 1:
            raise MiniGPTError(f"generation option top_p is {options[name]}: a number from 0 to 1 is required")
    try:
        copy.deepcopy(model.generation_config).update(**options)  # validates them together with the model's
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MiniGPTError(f"generation options cannot be used: {error}") from error
    if options.get("stop_strings") is not None or model.generation_config.stop_strings:
        options["tokenizer"] = tokenizer
        check_stop_strings(tokenizer)
    if seed is not None:
        set_seed(seed)
    inputs = encode_prompt(tokenizer, prompt, special_tokens).to(model.device)
    check_ids(model, tokenizer, inputs.input_ids)
    _warn_of_short_context(model, inputs.input_ids.shape[1], options)
    options |= extra_options(inputs.input_ids.shape[1], options)
    # The Trainer disables the cache during training; generation needs it to be fast. With a window of one token, the caches
    # of transformers keep all tokens, and the text would differ.
    use_cache = getattr(model.config, "sliding_window", None) != 1
    options = {"use_cache": use_cache, **options, "return_dict_in_generate": False}
    try:
        sequences = model.generate(**inputs, streamer=streamer, **options)
    except MiniGPTError:
        raise
    except ValueError as error:  # the message of `generate` names the invalid option
        method, is_removed, _ = str(error).partition(" requires `trust_remote_code=True` in your `generate` call")
        if is_removed:  # transformers would load it from the Hub, and never does so here
            raise MiniGPTError(
                f"{method} is not part of this version of transformers: omit the options that select it, also in "
                "generation_config.json"
            ) from error
        raise MiniGPTError(str(error)) from error
    except Exception as error:  # values of a wrong type or range, of which `generate` checks only some
        raise MiniGPTError(
            f"no text can be generated with these options and the model's generation_config.json "
            f"({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}); change the options"
        ) from error
    if not isinstance(prompt, str):
        sequences = sequences[:, inputs.input_ids.shape[1] :]
    return tokenizer.batch_decode(sequences, skip_special_tokens=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, special_tokens: bool = False) -> BatchEncoding:
    """Encode a prompt, or the BOS token if it is empty, as `input_ids` and `attention_mask` [1, T].

    Args:
        special_tokens: Encode strings such as `<|endoftext|>` in the prompt as special tokens instead of ordinary text.

    Raises:
        MiniGPTError: if the tokenizer cannot encode the prompt, or the prompt is empty and there is no BOS token.
    """
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the command line passes bytes that are not UTF-8 as lone surrogates
            raise MiniGPTError(
                f"the prompt is not valid UTF-8 at position {error.start}: give it as UTF-8 text"
            ) from error
    if not isinstance(prompt, str):
        if tokenizer.chat_template == CHAT_TEMPLATE:
            ids = torch.from_numpy(ChatFormat(tokenizer).encode(prompt, add_generation_prompt=True))[None]
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if not tokenizer.chat_template:
            raise MiniGPTError("the model has no chat template: give a text, or a model trained with --recipe chat")
        try:
            return tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # whatever the template raises, e.g. that it has no system message
            raise MiniGPTError(
                f"the chat template of the model rejects the conversation ({' '.join(str(error).split())}): change the "
                "messages, or correct chat_template.jinja"
            ) from error
    bos_token = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    if not prompt and bos_token is None:
        raise MiniGPTError("the tokenizer has no BOS token to start a document with: give a prompt")
    split = bool(prompt) and not special_tokens
    try:
        encoding = tokenizer(
            prompt or bos_token,
            return_tensors="pt",
            return_token_type_ids=False,
            return_special_tokens_mask=True,
            split_special_tokens=split,
            add_special_tokens=bool(prompt),  # otherwise some tokenizers would add a second BOS token
            verbose=False,  # the length is checked by the callers
        )
    except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
        if unknown := unknown_character_error(prompt, tokenizer.get_vocab(), "the prompt"):
            raise unknown from error
        raise MiniGPTError(
            f"the prompt cannot be encoded by this model's tokenizer ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); give another prompt"
        ) from error
    of_prompt = (encoding.pop("special_tokens_mask")[0] == 0).nonzero()
    if not prompt or not len(of_prompt):
        return encoding
    # Some tokenizers append an EOS token to every text, after which a model would not continue the prompt.
    return BatchEncoding({name: each[:, : of_prompt[-1] + 1] for name, each in encoding.items()})


def check_stop_strings(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that transformers can compare texts of this tokenizer with stop strings.

    Raises:
        MiniGPTError: if not: `StopStringCriteria` decodes each token of the vocabulary after the tokens of "abcdef".
    """
    try:
        ids = tokenizer(prefix := "abcdef", add_special_tokens=False).input_ids
        is_known = prefix in tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))
    except Exception:  # the class that `tokenizers` raises for a word without an id
        is_known = False
    if not is_known:
        raise MiniGPTError(
            "stop_strings cannot be used with this tokenizer: transformers requires that it knows the letters a to f; omit "
            "them, also in generation_config.json"
        )


@contextmanager
def only_settings(model: PreTrainedModel, **settings) -> Iterator[None]:
    """Within the block, `generate` decodes greedily, except for `settings`; those in `generation_config.json` do not apply.

    Arguments of `generate` do not suffice: it adds every setting of `model.generation_config` that they omit.
    """
    configured = model.generation_config
    model.generation_config = GenerationConfig(**settings)
    try:
        yield
    finally:
        model.generation_config = configured


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> None:
    """Check token ids [1, T] of a prompt against the limits of a model.

    Raises:
        MiniGPTError: if the prompt leaves no space in the context, or an id exceeds the vocabulary.
    """
    if ids.shape[1] == 0:
        raise MiniGPTError(
            "the tokenizer encodes the prompt to no token: use the tokenizer that the model was trained with"
        )
    longest = context_length(model)
    if longest is not None and ids.shape[1] >= longest:
        raise MiniGPTError(
            f"the prompt has {ids.shape[1]:,} tokens and the context of the model is {longest:,}: shorten the prompt, so "
            "that new tokens fit"
        )
    vocabulary = text_config(model).vocab_size
    if int(ids.max()) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise MiniGPTError(
            f"token id {int(ids.max())} ({token!r}) of the prompt exceeds the vocabulary of the model "
            f"({vocabulary:,} tokens): use the tokenizer that it was trained with"
        )


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the language model, which that of a multimodal model contains."""
    return model.config.get_text_config(decoder=True)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the maximum sequence length in tokens; `None` for models without a limit (ALiBi, state space models)."""
    names = "max_position_embeddings", "max_seq_len"  # the latter of MPT
    config = text_config(model)
    length = next((each for each in (getattr(config, name, None) for name in names) if each and each > 0), None)
    for name, module in model.named_modules():
        # RoBERTa and its relatives number positions from `padding_idx` + 1.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return length


def warn_of_unused_options(model: PreTrainedModel, options: dict, seed: int | None = None) -> None:
    """Log a warning if options without effect are given, also those of sampling if the model does not sample.

    Args:
        seed: See `generate`.
    """
    if unused := [name for name in WITHOUT_EFFECT if options.get(name) is not None]:
        logger.warning("%s: no effect in this version of transformers on a causal language model", ", ".join(unused))
    for name, required in REQUIRED.items():
        if options.get(name) is not None and not (options.get(required) or getattr(model.generation_config, required)):
            logger.warning("%s: no effect without --%s", name, required)
    unused = [name for name in SAMPLING if options.get(name) not in (None, 0)]  # temperature 0: no sampling
    unused += ["seed"] if seed is not None else []
    if unused and not options.get("do_sample", model.generation_config.do_sample):
        logger.warning("%s: no effect without --do_sample true: the most probable token is chosen", ", ".join(unused))


def _warn_of_short_context(model: PreTrainedModel, prompt_tokens: int, options: dict) -> None:
    """Log a warning if the text may become longer than the context, unless every layer has a sliding window."""
    longest = context_length(model)
    new_tokens = options.get("max_new_tokens", model.generation_config.max_new_tokens)
    if new_tokens is None and isinstance(length := options.get("max_length", model.generation_config.max_length), int):
        new_tokens = length - prompt_tokens
    is_windowed = set(getattr(model.config, "layer_types", None) or []) == {"sliding_attention"}
    if not (isinstance(longest, int) and isinstance(new_tokens, int)) or is_windowed:
        return
    if prompt_tokens + new_tokens > longest:
        logger.warning(
            "%s tokens of prompt and %s new tokens exceed the context of the model, %s tokens, beyond which its text may "
            "be meaningless; reduce --max_new_tokens",
            f"{prompt_tokens:,}",
            f"{new_tokens:,}",
            f"{longest:,}",
        )
