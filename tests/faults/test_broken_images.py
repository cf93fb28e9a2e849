"""Image files of every kind, damaged in every way: each is kept or skipped by name with a reason.

Both scripts read each file in a child process (reader.py), so that a crash of a decoder is told apart
from an exception and is charged to its file. Limits: 5 s of CPU time per script, 2 GB of memory in all.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
from collections import Counter
from pathlib import Path

import broken_files
import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import breast_image, small_config
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

import byol_mammo.report
import prepare_dataset as prep
import train_byol_mammo as mammo

SECONDS = 5  # CPU time that a script may take for one file
MEGABYTES = 2048  # peak of the child, with the libraries it has loaded
SILENCE = 60  # s without an answer that count as a hang, on a busy machine too
SEED = int(os.environ.get("FAULTS_SEED", "0"))
# Of the slow version; about a fifth of them are drawn twice, the different ones are counted.
EXAMPLES = {"png": 4000, "tiff": 3500, "jpeg": 1900, "pgm": 1300, "dicom": 3400}


class Reader:
    """The child process, started again where a file ended it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process, self.counts = folder, None, Counter()
        self.slowest, self.largest, self.seen = 0.0, 0, set()

    def start(self) -> None:
        """Start the child and wait until it has loaded its libraries."""
        command = [sys.executable, str(Path(__file__).with_name("reader.py")), str(self.folder / "out")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        assert self.line(300), "the reader did not start"

    def line(self, timeout: float) -> str:
        """The child's next line, '' where it died; None where it stays silent."""
        ready = select.select([self.process.stdout], [], [], timeout)[0]
        return self.process.stdout.readline() if ready else None

    def close(self) -> None:
        """End the child."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def read(self, path: Path) -> dict:
        """What came of one file. Fails on a hang, an exception, too much time or memory."""
        if not self.process:
            self.start()
        self.process.stdin.write(json.dumps(str(path)) + "\n")
        self.process.stdin.flush()
        line = self.line(SILENCE)
        if not line:
            code = self.process.poll()
            self.close()
            assert line is not None, f"{path}: hangs"
            return self.contained(path, code)
        found = json.loads(line)
        self.slowest = max(self.slowest, found["main_seconds"], found["prepare_seconds"])
        self.largest = max(self.largest, found["megabytes"])
        for script in ("main", "prepare"):
            assert not found[script].startswith("FAILED"), f"{path}: {script} {found[script]}"
            assert found[f"{script}_seconds"] < SECONDS, f"{path}: {script} took {found}"
            self.counts[script, found[script].split(":")[0]] += 1
        assert found["megabytes"] < MEGABYTES, f"{path}: {found}"
        return found

    def contained(self, path: Path, code: int | None) -> dict:
        """A decoder ended the child: right only for files that prepare_dataset.py reads in a process."""
        row = {"source": path.name, "file": "training/a.png", "laterality": ""}
        options = prep.Options([Path("none")], path.parent, self.folder / "out")
        item = prep.inspect(row, options, ours=True)
        assert prep.may_crash(item), f"{path}: ended its process ({code})"
        outcome = prep.decode_alone((item, options, True))
        assert isinstance(outcome, prep.SkipImageError)
        self.counts["prepare", "skipped after its decoder ended the process"] += 1
        return {"main": "not listed", "prepare": f"skipped: {outcome}"}

    def report(self, title: str) -> None:
        """Print what was tried."""
        counts = ", ".join(f"{' '.join(key)} {count}" for key, count in sorted(self.counts.items()))
        print(
            f"{title}: {len(self.seen)} different files; {counts}; slowest {self.slowest:.2f} s CPU, "
            f"largest {self.largest} MB"
        )


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """The child process of this module."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


@pytest.fixture
def reader(child):
    """The child process, its counts at zero."""
    child.counts, child.slowest, child.largest, child.seen = Counter(), 0.0, 0, set()
    return child


EXTREMES = [bytes([value]) * count for count in (1, 2, 4, 8) for value in (0, 1, 0x7F, 0x80, 0xFF)]
MAGIC = [b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"\xff\xd8\xff", b"P5\n", b"P4\n", b"GIF89a", b"BM"]
PLACES = st.one_of(st.integers(0, 600), st.integers(0, 20_000), st.integers(-600, -1))
MUTATION = st.one_of(
    st.tuples(
        st.sampled_from(["cut", "drop", "zero", "repeat", "flip", "flip", "flip"]),
        PLACES,
        st.binary(min_size=2, max_size=2),
    ),
    st.tuples(st.just("poke"), PLACES, st.sampled_from(EXTREMES) | st.binary(min_size=1, max_size=6)),
    st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("magic"), st.just(0), st.sampled_from(MAGIC)),
)  # fmt: skip
SIDES = st.sampled_from([0, 1, 2, 79, 80, 81, 96, 640, 65_535, 100_000, 2**31 - 1, 2**32 - 1])
HEADERS = st.tuples(
    st.tuples(SIDES, SIDES),
    st.sampled_from([0, 1, 2, 4, 8, 16, 32]),
    st.integers(0, 7),
    st.integers(0, 2),
)


