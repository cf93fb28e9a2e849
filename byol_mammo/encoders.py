"""Frozen baselines that saw no mammogram: networks of timm as they were trained, and classic filters.

Each is a module whose get_features makes (B, D) of sharp plain views (B, 1, S, S), 0 to 1 in the image's
window, and so brings its own standardisation and its own size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol_mammo import checkpoints, targets
from byol_mammo.checkpoints import TIMM
from byol_mammo.settings import MammoError

CLASSIC = "classic"  # the name of the filters among what is compared
UNTRAINED = "none"  # in place of a file of weights


def is_foreign(start: str) -> bool:
    """Whether what is compared is none of this project's backbones."""
    return start == CLASSIC or start.startswith(TIMM)


class Spec(NamedTuple):
    """What timm:NAME[=WEIGHTS] says."""

    text: str
    name: str  # of timm, perhaps with a tag behind a dot
    weights: str  # a file, none, or empty = those that timm downloads


def parse(text: str) -> Spec:
    """Read timm:NAME[=WEIGHTS]. Raises MammoError."""
    found = re.fullmatch(rf"{TIMM}([^=]+)(?:=(.+))?", text)
    if not found:
        raise MammoError(
            f"--encoders {text}: not timm:NAME or timm:NAME=WEIGHTS, WEIGHTS being a file or none; what "
            "is no network of timm stands before --encoders"
        )
    return Spec(text, found[1], found[2] or "")


def config_of(name: str) -> Any:
    """What timm knows of a network and the weights that its tag names: a PretrainedCfg."""
    import timm

    return timm.get_pretrained_cfg(name)


def check(spec: Spec) -> str:
    """Where the weights of an encoder come from, without reading them, for a person.

    Raises MammoError where timm has no such network, where the file is missing, or where its weights
    may want one standardisation or another.
    """
    import timm  # takes seconds

    checkpoints.check_timm_name(spec.name, f"encoder {spec.text}")
    if spec.weights == UNTRAINED:
        return "untrained"
    if not spec.weights:
        return f"{config_of(spec.name).tag} of timm, from its cache or the internet"
    if not Path(spec.weights).is_file():
        raise MammoError(f"encoder {spec.text}: no such file {spec.weights}")
    tags = [] if "." in spec.name else timm.list_pretrained(f"{spec.name}.*")
    inputs: dict[Any, str] = {}
    for tag in tags:
        found = config_of(tag)
        inputs.setdefault((found.mean, found.std), tag)
    if len(inputs) > 1:
        raise MammoError(
            f"encoder {spec.text}: timm standardises the inputs of {' and of '.join(inputs.values())} "
            f"differently; name the weights that the file holds: {TIMM}NAME.TAG={spec.weights}"
        )
    return spec.weights


def whose(start: str) -> str:
    """Whose weights a start has, without reading them. Raises MammoError as check does."""
    return ClassicFilters.weights if start == CLASSIC else check(parse(start))


