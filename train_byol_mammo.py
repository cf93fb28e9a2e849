#!/usr/bin/env python3
"""BYOL Mammo: self-supervised pre-training on mammograms, from image files to a ResNet backbone.

Each mammogram is segmented, cut into 512 px tiles that hold tissue and fine detail, and cached once.
BYOL then learns from two medically safe views of every tile: full bit depth, one resample per view.

    python train_byol_mammo.py --data_dir split_images/training          # one GPU, or the CPU
    python train_byol_mammo.py --backbone resnet18 --weights none --view_size 128 --epochs 3
    torchrun --nproc_per_node 4 train_byol_mammo.py --data_dir ...       # four GPUs, or submit_byol.sh
    python train_byol_mammo.py --extract_only --qc_pages                 # the tiles alone, to look at
    python train_byol_mammo.py --report runs/byol_resnet50               # write its report.html again
    python train_byol_mammo.py --help                                    # every setting, one line each

Contents
    1 Configuration    constants, Config, flags
    2 Image            files, bit depth, polarity
    3 Breast mask      padding, labels, skin line, pectoral muscle
    4 Tiles            grid, frequency energy, acceptance
    5 Pixel cache      parallel extraction, one memory-mapped array, tiles as an index into it
    6 Views            random homographies and photometry, one bilinear gather
    7 Model            backbone, BYOL heads, classification head
    8 Objective        BYOL's loss, frequency target, optimisers, learning rate
    9 Checkpoint       atomic writes, resume, backbone export
    10 Monitoring      collapse, progress, metrics.csv, wandb, pictures, report.html
    11 Training        processes, the step, the epoch, the run
    12 Entry           main

Method: Grill et al. 2020, "Bootstrap your own latent" (arXiv:2006.07733), with lightly's heads and loss.
Deviations: AdamW instead of LARS (batches of tens, not thousands); rotations of a whole tile instead of
random crops, no hue and no solarisation (grey values carry the diagnosis). Research use only; not for
clinical decisions.
"""

from __future__ import annotations

import argparse
import base64
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
import html
import io
import json
import math
import multiprocessing
import netrc
import operator
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from kornia_rs import io as kornia_io
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from byol_mammo import settings

# ---- 1 Configuration ------------------------------------------------------------------------------
# Each constant is a field of Config and a flag of the same lower-case name; its comment is the help.

DATA_DIR = "./split_images/training"  # folder of mammograms (PNG, TIFF, JPEG), sub-folders included
OUTPUT_DIR = "./runs"  # a run writes its checkpoints and pictures to OUTPUT_DIR/RUN_NAME
RUN_NAME = ""  # sub-folder of the run; empty = byol_<backbone>
CACHE_DIR = "./cache"  # pixel cache, one sub-folder for each set of images and tile settings
TILE_SIZE = 512  # px, side of a tile
TILE_STRIDE = 256  # px between tiles; half a tile shows every lesion whole at least once
MIN_BREAST_RATIO = 0.15  # share of a tile that must be breast; 0 = off
MIN_FREQ_ENERGY = 0.03  # speck energy a tile must reach (see frequency_energy); 0 = off
HIGH_FREQ_ENERGY = 0.042  # tiles from here on need no intensity and no non-empty share; 0 = off
MIN_TILE_INTENSITY = 40  # mean of a tile's breast pixels, 0-255 scale at any bit depth; 0 = off
MIN_NON_ZERO_PIXELS = 0.7  # share of a tile's breast pixels that must not be empty; 0 = off
EXCLUDE_PECTORAL = True  # breast_ratio counts tissue without the pectoral muscle
PIXEL_SPACING_MM = 0.085  # mm per pixel where the manifest gives no spacing (VinDr-Mammo: 0.085)
MAX_TILES = 0  # tiles in the cache, those of highest energy, spread over images; 0 = all
TILES_PER_EPOCH = 11_000  # tiles drawn per epoch, spread over images; 0 = all
QC_PAGES = False  # a picture of each image (row of rejections.csv) into the run's qc folder
EXTRACT_ONLY = False  # end once the pixel cache and the QC pages are there, before a GPU is taken
NUM_WORKERS = 16  # extraction processes; never more than the cores there are
VIEW_SIZE = 0  # px, side of a view; 0 = the tile size
BACKBONE = "resnet50"  # resnet18, resnet34 or resnet50 (torchvision)
WEIGHTS = "imagenet"  # imagenet, none, or the path of a checkpoint or state dict
INPUT_DIM = 2048  # backbone features; follows the backbone (512 for resnet18 and resnet34)
HIDDEN_DIM = 4096  # hidden units of the projection and prediction heads
PROJ_DIM = 256  # output of the projection and prediction heads
MOMENTUM_BASE = 0.996  # target network momentum at the first step, rising to 1 by a cosine
BATCH_SIZE = 32  # tiles per step and process (GPU)
EPOCHS = 100  # passes over TILES_PER_EPOCH tiles
MAX_STEPS = 0  # stop after this many steps, schedules unchanged; 0 = off
LR = 2e-3  # peak learning rate at a global batch of 32; grows with its square root (lars: linearly)
OPTIMIZER = "adamw"  # adamw, or lars for batches of thousands (--lr 0.025 --weight_decay 1.5e-6)
WARMUP_EPOCHS = 10  # epochs of linear warm-up, at most half the run
WEIGHT_DECAY = 1e-4  # weight decay; biases and normalisation parameters are exempt
MONITOR_TILES = 256  # tiles kept out of training to watch for collapse, at most a tenth of all
FREQ_LOSS_WEIGHT = 0.0  # weight of the frequency target (see Objective); 0 = plain BYOL
LABELS = ""  # labels.csv for the online probe, which then chooses the best checkpoint; empty = off
PROBE_EVERY = 1  # epochs between online probes
CHECKPOINT_EVERY = 10  # epochs between numbered checkpoints; 0 = off
SAVE_EVERY = 10.0  # minutes between writes of last.pth, which signals and the end write too
LOG_EVERY = 10  # steps between rows of metrics.csv
PROGRESS = "auto"  # auto, bar, lines or none; auto = a bar on a terminal, else a line a minute
REPORT_EVERY = 5.0  # minutes between updates of pictures and report.html; 0 = none of them
REPORT = ""  # folder of a run whose report.html is written again, without training; empty = train
SEED = 0  # every random choice follows from it
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
PRECISION = "auto"  # auto, fp32, bf16 or fp16; auto = bf16 where the hardware has it, else fp16 or fp32
COMPILE = True  # torch.compile on CUDA
GRAD_CHECKPOINT = False  # compute activations twice: half the memory, a third more time, no compile
DETERMINISTIC = False  # bit-equal runs on CUDA too, slower; the CPU is bit-equal anyway
ON_COLLAPSE = "warn"  # warn or stop, when an epoch ends with all tiles looking alike
RESUME = True  # go on where a run of this name stopped; otherwise it is moved aside
WANDB_MODE = "auto"  # auto, online, offline or disabled; auto = online only when logged in
WANDB_PROJECT = "byol-mammo"  # wandb project

CHOICES = {
    "backbone": ("resnet18", "resnet34", "resnet50"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "optimizer": ("adamw", "lars"),
    "on_collapse": ("warn", "stop"),
    "progress": ("auto", "bar", "lines", "none"),
    "wandb_mode": ("auto", "online", "offline", "disabled"),
}
LR_BATCH = 32  # batch size at which LR is meant
# Settings that may differ between a run and its resumption: they don't change the weights.
FREE_ON_RESUME = (
    "output_dir run_name cache_dir data_dir qc_pages extract_only num_workers max_steps save_every "
    "log_every device compile grad_checkpoint deterministic on_collapse resume wandb_mode wandb_project "
    "checkpoint_every labels probe_every progress report_every report"
).split()  # fmt: skip


class MammoError(Exception):
    """An error that the user can mend; the message says what, where and how."""


@dataclass(frozen=True)
class Config:
    """All settings of a run. Defaults are the constants above, flags have the fields' names."""

    data_dir: str = DATA_DIR
    output_dir: str = OUTPUT_DIR
    run_name: str = RUN_NAME
    cache_dir: str = CACHE_DIR
    tile_size: int = TILE_SIZE
    tile_stride: int = TILE_STRIDE
    min_breast_ratio: float = MIN_BREAST_RATIO
    min_freq_energy: float = MIN_FREQ_ENERGY
    high_freq_energy: float = HIGH_FREQ_ENERGY
    min_tile_intensity: float = MIN_TILE_INTENSITY
    min_non_zero_pixels: float = MIN_NON_ZERO_PIXELS
    exclude_pectoral: bool = EXCLUDE_PECTORAL
    pixel_spacing_mm: float = PIXEL_SPACING_MM
    max_tiles: int = MAX_TILES
    tiles_per_epoch: int = TILES_PER_EPOCH
    qc_pages: bool = QC_PAGES
    extract_only: bool = EXTRACT_ONLY
    num_workers: int = NUM_WORKERS
    view_size: int = VIEW_SIZE
    backbone: str = BACKBONE
    weights: str = WEIGHTS
    input_dim: int = INPUT_DIM
    hidden_dim: int = HIDDEN_DIM
    proj_dim: int = PROJ_DIM
    momentum_base: float = MOMENTUM_BASE
    batch_size: int = BATCH_SIZE
    epochs: int = EPOCHS
    max_steps: int = MAX_STEPS
    lr: float = LR
    optimizer: str = OPTIMIZER
    warmup_epochs: int = WARMUP_EPOCHS
    weight_decay: float = WEIGHT_DECAY
    monitor_tiles: int = MONITOR_TILES
    freq_loss_weight: float = FREQ_LOSS_WEIGHT
    labels: str = LABELS
    probe_every: int = PROBE_EVERY
    checkpoint_every: int = CHECKPOINT_EVERY
    save_every: float = SAVE_EVERY
    log_every: int = LOG_EVERY
    progress: str = PROGRESS
    report_every: float = REPORT_EVERY
    report: str = REPORT
    seed: int = SEED
    device: str = DEVICE
    precision: str = PRECISION
    compile: bool = COMPILE
    grad_checkpoint: bool = GRAD_CHECKPOINT
    deterministic: bool = DETERMINISTIC
    on_collapse: str = ON_COLLAPSE
    resume: bool = RESUME
    wandb_mode: str = WANDB_MODE
    wandb_project: str = WANDB_PROJECT

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise MammoError(f"--{name} {value}: choose one of {', '.join(choices)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise MammoError(f"--{name} {value}: must lie between {low:g} and {high:g}")

    @property
    def view_side(self) -> int:
        """Side of a view in px."""
        return self.view_size or self.tile_size

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir) / (self.run_name or f"byol_{self.backbone}")


# Bounds that protect from settings which cannot work; batch norm needs two tiles.
RANGES: dict[str, tuple[float, float]] = {
    "tile_size": (32, 8192),
    "tile_stride": (8, 8192),
    "min_breast_ratio": (0, 1),
    "min_freq_energy": (0, math.inf),
    "high_freq_energy": (0, math.inf),
    "min_tile_intensity": (0, 255),
    "min_non_zero_pixels": (0, 1),
    "pixel_spacing_mm": (0.005, 2),
    "max_tiles": (0, math.inf),
    "tiles_per_epoch": (0, math.inf),
    "num_workers": (0, 4096),
    "view_size": (0, 8192),
    "input_dim": (1, 65536),
    "hidden_dim": (1, 65536),
    "proj_dim": (2, 65536),
    "momentum_base": (0, 1),
    "batch_size": (2, 65536),
    "epochs": (1, 1_000_000),
    "max_steps": (0, math.inf),
    "lr": (0, 100),
    "warmup_epochs": (0, math.inf),
    "weight_decay": (0, 10),
    "monitor_tiles": (2, 65536),
    "freq_loss_weight": (0, 1000),
    "probe_every": (1, math.inf),
    "checkpoint_every": (0, math.inf),
    "save_every": (0, math.inf),
    "log_every": (1, math.inf),
    "report_every": (0, math.inf),
    "seed": (0, 2**63 - 1),
}


def setting_help(script: str = __file__) -> dict[str, str]:
    """The one-line comment of each constant of a script, by lower-case name."""
    source = Path(script).read_text(encoding="utf-8")
    found = re.findall(r"^([A-Z][A-Z_]+) = [^#\n]+  # (.+)$", source, flags=re.MULTILINE)
    return {name.lower(): comment for name, comment in found}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise MammoError(f"{message} (see --help)")


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Turn flags into a Config; `--tile-size` equals `--tile_size`. Raises MammoError on a typo."""
    return Config(**parse_fields(Config, make_parser(__doc__), setting_help(), argv))


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that raises MammoError; its description is the docstring up to the contents."""
    form = argparse.RawDescriptionHelpFormatter
    return _Parser(
        description=(doc or "").split("Contents")[0], formatter_class=form, allow_abbrev=False
    )


def parse_fields(
    settings: Any, parser: argparse.ArgumentParser, comments: dict[str, str], argv: Sequence[str] | None
) -> dict[str, Any]:
    """Values by name: the fields of the dataclass `settings` as flags, and what else the parser knows.

    `comments` are the flags' help (see setting_help). Raises MammoError on a typo.
    """
    for field in dataclasses.fields(settings):
        text = f"{comments[field.name]} (default: {field.default!r})".replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true", help=text)
            parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false")
            parser.set_defaults(**{field.name: field.default})
        else:
            kind = {"int": int, "float": float, "str": str}[str(field.type)]
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    words = sys.argv[1:] if argv is None else argv
    words = [
        re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words
    ]
    namespace, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        raise MammoError(f"unknown argument {unknown[0]}{hint}")
    return vars(namespace)


# ---- 2 Image ---------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".pgm")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
MAX_SAMPLES = 150_000_000  # pixels times channels of the largest image read; most have 10-30 million


class ImageReadError(MammoError):
    """An image that can't be used; names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


def find_images(data_dir: str | Path) -> list[Path]:
    """All images under a folder, in linked ones too, sorted. Raises MammoError where there is none.

    Links that lead nowhere are among them: they are skipped by name later, not lost in silence.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise MammoError(f"{root}: no such folder; give --data_dir, or lay it out by prepare_dataset.py")
    found: list[Path] = []
    entered: set[str] = set()  # links may lead in circles, or to a folder that is here by its own name
    folders, linked = [root], []
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) not in entered:
            entered.add(os.path.realpath(folder))
            with suppress(PermissionError):  # as lost+found; any other failure must not lose images
                for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                    if entry.is_symlink() and os.path.isdir(entry):
                        linked.append(Path(entry))
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry))
                    else:
                        found.append(Path(entry))
        if not folders:
            folders, linked = linked, []
    paths = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        hint = "; prepare_dataset.py makes PNG of DICOM" if found else ""
        raise MammoError(f"{root}: no image with {', '.join(IMAGE_SUFFIXES)} in it{hint}")
    return paths


def read_mammogram(path: str | Path) -> np.ndarray:
    """Read a mammogram: (H, W) uint8 or uint16 at full bit depth, breast bright on dark, not clipped.

    Grey stored as RGB loses its copies, an alpha channel is dropped, MONOCHROME1-like images are
    inverted within their bit depth. Raises ImageReadError naming file and reason.
    """
    return read_with_overview(path)[0]


def read_with_overview(path: str | Path) -> tuple[np.ndarray, Overview]:
    """read_mammogram, and the reduced copy that polarity was judged by."""
    image = decode(path)
    view = overview(image)
    if air_is_bright(view):
        image = (2 ** bit_depth(image, view.brightest) - 1) - image
        view = overview(image)
    return image, view


def decode(path: str | Path) -> np.ndarray:
    """The grey levels of an image file as they are: (H, W) uint8 or uint16. Raises ImageReadError."""
    if not Path(path).is_file():
        raise ImageReadError(path, "no such file" if not Path(path).exists() else "not a file")
    if (samples := declared_samples(path)) > MAX_SAMPLES:
        raise ImageReadError(path, f"declares {samples:,} values, more than a mammogram has")
    data = Path(path).read_bytes()  # cv2.imread would crash at a name that is not UTF-8
    try:
        image = decode_grey_png(data)
        if image is None:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:  # no memory for its pixels, for one
        raise ImageReadError(path, f"can't be decoded ({error.err})") from error
    if image is None:
        raise ImageReadError(path, "can't be decoded: damaged, or not an image")
    if image.dtype not in (np.uint8, np.uint16):
        raise ImageReadError(path, f"{image.dtype} pixels; convert to 8 or 16 bits")
    if image.ndim == 3:
        image = _grey(image)
    if min(image.shape) < 2:
        raise ImageReadError(path, f"only {image.shape[1]} x {image.shape[0]} px")
    return image


def decode_grey_png(data: bytes) -> np.ndarray | None:
    """A whole PNG of 8 or 16 bits of grey as (H, W), else None; 1.5 to 1.8 times as fast as OpenCV."""
    if not data.endswith(PNG_END):
        return None
    decoders = {8: kornia_io.decode_image_png_u8, 16: kornia_io.decode_image_png_u16}
    try:
        width, height, bits, *kind = struct.unpack_from(">2I5B", data, 16)  # IHDR (PNG 1.2, 4.1.1)
        if any(kind) or bits not in decoders:  # colour, or interlaced
            return None
        return decoders[bits](data, (height, width), "mono")[..., 0]
    except Exception:  # damaged: it raises no class of its own, and OpenCV has the last word
        return None


def declared_samples(path: str | Path) -> int:
    """Pixels times channels by a file's header, read before any pixel. Raises ImageReadError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images and of odd tags
            with Image.open(path, formats=("PNG", "TIFF", "JPEG", "PPM")) as image:
                channels = 3 if image.mode == "P" else len(image.getbands())
                return image.width * image.height * channels
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit, which it names
        raise ImageReadError(path, f"declares more values than a mammogram has: {error}") from error
    except OSError as error:
        if error.errno:
            raise ImageReadError(path, f"can't be read: {error.strerror}") from error
        with open(path, "rb") as file:
            dicom = file.read(132).endswith(b"DICM")  # after a preamble of 128 bytes (PS3.10, 7.1)
        reason = "DICOM; prepare_dataset.py makes PNG of it" if dicom else "damaged, or not an image"
        raise ImageReadError(path, f"can't be decoded: {reason}") from error
    except Exception as error:  # Pillow raises almost anything on damaged headers
        raise ImageReadError(path, "can't be decoded: its header is damaged") from error


def _grey(image: np.ndarray) -> np.ndarray:
    """One channel of (H, W, C): the first where the colours are copies, their luma otherwise."""
    if image.shape[2] < 3 or (
        np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
    ):
        return np.ascontiguousarray(image[..., 0])
    return cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_BGR2GRAY)


def bit_depth(image: np.ndarray, brightest: int | None = None) -> int:
    """8, or the least of 10, 12, 14 and 16 bits that holds the largest value, `brightest` if known."""
    if image.dtype == np.uint8:
        return 8
    brightest = int(image.max()) if brightest is None else brightest
    return next(bits for bits in (10, 12, 14, 16) if brightest < 2**bits)


# ---- 3 Breast mask ---------------------------------------------------------------------------------
# Levels of rejection: padding, frames and strips along the sides, then the air's grey level, then
# components, then the skin line. Most work on a reduced copy: a skin line is smooth over millimetres.

SEGMENT_SIDE = 560  # px, longest side of the reduced copy
FLAT_SPAN = 0.004  # share of the grey range within which a border row or column counts as constant
STRIP_DEPTH = 0.1  # share of the image within which a bright strip along a side ends
STRIP_STEP = 0.12  # share of the grey range by which it is brighter than what it borders on
# Where the skin line is sought, share of the way from air to the breast's median: digital, probe, film.
SKIN_LEVELS = (0.02, 0.11, 0.08)
FILM_SKIN = 0.16  # grey of the skin line on film, at least, as a share of the breast's median
OPENING = 9  # px of the reduced copy, diameter of what is cut off as a bridge
LABEL_SIZE = 24  # px of the reduced copy, 13-17 mm: height of the largest label that is cut off the skin
LABEL_GAP = 11  # px of the reduced copy, between the letters of a label
LABEL_PERCENTILES = (98, 99.5)  # of the breast: thin strokes of a label are brighter than the first
UNEVEN_AIR = 0.02  # noise of air above which it may be fat, share of the way to the breast's median
FAT_ROUGHNESS = 0.04  # what grey differs by within 3 px of fat, share of the way from air to the median
MIN_SMOOTH_AIR = 0.005  # share of the image below which what is smoother than fat is no air
MIN_BREAST_AREA = 0.03  # share of the image below which a component is a label, not a breast


@dataclass(frozen=True)
class Overview:
    """A mammogram without its padding, averaged to few pixels: what polarity and masks are found on."""

    area: np.ndarray  # (h, w) float32 block means
    box: tuple[slice, slice]  # rows and columns of the image that hold the content
    factor: int  # side of a block in px of the image
    shape: tuple[int, int]  # of the image
    brightest: int  # grey level in the image

    def enlarged(self, mask: np.ndarray) -> np.ndarray:
        """A bool mask of `area` at the image's shape (H, W), its border interpolated."""
        full = np.zeros(self.shape, bool)
        left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
        if not width:
            return full
        # One block more on each side, where the border is interpolated.
        rows = slice(max(0, top - 1), min(mask.shape[0], top + height + 1))
        cols = slice(max(0, left - 1), min(mask.shape[1], left + width + 1))
        part = mask[rows, cols].view(np.uint8) * np.uint8(255)
        size = (part.shape[1] * self.factor, part.shape[0] * self.factor)
        grown = cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
        # Rows and columns that made no whole block follow their neighbours.
        inner = full[self.box]
        y1 = inner.shape[0] if rows.stop == mask.shape[0] else rows.stop * self.factor
        x1 = inner.shape[1] if cols.stop == mask.shape[1] else cols.stop * self.factor
        target = inner[rows.start * self.factor : y1, cols.start * self.factor : x1]
        if grown.shape != target.shape:
            rest = (0, target.shape[0] - size[1], 0, target.shape[1] - size[0])
            grown = cv2.copyMakeBorder(grown, *rest, cv2.BORDER_REPLICATE)
        np.greater(grown, 127, out=target)
        return full


def overview(image: np.ndarray) -> Overview:
    """Reduce an image (H, W) uint8 or uint16 so that its long side is at most SEGMENT_SIDE px."""
    darkest, brightest = (int(level) for level in cv2.minMaxLoc(image)[:2])
    box = content_box(image, darkest, brightest)
    longest = max(1, *image[box].shape)
    factor = 2 ** max(0, math.ceil(math.log2(longest / SEGMENT_SIDE)))
    area = block_means(image[box], factor)

    def pixels(side: slice, blocks: slice, count: int) -> slice:
        stop = side.stop if blocks.stop == count else side.start + blocks.stop * factor
        return slice(side.start + blocks.start * factor, stop)

    for width_of in (dark_padding, bright_strip):
        inner = inner_part(area, width_of)
        box = pixels(box[0], inner[0], area.shape[0]), pixels(box[1], inner[1], area.shape[1])
        area = area[inner]
    return Overview(np.ascontiguousarray(area), box, factor, image.shape, brightest)


