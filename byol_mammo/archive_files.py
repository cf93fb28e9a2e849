"""Files of an archive: which there are, which are DICOM by content, by what keys they are found."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from byol_mammo.images import is_left_out
from byol_mammo.settings import MammoError

RASTER = (".tif", ".tiff", ".jpg", ".jpeg", ".pgm")
DICOM = (".dcm", ".dicom", ".dic")
SUFFIXES = [".png", *RASTER, *DICOM]  # in order of preference where an image has several

# Files by key (see archives.py), as paths relative to images_root with '/'. "all" lists
# the images, and three keys that no path is list every file, those that are DICOM by content under other
# suffixes, and what was left out.
Index = dict[str, list[str]]
EVERY_FILE, DICOM_INSIDE, LEFT_OUT = "/files", "/dicom", "/left out"


def is_dicom(path: str | Path) -> bool:
    """Whether a file begins as DICOM files do, whatever its name; a DICOMDIR only lists others."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) or os.path.basename(path).upper() == "DICOMDIR":
            return False
        with open(path, "rb", buffering=0) as file:  # nothing behind the head is wanted
            head = file.read(132)
    except OSError:
        return False
    return head[128:] == b"DICM" or begins_as_data_set(head)


def begins_as_data_set(head: bytes) -> bool:
    """Whether bytes begin a little-endian DICOM data set without a preamble, as old exports are.

    It begins with the file's meta information (group 2) or the image's identification (group 8), whose
    first element has a VR of two letters or a short length (PS3.5, 7.1). No text begins so.
    """
    if len(head) < 8:
        return False
    group, element, vr, _ = struct.unpack_from("<HH2sH", head)
    explicit = vr in (b"UL", b"OB", b"CS", b"UI", b"SH", b"LO", b"DA", b"TM")
    short = struct.unpack_from("<I", head, 4)[0] <= 128
    return group in (2, 8) and element <= 0x18 and (explicit or short)


def format_of(path: Path) -> str:
    """'.png', '.tif', '.dcm' ... by the suffix; DICOM under any other (.IMA, a UID, none) by content."""
    suffix = suffix_of(path.name)
    if suffix in DICOM or (suffix not in SUFFIXES and is_dicom(path)):
        return ".dcm"
    return suffix


def suffix_of(name: str) -> str:
    """The file name's suffix in lower case, such as '.png'."""
    return os.path.splitext(name)[1].lower()


def without_suffix(name: str) -> str:
    """The name without a suffix that an image may have; dots of other meaning stay."""
    return os.path.splitext(name)[0] if suffix_of(name) in SUFFIXES else name


def index_files(images_root: Path) -> Index:
    """All files below the folder, by every key that an adapter may ask for.

    Hidden files are left out (images.is_left_out); links in circles are followed once. Raises OSError.
    """
    index: Index = {EVERY_FILE: [], DICOM_INSIDE: [], LEFT_OUT: []}
    if not images_root.is_dir():
        raise MammoError(f"there is no folder {images_root}; give the images with --images_root")
    seen = set()
    for where, folders, names in os.walk(images_root, followlinks=True):
        found = os.stat(where)
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        parents = Path(where).relative_to(images_root).parts
        hidden = sorted(filter(is_left_out, [*folders, *names]))
        index[LEFT_OUT] += ["/".join([*parents, name]) for name in hidden]
        folders[:] = sorted(set(folders).difference(hidden))
        # A folder named as an image stays in: it is listed as unusable.
        named = {name for name in folders if suffix_of(name) in SUFFIXES}
        for name in sorted(named.union(names).difference(hidden)):
            path = index_file(index, where, name, parents)
            if name not in named:
                index[EVERY_FILE].append(path)
    return index


def index_file(index: Index, where: str, name: str, parents: Sequence[str]) -> str:
    """Enter a file of the folder `where` under its keys; returns its path below images_root, which its
    folders there, `parents`, begin."""
    path = "/".join([*parents, name])
    bare, suffix = os.path.splitext(path)
    known, spellings = suffix.lower() in SUFFIXES, [bare]
    if not known and is_dicom(os.path.join(where, name)):
        index[DICOM_INSIDE].append(path)
        known, spellings = True, [bare, without_suffix(bare)]  # image.dcm.1
    keys = {path, f"name {name}"}  # a UID as a name has no suffix, whatever it looks like
    for spelling in spellings:
        stem = spelling.rpartition("/")[2]
        keys |= {spelling, f"name {stem}", f"first {stem.split('_')[0]}"}
    if known:
        keys |= {"all", *(f"folder {parent}" for parent in parents)}
    for key in keys:
        index.setdefault(key, []).append(path)
    return path
