"""study.py: arms are judged alike, what is there is used again, what is wrong is named first."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import small_network

import prepare_dataset as prep
import study
import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
from byol_mammo.settings import MammoError

SIZES = "--tile_size 96 --tile_stride 64 --view_size 32 --pixel_spacing_mm 0.68 --min_breast_ratio 0.3"
QUICK = (
    f"--backbone {small_network.NAME} --steps 4 --points 2 --batch_size 8 --bootstrap 100 --device cpu "
)
QUICK += "--num_workers 1 --seeds 3"
COLUMNS = "arm seed step finding auroc low high gain_over_start gain_low gain_high n_positive n_patients"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A prepared archive of eight phantom studies, and a file of two arms."""
    folder = tmp_path_factory.mktemp("study")
    size = "--studies 8 --height 440 --width 350 --spacing_mm 0.68 --lesion_share 1 --test_share 0.5"
    phantoms.main(["--output_dir", str(folder / "raw"), *size.split()])
    raw = folder / "raw"
    tables = ["--csv_path", str(raw / "breast-level_annotations.csv")]
    tables += ["--findings_csv", str(raw / "finding_annotations.csv")]
    places = ["--images_root", str(raw / "images_png"), "--output_dir", str(folder / "split")]
    assert prep.main([*tables, *places]) == 0
    heads = "--hidden_dim 64 --proj_dim 16"
    arms = f"# two\nplain: {heads}\nother:  {heads} --lr 1e-3 # faster\n"
    (folder / "arms.txt").write_text(arms)
    return folder


def words(archive, *more):
    places = ["--data_dir", archive / "split", "--output_dir", archive / "out"]
    places += ["--cache_dir", archive / "cache", "--arms_file", archive / "arms.txt"]
    return [*map(str, places), *SIZES.split(), *QUICK.split(), "--arms", "plain,other", *more]


@pytest.fixture(scope="module")
def table(archive):
    """study.csv of two arms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "run_script", mammo.main)  # a start of Python costs more than the steps
        assert study.main(words(archive, "--questions", "mass,density")) == 0
    return pd.read_csv(archive / "out" / "study.csv")


def test_every_arm_is_judged_at_every_point(archive, table):
    assert list(table.columns) == COLUMNS.split()
    learnt = table[~table["arm"].isin(study.REFERENCES)]
    assert sorted(set(zip(learnt["arm"], learnt["seed"], learnt["step"], strict=True))) == [
        (arm, seed, step) for arm in ("other", "plain") for seed in (3,) for step in (2, 4)
    ]
    assert set(table["arm"]) - set(learnt["arm"]) == {"random", "classic"}
    assert (table.groupby(["arm", "seed", "step"]).size() == 2).all()
    assert ((table["low"] <= table["auroc"]) & (table["auroc"] <= table["high"])).all()
    random = table[table["arm"] == "random"].set_index(["seed", "finding"])
    assert (random["gain_over_start"] == 0).all()
    paired = learnt["auroc"] - [
        random.loc[key, "auroc"] for key in zip(learnt["seed"], learnt["finding"], strict=True)
    ]
    np.testing.assert_allclose(paired, learnt["gain_over_start"], atol=2e-4)
    nuisance = pd.read_csv(archive / "out" / "nuisance.csv")
    assert {"r2_air", "r2_brightness", "rankme"} <= set(nuisance.columns)
    assert {"study.md", "study.png", "report.html"} <= {
        path.name for path in (archive / "out").iterdir()
    }


def test_what_is_trained_is_not_trained_again(archive, table, monkeypatch):
    monkeypatch.setattr(study, "run_script", lambda _: 1 / 0)
    parser = study.flags.make_parser(study.__doc__)
    comments = study.flags.setting_help(study.__file__)
    settings = study.Settings(
        **study.flags.parse_fields(study.Settings, parser, comments, words(archive))
    )
    heads = study.read_arms(settings.arms_file)["plain"]
    points = study.train_arm(settings, "plain", heads, 3)
    assert {point.start for point in points} == {("random", 3)}
    assert [point.step for point in points] == [2, 4]
    with pytest.raises(ZeroDivisionError):  # of another seed there is nothing
        study.train_arm(settings, "plain", heads, 7)
    with pytest.raises(MammoError, match="of another recipe: --lr"):
        study.train_arm(settings, "plain", [*heads, "--lr", "0.5"], 3)
    config = mammo.parse_args([*study.common_flags(settings, 1), *heads, "--seed", "3"])
    with pytest.raises(MammoError, match=r"is of step 2, not 4: .* --batch_size 4 may do"):
        study.check_point(points[0]._replace(step=4), config, settings)


def test_an_arm_s_curve_begins_where_it_started(tmp_path, monkeypatch):
    drawn = []
    keep = lambda figure, _: drawn.extend(figure.axes[0].lines)  # noqa: E731
    monkeypatch.setattr("byol_mammo.pictures.save_figure", keep)
    rows = [("random", 0, 0, 0.5), ("random", 1, 0, 0.6), ("imagenet", 0, 0, 0.8)]
    rows += [(arm, seed, 4, 0.9) for arm in ("plain", "warm") for seed in (0, 1)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "step", "auroc"]).assign(finding="mass")
    starts = {"plain": "random", "warm": "imagenet"}
    study.draw_study(table.assign(low=0.4, high=1.0), tmp_path / "study.png", starts)
    lines = {line.get_label(): line.get_ydata() for line in drawn}
    np.testing.assert_allclose(lines["plain"], [0.55, 0.9])
    np.testing.assert_allclose(lines["warm"], [0.8, 0.9])


def test_density_is_read_as_people_write_it():
    cells = ["A", "B", "DENSITY C", "4", "", "A", "D"]
    tiles = pd.DataFrame({"breast_density": cells, "patient": list("abcdefg"), "row": range(7)})
    tiles = tiles.assign(labelled=True, split=["training"] * 5 + ["test"] * 2)
    data = study.classifier.LabelledTiles(None, [], np.zeros((7, 0)), tiles, np.zeros((7, 0)), None)
    question = study.ask(data, "density")
    np.testing.assert_equal(question.truth, np.array([1, 2, 3, 4, np.nan, 1, 4], np.float32))
    data.table["patient"] = "a"
    with pytest.raises(MammoError, match="one patient alone"):
        study.ask(data, "density")


def test_the_strength_of_density_s_probe_is_chosen_by_patients():
    """A tile is told by the others of hers where features tell the patient alone; a patient is not."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(30), 20)
    truth = rng.integers(1, 5, 30)[patient].astype(np.float32)
    features = rng.normal(size=(30, 40))[patient] + rng.normal(size=(600, 40)) * 0.1
    found = study.fit_ridge(features, truth, patient.astype(str))
    assert found.best_params_["ridge__alpha"] >= 1000


