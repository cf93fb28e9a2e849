"""prepare_dataset: whatever was laid out before, a run leaves what a fresh run of its command makes.

Manifest, images, labels.csv and boxes agree. SEQUENCES sets how many random sequences are tried.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_prepare_archives import FINDINGS, VINDR, Archive, finding, vindr_row
from test_prepare_dicom import breast

SEQUENCES = int(os.environ.get("SEQUENCES", "20"))
IMAGES = [("s0", "a", "L"), ("s1", "a", "R"), ("s1", "b", "R"), ("s2", "a", "R"), ("s3", "a", "L")]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Four studies of left and right images, PNG and DICOM; tables that tell more or less of them."""
    archive = Archive(tmp_path_factory.mktemp("sequences"))
    for number, (study, image, side) in enumerate(IMAGES):
        if study in ("s0", "s3"):
            tags = {"ImageLaterality": side, "WindowCenter": 2000, "WindowWidth": 1500}
            archive.dicom(f"{study}/{image}.dcm", **tags)
        else:
            archive.png(f"{study}/{image}.png", breast(side=side, seed=number))
    splits = {"split0": "0011", "split1": "0101", "no_split": ""}
    for name, code in splits.items():
        for part, chosen in (("all", IMAGES), ("fewer", IMAGES[:3])):
            lines = [
                vindr_row(
                    s, i, "" if not code else ("training", "test")[int(code[int(s[1])])], side=side
                )
                for s, i, side in chosen
            ]
            text = VINDR + "".join(lines)
            if not code:
                text = text.replace(",split\n", "\n").replace(",\n", "\n")
            archive.table(text, f"{name}_{part}.csv")
    found = [finding(s, i, "['Mass']", "5,6,20,30", side=side) for s, i, side in IMAGES]
    archive.table(FINDINGS + "".join(found), "findings_all.csv")
    archive.table(FINDINGS + "".join(found[:3]), "findings_fewer.csv")
    return archive


def draw_command(rng: np.random.Generator, folder: Path) -> list[str]:
    """The flags of a random run: table, findings, mirroring, split, window, mode."""
    choose = lambda *values: str(rng.choice(values))  # noqa: E731
    table = choose("split0", "split1", "no_split") + choose("_all", "_all", "_fewer") + ".csv"
    command = ["--csv_path", str(folder / table)]
    if (findings := choose("", "findings_all.csv", "findings_fewer.csv")) != "":
        command += ["--findings_csv", str(folder / findings)]
    command += ["--split", choose("csv", "patient"), "--test_share", choose("0.2", "0.6")]
    command += ["--window", choose("none", "voi"), "--mode", choose("hardlink", "copy", "symlink")]
    command += ["--flip_right"] * int(rng.integers(2)) + ["--verify"] * int(rng.integers(2))
    return command


def laid_out(archive: Archive, out: Path, command: list[str]) -> dict[str, object]:
    """What a run leaves: tables, and the bytes of each image that a reader of the folder would see."""
    archive.out = out
    csv, *flags = command[1:]
    assert archive.run(csv, *flags) == 0
    tables = {}
    for name in ("manifest.csv", "labels.csv"):
        if (out / name).exists():
            tables[name] = pd.read_csv(out / name, dtype=str, keep_default_na=False).to_csv()
    hidden = lambda path: path.relative_to(out).parts[0].startswith(".")  # noqa: E731
    images = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.png") if not hidden(p)}
    assert set(images) == set(archive.read("manifest.csv")["file"])
    if "labels.csv" in tables:
        assert set(archive.labels()["image"]) == set(images)
    return tables | images


@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_the_last_command_is_what_is_there(archive, tmp_path, seed):
    rng = np.random.default_rng(seed)
    for step in range(int(rng.integers(2, 5))):
        command = draw_command(rng, archive.folder)
        again = laid_out(archive, tmp_path / "again", command)
        fresh = laid_out(archive, tmp_path / f"fresh{step}", command)
        assert again.keys() == fresh.keys(), command
        for name, content in fresh.items():
            assert again[name] == content, (name, command)
