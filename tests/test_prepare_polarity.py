"""prepare_dataset: which way round grey levels run, who says so, and what contradicts it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from test_prepare_archives import Archive, refusal
from test_prepare_dicom import breast, make_dicom, save

import prepare_dataset as prep

FLAGS = ("--columns", "image=path,study=exam,polarity=kind")
SHAPE = (200, 160)
NORMAL = breast(shape=SHAPE, seed=1)
NEGATIVE = 4095 - breast(shape=SHAPE, seed=2)
# The lower half is a negative.
DOUBTFUL = np.vstack([NORMAL[:100], 4095 - NORMAL[100:]])
PICTURES = {"normal": NORMAL, "negative": NEGATIVE, "doubtful": DOUBTFUL}


@pytest.fixture
def archive(tmp_path):
    return Archive(tmp_path)


def polarities(archive: Archive) -> dict[str, tuple[str, str]]:
    """Image -> polarity and who says so."""
    manifest = archive.read("manifest.csv")
    return dict(
        zip(
            manifest["image_id"],
            zip(manifest["polarity"], manifest["polarity_from"], strict=True),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("kind", "said", "verify", "expected", "problem"),
    [
        ("normal", "", False, ("unknown", ""), ""),
        ("normal", "", True, ("as_is", "judged"), ""),
        ("negative", "", True, ("inverted", "judged"), "the pixels look inverted"),
        ("doubtful", "", True, ("unknown", "judged"), "in doubt"),
        ("normal", "MONOCHROME2", False, ("as_is", "table"), ""),
        ("normal", "0", True, ("as_is", "table"), ""),
        ("negative", "Negative", False, ("inverted", "table"), ""),
        ("negative", "1", True, ("inverted", "table"), ""),
        ("doubtful", "as_is", True, ("as_is", "table"), ""),
        ("normal", "inverted", True, ("inverted", "table"), "table inverted counts, but"),
        ("negative", "normal", True, ("as_is", "table"), "table as_is counts, but"),
    ],
)  # fmt: skip
def test_table_before_pixels_and_pixels_where_they_are_decoded(
    archive, kind, said, verify, expected, problem
):
    archive.png("a.png", PICTURES[kind])
    table = archive.table(f"path,exam,kind\na.png,E,{said}\n")
    flags = [*FLAGS, *["--verify"] * verify]
    assert archive.run(table, *flags) == 0
    assert polarities(archive) == {"a": expected}
    found = archive.problems("polarity")
    assert [problem in text for text in found] == [True] * bool(problem)
    # The same command again changes nothing, and one without --verify knows what a fresh one knows.
    before = {path: path.read_bytes() for path in archive.out.glob("*.csv")}
    assert archive.run(table, *flags) == 0
    assert before == {path: path.read_bytes() for path in archive.out.glob("*.csv")}
    assert archive.run(table, *FLAGS) == 0
    assert polarities(archive) == {"a": expected if said else ("unknown", "")}


@pytest.mark.parametrize(
    ("kind", "photometric", "said", "problems"),
    [
        ("normal", "MONOCHROME2", "", []),
        ("negative", "MONOCHROME1", "", []),
        ("negative", "MONOCHROME1", "inverted", []),
        ("doubtful", "MONOCHROME2", "", []),
        ("negative", "MONOCHROME2", "", ["header MONOCHROME2 counts, but the pixels look inverted"]),
        ("normal", "MONOCHROME1", "", ["header MONOCHROME1 counts, but the pixels look inverted"]),
        ("normal", "MONOCHROME2", "1", ["table inverted, header MONOCHROME2: the header counts"]),
    ],
)
def test_dicom_is_what_its_header_says_and_pixels_that_differ_are_listed(
    archive, kind, photometric, said, problems
):
    picture = make_dicom(PICTURES[kind], PhotometricInterpretation=photometric)
    save(picture, archive.images / "a.dcm")
    assert archive.run(archive.table(f"path,exam,kind\na.dcm,E,{said}\n"), *FLAGS) == 0
    assert polarities(archive) == {"a": ("as_is", "header")}
    found = archive.problems("polarity")
    assert len(found) == len(problems)
    assert all(expected in text for expected, text in zip(problems, found, strict=True))
    written = cv2.imread(str(archive.out / "training/E_a.png"), cv2.IMREAD_UNCHANGED)
    negative = photometric == "MONOCHROME1"
    np.testing.assert_array_equal(written, 4095 - PICTURES[kind] if negative else PICTURES[kind])


def test_other_words_are_refused_beyond_a_tenth(archive, capsys):
    rows = [(f"i{number:02d}.png", "as_is") for number in range(11)]
    for name, _ in rows:
        archive.png(name)
    text = "path,exam,kind\n" + "".join(f"{name},E,{word}\n" for name, word in rows)
    wrong = archive.table(text.replace("as_is", "dark", 2))
    message = refusal(archive, capsys, wrong, *FLAGS, "--test_share", "0")
    assert "table.csv line 2: 2 of 11 values of kind are not understood: 'dark' (2)" in message
    assert "MONOCHROME1" in message
    assert archive.run(archive.table(text.replace("as_is", "dark", 1)), *FLAGS, "--test_share", "0") == 0
    assert "1 of 11 values of kind are not understood and left empty" in capsys.readouterr().out
    assert list(polarities(archive).values()) == [("unknown", "")] + [("as_is", "table")] * 10


def test_what_an_earlier_version_judged_does_not_count(archive):
    """It took most films for negatives and half of the chest walls for the other side."""
    archive.png("a.png", NORMAL)
    table = archive.table("path,exam,kind,side\na.png,E,,L\n")
    flags = (FLAGS[0], FLAGS[1] + ",laterality=side", "--verify")
    assert archive.run(table, *flags) == 0
    fresh = (archive.out / "manifest.csv").read_bytes()
    checks = archive.read("image_checks.csv").drop(columns="margin")
    checks.assign(air="bright", chest_wall="right").to_csv(archive.out / "image_checks.csv", index=False)
    manifest = archive.read("manifest.csv").drop(columns=["polarity", "polarity_from"])
    manifest.to_csv(archive.out / "manifest.csv", index=False)
    assert archive.run(table, *flags[:-1]) == 0
    assert polarities(archive) == {"a": ("unknown", "")}
    assert not (archive.out / "problems.csv").exists()
    assert archive.run(table, *flags) == 0
    assert (archive.out / "manifest.csv").read_bytes() == fresh


def test_tiny_and_blank_images_are_not_judged():
    for pixels in (
        np.full(SHAPE, 7, np.uint16),
        np.eye(15, dtype=np.uint8),
        np.eye(1, 40, dtype=np.uint8),
    ):
        facts = prep.examine(pixels)
        assert (facts["air"], facts["chest_wall"], facts["margin"]) == ("", "", prep.NO_VOTE)
    colours = np.repeat(NORMAL[..., None], 3, axis=2)
    assert prep.examine(colours)["chest_wall"] == "left"
