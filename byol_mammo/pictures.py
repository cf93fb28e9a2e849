"""All that matplotlib draws of tiles, views and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from byol_mammo import files, processes, tracking
from byol_mammo.images import ImageReadError

EXTRACTION_PICTURES = ("segmentation.png", "grid.png", "tiles.png")
# Okabe & Ito's colours stay apart for the colour-blind.
OKABE_ITO = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BREAST_COLOUR, MUSCLE_COLOUR = "#56b4e9", "#e69f00"
PICTURE_WIDTH = 5.6  # inches: text of 9-10 pt stays readable where a phone shrinks the picture


@dataclass(frozen=True)
class Outcome:
    """What became of a tile."""

    column: str  # the criterion that it failed; '' = kept
    title: str
    colour: str
    marker: str
    threshold: float = 0
    spared_by: tuple[str, float] = ("", 0)  # column and threshold that would have kept it nevertheless


@dataclass(frozen=True)
class Sample:
    """One image as the extraction sees it, for the pictures."""

    title: str
    image: np.ndarray  # (H, W) uint8 or uint16
    mask: np.ndarray  # (H, W) bool
    muscle: np.ndarray  # (H, W) bool
    table: pd.DataFrame  # score_tiles
    window: tuple[float, float]  # grey levels
    tile_size: int  # px


def list_outcomes(criteria: Sequence[Any], settings: Any) -> list[Outcome]:
    """What may become of a tile: kept, or failed at one of the criteria of `settings`."""
    outcomes = [Outcome("", "kept", "#009e73", "s")]
    for c in criteria:
        other, setting = c.spared_by
        spared_by = (other, getattr(settings, setting) if setting else 0)
        threshold = getattr(settings, c.setting)
        outcomes.append(Outcome(c.column, c.title, c.colour, c.marker, threshold, spared_by))
    return outcomes


def extraction_samples(
    sources: pd.DataFrame, load: Callable[[int, pd.Series], Sample], folder: Path, count: int = 4
) -> list[Sample]:
    """A few images of a cache's `folder` that gave tiles, evenly spaced, as `load` gives them."""
    rejections = pd.read_csv(folder / "rejections.csv", keep_default_na=False)
    usable = np.flatnonzero(rejections["kept"])
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int))]
    samples, sources = [], sources.set_index("image")
    for index in chosen:
        with suppress(ImageReadError, KeyError):  # changed or gone since it was extracted
            samples.append(load(index, sources.loc[rejections["image"][index]]))
    return samples


def draw_extraction(samples: list[Sample], outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write EXTRACTION_PICTURES of some images."""
    draw_segmentation(samples, folder / "segmentation.png")
    draw_grid(samples, outcomes, folder / "grid.png")
    draw_tiles(samples, outcomes, folder / "tiles.png")


def draw_qc_pages(
    sources: pd.DataFrame,
    load: Callable[[int, pd.Series], Sample],
    outcomes: list[Outcome],
    folder: Path,
    workers: int,
    mode: str,
) -> None:
    """<number>.png for each image: outlines and tile centres by outcome, to flip through.

    `load` gives what is drawn of a row of `sources`; `mode`: of progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (index, source, load, outcomes, folder / f"{index:06d}.png")
        for index, source in sources.iterrows()
        if not (folder / f"{index:06d}.png").is_file()
    ]
    bar = tracking.progress(mode=mode, total=len(jobs), desc="qc pages", unit="page")
    processes.run_in_parallel(make_qc_page, jobs, workers, bar)


def make_qc_page(
    index: int,
    source: pd.Series,
    load: Callable[[int, pd.Series], Sample],
    outcomes: list[Outcome],
    path: Path,
) -> None:
    """One page of draw_qc_pages."""
    cv2.setNumThreads(1)
    try:
        draw_qc_page(load(index, source), outcomes, path)
    except ImageReadError as error:
        draw_qc_page(f"image {index}: {error.reason}", [], path)


