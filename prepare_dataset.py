"""Lay a mammogram archive out by split: CSV + images -> split_images/<split>/ + manifest.csv.

Reads the VinDr-Mammo layout: a CSV with one row per image (study_id, image_id and split are
needed; laterality, view_position, height, width, breast_birads and breast_density are used where
present) and files <images_root>/<study_id>/<image_id>.*.

    python prepare_dataset.py --csv_path breast-level_annotations.csv \\
        --images_root images_png --output_dir ./split_images
    python prepare_dataset.py --mode copy --verify      (defaults as above; independent copies)

Writes <output_dir>/<split>/<study_id>_<image_id>.png and manifest.csv (one row per image laid
out), and where there is something to list missing.csv (in the CSV, not on disk), extra.csv (on
disk, not in the CSV) and skipped.csv (found but not usable, with the reason). PNG is linked or
copied as it is; TIFF and JPEG are re-encoded as PNG without loss. Running again does only what is
new or has changed; a run that was killed is finished by the same command. Flags may be written
with '_' or '-'.

Contents
    1 Configuration   constants, Options, parse_options
    2 Table           read_table, check_ids, check_splits, drop_duplicates
    3 Files           find_files, match_files
    4 Image formats   read_png_header, decode_raster, what is read and what is not
    5 Plan            what is there already, what must not be touched
    6 Layout          atomic writing, links and copies, lay_out, remove_stale
    7 Report          manifest and lists, summary
    8 Entry           main

Exit codes
    0  every image in the CSV is laid out
    1  finished, but images are missing or were skipped (missing.csv, skipped.csv)
    2  refused (wrong flag, wrong CSV, a study in two splits, no image found): nothing was written
    3  stopped part-way (disk full, interrupted): the same command again resumes
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import stat
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

# 1 Configuration ----------------------------------------------------------------------------------

CSV_PATH = "breast-level_annotations.csv"  # one row per image
IMAGES_ROOT = "images_png"  # folder that holds <study_id>/<image_id>.png
OUTPUT_DIR = "./split_images"  # folder to write; made if needed
MODE = "hardlink"  # hardlink (shares the bytes; a copy where impossible), copy or symlink

MAX_PIXELS = 150_000_000  # larger images are skipped: a mammogram has some 10-30 million
MAX_ID_LENGTH = 100  # characters; keeps <study_id>_<image_id>.png inside every file system's 255
SHOWN = 10  # names shown per warning; the full lists are in the CSV files
CLOCK_TOLERANCE_NS = 2_000_000_000  # FAT and exFAT keep modification times to 2 s

DEFAULT = " (default: %(default)s)"  # argparse fills it in
REQUIRED = ["study_id", "image_id", "split"]
OPTIONAL = ["laterality", "view_position", "height", "width", "breast_birads", "breast_density"]
SIZE = ["height", "width", "bit_depth"]
SOURCE = ["source", "source_size", "source_mtime_ns"]
CLAIMS = ".prepare_dataset.claims.csv"  # what an unfinished run set out to make
REPORTS = {  # file name -> columns; a file of this name with other columns is not ours
    "manifest.csv": [
        *("file", "study_id", "image_id", "laterality", "view", "breast_birads", "breast_density"),
        *(*SIZE, "split", *SOURCE),
    ],
    "missing.csv": ["study_id", "image_id", "split"],
    "extra.csv": ["file"],
    "skipped.csv": ["study_id", "image_id", "split", "source", "reason"],
    CLAIMS: ["file", *SOURCE],
}
OTHER_KNOWN = {"labels.csv"}  # written beside the manifest by other steps
TEMPORARY = ".prepare_dataset.tmp"  # ending of files not yet complete
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
OUTPUT_NAME = re.compile(rf"{SAFE_NAME.pattern}/{SAFE_NAME.pattern}\.png")
SAFE_NAME_RULE = "letters, digits, '_', '-' and '.', not beginning with '.' or '-'"


class RefusedError(Exception):
    """The run cannot start; the message says why and what to do."""


class SkipImageError(Exception):
    """One image cannot be laid out; the message is the reason listed in skipped.csv."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    csv_path: Path
    images_root: Path
    output_dir: Path
    mode: str = MODE
    verify: bool = False


