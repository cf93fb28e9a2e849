"""What the maker of a scanner has to do with labels, figures and features: shares, groups, a control.

A network may learn whose picture it sees instead of what is in it: Zech et al. 2018
(doi 10.1371/journal.pmed.1002683) found pneumonia told by the hospital where it was more frequent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from byol_mammo import files, images
from byol_mammo.labels import PROBE_STRENGTH, split_named

GROUPS = ("maker", "archive")  # columns of manifest.csv or labels.csv that figures are parted by
UNKNOWN = "unknown"
CONTROL_FOLDS = 5  # by patient; a maker of fewer patients is left out of the control
# Cramér's V from which labels and makers are said to coincide: what Cohen (Statistical Power Analysis
# for the Behavioral Sciences, 1988, chapter 7) calls a small effect, as 5 % of patients against 11 %.
COINCIDE = 0.1
CHANCE = 0.05  # p-value below which that is no chance
TABLES = ("by_maker.csv", "maker_shares.csv")  # written beside evaluation.csv and compare.csv

Auroc = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # scores, truth, groups -> draws (R,)


def with_groups(
    labels: pd.DataFrame, found: np.ndarray, sources: pd.DataFrame, data_dir: str
) -> pd.DataFrame:
    """Labels with GROUPS as text ('' = unknown): the manifest's, else those of labels.csv; and with the
    manifest's split where labels.csv tells none, as else its test images would be trained on.

    `found` gives the row of `labels` for each of `sources`, as in labels.with_manifest.
    """
    columns = (*GROUPS, "split")
    manifest = images.read_manifest(images.image_folder(os.path.abspath(data_dir)), columns)
    known = sources[["path"]].merge(manifest[["path", *columns]], on="path", how="left")
    known = known.assign(row=found).drop_duplicates("row").set_index("row").reindex(labels.index)
    told = {name: known[name].where(known[name].notna(), labels.get(name, "")) for name in GROUPS}
    if not labels.get("split", pd.Series(dtype=str)).any() and known["split"].any():
        told["split"] = known["split"].map(lambda name: split_named(name) or name, na_action="ignore")
        print("note: labels.csv has no split, manifest.csv tells it", file=sys.stderr)
    return labels.assign(**{name: values.fillna("") for name, values in told.items()})


def parts(values: pd.Series) -> Iterator[tuple[str, np.ndarray]]:
    """Each of several values with its rows (N,) bool; nothing where all have one value."""
    names = values.replace("", UNKNOWN).to_numpy(str)
    groups = np.unique(names)
    yield from ((str(name), names == name) for name in groups if len(groups) > 1)


# Labels and makers ----------------------------------------------------------------------------------


def shares(units: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """How many patients of each group have each finding, and how far the group alone tells it.

    `units` has a row for each image: patient, GROUPS, and findings as 1, 0 or NaN = unknown. A patient
    has a finding that an image of hers has. Columns: by, value, finding, patients, positive_patients,
    share, cramers_v, p, auroc_of_group, coincide. Empty where there is one group alone.
    """
    rows: list[dict[str, Any]] = []
    for by in GROUPS:
        if units[by].nunique() < 2:
            continue
        keys = [units["patient"], units[by].replace("", UNKNOWN).rename(by)]
        women = units[list(names)].groupby(keys).max().reset_index(by)
        for name in names:
            known = women[women[name].notna()]
            counts = known.groupby(by)[name].agg(patients="size", positive_patients="sum")
            told = association(counts["positive_patients"], counts["patients"])
            head = counts.assign(share=counts["positive_patients"] / counts["patients"])
            rows += [
                {"by": by, "value": value, "finding": name, **row, **told}
                for value, row in zip(head.index, head.to_dict("records"), strict=True)
            ]
    return pd.DataFrame(rows).astype({"positive_patients": int} if rows else {})


def association(positive: pd.Series, total: pd.Series) -> dict[str, Any]:
    """Cramér's V, corrected for its bias (Bergsma 2013, doi 10.1016/j.jkss.2012.10.002), its p-value by
    chi-squared, and the AUROC of naming each patient's group alone; no figures where nothing can."""
    from scipy.stats import chi2_contingency

    counts = np.array([positive, total - positive], float)
    if counts.shape[1] < 2 or not counts.sum(1).all():
        return {"coincide": False}
    result, n = chi2_contingency(counts, correction=False), counts.sum()
    sides = [side - (side - 1) ** 2 / (n - 1) for side in counts.shape]
    rest = (counts.shape[0] - 1) * (counts.shape[1] - 1) / (n - 1)
    v = float(np.sqrt(max(0.0, result.statistic / n - rest) / max(1e-9, min(sides) - 1)))
    ranked = counts[:, np.argsort(counts[0] / counts.sum(0))]
    below = ranked[1].cumsum() - ranked[1] / 2
    alone = float((ranked[0] * below).sum() / np.prod(counts.sum(1)))
    coincide = v >= COINCIDE and result.pvalue < CHANCE
    return {
        "cramers_v": v,
        "p": float(result.pvalue),
        "auroc_of_group": alone,
        "coincide": bool(coincide),
    }


