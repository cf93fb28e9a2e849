"""`--backbone slim`: a torchvision ResNet of four blocks and 100,000 parameters, for tests.

Importing this module tells torchvision and train_byol_mammo.py of it. What a test learns from it holds
for ResNet-18 too, whose 11 million parameters would be written to disk in every checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet

import train_byol_mammo as mammo

NAME = "slim"
WIDTH = 64  # features


class SlimResNet(ResNet):
    """A ResNet with an eighth of the channels behind its first layer."""

    def _make_layer(self, block: Any, planes: int, blocks: int, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, blocks, **options)


@register_model(NAME)
def slim(*, weights: None = None) -> ResNet:
    """The network as torchvision gives it; it has no trained weights."""
    assert weights is None
    network = SlimResNet(BasicBlock, [1, 1, 1, 1])
    network.fc = nn.Linear(WIDTH, 1000)
    return network


mammo.CHOICES["backbone"] += (NAME,)