class Parser(argparse.ArgumentParser):
    """Parser that answers with one line, as the other refusals do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"prepare_dataset: error: {message} (--help lists the flags)\n")


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Read the flags; an unknown one ends the program (exit code 2) and names the nearest flag."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    actions = [
        parser.add_argument(flag, type=Path, metavar=kind, default=default, help=text + DEFAULT)
        for flag, kind, default, text in (
            ("--csv_path", "CSV", CSV_PATH, "table with one row per image"),
            ("--images_root", "FOLDER", IMAGES_ROOT, "holds <study_id>/<image_id>.png"),
            ("--output_dir", "FOLDER", OUTPUT_DIR, "where to write; made if needed"),
        )
    ]
    text = "how PNG files get there; hardlink shares the bytes, or copies where it cannot link"
    modes = ["hardlink", "copy", "symlink"]
    actions += [
        parser.add_argument("--mode", choices=modes, default=MODE, help=text + DEFAULT),
        parser.add_argument("--verify", action="store_true", help="decode every image in full too"),
    ]
    flags = [flag for action in actions for flag in action.option_strings] + ["--help"]
    arguments = []
    for argument in sys.argv[1:] if argv is None else argv:
        if argument.startswith("--") and argument != "--":
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            if name not in flags:
                parser.error(f"unknown flag {argument}; nearest: {nearest(name, flags)}")
            argument = name + equals + value
        arguments.append(argument)
    return Options(**vars(parser.parse_args(arguments)))


def nearest(name: str, candidates: Sequence[str]) -> str:
    """The candidate most like `name`, or all of them where none is like it."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[close[0]] if close else "none, there are " + ", ".join(candidates)


# 2 Table ------------------------------------------------------------------------------------------


def read_table(csv_path: Path) -> pd.DataFrame:
    """The CSV as strings (leading zeros kept), indexed by line number, used columns only.

    Raises RefusedError where the file is missing, empty, not comma-separated, or lacks a required
    column.
    """
    if not csv_path.is_file():
        raise RefusedError(f"there is no file {csv_path}; give the annotation CSV with --csv_path")
    with open(csv_path, encoding="utf-8", errors="replace") as file:
        header = file.readline()
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "'|'")):
        if delimiter in header and "," not in header:
            raise RefusedError(f"{csv_path} is separated by {name}; save it separated by commas")
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            # Blank lines are kept for now, so that the index gives the line in the file.
            table = pd.read_csv(csv_path, skip_blank_lines=False, **options)
    except (ValueError, pd.errors.ParserWarning) as error:  # pandas' and Unicode errors are these
        reason = " ".join(str(error).split())
        raise RefusedError(f"{csv_path} is not a comma-separated UTF-8 table: {reason}") from None
    table.columns = table.columns.str.strip()
    check_columns(table, csv_path)
    table = table[[name for name in REQUIRED + OPTIONAL if name in table]].fillna("")
    table = table.apply(lambda column: column.str.strip(" \t"))
    table.index = pd.RangeIndex(2, len(table) + 2)  # the header is line 1
    table = table[(table != "").any(axis=1)]
    if table.empty:
        raise RefusedError(f"{csv_path} has a header but no rows; is the download complete?")
    return table


def check_columns(table: pd.DataFrame, csv_path: Path) -> None:
    """Refuse a table that lacks a required column or has one of ours twice."""
    found = list(table.columns)
    twice = [name for name in REQUIRED + OPTIONAL if f"{name}.1" in found]  # as pandas renames it
    if twice:
        raise RefusedError(f"{csv_path} has the column {twice[0]} twice; keep one of them")
    missing = [name for name in REQUIRED if name not in found]
    if not missing:
        return
    hints = "; ".join(f"{name} (nearest: {nearest(name, found)})" for name in missing)
    raise RefusedError(
        f"{csv_path} lacks the column {hints}; found: {', '.join(found)}. Rename the column or "
        "give another file with --csv_path"
    )


