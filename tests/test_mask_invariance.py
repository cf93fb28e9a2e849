"""Masks and muscles don't depend on where the picture lies in its file, nor on its side or its rims."""

import functools

import cv2
import numpy as np
import pytest
from test_image_mask import dice, iou, phantom

import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
from byol_mammo import structure

SAME = 0.005  # share of the mask's pixels that may differ where the blocks of the reduced copy moved


@functools.cache
def picture(trap, seed):
    """Image, mask and muscle of a phantom: all views, sides and densities, on a detector and on film."""
    image = phantom(seed, trap, ("CC", "MLO")[seed // 2 % 2], (8, 12)[seed % 2]).image
    return image, *segmented(image)


def segmented(image):
    mask = mammo.segment_breast_tissue(image)
    return mask, mammo.segment_pectoral_muscle(image, mask)


def padded(image, sides, grey):
    """An image amid padding of a share of its greatest grey, or of noise, and where it lies."""
    top = int(image.max())
    if grey == "noise":
        shape = [n + a + b for n, a, b in zip(image.shape, sides[::2], sides[1::2], strict=True)]
        canvas = np.random.default_rng(0).integers(0, top + 1, shape).astype(image.dtype)
    else:
        canvas = cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=int(grey * top))
    inner = np.s_[sides[0] : sides[0] + image.shape[0], sides[2] : sides[2] + image.shape[1]]
    canvas[inner] = image
    return canvas, inner


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0, "noise"])
@pytest.mark.parametrize("trap", ["none", "film_rim"])
def test_padding_of_any_grey_and_width_changes_no_mask(trap, grey):
    for seed in range(4):
        image, mask, muscle = picture(trap, seed)
        sides = [int(n) for n in np.random.default_rng(seed).integers(3, 130, 4)]
        canvas, inner = padded(image, sides, grey)
        found, more = segmented(canvas)
        assert found.sum() == found[inner].sum()
        assert (found[inner] ^ mask).sum() <= SAME * mask.sum()
        assert (more[inner] ^ muscle).sum() <= SAME * mask.sum()


@pytest.mark.parametrize("trap", ["none", "film", "film_rim", "chest_canvas", "tape_across"])
def test_a_mirrored_image_has_the_mirrored_mask_and_muscle(trap):
    """To the pixel, also where the width is no multiple of the blocks'."""
    for seed in range(4):
        for width in (560, 557):
            image = np.ascontiguousarray(picture(trap, seed)[0][:, :width])
            for part, other in zip(segmented(image), segmented(image[:, ::-1].copy()), strict=True):
                assert np.array_equal(part, other[:, ::-1])


def test_an_image_upside_down_has_its_mask_upside_down():
    for seed in range(4):
        image, mask, _ = picture("none", seed)
        found = mammo.segment_breast_tissue(image[::-1, ::-1].copy())[::-1, ::-1]
        assert (found ^ mask).sum() <= SAME * mask.sum()


def test_an_image_cut_to_the_breast_keeps_its_mask():
    """Its label gone, blocks are counted from elsewhere, and all of the outline may move a little."""
    for seed in range(4):
        image, mask, _ = picture("none", seed)
        x, y, width, height = mammo.images.bounding_box(mask)
        box = np.s_[y : y + height, x : x + width]
        found = mammo.segment_breast_tissue(image[box].copy())
        assert (found ^ mask[box]).sum() <= 2 * SAME * mask.sum()


def test_an_image_of_nothing_but_breast_is_breast():
    for seed in range(4):
        image, mask, _ = picture("none", seed)
        depth = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_C, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        reach = int(depth.max()) - 8
        close = image[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach].copy()
        assert mammo.segment_breast_tissue(close).mean() > 0.97


@pytest.mark.parametrize("side", "LR")
def test_the_muscle_is_found_from_the_chest_wall_wherever_that_lies(side, monkeypatch):
    """Beyond it lies canvas as wide as a muscle is. What lies over the muscle is another test's."""
    monkeypatch.setattr(structure, "MASS_CONVERGENCE", (1.0, 1.0))
    found = []
    for seed in (0, 2, 4, 6):
        spec = phantoms.PhantomSpec(
            seed=seed, view="MLO", laterality=side, height=704, width=560, spacing_mm=0.425
        )  # fmt: skip
        truth = phantoms.make_phantom(spec)
        left, right = (90, 0) if side == "L" else (0, 90)
        canvas = cv2.copyMakeBorder(truth.image, 0, 0, left, right, cv2.BORDER_CONSTANT, value=0)
        muscle = segmented(canvas)[1]
        found.append(dice(muscle[:, left : left + 560], truth.pectoral))
    assert min(found) > 0.85


def curved(y, nipple_y, reach, rng):
    """A muscle that bulges towards the nipple by a sixth of its border, as on digital MLO views."""
    length = nipple_y * rng.uniform(0.85, 1.1)
    t = (y / length).clip(0, 1)
    return reach[0] * rng.uniform(0.5, 0.6) * (1 - t + 0.75 * t * (1 - t))


