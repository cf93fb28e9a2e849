"""Archives of digitised film whose truth stands in no CSV: MIAS' Info.txt, DDSM's .ics and .OVERLAY."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from byol_mammo.settings import MammoError
from byol_mammo.tables import ImageLabels, Reading, some, united

# MIAS -----------------------------------------------------------------------------------------------
# Suckling et al., 1994. A line per abnormality: film, tissue, class, severity, and where it is.

MIAS_COLUMNS = ["REFNUM", "BG", "CLASS", "SEVERITY", "X", "Y", "RADIUS"]
MIAS_FILM = re.compile(r"mdb(\d{3})(?:([lr])[smlx])?", re.IGNORECASE)  # mini-MIAS has no letters
MIAS_FINDINGS = {  # "well-defined", "spiculated" and "other, ill-defined masses" are masses
    **dict.fromkeys(("CIRC", "SPIC", "MISC"), "mass"),
    "CALC": "calcification",
    "ARCH": "architectural_distortion",
    "ASYM": "asymmetry",
}
MIAS_SIDE, MIAS_SPACING = 1024, "0.2"  # px and mm of mini-MIAS: 0.05 mm reduced by 4, cut and padded
MIAS_FILM_SPACING = "0.05"  # mm, of the films as they were digitised
SNIFFED = 64  # lines of a text among which the first film is sought


def read_mias(path: Path) -> pd.DataFrame | None:
    """MIAS' list of films as MIAS_COLUMNS of text, indexed by 'NAME line N'; None for any other file.

    Raises MammoError for a line that is none of the list's.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        start = [line for _, line in zip(range(SNIFFED), file, strict=False)]
        if not any(MIAS_FILM.fullmatch((line.split() or [""])[0]) for line in start):
            return None
        lines = [*start, *file]
    rows, places, film = [], [], []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and MIAS_FILM.fullmatch(words[0]):
            film = [words[0], words.pop(1) if words[1:2] and words[1] in "FGD" else ""]
            words = words[1:]
        elif not (film and words[:1] and words[0] in MIAS_FINDINGS and words[1:2] in (["B"], ["M"])):
            continue  # the legend; the original list goes on with another abnormality of the same film
        rows.append([*film, *mias_abnormality(words, f"{path.name} line {number}")])
        places.append(f"{path.name} line {number}")
    return pd.DataFrame(rows, columns=MIAS_COLUMNS, index=places)


def mias_abnormality(words: list[str], line: str) -> list[str]:
    """Class, severity, x, y and radius of the words behind a film, '' where the list leaves them out, as
    of widely spread calcifications. Raises MammoError."""
    found = re.fullmatch(r"(\S+)(?: ([BM]))?(?: (\d+) (\d+) (\d+)| \*.*)?", " ".join(words))
    if not found:
        raise MammoError(
            f"{line}: {' '.join(words)[:60]!r} is no entry of MIAS' list, which has lines such as "
            "'mdb001 G CIRC B 535 425 197'"
        )
    return [word or "" for word in found.groups()]


def adapt_mias(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """MIAS Info.txt: <film>.pgm anywhere. Two films that follow each other are of one woman, all MLO.

    Odd numbers are left breasts, as the original names them (mdb001lm, mdb002rl). The list names every
    abnormality: what it does not name of a film is not there. Boxes are mini-MIAS', whose y counts from
    below; those of the original films, which are stored lying, are unknown.
    """
    films = raw["REFNUM"].str.lower().str.removesuffix(".pgm")
    parts = films.str.extract(f"^{MIAS_FILM.pattern}$")
    for column, wrong in (
        ("REFNUM", parts[0].isna()),
        ("CLASS", ~raw["CLASS"].isin([*MIAS_FINDINGS, "NORM"])),
        ("SEVERITY", ~raw["SEVERITY"].isin(["B", "M", ""])),
    ):
        if wrong.any():
            line, value = raw.index[wrong][0], raw.loc[wrong, column].iloc[0]
            raise MammoError(f"{line}: {column} {value!r} is none of MIAS', {wrong.sum()} such rows")
    number, bare = parts[0].astype(int), parts[1].isna()
    side = parts[1].fillna(number.mod(2).map({1: "l", 0: "r"}))
    pair = (number + 1) // 2
    woman = pair.map(lambda n: f"mdb{2 * n - 1:03d}-{2 * n:03d}")
    table = pd.DataFrame(
        {
            "study_id": woman,
            "patient_id": woman,
            "image_id": films,
            "laterality": side.str.upper(),
            "view_position": "MLO",
            "height": bare.map({True: str(MIAS_SIDE), False: ""}),
            "width": bare.map({True: str(MIAS_SIDE), False: ""}),
            "spacing_mm": bare.map({True: MIAS_SPACING, False: MIAS_FILM_SPACING}),
            "places": films + "\nname " + films,
        }
    )
    if bare.any():
        reading.notes.append(
            "sides by the films' numbers, odd ones left, as MIAS' original names have it (mdb001lm, "
            "mdb002rl); the text beside mini-MIAS says the opposite"
        )
    nowhere = []
    for film, rows in raw.assign(bare=bare).groupby(films):
        labels, missing = mias_labels(rows)
        reading.labels[woman[rows.index[0]], str(film)] = labels
        nowhere += [f"{film} ({name})" for name in missing]
    if nowhere:
        reading.notes.append(f"{len(nowhere)} findings have no place, so no boxes: {some(nowhere)}")
    return table[~films.duplicated()]


def mias_labels(rows: pd.DataFrame) -> tuple[ImageLabels, list[str]]:
    """Labels of a film, of its rows, and its findings of which one has no place: these get no box."""
    kinds = rows["CLASS"].map(MIAS_FINDINGS)
    severity = rows["SEVERITY"].map({"M": "1", "B": "0", "": ""})
    values = {name: str(int((kinds == name).any())) for name in dict.fromkeys(MIAS_FINDINGS.values())}
    values["cancer"] = united(severity.where(rows["CLASS"] != "NORM", "0"))
    if not rows["bare"].all():
        return ImageLabels(values), []
    numbers = rows[["X", "Y", "RADIUS"]].apply(pd.to_numeric, errors="coerce")
    nowhere = sorted(kinds[numbers.isna().any(axis=1)].dropna().unique())
    boxes = []
    for name, (x, y, radius) in zip(kinds, numbers.to_numpy(), strict=True):
        if name in MIAS_FINDINGS.values() and name not in nowhere:
            corners = {"xmin": x - radius, "ymin": MIAS_SIDE - y - radius}
            corners |= {"xmax": x + radius, "ymax": MIAS_SIDE - y + radius}
            boxes.append({"finding": [name], **{key: float(value) for key, value in corners.items()}})
    return ImageLabels(values, boxes, (MIAS_SIDE, MIAS_SIDE)), nowhere
