"""mammogram_dicom: transfer syntaxes, polarity, padding, windows and headers against their truth."""

from __future__ import annotations

import struct
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydicom import Dataset, Sequence, dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, pixel_array
from pydicom.sr.codedict import codes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mammogram_dicom as dicom  # noqa: E402
import prepare_dataset as prep  # noqa: E402

MAMMOGRAPHY = "1.2.840.10008.5.1.4.1.1.1.2"  # Digital Mammography X-Ray Image Storage, presentation
IDENTIFIERS = {  # none of these may be found in anything that is written or printed
    "PatientName": "Doe^Secretly",
    "PatientID": "MRN-77341",
    "PatientBirthDate": "19530417",
    "StudyDate": "20190822",
    "AccessionNumber": "ACC-90125",
    "InstitutionName": "Hidden General Hospital",
    "ReferringPhysicianName": "Quack^Doctor",
    "OperatorsName": "Tech^Nician",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.4711",
    # Of the scanner and its place, beside what the manifest takes of it.
    "DeviceSerialNumber": "SN-55218873",
    "StationName": "MAMMO_ROOM_7",
    "DetectorID": "DET-88423-X",
    "GantryID": "GANTRY-6612",
    "InstitutionAddress": "13 Concealed Lane",
    "InstitutionalDepartmentName": "Ward Unmentioned",
    "DateOfLastDetectorCalibration": "20180305",
}


# Building blocks ----------------------------------------------------------------------------------


def breast(
    bits: int = 12, shape: tuple[int, int] = (96, 80), side: str = "L", seed: int = 0
) -> np.ndarray:
    """Noise in a half-ellipse on dark air, from 0 to the largest value: (H, W) uint8 or uint16."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = ((y - shape[0] / 2) / (0.4 * shape[0])) ** 2 + (x / (0.7 * shape[1])) ** 2 < 1
    noise = np.random.default_rng(seed).random(shape)
    image = np.where(inside, 0.4 + 0.6 * noise, 0.02 * noise)
    image[shape[0] // 2, 0], image[0, -1] = 1, 0
    image = np.rint(image * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)
    return image if side == "L" else np.ascontiguousarray(image[:, ::-1])


def make_dicom(pixels: np.ndarray, bits: int = 12, **tags: object) -> Dataset:
    """A mammogram's data set, uncompressed; keywords given replace or (None) remove the usual ones."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = MAMMOGRAPHY, uid.generate_uid(entropy_srcs=["test"])
    dataset.Modality, dataset.PresentationIntentType = "MG", "FOR PRESENTATION"
    dataset.ImageLaterality, dataset.ViewPosition = "L", "MLO"
    dataset.ImagerPixelSpacing = [0.07, 0.07]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored = 8 * pixels.dtype.itemsize, bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that pydicom finds odd are what some tests are for
        for keyword, value in {**IDENTIFIERS, **tags}.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
    return dataset


def table(values: np.ndarray, bits: int) -> Sequence:
    """A look-up table's sequence for stored values from 0."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), 0, bits])
    item.add_new("LUTData", "US", values.tolist())
    return Sequence([item])


def save(dataset: Dataset, path: Path) -> Path:
    """Write a data set as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    return path


def read(dataset: Dataset, folder: Path, window: str = "none") -> np.ndarray:
    """The pixels that the program makes of a data set."""
    return dicom.read_dicom(save(dataset, folder / "image.dcm"), window)[0]


