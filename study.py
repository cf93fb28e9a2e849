"""Recipes of pre-training against each other, by what their frozen features tell of real lesions.

    python study.py --data_dir split_images --arms plain,default --seeds 0,1,2 --steps 600
    python study.py --data_dir split_images --questions mass,calcification,cancer@mass,density

Each arm is a line of --arms_file: its name and flags of train_byol_mammo.py, which trains it from every
seed on DATA_DIR/training. A frozen probe then answers the questions at several points of the run, on the
same tiles, with the same patients held back for all arms: fitted on the split training, judged on test.
Beside them stand the start of the same seed, classic filters (convergence of gradients and blobs, which
learn nothing) and, where --imagenet names its weights, an ImageNet network. Weights that saw no
mammogram are judged with their own statistics of batch norm and with those of the tiles, and the better
counts (`norm` of nuisance.csv).

A question is a column of labels.csv (does the tile hold it?), `cancer@mass` (which of the tiles with a
mass are of an image with cancer?), `density` (rank correlation with the breast's density, per image), or
`specks` (which tiles of the images of --specks_dir has a cluster of specks been drawn into?).

Writes to OUTPUT_DIR
    study.csv      arm, seed, step, finding, auroc, low, high, gain_over_start, gain_low, gain_high,
                   n_positive, n_patients; of density `auroc` is (1 + rank correlation) / 2
    pairs.csv      arm against arm: difference of the figures, mean over the seeds of both
    nuisance.csv   how well the same features tell what should not matter, and their RankMe
    study.md, study.png, report.html
    <arm>.seed<N>/ the runs; the same command goes on where it was stopped

Intervals are of 95 %, over patients; a gain is paired: the same patients drawn for both.

Contents
    1 Settings     flags, arms
    2 Runs         train_byol_mammo.py for each arm and seed
    3 Questions    tiles and targets of each
    4 Judging      features, probes, intervals
    5 Results      tables, curves, page
    6 Entry        main
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch

import train_byol_mammo as mammo
import train_classifier as classifier
from byol_mammo import (
    checkpoints,
    files,
    images,
    labels as labelling,
    one_scale,
    sampling,
    settings as flags,
    shortcuts,
    statistics,
    tables,
    tracking,
)
from byol_mammo.objectives import rankme
from byol_mammo.settings import MammoError

# ---- 1 Settings ------------------------------------------------------------------------------------
# Each constant is a field of Settings and a flag of the same lower-case name; its comment is the help.

DATA_DIR = "./split_images"  # folder written by prepare_dataset.py, with training and test
LABELS = ""  # labels.csv; empty = the one in DATA_DIR
OUTPUT_DIR = "./study"  # runs and results
CACHE_DIR = "./cache"  # pixel cache
ARMS_FILE = str(Path(__file__).with_name("study_arms.txt"))  # NAME: flags, one arm a line
ARMS = "plain,default"  # arms to run, of ARMS_FILE
SEEDS = "0,1,2"  # seeds of weights, views and order, each for every arm
STEPS = 600  # steps of each run
EQUAL = "steps"  # steps or time; time = every arm gets as many steps as last as long as the first arm's
POINTS = 3  # points of each run at which its features are judged
QUESTIONS = "mass"  # columns of labels.csv, cancer@mass, density, specks
SPECKS_DIR = ""  # folder of mammograms at full resolution, to draw specks on
IMAGENET = ""  # file of ImageNet weights of BACKBONE, judged, and for --weights imagenet of arms
IMAGENET_BACKBONE = ""  # network that IMAGENET is of; empty = BACKBONE
TILE_SIZE = 128  # px, side of a tile
TILE_STRIDE = 64  # px between tiles
VIEW_SIZE = 64  # px, side of a view
PIXEL_SPACING_MM = 0.27  # mm per pixel where the manifest gives no spacing
TARGET_SPACING_MM = 0.0  # mm per pixel that every image is brought to; 0 = off
MIN_BREAST_RATIO = 0.6  # share of a tile that must be breast
MIN_FREQ_ENERGY = 0.0  # speck energy a tile must reach to be trained on; all tissue is judged
BACKBONE = "resnet18_slim"  # any backbone of train_byol_mammo.py
BATCH_SIZE = 128  # tiles per step
BOOTSTRAP = 1000  # resamples of the patients
NUM_WORKERS = 16  # extraction processes; never more than the cores there are
DEVICE = "auto"  # auto, cpu, cuda or cuda:N

REFERENCES = ("random", "classic", "imagenet")  # beside the arms
HELD = 0.5  # share of a box that a tile has to hold to be positive; less is left out
MOST_JUDGED = 1800  # tiles of each class that a probe is fitted on, or judged on
PER_BOX = 2  # tiles on each box beside those of the grid
OFF_CENTRE = 0.19  # tile sizes, along an axis, of such a tile's centre from its box's at most
EPOCH_STEPS = 20  # most steps of an epoch
# What all arms have in common, as settings of the main script and of train_classifier.py.
SAME = "tile_size tile_stride view_size pixel_spacing_mm target_spacing_mm min_breast_ratio "
SAME += "min_freq_energy backbone batch_size cache_dir num_workers device"


@dataclass(frozen=True)
class Settings:
    """All settings; defaults are the constants above, flags have the fields' names."""

    data_dir: str = DATA_DIR
    labels: str = LABELS
    output_dir: str = OUTPUT_DIR
    cache_dir: str = CACHE_DIR
    arms_file: str = ARMS_FILE
    arms: str = ARMS
    seeds: str = SEEDS
    steps: int = STEPS
    equal: str = EQUAL
    points: int = POINTS
    questions: str = QUESTIONS
    specks_dir: str = SPECKS_DIR
    imagenet: str = IMAGENET
    imagenet_backbone: str = IMAGENET_BACKBONE
    tile_size: int = TILE_SIZE
    tile_stride: int = TILE_STRIDE
    view_size: int = VIEW_SIZE
    pixel_spacing_mm: float = PIXEL_SPACING_MM
    target_spacing_mm: float = TARGET_SPACING_MM
    min_breast_ratio: float = MIN_BREAST_RATIO
    min_freq_energy: float = MIN_FREQ_ENERGY
    backbone: str = BACKBONE
    batch_size: int = BATCH_SIZE
    bootstrap: int = BOOTSTRAP
    num_workers: int = NUM_WORKERS
    device: str = DEVICE

    def __post_init__(self) -> None:
        flags.check_settings(self, {"equal": ("steps", "time")}, {})
        if self.points < 1 or self.steps % self.points:
            raise MammoError(f"--steps {self.steps}: must be a multiple of --points {self.points}")
        if not all(seed.isdigit() for seed in self.seeds.split(",")):
            raise MammoError(f"--seeds {self.seeds!r}: numbers separated by commas")
        known = read_arms(self.arms_file)
        for name in self.arms.split(","):
            if name not in known:
                near = flags.nearest(name, known) or ", ".join(known)
                raise MammoError(f"--arms {name}: not in {self.arms_file}; nearest: {near}")

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch of the runs: few, since an epoch draws no tile twice."""
        between = self.steps // self.points
        return max(n for n in range(1, min(between, EPOCH_STEPS) + 1) if between % n == 0)

    @property
    def labels_path(self) -> str:
        """The labels.csv in use."""
        return self.labels or str(Path(self.data_dir) / "labels.csv")


def read_arms(path: str) -> dict[str, list[str]]:
    """Arms by name: the words of their flags. Raises MammoError with the line that is wrong."""
    if not Path(path).is_file():
        raise MammoError(f"--arms_file {path}: no such file")
    arms: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, colon, words = text.partition(":")
        taken = {*arms, *REFERENCES}  # what all arms are set beside has names too
        if not colon or not name.strip().replace("_", "").isalnum() or name.strip() in taken:
            raise MammoError(f"{path} line {number}: not NAME: FLAGS with a new name: {text[:80]!r}")
        arms[name.strip()] = shlex.split(words)
    return arms


# ---- 2 Runs ----------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Weights to judge: of an arm and seed after some steps, and the arm and seed they started from."""

    arm: str
    seed: int
    step: int
    weights: str
    start: tuple[str, int]


