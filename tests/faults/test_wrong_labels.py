# ruff: noqa: E501 - a table reads better in long lines
"""prepare_dataset: labels, splits and images that part company. What can be read in two ways is refused in
one line or said in the summary; what is read in one way is read so."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import pandas as pd
import pytest
from test_prepare_archives import (
    CBIS_MASS,
    CMMD,
    FINDINGS,
    INBREAST,
    RSNA,
    VINDR,
    Archive,
    cbis_row,
    finding,
    vindr_row,
)

import byol_mammo.images
import byol_mammo.labels
import prepare_dataset as prep
from byol_mammo import archives
from byol_mammo.settings import MammoError

PATHS = ("--columns", "image=path,study=exam")
LABELLED = ("--columns", "image=path,study=exam,patient=who,mass=m,birads=grade,laterality=side")


@pytest.fixture
def archive(tmp_path):
    return Archive(tmp_path)


@dataclass(frozen=True)
class Case:
    """Images and tables, a command, its exit code and what it says; what the manifest has then."""

    images: tuple[str, ...]
    tables: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    manifest: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)


LCC = tuple(f"p{n}/LCC.png" for n in (1, 2, 3))
FLAT = ("a.png", "b.png")
MANY = tuple(f"{name}/{n}.png" for name in ("left", "right") for n in range(20))
CASES = {
    # One name, several images -------------------------------------------------------------------
    "a bare name in several folders": Case(
        LCC, ("path,exam\nLCC.png,e1\n",), 2, ("t0.csv line 2 (p1/LCC.png, p2/LCC.png, p3/LCC.png)",), PATHS),
    "a bare name whose study is the folder": Case(
        LCC, ("path,exam\nLCC.png,p1\nLCC.png,p2\n",), 0, ("extra: 1",), PATHS,
        {"source": ["p1/LCC.png", "p2/LCC.png"]}),
    "a bare name whose patient is the folder": Case(
        LCC, ("path,exam,who\nLCC.png,e1,p1\nLCC.png,e2,p3\n",), 0, (),
        ("--columns", "image=path,study=exam,patient=who"), {"source": ["p1/LCC.png", "p3/LCC.png"]}),
    "a bare name whose folder's name holds the patient's": Case(
        tuple(f"p{n}_{year}/LCC.png" for n in (1, 2) for year in (2015, 2018)),
        ("path,exam\n" + "".join(f"LCC.png,p{n}_{year}\n" for n in (2, 1) for year in (2018, 2015)),), 0, (),
        (*PATHS, "--patient_pattern", "(p\\d+)_"), {"patient_id": ["p2", "p2", "p1", "p1"]}),
    "a bare name of which nothing tells the folder, and a pattern": Case(
        LCC, ("path,exam\nLCC.png,e1\n",), 2, ("1 rows fit several images each",),
        (*PATHS, "--patient_pattern", "^(p\\d+)/")),
    "two rows of one file": Case(
        ("p1/a.png",), ("path,exam\np1/a.png,e1\na.png,e2\n",), 2,
        ("1 files are meant by several rows: p1/a.png (t0.csv line 2, t0.csv line 3)",), PATHS),
    "folders of another machine": Case(
        ("p1/a.png", "p2/a.png", "p3/b c.png"),
        ("path,exam\n/data/x/p1/a.png,e1\nC:\\x\\p2\\a.png,e2\n./p3/b c.png,e3\n",), 0, (), PATHS,
        {"source": ["p1/a.png", "p2/a.png", "p3/b c.png"]}),
    "a bare name whose folder is not there": Case(
        ("p1/LCC.png", "p1/RCC.png"), ("path,exam,who\nLCC.png,e1,p1\nRCC.png,e2,p2\n",), 1, ("missing: 1",),
        ("--columns", "image=path,study=exam,patient=who"), {"source": ["p1/LCC.png"]}),
    "a path that is elsewhere": Case(
        ("p1/a.png", "p2/b.png"), ("path,exam\np1/a.png,e1\np3/b.png,e2\n",), 1, ("missing: 1",), PATHS),
    # Rows that disagree -------------------------------------------------------------------------
    "two tables that disagree": Case(
        FLAT, ("path,exam,m\na.png,e1,1\nb.png,e2,0\n", "path,exam,m\na.png,e1,0\n"), 2,
        ("rows about e1/a disagree (t0.csv line 2, t1.csv line 2): m: '1' and '0'", "--on_conflict"),
        ("--columns", "image=path,study=exam,mass=m")),
    **{f"two tables that disagree, {rule}": Case(
        FLAT, ("path,exam,who,m,grade,side\na.png,e1,p,1,2,L\nb.png,e2,q,0,1,L\n",
               "path,exam,who,m,grade,side\na.png,e1,p,0,4b,L\n"), 0,
        (f"1 have rows that disagree; --on_conflict {rule} chose",), (*LABELLED, "--on_conflict", rule),
        {"breast_birads": [grade, "BI-RADS 1"]}, {"mass": [mass, "0"]})
       for rule, mass, grade in (("first", "1", "BI-RADS 2"), ("last", "0", "BI-RADS 4B"), ("max", "1", "BI-RADS 4B"))},
    "two tables that complete each other": Case(
        FLAT, ("path,exam,m\na.png,e1,1\nb.png,e2,0\n", "path,exam,c\na.png,e1,0\nb.png,e2,1\n"), 0,
        ("2 rows complete others about the same: joined",),
        ("--columns", "image=path,study=exam,mass=m,calcification=c"), {}, {"mass": ["1", "0"], "calcification": ["0", "1"]}),
    "max cannot choose a side": Case(
        FLAT, ("path,exam,who,m,grade,side\na.png,e1,p,1,2,L\na.png,e1,p,1,2,R\n",), 2,
        ("side: 'L' and 'R'; max cannot tell",), (*LABELLED, "--on_conflict", "max")),
    "CMMD with two opinions of a breast": Case(
        ("D1-0001/1.dcm",), (CMMD + "D1-0001,L,4,2,mass,Benign,\nD1-0001,L,4,2,mass,Malignant,\n",), 2,
        ("rows about D1-0001/L disagree", "classification: '0' and '1'")),
    "CBIS film with opposite abnormalities": Case(
        ("Mass-Training_P_1_LEFT_CC/a.png",),
        (CBIS_MASS + cbis_row("mass", "Training", "P_1", "LEFT", "CC", 1)
         + cbis_row("mass", "Training", "P_1", "LEFT", "CC", 2, pathology="MALIGNANT"),), 0,
        ("1 films have rows of several abnormalities, 1 of them benign and malignant", "cancer"),
        (), {}, {"cancer": ["1"]}),
    "CBIS film of two densities": Case(
        ("Mass-Training_P_1_LEFT_CC/a.png",),
        (CBIS_MASS + cbis_row("mass", "Training", "P_1", "LEFT", "CC", 1, density="4")
         + cbis_row("mass", "Training", "P_1", "LEFT", "CC", 2, density="2"),), 0,
        ("1 films have rows of different density: the last counts",), (), {"breast_density": ["DENSITY B"]}),
    "CBIS film of a recall and a benign abnormality": Case(
        ("Mass-Training_P_1_LEFT_CC/a.png",),
        (CBIS_MASS + cbis_row("mass", "Training", "P_1", "LEFT", "CC", 1, assessment="0")
         + cbis_row("mass", "Training", "P_1", "LEFT", "CC", 2, assessment="2"),), 0, (), (),
        {"breast_birads": ["BI-RADS 0"]}),
    "CBIS path without a split": Case(
        ("x/a.png",), (CBIS_MASS + cbis_row("mass", "Other", "P_1", "LEFT", "CC", 1),), 2,
        ("t0.csv line 2: image file path 'Mass-Other_P_1_LEFT_CC",)),
    # Folders ------------------------------------------------------------------------------------
    "folders named as splits": Case(
        ("Train/p1/a.png", "Train/p2/b.png", "VALID/p3/c.png", "test/p4/d.png"), (), 0,
        ("the folders Train, VALID, test are taken as splits: test 1 images, training 2 images",), (),
        {"split": ["training", "training", "validation", "test"], "patient_id": ["p1", "p2", "p3", "p4"]}),
    "folders whose names hold a split": Case(
        ("train_images/p1/a.png", "Test-set/p2/b.png", "images_val/p3/c.png"), (), 0,
        ("the folders Test-set, images_val, train_images are taken as splits",), (),
        {"split": ["test", "training", "validation"], "patient_id": ["p1", "p2", "p3"]}),
    "a patient in two folders named as splits": Case(
        ("train/p1/a.png", "test/p1/b.png"), (), 2, ("p1 (test and training)",)),
    "some folders named as splits": Case(
        ("train/a/1.png", "p1/b.png"), (), 2, ("train are named as splits, beside them p1",)),
    "splits below another folder": Case(
        ("data/train/1.png", "data/test/2.png"), (), 2, ("test, train) lie below data", "--images_root")),
    "CBIS folders without a table": Case(
        ("CBIS/Mass-Training_P_1_LEFT_CC/a.png", "CBIS/Calc-Test_P_1_LEFT_CC/b.png"), (), 2,
        ("are CBIS-DDSM's", "--csv_path mass_case_description")),
    "CBIS folders and a pattern": Case(
        ("Mass-Training_P_1_LEFT_CC/a.png", "Calc-Test_P_1_LEFT_CC/b.png"), (), 0, (),
        ("--patient_pattern", "(P_[0-9]+)"), {"patient_id": ["P_1", "P_1"]}),
    "images alone below splits": Case(
        ("train/1.png", "test/1.png"), (), 0, ("2 images lie in no folder of their own",), (),
        {"split": ["test", "training"]}),
    "classes by name": Case(
        ("benign/1.png", "malignant/2.png"), (), 2, ("benign (1 images), malignant (1 images) look like classes",)),
    **{f"classes named {names[0]} ...": Case(
        tuple(f"{name}/{n}.png" for name in names for n in range(count)), (), 2, ("look like classes",))
       for names, count in ((("Benigns", "Cancers"), 2), (("BIRADS_1", "BIRADS_4"), 17), (("0", "1"), 17),
                            (("images", "masks"), 2), (("LCC", "RMLO"), 2))},
    "patients named by class and number": Case(
        tuple(f"{name}/{view}.png" for name in ("normal_001", "benign_002", "2") for view in ("LCC", "RCC")), (), 0,
        (), (), {"patient_id": ["benign_002"] * 2 + ["normal_001"] * 2 + ["2"] * 2}),
    "classes below splits": Case(("train/benign/1.png", "test/benign/2.png"), (), 2, ("look like classes",)),
    "classes by size": Case(MANY, (), 2, ("left (20 images), right (20 images)", "--patient_pattern")),
    "classes and a pattern": Case(
        tuple(f"{name}/w{n // 2}_{n}.png" for name in ("left", "right") for n in range(20)), (), 0, (),
        ("--patient_pattern", r"/(w\d+)_"), {"patient_id": [f"w{n // 2}" for _ in range(2) for n in range(20)]}),
    "a pattern that misses": Case(
        FLAT, (), 2, (r"'(\\d+)' finds no patient in 'a'",), ("--patient_pattern", r"(\d+)")),
    "no pattern": Case(FLAT, (), 2, ("is no regular expression",), ("--patient_pattern", "(")),
    "a flat folder": Case(FLAT, (), 0, ("images of one woman may fall on both sides", "--patient_pattern")),
    "studies without a patient": Case(
        FLAT, ("path,exam\na.png,e1\nb.png,e2\n",), 0, ("each of 2 studies counts as one",), PATHS),
    # Women --------------------------------------------------------------------------------------
    "INbreast's numbers alone": Case(
        ("22678622.png", "22678646.png"), (), 2, ("eight digits alone, as INbreast's", "--test_share 0")),
    "INbreast's numbers alone, no test split": Case(
        ("22678622.png", "22678646.png"), (), 0, (), ("--test_share", "0")),
    "INbreast's names without a table": Case(
        ("22678622_3d44a9ec6e1a1bc0_MG_R_CC_ANON.png", "22678646_3d44a9ec6e1a1bc0_MG_L_CC_ANON.png"), (), 0, (),
        (), {"patient_id": ["3d44a9ec6e1a1bc0"] * 2}),
    "INbreast's table and bare names": Case(
        ("22678622.png",), (INBREAST + "removed;removed;R;CC;2010;22678622;2;4a\n",), 2,
        ("1 files are named by INbreast's image number alone",)),
    "INbreast's table with patients and totals": Case(
        ("22678622.png", "22678646.png"),
        (INBREAST + "P7;removed;R;CC;2010;22678622.0;2;4a\nP7;removed;L;CC;2010;22678646;2;1\nTotal;;;;;;410;\n",),
        0, ("1 rows without a number as File Name left out: totals",), (), {"patient_id": ["P7", "P7"]}),
    "a patient in two spellings, two splits": Case(
        ("a.png", "b.png"), ("path,exam,who,fold\na.png,e1,007,train\nb.png,e2,7.0,test\n",), 2,
        ("007 (test and training)",), ("--columns", "image=path,study=exam,patient=who,split=fold")),
    "a patient in two spellings, split by chance": Case(
        tuple(f"{n}.png" for n in range(8)),
        ("path,exam,who\n" + "".join(f"{n}.png,e{n},{'P p'[n % 2 * 2]}{n // 2}\n" for n in range(8)),), 0,
        ("4 values of patient_id are written in several ways", "P0 = p0"),
        ("--columns", "image=path,study=exam,patient=who", "--test_share", "0.5")),
    "a study of which one row names the patient": Case(
        ("a.png", "b.png", "c.png"), ("path,exam,who\na.png,e1,w\nb.png,e1,\nc.png,e2,w\n",), 0, (),
        ("--columns", "image=path,study=exam,patient=who", "--test_share", "0.5")),
    "a study of two women": Case(
        FLAT, ("path,exam,who\na.png,e1,p1\nb.png,e1,p2\n",), 2, ("e1 (p1 and p2)", "A study is of one woman"),
        ("--columns", "image=path,study=exam,patient=who")),
    "a patient whose cell is a spreadsheet's error": Case(
        tuple(f"{n}.png" for n in range(4)),
        ("path,exam,who\n0.png,e0,#N/A\n1.png,e1,None\n2.png,e2,#REF!\n3.png,e3,w\n",), 0,
        ("3 rows name no patient",),
        ("--columns", "image=path,study=exam,patient=who", "--test_share", "0.5"), {"patient_id": ["", "", "", "w"]}),
    "an id cut where numbers have a comma": Case(
        FLAT, ('path,exam\na.png,"1,23457E+15"\nb.png,e2\n',), 2, ("exam '1_23457E_15' is an id",), PATHS),
    "a column twice but for a blank": Case(
        FLAT, ("path,exam,m,m \na.png,e1,1,0\nb.png,e2,0,1\n",), 2, ("has the column m twice",),
        ("--columns", "image=path,study=exam,mass=m")),
    "a folder of two spellings of one letter": Case(
        ("M\u00fcller/0.png", "Mu\u0308ller/1.png", "x/2.png"), (), 0, (),
        ("--test_share", "0.5"), {"patient_id": ["M_ller", "M_ller", "x"]}),
    "no study": Case(
        FLAT, ("path,exam\na.png,e1\nb.png,\n",), 2, ("t0.csv line 3: exam is empty",), PATHS),
    # Values -------------------------------------------------------------------------------------
    "usual spellings": Case(
        FLAT, ("path,exam,who,m,grade,side\na.png,e1,p,2,BI-RADS: 4,rt\nb.png,e2,q,absent,birads 5,Left breast\n",),
        0, (), LABELLED, {"laterality": ["R", "L"], "breast_birads": ["BI-RADS 4", "BI-RADS 5"]},
        {"mass": ["1", "0"]}),
    "codes or counts": Case(
        FLAT, ("path,exam,m\na.png,e1,1\nb.png,e2,2\n",), 2, ("t0.csv line 3: m is 2, and no row has 0",),
        ("--columns", "image=path,study=exam,mass=m")),
    "counts": Case(
        FLAT, ("path,exam,m\na.png,e1,0\nb.png,e2,2\n",), 0, ("1 values of m are counts above 1: present",),
        ("--columns", "image=path,study=exam,mass=m"), {}, {"mass": ["0", "1"]}),
    "ids cut by a spreadsheet": Case(
        FLAT, ("path,exam,who\na.png,e1,123000\nb.png,e2,1.23E+05\n",), 2,
        ("t0.csv line 3: who '1.23E+05' is an id of which a spreadsheet has cut",),
        ("--columns", "image=path,study=exam,patient=who")),
    "a patient with a letter that nobody sees": Case(
        FLAT, ("path,exam,who,fold\na.png,e1,P1,train\nb.png,e2,P1\u200b,test\n",), 2, ("P1 (test and training)",),
        ("--columns", "image=path,study=exam,patient=who,split=fold")),
    "a pattern beside a column": Case(
        FLAT, ("path,exam,who\na.png,e1,p1\nb.png,e2,p2\n",), 2, ("names the patients itself|names the patients, so",),
        ("--columns", "image=path,study=exam,patient=who", "--patient_pattern", "a|b")),
    "a pattern for a table": Case(
        ("x/p1_a.png", "x/p2_b.png"), ("path,exam\np1_a.png,e1\np2_b.png,e2\n",), 0, (),
        (*PATHS, "--patient_pattern", r"/(p\d)_"), {"patient_id": ["p1", "p2"]}),
    "columns without a table": Case(FLAT, (), 2, ("--columns maps a table",), PATHS),
    "sites as patients": Case(
        tuple(f"site{s}/{n}.png" for s in "AB" for n in range(3)), (), 0, ("a folder counts as a patient: siteA, siteB",)),
    "a few rows without a patient": Case(
        tuple(f"{n}.png" for n in range(4)),
        ("path,exam,who\n" + "".join(f"{n}.png,e{n},{'' if n == 3 else f'w{n}'}\n" for n in range(4)),), 0,
        ("1 rows name no patient",), ("--columns", "image=path,study=exam,patient=who")),
    "INbreast's numbers in a folder": Case(
        ("png/22678622.png", "png/22678646.png"), (), 2, ("eight digits alone, as INbreast's",)),
    "a column that is another": Case(
        FLAT, ("path,exam,who,m,grade,side\na.png,e1,p,maybe,1,L\nb.png,e2,q,0,1,L\n",), 2,
        ("t0.csv line 2: 1 of 2 values of m are not understood: 'maybe' (1)",), LABELLED),
    "a column of which a fifth is not understood": Case(
        tuple(f"{n}.png" for n in range(5)),
        ("path,exam,m\n" + "".join(f"{n}.png,e{n},{m}\n" for n, m in enumerate(["1", "0", "1", "0", "maybe"])),), 2,
        ("t0.csv line 6: 1 of 5 values of m are not understood: 'maybe' (1)",), ("--columns", "image=path,study=exam,mass=m")),
    "a few values not understood": Case(
        tuple(f"{n}.png" for n in range(20)),
        ("path,exam,m\n" + "".join(f"{n}.png,e{n},{['<1', 1][n] if n < 2 else 0}\n" for n in range(20)),), 0,
        ("1 of 20 values of m are not understood and left empty: '<1' (1)", "18 without, 1 unknown"),
        ("--columns", "image=path,study=exam,mass=m")),
    "a word for all that have it": Case(
        tuple(f"{n}.png" for n in range(20)),
        ("path,exam,c\n" + "".join(f"{n}.png,e{n},{'benign' if n else 'malign'}\n" for n in range(20)),), 2,
        ("1 of 20 values of c are not understood: 'malign' (1)",), ("--columns", "image=path,study=exam,cancer=c")),
    "patients that are none": Case(
        FLAT, ("path,exam,who,fold\na.png,e1,nan,train\nb.png,e2,Unknown,test\n",), 0, (),
        ("--columns", "image=path,study=exam,patient=who,split=fold"), {"patient_id": ["", ""]}),
    "CMMD's abnormality in other words": Case(
        ("D1-0001/1.dcm",), (CMMD + "D1-0001,L,4,2,calc,Benign,\n",), 2,
        ("t0.csv line 2: 1 of 1 values of abnormality are not understood: 'calc' (1)",)),
    # Labels that reach no image -----------------------------------------------------------------
    "CMMD as PNG": Case(
        ("D1-0001/1.png",), (CMMD + "D1-0001,L,4,2,mass,Benign,\n",), 2, ("given by breast", "D1-0001/1.png")),
    "RSNA's test table": Case(
        ("1/2.png",), (RSNA.replace("cancer,", "") + "2,1,2,L,CC,61.0,0,0,,0,,29,False\n",), 2,
        ("no value for cancer",)),
    "findings as the table": Case(
        ("s1/a.png",), (FINDINGS + finding("s1", "a", "['Mass']"),), 2, ("--findings_csv",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_read_in_two_ways_is_said(archive, capsys, name):
    case = CASES[name]
    for image in case.images:
        archive.dicom(image) if image.endswith(".dcm") else archive.png(image)
    tables = [archive.table(text, f"t{n}.csv") for n, text in enumerate(case.tables)]
    code = archive.run(tables or "none", *case.flags)
    out, err = capsys.readouterr()
    assert code == case.code, err + out
    for text in case.says:
        assert any(part in err + out for part in text.split("|")), err + out
    if code == 2:
        assert err.count("\n") == 1
        assert not archive.out.exists()
        return
    manifest = archive.read("manifest.csv")
    for column, values in case.manifest.items():
        assert sorted(manifest[column]) == sorted(values)
    for column, values in case.labels.items():
        assert archive.labels().sort_index()[column].tolist() == values
    if "patient_id" in manifest:  # whatever was asked, no woman is on both sides
        women = byol_mammo.labels.group_keys(manifest)
        assert (manifest.groupby(women)["split"].nunique() == 1).all()


def test_a_patient_found_in_a_name_that_is_not_utf8(archive):
    archive.png("x/LCC.png")
    (archive.images / "x").rename(archive.images / os.fsdecode(b"M\xfcller"))
    table = archive.table("path,exam\nLCC.png,e1\n")
    assert archive.run(table, *PATHS, "--patient_pattern", "^([^/]+)/", "--test_share", "0.5") == 0
    assert archive.read("manifest.csv")["patient_id"].tolist() == ["M_ller"]


def test_findings_of_other_images(archive, capsys):
    archive.png("s1/a.png")
    archive.png("s2/b.png")
    table = archive.table(VINDR + vindr_row("s1", "a", "training") + vindr_row("s2", "b", "training"))
    other = archive.table(FINDINGS + finding("x", "y", "['Mass']"), "other.csv")
    assert archive.run(table, "--findings_csv", other) == 2
    assert "no image of" in capsys.readouterr().err
    some = archive.table(FINDINGS + finding("s1", "a", "['Mass']"), "some.csv")
    assert archive.run(table, "--findings_csv", some) == 0
    out = capsys.readouterr().out
    assert "1 images are not in some.csv, so not labelled: s2/b" in out
    assert "1 images with, 0 without, 1 unknown" in out


FOUND = {  # lines of findings about s1/a, which is a left CC, and what is said of them
    "another side": (
        finding("s1", "a", "['Mass']", side="R"),
        "laterality is R, in the table of images that",
    ),
    "no number": (finding("s1", "a", "['Mass']", "40,50,x,60"), "f.csv line 2: xmax 'x' is no number"),
    "half a box": (finding("s1", "a", "['Mass']", "40,50,,"), "f.csv line 2: xmax '' is no number"),
    "width and height": (
        finding("s1", "a", "['Mass']", "60,50,40,30"),
        "make no box; the last two are a corner",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_findings_that_do_not_fit_are_refused(archive, capsys, name):
    archive.png("s1/a.png")
    text, message = FOUND[name]
    findings = archive.table(FINDINGS + text, "f.csv")
    table = archive.table(VINDR + vindr_row("s1", "a", "training"))
    assert archive.run(table, "--findings_csv", findings) == 2
    assert message in capsys.readouterr().err


READERS = [
    (archives.side, {"rt": "R", "LT": "L", "right breast": "R", "L.": "L", "both": "", "LR": ""}),
    (archives.birads, {"BI-RADS: 4": "BI-RADS 4", "birads_4a": "BI-RADS 4A", "Category 0": "BI-RADS 0",
                       "BI RADS 3.0": "BI-RADS 3", "7": "", "four": ""}),
    (archives.density, {"fatty": "DENSITY A", "ACR B": "DENSITY B", "iv": "DENSITY D", "Type 3": "DENSITY C",
                        "Heterogeneously dense": "DENSITY C", "<1": "", "5": ""}),
    (archives.flag, {"2": "1", "2.0": "1", "0.0": "0", "Present": "1", "neg": "0", "0.5": "", "-1": ""}),
    (archives.cancer, {"MALIGNANT": "1", "benign": "0", "1": "1", "2": "", "BENIGN_WITHOUT_CALLBACK": "0", "B": ""}),
    (archives.finding, {"Calcification": "calcification", "mass": "mass", "asymmetry": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "values"), READERS, ids=lambda item: getattr(item, "__name__", ""))
def test_readers_of_cells(reader, values):
    assert {text: reader(text) for text in values} == values


JOINS = [  # images below data/training, images of labels.csv beside training, the rows joined
    ("paths", ["a/1.png", "b/1.png"], ["training/b/1.png", "training/a/1.png"], [1, 0]),
    ("same name elsewhere", ["a/1.png"], ["training/b/1.png"], [-1]),
    ("bare and unique", ["a/1.png", "a/2.png"], ["2.png", "1.png"], [1, 0]),
    ("bare, two images", ["a/1.png", "b/1.png"], ["1.png"], [-1, -1]),
    ("bare, one taken by its path", ["a/1.png", "b/1.png"], ["training/a/1.png", "1.png"], [0, -1]),
    ("bare, and a path of that end", ["a/1.png"], ["1.png", "a/1.png"], [-1]),
    ("labels of another folder", ["a/1.png", "b/2.png"], ["a/1.png", "x/2.png"], [0, -1]),
    (
        "a path by way of the folder above",
        ["a/1.png", "b/1.png"],
        ["training/b/../a/1.png", "./training/b/1.png"],
        [0, 1],
    ),
]


@pytest.mark.parametrize(("images", "names", "rows"), [j[1:] for j in JOINS], ids=[j[0] for j in JOINS])
def test_labels_are_joined_by_path(tmp_path, images, names, rows):
    table = pd.DataFrame({"image": names})
    found = byol_mammo.labels.match_labels(table, tmp_path, images, tmp_path / "training")
    assert found.tolist() == rows


def test_cells_of_labels_are_stripped_and_splits_read(tmp_path):
    text = "image,study_id,patient_id,split,mass\n a.png , s1,P1 ,Train,1\nb.png,s2,p1,training ,0\n"
    (tmp_path / "labels.csv").write_text(text)
    table = byol_mammo.labels.read_labels(tmp_path / "labels.csv", ["mass"])
    assert table["split"].tolist() == ["training"] * 2
    assert byol_mammo.labels.group_keys(table).nunique() == 1


BOXED = '"[{""finding"":[""Mass""],""xmin"":0,""ymin"":0,""xmax"":9,""ymax"":9}]"'  # a mass


def read_text(folder, text):
    (folder / "labels.csv").write_text(text)
    return byol_mammo.labels.read_labels(folder / "labels.csv", ["mass"])


def test_a_visit_s_number_as_study_makes_no_two_women_one(tmp_path):
    """A row's own patient counts; what names two is refused, as its figures would be of both."""
    visits = pd.DataFrame(
        {"study_id": ["1", "1", "2", "2", "3"], "patient_id": ["A", "B", "B", "C", ""]}
    )
    assert byol_mammo.labels.group_keys(visits).tolist() == ["A", "B", "B", "C", "3"]
    rows = "image,study_id,patient_id,mass\n"
    with pytest.raises(MammoError, match=r"study_id 1 is of the patients A, B; .*patient and date"):
        read_text(tmp_path, rows + "a.png,1,A,1\nb.png,1,B,0\n")
    read_text(tmp_path, rows + "a.png,1,A,1\nb.png,1,a,0\nc.png,1,,0\nd.png,,B,0\ne.png,,C,0\n")


