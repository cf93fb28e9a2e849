"""labels.csv, tiles that hold a finding, groups of patients, the online probe."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from byol_mammo import files, one_scale, tables
from byol_mammo.settings import MammoError

LABEL_COVER = 0.25  # share of a box that makes a tile positive, even without the box's centre
PROBE_TILES = 2000  # labelled tiles of the online probe, half of them positive where there are enough
PROBE_FOLDS = 3  # by study
PROBE_STRENGTH = 0.01  # inverse weight decay of its logistic regression on standardised features
# VinDr-Mammo's names of findings that have a column of another name.
FINDING_ALIASES = {"suspicious_calcification": "calcification"}
SPLIT_NAMES = {  # what others call ours, in any case of letters
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# What has an order, by the name of the target: its column, how a cell is read, its grades from 1 on.
GRADES = {
    "density": ("breast_density", tables.density, "ABCD"),
    "birads": ("breast_birads", tables.birads, "123456"),
}

# What stands around such a name in those of folders: train_images, Training-set, images_test.
SPLIT_EXTRAS = r"(?:images?|imgs?|data|set|png|dicom)"


def split_named(name: str) -> str:
    """The split that a cell or a folder's name means, such as train_images; '' where it means none."""
    extras = rf"^(?:{SPLIT_EXTRAS}[\W_]+)+|(?:[\W_]*{SPLIT_EXTRAS})+$"
    return SPLIT_NAMES.get(re.sub(extras, "", name.lower()), "")


def finding_column(name: str) -> str:
    """The column of labels.csv of a finding: its name in snake case, or what FINDING_ALIASES says."""
    column = re.sub(r"\W+", "_", name.strip().lower())
    return FINDING_ALIASES.get(column, column)


