"""Grades of images, density and BI-RADS: words, figures, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from byol_mammo import pictures
from byol_mammo.labels import GRADES


def graded_figures(
    truth: np.ndarray, mean: np.ndarray, grade: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Quadratic weighted kappa of `grade` (N,) and Spearman's correlation of `mean` (N,), both with
    `truth` (N,), under each row of `weights` (R, N), how often an image counts: each (R,), NaN where
    truth is of one grade."""
    from scipy.stats import spearmanr

    correlation = np.full(len(weights), np.nan)
    for index, weight in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(len(truth)), weight)
        if np.ptp(truth[drawn]) > 0 and np.ptp(mean[drawn]) > 0:
            correlation[index] = spearmanr(mean[drawn], truth[drawn]).statistic
    return {"kappa": quadratic_kappa(truth, grade, weights), "rank_correlation": correlation}


def quadratic_kappa(truth: np.ndarray, grade: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cohen's kappa with squared distances of grades, of all resamples at once, see graded_figures.

    As scikit-learn's cohen_kappa_score where all grades between the lowest and the highest occur; where
    not, that one takes those beside a gap for neighbours, and each resample for a scale of its own.
    """
    share = weights.astype(float) / weights.sum(1, keepdims=True)
    truths, given = share @ truth, share @ grade
    by_chance = share @ truth**2 + share @ grade**2 - 2 * truths * given
    varied = share @ truth**2 - truths**2 > 1e-9
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(varied, 1 - share @ (truth - grade) ** 2 / by_chance, np.nan)


def grade_word(name: str, grade: float) -> str:
    """A grade as its scale writes it: B of density 2, 4 of BI-RADS 4."""
    return GRADES[name][2][int(grade) - 1]


def describe(name: str, row: dict[str, Any]) -> str:
    """An answer in a few words; `row` as of predictions.csv."""
    if name not in GRADES:
        return f"{name}: {row[f'p_{name}']:.0%} for the image"
    unit = "" if grade_word(name, 1) == "1" else f", {grade_word(name, 1)} = 1"
    mean = f"mean {row[f'expected_{name}']:.1f}{unit}"
    return f"{name}: {grade_word(name, row[f'grade_{name}'])} ({mean})"


def draw_grades(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    """grades.png: how many images of each grade (`<name>`) were given which (`grade_<name>`)."""
    from sklearn.metrics import confusion_matrix

    graded = [name for name in names if name in GRADES]
    figure, panels = pictures.panel_grid(len(graded), min(2, len(graded)), 3.4)
    for axes, name in zip(panels, graded, strict=True):
        known = table[[name, f"grade_{name}"]].dropna().astype(int)
        scale = sorted({*known.to_numpy().ravel().tolist()})
        counts = confusion_matrix(*known.to_numpy().T, labels=scale)
        axes.imshow(counts, cmap="cividis")
        for (row, column), count in np.ndenumerate(counts):
            light = "black" if count > counts.max() / 2 else "white"
            axes.text(column, row, f"{count:,}", color=light, ha="center", va="center", fontsize=9)
        words = [grade_word(name, grade) for grade in scale]
        axes.set_xticks(range(len(scale)), words)
        axes.set_yticks(range(len(scale)), words)
        axes.set(xlabel="given", ylabel="in labels.csv")
        axes.set_title(f"{name}: images, attention", fontsize=10)
    pictures.save_figure(figure, path)