WRONG = {
    "an arm that is none": (["--arms", "plane"], "nearest: plain"),
    "steps between points": (["--steps", "5"], "must be a multiple of --points 2"),
    "seeds": (["--seeds", "0,x"], "numbers separated by commas"),
    "a question": (["--questions", "tumour"], "no column tumour"),
    "a file of arms": (["--arms_file", "nowhere.txt"], "no such file"),
    "one kind": (["--questions", "mass@mass"], "tiles of one kind alone"),
    "specks without a place": (["--questions", "specks"], "needs --specks_dir"),
    "what is equal": (["--equal", "length"], "choose one of steps, time"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_before_training(archive, capsys, monkeypatch, name):
    monkeypatch.setattr(study, "run_script", lambda _: 1 / 0)
    flags, message = WRONG[name]
    assert study.main(words(archive, "--output_dir", str(archive / "none"), *flags)) == 2
    assert message in capsys.readouterr().err


def test_the_default_arms_are_there():
    arms = study.read_arms(study.ARMS_FILE)
    assert set(study.ARMS.split(",")) <= arms.keys()
    for words_of_arm in arms.values():
        mammo.parse_args(words_of_arm)


def test_lines_of_arms(tmp_path):
    path = tmp_path / "arms.txt"
    path.write_text("a: --lr 1\n\n# c\nb:\n")
    assert study.read_arms(str(path)) == {"a": ["--lr", "1"], "b": []}
    for text in ("a --lr 1\n", "a: x\na: y\n", "a b: x\n", "imagenet: x\n"):
        path.write_text(text)
        with pytest.raises(MammoError, match="line"):
            study.read_arms(str(path))


def test_scores_that_know_nothing_are_at_half():
    """Over many truths the interval holds one half as often as it says."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4).astype(str)
    held = 0
    for _ in range(60):
        truth, scores = rng.integers(0, 2, 240).astype(np.float32), rng.normal(size=240)
        weights = study.classifier.resample_groups(groups, 300, 0)
        low, high = study.classifier.interval(
            study.classifier.weighted_auroc(scores, truth, weights)[1:]
        )
        held += low <= 0.5 <= high
    assert 52 <= held <= 60


def test_weighted_correlation_counts_rows_as_often_as_they_are_drawn():
    rng = np.random.default_rng(0)
    x, y, weights = (
        rng.normal(size=30),
        rng.normal(size=30),
        rng.integers(0, 4, (5, 30)).astype(np.float32),
    )
    expected = [
        np.corrcoef(np.repeat(x, n.astype(int)), np.repeat(y, n.astype(int)))[0, 1] for n in weights
    ]
    np.testing.assert_allclose(study.weighted_correlation(x, y, weights), expected, atol=1e-6)
