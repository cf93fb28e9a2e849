"""Which files count as images, and which hold one picture as it is stored: both scripts agree."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from test_prepare_dicom import breast, make_dicom, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_dataset as prep  # noqa: E402
from byol_mammo import images  # noqa: E402


def lay_out(folder: Path, *extra: str, csv: str = "none") -> int:
    """Lay the images in folder/in out to folder/out."""
    places = ["--images_root", str(folder / "in"), "--output_dir", str(folder / "out")]
    return prep.main(["--csv_path", csv, "--test_share", "0", *places, *extra])


def sources(folder: Path) -> list[str]:
    """Where the images laid out come from."""
    return pd.read_csv(folder / "out/manifest.csv", keep_default_na=False)["source"].tolist()


def reasons(folder: Path) -> dict[str, str]:
    """Why what was skipped was skipped, by source; {} where nothing was."""
    path = folder / "out/skipped.csv"
    return pd.read_csv(path).set_index("source")["reason"].to_dict() if path.exists() else {}


def png(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", breast(seed=seed))[1].tobytes())


def bare(path: Path, **encoding: object) -> None:
    """A data set without preamble and meta information."""
    dataset = make_dicom(breast(seed=9))
    dataset.file_meta = FileMetaDataset()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, little_endian=True, **encoding)


# DICOM by content ---------------------------------------------------------------------------------

NAMES = ["a.IMA", "b.img", "c.mg", "IMG0001", "d.dcm.1", "1.2.840.99", "e.dcm", "f.DICOM"]


def test_dicom_is_told_by_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(NAMES):
        save(make_dicom(breast(seed=seed)), tmp_path / "in/p1" / name)
    bare(tmp_path / "in/p1/implicit", implicit_vr=True)
    bare(tmp_path / "in/p1/explicit.old", implicit_vr=False)
    save(make_dicom(breast()), tmp_path / "in/p1/DICOMDIR")
    for name in ("a.txt", "b.txt", "c.pdf", "README", "empty"):
        (tmp_path / "in/p1" / name).write_text("" if name == "empty" else "DICM, in words" * 20)
    assert lay_out(tmp_path) == 0
    assert sorted(sources(tmp_path)) == sorted(f"p1/{n}" for n in [*NAMES, "implicit", "explicit.old"])
    assert "note: not looked at: 3 without suffix, 2 .txt, 1 .pdf\n" in capsys.readouterr().out


def test_a_table_finds_dicom_under_any_suffix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sidecar of the same name is not taken for the image, and a second image is told."""
    for seed, name in enumerate(["one.zzz", "two.dcm.1", "three.IMA"]):
        save(make_dicom(breast(seed=seed)), tmp_path / "in/s" / name)
    (tmp_path / "in/s/one.hdr").write_text("beside it")
    png(tmp_path / "in/s/three.png", 7)
    rows = "".join(f"s,{name},training\n" for name in ("one", "two", "three"))
    (tmp_path / "t.csv").write_text("study_id,image_id,split\n" + rows)
    assert lay_out(tmp_path, csv=str(tmp_path / "t.csv")) == 0
    assert sources(tmp_path) == ["s/one.zzz", "s/two.dcm.1", "s/three.png"]
    output = capsys.readouterr().out
    assert "1 images have several files: s/three.png taken, s/three.IMA not" in output
    assert "note: not looked at: 1 .hdr, 1 .ima\n" in output


# Hidden files -------------------------------------------------------------------------------------

HIDDEN = [
    ".ipynb_checkpoints/a.png", ".Trash-0/files/b.png", ".Trashes/c.png", "@eaDir/d.png",
    "__MACOSX/e.png", "._f.png", ".DS_Store", "lost+found/g.png", ".hidden.png", "p1/@EADIR/h.png",
    "p1/._i.dcm",
]  # fmt: skip


