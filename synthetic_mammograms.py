#!/usr/bin/env python3
"""Phantom mammograms with exact ground truth, laid out like VinDr-Mammo (CSV + 16-bit PNG).

For the demo, the tests and the benchmarks, where real images cannot be shipped. A phantom shares
with a mammogram what segmentation, tiling and pre-training see: contour, skin line, power-law
tissue, ligaments, pectoral muscle, masses, specks, noise, labels. It is no model of disease.

    python synthetic_mammograms.py --output_dir demo/archive --studies 8
    python synthetic_mammograms.py --output_dir big --height 3518 --width 2800 --spacing_mm 0.085
    python synthetic_mammograms.py --output_dir traps --studies 10 --trap mixed

Writes images_png/<study_id>/<image_id>.png, breast-level_annotations.csv, finding_annotations.csv
(VinDr's columns and value formats; Nguyen et al. 2023, doi 10.1038/s41597-023-02100-7) and
    truth/<study_id>/<image_id>_breast.png, ..._pectoral.png    masks, 0 or 255
    truth/images.csv     spacing_mm, bit_depth and trap of every image
    truth/lesions.csv    kind, centre, radius and box of every lesion (pixels; xmax, ymax exclusive)
    truth/specks.csv     position and diameter of every micro-calcification
The breast mask is the anatomy alone: skin line and pectoral muscle belong to it, and labels,
markers, tape and frames neither add to it nor take from it, even where they cover skin.
An image is a function of (seed, study, laterality, view) and its settings alone.

Contents
    1 Configuration    constants, PhantomSpec, Phantom
    2 Contour          field of view, breast outline, pectoral muscle
    3 Tissue           power-law texture, fibroglandular cone, ligaments, vessels, skin line
    4 Lesions          masses, micro-calcification clusters
    5 Detector         blur, quantum noise, labels and markers, grey values
    6 Traps            what archives really contain: padding, inversion, film, tape, frame, nothing
    7 Archive          studies, files, tables
    8 Entry            flags, main
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy import fft
from tqdm import tqdm

# ---- 1 Configuration -----------------------------------------------------------------------------

FIELD_MM = (299.0, 238.0)  # rows, columns of VinDr's 3518 x 2800 images at 0.085 mm
BETA = 3.0  # exponent of the tissue's power spectrum 1/f^beta (Burgess et al. 2001, Med Phys 28:419)
LONGEST_MM = 50.0  # the power law levels off above this wavelength
FAT = 0.15  # display value of adipose tissue, 0 = air, 1 = saturation
GLAND = 0.52  # display value of fibroglandular tissue
MUSCLE = 0.50  # display value of the pectoral muscle
GLAND_SHARE = {"A": (0.05, 0.13), "B": (0.2, 0.35), "C": (0.42, 0.58), "D": (0.68, 0.82)}  # area
SPECK_MM = (0.1, 0.6)  # diameter of a micro-calcification; never drawn below 2 px, or it would vanish
SPECK_PEAK = (0.18, 0.4)  # display value added at a speck's centre, times lesion_contrast
MASS_MM = (5.0, 12.0)  # radius of a mass
CLUSTER_MM = (3.0, 7.0)  # radius of a cluster
MASS_PEAK = (0.22, 0.36)  # display value added at a mass's centre, times lesion_contrast
IMPLANT_SHARE = 0.68  # of the nipple's distance from the chest wall
BLUR_MM = 0.06  # Gaussian sigma of the detector
NOISE = 0.012  # quantum noise of a 0.085 mm pixel in fat; larger pixels collect more photons
PADDING_SHARE = (0.38, 0.50)  # columns at the maximum in VinDr's Planmed images
VIEWS = (("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO"))
LESIONS = ("mass", "spiculated_mass", "calcification")
CATEGORY = dict.fromkeys(LESIONS, "Mass") | {"calcification": "Suspicious Calcification"}
BIRADS = {"mass": (3, 4), "spiculated_mass": (5, 5), "calcification": (4, 5)}  # lowest, highest
TRAPS = tuple(
    "none white_padding grey_padding inverted film implant empty label_on_breast bright_frame "
    "noisy_background noisy_frame large_breast film_rim chest_canvas tape_across".split()
)
STAGES = ("contour", "texture", "gland", "strands", "skin", "lesions", "noise", "overlay")

BREAST_COLUMNS = ["study_id", "series_id", "image_id", "laterality", "view_position", "height"]
BREAST_COLUMNS += ["width", "breast_birads", "breast_density", "split"]
BOX = ["xmin", "ymin", "xmax", "ymax"]
FINDING_COLUMNS = [*BREAST_COLUMNS[:-1], "finding_categories", "finding_birads", *BOX, "split"]
LESION_COLUMNS = ["study_id", "image_id", "lesion", "kind", "y", "x", "radius_mm", *BOX]
SPECK_COLUMNS = ["study_id", "image_id", "lesion", "y", "x", "diameter_mm", "diameter_px"]
TABLES = {  # file -> columns
    "truth/images.csv": ["study_id", "image_id", "spacing_mm", "bit_depth", "trap"],
    "truth/lesions.csv": LESION_COLUMNS,
    "truth/specks.csv": SPECK_COLUMNS,
    "finding_annotations.csv": FINDING_COLUMNS,
    "breast-level_annotations.csv": BREAST_COLUMNS,
}


@dataclass(frozen=True)
class PhantomSpec:
    """All that decides an image; ValueError names the first value that cannot be drawn."""

    seed: int = 0  # with study, laterality and view: the random numbers
    study: int = 0  # number of the study, 0 or more
    laterality: str = "L"  # L (chest wall on the left of the image) or R
    view: str = "CC"  # CC or MLO
    density: str = "B"  # A (fat) to D (dense)
    height: int = 1024  # rows, pixels
    width: int = 832  # columns, pixels
    spacing_mm: float = 0.0  # pixel size; 0 = the image shows VinDr's field of view, 299 x 238 mm
    bit_depth: int = 16  # 8, 12 (stored in 16) or 16
    lesions: tuple[str, ...] = ()  # of LESIONS
    lesion_contrast: float = 1.0  # factor on the lesions' brightness; 0 = invisible
    trap: str = "none"  # of TRAPS

    def __post_init__(self) -> None:
        """Check every value, so that no drawing function has to."""
        allowed = {"laterality": "LR", "view": ("CC", "MLO"), "density": "ABCD"}
        for name, values in {**allowed, "bit_depth": (8, 12, 16), "trap": TRAPS}.items():
            if getattr(self, name) not in tuple(values):
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be of {tuple(values)}")
        if unknown := set(self.lesions) - set(LESIONS):
            raise ValueError(f"lesions holds {sorted(unknown)}, must be of {LESIONS}")
        if min(self.height, self.width) < 64 or max(self.height, self.width) > 16_000:
            raise ValueError(f"size {self.height} x {self.width} is outside 64 to 16000 pixels")
        for name in ("seed", "study", "spacing_mm", "lesion_contrast"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")

    @property
    def spacing(self) -> float:
        """Pixel size in mm."""
        return self.spacing_mm or max(FIELD_MM[0] / self.height, FIELD_MM[1] / self.width)

    def rng(self, stage: str) -> np.random.Generator:
        """Random numbers of one stage, so that a change in one leaves the others as they were."""
        keys = [self.seed, self.study, VIEWS.index((self.laterality, self.view))]
        return np.random.default_rng([*keys, STAGES.index(stage)])


@dataclass
class Lesion:
    """Truth about one lesion, in pixels of the final image unless named otherwise."""

    kind: str  # of LESIONS
    y: float  # centre, row
    x: float  # centre, column
    radius_mm: float
    box: tuple[int, int, int, int]  # xmin, ymin, xmax, ymax; the latter two exclusive
    specks: list[tuple[float, float, float, float]] = field(default_factory=list)
    # each speck: row, column, diameter in mm, diameter drawn in pixels (2 or more)


@dataclass
class Phantom:
    """An image and what is true of it."""

    spec: PhantomSpec
    image: np.ndarray  # (H, W) uint8 or uint16
    breast: np.ndarray  # (H, W) bool
    pectoral: np.ndarray  # (H, W) bool, inside breast
    foreign: np.ndarray  # (H, W) bool, what label, marker, tape, scanner edge, padding or frame cover
    lesions: list[Lesion]


def make_phantom(spec: PhantomSpec) -> Phantom:
    """Draw one image: chest wall on the left up to the grey values, mirrored at the end for R."""
    anatomy = make_anatomy(spec)
    lesions: list[Lesion] = []
    if spec.trap == "empty":
        signal = np.zeros((spec.height, spec.width), np.float32)
    else:
        tissue = make_tissue(spec, anatomy)
        lesions = add_lesions(tissue, spec, anatomy)
        signal = detect(tissue, spec, anatomy)
    signal, foreign = add_overlays(signal, spec, anatomy)
    image = to_grey_values(signal, spec.bit_depth)
    foreign |= covered_by_trap(spec, anatomy)
    image = set_trap_values(image, spec, anatomy)
    masks = [anatomy.breast, anatomy.pectoral, foreign]
    if spec.laterality == "R":
        image, *masks = (np.ascontiguousarray(array[:, ::-1]) for array in (image, *masks))
        lesions = [mirror(lesion, spec.width) for lesion in lesions]
    breast, pectoral, foreign = masks
    return Phantom(spec, image, breast, pectoral, foreign, lesions)


# ---- 2 Contour -----------------------------------------------------------------------------------


@dataclass
class Anatomy:
    """Geometry of one breast, chest wall at column 0; lengths in mm, arrays (H, W)."""

    spacing: float
    nipple: tuple[float, float]  # y, x
    columns: int  # columns that hold tissue: later stages work on [:, :columns] only
    used_columns: int  # columns outside the padding
    breast: np.ndarray  # bool
    pectoral: np.ndarray  # bool
    depth: np.ndarray  # (H, columns) float32, distance from the skin surface, 0 outside


def make_anatomy(spec: PhantomSpec) -> Anatomy:
    """Place the breast in the field of view; with padding, in the columns that remain."""
    rng = spec.rng("contour")
    spacing, used = spec.spacing, spec.width
    if spec.trap in ("white_padding", "grey_padding"):
        used -= int(np.ceil(rng.uniform(*PADDING_SHARE) * (spec.width - 2)))
    field_y, field_x = spec.height * spacing, used * spacing
    y = (np.arange(spec.height) + 0.5) * spacing
    x = (np.arange(spec.width) + 0.5) * spacing
    woman = np.random.default_rng([spec.seed, spec.study])  # both breasts and views alike
    fills = spec.trap == "large_breast"
    reach, nipple_y = breast_outline(spec.view, y, field_y, field_x, woman, rng, fills)
    breast = x[None] < reach[:, None]
    edge = pectoral_edge(y, nipple_y, reach, rng)
    pectoral = (x[None] < edge[:, None]) & breast & (spec.view == "MLO")
    if spec.trap == "empty":
        breast, pectoral = np.zeros_like(breast), np.zeros_like(pectoral)
    columns = min(spec.width, int(reach.max() / spacing) + 2)
    # the image border is no skin: distanceTransform measures to the nearest zero pixel only
    depth = cv2.distanceTransform(breast[:, :columns].astype(np.uint8), cv2.DIST_L2, 5) * spacing
    nipple = (nipple_y, float(np.interp(nipple_y, y, reach)))
    return Anatomy(spacing, nipple, columns, used, breast, pectoral, depth)


def breast_outline(
    view: str,
    y: np.ndarray,
    field_y: float,
    field_x: float,
    woman: np.random.Generator,
    rng: np.random.Generator,
    fills: bool,
) -> tuple[np.ndarray, float]:
    """Return the skin's distance from the chest wall per row (H,) and the nipple's row, in mm.

    A breast that `fills` the field of view leaves air in the corners alone.
    """
    flare = woman.uniform(0.05, 0.5)  # 0 = half ellipse, 1 = concave towards the chest wall
    size = woman.uniform(70, 125) * rng.uniform(0.95, 1.05)
    reach = 1.05 * field_x if fills else min(size, 0.85 * field_x)
    if view == "CC":
        half = 0.7 * field_y if fills else min(woman.uniform(0.95, 1.25) * reach, 0.45 * field_y)
        nipple_y = field_y * 0.5 + rng.uniform(-0.6, 0.6) * (0.48 * field_y - half)
        above, below = half * rng.uniform(0.92, 1.05), half * rng.uniform(0.92, 1.05)
    else:
        nipple_y = field_y * rng.uniform(0.52, 0.62)
        above, below = nipple_y * rng.uniform(1, 1.2), field_y * (0.75 if fills else 0.35)
        below = min(below, 1.1 * reach)
    t = np.where(y < nipple_y, (nipple_y - y) / above, (y - nipple_y) / below).clip(0, 1)
    ellipse, bell = np.sqrt(1 - t**2), (1 + np.cos(np.pi * t)) / 2
    shape = (1 - flare) * ellipse + flare * bell
    if view == "MLO":  # the axillary tail runs out of the image at the top
        tail = rng.uniform(0.4, 0.6)
        shape = np.where(y < nipple_y, tail + (1 - tail) * (0.25 * ellipse + 0.75 * bell), shape)
    waves = rng.normal(0, 0.006, 4) * np.sin(np.outer(y / 25, [1, 1.7, 2.3, 3.1]) + rng.uniform(0, 6))
    bump = rng.uniform(0, 0.06) * np.exp(-(((y - nipple_y) / (0.05 * reach)) ** 2))
    return reach * shape * (1 + waves.sum(1) + bump), nipple_y


def pectoral_edge(
    y: np.ndarray, nipple_y: float, reach: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the muscle's edge per row (H,) in mm: a slightly bent line to the chest wall."""
    top = reach[0] * rng.uniform(0.55, 0.85)
    length = nipple_y * rng.uniform(0.75, 1.1)
    t = (y / length).clip(0, 1)
    bend = rng.uniform(-0.06, 0.26)  # convex in most women, concave in some
    edge = top * (1 - t + bend * np.sin(np.pi * t))
    return np.where(y < length, edge.clip(0), 0)


