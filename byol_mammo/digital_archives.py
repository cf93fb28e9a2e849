"""Digital archives with a table of images and one of what is in them: CDD-CESM and EMBED."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from byol_mammo.acquisition import KEYWORDS
from byol_mammo.settings import MammoError
from byol_mammo.tables import (
    ImageLabels,
    Reading,
    birads,
    cancer,
    clean_path,
    density,
    flag,
    places_of,
    safe_name,
    side,
    some,
    united,
    worst_birads,
)

UNNAMED = "region"  # finding of a box of which the tables do not say what it is

# CDD-CESM -------------------------------------------------------------------------------------------
# Khaled et al., Scientific Data 9, 2022: low-energy images (DM), which are as mammograms, and subtracted
# ones (CESM), as P1_L_DM_CC.jpg. The sheet 'all' of Radiology manual annotations.xlsx has a row for each
# image, and Radiology_hand_drawn_segmentations_v2.csv one for each region, by the VGG image annotator.

CDD_NAME = re.compile(
    r"P(?P<patient>\d+)_(?P<Side>[LR])_(?P<Type>DM|CM)_(?P<View>CC|MLO)", re.IGNORECASE
)
CDD_PATHOLOGY = "Pathology Classification/ Follow up"
CDD_HEADER = ("Image_name", "Patient_ID", "Side", "Type", "View", "Findings", CDD_PATHOLOGY)
CDD_REGION = ("#filename", "region_shape_attributes")
CDD_SUBTRACTED = r"_CM_(?:CC|MLO)"
CDD_KINDS = {  # column of labels.csv -> how the paper and the sheet spell a kind of finding
    "mass": r"mass(es)?",
    "calcification": r"(micro|macro)?[- ]?calcifications?",
    "architectural_distortion": r"(architectural|parenchymal) distortions?",
    "asymmetry": r"((focal|global) )?asymmetr(y|ies)",
    "mass_enhancement": r"mass enhancements?",
    "non_mass_enhancement": r"non[- ]?mass enhancements?",
    "postoperative": r"post[- ]?operative.*",
    "after_chemotherapy": r"post[- ]?(neoadjuvant|chemo).*",
    "": "normal",
}


def adapt_cdd(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """CDD-CESM: <Image_name>.jpg anywhere, the low-energy images alone. '$' parts what a cell lists.

    `raw` is the sheet, and where it was given the table of regions below it. Findings is read as all
    that is seen: what it does not name of an image is not there. Raises MammoError where a row's image
    is another woman's.
    """
    raw = raw.replace("_", "")  # says nothing, in its columns of grades
    names = raw["Image_name"].str.removesuffix(".jpg").str.strip()
    listed = raw[names != ""].assign(Image_name=names)
    low = listed["Type"].str.upper() == "DM"
    if left_out := counted(listed.loc[~low, "Type"]):
        reading.notes.append(f"left out as no mammograms: rows of Type {left_out}")
    rows = listed[low]
    if rows.empty:
        return pd.DataFrame()
    check_cdd_names(rows)
    grades = next((name for name in raw if str(name).startswith("Breast density")), "")
    rows = rows.assign(BIRADS=rows.get("BIRADS", pd.Series("", rows.index)).map(most_severe))
    woman = "P" + rows["Patient_ID"].str.removesuffix(".0")
    table = pd.DataFrame(
        {
            "study_id": woman.where(woman != "P", ""),
            "image_id": rows["Image_name"],
            "laterality": reading.column(rows, "Side", side),
            "view_position": rows["View"].str.upper(),
            "breast_birads": reading.column(rows, "BIRADS", birads),
            "breast_density": reading.column(rows, str(grades), density),
            "places": rows["Image_name"] + "\nname " + rows["Image_name"],
        }
    )
    table.insert(1, "patient_id", table["study_id"])
    label_cdd(table, rows.assign(cancer=reading.column(rows, CDD_PATHOLOGY, cancer)), reading)
    add_regions(table, raw[names == ""], reading)
    worst = worst_birads(table["breast_birads"], table["image_id"])
    return table.assign(breast_birads=worst)[~table.duplicated("image_id")]


def counted(values: pd.Series) -> str:
    """'3 CESM, 1 x' of a column's values."""
    return some(f"{count} {value or 'unknown'}" for value, count in values.value_counts().items())


