"""How well a classifier does, drawn: ROC, precision and recall, reliability, its training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from byol_mammo import pictures


def line_styles() -> Iterator[tuple[str, str]]:
    """Colour and line style of one finding after the other, without end."""
    return itertools.cycle((c, line) for line in ("-", "--", "-.") for c in pictures.OKABE_ITO)


def draw_curves(
    tables: dict[str, pd.DataFrame],
    names: Sequence[str],
    folder: Path,
    levels: Sequence[str] = ("tile", "image_max"),
) -> None:
    """roc.png, pr.png of two levels and reliability.png of the first."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    kinds: dict[str, tuple[str, str, str]] = {
        "roc": ("1 - specificity (false alarms)", "sensitivity (found)", "ROC"),
        "pr": ("recall (found)", "precision (right alarms)", "PR"),
    }
    for kind, (x_name, y_name, title) in kinds.items():
        figure, panels = pictures.panel_grid(2, 2, 3.1)
        for axes, level in zip(panels, levels, strict=True):
            for index, (name, (colour, line)) in enumerate(zip(names, line_styles(), strict=False)):
                known = tables[level][tables[level][name].notna()]
                target, scores = known[name].to_numpy(float), known[f"p_{name}"].to_numpy(float)
                if len(set(target.tolist())) < 2:
                    continue
                if kind == "roc":
                    x, y, _ = roc_curve(target, scores)
                else:
                    y, x, _ = precision_recall_curve(target, scores)
                    axes.axhline(target.mean(), color=colour, linestyle=":", linewidth=1)
                label = f"{name} ({int(target.sum())} of {len(target)})"
                width = max(0.8, 3 / (1 + index))  # curves that coincide all show
                axes.plot(x, y, color=colour, linestyle=line, linewidth=width, label=label)
            if kind == "roc":
                axes.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
            axes.set(xlabel=x_name, ylabel=y_name, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
            words = level.replace("_", ", ")
            axes.set_title(f"{title}, {words} (dotted: chance)", fontsize=9)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
            axes.grid(alpha=0.3)
        pictures.save_figure(figure, folder / f"{kind}.png")
    draw_reliability(tables[levels[0]], names, folder / "reliability.png", levels[0].split("_")[0])


def draw_reliability(table: pd.DataFrame, names: Sequence[str], path: Path, level: str) -> None:
    """How often a finding was there against the probability given, tiles or images in ten steps."""
    figure, (axes,) = pictures.panel_grid(1, 1, 4.4)
    axes.plot([0, 1], [0, 1], color="#999999", linestyle=":", label="perfect")
    for name, (colour, line) in zip(names, line_styles(), strict=False):
        known = table[table[name].notna()]
        step = np.minimum((known[f"p_{name}"] * 10).astype(int), 9)
        points = known.groupby(step)[[f"p_{name}", name]].mean()
        x, y = points[f"p_{name}"], points[name]
        axes.plot(x, y, marker="o", color=colour, linestyle=line, label=name)
    axes.set(xlabel="probability given", ylabel=f"share of {level}s with the finding")
    axes.set_title(f"Reliability, {level} level", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    pictures.save_figure(figure, path)


def draw_training(rows: list[dict[str, float]], names: Sequence[str], path: Path) -> None:
    """curves.png: loss and validation AUROC against the epoch; epoch 0 is the frozen probe."""
    table = pd.DataFrame(rows)
    figure, (left, right) = pictures.panel_grid(2, 2, 3.0)
    left.plot(table["epoch"][1:], table["loss"][1:], marker=".", color="#000000")
    left.set_title("training loss (cross-entropy)", fontsize=9)
    for name, (colour, line) in zip(names, line_styles(), strict=False):
        x, y = table["epoch"], table[f"auroc_{name}"]
        right.plot(x, y, marker=".", color=colour, linestyle=line, label=name)
    right.set_title("validation AUROC (0: probe)", fontsize=9)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    pictures.save_figure(figure, path)
