"""The pixel cache: contents, key, resumption, errors."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import stages
from conftest import assert_same_cache, breast_image, images_done, small_config, write_images

import byol_mammo.extraction
import byol_mammo.pictures
import byol_mammo.report
import train_byol_mammo as mammo
from byol_mammo import cluster, image_head


def test_pixels_are_the_masked_originals(archive, tiles):
    pixels = np.load(tiles.cache / "pixels.npy", mmap_mode="r")
    assert pixels.dtype == np.uint16
    assert len(pixels) == (tiles.images["height"] * tiles.images["width"]).sum()
    assert_masked_originals(archive, tiles)
    assert (tiles.images["bit_depth"] == 12).all()
    assert len(np.unique(pixels)) > 1000


def assert_masked_originals(folder, tiles):
    """Each image's pixels in the cache are those of its file, 0 outside the breast mask."""
    pixels = np.load(tiles.cache / "pixels.npy", mmap_mode="r")
    for row in tiles.images.itertuples():
        source = mammo.read_mammogram(folder / "images" / row.image)
        mask = mammo.segment_breast_tissue(source)
        box = (slice(row.y0, row.y0 + row.height), slice(row.x0, row.x0 + row.width))
        stored = pixels[row.offset : row.offset + row.height * row.width].reshape(row.height, -1)
        np.testing.assert_array_equal(stored, np.where(mask, source, 0)[box])


@pytest.mark.parametrize("flags", [(), ("--max_tiles", "9")])
def test_images_of_two_depths_share_16_bits_and_keep_their_values(tmp_path, flags):
    write_images(tmp_path / "images", 2, bits=12)
    cv2.imwrite(str(tmp_path / "images" / "shallow.png"), breast_image(seed=7)[0])
    tiles = mammo.open_tiles(mammo.build_cache(small_config(tmp_path, *flags)))
    assert sorted(tiles.images["bit_depth"]) == [8, 12, 12]
    assert np.load(tiles.cache / "pixels.npy", mmap_mode="r").dtype == np.uint16
    assert_masked_originals(tmp_path, tiles)


@pytest.fixture
def server(monkeypatch):
    """A file server that answers the opening of some images by an error: its number by the image's name,
    and how often; `asked` holds the names of all images that were opened."""
    errors, asked, plain = {}, [], mammo.images.Image.open

    def shaky(path, **options):
        name = Path(path).name
        asked.append(name)
        number, times = errors.get(name, (0, 0))
        if times:
            errors[name] = number, times - 1
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, **options)

    monkeypatch.setattr(mammo.images.Image, "open", shaky)
    monkeypatch.setattr(mammo.images, "RETRY_AFTER", 0)
    return SimpleNamespace(errors=errors, asked=asked)


def test_what_the_system_did_not_give_is_no_skip_and_is_tried_again(tmp_path, server):
    names = sorted(path.name for path in write_images(tmp_path / "images", 4).iterdir())
    server.errors |= {names[0]: (errno.ESTALE, 9), names[2]: (errno.EACCES, 9)}
    config = small_config(tmp_path)
    with pytest.raises(mammo.MammoError, match=f"2 of 4 images .*{names[0]}.*Stale") as told:
        mammo.build_cache(config)
    assert "move them out of --data_dir" in str(told.value)
    assert set(server.asked) == set(names)  # the others ended first
    assert server.asked.count(names[0]) == 2
    assert server.asked.count(names[2]) == 1
    assert not list((tmp_path / "cache").glob("[!.]*"))
    server.errors.clear()
    server.asked.clear()
    cache = mammo.build_cache(config)
    assert sorted(server.asked) == [names[0], names[2]]
    assert set(pd.read_csv(cache / "rejections.csv", keep_default_na=False)["error"]) == {""}
    shutil.copytree(tmp_path / "images", tmp_path / "calm" / "images")
    assert_same_cache(cache, mammo.build_cache(small_config(tmp_path / "calm")))


def test_a_passing_error_of_the_system_is_waited_for(tmp_path, server):
    names = sorted(path.name for path in write_images(tmp_path / "images", 2).iterdir())
    server.errors |= {names[0]: (errno.EIO, 1), names[1]: (errno.ETIMEDOUT, 1)}
    cache = mammo.build_cache(small_config(tmp_path))
    funnel = pd.read_csv(cache / "rejections.csv", keep_default_na=False)
    assert set(funnel["error"]) == {""}


