"""An answer for each image from the frozen features of all its tiles, learnt from image labels alone.

Each tile has a score for each target, linear in its features. How an image's tiles are pooled:

- `attention`: their mean, weighted by a gated attention (Ilse, Tomczak, Welling 2018,
  arXiv:1802.04712). The gate is shared, but each target has weights of its own, as in Lu et al. 2021
  (doi 10.1038/s41551-020-00682-w): a mass and a cluster of specks lie in different tiles, and a
  reader asks for each where the answer comes from.
- `max`: the highest.
- `noisy_or`: 1 - prod(1 - p), p = a tile's probability.

A target with an order, as density A to D, has one score and a threshold between each two grades (CORAL,
Cao, Mirjalili, Raschka 2020, doi 10.1016/j.patrec.2020.11.008); a finding is the case of two grades,
0 and 1. All three poolings are trained on the same tiles, labels and order, so that they compare.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from byol_mammo import cache as caches, files, labels, tracking
from byol_mammo.lightly_parts import cosine_warmup_schedule
from byol_mammo.settings import MammoError

POOLINGS = ("attention", "max", "noisy_or")
HIDDEN = 128  # units of the gate, as in Ilse et al.
DROPOUT = 0.25  # of a tile's features in training, as in Lu et al.


@dataclass(frozen=True)
class Target:
    """What is asked of an image; `grades` ascending, (0, 1) of a finding."""

    name: str
    grades: tuple[int, ...]

    @property
    def is_graded(self) -> bool:
        """Whether it has an order, see labels.GRADES."""
        return self.name in labels.GRADES


def find_targets(names: Sequence[str], values: np.ndarray) -> tuple[Target, ...]:
    """The targets `names` with the grades that occur in `values` (N, targets), NaN = unknown."""
    found = (np.unique(column[np.isfinite(column)]).astype(int) for column in values.T)
    return tuple(Target(name, tuple(grades.tolist())) for name, grades in zip(names, found, strict=True))


def check_values(targets: np.ndarray, names: Sequence[str], where: str) -> None:
    """Raises MammoError where a column of `targets` (N, targets) knows fewer than two values."""
    for target in find_targets(names, targets):
        if len(target.grades) < 2:
            same = f"every image has {target.name} {target.grades[0]}" if target.grades else ""
            raise MammoError(
                f"{where}: {same or f'no image has a value of {target.name}'}, nothing can be learnt "
                "or judged; check the column in labels.csv, --split and --findings"
            )


def exceeds(values: np.ndarray, targets: Sequence[Target]) -> np.ndarray:
    """Of `values` (N, targets) whether they lie above each grade but the last: (N, thresholds) float32,
    the targets' thresholds one after the other; NaN = unknown."""
    columns = [
        np.where(np.isnan(column), np.nan, column > grade)
        for column, target in zip(values.T, targets, strict=True)
        for grade in target.grades[:-1]
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def expected(above: np.ndarray, targets: Sequence[Target]) -> tuple[np.ndarray, np.ndarray]:
    """Expected value and best grade, (N, targets) each, of probabilities `above` (N, thresholds).

    A finding's expected value is its probability. The grade is CORAL's: one more for each threshold
    that is rather exceeded than not.
    """
    means, grades, start = [], [], 0
    for target in targets:
        scale = np.array(target.grades)
        part = above[:, start : start + len(scale) - 1]
        means.append(scale[0] + part @ np.diff(scale))
        grades.append(scale[(part > 0.5).sum(1)])
        start += len(scale) - 1
    return np.stack(means, axis=1), np.stack(grades, axis=1)


@dataclass(frozen=True)
class Bags:
    """Features (N, D) of tiles, those of an image side by side, and where each image begins."""

    features: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, images: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features (B, T, D) of `images` (B,), zero behind the last tile, and which are there (B, T)."""
        stops = np.append(self.starts[1:], len(self.features))
        parts = [torch.tensor(self.features[self.starts[i] : stops[i]]) for i in images]
        counts = torch.tensor([len(part) for part in parts])
        there = torch.arange(int(counts.max())) < counts[:, None]
        return pad_sequence(parts, batch_first=True).to(device), there.to(device)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of features (N, D), part by part: memory may not hold them."""
    parts = np.array_split(features, max(1, features.size // 2**24))
    mean = sum(part.sum(0, dtype=np.float64) for part in parts) / len(features)
    variance = sum(((part - mean) ** 2).sum(0) for part in parts) / len(features)
    return mean, np.sqrt(variance) + 1e-6


class ImageHead(nn.Module):
    """Scores of tiles, how they are pooled, thresholds: see the module's words.

    The scores' weights start at zero, so that the first answer is each grade's frequency.
    """

    mean: Tensor
    scale: Tensor
    owner: Tensor

    def __init__(self, width: int, targets: Sequence[Target], pooling: str) -> None:
        """`width`: of the features."""
        super().__init__()
        self.targets, self.pooling = tuple(targets), pooling
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        owner = [index for index, target in enumerate(targets) for _ in target.grades[1:]]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)
        self.score = nn.Linear(width, len(targets), bias=False)
        nn.init.zeros_(self.score.weight)
        self.thresholds = nn.Parameter(torch.zeros(len(owner)))
        if pooling == "attention":
            self.content, self.gate = nn.Linear(width, HIDDEN), nn.Linear(width, HIDDEN)
            self.choose = nn.Linear(HIDDEN, len(targets), bias=False)

    @torch.no_grad()
    def start_from(self, bags: Bags, images: np.ndarray, above: np.ndarray) -> None:
        """Standardise by the features of all `bags`, and set the thresholds to the frequencies among
        `images` of `above` (len(images), thresholds), see exceeds."""
        mean, scale = moments(bags.features)
        self.mean.copy_(torch.tensor(mean))
        self.scale.copy_(torch.tensor(scale))
        # Half an image more on each side: a grade may be of the images held out alone.
        share = (np.nansum(above, axis=0) + 0.5) / (np.isfinite(above).sum(0) + 1)
        if self.pooling == "noisy_or":  # of a tile, so that all tiles together give the image's
            counts = np.diff(np.append(bags.starts, len(bags.features)))
            share = 1 - (1 - share) ** (1 / counts[images].mean())
        self.thresholds.copy_(torch.tensor(np.log(share / (1 - share))))

    def shares(self, x: Tensor, there: Tensor) -> Tensor:
        """Attention's share of each tile in each answer (B, T, targets): 1 over an image's tiles, of
        standardised features (B, T, D) of which some are `there` (B, T)."""
        chosen = self.choose(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x)))
        return chosen.masked_fill(~there[..., None], -torch.inf).softmax(1)

    def forward(self, tiles: Tensor, there: Tensor) -> Tensor:
        """Logits (B, thresholds) of images with features `tiles` (B, T, D), some `there` (B, T)."""
        x = F.dropout((tiles - self.mean) / self.scale, DROPOUT, self.training)
        score = self.score(x)
        if self.pooling == "noisy_or":
            logits = score[..., self.owner] + self.thresholds
            # Log of the probability that no tile shows it; below 0 also where all odds vanish.
            none = (F.logsigmoid(-logits) * there[..., None]).sum(1).clamp_max(-1e-7)
            return torch.log(-torch.expm1(none)) - none
        if self.pooling == "max":
            pooled = score.masked_fill(~there[..., None], -torch.inf).amax(1)
        else:
            pooled = (self.shares(x, there) * score).sum(1)
        return pooled[:, self.owner] + self.thresholds


