#!/usr/bin/env python3
"""BYOL Mammo: self-supervised pre-training on mammograms, from image files to a ResNet backbone.

Each mammogram is segmented, cut into 512 px tiles that hold tissue and fine detail, and cached once.
BYOL then learns from two medically safe views of every tile: full bit depth, one resample per view.

    python train_byol_mammo.py --data_dir split_images/training          # one GPU, or the CPU
    python train_byol_mammo.py --backbone resnet18 --weights none --view_size 128 --epochs 3
    torchrun --nproc_per_node 4 train_byol_mammo.py --data_dir ...       # four GPUs, or submit_byol.sh
    python train_byol_mammo.py --extract_only --qc_pages                 # the tiles alone, to look at
    python train_byol_mammo.py --dry_run                                 # what it would do, bytes, time
    python train_byol_mammo.py --report runs/byol_resnet50               # write its report.html again
    python train_byol_mammo.py --help                                    # every setting, one line each

Contents
    1 Configuration    constants, Config                           (flags: byol_mammo/settings.py)
    2 Image            full bit depth, polarity                    (images.py, framing.py)
    3 Breast mask      frames, labels, skin line, pectoral muscle  (framing.py, anatomy.py)
    4 Tiles            grid, criteria, one image -> its tiles    (scores: specks.py, structure.py)
    5 Pixel cache      key, parallel extraction, MammogramTiles    (journal: extraction.py, cache.py)
    6 Views            random homographies and photometry, one bilinear gather
    7 Model            BYOL's networks, classification head        (backbones: checkpoints.py)
    8 Objective        BYOL's loss, heads for targets, optimiser    (objectives.py, targets.py, lars.py)
    9 Checkpoint       what a run saves, how it resumes            (writing, reading: checkpoints.py)
    10 Monitoring      feature std, RankMe, pictures, report       (labels.py, pictures.py, report.py)
    11 Training        the step, the epoch, the run                (processes.py, device.py, tracking.py)
    12 Entry           main

Method: Grill et al. 2020, "Bootstrap your own latent" (arXiv:2006.07733), with lightly's heads and loss.
Deviations: AdamW instead of LARS (batches of tens, not thousands); rotations of a whole tile instead of
random crops, no hue and no solarisation (grey values carry the diagnosis). Research use only; not for
clinical decisions.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import operator
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from byol_mammo import (
    anatomy,
    cache as caches,
    checkpoints,
    device as devices,
    files,
    framing,
    images,
    one_scale,
    processes,
    sampling,
    settings,
    specks,
    structure,
    targets,
    tracking,
)
from byol_mammo.checkpoints import load_backbone  # noqa: F401 - others import it from here
from byol_mammo.images import ImageReadError
from byol_mammo.lightly_parts import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    NegativeCosineSimilarity,
    cosine_schedule,
    cosine_warmup_schedule,
    deactivate_requires_grad,
    get_weight_decay_parameters,
    update_momentum,
)
from byol_mammo.objectives import Objective, ParameterGroup, VICReg, feature_std, rankme
from byol_mammo.settings import MammoError, StoppedError
from byol_mammo.specks import speck_peaks

if TYPE_CHECKING:  # imported where they are used, so that a run starts sooner
    from byol_mammo import extraction, labels, pictures, report

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
MIN_CONVERGENCE = 0.67  # tiles from here on, as if they held a mass, need no speck energy; 0 = off
HIGH_FREQ_ENERGY = 0.042  # tiles from here on need no intensity and no non-empty share; 0 = off
MIN_TILE_INTENSITY = 40  # mean of a tile's breast pixels, 0-255 scale at any bit depth; 0 = off
MIN_NON_ZERO_PIXELS = 0.7  # share of a tile's breast pixels that must not be empty; 0 = off
EXCLUDE_PECTORAL = True  # breast_ratio counts tissue without the pectoral muscle
PIXEL_SPACING_MM = 0.085  # mm per pixel where the manifest gives no spacing (VinDr-Mammo: 0.085)
TARGET_SPACING_MM = 0.0  # mm per pixel that every image is brought to before tiles are chosen; 0 = off
POLARITY = "auto"  # auto, as_is or inverted; auto = as manifest.csv says, else as the image looks
MAX_TILES = 0  # tiles in the cache, those of highest energy, spread over images; 0 = all
TILES_PER_EPOCH = 11_000  # tiles drawn per epoch, spread over images; 0 = all
ENERGY_SHARE = 0.0  # how much energy and convergence decide that draw; 0 = chance, 1 = they alone
QC_PAGES = False  # a picture of each image (row of rejections.csv) into the run's qc folder
EXTRACT_ONLY = False  # end once the pixel cache and the QC pages are there, before a GPU is taken
DRY_RUN = False  # say what would be read, extracted and trained, how many bytes and how long; no more
NUM_WORKERS = 16  # extraction processes; never more than the cores there are
DASK = ""  # scheduler file or address of a Dask cluster whose workers extract; empty = this machine
VIEW_SIZE = 0  # px, side of a view; 0 = the tile size
BACKBONE = "resnet50"  # resnet18, resnet34 or resnet50 (torchvision), or timm:NAME
WEIGHTS = "imagenet"  # imagenet, none, or the path of a checkpoint or state dict
INPUT_DIM = 2048  # backbone features; follows the backbone (512 for resnet18 and resnet34)
HIDDEN_DIM = 4096  # hidden units of the projection and prediction heads
PROJ_DIM = 256  # output of the projection and prediction heads
MOMENTUM_BASE = 0.996  # most target network momentum at the first step, rising to 1 by a cosine
BATCH_SIZE = 32  # tiles per step and process (GPU)
EPOCHS = 100  # passes over TILES_PER_EPOCH tiles
MAX_STEPS = 0  # stop after this many steps, schedules unchanged; 0 = off
LR = 2e-3  # peak learning rate at a global batch of 32; grows with its square root (lars: linearly)
OPTIMIZER = "adamw"  # adamw, or lars for batches of thousands (--lr 0.025 --weight_decay 1.5e-6)
WARMUP_EPOCHS = 10  # epochs of linear warm-up, at most half the run
BACKBONE_NORM = "auto"  # batch or frozen statistics of batch norm; auto = frozen from trained weights
BACKBONE_LR_FACTOR = 0.0  # times LR for the backbone; 0 = 0.1 from trained weights, else 1
PREDICTOR_LR_FACTOR = 1.0  # times LR for the prediction head
WARMUP_FROZEN_STEPS = -1  # steps in which the backbone rests; -1 = a fifth from trained weights, else 0
WEIGHT_DECAY = 1e-4  # weight decay; biases and normalisation parameters are exempt
MONITOR_TILES = 256  # tiles kept out of training to watch for collapse, at most a tenth of all
BYOL_WEIGHT = 1.0  # weight of BYOL's loss; 0 = the targets below alone
FREQ_LOSS_WEIGHT = 0.25  # weight of the frequency target, for specks; 0 = off
VICREG_WEIGHT = 0.0  # weight of VICReg's loss (25, 25, 1) of the online projections; 0 = off
STRUCTURE_LOSS_WEIGHT = -1.0  # of the structure target, for masses; 0 = off, -1 = 2 if views have 20 mm
LABELS = ""  # labels.csv for the online probe, which then chooses the best checkpoint; empty = off
PROBE_EVERY = 1  # epochs between online probes
CHECKPOINT_EVERY = 10  # epochs between numbered checkpoints; 0 = off
SAVE_EVERY = 10.0  # minutes between writes of last.pth, which signals and the end write too
LOG_EVERY = 10  # steps between rows of metrics.csv
PROGRESS = "auto"  # auto, bar, lines or none; auto = a bar on a terminal, else a line a minute
REPORT_EVERY = 5.0  # minutes between updates of pictures and report.html; 0 = none of them
REPORT = ""  # folder of a run whose report.html is written again, without training; empty = train
PEER_TIMEOUT = 10.0  # minutes that a process of several waits for the others to start
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
    "polarity": ("auto", "as_is", "inverted"),
    "backbone": ("resnet18_slim", "resnet18", "resnet34", "resnet50", f"{checkpoints.TIMM}NAME"),
    "backbone_norm": ("auto", "batch", "frozen"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "optimizer": ("adamw", "lars"),
    "on_collapse": ("warn", "stop"),
    "progress": ("auto", "bar", "lines", "none"),
    "wandb_mode": ("auto", "online", "offline", "disabled"),
}
LR_BATCH = 32  # batch size at which LR is meant
# Settings that may differ between a run and its resumption: they don't change the weights.
FREE_ON_RESUME = (
    "output_dir run_name cache_dir data_dir qc_pages extract_only dry_run num_workers dask "
    "max_steps save_every log_every device compile grad_checkpoint deterministic on_collapse resume "
    "wandb_mode wandb_project checkpoint_every labels probe_every progress report_every report "
    "peer_timeout"
).split()  # fmt: skip


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
    min_convergence: float = MIN_CONVERGENCE
    high_freq_energy: float = HIGH_FREQ_ENERGY
    min_tile_intensity: float = MIN_TILE_INTENSITY
    min_non_zero_pixels: float = MIN_NON_ZERO_PIXELS
    exclude_pectoral: bool = EXCLUDE_PECTORAL
    pixel_spacing_mm: float = PIXEL_SPACING_MM
    target_spacing_mm: float = TARGET_SPACING_MM
    polarity: str = POLARITY
    max_tiles: int = MAX_TILES
    tiles_per_epoch: int = TILES_PER_EPOCH
    energy_share: float = ENERGY_SHARE
    qc_pages: bool = QC_PAGES
    extract_only: bool = EXTRACT_ONLY
    dry_run: bool = DRY_RUN
    num_workers: int = NUM_WORKERS
    dask: str = DASK
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
    backbone_norm: str = BACKBONE_NORM
    backbone_lr_factor: float = BACKBONE_LR_FACTOR
    predictor_lr_factor: float = PREDICTOR_LR_FACTOR
    warmup_frozen_steps: int = WARMUP_FROZEN_STEPS
    weight_decay: float = WEIGHT_DECAY
    monitor_tiles: int = MONITOR_TILES
    byol_weight: float = BYOL_WEIGHT
    freq_loss_weight: float = FREQ_LOSS_WEIGHT
    structure_loss_weight: float = STRUCTURE_LOSS_WEIGHT
    vicreg_weight: float = VICREG_WEIGHT
    labels: str = LABELS
    probe_every: int = PROBE_EVERY
    checkpoint_every: int = CHECKPOINT_EVERY
    save_every: float = SAVE_EVERY
    log_every: int = LOG_EVERY
    progress: str = PROGRESS
    report_every: float = REPORT_EVERY
    report: str = REPORT
    peer_timeout: float = PEER_TIMEOUT
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
        settings.check_settings(self, CHOICES, RANGES)
        asked = self.byol_weight, self.vicreg_weight, self.freq_loss_weight, self.structure_loss_weight
        if not any(asked):
            raise MammoError("--byol_weight 0: nothing to learn; give --structure_loss_weight")

    @property
    def view_side(self) -> int:
        """Side of a view in px."""
        return self.view_size or self.tile_size

    @property
    def from_trained(self) -> bool:
        """Whether the backbone starts from trained weights, which a start must not spoil."""
        return self.weights != "none"

    @property
    def norm_frozen(self) -> bool:
        """Whether the backbone's batch norm keeps its statistics.

        New ones alone cost ImageNet's features 0.05 of AUROC on masses (docs/measured.md).
        """
        return self.backbone_norm == "frozen" or (self.backbone_norm == "auto" and self.from_trained)

    @property
    def backbone_pace(self) -> float:
        """The backbone's learning rate, as a share of LR."""
        return self.backbone_lr_factor or (0.1 if self.from_trained else 1.0)

    def frozen_steps(self, total_steps: int) -> int:
        """Steps in which the heads learn alone: random ones would spoil a trained start."""
        if self.warmup_frozen_steps >= 0:
            return self.warmup_frozen_steps
        return total_steps // 5 if self.from_trained else 0

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir) / (self.run_name or f"byol_{self.backbone}")


