#!/usr/bin/env python3
"""Speed of BYOL Mammo against named baselines, measured in one run on one machine.

    python benchmark.py extraction                      # on phantoms, 8 and 16 bit
    python benchmark.py extraction --data_dir images    # on a folder of mammograms
    python benchmark.py memory                          # peak memory of extraction, 50 and 500 images
    python benchmark.py masks                           # quality, not speed
    python benchmark.py step                            # or loop, views, resume; see the flags for a GPU
    python benchmark.py profile                         # where a step's time goes, gaps between kernels
    python benchmark.py showing --steps 400             # what progress, wandb, pictures and report cost
    python benchmark.py all                             # all but memory, masks and showing

extraction: reading, masking, choosing and caching tiles, pixels on disk included, against
    read      cv2.imread over the same files
    otsu      a plain script's mask: full-resolution Otsu, 3 x 3 opening, SciPy's hole filling, the
              largest component found label by label; no tiles, no cache
memory: the peak of one extracting process, for few and for ten times as many images.
masks: breast masks, bit depths and clusters of specks on phantoms with exact truth (no timing); with
    --data_dir, masks of those images once they are spoilt by frames, tape, a canvas, noise, or cut until
    hardly any air is left, against their masks as they are, and bit depths of those that have over 8.
step: the whole training step (views, step, metrics), with the share of each part, against
    bare      the optimiser step on constant views that lie on the device already
    product   a large matrix product in the same precision: what the arithmetic can do
    and of the step with the default objective, targets and all, against the same step of plain BYOL
loop: the whole training step against what a user of lightly would write
    lightly   8-bit PNG tiles, Pillow, lightly's BYOLTransform, DataLoader workers, eager AMP
    alike     the same with our kinds of views: torchvision's rotation, perspective, photometry, blur
    fp32      lightly without AMP
views: both views of a batch against
    kornia    the same kinds of views from float tiles that lie on the device already
    and shortcuts: what the two views of a tile share that tells nothing of tissue (correlations);
    with --data_dir, of the tiles of up to 48 images of that folder (without kornia, this alone)
profile: kernels of a step by time, and the share of the time in which none runs (no timing against a
    baseline; on the CPU operators stand for kernels).
resume: writing and reading the complete state.
showing: the main script as a user starts it, with progress, wandb offline, pictures and report, against
    nothing   the same with all of it switched off
Quote the ratios: machines are noisy, and both sides are timed in turn, best of --repeats (shares of
a step after the step).

Contents
    1 Extraction    baselines, the cache, memory
    2 Masks         phantoms with traps, encodings, inserted clusters
    3 Training      step, loop, views, profile, resume, showing
    4 Entry         flags, main
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from scipy import ndimage, stats
from torch.utils.flop_counter import FlopCounterMode

import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
from byol_mammo import (
    checkpoints,
    device as devices,
    images as image_files,
    processes,
    report,
    shortcuts,
)  # fmt: skip

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
    config = mammo.Config(
        data_dir=str(paths[0].parent), num_workers=workers, pixel_spacing_mm=PHANTOM_SPACING
    )
    sources = image_files.list_sources(config.data_dir).iloc[: len(paths)]
    records = mammo.extract_all(sources, config, cache / "extracted" / "here")
    mammo.finish_cache(cache, records, sources, {}, config)


def best_time(function: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    return min(timeit.repeat(function, "gc.enable()", number=1, repeat=repeats))


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
    if processes.available_cores() > 1:
        # Starting processes takes seconds, once: the difference between two runs leaves it out.
        few = best_time(lambda: extract_all(links[: len(links) // 2], scratch / "cache", 2), repeats)
        all_ = best_time(lambda: extract_all(links, scratch / "cache", 2), repeats)
        two = (all_ - few) / (len(links) - len(links) // 2)
        print(f"  one process / two processes {one / two:.2f}")


def peak_of_extraction(paths: Sequence[Path], cache: Path, results: multiprocessing.Queue) -> None:
    """Put the peak memory (MiB) of this process and of its extraction into `results`."""
    cv2.setNumThreads(1)
    extract_all(paths, cache, 1)
    peaks = [
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    results.put(max(peaks) / 1024)


def benchmark_memory(options: argparse.Namespace, scratch: Path) -> None:
    """Print the peak memory of extracting 50 and 500 images, each in a process of its own."""
    paths = image_files.find_images(options.data_dir) if options.data_dir else None
    if paths is None:
        (scratch / "16").mkdir()
        paths = write_phantoms(scratch / "16", options.images, 16)
    context, peaks = multiprocessing.get_context("spawn"), []
    for count in (50, 500):
        links = repeated(paths, scratch / f"links{count}", count)[:count]
        results = context.Queue()
        job = context.Process(target=peak_of_extraction, args=(links, scratch / "cache", results))
        job.start()
        peaks.append(results.get())
        job.join()
        print(f"{count} images: peak memory {peaks[-1]:.0f} MiB")
    print(f"500 images / 50 images {peaks[1] / peaks[0]:.3f}")


# ---- 2 Masks ---------------------------------------------------------------------------------------

FINE_STRIDE = 32  # px between the tiles of real images, which are few
TRAP_SIZE, VINDR_SIZE = (1760, 1400), (3518, 2800)  # rows, columns at 0.17 and 0.085 mm


def trap_phantom(trap: str, seed: int) -> phantoms.Phantom:
    """A phantom with a trap; sides, views, densities and bit depths change with the seed."""
    spec = phantoms.PhantomSpec(
        seed=seed, laterality="LR"[seed % 2], view=("CC", "MLO")[seed // 2 % 2],
        density="ABCD"[seed // 4 % 4], bit_depth=(8, 12, 16)[seed % 3],
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


def spoilt(image: np.ndarray, breast: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """An image and its mask with additions that the mask must not change for, and cut to close-ups."""
    rng, top = np.random.default_rng(0), 2 ** image_files.bit_depth(image) - 1
    height, width = image.shape
    chest_left = mammo.anatomy.chest_side(breast) == 0

    def covered(area: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        changed = image.copy()
        changed[area] = (top * rng.uniform(low, high, int(area.sum()))).astype(image.dtype)
        return changed, breast & ~area

    def with_noise(picture: np.ndarray, strength: float) -> np.ndarray:
        noise = 0.03 + strength * rng.standard_normal(picture.shape)
        return (picture + top * noise).clip(0, top).astype(image.dtype)

    def close_up(share: float) -> tuple[np.ndarray, np.ndarray]:
        x, y, columns, rows = cv2.boundingRect(breast.view(np.uint8))
        kept, half = int(share * columns), int((1 + share) / 4 * rows)
        left = x if chest_left else x + columns - kept
        area = np.s_[max(0, y + rows // 2 - half) : y + rows // 2 + half, left : left + kept]
        return np.ascontiguousarray(image[area]), breast[area]

    framed, inside = covered(phantoms.frame_of(image.shape, max(1, width // 50)), 0.75, 1)
    tape = np.zeros(image.shape, bool)
    tape[:, : max(1, width // 12)] = True
    canvas = ((height // 4, height // 4), (width // 4, width // 4))
    size = (512 * width // height, 512)
    reduced = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    reduced_breast = cv2.resize(breast.view(np.uint8), size, interpolation=cv2.INTER_AREA) > 0
    return {
        "noisy frame": (framed, inside),
        "its negative": (top - framed, inside),
        "tape": covered(tape[:, ::-1] if chest_left else tape, 0.4, 0.5),
        "black canvas": (np.pad(image, canvas), np.pad(breast, canvas)),
        "noise 1 %": (with_noise(image, 0.01), breast),
        "512 px, 5 %": (with_noise(reduced, 0.05), reduced_breast),
        **{f"close-up {share}": close_up(share) for share in (0.9, 0.8, 0.7, 0.6, 0.5)},
    }


def benchmark_spoilt(paths: Sequence[Path], scratch: Path) -> None:
    """Print how well masks of spoilt images agree with those of the images as they are."""
    found: dict[str, list[tuple[float, float]]] = {}
    for path in paths:
        image = mammo.read_mammogram(path)
        breast = mammo.segment_breast_tissue(image)
        for name, (changed, wanted) in spoilt(image, breast).items() if breast.any() else ():
            mask = mammo.segment_breast_tissue(as_read(changed, scratch))
            found.setdefault(name, []).append((overlap(mask, wanted), float(wanted.mean())))
    print(f"{len(paths)} images, spoilt: IoU mean, worst; share of the image that is breast")
    for name, values in found.items():
        overlaps, shares = zip(*values, strict=True)
        print(f"  {name:13s} {np.mean(overlaps):.4f} {min(overlaps):.4f} {np.mean(shares):.3f}")


def vindr_phantom(seed: int) -> phantoms.Phantom:
    """A phantom of VinDr's size; sides, views and densities change with the seed."""
    spec = phantoms.PhantomSpec(
        seed=seed, laterality="LR"[seed % 2], view=("CC", "MLO")[seed // 2 % 2],
        density="ABCD"[seed % 4], height=VINDR_SIZE[0], width=VINDR_SIZE[1],
    )  # fmt: skip
    return phantoms.make_phantom(spec)


def benchmark_encodings(images: Iterable[np.ndarray], stride: int, scratch: Path) -> None:
    """Print how well masks and kept tiles of one picture agree over bit depths and polarity."""
    config, results = mammo.Config(tile_stride=stride), []
    for image in images:
        whole = image << 16 - image_files.bit_depth(image)
        encodings = {
            "16 bit": whole,
            "12 bit": whole >> 4,
            "8 bit": (whole >> 8).astype(np.uint8),
            "inverted": 65535 - whole,
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
    table = pd.DataFrame(results, columns=["name", "iou", "both", "kept", "same", "positions"])
    count = int((table["name"] == "16 bit").sum())
    print(f"{count} images in other encodings against 16 bit: worst mask IoU, tiles that agree")
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


# ---- 3 Training ------------------------------------------------------------------------------------

TRAIN_PHANTOMS, TRAIN_SIZE, TRAIN_SPACING = 6, (2048, 1664), 0.146  # rows, columns, mm per pixel
PRODUCT_SIDES = {"cuda": 8192, "cpu": 2048}  # rows and columns of the matrix product
MOST_IMAGES = 48  # of --data_dir
WARM_UP = 3  # steps that are not timed
SHORTCUT_BATCHES = 16  # whose views are compared
PROFILED = 5  # steps of a profile, which reads no metrics
KERNELS_SHOWN = 25  # lines of it
LOG_EVERY = 10  # steps between readings of the metrics


def training_images(scratch: Path, data_dir: str) -> Path:
    """A folder in `scratch`, made where it is not there: TRAIN_PHANTOMS, or links to some images of the
    user's, spread over all of them, since the cache of all may not fit there."""
    images = scratch / "images"
    if data_dir and not images.is_dir():
        paths = image_files.find_images(data_dir)
        repeated(paths[:: -(-len(paths) // MOST_IMAGES)], images, 1)
    elif not images.is_dir():
        images.mkdir()
        for seed in range(TRAIN_PHANTOMS):
            spec = phantoms.PhantomSpec(
                seed=seed, view=("CC", "MLO")[seed % 2], density="BC"[seed % 2], height=TRAIN_SIZE[0],
                width=TRAIN_SIZE[1], spacing_mm=TRAIN_SPACING,
            )  # fmt: skip
            phantoms.write_png(images / f"{seed}.png", phantoms.make_phantom(spec).image)
    return images


def open_run(options: argparse.Namespace, scratch: Path, tile_size: int) -> mammo.Run:
    """A training run on training_images with tiles of one size, its cache built."""
    config = mammo.Config(
        data_dir=str(training_images(scratch, options.data_dir)), cache_dir=str(scratch / "cache"),
        output_dir=str(scratch / "runs"), run_name=f"tile{tile_size}", tile_size=tile_size,
        tile_stride=64, min_freq_energy=0, pixel_spacing_mm=TRAIN_SPACING, backbone=options.backbone,
        weights="none", view_size=options.view_size, batch_size=options.batch_size, monitor_tiles=2,
        device=options.device, precision=options.precision, grad_checkpoint=options.grad_checkpoint,
        freq_loss_weight=0, structure_loss_weight=0,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = checkpoints.build_backbone(config.backbone)
    config = mammo.match_input_dim(config, backbone)
    devices.set_determinism(config.deterministic, devices.choose_device(config.device))
    return mammo.prepare_run(config, backbone, mammo.build_cache(config), processes.Ranks())


def with_targets(run: mammo.Run) -> mammo.Run:
    """A run like another, with the main script's own objective in place of plain BYOL."""
    config = dataclasses.replace(
        run.config,
        freq_loss_weight=mammo.FREQ_LOSS_WEIGHT,
        structure_loss_weight=mammo.STRUCTURE_LOSS_WEIGHT,
    )
    backbone = checkpoints.build_backbone(config.backbone)
    return mammo.prepare_run(config, backbone, run.tiles.cache, processes.Ranks())


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(step: Callable[[int], Any], count: int, device: torch.device) -> float:
    """Seconds per call of `step`, after WARM_UP calls."""
    for index in range(WARM_UP):
        step(index)
    wait_for(device)
    start = time.perf_counter()
    for index in range(count):
        step(WARM_UP + index)
    wait_for(device)
    return (time.perf_counter() - start) / count


def endless_batches(run: mammo.Run) -> Iterator[tuple[np.ndarray, Any]]:
    """Batches of one epoch after the other."""
    while True:
        run.step = 0
        yield from mammo.batches(run)


def as_views(images: Sequence[torch.Tensor]) -> list[mammo.View]:
    """Tensors (B, C, S, S) as what an objective takes; nothing of it but BYOL's loss is computed."""
    return [mammo.View(spec.kind, image, image) for spec, image in zip(mammo.VIEWS, images, strict=True)]


def constant_views(run: mammo.Run) -> list[mammo.View]:
    """Views of noise that lie on the device already, each (B, 1, S, S)."""
    shape = (run.config.batch_size, 1, run.config.view_side, run.config.view_side)
    return as_views([torch.randn(shape, device=run.device) for _ in mammo.VIEWS])


def model_passes(run: mammo.Run) -> Callable[[int], Any]:
    """The forward passes and the backward pass on constant views, gradients left for the optimiser."""
    views = constant_views(run)

    def step(_: int) -> None:
        with run.autocast():
            loss = run.compute_loss(views)[0]
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()

    return step


def bare_step(run: mammo.Run) -> Callable[[int], Any]:
    """Baseline `bare`: the optimiser step on constant views that lie on the device already."""
    passes = model_passes(run)

    def step(index: int) -> None:
        passes(index)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.objective.after_step(0, 1)

    return step


def parts_of_step(run: mammo.Run) -> dict[str, Callable[[int], Any]]:
    """What a step consists of, each part alone."""
    passes = model_passes(run)
    passes(0)  # gradients for the optimiser
    return {
        "views": our_views(run),
        "optimiser": lambda _: run.optimizer.step(),
        "target": lambda _: run.objective.after_step(0, 1),
        "forward and backward": passes,
    }


def utilisation(run: mammo.Run, seconds: float) -> tuple[float, float]:
    """FLOP/s of the model in a step of `seconds` over those of a matrix product, and the latter.

    Without what --grad_checkpoint computes twice; grouped convolutions are counted too high.
    """
    views = constant_views(run)
    with FlopCounterMode(display=False) as counter, run.autocast():
        run.model.grad_checkpoint = False
        mammo.BYOL(run.model, run.config)(views)[0].backward()
    run.model.grad_checkpoint = run.config.grad_checkpoint
    run.model.zero_grad()
    side = PRODUCT_SIDES[run.device.type]
    factors = [torch.randn(side, side, device=run.device) for _ in range(2)]
    with run.autocast():
        kind = (factors[0][:1] @ factors[1]).dtype
    factors = [factor.to(kind) for factor in factors]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as convolutions have it
    product = min(time_steps(lambda _: factors[0] @ factors[1], 10, run.device) for _ in range(3))
    torch.backends.cuda.matmul.allow_tf32 = before
    ceiling = 2 * side**3 / product
    return counter.get_total_flops() / seconds / ceiling, ceiling


def whole_step(run: mammo.Run) -> Callable[[int], Any]:
    """The project's own step: order, views, training step, metrics read every LOG_EVERY steps."""
    source, pending = endless_batches(run), []

    def step(index: int) -> None:
        pending.append(mammo.train_step(run, *next(source)))
        if index % LOG_EVERY == 0:
            mammo.read_metrics(run, pending, processes.StopSignal())
            pending.clear()

    return step


class PngTiles(torch.utils.data.Dataset):
    """Tiles as 8-bit PNG files, read by Pillow: what a user of lightly would write."""

    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        from PIL import Image

        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def photograph_views(size: int) -> Any:
    """lightly's BYOLTransform as it comes."""
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    return BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))


def views_alike(size: int) -> Any:
    """The kinds of views of the main script, as lightly's MultiViewTransform of torchvision's."""
    from lightly.transforms.multi_view_transform import MultiViewTransform
    from torchvision.transforms import InterpolationMode, v2

    smooth = {"interpolation": InterpolationMode.BILINEAR}
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    last = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.449] * 3, [0.226] * 3),
    ]
    first = [*flips, v2.RandomAffine(15, scale=(0.85, 1.15), **smooth), v2.Resize(size)]
    second = [*flips, v2.RandomRotation(25, **smooth), v2.RandomPerspective(0.1, p=1, **smooth)]
    second += [v2.Resize(size), v2.RandomApply([v2.GaussianBlur(9, (0.1, 1.2))])]
    return MultiViewTransform(
        [
            v2.Compose([*first, v2.ColorJitter(0.3, 0.3), *last]),
            v2.Compose([*second, v2.ColorJitter(0.4, 0.4), *last]),
        ]
    )


def lightly_step(
    run: mammo.Run, scratch: Path, transform: Any, autocast: Callable[[], Any]
) -> Callable[[int], Any]:
    """Baselines `lightly`, `alike`, `fp32`: PNG tiles, a transform, DataLoader workers, eager step."""
    folder = scratch / f"png{run.config.tile_size}"
    folder.mkdir(exist_ok=True)
    ids = run.train_ids[: 16 * run.config.batch_size]
    for start in range(0, len(ids), 16):
        part = run.tiles.subset(ids[start : start + 16])
        views = mammo.sample_tiles(
            part, np.arange(len(part.centre)), np.tile(np.eye(3), (len(part.centre), 1, 1)),
            run.config.tile_size // part.reduce,
        )  # fmt: skip
        for index, tile in enumerate(views):
            grey = (255 * tile[0].clamp(0, 1)).byte().numpy()
            full = cv2.resize(grey, (run.config.tile_size,) * 2)
            phantoms.write_png(folder / f"{start + index:05d}.png", full)
    loader = torch.utils.data.DataLoader(
        PngTiles(sorted(folder.glob("*.png")), transform), run.config.batch_size, shuffle=True,
        drop_last=True, num_workers=min(16, processes.available_cores()), persistent_workers=True,
    )  # fmt: skip
    # A plain model in PyTorch's default memory layout, a plain optimiser.
    model = copy.deepcopy(run.model).to(memory_format=torch.contiguous_format)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    objective, optimizer = mammo.BYOL(model, run.config), torch.optim.AdamW(trained, lr=run.config.lr)

    def forever() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    source = forever()

    def step(_: int) -> None:
        views = [view.to(run.device, non_blocking=True) for view in next(source)]
        with autocast():
            loss = objective(as_views(views))[0]
        optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        model.update_target(0.99)
        loss.item()  # shown by the usual progress bar

    return step


def our_views(run: mammo.Run) -> Callable[[int], Any]:
    """Both views of a batch from the pixel cache."""
    source = endless_batches(run)

    def step(index: int) -> None:
        ids, tiles = next(source)
        places = ids if tiles is None else np.arange(len(ids))
        mammo.make_views(run, tiles or run.tiles, places, (0, index, 0))

    return step


def kornia_views(run: mammo.Run) -> Callable[[int], Any]:
    """Baseline `kornia`: the same kinds of views from whole float tiles that lie on the device.

    Tiles are averaged to the view's size first, which is its fastest way.
    """
    from kornia import augmentation as K

    side, size, batch = run.config.tile_size, run.config.view_side, run.config.batch_size
    tiles = torch.rand(batch, 1, side, side, device=run.device)
    common = [K.RandomHorizontalFlip(p=0.5), K.RandomVerticalFlip(p=0.5)]
    first = K.AugmentationSequential(
        *common, K.RandomAffine(15, scale=(0.85, 1.15), p=1.0),
        K.RandomBrightness((0.7, 1.3), p=1.0), K.RandomContrast((0.7, 1.3), p=1.0),
    )  # fmt: skip
    second = K.AugmentationSequential(
        *common, K.RandomAffine(25, p=1.0), K.RandomPerspective(0.1, p=1.0),
        K.RandomBrightness((0.6, 1.4), p=1.0), K.RandomContrast((0.6, 1.4), p=1.0),
        K.RandomGaussianBlur((9, 9), (0.1, 1.2), p=0.5),
    )  # fmt: skip

    def step(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.interpolate(tiles, (size, size), mode="area")
        return first(small), second(small)

    return step


def sides_of(
    run: mammo.Run, scratch: Path, what: Sequence[str]
) -> dict[str, Callable[[], Callable[[int], Any]]]:
    """Makers of the steps to be timed, by name."""
    size = run.config.view_side
    training = {"bare": lambda: bare_step(run), "whole": lambda: whole_step(run)}
    objective = {"default": lambda: whole_step(with_targets(run))}
    plain = {
        "lightly": lambda: lightly_step(run, scratch, photograph_views(size), run.autocast),
        "alike": lambda: lightly_step(run, scratch, views_alike(size), run.autocast),
        "fp32": lambda: lightly_step(run, scratch, photograph_views(size), nullcontext),
    }
    views = {"views": lambda: our_views(run)}
    if find_spec("kornia"):  # of requirements-dev.txt; users are sent here for what views share
        views["kornia"] = lambda: kornia_views(run)
    return {
        **(training if "step" in what or "loop" in what else {}),
        **(objective if "step" in what else {}),
        **(plain if "loop" in what else {}),
        **(views if "views" in what else {}),
    }


def print_shares(run: mammo.Run, whole: float, options: argparse.Namespace) -> dict[str, float]:
    """Print and return each part's share of a step of `whole` seconds, and of the arithmetic."""
    parts = {
        name: min(time_steps(part, options.steps, run.device) for _ in range(options.repeats)) / whole
        for name, part in parts_of_step(run).items()
    }
    used, ceiling = utilisation(run, whole)
    print(f"  shares: {', '.join(f'{name} {share:.3f}' for name, share in parts.items())}")
    print(f"  model's arithmetic / matrix product's {used:.2f}, of {ceiling / 1e12:.2f} TFLOP/s")
    return {**parts, "arithmetic": used}


def print_shortcuts(run: mammo.Run) -> dict[str, float]:
    """Print and return what the two views of a tile share that tells nothing of tissue."""
    source, views = endless_batches(run), []
    for index in range(SHORTCUT_BATCHES):
        ids, tiles = next(source)
        places = ids if tiles is None else np.arange(len(ids))
        views.append(mammo.make_views(run, tiles or run.tiles, places, (0, index, 0)))
    images = [torch.cat([pair[number].image for pair in views]) for number in range(2)]
    seen = [(image * mammo.GREY_STD + mammo.GREY_MEAN).cpu() for image in images]
    found = shortcuts.correlations(*(grey.where(grey > 1e-4, 0.0) for grey in seen))  # rounded air
    shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    print(f"  shared by the views of {len(seen[0])} tiles (correlation): {shown}")
    return found


def device_events(run: mammo.Run) -> list[tuple[str, float, float, float]]:
    """Kernels of PROFILED whole steps by start: name, start, end, own time, all in seconds.

    On the CPU operators, of which some hold others.
    """
    kinds = torch.profiler.ProfilerActivity
    on_gpu = run.device.type == "cuda"
    step = whole_step(run)
    for index in range(WARM_UP):
        step(index)
    wait_for(run.device)
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])]) as profiler:
        for index in range(PROFILED):
            step(WARM_UP + index)
        wait_for(run.device)
    found = []
    for event in profiler.events():
        # Ranges that a program names (optimiser, compiled graph) are drawn over the gaps too.
        named = getattr(event, "is_user_annotation", False)
        if (event.device_type.name == "CUDA") == on_gpu and not named:
            start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
            own = end - start if on_gpu else event.self_cpu_time_total / 1e6
            found.append((event.name, start, end, own))
    return sorted(found, key=lambda event: event[1])


