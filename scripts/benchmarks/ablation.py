"""Ablation: validation loss of a recipe with one setting changed at a time, as mean and range over several seeds.

Only losses are compared, so other load on the machine does not matter. With `--log FILE` each result is appended to a
file, and results that the file already holds are not computed again.
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
from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.training.recipe import read_recipe


@dataclass(frozen=True)
class Change:
    """One modification of a recipe.

    Args:
        flags: Additional flags of `minigpt train`.
        batch_factor: Multiplies the batch size and divides the number of steps; the number of tokens is unchanged.
        initialize: Modifies the initialized weights in place.
        dataset_class: The dataset that splits the token stream into sequences.
    """

    flags: tuple[str, ...] = ()
    batch_factor: float = 1.0
    initialize: Callable[[MiniGPTForCausalLM], None] = lambda model: None
    dataset_class: type[SequenceDataset] = SequenceDataset


class FixedOffsetSequences(SequenceDataset):
    """Sequences that are the same in every epoch, in a different order, as is common practice."""

    def epoch_offset(self, epoch: int) -> int:
        return 0


def _embedding_std_008(model: MiniGPTForCausalLM) -> None:
    """Multiply the initial embeddings, and the constant in them, by 0.08 / `initializer_range`."""
    model.model.embed_tokens.weight.data.mul_(0.08 / model.config.initializer_range)


def _zero_residual_projections(model: MiniGPTForCausalLM) -> None:
    """Initialize the projections that write to the residual stream to zero."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


def _unscaled_residual_projections(model: MiniGPTForCausalLM) -> None:
    """Undo GPT-2's factor 1/√(2L) on the projections that write to the residual stream."""
    factor = (2 * len(model.model.layers)) ** 0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(factor)
        layer.mlp.down_proj.weight.data.mul_(factor)


def _flags(line: str) -> Change:
    return Change(tuple(line.split()))


# Some of these equal settings of a recipe: exclude them with --only.
CHANGES = {
    "unchanged": Change(),
    "AdamW for all parameters, lr 2e-3": _flags("--no_muon --learning_rate 2e-3"),
    "AdamW for all parameters, lr 4e-3": _flags("--no_muon --learning_rate 4e-3"),
    "AdamW for all parameters, lr 8e-3": _flags("--no_muon --learning_rate 8e-3"),
    "Muon lr 0.01": _flags("--muon_learning_rate 0.01"),
    "Muon lr 0.03": _flags("--muon_learning_rate 0.03"),
    "Muon lr 0.04": _flags("--muon_learning_rate 0.04"),
    "AdamW lr 2e-3": _flags("--learning_rate 2e-3"),
    "AdamW lr 8e-3": _flags("--learning_rate 8e-3"),
    "Muon momentum 0.85": _flags("--muon_momentum 0.85"),
    "Muon momentum 0.9": _flags("--muon_momentum 0.9"),
    "Muon momentum 0.95": _flags("--muon_momentum 0.95"),
    "Muon without second moments": _flags("--muon_beta2 0"),
    "no positional heads": _flags("--positional_heads none"),
    "no multi-token prediction": _flags("--mtp_loss_weight 0"),
    "AdamW beta2 0.99": _flags("--adam_beta2 0.99"),
    "weight decay 0.1": _flags("--weight_decay 0.1"),
    "warmup 20 steps": _flags("--warmup_steps 20"),
    "cosine schedule": _flags("--lr_scheduler_type cosine"),
    "constant schedule with warmup": _flags("--lr_scheduler_type constant_with_warmup"),
    "no gradient clipping": _flags("--max_grad_norm 1000000"),
    "untied embeddings": _flags("--tie_word_embeddings false"),
    "embedding std 0.08": Change(initialize=_embedding_std_008),
    "residual projections zero": Change(initialize=_zero_residual_projections),
    "residual projections unscaled": Change(initialize=_unscaled_residual_projections),
    "initializer range 0.05": _flags("--initializer_range 0.05"),
    "same offset in every epoch": Change(dataset_class=FixedOffsetSequences),
    "half the batch size, twice the steps": Change(batch_factor=0.5),
    "twice the batch size, half the steps": Change(batch_factor=2),
    "2 attention heads": _flags("--num_attention_heads 2"),
    "8 attention heads": _flags("--num_attention_heads 8"),
    "RoPE theta 1,000": _flags("--rope_theta 1000"),
    "RoPE theta 10,000": _flags("--rope_theta 10000"),
    "residual dropout 0.05": _flags("--residual_dropout 0.05"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--data", required=True, help="training text, e.g. tinyshakespeare.txt")
    parser.add_argument("--recipe", default="shakespeare-char", help="recipe to modify (default: shakespeare-char)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds (default: 0 1 2)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CHANGES),
        choices=CHANGES,
        metavar="CHANGE",
        help="changes to measure (default: all): " + "; ".join(CHANGES),
    )
    parser.add_argument("--max_steps", type=int, help="number of steps (default: that of the recipe)")
    parser.add_argument("--log", type=Path, help="JSON Lines file of results, read and appended to")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the recipe with each change and each seed, and report the mean, range and difference from the recipe."""
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
        baseline = [losses.get((args.recipe, "unchanged", seed, args.max_steps)) for seed in args.seeds]
        difference = None if None in baseline else f"{statistics.mean(values) - statistics.mean(baseline):+.4f}"
        value_range = f"{max(values) - min(values):.4f}"
        table.append(
            {"change": name, "loss": f"{statistics.mean(values):.4f}", "range": value_range, "difference": difference}
        )
    return {"recipe": args.recipe, "seeds": args.seeds, "ablation": table}


def _loss(args: argparse.Namespace, change: Change, seed: int) -> float:
    recipe = read_recipe(args.recipe)
    steps = round((args.max_steps or recipe["max_steps"]) / change.batch_factor)
    batch_size = round(recipe["per_device_train_batch_size"] * change.batch_factor)
    flags = ["--data", args.data, "--seed", str(seed), "--use_cpu"]
    flags += ["--max_steps", str(steps), "--per_device_train_batch_size", str(batch_size), *change.flags]
    return prepare(args.recipe, flags, initialize=change.initialize, dataset_class=change.dataset_class).run()
