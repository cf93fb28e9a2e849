"""Makers against labels, figures by maker, and the control: known answers, folds by patient, files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pages import Page
from scipy.stats.contingency import association
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import train_classifier as classifier
from byol_mammo import images, makers, report


def women(**found):
    """Two images of each patient; `found`: for each maker, patients with a mass, and in all."""
    rows = []
    for maker, (positive, total) in found.items():
        for number in range(total):
            patient = f"{maker}{number}"
            mass = float(number < positive)
            rows += [
                (f"{patient}_1", patient, maker, "", mass),
                (f"{patient}_2", patient, maker, "", 0.0),
            ]
    return pd.DataFrame(rows, columns=["image", "patient", "maker", "archive", "mass"])


# Labels and makers --------------------------------------------------------------------------------

COINCIDE = {  # patients with a mass and in all by maker -> whether that is said
    "one has nearly all": ({"A": (32, 40), "B": (3, 60)}, True),
    "equal shares": ({"A": (20, 40), "B": (30, 60)}, False),
    "a small effect in many": ({"A": (100, 2000), "B": (240, 2000)}, True),
    "a small effect in few": ({"A": (1, 10), "B": (3, 10)}, False),
    "nobody has it": ({"A": (0, 40), "B": (0, 60)}, False),
    "three makers": ({"A": (30, 40), "B": (3, 60), "C": (3, 50)}, True),
    "unknown is a group": ({"": (32, 40), "B": (3, 60)}, True),
}


@pytest.mark.parametrize("name", COINCIDE)
def test_labels_that_coincide_with_makers_are_said_in_numbers(capsys, name):
    found, said = COINCIDE[name]
    table = makers.note_coinciding(women(**found), ["mass"])
    printed = capsys.readouterr().err
    assert printed.startswith("warning: mass and maker coincide") == said
    shares = {value or "unknown": positive / total for value, (positive, total) in found.items()}
    assert dict(zip(table["value"], table["share"], strict=True)) == pytest.approx(shares)
    if said:
        first = max(shares, key=shares.__getitem__)
        total = found["" if first == "unknown" else first][1]
        assert f"of {first} {shares[first]:.0%} of {total:,} patients have it, of " in printed


def test_the_measures_are_those_of_libraries():
    found = {"A": (320, 400), "B": (30, 600), "C": (100, 500)}
    row = makers.shares(women(**found), ["mass"]).iloc[0]
    counts = np.array([[positive, total - positive] for positive, total in found.values()])
    assert row["cramers_v"] == pytest.approx(association(counts, method="cramer"), abs=0.002)
    truth = np.concatenate([np.arange(total) < positive for positive, total in found.values()])
    alone = np.concatenate([np.full(total, positive / total) for positive, total in found.values()])
    assert row["auroc_of_group"] == pytest.approx(roc_auc_score(truth, alone))


def test_one_group_alone_says_and_writes_nothing(tmp_path, capsys):
    for units in (women(A=(5, 9)), women(**{"": (5, 9)})):
        shared = makers.note_coinciding(units, ["mass"])
        figures = makers.by_group(units, ["mass"], lambda part: pytest.fail("judged"), 1)
        for name in makers.TABLES:
            (tmp_path / name).write_text("of an earlier run")
        makers.write_tables(tmp_path, figures, shared)
        assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_makers_come_from_the_manifest_then_from_labels(tmp_path):
    (tmp_path / "training").mkdir()
    for name in "abc":
        (tmp_path / f"training/{name}.png").write_bytes(b"x")
    rows = ["file,maker", "training/a.png,GE", "training/b.png,"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    sources = images.list_sources(tmp_path / "training")
    labels = pd.DataFrame({"image": ["c", "b", "x", "a"], "maker": ["C", "B", "X", "own"]})
    table = makers.with_groups(labels, np.array([3, 1, 0]), sources, str(tmp_path / "training"))
    assert table["maker"].tolist() == ["C", "B", "X", "GE"]
    assert table["archive"].tolist() == [""] * 4
    old = makers.with_groups(labels[["image"]], np.array([3, 1, 0]), sources, str(tmp_path / "training"))
    assert old["maker"].tolist() == ["", "", "", "GE"]


def test_labels_without_a_split_take_the_manifest_s(tmp_path, capsys):
    """Else the images of its test split would be trained on."""
    (tmp_path / "training").mkdir()
    for name in "abc":
        (tmp_path / f"training/{name}.png").write_bytes(b"x")
    rows = ["file,split", "training/a.png,test", "training/b.png,Train"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    sources = images.list_sources(tmp_path / "training")
    labels = pd.DataFrame({"image": ["c", "b", "a"], "split": ""})
    told = (sources, str(tmp_path / "training"))
    assert makers.with_groups(labels, np.array([2, 1, 0]), *told)["split"].tolist() == [
        "",
        "training",
        "test",
    ]
    assert "note: labels.csv has no split, manifest.csv tells it" in capsys.readouterr().err
    own = labels.assign(split=["", "test", "training"])
    assert makers.with_groups(own, np.array([2, 1, 0]), *told)["split"].tolist() == [
        "",
        "test",
        "training",
    ]
    assert capsys.readouterr().err == ""


# Figures by group ---------------------------------------------------------------------------------


def test_each_group_is_judged_alone_and_too_few_are_named():
    units = women(A=(30, 60), B=(3, 60)).assign(archive=lambda t: np.where(t["maker"] == "A", "x", "y"))
    units["calcification"] = np.where(units["maker"] == "A", np.nan, units.index % 4 == 0)
    judged = []

    def judge(part):
        judged.append(sorted(part["maker"].unique()))
        return [
            {"finding": name, "auroc": 0.7, "start": s}
            for name in ("mass", "calcification")
            for s in "uv"
        ]

    table = makers.by_group(units, ["mass", "calcification"], judge, 20)
    assert judged == [["A"], ["B"], ["A"], ["B"]]
    assert table.groupby("by")["value"].unique().map(list).to_dict() == {
        "archive": ["x", "y"],
        "maker": ["A", "B"],
    }
    rows = table[table["by"] == "maker"].set_index(["value", "finding"]).sort_index()
    assert rows.loc[("A", "mass"), "start"].tolist() == ["u", "v"]
    counts = ["images", "patients", "positive_patients", "negative_patients"]
    assert rows.loc[("A", "mass"), counts].iloc[0].tolist() == [120, 60, 30, 60]
    few = rows.loc[[("B", "mass")]].iloc[0]
    assert np.isnan(few["auroc"])
    assert few["note"] == "fewer than 20 patients with or without"
    assert few["positive_patients"] == 3
    assert rows.loc[[("A", "calcification")], "images"].tolist() == [0]
    assert rows.loc[[("B", "calcification")], "auroc"].tolist() == [0.7, 0.7]


def test_intervals_are_those_of_scikit_learn_s_figures():
    rng = np.random.default_rng(1)
    target = (rng.random(150) < 0.3).astype(float)
    scores = np.round(np.clip(0.3 * target + rng.random(150) * 0.7, 0, 1), 2)  # with ties
    groups = rng.integers(0, 40, 150).astype(str)
    weights = classifier.resample_groups(groups, 60, 0)[1:]
    expected = {"average_precision": [], "sensitivity_at_90_specificity": []}
    for row in weights:
        expected["average_precision"].append(average_precision_score(target, scores, sample_weight=row))
        alarms, found, _ = roc_curve(target, scores, sample_weight=row, drop_intermediate=False)
        expected["sensitivity_at_90_specificity"].append(found[alarms <= 0.1].max())
    found = makers.intervals(scores, target, weights)
    for name, draws in expected.items():
        ends = [found[f"{name}_low"], found[f"{name}_high"]]
        np.testing.assert_allclose(ends, np.percentile(draws, (2.5, 97.5)), rtol=1e-5)
    assert np.isnan([found["ece_low"], found["ece_high"]]).all()  # resamples lift it above itself


def scored_tables(seed=0):
    """Predictions of tiles and images as evaluate has them: maker A told well, maker B by chance."""
    rng = np.random.default_rng(seed)
    units = women(A=(40, 80), B=(40, 80)).assign(study_id=lambda t: t["patient"])
    signal = np.where(units["maker"] == "A", units["mass"], 0)
    units["p_mass"] = np.clip(0.2 + 0.5 * signal + 0.2 * rng.random(len(units)), 0, 1)
    return dict.fromkeys(("tile", "image_max", "image_noisy_or", "breast", "study"), units)


def test_evaluate_s_figures_by_maker_are_those_of_its_images_alone():
    settings = classifier.Settings(findings="mass", bootstrap=100)
    tables = scored_tables()
    found = classifier.figures_by_group(tables, ["mass"], settings)
    assert set(found["level"]) == {"tile", "image_max", "image_noisy_or"}
    rows = found[found["level"] == "image_max"].set_index("value")
    alone = dict(iter(tables["image_max"].groupby("maker")))
    for value, part in alone.items():
        row = rows.loc[value]
        assert row["auroc"] == pytest.approx(roc_auc_score(part["mass"], part["p_mass"]), abs=1e-6)
        for name in ("auroc", "average_precision", "sensitivity_at_90_specificity"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert rows.loc["A", "auroc_low"] > rows.loc["B", "auroc_high"]


# The control --------------------------------------------------------------------------------------


def of_settings(score, truth, patient):
    """As train_classifier.py passes it."""
    return classifier.weighted_auroc(score, truth, classifier.resample_groups(patient, 100, 0))


def tile_features(told):
    """Features (N, 6) of three tiles of each of two images of 30 patients, and the units; `told`: maker,
    patient or nothing, which the features tell."""
    rng = np.random.default_rng(0)
    units = pd.DataFrame({"row": np.repeat(np.arange(60), 3)})
    units["patient"] = [f"p{row // 2}" for row in units["row"]]
    maker = np.arange(30) % 3
    units["maker"] = np.array(["A", "B", "C"])[maker[units["row"] // 2]]
    noise = rng.normal(size=(len(units), 6))
    own = rng.normal(size=(30, 6))[units["row"] // 2] * 4
    signal = {"maker": np.eye(6)[maker[units["row"] // 2]] * 6, "patient": own, "nothing": 0}[told]
    return noise + signal, units


def test_the_control_tells_a_maker_and_not_a_patient():
    rows = {
        told: makers.control(*tile_features(told), of_settings, 0)[0]
        for told in ("maker", "patient", "nothing")
    }
    assert rows["maker"]["auroc"] > 0.97
    assert rows["maker"]["accuracy"] > 0.9
    for told in ("patient", "nothing"):  # folds keep patients whole, so that knowing one is no help
        assert rows[told]["auroc"] < 0.65
        assert rows[told]["low"] <= rows[told]["auroc"] <= rows[told]["high"]
    assert rows["maker"]["majority"] == pytest.approx(1 / 3)
    assert rows["maker"]["low"] > 0.9
    assert "note" not in rows["maker"]


def test_makers_of_few_patients_are_left_out_of_the_control_by_name():
    features, units = tile_features("maker")
    rare = units["patient"].isin(["p0", "p3"])
    rest = units.assign(maker=units["maker"].where(~rare, "Rare"))
    (row,) = makers.control(features, rest, of_settings, 0)
    assert row["note"] == "left out: Rare (2 patients)"
    assert row["auroc"] > 0.97
    two = units["maker"].where(rare, "A")
    (row,) = makers.control(features, units.assign(maker=two.where(~rare, "Rare")), of_settings, 0)
    assert "auroc" not in row
    assert makers.control(features, units.assign(maker="A"), of_settings, 0) == []


# Pages --------------------------------------------------------------------------------------------


def test_the_report_has_the_figures_and_the_warning(tmp_path):
    place = tmp_path / "evaluate"
    place.mkdir()
    tables = scored_tables()
    units = tables["image_max"].assign(mass=lambda t: t["mass"] * (t["maker"] == "A"))
    figures = classifier.figures_by_group(
        tables, ["mass"], classifier.Settings(findings="mass", bootstrap=100)
    )
    makers.write_tables(place, figures, makers.shares(units, ["mass"]))
    page = Page(report.html_classifier(tmp_path))
    assert "Warning: mass and maker coincide (Cramér's V" in page.text
    assert "maker A mass" in page.text
    (place / "maker_shares.csv").write_text("a,b\n1")
    assert "Warning" not in Page(report.html_classifier(tmp_path)).text