def train_arm(settings: Settings, arm: str, words: Sequence[str], seed: int) -> list[Point]:
    """Train an arm from a seed, or go on where that was stopped; the points at which it is judged."""
    folder = Path(settings.output_dir) / f"{arm}.seed{seed}"
    epochs = settings.steps // settings.epoch_steps // settings.points  # from point to point
    start = ("random", seed)
    if settings.imagenet:
        words = [settings.imagenet if word == "imagenet" else word for word in words]
        start = ("imagenet", 0) if settings.imagenet in words else start
    points = [
        Point(
            arm,
            seed,
            settings.steps // settings.points * number,
            str(folder / f"mammogram_byol_epoch{epochs * number}.pth"),
            start,
        )
        for number in range(1, settings.points + 1)
    ]
    run = ["--run_name", folder.name, "--seed", str(seed)]
    command = [*common_flags(settings, epochs), *run, *words]
    if not all(Path(point.weights).is_file() for point in points) and (code := run_script(command)):
        line = shlex.join(command)
        raise MammoError(f"arm {arm}, seed {seed}: train_byol_mammo.py {line} ended with {code}")
    for point in points:
        check_point(point, mammo.parse_args(command), settings)
    return points


def check_point(point: Point, config: mammo.Config, settings: Settings) -> None:
    """Raise MammoError where a point's weights are of another recipe, or of other steps."""
    state = checkpoints.load_checkpoint(point.weights)
    recorded = checkpoints.recorded_config(state)
    config = dataclasses.replace(config, input_dim=recorded["input_dim"])
    if changed := flags.changed_flags(config, recorded, mammo.FREE_ON_RESUME):
        raise MammoError(
            f"{point.weights} is of another recipe: {'; '.join(changed)}. Give the arm another name, or "
            "another --output_dir"
        )
    if state["step"] != point.step:
        fitting = config.batch_size * state["step"] // point.step
        raise MammoError(
            f"{point.weights} is of step {state['step']}, not {point.step}: there are too few tiles for "
            f"{settings.epoch_steps} batches of {config.batch_size}; --batch_size {fitting} may do"
        )


