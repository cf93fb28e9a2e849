"""Reading, polarity, breast and pectoral masks, on phantoms with exact truth and on real images."""

import cv2
import numpy as np
import pytest
from conftest import ROOT, breast_image

import benchmark
import synthetic_mammograms as phantoms
import train_byol_mammo as mammo

TRAPS = [trap for trap in phantoms.TRAPS if trap != "empty"]


def phantom(seed=0, trap="none", view="MLO", bit_depth=16):
    side = "LR"[seed % 2]
    spec = phantoms.PhantomSpec(
        seed=seed, view=view, laterality=side, density="ABCD"[seed % 4], height=704, width=560,
        spacing_mm=0.425, trap=trap, bit_depth=bit_depth,
    )  # fmt: skip
    return phantoms.make_phantom(spec)


def read_back(image, folder):
    cv2.imwrite(str(folder / "a.png"), image)
    return mammo.read_mammogram(folder / "a.png")


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


def dice(a, b):
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


@pytest.mark.parametrize("trap", TRAPS)
def test_breast_mask_holds_on_every_trap(trap, tmp_path):
    found = []
    for seed in range(4):
        truth = phantom(seed, trap, "MLO" if seed < 2 else "CC", (8, 12, 16)[seed % 3])
        mask = mammo.segment_breast_tissue(read_back(truth.image, tmp_path))
        assert mask.dtype == bool
        assert cv2.connectedComponents(mask.astype(np.uint8))[0] == 2
        found.append(iou(mask & ~truth.foreign, truth.breast & ~truth.foreign))
    assert np.mean(found) > 0.97
    assert min(found) > 0.95


@pytest.mark.parametrize("trap", ["noisy_frame", "bright_frame", "film", "large_breast"])
def test_frames_and_little_air_do_not_hide_a_negative(trap, tmp_path):
    for seed in range(4):
        truth = phantom(seed, trap, "MLO" if seed < 2 else "CC", (8, 12, 16)[seed % 3])
        top = 2**truth.spec.bit_depth - 1
        read = read_back((top - truth.image).astype(truth.image.dtype), tmp_path)
        assert np.array_equal(read, truth.image)
        assert trap == "large_breast" or not (mammo.segment_breast_tissue(read) & truth.foreign).any()


@pytest.mark.parametrize("share", [0.75, 0.9])
def test_a_breast_that_leaves_little_air_or_none_is_found_whole(share):
    """As on close-ups; with noise in the air, which no single grey level is then."""
    rng = np.random.default_rng(0)
    for seed in range(4):
        truth = phantom(seed, "large_breast", "CC", 12)
        height, width = truth.image.shape
        rows = slice(int((1 - share) * height), int(share * height))
        chest = mammo.anatomy.chest_side(truth.breast)
        depth = int((1.5 - share) * width)
        cols = slice(0, depth) if chest == 0 else slice(width - depth, width)
        noise = 60 + 20 * rng.standard_normal(truth.image.shape)
        image = (truth.image + noise).clip(0, 4095).astype(np.uint16)[rows, cols]
        assert iou(mammo.segment_breast_tissue(image), truth.breast[rows, cols]) > 0.98


