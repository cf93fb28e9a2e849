"""How an image was taken, from headers and tables to the manifest: one unit, one spelling, no more."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from test_prepare_dicom import IDENTIFIERS, breast, make_dicom, save
from test_prepare_headers import prepare, problems, table

import mammogram_dicom as dicom
import prepare_dataset as prep
from byol_mammo import acquisition, images

SCANNER = {
    "Manufacturer": "HOLOGIC, Inc.", "ManufacturerModelName": "Selenia  Dimensions",
    "DetectorType": "DIRECT", "KVP": "29", "ExposureInuAs": 52400, "Exposure": 52,
    "BodyPartThickness": "61.5", "CompressionForce": "92.1", "AnodeTargetMaterial": "TUNGSTEN",
    "FilterMaterial": ["RHODIUM", "SILVER"],
}  # fmt: skip
KNOWN = {
    "maker": "Hologic", "model": "Selenia Dimensions", "detector": "DIRECT", "kvp": "29", "mas": "52.4",
    "thickness_mm": "61.5", "force_n": "92.1", "anode": "TUNGSTEN", "filter": "RHODIUM+SILVER",
}  # fmt: skip
HEADERS = {  # tags in place of SCANNER's -> columns in place of KNOWN's, what the doubts say
    "as it is": ({}, {}, ""),
    "not recorded": ({"KVP": "0", "ExposureInuAs": 0, "CompressionForce": "0"},
                     {"kvp": "", "mas": "52", "force_n": ""}, ""),
    "absent": (dict.fromkeys(SCANNER), dict.fromkeys(KNOWN, ""), ""),
    "empty": (dict.fromkeys(SCANNER, ""), dict.fromkeys(KNOWN, ""), ""),
    "mAs alone": ({"ExposureInuAs": None}, {"mas": "52"}, ""),
    "uAs written as mAs": ({"Exposure": 52400, "ExposureInuAs": None}, {"mas": ""},
                           "Exposure is 52400, not 1 to 1000 (exposure, mAs)"),
    "mAs written as uAs": ({"ExposureInuAs": 52}, {"mas": "52"}, "ExposureInuAs is 0.052, not 1"),
    "two exposures": ({"Exposure": 70}, {}, "ExposureInuAs says 52.4, Exposure says 70 (exposure, mAs)"),
    "rounded exposure": ({"Exposure": 53}, {}, ""),
    "volts": ({"KVP": "29000"}, {"kvp": ""}, "KVP is 29000, not 15 to 60"),
    "centimetres": ({"BodyPartThickness": "6.1"}, {"thickness_mm": ""}, "Thickness is 6.1, not 10"),
    "not a number": ({"KVP": "nan"}, {"kvp": ""}, ""),
    "infinite": ({"CompressionForce": "inf"}, {"force_n": ""}, "CompressionForce is inf, not 5 to 400"),
    "a number as detector": ({"DetectorType": "DX77123"}, {"detector": ""}, "DetectorType is none of"),
    "symbols": ({"AnodeTargetMaterial": "MO", "FilterMaterial": "AL"},
                {"anode": "MOLYBDENUM", "filter": "ALUMINUM"}, ""),
    "another metal": ({"AnodeTargetMaterial": "CHEESE"}, {"anode": ""}, "TargetMaterial is none of"),
    "another maker": ({"Manufacturer": " Nobody\n& Sons "}, {"maker": "Nobody & Sons"}, ""),
}  # fmt: skip


def scanner(**tags):
    """A mammogram with a scanner's tags; None leaves one out."""
    known = {name: value for name, value in (SCANNER | tags).items() if value is not None}
    return make_dicom(breast(), **known)


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_read_in_one_unit_and_spelling(tmp_path, name):
    tags, expected, doubt = HEADERS[name]
    header = dicom.read_dicom(save(scanner(**tags), tmp_path / "a.dcm"))[1]
    assert {column: header[column] for column in KNOWN} == KNOWN | expected
    assert bool(header["doubts"]) == bool(doubt)
    assert doubt in header["doubts"]


MAKERS = {
    "Hologic": ["HOLOGIC, Inc.", "Hologic", "LORAD", "Lorad, A Hologic Company"],
    "GE": ["GE MEDICAL SYSTEMS", "GE Healthcare", "General Electric"],
    "Siemens": ["SIEMENS", "Siemens Healthineers"],
    "Fujifilm": ["FUJIFILM Corporation", "FUJI PHOTO FILM Co., ltd."],
    "IMS Giotto": ["IMS s.r.l.", "I.M.S. S.r.l.", "GIOTTO"],
    "Philips": ["Philips Medical Systems"],
    "Sectra": ["Sectra Imtec AB"],
    "Gentex": ["Gentex"],  # not GE
    "IMSTAR": ["IMSTAR"],
}


def test_spellings_of_one_maker_are_one():
    found = {name: {acquisition.maker(text) for text in texts} for name, texts in MAKERS.items()}
    assert found == {name: {name} for name in MAKERS}


def test_the_manifest_holds_what_headers_say_and_problems_what_cannot_be(tmp_path):
    data_sets = {
        "a": scanner(),
        "b": scanner(KVP="29000", Manufacturer="SIEMENS"),
        "c": make_dicom(breast()),
    }
    assert prepare(tmp_path, data_sets) == 0
    manifest = table(tmp_path, "manifest.csv").set_index("image_id")
    assert manifest.loc["a", list(KNOWN)].to_dict() == KNOWN
    assert manifest.loc["b", ["maker", "kvp"]].tolist() == ["Siemens", ""]
    assert (manifest.loc["c", list(KNOWN)] == "").all()
    assert problems(tmp_path, "acquisition") == {"b": "KVP is 29000, not 15 to 60 (tube voltage, kV)"}
    page = (tmp_path / "out/prepare_report.html").read_text()
    assert "Siemens" in page
    assert images.read_manifest(tmp_path / "out", ["maker"])["maker"].count() == 2