# ---- 3 Tissue ------------------------------------------------------------------------------------


def power_law_noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    spacing: float,
    beta: float = BETA,
    longest_mm: float = LONGEST_MM,
    shortest_mm: float = 0.0,
    stretch: float = 1.0,
) -> np.ndarray:
    """Return periodic Gaussian noise, (H, W) float32, mean 0, std 1, power 1/f^beta.

    Flat above longest_mm, cut below shortest_mm; stretch > 1 elongates it along the rows.
    """
    white = rng.standard_normal(shape, np.float32)
    fy = fft.fftfreq(shape[0], spacing).astype(np.float32)[:, None]
    fx = fft.rfftfreq(shape[1], spacing).astype(np.float32)[None] * np.float32(stretch)
    squared = fx**2 + fy**2
    gain = (squared + np.float32(longest_mm**-2)) ** np.float32(-beta / 4)  # amplitude = sqrt(power)
    if shortest_mm:
        gain *= np.exp(-squared * np.float32(shortest_mm**2))
    gain[0, 0] = 0
    noise = fft.irfft2(fft.rfft2(white) * gain, s=shape)
    return (noise / noise.std()).astype(np.float32)


def fan_coordinates(shape: tuple[int, int], anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Return (u, v) in mm, both (H, W) float32: ducts and ligaments follow lines of constant v.

    The lines run to the nipple and are closest there, without meeting in one point.
    """
    y = ((np.arange(shape[0], dtype=np.float32) + 0.5) * anatomy.spacing - anatomy.nipple[0])[:, None]
    x = ((np.arange(shape[1], dtype=np.float32) + 0.5) * anatomy.spacing)[None]
    back = (anatomy.nipple[1] - x).clip(0)
    width = 0.45 + 0.55 * back / anatomy.nipple[1]
    return np.broadcast_to(x, shape) + 0.0 * y, (y / width).astype(np.float32)


def sample(noise: np.ndarray, u: np.ndarray, v: np.ndarray, spacing: float) -> np.ndarray:
    """Look the periodic noise up at (u, v) mm; shape of u, float32."""
    return cv2.remap(
        noise,
        (u / spacing).astype(np.float32),
        (v / spacing).astype(np.float32),
        cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_WRAP,
    )


def coarse_noise(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, anatomy: Anatomy, wavelength: float
) -> np.ndarray:
    """Return smooth noise of one wavelength (mm) along the fan; made on a grid of a sixth of it."""
    grid = max(wavelength / 6, anatomy.spacing)
    side = int(min(400 / grid, 1024)) + 8
    noise = power_law_noise(rng, (side, side), grid, 0.0, 1e3, wavelength / 2, stretch=0.6)
    return sample(noise, u, v, grid)


def septa(noise: np.ndarray, width_mm: float, spacing: float) -> np.ndarray:
    """Return thin bright lines along the noise's zero crossings, 0 to 1: walls of fat lobules."""
    slope_y = cv2.Sobel(noise, cv2.CV_32F, 0, 1, ksize=3, scale=0.125 / spacing)
    slope_x = cv2.Sobel(noise, cv2.CV_32F, 1, 0, ksize=3, scale=0.125 / spacing)
    distance = noise / (np.hypot(slope_x, slope_y) + 0.02)  # mm, first-order
    return np.exp(-((distance / max(width_mm, 0.7 * spacing)) ** 2))


def make_tissue(spec: PhantomSpec, anatomy: Anatomy) -> np.ndarray:
    """Return the display value of the lesion-free breast, (H, columns) float32, 0 outside."""
    shape, spacing = anatomy.depth.shape, anatomy.spacing
    u, v = fan_coordinates(shape, anatomy)
    rng = spec.rng("texture")
    padded = (fft.next_fast_len(shape[0]), fft.next_fast_len(shape[1]))
    noise = power_law_noise(rng, padded, spacing, stretch=1.25)
    texture = sample(noise, u, v, spacing)
    gland = gland_share(spec, anatomy, texture, u, v)
    rng = spec.rng("strands")
    tissue = FAT * (1 + 0.22 * texture)
    tissue += gland * (GLAND - FAT) * (1 + 0.22 * texture)
    for wavelength, width in ((25, 0.9), (13, 0.6)):
        lobules = coarse_noise(rng, u, v, anatomy, wavelength)
        strength = (0.4 + 0.6 * coarse_noise(rng, u, v, anatomy, 15)).clip(0, 2)
        tissue += 0.08 * strength * septa(lobules, width, spacing) * (0.6 + gland)
    tissue += strands(rng, anatomy)
    if spec.view == "MLO":
        tissue = add_muscle(tissue, texture, anatomy)
    if spec.trap == "implant":
        tissue = add_implant(tissue, anatomy)
    return add_skin(tissue, anatomy, spec.rng("skin"))


def gland_share(
    spec: PhantomSpec, anatomy: Anatomy, texture: np.ndarray, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Return the fibroglandular share of every pixel, 0 to 1: a ragged cone towards the nipple."""
    rng = spec.rng("gland")
    along = u / anatomy.nipple[1]  # 0 chest wall, 1 nipple
    size = min(anatomy.nipple[1], 0.3 * spec.height * anatomy.spacing)
    cone = 1 - (v / (rng.uniform(0.7, 1.0) * size) - rng.uniform(-0.2, 0.1)) ** 2
    cone -= ((along - rng.uniform(0.5, 0.7)) / 0.5) ** 2
    cone -= 3 * np.exp(-anatomy.depth / rng.uniform(4, 7))  # subcutaneous fat
    lobes = coarse_noise(rng, u, v, anatomy, 24) + 0.6 * coarse_noise(rng, u, v, anatomy, 10)
    score = cone + 0.4 * lobes + 0.4 * texture
    inside = (anatomy.breast & ~anatomy.pectoral)[::4, : anatomy.columns : 4]
    share = rng.uniform(*GLAND_SHARE[spec.density])
    threshold = np.quantile(score[::4, ::4][inside], 1 - share) if inside.any() else 0.0
    return 1 / (1 + np.exp(-((score - threshold) / 0.35).clip(-20, 20)))


def strands(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """Return Cooper's ligaments (thin, many) and vessels (few, wider) along the fan, float32."""
    canvas = np.zeros(anatomy.depth.shape, np.uint8)
    nipple_y, nipple_x = anatomy.nipple
    vessels = 6
    for number in range(260):
        vessel = number >= 260 - vessels
        length = rng.uniform(0.3, 0.8) * nipple_x if vessel else rng.uniform(8, 60)
        start = np.array([rng.normal(nipple_y, 0.5 * nipple_x), rng.uniform(0, 0.95) * nipple_x])
        heading = np.arctan2(nipple_y - start[0], nipple_x - start[1]) + rng.normal(0, 0.5)
        turns = np.cumsum(rng.normal(0, 0.2 if vessel else 0.1, 24)) + heading
        steps = np.stack([np.sin(turns), np.cos(turns)], 1) * length / 24
        points = (start + np.cumsum(steps, 0))[:, ::-1] / anatomy.spacing
        width = (rng.uniform(1, 2) if vessel else rng.uniform(0.25, 0.7)) / anatomy.spacing
        value = rng.uniform(30, 140) * min(width, 1.0)
        draw_line(canvas, points, width, value)
    sigma = max(0.2 / anatomy.spacing, 0.5)
    return cv2.GaussianBlur(canvas.astype(np.float32) * (0.17 / 140), (0, 0), sigma)


def draw_line(canvas: np.ndarray, points: np.ndarray, width: float, value: float) -> None:
    """Draw an anti-aliased polyline in place; points (N, 2) as x, y in pixels, canvas uint8."""
    fixed = np.round(points * 16).astype(np.int32)
    thickness = max(1, round(width))
    cv2.polylines(canvas, [fixed], False, (float(value),), thickness, cv2.LINE_AA, shift=4)


def add_muscle(tissue: np.ndarray, texture: np.ndarray, anatomy: Anatomy) -> np.ndarray:
    """Blend the pectoral muscle in with an edge about 1 mm wide; it hides most of the texture."""
    shape = anatomy.pectoral[:, : anatomy.columns].astype(np.float32)
    inner = cv2.GaussianBlur(shape, (0, 0), max(8 / anatomy.spacing, 1.0)) ** 2
    muscle = cv2.GaussianBlur(shape, (0, 0), max(0.6 / anatomy.spacing, 0.6))
    value = MUSCLE * (0.85 + 0.3 * inner) + 0.02 * texture + 0.25 * (tissue - FAT)
    return tissue + muscle * (value - tissue)


def implant_radius(anatomy: Anatomy) -> np.ndarray:
    """Return the distance from the implant's centre in units of its radius, (H, columns)."""
    rows, columns = anatomy.depth.shape
    y = ((np.arange(rows) + 0.5) * anatomy.spacing - anatomy.nipple[0])[:, None]
    x = ((np.arange(columns) + 0.5) * anatomy.spacing)[None]
    return np.hypot(x, 0.95 * y) / (IMPLANT_SHARE * anatomy.nipple[1])


def add_implant(tissue: np.ndarray, anatomy: Anatomy) -> np.ndarray:
    """Put a nearly saturated smooth ellipse with a brighter shell behind the gland."""
    radius_mm = IMPLANT_SHARE * anatomy.nipple[1]
    outside_mm = (implant_radius(anatomy) - 1) * radius_mm
    share = 1 / (1 + np.exp((2 * outside_mm).clip(-30, 30)))
    shell = np.exp(-((outside_mm + 1) ** 2))
    return tissue + share * (0.82 + 0.1 * (tissue - FAT) - tissue) + 0.1 * shell


def add_skin(tissue: np.ndarray, anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
    """Let the compressed breast thin out towards its edge and add the skin line; 0 outside."""
    roundness = rng.uniform(12, 22)  # mm over which the thickness falls
    thickness = np.sqrt(1 - (1 - (anatomy.depth / roundness).clip(0, 1)) ** 2)
    # "for presentation" processing flattens the periphery but leaves part of the fall-off
    edge = 1 - np.exp(-anatomy.depth / 0.5)
    skin = rng.uniform(0.2, 0.45) * np.exp(-((anatomy.depth / rng.uniform(1.5, 2.2)) ** 2))
    value = tissue * (0.45 + 0.55 * thickness) * edge + skin * edge
    return np.where(anatomy.breast[:, : anatomy.columns], value, 0).astype(np.float32)


# ---- 4 Lesions -----------------------------------------------------------------------------------


def add_lesions(tissue: np.ndarray, spec: PhantomSpec, anatomy: Anatomy) -> list[Lesion]:
    """Add the lesions to the tissue in place and return the truth about them."""
    rng = spec.rng("lesions")
    spacing = anatomy.spacing
    # mm to the skin; 0 where no lesion is to lie
    free = np.where(anatomy.pectoral[:, : anatomy.columns], 0, anatomy.depth).astype(np.float32)
    if spec.trap == "implant":
        free[implant_radius(anatomy) < 1] = 0
    lesions = []
    for kind in spec.lesions:
        size = rng.uniform(*(CLUSTER_MM if kind == "calcification" else MASS_MM))
        radius = max(min(size, 0.3 * float(free.max())), 2 * spacing)
        centre = lesion_centre(free, 1.9 * radius + 3, rng)
        reach = int(np.ceil(2.2 * radius / spacing)) + 2
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1] * np.float32(spacing)
        specks: list[tuple[float, float, float, float]] = []
        if kind == "calcification":
            patch, specks = draw_cluster(y, x, radius, spacing, rng)
        else:
            patch = draw_mass(y, x, radius, kind, spacing, rng)
        box = add_patch(tissue, spec.lesion_contrast, patch, centre, anatomy.depth > 0)
        row, column = centre
        specks = [(row + sy, column + sx, mm, px) for sy, sx, mm, px in specks]
        lesions.append(Lesion(kind, row, column, radius, box, specks))
        apart = cv2.circle(free.copy(), (column, row), 2 * reach, (0.0,), -1)
        free = apart if apart.any() else free  # the next one keeps its distance where it can
    return lesions


def lesion_centre(free: np.ndarray, margin_mm: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a pixel (row, column) at least margin_mm deep; among the deepest where none is."""
    rows, columns = np.nonzero(free >= min(margin_mm, 0.9 * float(free.max())))
    pick = rng.integers(len(rows))
    return int(rows[pick]), int(columns[pick])


def draw_mass(
    y: np.ndarray, x: np.ndarray, radius: float, kind: str, spacing: float, rng: np.random.Generator
) -> np.ndarray:
    """Return a mass on the patch of mm offsets (y, x), float32: lobulated, or a spiculated core."""
    spiculated = kind == "spiculated_mass"
    distance, angle = np.hypot(y, x), np.arctan2(y, x)
    lobes = np.zeros_like(distance)
    for order in range(2, 8):
        lobes += rng.normal(0, 0.3 if spiculated else 0.12) / order * np.cos(order * angle + order)
    core = radius * (0.75 if spiculated else 0.95) * (1 + lobes).clip(0.6, 1.4)
    mass = np.sqrt((1 - (distance / core) ** 2).clip(0, 1)) ** 0.8
    if spiculated:
        canvas = np.zeros(mass.shape, np.uint8)
        middle = mass.shape[0] // 2
        for turn in np.linspace(0, 2 * np.pi, int(rng.integers(16, 28)), endpoint=False):
            heading = turn + rng.normal(0, 0.15) + np.cumsum(rng.normal(0, 0.06, 12))
            length = radius * rng.uniform(1.2, 2.0) / spacing / 12
            steps = np.stack([np.cos(heading), np.sin(heading)], 1) * length
            points = np.vstack([np.zeros(2), np.cumsum(steps, 0)]) + middle
            for count, width in ((13, 0.3), (9, 0.6), (6, 1.0)):  # tapered: thick at the core
                draw_line(canvas, points[:count], width / spacing, 255)
        spicules = canvas.astype(np.float32) / 255 * np.exp(-((distance / (1.8 * radius)) ** 2))
        mass = np.maximum(mass, 0.75 * spicules)
    mass = cv2.GaussianBlur(mass.astype(np.float32), (0, 0), max(0.3 / spacing, 0.6))
    return mass * np.float32(rng.uniform(*MASS_PEAK) / mass.max())


def draw_cluster(
    y: np.ndarray, x: np.ndarray, radius: float, spacing: float, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[float, float, float, float]]]:
    """Return specks on the patch, float32, and per speck (row, column offset, mm, drawn px)."""
    patch = np.zeros(y.shape, np.float32)
    specks = []
    for _ in range(int(rng.integers(8, 22))):
        away, turn = radius * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        sy, sx = away * np.sin(turn), away * np.cos(turn)
        diameter = rng.uniform(*SPECK_MM)
        drawn = max(diameter / spacing, 2.0)
        peak = rng.uniform(*SPECK_PEAK) * (0.6 + 0.4 * diameter / SPECK_MM[1])
        # a disc with a soft rim: half its height at the drawn diameter
        squared = ((y - sy) ** 2 + (x - sx) ** 2) / (drawn * spacing / 2) ** 2
        patch = np.maximum(patch, peak * np.exp2(-(squared**1.5)))
        specks.append((sy / spacing, sx / spacing, diameter, drawn))
    return patch.astype(np.float32), specks


def add_patch(
    tissue: np.ndarray, factor: float, patch: np.ndarray, centre: tuple[int, int], inside: np.ndarray
) -> tuple[int, int, int, int]:
    """Add a patch around centre where inside is true; return the box of its visible part."""
    reach = patch.shape[0] // 2
    top, left = centre[0] - reach, centre[1] - reach
    rows = slice(max(top, 0), min(top + patch.shape[0], tissue.shape[0]))
    columns = slice(max(left, 0), min(left + patch.shape[1], tissue.shape[1]))
    part = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    part = part * inside[rows, columns]
    tissue[rows, columns] += factor * part
    y, x = np.nonzero(part > 0.05 * part.max())
    y, x = y + rows.start, x + columns.start
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def mirror(lesion: Lesion, width: int) -> Lesion:
    """Return the lesion as it lies in the mirrored image of that many columns."""
    xmin, ymin, xmax, ymax = lesion.box
    specks = [(y, width - 1 - x, mm, px) for y, x, mm, px in lesion.specks]
    box = (width - xmax, ymin, width - xmin, ymax)
    return replace(lesion, x=width - 1 - lesion.x, box=box, specks=specks)


# ---- 5 Detector ----------------------------------------------------------------------------------


def detect(tissue: np.ndarray, spec: PhantomSpec, anatomy: Anatomy) -> np.ndarray:
    """Blur, then add quantum noise; return (H, W) float32 with air at exactly 0."""
    sigma = max(BLUR_MM / anatomy.spacing, 0.4)
    tissue = cv2.GaussianBlur(tissue, (0, 0), sigma)
    # the relative noise of N photons is 1/sqrt(N): N grows with the pixel's area and falls
    # exponentially with the attenuation, which the display value follows
    level = NOISE * 0.085 / anatomy.spacing * np.exp(1.2 * (tissue - FAT))
    noisy = tissue + level * spec.rng("noise").standard_normal(tissue.shape, np.float32)
    signal = np.zeros((spec.height, spec.width), np.float32)
    signal[:, : anatomy.columns] = np.where(anatomy.depth > 0, noisy, 0)
    return signal


def to_grey_values(signal: np.ndarray, bit_depth: int) -> np.ndarray:
    """Map 0-1 to the full range, clipped; uint8, or uint16 for 12 and 16 bits."""
    top = 2**bit_depth - 1
    return np.rint(signal.clip(0, 1) * top).astype(np.uint8 if bit_depth == 8 else np.uint16)


def add_overlays(
    signal: np.ndarray, spec: PhantomSpec, anatomy: Anatomy
) -> tuple[np.ndarray, np.ndarray]:
    """Burn in the view label, in half the images a nipple marker, and the trap's additions.

    Returns the signal and where label, marker, tape and scanner edges cover it, each (H, W).
    """
    rng = spec.rng("overlay")
    foreign = np.zeros(signal.shape, bool)
    if spec.trap == "film":
        signal, foreign = add_film(signal, rng)
    if spec.trap == "film_rim":
        signal, foreign = add_rim(signal, rng)
    if spec.trap == "chest_canvas":
        foreign[:, : int(rng.uniform(0.06, 0.12) * spec.width)] = True
        signal = np.where(foreign, np.float32(0), signal)
    if spec.trap == "tape_across":
        signal, foreign = add_tape(signal, rng, anatomy)
    if spec.trap == "noisy_frame":
        foreign = frame_of(signal.shape, max(1, int(rng.uniform(0.01, 0.025) * spec.width)))
        signal[foreign] = rng.uniform(0.75, 1, int(foreign.sum()))
    if spec.trap == "noisy_background":
        air = rng.normal(0.03, 0.012, signal.shape).astype(np.float32).clip(0)
        signal = np.maximum(signal, air)
    without = signal.copy()
    label = draw_label(f"{spec.laterality} {spec.view}", max(5 / anatomy.spacing, 8))
    label = label[:, ::-1] if spec.laterality == "R" else label  # the image is mirrored later
    top, left = int(0.05 * spec.height), anatomy.used_columns - int(1.2 * label.shape[1])
    if spec.trap == "label_on_breast":
        top = int(anatomy.nipple[0] / anatomy.spacing * 0.8)
        left = int(anatomy.breast[top].sum()) - label.shape[1] // 3
    left = int(np.clip(left, 0, spec.width - label.shape[1]))
    area = signal[top : top + label.shape[0], left : left + label.shape[1]]
    np.maximum(area, label[: area.shape[0]], out=area)
    if rng.uniform() < 0.5 and anatomy.breast.any():
        radius = max(1.2 / anatomy.spacing, 1.5)
        x, y = (anatomy.nipple[1] / anatomy.spacing + 1.3 * radius, anatomy.nipple[0] / anatomy.spacing)
        centre = (round(16 * x), round(16 * y))
        cv2.circle(signal, centre, round(16 * radius), (0.97,), -1, cv2.LINE_8, 4)
    return signal, foreign | (signal != without)


def draw_label(text: str, height: float) -> np.ndarray:
    """Return the text in white on black, (h, w) float32 0 to 1, capitals about height px tall."""
    scale = height / 22  # the font's capitals are 22 px tall at scale 1
    thickness = max(1, round(height / 9))
    (width, tall), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    canvas = np.zeros((tall + 2 * thickness, width + 2 * thickness), np.uint8)
    origin = (thickness, tall + thickness)
    cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (255,), thickness, cv2.LINE_AA)
    return canvas.astype(np.float32) / 255


# ---- 6 Traps -------------------------------------------------------------------------------------


def add_film(signal: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the image as a digitised film: fog, grain, bright scanner edges, a strip of tape.

    And where edges and tape are, (H, W) bool.
    """
    height, width = signal.shape
    fog = np.float32(rng.uniform(0.05, 0.12)) + np.linspace(0, 0.03, width, dtype=np.float32)
    film = fog + (1 - fog) * signal
    film += rng.normal(0, 0.008, film.shape).astype(np.float32)
    strip = max(2, int(rng.uniform(0.01, 0.025) * width))
    film[:, -strip:] = rng.uniform(0.75, 1, (height, strip))
    film[-strip // 2 :, :] = rng.uniform(0.75, 1, (strip // 2 + strip % 2, width))
    centre = (0.9 * width, rng.uniform(0.8, 0.9) * height)
    size = (0.3 * width, 0.04 * height)
    corners = cv2.boxPoints((centre, size, rng.uniform(-50, -20)))
    tape = cv2.fillConvexPoly(np.zeros_like(film), np.rint(corners).astype(np.int32), (1.0,))
    foreign = tape > 0
    foreign[:, -strip:], foreign[-strip // 2 :] = True, True
    return np.maximum(film, tape * np.float32(rng.uniform(0.35, 0.7))), foreign


def add_rim(signal: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the image as a film scanned askew, and where white canvas and fog are, (H, W) bool.

    The canvas shows beside the chest wall, from where light has leaked into the film; at the lower end
    the film is fogged beyond the collimator.
    """
    height, width = signal.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    depth, tilt = rng.uniform(0.008, 0.015) * width, rng.uniform(-0.006, 0.006)
    from_edge = x - depth - tilt * (y - height / 2)
    fog = y > height - rng.uniform(0.02, 0.035) * height + rng.uniform(-0.02, 0.02) * x
    glow = np.float32(rng.uniform(0.1, 0.2)) * np.exp(-from_edge.clip(0) / (0.015 * width))
    film = np.where(fog, np.float32(rng.uniform(0.15, 0.3)), np.maximum(signal, glow))
    canvas = from_edge < 0
    return np.where(canvas, np.float32(0.98), film), canvas | fog


def add_tape(
    signal: np.ndarray, rng: np.random.Generator, anatomy: Anatomy
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image with a strip of tape from the skin to the far side, and where it lies, (H, W)."""
    height, width = signal.shape
    row = rng.uniform(0.35, 0.65) * height
    start = int(anatomy.breast[int(row)].sum()) - 4 / anatomy.spacing
    size = (2 * (width - start), 8 / anatomy.spacing)
    corners = cv2.boxPoints(((width, row), size, rng.uniform(-8, 8)))
    tape = cv2.fillConvexPoly(np.zeros_like(signal), np.rint(corners).astype(np.int32), (1.0,))
    return np.maximum(signal, tape * np.float32(rng.uniform(0.3, 0.5))), tape > 0


def frame_of(shape: tuple[int, ...], width: int) -> np.ndarray:
    """The pixels less than `width` from the border, (H, W) bool."""
    frame = np.ones(shape, bool)
    frame[width:-width, width:-width] = False
    return frame


def covered_by_trap(spec: PhantomSpec, anatomy: Anatomy) -> np.ndarray:
    """Where padding or a frame replaces the image, (H, W) bool."""
    empty = np.zeros((spec.height, spec.width), np.uint16)
    return (spec.trap != "inverted") & (set_trap_values(empty, spec, anatomy) > 0)


def set_trap_values(image: np.ndarray, spec: PhantomSpec, anatomy: Anatomy) -> np.ndarray:
    """Apply the traps that are exact in grey values: padding, frame, inversion."""
    top = 2**spec.bit_depth - 1
    if spec.trap == "white_padding":
        image[:, anatomy.used_columns :] = top
    if spec.trap == "grey_padding":
        image[:, anatomy.used_columns :] = top // 2
    if spec.trap == "bright_frame":
        image[frame_of(image.shape, max(2, min(image.shape) // 200))] = top
    return top - image if spec.trap == "inverted" else image


# ---- 7 Archive -----------------------------------------------------------------------------------


def plan_study(
    template: PhantomSpec, study: int, lesion_share: float, mixed_traps: bool = False
) -> list[PhantomSpec]:
    """Return the specs of a study's four images; a lesion shows in both views of its breast.

    One breast is chosen for a mass, the other for a cluster; each gets it with lesion_share.
    """
    rng = np.random.default_rng([template.seed, study, 1])
    density = str(rng.choice(list("ABCD"), p=[0.1, 0.4, 0.4, 0.1]))  # shares of women, ACR atlas
    trap = TRAPS[study % len(TRAPS)] if mixed_traps else template.trap
    mass = str(rng.choice(["mass", "spiculated_mass"]))
    kinds = dict(zip(rng.permutation(["L", "R"]), (mass, "calcification"), strict=True))
    found = [side for side in "LR" if rng.uniform() < lesion_share and trap != "empty"]
    spec = replace(template, study=study, density=density, trap=trap)
    return [
        replace(spec, laterality=side, view=view, lesions=(kinds[side],) if side in found else ())
        for side, view in VIEWS
    ]


def identifier(*parts: object) -> str:
    """Return 32 hexadecimal characters, as VinDr's ids are."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]


def choose_test_studies(seed: int, studies: int, test_share: float) -> set[int]:
    """Return the numbers of the test studies; both splits hold one where there are two studies."""
    count = round(studies * test_share)
    if studies >= 2:
        count = min(max(count, 1), studies - 1)
    order = np.random.default_rng([seed, studies]).permutation(studies)
    return set(order[:count].tolist())


def birads(spec: PhantomSpec) -> str:
    """Return the assessment of a breast, the same for both of its views."""
    rng = np.random.default_rng([spec.seed, spec.study, "LR".index(spec.laterality), 2])
    lowest, highest = max((BIRADS[kind] for kind in spec.lesions), default=(1, 2))
    return f"BI-RADS {rng.integers(lowest, highest + 1)}"


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename, so that no half-written file is ever seen."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a grey image of 8 or 16 bits without loss."""
    done, content = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 2])
    if not done:
        raise OSError(f"{path}: the image could not be encoded as PNG")
    write_file(path, content.tobytes())


def write_phantom(root: Path, phantom: Phantom, split: str, tables: dict[str, list[dict]]) -> None:
    """Write one image and its masks; append its rows to the tables (file name -> rows)."""
    spec = phantom.spec
    study_id = identifier("study", spec.seed, spec.study)
    image_id = identifier("image", spec.seed, spec.study, spec.laterality, spec.view)
    key = {"study_id": study_id, "image_id": image_id}
    write_png(root / "images_png" / study_id / f"{image_id}.png", phantom.image)
    for name, mask in (("breast", phantom.breast), ("pectoral", phantom.pectoral)):
        write_png(root / "truth" / study_id / f"{image_id}_{name}.png", mask.astype(np.uint8) * 255)
    row = {
        **key,
        "series_id": identifier("series", spec.seed, spec.study),
        "laterality": spec.laterality,
        "view_position": spec.view,
        "height": spec.height,
        "width": spec.width,
        "breast_birads": birads(spec),
        "breast_density": f"DENSITY {spec.density}",
        "split": split,
    }
    tables["breast-level_annotations.csv"].append(row)
    truth = {"spacing_mm": spec.spacing, "bit_depth": spec.bit_depth, "trap": spec.trap}
    tables["truth/images.csv"].append(key | truth)
    for number, lesion in enumerate(phantom.lesions):
        box = dict(zip(BOX, map(float, lesion.box), strict=True))
        found = {"finding_categories": str([CATEGORY[lesion.kind]]), **box}
        tables["finding_annotations.csv"].append(row | found | {"finding_birads": row["breast_birads"]})
        place = {"kind": lesion.kind, "y": lesion.y, "x": lesion.x, "radius_mm": lesion.radius_mm}
        tables["truth/lesions.csv"].append({**key, "lesion": number, **place, **box})
        for speck in lesion.specks:
            values = dict(zip(SPECK_COLUMNS[3:], speck, strict=True))
            tables["truth/specks.csv"].append({**key, "lesion": number, **values})
    if not phantom.lesions:
        none = {"finding_categories": str(["No Finding"])}  # birads and box stay empty
        tables["finding_annotations.csv"].append(row | none)


def write_archive(
    output_dir: Path,
    studies: int,
    template: PhantomSpec | None = None,
    test_share: float = 0.25,
    lesion_share: float = 0.6,
    mixed_traps: bool = False,
) -> dict[str, pd.DataFrame]:
    """Write an archive of that many studies and return its tables by file name.

    The template gives seed, size, bit depth, contrast and trap. The tables are written last. An
    archive of the same studies is overwritten; ValueError where the folder holds any other.
    """
    template, root = template or PhantomSpec(), Path(output_dir)
    folders = {identifier("study", template.seed, study) for study in range(studies)}
    present = {path.name for path in root.glob("images_png/*")}
    if not 0 <= test_share <= 1 or not 0 <= lesion_share <= 1 or studies < 1:
        raise ValueError("studies must be 1 or more, test_share and lesion_share 0 to 1")
    if other := sorted(present - folders):
        raise ValueError(f"{root} holds other studies ({other[0]}, ...): name an empty output_dir")
    for folder in folders:
        (root / "images_png" / folder).mkdir(parents=True, exist_ok=True)
        (root / "truth" / folder).mkdir(parents=True, exist_ok=True)
    test = choose_test_studies(template.seed, studies, test_share)
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    for study in tqdm(range(studies), desc="studies", disable=None):  # silent without a terminal
        for spec in plan_study(template, study, lesion_share, mixed_traps):
            split = "test" if study in test else "training"
            write_phantom(root, make_phantom(spec), split, tables)
    frames = {name: pd.DataFrame(tables[name], columns=TABLES[name]) for name in TABLES}
    for name, frame in frames.items():
        write_file(root / name, frame.to_csv(index=False, lineterminator="\n").encode())
    return frames


# ---- 8 Entry -------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags; names may be written with '_' or '-'."""
    default = PhantomSpec()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, value, text in (
        ("output_dir", Path("demo/archive"), "folder to write"),
        ("studies", 8, "number of studies, four images each"),
        ("height", default.height, "rows, 64 to 16000 pixels"),
        ("width", default.width, "columns, 64 to 16000 pixels"),
        ("spacing_mm", default.spacing_mm, "pixel size; 0 = VinDr's field of view, 299 x 238 mm"),
        ("bit_depth", default.bit_depth, "8, 12 (stored in 16) or 16"),
        ("seed", default.seed, "another seed gives other women"),
        ("test_share", 0.25, "share of studies in the test split, 0 to 1"),
        ("lesion_share", 0.6, "share of breasts with a lesion; 1 = a mass and a cluster per study"),
        ("lesion_contrast", default.lesion_contrast, "factor on their brightness; 0 = invisible"),
        ("trap", default.trap, f"{', '.join(TRAPS)}, or mixed (each study another one)"),
    ):
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        help_text = f"{text} (default: {value})"
        parser.add_argument(*names, dest=name, type=type(value), default=value, help=help_text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the archive that the flags describe."""
    options = vars(parse_args(argv))
    mixed = options["trap"] == "mixed"
    options["trap"] = "none" if mixed else options["trap"]
    folder, studies = options.pop("output_dir"), options.pop("studies")
    shares = (options.pop("test_share"), options.pop("lesion_share"))
    try:
        tables = write_archive(folder, studies, PhantomSpec(**options), *shares, mixed)
    except ValueError as error:
        raise SystemExit(f"synthetic_mammograms.py: error: {error} (--help lists the flags)") from None
    except OSError as error:
        raise SystemExit(f"synthetic_mammograms.py: error: cannot write: {error}") from None
    images, lesions = tables["breast-level_annotations.csv"], tables["truth/lesions.csv"]
    test = (images["split"] == "test").sum()
    print(f"{folder}: {len(images)} images ({test} test) of {studies} studies, {len(lesions)} lesions")


if __name__ == "__main__":
    main()
