"""wandb with the real package, offline: what was promised can be read back from its own file."""

import glob
import re
import struct
import sys

import pandas as pd
import pytest
import torch
from conftest import RESNET18, ROOT, SMALL, run_script, train_script, write_images
from test_training import open_run

import train_byol_mammo as mammo

BLOCK, HEADER = 32768, 7  # wandb keeps records as LevelDB's log does: blocks, and a header per piece


def records(path):
    """The records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + HEADER])
        position += HEADER
        whole += data[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def flat(items):
    """Items of a record as a dict; nested keys are joined by dots."""
    return {item.key or ".".join(item.nested_key): item.value_json for item in items}


def read_back(folder):
    """(id, config, rows, summary) of an offline run's directory."""
    (path,) = folder.glob("*.wandb")
    run_id, config, rows, summary = "", {}, [], {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config |= flat(record.run.config.update)
        elif kind == "config":
            config |= flat(record.config.update)
        elif kind == "history":
            rows.append(flat(record.history.item))
        elif kind == "summary":
            summary |= flat(record.summary.update)
    return run_id, config, rows, summary


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run tracked offline, stopped after three steps and resumed to its end; its two outputs."""
    folder = tmp_path_factory.mktemp("tracked")
    write_images(folder / "images", bits=12)
    environment = {"WANDB_API_KEY": "", "NETRC": str(folder / "none"), "HOME": str(folder)}
    flags = ("--epochs", "2", "--wandb_mode", "auto", "--report_every", "0.00001")
    outputs = []
    for limit in ("3", "0"):
        done = train_script(folder, *flags, "--max_steps", limit, env=environment)
        assert done.returncode == 0, done.stderr
        assert "note:" not in done.stderr
        outputs.append(done.stdout)
    return folder / "runs" / "byol_slim", outputs


def test_an_offline_run_holds_every_promised_metric(tracked):
    run, _ = tracked
    first, second = sorted((run / "wandb").glob("offline-run-*"))
    (_, config, rows, _), (_, _, more, summary) = read_back(first), read_back(second)
    assert config["batch_size"] == "8"
    assert config["backbone"] == '"slim"'
    steps = [row for row in rows + more if "loss" in row]
    promised = {
        "loss", "lr", "momentum", "breast_ratio", "batches_per_s", "tiles_per_s", "seconds_left",
        "feature_std", "epoch",
    }  # fmt: skip
    for row in steps:
        assert promised <= set(row)
    table = pd.read_csv(run / "metrics.csv")
    assert [int(row["step"]) for row in steps] == [2, 3, 4, 6, 8]
    expected = table.dropna(subset=["loss"]).set_index("step")["loss"]
    for row in steps:
        assert float(row["loss"]) == pytest.approx(expected[int(row["step"])], rel=1e-4)
    epochs = [row for row in rows + more if "monitor_rankme" in row]
    assert len(epochs) == 2
    assert all("monitor_std" in row for row in epochs)
    for name in ("segmentation", "grid", "tiles", "views"):
        assert rows[0][f"{name}._type"] == '"image-file"'
        assert (first / "files" / rows[0][f"{name}.path"].strip('"')).is_file()
    assert epochs[0]["embedding._type"] == epochs[1]["embedding._type"] == '"image-file"'
    best = table.loc[table["monitor_rankme"].idxmax()]
    assert int(summary["best_epoch"]) == best["epoch"]
    assert float(summary["best_rankme"]) == pytest.approx(best["monitor_rankme"], rel=1e-4)
    assert summary["best_checkpoint"].strip('"').endswith("mammogram_byol_best.pth")


def test_a_resumed_run_keeps_its_id(tracked):
    run, _ = tracked
    folders = sorted((run / "wandb").glob("offline-run-*"))
    ids = {read_back(folder)[0] for folder in folders}
    assert len(folders) == 2
    assert ids == {torch.load(run / "last.pth")["wandb_id"]}


def test_the_upload_command_names_all_parts_of_the_run(tracked):
    run, outputs = tracked
    for output in outputs:
        pattern = re.search(r"to upload this run: wandb sync (\S+)", output)[1]
    assert sorted(glob.glob(pattern)) == sorted(map(str, (run / "wandb").glob("offline-run-*")))


def test_disabled_tracking_never_imports_wandb(archive, tmp_path):
    places = ["--data_dir", str(archive / "images"), "--cache_dir", str(archive / "cache")]
    flags = [*places, *SMALL, *RESNET18, "--output_dir", str(tmp_path), "--max_steps", "2"]
    code = (
        f"import sys; import train_byol_mammo as mammo; mammo.main({flags!r}); "
        "sys.exit('wandb' in sys.modules)"
    )
    done = run_script("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "finished at step 2" in done.stdout
    assert "wandb sync" not in done.stdout
    assert not (tmp_path / "byol_resnet18" / "wandb").exists()


def test_a_row_tells_speed_time_left_and_what_the_gpu_does(archive, monkeypatch):
    run = open_run(archive, "--run_name", "row", "--max_steps", "100")
    run.step, means = 20, {"loss": -0.5, "feature_std": 0.9}
    row = mammo.describe_step(run, means, 4.0, run.train_ids[:8])
    assert (row["batches_per_s"], row["tiles_per_s"], row["seconds_left"]) == (4.0, 32.0, 20.0)
    assert "gpu_memory_gb" not in row
    run.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 37)
    row = mammo.describe_step(run, means, 4.0, run.train_ids[:8])
    assert (row["gpu_memory_gb"], row["gpu_utilisation"]) == (3.0, 37)
    assert set(row) <= set(mammo.METRICS)

    def missing(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert "gpu_utilisation" not in mammo.describe_step(run, means, 4.0, run.train_ids[:8])


def test_pictures_and_summaries_of_a_disabled_tracker_go_nowhere(tmp_path):
    tracker = mammo.start_tracker("id", mammo.Config(output_dir=str(tmp_path), wandb_mode="disabled"))
    tracker.log({"views": tmp_path / "absent.png"})
    tracker.log({"best_epoch": 1}, summary=True)
    tracker.finish()
    assert tracker.items.empty()
    assert list(tmp_path.iterdir()) == []
    assert "wandb" not in sys.modules or tracker.thread.ident is None
