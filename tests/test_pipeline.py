"""The whole path as a user runs it: subprocesses on tiny data, the demo's recipe, bad input."""

import re
import shlex
import subprocess
import sys
import textwrap

import cv2
import numpy as np
import pandas as pd
import pytest
import stages
import torch
import torchvision
from conftest import (
    REPORTS,
    RESNET18,
    ROOT,
    SMALL,
    breast_image,
    places_in,
    run_script,
    train_script,
    write_images,
)
from safetensors.torch import load_file

import byol_mammo.pictures
import train_byol_mammo as mammo

RUN_FILES = {
    "config.json", "metrics.csv", "mammogram_byol_best.pth", "mammogram_byol_final.pth", "last.pth",
    "backbone.safetensors", "segmentation.png", "grid.png", "tiles.png", "views.png", "curves.png",
    "embedding.png", "summary.json", "report.html",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of two epochs, a broken image among its good ones."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images", bits=16)
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG broken")
    flags = (*SMALL, *RESNET18, *REPORTS, "--epochs", "2", "--checkpoint_every", "1")
    done = run_script(ROOT / "train_byol_mammo.py", *places_in(folder), *flags)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_leaves_all_its_files_and_names_them(finished):
    folder, done = finished
    run = folder / "runs" / "byol_resnet18"
    numbered = {"mammogram_byol_epoch1.pth", "mammogram_byol_epoch2.pth"}
    assert {path.name for path in run.iterdir()} == RUN_FILES | numbered
    for name in RUN_FILES:
        assert name in done.stdout or name == "last.pth"
    assert "skipped broken.png: can't be decoded" in done.stdout
    for picture in run.glob("*.png"):
        assert min(cv2.imread(str(picture)).shape[:2]) > 200


def test_metrics_tell_the_run(finished):
    table = pd.read_csv(finished[0] / "runs" / "byol_resnet18" / "metrics.csv")
    assert list(table.columns) == mammo.METRICS
    steps = table.dropna(subset=["loss"])
    assert steps["step"].tolist() == [2, 4, 6, 8]
    assert steps["loss"].between(-1, 1).all()
    assert (steps["momentum"].diff().dropna() > 0).all()
    assert (steps["feature_std"] > 0.3).all()
    assert steps["breast_ratio"].between(0.15, 1).all()
    epochs = table.dropna(subset=["monitor_rankme"])
    assert epochs["epoch"].tolist() == [1, 2]


def test_the_usage_snippet_runs_as_written(finished):
    """DESIGN.md's snippet, letter by letter, in the run's folder."""
    code = """
        import torch, torchvision
        from train_byol_mammo import MammogramBYOL
        backbone = torchvision.models.resnet18()
        INPUT_DIM, HIDDEN_DIM, PROJ_DIM = 512, 64, 32
        x = torch.rand(2, 1, 64, 64)
        model = MammogramBYOL(backbone, INPUT_DIM, HIDDEN_DIM, PROJ_DIM); model.load_state_dict(torch.load('mammogram_byol_best.pth')['model_state_dict']); model.get_features(x); model.classify(x)
        assert model.get_features(x).shape == (2, 512) and model.classify(x).shape == (2, 2)
    """  # noqa: E501
    run = finished[0] / "runs" / "byol_resnet18"
    done = run_script(
        "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}", cwd=run
    )
    assert done.returncode == 0, done.stderr


def test_the_exported_backbone_is_the_trained_one(finished):
    run = finished[0] / "runs" / "byol_resnet18"
    plain = torchvision.models.resnet18()
    plain.load_state_dict(load_file(run / "backbone.safetensors"), strict=True)
    trained = torch.load(run / "mammogram_byol_final.pth")["model_state_dict"]
    assert torch.equal(plain.layer4[1].conv2.weight, trained["backbone.layer4.1.conv2.weight"])
    x = torch.rand(2, 3, 64, 64)
    a = mammo.load_backbone(run / "backbone.safetensors")(x)
    torch.testing.assert_close(a, mammo.load_backbone(run / "mammogram_byol_final.pth")(x))


def test_a_run_starts_from_another_runs_weights(finished):
    folder = finished[0]
    weights = folder / "runs" / "byol_resnet18" / "backbone.safetensors"
    done = train_script(
        folder, *RESNET18, "--weights", weights, "--run_name", "second", "--max_steps", "1", "--qc_pages"
    )
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "runs" / "second" / "qc").glob("*/*.png"))) == 5  # the broken one is named


