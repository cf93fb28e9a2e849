"""Checkpoints as plain types, and backbone weights from anywhere."""

from __future__ import annotations

import io
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from byol_mammo import files
from byol_mammo.settings import MammoError


def build_backbone(name: str = "resnet50", weights: str = "none") -> nn.Module:
    """A torchvision ResNet without its fully connected layer: (B, 3, H, W) -> (B, 512 or 2048).

    `weights`: imagenet, none, or a file (state dict, checkpoint of this script, safetensors).
    Raises MammoError with the remedy where weights can't be had or don't fit.
    """
    backbone = torchvision.models.get_model(name, weights=None)
    backbone.fc = nn.Identity()
    if weights == "imagenet":
        load_backbone_state(backbone, imagenet_state(name), "imagenet")
    elif weights != "none":
        load_backbone_state(backbone, read_backbone_state(weights)[0], weights)
    return backbone


def feature_width(backbone: nn.Module) -> int:
    """Number of features of a ResNet without its fully connected layer."""
    last = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    return last.num_features


def imagenet_state(name: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(name).DEFAULT
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


def read_backbone_state(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Backbone weights in torchvision names, without `fc`, and the architecture where it is recorded.

    Reads backbone.safetensors, a checkpoint of this script, or a plain state dict. Files are read with
    weights_only=True: nothing in them is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise MammoError(f"weights {path}: no such file (imagenet, none or a path)")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                name = (file.metadata() or {}).get("backbone", "")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            name = content.get("config", {}).get("backbone", "")
            state = content.get("model_state_dict", content.get("state_dict", content))
        if any(key.startswith("backbone.") for key in state):
            prefix = "backbone."
            state = {key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)}
        return {key: v for key, v in state.items() if not key.startswith("fc.")}, name
    except Exception as error:  # torch and safetensors raise many kinds on damaged files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise MammoError(f"weights {path}: can't be read ({reason})") from error


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
    name = name or architecture(state)
    if name not in torchvision.models.list_models():
        raise MammoError(f"weights {path}: torchvision has no model {name!r}")
    backbone = build_backbone(name)
    load_backbone_state(backbone, state, str(path))
    return backbone.eval()


def architecture(state: dict[str, Tensor]) -> str:
    """Which of the known ResNets a state dict belongs to, by its blocks."""
    if "layer1.0.conv3.weight" in state:
        return "resnet50"
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
    """Read a checkpoint with weights_only=True. Raises MammoError where it is missing or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MammoError(f"checkpoint {path}: no such file") from error
    except Exception as error:  # damaged archives raise many kinds
        raise MammoError(f"checkpoint {path}: can't be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise MammoError(f"checkpoint {path}: can't be read (it holds no dict)")
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
    """Write a backbone so that torchvision's model of that name loads it strictly.

    `fc` is written as zeros: BYOL has no ImageNet classes, and strict loading wants the keys. `grey`:
    mean and standard deviation by which its inputs are standardised.
    """
    state = {key: value.cpu().contiguous() for key, value in backbone.state_dict().items()}
    state |= {"fc.weight": torch.zeros(1000, feature_width(backbone)), "fc.bias": torch.zeros(1000)}
    metadata = {"backbone": name, "grey_mean": str(grey[0]), "grey_std": str(grey[1])}
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(to_safetensors(state, metadata))
