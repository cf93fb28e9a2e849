"""What the view before photometry holds, cell by cell: targets that need no label."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol_mammo import structure
from byol_mammo.settings import MammoError

# What BYOL may ignore gets a target of its own: nothing in BYOL's loss asks for specks, which the blur
# of one view hides from the other. One number for a whole tile is learnt too slowly (few tiles hold
# specks, which are a thousandth of their pixels); one for each position of the last feature map is not.
SPECK_QUANTITIES = 3
SPECK_SURROUNDINGS = 33  # px, side of the square whose spread a speck is compared with
SPECK_TAPS = (0.054, 0.244, 0.404, 0.244, 0.054)  # Gaussian, 1 px of the view
FEATURE_STRIDE = 32  # px of the view for each position of a ResNet's last feature map
PROMINENCE_RANGE = (0.5, 8.0)  # local deviations; a speck of more is as clear as it can be
PLAIN_PROMINENCE = 3.0  # that plain tissue seldom reaches


def along_both_sides(matrix: Tensor, maps: Tensor) -> Tensor:
    """Maps (..., h, h) through a linear filter that is a matrix (n, h) along each side: (..., n, n).

    As products, since the library's filters of one channel take five to thirty times as long on a CPU.
    """
    return matrix @ maps @ matrix.mT


def as_matrix(taps: Tensor, length: int, mode: str) -> Tensor:
    """Matrix (length, length) of a filter by `taps` (an odd number), padded as F.pad's `mode` says."""
    padded = F.pad(torch.eye(length)[:, None], (len(taps) // 2,) * 2, mode=mode)
    return F.conv1d(padded, taps.view(1, 1, -1))[:, 0].mT.contiguous()


def gaussian(sigma: float, reach: int) -> Tensor:
    """Taps from -reach to reach, whose sum is 1."""
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return taps / taps.sum()


class SpeckMaps(nn.Module):
    """What the frequency target asks of each FEATURE_STRIDE px cell of views before photometry.

    Of (B, 1, S, S) in units of the window it makes (B, SPECK_QUANTITIES, S/32, S/32): 0 log of the
    cell's highest prominence, 1 its excess over PLAIN_PROMINENCE, 2 log of the mean curvature's
    deviation. Prominence is what frequency_energy adds up: the weaker of the two curvatures over the
    local deviation of the mean curvature, here at the scale of 3 px of the view.
    """

    kernel: Tensor
    around: Tensor

    def __init__(self, side: int) -> None:
        """`side` of the views in px."""
        super().__init__()
        taps = torch.tensor(SPECK_TAPS)
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)
        box = torch.full((SPECK_SURROUNDINGS,), 1 / SPECK_SURROUNDINGS)
        self.register_buffer("around", as_matrix(box, side, "replicate"), persistent=False)

    def forward(self, sharp: Tensor) -> Tensor:
        """Quantities of (B, 1, S, S) float32."""
        smooth = F.conv2d(F.pad(sharp, (3, 3, 3, 3), mode="replicate"), self.kernel)
        right, left, below, above = (
            smooth[:, :, 1:-1, 2:], smooth[:, :, 1:-1, :-2],
            smooth[:, :, 2:, 1:-1], smooth[:, :, :-2, 1:-1],
        )  # fmt: skip
        middle = smooth[:, :, 1:-1, 1:-1]
        across, down = right + left - 2 * middle, below + above - 2 * middle
        corners = (
            smooth[:, :, 2:, 2:] + smooth[:, :, :-2, :-2] - smooth[:, :, 2:, :-2] - smooth[:, :, :-2, 2:]
        )
        mean = (across + down) / 2
        weaker = -mean - torch.sqrt(((across - down) / 2) ** 2 + (corners / 4) ** 2)
        deviation = along_both_sides(self.around, mean**2).sqrt() + 2e-4  # the floor: rounding
        cells = -(-sharp.shape[-1] // FEATURE_STRIDE)
        prominence = F.adaptive_max_pool2d(weaker / deviation, cells).clamp(*PROMINENCE_RANGE)
        energy = F.adaptive_avg_pool2d(mean**2, cells)
        excess = (prominence - PLAIN_PROMINENCE).clamp_min(0)
        return torch.cat([prominence.log(), excess, (energy + 1e-7).log() / 2], dim=1)


class Head(nn.Module, ABC):
    """Tells from a view's last feature map what the view holds before photometry."""

    name: ClassVar[str]  # of the module in an objective and of its part of a run's state
    metric: ClassVar[str]  # column of metrics.csv
    title: ClassVar[str]  # of its curve

    @abstractmethod
    def loss(self, found: Tensor, sharp: Tensor) -> Tensor:
        """The error for a feature map (B, input_dim, f, f) and its sharp view (B, 1, S, S): a scalar."""


class SpeckHead(Head, nn.Conv2d):
    """The frequency target: a linear head that finds each cell's specks.

    Its loss is the squared error, summed over the quantities, of the standardised SpeckMaps.
    """

    name, metric = "speck_head", "freq_loss"
    title = f"frequency loss (starts near {SPECK_QUANTITIES})"
    mean: Tensor
    deviation: Tensor

    def __init__(self, sample: Tensor, input_dim: int) -> None:
        """`sample` (N, 1, S, S): sharp plain views, which scale the quantities."""
        nn.Conv2d.__init__(self, input_dim, SPECK_QUANTITIES, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.maps = SpeckMaps(sample.shape[-1])
        quantities = torch.cat([self.maps(part) for part in sample.split(32)])
        deviation = quantities.std((0, 2, 3), keepdim=True).clamp_min(0.05)
        self.register_buffer("mean", quantities.mean((0, 2, 3), True), persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    @torch.no_grad()
    def targets(self, sharp: Tensor) -> Tensor:
        """Standardised SpeckMaps (B, SPECK_QUANTITIES, S/32, S/32), in fp32 also under autocast."""
        with torch.autocast(sharp.device.type, enabled=False):
            return (self.maps(sharp) - self.mean) / self.deviation

    def loss(self, found: Tensor, sharp: Tensor) -> Tensor:
        """See Head.loss."""
        return SPECK_QUANTITIES * F.mse_loss(self(found).float(), self.targets(sharp))


# What a mass is to its surroundings, in mm; the tiles' convergence is two of these discs.
DISC_RADII = (2.0, 3.2, 5.0, 7.0, 10.0, 13.0)  # mm, of the discs that gradients converge over
BLOB_SIGMAS = (0.8, 1.6, 3.0, 6.0)  # mm, of a blob's inner Gaussian; the outer one has 1.6 times it
# mm, about: sides of the cells whose strongest structure is asked for, beside that of the whole view.
STRUCTURE_CELLS = (9.0, 17.0)
STRUCTURE_QUANTITIES = len(DISC_RADII) + 2 * len(BLOB_SIGMAS)
MIN_STRUCTURE_SIDE = 20.0  # mm of a view below which it has no room for such structure
STRUCTURE_HIDDEN = 256  # units of the head


class StructureMaps(nn.Module):
    """Mass-scale structure of views before photometry, place by place.

    Of (B, 1, S, S) in units of the window it makes (B, STRUCTURE_QUANTITIES, h, h): convergence over
    discs of DISC_RADII, defined as in byol_mammo/structure.py, then bright and dark blobs (Marr and
    Hildreth 1980: differences of Gaussians, over the spread of the view's tissue). 0 where nothing
    counts: near the skin, and where more than half of a disc lies beyond the view.
    """

    smooth: Tensor
    discs: Tensor
    counts: Tensor
    blurs: Tensor

    def __init__(self, side: int, step_mm: float) -> None:
        """`side` of the views in px of `step_mm`."""
        super().__init__()
        self.factor, self.pool = structure.reductions(step_mm)
        grid = step_mm * self.factor
        self.margin = max(1, round(structure.SKIN / (self.pool * grid)))
        length = side // (self.pool * self.factor)
        sigma = structure.SMOOTHING / grid
        taps = gaussian(sigma, math.ceil(3 * sigma))
        smooth = as_matrix(taps, length * self.pool, "reflect")
        self.register_buffer("smooth", smooth, persistent=False)
        step = self.pool * grid
        kernels = [torch.from_numpy(structure.disc_kernels(radius / step)) for radius in DISC_RADII]
        reach = max(kernel.shape[-1] for kernel in kernels) // 2
        # All in one, since it takes less than half as long as six convolutions of one channel.
        discs = torch.stack([F.pad(disc, (reach - disc.shape[-1] // 2,) * 4) for disc in kernels])
        self.register_buffer("discs", discs, persistent=False)
        share = discs.norm(dim=1, keepdim=True)
        inside = F.conv2d(torch.ones(1, 1, length, length), share, padding="same") >= 0.5
        self.register_buffer("counts", inside, persistent=False)
        sigmas = [s / step for sigma in BLOB_SIGMAS for s in (sigma, 1.6 * sigma)]
        # To 5 sigma: numbers near the smallest there are take a CPU ten times as long.
        reaches = [min(length - 1, math.ceil(5 * sigma)) for sigma in sigmas]
        blurs = torch.stack(
            [
                as_matrix(gaussian(sigma, reach), length, "constant")
                for sigma, reach in zip(sigmas, reaches, strict=True)
            ]
        )
        self.register_buffer("blurs", blurs / blurs.sum(2, keepdim=True), persistent=False)

    def forward(self, sharp: Tensor) -> Tensor:
        """Maps of (B, 1, S, S) float32."""
        length = self.pool * self.factor * self.blurs.shape[-1]
        sharp = sharp[:, :, :length, :length]
        tissue, cover = sharp, (sharp > 0).to(sharp.dtype)
        if self.factor > 1:
            tissue, cover = (F.avg_pool2d(x, self.factor) for x in (tissue, cover))
        area = cover.sum((1, 2, 3), keepdim=True).clamp_min(1)
        mean = tissue.sum((1, 2, 3), keepdim=True) / area
        # Air is filled with the mean of the tissue, which is taken off: small numbers lose less in TF32.
        filled = tissue - cover * mean
        bare = (F.avg_pool2d(cover, self.pool) <= 0.5).to(sharp.dtype)
        side = 2 * self.margin + 1
        counts = F.max_pool2d(bare, side, stride=1, padding=self.margin) == 0
        spread = ((filled**2).sum((1, 2, 3), keepdim=True) / area).sqrt() + 1e-3
        blobs = self.blobs(F.avg_pool2d(filled, self.pool)) / spread
        gradients = F.avg_pool2d(self.unit_gradients(filled, mean), self.pool) * counts
        converging = F.conv2d(gradients, self.discs, padding="same")
        return torch.cat([converging * self.counts, blobs, -blobs], dim=1) * counts

    def unit_gradients(self, filled: Tensor, mean: Tensor) -> Tensor:
        """x and y of the directions in which (B, 1, h, w) rises: (B, 2, h, w)."""
        smooth = F.pad(along_both_sides(self.smooth, filled), (1,) * 4, mode="reflect")
        left, right, above, below = (
            smooth[..., :-2], smooth[..., 2:], smooth[..., :-2, :], smooth[..., 2:, :]
        )  # fmt: skip
        x, y = right - left, below - above
        x = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
        y = y[..., :-2] + 2 * y[..., 1:-1] + y[..., 2:]
        steepness = torch.hypot(x, y) + 1e-5 * mean + 1e-12
        return torch.cat([x / steepness, y / steepness], dim=1)

    def blobs(self, grey: Tensor) -> Tensor:
        """Differences of Gaussians of (B, 1, h, w): (B, len(BLOB_SIGMAS), h, w)."""
        blurred = along_both_sides(self.blurs, grey)
        return blurred[:, ::2] - blurred[:, 1::2]


class StructureHead(Head):
    """The structure target: a small head for each size of cells tells their strongest StructureMaps.

    Its loss is the mean smooth L1 error, standardised by a sample that stays in a run's state.
    """

    name, metric = "structure_head", "structure_loss"
    title = "structure loss (starts near 0.4)"

    def __init__(self, sample: Tensor, input_dim: int, step_mm: float) -> None:
        """`sample` (N, 1, S, S): sharp plain views with px of `step_mm`."""
        super().__init__()
        side = sample.shape[-1]
        if side * step_mm < MIN_STRUCTURE_SIDE:
            raise MammoError(
                f"views of {side * step_mm:.0f} mm have no room for structure at the scale of masses "
                f"({MIN_STRUCTURE_SIDE:.0f} mm at least): raise --tile_size, correct "
                "--pixel_spacing_mm, or give --structure_loss_weight 0"
            )
        self.maps = StructureMaps(side, step_mm)
        features = -(-side // FEATURE_STRIDE)
        wanted = (max(1, min(features, round(side * step_mm / cell))) for cell in STRUCTURE_CELLS)
        # Along a side of the view. The last is the whole view, told from the features as they are
        # used: they alone gained .007 of the masses' AUROC by it (docs/measured.md).
        self.cells = list(dict.fromkeys([*wanted, 1]))
        self.tellers = nn.ModuleList()
        for index, cells in enumerate(self.cells):
            last = nn.Conv2d(STRUCTURE_HIDDEN, STRUCTURE_QUANTITIES, 1)
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            self.tellers.append(
                nn.Sequential(nn.Conv2d(input_dim, STRUCTURE_HIDDEN, 1), nn.ReLU(), last)
            )
            found = torch.cat([F.adaptive_max_pool2d(self.maps(x), cells) for x in sample.split(32)])
            self.register_buffer(f"mean{index}", found.mean((0, 2, 3), keepdim=True))
            deviation = found.std((0, 2, 3), keepdim=True).clamp_min(0.02)
            self.register_buffer(f"deviation{index}", deviation)
            # As a product, since the pooling of the library has no deterministic gradient on a GPU.
            pooling = F.adaptive_avg_pool2d(torch.eye(features)[None], (cells, features))[0]
            self.register_buffer(f"pooling{index}", pooling, persistent=False)

    def forward(self, found: Tensor) -> list[Tensor]:
        """What a feature map (B, input_dim, f, f) tells of each size of cells: (B, quantities, n, n)."""
        poolings = [self.get_buffer(f"pooling{index}") for index in range(len(self.cells))]
        return [
            teller(pooling @ found @ pooling.T)
            for teller, pooling in zip(self.tellers, poolings, strict=True)
        ]

    @torch.no_grad()
    def targets(self, sharp: Tensor) -> list[Tensor]:
        """Standardised strongest structure of each cell, in fp32 also under autocast."""
        with torch.autocast(sharp.device.type, enabled=False):
            maps = self.maps(sharp)
            return [
                (F.adaptive_max_pool2d(maps, cells) - self.get_buffer(f"mean{index}"))
                / self.get_buffer(f"deviation{index}")
                for index, cells in enumerate(self.cells)
            ]

    def loss(self, found: Tensor, sharp: Tensor) -> Tensor:
        """See Head.loss."""
        pairs = zip(self(found), self.targets(sharp), strict=True)
        return torch.stack([F.smooth_l1_loss(told.float(), wanted) for told, wanted in pairs]).mean()

    @torch.no_grad()
    def shown(self, found: Tensor, sharp: Tensor) -> list[Tensor]:
        """Strongest convergence over the discs of masses for a picture, each (B, n, n): at each place,
        in each of the finest cells, and in those as the head tells it."""
        shown = slice(DISC_RADII.index(5.0), len(DISC_RADII))  # smaller ones find some in every cell
        maps = self.maps(sharp)
        cells = F.adaptive_max_pool2d(maps, self.cells[0])
        told = self(found)[0] * self.get_buffer("deviation0") + self.get_buffer("mean0")
        return [part[:, shown].amax(1) for part in (maps, cells, told)]
