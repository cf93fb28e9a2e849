"""The BYOL model against lightly and torchvision, and its files."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from conftest import RESNET18, small_config
from lightly.loss import NegativeCosineSimilarity, VICRegLoss
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from safetensors.torch import load_file
from torch import nn

import train_byol_mammo as mammo


def small_model(seed=0):
    torch.manual_seed(seed)
    return mammo.MammogramBYOL(mammo.checkpoints.build_backbone("resnet18"), 512, 64, 32)


def views(count=6, size=32, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, channels, size, size, generator=generator) for _ in range(2)]


def test_shapes_for_one_and_three_channels():
    model = small_model().eval()
    grey, _ = views()
    colour = grey.expand(-1, 3, -1, -1)
    for x in (grey, colour):
        assert model(x).shape == (6, 32)
        assert model.forward_target(x).shape == (6, 32)
        assert model.get_features(x).shape == (6, 512)
        assert model.classify(x).shape == (6, 2)
    torch.testing.assert_close(model(grey), model(colour))


def test_caller_keeps_grad_and_mode():
    model, (x, _) = small_model(), views()
    assert model.get_features(x).requires_grad
    assert model.classify(x).requires_grad
    assert not model.forward_target(x).requires_grad
    model.eval()
    model.classify(x)
    assert not model.training


def test_logits_keep_their_digits_under_autocast():
    model, (x, _) = small_model().eval(), views()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.classify(x)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, model.classify(x), rtol=0.1, atol=0.01)


def test_heads_equal_lightlys():
    model = small_model()
    assert isinstance(model.projection_head, BYOLProjectionHead)
    assert isinstance(model.prediction_head, BYOLPredictionHead)
    default = mammo.MammogramBYOL(nn.Flatten())
    shapes = [tuple(p.shape) for p in default.projection_head.parameters() if p.ndim == 2]
    assert shapes == [(4096, 2048), (256, 4096)]
    shapes = [tuple(p.shape) for p in default.prediction_head.parameters() if p.ndim == 2]
    assert shapes == [(4096, 256), (256, 4096)]
    assert [m.out_features for m in default.classification_head if isinstance(m, nn.Linear)] == [2048, 2]


def as_views(*images):
    return [mammo.View("", image, image) for image in images]


def test_loss_equals_lightlys_and_the_papers():
    model, (a, b) = small_model(), views()
    twin = copy.deepcopy(model)
    loss, _ = mammo.BYOL(model, mammo.Config())(as_views(a, b))
    criterion = NegativeCosineSimilarity()
    p_a, p_b = twin(a), twin(b)
    z_a, z_b = twin.forward_target(a), twin.forward_target(b)
    torch.testing.assert_close(loss, 0.5 * (criterion(p_a, z_b) + criterion(p_b, z_a)))
    unit = nn.functional.normalize
    paper = (unit(p_a) - unit(z_b)).square().sum(1).mean() + (unit(p_b) - unit(z_a)).square().sum(
        1
    ).mean()
    torch.testing.assert_close(4 + 4 * loss, paper)  # equation 2, in both directions


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_vicreg_beside_it_is_lightlys_of_the_projections_in_fp32(precision):
    model, (a, b) = small_model(), views()
    plain = mammo.BYOL(model, mammo.Config())
    with_it = mammo.BYOL(copy.deepcopy(model), mammo.Config(vicreg_weight=0.5))
    seen = []
    with_it.model.projection_head.register_forward_hook(lambda *words: seen.append(words[2].float()))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        (alone, metrics), (both, measured) = plain(as_views(a, b)), with_it(as_views(a, b))
    assert "vicreg_loss" not in metrics
    expected = VICRegLoss()(*seen)
    torch.testing.assert_close(measured["vicreg_loss"], expected.detach())
    torch.testing.assert_close(both, alone + 0.5 * expected)
    torch.testing.assert_close(measured["loss"], metrics["loss"])  # BYOL's, without it
    both.backward()
    assert with_it.model.projection_head.layers[0].weight.grad.abs().sum() > 0


def test_vicreg_has_lightlys_numbers_and_gradients():
    torch.manual_seed(0)
    for shape in ((2, 2), (8, 5), (33, 64)):
        a, b = (torch.randn(shape).mul(3).requires_grad_() for _ in range(2))
        found, expected = mammo.VICReg()(a, b), VICRegLoss()(a, b)
        assert torch.equal(found, expected)
        for ours, theirs in zip(
            torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_gradient_reaches_the_online_network_alone():
    model, (a, b) = small_model(), views()
    mammo.BYOL(model, mammo.Config())(as_views(a, b))[0].backward()
    for name, parameter in model.named_parameters():
        target_or_classifier = "momentum" in name or name.startswith("classification")
        assert (parameter.grad is None) == target_or_classifier, name


def test_target_update_equals_lightlys():
    model = small_model()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.1)
    expected = copy.deepcopy(model)
    update_momentum(expected.backbone, expected.backbone_momentum, 0.9)
    update_momentum(expected.projection_head, expected.projection_head_momentum, 0.9)
    before = model.backbone_momentum.conv1.weight.clone()
    model.update_target(0.9)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(
        model.backbone_momentum.conv1.weight, 0.9 * before + 0.1 * model.backbone.conv1.weight
    )


def test_schedules_equal_lightlys():
    config = mammo.Config(lr=1.0, warmup_epochs=2, epochs=10, batch_size=32)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=14, max_epochs=70, end_value=0)
    byol = mammo.BYOL(small_model(), config)
    base = mammo.first_momentum(config.momentum_base, 70)
    for step in range(70):
        expected = scheduler.scale_lr(step)
        assert np.isclose(mammo.learning_rate(step, 70, 7, config), expected)
        metrics = byol.after_step(step, 70)
        assert metrics == {"momentum": cosine_schedule(step, 70, base, 1.0)}
    assert mammo.learning_rate(69, 70, 7, config) == 0
    assert mammo.learning_rate(13, 70, 7, config) == 1
    larger = mammo.Config(lr=1.0, warmup_epochs=2, epochs=10, batch_size=128)
    assert np.isclose(mammo.learning_rate(13, 70, 7, larger), 2)
    assert max(mammo.learning_rate(s, 6, 2, config) for s in range(6)) == 1  # warm-up: half a short run


@pytest.mark.parametrize("steps", [2, 60, 252, 600, 1500, 500_000])
def test_a_short_run_forgets_its_initial_target(steps):
    base = mammo.first_momentum(0.996, steps)
    kept = np.prod([cosine_schedule(step, steps, base, 1.0) for step in range(steps)])
    assert kept < 0.06
    assert base <= 0.996
    assert mammo.first_momentum(0.996, 10_000) == 0.996


FROM_TRAINED = {"weights": "imagenet", "backbone": "resnet18"}


def test_from_trained_weights_the_heads_learn_first_and_statistics_stay():
    config = mammo.Config(**FROM_TRAINED)
    assert config.norm_frozen
    assert config.backbone_pace == 0.1
    assert config.frozen_steps(500) == 100
    random = mammo.Config(weights="none")
    assert not random.norm_frozen
    assert random.backbone_pace == 1
    assert random.frozen_steps(500) == 0
    asked = mammo.Config(
        **FROM_TRAINED, backbone_norm="batch", backbone_lr_factor=0.5, warmup_frozen_steps=7
    )
    assert not asked.norm_frozen
    assert (asked.backbone_pace, asked.frozen_steps(500)) == (0.5, 7)


def test_frozen_norm_keeps_its_statistics_and_learns_its_weights():
    model = small_model()
    model.norm_frozen = True
    model.train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    objective = mammo.BYOL(model, mammo.Config(lr=1e-2, weights="none"))
    optimizer = mammo.build_optimizer(objective, objective.config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    a, b = torch.randn(2, 8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    objective(as_views(a, b))[0].backward()
    optimizer.step()
    for name, value in model.backbone.state_dict().items():
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, before[name]) == statistic, name
    assert model.projection_head.training


def test_weight_decay_spares_biases_and_norms():
    model = small_model()
    config = mammo.Config(weight_decay=0.5)
    groups = mammo.build_optimizer(mammo.BYOL(model, config), config).param_groups
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    online = [model.backbone, model.projection_head, model.prediction_head]
    count = sum(len(list(part.parameters())) for part in online)
    assert count == sum(len(group["params"]) for group in groups)


def test_feature_std_and_rankme_know_their_extremes():
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(4096, 64, generator=generator)
    assert 0.95 < mammo.feature_std(isotropic) < 1.05
    assert 60 < mammo.rankme(isotropic) <= 64.5
    point = torch.ones(100, 64) + 1e-6 * torch.randn(100, 64, generator=generator)
    assert mammo.feature_std(point) < 1e-3
    assert mammo.rankme(point) < 1.1
    line = torch.randn(100, 1, generator=generator) * torch.randn(1, 64, generator=generator)
    assert mammo.rankme(line) < 1.1


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_export_loads_strictly_into_torchvision(tmp_path, monkeypatch, name):
    backbone = mammo.checkpoints.build_backbone(name)
    width = mammo.checkpoints.feature_width(backbone)
    model = mammo.MammogramBYOL(backbone, width, 16, 8)
    mammo.checkpoints.export_backbone(model.backbone, tmp_path / "b.safetensors", name, (0.449, 0.226))
    plain = torchvision.models.get_model(name)
    plain.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=True)
    monkeypatch.setattr(mammo.checkpoints, "architecture", None)  # the file names its model
    loaded = mammo.load_backbone(tmp_path / "b.safetensors")
    x = torch.randn(2, 3, 64, 64)
    features = loaded(x)
    assert features.shape == (2, width)
    torch.testing.assert_close(features, model.eval().get_features(x))
    plain.fc = nn.Identity()
    torch.testing.assert_close(features, plain.eval()(x))


def test_weights_from_a_plain_state_dict(tmp_path):
    donor = torchvision.models.resnet18()
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    backbone = mammo.checkpoints.build_backbone("resnet18", str(tmp_path / "w.pth"))
    torch.testing.assert_close(backbone.conv1.weight, donor.conv1.weight)


def test_wrong_weights_are_refused_with_the_remedy(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "w34.pth")
    with pytest.raises(mammo.MammoError, match=r"don't fit the backbone.*--backbone"):
        mammo.checkpoints.build_backbone("resnet18", str(tmp_path / "w34.pth"))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(mammo.MammoError, match="can't be read"):
        mammo.checkpoints.build_backbone("resnet18", str(tmp_path / "junk.pth"))
    with pytest.raises(mammo.MammoError, match="no such file"):
        mammo.checkpoints.build_backbone("resnet18", str(tmp_path / "nothing.pth"))


def test_missing_imagenet_weights_name_file_and_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(mammo.MammoError) as caught:
        mammo.checkpoints.build_backbone("resnet50", "imagenet")
    message = str(caught.value)
    assert "https://download.pytorch.org/models/resnet50" in message
    assert str(tmp_path / "checkpoints" / "resnet50-11ad3fa6.pth") in message
    assert "--weights none" in message


def test_input_dim_follows_the_backbone(tmp_path):
    config, backbone = small_config(tmp_path, *RESNET18), mammo.checkpoints.build_backbone("resnet18")
    assert mammo.match_input_dim(config, backbone).input_dim == 512
    wrong = mammo.dataclasses.replace(config, input_dim=100)
    with pytest.raises(mammo.MammoError, match="resnet18 has 512"):
        mammo.match_input_dim(wrong, backbone)


def test_an_objective_without_target_or_head_needs_two_methods():
    """What it leaves out does nothing: no metric after a step, collapse judged on the features."""

    class Mean(mammo.Objective):
        def trained(self):
            return [mammo.ParameterGroup([self.model.backbone], lr_factor=0.5)]

        def forward(self, views):
            loss = self.model.get_features(views[0].image).mean()
            return loss, {"loss": loss.detach()}

    objective = Mean(small_model())
    assert objective.after_step(0, 10) == {}
    features = torch.randn(4, 8)
    assert objective.embed(features) is features
    groups = mammo.build_optimizer(objective, mammo.Config()).param_groups
    assert {group["lr_factor"] for group in groups} == {0.5}
    assert not any(p.requires_grad for p in objective.model.projection_head.parameters())
    assert all(p.requires_grad for p in objective.model.backbone.parameters())
