"""The classifier: labels to tiles, probe, fine-tuning, comparison, evaluation, prediction, refusals."""

import dataclasses
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import small_network
import torch
import torchvision
from hypothesis import given, strategies as st
from sklearn.metrics import roc_auc_score

import byol_mammo.checkpoints
import byol_mammo.curves
import byol_mammo.labels
import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
import train_classifier as classifier

SIZES = "--tile_size 96 --tile_stride 64 --view_size 32 --pixel_spacing_mm 0.68"
TILES = f"--backbone {small_network.NAME} {SIZES}".split()
QUICK = "--device cpu --wandb_mode disabled --num_workers 1 --bootstrap 100 --batch_size 16".split()


def write_labels(folder, rows):
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """split/ with 24 phantoms of six studies, four for training, and labels.csv from their truth."""
    folder = tmp_path_factory.mktemp("labelled") / "split"
    rows = []
    for study in range(6):
        split = "test" if study >= 4 else "training"
        (folder / split).mkdir(parents=True, exist_ok=True)
        for spec in phantoms.plan_study(phantoms.PhantomSpec(height=440, width=350), study, 1.0):
            phantom = phantoms.make_phantom(spec)
            name = f"{split}/s{study}_{spec.laterality}{spec.view}.png"
            phantoms.write_png(folder / name, phantom.image)
            found = [phantoms.CATEGORY[lesion.kind] for lesion in phantom.lesions]
            boxes = [
                {"finding": [kind], **dict(zip(phantoms.BOX, lesion.box, strict=True))}
                for kind, lesion in zip(found, phantom.lesions, strict=True)
            ]
            rows.append(
                {
                    "image": name, "study_id": f"s{study}", "split": split,
                    "laterality": spec.laterality, "view": spec.view, "breast_density": spec.density,
                    "mass": int("Mass" in found),
                    "calcification": int("Suspicious Calcification" in found),
                    "boxes": json.dumps(boxes),
                }
            )  # fmt: skip
    write_labels(folder, rows)
    return folder


def settings_of(labelled, *flags, out=None):
    """Settings for the labelled archive; results in `out`."""
    places = ["--data_dir", str(labelled), "--labels", str(labelled / "labels.csv")]
    places += [
        "--cache_dir",
        str(labelled.parent / "cache"),
        "--output_dir",
        str(out or labelled.parent),
    ]
    return [*places, *QUICK, *map(str, flags)]


def run_main(command, labelled, *flags, out=None):
    return classifier.main([command, *settings_of(labelled, *flags, out=out)])


def weights_hash(path):
    state = torch.load(path)["model_state_dict"]
    return hashlib.sha256(b"".join(v.numpy().tobytes() for _, v in sorted(state.items()))).hexdigest()


@pytest.fixture(scope="session")
def trained(labelled):
    """Folder of a classifier fine-tuned for two epochs from random weights."""
    flags = ["--weights", "none", *TILES, "--epochs", 2, "--patience", 2, "--run_name", "tuned"]
    assert run_main("train", labelled, *flags) == 0
    return labelled.parent / "tuned"


# ---- tile labels


@given(
    box=st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(1, 200), st.integers(1, 200)),
    place=st.tuples(st.integers(0, 300), st.integers(0, 300)),
)
def test_tile_labels_follow_centre_and_quarter_rule(box, place):
    x0, y0, width, height = box
    tiles = pd.DataFrame({"image": [0], "x": [place[0]], "y": [place[1]]})
    edges = {"xmin": x0, "ymin": y0, "xmax": x0 + width, "ymax": y0 + height}
    labels = pd.DataFrame({"mass": [1.0], "boxes": [[{"finding": {"mass"}, **edges}]]})
    label = byol_mammo.labels.tile_labels(tiles, np.array([0]), labels, 96, ["mass"])[0, 0]
    canvas = np.zeros((700, 700), bool)
    canvas[y0 : y0 + height, x0 : x0 + width] = True
    inside = canvas[place[1] : place[1] + 96, place[0] : place[0] + 96].sum() / (width * height)
    centre = (2 * x0 + width, 2 * y0 + height)
    centred = all(2 * p <= c < 2 * (p + 96) for p, c in zip(place, centre, strict=True))
    expected = 1 if centred or inside >= 0.25 else (np.nan if inside > 0 else 0)
    np.testing.assert_equal(float(label), float(expected))


def test_unknown_absent_and_boxless_findings():
    tiles = pd.DataFrame({"image": [0, 1, 2, 3], "x": 0, "y": 0})
    labels = pd.DataFrame({"mass": [0.0, np.nan, 1.0], "boxes": [[], [], []]})
    found = byol_mammo.labels.tile_labels(tiles, np.array([0, 1, 2, -1]), labels, 96, ["mass"])[:, 0]
    np.testing.assert_equal(found, np.array([0, np.nan, np.nan, np.nan], np.float32))


def test_weak_labels_leave_images_with_boxes_alone(labelled, tmp_path):
    """A tile that merely touches a box is left out, weak labels or not."""
    found = []
    for weak in ([], ["--weak_labels"]):
        path = relabel(
            labelled, tmp_path, lambda t: t.assign(boxes=t["boxes"].mask(t["study_id"] == "s0", "[]"))
        )
        words = ["train", *settings_of(labelled, "--weights", "none", *TILES, "--labels", path, *weak)]
        settings = classifier.parse_args(words)[2]
        found.append(classifier.load_labelled(settings, classifier.open_engine(settings).config))
    plain, weak = (data.targets for data in found)
    boxless = (found[0].table["patient"] == "s0").to_numpy()
    np.testing.assert_array_equal(plain[~boxless], weak[~boxless])
    assert np.isnan(plain[~boxless]).any()
    assert (weak[boxless] == 1).sum() == np.isnan(plain[boxless]).sum() > 0


