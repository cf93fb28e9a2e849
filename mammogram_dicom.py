"""Read one DICOM mammogram: grey values with the breast bright on dark, and what its header says.

    pixels, header = read_dicom("image.dcm")            # stored values, nothing clipped
    pixels, header = read_dicom("image.dcm", "voi")     # as the manufacturer meant it to be looked at

pydicom reads the file; the pixels of compressed files are decoded by gdcm (JPEG, JPEG Lossless,
JPEG-LS, JPEG 2000), openjpeg (JPEG 2000, HTJ2K) and CharLS (JPEG-LS), whichever is installed.
Only the keys of HEADER leave the file: no name, number, date or institution gets into a value or a
message. Sections of the DICOM standard (PS3.3) are named where a rule comes from.

Contents
    1 Opening    open_dicom, check_inflation, check_tags, check_is_mammogram
    2 Header     laterality, view, spacing, implant, doubts
    3 Pixels     padding, rescale, window, polarity: one table from stored to grey value
    4 Reading    read_dicom
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, get_decoder, pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    RLELossless,
)

from byol_mammo import acquisition
from byol_mammo.images import MAX_SAMPLES
from byol_mammo.spacing import judge_spacing

MODALITIES = {"", "MG", "CR", "DX", "RG", "OT"}  # digitised film and old archives are not all MG
OTHERS = {"US", "CT", "MR", "PT", "NM", "SR", "PR", "KO", "SEG", "DOC", "XA"}  # named in messages
TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"  # Breast Tomosynthesis Image Storage
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame kinds, .7.1 to .7.4
MAGNIFIED_FROM = 1.3  # EstimatedRadiographicMagnificationFactor; contact views have 1.0 to 1.1
HEADER = {  # what leaves the header: key -> meaning
    "laterality": "L or R",
    "view": "CC, MLO, ML ...",
    "view_modifier": "spot, magnified, implant_displaced, joined by '+'",
    "spacing_mm": "mm per pixel at the detector (ImagerPixelSpacing, else PixelSpacing)",
    "implant": "1, 0 or unknown",
    "modality": "MG, or what else",
    "photometric": "MONOCHROME1 or MONOCHROME2",
    "bits_stored": "bits per pixel",
    "intent": "FOR PRESENTATION or FOR PROCESSING (raw detector values)",
    "relationship": "LIN, LOG or DISP: pixel value to X-ray intensity",
    "compression": "name of the transfer syntax",
    "padding": "share of pixels that were padding and are now 0",
    **{name: column.meaning for name, column in acquisition.COLUMNS.items()},
    "doubts": "what problems.csv is to say: 'check: detail', joined by ' | '",
}
# Without these pixels cannot be told from each other, and no default is the standard's: all are of type
# 1 (PS3.3 C.7.6.3.1.1).
NEEDED = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored"),
    *("HighBit", "PixelRepresentation", "PixelData"),
)
# Series, protocols and image types of pages that scanners and workstations send along with mammograms.
DOSE_PAGE = re.compile(
    r"DOSE[ _^-]*(REPORT|INFO|SUMMARY|RECORD|PAGE|SHEET)|(RADIATION|PATIENT)[ _^-]*DOSE"
)
# ImageType of single images that show no breast as a mammogram does (PS3.3 C.8.11.7.1.4): stereotactic
# pairs and what else a biopsy takes, projections of tomosynthesis, and of contrast studies the image of
# high energy and what is computed of both. The one of low energy is a mammogram.
NO_SCREENING = re.compile(
    r"STEREO_.*|PREFIRE.*|POSTFIRE.*|POSTBIOPSY.*|POSTMARKER.*|TOMO_PROJ|TOMO_SCOUT|HIGH_ENERGY|"
    r"ADDITION|SUBTRACTION|RECOMBINED"
)
SYNTHETIC = "GENERATED_2D"  # computed of a tomosynthesis of the same view
BRIGHT_END = 0.9  # of the largest grey value; padding is taken for tissue where it goes over into such
TISSUE_OUTLINE = 0.1  # share of the outline of padding that does so, from which it is said
PAGE_INK = 0.3  # share of what is no background that has one grey value: print, in a breast it is < 0.05


class DicomError(Exception):
    """A file that is no usable mammogram; the message holds nothing from the header but codes."""


# 1 Opening ----------------------------------------------------------------------------------------


def open_dicom(path: str | Path) -> Dataset:
    """Read a DICOM file, also one without preamble or transfer syntax.

    Raises DicomError where it holds no image, and what pydicom raises on damaged bytes.
    """
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote header values
    check_inflation(path)
    try:
        dataset = dcmread(path)
    except InvalidDicomError:  # no preamble: only an image passes, not any file
        dataset = dcmread(path, force=True)
    if absent := [tag_name(name) for name in ("Rows", "Columns") if name not in dataset]:
        modality = text(dataset, "Modality")
        if modality in OTHERS:
            raise DicomError(f"modality is not mammography ({modality})")
        lacks = " and ".join(absent)
        raise DicomError(f"not a DICOM image inside, or the file is cut short: it lacks {lacks}")
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        uncompressed = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else uncompressed
    return dataset


def check_inflation(path: str | Path) -> None:
    """Refuse a deflated file that would fill the memory: pydicom inflates it as a whole.

    Raises DicomError.
    """
    with open(path, "rb") as file:
        head = file.read(1024)
        if DeflatedExplicitVRLittleEndian.encode() not in head:
            return
        if head[128:132] != b"DICM":
            raise DicomError("deflated, but without the preamble of a DICOM file")
        meta = read_file_meta_info(path)
        file.seek(144 + int(meta.FileMetaInformationGroupLength))  # behind preamble and meta group
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), 2 * MAX_SAMPLES + 1)
    if len(inflated) > 2 * MAX_SAMPLES:
        raise DicomError(f"inflates to more than {2 * MAX_SAMPLES} bytes")


def tag_name(keyword: str) -> str:
    """A tag as messages name it: Rows (0028,0010)."""
    tag = tag_for_keyword(keyword) or 0
    return f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"


def check_tags(dataset: Dataset) -> None:
    """Refuse a header that leaves open how its pixels are stored. Raises DicomError."""
    absent = [name for name in NEEDED if name not in dataset or dataset[name].is_empty]
    if absent:
        pixels = "holds no pixels of 8 or 16 bits: " if "PixelData" in absent else ""
        names = ", ".join(map(tag_name, absent))
        raise DicomError(f"{pixels}missing or empty tag, for which nothing can stand in: {names}")
    allocated, stored, high = (
        int(dataset[name].value) for name in ("BitsAllocated", "BitsStored", "HighBit")
    )
    if not 1 <= stored <= high + 1 <= allocated:  # PS3.5 8.1.1
        raise DicomError(
            f"impossible bits: {tag_name('HighBit')} {high} with {tag_name('BitsStored')} {stored} of "
            f"{tag_name('BitsAllocated')} {allocated}"
        )


def is_dose_page(dataset: Dataset) -> bool:
    """Whether a secondary capture, as scanned film is one too, is named as a page about dose."""
    told = ("SeriesDescription", "ProtocolName", "ImageType", "ImageComments", "DocumentTitle")
    captured = text(dataset, "SOPClassUID").startswith(SECONDARY_CAPTURE)
    return captured and any(DOSE_PAGE.search(text(dataset, keyword)) for keyword in told)


def image_type(dataset: Dataset) -> list[str]:
    """The values of ImageType in capitals."""
    return re.findall(r"[A-Z0-9_]+", text(dataset, "ImageType"))


def check_is_mammogram(dataset: Dataset) -> None:
    """Refuse what is not one grey image of a plausible size. Raises DicomError."""
    modality = text(dataset, "Modality")
    if modality not in MODALITIES:
        raise DicomError("modality is not mammography" + f" ({modality})" * (modality in OTHERS))
    if is_dose_page(dataset):
        raise DicomError("dose report page (secondary capture), not a mammogram")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise DicomError(
            f"multi-frame ({frames} frames): tomosynthesis, cine and several images in one file are not "
            "laid out; save a mammogram among them as a file of its own"
        )
    if text(dataset, "SOPClassUID") == TOMOSYNTHESIS:
        raise DicomError("tomosynthesis is not laid out")
    check_tags(dataset)
    if kinds := [value for value in image_type(dataset) if NO_SCREENING.fullmatch(value)]:
        raise DicomError(f"image type {kinds[0]}: a step of a biopsy, of tomosynthesis or of contrast")
    if read_view(dataset)[0] == "SPECIMEN":
        raise DicomError("tissue that was taken out (specimen), not a breast")
    if dataset.SamplesPerPixel != 1:
        raise DicomError("colour image: a screen shot or report, not a mammogram")
    if text(dataset, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise DicomError("photometric interpretation is neither MONOCHROME1 nor MONOCHROME2")
    if dataset.get("BitsAllocated") not in (8, 16):
        raise DicomError("pixels are not stored in 8 or 16 bits")
    if not 0 < dataset.Rows * dataset.Columns <= MAX_SAMPLES:
        raise DicomError(f"declares {dataset.Rows} x {dataset.Columns} pixels")


# 2 Header -----------------------------------------------------------------------------------------

# PS3.16 CID 4014, in SNOMED CT and in the SNOMED RT codes of older files.
VIEWS = {
    "399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO",
    "399260004": "ML", "R-10224": "ML", "399352003": "LM", "R-10228": "LM",
    "399099002": "LMO", "R-10230": "LMO", "399196006": "FB", "R-10244": "FB",
    "399192008": "XCCL", "R-1024A": "XCCL", "399101009": "XCCM", "R-1024B": "XCCM",
    "399188001": "SIO", "R-102D0": "SIO", "441555000": "ISO", "R-40AAA": "ISO",
    "127457009": "SPECIMEN", "G-8310": "SPECIMEN",
}  # fmt: skip
# PS3.16 CID 4015, those that change the scale or what is seen of the breast.
MODIFIERS = {
    "399055006": "spot", "R-102D7": "spot", "399163009": "magnified", "R-102D6": "magnified",
    "399209000": "implant_displaced", "R-102D5": "implant_displaced",
}  # fmt: skip
# The same in words, of code meanings, paddles and view positions (MAG CC, SPOT); the ACR's labels put M
# for magnified and S for spot before the view (MCC, SMLO).
MODIFIER_WORDS = {"magnified": re.compile(r"\bMAG(N\w*)?\b"), "spot": re.compile(r"\bSPOT\b")}
VIEW_LABELS = {f"{sign}{view}": name for sign, name in (("M", "magnified"), ("S", "spot"))
          for view in ("CC", "MLO", "ML", "LM")}  # fmt: skip


def text(dataset: Dataset, keyword: str) -> str:
    """A header value as stripped upper-case text; '' where it is absent, empty or malformed."""
    return as_written(dataset, keyword).upper()


def as_written(dataset: Dataset, keyword: str) -> str:
    """The same as it is written."""
    try:
        value = dataset.get(keyword)
    except Exception:  # pydicom parses a value when it is asked for, and raises almost anything
        return ""
    return "" if value is None else str(value).strip()


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """A header value as numbers; [] where it is absent, empty or malformed."""
    try:
        return [float(value) for value in np.ravel(dataset.get(keyword))]
    except Exception:
        return []


def read_laterality(dataset: Dataset) -> str:
    """L, R or ''. ImageLaterality is the image's own; Laterality is the series' (PS3.3 C.8.11.7)."""
    sides = (text(dataset, keyword) for keyword in ("ImageLaterality", "Laterality"))
    return next((side for side in sides if side in ("L", "R")), "")


def read_view(dataset: Dataset) -> tuple[str, str]:
    """View and modifiers, from ViewCodeSequence and where that says nothing from ViewPosition."""
    views = list(dataset.get("ViewCodeSequence") or [])
    # Some writers put the modifiers beside the view instead of into it.
    modifiers = [
        item for view in [*views, dataset] for item in view.get("ViewModifierCodeSequence") or []
    ]
    named = [VIEWS.get(text(item, "CodeValue"), "") for item in views]
    position = text(dataset, "ViewPosition")
    view = next(filter(None, named), position if position in {*VIEWS.values(), "XCC"} else "")
    found = {MODIFIERS.get(text(item, "CodeValue"), "") for item in modifiers}
    found.add(VIEW_LABELS.get(position, ""))
    words = [text(item, "CodeMeaning") for item in modifiers]
    words += [position, text(dataset, "PaddleDescription")]
    for name, pattern in MODIFIER_WORDS.items():
        found |= {name} if any(map(pattern.search, words)) else set()
    if max(numbers(dataset, "EstimatedRadiographicMagnificationFactor"), default=1) >= MAGNIFIED_FROM:
        found.add("magnified")
    return view, "+".join(sorted(found - {""}))


def read_spacing(dataset: Dataset) -> tuple[str, str]:
    """mm per pixel, '' if unknown, and what is doubtful about it: at the detector, else as calibrated,
    else of the film scanner."""
    doubts = []
    for keyword in ("ImagerPixelSpacing", "PixelSpacing", "NominalScannedPixelSpacing"):
        values = numbers(dataset, keyword)
        spacing, doubt = judge_spacing(values if len(values) == 2 else [])
        doubts += [f"{tag_name(keyword)} {doubt}"] if doubt else []
        if spacing:
            return f"{spacing:.6g}", "; ".join(doubts)
    return "", "; ".join(doubts)


def is_unnamed_capture(dataset: Dataset, header: dict[str, str]) -> bool:
    """Whether a secondary capture's header has nothing of a mammogram's."""
    captured = text(dataset, "SOPClassUID").startswith(SECONDARY_CAPTURE)
    named = any(header[name] for name in ("laterality", "view", "spacing_mm"))
    return captured and not named and text(dataset, "BodyPartExamined") != "BREAST"


def read_header(dataset: Dataset) -> dict[str, str]:
    """The values of HEADER, all but `padding`; `doubts` so far."""
    view, modifier = read_view(dataset)
    spacing, doubt = read_spacing(dataset)
    implant = {"YES": "1", "NO": "0"}.get(text(dataset, "BreastImplantPresent"), "")
    intent = text(dataset, "PresentationIntentType")
    relationship = text(dataset, "PixelIntensityRelationship")
    taken, odd = acquisition.of_header(lambda keyword: as_written(dataset, keyword))
    doubts = [f"spacing: {doubt}"] * bool(doubt) + [f"acquisition: {said}" for said in odd]
    return {
        "laterality": read_laterality(dataset),
        "view": view,
        "view_modifier": modifier,
        "spacing_mm": spacing,
        "implant": "1" if "implant_displaced" in modifier else implant,
        "modality": text(dataset, "Modality"),
        "photometric": text(dataset, "PhotometricInterpretation"),
        "bits_stored": str(dataset.BitsStored),
        "intent": intent if intent in ("FOR PRESENTATION", "FOR PROCESSING") else "",
        "relationship": relationship if relationship in ("LIN", "LOG", "DISP") else "",
        "compression": dataset.file_meta.TransferSyntaxUID.name,
        **taken,
        "doubts": " | ".join(doubts),
    }


# 3 Pixels -----------------------------------------------------------------------------------------
# Padding, rescale, window and inversion each map one stored value to another. They are worked out
# once for every value between the image's extremes; the image is then a single look-up.


def padding_limits(dataset: Dataset) -> tuple[int, int] | None:
    """Smallest and largest padding value (PS3.3 C.7.5.1.1.2), in stored values; None without one."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return None
    last = dataset.get("PixelPaddingRangeLimit")
    values = [int(first), int(first if last is None else last)]
    if dataset.PixelRepresentation:  # some writers give a signed value's bits as unsigned
        half = 2 ** (dataset.BitsAllocated - 1)
        values = [value - 2 * half if value >= half else value for value in values]
    return min(values), max(values)