def most_severe(cell: str) -> str:
    """The highest of several grades in a cell, as of '2$4'."""
    return max(cell.split("$"), key=lambda grade: birads(grade))


def check_cdd_names(rows: pd.DataFrame) -> None:
    """Refuse rows whose image is named as of another woman, breast or view. Raises MammoError."""
    named = rows["Image_name"].str.extract(f"^{CDD_NAME.pattern}$", flags=re.IGNORECASE)
    stated = rows.assign(patient=rows["Patient_ID"].str.extract(r"(\d+)(?:\.0)?$")[0].fillna(""))
    for name in ("patient", "Side", "View"):
        found, told = named[name].str.upper(), stated[name].str.upper()
        other = rows[found.notna() & (told != "") & (found != told)]
        if len(other):
            raise MammoError(
                f"{other.index[0]}: {name} {told[other.index[0]]!r} is not that of the image "
                f"{other['Image_name'].iloc[0]}, {len(other)} such rows; correct the table"
            )


def cdd_findings(cell: str) -> set[str]:
    """Columns of the kinds of finding that a cell names, {''} of Normal, {} of an empty one; '?' is
    among them where one is of no kind that is known."""
    names = [name.strip().lower() for name in re.split(r"[$,;&+/]", cell) if name.strip()]
    known = (
        next((kind for kind, spelt in CDD_KINDS.items() if re.fullmatch(spelt, name)), "?")
        for name in names
    )
    return set(known)


def label_cdd(table: pd.DataFrame, rows: pd.DataFrame, reading: Reading) -> None:
    """Enter what the rows say of each image; several rows of one image are several findings."""
    said = rows["Findings"].map(cdd_findings)
    strange = said.map(lambda names: "?" in names)
    if strange.any():
        reading.notes.append(
            "not understood in Findings, so what these images lack is unknown: "
            + counted(rows.loc[strange, "Findings"])
        )
    for key, group in rows.groupby([table["study_id"], table["image_id"]], sort=False):
        found = set().union(*said[group.index])
        whole = all(said[group.index]) and "?" not in found
        values = dict.fromkeys(filter(None, CDD_KINDS), "0" if whole else "")
        values |= dict.fromkeys(found - {"", "?"}, "1")
        reading.labels[key] = ImageLabels(values | {"cancer": united(group["cancer"])})


def add_regions(table: pd.DataFrame, regions: pd.DataFrame, reading: Reading) -> None:
    """Give the images their boxes. A region does not name its finding: it is the image's where that has
    one alone, else UNNAMED. An image with a region that cannot be read gets no boxes. Raises MammoError
    for rows that are neither of an image nor of a region."""
    if regions.empty:
        return
    stated = [name in regions and (regions[name] != "").all() for name in CDD_REGION]
    if not all(stated):
        raise MammoError(
            f"{regions.index[0]}: rows without Image_name are regions, which have "
            f"{' and '.join(CDD_REGION)}, and there is one without {CDD_REGION[stated.index(False)]}"
        )
    studies = dict(zip(table["image_id"], table["study_id"], strict=True))
    images = regions["#filename"].str.replace(r"\s*\.jpe?g$", "", regex=True).str.strip()
    unread: list[str] = []
    for image, group in regions.groupby(images, sort=False):
        if image not in studies:
            continue
        entry = reading.labels[studies[image], str(image)]
        names = [name for name, value in entry.values.items() if value == "1" and name != "cancer"]
        shapes = [region_box(text) for text in group["region_shape_attributes"]]
        if None in shapes:
            unread += [str(group.index[shapes.index(None)])]
            continue
        finding = names if len(names) == 1 else [UNNAMED]
        entry.boxes = [{"finding": finding, **box} for box in shapes if box]
    if unread:
        reading.notes.append(
            f"{len(unread)} images have regions that are not understood, so no boxes: {some(unread)}"
        )


