"""Any model folder + prompt -> text, through `AutoModelForCausalLM` alone.

In: a folder (or Hub id) of any causal LM, a prompt or none, and the options of transformers' `GenerationConfig`. Out: text,
as it is written; faster after `quicken`, which says how exact it stays. It refuses options that `generate` does not have,
and it never replaces `generate`.
"""

import copy
import difflib
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer


def load(folder: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub id, on the accelerator if there is one, ready to generate.

    Args:
        trust_remote_code: Whether to run code that other models bring along; a MiniGPT needs none of it here.

    Raises:
        ValueError: if there is no model there, or it brings code that is not trusted.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
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
    fast: "Fast | None" = None,
    **options,
) -> list[str]:
    """Continue a prompt, or begin a document if there is none.

    Args:
        prompt: What the text starts with.
        seed: Makes sampling repeatable.
        streamer: Shown the text while it is written (one sequence only).
        fast: What `quicken` made of this model.
        options: Any attribute of `GenerationConfig`: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, …

    Returns:
        `num_return_sequences` texts, each with its prompt.

    Raises:
        ValueError: for an option that `GenerationConfig` does not have, a prompt that the tokenizer cannot encode, or
            more tokens than `fast` has room for.
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
    if fast is not None:
        options |= fast.take(inputs.input_ids.shape[1], options)
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


@dataclass(frozen=True)
class Fast:
    """A model that `quicken` has prepared: what `generate` needs to know, and what it cost.

    Args:
        cache: Keys and values, for `room` tokens of each of so many `sequences`: what the step was compiled for.
        seconds: That the preparation took.
        agreeing, greedy: Of so many greedy tokens, as many from the first one on are those of the model as it was.
        probability: By how much the probability of any token differed while they agreed, at most.
    """

    cache: StaticCache
    compile_config: CompileConfig
    room: int
    sequences: int
    seconds: float
    agreeing: int
    greedy: int
    probability: float

    def take(self, prompt_tokens: int, options: dict) -> dict:
        """What `generate` is given for one text, with the cache emptied.

        Raises:
            ValueError: if the text could become longer than the cache, or there are not as many as were prepared for.
        """
        longest = options.get("max_length") or prompt_tokens + options.get("max_new_tokens", 20)  # as in `generate`
        if longest > self.room:
            raise ValueError(
                f"{prompt_tokens} tokens of prompt and the new ones are {longest}, and --fast has room for "
                f"{self.room}: give a larger --max_cache_len"
            )
        if (sequences := options.get("num_return_sequences", 1)) != self.sequences:
            raise ValueError(f"this was prepared to write {self.sequences} at a time, not {sequences}")
        self.cache.reset()
        return {"past_key_values": self.cache, "compile_config": self.compile_config}

    def __str__(self) -> str:
        return (
            f"bfloat16 and a compiled step, ready after {self.seconds:.1f} s; {self.agreeing} of {self.greedy} greedy tokens "
            f"are those of the model as it was, probabilities within {self.probability:.4f}"
        )


# What a step that is compiled for one token at a time cannot do, or decides by itself.
NOT_WITH_FAST = ("num_beams", "prompt_lookup_num_tokens", "use_cache", "cache_implementation", "prefill_chunk_size")
GREEDY_TOKENS = 16


@torch.no_grad()
def quicken(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    max_new_tokens: int = 20,
    max_cache_len: int = 0,
    num_return_sequences: int = 1,
    tune: bool = True,
) -> Fast:
    """Make a model write fast: bfloat16 weights in place, a static cache, one decode step, compiled and tuned.

    Writing a token reads every weight once, so half the bytes are twice the speed; the rest is what the interpreter and
    badly shaped kernels cost. On a CPU the weights are frozen into the step and repacked for it, and kernels are chosen by
    trying them; on CUDA the step is one graph. The first texts are written while it is prepared, and compared with those
    of the model as it was.

    Args:
        max_new_tokens, max_cache_len: Room is made for the prompt and so many tokens, or for `max_cache_len` in all.
        num_return_sequences: How many texts at a time.
        tune: Choose kernels by trying them, which takes most of the preparation on a CPU.

    Raises:
        ValueError: if this model, or this machine, cannot compile.
    """
    # Here, for the compiler takes a second to import, and whoever does not need it would wait.
    from torch._inductor import config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"--fast is made for CPUs and CUDA, and the model is on {model.device.type}: leave it out")
    if not model._can_compile_fullgraph:
        raise ValueError(f"--fast compiles a model whole, and transformers cannot with {model.config.model_type!r}")
    began = time.perf_counter()
    ids = encode_prompt(tokenizer, prompt).input_ids.to(model.device).repeat(num_return_sequences, 1)
    greedy = {"do_sample": False, "min_new_tokens": GREEDY_TOKENS, "max_new_tokens": GREEDY_TOKENS, "use_cache": True}
    greedy |= {"output_logits": True, "return_dict_in_generate": True}
    as_it_was = model.generate(ids, **greedy)

    model.to(torch.bfloat16)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="max-autotune" if tune else "reduce-overhead")
    frozen = {}
    if model.device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError("--fast needs a C++ compiler, and none is found: install g++ or clang") from error
        compile_config.mode = None
        compile_config._compile_all_devices = True  # `generate` compiles by itself on accelerators only
        frozen = {"freezing": True, "max_autotune": tune, "autotune_num_choices_displayed": 0}
    room = max(ids.shape[1] + max(max_new_tokens, GREEDY_TOKENS), max_cache_len)
    room = -(-room // 256) * 256  # of a few sizes only, so that what was compiled on this machine is found again
    cache = StaticCache(_without_windows(model.config), max_cache_len=room)
    fast = {"past_key_values": cache, "compile_config": compile_config}
    with inductor.patch(frozen), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # torch's own tuning uses it
        quickened = model.generate(ids, **greedy, **fast)

    before, after = (torch.stack(output.logits).softmax(-1) for output in (as_it_was, quickened))  # [tokens, B, V]
    same = (before.argmax(-1) == after.argmax(-1)).all(1).tolist()
    agreeing = same.index(False) if False in same else len(same)
    gap = (before - after)[: agreeing + 1].abs().max().item()  # the first token that differs followed the same ones
    seconds = time.perf_counter() - began
    return Fast(cache, compile_config, room, num_return_sequences, seconds, agreeing, GREEDY_TOKENS, gap)


def _without_windows(config):
    """A configuration for the cache in which sliding layers keep all tokens; the mask hides those beyond the window.

    A static cache that slides counts in Python, and each count would be compiled anew.
    """
    config = copy.deepcopy(config.get_text_config(decoder=True))
    if layer_types := config.to_dict().get("layer_types"):
        config.layer_types = [kind.replace("sliding_attention", "full_attention") for kind in layer_types]
    return config
