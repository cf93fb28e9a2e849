"""--dry_run says what would be done, does nothing, and what is done then is what it said."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from test_prepare_archives import FINDINGS, VINDR, Archive, finding, vindr_row

from byol_mammo import foresight


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


def test_a_refusal_comes_before_the_dry_run(
    archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.png("s1/a.png")
    rows = vindr_row("s1", "a", "training") + vindr_row("s1", "b", "test")
    assert archive.run(archive.table(VINDR + rows), "--dry_run") == 2
    assert "s1 (test and training)" in capsys.readouterr().err


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