@torch.inference_mode()
def answers(head: ImageHead, bags: Bags, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Probabilities (len(images), thresholds) float32 that an image's value lies above each grade."""
    head.eval()
    parts = np.array_split(images, max(1, -(-len(images) // 16)))
    found = [head(*bags.batch(part, device)).sigmoid().cpu() for part in parts]
    return torch.cat(found).numpy()


@torch.inference_mode()
def attend(head: ImageHead, features: np.ndarray, device: torch.device) -> np.ndarray:
    """Attention's share (T, targets) of an image's tiles with `features` (T, D)."""
    head.eval()
    tiles, there = Bags(features, np.array([0])).batch(np.array([0]), device)
    return head.shares((tiles - head.mean) / head.scale, there)[0].cpu().numpy()


# Training --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a head is trained."""

    epochs: int
    patience: int  # epochs without better validation
    batch_size: int  # images
    lr: float  # peak
    weight_decay: float
    seed: int
    device: torch.device


def coral_loss(logits: Tensor, above: Tensor, owner: Tensor) -> Tensor:
    """CORAL's sum of binary cross-entropies over `above` (B, thresholds), NaN = unknown, as the mean
    over a target's thresholds: a target of many grades counts no more than a finding."""
    known = above.isfinite()
    share = 1 / torch.bincount(owner)[owner].to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, above.nan_to_num(), reduction="none")
    weight = known * share
    return (losses * weight).sum() / weight.sum().clamp_min(1e-6)


def validation(head: ImageHead, probabilities: np.ndarray, above: np.ndarray) -> dict[str, float]:
    """The loss, and AUROC of each target, of grades the mean over thresholds with images on both sides,
    and their mean; `probabilities` and `above` (images, thresholds)."""
    from sklearn.metrics import roc_auc_score

    logits = torch.from_numpy(probabilities.astype(np.float64)).logit(1e-6)
    loss = float(coral_loss(logits, torch.from_numpy(above), head.owner.cpu()))
    owner, row = head.owner.cpu().numpy(), {}
    for index, target in enumerate(head.targets):
        aurocs = []
        for column in np.flatnonzero(owner == index):
            known = np.isfinite(above[:, column])
            truth = above[known, column]
            if len(set(truth.tolist())) == 2:
                aurocs.append(roc_auc_score(truth, probabilities[known, column]))
        row[f"auroc_{target.name}"] = float(np.mean(aurocs)) if aurocs else float("nan")
    return {"validation_loss": loss, "auroc": float(np.nanmean(list(row.values()))), **row}


def fit(
    bags: Bags, values: np.ndarray, held_out: np.ndarray, targets: Sequence[Target], pooling: str,
    recipe: Recipe,
) -> tuple[ImageHead, list[dict[str, Any]]]:  # fmt: skip
    """The head of the epoch of best validation, and a row for each epoch, 0 = the start.

    `values` (images, targets), NaN = unknown; `held_out` (images,) bool: those to validate on. The same
    arguments give the same bits on the same device.
    """
    above = exceeds(values, targets)
    train, judged = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    steps = max(1, len(train) // recipe.batch_size)
    total = steps * recipe.epochs
    with torch.random.fork_rng(devices=[recipe.device] if recipe.device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        head = ImageHead(bags.features.shape[1], targets, pooling)
        head.start_from(bags, train, above[train])
        head.to(recipe.device)
        optimizer = torch.optim.AdamW(head.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        rows: list[dict[str, Any]] = []
        best: dict[str, Tensor] = {}
        with tracking.progress(total=total, desc=pooling, unit="step", leave=False) as bar:
            for epoch in range(recipe.epochs + 1):
                loss = 0.0
                if epoch:
                    order = np.random.default_rng([recipe.seed, 11, epoch]).permutation(train)
                    loss = fit_epoch(head, optimizer, bags, above, order, epoch, recipe)
                    bar.update(steps)
                figures = validation(head, answers(head, bags, judged, recipe.device), above[judged])
                rows.append({"pooling": pooling, "epoch": epoch, "loss": loss, **figures})
                if best_epoch(rows) == epoch:
                    best = {key: value.clone() for key, value in head.state_dict().items()}
                elif epoch - best_epoch(rows) >= recipe.patience:
                    break
    head.load_state_dict(best)
    return head, rows


def best_epoch(rows: Sequence[dict[str, Any]]) -> int:
    """The epoch of the highest mean AUROC, and of several, as few images give, of the lowest loss."""
    return min(range(len(rows)), key=lambda i: (-rows[i]["auroc"], rows[i]["validation_loss"]))


def fit_epoch(
    head: ImageHead, optimizer: torch.optim.Optimizer, bags: Bags, above: np.ndarray, order: np.ndarray,
    epoch: int, recipe: Recipe,
) -> float:  # fmt: skip
    """One pass over the images `order`; returns the mean loss. Raises MammoError where it is NaN."""
    head.train()
    parts = np.array_split(order, max(1, len(order) // recipe.batch_size))
    total, losses = len(parts) * recipe.epochs, []
    for index, part in enumerate(parts):
        step = (epoch - 1) * len(parts) + index
        warm_up = min(len(parts), total // 2)
        lr = float(cosine_warmup_schedule(step, total, recipe.lr, 0.0, warm_up, 0.0))
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = head(*bags.batch(part, recipe.device))
        loss = coral_loss(logits, torch.from_numpy(above[part]).to(recipe.device), head.owner)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if not np.isfinite(losses).all():
        raise MammoError(f"{head.pooling}: the loss is not a number in epoch {epoch}: lower --lr")
    return float(np.mean(losses))


# Files -----------------------------------------------------------------------------------------------


def to_content(heads: dict[str, ImageHead]) -> dict[str, Any]:
    """Heads of the same targets as plain types, for a checkpoint."""
    targets = next(iter(heads.values())).targets
    return {
        "targets": [[target.name, list(target.grades)] for target in targets],
        "state": {
            name: {key: value.detach().cpu().clone() for key, value in head.state_dict().items()}
            for name, head in heads.items()
        },
    }


def from_content(content: Any, width: int, source: str) -> dict[str, ImageHead]:
    """Heads that to_content wrote, for features of that width. Raises MammoError for anything else."""
    heads = {}
    try:
        targets = [Target(str(name), tuple(map(int, grades))) for name, grades in content["targets"]]
        for pooling in POOLINGS:
            heads[pooling] = ImageHead(width, targets, pooling)
            heads[pooling].load_state_dict(content["state"][pooling])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:  # a stranger's
        reason = " ".join(str(error).split())[:200]
        raise MammoError(f"{source}: its image heads don't fit: {reason}") from error
    return heads


def keep_features(path: Path, shape: tuple[int, int], make: Callable[[], np.ndarray]) -> np.ndarray:
    """Features of `shape` (N, D) float32 from `path`, where `make` gives them once; memory-mapped.

    They take all the time of a training, and seeds, settings and evaluations share them. Where the
    folder can't be written, as a colleague's, they are made each time.
    """
    size = files.NPY_HEADER + 4 * shape[0] * shape[1]
    if not caches.has_size(path, size):
        features = np.ascontiguousarray(make(), np.float32)

        def write(file: BinaryIO) -> None:
            files.write_npy_header(file, features.dtype, features.size)
            file.write(features.data)

        try:
            path.parent.mkdir(exist_ok=True)
            caches.write_once(path, size, write)
        except OSError as error:
            if error.errno not in caches.NOT_WRITABLE:
                raise
            print(f"note: {path.parent} can't be written: features are not kept", file=sys.stderr)
            return features
    return files.map_array(path).reshape(shape)