def read_labels(path: str | Path, findings: Sequence[str]) -> pd.DataFrame:
    """labels.csv as written by prepare_dataset.py, one row for each image.

    Columns: `image` (path relative to the file's folder, or a bare name), each of `findings` as float
    (1, also where a box has it, 0, NaN = unknown; those of GRADES 1, 2, ...), `boxes` as lists of dicts
    with `finding` (set of column names), xmin, ymin, xmax, ymax in px; the others as text, '' where
    absent (study_id, patient_id, split, laterality, view, breast_density). Raises MammoError with file,
    row and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise MammoError(f"labels {path}: no such file; prepare_dataset.py --findings_csv writes it")
    columns = [GRADES[name][0] if name in GRADES else name for name in findings]
    table = files.read_table(path, ["image", *columns], "prepare_dataset.py --findings_csv writes it")
    twice = table["image"][table["image"].map(os.path.normpath).duplicated()]  # ./a.png is a.png
    if len(twice):
        raise MammoError(f"labels {path}: {twice.iloc[0]} has more than one row")
    for name in findings:
        if name in GRADES:
            table[name] = _read_grades(path, table, name)
            continue
        number = pd.to_numeric(table[name].replace("", "nan"), errors="coerce")
        wrong = ~(number.isin([0, 1]) | table[name].str.lower().isin(["", "nan"]))
        if wrong.any():
            row = table[wrong].iloc[0]
            raise MammoError(
                f"labels {path}: {name} of {row['image']} is {row[name]!r}, not 0, 1 or empty"
                + "".join(f"; --findings {g} learns it" for g in GRADES if GRADES[g][0] == name)
            )
        table[name] = number
    for name in ("study_id", "patient_id", "split", "laterality", "view", "breast_density", "boxes"):
        if name not in table:
            table[name] = ""
    for name in ("study_id", "patient_id", "laterality", "view"):
        table[name] = table[name].map(tables.person)  # NA is no patient
    check_studies(path, table)
    table["split"] = table["split"].map(lambda name: split_named(name) or name)
    table["boxes"] = [
        _read_boxes(path, *row) for row in zip(table["image"], table["boxes"], strict=True)
    ]
    findings = [name for name in findings if name not in GRADES]
    for name, boxed in zip(findings, has_box(table["boxes"], findings).T, strict=True):
        denied = np.flatnonzero(boxed & (table[name] == 0))
        if len(denied):
            raise MammoError(
                f"labels {path}, line {denied[0] + 2}: {name} of {table['image'].iloc[denied[0]]} is 0, "
                f"and a box of {name} stands beside it; correct one of them"
            )
        table[name] = table[name].mask(boxed, 1.0)
    return table


def has_box(boxes: pd.Series, findings: Sequence[str]) -> np.ndarray:
    """(N, findings) bool: which rows of labels have a box of which finding; NaN stands for no row."""
    lists = [row if isinstance(row, list) else [] for row in boxes]
    rows = [[any(name in box["finding"] for box in row) for name in findings] for row in lists]
    return np.array(rows, bool).reshape(len(boxes), len(findings))


def _read_grades(path: Path, table: pd.DataFrame, name: str) -> pd.Series:
    """The grades of a target of GRADES as float, 1 the lowest, NaN = unknown. Raises MammoError.

    BI-RADS 0 asks for more images and is no grade: its rows are counted on stderr.
    """
    column, read, scale = GRADES[name]
    if name in table:
        raise MammoError(
            f"labels {path}: both {column} and {name} are columns, --findings {name} may mean either; "
            "rename the second"
        )
    cells = table[column]
    read_as = cells.map(lambda cell: read(cell).rpartition(" ")[2][:1])
    wrong = (read_as == "") & ~cells.str.lower().isin(tables.UNSAID)
    if wrong.any():
        raise MammoError(
            f"labels {path}: {column} of {table['image'][wrong].iloc[0]} is {cells[wrong].iloc[0]!r}; "
            f"{tables.UNDERSTOOD[read]} understood, and an empty cell where it is unknown"
        )
    off = (read_as != "") & ~read_as.isin([*scale])
    if off.any():
        print(
            f"note: {off.sum():,} images of {cells[off].iloc[0]} have no {name}: it is no grade",
            file=sys.stderr,
        )
    return read_as.map({letter: float(grade) for grade, letter in enumerate(scale, 1)})


def _read_boxes(path: Path, image: str, text: str) -> list[dict[str, Any]]:
    """The boxes of one row; their findings by column name. Raises MammoError."""
    try:
        boxes = json.loads(text or "[]")
        for box in boxes:
            if not isinstance(box["finding"], list):  # a name alone would be taken for its letters
                raise TypeError(f"finding is {box['finding']!r}, not a list of names")
            box["finding"] = {finding_column(name) for name in box["finding"]}
            edges = [float(box[name]) for name in ("xmin", "ymin", "xmax", "ymax")]
            if not all(map(math.isfinite, edges)) or edges[2] <= edges[0] or edges[3] <= edges[1]:
                raise ValueError(f"box {edges} has no area")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise MammoError(f"labels {path}: boxes of {image} can't be read ({error!r})") from error
    return boxes


def check_layout(folder: Path, data_dir: Path) -> None:
    """Refuse labels of one layout of prepare_dataset.py for images of another, whose names are the same:
    one may be mirrored, and boxes and splits are of one alone. Raises MammoError."""
    own = next((p for p in (data_dir, data_dir.parent) if (p / "manifest.csv").is_file()), None)
    theirs = folder / "manifest.csv"
    if own is None or data_dir.is_relative_to(folder) or not theirs.is_file():
        return
    if theirs.read_bytes() != (own / "manifest.csv").read_bytes():
        raise MammoError(
            f"labels {folder / 'labels.csv'} are of another layout than the images in {data_dir}: "
            f"boxes may be mirrored there and splits others; give {own / 'labels.csv'}, which "
            "prepare_dataset.py writes with --findings_csv"
        )


def match_labels(
    labels: pd.DataFrame, folder: Path, images: Sequence[str], data_dir: Path
) -> np.ndarray:
    """Row of `labels` for each of `images` (paths relative to data_dir), -1 where there is none.

    `folder` is that of labels.csv. A path there is first taken from that folder. Else it stands for the
    image whose path ends in it, such as a bare file name, where that is one image and one row: an image
    of the same name in another folder is another image. Raises MammoError where both are of layouts that
    differ.
    """
    folder, data_dir = folder.resolve(), data_dir.resolve()
    check_layout(folder, data_dir)
    by_path = {os.path.normpath(folder / name): row for row, name in enumerate(labels["image"])}
    rows_of: dict[tuple[str, ...], list[int]] = {}
    for row, name in enumerate(labels["image"].map(os.path.normpath)):
        rows_of.setdefault(Path(name).parts, []).append(row)
    lengths = sorted({len(parts) for parts in rows_of}, reverse=True)
    paths = [(data_dir / name).parts for name in images]
    endings = [{parts[-length:] for length in lengths} & rows_of.keys() for parts in paths]
    images_of = Counter(ending for found in endings for ending in found)
    rows = []
    for parts, found in zip(paths, endings, strict=True):
        claims = [row for ending in found for row in rows_of[ending]]
        by_ending = claims[0] if len(claims) == 1 and images_of[min(found)] == 1 else -1
        rows.append(by_path.get(str(Path(*parts)), by_ending))
    return np.array(rows, dtype=int)


def same_name(name: str) -> str:
    """What an id is compared by: as spreadsheets spoil them, P1 is p1, and 007 is 7 and 7.0."""
    seen = re.sub("[\u200b-\u200d\u2060\ufeff]", "", name)  # nobody sees those
    text = unicodedata.normalize("NFC", seen).strip().casefold()
    return (text.partition(".")[0].lstrip("0") or "0") if re.fullmatch(r"\d+(\.0*)?", text) else text


def one_spelling(names: pd.Series) -> pd.Series:
    """Ids that differ as same_name says written in one way, the first of them in order."""
    spellings: dict[str, str] = {}
    for name in sorted(names.unique()):
        spellings.setdefault(same_name(name), name)
    return names.map({name: spellings[same_name(name)] for name in names.unique()})


def group_keys(table: pd.DataFrame) -> pd.Series:
    """What splits, folds and intervals go by, for rows with study_id and patient_id ('' = unknown): the
    row's own patient, else one that another row of its study names, else the study; in one spelling."""
    study, patient = one_spelling(table["study_id"]), one_spelling(table["patient_id"])
    known = patient.where(patient != "")
    return known.fillna(known.groupby(study).transform("first")).fillna(study)


