"""Attention over an image's tiles: learnt from image labels alone, grades, pooling, maps, refusals."""

import re

import cv2
import numpy as np
import pandas as pd
import pytest
import small_network
import torch
from conftest import breast_image
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, roc_auc_score

import train_byol_mammo as mammo
import train_classifier as classifier
from byol_mammo import grades, image_head, labels

CPU = torch.device("cpu")
TARGETS = (image_head.Target("mass", (0, 1)), image_head.Target("density", (1, 2, 3, 4)))
RECIPE = image_head.Recipe(12, 12, 16, 3e-2, 1e-2, 0, CPU)


def make_bags(count=160, seed=0):
    """Bags of 3 to 12 tiles of 8 features: a mass is one tile with a high first feature, density the
    mean of the second. Values (count, 2), some unknown."""
    rng = np.random.default_rng(seed)
    values = np.stack([rng.integers(0, 2, count), rng.integers(1, 5, count)], axis=1).astype(np.float32)
    parts = []
    for mass, density in values:
        part = rng.normal(size=(rng.integers(3, 13), 8)).astype(np.float32)
        part[:, 1] += density
        part[rng.integers(len(part)), 0] += 6 * mass
        parts.append(part)
    values[rng.random(values.shape) < 0.1] = np.nan
    starts = np.cumsum([0, *map(len, parts[:-1])])
    return image_head.Bags(np.concatenate(parts), starts), values


# ---- heads


@pytest.fixture(scope="module")
def fitted():
    """Bags, values, who is held out, and for each pooling a head and its rows."""
    bags, values = make_bags()
    held_out = np.arange(len(bags)) % 4 == 0
    heads = {p: image_head.fit(bags, values, held_out, TARGETS, p, RECIPE) for p in image_head.POOLINGS}
    return bags, values, held_out, heads


def test_every_pooling_learns_what_one_tile_and_what_all_tiles_tell(fitted):
    judged, values = make_bags(seed=1)
    for pooling, (head, rows) in fitted[3].items():
        above = image_head.answers(head, judged, np.arange(len(judged)), CPU)
        means, given = image_head.expected(above, TARGETS)
        known = np.isfinite(values)
        least = 0.7 if pooling == "noisy_or" else 0.85  # all tiles' chance adds up
        assert roc_auc_score(values[known[:, 0], 0], means[known[:, 0], 0]) > least, pooling
        assert spearmanr(values[known[:, 1], 1], means[known[:, 1], 1]).statistic > 0.7, pooling
        assert set(given[:, 1]) <= {1, 2, 3, 4}
        if pooling != "noisy_or":  # which knows the number of tiles
            assert rows[0]["auroc"] == pytest.approx(0.5)  # the start knows nothing


def test_attention_finds_the_tile_that_holds_the_mass(fitted):
    judged, values = make_bags(seed=1)
    stops = np.append(judged.starts[1:], len(judged.features))
    head, hits = fitted[3]["attention"][0], []
    for start, stop, (mass, _) in zip(judged.starts, stops, values, strict=True):
        tiles = judged.features[start:stop]
        share = image_head.attend(head, tiles, CPU)
        np.testing.assert_allclose(share.sum(0), 1, rtol=1e-5)
        if mass == 1:
            hits.append(share[:, 0].argmax() == tiles[:, 0].argmax())
    assert np.mean(hits) > 0.8


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(fitted):
    bags, values, held_out, heads = fitted
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again, rows = image_head.fit(bags, values, held_out, TARGETS, "attention", RECIPE)
    assert torch.equal(torch.get_rng_state(), state)
    head, before = heads["attention"]
    assert rows == before
    for name, value in head.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_pooled_answers_are_those_of_the_formulas(fitted):
    """Also beside an image of more tiles, whose places stay empty."""
    bags, *_, heads = fitted
    tiles = bags.features[: bags.starts[1]]
    longest = int(np.argmax(np.diff(bags.starts)))
    for pooling, (head, _) in heads.items():
        with torch.no_grad():
            x = (torch.tensor(tiles) - head.mean) / head.scale
            score = head.score(x)[:, head.owner] + head.thresholds
            if pooling == "max":
                expected = score.amax(0).sigmoid()
            elif pooling == "noisy_or":
                expected = 1 - (1 - score.sigmoid()).prod(0)
            else:
                gated = torch.tanh(head.content(x)) * torch.sigmoid(head.gate(x))
                share = head.choose(gated).softmax(0)[:, head.owner]
                expected = (share * score).sum(0).sigmoid()
        found = image_head.answers(head, bags, np.array([0, longest]), CPU)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_thresholds_grades_and_what_is_unknown():
    values = np.array([[1, 4], [0, np.nan], [np.nan, 2]], np.float32)
    above = image_head.exceeds(values, TARGETS)
    nan = np.nan
    np.testing.assert_equal(above, np.array([[1, 1, 1, 1], [0, *[nan] * 3], [nan, 1, 0, 0]], np.float32))
    means, given = image_head.expected(np.array([[0.3, 0.9, 0.6, 0.1]]), TARGETS)
    np.testing.assert_allclose(means, [[0.3, 2.6]])
    np.testing.assert_array_equal(given, [[0, 3]])
    far = (image_head.Target("birads", (2, 5)),)  # grades between which none was seen
    np.testing.assert_allclose(image_head.expected(np.array([[0.5]]), far)[0], [[3.5]])
    owner = torch.tensor([0, 1, 1, 1])
    logits = torch.zeros(3, 4)
    even = image_head.coral_loss(logits, torch.tensor(above), owner)
    assert even == pytest.approx(np.log(2), rel=1e-5)
    logits[0, 0] = -9  # wrong of a mass: half of all that is known of the first image
    assert image_head.coral_loss(logits, torch.tensor(above), owner) > even + 1.5