def air_is_high(dataset: Dataset) -> bool:
    """Whether large values are the dark ones, so that the image must be inverted.

    Images for presentation say so by MONOCHROME1 (PS3.3 C.7.6.3.1.2), raw ones by the sign of the
    relation to X-ray intensity where they state it (C.8.11.3.1.2): air lets all through.
    """
    sign = dataset.get("PixelIntensityRelationshipSign")
    if text(dataset, "PresentationIntentType") == "FOR PROCESSING" and sign in (1, -1):
        return sign == 1
    return text(dataset, "PhotometricInterpretation") == "MONOCHROME1"


def windowed(stored: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, int]:
    """Stored values through modality and VOI LUT or first window, and the largest possible result.

    pydicom's functions, so LINEAR, LINEAR_EXACT and SIGMOID as in PS3.3 C.11.2.1. A window's result is
    spread over 16 bits: the steep part of a sigmoid would lose grey levels in the 12 it came from.
    """
    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        descriptor = dataset.VOILUTSequence[0].LUTDescriptor
        return apply_voi_lut(np.rint(values).astype(np.int64), dataset), 2 ** int(descriptor[2]) - 1
    shown = apply_windowing(values, dataset)
    low, high = apply_windowing(np.array([-1e30, 1e30]), dataset)  # the window's two plateaus
    return np.rint((shown - low) / (high - low) * 65535).astype(np.int64), 65535


