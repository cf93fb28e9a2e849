"""What views share without telling anything of tissue, and what features tell of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import train_byol_mammo as mammo
from byol_mammo import report, shortcuts


def tissue(count=24, side=32, seed=0):
    """Views of noise with a strip of air of another width in each."""
    rng = np.random.default_rng(seed)
    grey = rng.uniform(0.2, 0.4, (count, 1, side, side)) * rng.uniform(0.5, 2, (count, 1, 1, 1))
    for view, width in zip(grey, rng.integers(1, side // 2, count), strict=True):
        view[..., :width] = 0
    return torch.from_numpy(grey.astype(np.float32))


def test_facts_of_a_view_whose_facts_are_known():
    grey = torch.zeros(2, 1, 16, 16)
    grey[0, ..., 4:] = 0.5
    grey[1, ..., 4::2], grey[1, ..., 5::2] = 0.4, 0.6
    facts = shortcuts.shared_facts(grey)
    assert facts["air"].tolist() == [0.25, 0.25]
    torch.testing.assert_close(facts["brightness"], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(facts["spread"], torch.tensor([0.0, 0.1]))
    flat, striped = facts["detail"].exp().tolist()
    assert flat == pytest.approx(0, abs=1e-6)  # the step to air does not count
    assert striped == pytest.approx((2 * 0.2) ** 2, rel=1e-3)


def test_views_that_share_a_fact_are_told_from_views_that_do_not():
    grey = tissue()
    assert all(value == pytest.approx(1) for value in shortcuts.correlations(grey, grey).values())
    brighter = shortcuts.correlations(grey, grey * torch.rand(24, 1, 1, 1).add(0.5))
    assert brighter["air"] == pytest.approx(1)
    assert brighter["brightness"] < 0.95
    assert abs(shortcuts.correlations(grey, tissue(seed=1))["air"]) < 0.6


def test_features_tell_what_they_hold_and_nothing_else():
    grey, patients = tissue(240), [str(number // 4) for number in range(240)]
    facts = shortcuts.shared_facts(grey)
    rng = np.random.default_rng(0)
    features = np.column_stack([facts["air"], rng.normal(size=(240, 5))])
    told = shortcuts.told_nuisances(features, grey, patients)
    assert told["r2_air"] > 0.99
    assert told["r2_brightness"] < 0.2
    assert shortcuts.told_nuisances(features, grey, ["one", "other"] * 120) == {}
    assert shortcuts.told_nuisances(features, grey.clamp_min(0.1), patients).keys() == {"r2_brightness"}
    assert np.isfinite([*shortcuts.told_nuisances(features[:3], grey[:3], list("abc")).values()]).all()


def test_the_report_says_what_features_tell_where_it_is_known():
    text = report.html_nuisances({"r2_air": 0.625, "r2_brightness": -0.1})
    assert "share of air with R&sup2; 0.62" in text
    assert report.html_nuisances({}) == ""


class Run:
    """As much of a run as the note looks at."""

    total_steps, agreed_early = 400, False
    ranks = mammo.processes.Ranks()

    def __init__(self, step):
        self.step = step


@pytest.mark.parametrize(
    ("step", "loss", "said"), [(20, -0.96, True), (20, -0.9, False), (21, -0.99, False)]
)
def test_views_that_agree_too_early_are_said_once(step, loss, said, capsys):
    run = Run(step)
    for _ in range(2):
        mammo.note_early_agreement(run, {"loss": loss})
    assert capsys.readouterr().err.count("agree before the network") == said