# Bounds that protect from settings which cannot work; batch norm needs two tiles.
RANGES: dict[str, tuple[float, float]] = {
    "tile_size": (32, 8192), "tile_stride": (8, 8192), "min_breast_ratio": (0, 1),
    "min_freq_energy": (0, math.inf), "min_convergence": (0, 1), "high_freq_energy": (0, math.inf),
    "min_tile_intensity": (0, 255), "min_non_zero_pixels": (0, 1),
    "pixel_spacing_mm": images.SPACING_RANGE, "target_spacing_mm": (0, images.SPACING_RANGE[1]),
    "max_tiles": (0, math.inf),
    "tiles_per_epoch": (0, math.inf), "energy_share": (0, 1),
    "num_workers": (0, 4096), "view_size": (0, 8192),
    "input_dim": (1, 65536),
    "hidden_dim": (1, 65536), "proj_dim": (2, 65536), "momentum_base": (0, 1),
    "batch_size": (2, 65536), "epochs": (1, 1_000_000), "max_steps": (0, math.inf), "lr": (0, 100),
    "warmup_epochs": (0, math.inf), "weight_decay": (0, 10), "monitor_tiles": (2, 65536),
    "freq_loss_weight": (0, 1000), "structure_loss_weight": (-1, 1000), "vicreg_weight": (0, 1000),
    "byol_weight": (0, 1000), "backbone_lr_factor": (0, 100), "predictor_lr_factor": (0, 100),
    "warmup_frozen_steps": (-1, math.inf),
    "probe_every": (1, math.inf), "checkpoint_every": (0, math.inf),
    "save_every": (0, math.inf), "log_every": (1, math.inf), "report_every": (0, math.inf),
    "peer_timeout": (0, math.inf), "seed": (0, 2**63 - 1),
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Turn flags into a Config; `--tile-size` equals `--tile_size`. Raises MammoError on a typo."""
    parser, comments = settings.make_parser(__doc__), settings.setting_help(__file__)
    values = settings.parse_fields(Config, parser, comments, argv)
    return Config(**one_scale.mark_stated(values, PIXEL_SPACING_MM, argv))


# ---- 2 Image ---------------------------------------------------------------------------------------


def read_mammogram(path: str | Path, polarity: str = "auto") -> np.ndarray:
    """Read a mammogram: (H, W) uint8 or uint16 at full bit depth, breast bright on dark, not clipped.

    Grey stored as RGB loses its copies, an alpha channel is dropped. A negative (MONOCHROME1-like) is
    inverted within its bit depth: what `polarity` says, as_is or inverted; auto asks the votes of
    `framing.polarity_votes`. Raises ImageReadError naming file and reason.
    """
    return read_and_reduce(path, polarity)[0]


def read_and_reduce(
    path: str | Path, polarity: str = "auto"
) -> tuple[np.ndarray, framing.ReducedImage, float]:
    """read_mammogram, its reduced copy, and the margin of the vote, negative where it was inverted.

    The margin is 1 or -1 where `polarity` was given, and close below framing.CLOSE_VOTE.
    """
    image = images.decode(path)
    content = framing.content_of(image)
    if polarity == "auto":
        margin = framing.polarity_margin(framing.polarity_votes(content))
    else:
        margin = -1.0 if polarity == "inverted" else 1.0
    if margin < -framing.MIN_INVERTED:
        image = (2 ** images.bit_depth(image, content.brightest) - 1) - image
        content = framing.content_of(image)
    return image, framing.picture_of(content), margin


# ---- 3 Breast mask ---------------------------------------------------------------------------------
# Levels of rejection: padding, frames and strips along the sides, then the air's grey level, then
# components, then the skin line. Most work on a reduced copy: a skin line is smooth over millimetres.

MIN_BREAST_AREA = 0.03  # share of the image below which a component is a label, not a breast


def segment_breast_tissue(image: np.ndarray) -> np.ndarray:
    """Breast mask of a mammogram (H, W) uint8 or uint16, bright on dark: (H, W) bool, one component.

    Includes skin line, fat and pectoral muscle; excludes air, labels, markers, tape, frame, padding.
    All False where there is no breast (empty, constant or noise).
    """
    small = framing.reduce_image(image)
    return small.enlarged(find_breast(small))


def find_breast(small: framing.ReducedImage) -> np.ndarray:
    """segment_breast_tissue on the reduced copy: (h, w) bool."""
    area = small.image
    if min(area.shape) < 16:
        return np.zeros(area.shape, bool)
    smooth = cv2.GaussianBlur(area, (0, 0), 1)
    levels = anatomy.grey_levels(smooth)
    if levels is None:
        return np.zeros(area.shape, bool)
    air, noise, tissue = levels
    digital, probe, film = (air + share * (tissue - air) for share in anatomy.SKIN_LEVELS)
    breast = anatomy.breast_above(area, smooth, digital + 2 * noise)
    # Digital skin ends in a step: going down to just above air gains hardly any area and keeps thin
    # skin. Film fades into the glow of scattered light, out of which the skin comes some way up.
    silhouette, probed = (
        anatomy.silhouette_area(part)
        for part in (breast, anatomy.breast_above(area, smooth, probe + 2 * noise))
    )
    if silhouette > 1.02 * probed:
        breast = anatomy.breast_above(area, smooth, max(film + noise, anatomy.FILM_SKIN * tissue))
    breast = anatomy.without_rims(breast)
    if breast.mean() < MIN_BREAST_AREA:
        return np.zeros(area.shape, bool)
    return anatomy.without_film_ends(anatomy.without_labels(breast, area), area)


def segment_pectoral_muscle(image: np.ndarray, mask: np.ndarray, view: str = "") -> np.ndarray:
    """Pectoral muscle inside a breast mask: (H, W) uint8 or uint16 and bool -> (H, W) bool.

    The muscle is the bright part in the upper corner of the chest side on MLO views; its border is the
    path of strongest bright-to-dark edges near the best line or arc. `view`: CC has none; on MLO, where
    there is one, less is asked of it; any other is judged. All False where no border is long, bright
    and contrasted enough.
    """
    small = framing.reduce_image(image)
    breast = small.reduced(mask.view(np.uint8) * np.uint8(255)) > 127
    return small.enlarged(find_muscle(small, breast, view)) & mask


def find_muscle(small: framing.ReducedImage, breast: np.ndarray, view: str = "") -> np.ndarray:
    """segment_pectoral_muscle on the reduced copy: (h, w) bool."""
    muscle = np.zeros(breast.shape, bool)
    left, top, width, height = images.bounding_box(breast)
    if view == "CC" or min(width, height) < 16 or breast.mean() >= anatomy.CLOSE_UP:
        return muscle
    # From the chest wall and the upper end of the breast, wherever they lie in the picture.
    box = slice(top, top + height), slice(left, left + width)
    turn = -1 if anatomy.chest_side(breast) == -1 else 1
    area, inner = small.image[box][:, ::turn], breast[box][:, ::turn]
    muscle[box][:, ::turn] = anatomy.muscle_in(area, inner, known=view == "MLO")
    return muscle


# ---- 4 Tiles ---------------------------------------------------------------------------------------


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
    return specks.energy_of_peaks(speck_peaks(image, mask, spacing_mm), spacing_mm)


@dataclass(frozen=True)
class Criterion:
    """What a tile must fulfil to be kept: a column of score_tiles compared with a setting."""

    column: str
    setting: str  # name of its threshold in Config
    title: str  # in pictures and reports: what is wrong with a tile that fails
    colour: str = "#888888"  # of its mark in pictures
    marker: str = "."
    passes: Callable[[Any, Any], Any] = operator.ge  # (values, threshold); operator.le for "at most"
    # Column and setting that spare it where a tile reaches both: another way to be kept; 0 = off.
    spared_by: tuple[str, str] = ("", "")


HIGH_ENERGY = ("freq_energy", "high_freq_energy")  # specks may lie in dark fat or at the skin's edge
# In the order in which tiles are judged. Scoring, rejection, cache key, tables and pictures follow it.
CRITERIA = (
    Criterion("breast_ratio", "min_breast_ratio", "too little breast", "#999999", "x"),
    Criterion(
        "mean_intensity", "min_tile_intensity", "too dark", "#cc79a7", "v", spared_by=HIGH_ENERGY
    ),
    Criterion(
        "non_zero_ratio", "min_non_zero_pixels", "too many empty pixels", "#d55e00", "D",
        spared_by=HIGH_ENERGY,
    ),
    Criterion(
        "freq_energy", "min_freq_energy", "too little structure", "#f0e442", "+",
        spared_by=("convergence", "min_convergence"),
    ),
)  # fmt: skip
COLUMNS = [criterion.column for criterion in CRITERIA]
SCORES = list(dict.fromkeys([*COLUMNS, *(c.spared_by[0] for c in CRITERIA if c.spared_by[0])]))


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
    window: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """Score every grid position of an image (H, W) with its breast mask (H, W) bool.

    Columns: x, y (px, upper left corner), and
    breast_ratio      share of the tile that is breast, without muscle if EXCLUDE_PECTORAL
    mean_intensity    mean of the tile's breast pixels in the image's window, 0-255
    non_zero_ratio    share of the tile's breast pixels that are not 0
    freq_energy       see frequency_energy
    convergence       strongest convergence at the scale of masses, see structure.convergence
    rejected_by       the first criterion that the tile fails; '' = kept
    The means are over the breast in the tile, not over the tile: skin edges hold calcifications too,
    and how much of a tile may be air is MIN_BREAST_RATIO's business alone. `muscle` and `window`
    save a second search where they are known already.
    """
    size = config.tile_size
    ys = tile_positions(image.shape[0], size, config.tile_stride)
    xs = tile_positions(image.shape[1], size, config.tile_stride)
    y, x = (axis.ravel() for axis in np.meshgrid(ys, xs, indexing="ij"))
    low, high = window or intensity_window(image, mask)
    if not config.exclude_pectoral:
        muscle = np.zeros_like(mask)
    elif muscle is None:
        muscle = segment_pectoral_muscle(image, mask)
    spacing_mm = spacing_mm or config.pixel_spacing_mm
    reduced = specks.speck_grid(image, mask, spacing_mm)
    peaks = speck_peaks(image, mask, spacing_mm, reduced)

    def layers(band: tuple[slice, slice]) -> list[tuple[np.ndarray, Callable[[np.ndarray], float]]]:
        inside = mask[band].view(np.uint8)
        grey = cv2.copyTo(image[band], inside)
        counted = grey, inside, muscle[band].view(np.uint8)
        # cv2.sumElems is several times as fast as np.sum on 16 bits.
        return [(grey, lambda g: cv2.sumElems(g)[0]), *((part, cv2.countNonZero) for part in counted)]

    grey, filled, breast, covered = tile_sums(layers, mask, ys, xs, size)
    breast_or_1 = np.maximum(breast, 1)
    table = pd.DataFrame(
        {
            "x": x,
            "y": y,
            "breast_ratio": (breast - covered) / size**2,
            "mean_intensity": np.clip(255 * (grey / breast_or_1 - low) / (high - low), 0, 255),
            "non_zero_ratio": filled / breast_or_1,
            "freq_energy": specks.tile_energies(peaks, y, x, size, spacing_mm),
            "convergence": structure.tile_convergence(reduced, muscle, y, x, size, spacing_mm),
        }
    )
    return table.assign(rejected_by=_first_failure(table, config))


def tile_sums(
    layers: Callable[[tuple[slice, slice]], Sequence[tuple[np.ndarray, Callable[[np.ndarray], float]]]],
    mask: np.ndarray,
    ys: np.ndarray,
    xs: np.ndarray,
    size: int,
) -> np.ndarray:
    """(layers, tiles) float64: sums over each tile of what `layers` makes of a band of rows.

    Each layer is an array and what adds up a part of it. Nothing counts outside the mask's box (H, W).
    Tiles overlap: sums are taken once for each cell between the tiles' borders; a summed-area table
    (Crow 1984) of the cells then gives the tiles'.
    """
    rows = np.unique(np.concatenate([ys, np.minimum(ys + size, mask.shape[0])]))
    cols = np.unique(np.concatenate([xs, np.minimum(xs + size, mask.shape[1])]))
    left, top, width, height = images.bounding_box(mask)
    sums = np.zeros((len(layers(np.s_[:1, :1])), len(rows), len(cols)))  # above and left of a border
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


def failures(table: pd.DataFrame, config: Config) -> dict[str, np.ndarray]:
    """Which tiles of score_tiles fail each of CRITERIA by itself: (N,) bool by column."""
    return {
        c.column: ~c.passes(table[c.column].to_numpy(), getattr(config, c.setting)) for c in CRITERIA
    }


def _first_failure(table: pd.DataFrame, config: Config) -> np.ndarray:
    """The first criterion that each tile fails and is not spared, '' where there is none."""
    failed = failures(table, config)
    # A tile without breast is of no use even where every threshold is 0.
    failed["breast_ratio"] |= table["breast_ratio"].to_numpy() == 0
    for criterion in CRITERIA:
        column, setting = criterion.spared_by
        if setting and getattr(config, setting):
            failed[criterion.column] &= table[column].to_numpy() < getattr(config, setting)
    return np.select([failed[name] for name in COLUMNS], COLUMNS, default="")


def is_rescued(table: pd.DataFrame, config: Config) -> pd.Series:
    """Which tiles of score_tiles are kept although they fail a criterion, as they are spared it."""
    return (table["rejected_by"] == "") & np.any(list(failures(table, config).values()), axis=0)


def choose_tiles(records: list[dict[str, Any]], config: Config) -> pd.DataFrame:
    """All kept tiles, or MAX_TILES of them: each image's best first, then each image's second best."""
    frames = [
        pd.DataFrame(record["tiles"]).assign(image=index)
        for index, record in enumerate(records)
        if record.get("tiles", {}).get("x")
    ]
    if not frames:
        return pd.DataFrame(columns=["image", "x", "y", *SCORES])
    tiles = pd.concat(frames, ignore_index=True)[["image", "x", "y", *SCORES]]
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
    step = images.sampling_step(image)
    grey = image[::step, ::step][mask[::step, ::step]]
    if not grey.size:
        return 0.0, 1.0
    low, high = (float(level) for level in np.percentile(grey, (0.1, 99.9), method="nearest"))
    return low, max(high, low + 1)


def extract_image(
    path: str, spacing_mm: float, config: Config, view: str = ""
) -> tuple[dict[str, Any], np.ndarray]:
    """Segment one mammogram, whose projection is `view` if known, and choose its tiles.

    Returns a record (window, origin, bit depth, spacing, funnel, kept tiles as columns) and the pixels
    of the box around the kept tiles plus VIEW_MARGIN, zero outside the breast mask, grey levels as they
    are. All in px of the file, or of the image at TARGET_SPACING_MM, the spacing then.
    Raises ImageReadError, also where no breast is found or the image is smaller than a tile.
    """
    image, small, margin = read_and_reduce(path, config.polarity)
    # -- One scale: this line is part of a cache's key where it is on, see SCALE_CODE
    image, small, spacing_mm = one_scale.rescaled(
        path, image, small, spacing_mm, config.target_spacing_mm
    )
    # -- As the image is now
    size = config.tile_size
    if min(image.shape) < size:
        shape = f"{image.shape[1]} x {image.shape[0]}"
        raise ImageReadError(path, f"{shape} px is smaller than a tile; lower --tile_size ({size})")
    breast = find_breast(small)
    if not breast.any():
        raise ImageReadError(path, "no breast found (empty, all-white or noise)")
    mask = small.enlarged(breast)
    muscle = small.enlarged(find_muscle(small, breast, view)) & mask
    window = intensity_window(image, mask)
    table = score_tiles(image, mask, config, spacing_mm, muscle, window)
    kept = table[table["rejected_by"] == ""].drop(columns="rejected_by")
    rows, cols = tile_box(kept, config, image.shape)
    pixels = image[rows, cols]
    if pixels.size:
        if window[0] < 1:  # as often with 8 bits: in a cache 0 is air, see sample_tiles
            pixels = np.maximum(pixels, 1)
        pixels = cv2.copyTo(pixels, mask[rows, cols].view(np.uint8))
    counts = table["rejected_by"].value_counts()
    record = {
        "origin": (rows.start, cols.start),
        "shape": pixels.shape,
        "window": window,
        "bit_depth": images.bit_depth(image, small.brightest),
        "spacing_mm": spacing_mm,
        "polarity_margin": margin,
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

IMAGE_COLUMNS = (  # of images.csv; offsets follow no order, and what lies between images is no one's
    "image study_id laterality view offset height width y0 x0 low high bit_depth spacing_mm".split()
)
# The code that makes masks, tiles and pixels: file, beginning, end. An edited filter makes a new cache.
PIXEL_CODE = (
    (__file__, "# ---- 2 Image", "    # -- One scale"),
    (__file__, "    # -- As the image is", "# ---- 5 Pixel cache"),
    (images.__file__, "# ---- Decoding", ""),
    (framing.__file__, "", ""),
    (anatomy.__file__, "", ""),
    (specks.__file__, "", ""),
    (structure.__file__, "", ""),
    (caches.__file__, "# ---- Averaged copy", ""),
)
# The code that brings images to TARGET_SPACING_MM: caches at the images' own scale don't depend on it.
SCALE_CODE = (
    (__file__, "    # -- One scale", "    # -- As the image is"),
    (one_scale.__file__, "# ---- Resampling", ""),
)


def cache_inputs(sources: pd.DataFrame, config: Config) -> dict[str, Any]:
    """All that the cache depends on: tile settings, code, and name, size and mtime of each file."""
    names = "tile_size tile_stride exclude_pectoral pixel_spacing_mm max_tiles".split()
    names += [name for c in CRITERIA for name in (c.setting, c.spared_by[1]) if name]
    names += ["target_spacing_mm"] * (config.target_spacing_mm > 0)
    rows = sources.drop(columns="path").to_csv(index=False)
    return {
        # As floats: 40, typed as a flag, is 40.0.
        "settings": {name: float(getattr(config, name)) for name in names},
        "polarity": config.polarity,
        "view_margin": VIEW_MARGIN,
        "code": settings.code_version(PIXEL_CODE + SCALE_CODE * (config.target_spacing_mm > 0)),
        "files": hashlib.sha256(rows.encode()).hexdigest(),
    }


def cache_key(inputs: dict[str, Any]) -> str:
    """Name of the cache folder: 16 hex digits of the inputs' hash."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def extract_to_file(
    index: int, path: str, spacing_mm: float, config: Config, view: str = "", *, folder: str
) -> dict[str, Any]:
    """Extract image number `index` and append its pixels to the folder's file of their depth.

    Returns its record for the Journal, with the `offset` of its pixels or the `error` that skipped it;
    `unread` tells of an error of the system, see Journal.add.
    """
    from byol_mammo import extraction

    cv2.setNumThreads(1)  # one process per core is already running
    extraction.keep_freed_memory()
    try:
        record, pixels = extract_image(path, spacing_mm, config, view)
    except ImageReadError as error:
        skipped = {"index": index, "error": error.reason}
        return skipped | {"unread": path} if isinstance(error, images.UnreadError) else skipped
    file, dtype = extraction.pixel_file(Path(folder), record["bit_depth"])
    offset = extraction.append_pixels(file, np.ascontiguousarray(pixels, dtype)) if pixels.size else 0
    return {"index": index, "offset": offset, **record}


