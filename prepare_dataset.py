"""Lay a mammogram archive out by split: CSV + images -> split_images/<split>/ + manifest.csv.

    python prepare_dataset.py --csv_path breast-level_annotations.csv --images_root images_png
    python prepare_dataset.py --csv_path breast-level_annotations.csv --images_root images \\
        --findings_csv finding_annotations.csv --verify       labels too, and all pixels checked
    python prepare_dataset.py --csv_path mass_case_description_*.csv calc_case_description_*.csv \\
        --images_root CBIS-DDSM --split test_wins
    python prepare_dataset.py --csv_path none --images_root dicom     no table: every image there
    python prepare_dataset.py --csv_path my.csv --images_root my_images \\
        --columns image=path,study=exam,patient=mrn_hash,laterality=side,mass=has_mass
    python prepare_dataset.py --csv_path none --images_root dicom --dry_run    what it would do
    python prepare_dataset.py check split_images/manifest.csv --sample 2000    contact sheets, the
                                  oddest of the images first; check --help lists its flags
    python prepare_dataset.py inspect scan.dcm     header, polarity, window, mask and tiles in a picture

The archive is told by its header (ADAPTERS): VinDr-Mammo and what is laid out like it, CBIS-DDSM,
INbreast, CMMD, RSNA 2022, CDD-CESM, EMBED, MIAS; DDSM by its .ics files; --columns maps any other table.
A table without a split gets one by patient, the same in every run (--test_share).

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
    2 Table           read_table, set_splits, check_ids, check_splits, check_spacing
    3 Files           match_files, unread_notes
    4 Image formats   read_png_header, decode, examine, encode_png
    5 Plan            what is there already, what must not be touched
    6 Decoding        in processes, one broken file never stops the rest
    7 Layout          atomic writing, links and copies, lay_out, remove_stale
    8 Labels          findings and boxes to labels.csv
    9 Checks          what is wrong with images that were laid out
    10 Report         manifest and lists, prepare_report.html, summary
    11 Dry run        what would be done, bytes and time
    12 Archive check  check: contact sheets and check.csv
    13 Inspection     inspect: a page for each of a few files
    14 Entry          main

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
import functools
import hashlib
import html
import json
import math
import os
import re
import stat
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from byol_mammo import (
    acquisition,
    anatomy,
    files,
    film_archives,
    foresight,
    framing,
    labels as labelling,
    settings,
)
from byol_mammo.archive_files import (
    DICOM_INSIDE,
    EVERY_FILE,
    LEFT_OUT,
    RASTER,
    SUFFIXES,
    Index,
    format_of,
    index_files,
    suffix_of,
    without_suffix,
)
from byol_mammo.archives import ADAPTERS, FOLDER, GENERIC, VINDR, Adapter, adapter_of, generic_adapter
from byol_mammo.images import (
    CLAIMS,
    MAX_SAMPLES,
    PNG_END,
    PNG_SIGNATURE,
    decode_by_opencv,
    stored_otherwise,
)
from byol_mammo.labels import finding_column, split_named
from byol_mammo.processes import available_cores, process_pool
from byol_mammo.settings import MammoError, command_of
from byol_mammo.spacing import differ, judge_spacing, spacing_values
from byol_mammo.tables import (
    FINDINGS,
    MAX_ID_LENGTH,
    OPTIONAL,
    REQUIRED,
    SAFE_NAME,
    ImageLabels,
    Labels,
    Reading,
    is_safe_name,
    resolve,
    safe_name,
    side,
    some,
)

if TYPE_CHECKING:
    from byol_mammo import archive_check, inspection

# 1 Configuration ----------------------------------------------------------------------------------

CSV_PATH = "breast-level_annotations.csv"  # one row per image
IMAGES_ROOT = "images_png"  # folder that holds <study_id>/<image_id>.png
OUTPUT_DIR = "./split_images"  # folder to write; made if needed
MODE = "hardlink"  # hardlink (shares the bytes; a copy where impossible), copy or symlink
WINDOW = "none"  # none (stored values) or voi (the DICOM header's look-up table or window)
SPLIT = "csv"  # csv (refused where a patient is in two), test_wins (such a patient to test) or patient
TEST_SHARE = 0.2  # of patients, where the table has no split or --split patient
ON_CONFLICT = "refuse"  # rows about one image that disagree: refuse, or take the first, last or max
NUM_WORKERS = 16  # processes that decode; never more than the cores there are

REPORTED = 200  # problems shown per check in the HTML report
CLOCK_TOLERANCE_NS = 2_000_000_000  # FAT and exFAT keep modification times to 2 s
POOL_FROM = 100_000_000  # bytes to decode from which starting processes (about a second) pays
ASPECT_TOLERANCE = 0.01  # relative; rounding in a resize stays below, 912 x 1520 of a 2:3 film does not
DICOM_VERSION = 2  # counts up when the same DICOM file would give other pixels, or is kept out
FLIP_VERSION = 2  # counts up when --flip_right would see the chest wall of the same image elsewhere
JUDGED_SIDE = 16  # px, least side of an image on which polarity and side are judged

DEFAULT = " (default: %(default)s)"  # argparse fills it in
SIZE = ["height", "width", "bit_depth"]
SOURCE = ["source", "source_size", "source_mtime_ns"]
RECORD = [*SOURCE, "settings"]  # an output is up to date while these are as they were
HEADER = [  # what is taken from a DICOM header, see mammogram_dicom.HEADER
    *("laterality", "view", "view_modifier", "spacing_mm", "implant", "modality", "photometric"),
    *("bits_stored", "intent", "relationship", "compression", "padding"),
    *(*acquisition.COLUMNS, "doubts"),
]
KEPT_OUT = {"magnified", "spot"}  # view modifiers: their scale and field are not those of a contact view
MEASURED = ["content", "minimum", "maximum", "air", "chest_wall", "margin", "flipped"]  # see examine
LABELS = [
    *("image", "study_id", "split", "laterality", "view", "breast_birads", "breast_density"),
    *("mass", "calcification", "boxes"),
]
EARLIER = ".earlier"  # where files of earlier runs are set aside that nothing else holds
PHOTOMETRIC = {"MONOCHROME1": "inverted", "MONOCHROME2": "as_is"}
SEEN = {"dark": "as_is", "bright": "inverted"}  # polarity by the air
NO_VOTE = "none"  # margin of an image that is blank or too small to be judged
NOT_FINDINGS = {*LABELS, "patient_id"} - set(FINDINGS)
JOURNAL = ".prepare_dataset.journal.jsonl"  # what an unfinished run has decoded
REPORTS = {  # file name -> columns; a file of this name with other columns is not ours
    "manifest.csv": [
        *("file", "study_id", "image_id", "laterality", "view", "breast_birads", "breast_density"),
        *(*SIZE, "split", *SOURCE, "spacing_mm", "patient_id", "implant", "view_modifier"),
        *("flipped", "settings", "polarity", "polarity_from", *acquisition.COLUMNS, "archive"),
    ],
    "missing.csv": ["study_id", "image_id", "split"],
    "extra.csv": ["file"],
    "skipped.csv": ["study_id", "image_id", "split", "source", "reason"],
    "image_checks.csv": ["file", *RECORD, *MEASURED, *HEADER],
    "problems.csv": ["check", "split", "file", "detail"],
    CLAIMS: ["file", *SOURCE],
}
# What each file of ours has at least; older ones have these.
SIGNATURES = {
    **REPORTS,
    "manifest.csv": REPORTS["manifest.csv"][:14],
    "image_checks.csv": [
        name
        for name in REPORTS["image_checks.csv"]
        if name not in ("margin", "doubts", *acquisition.COLUMNS)
    ],
    "labels.csv": LABELS,
}
OTHER_KNOWN = {"labels.csv", "prepare_report.html"}
TEMPORARY = ".prepare_dataset.tmp"  # ending of files not yet complete, in older versions
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
    patient_pattern: str = ""
    on_conflict: str = ON_CONFLICT
    num_workers: int = NUM_WORKERS
    dask: str = ""
    flip_right: bool = False
    verify: bool = False
    dry_run: bool = False


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
    text = "regular expression that finds the patient in an image's path, as its first group"
    add("--patient_pattern", default="", metavar="REGEX", help=text)
    text = "rows about one image that disagree: refuse; first, last; max: the more severe per column"
    choices = ["refuse", "first", "last", "max"]
    add("--on_conflict", choices=choices, default=ON_CONFLICT, help=text + DEFAULT)
    text = "processes that decode, at most one per core"
    add("--num_workers", type=int, default=NUM_WORKERS, metavar="N", help=text + DEFAULT)
    text = "scheduler file or address of a Dask cluster whose workers decode, instead of this machine"
    add("--dask", default="", metavar="FILE_OR_ADDRESS", help=text)
    text = "mirror images whose chest wall is on the right; recorded as flipped in the manifest"
    add("--flip_right", action="store_true", help=text)
    text = "decode PNG in full too, once: skip damaged ones, check the pixels of all"
    add("--verify", action="store_true", help=text)
    text = "say what would be laid out, skipped and removed, how many bytes and how long; write nothing"
    add("--dry_run", action="store_true", help=text)
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
    try:
        re.compile(options.patient_pattern)
    except re.error as error:
        parser.error(f"--patient_pattern {options.patient_pattern!r} is no regular expression: {error}")
    if options.num_workers < 1:
        parser.error(f"--num_workers {options.num_workers} is less than 1")
    return options


def nearest(name: str, candidates: Sequence[str]) -> str:
    """The candidate most like `name`, or all of them where none is like it."""
    return settings.nearest(name, candidates) or "none, there are " + ", ".join(candidates)


# 2 Table ------------------------------------------------------------------------------------------


def read_csv(csv_path: Path, whole: bool = True) -> pd.DataFrame:
    """One CSV as strings (leading zeros kept), indexed by 'NAME line N'; unless `whole`, without columns
    that its archive's adapter does not read.

    Raises MammoError where the file is missing, empty or not a table.
    """
    if not csv_path.is_file():
        raise MammoError(f"there is no file {csv_path}; give the annotation CSV with --csv_path")
    files.refuse_other_tables(csv_path)
    if (films := film_archives.read_mias(csv_path)) is not None:
        return films
    delimiter = delimiter_of(csv_path)
    try:
        wanted = None if whole else columns_read(csv_path, delimiter)
        # Blank lines are kept for now, so that the index gives the line in the file.
        table = files.parse_table(csv_path, sep=delimiter, skip_blank_lines=False, usecols=wanted)
    except ValueError as error:
        raise MammoError(f"{csv_path} is not a comma-separated UTF-8 table: {error}") from None
    table.columns = table.columns.str.strip()
    if len(twice := table.columns[table.columns.duplicated()]):  # pandas told them apart by a blank
        raise MammoError(f"{csv_path} has the column {twice[0]} twice; keep one of them")
    table = table.fillna("").apply(lambda column: column.str.strip(" \t\r\n"))
    # The header is line 1.
    table.index = pd.Index([f"{csv_path.name} line {n}" for n in range(2, len(table) + 2)])
    return table


def columns_read(csv_path: Path, delimiter: str) -> Callable[[str], bool] | None:
    """Which columns are read of a table, by their names; None: all, as of most archives."""
    header = set(files.parse_table(csv_path, sep=delimiter, nrows=0).columns.str.strip())
    # All tables of such an archive have its ids, which its header begins with.
    reads = next((a.reads for a in ADAPTERS if a.reads and set(a.header[:2]) <= header), None)
    return (lambda name: name.strip() in reads) if reads else None


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
) -> tuple[pd.DataFrame, Reading, Adapter]:
    """The archive's table in our columns (those of REQUIRED, OPTIONAL, FINDINGS, patient_id, implant,
    spacing_mm that it has, and `places`: where to look for the file), one row per image; what else it
    says, and how it was read.

    Raises MammoError where a column is missing, or where what is there can be read in two ways.
    """
    adapter, raw = FOLDER, pd.DataFrame()
    if tables:
        raw = pd.concat(tables)
        adapter = generic_adapter(options.columns) if options.columns else adapter_of(raw)
        raw = check_columns(raw, adapter, options)
    reading = Reading(index, options.patient_pattern, options.on_conflict)
    table = adapter.adapt(raw, reading)
    if table.empty:
        raise MammoError("; ".join(["the table lists no mammogram that is laid out", *reading.notes]))
    absent = [column for column in OPTIONAL if column not in table]
    if absent and tables:
        reading.notes.append(f"not in the CSV, so empty in the manifest: {some(absent)}")
    if adapter is not VINDR:
        reading.notes.append(f"read as {adapter.name}")
    check_labels_said(table, reading, adapter)
    if options.patient_pattern and tables:
        find_patients(table, reading)
    set_splits(table, options, reading)
    check_ids(table, adapter)
    check_studies(table, adapter)
    table = check_spacing(table, reading.notes)
    archive = adapter.name if adapter in ADAPTERS else ""
    table = acquisition.of_table(table, raw, archive, reading.notes)
    unique = table.drop_duplicates()
    if len(unique) < len(table):
        dropped = len(table) - len(unique)
        reading.notes.append(f"{dropped} identical duplicate rows in the CSV dropped")
    keys = ["study_id", "image_id"]
    table = resolve(unique, keys, options.on_conflict, adapter.columns, reading.notes)
    return table, reading, adapter


def find_patients(table: pd.DataFrame, reading: Reading) -> None:
    """Fill patient_id by --patient_pattern, from the path of each row's file; '' where there is none.

    Raises MammoError where the table names the patients itself.
    """
    if "patient_id" in table and table["patient_id"].any() and not reading.nameless:
        raise MammoError("the table names the patients, so that --patient_pattern has nothing to find")
    table["patient_id"] = [  # rows with several images are refused later, see match_files
        safe_name(reading.patient_in(found[0], "")) if len(set(map(stem_of, found))) == 1 else ""
        for found in files_of_rows(table, reading.index)
    ]
    reading.nameless = ""


def set_splits(table: pd.DataFrame, options: Options, reading: Reading) -> None:
    """Fill the column split: the table's, in our spelling, or by patient where there is none."""
    if "split" in table:
        table["split"] = table["split"].map(lambda name: split_named(name) or name)
    if "split" in table and options.split != "patient":
        return
    by_chance = 0 < options.test_share < 1
    if by_chance and reading.nameless:
        raise MammoError(f"{reading.nameless}; or give --test_share 0, which makes no test split")
    table["split"] = split_by_patient(table, options.test_share)
    keys = patients(table)
    chosen = keys[table["split"] == "test"].nunique()
    share = f"{options.test_share:.0%} asked for"
    reading.notes.append(f"split by patient: {chosen} of {keys.nunique()} patients for test ({share})")
    nobody = "patient_id" not in table or not table["patient_id"].any()
    if by_chance and nobody:
        reading.notes.append(
            f"nothing names the patients: each of {table['study_id'].nunique()} studies counts as one, "
            "and images of one woman may fall on both sides of the split; name them by --columns "
            "patient=... or --patient_pattern 'REGEX'"
        )
    elif by_chance and (unnamed := int((~keys.isin(table["patient_id"])).sum())):
        reading.notes.append(f"{unnamed} rows name no patient: each of their studies counts as one")
    elif len(table) > 1 and keys.nunique() == 1:
        reading.notes.append("all images count as one patient; is --images_root one folder too high?")


