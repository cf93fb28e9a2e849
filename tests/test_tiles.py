"""Grid, scores and acceptance of tiles."""

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import breast_image, small_config, write_images
from hypothesis import given, settings, strategies as st

import train_byol_mammo as mammo
from byol_mammo.settings import MammoError

CONFIG = mammo.Config(tile_size=128, tile_stride=64)
COLUMNS = "x y breast_ratio mean_intensity non_zero_ratio freq_energy convergence rejected_by".split()


@given(st.integers(1, 5000), st.integers(32, 600), st.integers(8, 600))
def test_positions_are_in_bounds_unique_and_cover(length, size, stride):
    starts = mammo.tile_positions(length, size, stride)
    assert (np.diff(starts) > 0).all()
    assert starts[0] == 0
    assert starts[-1] == max(0, length - size)
    if stride <= size:
        covered = np.zeros(max(length, size), bool)
        for start in starts:
            covered[start : start + size] = True
        assert covered.all()


def test_one_row_for_every_position_with_last_row_and_column():
    image, mask = breast_image(384, 330)
    table = mammo.score_tiles(image, mask, CONFIG)
    assert list(table.columns) == COLUMNS
    assert sorted(table["x"].unique()) == [0, 64, 128, 192, 202]
    assert sorted(table["y"].unique()) == [0, 64, 128, 192, 256]
    assert len(table) == 25
    assert not table.duplicated(["x", "y"]).any()


def test_scores_are_what_their_definitions_say():
    image, mask = breast_image(bits=12)
    image[100:120, 40:60] = 0
    table = mammo.score_tiles(image, mask, CONFIG)
    low, high = mammo.intensity_window(image, mask)
    for row in table.itertuples():
        area = (slice(row.y, row.y + 128), slice(row.x, row.x + 128))
        grey, breast = image[area].astype(float), mask[area]
        assert np.isclose(row.breast_ratio, breast.mean())
        if breast.any():
            mean = np.clip(255 * (grey[breast].mean() - low) / (high - low), 0, 255)
            assert np.isclose(row.mean_intensity, mean)
            assert np.isclose(row.non_zero_ratio, (grey[breast] > 0).mean())
        else:
            assert row.rejected_by == "breast_ratio"


def test_a_single_tile_is_an_image():
    image, _ = breast_image(128, 128)
    table = mammo.score_tiles(image, np.ones(image.shape, bool), CONFIG)
    assert table[["x", "y"]].to_numpy().tolist() == [[0, 0]]
    energy = mammo.frequency_energy(image, np.ones(image.shape, bool))
    assert np.isclose(table["freq_energy"].iloc[0], energy)


THRESHOLDS = st.tuples(st.floats(0, 1), st.floats(0, 255), st.floats(0, 1), st.floats(0, 0.2))


@given(THRESHOLDS, THRESHOLDS)
@settings(max_examples=100)
def test_stricter_thresholds_never_add_tiles(first, second):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.random((200, 5)) * (1, 255, 1, 0.2, 1), columns=mammo.SCORES)
    table.iloc[:20, 0] = 0
    kept = []
    for bars in (np.minimum(first, second), np.maximum(first, second)):
        names = ("min_breast_ratio", "min_tile_intensity", "min_non_zero_pixels", "min_freq_energy")
        config = mammo.Config(
            **dict(zip(names, bars.tolist(), strict=True)), high_freq_energy=0, min_convergence=0
        )
        failure = mammo._first_failure(table, config)
        kept.append(failure == "")
        for name, bar in zip(mammo.COLUMNS, bars, strict=True):
            assert (table[name][failure == ""] >= bar).all()
    assert (kept[0] | ~kept[1]).all()
    assert not kept[0][:20].any()


def test_window_and_intensity_do_not_depend_on_bit_depth():
    image, mask = breast_image(bits=8)
    as_16 = image.astype(np.uint16) * 257
    a, b = mammo.score_tiles(image, mask, CONFIG), mammo.score_tiles(as_16, mask, CONFIG)
    np.testing.assert_allclose(a["mean_intensity"], b["mean_intensity"], atol=0.5)
    np.testing.assert_allclose(a["freq_energy"], b["freq_energy"], rtol=0.02, atol=1e-4)
    assert mammo.intensity_window(as_16, mask) == tuple(
        257 * level for level in mammo.intensity_window(image, mask)
    )


