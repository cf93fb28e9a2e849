"""Archives' published tables, read in our columns: one function per archive, and the list of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from byol_mammo.acquisition import COLUMNS
from byol_mammo.archive_files import without_suffix
from byol_mammo.digital_archives import (
    CDD_HEADER,
    CDD_NAME,
    CDD_SUBTRACTED,
    EMBED_HEADER,
    EMBED_READ,
    adapt_cdd,
    adapt_embed,
)
from byol_mammo.film_archives import DDSM_COLUMNS, MIAS_COLUMNS, adapt_ddsm, adapt_mias, woman_of_film
from byol_mammo.labels import split_named
from byol_mammo.settings import MammoError
from byol_mammo.tables import (
    FINDINGS,
    MAX_ID_LENGTH,
    OPTIONAL,
    REQUIRED,
    ImageLabels,
    Reading,
    abnormality,
    birads,
    cancer,
    clean_path,
    density,
    finding,
    flag,
    person,
    places_of,
    polarity,
    resolve,
    safe_name,
    side,
    some,
    worst_birads,
)

FEW_FOLDERS = 20  # top folders without a digit in their names, and
MANY_IMAGES = 16  # images in each on average: more than four visits of a woman; classes, not patients
TOO_MANY_IMAGES = 60  # on average, whatever the names: 15 visits of four views

# Archives -------------------------------------------------------------------------------------------
# From a table as published to our columns. `places` says where to look for the file, best first, one
# a line, as keys of the Index.


@dataclass(frozen=True)
class Adapter:
    """How one archive is read."""

    name: str
    header: tuple[str, ...]  # columns that tell it, and that it cannot do without
    adapt: Callable[[pd.DataFrame, Reading], pd.DataFrame]
    columns: dict[str, str] = field(default_factory=dict)  # ours -> the table's, for messages
    labels: tuple[str, ...] = ()  # findings that it tells
    ignored: str = r"(?!)"  # files (relative paths) that are no mammograms; this matches none
    reads: frozenset[str] = frozenset()  # columns that are read, where a table has many more


def adapt_vindr(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """VinDr-Mammo breast-level_annotations.csv: <study_id>/<image_id>.png or .dicom."""
    table = raw[[name for name in [*REQUIRED, *OPTIONAL, "patient_id"] if name in raw]].copy()
    readers = {"laterality": side, "breast_birads": birads, "breast_density": density}
    readers["patient_id"] = person
    for name in table.columns.intersection(list(readers)):
        table[name] = reading.column(table, name, readers[name])
    return table.assign(places=table["study_id"] + "/" + table["image_id"])


def adapt_cbis(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """CBIS-DDSM {mass,calc}_case_description_{train,test}_set.csv: one row per abnormality.

    'image file path' is Mass-Training_P_00001_LEFT_CC/<study uid>/<series uid>/000000.dcm. Downloads
    keep only its first folder (NBIA retriever) or its series uid (Kaggle's JPEG copy). Masses and
    calcifications of one film come as two files: what the other list would say is unknown (''). A film
    with several abnormalities has one row here, of the most severe.
    """
    density_column = raw.get("breast_density", pd.Series("", raw.index))
    raw = raw.assign(density=density_column.where(density_column != "", raw.get("breast density", "")))
    place = raw["image file path"].map(lambda name: name.strip(' "\r\n').removesuffix(".dcm"))
    top = place.str.split("/").str[0]
    wrong = place[~top.str.match(r"(?:Mass|Calc)-(?:Training|Test)_")]
    if len(wrong):
        raise MammoError(
            f"{wrong.index[0]}: image file path {wrong.iloc[0][:MAX_ID_LENGTH]!r} does not begin with "
            "Mass-Training_, Mass-Test_, Calc-Training_ or Calc-Test_, which tells the split; "
            f"{len(wrong)} such rows"
        )
    kind, kinds = top.str.split("-").str[0], reading.column(raw, "abnormality type", finding)
    film = kind + "_" + raw["left or right breast"] + "_" + raw["image view"]
    series = place.str.split("/").map(lambda parts: f"\nfolder {parts[2]}" if len(parts) > 2 else "")
    table = pd.DataFrame(
        {
            "study_id": raw["patient_id"],
            "patient_id": raw["patient_id"],
            "image_id": film.map(safe_name),
            "split": top.str.contains("-Training_").map({True: "training", False: "test"}),
            "laterality": reading.column(raw, "left or right breast", side),
            "view_position": raw["image view"].str.upper(),
            "breast_birads": reading.column(raw, "assessment", birads),
            "breast_density": reading.column(raw, "density", density),
            "mass": (kinds == "mass").map({True: "1", False: ""}),
            "calcification": (kinds == "calcification").map({True: "1", False: ""}),
            "cancer": reading.column(raw, "pathology", cancer),
            "places": place + "\nfolder " + top + series,
        }
    )
    return join_abnormalities(table, reading.notes)


def join_abnormalities(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """One row per film of a table with one per abnormality: the most severe grade and findings.

    A breast has one density: where rows differ, the last counts.
    """
    films = table.groupby(["study_id", "image_id"], sort=False)
    several = films.size() > 1
    if several.any():
        opposite = int((films["cancer"].agg(lambda values: {"0", "1"} <= set(values))).sum())
        notes.append(
            f"{several.sum()} films have rows of several abnormalities, {opposite} of them benign and "
            "malignant ones: the image's label is the most severe"
        )
    if (unlike := int((films["breast_density"].nunique() > 1).sum())) > 0:
        notes.append(f"{unlike} films have rows of different density: the last counts")
    density_last = films["breast_density"].transform("last")
    severe = {name: films[name].transform("max") for name in FINDINGS}
    severe["breast_birads"] = worst_birads(
        table["breast_birads"], [table["study_id"], table["image_id"]]
    )
    table = table.assign(**severe, breast_density=density_last)
    return table[~table.duplicated(["study_id", "image_id"])]


INBREAST_FILE = re.compile(r"\d{8}_([0-9a-f]{16})_MG_[LR]_\w+_ANON")
INBREAST_BARE = re.compile(r"[235]\d{7}")  # its image numbers, which tell nothing about the woman


def adapt_inbreast(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """INbreast.csv, one row per image: AllDICOMs/<File Name>_<patient>_MG_<side>_<view>_ANON.dcm.

    The table's 'Patient ID' is removed; the file's name has a pseudonym. A table saved from the
    spreadsheet ends in rows of totals, without a file.
    """
    names = raw["File Name"].str.replace(r"\.0$", "", regex=True)
    total = ~names.str.fullmatch(r"\d+")
    if total.any():
        reading.notes.append(f"{total.sum()} rows without a number as File Name left out: totals")
    raw, names = raw[~total], names[~total]
    listed = raw.get("Patient ID", pd.Series("", raw.index)).replace("removed", "")
    person = []
    for name, stated in zip(names, listed, strict=True):
        found = reading.index.get(f"first {name}", [])  # annotations (.xml, .roi) have no pseudonym
        parts = max((Path(file).stem.split("_") for file in found), key=len, default=[name])
        known = stated or (parts[1] if len(parts) > 1 else "")
        person.append(known if found else known or name)
    if (unknown := person.count("")) > 0:
        reading.nameless = (
            f"{unknown} files are named by INbreast's image number alone, and the table's Patient ID is "
            "removed, so that nothing tells which are of one woman; give the files as published "
            "(<number>_<patient>_MG_...), or a table with --columns image=...,study=...,patient=..."
        )
    return pd.DataFrame(
        {
            "study_id": [known or name for known, name in zip(person, names, strict=True)],
            "patient_id": person,
            "image_id": names,
            "laterality": reading.column(raw, "Laterality", side),
            "view_position": raw["View"].str.upper(),
            "breast_birads": reading.column(raw, "Bi-Rads", birads),
            "breast_density": reading.column(raw, "ACR", density),
            "places": "first " + names,
        },
        index=raw.index,
    )


def adapt_cmmd(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """CMMD_clinicaldata_revision (saved as CSV): one row per breast, files anywhere below <ID1>/.

    Which file is which breast and view stands only in the DICOM headers: the rows are the files, the
    labels wait for the side.
    """
    kind = reading.column(raw, "abnormality", abnormality)
    breasts = pd.DataFrame({"study_id": raw["ID1"], "side": reading.column(raw, "LeftRight", side)})
    for name in ("mass", "calcification"):
        breasts[name] = kind.isin([name, "both"]).map({True: "1", False: "0"}).where(kind != "", "")
    breasts["cancer"] = reading.column(raw, "classification", cancer)
    names = {"study_id": "ID1", "cancer": "classification"}
    breasts = resolve(breasts, ["study_id", "side"], reading.on_conflict, names, reading.notes)
    for row in breasts.to_dict("records"):
        values = {name: row[name] for name in FINDINGS}
        reading.labels[row["study_id"], f"side {row['side']}"] = ImageLabels(values)
    rows, lines = [], []
    for line, patient in raw["ID1"].drop_duplicates().items():
        found = reading.index.get(f"folder {patient}", [])
        stems = Counter(Path(name).stem for name in found)
        for name in found or [f"{patient}/no_file"]:
            place = without_suffix(name)
            below = place.partition(f"{patient}/")[2]
            image = Path(name).stem if stems[Path(name).stem] < 2 else below
            rows.append({"study_id": patient, "image_id": safe_name(image), "places": place})
            lines.append(line)
    table = pd.DataFrame(rows, index=lines)
    return table.assign(patient_id=table["study_id"])


def adapt_rsna(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """RSNA 2022 train.csv: train_images/<patient_id>/<image_id>.dcm, or <patient_id>_<image_id>.png."""
    patient, image = raw["patient_id"], raw["image_id"]
    return pd.DataFrame(
        {
            "study_id": patient,
            "patient_id": patient,
            "image_id": image,
            "laterality": reading.column(raw, "laterality", side),
            "view_position": raw["view"].str.upper(),
            "breast_birads": reading.column(raw, "BIRADS", birads),
            "breast_density": reading.column(raw, "density", density),
            "implant": reading.column(raw, "implant", flag),
            "cancer": reading.column(raw, "cancer", flag),
            "places": patient + "/" + image + "\nname " + patient + "_" + image + "\nname " + image,
        }
    )


CLASS_WORDS = {
    *("benign", "malignant", "normal", "abnormal", "cancer", "noncancer", "healthy", "control"),
    *("positive", "negative", "mass", "masses", "calc", "calcification", "lesion"),
    *("mask", "roi", "crop"),
    *("dev", "eval", "holdout", "left", "right", "cc", "mlo", "lcc", "lmlo", "rcc", "rmlo"),
}
GRADE = re.compile(
    r"(?:bi-?rads|acr|density|class|label|grade|category)?[\W_]*[0-6][abc]?", re.IGNORECASE
)


def is_class(name: str) -> bool:
    """Whether a folder is named as a kind of images: benign, Masses, RMLO; normal_0001 is a patient."""
    word = re.sub("[^a-z]", "", name.lower())
    return not re.search(r"\d", name) and bool({word, word.removesuffix("s")} & CLASS_WORDS)


def woman_named(place: str) -> str:
    """The patient that an image's name tells where it is named as INbreast, CDD-CESM, DDSM and MIAS name
    theirs, '' where it is not."""
    name = place.rpartition("/")[2]
    if found := INBREAST_FILE.search(name):
        return found[1]
    if found := CDD_NAME.fullmatch(name):
        return f"P{found['patient']}"
    return woman_of_film(name)


def adapt_folder(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """No table: each image below the folder. The first folder's name is study and patient, below folders
    that are named as splits."""
    places = list(dict.fromkeys(map(without_suffix, reading.index.get("all", []))))
    if not places:
        raise MammoError("there is no image below --images_root")
    if not reading.patient_pattern:
        check_no_cbis(places)
    split_of = splits_of_folders(places, reading.notes)
    below = {place: place.partition("/")[2] if split_of else place for place in places}
    if not reading.patient_pattern:
        check_folders_are_patients(list(below.values()), "'^[^/]+/([^/]+)'" if split_of else "'^[^/]+'")
    rows = []
    for place in places:
        study, _, image = below[place].partition("/")
        woman = safe_name(reading.patient_in(place, study if image else place))
        patient = woman if reading.patient_pattern else woman_named(place) or woman
        values = {"study_id": woman, "patient_id": patient, "image_id": safe_name(image or study)}
        rows.append({**values, "places": place} | ({"split": split_of[place]} if split_of else {}))
    # Names of which no letter is safe, such as two in Chinese, would be one.
    names = Counter(f"{row['study_id']}_{row['image_id']}".lower() for row in rows)
    for row in rows:
        if names[f"{row['study_id']}_{row['image_id']}".lower()] > 1:
            digest = hashlib.sha256(os.fsencode(row["places"])).hexdigest()[:8]
            row["image_id"] = f"{row['image_id'][:80]}_{digest}"
    note_single_images(below, reading)
    women = list(dict.fromkeys(path.partition("/")[0] for path in below.values() if "/" in path))
    if women and not reading.patient_pattern:
        reading.notes.append(f"a folder counts as a patient: {some(women)}")
    return pd.DataFrame(rows, index=[f"file {place}" for place in places])


CBIS_FOLDER = re.compile(r"\b(?:Mass|Calc)-(?:Training|Test)_P_\d+_(?:LEFT|RIGHT)_[^/]*")


def check_no_cbis(places: Sequence[str]) -> None:
    """Refuse CBIS-DDSM without its tables: a woman has several folders there, some of both splits, and
    crops and masks lie among the films."""
    found = next(filter(None, map(CBIS_FOLDER.search, places)), None)
    if found:
        raise MammoError(
            f"folders such as {found[0]} are CBIS-DDSM's, where one woman has several, in training and "
            "in test; give its tables by --csv_path mass_case_description_*.csv "
            "calc_case_description_*.csv, or name the woman by --patient_pattern '(P_[0-9]+)'"
        )


def splits_of_folders(places: Sequence[str], notes: list[str]) -> dict[str, str]:
    """The split of each path where all top folders are named as splits (train, test, val ...), else {}.

    Raises MammoError where only some are, or where such folders lie deeper.
    """
    tops = {place.partition("/")[0] if "/" in place else "" for place in places}
    named = {top for top in tops if split_named(top)}
    if named and named != tops:
        others = some(sorted(tops - named) if tops - named != {""} else ["images outside them"])
        raise MammoError(
            f"the folders {some(sorted(named))} are named as splits, beside them {others}: give folders "
            "of one kind, or a table with --csv_path"
        )
    second = {place.split("/")[1] for place in places if place.count("/") > 1}
    deeper = sorted(name for name in second if split_named(name))
    if not named and deeper:
        raise MammoError(
            f"folders named as splits ({some(deeper)}) lie below {some(sorted(tops))}, which would "
            "count as patients; give the folder above the splits as --images_root, or a table with "
            "--csv_path"
        )
    if not named:
        return {}
    found = {place: split_named(place.partition("/")[0]) for place in places}
    counts = Counter(found.values())
    notes.append(
        f"the folders {some(sorted(named))} are taken as splits: "
        + ", ".join(f"{name} {counts[name]} images" for name in sorted(counts))
    )
    return found


def check_folders_are_patients(paths: Sequence[str], pattern: str) -> None:
    """Refuse top folders that look like classes: benign/, malignant/ ... would count as two women.

    `pattern` finds these folders, where they are patients after all.
    """
    folders = Counter(path.partition("/")[0] for path in paths if "/" in path)
    if not folders:
        return
    mean = sum(folders.values()) / len(folders)
    named, graded = any(map(is_class, folders)), all(map(GRADE.fullmatch, folders))
    few = len(folders) <= FEW_FOLDERS and (graded or not any(re.search(r"\d", name) for name in folders))
    if named or (few and mean > MANY_IMAGES) or mean > TOO_MANY_IMAGES:
        shown = some(f"{name} ({n} images)" for name, n in folders.most_common())
        raise MammoError(
            f"the folders {shown} look like classes or sets, not like patients, and images of one woman "
            "may lie in several; say who is who by --patient_pattern 'REGEX', which is "
            f"{pattern} where each is a patient, by a table (--csv_path, --columns image=...,study=...,"
            "patient=...), or give one folder of patients as --images_root"
        )


def note_single_images(below: dict[str, str], reading: Reading) -> None:
    """Say that images in no folder count as women of their own; INbreast's are known not to be."""
    alone = [path for path in below.values() if "/" not in path and not woman_named(path)]
    if reading.patient_pattern:
        return
    remedy = "tell the patient by --patient_pattern 'REGEX', or by a table with --columns patient=..."
    names = [path.rpartition("/")[2] for path in below.values()]
    if all(map(INBREAST_BARE.fullmatch, names)):
        reading.nameless = (
            f"{len(names)} files are named by eight digits alone, as INbreast's are, whose 410 images "
            f"are of 108 women; {remedy} ('[^/]+$' where each image is of another woman)"
        )
    if not alone:
        return
    reading.notes.append(
        f"{len(alone)} images lie in no folder of their own: each counts as a patient, and images of "
        f"one woman may fall on both sides of the split; {remedy}"
    )


# --columns: our name -> column of the table it fills, and how its values are read.
GENERIC: dict[str, tuple[str, Callable[[str], str]]] = {
    "image": ("", str),
    "study": ("study_id", safe_name),
    "patient": ("patient_id", person),
    "split": ("split", str),
    "laterality": ("laterality", side),
    "view": ("view_position", str.upper),
    "birads": ("breast_birads", birads),
    "density": ("breast_density", density),
    "implant": ("implant", flag),
    "spacing": ("spacing_mm", str),
    "polarity": ("polarity", polarity),
    "height": ("height", str),
    "width": ("width", str),
    "mass": ("mass", flag),
    "calcification": ("calcification", flag),
    "cancer": ("cancer", cancer),
    **{name: (name, str) for name in (*COLUMNS, "archive")},  # read by acquisition.of_table
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

    def adapt(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
        paths = raw[names["image"]].map(clean_path)
        table = pd.DataFrame({"image_id": paths.map(safe_name), "places": paths.map(places_of)})
        for ours, theirs in names.items():
            column, reader = GENERIC[ours]
            if column:
                table[column] = reading.column(raw, theirs, reader)
        return table

    ours = {GENERIC[name][0] or "image_id": theirs for name, theirs in names.items()}
    findings = tuple(name for name in names if name in FINDINGS)
    return Adapter("the columns given", tuple(names.values()), adapt, ours, findings)


VINDR = Adapter("VinDr-Mammo", ("study_id", "image_id"), adapt_vindr)
FOLDER = Adapter(
    "a folder without a table",
    (),
    adapt_folder,
    {"study_id": "the folder's name", "image_id": "the file's name"},
)
ADAPTERS = [
    Adapter(
        "CBIS-DDSM",
        (
            *("patient_id", "left or right breast", "image view", "abnormality type"),
            *("assessment", "pathology", "image file path"),
        ),
        adapt_cbis,
        {"study_id": "patient_id", "image_id": "left or right breast and image view"},
        FINDINGS,
        ignored=r"(?:Mass|Calc)-(?:Training|Test)_P_\d+_(?:LEFT|RIGHT)_\w+_\d+/",  # crops and masks
    ),
    Adapter(
        "INbreast",
        ("Laterality", "View", "File Name", "ACR", "Bi-Rads"),
        adapt_inbreast,
        {"study_id": "File Name", "image_id": "File Name"},
    ),
    Adapter(
        "CMMD",
        ("ID1", "LeftRight", "abnormality", "classification"),
        adapt_cmmd,
        {"study_id": "ID1", "image_id": "the file's name"},
        FINDINGS,
    ),
    Adapter(
        "RSNA 2022",
        ("site_id", "patient_id", "image_id", "laterality", "view"),
        adapt_rsna,
        {"study_id": "patient_id"},
        ("cancer",),
    ),
    Adapter(
        "CDD-CESM",
        CDD_HEADER,
        adapt_cdd,
        {"study_id": "Patient_ID", "image_id": "Image_name"},
        FINDINGS,
        ignored=CDD_SUBTRACTED,
    ),
    Adapter(
        "EMBED",
        EMBED_HEADER,
        adapt_embed,
        {"study_id": "acc_anon", "patient_id": "empi_anon", "image_id": "anon_dicom_path"},
        reads=frozenset(EMBED_READ),
    ),
    Adapter("DDSM", tuple(DDSM_COLUMNS), adapt_ddsm, {"study_id": "case", "image_id": "film"}, FINDINGS),
    Adapter("MIAS", tuple(MIAS_COLUMNS), adapt_mias, {"study_id": "REFNUM", "image_id": "REFNUM"}),
]


def adapter_of(raw: pd.DataFrame) -> Adapter:
    """The adapter whose columns the table has; VinDr-Mammo's where none fits."""
    return next((a for a in ADAPTERS if set(a.header) <= set(raw.columns)), VINDR)