def check_labels_said(table: pd.DataFrame, reading: Reading, adapter: Adapter) -> None:
    """Refuse a table of an archive with labels in which every label is empty."""
    names = [name for name in adapter.labels if name in table]
    said = {value for name in names for value in table[name].unique()}
    said |= {value for entry in reading.labels.values() for value in entry.values.values()}
    if adapter.labels and not said & {"0", "1"}:
        raise MammoError(
            f"the table ({adapter.name}) has no value for {', '.join(adapter.labels)}, so that every "
            "label would be empty; give the table that has them, or, for images alone, map it with "
            "--columns image=...,study=...,patient=..."
        )


def check_columns(raw: pd.DataFrame, adapter: Adapter, options: Options) -> pd.DataFrame:
    """The rows with a value. Refuses a table that lacks a required column, has one of ours twice, has no
    rows, or is another table than is needed."""
    csv_path = ", ".join(map(str, options.csv_path))
    found = list(raw.columns)
    wanted = [*adapter.header, *(REQUIRED + OPTIONAL if adapter is VINDR else [])]
    twice = [name for name in wanted if f"{name}.1" in found]  # as pandas renames it
    if twice:
        raise MammoError(f"{csv_path} has the column {twice[0]} twice; keep one of them")
    if adapter is VINDR and "finding_categories" in found and not options.findings_csv:
        raise MammoError(
            f"{csv_path} has a row for each finding, whose labels and boxes would be lost; give it as "
            "--findings_csv, and breast-level_annotations.csv (or it again) as --csv_path"
        )
    missing = [name for name in adapter.header if name not in found]
    if missing:
        hints = "; ".join(f"{name} (nearest: {nearest(name, found)})" for name in missing)
        raise MammoError(
            f"{csv_path} lacks the column {hints}; found: {', '.join(found)}. Rename the column, map it "
            "with --columns image=...,study=... or give another file with --csv_path"
        )
    raw = raw.fillna("")
    raw = raw[(raw != "").any(axis=1)]
    if raw.empty:
        raise MammoError(f"{csv_path} has a header but no rows; is the download complete?")
    return raw


def split_by_patient(table: pd.DataFrame, test_share: float) -> pd.Series:
    """training or test by a hash of the patient, so that it depends on no other row, unless that writes
    her name in a way that comes first in order (one_spelling)."""

    def split(patient: str) -> str:
        number = int.from_bytes(hashlib.sha256(os.fsencode(patient)).digest()[:8], "big")
        return "test" if number < test_share * 2**64 else "training"

    return patients(table).map(split)