def print_profile(run: mammo.Run) -> dict[str, float]:
    """Print the kernels that take longest; return kernels a step and the share of time without any."""
    events, busy, until = device_events(run), 0.0, -math.inf
    totals: dict[str, tuple[float, int]] = {}
    for name, start, end, own in events:
        seconds, count = totals.get(name, (0.0, 0))
        totals[name] = seconds + own, count + 1
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    gaps = 1 - busy / (until - events[0][1])
    kernels = len(events) / PROFILED
    print(f"  {kernels:.0f} kernels a step, none runs for {gaps:.3f} of the time")
    for name, (seconds, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:KERNELS_SHOWN]:
        print(f"    {1e3 * seconds / PROFILED:8.3f} ms {count / PROFILED:6.1f} x {name[:80]}")
    return {"kernels": kernels, "gaps": gaps}


def time_sides(
    run: mammo.Run, scratch: Path, what: Sequence[str], options: argparse.Namespace
) -> tuple[dict[str, float], int]:
    """Seconds a step of each side, timed in turn, and the bytes of GPU memory that the loop takes."""
    seconds: dict[str, float] = {}
    peak, device = 0, run.device
    for _ in range(options.repeats):
        for name, make_step in sides_of(run, scratch, what).items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            turn = time_steps(make_step(), options.steps, device)
            seconds[name] = min(turn, seconds.get(name, turn))
            if device.type == "cuda" and name == "whole":
                peak = torch.cuda.max_memory_allocated(device)
    return seconds, peak


