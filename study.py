"""Recipes of pre-training against each other, by what their frozen features tell of real lesions.

    python study.py --data_dir split_images --arms plain,default --seeds 0,1,2 --steps 600
    python study.py --data_dir split_images --questions mass,calcification,cancer@mass,density

Each arm is a line of --arms_file: its name and flags of train_byol_mammo.py, which trains it from every
seed on DATA_DIR/training. A frozen probe then answers the questions at several points of the run, on the
same tiles, with the same patients held back for all arms: fitted on the split training, judged on test.
Beside them stand the start of the same seed, classic filters (convergence of gradients and blobs, which
learn nothing) and, where --imagenet names its weights, an ImageNet network.

A question is a column of labels.csv (does the tile hold it?), `cancer@mass` (which of the tiles with a
mass are of an image with cancer?) or `density` (rank correlation with the breast's density, per image).

Writes to OUTPUT_DIR
    study.csv      arm, seed, step, finding, auroc, low, high, gain_over_start, gain_low, gain_high,
                   n_positive, n_patients; of density `auroc` is (1 + rank correlation) / 2
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
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

import train_byol_mammo as mammo
import train_classifier as classifier
from byol_mammo import files, labels as labelling, settings as flags, targets, tracking
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
POINTS = 3  # points of each run at which its features are judged
QUESTIONS = "mass"  # columns of labels.csv, cancer@mass, density
IMAGENET = ""  # file of ImageNet weights of BACKBONE to judge beside; empty = none
TILE_SIZE = 128  # px, side of a tile
TILE_STRIDE = 64  # px between tiles
VIEW_SIZE = 64  # px, side of a view
PIXEL_SPACING_MM = 0.27  # mm per pixel where the manifest gives no spacing
MIN_BREAST_RATIO = 0.6  # share of a tile that must be breast
MIN_FREQ_ENERGY = 0.0  # speck energy a tile must reach; 0 = every tissue tile is judged
BACKBONE = "resnet18_slim"  # any backbone of train_byol_mammo.py
BATCH_SIZE = 128  # tiles per step
BOOTSTRAP = 1000  # resamples of the patients
NUM_WORKERS = 16  # extraction processes; never more than the cores there are
DEVICE = "auto"  # auto, cpu, cuda or cuda:N

HELD = 0.5  # share of a box that a tile has to hold to be positive
EPOCH_STEPS = 20  # most steps of an epoch
# What all arms have in common, as settings of the main script and of train_classifier.py.
SAME = "tile_size tile_stride view_size pixel_spacing_mm min_breast_ratio min_freq_energy backbone "
SAME += "batch_size cache_dir num_workers device"


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
    points: int = POINTS
    questions: str = QUESTIONS
    imagenet: str = IMAGENET
    tile_size: int = TILE_SIZE
    tile_stride: int = TILE_STRIDE
    view_size: int = VIEW_SIZE
    pixel_spacing_mm: float = PIXEL_SPACING_MM
    min_breast_ratio: float = MIN_BREAST_RATIO
    min_freq_energy: float = MIN_FREQ_ENERGY
    backbone: str = BACKBONE
    batch_size: int = BATCH_SIZE
    bootstrap: int = BOOTSTRAP
    num_workers: int = NUM_WORKERS
    device: str = DEVICE

    def __post_init__(self) -> None:
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
        if not colon or not name.strip().replace("_", "").isalnum() or name.strip() in arms:
            raise MammoError(f"{path} line {number}: not NAME: FLAGS with a new name: {text[:80]!r}")
        arms[name.strip()] = shlex.split(words)
    return arms


# ---- 2 Runs ----------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Weights to judge: of an arm and seed after some steps."""

    arm: str
    seed: int
    step: int
    weights: str


def train_arm(settings: Settings, arm: str, words: Sequence[str], seed: int) -> list[Point]:
    """Train an arm from a seed, or go on where that was stopped; the points at which it is judged."""
    folder = Path(settings.output_dir) / f"{arm}.seed{seed}"
    epochs = settings.steps // settings.epoch_steps // settings.points  # from point to point
    points = [
        Point(
            arm,
            seed,
            settings.steps // settings.points * number,
            str(folder / f"mammogram_byol_epoch{epochs * number}.pth"),
        )
        for number in range(1, settings.points + 1)
    ]
    if not all(Path(point.weights).is_file() for point in points):
        run = ["--run_name", folder.name, "--seed", str(seed)]
        command = [*common_flags(settings, epochs), *run, *words]
        if code := run_script(command):
            line = shlex.join(command)
            raise MammoError(f"arm {arm}, seed {seed}: train_byol_mammo.py {line} ended with {code}")
    return points