def test_a_saturated_tile_has_a_window():
    for kind in (np.uint8, np.uint16):
        image = np.full((512, 512), np.iinfo(kind).max, kind)
        low, high = mammo.intensity_window(image, np.ones(image.shape, bool))
        assert high == low + 1
        table = mammo.score_tiles(image, np.ones(image.shape, bool), mammo.Config())
        assert table["mean_intensity"].notna().all()


def test_thresholds_of_zero_keep_everything_with_breast():
    image, mask = breast_image()
    config = mammo.Config(
        tile_size=128, tile_stride=64, min_breast_ratio=0, min_freq_energy=0, min_tile_intensity=0,
        min_non_zero_pixels=0,
    )  # fmt: skip
    table = mammo.score_tiles(image, mask, config)
    assert ((table["rejected_by"] == "") == (table["breast_ratio"] > 0)).all()


def test_high_energy_and_convergence_keep_tiles_and_are_counted():
    row = {
        "breast_ratio": 0.5, "mean_intensity": 90, "non_zero_ratio": 1.0, "freq_energy": 0.035,
        "convergence": 0.4,
    }  # fmt: skip
    cases = [
        ({}, "", False),
        ({"mean_intensity": 10}, "mean_intensity", False),
        ({"mean_intensity": 10, "freq_energy": 0.05}, "", True),
        ({"non_zero_ratio": 0.1, "freq_energy": 0.05}, "", True),
        ({"breast_ratio": 0.1, "freq_energy": 0.05}, "breast_ratio", False),
        ({"freq_energy": 0.01}, "freq_energy", False),
        ({"freq_energy": 0.01, "convergence": 0.7}, "", True),
        ({"convergence": 0.7}, "", False),
        ({"mean_intensity": 10, "convergence": 0.9}, "mean_intensity", False),
        ({"breast_ratio": 0.1, "convergence": 0.9}, "breast_ratio", False),
    ]
    table = pd.DataFrame([{**row, **change} for change, _, _ in cases])
    config = mammo.Config()
    table["rejected_by"] = mammo._first_failure(table, config)
    assert table["rejected_by"].tolist() == [reason for _, reason, _ in cases]
    assert mammo.is_rescued(table, config).tolist() == [rescued for _, _, rescued in cases]
    off = mammo._first_failure(table, mammo.Config(high_freq_energy=0))
    assert off[2] == "mean_intensity"
    off = mammo._first_failure(table, mammo.Config(min_convergence=0))
    assert [off[5], off[6]] == ["freq_energy", "freq_energy"]


def test_tissue_of_no_grey_is_not_kept_as_air(tmp_path):
    """In 8 bits the darkest tissue may be 0, as air is: holes in views of less contrast."""
    image, _ = breast_image(bits=8)
    image[100:280:7, 20:180:5] = 0
    cv2.imwrite(str(tmp_path / "a.png"), image)
    record, pixels = mammo.extract_image(str(tmp_path / "a.png"), 0.3, small_config(tmp_path))
    mask = mammo.segment_breast_tissue(mammo.read_mammogram(tmp_path / "a.png"))
    (y, x), (height, width) = record["origin"], pixels.shape
    inside = mask[y : y + height, x : x + width]
    assert (image[y : y + height, x : x + width][inside] == 0).sum() > 100
    assert ((pixels > 0) == inside).all()


def test_images_that_are_smaller_than_a_tile_are_not_a_matter_of_criteria(tmp_path):
    write_images(tmp_path / "images", count=2)
    with pytest.raises(MammoError, match="no tile was kept") as caught:
        mammo.build_cache(small_config(tmp_path, "--tile_size", "512"))
    assert "a smaller --tile_size" in str(caught.value)
    assert "loosen" not in str(caught.value)