def test_cells_that_stand_for_nothing_name_nobody(tmp_path):
    rows = "a.png,1,NA,n/a,nan,1\nb.png,2,#N/A,L,CC,0\nc.png,NaN,None,R,MLO,0\n"
    table = read_text(tmp_path, "image,study_id,patient_id,laterality,view,mass\n" + rows)
    assert table["patient_id"].tolist() == [""] * 3
    assert table["study_id"].tolist() == ["1", "2", ""]
    assert table["laterality"].tolist() == ["", "L", "R"]
    assert table["view"].tolist() == ["", "CC", "MLO"]


def test_a_box_says_that_its_finding_is_there(tmp_path):
    table = read_text(tmp_path, f"image,mass,boxes\na.png,,{BOXED}\nb.png,,\nc.png,1,{BOXED}\n")
    assert table["mass"].fillna(-1).tolist() == [1, -1, 1]
    with pytest.raises(MammoError, match=r"line 3: mass of b.png is 0, and a box of mass"):
        read_text(tmp_path, f"image,mass,boxes\na.png,0,\nb.png,0,{BOXED}\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image,mass\na.png,1\n./a.png,0\n", "more than one row"),
        ('image,mass,boxes\na.png,1,"[{""finding"":""mass"",""xmin"":0,""ymin"":0,""xmax"":9,""ymax"":9}]"\n',
         "finding is 'mass', not a list"),
    ],
)  # fmt: skip
def test_labels_that_would_be_lost_are_refused(tmp_path, text, says):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(MammoError, match=says):
        byol_mammo.labels.read_labels(tmp_path / "labels.csv", ["mass"])


