"""Whether a recipe's learning rates are right for other widths too: the loss around them, at each width.

Both rates are halved and doubled, one at a time. Losses only: it may run beside other work.
"""

import argparse
import sys
from typing import Any

from benchmarks.trial import prepare
from minigpt_hf.training.arguments import MiniGPTTrainingArguments
from minigpt_hf.training.recipe import read_recipe

RATES = {"muon_learning_rate": "Muon", "learning_rate": "AdamW"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("--data", required=True, help="the text, e.g. tinyshakespeare.txt")
    parser.add_argument("--recipe", default="shakespeare-char", help="whose rates (default: shakespeare-char)")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="(default: 64 128 256)")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 2.0], help="of each rate (default: 0.5 2)")
    parser.add_argument("--max_steps", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train at each width with the recipe's rates, and with each of them changed."""
    recipe = read_recipe(args.recipe)
    rates = {name: recipe.get(name, MiniGPTTrainingArguments.__dataclass_fields__[name].default) for name in RATES}
    changes = [{}, *({name: rates[name] * factor} for name in RATES for factor in args.factors)]
    table, gaps = [], {}
    for width in args.widths:
        # A feed-forward layer of 8/3 of the width, heads of the recipe's size, as many tokens.
        head = recipe["hidden_size"] // recipe["num_attention_heads"]
        inner = round(width * 8 / 3 / 8) * 8
        flags = ["--data", args.data, "--seed", str(args.seed), "--use_cpu", "--hidden_size", str(width)]
        flags += ["--num_attention_heads", str(max(1, width // head)), "--intermediate_size", str(inner)]
        flags += ["--max_steps", str(args.max_steps or recipe["max_steps"])]
        losses = []
        for change in changes:
            used = rates | change
            trial = prepare(args.recipe, [*flags, *(word for name in RATES for word in (f"--{name}", str(used[name])))])
            losses.append(trial.run())
            row = {"width": width, "parameters": f"{trial.model.num_parameters():,}"}
            table.append({**row, **{RATES[name]: used[name] for name in RATES}, "loss": f"{losses[-1]:.4f}"})
            print("   ".join(f"{name} {value}" for name, value in table[-1].items()), file=sys.stderr, flush=True)
        gaps[f"width_{width}_recipe_above_best"] = round(losses[0] - min(losses), 4)
    return {"recipe": args.recipe, "scaling": table, **gaps}
