"""--backbone timm:NAME: a convnet and a transformer train, resume, are exported and read again."""

from __future__ import annotations

import copy
import functools

import lite0_weights
import numpy as np
import pytest
import timm
import torch
from conftest import small_config, write_images
from safetensors.torch import load_file

import train_byol_mammo as mammo
from byol_mammo import checkpoints
from byol_mammo.settings import MammoError

TARGETS = ("--structure_loss_weight", "2", "--freq_loss_weight", "1", "--epochs", "2")
NAMES = ("timm:test_efficientnet", "timm:test_vit")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")
    write_images(folder / "images")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_network_trains_resumes_and_is_read_again(archive, name, monkeypatch):
    """To the bit also with dropout, which some networks have by default."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, drop_rate=0.3))
    flags = (*TARGETS, "--backbone", name, "--pixel_spacing_mm", "0.6")
    whole = mammo.train(small_config(archive, *flags, "--run_name", "whole" + name[-3:]))
    for limit in ("1", "5", "0"):
        parts = mammo.train(
            small_config(archive, *flags, "--run_name", "parts" + name[-3:], "--max_steps", limit)
        )
    ours, theirs = (
        checkpoints.load_checkpoint(folder / "mammogram_byol_final.pth")["model_state_dict"]
        for folder in (whole, parts)
    )
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    views = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exported = checkpoints.load_backbone(whole / "backbone.safetensors")
    continued = checkpoints.build_backbone(name, str(whole / "mammogram_byol_final.pth")).eval()
    with torch.no_grad():
        features, found = checkpoints.features_and_map(exported, views)
        torch.testing.assert_close(continued(views), features)
    assert found.shape == (2, features.shape[1], 2, 2)
    assert features.std(0).min() > 0
    plain = timm.create_model(name.removeprefix("timm:"), num_classes=0)
    plain.load_state_dict(load_file(whole / "backbone.safetensors"))


@pytest.mark.parametrize("name", [*NAMES, "resnet18_slim"])
def test_norm_over_all_processes_keeps_what_follows_it(name):
    """Some of timm's norms hold the activation."""
    backbone = checkpoints.build_backbone(name).eval()
    views = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = backbone(views)
        checkpoints.synchronise_norm(backbone, name)
        torch.testing.assert_close(backbone(views), before)
    synchronised = [layer for layer in backbone.modules() if isinstance(layer, torch.nn.SyncBatchNorm)]
    assert bool(synchronised) == (name != "timm:test_vit")


def test_every_parameter_gets_a_gradient_from_the_targets_alone(archive, tmp_path):
    """DistributedDataParallel stops at one without; ConvNeXt's last norm makes features, and no map."""
    flags = (
        *TARGETS,
        "--backbone",
        "timm:test_convnext",
        "--pixel_spacing_mm",
        "0.6",
        "--byol_weight",
        "0",
    )
    config = small_config(archive, *flags, "--output_dir", str(tmp_path))
    backbone = checkpoints.build_backbone(config.backbone)
    config = mammo.match_input_dim(config, backbone)
    run = mammo.prepare_run(config, backbone, mammo.build_cache(config), mammo.processes.find_ranks())
    mammo.train_step(run, run.train_ids[:8])
    trained = {name: p for name, p in run.objective.named_parameters() if p.requires_grad}
    assert any("head.norm" in name for name in trained)
    assert [name for name, p in trained.items() if p.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_timm(name):
    backbone = checkpoints.build_backbone(name).eval()
    plain = timm.create_model(name.removeprefix("timm:"), num_classes=0).eval()
    plain.load_state_dict(backbone.state_dict())
    side = plain.default_cfg["input_size"][-1]
    views = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(checkpoints.features_and_map(backbone, views)[0], plain(views))


def test_the_map_of_a_transformer_lies_as_its_patches_do():
    backbone = checkpoints.build_backbone("timm:test_vit").eval()
    plain = torch.zeros(1, 3, 128, 128)
    changed = plain.clone()
    changed[..., 64:96, 96:] = 1
    before, after = (checkpoints.feature_map(copy.deepcopy(backbone), x) for x in (plain, changed))
    moved = (after - before).detach().norm(dim=1)[0].numpy()
    assert np.unravel_index(moved.argmax(), moved.shape) == (2, 3)


def test_weights_of_a_file_are_those_that_timm_saves(tmp_path):
    network = timm.create_model("test_efficientnet")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    backbone = checkpoints.build_backbone(NAMES[0], str(tmp_path / "w.pth"))
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])


def test_the_packaged_imagenet_weights_are_those_of_the_network(tmp_path):
    """Trained features tell two patterns apart more than two pictures of one pattern."""
    path = tmp_path / "lite0.pth"
    assert lite0_weights.main(str(path)) == 0
    backbone = checkpoints.build_backbone("timm:tf_efficientnet_lite0", str(path)).eval()
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    stripes = [torch.sin(0.5 * line + shift) for line in (x, y) for shift in (0, 1.5)]
    with torch.no_grad():
        found = backbone(torch.stack(stripes)[:, None].expand(-1, 3, -1, -1))
    alike = torch.corrcoef(found)
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[1, 3]) + 0.05


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:tset_vit", "nearest: test_vit"),
        ("timm:swin_tiny_patch4_window7_224", "and a last map"),
        ("timm:mobilenetv3_small_050", "needed are 288 features .* it makes .1, 1024."),
        ("tim:resnet18", "choose one of"),
    ],
)
def test_what_is_no_such_network_is_refused(archive, name, message):
    with pytest.raises(MammoError, match=message):
        mammo.train(small_config(archive, "--backbone", name))


def test_a_view_that_the_network_cannot_take_is_refused_before_the_extraction(archive, tmp_path):
    flags = ("--backbone", "timm:test_vit", "--cache_dir", str(tmp_path / "cache"))
    with pytest.raises(MammoError, match=r"of 40 px it makes .*; --view_size 32 may do"):
        mammo.train(small_config(archive, *flags, "--view_size", "40"))
    assert not (tmp_path / "cache").exists()


def test_weights_that_the_hub_does_not_give_are_named(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: 1 / 0)
    with pytest.raises(MammoError, match="--weights PATH"):
        checkpoints.imagenet_state("timm:test_vit")