def grey_table(stored: np.ndarray, dataset: Dataset, window: str, padding: np.ndarray) -> np.ndarray:
    """Grey values (int64, from 0) of the consecutive stored values given; padding becomes 0.

    Without a window a linear rescale is left out: it shifts and scales all values alike, and a broken
    slope would have to be rounded. A negative slope and a look-up table do change the image.
    """
    top, slope = 2**dataset.BitsStored - 1, float(dataset.get("RescaleSlope") or 1)
    has_window = bool(numbers(dataset, "WindowCenter") and numbers(dataset, "WindowWidth"))
    invert = air_is_high(dataset)
    if window == "voi" and (dataset.get("VOILUTSequence") or has_window):
        values, top = windowed(stored, dataset)
    elif dataset.get("ModalityLUTSequence"):
        values = apply_modality_lut(stored, dataset)
        top = 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:
        values = stored
        invert ^= slope < 0
    values = values.astype(np.int64)
    if invert:
        # About the largest value that can be, or that is there beside padding: so that air next to
        # padding becomes 0 as well (Planmed Nuance: MONOCHROME1, padding 10000 of 16383).
        real = values[~padding]
        values = (int(real.max()) if padding.any() and real.size else max(top, values.max())) - values
    if not padding.all():
        values = values - min(0, int(values[~padding].min()))
    return np.where(padding, 0, values)


