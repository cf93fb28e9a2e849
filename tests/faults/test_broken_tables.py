"""Tables damaged in every way: read as meant, or refused in one line; nothing leaves its folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import breast_image, small_config
from hypothesis import HealthCheck, given, seed, settings, strategies as st
from test_prepare_dicom import breast

import byol_mammo.labels
import prepare_dataset as prep
import train_byol_mammo as mammo
import train_classifier as classifier

SEED = int(os.environ.get("FAULTS_SEED", "0"))
COLUMNS = "study_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"
ROWS = [
    f"s{n // 2},i{n},L,CC,96,80,BI-RADS 1,DENSITY B,{'test' if n > 3 else 'training'}" for n in range(6)
]
LABELS = "image,study_id,split,laterality,view,breast_birads,breast_density,mass,calcification,boxes"
BOX = '"[{""finding"": [""Mass""], ""xmin"": 5, ""ymin"": 5, ""xmax"": 60, ""ymax"": 60}]"'
LABEL_ROWS = [
    f"training/s{n}_i{n}.png,s{n},training,L,CC,1,B,{n % 2},0,{BOX if n % 2 else ''}" for n in range(6)
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "cp037"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A folder with in/<study>/<image>.png of the six ROWS."""
    folder = tmp_path_factory.mktemp("tables")
    for number in range(6):
        (folder / f"in/s{number // 2}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"in/s{number // 2}/i{number}.png"), breast(8, seed=number))
    return folder


def lay_out(folder: Path, content: bytes, out: str = "out") -> int:
    """prepare_dataset.py on a table of these bytes; its exit code."""
    (folder / "table.csv").write_bytes(content)
    places = ["--images_root", str(folder / "in"), "--output_dir", str(folder / out)]
    return prep.main(["--csv_path", str(folder / "table.csv"), *places, "--mode", "copy"])


def table(*rows: str, header: str = COLUMNS) -> bytes:
    """A table of lines."""
    return "\n".join([header, *rows, ""]).encode()


SPOILT = [  # what is wrong, the table, what the refusal says
    ("no image_id", table(*ROWS).replace(b"image_id", b"imgid"), "nearest: imgid"),
    ("image_id twice", table(*(f"{row},x" for row in ROWS), header=f"{COLUMNS},image_id"), "twice"),
    ("semicolons", table(*ROWS).replace(b",", b";"), "separated by semicolons"),
    ("UTF-16", table(*ROWS).decode().encode("utf-16"), "not a comma-separated UTF-8 table"),
    ("Latin-1", table(*ROWS, "s\u00e9,a,L,CC,1,1,1,A,test").decode().encode("latin-1"), "not a comma"),
    ("no study", table(*ROWS, ",i9,L,CC,1,1,1,A,test"), "study_id is empty"),
    ("nan study", table(*ROWS, "nan,i9,L,CC,1,1,1,A,test"), "study_id is 'nan'"),
    ("upward study", table(*ROWS, "../../x,i9,L,CC,1,1,1,A,test"), "study_id is '../../x'"),
    ("absolute image", table(*ROWS, "s9,/etc/passwd,L,CC,1,1,1,A,test"), "image_id is '/etc/passwd'"),
    ("upward split", table(*ROWS, "s9,i9,L,CC,1,1,1,A,../test"), "split is '../test'"),
    ("null byte", table(*ROWS, "s9,i\0,L,CC,1,1,1,A,test"), "image_id is 'i"),
    ("rows that disagree", table(*ROWS, ROWS[0].replace("L,CC", "R,CC")), "line 8): laterality"),
    ("two splits", table(*ROWS, "s0,i9,L,CC,1,1,1,A,test"), "more than one split"),
    ("row too long", table(*ROWS, f"{ROWS[0]},more"), "not a comma-separated UTF-8 table"),
    ("open quote", table(*ROWS, 's9,"i9,L'), "not a comma-separated UTF-8 table"),
    ("no row", table(), "no rows"),
    ("nothing", b"", "not a comma-separated UTF-8 table"),
    ("bytes", bytes(range(256)) * 9, "lacks the column|separated by"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in SPOILT], ids=[c[0] for c in SPOILT]
)
def test_spoilt_tables_are_refused_in_one_line(archive, capsys, content, message):
    assert lay_out(archive, content, "refused") == 2
    errors = capsys.readouterr().err
    assert any(part in errors for part in message.split("|")), errors
    assert errors.count("\n") == 1
    assert "Nothing was written" in errors
    assert not (archive / "refused").exists()


SOUND = {
    "plain": table(*ROWS),
    "byte order mark": b"\xef\xbb\xbf" + table(*ROWS),
    "Windows lines": table(*ROWS).replace(b"\n", b"\r\n"),
    "blank lines": table("", ROWS[0], "", *ROWS[1:], "", ",,,,,,,,"),
    "more columns": table(*(f"{row},x,y" for row in ROWS), header=f"{COLUMNS},comment,other"),
    "duplicates": table(*ROWS, *ROWS),
    "spaces": table(*ROWS).replace(b",", b" , "),
}


@pytest.mark.parametrize("name", sorted(SOUND))
def test_sound_tables_in_odd_dress_are_read(archive, tmp_path, name):
    (tmp_path / "in").symlink_to(archive / "in")
    assert lay_out(tmp_path, SOUND[name]) == 0
    assert len(pd.read_csv(tmp_path / "out" / "manifest.csv")) == 6


CELLS = st.sampled_from([
    "", "nan", "NaN", "None", "../x", "..", ".", "/etc/x", "C:\\x", "a/b", "s0", "i0", "0", "-1",
    "1e400", "é", "漢", "=1+1", '"', "'", "a,b", "a;b", "\t", "a\nb", "\r", "\0", "<b>", "%s", "x" * 300,
    " s0 ", "training", "test",
]) | st.text(max_size=5)  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.integers(0, 6), st.integers(0, 9), CELLS, st.sampled_from(["cell", "row", "drop", "twice"])
    ),
    max_size=4,
)


