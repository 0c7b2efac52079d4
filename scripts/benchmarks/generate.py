"""Generation throughput at 124 M parameters: MiniGPT, MiniGPT with `--fast`, transformers' Qwen3 and nanoGPT's sampler.

Decoding reads every weight once per step, so memory bandwidth ÷ size of the weights is an upper bound of the steps per
second. The bandwidth is measured in each round as that of a sum over an array much larger than the CPU caches. Weights
are random, as the speed does not depend on them, and equal for MiniGPT and Qwen3. The two are also compared in one
forward pass, one forward and backward pass, and a short generation.

nanoGPT's sampler has no key/value cache, so the time per token grows with the length. It is measured for one token at
several lengths, and the mean is multiplied by the number of tokens.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 8
SHAPE = {"vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
TINY = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--nanogpt", type=Path, metavar="PATH", help="clone of karpathy/nanoGPT, whose sampler is compared"
    )
    parser.add_argument("--tokens", type=int, default=256, help="number of new tokens (default: 256)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes (default: 1 16)")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument(
        "--places", type=int, default=4, help="number of lengths at which nanoGPT's sampler is measured (default: 4)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use a tiny model (2 layers, hidden size 64), to test this command"
    )
    parser.add_argument("--no_fast", action="store_true", help="omit --fast, which takes minutes to compile")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure generation throughput, its upper bound, and the ratio of MiniGPT to Qwen3."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    minigpt, qwen3 = twins(TINY if args.tiny else SHAPE, PROMPT_TOKENS + args.tokens)
    parameters = minigpt.num_parameters()
    generation, compilation = [], []
    for batch in args.batch:
        rows, compilation_rows = compare_generation(args, batch, minigpt, qwen3)
        generation += rows
        compilation += compilation_rows
    return {
        "parameters": f"{parameters / 1e6:.1f} M",
        "task": f"{args.tokens} new tokens after a prompt of {PROMPT_TOKENS}, greedy; nanoGPT: multinomial sampling",
        "generation": generation,
        "compilation": compilation,
        "minigpt_and_qwen3": compare_twins(args, minigpt, qwen3),
    }


def twins(shape: dict[str, int], max_length: int):
    """Create MiniGPT and transformers' Qwen3 with the same random float32 weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM

    config = MiniGPTConfig(
        **shape, max_position_embeddings=max(1024, max_length), bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    minigpt = MiniGPTForCausalLM(config).eval()
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    qwen3.load_state_dict(minigpt.state_dict())
    for model in (minigpt, qwen3):
        model.generation_config.eos_token_id = None  # `min_new_tokens` instead would take 0.7 ms per token
    return minigpt, qwen3


def compare_generation(args: argparse.Namespace, batch: int, minigpt, qwen3) -> tuple[list[dict], list[dict]]:
    """Measure all candidates at one batch size, alternating. Returns rows of throughput and of compilation."""
    import torch

    ids = torch.randint(2, minigpt.config.vocab_size, (batch, PROMPT_TOKENS))
    measure = {
        "MiniGPT": generator(minigpt, ids, args.tokens),
        "transformers Qwen3": generator(qwen3, ids, args.tokens),
    }
    size = {name: sum(p.numel() * p.element_size() for p in minigpt.parameters()) for name in measure}
    compilation = []
    if args.nanogpt:
        name = "nanoGPT's sampler"
        measure[name], size[name] = nanogpt_sampler(args, batch, minigpt.config)
    if not args.no_fast:
        measure["MiniGPT --fast"], row = compiled_generator(minigpt, batch, args.tokens)
        size["MiniGPT --fast"] = size["MiniGPT"] // 2  # bfloat16
        compilation.append({"batch": batch, **row})

    seconds: dict[str, list[float]] = {name: [] for name in measure}
    ratios: dict[str, list[float]] = {name: [] for name in measure}
    bandwidths = []
    array = torch.ones(2**18 if args.tiny else 2**28)  # 1 GiB of float32
    for repeat in range(args.repeats):
        bandwidths.append(bandwidth(array))
        for name, generate_once in measure.items():
            seconds[name].append(generate_once())
        for name, values in seconds.items():
            ratios[name].append(seconds["MiniGPT"][-1] / values[-1])
        print(f"batch {batch}: round {repeat + 1} of {args.repeats}", file=sys.stderr)
    rows = []
    for name, values in seconds.items():
        limit = statistics.median(bandwidths) / size[name]  # steps per second
        steps_per_second = args.tokens / statistics.median(values)
        rows.append(
            {
                "": name,
                "batch": batch,
                "tokens/s": round(steps_per_second * batch, 1),
                "speedup over MiniGPT": round(statistics.median(ratios[name]), 2),
                "weights, MB": round(size[name] / 1e6),
                "bandwidth, GB/s": round(statistics.median(bandwidths) / 1e9, 1),
                "upper bound, tokens/s": round(limit * batch, 1),
                "share of the bound": f"{steps_per_second / limit:.0%}",
            }
        )
    gc.collect()
    return rows, compilation


def generator(model, ids, tokens: int, **options: Any) -> Callable[[], float]:
    """Return a function that generates once and returns the seconds it took. There is no end-of-sequence token."""
    settings = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, **options}

    def generate_once() -> float:
        start = time.perf_counter()
        sequences = model.generate(ids, **settings)
        seconds = time.perf_counter() - start
        assert sequences.shape == (len(ids), ids.shape[1] + tokens)
        return seconds

    return generate_once


