"""Breast and pectoral muscle in a reduced mammogram: pure functions on small arrays, bright on dark."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np

from byol_mammo import images, structure

# Where the skin line is sought, share of the way from air to the breast's median: digital, probe, film.
SKIN_LEVELS = (0.02, 0.11, 0.08)
FILM_SKIN = 0.16  # grey of the skin line on film, at least, as a share of the breast's median
OPENING = 9  # px of the reduced copy, diameter of what is cut off as a bridge
CHEST_DEPTH = 0.03  # share of the breast within which its chest side counts as straight
RIM_DEPTH = 12  # px of the reduced copy, 6-8 mm
FILM_END = 0.12  # share of the grey range, least step from a film's end to the tissue beside it
LABEL_SIZE = 24  # px of the reduced copy, 13-17 mm: height of the largest label that is cut off the skin
LABEL_GAP = 11  # px of the reduced copy, between the letters of a label
STICK_OUT = 24  # px of the reduced copy, 13-17 mm: how far nipple and folds stick out at most
MARKER_SIZE = 5  # px of the reduced copy, 2-4 mm: largest marker of nipple or skin
LABEL_PERCENTILES = (98, 99.5)  # of the breast: thin strokes of a label are brighter than the first
UNEVEN_AIR = 0.02  # noise of air above which it may be fat, share of the way to the breast's median
FAT_ROUGHNESS = 0.04  # what grey differs by within 3 px of fat, share of the way from air to the median
MIN_SMOOTH_AIR = 0.005  # share of the image below which what is smoother than fat is no air


def grey_levels(area: np.ndarray) -> tuple[float, float, float] | None:
    """Air, its noise, and the median of the breast in a smoothed reduced image without padding.

    The lowest of three Otsu classes holds air and its fog (Liao et al. 2001); the air proper is what of
    it lies away from the largest bright component. None where nothing is coherent, as in noise.
    """
    from skimage.filters import threshold_multiotsu  # here: a run that finds its cache starts sooner

    try:
        lower = float(threshold_multiotsu(area, classes=3)[0])
    except ValueError:  # fewer than three grey levels
        return None
    dark = area <= lower
    if coherent(dark).sum() < 0.2 * dark.sum():
        return None
    core = images.largest_component(~dark)
    reach = max(3, max(area.shape) // 20) | 1
    near = cv2.dilate(core.astype(np.uint8), np.ones((reach, reach), np.uint8)) > 0
    air = dark & ~near
    if air.mean() < 0.002:
        air = area <= np.percentile(area, 2)
    level, noise = images.median_and_spread(area[air])
    tissue = float(np.median(area[core]))
    levels, contrast = (level, noise, tissue), tissue - level
    if noise <= UNEVEN_AIR * contrast:
        return levels
    return levels_amid_fat(area, dark, FAT_ROUGHNESS * contrast) or levels


def levels_amid_fat(
    area: np.ndarray, dark: np.ndarray, roughness: float
) -> tuple[float, float, float] | None:
    """grey_levels where the breast nearly fills the image and its `dark` part is mostly fat, else None.

    Fat is rough, air is smooth; without any smooth part all is breast, and air far below it. Fog is
    smooth too: on film most of the dark part is, and what is darker than fog is a frame. Noise is rough
    pixel by pixel, fat is so in its shapes.
    """
    kernel = np.ones((3, 3), np.uint8)
    shapes = cv2.morphologyEx(cv2.GaussianBlur(area, (0, 0), 4), cv2.MORPH_GRADIENT, kernel)
    grain = images.median_and_spread((area - cv2.GaussianBlur(area, (0, 0), 1.5))[dark])[1]
    if np.median(shapes[dark]) < grain:
        return None
    smooth = coherent(dark & (cv2.morphologyEx(area, cv2.MORPH_GRADIENT, kernel) < roughness))
    if smooth.mean() < MIN_SMOOTH_AIR:
        tissue = float(np.median(area))
        return 2 * float(area.min()) - tissue, 0.0, tissue
    on_border = smooth[[0, -1]].any() or smooth[:, [0, -1]].any()
    if smooth.sum() > dark.sum() / 2 or not on_border:
        return None
    return *images.median_and_spread(area[smooth]), float(np.median(area[~smooth]))


def coherent(binary: np.ndarray) -> np.ndarray:
    """What of a (H, W) bool array a disc of OPENING px can cover."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (OPENING, OPENING))
    return cv2.morphologyEx(binary.view(np.uint8), cv2.MORPH_OPEN, disc) > 0


