"""The journal of an extraction, and how its images become a cache."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import math
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from byol_mammo import cache as caches, files, framing, processes, tracking
from byol_mammo.settings import MammoError

SYNC_EVERY = 1.0  # s between writes of the journal; a killed extraction does that much again
RECORDS = "records.jsonl"  # a line for each image that an extraction has finished
MIN_FOLDER = 10  # images of a folder from which one of another polarity than the rest is told
MAX_DISSENT = 0.1  # share of them that is called a dissent
Part = tuple[Path, np.dtype, int, tuple[int, int], slice, slice]  # file, dtype, offset, shape, box


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed blocks: handing tens of MB back per image costs a fifth of the time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 1 << 25)  # the most that older glibc takes
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def pixel_file(folder: Path, bit_depth: int, writer: str = "") -> tuple[Path, np.dtype]:
    """Where images of this depth are extracted to, and as what; `writer`: see extract_apart."""
    dtype = np.dtype(np.uint8 if bit_depth <= 8 else np.uint16)
    return folder / writer / f"pixels_{dtype}.npy", dtype


def pixels_end(folder: Path, record: dict[str, Any]) -> tuple[Path, int]:
    """The file that holds an image's pixels, and where they end in it, in bytes."""
    path, dtype = pixel_file(folder, record["bit_depth"], record.get("writer", ""))
    return path, files.NPY_HEADER + (record["offset"] + math.prod(record["shape"])) * dtype.itemsize


def append_pixels(path: Path, pixels: np.ndarray) -> int:
    """Append an image to a file that the processes of an extraction share; returns its offset in values.

    A single write to a file open for appending lands in one piece behind all others (POSIX write()).
    """
    with files.name_file_in_errors(path), path.open("ab", buffering=0) as out:
        written = out.write(pixels.data)
        start = out.tell() - written - files.NPY_HEADER
    if written < pixels.nbytes or start % pixels.itemsize:  # this image was cut short, or the one before
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return start // pixels.itemsize


class Journal:
    """The images that an extraction has finished: their pixels, and a line about each in RECORDS.

    Appends only to `folder`, that of this host and boot; those of others beside it, whose writes may
    still be under way, are read (read_records). fsync runs in a thread, so that extraction never waits
    for the disk. The cache's lock keeps a folder to one extraction at a time; where there are no locks,
    each extraction has a folder of its own.
    """

    def __init__(self, folder: Path, finished: dict[int, dict[str, Any]]) -> None:
        """`finished`: the records that stand, see read_records."""
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.waiting: list[dict[str, Any]] = []
        self.unread: list[dict[str, Any]] = []
        self.ends = {pixel_file(self.folder, bits)[0]: files.NPY_HEADER for bits in (8, 16)}
        kept = [{**record} for record in finished.values() if record["folder"] == self.folder]
        for record in kept:
            del record["folder"]
            self._note_end(record)
        # A line whose pixels are gone goes for good: what is appended from now on must not stand in.
        lines = "".join(f"{json.dumps(record)}\n" for record in kept)
        files.write_atomic(self.folder / RECORDS, lines)
        self._cut()  # what a killed extraction left behind its last image, perhaps half a value
        self.writer = ThreadPoolExecutor(1)
        self.written = self.writer.submit(self._write)
        self.due = time.monotonic() + SYNC_EVERY

    def add(self, record: dict[str, Any]) -> None:
        """Note a finished image; one that the system did not give (`unread`) is left for another start.

        Raises the OSError of an earlier write.
        """
        if "unread" in record:
            self.unread.append(record)
            return
        self._note_end(record)
        self.waiting.append(record)
        if time.monotonic() >= self.due and self.written.done():
            self.written.result()
            self.written = self.writer.submit(self._write)
            self.due = time.monotonic() + SYNC_EVERY

    def close(self) -> None:
        """Give back the room behind the last finished image, as on a full disk, and write what waits."""
        self.writer.shutdown()
        self._cut()
        self._write()

    def _note_end(self, record: dict[str, Any]) -> None:
        if "offset" in record and "writer" not in record:  # whose file is its own to cut
            path, end = pixels_end(self.folder, record)
            self.ends[path] = max(self.ends[path], end)

    def _cut(self) -> None:
        for path, end in self.ends.items():
            with files.name_file_in_errors(path), path.open("ab") as file:
                file.truncate(end)  # longer where it lacks its header

    def _write(self) -> None:
        """Append what waits to RECORDS once its pixels are safe."""
        records = list(self.waiting)
        for path in self.ends:
            with files.name_file_in_errors(path), path.open("rb") as file:
                os.fsync(file.fileno())
        path = self.folder / RECORDS
        with files.name_file_in_errors(path), path.open("a") as out:
            # A full disk may have left half a line.
            out.write("\n" + "".join(f"{json.dumps(record)}\n" for record in records))
            out.flush()
            os.fsync(out.fileno())
        del self.waiting[: len(records)]