def coded(value: str, scheme: str = "SCT", **other: object) -> Dataset:
    """A code sequence item."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, "meaning"
    for keyword, content in other.items():
        setattr(item, keyword, content)
    return item


# Transfer syntaxes --------------------------------------------------------------------------------


def recode(path: Path, syntax: str) -> None:
    """Compress a file by gdcm, for what pydicom does not encode."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(
    "syntax",
    [
        *("ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian"),
        *("DeflatedExplicitVRLittleEndian", "RLELossless", "JPEGLSLossless", "JPEG2000Lossless"),
        *("JPEGLossless", "JPEGLosslessSV1"),
    ],
)
def test_lossless_syntaxes_give_the_pixels_exactly(tmp_path: Path, syntax: str, bits: int) -> None:
    truth = breast(bits)
    dataset = make_dicom(truth, bits)
    code = getattr(uid, syntax)
    path = tmp_path / "image.dcm"
    if syntax.startswith("JPEGLossless"):
        save(dataset, path)
        recode(path, "JPEGLosslessProcess14" + ("_1" if syntax.endswith("SV1") else ""))
    elif code.is_compressed and not code.is_deflated:
        dataset.compress(code, generate_instance_uid=False)
        save(dataset, path)
    else:
        dataset.file_meta.TransferSyntaxUID = code
        if syntax == "ExplicitVRBigEndian" and bits > 8:
            dataset.PixelData = truth.astype(">u2").tobytes()
        dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
        save(dataset, path)
    assert dcmread(path).file_meta.TransferSyntaxUID == code
    pixels, header = dicom.read_dicom(path)
    assert pixels.dtype == truth.dtype
    np.testing.assert_array_equal(pixels, truth)
    assert header["compression"] == code.name
    assert header["bits_stored"] == str(bits)


@pytest.mark.parametrize(
    ("syntax", "options", "error"),
    [("JPEGLSNearLossless", {"jls_error": 3}, 3), ("JPEG2000", {"j2k_cr": [4]}, 300)],
)
def test_lossy_syntaxes_stay_near(tmp_path: Path, syntax: str, options: dict, error: int) -> None:
    truth = breast()
    dataset = make_dicom(truth)
    dataset.compress(getattr(uid, syntax), generate_instance_uid=False, **options)
    difference = np.abs(read(dataset, tmp_path).astype(int) - truth)
    assert 0 < difference.max() <= error


