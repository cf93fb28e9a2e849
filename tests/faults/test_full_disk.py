"""Full and read-only disks, caches that vanish, change or are built twice: told, survived, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stages
import torch
from conftest import REPORTS, SMALL, assert_same_cache, images_done, small_config, write_images
from test_prepare_runs import good_file
from test_training import weights_hash

import prepare_dataset as prep
import train_byol_mammo as mammo

QUICK = ("--epochs", "2", "--save_every", "0")


def mount(*words: object) -> None:
    """Run mount; skips the test where that is not permitted."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: 128 MB of memory, mounted at tmp_path/disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=128m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@contextlib.contextmanager
def nearly_full(disk: Path, free: int):
    """Leave `free` bytes on the disk, the rest taken by a file that others made."""
    found = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_bsize - free))
    try:
        yield
    finally:
        (disk / "ballast").unlink()


def arguments(data: Path, disk: Path, *flags: str) -> list[str]:
    """Flags of a small training that reads `data` and writes to `disk`."""
    config = small_config(disk)
    places = ["--data_dir", data, "--output_dir", config.output_dir, "--cache_dir", config.cache_dir]
    return [str(word) for word in (*places, *SMALL, *QUICK, *flags)]


def all_whole(folder: Path) -> None:
    """Every file under its final name can be read; no cache is visible unless complete."""
    for path in folder.rglob("[!.]*.pth"):
        assert mammo.checkpoints.all_finite(torch.load(path)["model_state_dict"])
    for path in folder.rglob("cache/[!.]*/"):
        assert mammo.caches.is_finished(path)
    for path in folder.rglob("config.json"):
        json.loads(path.read_text())


# Free bytes: for nothing, parts of the cache, its pixels, pictures, the first checkpoints, the last.
SPACES = [0, 200_000, 1_100_000, 2_200_000, 3_200_000, 4_500_000, 6_000_000]
MANY = [
    *(0, 4096, 16_384, 65_536),
    *range(100_000, 3_000_000, 200_000),
    *range(3_000_000, 9_000_000, 200_000),
]


def fill_and_resume(data: Path, disk: Path, spaces: list[int]) -> int:
    """Train with ever more space until it is enough; the number of runs that a full disk stopped."""
    stopped, flags = 0, arguments(data, disk, *REPORTS)
    for free in spaces:
        with nearly_full(disk, free):
            code, printed = stages.finish("train_byol_mammo", flags, data.parent / "log")
        all_whole(disk)
        if code == 0:
            break
        stopped += 1
        assert code == 2, printed
        reason = "(No space left on device|.* is the disk full)"
        assert re.search(rf"error: \S*/(cache|runs)/\S+: {reason}", printed), printed
        assert "Traceback" not in printed
        assert not list(disk.rglob(f"{mammo.files.UNFINISHED}*"))
    code, printed = stages.finish("train_byol_mammo", flags, data.parent / "log")
    assert code == 0, printed
    return stopped


def test_a_disk_that_gets_ever_a_little_room_gets_ever_further(tmp_path, disk):
    """What was extracted stays on record, and what a full disk cut short gives its room back."""
    write_images(tmp_path / "images", 24, bits=12)
    config = small_config(tmp_path, "--num_workers", "2", "--cache_dir", str(disk / "cache"))
    counts = [0]
    while counts[-1] < 24:
        with nearly_full(disk, 1_500_000), contextlib.suppress(OSError):
            mammo.build_cache(config)
            break
        counts.append(images_done(disk))
        assert counts[-1] > counts[-2]
    cache = mammo.build_cache(config)
    assert len(counts) > 2
    pixels = np.load(cache / "pixels.npy", mmap_mode="r")
    images = pd.read_csv(cache / "images.csv")
    assert len(pixels) == (images["height"] * images["width"]).sum()  # nothing was written twice