def size_at_opening(path: Path) -> int:
    """Bytes of a file, 0 where it is gone. NFS tells of what another node has written only to those who
    open the file (close-to-open consistency, nfs(5)); stat may answer from a cache."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return 0


def read_records(extracted: Path) -> dict[int, dict[str, Any]]:
    """The lines of all journals by image number, each with the `folder` of its pixels.

    Left out are damaged lines and those whose pixels are gone: scratch file systems purge old files.
    """
    records = {}
    for journal in extracted.glob(f"*/{RECORDS}"):
        folder, size = journal.parent, functools.lru_cache(None)(size_at_opening)
        with journal.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):  # half a line, where a process was killed
                    record = {"folder": folder, **json.loads(line)}
                    if "error" not in record:
                        path, end = pixels_end(folder, record)
                        if end > size(path):
                            continue
                    records[record["index"]] = record
    return records


def extract_missing(
    extract: Callable[..., dict[str, Any]],
    jobs: Sequence[tuple[Any, ...]],
    folder: Path,
    workers: int,
    mode: str,
    dask: str = "",
) -> list[dict[str, Any]]:
    """Records of all jobs (number, path, ...), of which journals beside `folder` may hold some.

    `extract(*job, folder=...)` extracts an image to that folder and returns its record; `mode`: of
    progress; `dask`: the cluster that does it, '' = processes of this machine.

    Raises MammoError where images could not be read for the system's sake, once all others are done: a
    cache without them would never be made again, whose key knows names, sizes and times alone.
    """
    extracted = folder.parent
    finished = read_records(extracted)
    left = [job for job in jobs if job[0] not in finished]
    try:
        with closing(Journal(folder, finished)) as journal:
            bar = tracking.progress(mode=mode, total=len(left), desc="tiles", unit="image")
            if dask and left:
                extract_on_cluster(dask, extract, left, journal, bar)
            else:
                call = functools.partial(extract, folder=str(folder))
                processes.run_in_parallel(call, left, workers, bar, done=journal.add)
    except BrokenProcessPool as error:
        finished = read_records(extracted)
        suspects = [job[1] for job in left if job[0] not in finished]
        suspects = suspects[: min(workers, processes.available_cores())]
        raise MammoError(
            f"an extraction process was killed at one of {', '.join(suspects)}, for want of memory "
            "perhaps; lower --num_workers and start again: finished images are kept. If it ends there "
            "again, one of these files crashes its decoder: move it away"
        ) from error
    if journal.unread:
        first = journal.unread[0]
        raise MammoError(
            f"{len(journal.unread)} of {len(jobs)} images can't be read at present, the first is "
            f"{first['unread']} ({first['error']}); all others are finished and kept, and the same "
            "command tries these again. If they can't be mended, move them out of --data_dir"
        )
    finished = read_records(extracted)
    return [finished[job[0]] for job in jobs]


def extract_on_cluster(
    dask: str,
    extract: Callable[..., dict[str, Any]],
    jobs: Sequence[tuple[Any, ...]],
    journal: Journal,
    bar: tqdm,
) -> None:
    """Extract on the workers of a Dask cluster, and note in the journal what they have finished.

    Raises MammoError where images end their workers, once all others are done.
    """
    from byol_mammo import cluster

    folder, killed = journal.folder.absolute(), []
    call = functools.partial(extract_apart, extract, folder=str(folder))
    inputs = [Path(job[1]) for job in jobs if os.path.isfile(job[1])][:1]  # not links that lead nowhere
    with bar, processes.StopSignal() as stop:
        for number, record in cluster.results(dask, call, jobs, folder, inputs, stop.obey):
            if record is cluster.KILLED:
                killed.append(jobs[number][1])
            else:
                journal.add(record)
            bar.update()
    if killed:
        first = ", ".join(killed[:3]) + (", ..." if len(killed) > 3 else "")
        raise MammoError(
            f"Dask's workers were killed, one after the other, at {len(killed)} images ({first}), for "
            "want of memory perhaps; give each worker more and start again: all other images are "
            "finished and kept. If it ends there again, these files crash their decoder: move them away"
        )


@functools.cache
def writer_name() -> str:
    """A name for the folder of this process's files, that no other process of any node has."""
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


def extract_apart(extract: Callable[..., dict[str, Any]], *job: Any, folder: str) -> dict[str, Any]:
    """Extract an image on one of many nodes: `extract(*job, folder=...)`, and its record.

    Each process appends to files of its own, whose folder the record names as `writer`: O_APPEND of
    several nodes to one file overwrites on NFS (open(2)), and pixels sent to one node instead would have
    to pass through its network, all of them. They are on disk before the record is on its way, and what
    failed is cut off, so that the next image begins at a whole value.
    """
    own = Path(folder) / writer_name()
    own.mkdir(exist_ok=True)
    ends = {pixel_file(own, bits)[0]: 0 for bits in (8, 16)}
    for path in ends:
        with files.name_file_in_errors(path), path.open("ab") as file:
            if file.tell() < files.NPY_HEADER:
                file.truncate(files.NPY_HEADER)
            ends[path] = max(file.tell(), files.NPY_HEADER)
    try:
        record = extract(*job, folder=str(own))
        for path, end in ends.items():
            if path.stat().st_size > end:
                files.flush(path)
    except BaseException:
        for path, end in ends.items():
            os.truncate(path, end)
        raise
    return {**record, "writer": own.name}