def test_jpeg_baseline_is_what_opencv_decodes(tmp_path: Path) -> None:
    jpeg = cv2.imencode(".jpg", breast(8))[1]
    dataset = make_dicom(breast(8), 8)
    dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    dataset.PixelData = encapsulate([jpeg.tobytes()])
    dataset["PixelData"].VR = "OB"
    expected = cv2.imdecode(jpeg, cv2.IMREAD_UNCHANGED).astype(int)
    assert np.abs(read(dataset, tmp_path) - expected).max() <= 1  # two decoders may round otherwise


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"),
        *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm"),
        *("JPEGLSNearLossless_16.dcm", "JPEGLSNearLossless_08.dcm", "image_dfl.dcm", "JPEG2000.dcm"),
        *("CT_small.dcm", "J2K_pixelrep_mismatch.dcm", "693_J2KI.dcm", "examples_overlay.dcm"),
    ],
)
def test_files_of_pydicom(name: str) -> None:
    """Their values, from 0; these are no mammograms, so what is checked is the pixels' path alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dicom.open_dicom(get_testdata_file(name))
        reference = pixel_array(dataset, raw=True).astype(int)
        pixels, share, _ = dicom.grey_values(dataset)
    limits = dicom.padding_limits(dataset)
    padding = (reference >= limits[0]) & (reference <= limits[1]) if limits else reference < -(10**9)
    expected = np.where(padding, 0, reference - min(0, reference[~padding].min()))
    np.testing.assert_array_equal(pixels, expected)
    assert share == padding.mean()


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "JPGExtended.dcm", "rtplan.dcm"])
def test_unusable_files_of_pydicom_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "MODALITIES", {"MR", "NM"})
    expected = {
        "MR": "cannot be decoded",
        "JP": "pip install pylibjpeg-libjpeg",
        "rt": "not a DICOM image",
    }
    with pytest.raises(dicom.DicomError, match=expected[name[:2]]):
        dicom.read_dicom(get_testdata_file(name))


# Polarity and padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_monochrome1_is_inverted(tmp_path: Path, bits: int) -> None:
    truth = breast(bits)
    stored = (2**bits - 1 - truth.astype(int)).astype(truth.dtype)
    dataset = make_dicom(stored, bits, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read(dataset, tmp_path), truth)


def test_planmed_padding_becomes_air(tmp_path: Path) -> None:
    """Planmed Nuance: MONOCHROME1, 14 bits, air up to 9000, padding 10000."""
    truth = (breast(12) * 2).astype(np.uint16)
    stored = (9000 - truth).astype(np.uint16)
    stored[:, -20:] = 10000
    dataset = make_dicom(stored, 14, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=10000)
    truth[:, -20:] = 0
    pixels, header = dicom.read_dicom(save(dataset, tmp_path / "image.dcm"))
    assert stored[:, :-20].max() == 9000
    np.testing.assert_array_equal(pixels, truth)
    assert header["padding"] == "0.2500"


@pytest.mark.parametrize("limit", [4000, 4095])
def test_padding_range(tmp_path: Path, limit: int) -> None:
    truth = (breast() // 2).astype(np.uint16)
    stored = truth.copy()
    stored[:5], stored[5:8] = 4095, 4000
    dataset = make_dicom(stored, PixelPaddingValue=4095, PixelPaddingRangeLimit=limit)
    truth[:5], truth[5:8] = 0, 0 if limit == 4000 else 4000
    np.testing.assert_array_equal(read(dataset, tmp_path), truth)


@pytest.mark.parametrize("padding", [-2000, 63536])  # as a signed value, and its bits as unsigned
def test_signed_pixels_and_padding(tmp_path: Path, padding: int) -> None:
    truth = breast()
    stored = truth.astype(np.int16) - 1024
    stored[:10] = -2000
    dataset = make_dicom(stored, 16)
    dataset.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
    assert dicom.padding_limits(dataset) == (-2000, -2000)
    truth[:10] = 0
    pixels, share, _ = dicom.grey_values(dataset)
    np.testing.assert_array_equal(pixels, truth)
    assert share == 10 / 96


def test_padding_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    dataset = make_dicom(breast() // 2, PixelPaddingValue=4000)
    np.testing.assert_array_equal(read(dataset, tmp_path), breast() // 2)
    dataset.PixelData = np.full((96, 80), 4000, np.uint16).tobytes()
    assert read(dataset, tmp_path).max() == 0  # nothing but padding


@pytest.mark.parametrize(
    ("tags", "inverted"),
    [
        ({"RescaleSlope": -1, "RescaleIntercept": 4095}, True),
        ({"RescaleSlope": 0.37, "RescaleIntercept": -12}, False),
        (
            {"RescaleSlope": -1, "RescaleIntercept": 4095, "PhotometricInterpretation": "MONOCHROME1"},
            False,
        ),
        ({"PresentationIntentType": "FOR PROCESSING", "PixelIntensityRelationshipSign": 1}, True),
        ({"PresentationIntentType": "FOR PROCESSING", "PixelIntensityRelationshipSign": -1}, False),
        ({"PixelIntensityRelationshipSign": 1}, False),  # for presentation: the photometry counts
    ],
)
def test_rescale_and_relationship_decide_polarity(tmp_path: Path, tags: dict, inverted: bool) -> None:
    truth = breast()
    stored = (4095 - truth).astype(np.uint16) if inverted else truth
    np.testing.assert_array_equal(read(make_dicom(stored, **tags), tmp_path), truth)


def test_modality_table(tmp_path: Path) -> None:
    values = np.sort(np.random.default_rng(1).integers(0, 65536, 4096)).astype(np.uint16)
    dataset = make_dicom(breast(), ModalityLUTSequence=table(values, 16))
    np.testing.assert_array_equal(read(dataset, tmp_path), values[breast()])


# Windows ------------------------------------------------------------------------------------------


def reference(dataset: Dataset) -> np.ndarray:
    """pydicom's window over the whole image, from its lower plateau (0) to its upper (1)."""
    with np.errstate(over="ignore"):  # a sigmoid far from its centre
        image = apply_windowing(apply_modality_lut(pixel_array(dataset), dataset), dataset)
        low, high = apply_windowing(np.array([-1e6, 1e6]), dataset)
    return (image - low) / (high - low)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 0.5, "RescaleIntercept": -200}])
