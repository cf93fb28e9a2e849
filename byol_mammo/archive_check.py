"""What is unusual in an archive's images: a table and contact sheets, the oddest first.

An image is held against the rest of its own source, which is a folder of images and a view: what all of
them show is how that source is, not what is odd about one of them.
"""

from __future__ import annotations

import io
import math
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from byol_mammo import anatomy, files, framing, images, processes, tracking
from byol_mammo.settings import MammoError

MIN_SOURCE = 10  # images of a source, at least, for one of them to be held against the rest
FEW = 0.1  # share of a source that dissents from the rest, at most
END_DEPTH = 0.02  # share of the picture's height that counts as its end
WIDE_END = 0.5  # share of the mask's width that lies at an end of the picture, from which it is said
USUAL_Z = 2.0  # robust standard deviations within which a share is usual
# Measures that are held against the median of the source, and their least standard deviation: where
# images are alike, a hair's breadth is not odd.
HELD = {"mask_share": 0.02, "outline": 0.1, "aspect": 0.02}
LEAST_PART = 0.05  # of the oddity, from which a sign is named
TABLE = "check.csv"
SHEET = re.compile(r"sheet_\d{3,}\.png")
COLUMNS = [
    *("sheet", "place", "image", "study_id", "laterality", "view", "oddity", "signs", "reason"),
    *("polarity", "vote", "muscle_share", "upper_end", "lower_end", "tiles", "chest_wall", "source"),
    *HELD,
    *(f"{name}_z" for name in HELD),
]


@dataclass(frozen=True)
class Method:
    """What training makes of an image: the main script's functions, on reduced copies, and settings."""

    read: Callable[[str, str], tuple[np.ndarray, framing.ReducedImage, float]]  # path, polarity
    find_breast: Callable[[framing.ReducedImage], np.ndarray]
    find_muscle: Callable[[framing.ReducedImage, np.ndarray, str], np.ndarray]  # the last: view
    score_tiles: Callable[..., pd.DataFrame]  # image, mask, settings, spacing, muscle
    window: Callable[[np.ndarray, np.ndarray], tuple[float, float]]  # image, mask
    settings: Any


# Measures of one image ------------------------------------------------------------------------------


def look_at(index: int, source: dict[str, Any], method: Method) -> tuple[dict[str, Any], bytes]:
    """What is measured in an image, `reason` telling why nothing is, and its picture as PNG."""
    cv2.setNumThreads(1)
    known = {"index": index, "reason": ""}
    try:
        measures, picture = measure(source, method)
        return known | measures, cv2.imencode(".png", picture)[1].tobytes()
    except images.ImageReadError as error:
        reason = error.reason
    except MemoryError:
        reason = "needs more memory than there is"
    except Exception as error:  # what trips the method is what is sought here
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return known | {"reason": reason}, b""


def measure(source: dict[str, Any], method: Method) -> tuple[dict[str, Any], np.ndarray]:
    """The measures of COLUMNS of an image, and its picture (h, w, 3) uint8 with outlines.

    Raises ImageReadError.
    """
    view = source["view"]
    image, small, margin = method.read(source["path"], source["polarity"])
    votes = framing.polarity_votes(framing.content_of(image))  # on the image as it is used
    breast = method.find_breast(small)
    muscle = method.find_muscle(small, breast, view)
    mask = small.enlarged(breast)
    tiles = method.score_tiles(
        image, mask, method.settings, source["spacing_mm"], small.enlarged(muscle) & mask
    )
    fits = min(image.shape) >= method.settings.tile_size  # else training leaves the image out
    if view == "CC":  # where training takes none to be: would one be seen?
        muscle = method.find_muscle(small, breast, "")
    depth = max(1, round(END_DEPTH * len(breast)))
    width = max(1, int(breast.any(axis=0).sum()))
    at_left = (anatomy.chest_side(breast) == 0) != small.mirrored
    measures = {
        "polarity": "inverted" if margin < -framing.MIN_INVERTED else "as_is",
        "vote": framing.polarity_margin(votes) if votes else math.nan,
        "mask_share": float(breast.mean()),
        "outline": outline_length(breast),
        "aspect": math.log(image.shape[0] / image.shape[1]),
        "muscle_share": float(muscle.sum() / max(1, breast.sum())),
        "upper_end": float((breast[:depth].mean(axis=0) > 0.5).sum() / width),
        "lower_end": float((breast[-depth:].mean(axis=0) > 0.5).sum() / width),
        "tiles": int((tiles["rejected_by"] == "").sum()) if fits else 0,
        "chest_wall": ("left" if at_left else "right") if breast.any() else "",
    }
    return measures, outlined(image, mask, small.enlarged(muscle) & mask)


