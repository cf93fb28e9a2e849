"""prepare_dataset.py check: the oddest images come first, for a reason; sheets and table are whole."""

from __future__ import annotations

import math
import os
import signal

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import breast_image, write_images

import prepare_dataset as prep
from byol_mammo import archive_check

USUAL = {
    "study_id": "s", "laterality": "L", "view": "MLO", "reason": "", "polarity": "as_is", "vote": 0.8,
    "mask_share": 0.4, "outline": 4.5, "aspect": 0.2, "muscle_share": 0.1, "upper_end": 0.6,
    "lower_end": 0.0, "tiles": 20, "chest_wall": "left",
}  # fmt: skip
CC = {"view": "CC", "muscle_share": 0.0, "upper_end": 0.0}
UNREAD = dict.fromkeys(
    ("polarity", "vote", "mask_share", "outline", "aspect", "muscle_share", "tiles", "chest_wall"),
    np.nan,
)


def judged(odd: dict, usual: dict = USUAL, count: int = 20) -> pd.DataFrame:
    """The table of `count` alike images and one that differs from them by `odd`."""
    rows = [{**usual, "image": f"training/i{number:02d}.png"} for number in range(count)]
    rows[count // 2] |= odd
    rows[count // 2]["image"] = "training/odd.png"
    return archive_check.judge(pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("usual", "odd", "signs"),
    [
        ({}, {}, ""),
        ({}, {"reason": "can't be decoded", **UNREAD}, "unreadable"),
        ({}, {"mask_share": 0.0, "outline": math.nan, "muscle_share": 0.0}, "no breast; mask share"),
        ({}, {"vote": 0.1}, "polarity in doubt"),
        ({}, {"vote": -0.8}, "polarity in doubt"),
        ({}, {"polarity": "inverted"}, "polarity dissents"),
        ({}, {"mask_share": 0.9}, "mask share"),
        ({}, {"mask_share": 0.1}, "mask share"),
        ({}, {"outline": 9.0}, "outline"),
        ({}, {"outline": 3.9}, ""),  # rounder than usual
        ({}, {"aspect": -0.2}, "aspect"),
        ({}, {"tiles": 0}, "no tile"),
        ({}, {"chest_wall": "right"}, "side"),
        ({}, {"laterality": "R"}, "side"),
        ({}, {"laterality": "R", "chest_wall": "right"}, ""),
        ({}, {"laterality": "", "chest_wall": "right"}, ""),
        ({}, {"lower_end": 0.9}, "lower end"),
        ({}, {"muscle_share": 0.0}, "no muscle on MLO"),
        (CC, {}, ""),
        (CC, {"muscle_share": 0.1}, "muscle on CC"),
        (CC, {"upper_end": 0.9}, "upper end"),
        # All of a source show it: it is how that source is.
        ({"tiles": 0}, {}, ""),
        ({"polarity": "inverted"}, {"polarity": "as_is"}, "polarity dissents"),
        ({"laterality": "R"}, {"chest_wall": "right"}, "side"),  # all were mirrored to one side
    ],
)  # fmt: skip
def test_each_sign_is_seen_for_itself(usual, odd, signs):
    table = judged(odd, USUAL | usual)
    named = table.set_index("image")["signs"]
    assert named.pop("training/odd.png") == signs
    assert (named == "").all()
    assert (table["image"][0] == "training/odd.png") == bool(signs)
    assert (table["oddity"] > 0).tolist() == [bool(signs)] + [False] * 19


def test_rare_signs_come_before_common_ones_and_a_few_images_are_held_against_no_rest():
    rows = [{**USUAL, "image": f"training/i{number:02d}.png"} for number in range(40)]
    for row in rows[:10]:
        row |= {"tiles": 0}
    rows[20] |= {"muscle_share": 0.0}
    table = archive_check.judge(pd.DataFrame(rows))
    assert table["signs"][:11].tolist() == ["no muscle on MLO"] + ["no tile"] * 10
    assert table.attrs["shown"]["no tile"] == 10
    assert judged({"tiles": 0}, USUAL | {"tiles": 0}, count=3)["signs"].tolist() == ["no tile"] * 3


def test_folders_and_views_are_sources_where_they_have_images_enough():
    names = [f"a/{n}.png" for n in range(24)] + [f"b/{n}.png" for n in range(9)] + ["c/0.png"]
    views = ["MLO", "CC"] * 12 + ["MLO"] * 9 + [""]
    rows = [{**USUAL, "image": name, "view": view} for name, view in zip(names, views, strict=True)]
    sources = archive_check.add_sources(pd.DataFrame(rows)).set_index("image")["source"]
    assert sources[["a/0.png", "a/1.png", "b/0.png", "c/0.png"]].tolist() == [
        "a MLO", "a CC", "MLO", "all"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of which three are odd: a negative by the manifest's word, a cut file, one that is gone."""
    folder = tmp_path_factory.mktemp("check") / "layout"
    write_images(folder / "training", 12)
    names = sorted(path.name for path in (folder / "training").iterdir())
    image, cut, gone = (folder / "training" / name for name in names[3:6])
    cv2.imwrite(str(image), 255 - breast_image(seed=3)[0])
    cut.write_bytes(cut.read_bytes()[:2000])
    gone.unlink()
    known = {"view": "CC", "laterality": "L", "polarity": "as_is"}
    manifest = pd.DataFrame({"file": [f"training/{name}" for name in names]}).assign(**known)
    manifest.to_csv(folder / "manifest.csv", index=False)
    return folder


def check(*words: object) -> int:
    """The exit code of the command, in this process."""
    return prep.main(["check", *map(str, words), "--num_workers", "1"])


def test_table_and_sheets_of_a_manifest(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sheet_001.png", "sheet_007.png", "mine.png"):
        (out / name).write_bytes(b"of an earlier check, or the user's")
    assert check(folder / "manifest.csv", "--output_dir", out) == 1
    table = pd.read_csv(out / "check.csv", keep_default_na=False)
    assert list(table.columns) == archive_check.COLUMNS
    assert sorted(table["image"][:3]) == [f"training/s{n // 2}_i{n}.png" for n in (3, 4, 5)]
    reasons = dict(zip(table["image"], table["reason"], strict=True))
    assert "decoded" in reasons["training/s2_i4.png"]
    assert reasons["training/s2_i5.png"] == "no such file"
    assert "polarity in doubt" in table.set_index("image")["signs"]["training/s1_i3.png"]
    assert set(table["reason"][3:]) == {""}
    assert sorted(path.name for path in out.iterdir()) == ["check.csv", "mine.png", "sheet_001.png"]
    sheet = cv2.imread(str(out / "sheet_001.png"))
    cells = archive_check.CELL[0] + 8, archive_check.CELL[1] + archive_check.CAPTION + 8
    assert sheet.shape == (2 * cells[1], 6 * cells[0], 3)
    blue = (sheet[..., 0].astype(int) - sheet[..., 2] > 60).nonzero()  # outlines, in ten of 12 cells
    drawn = {(x // cells[0], y // cells[1]) for y, x in zip(*blue, strict=True)}
    assert drawn >= {(x, y) for x in range(6) for y in range(2)} - {(0, 0), (1, 0), (2, 0)}
    assert "unreadable" in capsys.readouterr().out


def test_a_sample_of_a_folder_in_processes(folder, tmp_path):
    words = ["check", str(folder / "training"), "--output_dir", str(tmp_path), "--sample", "4"]
    assert prep.main([*words, "--num_workers", "2"]) in (0, 1)
    assert len(pd.read_csv(tmp_path / "check.csv")) == 4


def test_a_stop_leaves_what_was_there(folder, tmp_path, monkeypatch, capsys):
    assert check(folder / "manifest.csv", "--output_dir", tmp_path, "--sample", "2") in (0, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    measure = archive_check.measure

    def interrupted(source, method):
        os.kill(os.getpid(), signal.SIGINT)
        return measure(source, method)

    monkeypatch.setattr(archive_check, "measure", interrupted)
    assert check(folder / "manifest.csv", "--output_dir", tmp_path) == 3
    assert "stopped by SIGINT. The same command starts anew" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_which_nothing_can_be_read_is_a_table_of_reasons(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / f"images/{number}.png").write_bytes(b"no picture")
    assert check(tmp_path / "images", "--output_dir", tmp_path / "out") == 1
    table = pd.read_csv(tmp_path / "out/check.csv", keep_default_na=False)
    assert table["reason"].str.contains("not an image").tolist() == [True, True]
    assert (table["signs"] == "unreadable").all()
    assert cv2.imread(str(tmp_path / "out/sheet_001.png")) is not None


def test_what_trips_the_method_is_a_row(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_check, "outlined", lambda *areas: 1 / 0)
    assert check(folder / "manifest.csv", "--output_dir", tmp_path, "--sample", "2") == 1
    reasons = pd.read_csv(tmp_path / "check.csv")["reason"].tolist()
    assert "ZeroDivisionError: division by zero" in reasons


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}/training", "--output_dir", "{folder}/training/check"], "lies among the images"),
        (["{folder}/manifest.csv", "--output_dir", "{folder}/check"], "lies among the images"),
        (["{folder}/labels.csv"], "is neither a folder of images nor the manifest.csv"),
        (["{folder}/nothing"], "is neither a folder"),
        (["{folder}", "--sample", "-1"], "--sample -1 is less than 0"),
        (["{folder}", "--sampel", "3"], "unrecognized arguments: --sampel"),
        ([], "the following arguments are required: IMAGES_OR_MANIFEST"),
        (["{folder}", "--output_dir", "{taken}"], "check.csv: no column image"),
    ],
)
def test_wrong_words_are_refused(folder, tmp_path, words, message, capsys):
    (tmp_path / "check.csv").write_text("who,what\nme,mine\n")
    filled = [word.format(folder=folder, taken=tmp_path) for word in words]
    assert prep.main(["check", *filled]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "training" / "check").exists()
    assert (tmp_path / "check.csv").read_text() == "who,what\nme,mine\n"
