"""Weights as others save them: read where they hold one ResNet, else refused in a line that helps."""

from __future__ import annotations

import argparse
import pickle
import re

import pytest
import small_network
import torch
import torchvision
from safetensors.torch import save_file

import train_byol_mammo as mammo
import train_classifier as classifier

NAME = small_network.NAME


@pytest.fixture(scope="module")
def donor():
    """A ResNet with its `fc`, as torchvision gives it."""
    torch.manual_seed(1)
    return torchvision.models.get_model(NAME)


def behind(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state):
    """Weights of the same form with other values."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def no_fc(state):
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


FORMS = {  # how a state dict is wrapped, and where the note says that it was read from
    "plain": (lambda s: s, ""),
    "without fc": (no_fc, ""),
    "model": (lambda s: {"model": s, "epoch": 3}, "model.conv1.weight"),
    "state_dict": (
        lambda s: {"state_dict": s, "optimizer": {"state": {0: s["fc.bias"]}}},
        "state_dict.conv1.weight",
    ),
    "teacher": (lambda s: {"teacher": behind("backbone.", s)}, "teacher.backbone.conv1.weight"),
    "DataParallel": (lambda s: behind("module.", s), "module.conv1.weight"),
    "compiled": (lambda s: behind("_orig_mod.", s), "_orig_mod.conv1.weight"),
    "compiled and parallel": (
        lambda s: {"net": behind("module._orig_mod.", s)},
        "net.module._orig_mod.conv1.weight",
    ),
    "encoder": (lambda s: behind("encoder.", s), "encoder.conv1.weight"),
    "net": (lambda s: behind("net.", s), "net.conv1.weight"),
    "any other": (lambda s: {"a": {"b": behind("c.d.", s)}}, "a.b.c.d.conv1.weight"),
    "MoCo": (
        lambda s: {"state_dict": behind("module.encoder_q.", s) | behind("module.encoder_k.", other(s))},
        "state_dict.module.encoder_q.conv1.weight",
    ),
    "lightly": (
        lambda s: {"state_dict": behind("backbone.", s) | behind("backbone_momentum.", other(s))},
        "state_dict.backbone.conv1.weight",
    ),
    "SwAV": (
        lambda s: behind("module.", no_fc(s) | {"prototypes.weight": torch.ones(2)}),
        "module.conv1.weight; not read: prototypes.weight",
    ),
    "half": (lambda s: {name: v.half() if v.is_floating_point() else v for name, v in s.items()}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMS))
def test_wrapped_weights_are_read_and_said(donor, tmp_path, capsys, name):
    wrap, said = FORMS[name]
    content = wrap(donor.state_dict())
    paths = [tmp_path / "w.pth"]
    torch.save(content, paths[0])
    if not any(isinstance(part, dict) for part in content.values()):
        paths.append(tmp_path / "w.safetensors")
        save_file(content, paths[1])
    exact = {} if name != "half" else {"rtol": 1e-3, "atol": 1e-3}
    for path in paths:
        backbone = mammo.checkpoints.build_backbone(NAME, str(path))
        for key, value in no_fc(donor.state_dict()).items():
            torch.testing.assert_close(backbone.state_dict()[key], value, **exact)
        expected = f"note: weights {path}: read from {said}\n" if said else ""
        assert capsys.readouterr().err == expected


def spoilt(state, value):
    return {**state, "layer2.0.bn1.weight": torch.full_like(state["layer2.0.bn1.weight"], value)}


REFUSED = {  # what torch.save gets, and the reason
    "student and teacher": (
        lambda s: {"student": s, "teacher": s},
        r"several backbones in it, as student\., teacher\.; save the one that you mean alone",
    ),
    "two nets": (lambda s: behind("a.", s) | behind("b.", s), r"several backbones in it, as a\., b\.;"),
    "another network": (
        lambda s: dict.fromkeys(["patch_embed", "blocks.0", "c", "d"], s["fc.bias"]),
        r"no such backbone in it; it holds patch_embed, blocks\.0, c, \.\.\., expected is "
        r"conv1\.weight, bn1\.weight, layer1\.0\.conv1\.weight",
    ),
    "names that colour": (lambda s: {"\x1b[31mred": s["fc.bias"]}, r"it holds \\x1b\[31mred,"),
    "no tensor": (lambda s: {"epoch": 3}, "it holds no tensor"),
    "a list": (lambda s: [1, 2], "it holds no tensor"),
    "NaN": (lambda s: spoilt(s, float("nan")), r"layer2\.0\.bn1\.weight holds NaN.*take an earlier"),
    "infinite": (lambda s: {"model": spoilt(s, float("inf"))}, r"bn1\.weight holds NaN or inf"),
    "a whole model": (
        lambda s: torchvision.models.get_model(NAME),
        r"it holds small_network\.SlimResNet, .*torch\.save\(model\.state_dict\(\), FILE\)",
    ),
    "arguments": (
        lambda s: {"model": s, "args": argparse.Namespace()},
        r"it holds argparse\.Namespace, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_weights_that_cannot_be_meant_are_refused_in_a_line(donor, tmp_path, name, capsys):
    content, message = REFUSED[name]
    path = tmp_path / "w.pth"
    torch.save(content(donor.state_dict()), path)
    for read in (
        lambda: mammo.checkpoints.build_backbone(NAME, str(path)),
        lambda: mammo.load_backbone(path),
    ):
        with pytest.raises(mammo.MammoError) as caught:
            read()
        text = str(caught.value)
        assert re.search(f"^weights {re.escape(str(path))}: .*{message}", text), text
        assert text.isprintable()
    words = ["predict", str(tmp_path), "--weights", str(path), "--output_dir", str(tmp_path / "out")]
    assert classifier.main([*words, "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert str(path) in printed
    assert re.search(message, printed) or name == "a list"


UNREADABLE = {  # bytes of a file: TorchScript, a bare pickle, nothing
    "TorchScript": (None, "it holds Python objects"),
    "pickle": (pickle.dumps({"a": 1}, 4), "it holds Python objects"),
    "junk": (b"junk", "damaged, or not a file of weights"),
    "empty": (b"", "damaged, or not a file of weights"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_files_of_other_kinds_are_refused_in_a_line(tmp_path, name, suffix):
    content, reason = UNREADABLE[name]
    path = tmp_path / f"w{suffix}"
    if content is None:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    else:
        path.write_bytes(content)
    with pytest.raises(mammo.MammoError) as caught:
        mammo.load_backbone(path)
    text = str(caught.value)
    assert "can't be read" in text
    assert text.isprintable()
    assert suffix == ".safetensors" or reason in text


def test_an_exported_network_of_another_kind_is_read_by_its_own_names(tmp_path, capsys):
    """As one that a user adds to the choices of --backbone."""
    network = mammo.checkpoints.build_backbone("regnet_y_400mf")
    path = tmp_path / "b.safetensors"
    mammo.checkpoints.export_backbone(network, path, "regnet_y_400mf", (0.449, 0.226))
    loaded = mammo.load_backbone(path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())
    mammo.checkpoints.build_backbone("regnet_y_400mf", str(path))
    assert capsys.readouterr().err == ""


def test_a_dict_that_holds_itself_ends_in_a_line(tmp_path):
    content = {}
    content["again"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(mammo.MammoError, match="no tensor"):
        mammo.load_backbone(tmp_path / "w.pth")
