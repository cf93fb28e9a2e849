"""AUROC, intervals and p-values from a bootstrap over patients, and calibration."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

FEW_STUDIES = 20  # below which percentile intervals cover clearly less than 95 %


def resample_groups(groups: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(1 + draws, N) how often each row counts: once, then by groups (N,) drawn with replacement."""
    names, index = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng([seed, 9])
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.vstack([np.ones(len(names), int), counts]).astype(np.float32)[:, index]


def weighted_auroc(scores: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC (R,) of scores (N,) for target (N,) 0 or 1 under each row of weights (R, N); ties are half.

    NaN where a resample lacks a class. One sort serves all resamples.
    """
    values, order = np.unique(scores, return_inverse=True)[0], np.argsort(scores, kind="stable")
    starts = np.searchsorted(scores[order], values)
    out = []
    for part in np.array_split(weights, max(1, weights.size // 2**23)):
        ordered = part[:, order].astype(np.float64)
        positive = np.add.reduceat(ordered * target[order], starts, axis=1)
        negative = np.add.reduceat(ordered * (1 - target[order]), starts, axis=1)
        below = negative.cumsum(1) - negative / 2
        with np.errstate(invalid="ignore"):
            out.append((positive * below).sum(1) / (positive.sum(1) * negative.sum(1)))
    return np.concatenate(out)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap draws; resamples without both classes are left out."""
    low, high = np.nanpercentile(draws, (2.5, 97.5)) if np.isfinite(draws).any() else (np.nan, np.nan)
    return float(low), float(high)


def note_few(names: Sequence[str], targets: np.ndarray, groups: np.ndarray) -> None:
    """Say on stderr for which findings a bootstrap over studies can't be taken at its word.

    The rarer kind of study decides: by simulation 95 % intervals cover 73 % with 3 of them, 91 % with
    10 and 94 % with 20, whatever the number of the others.
    """
    few = []
    for name, target in zip(names, targets.T, strict=True):
        count = [len(set(groups[target == value])) for value in (1, 0)]
        if min(count) < FEW_STUDIES:
            few.append(f"{name} ({count[0]} studies with, {count[1]} without)")
    if few:
        print(
            f"note: intervals and p-values are too narrow for {', '.join(few)}: the bootstrap needs "
            f"{FEW_STUDIES} and more of both",
            file=sys.stderr,
        )


def paired_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the bootstrap: how rarely the resampled difference (R,) changes sign; NaN
    where no resample has one."""
    finite = differences[np.isfinite(differences)]
    if not len(finite):
        return np.nan
    tail = min((finite <= 0).sum(), (finite >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(finite) + 1)))


def calibration_error(scores: np.ndarray, target: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017) over `bins` of equally many, equal scores together:
    most tiles have a probability near 0, and with equal steps they would be one bin."""
    edges = np.quantile(scores, np.arange(1, bins) / bins)
    index = np.searchsorted(edges, scores, side="right")
    gap = np.bincount(index, scores, bins) - np.bincount(index, target, bins)
    return float(np.abs(gap).sum() / len(scores))
