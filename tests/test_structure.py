"""Convergence and blobs: what they are, which tiles they keep, what they ask of a network."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from test_training import open_run

import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
from byol_mammo import specks, structure, targets

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


def test_maps_are_the_same_to_the_bit_wherever_arrays_lie_in_memory():
    """One cache from one process, from many and from another host: filters may not round otherwise."""
    image, mask = tissue(mass=0.1)
    grey, inside = image[:507, :381].astype(np.float32), mask[:507, :381].view(np.uint8)
    rng, lying, found = np.random.default_rng(0), [], set()
    for length in rng.integers(1, 400_000, 24):
        lying.append(np.empty(length, np.uint8))  # what is allocated next lies elsewhere
        gradients = structure.unit_gradients(grey, inside, MM)[0]
        maps = gradients, structure.round_convergence(gradients, 7.0), *specks.curvatures(grey, 0.8)
        found.add(b"".join(each.tobytes() for each in maps))
    assert len(found) == 1


def test_round_convergence_tells_a_mass_from_a_strand_also_at_the_picture_s_side():
    y, x = np.mgrid[:60, :40].astype(np.float32)
    shapes = {
        "mass": np.hypot(y - 30, x - 20), "cut mass": np.hypot(y - 30, x),
        "strand": np.abs(y - 30 + x - 20), "cut strand": np.abs(y - 30), "side": x,
    }  # fmt: skip
    found = {}
    for name, far in shapes.items():
        gradients, _ = structure.unit_gradients(100 - far, np.ones(far.shape, np.uint8), 1.0)
        column = 0 if name.startswith(("cut", "side")) else 20
        found[name] = float(structure.round_convergence(gradients, 7.0)[30, column])
    assert found["mass"] > 0.9
    assert found["cut mass"] > 0.6
    assert max(found["strand"], found["cut strand"], found["side"]) < 0.2, found


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


# ---- As a training target --------------------------------------------------------------------------


def as_view(image, size=256, top=128):
    """A square part of an image at its left side as a sharp view (1, 1, size, size)."""
    part = image[top : top + size, :size].astype(np.float32) / np.iinfo(image.dtype).max
    return torch.from_numpy(part)[None, None]


@pytest.mark.parametrize("step_mm", [0.085, 0.17, MM, 0.34])
def test_the_target_is_the_tiles_convergence(step_mm):
    image, _ = tissue(0.05)
    for top in (128, 0):  # all tissue, and with skin and air
        sharp = as_view(image, top=top)
        grey = sharp[0, 0].numpy()
        gradients, factor = structure.unit_gradients(grey, (grey > 0).view(np.uint8), step_mm)
        maps = targets.StructureMaps(256, step_mm)
        found = maps(sharp)[0].numpy()
        for index, radius in enumerate(targets.DISC_RADII):
            expected = structure.convergence(gradients, factor * step_mm, (radius,))
            expected = np.where(maps.counts[0, index], expected, 0)
            np.testing.assert_allclose(found[index], expected, atol=2e-3)


def test_the_column_is_the_strongest_target_of_a_tile():
    image, _ = tissue(0.05)
    tile = image[160:288, 60:188]
    table = score(tile, np.ones(tile.shape, bool))
    maps = targets.StructureMaps(128, MM)(torch.from_numpy(tile / np.float32(65535))[None, None])
    discs = [targets.DISC_RADII.index(radius) for radius in structure.RADII]
    assert float(maps[0, discs].max()) == pytest.approx(table["convergence"].iloc[0], abs=0.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_blobs_tell_bright_from_dark_and_fine_from_coarse(sign):
    y, x = np.mgrid[:256, :256]
    for index, sigma in enumerate(targets.BLOB_SIGMAS):
        spot = np.exp(-((y - 128) ** 2 + (x - 96) ** 2) * MM**2 / (2 * sigma**2))
        sharp = torch.from_numpy((0.5 + 0.1 * sign * spot).astype(np.float32))[None, None]
        maps = targets.StructureMaps(256, MM)(sharp)[0, len(targets.DISC_RADII) :]
        bright, dark = maps.chunk(2)
        found = bright if sign > 0 else dark
        strongest = found.amax((1, 2))
        # The response of a difference of Gaussians is largest for a spot of about its own width.
        assert abs(int(strongest.argmax()) - index) <= 1
        place = divmod(int(found[strongest.argmax()].argmax()), found.shape[-1])
        assert np.hypot(*(np.array(place) - np.array([128, 96]) * found.shape[-1] / 256)) <= 1.5
        torch.testing.assert_close(bright, -dark)


def test_neither_gain_nor_air_change_the_target():
    image, mask = tissue(0.05)
    maps = targets.StructureMaps(256, MM)
    plain = maps(as_view(image, top=0))
    torch.testing.assert_close(maps(1.3 * as_view(image, top=0)), plain, atol=0.02, rtol=0)
    nothing = maps(torch.zeros(2, 1, 256, 256))  # air alone
    assert (nothing == 0).all()
    skin = cv2.distanceTransform(mask[:256, :256].view(np.uint8), cv2.DIST_L2, 5) * MM < 1.5
    size = plain.shape[-1]
    at_skin = cv2.resize(skin.view(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST) > 0
    assert (plain[:, :, torch.from_numpy(at_skin)] == 0).all()


@pytest.mark.parametrize(
    ("side", "step_mm", "cells"), [(512, 0.085, [5, 3, 1]), (128, 0.34, [4, 3, 1]), (32, 1.2, [1])]
)
def test_cells_are_about_9_and_17_mm_and_the_view_and_no_finer_than_the_features(side, step_mm, cells):
    head = targets.StructureHead(torch.rand(3, 1, side, side), 8, step_mm)
    assert head.cells == cells
    features = -(-side // 32)
    told = head(torch.rand(2, 8, features, features))
    wanted = head.targets(torch.rand(2, 1, side, side))
    assert [t.shape for t in told] == [t.shape for t in wanted]
    assert [t.shape[-1] for t in told] == cells


def test_views_too_small_for_masses_are_refused(archive):
    flags = ("--structure_loss_weight", "1", "--pixel_spacing_mm", "0.05", "--run_name", "small")
    with pytest.raises(mammo.MammoError, match=r"views of 6 mm have no room .* raise --tile_size"):
        open_run(archive, *flags)