def test_an_image_that_vanished_is_no_skip(tmp_path, monkeypatch):
    gone = write_images(tmp_path / "images", 2) / "s0_i1.png"
    jobs = mammo.extraction_jobs

    def late(*words):
        gone.unlink(missing_ok=True)
        return jobs(*words)

    monkeypatch.setattr(mammo, "extraction_jobs", late)
    with pytest.raises(mammo.MammoError, match=rf"1 of 2 images .*{gone.name} \(no such file\)"):
        mammo.build_cache(small_config(tmp_path))


def test_a_place_beyond_all_files_is_damage_not_the_system(tmp_path, server):
    write_images(tmp_path / "images", 2)
    server.errors["s0_i0.png"] = errno.EINVAL, 9  # of seek()
    cache = mammo.build_cache(small_config(tmp_path))
    funnel = pd.read_csv(cache / "rejections.csv", keep_default_na=False)
    assert list(funnel["error"]) == ["can't be decoded: damaged, or not an image", ""]


def test_what_a_clusters_workers_were_not_given_is_tried_again(tmp_path, monkeypatch):
    def results(dask, function, jobs, *_):
        yield from ((number, function(*job)) for number, job in enumerate(jobs))

    def extract(index, path, folder):
        return {"index": index, "error": "no", **({"unread": path} if index == 1 else {})}

    monkeypatch.setattr(cluster, "results", results)
    with pytest.raises(mammo.MammoError, match=r"1 of 3 images .*b \(no\)"):
        byol_mammo.extraction.extract_missing(
            extract, [(0, "a"), (1, "b"), (2, "c")], tmp_path / "extracted" / "here", 1, "none", "x:1"
        )
    assert set(byol_mammo.extraction.read_records(tmp_path / "extracted")) == {0, 2}


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 2)
    for name in ("closed", "lost+found"):
        write_images(tmp_path / "images" / name, 1)
    plain = os.scandir

    def scandir(path):
        if Path(path).name in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(mammo.MammoError, match=r"images/closed: you may not read .*folder without it"):
        mammo.images.find_images(tmp_path / "images")
    (tmp_path / "images" / "closed").rename(tmp_path / "closed")
    assert len(mammo.images.find_images(tmp_path / "images")) == 2