def region_box(text: str) -> dict[str, float] | None:
    """The corners around a region of the VGG annotator, {} of none and of a point, None where it cannot
    be read."""
    try:
        shape: dict[str, Any] = json.loads(text or "{}")
        kind = shape.get("name", "")
        if kind in ("", "point"):
            return {}
        if kind == "rect":
            xs = [shape["x"], shape["x"] + shape["width"]]
            ys = [shape["y"], shape["y"] + shape["height"]]
        elif kind in ("polygon", "polyline"):
            xs, ys = shape["all_points_x"], shape["all_points_y"]
        else:
            across, down = ellipse_half(shape) if kind == "ellipse" else (shape["r"], shape["r"])
            xs, ys = ([shape[c] - half, shape[c] + half] for c, half in (("cx", across), ("cy", down)))
        corners = [float(value) for value in (min(xs), min(ys), max(xs), max(ys))]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    if not all(map(math.isfinite, corners)):
        return None
    box = dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return box if box["xmin"] < box["xmax"] and box["ymin"] < box["ymax"] else {}


def ellipse_half(shape: dict[str, Any]) -> tuple[float, float]:
    """Half of width and height of what is around an ellipse, which may be turned by theta (radians)."""
    c, s = math.cos(shape.get("theta", 0)), math.sin(shape.get("theta", 0))
    return math.hypot(shape["rx"] * c, shape["ry"] * s), math.hypot(shape["rx"] * s, shape["ry"] * c)


# EMBED ----------------------------------------------------------------------------------------------
# Jeong et al., Radiology: Artificial Intelligence 5(1), 2023; github.com/Emory-HITI/EMBED_Open_Data: its
# README has the columns, the codes and how the tables belong together, its Sample_Notebook the kinds.

EMBED_HEADER = (
    *("empi_anon", "acc_anon", "anon_dicom_path", "FinalImageType", "ImageLateralityFinal"),
    *("ViewPosition", "spot_mag", "ROI_coords"),
)
EMBED_READ = {  # of two tables of 150 columns and half a million rows, those that are used
    *EMBED_HEADER,
    *("png_filename", "BreastImplantPresent", "Rows", "Columns", "PixelSpacing", "ImagerPixelSpacing"),
    *("side", "asses", "tissueden", "massshape", "massmargin", "massdens", "calcfind", "calcdistri"),
    *("calcnumber", "path_severity", "bside", *KEYWORDS),
}
EMBED_GRADES = {"N": "1", "B": "2", "A": "0", "P": "3", "S": "4", "M": "5", "K": "6"}  # the worst last
EMBED_SIDES = {"L": "L", "R": "R", "B": "LR", "": "LR"}
EMBED_UNCLEAR = "0?"  # cancer that is one breast's or the other's: in order before 1, behind 0
EMBED_MASS = {  # column -> codes of a mass; other letters of massshape are asymmetries and distortions
    "massshape": [*"GROXNYDL"],
    "massmargin": [*"DUMIS"],
    "massdens": [*"+-="],
}
EMBED_CALC = ("calcfind", "calcdistri", "calcnumber")  # calcifications, where one has a code
EMBED_CANCER = {"0": "1", "1": "1", **dict.fromkeys("2345", "0")}  # path_severity; 6 is no breast cancer


@dataclass
class Breast:
    """What EMBED's findings say of one breast in one exam."""

    grade: str = ""
    values: dict[str, str] = field(default_factory=dict)
    kind: str = ""  # mass or calcification, where all that was found is of that kind


