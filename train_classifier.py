#!/usr/bin/env python3
"""From a pre-trained backbone to answers: probe, fine-tuning, comparison, evaluation, maps of images.

Reads the images and labels.csv that prepare_dataset.py lays out and a checkpoint of train_byol_mammo.py.

    python train_classifier.py train --weights runs/byol_resnet50/mammogram_byol_final.pth
    python train_classifier.py evaluate --weights runs/classifier_finetune/classifier_best.pth
    python train_classifier.py predict --weights runs/classifier_finetune/classifier_best.pth my_images
    python train_classifier.py compare none imagenet runs/byol_resnet50/mammogram_byol_final.pth
    python train_classifier.py compare none classic --encoders timm:resnet50.a1_in1k=resnet50.safetensors
    python train_classifier.py embed --weights runs/byol_resnet50/mammogram_byol_final.pth
    python train_classifier.py train --dry_run          # what a command would read and write, no more
    python train_classifier.py --help                                     # every setting, one line each

Contents
    1 Configuration    constants, Settings, flags
    2 Labelled tiles   cache and labels joined, splits by study, which tiles are drawn
    3 Model            starting weights, frozen features, the logistic head
    4 Training         probe, fine-tuning, resume
    5 Statistics       figures of tiles, images, breasts and studies, by group and by pooling
    6 Pictures         features in two dimensions, maps
    7 Commands         train, compare, evaluate, predict, embed
    8 Entry            main

A tile's probability is that of a finding in this tile. An image has the highest of its tiles' (`max`) or
1 - prod(1 - p) (`noisy_or`, which takes overlapping tiles for independent); a breast and a study have
the highest of their images'. These put images in order and are no probabilities. `--mode attention`
learns from the labels of images alone, grades as well, see byol_mammo/image_head.py. Research use only;
not for clinical decisions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.ops import nms
from tqdm import tqdm

import train_byol_mammo as mammo
from byol_mammo import (
    cache as caches,
    checkpoints,
    device as devices,
    encoders,
    files,
    grades as grading,
    image_head,
    images,
    labels as labelling,
    makers,
    one_scale,
    pictures,
    processes,
    report,
    sampling,
    tracking,
)
from byol_mammo.curves import draw_curves, draw_training
from byol_mammo.lightly_parts import cosine_warmup_schedule
from byol_mammo.settings import exit_code, make_parser, parse_fields, setting_help
from byol_mammo.statistics import (
    FEW_STUDIES,
    calibration_error,
    interval,
    note_few,
    paired_p,
    resample_groups,
    weighted_auroc,
)
from train_byol_mammo import MammoError

# ---- 1 Configuration ------------------------------------------------------------------------------
# Each constant is a field of Settings and a flag of the same lower-case name; its comment is the help.

WEIGHTS = "./runs/byol_resnet50/mammogram_byol_final.pth"  # checkpoint, imagenet or none
BACKBONE = ""  # resnet18, resnet34 or resnet50; empty = as in the checkpoint, resnet50 without one
DATA_DIR = "./split_images"  # folder of images, sub-folders included
LABELS = "./split_images/labels.csv"  # one row for each image, written by prepare_dataset.py
FINDINGS = "mass,calcification"  # columns of labels.csv to learn; attention: density, birads as well
WEAK_LABELS = False  # tiles of a positive image without boxes count as positive
SHUFFLE_LABELS = False  # control for compare: labels permuted among tiles, AUROC must be 0.5
SPLIT = "test"  # split of labels.csv that evaluate and embed read; all = every image
OUTPUT_DIR = "./runs"  # results go to OUTPUT_DIR/RUN_NAME
RUN_NAME = ""  # empty = classifier_<mode> for train, else the command's name
CACHE_DIR = "./cache"  # pixel cache, shared with train_byol_mammo.py
TILE_SIZE = 0  # px, side of a tile; 0 = as in pre-training
TILE_STRIDE = 0  # px between tiles; 0 = as in pre-training
VIEW_SIZE = 0  # px, side of what the network sees of a tile; 0 = as in pre-training
PIXEL_SPACING_MM = 0.0  # mm per pixel where the manifest gives none; 0 = as in pre-training
TARGET_SPACING_MM = 0.0  # mm per pixel that every image is brought to; 0 = as in pre-training
MIN_FREQ_ENERGY = 0.0  # speck energy a tile must reach; 0 = all tissue, as masses need no specks
MODE = "finetune"  # probe = logistic head; finetune = all weights; attention = from labels of images
VALIDATION_SHARE = 0.2  # of the training studies (1 in 2, 3, 4 ...), to stop early and to choose by
FOLDS = 0  # folds by study for compare; 0 = fit on training, score on test, 5 folds without a test split
NEGATIVES_PER_IMAGE = 16  # tiles without finding drawn per image for the probe; 0 = all
NEGATIVES_PER_POSITIVE = 3.0  # tiles without finding drawn per epoch of fine-tuning, anew each epoch
EPOCHS = 10  # at most, of fine-tuning and attention
PATIENCE = 10  # epochs without better validation before it stops; the last ones are the best
BATCH_SIZE = 32  # tiles per step; of attention images
LR = 1e-3  # peak learning rate of the head
BACKBONE_LR = 3e-4  # peak learning rate of the backbone
WEIGHT_DECAY = 1e-2  # AdamW weight decay of fine-tuning and attention
BOOTSTRAP = 1000  # resamples of the studies for intervals and p-values
TOP_TILES = 3  # tiles boxed per finding by predict
DRY_RUN = False  # say what would be read, extracted, learnt and written, and end
NUM_WORKERS = 16  # extraction processes; never more than the cores there are
SEED = 0  # every random choice follows from it
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
PRECISION = "auto"  # auto, fp32, bf16 or fp16
ENCODERS = ()  # frozen networks for compare: timm:NAME (downloaded), timm:NAME=FILE or timm:NAME=none
RESUME = True  # go on where a fine-tuning of this name stopped; otherwise it is moved aside
WANDB_MODE = "auto"  # auto, online, offline or disabled; auto = online only when logged in
WANDB_PROJECT = "byol-mammo"  # wandb project

COMMANDS = {
    "train": "learn to find the findings in tiles; writes classifier_best.pth",
    "compare": "frozen-probe AUROC of several starting weights on the same folds, with intervals",
    "evaluate": "a classifier on labelled images: AUROC and more by tile, image, breast and study",
    "predict": "probability per finding and a map for each image",
    "embed": "features of all tiles as .npy and .csv, and a 2-D map of them",
}
UNTRAINED = ("none", "imagenet")  # weights that saw no mammogram
OPERANDS = {"compare": "WEIGHTS", "predict": "IMAGE"}
# Settings that don't change what fine-tuning learns; the labels themselves are compared.
FREE_ON_RESUME = (
    "data_dir labels shuffle_labels output_dir run_name cache_dir split folds bootstrap top_tiles "
    "dry_run num_workers device encoders resume wandb_mode wandb_project"
).split()
# Mild: labels must stay true, and a tile's box is only known for the tile as it lies.
MILD_VIEW = mammo.ViewSpec("mild", rotation=15, scale=0.1, brightness=0.15, contrast=0.15, flip=True)


@dataclass(frozen=True)
class Settings:
    """All settings; defaults are the constants above, flags have the fields' names."""

    weights: str = WEIGHTS
    backbone: str = BACKBONE
    data_dir: str = DATA_DIR
    labels: str = LABELS
    findings: str = FINDINGS
    weak_labels: bool = WEAK_LABELS
    shuffle_labels: bool = SHUFFLE_LABELS
    split: str = SPLIT
    output_dir: str = OUTPUT_DIR
    run_name: str = RUN_NAME
    cache_dir: str = CACHE_DIR
    tile_size: int = TILE_SIZE
    tile_stride: int = TILE_STRIDE
    view_size: int = VIEW_SIZE
    pixel_spacing_mm: float = PIXEL_SPACING_MM
    target_spacing_mm: float = TARGET_SPACING_MM
    min_freq_energy: float = MIN_FREQ_ENERGY
    mode: str = MODE
    validation_share: float = VALIDATION_SHARE
    folds: int = FOLDS
    negatives_per_image: int = NEGATIVES_PER_IMAGE
    negatives_per_positive: float = NEGATIVES_PER_POSITIVE
    epochs: int = EPOCHS
    patience: int = PATIENCE
    batch_size: int = BATCH_SIZE
    lr: float = LR
    backbone_lr: float = BACKBONE_LR
    weight_decay: float = WEIGHT_DECAY
    bootstrap: int = BOOTSTRAP
    top_tiles: int = TOP_TILES
    dry_run: bool = DRY_RUN
    num_workers: int = NUM_WORKERS
    seed: int = SEED
    device: str = DEVICE
    precision: str = PRECISION
    encoders: tuple[str, ...] = ENCODERS
    resume: bool = RESUME
    wandb_mode: str = WANDB_MODE
    wandb_project: str = WANDB_PROJECT

    def __post_init__(self) -> None:
        if self.mode not in ("probe", "finetune", "attention"):
            raise MammoError(f"--mode {self.mode}: choose probe, finetune or attention")
        if not self.names or len(set(self.names)) < len(self.names):
            raise MammoError(f"--findings {self.findings!r}: name each column of labels.csv once")
        bounds = {"validation_share": (0.01, 0.5), "epochs": (1, 10**6), "batch_size": (2, 65536)}
        bounds |= {"bootstrap": (100, 10**6), "patience": (1, 10**6), "top_tiles": (1, 100)}
        bounds |= {"negatives_per_positive": (0.1, 10**6), "lr": (0, 100), "backbone_lr": (0, 100)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise MammoError(f"--{name} {getattr(self, name)}: must lie between {low} and {high}")
        if self.folds < 0 or self.folds == 1:
            raise MammoError(f"--folds {self.folds}: 0, or 2 and more")
        for encoder in self.encoders:
            encoders.parse(encoder)

    @property
    def names(self) -> list[str]:
        """Findings as a list."""
        return [name for name in self.findings.split(",") if name]

    def folder(self, command: str) -> Path:
        """Folder of a command's results."""
        name = f"classifier_{self.mode}" if command == "train" else command
        if self.mode == "attention" and command in ("evaluate", "predict"):
            name += "_attention"  # beside those of a classifier of tiles
        return Path(self.output_dir) / (self.run_name or name)


def parse_args(argv: Sequence[str] | None = None) -> tuple[str, list[str], Settings]:
    """Command, its operands (weights or images) and Settings. Raises MammoError on a typo."""
    parser = make_parser(__doc__)
    commands = "; ".join(f"{name}: {text}" for name, text in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, help=commands)
    operands = "weights, or classic for filters, for compare; images or folders for predict"
    parser.add_argument("operands", nargs="*", help=operands)
    values = parse_fields(Settings, parser, setting_help(__file__), argv)
    command, operands = values.pop("command"), values.pop("operands")
    if command != "compare" and values["encoders"]:
        raise MammoError(f"--encoders: {command} takes none, compare does (see --help)")
    if command in OPERANDS and not (operands or values["encoders"]):
        raise MammoError(f"{command} needs {OPERANDS[command]} ... (see --help)")
    if command not in OPERANDS and operands:
        raise MammoError(f"{command} takes no operand, but got {operands[0]} (see --help)")
    settings = Settings(**values)
    graded = [name for name in settings.names if name in labelling.GRADES]
    if graded and (command, settings.mode) != ("train", "attention"):
        raise MammoError(
            f"--findings {graded[0]}: a grade of an image, which no tile has; train --mode attention "
            "learns it, and its checkpoint tells the other commands"
        )
    if command in ("compare", "embed") and settings.mode == "attention":
        raise MammoError(f"{command} asks tiles, and trains no head: leave --mode attention out")
    return command, operands, settings


# ---- 2 Labelled tiles ------------------------------------------------------------------------------


@dataclass
class LabelledTiles:
    """Tiles with what is known of them.

    `targets` (N, findings) float32: 1, 0, NaN = unknown; with --mode attention those of its image, also
    grades. `table`: one row for each tile: image, patient, study_id, laterality, view, split,
    breast_density, maker, archive, labelled, row (of images.csv), x, y (px).
    `image_targets` (images, findings) float32, by row of images.csv. `untiled`: the labels of images
    that have no tile.
    """

    tiles: mammo.MammogramTiles
    names: list[str]
    targets: np.ndarray
    table: pd.DataFrame
    image_targets: np.ndarray
    untiled: pd.DataFrame

    @property
    def groups(self) -> np.ndarray:
        """Group key of each tile (N,): the patient, or the study where no patient is known."""
        return self.table["patient"].to_numpy(str)

    @property
    def fingerprint(self) -> str:
        """Hash of what is learnt and what splits go by: a training resumes on the same alone."""
        known = self.table[["split", "patient"]].to_csv()
        return hashlib.sha256(self.targets.tobytes() + known.encode()).hexdigest()

    def in_split(self, split: str) -> np.ndarray:
        """Ids of the tiles of a split."""
        return np.flatnonzero(is_of_split(self.table, split) & self.table["labelled"].to_numpy())

    def images_of(self, ids: np.ndarray) -> pd.DataFrame:
        """One row for each image of tiles `ids`, with its findings."""
        table = self.table.iloc[ids].drop_duplicates("row").reset_index(drop=True)
        table[self.names] = self.image_targets[table["row"]]
        return table


INNER = ["row", "labelled", "patient"]  # columns that are not written to files


def is_of_split(table: pd.DataFrame, split: str) -> np.ndarray:
    """Which rows are of a split; `training` holds those without a split, too."""
    split_of = table["split"].to_numpy(str)
    return (split_of == split) | ((split_of == "") & (split == "training")) | (split == "all")


def check_leak(labels: pd.DataFrame, path: str) -> None:
    """Raises MammoError where a study or patient has images in more than one split, or a study has
    images of several patients."""
    labelling.check_studies(path, labels)
    for kind in ("study_id", "patient"):
        keys = labelling.one_spelling(labels[kind])
        splits = labels["split"].replace("", "training")  # as is_of_split reads it
        for name, found in splits.groupby(keys).unique().items():
            if len(found) > 1:
                who = kind.removesuffix("_id")
                raise MammoError(
                    f"labels {path}: {who} {name} is in the splits {' and '.join(sorted(found))}: its "
                    f"images would be learnt and judged at once; give each {who} one split"
                )


def match_sources(settings: Settings, config: mammo.Config) -> tuple[pd.DataFrame, np.ndarray]:
    """labels.csv, and its row of each image (N,), -1 = none; says what doesn't match.

    Raises MammoError for an unreadable table, a study in two splits, or no label that fits an image.
    """
    labels = labelling.read_labels(settings.labels, settings.names)
    sources = images.list_sources(config.data_dir)
    where = Path(settings.labels).parent, Path(config.data_dir)
    found = labelling.match_labels(labels, where[0], sources["image"], where[1])
    labels = labelling.with_manifest(labels, found, sources)
    labels = makers.with_groups(labels, found, sources, config.data_dir)
    check_leak(labels, settings.labels)
    if (found < 0).all():
        raise MammoError(
            f"labels {settings.labels}: no row fits an image of {config.data_dir}; `image` is a path "
            f"relative to labels.csv or a file name, such as {next(iter(labels['image']), 'a.png')}"
        )
    report = {
        "labels without image": labels["image"].drop(found[found >= 0]).tolist(),
        "images without label, left out": sources["image"][found < 0].tolist(),
    }
    for what, names in report.items():
        if names:
            print(f"note: {len(names):,} {what}, first {names[0]}", file=sys.stderr)
    return labels, found


def load_labelled(settings: Settings, config: mammo.Config) -> LabelledTiles:
    """Build or find the cache of all images and join it with labels.csv; says what doesn't match.

    Raises MammoError as match_sources does.
    """
    labels, found = match_sources(settings, config)
    where = Path(settings.labels).parent, Path(config.data_dir)
    side = mammo.reduction(config.tile_size, config.view_side)
    tiles = mammo.open_tiles(mammo.build_cache(config), side)
    mammo.hold_on_device(tiles, own_device(config), config)
    rows = labelling.match_labels(labels, where[0], tiles.images["image"], where[1])
    untiled = labels.loc[np.setdiff1d(found[found >= 0], rows)]
    if len(untiled):
        print(
            f"note: {len(untiled):,} labelled images have no tile, first {untiled['image'].iloc[0]}; "
            f"reasons in {tiles.cache / 'rejections.csv'}",
            file=sys.stderr,
        )
    return join_labels(tiles, labels, rows, untiled, settings)


def join_labels(
    tiles: mammo.MammogramTiles,
    labels: pd.DataFrame,
    rows: np.ndarray,
    untiled: pd.DataFrame,
    settings: Settings,
) -> LabelledTiles:
    """LabelledTiles of a cache; `rows` gives each image's row of `labels`, -1 = none."""
    names = settings.names
    scale = one_scale.source_px(tiles.images)
    targets = labelling.tile_labels(tiles.table, rows, labels, tiles.tile_size, names, scale=scale)
    known = labels.reindex(rows).reset_index(drop=True)  # row -1 is in no index: NaN
    image_targets = known[names].to_numpy(np.float32)
    image = tiles.table["image"].to_numpy()
    boxed = labelling.has_box(known["boxes"], names)
    if settings.mode != "attention":
        labelling.note_boxes_elsewhere(image, targets, boxed, tiles.images["image"], names)
    if settings.weak_labels:  # where a box says which tiles, those that touch it stay left out
        weak = (image_targets[image] == 1) & np.isnan(targets) & ~boxed[image]
        targets = np.where(weak, 1, targets)
    if settings.shuffle_labels:
        patient = known["patient"].fillna("").to_numpy(str)
        targets = shuffle_patients(targets, patient[image], settings.seed)
        image_targets = shuffle_patients(image_targets, patient, settings.seed)
    if settings.mode == "attention":  # whatever boxes say
        targets = image_targets[image]
    words = ["study_id", "patient", "laterality", "view", "split", "breast_density", *makers.GROUPS]
    table = tiles.images[["image"]].join(known[words].fillna("")).assign(labelled=rows >= 0)
    table = table.iloc[image].reset_index(drop=True)
    x, y = one_scale.source_corners(tiles.images, tiles.table).T  # of the files, as boxes are
    table = table.assign(row=image, x=x, y=y)
    return LabelledTiles(tiles, names, targets, table, image_targets, untiled)


def shuffle_patients(targets: np.ndarray, patient: np.ndarray, seed: int) -> np.ndarray:
    """Targets (N, findings) dealt anew in whole patients (N,), in another order of patients.

    What images of a patient have in common stays together: where that alone tells the labels, as in a
    leak between splits, figures stay above chance.
    """
    names, owner = np.unique(patient, return_inverse=True)
    place = np.random.default_rng([seed, 5]).permutation(len(names))
    out = np.empty_like(targets)
    out[np.argsort(owner, kind="stable")] = targets[np.argsort(place[owner], kind="stable")]
    return out


def group_folds(groups: np.ndarray, targets: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold (N,) of each tile, whole `groups` (N,) each: those with the same findings spread evenly."""
    positive = pd.DataFrame(targets == 1).groupby(groups).any()
    order = np.random.default_rng([seed, 6]).permutation(len(positive))
    kinds = positive.to_numpy()[order] @ (2 ** np.arange(targets.shape[1]))
    order = order[np.argsort(kinds, kind="stable")]
    fold = pd.Series(np.arange(len(order)) % folds, index=positive.index[order])
    return fold[groups].to_numpy()


def check_classes(targets: np.ndarray, names: Sequence[str], where: str) -> None:
    """Raises MammoError where a finding has no positive or no negative tile."""
    for name, target in zip(names, targets.T, strict=True):
        for value, word in ((1, "with"), (0, "without")):
            if not (target == value).any():
                raise MammoError(
                    f"{where}: no tile {word} {name}, nothing can be learnt or judged; check "
                    "labels.csv, --split and --findings, use fewer --folds, or --weak_labels where "
                    "labels have no boxes"
                )


def draw_tiles(data: LabelledTiles, ids: np.ndarray, settings: Settings) -> np.ndarray:
    """All positive tiles of `ids` and up to NEGATIVES_PER_IMAGE others of each image, sorted.

    With weak labels positive tiles are a matter of chance: each image then gives equally many.
    """
    targets = data.targets[ids]
    positive = (targets == 1).any(1)
    usable = np.isfinite(targets).any(1)
    limit = settings.negatives_per_image
    if not limit:
        return ids[usable]
    free = ids[usable & (~positive | settings.weak_labels)]
    rng = np.random.default_rng([settings.seed, 7])
    shuffled = rng.permutation(free)
    image = data.table["row"].to_numpy()[shuffled]
    rank = pd.Series(image).groupby(image).cumcount().to_numpy()
    kept = shuffled[rank < limit]
    return np.sort(kept if settings.weak_labels else np.concatenate([kept, ids[positive]]))


# ---- 3 Model ---------------------------------------------------------------------------------------


def start_model(settings: Settings) -> tuple[mammo.MammogramBYOL, mammo.Config]:
    """The network with its starting weights, and the Config that describes its tiles.

    Raises MammoError where the weights are missing, damaged, or of another architecture.
    """
    recorded: dict[str, Any] = {}
    classes = list(mammo.CLASSES)
    torch.manual_seed(settings.seed)
    if settings.weights.endswith(".pth"):
        state = checkpoints.load_checkpoint(settings.weights)
        recorded, classes = checkpoints.recorded_config(state), state.get("classes", classes)
    name = recorded.get("backbone", settings.backbone or mammo.BACKBONE)
    if settings.backbone and settings.backbone != name:
        raise MammoError(f"--backbone {settings.backbone}: {settings.weights} holds a {name}")
    if recorded:
        backbone = checkpoints.build_recorded(name, settings.weights)
    elif settings.weights in UNTRAINED or settings.backbone:
        backbone = checkpoints.build_backbone(name, settings.weights)
    else:  # a file that says no architecture: its layers do
        backbone = mammo.load_backbone(settings.weights)
    width = checkpoints.feature_width(backbone)
    known = {field.name for field in dataclasses.fields(mammo.Config)}
    try:
        base = mammo.Config(**{key: value for key, value in recorded.items() if key in known})
        model = mammo.MammogramBYOL(backbone, width, base.hidden_dim, base.proj_dim)
        if recorded:
            set_outputs(model, len(classes))
            model.load_state_dict(state["model_state_dict"])
    except (RuntimeError, KeyError, TypeError) as error:  # the file may be a stranger's
        reason = " ".join(str(error).split())[:200]
        raise MammoError(f"{settings.weights} doesn't fit a {name}: {reason}") from error
    return model, tile_config(settings, dataclasses.replace(base, backbone=name, input_dim=width))


def set_outputs(model: mammo.MammogramBYOL, count: int) -> None:
    """Give the classification head `count` outputs, anew only where it has another number."""
    if model.classification_head[-1].out_features != count:
        model.classification_head[-1] = nn.Linear(mammo.CLASSIFIER_HIDDEN, count)


def tile_config(settings: Settings, base: mammo.Config) -> mammo.Config:
    """The main script's Config for cache, device and tracking: tiles as in `base` unless a flag says."""
    names = "tile_size tile_stride view_size pixel_spacing_mm target_spacing_mm".split()
    given = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    if "pixel_spacing_mm" in given and (settings.target_spacing_mm or base.target_spacing_mm):
        stated = one_scale.stated(settings.pixel_spacing_mm, mammo.PIXEL_SPACING_MM)
        given["pixel_spacing_mm"] = stated
    same = "data_dir output_dir cache_dir min_freq_energy num_workers seed device precision wandb_mode "
    same += "wandb_project batch_size"
    given |= {name: getattr(settings, name) for name in same.split()}
    return dataclasses.replace(base, max_tiles=0, qc_pages=False, **given)


@dataclass
class Engine:
    """A network on its device and how its inputs are made."""

    model: mammo.MammogramBYOL
    config: mammo.Config
    device: torch.device
    autocast: Callable[[], Any]
    sees: str = "image"  # which of a View's tensors the model gets
    heads: dict[str, image_head.ImageHead] = dataclasses.field(default_factory=dict)  # of attention

    @torch.inference_mode()
    def over_tiles(
        self,
        tiles: mammo.MammogramTiles,
        ids: np.ndarray,
        call: Callable[[Tensor], Tensor],
        desc: str = "",
    ) -> np.ndarray:
        """`call` on plain views of tiles `ids`, in eval mode: (len(ids), outputs) float32.

        Raises MammoError where an output is not a number.
        """
        self.model.eval()
        outputs = []
        parts = np.array_split(ids, max(1, -(-len(ids) // 64)))
        for part in tracking.progress(parts, desc=desc, disable=None if desc else True, leave=False):
            view = mammo.make_view(
                tiles, part, mammo.PLAIN_VIEW, self.config.view_side, device=self.device
            )
            with self.autocast():
                outputs.append(call(getattr(view, self.sees)).float().cpu())
        out = torch.cat(outputs).numpy()
        if not np.isfinite(out).all():
            raise MammoError("the network gives values that are no numbers: its weights are damaged")
        return out

    def calibrate(self, tiles: mammo.MammogramTiles, ids: np.ndarray) -> None:
        """Set the running statistics of batch norm on tiles `ids`, for weights that saw no mammogram.

        Without them random weights would be judged for their scale, not for their features.
        """
        plain, side = mammo.PLAIN_VIEW, self.config.view_side
        views = (
            mammo.make_view(tiles, part, plain, side, device=self.device)
            for part in np.array_split(ids, max(1, len(ids) // 64))
        )
        update_bn((getattr(v, self.sees).expand(-1, 3, -1, -1) for v in views), self.model.backbone)

    def features(
        self, tiles: mammo.MammogramTiles, ids: np.ndarray, desc: str = "features"
    ) -> np.ndarray:
        """Frozen features (len(ids), input_dim)."""
        return self.over_tiles(tiles, ids, self.model.get_features, desc)

    def probabilities(self, tiles: mammo.MammogramTiles, ids: np.ndarray, desc: str = "") -> np.ndarray:
        """Probability of each finding (len(ids), findings)."""
        return self.over_tiles(tiles, ids, lambda view: self.model.classify(view).sigmoid(), desc)


def own_device(config: mammo.Config) -> torch.device:
    """The device of this process, also as one of several tasks."""
    return devices.choose_device(config.device, processes.find_ranks().local_rank)


def open_engine(settings: Settings) -> Engine:
    """Put the network with its starting weights on the device."""
    return engine_of(*start_model(settings))


def engine_of(model: Any, config: mammo.Config, sees: str = "image") -> Engine:
    """Put a model on the device: MammogramBYOL, or for features alone one of byol_mammo/encoders.py."""
    device = own_device(config)
    devices.set_determinism(config.deterministic, device)
    dtype = devices.choose_precision(config.precision, device)
    model = model.to(device).to(memory_format=torch.channels_last)
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)  # noqa: E731
    return Engine(model, config, device, autocast, sees)


def classic_engine(tiles: mammo.MammogramTiles, config: mammo.Config) -> Engine:
    """Classic filters at the scale of these tiles."""
    spacing = tiles.images["spacing_mm"].median() if "spacing_mm" in tiles.images else 1.0
    step = float(spacing) * tiles.tile_size / config.view_side
    return engine_of(encoders.ClassicFilters(config.view_side, step), config, "sharp")


def open_classifier(settings: Settings) -> tuple[Engine, Settings]:
    """A trained classifier and the settings with its findings. Raises MammoError for a mere backbone."""
    engine = open_engine(settings)
    state = checkpoints.load_checkpoint(settings.weights) if settings.weights.endswith(".pth") else {}
    if not {"classifier", "classes"} <= state.keys() or "optimizer" in state:
        problem = "it is for resuming" if "classifier" in state else "its head is not trained"
        raise MammoError(
            f"{settings.weights}: {problem}; run train_classifier.py train and give its "
            "classifier_best.pth"
        )
    mode = "attention" if "image_heads" in state else "finetune"
    settings = dataclasses.replace(settings, findings=",".join(state["classes"]), mode=mode)
    if "image_heads" in state:
        width = engine.config.input_dim
        engine.heads = image_head.from_content(state["image_heads"], width, settings.weights)
        for head in engine.heads.values():
            head.to(engine.device)
    return engine, settings


def calibrate(engine: Engine, data: LabelledTiles, ids: np.ndarray) -> None:
    """Calibrate batch norm on up to 1,024 of tiles `ids`."""
    rng = np.random.default_rng([engine.config.seed, 10])
    engine.calibrate(data.tiles, rng.permutation(ids)[:1024])


def open_bags(
    engine: Engine, data: LabelledTiles, ids: np.ndarray
) -> tuple[image_head.Bags, np.ndarray]:
    """Frozen features of tiles `ids` by image, and one tile id of each image (images,).

    Features are kept beside the cache under a key of all that they depend on.
    """
    image = data.table["row"].to_numpy()
    ids = ids[np.argsort(image[ids], kind="stable")]
    precision = devices.precision_name(engine.config.precision, engine.device)
    tiles = data.tiles
    code = mammo.settings.code_version(mammo.TRAINING_CODE)
    known = [tiles.cache.name, tiles.digest, engine.config.view_side, precision, code]
    key = hashlib.sha256(" ".join(map(str, known)).encode())
    for name, value in engine.model.backbone.state_dict().items():
        key.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    key.update(ids.tobytes())
    features = image_head.keep_features(
        tiles.cache.parent / ".features" / f"{key.hexdigest()[:16]}.npy",
        (len(ids), engine.config.input_dim),
        lambda: engine.features(tiles, ids),
    )
    starts = np.unique(image[ids], return_index=True)[1]
    return image_head.Bags(features, starts), ids[starts]


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # inverse weight decay of the probe, chosen on validation studies


def fit_logistic(features: np.ndarray, target: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Weights (D,) and bias of a logistic regression of `target` (N,) 0 or 1 on features (N, D).

    Both classes count alike; `strength` is the inverse weight decay on standardised features.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    mean, std = features.mean(0), features.std(0) + 1e-6
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000, tol=1e-3)
    model.fit((features - mean) / std, target)
    weights = model.coef_[0] / std
    return weights, float(model.intercept_[0] - weights @ mean)


def fit_probe(
    features: np.ndarray, targets: np.ndarray, groups: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logistic regression of each finding: weights (findings, D), biases and AUROC (findings,).

    The weight decay is that of highest AUROC on VALIDATION_SHARE of the studies, which is the one that
    is returned; the fit is on all.
    """
    from sklearn.metrics import roc_auc_score

    fold = group_folds(groups, targets, max(2, round(1 / settings.validation_share)), settings.seed)
    weights, biases, best = [], [], []
    for name, target in zip(settings.names, targets.T, strict=True):
        known = np.isfinite(target)
        fit, held_out = known & (fold != 0), known & (fold == 0)
        check_classes(target[fit][:, None], [name], "probe, fitting studies")
        check_classes(target[held_out][:, None], [name], "probe, validation studies")
        aurocs = {}
        for strength in STRENGTHS:
            weight, bias = fit_logistic(features[fit], target[fit], strength)
            aurocs[strength] = roc_auc_score(target[held_out], features[held_out] @ weight + bias)
        strength = max(aurocs, key=aurocs.__getitem__)
        weight, bias = fit_logistic(features[known], target[known], strength)
        weights.append(weight)
        biases.append(bias)
        best.append(aurocs[strength])
    return np.array(weights), np.array(biases), np.array(best)


@torch.no_grad()
def set_logistic_head(model: mammo.MammogramBYOL, weights: np.ndarray, biases: np.ndarray) -> None:
    """Make the two-layer classification head compute features @ weights.T + biases exactly.

    t = relu(t) - relu(-t): two hidden units carry each finding. The other units keep their random input
    weights and no output, so that fine-tuning may still use them.
    """
    first, last = model.classification_head[0], model.classification_head[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)  # noqa: PT018
    last.weight.zero_()
    last.bias.zero_()
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        row = torch.as_tensor(weight, dtype=first.weight.dtype, device=first.weight.device)
        for unit, sign in ((2 * index, 1), (2 * index + 1, -1)):
            first.weight[unit] = sign * row
            first.bias[unit] = sign * float(bias)
            last.weight[index, unit] = sign


def prior_shift(targets: np.ndarray) -> np.ndarray:
    """Log odds of each finding among tiles (findings,).

    Both classes count alike in training; added to the logits, this makes them probabilities at the
    findings' true frequency (King & Zeng 2001, doi 10.1093/oxfordjournals.pan.a004868).
    """
    return np.log((targets == 1).sum(0) / (targets == 0).sum(0))


# ---- 4 Training ------------------------------------------------------------------------------------


@dataclass
class Job:
    """A training of the classifier; `epoch` counts finished ones."""

    settings: Settings
    engine: Engine
    data: LabelledTiles
    folder: Path
    train_ids: np.ndarray  # tiles of the training studies
    validation_ids: np.ndarray  # drawn tiles of the validation studies
    shift: np.ndarray  # prior_shift of the training tiles
    optimizer: torch.optim.Optimizer  # it and the scaler: of fine-tuning
    scaler: torch.amp.GradScaler
    epoch: int = 0
    best_epoch: int = 0
    best_auroc: float = 0.0
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)


def prepare_job(settings: Settings) -> Job:
    """Split the training studies and check that each part holds both classes."""
    engine = open_engine(settings)
    set_outputs(engine.model, len(settings.names))
    engine.model.to(engine.device)
    data = load_labelled(settings, engine.config)
    ids, spread = data.in_split("training"), data.targets
    images_alone, findings = settings.mode == "attention", settings.names
    check = image_head.check_values if images_alone else check_classes
    check(data.targets[ids], settings.names, "training split")
    if images_alone:
        ids = ids[np.isfinite(data.targets[ids]).any(1)]
        targets = image_head.find_targets(data.names, data.targets[ids])
        spread = image_head.exceeds(data.targets, targets)
        findings = [target.name for target in targets if not target.is_graded]
    makers.note_coinciding(data.images_of(ids), findings)
    share = max(2, round(1 / settings.validation_share))
    fold = group_folds(data.groups[ids], spread[ids], share, settings.seed)
    train_ids, validation_ids = ids[fold != 0], ids[fold == 0]
    check(data.targets[train_ids], settings.names, "training studies")
    check(data.targets[validation_ids], settings.names, "validation studies")
    shift = np.zeros(len(data.names)) if images_alone else prior_shift(data.targets[train_ids])
    folder = settings.folder("train")
    if folder.exists() and (not settings.resume or holds_another_result(folder, settings, data)):
        files.move_aside(folder)
        print(f"note: what {folder} held is moved aside", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_unfinished(folder)
    drawn = validation_ids if images_alone else draw_tiles(data, validation_ids, settings)
    fp16 = devices.choose_precision(settings.precision, engine.device) == torch.float16
    scaler = torch.amp.GradScaler(engine.device.type, enabled=fp16)
    optimizer = build_optimizer(engine.model, settings)
    return Job(settings, engine, data, folder, train_ids, drawn, shift, optimizer, scaler)


def holds_another_result(folder: Path, settings: Settings, data: LabelledTiles) -> bool:
    """Whether a folder holds a classifier that this training would replace and not go on from."""
    if not (folder / "classifier_best.pth").is_file():
        return False
    resumable = (folder / "last.pth").is_file()  # then resume_job compares
    if resumable or settings.mode == "finetune":
        return resumable != (settings.mode == "finetune")
    try:
        then = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        other_data = (
            caches.changed_tiles(then, data.tiles.cache, data.tiles.digest)
            or then["labels"] != data.fingerprint
        )
        changed = mammo.settings.changed_flags(settings, then["settings"], FREE_ON_RESUME)
        return bool(other_data or changed)
    except (OSError, ValueError, KeyError):
        return True


def start_from_probe(job: Job) -> None:
    """Fit the logistic head on frozen features.

    Fine-tuning starts from it: a random head would first distort the features (Kumar et al. 2022,
    arXiv:2202.10054).
    """
    ids = draw_tiles(job.data, job.train_ids, job.settings)
    if job.settings.weights == "none":  # trained weights lose by other statistics than their own
        calibrate(job.engine, job.data, ids)
    features = job.engine.features(job.data.tiles, ids)
    targets, groups = job.data.targets[ids], job.data.groups[ids]
    weights, biases, _ = fit_probe(features, targets, groups, job.settings)
    set_logistic_head(job.engine.model, weights, biases)


def validate(job: Job) -> dict[str, float]:
    """AUROC of each finding on the validation tiles, and their mean."""
    from sklearn.metrics import roc_auc_score

    scores = job.engine.over_tiles(job.data.tiles, job.validation_ids, job.engine.model.classify)
    row = {}
    for index, name in enumerate(job.settings.names):
        target = job.data.targets[job.validation_ids, index]
        known = np.isfinite(target)
        row[f"auroc_{name}"] = float(roc_auc_score(target[known], scores[known, index]))
    return {"auroc": float(np.mean(list(row.values()))), **row}


def epoch_tiles(job: Job, epoch: int) -> np.ndarray:
    """Tiles of an epoch in training order: all positive ones and fresh others, spread over images."""
    rng = np.random.default_rng([job.settings.seed, 8, epoch])
    targets = job.data.targets[job.train_ids]
    positive = (targets == 1).any(1)
    negative = job.train_ids[~positive & np.isfinite(targets).any(1)]
    order = sampling.spread_over_images(job.data.table["row"].to_numpy()[negative], rng)
    count = round(job.settings.negatives_per_positive * positive.sum())
    return rng.permutation(np.concatenate([job.train_ids[positive], negative[order[:count]]]))


def steps_per_epoch(job: Job) -> int:
    """Optimiser steps of an epoch."""
    if job.settings.mode == "attention":
        count = job.data.table["row"].iloc[job.train_ids].nunique()
        return max(1, count // job.settings.batch_size)
    return max(1, len(epoch_tiles(job, 0)) // job.settings.batch_size)


def class_weights(job: Job) -> Tensor:
    """(findings,) weight of a positive tile, by which both classes of an epoch count alike."""
    targets = job.data.targets[epoch_tiles(job, 0)]
    return torch.from_numpy(((targets == 0).sum(0) / (targets == 1).sum(0)).astype(np.float32))


def masked_bce(logits: Tensor, targets: Tensor, positive_weight: Tensor) -> Tensor:
    """Binary cross-entropy of (B, findings), mean over known targets; NaN = unknown."""
    known = targets.isfinite()
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), targets.nan_to_num(), pos_weight=positive_weight, reduction="none"
    )
    return (loss * known).sum() / known.sum().clamp_min(1)


def build_optimizer(model: mammo.MammogramBYOL, settings: Settings) -> torch.optim.Optimizer:
    """AdamW: the head at LR, the backbone at BACKBONE_LR."""
    groups = [
        {"params": list(model.classification_head.parameters()), "peak": settings.lr},
        {"params": list(model.backbone.parameters()), "peak": settings.backbone_lr},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def finetune_epoch(job: Job, bar: tqdm, stop: processes.StopSignal) -> float:
    """One pass over the epoch's tiles; returns the mean loss."""
    settings, engine = job.settings, job.engine
    ids, weight = epoch_tiles(job, job.epoch), class_weights(job).to(engine.device)
    steps = steps_per_epoch(job)
    total, losses = steps * settings.epochs, []
    engine.model.train()
    for index, part in enumerate(np.array_split(ids, steps)):
        step = job.epoch * steps + index
        factor = float(cosine_warmup_schedule(step, total, 1.0, 0.0, min(steps, total // 2), 0.0))
        for group in job.optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        view = mammo.make_view(
            job.data.tiles,
            part,
            MILD_VIEW,
            engine.config.view_side,
            (settings.seed, step, 4),
            engine.device,
        )
        targets = devices.to_device(job.data.targets[part], engine.device)
        with engine.autocast():
            loss = masked_bce(engine.model.classify(view.image), targets, weight)
        job.optimizer.zero_grad(set_to_none=True)
        job.scaler.scale(loss).backward()
        job.scaler.step(job.optimizer)
        job.scaler.update()
        losses.append(loss.detach())
        bar.update()
        if stop.requested:
            rest = f"the same command goes on from {job.folder / 'last.pth'}"
            raise mammo.StoppedError(stop.requested, rest)
    means = torch.stack(losses)
    if not means.isfinite().all():
        first = means.isfinite().tolist().index(False)
        raise MammoError(
            f"the loss is not a number at step {job.epoch * steps + first + 1} (rows of tiles.csv: "
            f"{np.array_split(ids, steps)[first].tolist()}): lower --lr or use --precision fp32"
        )
    return float(means.mean())


def hashed(patients: np.ndarray) -> list[str]:
    """Who patients are for a checkpoint, which may be given away: hashes of their names, sorted."""
    names = {labelling.same_name(name) for name in patients.tolist()}
    return sorted(hashlib.sha256(os.fsencode(name)).hexdigest()[:16] for name in names)


def save_classifier(job: Job, name: str, resumable: bool = False) -> None:
    """Write a checkpoint with the main script's keys; a resumable one holds logits before the shift."""
    state = {key: value.detach().cpu().clone() for key, value in job.engine.model.state_dict().items()}
    if not resumable:
        last = f"classification_head.{len(job.engine.model.classification_head) - 1}.bias"
        state[last] += torch.from_numpy(job.shift.astype(np.float32))
    content: dict[str, Any] = {
        "model_state_dict": state,
        "config": dataclasses.asdict(job.engine.config),
        "classes": job.settings.names,
        "step": job.epoch * steps_per_epoch(job),
        "epoch": job.epoch,
        "monitor": job.rows[-1] if job.rows else {},
        "classifier": dataclasses.asdict(job.settings),
        "patients": hashed(job.data.groups[[*job.train_ids, *job.validation_ids]]),
    }
    if resumable:
        content |= {"optimizer": job.optimizer.state_dict(), "scaler": job.scaler.state_dict()}
        content |= {"best_epoch": job.best_epoch, "best_auroc": job.best_auroc, "rows": job.rows}
        content["cache_key"] = job.data.tiles.cache.name
        content["cached"] = job.data.tiles.digest
        content["labels"] = job.data.fingerprint
        content["precision"] = devices.precision_name(job.settings.precision, job.engine.device)
    if job.engine.heads:
        content["image_heads"] = image_head.to_content(job.engine.heads)
    checkpoints.write_checkpoint(job.folder / name, content)


def resume_job(job: Job) -> None:
    """Put last.pth's state into the job. Raises MammoError where settings that shape it differ."""
    state = checkpoints.load_checkpoint(job.folder / "last.pth")
    changed = mammo.settings.changed_flags(job.settings, state["classifier"], FREE_ON_RESUME)
    changed += caches.changed_tiles(state, job.data.tiles.cache, job.data.tiles.digest)
    if state.get("labels") != job.data.fingerprint:
        changed.append("the labels, splits or patients")
    if changed:
        raise MammoError(
            f"{job.folder} holds a training with other settings: {'; '.join(changed)}.\n"
            "  Give --run_name NAME for a new one, or --no_resume to move the old one aside."
        )
    job.engine.model.load_state_dict(state["model_state_dict"])
    job.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where the state was saved in another precision than fp16
        job.scaler.load_state_dict(state["scaler"])
    precision = devices.precision_name(job.settings.precision, job.engine.device)
    checkpoints.note_precision(state, precision)
    job.epoch, job.best_epoch, job.best_auroc = state["epoch"], state["best_epoch"], state["best_auroc"]
    job.rows = state["rows"]


def record_epoch(job: Job, loss: float, tracker: tracking.Tracker) -> None:
    """Validate, write metrics.csv, keep the best checkpoint and the state to resume."""
    row = {"epoch": job.epoch, "loss": loss, **validate(job)}
    job.rows.append(row)
    tracker.log(row)
    files.write_atomic(job.folder / "metrics.csv", pd.DataFrame(job.rows).to_csv(index=False))
    found = ", ".join(f"{name} {row[f'auroc_{name}']:.3f}" for name in job.settings.names)
    what = f"epoch {job.epoch}: loss {loss:.3f}" if job.epoch else "probe"
    tqdm.write(f"{what}, validation AUROC {found}", file=sys.stderr)
    if row["auroc"] > job.best_auroc:
        job.best_auroc, job.best_epoch = row["auroc"], job.epoch
        save_classifier(job, "classifier_best.pth")
    if job.settings.mode == "finetune":
        save_classifier(job, "last.pth", resumable=True)


def finetune(job: Job, tracker: tracking.Tracker) -> None:
    """Fine-tune from the probe (epoch 0) until EPOCHS, or until validation stops improving."""
    settings = job.settings
    # Weights that kept trained statistics keep them here: batches' own would take the ground from under
    # the probe in the first steps (figures in docs/measured.md).
    job.engine.model.norm_frozen = settings.weights != "none" and job.engine.config.norm_frozen
    if not job.rows:
        start_from_probe(job)
        record_epoch(job, 0.0, tracker)
    steps = steps_per_epoch(job)
    bar_size: dict[str, Any] = {
        "total": settings.epochs * steps,
        "initial": job.epoch * steps,
        "unit": "step",
    }
    with processes.StopSignal() as stop, tracking.progress(desc="finetune", **bar_size) as bar:
        while job.epoch < settings.epochs and job.epoch - job.best_epoch < settings.patience:
            loss = finetune_epoch(job, bar, stop)
            job.epoch += 1
            record_epoch(job, loss, tracker)


def fit_image_heads(job: Job, tracker: tracking.Tracker) -> None:
    """Train a head of each pooling on frozen features and the images' labels; writes metrics.csv and
    the checkpoint. `job.rows` are then attention's.

    Features are all that takes time, and are found again: the rest repeats to the bit.
    """
    data, settings, device = job.data, job.settings, job.engine.device
    if settings.weights == "none":  # see start_from_probe
        calibrate(job.engine, data, job.train_ids)
    bags, first = open_bags(job.engine, data, np.concatenate([job.train_ids, job.validation_ids]))
    values, held_out = data.targets[first], np.isin(first, job.validation_ids)
    recipe = image_head.Recipe(
        settings.epochs, settings.patience, settings.batch_size, settings.lr, settings.weight_decay,
        settings.seed, device,
    )  # fmt: skip
    targets = image_head.find_targets(data.names, values)
    print(f"training  {(~held_out).sum():,} images, validation on {held_out.sum():,}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for pooling in image_head.POOLINGS:
        head, rows[pooling] = image_head.fit(bags, values, held_out, targets, pooling, recipe)
        job.engine.heads[pooling] = head
        best = rows[pooling][image_head.best_epoch(rows[pooling])]
        found = ", ".join(f"{name} {best[f'auroc_{name}']:.3f}" for name in data.names)
        tqdm.write(f"{pooling}: validation AUROC {found} (epoch {best['epoch']})", file=sys.stderr)
    job.rows = [{k: v for k, v in row.items() if k != "pooling"} for row in rows["attention"]]
    job.epoch = job.best_epoch = image_head.best_epoch(job.rows)
    for row in job.rows:
        tracker.log(row)
    table = pd.DataFrame([row for part in rows.values() for row in part])
    files.write_atomic(job.folder / "metrics.csv", table.to_csv(index=False))
    save_classifier(job, "classifier_best.pth")


# ---- 5 Statistics ----------------------------------------------------------------------------------


def describe(scores: np.ndarray, target: np.ndarray, groups: np.ndarray, settings: Settings) -> dict:
    """Every figure of one finding at one level; NaN where a class is missing."""
    from sklearn.metrics import average_precision_score, roc_curve

    row: dict[str, Any] = {"n": len(target), "positive": int(target.sum()), "studies": len(set(groups))}
    row["positive_studies"] = len(set(groups[target == 1]))
    if len(set(target.tolist())) < 2:
        return row
    draws = weighted_auroc(scores, target, resample_groups(groups, settings.bootstrap, settings.seed))
    low, high = interval(draws[1:])
    false_alarms, sensitivity, _ = roc_curve(target, scores, drop_intermediate=False)
    return row | {
        "auroc": float(draws[0]),
        "auroc_low": low,
        "auroc_high": high,
        "average_precision": float(average_precision_score(target, scores)),
        "sensitivity_at_90_specificity": float(sensitivity[false_alarms <= 0.1].max()),
        "ece": calibration_error(scores, target),
    }


OF_IMAGES = ["image", "study_id", "patient", "split", "laterality", "view", "breast_density"]
OF_IMAGES += makers.GROUPS


def predictions(
    data: LabelledTiles, ids: np.ndarray, scores: np.ndarray, split: str
) -> dict[str, pd.DataFrame]:
    """One table for each level: what is known of a unit, `<finding>` (truth) and `p_<finding>`.

    Images of the split without a tile have probability 0: what they show is missed.
    """
    tile = data.table.iloc[ids].reset_index(drop=True)
    p = [f"p_{name}" for name in data.names]
    tile[data.names], tile[p] = data.targets[ids], scores
    rows = tile.groupby("row")
    known = rows[OF_IMAGES].first()
    known[data.names] = data.image_targets[known.index]
    untiled = data.untiled.loc[is_of_split(data.untiled, split), [*OF_IMAGES, *data.names]]
    untiled = untiled.assign(**dict.fromkeys(p, 0.0))
    tables = {"tile": tile}
    noisy_or = 1 - (1 - tile[p]).groupby(tile["row"]).prod()
    for level, found in (("image_max", rows[p].max()), ("image_noisy_or", noisy_or)):
        table = known.join(found).reset_index()
        tables[level] = pd.concat([table, untiled], ignore_index=True) if len(untiled) else table
    return tables | by_breast_and_study(tables["image_max"], data.names)


def by_breast_and_study(image: pd.DataFrame, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The tables of breasts and of studies of one of images, see predictions."""
    tables, names, p = {}, list(names), [f"p_{name}" for name in names]
    sided = image[image["laterality"] != ""]
    for level, part, keys in (
        ("breast", sided, ["study_id", "laterality"]),
        ("study", image, ["study_id"]),
    ):
        groups = part.groupby(keys)
        table = groups[[*names, *p]].max().join(groups[["patient", "breast_density"]].first())
        # Without a finding is only what is so in every view.
        unsure = part[names].isna().groupby([part[key] for key in keys]).any()
        table[names] = table[names].mask(unsure & (table[names] != 1))
        tables[level] = table.reset_index()
    return tables


def image_predictions(
    engine: Engine, data: LabelledTiles, ids: np.ndarray, split: str
) -> dict[str, pd.DataFrame]:
    """A table of images for each pooling, see predictions; grades: `expected_<name>`, `grade_<name>`.

    Images without a tile count as those without a finding, and have no grade.
    """
    bags, first = open_bags(engine, data, ids)
    known = data.table.iloc[first][OF_IMAGES].reset_index(drop=True)
    known[data.names] = data.targets[first]
    untiled = data.untiled.loc[is_of_split(data.untiled, split), [*OF_IMAGES, *data.names]]
    tables = {}
    for pooling, head in engine.heads.items():
        above = image_head.answers(head, bags, np.arange(len(bags)), engine.device)
        means, grades = image_head.expected(above, head.targets)
        table = known.copy()
        for target, mean, grade in zip(head.targets, means.T, grades.T, strict=True):
            if target.name not in data.names:
                continue
            if target.is_graded:
                table[f"expected_{target.name}"], table[f"grade_{target.name}"] = mean, grade
            else:
                table[f"p_{target.name}"] = mean
        missed = untiled.assign(**{name: 0.0 for name in table if name.startswith("p_")})
        both = pd.concat([table, missed], ignore_index=True) if len(missed) else table
        tables[f"image_{pooling}"] = both
    return tables


def pooling_table(
    tables: dict[str, pd.DataFrame], targets: Sequence[image_head.Target], settings: Settings
) -> pd.DataFrame:
    """Each target's figures by pooling with intervals, and attention's gain over the others, paired."""
    rows = []
    for target in targets:
        name, draws = target.name, {}
        for level, table in tables.items():
            known = table[table[name].notna()].dropna(subset=[f"grade_{name}"] * target.is_graded)
            weights = resample_groups(known["patient"].to_numpy(str), settings.bootstrap, settings.seed)
            truth = known[name].to_numpy(float)
            if target.is_graded:
                scores = known[f"expected_{name}"].to_numpy(), known[f"grade_{name}"].to_numpy()
                draws[level] = grading.graded_figures(truth, *scores, weights)
            else:
                score = known[f"p_{name}"].to_numpy(float)
                draws[level] = {"auroc": weighted_auroc(score, truth, weights)}
        for figure in draws["image_attention"]:
            for level, found in draws.items():
                low, high = interval(found[figure][1:])
                row = {"finding": name, "figure": figure, "level": level, "n": len(truth)}
                row |= {"value": found[figure][0], "low": low, "high": high}
                if level != "image_attention":
                    gain = draws["image_attention"][figure] - found[figure]
                    low, high = interval(gain[1:])
                    row |= {"attention_gain": gain[0], "gain_low": low, "gain_high": high}
                    row |= {"p": paired_p(gain[1:])}
                rows.append(row)
    return pd.DataFrame(rows)


def evaluation_table(
    tables: dict[str, pd.DataFrame], names: Sequence[str], settings: Settings
) -> pd.DataFrame:
    """Figures of every finding at every level, over all and by density, view and laterality."""
    rows = []
    for level, table in tables.items():
        groups: list[tuple[str, pd.DataFrame]] = [("all", table)]
        for column in ("breast_density", "view", "laterality"):
            if column in table and table[column].nunique() > 1:
                groups += [(f"{column} {value}", part) for value, part in table.groupby(column)]
        for group, part in groups:
            for name in names:
                figures = describe(*scored(part, name), settings)
                rows.append({"level": level, "group": group, "finding": name, **figures})
    return pd.DataFrame(rows)


def scored(table: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, truth and patient (N,) of the units that are known to have a finding or not."""
    known = table[table[name].notna()]
    score, truth = (known[column].to_numpy(float) for column in (f"p_{name}", name))
    return score, truth, known["patient"].to_numpy(str)


def figures_by_group(
    tables: dict[str, pd.DataFrame], names: Sequence[str], settings: Settings
) -> pd.DataFrame:
    """Figures by maker and by archive, all with intervals, of tiles and images: a breast or study may be
    of several makers."""

    def judge(part: pd.DataFrame) -> list[dict[str, Any]]:
        rows = []
        for name in names:
            score, truth, patient = scored(part, name)
            row = describe(score, truth, patient, settings)
            if "auroc" in row:
                weights = resample_groups(patient, settings.bootstrap, settings.seed)
                row |= makers.intervals(score, truth, weights[1:])
            rows.append({"finding": name, **row})
        return rows

    levels = [level for level in tables if level not in ("breast", "study")]
    found = {level: makers.by_group(tables[level], names, judge, FEW_STUDIES) for level in levels}
    return pd.concat([table.assign(level=level) for level, table in found.items()], ignore_index=True)


def located(tiles: pd.DataFrame, name: str) -> pd.Series:
    """Per image with a tile that holds the finding: whether the tile of highest probability is one."""
    groups = tiles.groupby("row")
    highest = tiles.loc[groups[f"p_{name}"].idxmax()].set_index("row")[name] == 1
    return highest[groups[name].max() == 1]


# ---- 6 Pictures ------------------------------------------------------------------------------------


def draw_embedding(
    points: np.ndarray, data: LabelledTiles, ids: np.ndarray, title: str, path: Path
) -> None:
    """The 2-D map (N, 2) of tiles, coloured by density, view and label."""
    table = data.table.iloc[ids]
    targets = data.targets[ids]
    label = np.where(np.isfinite(targets).all(1), "none", "unknown").astype(object)
    for index, name in enumerate(data.names):
        label[targets[:, index] == 1] = name
    panels = {"breast density": table["breast_density"], "view": table["view"], "finding": label}
    figure, places = pictures.panel_grid(3, 2, 2.9)
    for axes, (name, values) in zip(places, panels.items(), strict=True):
        values = np.where(np.asarray(values, str) == "", "unknown", np.asarray(values, str))
        common = sorted(set(values), key=lambda value: -(values == value).sum())  # rare ones on top
        colours = ("#bbbbbb", *pictures.OKABE_ITO)
        marks = itertools.cycle((c, marker) for marker in "ox^s" for c in colours)
        for value, (colour, marker) in zip(common, marks, strict=False):
            chosen = values == value
            x, y = points[chosen].T
            words = f"{value} ({chosen.sum():,})"
            axes.scatter(x, y, s=4, color=colour, marker=marker, label=words)
        axes.set_title(name, fontsize=9)
        axes.set(xticks=[], yticks=[], xlabel=f"{title}, 1st axis", ylabel="2nd axis")
        axes.legend(fontsize=8, markerscale=3)
    figure.suptitle(f"{title} of tile features: near points look alike to the network", fontsize=9)
    pictures.save_figure(figure, path)


def heat_map(
    tiles: mammo.MammogramTiles, scores: np.ndarray, shape: tuple[int, int], step: int
) -> np.ndarray:
    """Mean probability of the tiles over each point, (findings, H / step, W / step) float32.

    NaN where no tile lies. Tiles count less towards their edges, where a finding would be cut.
    """
    height, width = -(-shape[0] // step), -(-shape[1] // step)
    side = -(-tiles.tile_size // step)
    ramp = np.hanning(side + 2)[1:-1]
    window = np.outer(ramp, ramp).astype(np.float32)
    total = np.zeros((scores.shape[1], height + side, width + side), np.float32)
    count = np.zeros((height + side, width + side), np.float32)
    for tile, score in zip(tiles.table.itertuples(), scores, strict=True):
        area = np.s_[tile.y // step : tile.y // step + side, tile.x // step : tile.x // step + side]
        total[:, area[0], area[1]] += score[:, None, None] * window
        count[area] += window
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total / count)[:, :height, :width]


def top_tiles(tiles: mammo.MammogramTiles, scores: np.ndarray, count: int) -> list[int]:
    """Up to `count` tiles of the highest scores (N,) that don't overlap."""
    corner = torch.tensor(tiles.table[["x", "y"]].to_numpy(np.float32))
    boxes = torch.cat([corner, corner + tiles.tile_size], 1)
    return nms(boxes, torch.tensor(scores, dtype=boxes.dtype), 0.0)[:count].tolist()


@dataclass(frozen=True)
class Overlay:
    """What draw_prediction lays over a mammogram for each finding."""

    scores: np.ndarray  # (N, findings) of the tiles, 0 to `top`
    titles: Sequence[str]
    marks: np.ndarray  # (N, findings) share that is written in a boxed tile
    label: str  # of the colours
    top: float = 1.0


def draw_prediction(
    image: np.ndarray, tiles: mammo.MammogramTiles, overlay: Overlay, count: int, path: Path
) -> None:
    """The mammogram beside a map for each finding, the `count` top tiles boxed with their share.

    No file name is drawn: it may name a patient.
    """
    from matplotlib.patches import Rectangle

    step = max(1, image.shape[0] // 900)
    small = cv2.resize(image, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
    heat = heat_map(tiles, overlay.scores, image.shape[:2], step)[:, : small.shape[0], : small.shape[1]]
    low, high = tiles.images[["low", "high"]].iloc[0]
    figure, panels = pictures.panel_grid(1 + len(heat), 2, 3.7)
    pictures.show_grey(panels[0], small, "mammogram", low, high)
    shown: Any = None
    for number, (axes, layer) in enumerate(zip(panels[1:], heat, strict=True)):
        score, mark = overlay.scores[:, number], overlay.marks[:, number]
        pictures.show_grey(axes, small, overlay.titles[number], low, high)
        opacity = 0.65 * (np.nan_to_num(layer) / overlay.top).clip(0, 1) ** 0.5
        shown = axes.imshow(layer, cmap="inferno", vmin=0, vmax=overlay.top, alpha=opacity)
        for rank, index in enumerate(top_tiles(tiles, score, count)):
            x, y = tiles.table[["x", "y"]].iloc[index] / step
            side, width = tiles.tile_size / step, 0.8 if rank else 1.6
            box = Rectangle((x, y), side, side, fill=False, edgecolor="#56b4e9", linewidth=width)
            axes.add_patch(box)
            words = axes.text(x + 6, y + 6, f"{mark[index]:.0%}", color="#56b4e9", fontsize=8, va="top")
            words.set_bbox({"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 0.5})
    bar = figure.colorbar(shown, ax=panels, location="bottom", shrink=0.8, aspect=40)
    bar.set_label(overlay.label, fontsize=9)
    pictures.save_figure(figure, path)


# ---- 7 Commands ------------------------------------------------------------------------------------


def train(settings: Settings) -> Path:
    """Train the classification head, and with --mode finetune the backbone; returns the folder."""
    job = prepare_job(settings)
    if settings.mode == "finetune" and (job.folder / "last.pth").is_file():
        resume_job(job)
    config = dataclasses.replace(
        job.engine.config, output_dir=str(job.folder.parent), run_name=job.folder.name
    )
    precision = devices.precision_name(settings.precision, job.engine.device)
    record = {
        "settings": dataclasses.asdict(settings),
        "cache_key": job.data.tiles.cache.name,
        "cached": job.data.tiles.digest,
        "labels": job.data.fingerprint,
        "environment": devices.environment(precision),
    }
    files.write_atomic(job.folder / "config.json", json.dumps(record, indent=2))
    if settings.mode != "attention":
        print_tiles(job)
    run_id = hashlib.sha256(bytes(job.folder.resolve())).hexdigest()[:8]
    tracker = mammo.start_tracker(run_id, config)
    try:
        if settings.mode == "probe":
            start_from_probe(job)
            record_epoch(job, 0.0, tracker)
        elif settings.mode == "attention":
            fit_image_heads(job, tracker)
        else:
            finetune(job, tracker)
            draw_training(job.rows, settings.names, job.folder / "curves.png")
    finally:
        tracker.finish()
    best = job.rows[job.best_epoch]
    figures = ", ".join(f"{name} {best[f'auroc_{name}']:.3f}" for name in settings.names)
    print(f"best      epoch {job.best_epoch}: validation AUROC {figures}")
    print(f"open      {job.folder}/classifier_best.pth metrics.csv config.json")
    return job.folder


def print_tiles(job: Job) -> None:
    """Say what a training on tiles learns from."""
    positive = (job.data.targets[job.train_ids] == 1).sum(0)
    found = ", ".join(
        f"{count} {name}" for count, name in zip(positive, job.settings.names, strict=True)
    )
    groups = [len(set(job.data.groups[ids])) for ids in (job.train_ids, job.validation_ids)]
    print(
        f"training  {len(job.train_ids):,} tiles ({found}) of {groups[0]} studies, "
        f"validation on {groups[1]} studies"
    )


def compare(settings: Settings, starts: Sequence[str]) -> pd.DataFrame:
    """Frozen-probe AUROC of each of `starts` and of --encoders on the same tiles and folds.

    The first is the reference. `norm`: whose statistics batch norm has, its own or, of weights that saw
    no mammogram, perhaps those of the tiles, see frozen_scores.
    """
    starts = list(dict.fromkeys([*starts, *settings.encoders]))
    engines, config = open_starts(settings, starts)
    data = load_labelled(settings, config)
    if encoders.CLASSIC in starts:
        engines[encoders.CLASSIC] = classic_engine(data.tiles, config)
    parts = comparison_folds(data, settings)
    judged = np.unique(np.concatenate([held_out for _, held_out in parts]))
    used = np.unique(np.concatenate([np.concatenate(part) for part in parts]))
    scores, notes, controls = {}, {}, []
    for start in (start for start in starts if start in engines):
        engine = engines[start]
        scores[start], norm, features = frozen_scores(start, engine, data, parts, settings)
        side = getattr(engine.model, "side", config.view_side)
        notes[start] = (whose_weights(start, engine), side, norm)
        controls += maker_control(features, data, used, start, settings)
    table = comparison_table(scores, data, judged, settings)
    if controls:
        table = pd.concat([table, pd.DataFrame(controls)], ignore_index=True)
    table[["weights", "px", "norm"]] = [notes[start] for start in table["start"]]
    folder = settings.folder("compare")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "compare.csv", table.to_csv(index=False))
    studies_judged = len(set(data.groups[judged]))
    where = "the split test" if len(parts) == 1 else f"{len(parts)} folds of all patients"
    print(
        f"{len(judged):,} tiles of {studies_judged} studies, judged in {where}; 95 % intervals are for "
        "these weights, over studies: other seeds give other weights"
    )
    note_few(data.names, data.targets[judged], data.groups[judged])
    own = [start for start in engines if not encoders.is_foreign(start)]
    note_seen([start for start in own if start.endswith(".pth")], data, judged, settings)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    shared = makers.note_coinciding(data.images_of(used), data.names)
    makers.write_tables(folder, comparison_by_group(scores, data, judged, settings), shared)
    print(f"open      {folder}/compare.csv")
    return table


def maker_control(
    features: np.ndarray, data: LabelledTiles, ids: np.ndarray, start: str, settings: Settings
) -> list[dict[str, Any]]:
    """The row of compare.csv that says how well features (N, D) of tiles `ids` tell the maker."""

    def auroc(score: np.ndarray, truth: np.ndarray, patient: np.ndarray) -> np.ndarray:
        weights = resample_groups(patient, settings.bootstrap, settings.seed)
        return weighted_auroc(score, truth, weights)

    rows = makers.control(features, data.table.iloc[ids], auroc, settings.seed)
    return [{"start": start, **row} for row in rows]


def comparison_by_group(
    scores: dict[str, np.ndarray], data: LabelledTiles, ids: np.ndarray, settings: Settings
) -> pd.DataFrame:
    """comparison_table by maker and by archive; its scores are fitted on all of them."""

    def judge(part: pd.DataFrame) -> list[dict[str, Any]]:
        of_group = {start: score[part.index] for start, score in scores.items()}
        return comparison_table(of_group, data, ids[part.index], settings).to_dict("records")

    units = data.table.iloc[ids].reset_index(drop=True)
    units[data.names] = data.image_targets[units["row"]] if settings.weak_labels else data.targets[ids]
    return makers.by_group(units, data.names, judge, FEW_STUDIES)


def open_starts(settings: Settings, starts: Sequence[str]) -> tuple[dict[str, Engine], mammo.Config]:
    """The networks among compare's starts, and the tiles to compare them on.

    ImageNet weights that can't be had are a note. Raises MammoError where other weights can't.
    """
    engines: dict[str, Engine] = {}
    backbone = settings.backbone  # of checkpoints, opened first, those without take theirs
    own = [start for start in starts if not encoders.is_foreign(start)]
    for start in sorted(own, key=lambda start: start in UNTRAINED):
        if start in UNTRAINED and engines:
            backbone = backbone or next(iter(engines.values())).config.backbone
        try:
            engines[start] = open_engine(dataclasses.replace(settings, weights=start, backbone=backbone))
        except MammoError as error:
            if start != "imagenet":
                raise
            print(f"note: imagenet not run: {str(error).splitlines()[0]}", file=sys.stderr)
    if not engines and len(own) == len(starts):
        raise MammoError("compare: none of the weights could be had")
    config = shared_config(engines) if engines else tile_config(settings, mammo.Config())
    for engine in engines.values():
        engine.config = config
    for start in starts:
        if start.startswith(encoders.TIMM):
            encoder = encoders.open_encoder(start, config.view_side, settings.seed)
            engines[start] = engine_of(encoder, config, "sharp")
    return engines, config


def whose_weights(start: str, engine: Engine) -> str:
    """Whose weights a start of compare has, for its table."""
    whose = getattr(engine.model, "weights", Path(start).name)
    return "untrained" if start == "none" else str(whose)


def frozen_scores(
    start: str,
    engine: Engine,
    data: LabelledTiles,
    parts: list[tuple[np.ndarray, np.ndarray]],
    settings: Settings,
) -> tuple[np.ndarray, str, np.ndarray]:
    """Out-of-fold log odds (judged tiles, findings) of a start's frozen features, its `norm`, and the
    features (N, D) of all tiles in `parts`.

    Which of the two counts is decided by the validation studies of the parts to fit on: taking the
    better of two by those who judge would lift what is at chance.
    """
    used, judged = (np.unique(np.concatenate(ids)) for ids in (sum(parts, ()), [p[1] for p in parts]))
    own_alone = start not in UNTRAINED and not encoders.is_foreign(start)
    layers = engine.model.backbone.modules()
    has_norm = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)
    found = {}
    for norm in ("own",) if own_alone or not has_norm else ("own", "tiles"):
        if norm == "tiles":
            calibrate(engine, data, parts[0][0])
        features = engine.features(data.tiles, used)
        scores, validated = probe_scores(
            features, data.targets[used], data.groups[used], used, parts, settings
        )
        found[norm] = (validated, scores, features)
    norm = max(found, key=lambda norm: found[norm][0])
    _, scores, features = found[norm]
    return scores[np.searchsorted(used, judged)], norm, features


def note_seen(
    starts: Sequence[str], data: LabelledTiles, judged: np.ndarray, settings: Settings
) -> None:
    """Say on stderr which starts were pre-trained on images that judge them."""
    folder = Path(settings.data_dir).resolve()
    images = [folder / name for name in data.table["image"].iloc[judged].unique()]
    for path in starts:
        state = checkpoints.load_checkpoint(path)
        recorded = checkpoints.recorded_config(state)
        trained_on = recorded.get("data_dir")
        if not trained_on or "classifier" in state:
            continue
        seen = sum(image.is_relative_to(Path(trained_on).resolve()) for image in images)
        if seen:
            chosen = ", and its epoch may be chosen by their labels" if recorded.get("labels") else ""
            print(
                f"note: {path} was pre-trained on {seen:,} of the {len(images):,} images that judge it"
                f"{chosen}; random and ImageNet weights have seen none of them",
                file=sys.stderr,
            )


def shared_config(engines: dict[str, Engine]) -> mammo.Config:
    """The tiles to compare on: those of the checkpoints. Raises MammoError where they differ."""
    names = ("tile_size", "tile_stride", "view_side", "pixel_spacing_mm", "target_spacing_mm")
    known = {start: engine for start, engine in engines.items() if start not in UNTRAINED}
    found = {start: [getattr(e.config, name) for name in names] for start, e in known.items()}
    if len({str(values) for values in found.values()}) > 1:
        raise MammoError(
            f"compare: the checkpoints were trained on different tiles ({found}, being "
            f"{', '.join(names)}); give --tile_size, --tile_stride, --view_size, --pixel_spacing_mm and "
            "--target_spacing_mm"
        )
    return next(iter((known or engines).values())).config


def comparison_folds(data: LabelledTiles, settings: Settings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tile ids (to fit on, to judge) of each fold. Raises MammoError where a part lacks a class."""
    test = data.in_split("test")
    if settings.folds == 0 and len(test):
        ids = [draw_tiles(data, part, settings) for part in (data.in_split("training"), test)]
        parts = [(ids[0], ids[1])]
    else:
        ids_all = draw_tiles(data, data.in_split("all"), settings)
        folds = settings.folds or 5
        fold = group_folds(data.groups[ids_all], data.targets[ids_all], folds, settings.seed)
        parts = [(ids_all[fold != number], ids_all[fold == number]) for number in range(folds)]
    for number, (fit, held_out) in enumerate(parts, 1):
        check_classes(data.targets[fit], data.names, f"fold {number}, fitting part")
        check_classes(data.targets[held_out], data.names, f"fold {number}, judged part")
    return parts


def probe_scores(
    features: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    used: np.ndarray,
    parts: list[tuple[np.ndarray, np.ndarray]],
    settings: Settings,
) -> tuple[np.ndarray, float]:
    """Out-of-fold log odds (len(used), findings); rows of `used` that no fold judges stay 0.

    And the mean AUROC of validation studies inside the parts to fit on.
    """
    scores, validated = np.zeros((len(used), len(settings.names)), np.float32), []
    for fit, held_out in parts:
        rows, judged = np.searchsorted(used, fit), np.searchsorted(used, held_out)
        weights, biases, aurocs = fit_probe(features[rows], targets[rows], groups[rows], settings)
        scores[judged] = features[judged] @ weights.T + biases
        validated.append(aurocs.mean())
    return scores, float(np.mean(validated))


def comparison_table(
    scores: dict[str, np.ndarray], data: LabelledTiles, ids: np.ndarray, settings: Settings
) -> pd.DataFrame:
    """AUROC, its interval, and the paired difference to the first of `scores`, per finding.

    At tile level; with weak labels, where only images have a truth, by the mean log odds of an image.
    """
    targets, groups = data.targets[ids], data.groups[ids]
    if settings.weak_labels:
        image = data.table["row"].to_numpy()[ids]
        rows, first = np.unique(image, return_index=True)
        targets, groups = data.image_targets[rows], groups[first]
        scores = {s: pd.DataFrame(v).groupby(image).mean().to_numpy() for s, v in scores.items()}
    table = []
    for index, name in enumerate(data.names):
        known = np.isfinite(targets[:, index])
        weights = resample_groups(groups[known], settings.bootstrap, settings.seed)
        reference = None
        for start, score in scores.items():
            draws = weighted_auroc(score[known, index], targets[known, index], weights)
            low, high = interval(draws[1:])
            row = {"finding": name, "start": start, "auroc": draws[0], "low": low, "high": high}
            if reference is not None:
                gain = draws - reference
                low, high = interval(gain[1:])
                row |= {"gain": gain[0], "gain_low": low, "gain_high": high, "p": paired_p(gain[1:])}
            reference = draws if reference is None else reference
            table.append(row)
    return pd.DataFrame(table)


def evaluate(settings: Settings) -> pd.DataFrame:
    """Judge a classifier on a split of labelled images; writes tables and pictures."""
    engine, opened = open_classifier(settings)
    classes = opened.names
    settings = dataclasses.replace(opened, findings=",".join(judged_findings(settings, classes)))
    data = load_labelled(settings, engine.config)
    ids = data.in_split(settings.split)
    if not len(ids):
        splits = sorted(set(data.table["split"]))
        raise MammoError(
            f"--split {settings.split}: labels.csv has no such images (it has {splits}, or all)"
        )
    note_fitted(data, ids, settings)
    if engine.heads:
        return evaluate_images(engine, data, ids, settings)
    scores = engine.probabilities(data.tiles, ids, "tiles")[:, [classes.index(n) for n in data.names]]
    tables = predictions(data, ids, scores, settings.split)
    table = evaluation_table(tables, data.names, settings)
    folder = settings.folder("evaluate")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "evaluation.csv", table.to_csv(index=False))
    for level, content in tables.items():
        text = content.drop(columns=INNER, errors="ignore").to_csv(index=False)
        files.write_atomic(folder / f"predictions_{level}.csv", text)
    draw_curves(tables, data.names, folder)
    shown = table[table["group"] == "all"].drop(columns="group")
    images = tables["image_max"]
    shared = makers.note_coinciding(images, data.names)
    note_few(data.names, images[data.names].to_numpy(), images["patient"].to_numpy(str))
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    for name in data.names:
        hits = located(tables["tile"], name)
        if len(hits) and not settings.weak_labels:
            print(
                f"top tile  holds the {name} in {hits.sum()} of {len(hits)} images that have one boxed"
            )
    makers.write_tables(folder, figures_by_group(tables, data.names, settings), shared)
    print(f"open      {folder}: evaluation.csv predictions_*.csv roc.png pr.png reliability.png")
    return table


def judged_findings(settings: Settings, classes: Sequence[str]) -> list[str]:
    """Which of a classifier's findings evaluate judges: those of --findings, else all, of which
    labels.csv has a column. Raises MammoError where --findings names one that the classifier does not
    know."""
    if settings.findings == FINDINGS:
        wanted = list(classes)
    elif unknown := [name for name in settings.names if name not in classes]:
        raise MammoError(
            f"--findings {unknown[0]}: {settings.weights} knows {', '.join(classes)}; name some of "
            "these, or leave --findings out"
        )
    else:
        wanted = settings.names
    if not Path(settings.labels).is_file():
        return wanted  # read_labels says so
    columns = files.read_table(Path(settings.labels), [], "prepare_dataset.py writes it").columns
    there = [n for n in wanted if (labelling.GRADES[n][0] if n in labelling.GRADES else n) in columns]
    if there and len(there) < len(wanted):
        absent = ", ".join(name for name in wanted if name not in there)
        print(f"note: labels {settings.labels}: no column {absent}, not judged", file=sys.stderr)
    return there or wanted


def note_fitted(data: LabelledTiles, ids: np.ndarray, settings: Settings) -> None:
    """Say on stderr how many of those who judge a classifier it was fitted on, or chosen by.

    The checkpoint knows them; of one that doesn't (before 2026-11-28) they are the split training.
    """
    state = checkpoints.load_checkpoint(settings.weights)
    if Path(state["classifier"]["data_dir"]).resolve() != Path(settings.data_dir).resolve():
        return  # other archives may have patients of these names
    fitted = state.get("patients") or hashed(data.groups[data.in_split("training")])
    judging = hashed(data.groups[ids])
    if known := {*judging} & {*fitted}:
        print(
            f"note: {len(known)} of the {len(judging)} patients who judge {settings.weights} are among "
            "those it was fitted on, or chosen by: the figures are too high",
            file=sys.stderr,
        )


# What an evaluation of attention leaves out without findings, or without grades.
IMAGE_RESULTS = "evaluation.csv roc.png pr.png reliability.png grades.png".split()
IMAGE_RESULTS += ["predictions_breast.csv", "predictions_study.csv"]


def evaluate_images(
    engine: Engine, data: LabelledTiles, ids: np.ndarray, settings: Settings
) -> pd.DataFrame:
    """Judge attention beside the other poolings on a split's images; writes tables and pictures."""
    ids = ids[np.isfinite(data.targets[ids]).any(1)]
    if not len(ids):
        raise MammoError(
            f"--split {settings.split}: no image with tiles has a value of {settings.findings}"
        )
    known = np.isfinite(data.targets[ids]).any(0)
    judged = set(np.array(data.names)[known])
    targets = [target for target in engine.heads["attention"].targets if target.name in judged]
    if not known.all():
        unknown = ", ".join(np.array(data.names)[~known])
        told = f"note: --split {settings.split}: no image with tiles has a value of {unknown}"
        print(f"{told}, which is not judged", file=sys.stderr)
    tables = image_predictions(engine, data, ids, settings.split)
    findings, graded = ([t.name for t in targets if t.is_graded is kind] for kind in (False, True))
    pooled = pooling_table(tables, targets, settings)
    folder = settings.folder("evaluate")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / "pooling.csv", pooled.to_csv(index=False))
    levels, written = dict(tables), ["pooling.csv"]
    if findings:
        levels |= by_breast_and_study(tables["image_attention"], findings)
        table = evaluation_table(levels, findings, settings)
        files.write_atomic(folder / "evaluation.csv", table.to_csv(index=False))
        draw_curves(tables, findings, folder, ("image_attention", "image_max"))
        written += ["evaluation.csv", "roc.png", "pr.png", "reliability.png"]
    for level, content in levels.items():
        text = content.drop(columns=INNER, errors="ignore").to_csv(index=False)
        files.write_atomic(folder / f"predictions_{level}.csv", text)
        written.append(f"predictions_{level}.csv")
    if graded:
        grading.draw_grades(tables["image_attention"], graded, folder / "grades.png")
        written.append("grades.png")
    for name in {*IMAGE_RESULTS} - {*written}:
        (folder / name).unlink(missing_ok=True)  # of an earlier evaluation of other findings
    images = tables["image_attention"]
    shared = makers.note_coinciding(images, findings)
    note_few(findings, images[findings].to_numpy(), images["patient"].to_numpy(str))
    print(pooled.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    makers.write_tables(folder, figures_by_group(tables, findings, settings), shared)
    print(f"open      {folder}: {' '.join(written)}")
    return pooled


def sources_of_files(
    operands: Sequence[str], paths: Sequence[Path], config: mammo.Config
) -> pd.DataFrame:
    """spacing_mm, polarity and view of each of `paths`, files and those of folders among `operands`.

    A manifest.csv in their folder or beside it tells, as in training, else the classifier's settings do.
    """
    roots = {operand if operand.is_dir() else operand.parent for operand in map(Path, operands)}
    tables = [images.read_manifest(Path(os.path.abspath(root))) for root in sorted(roots)]
    known = pd.concat(tables).drop_duplicates("path").set_index("path")
    sources = known.reindex([os.path.abspath(path) for path in paths]).reset_index(drop=True)
    return pd.DataFrame(
        {
            "spacing_mm": mammo.source_spacing(sources, config),
            "polarity": images.known_polarity(sources, config.polarity),
            "view": sources["view"].fillna(""),
        }
    )


def tiles_of_image(
    path: Path, spacing_mm: float, config: mammo.Config, view: str = ""
) -> mammo.MammogramTiles:
    """The tiles of one mammogram, held in memory. Raises ImageReadError, also where no tile is kept."""
    record, pixels = mammo.extract_image(str(path), spacing_mm, config, view)
    table = pd.DataFrame(record["tiles"]).assign(image=0)
    if table.empty:
        raise mammo.ImageReadError(path, "no tile holds enough tissue; loosen the tile settings")
    row = dict(zip("offset height width y0 x0 low high".split(),
                   (0, *pixels.shape, *record["origin"], *record["window"]), strict=True))  # fmt: skip
    images = pd.DataFrame([{"image": path.name, **row}])
    if config.target_spacing_mm:
        images[one_scale.COLUMN] = config.target_spacing_mm / spacing_mm
    reduce = mammo.reduction(config.tile_size, config.view_side)
    # In float, where a cache's averaged copy is rounded to 1/256 of a grey level.
    averaged = caches.block_average(pixels, reduce) if reduce > 1 else pixels.astype(np.float32)
    return mammo.MammogramTiles(averaged.ravel(), images, table, config.tile_size, reduce)


def answer_tiles(
    engine: Engine, tiles: mammo.MammogramTiles, names: Sequence[str]
) -> tuple[dict[str, Any], Overlay]:
    """A tile classifier's columns of predictions.csv for an image, and what is drawn over it."""
    scores = engine.probabilities(tiles, np.arange(len(tiles)))
    corners = one_scale.source_corners(tiles.images, tiles.table)
    row: dict[str, Any] = {}
    for name, score in zip(names, scores.T, strict=True):
        best = int(score.argmax())
        row |= {f"p_{name}": score[best], f"p_{name}_noisy_or": 1 - (1 - score).prod()}
        row |= {f"x_{name}": corners[best, 0], f"y_{name}": corners[best, 1]}
    titles = [
        f"{name}: {score.max():.0%} in its top tile" for name, score in zip(names, scores.T, strict=True)
    ]
    label = "probability of the finding in the tiles over a point"
    return row, Overlay(scores, titles, scores, label)


LEAST_TOP = 4.0  # even shares at the colours' end or more: attention to all alike must not look hot


def answer_image(
    engine: Engine, tiles: mammo.MammogramTiles, names: Sequence[str]
) -> tuple[dict[str, Any], Overlay]:
    """As answer_tiles, by attention: `x_`, `y_` and `attention_<name>` are of the tile of the largest
    share in the answer."""
    features = engine.features(tiles, np.arange(len(tiles)), "")
    shares = image_head.attend(engine.heads["attention"], features, engine.device)
    corners, one = one_scale.source_corners(tiles.images, tiles.table), np.array([0])
    row: dict[str, Any] = {}
    titles = []
    for pooling, head in engine.heads.items():
        above = image_head.answers(head, image_head.Bags(features, one), one, engine.device)
        means, grades = image_head.expected(above, head.targets)
        suffix = "" if pooling == "attention" else f"_{pooling}"
        for target, mean, grade in zip(head.targets, means[0], grades[0], strict=True):
            kind = "expected" if target.is_graded else "p"
            row[f"{kind}_{target.name}{suffix}"] = mean
            if target.is_graded:
                row[f"grade_{target.name}{suffix}"] = grade
    for name, share in zip(names, shares.T, strict=True):
        best = int(share.argmax())
        row |= {f"attention_{name}": share[best]}
        row |= {f"x_{name}": corners[best, 0], f"y_{name}": corners[best, 1]}
        titles.append(grading.describe(name, row))
    even = shares * len(shares)
    label = (
        "attention of the tiles over a point (1 = an even share; in boxes: % of all);\n"
        "where the answer comes from, not that something is there"
    )
    return row, Overlay(even, titles, shares, label, max(LEAST_TOP, float(even.max())))


def predict(settings: Settings, operands: Sequence[str]) -> pd.DataFrame:
    """Highest tile probability per finding and a map for each image; unusable images are named."""
    engine, settings = open_classifier(settings)
    paths: list[Path] = []
    for operand in map(Path, operands):
        paths += images.find_images(operand) if operand.is_dir() else [operand]
    folder = settings.folder("predict")
    folder.mkdir(parents=True, exist_ok=True)
    rows, parts = [], []
    sources = sources_of_files(operands, paths, engine.config)
    for number, path in enumerate(tracking.progress(paths, desc="predict", unit="image")):
        source = sources.iloc[number]
        config = dataclasses.replace(engine.config, polarity=source["polarity"])
        try:
            tiles = tiles_of_image(path, float(source["spacing_mm"]), config, source["view"])
        except mammo.ImageReadError as error:
            rows.append({"image": str(path), "error": error.reason})
            tqdm.write(f"note: {error}", file=sys.stderr)
            continue
        answer = answer_image if engine.heads else answer_tiles
        found, overlay = answer(engine, tiles.to(engine.device), settings.names)
        row: dict[str, Any] = {
            "image": str(path),
            "picture": f"map_{number:05d}.png",
            "tiles": len(tiles),
        }
        rows.append(row | found)
        if engine.heads:
            corners = one_scale.source_corners(tiles.images, tiles.table)
            places = pd.DataFrame(corners, columns=["x", "y"])
            places.insert(0, "image", str(path))
            places[[f"attention_{name}" for name in settings.names]] = overlay.marks
            parts.append(places)
        image = mammo.read_mammogram(path, config.polarity)
        image = one_scale.resample(image, 1 / one_scale.source_px(tiles.images)[0])
        draw_prediction(image, tiles, overlay, settings.top_tiles, folder / row["picture"])
    table = pd.DataFrame(rows)
    if "picture" not in table:
        raise MammoError("none of the images could be used; the notes above say why")
    for earlier in folder.glob("map_*.png"):
        if earlier.name not in set(table["picture"]):
            earlier.unlink()
    files.write_atomic(folder / "predictions.csv", table.to_csv(index=False))
    print(f"{table['picture'].notna().sum()} of {len(table)} images")
    if parts:
        files.write_atomic(folder / "attention.csv", pd.concat(parts).to_csv(index=False))
    print(f"open      {folder}: predictions.csv {'attention.csv ' * bool(parts)}map_*.png")
    return table


def embed(settings: Settings) -> np.ndarray:
    """Features of a split's tiles as embeddings.npy (N, D) float32 and embeddings.csv, and their map."""
    engine = open_engine(settings)
    data = load_labelled(settings, engine.config)
    ids = data.in_split(settings.split)
    if len(ids) < 3:
        raise MammoError(f"--split {settings.split}: {len(ids)} tiles, a map needs 3")
    features = engine.features(data.tiles, ids)
    folder = settings.folder("embed")
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(folder / "embeddings.npy") as temporary:
        np.save(temporary, features)
    points, title = flat_map(features, settings.seed)
    table = data.table.iloc[ids].drop(columns=INNER).reset_index(drop=True)
    table[data.names], table[["map_x", "map_y"]] = data.targets[ids], points
    files.write_atomic(folder / "embeddings.csv", table.to_csv(index=False))
    draw_embedding(points, data, ids, title, folder / "embeddings.png")
    print(f"open      {folder}: embeddings.npy embeddings.csv embeddings.png ({title})")
    return features


def flat_map(features: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """2-D map (N, 2) of features and its name: UMAP where it is installed, else the first components."""
    from sklearn.decomposition import PCA

    try:
        import umap
    except ImportError:
        return PCA(2, random_state=seed % 2**32).fit_transform(features), "PCA"
    return umap.UMAP(random_state=seed % 2**32).fit_transform(features), "UMAP"


# ---- 8 Entry ---------------------------------------------------------------------------------------


def dry_run(command: str, operands: Sequence[str], settings: Settings) -> None:
    """Say what a command would read, extract and write; writes nothing, downloads nothing."""
    starts = [*operands, *settings.encoders] if command == "compare" else [settings.weights]
    configs = {}
    for start in starts:
        if command == "compare" and encoders.is_foreign(start):
            print(f"weights   {start}: {encoders.whose(start)}")
            continue
        opened = dataclasses.replace(settings, weights=start)
        if command in ("evaluate", "predict"):
            engine, settings = open_classifier(opened)
            if command == "evaluate":
                judged = ",".join(judged_findings(opened, settings.names))
                settings = dataclasses.replace(settings, findings=judged)
            configs[start] = engine.config
        elif start in UNTRAINED:
            own = mammo.Config(backbone=settings.backbone or mammo.BACKBONE)
            configs[start] = tile_config(settings, own)
        else:
            configs[start] = start_model(opened)[1]
        print(f"weights   {start}: {configs[start].backbone}")
    if command == "predict":
        print_images(operands)
    else:
        known = [configs[start] for start in configs if start not in UNTRAINED]
        config = next(iter(known or configs.values()), tile_config(settings, mammo.Config()))
        print_labels(*match_sources(settings, config), settings)
        mammo.foresee_cache(config)
    folder = settings.folder(command)
    print(f"results   {folder} {'is there already' if folder.exists() else 'is new'}")
    print("Nothing was written (--dry_run).")


def print_images(operands: Sequence[str]) -> None:
    """Say how many images predict would read, and which are not there."""
    found = [images.find_images(name) if Path(name).is_dir() else [Path(name)] for name in operands]
    paths = [path for part in found for path in part]
    missing = [str(path) for path in paths if not path.is_file()]
    there = f", {len(missing)} of them not there, first {missing[0]}" if missing else ""
    print(f"images    {len(paths):,}{there}")


def print_labels(labels: pd.DataFrame, found: np.ndarray, settings: Settings) -> None:
    """Say per split how many images there are with each finding, without, and not known."""
    matched = labels.loc[np.unique(found[found >= 0])]
    for split, rows in matched.groupby(matched["split"].replace("", "training")):
        print(f"labels    {split}: {len(rows):,} images of {rows['patient'].nunique():,} patients")
        for name in settings.names:
            if name in labelling.GRADES:
                counts = rows[name].value_counts().sort_index()
                told = ", ".join(f"{grading.grade_word(name, g)} {n:,}" for g, n in counts.items())
                print(f"          {name}: {told}, {rows[name].isna().sum():,} unknown")
                continue
            with_it, without = (int((rows[name] == value).sum()) for value in (1, 0))
            boxed = sum(any(name in box["finding"] for box in boxes) for boxes in rows["boxes"])
            unknown = len(rows) - with_it - without
            told = f"{with_it:,} with ({boxed:,} of them with boxes), {without:,} without"
            print(f"          {name}: {told}, {unknown:,} unknown")


def update_report(settings: Settings) -> None:
    """Where results lie in the folder of a pre-training run, show them in its report.html too."""
    if (Path(settings.output_dir) / "summary.json").is_file():
        try:
            print(f"report    {report.write_report(Path(settings.output_dir), mammo.terms())}")
        except MammoError as error:  # the results are written: a damaged run doesn't spoil them
            print(f"note: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (see mammo.exit_code)."""

    def job() -> None:
        command, operands, settings = parse_args(argv)
        if settings.dry_run:
            dry_run(command, operands, settings)
            return
        if command == "compare":
            compare(settings, operands)
        elif command == "predict":
            predict(settings, operands)
        else:
            {"train": train, "evaluate": evaluate, "embed": embed}[command](settings)
        update_report(settings)

    return exit_code(job, "lower --batch_size or --view_size")


if __name__ == "__main__":
    sys.exit(main())
