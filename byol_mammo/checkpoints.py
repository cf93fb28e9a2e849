"""Checkpoints as plain types, and backbone weights from anywhere."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import socket
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load as from_safetensors, save as to_safetensors
from torch import Tensor, nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet

from byol_mammo import files
from byol_mammo.settings import MammoError, nearest

SLIM_WIDTH = 16  # channels behind the first layer of resnet18_slim


class SlimResNet(ResNet):
    """ResNet-18 with `width` instead of 64 channels behind its first layer, 8 * width features.

    For studies on a CPU, where 11 million parameters would take hours.
    """

    def __init__(self, width: int = SLIM_WIDTH) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.inplanes = width
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        for number in range(4):
            layer = self._make_layer(BasicBlock, width * 2**number, 2, stride=min(2, number + 1))
            setattr(self, f"layer{number + 1}", layer)
        self.fc = nn.Linear(8 * width, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision starts its ResNets
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@register_model("resnet18_slim")
def resnet18_slim(*, weights: None = None) -> ResNet:
    """A quarter of ResNet-18's channels; there are no trained weights of it."""
    if weights is not None:
        raise ValueError("resnet18_slim has no trained weights")
    return SlimResNet()


TIMM = "timm:"  # before the name of a network of https://github.com/huggingface/pytorch-image-models
STRIDE = 32  # px of a view for each position of a feature map


def build_backbone(name: str = "resnet50", weights: str = "none") -> nn.Module:
    """A network without its classifier: (B, 3, H, W) -> (B, features).

    `name`: a torchvision ResNet, or timm:NAME. `weights`: imagenet, none, or a file (state dict,
    checkpoint of this script, safetensors). Raises MammoError with the remedy where weights can't be
    had or don't fit.
    """
    known = str(name)  # of a stranger's checkpoint it may be anything
    backbone = build_timm(known) if known.startswith(TIMM) else build_torchvision(known)
    if weights == "imagenet":
        load_backbone_state(backbone, imagenet_state(name), "imagenet")
    elif weights != "none":
        load_backbone_state(backbone, read_backbone_state(weights, part_names(backbone))[0], weights)
    return backbone


def build_torchvision(name: str) -> nn.Module:
    """A torchvision ResNet with random weights and an identity for `fc`."""
    if name not in torchvision.models.list_models():
        raise MammoError(f"torchvision has no model {name!r}")
    backbone = torchvision.models.get_model(name, weights=None)
    if not hasattr(backbone, "fc"):
        raise MammoError(f"{name} is no network that ends in fc, as a ResNet does")
    backbone.fc = nn.Identity()
    return backbone


def build_timm(name: str) -> nn.Module:
    """A network of timm with random weights and no classifier. Raises MammoError where it has no map."""
    import timm  # takes seconds

    short = name.removeprefix(TIMM)
    check_timm_name(short, f"--backbone {name}")
    with torch.random.fork_rng(devices=[]):  # the trial draws nothing from the run's own numbers
        try:  # a transformer for views of any size
            backbone = timm.create_model(short, num_classes=0, dynamic_img_size=True)
        except TypeError:
            backbone = timm.create_model(short, num_classes=0)
    check_view_side(backbone, name, 4 * STRIDE)
    return backbone.train()


def check_view_side(backbone: nn.Module, name: str, side: int) -> None:
    """Raise MammoError where a network of timm makes no features and map of a view of `side` px.

    Others take any side. Leaves the network in eval mode.
    """
    if not name.startswith(TIMM):
        return
    width, cells = feature_width(backbone), math.ceil(side / STRIDE)
    try:
        with torch.no_grad():
            made = features_and_map(backbone.eval(), torch.zeros(1, 3, side, side))
        shapes = [tuple(part.shape) for part in made]
    except (RuntimeError, AssertionError, ValueError):  # of a fixed size, or no map at all
        shapes = []
    if shapes != [(1, width), (1, width, cells, cells)]:
        remedy = f"; --view_size {max(1, side // STRIDE) * STRIDE} may do" if side % STRIDE else ""
        raise MammoError(
            f"--backbone {name}: needed are {width} features and a last map of as many channels, a "
            f"position for each 32, 16 or 8 px; of {side} px it makes "
            f"{' and '.join(map(str, shapes)) or 'nothing'}{remedy}"
        )


def synchronise_norm(model: nn.Module, name: str) -> None:
    """Let the batch norm of a model's layers be over all processes; `name` is its backbone's.

    Many of timm's are norm and activation in one, which torch's conversion would replace by the norm.
    """
    if name.startswith(TIMM):
        from timm.layers import convert_sync_batchnorm as convert
    else:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    convert(model)