def stored_values(dataset: Dataset) -> np.ndarray:
    """The stored values (H, W) of a data set, compressed or not. Raises DicomError."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
        if not decoder.is_available:
            raise DicomError(f"no decoder for {syntax.name}; pip install -r requirements.txt")
        if syntax.is_encapsulated:
            check_frame(dataset)
        # gdcm ends the whole process at some damaged files, so it comes last.
        names = [name for name in ("pyjpegls", "pylibjpeg") if name in decoder.available_plugins]
        plugin = names[0] if names else ""
        if dataset.get("HighBit", dataset.BitsStored - 1) == dataset.BitsStored - 1:
            return pixel_array(dataset, raw=True, decoding_plugin=plugin)
        return aligned(dataset, plugin)
    except (DicomError, MemoryError):
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        if syntax == JPEGExtended12Bit and dataset.BitsStored > 8:  # libjpeg alone reads it; GPL 3
            raise DicomError("12-bit JPEG Extended: pip install pylibjpeg-libjpeg (GPL)") from None
        raise DicomError(f"cannot be decoded: {syntax.name} ({type(error).__name__})") from None


def aligned(dataset: Dataset, plugin: str) -> np.ndarray:
    """Stored values whose highest bit is not BitsStored - 1 (PS3.5 8.1.1): bits beside them are cut off.

    pydicom takes the lowest bits whatever HighBit says. Raises DicomError.
    """
    allocated, stored, high = dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:  # a JPEG holds values or cells, nothing tells
        raise DicomError(
            f"compressed pixels that can be read two ways: {tag_name('HighBit')} {high} with "
            f"{tag_name('BitsStored')} {stored}; decompress the file (gdcmconv --raw)"
        )
    cells = pixel_array(dataset, raw=True, decoding_plugin=plugin, correct_unused_bits=False)
    return (cells << (allocated - 1 - high)) >> (allocated - stored)


def grey_values(dataset: Dataset, window: str = "none") -> tuple[np.ndarray, float, bool]:
    """Pixels (H, W) uint8 or uint16, breast bright on dark, the share that was padding, and whether that
    may have been tissue.

    uint8 where at most 8 bits are stored. Raises DicomError.
    """
    stored = stored_values(dataset)
    low, high = int(stored.min()), int(stored.max())
    limits, padded = padding_limits(dataset), None
    steps = np.arange(low, high + 1)
    padding = np.zeros(len(steps), bool)
    if limits and limits[0] <= high and limits[1] >= low:
        padding = (steps >= limits[0]) & (steps <= limits[1])
        padded = (stored >= limits[0]) & (stored <= limits[1])
        if not padded.all():  # the table runs between the extremes of what is not padding
            low_real = int(stored.min(where=~padded, initial=high))
            high_real = int(stored.max(where=~padded, initial=low))
            padding |= (steps < low_real) | (steps > high_real)
    try:
        table = grey_table(steps, dataset, window, padding)
    except Exception as error:
        raise DicomError(
            f"its window or look-up table cannot be applied ({type(error).__name__})"
        ) from None
    if table.max() > 65535:
        raise DicomError("grey values need more than 16 bits")
    narrow = dataset.BitsStored <= 8 and table.max() <= 255
    pixels = look_up(stored, low, table).astype(np.uint8 if narrow else np.uint16, copy=False)
    if padded is None:
        return pixels, 0.0, False
    return pixels, float(padded.mean()), is_tissue(padded, stored, pixels)


def is_tissue(padded: np.ndarray, stored: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether what counts as padding (H, W) bool goes over into the brightest tissue, as where tissue
    saturates at the padding's value.

    Padding ends in a step, or beside air; its neighbours then are not both among the brightest of the
    image and stored near the padding's value.
    """
    outline = cv2.dilate(padded.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool) & ~padded
    bright = pixels[outline] >= BRIGHT_END * max(1, int(pixels.max()))
    if not bright.any():
        return False
    real, value, beside = stored[~padded], stored[padded], stored[outline].astype(np.int64)
    span = (1 - BRIGHT_END) * max(1, int(real.max()) - int(real.min()))
    near = (beside >= int(value.min()) - span) & (beside <= int(value.max()) + span)
    return bool((near & bright).mean() > TISSUE_OUTLINE)