def open_pixels(cache, values):
    images = pd.DataFrame({"image": ["a"], "study_id": "a", "laterality": "", "view": "", "offset": 0})
    images = images.assign(height=values // 2**16, width=2**16, y0=0, x0=0, low=0.0, high=1.0)
    images.to_csv(cache / "images.csv", index=False)
    pd.DataFrame({"image": [0], "x": 0, "y": 0}).to_csv(cache / "tiles.csv", index=False)
    (cache / "cache.json").write_text('{"inputs": {"settings": {"tile_size": 64}}}')
    tiles = mammo.open_tiles(cache)
    return mammo.cut_regions(tiles, np.array([0]), 32).shape[-1] * len(tiles.pixels) // 64


def open_averaged(cache, values):
    images = pd.DataFrame({"height": [values // 2**16 * 2], "width": 2**17})
    return len(mammo.caches.open_reduced(cache, np.empty(0), images, 2, 1))


def open_features(cache, values):
    return image_head.keep_features(cache / "features.npy", (values // 64, 64), list).size


@pytest.mark.parametrize(
    ("name", "dtype", "opened"),
    [
        ("pixels.npy", np.uint16, open_pixels),
        ("pixels_reduced_2.npy", np.uint16, open_averaged),
        ("features.npy", np.float32, open_features),
    ],
)
def test_what_is_mapped_may_be_larger_than_memory(tmp_path, name, dtype, opened):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = int(1.5 * memory) // np.dtype(dtype).itemsize >> 16 << 16
    path = tmp_path / name
    with path.open("wb") as file:
        mammo.files.write_npy_header(file, np.dtype(dtype), values)
        try:
            file.truncate(mammo.files.NPY_HEADER + values * np.dtype(dtype).itemsize)
        except OSError as error:
            pytest.skip(f"no files of that size here ({error})")
    if path.stat().st_blocks * 512 > 2**20:
        path.unlink()
        pytest.skip("no sparse files here")
    assert opened(tmp_path, values) == values
    path.unlink()


def test_tables_hold_the_contract_and_agree(tiles):
    columns = "image study_id laterality view offset height width y0 x0 low high bit_depth spacing_mm"
    assert list(tiles.images.columns) == columns.split()
    assert list(tiles.table.columns) == ["image", "x", "y", *mammo.SCORES]
    funnel = pd.read_csv(tiles.cache / "rejections.csv", keep_default_na=False)
    rejected = funnel[[*mammo.COLUMNS, "capped"]].sum(axis=1)
    assert (funnel["positions"] == funnel["kept"] + rejected).all()
    assert funnel["kept"].sum() == len(tiles)
    for tile, centre, layout in zip(tiles.table.itertuples(), tiles.centre, tiles.layout, strict=True):
        image = tiles.images.loc[tile.image]
        assert tile.x - image["x0"] >= 0
        assert tile.x - image["x0"] + 128 <= layout[2]
        assert centre.tolist() == [tile.x + 64 - image["x0"], tile.y + 64 - image["y0"]]


def test_second_build_finds_the_cache(archive):
    config = small_config(archive)
    before = (mammo.build_cache(config) / "pixels.npy").stat().st_mtime_ns
    assert (mammo.build_cache(config) / "pixels.npy").stat().st_mtime_ns == before


def test_labels_outside_the_breast_never_reach_the_cache(tmp_path):
    image, mask = breast_image()
    image[10:40, 270:310] = 255
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image)
    tiles = mammo.open_tiles(mammo.build_cache(small_config(tmp_path)))
    row = tiles.images.loc[0]
    stored = tiles.pixels.numpy().reshape(row["height"], row["width"])
    outside = ~mask[row["y0"] : row["y0"] + row["height"], row["x0"] : row["x0"] + row["width"]]
    grown = cv2.erode(outside.astype(np.uint8), np.ones((9, 9))) > 0
    assert not stored[grown].any()


SETTINGS = {
    "tile_size": 256, "tile_stride": 128, "min_breast_ratio": 0.5, "min_freq_energy": 0.1,
    "min_tile_intensity": 1.0, "min_non_zero_pixels": 0.1, "exclude_pectoral": False,
    "pixel_spacing_mm": 0.1, "max_tiles": 7, "high_freq_energy": 0.05, "min_convergence": 0.5,
    "polarity": "as_is",
}  # fmt: skip
OTHERS = {
    "batch_size": 4, "view_size": 64, "seed": 3, "epochs": 2, "num_workers": 1, "output_dir": "x"
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({**SETTINGS, **OTHERS}))
def test_key_changes_exactly_when_its_inputs_do(name):
    sources = pd.DataFrame({"path": ["/a/b.png"], "image": ["b.png"], "size": [3], "mtime_ns": [5]})
    plain = mammo.Config()
    changed = dataclasses.replace(plain, **{name: {**SETTINGS, **OTHERS}[name]})
    keys = {mammo.cache_key(mammo.cache_inputs(sources, config)) for config in (plain, changed)}
    assert len(keys) == (2 if name in SETTINGS else 1)


@pytest.mark.parametrize("column", ["image", "size", "mtime_ns"])
def test_key_follows_the_files_but_not_their_folder(column):
    row = {"path": "/a/b.png", "image": "b.png", "size": 3, "mtime_ns": 5}
    config = mammo.Config()

    def key(**change):
        return mammo.cache_key(mammo.cache_inputs(pd.DataFrame([{**row, **change}]), config))

    assert key() == key(path="/elsewhere/b.png")
    assert key() != key(**{column: "c.png" if column == "image" else 99})


def test_interrupted_build_goes_on_and_ends_the_same(tmp_path, archive, monkeypatch):
    shutil.copytree(archive / "images", tmp_path / "images")  # copytree keeps mtimes
    config = small_config(tmp_path)
    calls = []
    extract = mammo.extract_image

    def failing(path, *args):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extract(path, *args)

    monkeypatch.setattr(mammo, "extract_image", failing)
    with pytest.raises(KeyboardInterrupt):
        mammo.build_cache(config)
    assert not list((tmp_path / "cache").glob("[!.]*"))
    cache = mammo.build_cache(config)
    assert len(calls) == 5  # two kept, one tried again, one left
    whole = mammo.build_cache(small_config(archive))
    assert_same_cache(cache, whole)
    assert not (cache / "extracted").exists()


def left_by_a_first_start(folder, archive, monkeypatch):
    """The config of an extraction that Ctrl-C ended with three of the archive's four images done."""
    shutil.copytree(archive / "images", folder / "images")
    config, extract, calls = small_config(folder), mammo.extract_image, []

    def interrupted(*job):
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return extract(*job)

    with monkeypatch.context() as patch:
        patch.setattr(mammo, "extract_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mammo.build_cache(config)
    assert images_done(folder) == 3
    return config


def lines_and_pixels(folder):
    """The file with a line about each image and the one with their pixels, of an unfinished cache."""
    (lines,) = folder.glob("cache/.*.building/**/*.jsonl")
    pixels = max(lines.parent.glob("*.npy"), key=lambda path: path.stat().st_size)
    assert pixels.stat().st_size > 100_000
    return lines, pixels


def write_at_the_end(path, content):
    with path.open("ab") as file:
        file.write(content)


def cut_by(path, size):
    os.truncate(path, path.stat().st_size - size)


DAMAGE = {  # what happens to the two files, and how many of the 3 images that costs
    "nothing is wrong": (lambda lines, pixels: None, 0),
    "half a line": (lambda lines, pixels: write_at_the_end(lines, b'{"index": 3, "er'), 0),
    "a line of nothing": (lambda lines, pixels: write_at_the_end(lines, bytes(40)), 0),
    "pixels without a line": (lambda lines, pixels: write_at_the_end(pixels, bytes(1001)), 0),
    "lines gone": (lambda lines, pixels: lines.unlink(), 3),
    "pixels gone": (lambda lines, pixels: pixels.unlink(), 3),
    "pixels cut": (lambda lines, pixels: cut_by(pixels, 101), 1),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_what_an_interrupted_extraction_leaves_is_used_or_made_again(
    archive, tmp_path, name, monkeypatch
):
    config = left_by_a_first_start(tmp_path, archive, monkeypatch)
    damage, cost = DAMAGE[name]
    damage(*lines_and_pixels(tmp_path))
    again, extract = [], mammo.extract_image
    monkeypatch.setattr(mammo, "extract_image", lambda *job: again.append(job) or extract(*job))
    cache = mammo.build_cache(config)
    assert_same_cache(cache, mammo.build_cache(small_config(archive)))
    assert len(again) == 1 + cost
    assert not (cache / "extracted").exists()


def test_what_another_node_extracted_is_used_and_left_alone(archive, tmp_path, monkeypatch):
    """It may be writing there still: whatever is in its folder stays as it is."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another")
        config = left_by_a_first_start(tmp_path, archive, monkeypatch)
    lines, pixels = lines_and_pixels(tmp_path)
    for path in set(lines.parent.iterdir()) - {lines, *lines.parent.glob("*.npy")}:
        path.unlink()  # where a folder is closed in order, it was killed
    write_at_the_end(pixels, b"odd")
    before = {path: path.read_bytes() for path in (lines, pixels)}
    again, extract = [], mammo.extract_image

    def looking(*job):
        again.append(job)
        assert {path: path.read_bytes() for path in before} == before
        return extract(*job)

    monkeypatch.setattr(mammo, "extract_image", looking)
    cache = mammo.build_cache(config)
    assert len(again) == 1
    assert_same_cache(cache, mammo.build_cache(small_config(archive)))


def no_lock(number):
    """FileLock on a file system whose locks don't reach other nodes (0), or that raises this error."""

    class NoLock:
        def __init__(self, path, **options):
            self.path = path

        def acquire(self, timeout=0):
            if number:
                raise OSError(number, os.strerror(number))
            return contextlib.nullcontext()

    return NoLock


@pytest.mark.parametrize("number", [0, errno.ENOLCK])
def test_two_builders_whose_lock_fails_them_extract_side_by_side(archive, tmp_path, monkeypatch, number):
    """A second one extracts in between."""
    config = left_by_a_first_start(tmp_path, archive, monkeypatch)
    extract, calls = mammo.extract_image, []

    def disturbed(*job):
        calls.append(job)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                if not number:  # else they may share a node
                    patch.setattr(socket, "gethostname", lambda: "another")
                patch.setattr(mammo, "finish_cache", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    mammo.build_cache(config)
        return extract(*job)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mammo.processes, "FileLock", no_lock(number))
    monkeypatch.setattr(mammo, "extract_image", disturbed)
    cache = mammo.build_cache(config)
    assert len(calls) == 2  # both extracted the fourth image
    assert_same_cache(cache, mammo.build_cache(small_config(archive)))


def test_a_line_whose_pixels_are_gone_never_comes_back(tmp_path):
    """Scratch file systems purge old files; what is extracted next may reach as far as they did."""

    def extract(index, grey):
        record = {"index": index, "bit_depth": 8, "shape": [4, 5]}
        path, _ = byol_mammo.extraction.pixel_file(journal.folder, 8)
        pixels = np.full((4, 5), grey, np.uint8)
        journal.add({**record, "offset": byol_mammo.extraction.append_pixels(path, pixels)})

    for index, grey in ((0, 1), (7, 2)):
        finished = byol_mammo.extraction.read_records(tmp_path)
        journal = byol_mammo.extraction.Journal(tmp_path / "here", finished)
        extract(index, grey)
        journal.close()
        assert set(byol_mammo.extraction.read_records(tmp_path)) == {index}
        if index == 0:
            byol_mammo.extraction.pixel_file(journal.folder, 8)[0].unlink()


def test_an_image_that_did_not_end_gives_its_room_back(archive, tmp_path, monkeypatch):
    shutil.copytree(archive / "images", tmp_path / "images")
    extract, sizes = mammo.extract_to_file, []

    def room():
        return sum(path.stat().st_size for path in tmp_path.glob("cache/.*.building/**/*.npy"))

    def interrupted(*job, **options):
        sizes.append(room())
        record = extract(*job, **options)
        if len(sizes) == 4:
            assert room() > sizes[-1]  # its pixels are there and no line about them
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(mammo, "extract_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mammo.build_cache(small_config(tmp_path))
    assert room() == sizes[-1]
    assert images_done(tmp_path) == 3


def test_jobs_that_end_while_another_fails_are_not_lost(archive, monkeypatch):
    monkeypatch.setattr(mammo.processes, "available_cores", lambda: 2)
    results = []

    def note(number):
        results.append(number)
        if len(results) == 1:
            raise KeyboardInterrupt

    def wait(number):
        time.sleep(0.1 * number)
        return number

    jobs = [(number,) for number in range(1, 9)]
    with pytest.raises(KeyboardInterrupt):
        mammo.processes.run_in_parallel(
            wait, jobs, 2, mammo.tracking.progress(mode="none"), done=note, threads=True
        )
    assert 2 <= len(results) < 8


def test_an_image_without_tiles_takes_no_place_behind_one_that_was_cut_short(tmp_path):
    write_images(tmp_path / "images", 1, bits=12)
    config = small_config(tmp_path, "--min_freq_energy", "1e9", "--min_convergence", "0")
    path, _ = byol_mammo.extraction.pixel_file(tmp_path, 12)
    path.write_bytes(b"cut")
    image = str(tmp_path / "images" / "s0_i0.png")
    record = mammo.extract_to_file(0, image, 0.3, config, folder=str(tmp_path))
    assert record["tiles"]["x"] == []
    assert path.read_bytes() == b"cut"


def test_unusable_images_are_skipped_by_name_with_the_reason(tmp_path):
    folder = write_images(tmp_path / "images", 2)
    good = (folder / "s0_i0.png").read_bytes()
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    cv2.imwrite(str(folder / "black.png"), np.zeros((300, 300), np.uint8))
    cv2.imwrite(str(folder / "small.png"), breast_image(100, 100)[0])
    (folder / "folder.png").mkdir()
    cache = mammo.build_cache(small_config(tmp_path))
    funnel = pd.read_csv(cache / "rejections.csv", keep_default_na=False).set_index("image")
    assert set(funnel.index[funnel["error"] != ""]) == {
        "truncated.png", "text.png", "empty.png", "black.png", "small.png"
    }  # fmt: skip
    assert "no breast" in funnel["error"]["black.png"]
    assert "lower --tile_size" in funnel["error"]["small.png"]
    assert len(mammo.open_tiles(cache).images) == 2
    assert "skipped 5" in byol_mammo.report.describe_funnel(funnel.reset_index(), mammo.COLUMNS)


def test_no_tile_at_all_is_an_error_with_the_funnel(tmp_path):
    write_images(tmp_path / "images", 1)
    with pytest.raises(mammo.MammoError, match=r"no tile was kept(.|\n)*freq_energy"):
        mammo.build_cache(small_config(tmp_path, "--min_freq_energy", "1e9", "--min_convergence", "0"))
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_max_tiles_caps_evenly_by_energy(archive, tiles):
    capped = mammo.open_tiles(mammo.build_cache(small_config(archive, "--max_tiles", "10")))
    counts = capped.table["image"].value_counts()
    assert len(capped) == 10
    assert counts.max() - counts.min() <= 1
    for image, group in capped.table.groupby("image"):
        every = tiles.table[tiles.table["image"] == image]["freq_energy"]
        assert group["freq_energy"].min() >= every.nlargest(len(group)).min()
    assert len(capped.pixels) <= len(tiles.pixels)
    funnel = pd.read_csv(capped.cache / "rejections.csv")
    assert funnel["capped"].sum() == len(tiles) - 10


def test_reduced_pixels_are_block_means(tiles):
    reduced = mammo.open_tiles(tiles.cache, reduce=4)
    full = tiles.pixels.numpy().view(np.uint16)
    small = reduced.pixels.numpy().view(np.uint16)
    offset = 0
    for row in tiles.images.itertuples():
        image = full[row.offset : row.offset + row.height * row.width].reshape(row.height, row.width)
        padded = np.pad(image, ((0, -row.height % 4), (0, -row.width % 4))).astype(float)
        h, w = padded.shape[0] // 4, padded.shape[1] // 4
        means = padded.reshape(h, 4, w, 4).mean((1, 3))
        np.testing.assert_allclose(small[offset : offset + h * w].reshape(h, w), means, atol=0.51)
        offset += h * w
    assert offset == len(small)


def test_manifest_gives_study_and_spacing(tmp_path):
    folder = write_images(tmp_path / "images", 2)
    rows = [
        {
            "file": "images/s0_i0.png",
            "study_id": "007",
            "laterality": "L",
            "view": "CC",
            "spacing_mm": 0.2,
        },
        {"file": "images/s0_i1.png", "study_id": "007", "laterality": "R", "view": "CC"},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    sources = mammo.images.list_sources(folder)
    assert sources["study_id"].tolist() == ["007", "007"]
    assert sources["laterality"].tolist() == ["L", "R"]
    images = pd.read_csv(
        mammo.build_cache(small_config(tmp_path)) / "images.csv", dtype={"study_id": str}
    )
    assert images["spacing_mm"].tolist() == [0.2, 0.3]
    assert images["study_id"].tolist() == ["007", "007"]


def test_parallel_extraction_writes_the_same_cache(tmp_path, monkeypatch):
    """Four processes append to the same files, images of many sizes and two depths."""
    stages.serve()
    monkeypatch.setattr(mammo.processes, "available_cores", lambda: 4)
    (tmp_path / "images").mkdir()
    for index in range(16):
        image, _ = breast_image(300 + 16 * index, 300, (8, 12)[index % 3 == 0], seed=index)
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), image)
    flags = ("--tile_stride", "128", "--num_workers")
    cache = mammo.build_cache(small_config(tmp_path, *flags, "4"))
    elsewhere = ("--cache_dir", str(tmp_path / "alone"))
    assert_same_cache(cache, mammo.build_cache(small_config(tmp_path, *flags, "1", *elsewhere)))


def _build(config, out):
    out.put(str(mammo.build_cache(config)))


def test_two_runs_at_once_build_one_cache(tmp_path):
    write_images(tmp_path / "images", 3)
    config = small_config(tmp_path)
    context = stages.serve()
    out = context.Queue()
    runs = [context.Process(target=_build, args=(config, out)) for _ in range(2)]
    for run in runs:
        run.start()
    found = {out.get(timeout=120) for _ in runs}
    for run in runs:
        run.join()
    assert len(found) == 1
    assert json.loads((Path(found.pop()) / "cache.json").read_text())["finished"]


def test_images_in_linked_folders_are_found_once(tmp_path):
    write_images(tmp_path / "site", 1)
    write_images(tmp_path / "images" / "a", 1)
    (tmp_path / "images" / "b").symlink_to(tmp_path / "site")
    (tmp_path / "site" / "back").symlink_to(tmp_path / "images")  # a circle
    found = mammo.images.list_sources(tmp_path / "images")["image"]
    assert [Path(name).parent.as_posix() for name in found] == ["a", "b"]


def test_a_link_to_a_folder_of_the_archive_renames_no_image(tmp_path):
    write_images(tmp_path / "split" / "training", 2)
    (tmp_path / "split" / "latest").symlink_to("training")
    found = mammo.images.list_sources(tmp_path / "split")["image"]
    assert [Path(name).parent.as_posix() for name in found] == ["training"] * 2


def test_a_folder_that_fails_to_list_its_images_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 1)
    real = os.scandir

    def failing(folder):
        if Path(folder).name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match=r"Input/output error.*b"):
        mammo.images.find_images(tmp_path)


@pytest.mark.parametrize("table", ["file,view\na.png, cc\nb.png,Mlo \nc.png,\n", "file\na.png\n"])
def test_views_of_ones_own_manifest_are_those_that_the_muscle_goes_by(tmp_path, table):
    (tmp_path / "manifest.csv").write_text(table)
    views = mammo.images.read_manifest(tmp_path)["view"].fillna("").tolist()
    assert views == (["CC", "MLO", ""] if "view" in table else [""])


def test_a_linked_folder_keeps_the_manifest_beside_the_link(tmp_path):
    write_images(tmp_path / "elsewhere", 1)
    name = next((tmp_path / "elsewhere").iterdir()).name
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "training").symlink_to(tmp_path / "elsewhere")
    table = f"file,study_id,spacing_mm\ntraining/{name},007,0.05\n"
    (tmp_path / "split" / "manifest.csv").write_text(table)
    sources = mammo.images.list_sources(tmp_path / "split" / "training")
    assert sources.loc[0, ["study_id", "spacing_mm"]].tolist() == ["007", 0.05]


def test_a_link_to_a_split_finds_the_manifest_beside_the_split(tmp_path):
    write_images(tmp_path / "split" / "training", 1)
    name = next((tmp_path / "split" / "training").iterdir()).name
    table = f"file,study_id,spacing_mm\ntraining/{name},007,0.05\n"
    (tmp_path / "split" / "manifest.csv").write_text(table)
    (tmp_path / "mine").symlink_to(tmp_path / "split" / "training")
    sources = mammo.images.list_sources(tmp_path / "mine")
    assert sources.loc[0, ["image", "study_id", "spacing_mm"]].tolist() == [name, "007", 0.05]


def test_study_ids_stay_words(archive, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(mammo.build_cache(small_config(archive)), cache)
    images = pd.read_csv(cache / "images.csv")
    images["study_id"] = [f"{number:03}" for number in images.index]
    images.to_csv(cache / "images.csv", index=False)
    assert mammo.open_tiles(cache).images["study_id"][:2].tolist() == ["000", "001"]


def test_a_setting_typed_out_is_the_default(tmp_path):
    write_images(tmp_path, 1)
    keys = set()
    for flags in ([], ["--min_tile_intensity", "40", "--max_tiles", "0"]):
        config = mammo.parse_args(["--data_dir", str(tmp_path), *flags])
        keys.add(mammo.cache_key(mammo.cache_inputs(mammo.images.list_sources(tmp_path), config)))
    assert len(keys) == 1


def test_images_that_go_after_the_extraction_are_left_out_of_its_pictures(tmp_path, capsys):
    write_images(tmp_path / "images", 3)
    config = small_config(tmp_path)
    cache = mammo.build_cache(config)
    sorted((tmp_path / "images").iterdir())[0].unlink()
    mammo.show_extraction(cache, config)
    assert all((cache / name).is_file() for name in byol_mammo.pictures.EXTRACTION_PICTURES)
    assert "note" not in capsys.readouterr().err


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(mammo.MammoError, match="no such folder"):
        mammo.images.list_sources(tmp_path / "nowhere")
    with pytest.raises(mammo.MammoError, match=r"no image with \.png"):
        mammo.images.list_sources(tmp_path)