def warnings_of(table: pd.DataFrame) -> list[str]:
    """A sentence for each finding that coincides with makers or archives; `table` as of shares."""
    told: list[str] = []
    if table.empty:
        return told
    for (by, name), rows in table[table["coincide"]].groupby(["by", "finding"], sort=False):
        first, *rest = rows.sort_values("share", ascending=False).to_dict("records")
        others = [f"of {row['value']} {row['share']:.0%} of {row['patients']:,}" for row in rest]
        told.append(
            f"{name} and {by} coincide (Cramér's V {first['cramers_v']:.2f}): of {first['value']} "
            f"{first['share']:.0%} of {first['patients']:,} patients have it, {', '.join(others)}; a "
            f"network may learn the {by}, which alone reaches AUROC {first['auroc_of_group']:.2f}"
        )
    return told


def warned(folder: Path) -> list[str]:
    """Those sentences of a folder's maker_shares.csv; none where there is no such table."""
    try:
        return warnings_of(pd.read_csv(folder / TABLES[1]))
    except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged, which its table says
        return []


def note_coinciding(units: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Print those sentences on stderr; returns the table of shares."""
    table = shares(units, names)
    for text in warnings_of(table):
        print(f"warning: {text}", file=sys.stderr)
    return table


# Figures by group -----------------------------------------------------------------------------------


def counts_of(units: pd.DataFrame, name: str) -> dict[str, int]:
    """Images and patients that are known to have a finding or not to have it."""
    known = units[units[name].notna()]
    found = known[known[name] == 1]
    return {
        "images": known["image"].nunique(),
        "patients": known["patient"].nunique(),
        "positive_patients": found["patient"].nunique(),
        "negative_patients": known.loc[known[name] == 0, "patient"].nunique(),
    }


def by_group(
    units: pd.DataFrame,
    names: Sequence[str],
    judge: Callable[[pd.DataFrame], Sequence[dict[str, Any]]],
    fewest: int,
) -> pd.DataFrame:
    """Figures of each group by itself; empty where there is one group alone.

    `units` has image, patient, GROUPS and the findings; `judge` gives rows with `finding` for some of
    them. A finding of fewer than `fewest` patients with it or without it is named, not judged.
    """
    rows: list[dict[str, Any]] = []
    for by in GROUPS:
        for value, chosen in parts(units[by]):
            counts = {name: counts_of(units[chosen], name) for name in names}
            enough = [
                n
                for n, c in counts.items()
                if min(c["positive_patients"], c["negative_patients"]) >= fewest
            ]
            figures = judge(units[chosen]) if enough else []
            for name in names:
                found = [row for row in figures if row["finding"] == name and name in enough]
                few = {} if found else {"note": f"fewer than {fewest} patients with or without"}
                for row in found or [{"finding": name}]:
                    rows.append({"by": by, "value": value, **row, **counts[name], **few})
    return pd.DataFrame(rows)


def intervals(scores: np.ndarray, target: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """95 % percentile intervals of average precision and sensitivity at 90 % specificity under
    resamples: weights (R, N) say how often each of scores (N,) and target (N,) counts.

    Of the calibration error there is none: a sum of absolute gaps is higher in resamples than in the
    sample, so that their percentiles may lie above it.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    draws: dict[str, list[np.ndarray]] = {}
    for part in np.array_split(weights, max(1, weights.size // 2**23)):
        ordered = part[:, order].astype(np.float64)
        found = np.add.reduceat(ordered * target[order], starts, axis=1).cumsum(1)
        alarms = np.add.reduceat(ordered * (1 - target[order]), starts, axis=1).cumsum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.nan_to_num(found / (found + alarms))
            gained = np.diff(found, prepend=0, axis=1) * precision
            right = np.where(alarms <= 0.1 * alarms[:, -1:], found, 0).max(1)
            figures = {
                "average_precision": gained.sum(1) / found[:, -1],
                "sensitivity_at_90_specificity": right / found[:, -1],
            }
        for name, values in figures.items():
            draws.setdefault(name, []).append(values)
    ends = {name: np.nanpercentile(np.concatenate(drawn), (2.5, 97.5)) for name, drawn in draws.items()}
    return {
        f"{name}_{end}": float(v)
        for name, both in ends.items()
        for end, v in zip(("low", "high"), both, strict=True)
    } | {"ece_low": np.nan, "ece_high": np.nan}


# The control ----------------------------------------------------------------------------------------


def control(features: np.ndarray, units: pd.DataFrame, auroc: Auroc, seed: int) -> list[dict[str, Any]]:
    """How well frozen features (N, D) of tiles give the maker away: one row, or none without two makers.

    `units` has row (the image), maker and patient of each tile; an image counts by the mean of its
    tiles. Out of folds by patient: the mean (macro) of each maker's AUROC against the rest with its 95 %
    interval, the share of images whose maker is named right, and that of the commonest maker, which a
    blind guess would name. A maker of fewer than CONTROL_FOLDS patients is left out by name.
    """
    rows, index = np.unique(units["row"], return_inverse=True)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(rows)))
    mean = np.add.reduceat(features[order], starts) / np.bincount(index)[:, None]
    image = units.iloc[order[starts]]
    women = image.groupby("maker")["patient"].nunique()
    left = women[(women < CONTROL_FOLDS) | (women.index == "")].rename({"": UNKNOWN})
    makers = women.index.difference([*left.index, ""])
    if len(women) < 2:
        return []
    row: dict[str, Any] = {"finding": "maker (control)"}
    if len(left):
        row["note"] = f"left out: {', '.join(f'{name} ({n} patients)' for name, n in left.items())}"
    if len(makers) < 2:
        return [row]
    chosen = image["maker"].isin(makers).to_numpy()
    truth, patient = (image.loc[chosen, name].to_numpy(str) for name in ("maker", "patient"))
    odds = named_makers(mean[chosen], truth, patient, seed)
    names = np.unique(truth)
    draws = np.mean([auroc(odds[:, i], truth == name, patient) for i, name in enumerate(names)], axis=0)
    low, high = np.nanpercentile(draws[1:], (2.5, 97.5))
    right = float((names[odds.argmax(1)] == truth).mean())
    majority = float(np.unique(truth, return_counts=True)[1].max() / len(truth))
    figures = {"auroc": float(draws[0]), "low": float(low), "high": float(high)}
    return [row | figures | {"accuracy": right, "majority": majority}]


def named_makers(features: np.ndarray, truth: np.ndarray, patient: np.ndarray, seed: int) -> np.ndarray:
    """Out-of-fold probability (N, makers) of each maker, in sorted order, by a logistic probe like that
    of findings in training; folds keep patients whole."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    logistic = LogisticRegression(C=PROBE_STRENGTH, max_iter=5000, tol=1e-3)
    folds = StratifiedGroupKFold(CONTROL_FOLDS, shuffle=True, random_state=seed % 2**32)
    model = make_pipeline(StandardScaler(), logistic)
    return cross_val_predict(model, features, truth, groups=patient, cv=folds, method="predict_proba")


# Files ----------------------------------------------------------------------------------------------


def write_tables(folder: Path, figures: pd.DataFrame, shared: pd.DataFrame) -> None:
    """Write TABLES and print the figures; where there is one group, an earlier run's are removed."""
    for name, table in zip(TABLES, (figures, shared), strict=True):
        if len(table):
            files.write_atomic(folder / name, table.to_csv(index=False))
        else:
            (folder / name).unlink(missing_ok=True)
    if figures.empty:
        return
    wanted = "by value level start finding auroc auroc_low auroc_high low high".split()
    wanted += ["images", "patients", "positive_patients", "note"]
    shown = figures[[name for name in wanted if name in figures]].dropna(axis=1, how="all")
    print(shown.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.3f}"))
