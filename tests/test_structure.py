"""Convergence: what it is, which tiles it keeps, and what doesn't change it."""

import cv2
import numpy as np
import pandas as pd
import pytest

import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
from byol_mammo import specks, structure

MM = 0.25  # mm per px of the images here
CONFIG = mammo.Config(
    tile_size=128, tile_stride=64, pixel_spacing_mm=MM, min_tile_intensity=0, min_freq_energy=0.1
)
MASS = (256, 200)  # row and column of its centre


def tissue(mass=0.0, bits=16, radius_mm=6.0):
    """A breast of even grey with grain, no speck and no structure, and a mass in it: image and mask.

    `mass`: what it adds to the grey of 0.5. It darkens towards the skin over 12 mm, as breasts do.
    """
    y, x = np.mgrid[:512, :384]
    mask = ((y - 256) / 230) ** 2 + (x / 330) ** 2 < 1
    depth = cv2.distanceTransform(
        np.pad(mask, ((0, 0), (1, 0)), "edge").astype(np.uint8), cv2.DIST_L2, 5
    )
    grey = 0.5 * np.minimum(1, 0.6 + 0.4 * depth[:, 1:] * MM / 12)
    far = np.hypot(y - MASS[0], x - MASS[1]) * MM
    grey += mass * np.clip(1 - (far / radius_mm) ** 2, 0, None)
    grain = np.random.default_rng(0).normal(0, 0.004, mask.shape)
    grey = np.where(mask, grey + cv2.GaussianBlur(grain, (0, 0), 0.8), 0)
    return np.round(grey * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16), mask


def score(image, mask, muscle=None, **settings):
    """score_tiles of what `tissue` gives."""
    none = np.zeros_like(mask)
    config = mammo.dataclasses.replace(CONFIG, **settings)
    return mammo.score_tiles(image, mask, config, MM, none if muscle is None else muscle)


def holding(table):
    """Which tiles hold the centre of the mass, 2 mm from their sides at least."""
    inside = (
        table[side].between(at - CONFIG.tile_size + 8, at - 8)
        for side, at in zip("yx", MASS, strict=True)
    )
    return np.logical_and(*inside)


def test_convergence_is_the_mean_cosine_with_the_direction_to_a_place():
    rng = np.random.default_rng(1)
    angle = rng.uniform(0, 2 * np.pi, (30, 26))
    gradients = np.stack([np.cos(angle), np.sin(angle), np.ones(angle.shape)]).astype(np.float32)
    gradients[:, 20:] = 0  # doesn't count
    found = structure.convergence(gradients, 1.0, (5.0,))
    assert (found[20:] == 0).all()
    for row, column in ((12, 13), (18, 4), (2, 24)):
        cosines, count = 0.0, 0
        for dy in range(-5, 6):
            for dx in range(-5, 6):
                if 0 < np.hypot(dy, dx) <= 5:
                    count += 1
                    y, x = row + dy, column + dx
                    if 0 <= y < 30 and 0 <= x < 26:
                        cosines -= (gradients[0, y, x] * dx + gradients[1, y, x] * dy) / np.hypot(dy, dx)
        assert found[row, column] == pytest.approx(cosines / count, abs=1e-5)
    both = structure.convergence(gradients, 1.0, (5.0, 7.0))
    assert (both >= found - 1e-6).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("mass", [0.02, 0.1])
@pytest.mark.parametrize("radius_mm", [5, 10])
def test_a_mass_keeps_its_tiles_however_faint(mass, bits, radius_mm):
    plain, found = score(*tissue(0, bits)), score(*tissue(mass, bits, radius_mm))
    near = holding(found)
    assert near.sum() >= 2
    assert (found["rejected_by"][near] == "").all()
    assert (plain["rejected_by"] != "").all()
    assert plain["convergence"].max() < 0.6  # neither the skin nor the shadow along it
    without = score(*tissue(mass, bits, radius_mm), min_convergence=0)
    assert (without["rejected_by"] != "").all()  # it is the mass that keeps them, and no speck


def test_a_mass_in_the_muscle_keeps_none():
    image, mask = tissue(0.1)
    muscle = mask & (np.hypot(*np.ogrid[-MASS[0] : 512 - MASS[0], -MASS[1] : 384 - MASS[1]]) * MM < 10)
    assert (score(image, mask, muscle)["rejected_by"] != "").all()


