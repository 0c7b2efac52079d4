"""Attention of the positional heads before and after training.

The initial model of a recipe and a trained model folder read the same validation text. For each head that the recipe
initializes to attend d tokens back, the table shows the mean attention to that token, over all positions with at least
16 previous tokens. `--figure` draws the mean attention of these heads to each of the last 8 tokens.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.trial import prepare
from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.training.arguments import parse_positional_heads

MAX_DISTANCE = 8
CONTEXT = 16  # previous tokens of the positions that are averaged
SEQUENCES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--data", required=True, help="training text, e.g. tinyshakespeare.txt")
    parser.add_argument("--recipe", default="shakespeare-char", help="(default: shakespeare-char)")
    parser.add_argument("--model", type=Path, required=True, help="model folder trained with the recipe")
    parser.add_argument("--seed", type=int, default=42, help="seed of the training run (default: 42)")
    parser.add_argument("--figure", type=Path, help="file to draw to, e.g. attention.svg")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the attention of each positional head in the initial and in the trained model."""
    trial = prepare(args.recipe, ["--data", args.data, "--seed", str(args.seed), "--use_cpu"])
    data, architecture, training = trial.arguments
    heads = [
        (layer, head, distance)
        for layer, of_layer in enumerate(parse_positional_heads(architecture.positional_heads))
        for head, distance in enumerate(of_layer)
    ]
    if not heads:
        raise SystemExit(f"the recipe {args.recipe} has no positional_heads")
    validation = SequenceDataset(trial.validation, data.block_size, training.seed)
    sequences = [validation[0, index] for index in range(min(SEQUENCES, len(validation)))]
    ids = validation.collate(sequences)["input_ids"]
    trial.model.set_attn_implementation("eager")
    trained = MiniGPTForCausalLM.from_pretrained(args.model, attn_implementation="eager")
    before, after = (attention_by_distance(model.eval(), ids) for model in (trial.model, trained))
    if args.figure:
        draw(heads, before, after, args.figure)
    table = [
        {
            "layer": layer,
            "head": head,
            "distance": distance,
            "before": f"{before[layer, head, distance]:.2f}",
            "after": f"{after[layer, head, distance]:.2f}",
        }
        for layer, head, distance in heads
    ]
    return {"recipe": args.recipe, "sequences": len(sequences), "attention": table}


@torch.no_grad()
def attention_by_distance(model: MiniGPTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean attention of each head to the token d back, for d from 0 to `MAX_DISTANCE`: [L, N, MAX_DISTANCE + 1]."""
    layers = model(ids, output_attentions=True, use_cache=False).attentions  # L times [B, N, T, T]
    return torch.stack(
        [
            torch.stack(
                [
                    weights.diagonal(-distance, 2, 3)[:, :, CONTEXT - distance :].mean((0, 2))
                    for distance in range(MAX_DISTANCE + 1)
                ],
                dim=1,
            )
            for weights in layers
        ]
    )


def draw(heads: list[tuple[int, int, int]], before: torch.Tensor, after: torch.Tensor, file: Path) -> None:
    """Draw one panel for each state of the model, with one row for each head and one column for each distance."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(9, 0.9 + 0.32 * len(heads)), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, attention, title in zip(panels, (before, after), ("before training", "after training"), strict=True):
        rows = torch.stack([attention[layer, head] for layer, head, _ in heads]).numpy()
        image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, (_, _, distance) in enumerate(heads):
            axes.add_patch(Rectangle((distance - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d55e00", linewidth=1.5))
            for column, value in enumerate(rows[row].tolist()):
                color = "white" if value > 0.5 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("distance in tokens")
        axes.set_xticks(range(MAX_DISTANCE + 1))
        axes.set_yticks(range(len(heads)), [f"layer {layer}, head {head}" for layer, head, _ in heads], fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=list(panels), label="mean attention", shrink=0.8)
    figure.savefig(file)
