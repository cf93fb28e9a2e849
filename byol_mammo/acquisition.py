"""How an image was taken: maker, model, detector and exposure, as DICOM headers and tables tell it.

COLUMNS names the attributes that are read, and no other is: serial numbers, stations, institutions,
people and dates stay in the header. So does DetectorID, "the ID or serial number of the detector"
(PS3.3 C.8.11.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from byol_mammo.tables import UNSAID, some

MAX_NAME_LENGTH = 64  # characters of a maker or model, as DICOM's LO has them (PS3.5 6.2)
DIFFERENT = 0.1  # relative, and 1 in the column's unit: more than the rounding of Exposure to whole mAs

# Maker -> how its names begin, in capitals. Brands of one factory count as its own (LORAD is Hologic's
# since 2000); what was bought later as another product does not (Sectra's scanners became Philips's).
MAKERS = {
    "Hologic": r"HOLOGIC|LORAD",
    "GE": r"GE\b|GEMS\b|GENERAL ELECTRIC",
    "Siemens": r"SIEMENS",
    "Philips": r"PHILIPS",
    "Sectra": r"SECTRA",
    "Fujifilm": r"FUJI",
    "IMS Giotto": r"I\.?M\.?S\b|INTERNAZIONALE MEDICO|GIOTTO",
    "Planmed": r"PLANMED",
    "Konica Minolta": r"KONICA",
    "Carestream": r"CARESTREAM",
    "Kodak": r"(EASTMAN )?KODAK",
    "Agfa": r"AGFA",
    "Metaltronica": r"METALTRONICA",
}
DETECTORS = {"DIRECT", "SCINTILLATOR", "STORAGE", "FILM"}  # PS3.3 C.8.11.4, DetectorType
# Word or symbol -> the defined term of PS3.3 for AnodeTargetMaterial and FilterMaterial.
MATERIALS = {
    **dict.fromkeys(("TUNGSTEN", "WOLFRAM", "W"), "TUNGSTEN"),
    **dict.fromkeys(("MOLYBDENUM", "MO"), "MOLYBDENUM"),
    **dict.fromkeys(("RHODIUM", "RH"), "RHODIUM"),
    **dict.fromkeys(("SILVER", "AG"), "SILVER"),
    **dict.fromkeys(("ALUMINUM", "ALUMINIUM", "AL"), "ALUMINUM"),
    **dict.fromkeys(("COPPER", "CU"), "COPPER"),
    **dict.fromkeys(("TITANIUM", "TI"), "TITANIUM"),
    **dict.fromkeys(("NIOBIUM", "NB"), "NIOBIUM"),
}


def plain(text: str) -> str:
    """A name in one line of printable letters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_NAME_LENGTH]


def maker(text: str) -> str:
    """The maker in one spelling; the name as it stands where MAKERS has none for it."""
    name = plain(text)
    return next((ours for ours, begins in MAKERS.items() if re.match(begins, name.upper())), name)


def detector(text: str) -> str:
    """DICOM's term for a type of detector; '' of anything else, which may be a number of one."""
    return text.upper() if text.upper() in DETECTORS else ""


def materials(text: str) -> str:
    """DICOM's terms for metals, several joined by '+'; '' where a word is of none."""
    words = re.findall(r"[A-Z]+", text.upper())
    return "+".join(MATERIALS[word] for word in words) if {*words} <= MATERIALS.keys() else ""


@dataclass(frozen=True)
class Column:
    """A column of the manifest: its meaning, and the DICOM keywords that tell it, the best first, each
    with what its value is multiplied by to have the column's unit.

    A column has either a `reader` of words or `limits`, the numbers that can be, in its unit.
    """

    meaning: str
    sources: dict[str, float]
    limits: tuple[float, float] = (0, 0)
    reader: Callable[[str], str] | None = None


# Units are those that PS3.3 gives with each attribute. Limits leave room around what mammography units
# do: 20 to 49 kV, up to some 600 mAs, breasts of 20 to 120 mm under at most 300 N.
COLUMNS = {
    "maker": Column("maker, in one spelling", {"Manufacturer": 1}, reader=maker),
    "model": Column("model", {"ManufacturerModelName": 1}, reader=plain),
    "detector": Column("DIRECT, SCINTILLATOR, STORAGE or FILM", {"DetectorType": 1}, reader=detector),
    "kvp": Column("tube voltage, kV", {"KVP": 1}, (15, 60)),
    # ExposureInuAs first: Exposure is a whole number of mAs.
    "mas": Column("exposure, mAs", {"ExposureInuAs": 0.001, "Exposure": 1}, (1, 1000)),
    "thickness_mm": Column("compressed breast, mm", {"BodyPartThickness": 1}, (10, 200)),
    "force_n": Column("compression, N", {"CompressionForce": 1}, (5, 400)),
    "anode": Column("target of the anode", {"AnodeTargetMaterial": 1}, reader=materials),
    "filter": Column("filter, joined by '+'", {"FilterMaterial": 1}, reader=materials),
}
KEYWORDS = tuple(keyword for column in COLUMNS.values() for keyword in column.sources)