def is_print(pixels: np.ndarray) -> bool:
    """Whether (H, W) pixels are a page: letters of one grey value on a background of another."""
    counts = np.sort(np.bincount(pixels.ravel()))
    rest = pixels.size - int(counts[-1])
    return len(counts) > 1 and int(counts[-2]) > PAGE_INK * max(1, rest)


# SOF markers of JPEG (without DHT, JPG and DAC, which lie between them) and of JPEG-LS.
FRAME_HEADERS = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}
JPEG_2000_START = b"\xff\x4f\xff\x51"  # SOC and SIZ, ISO 15444-1 A.5.1; in other syntaxes by chance


def check_frame(dataset: Dataset) -> None:
    """Refuse a compressed image that is not of the header's size, before its decoder makes room for it.

    Raises DicomError; a frame whose own header is not found is left to the decoder.
    """
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    jpeg_2000 = "2000" in dataset.file_meta.TransferSyntaxUID.name
    found: tuple[int, ...] = ()
    if frame[:2] == b"\xff\xd8":  # JPEG, JPEG-LS: segments up to the frame header, ISO 10918-1 B.2.2
        at = 2
        while at + 10 <= len(frame) and not found:
            marker, length, _, height, width, components = struct.unpack_from(">HHBHHB", frame, at)
            if marker in FRAME_HEADERS:
                found = (height, width, components)
            at += 2 + length
    elif jpeg_2000 and (start := frame.find(JPEG_2000_START)) >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        found = (bottom - top, right - left, *struct.unpack_from(">H", frame, start + 40))
    if found and found != (dataset.Rows, dataset.Columns, 1):
        raise DicomError("its compressed image is not of the size that the header says")