def is_safe_name(name: str) -> bool:
    """True where `name` can be a folder name or part of a file name on any system."""
    return len(name) <= MAX_ID_LENGTH and bool(SAFE_NAME.fullmatch(name))


def check_ids(table: pd.DataFrame) -> None:
    """Refuse ids and splits that are absent or would leave the output folder.

    Raises RefusedError naming the line, the column and the value.
    """
    reserved = {"nan", "none", "null", *REPORTS, *OTHER_KNOWN}  # absent values, and report names
    for column in REQUIRED:
        wrong = [not is_safe_name(v) or v.lower() in reserved for v in table[column]]
        if any(wrong):
            line = table.index[wrong][0]
            value = table.at[line, column]
            problem = f"is {value[:MAX_ID_LENGTH]!r}" if value else "is empty"
            raise RefusedError(
                f"line {line} of the CSV: {column} {problem}, {sum(wrong)} such rows; it becomes "
                f"part of a file name: {SAFE_NAME_RULE}, at most {MAX_ID_LENGTH} characters"
            )


def check_splits(table: pd.DataFrame) -> None:
    """Refuse a study that stands in two splits: its breasts would be trained and tested on."""
    splits = table.groupby("study_id")["split"].unique()
    leaking = splits[splits.map(len) > 1].map(sorted).map(" and ".join)
    if len(leaking):
        names = some([f"{study} ({both})" for study, both in leaking.items()])
        raise RefusedError(
            f"{len(leaking)} studies stand in more than one split: {names}. Training would see "
            "test images; give each study one split"
        )


def drop_duplicates(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """One row per image and the number of identical rows dropped; adds the column `file`.

    Raises RefusedError where rows of one image disagree or two images would share a file name.
    """
    unique = table.drop_duplicates()
    twice = unique.duplicated(["study_id", "image_id"], keep=False)
    if twice.any():
        (study, image), rows = next(iter(unique[twice].groupby(["study_id", "image_id"])))
        columns = [name for name in rows if rows[name].nunique() > 1]
        raise RefusedError(
            f"image {study}/{image} has rows that disagree in "
            f"{', '.join(columns)} (lines {some(rows.index)} of the CSV); keep the right one"
        )
    names = unique["study_id"] + "_" + unique["image_id"] + ".png"
    unique = unique.assign(file=unique["split"] + "/" + names)
    # Compared without case, because macOS and Windows would write both into one file.
    clash = unique["file"].str.lower().duplicated(keep=False)
    if clash.any():
        raise RefusedError(
            f"different images would share one file name: {some(unique['file'][clash])} "
            f"(lines {some(unique.index[clash])} of the CSV); rename one of them"
        )
    return unique, len(table) - len(unique)


# 3 Files ------------------------------------------------------------------------------------------


def find_files(images_root: Path) -> tuple[dict[tuple[str, str], list[str]], list[str]]:
    """Files by (study, name without suffix) and image files outside study folders.

    Paths are relative to `images_root`, with '/'. Hidden files are left out (macOS writes ._x.png).
    Only two levels are read, so that links in circles do no harm. Raises OSError.
    """
    found: dict[tuple[str, str], list[str]] = {}
    loose = []
    for study in sorted(os.listdir(images_root)):
        folder = images_root / study
        if study.startswith("."):
            continue
        if os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                if not name.startswith("."):
                    key = (study, os.path.splitext(name)[0])
                    found.setdefault(key, []).append(f"{study}/{name}")
        elif suffix_of(study) in SUFFIXES:
            loose.append(study)
    return found, loose


def match_files(
    table: pd.DataFrame, images_root: Path
) -> tuple[pd.DataFrame, pd.DataFrame, list[str], list[str]]:
    """Rows with a file (column `source`), rows without, extra files, images with several files.

    Raises RefusedError where no row has a file.
    """
    if not images_root.is_dir():
        raise RefusedError(f"there is no folder {images_root}; give the images with --images_root")
    found, extra = find_files(images_root)
    wanted = list(zip(table["study_id"], table["image_id"], strict=True))
    sources, ambiguous = [], []
    for key in wanted:
        ranked = sorted(found.get(key, []), key=lambda name: (suffix_rank(name), name))
        sources.append(ranked[0] if ranked else "")
        images = [name for name in ranked if suffix_of(name) in SUFFIXES]
        if len(images) > 1:
            ambiguous.append(f"{images[0]} taken, {', '.join(images[1:])} not")
    table = table.assign(source=sources)
    others = [name for key in found.keys() - set(wanted) for name in found[key]]
    extra += [name for name in others if suffix_of(name) in SUFFIXES]
    if not any(sources):
        study, image = wanted[0]
        deeper = [p for p in sorted(images_root.iterdir()) if (p / study).is_dir()]
        hint = f"; try --images_root {deeper[0]}" if deeper else "; check --images_root"
        raise RefusedError(
            f"0 of the {len(table)} images in the CSV are under {images_root}, where "
            f"{study}/{image}.png was expected{hint}"
        )
    return table[table["source"] != ""], table[table["source"] == ""], sorted(extra), ambiguous


def suffix_of(name: str) -> str:
    """The file name's suffix in lower case, such as '.png'."""
    return os.path.splitext(name)[1].lower()


def suffix_rank(name: str) -> int:
    """Position in the order of preference (SUFFIXES); unknown suffixes come last."""
    suffix = suffix_of(name)
    return SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)


