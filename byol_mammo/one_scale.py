"""Images of several detectors brought to one pixel size before tiles are chosen, and the way back."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from byol_mammo import framing, images, settings
from byol_mammo.settings import MammoError

COLUMN = "source_px"  # of images.csv: px of the image file for each px of the cache; absent = 1 for all
REMEDY = "give spacing_mm in manifest.csv, or --pixel_spacing_mm for all that lack it"


def stated(spacing_mm: float, default: float) -> float:
    """A spacing that a user gave, told from the `default` that nobody gave by one step of a float.

    A setting that equals its default says nothing of who chose it; this step survives config.json and
    checkpoints.
    """
    return math.nextafter(spacing_mm, math.inf) if spacing_mm == default else spacing_mm


def mark_stated(values: dict[str, Any], default: float, argv: Sequence[str] | None) -> dict[str, Any]:
    """The `values` of a command line, its PIXEL_SPACING_MM `stated` where it is given at one scale."""
    words = settings.with_underscores(sys.argv[1:] if argv is None else argv)
    if values["target_spacing_mm"] and any(word.startswith("--pixel_spacing_mm") for word in words):
        return values | {"pixel_spacing_mm": stated(values["pixel_spacing_mm"], default)}
    return values


def note_unknown(spacing: pd.Series) -> None:
    """Say how many images can't be scaled since nobody tells their spacing (N,) mm, NaN = unknown.

    Raises MammoError where that is so of all.
    """
    unknown = int(spacing.isna().sum())
    if unknown == len(spacing):
        raise MammoError(f"--target_spacing_mm: no image tells its pixel size; {REMEDY}")
    print(
        f"note: {unknown} of {len(spacing)} images don't tell their pixel size and are skipped, as "
        f"--target_spacing_mm can't scale them; {REMEDY}",
        file=sys.stderr,
    )


def describe(spacing: pd.Series, target_mm: float) -> str:
    """A line on images of these spacings (N,) mm, NaN = skipped, at one scale: how many are enlarged."""
    known = spacing.dropna()
    if known.empty:
        return f"scale     {target_mm:g} mm per pixel, of no image that tells its own"
    coarser = known[known > target_mm * (1 + SAME)]
    text = f"scale     {target_mm:g} mm per pixel, from {known.min():.4g} to {known.max():.4g}"
    if len(coarser):
        sizes = f"{coarser.min():.4g}" + f" to {coarser.max():.4g}" * (coarser.nunique() > 1)
        text += (
            f"; {len(coarser):,} of {len(known):,} images enlarged, from {sizes}, which adds no detail"
        )
    return text


def source_px(table: pd.DataFrame) -> np.ndarray:
    """(N,) float64 px of the image file for each px of the cache, of the rows of images.csv."""
    return table[COLUMN].to_numpy(float) if COLUMN in table else np.ones(len(table))


def source_corners(table: pd.DataFrame, tiles: pd.DataFrame) -> np.ndarray:
    """(N, 2) whole x and y of tiles (image, x, y) in px of their image files; `table`: images.csv."""
    corners = tiles[["x", "y"]].to_numpy()
    if COLUMN not in table:
        return corners
    return np.rint(corners * source_px(table)[tiles["image"].to_numpy(), None]).astype(np.int64)


# ---- Resampling: part of a cache's key where it is on ------------------------------------------------

SAME = 1e-6  # relative difference of two spacings below which they are one: 0.004 px of a whole image


@dataclasses.dataclass(frozen=True)
class ScaledPicture(framing.ReducedImage):
    """The reduced copy of an image file, whose masks are wanted at the resampled image's shape.

    Masks are found on the file's own copy, so that one scale changes no outline and no polarity.
    """

    scale: float = 1.0  # px of the resampled image for each px of the file

    def enlarged(self, mask: np.ndarray) -> np.ndarray:
        """A bool mask of `image` at the resampled image's shape."""
        return resample(super().enlarged(mask).view(np.uint8) * np.uint8(255), self.scale) > 127


def resample(image: np.ndarray, scale: float) -> np.ndarray:
    """An image (H, W) uint8 or uint16 at `scale` px for each of its own, of its dtype.

    Averaged over the area of each new pixel where they grow, which keeps what is finer from aliasing
    (docs/method.md), else interpolated bilinearly, which overshoots nowhere. The corner at 0, 0 stays,
    and pixels are `scale` to the bit, not what rounding the shape would make of it.
    """
    if abs(scale - 1) < SAME:
        return image
    kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=kernel)


def rescaled(
    path: str | Path, image: np.ndarray, small: framing.ReducedImage, spacing_mm: float, target_mm: float
) -> tuple[np.ndarray, framing.ReducedImage, float]:
    """An image file's pixels (H, W), its reduced copy and its spacing, brought to `target_mm` per pixel.

    All as they are where `target_mm` is 0. Raises ImageReadError where the spacing is unknown (NaN), or
    the image would be too large or too small to be one.
    """
    if not target_mm:
        return image, small, spacing_mm
    if math.isnan(spacing_mm):
        raise images.ImageReadError(path, f"its pixel size is unknown: {REMEDY}")
    scale = spacing_mm / target_mm
    height, width = (round(scale * length) for length in image.shape)
    if min(height, width) < 2 or height * width > images.MAX_SAMPLES:
        raise images.ImageReadError(
            path,
            f"{image.shape[1]} x {image.shape[0]} px of {spacing_mm:g} mm would be {width:,} x "
            f"{height:,} at --target_spacing_mm {target_mm:g}",
        )
    picture = ScaledPicture(**vars(small), scale=scale)
    return resample(image, scale), picture, target_mm
