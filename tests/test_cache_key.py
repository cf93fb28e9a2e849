"""What a cache and a resumption depend on: images, settings, and the code that makes the tiles."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from conftest import ROOT, SMALL, small_config, write_images

import train_byol_mammo as mammo
from byol_mammo import settings

PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))


def test_a_finished_extraction_is_used_whatever_happens_to_its_pictures(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", 2)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it can't be imported
    flags = ["--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "runs")]
    flags += ["--cache_dir", str(tmp_path / "cache"), *SMALL, "--extract_only"]
    for _ in range(2):
        assert mammo.main(flags) == 0
        assert "no pictures of" in capsys.readouterr().err
    (cache,) = (tmp_path / "cache").glob("[!.]*")
    assert mammo.caches.is_finished(cache)


OPENING = "OPENING = 9  # px of the reduced copy, diameter of what is cut off as a bridge"
EDITS = {  # a piece of the code, what stands there instead, whether that makes a new cache
    "a comment": (OPENING, "OPENING = 9  # another comment", False),
    "a docstring": (
        '    """What of a (H, W) bool array a disc of OPENING px can cover."""',
        '    """Other words,\n\n    in two more lines."""',
        False,
    ),
    "plumbing": ("caches.build_once(final, build)", "caches.build_once(final, build=build)", False),
    "a mask": (OPENING, "OPENING = 7", True),
    "how many px are asked for the window": ("SAMPLE = 100_000", "SAMPLE = 90_000", True),
    "a filter": ("SPECK_SIGMA = 0.13", "SPECK_SIGMA = 0.14", True),
    "the choice of tiles": ("(GROUP_RADIUS / spacing_mm)", "(GROUP_SIZE / spacing_mm)", True),
}


def pixel_code(folder, before="", after=""):
    """PIXEL_CODE with a piece of its text, or of the main script's, replaced in copies of the files."""
    parts, found = [], {}
    for number, (file, start, end) in enumerate(mammo.PIXEL_CODE):
        text = Path(file).read_text()
        found[file] = text.count(before) if before else 0  # a file may have several parts
        (folder / f"{number}.py").write_text(text.replace(before, after) if before else text)
        parts.append((str(folder / f"{number}.py"), start, end))
    assert sum(found.values()) == bool(before)
    return parts


@pytest.mark.parametrize("name", sorted(EDITS))
def test_a_new_cache_is_made_where_pixels_or_tiles_may_differ(tmp_path, name):
    before, after, anew = EDITS[name]
    old = settings.code_version(pixel_code(tmp_path))
    new = settings.code_version(pixel_code(tmp_path, before, after))
    assert (old != new) == anew


