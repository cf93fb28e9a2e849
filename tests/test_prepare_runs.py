"""prepare_dataset on a folder of everything: broken files, kills, crashing decoders, speed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom import uid
from pydicom.pixels import pixel_array
from test_prepare_dicom import breast, make_dicom, recode, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mammogram_dicom as dicom  # noqa: E402
import prepare_dataset as prep  # noqa: E402

# The program with decoding in processes however little there is to decode.
IN_PROCESSES = "import sys, prepare_dataset as p; p.POOL_FROM = 0; sys.exit(p.main(sys.argv[1:]))"


def arguments(folder: Path, out: str = "out") -> list[str]:
    """Flags that lay folder/in out without a table."""
    return ["--csv_path", "none", "--images_root", str(folder / "in"), "--output_dir", str(folder / out)]


def start(folder: Path, out: str = "out", first: Path = ROOT) -> subprocess.Popen:
    """The program with two decoding processes; modules in `first` go before the project's."""
    command = [sys.executable, "-c", IN_PROCESSES, *arguments(folder, out), "--num_workers", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(first), str(ROOT)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Name -> hash of the content and modification time; reports, written last, count without time."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns if name.endswith(".png") else 0,
        )
        for name, path in files.items()
    }


def good_file(path: Path, number: int) -> None:
    """One of nine kinds of usable files: (96, 80) pixels that no other file has."""
    image, kind = breast(seed=number), number % 9
    if kind < 3:
        suffix = (".png", ".tif", ".jpg")[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path.with_suffix(suffix)), image if kind < 2 else (image >> 4).astype(np.uint8))
        return
    tags = {"PhotometricInterpretation": "MONOCHROME1"} if kind == 4 else {}
    dataset = make_dicom(image, **tags)
    syntaxes = {5: uid.RLELossless, 6: uid.JPEG2000Lossless, 7: uid.JPEGLSLossless}
    if kind in syntaxes:
        dataset.compress(syntaxes[kind], generate_instance_uid=False)
    save(dataset, path.with_suffix(".dcm" if kind < 8 else ""))


def broken_file(path: Path, number: int) -> None:
    """One of ten kinds of unusable files."""
    kind = number % 10
    png, dcm = path.with_suffix(".png"), path.with_suffix(".dcm")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = cv2.imencode(".png", breast(seed=number))[1].tobytes()
    if kind < 4:
        forms = [
            b"",
            b"<html>not found</html>" * 5,
            content[:-40],
            content[:20] + b"\xff" + content[21:],
        ]
        png.write_bytes(forms[kind])
    elif kind == 4:
        png.symlink_to(path.with_name("gone.png"))
    elif kind == 5:
        dcm.write_bytes(np.random.default_rng(number).bytes(5000))
    elif kind == 6:
        save(make_dicom(breast()), dcm)
        dcm.write_bytes(dcm.read_bytes()[:-500])
    else:
        tags = [{"NumberOfFrames": 2, "Rows": 48}, {"Modality": "US"}, {"SamplesPerPixel": 3}][kind - 7]
        save(make_dicom(breast(), **tags), dcm)


REASONS = [
    *("the file is empty", "not a PNG file inside", "cut short", "damaged (checksum)"),
    *("cannot be opened: No such file", "not a DICOM image inside", "cannot be decoded"),
    *("multi-frame (2 frames)", "modality is not mammography (US)", "colour image"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 usable files of nine kinds and 20 broken in ten ways, in 50 folders, and a run over them."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(180):
        good_file(folder / f"in/p{number % 50:02d}/i{number:03d}", number)
    for number in range(20):
        broken_file(folder / f"in/p{number:02d}/broken{number:02d}", number)
    process = start(folder, "reference")
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, "")
    return folder


def test_180_come_out_and_20_are_named(mixed: Path) -> None:
    manifest = pd.read_csv(mixed / "reference/manifest.csv", dtype=str, keep_default_na=False)
    skipped = pd.read_csv(mixed / "reference/skipped.csv").set_index("image_id")["reason"]
    assert len(manifest) == 180
    assert len(skipped) == 20
    for number in range(20):
        assert REASONS[number % 10] in skipped[f"broken{number:02d}"]
    assert len(list((mixed / "reference").glob("*/*.png"))) == 180
    for row in manifest.to_dict("records"):
        number = int(row["image_id"][1:])
        pixels = cv2.imread(str(mixed / "reference" / row["file"]), cv2.IMREAD_UNCHANGED)
        image = breast(seed=number)
        if number % 9 == 4:
            image = 4095 - image  # MONOCHROME1
        if number % 9 != 2:
            np.testing.assert_array_equal(pixels, image)
    assert not [name for name in os.listdir(mixed / "reference") if name.startswith(".")]


def test_second_run_does_nothing_in_two_seconds(mixed: Path) -> None:
    before = tree(mixed / "reference")
    times = {path: path.lstat().st_mtime_ns for path in (mixed / "reference").rglob("*")}
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), *arguments(mixed, "reference")]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.returncode == 1
    assert "180 already there" in done.stdout
    assert tree(mixed / "reference") == before
    after = {path: path.lstat().st_mtime_ns for path in (mixed / "reference").rglob("*")}
    assert after == times
    assert seconds < 2 or os.getloadavg()[0] > os.cpu_count()