def steps_of_arms(settings: Settings, arms: dict[str, list[str]]) -> dict[str, int]:
    """Steps of each arm. By equal time they are timed first, one epoch each, on an idle machine."""
    names = settings.arms.split(",")
    if settings.equal == "steps":
        return dict.fromkeys(names, settings.steps)
    unit = settings.points * settings.epoch_steps
    trial = dataclasses.replace(settings, steps=2 * settings.epoch_steps, points=1)
    speeds = {}
    for name in names:
        (point,) = train_arm(trial, f"{name}.timed", arms[name], 0)
        table = pd.read_csv(Path(point.weights).with_name("metrics.csv"))
        speeds[name] = table["batches_per_s"].dropna().iloc[-1]
    return {
        name: unit * max(1, round(settings.steps * speed / speeds[names[0]] / unit))
        for name, speed in speeds.items()
    }


def run_script(words: Sequence[str]) -> int:
    """train_byol_mammo.py in a process of its own; its exit code."""
    return subprocess.run([sys.executable, str(Path(mammo.__file__)), *words], check=False).returncode


def shared(settings: Settings) -> dict[str, Any]:
    """The settings of SAME by name; at one scale without a pixel spacing that nobody stated."""
    same = {name: getattr(settings, name) for name in SAME.split()}
    if settings.target_spacing_mm and settings.pixel_spacing_mm == PIXEL_SPACING_MM:
        del same["pixel_spacing_mm"]
    elif settings.target_spacing_mm:
        same["pixel_spacing_mm"] = one_scale.stated(same["pixel_spacing_mm"], mammo.PIXEL_SPACING_MM)
    return same