def test_hidden_files_are_left_out_by_both_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png(tmp_path / "in/p1/good.png")
    for seed, name in enumerate(HIDDEN):
        png(tmp_path / "in" / name, seed + 1)
    assert lay_out(tmp_path) == 0
    assert sources(tmp_path) == ["p1/good.png"]
    output = capsys.readouterr().out
    assert f"note: {len(HIDDEN)} hidden or system files and folders left out: " in output
    assert "not looked at" not in output
    found = images.list_sources(tmp_path / "in")
    assert found["image"].tolist() == ["p1/good.png"]
    images.note_left_out(found)
    note = f"note: {len(HIDDEN)} hidden or system files and folders left out: '.DS_Store' ...\n"
    assert capsys.readouterr().err == note


# One picture as stored ----------------------------------------------------------------------------


def encoded(kind: str, orientation: int = 1, pictures: int = 1) -> bytes:
    """A picture as Pillow writes it, with an orientation, or with several pictures in the file."""
    first, *others = (Image.fromarray(breast(8, seed=seed)) for seed in range(pictures))
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    more = {"save_all": True, "append_images": others} if others else {}
    first.save(out, kind, exif=exif, **more)
    return out.getvalue()


def with_xmp(orientation: int) -> bytes:
    """A PNG whose orientation stands in XMP alone."""
    from PIL.PngImagePlugin import PngInfo

    out, info = io.BytesIO(), PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<rdf:Description tiff:Orientation="{orientation}"/>')
    Image.fromarray(breast(8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


TURNED = [(kind, turn) for kind in ("JPEG", "PNG", "TIFF") for turn in (1, 2, 3, 6, 8)]
SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "MPO": ".jpg"}
PICTURES = {
    **{f"{kind}{turn}{SUFFIX[kind]}": (encoded(kind, turn), turn > 1 and f"orientation {turn}")
       for kind, turn in TURNED},
    "xmp1.png": (with_xmp(1), False),
    "xmp6.png": (with_xmp(6), "orientation 6"),
    "pages.tif": (encoded("TIFF", pictures=3), "holds 3 pages"),
    "animated.png": (encoded("PNG", pictures=2), "holds 2 pages"),
    "two.jpg": (encoded("MPO", pictures=2), "holds 2 pages"),
}  # fmt: skip


@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_what_is_not_one_picture_as_stored_is_named_by_both_scripts(
    tmp_path: Path, verify: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name, (content, _) in PICTURES.items():
        (tmp_path / "in" / name).write_bytes(content)
    assert lay_out(tmp_path, *verify) == 1
    found = reasons(tmp_path)
    wrong = {name: words for name, (_, words) in PICTURES.items() if words}
    assert found.keys() == wrong.keys()
    for name, words in wrong.items():
        assert words in found[name], name
        with pytest.raises(images.ImageReadError, match=words):
            images.decode(tmp_path / "in" / name)
    for name in PICTURES.keys() - wrong.keys():
        assert images.decode(tmp_path / "in" / name).shape == (96, 80)
    output = capsys.readouterr().out
    assert "\n  for: 13 to be turned by its EXIF tag, 2 holds 2 pages, 1 holds 3 pages\n" in output


def test_a_png_damaged_before_its_pixels_is_named(tmp_path: Path) -> None:
    content = encoded("PNG", 6)
    at = content.index(b"eXIf")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(content[: at - 4] + b"\xff\xff\xff\xff" + content[at:])
    png(tmp_path / "in/b.png")
    assert lay_out(tmp_path) == 1
    assert "damaged before its pixels" in reasons(tmp_path)["a.png"]
    assert sources(tmp_path) == ["b.png"]


def test_grey_values_of_a_png_with_text_stay(tmp_path: Path) -> None:
    """Notes before the pixels are common, and a tag of the usual orientation changes nothing."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encoded("PNG", 1))
    assert lay_out(tmp_path) == 0
    laid_out = next((tmp_path / "out").glob("*/*.png"))
    assert np.array_equal(cv2.imread(str(laid_out), -1), breast(8))