# 4 Image formats ----------------------------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


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
        width, height, bit_depth = struct.unpack(">IIB", head[16:25])
        check_size(height, width)
        # The commonest damage is a download cut short; some writers put bytes after the end.
        file.seek(-min(1024, os.fstat(file.fileno()).st_size), os.SEEK_END)
        if PNG_END not in file.read():
            raise SkipImageError("the PNG file is cut short")
    return height, width, bit_depth


def check_size(height: int, width: int) -> None:
    """Refuse an image that is empty or would fill the memory when decoded."""
    if not 0 < height * width <= MAX_PIXELS:
        raise SkipImageError(f"declares {height} x {width} pixels, more than {MAX_PIXELS} or none")


def decode_raster(path: Path) -> np.ndarray:
    """Pixels of a PNG, TIFF or JPEG as stored: (H, W) or (H, W, C), uint8 or uint16.

    Pillow reads the size before any pixel and reports files cut short, which OpenCV releases
    differ in; OpenCV gives the pixels at full bit depth. Raises SkipImageError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                check_size(image.height, image.width)
                pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
                image.load()
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


DICOM_NOT_READ = "DICOM is not read yet; convert to 16-bit PNG first"
# A format moves from NOT_READ to DECODERS by a function path -> pixels that raises SkipImageError.
DECODERS: dict[str, Callable[[Path], np.ndarray]] = dict.fromkeys(
    (".tif", ".tiff", ".jpg", ".jpeg"), decode_raster
)
NOT_READ = {".dcm": DICOM_NOT_READ, ".dicom": DICOM_NOT_READ}
SUFFIXES = [".png", *DECODERS, *NOT_READ]  # in order of preference where an image has several


# 5 Plan -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One image to lay out: its CSV row and where it is."""

    row: dict[str, str]
    source: Path
    output: Path
    found: os.stat_result  # of the source

    @property
    def record(self) -> dict[str, str]:
        """What identifies the source's content from one run to the next."""
        values = (self.row["source"], str(self.found.st_size), str(self.found.st_mtime_ns))
        return dict(zip(SOURCE, values, strict=True))