def test_boxes_in_px_of_other_files_are_noted(labelled, tmp_path, capsys):
    def enlarge(text):
        return json.dumps(
            [{**box, **{edge: 9 * box[edge] for edge in phantoms.BOX}} for box in json.loads(text)]
        )

    for number, change in enumerate((lambda text: text, enlarge)):
        path = relabel(
            labelled, tmp_path, lambda t, change=change: t.assign(boxes=t["boxes"].map(change))
        )
        words = ["train", *settings_of(labelled, "--weights", "none", *TILES, "--labels", path)]
        settings = classifier.parse_args(words)[2]
        data = classifier.load_labelled(settings, classifier.open_engine(settings).config)
        said = re.findall(
            "note: (.*) images with a box of mass have no tile.* first (.*): are the",
            capsys.readouterr().err,
        )
        assert len(said) == number
    count = int((data.image_targets[:, 0] == 1).sum())
    assert said[0][0] == f"{count} of {count}"
    assert said[0][1] in set(data.table["image"])


def test_boxes_use_the_column_names(tmp_path):
    boxes = [
        {"finding": ["Suspicious Calcification", "Mass"], "xmin": 1, "ymin": 2, "xmax": 5, "ymax": 9}
    ]
    write_labels(
        tmp_path, [{"image": "a.png", "mass": 1, "calcification": "", "boxes": json.dumps(boxes)}]
    )
    table = byol_mammo.labels.read_labels(tmp_path / "labels.csv", mammo.CLASSES)
    assert table["boxes"][0][0]["finding"] == {"calcification", "mass"}
    assert table["calcification"][0] == table["mass"][0] == 1  # by its box


def test_labels_match_by_path_then_by_bare_name(tmp_path):
    labels = pd.DataFrame({"image": ["training/a.png", "b.png", "x/c.png", "y/c.png"]})
    images = ["a.png", "sub/b.png", "c.png", "d.png"]
    found = byol_mammo.labels.match_labels(labels, tmp_path, images, tmp_path / "training")
    assert found.tolist() == [0, 1, -1, -1]  # two labels are called c.png: neither is taken
    assert byol_mammo.labels.match_labels(labels, tmp_path, ["y/c.png"], tmp_path).tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": 2}, "mass of a.png is '2', not 0, 1 or empty"),
        ({"mass": "yes"}, "not 0, 1 or empty"),
        ({"boxes": "[{]"}, "boxes of a.png can't be read"),
        (
            {"boxes": '[{"finding": ["Mass"], "xmin": NaN, "ymin": 1, "xmax": 2, "ymax": 2}]'},
            "has no area",
        ),
        (
            {"boxes": '[{"finding": ["Mass"], "xmin": 3, "ymin": 1, "xmax": 2, "ymax": 2}]'},
            "has no area",
        ),
    ],
)
def test_wrong_labels_are_refused_by_row(tmp_path, change, message):
    write_labels(tmp_path, [{"image": "a.png", "mass": 1, "calcification": 0, "boxes": "", **change}])
    with pytest.raises(mammo.MammoError, match=re.escape(message)):
        byol_mammo.labels.read_labels(tmp_path / "labels.csv", mammo.CLASSES)


def test_missing_columns_files_and_double_rows_are_named(tmp_path):
    with pytest.raises(mammo.MammoError, match="no such file"):
        byol_mammo.labels.read_labels(tmp_path / "labels.csv", mammo.CLASSES)
    write_labels(tmp_path, [{"image": "a.png", "mass": 1}])
    with pytest.raises(mammo.MammoError, match="no column calcification"):
        byol_mammo.labels.read_labels(tmp_path / "labels.csv", mammo.CLASSES)
    write_labels(tmp_path, [{"image": "a.png", "mass": 1, "calcification": 1}] * 2)
    with pytest.raises(mammo.MammoError, match=r"a\.png has more than one row"):
        byol_mammo.labels.read_labels(tmp_path / "labels.csv", mammo.CLASSES)


# ---- statistics