def test_a_layout_of_an_earlier_version_is_read_again_and_not_written_again(tmp_path):
    assert prepare(tmp_path, {"a": scanner()}) == 0
    whole = {
        name: (tmp_path / "out" / name).read_bytes() for name in ("manifest.csv", "image_checks.csv")
    }
    png = (tmp_path / "out/training/p_a.png").stat()
    for name in whole:
        old = table(tmp_path, name).drop(columns=[*KNOWN, "archive"], errors="ignore")
        old.to_csv(tmp_path / "out" / name, index=False)
    assert images.read_manifest(tmp_path / "out", ["maker"])["maker"].isna().all()  # still readable
    source = tmp_path / "in/p/a.dcm"
    assert prepare(tmp_path, {}) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in whole} == whole
    assert (tmp_path / "out/training/p_a.png").stat().st_ino == png.st_ino
    assert source.is_file()


def write_table(folder, header, *rows):
    """table.csv of a folder."""
    path = folder / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


VINDR = "study_id,image_id,split"
TABLES = {  # header and rows of a table of images a and b, further flags -> manifest's cells, notes
    "DICOM's names": (
        f"{VINDR},Manufacturer,KVP,Exposure,DeviceSerialNumber",
        ["p,a,training,LORAD,28,60,SN-1", "p,b,training,GE MEDICAL SYSTEMS,0,60000,SN-2"],
        [],
        {"maker": ["Hologic", "GE"], "kvp": ["28", ""], "mas": ["60", ""], "archive": ["", ""]},
        ["1 values of Exposure can't be (exposure, mAs), left empty: '60000' (1)"],
    ),
    "mapped": (
        "file,exam,vendor,volts,site,metal",
        ["p/a.png,p,siemens,27.5,north,W", "p/b.png,p,Nobody,x,south,Rh"],
        ["--columns", "image=file,study=exam,maker=vendor,kvp=volts,archive=site,anode=metal"],
        {"maker": ["Siemens", "Nobody"], "kvp": ["27.5", ""], "archive": ["north", "south"],
         "anode": ["TUNGSTEN", "RHODIUM"]},
        ["1 values of kvp can't be (tube voltage, kV), left empty: 'x' (1)"],
    ),
    "RSNA": (
        "site_id,patient_id,image_id,laterality,view,cancer",
        ["1,p,a,L,CC,0", "1,p,b,R,CC,1"],
        [],
        {"maker": ["", ""], "archive": ["RSNA 2022", "RSNA 2022"]},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_tell_it_too(tmp_path, capsys, name):
    header, rows, flags, expected, notes = TABLES[name]
    for image in "ab":
        path = tmp_path / f"in/p/{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(prep.encode_png(breast(seed=ord(image))))
    assert prepare(tmp_path, {}, *flags, csv=(write_table(tmp_path, header, *rows),)) == 0
    manifest = table(tmp_path, "manifest.csv").sort_values("image_id")
    assert {column: manifest[column].tolist() for column in expected} == expected
    printed = capsys.readouterr().out
    assert [note for note in notes if note not in printed] == []
    assert ("can't be" in printed) == bool(notes)
    written = [path.read_text() for path in (tmp_path / "out").glob("*.csv")]
    assert not any("SN-1" in text for text in written)


def test_the_table_counts_before_the_header_and_the_difference_is_listed(tmp_path):
    path = write_table(tmp_path, f"{VINDR},Manufacturer,KVP", "p,a,training,GE Healthcare,")
    assert prepare(tmp_path, {"a": scanner()}, csv=(path,)) == 0
    manifest = table(tmp_path, "manifest.csv").iloc[0]
    assert (manifest["maker"], manifest["kvp"], manifest["mas"]) == ("GE", "29", "52.4")
    assert problems(tmp_path, "maker") == {"a": "table GE, header Hologic"}


def test_a_line_of_several_images_tells_of_none():
    raw = pd.DataFrame({"Manufacturer": ["GE"]}, index=["line 2"])
    files = pd.DataFrame({"image_id": ["a", "b"]}, index=["line 2", "line 2"])
    assert "maker" not in acquisition.of_table(files, raw, "", [])
    one = acquisition.of_table(files.iloc[:1], raw, "CMMD", [])
    assert one[["maker", "archive"]].iloc[0].tolist() == ["GE", "CMMD"]


def test_two_attributes_of_a_table_that_differ_are_noted():
    raw = pd.DataFrame({"ExposureInuAs": ["52400", "52400", ""], "Exposure": ["70", "52", "60"]})
    notes = []
    table = acquisition.of_table(pd.DataFrame({"image_id": ["a", "b", "c"]}), raw, "", notes)
    assert table["mas"].tolist() == ["52.4", "52.4", "60"]
    assert notes == ["1 values of Exposure differ from ExposureInuAs (exposure, mAs), which counts"]


def test_only_what_is_listed_is_asked_of_a_header():
    """Serial numbers and names of places are no source of any column."""
    asked = []
    acquisition.of_header(lambda keyword: asked.append(keyword) or "")
    assert sorted(asked) == sorted(acquisition.KEYWORDS)
    assert not set(asked) & set(IDENTIFIERS)
    assert all(math.isfinite(limit) for c in acquisition.COLUMNS.values() for limit in c.limits)