def test_wandb_offline_keeps_every_metric_and_sends_nothing(finished):
    folder = finished[0]
    environment = {"WANDB_API_KEY": "", "NETRC": str(folder / "none"), "HOME": str(folder)}
    done = train_script(
        folder, "--run_name", "w", "--max_steps", "2", "--wandb_mode", "auto", env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "wandb stopped" not in done.stderr
    assert list((folder / "runs" / "w" / "wandb").glob("offline-run-*/*.wandb"))


BAD = [
    (["--data_dir", "{tmp}/empty"], "no image with .png"),
    (["--data_dir", "{tmp}/nowhere"], "no such folder"),
    (["--weights", "{tmp}/nothing.pth"], "no such file"),
    (["--bach_size", "8"], "did you mean --batch_size"),
    (["--device", "cuda:7"], "no CUDA GPU"),
    (["--precision", "fp16"], "fp16 needs a GPU"),
    (["--tile_size", "4096"], "smaller than a tile"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_ends_in_one_clear_message(tmp_path, flags, message, capsys):
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    write_images(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert mammo.main([*places_in(tmp_path), *SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: ", error, flags=re.MULTILINE)
    assert message in error
    assert not list(tmp_path.rglob("*.pth"))
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_the_program_itself_ends_with_the_code_and_the_message(tmp_path):
    """One refusal as a user sees it."""
    done = run_script(
        ROOT / "train_byol_mammo.py", "--data_dir", tmp_path / "nowhere", "--weights", "none"
    )
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_internet_and_weights_the_remedy_is_named(tmp_path):
    write_images(tmp_path / "images", 1)
    offline = {"TORCH_HOME": str(tmp_path / "hub"), "https_proxy": "http://127.0.0.1:9"}
    done = train_script(tmp_path, *RESNET18, "--weights", "imagenet", env=offline)
    assert done.returncode == 2
    assert "https://download.pytorch.org/models/resnet18" in done.stderr
    assert str(tmp_path / "hub" / "hub" / "checkpoints" / "resnet18") in done.stderr
    assert "--weights none" in done.stderr
    assert "Traceback" not in done.stderr


def demo_commands():
    """The commands of `make demo`, as a user could type them."""
    printed = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo", "VENV=", "PYTHON=python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in printed.stdout.replace("\\\n", " ").splitlines()]


def test_the_demo_recipe_runs_in_small(tmp_path):
    """make demo's own commands, their places and sizes made small by flags added at the end."""
    commands = demo_commands()
    assert [command[1] for command in commands] == [
        "synthetic_mammograms.py", "prepare_dataset.py", "train_byol_mammo.py",
        *["train_classifier.py"] * 3,
    ]  # fmt: skip
    quick = "--wandb_mode disabled --tile_size 96 --tile_stride 48 --pixel_spacing_mm 0.567"
    small = {
        "synthetic_mammograms.py": "--studies 5 --height 528 --width 420",
        "prepare_dataset.py": "",
        "train_byol_mammo.py": f"{quick} --view_size 32 --min_freq_energy 0 --hidden_dim 64 --epochs 1 "
        "--max_steps 2",
        "train_classifier.py": f"{quick} --view_size 32 --bootstrap 100",
    }
    for command in commands:
        words = [re.sub(r"^demo/", f"{tmp_path}/", word) for word in command[1:]]
        flags = [*words[1:], *small[words[0]].split()]
        if words[0] == "synthetic_mammograms.py":
            done = run_script(ROOT / words[0], *flags)
        else:  # as `python SCRIPT` would, but imported already
            done = stages.complete(words[0].removesuffix(".py"), flags, tmp_path)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "byol_resnet18_slim"
    assert (run / "backbone.safetensors").is_file()
    starts = pd.read_csv(run / "compare" / "compare.csv")["start"].unique()
    assert list(starts[:2]) == ["none", "classic"]
    assert len(starts) == 3
    report = (run / "report.html").read_text("utf-8")
    assert all(f"Classifier: {part}" in report for part in ("evaluate", "compare"))


def test_sixteen_bit_images_reach_the_views_whole(tmp_path):
    write_images(tmp_path / "images", 1, bits=16, height=512, width=512)
    config = mammo.Config(
        data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"), tile_size=256,
        min_freq_energy=0,
    )  # fmt: skip
    tiles = mammo.open_tiles(mammo.build_cache(config))
    view = mammo.make_view(tiles, np.arange(1), mammo.PLAIN_VIEW, 256).image
    assert len(torch.unique(view)) > 1000
    assert breast_image(bits=16)[0].dtype == np.uint16
    assert sys.version_info >= (3, 10)


def test_extraction_alone_leaves_a_cache_that_training_finds(tmp_path):
    write_images(tmp_path / "images", 2, bits=12)
    done = train_script(tmp_path, "--extract_only", "--qc_pages")
    assert done.returncode == 0, done.stderr
    assert re.search(r"positions [\d,]+, kept [1-9]", done.stdout)
    cache = next((tmp_path / "cache").glob("[!.]*"))
    assert str(cache) in done.stdout
    assert all((cache / name).is_file() for name in byol_mammo.pictures.EXTRACTION_PICTURES)
    run = tmp_path / "runs" / "byol_slim"
    assert [path.name for path in run.iterdir()] == ["qc"]
    assert len(list((run / "qc" / cache.name).iterdir())) == 2
    done = train_script(tmp_path, "--extract_only", "--qc_pages", "--min_breast_ratio", "0.5")
    assert done.returncode == 0, done.stderr
    assert len(list((run / "qc").glob("*/*.png"))) == 4  # pages of other tiles stand beside them
    none = ("--min_freq_energy", "50", "--high_freq_energy", "0", "--min_convergence", "0")
    done = train_script(tmp_path, "--extract_only", "--qc_pages", *none)
    assert done.returncode == 2
    assert "no tile was kept" in done.stderr
    assert len(list((run / "qc").glob("*/*.png"))) == 6  # they show why
    done = train_script(tmp_path, "--max_steps", "1", "--progress", "lines")
    assert done.returncode == 0, done.stderr
    assert "tiles:" not in done.stdout + done.stderr  # the progress of an extraction
    assert (run / "backbone.safetensors").is_file()