def edited(header: str, rows: list[str], edits: list, encoding: str, mark: str, raw: bytes) -> bytes:
    """A table with cells replaced, columns or rows gone or doubled, another separator and encoding."""
    lines = [line.split(",") for line in [header, *rows]]
    for row, column, cell, how in edits:
        row = row % len(lines)
        if how == "cell" and lines[row]:
            lines[row][column % len(lines[row])] = cell
        elif how == "row":
            lines.insert(row, [cell] * (column + 1))
        elif how == "drop" and lines[0]:
            place = column % len(lines[0])
            for line in lines:
                del line[place : place + 1]
        elif how == "twice":
            for line in lines:
                line.append(line[column % len(line)] if line else cell)
    text = "\n".join(mark.join(line) for line in lines)
    return text.encode(encoding, errors="replace") + raw


def damaged_tables(header: str, rows: list[str]):
    """Strategy of such tables."""
    raw, mark = st.binary(max_size=3) | st.just(b""), st.sampled_from([",", ",", ",", ",", ";", "\t"])
    encodings = st.sampled_from(["utf-8", "utf-8", *ENCODINGS])
    return st.builds(edited, st.just(header), st.just(rows), EDITS, encodings, mark, raw)


def fuzz_prepare(folder: Path, examples: int) -> int:
    """Lay damaged tables out: exit codes 0, 1 and 2 only, and no file outside. The number tried."""
    seen = set()
    before = {path for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts}

    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damaged_tables(COLUMNS, ROWS))
    def read(content: bytes) -> None:
        seen.add(content)
        assert lay_out(folder, content) in (0, 1, 2)
        after = {path for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts}
        assert before <= after <= before | {folder / "table.csv"}

    read()
    return len(seen)


def fuzz_labels(folder: Path, examples: int) -> int:
    """Read `examples` damaged labels.csv: a table or a MammoError that names it. The number tried."""
    seen, path = set(), folder / "labels.csv"
    images = [f"training/s{n}_i{n}.png" for n in range(6)]
    tiles = pd.DataFrame({"x": [0, 32] * 6, "y": [0, 32] * 6, "image": np.repeat(range(6), 2)})

    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damaged_tables(LABELS, LABEL_ROWS))
    def read(content: bytes) -> None:
        seen.add(content)
        path.write_bytes(content)
        try:
            labels = byol_mammo.labels.read_labels(path, mammo.CLASSES)
        except mammo.MammoError as error:
            if str(path) not in str(error):
                raise
            return
        rows = byol_mammo.labels.match_labels(labels, folder, images, folder)
        targets = byol_mammo.labels.tile_labels(tiles, rows, labels, 64, mammo.CLASSES)
        assert np.isin(targets[np.isfinite(targets)], [0, 1]).all()

    read()
    return len(seen)


def test_damaged_tables_are_read_or_refused(archive):
    print(f"prepare_dataset.py: {fuzz_prepare(archive, 60)} different tables, seed {SEED}")


def test_damaged_labels_are_read_or_refused(tmp_path):
    print(f"labels.csv: {fuzz_labels(tmp_path, 100)} different tables, seed {SEED}")


@pytest.mark.slow
def test_thousands_of_damaged_tables_are_read_or_refused(archive, tmp_path):
    print(f"prepare_dataset.py: {fuzz_prepare(archive, 2000)} different tables, seed {SEED}")
    print(f"labels.csv: {fuzz_labels(tmp_path, 5000)} different tables, seed {SEED}")