WAYS = ["bytes", "bytes", "checksums", "header", "pixels"]  # how a PNG is damaged


@st.composite
def files(draw, kind: str) -> tuple[str, bytes]:
    """Suffix and bytes of a file that began as a good one of `kind`."""
    good = broken_files.sources()
    name = draw(st.sampled_from(sorted(name for name in good if name.split("_")[0] == kind)))
    content, mutations = good[name], draw(st.lists(MUTATION, max_size=4))
    way = draw(st.sampled_from(WAYS)) if kind == "png" else "bytes"
    if way == "pixels":
        content = broken_files.damage_pixels(content, mutations)
    else:
        if way == "header":
            content = broken_files.redeclare(content, *draw(HEADERS))
        content = broken_files.damage(content, mutations)
    if way == "checksums":
        content = broken_files.with_checksums(content)
    wrong = draw(st.integers(0, 9)) == 0  # one time in ten
    suffixes = broken_files.SUFFIX
    return draw(st.sampled_from(sorted(suffixes.values()))) if wrong else suffixes[kind], content


def fuzz(reader: Reader, folder: Path, kind: str, examples: int) -> None:
    """Read `examples` damaged files of one kind; the failing one is shrunk and named by hypothesis."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=checks,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(files(kind))
    def every_file_is_kept_or_named(file: tuple[str, bytes]) -> None:
        suffix, content = file
        reader.seen.add(hashlib.sha256(suffix.encode() + content).digest())
        path = folder / f"case{suffix}"
        path.write_bytes(content)
        reader.read(path)
        path.unlink()

    every_file_is_kept_or_named()
    reader.report(f"{kind}, seed {SEED}")


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_damaged_files_are_kept_or_named(reader, tmp_path, kind):
    fuzz(reader, tmp_path, kind, 40)
    assert len(reader.seen) > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_thousands_of_damaged_files_are_kept_or_named(reader, tmp_path, kind):
    fuzz(reader, tmp_path, kind, EXAMPLES[kind])
    assert len(reader.seen) > 10_000 * EXAMPLES[kind] / sum(EXAMPLES.values())


# Good files whose grey values the scripts must take, or refuse for a reason.
REFUSED = {
    "png_constant": "main no breast found",
    "png_1x1": "main only 1 x 1 px",
    "tiff_float": "float32 pixels",
    "tiff_nan": "float32 pixels",
    "tiff_int32": "int32 pixels",
    "tiff_pages": "holds 2 pages",
    "png_turned": "to be turned by its EXIF tag (orientation 6)",
    "jpeg_turned": "to be turned by its EXIF tag (orientation 6)",
}


def test_good_files_of_every_kind_are_read(reader, tmp_path):
    """Palettes, alpha, interlacing, 16 bits, EXIF; what is refused is refused for the reason given."""
    for name, content in broken_files.sources().items():
        path = tmp_path / f"{name}{broken_files.SUFFIX[name.split('_')[0]]}"
        path.write_bytes(content)
        found = reader.read(path)
        for script in ("main", "prepare"):
            wanted = REFUSED.get(name, "")
            if wanted and (wanted.startswith(script) or not wanted.startswith("main")):
                assert wanted.removeprefix(f"{script} ") in found[script], (name, found)
            elif name not in ("tiff_fax", "png_bilevel"):  # grey of one bit may hold no breast
                assert found[script] in ("kept", "not listed") or path.suffix == ".pgm", (name, found)


LARGEST = {name for name in broken_files.BOMBS if name.startswith("largest")}  # seconds each


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGEST)) for n in sorted(broken_files.BOMBS)],
)
def test_bombs_take_no_more_than_time_and_memory_allow(reader, tmp_path, name):
    suffix, make = broken_files.BOMBS[name]
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(make())
    found = reader.read(path)
    assert "kept" not in found["main"]
    if "largest" not in name and "PNG" not in name:
        assert found["prepare"].startswith("skipped"), found
    reader.report(name)


def odd_folder(folder: Path) -> Path:
    """Good images under odd names, and things that are named as images but are none."""
    folder.mkdir()
    good = cv2.imencode(".png", breast_image()[0])[1].tobytes()
    names = [
        "with space.png", "ü漢字.PNG", "new\nline.png", 'quote".png', "comma,semi;.png", "-rf.png",
        "=1+1.png", "<script>alert(1)<script>.png", "$(touch owned).png", "'; DROP TABLE.png",
        f"{'long' * 60}.png", "\udcff\udcfe.png", ".hidden.png", "tab\t.png", "%s%n{0}.png",
    ]  # fmt: skip
    for number, name in enumerate(names):
        (folder / name).write_bytes(good + bytes(number))
    (folder / "folder.png").mkdir()
    (folder / "folder.png" / "inside.png").write_bytes(good)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "circle").symlink_to(folder)
    (folder / "empty.png").write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_odd_names_links_pipes_and_folders_in_the_main_script(tmp_path, capsys):
    odd_folder(tmp_path / "images")
    cache = mammo.build_cache(small_config(tmp_path))
    funnel = pd.read_csv(cache / "rejections.csv", keep_default_na=False)
    skipped = dict(zip(funnel["image"], funnel["error"], strict=True))
    assert {name: reason for name, reason in skipped.items() if reason} == {
        "loop.png": "no such file",
        "gone.png": "no such file",
        "pipe.png": "not a file",
        "empty.png": "can't be decoded: damaged, or not an image",
    }
    assert len(funnel) == 15 + 4  # hidden files are no images here
    assert {"new\nline.png", "\\xff\\xfe.png", "folder.png/inside.png"} <= set(skipped)
    assert len(mammo.open_tiles(cache).images) == 15
    print(byol_mammo.report.describe_funnel(funnel, mammo.COLUMNS))
    assert "loop.png: no such file" in capsys.readouterr().out


def test_odd_names_links_pipes_and_folders_in_prepare(tmp_path, capsys):
    odd_folder(tmp_path / "in")
    places = ["--images_root", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    assert prep.main(["--csv_path", "none", *places, "--verify"]) == 1
    manifest = pd.read_csv(tmp_path / "out" / "manifest.csv", keep_default_na=False)
    skipped = pd.read_csv(tmp_path / "out" / "skipped.csv", keep_default_na=False)
    reasons = dict(zip(skipped["source"], skipped["reason"], strict=True))
    assert len(manifest) == 14  # hidden files are no images here, and a line break in a name ends it
    assert reasons["folder.png"] == "is a folder"
    assert reasons["pipe.png"] == "is not a regular file"
    assert "cannot be opened" in reasons["loop.png"]
    assert "cannot be opened" in reasons["gone.png"]
    assert "empty" in reasons["empty.png"] or "cannot be decoded" in reasons["empty.png"]
    assert len(reasons) == 5
    extra = pd.read_csv(tmp_path / "out" / "extra.csv", keep_default_na=False)
    assert extra["file"].tolist() == ["new\nline.png"]
    assert not (tmp_path / "owned").exists()
    for name in manifest["file"]:
        assert (tmp_path / "out" / name).resolve().is_relative_to(tmp_path)
        assert np.array_equal(cv2.imread(str(tmp_path / "out" / name), -1), breast_image()[0])
