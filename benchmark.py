#!/usr/bin/env python3
"""Speed of BYOL Mammo against named baselines, measured in one run on one machine.

    python benchmark.py extraction                      # on phantoms, 8 and 16 bit
    python benchmark.py extraction --data_dir images    # on a folder of mammograms
    python benchmark.py masks

extraction: reading, masking, choosing and caching tiles, pixels on disk included, against
    read      cv2.imread over the same files
    otsu      a plain script's mask: full-resolution Otsu, 3 x 3 opening, SciPy's hole filling, the
              largest component found label by label; no tiles, no cache
masks: breast masks, bit depths and clusters of specks on phantoms with exact truth (no timing).
Quote the ratios: machines are noisy, and both sides are timed in turn, best of --repeats.

Contents
    1 Extraction    baselines and the cache
    2 Masks         phantoms with traps, encodings, inserted clusters
    3 Entry         flags, main
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
import pandas as pd
from scipy import ndimage, stats

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
        image = np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
        binary = cv2.threshold(image, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]
        binary = cv2.morphologyEx(binary, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        filled = ndimage.binary_fill_holes(binary)
        labels, count = ndimage.label(filled)
        areas = [(labels == label).sum() for label in range(1, count + 1)]
        if areas:
            _ = labels == 1 + int(np.argmax(areas))


def extract_all(paths: Sequence[Path], cache: Path, workers: int) -> None:
    """The cache of these files, from nothing, without the run's pictures."""
    shutil.rmtree(cache, ignore_errors=True)
    (cache / "parts").mkdir(parents=True)
    config = mammo.Config(
        data_dir=str(paths[0].parent), num_workers=workers, pixel_spacing_mm=PHANTOM_SPACING
    )
    sources = mammo.list_sources(config.data_dir).iloc[: len(paths)]
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


def repeated(paths: Sequence[Path], folder: Path, total: int = 96) -> list[Path]:
    """Links to the same files under new names, at least `total`: an archive's start-up cost is small."""
    folder.mkdir()
    links = [folder / f"{index:05d}.png" for index in range(max(total, len(paths)))]
    for index, link in enumerate(links):
        link.symlink_to(paths[index % len(paths)].resolve())
    return links


