"""Lay a mammogram archive out by split: CSV + images -> split_images/<split>/ + manifest.csv.

    python prepare_dataset.py --csv_path breast-level_annotations.csv --images_root images_png
    python prepare_dataset.py --csv_path breast-level_annotations.csv --images_root images \\
        --findings_csv finding_annotations.csv --verify       labels too, and all pixels checked
    python prepare_dataset.py --csv_path mass_case_description_*.csv calc_case_description_*.csv \\
        --images_root CBIS-DDSM --split test_wins
    python prepare_dataset.py --csv_path none --images_root dicom     no table: every image there
    python prepare_dataset.py --csv_path my.csv --images_root my_images \\
        --columns image=path,study=exam,patient=mrn_hash,laterality=side,mass=has_mass

The archive is told by its header (ADAPTERS): VinDr-Mammo and what is laid out like it, CBIS-DDSM,
INbreast, CMMD, RSNA 2022; --columns maps any other table. A table without a split gets one by
patient, the same in every run (--test_share).

Writes <output_dir>/<split>/<study_id>_<image_id>.png and
    manifest.csv         one row per image laid out
    labels.csv           with --findings_csv, or where the table says what is in the images: one row per
                         image; `image` is the manifest's `file` (training/<study_id>_<image_id>.png),
                         empty means unknown; `boxes` is a JSON list of {"finding": [names], "xmin",
                         "ymin", "xmax", "ymax"} in pixels of that PNG, mirrored with it
    prepare_report.html  what was found, per split; problems.csv lists it, image_checks.csv has what was
                         measured in every image that was decoded
    missing.csv (in the table, not on disk), extra.csv (on disk, not in the table) and skipped.csv (found
    but not usable, with the reason), where there is something to list

PNG is linked or copied as it is. TIFF, JPEG and DICOM become PNG without loss: DICOM with the breast
bright on dark, padding 0, 16 bits (8 where no more are stored) and the pixel spacing in its pHYs chunk.
--window none (default) keeps every stored value, because training scales each image by its own breast
and a window may saturate skin or dense tissue for good; --window voi applies the header's look-up table
or window. No identifier leaves a DICOM header. DICOM, TIFF and JPEG are checked pixel by pixel; PNG only
with --verify or --flip_right. Running again does only what is new or has changed; a run that was killed
is finished by the same command. Flags may be written with '_' or '-'.

Contents
    1 Configuration   constants, Options, parse_options
    2 Table           read_table, check_ids, check_splits, drop_duplicates
    3 Adapters        one function per archive, from its columns to ours
    4 Files           index_files, match_files
    5 Image formats   read_png_header, decode, examine, encode_png
    6 Plan            what is there already, what must not be touched
    7 Decoding        in processes, one broken file never stops the rest
    8 Layout          atomic writing, links and copies, lay_out, remove_stale
    9 Labels          findings and boxes to labels.csv
    10 Checks         what is wrong with images that were laid out
    11 Report         manifest and lists, prepare_report.html, summary
    12 Entry          main

Exit codes
    0  every image in the table is laid out (problems.csv may name doubtful ones)
    1  finished, but images are missing or were skipped (missing.csv, skipped.csv)
    2  refused (wrong flag, wrong CSV, a study in two splits, no image found): nothing was written
    3  stopped part-way (disk full, interrupted): the same command again resumes
    141  who read the output has gone, as `head` does: what is laid out is laid out
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import html
import json
import os
import re
import stat
import struct
import sys
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from byol_mammo import files, settings
from byol_mammo.images import MAX_SAMPLES, PNG_END
from byol_mammo.labels import finding_column
from byol_mammo.processes import available_cores, process_pool
from byol_mammo.settings import MammoError

# 1 Configuration ----------------------------------------------------------------------------------

CSV_PATH = "breast-level_annotations.csv"  # one row per image
IMAGES_ROOT = "images_png"  # folder that holds <study_id>/<image_id>.png
OUTPUT_DIR = "./split_images"  # folder to write; made if needed
MODE = "hardlink"  # hardlink (shares the bytes; a copy where impossible), copy or symlink
WINDOW = "none"  # none (stored values) or voi (the DICOM header's look-up table or window)
SPLIT = "csv"  # csv (refused where a patient is in two), test_wins (such a patient to test) or patient
TEST_SHARE = 0.2  # of patients, where the table has no split or --split patient
NUM_WORKERS = 16  # processes that decode; never more than the cores there are

MAX_ID_LENGTH = 100  # characters; keeps <study_id>_<image_id>.png inside every file system's 255
SHOWN = 10  # names shown per warning; the full lists are in the CSV files
REPORTED = 200  # problems shown per check in the HTML report
CLOCK_TOLERANCE_NS = 2_000_000_000  # FAT and exFAT keep modification times to 2 s
POOL_FROM = 100_000_000  # bytes to decode from which starting processes (about a second) pays
ASPECT_TOLERANCE = 0.01  # relative; rounding in a resize stays below, 912 x 1520 of a 2:3 film does not
DICOM_VERSION = 1  # counts up when the same DICOM file would give other pixels
CHECK_SIDE = 256  # px, longest side of the copy on which polarity and side are judged
BRIGHT_BORDER = 0.5  # share of the border brighter than Otsu's threshold from which air counts as bright
FAINT_TISSUE = 0.25  # of the way from air to Otsu's threshold, where tissue begins
CLEAR_SIDE = 0.2  # difference of tissue along the left and right edge, over their sum, that is clear

DEFAULT = " (default: %(default)s)"  # argparse fills it in
REQUIRED = ["study_id", "image_id", "split"]
OPTIONAL = ["laterality", "view_position", "height", "width", "breast_birads", "breast_density"]
SIZE = ["height", "width", "bit_depth"]
SOURCE = ["source", "source_size", "source_mtime_ns"]
RECORD = [*SOURCE, "settings"]  # an output is up to date while these are as they were
HEADER = [  # what is taken from a DICOM header, see mammogram_dicom.HEADER
    *("laterality", "view", "view_modifier", "spacing_mm", "implant", "modality", "photometric"),
    *("bits_stored", "intent", "relationship", "compression", "padding"),
]
MEASURED = ["content", "minimum", "maximum", "air", "chest_wall", "flipped"]  # see examine
LABELS = [
    *("image", "study_id", "split", "laterality", "view", "breast_birads", "breast_density"),
    *("mass", "calcification", "boxes"),
]
CLAIMS = ".prepare_dataset.claims.csv"  # what an unfinished run set out to make
JOURNAL = ".prepare_dataset.journal.jsonl"  # what an unfinished run has decoded
REPORTS = {  # file name -> columns; a file of this name with other columns is not ours
    "manifest.csv": [
        *("file", "study_id", "image_id", "laterality", "view", "breast_birads", "breast_density"),
        *(*SIZE, "split", *SOURCE, "spacing_mm", "patient_id", "implant", "view_modifier"),
        *("flipped", "settings"),
    ],
    "missing.csv": ["study_id", "image_id", "split"],
    "extra.csv": ["file"],
    "skipped.csv": ["study_id", "image_id", "split", "source", "reason"],
    "image_checks.csv": ["file", *RECORD, *MEASURED, *HEADER],
    "problems.csv": ["check", "split", "file", "detail"],
    CLAIMS: ["file", *SOURCE],
}
# What each file of ours has at least; older manifests have these.
SIGNATURES = {**REPORTS, "manifest.csv": REPORTS["manifest.csv"][:14], "labels.csv": LABELS}
SPLIT_NAMES = {  # what others call ours, in any case of letters
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
OTHER_KNOWN = {"labels.csv", "prepare_report.html"}
TEMPORARY = ".prepare_dataset.tmp"  # ending of files not yet complete, in older versions
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
OUTPUT_NAME = re.compile(rf"{SAFE_NAME.pattern}/{SAFE_NAME.pattern}\.png")
SAFE_NAME_RULE = "letters, digits, '_', '-' and '.', not beginning with '.' or '-'"


class SkipImageError(Exception):
    """One image cannot be laid out; the message is the reason listed in skipped.csv."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    csv_path: list[Path]
    images_root: Path
    output_dir: Path
    findings_csv: Path | None = None
    columns: str = ""
    mode: str = MODE
    window: str = WINDOW
    split: str = SPLIT
    test_share: float = TEST_SHARE
    num_workers: int = NUM_WORKERS
    flip_right: bool = False
    verify: bool = False