def undisturbed(folder: Path) -> tuple[Path, Path]:
    """Images and the run folder of a training that nothing disturbed."""
    write_images(folder / "images", bits=12)
    code, printed = stages.finish(
        "train_byol_mammo", arguments(folder / "images", folder), folder / "log"
    )
    assert code == 0, printed
    return folder / "images", folder / "runs" / "byol_slim"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Images and the run folder of a training that nothing disturbed."""
    return undisturbed(tmp_path_factory.mktemp("whole"))


def same_result(run: Path, other: Path) -> None:
    """Both runs ended with the same weights and the same metrics."""
    for name in ("mammogram_byol_final.pth", "mammogram_byol_best.pth"):
        assert weights_hash(run / name) == weights_hash(other / name)
    tables = [
        pd.read_csv(folder / "metrics.csv").dropna(subset=["monitor_rankme"]) for folder in (run, other)
    ]
    assert tables[0]["monitor_rankme"].tolist() == tables[1]["monitor_rankme"].tolist()


@pytest.mark.parametrize(
    "spaces", [SPACES, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_training_on_a_full_disk_says_so_and_goes_on_when_there_is_room(whole, disk, spaces):
    data, run = whole
    stopped = fill_and_resume(data, disk, spaces)
    print(f"full disk in training: stopped {stopped} times")
    assert stopped >= 4
    same_result(disk / "runs" / "byol_slim", run)


def test_a_row_of_metrics_that_a_full_disk_cut_is_left_out(disk):
    path, row = disk / "metrics.csv", {"step": 0.0, "loss": -0.123456, "lr": 1e-3, "feature_std": 0.5}
    metrics, written = mammo.tracking.MetricsFile(path, mammo.METRICS, 0, 10), 0
    with nearly_full(disk, 8192), pytest.raises(OSError, match=r"No space left.*metrics\.csv"):  # noqa: PT012
        while written < 1000:
            metrics.write({**row, "step": written + 1})
            written += 1
    content = path.read_bytes()
    assert not content.endswith(b"\n")  # the case is there
    os.truncate(path, content.rindex(b"\n") + 2)  # at its worst: of step 123 there is a step 1 left
    mammo.tracking.MetricsFile(path, mammo.METRICS, written, 10)
    table = pd.read_csv(path)
    assert table["step"].tolist() == list(range(1, written + 1))
    assert (table["loss"] == -0.123456).all()


def test_the_reduced_pixels_on_a_full_disk_are_an_error_and_no_crash(whole, disk):
    """Written through a memory map, they would end the process by SIGBUS."""
    data, _ = whole
    flags = arguments(data, disk, "--run_name", "reduced", "--max_steps", "1")
    config = mammo.parse_args(flags)
    cache = mammo.build_cache(config)
    with nearly_full(disk, 4096):
        code, printed = stages.finish("train_byol_mammo", flags, data.parent / "log")
    assert code == 2, printed
    assert "pixels_reduced_4.npy: No space left on device" in printed
    assert not (cache / "pixels_reduced_4.npy").exists()


def test_prepare_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path, disk):
    for number in range(18):
        good_file(tmp_path / f"in/p{number % 4}/i{number}", number)

    def lay_out(out: Path) -> tuple[int, str]:
        places = ["--images_root", tmp_path / "in", "--output_dir", out, "--mode", "copy"]
        return stages.finish("prepare_dataset", ["--csv_path", "none", *places], tmp_path / "log")

    assert lay_out(tmp_path / "whole")[0] == 0
    stopped = 0
    for free in (0, 8192, 40_960, 81_920, 163_840, 200_000, 250_000, 300_000):
        with nearly_full(disk, free):
            code, printed = lay_out(disk / "out")
        if code == 0:
            break
        stopped += 1
        assert code == 3, printed
        assert "No space left on device" in printed
        assert "The same command resumes" in printed
        for path in disk.glob("out/*/[!.]*.png"):
            assert prep.decode_raster(path).shape[:2] == (96, 80)
    assert stopped >= 4
    assert lay_out(disk / "out")[0] == 0
    names = {path.relative_to(disk / "out") for path in (disk / "out").rglob("*")}
    assert names == {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")}
    for name in names:
        if (disk / "out" / name).is_file():
            assert (disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_read_only_output_folder_is_told_before_the_extraction(whole, disk, tmp_path):
    data, _ = whole
    mount("-o", "remount,ro", disk)
    flags = [*arguments(data, disk), "--cache_dir", str(tmp_path / "cache")]
    code, printed = stages.finish("train_byol_mammo", flags, data.parent / "log")
    assert code == 2
    assert re.search(r"error: \S*/disk/runs\S*: Read-only file system", printed), printed
    assert not (tmp_path / "cache").exists()
    places = ["--images_root", data, "--output_dir", disk / "out"]
    code, printed = stages.finish(
        "prepare_dataset", ["--csv_path", "none", *places], data.parent / "log"
    )
    assert code == 3
    assert "Read-only file system" in printed


def test_a_finished_cache_may_lie_on_a_read_only_disk(whole, disk, tmp_path):
    data, run = whole
    shutil.copytree(run.parents[1] / "cache", disk / "cache")
    mount("-o", "remount,ro", disk)
    flags = [*arguments(data, tmp_path), "--cache_dir", str(disk / "cache")]
    code, printed = stages.finish("train_byol_mammo", flags, data.parent / "log")
    assert code == 0, printed
    assert "averaged copy" not in printed  # it is there
    same_result(tmp_path / "runs" / "byol_slim", run)


def test_a_cache_deleted_during_the_run_costs_nothing(whole, tmp_path, monkeypatch):
    data, run = whole
    real, config = mammo.tracking.MetricsFile.write, mammo.parse_args(arguments(data, tmp_path))

    def deleting(self: mammo.tracking.MetricsFile, row: dict) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        real(self, row)

    monkeypatch.setattr(mammo.tracking.MetricsFile, "write", deleting)
    mammo.train(config)
    assert not (tmp_path / "cache").exists()
    same_result(tmp_path / "runs" / "byol_slim", run)
    monkeypatch.undo()
    mammo.train(config)  # builds it again and finds the run finished
    assert mammo.caches.is_finished(next((tmp_path / "cache").glob("[!.]*")))


def cut(path: Path) -> None:
    """Make a file shorter by its last byte."""
    os.truncate(path, path.stat().st_size - 1)


DAMAGE = {
    "pixels.npy cut": lambda cache: cut(cache / "pixels.npy"),
    "tiles.csv cut": lambda cache: cut(cache / "tiles.csv"),
    "images.csv gone": lambda cache: (cache / "images.csv").unlink(),
    "cache.json gone": lambda cache: (cache / "cache.json").unlink(),
    "cache.json cut": lambda cache: cut(cache / "cache.json"),
    "reduced pixels cut": lambda cache: cut(cache / "pixels_reduced_4.npy"),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_cache_is_built_anew(archive, tmp_path, name, capfd):
    shutil.copytree(archive, tmp_path / "a")
    config = small_config(tmp_path / "a")
    before = mammo.open_tiles(mammo.build_cache(config), 4)
    truth = before.pixels.clone(), before.table.copy()
    DAMAGE[name](before.cache)
    after = mammo.open_tiles(mammo.build_cache(config), 4)
    assert torch.equal(after.pixels, truth[0])
    pd.testing.assert_frame_equal(after.table, truth[1])
    if "reduced" not in name:
        assert "is damaged: moved aside and built anew" in capfd.readouterr().err
        assert list((tmp_path / "a" / "cache").glob("*_1"))  # nothing is thrown away


@pytest.mark.slow
def test_a_cache_cut_short_during_the_run_leaves_the_last_state(whole, tmp_path):
    """The operating system ends a process whose mapped file shrinks; the same command goes on."""
    data, run = whole
    process = stages.start("train_byol_mammo", arguments(data, tmp_path), tmp_path / "log")
    last = tmp_path / "runs" / "byol_slim" / "last.pth"
    until = time.monotonic() + 120
    while not last.exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    cache = next((tmp_path / "cache").glob("[!.]*"))
    for name in ("pixels.npy", "pixels_reduced_4.npy"):
        os.truncate(cache / name, 4096)
    process.join(120)
    assert process.exitcode == -signal.SIGBUS
    all_whole(tmp_path / "runs")
    code, printed = stages.finish("train_byol_mammo", arguments(data, tmp_path), tmp_path / "log")
    assert code == 0, printed
    same_result(last.parent, run)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_two_builders_one_builds_and_the_other_waits(tmp_path, killed):
    """Where the first is killed, the second takes over."""
    data = write_images(tmp_path / "images", 16, height=960, width=800)  # seconds of work: they meet
    flags = arguments(data, tmp_path, "--max_steps", "1")
    first = stages.start("train_byol_mammo", [*flags, "--run_name", "first"], tmp_path / "first.log")
    until = time.monotonic() + 60
    while not images_done(tmp_path) and time.monotonic() < until:
        time.sleep(0.002)
    second = stages.start("train_byol_mammo", [*flags, "--run_name", "second"], tmp_path / "second.log")
    if killed:
        time.sleep(0.3)
        os.kill(first.pid, signal.SIGKILL)
    first.join(120)
    second.join(120)
    printed = (tmp_path / "first.log").read_text() + (tmp_path / "second.log").read_text()
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL if killed else 0, 0), printed
    alone = mammo.build_cache(mammo.parse_args([*flags, "--cache_dir", str(tmp_path / "alone")]))
    assert_same_cache(alone, tmp_path / "cache" / alone.name)
    if not killed:
        printed = (tmp_path / "second.log").read_text()
        assert "tiles:" not in printed  # its progress bar: it read no image