def common_flags(settings: Settings, epochs: int) -> list[str]:
    """What all arms are trained with: the same tiles, steps, and `epochs` from point to point."""
    total = epochs * settings.points
    values = shared(settings) | {
        "data_dir": Path(settings.data_dir) / "training",
        "output_dir": settings.output_dir,
        "epochs": total,
        "tiles_per_epoch": settings.epoch_steps * settings.batch_size,
        "warmup_epochs": max(1, total // 10),
        "checkpoint_every": epochs,
        "report_every": 0,
        "wandb_mode": "disabled",
        "weights": "none",
        "precision": "fp32",
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# ---- 3 Questions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Tiles to answer it on, in two parts, and the truth."""

    name: str
    fit: np.ndarray  # ids of tiles of the split training
    judged: np.ndarray  # ids of tiles of the split test
    truth: np.ndarray  # (tiles,) of all tiles: 1, 0 or a grade; NaN where it is not known
    data: classifier.LabelledTiles
    graded: bool = False  # density: rank correlation over images instead of AUROC over tiles

    @property
    def used(self) -> np.ndarray:
        """All tiles it needs."""
        return np.unique(np.concatenate([self.fit, self.judged]))


def load_questions(settings: Settings) -> list[Question]:
    """The questions, each with its tiles. Raises MammoError where one can't be asked."""
    asked = settings.questions.split(",")
    labelled = [name for name in asked if name != SPECKS]
    found = {question.name: question for question in ask_labels(settings, labelled)} if labelled else {}
    if SPECKS in asked:
        found[SPECKS] = ask_specks(settings)
    return [found[name] for name in asked]


def ask_labels(settings: Settings, asked: Sequence[str]) -> list[Question]:
    """Questions of the labelled tiles of the whole archive.

    Raises MammoError where a question's column is absent or a split lacks a class.
    """
    names = sorted({name for question in asked for name in columns_of(question)})
    judge = judge_settings(settings, names)
    data = classifier.load_labelled(judge, mammo_config(settings))
    labels = labelling.read_labels(judge.labels, data.names)
    names_of = Path(judge.labels).parent, data.tiles.images["image"], Path(judge.data_dir)
    rows = labelling.match_labels(labels, *names_of)
    data = with_tiles(data, tiles_on_boxes(data.tiles, labels["boxes"], rows))
    data.targets = labelling.tile_labels(
        data.tiles.table, rows, labels, data.tiles.tile_size, data.names, HELD, by_centre=False,
        scale=one_scale.source_px(data.tiles.images),
    )  # fmt: skip
    return [ask(data, name) for name in asked]


def tiles_on_boxes(
    tiles: mammo.MammogramTiles, boxes: Sequence[list[dict[str, Any]]], rows: np.ndarray
) -> pd.DataFrame:
    """PER_BOX tiles on each box, off its centre by up to OFF_CENTRE: image, x, y.

    A grid shows a finding where it happens to lie, often at a tile's side.
    """
    rng, size, found = np.random.default_rng(0), tiles.tile_size, []
    extents = tiles.images[["x0", "y0", "width", "height"]].to_numpy(int)
    scale = one_scale.source_px(tiles.images)
    for image, (row, (x0, y0, width, height)) in enumerate(zip(rows, extents, strict=True)):
        for box in boxes[row] if row >= 0 else ():
            middle = np.array([box["xmin"] + box["xmax"], box["ymin"] + box["ymax"]]) / 2 / scale[image]
            places = middle - size / 2 + rng.uniform(-1, 1, (PER_BOX, 2)) * OFF_CENTRE * size
            most = np.maximum((x0, y0), (x0 + width - size, y0 + height - size))
            found += [(image, *place) for place in places.astype(int).clip((x0, y0), most).tolist()]
    return pd.DataFrame(found, columns=["image", "x", "y"])


def with_tiles(data: classifier.LabelledTiles, more: pd.DataFrame) -> classifier.LabelledTiles:
    """The labelled tiles and `more` of the same images, whose targets are to be set."""
    tiles = data.tiles
    table = pd.concat([tiles.table, more], ignore_index=True)
    pixels = tiles.pixels.cpu().numpy()
    pixels = pixels.view(np.uint16) if pixels.dtype == np.int16 else pixels
    added = mammo.MammogramTiles(
        pixels, tiles.images, table, tiles.tile_size, tiles.reduce, tiles.grey_scale, tiles.cache
    )
    known = data.table.groupby("row").first()
    x, y = one_scale.source_corners(tiles.images, more).T
    own = known.loc[more["image"]].reset_index().assign(x=x, y=y)
    return dataclasses.replace(
        data, tiles=added, table=pd.concat([data.table, own[data.table.columns]], ignore_index=True)
    )


def columns_of(question: str) -> list[str]:
    """The columns of labels.csv that a question needs as findings."""
    return [] if question == "density" else question.split("@")


def judge_settings(settings: Settings, names: Sequence[str], **other: Any) -> classifier.Settings:
    """Settings of train_classifier.py for the same tiles."""
    same = {name: value for name, value in shared(settings).items() if name != "min_breast_ratio"}
    return classifier.Settings(
        data_dir=settings.data_dir,
        labels=settings.labels_path,
        output_dir=settings.output_dir,
        findings=",".join(names) or "mass",
        bootstrap=settings.bootstrap,
        wandb_mode="disabled",
        **(same | other),
    )


def mammo_config(settings: Settings) -> mammo.Config:
    """The main script's Config for the judged tiles: all tissue, dark tiles as well, whatever tiles the
    arms are trained on."""
    same = shared(settings) | {"min_freq_energy": 0.0}
    dark = {"min_tile_intensity": 0, "min_non_zero_pixels": 0}
    return mammo.Config(data_dir=settings.data_dir, wandb_mode="disabled", **(same | dark))


DENSITIES = {f"DENSITY {letter}": grade for grade, letter in enumerate("ABCD", 1)}
RIDGE_FOLDS = 5  # of patients, to choose the strength of density's probe


def ask(data: classifier.LabelledTiles, name: str) -> Question:
    """One question: the tiles whose truth is known, of each split (see balanced)."""
    if name == "density":
        truth = data.table["breast_density"].map(tables.density).map(DENSITIES).to_numpy(np.float32)
    else:
        finding, _, among = name.partition("@")
        truth = data.targets[:, data.names.index(finding)]
        if among:  # what is true of the image, on the tiles that hold the other finding
            row = data.table["row"].to_numpy()
            truth = data.image_targets[row, data.names.index(finding)].copy()
            truth[data.targets[:, data.names.index(among)] != 1] = np.nan
    parts = []
    for number, split in enumerate(("training", "test")):
        ids = data.in_split(split)
        ids = ids[np.isfinite(truth[ids])]
        if len(set(truth[ids].tolist())) < 2:
            raise MammoError(f"--questions {name}: the split {split} has tiles of one kind alone")
        if name == "density" and len(set(data.groups[ids])) < 2:
            raise MammoError(
                f"--questions {name}: the split {split} has one patient alone; it needs two"
            )
        rng = np.random.default_rng([0, number])
        parts.append(spread(data, ids, rng) if name == "density" else balanced(truth, ids, rng))
    fit, judged = parts
    return Question(name, fit, judged, truth, data, name == "density")


def balanced(truth: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of the tiles `ids` all of the rarer class, up to MOST_JUDGED, and as many of the other, sorted."""
    classes = [rng.permutation(ids[truth[ids] == value]) for value in (0, 1)]
    count = min(*map(len, classes), MOST_JUDGED)
    return np.sort(np.concatenate([part[:count] for part in classes]))


def spread(data: classifier.LabelledTiles, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Up to 2 * MOST_JUDGED of the tiles `ids`, as many of each image as of any other, sorted."""
    order = sampling.spread_over_images(data.table["row"].to_numpy()[ids], rng)
    return np.sort(ids[order[: 2 * MOST_JUDGED]])


SPECKS = "specks"
SPECK_WIDTHS = (0.2, 0.6)  # mm, full width at half the height: of what is called micro-calcification
SPECK_PEAKS = (8.0, 16.0)  # local deviations of the tissue at that scale: clear to a reader's eye
SPECK_TILES = 40  # of an image, half of them with a cluster


def ask_specks(settings: Settings) -> Question:
    """Clusters drawn into every other tile of real tissue, of VIEW_SIZE px at the images' own spacing.

    What is real in the tissue is in both halves. Images of one half of the patients are fitted on.
    """
    if not settings.specks_dir:
        raise MammoError(f"--questions {SPECKS}: needs --specks_dir, a folder of mammograms")
    sources = images.list_sources(settings.specks_dir)
    rng, side = np.random.default_rng(0), settings.view_size or settings.tile_size
    crops: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for index, source in sources.reset_index(drop=True).iterrows():
        image = mammo.read_mammogram(source["path"])
        mask = mammo.segment_breast_tissue(image)
        spacing = source["spacing_mm"] if source["spacing_mm"] > 0 else mammo.PIXEL_SPACING_MM
        window = mammo.intensity_window(image, mask) if mask.any() else (0, 1)
        for number, (y, x) in enumerate(tissue_places(mask, side, rng)):
            crop = image[y : y + side, x : x + side].astype(np.float32)
            crops.append(draw_specks(crop, rng, spacing) if number % 2 else crop)
            woman = source["study_id"] or source["image"]
            rows.append({"patient": woman, "truth": number % 2, "row": index, "window": window})
    table = pd.DataFrame(rows)
    patients = rng.permutation(table["patient"].unique())
    data = specks_data(np.clip(np.stack(crops), 0, 65535).astype(np.uint16), table)
    fitted = table["patient"].isin(patients[::2]).to_numpy()
    parts = np.flatnonzero(fitted), np.flatnonzero(~fitted)
    return Question(SPECKS, *parts, table["truth"].to_numpy(np.float32), data)


def tissue_places(mask: np.ndarray, side: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top left corners (y, x) of up to SPECK_TILES squares of `side` px in the breast mask."""
    corners = [
        (y, x)
        for y in range(0, mask.shape[0] - side + 1, side)
        for x in range(0, mask.shape[1] - side + 1, side)
        if mask[y : y + side, x : x + side].mean() >= 0.95
    ]
    return [corners[index] for index in rng.permutation(len(corners))[:SPECK_TILES]]


def draw_specks(tile: np.ndarray, rng: np.random.Generator, spacing: float) -> np.ndarray:
    """A tile (S, S) float32 with a cluster of 5 to 20 Gaussian specks."""
    out, side = tile.copy(), len(tile)
    band = cv2.GaussianBlur(tile, (0, 0), 1.2) - cv2.GaussianBlur(tile, (0, 0), 4)
    y, x = np.mgrid[:side, :side]
    centre = rng.uniform(0.3 * side, 0.7 * side, 2)
    for _ in range(rng.integers(5, 21)):
        place = centre + rng.normal(0, side / 10, 2)
        sigma = rng.uniform(*SPECK_WIDTHS) / spacing / 2.355
        top, left = (max(0, int(at) - 32) for at in place)
        spread = band[top : top + 64, left : left + 64].std()
        distance = (y - place[0]) ** 2 + (x - place[1]) ** 2
        out += rng.uniform(*SPECK_PEAKS) * spread * np.exp(-distance / (2 * sigma**2))
    return out


def specks_data(crops: np.ndarray, table: pd.DataFrame) -> classifier.LabelledTiles:
    """Crops (N, S, S) uint16 as tiles, each an image of its own; `table`: patient, row, window."""
    count, side = crops.shape[:2]
    low, high = np.array(table["window"].tolist(), np.float32).T
    places = {"offset": np.arange(count) * side**2, "height": side, "width": side, "x0": 0, "y0": 0}
    index = pd.DataFrame({**places, "low": low, "high": high})
    tiles = mammo.MammogramTiles(
        crops.reshape(-1), index, pd.DataFrame({"image": np.arange(count), "x": 0, "y": 0}), side
    )
    targets = np.zeros((count, 0), np.float32)
    return classifier.LabelledTiles(tiles, [], targets, table, targets, pd.DataFrame())


# ---- 4 Judging -------------------------------------------------------------------------------------

# Tiles, and ids of some of them (N,) -> features (N, D).
Features = Callable[[mammo.MammogramTiles, np.ndarray], np.ndarray]


def features_of(settings: Settings, weights: str, seed: int, calibrated: bool) -> Features:
    """What a frozen network tells of tiles; `calibrated`: batch norm's statistics come from them."""
    judge = judge_settings(settings, [], weights=weights, seed=seed)
    if weights == settings.imagenet:
        judge = dataclasses.replace(judge, backbone=settings.imagenet_backbone or settings.backbone)
    elif weights.endswith(".pth"):
        judge = dataclasses.replace(judge, backbone="")

    def call(tiles: mammo.MammogramTiles, ids: np.ndarray) -> np.ndarray:
        engine = classifier.open_engine(judge)
        engine.config = data_config(engine.config, settings)
        if calibrated:
            engine.calibrate(tiles, np.random.default_rng([seed, 10]).permutation(ids)[:1024])
        return engine.features(tiles, ids)

    return call


def data_config(config: mammo.Config, settings: Settings) -> mammo.Config:
    """A network's Config with the study's tiles."""
    same = {name: getattr(settings, name) for name in ("tile_size", "tile_stride", "view_size")}
    return dataclasses.replace(config, **same)


def classic_features(settings: Settings) -> Features:
    """Convergence, blobs and specks of each tile, as in compare; nothing learns."""
    config = mammo_config(settings)
    return lambda tiles, ids: classifier.classic_engine(tiles, config).features(tiles, ids)


def answer(question: Question, features: np.ndarray, settings: Settings) -> np.ndarray:
    """Scores (judged,) of a linear probe fitted on the question's first part.

    Its strength is chosen by patients inside that part: those who judge are not seen.
    """
    rows, judged = (np.searchsorted(question.used, ids) for ids in (question.fit, question.judged))
    groups, truth = question.data.groups[question.fit], question.truth[question.fit]
    if question.graded:
        return fit_ridge(features[rows], truth, groups).predict(features[judged])
    judge = judge_settings(settings, [question.name.partition("@")[0]])
    weights, biases, _ = classifier.fit_probe(features[rows], truth[:, None], groups, judge)
    return features[judged] @ weights[0] + biases[0]


def fit_ridge(features: np.ndarray, truth: np.ndarray, groups: np.ndarray) -> Any:
    """A ridge regression of `truth` (N,) whose strength does best on patients `groups` (N,) left out:
    tiles of one image, of which some were left out, would tell each other."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = GroupKFold(min(RIDGE_FOLDS, len(set(groups))))
    choices = {"ridge__alpha": np.logspace(0, 5, 6)}
    model = make_pipeline(StandardScaler(), Ridge())
    search = GridSearchCV(model, choices, scoring="neg_mean_squared_error", cv=folds)
    return search.fit(features, truth, groups=groups)


def draws_of(question: Question, scores: np.ndarray, settings: Settings) -> np.ndarray:
    """(1 + BOOTSTRAP,) AUROC of the scores, first of all patients, then of patients drawn anew; the
    same draws for all scores of a question."""
    ids, truth, data = question.judged, question.truth[question.judged], question.data
    groups = data.groups[ids]
    if not question.graded:
        weights = statistics.resample_groups(groups, settings.bootstrap, 0)
        return statistics.weighted_auroc(scores, truth, weights)
    row = data.table["row"].to_numpy()[ids]
    table = pd.DataFrame({"row": row, "score": scores, "truth": truth, "group": groups}).groupby("row")
    weights = statistics.resample_groups(table["group"].first().to_numpy(str), settings.bootstrap, 0)
    ranks = pd.concat([table["score"].mean(), table["truth"].first()], axis=1).rank().to_numpy()
    return (1 + weighted_correlation(ranks[:, 0], ranks[:, 1], weights)) / 2


def weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation (R,) of x and y (N,) under each row of weights (R, N); NaN where one of them
    does not vary."""
    weights = weights / weights.sum(1, keepdims=True)
    x, y = x - (weights @ x)[:, None], y - (weights @ y)[:, None]
    covariance = (weights * x * y).sum(1)
    with np.errstate(invalid="ignore"):
        return covariance / np.sqrt((weights * x**2).sum(1) * (weights * y**2).sum(1))


def nuisances(features: np.ndarray, ids: np.ndarray, data: classifier.LabelledTiles) -> dict[str, float]:
    """R^2 (out of fold, patients whole) with which features tell the share of air and the brightness of
    tiles `ids`, and the centred RankMe of up to 2,048 of them."""
    parts = np.array_split(ids, max(1, len(ids) // 64))
    views = [mammo.make_view(data.tiles, part, mammo.PLAIN_VIEW, 32).sharp for part in parts]
    told = shortcuts.told_nuisances(features, torch.cat(views), data.groups[ids])
    return told | {"rankme": float(rankme(torch.from_numpy(features[:2048])))}


# ---- 5 Results -------------------------------------------------------------------------------------


def row_of(question: Question, point: Point, draws: np.ndarray, start: np.ndarray) -> dict[str, Any]:
    """One row of study.csv: a figure with its interval, and the gain over what it started from."""
    low, high = statistics.interval(draws[1:])
    gain = draws - start
    gain_low, gain_high = statistics.interval(gain[1:])
    truth = question.truth[question.judged]
    return {
        "arm": point.arm,
        "seed": point.seed,
        "step": point.step,
        "finding": question.name,
        "auroc": draws[0],
        "low": low,
        "high": high,
        "gain_over_start": gain[0],
        "gain_low": gain_low,
        "gain_high": gain_high,
        "n_positive": int((truth == 1).sum()) if not question.graded else len(truth),
        "n_patients": len(set(question.data.groups[question.judged])),
    }


Draws = dict[str, np.ndarray]  # by question: a figure of all patients, then of patients drawn anew


def judge_point(
    settings: Settings, point: Point, questions: Sequence[Question]
) -> tuple[Draws, dict[str, Any]]:
    """The figures of a point, and its row of nuisance.csv.

    Of weights that saw no mammogram the better of two: with their own statistics of batch norm, and with
    those of the tiles.
    """
    untrained = point.arm in ("random", "imagenet")
    found = []
    for norm in ("own", "tiles") if untrained else ("own",):
        if point.arm == "classic":
            tell = classic_features(settings)
        else:
            tell = features_of(settings, point.weights, point.seed, norm == "tiles")
        draws: Draws = {}
        side: dict[str, float] = {}
        for data in {id(question.data): question.data for question in questions}.values():
            asked = [question for question in questions if question.data is data]
            used = np.unique(np.concatenate([question.used for question in asked]))
            features = tell(data.tiles, used)
            side = side or nuisances(features, used, data)
            for question in asked:
                own = features[np.searchsorted(used, question.used)]
                draws[question.name] = draws_of(question, answer(question, own, settings), settings)
        found.append((draws, {**point._asdict(), **side, "norm": norm}))
    return max(found, key=lambda pair: float(np.mean([draws[0] for draws in pair[0].values()])))


def judge_all(
    settings: Settings, points: list[Point]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """study.csv, nuisance.csv and pairs.csv: every point, each start, and what learns nothing."""
    questions = load_questions(settings)
    seeds = sorted({point.seed for point in points})
    starts = [Point("random", seed, 0, "none", ("random", seed)) for seed in seeds]
    fixed = [Point("classic", 0, 0, "classic", ("random", seeds[0]))]  # no seed changes them
    if settings.imagenet:
        fixed.append(Point("imagenet", 0, 0, settings.imagenet, ("random", seeds[0])))
    rows, side, known = [], [], {}
    for point in tracking.progress([*starts, *fixed, *points], desc="judge", unit="point"):
        draws, nuisance = judge_point(settings, point, questions)
        known[point] = draws
        side.append(nuisance)
        (start,) = (known[p] for p in known if p.step == 0 and (p.arm, p.seed) == point.start)
        rows += [row_of(q, point, draws[q.name], start[q.name]) for q in questions]
    nuisance = pd.DataFrame(side).drop(columns=["weights", "start"])
    return pd.DataFrame(rows), nuisance, compare_arms(known)


def compare_arms(known: dict[Point, Draws]) -> pd.DataFrame:
    """pairs.csv: the last point of each arm against that of each other, mean over the seeds of each."""
    last = {arm: max(point.step for point in known if point.arm == arm) for arm in arms_of(known)}
    final = {
        arm: [draws for point, draws in known.items() if (point.arm, point.step) == (arm, step)]
        for arm, step in last.items()
    }
    rows = []
    for arm, against in itertools.permutations(final, 2):
        for finding in final[arm][0]:
            ours, theirs = (
                np.mean([draws[finding] for draws in final[name]], axis=0) for name in (arm, against)
            )
            low, high = statistics.interval((ours - theirs)[1:])
            rows.append(
                {
                    "finding": finding,
                    "arm": arm,
                    "against": against,
                    "seeds": len(final[arm]),
                    "difference": ours[0] - theirs[0],
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows)


def arms_of(points: Iterable[Point]) -> list[str]:
    """Arms in order."""
    return list(dict.fromkeys(point.arm for point in points))


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """The last point of each arm over its seeds: mean and range of its figure, and the paired gain."""
    rows = []
    for (finding, arm), part in table.groupby(["finding", "arm"], sort=False):
        last = part[part["step"] == part["step"].max()]
        rows.append(
            {
                "finding": finding,
                "arm": arm,
                "steps": int(last["step"].max()),
                "seeds": len(last),
                "auroc": f"{last['auroc'].mean():.3f}",
                "over seeds": f"{last['auroc'].min():.3f} to {last['auroc'].max():.3f}",
                "95 % over patients": f"{last['low'].mean():.3f} to {last['high'].mean():.3f}",
                "gain over start": f"{last['gain_over_start'].mean():+.3f}",
                "gain, 95 %": f"{last['gain_low'].mean():+.3f} to {last['gain_high'].mean():+.3f}",
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw_study(table: pd.DataFrame, path: Path, starts: dict[str, str]) -> None:
    """AUROC over steps, a panel per question: mean of the seeds and the interval's mean as a band; what
    does not learn as a line across. `starts`: the reference that each arm started from."""
    from matplotlib.figure import Figure

    from byol_mammo import pictures

    findings = list(dict.fromkeys(table["finding"]))
    figure = Figure(figsize=(5.2 * len(findings), 4), layout="constrained")
    panels = figure.subplots(1, len(findings), squeeze=False)[0]
    for axes, finding in zip(panels, findings, strict=True):
        part = table[table["finding"] == finding]
        for arm, rows in part.groupby("arm", sort=False):
            if arm in REFERENCES:
                style = {"random": ":", "classic": "--", "imagenet": "-."}[str(arm)]
                axes.axhline(rows["auroc"].mean(), color="0.4", linestyle=style, label=arm)
                continue
            start = part[part["arm"] == starts[str(arm)]]
            line = pd.concat([start, rows])[["step", "auroc", "low", "high"]].groupby("step").mean()
            axes.plot(line.index, line["auroc"], marker="o", label=arm)
            axes.fill_between(line.index, line["low"], line["high"], alpha=0.12)
        axes.set(xlabel="steps", ylabel="AUROC of a frozen probe", title=finding)
        axes.legend(fontsize=8)
    pictures.save_figure(figure, path)


def write_results(
    settings: Settings,
    table: pd.DataFrame,
    nuisance: pd.DataFrame,
    pairs: pd.DataFrame,
    starts: dict[str, str],
) -> None:
    """study.csv, nuisance.csv, pairs.csv, study.md, study.png and report.html."""
    folder = Path(settings.output_dir)
    files.write_atomic(folder / "study.csv", table.to_csv(index=False, float_format="%.4f"))
    files.write_atomic(folder / "nuisance.csv", nuisance.to_csv(index=False, float_format="%.4f"))
    files.write_atomic(folder / "pairs.csv", pairs.to_csv(index=False, float_format="%.4f"))
    summary, pairs = summarise(table), pairs[~pairs["arm"].isin(REFERENCES)].round(3)
    files.write_atomic(folder / "study.md", markdown(summary))
    draw_study(table, folder / "study.png", starts)
    side = nuisance.groupby("arm", sort=False).last().drop(columns=["seed"]).reset_index().round(3)
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>study</title>"
        "<style>body { font: 16px/1.4 system-ui, sans-serif; max-width: 1180px; margin: auto }"
        "td, th { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }"
        ".wide { overflow-x: auto } img { max-width: 100% }</style>"
        "<h1>What frozen features tell</h1><img src='study.png' alt='AUROC over steps'>"
        + files.html_table(summary.to_numpy().tolist(), list(summary.columns))
        + "<h2>Arm against arm</h2>"
        + files.html_table(pairs.to_numpy().tolist(), list(pairs.columns))
        + "<h2>What they tell that should not matter</h2>"
        + files.html_table(side.to_numpy().tolist(), list(side.columns))
        + "<p>Intervals are over patients of the split test, for these weights. Research use only.</p>\n"
    )
    files.write_atomic(folder / "report.html", page)
    print(summary.to_string(index=False))
    print(f"open      {folder / 'report.html'}")


# ---- 6 Entry ---------------------------------------------------------------------------------------


def run_study(settings: Settings) -> pd.DataFrame:
    """Train what is not trained yet, judge all, write the results. Raises MammoError."""
    load_questions(settings)  # what can't be asked is said before hours of training
    arms = read_arms(settings.arms_file)
    chosen = [(arm, int(seed)) for seed in settings.seeds.split(",") for arm in settings.arms.split(",")]
    points: list[Point] = []
    steps = steps_of_arms(settings, arms)
    for arm, seed in tracking.progress(chosen, desc="train", unit="run"):
        points += train_arm(dataclasses.replace(settings, steps=steps[arm]), arm, arms[arm], seed)
    table, nuisance, pairs = judge_all(settings, points)
    write_results(settings, table, nuisance, pairs, {point.arm: point.start[0] for point in points})
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""

    def job() -> None:
        parser = flags.make_parser(__doc__)
        values = flags.parse_fields(Settings, parser, flags.setting_help(__file__), argv)
        run_study(Settings(**one_scale.mark_stated(values, PIXEL_SPACING_MM, argv)))

    return flags.exit_code(job, "lower --batch_size")


if __name__ == "__main__":
    sys.exit(main())
