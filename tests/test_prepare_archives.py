"""prepare_dataset: the archives' own layouts, splits, labels and boxes, on generated archives.

Headers are as published: VinDr-Mammo 1.0.0, CBIS-DDSM (TCIA), INbreast 1.0, CMMD (TCIA), RSNA 2022.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from test_prepare_dicom import breast, coded, make_dicom, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_dataset as prep  # noqa: E402

VINDR = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density"
FINDINGS = f"{VINDR},finding_categories,finding_birads,xmin,ymin,xmax,ymax,split\n"
VINDR += ",split\n"
CBIS_MASS = (
    "patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,"
    "mass shape,mass margins,assessment,pathology,subtlety,image file path,cropped image file path,"
    "ROI mask file path\n"
)
CBIS_CALC = CBIS_MASS.replace("breast_density", "breast density").replace(
    "mass shape,mass margins", "calc type,calc distribution"
)
INBREAST = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads\n"
CMMD = "ID1,LeftRight,Age,number,abnormality,classification,subtype\n"
RSNA = (
    "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,"
    "machine_id,difficult_negative_case\n"
)


class Archive:
    """Tables and images in a folder, and runs of the program on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images, self.out = folder, folder / "images", folder / "out"
        self.images.mkdir()
        self.count = 0

    def table(self, text: str, name: str = "table.csv") -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def png(self, name: str, pixels: np.ndarray | None = None) -> None:
        """Write a PNG below the images' folder, by default of pixels that no other has."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.count += 1
        assert cv2.imwrite(str(path), breast(seed=self.count) if pixels is None else pixels)

    def dicom(self, name: str, **tags: object) -> None:
        self.count += 1
        save(make_dicom(breast(seed=self.count), **tags), self.images / name)

    def run(self, csv: str | list[str], *extra: str) -> int:
        tables = [csv] if isinstance(csv, str) else csv
        places = ["--images_root", str(self.images), "--output_dir", str(self.out)]
        return prep.main(["--csv_path", *tables, *places, *extra])

    def read(self, name: str) -> pd.DataFrame:
        table = pd.read_csv(self.out / name, dtype=str, keep_default_na=False)
        return table.set_index("image_id" if "image_id" in table else table.columns[0], drop=False)

    def labels(self) -> pd.DataFrame:
        return self.read("labels.csv")

    def problems(self, check: str) -> list[str]:
        table = self.read("problems.csv") if (self.out / "problems.csv").exists() else pd.DataFrame()
        return [f"{r['file']}: {r['detail']}" for r in table.to_dict("records") if r["check"] == check]


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def refusal(archive: Archive, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a run that is refused and writes nothing."""
    assert archive.run(*arguments) == 2
    assert not archive.out.exists()
    return capsys.readouterr().err


# The archives -------------------------------------------------------------------------------------


def vindr_row(study: str, image: str, split: str, side: str = "L", size: str = "96,80") -> str:
    return f"{study},x,{image},{side},CC,{size},BI-RADS 1,DENSITY C,{split}\n"


@pytest.mark.parametrize("suffix", [".png", ".dicom", ".dcm"])
def test_vindr_as_png_or_dicom(archive: Archive, suffix: str) -> None:
    rows = vindr_row("s1", "a", "training") + vindr_row("s2", "b", "test")
    for name in ("s1/a", "s2/b"):
        archive.png(name + suffix) if suffix == ".png" else archive.dicom(name + suffix)
    assert archive.run(archive.table(VINDR + rows)) == 0
    manifest = archive.read("manifest.csv")
    assert list(manifest["file"]) == ["training/s1_a.png", "test/s2_b.png"]
    assert set(manifest["spacing_mm"]) == {"" if suffix == ".png" else "0.07"}
    assert list(manifest["breast_density"]) == ["DENSITY C"] * 2
    assert not (archive.out / "labels.csv").exists()