def test_weighted_auroc_equals_scikit_learn():
    rng = np.random.default_rng(0)
    scores, target = rng.integers(0, 9, 80) / 8, rng.integers(0, 2, 80).astype(float)
    weights = rng.integers(0, 4, (5, 80)).astype(np.float32)
    expected = [roc_auc_score(target, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(classifier.weighted_auroc(scores, target, weights), expected)


def test_resampling_keeps_studies_whole():
    studies = np.array(["a", "b", "a", "c"])
    weights = classifier.resample_groups(studies, 200, seed=1)
    assert weights.shape == (201, 4)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert weights[1:].std(0).min() > 0.5


def test_interval_and_p_value_see_a_difference_and_no_difference():
    rng = np.random.default_rng(2)
    studies = np.repeat(np.arange(40).astype(str), 10)
    target = (rng.random(400) < 0.3).astype(float)
    good, same = target + rng.normal(0, 0.7, 400), rng.normal(size=400)
    weights = classifier.resample_groups(studies, 500, 0)
    draws = [classifier.weighted_auroc(score, target, weights) for score in (good, same)]
    low, high = classifier.interval(draws[1][1:])
    assert low < 0.5 < high
    assert classifier.paired_p(draws[0][1:] - draws[1][1:]) < 0.01
    assert classifier.paired_p(rng.normal(size=500)) > 0.5
    assert np.isnan(classifier.paired_p(np.full(5, np.nan)))


def test_sensitivity_counts_every_threshold_where_scores_are_equal():
    """Steps of one false and one right alarm each lie on one line, of which ROC curves keep the ends."""
    scores, target = np.repeat(np.arange(20) / 20, 2), np.tile([0.0, 1.0], 20)
    row = classifier.describe(scores, target, np.arange(40).astype(str), classifier.Settings())
    assert row["sensitivity_at_90_specificity"] == pytest.approx(0.1)


def test_calibration_error_of_known_cases():
    target = np.array([0.0, 1.0] * 50)
    assert classifier.calibration_error(np.full(100, 0.5), target) == pytest.approx(0)
    assert classifier.calibration_error(np.full(100, 0.9), target) == pytest.approx(0.4)
    assert classifier.calibration_error(target, target) == 0
    # Rare findings: right on average, and twice as sure as they may be.
    rare = np.linspace(0, 0.1, 2000)
    truth = np.random.default_rng(0).random(2000) < 0.025 + rare / 2
    assert classifier.calibration_error(rare, truth) > 0.008


def test_study_folds_keep_studies_whole_and_spread_findings():
    rng = np.random.default_rng(3)
    studies = rng.integers(0, 20, 300).astype(str)
    targets = np.zeros((300, 1), np.float32)
    targets[np.isin(studies, [str(n) for n in range(8)])] = 1
    fold = classifier.group_folds(studies, targets, 4, seed=0)
    table = pd.DataFrame({"study": studies, "fold": fold, "positive": targets[:, 0] == 1})
    assert (table.groupby("study")["fold"].nunique() == 1).all()
    assert (table[table["positive"]].groupby("fold")["study"].nunique() == 2).all()


# ---- model


def test_logistic_head_is_exact_and_reaches_the_snippet(labelled, tmp_path):
    model = mammo.MammogramBYOL(
        mammo.checkpoints.build_backbone(small_network.NAME), small_network.WIDTH, 32, 16
    ).eval()
    rng = np.random.default_rng(4)
    weights, biases = rng.normal(size=(2, small_network.WIDTH)), rng.normal(size=2)
    classifier.set_logistic_head(model, weights, biases)
    features = torch.randn(6, small_network.WIDTH)
    expected = features.numpy() @ weights.T + biases
    with torch.no_grad():
        np.testing.assert_allclose(
            model.classification_head(features).numpy(), expected, rtol=1e-4, atol=1e-4
        )
    model.classification_head(features).sum().backward()
    spare = model.classification_head[-1].weight.grad[:, 4:]
    assert spare.abs().max() > 0  # fine-tuning may use the other units


def test_checkpoint_loads_as_the_contract_says_and_its_logits_mean_something(trained, labelled):
    state = torch.load(trained / "classifier_best.pth", weights_only=True)
    assert {"model_state_dict", "config", "classes", "step", "epoch", "monitor"} <= set(state)
    model = mammo.MammogramBYOL(
        torchvision.models.get_model(small_network.NAME),
        small_network.WIDTH,
        mammo.HIDDEN_DIM,
        mammo.PROJ_DIM,
    )
    model.load_state_dict(state["model_state_dict"])
    assert model.eval().classify(torch.zeros(2, 1, 32, 32)).shape == (2, 2)
    rows = pd.read_csv(trained / "metrics.csv")
    assert rows["epoch"].tolist() == [0, 1, 2]
    assert rows["loss"][1:].between(0.01, 3).all()
    best = max(rows["auroc"])
    assert state["monitor"]["auroc"] == pytest.approx(best)


def test_probabilities_sum_to_the_number_of_findings(labelled):
    """The prior shift undoes the balancing: mean probability equals frequency on the fitted tiles."""
    _, _, settings = classifier.parse_args(
        [
            "train",
            *settings_of(labelled, "--weights", "none", *TILES, "--mode", "probe", "--run_name", "p"),
        ]
    )
    folder = classifier.train(settings)
    settings = dataclasses.replace(
        settings, weights=str(folder / "classifier_best.pth"), split="training"
    )
    engine, settings = classifier.open_classifier(settings)
    data = classifier.load_labelled(settings, engine.config)
    ids = data.in_split("training")
    given_ = engine.probabilities(data.tiles, ids).mean(0)
    share = np.nanmean(data.targets[ids], 0)
    assert (given_ < 2.5 * share).all()
    assert (given_ > share / 2.5).all()
    assert np.nanmean(data.targets[ids] == 1) < 0.3  # so that balanced probabilities would fail


def test_finetuning_stopped_and_resumed_equals_uninterrupted(trained, labelled, monkeypatch):
    flags = ["--weights", "none", *TILES, "--epochs", 2, "--patience", 2, "--run_name", "again"]
    plain, calls = classifier.finetune_epoch, []

    def stop_in_second_epoch(job, bar, stop):
        calls.append(job.epoch)
        if len(calls) == 2:
            stop.requested = 15
        return plain(job, bar, stop)

    monkeypatch.setattr(classifier, "finetune_epoch", stop_in_second_epoch)
    assert run_main("train", labelled, *flags) == 128 + 15
    assert run_main("train", labelled, *flags) == 0
    assert calls == [0, 1, 1]
    again = labelled.parent / "again"
    assert weights_hash(again / "last.pth") == weights_hash(trained / "last.pth")
    assert (again / "metrics.csv").read_text() == (trained / "metrics.csv").read_text()


def test_resuming_with_other_settings_is_refused_by_name(trained, labelled, capsys):
    flags = ["--weights", "none", *TILES, "--epochs", 2, "--patience", 2, "--run_name", "tuned"]
    assert run_main("train", labelled, *flags, "--lr", "0.5") == 2
    assert "--lr 0.001 -> 0.5" in capsys.readouterr().err
    assert json.loads((trained / "config.json").read_text())["settings"]["lr"] == 0.001


def test_another_probe_does_not_replace_the_first(labelled, tmp_path):
    flags = ["--weights", "none", *TILES, "--mode", "probe", "--run_name", "probe"]
    for findings in ("mass", "mass", "calcification"):
        assert run_main("train", labelled, *flags, "--findings", findings, out=tmp_path) == 0
    classes = {path.parent.name: torch.load(path)["classes"] for path in tmp_path.glob("*/*.pth")}
    assert classes == {"probe": ["calcification"], "probe_1": ["mass"]}
    last = (*flags, "--findings", "calcification", "--shuffle_labels")
    assert run_main("train", labelled, *last, out=tmp_path) == 0
    assert torch.load(tmp_path / "probe_2" / "classifier_best.pth")["classes"] == ["calcification"]
    finetune = ("--weights", "none", *TILES, "--run_name", "probe", "--epochs", 1)
    assert run_main("train", labelled, *finetune, out=tmp_path) == 0
    assert not (tmp_path / "probe_2" / "last.pth").exists()
    assert (tmp_path / "probe_3" / "classifier_best.pth").is_file()


def test_resuming_with_other_labels_is_refused(trained, labelled, tmp_path, capsys):
    flags = ["--weights", "none", *TILES, "--epochs", 2, "--patience", 2, "--run_name", "tuned"]
    path = relabel(labelled, tmp_path, lambda t: t.assign(mass=t["calcification"], boxes="[]"))
    (tmp_path / "b").mkdir()
    one = relabel(
        labelled, tmp_path / "b", lambda t: t.assign(patient_id=t["study_id"].replace("s1", "s2"))
    )
    changes = (["--shuffle_labels"], ["--labels", path, "--weak_labels"], ["--labels", one])
    for change in changes:
        assert run_main("train", labelled, *flags, *change) == 2
        assert "the labels" in capsys.readouterr().err


# ---- commands


def test_located_asks_whether_the_top_tile_of_an_image_holds_the_finding():
    tiles = pd.DataFrame(
        {
            "row": [0, 0, 1, 1, 2, 3, 3],
            "mass": [1, 0, 1, 0, 0, 1, np.nan],
            "p_mass": [0.9, 0.1, 0.2, 0.8, 0.99, 0.3, 0.4],
        },
        index=[7, 3, 4, 9, 1, 2, 0],
    )
    hits = classifier.located(tiles, "mass")
    assert hits.to_dict() == {0: True, 1: False, 3: False}  # image 2 holds none


def test_a_finding_of_one_kind_has_no_curve(tmp_path, monkeypatch):
    """There is neither sensitivity nor specificity then."""
    drawn = {}
    keep = lambda figure, path: drawn.update({path.name: figure.axes[0].get_legend_handles_labels()[1]})  # noqa: E731
    monkeypatch.setattr(byol_mammo.curves.pictures, "save_figure", keep)
    table = pd.DataFrame({"mass": [0, 1, 1], "calcification": 0, "p_mass": [0.1, 0.7, 0.9]})
    table["p_calcification"] = table["p_mass"]
    tables = dict.fromkeys(("tile", "image_max"), table)
    byol_mammo.curves.draw_curves(tables, ["mass", "calcification"], tmp_path)
    assert drawn["roc.png"] == drawn["pr.png"] == ["mass (2 of 3)"]


@pytest.mark.filterwarnings("error")
def test_pictures_show_all_of_many_findings_and_need_no_legend(tmp_path, monkeypatch):
    names, shown = [f"f{number}" for number in range(8)], {}
    keep = lambda figure, path: shown.update({path.name: figure.axes})  # noqa: E731
    monkeypatch.setattr(byol_mammo.curves.pictures, "save_figure", keep)
    columns = {name: [0, 1, 1] for name in names} | {f"p_{name}": [0.1, 0.7, 0.9] for name in names}
    table = pd.DataFrame(columns)
    byol_mammo.curves.draw_curves(dict.fromkeys(("tile", "image_max"), table), names, tmp_path)
    rows = [{"epoch": e, "loss": 1.0} | {f"auroc_{n}": 0.5 for n in names} for e in (0, 1)]
    byol_mammo.curves.draw_training(rows, names, tmp_path / "curves.png")
    for picture, panel in (("roc.png", 0), ("pr.png", 0), ("reliability.png", 0), ("curves.png", 1)):
        axes = shown[picture][panel]
        lines = [line for line in axes.lines if str(line.get_label()).startswith("f")]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 8
    targets = np.eye(8, dtype=np.float32)
    tiles = pd.DataFrame({"breast_density": ["A"] * 8, "view": "CC"})
    data = classifier.LabelledTiles(None, names, targets, tiles, targets, None)
    classifier.draw_embedding(np.eye(8)[:, :2], data, np.arange(8), "PCA", tmp_path / "map.png")
    assert len(shown["map.png"][2].collections) == 8
    one_kind = {"tile": table.assign(f0=1), "image_max": table.assign(f0=1)}
    byol_mammo.curves.draw_curves(one_kind, ["f0"], tmp_path)  # matplotlib would warn of no handles


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_trained_weights_keep_their_statistics(labelled, tmp_path, monkeypatch, mode):
    """Those of the tiles would cost what they know; random weights have none worth keeping."""
    state = byol_mammo.checkpoints.build_backbone(small_network.NAME).state_dict()
    state["bn1.running_mean"] = torch.full_like(state["bn1.running_mean"], 0.125)
    monkeypatch.setattr(byol_mammo.checkpoints, "imagenet_state", lambda _: dict(state))
    found, after_steps, epoch = [], [], classifier.finetune_epoch

    def spy(job, *rest):
        loss = epoch(job, *rest)
        after_steps.append(job.engine.model.backbone.bn1.running_mean.clone())
        return loss

    monkeypatch.setattr(classifier, "finetune_epoch", spy)
    for weights in ("imagenet", "none"):
        flags = ["--weights", weights, *TILES, "--mode", mode, "--epochs", 1, "--run_name", weights]
        assert run_main("train", labelled, *flags, out=tmp_path) == 0
        model = torch.load(tmp_path / weights / "classifier_best.pth")["model_state_dict"]
        found.append(model["backbone.bn1.running_mean"])
    assert torch.equal(found[0], state["bn1.running_mean"])
    assert found[1].std() > 0
    if mode == "finetune":
        assert torch.equal(after_steps[0], found[0])
        assert not torch.equal(after_steps[1], found[1])


@pytest.mark.parametrize(("split", "fitted"), [("test", 0), ("all", 4), ("training", 4)])
def test_patients_that_were_fitted_on_are_counted_where_they_judge(
    trained, labelled, tmp_path, capsys, split, fitted
):
    weights = trained / "classifier_best.pth"
    assert run_main("evaluate", labelled, "--weights", weights, "--split", split, out=tmp_path) == 0
    said = capsys.readouterr().err
    total = {"test": 2, "all": 6, "training": 4}[split]
    note = f"note: {fitted} of the {total} patients who judge {weights} are among those it was fitted on"
    assert (note in said) == bool(fitted)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_split_that_was_changed_hides_nobody_who_was_fitted_on(
    trained, labelled, tmp_path, capsys, recorded
):
    state = torch.load(trained / "classifier_best.pth")
    assert state["patients"] == classifier.hashed(np.array(["s0", "s1", "s2", "S3"]))
    assert not set(state["patients"]) & {"s0", "s1", "s2", "s3"}
    if not recorded:  # as of an older checkpoint: the split training stands for them
        del state["patients"]
    weights = tmp_path / "classifier.pth"
    torch.save(state, weights)
    path = relabel(
        labelled, tmp_path, lambda t: t.assign(split=t["split"].mask(t["study_id"] == "s3", "test"))
    )
    assert run_main("evaluate", labelled, "--weights", weights, "--labels", path, out=tmp_path) == 0
    note = f"note: 1 of the 3 patients who judge {weights} are among those it was fitted on"
    assert (note in capsys.readouterr().err) == recorded


def test_evaluate_writes_figures_that_follow_from_its_predictions(trained, labelled, tmp_path):
    assert (
        run_main("evaluate", labelled, "--weights", trained / "classifier_best.pth", out=tmp_path) == 0
    )
    folder = tmp_path / "evaluate"
    table = pd.read_csv(folder / "evaluation.csv")
    assert set(table["level"]) == {"tile", "image_max", "image_noisy_or", "breast", "study"}
    tiles = pd.read_csv(folder / "predictions_tile.csv")
    images = pd.read_csv(folder / "predictions_image_max.csv")
    either = pd.read_csv(folder / "predictions_image_noisy_or.csv")
    assert len(images) == 8
    for name in mammo.CLASSES:
        row = table[
            (table["level"] == "tile") & (table["group"] == "all") & (table["finding"] == name)
        ].iloc[0]
        known = tiles[tiles[name].notna()]
        assert row["auroc"] == pytest.approx(roc_auc_score(known[name], known[f"p_{name}"]), abs=1e-6)
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        highest = tiles.groupby("image")[f"p_{name}"].max()
        np.testing.assert_allclose(
            images.set_index("image")[f"p_{name}"].sort_index(), highest.sort_index()
        )
        assert (either[f"p_{name}"] >= images[f"p_{name}"] - 1e-6).all()
    assert {"view CC", "view MLO", "laterality L", "laterality R"} <= set(table["group"])
    for picture in ("roc.png", "pr.png", "reliability.png"):
        assert min(cv2.imread(str(folder / picture)).shape[:2]) > 300
    assert not list(folder.glob("*maker*"))  # nothing tells of makers


def test_evaluate_judges_the_findings_that_are_asked_for_and_there(trained, labelled, tmp_path, capsys):
    weights = ["--weights", trained / "classifier_best.pth"]
    found = {}
    for name, flags in {"all": [], "asked": ["--findings", "calcification"]}.items():
        assert run_main("evaluate", labelled, *weights, *flags, out=tmp_path / name) == 0
        found[name] = pd.read_csv(tmp_path / name / "evaluate" / "evaluation.csv")
    path = relabel(labelled, tmp_path, lambda table: table.drop(columns="mass"))
    capsys.readouterr()
    assert run_main("evaluate", labelled, *weights, "--labels", path, out=tmp_path / "there") == 0
    assert "no column mass, not judged" in capsys.readouterr().err
    found["there"] = pd.read_csv(tmp_path / "there" / "evaluate" / "evaluation.csv")
    expected = found["all"][found["all"]["finding"] == "calcification"].reset_index(drop=True)
    for name in ("asked", "there"):
        pd.testing.assert_frame_equal(found[name], expected)
    assert run_main("evaluate", labelled, *weights, "--findings", "cancer", out=tmp_path) == 2
    assert "--findings cancer" in capsys.readouterr().err
    relabel(labelled, tmp_path, lambda table: table.drop(columns=["mass", "calcification"]))
    assert run_main("evaluate", labelled, *weights, "--labels", path, out=tmp_path) == 2
    assert "no column mass, calcification" in capsys.readouterr().err


def test_images_without_a_tile_and_views_without_a_label(tmp_path):
    nan = np.nan
    tile = pd.DataFrame(
        {
            "image": ["a", "b", "c"], "study_id": ["s", "s", "t"], "patient": ["p", "p", "q"],
            "split": "test", "laterality": ["L", "L", ""], "view": ["CC", "MLO", ""],
            "breast_density": "", "labelled": True, "row": [0, 1, 2], "maker": "", "archive": "",
        }
    )  # fmt: skip
    untiled = pd.DataFrame(
        {
            "image": ["d", "e"], "study_id": ["t", "u"], "patient": ["q", "r"],
            "split": ["test", "training"], "laterality": ["R", "R"], "view": "CC",
            "breast_density": "", "mass": [1.0, 1.0], "maker": "", "archive": "",
        }
    )  # fmt: skip
    targets = np.array([[0], [nan], [1]], np.float32)
    data = classifier.LabelledTiles(None, ["mass"], targets, tile, targets, untiled)
    tables = classifier.predictions(data, np.arange(3), np.array([[0.1], [0.2], [0.9]]), "test")
    for level in ("image_max", "image_noisy_or"):
        found = tables[level].set_index("image")["p_mass"]
        assert found.round(6).to_dict() == {"a": 0.1, "b": 0.2, "c": 0.9, "d": 0.0}
    breast = tables["breast"].set_index(["study_id", "laterality"])["mass"]
    assert breast.isna().to_dict() == {("s", "L"): True, ("t", "R"): False}  # b may hold one
    study = tables["study"].set_index("study_id")
    assert (study.loc["t", "mass"], study.loc["t", "p_mass"]) == (1, 0.9)


def test_splits_and_intervals_go_by_the_patient_where_known(labelled, tmp_path):
    def change(table):
        first = ~table["study_id"].duplicated()  # one row of a study names its patient
        known = table["study_id"].map({"s0": "p0", "s1": "p0", "s5": "p5"})
        table["patient_id"] = known.where(first).fillna("")

    path = relabel(labelled, tmp_path, change)
    _, _, settings = classifier.parse_args(
        ["train", *settings_of(labelled, "--weights", "none", *TILES, "--labels", path)]
    )
    data = classifier.load_labelled(settings, classifier.open_engine(settings).config)
    assert set(data.groups) == {"p0", "s2", "s3", "s4", "p5"}


def test_a_patient_named_like_the_study_of_another_split_is_a_leak(tmp_path):
    labels = pd.DataFrame(
        {"study_id": ["P1", "P1_2"], "patient_id": ["", "P1"], "split": ["training", "test"]}
    )
    with pytest.raises(mammo.MammoError, match="patient P1 is in the splits test and training"):
        classifier.check_leak(labels.assign(patient=byol_mammo.labels.group_keys(labels)), "labels.csv")


def test_labels_without_study_and_side_take_the_manifest_s():
    """Also for images without a tile, which would count as studies of their own."""
    sources = pd.DataFrame(
        {"image": ["a", "b", "c"], "study_id": ["s", "s", "t"], "laterality": ["L", "R", ""], "view": ""}
    )
    labels = pd.DataFrame(
        {
            "image": ["c", "a", "x", "b"], "study_id": ["own", "", "", ""], "patient_id": "",
            "laterality": ["R", "R", "L", ""], "view": "CC",
        }
    )  # fmt: skip
    table = byol_mammo.labels.with_manifest(labels, np.array([1, 3, 0]), sources)
    assert table["study_id"].tolist() == ["own", "s", "x", "s"]
    assert table["patient"].tolist() == ["own", "s", "x", "s"]
    assert table["laterality"].tolist() == ["R", "L", "L", "R"]
    assert (table["view"] == "CC").all()


def test_predict_maps_images_and_names_unusable_ones(trained, labelled, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG broken")
    weights = trained / "classifier_best.pth"
    exact = ["--weights", weights, "--precision", "fp32"]
    assert run_main("predict", labelled, *exact, labelled / "test", broken, out=tmp_path) == 0
    table = pd.read_csv(tmp_path / "predict" / "predictions.csv")
    assert table["error"].notna().tolist() == [False] * 8 + [True]
    assert "broken.png: can't be decoded" in capsys.readouterr().err
    for name in mammo.CLASSES:
        assert table[f"p_{name}"][:8].between(0, 1).all()
    for picture in table["picture"].dropna():
        assert min(cv2.imread(str(tmp_path / "predict" / picture)).shape[:2]) > 300
    run_main("evaluate", labelled, *exact, out=tmp_path)
    images = pd.read_csv(tmp_path / "evaluate" / "predictions_image_max.csv")
    np.testing.assert_allclose(table["p_mass"][:8], images.sort_values("image")["p_mass"], atol=2e-3)
    earlier = sorted(path.name for path in (tmp_path / "predict").iterdir())
    assert run_main("predict", labelled, *exact, broken, out=tmp_path) == 2
    assert sorted(path.name for path in (tmp_path / "predict").iterdir()) == earlier
    one = labelled / table["image"].iloc[0]
    assert run_main("predict", labelled, *exact, one, out=tmp_path) == 0
    assert len(list((tmp_path / "predict").glob("map_*.png"))) == 1


def test_predict_takes_of_the_manifest_what_training_takes(trained, labelled, tmp_path, monkeypatch):
    """Pixel size, polarity and view; without a manifest what the classifier assumes."""
    names = sorted(path.name for path in (labelled / "test").iterdir())[:2]
    for folder in ("laid_out/test", "alone"):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            shutil.copy(labelled / "test" / name, tmp_path / folder)
    rows = [("test/" + names[0], 0.5, "inverted", "MLO"), ("test/" + names[1], "", "", "")]
    table = pd.DataFrame(rows, columns=["file", "spacing_mm", "polarity", "view"])
    table.assign(study_id="s", laterality="L").to_csv(
        tmp_path / "laid_out" / "manifest.csv", index=False
    )
    extract, seen = mammo.extract_image, {}

    def spy(path, spacing, config, view=""):
        seen[str(Path(path).relative_to(tmp_path))] = (spacing, config.polarity, view)
        return extract(path, spacing, config, view)

    monkeypatch.setattr(mammo, "extract_image", spy)
    operands = (tmp_path / "laid_out" / "test", tmp_path / "alone" / names[0])
    weights = ("--weights", trained / "classifier_best.pth")
    assert run_main("predict", labelled, *weights, *operands, out=tmp_path / "out") == 0
    assert seen == {
        f"laid_out/test/{names[0]}": (0.5, "inverted", "MLO"),
        f"laid_out/test/{names[1]}": (0.68, "auto", ""),
        f"alone/{names[0]}": (0.68, "auto", ""),
    }


def test_embed_writes_one_row_of_features_for_each_tile(trained, labelled, tmp_path):
    assert run_main("embed", labelled, "--weights", trained / "classifier_best.pth", out=tmp_path) == 0
    features = np.load(tmp_path / "embed" / "embeddings.npy")
    table = pd.read_csv(tmp_path / "embed" / "embeddings.csv")
    assert features.shape == (len(table), small_network.WIDTH)
    assert features.std(0).max() > 0
    assert set(table["split"]) == {"test"}
    assert min(cv2.imread(str(tmp_path / "embed" / "embeddings.png")).shape[:2]) > 300


def test_compare_judges_all_on_the_same_tiles(trained, labelled, tmp_path, capsys):
    weights = str(trained / "classifier_best.pth")
    assert run_main("compare", labelled, "none", weights, *TILES[:2], "--folds", 2, out=tmp_path) == 0
    table = pd.read_csv(tmp_path / "compare" / "compare.csv")
    assert table["start"].tolist() == ["none", weights] * 2
    gain = table["auroc"].diff()[1::2]
    np.testing.assert_allclose(table["gain"][1::2], gain, atol=1e-6)
    assert ((table["gain_low"] <= table["gain"]) | table["gain"].isna()).all()
    notes = re.findall("^note:.*", capsys.readouterr().err, flags=re.MULTILINE)
    assert len(notes) == 1  # every label has its image
    assert re.search(r"too narrow for mass \(\d studies with, 6 without\), calc", notes[0])


def test_makers_are_judged_apart_and_said_where_labels_coincide(
    trained, labelled, tmp_path, capsys, monkeypatch
):
    """Four of six studies are of the maker that has all the masses."""

    def change(table):
        other = table["study_id"].isin(["s0", "s2", "s4", "s5"])
        table["maker"] = np.where(other, "GE", "Siemens")
        table.loc[~other, ["mass", "boxes"]] = [0, "[]"]

    monkeypatch.setattr(classifier, "FEW_STUDIES", 1)
    monkeypatch.setattr(classifier.makers, "CONTROL_FOLDS", 2)
    monkeypatch.setattr(classifier.makers, "CHANCE", 1.0)  # six studies prove nothing
    (tmp_path / "two").mkdir()
    two = ("--labels", relabel(labelled, tmp_path / "two", change), "--findings", "mass")
    weights = ("--weights", trained / "classifier_best.pth", "--split", "all")
    commands = {
        "evaluate": weights,
        "compare": ("none", *TILES, "--folds", 2, "--validation_share", 0.5),
    }
    for command, flags in commands.items():
        capsys.readouterr()
        assert run_main(command, labelled, *flags, *two, out=tmp_path) == 0
        said = capsys.readouterr()
        assert "warning: mass and maker coincide (Cram\u00e9r's V" in said.err
        assert "of GE" in said.err
        figures = pd.read_csv(tmp_path / command / "by_maker.csv")
        assert set(figures["value"]) == {"GE", "Siemens"}
        mass = figures[(figures["finding"] == "mass") & (figures["value"] == "Siemens")]
        assert mass["auroc"].isna().all()
        assert (mass["positive_patients"] == 0).all()
        assert "fewer than 1 patients with or without" in said.out
    table = pd.read_csv(tmp_path / "compare" / "compare.csv")
    control = table[table["finding"] == "maker (control)"].iloc[0]
    assert control["start"] == "none"
    assert 0 <= control["low"] <= control["auroc"] <= control["high"] <= 1
    assert control["majority"] == pytest.approx(2 / 3, abs=0.05)


def test_compare_gives_random_weights_the_checkpoints_backbone(trained, labelled, monkeypatch):
    opened = {}
    plain = classifier.open_engine

    def note(settings):
        engine = plain(settings)
        opened[settings.weights] = engine.config.backbone
        return engine

    monkeypatch.setattr(classifier, "open_engine", note)
    monkeypatch.setattr(classifier, "load_labelled", lambda *_: sys.exit(7))
    weights = str(trained / "classifier_best.pth")
    with pytest.raises(SystemExit):
        run_main("compare", labelled, "none", weights, "--folds", 2)
    assert opened == {weights: small_network.NAME, "none": small_network.NAME}


def test_shuffled_labels_stay_together_by_patient():
    """So that a leak between the images of a patient lifts the figures, as it would with true labels."""
    patient = np.repeat(np.array([f"p{number % 9}{number}" for number in range(40)]), 50)
    rng = np.random.default_rng(0)
    patient = rng.permutation(patient)
    sick = rng.random(40) < 0.5
    targets = sick[np.unique(patient, return_inverse=True)[1]].astype(np.float32)[:, None]
    dealt = classifier.shuffle_patients(targets, patient, 0)
    assert (dealt != targets).mean() > 0.3
    assert dealt.sum() == targets.sum()
    assert all(len(np.unique(dealt[patient == name])) == 1 for name in set(patient))


def test_intervals_of_rare_findings_are_noted(capsys):
    targets = np.zeros((100, 2), np.float32)
    targets[:3, 0], targets[:30, 1] = 1, 1
    classifier.note_few(["mass", "calcification"], targets, np.arange(100).astype(str))
    note = capsys.readouterr().err
    assert "too narrow for mass (3 studies with, 97 without): the bootstrap" in note


def test_compare_says_which_images_a_checkpoint_has_seen(labelled, tmp_path, capsys):
    _, _, settings = classifier.parse_args(
        ["train", *settings_of(labelled, "--weights", "none", *TILES)]
    )
    data = classifier.load_labelled(settings, classifier.open_engine(settings).config)
    path = tmp_path / "run.pth"
    config = dataclasses.asdict(mammo.Config(data_dir=str(labelled / "training"), labels="labels.csv"))
    mammo.checkpoints.write_checkpoint(path, {"config": config})
    classifier.note_seen([str(path)], data, data.in_split("test"), settings)
    assert capsys.readouterr().err == ""
    classifier.note_seen([str(path)], data, data.in_split("all"), settings)
    count = data.table["image"].nunique()
    note = capsys.readouterr().err
    assert re.search(rf"pre-trained on \d+ of the {count} images that judge it, and its epoch", note)


def test_shuffled_labels_give_chance(labelled, tmp_path):
    flags = ["none", *TILES, "--shuffle_labels", "--folds", 2]
    assert run_main("compare", labelled, *flags, out=tmp_path) == 0
    table = pd.read_csv(tmp_path / "compare" / "compare.csv")
    # What leaks from fit to test lifts this above a half; six studies alone scatter it, mostly below.
    assert (table["auroc"] < 0.62).all()


def test_heat_map_is_highest_where_the_highest_tiles_are():
    image = {"offset": 0, "height": 120, "width": 220, "y0": 0, "x0": 0, "low": 0, "high": 1}
    table = pd.DataFrame({"image": 0, "x": [0, 50, 100], "y": [0, 0, 0]})
    tiles = mammo.MammogramTiles(np.zeros(120 * 220, np.uint8), pd.DataFrame([image]), table, 100)
    scores = np.array([[0.1], [0.9], [0.1]], np.float32)
    heat = classifier.heat_map(tiles, scores, (120, 220), 2)[0]
    assert heat.shape == (60, 110)
    assert abs(np.nanargmax(heat[25]) - 50) <= 1
    assert np.isnan(heat[55, 5])
    assert np.nanmax(heat) <= 0.9 + 1e-6
    assert classifier.top_tiles(tiles, scores[:, 0], 3) == [1]
    assert classifier.top_tiles(tiles, np.array([0.5, 0.1, 0.4]), 3) == [0, 2]


# ---- refusals


def relabel(labelled, tmp_path, change):
    """A copy of labels.csv with paths made whole, changed by `change(table)`."""
    table = pd.read_csv(labelled / "labels.csv")
    table["image"] = [str(labelled / name) for name in table["image"]]
    changed = change(table)
    path = tmp_path / "labels.csv"
    (table if changed is None else changed).to_csv(path, index=False)
    return path


def test_a_planted_leak_is_refused_by_name(labelled, tmp_path, capsys):
    path = relabel(
        labelled,
        tmp_path,
        lambda table: table.__setitem__("study_id", table["study_id"].replace("s5", "s1")),
    )
    for command in ("train", "compare"):
        operands = ["none"] if command == "compare" else ["--weights", "none"]
        assert run_main(command, labelled, *operands, *TILES, "--labels", path, out=tmp_path) == 2
        assert "study s1 is in the splits test and training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(image="other.png").drop_duplicates("image"), "no row fits an image"),
        (lambda t: t.assign(mass=0, boxes=""), "training split: no tile with mass"),
        (lambda t: t[t["study_id"].isin(["s0", "s4"])], "training studies: no tile with"),
    ],
)
def test_labels_that_teach_nothing_are_refused(labelled, tmp_path, capsys, change, message):
    path = relabel(labelled, tmp_path, change)
    assert run_main("train", labelled, "--weights", "none", *TILES, "--labels", path, out=tmp_path) == 2
    assert message in capsys.readouterr().err


def test_labels_without_image_and_images_without_label_are_counted(labelled, tmp_path, capsys):
    def change(table):
        table.loc[len(table) - 1, "image"] = "nowhere.png"

    path = relabel(labelled, tmp_path, change)
    flags = ["none", *TILES, "--labels", path]
    assert run_main("compare", labelled, *flags, out=tmp_path) == 0
    note = capsys.readouterr().err
    assert "1 labels without image, first nowhere.png" in note
    assert "1 images without label, left out, first test/s5_RMLO.png" in note


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--mode", "prob"], "choose probe, finetune or attention"),
        (["train", "--findings", "mass,mass"], "name each column"),
        (["train", "extra"], "takes no operand"),
        (["predict"], "needs IMAGE"),
        (["compare"], "needs WEIGHTS"),
        (["compare", "none", "--folds", "1"], "0, or 2 and more"),
        (["train", "--epochs", "0"], "must lie between"),
        (["judge"], "invalid choice"),
        (["train", "--epoch", "3"], "did you mean --epochs?"),
        (["train", "--weights", "missing.pth"], "no such file"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(words, message, capsys):
    assert classifier.main(words) == 2
    assert message in capsys.readouterr().err


def test_wrong_checkpoints_are_refused(trained, labelled, tmp_path, capsys):
    weights = trained / "classifier_best.pth"
    assert run_main("predict", labelled, "--weights", weights, "--backbone", "resnet50", labelled) == 2
    assert "holds a slim" in capsys.readouterr().err
    state = torch.load(weights)
    state["config"]["backbone"] = "resnet34"
    torch.save(state, tmp_path / "other.pth")
    assert run_main("predict", labelled, "--weights", tmp_path / "other.pth", labelled) == 2
    assert "doesn't fit a resnet34" in capsys.readouterr().err
    state = torch.load(weights)
    del state["classifier"]
    torch.save(state, tmp_path / "byol.pth")
    assert run_main("predict", labelled, "--weights", tmp_path / "byol.pth", labelled) == 2
    assert "its head is not trained" in capsys.readouterr().err
    assert run_main("predict", labelled, "--weights", trained / "last.pth", labelled) == 2
    assert "it is for resuming" in capsys.readouterr().err
    state = torch.load(weights)
    state["model_state_dict"]["backbone.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    flags = ["--weights", tmp_path / "nan.pth", labelled / "test", "--run_name", "nan"]
    assert run_main("predict", labelled, *flags, out=tmp_path) == 2
    assert "backbone.conv1.weight holds NaN" in capsys.readouterr().err