def test_graded_figures_equal_the_libraries():
    rng = np.random.default_rng(0)
    truth, mean = rng.integers(1, 5, 60).astype(float), rng.normal(size=60)
    given = rng.integers(1, 5, 60).astype(float)
    weights = np.vstack([np.ones(60), rng.integers(0, 3, 60), truth == 2])
    found = grades.graded_figures(truth, mean, given, weights)
    assert found["kappa"][0] == pytest.approx(cohen_kappa_score(truth, given, weights="quadratic"))
    weighted = cohen_kappa_score(truth, given, weights="quadratic", sample_weight=weights[1])
    assert found["kappa"][1] == pytest.approx(weighted)
    assert found["rank_correlation"][0] == pytest.approx(spearmanr(truth, mean).statistic)
    assert np.isnan([found["kappa"][2], found["rank_correlation"][2]]).all()  # one grade alone


def test_answers_are_said_in_the_words_of_their_scale():
    row = {"p_mass": 0.62, "grade_density": 4, "expected_density": 3.52}
    row |= {"grade_birads": 5, "expected_birads": 4.4}
    said = [grades.describe(name, row) for name in ("mass", "density", "birads")]
    assert said == ["mass: 62% for the image", "density: D (mean 3.5, A = 1)", "birads: 5 (mean 4.4)"]


def test_features_are_kept_and_made_once(tmp_path):
    calls, path = [], tmp_path / ".features" / "a.npy"

    def make():
        calls.append(1)
        return np.arange(12, dtype=np.float32).reshape(4, 3)

    for _ in range(2):
        np.testing.assert_array_equal(image_head.keep_features(path, (4, 3), make), make())
    assert len(calls) == 3  # one, and two to compare with
    path.write_bytes(path.read_bytes()[:-4])  # a full disk
    np.testing.assert_array_equal(image_head.keep_features(path, (4, 3), make), make())
    assert len(calls) == 5
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".npy"] == ["a.npy"]


# ---- grades in labels.csv


@pytest.mark.parametrize(
    ("name", "column", "cells", "found"),
    [
        ("density", "breast_density", ["DENSITY A", "b", "3", "IV", "", "n/a"],
         [1, 2, 3, 4, None, None]),
        ("birads", "breast_birads", ["BI-RADS 4", "1", "4C", "6.0", "BI-RADS 0", ""],
         [4, 1, 4, 6, None, None]),
    ],
)  # fmt: skip
def test_grades_are_read(tmp_path, capsys, name, column, cells, found):
    table = pd.DataFrame({"image": [f"{n}.png" for n in range(len(cells))], column: cells})
    table.to_csv(tmp_path / "labels.csv", index=False)
    read = labels.read_labels(tmp_path / "labels.csv", [name])[name]
    np.testing.assert_equal(read.to_numpy(), np.array(found, float))
    note = capsys.readouterr().err
    assert ("1 images of BI-RADS 0 have no birads" in note) == (name == "birads")


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("density", {"breast_density": "fair"}, r"breast_density of a\.png is 'fair'; A to D, 1 to 4"),
        ("birads", {"breast_birads": "7"}, r"breast_birads of a\.png is '7'; 0 to 6"),
        (
            "density",
            {"breast_density": "A", "density": 1},
            "both breast_density and density are columns",
        ),
        ("density", {"breast_birads": "1"}, "no column breast_density"),
        ("breast_density", {"breast_density": "A"}, "not 0, 1 or empty; --findings density learns it"),
    ],
)
def test_grades_that_cannot_be_read_are_refused(tmp_path, name, columns, message):
    pd.DataFrame([{"image": "a.png", **columns}]).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(mammo.MammoError, match=message):
        labels.read_labels(tmp_path / "labels.csv", [name])