def test_labels_of_another_layout_are_refused(tmp_path):
    """Of one archive, laid out with and without --flip_right, names are the same and boxes are not."""
    for name, flipped in (("plain", 0), ("copy", 0), ("flip", 1)):
        (tmp_path / name / "training").mkdir(parents=True)
        (tmp_path / name / "manifest.csv").write_text(f"file,flipped\ntraining/a.png,{flipped}\n")
    table = pd.DataFrame({"image": ["training/a.png"]})
    for name in ("plain", "copy"):
        folder = tmp_path / name / "training"
        assert byol_mammo.labels.match_labels(table, tmp_path / "plain", ["a.png"], folder).tolist() == [
            0
        ]
    with pytest.raises(MammoError, match="are of another layout than the images"):
        byol_mammo.labels.match_labels(
            table, tmp_path / "plain", ["a.png"], tmp_path / "flip" / "training"
        )


def test_a_layout_that_is_not_finished_is_not_read(archive, monkeypatch):
    archive.png("s1/a.png")
    archive.png("s2/b.png")
    monkeypatch.setattr(prep, "remove_stale", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        archive.run("none", "--test_share", "0")
    with pytest.raises(MammoError, match="same prepare_dataset"):
        byol_mammo.images.list_sources(archive.out / "training")
    monkeypatch.undo()
    assert archive.run("none", "--test_share", "0") == 0
    assert len(byol_mammo.images.list_sources(archive.out / "training")) == 2


def test_labels_of_other_choices_do_not_stay(archive, capsys):
    """Boxes of the image as it was, beside the image as it is, were the worst of all."""
    archive.png("s1/a.png")
    table = archive.table(VINDR + vindr_row("s1", "a", "training", side="R"))
    found = finding("s1", "a", "['Mass']", "5,6,20,30", side="R")
    findings = archive.table(FINDINGS + found, "findings.csv")
    assert archive.run(table, "--findings_csv", findings) == 0
    first = (archive.out / "labels.csv").read_bytes()
    assert json.loads(archive.labels()["boxes"].iloc[0])
    assert archive.run(table, "--flip_right") == 0
    assert (
        "labels.csv of an earlier run with other choices is labels_1.csv now" in capsys.readouterr().out
    )
    assert not (archive.out / "labels.csv").exists()
    assert (archive.out / "labels_1.csv").read_bytes() == first