@pytest.mark.parametrize(("center", "width"), [(1800, 1500), ([2000, 900], [2500, 800]), (2047.5, 1)])
def test_windows_are_pydicoms(
    tmp_path: Path, function: str | None, rescale: dict, center: object, width: object
) -> None:
    if function in ("LINEAR", None) and width == 1:
        width = 2  # a linear window of width 1 is a step, which pydicom divides by
    dataset = make_dicom(breast(), WindowCenter=center, WindowWidth=width, **rescale)
    if function:
        dataset.VOILUTFunction = function
    pixels = read(dataset, tmp_path, "voi")
    assert pixels.dtype == np.uint16
    assert np.abs(pixels - reference(dataset) * 65535).max() <= 0.5 + 1e-6
    inverted = make_dicom(breast(), WindowCenter=center, WindowWidth=width, **rescale)
    inverted.PhotometricInterpretation, inverted.VOILUTFunction = "MONOCHROME1", function or "LINEAR"
    np.testing.assert_array_equal(read(inverted, tmp_path, "voi"), 65535 - pixels)
    np.testing.assert_array_equal(read(dataset, tmp_path, "none"), breast())


@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 1, "RescaleIntercept": 0}])
def test_voi_table_is_pydicoms(tmp_path: Path, rescale: dict) -> None:
    """A sigmoid table, as GE writes; the table goes before the window."""
    values = np.rint(65535 / (1 + np.exp(-np.linspace(-6, 6, 4096)))).astype(int)
    tags = {"WindowCenter": 10, "WindowWidth": 20, "VOILUTSequence": table(values, 16), **rescale}
    dataset = make_dicom(breast(), **tags)
    expected = apply_voi_lut(pixel_array(dataset), dataset)
    assert expected.max() > 4095
    np.testing.assert_array_equal(read(dataset, tmp_path, "voi"), expected)
    dataset.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_array_equal(read(dataset, tmp_path, "voi"), 65535 - expected)


def test_padding_under_a_window_is_air(tmp_path: Path) -> None:
    stored = (4095 - breast()).astype(np.uint16)
    stored[:10] = 4095
    tags = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 4095}
    dataset = make_dicom(stored, WindowCenter=2048, WindowWidth=4096, **tags)
    assert read(dataset, tmp_path, "voi")[:10].max() == 0


def test_voi_without_a_window_keeps_the_values(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(make_dicom(breast()), tmp_path, "voi"), breast())


def test_empty_window_is_no_window(tmp_path: Path) -> None:
    dataset = make_dicom(breast())
    dataset.WindowCenter = dataset.WindowWidth = None
    assert np.array_equal(read(dataset, tmp_path, "voi"), read(make_dicom(breast()), tmp_path))


def test_impossible_window_is_named(tmp_path: Path) -> None:
    dataset = make_dicom(breast(), WindowCenter=100, WindowWidth=0)
    with pytest.raises(dicom.DicomError, match="cannot be applied"):
        read(dataset, tmp_path, "voi")


# Header -------------------------------------------------------------------------------------------