def benchmark_extraction(paths: Sequence[Path], name: str, repeats: int, scratch: Path) -> None:
    """Print seconds an image and ratios for one set of files."""
    links = repeated(paths, scratch / f"links{len(list(scratch.iterdir()))}")
    read = best_time(lambda: read_all(links), repeats) / len(links)
    otsu = best_time(lambda: otsu_all(paths), 1) / len(paths)
    one = best_time(lambda: extract_all(links, scratch / "cache", 1), repeats) / len(links)
    print(f"{name}: {len(paths)} images, {len(links)} names; seconds an image")
    print(f"  read {read:.3f}   otsu {otsu:.3f}   extraction {one:.3f}")
    print(f"  extraction / read {one / read:.2f}   otsu / extraction {otsu / one:.2f}")
    if mammo.available_cores() > 1:
        # Starting processes takes seconds, once: the difference between two runs leaves it out.
        few = best_time(lambda: extract_all(links[: len(links) // 2], scratch / "cache", 2), repeats)
        all_ = best_time(lambda: extract_all(links, scratch / "cache", 2), repeats)
        two = (all_ - few) / (len(links) - len(links) // 2)
        print(f"  one process / two processes {one / two:.2f}")


# ---- 2 Masks ---------------------------------------------------------------------------------------

TRAP_SIZE, VINDR_SIZE = (1760, 1400), (3518, 2800)  # rows, columns at 0.17 and 0.085 mm


def trap_phantom(trap: str, seed: int, bit_depth: int = 0) -> phantoms.Phantom:
    """A phantom with a trap; sides, views, densities and bit depths change with the seed."""
    spec = phantoms.PhantomSpec(
        seed=seed, laterality="LR"[seed % 2], view=("CC", "MLO")[seed // 2 % 2],
        density="ABCD"[seed // 4 % 4], bit_depth=bit_depth or (8, 12, 16)[seed % 3],
        height=TRAP_SIZE[0], width=TRAP_SIZE[1], trap=trap,
    )  # fmt: skip
    return phantoms.make_phantom(spec)


def as_read(image: np.ndarray, scratch: Path) -> np.ndarray:
    """An image after the way through a file."""
    phantoms.write_png(scratch / "image.png", image)
    return mammo.read_mammogram(scratch / "image.png")


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool arrays; 1 where both are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def benchmark_traps(seeds: int, scratch: Path) -> None:
    """Print IoU with the visible breast per trap, and the label, marker, tape and padding px in masks.

    What a label, frame or padding covers can't be seen: it counts for neither side of the IoU.
    """
    print(f"breast masks on phantoms, {seeds} of each trap: IoU mean, worst; foreign pixels inside")
    for trap in phantoms.TRAPS:
        found, foreign = [], 0
        for seed in range(seeds):
            truth = trap_phantom(trap, seed)
            mask = mammo.segment_breast_tissue(as_read(truth.image, scratch))
            found.append(overlap(mask & ~truth.foreign, truth.breast & ~truth.foreign))
            foreign += int((mask & truth.foreign).sum())
        print(f"  {trap:17s} {np.mean(found):.4f} {min(found):.4f} {foreign}")


def vindr_phantom(seed: int) -> phantoms.Phantom:
    """A phantom of VinDr's size; sides, views and densities change with the seed."""
    spec = phantoms.PhantomSpec(
        seed=seed, laterality="LR"[seed % 2], view=("CC", "MLO")[seed // 2 % 2],
        density="ABCD"[seed % 4], height=VINDR_SIZE[0], width=VINDR_SIZE[1],
    )  # fmt: skip
    return phantoms.make_phantom(spec)


def benchmark_encodings(count: int, scratch: Path) -> None:
    """Print how well masks and kept tiles of one picture agree over bit depths and polarity."""
    config, results = mammo.Config(), []
    for seed in range(count):
        image = vindr_phantom(seed).image
        encodings = {
            "16 bit": image,
            "12 bit": image >> 4,
            "8 bit": (image >> 8).astype(np.uint8),
            "inverted": 65535 - image,
        }
        for name, encoded in encodings.items():
            read = as_read(encoded, scratch)
            mask = mammo.segment_breast_tissue(read)
            kept = mammo.score_tiles(read, mask, config)["rejected_by"].to_numpy() == ""
            if name == "16 bit":
                reference = mask, kept
            both = 2 * (kept & reference[1]).sum()
            same = (kept == reference[1]).sum()
            sizes = kept.sum() + reference[1].sum(), len(kept)
            results.append((name, overlap(mask, reference[0]), both, sizes[0], same, sizes[1]))
    print(f"{count} phantoms in other encodings against 16 bit: worst mask IoU, tiles that agree")
    table = pd.DataFrame(results, columns=["name", "iou", "both", "kept", "same", "positions"])
    for name, rows in table.groupby("name", sort=False):
        shares = rows["both"].sum() / rows["kept"].sum(), rows["same"].sum() / rows["positions"].sum()
        print(f"  {name:9s} {rows['iou'].min():.4f}  kept {shares[0]:.4f}, of all {shares[1]:.4f}")


def insert_cluster(tile: np.ndarray, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """5-20 Gaussian specks of 0.2-0.6 mm, peaks `low`-`high` local deviations of the tissue's band."""
    size, spacing = tile.shape[0], 0.085
    field = tile.astype(np.float32)
    band = cv2.GaussianBlur(field, (0, 0), 1.2) - cv2.GaussianBlur(field, (0, 0), 4)
    centre = rng.uniform(120, size - 120, 2)
    radius = np.mgrid[-10:11, -10:11]
    for _ in range(rng.integers(5, 21)):
        y, x = (centre + rng.normal(0, 40, 2)).astype(int).clip(12, size - 12)
        sigma = rng.uniform(0.2, 0.6) / spacing / 2.355
        speck = np.exp(-(radius**2).sum(0) / (2 * sigma**2))
        local = band[max(0, y - 32) : y + 32, max(0, x - 32) : x + 32].std()
        field[y - 10 : y + 11, x - 10 : x + 11] += rng.uniform(low, high) * local * speck
    return field.clip(0, np.iinfo(tile.dtype).max).astype(tile.dtype)


def benchmark_clusters(count: int) -> None:
    """Print how well frequency_energy tells phantom tiles with a cluster from those without."""
    rng = np.random.default_rng(0)
    bands = {"8-16": (8, 16), "5-10": (5, 10)}
    plain: list[float] = []
    inserted: dict[str, list[float]] = {name: [] for name in bands}
    whole = np.ones((512, 512), bool)
    for seed in range(count):
        truth = vindr_phantom(seed)
        for y in range(0, VINDR_SIZE[0] - 511, 256):
            for x in range(0, VINDR_SIZE[1] - 511, 256):
                area = np.s_[y : y + 512, x : x + 512]
                if truth.breast[area].mean() < 0.95:
                    continue
                plain.append(mammo.frequency_energy(truth.image[area], whole))
                for name, (low, high) in bands.items():
                    tile = insert_cluster(truth.image[area], rng, low, high)
                    inserted[name].append(mammo.frequency_energy(tile, whole))
    for name, energies in inserted.items():
        # Mann and Whitney's statistic over its maximum is the area under the ROC curve.
        auc = stats.mannwhitneyu(energies, plain).statistic / (len(energies) * len(plain))
        kept = np.mean(np.array(energies) >= mammo.MIN_FREQ_ENERGY)
        lost = np.mean(np.array(plain) < mammo.MIN_FREQ_ENERGY)
        print(
            f"clusters at {name} local deviations, {len(plain)} phantom tiles: AUC {auc:.3f}, "
            f"at {mammo.MIN_FREQ_ENERGY} kept {kept:.2f}, plain tiles rejected {lost:.2f}"
        )


# ---- 3 Entry ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["extraction", "masks"])
    parser.add_argument("--data_dir", help="folder of mammograms; default: phantoms")
    parser.add_argument("--images", type=int, default=8, help="number of phantoms")
    parser.add_argument("--seeds", type=int, default=20, help="phantoms of each trap")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, the best counts")
    options = parser.parse_args(argv)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if options.what == "masks":
            benchmark_traps(options.seeds, scratch)
            benchmark_encodings(options.seeds, scratch)
            benchmark_clusters(options.images)
            return 0
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