def look_up(stored: np.ndarray, low: int, table: np.ndarray) -> np.ndarray:
    """table[stored - low] as uint16; shifts and inversions, being most, in a tenth of the time."""
    first, wrapped = int(table[0]), stored.astype(np.uint16, copy=False)  # all modulo 65,536
    steps = np.unique(np.diff(table)).tolist()
    if steps == [1]:
        return wrapped + np.uint16((first - low) % 65536)
    if steps == [-1]:
        return np.uint16((first + low) % 65536) - wrapped
    return table.astype(np.uint16)[wrapped - np.uint16(low % 65536)]


# 4 Reading ----------------------------------------------------------------------------------------


def read_dicom(path: str | Path, window: str = "none") -> tuple[np.ndarray, dict[str, str]]:
    """Pixels (H, W) uint8 or uint16, breast bright on dark, and the values of HEADER.

    window "none" keeps every stored value apart; "voi" applies the VOI LUT or the first window.
    Raises DicomError, whose message quotes no identifier, and OSError.
    """
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("ignore")  # pydicom's warnings quote header values
        try:
            dataset = open_dicom(path)
            check_is_mammogram(dataset)
            header = read_header(dataset)
            pixels, share, tissue = grey_values(dataset, window)
            doubts = [header["doubts"]]
            if is_unnamed_capture(dataset, header):
                if is_print(pixels):
                    raise DicomError("a page of print (secondary capture), not a mammogram")
                doubts.append("page: a secondary capture without side, view, body part or pixel size")
            if SYNTHETIC in image_type(dataset):
                doubts.append(
                    f"synthetic: {SYNTHETIC}, computed of tomosynthesis; may repeat a view that is here"
                )
            if tissue:
                doubts.append(
                    f"padding in tissue: {tag_name('PixelPaddingValue')} is that of bright tissue"
                )
        except (DicomError, MemoryError):
            raise
        except Exception as error:  # pydicom parses each value when it is asked for
            if isinstance(error, OSError) and error.errno:  # the disk's, not pydicom's
                raise
            raise DicomError(f"its header cannot be read ({type(error).__name__})") from None
    return pixels, header | {"padding": f"{share:.4f}", "doubts": " | ".join(filter(None, doubts))}
