"""Structure at the scale of masses: places that the gradients of the grey level point to.

A mass is brighter than what surrounds it on all sides, however little: around its centre the gradients
point inwards. Their mean cosine with that direction over a disc is the convergence (Kobatake and
Murakami 1996, "Adaptive filter to detect rounded convex regions: iris filter", ICPR), by which Kobatake
et al. 1999 (IEEE Trans. Med. Imaging 18, 369-378) found masses. How steep a gradient is doesn't count,
and so neither do contrast, bit depth and window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from byol_mammo import images, specks

GRID = 0.5  # mm, pixel of the reduced grid that gradients are taken on; maps have pixels twice as wide
SMOOTHING = 0.65  # mm, sigma before gradients are taken, as grain has some of its own
SKIN = 2.5  # mm from the skin line within which nothing counts: the skin is a structure of its own
PART = 0.4  # share of a disc that must count where a part of it may be missing: half of it is at a side
RADII = (5.0, 7.0)  # mm, of the discs whose strongest convergence is a tile's
MASS_RADII = (4.0, 7.0)  # mm, of the discs in which gradients converge on a mass over the muscle
# Least round_convergence there, as chance reaches less in a larger disc: each takes 1.4 % of the muscle
# on films of CBIS-DDSM without a mass over it.
MASS_CONVERGENCE = (0.5, 0.4)
MASS_CORE = 0.37  # share of a disc's radius around its centre that is taken for mass


def disc_kernels(radius: float) -> np.ndarray:
    """(2, k, k) float32: weights of the x and y parts of unit vectors around a place, whose sum is their
    mean cosine with the direction to it over a disc of `radius` px, at least 1."""
    radius = max(radius, 1.0)
    reach = math.floor(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    distance = np.hypot(x, y)
    inside = (distance > 0) & (distance <= radius)
    return (-np.stack([x, y]) * inside / np.maximum(distance, 1) / inside.sum()).astype(np.float32)


def reductions(step_mm: float) -> tuple[int, int]:
    """How many px of `step_mm` make one of about GRID, and how many of those one of a map."""
    factor = max(1, round(GRID / step_mm))
    return factor, max(1, round(2 * GRID / (step_mm * factor)))


def unit_gradients(grey: np.ndarray, inside: np.ndarray, step_mm: float) -> tuple[np.ndarray, int]:
    """Directions in which grey rises, on the grid of the maps: (3, h, w) float32, and its factor.

    `grey` (H, W) float32 with px of `step_mm`, `inside` (H, W) uint8, 1 in the breast. The parts are the
    means of x and y of unit vectors, and 1 where they count: SKIN away from the skin line, else all are
    0. factor x factor px of `grey` make one of the grid; what is left over at the end goes. Air is
    filled with the breast's mean, lest the step at the skin outweigh what lies beside it.
    """
    factor, pool = reductions(step_mm)
    height, width = (length // (pool * factor) for length in grey.shape)
    if not height or not width or not inside.any():
        return np.zeros((3, height, width), np.float32), pool * factor
    whole = np.s_[: pool * factor * height, : pool * factor * width]
    size, coarse = (pool * width, pool * height), (width, height)
    tissue = cv2.resize(cv2.copyTo(grey[whole], inside[whole]), size, interpolation=cv2.INTER_AREA)
    cover = cv2.resize(inside[whole] * np.uint8(255), size, interpolation=cv2.INTER_AREA) / np.float32(
        255
    )
    mean = tissue.sum() / max(cover.sum(), np.float32(1))
    sigma = SMOOTHING / (step_mm * factor)
    side = 2 * math.ceil(3 * sigma) + 1
    smooth = cv2.GaussianBlur(tissue + (1 - cover) * mean, (side, side), sigma)
    x, y = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    # Rounding is no gradient.
    steepness = images.magnitude(x.copy(), y.copy()) + 1e-5 * mean + np.float32(1e-12)
    margin = 2 * max(1, round(SKIN / (pool * step_mm * factor))) + 1
    covered = cv2.resize(cover, coarse, interpolation=cv2.INTER_AREA) > 0.5
    # At the array's sides tissue may go on as well as end: erosion takes nothing away there.
    counts = cv2.erode(covered.view(np.uint8), np.ones((margin, margin), np.uint8))
    parts = [cv2.resize(each / steepness, coarse, interpolation=cv2.INTER_AREA) for each in (x, y)]
    return np.stack([*parts, np.ones(counts.shape, np.float32)]) * counts, pool * factor


def convergence(gradients: np.ndarray, step_mm: float, radii: Sequence[float] = RADII) -> np.ndarray:
    """Strongest mean cosine over discs of `radii` mm around each place: (h, w) float32, -1 to 1.

    `gradients` (3, h, w) as unit_gradients gives them, with px of `step_mm`. What doesn't count in a
    disc is 0 in its mean, and so is a place that doesn't count.
    """
    x, y, counts = gradients
    if not counts.any():
        return np.zeros_like(counts)
    strongest = np.full(x.shape, -1, np.float32)
    for radius in radii:
        discs = zip((x, y), disc_kernels(radius / step_mm), strict=True)
        parts = [cv2.filter2D(part, -1, disc, borderType=cv2.BORDER_CONSTANT) for part, disc in discs]
        np.maximum(strongest, parts[0] + parts[1], out=strongest)
    return np.where(counts > 0, strongest, np.float32(0))


def round_convergence(gradients: np.ndarray, radius: float) -> np.ndarray:
    """Convergence from all sides alike, over discs of `radius` px: (h, w) float32, -1 to 1.

    The mean cosine comes from two directions across each other; this is twice the weaker part, as
    beside a strand or a fold all gradients point to it, but none along it. Of a disc a part may be
    missing: the mean is over what counts, times the root of its share, as noise in the mean of n
    directions falls with the root of n. So a mass that the picture's side cuts through shows as a whole
    one does, and chance doesn't show more often there. -1 where less than PART of a disc counts.
    """
    x, y, counts = gradients
    along_x, along_y = disc_kernels(radius)
    disc = ((along_x != 0) | (along_y != 0)).astype(np.float32)

    def mean(part: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return cv2.filter2D(part, -1, kernel, borderType=cv2.BORDER_CONSTANT)

    share = mean(counts, disc / disc.sum())
    across, down = mean(x, along_x), mean(y, along_y)
    oblique = mean(x, along_y) + mean(y, along_x)
    weaker = across + down - images.magnitude(across - down, oblique)
    return np.where(share > PART, weaker / np.sqrt(np.maximum(share, PART)), np.float32(-1))


def masses_over(muscle: np.ndarray, grey: np.ndarray, breast: np.ndarray) -> np.ndarray:
    """Where masses and nodes lie over a muscle: (H, W) bool.

    `muscle` and `breast` (H, W) bool, `grey` (H, W) float32, with px of about GRID, the muscle at the
    upper left. A muscle is made of fibres along it: nowhere on it does grey rise from all sides to one
    place.
    """
    left, top, width, height = images.bounding_box(muscle)
    reach = round(MASS_RADII[-1] / GRID)
    part = np.s_[: top + height + reach, : left + width + reach]
    gradients, factor = unit_gradients(grey[part], breast[part].view(np.uint8), GRID)
    centres, found = np.zeros((2, *muscle.shape), np.uint8)
    for radius, least in zip(MASS_RADII, MASS_CONVERGENCE, strict=True):
        places = round_convergence(gradients, radius / (factor * GRID)) > least
        places = places.repeat(factor, axis=0).repeat(factor, axis=1)
        centres[: places.shape[0], : places.shape[1]] = places
        size = 2 * round(MASS_CORE * radius / GRID) + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        np.maximum(found, cv2.dilate(centres & muscle, disc), out=found)
    return found > 0


def tile_convergence(
    grid: specks.Grid, muscle: np.ndarray, y: np.ndarray, x: np.ndarray, size: int, spacing_mm: float
) -> np.ndarray:
    """Strongest convergence within each tile of `size` px at y, x (N,): (N,) float64, 0 where none.

    `grid` of the image and its breast mask, `muscle` (H, W) bool, where no place counts.
    """
    gradients, factor = unit_gradients(grid.grey, grid.inside, grid.factor * spacing_mm)
    factor *= grid.factor
    found = convergence(gradients, factor * spacing_mm)
    height, width = found.shape
    top, left = grid.top + factor // 2, grid.left + factor // 2  # px of the first place in the image
    found[muscle[top::factor, left::factor][:height, :width]] = 0
    rows, cols = top + factor * np.arange(height), left + factor * np.arange(width)
    down, across = np.searchsorted(rows, [y, y + size]), np.searchsorted(cols, [x, x + size])
    return np.array(
        [
            found[top:bottom, left:right].max(initial=0)
            for top, bottom, left, right in zip(*down, *across, strict=True)
        ],
        np.float64,
    )
