"""Negatives: signs vote, the manifest and --polarity overrule them, doubtful images are named."""

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import breast_image, small_config, write_images
from test_image_mask import phantom, read_back

import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
from byol_mammo import extraction, framing

TRAPS = [trap for trap in phantoms.TRAPS if trap not in ("empty", "inverted")]


@pytest.mark.parametrize("trap", TRAPS)
def test_an_image_is_kept_and_its_negative_inverted(trap, tmp_path):
    for seed in range(3):
        image = phantom(seed, trap, ("CC", "MLO")[seed % 2], 12).image
        assert np.array_equal(read_back(image, tmp_path), image)
        assert np.array_equal(read_back(4095 - image, tmp_path), image)


def test_each_vote_is_the_opposite_for_the_negative():
    for seed in range(3):
        image = phantom(seed, bit_depth=16).image
        votes, others = (
            framing.polarity_votes(framing.content_of(picture)) for picture in (image, 65535 - image)
        )
        assert len(votes) == 4
        for name, vote in votes.items():
            assert vote == pytest.approx(-others[name], abs=0.02)


def test_a_close_up_without_air_is_not_inverted():
    """Bright border, rough dark parts: fine detail alone tells, and a doubt leaves it as it is."""
    for seed in range(8):
        truth = phantom(seed, "large_breast", "CC", 12)
        height, width = truth.image.shape
        close = np.s_[height // 4 : -height // 4, width // 4 : width // 2]
        margin = framing.polarity_margin(framing.polarity_votes(framing.content_of(truth.image[close])))
        assert margin >= -framing.MIN_INVERTED


def negative_among(folder, polarity=None):
    """Two images, of which the second is a negative; with a manifest that tells the polarity of both."""
    write_images(folder / "images", 2)
    path = folder / "images" / "s0_i1.png"
    cv2.imwrite(str(path), 255 - breast_image(seed=1)[0])
    if polarity:
        names = ["images/s0_i0.png", "images/s0_i1.png"]
        table = pd.DataFrame({"file": names, "study_id": "s", "polarity": polarity})
        table.to_csv(folder / "manifest.csv", index=False)
    return folder


def bright_on_dark(folder, *flags):
    """Whether each image shows its breast bright on dark once it is read as an extraction does."""
    config = small_config(folder, *flags)
    sources = mammo.images.list_sources(config.data_dir)
    samples = [mammo.load_sample(index, row, config).image for index, row in sources.iterrows()]
    return [
        bool(np.corrcoef(breast_image(seed=n)[0].ravel(), s.ravel())[0, 1] > 0)
        for n, s in enumerate(samples)
    ]


@pytest.mark.parametrize(
    ("column", "flags", "expected"),
    [
        (None, (), [True, True]),
        (None, ("--polarity", "as_is"), [True, False]),
        (None, ("--polarity", "inverted"), [False, True]),
        (["unknown", ""], (), [True, True]),
        (["as_is", "as_is"], (), [True, False]),
        (["inverted", "unknown"], (), [False, True]),
        (["inverted", "inverted"], ("--polarity", "as_is"), [True, False]),
    ],
)
def test_the_flag_decides_then_the_manifest_then_the_image(tmp_path, column, flags, expected):
    assert bright_on_dark(negative_among(tmp_path, column), *flags) == expected


def test_an_extraction_obeys_the_manifest(tmp_path):
    """Forced the wrong way round, the image's air fills its tiles."""
    folder = negative_among(tmp_path, ["as_is", "as_is"])
    images = pd.read_csv(mammo.build_cache(small_config(folder)) / "images.csv", index_col="image")
    assert images.loc["s0_i1.png", "high"] == 255
    assert images.loc["s0_i0.png", "high"] != 255 or images.loc["s0_i0.png", "low"] > 0


def noted(capsys, margins, folder="a"):
    extraction.note_polarity(pd.Series([f"{folder}/{n}.png" for n in range(len(margins))]), margins)
    return capsys.readouterr().err


def test_close_votes_and_lone_dissenters_are_named(capsys):
    assert noted(capsys, [0.8] * 20) == ""
    assert noted(capsys, [0.8, 0.05, None, -0.1, 1.0, -1.0]).startswith("note: 2 of 5 images: whether")
    alone = noted(capsys, [0.8] * 19 + [-0.9])
    assert "1 of 20 images" in alone
    assert "a/19.png" in alone
    assert noted(capsys, [0.8] * 19 + [-1.0]) == ""  # it was told to be a negative
    assert noted(capsys, [0.8] * 5 + [-0.9]) == ""  # too few to call it a dissent
    assert noted(capsys, [0.8, -0.9] * 10) == ""
    assert "--polarity" in alone


def test_an_extraction_names_its_close_votes(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", 2)
    monkeypatch.setattr(framing, "polarity_margin", lambda votes: 0.1)
    mammo.build_cache(small_config(tmp_path))
    assert "2 of 2 images: whether they are negatives was a close vote" in capsys.readouterr().err
