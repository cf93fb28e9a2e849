"""Cells, names and rows of other people's tables: what they say, in our words, or why not."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from byol_mammo.archive_files import Index, without_suffix
from byol_mammo.settings import MammoError

MAX_ID_LENGTH = 100  # characters; keeps <study_id>_<image_id>.png inside every file system's 255
SHOWN = 10  # names shown per warning; the full lists are in the CSV files
NOT_UNDERSTOOD = 0.1  # share of a column's values above which it is another column than was thought

REQUIRED = ["study_id", "image_id", "split"]
OPTIONAL = ["laterality", "view_position", "height", "width", "breast_birads", "breast_density"]
FINDINGS = ("mass", "calcification", "cancer")  # columns of a table that go to labels.csv
SEVERITY = (*FINDINGS, "breast_birads", "breast_density", "implant")  # of which more is more

SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


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


@dataclass
class Reading:
    """What the command line asked of a table, and what reading it yields beside its rows."""

    index: Index
    patient_pattern: str = ""  # regular expression that finds the patient in a file's path
    on_conflict: str = "refuse"
    labels: Labels = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nameless: str = ""  # why a split by chance would part images of one woman; '' where none would

    def column(self, raw: pd.DataFrame, name: str, reader: Callable[[str], str]) -> pd.Series:
        """A column as `reader` understands its cells, '' where it is absent or says nothing.

        What is not understood is noted by value. Raises MammoError where that is more than a tenth, or
        where without it no image would be known to have a finding, or to have it not.
        """
        if name not in raw:
            return pd.Series("", raw.index)
        said = raw[name]
        known = {value: reader(value) for value in said.unique()}
        values = said.map(known)
        speaks = ~said.str.lower().isin(UNSAID)
        lost = said[speaks & (values == "") & (reader in UNDERSTOOD)]
        if reader is flag:
            self.check_counts(said, values, name)
        if len(lost):
            spoken = int(speaks.sum())
            listed = some(f"{value!r} ({n})" for value, n in lost.value_counts().items())
            what = f"{len(lost)} of {spoken} values of {name} are not understood"
            # Cancers are rare: words that are not understood may be all that one side has.
            one_sided = reader in (flag, cancer) and not {"0", "1"} <= set(values)
            if len(lost) > NOT_UNDERSTOOD * spoken or one_sided:
                raise MammoError(
                    f"{lost.index[0]}: {what}: {listed}; {UNDERSTOOD[reader]}. Write them so, or name "
                    "another column with --columns"
                )
            self.notes.append(f"{what} and left empty: {listed}")
        return values

    def check_counts(self, said: pd.Series, values: pd.Series, name: str) -> None:
        """Note counts above 1, which are present. Raises MammoError where no row says 0: 1 and 2 may be
        codes of no and yes."""
        several = said[pd.to_numeric(said, errors="coerce") > 1]
        if len(several) and not (values == "0").any():
            raise MammoError(
                f"{several.index[0]}: {name} is {several.iloc[0]}, and no row has 0: codes or counts? "
                "Write 1 and 0"
            )
        if len(several):
            self.notes.append(f"{len(several)} values of {name} are counts above 1: present")

    def patient_in(self, path: str, otherwise: str) -> str:
        """The patient that --patient_pattern finds in a path; `otherwise` where no pattern was given."""
        if not self.patient_pattern:
            return otherwise
        found = re.search(self.patient_pattern, path)
        name = found[1] if found and found.re.groups else found[0] if found else ""
        if not name:
            raise MammoError(
                f"--patient_pattern {self.patient_pattern!r} finds no patient in {path!r}; it must "
                "match every path below --images_root, its first group being the patient"
            )
        return name


def some(names: Iterable[object]) -> str:
    """The first few names in one line, unprintable characters escaped."""
    listed = list(names)
    shown = ", ".join(repr(str(name))[1:-1].replace("\\'", "'") for name in listed[:SHOWN])
    return shown + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


# Names ----------------------------------------------------------------------------------------------


def is_safe_name(name: str) -> bool:
    """True where `name` can be a folder name or part of a file name on any system."""
    return len(name) <= MAX_ID_LENGTH and bool(SAFE_NAME.fullmatch(name))


def safe_name(name: str) -> str:
    """`name` with what cannot be part of a file name turned into '_'; long ones keep their end.

    Those that would be too long or without a letter, such as two in Chinese, are told by a hash.
    """
    name = unicodedata.normalize("NFC", name)  # as a Mac and others write one u with two dots
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-")
    short = len(safe) <= MAX_ID_LENGTH and re.search("[A-Za-z0-9]", safe)
    if short or is_safe_name(name) or not name:
        return safe
    return f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}_{safe[-64:].lstrip('.-')}"


def clean_path(name: str) -> str:
    """A path in a table with '/' between its parts, without drive, './', '..' and suffix."""
    parts = re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/")).split("/")
    return without_suffix("/".join(part for part in parts if part not in ("", ".", "..")))


def places_of(path: str) -> str:
    """Where to look for a path of a table: as it is, then without its leading folders, which were those
    of another machine; a bare name in any folder."""
    parts = path.split("/")
    tails = ["/".join(parts[start:]) for start in range(max(1, len(parts) - 1))]
    return "\n".join(tails if len(parts) > 1 else [path, f"name {path}"])


# Cells ----------------------------------------------------------------------------------------------

UNSAID = (  # in small letters: no value; those with # are a spreadsheet's errors
    *("", "nan", "na", "n/a", "<na>", "nat", "none", "null", "unknown", "unk", "-", "."),
    *("#n/a", "#ref!", "#value!", "#name?", "#null!", "#div/0!", "#num!"),
)


def birads(value: str) -> str:
    """'BI-RADS 4A' of '4a', '4.0', 'BI-RADS: 4A' or 'Category 4a'; '' where there is none."""
    text = value.strip().upper()
    found = re.fullmatch(r"(?:BI-?\s?RADS|CATEGORY)?[\s:_-]*([0-6][ABC]?)(?:\.0)?", text)
    return f"BI-RADS {found[1]}" if found else ""


def worst_birads(grades: pd.Series, groups: Any) -> pd.Series:
    """At each row the worst grade, as birads writes it, of its group; a recall (0) is worse than 2."""
    rank = {digit: place for place, digit in enumerate("1203456")}
    ranked = grades.map(lambda grade: f"{rank[grade[8]]}{grade}" if grade else " ")
    return ranked.groupby(groups, sort=False).transform("max").str[1:]


DENSITY_WORDS = {  # BI-RADS 5th edition's words for A to D, by how they begin
    r"(?:(?:ALMOST )?ENTIRELY )?FAT": "A",
    "SCATTERED": "B",
    "HETEROGEN": "C",
    "EXTREMELY": "D",
}
ROMAN = {"I": "A", "II": "B", "III": "C", "IV": "D"}


def density(value: str) -> str:
    """'DENSITY C' of 'C', 'ACR C', '3', '3.0', 'III' (BI-RADS before 2013 counts 1 to 4) or
    'heterogeneously dense'; '' where there is none."""
    text = value.strip().upper()
    for words, grade in DENSITY_WORDS.items():
        if re.match(words, text):
            return f"DENSITY {grade}"
    kind = r"(?:DENSITY|ACR|TYPE|GRADE|CATEGORY)?[\s:_-]*"
    found = re.fullmatch(kind + r"([A-D1-4]|I{1,3}|IV)(?:\.0)?", text)
    if not found:
        return ""
    return f"DENSITY {ROMAN.get(found[1], found[1].translate(str.maketrans('1234', 'ABCD')))}"


FLAGS = {
    **dict.fromkeys(("true", "yes", "y", "t", "present", "positive", "pos"), "1"),
    **dict.fromkeys(("false", "no", "n", "f", "absent", "negative", "neg"), "0"),
}


def flag(value: str) -> str:
    """'1', '0' or '' (unknown) of yes, no, nothing, or a count: two masses are a mass."""
    text = value.strip().lower()
    if re.fullmatch(r"\d+(\.0*)?", text):
        return "1" if float(text) else "0"
    return FLAGS.get(text, "")


def cancer(value: str) -> str:
    """'1', '0' or '' of malignant, benign or a flag."""
    text = value.strip().lower()
    words = {"malignant": "1", "benign": "0", "benign_without_callback": "0", "normal": "0"}
    if re.fullmatch(r"\d+(\.0*)?", text) and float(text) > 1:
        return ""  # a code, such as 1 benign and 2 malignant
    return words.get(text, "") or flag(value)


def abnormality(value: str) -> str:
    """mass, calcification or both; '' of anything else."""
    text = value.strip().lower()
    return text if text in ("mass", "calcification", "both") else ""


def person(value: str) -> str:
    """The patient; '' of what stands for none, such as nan, which would be one woman."""
    return "" if value.strip().lower() in UNSAID else value


def side(value: str) -> str:
    """L or R of L, LT, LEFT, 'left breast', R, RT, RIGHT; '' of anything else."""
    found = re.fullmatch(r"(?:(L)(?:T|EFT)?|(R)(?:T|IGHT)?)(?:\W*BREAST)?\.?", value.strip().upper())
    return (found[1] or found[2]) if found else ""


def finding(value: str) -> str:
    """mass or calcification; '' of anything else."""
    text = value.strip().lower()
    return "calcification" if text.startswith("calc") else "mass" if text.startswith("mass") else ""


POLARITIES = {
    **dict.fromkeys(("as_is", "normal", "monochrome2", "0", "0.0"), "as_is"),
    **dict.fromkeys(("inverted", "negative", "monochrome1", "1", "1.0"), "inverted"),
}


def polarity(value: str) -> str:
    """as_is (bright on dark) or inverted (a negative) of a word or of DICOM's; '' of anything else."""
    return POLARITIES.get(value.strip().lower(), "")