LABELS_SPOILT = {
    "no mass": (LABELS.replace("mass", "masses"), LABEL_ROWS, "no column mass"),
    "mass twice": (LABELS.replace("breast_birads", "mass"), LABEL_ROWS, "mass is there twice"),
    "semicolons": (LABELS.replace(",", ";"), [LABEL_ROWS[0].replace(",", ";")], "no column image"),
    "row too long": (LABELS, [*LABEL_ROWS, LABEL_ROWS[0] + ",,"], "not a comma-separated"),
    "rows too long": (LABELS, [f"{row},more" for row in LABEL_ROWS], "not a comma-separated"),
    "image twice": (LABELS, [*LABEL_ROWS, LABEL_ROWS[0]], "more than one row"),
    "no number": (LABELS, [LABEL_ROWS[0].replace(",0,0,", ",yes,0,")], "not 0, 1 or empty"),
    "deep boxes": (LABELS, [LABEL_ROWS[0] + "[" * 100_000], "boxes of training/s0_i0.png"),
    "huge box": (LABELS, [LABEL_ROWS[1].replace("60", "9" * 400)], "boxes of training/s1_i1.png"),
    "no rows": ("", [], "not a comma-separated"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LABELS_SPOILT))
def test_spoilt_labels_are_refused_by_name(tmp_path, name):
    header, rows, message = LABELS_SPOILT[name]
    (tmp_path / "labels.csv").write_bytes(table(*rows, header=header) if header else b"")
    with pytest.raises(mammo.MammoError, match=message) as caught:
        byol_mammo.labels.read_labels(tmp_path / "labels.csv", mammo.CLASSES)
    assert str(tmp_path / "labels.csv") in str(caught.value)
    for encoding in ("utf-16", "cp037"):
        (tmp_path / "labels.csv").write_text(LABELS, encoding=encoding)
        with pytest.raises(mammo.MammoError, match=r"not a comma-separated|no column"):
            byol_mammo.labels.read_labels(tmp_path / "labels.csv", mammo.CLASSES)


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2,3,4\n", b"\xff\xfe\0", b"study_id\ns1\n", b"file,file\na,b\n"]
)
def test_a_spoilt_manifest_is_refused_by_name(tmp_path, content):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), breast_image()[0])
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(mammo.MammoError, match=r"manifest\.csv"):
        mammo.images.list_sources(tmp_path / "images")


def test_a_polarity_that_is_none_is_refused_by_line(tmp_path):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), breast_image()[0])
    rows = ["file,polarity", "images/a.png,unknown", "images/b.png,MONOCHROME1"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    with pytest.raises(mammo.MammoError, match=r"manifest\.csv, line 3: polarity 'MONOCHROME1'.*as_is"):
        mammo.images.list_sources(tmp_path / "images")


def test_a_manifest_that_points_elsewhere_reads_nothing_there(tmp_path):
    for folder in ("images", "private"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "a.png"), breast_image()[0])
    names = ["images/a.png", "../private/a.png", "private/a.png", "/etc/passwd", "", "nan"]
    rows = pd.DataFrame(
        {"file": names, "study_id": ["", "x", "x", "x", "x", "x"], "spacing_mm": "1e999"}
    )
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    sources = mammo.images.list_sources(tmp_path / "images")
    assert sources["path"].tolist() == [str(tmp_path / "images" / "a.png")]
    assert sources["study_id"].tolist() == ["a"]
    assert mammo.build_cache(small_config(tmp_path)).is_dir()


@pytest.mark.slow
def test_a_million_rows_are_checked_within_a_minute(archive, tmp_path, capsys):
    """CPU time, so that other programs on the machine do not count; the images of six rows exist."""
    rows = [
        f"s{n // 4},i{n},L,CC,96,80,BI-RADS 1,DENSITY B,{'test' if n % 40 < 4 else 'training'}"
        for n in range(10**6)
    ]
    rows[:6] = ROWS[:4] + [row.replace("s2,", "s1,").replace(",test", ",training") for row in ROWS[4:]]
    content = table(
        *(row.replace("s2,", "s1,") for row in rows[:4]), *(f"t{row[1:]}" for row in rows[6:])
    )
    (tmp_path / "in").symlink_to(archive / "in")
    (tmp_path / "table.csv").write_bytes(content)
    places = ["--images_root", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    begin = time.process_time()
    plan = prep.make_plan(prep.parse_options(["--csv_path", str(tmp_path / "table.csv"), *places]))
    seconds = {"prepare_dataset.py": time.process_time() - begin}
    assert len(plan.missing) + len(plan.items) == 999_998
    path = tmp_path / "labels.csv"
    path.write_bytes(
        table(
            *(f"training/t{n // 4}_i{n}.png,t{n // 4},training,L,CC,1,B,0,1," for n in range(10**6)),
            header=LABELS,
        )
    )
    begin = time.process_time()
    labels = byol_mammo.labels.read_labels(path, mammo.CLASSES)
    rows = byol_mammo.labels.match_labels(labels, tmp_path, ["training/t9_i36.png"], tmp_path)
    sources = pd.DataFrame({"study_id": ["t9"], "laterality": "L", "view": "CC"})
    classifier.check_leak(byol_mammo.labels.with_manifest(labels, rows, sources), str(path))
    seconds["labels.csv"] = time.process_time() - begin
    assert rows.tolist() == [36]
    print(f"a million rows, s of CPU: {seconds}")
    assert max(seconds.values()) < 60
