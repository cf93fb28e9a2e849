"""--dry_run says what would be done, does nothing, and what is done then is what it said."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import cv2
import pandas as pd
import pytest
import torch
from conftest import SMALL, breast_image, places_in, write_images
from test_classifier import QUICK, TILES
from test_prepare_archives import FINDINGS, VINDR, Archive, finding, vindr_row
from test_prepare_dicom import breast, make_dicom, recode, save

import train_byol_mammo as mammo
import train_classifier as classifier
from byol_mammo import extraction, foresight


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def tree(folder: Path) -> dict[str, tuple]:
    """All that is below a folder, with content and times."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
    }


# prepare_dataset.py -------------------------------------------------------------------------------


def mixed(archive: Archive) -> list[str]:
    """A PNG, a DICOM file, a damaged PNG, an image in no row and a row without image."""
    archive.png("s1/a.png")
    archive.dicom("s2/b.dcm")
    archive.png("s3/c.png")
    path = archive.images / "s3/c.png"
    path.write_bytes(path.read_bytes()[:-20])
    archive.png("s9/z.png")
    rows = [vindr_row(f"s{n}", "abcd"[n - 1], "training" if n < 3 else "test") for n in range(1, 5)]
    findings = archive.table(FINDINGS + finding("s1", "a", "['Mass']", "1,2,30,40"), "findings.csv")
    return [archive.table(VINDR + "".join(rows)), "--findings_csv", findings]


SAID = (  # of both the dry run and the run
    r"  training +2 images +2 studies +2 patients",
    r"  mass +1 images with, 0 without, 1 unknown",
    r"missing: 1 .*s4/d",
    r"extra: 1 .*s9/z.png",
    r"skipped: 1 .*s3/c.png \(the PNG file is cut short\)",
)


@pytest.mark.parametrize("mode", ["hardlink", "copy", "symlink"])
def test_a_layout_is_foretold(archive: Archive, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*mixed(archive), "--mode", mode]
    before = tree(archive.folder)
    assert archive.run(*words, "--dry_run") == 1
    foretold = capsys.readouterr().out
    assert tree(archive.folder) == before
    assert archive.run(*words) == 1
    done = capsys.readouterr().out
    for words_of_both in SAID:
        assert re.search(words_of_both, foretold), words_of_both
        assert re.search(words_of_both, done), words_of_both
    linked = {"hardlink": "to be linked", "copy": "to be copied", "symlink": "to be linked by symlink"}
    assert f"2 images would be laid out in {archive.out}" in foretold
    assert f"  1 dcm to be converted, 1 {linked[mode]}\n" in foretold
    assert re.search(r"[\d.]+ kB to read, about [\d.]+ kB to write, about 1 s in 1 processes", foretold)
    assert foretold.endswith("Nothing was written (--dry_run).\n")