def make_parser() -> argparse.ArgumentParser:
    """The flags; each one's help ends with its default."""
    parser = settings.make_parser(__doc__, "--help lists the flags")
    parser.description = __doc__  # with the exit codes
    add = parser.add_argument
    text = "one or several tables, told apart by their header; none: every image in the folder"
    add("--csv_path", type=Path, nargs="+", metavar="CSV", default=[Path(CSV_PATH)], help=text)
    text = "holds the images, in the archive's own layout"
    add("--images_root", type=Path, metavar="FOLDER", default=IMAGES_ROOT, help=text + DEFAULT)
    text = "where to write; made if needed"
    add("--output_dir", type=Path, metavar="FOLDER", default=OUTPUT_DIR, help=text + DEFAULT)
    text = "VinDr-Mammo's finding_annotations.csv: writes labels.csv"
    add("--findings_csv", type=Path, metavar="CSV", help=text)
    text = f"for other tables, COLUMN=name,...; image and study at least, of {', '.join(GENERIC)}"
    add("--columns", default="", metavar="MAP", help=text)
    text = "how PNG files get there; hardlink shares the bytes, or copies where it cannot link"
    add("--mode", choices=["hardlink", "copy", "symlink"], default=MODE, help=text + DEFAULT)
    text = "DICOM grey values: none keeps all that is stored, voi applies the header's window"
    add("--window", choices=["none", "voi"], default=WINDOW, help=text + DEFAULT)
    text = "csv: refuse a patient in two splits; test_wins: such a patient to test; patient: split anew"
    add("--split", choices=["csv", "test_wins", "patient"], default=SPLIT, help=text + DEFAULT)
    text = "share of patients for test where the table has no split or with --split patient"
    add("--test_share", type=float, default=TEST_SHARE, metavar="SHARE", help=text + DEFAULT)
    text = "processes that decode, at most one per core"
    add("--num_workers", type=int, default=NUM_WORKERS, metavar="N", help=text + DEFAULT)
    text = "mirror images whose chest wall is on the right; recorded as flipped in the manifest"
    add("--flip_right", action="store_true", help=text)
    text = "decode PNG in full too, once: skip damaged ones, check the pixels of all"
    add("--verify", action="store_true", help=text)
    return parser


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Read the flags. Raises MammoError, which names the nearest flag where one is unknown."""
    parser = make_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings if flag != "-h"]
    words = sys.argv[1:] if argv is None else argv
    arguments = settings.with_underscores(words)
    for word, argument in zip(words, arguments, strict=True):
        name = argument.partition("=")[0]
        if name.startswith("--") and argument != "--" and name not in flags:
            parser.error(f"unknown flag {word}; nearest: {nearest(name, flags)}")
    options = Options(**vars(parser.parse_args(arguments)))
    if not 0 <= options.test_share <= 1:
        parser.error(f"--test_share {options.test_share} is not between 0 and 1")
    if options.num_workers < 1:
        parser.error(f"--num_workers {options.num_workers} is less than 1")
    return options


def nearest(name: str, candidates: Sequence[str]) -> str:
    """The candidate most like `name`, or all of them where none is like it."""
    return settings.nearest(name, candidates) or "none, there are " + ", ".join(candidates)


# 2 Table ------------------------------------------------------------------------------------------


@dataclass
class ImageLabels:
    """What an archive says about one image, or about one breast."""

    values: dict[str, str] = field(default_factory=dict)  # column of labels.csv -> "0", "1" or ""
    boxes: list[dict] | None = None  # finding (names), xmin, ymin, xmax, ymax; None: not known
    size: tuple[float, float] | None = None  # height, width in which the boxes are given

    def add(self, values: dict[str, str]) -> None:
        """Join another row about the same image: 1 wins over 0, 0 over unknown."""
        for name, value in values.items():
            self.values[name] = max(self.values.get(name, ""), value)


# By (study_id, image_id), or by (study_id, "side L") where an archive speaks of breasts.
Labels = dict[tuple[str, str], ImageLabels]


def read_csv(csv_path: Path) -> pd.DataFrame:
    """One CSV as strings (leading zeros kept), indexed by line number.

    Raises MammoError where the file is missing, empty or not a table.
    """
    if not csv_path.is_file():
        raise MammoError(f"there is no file {csv_path}; give the annotation CSV with --csv_path")
    files.refuse_other_tables(csv_path)
    delimiter = delimiter_of(csv_path)
    try:
        # Blank lines are kept for now, so that the index gives the line in the file.
        table = files.parse_table(csv_path, sep=delimiter, skip_blank_lines=False)
    except ValueError as error:
        raise MammoError(f"{csv_path} is not a comma-separated UTF-8 table: {error}") from None
    table.columns = table.columns.str.strip()
    table = table.fillna("").apply(lambda column: column.str.strip(" \t\r\n"))
    table.index = pd.RangeIndex(2, len(table) + 2)  # the header is line 1
    return table


def delimiter_of(csv_path: Path) -> str:
    """',', or ';' for the archives published so. Raises MammoError for other separators."""
    with open(csv_path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    columns = {name.strip(' "\n') for name in header.split(";")}
    if any(set(adapter.header) <= columns for adapter in ADAPTERS):
        return ";"
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "'|'")):
        if delimiter in header and "," not in header:
            raise MammoError(f"{csv_path} is separated by {name}; save it separated by commas")
    return ","


def read_table(
    tables: list[pd.DataFrame], options: Options, index: Index
) -> tuple[pd.DataFrame, Labels, Adapter, list[str]]:
    """The archive's table in our columns (those of REQUIRED, OPTIONAL, patient_id, implant, spacing_mm
    that it has, and `places`: where to look for the file), its labels, its adapter, notes on absences.

    Raises MammoError where a column is missing.
    """
    name = ", ".join(map(str, options.csv_path))
    if not tables:
        adapter, raw = FOLDER, pd.DataFrame()
    else:
        raw = pd.concat(tables)
        adapter = generic_adapter(options.columns) if options.columns else adapter_of(raw)
        check_columns(raw, adapter, name)
        raw = raw.fillna("")
        raw = raw[(raw != "").any(axis=1)]
        if raw.empty:
            raise MammoError(f"{name} has a header but no rows; is the download complete?")
    labels: Labels = {}
    table = adapter.adapt(raw, index, labels)
    absent = [column for column in OPTIONAL if column not in table]
    notes = [f"not in the CSV, so empty in the manifest: {some(absent)}"] if absent and tables else []
    if adapter is not VINDR:
        notes.append(f"read as {adapter.name}")
    alone = 0 if tables else int((~table["places"].str.contains("/")).sum())
    if alone:
        notes.append(f"{alone} images lie in no folder of their own: each counts as a patient")
    if not tables and len(table) > 1 and patients(table).nunique() == 1:
        notes.append("all images lie in one folder and count as one patient: give it as --images_root")
    if "split" in table:
        table["split"] = table["split"].map(lambda name: SPLIT_NAMES.get(name.lower(), name))
    if "split" not in table or options.split == "patient":
        table["split"] = split_by_patient(table, options.test_share)
        notes.append(f"split by patient, {options.test_share:.0%} of them for test")
    return table, labels, adapter, notes


def check_columns(raw: pd.DataFrame, adapter: Adapter, csv_path: str) -> None:
    """Refuse a table that lacks a required column or has one of ours twice."""
    found = list(raw.columns)
    wanted = [*adapter.header, *(REQUIRED + OPTIONAL if adapter is VINDR else [])]
    twice = [name for name in wanted if f"{name}.1" in found]  # as pandas renames it
    if twice:
        raise MammoError(f"{csv_path} has the column {twice[0]} twice; keep one of them")
    missing = [name for name in adapter.header if name not in found]
    if not missing:
        return
    hints = "; ".join(f"{name} (nearest: {nearest(name, found)})" for name in missing)
    raise MammoError(
        f"{csv_path} lacks the column {hints}; found: {', '.join(found)}. Rename the column, map it "
        "with --columns image=...,study=... or give another file with --csv_path"
    )


def split_by_patient(table: pd.DataFrame, test_share: float) -> pd.Series:
    """training or test by a hash of the patient, so that it never depends on the other rows."""

    def split(patient: str) -> str:
        number = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big")
        return "test" if number < test_share * 2**64 else "training"

    return patients(table).map(split)


def patients(table: pd.DataFrame) -> pd.Series:
    """Patient of each row: patient_id, or the study where that is not known."""
    if "patient_id" not in table:
        return table["study_id"]
    return table["patient_id"].where(table["patient_id"] != "", table["study_id"])


def is_safe_name(name: str) -> bool:
    """True where `name` can be a folder name or part of a file name on any system."""
    return len(name) <= MAX_ID_LENGTH and bool(SAFE_NAME.fullmatch(name))


def safe_name(name: str) -> str:
    """`name` with what cannot be part of a file name turned into '_'; long ones keep their end.

    Those that would be too long or without a letter, such as two in Chinese, are told by a hash.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-")
    short = len(safe) <= MAX_ID_LENGTH and re.search("[A-Za-z0-9]", safe)
    if short or is_safe_name(name) or not name:
        return safe
    return f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}_{safe[-64:].lstrip('.-')}"


def check_ids(table: pd.DataFrame) -> None:
    """Refuse ids and splits that are absent or would leave the output folder.

    Raises MammoError naming the line, the column and the value.
    """
    reserved = {"nan", "none", "null", *REPORTS, *OTHER_KNOWN}  # absent values, and report names
    for column in REQUIRED:
        wrong = [not is_safe_name(v) or v.lower() in reserved for v in table[column]]
        if any(wrong):
            line, value = table.index[wrong][0], table.loc[wrong, column].iloc[0]
            problem = f"is {value[:MAX_ID_LENGTH]!r}" if value else "is empty"
            raise MammoError(
                f"line {line} of the CSV: {column} {problem}, {sum(wrong)} such rows; it becomes "
                f"part of a file name: {SAFE_NAME_RULE}, at most {MAX_ID_LENGTH} characters"
            )


def check_splits(table: pd.DataFrame, rule: str = SPLIT) -> tuple[pd.DataFrame, set[str]]:
    """The table, and who is in test now because the table has them in two splits.

    Raises MammoError for a patient or study in two splits, unless `rule` moves them.
    """
    moved: set[str] = set()
    for kind, keys in (("patients", patients(table)), ("studies", table["study_id"])):
        splits = table["split"].groupby(keys).unique()
        leaking = splits[splits.map(len) > 1].map(sorted).map(" and ".join)
        if leaking.empty:
            continue
        if rule == "csv":
            names = [f"{name} ({both})" for name, both in leaking.items()]
            raise MammoError(
                f"{len(leaking)} {kind} stand in more than one split: {some(names)}. Training would "
                "see test images; give each one split, or use --split test_wins or --split patient"
            )
        table = table.assign(split=table["split"].mask(keys.isin(leaking.index), "test"))
        moved |= set(leaking.index)
    return table, moved


