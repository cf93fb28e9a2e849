"""Archives of digitised film whose truth stands in no CSV: MIAS' Info.txt, DDSM's .ics and .OVERLAY."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from byol_mammo.archive_files import EVERY_FILE, Index
from byol_mammo.settings import MammoError
from byol_mammo.tables import ImageLabels, Reading, birads, density, some, united, worst_birads

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
    woman = number.map(mias_woman)
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
    places = {name: pd.to_numeric(raw[name], errors="coerce") for name in ("X", "Y", "RADIUS")}
    for film, rows in raw.assign(bare=bare, **places).groupby(films):
        labels, missing = mias_labels(rows)
        reading.labels[woman[rows.index[0]], str(film)] = labels
        nowhere += [f"{film} ({name})" for name in missing]
    if nowhere:
        reading.notes.append(f"{len(nowhere)} findings have no place, so no boxes: {some(nowhere)}")
    return table[~films.duplicated()]


def mias_woman(number: int) -> str:
    """Whose a film is, of the two that follow each other."""
    left = number - (number + 1) % 2
    return f"mdb{left:03d}-{left + 1:03d}"


def mias_labels(rows: pd.DataFrame) -> tuple[ImageLabels, list[str]]:
    """Labels of a film, of its rows, and its findings of which one has no place: these get no box."""
    kinds = rows["CLASS"].map(MIAS_FINDINGS)
    severity = rows["SEVERITY"].map({"M": "1", "B": "0", "": ""})
    values = {name: str(int((kinds == name).any())) for name in dict.fromkeys(MIAS_FINDINGS.values())}
    values["cancer"] = united(severity.where(rows["CLASS"] != "NORM", "0"))
    if not rows["bare"].all():
        return ImageLabels(values), []
    numbers = rows[["X", "Y", "RADIUS"]]
    nowhere = sorted(kinds[numbers.isna().any(axis=1)].dropna().unique())
    boxes = []
    for name, (x, y, radius) in zip(kinds, numbers.to_numpy(), strict=True):
        if name in MIAS_FINDINGS.values() and name not in nowhere:
            corners = {"xmin": x - radius, "ymin": MIAS_SIDE - y - radius}
            corners |= {"xmax": x + radius, "ymax": MIAS_SIDE - y + radius}
            boxes.append({"finding": [name], **{key: float(value) for key, value in corners.items()}})
    return ImageLabels(values, boxes, (MIAS_SIDE, MIAS_SIDE)), nowhere


# DDSM -----------------------------------------------------------------------------------------------
# Heath et al., 2001, and the description of a case beside the database. A case is a folder: its .ics has
# a line for each film, with size, resolution and whether there is an overlay; C_0029_1.LEFT_CC.OVERLAY
# holds a film's abnormalities and their outlines as chain codes. Normal cases have no overlay.

DDSM_CASE = re.compile(r"[A-D]-\d{4}-\d\.ics", re.IGNORECASE)
DDSM_NAME = re.compile(r"([A-D])_(\d{4})_\d\.(?:LEFT|RIGHT)_(?:CC|MLO)(?:\.LJPEG.*)?", re.IGNORECASE)
DDSM_COLUMNS = ["case", "film", "LINES", "PIXELS_PER_LINE", "RESOLUTION", "DENSITY", "OVERLAY"]
DDSM_COLUMNS += ["LESION_TYPE", "ASSESSMENT", "PATHOLOGY", "BOUNDARY", "problem"]
DDSM_FILM = re.compile(
    r"(?P<film>(?:LEFT|RIGHT)_(?:CC|MLO)) LINES (?P<LINES>[1-9]\d{0,5})"
    r" PIXELS_PER_LINE (?P<PIXELS_PER_LINE>[1-9]\d{0,5})"
    r" BITS_PER_PIXEL \d+ RESOLUTION (?P<RESOLUTION>\d+(?:\.\d+)?) (?P<OVERLAY>(?:NON_)?OVERLAY)"
)
DDSM_LESIONS = {"MASS": "mass", "CALCIFICATION": "calcification"}
DDSM_PATHOLOGY = {"MALIGNANT": "1", "BENIGN": "0", "BENIGN_WITHOUT_CALLBACK": "0"}  # UNPROVEN: unknown
# Steps of a chain code, 0 to 7: up, then clockwise.
STEPS = np.array([(0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1)])


def read_ddsm(root: Path, index: Index) -> pd.DataFrame | None:
    """DDSM's cases below a folder as DDSM_COLUMNS of text, a row for each abnormality and for each film
    without one, indexed by 'FILE line N'; None where there is none. What is wrong with an overlay, or
    that it is not there, stands in `problem`.

    Raises MammoError where no film of the cases is understood, or OSError.
    """
    paths = {name.rpartition("/")[2].upper(): name for name in index[EVERY_FILE]}
    cases = [name for name in index[EVERY_FILE] if DDSM_CASE.fullmatch(name.rpartition("/")[2])]
    rows, places = [], []
    for name in cases:
        lines = (root / name).read_text(encoding="utf-8", errors="replace").splitlines()
        words = [" ".join(line.split()) for line in lines]
        tissue = next((line[-1] for line in words if re.fullmatch(r"DENSITY [1-4]", line)), "")
        for number, line in enumerate(words, 1):
            if film := DDSM_FILM.fullmatch(line):
                case = name.rpartition("/")[2].rpartition(".")[0].upper()
                overlay = paths.get(f"{case.replace('-', '_')}.{film['film']}.OVERLAY")
                found = read_overlay(root / overlay if overlay else None, film["OVERLAY"] == "OVERLAY")
                known = dict.fromkeys(DDSM_COLUMNS, "") | film.groupdict()
                known |= {"case": case, "DENSITY": tissue}
                rows += [{**known, **row} for row in found]
                places += [f"{name} line {number}"] * len(found)
    if cases and not rows:
        raise MammoError(f"{cases[0]}: no line such as LEFT_CC LINES ... OVERLAY; is it DDSM's?")
    table = pd.DataFrame(rows, columns=DDSM_COLUMNS, index=places)
    return table.drop_duplicates(["case", "film", "LESION_TYPE", "BOUNDARY"]) if cases else None


def read_overlay(path: Path | None, expected: bool) -> list[dict[str, str]]:
    """The abnormalities of an overlay, of which the case says whether it is `expected`."""
    if not expected:
        return [{"problem": "the case knows nothing of this overlay"} if path else {}]
    if path is None:
        return [{"problem": "the overlay is missing"}]
    rows: list[dict[str, str]] = []
    lines = [
        line.split()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    count = next((" ".join(words[1:2]) for words in lines if words[0] == "TOTAL_ABNORMALITIES"), "")
    for place, words in enumerate(lines):
        if words[0] == "ABNORMALITY":
            rows.append({})
        elif rows and words[0] == "LESION_TYPE":  # an abnormality may have two
            rows[-1][words[0]] = " ".join(filter(None, (rows[-1].get(words[0]), *words[1:2])))
        elif rows and words[0] in ("ASSESSMENT", "PATHOLOGY"):
            rows[-1][words[0]] = " ".join(words[1:2])
        elif (
            rows and words[0] == "BOUNDARY" and place + 1 < len(lines)
        ):  # what follows CORE is inside it
            rows[-1][words[0]] = " ".join(map(str, around(lines[place + 1])))
    if str(len(rows)) != count or not all(row.get("LESION_TYPE") for row in rows):
        return [{"problem": f"the overlay has {len(rows)} whole abnormalities of {count or '?'}"}]
    return rows


def around(chain: list[str]) -> list[int]:
    """xmin, ymin, xmax, ymax (px) of an outline: column, row, steps, '#'; [] where it is none."""
    if not re.fullmatch(r"\d{1,6} \d{1,6}( [0-7])+ #", " ".join(chain), re.ASCII):
        return []
    numbers = np.array(chain[:-1], int)
    points = np.cumsum([numbers[:2], *STEPS[numbers[2:]]], axis=0)
    return [*points.min(axis=0).tolist(), *(points.max(axis=0) + 1).tolist()]


def adapt_ddsm(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """DDSM: C_0029_1.LEFT_CC.png, or .LJPEG.png and such, anywhere. A case is a visit of one woman.

    A film without overlay has no finding, unless one is marked in the other film of that breast: then
    nothing is known of it, as of films whose overlay is missing or damaged.
    """
    base = raw["case"].str.replace("-", "_") + "." + raw["film"]
    side = raw["film"].str[0]
    images = set(reading.index.get("all", []))
    table = pd.DataFrame(
        {
            "study_id": raw["case"],
            "patient_id": raw["case"].str.rpartition("-")[0],
            "image_id": raw["film"],
            "laterality": side,
            "view_position": raw["film"].str.partition("_")[2],
            "breast_density": reading.column(raw, "DENSITY", density),
            "height": raw["LINES"],
            "width": raw["PIXELS_PER_LINE"],
            "spacing_mm": raw["RESOLUTION"].map(lambda microns: f"{float(microns) / 1000:g}"),
            "places": base.map(lambda name: ddsm_places(name, reading.index, images)),
        }
    )
    breast = raw["case"] + side
    films, marked = raw.groupby(["case", "film"], sort=False), set(breast[raw["OVERLAY"] == "OVERLAY"])
    nowhere = []
    for (case, film), rows in films:
        entry, missing = ddsm_labels(rows, f"{case}{str(film)[0]}" in marked)
        reading.labels[str(case), str(film)] = entry
        nowhere += [f"{case} {film} ({name})" for name in missing]
    if nowhere:
        reading.notes.append(
            f"{len(nowhere)} findings have no whole outline, so no boxes: {some(nowhere)}"
        )
    if (troubled := base[raw["problem"] != ""]).size:
        told = some(f"{name} ({raw['problem'][line]})" for line, name in troubled.items())
        reading.notes.append(f"{troubled.size} films of which nothing is known: {told}")
    worst = worst_birads(raw["ASSESSMENT"].map(birads), [raw["case"], raw["film"]])
    return table.assign(breast_birads=worst)[~base.duplicated()]


def ddsm_places(base: str, index: Index, images: set[str]) -> str:
    """Where to look for a film, first where there is an image and not the .LJPEG alone."""
    places = [f"name {base}{ending}" for ending in ("", ".LJPEG", ".LJPEG.1", ".LJPEG.1-ddsmraw2pnm")]
    places.sort(key=lambda place: images.isdisjoint(index.get(place, [])))
    return "\n".join(places)


def ddsm_labels(rows: pd.DataFrame, marked: bool) -> tuple[ImageLabels, list[str]]:
    """Labels of a film, of its rows, and its findings of which one has no outline: these get no box.

    `marked`: its breast has an overlay, of this film or of the other.
    """
    overlaid = (rows["OVERLAY"] == "OVERLAY").all()
    if (rows["problem"] != "").any() or (marked and not overlaid):
        return ImageLabels(), []
    if not overlaid:
        return ImageLabels(dict.fromkeys([*DDSM_LESIONS.values(), "cancer"], "0"), []), []
    kinds = [
        [DDSM_LESIONS.get(kind, kind.lower()) for kind in cell.split()] for cell in rows["LESION_TYPE"]
    ]
    every = {name for names in kinds for name in names}
    values = {name: str(int(name in every)) for name in DDSM_LESIONS.values()}
    values["cancer"] = united(rows["PATHOLOGY"].map(DDSM_PATHOLOGY).fillna(""))
    nowhere = {
        name for names, text in zip(kinds, rows["BOUNDARY"], strict=True) if not text for name in names
    }
    boxes = []
    for names, text in zip(kinds, rows["BOUNDARY"], strict=True):
        if text and not nowhere.intersection(names):
            corners = zip(("xmin", "ymin", "xmax", "ymax"), map(float, text.split()), strict=True)
            boxes.append({"finding": names, **dict(corners)})
    size = float(rows["LINES"].iloc[0]), float(rows["PIXELS_PER_LINE"].iloc[0])
    return ImageLabels(values, boxes, size), sorted(nowhere)


def woman_of_film(name: str) -> str:
    """Whose film it is by a name of MIAS or DDSM, without suffix; '' of any other name."""
    if found := DDSM_NAME.fullmatch(name):
        return f"{found[1]}-{found[2]}".upper()
    found = MIAS_FILM.fullmatch(name)
    return mias_woman(int(found[1])) if found else ""