def test_the_border_of_a_curved_muscle_is_followed(monkeypatch):
    monkeypatch.setattr(phantoms, "pectoral_edge", curved)
    monkeypatch.setattr(structure, "MASS_CONVERGENCE", (1.0, 1.0))  # what lies over it is another test's
    found, straight = [], []
    for seed in range(6):
        truth = phantom(seed)
        muscle = mammo.segment_pectoral_muscle(truth.image, truth.breast)
        found.append(dice(muscle, truth.pectoral))
        y, x = np.mgrid[: muscle.shape[0], : muscle.shape[1]]
        x = x if truth.pectoral[0, 0] else muscle.shape[1] - 1 - x
        top, left = truth.pectoral[0].sum(), truth.pectoral[:, [0, -1]].sum(0).max()
        straight.append(dice(x / top + y / left < 1, truth.pectoral))
    assert np.mean(found) > 0.9  # the muscle ends a margin before its border
    assert np.mean(found) > np.mean(straight)


@pytest.mark.parametrize("share", [0, 0.5], ids=["side", "middle"])
@pytest.mark.parametrize("radius", [4, 6, 8])
def test_masses_over_the_muscle_are_breast(share, radius):
    """Of a `radius` in mm, amid the muscle and where the picture's side cuts through them."""
    for seed in range(4):
        truth = phantoms.make_phantom(
            phantoms.PhantomSpec(
                seed=seed, view="MLO", laterality="L", height=480, width=400, spacing_mm=0.5
            )
        )
        plain = mammo.segment_pectoral_muscle(truth.image, truth.breast)
        row = int(truth.pectoral[:, 0].sum() * 0.4)
        column = int(truth.pectoral[row].sum() * share)
        y, x = np.mgrid[: truth.image.shape[0], : truth.image.shape[1]]
        mass = np.clip(1 - (np.hypot(y - row, x - column) * 0.5 / radius) ** 2, 0, None)
        grey = truth.image + 0.2 * mass * np.median(truth.image[truth.pectoral])
        muscle = mammo.segment_pectoral_muscle(grey.astype(np.uint16), truth.breast)
        assert not muscle[row, column]
        assert muscle.sum() > 0.8 * plain.sum()


@pytest.mark.parametrize("end", ["upper", "lower", "chest"])
def test_a_bright_line_in_which_the_film_ends_on_the_breast_alone_is_not_breast(end):
    """Beside the breast it is as dark as air, so that the picture keeps it."""
    for seed in range(4):
        truth = phantom(seed, view=("CC", "MLO")[seed // 2 % 2])
        third = len(truth.breast) // 3
        cut = slice(third if end == "upper" else 0, 2 * third if end == "lower" else None)
        image, breast = truth.image[cut], truth.breast[cut]
        line = np.zeros_like(breast)
        for side in {"upper": [np.s_[:6]], "lower": [np.s_[-6:]]}.get(
            end, [np.s_[:, :6], np.s_[:, -6:]]
        ):
            line[side] = breast[side]
        plain = mammo.segment_breast_tissue(image)
        mask = mammo.segment_breast_tissue(np.where(line, np.iinfo(image.dtype).max, image))
        assert not (mask & line).any()
        assert (mask ^ plain)[~line].sum() <= 0.01 * plain.sum()


def test_the_view_decides_whether_there_is_a_muscle():
    """CC has none whatever it looks like; on MLO a faint one is found that is refused otherwise."""
    truth = phantom(0)
    assert mammo.segment_pectoral_muscle(truth.image, truth.breast, "MLO").any()
    assert not mammo.segment_pectoral_muscle(truth.image, truth.breast, "CC").any()
    grey = truth.image.astype(np.float32)
    grey[truth.pectoral] *= np.median(grey[truth.breast & ~truth.pectoral]) / np.median(
        grey[truth.pectoral]
    )
    faint = (grey * (1 + 0.06 * truth.pectoral)).astype(np.uint16)
    known = mammo.segment_pectoral_muscle(faint, truth.breast, "MLO")
    assert known.sum() >= mammo.segment_pectoral_muscle(faint, truth.breast).sum()


@pytest.mark.parametrize(
    ("trap", "most"), [("film_rim", 0.004), ("chest_canvas", 0), ("tape_across", 0.01)]
)
def test_rims_canvas_and_tape_stay_out_of_the_mask(trap, most):
    for seed in range(6):
        truth = phantom(seed, trap, ("MLO", "CC")[seed // 2 % 2])
        mask = mammo.segment_breast_tissue(truth.image)
        assert (mask & truth.foreign).sum() <= most * mask.sum()
        assert iou(mask & ~truth.foreign, truth.breast & ~truth.foreign) > 0.95


def test_a_marker_on_the_nipple_cuts_no_skin_out():
    """A dot that touches the skin is left out, and no more: letters would take what lies around them."""
    for seed in range(4):
        truth = phantom(seed, view="CC", bit_depth=12)
        rows, cols = np.nonzero(truth.breast)
        left = truth.breast[:, 0].any()
        tip = cols.max() if left else cols.min()
        row = int(np.median(rows[cols == tip]))
        marked = truth.image.copy()
        cv2.circle(marked, (int(tip) + (2 if left else -2), row), 4, 4095, -1)
        mask = mammo.segment_breast_tissue(marked)
        assert (mammo.segment_breast_tissue(truth.image) & ~mask).sum() < 400
