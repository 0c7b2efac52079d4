"""Writing at 124 M parameters: this package, transformers' Qwen3, nanoGPT's sampler, and `--fast`, beside the limit.

Every token reads each weight once, so no program writes more steps a second than bandwidth ÷ bytes of weights. The bandwidth
is that of a sum over an array far larger than the caches, in the same round as what it is compared with. Weights are
random: no speed depends on them. MiniGPT and Qwen3 have the very same ones, and `forward` and `backward` are theirs, too.

nanoGPT's sampler has no cache, so its step grows with the text: it is called for one token at places spread over the text,
and its time is their mean × the number of tokens.
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
    """What it takes."""
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a clone of nanoGPT, to compare with its sampler")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each text (default: 256)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="texts at a time (default: 1 16)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, in each of which all take turns (default: 5)")
    parser.add_argument("--places", type=int, default=4, help="steps of nanoGPT's sampler in a round (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64, to try the command itself")
    parser.add_argument("--no_fast", action="store_true", help="leave out --fast, which takes minutes to compile")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, the limit, and MiniGPT ÷ Qwen3 of forward, backward and generate."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    minigpt, qwen3 = twins(TINY if args.tiny else SHAPE, PROMPT_TOKENS + args.tokens)
    parameters = minigpt.num_parameters()
    writing, warm_up = [], []
    for batch in args.batch:
        rows, about = compare_writing(args, batch, minigpt, qwen3)
        writing += rows
        warm_up += about
    return {
        "parameters": f"{parameters / 1e6:.1f} M",
        "texts": f"{args.tokens} tokens after a prompt of {PROMPT_TOKENS}, greedy; nanoGPT: multinomial",
        "writing": writing,
        "fast": warm_up,
        "minigpt_beside_qwen3": compare_twins(args, minigpt, qwen3),
    }


def twins(shape: dict[str, int], longest: int):
    """MiniGPT and transformers' Qwen3 with the same random weights, in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM

    config = MiniGPTConfig(
        **shape, max_position_embeddings=max(1024, longest), bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    minigpt = MiniGPTForCausalLM(config).eval()
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    qwen3.load_state_dict(minigpt.state_dict())
    return minigpt, qwen3


def compare_writing(args: argparse.Namespace, batch: int, minigpt, qwen3) -> tuple[list[dict], list[dict]]:
    """All ways of writing at one batch size, in turns."""
    import torch

    ids = torch.randint(2, minigpt.config.vocab_size, (batch, PROMPT_TOKENS))
    steps = {"MiniGPT": writer(minigpt, ids, args.tokens), "transformers Qwen3": writer(qwen3, ids, args.tokens)}
    size = {name: sum(p.numel() * p.element_size() for p in minigpt.parameters()) for name in steps}
    about = []
    if args.nanogpt:
        name = "nanoGPT's sampler"
        steps[name], size[name] = nanogpt_sampler(args, batch, minigpt.config)
    if not args.no_fast:
        steps["MiniGPT --fast"], told = fast_writer(minigpt, batch, args.tokens)
        size["MiniGPT --fast"] = size["MiniGPT"] // 2  # two bytes for four
        about.append({"batch": batch, **told})

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    bandwidths = []
    array = torch.ones(2**18 if args.tiny else 2**28)  # 1 GB
    for repeat in range(args.repeats):
        bandwidths.append(bandwidth(array))
        for name, step in steps.items():
            seconds[name].append(step())
        for name, values in seconds.items():
            ratios[name].append(seconds["MiniGPT"][-1] / values[-1])
        print(f"batch {batch}: round {repeat + 1} of {args.repeats}", file=sys.stderr)
    rows = []
    for name, values in seconds.items():
        limit = statistics.median(bandwidths) / size[name]  # steps a second
        steps_per_second = args.tokens / statistics.median(values)
        rows.append(
            {
                "": name,
                "batch": batch,
                "tokens/s": round(steps_per_second * batch, 1),
                "times MiniGPT": round(statistics.median(ratios[name]), 2),
                "MB of weights": round(size[name] / 1e6),
                "GB/s": round(statistics.median(bandwidths) / 1e9, 1),
                "limit, tokens/s": round(limit * batch, 1),
                "of the limit": f"{steps_per_second / limit:.0%}",
            }
        )
    gc.collect()
    return rows, about


def writer(model, ids, tokens: int, **options) -> Callable[[], float]:
    """-> a function that writes once and returns the seconds it took."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True}

    def write() -> float:
        began = time.perf_counter()
        sequences = model.generate(ids, **settings, **options)
        seconds = time.perf_counter() - began
        assert sequences.shape == (len(ids), ids.shape[1] + tokens)
        return seconds

    return write


def fast_writer(minigpt, batch: int, tokens: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """The same after `quicken`, on a copy, by the functions of `minigpt generate --fast`; what that cost, and how exact."""
    import copy

    import torch

    from minigpt_hf.data.tokenizer import byte_tokenizer
    from minigpt_hf.fast import quicken
    from minigpt_hf.generation import generate

    torch._dynamo.reset()  # what was compiled for another batch size is let go
    model, tokenizer = copy.deepcopy(minigpt), byte_tokenizer()
    prompt = "x" * PROMPT_TOKENS
    fast = quicken(model, tokenizer, prompt, max_new_tokens=tokens, num_return_sequences=batch)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_return_sequences": batch}
    options |= {"do_sample": batch > 1, "top_k": 1 if batch > 1 else 50}  # several greedy texts are not offered

    def write() -> float:
        began = time.perf_counter()
        generate(model, tokenizer, prompt, more=fast.take, **options)
        return time.perf_counter() - began

    told = {"seconds to prepare": round(fast.seconds, 1), "greedy tokens as float32": f"{fast.agreeing}/{fast.greedy}"}
    return write, {**told, "probabilities within": f"{fast.probability:.1e}"}


def nanogpt_sampler(args: argparse.Namespace, batch: int, config) -> tuple[Callable[[], float], int]:
    """nanoGPT's own `generate` with as many layers, heads and channels; its seconds for a whole text, and its bytes."""
    import torch

    sys.path.insert(0, str(args.nanogpt))
    from model import GPT, GPTConfig

    # To standard error: it prints its number of parameters.
    printed, sys.stdout = sys.stdout, sys.stderr
    gpt = GPT(
        GPTConfig(
            vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_embd=config.hidden_size,
        )
    ).eval()
    sys.stdout = printed
    lengths = [PROMPT_TOKENS + round((i + 0.5) * args.tokens / args.places) for i in range(args.places)]

    def write() -> float:
        seconds = []
        for length in lengths:
            ids = torch.randint(2, config.vocab_size, (batch, length))
            began = time.perf_counter()
            gpt.generate(ids, 1)
            seconds.append(time.perf_counter() - began)
        return statistics.mean(seconds) * args.tokens

    return write, sum(p.numel() * p.element_size() for p in gpt.parameters())


def bandwidth(array) -> float:
    """Bytes a second that a sum reads; the best of three."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - began)
    return array.numel() * array.element_size() / min(seconds)


def compare_twins(args: argparse.Namespace, minigpt, qwen3) -> list[dict[str, Any]]:
    """Seconds of MiniGPT ÷ those of Qwen3, at the same weights and input, in turns that swap who goes first."""
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
        model.generate(ids[:1, :PROMPT_TOKENS], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    rows = []
    for what in (forward, forward_and_backward, generate):
        seconds: dict[str, list[float]] = {"minigpt": [], "qwen3": []}
        what(minigpt), what(qwen3)
        for repeat in range(4 * args.repeats):
            for name in ("minigpt", "qwen3") if repeat % 2 else ("qwen3", "minigpt"):
                began = time.perf_counter()
                what(minigpt if name == "minigpt" else qwen3)
                seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(m / q for m, q in zip(*seconds.values(), strict=True))
        rows.append(
            {
                "": what.__name__.replace("_", " "),
                "MiniGPT ms": round(1000 * medians["minigpt"], 2),
                "Qwen3 ms": round(1000 * medians["qwen3"], 2),
                "MiniGPT ÷ Qwen3": round(ratio, 3),
                "of the fastest": round(min(seconds["minigpt"]) / min(seconds["qwen3"]), 3),
            }
        )
    return rows