def build_cache(config: Config) -> Path:
    """Return the folder of the finished pixel cache, extracting whatever is missing.

    Images run in parallel processes and a journal tells which are done, so that an interrupted build
    goes on where it stopped; the folder appears under its name only when complete. A second run that
    needs the same cache waits for the first.
    """
    sources = images.list_sources(config.data_dir)
    inputs = cache_inputs(sources, config)
    final = Path(config.cache_dir) / cache_key(inputs)
    caches.check_readable(final)
    if caches.is_finished(final):
        caches.note_other_versions(final)
        return final
    caches.note_other_code(final, inputs)

    def build(building: Path, journal: Path) -> None:
        finish_cache(building, extract_all(sources, config, journal), sources, inputs, config)

    caches.build_once(final, build)
    return final


def source_spacing(sources: pd.DataFrame, config: Config) -> pd.Series:
    """mm per pixel of each of list_sources; NaN where one scale is asked for and nobody tells it."""
    known = pd.to_numeric(sources["spacing_mm"])
    assumed = config.pixel_spacing_mm == PIXEL_SPACING_MM
    return known if config.target_spacing_mm and assumed else known.fillna(config.pixel_spacing_mm)


def extraction_jobs(sources: pd.DataFrame, config: Config) -> list[tuple]:
    """Arguments of extract_to_file for each image; says what of spacing and files is worth a note."""
    spacing = source_spacing(sources, config)
    if spacing.isna().any():
        one_scale.note_unknown(spacing)
    elif config.pixel_spacing_mm == PIXEL_SPACING_MM or not sources["spacing_mm"].isna().all():
        images.note_unknown_spacing(sources, config.pixel_spacing_mm)
    images.note_left_out(sources)
    # Images of one polarity share a Config.
    configs = {name: dataclasses.replace(config, polarity=name) for name in CHOICES["polarity"]}
    given = images.known_polarity(sources, config.polarity)
    return [
        (index, path, float(mm), configs[polarity], view)
        for index, (path, mm, polarity, view) in enumerate(
            zip(sources["path"], spacing, given, sources["view"], strict=True)
        )
    ]