def check_timm_name(name: str, source: str) -> None:
    """Raise MammoError that begins with `source` where timm has no network of that name and tag."""
    import timm

    arch, _, tag = name.partition(".")
    tags = [known.removeprefix(f"{arch}.") for known in timm.list_pretrained(f"{arch}.*")]
    if not timm.is_model(arch):
        near = nearest(arch, timm.list_models())
        raise MammoError(f"{source}: timm {timm.__version__} has none; nearest: {near}")
    if tag and tag not in tags:
        has = f"has weights {', '.join(tags)}" if tags else "has no weights"
        raise MammoError(f"{source}: timm {timm.__version__} {has} of {arch}")


def features_and_map(backbone: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, D) of views (B, 3, S, S), and what they sum up: (B, D, S/32, S/32)."""
    if not hasattr(backbone, "forward_features"):  # torchvision's end in `avgpool` and `fc`
        for layer in list(backbone.children())[:-2]:
            x = layer(x)
        return x.mean((2, 3)), x
    network: Any = backbone
    found = network.forward_features(x)
    features = network.forward_head(found)
    if found.ndim == 3:  # tokens: some for the whole, then one for each patch, row by row
        patches = found[:, network.num_prefix_tokens :].transpose(1, 2)
        found = patches.unflatten(2, (math.isqrt(patches.shape[2]), -1))
    finer = found.shape[-1] * STRIDE // x.shape[-1]
    return features, F.avg_pool2d(found, finer) if finer > 1 else found


def feature_map(backbone: nn.Module, x: Tensor) -> Tensor:
    """The map of features_and_map."""
    return features_and_map(backbone, x)[1]


def build_recorded(name: str, source: str | Path) -> nn.Module:
    """build_backbone for a name that a file records: the file is named where that can't be."""
    try:
        return build_backbone(name)
    except MammoError as error:
        raise MammoError(f"weights {source}: {error}") from error


# The first name in each part of a ResNet, by which weights are known; see part_names for other networks.
RESNET = ("conv1.weight", "bn1.weight", *(f"layer{number}.0.conv1.weight" for number in range(1, 5)))


def part_names(backbone: nn.Module) -> tuple[str, ...]:
    """The first name in each part of a network, without `fc`."""
    first: dict[str, str] = {}
    for name in backbone.state_dict():
        first.setdefault(name.split(".")[0], name)
    return tuple(name for part, name in first.items() if part != "fc")


def feature_width(backbone: nn.Module) -> int:
    """Number of features of a network without its classifier."""
    if hasattr(backbone, "num_features"):
        return int(backbone.num_features)  # type: ignore[arg-type]
    last = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    return last.num_features