def test_air_and_skin_count_for_nothing():
    image, mask = tissue(0.02)
    lit = np.where(mask, image, 60_000)
    scores = [score(grey, mask)["convergence"] for grey in (image, lit)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    gradients, factor = structure.unit_gradients(image.astype(np.float32), mask.view(np.uint8), MM)
    from_skin = cv2.distanceTransform(np.pad(mask, 1, "edge").view(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    counts = np.kron(gradients[2], np.ones((factor, factor))) > 0
    assert from_skin[counts].min() * MM >= structure.SKIN - factor * MM
    assert (gradients[:2, gradients[2] == 0] == 0).all()
    assert counts[:, :factor].any()  # the image's side is no skin


@pytest.mark.parametrize("kind", ["mass", "spiculated_mass"])
def test_masses_of_phantoms_converge(kind):
    """Against the same phantom without: its tissue has knots of strands of its own."""
    rise = []
    for seed in range(3):
        at_lesion = []
        for contrast in (0, 1.5):
            size = {"height": 768, "width": 624}
            spec = phantoms.PhantomSpec(seed=seed, lesions=(kind,), lesion_contrast=contrast, **size)
            phantom = phantoms.make_phantom(spec)
            grid = specks.speck_grid(phantom.image, phantom.breast, spec.spacing)
            step = grid.factor * spec.spacing
            gradients, factor = structure.unit_gradients(grid.grey, grid.inside, step)
            found = structure.convergence(gradients, factor * step)
            lesion = phantom.lesions[0]
            row = round((lesion.y - grid.top) / (grid.factor * factor))
            column = round((lesion.x - grid.left) / (grid.factor * factor))
            at_lesion.append(found[max(0, row - 3) : row + 4, max(0, column - 3) : column + 4].max())
        rise.append(at_lesion[1] - at_lesion[0])
    assert np.mean(rise) > 0.15


def changed(image, mask, how):
    """The image and mask of `tissue` with less depth, in another window, darker, or mirrored."""
    if how == "8 bit":
        return (image >> 8).astype(np.uint8), mask
    if how == "window":
        return np.where(mask, image // 3 + 20_000, 0).astype(np.uint16), mask
    if how == "mirrored":
        return np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return image // 50, mask


@pytest.mark.parametrize("how", ["8 bit", "window", "dark", "mirrored"])
def test_neither_depth_nor_window_nor_side_change_it(how):
    image, mask = tissue(0.1)
    table, other = score(image, mask), score(*changed(image, mask, how))
    if how == "mirrored":
        other["x"] = image.shape[1] - CONFIG.tile_size - other["x"]
    both = table.merge(other, on=["x", "y"])
    assert len(both) == len(table)
    near = (both["convergence_x"] - both["convergence_y"]).abs()
    assert near.max() < (0.12 if how == "mirrored" else 0.07)  # mirrored, the grid lies elsewhere


@pytest.mark.parametrize("fault", ["saturated", "empty mask", "tiny", "coarse"])
def test_odd_images_have_a_finite_convergence(fault):
    image, mask, spacing = np.full((300, 300), 255, np.uint8), np.ones((300, 300), bool), MM
    if fault == "empty mask":
        mask[:] = False
    elif fault == "tiny":
        image, mask, spacing = image[:40, :40], mask[:40, :40], 0.005  # less than a px of the grid
    elif fault == "coarse":
        spacing = 2.0
    table = mammo.score_tiles(image, mask, CONFIG, spacing, np.zeros_like(mask))
    assert table["convergence"].between(0, 0.05).all()


def test_masses_of_real_films_keep_a_tile_and_not_all_tissue_is_kept(real):
    folder = real / "cbis_mass"
    if not (folder / "boxes.csv").is_file():
        pytest.skip("no cbis_mass")
    boxes = pd.read_csv(folder / "boxes.csv")
    config = mammo.Config(tile_size=160, tile_stride=80, pixel_spacing_mm=0.27)
    kept, tables = [], []
    for name in sorted(set(boxes["image"]))[::25]:
        image = mammo.read_mammogram(folder / name)
        table = mammo.score_tiles(image, mammo.segment_breast_tissue(image), config)
        tables.append(table[table["breast_ratio"] >= 0.15])
        for box in boxes[boxes["image"] == name].itertuples():
            centre = (box.xmin + box.xmax) / 2, (box.ymin + box.ymax) / 2
            inside = [table[side].between(at - 160, at) for side, at in zip("xy", centre, strict=True)]
            kept.append((table["rejected_by"][np.logical_and(*inside)] == "").any())
    assert len(kept) >= 25
    assert np.mean(kept) >= 0.95
    assert (pd.concat(tables)["rejected_by"] == "").mean() <= 0.82