def patients(table: pd.DataFrame) -> pd.Series:
    """Patient of each row in one spelling: patient_id, or the study where none of its rows has one."""
    if "patient_id" not in table:
        table = table.assign(patient_id="")
    return labelling.group_keys(table)


def check_ids(table: pd.DataFrame, adapter: Adapter) -> None:
    """Refuse ids and splits that are absent, spoilt, or would leave the output folder.

    Raises MammoError naming the line, the column of the user's table and the value.
    """
    reserved = {"nan", "none", "null", *REPORTS, *OTHER_KNOWN}  # absent values, and report names
    for column in REQUIRED:
        wrong = [not is_safe_name(v) or v.lower() in reserved for v in table[column]]
        if any(wrong):
            line, value = table.index[wrong][0], table.loc[wrong, column].iloc[0]
            problem = f"is {value[:MAX_ID_LENGTH]!r}" if value else "is empty"
            raise MammoError(
                f"{line}: {adapter.columns.get(column, column)} {problem}, {sum(wrong)} such rows; it "
                f"becomes part of a file name: {SAFE_NAME_RULE}, at most {MAX_ID_LENGTH} characters"
            )
    for column in table.columns.intersection(["study_id", "patient_id", "image_id"]):
        cut = table[column][table[column].str.fullmatch(r"\d([.,_]\d+)?E[+_]\d+", case=False)]
        if len(cut):
            raise MammoError(
                f"{cut.index[0]}: {adapter.columns.get(column, column)} {cut.iloc[0]!r} is an id of "
                "which a spreadsheet has cut the digits; export it as text"
            )


def check_studies(table: pd.DataFrame, adapter: Adapter) -> None:
    """Refuse studies that name more than one patient."""
    if "patient_id" not in table:
        return
    named = table[table["patient_id"] != ""]
    women = labelling.one_spelling(named["patient_id"]).groupby(named["study_id"])
    if (several := women.nunique().loc[lambda count: count > 1]).size:
        shown = some(
            f"{study} ({' and '.join(women.get_group(study).unique())})" for study in several.index
        )
        columns = " or ".join(adapter.columns.get(name, name) for name in ("patient_id", "study_id"))
        raise MammoError(
            f"{several.size} studies name more than one patient: {shown}. A study is of one woman; "
            f"correct {columns}"
        )


def note_spellings(table: pd.DataFrame, notes: list[str]) -> None:
    """Say which patients or studies are written in several ways, and count as one for the split."""
    for column in ("patient_id", "study_id"):
        names = table[column].drop_duplicates() if column in table else pd.Series(dtype=str)
        shared = names.map(labelling.same_name).loc[lambda keys: keys.duplicated(keep=False)]
        several = [" = ".join(sorted(names[key.index])) for _, key in shared.groupby(shared)]
        if several:
            notes.append(
                f"{len(several)} values of {column} are written in several ways (letter case, zeros "
                f"that a spreadsheet ate) and count as one patient for the split: {some(several)}"
            )


def check_splits(table: pd.DataFrame, rule: str = SPLIT) -> tuple[pd.DataFrame, set[str]]:
    """The table, and the studies that are in test now because the table has their patient in two splits.

    Raises MammoError for a patient in two splits, unless `rule` moves them.
    """
    keys = patients(table)
    splits = table["split"].groupby(keys)
    leaking = splits.nunique().loc[lambda count: count > 1]
    if leaking.empty:
        return table, set()
    if rule == "csv":
        both = {name: " and ".join(sorted(splits.get_group(name).unique())) for name in leaking.index}
        names = [f"{name} ({where})" for name, where in both.items()]
        raise MammoError(
            f"{len(leaking)} patients stand in more than one split: {some(names)}. Training would "
            "see test images; give each one split, or use --split test_wins or --split patient"
        )
    inside = keys.isin(leaking.index)
    return table.assign(split=table["split"].mask(inside, "test")), set(table.loc[inside, "study_id"])


def name_files(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column `file`. Raises MammoError where two images would share a file name."""
    names = table["study_id"] + "_" + table["image_id"] + ".png"
    table = table.assign(file=table["split"] + "/" + names)
    # Compared without case, because macOS and Windows would write both into one file.
    clash = table["file"].str.lower().duplicated(keep=False)
    if clash.any():
        raise MammoError(
            f"different images would share one file name: {some(table['file'][clash])} "
            f"({some(table.index[clash])}); rename one of them"
        )
    return table


def check_spacing(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The table with each pixel spacing as one number in mm, '' where it says none that can be.

    Those that cannot, or that differ between rows and columns, are named in the notes. Raises MammoError
    for what is no spacing.
    """
    if "spacing_mm" not in table:
        return table
    cells, known, doubts = table["spacing_mm"], {}, {}
    for line, text in cells.drop_duplicates().items():
        try:
            spacing, doubts[text] = judge_spacing(spacing_values(text))
        except ValueError as error:
            raise MammoError(f"{line}: {error}; write it as 0.07 or 0.07 x 0.07") from None
        known[text] = f"{spacing:.6g}" if spacing else ""
    said = cells.map(doubts)
    names = (table["study_id"] + "/" + table["image_id"] + " (" + said + ")")[said != ""]
    if len(names):
        notes.append(f"doubtful pixel spacing in {len(names)} rows of the CSV: {some(names)}")
    return table.assign(spacing_mm=cells.map(known))


# 3 Files ------------------------------------------------------------------------------------------


def unread_notes(index: Index, used: set[str]) -> list[str]:
    """How many files were not looked at, being neither in `used` nor left out, and what was left out."""
    rest = Counter(suffix_of(name) or "without suffix" for name in index[EVERY_FILE] if name not in used)
    kinds = [f"{count} {suffix}" for suffix, count in sorted(rest.items(), key=lambda kind: -kind[1])]
    hidden = index[LEFT_OUT]
    left_out = f"{len(hidden)} hidden or system files and folders left out: {some(hidden)}"
    return [f"not looked at: {some(kinds)}"] * bool(kinds) + [left_out] * bool(hidden)


def match_files(
    table: pd.DataFrame, images_root: Path, index: Index, adapter: Adapter
) -> tuple[pd.DataFrame, pd.DataFrame, list[str], list[str]]:
    """Rows with a file (column `source`), rows without, extra files, images in several formats.

    Raises MammoError where no row has a file, where a row has several or several rows have one.
    """
    sources, formats, wanted, unclear = [], [], set(), []
    rank = {suffix: place for place, suffix in enumerate(SUFFIXES)}
    kinds = dict.fromkeys(index[DICOM_INSIDE], ".dcm")
    for line, found in zip(table.index, files_of_rows(table, index), strict=True):
        wanted.update(found)
        kind = {name: kinds.get(name, suffix_of(name)) for name in found}
        ranked = sorted(found, key=lambda name: (rank.get(kind[name], len(rank)), name))
        sources.append(ranked[0] if ranked else "")
        if len(set(map(stem_of, ranked))) > 1:
            unclear.append(f"{line} ({', '.join(ranked[:3])}{', ...' * (len(ranked) > 3)})")
        elif len(ranked) > 1:
            formats.append(f"{ranked[0]} taken, {', '.join(ranked[1:])} not")
    if unclear:
        raise MammoError(
            f"{len(unclear)} rows fit several images each: {some(unclear)}. Name the files with their "
            "folders, or give the one folder that is meant as --images_root"
        )
    table = table.assign(source=sources)
    check_shared(table)
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
    return table[table["source"] != ""], table[table["source"] == ""], sorted(extra), formats


def stem_of(name: str) -> str:
    """A path without the suffix of its format; the parts of a UID are none."""
    bare, suffix = os.path.splitext(name)
    return name if suffix[1:].isdigit() else without_suffix(bare)


def files_of_rows(table: pd.DataFrame, index: Index) -> list[list[str]]:
    """The files that each row may mean, by the first of its `places` that is there.

    Of a bare name those in a folder named as the row's study or patient, else those in no other row's:
    LCC.png of four patients is four images, and of a fifth it is missing.
    """
    images = set(index.get("all", []))
    studies, women = table["study_id"], table.get("patient_id", table["study_id"])
    owners = list(zip(studies, map(safe_name, women), strict=True))
    everyone = {owner for pair in owners for owner in pair} - {""}
    by_owner: dict[str, dict[str, list[str]]] = {}  # of each bare name, see files_by_owner
    rows = []
    for places, pair in zip(table["places"], owners, strict=True):
        key = next((key for key in places.split("\n") if key in index), "")
        if not key.startswith("name "):
            rows.append([name for name in index.get(key, []) if name in images] or index.get(key, []))
            continue
        if key not in by_owner:
            found = [name for name in index[key] if name in images] or index[key]
            by_owner[key] = files_by_owner(found, everyone)
        own = {name for owner in set(pair) - {""} for name in by_owner[key].get(owner, ())}
        rows.append(sorted(own) or by_owner[key].get("", []))
    return rows


def files_by_owner(names: list[str], everyone: set[str]) -> dict[str, list[str]]:
    """Files by who of `everyone` a folder above them is named as; "" for nobody."""
    owned: dict[str, list[str]] = {}
    for name in names:
        for owner in {*map(safe_name, name.split("/")[:-1])} & everyone or {""}:
            owned.setdefault(owner, []).append(name)
    return owned


def check_shared(table: pd.DataFrame) -> None:
    """Refuse rows that would share one file: all but one would have another image's labels."""
    shared = table[(table["source"] != "") & table["source"].duplicated(keep=False)]
    if len(shared):
        listed = [
            f"{source} ({', '.join(rows.index[:3])})"
            for source, rows in shared.groupby("source", sort=False)
        ]
        raise MammoError(
            f"{len(listed)} files are meant by several rows: {some(listed)}. Each row needs a file of "
            "its own; name the files with their folders, or remove the rows that are wrong"
        )


# 4 Image formats ----------------------------------------------------------------------------------

PNG_CHANNELS = {2: 3, 3: 3, 4: 2, 6: 4}  # by colour type, as decoded; a palette becomes RGB


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
        check_png_chunks(file)
        # The commonest damage is a download cut short; some writers put bytes after the end.
        file.seek(-min(1024, os.fstat(file.fileno()).st_size), os.SEEK_END)
        if PNG_END not in file.read():
            raise SkipImageError("the PNG file is cut short")
    return height, width, bit_depth


def check_size(height: int, width: int, channels: int = 1) -> None:
    """Refuse an image that is empty or would fill the memory when decoded."""
    if not 0 < height * width * channels <= MAX_SAMPLES:
        raise SkipImageError(f"declares {height} x {width} pixels, more than {MAX_SAMPLES} or none")


def check_png_chunks(file: BinaryIO) -> None:
    """Refuse a PNG, open at the end of its header, that is not one picture as stored.

    Only where a chunk before the pixels may say so does Pillow look, as it does when training reads the
    image: most PNG have none. Raises SkipImageError.
    """
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name in (b"IDAT", b"IEND"):
            return
        if name in (b"acTL", b"eXIf", b"tEXt", b"zTXt", b"iTXt"):  # animation; EXIF, also as text or XMP
            break
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("PNG",)) as image:
                problem = stored_otherwise(image)
    except Exception as error:  # Pillow raises almost anything on damaged bytes
        if isinstance(error, OSError) and error.errno:
            raise
        raise SkipImageError("the PNG is damaged before its pixels") from error
    if problem:
        raise SkipImageError(problem)


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
        pixels, header = mammogram_dicom.read_dicom(path, window)
    except mammogram_dicom.DicomError as error:
        raise SkipImageError(str(error)) from error
    except OSError as error:
        raise SkipImageError(f"cannot be read: {error.strerror}") from error
    if kinds := KEPT_OUT.intersection(header.get("view_modifier", "").split("+")):
        raise SkipImageError(
            f"{' and '.join(sorted(kinds))} view: not of a contact view's scale and field"
        )
    return pixels, header


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
                problem = stored_otherwise(image)
                image.load()
        del image  # its pixels are not needed again
        pixels = decode_by_opencv(read_source(path))
    except SkipImageError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise SkipImageError(f"cannot be decoded: {' '.join(str(error).split())}") from error
    if problem:
        raise SkipImageError(problem)
    if pixels is None:
        raise SkipImageError("cannot be decoded")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise SkipImageError(f"holds {pixels.dtype} pixels; convert to 8- or 16-bit PNG")
    return pixels


