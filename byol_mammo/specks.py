"""Speck energy: how much a tile looks as if it held a group of micro-calcifications."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from byol_mammo import images

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


class Grid(NamedTuple):
    """The bounding box of a mask in an image, averaged over blocks of factor x factor px."""

    grey: np.ndarray  # (h, w) float32
    inside: np.ndarray  # (h, w) uint8, 1 in the mask
    factor: int
    top: int  # px of the image, of the box's corner
    left: int


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
    spread = images.magnitude(cv2.addWeighted(xx, 0.5, yy, -0.5, 0), xy)
    return cv2.subtract(mean, spread), mean


def speck_grid(image: np.ndarray, mask: np.ndarray, spacing_mm: float) -> Grid:
    """The Grid of about SPECK_GRID mm that specks are sought on, of uint8 or uint16 (H, W).

    The box starts at a multiple of the factor, so that a tile and its image share one grid. Averages
    are taken in 16 bits, all of them in use: what they lose is below the noise of any detector.
    """
    factor = max(1, round(SPECK_GRID / spacing_mm))
    x0, y0, width, height = images.bounding_box(mask)
    top, left = y0 // factor * factor, x0 // factor * factor
    size = ((x0 + width - left) // factor, (y0 + height - top) // factor)
    if min(size) == 0:
        return Grid(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.uint8), factor, 0, 0)
    box = np.s_[top : top + size[1] * factor, left : left + size[0] * factor]
    content = image[box]
    unused = 16 - images.bit_depth(image[box[0]])  # whole rows are read faster than parts of them
    if unused:
        content = np.left_shift(content, unused, dtype=np.uint16)
    small = cv2.resize(content, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    small *= np.float32(2.0**-unused)
    inside = cv2.resize(mask[box].view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return Grid(small, inside, factor, top, left)


def speck_peaks(
    image: np.ndarray, mask: np.ndarray, spacing_mm: float, grid: Grid | None = None
) -> Peaks:
    """Rows (px), columns (px) and strengths of the speck-like peaks of uint8 or uint16 (H, W).

    A peak is a local maximum of the weaker curvature inside the mask (H, W) bool. Its strength is
    that curvature over the standard deviation of the mean curvature around it, which cancels gain,
    offset and noise level, and so bit depth, window and vendor. What varies slowly is worked out per
    block of SPECK_BLOCK x SPECK_BLOCK px of the reduced grid. `grid` saves a second reduction where the
    speck_grid is known already.
    """
    small, inside, factor, top, left = grid or speck_grid(image, mask, spacing_mm)
    sigma = SPECK_SIGMA / (spacing_mm * factor)
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
    rounding = (images.grey_step(image) / factor) ** 2 / 12
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


def energy_of_peaks(peaks: Peaks, spacing_mm: float) -> float:
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


def tile_energies(
    peaks: Peaks, y: np.ndarray, x: np.ndarray, size: int, spacing_mm: float
) -> np.ndarray:
    """Energy of each tile from its image's peaks."""
    rows, columns, strengths = peaks  # from top to bottom
    energies = np.zeros(len(y))
    first, last = np.searchsorted(rows, [y, y + size])
    for index, (start, stop, left) in enumerate(zip(first, last, x, strict=True)):
        inside = start + np.flatnonzero(
            (columns[start:stop] >= left) & (columns[start:stop] < left + size)
        )
        tile_peaks = rows[inside], columns[inside], strengths[inside]
        energies[index] = energy_of_peaks(tile_peaks, spacing_mm)
    return energies
