"""Views: one faithful resample, documented ranges, randomness from the key alone."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import map_coordinates

import train_byol_mammo as mammo

SPECS = {"view 1": mammo.VIEW_1, "view 2": mammo.VIEW_2}


def one_tile(image, tile_size):
    """A 16-bit image with one tile in its middle."""
    height, width = image.shape
    row = {"offset": 0, "height": height, "width": width, "y0": 0, "x0": 0, "low": 0, "high": 65535}
    tile = {"image": 0, "x": (width - tile_size) / 2, "y": (height - tile_size) / 2}
    pixels = np.ascontiguousarray(image).astype(np.uint16).ravel()
    return mammo.MammogramTiles(pixels, pd.DataFrame([row]), pd.DataFrame([tile]), tile_size)


def test_views_follow_from_the_key_alone(tiles):
    ids = np.arange(6)
    first = mammo.make_view(tiles, ids, mammo.VIEW_2, 32, (1, 2, 3)).image
    torch.rand(5)
    np.random.rand(5)
    assert torch.equal(first, mammo.make_view(tiles, ids, mammo.VIEW_2, 32, (1, 2, 3)).image)
    other = mammo.make_view(tiles, ids, mammo.VIEW_2, 32, (1, 2, 4)).image
    assert ((first - other).flatten(1).abs().max(1).values > 0).all()


def test_parameters_differ_per_sample_and_view(tiles):
    ids = np.zeros(8, int)
    views = [
        mammo.make_view(tiles, ids, spec, 32, (0, 0, n)).image for n, spec in enumerate(SPECS.values())
    ]
    flat = torch.cat(views).flatten(1)
    distance = torch.cdist(flat, flat) + torch.eye(16) * 1e3
    assert distance.min() > 0.1


@pytest.mark.parametrize("reduce", [1, 4])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gather_equals_a_float64_reference_warp(tiles, spec, reduce):
    source = mammo.open_tiles(tiles.cache, reduce)
    size, ids = 128 // reduce, np.arange(0, len(tiles), 5)
    homographies = mammo.random_homographies(spec, np.random.default_rng(0), len(ids))
    views = mammo.sample_tiles(source, ids, homographies, size)
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    v, u = np.meshgrid(axis, axis, indexing="ij")
    points = np.stack([u, v, np.ones_like(u)])
    for view, index, matrix in zip(views, ids, homographies, strict=True):
        offset, height, width = source.layout[index]
        pixels = source.pixels[offset : offset + height * width].numpy().view(np.uint16)
        x, y, w = np.einsum("ij,jhw->ihw", matrix, points)
        x = source.centre[index][0] + x / w * 64 / reduce - 0.5
        y = source.centre[index][1] + y / w * 64 / reduce - 0.5
        padded = np.pad(pixels.reshape(height, width).astype(float), 1)  # 0 beyond the image
        grey = map_coordinates(padded, [y + 1, x + 1], order=1, cval=0)
        low, high = source.window[index].astype(float)
        expected = np.maximum((grey - low) / (high - low), 0)
        assert np.abs(view[0].numpy() - expected).max() < 1e-3


def regions_by_slices(tiles, ids, reach):
    """What cut_regions must give, tile after tile."""
    side, grey = 2 * reach, tiles.pixels.numpy()
    grey = grey.view(np.uint16) if grey.dtype == np.int16 else grey
    out = np.zeros((len(ids), 1, side, side), np.float32)
    for region, (x, y), (offset, height, width) in zip(
        out[:, 0],
        np.floor(tiles.centre[ids]).astype(int) - reach,
        tiles.layout[ids].tolist(),
        strict=True,
    ):
        image = grey[offset : offset + height * width].reshape(height, width)
        top, bottom, left, right = max(y, 0), min(y + side, height), max(x, 0), min(x + side, width)
        region[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("reduce", "reach"), [(1, 19), (1, 27), (1, 60), (2, 13)])
def test_regions_are_slices_of_their_images_and_0_off_them(dtype, reduce, reach):
    """Tiles touch all borders of the images and the ends of the pixel array; some regions are wider."""
    sizes = [(50, 40), (33, 90), (64, 34)]
    offsets = np.cumsum([0, *(height * width for height, width in sizes)])
    pixels = np.random.default_rng(0).integers(1, np.iinfo(dtype).max + 1, offsets[-1]).astype(dtype)
    images = pd.DataFrame(sizes, columns=["height", "width"]).assign(
        offset=offsets[:-1], x0=0, y0=0, low=0, high=9
    )
    pixels = pixels[: sum(-(-height // reduce) * -(-width // reduce) for height, width in sizes)]
    places = [
        {"image": index, "x": x, "y": y}
        for index, (height, width) in enumerate(sizes)
        for x in (0, (width - 32) // 2, width - 32)
        for y in (0, height - 32)
    ]
    tiles = mammo.MammogramTiles(pixels, images, pd.DataFrame(places), 32, reduce)
    ids = np.random.default_rng(1).permutation(len(places))
    expected = regions_by_slices(tiles, ids, reach)
    assert torch.equal(mammo.cut_regions(tiles, ids, reach), expected)
    assert 0.05 < (expected == 0).float().mean() < 0.95


def test_a_subset_gives_the_views_of_its_tiles_to_the_bit(tiles):
    ids = np.arange(len(tiles))[::-3]
    for spec in SPECS.values():
        whole = mammo.make_view(tiles, ids, spec, 32, (5,)).image
        part = mammo.make_view(tiles.subset(ids), np.arange(len(ids)), spec, 32, (5,)).image
        assert torch.equal(whole, part)


def test_plain_view_is_the_tile(archive, tiles):
    ids = np.arange(4)
    view = mammo.make_view(tiles, ids, mammo.PLAIN_VIEW, 128).image * mammo.GREY_STD + mammo.GREY_MEAN
    for index in ids:
        tile = tiles.table.loc[index]
        image = tiles.images.loc[tile["image"]]
        source = mammo.read_mammogram(archive / "images" / image["image"])
        source = np.where(mammo.segment_breast_tissue(source), source, 0)
        y, x = int(tile["y"]), int(tile["x"])
        grey = (source[y : y + 128, x : x + 128] - image["low"]) / (image["high"] - image["low"])
        np.testing.assert_allclose(view[index, 0], np.maximum(grey, 0), atol=1e-4)


def test_full_bit_depth_reaches_the_views(tiles):
    view = mammo.make_view(tiles, np.arange(16), mammo.PLAIN_VIEW, 128).image
    assert len(torch.unique(view)) > 1000


def speck_contrast(view):
    return float(view.max() - view.median())


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
def test_a_three_pixel_speck_survives(shift):
    y, x = np.mgrid[:192, :192] + 0.5
    sigma = 3 / 2.355
    speck = np.exp(-((x - 96 - shift) ** 2 + (y - 96 - shift) ** 2) / (2 * sigma**2))
    image = 20000 + 20000 * speck
    tiles, ids = one_tile(image, 128), np.zeros(16, int)
    spec = mammo.ViewSpec(rotation=25, flip=True)
    turned = mammo.sample_tiles(
        tiles, ids, mammo.random_homographies(spec, np.random.default_rng(0), 16), 128
    )
    whole = (image.max() - 20000) / 65535
    assert min(speck_contrast(view) for view in turned) >= 0.8 * whole
    strongest = torch.full((16, 1, 1, 1), mammo.VIEW_2.blur)
    blurred = mammo._gaussian_blur(turned, strongest)
    assert min(speck_contrast(view) for view in blurred) >= 0.4 * whole


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_views_stay_inside_the_margin_and_show_no_black_corner(spec):
    homographies = mammo.random_homographies(spec, np.random.default_rng(0), 5000)
    corners = np.array([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]], float).T
    x, y, w = np.moveaxis(homographies @ corners, 1, 0)
    reach = max(np.abs(x / w).max(), np.abs(y / w).max())
    assert reach <= 1 + 2 * mammo.VIEW_MARGIN
    side = 128 + 2 * round(128 * mammo.VIEW_MARGIN)
    tissue = one_tile(np.full((side, side), 30000), 128)
    views = mammo.sample_tiles(tissue, np.zeros(300, int), homographies[:300], 32)
    np.testing.assert_allclose(views, 30000 / 65535, atol=1e-5)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_geometric_ranges_are_as_documented(seed):
    for spec, degrees, scale in ((mammo.VIEW_1, 15, 0.15), (mammo.VIEW_2, 25, 0.0)):
        for matrix in mammo.random_homographies(spec, np.random.default_rng(seed), 20):
            magnification = 1 / np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
            assert 1 - scale - 1e-9 <= magnification <= 1 + scale + 1e-9
            angle = np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0]))
            angle = (angle + 90) % 180 - 90  # flips aside
            assert abs(angle) <= degrees + 1e-9


@pytest.mark.parametrize(("spec", "strength"), [(mammo.VIEW_1, 0.3), (mammo.VIEW_2, 0.4)])
def test_photometric_ranges_are_as_documented(spec, strength):
    view = torch.full((400, 1, 8, 8), 0.5)
    view[:, :, :4] = 0.25
    out = mammo.adjust_photometry(
        view, mammo.dataclasses.replace(spec, blur=0), np.random.default_rng(0)
    )
    brightness = out.mean((1, 2, 3)) / 0.375
    contrast = (out[:, 0, 5, 0] - out[:, 0, 0, 0]) / 0.25 / brightness
    for factor in (brightness, contrast):
        assert 1 - strength - 1e-4 <= factor.min() < 1 - 0.8 * strength
        assert 1 + 0.8 * strength < factor.max() <= 1 + strength + 1e-4


def test_air_stays_black_and_bright_specks_are_not_clipped():
    view = torch.zeros(64, 1, 16, 16)
    view[:, :, :8] = 0.6
    view[:, :, 2, 2] = 1.8
    out = mammo.adjust_photometry(view, mammo.VIEW_1, np.random.default_rng(0))
    assert not out[:, :, 8:].any()
    assert (out[:, 0, 2, 2] > out[:, 0, 0, 0]).all()
    assert out.max() > 1.5


def test_blur_leaves_air_black_and_fills_a_black_pixel_of_tissue():
    view = torch.zeros(64, 1, 32, 32)
    view[:, :, :16] = 0.6
    view[:, :, 8, 8] = 0
    out = mammo.adjust_photometry(view, mammo.VIEW_2, np.random.default_rng(0))
    assert not out[:, :, 16:].any()
    assert (out[:, :, :16].flatten(1) > 0).sum(1).min() >= 16 * 32 - 1
    blurred = out[:, 0, 8, 8] > 0.01
    assert 0.2 < blurred.float().mean() < 0.6


@pytest.mark.parametrize("dark", [1, 8000, 8500])
def test_lower_contrast_leaves_no_holes_in_dark_tissue(dark):
    """What lies at or below the window's low end is lifted as what lies just above it; air is not."""
    image = np.full((256, 256), 30000)
    image[::3, ::3] = dark
    image[:, :100] = 0
    tiles = one_tile(image, 128)
    tiles.window[:] = 8192, 65535
    seen = [mammo.make_view(tiles, np.array([0]), mammo.PLAIN_VIEW, 128).sharp]
    spec = mammo.ViewSpec(contrast=0.4)
    draws = (np.random.default_rng(key).uniform(-1, 1, (1, 2))[0, 1] for key in range(50))
    key = next(key for key, draw in enumerate(draws) if draw < -0.9)
    seen.append(mammo.adjust_photometry(seen[0], spec, np.random.default_rng(key)))
    for view in seen:
        air, tissue = view[0, 0, :, :35], view[0, 0, :, 38:]
        assert air.abs().max() == 0
        assert tissue.min() > 0
    assert seen[1][0, 0, :, 38:].min() > 0.1


def test_half_of_the_second_views_are_not_blurred():
    view = torch.rand(1000, 1, 16, 16) + 0.1
    spec = mammo.ViewSpec(blur=1.2)
    out = mammo.adjust_photometry(view, spec, np.random.default_rng(0))
    same = (out - view).flatten(1).abs().max(1).values < 1e-5
    assert 0.4 < same.float().mean() < 0.6


@pytest.mark.parametrize(
    ("tile", "view", "expected"),
    [(512, 512, 1), (512, 384, 1), (512, 256, 2), (512, 96, 4), (64, 128, 1)],
)
def test_reduction_keeps_more_than_the_view_needs(tile, view, expected):
    assert mammo.reduction(tile, view) == expected


def test_shrinking_does_not_alias():
    """Single-pixel noise shrunk 3-fold must lose its variance as an area mean does."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 65535, (768, 768))
    block = image.reshape(384, 2, 384, 2).mean((1, 3))
    view = mammo.sample_tiles(one_tile(block, 384), np.zeros(1, int), np.eye(3)[None], 256)
    ideal = image.reshape(256, 3, 256, 3).mean((1, 3)).std() / 65535
    assert float(view.std()) < 1.3 * ideal
