"""What the classifier asks of pre-training: the frequency target and the online probe."""

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import small_config, write_images
from test_training import open_run, weights_hash

import byol_mammo.labels
import train_byol_mammo as mammo
import train_classifier as classifier


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six images of three studies with labels.csv: a mass in the middle of every other image."""
    folder = tmp_path_factory.mktemp("six")
    write_images(folder / "images", count=6)
    box = {
        "finding": ["Mass", "Suspicious Calcification"],
        "xmin": 80,
        "ymin": 150,
        "xmax": 140,
        "ymax": 220,
    }
    rows = [
        {
            "image": f"images/s{index // 2}_i{index}.png", "mass": index % 2, "calcification": index % 2,
            "boxes": json.dumps([box] if index % 2 else []),
        }
        for index in range(6)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    manifest = pd.DataFrame({"file": [row["image"] for row in rows]})
    manifest["study_id"] = [f"s{index // 2}" for index in range(6)]
    manifest.assign(laterality="L", view="CC").to_csv(folder / "manifest.csv", index=False)
    mammo.build_cache(small_config(folder))
    return folder


def tissue_views(count=4, size=128, seed=0):
    """Plain tissue as sample_tiles gives it: (count, 1, size, size), 0.3 +- 0.05, smooth and noise."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2, count, size, size)).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(image, (0, 0), 4) for image in noise[0]])
    return torch.from_numpy(0.3 + 0.35 * smooth + 0.01 * noise[1]).unsqueeze(1)


def speck_targets(sharp):
    return mammo.targets.SpeckMaps(sharp.shape[-1])(sharp)


def test_specks_stand_out_in_their_own_cell_and_lines_do_not():
    plain = tissue_views()
    speckled, lined = plain.clone(), plain.clone()
    speckled[:, :, 42:45, 80:83] += 0.3
    lined[:, :, 42:45, :] += 0.3
    quiet, found, line = (speck_targets(view) for view in (plain, speckled, lined))
    assert found.shape == (4, mammo.targets.SPECK_QUANTITIES, 4, 4)
    excess = found[:, 1]
    assert (excess[:, 1, 2] > 2).all()
    assert quiet[:, 1].max() < 1
    elsewhere = torch.ones(4, 4, dtype=torch.bool)
    elsewhere[1, 2] = False
    assert excess[:, elsewhere].max() < 1
    assert line[:, 1].mean() < 0.1 * excess[:, 1, 2].mean()


def test_prominence_ignores_gain_and_energy_follows_it():
    view = tissue_views()
    dim, bright = speck_targets(view), speck_targets(1.5 * view)
    torch.testing.assert_close(dim[:, 0], bright[:, 0], atol=0.05, rtol=0)  # log; the floor costs 5 %
    torch.testing.assert_close(
        bright[:, 2] - dim[:, 2], torch.full((4, 4, 4), np.log(1.5)), atol=0.02, rtol=0
    )
    assert torch.isfinite(speck_targets(torch.zeros(2, 1, 64, 64))).all()  # air


@pytest.mark.parametrize("size", [32, 64, 100, 129])
def test_the_map_has_the_shape_of_the_feature_map_whose_mean_are_the_features(size):
    model = mammo.MammogramBYOL(torchvision.models.resnet18(), 512, 64, 32).eval()
    view = tissue_views(2, size)
    features, found = model.features_and_map(view)
    assert found.shape[2:] == speck_targets(view).shape[2:]
    torch.testing.assert_close(found.mean((2, 3)), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, model.get_features(view), rtol=1e-4, atol=1e-5)


