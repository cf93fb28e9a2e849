"""Image files: finding them, what the manifest knows of them, decoding at full bit depth."""

from __future__ import annotations

import errno
import math
import os
import stat
import struct
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from kornia_rs import io as kornia_io
from PIL import Image

from byol_mammo import files
from byol_mammo.settings import MammoError
from byol_mammo.spacing import parse_spacing

SPACING_RANGE = (0.005, 2)  # mm per pixel that can be; others count as unknown
POLARITIES = ("as_is", "inverted", "unknown")  # of a manifest; unknown is judged
IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".pgm")
# Folders and files of systems and file servers that hide none by a dot: thumbnails (Synology), resource
# forks (macOS archives), what fsck found, waste bins.
SYSTEM_NAMES = frozenset(
    ("@eadir", "__macosx", "lost+found", "#recycle", "$recycle.bin", "system volume information")
)


def is_left_out(name: str) -> bool:
    """Whether a file's or folder's own name tells that it is hidden or the system's: no mammogram is.

    Editors, notebooks and desktops keep copies of images there (.ipynb_checkpoints, .Trash-0, ._a.png).
    """
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


FOREIGN_MANIFEST = (  # what to do about a manifest.csv without the paths of the images
    "prepare_dataset.py writes it, and `file` is an image's path below its folder: rename the column "
    "that holds this, lay the archive out by prepare_dataset.py, or move the table away to do without"
)


class ImageReadError(MammoError):
    """An image that can't be used; names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


class UnreadError(ImageReadError):
    """An image that the system did not give: another try may succeed, so that nothing may go without."""


def image_folder(data_dir: str | Path) -> Path:
    """The folder of the images. Raises MammoError where there is none."""
    root = Path(data_dir)
    if not root.is_dir():
        raise MammoError(f"{root}: no such folder; give --data_dir, or lay it out by prepare_dataset.py")
    return root


def note_test_images(root: Path) -> None:
    """Say so where a folder that is to be trained on is a whole layout, test images and all."""
    if (root / "manifest.csv").is_file() and (root / "test").is_dir():
        print(f"note: {root} holds test images too; {root / 'training'} has none", file=sys.stderr)


def find_images(data_dir: str | Path) -> list[Path]:
    """All images under a folder, in linked ones too, sorted. Raises MammoError where there is none.

    Links that lead nowhere are among them: they are skipped by name later, not lost in silence.
    Hidden files and folders are not, see is_left_out.
    """
    return walk_images(image_folder(data_dir))[0]


def walk_images(root: Path) -> tuple[list[Path], list[Path]]:
    """The images of find_images, and the hidden files and folders left out. Raises MammoError."""
    found: list[Path] = []
    left_out: list[Path] = []
    entered: set[str] = set()  # links may lead in circles, or to a folder that is here by its own name
    folders, linked = [root], []
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) not in entered:
            entered.add(os.path.realpath(folder))
            for entry in entries_of(folder):
                if is_left_out(entry.name):
                    left_out.append(Path(entry))
                elif entry.is_symlink() and os.path.isdir(entry):
                    linked.append(Path(entry))
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry))
                else:
                    found.append(Path(entry))
        if not folders:
            folders, linked = linked, []
    paths = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        hint = "; prepare_dataset.py makes PNG of DICOM" if found else ""
        hint += f"; {len(left_out)} hidden files and folders are left out" if left_out else ""
        raise MammoError(f"{root}: no image with {', '.join(IMAGE_SUFFIXES)} in it{hint}")
    return paths, left_out


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name. Raises MammoError where that may not be known: its images would be
    missing without a word."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        raise MammoError(
            f"{folder}: you may not read this folder ({error.strerror}), which may hold images; make it "
            "readable (chmod u+rx), or give a folder without it"
        ) from error


def list_sources(data_dir: str | Path) -> pd.DataFrame:
    """One row for each image file: path, image, size, mtime_ns, and what the manifest knows of it.

    That is study_id, laterality, view, spacing_mm and polarity, from manifest.csv in the folder or
    beside it (written by prepare_dataset.py); without one, each image counts as a study of its own.
    `attrs["left_out"]` tells how many hidden files and folders there are beside them, and the first.
    """
    root = image_folder(os.path.abspath(data_dir))  # links stay: their names are the images'
    paths, left_out = walk_images(root)
    stats = [path.stat() if path.is_file() else path.lstat() for path in paths]
    sources = pd.DataFrame(
        {
            "path": [str(path) for path in paths],
            # Names may hold any byte; in tables those that are no text stand as \\x..
            "image": [
                os.fsencode(path.relative_to(root)).decode(errors="backslashreplace") for path in paths
            ],
            "size": [stat.st_size for stat in stats],
            "mtime_ns": [stat.st_mtime_ns for stat in stats],
        }
    )
    known = read_manifest(root)
    sources = sources.merge(known, on="path", how="left")
    stems = sources["image"].map(lambda name: str(Path(name).with_suffix("")))
    sources["study_id"] = sources["study_id"].astype(object).where(sources["study_id"].notna(), stems)
    for column in ("laterality", "view", "polarity"):
        sources[column] = sources[column].astype(object).where(sources[column].notna(), "")
    if left_out:
        sources.attrs["left_out"] = len(left_out), str(min(left_out).relative_to(root))
    return sources


def note_left_out(sources: pd.DataFrame) -> None:
    """Say what is hidden in the folder, where anything is."""
    if "left_out" in sources.attrs:
        count, first = sources.attrs["left_out"]
        print(
            f"note: {count} hidden or system files and folders left out: {first!r} ...", file=sys.stderr
        )


def note_unknown_spacing(sources: pd.DataFrame, taken: float) -> None:
    """Say how many images don't tell their pixel size."""
    unknown = int(sources["spacing_mm"].isna().sum())
    if unknown:
        print(
            f"note: {unknown} of {len(sources)} images don't tell their pixel size: "
            f"--pixel_spacing_mm {taken:g} is taken",
            file=sys.stderr,
        )


