"""--target_spacing_mm: tiles of all detectors mean the same millimetres, and the way back to files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, places_in

import prepare_dataset as prep
import study
import train_byol_mammo as mammo
import train_classifier as classifier
from byol_mammo import images, labels as labelling, one_scale, report, settings

SPACINGS = (0.05, 0.07, 0.1, 0.27)  # mm per pixel: fine and usual detectors, the target itself, film
TARGET = 0.1
FIELD, DISC, RADIUS = (48.0, 40.0), (26.0, 15.0), 5.0  # mm: y and x, the disc's centre, its radius
BRIGHT = 0.65 * 4095  # between tissue and disc
# As in other tests, but no pixel size is told.
WITHOUT = [word for word in SMALL if word not in ("--pixel_spacing_mm", "0.3")]
WITHOUT += ["--tile_size", "96", "--tile_stride", "48"]


def mammogram(spacing: float, disc: tuple[float, float] | None = DISC, seed: int = 0) -> np.ndarray:
    """The same breast and disc as a detector of that spacing sees them: (H, W) uint16 of 12 bits."""
    y, x = ((np.mgrid[: round(FIELD[0] / spacing), : round(FIELD[1] / spacing)]) + 0.5) * spacing
    breast = ((y / FIELD[0] - 0.5) / 0.45) ** 2 + (x / FIELD[1] / 0.85) ** 2 < 1
    noise = np.random.default_rng(seed).normal(size=y.shape)
    texture = cv2.GaussianBlur(noise, (0, 0), 0.5 / spacing) * 0.5 / spacing
    grey = np.clip(0.35 + 0.03 * texture, 0.2, 0.5)
    if disc:
        inside = (RADIUS - np.hypot(y - disc[0], x - disc[1])) / spacing + 0.5  # share of a border pixel
        grey += (0.95 - grey) * inside.clip(0, 1)
    return (np.where(breast, grey, 0) * 4095).astype(np.uint16)


def box_of(spacing: float, disc: tuple[float, float] = DISC) -> dict[str, float]:
    """The disc's box in px of a file of that spacing, as in labels.csv."""
    edges = [(middle + side) / spacing for side in (-RADIUS, RADIUS) for middle in disc[::-1]]
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))


def write_archive(folder: Path, spacings: tuple[float, ...], known: tuple[float | str, ...]) -> None:
    """images/<number>.png of these spacings and, beside them, what manifest.csv says of each."""
    (folder / "images").mkdir(parents=True)
    names = [f"images/{number}.png" for number in range(len(spacings))]
    for name, spacing in zip(names, spacings, strict=True):
        cv2.imwrite(str(folder / name), mammogram(spacing))
    pd.DataFrame({"file": names, "spacing_mm": known}).to_csv(folder / "manifest.csv", index=False)