@dataclass
class Plan:
    """What was read before anything is written, and then what came of it."""

    options: Options
    items: list[Item]
    previous: dict[str, dict[str, str]]  # manifest rows of the last run, by file
    claimed: dict[str, dict[str, str]]  # of a run that was not finished
    missing: pd.DataFrame
    extra: list[str]
    skipped: list[dict[str, str]]
    notes: list[str]
    manifest: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def recorded(self, item: Item) -> dict[str, str]:
        """The last run's manifest row of an image; {} where there is no usable one."""
        row = self.previous.get(item.row["file"], {})
        return row if all(row.get(name, "").isdigit() for name in SIZE) else {}


def make_plan(options: Options) -> Plan:
    """Read and check everything; writes nothing. Raises RefusedError or OSError."""
    table = read_table(options.csv_path)
    check_ids(table)
    check_splits(table)
    absent = [name for name in OPTIONAL if name not in table]
    notes = [f"not in the CSV, so empty in the manifest: {some(absent)}"] if absent else []
    table, dropped = drop_duplicates(table)
    if dropped:
        notes.append(f"{dropped} identical duplicate rows in the CSV dropped")
    check_folders(options)
    matched, missing, extra, ambiguous = match_files(table, options.images_root)
    if ambiguous:
        notes.append(f"{len(ambiguous)} images have several files: {some(ambiguous)}")
    reports = {name: read_report(options.output_dir / name, name) for name in REPORTS}
    previous, claimed = reports["manifest.csv"], reports[CLAIMS]
    plan = Plan(options, [], previous, claimed, missing, extra, [], notes)
    for row in matched.to_dict("records"):
        try:
            plan.items.append(inspect(row, options, row["file"] in {**previous, **claimed}))
        except SkipImageError as reason:
            plan.skipped.append({**row, "reason": str(reason)})
    return plan


def check_folders(options: Options) -> None:
    """Refuse folders inside each other: the output would be read as input or the other way."""
    root, output = options.images_root.resolve(), options.output_dir.resolve()
    if root.is_relative_to(output) or output.is_relative_to(root):
        raise RefusedError(
            f"--output_dir {options.output_dir} and --images_root {options.images_root} must not "
            "lie inside each other; give another --output_dir"
        )
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise RefusedError(f"--output_dir {options.output_dir} is a file; give a folder")


def read_report(path: Path, name: str) -> dict[str, dict[str, str]]:
    """Rows of an earlier run's report by `file` ({} where there are none).

    Raises RefusedError where the file has other columns: it is someone else's and stays as it is.
    """
    if not os.path.lexists(path):
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        ours = set(REPORTS[name]) <= set(table.columns)
    except (OSError, ValueError):  # a folder, not text, or empty
        ours = False
    if not ours:
        raise RefusedError(f"{path} is in the way and not from this program; move it elsewhere")
    if "source_size" not in table:
        return {}
    # An edited report must not make this program touch anything outside the folder.
    rows = table.to_dict("records")
    return {row["file"]: row for row in rows if OUTPUT_NAME.fullmatch(row["file"])}