def run_script(words: Sequence[str]) -> int:
    """train_byol_mammo.py in a process of its own; its exit code."""
    return subprocess.run([sys.executable, str(Path(mammo.__file__)), *words], check=False).returncode


def common_flags(settings: Settings, epochs: int) -> list[str]:
    """What all arms are trained with: the same tiles, steps, and `epochs` from point to point."""
    total = epochs * settings.points
    values = {name: getattr(settings, name) for name in SAME.split()} | {
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
    graded: bool = False  # density: rank correlation over images instead of AUROC over tiles

    @property
    def used(self) -> np.ndarray:
        """All tiles it needs."""
        return np.unique(np.concatenate([self.fit, self.judged]))


def load_questions(settings: Settings) -> tuple[classifier.LabelledTiles, list[Question]]:
    """The labelled tiles of the whole archive, and the questions that can be asked of them.

    Raises MammoError where a question's column is absent or a split lacks a class.
    """
    names = sorted({name for question in settings.questions.split(",") for name in columns_of(question)})
    judge = judge_settings(settings, names)
    data = classifier.load_labelled(judge, mammo_config(settings))
    data.targets = held_findings(data, judge)
    parts = [classifier.draw_tiles(data, data.in_split(split), judge) for split in ("training", "test")]
    return data, [ask(data, name, parts) for name in settings.questions.split(",")]


def held_findings(data: classifier.LabelledTiles, judge: classifier.Settings) -> np.ndarray:
    """Targets (N, findings) of tiles that hold half of a box: less of it is another question, whether a
    rim tells what it is of. Tiles that hold some of it are left out."""
    labels = labelling.read_labels(judge.labels, data.names)
    folder, images = Path(judge.labels).parent, data.tiles.images["image"]
    rows = labelling.match_labels(labels, folder, images, Path(judge.data_dir))
    return labelling.tile_labels(
        data.tiles.table, rows, labels, data.tiles.tile_size, data.names, HELD, by_centre=False
    )


def columns_of(question: str) -> list[str]:
    """The columns of labels.csv that a question needs as findings."""
    return [] if question == "density" else question.split("@")


def judge_settings(settings: Settings, names: Sequence[str], **other: Any) -> classifier.Settings:
    """Settings of train_classifier.py for the same tiles."""
    same = {name: getattr(settings, name) for name in SAME.split() if name != "min_breast_ratio"}
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
    """The main script's Config for the archive's tiles."""
    same = {name: getattr(settings, name) for name in SAME.split()}
    return mammo.Config(data_dir=settings.data_dir, wandb_mode="disabled", **same)


DENSITIES = {f"DENSITY {letter}": grade for grade, letter in enumerate("ABCD", 1)}


def ask(data: classifier.LabelledTiles, name: str, parts: list[np.ndarray]) -> Question:
    """One question on tiles (to fit on, to judge), without those whose truth is not known."""
    if name == "density":
        truth = data.table["breast_density"].map(DENSITIES).to_numpy(np.float32)
    else:
        finding, _, among = name.partition("@")
        truth = data.targets[:, data.names.index(finding)]
        if among:  # what is true of the image, on the tiles that hold the other finding
            row = data.table["row"].to_numpy()
            truth = data.image_targets[row, data.names.index(finding)].copy()
            truth[data.targets[:, data.names.index(among)] != 1] = np.nan
    fit, judged = (ids[np.isfinite(truth[ids])] for ids in parts)
    for split, ids in (("training", fit), ("test", judged)):
        if len(set(truth[ids].tolist())) < 2:
            raise MammoError(f"--questions {name}: the split {split} has tiles of one kind alone")
    return Question(name, fit, judged, truth, name == "density")


# ---- 4 Judging -------------------------------------------------------------------------------------

Features = Callable[[np.ndarray], np.ndarray]  # ids of tiles (N,) -> features (N, D)
REFERENCES = ("random", "classic", "imagenet")


def features_of(
    settings: Settings, data: classifier.LabelledTiles, weights: str, seed: int, calibrated: bool
) -> Features:
    """What a frozen network tells of tiles; `calibrated`: batch norm's statistics come from them."""
    judge = judge_settings(settings, data.names, weights=weights, seed=seed)
    if weights.endswith(".pth"):
        judge = dataclasses.replace(judge, backbone="")
    engine = classifier.open_engine(judge)
    engine.config = data_config(engine.config, settings)
    if calibrated:
        ids = np.random.default_rng([seed, 10]).permutation(data.in_split("training"))[:1024]
        engine.calibrate(data.tiles, ids)
    return lambda ids: engine.features(data.tiles, ids)


def data_config(config: mammo.Config, settings: Settings) -> mammo.Config:
    """A network's Config with the study's tiles."""
    same = {name: getattr(settings, name) for name in ("tile_size", "tile_stride", "view_size")}
    return dataclasses.replace(config, **same)


def classic_features(settings: Settings, data: classifier.LabelledTiles) -> Features:
    """Convergence and blobs of each tile, strongest and mean (targets.StructureMaps); nothing learns."""
    side = settings.view_size or settings.tile_size
    spacing = float(data.tiles.images["spacing_mm"].median())
    maps = targets.StructureMaps(side, spacing * settings.tile_size / side)

    def call(ids: np.ndarray) -> np.ndarray:
        out = []
        for part in np.array_split(ids, max(1, len(ids) // 64)):
            found = maps(mammo.make_view(data.tiles, part, mammo.PLAIN_VIEW, side).sharp)
            out.append(torch.cat([found.amax((2, 3)), found.mean((2, 3))], dim=1))
        return torch.cat(out).numpy()

    return call


def answer(
    question: Question, features: np.ndarray, data: classifier.LabelledTiles, settings: Settings
) -> np.ndarray:
    """Scores (judged,) of a linear probe fitted on the question's first part.

    Its strength is chosen by patients inside that part: those who judge are not seen.
    """
    rows, judged = (np.searchsorted(question.used, ids) for ids in (question.fit, question.judged))
    groups, truth = data.groups[question.fit], question.truth[question.fit]
    if question.graded:
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 6)))
        return model.fit(features[rows], truth).predict(features[judged])
    judge = judge_settings(settings, [question.name.partition("@")[0]])
    weights, biases = classifier.fit_probe(features[rows], truth[:, None], groups, judge)
    return features[judged] @ weights[0] + biases[0]