SPOT = Sequence([coded("399368009", ViewModifierCodeSequence=Sequence([coded("399055006")]))])
DISPLACED = Sequence([coded("R-10242", "SRT", ViewModifierCodeSequence=Sequence([coded("R-102D5")]))])


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"ImageLaterality": "R", "Laterality": "L"}, {"laterality": "R"}),
        ({"ImageLaterality": None, "Laterality": "r "}, {"laterality": "R"}),
        ({"ImageLaterality": "B"}, {"laterality": ""}),
        ({"ViewPosition": "cc"}, {"view": "CC"}),
        ({"ViewPosition": "SECRET NAME"}, {"view": ""}),
        ({"ViewCodeSequence": Sequence([coded("R-10242", "SRT")])}, {"view": "CC"}),
        ({"ViewCodeSequence": Sequence([coded("unknown")])}, {"view": "MLO"}),
        ({"ViewCodeSequence": Sequence([])}, {"view": "MLO"}),
        ({"ViewCodeSequence": SPOT, "ViewPosition": None}, {"view": "MLO", "view_modifier": "spot"}),
        ({"ViewCodeSequence": DISPLACED}, {"view_modifier": "implant_displaced", "implant": "1"}),
        ({"EstimatedRadiographicMagnificationFactor": 1.8}, {"view_modifier": "magnified"}),
        ({"EstimatedRadiographicMagnificationFactor": 1.07}, {"view_modifier": ""}),
        ({"PaddleDescription": "SPOT CONTACT"}, {"view_modifier": "spot"}),
        ({"ImagerPixelSpacing": [0.0941, 0.0941], "PixelSpacing": [0.2, 0.2]}, {"spacing_mm": "0.0941"}),
        ({"ImagerPixelSpacing": None, "PixelSpacing": [0.05, 0.05]}, {"spacing_mm": "0.05"}),
        (
            {"ImagerPixelSpacing": None, "NominalScannedPixelSpacing": [0.042, 0.042]},
            {"spacing_mm": "0.042"},
        ),
        ({"ImagerPixelSpacing": None}, {"spacing_mm": ""}),
        ({"BreastImplantPresent": "YES"}, {"implant": "1"}),
        ({"BreastImplantPresent": "NO"}, {"implant": "0"}),
        ({}, {"implant": "", "view_modifier": "", "modality": "MG", "photometric": "MONOCHROME2"}),
        ({"Modality": None}, {"modality": ""}),
        ({"PixelIntensityRelationship": "LOG"}, {"relationship": "LOG"}),
        ({"PresentationIntentType": "FOR PROCESSING"}, {"intent": "FOR PROCESSING"}),
    ],
)
def test_header(tmp_path: Path, tags: dict, expected: dict) -> None:
    header = dicom.read_dicom(save(make_dicom(breast(), **tags), tmp_path / "image.dcm"))[1]
    assert {name: header[name] for name in expected} == expected
    assert header.keys() == dicom.HEADER.keys()


def test_the_header_columns_are_the_programs() -> None:
    assert list(dicom.HEADER) == prep.HEADER


@pytest.mark.parametrize(
    ("concept", "view"),
    [
        *[("CranioCaudal", "CC"), ("MedioLateralObliqueProjection", "MLO"), ("LateroMedial", "LM")],
        *[("MedioLateralProjection", "ML"), ("LateroMedialOblique", "LMO"), ("CaudoCranial", "FB")],
        *[("CranioCaudalExaggeratedLaterally", "XCCL"), ("CranioCaudalExaggeratedMedially", "XCCM")],
        *[("SuperolateralToInferomedialOblique", "SIO"), ("InferomedialToSuperolateralOblique", "ISO")],
    ],
)
def test_view_codes_are_the_standards(concept: str, view: str) -> None:
    """CID 4014 as pydicom has it, and the older SNOMED RT code that pydicom holds to be the same."""
    code = getattr(codes.cid4014, concept)
    assert dicom.VIEWS[code.value] == view
    older = [value for value, name in dicom.VIEWS.items() if name == view and not value.isdigit()]
    assert [type(code)(value, "SRT", "") == code for value in older] == [True]


def test_modifier_codes_are_the_standards() -> None:
    for concept, name in (("SpotCompression", "spot"), ("Magnification", "magnified")):
        assert dicom.MODIFIERS[getattr(codes.cid4015, concept).value] == name
    assert dicom.MODIFIERS[codes.cid4015.ImplantDisplaced.value] == "implant_displaced"