def inspect(row: dict[str, str], options: Options, ours: bool) -> Item:
    """Find out whether a source can be laid out without opening it.

    `ours`: an earlier run made the output. Raises SkipImageError.
    """
    source, output = options.images_root / row["source"], options.output_dir / row["file"]
    suffix = suffix_of(source.name)
    try:
        found = source.stat()
    except OSError as error:
        raise SkipImageError(f"cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        folder = stat.S_ISDIR(found.st_mode)
        raise SkipImageError("is a folder" if folder else "is not a regular file")
    if suffix in NOT_READ:
        raise SkipImageError(NOT_READ[suffix])
    if suffix != ".png" and suffix not in DECODERS:
        raise SkipImageError(f"the format {suffix or 'without suffix'} is not read; convert to PNG")
    item = Item(row, source, output, found)
    if kind_of_output(item) == "other" and not ours:
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
    decoded = suffix_of(item.source.name) in DECODERS
    same_time = abs(there.st_mtime_ns - item.found.st_mtime_ns) < CLOCK_TOLERANCE_NS
    same_size = decoded or there.st_size == item.found.st_size
    return "copy" if stat.S_ISREG(there.st_mode) and same_time and same_size else "other"


# 6 Layout -----------------------------------------------------------------------------------------


def carry_out(plan: Plan) -> None:
    """Write everything; stopped at any point, the next run finishes. Raises OSError."""
    folder = plan.options.output_dir
    for split in sorted({item.row["split"] for item in plan.items}):
        (folder / split).mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob(f"*{TEMPORARY}"), *folder.glob(f"*/*{TEMPORARY}")]:
        leftover.unlink()
    # Until the manifest is written, this list tells a later run which files are not the user's.
    if any(not item.record.items() <= plan.recorded(item).items() for item in plan.items):
        claims = {item.row["file"]: {**item.row, **item.record} for item in plan.items}
        write_report(folder, CLAIMS, list({**plan.claimed, **claims}.values()))
    lay_out(plan)
    remove_stale(plan)
    for split in {item.row["split"] for item in plan.items}:
        flush(folder / split)
    write_report(folder, "missing.csv", plan.missing.to_dict("records"))
    write_report(folder, "extra.csv", [{"file": name} for name in plan.extra])
    write_report(folder, "skipped.csv", plan.skipped)
    write_report(folder, "manifest.csv", plan.manifest)
    (folder / CLAIMS).unlink(missing_ok=True)


def lay_out(plan: Plan) -> None:
    """Lay every item out, filling the plan's manifest, counts and skipped images."""
    bar = tqdm(plan.items, desc="images", unit="image", disable=not sys.stderr.isatty())
    for item in bar:
        try:
            row, action = lay_out_image(item, plan)
        except SkipImageError as reason:
            plan.skipped.append({**item.row, "reason": str(reason)})
            continue
        plan.manifest.append(row)
        plan.counts[action] += 1
    plan.skipped.sort(key=lambda row: row["file"])


def lay_out_image(item: Item, plan: Plan) -> tuple[dict[str, str], str]:
    """Lay one image out where it is not already; its manifest row and what was done.

    Raises SkipImageError for a bad image and OSError where the output cannot be written.
    """
    mode, before = plan.options.mode, plan.recorded(item)
    unchanged = item.record.items() <= before.items()
    decoder = DECODERS.get(suffix_of(item.source.name))
    try:
        if plan.options.verify:
            (decoder or decode_raster)(item.source)
        if not decoder and not unchanged:
            read_png_header(item.source)  # before a damaged file gets a place among the good
    except OSError as error:
        raise SkipImageError(f"cannot be read: {error.strerror}") from error
    accepted = {"hardlink": ["hardlink", "copy"], "copy": ["copy"], "symlink": ["symlink"]}[mode]
    kind = kind_of_output(item)
    current = kind in (["copy"] if decoder else accepted)
    if kind == "copy" and before and not unchanged:
        current = False  # the manifest knows times exactly, the file system perhaps to 2 s
    action = "already there" if current else place(item, mode, decoder)
    if not current and kind != "none":
        plan.counts["replaced"] += 1
    size = [before[n] for n in SIZE] if unchanged and current else read_png_header(item.output)
    values = {**item.row, **item.record, "view": item.row.get("view_position", "")}
    values |= dict(zip(SIZE, map(str, size), strict=True))
    return {name: values.get(name, "") for name in REPORTS["manifest.csv"]}, action


def place(item: Item, mode: str, decoder: Callable[[Path], np.ndarray] | None) -> str:
    """Put one image at its output in one step, replacing what was there; returns what was done.

    Raises SkipImageError where the source cannot be decoded and OSError where writing fails.
    """
    temporary = temporary_name(item.output)
    content = None
    if decoder:
        action, content = "re-encoded", cv2.imencode(".png", decoder(item.source))[1].tobytes()
    elif mode == "symlink":
        action = "linked by symlink"
        temporary.symlink_to(item.source.resolve())
    elif mode == "hardlink" and hardlinked(item.source.resolve(), temporary):
        action = "linked"
    else:
        action, content = "copied", read_source(item.source)
    if content is not None:
        temporary.write_bytes(content)
        os.utime(temporary, ns=(item.found.st_atime_ns, item.found.st_mtime_ns))
        flush(temporary)
    os.replace(temporary, item.output)
    return action


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