# ---- the commands on images


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """images/ with 36 breasts of as many patients, 24 for training: half have a bright mass, density is
    grain; labels.csv without boxes. One is black: it has no tile."""
    folder = tmp_path_factory.mktemp("films") / "images"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for patient in range(36):
        mass, density = patient % 2, patient // 2 % 4
        image, mask = breast_image(192, 160, seed=patient)
        x, y = rng.integers(30, 80), rng.integers(70, 120)
        spot = np.exp(-(np.hypot(*np.ogrid[-y : 192 - y, -x : 160 - x]) ** 2) / 100)
        image = image * 0.5 + mask * (40 + mass * 90 * spot + density * 9 * rng.normal(size=mask.shape))
        image = np.where(mask & (patient != 34), image, 0).clip(0, 255)
        cv2.imwrite(str(folder / f"p{patient}.png"), image.astype(np.uint8))
        rows.append(
            {
                "image": f"p{patient}.png", "study_id": f"p{patient}", "laterality": "L", "view": "CC",
                "split": "training" if patient < 24 else "test", "mass": mass,
                "breast_density": f"DENSITY {'ABCD'[density]}", "maker": "GE" if mass else "Siemens",
                "breast_birads": 2 + density if patient < 24 else "",
            }
        )  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder


def run(command, films, *flags, out=None):
    sizes = "--tile_size 64 --tile_stride 32 --view_size 32 --pixel_spacing_mm 0.68".split()
    quick = "--device cpu --wandb_mode disabled --num_workers 1 --bootstrap 100".split()
    places = ["--data_dir", films, "--labels", films / "labels.csv", "--output_dir", out or films.parent]
    places += ["--cache_dir", films.parent / "cache"]
    return classifier.main([command, *map(str, [*places, *quick, *sizes, *flags])])


def train(films, *flags, out=None):
    learn = "--mode attention --epochs 15 --batch_size 8 --lr 0.01 --weights none".split()
    return run("train", films, *learn, "--backbone", small_network.NAME, *flags, out=out)


@pytest.fixture(scope="module")
def trained(films):
    """The checkpoint of mass, density and BI-RADS, which no image of the split test has."""
    assert train(films, "--findings", "mass,density,birads") == 0
    return films.parent / "classifier_attention" / "classifier_best.pth"


@pytest.fixture(scope="module")
def evaluated(films, trained):
    """The folder of its evaluation."""
    assert run("evaluate", films, "--weights", trained) == 0
    return films.parent / "evaluate_attention"


def test_a_finding_alone_is_judged_as_among_others(films, trained, evaluated, tmp_path):
    assert run("evaluate", films, "--weights", trained, "--findings", "mass", out=tmp_path) == 0
    tables = [pd.read_csv(f / "pooling.csv") for f in (evaluated, tmp_path / "evaluate_attention")]
    whole = tables[0][tables[0]["finding"] == "mass"].reset_index(drop=True)
    pd.testing.assert_frame_equal(tables[1], whole)


def test_images_alone_teach_more_than_chance(evaluated):
    folder = evaluated
    table = pd.read_csv(folder / "pooling.csv").set_index(["figure", "level"])
    assert set(table["finding"]) == {"mass", "density"}
    attention = table.xs("image_attention", level="level")
    assert attention.loc["auroc", "low"] > 0.5
    assert attention.loc[["kappa", "rank_correlation"], "low"].gt(0).all()
    assert attention["n"].to_dict() == {"auroc": 12, "kappa": 11, "rank_correlation": 11}
    for level in ("image_max", "image_noisy_or"):
        gain = attention["value"] - table.xs(level, level="level")["value"]
        np.testing.assert_allclose(table.xs(level, level="level")["attention_gain"], gain, atol=1e-9)
        assert table.xs(level, level="level")[["gain_low", "gain_high", "p"]].notna().to_numpy().all()
    images = pd.read_csv(folder / "predictions_image_attention.csv").set_index("image")
    auroc = roc_auc_score(images["mass"], images["p_mass"])
    assert attention.loc["auroc", "value"] == pytest.approx(auroc)
    black = images.loc["p34.png"]
    assert (black["p_mass"], np.isnan(black["grade_density"])) == (0, True)
    levels = set(pd.read_csv(folder / "evaluation.csv")["level"])
    assert levels == {"image_attention", "image_max", "image_noisy_or", "breast", "study"}
    assert all((folder / f"predictions_{level}.csv").is_file() for level in levels)
    assert set(pd.read_csv(folder / "by_maker.csv")["level"]) == levels - {"breast", "study"}
    assert pd.read_csv(folder / "maker_shares.csv")["coincide"].all()
    for name in ("roc.png", "pr.png", "reliability.png", "grades.png"):
        assert min(cv2.imread(str(folder / name)).shape[:2]) > 300