def extract_all(sources: pd.DataFrame, config: Config, journal: Path) -> list[dict[str, Any]]:
    """Extract to the folder `journal` what no other beside it holds yet; returns the records of all."""
    from byol_mammo import extraction

    jobs = extraction_jobs(sources, config)
    records = extraction.extract_missing(
        extract_to_file, jobs, journal, config.num_workers, config.progress, config.dask
    )
    extraction.note_polarity(sources["image"], [record.get("polarity_margin") for record in records])
    return records


def foresee_cache(config: Config) -> int:
    """Say which pixel cache would be used, or what making it takes, from a few images tried in memory.

    Returns how many tiles it holds, or about how many it would. Writes nothing.
    """
    from byol_mammo import foresight

    sources = images.list_sources(config.data_dir)
    cache = Path(config.cache_dir) / cache_key(cache_inputs(sources, config))
    caches.check_readable(cache)
    read, count = foresight.size_text(sources["size"].sum()), len(sources)
    studies = sources["study_id"].nunique()
    print(f"images    {count:,} of {studies:,} studies in {config.data_dir}, {read}")
    if config.target_spacing_mm:
        print(one_scale.describe(source_spacing(sources, config), config.target_spacing_mm))
    if caches.is_finished(cache):
        tiles = len(pd.read_csv(cache / "tiles.csv", usecols=["image"]))
        print(f"cache     {cache} is there: {tiles:,} tiles, nothing to extract")
        return tiles
    threads = cv2.getNumThreads()
    tried, found, seconds = foresight.try_some(extraction_jobs(sources, config), try_extraction)
    cv2.setNumThreads(threads)
    scale, workers = count / len(tried), foresight.count_workers(config.num_workers, count, config.dask)
    tiles, most = round(scale * sum(count for count, *_ in found)), math.inf
    if 0 < config.max_tiles < tiles:
        side = config.tile_size + 2 * math.ceil(VIEW_MARGIN * config.tile_size)
        tiles, most = config.max_tiles, config.max_tiles * side**2
    kept, beside = foresight.pixel_bytes([pixels for _, pixels, _ in found], scale, most, config.dask)
    more = f" ({foresight.size_text(beside)} more until it is in order)" if beside else ""
    begun = cache.with_name(f".{cache.name}.building").exists()
    print(
        f"cache     {cache} would be {'finished' if begun else 'made'}: about {tiles:,} tiles, "
        f"{foresight.size_text(kept)}{more}, {foresight.duration_text(scale * seconds / workers)} in "
        f"{workers} processes (from {len(tried)} images); {foresight.space_text(cache, kept + beside)}"
    )
    for job, (_, _, reason) in zip(tried, found, strict=True):
        if reason:
            print(f"skipped   {job[1]}: {reason}")
    return tiles


def try_extraction(job: tuple) -> tuple[int, tuple[int, int], str]:
    """Tiles of an image, its pixels and the bytes of each, and why it would be skipped."""
    cv2.setNumThreads(1)  # as in extract_to_file
    try:
        record, pixels = extract_image(*job[1:])
    except ImageReadError as error:
        return 0, (0, 0), error.reason
    return len(record["tiles"]["x"]), (pixels.size, pixels.itemsize), ""


def finish_cache(
    building: Path,
    records: list[dict[str, Any]],
    sources: pd.DataFrame,
    inputs: dict[str, Any],
    config: Config,
) -> None:
    """Write the cache from the records of extract_all. Raises MammoError where no tile was kept."""
    from byol_mammo import extraction, report

    tiles = choose_tiles(records, config)
    kept = tiles["image"].value_counts()
    rejections = report.tile_funnel(records, kept, sources["image"], COLUMNS)
    if tiles.empty:
        criteria = ", --".join(criterion.setting for criterion in CRITERIA)
        remedy = (
            "mend what is said of the images, for instance by a smaller --tile_size with every command"
        )
        if rejections["positions"].any():
            remedy = f"loosen the criterion that rejects most (--{criteria}), or see --qc_pages"
        raise MammoError(f"no tile was kept.\n{report.describe_funnel(rejections, COLUMNS)}\n{remedy}")
    images, parts = _index_images(records, tiles, sources, config)
    tiles = tiles.assign(image=tiles.groupby("image").ngroup())
    tables = {"images": images, "tiles": tiles, "rejections": rejections}
    extraction.write_cache(building, tables, parts, inputs, config.num_workers, config.progress)


def _index_images(
    records: list[dict[str, Any]], tiles: pd.DataFrame, sources: pd.DataFrame, config: Config
) -> tuple[pd.DataFrame, list[extraction.Part]]:
    """The rows of images.csv, and where the pixels of each were extracted to."""
    from byol_mammo import extraction

    rows, parts = [], []
    for index, group in tiles.groupby("image"):
        record = records[int(index)]
        (y0, x0), shape = record["origin"], record["shape"]
        # Smaller than what was extracted where MAX_TILES cut tiles.
        ys, xs = tile_box(group, config, (y0 + shape[0], x0 + shape[1]))
        box = (record["offset"], ys.stop - ys.start, xs.stop - xs.start, ys.start, xs.start)
        source = sources.loc[int(index), ["image", "study_id", "laterality", "view"]]
        rows.append([*source, *box, *record["window"], record["bit_depth"], record["spacing_mm"]])
        place = record["folder"], record["bit_depth"], record.get("writer", "")
        file, dtype = extraction.pixel_file(*place)
        inside = slice(ys.start - y0, ys.stop - y0), slice(xs.start - x0, xs.stop - x0)
        parts.append((file, dtype, record["offset"], tuple(shape), *inside))
    table = pd.DataFrame(rows, columns=IMAGE_COLUMNS)
    if config.target_spacing_mm:
        spacing = source_spacing(sources, config)[sorted(set(tiles["image"]))]
        table[one_scale.COLUMN] = config.target_spacing_mm / spacing.to_numpy()
    return table, parts


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
        self.digest = caches.cache_digest(cache) if cache != Path() else ""  # the cache may go later
        self.tile_size, self.reduce, self.grey_scale = tile_size, reduce, grey_scale
        # torch has few uint16 operations: the bits travel as int16, cut_regions reads them back.
        values = pixels.view(np.int16) if pixels.dtype == np.uint16 else pixels
        with warnings.catch_warnings():  # nobody writes to pixels
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            self.pixels = torch.from_numpy(values)
        shape, offset = caches.reduced_layout(images, reduce)
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
    pixels = files.map_array(cache / "pixels.npy")
    grey_scale = 256 if reduce > 1 and pixels.dtype == np.uint8 else 1
    if reduce > 1:
        pixels = caches.open_reduced(cache, pixels, images, reduce, grey_scale)
    return MammogramTiles(pixels, images, table, tile_size, reduce, grey_scale, cache)


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
DARKEST = 1e-4  # of tissue at or below the window's low end; as 0 it would be air to adjust_photometry


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

    Returns (B, 1, size, size) float32 on the device of the pixels: DARKEST at the low end of the image's
    window, 1 at its high end, more above it; 0 outside the breast and beyond the image, and only there.
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
    matrix = devices.to_device((to_region @ homographies).astype(np.float32), device)
    low, high = devices.to_device(tiles.window[ids], device).T.reshape(2, count, 1, 1, 1)

    # Where the reduced copy is still finer than the view, average 2 x 2 samples for each view pixel.
    fine = 2 if tiles.tile_size / tiles.reduce / size > 1.25 else 1
    axis = (torch.arange(size * fine, device=device) + 0.5) * (2 / (size * fine)) - 1
    v, u = (part.flatten() for part in torch.meshgrid(axis, axis, indexing="ij"))  # (N,)
    # No matrix product: where TF32 is on, positions would be off by a tenth of a pixel.
    x, y, w = (matrix[..., 0:1] * u + matrix[..., 1:2] * v + matrix[..., 2:]).unbind(1)  # (B, N)
    grid = torch.stack([x / w, y / w], dim=-1).view(count, size * fine, size * fine, 2)
    view = F.grid_sample(cut_regions(tiles, ids, reach), grid, align_corners=False)
    view = ((view - low) / (high - low)).clamp_min(DARKEST) * (view > 0)
    return F.avg_pool2d(view, fine) if fine > 1 else view


