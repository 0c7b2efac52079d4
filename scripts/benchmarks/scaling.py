"""Transfer of learning rates across widths: validation loss for multiples of a recipe's learning rates.

At each width the learning rates of Muon and AdamW are halved and doubled, one at a time. Only losses are compared, so
other load on the machine does not matter.
"""

import argparse
import sys
from typing import Any

from benchmarks.trial import prepare
from minigpt_hf.training.arguments import MiniGPTTrainingArguments
from minigpt_hf.training.recipe import read_recipe

RATES = {"muon_learning_rate": "Muon", "learning_rate": "AdamW"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--data", required=True, help="training text, e.g. tinyshakespeare.txt")
    parser.add_argument("--recipe", default="shakespeare-char", help="(default: shakespeare-char)")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 256], help="hidden sizes (default: 64 128 256)"
    )
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.5, 2.0], help="factors of each learning rate (default: 0.5 2)"
    )
    parser.add_argument("--max_steps", type=int, help="number of steps (default: that of the recipe)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train at each width with the recipe's learning rates, and with each of them scaled by each factor."""
    recipe = read_recipe(args.recipe)
    rates = {name: recipe.get(name, MiniGPTTrainingArguments.__dataclass_fields__[name].default) for name in RATES}
    changes = [{}, *({name: rates[name] * factor} for name in RATES for factor in args.factors)]
    table, differences = [], {}
    for width in args.widths:
        # MLP of 8/3 of the width rounded to a multiple of 8, the recipe's head dimension, fitting positional heads.
        head_dim = recipe["hidden_size"] // recipe["num_attention_heads"]
        heads = max(1, width // head_dim)
        intermediate_size = round(width * 8 / 3 / 8) * 8
        flags = ["--data", args.data, "--seed", str(args.seed), "--use_cpu", "--hidden_size", str(width)]
        flags += [
            "--num_attention_heads",
            str(heads),
            "--intermediate_size",
            str(intermediate_size),
        ]
        flags += ["--max_steps", str(args.max_steps or recipe["max_steps"])]
        losses = []
        for change in changes:
            used_rates = rates | change
            trial = prepare(
                args.recipe, [*flags, *(word for name in RATES for word in (f"--{name}", str(used_rates[name])))]
            )
            losses.append(trial.run())
            row = {"width": width, "parameters": f"{trial.model.num_parameters():,}"}
            table.append({**row, **{RATES[name]: used_rates[name] for name in RATES}, "loss": f"{losses[-1]:.4f}"})
            print("   ".join(f"{name} {value}" for name, value in table[-1].items()), file=sys.stderr, flush=True)
        differences[f"width_{width}_recipe_minus_best"] = round(losses[0] - min(losses), 4)
    return {"recipe": args.recipe, "scaling": table, **differences}
