"""What the classifier asks of pre-training: the frequency target and the online probe."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_config, write_images
from test_training import open_run, weights_hash

import train_byol_mammo as mammo


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


def test_energies_are_standardised_and_specks_stand_out():
    rng = np.random.default_rng(0)
    tiles = pd.DataFrame(
        {"freq_energy": rng.uniform(0, 0.03, 500), "band_energy": rng.uniform(0.1, 0.2, 500)}
    )
    tiles.loc[:9, "freq_energy"] = 0.08
    targets = mammo.energy_targets(tiles)
    np.testing.assert_allclose(targets.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(targets.std(0), 1, atol=1e-4)
    assert targets[:10, 0].min() > 5
    assert np.ptp(targets[10:, 0]) < 1.5  # plain tissue is alike
    assert np.abs(mammo.energy_targets(tiles.assign(band_energy=0.0))[:, 1]).max() < 1e-5


def test_band_energy_ignores_gain_and_grows_with_fine_detail():
    rng = np.random.default_rng(1)
    image = (1000 + 100 * rng.normal(size=(256, 256))).astype(np.uint16)
    mask = np.ones_like(image, bool)
    config = mammo.Config(tile_size=128, tile_stride=128, exclude_pectoral=False)
    band = mammo.score_tiles(image, mask, config)["band_energy"].to_numpy()
    louder = mammo.score_tiles(image * 4, mask, config)["band_energy"].to_numpy()
    np.testing.assert_allclose(band, louder, rtol=0.01)
    rough = image.copy()
    rough[:128, :128] += (300 * rng.normal(size=(128, 128))).clip(0).astype(np.uint16)
    scores = mammo.score_tiles(rough, mask, config).set_index(["x", "y"])["band_energy"]
    assert scores[0, 0] > 1.3 * scores[128, 128]


def test_the_target_is_learnt_and_stays_out_of_the_model(archive):
    run = open_run(
        archive,
        "--freq_loss_weight",
        "1",
        "--run_name",
        "energy",
        "--lr",
        "3e-3",
        "--warmup_epochs",
        "0",
    )
    plain = open_run(archive, "--run_name", "without")
    assert set(run.model.state_dict()) == set(plain.model.state_dict())
    assert plain.energy_head is None
    ids = run.train_ids[:8]
    losses = [float(mammo.train_step(run, ids)[2]) for _ in range(24)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    mammo.save_checkpoint(run.folder / "last.pth", run, resumable=True)
    mammo.save_checkpoint(run.folder / "plain.pth", run)
    assert "energy_head" in torch.load(run.folder / "last.pth")
    assert "energy_head" not in torch.load(run.folder / "plain.pth")


def test_with_the_target_stopped_and_resumed_equals_uninterrupted(archive, tmp_path):
    (tmp_path / "images").symlink_to(archive / "images")
    shutil.copytree(archive / "cache", tmp_path / "cache")
    flags = ["--epochs", "2", "--freq_loss_weight", "1"]
    for name, parts in (("whole", [[]]), ("parts", [["--max_steps", "3"], []])):
        for more in parts:
            mammo.train(small_config(tmp_path, *flags, *more, "--run_name", name))
    files = [tmp_path / "runs" / name / "last.pth" for name in ("whole", "parts")]
    assert weights_hash(files[0]) == weights_hash(files[1])
    heads = [torch.load(file)["energy_head"]["weight"] for file in files]
    assert torch.equal(*heads)
    assert heads[0].abs().max() > 0
    table = pd.read_csv(files[0].with_name("metrics.csv"))
    assert table["freq_loss"].dropna().between(0, 20).all()
    assert table["loss"].dropna().between(-1, 1).all()  # BYOL's own loss, without the target's


def test_the_probe_reports_chooses_the_best_and_changes_no_weight(six, monkeypatch, capfd):
    aurocs = iter([0.9, 0.6])

    def probe(run, tiles):
        real = plain(run, tiles)
        assert all(0 <= value <= 1 for value in real.values())
        return {**real, "auroc": next(aurocs)}

    plain = mammo.run_probe
    monkeypatch.setattr(mammo, "run_probe", probe)
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
    probe = mammo.prepare_probe(run.tiles, config)
    rng = np.random.default_rng(5)
    features = rng.normal(size=(len(probe.ids), 6)).astype(np.float32)
    features[:, 0] += 6 * np.nan_to_num(probe.targets[:, 0])
    weights, bias = mammo.fit_logistic(features, np.nan_to_num(probe.targets[:, 0]), 1.0)
    assert abs(weights[0]) > 3 * np.abs(weights[1:]).max()
    scores = features @ weights + bias
    assert scores[probe.targets[:, 0] == 1].min() > scores[probe.targets[:, 0] == 0].mean()
    assert set(np.unique(probe.studies)) == {"s0", "s1", "s2"}
    assert (probe.targets == 1).any() and (probe.targets == 0).any()  # noqa: PT018


def test_probe_labels_are_checked_before_the_extraction(six, tmp_path):
    with pytest.raises(mammo.MammoError, match="no such file"):
        mammo.train(small_config(tmp_path, "--labels", str(tmp_path / "none.csv")))
    labels = pd.read_csv(six / "labels.csv").assign(mass=0, calcification=0, boxes="")
    labels.to_csv(six / "empty.csv", index=False)
    with pytest.raises(
        mammo.MammoError, match="0 studies have tiles with mass, the online probe needs 3"
    ):
        mammo.train(small_config(six, "--labels", str(six / "empty.csv"), "--run_name", "none"))