# What is no mammogram -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 2, "Rows": 48}, r"multi-frame \(2 frames\)"),
        ({"SOPClassUID": dicom.TOMOSYNTHESIS}, "tomosynthesis"),
        ({"Modality": "US"}, r"not mammography \(US\)"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "photometric"),
        ({"PixelData": None}, "no pixels"),
        ({"BitsAllocated": 32}, "8 or 16 bits"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000"),
        ({"Rows": 95}, None),  # more pixels than the header says: the rest is left out
        ({"Rows": 97}, "cannot be decoded"),
        ({"BitsStored": None}, r"missing or empty tag, .*: BitsStored \(0028,0101\)"),
        ({"Rows": None}, "not a DICOM image"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, tags: dict, reason: str | None) -> None:
    dataset = make_dicom(breast(), **tags)
    if reason is None:
        np.testing.assert_array_equal(read(dataset, tmp_path), breast()[:95])
        return
    with pytest.raises(dicom.DicomError, match=reason) as caught:
        read(dataset, tmp_path)
    assert not any(value in str(caught.value) for value in IDENTIFIERS.values())


def test_pixels_that_look_like_a_jpeg_2000_header(tmp_path: Path) -> None:
    pixels = np.zeros((96, 80), np.uint8)
    pixels[40, 10:60] = np.tile([255, 79, 255, 81, 7], 10)
    path = save(make_dicom(pixels, bits=8), tmp_path / "image.dcm")
    recode(path, "RLELossless")
    assert b"\xff\x4f\xff\x51" in path.read_bytes()
    assert np.array_equal(dicom.read_dicom(path)[0], pixels)


@pytest.mark.parametrize(
    "syntax", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless", "JPEGLosslessSV1"]
)
@pytest.mark.parametrize("cut", [10, 200, 2000])
def test_compressed_file_cut_short_is_named(tmp_path: Path, syntax: str, cut: int) -> None:
    """What decoders would fill up with grey or return in part."""
    dataset, path = make_dicom(breast()), tmp_path / "image.dcm"
    if not syntax.startswith("JPEGLossless"):
        dataset.compress(getattr(uid, syntax), generate_instance_uid=False)
    save(dataset, path)
    if syntax.startswith("JPEGLossless"):
        recode(path, "JPEGLosslessProcess14_1")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(dicom.DicomError, match="cut short"):
        dicom.read_dicom(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([uid.ExplicitVRLittleEndian, uid.RLELossless]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.none() | st.floats(0, 1),
    st.sampled_from(["none", "voi"]),
)
def test_damaged_bytes_are_read_or_named(
    tmp_path: Path, syntax: uid.UID, changes: list[tuple[float, int]], cut: float | None, window: str
) -> None:
    """Nothing else is raised. (Damage in JPEG may end the process; that is tested with the runs.)"""
    dataset = make_dicom(breast(), WindowCenter=[1800, 9], WindowWidth=[1500, 9], ViewCodeSequence=SPOT)
    if syntax.is_compressed:
        dataset.compress(syntax, generate_instance_uid=False)
    path = save(dataset, tmp_path / "image.dcm")
    content = bytearray(path.read_bytes())
    header = content.find(b"\xe0\x7f\x10\x00")
    for place, value in changes:
        content[132 + int(place * (header - 132))] = value
    path.write_bytes(content[: None if cut is None else int(cut * len(content))])
    message = ""
    try:
        assert dicom.read_dicom(path, window)[0].dtype in (np.uint8, np.uint16)
    except dicom.DicomError as error:
        message = str(error)
    assert not any(value in message for value in IDENTIFIERS.values())


def test_file_without_preamble_or_syntax(tmp_path: Path) -> None:
    """As old PACS exports are: a bare data set, implicit little endian."""
    path = tmp_path / "image.dcm"
    dataset = make_dicom(breast())
    dataset.file_meta = FileMetaDataset()
    dataset.save_as(path, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(dicom.read_dicom(path)[0], breast())


# Through prepare_dataset --------------------------------------------------------------------------


def lay_out(folder: Path, *extra: str) -> int:
    """Lay the images in folder/in out to folder/out, without a table."""
    places = ["--images_root", str(folder / "in"), "--output_dir", str(folder / "out")]
    return prep.main(["--csv_path", "none", "--test_share", "0", *places, *extra])


def test_png_has_pixels_spacing_and_manifest_row(tmp_path: Path) -> None:
    save(make_dicom(breast(), BreastImplantPresent="NO"), tmp_path / "in/p1/a.dcm")
    save(make_dicom(breast(seed=1)), tmp_path / "in/p1/1.2.840.99")  # named by its UID, as PACS do
    save(make_dicom(breast(seed=2)), tmp_path / "in/p2/series/IMG0001")
    assert lay_out(tmp_path) == 0
    manifest = pd.read_csv(tmp_path / "out/manifest.csv", dtype=str, keep_default_na=False)
    assert list(manifest["file"]) == [
        *["training/p1_1.2.840.99.png", "training/p1_a.png", "training/p2_series_IMG0001.png"]
    ]
    row = manifest.iloc[1]
    assert (row.laterality, row["view"], row.spacing_mm, row.implant) == ("L", "MLO", "0.07", "0")
    assert (row.height, row.width, row.bit_depth, row.flipped) == ("96", "80", "16", "0")
    before = (tmp_path / "out/manifest.csv").read_bytes()
    (tmp_path / "out/image_checks.csv").unlink()  # what the header said is in the manifest as well
    assert lay_out(tmp_path) == 0
    assert (tmp_path / "out/manifest.csv").read_bytes() == before
    png = (tmp_path / "out/training/p1_a.png").read_bytes()
    assert png[33:41] == struct.pack(">I", 9) + b"pHYs"
    assert struct.unpack(">IIB", png[41:50]) == (14286, 14286, 1)  # 1000 / 0.07 pixels per metre
    for name, seed in (("p1_a", 0), ("p1_1.2.840.99", 1), ("p2_series_IMG0001", 2)):
        image = cv2.imread(str(tmp_path / f"out/training/{name}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(image, breast(seed=seed))


def test_window_is_applied_and_a_change_of_it_redoes(tmp_path: Path) -> None:
    dataset = make_dicom(breast(), WindowCenter=1800, WindowWidth=1500)
    save(dataset, tmp_path / "in/p1/a.dcm")
    for window in ("none", "voi", "none"):
        assert lay_out(tmp_path, "--window", window) == 0
        image = cv2.imread(str(tmp_path / "out/training/p1_a.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(image, dicom.grey_values(dataset, window)[0])


def test_no_identifier_leaves_the_header(tmp_path: Path) -> None:
    """Good, broken and odd files; the names of folders and files are the user's own."""
    save(make_dicom(breast()), tmp_path / "in/p1/good.dcm")
    save(make_dicom(breast(), Modality="US"), tmp_path / "in/p1/ultrasound.dcm")
    cut = save(make_dicom(breast()), tmp_path / "in/p2/cut.dcm")
    cut.write_bytes(cut.read_bytes()[:-900])
    odd = save(make_dicom(breast()), tmp_path / "in/p2/odd.dcm")
    swapped = odd.read_bytes().replace(b"PN\x0c\x00Doe^Secretly", b"DS\x0c\x00Doe^Secretly")
    odd.write_bytes(swapped.replace(b"0.07\\0.07 ", b"Secretly..", 1))
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), "--csv_path", "none"]
    command += ["--images_root", "in", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 1
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 5
    for text in [done.stdout, done.stderr, *written]:
        assert not [value for value in [*IDENTIFIERS.values(), "Secretly"] if value.encode() in text]
    skipped = pd.read_csv(tmp_path / "out/skipped.csv").set_index("source")["reason"]
    assert set(skipped.index) == {"p1/ultrasound.dcm", "p2/cut.dcm"}
    manifest = pd.read_csv(tmp_path / "out/manifest.csv", keep_default_na=False).set_index("source")
    assert manifest.loc["p2/odd.dcm", "spacing_mm"] == ""  # malformed is unknown, not unusable
