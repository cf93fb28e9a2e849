"""One image as training would take it, in one picture: polarity, window, mask, muscle and tiles."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from byol_mammo import anatomy, framing, one_scale
from byol_mammo.archive_check import BREAST_BGR, MUSCLE_BGR, Method, outlined

PAGE = re.compile(r"inspect_\d{3,}\.png")
PANEL = (520, 780)  # px, largest width and height of the image on its page
FACTS = 520  # px, width of what is told beside it
LINE_LENGTH, LINE_HEIGHT = 46, 20  # characters and px of a line of text
KEPT_BGR, REJECTED_BGR = (115, 158, 0), (0, 94, 213)  # Okabe & Ito's green and vermilion
LEGEND = {
    "breast": BREAST_BGR,
    "pectoral muscle": MUSCLE_BGR,
    "tiles kept: centres, outline of all": KEPT_BGR,
    "tiles rejected": REJECTED_BGR,
}

Fact = tuple[str, str]  # what, and how it is


@dataclass(frozen=True)
class Known:
    """What is known of an image beside its pixels, and who says so."""

    view: str = ""
    polarity: str = "auto"
    spacing_mm: float = 0.0
    polarity_from: str = ""
    spacing_from: str = ""


def look_into(path: str | Path, known: Known, method: Method) -> tuple[list[Fact], Image.Image]:
    """What training makes of an image, and its page without facts of its header.

    The page is the image beside itself with outlines of breast and muscle, the area that the tiles kept
    cover, and the centre of each tile. Raises ImageReadError.
    """
    original, small, margin = method.read(str(path), known.polarity)
    target = method.settings.target_spacing_mm
    image, small, spacing = one_scale.rescaled(path, original, small, known.spacing_mm, target)
    breast = method.find_breast(small)
    mask = small.enlarged(breast)
    muscle = small.enlarged(method.find_muscle(small, breast, known.view)) & mask
    size = method.settings.tile_size
    fits = min(image.shape) >= size
    tiles = method.score_tiles(image, mask, method.settings, spacing, muscle)
    tiles = tiles if fits and breast.any() else tiles.iloc[:0]
    low, high = method.window(image, mask)
    at_left = (anatomy.chest_side(breast) == 0) != small.mirrored
    wall = f", chest wall {'left' if at_left else 'right'}" if breast.any() else ""
    arm = f"{muscle.sum() / mask.sum():.0%} of the breast" if muscle.any() else "none found"
    facts = [
        (
            "size",
            f"{original.shape[0]} x {original.shape[1]} px, grey {original.min()} to {original.max()}",
        ),
        ("polarity", polarity_told(original, margin, known)),
        ("view used", known.view or "not known"),
        ("spacing", f"{known.spacing_mm:g} mm, {known.spacing_from}"),
        *[("scaled to", f"{target:g} mm, {image.shape[0]} x {image.shape[1]} px")] * (target > 0),
        ("window", f"{low:.0f} to {high:.0f}, 0.1 and 99.9 % of the breast"),
        ("breast", f"{mask.mean():.0%} of the image{wall}" if breast.any() else "NONE FOUND"),
        ("muscle", arm),
        *tiles_told(tiles, size, fits),
    ]
    plain = outlined(image, np.zeros_like(mask), np.zeros_like(mask), PANEL)
    marked = outlined(image, mask, muscle, PANEL)
    draw_tiles(marked, tiles, size, marked.shape[1] / image.shape[1])
    return facts, Image.fromarray(np.hstack([plain, marked])[..., ::-1])


def polarity_told(image: np.ndarray, margin: float, known: Known) -> str:
    """Which polarity the file has, who says so, and whether the image as it is used looks like it."""
    votes = framing.polarity_votes(framing.content_of(image))
    vote = framing.polarity_margin(votes) if votes else 0.0
    name = "inverted" if margin < -framing.MIN_INVERTED else "as_is"
    doubt = ", IN DOUBT" if vote < framing.CLOSE_VOTE else ""
    return f"{name}, {known.polarity_from or 'judged'}; the vote on what is used: {vote:+.2f}{doubt}"


def tiles_told(tiles: pd.DataFrame, size: int, fits: bool) -> list[Fact]:
    """How many tiles are kept, and how many are rejected by what."""
    if not fits:
        return [("tiles", f"none: the image is smaller than a tile ({size} px)")]
    rejected = tiles["rejected_by"][tiles["rejected_by"] != ""].value_counts()
    kept = len(tiles) - int(rejected.sum())
    told = [("tiles", f"{kept} of {len(tiles)} of {size} px kept")]
    return told + [("", f"{count} rejected by {name}") for name, count in rejected.items()]


def draw_tiles(picture: np.ndarray, tiles: pd.DataFrame, size: int, scale: float) -> None:
    """Draw on a picture (h, w, 3) of an image, scaled by `scale`, the outline of what the tiles kept
    cover, and each tile's centre."""
    kept = tiles["rejected_by"] == ""
    covered = np.zeros(picture.shape[:2], np.uint8)
    for x, y in tiles.loc[kept, ["x", "y"]].to_numpy() * scale:
        side = round(size * scale)
        cv2.rectangle(covered, (round(x), round(y)), (round(x) + side, round(y) + side), 1, cv2.FILLED)
    contours, _ = cv2.findContours(covered, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, KEPT_BGR, 1, cv2.LINE_AA)
    centres = (tiles[["x", "y"]].to_numpy() + size / 2) * scale
    for (x, y), is_kept in zip(centres, kept, strict=True):
        colour, radius = (KEPT_BGR, 4) if is_kept else (REJECTED_BGR, 2)
        cv2.circle(picture, (round(x), round(y)), radius, colour, cv2.FILLED, cv2.LINE_AA)


def draw_page(panels: Image.Image | None, facts: Sequence[Fact]) -> Image.Image:
    """The page of an image: its panels, what is told of it, and what the colours mean."""
    font = ImageFont.load_default(15)
    lines = []
    for name, value in facts:
        first, *rest = textwrap.wrap(value, LINE_LENGTH) or [""]
        lines += [(name, first), *(("", part) for part in rest)]
    legend = LEGEND if panels else {}
    left = panels.width if panels else 0
    height = LINE_HEIGHT * (len(lines) + len(legend) + 2)
    page = Image.new("RGB", (left + FACTS, max(height, panels.height if panels else 0)), "white")
    if panels:
        page.paste(panels, (0, 0))
    draw = ImageDraw.Draw(page)
    for row, (name, value) in enumerate(lines):
        draw.text((left + 12, 8 + LINE_HEIGHT * row), name, "#555555", font)
        draw.text((left + 132, 8 + LINE_HEIGHT * row), value, "black", font)
    for row, (name, bgr) in enumerate(legend.items(), len(lines) + 1):
        top = 8 + LINE_HEIGHT * row
        draw.rectangle((left + 12, top + 3, left + 26, top + 15), bgr[::-1])
        draw.text((left + 34, top), name, "black", font)
    return page