def test_what_is_there_and_what_would_go_is_foretold(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    words = mixed(archive)
    assert archive.run(*words) == 1
    before = tree(archive.folder)
    capsys.readouterr()
    assert archive.run(*words, "--dry_run") == 1
    assert "  2 already there\n  0 bytes to read, about 0 bytes to write; " in capsys.readouterr().out
    table = archive.table(VINDR + vindr_row("s1", "a", "training"), "less.csv")
    assert archive.run(table, "--dry_run", "--verify") == 0
    assert "  1 removed or set aside, 1 to be verified\n" in capsys.readouterr().out
    assert {name: found for name, found in tree(archive.folder).items() if name != "less.csv"} == before


@pytest.mark.parametrize("crashes", [False, True])
def test_decoders_that_may_crash_are_tried_in_another_process(
    archive: Archive, crashes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(make_dicom(breast()), archive.images / "p1/a.dcm")
    recode(path, "JPEGLosslessProcess14_1")
    if crashes:  # libjpeg calls exit() where a lossless stream claims more than 16 bits
        content = bytearray(path.read_bytes())
        content[content.index(b"\xff\xc3") + 4] = 88
        path.write_bytes(content)
    assert archive.run("none", "--dry_run") == 0
    said = capsys.readouterr().out
    assert ("ends its decoder" in said) == crashes
    assert bool(re.search(r"about \d+ s in 1 processes", said)) != crashes


def test_a_refusal_comes_before_the_dry_run(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.png("s1/a.png")
    rows = vindr_row("s1", "a", "training") + vindr_row("s1", "b", "test")
    assert archive.run(archive.table(VINDR + rows), "--dry_run") == 2
    assert "s1 (test and training)" in capsys.readouterr().err


# train_byol_mammo.py ------------------------------------------------------------------------------


def foretold(capsys: pytest.CaptureFixture[str], main, *words: str) -> str:
    """What a dry run prints that ends well."""
    assert main([*words, "--dry_run"]) == 0
    return capsys.readouterr().out


def test_a_training_is_foretold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", count=6)
    cv2.imwrite(str(tmp_path / "images" / "s9_small.png"), breast_image(40, 40)[0])
    words = [*places_in(tmp_path), *SMALL, "--max_steps", "2", "--run_name", "r", "--report_every", "0"]
    before = tree(tmp_path)
    said = foretold(capsys, mammo.main, *words)
    assert tree(tmp_path) == before
    assert re.search(r"images    7 of 7 studies in \S+, [\d.]+ kB\n", said)
    found = re.search(r"would be made: about ([\d,]+) tiles, ([\d.]+) kB, \d+ s in 1 processes", said)
    assert found is not None
    assert "skipped   " in said
    assert "is smaller than a tile" in said
    assert re.search(r"training  slim from none: \d+ steps of \d+ tiles an epoch, 2 in all", said)
    assert f"run       {tmp_path / 'runs' / 'r'} is new\n" in said
    mammo.build_cache(mammo.parse_args(words))
    (tmp_path / "runs" / "r").mkdir(parents=True)
    config = mammo.parse_args(words)
    config = mammo.match_input_dim(config, mammo.checkpoints.build_backbone(config.backbone))
    torch.save({"config": dataclasses.asdict(config)}, tmp_path / "runs" / "r" / "last.pth")
    after = tree(tmp_path)
    capsys.readouterr()
    said = foretold(capsys, mammo.main, *words)
    assert tree(tmp_path) == after
    (cache,) = (tmp_path / "cache").glob("[!.]*")
    tiles = len(pd.read_csv(cache / "tiles.csv"))
    assert f"cache     {cache} is there: {tiles:,} tiles, nothing to extract" in said
    assert int(found[1].replace(",", "")) == pytest.approx(tiles, rel=0.5)
    assert float(found[2]) == pytest.approx((cache / "pixels.npy").stat().st_size / 1000, rel=0.5)
    assert f"{tmp_path / 'runs' / 'r'} goes on" in said
    assert f"{tmp_path / 'runs' / 'r'} is moved aside" in foretold(
        capsys, mammo.main, *words, "--no_resume"
    )
    assert mammo.main([*words, "--lr", "0.5", "--dry_run"]) == 2
    assert "holds a run with other settings: --lr 0.002 -> 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(("bits", "flags"), [((8, 12), ()), ((12,), ("--max_tiles", "6")), ((12,), ())])
def test_both_copies_of_a_cache_are_foretold(
    tmp_path: Path, bits: tuple[int, ...], flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number in range(4):
        image = breast_image(seed=number, bits=bits[number % len(bits)])[0]
        (tmp_path / "images").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / f"s{number}.png"), image)
    words = [*places_in(tmp_path), *SMALL, *flags]
    asked, there = [], []
    space = foresight.space_text
    monkeypatch.setattr(foresight, "space_text", lambda *w: asked.append(w[1]) or space(*w))
    said = foretold(capsys, mammo.main, *words)
    gather = extraction.gather_pixels

    def measured(images: pd.DataFrame, parts: list, target: Path, *rest: object) -> None:
        gather(images, parts, target, *rest)
        there.extend(path.stat().st_size for path in {part[0] for part in parts})

    monkeypatch.setattr(extraction, "gather_pixels", measured)
    cache = mammo.build_cache(mammo.parse_args(words))
    there.append((cache / "pixels.npy").stat().st_size)
    assert len(there) == (1 if (bits, flags) == ((12,), ()) else len(bits) + 1)
    assert asked == [pytest.approx(sum(there), rel=0.3 if flags else 0.01)]
    assert ("more until it is in order" in said) == (len(there) > 1)


def test_a_clusters_two_copies_are_foretold() -> None:
    assert foresight.pixel_bytes([(10, 2), (0, 0)], 3) == (60, 0)
    assert foresight.pixel_bytes([(10, 2), (0, 0)], 3, dask="x:1") == (60, 60)
    assert foresight.pixel_bytes([(10, 2), (10, 1)], 3) == (120, 90)
    assert foresight.pixel_bytes([(10, 2)], 3, most=7) == (14, 60)
    assert foresight.pixel_bytes([(0, 0)], 3) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data_dir", "nowhere"), "nowhere: no such folder"),
        (("--weights", "nowhere.pth"), "nowhere.pth"),
        (("--device", "tpu"), "--device tpu"),
        (("--labels", "nowhere.csv"), "nowhere.csv"),
        (("--backbone", "timm:tset_vit"), "nearest: test_vit"),
        (("--input_dim", "7"), "--input_dim 7"),
    ],
)
def test_what_ends_a_run_in_seconds_ends_its_dry_run(
    archive: Archive, flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(archive.folder / "images", count=1)
    words = [*places_in(archive.folder), *SMALL, *flags, "--dry_run"]
    before = tree(archive.folder)
    assert mammo.main(words) == 2
    assert expected in capsys.readouterr().err
    assert tree(archive.folder) == before


# train_classifier.py ------------------------------------------------------------------------------


def test_a_classifier_is_foretold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "training", count=4, height=200, width=160)
    write_images(tmp_path / "test", count=2, height=200, width=160)
    box = json.dumps([{"finding": ["Mass"], "xmin": 5, "ymin": 5, "xmax": 50, "ymax": 50}])
    rows = [
        ("training/s0_i0.png", "training", 1, "", box), ("training/s0_i1.png", "training", 0, 1, "[]"),
        ("training/s1_i2.png", "training", "", 0, ""), ("test/s0_i0.png", "test", 1, 0, ""),
    ]  # fmt: skip
    labels = pd.DataFrame(rows, columns=["image", "split", "mass", "calcification", "boxes"])
    labels["study_id"] = ["a", "a", "b", "c"]
    labels.to_csv(tmp_path / "labels.csv", index=False)
    words = ["--data_dir", str(tmp_path), "--labels", str(tmp_path / "labels.csv"), *QUICK, *TILES]
    words += ["--output_dir", str(tmp_path / "runs"), "--cache_dir", str(tmp_path / "cache")]
    before = tree(tmp_path)
    for command, folder in (
        (["train", "--weights", "none"], "classifier_finetune"),
        (["compare", "none", "imagenet"], "compare"),
    ):
        said = foretold(capsys, classifier.main, *command, *words)
        assert "labels    training: 3 images of 2 patients\n" in said
        assert "          mass: 1 with (1 of them with boxes), 1 without, 1 unknown\n" in said
        assert "labels    test: 1 images of 1 patients\n" in said
        assert "would be made: about " in said
        assert f"results   {tmp_path / 'runs' / folder} is new\n" in said
    assert tree(tmp_path) == before
    classifier.print_images([str(tmp_path / "test"), str(tmp_path / "nowhere.png")])
    missing = f"images    3, 1 of them not there, first {tmp_path / 'nowhere.png'}\n"
    assert capsys.readouterr().out == missing


# Sizes and times ----------------------------------------------------------------------------------


def test_items_are_tried_evenly_and_the_first_is_warmed_up() -> None:
    for count, tried in ((1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (100, [12, 37, 62, 87])):
        calls: list[int] = []
        picked, outcomes, seconds = foresight.try_some(
            range(count), lambda n, seen=calls: seen.append(n) or -n
        )
        assert picked == tried
        assert outcomes == [-n for n in tried]
        assert calls == [tried[0], *tried]
        assert seconds >= 0


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3.2e15, "3,200.0 TB")],
)
def test_sizes_are_written_for_people(size: float, text: str) -> None:
    assert foresight.size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (80, "80 s"), (200, "3 min"), (7200, "2 h"), (4e5, "4.6 days")]
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert foresight.duration_text(seconds) == text


def test_too_little_space_is_said(tmp_path: Path) -> None:
    assert "TOO LITTLE" not in foresight.space_text(tmp_path / "not" / "there", 1)
    assert foresight.space_text(tmp_path / "not" / "there", 1e18).endswith("are free there, TOO LITTLE")
    assert not (tmp_path / "not").exists()