def known_polarity(sources: pd.DataFrame, asked: str) -> list[str]:
    """as_is, inverted or auto for each source: what is `asked` for; for auto what the manifest says."""
    if asked != "auto":
        return [asked] * len(sources)
    return sources["polarity"].where(sources["polarity"].isin(POLARITIES[:2]), "auto").tolist()


CLAIMS = ".prepare_dataset.claims.csv"  # what an unfinished run of prepare_dataset.py set out to make


def read_manifest(root: Path, also: Sequence[str] = ()) -> pd.DataFrame:
    """What manifest.csv knows of images, by path, and its columns `also`; empty where there is none.

    Raises MammoError.
    """
    columns = ["path", "study_id", "laterality", "view", "spacing_mm", "polarity", *also]
    real = root.resolve()  # a linked folder may keep its manifest beside the link or where it leads to
    for folder in (root, root.parent, real.parent):
        if (folder / CLAIMS).exists():
            raise MammoError(
                f"{folder} is being written by prepare_dataset.py, or that was stopped: images, labels "
                "and splits may be of two runs; wait, or give the same prepare_dataset.py command again"
            )
        if not (folder / "manifest.csv").is_file():
            continue
        manifest = files.read_table(folder / "manifest.csv", ["file"], FOREIGN_MANIFEST)
        paths = [folder / name for name in manifest["file"]]
        manifest["path"] = [
            str(root / path.relative_to(real) if path.is_relative_to(real) else path) for path in paths
        ]
        manifest = manifest.replace("", np.nan)
        manifest = manifest.reindex(columns=columns).drop_duplicates("path")
        # As find_muscle knows them; a table of one's own may say cc.
        manifest["view"] = manifest["view"].map(str.upper, na_action="ignore").astype(object)
        check_polarity(manifest["polarity"], folder / "manifest.csv")
        cells = manifest["spacing_mm"]
        spacing = pd.to_numeric(cells, errors="coerce")
        spacing = spacing.fillna(cells[spacing.isna()].map(_spacing_or_nan))
        manifest["spacing_mm"] = spacing.where(spacing.between(*SPACING_RANGE))
        return manifest
    return pd.DataFrame({column: pd.Series(dtype=object) for column in columns})


def _spacing_or_nan(cell: Any) -> float:
    """parse_spacing of a manifest's cell, NaN where it is empty or not understood: both are unknown."""
    with suppress(ValueError):
        return parse_spacing(str(cell)) or math.nan
    return math.nan


def check_polarity(column: pd.Series, path: Path) -> None:
    """Raises MammoError at a word that is no polarity: to guess would give a negative to training."""
    wrong = column[column.notna() & ~column.isin(POLARITIES)]
    if len(wrong):
        raise MammoError(
            f"{path}, line {wrong.index[0] + 2}: polarity {wrong.iloc[0]!r} is none of "
            f"{', '.join(POLARITIES)}; correct it, or leave it empty to have the image judged"
        )