def compiled_generator(minigpt, batch: int, tokens: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """Compile a copy of the model as `minigpt generate --fast` does.

    Returns:
        A function that generates once and returns the seconds it took; the compile time and accuracy.
    """
    import copy

    import torch

    from minigpt_hf.data.tokenizer import byte_tokenizer
    from minigpt_hf.inference.compiled import compile_for_generation
    from minigpt_hf.inference.generation import encode_prompt

    tokenizer, prompt = byte_tokenizer(), "x" * PROMPT_TOKENS
    seconds = []
    for _ in range(2):  # the second time, torch's caches on disk contain the step, if it can be cached
        torch._dynamo.reset()  # discard graphs compiled before
        model = copy.deepcopy(minigpt)
        compiled = compile_for_generation(model, tokenizer, prompt, max_new_tokens=tokens, num_return_sequences=batch)
        seconds.append(round(compiled.seconds, 1))
    ids = encode_prompt(tokenizer, prompt).input_ids.repeat(batch, 1)
    settings = {"max_new_tokens": tokens, "num_return_sequences": batch}

    def generate_once() -> float:
        return generator(model, ids, tokens, **compiled.generation_options(ids.shape[1], settings))()

    row: dict[str, Any] = {"preparation, s": seconds[0], "second preparation, s": seconds[1]}
    row |= {"greedy tokens equal to float32": f"{compiled.num_matching}/{compiled.num_compared}"}
    return generate_once, {**row, "max probability difference": f"{compiled.max_probability_difference:.1e}"}


def nanogpt_sampler(args: argparse.Namespace, batch: int, config) -> tuple[Callable[[], float], int]:
    """Create a nanoGPT model of the same shape.

    Returns:
        A function that estimates the seconds of one generation by nanoGPT's `generate`; the size of the weights in
        bytes.
    """
    import torch

    sys.path.insert(0, str(args.nanogpt))
    from model import GPT, GPTConfig

    # nanoGPT prints its number of parameters: redirect it, because standard output contains the results.
    stdout, sys.stdout = sys.stdout, sys.stderr
    gpt = GPT(
        GPTConfig(
            vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_embd=config.hidden_size,
        )
    ).eval()
    sys.stdout = stdout
    lengths = [PROMPT_TOKENS + round((i + 0.5) * args.tokens / args.places) for i in range(args.places)]

    def generate_once() -> float:
        seconds = []
        for length in lengths:
            ids = torch.randint(2, config.vocab_size, (batch, length))
            start = time.perf_counter()
            gpt.generate(ids, 1)
            seconds.append(time.perf_counter() - start)
        return statistics.mean(seconds) * args.tokens

    return generate_once, sum(p.numel() * p.element_size() for p in gpt.parameters())


def bandwidth(array) -> float:
    """Measure the read bandwidth of a sum, in bytes per second; the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - start)
    return array.numel() * array.element_size() / min(seconds)


def compare_twins(args: argparse.Namespace, minigpt, qwen3) -> list[dict[str, Any]]:
    """Compare times of MiniGPT and Qwen3 with equal weights and inputs, alternating which one runs first."""
    import torch

    ids = torch.randint(2, minigpt.config.vocab_size, (2, 256 if not args.tiny else 32))

    def forward(model) -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def forward_and_backward(model) -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    def generate(model) -> None:
        tokens = min(32, args.tokens)
        model.generate(ids[:1, :PROMPT_TOKENS], max_new_tokens=tokens, do_sample=False)

    rows = []
    for function in (forward, forward_and_backward, generate):
        seconds: dict[str, list[float]] = {"minigpt": [], "qwen3": []}
        function(minigpt), function(qwen3)  # warmup
        for repeat in range(4 * args.repeats):
            for name in ("minigpt", "qwen3") if repeat % 2 else ("qwen3", "minigpt"):
                start = time.perf_counter()
                function(minigpt if name == "minigpt" else qwen3)
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(m / q for m, q in zip(*seconds.values(), strict=True))
        rows.append(
            {
                "": function.__name__.replace("_", " "),
                "MiniGPT ms": round(1000 * medians["minigpt"], 2),
                "Qwen3 ms": round(1000 * medians["qwen3"], 2),
                "MiniGPT ÷ Qwen3": round(ratio, 3),
                "ratio of the minima": round(min(seconds["minigpt"]) / min(seconds["qwen3"]), 3),
            }
        )
    return rows
