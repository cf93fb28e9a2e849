"""A finished pixel cache: whether it is whole, what it was made by, its averaged copy."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from filelock import FileLock

from byol_mammo import files


def library_versions() -> dict[str, str]:
    """Versions of what decodes and filters pixels: others may give masks and tiles that differ."""
    return {"opencv": cv2.__version__, "scikit-image": metadata.version("scikit-image")}


def note_other_versions(cache: Path) -> None:
    """Say so where a cache was made by other versions of OpenCV or scikit-image than are here."""
    made = json.loads((cache / "cache.json").read_text()).get("versions", {})
    other = [
        f"{name} {made[name]} (here {version})"
        for name, version in library_versions().items()
        if made.get(name, version) != version
    ]
    if other:
        print(
            f"note: {cache} was made by {', '.join(other)}: its masks and tiles may differ a little "
            "from what would be made here; move it away to make it anew",
            file=sys.stderr,
        )


def note_other_code(final: Path, inputs: dict[str, Any]) -> None:
    """Say so where the same images have a cache with the same settings, made by other code."""
    for path in final.parent.glob("[!.]*/cache.json"):
        with suppress(OSError, ValueError, KeyError):  # a damaged cache tells nothing
            other = json.loads(path.read_text())["inputs"]
            if all(other[name] == inputs[name] for name in ("settings", "files")):
                print(
                    f"note: the code that makes masks, tiles and pixels has changed since {path.parent} "
                    f"was made: extracting into {final}",
                    file=sys.stderr,
                )


def is_finished(cache: Path) -> bool:
    """Whether a cache is complete: all its files are there and as long as they were written."""
    try:
        sizes = json.loads((cache / "cache.json").read_text())["sizes"]
        return all((cache / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def cache_digest(cache: Path) -> str:
    """SHA-256 of what was cached: the tables of tiles and of images, whose offsets follow no order.

    A run may go on with any cache that has its digest, wherever the images lie by now.
    """
    images = pd.read_csv(cache / "images.csv", dtype=str, keep_default_na=False).drop(columns="offset")
    tables = (cache / "tiles.csv").read_bytes() + images.to_csv(index=False).encode()
    return hashlib.sha256(tables).hexdigest()


def changed_tiles(state: dict[str, Any], cache: Path, digest: str) -> list[str]:
    """What to say where a saved state saw other tiles than a cache's; empty where it saw them."""
    former = cache.with_name(state["cache_key"])
    seen = state.get("cached")
    if seen is None and is_finished(former):  # until 2026-11-26 a state named its cache alone
        seen = cache_digest(former)
    if seen is None:
        return [f"perhaps the tiles, since its cache {former} is gone"]
    return [] if seen == digest else ["the images, their tile settings or the tile code"]


# ---- Averaged copy: part of a cache's key ------------------------------------------------------------


def reduced_layout(images: pd.DataFrame, reduce: int) -> tuple[np.ndarray, np.ndarray]:
    """Height and width (N, 2) and offset (N,) of each image's pixels, averaged where `reduce` > 1."""
    shape = -(-images[["height", "width"]].to_numpy() // reduce)
    if reduce == 1:
        return shape, images["offset"].to_numpy()
    return shape, np.cumsum(shape.prod(1)) - shape.prod(1)


def block_average(pixels: np.ndarray, side: int) -> np.ndarray:
    """Means of (H, W) over blocks of that side, float32; beyond the image lies 0, as for every view."""
    height, width = (-(-length // side) for length in pixels.shape)
    padded = np.zeros((height * side, width * side), np.float32)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA)


def open_reduced(
    cache: Path, pixels: np.ndarray, images: pd.DataFrame, reduce: int, grey_scale: int
) -> np.ndarray:
    """The averaged copy of a cache's pixels, memory-mapped; it is written once."""
    path = cache / f"pixels_reduced_{reduce}.npy"
    total = int(reduced_layout(images, reduce)[0].prod(1).sum())

    def is_whole() -> bool:
        return path.is_file() and path.stat().st_size == files.NPY_HEADER + 2 * total

    if is_whole():  # also in a folder that can't be written
        return np.load(path, mmap_mode="c")
    with FileLock(path.with_suffix(".lock")):
        if not is_whole():
            files.remove_unfinished(cache, path.name)
            # Written, not mapped: a full disk is an error then, and no crash.
            with files.atomic_path(path) as temporary, temporary.open("wb") as out:
                files.write_npy_header(out, np.dtype(np.uint16), total)
                for image in images.itertuples():
                    stop = image.offset + image.height * image.width
                    crop = pixels[image.offset : stop].reshape(image.height, image.width)
                    small = block_average(crop, reduce)
                    out.write(np.round(small * grey_scale).astype(np.uint16).data)
    return np.load(path, mmap_mode="c")