def write_cache(
    building: Path,
    tables: dict[str, pd.DataFrame],
    parts: list[Part],
    inputs: dict[str, Any],
    workers: int,
    mode: str,
) -> None:
    """Write images.csv, tiles.csv, rejections.csv, cache.json and, last, pixels.npy.

    `parts`: where the pixels of each row of images.csv were extracted to; `mode`: of progress.
    """
    images, used = tables["images"], {part[0] for part in parts}
    # Not where there are no locks, nor from a cluster: those images are put into the order of the table.
    own = all(path.parent.parent == building / "extracted" for path in used)
    if own and len(used) == 1 and not tables["rejections"]["capped"].any():
        # One dtype and nothing capped: the extraction's file is the cache's already.
        pixels, dtype = used.pop(), parts[0][1]
        with files.name_file_in_errors(pixels), pixels.open("r+b") as out:
            files.write_npy_header(
                out, dtype, (pixels.stat().st_size - files.NPY_HEADER) // dtype.itemsize
            )
            os.fsync(out.fileno())
    else:
        images["offset"] = (images["height"] * images["width"]).cumsum().shift(fill_value=0)
        pixels = building / "extracted" / "pixels.npy"
        pixels.parent.mkdir(exist_ok=True)
        files.remove_unfinished(pixels.parent)
        pixels.unlink(missing_ok=True)  # of a start that was killed behind this
        with files.atomic_path(pixels) as temporary:
            bar = tracking.progress(mode=mode, total=len(parts), desc="cache", unit="image")
            gather_pixels(images, parts, temporary, workers, bar)
    sizes = {"pixels.npy": pixels.stat().st_size}
    for name, table in tables.items():
        path = building / f"{name}.csv"
        files.write_atomic(path, table.to_csv(index=False))
        sizes[path.name] = path.stat().st_size
    summary = {"inputs": inputs, "versions": caches.library_versions(), "sizes": sizes, "finished": True}
    files.write_atomic(building / "cache.json", json.dumps(summary, indent=2))
    os.replace(pixels, building / "pixels.npy")  # last: without it the rest counts for nothing


def gather_pixels(
    images: pd.DataFrame, parts: list[Part], target: Path, workers: int, bar: tqdm
) -> None:
    """Copy the images' pixels to one .npy file, to the offsets in `images`, several images at a time.

    A second copy: for extractions that went on on another machine, for MAX_TILES, and for archives of
    8-bit and deeper images, which share uint16.
    """
    dtype = max(part[1] for part in parts)
    length = int((images["height"] * images["width"]).sum())
    with target.open("wb") as out:
        files.write_npy_header(out, dtype, length)
        out.truncate(files.NPY_HEADER + length * dtype.itemsize)
    starts = files.NPY_HEADER + images["offset"] * dtype.itemsize

    def copy_part(part: Part, start: int) -> None:
        file, source, offset, shape, ys, xs = part
        pixels = np.fromfile(
            file, source, math.prod(shape), offset=files.NPY_HEADER + offset * source.itemsize
        )
        with target.open("r+b") as out:
            out.seek(start)
            out.write(np.ascontiguousarray(pixels.reshape(shape)[ys, xs], dtype).data)

    jobs = list(zip(parts, starts, strict=True))
    processes.run_in_parallel(copy_part, jobs, workers, bar, threads=True)


def note_polarity(names: pd.Series, margins: list[float | None]) -> None:
    """Say which images may be inverted by mistake: close votes, and one that differs from its folder.

    `margins` of the votes: negative where inverted, 1 or -1 where it was given, None where skipped.
    """
    votes = pd.DataFrame({"image": list(names), "margin": pd.to_numeric(pd.Series(margins))}).dropna()
    close = votes["image"][votes["margin"].abs() < framing.CLOSE_VOTE]
    inverted = votes["margin"] < -framing.MIN_INVERTED
    folder = votes["image"].map(lambda name: str(Path(name).parent))
    share = inverted.groupby(folder).transform("mean")
    many = inverted.groupby(folder).transform("size") >= MIN_FOLDER
    dissent = many & (np.where(inverted, share, 1 - share) <= MAX_DISSENT) & (votes["margin"].abs() < 1)
    for what, found in (
        ("whether they are negatives was a close vote", close),
        ("they are negatives and their folder is not, or the other way round", votes["image"][dissent]),
    ):
        if len(found):
            first = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            print(
                f"note: {len(found)} of {len(votes)} images: {what} ({first}); --qc_pages shows them, "
                "polarity (as_is, inverted) in manifest.csv decides for an image, --polarity for all",
                file=sys.stderr,
            )
