"""Phantoms: deterministic, laid out like VinDr-Mammo, true to their ground truth."""

import ast
import dataclasses
import re

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_script
from hypothesis import given, settings, strategies as st

import synthetic_mammograms as phantoms
from synthetic_mammograms import PhantomSpec, make_phantom

SMALL = PhantomSpec(height=704, width=560, view="MLO")
KEYS = "study_id,series_id,image_id,laterality,view_position,height,width"
BREAST = f"{KEYS},breast_birads,breast_density,split"
FINDING = BREAST.replace(",split", ",finding_categories,finding_birads,xmin,ymin,xmax,ymax,split")


def spec(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    words = "--studies 3 --height 704 --width 560 --bit_depth 12 --lesion_share 1".split()
    done = run_script(ROOT / "synthetic_mammograms.py", "--output_dir", folder, *words)
    assert done.returncode == 0, done.stderr
    return folder


def test_an_image_follows_from_its_settings_alone():
    first, again = make_phantom(SMALL), make_phantom(SMALL)
    assert np.array_equal(first.image, again.image)
    for change in ({"seed": 1}, {"study": 1}, {"laterality": "R"}):
        assert not np.array_equal(first.image, make_phantom(spec(**change)).image)


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (12, np.uint16), (16, np.uint16)])
def test_bit_depth(bits, dtype):
    image = make_phantom(spec(bit_depth=bits)).image
    assert image.dtype == dtype
    assert 2 ** (bits - 1) < image.max() < 2**bits
    assert image.min() == 0


@pytest.mark.parametrize("side", "LR")
@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_masks_are_consistent(side, view):
    truth = make_phantom(spec(laterality=side, view=view))
    assert cv2.connectedComponents(truth.breast.astype(np.uint8))[0] == 2
    assert not (truth.pectoral & ~truth.breast).any()
    assert truth.pectoral.any() == (view == "MLO")
    chest, far = (0, -1) if side == "L" else (-1, 0)
    assert truth.breast[:, chest].mean() > 0.3
    assert not truth.breast[:, far].any()
    assert np.median(truth.image[truth.breast]) > 20 * max(1, np.median(truth.image[~truth.breast]))


def test_dense_breasts_are_brighter_than_fat_ones():
    grey = [
        np.mean([make_phantom(spec(density=d, view="CC", seed=s)).image.sum() for s in range(3)])
        for d in "AD"
    ]
    assert grey[1] > 1.1 * grey[0]


def test_texture_has_a_power_law_spectrum_near_three():
    noise = phantoms.power_law_noise(np.random.default_rng(0), (512, 512), 0.09)
    power = np.abs(np.fft.fft2(noise)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512)))
    band = (frequency > 0.02) & (frequency < 0.2)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -3.3 < slope < -2.7


def test_lesions_are_where_the_truth_says():
    for kind in phantoms.LESIONS:
        truth = make_phantom(spec(lesions=(kind,), view="CC", height=1408, width=1120))
        twin = make_phantom(spec(lesions=(kind,), view="CC", height=1408, width=1120, lesion_contrast=0))
        difference = truth.image.astype(float) - twin.image
        lesion = truth.lesions[0]
        x0, y0, x1, y1 = lesion.box
        assert 0 <= x0 < x1 <= 1120
        assert 0 <= y0 < y1 <= 1408
        inside = np.zeros(truth.image.shape, bool)
        inside[y0:y1, x0:x1] = True
        assert np.abs(difference[inside]).mean() > 10 * np.abs(difference[~inside]).mean()
        assert truth.breast[inside].all()
        for row, column, diameter, drawn in lesion.specks:
            assert 0.1 <= diameter <= 0.6
            assert drawn >= 2
            spot = difference[int(row) - 1 : int(row) + 2, int(column) - 1 : int(column) + 2]
            assert spot.max() > 3 * np.abs(difference[~inside]).std()


def test_traps_do_what_they_say():
    plain = make_phantom(SMALL).image
    assert np.array_equal(make_phantom(spec(trap="inverted")).image, 65535 - plain)
    for trap, level in (("white_padding", 65535), ("grey_padding", None)):
        image = make_phantom(spec(trap=trap)).image
        constant = np.ptp(image, axis=0) == 0
        padding = constant & (image[0] > 0) if level is None else constant & (image[0] == level)
        assert 0.38 <= padding.mean() <= 0.5
    empty = make_phantom(spec(trap="empty"))
    assert not empty.breast.any()
    assert not empty.lesions
    film = make_phantom(spec(trap="film"))
    air = film.image[~film.breast]
    assert np.percentile(air, 10) > 0
    frame = make_phantom(spec(trap="bright_frame")).image
    assert min(frame[0].min(), frame[-1].min(), frame[:, 0].min(), frame[:, -1].min()) > 32768
    noisy = make_phantom(spec(trap="noisy_background"))
    assert noisy.image[~noisy.breast].std() > 0
    implant = make_phantom(spec(trap="implant"))
    bright = implant.image.astype(float) - plain > 6000
    assert 0.1 < bright[implant.breast].mean() < 0.8


@given(st.integers(64, 400), st.integers(64, 400), st.sampled_from(["CC", "MLO"]))
@settings(max_examples=15, deadline=None)
def test_any_size_works(height, width, view):
    truth = make_phantom(PhantomSpec(height=height, width=width, view=view))
    assert truth.image.shape == truth.breast.shape == truth.pectoral.shape == (height, width)


def test_the_archive_has_vindrs_layout(archive):
    breast = pd.read_csv(archive / "breast-level_annotations.csv")
    finding = pd.read_csv(archive / "finding_annotations.csv")
    assert ",".join(breast.columns) == BREAST
    assert ",".join(finding.columns) == FINDING
    assert len(breast) == 12
    assert set(breast["split"]) == {"training", "test"}
    assert (breast.groupby("study_id")["split"].nunique() == 1).all()
    views = breast.groupby("study_id")[["laterality", "view_position"]].apply(
        lambda g: len(g.drop_duplicates())
    )
    assert (views == 4).all()
    for row in breast.itertuples():
        assert re.fullmatch("[0-9a-f]{32}", row.image_id)
        assert re.fullmatch("BI-RADS [1-5]", row.breast_birads)
        assert re.fullmatch("DENSITY [A-D]", row.breast_density)
        image = cv2.imread(str(archive / "images_png" / row.study_id / f"{row.image_id}.png"), -1)
        assert image.shape == (row.height, row.width)
        assert 255 < image.max() < 4096
    categories = {name for text in finding["finding_categories"] for name in ast.literal_eval(text)}
    assert categories == {"Mass", "Suspicious Calcification"}
    assert finding[["xmin", "ymin", "xmax", "ymax"]].notna().all().all()
    assert (archive / "truth" / "lesions.csv").is_file()


def test_the_command_line_refuses_what_cannot_be_drawn(tmp_path):
    for words, message in ((["--trap", "snow"], "trap"), (["--height", "3"], "outside 64")):
        done = run_script(ROOT / "synthetic_mammograms.py", "--output_dir", tmp_path / "x", *words)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "x").exists()