def drop_duplicates(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """One row per image and the number of identical rows dropped; adds the column `file`.

    Raises MammoError where rows of one image disagree or two images would share a file name.
    """
    unique = table.drop_duplicates()
    twice = unique.duplicated(["study_id", "image_id"], keep=False)
    if twice.any():
        (study, image), rows = next(iter(unique[twice].groupby(["study_id", "image_id"])))
        columns = [name for name in rows if rows[name].nunique() > 1]
        raise MammoError(
            f"image {study}/{image} has rows that disagree in "
            f"{', '.join(columns)} (lines {some(rows.index)} of the CSV); keep the right one"
        )
    names = unique["study_id"] + "_" + unique["image_id"] + ".png"
    unique = unique.assign(file=unique["split"] + "/" + names)
    # Compared without case, because macOS and Windows would write both into one file.
    clash = unique["file"].str.lower().duplicated(keep=False)
    if clash.any():
        raise MammoError(
            f"different images would share one file name: {some(unique['file'][clash])} "
            f"(lines {some(unique.index[clash])} of the CSV); rename one of them"
        )
    return unique, len(table) - len(unique)


# 3 Adapters ---------------------------------------------------------------------------------------
# From a table as published to our columns. `places` says where to look for the file, best first, one
# a line, as keys of the Index: "path/without/suffix", "folder NAME", "first TOKEN" or "name STEM".


@dataclass(frozen=True)
class Adapter:
    """How one archive is read."""

    name: str
    header: tuple[str, ...]  # columns that tell it, and that it cannot do without
    adapt: Callable[[pd.DataFrame, Index, Labels], pd.DataFrame]
    ignored: str = r"(?!)"  # files (relative paths) that are no mammograms; this matches none


def birads(value: str) -> str:
    """'BI-RADS 4A' of '4a', '4.0' or 'BI-RADS 4A'; '' where there is none."""
    found = re.fullmatch(r"(?:BI-?RADS\s*)?([0-6][ABC]?)(?:\.0)?", value.strip().upper())
    return f"BI-RADS {found[1]}" if found else ""


def density(value: str) -> str:
    """'DENSITY C' of 'C', '3' or '3.0' (BI-RADS before 2013 counts 1 to 4); '' where there is none."""
    found = re.fullmatch(r"(?:DENSITY\s*)?([A-D1-4])(?:\.0)?", value.strip().upper())
    return f"DENSITY {found[1].translate(str.maketrans('1234', 'ABCD'))}" if found else ""


def flag(value: str) -> str:
    """'1', '0' or '' (unknown) of a table's yes, no or nothing."""
    text = re.sub(r"\.0$", "", value.strip().lower())
    return {"1": "1", "true": "1", "yes": "1", "0": "0", "false": "0", "no": "0"}.get(text, "")


def side(value: str) -> str:
    """L or R of L, LEFT, R, RIGHT; '' of anything else."""
    return {"L": "L", "LEFT": "L", "R": "R", "RIGHT": "R"}.get(value.strip().upper(), "")


def adapt_vindr(raw: pd.DataFrame, index: Index, labels: Labels) -> pd.DataFrame:
    """VinDr-Mammo breast-level_annotations.csv: <study_id>/<image_id>.png or .dicom."""
    table = raw[[name for name in [*REQUIRED, *OPTIONAL, "patient_id"] if name in raw]].copy()
    return table.assign(places=table["study_id"] + "/" + table["image_id"])


def adapt_cbis(raw: pd.DataFrame, index: Index, labels: Labels) -> pd.DataFrame:
    """CBIS-DDSM {mass,calc}_case_description_{train,test}_set.csv: one row per abnormality.

    'image file path' is Mass-Training_P_00001_LEFT_CC/<study uid>/<series uid>/000000.dcm. Downloads
    keep only its first folder (NBIA retriever) or its series uid (Kaggle's JPEG copy). Masses and
    calcifications of one film come as two files: what the other list would say is unknown ('').
    """
    density_column = raw.get("breast_density", pd.Series("", raw.index))
    raw = raw.assign(
        density=density_column.where(density_column != "", raw.get("breast density", "")),
        place=raw["image file path"].map(lambda name: name.strip(' "\r\n').removesuffix(".dcm")),
    )
    rows: dict[tuple[str, str], dict[str, str]] = {}
    lines: dict[tuple[str, str], int] = {}
    for line, row in raw.iterrows():
        top, *uids = row["place"].split("/")
        kind, training = top.split("-")[0], "-Training_" in top
        image = safe_name(f"{kind}_{row['left or right breast']}_{row['image view']}")
        key = (row["patient_id"], image)
        grade = birads(row["assessment"])
        previous = rows.get(key, {}).get("breast_birads", "")
        lines[key] = line
        rows[key] = {
            "study_id": key[0],
            "patient_id": key[0],
            "image_id": image,
            "split": "training" if training else "test",
            "laterality": side(row["left or right breast"]),
            "view_position": row["image view"].upper(),
            "breast_birads": max(previous, grade),
            "breast_density": density(row["density"]),
            "places": "\n".join([row["place"], *(f"folder {name}" for name in (top, *uids[1:2]))]),
        }
        finding = "calcification" if "calc" in row["abnormality type"].lower() else "mass"
        cancer = {"MALIGNANT": "1", "BENIGN": "0", "BENIGN_WITHOUT_CALLBACK": "0"}
        values = {finding: "1", "cancer": cancer.get(row["pathology"].upper(), "")}
        labels.setdefault(key, ImageLabels()).add(values)
    return pd.DataFrame(list(rows.values()), index=list(lines.values()))


def adapt_inbreast(raw: pd.DataFrame, index: Index, labels: Labels) -> pd.DataFrame:
    """INbreast.csv, one row per image: AllDICOMs/<File Name>_<patient>_MG_<side>_<view>_ANON.dcm.

    The table's 'Patient ID' is removed; the file's name has a pseudonym.
    """
    person = []
    for name in raw["File Name"]:
        found = index.get(f"first {name}", [])  # the annotations' names (.xml, .roi) have no pseudonym
        parts = max((Path(file).stem.split("_") for file in found), key=len, default=[name])
        person.append(parts[min(1, len(parts) - 1)])
    return pd.DataFrame(
        {
            "study_id": person,
            "patient_id": person,
            "image_id": raw["File Name"],
            "laterality": raw["Laterality"].map(side),
            "view_position": raw["View"].str.upper(),
            "breast_birads": raw["Bi-Rads"].map(birads),
            "breast_density": raw["ACR"].map(density),
            "places": "first " + raw["File Name"],
        }
    )


def adapt_cmmd(raw: pd.DataFrame, index: Index, labels: Labels) -> pd.DataFrame:
    """CMMD_clinicaldata_revision (saved as CSV): one row per breast, files anywhere below <ID1>/.

    Which file is which breast and view stands only in the DICOM headers: the rows are the files, the
    labels wait for the side.
    """
    for row in raw.to_dict("records"):
        kind = row["abnormality"].lower()
        values = {
            name: "01"[kind in (name, "both")] if kind else "" for name in ("mass", "calcification")
        }
        values["cancer"] = {"malignant": "1", "benign": "0"}.get(row["classification"].lower(), "")
        labels.setdefault((row["ID1"], f"side {side(row['LeftRight'])}"), ImageLabels()).add(values)
    rows, lines = [], []
    for line, patient in raw["ID1"].drop_duplicates().items():
        found = index.get(f"folder {patient}", [])
        stems = Counter(Path(name).stem for name in found)
        for name in found or [f"{patient}/no_file"]:
            place = without_suffix(name)
            below = place.partition(f"{patient}/")[2]
            image = Path(name).stem if stems[Path(name).stem] < 2 else below
            rows.append({"study_id": patient, "image_id": safe_name(image), "places": place})
            lines.append(line)
    table = pd.DataFrame(rows, index=lines)
    return table.assign(patient_id=table["study_id"])


def adapt_rsna(raw: pd.DataFrame, index: Index, labels: Labels) -> pd.DataFrame:
    """RSNA 2022 train.csv: train_images/<patient_id>/<image_id>.dcm, or <patient_id>_<image_id>.png."""
    for row in raw.to_dict("records"):
        key = (row["patient_id"], row["image_id"])
        labels.setdefault(key, ImageLabels()).add({"cancer": flag(row.get("cancer", ""))})
    patient, image = raw["patient_id"], raw["image_id"]
    return pd.DataFrame(
        {
            "study_id": patient,
            "patient_id": patient,
            "image_id": image,
            "laterality": raw["laterality"].map(side),
            "view_position": raw["view"].str.upper(),
            "breast_birads": raw.get("BIRADS", pd.Series("", raw.index)).map(birads),
            "breast_density": raw.get("density", pd.Series("", raw.index)).map(density),
            "implant": raw.get("implant", pd.Series("", raw.index)).map(flag),
            "places": patient + "/" + image + "\nname " + patient + "_" + image + "\nname " + image,
        }
    )


def adapt_folder(raw: pd.DataFrame, index: Index, labels: Labels) -> pd.DataFrame:
    """No table: each image below the folder; the first folder's name is study and patient."""
    rows = []
    for place in dict.fromkeys(map(without_suffix, index.get("all", []))):
        study, _, image = place.partition("/")
        study, image = safe_name(study), safe_name(image or study)
        rows.append({"study_id": study, "patient_id": study, "image_id": image, "places": place})
    # Names of which no letter is safe, such as two in Chinese, would be one.
    names = Counter(f"{row['study_id']}_{row['image_id']}".lower() for row in rows)
    for row in rows:
        if names[f"{row['study_id']}_{row['image_id']}".lower()] > 1:
            digest = hashlib.sha256(os.fsencode(row["places"])).hexdigest()[:8]
            row["image_id"] = f"{row['image_id'][:80]}_{digest}"
    if not rows:
        raise MammoError("there is no image below --images_root")
    return pd.DataFrame(rows)


# --columns: our name -> column of the table it fills, and how its values are read.
GENERIC: dict[str, tuple[str, Callable[[str], str]]] = {
    "image": ("", str),
    "study": ("study_id", safe_name),
    "patient": ("patient_id", str),
    "split": ("split", str),
    "laterality": ("laterality", side),
    "view": ("view_position", str.upper),
    "birads": ("breast_birads", birads),
    "density": ("breast_density", density),
    "implant": ("implant", flag),
    "spacing": ("spacing_mm", str),
    "height": ("height", str),
    "width": ("width", str),
    "mass": ("", flag),
    "calcification": ("", flag),
    "cancer": ("", flag),
}
UNDERSTOOD: dict[Callable[[str], str], str] = {  # what a reader makes something of
    flag: "1, 0, yes, no, true and false are",
    side: "L, R, left and right are",
    birads: "0 to 6, 4A to 4C and BI-RADS before them are",
    density: "A to D and 1 to 4 are",
}


def generic_adapter(columns: str) -> Adapter:
    """The adapter for --columns image=...,study=...; `image` is a path below images_root, or a name.

    Raises MammoError where the map cannot be read.
    """
    names = dict(part.partition("=")[::2] for part in columns.split(","))
    names = {ours.strip(): theirs.strip() for ours, theirs in names.items()}
    wrong = [name for name in names if name not in GENERIC or not names[name]]
    if wrong or not {"image", "study"} <= set(names):
        problem = f"{wrong[0]!r} is not known" if wrong else "image and study are needed"
        raise MammoError(f"--columns {columns}: {problem}; names are {', '.join(GENERIC)}")

    def adapt(raw: pd.DataFrame, index: Index, labels: Labels) -> pd.DataFrame:
        stems = raw[names["image"]].map(lambda name: without_suffix(name.replace("\\", "/").lstrip("/")))
        table = pd.DataFrame({"image_id": stems.map(safe_name), "places": stems + "\nname " + stems})
        for ours, theirs in names.items():
            column, reader = GENERIC[ours]
            values = raw[theirs].map(reader)
            said = raw[theirs][raw[theirs] != ""]
            if len(said) and (values == "").all():
                raise MammoError(
                    f"--columns {ours}={theirs}: no value of {theirs} is understood, such as "
                    f"{said.iloc[0][:MAX_ID_LENGTH]!r}; {UNDERSTOOD[reader]}"
                )
            table[column or ours] = values
        findings = [name for name in names if name in ("mass", "calcification", "cancer")]
        for row in table.to_dict("records") if findings else ():
            key = row["study_id"], row["image_id"]
            labels.setdefault(key, ImageLabels()).add({name: row[name] for name in findings})
        return table.drop(columns=["image", *findings])

    return Adapter("the columns given", tuple(names.values()), adapt)


VINDR = Adapter("VinDr-Mammo", ("study_id", "image_id"), adapt_vindr)
FOLDER = Adapter("a folder without a table", (), adapt_folder)
ADAPTERS = [
    Adapter(
        "CBIS-DDSM",
        (
            *("patient_id", "left or right breast", "image view", "abnormality type"),
            *("assessment", "pathology", "image file path"),
        ),
        adapt_cbis,
        ignored=r"(?:Mass|Calc)-(?:Training|Test)_P_\d+_(?:LEFT|RIGHT)_\w+_\d+/",  # crops and masks
    ),
    Adapter("INbreast", ("Laterality", "View", "File Name", "ACR", "Bi-Rads"), adapt_inbreast),
    Adapter("CMMD", ("ID1", "LeftRight", "abnormality", "classification"), adapt_cmmd),
    Adapter("RSNA 2022", ("site_id", "patient_id", "image_id", "laterality", "view"), adapt_rsna),
]


def adapter_of(raw: pd.DataFrame) -> Adapter:
    """The adapter whose columns the table has; VinDr-Mammo's where none fits."""
    return next((a for a in ADAPTERS if set(a.header) <= set(raw.columns)), VINDR)


# 4 Files ------------------------------------------------------------------------------------------

# Files by key (see section 3), as paths relative to images_root with '/'. "all" lists the images.
Index = dict[str, list[str]]


def index_files(images_root: Path) -> Index:
    """All files below the folder, by every key that an adapter may ask for.

    Hidden files are left out (macOS writes ._x.png); links in circles are followed once. Raises OSError.
    """
    index: Index = {}
    if not images_root.is_dir():
        raise MammoError(f"there is no folder {images_root}; give the images with --images_root")
    seen = set()
    for where, folders, names in os.walk(images_root, followlinks=True):
        found = os.stat(where)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        parents = Path(where).relative_to(images_root).parts
        for name in sorted(name for name in [*names, *folders] if not name.startswith(".")):
            if name in folders and suffix_of(name) not in SUFFIXES:
                continue  # a folder named as an image stays in: it is listed as unusable
            path = "/".join([*parents, name])
            stem = os.path.splitext(name)[0]
            keys = {path, os.path.splitext(path)[0], f"name {stem}", f"first {stem.split('_')[0]}"}
            if suffix_of(name) in SUFFIXES or format_of(Path(where, name)) == ".dcm":
                keys |= {"all", *(f"folder {parent}" for parent in parents)}
            for key in keys:
                index.setdefault(key, []).append(path)
    return index


def match_files(
    table: pd.DataFrame, images_root: Path, index: Index, adapter: Adapter
) -> tuple[pd.DataFrame, pd.DataFrame, list[str], list[str]]:
    """Rows with a file (column `source`), rows without, extra files, images with several files.

    Raises MammoError where no row has a file.
    """
    sources, ambiguous, wanted = [], [], set()
    rank = {suffix: place for place, suffix in enumerate(SUFFIXES)}
    for places in table["places"]:
        found = next((index[key] for key in places.split("\n") if key in index), [])
        wanted.update(found)
        ranked = sorted(found, key=lambda name: (rank.get(suffix_of(name), len(rank)), name))
        sources.append(ranked[0] if ranked else "")
        images = [name for name in ranked if suffix_of(name) in SUFFIXES]
        if len(images) > 1:
            ambiguous.append(f"{images[0]} taken, {', '.join(images[1:])} not")
    table = table.assign(source=sources)
    extra = [n for n in index.get("all", []) if n not in wanted and not re.search(adapter.ignored, n)]
    if not any(sources):
        expected = table["places"].iloc[0].split("\n")[0]
        top = expected.split("/")[0]
        deeper = [p for p in sorted(images_root.iterdir()) if (p / top).is_dir()]
        hint = f"; try --images_root {deeper[0]}" if deeper else "; check --images_root"
        raise MammoError(
            f"0 of the {len(table)} images in the CSV are under {images_root}, where "
            f"{expected}.png was expected{hint}"
        )
    return table[table["source"] != ""], table[table["source"] == ""], sorted(extra), ambiguous


def suffix_of(name: str) -> str:
    """The file name's suffix in lower case, such as '.png'."""
    return os.path.splitext(name)[1].lower()


def without_suffix(name: str) -> str:
    """The name without a suffix that an image may have; dots of other meaning stay."""
    return os.path.splitext(name)[0] if suffix_of(name) in SUFFIXES else name


# 5 Image formats ----------------------------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {2: 3, 3: 3, 4: 2, 6: 4}  # by colour type, as decoded; a palette becomes RGB
RASTER = (".tif", ".tiff", ".jpg", ".jpeg")
DICOM = (".dcm", ".dicom", ".dic")
SUFFIXES = [".png", *RASTER, *DICOM]  # in order of preference where an image has several


def read_png_header(path: Path) -> tuple[int, int, int]:
    """Height, width and bits per sample from the first 33 bytes; the file's end is checked too.

    Raises SkipImageError where this is not a complete PNG of a plausible size.
    """
    with open(path, "rb") as file:
        head = file.read(33)
        if len(head) < 33 or head[:16] != PNG_SIGNATURE + b"\0\0\0\rIHDR":
            raise SkipImageError("the file is empty" if not head else "not a PNG file inside")
        if zlib.crc32(head[12:29]) != struct.unpack(">I", head[29:])[0]:
            raise SkipImageError("the PNG header is damaged (checksum)")
        width, height, bit_depth, colour = struct.unpack(">IIBB", head[16:26])
        check_size(height, width, PNG_CHANNELS.get(colour, 1))
        # The commonest damage is a download cut short; some writers put bytes after the end.
        file.seek(-min(1024, os.fstat(file.fileno()).st_size), os.SEEK_END)
        if PNG_END not in file.read():
            raise SkipImageError("the PNG file is cut short")
    return height, width, bit_depth


def check_size(height: int, width: int, channels: int = 1) -> None:
    """Refuse an image that is empty or would fill the memory when decoded."""
    if not 0 < height * width * channels <= MAX_SAMPLES:
        raise SkipImageError(f"declares {height} x {width} pixels, more than {MAX_SAMPLES} or none")


def is_dicom(path: Path) -> bool:
    """True where the file begins as DICOM files do; a DICOMDIR is no image."""
    try:
        if not path.is_file() or path.name.upper() == "DICOMDIR":
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def format_of(path: Path) -> str:
    """'.png', '.tif', '.dcm' ... by the suffix; DICOM without one, or named by its UID, by content."""
    suffix = suffix_of(path.name)
    if suffix in DICOM or ((not suffix or suffix[1:].isdigit()) and is_dicom(path)):
        return ".dcm"
    return suffix


def decode(path: Path, kind: str, window: str) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels (H, W) or (H, W, C), uint8 or uint16, and the values of HEADER where it is DICOM.

    Raises SkipImageError.
    """
    if kind != ".dcm":
        return decode_raster(path), {}
    try:
        import mammogram_dicom  # here, so that a run without new DICOM files starts at once
    except ImportError as error:
        raise SkipImageError(f"{error}; DICOM needs pip install -r requirements.txt") from error
    try:
        return mammogram_dicom.read_dicom(path, window)
    except mammogram_dicom.DicomError as error:
        raise SkipImageError(str(error)) from error
    except OSError as error:
        raise SkipImageError(f"cannot be read: {error.strerror}") from error


def decode_raster(path: Path) -> np.ndarray:
    """Pixels of a PNG, TIFF or JPEG as stored: (H, W) or (H, W, C), uint8 or uint16.

    Pillow reads the size before any pixel and reports files cut short, which OpenCV releases
    differ in; OpenCV gives the pixels at full bit depth. Raises SkipImageError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                check_size(image.height, image.width, 3 if image.mode == "P" else len(image.getbands()))
                pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
                image.load()
        del image  # its pixels are not needed again
        pixels = cv2.imdecode(np.frombuffer(read_source(path), np.uint8), cv2.IMREAD_UNCHANGED)
    except SkipImageError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise SkipImageError(f"cannot be decoded: {' '.join(str(error).split())}") from error
    if pages > 1:
        raise SkipImageError(f"holds {pages} pages; save the one that is the mammogram")
    if pixels is None:
        raise SkipImageError("cannot be decoded")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise SkipImageError(f"holds {pixels.dtype} pixels; convert to 8- or 16-bit PNG")
    return pixels


def examine(pixels: np.ndarray) -> dict[str, str]:
    """What the checks need of an image, as text.

    content: hash of shape and pixels. minimum, maximum: grey values. air: dark or bright, by the share
    of the border brighter than Otsu's threshold. chest_wall: left or right, the edge with more tissue.
    Both are '' where they are not clear, as in a blank or tiny image.
    """
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    low, high = int(grey.min()), int(grey.max())
    facts = {"content": f"pixels {digest.hexdigest()[:32]}", "minimum": str(low), "maximum": str(high)}
    factor = CHECK_SIDE / max(grey.shape)
    if low == high or min(grey.shape) < CHECK_SIDE // 4:
        return facts | {"air": "", "chest_wall": ""}
    small = cv2.resize(grey, None, fx=min(1, factor), fy=min(1, factor), interpolation=cv2.INTER_AREA)
    small = ((small.astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
    threshold, bright = cv2.threshold(small, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    border = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]]).mean()
    air_is_bright = bool(border > BRIGHT_BORDER)
    if air_is_bright:
        small, threshold = 255 - small, 254 - threshold
    air = float(np.median(small[small <= threshold]))
    tissue = small > air + FAINT_TISSUE * (threshold - air)
    band = max(1, tissue.shape[1] // 20)
    left, right = float(tissue[:, :band].mean()), float(tissue[:, -band:].mean())
    balance = (left - right) / max(left + right, 1e-6)
    chest_wall = "left" if balance > CLEAR_SIDE else "right" if balance < -CLEAR_SIDE else ""
    return facts | {"air": "bright" if air_is_bright else "dark", "chest_wall": chest_wall}


def encode_png(pixels: np.ndarray, spacing_mm: str = "") -> bytes:
    """PNG of the pixels, the spacing (mm) in its pHYs chunk in whole pixels per metre."""
    png = cv2.imencode(".png", pixels)[1].tobytes()
    try:
        per_metre = round(1000 / float(spacing_mm))
    except (ValueError, ZeroDivisionError):
        return png
    if not 0 < per_metre < 2**31:
        return png
    chunk = b"pHYs" + struct.pack(">IIB", per_metre, per_metre, 1)
    end = len(PNG_SIGNATURE) + 25  # of the header chunk, the place for pHYs is before the pixels
    return png[:end] + struct.pack(">I", 9) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[end:]


# 6 Plan -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One image to lay out: its CSV row and where it is."""

    row: dict[str, str]
    source: Path
    output: Path
    found: os.stat_result  # of the source
    kind: str = ".png"  # format of the source
    settings: str = ""  # options that change the output

    @property
    def record(self) -> dict[str, str]:
        """What identifies the source's content, and what is made of it, from one run to the next."""
        values = (self.row["source"], str(self.found.st_size), str(self.found.st_mtime_ns))
        return dict(zip(RECORD, (*values, self.settings), strict=True))

    @property
    def may_be_encoded(self) -> bool:
        """Whether the output's bytes may be others than the source's."""
        return self.kind != ".png" or "flip_right" in self.settings


@dataclass
class Plan:
    """What was read before anything is written, and then what came of it."""

    options: Options
    items: list[Item]
    previous: dict[str, dict[str, str]]  # manifest rows of the last run, by file
    claimed: dict[str, dict[str, str]]  # of a run that was not finished
    checked: dict[str, dict[str, str]]  # image_checks rows of the last run, or of the unfinished one
    missing: pd.DataFrame
    extra: list[str]
    skipped: list[dict[str, str]]
    notes: list[str]
    moved: set[str] = field(default_factory=set)  # patients and studies that were in two splits
    labels: Labels = field(default_factory=dict)
    manifest: list[dict[str, str]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def recorded(self, item: Item) -> dict[str, str]:
        """The last run's manifest row of an image; {} where there is no usable one."""
        row = self.previous.get(item.row["file"], {})
        return row if all(row.get(name, "").isdigit() for name in SIZE) else {}

    def unchanged(self, item: Item) -> bool:
        """Whether the source and what is made of it are as they were in the last run."""
        before = self.recorded(item)
        return bool(before) and all(before.get(k, "") == v for k, v in item.record.items())

    def facts(self, item: Item) -> dict[str, str]:
        """What was measured in the image as it is now; {} where it was not decoded yet."""
        row = self.checked.get(item.row["file"], {})
        return row if all(row.get(k, "") == v for k, v in item.record.items()) else {}

    def report(self, check: str, row: dict[str, str], detail: str) -> None:
        """Note a problem with one image."""
        values = {"check": check, "split": row["split"], "file": row["file"], "detail": detail}
        self.problems.append(values)


def make_plan(options: Options) -> Plan:
    """Read and check everything; writes nothing. Raises MammoError or OSError."""
    paths = [] if options.csv_path == [Path("none")] else options.csv_path
    tables = [read_csv(path) for path in paths]
    index = index_files(options.images_root)
    table, labels, adapter, notes = read_table(tables, options, index)
    check_ids(table)
    table, moved = check_splits(table, options.split)
    table, dropped = drop_duplicates(table)
    if dropped:
        notes.append(f"{dropped} identical duplicate rows in the CSV dropped")
    check_folders(options)
    matched, missing, extra, ambiguous = match_files(table, options.images_root, index, adapter)
    if ambiguous:
        notes.append(f"{len(ambiguous)} images have several files: {some(ambiguous)}")
    plan = Plan(options, [], {}, {}, {}, missing, extra, [], notes, moved, labels)
    if options.findings_csv:
        for key, found in read_findings(options.findings_csv, table, notes).items():
            found.values = plan.labels.get(key, ImageLabels()).values | found.values
            plan.labels[key] = found
    read_reports(plan)
    earlier = plan.previous.keys() | plan.claimed.keys()
    for row in matched.to_dict("records"):
        try:
            plan.items.append(inspect(row, options, row["file"] in earlier))
        except SkipImageError as reason:
            plan.skipped.append({**row, "reason": str(reason)})
    return plan


def check_folders(options: Options) -> None:
    """Refuse folders inside each other: the output would be read as input or the other way."""
    root, output = options.images_root.resolve(), options.output_dir.resolve()
    if root.is_relative_to(output) or output.is_relative_to(root):
        raise MammoError(
            f"--output_dir {options.output_dir} and --images_root {options.images_root} must not "
            "lie inside each other; give another --output_dir"
        )
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise MammoError(f"--output_dir {options.output_dir} is a file; give a folder")


def read_reports(plan: Plan) -> None:
    """Fill the plan with what earlier runs left. Raises MammoError where a file is not ours."""
    folder = plan.options.output_dir
    reports = {name: read_report(folder / name, name) for name in REPORTS}
    plan.previous, plan.claimed = reports["manifest.csv"], reports[CLAIMS]
    plan.checked = {**reports["image_checks.csv"], **read_journal(folder / JOURNAL)}
    if plan.labels:
        read_report(folder / "labels.csv", "labels.csv")


def read_report(path: Path, name: str) -> dict[str, dict[str, str]]:
    """Rows of an earlier run's report by `file` ({} where there are none).

    Raises MammoError where the file has other columns: it is someone else's and stays as it is.
    """
    if not os.path.lexists(path):
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        ours = set(SIGNATURES[name]) <= set(table.columns)
    except (OSError, ValueError):  # a folder, not text, or empty
        ours = False
    if not ours:
        raise MammoError(f"{path} is in the way and not from this program; move it elsewhere")
    if "source_size" not in table:
        return {}
    # An edited report must not make this program touch anything outside the folder.
    rows = table.to_dict("records")
    return {row["file"]: row for row in rows if OUTPUT_NAME.fullmatch(row["file"])}


def read_journal(path: Path) -> dict[str, dict[str, str]]:
    """What an unfinished run had decoded, by file; a last line cut short is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows[row["file"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def inspect(row: dict[str, str], options: Options, ours: bool) -> Item:
    """Find out whether a source can be laid out without opening it.

    `ours`: an earlier run made the output. Raises SkipImageError.
    """
    source, output = options.images_root / row["source"], options.output_dir / row["file"]
    try:
        found = source.stat()
    except OSError as error:
        raise SkipImageError(f"cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        folder = stat.S_ISDIR(found.st_mode)
        raise SkipImageError("is a folder" if folder else "is not a regular file")
    kind = format_of(source)
    if kind not in (".png", ".dcm", *RASTER):
        raise SkipImageError(f"the format {kind or 'without suffix'} is not read; convert to PNG")
    changes = [f"dicom {DICOM_VERSION} window {options.window}"] if kind == ".dcm" else []
    changes += [f"flip_right {row.get('laterality', '')}".strip()] if options.flip_right else []
    if kind != ".png" and row.get("spacing_mm"):
        changes.append(f"spacing {row['spacing_mm']}")
    item = Item(row, source, output, found, kind, " ".join(changes))
    if not ours and kind_of_output(item) == "other":
        raise SkipImageError(f"{row['file']} is in the way and not from this program; move it away")
    return item


def kind_of_output(item: Item) -> str:
    """What is at the output: none, hardlink, symlink or copy of the source as it is, or other."""
    try:
        there = item.output.lstat()
    except FileNotFoundError:
        return "none"
    if stat.S_ISLNK(there.st_mode):
        return "symlink" if os.readlink(item.output) == str(item.source.resolve()) else "other"
    if os.path.samestat(there, item.found):
        return "hardlink"
    # Copies and re-encoded images are given their source's time; only a copy has its size too.
    same_time = abs(there.st_mtime_ns - item.found.st_mtime_ns) < CLOCK_TOLERANCE_NS
    same_size = item.may_be_encoded or there.st_size == item.found.st_size
    return "copy" if stat.S_ISREG(there.st_mode) and same_time and same_size else "other"


def is_current(item: Item, plan: Plan) -> bool:
    """Whether the output is what this run would make."""
    kind, mode = kind_of_output(item), plan.options.mode
    accepted = {"hardlink": ["hardlink", "copy"], "copy": ["copy"], "symlink": ["symlink"]}[mode]
    if item.may_be_encoded:
        facts = plan.facts(item)
        if not facts and not plan.unchanged(item):
            return False
        if item.kind != ".png" or facts.get("flipped") == "1":
            return kind == "copy"
        if kind == "copy" and item.output.stat().st_size != item.found.st_size:
            return False  # mirrored by an earlier run
    if kind == "copy" and plan.recorded(item) and not plan.unchanged(item):
        return False  # the manifest knows times exactly, the file system perhaps to 2 s
    return kind in accepted


# 7 Decoding ---------------------------------------------------------------------------------------

Outcome = dict[str, str] | SkipImageError  # what was measured, or why the image is left out
Task = tuple[Item, Options, bool]  # the last: whether to write the output


def decode_item(item: Item, options: Options, write: bool) -> Outcome:
    """Decode, measure and where asked write one image. Raises OSError where it cannot be written."""
    try:
        pixels, header = decode(item.source, item.kind, options.window)
        facts = examine(pixels)
    except SkipImageError as reason:
        return reason
    except MemoryError:
        return SkipImageError("needs more memory than there is")
    # Some archives are mirrored against their tags: what is seen decides, the tag where that is unclear.
    tag = item.row.get("laterality") or header.get("laterality", "")
    wall = facts["chest_wall"] or {"L": "left", "R": "right"}.get(tag, "")
    flipped = options.flip_right and wall == "right"
    if write and (flipped or item.kind != ".png"):
        spacing = item.row.get("spacing_mm") or header.get("spacing_mm", "")
        shown = np.ascontiguousarray(pixels[:, ::-1]) if flipped else pixels
        write_file(item.output, encode_png(shown, spacing), item.found)
    return {**facts, **header, "flipped": str(int(flipped))}


def write_file(path: Path, content: bytes, source: os.stat_result | None = None) -> None:
    """Put a file there in one step, an image with the time of its source. Raises OSError."""
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(content)
        if source:
            os.utime(temporary, ns=(source.st_atime_ns, source.st_mtime_ns))


def decode_all(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
    """Each task and what came of it, in the order they finish; in processes where that pays."""
    small = sum(item.found.st_size for item, _, _ in tasks) < POOL_FROM
    if small and not any(may_crash(item) for item, _, _ in tasks):
        for task in tasks:
            yield task, decode_item(*task)
        return
    workers, left = min(tasks[0][1].num_workers, available_cores(), len(tasks)), deque(tasks)
    while left:
        running: dict[Future, Task] = {}
        try:
            with process_pool(workers, PRELOADED, use_one_thread) as pool:
                while left or running:
                    while left and len(running) < 2 * workers:  # bounds what is held in memory
                        running[pool.submit(decode_item, *left[0])] = left[0]
                        left.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = future.result()
                        yield running.pop(future), outcome
        except BrokenProcessPool:  # one of those in it is to blame
            for task in running.values():
                yield task, decode_alone(task)


def may_crash(item: Item) -> bool:
    """True for compressed DICOM: libjpeg ends its process at some damaged files, others have crashed."""
    try:
        with open(item.source, "rb") as file:
            return item.kind == ".dcm" and b"1.2.840.10008.1.2.4." in file.read(2048)
    except OSError:
        return False


def decode_alone(task: Task) -> Outcome:
    """Decode one image in a process of its own, which a crash of the decoder may end."""
    try:
        with process_pool(1, PRELOADED, use_one_thread) as pool:
            return pool.submit(decode_item, *task).result()
    except BrokenProcessPool:
        return SkipImageError("its decoder crashed, or it needs more memory than there is")


PRELOADED = ("__main__", "mammogram_dicom")  # imported once, not by each process


def use_one_thread() -> None:
    """Let OpenCV use no more: there is a process for each core."""
    cv2.setNumThreads(1)


# 8 Layout -----------------------------------------------------------------------------------------


def carry_out(plan: Plan) -> None:
    """Write everything; stopped at any point, the next run finishes. Raises OSError."""
    folder = plan.options.output_dir
    for split in sorted({item.row["split"] for item in plan.items}):
        (folder / split).mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, *filter(Path.is_dir, folder.iterdir())):
        files.remove_unfinished(place)
        for leftover in place.glob(f"*{TEMPORARY}"):
            leftover.unlink()
    # Until the manifest is written, this list tells a later run which files are not the user's.
    if not all(plan.unchanged(item) for item in plan.items):
        claims = {item.row["file"]: {**item.row, **item.record} for item in plan.items}
        write_report(folder, CLAIMS, list({**plan.claimed, **claims}.values()))
    lay_out(plan)
    remove_stale(plan)
    for split in {item.row["split"] for item in plan.items}:
        files.flush(folder / split)
    find_problems(plan)
    label_rows = make_labels(plan)
    write_report(folder, "missing.csv", plan.missing.to_dict("records"))
    write_report(folder, "extra.csv", [{"file": name} for name in plan.extra])
    write_report(folder, "skipped.csv", plan.skipped)
    write_report(folder, "problems.csv", plan.problems)
    write_report(folder, "image_checks.csv", [plan.checked[f] for f in sorted(plan.checked)])
    if plan.labels:
        columns = [*LABELS, *sorted({name for row in label_rows for name in row} - set(LABELS))]
        write_table(folder / "labels.csv", label_rows, columns)
    write_text(folder / "prepare_report.html", make_report(plan))
    write_report(folder, "manifest.csv", plan.manifest)
    (folder / CLAIMS).unlink(missing_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)


def lay_out(plan: Plan) -> None:
    """Lay every item out, filling the plan's manifest, counts and skipped images."""
    outcomes = decode_needed(plan)
    for item in plan.items:
        try:
            row, action = lay_out_image(item, plan, *outcomes.get(item.row["file"], ({}, False)))
        except SkipImageError as reason:
            plan.skipped.append({**item.row, "reason": str(reason)})
            continue
        plan.manifest.append(row)
        plan.counts[action] += 1
    plan.skipped.sort(key=lambda row: row["file"])
    plan.checked = {row["file"]: plan.checked.get(row["file"], {}) for row in plan.manifest}
    hash_equal_sizes(plan)
    plan.checked = {file: row for file, row in plan.checked.items() if row}


def decode_needed(plan: Plan) -> dict[str, tuple[Outcome, bool]]:
    """Decode what has to be, noting each image in the journal: outcome and whether it was written,
    by file."""
    options, tasks = plan.options, []
    for item in plan.items:
        current = is_current(item, plan)
        known = plan.facts(item).get("content", "").startswith("pixels")
        if (item.may_be_encoded and not current) or (options.verify and not known):
            tasks.append((item, options, not current))
    if not tasks:
        return {}
    outcomes = {}
    with tqdm(total=len(tasks), desc="images", unit="image", disable=not sys.stderr.isatty()) as bar:
        for (item, _, write), outcome in decode_all(tasks):
            bar.update()
            file = item.row["file"]
            outcomes[file] = outcome, write
            if isinstance(outcome, dict):
                plan.checked[file] = {"file": file, **item.record, **outcome}
                with open(options.output_dir / JOURNAL, "a", encoding="utf-8") as journal:
                    journal.write(json.dumps(plan.checked[file]) + "\n")
    return outcomes


def lay_out_image(item: Item, plan: Plan, outcome: Outcome, written: bool) -> tuple[dict[str, str], str]:
    """Lay one image out where it is not already; its manifest row and what was done.

    Raises SkipImageError for a bad image and OSError where the output cannot be written.
    """
    if isinstance(outcome, SkipImageError):
        raise outcome
    before, unchanged, facts = plan.recorded(item), plan.unchanged(item), plan.facts(item)
    action = "already there"
    if item.kind != ".png" or facts.get("flipped") == "1":
        action = "re-encoded" if written else action
    else:
        try:
            if not unchanged:
                read_png_header(item.source)  # before a damaged file gets a place among the good
        except OSError as error:
            raise SkipImageError(f"cannot be read: {error.strerror}") from error
        if not is_current(item, plan):
            action = place(item, plan.options.mode)
    if action != "already there" and before:
        plan.counts["replaced"] += 1
    reusable = unchanged and action == "already there"
    size = [before[n] for n in SIZE] if reusable else read_png_header(item.output)
    values = {**item.row, **item.record, "view": item.row.get("view_position", "")}
    for name in ("laterality", "view", "implant", "spacing_mm", "view_modifier", "flipped"):
        earlier = before.get(name, "") if unchanged else ""
        values[name] = values.get(name) or facts.get(name) or earlier  # table, then header
    values |= dict(zip(SIZE, map(str, size), strict=True))
    return {name: values.get(name, "") for name in REPORTS["manifest.csv"]}, action


def place(item: Item, mode: str) -> str:
    """Link or copy one PNG as it is, replacing what was there in one step; returns what was done.

    Raises SkipImageError where the source cannot be read and OSError where writing fails.
    """
    temporary = files.unfinished_name(item.output)
    if mode == "symlink":
        temporary.symlink_to(item.source.resolve())
        os.replace(temporary, item.output)
        return "linked by symlink"
    if mode == "hardlink" and hardlinked(item.source.resolve(), temporary):
        os.replace(temporary, item.output)
        return "linked"
    write_file(item.output, read_source(item.source), item.found)
    return "copied"


def read_source(path: Path) -> bytes:
    """The file's bytes; a source that cannot be read is one image's trouble, not the run's."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SkipImageError(f"cannot be read: {error.strerror}") from error


def hardlinked(source: Path, target: Path) -> bool:
    """Make a hard link; False where the file system or its rules do not allow it."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def hash_equal_sizes(plan: Plan) -> None:
    """Note a hash of PNG files that were not decoded and are equally long: they may be the same."""
    items = {item.row["file"]: item for item in plan.items}
    undecoded = [file for file, row in plan.checked.items() if not row or not plan.facts(items[file])]
    lengths = Counter(items[file].found.st_size for file in undecoded)
    for file in undecoded:
        item = items[file]
        plan.checked[file] = {}
        if lengths[item.found.st_size] > 1:
            digest = hashlib.sha256(item.output.read_bytes()).hexdigest()[:32]
            plan.checked[file] = {"file": file, **item.record, "content": f"file {digest}"}


def remove_stale(plan: Plan) -> None:
    """Remove outputs of earlier runs that the CSV no longer lists there, such as a study that moved
    to another split. Only where nothing is lost: the source still holds the same image."""
    listed = {row["file"] for row in plan.manifest}
    for file, row in {**plan.claimed, **plan.previous}.items():
        source, output = plan.options.images_root / row["source"], plan.options.output_dir / file
        if file in listed or not source.is_file():
            continue
        item = Item(row, source, output, source.stat(), format_of(source), row.get("settings", ""))
        if kind_of_output(item) not in ("none", "other"):
            output.unlink()
            plan.counts["removed"] += 1


# 9 Labels -----------------------------------------------------------------------------------------

BOX = ["xmin", "ymin", "xmax", "ymax"]


def read_findings(csv_path: Path, table: pd.DataFrame, notes: list[str]) -> Labels:
    """Labels and boxes from VinDr-Mammo's finding_annotations.csv, one row per finding.

    VinDr lists every image, those without a finding as 'No Finding': for the images it lists, a
    category that is not named is absent (0). Raises MammoError where the columns are others.
    """
    rows = read_csv(csv_path)
    needed = ["study_id", "image_id", "finding_categories", *BOX]
    missing = [name for name in needed if name not in rows]
    if missing:
        raise MammoError(
            f"{csv_path} lacks the column {', '.join(missing)}; is it finding_annotations.csv?"
        )
    rows = rows[(rows != "").any(axis=1)]
    rows = rows.assign(
        names=[read_categories(v, n, csv_path) for n, v in rows["finding_categories"].items()]
    )
    every = {column_of(name) for names in rows["names"] for name in names} | {"mass", "calcification"}
    labels: Labels = {}
    for row in rows.to_dict("records"):
        key = (row["study_id"], row["image_id"])
        entry = labels.setdefault(key, ImageLabels(dict.fromkeys(every - {""}, "0"), []))
        entry.add({column_of(name): "1" for name in row["names"] if column_of(name)})
        corners = [number(row[side]) for side in BOX]
        if None not in corners and entry.boxes is not None:
            entry.boxes.append({"finding": row["names"], **dict(zip(BOX, corners, strict=True))})
        height, width = number(row.get("height", "")), number(row.get("width", ""))
        entry.size = (height, width) if height and width else None
    unknown = labels.keys() - set(zip(table["study_id"], table["image_id"], strict=True))
    if unknown:
        names = some(sorted("/".join(key) for key in unknown))
        notes.append(f"{len(unknown)} images of {csv_path.name} are not in the table: {names}")
    return labels


def read_categories(value: str, line: int, csv_path: Path) -> list[str]:
    """['Mass', 'Skin Thickening'] of the Python list that VinDr writes. Raises MammoError."""
    try:
        names = ast.literal_eval(value)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise MammoError(
            f"line {line} of {csv_path}: finding_categories {value[:MAX_ID_LENGTH]!r} is not a list"
        ) from None
    return names


def column_of(category: str) -> str:
    """Column of labels.csv of a finding; '' for 'No Finding'."""
    name = finding_column(category)
    return "" if name == "no_finding" else name


def number(value: str) -> float | None:
    """The finite number in a table's cell, or None."""
    try:
        found = float(value)
    except ValueError:
        return None
    return found if np.isfinite(found) else None


def make_labels(plan: Plan) -> list[dict[str, str]]:
    """Rows of labels.csv, one per image of the manifest; what was done to boxes goes to the problems."""
    rows = []
    for image in plan.manifest:
        study, tag = image["study_id"], image["laterality"]
        entry = plan.labels.get((study, image["image_id"])) or plan.labels.get((study, f"side {tag}"))
        entry = entry or ImageLabels()
        known = {name: image[name] for name in LABELS if name in image}
        if image["patient_id"] not in ("", study):
            known["patient_id"] = image["patient_id"]
        boxes = "" if entry.boxes is None else json.dumps(fit_boxes(entry, image, plan))
        rows.append({"image": image["file"], **known, **entry.values, "boxes": boxes})
    return rows


def fit_boxes(entry: ImageLabels, image: dict[str, str], plan: Plan) -> list[dict]:
    """The boxes in the pixels of the PNG: scaled, clipped to the image, mirrored with it."""
    height, width = int(image["height"]), int(image["width"])
    stated = entry.size or (height, width)
    scales = height / stated[0], width / stated[1]
    boxes = entry.boxes or []
    if boxes and abs(scales[0] / scales[1] - 1) > ASPECT_TOLERANCE:
        plan.report("boxes dropped", image, f"{len(boxes)} boxes: the aspect is not the table's")
        return []
    fitted = []
    for box in boxes:
        left, right = sorted(box[name] * scales[1] for name in ("xmin", "xmax"))
        top, bottom = sorted(box[name] * scales[0] for name in ("ymin", "ymax"))
        inside = [
            min(max(v, 0), limit)
            for v, limit in ((left, width), (right, width), (top, height), (bottom, height))
        ]
        if inside[0] >= inside[1] or inside[2] >= inside[3]:
            plan.report("boxes dropped", image, "1 box lies outside the image")
            continue
        if inside != [left, right, top, bottom]:
            plan.report("boxes clipped", image, "1 box left the image")
        left, right, top, bottom = inside
        if image["flipped"] == "1":
            left, right = width - right, width - left
        corners = dict(zip(BOX, (round(v, 2) for v in (left, top, right, bottom)), strict=True))
        fitted.append({"finding": box["finding"], **corners})
    return fitted


# 10 Checks ----------------------------------------------------------------------------------------

CHECKS = {  # check -> what it means, for people
    "patient in two splits": "moved to test, so that training does not see them",
    "duplicate": "the same pixels under two names",
    "different size": "not as in the CSV",
    "aspect": "resized or cropped otherwise than in proportion: mm per pixel and boxes no longer hold",
    "blank": "all pixels have one value",
    "polarity": "air is bright: inverted, or no mammogram",
    "padding": "most of the image was padding",
    "side": "the breast is not on the side that its laterality says",
    "laterality": "the table and the DICOM header disagree; the table counts",
    "view": "the table and the DICOM header disagree; the table counts",
    "no laterality": "not mirrored: neither tag nor pixels tell the side",
    "raw": "for processing: detector values, not what readers see",
    "no modality": "the DICOM header does not say that it is a mammogram",
    "boxes clipped": "boxes that left the image",
    "boxes dropped": "boxes that do not fit the image",
}


def find_problems(plan: Plan) -> None:
    """Fill the plan's problems, in the order of CHECKS and of the manifest."""
    tables = {item.row["file"]: item.row for item in plan.items}
    find_duplicates(plan)
    for row in plan.manifest:
        if {row["patient_id"], row["study_id"]} & plan.moved:
            plan.report("patient in two splits", row, "test wins")
        check_size_stated(plan, row, tables[row["file"]])
        facts = plan.checked.get(row["file"], {})
        if facts.get("content", "").startswith("pixels"):
            check_pixels(plan, row, facts)
        if facts.get("modality") is not None and row["settings"].startswith("dicom"):
            check_header(plan, row, facts, tables[row["file"]])


def find_duplicates(plan: Plan) -> None:
    """Report images of equal content under several names, saying where they cross splits or patients."""
    groups: dict[str, list[dict[str, str]]] = {}
    notes = (("split", ", ACROSS SPLITS"), ("study_id", ", across studies"))
    for row in plan.manifest:
        content = plan.checked.get(row["file"], {}).get("content", "")
        groups.setdefault(content or row["file"], []).append(row)
    for first, *others in groups.values():
        for row in others:
            note = next((text for name, text in notes if row[name] != first[name]), "")
            plan.report("duplicate", row, f"same as {first['file']}{note}")


def check_size_stated(plan: Plan, row: dict[str, str], stated: dict[str, str]) -> None:
    """Report an image whose size is not the table's (rows without a number there are left out)."""
    sizes = [stated.get(name, "") for name in ("height", "width")]
    numbers = [re.sub(r"\.0*$", "", value) for value in sizes]  # pandas may have written 512.0
    actual = [row["height"], row["width"]]
    if not all(value.isdigit() and int(value) for value in numbers) or numbers == actual:
        return
    plan.report("different size", row, f"{' x '.join(actual)}, CSV {' x '.join(sizes)}")
    ratios = [int(a) / int(b) for a, b in zip(actual, numbers, strict=True)]
    if abs(ratios[0] / ratios[1] - 1) > ASPECT_TOLERANCE:
        plan.report("aspect", row, f"height x {ratios[0]:.3f}, width x {ratios[1]:.3f}")


def check_pixels(plan: Plan, row: dict[str, str], facts: dict[str, str]) -> None:
    """Report what the pixels of one image show."""
    expected = {"L": "left", "R": "right"}.get(row["laterality"], "")
    if facts["minimum"] == facts["maximum"]:
        plan.report("blank", row, f"value {facts['minimum']}")
    if facts["air"] == "bright":
        plan.report("polarity", row, "the border is brighter than the rest")
    if expected and facts["chest_wall"] not in ("", expected):
        plan.report("side", row, f"laterality {row['laterality']}, chest wall {facts['chest_wall']}")
    if plan.options.flip_right and not expected and not facts["chest_wall"]:
        plan.report("no laterality", row, "left as it is")
    if float(facts.get("padding") or 0) > 0.5:
        plan.report("padding", row, f"{float(facts['padding']):.0%} of the pixels")


def check_header(plan: Plan, row: dict[str, str], facts: dict[str, str], stated: dict[str, str]) -> None:
    """Report where a DICOM header disagrees with the table or with what an image for reading has."""
    for name, column in (("laterality", "laterality"), ("view", "view_position")):
        pair = stated.get(column, ""), facts[name]
        if all(pair) and pair[0] != pair[1]:
            plan.report(name, row, f"table {pair[0]}, header {pair[1]}")
    if facts["intent"] == "FOR PROCESSING":
        plan.report("raw", row, f"FOR PROCESSING {facts['relationship']}".strip())
    if not facts["modality"]:
        plan.report("no modality", row, "Modality is empty")


# 11 Report ----------------------------------------------------------------------------------------


def write_report(folder: Path, name: str, rows: Sequence[dict]) -> None:
    """Write a CSV in one step; an unchanged one is not touched, an empty list is no file."""
    if not rows and name != "manifest.csv":
        (folder / name).unlink(missing_ok=True)
        return
    write_table(folder / name, rows, REPORTS[name])


def write_table(path: Path, rows: Sequence[dict], columns: list[str]) -> None:
    """Write rows as CSV; what a row lacks is empty."""
    write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))


def write_text(path: Path, text: str) -> None:
    """Write a file in one step; one that holds the same already is not touched."""
    content = text.encode("utf-8", errors="backslashreplace")  # names may hold any byte
    if path.exists() and path.read_bytes() == content:
        return
    write_file(path, content)
    files.flush(path.parent)


def some(names: Sequence) -> str:
    """The first few names in one line, unprintable characters escaped."""
    shown = ", ".join(repr(str(name))[1:-1] for name in list(names)[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def foreign_files(plan: Plan) -> list[str]:
    """Files in the output folder that this program did not put there, or not in this run."""
    folder = plan.options.output_dir
    ours = {*REPORTS, *OTHER_KNOWN, *(row["file"] for row in plan.manifest)}
    found = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    return sorted({path.relative_to(folder).as_posix() for path in found} - ours)


def bits_used(row: dict[str, str], facts: dict[str, str]) -> str:
    """Bits that hold the image's largest value, or those of the PNG where it was not decoded."""
    maximum = facts.get("maximum", "")
    if not maximum.isdigit():
        return f"{row['bit_depth']} (not decoded)"
    return str(max(1, int(maximum).bit_length()))


REPORT_STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; max-width: 1180px; margin: auto; padding: 1rem }
section { display: inline-block; vertical-align: top; min-width: 12rem; margin-right: 1.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse } h2 { margin: 1.2rem 0 .2rem }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }
td { overflow-wrap: anywhere; min-width: 5.5rem; vertical-align: top }
"""


def make_report(plan: Plan) -> str:
    """The page prepare_report.html: counts per split, bit depths, and every check with its images."""
    images = pd.DataFrame(plan.manifest, columns=REPORTS["manifest.csv"])
    splits = [
        (n, len(g), g["study_id"].nunique(), patients(g).nunique()) for n, g in images.groupby("split")
    ]
    depths = Counter(bits_used(row, plan.checked.get(row["file"], {})) for row in plan.manifest)
    decoded = sum("pixels" in row.get("content", "") for row in plan.checked.values())
    missing = (plan.missing["study_id"] + "/" + plan.missing["image_id"]).tolist()
    lists = [("missing", "in the table, not on disk", [(name, "") for name in missing])]
    lists += [("unreadable", "skipped", [(row["source"], row["reason"]) for row in plan.skipped])]
    lists += [("extra", "on disk, not in the table", [(name, "") for name in plan.extra])]
    for check, meaning in CHECKS.items():
        found = [(p["file"], p["detail"]) for p in plan.problems if p["check"] == check]
        lists.append((check, meaning, found))
    undecoded = f"{len(images) - decoded} PNG were not decoded; --verify checks their pixels too."
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>prepare_dataset</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{REPORT_STYLE}</style>",
        f"<h1>{len(images)} images laid out</h1><p>{undecoded if decoded < len(images) else ''}</p>",
        files.html_table(splits, ["split", "images", "studies", "patients"]),
        "<section><h2>bits used</h2>" + files.html_table(sorted(depths.items()), ["bits", "images"]),
        "</section>",
    ]
    for column in ("laterality", "view", "implant", "view_modifier", "flipped", "spacing_mm"):
        values = images[column].replace("", "unknown").value_counts().sort_index()
        table = files.html_table(values.items(), [column, "images"])
        parts.append(f"<section><h2>{column}</h2>{table}</section>")
    parts.append(
        "<h2>Checks</h2>"
        + files.html_table([(c, m, len(f)) for c, m, f in lists], ["check", "meaning", "images"])
    )
    for check, _, found in lists:
        if found:
            more = f" (the first {REPORTED} of {len(found)})" if len(found) > REPORTED else ""
            parts.append(
                f"<h2>{check}{more}</h2>" + files.html_table(found[:REPORTED], ["file", "detail"])
            )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in plan.notes)
    parts.append(f"<h2>Notes</h2><ul>{notes}</ul>\n" if notes else "")
    return "\n".join(parts)


def print_summary(plan: Plan) -> None:
    """Print the counts per split, what needs attention and the next command."""
    options, counts = plan.options, plan.counts
    rows = pd.DataFrame(plan.manifest, columns=REPORTS["manifest.csv"])
    print(f"{len(rows)} images laid out in {options.output_dir}")
    for split, group in rows.groupby("split"):
        print(f"  {split:<10} {len(group):>7} images  {group['study_id'].nunique():>6} studies")
    if counts:
        print("  " + ", ".join(f"{counts[key]} {key}" for key in sorted(counts)))
    if options.mode == "hardlink" and counts["copied"]:
        print("  hard links were not possible for some files; those were copied")
    missing = (plan.missing["study_id"] + "/" + plan.missing["image_id"]).tolist()
    skipped = [f"{row['source']} ({row['reason']})" for row in plan.skipped]
    lists = [
        ("missing", "in the CSV, not on disk (missing.csv)", missing),
        ("extra", "on disk, not in the CSV (extra.csv)", plan.extra),
        ("skipped", "not usable (skipped.csv)", skipped),
        ("foreign", "in the output folder, not from this run, left alone", foreign_files(plan)),
    ]
    for check, meaning in CHECKS.items():
        found = [f"{p['file']} ({p['detail']})" for p in plan.problems if p["check"] == check]
        lists.append((check, f"{meaning} (problems.csv)", found))
    for label, meaning, names in lists:
        if names:
            print(f"{label}: {len(names)} {meaning}: {some(names)}")
    for note in plan.notes:
        print(f"note: {note}")
    print(f"Report: {options.output_dir / 'prepare_report.html'}")
    splits = sorted(set(rows["split"]) - {"test"}, key=lambda name: (name != "training", name))
    if splits:
        print(f"Next: python train_byol_mammo.py --data_dir {options.output_dir / splits[0]}")
    elif len(rows):
        print("All images are in the split test: there is none to pre-train on")
    else:
        print("No image was laid out; the reasons are in skipped.csv")


# 12 Entry -----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code described at the top."""
    settings.escape_names()
    try:
        code = run(argv)
        sys.stdout.flush()  # here: at the interpreter's end an error could no longer be told
        return code
    except BrokenPipeError:
        return settings.end_without_reader()


def run(argv: Sequence[str] | None) -> int:
    """The program without what becomes of its output."""
    try:
        options = parse_options(argv)
    except MammoError as error:
        print(f"prepare_dataset: error: {error}", file=sys.stderr)
        return 2
    try:
        plan = make_plan(options)
    except (MammoError, OSError) as error:
        print(f"prepare_dataset: error: {error}. Nothing was written.", file=sys.stderr)
        return 2
    try:
        carry_out(plan)
    except (OSError, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        print(f"prepare_dataset: stopped: {reason}. The same command resumes.", file=sys.stderr)
        return 3
    print_summary(plan)
    return 1 if len(plan.missing) or plan.skipped else 0


if __name__ == "__main__":
    sys.exit(main())
