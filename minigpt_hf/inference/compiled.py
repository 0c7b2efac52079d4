"""Faster generation: bfloat16 weights, a static cache and one compiled decoding step (`minigpt generate --fast`)."""

import copy
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.fx_passes import decompose_mem_bound_mm
from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from ..errors import MiniGPTError
from .generation import encode_prompt, only_settings


@dataclass(frozen=True)
class CompiledModel:
    """The result of `compile_for_generation`: the options that `generate` needs, the compile time and the accuracy.

    Attributes:
        cache: Static key/value cache of `max_cache_len` positions for `num_sequences` sequences, the shape for which the
            decoding step is compiled.
        compile_config: How `generate` compiles the decoding step.
        max_cache_len: Maximum length of a sequence, in tokens of prompt and continuation.
        num_sequences: Batch size.
        seconds: Time for preparation, including compilation.
        num_matching: Number of leading greedy tokens equal to those of the original model, out of `num_compared`.
        num_compared: Number of greedy tokens compared.
        max_probability_difference: Maximum absolute difference of any token probability at the matching positions and the
            one after them.
    """

    cache: StaticCache
    compile_config: CompileConfig
    max_cache_len: int
    num_sequences: int
    seconds: float
    num_matching: int
    num_compared: int
    max_probability_difference: float

    def generation_options(self, prompt_tokens: int, options: dict) -> dict:
        """Reset the cache and return the additional keyword arguments for one call of `generate`.

        Args:
            prompt_tokens: Length of the prompt.
            options: The other generation options of the call.

        Raises:
            MiniGPTError: if the sequence could exceed the cache, or `num_return_sequences` differs from the compiled one.
        """
        new_tokens = options.get("max_new_tokens", None if "max_length" in options else 20)  # as in `generate`
        length = options["max_length"] if new_tokens is None else prompt_tokens + new_tokens
        if length > self.max_cache_len:
            raise MiniGPTError(
                f"the prompt ({prompt_tokens} tokens) and the new tokens are {length} tokens, but the cache of --fast "
                f"holds {self.max_cache_len}: increase --max_cache_len"
            )
        if (num_sequences := options.get("num_return_sequences", 1)) != self.num_sequences:
            raise MiniGPTError(
                f"num_return_sequences is {num_sequences}, but the model was compiled for {self.num_sequences}: "
                "compile it again"
            )
        self.cache.reset()
        return {"past_key_values": self.cache, "compile_config": self.compile_config}

    def __str__(self) -> str:
        return (
            f"bfloat16 and a compiled decoding step, prepared in {self.seconds:.1f} s; {self.num_matching} of "
            f"{self.num_compared} greedy tokens equal those of the original model, maximum difference of a probability "
            f"{self.max_probability_difference:.4f}"
        )


# Options that one compiled step with a static cache does not support, or that `compile_for_generation` sets itself.
UNSUPPORTED_OPTIONS = (
    "num_beams",
    "prompt_lookup_num_tokens",
    "use_cache",
    "cache_implementation",
    "prefill_chunk_size",
)
NUM_COMPARED = 16


@torch.no_grad()
def compile_for_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    max_new_tokens: int = 20,
    max_cache_len: int = 0,
    num_return_sequences: int = 1,
) -> CompiledModel:
    """Convert a model to bfloat16 in place, and compile its decoding step for a static cache.

    Decoding is memory-bound: each token reads every weight once, so two bytes per weight instead of four halve the
    time. The compiled step removes the overhead of the interpreter and of many small kernels. On a CPU, the compiled
    step of one sequence is cached on disk; for several, the weights are frozen into the step and repacked. On CUDA,
    kernels are chosen by benchmarking (autotuning), and the step is one CUDA graph. The first greedy tokens are compared
    with those of the original model.

    Args:
        max_new_tokens: The cache holds at least the prompt and this number of tokens.
        max_cache_len: Minimum length of the cache, in tokens.
        num_return_sequences: Batch size for which the step is compiled.

    Raises:
        MiniGPTError: if the model or the machine does not support compilation.
    """
    if model.device.type not in ("cpu", "cuda"):
        raise MiniGPTError(f"--fast supports CPU and CUDA, but the model is on {model.device.type}: omit --fast")
    if not model._can_compile_fullgraph:
        raise MiniGPTError(
            f"--fast compiles the model as one graph, which transformers does not support for model type "
            f"{model.config.model_type!r}: omit --fast"
        )
    start = time.perf_counter()
    ids = encode_prompt(tokenizer, prompt).input_ids.to(model.device).repeat(num_return_sequences, 1)
    greedy = {"do_sample": False, "min_new_tokens": NUM_COMPARED, "max_new_tokens": NUM_COMPARED, "use_cache": True}
    greedy |= {"output_logits": True, "return_dict_in_generate": True}
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": model.generation_config.pad_token_id}
    with only_settings(model, **ends):
        reference = model.generate(ids, **greedy)

    # Not the buffers: rounded RoPE frequencies would shift the angles of distant positions.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="max-autotune")
    inductor_options: dict[str, Any] = {}
    if model.device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise MiniGPTError("--fast needs a C++ compiler, but none was found: install g++ or clang") from error
        compile_config.mode = None
        compile_config._compile_all_devices = True  # by default, `generate` compiles on accelerators only
        # By default, the rotation of the query, with its sines and cosines, is computed again for every key.
        inductor_options = {"realize_opcount_threshold": 4}
        if num_return_sequences == 1:
            # Products of a matrix and a vector become loops of the compiled step: oneDNN takes several times as long.
            decompose_mem_bound_mm.cpu_max_other_dimension_decomposition = sys.maxsize
            inductor_options |= {"decompose_mem_bound_mm": True, "post_grad_fusion_options": {"decompose_mm_pass": {}}}
        else:
            inductor_options["freezing"] = True  # repacks the weights for oneDNN
        # For a single query, torch's flash attention takes 0.84 ms per layer, compiled eager attention 0.1 ms.
        model.set_attn_implementation("eager")
    cache_len = max(ids.shape[1] + max(max_new_tokens, NUM_COMPARED), max_cache_len)
    cache_len = -(-cache_len // 128) * 128  # few distinct sizes, so that inductor's cache on disk is reused
    cache = StaticCache(_without_sliding_window(model.config), max_cache_len=cache_len)
    with inductor.patch(inductor_options), only_settings(model, **ends):
        compiled = model.generate(ids, **greedy, past_key_values=cache, compile_config=compile_config)

    before, after = (torch.stack(output.logits).softmax(-1) for output in (reference, compiled))  # [tokens, B, V]
    matches = (before.argmax(-1) == after.argmax(-1)).all(1).tolist()
    num_matching = matches.index(False) if False in matches else len(matches)
    # The first differing token is included: its distribution is conditioned on equal tokens.
    difference = (before - after)[: num_matching + 1].abs().max().item()
    return CompiledModel(
        cache,
        compile_config,
        cache_len,
        num_return_sequences,
        time.perf_counter() - start,
        num_matching,
        NUM_COMPARED,
        difference,
    )


def _without_sliding_window(config):
    """Return a configuration in which every layer caches all tokens; the attention mask still applies the window.

    A sliding static cache counts positions in Python, so that each step would be recompiled.
    """
    config = copy.deepcopy(config.get_text_config(decoder=True))
    if layer_types := config.to_dict().get("layer_types"):
        config.layer_types = [layer_type.replace("sliding_attention", "full_attention") for layer_type in layer_types]
    return config