def check_studies(path: str | Path, labels: pd.DataFrame) -> None:
    """Raises MammoError where a study_id stands for images of two patients, as a date or a visit's
    number does: figures of a study would be of both, and rows without a patient could be of either."""
    named = labels[(labels["patient_id"] != "") & (labels["study_id"] != "")]
    women = one_spelling(named["patient_id"]).groupby(named["study_id"])
    several = women.nunique().loc[lambda count: count > 1].index
    if len(several):
        names = tables.some(women.get_group(several[0]).unique())
        raise MammoError(
            f"labels {path}: study_id {several[0]} is of the patients {names}"
            + (f", and {len(several) - 1} others are of several" if len(several) > 1 else "")
            + "; write one that no other patient has, such as patient and date together"
        )


def with_manifest(labels: pd.DataFrame, found: np.ndarray, sources: pd.DataFrame) -> pd.DataFrame:
    """Labels with study, side and view of their images also where only the manifest knows them, and
    with `patient` (see patients); `found` gives the row of `labels` for each of `sources`, a table with
    these columns."""
    known = sources.assign(row=found).drop_duplicates("row").set_index("row").reindex(labels.index)
    known = known[["study_id", "laterality", "view"]].fillna("")
    study = labels["study_id"].where(labels["study_id"] != "", known["study_id"])
    side, view = (known[n].where(known[n] != "", labels[n]) for n in ("laterality", "view"))
    labels = labels.assign(
        study_id=study.where(study != "", labels["image"]), laterality=side, view=view
    )
    return labels.assign(patient=group_keys(labels))


def tile_labels(
    tiles: pd.DataFrame,
    rows: np.ndarray,
    labels: pd.DataFrame,
    size: int,
    findings: Sequence[str],
    cover: float = LABEL_COVER,
    by_centre: bool = True,
    scale: np.ndarray | None = None,
) -> np.ndarray:
    """(N, findings) float32: 1, 0, or NaN = left out, for `tiles` (x, y, image) of `size` px.

    `rows` gives the row of `labels` for each image, -1 = unlabelled. A tile is positive where it holds
    a box's centre (where `by_centre`) or `cover` of it, and left out where it merely touches one. Away
    from boxes it is negative if the image is known to be without the finding, or if boxes say where it
    lies. `scale` (images,): px of the image file, which boxes are in, for each px of tiles; None = 1.
    """
    out = np.full((len(tiles), len(findings)), np.nan, np.float32)
    for image, group in tiles.groupby("image"):
        row = rows[int(image)]
        if row < 0:
            continue
        index = tiles.index.get_indexer(group.index)
        px = 1 if scale is None else scale[int(image)]
        corners, side = group[["x", "y"]].to_numpy() * px, size * px
        for column, finding in enumerate(findings):
            boxes = [box for box in labels["boxes"][row] if finding in box["finding"]]
            known = labels[finding][row]
            if boxes or known == 0:
                out[index, column] = 0
            for state in (np.nan, 1):  # positive wins where a tile touches one box and holds another
                for box in boxes:
                    holds, touches = _tile_holds(corners, box, side, cover, by_centre)
                    out[index[touches if np.isnan(state) else holds], column] = state
    return out