def understood(column: Column, text: str, factor: float) -> tuple[str, str]:
    """A value in the column's unit or words, '' where there is none that can be, and why it can't.

    0 stands for a value that was not recorded, as scanners write it, and is no doubt.
    """
    text = text.strip()
    if text.lower() in UNSAID:
        return "", ""
    if column.reader:
        value = column.reader(text)
        return value, "" if value else "is none of DICOM's words"
    try:
        number = float(text) * factor
    except ValueError:
        return "", "is no number"
    low, high = column.limits
    if number == 0 or low <= number <= high:
        return (f"{number:.6g}" if number else ""), ""
    return "", f"is {number:g}, not {low:g} to {high:g} ({column.meaning})"


def of_header(text_of: Callable[[str], str]) -> tuple[dict[str, str], list[str]]:
    """COLUMNS of one DICOM header ('' = unknown), and doubts; `text_of` gives an attribute as text."""
    values, doubts = {}, []
    for name, column in COLUMNS.items():
        found: dict[str, str] = {}
        for keyword, factor in column.sources.items():
            value, doubt = understood(column, text_of(keyword), factor)
            doubts += [f"{keyword} {doubt}"] if doubt else []
            found |= {keyword: value} if value else {}
        values[name] = next(iter(found.values()), "")
        if len(found) > 1 and apart(*map(float, found.values())):
            told = ", ".join(f"{keyword} says {value}" for keyword, value in found.items())
            doubts.append(f"{told} ({column.meaning}): the first counts")
    return values, doubts


def apart(first: float, second: float) -> bool:
    """Whether two values of one quantity differ by more than their rounding."""
    return abs(first - second) > max(1, DIFFERENT * max(first, second))


def of_table(table: pd.DataFrame, raw: pd.DataFrame, archive: str, notes: list[str]) -> pd.DataFrame:
    """The table with the columns of COLUMNS that it or `raw` tell, and `archive`.

    `table` has a row for each image, and those columns as the user mapped them; `raw` is the archive's
    own table, by the same lines, where columns are named as DICOM's attributes. A line that is of
    several images tells of none of them. What can't be is left empty and noted.
    """
    several = table.index.has_duplicates or raw.index.has_duplicates
    beside = pd.DataFrame() if several else raw.reindex(table.index).fillna("")
    read = {}
    for name, column in COLUMNS.items():
        cells = {keyword: beside[keyword] for keyword in column.sources if keyword in beside}
        if name in table:
            cells = {name: table[name]}
        if cells:
            read[name] = first_told(column, cells, notes)
    own = table["archive"].map(plain) if "archive" in table else archive
    return table.assign(**read, archive=own)


def first_told(column: Column, cells: Mapping[str, pd.Series], notes: list[str]) -> pd.Series:
    """One column of several of a table: for each row the first value that can be. What can't be, and
    what differs from the first, is noted."""
    values = pd.Series("", next(iter(cells.values())).index)
    for name, said in cells.items():
        known = {text: understood(column, text, column.sources.get(name, 1)) for text in said.unique()}
        told = said.map({text: value for text, (value, _) in known.items()})
        both = zip(values[values != ""], told[values != ""], strict=True)
        differ = sum(apart(float(first), float(value)) for first, value in both if value)
        if differ:
            notes.append(
                f"{differ} values of {name} differ from {next(iter(cells))} ({column.meaning}), which "
                "counts"
            )
        values = values.where(values != "", told)
        wrong = said[said.map({text: doubt for text, (_, doubt) in known.items()}) != ""]
        if len(wrong):
            listed = some(f"{text!r} ({count})" for text, count in wrong.value_counts().items())
            notes.append(
                f"{len(wrong)} values of {name} can't be ({column.meaning}), left empty: {listed}"
            )
    return values


def of_image(row: Mapping[str, str], header: Mapping[str, str]) -> dict[str, str]:
    """COLUMNS of an image: what the table's row tells, else its header."""
    return {name: row.get(name) or header.get(name, "") for name in COLUMNS}