def draw_qc_page(content: Sample | str, outcomes: Sequence[Outcome], path: Path) -> None:
    """A page about one image: its outlines and tiles, or the reason why there are none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8))
    axes = figure.add_subplot()
    if isinstance(content, str):
        axes.set_title(content, fontsize=9)
        axes.set_axis_off()
    else:
        outline(axes, content)
        mark_tiles(axes, content, outcomes)
        figure.legend(loc="lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def outline(axes: Any, sample: Sample) -> None:
    """Show an image with the outlines of breast and muscle."""
    show_grey(axes, sample.image, sample.title, *sample.window)
    for area, colour in ((sample.mask, BREAST_COLOUR), (sample.muscle, MUSCLE_COLOUR)):
        contours, _ = cv2.findContours(area.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        for points in contours:
            axes.plot(*points[:, 0].T, color=colour, linewidth=1.2)


def mark_tiles(axes: Any, sample: Sample, outcomes: Sequence[Outcome]) -> None:
    """Mark the centres of an image's tiles by outcome."""
    centre = sample.table[["x", "y"]] + sample.tile_size / 2
    for outcome in outcomes:
        points = centre[sample.table["rejected_by"] == outcome.column]
        style = {"c": outcome.colour, "marker": outcome.marker, "label": outcome.title}
        axes.scatter(points["x"], points["y"], s=14, **style)


