"""What of an image file is the picture, in few pixels, and which way round its grey levels run.

Nothing here depends on where the picture lies in its file, or on which side of it the chest wall is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from byol_mammo import images

SEGMENT_SIDE = 560  # px, longest side of the reduced copy
FLAT_SPAN = 0.02  # share of the grey range within which a smoothed row or column has no structure
LINE_SMOOTHING = 4.0  # px of the reduced copy, sigma along a row or column, against noise
NOISE_SPAN = 3.0  # standard deviations that smoothed white noise spans: 1.5 on 400 px, with room
AIR_MARGIN = 24  # blocks of air kept around what has structure: the air's grey is measured there
CUT_SHARE = 0.2  # share of the picture's border line that is no air where it cuts tissue off
MIN_SIDE = 16  # blocks, least side of a picture that can be judged
STRIP_DEPTH = 0.1  # share of the image within which a bright strip along a side ends
STRIP_STEP = 0.12  # share of the grey range by which it is brighter than what it borders on


@dataclass(frozen=True)
class ReducedImage:
    """A mammogram without its padding, averaged to few pixels: what polarity and masks are found on."""

    image: np.ndarray  # (h, w) float32 block means, mirrored where `mirrored`
    box: tuple[slice, slice]  # rows and columns of the file's image that hold the content
    factor: int  # side of a block in px of the image
    shape: tuple[int, int]  # of the image
    brightest: int  # grey level in the image
    mirrored: bool  # so that the heavier half of the file's image comes first
    margins: tuple[int, ...]  # lines without structure in `image`: top, bottom, left, right

    def enlarged(self, mask: np.ndarray) -> np.ndarray:
        """A bool mask of `image` at the original's shape (H, W), its border interpolated."""
        full = np.zeros(self.shape, bool)
        left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
        if not width:
            return full
        # One block more on each side, where the border is interpolated.
        rows = slice(max(0, top - 1), min(mask.shape[0], top + height + 1))
        cols = slice(max(0, left - 1), min(mask.shape[1], left + width + 1))
        part = mask[rows, cols].view(np.uint8) * np.uint8(255)
        size = (part.shape[1] * self.factor, part.shape[0] * self.factor)
        grown = cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
        # Rows and columns that made no whole block follow their neighbours.
        inner = full[self.box][:, :: -1 if self.mirrored else 1]
        y1 = inner.shape[0] if rows.stop == mask.shape[0] else rows.stop * self.factor
        x1 = inner.shape[1] if cols.stop == mask.shape[1] else cols.stop * self.factor
        target = inner[rows.start * self.factor : y1, cols.start * self.factor : x1]
        if grown.shape != target.shape:
            rest = (0, target.shape[0] - size[1], 0, target.shape[1] - size[0])
            grown = cv2.copyMakeBorder(grown, *rest, cv2.BORDER_REPLICATE)
        np.greater(grown, 127, out=target)
        return full

    def core(self) -> np.ndarray:
        """`image` without the lines around what has structure, a view."""
        top, bottom, left, right = self.margins
        height, width = self.image.shape
        return self.image[top : height - bottom, left : width - right]

    def cut(self, inner: tuple[slice, slice]) -> ReducedImage:
        """The given rows and columns of blocks alone."""
        box = _inside(self.box, inner, self.image.shape, self.factor, self.mirrored)
        return replace(self, image=np.ascontiguousarray(self.image[inner]), box=box, margins=(0,) * 4)

    def reduced(self, full: np.ndarray) -> np.ndarray:
        """Block means (h, w) float32 of another array (H, W) of the same picture."""
        return _block_means(full[self.box], self.factor, self.mirrored)


def reduce_image(image: np.ndarray) -> ReducedImage:
    """Reduce an image (H, W) uint8 or uint16, bright on dark: without padding, frames, bright strips."""
    return picture_of(content_of(image))