UNDERSTOOD: dict[Callable[[str], str], str] = {  # what a reader makes something of
    flag: "1, 0, yes, no, true, false, present, absent and counts are",
    cancer: "malignant, benign, normal, 1, 0, yes and no are",
    side: "L, R, lt, rt, left and right are",
    birads: "0 to 6, 4A to 4C and BI-RADS before them are",
    density: "A to D, 1 to 4, I to IV and BI-RADS' words are",
    finding: "mass and calcification are",
    abnormality: "mass, calcification and both are",
    polarity: "as_is, normal, MONOCHROME2, 0 and inverted, negative, MONOCHROME1, 1 are",
}


# Rows -----------------------------------------------------------------------------------------------


def united(values: Iterable[str]) -> str:
    """What several findings say of one image: 1 where any is, 0 where all are not, '' where one is not
    known, as a finding that is not known may be the one."""
    said = set(values)
    return "1" if "1" in said else "" if "" in said else "0"


def completed(table: pd.DataFrame, keys: list[str], notes: list[str]) -> pd.DataFrame:
    """The table with cells that are empty filled from the rows about the same, where all that say
    something say the same: a table of masses and one of calcifications complete each other."""
    said = table.where(table != "")
    groups = said.groupby(keys, sort=False)
    filled = table.copy()
    for name in table.columns.difference(keys):
        agreed = groups[name].transform("nunique") == 1
        filled[name] = table[name].where(~agreed, groups[name].transform("first"))
    unique = filled.drop_duplicates()
    if len(unique) < len(table):
        notes.append(f"{len(table) - len(unique)} rows complete others about the same: joined")
    return unique