@pytest.mark.parametrize("done", [5, 60, 110])
def test_killed_in_the_middle_and_repeated(mixed: Path, done: int) -> None:
    """SIGKILL while files are being decoded; the same command ends with the tree of a run left alone."""
    out = mixed / f"killed{done}"
    process = start(mixed, out.name)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*/*.png"))) < done and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.csv").exists()
    journal = (out / prep.JOURNAL).read_text().splitlines()
    assert prep.main(arguments(mixed, out.name)) == 1
    assert tree(out) == tree(mixed / "reference")
    assert len(journal) >= done - 4  # at most what was in the two processes was done twice


def test_journal_cut_short_is_read(tmp_path: Path) -> None:
    rows = [{"file": "training/a.png", "content": "x"}, {"file": "training/b.png"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "journal").write_text("\n".join([lines[0], "[1]", lines[1][:-5]]))
    assert prep.read_journal(tmp_path / "journal") == {"training/a.png": rows[0]}


FAKE_DECODER = """
import os, signal, time
import numpy as np

class DicomError(Exception):
    pass

def read_dicom(path, window):
    if "crash" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in path.name:
        with open("worker_pid", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)
    return np.full((5, 5), int(path.stem[-1]), np.uint16), {}
"""


def fake_archive(folder: Path, names: list[str]) -> None:
    """Files for a decoder that crashes at 'crash' and hangs at 'slow'; it lies in folder/fake."""
    (folder / "fake").mkdir()
    (folder / "fake/mammogram_dicom.py").write_text(FAKE_DECODER)
    for name in names:
        (folder / "in/p").mkdir(parents=True, exist_ok=True)
        (folder / f"in/p/{name}.dcm").write_bytes(b"x")


def test_crashing_decoder_costs_one_image(tmp_path: Path) -> None:
    fake_archive(tmp_path, ["a0", "a1", "crash2", "a3", "a4", "a5", "crash6", "a7", "a8", "a9"])
    process = start(tmp_path, first=tmp_path / "fake")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, "")
    assert "8 images laid out" in output
    skipped = pd.read_csv(tmp_path / "out/skipped.csv")
    assert list(skipped["source"]) == ["p/crash2.dcm", "p/crash6.dcm"]
    assert skipped["reason"].str.contains("decoder crashed").all()


def test_file_that_ends_the_decoders_process_costs_one_image(tmp_path: Path) -> None:
    """libjpeg calls exit() where a lossless stream claims more than 16 bits; few files, one worker."""
    for number in range(2):
        path = save(make_dicom(breast(seed=number)), tmp_path / f"in/p/{number}.dcm")
        recode(path, "JPEGLosslessProcess14_1")
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\xc3") + 4] = 88  # bits per sample in the frame header (SOF3)
    path.write_bytes(content)
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), *arguments(tmp_path)]
    done = subprocess.run([*command, "--num_workers", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 images laid out" in done.stdout
    assert "p/1.dcm (its decoder crashed" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    fake_archive(tmp_path, ["slow1", "slow2"])
    process = start(tmp_path, first=tmp_path / "fake")
    pid_file, deadline = tmp_path / "worker_pid", time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    worker = Path(f"/proc/{pid_file.read_text()}/stat")
    assert worker.exists()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while worker.exists() and " Z " not in worker.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or " Z " in worker.read_text()


def lossless_jpegs(folder: Path, count: int) -> list[Path]:
    """MONOCHROME1 mammograms of 2560 x 2048 pixels in JPEG Lossless below folder/in; three repeat."""
    paths = []
    for number in range(min(count, 3)):
        image = cv2.resize(breast(seed=number), (2048, 2560), interpolation=cv2.INTER_CUBIC)
        dataset = make_dicom(4095 - np.minimum(image, 4095), PhotometricInterpretation="MONOCHROME1")
        paths.append(save(dataset, folder / f"in/p/{number}.dcm"))
        recode(paths[-1], "JPEGLosslessProcess14_1")
    for number in range(3, count):
        paths.append(folder / f"in/p/{number}.dcm")
        os.link(paths[number % 3], paths[-1])
    return paths


def decode_tasks(folder: Path, paths: list[Path], workers: int) -> list[prep.Task]:
    """What the program does with these files, output in folder/out."""
    options = prep.parse_options([*arguments(folder), "--num_workers", str(workers)])
    (folder / "out/training").mkdir(parents=True, exist_ok=True)
    rows = [{"source": f"p/{path.name}", "file": f"training/{path.stem}.png"} for path in paths]
    return [(prep.inspect(row, options, True), options, True) for row in rows]


@pytest.mark.slow
def test_work_per_image_is_little_more_than_decoding_and_encoding(tmp_path: Path) -> None:
    """At most 1.5 times, in CPU time, on a machine with nothing else to do."""
    paths = lossless_jpegs(tmp_path, 3)

    def baseline() -> None:
        for path in paths:
            pixels = pixel_array(dicom.open_dicom(path), raw=True)
            (tmp_path / "x.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())

    def ours() -> None:
        for task in decode_tasks(tmp_path, paths, 1):
            assert isinstance(prep.decode_item(*task), dict)

    seconds = []
    for work in (baseline, ours) * 3:
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    print(f"work over decoding and encoding: {min(seconds[1::2]) / min(seconds[::2]):.2f}")
    assert min(seconds[1::2]) < 1.5 * min(seconds[::2])


@pytest.mark.slow
def test_two_processes_do_nearly_twice_as_much(tmp_path: Path) -> None:
    """At least 1.8 times, starting them included, on a machine with nothing else to do."""
    paths, seconds = lossless_jpegs(tmp_path, 28), []
    for workers in (1, 2):
        begin = time.perf_counter()
        outcomes = [outcome for _, outcome in prep.decode_all(decode_tasks(tmp_path, paths, workers))]
        seconds.append(time.perf_counter() - begin)
        assert all(isinstance(outcome, dict) for outcome in outcomes)
    print(f"one process over two: {seconds[0] / seconds[1]:.2f}")
    busy = (os.cpu_count() or 1) < 2 or os.getloadavg()[0] > 1.5 * 2
    assert seconds[0] > 1.8 * seconds[1] or busy