def cut_regions(tiles: MammogramTiles, ids: np.ndarray, reach: int) -> Tensor:
    """Grey values around tiles `ids` (B,): (B, 1, 2 reach, 2 reach) float32, 0 off the image.

    One gather of rows, however many tiles: on a GPU the launch of a kernel for each would cost more.
    """
    pixels, side = tiles.pixels, 2 * reach
    put = functools.partial(devices.to_device, device=pixels.device)
    corner = np.floor(tiles.centre[ids]).astype(np.int64) - reach
    x, y = corner.T[..., None] + np.arange(side)  # (B, side) each
    offset, height, width = tiles.layout[ids].T[..., None]
    start = (offset + y.clip(0, height - 1) * width + x[:, :1]).ravel()
    # All runs of `side` pixels, as a view: places of pixels would take more memory than the pixels do.
    runs = pixels.unfold(0, side, 1)
    place = start.clip(0, len(runs) - 1)
    rows = runs.index_select(0, put(place))
    # A run that begins before the first pixel or ends behind the last, if there is one, pixel by pixel.
    beyond = np.flatnonzero(place != start)
    places = (start[beyond, None] + np.arange(side)).clip(0, len(pixels) - 1)
    rows.index_copy_(0, put(beyond), pixels[put(places)])
    lines, columns = put(np.stack([(y >= 0) & (y < height), (x >= 0) & (x < width)]))
    regions = rows.view(-1, 1, side, side).mul_(lines[:, None, :, None]).mul_(columns[:, None, None])
    return (regions.view(torch.uint16) if regions.dtype == torch.int16 else regions).float()


def adjust_photometry(view: Tensor, spec: ViewSpec, rng: np.random.Generator) -> Tensor:
    """Blur, brightness and contrast of (B, 1, S, S), parameters per sample; air stays 0."""
    count = len(view)
    draw = rng.uniform(-1, 1, (count, 2)) * (spec.brightness, spec.contrast) + 1
    # A sigma near 0 leaves the view as it is: half of the views are not blurred.
    sigmas = np.where(rng.random(count) < 0.5, rng.uniform(0, spec.blur, count), 0).clip(1e-3)
    factors = devices.to_device(np.column_stack([draw, sigmas]).astype(np.float32), view.device)
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
        tiles.pixels = devices.to_device(tiles.pixels.numpy(), device)
    sharp = sample_tiles(tiles, ids, random_homographies(spec, rng, len(ids)), size)
    view = sharp if spec == PLAIN_VIEW else adjust_photometry(sharp, spec, rng)
    return View(spec.kind, (view - GREY_MEAN) / GREY_STD, sharp)


# ---- 7 Model ---------------------------------------------------------------------------------------

CLASSES = ("mass", "calcification")
CLASSIFIER_HIDDEN = 2048  # hidden units of the classification head


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
        self.grad_checkpoint = self.norm_frozen = False
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

    def features_and_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Online features, and the map they sum up: (B, 1 or 3, H, W) -> (B, D), (B, D, H/32, W/32)."""
        return self._run_backbone(functools.partial(checkpoints.features_and_map, self.backbone), x)

    def train(self, mode: bool = True) -> MammogramBYOL:
        """Training or eval mode; with `norm_frozen` the backbones' batch norm stays in eval mode."""
        super().train(mode)
        if self.norm_frozen:
            for module in (*self.backbone.modules(), *self.backbone_momentum.modules()):
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _run_backbone(self, layers: Callable[[Tensor], Any], x: Tensor) -> Any:
        x = _three_channels(x)
        if self.grad_checkpoint and torch.is_grad_enabled():
            # Chen et al. 2016 (arXiv:1604.06174): activations are computed again in the backward pass.
            contexts = lambda: (nullcontext(), devices.statistics_frozen(self.backbone))  # noqa: E731
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