def examine(pixels: np.ndarray) -> dict[str, str]:
    """What the checks need of an image, as text.

    content: hash of shape and pixels. minimum, maximum: grey values. margin: of the votes on polarity
    (framing.polarity_votes), NO_VOTE without any. air: dark or bright, '' where the vote is close.
    chest_wall: left or right, '' where no breast is found, as in a blank or tiny image.
    """
    digest = hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    grey = pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., 0])
    low, high = int(grey.min()), int(grey.max())
    facts = {"content": f"pixels {digest.hexdigest()[:32]}", "minimum": str(low), "maximum": str(high)}
    judged = low < high and min(grey.shape) >= JUDGED_SIDE
    votes, wall = judge(grey) if judged else ({}, "")
    margin = framing.polarity_margin(votes)
    air = "" if abs(margin) < framing.CLOSE_VOTE else "dark" if margin > 0 else "bright"
    return facts | {"air": air, "chest_wall": wall, "margin": f"{margin:.2f}" if votes else NO_VOTE}


def judge(grey: np.ndarray) -> tuple[dict[str, float], str]:
    """The votes on an image's polarity, and the side of its chest wall: left, right or ''.

    `grey` (H, W) uint8 or uint16. By the rules of training, on as few pixels; for the side a rough
    outline of the breast will do.
    """
    content = framing.content_of(grey)
    votes = framing.polarity_votes(content)
    if framing.polarity_margin(votes) < -framing.MIN_INVERTED:
        content = replace(content, image=content.brightest - content.image)
    small = framing.picture_of(content)
    if min(small.image.shape) < JUDGED_SIDE:
        return votes, ""
    smooth = cv2.GaussianBlur(small.image, (0, 0), 1)
    levels = anatomy.grey_levels(smooth)
    if levels is None:
        return votes, ""
    air, noise, tissue = levels
    skin = air + anatomy.SKIN_LEVELS[1] * (tissue - air) + 2 * noise
    breast = anatomy.without_rims(anatomy.breast_above(small.image, smooth, skin))
    if not breast.any():
        return votes, ""
    at_left = (anatomy.chest_side(breast) == 0) != small.mirrored
    return votes, "left" if at_left else "right"


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


# 5 Plan -------------------------------------------------------------------------------------------


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
    moved: set[str] = field(default_factory=set)  # studies whose patient was in two splits
    labels: Labels = field(default_factory=dict)
    manifest: list[dict[str, str]] = field(default_factory=list)
    label_rows: list[dict[str, str]] = field(default_factory=list)
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
    if options.columns and not paths:
        raise MammoError("--columns maps a table, and --csv_path none gives none; leave one of them out")
    tables = [read_csv(path, whole=bool(options.columns)) for path in paths]
    index = index_files(options.images_root)
    if not paths and (films := film_archives.read_ddsm(options.images_root, index)) is not None:
        tables = [films]
    table, reading, adapter = read_table(tables, options, index)
    note_spellings(table, reading.notes)
    table, moved = check_splits(table, options.split)
    table = name_files(table)
    check_folders(options)
    matched, missing, extra, formats = match_files(table, options.images_root, index, adapter)
    if formats:
        reading.notes.append(f"{len(formats)} images have several files: {some(formats)}")
    labels = {**reading.labels, **labels_of(table)}
    reading.notes += unread_notes(index, {*matched["source"], *extra})
    if options.findings_csv:
        for key, found in read_findings(options.findings_csv, table, reading.notes).items():
            found.values = labels.get(key, ImageLabels()).values | found.values
            labels[key] = found
    plan = Plan(options, [], {}, {}, {}, missing, extra, [], reading.notes, moved, labels)
    read_reports(plan)
    earlier = plan.previous.keys() | plan.claimed.keys()
    for row in matched.to_dict("records"):
        try:
            plan.items.append(inspect(row, options, row["file"] in earlier))
        except SkipImageError as reason:
            plan.skipped.append({**row, "reason": str(reason)})
    check_labels_reach(plan)
    return plan


def labels_of(table: pd.DataFrame) -> Labels:
    """What the table itself says of findings, by image."""
    names = [name for name in FINDINGS if name in table]
    keys = zip(table["study_id"], table["image_id"], strict=True)
    rows = table[names].to_dict("records")
    return {key: ImageLabels(row) for key, row in zip(keys, rows, strict=True)} if names else {}


def check_labels_reach(plan: Plan) -> None:
    """Refuse labels of which none can be of an image that is there."""
    known, by_breast = plan.labels.keys(), {study for study, key in plan.labels if key[:5] == "side "}
    for item in plan.items:
        row = item.row
        keys = {(row["study_id"], row["image_id"]), (row["study_id"], f"side {row.get('laterality')}")}
        if keys & known or (item.kind == ".dcm" and row["study_id"] in by_breast):
            return
    if by_breast and plan.items:
        raise MammoError(
            "the labels are given by breast, and which breast an image shows stands in DICOM headers "
            f"alone, not in {plan.items[0].row['source']}; give the DICOM files, or a table of images "
            "with --columns image=...,study=...,laterality=..."
        )


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
    for facts in plan.checked.values():
        if not facts.get("margin"):  # an earlier version's, which took most films for negatives
            facts |= dict.fromkeys(("air", "chest_wall", "margin"), "")
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
    if options.flip_right:
        changes.append(f"flip_right {FLIP_VERSION} {row.get('laterality', '')}".strip())
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


