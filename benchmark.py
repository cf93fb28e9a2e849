#!/usr/bin/env python3
"""Speed of BYOL Mammo against named baselines, measured in one run on one machine.

    python benchmark.py extraction                      # on phantoms, 8 and 16 bit
    python benchmark.py extraction --data_dir images    # on a folder of mammograms

extraction: reading, masking, choosing and caching tiles, pixels on disk included, against
    read      cv2.imread over the same files
    otsu      full-resolution Otsu, hole filling, largest component label by label, no tiles, no cache
Quote the ratios: machines are noisy, and both sides are timed in turn, best of --repeats.

Contents
    1 Extraction    baselines and the cache
    2 Entry         flags, main
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

import synthetic_mammograms as phantoms
import train_byol_mammo as mammo

# ---- 1 Extraction ----------------------------------------------------------------------------------

PHANTOM_SIZE = (3328, 2560)  # rows, columns of a common 16-bit detector
PHANTOM_SPACING = 0.07  # mm per pixel


def write_phantoms(folder: Path, count: int, bit_depth: int) -> list[Path]:
    """Write `count` phantoms of one bit depth and return their paths."""
    paths = []
    for seed in range(count):
        spec = phantoms.PhantomSpec(
            seed=seed, view=("CC", "MLO")[seed % 2], density="ABCD"[seed % 4], bit_depth=bit_depth,
            height=PHANTOM_SIZE[0], width=PHANTOM_SIZE[1], spacing_mm=PHANTOM_SPACING,
        )  # fmt: skip
        paths.append(folder / f"{seed:03d}.png")
        phantoms.write_png(paths[-1], phantoms.make_phantom(spec).image)
    return paths


def read_all(paths: Sequence[Path]) -> None:
    """Baseline `read`: decode each file and nothing else."""
    for path in paths:
        cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def otsu_all(paths: Sequence[Path]) -> None:
    """Baseline `otsu`: the mask that a plain script makes, at full resolution."""
    for path in paths:
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        binary = cv2.threshold(image, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]
        binary = cv2.morphologyEx(binary, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        filled = cv2.drawContours(np.zeros_like(binary), contours, -1, 255, cv2.FILLED)
        count, labels = cv2.connectedComponents(filled)
        areas = [np.count_nonzero(labels == label) for label in range(1, count)]
        if areas:
            _ = labels == 1 + int(np.argmax(areas))


def extract_all(paths: Sequence[Path], cache: Path, workers: int) -> None:
    """The cache of these files, from nothing, without the run's pictures."""
    shutil.rmtree(cache, ignore_errors=True)
    (cache / "parts").mkdir(parents=True)
    config = mammo.Config(
        data_dir=str(paths[0].parent), num_workers=workers, pixel_spacing_mm=PHANTOM_SPACING
    )
    sources = mammo.list_sources(config.data_dir)
    mammo.extract_all(sources, config, cache / "parts")
    mammo.merge_parts(cache, sources, {}, config)


def best_time(function: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def benchmark_extraction(paths: Sequence[Path], name: str, repeats: int, scratch: Path) -> None:
    """Print seconds an image and ratios for one set of files."""
    read = best_time(lambda: read_all(paths), repeats)
    otsu = best_time(lambda: otsu_all(paths), 1)
    one = best_time(lambda: extract_all(paths, scratch / "cache", 1), repeats)
    count = len(paths)
    print(f"{name}: {count} images, seconds an image")
    print(f"  read {read / count:.3f}   otsu {otsu / count:.3f}   extraction {one / count:.3f}")
    print(f"  extraction / read {one / read:.2f}   otsu / extraction {otsu / one:.2f}")
    if mammo.available_cores() > 1:
        # The fork server imports the libraries once; a first small call keeps that out of the figure.
        two = best_time(lambda: extract_all(paths, scratch / "cache", 2), repeats)
        print(f"  one process / two processes {one / two:.2f}")


# ---- 2 Entry ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["extraction"])
    parser.add_argument("--data_dir", help="folder of mammograms; default: phantoms")
    parser.add_argument("--images", type=int, default=8, help="number of phantoms")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, the best counts")
    options = parser.parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if options.data_dir:
            paths = mammo.find_images(options.data_dir)
            benchmark_extraction(paths, options.data_dir, options.repeats, scratch)
            return 0
        for bits in (16, 8):
            folder = scratch / f"{bits}"
            folder.mkdir()
            paths = write_phantoms(folder, options.images, bits)
            benchmark_extraction(paths, f"phantoms, {bits} bit", options.repeats, scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