def adapt_embed(raw: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """EMBED_OpenData_metadata.csv and _clinical.csv, or the reduced ones: <anon_dicom_path>, without
    leading folders that are not there, or a PNG of its name. Left out is what is no contact view.

    A row of the clinical table is a finding of a side, or of both where it names none. Raises MammoError
    where no finding is of these images.
    """
    ids = {name: raw[name].str.removesuffix(".0") for name in ("acc_anon", "empi_anon")}
    raw = raw.assign(**ids)
    listed = raw["anon_dicom_path"] != ""
    images, findings = contact_views(raw[listed], reading), raw[~listed]
    if len(findings) and not set(raw.loc[listed, "acc_anon"]) & set(findings["acc_anon"]):
        raise MammoError(
            f"{findings.index[0]}: no acc_anon of the images is among those of the findings, such as "
            f"{findings['acc_anon'].iloc[0]}; give both tables of one release"
        )
    if images.empty:
        return pd.DataFrame()
    paths = images["anon_dicom_path"].map(clean_path)
    stems = paths.str.rpartition("/")[2]
    breasts, tissue = embed_breasts(findings, reading), embed_density(findings, reading)
    sides = reading.column(images, "ImageLateralityFinal", side)
    of_image = [breasts.get(key, Breast()) for key in images["acc_anon"] + " " + sides]
    table = pd.DataFrame(
        {
            "study_id": images["acc_anon"],
            "patient_id": images["empi_anon"],
            "image_id": stems.map(safe_name),
            "laterality": sides,
            "view_position": images["ViewPosition"].str.upper(),
            "breast_birads": [breast.grade for breast in of_image],
            "breast_density": [tissue.get(exam, "") for exam in images["acc_anon"]],
            "implant": reading.column(images, "BreastImplantPresent", flag),
            "height": images.get("Rows", ""),
            "width": images.get("Columns", ""),
            "spacing_mm": images.get("ImagerPixelSpacing", images.get("PixelSpacing", "")),
            "places": paths.map(places_of) + "\nname " + stems,
        }
    )
    label_embed(table, images["ROI_coords"], of_image, reading)
    return table


def contact_views(images: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    """The rows of 2D images that are neither spot nor magnified; the others are counted in a note."""
    special = pd.to_numeric(images["spot_mag"], errors="coerce") == 1
    kind = images["FinalImageType"].mask(special, "spot or magnified")
    if others := counted(kind[kind != "2D"]):
        reading.notes.append(f"left out as no contact view of a mammogram: {others}")
    return images[kind == "2D"]


def embed_density(findings: pd.DataFrame, reading: Reading) -> dict[str, str]:
    """DENSITY A to D by exam, where its rows agree; 5 is a man's."""
    said = reading.column(findings, "tissueden", density)
    by_exam = said[said != ""].groupby(findings["acc_anon"])
    return by_exam.first()[by_exam.nunique() == 1].to_dict()


def embed_breasts(findings: pd.DataFrame, reading: Reading) -> dict[str, Breast]:
    """What the findings say, by 'acc_anon L'. The worst grade counts; a recall (0) is worse than 2.

    A kind of finding is absent where every row about the breast says so: it describes another kind, or
    is negative. cancer is the worst pathology of what was taken from the breast; where it may be of the
    other one as well, it is unknown.
    """
    if findings.empty:
        reading.notes.append("without EMBED's clinical table: no findings, BI-RADS and density")
        return {}
    cells = {name: findings.get(name, pd.Series("", findings.index)) for name in EMBED_READ}
    wrong = [(cells["asses"], [*EMBED_GRADES, ""])]
    wrong += [(cells[name], [*EMBED_SIDES]) for name in ("side", "bside")]
    for cell, known in wrong:
        if strange := counted(cell[~cell.isin(known)]):
            reading.notes.append(f"not understood in {cell.name}, so without effect: {strange}")
    mass = pd.concat([cells[name].isin(codes) for name, codes in EMBED_MASS.items()], axis=1).any(axis=1)
    calc = pd.concat([~cells[name].isin(["", "0", "0.0"]) for name in EMBED_CALC], axis=1).any(axis=1)
    shaped, negative = cells["massshape"] != "", cells["asses"] == "N"
    told = mass | calc | shaped | negative
    kind = (
        pd.Series("", findings.index)
        .mask(mass & ~calc, "mass")
        .mask(calc & ~mass & ~shaped, "calcification")
    )
    cancers = cells["path_severity"].str.removesuffix(".0").map(EMBED_CANCER).fillna("")
    rows = zip(
        findings["acc_anon"],
        cells["side"].map(EMBED_SIDES).fillna(""),
        cells["bside"].map({**EMBED_SIDES, "": ""}).fillna(""),
        cancers,
        cells["asses"].where(cells["asses"].isin([*EMBED_GRADES]), ""),
        mass.map({True: "1", False: "0"}).where(told, ""),
        calc.map({True: "1", False: "0"}).where(told, ""),
        kind.mask(negative & ~mass & ~calc, "nothing"),
        strict=True,
    )
    said: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    unclear = 0
    for exam, sides, taken, pathology, *row in rows:
        of_breast = cancer_of_breasts(sides, taken, pathology)
        unclear += EMBED_UNCLEAR in of_breast.values()
        for letter in sides:
            said[f"{exam} {letter}"].append((of_breast.get(letter, ""), *row))
    if unclear:
        reading.notes.append(
            f"{unclear} findings with cancer of one breast or the other (side, bside): cancer unknown"
        )
    return {key: one_breast(found) for key, found in said.items()}


def cancer_of_breasts(sides: str, taken: str, pathology: str) -> dict[str, str]:
    """What pathology ("1" cancer, "0", "") says of each breast ("L", "R").

    The finding is of `sides`, the tissue of `taken` (bside, "laterality of any pathology result") or,
    where that says nothing, of `sides`. Cancer is a breast's where the tissue is of that one alone.
    """
    taken = taken or sides
    if pathology == "1" and not (len(taken) == 1 and taken in sides):
        return dict.fromkeys(sides, EMBED_UNCLEAR)
    return dict.fromkeys(set(sides) & set(taken), pathology)


def one_breast(rows: Iterable[tuple[str, ...]]) -> Breast:
    """Join rows of cancer, assessment, mass, calcification and kind."""
    cancers, assessed, mass, calcification, kinds = map(list, zip(*rows, strict=True))
    worst = max(assessed, key=["", *EMBED_GRADES].index)
    cancer = max(cancers).replace(EMBED_UNCLEAR, "")
    values = {"mass": united(mass), "calcification": united(calcification), "cancer": cancer}
    found = set(kinds) - {"nothing"}
    return Breast(birads(EMBED_GRADES.get(worst, "")), values, found.pop() if len(found) == 1 else "")


def label_embed(table: pd.DataFrame, rois: pd.Series, breasts: list[Breast], reading: Reading) -> None:
    """Enter findings and boxes of each image. A box names no finding: it is the breast's where all of
    its findings are of one kind, else UNNAMED."""
    unread = []
    sizes = table[["height", "width"]].apply(pd.to_numeric, errors="coerce")
    rows = zip(
        table.index, table["study_id"], table["image_id"], rois, breasts, sizes.to_numpy(), strict=True
    )
    for line, study, image, text, breast, size in rows:
        corners = roi_boxes(text)
        if corners is None:
            unread.append(str(line))
        if not breast.values and not corners:
            continue
        boxes = [{"finding": [breast.kind or UNNAMED], **box} for box in corners or []]
        height, width = map(float, size)
        known = (height, width) if 0 < height < math.inf and 0 < width < math.inf else None
        reading.labels[study, image] = ImageLabels(dict(breast.values), boxes or None, known)
    if unread:
        reading.notes.append(f"{len(unread)} ROI_coords are not understood, so no boxes: {some(unread)}")


def roi_boxes(text: str) -> list[dict[str, float]] | None:
    """Corners of '((ymin, xmin, ymax, xmax), ...)', None where it cannot be read."""
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    if len(numbers) % 4 or re.search(r"[^\s\d.,()\[\]-]", text):
        return None
    parts = [numbers[start : start + 4] for start in range(0, len(numbers), 4)]
    if any(top >= bottom or left >= right for top, left, bottom, right in parts):
        return None
    return [
        {"xmin": left, "ymin": top, "xmax": right, "ymax": bottom} for top, left, bottom, right in parts
    ]