def breast_above(area: np.ndarray, smooth: np.ndarray, level: float) -> np.ndarray:
    """The breast in a reduced image and its smoothed copy: the largest component above a grey level.

    Opening cuts labels and tape that touch the breast by a thin bridge. Where the image side cuts the
    breast off, dark fat may be open to that side: it is closed there before holes are filled. Noise
    is smoothed away first; the rim that smoothing has pushed outwards is trimmed at the end.
    """
    breast = closed_at_chest(images.largest_component(smooth > level))
    pad = OPENING + 1
    padded = cv2.copyMakeBorder(breast.view(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    opened = coherent(padded.view(bool))[pad:-pad, pad:-pad]
    breast = closed_at_chest(images.largest_component(opened))
    inner = cv2.erode(breast.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1) > 0
    trimmed = (inner | (breast & (area > level))).astype(np.uint8)
    opened = cv2.morphologyEx(trimmed, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return images.largest_component(opened > 0)


def without_rims(breast: np.ndarray) -> np.ndarray:
    """A breast mask without what lies along a side of the picture alone.

    Light leaks in at the edges of a film, and beyond the collimator it is fogged: a strip along a side,
    joined to the breast where the chest wall is. A breast that a side cuts off is deeper than that.
    """
    kept = breast.copy()
    for inwards, lines in from_each_side(breast, kept):
        depth = min(RIM_DEPTH, len(inwards) - 1)
        deeper = inwards[depth].view(np.uint8)[None]
        near = cv2.dilate(np.ascontiguousarray(deeper), np.ones((1, 2 * depth + 1), np.uint8))
        lines[:depth] &= near > 0
    return images.largest_component(kept)


def without_film_ends(breast: np.ndarray, area: np.ndarray) -> np.ndarray:
    """A breast mask without the bright line in which the film ends where the breast is cut off.

    Beyond the film's end the scanner sees plain light, and light leaks in: a line brighter than what
    follows inwards, in one step all along the breast. Beside the breast it may be dark, and then the
    picture keeps it. Tissue that is cut off has no edge along the cut.
    """
    kept, least = breast.copy(), FILM_END * float(np.ptp(area))
    turn = -1 if chest_side(breast) == -1 else 1
    sides = from_each_side(*(array[:, ::turn] for array in (breast, area, kept)))
    for inwards, grey, lines in list(sides)[:3]:  # the last is the nipple's, which cuts nothing off
        depth = min(RIM_DEPTH, len(inwards) - 1)
        inner = grey[: depth + 2, inwards[depth]]
        steps = np.median(inner[:-2] - inner[2:], axis=1) if inner.size else np.zeros(1)
        ends = np.flatnonzero(steps > least)
        if len(ends):
            # The line after a step shares its blocks of the reduced copy with it.
            lines[: ends[-1] + 2] = False
    return images.largest_component(kept)


def from_each_side(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The same arrays (h, w) as views from each side of the picture: upper, lower, left, right."""
    for turn in (lambda a: a, lambda a: a[::-1], lambda a: a.T, lambda a: a.T[::-1]):
        yield tuple(turn(array) for array in arrays)


def closed_at_chest(breast: np.ndarray) -> np.ndarray:
    """The mask without holes, those included that are open to the side that cuts the breast off."""
    breast = breast.copy()
    left, _, width, _ = images.bounding_box(breast)
    if width:
        side = left if chest_side(breast) == 0 else left + width - 1
        rows = np.flatnonzero(breast[:, side])
        breast[rows[0] : rows[-1] + 1, side] = True
    contours, _ = cv2.findContours(breast.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(breast.shape, np.uint8), contours, -1, 1, cv2.FILLED) > 0


def without_labels(breast: np.ndarray, area: np.ndarray) -> np.ndarray:
    """A breast mask without the labels and markers that touch the skin, where they cover it too.

    What a large disc can't reach sticks out of the breast: nipple, folds, labels. The last are the
    brightest thing in the image, skin is among the darkest. Their rims share blocks of the reduced
    copy with what lies beside them; those blocks go as well.
    """

    pad = LABEL_SIZE
    padded = cv2.copyMakeBorder(breast.view(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    core = cv2.distanceTransform(padded, cv2.DIST_L2, 5) > LABEL_SIZE / 2
    reach = cv2.distanceTransform((~core).view(np.uint8), cv2.DIST_L2, 5)
    body = (reach <= LABEL_SIZE / 2)[pad:-pad, pad:-pad]
    if not body.any():
        return body
    outside = breast & ~body
    faint, bright = (area > level for level in np.percentile(area[body], LABEL_PERCENTILES))
    rim = cv2.dilate((bright & ~breast).view(np.uint8), np.ones((3, 3), np.uint8)) > 0
    # Nothing of a breast that is so narrow is so long: tape, or a fold of the belly.
    far = outside & (reach[pad:-pad, pad:-pad] > LABEL_SIZE / 2 + STICK_OUT)
    if far.any():
        parts = cv2.connectedComponents(outside.view(np.uint8))[1]
        cut = np.isin(parts, np.unique(parts[far]))
        breast, outside = breast & ~cut, outside & ~cut
    found = outside & bright
    if found.any():
        # A marker on the nipple is a dot: what it sticks to is skin, and no letter lies beside it.
        _, dots, boxes, _ = cv2.connectedComponentsWithStats(bright.view(np.uint8))
        is_dot = boxes[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(1) <= MARKER_SIZE
        marker = is_dot[dots] & found
        rim |= cv2.dilate(marker.view(np.uint8), np.ones((5, 5), np.uint8)) > 0
        found &= ~marker
    if not found.any():
        return images.largest_component(breast & ~rim)
    seeds = cv2.connectedComponents(outside.view(np.uint8))[1]
    labels = np.unique(seeds[found])
    sticking = np.isin(seeds, labels)
    # Letters lie apart: closing joins them, and with them those that lie over the breast.
    gap = np.ones((LABEL_GAP, LABEL_GAP), np.uint8)
    joined = cv2.morphologyEx((bright | sticking).view(np.uint8), cv2.MORPH_CLOSE, gap)
    near = cv2.dilate(sticking.view(np.uint8), np.ones((2 * LABEL_SIZE + 1,) * 2, np.uint8))
    parts = cv2.connectedComponents(cv2.bitwise_and(joined, near))[1]
    found = np.isin(parts, np.unique(parts[sticking])) & (bright | sticking)
    strokes = cv2.connectedComponents(faint.view(np.uint8) & near)[1]
    found |= np.isin(strokes, np.unique(strokes[found & (strokes > 0)]))
    label = cv2.dilate(found.view(np.uint8), np.ones((9, 9), np.uint8)) > 0
    return images.largest_component(breast & ~rim & ~label)


def chest_side(breast: np.ndarray) -> int:
    """Column index (0 or -1) of the side of the breast's box that cuts the breast off.

    It does so in a straight line, wherever that lies in the picture; the nipple's side is curved.
    """
    left, top, width, height = images.bounding_box(breast)
    inner = breast[top : top + height, left : left + width]
    if not width:
        return 0
    depth = math.ceil(CHEST_DEPTH * width)
    return 0 if inner[:, :depth].any(1).sum() >= inner[:, width - depth :].any(1).sum() else -1


def silhouette_area(breast: np.ndarray) -> int:
    """Area in px between the skin and the chest side, row by row, whatever holes there are."""
    left, _, width, _ = images.bounding_box(breast)
    if not width:
        return 0
    inner = breast[:, left : left + width]
    away = inner if chest_side(breast) == -1 else inner[:, ::-1]
    return int(np.where(away.any(1), away.shape[1] - away.argmax(1), 0).sum())


# ---- Pectoral muscle -------------------------------------------------------------------------------

MUSCLE_SMOOTHING = 3  # px of the reduced copy, sigma before the border of the muscle is sought
MUSCLE_EDGE_CAP = 0.05  # log grey per px: one strong edge must not outweigh a long weak border
MUSCLE_MIN_EDGE = 0.004  # log grey per px that counts as a border from bright to dark
MUSCLE_BENDS = (-0.05, 0.0, 0.05, 0.1, 0.15)  # how far the border bulges, as a share of its length
MUSCLE_UNBENT = 2.0  # share of its score that an arc loses per unit of bend: most borders are straight
MUSCLE_SLOPE = 0.15  # of the border against the chest wall, least; the fog of a film runs along that
MUSCLE_SKIN = 6  # px of the reduced copy from the outline of the breast within which edges are skin
MUSCLE_LINES = 120  # straight borders of the highest score that are bent
MUSCLE_REACH = 0.06  # share of its length within which the border follows the edge beside the arc
MUSCLE_STIFFNESS = 0.002  # log grey per px that the border pays for a step to the side
CUT_OFF = 0.6  # width of the breast at its upper end, at least, as a share of that 5 % below
CLOSE_UP = 0.97  # share of the image that a breast covers where bright tissue in a corner is no muscle
# What tells a muscle from a bright streak of a CC view: share of its border that is an edge, its grey
# against the breast's and against what lies beside it. In a dense breast it is no brighter than gland.
MUSCLE_UNKNOWN = 0.7, 0.78, 1.04
MUSCLE_SMALL = 0.003  # what is added to that contrast, over the muscle's share of the breast
MUSCLE_KNOWN = 0.5, 0.5, 1.0  # the same where the view is known to be MLO
MUSCLE_AREA = 0.03, 0.6  # share of the breast, least and most
MUSCLE_CORNER = 0.8  # share of the upper corner at the chest wall that must be breast
# A reader's border lies up to 2.5 mm to either side of the one that is found (80 % of it, on 60 films of
# DDSM), and a lesion lost costs more than some muscle kept.
MUSCLE_MARGIN = 2  # px of the reduced copy, 1-1.5 mm, by which the muscle ends before that border
MUSCLE_TIP = 0.1  # share of the width of the breast from which on a muscle is wide enough to be told


def muscle_in(area: np.ndarray, breast: np.ndarray, known: bool = False) -> np.ndarray:
    """The muscle in the box of a breast (h, w) whose chest wall is on the left: (h, w) bool.

    Less is asked of it where it is `known` to be there. All False where there is none.
    """
    height, width = area.shape
    nothing = np.zeros(area.shape, bool)
    # The picture's upper end cuts through muscle and armpit; a breast that ends in skin is a CC view.
    end, below = breast[1:5].sum(1).max(), breast[height // 20 + 1].sum()
    corner = breast[: height // 20 + 1, : width // 20 + 1].mean()
    if not known and (corner < MUSCLE_CORNER or end < CUT_OFF * below):
        return nothing
    grey = np.log(area + 0.1 * np.median(area[breast]))
    grey = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), MUSCLE_SMOOTHING)
    # The skin is a stronger border than any muscle's: it has no say.
    reach = np.ones((2 * MUSCLE_SKIN + 1,) * 2, np.uint8)
    inner = cv2.erode(breast.view(np.uint8), reach, borderValue=1)
    slopes = [inner * cv2.Sobel(grey, cv2.CV_32F, *order) / 8 for order in ((1, 0), (0, 1))]
    arc = best_arc(slopes, breast)
    if arc is None:
        return nothing
    points, edges = followed_edge(slopes, arc)
    muscle = breast & polygon(points, area.shape)
    beside = breast & ~muscle & polygon(1.15 * points, area.shape)
    if not looks_like_muscle(area, breast, muscle, beside, edges, known):
        return nothing
    # Downwards the muscle thins out beneath tissue, where no border shows that could be trusted.
    wide = np.flatnonzero(muscle.sum(1) >= MUSCLE_TIP * width)
    muscle[wide[-1] + 1 if len(wide) else 0 :] = False
    muscle &= polygon(points - MUSCLE_MARGIN * np.stack(arc[2:], 1), area.shape)
    return muscle & ~structure.masses_over(muscle, area, breast)


def looks_like_muscle(
    area: np.ndarray,
    breast: np.ndarray,
    muscle: np.ndarray,
    beside: np.ndarray,
    edges: np.ndarray,
    known: bool,
) -> bool:
    """Whether size, grey, contrast to what lies `beside` it and the `edges` along it are a muscle's."""
    share = muscle.sum() / breast.sum()
    if not MUSCLE_AREA[0] <= share <= MUSCLE_AREA[1]:
        return False
    border, grey, contrast = MUSCLE_KNOWN if known else MUSCLE_UNKNOWN
    contrast += MUSCLE_SMALL / share
    level = np.median(area[muscle])
    return bool(
        (edges > MUSCLE_MIN_EDGE).mean() >= border
        and level >= grey * np.median(area[breast])
        and (not beside.any() or level >= contrast * np.median(area[beside]))
    )


def arcs(top: np.ndarray, left: np.ndarray, bend: np.ndarray, points: int) -> tuple[np.ndarray, ...]:
    """Borders from the top row to the left column (n,) float32 px: x, y, normal x, normal y (n, points).

    They bulge by `bend` times their length; the normals point away from the corner.
    """
    top, left, bend = (axis.astype(np.float32)[:, None] for axis in (top, left, bend))
    along = np.linspace(0.03, 0.97, points, dtype=np.float32)
    length = np.hypot(top, left)
    normal_x, normal_y = left / length, top / length
    bulge = 4 * bend * length * along * (1 - along)
    x = top * (1 - along) + bulge * normal_x
    y = left * along + bulge * normal_y
    # The chord runs along (-top, left); the normal of an arc turns with its tilt against the chord.
    tilt = 4 * bend * (1 - 2 * along)
    size = np.sqrt(1 + tilt**2)
    return x, y, (normal_x + tilt * normal_y) / size, (normal_y - tilt * normal_x) / size


def edges_at(
    slopes: list[np.ndarray], x: np.ndarray, y: np.ndarray, nx: np.ndarray, ny: np.ndarray
) -> np.ndarray:
    """How fast grey falls along normals at points (float arrays of one shape): log grey per px."""
    height, width = slopes[0].shape
    place = y.astype(np.int32).clip(0, height - 1) * width + x.astype(np.int32).clip(0, width - 1)
    inside = (x < width) & (y < height)
    fall = slopes[0].take(place) * nx + slopes[1].take(place) * ny
    return np.where(inside, -fall, 0)


def best_arc(slopes: list[np.ndarray], breast: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """The arc with the strongest bright-to-dark edge along it: x, y and normals, each (points,).

    Straight lines first (Karssemeijer 1998), then arcs on the best of them, as the muscle bulges in
    relaxed women and on most digital images.
    """
    height, width = slopes[0].shape
    ends = np.arange(0.15, 1.0, 0.035)
    top, left = (axis.ravel() for axis in np.meshgrid(ends * width, ends * height))
    share = top * left / 2 / breast.sum()
    possible = (MUSCLE_AREA[0] <= share) & (share <= MUSCLE_AREA[1]) & (top >= MUSCLE_SLOPE * left)
    top, left = top[possible], left[possible]
    if not len(top):
        return None

    def score(top: np.ndarray, left: np.ndarray, bend: np.ndarray) -> np.ndarray:
        lines = arcs(top, left, bend, 24)
        edges = np.minimum(edges_at(slopes, *lines), MUSCLE_EDGE_CAP).mean(1)
        inside = breast[
            lines[1].astype(int).clip(0, height - 1), lines[0].astype(int).clip(0, width - 1)
        ].mean(1)
        return edges * (inside > 0.5) * (1 - MUSCLE_UNBENT * np.abs(bend))

    best = np.argsort(-score(top, left, np.zeros(len(top))), kind="stable")[:MUSCLE_LINES]
    bend = np.tile(MUSCLE_BENDS, len(best))
    top, left = (np.repeat(axis[best], len(MUSCLE_BENDS)) for axis in (top, left))
    first = int(score(top, left, bend).argmax())
    one = slice(first, first + 1)
    x, y, nx, ny = arcs(top[one], left[one], bend[one], 40)
    return x[0], y[0], nx[0], ny[0]


def followed_edge(
    slopes: list[np.ndarray], arc: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The path along an arc of strongest edges beside it: points (n, 2) float32 x, y, and edges (n,).

    Found by dynamic programming (as in live-wire, Mortensen and Barrett 1995), a step to the side costs.
    """
    x, y, nx, ny = arc
    reach = max(2, round(MUSCLE_REACH * float(np.hypot(x[0] - x[-1], y[0] - y[-1]))))
    offset = np.arange(-reach, reach + 1, dtype=np.float32)
    near = x[:, None] + offset * nx[:, None], y[:, None] + offset * ny[:, None]
    edge = np.minimum(edges_at(slopes, *near, nx[:, None], ny[:, None]), MUSCLE_EDGE_CAP)
    total, steps = edge[0].copy(), np.zeros(edge.shape, np.int32)
    sideways = np.arange(-2, 3)
    padded = np.full(len(total) + 4, -np.inf, np.float32)
    shifted = np.lib.stride_tricks.sliding_window_view(padded, len(sideways))  # (offsets, steps)
    price = (MUSCLE_STIFFNESS * sideways**2).astype(np.float32)
    for i in range(1, len(edge)):
        padded[2:-2] = total
        choice = shifted - price
        steps[i] = sideways[choice.argmax(1)]
        total = choice.max(1) + edge[i]
    path = np.zeros(len(edge), np.int32)
    path[-1] = int(total.argmax())
    for i in range(len(edge) - 1, 0, -1):
        path[i - 1] = path[i] + steps[i, path[i]]
    along = np.arange(len(path))
    smooth = cv2.GaussianBlur(offset[path][None], (9, 1), 2)[0]
    points = np.stack([x + smooth * nx, y + smooth * ny], 1)
    return points, edge[along, path]


def polygon(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What a border (n, 2) cuts off with the upper left corner, (h, w) bool; its ends go straight on."""
    first = points[0] + (points[0] - points[4]) * 3
    last = points[-1] + (points[-1] - points[-5]) * 3
    corner = [[-9.0, first[1]], [-9.0, -9.0], [first[0], -9.0]]
    ring = np.vstack([first, points, last, [-9.0, last[1]], corner[1:2], [first[0], -9.0]])
    filled = cv2.fillPoly(np.zeros(shape, np.uint8), [np.rint(ring).astype(np.int32)], (1,))
    return filled > 0
