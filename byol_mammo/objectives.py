"""What an objective must tell the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ParameterGroup(NamedTuple):
    """Modules that the optimiser trains alike."""

    modules: list[nn.Module]
    lr_factor: float = 1.0  # of the learning rate
    decays: bool = True  # weight decay, but for biases and norm parameters
    rests: bool = False  # stands still in WARMUP_FROZEN_STEPS


class Objective(nn.Module, ABC):
    """What a step minimises, as one module: DistributedDataParallel wants a single forward per step."""

    # Title of the curve of each metric of its own; metrics.csv has a column for each.
    curves: ClassVar[dict[str, str]] = {"loss": "loss"}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def trained(self) -> list[ParameterGroup]:
        """What the optimiser gets; all other parameters are frozen."""

    @abstractmethod
    def forward(self, views: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and scalars by name: `feature_std` and those of `curves`, detached.

        `views` has one View for each of VIEWS.
        """

    def after_step(self, step: int, total_steps: int) -> dict[str, float]:
        """What follows the optimiser's step number `step`, counted from 0; returns metrics by name."""
        return {}

    def describe(self, total_steps: int) -> str:
        """What a run of so many steps minimises, in a line for people."""
        return type(self).__name__

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, input_dim) where collapse is judged: the spread of what this returns (B, D)."""
        return features

    def own_state(self) -> dict[str, Tensor]:
        """What a resumption needs beyond the model."""
        return {name: v for name, v in self.state_dict().items() if not name.startswith("model.")}


def feature_std(features: Tensor) -> Tensor:
    """Mean standard deviation of L2-normalised features (B, D), times sqrt(D): 1 = isotropic, 0 = one
    point (Chen & He 2021, SimSiam, section 4.1)."""
    normalised = F.normalize(features.float(), dim=1)
    return normalised.std(0).mean() * features.shape[1] ** 0.5


def rankme(features: Tensor) -> Tensor:
    """Effective rank of features (B, D): exp of the entropy of the singular values (Garrido 2023)."""
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return torch.exp(-(share * share.log()).sum())