def resolve(
    table: pd.DataFrame, keys: list[str], rule: str, names: dict[str, str], notes: list[str]
) -> pd.DataFrame:
    """One row for each value of `keys`. Identical rows are dropped; where rows disagree, `rule` says
    which counts: first, last or max (the more severe, column by column).

    `names` gives our columns' names in the user's table. Raises MammoError where the rule is refuse, or
    where max has to choose between values that have no order.
    """
    twice = table.duplicated(keys, keep=False)
    if not twice.any():
        return table
    unique = completed(table.drop_duplicates(), keys, notes)
    groups = unique[unique.duplicated(keys, keep=False)].groupby(keys, sort=False)
    if not groups.ngroups:
        return unique
    for key, rows in groups:
        differing = [name for name in rows if rows[name].nunique() > 1]
        fixed = [name for name in differing if name not in SEVERITY]
        if rule == "refuse" or (rule == "max" and fixed):
            shown = "; ".join(
                f"{names.get(name, name)}: " + " and ".join(dict.fromkeys(map(repr, rows[name])))
                for name in (fixed if rule == "max" else differing)[:3]
            )
            more = f", and so do {groups.ngroups - 1} others" if groups.ngroups > 1 else ""
            remedy = "correct them, or choose with --on_conflict first, last or max (the more severe)"
            raise MammoError(
                f"rows about {'/'.join(key)} disagree ({some(rows.index)}){more}: {shown}; "
                + (remedy if rule == "refuse" else "max cannot tell which is right; correct them")
            )
    notes.append(f"{groups.ngroups} have rows that disagree; --on_conflict {rule} chose")
    if rule == "max":
        severe = [name for name in SEVERITY if name in unique]
        groups = [unique[key] for key in keys]
        worst = {name: unique[name].groupby(groups).transform("max") for name in severe}
        if "breast_birads" in worst:
            worst["breast_birads"] = worst_birads(unique["breast_birads"], groups)
        unique = unique.assign(**worst)
    return unique.drop_duplicates(keys, keep="last" if rule == "last" else "first")