def test_the_code_version_is_the_same_on_every_python():
    """On those that are here: a change of Python must not extract an archive again."""
    code = (
        "import sys, json; from byol_mammo import settings; "
        "print(settings.code_version(json.loads(sys.argv[1])))"
    )
    parts = json.dumps([[str(file), *ends] for file, *ends in mammo.PIXEL_CODE])
    versions = {}
    for minor in range(10, 15):
        for place in (shutil.which(f"python3.{minor}"), *PYENV.glob(f"versions/3.{minor}.*/bin/python")):
            if place:
                command = [place, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
                done = subprocess.run([*command, parts], capture_output=True, text=True, check=False)
                if done.returncode == 0:  # else pyenv's stand-in for a Python that isn't chosen
                    versions[minor] = done.stdout.strip()
    versions[sys.version_info.minor] = settings.code_version(mammo.PIXEL_CODE)
    assert len(set(versions.values())) == 1, versions


def test_a_cache_by_other_versions_is_used_and_said(archive, capsys):
    config = small_config(archive)
    cache = mammo.build_cache(config)
    assert capsys.readouterr().err == ""
    record = json.loads((cache / "cache.json").read_text())
    other = {**record, "versions": {"opencv": "4.8.0", "numpy": "1.26"}}
    try:
        (cache / "cache.json").write_text(json.dumps(other))
        assert mammo.build_cache(config) == cache
    finally:
        (cache / "cache.json").write_text(json.dumps(record, indent=2))
    assert f"opencv 4.8.0 (here {cv2.__version__})" in capsys.readouterr().err


def test_a_cache_by_other_code_is_made_again_once_and_the_reason_is_said(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", 1)
    config = small_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(settings, "code_version", lambda parts: "of an earlier version")
        first = mammo.build_cache(config)
    capsys.readouterr()
    second = mammo.build_cache(config)
    assert f"has changed since {first} was made" in capsys.readouterr().err
    assert second != first
    assert mammo.build_cache(config) == second
    assert capsys.readouterr().err == ""


# ---- resumption


def test_a_run_goes_on_with_equal_images_wherever_they_lie(tmp_path, capsys):
    """Moved to another folder with new times: a new cache with the same tiles, and the same run."""
    write_images(tmp_path / "images", 4, bits=12)
    flags = ("--epochs", "2", "--report_every", "0", "--max_steps")
    folder = mammo.train(small_config(tmp_path, *flags, "2"))
    state = mammo.checkpoints.load_checkpoint(folder / "last.pth")
    os.rename(tmp_path / "images", tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        os.utime(path, (1, 1))
    moved = ("--data_dir", str(tmp_path / "elsewhere"))
    mammo.train(small_config(tmp_path, *flags, "3", *moved))
    later = mammo.checkpoints.load_checkpoint(folder / "last.pth")
    assert (state["step"], later["step"]) == (2, 3)
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2


def test_a_run_does_not_go_on_with_other_tiles(tmp_path):
    write_images(tmp_path / "images", 4)
    flags = ("--epochs", "2", "--report_every", "0", "--max_steps")
    mammo.train(small_config(tmp_path, *flags, "2"))
    write_images(tmp_path / "images", 5)
    with pytest.raises(mammo.MammoError, match=r"the images, their tile settings or the tile code"):
        mammo.train(small_config(tmp_path, *flags, "3"))


@pytest.mark.parametrize("kept", [True, False])
def test_a_state_that_names_its_cache_alone_resumes_while_that_is_there(tmp_path, monkeypatch, kept):
    """As those of until 2026-11-26 do."""
    write_images(tmp_path / "images", 4)
    flags = ("--epochs", "2", "--report_every", "0", "--max_steps")
    with monkeypatch.context() as patch:
        patch.setattr(settings, "code_version", lambda parts: "of before")
        folder = mammo.train(small_config(tmp_path, *flags, "2"))
    state = torch.load(folder / "last.pth", weights_only=True)
    del state["cached"]
    torch.save(state, folder / "last.pth")
    if not kept:
        shutil.rmtree(tmp_path / "cache" / state["cache_key"])
        with pytest.raises(mammo.MammoError, match=rf"{state['cache_key']} is gone"):
            mammo.train(small_config(tmp_path, *flags, "3"))
        return
    mammo.train(small_config(tmp_path, *flags, "3"))
    assert mammo.checkpoints.load_checkpoint(folder / "last.pth")["step"] == 3


def test_a_run_that_goes_on_with_other_code_says_so_in_a_line(tmp_path, capsys):
    write_images(tmp_path / "images", 4)
    flags = ("--epochs", "3", "--max_steps")
    folder = mammo.train(small_config(tmp_path, *flags, "2"))
    mammo.train(small_config(tmp_path, *flags, "3"))
    assert "has changed since this run was saved" not in capsys.readouterr().err
    state = torch.load(folder / "last.pth", weights_only=True)
    state["code"] = {"commit": "0123456789abcdef", "training": "of other code"}
    torch.save(state, folder / "last.pth")
    mammo.train(small_config(tmp_path, *flags, "4"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "has changed since" in line]
    assert "commit 0123456789ab then" in line