def config_of(folder: Path, *flags: str) -> mammo.Config:
    return mammo.parse_args([*places_in(folder), *WITHOUT, *flags])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an archive of four detectors."""
    folder = tmp_path_factory.mktemp("mixed")
    write_archive(folder, SPACINGS, SPACINGS)
    return folder


@pytest.fixture(scope="module")
def tiles(mixed: Path) -> mammo.MammogramTiles:
    """Its tiles at one scale."""
    return mammo.open_tiles(mammo.build_cache(config_of(mixed, "--target_spacing_mm", str(TARGET))))


def cached(tiles: mammo.MammogramTiles, number: int) -> np.ndarray:
    """The cached pixels of an image, at their place in an otherwise empty one."""
    row = tiles.images.iloc[number]
    pixels = tiles.pixels.numpy().view(np.uint16)[row["offset"] :][: row["height"] * row["width"]]
    whole = np.zeros((row["y0"] + row["height"], row["x0"] + row["width"]), np.uint16)
    whole[row["y0"] :, row["x0"] :] = pixels.reshape(row["height"], row["width"])
    return whole


def overlap(first: list[float], second: list[float]) -> float:
    """Intersection over union of two boxes (xmin, ymin, xmax, ymax)."""
    (ax, ay, bx, by), (cx, cy, dx, dy) = first, second
    both = max(0, min(bx, dx) - max(ax, cx)) * max(0, min(by, dy) - max(ay, cy))
    return both / ((bx - ax) * (by - ay) + (dx - cx) * (dy - cy) - both)


# ---- pixels


@pytest.mark.parametrize("number", range(4))
def test_a_disc_of_10_mm_measures_10_mm_whatever_took_it(tiles, number):
    bright = cached(tiles, number) > BRIGHT
    assert 2 * np.sqrt(bright.sum() / np.pi) * TARGET == pytest.approx(2 * RADIUS, rel=0.02)
    row = tiles.images.iloc[number]
    assert (row["spacing_mm"], row["bit_depth"]) == (TARGET, 12)
    assert row["source_px"] == pytest.approx(TARGET / SPACINGS[number], rel=1e-12)
    centre = (np.argwhere(bright).mean(0) + 0.5) * row["source_px"] * SPACINGS[number]
    np.testing.assert_allclose(centre, DISC, atol=0.05)  # mm: half a pixel of the cache


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("scale", [0.37037, 0.5, 0.7, 1.35, 2.7])
def test_pixels_are_resampled_once_where_they_lie_and_never_beyond_their_range(scale, dtype):
    step = 60 if dtype == np.uint16 else 1
    ramp = np.tile((np.arange(250) * step).astype(dtype), (40, 1))
    out = one_scale.resample(ramp, scale)
    assert out.dtype == dtype
    assert out.shape == (round(40 * scale), round(250 * scale))
    where = (np.arange(out.shape[1]) + 0.5) / scale - 0.5
    error = out[5] / step - where
    assert abs(error[3:-3].mean()) < (0.05 if step > 1 else 0.51)  # px of the file: no drift; rounded
    edge = np.where(np.arange(250) < 125, 0, np.iinfo(dtype).max).astype(dtype)
    found = one_scale.resample(np.tile(edge, (40, 1)), scale)[5].astype(float)
    assert (np.diff(found) >= -2e-4 * edge.max()).all()  # a step stays one: nothing rings beside it
    assert one_scale.resample(ramp, 1.0) is ramp


def test_what_is_finer_than_a_pixel_is_averaged_not_aliased():
    stripes = np.tile(np.arange(400) % 2 * 200, (40, 1)).astype(np.uint8)
    assert np.ptp(one_scale.resample(stripes, 0.37)[:, 2:-2]) < 60  # picking pixels leaves 200


@pytest.mark.parametrize("number", [0, 3])
def test_the_mask_is_the_same_tissue(mixed, number):
    """Found on the file's own reduced copy, whatever the target."""
    path = mixed / "images" / f"{number}.png"
    image, small, _ = mammo.read_and_reduce(path)
    breast = mammo.find_breast(small)
    _, scaled, target = one_scale.rescaled(path, image, small, SPACINGS[number], TARGET)
    assert target == TARGET
    assert (mammo.find_breast(scaled) == breast).all()
    own, new = small.enlarged(breast), scaled.enlarged(breast)
    back = cv2.resize(new.view(np.uint8), own.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    assert (own & back).sum() / (own | back).sum() > 0.99


# ---- the way back


@pytest.mark.parametrize("number", range(4))
def test_a_box_covers_the_same_tissue(tiles, number):
    box = np.array(list(box_of(SPACINGS[number]).values()))
    y, x = np.nonzero(cached(tiles, number) > BRIGHT)
    seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert overlap((box / one_scale.source_px(tiles.images)[number]).tolist(), seen) > 0.95


def test_the_tiles_of_a_box_are_those_that_show_it(tiles):
    """By centre alone; tiles whose border passes within two pixels of it may fall either way."""
    boxes = [[{"finding": {"mass"}, **box_of(spacing)}] for spacing in SPACINGS]
    table = pd.DataFrame({"boxes": boxes, "mass": 1.0})
    scale = one_scale.source_px(tiles.images)
    own = (tiles.table, np.arange(4), table, tiles.tile_size, ["mass"], 2.0)
    positive = labelling.tile_labels(*own, scale=scale)[:, 0] == 1
    offset = np.array(DISC)[::-1] / TARGET - tiles.table[["x", "y"]].to_numpy()
    shown = ((offset > 2) & (offset < tiles.tile_size - 2)).all(1)
    missed = ((offset < -2) | (offset > tiles.tile_size + 2)).any(1)
    assert shown.any()
    assert positive[shown].all()
    assert not positive[missed].any()
    np.testing.assert_allclose(
        one_scale.source_corners(tiles.images, tiles.table),
        tiles.table[["x", "y"]].to_numpy() * scale[tiles.table["image"].to_numpy(), None],
        atol=0.5,
    )
    more = study.tiles_on_boxes(tiles, boxes, np.arange(4))
    far = np.abs(more[["x", "y"]] + tiles.tile_size / 2 - np.array(DISC)[::-1] / TARGET)
    assert len(more) == 4 * study.PER_BOX
    assert (far <= study.OFF_CENTRE * tiles.tile_size + 1).to_numpy().all()


def cover(corners: np.ndarray, side: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,) share of the boxes (N, 4) that tiles at `corners` (N, 2) hold, all in px of the files."""
    low, high = np.maximum(corners, boxes[:, :2]), np.minimum(corners + side[:, None], boxes[:, 2:])
    return (high - low).clip(0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)


def test_probe_and_study_label_the_tiles_that_hold_a_box(mixed, tiles):
    boxes = [{"finding": ["mass"], **box_of(spacing)} for spacing in SPACINGS]
    names = [f"images/{number}.png" for number in range(4)]
    table = pd.DataFrame({"image": names, "study_id": list("abcd"), "mass": 1})
    table["boxes"] = [json.dumps([box]) for box in boxes]
    table["split"] = ["training", "training", "test", "test"]
    table.to_csv(mixed / "labels.csv", index=False)
    edges = np.array([list(box.values())[1:] for box in boxes])
    image = tiles.table["image"].to_numpy()
    px = one_scale.source_px(tiles.images)
    share = cover(tiles.table[["x", "y"]].to_numpy() * px[image, None], 96 * px[image], edges[image])
    order, places = np.arange(len(tiles)), (mixed / "labels.csv", mixed / "images")
    probe = labelling.prepare_probe(*places, tiles.images, tiles.table, 96, ["mass"], order)
    mass = probe.targets[:, 0]
    assert set(mass[np.isfinite(mass)]) == {0, 1}
    assert (mass[share[probe.ids] > 0.3] == 1).all()
    assert (mass[share[probe.ids] == 0] == 0).all()
    words = {"data_dir": mixed / "images", "labels": mixed / "labels.csv", "cache_dir": mixed / "cache"}
    settings_of = study.Settings(
        **{name: str(path) for name, path in words.items()}, tile_size=96, tile_stride=48, view_size=32,
        min_breast_ratio=0.15, target_spacing_mm=TARGET, num_workers=1, device="cpu",
    )  # fmt: skip
    data = study.ask_labels(settings_of, ["mass"])[0].data
    row = data.table["row"].to_numpy()
    share = cover(data.table[["x", "y"]].to_numpy(), 96 * px[row], edges[row])
    mass = data.targets[:, 0]
    assert (mass[share > study.HELD + 0.02] == 1).all()  # x and y are whole px
    assert (mass[share == 0] == 0).all()
    assert not (mass[share < study.HELD - 0.02] == 1).any()
    assert (mass == 1).sum() >= 8


# ---- caches


def edited(folder: Path, parts: tuple, before: str, after: str) -> str:
    """code_version of `parts` with a line of their text replaced in copies of the files."""
    copies, found = [], set()
    for file, *ends in parts:
        text, copy = Path(file).read_text(), folder / Path(file).name
        found |= {file} if before in text else set()
        copy.write_text(text.replace(before, after))
        copies.append((str(copy), *ends))
    assert len(found) == 1
    return settings.code_version(copies)


def test_caches_at_the_images_own_scale_are_what_they_were(tmp_path):
    """The code of one scale is in the key of those alone that have it."""
    head, rest = Path(mammo.__file__).read_text().split("    # -- One scale: ")
    (tmp_path / "main.py").write_text(head + rest.split("    # -- As the image is now\n")[1])
    former = (
        (str(tmp_path / "main.py"), "# ---- 2 Image", "# ---- 5 Pixel cache"),
        *mammo.PIXEL_CODE[2:],
    )
    assert settings.code_version(mammo.PIXEL_CODE) == settings.code_version(former)
    both = mammo.PIXEL_CODE + mammo.SCALE_CODE
    kernel = ("cv2.INTER_AREA if scale < 1", "cv2.INTER_CUBIC if scale < 1")
    assert edited(tmp_path, both, *kernel) != settings.code_version(both)


def test_the_key_and_the_tables_know_of_one_scale_only_where_it_is_on(mixed):
    sources = images.list_sources(mixed / "images")
    off, on, other = (
        mammo.cache_inputs(sources, config_of(mixed, "--target_spacing_mm", mm))
        for mm in ("0", "0.1", "0.2")
    )
    plain = mammo.cache_inputs(sources, config_of(mixed))
    assert off == plain
    assert "target_spacing_mm" not in plain["settings"]
    assert plain["code"] == settings.code_version(mammo.PIXEL_CODE)
    assert len({mammo.cache_key(inputs) for inputs in (plain, on, other)}) == 3
    own = mammo.open_tiles(mammo.build_cache(config_of(mixed)))
    assert list(own.images.columns) == mammo.IMAGE_COLUMNS
    assert (one_scale.source_px(own.images) == 1).all()
    np.testing.assert_array_equal(one_scale.source_corners(own.images, own.table), own.table[["x", "y"]])


def test_a_classifier_of_before_goes_on():
    """Its settings have no target: its images had their own scale."""
    now = classifier.Settings()
    then = dataclasses.asdict(now)
    del then["target_spacing_mm"]
    assert mammo.settings.changed_flags(now, then, classifier.FREE_ON_RESUME) == []
    now = dataclasses.replace(now, target_spacing_mm=0.1)
    assert mammo.settings.changed_flags(now, then, classifier.FREE_ON_RESUME) == [
        "--target_spacing_mm 0.0 -> 0.1"
    ]


@pytest.mark.slow
def test_a_run_of_before_goes_on(mixed, capsys):
    flags = [*places_in(mixed), *WITHOUT, "--epochs", "2", "--run_name", "former", "--max_steps"]
    assert mammo.main([*flags, "1"]) == 0
    path = mixed / "runs" / "former" / "last.pth"
    state = mammo.checkpoints.load_checkpoint(path)
    del state["config"]["target_spacing_mm"]
    mammo.torch.save(state, path)
    assert mammo.main([*flags, "2"]) == 0
    assert mammo.checkpoints.load_checkpoint(path)["step"] == 2
    assert mammo.main([*flags, "3", "--target_spacing_mm", "0.1"]) == 2
    assert "--target_spacing_mm 0.0 -> 0.1" in capsys.readouterr().err


# ---- what is not known


UNKNOWN = {  # flags -> spacing that the image without one is taken to have; None = it is skipped by name
    (): None,
    ("--pixel_spacing_mm", "0.2"): 0.2,
    ("--pixel_spacing_mm", str(mammo.PIXEL_SPACING_MM)): mammo.PIXEL_SPACING_MM,  # stated nevertheless
    ("--pixel-spacing-mm=0.085",): mammo.PIXEL_SPACING_MM,
}


@pytest.mark.parametrize("flags", UNKNOWN)
def test_no_spacing_is_assumed_in_silence(tmp_path, flags, capsys):
    write_archive(tmp_path, (0.2, 0.2), (0.2, ""))
    small = ["--tile_size", "48", "--tile_stride", "24"]
    config = config_of(tmp_path, "--target_spacing_mm", "0.2", *small, *flags)
    assert config == mammo.Config(**json.loads(json.dumps(dataclasses.asdict(config))))
    cache = mammo.build_cache(config)
    said, taken = capsys.readouterr().err, UNKNOWN[flags]
    reason = pd.read_csv(cache / "rejections.csv", keep_default_na=False)["error"]
    table = pd.read_csv(cache / "images.csv")
    assert reason[0] == ""
    if taken is None:
        assert "1 of 2 images don't tell their pixel size and are skipped" in said
        assert "pixel size is unknown: give spacing_mm in manifest.csv" in reason[1]
        assert len(table) == 1
    else:
        assert (
            f"1 of 2 images don't tell their pixel size: --pixel_spacing_mm {taken:g} is taken" in said
        )
        assert table["source_px"].tolist() == pytest.approx([1, 0.2 / taken])


REFUSED = {  # flags, and what is said; nothing is made
    "nothing known": (["--target_spacing_mm", "0.2"], "no image tells its pixel size; give spacing_mm"),
    "micrometres": (
        ["--target_spacing_mm", "100"],
        "--target_spacing_mm 100.0: must lie between 0 and 2",
    ),
    "negative": (["--target_spacing_mm", "-0.1"], "must lie between 0 and 2"),
    "no number": (["--target_spacing_mm", "nan"], "must lie between 0 and 2"),
    "too fine": (
        ["--target_spacing_mm", "0.001", "--pixel_spacing_mm", "0.2"],
        "200 x 240 px of 0.2 mm would be 40,000 x 48,000 at --target_spacing_mm 0.001",
    ),
    "too coarse": (
        ["--target_spacing_mm", "2", "--pixel_spacing_mm", "0.006"],
        "would be 1 x 1 at --target_spacing_mm 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_refused(tmp_path, name, capsys):
    flags, said = REFUSED[name]
    write_archive(tmp_path, (0.2,), ("",))
    assert mammo.main([*places_in(tmp_path), *WITHOUT, "--extract_only", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/[!.]*"))


# ---- what users see


def test_runs_say_what_is_enlarged(mixed, tiles, capsys):
    told = "scale     0.1 mm per pixel, from 0.05 to 0.27; 1 of 4 images enlarged, from 0.27,"
    assert told in report.describe_extraction(tiles.cache, mammo.COLUMNS, TARGET)
    flags = [*places_in(mixed), *WITHOUT, "--target_spacing_mm", str(TARGET)]
    assert mammo.main([*flags, "--dry_run"]) == 0
    assert told in capsys.readouterr().out


def test_pictures_and_inspect_show_the_tiles_of_the_cache(mixed, tiles, tmp_path):
    config = config_of(mixed, "--target_spacing_mm", str(TARGET))
    for number, source in images.list_sources(mixed / "images").iterrows():
        sample = mammo.load_sample(number, source, config)
        kept = sample.table[sample.table["rejected_by"] == ""]
        own = tiles.table[tiles.table["image"] == number]
        np.testing.assert_array_equal(kept[["x", "y"]], own[["x", "y"]])
        np.testing.assert_allclose(kept["freq_energy"], own["freq_energy"])
        assert sample.image.shape == sample.mask.shape
        assert max(sample.image.shape) == pytest.approx(FIELD[0] / TARGET, abs=1)
    path = mixed / "images" / "0.png"
    flags = [str(path), "--target_spacing_mm", "0.06", "--output_dir", str(tmp_path)]
    options = prep.make_inspect_parser().parse_args(flags)
    told = dict(prep.inspect_file(path, options, prep.training_method(0.06))[0])
    usual = mammo.Config(target_spacing_mm=0.06)
    record, _ = mammo.extract_image(str(path), SPACINGS[0], usual)
    assert told["tiles"] == f"{len(record['tiles']['x'])} of {record['positions']} of 512 px kept"
    assert (told["size"][:13], told["scaled to"]) == ("960 x 800 px,", "0.06 mm, 800 x 667 px")
    alone = tmp_path / "alone.png"
    cv2.imwrite(str(alone), mammogram(0.2))
    with pytest.raises(prep.SkipImageError, match="pixel size is unknown"):
        prep.inspect_file(alone, options, prep.training_method(0.06))


@pytest.mark.slow
def test_a_run_and_a_classifier_work_on_mixed_detectors(tmp_path, capsys, monkeypatch):
    """Extraction, an epoch, a probe on boxes, figures, and single files at the checkpoint's scale."""
    rows, known = [], {}
    for number in range(12):
        spacing = (0.2, 0.3, 0.45)[number % 3]
        disc = (20 + 0.7 * number, 14.0) if number % 2 else None
        name = f"{'test' if number >= 8 else 'training'}/{number}.png"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / name), mammogram(spacing, disc, number))
        known[name] = spacing
        boxes = [{"finding": ["mass"], **box_of(spacing, disc)}] if disc else []
        split = name.partition("/")[0]
        rows.append({"image": name, "split": split, "mass": int(bool(disc)), "boxes": json.dumps(boxes)})
    table = pd.DataFrame(rows).assign(study_id=[str(number) for number in range(12)])
    table["calcification"] = 0
    table.to_csv(tmp_path / "images" / "labels.csv", index=False)
    manifest = pd.DataFrame({"file": list(known), "spacing_mm": list(known.values())})
    manifest.to_csv(tmp_path / "images" / "manifest.csv", index=False)
    size = ["--tile_size", "32", "--tile_stride", "16"]
    flags = [*places_in(tmp_path), *WITHOUT, *size, "--epochs", "1", "--target_spacing_mm", "0.3"]
    flags += ["--min_tile_intensity", "0", "--polarity", "as_is", "--run_name", "byol"]
    assert mammo.main(flags) == 0
    assert "4 of 12 images enlarged, from 0.45," in capsys.readouterr().out
    places = [*places_in(tmp_path), "--labels", str(tmp_path / "images/labels.csv")]
    places += (
        "--findings mass --device cpu --num_workers 1 --bootstrap 100 --wandb_mode disabled".split()
    )
    weights = str(tmp_path / "runs/byol/mammogram_byol_best.pth")
    assert classifier.main(["train", "--mode", "probe", "--weights", weights, *places]) == 0
    best = ["--weights", str(tmp_path / "runs/classifier_probe/classifier_best.pth"), *places]
    assert classifier.main(["evaluate", *best]) == 0
    judged = pd.read_csv(tmp_path / "runs/evaluate/predictions_tile.csv")
    truth = judged.merge(table, on="image", suffixes=("", "_of_image"))
    for tile in truth[
        truth["mass"] == 1
    ].itertuples():  # a whole quarter of the box is in it, or its centre
        (box,), side = json.loads(tile.boxes), 32 * 0.3 / known[tile.image]
        across = min(tile.x + side, box["xmax"]) - max(tile.x, box["xmin"])
        down = min(tile.y + side, box["ymax"]) - max(tile.y, box["ymin"])
        share = across * down / (box["xmax"] - box["xmin"]) / (box["ymax"] - box["ymin"])
        assert share > 0.2
    assert set(truth["mass"].dropna()) == {0, 1}
    cv2.imwrite(str(tmp_path / "alone.png"), mammogram(0.3))
    files, drawn = [str(tmp_path / "images" / "test"), str(tmp_path / "alone.png")], []
    monkeypatch.setattr(classifier, "draw_prediction", lambda *told: drawn.append(told[:2]))
    assert classifier.main(["predict", *best, *files]) == 0
    found = pd.read_csv(tmp_path / "runs/predict/predictions.csv")
    assert "its pixel size is unknown" in found["error"].iloc[-1]
    for image, own in drawn:  # what the map is drawn on is in px of the tiles
        assert image.shape == pytest.approx(np.array(FIELD) / 0.3, abs=1)
        assert (own.table[["y", "x"]].to_numpy() + 32 <= image.shape).all()
    assert len(drawn) == len(found) - 1
    for row in found.iloc[:-1].itertuples():
        tiles_of = judged[judged["image"] == f"test/{Path(row.image).name}"]
        top = tiles_of.loc[tiles_of["p_mass"].idxmax()]
        assert row.p_mass == pytest.approx(top["p_mass"], abs=1e-3)
        assert ((tiles_of[["x", "y"]] == [row.x_mass, row.y_mass]).all(axis=1)).any()
