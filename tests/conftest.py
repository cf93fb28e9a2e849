"""Shared fixtures: a small archive of phantoms, its pixel cache, and ways to run the scripts."""

import os

# Read once, at the first product on a GPU: too early for the test of --deterministic to set it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("byol_mammo/**/*.py")])  # the project without its tests
sys.path.insert(0, str(ROOT))

import small_network  # noqa: E402
import stages  # noqa: E402

import train_byol_mammo as mammo  # noqa: E402

settings.register_profile("shared", deadline=None)  # machines are busy
settings.load_profile("shared")
torch.set_num_threads(1)
cv2.setNumThreads(1)
REAL = Path(os.environ.get("MAMMO_REAL_DATA", ROOT.parent / "shared" / "real"))
# Flags that make a run small enough for a test. Its pictures cost as much as the rest: tests that are
# about reports add REPORTS, and what is started as a program of its own knows ResNet-18 alone.
SMALL = (
    f"--tile_size 128 --tile_stride 64 --view_size 32 --backbone {small_network.NAME} --weights none "
    "--hidden_dim 64 --proj_dim 32 --batch_size 8 --tiles_per_epoch 32 --monitor_tiles 32 "
    "--freq_loss_weight 0 --structure_loss_weight 0 --min_freq_energy 0 --pixel_spacing_mm 0.3 "
    "--num_workers 1 --log_every 2 --device cpu --report_every 0 --wandb_mode disabled"
).split()
HOSTILE = "<img src=x onerror=alert(1)>"
PLANTED = ("<script>alert(1)</script>", HOSTILE, '"><svg onload=alert(1)>')
REPORTS = ("--report_every", "5")
RESNET18 = ("--backbone", "resnet18")


# Files that take longest go first, so that both processes end together; the order changes no result.
LONGEST = (
    "test_readme test_full_disk test_pipeline test_killed_processes test_broken_images test_notebook "
    "test_gpu_scripts test_image_mask test_tracking test_report test_classifier test_security "
    "test_training"
).split()


def pytest_collection_modifyitems(items):
    """Sort by LONGEST, within a file the order stays; start the server of stages.py beside the tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # among many files some need it
        stages.serve()
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def breast_image(height=384, width=320, bits=8, seed=0):
    """A half-ellipse of textured tissue at the left side: (H, W) image and its mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mask = ((y - height / 2) / (0.45 * height)) ** 2 + (x / (0.8 * width)) ** 2 < 1
    texture = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 3) * 4
    grey = np.where(mask, np.clip(0.5 + 0.1 * texture + 0.01 * rng.normal(size=mask.shape), 0.2, 1), 0)
    dtype = np.uint8 if bits == 8 else np.uint16
    return (grey * (2**bits - 1)).astype(dtype), mask


def write_images(folder, count=4, **options):
    """Write `count` breast images as PNG; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        cv2.imwrite(str(folder / f"s{index // 2}_i{index}.png"), breast_image(seed=index, **options)[0])
    return folder


def run_script(*words, cwd=ROOT, timeout=300, env=None):
    """Run a script of the project as a user would; returns the finished process."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "2", **(env or {})}
    return subprocess.run(
        command, cwd=cwd, timeout=timeout, env=environment, capture_output=True, text=True, check=False
    )


def places_in(folder):
    """Flags: images in `folder`/images, outputs in `folder`."""
    places = {"data_dir": "images", "output_dir": "runs", "cache_dir": "cache"}
    return [word for name, part in places.items() for word in (f"--{name}", str(folder / part))]


def train_script(folder, *flags, env=None):
    """train_byol_mammo.py with SMALL settings in a process: places of `folder`, see places_in."""
    words = [*places_in(folder), *SMALL, *flags]
    return stages.complete("train_byol_mammo", words, folder, environment=env)


def small_config(folder, *flags):
    """The Config of train_script."""
    return mammo.parse_args([*places_in(folder), *SMALL, *flags])


def assert_same_cache(cache, other):
    """Both caches hold the same tables, and the same pixels of each image wherever these lie."""
    for name in ("tiles.csv", "rejections.csv"):
        assert (cache / name).read_bytes() == (other / name).read_bytes()
    images, others = (pd.read_csv(folder / "images.csv") for folder in (cache, other))
    pd.testing.assert_frame_equal(images.drop(columns="offset"), others.drop(columns="offset"))
    pixels, more = (np.load(folder / "pixels.npy", mmap_mode="r") for folder in (cache, other))
    assert pixels.dtype == more.dtype
    for start, place, size in zip(
        images["offset"], others["offset"], images["height"] * images["width"], strict=True
    ):
        np.testing.assert_array_equal(pixels[start : start + size], more[place : place + size])


def images_done(folder):
    """How many images an unfinished cache below `folder` has on record."""
    journals = folder.glob("**/cache/.*.building/extracted/*/records.jsonl")
    return sum(journal.read_text().count("index") for journal in journals)


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """A folder with four 16-bit images in images/ and their finished cache."""
    folder = tmp_path_factory.mktemp("archive")
    write_images(folder / "images", bits=12)
    mammo.build_cache(small_config(folder))
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run with its report; a hostile name, hostile images, a broken one."""
    folder = tmp_path_factory.mktemp("finished")
    images = write_images(folder / "images", bits=12)
    _, *others = sorted(images.iterdir())
    for path, name in zip(others, PLANTED, strict=True):
        path.rename(images / f"{name.replace('/', chr(0x2215))}.png")  # names hold all but a slash
    (images / f"Jane^<b> {HOSTILE}.png").write_bytes(b"\x89PNG broken")
    return mammo.train(small_config(folder, "--epochs", "2", *REPORTS, "--run_name", HOSTILE))


@pytest.fixture(scope="session")
def tiles(archive):
    """The archive's tiles at full resolution."""
    return mammo.open_tiles(mammo.build_cache(small_config(archive)))


@pytest.fixture
def real():
    """The folder of real mammograms, where there is one."""
    if not REAL.is_dir():
        pytest.skip("no real mammograms: set MAMMO_REAL_DATA")
    return REAL
