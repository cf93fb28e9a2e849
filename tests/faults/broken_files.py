"""Files to break: good ones of each format that the scripts read, bombs, and damage to put on them.

`sources` maps a name (png_grey16, dicom_rle ...) to the bytes of a good file of 96 x 80 px; `damage`
puts mutations on bytes. Everything follows from its arguments.
"""

from __future__ import annotations

import functools
import io
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from test_prepare_dicom import breast, make_dicom, recode, save

Mutation = tuple[str, int, bytes]  # kind, place, argument: see damage
PNG_COLOURS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG colour type -> samples of a pixel
ADAM7 = [
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
]


# PNG ----------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    )


def png(size: tuple[int, int], depth: int, colour: int, pixels: bytes, interlace: int = 0) -> bytes:
    """A PNG file of (width, height); `pixels` are its filtered rows, already deflated."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    parts = [chunk(b"IHDR", header), palette, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def interlaced_png(image: np.ndarray) -> bytes:
    """A (H, W) image as an Adam7 PNG, which neither OpenCV nor Pillow writes."""
    rows = []
    for x, y, dx, dy in ADAM7:
        rows += [b"\0" + row.astype(f">u{image.itemsize}").tobytes() for row in image[y::dy, x::dx]]
    size = image.shape[1], image.shape[0]
    return png(size, 8 * image.itemsize, 0, zlib.compress(b"".join(rows)), interlace=1)


def png_bomb(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A black PNG: a thousandth of the bytes that it takes when decoded."""
    row = 1 + -(-width * PNG_COLOURS[colour] * depth // 8)
    checksum = struct.pack(">HH", row * height % 65_521, 1)  # Adler-32 of zeros
    return png((width, height), depth, colour, b"\x78\xda" + deflated_zeros(row * height) + checksum)


def deflated_zeros(count: int) -> bytes:
    """A deflate stream of zeros, of one block again and again."""
    megabyte = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = megabyte.compress(bytes(10**6)) + megabyte.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return block * (count // 10**6) + rest.compress(bytes(count % 10**6)) + rest.flush()


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them now: damage that gets past these."""
    out, at = content[:8], 8
    while at + 12 <= len(content):
        length = struct.unpack_from(">I", content, at)[0]
        if at + 12 + length > len(content):
            break
        out += chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length])
        at += 12 + length
    return out + content[at:]


def damage_pixels(content: bytes, mutations: list[Mutation]) -> bytes:
    """A PNG with damage to its filtered rows, which are deflated again: past all checksums."""
    head, at, packed = content[:8], 8, b""
    while at + 12 <= len(content):
        length = struct.unpack_from(">I", content, at)[0]
        if content[at + 4 : at + 8] == b"IDAT":
            packed += content[at + 8 : at + 8 + length]
        elif not packed:
            head += content[at : at + 12 + length]
        at += 12 + length
    rows = damage(zlib.decompress(packed), mutations)
    return head + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def redeclare(content: bytes, size: tuple[int, int], depth: int, colour: int, interlace: int) -> bytes:
    """A PNG whose header says something else, its checksum in order."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    return content[:8] + chunk(b"IHDR", header) + content[33:]


# Good files ---------------------------------------------------------------------------------------


def encoded(image: np.ndarray, suffix: str, *options: int) -> bytes:
    """By OpenCV."""
    return cv2.imencode(suffix, image, options)[1].tobytes()


def pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    """By Pillow."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def dicom(syntax: uid.UID | str, bits: int = 12, **tags: object) -> bytes:
    """A DICOM mammogram; a syntax given as text is compressed by gdcm."""
    image = breast(bits)
    dataset = make_dicom(image, bits, **tags)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "image.dcm")
        if syntax == uid.JPEGBaseline8Bit:
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.PixelData = encapsulate([encoded(image, ".jpg")])
            dataset["PixelData"].VR = "OB"
        elif isinstance(syntax, uid.UID) and syntax.is_compressed and not syntax.is_deflated:
            dataset.compress(syntax, generate_instance_uid=False)
        elif isinstance(syntax, uid.UID):
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset["PixelData"].VR = "OW"
        save(dataset, path)
        if not isinstance(syntax, uid.UID):
            recode(path, syntax)
        return path.read_bytes()


def make_sources() -> dict[str, Callable[[], bytes]]:
    """Name -> how that good file is made; the part before '_' is its format."""
    grey8, grey16 = breast(8), breast(16)
    rgb8, rgb16 = np.dstack([grey8] * 3), np.dstack([grey16] * 3)
    tinted = np.dstack([grey8, grey8 // 2, grey8 // 3])
    as_float = grey16.astype(np.float32)
    holed = np.where(grey16 > 40000, np.nan, as_float)
    turned = Image.Exif()
    turned[0x0112] = 6  # Orientation: turn right to view
    view, pages = Image.fromarray, {"save_all": True, "append_images": [Image.fromarray(grey8)]}
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    voi = {"WindowCenter": 1800, "WindowWidth": 1500}
    return {
        "png_grey8": lambda: encoded(grey8, ".png"),
        "png_grey16": lambda: encoded(grey16, ".png"),
        "png_rgb8": lambda: encoded(rgb8, ".png"),
        "png_rgb16": lambda: encoded(rgb16, ".png"),
        "png_tinted": lambda: encoded(tinted, ".png"),
        "png_alpha8": lambda: encoded(np.dstack([rgb8, grey8]), ".png"),
        "png_alpha16": lambda: encoded(np.dstack([rgb16, grey16]), ".png"),
        "png_palette": lambda: pillow(view(tinted).quantize(64), "PNG"),
        "png_greyalpha": lambda: pillow(view(grey8).convert("LA"), "PNG"),
        "png_bilevel": lambda: pillow(view(grey8).convert("1"), "PNG"),
        "png_interlaced8": lambda: interlaced_png(grey8),
        "png_interlaced16": lambda: interlaced_png(grey16),
        "png_constant": lambda: encoded(np.full((96, 80), 77, np.uint8), ".png"),
        "png_1x1": lambda: encoded(grey8[:1, :1], ".png"),
        "png_turned": lambda: pillow(view(grey8), "PNG", exif=turned),
        "tiff_grey8": lambda: pillow(view(grey8), "TIFF"),
        "tiff_grey16": lambda: pillow(view(grey16), "TIFF"),
        "tiff_lzw": lambda: encoded(grey16, ".tif", cv2.IMWRITE_TIFF_COMPRESSION, 5),
        "tiff_deflate": lambda: pillow(view(grey8), "TIFF", compression="tiff_deflate"),
        "tiff_packbits": lambda: pillow(view(grey8), "TIFF", compression="packbits"),
        "tiff_jpeg": lambda: pillow(view(rgb8), "TIFF", compression="jpeg"),
        "tiff_fax": lambda: pillow(view(grey8).convert("1"), "TIFF", compression="group4"),
        "tiff_float": lambda: pillow(view(as_float), "TIFF"),
        "tiff_nan": lambda: pillow(view(holed.astype(np.float32)), "TIFF"),
        "tiff_int32": lambda: pillow(view(grey16.astype(np.int32)), "TIFF"),
        "tiff_pages": lambda: pillow(view(grey8), "TIFF", **pages),
        "tiff_rgb16": lambda: encoded(rgb16, ".tif"),
        "tiff_palette": lambda: pillow(view(tinted).quantize(64), "TIFF"),
        "jpeg_grey": lambda: encoded(grey8, ".jpg"),
        "jpeg_rgb": lambda: encoded(tinted, ".jpg"),
        "jpeg_progressive": lambda: encoded(rgb8, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "jpeg_turned": lambda: pillow(view(grey8), "JPEG", exif=turned),
        "jpeg_cmyk": lambda: pillow(view(rgb8).convert("CMYK"), "JPEG"),
        "pgm_8": lambda: encoded(grey8, ".pgm"),
        "pgm_16": lambda: encoded(grey16, ".pgm"),
        "pgm_text": lambda: encoded(grey8, ".pgm", cv2.IMWRITE_PXM_BINARY, 0),
        "dicom_explicit": lambda: dicom(uid.ExplicitVRLittleEndian, **voi),
        "dicom_implicit": lambda: dicom(uid.ImplicitVRLittleEndian, 16),
        "dicom_bigendian": lambda: dicom(uid.ExplicitVRBigEndian),
        "dicom_deflated": lambda: dicom(uid.DeflatedExplicitVRLittleEndian),
        "dicom_inverted": lambda: dicom(uid.ExplicitVRLittleEndian, **inverted),
        "dicom_rle": lambda: dicom(uid.RLELossless),
        "dicom_jpegls": lambda: dicom(uid.JPEGLSLossless),
        "dicom_jpeg2000": lambda: dicom(uid.JPEG2000Lossless),
        "dicom_jpeg": lambda: dicom(uid.JPEGBaseline8Bit, 8),
        "dicom_lossless": lambda: dicom("JPEGLosslessProcess14_1"),
    }  # fmt: skip


@functools.cache
def sources() -> dict[str, bytes]:
    """Name -> bytes of each good file."""
    return {name: make() for name, make in make_sources().items()}


SUFFIX = {"png": ".png", "tiff": ".tif", "jpeg": ".jpg", "pgm": ".pgm", "dicom": ".dcm"}


# Damage -------------------------------------------------------------------------------------------


def damage(content: bytes, mutations: list[Mutation]) -> bytes:
    """Bytes with mutations; places wrap around, negative ones count from the end."""
    data = bytearray(content)
    for kind, place, argument in mutations:
        at = place % max(1, len(data))
        count = int.from_bytes(argument[:2], "big")
        if kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + count]
        elif kind == "insert":
            data[at:at] = argument
        elif kind == "poke":
            data[at : at + len(argument)] = argument
        elif kind == "flip" and data:
            data[at] ^= 1 << (count % 8)
        elif kind == "zero":
            data[at : at + count] = bytes(len(data[at : at + count]))
        elif kind == "repeat":
            data[at:at] = data[at : at + count]
        elif kind == "magic":
            data[: len(argument)] = argument
    return bytes(data)


# Bombs --------------------------------------------------------------------------------------------


def tiff_bomb() -> bytes:
    """A deflated TIFF of 20,000 x 20,000 px in 2 MB."""
    strip = zlib.compress(bytes(20_000 * 1000), 9)
    tags = [
        (256, 4, 1, 20_000), (257, 4, 1, 20_000), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
        (273, 4, 20, 300), (277, 3, 1, 1), (278, 4, 1, 1000), (279, 4, 20, 400),
    ]  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    head += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    offsets = struct.pack("<20I", *(600 + number * len(strip) for number in range(20)))
    lengths = struct.pack("<20I", *[len(strip)] * 20)
    return head.ljust(300, b"\0") + offsets.ljust(100, b"\0") + lengths.ljust(200, b"\0") + strip * 20


def deflated_bomb() -> bytes:
    """A deflated DICOM file of 1 MB that inflates to 1 GB."""
    content = sources()["dicom_deflated"]
    start = 144 + int.from_bytes(content[140:144], "little")
    body = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    packed = packer.compress(body) + packer.flush(zlib.Z_FULL_FLUSH)
    return content[:start] + packed + deflated_zeros(10**9)


def oversized_jpeg2000() -> bytes:
    """JPEG 2000 in DICOM whose code stream claims 60,000 x 60,000 px."""
    content = bytearray(sources()["dicom_jpeg2000"])
    at = content.index(b"\xff\x51") + 6  # SIZ marker: Xsiz, Ysiz, offsets, then the tile's size
    content[at : at + 8] = struct.pack(">II", 60_000, 60_000)
    content[at + 16 : at + 24] = struct.pack(">II", 60_000, 60_000)
    return bytes(content)


def endless_chunk(content: bytes) -> bytes:
    """A PNG whose chunk behind the header is said to be of 2 GiB."""
    header = 8 + 25
    return content[:header] + b"\x7f\xff\xff\xff" + content[header + 4 :]


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "30,000 x 30,000 grey PNG": (".png", lambda: png_bomb(30_000, 30_000)),
    "12,000 x 12,000 RGBA PNG of 16 bits": (".png", lambda: png_bomb(12_000, 12_000, 16, 6)),
    "20,000 x 20,000 palette PNG of 1 bit": (".png", lambda: png_bomb(20_000, 20_000, 1, 3)),
    "largest grey PNG of 16 bits": (".png", lambda: png_bomb(12_240, 12_240, 16)),
    "largest RGB PNG of 8 bits": (".png", lambda: png_bomb(7070, 7070, 8, 2)),
    "largest RGBA PNG of 16 bits": (".png", lambda: png_bomb(6120, 6120, 16, 6)),
    "100,000 x 1 PNG": (".png", lambda: png_bomb(100_000, 1)),
    "1 x 100,000 PNG": (".png", lambda: png_bomb(1, 100_000)),
    "100,000 x 100 PNG": (".png", lambda: png_bomb(100_000, 100)),
    "2**31 x 2**31 PNG": (".png", lambda: png((2**31 - 1,) * 2, 8, 0, b"")),
    # Found by the fuzzer: OpenCV 5.0 took the 2 GiB.
    "2 GiB of pixels in 80 bytes of png": (".png", lambda: endless_chunk(png((80, 96), 8, 0, b""))),
    "20,000 x 20,000 TIFF": (".tif", tiff_bomb),
    "65,500 x 65,500 JPEG": (
        ".jpg",
        lambda: sources()["jpeg_grey"].replace(b"\x08\x00\x60\x00\x50", b"\x08\xff\xdc\xff\xdc"),
    ),
    "99,999 x 99,999 PGM": (".pgm", lambda: b"P5 99999 99999 255\n" + bytes(100)),
    "1 GB deflated DICOM": (".dcm", deflated_bomb),
    "DICOM of 65,535 x 65,535 px": (
        ".dcm",
        lambda: (
            sources()["dicom_explicit"]
            .replace(b"\x28\x00\x10\x00US\x02\x00\x60\x00", b"\x28\x00\x10\x00US\x02\x00\xff\xff")
            .replace(b"\x28\x00\x11\x00US\x02\x00\x50\x00", b"\x28\x00\x11\x00US\x02\x00\xff\xff")
        ),
    ),
    "JPEG 2000 of 60,000 x 60,000 px in DICOM": (".dcm", oversized_jpeg2000),
}
