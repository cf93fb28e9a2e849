# ruff: noqa: E501 - tables read better in long lines
"""prepare_dataset: MIAS, CDD-CESM, DDSM and EMBED, on generated archives with the published forms.

Headers, legends and codes are as published (docs/archives.md says where); patients and values are made up,
but for the places of two MIAS films, which the list of the original films gives in another frame.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from test_prepare_archives import Archive, refusal
from test_prepare_dicom import breast

import prepare_dataset as prep
from byol_mammo import digital_archives, film_archives, tables
from byol_mammo.archive_files import index_files
from byol_mammo.settings import MammoError

FINDINGS = ["mass", "calcification", "cancer"]


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def film(archive: Archive, name: str, side: str = "L", shape: tuple[int, int] = (96, 80)) -> None:
    """Write an 8-bit picture, of pixels that no other has, in the format of its suffix."""
    path = archive.images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    archive.count += 1
    pixels = breast(8, (96, 80), side, archive.count)
    assert cv2.imwrite(str(path), cv2.resize(pixels, shape[::-1]))


def boxes_of(archive: Archive, image: str) -> list[tuple]:
    """Finding and corners of an image's boxes, by its name in the table."""
    table = archive.labels().set_index("image")
    text = next(row.boxes for name, row in table.iterrows() if f"_{image}." in name)
    return [
        (*box["finding"], *(box[name] for name in ("xmin", "ymin", "xmax", "ymax")))
        for box in json.loads(text or "[]")
    ]


# MIAS ---------------------------------------------------------------------------------------------

INFO = """INFORMATION:
3rd column: Class of abnormality present:
                CALC - Calcification
REFNUM BG CLASS SEVERITY X Y RADIUS
mdb001 G CIRC B 535 425 197
mdb002 G CIRC B 522 280 69
mdb003 D NORM
mdb004 D NORM
mdb005 F CIRC B 477 133 30
mdb005 F SPIC M 500 168 26
mdb006 F CIRC B
mdb007 D CALC M *NOTE 3*
mdb008 G ARCH B 300 400 20
"""
# The same two films in the list of the original ones: image, x, y, radius, rows and columns as stored.
ORIGINAL = {"mdb001": ("L", 1815, 1116, 790, 2048, 4320), "mdb002": ("R", 3091, 1262, 277, 2600, 4320)}


def mini_mias(archive: Archive, text: str = INFO, count: int = 8, suffix: str = ".pgm") -> str:
    for number in range(1, count + 1):
        film(archive, f"all-mias/mdb{number:03d}{suffix}", "RL"[number % 2], (1024, 1024))
    return archive.table(text, "Info.txt")