def note_boxes_elsewhere(
    image: np.ndarray, targets: np.ndarray, boxed: np.ndarray, paths: pd.Series, findings: Sequence[str]
) -> None:
    """Say on stderr where no tile of an image touches its boxes: they count as without finding.

    `targets` (N, findings) are those of tile_labels, `image` (N,) each tile's row of `boxed` (images,
    findings), which images have a box, and of `paths`.
    """
    for name, target, has in zip(findings, targets.T, boxed.T, strict=True):
        touched = np.zeros(len(has), bool)
        touched[image[target != 0]] = True
        lost = np.flatnonzero(has & ~touched)
        if len(lost):
            print(
                f"note: {len(lost):,} of {has.sum():,} images with a box of {name} have no tile that "
                f"holds or touches it, first {paths.iloc[lost[0]]}: are the boxes in px of these files?",
                file=sys.stderr,
            )


def _tile_holds(
    corners: np.ndarray, box: dict[str, Any], size: float, least: float, by_centre: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which tiles hold a box's centre or `least` of it, and which touch it; both (N,) bool.

    `corners` (N, 2): x and y of tiles of that size, in px of the box.
    """
    x, y = corners.T
    x0, y0, x1, y1 = (float(box[name]) for name in ("xmin", "ymin", "xmax", "ymax"))
    across = (np.minimum(x + size, x1) - np.maximum(x, x0)).clip(0)
    down = (np.minimum(y + size, y1) - np.maximum(y, y0)).clip(0)
    cover = across * down / ((x1 - x0) * (y1 - y0))
    centre_x, centre_y = (x0 + x1) / 2, (y0 + y1) / 2
    centred = (x <= centre_x) & (centre_x < x + size) & (y <= centre_y) & (centre_y < y + size)
    return (centred & by_centre) | (cover >= least), cover > 0


@dataclass(frozen=True)
class Probe:
    """Labelled tiles of a run: ids (N,), targets (N, findings) with NaN = unknown, groups (N,)."""

    ids: np.ndarray
    targets: np.ndarray
    groups: np.ndarray  # the patient, or the study where no patient is known; folds keep them whole


def prepare_probe(
    path: Path,
    data_dir: Path,
    images: pd.DataFrame,
    table: pd.DataFrame,
    tile_size: int,
    findings: Sequence[str],
    order: np.ndarray,
) -> Probe:
    """The online probe's tiles: the first of `order` (ids of all tiles) that labels.csv knows of.

    `images` and `table` as in MammogramTiles. Raises MammoError where there are too few.
    """
    labels = read_labels(path, findings)
    rows = match_labels(labels, path.parent, images["image"], data_dir)
    scale = one_scale.source_px(images)
    targets = tile_labels(table, rows, labels, tile_size, findings, scale=scale)
    image_row = table["image"].to_numpy()
    boxed = has_box(labels["boxes"].reindex(rows), findings)
    note_boxes_elsewhere(image_row, targets, boxed, images["image"], findings)
    positive = order[(targets[order] == 1).any(1)][: PROBE_TILES // 2]
    negative = order[(targets[order] == 0).any(1) & ~(targets[order] == 1).any(1)]
    ids = np.sort(np.concatenate([positive, negative[: PROBE_TILES - len(positive)]]))
    patient = with_manifest(labels, rows, images)["patient"]
    groups = patient.reindex(rows[image_row[ids]]).to_numpy(str)
    probe = Probe(ids, targets[ids], groups)
    for column, name in enumerate(findings):
        for value, word in ((1, "with"), (0, "without")):
            count = len(set(groups[probe.targets[:, column] == value]))
            if count < PROBE_FOLDS:
                raise MammoError(
                    f"labels {path}: {count} studies have tiles {word} {name}, the online probe needs "
                    f"{PROBE_FOLDS}; add labels, loosen the tile settings, or leave --labels out"
                )
    return probe


def run_probe(
    features: np.ndarray, probe: Probe, findings: Sequence[str], seed: int
) -> dict[str, float]:
    """Out-of-fold AUROC of a logistic probe on frozen features (N, D), mean and per finding.

    Group k-fold: patients, or studies where no patient is known, stay whole.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    logistic = LogisticRegression(C=PROBE_STRENGTH, class_weight="balanced", max_iter=5000, tol=1e-3)
    model = make_pipeline(StandardScaler(), logistic)
    folds = StratifiedGroupKFold(PROBE_FOLDS, shuffle=True, random_state=seed % 2**32)
    out = {}
    for name, target in zip(findings, probe.targets.T, strict=True):
        known = np.isfinite(target)
        x, y, groups = features[known], target[known].astype(int), probe.groups[known]
        scores = cross_val_predict(model, x, y, groups=groups, cv=folds, method="decision_function")
        out[f"auroc_{name}"] = float(roc_auc_score(y, scores))
    return {"auroc": float(np.mean(list(out.values()))), **out}
