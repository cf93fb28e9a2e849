# ruff: noqa: E501 - tables read better in long lines
"""prepare_dataset: MIAS, CDD-CESM, DDSM and EMBED, on generated archives with the published forms.

Headers, legends and codes are as published (docs/archives.md says where); patients and values are made up,
but for the places of two MIAS films, which the list of the original films gives in another frame.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from test_prepare_archives import Archive, refusal
from test_prepare_dicom import breast

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
