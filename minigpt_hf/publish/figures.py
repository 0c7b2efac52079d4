"""Figures of training logs. The only module that imports matplotlib; import it where a figure is drawn.

Inputs are the rows of `log.jsonl`. Values that are not finite numbers are omitted; an empty log results in empty axes.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Log = list[dict[str, Any]]

TRAINING, VALIDATION = "#8da9c4", "#b5341f"
# Palette for color vision deficiency (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def draw_learning(log: Log, file: Path) -> None:
    """Draw training and validation loss in nats per token, and in bits per byte, against training tokens."""
    figure = Figure(figsize=(9, 3.6), dpi=150)
    # A layout engine would measure the labels, which takes as long as drawing them.
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.14, top=0.96, wspace=0.2)
    # The log has no bits per byte of a loss with label smoothing.
    training = "training, smoothed labels" if not columns(log, "bits_per_byte")[0] else "training"
    for axes, name, unit in zip(
        figure.subplots(1, 2), ("loss", "bits_per_byte"), ("loss (nats per token)", "bits per byte"), strict=True
    ):
        tokens, values = columns(log, name)
        if tokens:
            axes.plot(tokens, values, color=TRAINING, linewidth=1.2, label=training)
        tokens, values = columns(log, f"eval_{name}")
        if tokens:
            axes.plot(tokens, values, color=VALIDATION, linewidth=1.5, marker="o", markersize=4, label="validation")
            best = min(range(len(values)), key=values.__getitem__)
            axes.annotate(
                f"{values[best]:.3f}",
                (tokens[best], values[best]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                color=VALIDATION,
            )
            axes.margins(y=0.14)
        _finish(axes, unit)
    figure.savefig(file)


def draw_training(log: Log, file: Path) -> None:
    """Draw learning rate, gradient norm and throughput against training tokens."""
    figure = Figure(figsize=(9, 2.8), dpi=150)
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.18, top=0.95, wspace=0.34)
    units = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
    for axes, (name, unit) in zip(figure.subplots(1, 3), units.items(), strict=True):
        axes.plot(*columns(log, name), color=COLORS[0], linewidth=1.2)
        axes.set_ylim(bottom=0)
        _finish(axes, unit)
        # 0.00025 fits into the margin, 0.00025000 does not.
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
    figure.savefig(file)


def draw_comparison(logs: dict[str, Log], kind: str) -> bytes:
    """Draw training and validation of several runs in bits per byte, which is comparable between tokenizers.

    Args:
        logs: Rows of `log.jsonl` by name of the run.
        kind: Format: `png`, `svg` or `pdf`.

    Returns:
        The content of the file.
    """
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    labels = []
    for (name, log), color in zip(logs.items(), (COLORS * len(logs))[: len(logs)], strict=True):
        axes.plot(*columns(log, "bits_per_byte"), color=color, linewidth=0.8, alpha=0.4)
        tokens, values = columns(log, "eval_bits_per_byte")
        labels.append(f"{name} ({min(values):.3f})" if values else f"{name} (not validated)")
        axes.plot(tokens, values, color=color, linewidth=1.6, marker="o", markersize=4, label="run")
    _finish(axes, "bits per byte (thin: training)")
    if (legend := axes.get_legend()) is not None:
        # matplotlib would omit labels that begin with `_` and typeset text between two `$` as mathematics.
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_parse_math(False)
            text.set_text("".join(c if c.isprintable() else repr(c)[1:-1] for c in label))
    figure.savefig(content := BytesIO(), format=kind)
    return content.getvalue()


def columns(log: Log, name: str) -> tuple[list[float], list[float]]:
    """Return training tokens and the values of a column, for the rows in which both are finite numbers."""
    rows = [row for row in log if isinstance(row, dict) and is_number(row.get("tokens")) and is_number(row.get(name))]
    return [row["tokens"] for row in rows], [row[name] for row in rows]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that matplotlib can draw."""
    return type(value) in (int, float) and abs(value) < 1e300  # False for NaN and infinity


def _finish(axes: Axes, unit: str) -> None:
    axes.set_xlabel("training tokens")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def short(value: float) -> str:
    """Format a number with a decimal prefix: 1_500_000 becomes "1.5 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
