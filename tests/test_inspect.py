"""prepare_dataset.py inspect: a page tells what training makes of a file, and nothing of the patient."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import breast_image
from test_prepare_dicom import make_dicom, save

import prepare_dataset as prep
import train_byol_mammo as mammo
from byol_mammo import inspection

JANE = {"PatientName": "Doe^Jane", "PatientID": "4711", "StudyDate": "19700101"}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """(700, 640) uint16 of 12 bits, grainy above: there are tiles that are kept and others."""
    image, mask = breast_image(700, 640, bits=12)
    grain = np.random.default_rng(1).normal(0, 250, image.shape) * (np.arange(700)[:, None] < 350)
    return np.where(mask, np.clip(image + grain, 1, 4095), 0).astype(np.uint16)


@pytest.fixture
def png(tmp_path: Path, image: np.ndarray) -> Path:
    """A layout of one image: training/a.png and its manifest."""
    path = tmp_path / "split_images" / "training" / "a.png"
    path.parent.mkdir(parents=True)
    assert cv2.imwrite(str(path), image)
    row = {"file": "training/a.png", "study_id": "s", "laterality": "L", "view": "CC"}
    row |= {"spacing_mm": 0.06, "polarity": "as_is"}
    pd.DataFrame([row]).to_csv(tmp_path / "split_images" / "manifest.csv", index=False)
    return path


def told(path: Path, *flags: str) -> dict[str, str]:
    """The facts of a file, by name; what tiles are rejected by under ''."""
    options = prep.make_inspect_parser().parse_args([str(path), *flags])
    return dict(prep.inspect_file(path, options, prep.training_method())[0])


def test_a_page_per_file_and_the_rest_goes_on(
    tmp_path: Path, image: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, broken = tmp_path / "Doe_Jane.dcm", tmp_path / "cut.png"
    save(make_dicom(4095 - image, PhotometricInterpretation="MONOCHROME1", **JANE), scan)
    broken.write_bytes(b"no picture")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("inspect_007.png", "mine.png"):
        (out / name).write_bytes(b"of an earlier inspection, or the user's")
    files = [str(scan), str(broken), str(tmp_path / "gone.png")]
    assert prep.main(["inspect", *files, "--output_dir", str(out)]) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"inspect_{number:03d}.png" for number in (1, 2, 3)), "mine.png"
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert cv2.imwrite(str(tmp_path / "same.png"), image)
    record, _ = mammo.extract_image(str(tmp_path / "same.png"), 0.07, mammo.Config(), "MLO")
    kept = f"{len(record['tiles']['x'])} of {record['positions']} of 512 px kept"
    assert f"inspect_001.png  {scan}: {kept}\n" in said
    assert f"inspect_002.png  {broken}: not a PNG file inside\n" in said
    assert "gone.png: cannot be opened: No such file or directory\n" in said
    page = cv2.imread(str(out / "inspect_001.png"))
    picture = page[:, : page.shape[1] - inspection.FACTS]
    for colour in inspection.LEGEND.values():
        drawn = bool((np.abs(picture.astype(int) - colour).max(axis=-1) < 40).any())
        assert drawn or colour == inspection.MUSCLE_BGR  # a phantom without muscle


def test_facts_are_of_the_header_and_name_no_patient(tmp_path: Path, image: np.ndarray) -> None:
    path = tmp_path / "scan.dcm"
    save(make_dicom(4095 - image, PhotometricInterpretation="MONOCHROME1", **JANE), path)
    facts = told(path)
    for name, value in {
        "format": "dcm", "photometric": "MONOCHROME1", "bits stored": "12", "spacing mm": "0.07",
        "view used": "MLO", "spacing": "0.07 mm, by the header",
        "size": f"700 x 640 px, grey 0 to {image.max()}",
    }.items():  # fmt: skip
        assert facts[name] == value, name
    assert facts["polarity"].startswith("as_is, written so by its header; the vote on what is used: +")
    assert "chest wall left" in facts["breast"]
    assert not any(part in str(facts) for part in ("Doe", "Jane", "4711", "1970"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            (),
            {
                "spacing": "0.06 mm, by the manifest",
                "view used": "CC",
                "polarity": "as_is, by the manifest",
            },
        ),
        (("--pixel_spacing_mm", "0.1"), {"spacing": "0.1 mm, by the flag"}),
        (("--view", "mlo"), {"view used": "MLO"}),
        (("--polarity", "inverted"), {"polarity": "inverted, --polarity"}),
    ],
)
def test_whose_word_counts(png: Path, flags: tuple[str, ...], expected: dict[str, str]) -> None:
    facts = told(png, *flags)
    for name, value in expected.items():
        assert facts[name].startswith(value), name


def test_what_nothing_tells_is_judged_or_usual_and_said(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    cv2.imwrite(str(path), 255 - breast_image()[0])
    facts = told(path)
    assert facts["polarity"].startswith("inverted, judged; the vote on what is used: +")
    assert facts["spacing"] == f"{mammo.PIXEL_SPACING_MM} mm, taken, as nothing tells it"
    assert facts["view used"] == "not known"
    assert facts["tiles"] == "none: the image is smaller than a tile (512 px)"
    cv2.imwrite(str(path), np.zeros((700, 640), np.uint8))
    assert told(path)["breast"] == "NONE FOUND"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}"], "is a folder; `check` looks at all images of one"),
        (["{png}", "--output_dir", "{folder}"], "lies among the images"),
        (["{png}", "--output_dir", "{folder}/pages"], "lies among the images"),
        (["{png}", "--pixel_spacing_mm", "85"], "--pixel_spacing_mm 85.0 is not between 0 and 1"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_wrong_words_are_refused(
    png: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(png=png, folder=png.parent) for word in words]
    assert prep.main(["inspect", *filled]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in png.parent.iterdir()] == ["a.png"]
