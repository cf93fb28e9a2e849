"""compare --encoders: frozen networks of timm beside ours, on the same tiles, as they were trained."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
import small_network
import timm
import torch
import torch.nn.functional as F
from conftest import breast_image
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

import train_classifier as classifier
from byol_mammo import checkpoints, encoders
from byol_mammo.settings import MammoError

VIEW = 32
TILES = f"--tile_size 96 --tile_stride 64 --view_size {VIEW} --pixel_spacing_mm 0.6 --findings mass"
QUICK = f"--device cpu --num_workers 1 --bootstrap 100 --folds 2 --backbone {small_network.NAME}"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Eight images of eight patients with a bright spot each, their labels, and files of weights."""
    folder = tmp_path_factory.mktemp("encoders")
    rng, rows = np.random.default_rng(0), []
    for number in range(8):
        image = breast_image(seed=number)[0]
        x, y = rng.integers(60, 130), rng.integers(100, 250)
        cv2.circle(image, (int(x) + 20, int(y) + 20), 12, 255, -1)
        cv2.imwrite(str(folder / f"i{number}.png"), image)
        box = {"finding": ["Mass"], "xmin": x, "ymin": y, "xmax": x + 40, "ymax": y + 40}
        boxes = json.dumps([box], default=int)
        rows.append({"image": f"i{number}.png", "study_id": f"s{number}", "mass": 1, "boxes": boxes})
    table = pd.DataFrame(rows).assign(split="training", calcification="")
    table.to_csv(folder / "labels.csv", index=False)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_convnext").state_dict(), folder / "convnext.pth")
    save_file(timm.create_model("test_efficientnet").state_dict(), folder / "b0.safetensors")
    return folder


def run(archive, *words, command="compare"):
    places = [
        "--data_dir",
        archive,
        "--labels",
        archive / "labels.csv",
        "--output_dir",
        archive / "runs",
    ]
    words = [command, *words, *places, "--cache_dir", archive / "cache", *TILES.split(), *QUICK.split()]
    return classifier.main([*map(str, words), "--wandb_mode", "disabled"])


def test_three_encoders_stand_beside_ours(archive, monkeypatch):
    tried = []  # AUROC of validation studies, of each start by its statistics of batch norm
    plain, whole = classifier.probe_scores, classifier.frozen_scores

    def note(*words):
        scores, auroc = plain(*words)
        tried[-1].append(auroc)
        return scores, auroc

    monkeypatch.setattr(classifier, "probe_scores", note)
    monkeypatch.setattr(classifier, "frozen_scores", lambda *words: tried.append([]) or whole(*words))
    vit, convnext, b0 = (
        "timm:test_vit=none",
        f"timm:test_convnext={archive / 'convnext.pth'}",
        f"timm:test_efficientnet.r160_in1k={archive / 'b0.safetensors'}",
    )
    assert run(archive, "none", "classic", "--encoders", vit, convnext, "--encoders", b0) == 0
    table = pd.read_csv(archive / "runs" / "compare" / "compare.csv").set_index("start")
    assert table["weights"].to_dict() == {
        "none": "untrained", "classic": "nothing learns", vit: "untrained", convnext: "convnext.pth",
        b0: "b0.safetensors",
    }  # fmt: skip
    assert (table["px"] == VIEW).all()
    assert table[["auroc", "low", "high"]].notna().all(axis=None)
    assert table["gain"].notna().sum() == 4
    assert [len(aurocs) for aurocs in tried] == [2, 1, 1, 1, 2]  # those with batch norm twice
    assert table["norm"].tolist() == [("own", "tiles")[int(np.argmax(aurocs))] for aurocs in tried]