def _three_channels(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


# ---- 8 Objective ------------------------------------------------------------------------------------
# An objective is what a step minimises. Another one is another class here and a line in build_objective;
# the loop, monitoring, checkpoints and reports ask it for what they need.


class BYOL(Objective):
    """The symmetric loss of BYOL, -1 at perfect agreement (eq. 2 of the paper is 2 + 2 times this).

    Each view passes alone, so that batch statistics belong to one view (section 3.2). With a weight,
    VICReg's loss (Bardes et al. 2022) beside it spreads the online projections of all ranks.
    """

    curves: ClassVar[dict[str, str]] = {
        "loss": "BYOL loss (-1 = agreement)",
        "vicreg_loss": "VICReg loss",
        "momentum": "target momentum",
    }

    def __init__(self, model: MammogramBYOL, config: Config) -> None:
        super().__init__(model)
        self.config = config
        self.criterion = NegativeCosineSimilarity()
        self.vicreg = VICReg(gather_distributed=True)

    def trained(self) -> list[ParameterGroup]:
        """The online network, as far as a loss asks for it."""
        model, config = self.model, self.config
        groups = [ParameterGroup([model.backbone], config.backbone_pace, rests=True)]
        if config.byol_weight or config.vicreg_weight:
            groups.append(ParameterGroup([model.projection_head]))
        if config.byol_weight:
            groups.append(ParameterGroup([model.prediction_head], config.predictor_lr_factor))
        return groups

    def forward(self, views: Sequence[View]) -> tuple[Tensor, dict[str, Tensor]]:
        """BYOL's loss of two views."""
        return self.byol_loss(views, [self.model.get_features(view.image) for view in views])

    def byol_loss(
        self, views: Sequence[View], features: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss from the online features of two views, in fp32 also under autocast."""
        weight, vicreg_weight = self.config.byol_weight, self.config.vicreg_weight
        with nullcontext() if weight or vicreg_weight else torch.no_grad():
            projections = [self.model.projection_head(part) for part in features]
        loss = projections[0].new_zeros((), dtype=torch.float32)
        metrics = {"feature_std": feature_std(projections[0].detach())}
        if weight:
            wanted = [self.model.forward_target(view.image).float() for view in views][::-1]
            predictions = [self.model.prediction_head(part).float() for part in projections]
            errors = [self.criterion(*pair) for pair in zip(predictions, wanted, strict=True)]
            loss = 0.5 * (errors[0] + errors[1])
            metrics["loss"] = loss.detach()
            loss = weight * loss
        if vicreg_weight:
            with torch.autocast(projections[0].device.type, enabled=False):
                spread = self.vicreg(*(part.float() for part in projections))
            loss, metrics["vicreg_loss"] = loss + vicreg_weight * spread, spread.detach()
        return loss, metrics

    def after_step(self, step: int, total_steps: int) -> dict[str, float]:
        """Move the target; its momentum rises to 1 by a cosine (section 3.2)."""
        base = first_momentum(self.config.momentum_base, total_steps)
        momentum = float(cosine_schedule(step, total_steps, base, 1.0))
        self.model.update_target(momentum)
        return {"momentum": momentum}

    def describe(self, total_steps: int) -> str:
        """What is asked for, for people: the losses by weight, and how the schedule begins."""
        config = self.config
        weights = {"BYOL": config.byol_weight, "VICReg": config.vicreg_weight}
        asked = [f"{name} x {weight:g}" for name, weight in weights.items() if weight]
        norm = "frozen" if config.norm_frozen else "the batch's"
        return (
            f"{', '.join(asked) or 'targets alone'}; target momentum from "
            f"{first_momentum(config.momentum_base, total_steps):.4g}; backbone: {norm} statistics, "
            f"lr x {config.backbone_pace:g}, rests {config.frozen_steps(total_steps)} steps"
        )

    def embed(self, features: Tensor) -> Tensor:
        """Online projections."""
        return self.model.projection_head(features)


def first_momentum(most: float, total_steps: int) -> float:
    """The target's momentum at the first step: `most`, but less in a run too short for it.

    Under the cosine a share of exp(-(1 - momentum) * total_steps / 2) of the initial target is left in
    the end: with 0.996 after 252 steps 60 %, and random weights would be what the views agree on. At
    most exp(-3), a twentieth, may be.
    """
    return min(most, max(0.0, 1 - 6 / total_steps))


class TargetBYOL(BYOL):
    """BYOL, and heads beside it that tell from each view's feature map what the sharp view holds.

    See byol_mammo/targets.py: SpeckHead for specks, StructureHead for the scale of masses.
    """

    curves: ClassVar[dict[str, str]] = {
        **BYOL.curves,
        **{head.metric: head.title for head in (targets.SpeckHead, targets.StructureHead)},
    }

    def __init__(
        self, model: MammogramBYOL, config: Config, heads: Sequence[tuple[targets.Head, float]]
    ) -> None:
        """`heads` and the weights of their losses."""
        super().__init__(model, config)
        self.weights = {head.name: weight for head, weight in heads}
        for head, _ in heads:
            self.add_module(head.name, head)

    @property
    def heads(self) -> list[targets.Head]:
        """The heads in order."""
        return [getattr(self, name) for name in self.weights]

    def describe(self, total_steps: int) -> str:
        """BYOL's, and the heads."""
        heads = [f"{head.metric} x {self.weights[head.name]:g}" for head in self.heads]
        return f"{', '.join(heads)}, {super().describe(total_steps)}"

    def trained(self) -> list[ParameterGroup]:
        """The online network and the heads, which decay no more than a bias does."""
        return [*super().trained(), ParameterGroup([*self.heads], decays=False)]

    def forward(self, views: Sequence[View]) -> tuple[Tensor, dict[str, Tensor]]:
        """BYOL's loss plus the weighted losses of the heads, each a mean over the views."""
        features, maps = zip(*(self.model.features_and_map(view.image) for view in views), strict=True)
        loss, metrics = self.byol_loss(views, features)
        # DDP wants a gradient of what makes features of a map, in some of timm a norm.
        if not loss.requires_grad:
            loss = loss + sum(0 * part.float().sum() for part in features)
        for head in self.heads:
            errors = [head.loss(found, view.sharp) for found, view in zip(maps, views, strict=True)]
            error = (errors[0] + errors[1]) / 2
            loss = loss + self.weights[head.name] * error
            metrics[head.metric] = error.detach()
        return loss, metrics


# The two targets' weighted losses start near 0.8 each, about as far as BYOL's own has to fall.
STRUCTURE_WEIGHT = 2.0  # of the structure target where STRUCTURE_LOSS_WEIGHT is -1
TARGET_SAMPLE = 256  # tiles that scale what the heads are asked for


def build_objective(
    model: MammogramBYOL, config: Config, tiles: MammogramTiles, train_ids: np.ndarray
) -> Objective:
    """The objective that the settings ask for, on the CPU."""
    # One scale for all images, whose detectors differ by less than masses do.
    step_mm = float(tiles.images["spacing_mm"].median()) * config.tile_size / config.view_side
    structure_weight = config.structure_loss_weight
    if structure_weight < 0:
        has_room = step_mm * config.view_side >= targets.MIN_STRUCTURE_SIDE
        structure_weight = STRUCTURE_WEIGHT if has_room else 0.0
    if not config.freq_loss_weight and not structure_weight:
        if not (config.byol_weight or config.vicreg_weight):
            raise MammoError("--byol_weight 0: views of less than 20 mm leave nothing to learn")
        return BYOL(model, config)
    ids = train_ids[:: -(-len(train_ids) // TARGET_SAMPLE)]
    parts = np.array_split(ids, -(-len(ids) // 32))
    views = [make_view(tiles, part, PLAIN_VIEW, config.view_side) for part in parts]
    sample = torch.cat([view.sharp.cpu() for view in views])
    heads: list[tuple[targets.Head, float]] = []
    if config.freq_loss_weight:
        heads.append((targets.SpeckHead(sample, config.input_dim), config.freq_loss_weight))
    if structure_weight:
        head = targets.StructureHead(sample, config.input_dim, step_mm)
        heads.append((head, structure_weight))
    return TargetBYOL(model, config, heads)


def build_optimizer(objective: Objective, config: Config) -> torch.optim.Optimizer:
    """AdamW or LARS over what the objective trains; all its other parameters are frozen."""
    from byol_mammo import lars

    objective.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for modules, lr_factor, decays, rests in objective.trained():
        weights, plain = get_weight_decay_parameters(modules)  # plain: biases and norms
        parts = [(weights, config.weight_decay if decays else 0.0), (plain, 0.0)]
        if not decays and config.optimizer != "lars":  # which alone treats weights otherwise than biases
            parts = [(weights + plain, 0.0)]
        pace = {"lr_factor": lr_factor, "rests": rests}
        groups += [
            {"params": part, "weight_decay": decay, "adapts": part is weights, **pace}
            for part, decay in parts
            if part
        ]
        nn.ModuleList(modules).requires_grad_(True)
    if config.optimizer == "lars":
        return lars.LARS(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


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
LEAVES = ("device.py", "lars.py", "objectives.py", "sampling.py", "structure.py", "targets.py")
TRAINING_CODE = (
    (__file__, "# ---- 6 Views", "# ---- 12 Entry"),
    *((Path(files.__file__).with_name(leaf), "", "") for leaf in LEAVES),
)


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
        content["cached"] = run.tiles.digest
        content["processes"] = run.ranks.world_size
        content["precision"] = devices.precision_name(run.config.precision, run.device)
        content["steps_per_epoch"] = run.steps_per_epoch
        content["best"] = run.best
        content["objective"] = run.objective.own_state()
        content["healthy"] = run.healthy
        content["wandb_id"] = run.wandb_id
        content["code"] = run.code
    checkpoints.write_checkpoint(path, content)


def resume_run(run: Run, state: dict[str, Any]) -> None:
    """Put the saved state into a run. Raises MammoError where settings differ that shape the weights."""
    refuse_changes(
        run.folder,
        settings.changed_flags(run.config, state["config"], FREE_ON_RESUME)
        + caches.changed_tiles(state, run.tiles.cache, run.tiles.digest),
    )
    run.model.load_state_dict(state["model_state_dict"])
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where the state was saved in another precision than fp16
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.monitor = state["step"], state["monitor"]
    if run.ranks.is_main:
        checkpoints.note_precision(state, devices.precision_name(run.config.precision, run.device))
        checkpoints.note_changed_code(state, run.code)
    if state["processes"] != run.ranks.world_size:  # the same place in the schedule, with other batches
        run.step = round(state["step"] * run.steps_per_epoch / state["steps_per_epoch"])
    run.best, run.healthy, run.wandb_id = state["best"], state["healthy"], state["wandb_id"]
    # Until 2026-11-26 a state held the frequency target's head by itself.
    former = {f"speck_head.{name}": value for name, value in state.get("speck_head", {}).items()}
    own = state.get("objective", former)
    missing, unexpected = run.objective.load_state_dict(own, strict=False)
    if unexpected or any(not name.startswith("model.") for name in missing):
        raise KeyError("objective")


def refuse_changes(folder: Path, changed: list[str]) -> None:
    """Raise MammoError where a run's folder can't be gone on with."""
    if changed:
        raise MammoError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}.\n"
            "  Give --run_name NAME for a new run, or --no_resume to move the old one aside."
        )


# ---- 10 Monitoring ---------------------------------------------------------------------------------

COLLAPSE_STD = 0.2  # feature std below which a run counts as collapsed (1 = isotropic)
METRICS = (  # and those of the objective, see Objective.curves
    "step epoch loss lr momentum feature_std tiles_per_s batches_per_s seconds_left breast_ratio "
    "gpu_memory_gb gpu_utilisation monitor_std monitor_rankme freq_loss structure_loss vicreg_loss "
    "monitor_auroc monitor_auroc_mass monitor_auroc_calcification"
).split()


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


def load_sample(index: int, source: pd.Series, config: Config) -> pictures.Sample:
    """Repeat the extraction of one row of list_sources. Raises ImageReadError."""
    from byol_mammo import pictures

    row = source.to_frame().T
    (spacing,), (polarity,) = source_spacing(row, config), images.known_polarity(row, config.polarity)
    image, small, _ = read_and_reduce(source["path"], polarity)
    image, small, spacing = one_scale.rescaled(
        source["path"], image, small, spacing, config.target_spacing_mm
    )
    breast = find_breast(small)
    mask = small.enlarged(breast)
    muscle = small.enlarged(find_muscle(small, breast, source["view"])) & mask
    table = score_tiles(image, mask, config, spacing, muscle)
    title = f"image {index} {source['laterality']} {source['view']}"
    window = intensity_window(image, mask)
    return pictures.Sample(title, image, mask, muscle, table, window, config.tile_size)


def show_extraction(cache: Path, config: Config) -> None:
    """Draw EXTRACTION_PICTURES where a cache has none. A failure is a note: the cache can do without."""
    from byol_mammo import pictures

    if all((cache / name).is_file() for name in pictures.EXTRACTION_PICTURES):
        return
    try:
        for name in pictures.EXTRACTION_PICTURES:
            files.remove_unfinished(cache, name)
        load = functools.partial(load_sample, config=config)
        if samples := pictures.extraction_samples(images.list_sources(config.data_dir), load, cache):
            pictures.draw_extraction(samples, pictures.list_outcomes(CRITERIA, config), cache)
    except Exception as error:
        print(f"note: no pictures of {cache} ({type(error).__name__}: {error})", file=sys.stderr)


def show_all_images(config: Config, folder: Path) -> None:
    """Draw a QC page of each image."""
    from byol_mammo import pictures

    sources, load = images.list_sources(config.data_dir), functools.partial(load_sample, config=config)
    outcomes = pictures.list_outcomes(CRITERIA, config)
    pictures.draw_qc_pages(sources, load, outcomes, folder, config.num_workers, config.progress)


def view_columns(run: Run, count: int = 4) -> dict[str, np.ndarray]:
    """Some tiles, and the views of them that a step sees: (count, S, S) grey values by title."""
    ids = run.train_ids[np.linspace(0, len(run.train_ids) - 1, count).astype(int)]
    plain = make_view(run.tiles, ids, PLAIN_VIEW, run.config.view_side)._replace(kind="tile")
    views = plain, *make_views(run, run.tiles, ids, (run.config.seed, 0, 0))
    return {v.kind: (v.image[:, 0] * GREY_STD + GREY_MEAN).cpu().numpy() for v in views}


def target_columns(run: Run, count: int = 4) -> dict[str, np.ndarray]:
    """The monitor tiles of highest convergence, what the structure target asks of them, and what the
    network tells: (count, n, n) grey values by title; empty where the objective has no such target."""
    head = getattr(run.objective, targets.StructureHead.name, None)
    if head is None:
        return {}
    order = np.argsort(-run.tiles.table["convergence"].to_numpy()[run.monitor_ids], kind="stable")
    ids = run.monitor_ids[order[:count]]
    view = make_view(run.tiles, ids, PLAIN_VIEW, run.config.view_side, device=run.device)
    run.model.eval()
    with torch.no_grad(), run.autocast():
        found = run.model.features_and_map(view.image)[1]
    run.model.train()
    maps = head.shown(found.float(), view.sharp)
    titles = "tile", "convergence", "strongest in a cell", "as the network tells"
    return {
        title: part.cpu().numpy() for title, part in zip(titles, [view.sharp[:, 0], *maps], strict=True)
    }


NUISANCE_SIDE = 32  # px of a view that tells its air and brightness
NUISANCE_TILES = (
    256  # monitor tiles at most: regression on thousands would hold training up for a minute
)
COLLAPSE_ADVICE = (
    "all tiles look alike to the network. Lower --lr, raise --batch_size or --momentum_base."
)


def terms() -> report.Terms:
    """The terms of this script's reports."""
    from byol_mammo import report

    defaults = dataclasses.asdict(Config())
    return report.Terms(defaults, CRITERIA, METRICS, CLASSES, COLLAPSE_STD, COLLAPSE_ADVICE)


def describe_run(run: Run, state: str, reason: str = "") -> dict[str, Any]:
    """How far the run is, its best epoch, the machine, for summary.json."""
    return {
        "state": state,
        "reason": reason,
        "step": run.step,
        "steps": run.last_step,
        "epoch": run.step / run.steps_per_epoch,
        "healthy": run.healthy,
        "best": run.best,
        "device": devices.describe_device(run.device, run.config.precision),
        "processes": run.ranks.world_size,
        "training_tiles": len(run.train_ids),
        "monitor_tiles": len(run.monitor_ids),
    }


def told_nuisances(run: Run) -> dict[str, float]:
    """How well the monitor tiles' features tell what is of no use, as far as they are known."""
    from byol_mammo import shortcuts

    if run.features is None:
        return {}
    some = np.s_[:: -(-len(run.monitor_ids) // NUISANCE_TILES)]
    ids = run.monitor_ids[some]
    grey = make_view(run.tiles, ids, PLAIN_VIEW, NUISANCE_SIDE).sharp
    studies = run.tiles.images["study_id"].to_numpy()[run.tiles.table["image"].to_numpy()[ids]]
    return shortcuts.told_nuisances(run.features[some].numpy(), grey.cpu(), studies)


def show_run(run: Run, tracker: tracking.Tracker, state: str = "running", reason: str = "") -> None:
    """Bring summary.json, pictures and report.html up to date. A failure is a note and ends no run."""
    from byol_mammo import pictures, report

    folder = run.folder
    try:
        facts = describe_run(run, state, reason) | {"told": told_nuisances(run)}
        report.write_summary(folder, run.tiles.cache, facts)
        if run.best:
            best = run.best | {"checkpoint": str(folder / "mammogram_byol_best.pth")}
            tracker.log({f"best_{name}": value for name, value in best.items()}, summary=True)
        if not run.config.report_every:
            return
        fresh = [] if (folder / "views.png").is_file() else [*pictures.EXTRACTION_PICTURES, "views.png"]
        if fresh:
            pictures.draw_views(view_columns(run), folder / "views.png")
        if run.features is not None:
            tiles = run.tiles.table.iloc[run.monitor_ids]
            views = run.tiles.images["view"].to_numpy()[tiles["image"]]
            pictures.draw_embedding(run.features, tiles, views, folder / "embedding.png")
            fresh.append("embedding.png")
        if columns := target_columns(run):
            pictures.draw_views(columns, folder / "targets.png")
            fresh.append("targets.png")
        report.write_report(folder, terms())
        if fresh:
            there = {path.stem: path for path in map(folder.joinpath, fresh) if path.is_file()}
            tracker.log({"step": run.step, **there})
    except Exception as error:
        tqdm.write(f"note: report not written ({type(error).__name__}: {error})", file=sys.stderr)
    run.report_written_at = time.monotonic()


def report_is_due(run: Run) -> bool:
    """Whether REPORT_EVERY minutes have passed."""
    due = time.monotonic() - run.report_written_at > 60 * run.config.report_every
    return run.ranks.is_main and run.config.report_every > 0 and due


# ---- 11 Training -----------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training run holds; `step` counts optimiser steps since the start of the run."""

    config: Config
    folder: Path
    tiles: MammogramTiles
    train_ids: np.ndarray
    monitor_ids: np.ndarray
    probe: labels.Probe | None  # labelled tiles, with --labels
    objective: Objective
    compute_loss: Callable[..., Any]  # the objective as DDP and torch.compile wrap it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    autocast: Callable[[], Any]
    steps_per_epoch: int
    wandb_id: str
    ranks: processes.Ranks
    code: dict[str, str]  # git commit and digest of the code of views and training
    step: int = 0
    # Epoch of the best checkpoint and the figure that chose it; empty = none yet.
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    healthy: bool = True
    agreed_early: bool = False  # whether note_early_agreement has spoken
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
    config, processes = run.config, run.ranks.world_size
    lr = learning_rate(run.step, run.total_steps, run.steps_per_epoch, config, processes)
    frozen = run.step < config.frozen_steps(run.total_steps)
    for group in run.optimizer.param_groups:
        # Not by requires_grad, whose change in the middle of a run DDP and torch.compile trip on.
        group["lr"] = 0.0 if frozen and group["rests"] else lr * group["lr_factor"]
    source, places = (run.tiles, ids) if tiles is None else (tiles, np.arange(len(ids)))
    key = config.seed, run.step, run.ranks.rank
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # dropout, in some of timm
    views = make_views(run, source, places, key)
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
    config, batch, size = run.config, run.config.batch_size, run.ranks.world_size
    epoch, first = divmod(run.step, run.steps_per_epoch)
    order = sampling.epoch_order(
        run.tiles.table, run.train_ids, config.tiles_per_epoch, config.seed, epoch, config.energy_share
    )
    steps = range(first * size + run.ranks.rank, run.steps_per_epoch * size, size)
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
            tiles.pixels = devices.to_device(tiles.pixels.numpy(), run.device)
            yield batch_ids, tiles


def train_one_epoch(
    run: Run,
    bar: tqdm,
    metrics: tracking.MetricsFile,
    tracker: tracking.Tracker,
    stop: processes.StopSignal,
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
        alone = run.ranks.world_size == 1
        if run.step % config.log_every == 0 or last or (alone and (stop.requested or due)):
            # The only place that waits for the device: LOG_EVERY steps are read at once.
            means = read_metrics(run, pending, stop)
            saving = last or due or stop.agreed
            sound = not saving or checkpoints.all_finite(
                [run.model.state_dict(), run.optimizer.state_dict()]
            )
            tracking.check_finite(run.step, means, pending, recent, sound)
            run.batch_std = means["feature_std"]
            note_early_agreement(run, means)
            row = describe_step(run, means, len(pending) / (time.monotonic() - logged), ids)
            bar.set_postfix_str(tracking.describe_row(row, run.monitor))
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
    run: Run, pending: list[dict[str, Tensor | float]], stop: processes.StopSignal
) -> dict[str, float]:
    """Metrics of the last steps by name: means over steps and ranks of tensors, the last of numbers.

    The ranks also agree to stop: a signal that any of them has got by now holds for all. One that
    comes later waits for the next time, wherever it comes.
    """
    stop.agreed = stop.requested
    measured = [name for name, value in pending[-1].items() if isinstance(value, Tensor)]
    steps: list[dict[str, Any]] = [*pending]
    means = torch.stack([torch.stack([step[name] for name in measured]) for step in steps]).mean(0)
    if run.ranks.world_size > 1:
        distributed.all_reduce(means)
        means /= run.ranks.world_size
        agreed = torch.tensor(stop.agreed, device=run.device)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
        stop.agreed = int(agreed)
    return {**steps[-1], **dict(zip(measured, means.tolist(), strict=True))}


EARLY_AGREEMENT = -0.95  # BYOL's loss below which views agree almost wholly


def note_early_agreement(run: Run, means: dict[str, float]) -> None:
    """Say once what it means if BYOL's loss is all but gone within a twentieth of the run."""
    early = run.step <= run.total_steps / 20 and means.get("loss", 0.0) < EARLY_AGREEMENT
    if early and not run.agreed_early and run.ranks.is_main:
        tqdm.write(
            f"note: BYOL loss {means['loss']:.3f} after {run.step} of {run.total_steps} steps: views "
            "agree before the network can have learnt much of tissue. Either it collapses (feature std "
            f"below {COLLAPSE_STD}) or the views share what is easily told, such as air and brightness "
            "(benchmark.py views --data_dir prints how much; the report says what the features tell)",
            file=sys.stderr,
        )
    run.agreed_early |= early


def save_is_due(run: Run) -> bool:
    """Whether SAVE_EVERY minutes have passed."""
    return time.monotonic() - run.state_saved_at > 60 * run.config.save_every


def save_state(run: Run) -> None:
    """Write last.pth, from one process."""
    if run.ranks.is_main:
        save_checkpoint(run.folder / "last.pth", run, resumable=True)
    run.state_saved_at = time.monotonic()


def describe_step(run: Run, means: dict[str, float], speed: float, ids: np.ndarray) -> dict[str, float]:
    """A row of metrics.csv for the last step; `means` as from read_metrics, `speed` in steps/s."""
    row = {
        "step": run.step,
        "epoch": run.step / run.steps_per_epoch,
        **means,
        "tiles_per_s": speed * run.config.batch_size * run.ranks.world_size,
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


def end_epoch(run: Run, metrics: tracking.MetricsFile, tracker: tracking.Tracker) -> None:
    """Watch for collapse, choose the best checkpoint, write the epoch's files: from one process.

    Raises MammoError in all of them where ON_COLLAPSE is stop.
    """
    if run.ranks.is_main:
        end_epoch_on_main_rank(run, metrics, tracker)
    if run.ranks.world_size > 1:
        healthy = torch.tensor(int(run.healthy), device=run.device)
        distributed.broadcast(healthy, 0)
        run.healthy = bool(healthy)
    if not run.healthy and run.config.on_collapse == "stop":
        raise MammoError(
            f"stopped: the run collapsed; {run.folder / 'mammogram_byol_best.pth'} is from before that "
            "where an epoch was healthy. --no_resume starts again, --on_collapse warn goes on"
        )


def end_epoch_on_main_rank(run: Run, metrics: tracking.MetricsFile, tracker: tracking.Tracker) -> None:
    """Monitor and probe, a row of metrics.csv, mammogram_byol_best.pth and the numbered checkpoints."""
    from byol_mammo import labels

    config, epoch = run.config, run.step // run.steps_per_epoch
    run.monitor = monitor_metrics(run)
    if run.probe is not None and (epoch % config.probe_every == 0 or epoch == config.epochs):
        features = encode(run, run.probe.ids)[0].numpy()
        run.monitor |= labels.run_probe(features, run.probe, CLASSES, config.seed)
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


def prepare_run(config: Config, backbone: nn.Module, cache: Path, ranks: processes.Ranks) -> Run:
    """Put model, optimiser and tiles on the device and resume where a run's state is found."""
    device = devices.choose_device(config.device, ranks.local_rank)
    dtype = devices.choose_precision(config.precision, device)
    tiles = open_tiles(cache, reduction(config.tile_size, config.view_side))
    hold_on_device(tiles, device, config)
    image_row = tiles.table["image"].to_numpy()
    train_ids, monitor_ids = sampling.split_monitor(image_row, config.monitor_tiles, config.seed)
    drawn = min(config.tiles_per_epoch or len(train_ids), len(train_ids))
    if drawn < config.batch_size * ranks.world_size:
        raise MammoError(
            f"{drawn} tiles per epoch for a batch of {config.batch_size * ranks.world_size}: lower "
            "--batch_size, add images or loosen the tile settings"
        )
    probe = prepare_run_probe(tiles, config)
    model = prepare_model(backbone, config, device, ranks)
    objective = build_objective(model, config, tiles, train_ids).to(device)
    optimizer = build_optimizer(objective, config)
    compute_loss: Callable[..., Any] = devices.distribute(objective, device, ranks)
    # Not with several ranks: synchronised batch norm breaks the graph at every layer.
    if config.compile and device.type == "cuda" and ranks.world_size == 1 and not config.grad_checkpoint:
        compute_loss = devices.compiled(objective)
    run = Run(
        config=config,
        folder=config.run_dir,
        tiles=tiles,
        train_ids=train_ids,
        monitor_ids=monitor_ids,
        probe=probe,
        objective=objective,
        compute_loss=compute_loss,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        device=device,
        autocast=lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        steps_per_epoch=drawn // (config.batch_size * ranks.world_size),
        wandb_id=hashlib.sha256(bytes(config.run_dir.resolve() / str(time.time()))).hexdigest()[:8],
        ranks=ranks,
        code={"commit": devices.git_commit(), "training": settings.code_version(TRAINING_CODE)},
    )
    if (run.folder / "last.pth").is_file():  # else none is there, or it was moved aside
        state = checkpoints.load_checkpoint(run.folder / "last.pth")
        try:
            resume_run(run, state)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"{run.folder / 'last.pth'} is no state of such a run ({type(error).__name__})"
            raise MammoError(f"{reason}; --no_resume moves it aside") from error
    return run


def prepare_run_probe(tiles: MammogramTiles, config: Config) -> labels.Probe | None:
    """The online probe's labelled tiles, spread over images; None without LABELS."""
    from byol_mammo import labels

    if not config.labels:
        return None
    image_row = tiles.table["image"].to_numpy()
    order = sampling.spread_over_images(image_row, np.random.default_rng([config.seed, 3]))
    data_dir, size = Path(config.data_dir), tiles.tile_size
    return labels.prepare_probe(
        Path(config.labels), data_dir, tiles.images, tiles.table, size, CLASSES, order
    )


def prepare_model(
    backbone: nn.Module, config: Config, device: torch.device, ranks: processes.Ranks
) -> MammogramBYOL:
    """The model on the device, the same in every process, in training mode."""
    torch.manual_seed(config.seed)  # the heads' initial weights
    model = MammogramBYOL(backbone, config.input_dim, config.hidden_dim, config.proj_dim)
    model.grad_checkpoint, model.norm_frozen = config.grad_checkpoint, config.norm_frozen
    if ranks.world_size > 1 and device.type == "cuda":
        checkpoints.synchronise_norm(model, config.backbone)
    return model.to(device).to(memory_format=torch.channels_last).train()


def hold_on_device(tiles: MammogramTiles, device: torch.device, config: Config) -> None:
    """Copy the pixels to the GPU where they leave a training step the memory that it needs."""
    if device.type != "cuda":
        return
    seen = len(VIEWS) * config.batch_size * config.view_side**2
    wide = devices.choose_precision(config.precision, device) == torch.float32
    if devices.leaves_room(tiles.pixels.nbytes, seen, wide, config.grad_checkpoint, device):
        tiles.to(device)


def train(config: Config) -> Path:
    """The whole job: weights, cache, pictures, training, export. Returns the run's folder."""
    from byol_mammo import labels

    ranks = processes.find_ranks()
    # What can fail in seconds comes before downloads and hours of extraction.
    root = images.image_folder(config.data_dir)
    device = devices.choose_device(config.device, ranks.local_rank)
    devices.note_idle_gpu(config.device, device)
    devices.choose_precision(config.precision, device)
    devices.set_determinism(config.deterministic, device)
    if config.labels:
        labels.read_labels(config.labels, CLASSES)
    torch.manual_seed(config.seed)
    config, backbone = open_backbone(config, config.weights)
    if ranks.is_main:
        images.note_test_images(root)
    lock = processes.exclusive_run_folder(config.run_dir, config.resume)
    with lock if ranks.is_main else nullcontext():
        cache = build_cache(config)  # one process builds, the others wait at its lock
        if ranks.is_main and config.report_every:
            show_extraction(cache, config)
        backend = "nccl" if device.type == "cuda" else "gloo"
        processes.join_ranks(ranks, backend, config.peer_timeout)
        return train_in_folder(prepare_run(config, backbone, cache, ranks))


def train_in_folder(run: Run) -> Path:
    """Train a run from where it stands to its last step, or to a signal; returns its folder."""
    config, ranks, limit = run.config, run.ranks, run.last_step
    if run.step >= limit and (run.folder / "backbone.safetensors").is_file():
        if ranks.is_main:
            more = ", or raise --max_steps" if config.max_steps else ""
            print(
                f"{run.folder} is finished at step {run.step}: its report.html tells the rest; for "
                f"another run give --run_name NAME{more}"
            )
        return run.folder
    if ranks.is_main:
        start_folder(run)
        if config.qc_pages:
            show_all_images(config, run.folder / "qc" / run.tiles.cache.name)
    path = run.folder / "metrics.csv"
    metrics = tracking.MetricsFile(path, run.columns, run.step, run.steps_per_epoch, ranks.is_main)
    tracker = start_tracker(run.wandb_id, config, ranks.is_main)
    options = {"total": limit, "initial": run.step, "desc": "train", "unit": "step"}
    with (
        processes.StopSignal() as stop,
        tracking.progress(mode=config.progress if ranks.is_main else "none", **options) as bar,
    ):
        try:
            while run.step < limit and not stop.agreed:
                train_one_epoch(run, bar, metrics, tracker, stop)
                if run.step % run.steps_per_epoch == 0:
                    end_epoch(run, metrics, tracker)
            if run.step < limit:
                save_state(run)
                rest = f"the same command goes on from {run.folder / 'last.pth'}"
                raise StoppedError(stop.agreed, rest)
        except Exception as error:
            if ranks.is_main:
                show_run(run, tracker, "stopped", str(error))
            tracker.finish()
            raise
        # Still under the signals' guard: a job's last seconds must not cost it its results.
        bar.close()
        if ranks.is_main:
            finish_run(run, tracker)
    return run.folder


def start_tracker(run_id: str, config: Config, enabled: bool = True) -> tracking.Tracker:
    """A wandb tracker of the run that has this config."""
    recorded, mode = dataclasses.asdict(config), config.wandb_mode
    return tracking.Tracker(run_id, config.run_dir, mode, config.wandb_project, recorded, enabled)


def extract_only(config: Config) -> Path:
    """Build the cache without a model, as on a node without a GPU; returns its folder."""
    from byol_mammo import pictures, report

    images.note_test_images(images.image_folder(config.data_dir))
    if config.qc_pages:  # first: they show why no tile is kept, where none is
        inputs = cache_inputs(images.list_sources(config.data_dir), config)
        pages = config.run_dir / "qc" / cache_key(inputs)
        show_all_images(config, pages)
        print(f"qc pages  {pages}", flush=True)
    cache = build_cache(config)
    show_extraction(cache, config)
    print(report.describe_extraction(cache, COLUMNS, config.target_spacing_mm))
    drawn = [name for name in pictures.EXTRACTION_PICTURES if (cache / name).is_file()]
    shown = f"{', '.join(drawn)} show it; " if drawn else ""
    print(f"cache     {cache}: {shown}training finds it there")
    return cache


def dry_run(config: Config) -> None:
    """Say what a run would read, extract, train and write; writes nothing, downloads nothing."""
    from byol_mammo import labels

    ranks = processes.find_ranks()
    images.note_test_images(images.image_folder(config.data_dir))
    device = devices.choose_device(config.device, ranks.local_rank)
    if config.labels:
        labels.read_labels(config.labels, CLASSES)
    config, _ = open_backbone(config, "none" if config.weights == "imagenet" else config.weights)
    folder, resumable = config.run_dir, (config.run_dir / "last.pth").is_file()
    if resumable and config.resume:
        recorded = checkpoints.recorded_config(checkpoints.load_checkpoint(folder / "last.pth"))
        refuse_changes(folder, settings.changed_flags(config, recorded, FREE_ON_RESUME))
    tiles = foresee_cache(config)
    batch = config.batch_size * ranks.world_size
    steps = min(config.tiles_per_epoch or tiles, tiles) // batch
    print(f"device    {ranks.world_size} x {devices.describe_device(device, config.precision)}")
    last = min(filter(None, (config.epochs * steps, config.max_steps)), default=0)
    print(
        f"training  {config.backbone} from {config.weights}: {steps:,} steps of {batch} tiles an epoch, "
        f"{last:,} in all" + (f"; too few tiles for a batch of {batch}" if not steps else "")
    )
    begun = resumable or any(folder.glob("mammogram_byol_*.pth"))
    there = "goes on" if resumable and config.resume else "is moved aside first"
    print(f"run       {folder} {there if begun else 'is new'}")
    print("Nothing was written (--dry_run). How long a step takes is told by the first lines of a run.")


def open_backbone(config: Config, weights: str) -> tuple[Config, nn.Module]:
    """The config with the backbone's width, and the backbone from `weights`.

    Raises MammoError where weights, width or view size don't fit.
    """
    backbone = checkpoints.build_backbone(config.backbone, weights)
    config = match_input_dim(config, backbone)
    checkpoints.check_view_side(backbone, config.backbone, config.view_side)
    return config, backbone


def match_input_dim(config: Config, backbone: nn.Module) -> Config:
    """Set input_dim to the backbone's width. Raises MammoError where another was asked for."""
    width = checkpoints.feature_width(backbone)
    if config.input_dim not in (INPUT_DIM, width):
        raise MammoError(f"--input_dim {config.input_dim}: {config.backbone} has {width} features")
    return dataclasses.replace(config, input_dim=width)


def start_folder(run: Run) -> None:
    """Create the run's folder: settings, environment, the extraction's pictures, a calm summary."""
    from byol_mammo import foresight, pictures, report

    files.remove_unfinished(run.folder)
    config, precision = run.config, devices.precision_name(run.config.precision, run.device)
    record = {"config": dataclasses.asdict(config), "environment": devices.environment(precision)}
    record["curves"] = run.objective.curves
    files.write_atomic(run.folder / "config.json", json.dumps(record, indent=2))
    for name in pictures.EXTRACTION_PICTURES:
        if (run.tiles.cache / name).is_file():
            shutil.copyfile(run.tiles.cache / name, run.folder / name)
    print(report.describe_extraction(run.tiles.cache, COLUMNS, config.target_spacing_mm))
    where = "in GPU memory" if run.tiles.pixels.is_cuda else "memory-mapped"
    print(
        f"cache     {run.tiles.cache}: {foresight.size_text(run.tiles.pixels.nbytes)} of pixels, {where}"
    )
    print(f"device    {run.ranks.world_size} x {devices.describe_device(run.device, config.precision)}")
    print(
        f"training  {len(run.train_ids):,} tiles, {run.steps_per_epoch} steps an epoch, "
        f"{run.config.view_side} px views, steps {run.step} to {run.last_step}"
    )
    print(f"objective {run.objective.describe(run.total_steps)}")
    if np.isin(run.monitor_ids, run.train_ids).any():
        print(f"monitor   {len(run.monitor_ids)} tiles that are trained on: too few to keep some out")
    print(f"tracking  wandb {tracking.wandb_mode(config.wandb_mode)}")
    page = ", report.html tells how it goes" if run.config.report_every else ""
    print(f"run       {run.folder}{page}", flush=True)


def finish_run(run: Run, tracker: tracking.Tracker) -> None:
    """Write the final checkpoint, the last pictures and the exported backbone; name them."""
    from byol_mammo import report

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
    path, grey = folder / "backbone.safetensors", (GREY_MEAN, GREY_STD)
    checkpoints.export_backbone(run.model.backbone, path, run.config.backbone, grey)
    report.print_end(folder, run.step, run.healthy, run.config.report_every > 0)
    tracker.finish()


# ---- 12 Entry --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit_code."""
    from byol_mammo import report

    def job() -> None:
        config = parse_args(argv)
        if config.report:
            print(report.write_report(Path(config.report), terms()))
        elif config.dry_run:
            dry_run(config)
        elif config.extract_only:
            extract_only(config)
        else:
            train(config)

    return settings.exit_code(job, "give --grad_checkpoint, lower --batch_size or --view_size")


if __name__ == "__main__":
    sys.exit(main())