def picture_of(content: ReducedImage) -> ReducedImage:
    """What is bright on dark in a file, with some of its air, without bright strips along its sides."""
    core = content.core()
    if min(core.shape) < MIN_SIDE:
        return content
    span = FLAT_SPAN / 2 * float(np.ptp(core))
    top, bottom, left, right = content.margins
    height, width = content.image.shape

    def air(lines: np.ndarray, inner: np.ndarray) -> int:
        """How many of the lines next to the content are its air and no padding."""
        level = np.percentile(inner, 5)
        if (inner > level + 5 * span).mean() > CUT_SHARE:
            return 0  # tissue that ends in a straight line was cut off: what follows is padding
        other = np.flatnonzero(np.abs(lines.mean(axis=1) - level) > span)
        return int(other[0]) if len(other) else len(lines)

    image = content.image[:, left : width - right]
    above, below = image[:top][::-1], image[height - bottom :]
    rows = slice(top - air(above, core[0]), height - bottom + air(below, core[-1]))
    image = content.image[rows].T
    before, behind = image[:left][::-1], image[width - right :]
    cols = slice(left - air(before, core[:, 0]), width - right + air(behind, core[:, -1]))
    small = content.cut((rows, cols))
    return small.cut(inner_part(small.image, bright_strip))


def content_of(image: np.ndarray) -> ReducedImage:
    """Reduce an image (H, W) of any polarity so that its long side is at most SEGMENT_SIDE px.

    Padding and frames without structure go, whatever their grey, but for AIR_MARGIN.
    """
    # Blocks are counted from the same side of the breast: a mirrored image has a mirrored mask.
    half = image.shape[1] // 2
    mirrored = cv2.sumElems(image[:, :half])[0] < cv2.sumElems(image[:, -half:])[0]
    box, factor = content_box(image, mirrored)
    reach = AIR_MARGIN * factor
    rows, cols = (
        slice(max(side.start % factor, side.start - reach), min(length, side.stop + reach))
        for side, length in zip(box, image.shape, strict=True)
    )
    if mirrored:
        rest = (image.shape[1] - box[1].stop) % factor
        cols = slice(max(0, box[1].start - reach), min(image.shape[1] - rest, box[1].stop + reach))
    ends = (
        box[0].start - rows.start,
        rows.stop - box[0].stop,
        box[1].start - cols.start,
        cols.stop - box[1].stop,
    )
    top, bottom, left, right = (length // factor for length in ends)
    margins = (top, bottom, right, left) if mirrored else (top, bottom, left, right)
    area = _block_means(image[rows, cols], factor, mirrored)
    brightest = int(cv2.minMaxLoc(image)[1])
    return ReducedImage(area, (rows, cols), factor, image.shape, brightest, mirrored, margins)


def content_box(image: np.ndarray, mirrored: bool) -> tuple[tuple[slice, slice], int]:
    """Rows and columns of an image (H, W) that padding and frames leave, and the blocks' side in px.

    What is peeled off are rows and columns without structure: constant ones, noise, air alone. Blocks
    are counted from the box's corner, so that padding doesn't move them.
    """
    box, factor = (slice(0, image.shape[0]), slice(0, image.shape[1])), 1
    for _ in range(4):  # padding gone, blocks may be finer, and what is padding is seen better
        side = max(1, *image[box].shape)
        factor = 2 ** max(0, math.ceil(math.log2(side / SEGMENT_SIDE)))
        area = _block_means(image[box], factor, mirrored)
        if min(area.shape) < MIN_SIDE:
            break
        inner = structured_part(area)
        span = float(np.ptp(area[inner]))
        box = _refined(image, _inside(box, inner, area.shape, factor, mirrored), box, factor, span)
        if max(image[box].shape) > factor * SEGMENT_SIDE / 2:
            break  # finer blocks won't follow
    return box, factor


def structured_part(area: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns from the first to the last that has structure; all where that is too little."""
    top, bottom, left, right = 0, area.shape[0], 0, area.shape[1]
    for _ in range(8):  # rows without the columns of a frame may lose their structure, and so on
        inner = area[top:bottom, left:right]
        if min(inner.shape) < MIN_SIDE:
            break
        span = float(np.ptp(inner))
        borders = np.concatenate([has_structure(lines[[0, -1]], span) for lines in (inner, inner.T)])
        if borders.all():
            break
        rows = np.flatnonzero(has_structure(inner, span))
        cols = np.flatnonzero(has_structure(inner.T, span))
        if min(np.ptp(rows) if len(rows) else 0, np.ptp(cols) if len(cols) else 0) < MIN_SIDE:
            break
        peeled = rows[0], inner.shape[0] - 1 - rows[-1], cols[0], inner.shape[1] - 1 - cols[-1]
        if not any(peeled):
            break
        top, bottom, left, right = (
            int(top + peeled[0]), int(bottom - peeled[1]), int(left + peeled[2]), int(right - peeled[3])
        )  # fmt: skip
    return slice(top, bottom), slice(left, right)


def has_structure(lines: np.ndarray, span: float) -> np.ndarray:
    """Which lines (n, m) float32 show more than one grey level and noise: (n,) bool.

    Noise averages out along a line; tissue, its border and the fog of film don't.
    """
    smooth = cv2.GaussianBlur(np.ascontiguousarray(lines), (33, 1), LINE_SMOOTHING)
    noise = (lines - smooth).std(axis=1)
    return np.ptp(smooth, axis=1) > np.maximum(FLAT_SPAN * span, NOISE_SPAN * noise)


def inner_part(area: np.ndarray, width_of: Callable[[np.ndarray], int]) -> tuple[slice, slice]:
    """Rows and columns of a reduced image left when as many lines go on each side as `width_of` says.

    All of them where fewer than MIN_SIDE were left.
    """
    height, width = area.shape
    if min(area.shape) >= MIN_SIDE:
        inwards = (area, area[::-1], area.T, area.T[::-1])
        top, bottom, left, right = (width_of(lines) for lines in inwards)
        if min(height - top - bottom, width - left - right) >= MIN_SIDE:
            return slice(top, height - bottom), slice(left, width - right)
    return slice(0, height), slice(0, width)


def bright_strip(lines: np.ndarray) -> int:
    """How many of the first lines of a reduced image belong to a bright strip along that side.

    Film edges, tape and noisy frames end in a step along the whole side. Tissue that the border cuts
    off doesn't, nor does the air beside it: the darker half of the inner line tells.
    """
    span = np.ptp(lines)
    border = np.sort(lines[0])
    if not span or border[len(border) // 4] < lines.min() + STRIP_STEP * span:
        return 0  # air, as along most sides

    def steps_down(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
        darker = np.argsort(inner, axis=1)[:, : inner.shape[1] // 2]
        return np.median(np.take_along_axis(outer - inner, darker, axis=1), axis=1) / span

    depth = math.ceil(STRIP_DEPTH * len(lines))
    ends = np.flatnonzero(steps_down(lines[:depth], lines[2 : depth + 2]) > STRIP_STEP)
    if not len(ends):
        return 0
    # The next line goes as well where strip and image share its blocks.
    width = int(ends[-1]) + 1
    shared = steps_down(lines[width : width + 1], lines[width + 1 : width + 2])[0] > STRIP_STEP / 10
    return width + int(shared)


def _block_means(image: np.ndarray, factor: int, mirrored: bool) -> np.ndarray:
    """images.block_means, with blocks from the right and the columns in that order where `mirrored`."""
    if not mirrored:
        return images.block_means(image, factor)
    area = images.block_means(image[:, image.shape[1] % factor :], factor)
    return np.ascontiguousarray(area[:, ::-1])


def _inside(
    box: tuple[slice, slice],
    blocks: tuple[slice, slice],
    shape: tuple[int, ...],
    factor: int,
    mirrored: bool,
) -> tuple[slice, slice]:
    """Rows and columns in px of those blocks of a box's reduced copy of `shape`.

    The last block takes the rows or columns that were left over with it.
    """

    def pixels(side: slice, part: slice, count: int, reverse: bool) -> slice:
        length = side.stop - side.start
        first, last = part.start * factor, length if part.stop == count else part.stop * factor
        if reverse:
            first, last = length - last, length - first
        return slice(side.start + first, side.start + last)

    return (pixels(box[0], blocks[0], shape[0], False), pixels(box[1], blocks[1], shape[1], mirrored))


def _refined(
    image: np.ndarray, inner: tuple[slice, slice], outer: tuple[slice, slice], factor: int, span: float
) -> tuple[slice, slice]:
    """The box `inner`, its borders moved within a block to where structure begins.

    Padding ends anywhere; a block that holds some of it would be taken for the picture's border.
    """

    def first(lines: np.ndarray, start: int, least: int) -> int:
        """Of the lines (n, m) seen from one side: the first with structure near number `start`."""
        low = max(least, start - factor)
        near = lines[low : start + factor]
        size = (max(1, near.shape[1] // factor), len(near))
        means = cv2.resize(np.ascontiguousarray(near), size, interpolation=cv2.INTER_AREA)
        found = np.flatnonzero(has_structure(means.astype(np.float32), span))
        return low + int(found[0]) if len(found) else start

    rows, cols = inner
    height, width = image.shape
    across, along = image[:, cols], image[rows].T
    top = first(across, rows.start, outer[0].start)
    bottom = height - first(across[::-1], height - rows.stop, height - outer[0].stop)
    left = first(along, cols.start, outer[1].start)
    right = width - first(along[::-1], width - cols.stop, width - outer[1].stop)
    return slice(top, bottom), slice(left, right)


# ---- Polarity --------------------------------------------------------------------------------------

JUDGED_PART = 0.05  # share of the picture on each side that has no say: film edges, tape, canvas
AIR_SPAN = 0.25  # share of the grey range at either end in which air may lie
FLAT_AIR = 0.02  # share of the grey range by which air differs within 3 px
CLOSE_VOTE = 0.3  # margin of the votes below which they are called close
MIN_INVERTED = 0.2  # margin from which an image is inverted: most are as they should be


def polarity_votes(content: ReducedImage) -> dict[str, float]:
    """Signs of which end of the grey range is air: name -> -1 (bright: a negative) to 1 (dark).

    Each is exactly the opposite for the negative of an image, as far as 8 bits allow, and rests on
    something else, so that one film edge or implant doesn't decide. Empty where too little is left.
    """
    area = content.core()
    dy, dx = (round(JUDGED_PART * side) for side in area.shape)
    area = area[dy : area.shape[0] - dy, dx : area.shape[1] - dx]
    if min(area.shape) < MIN_SIDE:
        return {}
    low, high = np.percentile(area[::2, ::2], (1, 99))
    grey = cv2.GaussianBlur(((area - low) / max(high - low, 1e-6)).clip(0, 1), (0, 0), 1)
    rough = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    border = np.ones(grey.shape, bool)
    border[3:-3, 3:-3] = False
    flat = border & (rough < FLAT_AIR)
    darker, brighter = np.percentile(grey[::2, ::2], (20, 80))
    votes = {
        # The beam passes beside the breast: the picture's border is mostly air, ...
        "border": 4 * (0.5 - grey[border].mean()),
        # ... even and at one end of the range; tissue that the border cuts off is uneven.
        "air": _balance((flat & (grey < AIR_SPAN)).sum(), (flat & (grey > 1 - AIR_SPAN)).sum()),
        # Air is the smoother fifth of the picture, tissue is rough at any brightness.
        "smooth": _balance(rough[grey >= brighter].mean(), rough[grey <= darker].mean()),
        # Ligaments, vessels and calcifications are thin and denser than what lies around them: fine
        # detail is skewed to the bright, also where the picture holds no air.
        "detail": 8 * detail_skew(grey),
    }
    return {name: float(np.clip(vote, -1, 1)) for name, vote in votes.items()}


def _balance(dark: float, bright: float) -> float:
    """-1 to 1 as the second or the first outweighs; 0 where both are nothing."""
    return (dark - bright) / (dark + bright) if dark + bright > 1e-6 else 0.0


def detail_skew(grey: np.ndarray) -> float:
    """Skewness (Bowley's, of the outer 2 %) of fine detail in what is no end of the range, -1 to 1."""
    detail = cv2.GaussianBlur(grey, (0, 0), 1) - cv2.GaussianBlur(grey, (0, 0), 3)
    between = ((grey > 0.1) & (grey < 0.9)).view(np.uint8)
    tissue = detail[cv2.erode(between, np.ones((5, 5), np.uint8)) > 0]
    if tissue.size < 500:
        return 0.0
    low, middle, high = np.percentile(tissue, (2, 50, 98))
    return float((high + low - 2 * middle) / max(high - low, 1e-6))


def polarity_margin(votes: dict[str, float]) -> float:
    """The mean vote, -1 (surely a negative) to 1 (surely as it should be); 0 without votes."""
    return float(np.mean(list(votes.values()))) if votes else 0.0
