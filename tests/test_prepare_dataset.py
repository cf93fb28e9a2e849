"""prepare_dataset: layout, refusals, skips, reruns, kills and the command line, on tiny images."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_dataset as prep  # noqa: E402
from byol_mammo import files  # noqa: E402
from byol_mammo.settings import MammoError  # noqa: E402

COLUMNS = ["study_id", "series_id", "image_id", "laterality", "view_position", "height", "width"]
COLUMNS += ["breast_birads", "breast_density", "split"]
# By every run here: noise of one size makes files of one length, whose bytes are compared.
WRITTEN = ["manifest.csv", "image_checks.csv", "prepare_report.html"]


# Building blocks ----------------------------------------------------------------------------------


def pixels(seed: int, dtype: type = np.uint16, shape: tuple[int, int] = (12, 9)) -> np.ndarray:
    """A small image of noise."""
    high = int(np.iinfo(dtype).max) + 1
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def row(study: str, image: str, split: str, **other: str) -> dict[str, str]:
    """One CSV row in VinDr-Mammo's columns."""
    values = {"series_id": "x", "laterality": "L", "view_position": "CC", "height": "12"}
    values |= {"width": "9", "breast_birads": "BI-RADS 1", "breast_density": "DENSITY C"}
    return {"study_id": study, "image_id": image, "split": split, **values, **other}


class Archive:
    """An archive in tmp_path, and runs of the program on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.csv, self.images = folder / "annotations.csv", folder / "png"
        self.images.mkdir()
        self.rows: list[dict[str, str]] = []
        self.arguments = ["--csv_path", str(self.csv), "--images_root", str(self.images)]
        self.arguments += ["--output_dir", str(self.out)]

    def write_csv(self, **options: object) -> None:
        pd.DataFrame(self.rows, columns=COLUMNS).to_csv(self.csv, index=False, **options)

    def add(self, study: str, image: str, split: str, suffix: str = ".png", **other: str) -> Path:
        """Append a CSV row and write its image; the CSV is written anew."""
        path = self.image(study, image, suffix)
        self.rows.append(row(study, image, split, **other))
        self.write_csv()
        return path

    def image(self, study: str, image: str, suffix: str = ".png") -> Path:
        """Write an image file."""
        path = self.images / study / (image + suffix)
        path.parent.mkdir(exist_ok=True)
        dtype = np.uint8 if suffix == ".jpg" else np.uint16
        assert cv2.imwrite(str(path), pixels(zlib.crc32(path.name.encode()), dtype))
        return path

    def run(self, *extra: str) -> int:
        return prep.main([*self.arguments, *extra])

    def report(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.out / name, dtype=str, keep_default_na=False)

    def files(self) -> list[str]:
        return list(self.report("manifest.csv")["file"])


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Two training studies and one test study, three images."""
    built = Archive(tmp_path)
    built.add("s1", "a", "training")
    built.add("s2", "b", "training")
    built.add("s3", "c", "test")
    return built


def tree(folder: Path, times: bool = True) -> dict[str, tuple]:
    """Name -> kind, content hash and modification time (folders included) below `folder`."""
    result = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        name = path.relative_to(folder).as_posix()
        result[name] = (kind, content, path.lstat().st_mtime_ns if times else 0)
    return result


def refused(archive: Archive, capsys: pytest.CaptureFixture[str]) -> str:
    """Run expecting a refusal that writes nothing; returns the message."""
    assert archive.run() == 2
    assert not archive.out.exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


# What is laid out ---------------------------------------------------------------------------------