def test_a_patient_of_several_studies_stays_in_one_split(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [vindr_row(f"s{n}", f"i{n}", "") for n in range(40)]
    for n in range(40):
        archive.png(f"s{n}/i{n}.png")
    lines = [f"patient_id,{VINDR}", *(f"p{n // 2},{row}" for n, row in enumerate(rows))]
    text = "".join(line.replace(",\n", "\n").replace(",split", "") for line in lines)
    assert archive.run(archive.table(text)) == 0
    split = archive.read("manifest.csv").groupby("patient_id")["split"].unique()
    assert {tuple(found) for found in split} == {("training",), ("test",)}
    table = archive.table(
        f"patient_id,{VINDR}p1,{vindr_row('s1', 'i1', 'training')}p1,{vindr_row('s2', 'i2', 'test')}"
    )
    assert archive.run(table) == 2
    assert "1 patients stand in more than one split: p1" in capsys.readouterr().err


def test_other_names_of_splits(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    splits = ("TEST", "Train", "val")
    for split in splits:
        archive.png(f"{split}/a.png")
    table = archive.table(VINDR + "".join(vindr_row(split, "a", split) for split in splits))
    assert archive.run(table) == 0
    files = ["test/TEST_a.png", "training/Train_a.png", "validation/val_a.png"]
    assert sorted(archive.read("manifest.csv")["file"]) == files
    assert f"--data_dir {archive.out / 'training'}\n" in capsys.readouterr().out
    assert archive.run(archive.table(VINDR + vindr_row("TEST", "a", "test"))) == 0
    assert "there is none to pre-train on" in capsys.readouterr().out


def cbis_row(
    kind: str, split: str, patient: str, side: str, view: str, number: int, **values: str
) -> str:
    """One abnormality; the second path of ROI cells goes over the line's end, as published."""
    top = f"{kind.title()}-{split}_{patient}_{side}_{view}"
    paths = [f"{top}/1.3.6.1/1.3.6.2.{number}/000000.dcm", f"{top}_{number}/1.3.6.3/1.3.6.4/000000.dcm"]
    cells = [patient, values.get("density", "3"), side, view, str(number), values.get("type", kind)]
    cells += ["SHAPE", "MARGIN", values.get("assessment", "4"), values.get("pathology", "BENIGN"), "3"]
    return ",".join([*cells, paths[0], f'"{paths[1]}\n"', f'"{paths[1]}\n"']) + "\n"


def test_cbis_ddsm(archive: Archive) -> None:
    mass = CBIS_MASS + cbis_row("mass", "Training", "P_00001", "LEFT", "CC", 1, assessment="2")
    mass += cbis_row(
        "mass", "Training", "P_00001", "LEFT", "CC", 2, pathology="MALIGNANT", assessment="5"
    )
    mass += cbis_row(
        "mass", "Training", "P_00001", "LEFT", "MLO", 1, pathology="BENIGN_WITHOUT_CALLBACK"
    )
    calc = CBIS_CALC + cbis_row(
        "calc", "Test", "P_00002", "RIGHT", "CC", 1, type="calcification", density="1"
    )
    calc += cbis_row("calc", "Test", "P_00003", "RIGHT", "MLO", 7, type="calcification")
    calc += cbis_row("calc", "Test", "P_00004", "RIGHT", "MLO", 8, type="calcification")
    # The path in the table; as the NBIA retriever lays it out; Kaggle's JPEG copy.
    archive.dicom("Mass-Training_P_00001_LEFT_CC/1.3.6.1/1.3.6.2.1/000000.dcm", ImageLaterality=None)
    archive.dicom("Mass-Training_P_00001_LEFT_MLO/07-20-2016-DDSM-1/1.0-full mammogram images-1/1-1.dcm")
    archive.dicom("Mass-Training_P_00001_LEFT_CC_1/07-21-2016-DDSM-1/1.0-ROI mask images-1/1-1.dcm")
    archive.dicom(
        "Calc-Test_P_00002_RIGHT_CC/a/b/1-1.dcm", ImageLaterality=None, ImagerPixelSpacing=None
    )
    archive.png("jpeg/1.3.6.2.7/1-263.jpg", breast(8))
    tables = [archive.table(mass, "mass.csv"), archive.table(calc, "calc.csv")]
    assert archive.run(tables) == 1  # P_00004 is not on disk
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    assert list(manifest["file"]) == [
        *["training/P_00001_Mass_LEFT_CC.png", "training/P_00001_Mass_LEFT_MLO.png"],
        *["test/P_00002_Calc_RIGHT_CC.png", "test/P_00003_Calc_RIGHT_MLO.png"],
    ]
    assert not (archive.out / "extra.csv").exists()  # crops and masks are known
    assert list(manifest["laterality"]) == ["L", "L", "R", "R"]
    assert list(manifest["view"]) == ["CC", "MLO", "CC", "MLO"]
    assert list(manifest["breast_density"]) == ["DENSITY C", "DENSITY C", "DENSITY A", "DENSITY C"]
    assert list(manifest["breast_birads"]) == ["BI-RADS 5", "BI-RADS 4", "BI-RADS 4", "BI-RADS 4"]
    assert list(manifest["patient_id"]) == ["P_00001", "P_00001", "P_00002", "P_00003"]
    assert labels[["mass", "calcification", "cancer"]].to_numpy().tolist() == [
        *[["1", "", "1"], ["1", "", "0"], ["", "1", "0"], ["", "1", "0"]]
    ]
    assert list(archive.read("missing.csv")["image_id"]) == ["Calc_RIGHT_MLO"]


def test_cbis_patient_in_two_splits(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    """Some patients are in the mass training and the calcification test set."""
    mass = CBIS_MASS + cbis_row("mass", "Training", "P_1", "LEFT", "CC", 1)
    calc = CBIS_CALC + cbis_row("calc", "Test", "P_1", "LEFT", "CC", 2, type="calcification")
    pixels = breast()
    for name in ("Mass-Training_P_1_LEFT_CC/x.png", "Calc-Test_P_1_LEFT_CC/x.png"):
        archive.png(name, pixels)
    tables = [archive.table(mass, "mass.csv"), archive.table(calc, "calc.csv")]
    message = refusal(archive, capsys, tables)
    assert "P_1 (test and training)" in message
    assert "--split test_wins" in message
    assert archive.run(tables, "--split", "test_wins") == 0
    assert "patient in two splits: 2 moved to test" in capsys.readouterr().out
    assert set(archive.read("manifest.csv")["split"]) == {"test"}
    assert len(archive.problems("patient in two splits")) == 2
    assert archive.problems("duplicate") == [
        "test/P_1_Calc_LEFT_CC.png: same as test/P_1_Mass_LEFT_CC.png"
    ]
    assert archive.run(tables, "--split", "patient", "--test_share", "0") == 0
    assert set(archive.read("manifest.csv")["split"]) == {"training"}


def test_inbreast(archive: Archive) -> None:
    rows = "removed;removed;R;CC;201001;20586908;2;4a\nremoved;removed;L;MLO;201001;20586934;     ;1\n"
    archive.dicom("AllDICOMs/20586908_6c613a14b80a8591_MG_R_CC_ANON.dcm", ImageLaterality="R")
    archive.dicom("AllDICOMs/20586934_6c613a14b80a8591_MG_L_ML_ANON.dcm")
    (archive.images / "AllDICOMs/20586934.xml").write_text("<plist/>")
    assert archive.run(archive.table(INBREAST + rows), "--test_share", "0.5") == 0
    manifest = archive.read("manifest.csv")
    assert list(manifest["image_id"]) == ["20586908", "20586934"]
    assert set(manifest["patient_id"]) == set(manifest["study_id"]) == {"6c613a14b80a8591"}
    assert manifest["split"].nunique() == 1
    assert list(manifest["breast_birads"]) == ["BI-RADS 4A", "BI-RADS 1"]
    assert list(manifest["breast_density"]) == ["DENSITY B", ""]
    assert list(manifest["view"]) == ["CC", "MLO"]


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_cmmd_takes_side_and_view_from_the_headers(archive: Archive, delimiter: str) -> None:
    rows = "D1-0001,R,44,2,calcification,Benign,\nD1-0002,L,40,4,both,Malignant,Luminal A\n"
    rows += "D1-0002,R,40,4,mass,Benign,\nD2-0003,L,40,2,mass,Benign,\n"
    cc = {"ViewCodeSequence": [coded("399162004")], "ViewPosition": None}
    folder = "CMMD/D1-0001/07-18-2010-NA-NA-79377/1.000000-NA-70244"
    archive.dicom(f"{folder}/1-1.dcm", ImageLaterality="R", **cc)
    archive.dicom(f"{folder}/1-2.dcm", ImageLaterality="R")
    archive.dicom("CMMD/D1-0002/a/1-1.dcm", ImageLaterality="L")
    archive.dicom("CMMD/D1-0002/b/1-1.dcm", ImageLaterality="R")
    text = (CMMD + rows).replace(",", delimiter)
    assert archive.run(archive.table(text), "--test_share", "0") == 1
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    names = ["D1-0001_1-1", "D1-0001_1-2", "D1-0002_a_1-1", "D1-0002_b_1-1"]
    assert list(manifest["file"]) == [f"training/{name}.png" for name in names]
    assert list(manifest["view"]) == ["CC", "MLO", "MLO", "MLO"]
    assert list(labels["laterality"]) == ["R", "R", "L", "R"]
    assert labels[["mass", "calcification", "cancer"]].to_numpy().tolist() == [
        *[["0", "1", "0"], ["0", "1", "0"], ["1", "1", "1"], ["1", "0", "0"]]
    ]
    assert list(archive.read("missing.csv")["study_id"]) == ["D2-0003"]


def test_rsna(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "2,10006,462822612,L,CC,61.0,0,0,0,,0,,29,False\n"
    rows += "2,10006,1459541791,L,MLO,61.0,1,1,1,0.0,1,B,29,False\n"
    archive.dicom("10006/462822612.dcm", ViewPosition="MLO")
    archive.png("10006_1459541791.png")
    assert archive.run(archive.table(RSNA + rows), "--test_share", "1") == 0
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    assert list(manifest["file"]) == ["test/10006_462822612.png", "test/10006_1459541791.png"]
    assert list(manifest["implant"]) == ["0", "1"]
    assert list(manifest["breast_birads"]) == ["", "BI-RADS 0"]
    assert list(manifest["breast_density"]) == ["", "DENSITY B"]
    assert list(labels["cancer"]) == ["0", "1"]
    assert set(labels["mass"]) | set(labels["calcification"]) | set(labels["boxes"]) == {""}
    assert archive.problems("view") == ["test/10006_462822612.png: table CC, header MLO"]
    assert "note: read as RSNA 2022" in capsys.readouterr().out


COLUMNS = "image=path,study=exam,patient=who,split=fold,laterality=side,view=proj,birads=grade,"
COLUMNS += "density=acr,implant=imp,spacing=mm,mass=m,calcification=c"


def test_generic_columns(archive: Archive) -> None:
    text = "path,exam,who,fold,side,proj,grade,acr,imp,mm,m,c\n"
    text += "sub dir/one.png,E 1,p1,training,left,cc,4B,4,no,0.07,yes,0\n"
    text += "two,E2,p2,test,RIGHT,mlo,1,b,,,,1\n"
    archive.png("sub dir/one.png")
    archive.png("deeper/two.png")
    assert archive.run(archive.table(text), "--columns", COLUMNS) == 0
    manifest, labels = archive.read("manifest.csv"), archive.labels()
    assert list(manifest["file"]) == ["training/E_1_sub_dir_one.png", "test/E2_two.png"]
    first = manifest.iloc[0]
    assert (first.laterality, first["view"], first.breast_birads) == ("L", "CC", "BI-RADS 4B")
    assert (first.breast_density, first.implant, first.spacing_mm) == ("DENSITY D", "0", "0.07")
    assert labels[["mass", "calcification"]].to_numpy().tolist() == [["1", "0"], ["", "1"]]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("image=path", "image and study are needed"),
        ("image=path,study=exam,colour=x", "'colour' is not known"),
        ("image=path,study=", "'study' is not known"),
        ("image=path,study=examination", "examination (nearest: exam)"),
        (
            "image=path,study=exam,cancer=exam",
            "1 of 1 values of exam are not understood: 'E1' (1); malignant, benign",
        ),
    ],
)
def test_wrong_columns_are_refused(
    archive: Archive, columns: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.png("one.png")
    table = archive.table("path,exam\none.png,E1\n")
    assert expected in refusal(archive, capsys, table, "--columns", columns)


def test_no_table_needs_an_image(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no image below" in refusal(archive, capsys, "none")


def test_long_and_odd_paths_make_safe_names(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    uid = "1.2.840.113619.2.255.10452022879169.3670200103440"
    archive.png(f"study é/{uid}/{uid}/{uid}/image.png")
    archive.png("alone.png")
    assert archive.run("none", "--test_share", "0") == 0
    names = [name.removeprefix("training/") for name in archive.read("manifest.csv")["file"]]
    assert names[0] == "alone_alone.png"
    assert "note: 1 images lie in no folder of their own" in capsys.readouterr().out
    assert names[1].startswith("study_")
    assert names[1].endswith("image.png")
    assert len(names[1]) < 205


def test_folders_are_patients(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("患者", "病人", "p3"):
        archive.png(f"{name}/1.png")
    assert archive.run("none") == 0
    assert archive.read("manifest.csv")["patient_id"].nunique() == 3
    assert "count as one patient" not in capsys.readouterr().out
    inner = archive.folder / "download" / "images"
    inner.parent.mkdir()
    archive.images.rename(inner)
    places = ["--images_root", str(inner.parent), "--output_dir", str(archive.folder / "again")]
    assert prep.main(["--csv_path", "none", *places]) == 0
    assert "all images count as one patient" in capsys.readouterr().out


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_safe_names_are_safe(name: str) -> None:
    safe = prep.safe_name(name)
    assert safe == "" or prep.is_safe_name(safe)
    if prep.is_safe_name(name):
        assert safe == name


def test_split_by_patient_is_the_same_whatever_else_is_there() -> None:
    table = pd.DataFrame({"study_id": [f"p{n}" for n in range(2000)]})
    whole = prep.split_by_patient(table, 0.2)
    pd.testing.assert_series_equal(prep.split_by_patient(table[::7], 0.2), whole[::7])
    assert abs((whole == "test").mean() - 0.2) < 0.03
    assert set(prep.split_by_patient(table, 0)) == {"training"}
    more = prep.split_by_patient(table, 0.4)
    assert (more[whole == "test"] == "test").all()  # a larger share only adds


# Labels -------------------------------------------------------------------------------------------


def finding(
    study: str, image: str, names: str, box: str = ",,,", size: str = "96,80", side: str = ""
) -> str:
    row = f"{study},x,{image},{side},CC,{size},BI-RADS 4,DENSITY C"
    return f'{row},"{names}",BI-RADS 4,{box},training\n'


def vindr_with_findings(archive: Archive, findings: str, *extra: str, code: int = 0) -> pd.DataFrame:
    """Lay four images (two left, two right of 96 x 80) out with these findings; their labels."""
    sides = {"a": "L", "b": "R", "c": "L", "d": "R"}
    rows = "".join(vindr_row("s1", image, "training", side) for image, side in sides.items())
    for image, side in sides.items():
        archive.png(f"s1/{image}.png", breast(side=side, seed=ord(image)))
    path = archive.table(FINDINGS + findings, "finding_annotations.csv")
    assert archive.run(archive.table(VINDR + rows), "--findings_csv", path, *extra) == code
    return archive.labels()


def boxes(labels: pd.DataFrame, image: str) -> list[dict]:
    return json.loads(labels.loc[f"training/s1_{image}.png", "boxes"])


def test_findings_become_labels(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    text = finding("s1", "a", "['Mass', 'Suspicious Calcification']", "10.25,20,30,40")
    text += finding("s1", "a", "['Skin Thickening']", "1,2,3,4")
    text += finding("s1", "b", "['No Finding']") + finding("s1", "c", "['Nipple Retraction']")
    text += finding("s9", "z", "['Mass']", "1,2,3,4")
    labels = vindr_with_findings(archive, text)
    assert list(labels.columns) == [*prep.LABELS, "nipple_retraction", "skin_thickening"]
    columns = ["mass", "calcification", "skin_thickening", "nipple_retraction"]
    assert labels[columns].to_numpy().tolist() == [
        *[list("1110"), list("0000"), list("0001"), ["", "", "", ""]]  # the last is not listed: unknown
    ]
    assert list(labels["image"]) == list(archive.read("manifest.csv")["file"])
    assert boxes(labels, "a") == [
        {
            "finding": ["Mass", "Suspicious Calcification"],
            "xmin": 10.25,
            "ymin": 20,
            "xmax": 30,
            "ymax": 40,
        },
        {"finding": ["Skin Thickening"], "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4},
    ]
    assert boxes(labels, "b") == boxes(labels, "c") == []
    assert labels["boxes"].iloc[3] == ""
    assert "1 images of finding_annotations.csv are not in the table: s9/z" in capsys.readouterr().out


def test_findings_join_what_the_table_says(archive: Archive) -> None:
    archive.png("s1/a.png")
    table = archive.table("exam,path,cancer,who\ns1,s1/a.png,1,p7\n")
    path = archive.table(FINDINGS + finding("s1", "s1_a", "['Mass']", "1,2,30,40"), "findings.csv")
    columns = "study=exam,image=path,cancer=cancer,patient=who"
    assert archive.run(table, "--columns", columns, "--findings_csv", path, "--test_share", "0") == 0
    row = archive.labels().iloc[0]
    assert (row["mass"], row["calcification"], row["cancer"], row["patient_id"]) == ("1", "0", "1", "p7")
    assert len(json.loads(row["boxes"])) == 1


def test_boxes_that_leave_the_image(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    text = finding("s1", "a", "['Mass']", "-5,-1,20,30") + finding(
        "s1", "b", "['Mass']", "70,90,85.5,96.5"
    )
    text += finding("s1", "c", "['Mass']", "81,1,90,9") + finding("s1", "d", "['Mass']", "0,0,80,96")
    labels = vindr_with_findings(archive, text)
    corners = [[tuple(box[name] for name in prep.BOX) for box in boxes(labels, i)] for i in "abcd"]
    assert corners == [[(0, 0, 20, 30)], [(70, 90, 80, 96)], [], [(0, 0, 80, 96)]]
    output = capsys.readouterr().out
    assert "boxes clipped: 2 " in output
    assert "boxes dropped: 1 " in output
    assert set(labels["mass"]) == {"1"}


def test_boxes_of_resized_images(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice as large in the table: halved. Another aspect (as 912 x 1520 of every film): dropped."""
    text = finding("s1", "a", "['Mass']", "20,40,60,80", "192,160")
    text += finding("s1", "b", "['Mass']", "20,40,60,80", "192,80")
    labels = vindr_with_findings(archive, text)
    assert boxes(labels, "a") == [{"finding": ["Mass"], "xmin": 10, "ymin": 20, "xmax": 30, "ymax": 40}]
    assert boxes(labels, "b") == []
    assert "the aspect is not the table's" in capsys.readouterr().out


def test_boxes_are_mirrored_with_the_image(archive: Archive) -> None:
    text = "".join(finding("s1", image, "['Mass']", "10,20,30,40") for image in "ab")
    labels = vindr_with_findings(archive, text, "--flip_right")
    assert boxes(labels, "a") == [{"finding": ["Mass"], "xmin": 10, "ymin": 20, "xmax": 30, "ymax": 40}]
    assert boxes(labels, "b") == [{"finding": ["Mass"], "xmin": 50, "ymin": 20, "xmax": 70, "ymax": 40}]
    assert list(archive.read("manifest.csv")["flipped"]) == ["0", "1", "0", "1"]


coordinate = st.floats(-200, 300, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.tuples(coordinate, coordinate, coordinate, coordinate), st.booleans())
def test_fitted_boxes_lie_inside(corners: tuple[float, ...], flipped: bool) -> None:
    box = {"finding": ["Mass"], **dict(zip(prep.BOX, corners, strict=True))}
    image = {"height": "96", "width": "80", "flipped": str(int(flipped)), "file": "f", "split": "s"}
    plan = prep.Plan(prep.parse_options([]), [], {}, {}, {}, pd.DataFrame(), [], [], [])
    for fitted in prep.fit_boxes(prep.ImageLabels({}, [box]), image, plan):
        assert 0 <= fitted["xmin"] <= fitted["xmax"] <= 80
        assert 0 <= fitted["ymin"] <= fitted["ymax"] <= 96


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FINDINGS + finding("s1", "a", "__import__('os').system('x')"), "line 2"),
        (FINDINGS + finding("s1", "a", "Mass"), "is not a list"),
        (FINDINGS.replace("xmin,", ""), "lacks the column xmin"),
    ],
)
def test_wrong_findings_are_refused(
    archive: Archive, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.png("s1/a.png")
    table = archive.table(VINDR + vindr_row("s1", "a", "training"))
    path = archive.table(text, "finding_annotations.csv")
    assert expected in refusal(archive, capsys, table, "--findings_csv", path)


def test_labels_of_others_are_not_overwritten(archive: Archive) -> None:
    archive.out.mkdir()
    (archive.out / "labels.csv").write_text("my,own\n1,2\n")
    archive.png("s1/a.png")
    path = archive.table(FINDINGS + finding("s1", "a", "['Mass']"), "finding_annotations.csv")
    table = archive.table(VINDR + vindr_row("s1", "a", "training"))
    assert archive.run(table, "--findings_csv", path) == 2
    assert (archive.out / "labels.csv").read_text() == "my,own\n1,2\n"
    assert archive.run(table) == 0  # without labels there is nothing in the way


# Orientation --------------------------------------------------------------------------------------


def test_flip_right_puts_every_chest_wall_left(archive: Archive) -> None:
    """By what is seen, where it is clear (the second is mirrored against its tag); back when undone."""
    rows, truth = "", {}
    for image, tag, side in (("a", "R", "R"), ("b", "L", "R"), ("c", "L", "L"), ("d", "R", "L")):
        rows += vindr_row("s1", image, "training", tag)
        truth[image] = breast(side=side, seed=ord(image))
        archive.png(f"s1/{image}.png", truth[image])
    table = archive.table(VINDR + rows)
    assert archive.run(table, "--flip_right", "--mode", "copy") == 0
    manifest = archive.read("manifest.csv")
    assert list(manifest["flipped"]) == ["1", "1", "0", "0"]
    for image, flipped in zip("abcd", manifest["flipped"], strict=True):
        shown = cv2.imread(str(archive.out / f"training/s1_{image}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(shown, truth[image][:, :: -1 if flipped == "1" else 1])
        assert prep.examine(shown)["chest_wall"] == "left"
    assert len(archive.problems("side")) == 2
    assert archive.run(table, "--mode", "copy") == 0
    assert set(archive.read("manifest.csv")["flipped"]) == {"0"}
    for image in "abcd":
        output = archive.out / f"training/s1_{image}.png"
        assert output.read_bytes() == (archive.images / f"s1/{image}.png").read_bytes()


def test_flip_right_follows_the_tag_where_nothing_is_seen(archive: Archive) -> None:
    flat = np.tile(np.arange(80, dtype=np.uint8), (96, 1)) % 2
    rows = "".join(vindr_row("s1", image, "training", tag) for image, tag in (("a", "R"), ("b", "")))
    for image in "ab":
        archive.png(f"s1/{image}.png", flat)
    table = archive.table(VINDR + rows)
    assert archive.run(table, "--flip_right") == 0
    assert list(archive.read("manifest.csv")["flipped"]) == ["1", "0"]
    assert archive.problems("no laterality") == ["training/s1_b.png: left as it is"]
    # The tag is part of what decides: once corrected, the image is made anew.
    assert archive.run(archive.table(VINDR + rows.replace(",R,", ",L,")), "--flip_right") == 0
    shown = cv2.imread(str(archive.out / "training/s1_a.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(shown, flat)


# Checks -------------------------------------------------------------------------------------------


def test_checks_name_what_is_wrong(archive: Archive) -> None:
    """One image of each fault; the report has them all."""
    normal, rows = breast(seed=99), ""
    faults = {
        "same": (normal, "training", "L"), "copy": (normal, "test", "L"),
        "inverted": (4095 - breast(seed=1), "training", "L"),
        "blank": (np.full((96, 80), 7, np.uint16), "training", "L"),
        "side": (breast(side="R", seed=2), "training", "L"),
        "wide": (breast(shape=(96, 90), seed=3), "training", "L"),
        "half": (breast(shape=(48, 40), seed=4), "training", "L"),
    }  # fmt: skip
    for image, (pixels, split, tag) in faults.items():
        rows += vindr_row(f"s_{image}", image, split, tag)
        archive.png(f"s_{image}/{image}.png", pixels)
    raw = {"PresentationIntentType": "FOR PROCESSING", "PixelIntensityRelationship": "LIN"}
    archive.dicom("s_raw/raw.dcm", ViewPosition="CC", **raw)
    archive.dicom("s_odd/odd.dcm", ViewPosition="CC", Modality=None, ImageLaterality="R")
    padded = np.where(np.arange(80) >= 30, 4095, breast(seed=8) // 2).astype(np.uint16)
    save(make_dicom(padded, PixelPaddingValue=4095), archive.images / "s_pad/pad.dcm")
    rows += "".join(vindr_row(f"s_{image}", image, "training") for image in ("raw", "odd", "pad"))
    assert archive.run(archive.table(VINDR + rows), "--verify") == 0
    problems = archive.read("problems.csv")
    assert [f"{p['check']}: {p['file']}: {p['detail']}" for p in problems.to_dict("records")] == [
        "duplicate: test/s_copy_copy.png: same as training/s_same_same.png, ACROSS SPLITS",
        "polarity: training/s_inverted_inverted.png: "
        "the pixels look inverted (vote -0.37 between -1 and 1)",
        "blank: training/s_blank_blank.png: value 7",
        "side: training/s_side_side.png: laterality L, chest wall right",
        "different size: training/s_wide_wide.png: 96 x 90, CSV 96 x 80",
        "aspect: training/s_wide_wide.png: height x 1.000, width x 1.125",
        "different size: training/s_half_half.png: 48 x 40, CSV 96 x 80",
        "raw: training/s_raw_raw.png: FOR PROCESSING LIN",
        "laterality: training/s_odd_odd.png: table L, header R",
        "no modality: training/s_odd_odd.png: Modality is empty",
        "padding: training/s_pad_pad.png: 62% of the pixels",
        "view: training/s_pad_pad.png: table CC, header MLO",
    ]
    page = (archive.out / "prepare_report.html").read_text()
    assert [detail for detail in problems["detail"] if detail not in page] == []
    assert "<tr><td>12</td><td>8</td></tr>" in page  # bits used


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("inverted", [False, True])
def test_side_and_polarity_are_seen(side: str, inverted: bool) -> None:
    image = breast(16, (400, 320), side)
    facts = prep.examine(65535 - image if inverted else image)
    assert facts["chest_wall"] == {"L": "left", "R": "right"}[side]
    assert facts["air"] == ("bright" if inverted else "dark")


def test_pixel_hash_tells_images_apart() -> None:
    image = breast()
    other = image.copy()
    other[0, 0] ^= 1
    hashes = [prep.examine(x)["content"] for x in (image, other, image.reshape(80, 96), image.copy())]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]


def test_duplicates_are_seen_without_decoding_and_markup_is_escaped(archive: Archive) -> None:
    archive.png("s1/a.png", breast())
    archive.png("s2/b.png", breast())
    (archive.images / "s2/<b>x.png").write_bytes(b"")
    table = archive.table(VINDR + vindr_row("s1", "a", "training") + vindr_row("s2", "b", "training"))
    assert archive.run(table) == 0
    assert archive.problems("duplicate") == [
        "training/s2_b.png: same as training/s1_a.png, across studies"
    ]
    page = (archive.out / "prepare_report.html").read_text()
    assert "s2/&lt;b&gt;x.png" in page
    assert "2 PNG were not decoded" in page


def test_manifest_of_an_earlier_version_is_taken_over(archive: Archive) -> None:
    archive.png("s1/a.png")
    table = archive.table(VINDR + vindr_row("s1", "a", "training"))
    assert archive.run(table) == 0
    before = (archive.out / "manifest.csv").read_bytes()
    old = archive.read("manifest.csv").drop(columns=prep.REPORTS["manifest.csv"][14:])
    old.to_csv(archive.out / "manifest.csv", index=False)
    assert archive.run(table) == 0
    assert (archive.out / "manifest.csv").read_bytes() == before


def test_names_that_become_one_when_made_safe_stay_apart(tmp_path):
    for name in ("a b.png", "a_b.png", "A_b.png"):
        path = tmp_path / "images" / "p1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((60, 50), len(name) + (name[0] == "A"), np.uint8))
    flags = ["--csv_path", "none", "--images_root", str(tmp_path / "images")]
    assert prep.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    manifest = pd.read_csv(tmp_path / "out" / "manifest.csv")
    assert len(manifest) == 3
    assert manifest["file"].str.lower().nunique() == 3