def outline_length(breast: np.ndarray) -> float:
    """Length of a mask's outline over the root of its area: 4 of a square, more of what is ragged."""
    contours, _ = cv2.findContours(breast.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    length = sum(cv2.arcLength(points, True) for points in contours)
    return length / math.sqrt(breast.sum()) if breast.any() else math.nan


# Signs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sign:
    """Something that may be odd about an image."""

    name: str
    weight: float  # in the oddity, of a sign at strength 1 that no other image of the source shows
    meaning: str
    strength: Callable[[pd.DataFrame], pd.Series]  # of each image, 0 = not shown; NaN counts as 0


def doubt(table: pd.DataFrame) -> pd.Series:
    """How far the vote on the image as it is used is below one that is clear, 1 at none."""
    return ((framing.CLOSE_VOTE - table["vote"]) / framing.CLOSE_VOTE).clip(0, 2)


def dissent(table: pd.DataFrame) -> pd.Series:
    """Whether an image is a negative and nearly all of its source are not, or the other way round."""
    alike = table.groupby(["source", "polarity"])["image"].transform("size")
    return (table["size"] >= MIN_SOURCE) & (alike <= FEW * table["size"])


def far_from_usual(z: pd.Series) -> pd.Series:
    """How far a measure is from its source's median, 1 at twice what is usual."""
    return (z.abs() / USUAL_Z - 1).clip(0, 2)


def wide_end(shares: pd.Series) -> pd.Series:
    """1 where all of the mask's width lies at an end of the picture."""
    return ((shares - WIDE_END) / (1 - WIDE_END)).clip(0, 1)


def wrong_side(table: pd.DataFrame) -> pd.Series:
    """Whether the chest wall is not where that of this laterality is: in nearly all of the source, as
    where all were mirrored to one side, else on its own side of the picture."""
    known = table[table["laterality"].isin(["L", "R"]) & table["chest_wall"].isin(["left", "right"])]
    right = (known["chest_wall"] == "right").astype(float)
    groups = right.groupby([known["source"], known["laterality"]])
    share, size = groups.transform("mean"), groups.transform("size")
    usual = (known["laterality"] == "R").astype(float)
    settled = (size >= MIN_SOURCE) & ((share <= FEW) | (share >= 1 - FEW))
    usual = usual.where(~settled, share.round())
    return (right != usual).reindex(table.index, fill_value=False)


SIGNS = (
    Sign("unreadable", 6, "cannot be read", lambda t: t["reason"] != ""),
    Sign("no breast", 6, "nothing is found that is a breast", lambda t: t["mask_share"] == 0),
    Sign("polarity in doubt", 3, "the votes are close, or say that it is a negative", doubt),
    Sign("polarity dissents", 3, "a negative among others, or not", dissent),
    Sign("mask share", 3, "the mask covers more or less than usual",
         lambda t: far_from_usual(t["mask_share_z"])),
    Sign("outline", 2, "the mask is more ragged than usual",
         lambda t: far_from_usual(t["outline_z"].clip(lower=0))),
    Sign("aspect", 2, "the image is wider or higher than usual: turned, cropped or stretched",
         lambda t: far_from_usual(t["aspect_z"])),
    Sign("no tile", 2, "training by its usual settings would keep no tile", lambda t: t["tiles"] == 0),
    Sign("side", 2, "the chest wall is not on the side of the laterality", wrong_side),
    Sign("upper end", 1, "the mask lies along the upper end of a CC view",
         lambda t: wide_end(t["upper_end"]).where(t["view"] == "CC")),
    Sign("lower end", 1, "the mask lies along the lower end", lambda t: wide_end(t["lower_end"])),
    Sign("muscle on CC", 2, "what looks like pectoral muscle",
         lambda t: (t["view"] == "CC") & (t["muscle_share"] > 0)),
    Sign("no muscle on MLO", 2, "no pectoral muscle is found",
         lambda t: (t["view"] == "MLO") & (t["muscle_share"] == 0) & (t["mask_share"] > 0)),
)  # fmt: skip


def add_sources(table: pd.DataFrame) -> pd.DataFrame:
    """The columns source, size (of the source) and z of HELD: folder and view, or as much of that as
    MIN_SOURCE images share."""
    folder = table["image"].map(lambda name: str(Path(name).parent))
    source = pd.Series("all", table.index)
    for names in (table["view"], folder, folder + " " + table["view"]):
        size = names.groupby(names).transform("size")
        source = names.where(size >= MIN_SOURCE, source)
    table = table.assign(source=source, size=source.groupby(source).transform("size"))
    for name, least in HELD.items():
        table[f"{name}_z"] = np.nan
        for _, values in table[name].dropna().groupby(source):
            middle, spread = images.median_and_spread(values.to_numpy())
            if len(values) >= MIN_SOURCE:
                table.loc[values.index, f"{name}_z"] = (values - middle) / max(spread, least)
    return table


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """The table of measures with `source`, `signs` and `oddity`, the oddest image first.

    A sign counts by its strength, and by how rare it is in its source: in full where the image is alone
    with it or too few are there to tell, not at all where all show it. `signs` are those that count, the
    heaviest first; `attrs["shown"]` tells how many images show each.
    """
    table = add_sources(table)
    strength = pd.DataFrame({s.name: s.strength(table).astype(float).fillna(0) for s in SIGNS})
    alike = (strength > 0).groupby(table["source"]).transform("sum").clip(lower=1)
    rarity = 1 - np.log(alike).div(np.log(table["size"].clip(lower=2)), axis=0)
    rarity[table["size"] < MIN_SOURCE] = 1.0
    parts = strength * rarity * [sign.weight for sign in SIGNS]
    signs = [
        "; ".join(row[row >= LEAST_PART].sort_values(ascending=False, kind="stable").index)
        for _, row in parts.iterrows()
    ]
    table = table.assign(oddity=parts.sum(axis=1), signs=signs)
    table = table.sort_values(["oddity", "image"], ascending=[False, True], ignore_index=True)
    table.attrs["shown"] = (strength > 0).sum().to_dict()
    return table


# Pictures -------------------------------------------------------------------------------------------

CELL = (216, 300)  # px, width and height of the place of an image on a sheet
CAPTION = 46  # px below it, three lines
SHEET_COLUMNS, SHEET_ROWS = 6, 5
BREAST_BGR, MUSCLE_BGR = (233, 180, 86), (0, 159, 230)  # Okabe & Ito's blue and orange
LINE_LENGTH = 33  # characters of a caption's line


def outlined(
    image: np.ndarray, mask: np.ndarray, muscle: np.ndarray, cell: tuple[int, int] = CELL
) -> np.ndarray:
    """An image (H, W) within a cell, with the outlines of breast and muscle: (h, w, 3) uint8."""
    scale = min(1.0, cell[0] / image.shape[1], cell[1] / image.shape[0])
    size = tuple(max(1, round(scale * length)) for length in image.shape[::-1])
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    low, high = np.percentile(small, (0.5, 99.5))
    grey = ((small - low) * (255 / max(high - low, 1))).clip(0, 255).astype(np.uint8)
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    for area, colour in ((mask, BREAST_BGR), (muscle, MUSCLE_BGR)):
        part = cv2.resize(area.view(np.uint8) * np.uint8(255), size, interpolation=cv2.INTER_AREA)
        contours, _ = cv2.findContours(
            (part > 127).view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(picture, contours, -1, colour, 1, cv2.LINE_AA)
    return picture


def caption(row: pd.Series) -> str:
    """Place and name, what is known, and what is odd, in three lines of LINE_LENGTH characters."""
    name = str(Path(row["image"]).with_suffix(""))
    said = " ".join(filter(None, (row["laterality"], row["view"], f"{row['oddity']:.1f}")))
    told = textwrap.wrap(f"{said}  {row['reason'] or row['signs']}", LINE_LENGTH, max_lines=2)
    return "\n".join([f"{row['place']}  {name[-LINE_LENGTH + 5 :]}", *told])


def draw_sheet(rows: pd.DataFrame, pictures: BinaryIO) -> Image.Image:
    """A contact sheet of rows of the table; `pictures` holds theirs."""
    width, height = CELL[0] + 8, CELL[1] + CAPTION + 8
    lines = math.ceil(len(rows) / SHEET_COLUMNS)
    canvas = Image.new("RGB", (width * SHEET_COLUMNS, height * lines), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for number, (_, row) in enumerate(rows.iterrows()):
        left, top = width * (number % SHEET_COLUMNS) + 4, height * (number // SHEET_COLUMNS) + 4
        draw.rectangle((left, top, left + CELL[0], top + CELL[1]), "#e8e8e8")
        offset, length = row["picture"]
        if length:
            pictures.seek(offset)
            canvas.paste(Image.open(io.BytesIO(pictures.read(length))), (left, top))
        draw.multiline_text((left, top + CELL[1] + 2), caption(row), "black", font, spacing=2)
    return canvas


# The check ------------------------------------------------------------------------------------------


def list_images(path: Path) -> pd.DataFrame:
    """The images of a folder, or those that a manifest.csv lists, as images.list_sources has them.

    Raises MammoError.
    """
    if path.is_dir():
        return images.list_sources(path)
    if path.name != "manifest.csv" or not path.is_file():
        raise MammoError(
            f"{path} is neither a folder of images nor the manifest.csv of one that "
            "prepare_dataset.py laid out"
        )
    root = Path(path.parent.absolute())
    sources = images.read_manifest(root)
    sources["image"] = [Path(os.path.relpath(name, root)).as_posix() for name in sources["path"]]
    if sources.empty:
        raise MammoError(f"{path} lists no image")
    for column in ("study_id", "laterality", "view", "polarity"):
        sources[column] = sources[column].astype(object).where(sources[column].notna(), "")
    return sources


def check(
    sources: pd.DataFrame, method: Method, folder: Path, workers: int, mode: str
) -> tuple[pd.DataFrame, int]:
    """Write TABLE and sheets of `sources` to `folder`; returns the table and the number of sheets.

    What an earlier check left there goes first; TABLE comes last. Raises MammoError, StoppedError or
    OSError. `mode`: of progress.
    """
    prepare_folder(folder)
    sources = sources.assign(polarity=images.known_polarity(sources, "auto"))
    columns = ["path", "view", "polarity", "spacing_mm"]
    rows = sources[columns].assign(
        spacing_mm=sources["spacing_mm"].astype(object).where(sources["spacing_mm"].notna(), None)
    )
    jobs = [(index, row, method) for index, row in enumerate(rows.to_dict("records"))]
    records: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryFile(dir=folder) as pictures:  # gone whatever ends this process

        def keep(result: tuple[dict[str, Any], bytes]) -> None:
            record, picture = result
            records[record.pop("index")] = record | {"picture": (pictures.tell(), len(picture))}
            pictures.write(picture)

        measure_all(jobs, workers, keep, records, mode)
        measured = pd.DataFrame([records[index] for index in range(len(jobs))])
        known = sources[["image", "study_id", "laterality", "view"]].reset_index(drop=True)
        absent = [name for name in COLUMNS if name not in known and name not in measured]
        table = judge(known.join(measured).assign(**dict.fromkeys(absent, np.nan)))
        return table, write_all(table, pictures, folder)


def measure_all(
    jobs: Sequence[tuple[int, dict[str, Any], Method]],
    workers: int,
    keep: Callable[[tuple[dict[str, Any], bytes]], None],
    records: dict[int, dict[str, Any]],
    mode: str,
) -> None:
    """look_at of all jobs, whose results go to `keep`. Raises MammoError where a process died."""
    bar = tracking.progress(mode=mode, total=len(jobs), desc="check", unit="image")
    try:
        processes.run_in_parallel(look_at, jobs, workers, bar, done=keep)
    except BrokenProcessPool as error:
        suspects = [job[1]["path"] for job in jobs if job[0] not in records]
        named = ", ".join(suspects[: min(workers, processes.available_cores())])
        raise MammoError(
            f"a process was killed at one of {named}, for want of memory perhaps; lower --num_workers. "
            "If it ends there again, one of these files crashes its decoder: move it away"
        ) from error


def prepare_folder(folder: Path) -> None:
    """Make the folder of the results. Raises MammoError where its TABLE is not of a check."""
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_unfinished(folder)
    path = folder / TABLE
    if path.exists():
        files.read_table(
            path,
            ["image", "oddity", "signs"],
            "it is not of an earlier check: give another --output_dir",
        )


def write_all(table: pd.DataFrame, pictures: BinaryIO, folder: Path) -> int:
    """Write the sheets and then TABLE, in place of an earlier check's; returns the number of sheets."""
    (folder / TABLE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if SHEET.fullmatch(path.name):
            path.unlink()
    on_sheet = SHEET_COLUMNS * SHEET_ROWS
    place = np.arange(len(table))
    names = [f"sheet_{number:03d}.png" for number in place // on_sheet + 1]
    table["sheet"], table["place"] = names, place % on_sheet + 1
    for name, rows in table.groupby("sheet"):
        with files.atomic_path(folder / str(name)) as temporary:
            draw_sheet(rows, pictures).save(temporary)
    files.write_atomic(folder / TABLE, table[COLUMNS].round(3).to_csv(index=False))
    return len(set(names))


def summary(table: pd.DataFrame, sheets: int, folder: Path) -> str:
    """What was found, in lines: how many images show which sign, and the first ones."""
    lines = [f"{len(table)} images, {sheets} sheets and {TABLE} in {folder}, the oddest first"]
    counts = table.attrs["shown"]
    lines += [f"  {s.name:<18} {counts[s.name]:>6}  {s.meaning}" for s in SIGNS if counts[s.name]]
    first = table["image"][table["signs"] != ""].head(3).tolist()
    return "\n".join([*lines, f"look at {', '.join(first)} first" if first else "nothing is odd"])