# ---- Decoding and reducing: part of a cache's key --------------------------------------------------

SAMPLE = 100_000  # px that tell of an image's grey levels as much as all
PNG_SIGNATURE, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
PASSING = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT}  # what file servers say for a while
RETRY_AFTER = 1.0  # s
MAX_SAMPLES = 150_000_000  # pixels times channels of the largest image read; most have 10-30 million


def decode(path: str | Path) -> np.ndarray:
    """The grey levels of an image file as they are: (H, W) uint8 or uint16. Raises ImageReadError, of
    which UnreadError tells of the system, not of the file's content."""
    data = read_patiently(path)
    try:
        image = decode_grey_png(data)
        if image is None:
            image = decode_by_opencv(data)
    except cv2.error as error:  # no memory for its pixels, for one
        raise ImageReadError(path, f"can't be decoded ({error.err})") from error
    if image is None:
        raise ImageReadError(path, "can't be decoded: damaged, or not an image")
    if image.dtype not in (np.uint8, np.uint16):
        raise ImageReadError(path, f"{image.dtype} pixels; convert to 8 or 16 bits")
    if image.ndim == 3:
        image = _grey(image)
    if min(image.shape) < 2:
        raise ImageReadError(path, f"only {image.shape[1]} x {image.shape[0]} px")
    return image


def read_patiently(path: str | Path, tries: int = 2) -> bytes:
    """read_checked, once more after RETRY_AFTER where a file server may mend itself.

    Raises ImageReadError, and UnreadError for every OSError.
    """
    try:
        return read_checked(path)
    except OSError as error:
        if tries > 1 and error.errno in PASSING:
            time.sleep(RETRY_AFTER)
            return read_patiently(path, tries - 1)
        gone = isinstance(error, FileNotFoundError)
        reason = "no such file" if gone else f"can't be read: {error.strerror or error}"
        raise UnreadError(path, reason) from error


def read_checked(path: str | Path) -> bytes:
    """The bytes of an image file, whose header is read first. Raises ImageReadError and OSError."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):  # it leads nowhere
            raise ImageReadError(path, "no such file") from error
        raise
    if not stat.S_ISREG(mode):
        raise ImageReadError(path, "not a file")
    if (samples := declared_samples(path)) > MAX_SAMPLES:
        raise ImageReadError(path, f"declares {samples:,} values, more than a mammogram has")
    return Path(path).read_bytes()  # cv2.imread would crash at a name that is not UTF-8


def decode_grey_png(data: bytes) -> np.ndarray | None:
    """A whole PNG of 8 or 16 bits of grey as (H, W), else None; 1.5 to 1.8 times as fast as OpenCV."""
    if not data.endswith(PNG_END):
        return None
    decoders = {8: kornia_io.decode_image_png_u8, 16: kornia_io.decode_image_png_u16}
    try:
        width, height, bits, *kind = struct.unpack_from(">2I5B", data, 16)  # IHDR (PNG 1.2, 4.1.1)
        if any(kind) or bits not in decoders:  # colour, or interlaced
            return None
        return decoders[bits](data, (height, width), "mono")[..., 0]
    except Exception:  # damaged: it raises no class of its own, and OpenCV has the last word
        return None


def decode_by_opencv(data: bytes) -> np.ndarray | None:
    """Pixels of an image file as stored, (H, W) or (H, W, C), None where it is damaged.

    OpenCV 5 takes the memory that a PNG's chunk declares, 2 GiB for a few damaged bytes: a PNG with one
    beyond its own end is not given to it.
    """
    start = len(PNG_SIGNATURE) if data.startswith(PNG_SIGNATURE) else len(data)
    while start + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        start += 12 + length  # length, name, content, checksum (PNG 1.2, 3.2)
        if start > len(data):
            return None
        if name == b"IEND":
            break
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def declared_samples(path: str | Path) -> int:
    """Pixels times channels by a file's header, read before any pixel.

    Raises ImageReadError, and OSError where the system doesn't give the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images and of odd tags
            with Image.open(path, formats=("PNG", "TIFF", "JPEG", "PPM")) as image:
                channels = 3 if image.mode == "P" else len(image.getbands())
                samples, problem = image.width * image.height * channels, stored_otherwise(image)
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit, which it names
        raise ImageReadError(path, f"declares more values than a mammogram has: {error}") from error
    except OSError as error:
        if error.errno and error.errno != errno.EINVAL:  # of a place beyond all files in a header
            raise
        with open(path, "rb") as file:
            dicom = file.read(132).endswith(b"DICM")  # after a preamble of 128 bytes (PS3.10, 7.1)
        reason = "DICOM; prepare_dataset.py makes PNG of it" if dicom else "damaged, or not an image"
        raise ImageReadError(path, f"can't be decoded: {reason}") from error
    except Exception as error:  # Pillow raises almost anything on damaged headers
        raise ImageReadError(path, "can't be decoded: its header is damaged") from error
    if problem:
        raise ImageReadError(path, problem)
    return samples


