"""What a DICOM header may leave out or say wrongly: refused by the tag's name, kept out, or said."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom import Dataset, Sequence, uid
from test_prepare_dicom import breast, coded, make_dicom, read, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mammogram_dicom as dicom  # noqa: E402
import prepare_dataset as prep  # noqa: E402
from byol_mammo import images, spacing  # noqa: E402

CAPTURE = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}
UNNAMED = {"ImageLaterality": None, "ViewPosition": None, "ImagerPixelSpacing": None}


def prepare(
    folder: Path, data_sets: dict[str, Dataset], *extra: str, csv: tuple[object, ...] = ("none",)
) -> int:
    """Lay data sets out that are saved as in/p/<name>.dcm."""
    for name, dataset in data_sets.items():
        save(dataset, folder / f"in/p/{name}.dcm")
    places = ["--images_root", str(folder / "in"), "--output_dir", str(folder / "out")]
    alone = [
        "--test_share",
        "0",
        *["--patient_pattern", "^p"] * (csv == ("none",)),
    ]  # one of many images
    return prep.main(["--csv_path", *map(str, csv), *alone, *places, *extra])


def table(folder: Path, name: str) -> pd.DataFrame:
    """A report of the run, empty where it was not written."""
    path = folder / "out" / name
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame()


def problems(folder: Path, check: str) -> dict[str, str]:
    """What a check says, by image."""
    found = table(folder, "problems.csv")
    found = found[found["check"] == check] if len(found) else pd.DataFrame(columns=["file", "detail"])
    return {Path(row.file).stem.removeprefix("p_"): row.detail for row in found.itertuples()}


def reasons(folder: Path) -> dict[str, str]:
    """Why what was skipped was skipped, by image."""
    found = table(folder, "skipped.csv")
    return dict(zip(found["image_id"], found["reason"], strict=True)) if len(found) else {}


# Bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
@pytest.mark.parametrize("high", [11, 13, 15])
def test_bits_are_taken_from_where_they_lie(
    tmp_path: Path, high: int, syntax: uid.UID, signed: bool
) -> None:
    """Bits beside them (overlays of old scanners) do not count."""
    truth = breast(12).astype(np.int64) - 2048 * signed
    beside = np.random.default_rng(3).integers(0, 2, truth.shape)
    up = high - 11
    cells = ((truth << up) & 0xFFFF) | (beside * (1 if up else 0))
    if high == 13:
        cells = (cells & 0x3FFF) | (beside << 15)
    cells = cells.astype(np.uint16).view(np.int16 if signed else np.uint16)
    dataset = make_dicom(cells, 12, HighBit=high)
    if syntax.is_compressed:
        dataset.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(read(dataset, tmp_path), truth - truth.min())


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        *(
            (({"HighBit": high}), rf"impossible bits: HighBit \(0028,0102\) {high} with")
            for high in (10, 16, 255)
        ),
        ({"BitsStored": 0, "HighBit": 0}, r"BitsStored \(0028,0101\) 0 of"),
        ({"BitsStored": 17, "HighBit": 16}, r"BitsAllocated \(0028,0100\) 16"),
    ],
)
def test_bits_that_cannot_be_are_named(tmp_path: Path, tags: dict, words: str) -> None:
    with pytest.raises(dicom.DicomError, match=words):
        read(make_dicom(breast(), **tags), tmp_path)


def test_left_aligned_bits_under_a_jpeg_are_refused(tmp_path: Path) -> None:
    dataset = make_dicom(breast())
    dataset.compress(uid.JPEGLSLossless, generate_instance_uid=False)
    dataset.HighBit = 15
    with pytest.raises(dicom.DicomError, match=r"two ways: HighBit \(0028,0102\) 15 .*; decompress"):
        read(dataset, tmp_path)


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("keyword", dicom.NEEDED)
def test_tags_that_are_missing_or_empty_are_named(
    tmp_path: Path, keyword: str, value: str | None
) -> None:
    dataset = make_dicom(breast())
    dataset["PixelData"].VR = "OW"  # else pydicom asks BitsAllocated for it
    if value is None:
        delattr(dataset, keyword)
    else:
        dataset[keyword].value = None if keyword != "PixelData" else b""
    number = {"PixelData": "7FE0,0010", "Rows": "0028,0010", "BitsStored": "0028,0101"}.get(
        keyword, "0028"
    )
    with pytest.raises(dicom.DicomError, match=rf"{keyword} \({number}"):
        read(dataset, tmp_path)


# Padding ------------------------------------------------------------------------------------------


def tissue(value: int, photometric: str, size: int = 24, margin: int = 0) -> Dataset:
    """Smooth tissue that saturates over `size` px at the largest value, the padding being `value`."""
    y, x = np.mgrid[:96, :80]
    shown = np.clip(4095 + size * 30 - 30 * np.hypot(y - 48, 1.2 * x), 0, 4095).astype(np.uint16)
    stored = shown if photometric == "MONOCHROME2" else 4095 - shown
    if margin:
        stored[:, -margin:] = value
    return make_dicom(stored, PixelPaddingValue=value, PhotometricInterpretation=photometric)


PADDED = {
    "saturated": (tissue(4095, "MONOCHROME2"), True),
    "saturated_and_padded": (tissue(4095, "MONOCHROME2", margin=10), True),
    "inverted": (tissue(0, "MONOCHROME1"), True),
    "air": (tissue(0, "MONOCHROME2"), False),
    "inverted_air": (tissue(4095, "MONOCHROME1"), False),
    "margin": (tissue(4095, "MONOCHROME2", size=0, margin=10), False),
    "elsewhere": (tissue(5000, "MONOCHROME2"), False),
}


def test_padding_of_the_value_of_saturated_tissue_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tmp_path, {name: dataset for name, (dataset, _) in PADDED.items()}) == 0
    found = problems(tmp_path, "padding in tissue")
    assert found.keys() == {name for name, (_, said) in PADDED.items() if said}
    assert set(found.values()) == {"PixelPaddingValue (0028,0120) is that of bright tissue"}
    assert "padding in tissue: 3 the value of padding" in capsys.readouterr().out


# What is no contact view --------------------------------------------------------------------------


def page() -> np.ndarray:
    """Letters: (96, 80) uint8, white strokes on black, with some grey along them."""
    image = np.zeros((96, 80), np.uint8)
    image[10:90:8, 6:70] = image[10:90:8, 6:70] | np.tile([255, 255, 0, 120], 16).astype(np.uint8)
    return image


def modified(*modifiers: Dataset, **tags: object) -> Dataset:
    """A mammogram whose view has modifiers."""
    view = coded("399368009", ViewModifierCodeSequence=Sequence(modifiers))
    return make_dicom(breast(), ViewCodeSequence=Sequence([view]), **tags)


DISPLACED = coded("399209000")
MAGNIFIED = Sequence([coded("399163009")])
NAMED = coded("other", CodeMeaning="Magnification, spot")
POSITIONS = {"MCC": "magnified", "M MAG": "magnified", "SPOT CC": "spot", "SMLO": "spot"}
CONTRAST = ["DERIVED", "PRIMARY", "POST_CONTRAST"]
DOSE_TYPE = ["DERIVED", "SECONDARY", "DOSE_INFO"]
KEPT_OUT = {
    "code": (modified(coded("399163009")), "magnified view"),
    "old_code": (modified(coded("R-102D7", "SRT")), "spot view"),
    "meaning": (modified(NAMED), "magnified and spot view"),
    "beside": (make_dicom(breast(), ViewModifierCodeSequence=MAGNIFIED), "magnified view"),
    "factor": (make_dicom(breast(), EstimatedRadiographicMagnificationFactor=1.5), "magnified view"),
    "paddle": (make_dicom(breast(), PaddleDescription="10CM MAG"), "magnified view"),
    "spot_paddle": (make_dicom(breast(), PaddleDescription="SPOT CONTACT"), "spot view"),
    **{name.replace(" ", "_"): (make_dicom(breast(), ViewPosition=name), words)
       for name, words in POSITIONS.items()},
    "dose": (make_dicom(page(), 8, **CAPTURE, SeriesDescription="Dose Report"), "dose report page"),
    "dose_type": (make_dicom(breast(), **CAPTURE, ImageType=DOSE_TYPE), "dose report page"),
    "print": (make_dicom(page(), 8, **CAPTURE, **UNNAMED), "page of print"),
    "stereo": (make_dicom(breast(), ImageType=["ORIGINAL", "PRIMARY", "STEREO_MINUS"]), "STEREO_MINUS"),
    "projection": (make_dicom(breast(), ImageType=["ORIGINAL", "PRIMARY", "TOMO_PROJ"]), "TOMO_PROJ"),
    "subtracted": (make_dicom(breast(), ImageType=[*CONTRAST, "SUBTRACTION", ""]), "SUBTRACTION"),
    "high_energy": (make_dicom(breast(), ImageType=[*CONTRAST, "", "HIGH_ENERGY"]), "HIGH_ENERGY"),
    "specimen": (
        make_dicom(breast(), ViewCodeSequence=Sequence([coded("G-8310", "SRT")])), "taken out (specimen)"
    ),
    "frames": (make_dicom(breast(), NumberOfFrames=2, Rows=48), "several images in one file"),
}  # fmt: skip
KEPT = {
    "contact": make_dicom(breast(seed=1), EstimatedRadiographicMagnificationFactor=1.1),
    "displaced": modified(DISPLACED),
    "exaggerated": make_dicom(breast(seed=2), ViewPosition="XCCL", PaddleDescription="18X24 IMAGE"),
    "film": make_dicom(breast(8), 8, **CAPTURE, SeriesDescription="LOW DOSE MAMMOGRAM"),
    "low_energy": make_dicom(breast(seed=5), ImageType=[*CONTRAST, "", "LOW_ENERGY"]),
    "computed": make_dicom(
        breast(seed=6), ImageType=["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"]
    ),
    "unnamed": make_dicom(breast(8, seed=3), 8, **CAPTURE, **UNNAMED),
    "named_breast": make_dicom(breast(8, seed=4), 8, **CAPTURE, **UNNAMED, BodyPartExamined="BREAST"),
}


def test_pages_and_magnified_views_are_kept_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_of_them = {name: dataset for name, (dataset, _) in KEPT_OUT.items()} | KEPT
    assert prepare(tmp_path, all_of_them) == 1
    found = reasons(tmp_path)
    assert found.keys() == KEPT_OUT.keys()
    for name, (_, words) in KEPT_OUT.items():
        assert words in found[name], (name, found[name])
    assert set(table(tmp_path, "manifest.csv")["image_id"]) == KEPT.keys()
    assert problems(tmp_path, "page").keys() == {"unnamed"}
    assert problems(tmp_path, "synthetic").keys() == {"computed"}
    assert "  for: 6 magnified view, 4 spot view, 2 dose report page" in capsys.readouterr().out


# Spacing ------------------------------------------------------------------------------------------

CELLS = {
    "0.07": 0.07, "0,07": 0.07, "0.07\\0.07": 0.07, "[0.07, 0.07]": 0.07, "['0.07', '0.07']": 0.07,
    "0.07 mm": 0.07, "0,07mm": 0.07, "70 um": 0.07, "0.07mm x 0.07mm": 0.07, "(0.07,0.07)": 0.07,
    "0,07\\0,07": 0.07, "0.06 0.08": 0.07, "7e-2": 0.07, "": None, "nan": None, "[]": None,
    "abc": ValueError, "0,07,0,07": ValueError, "0.1 0.1 0.1": ValueError, "inf": ValueError,
    "0.007 cm": ValueError, "0.07 0.07 lb": ValueError,
}  # fmt: skip


@pytest.mark.parametrize(("cell", "expected"), CELLS.items())
def test_spacing_of_tables_is_read(cell: str, expected: float | type[ValueError] | None) -> None:
    if expected is ValueError:
        with pytest.raises(ValueError, match="no pixel spacing"):
            spacing.parse_spacing(cell)
    else:
        assert spacing.parse_spacing(cell) == (expected if expected is None else pytest.approx(expected))


IMAGER, SCREEN = r"ImagerPixelSpacing (0018,1164)", r"PixelSpacing (0028,0030)"
CANNOT = "mm cannot be a mammogram's: unknown"
HEADERS = {  # tags -> spacing of the manifest, what is said
    "ones": ({"ImagerPixelSpacing": [1, 1]}, "", f"{IMAGER} 1 x 1 {CANNOT}"),
    "zero": ({"ImagerPixelSpacing": [0, 0]}, "", f"{IMAGER} 0 x 0 {CANNOT}"),
    "negative": ({"ImagerPixelSpacing": [-0.07, 0.07]}, "", f"{IMAGER} -0.07 x 0.07 {CANNOT}"),
    "small": ({"ImagerPixelSpacing": [0.019, 0.019]}, "", f"{IMAGER} 0.019 x 0.019 {CANNOT}"),
    "large": ({"ImagerPixelSpacing": [0.51, 0.51]}, "", f"{IMAGER} 0.51 x 0.51 {CANNOT}"),
    "second": ({"ImagerPixelSpacing": [1, 1], "PixelSpacing": [0.07, 0.07]},
               "0.07", f"{IMAGER} 1 x 1 {CANNOT}"),
    "third": ({"ImagerPixelSpacing": None, "PixelSpacing": [1, 1],
               "NominalScannedPixelSpacing": [0.05, 0.05]}, "0.05", f"{SCREEN} 1 x 1 {CANNOT}"),
    "unequal": ({"ImagerPixelSpacing": [0.07, 0.08]}, "0.075",
                f"{IMAGER} 0.07 x 0.08 mm: rows and columns differ, their mean 0.075 is taken"),
    "nearly": ({"ImagerPixelSpacing": [0.07, 0.0705]}, "0.07025", ""),
    "absent": ({"ImagerPixelSpacing": None}, "", ""),
}  # fmt: skip


def test_spacing_of_headers_that_cannot_be_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        prepare(tmp_path, {name: make_dicom(breast(), **tags) for name, (tags, *_) in HEADERS.items()})
        == 0
    )
    manifest = table(tmp_path, "manifest.csv").set_index("image_id")["spacing_mm"]
    assert manifest.to_dict() == {name: known for name, (_, known, _) in HEADERS.items()}
    said = {name: words for name, (*_, words) in HEADERS.items() if words}
    assert problems(tmp_path, "spacing") == said
    assert f"spacing: {len(said)} cannot be, differs" in capsys.readouterr().out


def test_a_header_wins_over_the_table_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {
        "same": "0,0702",
        "other": "[0.1, 0.1]",
        "silent": "0.1",
        "wrong": "1",
        "uneven": "0.1 x 0.12",
    }
    tables = tmp_path / "a.csv", tmp_path / "b.csv"  # whose lines have the same numbers
    rows = [f'{name},p,"{cell}"\n' for name, cell in cells.items()]
    for number, path in enumerate(tables):
        path.write_text("image,study,mm\n" + "".join(rows[number::2]))
    measured = {"silent": None, "uneven": None}
    data_sets = {
        name: make_dicom(breast(seed=number), ImagerPixelSpacing=measured.get(name, [0.07, 0.07]))
        for number, name in enumerate(cells)
    }
    arguments = ("--columns", "image=image,study=study,spacing=mm")
    known = {"same": "0.07", "other": "0.07", "silent": "0.1", "wrong": "0.07", "uneven": "0.11"}
    for again in range(3):
        assert prepare(tmp_path, data_sets, *arguments, csv=tables) == 0
        manifest = table(tmp_path, "manifest.csv").set_index("image_id")["spacing_mm"]
        assert manifest.to_dict() == known, again
        output = capsys.readouterr().out
        assert "doubtful pixel spacing in 2 rows of the CSV: " in output
        assert "p/wrong (1 mm cannot be a mammogram's: unknown)" in output
        assert "p/uneven (0.1 x 0.12 mm: rows and columns differ, their mean 0.11 is taken)" in output
        if again == 1:  # what the header said is in the manifest too
            (tmp_path / "out/image_checks.csv").unlink()
        if again < 2:
            words = "table 0.1 mm, header 0.07 mm: the header counts"
            assert problems(tmp_path, "spacing") == {"other": words}


def test_a_spacing_that_is_none_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("image,study,mm\na,p,0.07\nb,p,seven\n")
    arguments = ("--columns", "image=image,study=study,spacing=mm")
    assert prepare(tmp_path, {"a": make_dicom(breast())}, *arguments, csv=(tmp_path / "t.csv",)) == 2
    assert "t.csv line 3: 'seven' is no pixel spacing in mm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_main_script_reads_the_spacing_of_a_manifest_alike(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(len(CELLS))]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).write_bytes(b"x")
    files = [f"images/{name}" for name in names]
    pd.DataFrame({"file": files, "study_id": "s", "spacing_mm": list(CELLS)}).to_csv(
        tmp_path / "manifest.csv", index=False
    )
    found = images.list_sources(tmp_path / "images").set_index("image")["spacing_mm"]
    for name, expected in zip(names, CELLS.values(), strict=True):
        if isinstance(expected, float):
            assert found[name] == pytest.approx(expected)
        else:
            assert np.isnan(found[name])


def test_a_folder_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    """Its image_checks.csv lacks what is new; its DICOM is read again."""
    assert prepare(tmp_path, {"a": make_dicom(breast())}) == 0
    checks = table(tmp_path, "image_checks.csv")
    checks["settings"] = checks["settings"].str.replace(f"dicom {prep.DICOM_VERSION}", "dicom 1")
    checks.drop(columns="doubts").to_csv(tmp_path / "out/image_checks.csv", index=False)
    assert prepare(tmp_path, {"a": make_dicom(breast())}) == 0
    assert list(table(tmp_path, "image_checks.csv")["doubts"]) == [""]