def test_mini_mias(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert archive.run(mini_mias(archive), "--test_share", "0.5") == 0
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    assert list(manifest["image_id"]) == [f"mdb{n:03d}" for n in range(1, 9)]
    assert list(manifest["patient_id"]) == [
        f"mdb{n:03d}-{n + 1:03d}" for n in (1, 3, 5, 7) for _ in "lr"
    ]
    assert manifest.groupby("patient_id")["split"].nunique().eq(1).all()
    assert manifest["split"].nunique() == 2
    assert list(manifest["laterality"]) == ["L", "R"] * 4
    assert set(manifest["view"]) == {"MLO"}
    assert set(manifest["spacing_mm"]) == {"0.2"}
    assert not archive.problems("side")
    assert labels[[*FINDINGS, "architectural_distortion"]].to_numpy().tolist() == [
        list(row) for row in ("1000", "1000", "0000", "0000", "1010", "1000", "0110", "0001")
    ]
    assert boxes_of(archive, "mdb005") == [("mass", 447, 861, 507, 921), ("mass", 474, 830, 526, 882)]
    assert boxes_of(archive, "mdb006") == boxes_of(archive, "mdb007") == []
    said = capsys.readouterr().out
    assert "note: read as MIAS" in said
    assert "2 findings have no place, so no boxes: mdb006 (mass), mdb007 (calcification)" in said
    assert "sides by the films' numbers, odd ones left" in said


def test_the_places_of_mini_mias_are_those_of_the_original_films(archive: Archive) -> None:
    """Films lie in the original: turned to stand, a quarter of the size, centred in 1024 px."""
    assert archive.run(mini_mias(archive), "--test_share", "0") == 0
    for name, (side, x, y, radius, rows, columns) in ORIGINAL.items():
        across, down = (y, columns - 1 - x) if side == "L" else (rows - 1 - y, x)
        middle = across / 4 + (1024 - rows / 4) / 2, down / 4 + (1024 - columns / 4) / 2
        ((_, left, top, right, bottom),) = boxes_of(archive, name)
        assert (left + right) / 2 == pytest.approx(middle[0], abs=2)
        assert (top + bottom) / 2 == pytest.approx(middle[1], abs=2)
        assert (right - left) / 2 == pytest.approx(radius / 4, abs=1)


def test_reduced_mias_has_its_boxes_and_no_spacing(archive: Archive) -> None:
    film(archive, "mdb001.png", "L", (512, 512))
    film(archive, "mdb002.png", "R", (512, 256))
    table = archive.table("\n".join(INFO.splitlines()[4:6]), "Info.txt")
    assert archive.run(table, "--test_share", "0") == 0
    assert set(archive.read("manifest.csv")["spacing_mm"]) == {""}
    assert boxes_of(archive, "mdb001") == [("mass", 169, 201, 366, 398)]
    assert boxes_of(archive, "mdb002") == []  # of another aspect
    assert len(archive.problems("different size")) == 2


def test_original_mias(archive: Archive) -> None:
    """Its names tell the side; another abnormality of a film stands in a line without its name."""
    text = "mdb005ll  F  CIRC  B  647  1163  122\n              CIRC  M  786  1255  107\nmdb006rl  F  CALC B *** see note 2\n"
    for name in ("mdb005ll", "mdb006rl"):
        film(archive, f"{name}.pgm")
    assert archive.run(archive.table(text, "MIAS_TRUTH.txt"), "--test_share", "0") == 0
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    assert list(manifest["laterality"]) == ["L", "R"]
    assert set(manifest["patient_id"]) == {"mdb005-006"}
    assert set(manifest["spacing_mm"]) == {"0.05"}
    assert labels[FINDINGS].to_numpy().tolist() == [["1", "0", "1"], ["0", "1", "0"]]
    assert set(labels["boxes"]) == {""}


def test_mias_has_the_counts_that_are_published(tmp_path: Path) -> None:
    """322 films of 161 women, 207 of them normal and 25 with calcifications."""
    text = (Path(__file__).parent / "mias_truth.txt").read_text()
    abnormal = set(re.findall(r"^mdb(\d{3})", text, flags=re.MULTILINE))
    normal = [f"{n:03d}" for n in range(1, 323) if f"{n:03d}" not in abnormal]
    path = tmp_path / "MIAS_TRUTH.txt"
    path.write_text(text + "".join(f"mdb{n}{'rl'[int(n) % 2]}m G NORM\n" for n in normal))
    reading = tables.Reading({})
    raw = film_archives.read_mias(path)
    assert raw is not None
    films = film_archives.adapt_mias(raw, reading)
    assert (len(raw), len(films), films["patient_id"].nunique()) == (330, 322, 161)
    labels = pd.DataFrame([entry.values for entry in reading.labels.values()])
    assert (labels == "1").sum().to_dict() == {
        "mass": 56, "calcification": 25, "architectural_distortion": 19, "asymmetry": 15, "cancer": 52,
    }  # fmt: skip
    assert (labels == "0").all(axis=1).sum() == 207


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mdb001 G CIRC B 535 425", "Info.txt line 1: 'CIRC B 535 425' is no entry of MIAS' list"),
        ("mdb001 G CIRC X 535 425 197", "line 1: 'CIRC X 535 425 197'"),
        ("mdb001 G LUMP B 535 425 197", "line 1: CLASS 'LUMP' is none of MIAS', 1 such rows"),
    ],
)
def test_lines_that_are_not_mias_are_named(
    archive: Archive, line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(archive, capsys, mini_mias(archive, line, 1))


# CDD-CESM -----------------------------------------------------------------------------------------

CDD = (
    "Image_name,Patient_ID,Side,Type,View,Age,Breast density (ACR),BIRADS,Findings,Tags,Machine,"
    "Pathology Classification/ Follow up\n"
)
REGIONS = "#filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"


def cdd_row(
    name: str, findings: str, pathology: str, grade: str = "4", tissue: str = "C", **odd: str
) -> str:
    patient, side, kind, view = name.split("_")
    cells = {
        "patient": patient[1:],
        "side": side,
        "type": {"DM": "DM", "CM": "CESM"}[kind],
        "view": view,
    } | odd
    cells = [
        name,
        cells["patient"],
        cells["side"],
        cells["type"],
        cells["view"],
        "50",
        tissue,
        grade,
        findings,
    ]
    return ",".join([*cells, "", "1", pathology]) + "\n"


def region(file: str, **shape: object) -> str:
    return f'{file},-1,{{}},1,0,"{json.dumps(shape).replace(chr(34), chr(34) * 2)}",{{}}\n'


CDD_ROWS = [
    cdd_row("P1_L_DM_CC", "Mass", "Malignant", "5"),
    cdd_row(
        "P1_L_DM_MLO ", "Mass$Calcifications", "Malignant", "2$5", view="MLO"
    ),  # a blank, as published
    cdd_row("P1_R_DM_CC", "Normal", "Normal", "1"),
    cdd_row("P2_L_DM_CC", "Asymmetry", "Benign", "_", "_"),
    cdd_row("P2_R_DM_CC", "Mass - calcification", "Benign"),  # what is it that this lists?
    cdd_row("P3_L_DM_CC", "Mass", "Benign", "2"),
    cdd_row("P3_L_DM_CC", "Calcifications", "Malignant", "5"),
    cdd_row("P1_L_CM_CC", "Mass enhancement", "Malignant"),
]
CDD_REGIONS = [
    region("P1_L_DM_CC.jpg", name="ellipse", cx=30, cy=40, rx=10, ry=5),
    region("P1_L_DM_CC.jpg", name="point", cx=1, cy=1),
    region("P1_L_DM_MLO .jpg", name="polygon", all_points_x=[5, 20, 9], all_points_y=[8, 9, 30]),
    region("P2_L_DM_CC.jpg", name="circle", cx=30, cy=40, r=9),
    region("P3_L_DM_CC.jpg", name="spline", cx=30),
    region("P1_L_CM_CC.jpg", name="circle", cx=30, cy=40, r=9),
]


def cdd(archive: Archive, rows: list[str], regions: list[str]) -> list[str]:
    for row in rows:
        name = row.split(",")[0].strip()
        folder = "Subtracted images" if "_CM_" in name else "Low energy images"
        film(archive, f"{folder} of CDD-CESM/{name}.jpg", name.split("_")[1])
    return [archive.table(CDD + "".join(rows)), archive.table(REGIONS + "".join(regions), "regions.csv")]


def test_cdd_cesm(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert archive.run(cdd(archive, CDD_ROWS, CDD_REGIONS), "--test_share", "0.5") == 0
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    assert list(manifest["image_id"]) == [
        *("P1_L_DM_CC", "P1_L_DM_MLO", "P1_R_DM_CC", "P2_L_DM_CC", "P2_R_DM_CC", "P3_L_DM_CC")
    ]
    assert list(manifest["patient_id"]) == ["P1"] * 3 + ["P2"] * 2 + ["P3"]
    assert manifest.groupby("patient_id")["split"].nunique().eq(1).all()
    assert list(manifest["laterality"]) == ["L", "L", "R", "L", "R", "L"]
    assert list(manifest["view"]) == ["CC", "MLO", "CC", "CC", "CC", "CC"]
    grades = ["BI-RADS 5", "BI-RADS 5", "BI-RADS 1", "", "BI-RADS 4", "BI-RADS 5"]
    assert list(manifest["breast_birads"]) == grades
    assert list(manifest["breast_density"]) == ["DENSITY C"] * 3 + [""] + ["DENSITY C"] * 2
    assert labels[[*FINDINGS, "asymmetry"]].to_numpy().tolist() == [
        *(["1", "0", "1", "0"], ["1", "1", "1", "0"], ["0", "0", "0", "0"], ["0", "0", "0", "1"]),
        *(["", "", "0", ""], ["1", "1", "1", "0"]),
    ]
    assert boxes_of(archive, "P1_L_DM_CC") == [("mass", 20, 35, 40, 45)]
    assert boxes_of(archive, "P1_L_DM_MLO") == [("region", 5, 8, 20, 30)]
    assert boxes_of(archive, "P2_L_DM_CC") == [("asymmetry", 21, 31, 39, 49)]
    assert boxes_of(archive, "P3_L_DM_CC") == []
    said = capsys.readouterr().out
    assert "left out as no mammograms: rows of Type 1 CESM" in said
    assert (
        "not understood in Findings, so what these images lack is unknown: 1 Mass - calcification"
        in said
    )
    assert "1 images have regions that are not understood, so no boxes: regions.csv line 6" in said
    assert "extra" not in said


@pytest.mark.parametrize("odd", [{"patient": "2"}, {"side": "R"}, {"view": "MLO"}])
def test_cdd_rows_of_another_image_are_refused(
    archive: Archive, odd: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    tables = cdd(archive, [cdd_row("P1_L_DM_CC", "Mass", "Benign", **odd)], [])
    assert "table.csv line 2: " in (said := refusal(archive, capsys, tables))
    assert "is not that of the image P1_L_DM_CC, 1 such rows" in said


def test_cdd_rows_that_are_of_nothing_are_refused(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    image, regions = cdd(archive, CDD_ROWS[:1], CDD_REGIONS[:1])
    other = archive.table("file,shape\nP1_L_DM_CC.jpg,{}\n", "other.csv")
    assert "other.csv line 2: rows without Image_name" in refusal(archive, capsys, [image, other])
    Path(image).write_text(Path(image).read_text() + ",1,L,DM,CC,50,C,4,Mass,,1,Benign\n")
    assert "and there is one without #filename" in refusal(archive, capsys, [image, regions])


def test_cdd_rows_without_a_patient_are_refused(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = cdd(archive, [cdd_row("P1_L_DM_CC", "Mass", "Benign", patient="")], [])
    assert "table.csv line 2: Patient_ID is empty" in refusal(archive, capsys, tables)


# EMBED --------------------------------------------------------------------------------------------

METADATA = (
    "empi_anon,acc_anon,study_date_anon,anon_dicom_path,FinalImageType,ImageLateralityFinal,ViewPosition,"
    "spot_mag,num_roi,ROI_coords,Rows,Columns,PixelSpacing,BreastImplantPresent,Unread\n"
)
CLINICAL = (
    "empi_anon,acc_anon,numfind,side,asses,tissueden,massshape,massmargin,massdens,calcfind,calcdistri,"
    "calcnumber,path_severity,desc\n"
)


def embed_image(
    exam: str, name: str, side: str = "L", kind: str = "2D", spot: str = "0", roi: str = "()"
) -> str:
    path = f"/mnt/NAS2/mammo/anon_dicom/cohort_1/p{exam[1]}/{exam}/1.2.{name}.dcm"
    cells = [
        f"p{exam[1]}",
        exam,
        "2015-01-01",
        path,
        kind,
        side,
        "CC",
        spot,
        "0",
        f'"{roi}"',
        "96",
        "80",
    ]
    return ",".join([*cells, '"[0.07, 0.07]"', "NO", "x"]) + "\n"


def embed_finding(
    exam: str, side: str, grade: str, codes: str = ",,,,,0", severity: str = "", tissue: str = "2.0"
) -> str:
    return f"p{exam[1]},{exam},1,{side},{grade},{tissue},{codes},{severity},MG Screen\n"


MASS, CALC, ASYMMETRY, BOTH = "O,,,,,0", ",,,P,,3.0", "F,,,,,0", "R,,,P,,0"


def embed(archive: Archive, images: list[str], findings: list[str] | None = None) -> list[str]:
    for row in images:
        path = row.split(",")[3].split("/anon_dicom/")[1]
        archive.dicom(path, ImageLaterality=row.split(",")[5], ViewPosition="CC")
    tables = [archive.table(METADATA + "".join(images), "metadata.csv")]
    return tables + ([archive.table(CLINICAL + "".join(findings), "clinical.csv")] if findings else [])


def test_embed(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    exams = ["a1", "a2", "b1", "c1", "d1", "e1"]
    images = [embed_image(exam, f"{exam}{side}", side) for exam in exams for side in "LR"]
    images[0] = embed_image("a1", "a1L", roi="((10, 20, 30, 60),)")
    images[4] = embed_image("b1", "b1L", roi="(([10, 20, 30, 60], [1, 2, 3, 4]))")
    images[6] = embed_image("c1", "c1L", roi="((10, 20, 5, 60),)")
    images += [embed_image("a1", "a1V", kind="cview"), embed_image("a1", "a1M", spot="1")]
    findings = [
        embed_finding("a1", "L", "A", MASS) + embed_finding("a1", "R", "N"),
        embed_finding("a2", "L", "S", MASS, "1.0") + embed_finding("a2", "L", "B", ASYMMETRY),
        embed_finding("b1", "L", "A", BOTH, "4") + embed_finding("b1", "L", "M", CALC, "0"),
        embed_finding("c1", "B", "N", tissue="5"),
        embed_finding("d1", "", "B") + embed_finding("d1", "L", "N"),
        embed_finding("e1", "R", "P", CALC, "6"),
    ]  # fmt: skip
    assert archive.run(embed(archive, images, findings), "--test_share", "0.5") == 0
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    assert list(manifest["patient_id"]) == [f"p{exam[1]}" for exam in exams for _ in "LR"]
    assert manifest.groupby("patient_id")["split"].nunique().eq(1).all()
    assert set(manifest["spacing_mm"]) == {"0.07"}
    assert set(manifest["implant"]) == {"0"}
    told = [grade.removeprefix("BI-RADS ") for grade in manifest["breast_birads"]]
    assert told == ["0", "1", "4", "", "5", "", "1", "1", "2", "2", "", "3"]
    density = ["DENSITY B"] * 6 + [""] * 2 + ["DENSITY B"] * 4
    assert list(manifest["breast_density"]) == density
    assert labels[FINDINGS].to_numpy().tolist() == [
        *(["1", "0", ""], ["0", "0", ""]),  # a1
        *(["1", "0", "1"], ["", "", ""]),  # a2: of its right breast nobody says anything
        *(["1", "1", "1"], ["", "", ""]),  # b1
        *(["0", "0", ""], ["0", "0", ""]),  # c1: negative, both
        *(["", "", ""], ["", "", ""]),  # d1: benign, but what?
        *(["", "", ""], ["0", "1", ""]),  # e1: a cancer that is not of the breast
    ]
    assert boxes_of(archive, "1.2.a1L") == [("mass", 20, 10, 60, 30)]
    assert boxes_of(archive, "1.2.b1L") == [("region", 20, 10, 60, 30), ("region", 2, 1, 4, 3)]
    assert boxes_of(archive, "1.2.c1L") == []
    said = capsys.readouterr().out
    assert "left out as no contact view of a mammogram: 1 cview, 1 spot or magnified" in said
    assert "1 ROI_coords are not understood, so no boxes: metadata.csv line 8" in said
    assert "1 of 10 values of tissueden are not understood" in said


@pytest.mark.parametrize(
    ("side", "taken", "severity", "expected", "unclear"),
    [
        ("B", "L", "0", ["1", ""], False),
        ("", "R", "1", ["", "1"], False),
        ("L", "L", "0", ["1", ""], False),
        ("L", "", "0", ["1", ""], False),
        ("B", "", "0", ["", ""], True),
        ("B", "B", "0", ["", ""], True),
        ("L", "B", "0", ["", ""], True),
        ("L", "R", "0", ["", ""], True),
        ("B", "B", "4", ["0", "0"], False),
        ("B", "L", "4", ["0", ""], False),
    ],
)
def test_embed_cancer_is_of_the_breast_that_the_tissue_is_of(
    archive: Archive, capsys, side: str, taken: str, severity: str, expected: list[str], unclear: bool
) -> None:
    tables = embed(archive, [embed_image("a1", f"x{letter}", letter) for letter in "LR"])
    row = embed_finding("a1", side, "S", MASS, severity).strip() + f",{taken}\n"
    benign = embed_finding("a1", "L", "B", ASYMMETRY, "5" if unclear else "").strip() + ",\n"
    tables.append(archive.table(CLINICAL.strip() + ",bside\n" + row + benign, "clinical.csv"))
    assert archive.run(tables, "--test_share", "0") == 0
    assert archive.labels()["cancer"].tolist() == expected
    assert ("1 findings with cancer of one breast or the other" in capsys.readouterr().out) == unclear


def test_embed_images_alone(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert archive.run(embed(archive, [embed_image("a1", "x")]), "--test_share", "0") == 0
    assert "without EMBED's clinical table: no findings" in capsys.readouterr().out
    assert not (archive.out / "labels.csv").exists()


def test_embed_findings_of_other_images_are_refused(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = embed(archive, [embed_image("a1", "x")], [embed_finding("z9", "L", "N")])
    assert "clinical.csv line 2: no acc_anon of the images" in refusal(archive, capsys, tables)


def test_embed_columns_that_nobody_reads_are_left_in_the_file(archive: Archive) -> None:
    """Its tables have 150 of them, in half a million rows; --columns may name any."""
    table = Path(embed(archive, [embed_image("a1", "x")])[0])
    assert "Unread" not in prep.read_csv(table, whole=False)
    assert "Unread" in prep.read_csv(table)


def test_embed_s_metadata_tells_how_images_were_taken(archive: Archive) -> None:
    """Its columns of the header are named as DICOM's attributes."""
    table = Path(embed(archive, [embed_image("a1", "x")])[0])
    header, row = table.read_text().splitlines()
    columns = "Manufacturer,ManufacturerModelName,KVP,ExposureInuAs,DeviceSerialNumber"
    table.write_text(f"{header},{columns}\n{row},HOLOGIC Inc.,Selenia,29.0,61000.0,SN-4711\n")
    assert archive.run([str(table)], "--test_share", "0") == 0
    manifest = archive.read("manifest.csv").iloc[0]
    assert manifest[["maker", "model", "archive"]].tolist() == ["Hologic", "Selenia", "EMBED"]
    assert manifest[["kvp", "mas"]].astype(float).tolist() == [29, 61]
    assert not any("SN-4711" in path.read_text() for path in archive.out.glob("*.csv"))


# DDSM ---------------------------------------------------------------------------------------------


def ics(case: str, films: dict[str, str], tissue: str = "2", resolution: str = "43.5") -> str:
    """A case's list of films: name -> OVERLAY or NON_OVERLAY."""
    lines = [
        "ics_version 1.0",
        f"filename {case}",
        "DATE_OF_STUDY 2 7 1995",
        "PATIENT_AGE 42",
        "FILM ",
        "FILM_TYPE REGULAR",
    ]
    lines += [f"DENSITY {tissue}", "DATE_DIGITIZED 7 22 1997 ", "DIGITIZER LUMISYS LASER", "SEQUENCE"]
    size = "LINES 96 PIXELS_PER_LINE 80 BITS_PER_PIXEL 12"
    return (
        "\n".join(
            [
                *lines,
                *(f"{name} {size} RESOLUTION {resolution} {state}" for name, state in films.items()),
            ]
        )
        + "\n"
    )


def overlay(*abnormalities: tuple[str, str, str, str], total: int = 0) -> str:
    """An overlay file of lesion types, assessment, pathology, chain code."""
    lines = [f"TOTAL_ABNORMALITIES {total or len(abnormalities)}"]
    for number, (types, grade, pathology, chain) in enumerate(abnormalities, 1):
        lines += [f"ABNORMALITY {number}", *(f"LESION_TYPE {kind}" for kind in types.split("+"))]
        lines += [
            f"ASSESSMENT {grade} ",
            "SUBTLETY 5 ",
            f"PATHOLOGY {pathology} ",
            "TOTAL_OUTLINES 2 ",
            "BOUNDARY",
            chain,
        ]
        lines += ["\tCORE", "1 1 4 4 4 #"]
    return "\n".join(lines) + "\n"


OVAL, CLUSTER = (
    "MASS SHAPE OVAL MARGINS CIRCUMSCRIBED",
    "CALCIFICATION TYPE PLEOMORPHIC DISTRIBUTION CLUSTERED",
)
RING = "20 30 2 2 2 4 4 6 6 6 0 0 #"  # three right, two down, and back
DDSM_FILMS = {  # film -> state in the case's list, overlay, labels, boxes
    "A-0001-1 LEFT_CC": (
        "OVERLAY",
        overlay((OVAL, "4", "BENIGN", RING), (CLUSTER, "5", "MALIGNANT", RING)),
        "111",
        2,
    ),
    "A-0001-1 LEFT_MLO": (
        "NON_OVERLAY",
        "",
        "???",
        0,
    ),  # seen in the other view alone, or not marked here
    "A-0001-1 RIGHT_CC": ("NON_OVERLAY", "", "000", 0),
    "A-0001-2 LEFT_CC": (
        "OVERLAY",
        overlay((f"{CLUSTER}+{OVAL}", "2", "BENIGN_WITHOUT_CALLBACK", RING)),
        "110",
        1,
    ),
    "B-0002-1 LEFT_CC": ("OVERLAY", "", "???", 0),
    "B-0002-1 RIGHT_CC": ("NON_OVERLAY", overlay((OVAL, "4", "BENIGN", RING)), "???", 0),
    "C-0003-1 LEFT_CC": (
        "OVERLAY",
        overlay((OVAL, "4", "UNPROVEN", RING), (OVAL, "3", "BENIGN", "20 30 2 2")),
        "10?",
        0,
    ),
    "C-0003-1 RIGHT_CC": ("OVERLAY", overlay((OVAL, "4", "BENIGN", RING), total=2), "???", 0),
}


def ddsm(archive: Archive, suffix: str = ".png") -> None:
    for case in dict.fromkeys(name.split()[0] for name in DDSM_FILMS):
        films = {name.split()[1]: values for name, values in DDSM_FILMS.items() if name.startswith(case)}
        folder = archive.images / f"cases/cancer_01/case{case[2:6]}_{case[-1]}"
        folder.mkdir(parents=True)
        states = {name: state for name, (state, *_) in films.items()}
        (folder / f"{case}.ics").write_text(ics(case, states, "0" if case[0] == "B" else "2"))
        for name, (_, text, *_) in films.items():
            base = f"{case.replace('-', '_')}.{name}"
            (folder / f"{base}.LJPEG").write_bytes(b"lossless JPEG")
            if text:
                (folder / f"{base}.OVERLAY").write_text(text)
            if suffix:
                film(archive, f"{folder.relative_to(archive.images)}/{base}{suffix}", name[0])


@pytest.mark.parametrize("suffix", [".png", ".LJPEG.png", ".LJPEG.1-ddsmraw2pnm.pgm"])
def test_ddsm(archive: Archive, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    ddsm(archive, suffix)
    assert archive.run("none", "--test_share", "0.5") == 0
    manifest = archive.read("manifest.csv")
    assert [f"{row.study_id} {row.image_id}" for row in manifest.itertuples()] == list(DDSM_FILMS)
    assert list(manifest["patient_id"]) == [name[:6] for name in DDSM_FILMS]
    assert manifest.groupby("patient_id")["split"].nunique().eq(1).all()
    assert list(manifest["laterality"]) == [name.split()[1][0] for name in DDSM_FILMS]
    assert list(manifest["view"]) == [name.split("_")[1] for name in DDSM_FILMS]
    assert set(manifest["spacing_mm"]) == {"0.0435"}
    assert [grade[-1:] for grade in manifest["breast_birads"]] == ["5", "", "", "2", "", "", "4", ""]
    assert [tissue[-1:] for tissue in manifest["breast_density"]] == [*"BBBB", "", "", *"BB"]
    labels = archive.labels()
    said = ["".join(value or "?" for value in row) for row in labels[FINDINGS].to_numpy()]
    assert said == [values[2] for values in DDSM_FILMS.values()]
    boxes = [json.loads(text or "[]") for text in labels["boxes"]]
    assert [len(found) for found in boxes] == [values[3] for values in DDSM_FILMS.values()]
    assert boxes[0][1] == {"finding": ["calcification"], "xmin": 20, "ymin": 30, "xmax": 24, "ymax": 33}
    assert boxes[3][0]["finding"] == ["calcification", "mass"]
    output = capsys.readouterr().out
    assert "1 findings have no whole outline, so no boxes: C-0003-1 LEFT_CC (mass)" in output
    assert (
        "3 films of which nothing is known: B_0002_1.LEFT_CC (the overlay is missing), "
        "B_0002_1.RIGHT_CC (the case knows nothing of this overlay), "
        "C_0003_1.RIGHT_CC (the overlay has 1 whole abnormalities of 2)"
    ) in output


def test_ddsm_as_lossless_jpeg_is_skipped_by_name(archive: Archive) -> None:
    ddsm(archive, "")
    assert archive.run("none", "--test_share", "0") == 1
    assert set(archive.read("skipped.csv")["reason"]) == {
        "the format .ljpeg is not read; convert to PNG"
    }


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda archive: cdd(archive, [CDD_ROWS[-1]], CDD_REGIONS[-1:]),
    lambda archive: embed(archive, [embed_image("a1", "a", kind="cview")], [embed_finding("a1", "L", "N")]),
])  # fmt: skip
def test_tables_of_other_images_alone_are_refused(
    archive: Archive, make: Callable[[Archive], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(archive, capsys, make(archive))
    assert "the table lists no mammogram that is laid out; left out as no" in said


def spoilt(text: str, at: float, how: str) -> str:
    """A text with a piece of it gone, doubled, or replaced."""
    start = int(at * len(text))
    piece = text[start : start + 7]
    return text[:start] + {"gone": "", "twice": piece * 2, "odd": '\0,"¹é}'}[how] + text[start + 7 :]


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.floats(0, 1), how=st.sampled_from(["gone", "twice", "odd"]), where=st.integers(0, 4))
def test_spoilt_text_is_read_refused_or_said(tmp_path_factory, at: float, how: str, where: int) -> None:
    """Whatever is damaged: a message, or rows; never another error."""
    folder = tmp_path_factory.mktemp("spoilt")
    regions, case = (
        json.dumps({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [3, 4]}),
        "A-0001-1",
    )
    texts = [INFO, regions, "((10, 20, 30, 60), (1, 2, 3, 4))", overlay((OVAL, "4", "BENIGN", RING))]
    texts.append(ics(case, {"LEFT_CC": "OVERLAY"}))
    texts[where] = spoilt(texts[where], at, how)
    (folder / "Info.txt").write_text(texts[0])
    (folder / f"{case}.ics").write_text(texts[4])
    (folder / "A_0001_1.LEFT_CC.OVERLAY").write_text(texts[3])
    with suppress(MammoError):
        raw = film_archives.read_mias(folder / "Info.txt")
        assert raw is None or len(film_archives.adapt_mias(raw, tables.Reading({})))
    index = index_files(folder)
    with suppress(MammoError):
        raw = film_archives.read_ddsm(folder, index)
        assert raw is not None
        assert len(film_archives.adapt_ddsm(raw, tables.Reading(index))) == 1
    assert isinstance(digital_archives.region_box(texts[1]), dict | None)
    assert isinstance(digital_archives.roi_boxes(texts[2]), list | None)


@pytest.mark.parametrize("text", ["[]", "null", "7", '{"name": "circle", "cx": 1e999, "cy": 1, "r": 1}', "[" * 10**5,
    '{"name": "rect", "x": 1' + "0" * 400 + ', "y": 1, "width": 1, "height": 1}', '{"name": "polygon"}'])  # fmt: skip
def test_regions_that_are_none(text: str) -> None:
    assert digital_archives.region_box(text) is None


# Without a table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "women"),
    [
        (
            ("A_0002_1.RIGHT_MLO.png", "A_0002_1.LEFT_CC.png", "B_0002_1.LEFT_CC.png"),
            ["A-0002", "A-0002", "B-0002"],
        ),
        (("P1_L_DM_CC.jpg", "P1_R_DM_MLO.jpg", "P11_L_DM_CC.jpg"), ["P1", "P1", "P11"]),
        (("mdb001.pgm", "mdb002.pgm", "mdb003.pgm"), ["mdb001-002", "mdb001-002", "mdb003-004"]),
    ],
)
def test_women_are_known_by_names_of_published_films(
    archive: Archive, names: tuple[str, ...], women: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder each image would be a woman of her own, and hers fall on both sides of the split."""
    for name in names:
        film(archive, name)
    assert archive.run("none", "--test_share", "0.5") == 0
    manifest = archive.read("manifest.csv").sort_values("source")
    assert list(manifest["patient_id"]) == [woman for _, woman in sorted(zip(names, women, strict=True))]
    assert manifest.groupby("patient_id")["split"].nunique().eq(1).all()
    assert "lie in no folder of their own" not in capsys.readouterr().out