# 6 Decoding ---------------------------------------------------------------------------------------

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
        spacing = header.get("spacing_mm") or spacing_told(item.row, *map(str, pixels.shape[:2]))
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
    if tasks[0][1].dask:
        yield from decode_on_cluster(tasks)
        return
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


def decode_on_cluster(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
    """decode_all on the workers of a Dask cluster; this machine tries again what ended them."""
    from byol_mammo import cluster

    options, first = tasks[0][1], tasks[0][0].source
    jobs = [
        (replace(item, source=item.source.absolute(), output=item.output.absolute()), options, write)
        for item, options, write in tasks
    ]
    for number, outcome in cluster.results(options.dask, decode_item, jobs, options.output_dir, [first]):
        task = tasks[number]
        if outcome is cluster.KILLED:
            outcome = decode_alone(task)
        elif isinstance(outcome, SkipImageError):  # some decoders' reasons hold the path that they got
            there, here = (str(item.source) for item in (jobs[number][0], task[0]))
            outcome = SkipImageError(str(outcome).replace(there, here))
        yield task, outcome
    for folder in {item.output.parent for item, _, _ in tasks}:
        files.remove_unfinished(folder)  # of workers that were killed


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


# 7 Layout -----------------------------------------------------------------------------------------


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
    clear_labels(plan)
    lay_out(plan)
    remove_stale(plan)
    for split in {item.row["split"] for item in plan.items}:
        files.flush(folder / split)
    find_problems(plan)
    plan.label_rows = make_labels(plan) if plan.labels else []
    note_sides_unknown(plan)
    write_report(folder, "missing.csv", plan.missing.to_dict("records"))
    write_report(folder, "extra.csv", [{"file": name} for name in plan.extra])
    write_report(folder, "skipped.csv", plan.skipped)
    write_report(folder, "problems.csv", plan.problems)
    write_report(folder, "image_checks.csv", [plan.checked[f] for f in sorted(plan.checked)])
    if plan.labels:
        columns = [*LABELS, *sorted({name for row in plan.label_rows for name in row} - set(LABELS))]
        write_table(folder / "labels.csv", plan.label_rows, columns)
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


def decoding_tasks(plan: Plan) -> list[Task]:
    """What has to be decoded."""
    tasks = []
    for item in plan.items:
        current = is_current(item, plan)
        facts = plan.facts(item)
        known = bool(facts.get("margin"))
        # An earlier version's manifest doesn't say how images were taken: their headers are read again.
        told = item.kind != ".dcm" or "maker" in {**plan.recorded(item), **facts}
        if (item.may_be_encoded and not current) or not told or (plan.options.verify and not known):
            tasks.append((item, plan.options, not current))
    return tasks


def decode_needed(plan: Plan) -> dict[str, tuple[Outcome, bool]]:
    """Decode what has to be, noting each image in the journal: outcome and whether it was written,
    by file."""
    options, tasks = plan.options, decoding_tasks(plan)
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
    values["spacing_mm"] = spacing_told(item.row, str(size[0]), str(size[1]))
    for name in ("laterality", "view", "implant", "spacing_mm", "view_modifier", "flipped"):
        earlier = before.get(name, "") if unchanged else ""
        told, found = values.get(name, ""), facts.get(name) or earlier
        # The table counts before the header, but for the pixels' size, which the detector knows best.
        values[name] = found or told if name == "spacing_mm" and item.kind == ".dcm" else told or found
    known = facts or (before if unchanged and item.kind == ".dcm" else {})
    values |= acquisition.of_image(item.row, known)
    values["flipped"] = values["flipped"] or "0"  # a PNG that was not decoded is as it was
    values["polarity"], values["polarity_from"] = polarity_of(item, facts, plan.options.verify)
    values |= dict(zip(SIZE, map(str, size), strict=True))
    return {name: values.get(name, "") for name in REPORTS["manifest.csv"]}, action


def spacing_told(row: dict[str, str], height: str, width: str) -> str:
    """The table's pixel spacing; '' for an image of another size than the table's, such as a reduced
    copy, whose pixels are others."""
    stated = size_stated(row)
    return "" if stated and stated != [height, width] else row.get("spacing_mm", "")


def size_stated(row: dict[str, str]) -> list[str]:
    """Height and width of the table's row, [] where it has no numbers there."""
    # pandas may have written 512.0.
    numbers = [re.sub(r"\.0*$", "", row.get(name, "")) for name in ("height", "width")]
    return numbers if all(value.isdigit() and int(value) for value in numbers) else []


def polarity_of(item: Item, facts: dict[str, str], verify: bool) -> tuple[str, str]:
    """The manifest's polarity of an output (as_is, inverted, unknown), and who says so.

    The header, after which DICOM is written bright on dark; else the table; else the pixels, where this
    command decodes them; else nobody ('').
    """
    if item.kind == ".dcm":
        return "as_is", "header"
    if told := item.row.get("polarity", ""):
        return told, "table"
    if facts.get("margin") and (item.may_be_encoded or verify):
        return SEEN.get(facts["air"], "unknown"), "judged"
    return "unknown", ""


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


def clear_labels(plan: Plan) -> None:
    """Take an earlier run's labels.csv away before images change: its boxes and splits are theirs.

    This run writes its own; where it has none, the earlier one is kept under another name.
    """
    path = plan.options.output_dir / "labels.csv"
    if not path.is_file():
        return
    if plan.labels:
        if not all(plan.unchanged(item) for item in plan.items):
            path.unlink()
        return
    try:
        read_report(path, path.name)
    except MammoError:
        plan.notes.append("labels.csv is not from this program and stays: does it fit these images?")
        return
    aside = set_aside(path, path.parent)
    plan.notes.append(f"labels.csv of an earlier run with other choices is {aside.name} now")


def set_aside(path: Path, folder: Path) -> Path:
    """Move a file into a folder, under the first free name of NAME_1, NAME_2, ...; where it is now."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := folder / f"{path.stem}_{number}{path.suffix}").exists():
        number += 1
    os.replace(path, target)
    return target


def remove_stale(plan: Plan) -> None:
    """Remove outputs of earlier runs that are not of this one, such as a study that moved to another
    split: training reads what is in the folder. What the source does not hold any more is set aside."""
    listed = {row["file"] for row in plan.manifest}
    for file, row in {**plan.claimed, **plan.previous}.items():
        source, output = plan.options.images_root / row["source"], plan.options.output_dir / file
        if file in listed or not os.path.lexists(output):
            continue
        if source.is_file():
            item = Item(row, source, output, source.stat(), format_of(source), row.get("settings", ""))
            if kind_of_output(item) != "other":
                output.unlink()
                plan.counts["removed"] += 1
                continue
        set_aside(output, plan.options.output_dir / EARLIER / output.parent.name)
        plan.counts[f"set aside in {EARLIER}"] += 1


# 8 Labels -----------------------------------------------------------------------------------------

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
    rows = rows.assign(names=[read_categories(v, str(n)) for n, v in rows["finding_categories"].items()])
    every = {column_of(name) for names in rows["names"] for name in names} | {"mass", "calcification"}
    labels: Labels = {}
    check_same_images(rows, table)
    for line, row in zip(rows.index, rows.to_dict("records"), strict=True):
        key = (row["study_id"], row["image_id"])
        entry = labels.setdefault(key, ImageLabels(dict.fromkeys(every - {""}, "0"), []))
        entry.add({column_of(name): "1" for name in row["names"] if column_of(name)})
        if (box := read_box(row, str(line))) and entry.boxes is not None:
            entry.boxes.append({"finding": row["names"], **box})
        height, width = number(row.get("height", "")), number(row.get("width", ""))
        entry.size = (height, width) if height and width else None
    images = set(zip(table["study_id"], table["image_id"], strict=True))
    unknown, silent = labels.keys() - images, images - labels.keys()
    if silent == images:
        raise MammoError(
            f"no image of {csv_path} is in the table, which names {'/'.join(min(images))}, not "
            f"{'/'.join(min(labels, default=('nothing',)))}; is it the findings of these images?"
        )
    if silent:
        names = some(sorted("/".join(key) for key in silent))
        notes.append(f"{len(silent)} images are not in {csv_path.name}, so not labelled: {names}")
    if unknown:
        names = some(sorted("/".join(key) for key in unknown))
        notes.append(f"{len(unknown)} images of {csv_path.name} are not in the table: {names}")
    return labels


def check_same_images(rows: pd.DataFrame, table: pd.DataFrame) -> None:
    """Refuse findings of which side or view are not the table's: they are of other images."""
    keys = ["study_id", "image_id"]
    both = rows[keys].reset_index(names="line").merge(table, on=keys)
    for name, reader in (("laterality", side), ("view_position", str.upper)):
        if name not in rows or name not in table:
            continue
        found, stated = both["line"].map(rows[name].map(reader)), both[name].map(reader)
        other = both[(found != stated) & (found != "") & (stated != "")]
        if len(other):
            line, study, image = other[["line", *keys]].iloc[0]
            raise MammoError(
                f"{line}: {name} is {rows.loc[line, name]}, in the table of images that of {study}/"
                f"{image} is {other[name].iloc[0]}; {len(other)} such rows; are they of these images?"
            )


def read_box(row: dict[str, str], line: str) -> dict[str, float] | None:
    """The corners of a row; None where it has none. Raises MammoError where they make no box: what looks
    like turned corners may be width and height."""
    if not any(row[name] for name in BOX):
        return None
    corners = {name: number(row[name]) for name in BOX}
    wrong = [name for name, value in corners.items() if value is None]
    if wrong:
        raise MammoError(f"{line}: {wrong[0]} {row[wrong[0]][:MAX_ID_LENGTH]!r} is no number")
    box = {name: float(value or 0) for name, value in corners.items()}
    if box["xmin"] >= box["xmax"] or box["ymin"] >= box["ymax"]:
        shown = ", ".join(f"{name} {row[name]}" for name in BOX)
        raise MammoError(f"{line}: {shown} make no box; the last two are a corner, not width and height")
    return box


def read_categories(value: str, line: str) -> list[str]:
    """['Mass', 'Skin Thickening'] of the Python list that VinDr writes. Raises MammoError."""
    try:
        names = ast.literal_eval(value)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise MammoError(f"{line}: finding_categories {value[:MAX_ID_LENGTH]!r} is not a list") from None
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


def note_sides_unknown(plan: Plan) -> None:
    """Say which images the labels of a breast did not reach: nothing tells which breast they show."""
    by_breast = {study for study, key in plan.labels if key.startswith("side ")}
    names = [r["file"] for r in plan.manifest if r["study_id"] in by_breast and not r["laterality"]]
    if names:
        plan.notes.append(
            f"{len(names)} images have no side, so not the labels of a breast: {some(names)}"
        )


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


# 9 Checks -----------------------------------------------------------------------------------------

CHECKS = {  # check -> what it means, for people
    "patient in two splits": "moved to test, so that training does not see them",
    "duplicate": "the same pixels under two names",
    "different size": "not as in the CSV",
    "aspect": "resized or cropped otherwise than in proportion: mm per pixel and boxes no longer hold",
    "blank": "all pixels have one value",
    "polarity": "a negative, in doubt, or pixels, header and table disagree",
    "padding": "most of the image was padding",
    "side": "the breast is not on the side that its laterality says",
    "laterality": "the table and the DICOM header disagree; the table counts",
    "view": "the table and the DICOM header disagree; the table counts",
    "maker": "the table and the DICOM header disagree; the table counts",
    "acquisition": "exposure or detector that cannot be, left empty, or that is told in two ways",
    "no laterality": "not mirrored: neither tag nor pixels tell the side",
    "raw": "for processing: detector values, not what readers see",
    "no modality": "the DICOM header does not say that it is a mammogram",
    "page": "perhaps a screen shot or a page, no mammogram",
    "synthetic": "computed of tomosynthesis, no exposure of its own",
    "padding in tissue": "the value of padding, which is 0 now, is that of bright tissue: holes",
    "spacing": "cannot be, differs between rows and columns, or between table and header",
    "boxes clipped": "boxes that left the image",
    "boxes dropped": "boxes that do not fit the image",
}


def find_problems(plan: Plan) -> None:
    """Fill the plan's problems, in the order of CHECKS and of the manifest."""
    tables = {item.row["file"]: item.row for item in plan.items}
    find_duplicates(plan)
    for row in plan.manifest:
        if row["study_id"] in plan.moved:
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
    numbers, actual = size_stated(stated), [row["height"], row["width"]]
    if numbers in ([], actual):
        return
    plan.report("different size", row, f"{' x '.join(actual)}, CSV {' x '.join(numbers)}")
    ratios = [int(a) / int(b) for a, b in zip(actual, numbers, strict=True)]
    if abs(ratios[0] / ratios[1] - 1) > ASPECT_TOLERANCE:
        plan.report("aspect", row, f"height x {ratios[0]:.3f}, width x {ratios[1]:.3f}")


def check_pixels(plan: Plan, row: dict[str, str], facts: dict[str, str]) -> None:
    """Report what the pixels of one image show."""
    expected = {"L": "left", "R": "right"}.get(row["laterality"], "")
    if facts["minimum"] == facts["maximum"]:
        plan.report("blank", row, f"value {facts['minimum']}")
    elif facts["margin"] not in ("", NO_VOTE):
        check_polarity(plan, row, facts)
    if expected and facts["chest_wall"] not in ("", expected):
        plan.report("side", row, f"laterality {row['laterality']}, chest wall {facts['chest_wall']}")
    if plan.options.flip_right and not expected and not facts["chest_wall"]:
        plan.report("no laterality", row, "left as it is")
    if float(facts.get("padding") or 0) > 0.5:
        plan.report("padding", row, f"{float(facts['padding']):.0%} of the pixels")


def check_polarity(plan: Plan, row: dict[str, str], facts: dict[str, str]) -> None:
    """Report an image of which the pixels contradict header or table, or that neither tells of and that
    looks like a negative or may be one."""
    seen, said, by = SEEN.get(facts["air"], ""), row["polarity"], row["polarity_from"]
    vote = f"(vote {facts['margin']} between -1 and 1)"
    if by in ("header", "table"):
        word = facts.get("photometric", "") if by == "header" else said
        if seen not in ("", said):
            plan.report("polarity", row, f"{by} {word} counts, but the pixels look {seen} {vote}")
    elif seen != "as_is":
        plan.report("polarity", row, f"the pixels look {seen} {vote}" if seen else f"in doubt {vote}")


def check_header(plan: Plan, row: dict[str, str], facts: dict[str, str], stated: dict[str, str]) -> None:
    """Report where a DICOM header disagrees with the table or with what an image for reading has."""
    for name, column in (("laterality", "laterality"), ("view", "view_position"), ("maker", "maker")):
        pair = stated.get(column, ""), facts.get(name, "")
        if all(pair) and pair[0] != pair[1]:
            plan.report(name, row, f"table {pair[0]}, header {pair[1]}")
    told, header = stated.get("polarity"), PHOTOMETRIC.get(facts["photometric"], "")
    if told and header and told != header:
        plan.report("polarity", row, f"table {told}, header {facts['photometric']}: the header counts")
    if facts["intent"] == "FOR PROCESSING":
        plan.report("raw", row, f"FOR PROCESSING {facts['relationship']}".strip())
    if not facts["modality"]:
        plan.report("no modality", row, "Modality is empty")
    for doubt in filter(None, facts.get("doubts", "").split(" | ")):
        check, _, detail = doubt.partition(": ")
        plan.report(check, row, detail)
    told, measured = stated.get("spacing_mm"), facts["spacing_mm"]
    if told and measured and differ(float(told), float(measured)):
        plan.report("spacing", row, f"table {told} mm, header {measured} mm: the header counts")


# 10 Report ----------------------------------------------------------------------------------------


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


def foreign_files(plan: Plan) -> list[str]:
    """Files in the output folder that this program did not put there, or not in this run."""
    folder = plan.options.output_dir
    ours = {*REPORTS, *OTHER_KNOWN, *(row["file"] for row in plan.manifest)}
    found = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    names = {path.relative_to(folder).as_posix() for path in found}
    return sorted(name for name in names - ours if not name.startswith(f"{EARLIER}/"))


def bits_used(row: dict[str, str], facts: dict[str, str]) -> str:
    """Bits that hold the image's largest value, or those of the PNG where it was not decoded."""
    maximum = facts.get("maximum", "")
    if not maximum.isdigit():
        return f"{row['bit_depth']} (not decoded)"
    return str(max(1, int(maximum).bit_length()))


SHOWN_VALUES = (  # columns of the manifest that are counted in the report
    *("laterality", "view", "implant", "view_modifier", "flipped", "spacing_mm"),
    *("polarity", "polarity_from", "maker", "model"),
)
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
    for column in SHOWN_VALUES:
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


def skip_reasons(plan: Plan) -> str:
    """How many images were skipped for what, in a line, without what is of one image alone."""
    reasons = Counter(re.split(r"[,:;(]", row["reason"])[0].strip() for row in plan.skipped)
    return some([f"{count} {reason}" for reason, count in reasons.most_common()])


def print_counts(plan: Plan, done: str) -> None:
    """Print how many images are laid out, per split and finding, and how; `done`: are, or would be."""
    options, counts = plan.options, plan.counts
    rows = pd.DataFrame(plan.manifest, columns=REPORTS["manifest.csv"])
    print(f"{len(rows)} images {done} in {options.output_dir}")
    rows = rows.assign(patient=patients(rows))
    for split, group in rows.groupby("split"):
        counted = f"{group['study_id'].nunique():>6} studies {group['patient'].nunique():>6} patients"
        print(f"  {split:<10} {len(group):>7} images {counted}")
    print_labels(plan)
    if counts:
        print("  " + ", ".join(f"{counts[key]} {key}" for key in sorted(counts)))
    if options.mode == "hardlink" and counts["copied"]:
        print("  hard links were not possible for some files; those were copied")


def print_lists(plan: Plan) -> None:
    """Print what needs attention, and what was chosen in reading the table."""
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
        if names and label == "skipped":
            print(f"  for: {skip_reasons(plan)}")
    for note in plan.notes:
        print(f"note: {note}")


def print_summary(plan: Plan) -> None:
    """Print the counts per split, what needs attention and the next command."""
    options = plan.options
    print_counts(plan, "laid out")
    print_lists(plan)
    print(f"Report: {options.output_dir / 'prepare_report.html'}")
    if plan.manifest:
        print(f"Look: {command_of('prepare_dataset.py')} check {options.output_dir / 'manifest.csv'}")
    found = {row["split"] for row in plan.manifest}
    splits = sorted(found - {"test"}, key=lambda name: (name != "training", name))
    if splits:
        print(f"Next: {command_of('train_byol_mammo.py')} --data_dir {options.output_dir / splits[0]}")
    elif plan.manifest:
        print("All images are in the split test: there is none to pre-train on")
    else:
        print("No image was laid out; the reasons are in skipped.csv")


def findings_told(plan: Plan) -> list[str]:
    """The columns of labels.csv that say of any image whether it has a finding."""
    names = dict.fromkeys(name for row in plan.label_rows for name in row if name not in NOT_FINDINGS)
    return [name for name in names if any(row.get(name) in ("0", "1") for row in plan.label_rows)]


def print_labels(plan: Plan) -> None:
    """Print how many images have each finding, have it not, or are not known."""
    for name in findings_told(plan):
        counts = Counter(row.get(name, "") for row in plan.label_rows)
        told = f"{counts['1']:>7} images with, {counts['0']} without, {counts['']} unknown"
        print(f"  {name:<22} {told}")


# 11 Dry run ---------------------------------------------------------------------------------------


def foresee(plan: Plan) -> None:
    """Fill the plan's manifest, counts, labels and skipped images as far as names, sizes and the heads
    of PNG tell, and print them with what it would take. Writes nothing."""
    decoded = {item.row["file"] for item, _, _ in decoding_tasks(plan)}
    for item in plan.items:
        try:
            if item.kind == ".png" and not plan.unchanged(item):
                read_png_header(item.source)
        except (OSError, SkipImageError) as error:
            plan.skipped.append({**item.row, "reason": getattr(error, "strerror", "") or str(error)})
            continue
        plan.manifest.append({name: item.row.get(name, "") for name in REPORTS["manifest.csv"]})
        plan.counts[action_foreseen(item, plan, item.row["file"] in decoded)] += 1
        entry = plan.labels.get((item.row["study_id"], item.row["image_id"]))
        entry = entry or plan.labels.get((item.row["study_id"], f"side {item.row.get('laterality')}"))
        plan.label_rows += [dict(entry.values if entry else {})] if plan.labels else []
    listed = {item.row["file"] for item in plan.items}
    plan.counts["removed or set aside"] = len({*plan.previous, *plan.claimed} - listed)
    plan.counts = +plan.counts  # without zeros
    print_counts(plan, "would be laid out")
    print_costs(plan)
    print_lists(plan)
    if any(item.kind != ".png" for item in plan.items):
        print(
            "What the pixels and headers of DICOM and others say is not known before they are decoded."
        )
    print("Nothing was written (--dry_run).")


def action_foreseen(item: Item, plan: Plan, decoded: bool) -> str:
    """What would be done with an image."""
    if decoded and item.kind != ".png":
        return f"{item.kind[1:]} to be converted"
    if is_current(item, plan):
        return "to be verified" if decoded else "already there"
    if decoded and plan.options.flip_right:
        return "to be mirrored or linked, by its pixels"
    return {"hardlink": "to be linked", "copy": "to be copied", "symlink": "to be linked by symlink"}[
        plan.options.mode
    ]


def print_costs(plan: Plan) -> None:
    """Print bytes and time of what has to be decoded and copied, from a few images tried in memory."""
    tasks = decoding_tasks(plan)
    sizes = [item.found.st_size for item, _, _ in tasks]
    png = [item for item in plan.items if item.kind == ".png" and not is_current(item, plan)]
    copies = sum(item.found.st_size for item in png) if plan.options.mode == "copy" else 0
    read, written, time = sum(sizes) + copies, float(copies), ""
    try:
        if tasks:
            tried, outcomes, seconds = try_tasks(tasks)
            scale = sum(sizes) / max(1, sum(item.found.st_size for item, _, _ in tried))
            written += scale * sum(outcomes)
            workers = foresight.count_workers(plan.options.num_workers, len(tasks), plan.options.dask)
            took = foresight.duration_text(scale * seconds / workers)
            time = f", about {took} in {workers} processes (from {len(tried)} images, decoded in memory)"
    except BrokenProcessPool:
        time = ", in a time that is not known: an image that was tried ends its decoder"
    text = foresight.size_text
    free = foresight.space_text(plan.options.output_dir, written)
    print(f"  {text(read)} to read, about {text(written)} to write{time}; {free}")


def try_tasks(tasks: Sequence[Task]) -> tuple[list[Task], list[int], float]:
    """foresight.try_some of try_decoding, in another process where a decoder may end it. Raises
    BrokenProcessPool."""
    if not any(may_crash(item) for item, _, _ in tasks):
        return foresight.try_some(tasks, try_decoding)
    with process_pool(1, PRELOADED, use_one_thread) as pool:
        return foresight.try_some(tasks, lambda task: pool.submit(try_decoding, task).result())


def try_decoding(task: Task) -> int:
    """Decode and measure an image as laying it out would; bytes of the PNG that it would become, 0 where
    it would be linked or skipped."""
    item, options, write = task
    try:
        pixels, header = decode(item.source, item.kind, options.window)
        wall = examine(pixels)["chest_wall"]
    except (SkipImageError, MemoryError):
        return 0
    mirrored = options.flip_right and wall == "right"
    made = write and (mirrored or item.kind != ".png")
    return len(encode_png(pixels, header.get("spacing_mm", ""))) if made else 0


# 12 Archive check ---------------------------------------------------------------------------------

CHECK_DIR = "./archive_check"  # folder of the contact sheets and check.csv


def make_check_parser() -> argparse.ArgumentParser:
    """The flags of `prepare_dataset.py check`."""
    parser = settings.make_parser(
        "Look at an archive before training: contact sheets of its images with the outlines of breast "
        "(blue) and pectoral muscle (orange), and check.csv, the oddest images first. Exit codes: 0, "
        "1 some images can't be read, 2 refused, 3 stopped, with nothing half-written.",
        "check --help lists the flags",
    )
    parser.prog = "prepare_dataset.py check"
    add = parser.add_argument
    text = "a folder of images, or the manifest.csv of an archive that was laid out"
    add("images", type=Path, metavar="IMAGES_OR_MANIFEST", help=text)
    text = "as many images, drawn by chance, the same in every run; 0: all"
    add("--sample", type=int, default=0, metavar="N", help=text + DEFAULT)
    text = "where to write; made if needed; not among the images, which training reads"
    add("--output_dir", type=Path, metavar="FOLDER", default=CHECK_DIR, help=text + DEFAULT)
    text = "processes, at most one per core"
    add("--num_workers", type=int, default=NUM_WORKERS, metavar="N", help=text + DEFAULT)
    return parser


def subcommand(job: Callable[[], tuple[str, int]]) -> int:
    """The exit code of a subcommand, whose job returns what to print and its code, 0 or 1; 2 where it
    was refused, 3 where it was stopped."""
    try:
        text, code = job()
    except MammoError as error:
        print(f"prepare_dataset: error: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt, settings.StoppedError) as error:
        reason = str(error).partition(";")[0] or "interrupted"
        print(f"prepare_dataset: {reason}. The same command starts anew.", file=sys.stderr)
        return 3
    print(text)
    return code


def training_method(target_spacing_mm: float = 0.0) -> archive_check.Method:
    """What training makes of an image, at its usual settings but for one. Raises MammoError."""
    import train_byol_mammo as mammo  # here: laying out has no use for torch
    from byol_mammo import archive_check

    return archive_check.Method(
        *(mammo.read_and_reduce, mammo.find_breast, mammo.find_muscle, mammo.score_tiles),
        *(mammo.intensity_window, mammo.Config(target_spacing_mm=target_spacing_mm)),
    )


def check(argv: Sequence[str]) -> tuple[str, int]:
    """Check an archive: what to print, and 1 where images could not be read, else 0."""
    return check_images(make_check_parser().parse_args(settings.with_underscores(argv)))


def check_images(options: argparse.Namespace) -> tuple[str, int]:
    """What `check` prints, and its code. Raises MammoError, StoppedError or OSError."""
    from byol_mammo import archive_check

    for name, least in (("sample", 0), ("num_workers", 1)):
        if getattr(options, name) < least:
            raise MammoError(f"--{name} {getattr(options, name)} is less than {least}")
    root = options.images if options.images.is_dir() else options.images.parent
    if options.output_dir.resolve().is_relative_to(root.resolve()):
        raise MammoError(
            f"--output_dir {options.output_dir} lies among the images, and training would read the "
            "sheets as mammograms; give another folder"
        )
    sources = archive_check.list_images(options.images)
    if 0 < options.sample < len(sources):
        sources = sources.sample(options.sample, random_state=0).sort_index()
    method = training_method()
    table, sheets = archive_check.check(sources, method, options.output_dir, options.num_workers, "auto")
    unread = bool((table["reason"] != "").any())
    return archive_check.summary(table, sheets, options.output_dir), int(unread)


# 13 Inspection ------------------------------------------------------------------------------------

INSPECT_DIR = "./inspected"  # folder of the pages


def make_inspect_parser() -> argparse.ArgumentParser:
    """The flags of `prepare_dataset.py inspect`."""
    parser = settings.make_parser(
        "Look into single files, as they are read: a page for each with the header's values (none of "
        "them names a patient), polarity, window, spacing, outlines of breast and pectoral muscle, and "
        "the tiles kept. Exit codes: 0, 1 some files can't be used, 2 refused, 3 stopped.",
        "inspect --help lists the flags",
    )
    parser.prog = "prepare_dataset.py inspect"
    add = parser.add_argument
    text = "a mammogram: PNG, TIFF, JPEG, PGM or DICOM"
    add("files", type=Path, nargs="+", metavar="FILE", help=text)
    text = "where to write inspect_001.png ...; made if needed; not among the images"
    add("--output_dir", type=Path, metavar="FOLDER", default=INSPECT_DIR, help=text + DEFAULT)
    text = "DICOM grey values: none keeps all that is stored, voi applies the header's window"
    add("--window", choices=["none", "voi"], default=WINDOW, help=text + DEFAULT)
    text = "as --polarity of training: auto takes the header's or the manifest's, else judges"
    add("--polarity", choices=["auto", "as_is", "inverted"], default="auto", help=text + DEFAULT)
    text = "CC, MLO ...; empty: the header's or the manifest's"
    add("--view", default="", help=text)
    text = "mm per pixel; 0: the header's or the manifest's, else that of training"
    add("--pixel_spacing_mm", type=float, default=0.0, metavar="MM", help=text + DEFAULT)
    text = "as --target_spacing_mm of training: mm per pixel that the image is brought to; 0: its own"
    add("--target_spacing_mm", type=float, default=0.0, metavar="MM", help=text + DEFAULT)
    return parser


def inspect_files(argv: Sequence[str]) -> tuple[str, int]:
    """Draw a page for each file: what to print, and 1 where some could not be used, else 0.

    Raises MammoError or OSError.
    """
    from byol_mammo import inspection

    options = make_inspect_parser().parse_args(settings.with_underscores(argv))
    check_inspected(options)
    method, lines, unused = training_method(options.target_spacing_mm), [], 0
    options.output_dir.mkdir(parents=True, exist_ok=True)
    files.remove_unfinished(options.output_dir)
    for earlier in options.output_dir.iterdir():
        if inspection.PAGE.fullmatch(earlier.name):
            earlier.unlink()
    for number, path in enumerate(options.files, 1):
        try:
            facts, panels = inspect_file(path, options, method)
        except SkipImageError as reason:
            facts, panels = [("not used", str(reason))], None
            unused += 1
        name = f"inspect_{number:03d}.png"  # files may be named by patients, pages are not
        with files.atomic_path(options.output_dir / name) as temporary:
            inspection.draw_page(panels, facts).save(temporary)
        told = dict(facts)
        lines.append(f"{name}  {path}: {told.get('not used') or told['tiles']}")
    return "\n".join([*lines, f"open {options.output_dir}"]), int(bool(unused))


def check_inspected(options: argparse.Namespace) -> None:
    """Refuse files that are none, and an output folder that training would read. Raises MammoError."""
    if folders := [path for path in options.files if path.is_dir()]:
        raise MammoError(f"{folders[0]} is a folder; `check` looks at all images of one")
    output = options.output_dir.resolve()
    listed = [place for place in (output, *output.parents) if (place / "manifest.csv").is_file()]
    beside = [path for path in options.files if path.resolve().parent == output]
    if listed or beside:
        raise MammoError(
            f"--output_dir {options.output_dir} lies among the images, and training would read the "
            "pages as mammograms; give another folder"
        )
    if not 0 <= options.pixel_spacing_mm <= 1:
        raise MammoError(f"--pixel_spacing_mm {options.pixel_spacing_mm} is not between 0 and 1")


def inspect_file(
    path: Path, options: argparse.Namespace, method: archive_check.Method
) -> tuple[list[inspection.Fact], Image.Image]:
    """The facts of one file, those of its header first, and its panels. Raises SkipImageError."""
    from byol_mammo import inspection
    from byol_mammo.images import ImageReadError

    try:
        item = inspect({"source": str(path), "file": path.name}, Options([], Path(), Path()), True)
        with tempfile.TemporaryDirectory() as folder:
            header, readable = {}, path
            if item.kind == ".png":
                read_png_header(path)
            else:
                readable = Path(folder) / "image.png"
                alone = replace(item, output=readable)
                task = (alone, Options([], Path(), Path(), window=options.window), True)
                outcome = decode_alone(task) if may_crash(item) else decode_item(*task)
                if isinstance(outcome, SkipImageError):
                    raise outcome
                header = {name: outcome[name] for name in HEADER if outcome.get(name)}
            known = known_of(path, item.kind, header, options, method)
            facts, panels = inspection.look_into(readable, known, method)
    except ImageReadError as error:
        raise SkipImageError(error.reason) from error
    except (OSError, MemoryError) as error:
        raise SkipImageError(
            getattr(error, "strerror", "") or "needs more memory than there is"
        ) from error
    told = [(name.replace("_", " "), value) for name, value in header.items()]
    return [("format", item.kind[1:]), *told, ("", ""), *facts], panels


def known_of(
    path: Path,
    kind: str,
    header: dict[str, str],
    options: argparse.Namespace,
    method: archive_check.Method,
) -> inspection.Known:
    """View, polarity and spacing of a file as training would know them: the flag's, the header's, those
    of a manifest beside it or above, else judged or the usual ones."""
    from byol_mammo import images, inspection

    row: dict[str, object] = {}
    root = next(
        (place for place in path.absolute().parents[:2] if (place / "manifest.csv").is_file()), None
    )
    if root:
        with suppress(MammoError):  # another program's
            table = images.read_manifest(root)
            found = table[table["path"] == str(path.absolute())]
            row = found.iloc[0].dropna().to_dict() if len(found) else {}
    polarity, polarity_from = options.polarity, "--polarity" if options.polarity != "auto" else ""
    if not polarity_from and kind == ".dcm":
        polarity, polarity_from = "as_is", "written so by its header"
    elif not polarity_from and row.get("polarity") in ("as_is", "inverted"):
        polarity, polarity_from = str(row["polarity"]), "by the manifest"
    spacings = (
        (options.pixel_spacing_mm, "by the flag"),
        (float(header.get("spacing_mm") or 0), "by the header"),
        (float(str(row.get("spacing_mm") or 0)), "by the manifest"),
        # Nothing is assumed where the image is to be scaled by it.
        (
            math.nan if options.target_spacing_mm else method.settings.pixel_spacing_mm,
            "taken, as nothing tells it",
        ),
    )
    spacing, spacing_from = next(pair for pair in spacings if pair[0])
    view = options.view.upper() or header.get("view", "") or str(row.get("view") or "")
    return inspection.Known(view, polarity, spacing, polarity_from, spacing_from)


# 14 Entry -----------------------------------------------------------------------------------------


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
    words = sys.argv[1:] if argv is None else argv
    for name, job in (("check", check), ("inspect", inspect_files)):
        if words and words[0] == name:
            return subcommand(functools.partial(job, words[1:]))
    try:
        options = parse_options(argv)
    except MammoError as error:
        print(f"prepare_dataset: error: {error}", file=sys.stderr)
        return 2
    try:
        plan = make_plan(options)
        foresight.count_workers(1, 1, options.dask)  # a cluster that doesn't answer is refused by now
        if options.dry_run:
            foresee(plan)
            return 1 if len(plan.missing) or plan.skipped else 0
    except (MammoError, OSError) as error:
        print(f"prepare_dataset: error: {error}. Nothing was written.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_dataset: stopped: interrupted. Nothing was written.", file=sys.stderr)
        return 3
    try:
        carry_out(plan)
    except (OSError, MammoError, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        print(f"prepare_dataset: stopped: {reason}. The same command resumes.", file=sys.stderr)
        return 3
    print_summary(plan)
    unlabelled = bool(plan.label_rows) and not findings_told(plan)
    if unlabelled:
        print("prepare_dataset: error: every label in labels.csv is empty", file=sys.stderr)
    return 1 if len(plan.missing) or plan.skipped or unlabelled else 0


if __name__ == "__main__":
    sys.exit(main())