class Encoder(nn.Module):
    """A network of timm on grey views, resized to `side` px and standardised as it was trained.

    `weights` tells a reader of a table whose they are.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, view_side: int, weights: str) -> None:
        """`network`: (B, 3, H, W) -> (B, D). Raises MammoError where it takes no size that it should."""
        from timm.data import resolve_model_data_config

        super().__init__()
        inputs = resolve_model_data_config(network)
        for name, values in (("mean", inputs["mean"]), ("deviation", inputs["std"])):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.mode = "bilinear" if inputs["interpolation"] == "bilinear" else "bicubic"
        self.network, self.weights = network, weights
        self.side = fitting_side(network, view_side, inputs["input_size"][-1])

    @property
    def backbone(self) -> nn.Module:
        """What batch norm statistics are set in: sharp views (B, 3, S, S) -> (B, D)."""
        return self

    def forward(self, sharp: Tensor) -> Tensor:
        """Features (B, D)."""
        if sharp.shape[-1] != self.side:
            size = (self.side, self.side)
            sharp = F.interpolate(sharp, size, mode=self.mode, align_corners=False, antialias=True)
        return self.network((sharp - self.mean) / self.deviation)

    def get_features(self, sharp: Tensor) -> Tensor:
        """Features (B, D) of grey views (B, 1, S, S)."""
        return self(sharp.expand(-1, 3, -1, -1))


def fitting_side(network: nn.Module, view_side: int, own: int) -> int:
    """Side in px of the views that a network gets: theirs, at most a patch larger, else its `own`.

    Views keep their size wherever a network can take it, so that all see the same detail. Raises
    MammoError where it takes neither, or makes something else than a row of features.
    """
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))[0]
    shape: tuple[int, ...] = ()
    for side in (-(-view_side // patch) * patch, own):
        try:
            with torch.inference_mode():
                shape = tuple(network.eval()(torch.zeros(1, 3, side, side)).shape)
        except (RuntimeError, AssertionError, ValueError):  # of a fixed size, or too small a view
            continue
        if len(shape) == 2:
            return side
    raise MammoError(f"it makes {shape or 'nothing'} of a view, not a row of features")


def open_encoder(text: str, view_side: int, seed: int) -> Encoder:
    """The frozen network that timm:NAME[=WEIGHTS] names, for views of `view_side` px, in eval mode.

    `seed` is that of weights which are not trained. Raises MammoError with the remedy where the weights
    can't be had or don't fit.
    """
    spec = parse(text)
    check(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, weights = build(spec)
    try:
        return Encoder(network, view_side, weights).eval()
    except MammoError as error:
        raise MammoError(f"encoder {text}: {error}") from error


def build(spec: Spec) -> tuple[nn.Module, str]:
    """The network without its classifier, and whose weights it has."""
    if spec.weights == UNTRAINED:
        return create(spec, num_classes=0), "untrained"
    if not spec.weights:
        return downloaded(spec)
    names = checkpoints.part_names(create(spec))
    state, ours = checkpoints.read_backbone_state(spec.weights, names)
    if ours:
        raise MammoError(
            f"encoder {spec.text}: {spec.weights} was trained here, on views standardised otherwise; "
            "name it before --encoders"
        )
    return with_state(spec, state), Path(spec.weights).name


def create(spec: Spec, **options: Any) -> nn.Module:
    """timm's network, a transformer for views of any size where it can be."""
    import timm

    try:
        return timm.create_model(spec.name, dynamic_img_size=True, **options)
    except TypeError:
        return timm.create_model(spec.name, **options)


def with_state(spec: Spec, state: dict[str, Tensor]) -> nn.Module:
    """The network with weights in timm's or their author's names, each of which must fit.

    timm loads strictly only where the number of classes is that of the file; so it is given that, and
    the classifier goes afterwards.
    """
    classifier = config_of(spec.name).classifier or ""
    last = classifier if isinstance(classifier, str) else classifier[0]
    classes = len(state.get(f"{last}.weight", ()))
    overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0}
    try:
        network: Any = create(spec, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except Exception as error:  # what timm's own conversions raise on weights of another network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MammoError(f"encoder {spec.text}: its weights don't fit: {reason}") from error
    network.pretrained_cfg.pop("state_dict")  # a second copy
    network.reset_classifier(0)
    return network


def downloaded(spec: Spec) -> tuple[nn.Module, str]:
    """The network with the weights that timm has, from the hub or its cache, and their tag."""
    known = config_of(spec.name)
    if not known.has_weights:
        raise MammoError(f"encoder {spec.text}: timm has no weights of it; give a file, or ={UNTRAINED}")
    try:
        return create(spec, pretrained=True, num_classes=0), known.tag
    except Exception as error:  # no network, no such tag, a damaged file: many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        file = known.hf_hub_filename or "model.safetensors"
        address = f"https://huggingface.co/{known.hf_hub_id}/resolve/main/{file}"
        raise MammoError(
            f"encoder {spec.text}: its weights can't be downloaded ({reason}).\n"
            f"  get:   {address if known.hf_hub_id else known.url}, where there is internet\n"
            f"  give:  {TIMM}{known.architecture}.{known.tag}=PATH of that file"
        ) from error


class ClassicFilters(nn.Module):
    """Convergence and blobs (targets.StructureMaps) and specks of a view, strongest and mean.

    Nothing learns.
    """

    weights = "nothing learns"

    def __init__(self, side: int, step_mm: float) -> None:
        """`side` of the views in px of `step_mm`."""
        super().__init__()
        self.side, self.maps = side, targets.StructureMaps(side, step_mm)
        self.specks = targets.SpeckMaps(side)

    @property
    def backbone(self) -> nn.Module:
        """As of an Encoder."""
        return self

    def get_features(self, sharp: Tensor) -> Tensor:
        """Features (B, D) of grey views (B, 1, S, S), in fp32 also under autocast."""
        with torch.autocast(sharp.device.type, enabled=False):
            found = self.maps(sharp), self.specks(sharp)
            return torch.cat([part for x in found for part in (x.amax((2, 3)), x.mean((2, 3)))], dim=1)