def panel_grid(count: int, columns: int, row_height: float) -> tuple[Any, list[Any]]:
    """A figure PICTURE_WIDTH wide with `count` panels in rows of `columns`, and those panels."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure: Any = Figure(figsize=(PICTURE_WIDTH, row_height * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def draw_segmentation(samples: list[Sample], path: Path) -> None:
    """segmentation.png: outlines of breast and muscle over each image."""
    figure, panels = panel_grid(len(samples), 2, 3.5)
    for axes, sample in zip(panels, samples, strict=True):
        outline(axes, sample)
    figure.suptitle("Breast (blue) and pectoral muscle (orange)", fontsize=11)
    save_figure(figure, path)


def draw_grid(samples: list[Sample], outcomes: Sequence[Outcome], path: Path) -> None:
    """grid.png: the tiles' centres over each image, by what became of a tile."""
    figure, panels = panel_grid(len(samples), 2, 3.7)
    for axes, sample in zip(panels, samples, strict=True):
        show_grey(axes, sample.image, sample.title, *sample.window)
        mark_tiles(axes, sample, outcomes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle("Centres of the tiles: kept, or why not", fontsize=11)
    save_figure(figure, path)


def draw_tiles(samples: list[Sample], outcomes: Sequence[Outcome], path: Path) -> None:
    """tiles.png: kept tiles of the highest speck energy and convergence, and rejected ones."""
    tables = [sample.table.assign(number=number) for number, sample in enumerate(samples)]
    table = pd.concat(tables, ignore_index=True)
    kept = table[table["rejected_by"] == ""]
    specks = in_turn(kept.sort_values("freq_energy", ascending=False), "number")[:3]
    others = kept.drop(specks.index).sort_values("convergence", ascending=False)
    lost = table[(table["rejected_by"] != "") & (table["breast_ratio"] > 0)]
    lost = in_turn(lost.sort_values("breast_ratio", ascending=False), "rejected_by")
    rows = {0: specks, 3: in_turn(others, "number")[:3], 6: lost[:6]}
    figure, panels = panel_grid(12, 3, 2.35)
    for axes in panels:
        axes.set_axis_off()
    for first, group in rows.items():
        for axes, (_, tile) in zip(panels[first:], group.iterrows(), strict=False):
            sample, reason = samples[tile["number"]], tile["rejected_by"]
            area = tuple(slice(tile[axis], tile[axis] + sample.tile_size) for axis in "yx")
            masked = np.where(sample.mask[area], sample.image[area], 0)
            text = f"energy {tile['freq_energy']:.3f}\nconvergence {tile['convergence']:.2f}"
            if reason:
                failed = next(outcome for outcome in outcomes if outcome.column == reason)
                text = f"{failed.title}\n{tile[reason]:.3g}, limit {failed.threshold:g}"
                other, bar = failed.spared_by
                name = other.removeprefix("freq_")  # as of the kept tiles
                text += f"\n{name} {tile[other]:.3g}, limit {bar:g}" if bar else ""
            show_grey(axes, masked, text, *sample.window)
    figure.suptitle("Kept: highest energy, then convergence. Below: rejected", fontsize=11)
    save_figure(figure, path)


def in_turn(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows reordered: the first of each group of column `by`, then each group's second, ..."""
    return table.iloc[np.argsort(table.groupby(by).cumcount().to_numpy(), kind="stable")]


def draw_views(columns: dict[str, np.ndarray], path: Path) -> None:
    """views.png: a column for each title, a row for each tile of (count, S, S) grey values."""
    rows = len(next(iter(columns.values())))
    figure, panels = panel_grid(len(columns) * rows, len(columns), 6 / len(columns))
    for index, axes in enumerate(panels):
        row, column = divmod(index, len(columns))
        title = list(columns)[column]
        show_grey(axes, columns[title][row], title if row == 0 else "", 0, 1)
    save_figure(figure, path)


def draw_curves(
    metrics: pd.DataFrame, curves: dict[str, dict[str, str]], collapse_std: float, path: Path
) -> None:
    """curves.png: those of learning_curves that are known, against the step."""
    known = set(metrics.columns[metrics.notna().any()])
    curves = {title: lines for title, lines in curves.items() if known & set(lines.values())}
    figure, panels = panel_grid(len(curves), 2, 2.5)
    for axes, (title, lines) in zip(panels, curves.items(), strict=True):
        for (label, name), colour in zip(lines.items(), OKABE_ITO[1::3], strict=False):
            line = metrics[["step", name]].dropna()
            marker = "." if len(line) < 30 else ""
            axes.plot(line["step"], line[name], marker=marker, color=colour, label=label)
        if "std" in title:
            axes.axhline(collapse_std, color=OKABE_ITO[0], linestyle="--", label="collapse")
        if "std" in title or "RankMe" in title or "speed" in title:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        if len(lines) > 1:  # above the curves: a dip below the line of collapse must be seen
            axes.set_ylim(top=axes.get_ylim()[1] + 0.45 * np.ptp(axes.get_ylim()))
            axes.legend(fontsize=8, loc="upper center", ncols=2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_embedding(features: Tensor, tiles: pd.DataFrame, views: np.ndarray, path: Path) -> None:
    """embedding.png: features (N, D) of tiles on their two main axes, coloured by what is known.

    `views` (N,): CC, MLO or '' where that is not known.
    """
    unit, values, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    x, y = (unit[:, :2] * values[:2]).T.tolist()
    share = values**2 / (values**2).sum().clamp_min(1e-12)
    known = bool(views.astype(bool).any())
    names = {
        "mean_intensity": "mean grey (0-255)",
        "freq_energy": "speck energy",
        "convergence": "convergence",
    }
    figure, panels = panel_grid(len(names) + known, 2, 2.9)
    for axes, (name, title) in zip(panels, names.items(), strict=False):
        low, high = np.percentile(tiles[name], (2, 98))  # a few outliers would take all colours
        dots = axes.scatter(x, y, s=8, c=tiles[name], cmap="cividis", vmin=low, vmax=high)
        axes.set_title(title, fontsize=10)
        figure.colorbar(dots, ax=axes).ax.tick_params(labelsize=8)
    if known:
        for view, colour in zip(sorted(set(views)), OKABE_ITO, strict=False):
            points = np.column_stack([x, y])[views == view].T
            panels[-1].scatter(*points, s=8, color=colour, label=view or "unknown")
        panels[-1].set_title("view", fontsize=10)
        panels[-1].legend(fontsize=8)
    for axes in panels:
        axes.set_xlabel(f"1st axis ({share[0]:.0%} of variance)", fontsize=9)
        axes.set_ylabel(f"2nd axis ({share[1]:.0%})", fontsize=9)
        axes.tick_params(labelsize=8)
    save_figure(figure, path)


def show_grey(axes: Any, image: np.ndarray, title: str, low: float, high: float) -> None:
    """Show an image in grey, without ticks."""
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="antialiased")
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[], frame_on=False)  # not axis off: the notebook adds a ruler


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=160, bbox_inches="tight", facecolor="white")
