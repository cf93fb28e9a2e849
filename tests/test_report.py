"""report.html, summary.json and progress: self-contained, safe, written in time, never in the way."""

import base64
import io
import json
import re
import shutil
import signal
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import stages
import torch
from conftest import HOSTILE, REPORTS, ROOT, run_script, small_config, train_script
from pages import Page
from test_training import open_run, start, wait_for

import byol_mammo.pictures
import byol_mammo.report
import train_byol_mammo as mammo


def test_the_report_is_one_self_contained_page(finished):
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert page.active == []
    assert page.images == ["curves", "embedding", "segmentation", "grid", "tiles", "views"]
    for link in page.links:
        kind, data = link.split(",", 1)
        assert kind == "data:image/png;base64"
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert min(picture.shape[:2]) > 300
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", text)
    assert 'name="viewport"' in text


def test_the_report_tells_the_run(finished):
    page = Page((finished / "report.html").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    metrics = pd.read_csv(finished / "metrics.csv")
    funnel = summary["funnel"]
    assert summary["state"] == "finished"
    assert (summary["step"], summary["epoch"], summary["images"]) == (8, 2.0, 5)
    assert list(summary["skipped"].values()) == [1]
    lost = sum(funnel[name] for name in (*mammo.COLUMNS, "capped"))
    assert funnel["kept"] == funnel["positions"] - lost > 0
    best = metrics.loc[metrics["monitor_rankme"].idxmax()]
    assert summary["best"]["epoch"] == best["epoch"]
    assert summary["best"]["rankme"] == pytest.approx(best["monitor_rankme"], rel=1e-4)
    for words in (
        "Finished", "step 8 of 8", f"{best['epoch']:.0f} (RankMe {best['monitor_rankme']:.1f})",
        f"positions in the images {funnel['positions']:,}", f"kept {funnel['kept']}",
        "5 images, of which 1 were skipped", "can't be decoded", "--tile_size 128", "slim resnet50",
        f"torch {torch.__version__}", f"below {mammo.COLLAPSE_STD} collapsed",
        f"loss {metrics['loss'].dropna().iloc[-1]:.3f}",
    ):  # fmt: skip
        assert words in page.text, words


def test_names_are_escaped_and_files_stay_unnamed(finished):
    text = (finished / "report.html").read_text()
    assert HOSTILE not in text  # nor would Page let its handler pass
    assert HOSTILE in Page(text).text
    words = re.sub(r"base64,[^\"]+", "", text)  # a picture's bytes may spell anything
    assert "Jane" not in words
    assert "s0_i0" not in words
    assert "Jane" not in (finished / "summary.json").read_text()


def test_a_copied_folder_makes_the_same_report_by_itself(finished, tmp_path):
    copy = tmp_path / "elsewhere" / finished.name
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("*.pth", "report.html", "curves.png"))
    done = run_script(ROOT / "train_byol_mammo.py", "--report", copy, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(copy / "report.html")
    assert (copy / "report.html").read_bytes() == (finished / "report.html").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}


