"""What an objective must tell the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from byol_mammo.lightly_parts import VICRegLoss, gather, invariance_loss, variance_loss


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


class VICReg(VICRegLoss):
    """lightly's VICRegLoss without the mask by which it picks what is off the covariance's diagonal.

    How many a mask picks the GPU alone knows: the host would wait for it.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of projections (B, D) of two views, variance and covariance over all ranks."""
        agreement = invariance_loss(z_a, z_b)
        if self.gather_distributed and distributed.is_initialized():
            z_a, z_b = torch.cat(gather(z_a)), torch.cat(gather(z_b))
        spread = 0.5 * (variance_loss(z_a, self.eps) + variance_loss(z_b, self.eps))
        shared = covariance_loss(z_a) + covariance_loss(z_b)
        return self.lambda_param * agreement + self.mu_param * spread + self.nu_param * shared


def covariance_loss(x: Tensor) -> Tensor:
    """Squares of the covariance of (B, D) off its diagonal, over D (eq. 4 of Bardes et al. 2022)."""
    x = x - x.mean(dim=0)
    covariance = torch.einsum("bc,bd->cd", x, x) / (len(x) - 1)
    dim = len(covariance)
    # Without the last element, rows of dim + 1 begin with the diagonal.
    others = covariance.flatten()[:-1].view(dim - 1, dim + 1)[:, 1:].flatten()
    return others.square().sum() / dim


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