def save_figures(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Add a line to the file of --figures, where one is given."""
    if options.figures:
        with open(options.figures, "a") as file:
            file.write(json.dumps({"stage": "training", **figures}) + "\n")


def benchmark_training(options: argparse.Namespace, scratch: Path, what: Sequence[str]) -> None:
    """Print tiles per second and ratios of `step`, `loop`, `views`, and what `profile` shows."""
    sizes = (options.tile_size,) if options.tile_size else (options.view_size, 4 * options.view_size)
    for tile_size in dict.fromkeys(sizes):
        run = open_run(options, scratch, tile_size)
        batch, device = options.batch_size, run.device
        precision = devices.precision_name(run.config.precision, device)
        print(
            f"{options.backbone}, tiles of {tile_size} px, views of {run.config.view_side} px, "
            f"batch {batch}, {device.type}, {precision}"
        )
        seconds, peak = time_sides(run, scratch, what, options)
        names = "backbone tile_size view_size batch_size".split()
        figures: dict[str, Any] = {name: getattr(run.config, name) for name in names}
        figures |= {"precision": precision, "seconds": seconds, "peak_bytes": peak}
        save_figures(options, figures)  # what follows may be cut short
        if "whole" in seconds:
            bare, whole = seconds["bare"], seconds["whole"]
            print(f"  bare step {batch / bare:.1f} tiles/s, loop {batch / whole:.1f}", end="")
            print(f", loop / bare {whole / bare:.3f}")
        if "step" in what:
            cost = seconds["default"] / whole
            print(f"  default objective's step / plain BYOL's {cost:.3f}")
            figures["shares"] = print_shares(run, whole, options)
        if "loop" in what:
            for name in ("lightly", "alike", "fp32"):
                print(
                    f"  {name} / ours {seconds[name] / whole:.2f}, {batch / seconds[name]:.1f} tiles/s"
                )
        if "views" in what:
            ours = seconds["views"]
            ratio = (
                f"kornia / ours {seconds['kornia'] / ours:.2f}" if "kornia" in seconds else "no kornia"
            )
            print(f"  views {1e3 * ours:.1f} ms a batch, {ratio}")
            figures["shortcuts"] = print_shortcuts(run)
        if peak:
            print(f"  peak memory of the loop {peak / 2**30:.1f} GiB")
        if "profile" in what:
            figures["profile"] = print_profile(run)
        save_figures(options, figures)


def benchmark_resume(options: argparse.Namespace, scratch: Path) -> None:
    """Print what writing and reading the complete state cost."""
    run = open_run(options, scratch, options.view_size)
    run.folder.mkdir(parents=True, exist_ok=True)
    step = time_steps(whole_step(run), options.steps, run.device)
    write = best_time(lambda: mammo.save_state(run), 3)
    read = best_time(
        lambda: mammo.resume_run(run, checkpoints.load_checkpoint(run.folder / "last.pth")), 3
    )
    size = (run.folder / "last.pth").stat().st_size / 2**20
    print(f"state of {size:.0f} MiB: written in {write:.2f} s, read in {read:.2f} s", end="")
    print(f"; one step takes {step:.2f} s; at the default every {mammo.SAVE_EVERY:g} min: ", end="")
    print(f"{write / (60 * mammo.SAVE_EVERY):.2%} of the time")


def benchmark_showing(options: argparse.Namespace, scratch: Path) -> None:
    """Print the time of a whole run with everything shown over that of the same run without."""
    config = dataclasses.replace(open_run(options, scratch, options.view_size).config, run_name="")
    settings = dataclasses.asdict(config) | {"max_steps": options.steps}
    flags = [
        word
        for words in report.changed_flags(settings, mammo.terms().defaults).values()
        for word in words
    ]
    sides = {
        "nothing": "--progress none --wandb_mode disabled --report_every 0",
        "showing": "--progress lines --wandb_mode offline",
    }
    seconds = dict.fromkeys(sides, math.inf)
    for repeat in range(options.repeats):
        for side, extra in sides.items():
            command = [sys.executable, mammo.__file__, *flags, *extra.split()]
            start = time.perf_counter()
            subprocess.run([*command, "--run_name", f"{side}{repeat}"], check=True, capture_output=True)
            seconds[side] = min(seconds[side], time.perf_counter() - start)
    shown, nothing = seconds["showing"], seconds["nothing"]
    print(f"{options.steps} steps: nothing shown {nothing:.1f} s, all shown {shown:.1f} s, ", end="")
    print(f"all / nothing {shown / nothing:.3f}")


# ---- 4 Entry ---------------------------------------------------------------------------------------


COMMANDS = "extraction memory masks step loop views profile resume showing all".split()


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, and the benchmark as `what`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--data_dir", default="", help="folder of mammograms; default: phantoms")
    parser.add_argument("--images", type=int, default=8, help="number of phantoms")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--view_size", type=int, default=128, help="px")
    parser.add_argument("--tile_size", type=int, default=0, help="px; 0: the view's, and 4 times that")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="as in train_byol_mammo.py")
    parser.add_argument("--grad_checkpoint", action="store_true")
    parser.add_argument("--seeds", type=int, default=20, help="phantoms of each trap")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, the best counts")
    parser.add_argument("--figures", default="", help="file that gets a line of JSON for each setting")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark named on the command line."""
    options = parse_options(argv)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if options.what in ("step", "loop", "views", "profile"):
            benchmark_training(options, scratch, [options.what])
        elif options.what == "resume":
            benchmark_resume(options, scratch)
        elif options.what == "showing":
            benchmark_showing(options, scratch)
        elif options.what == "memory":
            benchmark_memory(options, scratch)
        elif options.what == "masks" and options.data_dir:
            paths = image_files.find_images(options.data_dir)
            benchmark_spoilt(paths, scratch)
            images = map(mammo.read_mammogram, paths)
            deep = (image for image in images if image_files.bit_depth(image) > 8)
            benchmark_encodings(deep, FINE_STRIDE, scratch)
        elif options.what == "masks":
            benchmark_traps(options.seeds, scratch)
            drawn = (vindr_phantom(seed).image for seed in range(options.seeds))
            benchmark_encodings(drawn, mammo.TILE_STRIDE, scratch)
            benchmark_clusters(options.images)
        elif options.what == "all":
            benchmark_training(options, scratch, ["step", "loop", "views"])
            benchmark_resume(options, scratch)
        if options.what in ("extraction", "all"):
            benchmark_archives(options, scratch)
    return 0


def benchmark_archives(options: argparse.Namespace, scratch: Path) -> None:
    """Run the extraction benchmark on the user's folder, or on phantoms of 16 and 8 bits."""
    cv2.setNumThreads(1)
    if options.data_dir:
        paths = image_files.find_images(options.data_dir)
        benchmark_extraction(paths, options.data_dir, options.repeats, scratch)
        return
    for bits in (16, 8):
        folder = scratch / f"{bits}"
        folder.mkdir()
        paths = write_phantoms(folder, options.images, bits)
        benchmark_extraction(paths, f"phantoms, {bits} bit", options.repeats, scratch)


if __name__ == "__main__":
    sys.exit(main())
