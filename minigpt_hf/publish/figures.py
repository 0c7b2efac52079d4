"""The log of a training -> pictures.

In: the rows of `log.jsonl`. Out: PNG files. It refuses nothing: an empty log gives an empty picture.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_loss(log: list[dict[str, Any]], results: dict[str, Any], file: Path) -> None:
    """Training and validation loss against tokens seen, in nats per token."""
    trained = [(row["tokens"], row["loss"]) for row in log if "loss" in row]
    validated = [(row["tokens"], row["eval_loss"]) for row in log if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_columns(trained), color="#8da9c4", linewidth=1.2, label="training (mean between two lines of the log)")
    if validated:
        axes.plot(*_columns(validated), color="#b5341f", linewidth=1.5, marker="o", markersize=4, label="validation")
        tokens, loss = min(validated, key=lambda row: row[1])
        axes.annotate(
            f"{loss:.3f}", (tokens, loss), xytext=(0, -14), textcoords="offset points", ha="center", color="#b5341f"
        )
        axes.margins(y=0.12)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if trained:
        axes.legend(frameon=False)
    figure.savefig(file)


def _columns(rows: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in rows], [y for _, y in rows]


def _short(value: float) -> str:
    """1_500_000 -> "1.5 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