def block_means(image: np.ndarray, factor: int) -> np.ndarray:
    """Float32 means of blocks of factor x factor px, a power of two; rows and columns left over go.

    Halving is the fast path of cv2.resize. Whole grey levels get 8 fractional bits after the first
    halving, so that 8-bit images keep their averages.
    """
    height, width = (length // factor * factor for length in image.shape)
    image = image[:height, :width]
    scale = 1
    while factor > 1 and image.size:
        image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        if image.dtype == np.uint8:
            image, scale = image.astype(np.uint16) << 8, 256
        factor //= 2
    return image.astype(np.float32) / np.float32(scale)


def content_box(image: np.ndarray, darkest: int, brightest: int) -> tuple[slice, slice]:
    """Rows and columns left when border lines of one grey brighter than air (padding, frames) go."""
    tolerance = FLAT_SPAN * (brightest - darkest)

    def is_padding(line: np.ndarray) -> bool:
        low, high = int(line.min()), int(line.max())
        return high - low <= tolerance < low - darkest

    top, bottom, left, right = 0, image.shape[0], 0, image.shape[1]
    peeling = True
    while peeling and top < bottom and left < right:
        area = image[top:bottom, left:right]
        peel = [is_padding(line) for line in (area[0], area[-1], area[:, 0], area[:, -1])]
        top, bottom, left, right = top + peel[0], bottom - peel[1], left + peel[2], right - peel[3]
        peeling = any(peel)
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def inner_part(area: np.ndarray, width_of: Callable[[np.ndarray], int]) -> tuple[slice, slice]:
    """Rows and columns of a reduced image left when as many lines go on each side as `width_of` says.

    All of them where fewer than 16 were left.
    """
    height, width = area.shape
    if min(area.shape) >= 16:
        inwards = (area, area[::-1], area.T, area.T[::-1])
        top, bottom, left, right = (width_of(lines) for lines in inwards)
        if min(height - top - bottom, width - left - right) >= 16:
            return slice(top, height - bottom), slice(left, width - right)
    return slice(0, height), slice(0, width)


def dark_padding(lines: np.ndarray) -> int:
    """How many of the first lines of a reduced image are padding of its darkest grey level.

    Film, or a breast that the border cut off, ends there in a straight line; at the skin air begins.
    """
    filled = lines > lines.min() + FLAT_SPAN * np.ptp(lines)
    first = int(filled.any(1).argmax())
    straight = first > 0 and filled[first, filled.any(0)].mean() > 0.5
    return first + 1 if straight else 0  # padding and image share a line of blocks


def bright_strip(lines: np.ndarray) -> int:
    """How many of the first lines of a reduced image belong to a bright strip along that side.

    Film edges, tape and noisy frames end in a step along the whole side. Tissue that the border cuts
    off doesn't, nor does the air beside it: the darker half of the inner line tells.
    """
    span = np.ptp(lines)
    border = np.sort(lines[0])
    if not span or border[len(border) // 4] < lines.min() + STRIP_STEP * span:
        return 0  # air, as along most sides

    def steps_down(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
        darker = np.argsort(inner, axis=1)[:, : inner.shape[1] // 2]
        return np.median(np.take_along_axis(outer - inner, darker, axis=1), axis=1) / span

    depth = math.ceil(STRIP_DEPTH * len(lines))
    ends = np.flatnonzero(steps_down(lines[:depth], lines[2 : depth + 2]) > STRIP_STEP)
    if not len(ends):
        return 0
    # The next line goes as well where strip and image share its blocks.
    width = int(ends[-1]) + 1
    shared = steps_down(lines[width : width + 1], lines[width + 1 : width + 2])[0] > STRIP_STEP / 10
    return width + int(shared)


def air_is_bright(view: Overview) -> bool:
    """Whether the image is MONOCHROME1-like: its brightest fifth is smoother than its darkest.

    Air is smooth and lies along the border, tissue is neither; a saturated implant is smooth too, so
    the border decides where both ends are equally smooth.
    """
    inner = inner_part(-view.area, bright_strip)  # those of a negative are dark
    area = view.area[inner]
    if min(area.shape) < 16:
        return False
    spans = [np.ptp(area, axis=axis) > FLAT_SPAN * np.ptp(area) for axis in (1, 0)]
    area = area[np.ix_(*spans)]  # without rows and columns of air alone
    if min(area.shape) < 16:
        return False
    gradient = cv2.morphologyEx(area, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    border = np.ones(area.shape, bool)
    border[2:-2, 2:-2] = False
    low, high = np.percentile(area, (20, 80))
    dark, bright = area <= low, area >= high
    roughness = np.median(gradient[bright]), np.median(gradient[dark])
    on_border = bright[border].mean(), dark[border].mean()
    if on_border[0] < 0.1:
        return False
    return bool(
        roughness[0] < roughness[1] or (roughness[0] == roughness[1] and on_border[0] > on_border[1])
    )


def largest_component(binary: np.ndarray) -> np.ndarray:
    """The largest 8-connected component of a (H, W) bool array; all False where there is none."""
    count, labels = cv2.connectedComponents(binary.view(np.uint8))
    if count <= 2:  # the background and at most one more
        return binary
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def grey_levels(area: np.ndarray) -> tuple[float, float, float] | None:
    """Air, its noise, and the median of the breast in a smoothed reduced image without padding.

    The lowest of three Otsu classes holds air and its fog (Liao et al. 2001); the air proper is what of
    it lies away from the largest bright component. None where nothing is coherent, as in noise.
    """
    from skimage.filters import threshold_multiotsu  # here: a run that finds its cache starts sooner

    try:
        lower = float(threshold_multiotsu(area, classes=3)[0])
    except ValueError:  # fewer than three grey levels
        return None
    dark = area <= lower
    if coherent(dark).sum() < 0.2 * dark.sum():
        return None
    core = largest_component(~dark)
    reach = max(3, max(area.shape) // 20) | 1
    near = cv2.dilate(core.astype(np.uint8), np.ones((reach, reach), np.uint8)) > 0
    air = dark & ~near
    if air.mean() < 0.002:
        air = area <= np.percentile(area, 2)
    level, noise = median_and_spread(area[air])
    tissue = float(np.median(area[core]))
    levels, contrast = (level, noise, tissue), tissue - level
    if noise <= UNEVEN_AIR * contrast:
        return levels
    return levels_amid_fat(area, dark, FAT_ROUGHNESS * contrast) or levels


def levels_amid_fat(
    area: np.ndarray, dark: np.ndarray, roughness: float
) -> tuple[float, float, float] | None:
    """grey_levels where the breast nearly fills the image and its `dark` part is mostly fat, else None.

    Fat is rough, air is smooth; without any smooth part all is breast, and air far below it. Fog is
    smooth too: on film most of the dark part is, and what is darker than fog is a frame. Noise is rough
    pixel by pixel, fat is so in its shapes.
    """
    kernel = np.ones((3, 3), np.uint8)
    shapes = cv2.morphologyEx(cv2.GaussianBlur(area, (0, 0), 4), cv2.MORPH_GRADIENT, kernel)
    grain = median_and_spread((area - cv2.GaussianBlur(area, (0, 0), 1.5))[dark])[1]
    if np.median(shapes[dark]) < grain:
        return None
    smooth = coherent(dark & (cv2.morphologyEx(area, cv2.MORPH_GRADIENT, kernel) < roughness))
    if smooth.mean() < MIN_SMOOTH_AIR:
        tissue = float(np.median(area))
        return 2 * float(area.min()) - tissue, 0.0, tissue
    on_border = smooth[[0, -1]].any() or smooth[:, [0, -1]].any()
    if smooth.sum() > dark.sum() / 2 or not on_border:
        return None
    return *median_and_spread(area[smooth]), float(np.median(area[~smooth]))


def median_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Median, and the standard deviation of a normal distribution of the same absolute deviations."""
    centre = float(np.median(values))
    return centre, 1.4826 * float(np.median(np.abs(values - centre)))


def coherent(binary: np.ndarray) -> np.ndarray:
    """What of a (H, W) bool array a disc of OPENING px can cover."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (OPENING, OPENING))
    return cv2.morphologyEx(binary.view(np.uint8), cv2.MORPH_OPEN, disc) > 0


def breast_above(area: np.ndarray, smooth: np.ndarray, level: float) -> np.ndarray:
    """The breast in a reduced image and its smoothed copy: the largest component above a grey level.

    Opening cuts labels and tape that touch the breast by a thin bridge. Where the image side cuts the
    breast off, dark fat may be open to that side: it is closed there before holes are filled. Noise
    is smoothed away first; the rim that smoothing has pushed outwards is trimmed at the end.
    """
    breast = closed_at_chest(largest_component(smooth > level))
    pad = OPENING + 1
    padded = cv2.copyMakeBorder(breast.view(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    opened = coherent(padded.view(bool))[pad:-pad, pad:-pad]
    breast = closed_at_chest(largest_component(opened))
    inner = cv2.erode(breast.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1) > 0
    trimmed = (inner | (breast & (area > level))).astype(np.uint8)
    return largest_component(cv2.morphologyEx(trimmed, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0)


def closed_at_chest(breast: np.ndarray) -> np.ndarray:
    """The mask without holes, those included that are open to the side that cuts the breast off."""
    breast = breast.copy()
    side = chest_side(breast)
    rows = np.flatnonzero(breast[:, side])
    if len(rows):
        breast[rows[0] : rows[-1] + 1, side] = True
    contours, _ = cv2.findContours(breast.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(breast.shape, np.uint8), contours, -1, 1, cv2.FILLED) > 0


def segment_breast_tissue(image: np.ndarray) -> np.ndarray:
    """Breast mask of a mammogram (H, W) uint8 or uint16, bright on dark: (H, W) bool, one component.

    Includes skin line, fat and pectoral muscle; excludes air, labels, markers, tape, frame, padding.
    All False where there is no breast (empty, constant or noise).
    """
    view = overview(image)
    return view.enlarged(find_breast(view))


def find_breast(view: Overview) -> np.ndarray:
    """segment_breast_tissue on the reduced copy: (h, w) bool."""
    area = view.area
    if min(area.shape) < 16:
        return np.zeros(area.shape, bool)
    smooth = cv2.GaussianBlur(area, (0, 0), 1)
    levels = grey_levels(smooth)
    if levels is None:
        return np.zeros(area.shape, bool)
    air, noise, tissue = levels
    digital, probe, film = (air + share * (tissue - air) for share in SKIN_LEVELS)
    breast = breast_above(area, smooth, digital + 2 * noise)
    # Digital skin ends in a step: going down to just above air gains hardly any area and keeps thin
    # skin. Film fades into the glow of scattered light, out of which the skin comes some way up.
    if extent(breast) > 1.02 * extent(breast_above(area, smooth, probe + 2 * noise)):
        breast = breast_above(area, smooth, max(film + noise, FILM_SKIN * tissue))
    if breast.mean() < MIN_BREAST_AREA:
        return np.zeros(area.shape, bool)
    return without_labels(breast, area)


def without_labels(breast: np.ndarray, area: np.ndarray) -> np.ndarray:
    """A breast mask without the labels and markers that touch the skin, where they cover it too.

    What a large disc can't reach sticks out of the breast: nipple, folds, labels. The last are the
    brightest thing in the image, skin is among the darkest. Their rims share blocks of the reduced
    copy with what lies beside them; those blocks go as well.
    """
    pad = LABEL_SIZE
    padded = cv2.copyMakeBorder(breast.view(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    core = cv2.distanceTransform(padded, cv2.DIST_L2, 5) > LABEL_SIZE / 2
    reach = cv2.distanceTransform((~core).view(np.uint8), cv2.DIST_L2, 5)
    body = (reach <= LABEL_SIZE / 2)[pad:-pad, pad:-pad]
    if not body.any():
        return body
    outside = breast & ~body
    faint, bright = (area > level for level in np.percentile(area[body], LABEL_PERCENTILES))
    rim = cv2.dilate((bright & ~breast).view(np.uint8), np.ones((3, 3), np.uint8)) > 0
    seeds = cv2.connectedComponents(outside.view(np.uint8))[1]
    labels = np.unique(seeds[outside & bright])
    if not labels.size:
        return largest_component(breast & ~rim)
    sticking = np.isin(seeds, labels)
    # Letters lie apart: closing joins them, and with them those that lie over the breast.
    gap = np.ones((LABEL_GAP, LABEL_GAP), np.uint8)
    joined = cv2.morphologyEx((bright | sticking).view(np.uint8), cv2.MORPH_CLOSE, gap)
    near = cv2.dilate(sticking.view(np.uint8), np.ones((2 * LABEL_SIZE + 1,) * 2, np.uint8))
    parts = cv2.connectedComponents(cv2.bitwise_and(joined, near))[1]
    found = np.isin(parts, np.unique(parts[sticking])) & (bright | sticking)
    strokes = cv2.connectedComponents(faint.view(np.uint8) & near)[1]
    found |= np.isin(strokes, np.unique(strokes[found & (strokes > 0)]))
    label = cv2.dilate(found.view(np.uint8), np.ones((9, 9), np.uint8)) > 0
    return largest_component(breast & ~rim & ~label)


def chest_side(breast: np.ndarray) -> int:
    """Column index (0 or -1) of the side that cuts the breast off."""
    return 0 if breast[:, 0].sum() >= breast[:, -1].sum() else -1


def extent(breast: np.ndarray) -> int:
    """Area in px between the skin and the chest side, row by row, whatever holes there are."""
    away = breast if chest_side(breast) == -1 else breast[:, ::-1]
    return int(np.where(away.any(1), away.shape[1] - away.argmax(1), 0).sum())


MUSCLE_SMOOTHING = 3  # px of the reduced copy, sigma before the border of the muscle is sought
MUSCLE_EDGE_CAP = 0.05  # log grey per px: one strong edge must not outweigh a long weak border
MUSCLE_MIN_EDGE = 0.004  # log grey per px that counts as a border from bright to dark
CLOSE_UP = 0.97  # share of the image that a breast covers where bright tissue in a corner is no muscle
# What tells a muscle from a bright streak of a CC view: border share, brightness, contrast, area.
MUSCLE_MIN_BORDER, MUSCLE_MIN_GREY, MUSCLE_MIN_CONTRAST, MUSCLE_MIN_AREA = 0.70, 0.78, 1.1, 0.04


def segment_pectoral_muscle(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pectoral muscle inside a breast mask: (H, W) uint8 or uint16 and bool -> (H, W) bool.

    The muscle is the bright triangle in the upper corner of the chest side on MLO views; its border is
    the line with the strongest bright-to-dark edge along it (Karssemeijer 1998 fits a line likewise).
    All False where no line is long, bright and contrasted enough, as on CC views.
    """
    view = overview(image)
    breast = block_means(mask[view.box].view(np.uint8) * np.uint8(255), view.factor) > 127
    return view.enlarged(find_muscle(view, breast)) & mask


def find_muscle(view: Overview, breast: np.ndarray) -> np.ndarray:
    """segment_pectoral_muscle on the reduced copy: (h, w) bool."""
    area, nothing = view.area, np.zeros(breast.shape, bool)
    if not breast.any() or breast.mean() >= CLOSE_UP:
        return nothing
    mirrored = chest_side(breast) == -1
    if mirrored:
        area, breast = area[:, ::-1], breast[:, ::-1]
    line = muscle_line(area, breast)
    if line is None:
        return nothing
    height, width = area.shape
    y, x = np.mgrid[:height, :width]
    distance = x / line[0] + y / line[1]
    muscle, beside = breast & (distance < 1), breast & (distance >= 1) & (distance < 1.3)
    grey = np.median(area[muscle])
    if (
        muscle.sum() < MUSCLE_MIN_AREA * breast.sum()
        or grey < MUSCLE_MIN_GREY * np.median(area[breast])
        or grey < MUSCLE_MIN_CONTRAST * np.median(area[beside])
    ):
        return nothing
    return np.ascontiguousarray(muscle[:, ::-1] if mirrored else muscle)


def muscle_line(area: np.ndarray, breast: np.ndarray) -> tuple[float, float] | None:
    """Where the muscle's border meets the top row and the left column (px), chest side left, or None."""
    height, width = area.shape
    if breast[: height // 20 + 1, : width // 20 + 1].mean() < 0.8:
        return None  # the corner is air: a CC view
    grey = np.log(area + 0.1 * np.median(area[breast]))
    grey = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), MUSCLE_SMOOTHING)
    slope_x, slope_y = (cv2.Sobel(grey, cv2.CV_32F, *order) / 8 for order in ((1, 0), (0, 1)))
    share = np.arange(0.15, 1.0, 0.025)
    top, left = (axis.ravel() for axis in np.meshgrid(share * width, share * height))
    large = top * left / 2 >= MUSCLE_MIN_AREA * breast.sum()
    if not large.any():
        return None
    top, left = top[large], left[large]
    along = np.linspace(0.03, 0.97, 40)
    x = (top[:, None] * (1 - along)).astype(np.int32)  # (lines, points)
    y = (left[:, None] * along).astype(np.int32)
    points = y * width + x
    length = np.hypot(top, left)
    normal_x, normal_y = (left / length).astype(np.float32), (top / length).astype(np.float32)
    edge = -(slope_x.take(points) * normal_x[:, None] + slope_y.take(points) * normal_y[:, None])
    inside = breast.ravel().take(points)
    edge *= inside
    score = np.minimum(edge, MUSCLE_EDGE_CAP).mean(1) * (inside.mean(1) > 0.5)
    best = int(score.argmax())
    if (edge[best] > MUSCLE_MIN_EDGE).mean() < MUSCLE_MIN_BORDER:
        return None
    return float(top[best]), float(left[best])


# ---- 4 Tiles ---------------------------------------------------------------------------------------


SPECK_GRID = 0.17  # mm, pixel of the reduced grid on which specks are sought
SPECK_SIGMA = 0.13  # mm, scale of the second derivatives: passes specks of 0.1-1 mm, best 0.35 mm
SPECK_WINDOW = 9.0  # mm, side of the square that sets a peak's scale; wider than a tight group
SPECK_BLOCK = 4  # grid px, side of the blocks on which that scale and the mask's rim are worked out
SPECK_MARGIN = 1.0  # mm, rim of the mask where a peak may be the mask's own edge
SPECK_MIN_STRENGTH = 2.0  # local standard deviations; weaker peaks are noise and left out
GROUP_SIZE = 5  # specks that make a group (ACR BI-RADS 2013: five within 1 cm, spread up to 2 cm)
GROUP_RADIUS = 7.5  # mm, from one speck of a group to the others
GROUP_CANDIDATES = 64  # strongest peaks of a tile that may form groups; bounds the time per tile
ENERGY_PER_STRENGTH = 0.0090  # energy of a group per local deviation; 0.03 is the median of plain tissue

Peaks = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows (px), columns (px), strengths


def curvatures(image: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Weaker and mean curvature of float32 (H, W) at scale sigma (px), positive on a bright spot.

    These are the smaller eigenvalue and half the trace of minus the Hessian. Along a line one
    eigenvalue vanishes, so the smaller one answers to specks and not to vessels, ligaments or the
    skin's edge (Frangi et al. 1998, turned from vessels to blobs).
    """
    smooth = cv2.GaussianBlur(image, (0, 0), sigma)
    one, bend, slope = (np.array(tap) for tap in ([1.0], [1.0, -2.0, 1.0], [-0.5, 0.0, 0.5]))
    xx = cv2.sepFilter2D(smooth, cv2.CV_32F, bend, one)
    yy = cv2.sepFilter2D(smooth, cv2.CV_32F, one, bend)
    xy = cv2.sepFilter2D(smooth, cv2.CV_32F, slope, slope)
    mean = cv2.addWeighted(xx, -0.5, yy, -0.5, 0)
    spread = cv2.magnitude(cv2.addWeighted(xx, 0.5, yy, -0.5, 0), xy)
    return cv2.subtract(mean, spread), mean


def grey_step(image: np.ndarray) -> float:
    """Usual gap between the grey levels in use: 1, or 16 where 12 bits were stretched to 16."""
    rows = image[:: sampling_step(image) ** 2]  # whole rows are read faster than single pixels
    levels = np.flatnonzero(np.bincount(rows.ravel()))
    return float(np.median(np.diff(levels))) if len(levels) > 1 else 1.0


def sampling_step(image: np.ndarray) -> int:
    """Every how many rows and columns are read where some 100,000 px tell as much as all."""
    return max(1, math.isqrt(image.size // 100_000))


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is True; twice as fast as cv2.boundingRect on whole images."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return 0, 0, 0, 0
    cols = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return int(cols[0]), int(rows[0]), int(np.ptp(cols)) + 1, int(np.ptp(rows)) + 1


def speck_grid(
    image: np.ndarray, mask: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Float32 means over factor x factor px of the mask's bounding box, its mask, and its corner (y, x).

    The box starts at a multiple of the factor, so that a tile and its image share one grid. Averages
    are taken in 16 bits, all of them in use: what they lose is below the noise of any detector.
    """
    x0, y0, width, height = bounding_box(mask)
    top, left = y0 // factor * factor, x0 // factor * factor
    size = ((x0 + width - left) // factor, (y0 + height - top) // factor)
    if min(size) == 0:
        return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.uint8), 0, 0
    box = np.s_[top : top + size[1] * factor, left : left + size[0] * factor]
    content = image[box]
    unused = 16 - bit_depth(image[box[0]])  # whole rows are read faster than parts of them
    if unused:
        content = np.left_shift(content, unused, dtype=np.uint16)
    small = cv2.resize(content, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    small *= np.float32(2.0**-unused)
    inside = cv2.resize(mask[box].view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return small, inside, top, left


def speck_peaks(image: np.ndarray, mask: np.ndarray, spacing_mm: float = PIXEL_SPACING_MM) -> Peaks:
    """Rows (px), columns (px) and strengths of the speck-like peaks of uint8 or uint16 (H, W).

    A peak is a local maximum of the weaker curvature inside the mask (H, W) bool. Its strength is
    that curvature over the standard deviation of the mean curvature around it, which cancels gain,
    offset and noise level, and so bit depth, window and vendor. What varies slowly is worked out per
    block of SPECK_BLOCK x SPECK_BLOCK px of the reduced grid.
    """
    factor = max(1, round(SPECK_GRID / spacing_mm))
    sigma = SPECK_SIGMA / (spacing_mm * factor)
    small, inside, top, left = speck_grid(image, mask, factor)
    if not inside.any():
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    weaker, mean = curvatures(small, sigma)
    height, width = (-(-length // SPECK_BLOCK) for length in mean.shape)
    covered, squares = (np.zeros((height * SPECK_BLOCK, width * SPECK_BLOCK), kind) for kind in "Bf")
    filled = np.s_[: mean.shape[0], : mean.shape[1]]
    np.multiply(inside, 255, out=covered[filled])
    cv2.accumulateSquare(mean, squares[filled], inside)
    squares = cv2.resize(squares, (width, height), interpolation=cv2.INTER_AREA)
    covered = cv2.resize(covered, (width, height), interpolation=cv2.INTER_AREA)
    block = spacing_mm * factor * SPECK_BLOCK  # mm
    window = (max(1, round(SPECK_WINDOW / block)),) * 2
    area = cv2.boxFilter(covered, cv2.CV_32F, window) / 255
    variance = cv2.boxFilter(squares, cv2.CV_32F, window) / np.maximum(area, 1e-3)
    rim = np.ones((2 * math.ceil(SPECK_MARGIN / block) + 1,) * 2, np.uint8)
    whole = (covered == 255).view(np.uint8)
    inner = cv2.erode(whole, rim, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    # Rounding to grey levels adds to the variance, more so in 8 bits: that share is taken off again,
    # and the rounding error itself is the floor that keeps 8-bit plateaus from firing.
    rounding = (grey_step(image) / factor) ** 2 / 12
    impulse = np.zeros((31, 31), np.float32)
    impulse[15, 15] = 1
    gain = float((curvatures(impulse, sigma)[1] ** 2).sum())
    deviation = np.sqrt(np.maximum(variance - rounding * gain, rounding))
    least = np.where(inner > 0, SPECK_MIN_STRENGTH * deviation, np.float32(np.inf))
    least = cv2.resize(least, None, fx=SPECK_BLOCK, fy=SPECK_BLOCK, interpolation=cv2.INTER_NEAREST)
    highest = cv2.dilate(weaker, np.ones((5, 5), np.uint8))
    strong = weaker >= least[: weaker.shape[0], : weaker.shape[1]]
    # Several times faster than np.nonzero in two dimensions.
    ys, xs = np.divmod(np.flatnonzero(strong & (weaker == highest)), weaker.shape[1])
    strengths = weaker[ys, xs] / deviation[ys // SPECK_BLOCK, xs // SPECK_BLOCK]
    return ys * factor + top + factor // 2, xs * factor + left + factor // 2, strengths


def energy_of_peaks(peaks: Peaks, spacing_mm: float = PIXEL_SPACING_MM) -> float:
    """Energy of the strongest group among a tile's peaks; formula at frequency_energy."""
    ys, xs, strengths = peaks
    if len(strengths) < GROUP_SIZE:
        return 0.0
    if len(strengths) > GROUP_CANDIDATES:
        strongest = np.argpartition(-strengths, GROUP_CANDIDATES)[:GROUP_CANDIDATES]
        ys, xs, strengths = ys[strongest], xs[strongest], strengths[strongest]
    apart = (ys[:, None] - ys) ** 2 + (xs[:, None] - xs) ** 2
    near = apart <= (GROUP_RADIUS / spacing_mm) ** 2
    weakness = np.where(near, 1 / strengths, np.inf)
    weakness = np.partition(weakness, GROUP_SIZE - 1, axis=1)[:, :GROUP_SIZE]
    return ENERGY_PER_STRENGTH * float((GROUP_SIZE / weakness.sum(axis=1)).max())


def frequency_energy(image: np.ndarray, mask: np.ndarray, spacing_mm: float = PIXEL_SPACING_MM) -> float:
    """How much a tile (H, W) looks as if it held a group of micro-calcifications of 0.1-1 mm.

    With k1 >= k2 the curvatures (minus the Hessian's eigenvalues) of the tile averaged to about
    0.17 mm per pixel and smoothed at 0.13 mm, and q the rounding error of its grey levels there,

        z_i = k2 / sqrt(mean over 9 x 9 mm of ((k1 + k2) / 2)^2 + q^2)     at each peak i of k2
        E = 0.0090 * max_i H5{z_j : peak j lies within 7.5 mm of peak i}

    H5 is the harmonic mean of the five largest. k2 is the band-pass and stops lines. A group of
    five counts however few of the tile's pixels it covers, while one or two glaring pixels make no
    group, as the weakest of the five rules a harmonic mean. Tiles without such a group have 0.
    ENERGY_PER_STRENGTH puts 0.03 at the median of real tissue without a group: half of it goes, and of
    tiles with 5-20 specks of 0.2-0.6 mm at 8-16 local deviations (5-10) 100 % (97 %) stay.
    """
    return energy_of_peaks(speck_peaks(image, mask, spacing_mm), spacing_mm)


@dataclass(frozen=True)
class Criterion:
    """What a tile must fulfil to be kept: a column of score_tiles compared with a setting."""

    column: str
    setting: str  # name of its threshold in Config
    title: str  # in pictures and reports: what is wrong with a tile that fails
    colour: str = "#888888"  # of its mark in pictures
    marker: str = "."
    passes: Callable[[Any, Any], Any] = operator.ge  # (values, threshold); operator.le for "at most"
    rescued: bool = False  # a tile of HIGH_FREQ_ENERGY need not fulfil it


# In the order in which tiles are judged. Scoring, rejection, cache key, tables and pictures follow it.
CRITERIA = (
    Criterion("breast_ratio", "min_breast_ratio", "too little breast", "#999999", "x"),
    Criterion("mean_intensity", "min_tile_intensity", "too dark", "#cc79a7", "v", rescued=True),
    Criterion(
        "non_zero_ratio", "min_non_zero_pixels", "too many empty pixels", "#d55e00", "D", rescued=True
    ),
    Criterion("freq_energy", "min_freq_energy", "too little fine detail", "#f0e442", "+"),
)
COLUMNS = [criterion.column for criterion in CRITERIA]


def tile_positions(length: int, size: int, stride: int) -> np.ndarray:
    """Starts of tiles along an axis of `length` px; the last one ends at the border.

    An axis shorter than a tile has the single position 0.
    """
    last = max(0, length - size)
    return np.unique(np.append(np.arange(0, last, stride), last))


def score_tiles(
    image: np.ndarray,
    mask: np.ndarray,
    config: Config,
    spacing_mm: float | None = None,
    muscle: np.ndarray | None = None,
) -> pd.DataFrame:
    """Score every grid position of an image (H, W) with its breast mask (H, W) bool.

    Columns: x, y (px, upper left corner), and
    breast_ratio      share of the tile that is breast, without muscle if EXCLUDE_PECTORAL
    mean_intensity    mean of the tile's breast pixels in the image's window, 0-255
    non_zero_ratio    share of the tile's breast pixels that are not 0
    freq_energy       see frequency_energy
    rejected_by       the first criterion that the tile fails; '' = kept
    The means are over the breast in the tile, not over the tile: skin edges hold calcifications too,
    and how much of a tile may be air is MIN_BREAST_RATIO's business alone. `muscle` saves a second
    search where it is known already.
    """
    size = config.tile_size
    ys = tile_positions(image.shape[0], size, config.tile_stride)
    xs = tile_positions(image.shape[1], size, config.tile_stride)
    y, x = (axis.ravel() for axis in np.meshgrid(ys, xs, indexing="ij"))
    low, high = intensity_window(image, mask)
    if not config.exclude_pectoral:
        muscle = np.zeros_like(mask)
    elif muscle is None:
        muscle = segment_pectoral_muscle(image, mask)
    spacing_mm = spacing_mm or config.pixel_spacing_mm
    peaks = speck_peaks(image, mask, spacing_mm)

    def layers(band: tuple[slice, slice]) -> tuple[Layer, ...]:
        inside = mask[band].view(np.uint8)
        grey = cv2.copyTo(image[band], inside)
        counted = grey, inside, muscle[band].view(np.uint8)
        return (grey, sum_of_greys), *((part, cv2.countNonZero) for part in counted)

    grey, filled, breast, covered = tile_sums(layers, mask, ys, xs, size)
    breast_or_1 = np.maximum(breast, 1)
    table = pd.DataFrame(
        {
            "x": x,
            "y": y,
            "breast_ratio": (breast - covered) / size**2,
            "mean_intensity": np.clip(255 * (grey / breast_or_1 - low) / (high - low), 0, 255),
            "non_zero_ratio": filled / breast_or_1,
            "freq_energy": _tile_energies(peaks, y, x, size, spacing_mm),
        }
    )
    return table.assign(rejected_by=_first_failure(table, config))


Layer = tuple[np.ndarray, Callable[[np.ndarray], float]]  # (H, W), and what adds up a part of it


def sum_of_greys(grey: np.ndarray) -> float:
    """Sum of (H, W) grey levels; several times as fast as np.sum on 16 bits."""
    return cv2.sumElems(grey)[0]


def tile_sums(
    layers: Callable[[tuple[slice, slice]], Sequence[Layer]],
    mask: np.ndarray,
    ys: np.ndarray,
    xs: np.ndarray,
    size: int,
) -> np.ndarray:
    """(layers, tiles) float64: sums of what `layers` makes of each band of an image, over each tile.

    Nothing is added up outside the box of the mask (H, W). Tiles overlap: sums are taken once for each
    cell between the tiles' borders; a summed-area table (Crow 1984) of the cells then gives the tiles'.
    """
    rows = np.unique(np.concatenate([ys, np.minimum(ys + size, mask.shape[0])]))
    cols = np.unique(np.concatenate([xs, np.minimum(xs + size, mask.shape[1])]))
    left, top, width, height = bounding_box(mask)
    sums = np.zeros((len(layers(np.s_[:0, :0])), len(rows), len(cols)))  # above and left of a border
    for i in np.flatnonzero((rows[1:] > top) & (rows[:-1] < top + height)):
        band = layers(np.s_[rows[i] : rows[i + 1], left : left + width])
        for j in np.flatnonzero((cols[1:] > left) & (cols[:-1] < left + width)):
            cell = np.s_[:, max(0, cols[j] - left) : cols[j + 1] - left]
            sums[:, i + 1, j + 1] = [add_up(part[cell]) for part, add_up in band]
    sums = sums.cumsum(1).cumsum(2)
    y0, x0 = np.searchsorted(rows, ys)[:, None], np.searchsorted(cols, xs)
    y1, x1 = np.searchsorted(rows, ys + size)[:, None], np.searchsorted(cols, xs + size)
    y1, x1 = np.minimum(y1, len(rows) - 1), np.minimum(x1, len(cols) - 1)
    tiles = sums[:, y1, x1] - sums[:, y0, x1] - sums[:, y1, x0] + sums[:, y0, x0]
    return tiles.reshape(len(sums), -1)


def _tile_energies(
    peaks: Peaks, y: np.ndarray, x: np.ndarray, size: int, spacing_mm: float
) -> np.ndarray:
    """Energy of each tile from its image's peaks."""
    rows, columns, strengths = peaks
    energies = np.zeros(len(y))
    for index, (top, left) in enumerate(zip(y, x, strict=True)):
        inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
        tile_peaks = rows[inside], columns[inside], strengths[inside]
        energies[index] = energy_of_peaks(tile_peaks, spacing_mm)
    return energies


def failures(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Which tiles of score_tiles fail each of CRITERIA by itself: bool, a column each."""
    return pd.DataFrame(
        {c.column: ~c.passes(table[c.column], getattr(config, c.setting)) for c in CRITERIA}
    )


def _first_failure(table: pd.DataFrame, config: Config) -> np.ndarray:
    """The first criterion that each tile fails, '' where it fails none.

    Specks may lie in dark fat or at the skin's edge: a tile of high energy is kept there (`is_rescued`).
    """
    failed = failures(table, config)
    # A tile without breast is of no use even where every threshold is 0.
    failed["breast_ratio"] |= table["breast_ratio"] == 0
    if config.high_freq_energy:
        high = table["freq_energy"] >= config.high_freq_energy
        for criterion in CRITERIA:
            if criterion.rescued:
                failed[criterion.column] &= ~high
    return np.select([failed[name] for name in COLUMNS], COLUMNS, default="")


def is_rescued(table: pd.DataFrame, config: Config) -> pd.Series:
    """Which tiles of score_tiles are kept for their high energy alone."""
    rescued = [criterion.column for criterion in CRITERIA if criterion.rescued]
    return (table["rejected_by"] == "") & failures(table, config)[rescued].any(axis=1)


def choose_tiles(records: list[dict[str, Any]], config: Config) -> pd.DataFrame:
    """All kept tiles, or MAX_TILES of them: each image's best first, then each image's second best."""
    frames = [
        pd.DataFrame(record["tiles"]).assign(image=index)
        for index, record in enumerate(records)
        if record.get("tiles", {}).get("x")
    ]
    if not frames:
        return pd.DataFrame(columns=["image", "x", "y", *COLUMNS])
    tiles = pd.concat(frames, ignore_index=True)[["image", "x", "y", *COLUMNS]]
    if config.max_tiles and len(tiles) > config.max_tiles:
        rank = tiles.groupby("image")["freq_energy"].rank(method="first", ascending=False)
        order = np.lexsort((-tiles["freq_energy"], rank))
        tiles = tiles.iloc[np.sort(order[: config.max_tiles])]
    return tiles


def intensity_window(image: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Grey levels (low, high) shown as 0 and 1: the 0.1 and 99.9 percentiles of the breast.

    Values above `high` are kept, not clipped, so that calcifications stay brighter than tissue. Some
    100,000 px are read (`sampling_step`).
    """
    step = sampling_step(image)
    grey = image[::step, ::step][mask[::step, ::step]]
    if not grey.size:
        return 0.0, 1.0
    low, high = (float(level) for level in np.percentile(grey, (0.1, 99.9), method="nearest"))
    return low, max(high, low + 1)


def extract_image(path: str, spacing_mm: float, config: Config) -> tuple[dict[str, Any], np.ndarray]:
    """Segment one mammogram and choose its tiles.

    Returns a record (window, origin, bit depth, spacing, funnel, kept tiles as columns) and the pixels
    of the box around the kept tiles plus VIEW_MARGIN, zero outside the breast mask, never rescaled.
    Raises ImageReadError, also where no breast is found or the image is smaller than a tile.
    """
    image, view = read_with_overview(path)
    size = config.tile_size
    if min(image.shape) < size:
        shape = f"{image.shape[1]} x {image.shape[0]}"
        raise ImageReadError(path, f"{shape} px is smaller than a tile; lower --tile_size ({size})")
    breast = find_breast(view)
    if not breast.any():
        raise ImageReadError(path, "no breast found (empty, all-white or noise)")
    mask = view.enlarged(breast)
    muscle = view.enlarged(find_muscle(view, breast)) & mask
    table = score_tiles(image, mask, config, spacing_mm, muscle)
    kept = table[table["rejected_by"] == ""].drop(columns="rejected_by")
    low, high = intensity_window(image, mask)
    rows, cols = tile_box(kept, config, image.shape)
    pixels = image[rows, cols]
    if pixels.size:
        pixels = cv2.copyTo(pixels, mask[rows, cols].view(np.uint8))
    counts = table["rejected_by"].value_counts()
    record = {
        "origin": (rows.start, cols.start),
        "shape": pixels.shape,
        "window": (low, high),
        "bit_depth": bit_depth(image, view.brightest),
        "spacing_mm": spacing_mm,
        "positions": len(table),
        "rejected": {name: int(counts.get(name, 0)) for name in COLUMNS},
        "rescued": int(is_rescued(table, config).sum()),
        "tiles": kept.to_dict("list"),
    }
    return record, pixels


def tile_box(tiles: pd.DataFrame, config: Config, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of the box around tiles (x, y) plus the views' margin, inside the image."""
    if tiles.empty:
        return slice(0, 0), slice(0, 0)
    margin = math.ceil(VIEW_MARGIN * config.tile_size)
    reach = config.tile_size + margin
    y0, x0 = max(0, tiles["y"].min() - margin), max(0, tiles["x"].min() - margin)
    y1, x1 = tiles["y"].max() + reach, tiles["x"].max() + reach
    return slice(int(y0), int(min(y1, shape[0]))), slice(int(x0), int(min(x1, shape[1])))


# ---- 5 Pixel cache ---------------------------------------------------------------------------------
# Tiles overlap by half, so pixels are stored once and a tile is an index into them. Pixels outside the
# breast mask are 0: labels, markers and film edges never reach a view.

EXTRACTION_PICTURES = ("segmentation.png", "grid.png", "tiles.png")
IMAGE_COLUMNS = (  # of images.csv; offsets follow no order, and what lies between images is no one's
    "image study_id laterality view offset height width y0 x0 low high bit_depth spacing_mm".split()
)
NPY_HEADER = 128  # bytes before the values of a one-dimensional .npy file
SYNC_EVERY = 1.0  # s between writes of the journal; a killed extraction does that much again
RECORDS = "records.jsonl"  # a line for each image that an extraction has finished

# The code that makes masks, tiles and pixels: file, beginning, end. An edited filter makes a new cache.
PIXEL_CODE = ((__file__, "# ---- 2 Image", "# ---- 5 Pixel cache"),)

Part = tuple[Path, np.dtype, int, tuple[int, int], slice, slice]  # file, dtype, offset, shape, box


def list_sources(data_dir: str | Path) -> pd.DataFrame:
    """One row for each image file: path, image, size, mtime_ns, study_id, laterality, view, spacing_mm.

    Study, laterality, view and spacing come from manifest.csv in the folder or beside it (written by
    prepare_dataset.py); without one, each image counts as a study of its own.
    """
    root = Path(os.path.abspath(data_dir))  # links stay: their names are the images'
    paths = find_images(root)
    stats = [path.stat() if path.is_file() else path.lstat() for path in paths]
    sources = pd.DataFrame(
        {
            "path": [str(path) for path in paths],
            # Names may hold any byte; in tables those that are no text stand as \\x..
            "image": [
                os.fsencode(path.relative_to(root)).decode(errors="backslashreplace") for path in paths
            ],
            "size": [stat.st_size for stat in stats],
            "mtime_ns": [stat.st_mtime_ns for stat in stats],
        }
    )
    known = _read_manifest(root)
    sources = sources.merge(known, on="path", how="left")
    stems = sources["image"].map(lambda name: str(Path(name).with_suffix("")))
    sources["study_id"] = sources["study_id"].fillna(stems)
    for column in ("laterality", "view"):
        sources[column] = sources[column].astype(object).where(sources[column].notna(), "")
    return sources


def read_table(path: Path, columns: Sequence[str], remedy: str) -> pd.DataFrame:
    """A CSV as text, '' where empty. Raises MammoError where it is no table with `columns` once each."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            options = {"dtype": str, "keep_default_na": False, "index_col": False}
            table = pd.read_csv(path, encoding="utf-8-sig", **options)
    except (ValueError, pd.errors.ParserWarning) as error:  # pandas' and Unicode errors are these
        reason = " ".join(str(error).split())
        raise MammoError(f"{path} is not a comma-separated UTF-8 table ({reason}); {remedy}") from error
    missing = [name for name in columns if name not in table]
    if missing:
        there = ", ".join(map(str, table))[:200]
        raise MammoError(f"{path}: no column {', '.join(missing)} (there is {there}); {remedy}")
    twice = [name for name in columns if f"{name}.1" in table]  # as pandas renames it
    if twice:
        raise MammoError(f"{path}: the column {twice[0]} is there twice; keep one of them")
    return table


def _read_manifest(root: Path) -> pd.DataFrame:
    columns = ["path", "study_id", "laterality", "view", "spacing_mm"]
    real = root.resolve()  # a linked folder may keep its manifest beside the link or where it leads to
    for folder in (root, root.parent, real.parent):
        if not (folder / "manifest.csv").is_file():
            continue
        manifest = read_table(folder / "manifest.csv", ["file"], "rerun prepare_dataset.py")
        paths = [folder / name for name in manifest["file"]]
        manifest["path"] = [
            str(root / path.relative_to(real) if path.is_relative_to(real) else path) for path in paths
        ]
        manifest = manifest.replace("", np.nan)
        manifest = manifest.reindex(columns=columns).drop_duplicates("path")
        spacing = pd.to_numeric(manifest["spacing_mm"], errors="coerce")
        manifest["spacing_mm"] = spacing.where(spacing.between(*RANGES["pixel_spacing_mm"]))
        return manifest
    return pd.DataFrame({column: pd.Series(dtype=object) for column in columns})


def cache_inputs(sources: pd.DataFrame, config: Config) -> dict[str, Any]:
    """All that the cache depends on: tile settings, code, and name, size and mtime of each file."""
    names = "tile_size tile_stride high_freq_energy exclude_pectoral pixel_spacing_mm max_tiles".split()
    names += [criterion.setting for criterion in CRITERIA]
    rows = sources.drop(columns="path").to_csv(index=False)
    return {
        # As floats: 40, typed as a flag, is 40.0.
        "settings": {name: float(getattr(config, name)) for name in names},
        "view_margin": VIEW_MARGIN,
        "code": settings.code_version(PIXEL_CODE),
        "files": hashlib.sha256(rows.encode()).hexdigest(),
    }


def cache_key(inputs: dict[str, Any]) -> str:
    """Name of the cache folder: 16 hex digits of the inputs' hash."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks: handing tens of MB back per image costs a fifth of the time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 1 << 25)  # the most that older glibc takes
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def extract_to_file(
    index: int, path: str, spacing_mm: float, config: Config, folder: str
) -> dict[str, Any]:
    """Extract image number `index` and append its pixels to the folder's file of their depth.

    Returns its record for the Journal, with the `offset` of its pixels or the `error` that skipped it.
    """
    cv2.setNumThreads(1)  # one process per core is already running
    keep_freed_memory()
    try:
        record, pixels = extract_image(path, spacing_mm, config)
    except ImageReadError as error:
        return {"index": index, "error": error.reason}
    file, dtype = pixel_file(Path(folder), record["bit_depth"])
    offset = append_pixels(file, np.ascontiguousarray(pixels, dtype)) if pixels.size else 0
    return {"index": index, "offset": offset, **record}


def pixel_file(folder: Path, bit_depth: int) -> tuple[Path, np.dtype]:
    """Where images of this depth are extracted to, and as what."""
    dtype = np.dtype(np.uint8 if bit_depth <= 8 else np.uint16)
    return folder / f"pixels_{dtype}.npy", dtype


def pixels_end(folder: Path, record: dict[str, Any]) -> tuple[Path, int]:
    """The file that holds an image's pixels, and where they end in it, in bytes."""
    path, dtype = pixel_file(folder, record["bit_depth"])
    return path, NPY_HEADER + (record["offset"] + math.prod(record["shape"])) * dtype.itemsize


def append_pixels(path: Path, pixels: np.ndarray) -> int:
    """Append an image to a file that the processes of an extraction share; returns its offset in values.

    A single write to a file open for appending lands in one piece behind all others (POSIX write()).
    """
    with naming(path), path.open("ab", buffering=0) as out:
        written = out.write(pixels.data)
        start = out.tell() - written - NPY_HEADER
    if written < pixels.nbytes or start % pixels.itemsize:  # this image was cut short, or the one before
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return start // pixels.itemsize


class Journal:
    """The images that an extraction has finished: their pixels, and a line about each in RECORDS.

    Appends only to a folder of its own below `extracted`, that of this host and boot; those of others,
    whose writes may still be under way, are read (read_records). fsync runs in a thread, so that
    extraction never waits for the disk. The cache's lock keeps a folder to one extraction at a time.
    """

    def __init__(self, extracted: Path, finished: dict[int, dict[str, Any]]) -> None:
        """`finished`: the records that stand, see read_records."""
        self.folder = extracted / this_host()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.waiting: list[dict[str, Any]] = []
        self.ends = {pixel_file(self.folder, bits)[0]: NPY_HEADER for bits in (8, 16)}
        kept = [{**record} for record in finished.values() if record["folder"] == self.folder]
        for record in kept:
            del record["folder"]
            self._note_end(record)
        # A line whose pixels are gone goes for good: what is appended from now on must not stand in.
        lines = "".join(f"{json.dumps(record)}\n" for record in kept)
        write_atomic(self.folder / RECORDS, lines)
        self._cut()  # what a killed extraction left behind its last image, perhaps half a value
        self.writer = ThreadPoolExecutor(1)
        self.written = self.writer.submit(self._write)
        self.due = time.monotonic() + SYNC_EVERY

    def add(self, record: dict[str, Any]) -> None:
        """Note a finished image. Raises the OSError of an earlier write."""
        self._note_end(record)
        self.waiting.append(record)
        if time.monotonic() >= self.due and self.written.done():
            self.written.result()
            self.written = self.writer.submit(self._write)
            self.due = time.monotonic() + SYNC_EVERY

    def close(self) -> None:
        """Give back the room behind the last finished image, as on a full disk, and write what waits."""
        self.writer.shutdown()
        self._cut()
        self._write()

    def _note_end(self, record: dict[str, Any]) -> None:
        if "offset" in record:
            path, end = pixels_end(self.folder, record)
            self.ends[path] = max(self.ends[path], end)

    def _cut(self) -> None:
        for path, end in self.ends.items():
            with naming(path), path.open("ab") as file:
                file.truncate(end)  # longer where it lacks its header

    def _write(self) -> None:
        """Append what waits to RECORDS once its pixels are safe."""
        records = list(self.waiting)
        for path in self.ends:
            with naming(path), path.open("rb") as file:
                os.fsync(file.fileno())
        path = self.folder / RECORDS
        with naming(path), path.open("a") as out:
            # A full disk may have left half a line.
            out.write("\n" + "".join(f"{json.dumps(record)}\n" for record in records))
            out.flush()
            os.fsync(out.fileno())
        del self.waiting[: len(records)]


def this_host() -> str:
    """Host name and boot: two machines, such as containers, may share the first but not the second."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}_{boot.read_text().strip() if boot.is_file() else ''}"


def read_records(extracted: Path) -> dict[int, dict[str, Any]]:
    """The lines of all journals by image number, each with the `folder` of its pixels.

    Left out are damaged lines and those whose pixels are gone: scratch file systems purge old files.
    """
    records = {}
    for journal in extracted.glob(f"*/{RECORDS}"):
        folder = journal.parent
        sizes = {path: path.stat().st_size for path in folder.glob("pixels_*.npy")}
        with journal.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):  # half a line, where a process was killed
                    record = {"folder": folder, **json.loads(line)}
                    if "error" not in record:
                        path, end = pixels_end(folder, record)
                        if end > sizes.get(path, 0):
                            continue
                    records[record["index"]] = record
    return records


def build_cache(config: Config) -> Path:
    """Return the folder of the finished pixel cache, extracting whatever is missing.

    Images run in parallel processes and a journal tells which are done, so that an interrupted build
    goes on where it stopped; the folder appears under its name only when complete. A second run that
    needs the same cache waits for the first.
    """
    sources = list_sources(config.data_dir)
    inputs = cache_inputs(sources, config)
    final = Path(config.cache_dir) / cache_key(inputs)
    if is_finished(final):
        note_other_versions(final)
        return final
    note_other_code(final, inputs)
    building = final.with_name(f".{final.name}.building")
    building.mkdir(parents=True, exist_ok=True)
    lock = FileLock(building.with_suffix(".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"note: another process builds {final}: waiting for it", file=sys.stderr)
        held = lock.acquire()
    with held:
        if not is_finished(final):
            if final.exists():
                print(f"note: {final} is damaged: moved aside and built anew", file=sys.stderr)
                move_aside(final)
            if not is_finished(building):  # else the last run was killed before it renamed it
                records = extract_all(sources, config, building / "extracted")
                finish_cache(building, records, sources, inputs, config)
            shutil.rmtree(building / "extracted", ignore_errors=True)
            sweep(building)
            os.replace(building, final)
    return final


def library_versions() -> dict[str, str]:
    """Versions of what decodes and filters pixels: others may give masks and tiles that differ."""
    return {"opencv": cv2.__version__, "scikit-image": metadata.version("scikit-image")}


def note_other_versions(cache: Path) -> None:
    """Say so where a cache was made by other versions of OpenCV or scikit-image than are here."""
    made = json.loads((cache / "cache.json").read_text()).get("versions", {})
    other = [
        f"{name} {made[name]} (here {version})"
        for name, version in library_versions().items()
        if made.get(name, version) != version
    ]
    if other:
        print(
            f"note: {cache} was made by {', '.join(other)}: its masks and tiles may differ a little "
            "from what would be made here; move it away to make it anew",
            file=sys.stderr,
        )


def note_other_code(final: Path, inputs: dict[str, Any]) -> None:
    """Say so where the same images have a cache with the same settings, made by other code."""
    for path in final.parent.glob("[!.]*/cache.json"):
        with suppress(OSError, ValueError, KeyError):  # a damaged cache tells nothing
            other = json.loads(path.read_text())["inputs"]
            if all(other[name] == inputs[name] for name in ("settings", "files")):
                print(
                    f"note: the code that makes masks, tiles and pixels has changed since {path.parent} "
                    f"was made: extracting into {final}",
                    file=sys.stderr,
                )


def is_finished(cache: Path) -> bool:
    """Whether a cache is complete: all its files are there and as long as they were written."""
    try:
        sizes = json.loads((cache / "cache.json").read_text())["sizes"]
        return all((cache / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def extract_all(sources: pd.DataFrame, config: Config, extracted: Path) -> list[dict[str, Any]]:
    """Extract the images that no journal below `extracted` holds yet; returns the records of all."""
    spacing = sources["spacing_mm"].fillna(config.pixel_spacing_mm)
    unknown = int(sources["spacing_mm"].isna().sum())
    if unknown > 0 and (unknown < len(sources) or config.pixel_spacing_mm == PIXEL_SPACING_MM):
        print(
            f"note: {unknown} of {len(sources)} images don't tell their pixel size: "
            f"--pixel_spacing_mm {config.pixel_spacing_mm} is taken",
            file=sys.stderr,
        )
    finished = read_records(extracted)
    jobs = [
        (index, path, float(mm), config)
        for index, (path, mm) in enumerate(zip(sources["path"], spacing, strict=True))
        if index not in finished
    ]
    try:
        with closing(Journal(extracted, finished)) as journal:
            extract = functools.partial(extract_to_file, folder=str(journal.folder))
            bar = progress(mode=config.progress, total=len(jobs), desc="tiles", unit="image")
            run_in_parallel(extract, jobs, config.num_workers, bar, done=journal.add)
    except BrokenProcessPool as error:
        finished = read_records(extracted)
        left = [job[1] for job in jobs if job[0] not in finished]
        suspects = left[: min(config.num_workers, available_cores())]
        raise MammoError(
            f"an extraction process was killed at one of {', '.join(suspects)}, for want of memory "
            "perhaps; lower --num_workers and start again: finished images are kept. If it ends there "
            "again, one of these files crashes its decoder: move it away"
        ) from error
    finished = read_records(extracted)
    return [finished[index] for index in range(len(sources))]


class StoppedError(Exception):
    """A signal was obeyed, and all is in order for the same command to go on."""

    def __init__(self, number: int, rest: str = "the same command goes on where it stopped") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {rest}")
        self.code = 128 + number


STOP_SIGNALS = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a request, obeyed where that leaves all in order.

    `requested` is the number of the signal that this process received, `agreed` of the one that all
    ranks stop for (0 = none): they compare at each read of the metrics, because all must leave the loop
    at the same step. Ctrl-C twice quits at once. The other signals don't: SLURM and launchers send the
    same one to a process and to its parent, which hands it on, and SIGKILL follows anyway.
    """

    def __init__(self) -> None:
        self.requested, self.agreed = 0, 0

    def __enter__(self) -> StopSignal:
        numbers = [getattr(signal, name) for name in STOP_SIGNALS]
        self.former = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def _request(self, number: int, frame: Any) -> None:
        if number == self.requested == signal.SIGINT:
            signal.signal(number, self.former[number])
            signal.raise_signal(number)
        self.requested = self.requested or number

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def obey(self) -> None:
        """Raise StoppedError where a signal has come."""
        if self.requested:
            raise StoppedError(self.requested)


def run_in_parallel(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    workers: int,
    bar: tqdm,
    done: Callable[[Any], None] = lambda result: None,
    threads: bool = False,
) -> None:
    """Call `function(*job)` for each job, in at most `workers` processes or threads, and move the bar.

    `done` gets each result, here. An error or a signal drops the jobs that have not begun; those at hand
    end first, and `done` gets their results too. Raises StoppedError after a signal.
    """
    workers = max(1, min(workers, available_cores(), len(jobs)))
    with bar, StopSignal() as stop:
        if workers == 1:
            for job in jobs:
                stop.obey()
                done(function(*job))
                bar.update()
            return
        with ThreadPoolExecutor(workers) if threads else process_pool(workers) as pool:
            ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
            running: set[Future[Any]] = set()
            try:
                for job in jobs:
                    running.add(future := pool.submit(function, *job))
                    future.add_done_callback(ended.put)
                while running:
                    stop.obey()
                    with suppress(queue.Empty):  # looks at the signals twice a second
                        future = ended.get(timeout=0.5)
                        running.discard(future)
                        done(future.result())
                        bar.update()
            except BaseException:
                begun = [future for future in running if not future.cancel()]
                for future in wait(begun).done:  # none of these is lost
                    if not future.exception():
                        with suppress(OSError):
                            done(future.result())
                raise


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that import the libraries once and end with this one.

    Plain fork can hang once torch has started threads; a fork server can't.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["cv2", "pandas", "torchvision", "lightly.loss"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


def start_worker() -> None:
    """Let a process of run_in_parallel leave signals to its parent and end with it.

    Ctrl-C and SLURM reach all processes of a job, but the image at hand shall be finished. A killed run
    must not leave processes behind that write into what the next one builds.
    """
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def finish_cache(
    building: Path,
    records: list[dict[str, Any]],
    sources: pd.DataFrame,
    inputs: dict[str, Any],
    config: Config,
) -> None:
    """Write images.csv, tiles.csv, rejections.csv, cache.json and, last, pixels.npy.

    `records` are extract_all's. Raises MammoError where no tile was kept.
    """
    tiles = choose_tiles(records, config)
    rejections = _funnel(records, tiles, sources)
    if tiles.empty:
        raise MammoError(
            f"no tile was kept.\n{describe_funnel(rejections)}\nloosen the criterion that rejects most "
            f"(--{', --'.join(c.setting for c in CRITERIA)}), or look at --extract_only --qc_pages"
        )
    images, parts = _index_images(records, tiles, sources, config)
    files = {part[0] for part in parts}
    if len(files) == 1 and not rejections["capped"].any():  # it becomes pixels.npy as it is
        pixels, dtype = files.pop(), parts[0][1]
        with naming(pixels), pixels.open("r+b") as out:
            write_npy_header(out, dtype, (pixels.stat().st_size - NPY_HEADER) // dtype.itemsize)
            os.fsync(out.fileno())
    else:
        images["offset"] = (images["height"] * images["width"]).cumsum().shift(fill_value=0)
        pixels = building / "extracted" / "pixels.npy"
        sweep(pixels.parent)
        pixels.unlink(missing_ok=True)  # of a start that was killed behind this
        with replacing(pixels) as temporary:
            gather_pixels(images, parts, temporary, config)
    tiles = tiles.assign(image=tiles.groupby("image").ngroup())
    sizes = {"pixels.npy": pixels.stat().st_size}
    for name, table in (("images", images), ("tiles", tiles), ("rejections", rejections)):
        path = building / f"{name}.csv"
        write_atomic(path, table.to_csv(index=False))
        sizes[path.name] = path.stat().st_size
    summary = {"inputs": inputs, "versions": library_versions(), "sizes": sizes, "finished": True}
    write_atomic(building / "cache.json", json.dumps(summary, indent=2))
    os.replace(pixels, building / "pixels.npy")  # last: without it the rest counts for nothing


def _funnel(records: list[dict[str, Any]], tiles: pd.DataFrame, sources: pd.DataFrame) -> pd.DataFrame:
    """One row for each image: positions, kept, rescued, rejected per criterion, capped, error."""
    kept = tiles["image"].value_counts()
    rows = []
    for index, record in enumerate(records):
        rejected = record.get("rejected", dict.fromkeys(COLUMNS, 0))
        passed = record.get("positions", 0) - sum(rejected.values())
        chosen = int(kept.get(index, 0))
        rows.append(
            {
                "image": sources["image"][index],
                "positions": record.get("positions", 0),
                "kept": chosen,
                "rescued": record.get("rescued", 0),
                **rejected,
                "capped": passed - chosen,
                "error": record.get("error", ""),
            }
        )
    return pd.DataFrame(rows)


def describe_funnel(rejections: pd.DataFrame) -> str:
    """The funnel in a few lines of text: images, positions, rejections by criterion, skips by name."""
    total = rejections.sum(numeric_only=True)
    skipped = rejections[rejections["error"] != ""]
    lost = ", ".join(f"{name} {total[name]:,.0f}" for name in (*COLUMNS, "capped") if total[name])
    lines = [
        f"images    {len(rejections):,}, skipped {len(skipped):,}",
        f"positions {total['positions']:,.0f}, kept {total['kept']:,.0f} "
        f"({total['rescued']:,.0f} for high energy alone); rejected: {lost or 'none'}",
    ]
    lines += [f"  skipped {row.image}: {row.error}" for row in skipped.head(10).itertuples()]
    if len(skipped) > 10:
        lines.append(f"  ... and {len(skipped) - 10:,} more in rejections.csv")
    return "\n".join(lines)


def _index_images(
    records: list[dict[str, Any]], tiles: pd.DataFrame, sources: pd.DataFrame, config: Config
) -> tuple[pd.DataFrame, list[Part]]:
    """The rows of images.csv, and where the pixels of each were extracted to."""
    rows, parts = [], []
    for index, group in tiles.groupby("image"):
        record = records[int(index)]
        (y0, x0), shape = record["origin"], record["shape"]
        # Smaller than what was extracted where MAX_TILES cut tiles.
        ys, xs = tile_box(group, config, (y0 + shape[0], x0 + shape[1]))
        box = (record["offset"], ys.stop - ys.start, xs.stop - xs.start, ys.start, xs.start)
        source = sources.loc[int(index), ["image", "study_id", "laterality", "view"]]
        rows.append([*source, *box, *record["window"], record["bit_depth"], record["spacing_mm"]])
        file, dtype = pixel_file(record["folder"], record["bit_depth"])
        inside = slice(ys.start - y0, ys.stop - y0), slice(xs.start - x0, xs.stop - x0)
        parts.append((file, dtype, record["offset"], tuple(shape), *inside))
    return pd.DataFrame(rows, columns=IMAGE_COLUMNS), parts


def gather_pixels(images: pd.DataFrame, parts: list[Part], target: Path, config: Config) -> None:
    """Copy the images' pixels to one .npy file, to the offsets in `images`, several images at a time.

    A second copy: for extractions that were killed, for MAX_TILES, and for archives of 8-bit and
    deeper images, which share uint16.
    """
    dtype = max(part[1] for part in parts)
    length = int((images["height"] * images["width"]).sum())
    with target.open("wb") as out:
        write_npy_header(out, dtype, length)
        out.truncate(NPY_HEADER + length * dtype.itemsize)
    starts = NPY_HEADER + images["offset"] * dtype.itemsize

    def copy_part(part: Part, start: int) -> None:
        file, source, offset, shape, ys, xs = part
        pixels = np.fromfile(
            file, source, math.prod(shape), offset=NPY_HEADER + offset * source.itemsize
        )
        with target.open("r+b") as out:
            out.seek(start)
            out.write(np.ascontiguousarray(pixels.reshape(shape)[ys, xs], dtype).data)

    jobs = list(zip(parts, starts, strict=True))
    bar = progress(mode=config.progress, total=len(jobs), desc="cache", unit="image")
    run_in_parallel(copy_part, jobs, config.num_workers, bar, threads=True)


def write_npy_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """Write the NPY_HEADER bytes that make an .npy file of the `length` values that follow."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_2_0(file, header)


def cache_digest(cache: Path) -> str:
    """SHA-256 of what was cached: the tables of tiles and of images, whose offsets follow no order.

    A run may go on with any cache that has its digest, wherever the images lie by now.
    """
    images = pd.read_csv(cache / "images.csv", dtype=str, keep_default_na=False).drop(columns="offset")
    tables = (cache / "tiles.csv").read_bytes() + images.to_csv(index=False).encode()
    return hashlib.sha256(tables).hexdigest()


class MammogramTiles:
    """Tiles as an index into one flat array of pixels.

    `images` has a row for each image: offset, height and width of its part of `pixels`, the place x0, y0
    of that part in the image, and the window low, high; `table` a row for each tile: image (row of
    `images`), x, y and the scores. Both are in px of the image, while `pixels` may be averaged over
    blocks of side `reduce` (see open_tiles), its grey levels multiplied by `grey_scale`.

    Per tile: `layout` (N, 3) int64 offset, height and width of its image's pixels; `centre` (N, 2)
    x and y in them; `window` (N, 2) float32 grey levels; all in units of the averaged pixels.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        images: pd.DataFrame,
        table: pd.DataFrame,
        tile_size: int,
        reduce: int = 1,
        grey_scale: int = 1,
        cache: Path = Path(),
    ) -> None:
        self.images, self.table, self.cache = images, table, cache
        self.tile_size, self.reduce = tile_size, reduce
        # torch has few uint16 operations: the bits travel as int16, cut_regions reads them back.
        self.pixels = torch.from_numpy(pixels.view(np.int16) if pixels.dtype == np.uint16 else pixels)
        shape, offset = reduced_layout(images, reduce)
        image_row = table["image"].to_numpy()
        origin = images[["x0", "y0"]].to_numpy()[image_row]
        self.layout = np.column_stack([offset, shape])[image_row]
        self.centre = (table[["x", "y"]].to_numpy() + tile_size / 2 - origin) / reduce
        self.window = images[["low", "high"]].to_numpy(np.float32)[image_row] * np.float32(grey_scale)

    def __len__(self) -> int:
        return len(self.table)

    def to(self, device: torch.device) -> MammogramTiles:
        """Hold the pixels in the device's memory."""
        self.pixels = self.pixels.to(device)
        return self

    def subset(self, ids: np.ndarray) -> MammogramTiles:
        """Tiles `ids` (B,) alone, in that order, with a copy of the pixels that their views can reach.

        A view of tile `ids[i]` equals, bit for bit, the view of tile i of the subset.
        """
        reach = int(self.tile_size / self.reduce * (0.5 + VIEW_MARGIN)) + 2
        corner = np.floor(self.centre[ids]).astype(int)
        offset, height, width = self.layout[ids].T
        x0, y0 = (corner[:, axis].clip(reach) - reach for axis in (0, 1))
        x1 = np.minimum(corner[:, 0] + reach, width)
        y1 = np.minimum(corner[:, 1] + reach, height)
        shape = np.column_stack([y1 - y0, x1 - x0])
        out = copy.copy(self)
        out.layout = np.column_stack([np.cumsum(shape.prod(1)) - shape.prod(1), shape])
        out.centre = self.centre[ids] - np.column_stack([x0, y0])
        out.window = self.window[ids]
        out.pixels = torch.empty(int(shape.prod(1).sum()), dtype=self.pixels.dtype)
        for start, (h, w), top, left, base, stride in zip(
            out.layout[:, 0], shape, y0, x0, offset, width, strict=True
        ):
            crop = self.pixels.as_strided((h, w), (stride, 1), int(base + top * stride + left))
            out.pixels[start : start + h * w].view(h, w).copy_(crop)
        return out


def open_tiles(cache: str | Path, reduce: int = 1) -> MammogramTiles:
    """The tiles of a finished pixel cache, their pixels memory-mapped.

    `reduce` > 1 opens a copy of the pixels averaged over blocks of that side, for views smaller than
    their tile (a mip level, Williams 1983): one bilinear gather is then free of aliasing. The copy is
    uint16 with 8 fractional bits for 8-bit images, so that averaging keeps its precision.
    """
    cache = Path(cache)
    words = {"study_id": str}  # 007 is another study than 7
    images = pd.read_csv(cache / "images.csv", keep_default_na=False, dtype=words)
    table = pd.read_csv(cache / "tiles.csv")
    tile_size = int(json.loads((cache / "cache.json").read_text())["inputs"]["settings"]["tile_size"])
    pixels = np.load(cache / "pixels.npy", mmap_mode="c")
    grey_scale = 256 if reduce > 1 and pixels.dtype == np.uint8 else 1
    if reduce > 1:
        pixels = open_reduced(cache, pixels, images, reduce, grey_scale)
    return MammogramTiles(pixels, images, table, tile_size, reduce, grey_scale, cache)


def reduced_layout(images: pd.DataFrame, reduce: int) -> tuple[np.ndarray, np.ndarray]:
    """Height and width (N, 2) and offset (N,) of each image's pixels, averaged where `reduce` > 1."""
    shape = -(-images[["height", "width"]].to_numpy() // reduce)
    if reduce == 1:
        return shape, images["offset"].to_numpy()
    return shape, np.cumsum(shape.prod(1)) - shape.prod(1)


def block_average(pixels: np.ndarray, side: int) -> np.ndarray:
    """Means of (H, W) over blocks of that side, float32; beyond the image lies 0, as for every view."""
    height, width = (-(-length // side) for length in pixels.shape)
    padded = np.zeros((height * side, width * side), np.float32)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA)


def open_reduced(
    cache: Path, pixels: np.ndarray, images: pd.DataFrame, reduce: int, grey_scale: int
) -> np.ndarray:
    """The averaged copy of a cache's pixels, memory-mapped; it is written once."""
    path = cache / f"pixels_reduced_{reduce}.npy"
    total = int(reduced_layout(images, reduce)[0].prod(1).sum())

    def is_whole() -> bool:
        return path.is_file() and path.stat().st_size == NPY_HEADER + 2 * total

    if is_whole():  # also in a folder that can't be written
        return np.load(path, mmap_mode="c")
    with FileLock(path.with_suffix(".lock")):
        if not is_whole():
            sweep(cache, path.name)
            # Written, not mapped: a full disk is an error then, and no crash.
            with replacing(path) as temporary, temporary.open("wb") as out:
                write_npy_header(out, np.dtype(np.uint16), total)
                for image in images.itertuples():
                    stop = image.offset + image.height * image.width
                    crop = pixels[image.offset : stop].reshape(image.height, image.width)
                    small = block_average(crop, reduce)
                    out.write(np.round(small * grey_scale).astype(np.uint16).data)
    return np.load(path, mmap_mode="c")


# ---- 6 Views ---------------------------------------------------------------------------------------
# Geometry is one homography per view and ONE bilinear gather from the cached pixels, so that a speck of
# 3-10 px is interpolated once; photometry follows on the training device, in float.


@dataclass(frozen=True)
class ViewSpec:
    """Ranges of one kind of view's random parameters; all 0 = the tile as it is."""

    kind: str = "plain"  # by which an objective may tell its views apart
    rotation: float = 0.0  # degrees, uniform in +-rotation
    scale: float = 0.0  # magnification, uniform in 1 +- scale
    perspective: float = 0.0  # change of magnification from the centre to an edge, uniform in +-
    brightness: float = 0.0  # factor, uniform in 1 +- brightness
    contrast: float = 0.0  # factor about the mean of the tissue, uniform in 1 +- contrast
    blur: float = 0.0  # px of the view, largest sigma of a Gaussian applied to half of the views
    flip: bool = False  # mirror left-right and up-down, each for half of the views

    @property
    def reach(self) -> float:
        """How far the farthest corner may lie from the tile's centre, along an axis, in tile sizes."""
        angle = math.radians(min(self.rotation, 45))
        turned = (math.cos(angle) + math.sin(angle)) / (1 - self.scale)
        return turned / (1 - 2 * self.perspective) / 2


# Tissue has no preferred direction in a tile, but it has a density: strong geometry, mild photometry.
# A sigma of 1.2 px leaves a speck 3 px wide more than 40 % of its contrast.
VIEW_1 = ViewSpec("view 1", rotation=15, scale=0.15, brightness=0.3, contrast=0.3, flip=True)
VIEW_2 = ViewSpec(
    "view 2", rotation=25, perspective=0.08, brightness=0.4, contrast=0.4, blur=1.2, flip=True
)
VIEWS = (VIEW_1, VIEW_2)  # of every tile in a step, in this order
PLAIN_VIEW = ViewSpec()
# The cache keeps that much tissue around its tiles, of the tile size: no view sees a black corner.
VIEW_MARGIN = math.ceil(20 * (max(spec.reach for spec in VIEWS) - 0.5)) / 20
BLUR_RADIUS = 4  # px, 3.3 of the largest sigma
# Views are scaled to [0, 1] by the image's window, then standardised like the mean ImageNet channel.
GREY_MEAN, GREY_STD = 0.449, 0.226


def reduction(tile_size: int, view_size: int) -> int:
    """Largest power of two by which the pixels may be averaged before a view is taken from them."""
    return 2 ** max(0, int(math.log2(tile_size / view_size)))


def random_homographies(spec: ViewSpec, rng: np.random.Generator, count: int) -> np.ndarray:
    """(B, 3, 3) float64: from view to tile coordinates, both in [-1, 1] about the centre."""
    draw = rng.uniform(-1, 1, (count, 4))
    flips = np.where((rng.random((count, 2)) < 0.5) & spec.flip, -1.0, 1.0)
    angle = np.deg2rad(spec.rotation * draw[:, 0])
    zoom = 1 / (1 + spec.scale * draw[:, 1])
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    out = np.zeros((count, 3, 3))
    out[:, 0, 0], out[:, 0, 1] = cos * flips[:, 0], -sin * flips[:, 1]
    out[:, 1, 0], out[:, 1, 1] = sin * flips[:, 0], cos * flips[:, 1]
    out[:, 2, :2] = spec.perspective * draw[:, 2:]
    out[:, 2, 2] = 1
    return out


def sample_tiles(tiles: MammogramTiles, ids: np.ndarray, homographies: np.ndarray, size: int) -> Tensor:
    """Gather views of tiles `ids` (B,) through `homographies` (B, 3, 3) by bilinear interpolation.

    Returns (B, 1, size, size) float32 on the device of the pixels: 0 at the low end of the image's
    window, 1 at its high end, more above it; 0 outside the breast and beyond the image.
    """
    device, count = tiles.pixels.device, len(ids)
    half = tiles.tile_size / 2 / tiles.reduce
    corners = homographies @ np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    reach = math.ceil(half * np.abs(corners[:, :2] / corners[:, 2:]).max()) + 1
    # From the view's [-1, 1] to the region's: float32 holds positions within it.
    to_region = np.zeros((count, 3, 3))
    to_region[:, 0, 0] = to_region[:, 1, 1] = half / reach
    to_region[:, :2, 2] = tiles.centre[ids] % 1 / reach
    to_region[:, 2, 2] = 1
    matrix = to_device((to_region @ homographies).astype(np.float32), device)
    low, high = to_device(tiles.window[ids], device).T.reshape(2, count, 1, 1, 1)

    # Where the reduced copy is still finer than the view, average 2 x 2 samples for each view pixel.
    fine = 2 if tiles.tile_size / tiles.reduce / size > 1.25 else 1
    axis = (torch.arange(size * fine, device=device) + 0.5) * (2 / (size * fine)) - 1
    v, u = (part.flatten() for part in torch.meshgrid(axis, axis, indexing="ij"))  # (N,)
    # No matrix product: where TF32 is on, positions would be off by a tenth of a pixel.
    x, y, w = (matrix[..., 0:1] * u + matrix[..., 1:2] * v + matrix[..., 2:]).unbind(1)  # (B, N)
    grid = torch.stack([x / w, y / w], dim=-1).view(count, size * fine, size * fine, 2)
    view = F.grid_sample(cut_regions(tiles, ids, reach), grid, align_corners=False)
    view = ((view - low) / (high - low)).clamp_min(0)
    return F.avg_pool2d(view, fine) if fine > 1 else view


def cut_regions(tiles: MammogramTiles, ids: np.ndarray, reach: int) -> Tensor:
    """Grey values around tiles `ids` (B,): (B, 1, 2 reach, 2 reach) float32, 0 off the image."""
    side = 2 * reach
    regions = torch.zeros((len(ids), side, side), dtype=tiles.pixels.dtype, device=tiles.pixels.device)
    corner = np.floor(tiles.centre[ids]).astype(int) - reach
    for region, (x, y), (offset, height, width) in zip(
        regions, corner.tolist(), tiles.layout[ids].tolist(), strict=True
    ):
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)
        crop = tiles.pixels[offset : offset + height * width].view(height, width)[top:bottom, left:right]
        region[top - y : bottom - y, left - x : right - x] = crop
    if regions.dtype == torch.int16:
        regions = regions.int().bitwise_and_(0xFFFF)  # the bits of a uint16
    return regions.float().unsqueeze(1)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device; the copy waits for nothing that the GPU is still doing."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def adjust_photometry(view: Tensor, spec: ViewSpec, rng: np.random.Generator) -> Tensor:
    """Blur, brightness and contrast of (B, 1, S, S), parameters per sample; air stays 0."""
    count = len(view)
    draw = rng.uniform(-1, 1, (count, 2)) * (spec.brightness, spec.contrast) + 1
    # A sigma near 0 leaves the view as it is: half of the views are not blurred.
    sigmas = np.where(rng.random(count) < 0.5, rng.uniform(0, spec.blur, count), 0).clip(1e-3)
    factors = to_device(np.column_stack([draw, sigmas]).astype(np.float32), view.device)
    brightness, contrast, sigma = factors.T.reshape(3, count, 1, 1, 1)
    tissue = view > 0
    if spec.blur:
        # What spreads beyond the skin would be lifted to grey by a lower contrast: air stays air.
        both = torch.cat([view, tissue.to(view.dtype)])
        view, cover = _gaussian_blur(both, sigma.repeat(2, 1, 1, 1)).chunk(2)
        tissue = cover > 0.5
        view = view * tissue
    view = view * brightness
    mean = view.sum((1, 2, 3), keepdim=True) / tissue.sum((1, 2, 3), keepdim=True).clamp_min(1)
    return torch.where(tissue, (view - mean) * contrast + mean, 0.0).clamp_min(0)


def _gaussian_blur(view: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian of (B, 1, S, S) with a sigma (B, 1, 1, 1) for each sample, edges replicated."""
    count, r = len(view), BLUR_RADIUS
    taps = torch.arange(-r, r + 1, device=view.device, dtype=view.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)  # (B, 1, 1, 2r+1)
    kernel = kernel / kernel.sum(-1, keepdim=True)
    flat = F.pad(view.transpose(0, 1), (r, r, r, r), mode="replicate")
    flat = F.conv2d(flat, kernel, groups=count)
    return F.conv2d(flat, kernel.transpose(2, 3), groups=count).transpose(0, 1)


class View(NamedTuple):
    """One view of each tile in a batch."""

    kind: str  # of its ViewSpec
    image: Tensor  # (B, 1, S, S) float32 after photometry, standardised: what a network sees
    sharp: Tensor  # (B, 1, S, S) float32 before photometry, 0 to 1 in the image's window (sample_tiles)


def make_view(
    tiles: MammogramTiles,
    ids: np.ndarray,
    spec: ViewSpec,
    size: int,
    key: Sequence[int] = (0,),
    device: torch.device | None = None,
) -> View:
    """One view of each tile in `ids` (B,), of `size` px, on `device`.

    All random parameters follow from `key`, such as (seed, step, rank, view), and from nothing else.
    """
    rng = np.random.default_rng(key)
    if device is not None and device != tiles.pixels.device:
        # All pixels don't fit the device, these do: it makes views far faster than the host.
        tiles, ids = tiles.subset(ids), np.arange(len(ids))
        tiles.pixels = to_device(tiles.pixels.numpy(), device)
    sharp = sample_tiles(tiles, ids, random_homographies(spec, rng, len(ids)), size)
    view = sharp if spec == PLAIN_VIEW else adjust_photometry(sharp, spec, rng)
    return View(spec.kind, (view - GREY_MEAN) / GREY_STD, sharp)


# ---- 7 Model ---------------------------------------------------------------------------------------

CLASSES = ("mass", "calcification")
CLASSIFIER_HIDDEN = 2048  # hidden units of the classification head


def build_backbone(name: str = BACKBONE, weights: str = "none") -> nn.Module:
    """A torchvision ResNet without its fully connected layer: (B, 3, H, W) -> (B, 512 or 2048).

    `weights`: imagenet, none, or a file (state dict, checkpoint of this script, safetensors).
    Raises MammoError with the remedy where weights can't be had or don't fit.
    """
    backbone = torchvision.models.get_model(name, weights=None)
    backbone.fc = nn.Identity()
    if weights == "imagenet":
        _load_state(backbone, _imagenet_state(name), "imagenet")
    elif weights != "none":
        _load_state(backbone, read_backbone_state(weights)[0], weights)
    return backbone


def feature_width(backbone: nn.Module) -> int:
    """Number of features of a ResNet without its fully connected layer."""
    last = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    return last.num_features


def _imagenet_state(name: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that drops packets must not hang the job
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except Exception as error:  # URLError, a wrong hash, and whatever a damaged file raises
        reason = str(error) or type(error).__name__
        raise MammoError(
            f"ImageNet weights of {name} are missing or damaged and can't be downloaded ({reason}).\n"
            f"  get:   {weights.url}\n"
            f"  put:   {file}\n"
            f"  or:    --weights PATH of that file, or --weights none to start from random weights"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def read_backbone_state(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Backbone weights in torchvision names, without `fc`, and the architecture where it is recorded.

    Reads backbone.safetensors, a checkpoint of this script, or a plain state dict. Files are read with
    weights_only=True: nothing in them is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise MammoError(f"weights {path}: no such file (imagenet, none or a path)")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                name = (file.metadata() or {}).get("backbone", "")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            name = content.get("config", {}).get("backbone", "")
            state = content.get("model_state_dict", content.get("state_dict", content))
        if any(key.startswith("backbone.") for key in state):
            prefix = "backbone."
            state = {key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)}
        return {key: v for key, v in state.items() if not key.startswith("fc.")}, name
    except Exception as error:  # torch and safetensors raise many kinds on damaged files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise MammoError(f"weights {path}: can't be read ({reason})") from error


def _load_state(backbone: nn.Module, state: dict[str, Tensor], source: str) -> None:
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        backbone.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise MammoError(
            f"weights {source} don't fit the backbone: {reason[:200]}; does --backbone match the file?"
        ) from error


def load_backbone(path: str | Path) -> nn.Module:
    """The trained backbone of a run as a torchvision ResNet in eval mode, `fc` an identity.

    `path`: backbone.safetensors, or any mammogram_byol_*.pth. Input (B, 3, H, W), standardised as
    make_view does: scaled to [0, 1] by the image's window, minus GREY_MEAN, over GREY_STD.
    """
    state, name = read_backbone_state(path)
    name = name or _architecture(state)
    if name not in torchvision.models.list_models():
        raise MammoError(f"weights {path}: torchvision has no model {name!r}")
    backbone = build_backbone(name)
    _load_state(backbone, state, str(path))
    return backbone.eval()


def _architecture(state: dict[str, Tensor]) -> str:
    """Which of the known ResNets a state dict belongs to, by its blocks."""
    if "layer1.0.conv3.weight" in state:
        return "resnet50"
    return "resnet34" if "layer1.2.conv1.weight" in state else "resnet18"


class MammogramBYOL(nn.Module):
    """BYOL (Grill et al. 2020): an online network, its slowly moving target, a classification head.

    `backbone` is a torchvision ResNet (its `fc` is replaced by an identity) or any module that maps
    (B, 3, H, W) to (B, input_dim). Inputs x are (B, 1 or 3, H, W) float; grad and eval mode are the
    caller's. The classification head is trained by train_classifier.py, not by BYOL.
    """

    def __init__(
        self,
        backbone: nn.Module,
        input_dim: int = INPUT_DIM,
        hidden_dim: int = HIDDEN_DIM,
        proj_dim: int = PROJ_DIM,
    ) -> None:
        super().__init__()
        if hasattr(backbone, "fc"):
            backbone.fc = nn.Identity()
        self.grad_checkpoint = False
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(input_dim, hidden_dim, proj_dim)
        self.prediction_head = BYOLPredictionHead(proj_dim, hidden_dim, proj_dim)
        self.backbone_momentum = copy.deepcopy(backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.classification_head = nn.Sequential(
            nn.Linear(input_dim, CLASSIFIER_HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(CLASSIFIER_HIDDEN, len(CLASSES)),
        )

    def get_features(self, x: Tensor) -> Tensor:
        """Online features: (B, 1 or 3, H, W) -> (B, input_dim)."""
        return self._run_backbone(self.backbone, x).flatten(1)

    def feature_map(self, x: Tensor) -> Tensor:
        """Online features before pooling: (B, 1 or 3, H, W) -> (B, input_dim, H/32, W/32).

        For torchvision models that end in `avgpool` and `fc`.
        """
        layers = list(self.backbone.children())[:-2]
        return self._run_backbone(
            lambda image: functools.reduce(lambda y, layer: layer(y), layers, image), x
        )

    def _run_backbone(self, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = _three_channels(x)
        if self.grad_checkpoint and torch.is_grad_enabled():
            # Chen et al. 2016 (arXiv:1604.06174): activations are computed again in the backward pass.
            contexts = lambda: (nullcontext(), statistics_frozen(self.backbone))  # noqa: E731
            return checkpoint(layers, x, use_reentrant=False, context_fn=contexts)
        return layers(x)

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Online projection and prediction of features, each (B, proj_dim)."""
        projection = self.projection_head(features)
        return projection, self.prediction_head(projection)

    def forward(self, x: Tensor) -> Tensor:
        """Online prediction: (B, 1 or 3, H, W) -> (B, proj_dim)."""
        return self.project(self.get_features(x))[1]

    @torch.no_grad()
    def forward_target(self, x: Tensor) -> Tensor:
        """Target projection, without gradient: (B, 1 or 3, H, W) -> (B, proj_dim)."""
        features = self.backbone_momentum(_three_channels(x)).flatten(1)
        return self.projection_head_momentum(features)

    def classify(self, x: Tensor) -> Tensor:
        """Logits of CLASSES: (B, 1 or 3, H, W) -> (B, 2), the head in its own precision under autocast.

        The three digits of bf16 would give many tiles one and the same probability.
        """
        features = self.get_features(x)
        with torch.autocast(x.device.type, enabled=False):
            dtype = next(self.classification_head.parameters()).dtype
            return self.classification_head(features.to(dtype))

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * online, after the optimiser step."""
        update_momentum(self.backbone, self.backbone_momentum, momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, momentum)


@contextmanager
def statistics_frozen(module: nn.Module) -> Iterator[None]:
    """Batch norm with the batch's statistics that leaves the running ones as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(count)


def _three_channels(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


# ---- 8 Objective ------------------------------------------------------------------------------------


# An objective is what a step minimises. Another one is another class here and a line in build_objective;
# the loop, monitoring, checkpoints and reports ask it for what they need.


class ParameterGroup(NamedTuple):
    """Modules that the optimiser trains alike."""

    modules: list[nn.Module]
    lr_factor: float = 1.0  # of the learning rate
    decays: bool = True  # weight decay, but for biases and norm parameters


class Objective(nn.Module, ABC):
    """What a step minimises, as one module: DistributedDataParallel wants a single forward per step."""

    # Title of the curve of each metric of its own; metrics.csv has a column for each.
    curves: ClassVar[dict[str, str]] = {"loss": "loss"}

    def __init__(self, model: MammogramBYOL) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def trained(self) -> list[ParameterGroup]:
        """What the optimiser gets; all other parameters are frozen."""

    @abstractmethod
    def forward(self, views: Sequence[View]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and scalars by name: `feature_std` and those of `curves`, detached.

        `views` has one View for each of VIEWS.
        """

    def after_step(self, step: int, total_steps: int) -> dict[str, float]:
        """What follows the optimiser's step number `step`, counted from 0; returns metrics by name."""
        return {}

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, input_dim) where collapse is judged: the spread of what this returns (B, D)."""
        return features

    def own_state(self) -> dict[str, Tensor]:
        """What a resumption needs beyond the model."""
        return {name: v for name, v in self.state_dict().items() if not name.startswith("model.")}


class BYOL(Objective):
    """The symmetric loss of BYOL, -1 at perfect agreement (eq. 2 of the paper is 2 + 2 times this).

    Each view passes alone, so that batch statistics belong to one view (section 3.2).
    """

    curves: ClassVar[dict[str, str]] = {
        "loss": "BYOL loss (-1 = agreement)",
        "momentum": "target momentum",
    }

    def __init__(self, model: MammogramBYOL, momentum_base: float = MOMENTUM_BASE) -> None:
        super().__init__(model)
        self.momentum_base = momentum_base
        self.criterion = NegativeCosineSimilarity()

    def trained(self) -> list[ParameterGroup]:
        """The online network."""
        model = self.model
        return [ParameterGroup([model.backbone, model.projection_head, model.prediction_head])]

    def forward(self, views: Sequence[View]) -> tuple[Tensor, dict[str, Tensor]]:
        """BYOL's loss of two views."""
        loss, metrics = self.byol_loss(views, [self.model.get_features(view.image) for view in views])
        return loss, metrics

    def byol_loss(
        self, views: Sequence[View], features: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss from the online features of two views, in fp32 also under autocast."""
        projection, prediction_1 = self.model.project(features[0])
        _, prediction_2 = self.model.project(features[1])
        target_1, target_2 = (self.model.forward_target(view.image) for view in views)
        loss = self.criterion(prediction_1.float(), target_2.float())
        loss = 0.5 * (loss + self.criterion(prediction_2.float(), target_1.float()))
        return loss, {"loss": loss.detach(), "feature_std": feature_std(projection.detach())}

    def after_step(self, step: int, total_steps: int) -> dict[str, float]:
        """Move the target; its momentum rises from MOMENTUM_BASE to 1 by a cosine (section 3.2)."""
        momentum = float(cosine_schedule(step, total_steps, self.momentum_base, 1.0))
        self.model.update_target(momentum)
        return {"momentum": momentum}

    def embed(self, features: Tensor) -> Tensor:
        """Online projections."""
        return self.model.projection_head(features)


# What BYOL may ignore gets a target of its own: nothing in BYOL's loss asks for specks, which the blur
# of one view hides from the other. One number for a whole tile is learnt too slowly (few tiles hold
# specks, which are a thousandth of their pixels); one for each position of the last feature map is not.
SPECK_QUANTITIES = 3
SPECK_TAPS = (0.054, 0.244, 0.404, 0.244, 0.054)  # Gaussian, 1 px of the view
FEATURE_STRIDE = 32  # px of the view for each position of a ResNet's last feature map
PROMINENCE_RANGE = (0.5, 8.0)  # local deviations; a speck of more is as clear as it can be
PLAIN_PROMINENCE = 3.0  # that plain tissue seldom reaches


def speck_targets(sharp: Tensor, taps: Tensor) -> Tensor:
    """What the frequency target asks of each FEATURE_STRIDE px cell of views before photometry.

    `sharp` (B, 1, S, S) in units of the window, `taps` SPECK_TAPS on its device ->
    (B, SPECK_QUANTITIES, S/32, S/32): 0 log of the cell's highest prominence, 1 its excess over
    PLAIN_PROMINENCE, 2 log of the mean curvature's deviation. Prominence is what frequency_energy adds
    up: the weaker of the two curvatures over the local deviation of the mean curvature, here at the
    scale of 3 px of the view.
    """
    kernel = torch.outer(taps, taps)[None, None]
    smooth = F.conv2d(F.pad(sharp, (3, 3, 3, 3), mode="replicate"), kernel)
    right, left, below, above = (
        smooth[:, :, 1:-1, 2:], smooth[:, :, 1:-1, :-2], smooth[:, :, 2:, 1:-1], smooth[:, :, :-2, 1:-1]
    )  # fmt: skip
    middle = smooth[:, :, 1:-1, 1:-1]
    across, down = right + left - 2 * middle, below + above - 2 * middle
    corners = (
        smooth[:, :, 2:, 2:] + smooth[:, :, :-2, :-2] - smooth[:, :, 2:, :-2] - smooth[:, :, :-2, 2:]
    )
    mean = (across + down) / 2
    weaker = -mean - torch.sqrt(((across - down) / 2) ** 2 + (corners / 4) ** 2)
    around = F.pad(mean**2, (16, 16, 16, 16), mode="replicate")
    around = F.avg_pool2d(F.avg_pool2d(around, (33, 1), stride=1), (1, 33), stride=1)
    deviation = around.sqrt() + 2e-4  # the floor stands for rounding
    cells = -(-sharp.shape[-1] // FEATURE_STRIDE)
    prominence = F.adaptive_max_pool2d(weaker / deviation, cells).clamp(*PROMINENCE_RANGE)
    energy = F.adaptive_avg_pool2d(mean**2, cells)
    excess = (prominence - PLAIN_PROMINENCE).clamp_min(0)
    return torch.cat([prominence.log(), excess, (energy + 1e-7).log() / 2], dim=1)


class SpeckBYOL(BYOL):
    """BYOL, and the frequency target beside it: a linear head finds each cell's specks.

    Its loss is the squared error, summed over the quantities, with which the head predicts the
    standardised speck_targets of each view from its feature map; it starts near SPECK_QUANTITIES.
    """

    curves: ClassVar[dict[str, str]] = {
        **BYOL.curves,
        "freq_loss": f"frequency loss (starts near {SPECK_QUANTITIES})",
    }

    def __init__(
        self, model: MammogramBYOL, sample: Tensor, input_dim: int, weight: float, momentum_base: float
    ) -> None:
        """`sample` (N, 1, S, S): sharp plain views, which scale the quantities."""
        super().__init__(model, momentum_base)
        self.weight = weight
        self.speck_head = nn.Conv2d(input_dim, SPECK_QUANTITIES, 1)  # starts at zero
        for parameter in self.speck_head.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("taps", torch.tensor(SPECK_TAPS), persistent=False)
        quantities = torch.cat([speck_targets(part, self.taps) for part in sample.split(32)])
        deviation = quantities.std((0, 2, 3), keepdim=True).clamp_min(0.05)
        self.register_buffer("mean", quantities.mean((0, 2, 3), True), persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def trained(self) -> list[ParameterGroup]:
        """The online network and the head, which decays no more than a bias does."""
        return [*super().trained(), ParameterGroup([self.speck_head], decays=False)]

    def forward(self, views: Sequence[View]) -> tuple[Tensor, dict[str, Tensor]]:
        """BYOL's loss plus the weighted frequency loss."""
        maps = [self.model.feature_map(view.image) for view in views]
        loss, metrics = self.byol_loss(views, [found.mean((2, 3)) for found in maps])
        errors = [
            F.mse_loss(self.speck_head(found).float(), self.targets(view))
            for found, view in zip(maps, views, strict=True)
        ]
        freq_loss = SPECK_QUANTITIES * (errors[0] + errors[1]) / 2
        return loss + self.weight * freq_loss, {**metrics, "freq_loss": freq_loss.detach()}

    @torch.no_grad()
    def targets(self, view: View) -> Tensor:
        """Standardised speck_targets (B, SPECK_QUANTITIES, S/32, S/32), in fp32 also under autocast."""
        with torch.autocast(view.sharp.device.type, enabled=False):
            return (speck_targets(view.sharp, self.taps) - self.mean) / self.deviation


SPECK_SAMPLE = 256  # tiles that scale the quantities of speck_targets


def build_objective(
    model: MammogramBYOL, config: Config, tiles: MammogramTiles, train_ids: np.ndarray
) -> Objective:
    """The objective that the settings ask for, on the CPU."""
    if not config.freq_loss_weight:
        return BYOL(model, config.momentum_base)
    ids = train_ids[:: -(-len(train_ids) // SPECK_SAMPLE)]
    parts = np.array_split(ids, -(-len(ids) // 32))
    views = [make_view(tiles, part, PLAIN_VIEW, config.view_side) for part in parts]
    sample = torch.cat([view.sharp.cpu() for view in views])
    return SpeckBYOL(model, sample, config.input_dim, config.freq_loss_weight, config.momentum_base)


def build_optimizer(objective: Objective, config: Config) -> torch.optim.Optimizer:
    """AdamW or LARS over what the objective trains; all its other parameters are frozen."""
    objective.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for modules, lr_factor, decays in objective.trained():
        decayed, plain = get_weight_decay_parameters(modules)
        parts = [(decayed, config.weight_decay), (plain, 0.0)] if decays else [(decayed + plain, 0.0)]
        groups += [{"params": part, "weight_decay": w, "lr_factor": lr_factor} for part, w in parts]
        nn.ModuleList(modules).requires_grad_(True)
    if config.optimizer == "lars":
        return LARS(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


class LARS(torch.optim.Optimizer):
    """SGD with momentum, each tensor's step in proportion to its norm (You et al. 2017, 1708.03888).

    Groups without weight decay (biases, norms) are not adapted, as in BYOL. The formula is that of
    lightly's LARS, which asks the device for two norms per tensor; here nothing waits for the device.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            steps: Any = [p.grad for p in params]
            decay = group["weight_decay"]
            if decay and params:
                norms = zip(torch._foreach_norm(params), torch._foreach_norm(steps), strict=True)
                scales, decays = [], []
                for of_weight, of_grad in norms:
                    usable = (of_weight > 0) & (of_grad > 0)
                    scale = group["trust"] * of_weight / (of_grad + decay * of_weight + 1e-8)
                    scales.append(torch.where(usable, scale, 1.0))
                    decays.append(torch.where(usable, scale * decay, 0.0))
                steps = torch._foreach_mul(steps, scales)
                torch._foreach_add_(steps, torch._foreach_mul(params, decays))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def learning_rate(
    step: int, total_steps: int, steps_per_epoch: int, config: Config, processes: int = 1
) -> float:
    """Linear warm-up, then cosine to 0. The peak grows with the global batch.

    With its square root, the rule for adaptive optimisers (Malladi et al. 2022, arXiv:2205.10287), or
    in proportion for LARS (BYOL, section 3.3).
    """
    growth = config.batch_size * processes / LR_BATCH
    peak = config.lr * (growth if config.optimizer == "lars" else math.sqrt(growth))
    warmup = min(config.warmup_epochs * steps_per_epoch, total_steps // 2)
    return float(cosine_warmup_schedule(step, total_steps, peak, 0.0, warmup, 0.0))


# ---- 9 Checkpoint ----------------------------------------------------------------------------------

# A resumed run says so where this code is not what the run began with.
TRAINING_CODE = ((__file__, "# ---- 6 Views", "# ---- 12 Entry"),)
UNFINISHED = ".unfinished."  # how the name of a file begins until it is complete


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`."""
    path = Path(path)
    temporary = path.with_name(f"{UNFINISHED}{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError inside, as that of a full disk, the name of the file that was to be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error}, is the disk full?"  # NumPy gives no number
        raise OSError(error.errno, reason, str(path)) from error


def sweep(folder: Path, name: str = "") -> None:
    """Remove what a killed process left half-written in a folder, of one file or of all."""
    for leftover in folder.glob(f"{UNFINISHED}{name}*"):
        leftover.unlink(missing_ok=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(path: Path, run: Run, resumable: bool = False) -> None:
    """Write the model and its settings as plain types; with `resumable` all that a restart needs.

    Raises MammoError, and leaves the file as it is, where a value is not a number.
    """
    content: dict[str, Any] = {
        "model_state_dict": run.model.state_dict(),
        "config": dataclasses.asdict(run.config),
        "classes": list(CLASSES),
        "step": run.step,
        "epoch": run.step // run.steps_per_epoch,
        "monitor": dict(run.monitor),
    }
    if resumable:
        content["optimizer"] = run.optimizer.state_dict()
        content["scaler"] = run.scaler.state_dict()
        content["cache_key"] = run.tiles.cache.name
        content["cached"] = cache_digest(run.tiles.cache)
        content["processes"] = run.world.size
        content["precision"] = precision_name(run.config, run.device)
        content["steps_per_epoch"] = run.steps_per_epoch
        content["best"] = run.best
        content["objective"] = run.objective.own_state()
        content["healthy"] = run.healthy
        content["wandb_id"] = run.wandb_id
        content["code"] = run.code
    write_checkpoint(path, content)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write plain types and tensors for load_checkpoint. Raises MammoError where one is no number."""
    content = on_cpu(content)
    if not all_finite(content):
        raise MammoError(f"{path} is not written: its values are no numbers; the file before it stays")
    buffer = io.BytesIO()  # torch.save to a full disk would raise a RuntimeError that says nothing of it
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def on_cpu(content: Any) -> Any:
    """Nested dicts and lists with their tensors on the CPU: plain torch.load then needs no GPU."""
    if isinstance(content, Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {key: on_cpu(part) for key, part in content.items()}
    return [on_cpu(part) for part in content] if isinstance(content, list | tuple) else content


def all_finite(content: Any) -> bool:
    """Whether no tensor in nested dicts and lists holds NaN or infinity."""
    if isinstance(content, Tensor):
        return bool(content.isfinite().all())
    parts = content.values() if isinstance(content, dict) else content
    return not isinstance(content, dict | list) or all(map(all_finite, parts))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint with weights_only=True. Raises MammoError where it is missing or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MammoError(f"checkpoint {path}: no such file") from error
    except Exception as error:  # damaged archives raise many kinds
        raise MammoError(f"checkpoint {path}: can't be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise MammoError(f"checkpoint {path}: can't be read (it holds no dict)")
    return content


def resume_run(run: Run, state: dict[str, Any]) -> None:
    """Put the saved state into a run. Raises MammoError where settings differ that shape the weights."""
    now, then = dataclasses.asdict(run.config), state["config"]
    names = [name for name in now if name not in FREE_ON_RESUME and now[name] != then.get(name)]
    changed = [f"--{name} {then.get(name)} -> {now[name]}" for name in names]
    changed += changed_tiles(state, run.tiles.cache)
    if changed:
        raise MammoError(
            f"{run.folder} holds a run with other settings: {'; '.join(changed)}.\n"
            "  Give --run_name NAME for a new run, or --no_resume to move the old one aside."
        )
    run.model.load_state_dict(state["model_state_dict"])
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where the state was saved in another precision than fp16
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.monitor = state["step"], state["monitor"]
    if run.world.leads:
        note_precision(state, precision_name(run.config, run.device))
    if state["processes"] != run.world.size:  # the same place in the schedule, with other batches
        run.step = round(state["step"] * run.steps_per_epoch / state["steps_per_epoch"])
    run.best, run.healthy, run.wandb_id = state["best"], state["healthy"], state["wandb_id"]
    # Until version 0.1.0 a state held the frequency target's head by itself.
    own = {f"speck_head.{name}": value for name, value in state.get("speck_head", {}).items()}
    own = state.get("objective", own)
    missing, unexpected = run.objective.load_state_dict(own, strict=False)
    if unexpected or any(not name.startswith("model.") for name in missing):
        raise KeyError("objective")
    note_changed_code(run, state)


def changed_tiles(state: dict[str, Any], cache: Path) -> list[str]:
    """What to say where a saved state saw other tiles than those of `cache`; empty where it saw them."""
    former = cache.with_name(state["cache_key"])
    seen = state.get("cached")
    if seen is None and is_finished(former):  # until version 0.1.0 a state named its cache alone
        seen = cache_digest(former)
    if seen is None:
        return [f"perhaps the tiles, since its cache {former} is gone"]
    return [] if seen == cache_digest(cache) else ["the images, their tile settings or the tile code"]


def note_changed_code(run: Run, state: dict[str, Any]) -> None:
    """Say so where a state was saved by other code of views and training than goes on now."""
    then, now = state.get("code", run.code), run.code
    if run.world.leads and then["training"] != now["training"]:
        print(
            f"note: the code of views and training has changed since this run was saved: commit "
            f"{then['commit'][:12]} then, {now['commit'][:12]} now",
            file=sys.stderr,
        )


def note_precision(state: dict[str, Any], precision: str) -> None:
    """Say on stderr that a state was saved in another precision than --precision auto gives here."""
    if state["precision"] != precision:
        print(
            f"note: saved in {state['precision']}, resumed in {precision}, as --precision auto chooses "
            "here: the weights will not be bit-equal",
            file=sys.stderr,
        )


def move_aside(folder: Path) -> None:
    """Rename a run's folder to the first free NAME_1, NAME_2, ...: nothing is lost."""
    number = 1
    while folder.with_name(f"{folder.name}_{number}").exists():
        number += 1
    os.replace(folder, folder.with_name(f"{folder.name}_{number}"))


def export_backbone(model: MammogramBYOL, path: Path, config: Config) -> None:
    """Write the online backbone so that torchvision's model of that name loads it strictly.

    `fc` is written as zeros: BYOL has no ImageNet classes, and strict loading wants the keys.
    """
    state = {key: value.cpu().contiguous() for key, value in model.backbone.state_dict().items()}
    state |= {"fc.weight": torch.zeros(1000, config.input_dim), "fc.bias": torch.zeros(1000)}
    metadata = {"backbone": config.backbone, "grey_mean": str(GREY_MEAN), "grey_std": str(GREY_STD)}
    with replacing(path) as temporary:
        temporary.write_bytes(to_safetensors(state, metadata))


# ---- 10 Monitoring ---------------------------------------------------------------------------------

COLLAPSE_STD = 0.2  # feature std below which a run counts as collapsed (1 = isotropic)
METRICS = (  # and those of the objective, see Objective.curves
    "step epoch loss lr momentum feature_std tiles_per_s batches_per_s seconds_left breast_ratio "
    "gpu_memory_gb gpu_utilisation monitor_std monitor_rankme freq_loss monitor_auroc "
    "monitor_auroc_mass monitor_auroc_calcification"
).split()


def feature_std(features: Tensor) -> Tensor:
    """Mean standard deviation of L2-normalised features (B, D), times sqrt(D): 1 = isotropic, 0 = one
    point (Chen & He 2021, SimSiam, section 4.1)."""
    normalised = F.normalize(features.float(), dim=1)
    return normalised.std(0).mean() * features.shape[1] ** 0.5


def rankme(features: Tensor) -> Tensor:
    """Effective rank of features (B, D): exp of the entropy of the singular values (Garrido 2023)."""
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return torch.exp(-(share * share.log()).sum())


@torch.no_grad()
def encode(run: Run, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Features (N, input_dim) and embeddings (N, D), see Objective.embed, of plain tiles `ids` (N,).

    In eval mode; float32 on the CPU.
    """
    run.model.eval()
    outputs = []
    for part in np.array_split(ids, -(-len(ids) // run.config.batch_size)):
        view = make_view(run.tiles, part, PLAIN_VIEW, run.config.view_side, device=run.device)
        with run.autocast():
            features = run.model.get_features(view.image)
            outputs.append((features.float().cpu(), run.objective.embed(features).float().cpu()))
    run.model.train()
    features, embeddings = map(torch.cat, zip(*outputs, strict=True))
    return features, embeddings


def monitor_metrics(run: Run) -> dict[str, float]:
    """Feature std of the embeddings and RankMe of the backbone features on the monitor tiles.

    The features stay with the run, for embedding.png.
    """
    run.features, embeddings = encode(run, run.monitor_ids)
    return {"std": float(feature_std(embeddings)), "rankme": float(rankme(run.features))}


LABEL_COVER = 0.25  # share of a box that makes a tile positive, even without the box's centre
PROBE_TILES = 2000  # labelled tiles of the online probe, half of them positive where there are enough
PROBE_FOLDS = 3  # by study
PROBE_STRENGTH = 0.01  # inverse weight decay of its logistic regression on standardised features
# VinDr-Mammo's names of findings that are not the column's name in lower case.
FINDING_ALIASES = {"suspicious_calcification": "calcification"}


def read_labels(path: str | Path, findings: Sequence[str] = CLASSES) -> pd.DataFrame:
    """labels.csv as written by prepare_dataset.py, one row for each image.

    Columns: `image` (path relative to the file's folder, or a bare name), each of `findings` as float
    (1, 0, NaN = unknown), `boxes` as lists of dicts with `finding` (set of column names), xmin, ymin,
    xmax, ymax in px; the others as text, '' where absent (study_id, patient_id, split, laterality,
    view, breast_density). Raises MammoError with file, row and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise MammoError(f"labels {path}: no such file; prepare_dataset.py --findings_csv writes it")
    table = read_table(path, ["image", *findings], "prepare_dataset.py --findings_csv writes it")
    twice = table["image"][table["image"].duplicated()]
    if len(twice):
        raise MammoError(f"labels {path}: {twice.iloc[0]} has more than one row")
    for name in findings:
        number = pd.to_numeric(table[name].replace("", "nan"), errors="coerce")
        wrong = ~(number.isin([0, 1]) | table[name].str.lower().isin(["", "nan"]))
        if wrong.any():
            row = table[wrong].iloc[0]
            raise MammoError(
                f"labels {path}: {name} of {row['image']} is {row[name]!r}, not 0, 1 or empty"
            )
        table[name] = number
    for name in ("study_id", "patient_id", "split", "laterality", "view", "breast_density", "boxes"):
        if name not in table:
            table[name] = ""
    table["boxes"] = [
        _read_boxes(path, *row) for row in zip(table["image"], table["boxes"], strict=True)
    ]
    return table


def _read_boxes(path: Path, image: str, text: str) -> list[dict[str, Any]]:
    """The boxes of one row; their findings by column name. Raises MammoError."""
    try:
        boxes = json.loads(text or "[]")
        for box in boxes:
            names = [name.strip().lower().replace(" ", "_") for name in box["finding"]]
            box["finding"] = {FINDING_ALIASES.get(name, name) for name in names}
            edges = [float(box[name]) for name in ("xmin", "ymin", "xmax", "ymax")]
            if not all(map(math.isfinite, edges)) or edges[2] <= edges[0] or edges[3] <= edges[1]:
                raise ValueError(f"box {edges} has no area")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise MammoError(f"labels {path}: boxes of {image} can't be read ({error!r})") from error
    return boxes


def match_labels(
    labels: pd.DataFrame, folder: Path, images: Sequence[str], data_dir: Path
) -> np.ndarray:
    """Row of `labels` for each of `images` (paths relative to data_dir), -1 where there is none.

    `folder` is that of labels.csv; full paths are compared first, then bare file names, where one alone
    has that name.
    """
    folder, data_dir = folder.resolve(), data_dir.resolve()
    by_path = {str(folder / name): row for row, name in enumerate(labels["image"])}
    names = labels["image"].map(lambda name: Path(name).name)
    single = names[~names.duplicated(keep=False)]
    by_name = dict(zip(single, single.index, strict=True))
    rows = [by_path.get(str(data_dir / name), by_name.get(Path(name).name, -1)) for name in images]
    return np.array(rows, dtype=int)


def patients(table: pd.DataFrame) -> pd.Series:
    """What splits, folds and intervals go by, for rows with study_id and patient_id ('' = unknown): the
    patient of the study where any of its rows names one, else the study."""
    known = table["patient_id"].where(table["patient_id"] != "")
    return known.groupby(table["study_id"]).transform("first").fillna(table["study_id"])


def with_manifest(labels: pd.DataFrame, found: np.ndarray, sources: pd.DataFrame) -> pd.DataFrame:
    """Labels with study, side and view of their images also where only the manifest knows them, and
    with `patient` (see patients); `found` gives the row of `labels` for each of `sources`, a table with
    these columns."""
    known = sources.assign(row=found).drop_duplicates("row").set_index("row").reindex(labels.index)
    known = known[["study_id", "laterality", "view"]].fillna("")
    study = labels["study_id"].where(labels["study_id"] != "", known["study_id"])
    side, view = (known[n].where(known[n] != "", labels[n]) for n in ("laterality", "view"))
    labels = labels.assign(
        study_id=study.where(study != "", labels["image"]), laterality=side, view=view
    )
    return labels.assign(patient=patients(labels))


def tile_labels(
    tiles: pd.DataFrame, rows: np.ndarray, labels: pd.DataFrame, size: int, findings: Sequence[str]
) -> np.ndarray:
    """(N, findings) float32: 1, 0, or NaN = left out, for `tiles` (x, y, image) of `size` px.

    `rows` gives the row of `labels` for each image, -1 = unlabelled. A tile is positive where it holds
    a box's centre or LABEL_COVER of it, and left out where it merely touches one. Away from boxes it
    is negative if the image is known to be without the finding, or if boxes say where it lies.
    """
    out = np.full((len(tiles), len(findings)), np.nan, np.float32)
    for image, group in tiles.groupby("image"):
        row = rows[int(image)]
        if row < 0:
            continue
        index = tiles.index.get_indexer(group.index)
        for column, finding in enumerate(findings):
            boxes = [box for box in labels["boxes"][row] if finding in box["finding"]]
            known = labels[finding][row]
            if boxes or known == 0:
                out[index, column] = 0
            for state in (np.nan, 1):  # positive wins where a tile touches one box and holds another
                for box in boxes:
                    holds, touches = _tile_holds(group, box, size)
                    out[index[touches if np.isnan(state) else holds], column] = state
    return out


def _tile_holds(tiles: pd.DataFrame, box: dict[str, Any], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tiles hold a box's centre or LABEL_COVER of it, and which touch it; both (N,) bool."""
    x, y = tiles["x"].to_numpy(), tiles["y"].to_numpy()
    x0, y0, x1, y1 = (float(box[name]) for name in ("xmin", "ymin", "xmax", "ymax"))
    across = (np.minimum(x + size, x1) - np.maximum(x, x0)).clip(0)
    down = (np.minimum(y + size, y1) - np.maximum(y, y0)).clip(0)
    cover = across * down / ((x1 - x0) * (y1 - y0))
    centre_x, centre_y = (x0 + x1) / 2, (y0 + y1) / 2
    centred = (x <= centre_x) & (centre_x < x + size) & (y <= centre_y) & (centre_y < y + size)
    return centred | (cover >= LABEL_COVER), cover > 0


@dataclass(frozen=True)
class Probe:
    """Labelled tiles of a run: ids (N,), targets (N, CLASSES) with NaN = unknown, studies (N,) or
    patients where known."""

    ids: np.ndarray
    targets: np.ndarray
    studies: np.ndarray


def prepare_probe(tiles: MammogramTiles, config: Config) -> Probe | None:
    """The online probe's tiles, None without LABELS. Raises MammoError where there are too few."""
    if not config.labels:
        return None
    path = Path(config.labels)
    labels = read_labels(path)
    rows = match_labels(labels, path.parent, tiles.images["image"], Path(config.data_dir))
    targets = tile_labels(tiles.table, rows, labels, tiles.tile_size, CLASSES)
    rng = np.random.default_rng([config.seed, 3])
    image = tiles.table["image"].to_numpy()
    order = spread_over_images(image, rng)
    positive = order[(targets[order] == 1).any(1)][: PROBE_TILES // 2]
    negative = order[(targets[order] == 0).any(1) & ~(targets[order] == 1).any(1)]
    ids = np.sort(np.concatenate([positive, negative[: PROBE_TILES - len(positive)]]))
    patient = with_manifest(labels, rows, tiles.images)["patient"]
    studies = patient.reindex(rows[image[ids]]).to_numpy(str)
    probe = Probe(ids, targets[ids], studies)
    for column, name in enumerate(CLASSES):
        for value, word in ((1, "with"), (0, "without")):
            count = len(set(studies[probe.targets[:, column] == value]))
            if count < PROBE_FOLDS:
                raise MammoError(
                    f"labels {path}: {count} studies have tiles {word} {name}, the online probe needs "
                    f"{PROBE_FOLDS}; add labels, loosen the tile settings, or leave --labels out"
                )
    return probe


def run_probe(run: Run, probe: Probe) -> dict[str, float]:
    """Out-of-fold AUROC of a logistic probe on frozen features, folds by study; mean and per class."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    logistic = LogisticRegression(C=PROBE_STRENGTH, class_weight="balanced", max_iter=5000, tol=1e-3)
    model = make_pipeline(StandardScaler(), logistic)
    folds = StratifiedGroupKFold(PROBE_FOLDS, shuffle=True, random_state=run.config.seed % 2**32)
    features, out = encode(run, probe.ids)[0].numpy(), {}
    for name, target in zip(CLASSES, probe.targets.T, strict=True):
        known = np.isfinite(target)
        x, y, studies = features[known], target[known].astype(int), probe.studies[known]
        scores = cross_val_predict(model, x, y, groups=studies, cv=folds, method="decision_function")
        out[f"auroc_{name}"] = float(roc_auc_score(y, scores))
    return {"auroc": float(np.mean(list(out.values()))), **out}


LINE_EVERY = 60.0  # s between lines of progress in a log file
BAR = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {unit}s, {remaining} left{postfix}"


class LogLines(tqdm):
    """Progress in whole lines, every LINE_EVERY seconds and at the end: log files have no cursor."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.shown = time.monotonic()
        text = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"
        super().__init__(*args, **(options | {"bar_format": text}))

    def refresh(self, *args: Any, **options: Any) -> None:
        """Print a line where one is due."""
        if not self.disable and time.monotonic() - self.shown >= LINE_EVERY:
            self.shown = time.monotonic()
            self.display()

    def display(self, *args: Any, **options: Any) -> None:
        """Print the present state as a line."""
        print(self, file=self.fp, flush=True)

    def clear(self, *args: Any, **options: Any) -> None:
        """Leave what was printed."""

    def close(self) -> None:
        """Print the last line."""
        if not self.disable:
            self.display()
            self.delay = math.inf  # tqdm's own last line is not wanted
        super().close()


def progress(items: Any = None, mode: str = PROGRESS, **options: Any) -> tqdm:
    """Show how far a loop is, as PROGRESS says: a bar, whole lines, or nothing."""
    if mode == "none":
        options["disable"] = True
    if mode == "lines" or (mode == "auto" and not sys.stderr.isatty()):
        return LogLines(items, **options)
    return tqdm(items, mininterval=0.2, dynamic_ncols=True, bar_format=BAR, **options)


class MetricsFile:
    """metrics.csv, one row every LOG_EVERY steps. A resumed run drops rows of steps it repeats, and on
    another number of processes counts the others anew by their epoch."""

    def __init__(
        self, path: Path, columns: list[str], step: int, steps_per_epoch: int, enabled: bool = True
    ) -> None:
        self.path, self.columns, self.enabled = path, columns, enabled
        if not enabled:
            return
        kept = pd.DataFrame(columns=columns)
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.is_file() else ""
        if whole and step:  # without the last row, which a full disk cuts
            kept = pd.read_csv(io.StringIO(whole)).reindex(columns=columns)
            counted = (kept["epoch"] * steps_per_epoch).fillna(kept["step"])
            kept = kept.assign(step=counted.round().astype(int))
            kept = kept[kept["step"] <= step]
        write_atomic(path, kept.to_csv(index=False))

    def write(self, row: dict[str, float]) -> None:
        """Append one row; absent metrics stay empty."""
        if not self.enabled:
            return
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            digits = {"step": 12, "epoch": 12}  # a resumption counts by them
            cells = [f"{row[k]:.{digits.get(k, 6)}g}" if k in row else "" for k in self.columns]
            file.write(",".join(cells) + "\n")


class Tracker:
    """wandb in a thread of its own: training never waits for it, and its errors stay there.

    `auto` is online only where a login is found, otherwise offline; nothing leaves the machine unless
    asked. wandb is imported at the first row, so that it delays no first step, and never if disabled.
    """

    def __init__(self, run_id: str, config: Config, enabled: bool = True) -> None:
        self.items: queue.Queue[tuple[dict[str, Any], bool] | None] = queue.Queue()
        self.run_id, self.config, self.mode = run_id, config, wandb_mode(config)
        self.enabled = enabled and self.mode != "disabled"
        self.thread = threading.Thread(target=self._work, daemon=True)

    def log(self, row: dict[str, Any], summary: bool = False) -> None:
        """Queue metrics, a Path being sent as an image; with `summary` for the run as a whole."""
        if not self.enabled:
            return
        if self.thread.ident is None:
            self.thread.start()
        self.items.put((row, summary))

    def finish(self, timeout: float = 30) -> None:
        """Let the thread write what is queued, for at most `timeout` seconds; say how to upload it."""
        if self.thread.ident is None:
            return
        self.items.put(None)
        self.thread.join(timeout)
        if self.enabled and self.mode == "offline":
            runs = shlex.quote(str(self.config.run_dir / "wandb")) + f"/offline-run-*-{self.run_id}"
            print(f"tracking  wandb was offline; to upload this run: wandb sync {runs}", flush=True)

    def _work(self) -> None:
        # Otherwise wandb's own telemetry calls its makers, even offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb

            run = wandb.init(
                project=self.config.wandb_project,
                name=self.config.run_dir.name,
                id=self.run_id,
                resume="allow",
                mode=self.mode,  # type: ignore[arg-type]
                dir=str(self.config.run_dir),
                config=dataclasses.asdict(self.config),
                settings=wandb.Settings(console="off", silent=True),
            )
            while (item := self.items.get()) is not None:
                row, summary = item
                if summary:
                    run.summary.update(row)
                    continue
                pictures = {k: wandb.Image(str(v)) for k, v in row.items() if isinstance(v, Path)}
                run.log({**row, **pictures}, step=row.get("step"))
            run.finish()
        except Exception as error:  # tracking must never end a run
            self.enabled = False
            print(f"note: wandb stopped ({type(error).__name__}: {error})", file=sys.stderr)


def wandb_mode(config: Config) -> str:
    """Resolve --wandb_mode auto without touching the network."""
    if config.wandb_mode != "auto":
        return config.wandb_mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        login = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        login = None
    return "online" if os.environ.get("WANDB_API_KEY") or login else "offline"


# Okabe & Ito's colours stay apart for the colour-blind.
OKABE_ITO = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BREAST_COLOUR, MUSCLE_COLOUR = "#56b4e9", "#e69f00"
KEPT = Criterion("", "", "kept", "#009e73", "s")  # how tiles are marked that fail no criterion
PICTURE_WIDTH = 5.6  # inches: text of 9-10 pt stays readable where a phone shrinks the picture


@dataclass(frozen=True)
class Sample:
    """One image as the extraction sees it, for the pictures."""

    title: str
    image: np.ndarray  # (H, W) uint8 or uint16
    mask: np.ndarray  # (H, W) bool
    muscle: np.ndarray  # (H, W) bool
    table: pd.DataFrame  # score_tiles
    window: tuple[float, float]  # grey levels


def load_sample(index: int, source: pd.Series, config: Config) -> Sample:
    """Repeat the extraction of one row of list_sources. Raises ImageReadError."""
    spacing = source["spacing_mm"] if source["spacing_mm"] > 0 else config.pixel_spacing_mm
    image = read_mammogram(source["path"])
    mask = segment_breast_tissue(image)
    muscle = segment_pectoral_muscle(image, mask)
    table = score_tiles(image, mask, config, spacing)
    title = f"image {index} {source['laterality']} {source['view']}"
    return Sample(title, image, mask, muscle, table, intensity_window(image, mask))


def draw_extraction(sources: pd.DataFrame, config: Config, folder: Path, count: int = 4) -> None:
    """Write EXTRACTION_PICTURES of a few images that gave tiles, evenly spaced, into the cache."""
    rejections = pd.read_csv(folder / "rejections.csv", keep_default_na=False)
    usable = np.flatnonzero(rejections["kept"])
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int))]
    samples, sources = [], sources.set_index("image")
    for index in chosen:
        with suppress(ImageReadError, KeyError):  # changed or gone since it was extracted
            samples.append(load_sample(index, sources.loc[rejections["image"][index]], config))
    if not samples:
        return
    draw_segmentation(samples, folder / "segmentation.png")
    draw_grid(samples, config, folder / "grid.png")
    draw_tiles(samples, config, folder / "tiles.png")


def show_extraction(cache: Path, config: Config) -> None:
    """Draw EXTRACTION_PICTURES where a cache has none. A failure is a note: the cache can do without."""
    if all((cache / name).is_file() for name in EXTRACTION_PICTURES):
        return
    try:
        for name in EXTRACTION_PICTURES:
            sweep(cache, name)
        draw_extraction(list_sources(config.data_dir), config, cache)
    except Exception as error:
        print(f"note: no pictures of {cache} ({type(error).__name__}: {error})", file=sys.stderr)


def draw_qc_pages(config: Config, folder: Path) -> None:
    """<number>.png for each image: outlines and tile centres by outcome, to flip through."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (index, source, config, folder / f"{index:06d}.png")
        for index, source in list_sources(config.data_dir).iterrows()
        if not (folder / f"{index:06d}.png").is_file()
    ]
    bar = progress(mode=config.progress, total=len(jobs), desc="qc pages", unit="page")
    run_in_parallel(draw_qc_page, jobs, config.num_workers, bar)


def draw_qc_page(index: int, source: pd.Series, config: Config, path: Path) -> None:
    """One page of draw_qc_pages, for a row of list_sources."""
    from matplotlib.figure import Figure

    cv2.setNumThreads(1)
    figure = Figure(figsize=(7, 8))
    axes = figure.add_subplot()
    try:
        sample = load_sample(index, source, config)
    except ImageReadError as error:
        axes.set_title(f"image {index}: {error.reason}", fontsize=9)
        axes.set_axis_off()
    else:
        outline(axes, sample)
        mark_tiles(axes, sample, config)
        figure.legend(loc="lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def outline(axes: Any, sample: Sample) -> None:
    """Show an image with the outlines of breast and muscle."""
    show_grey(axes, sample.image, sample.title, *sample.window)
    for area, colour in ((sample.mask, BREAST_COLOUR), (sample.muscle, MUSCLE_COLOUR)):
        contours, _ = cv2.findContours(area.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        for points in contours:
            axes.plot(*points[:, 0].T, color=colour, linewidth=1.2)


def mark_tiles(axes: Any, sample: Sample, config: Config) -> None:
    """Mark the centres of an image's tiles by outcome."""
    centre = sample.table[["x", "y"]] + config.tile_size / 2
    for outcome in (KEPT, *CRITERIA):
        points = centre[sample.table["rejected_by"] == outcome.column]
        style = {"c": outcome.colour, "marker": outcome.marker, "label": outcome.title}
        axes.scatter(points["x"], points["y"], s=14, **style)


def panel_grid(count: int, columns: int, row_height: float) -> tuple[Any, list[Any]]:
    """A figure PICTURE_WIDTH wide with `count` panels in rows of `columns`, and those panels."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure: Any = Figure(figsize=(PICTURE_WIDTH, row_height * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def draw_segmentation(samples: list[Sample], path: Path) -> None:
    """segmentation.png: outlines of breast and muscle over each image."""
    figure, panels = panel_grid(len(samples), 2, 3.5)
    for axes, sample in zip(panels, samples, strict=True):
        outline(axes, sample)
    figure.suptitle("Breast (blue) and pectoral muscle (orange)", fontsize=11)
    save_figure(figure, path)


def draw_grid(samples: list[Sample], config: Config, path: Path) -> None:
    """grid.png: the tiles' centres over each image, by what became of a tile."""
    figure, panels = panel_grid(len(samples), 2, 3.7)
    for axes, sample in zip(panels, samples, strict=True):
        show_grey(axes, sample.image, sample.title, *sample.window)
        mark_tiles(axes, sample, config)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle("Centres of the tiles: kept, or why not", fontsize=11)
    save_figure(figure, path)


def draw_tiles(samples: list[Sample], config: Config, path: Path) -> None:
    """tiles.png: tiles with the most and the least fine detail among those kept, and rejected ones."""
    tables = [sample.table.assign(number=number) for number, sample in enumerate(samples)]
    table = pd.concat(tables, ignore_index=True)
    kept = table[table["rejected_by"] == ""].sort_values("freq_energy")
    lost = table[(table["rejected_by"] != "") & (table["breast_ratio"] > 0)]
    lost = in_turn(lost.sort_values("breast_ratio", ascending=False), "rejected_by")
    rows = {0: in_turn(kept[::-1], "number")[:3], 3: in_turn(kept, "number")[:3], 6: lost[:6]}
    figure, panels = panel_grid(12, 3, 2.35)
    for axes in panels:
        axes.set_axis_off()
    for first, group in rows.items():
        for axes, (_, tile) in zip(panels[first:], group.iterrows(), strict=False):
            sample, reason = samples[tile["number"]], tile["rejected_by"]
            area = tuple(slice(tile[axis], tile[axis] + config.tile_size) for axis in "yx")
            masked = np.where(sample.mask[area], sample.image[area], 0)
            text = f"kept\nenergy {tile['freq_energy']:.3f}"
            if reason:
                failed = next(criterion for criterion in CRITERIA if criterion.column == reason)
                text = f"{failed.title}\n{tile[reason]:.3g} of {getattr(config, failed.setting):g}"
            show_grey(axes, masked, text, *sample.window)
    figure.suptitle("Kept: most and least fine detail. Below: rejected", fontsize=11)
    save_figure(figure, path)


def in_turn(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows reordered: the first of each group of column `by`, then each group's second, ..."""
    return table.iloc[np.argsort(table.groupby(by).cumcount().to_numpy(), kind="stable")]


def draw_views(run: Run, path: Path, count: int = 4) -> None:
    """views.png: tiles beside the views of them that a step sees."""
    ids = run.train_ids[np.linspace(0, len(run.train_ids) - 1, count).astype(int)]
    plain = make_view(run.tiles, ids, PLAIN_VIEW, run.config.view_side)._replace(kind="tile")
    columns = plain, *make_views(run, run.tiles, ids, (run.config.seed, 0, 0))
    figure, panels = panel_grid(len(columns) * count, len(columns), 2.0)
    for index, axes in enumerate(panels):
        row, column = divmod(index, len(columns))
        grey = (columns[column].image[row, 0] * GREY_STD + GREY_MEAN).cpu().numpy()
        show_grey(axes, grey, columns[column].kind if row == 0 else "", 0, 1)
    save_figure(figure, path)


def draw_curves(metrics: pd.DataFrame, own: dict[str, str], path: Path) -> None:
    """curves.png: what is known of the objective's `own` metrics (titles by column), of feature std,
    RankMe, schedule and speed against the step."""
    curves = {
        **{title: {"": name} for name, title in own.items()},
        "feature std (1 = isotropic)": {"training tiles": "feature_std", "monitor tiles": "monitor_std"},
        "RankMe (effective rank)": {"monitor tiles": "monitor_rankme"},
        "learning rate": {"": "lr"},
        "speed (tiles per second)": {"": "tiles_per_s"},
        "probe AUROC": {name: f"monitor_auroc_{name}" for name in CLASSES},
    }
    known = set(metrics.columns[metrics.notna().any()])
    curves = {title: lines for title, lines in curves.items() if known & set(lines.values())}
    figure, panels = panel_grid(len(curves), 2, 2.5)
    for axes, (title, lines) in zip(panels, curves.items(), strict=True):
        for (label, name), colour in zip(lines.items(), OKABE_ITO[1::3], strict=False):
            line = metrics[["step", name]].dropna()
            marker = "." if len(line) < 30 else ""
            axes.plot(line["step"], line[name], marker=marker, color=colour, label=label)
        if "std" in title:
            axes.axhline(COLLAPSE_STD, color=OKABE_ITO[0], linestyle="--", label="collapse")
        if "std" in title or "RankMe" in title or "speed" in title:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        if len(lines) > 1:  # above the curves: a dip below the line of collapse must be seen
            axes.set_ylim(top=axes.get_ylim()[1] + 0.45 * np.ptp(axes.get_ylim()))
            axes.legend(fontsize=8, loc="upper center", ncols=2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_embedding(run: Run, features: Tensor, path: Path) -> None:
    """embedding.png: the monitor tiles' features on their two main axes, coloured by what is known."""
    unit, values, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    x, y = (unit[:, :2] * values[:2]).T.tolist()
    share = values**2 / (values**2).sum().clamp_min(1e-12)
    tiles = run.tiles.table.iloc[run.monitor_ids]
    views = run.tiles.images["view"].to_numpy()[tiles["image"]]
    known = views.astype(bool).any()
    figure, panels = panel_grid(3 if known else 2, 2, 2.9)
    names = {"mean_intensity": "mean grey (0-255)", "freq_energy": "speck energy"}
    for axes, (name, title) in zip(panels, names.items(), strict=False):
        low, high = np.percentile(tiles[name], (2, 98))  # a few outliers would take all colours
        dots = axes.scatter(x, y, s=8, c=tiles[name], cmap="cividis", vmin=low, vmax=high)
        axes.set_title(title, fontsize=10)
        figure.colorbar(dots, ax=axes).ax.tick_params(labelsize=8)
    if known:
        for view, colour in zip(sorted(set(views)), OKABE_ITO, strict=False):
            points = np.column_stack([x, y])[views == view].T
            panels[2].scatter(*points, s=8, color=colour, label=view or "unknown")
        panels[2].set_title("view", fontsize=10)
        panels[2].legend(fontsize=8)
    for axes in panels:
        axes.set_xlabel(f"1st axis ({share[0]:.0%} of variance)", fontsize=9)
        axes.set_ylabel(f"2nd axis ({share[1]:.0%})", fontsize=9)
        axes.tick_params(labelsize=8)
    save_figure(figure, path)


def show_grey(axes: Any, image: np.ndarray, title: str, low: float, high: float) -> None:
    """Show an image in grey, without ticks."""
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="antialiased")
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[], frame_on=False)  # not axis off: the notebook adds a ruler


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, bbox_inches="tight", facecolor="white")


COLLAPSE_ADVICE = (
    "all tiles look alike to the network. Lower --lr, raise --batch_size or --momentum_base."
)
REPORT_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: auto;
    padding: 1rem }
h1 { margin: 0 0 .5rem } h2 { margin: 2rem 0 .3rem; border-bottom: 1px solid #ccc }
h1, .state, pre { overflow-wrap: anywhere }
.state { padding: .6rem .8rem; border-left: 6px solid #0072b2; background: #eef5fa }
.bad { border-color: #d55e00; background: #fdf0e7 }
.facts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)) }
.facts div { border: 1px solid #ddd; padding: .4rem .6rem } .facts b { display: block }
.pictures { display: grid; gap: 1.5rem; margin: 1rem 0 }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)) }
figure { margin: 0 } img { max-width: 100%; height: auto } figcaption { font-size: .95rem; color: #333 }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #eee }
.paths td + td { overflow-wrap: anywhere; min-width: 4.5rem }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .6rem }
.bar { height: 1em; background: #56b4e9 } td:has(.bar) { width: 8rem }
"""
CAPTIONS = {
    "curves.png": "Monitor tiles are seen after each epoch, and not trained on where there are enough.",
    "segmentation.png": "What counts as breast and as muscle. Labels and markers must lie outside.",
    "grid.png": "Each mark is the centre of a tile; tiles overlap.",
    "tiles.png": "Black: outside the breast. Rejected tiles: their value of what was asked for.",
    "views.png": "Each row: a tile and two views of it that the network must recognise as the same.",
    "embedding.png": "Each point is a monitor tile; near points look alike to the network.",
    "roc.png": "Sensitivity against false alarms.",
    "pr.png": "Share of right alarms against sensitivity.",
    "reliability.png": "How often a finding was there against the probability given.",
    "embeddings.png": "Features of labelled tiles.",
}
CLASSIFIER_PICTURES = ("roc.png", "pr.png", "reliability.png", "embeddings.png")


def write_summary(run: Run, state: str, reason: str = "") -> None:
    """summary.json: how far the run is, its best epoch, the funnel of tiles, the machine."""
    rejections = pd.read_csv(run.tiles.cache / "rejections.csv", keep_default_na=False)
    errors = rejections["error"][rejections["error"] != ""]
    content = {
        "state": state,
        "reason": reason,
        "time": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "step": run.step,
        "steps": run.last_step,
        "epoch": run.step / run.steps_per_epoch,
        "healthy": run.healthy,
        "best": run.best,
        "device": describe_device(run),
        "processes": run.world.size,
        "training_tiles": len(run.train_ids),
        "monitor_tiles": len(run.monitor_ids),
        "images": len(rejections),
        "skipped": errors.value_counts().to_dict(),
        "funnel": {k: int(v) for k, v in rejections.sum(numeric_only=True).items()},
    }
    write_atomic(run.folder / "summary.json", json.dumps(content, indent=2))


def show_run(run: Run, tracker: Tracker, state: str = "running", reason: str = "") -> None:
    """Bring summary.json, pictures and report.html up to date. A failure is a note and ends no run."""
    folder = run.folder
    try:
        write_summary(run, state, reason)
        if run.best:
            best = run.best | {"checkpoint": str(folder / "mammogram_byol_best.pth")}
            tracker.log({f"best_{name}": value for name, value in best.items()}, summary=True)
        if not run.config.report_every:
            return
        fresh = [] if (folder / "views.png").is_file() else [*EXTRACTION_PICTURES, "views.png"]
        if fresh:
            draw_views(run, folder / "views.png")
        if run.features is not None:
            draw_embedding(run, run.features, folder / "embedding.png")
            fresh.append("embedding.png")
        write_report(folder)
        if fresh:
            there = {path.stem: path for path in map(folder.joinpath, fresh) if path.is_file()}
            tracker.log({"step": run.step, **there})
    except Exception as error:
        tqdm.write(f"note: report not written ({type(error).__name__}: {error})", file=sys.stderr)
    run.report_written_at = time.monotonic()


def report_is_due(run: Run) -> bool:
    """Whether REPORT_EVERY minutes have passed."""
    due = time.monotonic() - run.report_written_at > 60 * run.config.report_every
    return run.world.leads and run.config.report_every > 0 and due


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    """A run's config.json, summary.json ({} where absent) and metrics.csv. Raises MammoError."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        record["config"] = dataclasses.asdict(Config()) | record["config"]
        path = folder / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path = folder / "metrics.csv"
        metrics = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=METRICS)
        # Until version 0.1.0 the titles of an objective's curves were not on record.
        curves = record.setdefault("curves", {"loss": "loss", "freq_loss": "frequency loss"})
        columns = list(dict.fromkeys([*METRICS, *curves]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MammoError(
            f"{folder}: not the folder of a run, or a file of it is damaged ({error!r})"
        ) from error
    return record, summary, metrics.reindex(columns=columns).apply(pd.to_numeric, errors="coerce")


def write_report(folder: Path) -> Path:
    """report.html of a run, self-contained, from the files in its folder alone; returns its path.

    Raises MammoError where the folder holds no run.
    """
    record, summary, metrics = read_run(folder)
    if len(metrics):
        draw_curves(metrics, record["curves"], folder / "curves.png")
    title = html.escape(f"Run {folder.resolve().name}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{REPORT_STYLE}</style></head><body><h1>{title}</h1>",
        html_headline(summary, metrics),
        html_learning(folder, metrics),
        html_funnel(folder, record["config"], summary),
        html_classifier(folder),
        html_settings(record["config"]),
        "<h2>Environment</h2>" + html_table(record.get("environment", {}).items(), kind="paths"),
        "<p>Research use only; not for clinical decisions.</p></body></html>\n",
    ]
    write_atomic(folder / "report.html", "\n".join(parts))
    return folder / "report.html"


def html_table(rows: Iterable[Iterable[Any]], header: Sequence[str] = (), kind: str = "") -> str:
    """A table of text; nothing in it is taken for markup. `kind` paths: cells may break anywhere."""
    lines = [("th", header)] * bool(header) + [("td", row) for row in rows]
    cells = ("".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in row) for tag, row in lines)
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide {kind}"><table>{table}</table></div>'


def html_pictures(folder: Path, *names: str) -> str:
    """Those pictures that are there, inside the page, with their captions."""
    figures = []
    for path in (folder / name for name in names):
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'
            caption = CAPTIONS.get(path.name, "")
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def html_headline(summary: dict[str, Any], metrics: pd.DataFrame) -> str:
    """How the run stands, in a sentence and a few figures."""
    state, healthy = summary.get("state", "unknown"), summary.get("healthy", True)
    words = {"running": "Running when last heard of", "finished": "Finished"}
    text = f"{words.get(state, state.capitalize())}, {summary.get('time', 'time unknown')}. "
    text += summary.get("reason", "")
    if not healthy:
        text += f" Collapsed: {COLLAPSE_ADVICE}"
    known = [name for name in METRICS if metrics[name].notna().any()]
    last = {name: metrics[name].dropna().iloc[-1] for name in known}
    best = summary.get("best", {})
    facts = {"step": f"{summary.get('step', 0):,} of {summary.get('steps', 0):,}"}
    facts["epoch"] = f"{summary.get('epoch', 0):.2f}"
    if best:
        chosen = f"AUROC {best['auroc']:.3f}" if "auroc" in best else f"RankMe {best['rankme']:.1f}"
        facts["best epoch"] = f"{best['epoch']} ({chosen})"
    figures = {
        "loss": ("loss", ".3f"),
        "feature std": ("feature_std", ".2f"),
        "RankMe": ("monitor_rankme", ".1f"),
        "tiles per second": ("tiles_per_s", ".3g"),
        "GiB of GPU memory": ("gpu_memory_gb", ".1f"),
        "% GPU utilisation": ("gpu_utilisation", ".0f"),
    }
    facts |= {k: f"{last[name]:{style}}" for k, (name, style) in figures.items() if name in last}
    if state == "running" and "seconds_left" in last:
        facts["time left"] = str(datetime.timedelta(seconds=round(last["seconds_left"])))
    facts["device"] = f"{summary.get('processes', 1)} x {summary.get('device', 'unknown')}"
    shown = (f"<div>{html.escape(k)}<b>{html.escape(v)}</b></div>" for k, v in facts.items())
    bad = "" if healthy and state in words else " bad"
    return f'<p class="state{bad}">{html.escape(text)}</p><div class="facts">{"".join(shown)}</div>'


def html_learning(folder: Path, metrics: pd.DataFrame) -> str:
    """Curves, the signs of collapse and the map of features."""
    epochs = metrics.dropna(subset=["monitor_rankme"]).dropna(axis=1, how="all")
    columns = [name for name in epochs if name == "epoch" or name.startswith("monitor_")]
    rows = [[f"{value:.4g}" for value in row] for row in epochs[columns].tail(20).to_numpy()]
    last = (
        f"<details><summary>The last {len(rows)} epochs</summary>{html_table(rows, columns)}</details>"
    )
    return (
        "<h2>Does it learn?</h2><p>The loss alone can't tell: it is lowest when all tiles look alike to "
        "the network (collapse). <b>Feature std</b> is the spread of the tiles' projections: 1 = even "
        f"in all directions, below {COLLAPSE_STD} collapsed. <b>RankMe</b> is the number of directions "
        "that the features fill; it has no fixed threshold: a fall towards 1 is collapse, and without "
        "labels the best checkpoint is from the healthy epoch where it is highest.</p>"
        + html_pictures(folder, "curves.png", "embedding.png")
        + (last if rows else "")
    )


def beyond(criterion: Criterion) -> str:
    """Where the values lie of tiles that fail a criterion."""
    return "above" if criterion.passes(0, 1) else "below"


def html_funnel(folder: Path, config: dict[str, Any], summary: dict[str, Any]) -> str:
    """From images to tiles: how many each criterion took, and what that looks like."""
    funnel, skipped = summary.get("funnel", {}), summary.get("skipped", {})
    total = max(1, funnel.get("positions", 0))
    rows = [("positions in the images", funnel.get("positions", 0))]
    rows += [
        (f"{c.title} ({c.column} {beyond(c)} {config[c.setting]:g})", -funnel.get(c.column, 0))
        for c in CRITERIA
    ]
    rows += [("over --max_tiles", -funnel.get("capped", 0)), ("kept", funnel.get("kept", 0))]
    lines = (
        f"<tr><td>{html.escape(text)}</td><td>{count:,}</td>"
        f'<td><div class="bar" style="width: {abs(count) / total:.1%}"></div></td></tr>'
        for text, count in rows
    )
    return (
        f"<h2>From images to tiles</h2><p>{summary.get('images', 0):,} images, of which "
        f"{sum(skipped.values()):,} were skipped; {funnel.get('rescued', 0):,} dark tiles were kept for "
        f"their fine detail. {summary.get('training_tiles', 0):,} tiles train, "
        f"{summary.get('monitor_tiles', 0):,} are monitor tiles.</p>"
        f'<div class="wide"><table>{"".join(lines)}</table></div>'
        + (html_table(skipped.items(), ("why skipped", "images")) if skipped else "")
        + html_pictures(folder, "segmentation.png", "grid.png", "tiles.png", "views.png")
    )


def html_results(path: Path) -> str:
    """A table of train_classifier.py without its sub-groups of images."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        return f"<p>{path.name} can't be read ({type(error).__name__})</p>"
    if "group" in table:
        table = table[table["group"] == "all"].drop(columns="group")
    counts = [name for name in ("n", "positive", "studies", "positive_studies") if name in table]
    table = table[[*table.columns.drop(counts), *counts]]  # a phone shows the first columns
    cells = table.map(lambda v: f"{v:.3f}" if isinstance(v, float) else v).replace("nan", "")
    return html_table(cells.to_numpy(), [name.replace("_", " ") for name in cells])


def html_classifier(folder: Path) -> str:
    """Results of train_classifier.py in the run's sub-folders (--output_dir with the run's folder)."""
    parts = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = []
        for path in (place / "evaluation.csv", place / "compare.csv"):
            if path.is_file():
                found.append(html_results(path))
        maps = [path.name for path in sorted(place.glob("map_*.png"))[:4]]
        found.append(html_pictures(place, *CLASSIFIER_PICTURES, *maps))
        if any(found):
            parts += [f"<h2>Classifier: {html.escape(place.name)}</h2>", *found]
    return "".join(parts)


def changed_flags(settings: dict[str, Any]) -> dict[str, list[str]]:
    """The words of the flag for each setting that is not at its default."""
    flags = {}
    for name, default in dataclasses.asdict(Config()).items():
        value = settings[name]
        if value != default:
            on_off = [f"--{name}" if value else f"--no_{name}"]
            flags[name] = on_off if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def html_settings(config: dict[str, Any]) -> str:
    """The command that repeats the run, and all settings."""
    defaults, flags = dataclasses.asdict(Config()), changed_flags(config)
    lines = ["python train_byol_mammo.py", *map(shlex.join, flags.values())]
    changed = [(name, config[name], defaults[name]) for name in flags]
    same = [(name, value) for name, value in defaults.items() if name not in flags]
    return (
        "<h2>Settings</h2><pre>"
        + html.escape(" \\\n    ".join(lines))
        + "</pre>"
        + html_table(changed, ("changed", "here", "default"), "paths")
        + f"<details><summary>{len(same)} settings at their defaults</summary>"
        + html_table(same, kind="paths")
        + "</details>"
    )


# ---- 11 Training -----------------------------------------------------------------------------------


PEER_TIMEOUT = 60  # minutes that a process waits for the others, as at the end of an epoch


@dataclass(frozen=True)
class World:
    """This process among those of a run: the only one without torchrun or srun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0


def find_world() -> World:
    """Read the place that torchrun, or srun with several tasks, has given this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        return World()
    # In an interactive allocation of several tasks, a plain `python` is no task of a step.
    if "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
        return World()
    return World(rank, size, local_rank)


def join_world(world: World, device: torch.device) -> None:
    """Connect with the other processes. Raises MammoError where they can't be found."""
    if world.size == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise MammoError(
            f"{world.size} processes but no {' and '.join(missing)}: start by torchrun or submit_byol.sh"
        )
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(minutes=PEER_TIMEOUT),
    )


@dataclass
class Run:
    """What a training run holds; `step` counts optimiser steps since the start of the run."""

    config: Config
    folder: Path
    tiles: MammogramTiles
    train_ids: np.ndarray
    monitor_ids: np.ndarray
    probe: Probe | None  # labelled tiles, with --labels
    objective: Objective
    compute_loss: Callable[
        ..., Any
    ]  # the objective as DistributedDataParallel and torch.compile wrap it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    autocast: Callable[[], Any]
    steps_per_epoch: int
    wandb_id: str
    world: World
    code: dict[str, str]  # git commit and digest of the code of views and training
    step: int = 0
    # Epoch of the best checkpoint and the figure that chose it; empty = none yet.
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    healthy: bool = True
    batch_std: float = 0.0  # feature std of the last logged training steps
    monitor: dict[str, float] = dataclasses.field(default_factory=dict)
    features: Tensor | None = None  # (monitor tiles, input_dim) as of the last epoch
    report_written_at: float = -math.inf  # s, on time.monotonic()
    state_saved_at: float = dataclasses.field(default_factory=time.monotonic)  # s, on the same

    @property
    def model(self) -> MammogramBYOL:
        """The model that the objective trains."""
        return self.objective.model

    @property
    def columns(self) -> list[str]:
        """Columns of metrics.csv: METRICS and what the objective adds."""
        return list(dict.fromkeys([*METRICS, *self.objective.curves]))

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """The step at which this run ends."""
        return min(self.total_steps, self.config.max_steps or self.total_steps)


def available_cores() -> int:
    """Cores that this process may use (SLURM and cpusets give fewer than the node has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_device(config: Config) -> torch.device:
    """Resolve --device to cpu or cuda:N. Raises MammoError where there is no such device."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MammoError(f"--device {name}: not a device (auto, cpu, cuda, cuda:N)") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise MammoError(f"--device {name}: not supported (auto, cpu, cuda, cuda:N)")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise MammoError(f"--device {name}: no CUDA GPU here; --device cpu works, slowly")
    # A task that SLURM gave a GPU of its own (--gpus-per-task) sees that one alone, as number 0.
    index = find_world().local_rank % count if device.index is None else device.index
    if index >= count:
        raise MammoError(f"--device {name}: the GPUs here are cuda:0 to cuda:{count - 1}")
    if 1 < count < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise MammoError(f"{count} GPUs for more processes: give torchrun --nproc_per_node {count}")
    major, minor = torch.cuda.get_device_capability(index)
    if not has_code_for(major, minor, torch.cuda.get_arch_list()):
        raise MammoError(
            f"PyTorch {torch.__version__} has no code for this GPU (sm_{major}{minor}); install a build "
            "that has (for a V100 one for CUDA 12.6), or give --device cpu"
        )
    return torch.device("cuda", index)


def has_code_for(major: int, minor: int, kinds: Sequence[str]) -> bool:
    """Whether a build for `kinds` (torch.cuda.get_arch_list) runs on a GPU of this compute capability.

    Machine code (sm_) serves its own major version from its minor on, PTX (compute_) all later ones
    (CUDA C++ programming guide, 3.1). True where the kinds are not known.
    """
    able = []
    for kind in kinds:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", kind):
            version = int(found[2]), int(found[3])
            able.append(version <= (major, minor) and (found[1] == "compute" or version[0] == major))
    return any(able) or not able


def note_idle_gpu(config: Config, device: torch.device) -> None:
    """Say so where --device auto means the CPU although the node has a GPU."""
    if config.device == "auto" and device.type == "cpu" and any(Path("/dev").glob("nvidia[0-9]*")):
        print(
            f"note: PyTorch {torch.__version__} can't use the GPU of this node (its driver is too old, "
            "or the job asked for none): going on with the CPU, which is far slower",
            file=sys.stderr,
        )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 (some x86 since 2020; Linux lists it); emulated it is slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(config: Config, device: torch.device) -> torch.dtype:
    """Resolve --precision: bf16 where the hardware has it, else fp16 on CUDA, fp32 on the CPU."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if config.precision == "fp16" and device.type == "cpu":
        raise MammoError("--precision fp16 needs a GPU; use fp32 or bf16 on the CPU")
    if config.precision != "auto":
        return names[config.precision]
    if device.type != "cuda":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    # Volta emulates bf16: is_bf16_supported(False) asks for the hardware.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def precision_name(config: Config, device: torch.device) -> str:
    """float32, bfloat16 or float16, as --precision resolves on a device."""
    return str(choose_precision(config, device)).removeprefix("torch.")


def split_monitor(tiles: pd.DataFrame, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the training tiles and of the monitor tiles, spread over images, fixed by the seed.

    The monitor tiles watch for collapse; they are left out of training unless there are so few tiles
    that a tenth of them would say nothing.
    """
    order = spread_over_images(tiles["image"].to_numpy(), np.random.default_rng([config.seed, 1]))
    count = min(config.monitor_tiles, len(tiles) // 10)
    if count < min(32, config.monitor_tiles):
        return np.arange(len(tiles)), np.sort(order[: config.monitor_tiles])
    return np.sort(order[count:]), np.sort(order[:count])


def spread_over_images(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of tiles whose every prefix is spread evenly over their images."""
    shuffled = rng.permutation(len(image))
    rank = pd.Series(image[shuffled]).groupby(image[shuffled]).cumcount().to_numpy()
    return shuffled[np.lexsort((rng.random(len(image)), rank))]


def epoch_order(run: Run, epoch: int) -> np.ndarray:
    """Tile ids of an epoch in training order: TILES_PER_EPOCH of them, from (seed, epoch) alone."""
    rng = np.random.default_rng([run.config.seed, 2, epoch])
    image = run.tiles.table["image"].to_numpy()[run.train_ids]
    drawn = spread_over_images(image, rng)[: run.config.tiles_per_epoch or None]
    return run.train_ids[rng.permutation(drawn)]


def make_views(
    run: Run, tiles: MammogramTiles, ids: np.ndarray, key: tuple[int, ...]
) -> tuple[View, ...]:
    """A View of tiles `ids` (B,) for each of VIEWS, on the training device."""
    return tuple(
        make_view(tiles, ids, spec, run.config.view_side, (*key, number), run.device)
        for number, spec in enumerate(VIEWS, 1)
    )


def train_step(
    run: Run, ids: np.ndarray, tiles: MammogramTiles | None = None
) -> dict[str, Tensor | float]:
    """One optimiser step on tiles `ids` (B,); returns its metrics by name, tensors still on the device.

    `tiles` are those ids alone, where the pixels of all don't fit the device (MammogramTiles.subset).
    """
    config, processes = run.config, run.world.size
    lr = learning_rate(run.step, run.total_steps, run.steps_per_epoch, config, processes)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    source, places = (run.tiles, ids) if tiles is None else (tiles, np.arange(len(ids)))
    views = make_views(run, source, places, (config.seed, run.step, run.world.rank))
    with run.autocast():
        loss, metrics = run.compute_loss(views)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    after = run.objective.after_step(run.step, run.total_steps)
    run.step += 1
    return {"loss": loss.detach(), **metrics, "lr": lr, **after}


def batches(run: Run) -> Iterator[tuple[np.ndarray, MammogramTiles | None]]:
    """This process's tiles for the steps left in the epoch; every tile goes to one process alone.

    Where the pixels stay in the host's memory map, a thread cuts out the next batch's tiles meanwhile.
    """
    epoch, first = divmod(run.step, run.steps_per_epoch)
    order, batch, size = epoch_order(run, epoch), run.config.batch_size, run.world.size
    steps = range(first * size + run.world.rank, run.steps_per_epoch * size, size)
    ids = [order[step * batch : (step + 1) * batch] for step in steps]
    if run.tiles.pixels.device == run.device:
        yield from ((batch_ids, None) for batch_ids in ids)
        return
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(run.tiles.subset, ids[0])
        for index, batch_ids in enumerate(ids):
            tiles = following.result()
            if index + 1 < len(ids):
                following = thread.submit(run.tiles.subset, ids[index + 1])
            tiles.pixels = to_device(tiles.pixels.numpy(), run.device)
            yield batch_ids, tiles


def train_one_epoch(
    run: Run, bar: tqdm, metrics: MetricsFile, tracker: Tracker, stop: StopSignal
) -> None:
    """Train to the end of the current epoch, or to MAX_STEPS, or until a signal asks to stop."""
    config = run.config
    logged = time.monotonic()
    pending: list[dict[str, Tensor | float]] = []
    recent: list[np.ndarray] = []
    for ids, tiles in batches(run):
        pending.append(train_step(run, ids, tiles))
        recent.append(ids)
        bar.update()
        last = run.step % run.steps_per_epoch == 0 or run.step == config.max_steps
        due = save_is_due(run)
        # All ranks must reach the same all_reduce, so several check for a stop only at log steps.
        alone = run.world.size == 1
        if run.step % config.log_every == 0 or last or (alone and (stop.requested or due)):
            # The only place that waits for the device: LOG_EVERY steps are read at once.
            means = read_metrics(run, pending, stop)
            check_finite(run, means, pending, recent, saving=bool(last or due or stop.agreed))
            run.batch_std = means["feature_std"]
            row = describe_step(run, means, len(pending) / (time.monotonic() - logged), ids)
            bar.set_postfix_str(describe_row(row, run.monitor))
            metrics.write(row)
            tracker.log(row)
            if stop.agreed or last:  # last.pth is written by the caller, after end_epoch
                return
            if due:
                save_state(run)
            if report_is_due(run):
                show_run(run, tracker)
            pending, recent, logged = [], [], time.monotonic()


def read_metrics(
    run: Run, pending: list[dict[str, Tensor | float]], stop: StopSignal
) -> dict[str, float]:
    """Metrics of the last steps by name: means over steps and ranks of tensors, the last of numbers.

    The ranks also agree to stop: a signal that any of them has got by now holds for all. One that
    comes later waits for the next time, wherever it comes.
    """
    stop.agreed = stop.requested
    measured = {name: v for name, v in pending[-1].items() if isinstance(v, Tensor)}
    means = torch.stack([torch.stack([step[name] for name in measured]) for step in pending]).mean(0)
    if run.world.size > 1:
        distributed.all_reduce(means)
        means /= run.world.size
        agreed = torch.tensor(stop.agreed, device=run.device)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
        stop.agreed = int(agreed)
    return {**pending[-1], **dict(zip(measured, means.tolist(), strict=True))}  # type: ignore[dict-item]


def save_is_due(run: Run) -> bool:
    """Whether SAVE_EVERY minutes have passed."""
    return time.monotonic() - run.state_saved_at > 60 * run.config.save_every


def save_state(run: Run) -> None:
    """Write last.pth, from one process."""
    if run.world.leads:
        save_checkpoint(run.folder / "last.pth", run, resumable=True)
    run.state_saved_at = time.monotonic()


def describe_row(row: dict[str, float], monitor: dict[str, float]) -> str:
    """What the progress bar says, the most telling first: a narrow terminal cuts the end."""
    rank = f" RankMe {monitor['rankme']:.1f}" if monitor else ""
    momentum = f" momentum {row['momentum']:.5f}" if "momentum" in row else ""
    return (
        f"loss {row['loss']:.4f} std {row['feature_std']:.3f}{rank} {row['tiles_per_s']:.1f} tiles/s "
        f"lr {row['lr']:.2e}{momentum}"
    )


def describe_step(run: Run, means: dict[str, float], speed: float, ids: np.ndarray) -> dict[str, float]:
    """A row of metrics.csv for the last step; `means` as from read_metrics, `speed` in steps/s."""
    row = {
        "step": run.step,
        "epoch": run.step / run.steps_per_epoch,
        **means,
        "tiles_per_s": speed * run.config.batch_size * run.world.size,
        "batches_per_s": speed,
        "seconds_left": (run.last_step - run.step) / speed,
        "breast_ratio": float(run.tiles.table["breast_ratio"].to_numpy()[ids].mean()),
    }
    if run.device.type == "cuda":
        row["gpu_memory_gb"] = torch.cuda.max_memory_allocated(run.device) / 2**30
        # Needs nvidia-ml-py and the right to ask the driver; wandb's system metrics have it anyway.
        with suppress(Exception):
            row["gpu_utilisation"] = torch.cuda.utilization(run.device)
    return row


def check_finite(
    run: Run,
    means: dict[str, float],
    pending: list[dict[str, Tensor | float]],
    recent: list[np.ndarray],
    saving: bool,
) -> None:
    """Raise MammoError, naming the tiles, where a loss or a weight about to be saved is not a number.

    `pending` and `recent`: metrics and tiles of the steps since the last look. If all losses are finite
    but a weight is not, the last step did it: an earlier bad weight would have made a later loss NaN.
    """
    what, index = "loss", len(recent) - 1
    if not all(map(math.isfinite, means.values())):
        sound = [all(math.isfinite(float(value)) for value in step.values()) for step in pending]
        index = sound.index(False) if False in sound else index  # else it was another process's
    elif saving and not all_finite([run.model.state_dict(), run.optimizer.state_dict()]):
        what = "network's state"
    else:
        return
    step = run.step - len(recent) + index + 1
    raise MammoError(
        f"the {what} is not a number at step {step} (rows of tiles.csv: {recent[index].tolist()}); "
        "lower --lr or use --precision fp32, then start again: the run resumes from last.pth, which is "
        "from before it"
    )


def end_epoch(run: Run, metrics: MetricsFile, tracker: Tracker) -> None:
    """Watch for collapse, choose the best checkpoint, write the epoch's files: from one process.

    Raises MammoError in all of them where ON_COLLAPSE is stop.
    """
    if run.world.leads:
        _end_epoch(run, metrics, tracker)
    if run.world.size > 1:
        healthy = torch.tensor(int(run.healthy), device=run.device)
        distributed.broadcast(healthy, 0)
        run.healthy = bool(healthy)
    if not run.healthy and run.config.on_collapse == "stop":
        raise MammoError(
            f"stopped: the run collapsed; {run.folder / 'mammogram_byol_best.pth'} is from before that "
            "where an epoch was healthy. --no_resume starts again, --on_collapse warn goes on"
        )


def _end_epoch(run: Run, metrics: MetricsFile, tracker: Tracker) -> None:
    config, epoch = run.config, run.step // run.steps_per_epoch
    run.monitor = monitor_metrics(run)
    if run.probe is not None and (epoch % config.probe_every == 0 or epoch == config.epochs):
        run.monitor |= run_probe(run, run.probe)
        found = [f"{name} {run.monitor[f'auroc_{name}']:.3f}" for name in CLASSES]
        tqdm.write(f"epoch {epoch}: probe AUROC {', '.join(found)}", file=sys.stderr)
    # Early on the running statistics of batch norm lag behind: training batches speak for the run too.
    std = max(run.monitor["std"], run.batch_std)
    run.healthy = std >= COLLAPSE_STD
    row: dict[str, float] = {"step": run.step, "epoch": epoch}
    row |= {f"monitor_{name}": value for name, value in run.monitor.items()}
    metrics.write(row)
    tracker.log(row)
    if not run.healthy:
        tqdm.write(
            f"warning: collapse, feature std {std:.3f} < {COLLAPSE_STD} after epoch {epoch}: "
            f"{COLLAPSE_ADVICE}",
            file=sys.stderr,
        )
    figure = "auroc" if run.probe else "rankme"
    # Never by the loss: a collapsed network has the lowest loss of all (Garrido 2023).
    if run.healthy and run.monitor.get(figure, 0.0) > run.best.get(figure, 0.0):
        run.best = {"epoch": epoch, figure: run.monitor[figure]}
        save_checkpoint(run.folder / "mammogram_byol_best.pth", run)
    if config.checkpoint_every and epoch % config.checkpoint_every == 0:
        save_checkpoint(run.folder / f"mammogram_byol_epoch{epoch}.pth", run)
    if save_is_due(run):  # on a fast GPU an epoch takes half a minute, writing last.pth seconds
        save_state(run)
    if report_is_due(run):
        show_run(run, tracker)


def prepare_run(config: Config, backbone: nn.Module, cache: Path) -> Run:
    """Put model, optimiser and tiles on the device and resume where a run's state is found."""
    device = choose_device(config)
    dtype = choose_precision(config, device)
    tiles = open_tiles(cache, reduction(config.tile_size, config.view_side))
    hold_on_device(tiles, device, config)
    train_ids, monitor_ids = split_monitor(tiles.table, config)
    world = find_world()
    drawn = min(config.tiles_per_epoch or len(train_ids), len(train_ids))
    if drawn < config.batch_size * world.size:
        raise MammoError(
            f"{drawn} tiles per epoch for a batch of {config.batch_size * world.size}: lower "
            "--batch_size, add images or loosen the tile settings"
        )
    probe = prepare_probe(tiles, config)
    model = prepare_model(backbone, config, device, world)
    objective = build_objective(model, config, tiles, train_ids).to(device)
    optimizer = build_optimizer(objective, config)
    run = Run(
        config=config,
        folder=config.run_dir,
        tiles=tiles,
        train_ids=train_ids,
        monitor_ids=monitor_ids,
        probe=probe,
        objective=objective,
        compute_loss=compiled(distribute(objective, device, world), config, device),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        device=device,
        autocast=lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        steps_per_epoch=drawn // (config.batch_size * world.size),
        wandb_id=hashlib.sha256(f"{config.run_dir.resolve()}{time.time()}".encode()).hexdigest()[:8],
        world=world,
        code={"commit": git_commit(), "training": settings.code_version(TRAINING_CODE)},
    )
    if (run.folder / "last.pth").is_file():  # else none is there, or `claimed` has moved it aside
        state = load_checkpoint(run.folder / "last.pth")
        try:
            resume_run(run, state)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"{run.folder / 'last.pth'} is no state of such a run ({type(error).__name__})"
            raise MammoError(f"{reason}; --no_resume moves it aside") from error
    return run


def distribute(objective: Objective, device: torch.device, world: World) -> nn.Module:
    """The objective with its gradients averaged over the ranks, where there are several."""
    if world.size == 1:
        return objective
    # Batch norm on the CPU can't be synchronised: its statistics are those of rank 0.
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=devices)


def prepare_model(
    backbone: nn.Module, config: Config, device: torch.device, world: World
) -> MammogramBYOL:
    """The model on the device, the same in every process, in training mode."""
    torch.manual_seed(config.seed)  # the heads' initial weights
    model = MammogramBYOL(backbone, config.input_dim, config.hidden_dim, config.proj_dim)
    model.grad_checkpoint = config.grad_checkpoint
    if world.size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device).to(memory_format=torch.channels_last).train()


# Bytes that a pixel of a view leaves for the backward pass in bf16: 235 MiB for 512 x 512 in a ResNet50.
BYTES_PER_PIXEL = 940


def hold_on_device(tiles: MammogramTiles, device: torch.device, config: Config) -> None:
    """Copy the pixels to the GPU where they leave a training step the memory that it needs."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    step = 2 * config.batch_size * config.view_side**2 * BYTES_PER_PIXEL  # two views
    if choose_precision(config, device) == torch.float32:
        step *= 2
    if config.grad_checkpoint:
        step //= 2
    if tiles.pixels.nbytes < free - 1.3 * step - 2 * 2**30:  # weights, views, what convolutions want
        tiles.to(device)


def compiled(function: Callable[..., Any], config: Config, device: torch.device) -> Callable[..., Any]:
    """torch.compile on CUDA; where compiling fails, a note and the plain function.

    Not with several processes: synchronised batch norm breaks the graph at every layer.
    """
    alone = find_world().size == 1
    if not (config.compile and alone and device.type == "cuda") or config.grad_checkpoint:
        return function
    from torch._functorch import config as lowering

    # Else the backward pass is compiled at its first call, out of the reach of `call`.
    if hasattr(lowering, "force_non_lazy_backward_lowering"):
        lowering.force_non_lazy_backward_lowering = True
    try:
        fast = torch.compile(function)
    except RuntimeError as error:  # as on a Python that it doesn't know yet
        print(f"note: no torch.compile, going on without ({error})", file=sys.stderr)
        return function

    def call(*args: Any) -> Any:
        nonlocal fast
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"note: torch.compile failed, going on without ({error})", file=sys.stderr)
            fast = function
            return fast(*args)

    return call


def git_commit() -> str:
    """The commit of this code, or unknown."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return commit or "unknown"


def environment(precision: str) -> dict[str, str]:
    """Versions, device, precision and git commit, recorded beside each run's result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "precision": precision,
        "git_commit": git_commit(),
    }


def train(config: Config) -> Path:
    """The whole job: weights, cache, pictures, training, export. Returns the run's folder."""
    world = find_world()
    # What can fail in seconds comes before hours of extraction.
    device = choose_device(config)
    note_idle_gpu(config, device)
    choose_precision(config, device)
    set_determinism(config, device)
    if config.labels:
        read_labels(config.labels)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone, config.weights)
    config = match_input_dim(config, backbone)
    root = Path(config.data_dir)
    if world.leads and (root / "manifest.csv").is_file() and (root / "test").is_dir():
        print(f"note: {root} holds test images too; {root / 'training'} has none", file=sys.stderr)
    with claimed(config) if world.leads else nullcontext():
        cache = build_cache(config)  # one process builds, the others wait at its lock
        if world.leads and config.report_every:
            show_extraction(cache, config)
        join_world(world, device)
        return train_in_folder(prepare_run(config, backbone, cache))


def this_job() -> str:
    """What SLURM's requeues and torchrun's restarts of a job have in common."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name, "none") != "none":  # as torchrun says without --rdzv_id
            return os.environ[name]
    return f"{socket.gethostname()} {os.getppid()}"  # torchrun, which stays the same process


def is_restarted() -> bool:
    """Whether SLURM or torchrun starts this job again, with the flags of its first start."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


@contextmanager
def claimed(config: Config) -> Iterator[None]:
    """Make the run's folder and hold it: two runs that write to one would mix their results.

    A run that is not to be resumed, or can't be for want of last.pth, is moved aside first; a job that
    is started again goes on with the run that it began, --no_resume or not. Raises MammoError where
    another run holds the folder.
    """
    folder, mark = config.run_dir, config.run_dir / ".job"
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # a folder that can't be written is known by now
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MammoError(f"another run is writing to {folder}; give --run_name NAME") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        own = is_restarted() and mark.is_file() and mark.read_text(encoding="utf-8") == this_job()
        left = not (folder / "last.pth").is_file() and any(folder.glob("mammogram_byol_*.pth"))
        if left or not (config.resume or own or all(path == mark for path in folder.iterdir())):
            move_aside(folder)
            folder.mkdir()
        if not config.resume:
            write_atomic(mark, this_job())
        yield
    finally:
        lock.release()


def train_in_folder(run: Run) -> Path:
    """Train a run from where it stands to its last step, or to a signal; returns its folder."""
    config, world, limit = run.config, run.world, run.last_step
    if run.step >= limit and (run.folder / "backbone.safetensors").is_file():
        if world.leads:
            more = ", or raise --max_steps" if config.max_steps else ""
            print(f"{run.folder} is finished at step {run.step}; give --run_name NAME{more}")
        return run.folder
    if world.leads:
        start_folder(run)
        if config.qc_pages:
            draw_qc_pages(config, run.folder / "qc" / run.tiles.cache.name)
    path = run.folder / "metrics.csv"
    metrics = MetricsFile(path, run.columns, run.step, run.steps_per_epoch, world.leads)
    tracker = Tracker(run.wandb_id, config, world.leads)
    options = {"total": limit, "initial": run.step, "desc": "train", "unit": "step"}
    with (
        StopSignal() as stop,
        progress(mode=config.progress if world.leads else "none", **options) as bar,
    ):
        try:
            while run.step < limit and not stop.agreed:
                train_one_epoch(run, bar, metrics, tracker, stop)
                if run.step % run.steps_per_epoch == 0:
                    end_epoch(run, metrics, tracker)
            if run.step < limit:
                save_state(run)
                raise StoppedError(
                    stop.agreed, f"the same command goes on from {run.folder / 'last.pth'}"
                )
        except Exception as error:
            if world.leads:
                show_run(run, tracker, "stopped", str(error))
            tracker.finish()
            raise
        # Still under the signals' guard: a job's last seconds must not cost it its results.
        bar.close()
        if world.leads:
            finish_run(run, tracker)
    return run.folder


def extract_only(config: Config) -> Path:
    """Build the cache without a model, as on a node without a GPU; returns its folder."""
    if config.qc_pages:  # first: they show why no tile is kept, where none is
        inputs = cache_inputs(list_sources(config.data_dir), config)
        pages = config.run_dir / "qc" / cache_key(inputs)
        draw_qc_pages(config, pages)
        print(f"qc pages  {pages}", flush=True)
    cache = build_cache(config)
    show_extraction(cache, config)
    print(describe_funnel(pd.read_csv(cache / "rejections.csv", keep_default_na=False)))
    print(f"cache     {cache}: {', '.join(EXTRACTION_PICTURES)} show it; training finds it there")
    return cache


def set_determinism(config: Config, device: torch.device) -> None:
    """Bit-equal algorithms on CUDA if asked for, else the fastest convolutions for the run's shapes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def match_input_dim(config: Config, backbone: nn.Module) -> Config:
    """Set input_dim to the backbone's width. Raises MammoError where another was asked for."""
    width = feature_width(backbone)
    if config.input_dim not in (INPUT_DIM, width):
        raise MammoError(f"--input_dim {config.input_dim}: {config.backbone} has {width} features")
    return dataclasses.replace(config, input_dim=width)


def describe_device(run: Run) -> str:
    """Device, its memory or cores, and the precision."""
    name = f"CPU, {available_cores()} cores"
    if run.device.type == "cuda":
        memory = torch.cuda.get_device_properties(run.device).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(run.device)}, {memory:.0f} GiB"
    return f"{name}, {precision_name(run.config, run.device)}"


def start_folder(run: Run) -> None:
    """Create the run's folder: settings, environment, the extraction's pictures, a calm summary."""
    sweep(run.folder)
    precision = precision_name(run.config, run.device)
    record = {"config": dataclasses.asdict(run.config), "environment": environment(precision)}
    record["curves"] = run.objective.curves
    write_atomic(run.folder / "config.json", json.dumps(record, indent=2))
    for name in EXTRACTION_PICTURES:
        if (run.tiles.cache / name).is_file():
            shutil.copyfile(run.tiles.cache / name, run.folder / name)
    rejections = pd.read_csv(run.tiles.cache / "rejections.csv", keep_default_na=False)
    print(describe_funnel(rejections))
    where = "in GPU memory" if run.tiles.pixels.is_cuda else "memory-mapped"
    print(f"cache     {run.tiles.cache}: {run.tiles.pixels.nbytes / 2**30:.2f} GiB of pixels, {where}")
    print(f"device    {run.world.size} x {describe_device(run)}")
    print(
        f"training  {len(run.train_ids):,} tiles, {run.steps_per_epoch} steps an epoch, "
        f"{run.config.view_side} px views, steps {run.step} to {run.last_step}"
    )
    print(f"tracking  wandb {wandb_mode(run.config)}")
    report = ", report.html tells how it goes" if run.config.report_every else ""
    print(f"run       {run.folder}{report}", flush=True)


def finish_run(run: Run, tracker: Tracker) -> None:
    """Write the final checkpoint, the last pictures and the exported backbone; name them."""
    folder = run.folder
    save_checkpoint(folder / "mammogram_byol_final.pth", run)
    save_state(run)
    best = folder / "mammogram_byol_best.pth"
    if not best.is_file():  # no epoch was complete, or none was healthy
        save_checkpoint(best, run)
    if run.features is None and run.config.report_every:  # no epoch has ended in this process
        monitor_metrics(run)
    show_run(run, tracker, "finished")
    # The last file: while it is missing, the same command does this again.
    export_backbone(run.model, folder / "backbone.safetensors", run.config)
    if not run.healthy:
        print(
            "warning: the run ended collapsed; mammogram_byol_best.pth is from before that "
            "where an epoch was healthy",
            file=sys.stderr,
        )
    print(f"finished at step {run.step}. Open in {folder}:")
    if run.config.report_every:
        print("  report     report.html")
        print("  pictures   segmentation.png grid.png tiles.png views.png curves.png embedding.png")
    print("  numbers    metrics.csv summary.json config.json")
    print(
        "  models     mammogram_byol_best.pth mammogram_byol_final.pth backbone.safetensors", flush=True
    )
    tracker.finish()


# ---- 12 Entry --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit_code."""

    def job() -> None:
        config = parse_args(argv)
        if config.report:
            print(write_report(Path(config.report)))
        elif config.extract_only:
            extract_only(config)
        else:
            train(config)

    return exit_code(job, "give --grad_checkpoint, lower --batch_size or --view_size")


def exit_code(job: Callable[[], None], memory_advice: str) -> int:
    """Do a script's job: 0, or 2 after an error that the user can mend, or 128 + signal number."""
    code = 2
    try:
        job()
        return 0
    except StoppedError as stopped:
        code, message = stopped.code, str(stopped)
    except KeyboardInterrupt:
        code, message = 128 + signal.SIGINT, "interrupted; the same command goes on where it stopped"
    except MammoError as error:
        message = f"error: {error}"
    except torch.cuda.OutOfMemoryError:
        message = f"error: the GPU's memory is full; {memory_advice}"
    except OSError as error:
        message = (
            f"error: {error.filename or 'file'}: {error.strerror or error}; once that is mended the "
            "same command goes on where it stopped"
        )
    except RuntimeError as error:
        if not distributed.is_initialized():
            raise
        reason = " ".join(str(error).split())[:300]
        message = f"error: {reason}"
        # A collective that fails is how the others learn that a process has died.
        if isinstance(error, distributed.DistError) or "gloo" in reason:
            message = (
                f"error: the processes of the run lost each other ({reason}); the log of the first one "
                "that ended says why. The same command goes on from last.pth"
            )
        else:
            traceback.print_exc()  # now: leaving the group may take its time
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
