"""Share of a training step spent in Muon, at the model sizes of two recipes.

Forward and backward pass, gradient clipping, AdamW and Muon are timed separately, alternating; the optimizer skips
parameters without a gradient, so each algorithm can be timed alone. Steps have the size of nanoGPT's: 12 sequences of 64
tokens for `shakespeare-char`, which are measured completely, and 480 sequences of 1,024 tokens for `gpt2-124m`, of which
the forward and backward pass of one sequence is measured and multiplied by 480. Times are CPU times
(`time.process_time`), which depend less on other load than wall times.
"""

import argparse
import statistics
import sys
import time
from typing import Any

# name: (vocabulary size, layers, hidden size, attention heads, sequences per batch, tokens per sequence, batches per
# step)
SHAPES = {
    "shakespeare-char": (67, 4, 128, 4, 12, 64, 1),
    "gpt2-124m": (50304, 12, 768, 12, 1, 1024, 480),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="model sizes (default: both)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of rounds, times ten for shakespeare-char (default: 5)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts of a step, in milliseconds, and Muon's share."""
    return {"steps": [measure(name, args.repeats * (10 if name == "shakespeare-char" else 1)) for name in args.shape]}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Measure one model size: medians over rounds, and the share computed from them."""
    import torch

    from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
    from minigpt_hf.training.optimizer import muon_adamw

    vocab_size, layers, hidden_size, heads, sequences, tokens, batches = SHAPES[name]
    torch.manual_seed(0)
    config = MiniGPTConfig(
        vocab_size=vocab_size, num_hidden_layers=layers, hidden_size=hidden_size, num_attention_heads=heads
    )
    model = MiniGPTForCausalLM(config).train()
    optimizer = muon_adamw(model, lr=4e-3, muon_lr=0.02)
    ids = torch.randint(vocab_size, (sequences, tokens))
    muon_ids = {id(p) for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]}

    def forward_and_backward() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    def step_of(muon: bool):
        def step() -> None:
            excluded = [(p, p.grad) for p in model.parameters() if (id(p) in muon_ids) != muon]
            for p, _ in excluded:
                p.grad = None
            start = time.process_time()
            optimizer.step()
            seconds.append(time.process_time() - start)
            for p, gradient in excluded:
                p.grad = gradient

        return step

    parts = {
        "forward_and_backward": forward_and_backward,
        "clipping": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "adamw": step_of(False),
        "muon": step_of(True),
    }
    times: dict[str, list[float]] = {part: [] for part in parts}
    for repeat in range(repeats + 1):
        for part, function in parts.items():
            seconds: list[float] = []  # set by `step_of`, which does not time the exclusion of parameters
            start = time.process_time()
            function()
            elapsed = seconds[0] if seconds else time.process_time() - start
            if repeat:  # the first round creates the optimizer state
                times[part].append(elapsed * (batches if part == "forward_and_backward" else 1))
        model.zero_grad()
        if repeat % 10 == 0:
            print(f"{name}: round {repeat} of {repeats}", file=sys.stderr)

    def share(reduce) -> float:
        parts = {part: reduce(values) for part, values in times.items()}
        return parts["muon"] / sum(parts.values())

    return {
        "": name,
        "tokens": sequences * tokens * batches,
        **{f"{part} ms": round(1000 * statistics.median(values), 1) for part, values in times.items()},
        "share of muon": f"{share(statistics.median):.1%}",
        "share of the minima": f"{share(min):.1%}",
    }
