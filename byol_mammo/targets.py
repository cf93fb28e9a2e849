"""What the view before photometry holds, cell by cell: targets that need no label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What BYOL may ignore gets a target of its own: nothing in BYOL's loss asks for specks, which the blur
# of one view hides from the other. One number for a whole tile is learnt too slowly (few tiles hold
# specks, which are a thousandth of their pixels); one for each position of the last feature map is not.
SPECK_QUANTITIES = 3
SPECK_TAPS = (0.054, 0.244, 0.404, 0.244, 0.054)  # Gaussian, 1 px of the view
FEATURE_STRIDE = 32  # px of the view for each position of a ResNet's last feature map
PROMINENCE_RANGE = (0.5, 8.0)  # local deviations; a speck of more is as clear as it can be
PLAIN_PROMINENCE = 3.0  # that plain tissue seldom reaches


def speck_targets(sharp: Tensor, taps: Tensor) -> Tensor:
    """What the frequency target asks of each FEATURE_STRIDE px cell of views before photometry.

    `sharp` (B, 1, S, S) in units of the window, `taps` SPECK_TAPS on its device ->
    (B, SPECK_QUANTITIES, S/32, S/32): 0 log of the cell's highest prominence, 1 its excess over
    PLAIN_PROMINENCE, 2 log of the mean curvature's deviation. Prominence is what frequency_energy adds
    up: the weaker of the two curvatures over the local deviation of the mean curvature, here at the
    scale of 3 px of the view.
    """
    kernel = torch.outer(taps, taps)[None, None]
    smooth = F.conv2d(F.pad(sharp, (3, 3, 3, 3), mode="replicate"), kernel)
    right, left, below, above = (
        smooth[:, :, 1:-1, 2:], smooth[:, :, 1:-1, :-2], smooth[:, :, 2:, 1:-1], smooth[:, :, :-2, 1:-1]
    )  # fmt: skip
    middle = smooth[:, :, 1:-1, 1:-1]
    across, down = right + left - 2 * middle, below + above - 2 * middle
    corners = (
        smooth[:, :, 2:, 2:] + smooth[:, :, :-2, :-2] - smooth[:, :, 2:, :-2] - smooth[:, :, :-2, 2:]
    )
    mean = (across + down) / 2
    weaker = -mean - torch.sqrt(((across - down) / 2) ** 2 + (corners / 4) ** 2)
    around = F.pad(mean**2, (16, 16, 16, 16), mode="replicate")
    around = F.avg_pool2d(F.avg_pool2d(around, (33, 1), stride=1), (1, 33), stride=1)
    deviation = around.sqrt() + 2e-4  # the floor stands for rounding
    cells = -(-sharp.shape[-1] // FEATURE_STRIDE)
    prominence = F.adaptive_max_pool2d(weaker / deviation, cells).clamp(*PROMINENCE_RANGE)
    energy = F.adaptive_avg_pool2d(mean**2, cells)
    excess = (prominence - PLAIN_PROMINENCE).clamp_min(0)
    return torch.cat([prominence.log(), excess, (energy + 1e-7).log() / 2], dim=1)