def test_layout_and_manifest(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert archive.run() == 0
    manifest = archive.report("manifest.csv")
    assert list(manifest.columns)[:11] == [
        *["file", "study_id", "image_id", "laterality", "view", "breast_birads"],
        *["breast_density", "height", "width", "bit_depth", "split"],
    ]
    assert list(manifest["file"]) == ["training/s1_a.png", "training/s2_b.png", "test/s3_c.png"]
    first = manifest.iloc[0]
    assert (first.laterality, first["view"], first.breast_birads) == ("L", "CC", "BI-RADS 1")
    assert (first.height, first.width, first.bit_depth, first.source) == ("12", "9", "16", "s1/a.png")
    assert os.path.samefile(archive.out / "training/s1_a.png", archive.images / "s1/a.png")
    assert sorted(tree(archive.out)) == sorted([*manifest["file"], "training", "test", *WRITTEN])
    output = capsys.readouterr().out
    assert f"Next: python train_byol_mammo.py --data_dir {archive.out}/training\n" in output
    assert "2 images" in output
    assert "1 studies" in output


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink"])
def test_modes(archive: Archive, mode: str) -> None:
    assert archive.run("--mode", mode) == 0
    source, output = archive.images / "s1/a.png", archive.out / "training/s1_a.png"
    assert output.read_bytes() == source.read_bytes()
    assert output.is_symlink() == (mode == "symlink")
    assert (output.lstat().st_ino == source.stat().st_ino) == (mode == "hardlink")


def test_modes_follow_one_another(archive: Archive) -> None:
    for mode in ["hardlink", "copy", "symlink", "hardlink"]:
        assert archive.run("--mode", mode) == 0
        output = archive.out / "training/s1_a.png"
        same = output.lstat().st_ino == (archive.images / "s1/a.png").stat().st_ino
        assert (output.is_symlink(), same) == (mode == "symlink", mode == "hardlink")


def test_falls_back_to_copies(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    assert archive.run() == 0
    assert "hard links were not possible" in capsys.readouterr().out
    output = archive.out / "training/s1_a.png"
    assert output.read_bytes() == (archive.images / "s1/a.png").read_bytes()
    assert output.stat().st_nlink == 1
    before = tree(archive.out)
    assert archive.run() == 0
    assert tree(archive.out) == before


def test_source_behind_a_symlink_is_linked_as_a_file(archive: Archive) -> None:
    source = archive.images / "s1/a.png"
    real = archive.folder / "store"
    source.rename(real)
    source.symlink_to(real)
    assert archive.run() == 0
    output = archive.out / "training/s1_a.png"
    assert not output.is_symlink()
    assert os.path.samefile(output, real)


@pytest.mark.parametrize(("suffix", "dtype"), [(".tif", np.uint16), (".tiff", np.uint8)])
def test_tiff_is_reencoded_without_loss(archive: Archive, suffix: str, dtype: type) -> None:
    path = archive.add("s4", "t", "training", suffix)
    cv2.imwrite(str(path), pixels(7, dtype))
    assert archive.run() == 0
    read = cv2.imread(str(archive.out / "training/s4_t.png"), cv2.IMREAD_UNCHANGED)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, pixels(7, dtype))
    depth = archive.report("manifest.csv").set_index("image_id").at["t", "bit_depth"]
    assert depth == str(8 * np.dtype(dtype).itemsize)


def test_jpeg_is_reencoded_as_decoded(archive: Archive) -> None:
    path = archive.add("s4", "j", "training", ".jpg")
    assert archive.run("--mode", "symlink") == 0
    output = archive.out / "training/s4_j.png"
    assert output.read_bytes().startswith(b"\x89PNG")
    assert not output.is_symlink()
    read = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (output, path)]
    np.testing.assert_array_equal(*read)
    before = tree(archive.out)
    assert archive.run("--mode", "symlink") == 0
    assert tree(archive.out) == before


@pytest.mark.parametrize(("dtype", "channels", "depth"), [(np.uint8, 1, 8), (np.uint16, 3, 16)])
def test_png_header(tmp_path: Path, dtype: type, channels: int, depth: int) -> None:
    image = np.zeros((21, 13, channels), dtype)
    cv2.imwrite(str(tmp_path / "x.png"), image)
    assert prep.read_png_header(tmp_path / "x.png") == (21, 13, depth)
    with open(tmp_path / "x.png", "ab") as file:
        file.write(b"a comment some archive appended")
    assert prep.read_png_header(tmp_path / "x.png") == (21, 13, depth)


# The table ----------------------------------------------------------------------------------------


def test_ids_are_strings_and_bom_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    archive.add("007", "0010", "training")
    archive.write_csv(encoding="utf-8-sig")
    with open(archive.csv, "a") as file:
        file.write("\n\n")
    assert archive.csv.read_bytes().startswith(b"\xef\xbb\xbf")
    assert archive.run() == 0
    assert archive.files() == ["training/007_0010.png"]


