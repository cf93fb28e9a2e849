"""What a command would take, before it is carried out: bytes, and time from a few items tried."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from byol_mammo import processes

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

TRIED = 4  # items that are tried, spread evenly over all


def try_some(
    items: Sequence[Item], attempt: Callable[[Item], Outcome]
) -> tuple[list[Item], list[Outcome], float]:
    """A few of the items, what `attempt` makes of each, and the seconds that this took in all.

    The first is tried twice: what is loaded once, such as a library, is not to be counted for all.
    """
    count = min(TRIED, len(items))
    tried = [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
    for item in tried[:1]:
        attempt(item)
    start = time.perf_counter()
    return tried, [attempt(item) for item in tried], time.perf_counter() - start


def count_workers(num_workers: int, items: int, dask: str = "") -> int:
    """How many processes would work on that many items: here, or of the Dask cluster."""
    there = processes.available_cores()
    if dask:
        from byol_mammo import cluster

        num_workers = there = max(1, cluster.count_workers(dask))
    return min(num_workers, there, items)


def pixel_bytes(
    tried: Sequence[tuple[int, int]], scale: float, most: float = math.inf, dask: str = ""
) -> tuple[float, float]:
    """Bytes of a cache's pixels, and of the copy beside it from which it is put into order, if it is.

    `tried`: pixels and the bytes of each of the images tried, one of every `scale`; `most`: pixels that
    MAX_TILES leaves. See extraction.write_cache: images of 8 and of 16 bit share 16.
    """
    widths = {width for count, width in tried if count}
    kept = min(most, scale * sum(count for count, _ in tried)) * max(widths, default=0)
    copied = dask or len(widths) > 1 or most < math.inf
    return kept, scale * sum(count * width for count, width in tried) if copied else 0


def size_text(size: float) -> str:
    """'1.2 GB' of bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:,.1f} TB"


def duration_text(seconds: float) -> str:
    """'3 min' of seconds."""
    for unit, length, limit in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < limit * length:
            return f"{max(1, round(seconds / length))} {unit}"
    return f"{seconds / 86400:.1f} days"


def space_text(path: Path, needed: float) -> str:
    """'20 GB are free there', and that this is too little where it is."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    return f"{size_text(free)} are free there" + (", TOO LITTLE" if free < needed else "")
