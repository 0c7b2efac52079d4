"""What share of a training step Muon takes, in the shapes of two recipes.

A step is forward, backward, clipping, AdamW's part and Muon's part, each timed by itself, in turns; an optimizer passes over
parameters without a gradient, so either part can run alone. `shakespeare-char` is measured whole. A step of `gpt2-124m` is
480 blocks of 1,024 tokens: forward and backward are measured on one block and counted 480 times, the rest is done once.
Seconds are those of the processor (`time.process_time`), which other work on the machine bends less than a clock's.
"""

import argparse
import statistics
import sys
import time
from typing import Any

# name: (vocabulary, layers, width, heads, blocks at a time, tokens in a block, how often before an optimizer step)
SHAPES = {
    "shakespeare-char": (67, 4, 128, 4, 12, 64, 1),
    "gpt2-124m": (50304, 12, 768, 12, 1, 1024, 480),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="whose (default: both)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds; ten times as many of the small one (default: 5)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each part of a step, and Muon's share."""
    return {"steps": [measure(name, args.repeats * (10 if name == "shakespeare-char" else 1)) for name in args.shape]}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Medians over rounds; the share is that of the medians."""
    import torch

    from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
    from minigpt_hf.training.optimizer import muon_adamw

    vocabulary, layers, width, heads, rows, tokens, often = SHAPES[name]
    torch.manual_seed(0)
    config = MiniGPTConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads
    )
    model = MiniGPTForCausalLM(config).train()
    optimizer = muon_adamw(model, lr=4e-3, muon_lr=0.02)
    ids = torch.randint(vocabulary, (rows, tokens))
    of_muon = {id(p) for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]}

    def learn() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    def step_of(wanted: bool):
        def step() -> None:
            aside = [(p, p.grad) for p in model.parameters() if (id(p) in of_muon) != wanted]
            for p, _ in aside:
                p.grad = None
            began = time.process_time()
            optimizer.step()
            seconds.append(time.process_time() - began)
            for p, gradient in aside:
                p.grad = gradient

        return step

    parts = {
        "forward_and_backward": learn,
        "clipping": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "adamw": step_of(False),
        "muon": step_of(True),
    }
    times: dict[str, list[float]] = {part: [] for part in parts}
    for repeat in range(repeats + 1):
        for part, do in parts.items():
            seconds: list[float] = []  # what `step_of` notes itself, without the setting aside
            began = time.process_time()
            do()
            taken = seconds[0] if seconds else time.process_time() - began
            if repeat:  # the first round makes the state
                times[part].append(taken * (often if part == "forward_and_backward" else 1))
        model.zero_grad()
        if repeat % 10 == 0:
            print(f"{name}: round {repeat} of {repeats}", file=sys.stderr)

    def share(of) -> float:
        parts = {part: of(values) for part, values in times.items()}
        return parts["muon"] / sum(parts.values())

    return {
        "": name,
        "tokens": rows * tokens * often,
        **{f"{part} ms": round(1000 * statistics.median(values), 1) for part, values in times.items()},
        "muon's share": f"{share(statistics.median):.1%}",
        "of the fastest": f"{share(min):.1%}",
    }