def draws_of(
    question: Question, scores: np.ndarray, data: classifier.LabelledTiles, settings: Settings
) -> np.ndarray:
    """(1 + BOOTSTRAP,) AUROC of the scores, first of all patients, then of patients drawn anew; the
    same draws for all scores of a question."""
    ids, truth = question.judged, question.truth[question.judged]
    groups = data.groups[ids]
    if not question.graded:
        weights = classifier.resample_groups(groups, settings.bootstrap, 0)
        return classifier.weighted_auroc(scores, truth, weights)
    images = pd.DataFrame({"row": data.table["row"].to_numpy()[ids], "score": scores, "truth": truth})
    images = (
        images.assign(group=groups)
        .groupby("row")
        .first()
        .join(images.groupby("row")["score"].mean().rename("mean"))
    )
    weights = classifier.resample_groups(images["group"].to_numpy(str), settings.bootstrap, 0)
    ranks = images[["mean", "truth"]].rank().to_numpy()
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
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = np.array_split(ids, max(1, len(ids) // 64))
    views = [mammo.make_view(data.tiles, part, mammo.PLAIN_VIEW, 32).sharp for part in parts]
    pixels = torch.cat(views).flatten(1)
    tissue = pixels > 0
    known = {
        "r2_air": 1 - tissue.float().mean(1),
        "r2_brightness": pixels.sum(1) / tissue.sum(1).clamp_min(1),
    }
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 6)))
    scores = {
        name: cross_val_score(model, features, value.numpy(), groups=data.groups[ids], cv=GroupKFold(3))
        for name, value in known.items()
    }
    chosen = torch.from_numpy(features[:2048])
    return {name: float(score.mean()) for name, score in scores.items()} | {
        "rankme": float(rankme(chosen))
    }


# ---- 5 Results -------------------------------------------------------------------------------------


def rows_of(
    question: Question,
    point: Point,
    draws: np.ndarray,
    start: np.ndarray,
    data: classifier.LabelledTiles,
) -> dict[str, Any]:
    """One row of study.csv: a figure with its interval, and the gain over the same seed's start."""
    low, high = classifier.interval(draws[1:])
    gain = draws - start
    gain_low, gain_high = classifier.interval(gain[1:])
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
        "n_patients": len(set(data.groups[question.judged])),
    }


