"""A model -> the same model, writing fast: bfloat16, a static cache, one compiled decode step.

In: a model and what it is to write. Out: a `Fast`, which says what it cost and how exact it stays. It refuses models that
cannot be compiled whole, and machines without a compiler.
"""

import copy
import time
import warnings
from dataclasses import dataclass

import torch
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from .generation import encode_prompt


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
        if num_return_sequences == 1:  # here oneDNN's kernels are sometimes chosen in error, and take twice as long
            frozen["max_autotune_gemm_backends"] = "CPP"
        # torch's flash attention is slow for a single query: 0.84 ms a layer, the written-out one compiled 0.35 ms.
        model.set_attn_implementation("eager")
    room = max(ids.shape[1] + max(max_new_tokens, GREEDY_TOKENS), max_cache_len)
    room = -(-room // 128) * 128  # of a few sizes only, so that what was compiled on this machine is found again
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