SPECKS, MASSES = ("--freq_loss_weight", "1"), ("--structure_loss_weight", "2")
TARGETS = {  # flags, and the parts of a run's state and metrics that they bring
    "specks": (SPECKS, {"speck_head": "freq_loss"}),
    "masses": (MASSES, {"structure_head": "structure_loss"}),
    "both": ((*SPECKS, *MASSES), {"speck_head": "freq_loss", "structure_head": "structure_loss"}),
    "both in bf16": (
        (*SPECKS, *MASSES, "--precision", "bf16"),
        {"speck_head": "freq_loss", "structure_head": "structure_loss"},
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_targets_are_learnt_and_stay_out_of_the_model(archive, name):
    flags, heads = TARGETS[name]
    run = open_run(archive, *flags, "--run_name", name, "--lr", "3e-3", "--warmup_epochs", "0")
    plain = open_run(archive, "--run_name", "without")
    assert set(run.model.state_dict()) == set(plain.model.state_dict())
    assert plain.objective.own_state() == {}
    ids = run.train_ids[:8]
    steps = [mammo.train_step(run, ids) for _ in range(24)]
    for metric in heads.values():
        losses = [float(step[metric]) for step in steps]
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    mammo.save_checkpoint(run.folder / "last.pth", run, resumable=True)
    mammo.save_checkpoint(run.folder / "plain.pth", run)
    own = torch.load(run.folder / "last.pth")["objective"]
    assert {key.split(".")[0] for key in own} == set(heads)
    if name == "specks":
        assert sorted(own) == ["speck_head.bias", "speck_head.weight"]
    assert "objective" not in torch.load(run.folder / "plain.pth")


DEFAULTS = ("--freq_loss_weight", "0.25", "--structure_loss_weight", "-1")
OBJECTIVES = {  # flags, and how the objective describes itself
    "views with room": (DEFAULTS, "freq_loss x 0.25, structure_loss x 2, BYOL x 1; "),
    "views without": ((*DEFAULTS, "--pixel_spacing_mm", "0.05"), "freq_loss x 0.25, BYOL x 1; "),
    "plain": ((), "BYOL x 1; "),
    "alone": (
        (*DEFAULTS, "--byol_weight", "0"),
        "freq_loss x 0.25, structure_loss x 2, targets alone; ",
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_says_what_it_asks_for(archive, name):
    flags, said = OBJECTIVES[name]
    run = open_run(archive, *flags, "--run_name", name)
    described = run.objective.describe(run.total_steps)
    assert described.startswith(said)
    assert described.endswith("backbone: the batch's statistics, lr x 1, rests 0 steps")


def test_the_defaults_are_those_that_were_tried():
    config = mammo.Config()
    asked = dict(zip(DEFAULTS[::2], map(float, DEFAULTS[1::2]), strict=True))
    assert asked == {
        "--freq_loss_weight": config.freq_loss_weight,
        "--structure_loss_weight": config.structure_loss_weight,
    }


def test_the_targets_alone_leave_byols_heads_as_they_are(archive, tmp_path):
    flags = (
        *DEFAULTS,
        "--byol_weight",
        "0",
        "--run_name",
        "alone",
        "--epochs",
        "1",
        "--report_every",
        "5",
    )
    before = open_run(archive, *flags).model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    folder = mammo.train(small_config(archive, *flags))
    after = torch.load(folder / "mammogram_byol_final.pth")["model_state_dict"]
    for part in ("projection_head", "prediction_head"):
        names = [name for name in before if name.startswith(f"{part}.") and name.endswith("weight")]
        assert names
        assert all(torch.equal(before[name], after[name]) for name in names)
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])
    table = pd.read_csv(folder / "metrics.csv")
    weighted = 0.25 * table["freq_loss"] + 2 * table["structure_loss"]
    np.testing.assert_allclose(table["loss"].dropna(), weighted.dropna(), rtol=1e-4)
    assert cv2.imread(str(folder / "targets.png")) is not None
    assert "targets" in (folder / "report.html").read_text()


def test_nothing_to_learn_is_refused(archive):
    with pytest.raises(mammo.MammoError, match="nothing to learn"):
        small_config(archive, "--byol_weight", "0")
    no_room = ("--structure_loss_weight", "-1", "--pixel_spacing_mm", "0.05", "--run_name", "no_room")
    with pytest.raises(mammo.MammoError, match="leave nothing to learn"):
        open_run(archive, "--byol_weight", "0", *no_room)


def test_the_heads_learn_before_a_trained_backbone(archive, tmp_path):
    start = open_run(archive, "--run_name", "start").model.backbone
    checkpoint = tmp_path / "start.pth"
    torch.save(start.state_dict(), checkpoint)
    flags = ("--run_name", "kept", "--weights", str(checkpoint), "--warmup_frozen_steps", "2")
    run = open_run(archive, *flags, "--warmup_epochs", "0")
    kept = {name: value.clone() for name, value in run.model.backbone.state_dict().items()}
    head = run.model.projection_head.state_dict()["layers.0.weight"].clone()
    for step in range(3):
        mammo.train_step(run, run.train_ids[:8])
        now = run.model.backbone.state_dict()
        assert torch.equal(now["conv1.weight"], kept["conv1.weight"]) == (step < 2)
        assert torch.equal(now["bn1.running_mean"], kept["bn1.running_mean"])
    assert not torch.equal(run.model.projection_head.state_dict()["layers.0.weight"], head)


def test_with_the_targets_stopped_and_resumed_equals_uninterrupted(archive, tmp_path):
    (tmp_path / "images").symlink_to(archive / "images")
    shutil.copytree(archive / "cache", tmp_path / "cache")
    flags = ["--epochs", "2", *SPECKS, *MASSES, "--energy_share", "0.5", "--vicreg_weight", "0.1"]
    for name, parts in (("whole", [[]]), ("parts", [["--max_steps", "3"], []])):
        for more in parts:
            mammo.train(small_config(tmp_path, *flags, *more, "--run_name", name))
    files = [tmp_path / "runs" / name / "last.pth" for name in ("whole", "parts")]
    assert weights_hash(files[0]) == weights_hash(files[1])
    whole, parts = (torch.load(file)["objective"] for file in files)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert all(value.abs().max() > 0 for value in whole.values())
    table = pd.read_csv(files[0].with_name("metrics.csv"))
    assert table["freq_loss"].dropna().between(0, 20).all()
    assert table["structure_loss"].dropna().between(0, 2).all()
    assert table["vicreg_loss"].dropna().between(0, 100).all()
    assert len(table["structure_loss"].dropna()) == len(table["freq_loss"].dropna()) > 0
    assert table["loss"].dropna().between(-1, 1).all()  # BYOL's own loss, without the target's


def test_the_probe_reports_chooses_the_best_and_changes_no_weight(six, monkeypatch, capfd):
    aurocs = iter([0.9, 0.6])

    def probe(*words):
        real = plain(*words)
        assert all(0 <= value <= 1 for value in real.values())
        return {**real, "auroc": next(aurocs)}

    plain = byol_mammo.labels.run_probe
    monkeypatch.setattr(byol_mammo.labels, "run_probe", probe)
    labels = ["--labels", str(six / "labels.csv")]
    probed = mammo.train(small_config(six, "--epochs", "2", "--run_name", "probed", *labels))
    assert torch.load(probed / "mammogram_byol_best.pth")["epoch"] == 1
    table = pd.read_csv(probed / "metrics.csv").dropna(subset=["monitor_auroc"])
    assert table["monitor_auroc"].tolist() == [0.9, 0.6]
    assert {"monitor_auroc_mass", "monitor_auroc_calcification"} <= set(table.columns)
    assert "epoch 2: probe AUROC mass" in capfd.readouterr().err
    unprobed = mammo.train(small_config(six, "--epochs", "2", "--run_name", "unprobed"))
    names = [folder / "mammogram_byol_final.pth" for folder in (probed, unprobed)]
    assert weights_hash(names[0]) == weights_hash(names[1])


def test_the_probe_finds_what_is_there_and_nothing_in_noise(six):
    config = small_config(six, "--labels", str(six / "labels.csv"), "--run_name", "found")
    run = open_run(six, "--labels", str(six / "labels.csv"), "--run_name", "found")
    probe = mammo.prepare_run_probe(run.tiles, config)
    rng = np.random.default_rng(5)
    features = rng.normal(size=(len(probe.ids), 6)).astype(np.float32)
    features[:, 0] += 6 * np.nan_to_num(probe.targets[:, 0])
    weights, bias = classifier.fit_logistic(features, np.nan_to_num(probe.targets[:, 0]), 1.0)
    assert abs(weights[0]) > 3 * np.abs(weights[1:]).max()
    scores = features @ weights + bias
    assert scores[probe.targets[:, 0] == 1].min() > scores[probe.targets[:, 0] == 0].mean()
    assert set(np.unique(probe.groups)) == {"s0", "s1", "s2"}
    assert (probe.targets == 1).any() and (probe.targets == 0).any()  # noqa: PT018
    table = pd.read_csv(six / "labels.csv")
    table["patient_id"] = [f"p{number // 2}" for number in range(6)]
    table.to_csv(six / "labels_with_patients.csv", index=False)
    config = dataclasses.replace(config, labels=str(six / "labels_with_patients.csv"))
    assert set(mammo.prepare_run_probe(run.tiles, config).groups) == {"p0", "p1", "p2"}


def test_probe_labels_are_checked_before_the_extraction(six, tmp_path):
    (tmp_path / "images").mkdir()  # without an image, which the extraction would not forgive
    with pytest.raises(mammo.MammoError, match="no such file"):
        mammo.train(small_config(tmp_path, "--labels", str(tmp_path / "none.csv")))
    labels = pd.read_csv(six / "labels.csv").assign(mass=0, calcification=0, boxes="")
    labels.to_csv(six / "empty.csv", index=False)
    with pytest.raises(
        mammo.MammoError, match="0 studies have tiles with mass, the online probe needs 3"
    ):
        mammo.train(small_config(six, "--labels", str(six / "empty.csv"), "--run_name", "none"))