def judge_all(settings: Settings, points: list[Point]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """study.csv and nuisance.csv: every point, each seed's start, and what learns nothing."""
    data, questions = load_questions(settings)
    used = np.unique(np.concatenate([question.used for question in questions]))
    seeds = sorted({point.seed for point in points})
    fixed = [Point("classic", seeds[0], 0, "classic")]  # no seed changes them
    fixed += [Point("imagenet", seeds[0], 0, settings.imagenet)] * bool(settings.imagenet)
    starts = [Point("random", seed, 0, "none") for seed in seeds]
    rows, side, start = [], [], {}
    for point in tracking.progress([*starts, *fixed, *points], desc="judge", unit="point"):
        features = features_at(point, settings, data)(used)
        side.append(point._asdict() | nuisances(features, used, data))
        for question in questions:
            own = features[np.searchsorted(used, question.used)]
            draws = draws_of(question, answer(question, own, data, settings), data, settings)
            if point.arm == "random":
                start[point.seed, question.name] = draws
            rows.append(rows_of(question, point, draws, start[point.seed, question.name], data))
    return pd.DataFrame(rows), pd.DataFrame(side).drop(columns="weights")


def features_at(point: Point, settings: Settings, data: classifier.LabelledTiles) -> Features:
    """The features to judge at a point. Of weights that saw no mammogram batch norm is calibrated."""
    if point.arm == "classic":
        return classic_features(settings, data)
    return features_of(settings, data, point.weights, point.seed, point.arm in REFERENCES)


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


def draw_study(table: pd.DataFrame, path: Path) -> None:
    """AUROC over steps, a panel per question: mean of the seeds and the interval's mean as a band; what
    does not learn as a line across."""
    from matplotlib.figure import Figure

    from byol_mammo import pictures

    findings = list(dict.fromkeys(table["finding"]))
    figure = Figure(figsize=(5.2 * len(findings), 4), layout="constrained")
    panels = figure.subplots(1, len(findings), squeeze=False)[0]
    for axes, finding in zip(panels, findings, strict=True):
        part = table[table["finding"] == finding]
        start = part[part["arm"] == "random"][["step", "auroc", "low", "high"]]
        for arm, rows in part.groupby("arm", sort=False):
            if arm in REFERENCES:
                style = {"random": ":", "classic": "--", "imagenet": "-."}[str(arm)]
                axes.axhline(rows["auroc"].mean(), color="0.4", linestyle=style, label=arm)
                continue
            line = pd.concat([start, rows])[["step", "auroc", "low", "high"]].groupby("step").mean()
            axes.plot(line.index, line["auroc"], marker="o", label=arm)
            axes.fill_between(line.index, line["low"], line["high"], alpha=0.12)
        axes.set(xlabel="steps", ylabel="AUROC of a frozen probe", title=finding)
        axes.legend(fontsize=8)
    pictures.save_figure(figure, path)


def write_results(settings: Settings, table: pd.DataFrame, nuisance: pd.DataFrame) -> None:
    """study.csv, nuisance.csv, study.md, study.png and report.html."""
    folder = Path(settings.output_dir)
    files.write_atomic(folder / "study.csv", table.to_csv(index=False, float_format="%.4f"))
    files.write_atomic(folder / "nuisance.csv", nuisance.to_csv(index=False, float_format="%.4f"))
    summary = summarise(table)
    files.write_atomic(folder / "study.md", markdown(summary))
    draw_study(table, folder / "study.png")
    side = nuisance.groupby("arm", sort=False).last().drop(columns=["seed"]).reset_index().round(3)
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>study</title>"
        "<style>body { font: 16px/1.4 system-ui, sans-serif; max-width: 1180px; margin: auto }"
        "td, th { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }"
        ".wide { overflow-x: auto } img { max-width: 100% }</style>"
        "<h1>What frozen features tell</h1><img src='study.png' alt='AUROC over steps'>"
        + files.html_table(summary.to_numpy().tolist(), list(summary.columns))
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
    for arm, seed in tracking.progress(chosen, desc="train", unit="run"):
        points += train_arm(settings, arm, arms[arm], seed)
    table, nuisance = judge_all(settings, points)
    write_results(settings, table, nuisance)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""

    def job() -> None:
        parser = flags.make_parser(__doc__)
        run_study(Settings(**flags.parse_fields(Settings, parser, flags.setting_help(__file__), argv)))

    return flags.exit_code(job, "lower --batch_size")


if __name__ == "__main__":
    sys.exit(main())
