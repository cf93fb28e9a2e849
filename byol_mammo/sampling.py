"""Which tiles are seen when: orders that are spread evenly over images."""

from __future__ import annotations

import numpy as np
import pandas as pd


def split_monitor(image: np.ndarray, wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the training tiles and of at most `wanted` monitor tiles, spread over images, by the seed.

    The monitor tiles watch for collapse; they are left out of training unless there are so few tiles
    that a tenth of them would say nothing. `image` (N,): the image of each tile.
    """
    order = spread_over_images(image, np.random.default_rng([seed, 1]))
    count = min(wanted, len(image) // 10)
    if count < min(32, wanted):
        return np.arange(len(image)), np.sort(order[:wanted])
    return np.sort(order[count:]), np.sort(order[:count])


def appeal(tiles: pd.DataFrame) -> np.ndarray:
    """Rank of tiles among all in speck energy or convergence, whichever is higher: (N,), 0 to 1."""
    return tiles[["freq_energy", "convergence"]].rank(pct=True).max(axis=1).to_numpy()


def spread_over_images(
    image: np.ndarray, rng: np.random.Generator, rank: np.ndarray | None = None, share: float = 0
) -> np.ndarray:
    """A random order of tiles whose every prefix is spread evenly over their images.

    Where a `rank` (N,) is given, the tiles of an image follow it by `share`, and chance by the rest.
    """
    shuffled = rng.permutation(len(image))
    if rank is not None:
        chance = np.arange(len(image)) / len(image)
        key = (1 - share) * chance - share * rank[shuffled]
        shuffled = shuffled[np.argsort(key, kind="stable")]
    place = pd.Series(image[shuffled]).groupby(image[shuffled]).cumcount().to_numpy()
    return shuffled[np.lexsort((rng.random(len(image)), place))]


def epoch_order(
    tiles: pd.DataFrame,
    train_ids: np.ndarray,
    count: int,
    seed: int,
    epoch: int,
    energy_share: float = 0,
) -> np.ndarray:
    """Tile ids (count,) of an epoch in training order, all where `count` is 0, from (seed, epoch) alone.

    `tiles` has image and scores of each tile; `energy_share`: see ENERGY_SHARE.
    """
    rng = np.random.default_rng([seed, 2, epoch])
    seen = tiles.iloc[train_ids]
    rank = appeal(seen) if energy_share else None
    drawn = spread_over_images(seen["image"].to_numpy(), rng, rank, energy_share)[: count or None]
    return train_ids[rng.permutation(drawn)]