def test_predict_draws_and_writes_the_attention(films, trained, evaluated, tmp_path):
    chosen = [films / "p25.png", films / "p34.png"]
    assert run("predict", films, "--weights", trained, *chosen, out=tmp_path) == 0
    folder = tmp_path / "predict_attention"
    table = pd.read_csv(folder / "predictions.csv").set_index("image")
    assert table["error"].notna().tolist() == [False, True]
    tiles = pd.read_csv(folder / "attention.csv")
    for image, part in tiles.groupby("image"):
        assert len(part) == table.loc[image, "tiles"]
        for name in ("mass", "density"):
            share = part[f"attention_{name}"]
            assert share.sum() == pytest.approx(1, abs=1e-5)
            top = part.loc[share.idxmax()]
            said = table.loc[image, [f"attention_{name}", f"x_{name}", f"y_{name}"]]
            assert said.tolist() == pytest.approx([share.max(), top["x"], top["y"]])
        picture = cv2.imread(str(folder / table.loc[image, "picture"]))
        assert np.ptp(picture.astype(int), axis=2).max() > 100  # the map is in colour
    known = pd.read_csv(evaluated / "predictions_image_attention.csv").set_index("image")
    for column in ("p_mass", "expected_density", "grade_density"):
        np.testing.assert_allclose(table[column].iloc[0], known.loc["p25.png", column], atol=5e-3)


def test_a_second_start_finds_the_features_and_repeats_to_the_bit(films, trained, monkeypatch):
    metrics, state = (trained.parent / "metrics.csv").read_bytes(), torch.load(trained)
    monkeypatch.setattr(classifier.Engine, "features", lambda *_: pytest.fail("made again"))
    assert train(films, "--findings", "mass,density,birads") == 0
    assert (trained.parent / "metrics.csv").read_bytes() == metrics
    again = torch.load(trained)
    for pooling, head in state["image_heads"]["state"].items():
        for name, value in head.items():
            assert torch.equal(value, again["image_heads"]["state"][pooling][name])


@pytest.mark.slow
def test_other_labels_do_not_replace_the_first(films, trained, tmp_path):
    flags = ["--run_name", "head", "--epochs", 1]
    assert train(films, *flags, "--findings", "birads", out=tmp_path) == 0
    other = pd.read_csv(films / "labels.csv").assign(breast_birads=1)
    other.loc[::4, "breast_birads"] = 5
    other["image"] = [str(films / name) for name in other["image"]]
    other.to_csv(tmp_path / "labels.csv", index=False)
    last = ["--findings", "birads", "--labels", tmp_path / "labels.csv"]
    assert train(films, *flags, *last, out=tmp_path) == 0
    heads = {p.parent.name: torch.load(p)["image_heads"]["targets"] for p in tmp_path.glob("*/*.pth")}
    assert heads == {"head_1": [["birads", [2, 3, 4, 5]]], "head": [["birads", [1, 5]]]}


@pytest.mark.parametrize(
    ("findings", "change", "message"),
    [
        ("mass", {"mass": ""}, "training split: no image has a value of mass"),
        ("mass", {"mass": 1}, "training split: every image has mass 1"),
        ("density", {"breast_density": "A"}, "training split: every image has density 1"),
    ],
)
def test_labels_that_teach_nothing_are_refused(films, tmp_path, capsys, findings, change, message):
    table = pd.read_csv(films / "labels.csv").assign(**change)
    table["image"] = [str(films / name) for name in table["image"]]
    table.to_csv(tmp_path / "labels.csv", index=False)
    flags = ["--findings", findings, "--labels", tmp_path / "labels.csv"]
    assert train(films, *flags, out=tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


def test_grades_are_for_attention_alone_and_attention_for_training(capsys):
    assert classifier.main(["compare", "none", "--mode", "attention"]) == 2
    assert "leave --mode attention out" in capsys.readouterr().err
    for words in (["train"], ["train", "--mode", "probe"], ["compare", "none"], ["evaluate"]):
        assert classifier.main([*words, "--findings", "density"]) == 2
        assert "--findings density: a grade of an image" in capsys.readouterr().err


def test_heads_that_do_not_fit_are_refused_by_file(films, trained, tmp_path, capsys):
    for number, change in enumerate(
        (lambda c: c["state"].pop("max"), lambda c: c["targets"].pop(), lambda c: c.update(targets=3))
    ):
        state = torch.load(trained)
        change(state["image_heads"])
        torch.save(state, tmp_path / f"{number}.pth")
        weights = ["--weights", tmp_path / f"{number}.pth"]
        assert run("predict", films, *weights, films / "p1.png", out=tmp_path) == 2
        assert re.search(rf"{number}\.pth: its image heads don't fit", capsys.readouterr().err)


def test_a_dry_run_tells_the_grades(films, capsys):
    assert train(films, "--findings", "mass,density", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "density: A 6, B 6, C 6, D 6, 0 unknown" in said
    assert "classifier_attention" in said
