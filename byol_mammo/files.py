"""Files that are whole or not there, tables, and arrays with a header."""

from __future__ import annotations

import html
import os
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from byol_mammo.settings import MammoError

NPY_HEADER = 128  # bytes before the values of a one-dimensional .npy file


# How files begin that are given for a CSV, and what they are.
OTHER_TABLES = {
    b"PK\x03\x04": "a ZIP archive: unpack it, and give a CSV that is in it",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (.xls): export the sheet as CSV, in UTF-8",
    b"PAR1": "a Parquet table: export it as CSV, by pandas' read_parquet(FILE).to_csv(CSV, index=False)",
}
WORKBOOK = "a workbook (Excel or OpenDocument): export the sheet as CSV, in UTF-8"


def refuse_other_tables(path: Path) -> None:
    """Raise MammoError where a file is a table of another kind than CSV."""
    with path.open("rb") as file:
        start = file.read(4)
    kind = OTHER_TABLES.get(start, "")
    if start == b"PK\x03\x04":
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            kind = WORKBOOK if {"xl/workbook.xml", "xl/workbook.bin", "content.xml"} & {*names} else kind
    if kind:
        raise MammoError(f"{path} is {kind}")


def parse_table(path: Path, **options: Any) -> pd.DataFrame:
    """A CSV as text, '' where empty; `options` are pandas'. Raises ValueError, with its reason, where it
    is no UTF-8 table or has a row longer than its header."""
    options |= {"dtype": str, "keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
        try:
            return pd.read_csv(path, **options)
        except (ValueError, pd.errors.ParserWarning) as error:  # pandas' and Unicode errors are these
            raise ValueError(" ".join(str(error).split())) from error


def read_table(path: Path, columns: Sequence[str], remedy: str) -> pd.DataFrame:
    """A CSV as text without blanks around it, '' where empty.

    Raises MammoError where it is no table with `columns` once each.
    """
    refuse_other_tables(path)
    try:
        table = parse_table(path).apply(lambda column: column.str.strip())
    except ValueError as error:
        raise MammoError(f"{path} is not a comma-separated UTF-8 table ({error}); {remedy}") from error
    missing = [name for name in columns if name not in table]
    if missing:
        there = ", ".join(map(str, table))[:200]
        raise MammoError(f"{path}: no column {', '.join(missing)} (there is {there}); {remedy}")
    twice = [name for name in columns if f"{name}.1" in table]  # as pandas renames it
    if twice:
        raise MammoError(f"{path}: the column {twice[0]} is there twice; keep one of them")
    return table


def write_npy_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """Write the NPY_HEADER bytes that make an .npy file of the `length` values that follow."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_2_0(file, header)


def map_array(path: Path) -> np.ndarray:
    """An .npy file, memory-mapped for reading alone.

    A private mapping that may be written ("c") counts as memory that is promised: a file larger than
    memory and swap could not be opened.
    """
    return np.load(path, mmap_mode="r")


UNFINISHED = ".unfinished."  # how the name of a file begins until it is complete


def unfinished_name(path: Path) -> Path:
    """A temporary path beside `path`, of the same suffix, that no other writer has."""
    return path.with_name(f"{UNFINISHED}{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`."""
    path = Path(path)
    temporary = unfinished_name(path)
    try:
        with name_file_in_errors(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Give an OSError inside, as that of a full disk, the name of the file that was to be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error}, is the disk full?"  # NumPy gives no number
        raise OSError(error.errno, reason, str(path)) from error


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove what a killed process left half-written in a folder, of one file or of all."""
    for leftover in folder.glob(f"{UNFINISHED}{name}*"):
        leftover.unlink(missing_ok=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all; what of a name is no UTF-8 stands in it escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def move_aside(folder: Path) -> None:
    """Rename a run's folder to the first free NAME_1, NAME_2, ...: only halves of files are lost."""
    remove_unfinished(folder)
    number = 1
    while folder.with_name(f"{folder.name}_{number}").exists():
        number += 1
    os.replace(folder, folder.with_name(f"{folder.name}_{number}"))


def is_text(name: str) -> bool:
    """Whether a name of a file, which may hold any byte, is UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)  # as os.fsdecode writes others


def html_table(rows: Iterable[Iterable[Any]], header: Sequence[str] = (), kind: str = "") -> str:
    """A table of text; nothing in it is taken for markup. `kind` paths: cells may break anywhere."""
    lines = [("th", header)] * bool(header) + [("td", row) for row in rows]
    cells = ("".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in row) for tag, row in lines)
    table = "\n".join(f"<tr>{row}</tr>" for row in cells)
    name = f"wide {kind}".strip()
    return f'<div class="{name}"><table>{table}</table></div>\n'
