"""A finished pixel cache: whether it is whole, what it was made by, its averaged copy."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pandas as pd
from filelock import Timeout

from byol_mammo import files, processes
from byol_mammo.settings import MammoError

NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}  # what writing to a colleague's folder raises


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


def check_readable(cache: Path) -> None:
    """Raise MammoError where a cache is there, as a colleague's, and this user may not read it."""
    names = ("cache.json", "images.csv", "tiles.csv", "rejections.csv", "pixels.npy")
    for path in (cache, *(cache / name for name in names)):
        if os.path.exists(path) and not os.access(path, os.R_OK | os.X_OK * path.is_dir()):
            raise MammoError(
                f"{path}: there is such a cache and you may not read it; ask its owner for "
                f"chmod -R a+rX {cache}, or give another --cache_dir"
            )


def build_once(final: Path, build: Callable[[Path, Path], None]) -> None:
    """Make the cache `final` unless it is finished; of several processes one builds and the others wait.

    `build(building, journal)` extracts to the folder `journal` what no other beside it holds, and makes
    the cache in the folder `building`. Raises MammoError where the folder of caches can't be written.
    """
    building = final.with_name(f".{final.name}.building")
    try:
        building.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=building).close()
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise MammoError(
            f"{final.parent}: you may not write there, and no finished cache of these images and "
            "settings is in it; give a --cache_dir of your own"
        ) from error
    path = building.with_suffix(".lock")
    try:
        held = processes.take_lock(path, timeout=0)
    except Timeout:
        print(f"note: another process builds {final}: waiting for it", file=sys.stderr)
        held = processes.take_lock(path)
    if not held:
        build_without_lock(final, building, build)
        return
    with held:
        if not is_finished(final):
            build_in(
                building, final, lambda: build(building, building / "extracted" / processes.this_host())
            )


def build_in(building: Path, final: Path, build: Callable[[], None]) -> None:
    """Have `build` fill the folder `building`, and give it the cache's name."""
    if final.exists():
        print(f"note: {final} is damaged: moved aside and built anew", file=sys.stderr)
        files.move_aside(final)
    if not is_finished(building):  # else the last run was killed before it renamed it
        build()
    shutil.rmtree(building / "extracted", ignore_errors=True)
    files.remove_unfinished(building)
    os.replace(building, final)
    for left in final.parent.glob(f".{final.name}.building_*"):  # of processes without a lock
        shutil.rmtree(left, ignore_errors=True)


def build_without_lock(final: Path, building: Path, build: Callable[[Path, Path], None]) -> None:
    """Make the cache on a file system without locks: nothing tells whether another process does so too.

    So each writes to folders of its own alone, its images beside those of the others, whose finished
    ones it takes, and the first to end gives the cache its name. Of a node's ranks one builds.
    """
    while processes.find_ranks().local_rank and not is_finished(final):
        time.sleep(1)
    if is_finished(final):
        return
    print(
        f"note: {final.parent} is on a file system without locks: if another process builds the same "
        "cache, both do the work",
        file=sys.stderr,
    )
    own = uuid.uuid4().hex[:8]
    mine = building.with_name(f"{building.name}_{own}")
    journal = building / "extracted" / f"{processes.this_host()}_{own}"
    try:
        mine.mkdir()
        build_in(mine, final, lambda: build(mine, journal))
        shutil.rmtree(building, ignore_errors=True)
    except (OSError, KeyError):  # it took away what is read here
        if not is_finished(final):
            raise
        print(f"note: another process was the first to finish {final}", file=sys.stderr)
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def open_reduced(
    cache: Path, pixels: np.ndarray, images: pd.DataFrame, reduce: int, grey_scale: int
) -> np.ndarray:
    """The averaged copy of a cache's pixels, memory-mapped. It is written once, into the cache or, where
    that is a colleague's, beside it; where this can't be done either, anew for each process."""
    size = files.NPY_HEADER + 2 * int(reduced_layout(images, reduce)[0].prod(1).sum())
    folders = (cache, cache.with_name(f".{cache.name}.reduced"))
    paths = [folder / f"pixels_reduced_{reduce}.npy" for folder in folders]

    def write(file: BinaryIO) -> None:
        write_reduced(file, pixels, images, reduce, grey_scale)

    for path in paths:
        if has_size(path, size):  # also in a folder that can't be written
            return files.map_array(path)
    for path in paths:
        try:
            path.parent.mkdir(exist_ok=True)
            write_once(path, size, write)
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            continue
        if path.parent != cache:
            print(f"note: {cache} can't be written: its averaged copy is {path}", file=sys.stderr)
        return files.map_array(path)
    folder = tempfile.gettempdir()
    print(
        f"note: {cache} and {cache.parent} can't be written: its averaged copy goes to a temporary file "
        f"in {folder} at each start; copy the cache to a --cache_dir of your own to spare that",
        file=sys.stderr,
    )
    # Without a name: the file goes however the process ends.
    with files.name_file_in_errors(Path(folder)), tempfile.TemporaryFile() as file:
        write(file)
        file.flush()
        return np.memmap(file, np.uint16, "r", files.NPY_HEADER)


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def write_once(path: Path, size: int, write: Callable[[BinaryIO], None]) -> None:
    """Have `write` make a file of `size` bytes, unless another process has; the others wait."""
    lock = processes.take_lock(path.with_suffix(".lock"))
    with lock or nullcontext():
        if not has_size(path, size):
            if lock:  # else another process may be writing
                files.remove_unfinished(path.parent, path.name)
            with files.atomic_path(path) as temporary, temporary.open("wb") as out:
                write(out)


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


def write_reduced(
    file: BinaryIO, pixels: np.ndarray, images: pd.DataFrame, reduce: int, grey_scale: int
) -> None:
    """Write the averaged copy of a cache's pixels as a uint16 .npy file."""
    length = int(reduced_layout(images, reduce)[0].prod(1).sum())
    files.write_npy_header(file, np.dtype(np.uint16), length)
    for image in images.itertuples():
        stop = image.offset + image.height * image.width
        crop = pixels[image.offset : stop].reshape(image.height, image.width)
        small = block_average(crop, reduce)
        # Written, not mapped: a full disk is an error then, and no crash.
        file.write(np.round(small * grey_scale).astype(np.uint16).data)