@pytest.mark.parametrize("trap", ["film", "none"])
def test_an_image_on_a_black_canvas_keeps_its_mask(trap):
    """The canvas is darker than the air of film, and puts a straight border to a digital chest wall."""
    for seed in range(4):
        truth = phantom(seed, trap, "CC", 8)
        height, width = truth.image.shape
        canvas = np.zeros((2 * height, 2 * width), np.uint8)
        place = np.s_[height // 2 : height // 2 + height, width // 3 : width // 3 + width]
        canvas[place] = truth.image
        found = mammo.segment_breast_tissue(canvas)
        assert iou(found[place], truth.breast & ~truth.foreign) > 0.95
        assert found.sum() == found[place].sum()


def test_noise_in_the_air_is_not_taken_for_fat():
    """Both are rough where few pixels were averaged."""
    rng = np.random.default_rng(0)
    for seed in range(4):
        truth = phantom(seed, "none", "CC", 12)
        noisy = truth.image + 4095 * (0.1 + 0.05 * rng.standard_normal(truth.image.shape))
        found = mammo.segment_breast_tissue(noisy.clip(0, 4095).astype(np.uint16))
        assert iou(found, truth.breast) > 0.95


def test_a_single_bright_line_is_no_breast():
    image = np.zeros((1900, 1700), np.uint16)
    image[800:804] = 3000
    mask = mammo.segment_breast_tissue(image)
    assert not mask.any()
    assert not mammo.segment_pectoral_muscle(image, mask).any()


def test_a_frame_darker_than_the_film_is_not_taken_for_its_air():
    """Air is looked for amid what is dark only where that is as rough as fat; fog is smooth."""
    truth = phantom(2, "film", "CC", 8)
    framed = truth.image.copy()
    framed[: framed.shape[0] // 8, -framed.shape[1] // 4 :] = 0
    found = mammo.segment_breast_tissue(framed)
    assert iou(found, mammo.segment_breast_tissue(truth.image)) > 0.99


@pytest.mark.parametrize(
    ("trap", "seed"), [("label_on_breast", 4), ("label_on_breast", 8), ("film", 14)]
)
def test_thin_letters_and_rims_of_markers_stay_out_of_the_mask(trap, seed):
    """Thinner than a block of the reduced copy, where tissue dims them."""
    truth = benchmark.trap_phantom(trap, seed)
    mask = mammo.segment_breast_tissue(truth.image)
    assert not (mask & truth.foreign).any()


def test_pectoral_muscle_on_mlo_and_none_on_cc():
    found = []
    for seed in range(6):
        truth = phantom(seed)
        muscle = mammo.segment_pectoral_muscle(truth.image, truth.breast)
        assert not (muscle & ~truth.breast).any()
        found.append(dice(muscle, truth.pectoral))
        flat = phantom(seed, view="CC")
        assert not mammo.segment_pectoral_muscle(flat.image, flat.breast).any()
    assert np.mean(found) > 0.9


@pytest.mark.parametrize("name", ["empty", "black", "white", "grey", "gaussian", "uniform"])
def test_an_image_without_a_breast_has_an_empty_mask(name):
    rng = np.random.default_rng(0)
    image = {
        "empty": phantom(trap="empty").image,
        "black": np.zeros((700, 500), np.uint8),
        "white": np.full((700, 500), 65535, np.uint16),
        "grey": np.full((700, 500), 77, np.uint8),
        "gaussian": rng.normal(120, 20, (700, 500)).clip(0, 255).astype(np.uint8),
        "uniform": rng.integers(0, 65536, (700, 500)).astype(np.uint16),
    }[name]
    mask = mammo.segment_breast_tissue(image)
    assert mask.shape == image.shape
    assert not mask.any()


def test_bit_depth_and_polarity_do_not_change_the_mask(tmp_path):
    truth = phantom(1, bit_depth=16)
    as_8 = (truth.image // 257).astype(np.uint8)
    variants = {
        "8 bit": as_8,
        "12 in 16": (truth.image // 16).astype(np.uint16),
        "16 bit": truth.image,
        "inverted 8 bit": 255 - as_8,
        "inverted 16 bit": 65535 - truth.image,
    }
    masks = {
        name: mammo.segment_breast_tissue(read_back(image, tmp_path)) for name, image in variants.items()
    }
    for mask in masks.values():
        assert iou(mask, masks["16 bit"]) >= 0.99


def test_reading_keeps_every_grey_level(tmp_path):
    for bits in (8, 12, 16):
        image, _ = breast_image(bits=bits)
        assert np.array_equal(read_back(image, tmp_path), image)
        assert mammo.images.bit_depth(image) == bits
    inverted = (4095 - breast_image(bits=12)[0]).astype(np.uint16)
    assert np.array_equal(read_back(inverted, tmp_path), breast_image(bits=12)[0])


@pytest.mark.parametrize("bits", [8, 16])
def test_the_fast_png_decoder_reads_what_opencv_reads_and_nothing_else(bits):
    image, _ = breast_image(bits=bits)
    content = cv2.imencode(".png", image)[1].tobytes()
    fast = mammo.images.decode_grey_png(content)
    assert fast.dtype == image.dtype
    assert np.array_equal(fast, image)
    assert (
        mammo.images.decode_grey_png(cv2.imencode(".png", np.dstack([image] * 3))[1].tobytes()) is None
    )
    assert mammo.images.decode_grey_png(cv2.imencode(".tif", image)[1].tobytes()) is None
    for damaged in (
        content[:-20],
        content[:-1],
        content[:200] + content[220:],
        content[:100] + content[-12:],
    ):
        assert mammo.images.decode_grey_png(damaged) is None


def test_copies_of_grey_and_alpha_are_dropped(tmp_path):
    image, _ = breast_image()
    assert np.array_equal(read_back(np.dstack([image] * 3), tmp_path), image)
    alpha = np.full_like(image, 255)
    assert np.array_equal(read_back(np.dstack([image] * 3 + [alpha]), tmp_path), image)
    colour = np.dstack([image, image // 2, image // 3])
    luma = cv2.cvtColor(colour, cv2.COLOR_BGR2GRAY)
    assert np.array_equal(read_back(colour, tmp_path), luma)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "decoded"), (b"no image", "decoded"), (b"\x89PNG\r\n\x1a\n", "decoded")],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(mammo.ImageReadError, match=f"broken.png: .*{reason}") as caught:
        mammo.read_mammogram(path)
    assert caught.value.path == path


def test_missing_files_folders_and_floats_are_named(tmp_path):
    with pytest.raises(mammo.ImageReadError, match="no such file"):
        mammo.read_mammogram(tmp_path / "a.png")
    with pytest.raises(mammo.ImageReadError, match="not a file"):
        mammo.read_mammogram(tmp_path)
    cv2.imwrite(str(tmp_path / "f.tiff"), breast_image()[0].astype(np.float32))
    with pytest.raises(mammo.ImageReadError, match="float32 pixels"):
        mammo.read_mammogram(tmp_path / "f.tiff")


def insert_cluster(image, centre, rng):
    """Twelve Gaussian specks of 0.3 mm (0.085 mm pixels) at 10 times the local deviation."""
    field = image.astype(np.float32)
    band = cv2.GaussianBlur(field, (0, 0), 1.2) - cv2.GaussianBlur(field, (0, 0), 4)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    for row, column in centre + rng.normal(0, 30, (12, 2)):
        near = band[int(row) - 32 : int(row) + 32, int(column) - 32 : int(column) + 32]
        field += 10 * near.std() * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 1.5**2))
    return field.clip(0, 65535).astype(np.uint16)


def test_frequency_energy_sees_a_cluster_and_not_noise():
    rng = np.random.default_rng(0)
    whole = np.ones((512, 512), bool)
    plain, specks = [], []
    for seed in range(8):
        noise = np.random.default_rng(seed).normal(size=(512, 512))
        tissue = sum(cv2.GaussianBlur(noise, (0, 0), s) * s**1.5 for s in (1, 2, 4, 8, 16))
        tissue = (20000 + 4000 * tissue / tissue.std()).clip(0, 65535).astype(np.uint16)
        plain.append(mammo.frequency_energy(tissue, whole))
        specks.append(mammo.frequency_energy(insert_cluster(tissue, np.array([256, 256]), rng), whole))
    assert min(specks) > max(plain)
    assert min(specks) > mammo.MIN_FREQ_ENERGY > max(plain)
    white = rng.normal(30000, 3000, (512, 512)).astype(np.uint16)
    assert mammo.frequency_energy(white, whole) < mammo.MIN_FREQ_ENERGY
    assert mammo.frequency_energy(np.full((512, 512), 9, np.uint8), whole) == 0


def test_frequency_energy_ignores_bit_depth_and_window():
    image, mask = breast_image(512, 512)
    energy = mammo.frequency_energy(image, mask)
    wide = image.astype(np.uint16)
    for other in (wide * 257, wide * 16 + 5):
        assert np.isclose(mammo.frequency_energy(other, mask), energy, rtol=0.02)
    assert energy > 0


def test_real_images_meet_the_baselines(real):
    whole, muscle = [], []
    for path in sorted((real / "ddsm66/images").glob("*.png"))[::4]:
        truth = cv2.imread(str(real / "ddsm66/masks" / f"{path.stem}_LI.png"), 0)
        image = mammo.read_mammogram(path)
        mask = mammo.segment_breast_tissue(image)
        whole.append(dice(mask, truth > 96))
        muscle.append(dice(mammo.segment_pectoral_muscle(image, mask), truth > 224))
    assert np.mean(whole) > 0.96
    assert np.mean(muscle) > 0.8
    for path in [*(real / "nyu16bit").glob("*.png"), *sorted((real / "cdd_cesm").glob("*.png"))[::4]]:
        image = mammo.read_mammogram(path)
        mask = mammo.segment_breast_tissue(image)
        assert mammo.segment_pectoral_muscle(image, mask).any() == ("MLO" in path.name)
        assert iou(mask, mammo.images.largest_component(image > 0)) > 0.75
        assert ROOT not in path.parents