def imagenet_state(name: str) -> dict[str, Tensor]:
    if name.startswith(TIMM):
        return timm_state(name)
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError as error:  # as of resnet18_slim
        raise MammoError(
            f"there are no ImageNet weights of {name}; give --weights none, or another --backbone"
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that drops packets must not hang the job
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except Exception as error:  # URLError, a wrong hash, and whatever a damaged file raises
        reason = str(error) or type(error).__name__
        raise MammoError(
            f"ImageNet weights of {name} are missing or damaged and can't be downloaded ({reason}).\n"
            f"  get:   {weights.url}\n"
            f"  put:   {file}\n"
            f"  or:    --weights PATH of that file, or --weights none to start from random weights"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def timm_state(name: str) -> dict[str, Tensor]:
    """The weights that timm has for a network, from the hub or its cache."""
    import timm

    try:
        return timm.create_model(name.removeprefix(TIMM), pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # no network, no weights, a damaged file: many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MammoError(
            f"trained weights of {name} can't be had ({reason}); give --weights PATH of a file of them, "
            "or --weights none to start from random weights"
        ) from error


def read_backbone_state(path: str | Path, names: Sequence[str] = ()) -> tuple[dict[str, Tensor], str]:
    """Backbone weights in torchvision names, without `fc`, and the architecture where it is recorded.

    `names`: part_names of the network that they are for; else those of the recorded one, or RESNET.
    Reads backbone.safetensors, a checkpoint of this script, or a state dict of anyone's, see
    find_backbone. Files are read with weights_only=True: nothing in them is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise MammoError(f"weights {path}: no such file (imagenet, none or a path)")
    if path.suffix == ".safetensors":
        try:
            data = path.read_bytes()  # safe_open takes no name that is not UTF-8
            content = from_safetensors(data)
            # The header: its length in 8 bytes, then JSON (https://github.com/huggingface/safetensors).
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            name = header.get("__metadata__", {}).get("backbone", "")
        except Exception as error:  # safetensors raises many kinds on damaged files
            raise MammoError(f"weights {path}: can't be read ({why_unreadable(error)})") from error
    else:
        content = read_archive(path, "weights")
        name = recorded_config(content).get("backbone", "")
    if not names:
        names = part_names(build_recorded(name, path)) if name else RESNET
    state = find_backbone(flatten(content), names, path)
    refuse_no_numbers(state, f"weights {path}")
    return state, name


def read_archive(path: str | Path, what: str) -> Any:
    """What torch.save wrote, in types that execute nothing. Raises MammoError, `what` names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MammoError(f"{what} {path}: no such file") from error
    except Exception as error:  # damaged archives raise many kinds
        raise MammoError(f"{what} {path}: can't be read ({why_unreadable(error)})") from error


def why_unreadable(error: Exception) -> str:
    """A line on an error of torch.load, whose own message is a page with colours."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        return (
            f"it holds {found[1] if found else 'Python objects'}, and nothing but tensors and plain "
            "types is read; save the weights alone: torch.save(model.state_dict(), FILE)"
        )
    return f"damaged, or not a file of weights: {type(error).__name__}"


def recorded_config(content: Any) -> dict[str, Any]:
    """The settings of a run in its checkpoint; empty where the checkpoint is none of this project's."""
    config = content.get("config") if isinstance(content, dict) else None
    needed = {"backbone", "hidden_dim", "proj_dim"}
    return config if isinstance(config, dict) and needed <= config.keys() else {}


def flatten(content: Any, prefix: str = "", depth: int = 8) -> dict[str, Tensor]:
    """The tensors in nested dicts, by their keys joined with dots: a dict around others is a prefix.

    Dicts below `depth` are left out: a stranger's may hold itself.
    """
    if isinstance(content, Tensor):
        return {prefix.removesuffix("."): content}
    parts = content.items() if isinstance(content, dict) and depth else ()
    found = [flatten(part, f"{prefix}{key}.", depth - 1) for key, part in parts]
    return {name: tensor for part in found for name, tensor in part.items()}


OWN = ("", "model_state_dict.backbone.")  # where this project keeps a backbone
# What the trained network is called where it stands beside its momentum copy: in MoCo's code
# (https://github.com/facebookresearch/moco), and in lightly's and this project's.
TRAINED = {"encoder_k": "encoder_q", "backbone_momentum": "backbone"}


def find_backbone(tensors: dict[str, Tensor], names: Sequence[str], path: Path) -> dict[str, Tensor]:
    """The one network among tensors by name that has `names` (see part_names), whatever stands before
    them; from where it is read is a note.

    Raises MammoError where there is none, or several and no convention says which of them is meant.
    """
    expected = names[:3]
    last = expected[-1]
    found = [name.removesuffix(last) for name in tensors if f".{name}".endswith(f".{last}")]
    found = [prefix for prefix in found if all(prefix + name in tensors for name in expected)]
    twins = {prefix: trained_twin(prefix) for prefix in found}
    prefixes = [prefix for prefix in found if twins[prefix] == prefix or twins[prefix] not in found]
    if not prefixes:
        raise MammoError(
            f"weights {path}: there is no such backbone in it; it holds {some(tensors) or 'no tensor'}, "
            f"expected is {some(expected)}, perhaps behind a prefix"
        )
    if len(prefixes) > 1:
        raise MammoError(
            f"weights {path}: there are several backbones in it, as {some(prefixes)}; save the one that "
            "you mean alone, by torch.save(ITS_STATE_DICT, FILE)"
        )
    own = {name[len(prefixes[0]) :]: v for name, v in tensors.items() if name.startswith(prefixes[0])}
    parts = {name.split(".")[0] for name in names}
    state = {name: value for name, value in own.items() if name.split(".")[0] in parts}
    others = [name for name in own if name not in state and not name.startswith("fc.")]
    if prefixes[0] not in OWN or others:
        rest = f"; not read: {some(others)}" if others else ""
        print(f"note: weights {path}: read from {some([prefixes[0] + names[0]])}{rest}", file=sys.stderr)
    return state


def trained_twin(prefix: str) -> str:
    """The prefix of the network that the one of this prefix is the momentum copy of, or this prefix."""
    return ".".join(TRAINED.get(word, word) for word in prefix.split("."))


def some(names: Iterable[str]) -> str:
    """Three of these names; no control character of a stranger's reaches the terminal."""
    names = list(names)
    return ", ".join(ascii(name)[1:-1] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def refuse_no_numbers(state: dict[str, Tensor], source: str) -> None:
    """Raise MammoError that names the first tensor with a value that is NaN or infinite."""
    for name, value in state.items():
        if not value.float().isfinite().all():
            raise MammoError(
                f"{source}: {name} holds NaN or infinite values: the training that wrote it had failed; "
                "take an earlier checkpoint"
            )


def load_backbone_state(backbone: nn.Module, state: dict[str, Tensor], source: str) -> None:
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        backbone.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise MammoError(
            f"weights {source} don't fit the backbone: {reason[:200]}; does --backbone match the file?"
        ) from error


def load_backbone(path: str | Path) -> nn.Module:
    """The trained backbone of a run as a torchvision ResNet in eval mode, `fc` an identity.

    `path`: backbone.safetensors, or any mammogram_byol_*.pth. Input (B, 3, H, W), standardised as
    make_view of the main script does: scaled to [0, 1] by the image's window, minus 0.449, over 0.226.
    """
    state, name = read_backbone_state(path)
    backbone = build_recorded(name or architecture(state), path)
    load_backbone_state(backbone, state, str(path))
    return backbone.eval()


def architecture(state: dict[str, Tensor]) -> str:
    """Which of the known ResNets a state dict belongs to, by its blocks."""
    if "layer1.0.conv3.weight" in state:
        return "resnet50"
    if state["conv1.weight"].shape[0] == SLIM_WIDTH:
        return "resnet18_slim"
    return "resnet34" if "layer1.2.conv1.weight" in state else "resnet18"


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write plain types and tensors for load_checkpoint. Raises MammoError where one is no number."""
    content = on_cpu(content)
    if not all_finite(content):
        raise MammoError(f"{path} is not written: its values are no numbers; the file before it stays")
    buffer = io.BytesIO()  # torch.save to a full disk would raise a RuntimeError that says nothing of it
    torch.save(content, buffer)
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def on_cpu(content: Any) -> Any:
    """Nested dicts and lists with their tensors on the CPU: plain torch.load then needs no GPU."""
    if isinstance(content, Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {key: on_cpu(part) for key, part in content.items()}
    return [on_cpu(part) for part in content] if isinstance(content, list | tuple) else content


def all_finite(content: Any) -> bool:
    """Whether no tensor in nested dicts and lists holds NaN or infinity."""
    if isinstance(content, Tensor):
        return bool(content.isfinite().all())
    parts = content.values() if isinstance(content, dict) else content
    return not isinstance(content, dict | list) or all(map(all_finite, parts))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, see read_archive. Raises MammoError where that can't be or weights are NaN."""
    content = read_archive(path, "checkpoint")
    if not isinstance(content, dict):
        raise MammoError(f"checkpoint {path}: can't be read (it holds no dict)")
    refuse_no_numbers(flatten(content.get("model_state_dict")), f"checkpoint {path}")
    return content


def note_changed_code(state: dict[str, Any], now: dict[str, str]) -> None:
    """Say so where a state was saved by other code of views and training than goes on now."""
    then = state.get("code", now)
    if then["training"] != now["training"]:
        print(
            f"note: the code of views and training has changed since this run was saved: commit "
            f"{then['commit'][:12]} then, {now['commit'][:12]} now",
            file=sys.stderr,
        )


def note_precision(state: dict[str, Any], precision: str) -> None:
    """Say on stderr that a state was saved in another precision than --precision auto gives here."""
    if state["precision"] != precision:
        print(
            f"note: saved in {state['precision']}, resumed in {precision}, as --precision auto chooses "
            "here: the weights will not be bit-equal",
            file=sys.stderr,
        )


def export_backbone(backbone: nn.Module, path: Path, name: str, grey: tuple[float, float]) -> None:
    """Write a backbone so that torchvision's model of that name loads it strictly, or timm's without
    classes (num_classes=0).

    torchvision's `fc` is written as zeros: BYOL has no ImageNet classes, and strict loading wants the
    keys. `grey`: mean and standard deviation by which its inputs are standardised.
    """
    state = {key: value.cpu().contiguous() for key, value in backbone.state_dict().items()}
    if not name.startswith(TIMM):
        zeros = torch.zeros(1000, feature_width(backbone))
        state |= {"fc.weight": zeros, "fc.bias": torch.zeros(1000)}
    metadata = {"backbone": name, "grey_mean": str(grey[0]), "grey_std": str(grey[1])}
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(to_safetensors(state, metadata))