@pytest.mark.parametrize("damage", ["absent", "config", "classifier", "summary", "metrics"])
def test_a_folder_that_is_no_run_is_refused_by_name(finished, tmp_path, damage, capsys):
    folder = tmp_path / "run"
    if damage != "absent":
        folder.mkdir()
        for name in ("config.json", "summary.json", "metrics.csv"):
            shutil.copyfile(finished / name, folder / name)
    if damage in ("config", "summary"):
        (folder / f"{damage}.json").write_text('{"config": ')
    if damage == "classifier":
        (folder / "config.json").write_text('{"settings": {}, "environment": {}}')
    if damage == "metrics":
        (folder / "metrics.csv").write_bytes(b"\xff\xfe\x00\x01,\n,,,\n")
    assert mammo.main(["--report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}: not the folder of a run")
    assert not (folder / "report.html").exists()


def test_a_run_from_before_the_summary_gets_a_report(finished, tmp_path):
    """Only what is there is shown."""
    record = json.loads((finished / "config.json").read_text())
    del record["config"]["report_every"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    page = Page(byol_mammo.report.write_report(tmp_path, mammo.terms()).read_text())
    assert page.images == []
    table = pd.read_csv(finished / "metrics.csv").drop(columns=["batches_per_s", "seconds_left"])
    table.to_csv(tmp_path / "metrics.csv", index=False)
    assert Page(byol_mammo.report.write_report(tmp_path, mammo.terms()).read_text()).images == ["curves"]


def test_the_curves_are_of_what_the_run_has_measured(monkeypatch, tmp_path):
    panels = []
    monkeypatch.setattr(
        byol_mammo.pictures, "save_figure", lambda figure, path: panels.extend(figure.axes)
    )
    table = pd.DataFrame({"step": [5, 10], "loss": [-0.5, -0.6], "freq_loss": [3.0, 2.5]})
    curves = byol_mammo.report.learning_curves(mammo.TargetBYOL.curves, mammo.CLASSES)
    table = table.reindex(columns=mammo.METRICS)
    byol_mammo.pictures.draw_curves(table, curves, mammo.COLLAPSE_STD, tmp_path / "curves.png")
    shown = {axes.get_title().split(" (")[0]: axes.lines[0].get_ydata().tolist() for axes in panels}
    assert shown == {"BYOL loss": [-0.5, -0.6], "frequency loss": [3.0, 2.5]}


def test_the_report_is_there_while_the_run_goes_on_and_when_it_is_stopped(archive, tmp_path):
    shutil.copytree(archive / "images", tmp_path / "images")
    shutil.copytree(archive / "cache", tmp_path / "cache")
    process = start(tmp_path, "--epochs", "1000", "--report_every", "5")
    run = tmp_path / "runs" / "byol_slim"
    wait_for(run / "report.html", process)
    page = Page((run / "report.html").read_text())
    assert "Running when last heard of" in page.text
    assert "time left" in page.text
    assert {"curves", "views", "tiles"} <= set(page.images)
    process.terminate()
    assert stages.end(process, tmp_path / "log", 60) == 128 + signal.SIGTERM
    assert "note:" not in (tmp_path / "log").read_text()
    page = Page((run / "report.html").read_text())
    step = torch.load(run / "last.pth")["step"]
    assert f"step {step:,} of 4,000" in page.text
    assert re.search(r"Stopped, [^.]*\. stopped by SIGTERM; the same command goes on", page.text)


def test_an_error_is_told_by_the_report(archive, tmp_path, monkeypatch):
    shutil.copytree(archive, tmp_path / "a")
    monkeypatch.setattr(mammo, "read_metrics", lambda *_: {"loss": float("nan")})
    config = small_config(tmp_path / "a", "--epochs", "1", *REPORTS)
    with pytest.raises(mammo.MammoError, match="the loss is not a number"):
        mammo.train(config)
    page = Page((config.run_dir / "report.html").read_text())
    assert "Stopped" in page.text
    assert "the loss is not a number at step 2" in page.text


def test_a_report_that_cannot_be_written_ends_no_run(archive, tmp_path):
    shutil.copytree(archive / "images", tmp_path / "images")
    shutil.copytree(archive / "cache", tmp_path / "cache")
    (tmp_path / "runs" / "byol_slim" / "report.html").mkdir(parents=True)
    done = train_script(tmp_path, "--epochs", "1", *REPORTS)
    assert done.returncode == 0, done.stderr
    assert "note: report not written (IsADirectoryError" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "byol_slim" / "backbone.safetensors").is_file()


def test_report_every_zero_draws_nothing(archive, tmp_path, monkeypatch, capsys):
    shutil.copytree(archive / "images", tmp_path / "a" / "images")  # its cache may have pictures by now
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # drawing would raise ImportError
    folder = mammo.train(small_config(tmp_path / "a", "--epochs", "1", "--report_every", "0"))
    out, err = capsys.readouterr()
    assert "report.html" not in out + err
    assert json.loads((folder / "summary.json").read_text())["state"] == "finished"
    assert not list(folder.glob("*.png"))


def test_reports_keep_their_distance(archive):
    run = open_run(archive, "--run_name", "distance", "--report_every", "60")
    assert mammo.report_is_due(run)
    mammo.show_run(run, mammo.start_tracker("id", run.config))
    assert not mammo.report_is_due(run)
    run.report_written_at -= 3601
    assert mammo.report_is_due(run)


def test_a_collapsed_run_is_marked(finished):
    summary = {"state": "running", "healthy": False, "time": "now"}
    page = byol_mammo.report.html_headline(
        summary, pd.DataFrame(columns=mammo.METRICS), mammo.COLLAPSE_ADVICE
    )
    assert 'class="state bad"' in page
    assert "Collapsed: all tiles look alike" in page
    assert 'class="state bad"' not in (finished / "report.html").read_text()


def test_collapsed_features_can_be_drawn(archive, tmp_path):
    run = open_run(archive, "--run_name", "flat")
    tiles = run.tiles.table.iloc[run.monitor_ids]
    views = np.full(len(tiles), "")
    byol_mammo.pictures.draw_embedding(
        torch.zeros(len(tiles), 8), tiles, views, tmp_path / "embedding.png"
    )
    assert cv2.imread(str(tmp_path / "embedding.png")) is not None


def test_classifier_results_below_the_run_are_part_of_it(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("*.pth"))
    place = copy / f"evaluate {HOSTILE}"
    place.mkdir()
    rows = [
        {"level": "tile", "group": "all", "finding": "mass & more", "n": 5, "auroc": 0.81234},
        {"level": "tile", "group": "view CC", "finding": "mass & more", "n": 4, "auroc": 0.7},
    ]
    pd.DataFrame(rows).to_csv(place / "evaluation.csv", index=False)
    shutil.copyfile(copy / "curves.png", place / "roc.png")
    page = Page(byol_mammo.report.write_report(copy, mammo.terms()).read_text())
    assert "roc" in page.images
    assert f"Classifier: {place.name}" in page.text
    assert "tile mass & more 0.812 5" in page.text
    assert "view CC" not in page.text
    (place / "evaluation.csv").write_text("")
    assert (
        "evaluation.csv can't be read"
        in Page(byol_mammo.report.write_report(copy, mammo.terms()).read_text()).text
    )


def test_metrics_of_an_older_version_keep_their_columns_on_resume(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,monitor_std\n2,-0.25,\n4,-0.5,0.75\n6,-0.6,\n")
    mammo.tracking.MetricsFile(path, mammo.METRICS, 4, 2).write(
        {"step": 6, "loss": -0.7, "seconds_left": 3}
    )
    table = pd.read_csv(path)
    assert list(table.columns) == mammo.METRICS
    assert table["loss"].tolist() == [-0.25, -0.5, -0.7]
    assert table["monitor_std"].dropna().tolist() == [0.75]


@pytest.mark.parametrize("mode", ["auto", "lines", "none", "bar"])
def test_progress_in_a_log_file_is_whole_lines(archive, tmp_path, mode):
    shutil.copytree(archive / "images", tmp_path / "images")
    done = train_script(tmp_path, "--max_steps", "2", "--progress", mode)
    assert done.returncode == 0
    assert "\r" not in done.stdout
    assert ("\r" in done.stderr) == (mode == "bar")
    assert "\n\n" not in done.stderr
    lines = done.stderr.splitlines()
    if mode == "none":
        assert lines == []
    if mode in ("auto", "lines"):
        tiles, train = (  # one line each, or one a minute on a slow machine
            [line for line in lines if line.startswith(f"{name}: ")] for name in ("tiles", "train")
        )
        assert len(tiles) + len(train) == len(lines)
        assert tiles[-1].startswith("tiles: 4 of 4 images, ")
        assert re.fullmatch(
            r"train: 2 of 2 steps, \S+ gone, \S+ left, loss \S+ std \S+ \S+ tiles/s lr \S+ momentum \S+",
            train[-1],
        )


def test_lines_come_once_in_a_while_and_survive_messages(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(mammo.tracking, "LINE_EVERY", 3600)
    with mammo.tracking.progress(total=50, desc="train", unit="step") as bar:
        for _ in range(10):
            bar.update()
            bar.set_postfix_str("loss -0.5")
            mammo.tqdm.write("note", file=sys.stderr)
        monkeypatch.setattr(mammo.tracking, "LINE_EVERY", 0)
        bar.refresh()
        monkeypatch.setattr(mammo.tracking, "LINE_EVERY", 3600)
        bar.update(40)
    lines = log.getvalue().split("\n")
    assert lines[:10] == ["note"] * 10
    assert lines[10].startswith("train: 10 of 50 steps, ")
    assert lines[11].startswith("train: 50 of 50 steps, ")
    assert lines[12:] == [""]


def test_a_terminal_gets_a_bar(monkeypatch):
    log = io.StringIO()
    log.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", log)
    row = {"loss": -0.5, "feature_std": 0.9, "tiles_per_s": 21.3, "lr": 2e-3, "momentum": 0.996}
    with mammo.tracking.progress(total=4, desc="train", unit="step") as bar:
        bar.update(2)
        bar.set_postfix_str(mammo.tracking.describe_row(row, {"rankme": 34.06}))
    shown = log.getvalue().split("\r")[-1]
    words = (
        "2/4 steps|left, loss -0.5000 std 0.900 RankMe 34.1 21.3 tiles/s lr 2.00e-03 momentum 0.99600"
    )
    for word in words.split("|"):
        assert word in shown