def stored_otherwise(image: Image.Image) -> str:
    """Why an open file is not one picture that is shown as it is stored, '' where it is one.

    A tag may ask to turn or mirror the picture (EXIF and TIFF, Orientation). Nothing tells whether
    boxes and sides belong to the turned picture or to the stored one, and decoders disagree: OpenCV 5.0
    turns TIFF and leaves JPEG and PNG. So it is refused, not guessed.
    """
    # Not PngImageFile's own method, which decodes all pixels to look for a tag behind them.
    orientation = Image.Image.getexif(image).get(0x0112, 1)
    pictures = getattr(image, "n_frames", 1)
    if orientation in range(2, 9):
        return (
            f"to be turned by its EXIF tag (orientation {orientation}), and boxes may belong to either; "
            "save it turned (mogrify -auto-orient) or remove the tag (exiftool -Orientation=)"
        )
    return f"holds {pictures} pages; save the one that is the mammogram" if pictures > 1 else ""


def _grey(image: np.ndarray) -> np.ndarray:
    """One channel of (H, W, C): the first where the colours are copies, their luma otherwise."""
    if image.shape[2] < 3 or (
        np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
    ):
        return np.ascontiguousarray(image[..., 0])
    return cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_BGR2GRAY)


def bit_depth(image: np.ndarray, brightest: int | None = None) -> int:
    """8, or the least of 10, 12, 14 and 16 bits that holds the largest value, `brightest` if known."""
    if image.dtype == np.uint8:
        return 8
    brightest = int(image.max()) if brightest is None else brightest
    return next(bits for bits in (10, 12, 14, 16) if brightest < 2**bits)


def block_means(image: np.ndarray, factor: int) -> np.ndarray:
    """Float32 means of blocks of factor x factor px, a power of two; rows and columns left over go.

    Halving is the fast path of cv2.resize. Whole grey levels get 8 fractional bits after the first
    halving, so that 8-bit images keep their averages.
    """
    height, width = (length // factor * factor for length in image.shape)
    image = image[:height, :width]
    scale = 1
    while factor > 1 and image.size:
        image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        if image.dtype == np.uint8:
            image, scale = image.astype(np.uint16) << 8, 256
        factor //= 2
    return image.astype(np.float32) / np.float32(scale)


def largest_component(binary: np.ndarray) -> np.ndarray:
    """The largest 8-connected component of a (H, W) bool array; all False where there is none."""

    count, labels = cv2.connectedComponents(binary.view(np.uint8))
    if count <= 2:  # the background and at most one more
        return binary
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def median_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Median, and the standard deviation of a normal distribution of the same absolute deviations."""
    centre = float(np.median(values))
    return centre, 1.4826 * float(np.median(np.abs(values - centre)))


def magnitude(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Length of vectors with parts x and y, float32 arrays of one shape: written into x; y is used up.

    It is the same to the bit in every run: cv2.magnitude rounds by where in memory its arrays lie.
    """
    np.multiply(x, x, out=x)
    np.multiply(y, y, out=y)
    np.add(x, y, out=x)
    return np.sqrt(x, out=x)


def grey_step(image: np.ndarray) -> float:
    """Usual gap between the grey levels in use: 1, or 16 where 12 bits were stretched to 16."""
    rows = image[:: max(1, image.size // SAMPLE)]  # whole rows are read faster than single pixels
    levels = np.flatnonzero(np.bincount(rows.ravel()))
    return float(np.median(np.diff(levels))) if len(levels) > 1 else 1.0


def sampling_step(image: np.ndarray) -> int:
    """Every how many rows and columns are read where some SAMPLE px tell as much as all."""
    return max(1, math.isqrt(image.size // SAMPLE))


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is True; twice as fast as cv2.boundingRect on whole images."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return 0, 0, 0, 0
    cols = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return int(cols[0]), int(rows[0]), int(np.ptp(cols)) + 1, int(np.ptp(rows)) + 1