@pytest.mark.parametrize(
    ("name", "view", "px"),
    [
        ("test_vit", 32, 32),
        ("test_vit", 40, 48),  # whole patches
        ("test_convnext", 40, 40),
        ("test_coatnet", 32, 160),  # of a fixed size
    ],
)
def test_an_encoder_gets_what_it_was_trained_on(name, view, px):
    """Its mean, its deviation, its interpolation, and a size that it takes."""
    encoder = encoders.open_encoder(f"timm:{name}=none", view, seed=3)
    assert encoder.side == px
    sharp = torch.rand(2, 1, view, view)
    inputs = resolve_model_data_config(encoder.network)
    x = sharp.expand(-1, 3, -1, -1)
    if px != view:
        x = F.interpolate(x, (px, px), mode=inputs["interpolation"], antialias=True)
    mean, deviation = (torch.tensor(inputs[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        features = encoder.get_features(sharp)
        torch.testing.assert_close(features, encoder.network((x - mean) / deviation))
        again = encoders.open_encoder(f"timm:{name}=none", view, seed=3).get_features(sharp)
    assert features.shape == (2, encoder.network.num_features)
    assert torch.equal(features, again)


FILES = {
    "with its classifier": lambda network, state: state,
    "with another's classifier": lambda network, state: {
        key: value[:2] if "head.fc" in key or key.startswith(("fc.", "classifier.")) else value
        for key, value in state.items()
    },
    "without": lambda network, state: network.reset_classifier(0) or network.state_dict(),
    "wrapped": lambda network, state: {
        "epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}
    },
}  # fmt: skip


OTHERS = [("test_vit", "with its classifier"), ("test_resnet", "wrapped")]


@pytest.mark.parametrize(("name", "kind"), [*(("test_convnext", kind) for kind in FILES), *OTHERS])
def test_weights_of_a_file_are_all_read(tmp_path, name, kind):
    network = timm.create_model(name)
    with torch.no_grad():
        for value in network.parameters():
            value += 0.01 * torch.randn_like(value)
    torch.save(FILES[kind](network, network.state_dict()), tmp_path / "w.pth")
    encoder = encoders.open_encoder(f"timm:{name}={tmp_path / 'w.pth'}", VIEW, seed=0)
    network.reset_classifier(0)
    expected = network.state_dict()
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(value, expected[key]), key


def our_checkpoint(path):
    backbone = checkpoints.build_backbone("timm:test_vit")
    checkpoints.export_backbone(backbone, path, "timm:test_vit", (0.4, 0.2))


def another_network(path):
    state = timm.create_model("test_convnext").state_dict()
    save_file({key: value[..., :1].contiguous() for key, value in state.items()}, path)


WRONG = {
    "no network of timm": ("none", "stands before --encoders"),
    "no weights behind =": ("timm:test_vit=", "not timm:NAME or timm:NAME=WEIGHTS"),
    "a typo": ("timm:tset_vit=none", "nearest: test_vit"),
    "a typo in the tag": ("timm:test_vit.in1k=none", "has weights r160_in1k of test_vit"),
    "no such file": ("timm:test_vit=nowhere.pth", "no such file nowhere.pth"),
    "two standardisations": ("timm:vit_base_patch16_224={file}", "NAME.TAG="),
    "trained here": ("timm:test_vit={file}", "name it before --encoders"),
    "of another network": ("timm:test_vit={file}", "no such backbone"),
    "of another width": ("timm:test_convnext={file}", "its weights don't fit"),
    "timm has no weights": ("timm:test_coatnet", "timm has no weights of it"),
}
FILE_OF = {
    "two standardisations": lambda path: path.write_bytes(b""),
    "trained here": our_checkpoint,
    "of another network": another_network,
    "of another width": another_network,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_the_remedy(tmp_path, name):
    text, message = WRONG[name]
    path = tmp_path / "w.safetensors"
    FILE_OF.get(name, lambda path: None)(path)
    with pytest.raises(MammoError, match=message):
        encoders.open_encoder(text.replace("{file}", str(path)), VIEW, seed=0)


def test_without_internet_it_is_said_what_to_fetch(archive, monkeypatch, capsys):
    plain = timm.create_model

    def offline(*words, pretrained=False, **options):
        if pretrained:
            raise OSError("Temporary failure in name resolution")
        return plain(*words, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(classifier, "load_labelled", lambda *_: 1 / 0)  # it is said before all work
    assert run(archive, "none", "--encoders", "timm:test_vit") == 2
    said = capsys.readouterr().err
    assert "can't be downloaded (Temporary failure" in said
    assert "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors" in said
    assert "give:  timm:test_vit.r160_in1k=PATH" in said


def test_other_commands_take_no_encoders(archive, capsys):
    assert run(archive, "--encoders", "timm:test_vit=none", command="train") == 2
    assert "--encoders: train takes none" in capsys.readouterr().err


def test_a_dry_run_says_whose_weights_would_be_read(archive, capsys):
    b0 = f"timm:test_efficientnet={archive / 'b0.safetensors'}"
    assert run(archive, "classic", "--dry_run", "--encoders", "timm:test_vit", b0) == 0
    said = capsys.readouterr().out
    assert "weights   classic: nothing learns\n" in said
    assert "weights   timm:test_vit: r160_in1k of timm, from its cache or the internet\n" in said
    assert f"weights   {b0}: {archive / 'b0.safetensors'}\n" in said
    assert run(archive, "--dry_run", "--encoders", "timm:test_vit=nowhere.pth") == 2
