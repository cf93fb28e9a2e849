"""Training: the step, overfitting, collapse, restart to the bit, refusals."""

import copy
import hashlib
import math
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import stages
import torch
import torch.nn.functional as F
from conftest import SMALL, places_in, small_config
from safetensors.torch import load_file
from torch import nn

import train_byol_mammo as mammo


def epoch_order(run, epoch):
    config = run.config
    return mammo.sampling.epoch_order(
        run.tiles.table, run.train_ids, config.tiles_per_epoch, config.seed, epoch, config.energy_share
    )


def open_run(archive, *flags):
    """A Run on the archive's cache, its folder made."""
    config = small_config(archive, *flags)
    torch.manual_seed(config.seed)
    backbone = mammo.checkpoints.build_backbone(config.backbone)
    config = mammo.match_input_dim(config, backbone)
    run = mammo.prepare_run(config, backbone, mammo.build_cache(config), mammo.processes.find_ranks())
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def weights_hash(path):
    state = torch.load(path)["model_state_dict"]
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def test_five_steps_equal_a_plain_reference_loop(archive, tmp_path):
    flags = "--lr 1e-3 --weight_decay 0.01 --precision fp32 --run_name five"
    run = open_run(archive, *flags.split())
    online = nn.ModuleDict(
        {
            name: copy.deepcopy(getattr(run.model, name))
            for name in ("backbone", "projection_head", "prediction_head")
        }
    )
    target = copy.deepcopy(nn.ModuleList([online["backbone"], online["projection_head"]]))
    wide = [p for p in online.parameters() if p.ndim > 1]
    thin = [p for p in online.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": wide, "weight_decay": 0.01}, {"params": thin, "weight_decay": 0.0}],
        fused=True,  # it rounds otherwise, and Adam turns the noise of vanishing gradients into steps
    )
    total = run.total_steps
    warmup = min(10 * run.steps_per_epoch, total // 2)
    order = epoch_order(run, 0)
    for step in range(5):
        if step == run.steps_per_epoch:
            order = epoch_order(run, 1)
        at = step % run.steps_per_epoch
        ids = order[8 * at : 8 * at + 8]
        views = mammo.make_views(run, run.tiles, ids, (run.config.seed, step, 0))
        x, y = (view.image.repeat(1, 3, 1, 1) for view in views)
        predict = lambda v: online["prediction_head"](online["projection_head"](online["backbone"](v)))  # noqa: E731
        p_x, p_y = predict(x), predict(y)
        with torch.no_grad():
            z_x, z_y = target[1](target[0](x)), target[1](target[0](y))
        loss = -(F.cosine_similarity(p_x, z_y).mean() + F.cosine_similarity(p_y, z_x).mean()) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * math.sqrt(8 / 32) * (step + 1) / warmup
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum = 1 - 6 / total * (math.cos(math.pi * step / (total - 1)) + 1) / 2
        with torch.no_grad():
            pairs = zip(
                target.parameters(),
                [*online["backbone"].parameters(), *online["projection_head"].parameters()],
                strict=True,
            )
            for slow, fast in pairs:
                slow.mul_(momentum).add_(fast, alpha=1 - momentum)
        actual = mammo.train_step(run, ids)["loss"]
        torch.testing.assert_close(actual, loss.detach(), rtol=1e-5, atol=1e-6)
    for name, module in online.items():
        for a, b in zip(getattr(run.model, name).parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(run.model.backbone_momentum.parameters(), target[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def fit(model, make_views, steps, momentum, lr=1e-3):
    """Train on given views; returns the last loss and feature std."""
    config = mammo.Config(lr=lr, weights="none")
    objective = mammo.BYOL(model, config)
    optimizer = mammo.build_optimizer(objective, config)
    for _ in range(steps):
        loss, metrics = objective(make_views())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(momentum)
        if loss < -0.97 and steps == 150:
            break
    return float(loss.detach()), float(metrics["feature_std"])


def test_one_fixed_batch_is_overfitted_without_collapse(archive):
    run = open_run(archive, "--run_name", "overfit")
    ids = run.train_ids[:: len(run.train_ids) // 8][:8]
    views = mammo.make_views(run, run.tiles, ids, (0, 0, 0))
    loss, std = fit(run.model, lambda: views, steps=150, momentum=0.99)
    assert loss < -0.9
    assert std > 0.2


def test_without_the_predictor_the_collapse_warning_fires(archive, capfd):
    """Views that share nothing can only be agreed on by collapse; the predictor holds it off."""
    run = open_run(archive, "--run_name", "collapse", "--report_every", "0")
    metrics = mammo.tracking.MetricsFile(run.folder / "metrics.csv", run.columns, 0, run.steps_per_epoch)
    tracker = mammo.start_tracker("id", run.config)

    def noise():
        generator.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        images = [torch.randn(16, 1, 32, 32, generator=generator) * 4 for _ in range(2)]
        return [mammo.View("noise", image, image) for image in images]

    generator = torch.Generator().manual_seed(0)
    run.step = run.steps_per_epoch
    mammo.end_epoch(run, metrics, tracker)
    assert run.healthy
    assert "collapse" not in capfd.readouterr().err
    best = (run.folder / "mammogram_byol_best.pth").read_bytes()
    run.model.prediction_head = nn.Identity()
    loss, std = fit(run.model, noise, steps=160, momentum=0.9, lr=2e-3)
    assert loss < -0.9
    assert std < mammo.COLLAPSE_STD
    run.step, run.batch_std = run.step + run.steps_per_epoch, std
    mammo.end_epoch(run, metrics, tracker)
    assert not run.healthy
    assert "warning: collapse" in capfd.readouterr().err
    assert (run.folder / "mammogram_byol_best.pth").read_bytes() == best  # never the lowest loss


def test_an_epoch_shows_every_tile_once_spread_over_images(archive):
    run = open_run(archive, "--tiles_per_epoch", "0", "--run_name", "order")
    order = epoch_order(run, 0)
    assert sorted(order) == sorted(run.train_ids)
    assert not set(order) & set(run.monitor_ids) or len(run.train_ids) == len(run.tiles)
    assert (epoch_order(run, 0) == order).all()
    assert (epoch_order(run, 1) != order).any()
    few = open_run(archive, "--tiles_per_epoch", "20", "--run_name", "order")
    drawn = epoch_order(few, 3)
    counts = np.bincount(few.tiles.table["image"].to_numpy()[drawn])
    assert len(drawn) == 20
    assert counts.max() - counts.min() <= 1


def test_energy_share_prefers_an_images_best_tiles_and_0_is_chance(archive):
    run = open_run(archive, "--run_name", "share")
    seen = run.tiles.table.iloc[run.train_ids]
    rank = pd.Series(mammo.sampling.appeal(seen), seen.index)
    assert rank.between(0, 1).all()

    def draw(share, epoch=0):
        return mammo.sampling.epoch_order(run.tiles.table, run.train_ids, 20, 0, epoch, share)

    means = [np.mean([rank[draw(share, epoch)].mean() for epoch in range(8)]) for share in (0, 0.5, 1)]
    assert means[0] < means[1] < means[2]
    for share in (0.5, 1):
        assert (draw(share) == draw(share)).all()
        counts = seen["image"][draw(share)].value_counts()
        assert counts.max() - counts.min() <= 1
    assert set(draw(0.5)) != set(draw(0.5, 1))
    best = rank.groupby(seen["image"]).nlargest(5).droplevel(0)
    assert sorted(rank[draw(1)]) == sorted(best)
    plain = mammo.sampling.spread_over_images(seen["image"].to_numpy(), np.random.default_rng([0, 2, 0]))
    assert set(draw(0)) == set(run.train_ids[plain[:20]])


def test_stopped_and_resumed_equals_uninterrupted(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "a")
    whole = mammo.train(small_config(tmp_path / "a", "--epochs", "2", "--run_name", "whole"))
    for limit in (1, 3, 4, 6, 0):  # inside an epoch, at its end, in the next one, to the end
        flags = ("--epochs", "2", "--run_name", "parts", "--max_steps", str(limit))
        parts = mammo.train(small_config(tmp_path / "a", *flags))
    for name in ("mammogram_byol_final.pth", "mammogram_byol_best.pth"):
        assert weights_hash(whole / name) == weights_hash(parts / name)
    columns = ["step", "lr", "momentum", "monitor_std", "monitor_rankme"]
    tables = [
        pd.read_csv(folder / "metrics.csv")[columns].dropna(subset=["lr"]) for folder in (whole, parts)
    ]
    assert tables[1]["step"].is_unique
    both = tables[0].merge(tables[1], on="step")
    assert len(both) == len(tables[0])
    np.testing.assert_array_equal(both["lr_x"], both["lr_y"])


def start(folder, *flags):
    """A training in a process, its places below `folder`; what it prints is in folder/log."""
    return stages.start("train_byol_mammo", [*places_in(folder), *SMALL, *flags], folder / "log")


def wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


def test_sigterm_saves_and_says_how_to_go_on(archive, tmp_path):
    shutil.copytree(archive / "images", tmp_path / "images")
    process = start(tmp_path, "--epochs", "1000")
    metrics = tmp_path / "runs" / "byol_slim" / "metrics.csv"
    wait_for(metrics, process)
    while process.is_alive() and len(metrics.read_text().splitlines()) < 2:
        time.sleep(0.05)  # the header is written before signals are guarded against
    process.terminate()
    assert stages.end(process, tmp_path / "log", 60) == 128 + signal.SIGTERM
    assert "the same command goes on" in (tmp_path / "log").read_text()
    assert torch.load(tmp_path / "runs" / "byol_slim" / "last.pth")["step"] > 0


def test_a_signal_that_comes_while_the_report_is_drawn_costs_no_step(archive, tmp_path, monkeypatch):
    shutil.copytree(archive, tmp_path / "a")
    config = small_config(tmp_path / "a", "--epochs", "9", "--report_every", "1e-9")

    def show_run(run, *_):
        if run.step == 2:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(mammo, "show_run", show_run)
    with pytest.raises(mammo.StoppedError, match="SIGUSR1"):
        mammo.train(config)
    assert torch.load(config.run_dir / "last.pth")["step"] == 3


def test_processes_obey_the_signal_that_all_of_them_know_of(monkeypatch):
    stop = mammo.processes.StopSignal()

    def all_reduce(*_):  # the signal comes while this process waits for the others
        stop.requested = signal.SIGTERM

    monkeypatch.setattr(mammo.distributed, "all_reduce", all_reduce)
    run = SimpleNamespace(ranks=mammo.processes.Ranks(0, 2, 0), device=torch.device("cpu"))
    mammo.read_metrics(run, [{"loss": torch.zeros(())}], stop)
    assert (stop.requested, stop.agreed) == (signal.SIGTERM, 0)
    mammo.read_metrics(run, [{"loss": torch.zeros(())}], stop)
    assert stop.agreed == signal.SIGTERM


def test_resuming_with_other_settings_is_refused_by_name(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "a")
    flags = ("--epochs", "2", "--max_steps", "2")
    folder = mammo.train(small_config(tmp_path / "a", *flags))
    before = weights_hash(folder / "last.pth")
    with pytest.raises(mammo.MammoError, match=r"--lr 0\.002 -> 0\.1(.|\n)*--no_resume"):
        mammo.train(small_config(tmp_path / "a", *flags, "--lr", "0.1"))
    with pytest.raises(mammo.MammoError, match="tile settings"):
        mammo.train(small_config(tmp_path / "a", *flags, "--max_tiles", "60"))
    assert weights_hash(folder / "last.pth") == before
    mammo.train(small_config(tmp_path / "a", *flags, "--lr", "0.1", "--no_resume"))
    assert weights_hash(folder.with_name(f"{folder.name}_1") / "last.pth") == before


def test_a_requeued_job_goes_on_whatever_its_flags_say(archive, tmp_path, monkeypatch):
    shutil.copytree(archive, tmp_path / "a")
    flags = ("--epochs", "2", "--no_resume", "--max_steps")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = mammo.train(small_config(tmp_path / "a", *flags, "1"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    mammo.train(small_config(tmp_path / "a", *flags, "2"))
    assert mammo.checkpoints.load_checkpoint(folder / "last.pth")["step"] == 2
    assert [path.name for path in folder.parent.glob(f"{folder.name}*")] == [folder.name]
    # Another job whose first start never came that far.
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    mammo.train(small_config(tmp_path / "a", *flags, "1"))
    assert mammo.checkpoints.load_checkpoint(folder / "last.pth")["step"] == 1
    aside = folder.with_name(f"{folder.name}_1")
    assert mammo.checkpoints.load_checkpoint(aside / "last.pth")["step"] == 2


def test_a_warm_start_that_fails_moves_nothing_aside(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "a")
    folder = mammo.train(small_config(tmp_path / "a", "--epochs", "2", "--max_steps", "1"))
    weights = str(folder / "mammogram_byol_final.pth")
    flags = ("--epochs", "2", "--max_steps", "1", "--no_resume", "--weights")
    with pytest.raises(mammo.MammoError, match="no such file"):
        mammo.train(small_config(tmp_path / "a", *flags, "missing.pth"))
    assert [path.name for path in folder.parent.glob(f"{folder.name}*")] == [folder.name]
    mammo.train(small_config(tmp_path / "a", *flags, weights))  # its own, read before they are moved
    assert (folder.with_name(f"{folder.name}_1") / "mammogram_byol_final.pth").is_file()


def test_what_a_killed_run_left_without_a_state_is_moved_aside(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "a")
    config = small_config(tmp_path / "a", "--epochs", "2", "--max_steps", "1")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "mammogram_byol_best.pth").write_bytes(b"of another run")
    folder = mammo.train(config)
    assert torch.load(folder / "mammogram_byol_best.pth")["step"] == 1
    aside = folder.with_name(f"{folder.name}_1") / "mammogram_byol_best.pth"
    assert aside.read_bytes() == b"of another run"


def test_a_second_run_in_one_folder_is_refused(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "a")
    config = small_config(tmp_path / "a", "--epochs", "2", "--max_steps", "1")
    with (
        mammo.processes.exclusive_run_folder(config.run_dir, True),
        pytest.raises(mammo.MammoError, match="another run is writing to"),
    ):
        mammo.train(config)
    mammo.train(config)


def test_metrics_of_another_number_of_processes_stay_in_place(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = mammo.tracking.MetricsFile(path, mammo.METRICS, 0, 10)
    for step in (10, 20, 30):
        metrics.write({"step": step, "epoch": step / 10})
    for _ in range(2):  # killed at once and started again
        mammo.tracking.MetricsFile(path, mammo.METRICS, 12, 5)  # from step 25, on twice as many
        kept = pd.read_csv(path)
        assert kept["step"].tolist() == [5, 10]
        assert kept["epoch"].tolist() == [1, 2]
    path.write_text("")
    mammo.tracking.MetricsFile(path, mammo.METRICS, 12, 5)
    assert pd.read_csv(path).empty


def test_metrics_of_long_runs_keep_their_steps(tmp_path):
    metrics = mammo.tracking.MetricsFile(tmp_path / "metrics.csv", mammo.METRICS, 0, 31_003)
    metrics.write({"step": 3_100_299, "epoch": 3_100_299 / 31_003})
    mammo.tracking.MetricsFile(tmp_path / "metrics.csv", mammo.METRICS, 3_100_299, 31_003)
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].tolist() == [3_100_299]


def test_a_finished_run_says_so(archive, tmp_path, capsys):
    shutil.copytree(archive, tmp_path / "a")
    config = small_config(tmp_path / "a", "--epochs", "1")
    folder = mammo.train(config)
    before = (folder / "last.pth").stat().st_mtime_ns
    capsys.readouterr()
    mammo.train(config)
    assert "is finished at step" in capsys.readouterr().out
    assert (folder / "last.pth").stat().st_mtime_ns == before
    # A job that was killed between its last step and its last file gets that file by a second start.
    exported = load_file(folder / "backbone.safetensors")
    (folder / "backbone.safetensors").unlink()
    mammo.train(config)
    again = load_file(folder / "backbone.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in exported.items())


def test_too_few_tiles_for_a_batch_is_named(archive):
    with pytest.raises(mammo.MammoError, match="lower --batch_size"):
        open_run(archive, "--batch_size", "4096")


def test_bf16_trains_on_the_cpu(archive):
    run = open_run(archive, "--precision", "bf16", "--run_name", "bf16")
    metrics = mammo.train_step(run, run.train_ids[:8])
    loss, std = metrics["loss"], metrics["feature_std"]
    assert loss.dtype == torch.float32
    assert math.isfinite(loss)
    assert std > 0
    with pytest.raises(mammo.MammoError, match="fp16 needs a GPU"):
        mammo.devices.choose_precision("fp16", torch.device("cpu"))


def test_auto_is_bf16_where_the_cpu_has_it_and_another_cpu_is_noted(archive, monkeypatch, capsys):
    monkeypatch.setattr(mammo.devices, "cpu_has_bf16", lambda: False)
    run = open_run(archive, "--run_name", "moved")
    assert mammo.devices.precision_name(run.config.precision, run.device) == "float32"
    mammo.save_state(run)
    open_run(archive, "--run_name", "moved")
    assert "note:" not in capsys.readouterr().err
    monkeypatch.setattr(mammo.devices, "cpu_has_bf16", lambda: True)
    run = open_run(archive, "--run_name", "moved")
    assert mammo.devices.precision_name(run.config.precision, run.device) == "bfloat16"
    assert "saved in float32, resumed in bfloat16" in capsys.readouterr().err
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)  # as on a GPU that has fp16 alone
    mammo.resume_run(run, mammo.checkpoints.load_checkpoint(run.folder / "last.pth"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "offline"), ({"WANDB_API_KEY": "x"}, "online"), ({"WANDB_MODE": "disabled"}, "disabled")],
)
def test_wandb_is_online_only_when_logged_in(archive, tmp_path, monkeypatch, environment, expected):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mammo.tracking.wandb_mode("auto") == expected
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    if not environment:
        assert mammo.tracking.wandb_mode("auto") == "online"


def test_wandb_failures_never_reach_the_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    config = mammo.Config(output_dir=str(tmp_path), wandb_mode="offline")
    tracker = mammo.start_tracker("abc", config)
    tracker.log({"step": 1, "loss": -0.5})
    tracker.finish()
    assert "wandb stopped" in capfd.readouterr().err