def remove_stale(plan: Plan) -> None:
    """Remove outputs of earlier runs that the CSV no longer lists there, such as a study that moved
    to another split. Only where nothing is lost: the source still holds the same image."""
    listed = {row["file"] for row in plan.manifest}
    for file, row in {**plan.claimed, **plan.previous}.items():
        source, output = plan.options.images_root / row["source"], plan.options.output_dir / file
        if file in listed or not source.is_file():
            continue
        if kind_of_output(Item(row, source, output, source.stat())) not in ("none", "other"):
            output.unlink()
            plan.counts["removed"] += 1


def temporary_name(path: Path) -> Path:
    """The name a file has in its folder until it is complete."""
    return path.with_name(f".{path.name}{TEMPORARY}")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# 7 Report -----------------------------------------------------------------------------------------


def write_report(folder: Path, name: str, rows: Sequence[dict]) -> None:
    """Write a CSV in one step; an unchanged one is not touched, an empty list is no file."""
    path = folder / name
    if not rows and name != "manifest.csv":
        path.unlink(missing_ok=True)
        return
    text = pd.DataFrame(rows, columns=REPORTS[name]).to_csv(index=False, lineterminator="\n")
    content = text.encode("utf-8", errors="backslashreplace")  # names may hold any byte
    if path.exists() and path.read_bytes() == content:
        return
    temporary = temporary_name(path)
    temporary.write_bytes(content)
    flush(temporary)
    os.replace(temporary, path)
    flush(folder)


def some(names: Sequence) -> str:
    """The first few names in one line, unprintable characters escaped."""
    shown = ", ".join(repr(str(name))[1:-1] for name in list(names)[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def size_differences(plan: Plan) -> list[str]:
    """Files whose size is not the one in the CSV (rows without a number there are left out)."""
    in_csv = {item.row["file"]: item.row for item in plan.items}
    different = []
    for row in plan.manifest:
        stated = [in_csv[row["file"]].get(side, "") for side in ("height", "width")]
        actual = [row["height"], row["width"]]
        numbers = [re.sub(r"\.0*$", "", value) for value in stated]  # pandas may have written 512.0
        if all(value.isdigit() for value in numbers) and numbers != actual:
            different.append(f"{row['file']} ({' x '.join(actual)}, CSV {' x '.join(stated)})")
    return different


def foreign_files(plan: Plan) -> list[str]:
    """Files in the output folder that this program did not put there, or not in this run."""
    folder = plan.options.output_dir
    ours = {*REPORTS, *OTHER_KNOWN, *(row["file"] for row in plan.manifest)}
    found = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    return sorted({path.relative_to(folder).as_posix() for path in found} - ours)


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
    for label, meaning, names in (
        ("missing", "in the CSV, not on disk (missing.csv)", missing),
        ("extra", "on disk, not in the CSV (extra.csv)", plan.extra),
        ("skipped", "not usable (skipped.csv)", skipped),
        ("different size", "not as in the CSV", size_differences(plan)),
        ("foreign", "in the output folder, not from this run, left alone", foreign_files(plan)),
    ):
        if names:
            print(f"{label}: {len(names)} {meaning}: {some(names)}")
    for note in plan.notes:
        print(f"note: {note}")
    splits = sorted(set(rows["split"]), key=lambda name: (name != "training", name))
    if splits:
        print(f"Next: python train_byol_mammo.py --data_dir {options.output_dir / splits[0]}")
    else:
        print("No image was laid out; the reasons are in skipped.csv")


# 8 Entry ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code described at the top."""
    options = parse_options(argv)
    try:
        plan = make_plan(options)
    except (RefusedError, OSError) as error:
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
