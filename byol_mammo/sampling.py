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


def spread_over_images(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of tiles whose every prefix is spread evenly over their images."""
    shuffled = rng.permutation(len(image))
    rank = pd.Series(image[shuffled]).groupby(image[shuffled]).cumcount().to_numpy()
    return shuffled[np.lexsort((rng.random(len(image)), rank))]


def epoch_order(
    image: np.ndarray, train_ids: np.ndarray, count: int, seed: int, epoch: int
) -> np.ndarray:
    """Tile ids (count,) of an epoch in training order, all where `count` is 0, from (seed, epoch) alone.

    `image` (N,): the image of each tile.
    """
    rng = np.random.default_rng([seed, 2, epoch])
    drawn = spread_over_images(image[train_ids], rng)[: count or None]
    return train_ids[rng.permutation(drawn)]