@pytest.mark.parametrize("column", ["study_id", "image_id", "split"])
@pytest.mark.parametrize("value", ["", "  ", "NaN"])
def test_absent_ids_are_refused(
    archive: Archive, column: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.rows[1][column] = value
    archive.write_csv()
    message = refused(archive, capsys)
    assert "line 3" in message
    assert column in message


UNSAFE = ["..", ".", "../x", "/etc/x", "a/b", "a\\b", "a\0b", ".hidden", "x" * 101, "C:x", "a\nb"]
UNSAFE += ["-rf", "manifest.csv", "a b", "ﬀ", "٣"]


@pytest.mark.parametrize("column", ["study_id", "image_id", "split"])
@pytest.mark.parametrize("value", UNSAFE)
def test_unsafe_names_are_refused(
    archive: Archive, column: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.rows[2][column] = value
    archive.write_csv()
    message = refused(archive, capsys)
    assert "line 4" in message
    assert column in message


@settings(max_examples=300, deadline=None)
@given(st.tuples(*[st.text(max_size=120) | st.from_regex(r"[\w./\\~:-]{1,9}") for _ in range(3)]))
@example(("..", "..", ".."))
@example(("a", "b", "training"))
@example(("x" * 100, "y" * 100, "z" * 100))
def test_accepted_names_stay_inside(names: tuple[str, str, str]) -> None:
    study, image, split = names
    table = pd.DataFrame([{"study_id": study, "image_id": image, "split": split}], index=[2])
    try:
        prep.check_ids(table, prep.VINDR)
    except MammoError:
        return
    file = prep.name_files(table)["file"].iloc[0]
    out = Path("/some/where/out")
    path = Path(os.path.normpath(out / file))
    assert path.parent.parent == out
    assert path.parent.name == split
    assert path.name == f"{study}_{image}.png"
    assert len(os.fsencode(files.unfinished_name(path).name)) <= 255
    assert prep.OUTPUT_NAME.fullmatch(file)


def test_ordinary_names_are_accepted() -> None:
    for name in ["0025a5dc" * 4, "1.2.840.113", "P_001-L", "_x", "x" * 100]:
        assert prep.is_safe_name(name)


def test_study_in_two_splits_is_refused(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.add("s1", "d", "test")
    message = refused(archive, capsys)
    assert "s1 (test and training)" in message
    assert "s2" not in message


def test_identical_duplicates_are_dropped(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.rows += [archive.rows[0], {**archive.rows[1], "series_id": "a column not used"}]
    archive.write_csv()
    assert archive.run() == 0
    assert "2 identical duplicate rows" in capsys.readouterr().out
    assert len(archive.files()) == 3


def test_disagreeing_duplicates_are_refused(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.rows.append({**archive.rows[1], "breast_birads": "BI-RADS 5"})
    archive.write_csv()
    message = refused(archive, capsys)
    assert "s2/b" in message
    assert "breast_birads" in message
    assert "line 3, " in message
    assert "line 5)" in message


@pytest.mark.parametrize("other", [("s1_x", "a"), ("S1", "x_a")])
def test_two_images_of_one_file_name_are_refused(
    archive: Archive, other: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    archive.add("s1", "x_a", "training")
    archive.add(*other, "training")
    assert "share one file name" in refused(archive, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["empty.csv", "No columns"]),
        ("study_id,image_id,split\n", ["no rows"]),
        ("study_id;image_id;split\ns1;a;training\n", ["semicolons", "commas"]),
        ("study_id;image_id;split\ns1;a,b;training\n", ["semicolons"]),
        ("study_id\timage_id\tsplit\ns1\ta\ttraining\n", ["tabs"]),
        ("study,image_id,fold\ns1,a,training\n", ["study_id (nearest: study)", "image_id", "fold"]),
        ("STUDY_ID,image_id,split\ns1,a,training\n", ["study_id (nearest: STUDY_ID)"]),
        ("study_id,image_id,split\n\ns1,,training\n", ["line 3", "image_id is empty"]),
        ("study_id,image_id,split,split\ns1,a,training,test\n", ["split twice"]),
        ("study_id,image_id,split\ns1,a,training,b\n", ["Length of header"]),
        ("study_id,image_id,split\ns1,a,training\ns1,b,training,c\n", ["line 3"]),
    ],
)
def test_wrong_tables_are_refused(
    archive: Archive, text: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    archive.csv = archive.folder / "empty.csv"
    archive.csv.write_text(text)
    archive.arguments[1] = str(archive.csv)
    message = refused(archive, capsys)
    assert [part for part in expected if part not in message] == []


def test_not_a_text_table_is_refused(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.csv.write_bytes("study_id,image_id,split\nä,b,training\n".encode("latin-1"))
    assert "UTF-8" in refused(archive, capsys)


def test_optional_columns_may_be_absent(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame(archive.rows)[["split", "image_id", "study_id"]].to_csv(archive.csv, index=False)
    assert archive.run() == 0
    assert (
        "not in the CSV, so empty in the manifest: laterality, view_position" in capsys.readouterr().out
    )
    assert set(archive.report("manifest.csv")["view"]) == {""}


# The files ----------------------------------------------------------------------------------------


def test_missing_and_extra_files(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    (archive.images / "s2/b.png").unlink()
    for number in range(12):
        archive.image("s9", f"e{number:02d}")
    archive.image("s1", "loose").rename(archive.images / "loose.png")
    (archive.images / "s1/._a.png").write_bytes(b"resource fork")
    (archive.images / "s1/notes.txt").write_text("no image")
    assert archive.run() == 1
    output = capsys.readouterr().out
    assert "missing: 1 " in output
    assert "s2/b" in output
    assert "extra: 13 " in output
    assert "s9/e08.png and 3 more" in output
    assert archive.report("missing.csv").to_dict("records") == [
        {"study_id": "s2", "image_id": "b", "split": "training"}
    ]
    expected = ["loose.png", *(f"s9/e{number:02d}.png" for number in range(12))]
    assert list(archive.report("extra.csv")["file"]) == expected
    # Once the archive is in order, the lists of what was wrong go away.
    archive.image("s2", "b")
    (archive.images / "loose.png").unlink()
    for path in (archive.images / "s9").iterdir():
        path.unlink()
    assert archive.run() == 0
    assert not (archive.out / "missing.csv").exists()
    assert not (archive.out / "extra.csv").exists()


def test_unprintable_file_names_are_listed(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsencode(archive.images) + b"/s1/\xff\x1b[31m\n.png"
    with open(name, "wb") as file:
        file.write(b"x")
    assert archive.run() == 0
    output = capsys.readouterr().out
    assert "extra: 1 " in output
    assert "\x1b" not in output
    assert b"udcff" in (archive.out / "extra.csv").read_bytes()


def test_several_files_of_one_image(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.image("s1", "a", ".jpg")
    archive.image("s1", "a", ".tif")
    (archive.images / "s1/a.json").write_text("{}")
    assert archive.run() == 0
    assert archive.report("manifest.csv")["source"].iloc[0] == "s1/a.png"
    output = capsys.readouterr().out
    assert "1 images have several files: s1/a.png taken, s1/a.tif, s1/a.jpg not" in output


def test_png_taking_over_from_jpeg_replaces_it(archive: Archive) -> None:
    path = archive.add("s4", "j", "training", ".jpg")
    assert archive.run() == 0
    png = archive.image("s4", "j")
    os.utime(png, ns=(path.stat().st_mtime_ns,) * 2)
    assert archive.run("--mode", "copy") == 0
    assert (archive.out / "training/s4_j.png").read_bytes() == png.read_bytes()


def test_size_other_than_in_the_csv(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.rows[0] |= {"height": "99", "width": "9"}
    archive.rows[1] |= {"height": "12.0", "width": "9.0"}
    archive.rows[2] |= {"height": "unknown", "width": ""}
    archive.write_csv()
    assert archive.run() == 0
    assert "different size: 1 " in (output := capsys.readouterr().out)
    assert "training/s1_a.png (12 x 9, CSV 99 x 9)" in output
    assert archive.report("manifest.csv")["height"].iloc[0] == "12"


def damaged(path: Path, how: str) -> None:
    """Replace an image by something that is not one."""
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "broken link":
        path.symlink_to(path.with_name("gone.png"))
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "bomb":
        head = content[12:16] + (100_000).to_bytes(4, "big") * 2 + content[24:29]
        crc = zlib.crc32(head).to_bytes(4, "big")
        path.write_bytes(content[:12] + head + crc + content[33:])
    else:
        flipped = content[:20] + bytes([content[20] ^ 255]) + content[21:]
        forms = {"empty": b"", "text": b"<html>not found</html>" * 5, "cut": content[:-40]}
        path.write_bytes({**forms, "stub": content[:20], "header": flipped}[how])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("folder", "is a folder"),
        ("loop", "cannot be opened"),
        ("broken link", "cannot be opened"),
        ("pipe", "not a regular file"),
        ("empty", "empty"),
        ("text", "not a PNG"),
        ("stub", "not a PNG"),
        ("cut", "cut short"),
        ("header", "checksum"),
        ("bomb", "100000 x 100000 pixels"),
    ],
)
def test_bad_image_among_good_ones(
    archive: Archive, how: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(archive.images / "s2/b.png", how)
    assert archive.run() == 1
    assert archive.files() == ["training/s1_a.png", "test/s3_c.png"]
    assert not os.path.lexists(archive.out / "training/s2_b.png")
    skipped = archive.report("skipped.csv")
    assert list(skipped["source"]) == ["s2/b.png"]
    assert reason in skipped["reason"].iloc[0]
    assert "skipped: 1 " in capsys.readouterr().out
    path = archive.images / "s2/b.png"
    path.rmdir() if how == "folder" else path.unlink()
    archive.image("s2", "b")
    assert archive.run() == 0
    assert not (archive.out / "skipped.csv").exists()


@pytest.mark.parametrize(
    ("suffix", "content", "reason"),
    [
        (".dcm", b"DICM", "not a DICOM image"),
        (".DICOM", b"", "not a DICOM image"),
        (".nii", b"x", ".nii is not read"),
        ("", b"x", "without suffix"),
        (".tif", b"II*\0 nothing", "cannot be decoded"),
        (".jpg", b"", "cannot be decoded"),
    ],
)
def test_other_formats_are_skipped_by_name(
    archive: Archive, suffix: str, content: bytes, reason: str
) -> None:
    path = archive.add("s4", "d", "training")
    path.unlink()
    path.with_suffix(suffix).write_bytes(content)
    assert archive.run() == 1
    assert reason in archive.report("skipped.csv")["reason"].iloc[0]
    assert len(archive.files()) == 3


def test_tiff_that_is_no_plain_image_is_skipped(archive: Archive) -> None:
    path = archive.add("s4", "float", "training", ".tif")
    cv2.imwrite(str(path), pixels(1).astype(np.float32))
    path = archive.add("s4", "pages", "training", ".tif")
    assert cv2.imwritemulti(str(path), [pixels(1), pixels(2)])
    path = archive.add("s4", "cut", "training", ".jpg")
    path.write_bytes(path.read_bytes()[:-60])
    assert archive.run() == 1
    reasons = archive.report("skipped.csv").set_index("image_id")["reason"]
    assert "float32" in reasons["float"]
    assert "2 pages" in reasons["pages"]
    assert "cannot be decoded" in reasons["cut"]
    assert len(reasons) == 3


def test_huge_images_are_not_decoded(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.add("s4", "j", "training", ".jpg")
    archive.add("s4", "t", "training", ".tif")
    monkeypatch.setattr(prep, "MAX_SAMPLES", 100)
    assert archive.run() == 1
    reasons = archive.report("skipped.csv")["reason"]
    assert len(reasons) == 5
    assert reasons.str.contains("declares 12 x 9 pixels, more than 100").all()
    assert list(archive.out.glob("*/*.png")) == []


def test_verify_decodes_in_full(archive: Archive) -> None:
    path = archive.images / "s2/b.png"
    cv2.imwrite(str(path), pixels(3, shape=(60, 50)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert archive.run() == 0
    assert archive.run("--verify") == 1
    assert archive.files() == ["training/s1_a.png", "test/s3_c.png"]
    # A link is taken away again: its source keeps the bytes, and training must not see them.
    assert not (archive.out / "training/s2_b.png").exists()
    assert path.exists()


def test_nothing_found_is_refused(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    (archive.folder / "up").mkdir()
    archive.images.rename(archive.folder / "up/png")
    assert f"no folder {archive.images}" in refused(archive, capsys)
    archive.arguments[3] = str(archive.folder / "up")
    message = refused(archive, capsys)
    assert "0 of the 3 images" in message
    assert f"try --images_root {archive.folder}/up/png" in message


def test_only_unread_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = Archive(tmp_path)
    archive.add("s1", "a", "training").rename(archive.images / "s1/a.dcm")
    assert archive.run() == 1
    output = capsys.readouterr().out
    assert "0 images laid out" in output
    assert "Next:" not in output


@pytest.mark.parametrize("place", ["png", "png/out", "."])
def test_folders_inside_each_other_are_refused(archive: Archive, place: str) -> None:
    before = tree(archive.folder)
    archive.arguments[5] = str(archive.folder / place)
    assert archive.run() == 2
    assert tree(archive.folder) == before


# Running again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink"])
def test_second_run_touches_and_opens_nothing(
    archive: Archive, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.add("s4", "t", "test", ".tif")
    archive.image("s9", "extra")
    for path in archive.images.glob("*/*"):
        os.utime(path, ns=(10**18, 10**18 + 123))
    archive.rows.append(row("s5", "gone", "test"))
    archive.write_csv()
    assert archive.run("--mode", mode) == 1
    before = tree(archive.out)

    def opened(path: Path) -> None:
        raise AssertionError(f"{path} was opened again")

    monkeypatch.setattr(prep, "read_png_header", opened)
    monkeypatch.setattr(prep, "read_source", opened)
    monkeypatch.setattr(os, "replace", opened)
    assert archive.run("--mode", mode) == 1
    assert tree(archive.out) == before


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink"])
@pytest.mark.parametrize("how", ["rewritten", "new file"])
def test_changed_source_is_replaced(archive: Archive, mode: str, how: str) -> None:
    assert archive.run("--mode", mode) == 0
    source = archive.images / "s1/a.png"
    size, time = source.stat().st_size, source.stat().st_mtime_ns
    new = pixels(99)
    if how == "new file":
        source.unlink()
    cv2.imwrite(str(source), new)
    assert source.stat().st_size == size  # noise of one shape: only the time tells
    os.utime(source, ns=(time + 1000, time + 1000))
    assert archive.run("--mode", mode) == 0
    read = cv2.imread(str(archive.out / "training/s1_a.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read, new)
    assert archive.report("manifest.csv")["source_mtime_ns"].iloc[0] == str(time + 1000)


def test_deleted_output_comes_back(archive: Archive) -> None:
    assert archive.run() == 0
    before = tree(archive.out, times=False)
    (archive.out / "training/s1_a.png").unlink()
    assert archive.run() == 0
    assert tree(archive.out, times=False) == before


def test_study_that_moves_leaves_its_old_split(archive: Archive) -> None:
    assert archive.run("--mode", "copy") == 0
    archive.rows[1]["split"] = "test"
    archive.write_csv()
    assert archive.run("--mode", "copy") == 0
    assert not (archive.out / "training/s2_b.png").exists()
    assert (archive.out / "test/s2_b.png").exists()
    assert archive.files() == ["training/s1_a.png", "test/s2_b.png", "test/s3_c.png"]


def test_edited_output_is_not_removed(archive: Archive) -> None:
    assert archive.run("--mode", "copy") == 0
    edited = archive.out / "training/s2_b.png"
    edited.write_bytes(b"edited by hand")
    archive.rows[1]["split"] = "test"
    archive.write_csv()
    assert archive.run("--mode", "copy") == 0
    assert not edited.exists()  # training would read it
    assert (archive.out / ".earlier/training/s2_b_1.png").read_bytes() == b"edited by hand"


def test_output_whose_source_is_gone_is_kept(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    assert archive.run() == 0
    (archive.images / "s2/b.png").unlink()
    assert archive.run() == 1
    assert not (archive.out / "training/s2_b.png").exists()  # no row tells what it is
    assert (archive.out / ".earlier/training/s2_b_1.png").exists()  # the only copy left
    assert "1 set aside in .earlier" in capsys.readouterr().out


def test_foreign_files_are_left_and_counted(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    (archive.out / "training").mkdir(parents=True)
    mine = [archive.out / "notes.txt", archive.out / "training/s1_a.png"]
    for path in mine:
        path.write_text("mine")
    (archive.out / "labels.csv").write_text("another step's")
    assert archive.run() == 1
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    output = capsys.readouterr().out
    assert "foreign: 2 " in output
    assert "notes.txt, training/s1_a.png" in output
    assert "in the way" in archive.report("skipped.csv")["reason"].iloc[0]


@pytest.mark.parametrize("name", ["manifest.csv", "missing.csv", "skipped.csv", "extra.csv"])
def test_reports_of_others_are_not_overwritten(
    archive: Archive, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.out.mkdir()
    (archive.out / name).write_text("my,own\n1,2\n")
    before = tree(archive.out)
    assert archive.run() == 2
    assert tree(archive.out) == before
    assert name in capsys.readouterr().err


def test_edited_manifest_removes_nothing_outside(archive: Archive) -> None:
    assert archive.run() == 0
    victim = archive.folder / "victim.png"
    os.link(archive.images / "s1/a.png", victim)
    manifest = archive.report("manifest.csv")
    manifest.loc[1, ["file", "source"]] = ["../victim.png", "s1/a.png"]
    manifest.loc[2, "height"] = "tall"
    manifest.to_csv(archive.out / "manifest.csv", index=False)
    assert archive.run() == 0
    assert victim.exists()
    assert archive.report("manifest.csv")["height"].iloc[2] == "12"


# Stopped part-way ---------------------------------------------------------------------------------

KILLER = """
import json, os, signal, sys
import prepare_dataset
calls, name, limit = 0, sys.argv[1], int(sys.argv[2])
real = getattr(os, name)
def counted(*arguments, **options):
    global calls
    calls += 1
    if calls == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(os, name, counted)
sys.exit(prepare_dataset.main(json.loads(sys.argv[3])))
"""


def killed(archive: Archive, name: str, limit: int, *extra: str) -> bool:
    """Run in a process that dies by SIGKILL at the `limit`-th call of os.`name`; True if it did."""
    arguments = json.dumps([*archive.arguments, *extra])
    command = [sys.executable, "-c", KILLER, name, str(limit), arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize(("mode", "name", "limit"), [("copy", "fsync", 3), ("hardlink", "replace", 3)])
def test_killed_run_is_finished_by_the_next(archive: Archive, mode: str, name: str, limit: int) -> None:
    archive.add("s4", "t", "test", ".tif")
    assert killed(archive, name, limit, "--mode", mode)
    assert not (archive.out / "manifest.csv").exists()
    assert any(files.UNFINISHED in file for file in tree(archive.out))
    assert archive.run("--mode", mode) == 0
    finished = tree(archive.out, times=False)
    other = archive.folder / "uninterrupted"
    archive.arguments[5] = str(other)
    assert archive.run("--mode", mode) == 0
    assert finished == tree(other, times=False)


class StopError(BaseException):
    """Stands for a kill: nothing in the program catches it."""


@pytest.mark.parametrize("mode", ["copy", "hardlink"])
@pytest.mark.parametrize("name", ["replace", "fsync", "unlink"])
def test_stopped_at_every_step(
    archive: Archive, mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a finished tree to that of a changed archive, stopped at each call in turn."""
    archive.add("s4", "t", "test", ".tif")
    archive.add("s5", "moves", "training")
    first_rows = [dict(r) for r in archive.rows]

    def prepared(folder: str) -> None:
        """A new output folder with the first state's result, then the second state's archive."""
        archive.arguments[5], archive.out = str(archive.folder / folder), archive.folder / folder
        archive.rows = [dict(r) for r in first_rows]
        archive.write_csv()
        for study, image in (("s1", "a"), ("s6", "new")):
            (archive.images / study / f"{image}.png").unlink(missing_ok=True)
        archive.image("s1", "a")
        assert archive.run("--mode", mode) == 0
        archive.rows[-1]["split"] = "test"
        archive.add("s6", "new", "training")
        (archive.images / "s1/a.png").unlink()
        cv2.imwrite(str(archive.images / "s1/a.png"), pixels(77, shape=(8, 8)))
        for path in (archive.images / "s1/a.png", archive.images / "s6/new.png"):
            os.utime(path, ns=(10**18, 10**18))

    prepared("expected")
    assert archive.run("--mode", mode) == 0
    expected = tree(archive.out, times=False)
    real = getattr(os, name)
    for limit in range(1, 40):
        prepared(f"stopped{limit}")
        calls = 0

        def counted(*arguments: object, limit: int = limit, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise StopError
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, counted)
            try:
                archive.run("--mode", mode)
                break
            except StopError:
                pass
        assert archive.run("--mode", mode) == 0
        assert tree(archive.out, times=False) == expected
    assert limit > 2


def test_half_written_files_are_swept(archive: Archive) -> None:
    assert killed(archive, "replace", 3)
    assert any(files.UNFINISHED in file for file in tree(archive.out))
    for folder in ("", "training/"):  # of an older version
        (archive.out / f"{folder}.x.png{prep.TEMPORARY}").touch()
    del archive.rows[1]
    archive.write_csv()
    assert archive.run() == 0
    assert sorted(file for file in tree(archive.out) if "." in file) == sorted(
        [*WRITTEN, "extra.csv", "training/s1_a.png", "test/s3_c.png"]
    )


@pytest.mark.parametrize("limit", [4, 5])  # at the third image, at the manifest
@pytest.mark.parametrize("again", [0, 2])  # killed once more, at the first image
def test_source_changed_after_a_kill(archive: Archive, limit: int, again: int) -> None:
    """No manifest yet, but the file in the way is this program's and not the user's."""
    assert killed(archive, "replace", limit)
    assert (archive.out / "training/s2_b.png").exists()
    source = archive.images / "s1/a.png"
    source.unlink()
    cv2.imwrite(str(source), pixels(5, shape=(40, 40)))
    archive.rows[1]["split"] = "test"
    archive.write_csv()
    if again:
        assert killed(archive, "replace", again)
    assert archive.run() == 0
    assert os.path.samefile(archive.out / "training/s1_a.png", source)
    assert not (archive.out / "training/s2_b.png").exists()


def test_full_disk_and_interrupt_stop_with_code_3(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def failing(*_: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            assert archive.run("--mode", "copy") == 3
        assert "resumes" in capsys.readouterr().err
    assert archive.run("--mode", "copy") == 0


def test_an_interrupt_before_anything_is_written_says_so(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name, flags in (("match_files", []), ("print_costs", ["--dry_run"])):
        with monkeypatch.context() as patch:
            patch.setattr(prep, name, interrupted)
            assert archive.run(*flags) == 3
        assert capsys.readouterr().err == (
            "prepare_dataset: stopped: interrupted. Nothing was written.\n"
        )
    assert not archive.out.exists()


# The command line ---------------------------------------------------------------------------------


def command(archive: Archive, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as users start it, in the archive's folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare_dataset.py"), *arguments],
        cwd=archive.folder,
        capture_output=True,
        text=True,
    )


def test_command_with_both_spellings(archive: Archive) -> None:
    done = command(archive, "--csv-path", "annotations.csv", "--images_root=png", "--output-dir=./out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("3 images laid out in out\n")
    assert done.stdout.endswith("Next: python train_byol_mammo.py --data_dir out/training\n")


def test_command_defaults_are_the_documented_ones(archive: Archive) -> None:
    archive.csv.rename(archive.folder / "breast-level_annotations.csv")
    archive.images.rename(archive.folder / "images_png")
    assert command(archive).returncode == 0
    assert (archive.folder / "split_images/training/s1_a.png").exists()


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--csv_pth", "--csv_path"),
        ("--image-root", "--images_root"),
        ("--CSV_PATH", "--csv_path"),
        ("--out", "--output_dir"),
    ],
)
def test_unknown_flag_names_the_nearest(
    flag: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prep.main([flag, "x"]) == 2
    message = capsys.readouterr().err
    assert flag in message
    assert f"nearest: {near} " in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--mode", "move"], ["stray"], ["--csv_path"]])
def test_wrong_values_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prep.main(arguments) == 2
    assert capsys.readouterr().err.startswith("prepare_dataset: error: ")


def test_help_documents_exit_codes_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        prep.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for expected in ["Exit codes", "--csv_path", "--images_root", "--output_dir", "--mode"]:
        assert expected in text
    assert "--verify" in text
    assert "(default: hardlink)" in text


def test_missing_csv_is_refused(archive: Archive) -> None:
    done = command(archive, "--csv_path", "nowhere.csv")
    assert done.returncode == 2
    assert "there is no file nowhere.csv" in done.stderr
    assert done.stdout == ""
    assert not archive.out.exists()
