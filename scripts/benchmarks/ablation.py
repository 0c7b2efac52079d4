"""What each part of a recipe gives: one thing changed at a time, several seeds, mean and spread of the validation loss.

Losses only: it may run beside other work. With `--log FILE` rows are kept as they come, and a second start goes on.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trial import prepare
from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.blocks import Blocks
from minigpt_hf.training.recipe import read_recipe


@dataclass(frozen=True)
class Change:
    """Flags of `minigpt train` that differ from the recipe, or what no flag can say.

    `batch` multiplies the batch and divides the steps, so that the tokens are as many.
    """

    flags: tuple[str, ...] = ()
    batch: float = 1.0
    start: Callable[[MiniGPTForCausalLM], None] = lambda model: None
    cut: type[Blocks] = Blocks


class FixedCuts(Blocks):
    """Every epoch shows the same blocks, in another order, as most trainings do."""

    def shift(self, epoch: int) -> int:
        return 0


def _embeddings_at_008(model: MiniGPTForCausalLM) -> None:
    """The prototype's start: a standard deviation of 0.08 where the recipe has 0.02."""
    model.model.embed_tokens.weight.data.mul_(4)


def _branches_at_zero(model: MiniGPTForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


def _branches_as_all(model: MiniGPTForCausalLM) -> None:
    """Without GPT-2's factor of 1/√2L on what leaves a branch."""
    factor = (2 * len(model.model.layers)) ** 0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(factor)
        layer.mlp.down_proj.weight.data.mul_(factor)


def _flags(line: str) -> Change:
    return Change(tuple(line.split()))


# Some of these are what a recipe has already: leave them out with --only.
CHANGES = {
    "the recipe": Change(),
    "AdamW 2e-3 for all": _flags("--no_muon --learning_rate 2e-3"),
    "AdamW 4e-3 for all": _flags("--no_muon --learning_rate 4e-3"),
    "AdamW 8e-3 for all": _flags("--no_muon --learning_rate 8e-3"),
    "Muon 0.01": _flags("--muon_learning_rate 0.01"),
    "Muon 0.03": _flags("--muon_learning_rate 0.03"),
    "Muon 0.04": _flags("--muon_learning_rate 0.04"),
    "AdamW 2e-3 beside Muon": _flags("--learning_rate 2e-3"),
    "AdamW 8e-3 beside Muon": _flags("--learning_rate 8e-3"),
    "Muon momentum 0.9": _flags("--muon_momentum 0.9"),
    "Muon momentum 0.95": _flags("--muon_momentum 0.95"),
    "AdamW beta2 0.99": _flags("--adam_beta2 0.99"),
    "weight decay 0.1": _flags("--weight_decay 0.1"),
    "no warm-up": _flags("--warmup_steps 0"),
    "cosine schedule": _flags("--lr_scheduler_type cosine"),
    "constant rate after warm-up": _flags("--lr_scheduler_type constant_with_warmup"),
    "no gradient clipping": _flags("--max_grad_norm 1000000"),
    "embeddings not tied": _flags("--tie_word_embeddings false"),
    "embeddings start with 0.08": Change(start=_embeddings_at_008),
    "branches start at zero": Change(start=_branches_at_zero),
    "branches start as other matrices": Change(start=_branches_as_all),
    "all start with 0.04": _flags("--initializer_range 0.04"),
    "the same cuts in each epoch": Change(cut=FixedCuts),
    "half the batch, twice the steps": Change(batch=0.5),
    "twice the batch, half the steps": Change(batch=2),
    "2 heads": _flags("--num_attention_heads 2"),
    "8 heads": _flags("--num_attention_heads 8"),
    "rotary base 1,000": _flags("--rope_theta 1000"),
    "rotary base 10,000": _flags("--rope_theta 10000"),
    "dropout 0.05": _flags("--residual_dropout 0.05"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("--data", required=True, help="the text, e.g. tinyshakespeare.txt")
    parser.add_argument("--recipe", default="shakespeare-char", help="what is taken apart (default: shakespeare-char)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CHANGES),
        choices=CHANGES,
        metavar="CHANGE",
        help="some of: " + "; ".join(CHANGES),
    )
    parser.add_argument("--max_steps", type=int, help="fewer steps, to try this command")
    parser.add_argument("--log", type=Path, help="a file that keeps each row as it comes, and is not computed twice")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the recipe and each change of it with every seed; the seeds take turns."""
    rows = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    losses = {(row["recipe"], row["change"], row["seed"], row["max_steps"]): row["loss"] for row in rows}
    for seed in args.seeds:
        for name in args.only:
            key = (args.recipe, name, seed, args.max_steps)
            if key not in losses:
                losses[key] = _loss(args, CHANGES[name], seed)
                print(f"seed {seed}   {name:<36} {losses[key]:.4f}", file=sys.stderr, flush=True)
                if args.log:
                    row = dict(zip(("recipe", "change", "seed", "max_steps"), key, strict=True))
                    with args.log.open("a") as file:
                        file.write(json.dumps({**row, "loss": losses[key]}) + "\n")
    table = []
    for name in args.only:
        values = [losses[args.recipe, name, seed, args.max_steps] for seed in args.seeds]
        base = [losses.get((args.recipe, "the recipe", seed, args.max_steps)) for seed in args.seeds]
        gap = None if None in base else f"{statistics.mean(values) - statistics.mean(base):+.4f}"
        spread = f"{max(values) - min(values):.4f}"
        table.append(
            {"change": name, "loss": f"{statistics.mean(values):.4f}", "spread": spread, "against_recipe": gap}
        )
    return {"recipe": args.recipe, "seeds": args.seeds, "ablation": table}


def _loss(args: argparse.Namespace, change: Change, seed: int) -> float:
    recipe = read_recipe(args.recipe)
    steps = round((args.max_steps or recipe["max_steps"]) / change.batch)
    batch = round(recipe["per_device_train_batch_size"] * change.batch)
    flags = ["--data", args.data, "--seed", str(seed), "--use_cpu"]
    flags += ["--max_steps", str(steps), "--per_device_train_batch_size", str(batch), *change.flags]
    return prepare(args.recipe, flags, start=change.start, cut=change.cut).run()
