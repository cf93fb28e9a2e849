"""Several processes, LARS, gradient checkpointing, streaming: the same numbers by other means."""

import copy
import hashlib
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import stages
import torch
from conftest import SMALL, small_config
from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

import byol_mammo.lars
import train_byol_mammo as mammo


def worker(words):
    """A process of a run that writes down the tiles of every step and the hash of its weights."""
    out, *flags = words
    seen, runs, step, prepare = [], [], mammo.train_step, mammo.prepare_run
    mammo.train_step = lambda run, ids, tiles=None: seen.append(ids.tolist()) or step(run, ids, tiles)
    mammo.prepare_run = lambda *words: runs.append(prepare(*words)) or runs[-1]
    code = mammo.main(flags)
    digest = hashlib.sha256()
    for name, value in runs[0].model.named_parameters():
        digest.update(name.encode() + value.detach().numpy().tobytes())
    found = {"seen": seen, "hash": digest.hexdigest(), "step": runs[0].step}
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    return code


def start_processes(folder, archive, *flags, size=2):
    """Start `size` processes of one run on an archive's images and cache; they print to 0.log, 1.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ["--data_dir", archive / "images", "--output_dir", folder / "runs"]
    places += ["--cache_dir", archive / "cache"]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        stages.start(
            worker, [folder, *places, *SMALL, *flags], folder / f"{rank}.log",
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def test_two_processes_hold_the_same_weights_and_share_the_tiles(archive, tmp_path):
    flags = ("--freq_loss_weight", "1", "--structure_loss_weight", "2", "--vicreg_weight", "0.1")
    flags += ("--epochs", "10", "--tiles_per_epoch", "64", "--max_steps", "20")
    processes = start_processes(tmp_path, archive, *flags)
    for rank, process in enumerate(processes):
        log = tmp_path / f"{rank}.log"
        assert stages.end(process, log) == 0, log.read_text()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["step"] == second["step"] == 20
    assert first["hash"] == second["hash"]
    for start in range(0, 20, 4):  # 64 tiles an epoch in batches of 8 on two processes: 4 steps
        epoch = np.concatenate([p["seen"][start : start + 4] for p in (first, second)]).ravel()
        assert len(epoch) == len(set(epoch)) == 64
    # One process goes on from there: at the same place of the schedule, with half the global batch.
    alone = start_processes(tmp_path, archive, *flags[:-1], "42", size=1)[0]
    assert stages.end(alone, tmp_path / "0.log") == 0, (tmp_path / "0.log").read_text()
    assert json.loads((tmp_path / "0.json").read_text())["step"] == 42


def test_a_dead_process_ends_the_others_with_a_message(archive, tmp_path):
    flags = ("--epochs", "1000", "--tiles_per_epoch", "64", "--save_every", "0")
    processes = start_processes(tmp_path, archive, *flags)
    until = time.monotonic() + 120
    while not (tmp_path / "runs" / "byol_slim" / "last.pth").exists():
        assert all(process.is_alive() for process in processes), (tmp_path / "0.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.1)
    processes[1].kill()
    assert stages.end(processes[0], tmp_path / "0.log", 60) == 2
    processes[1].join()
    printed = (tmp_path / "0.log").read_text()
    assert "lost each other" in printed
    assert "Traceback" not in printed
    torch.load(tmp_path / "runs" / "byol_slim" / "last.pth")


def test_processes_without_an_address_are_told_how_to_start(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(mammo.MammoError, match="start by torchrun"):
        mammo.processes.join_ranks(mammo.processes.Ranks(0, 2, 0), "gloo", 1)


def slurm(rank, tasks, local, **step):
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(tasks), "SLURM_LOCALID": str(local), **step}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, mammo.processes.Ranks(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, mammo.processes.Ranks(3, 4, 1)),
        # A plain `python` in an allocation of 8 tasks, and in the shell that salloc opens as a step.
        (slurm(0, 8, 0), mammo.processes.Ranks(0, 1, 0)),
        (
            slurm(0, 8, 0, SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1"),
            mammo.processes.Ranks(0, 1, 0),
        ),
        (slurm(5, 8, 1, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8"), mammo.processes.Ranks(5, 8, 1)),
    ],
)
def test_the_place_among_processes_comes_from_the_launcher(monkeypatch, environment, expected):
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mammo.processes.find_ranks() == expected


@pytest.mark.parametrize("reduce", [1, 2])
def test_streamed_tiles_give_the_same_views_bit_for_bit(tiles, reduce):
    source = mammo.open_tiles(tiles.cache, reduce)
    ids = np.random.default_rng(0).permutation(len(source))[:12]
    part = source.subset(ids)
    assert part.pixels.numel() < source.pixels.numel() * len(ids)
    for spec in (mammo.VIEW_1, mammo.VIEW_2):
        for key in range(5):
            whole = mammo.make_view(source, ids, spec, 48, (key,)).image
            assert torch.equal(whole, mammo.make_view(part, np.arange(12), spec, 48, (key,)).image)


def test_a_run_whose_pixels_stream_ends_with_the_same_weights(archive, tmp_path, monkeypatch):
    hashes = []
    for name in ("resident", "streamed"):
        run = open_run(archive, tmp_path, name)
        if name == "streamed":
            run.tiles.pixels = _Elsewhere(run.tiles.pixels)
        for ids, tiles in mammo.batches(run):
            assert (tiles is None) == (name == "resident")
            mammo.train_step(run, ids, tiles)
        state = run.model.state_dict()
        hashes.append(hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest())
    assert hashes[0] == hashes[1]


class _Elsewhere:
    """Pixels that say they are on another device than the model."""

    device = torch.device("meta")

    def __init__(self, pixels):
        self.pixels, self.dtype = pixels, pixels.dtype

    def as_strided(self, *words):
        return self.pixels.as_strided(*words)


def open_run(archive, folder, name, *flags):
    config = small_config(archive, "--run_name", name, "--output_dir", str(folder / "runs"), *flags)
    torch.manual_seed(config.seed)
    backbone = mammo.checkpoints.build_backbone(config.backbone)
    config = mammo.match_input_dim(config, backbone)
    return mammo.prepare_run(config, backbone, mammo.build_cache(config), mammo.processes.find_ranks())


def test_lars_equals_lightlys():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
    theirs = copy.deepcopy(ours)
    pairs = []
    for model, kind in ((ours, byol_mammo.lars.LARS), (theirs, LightlyLARS)):
        wide = [p for p in model.parameters() if p.ndim > 1]
        thin = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": wide, "weight_decay": 1e-3}, {"params": thin, "weight_decay": 0.0}]
        pairs.append((model, kind(groups, lr=0.3, momentum=0.9)))
    for _ in range(6):
        x = torch.randn(32, 8)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lars_adapts_the_heads_that_do_not_decay(archive, tmp_path):
    """At LARS's learning rates a plain step would blow them up."""
    targets = ("--freq_loss_weight", "1", "--structure_loss_weight", "2")
    run = open_run(archive, tmp_path, "lars", "--optimizer", "lars", "--weight_decay", "0.1", *targets)
    (weights, plain) = run.optimizer.param_groups[-2:]
    assert [(group["weight_decay"], group["adapts"]) for group in (weights, plain)] == [
        (0, True),
        (0, False),
    ]
    heads = {id(p) for head in run.objective.heads for p in head.parameters()}
    assert {id(p) for p in (*weights["params"], *plain["params"])} == heads
    for p in run.objective.parameters():
        p.grad = torch.zeros_like(p)
    before = [torch.full_like(p, 1e-3) for p in weights["params"]]
    for p, value in zip(weights["params"], before, strict=True):
        p.data, p.grad = value.clone(), torch.full_like(p, 1e6)
    run.optimizer.step()
    for p, value in zip(weights["params"], before, strict=True):
        step = weights["lr"] * weights["trust"] * value.norm()
        torch.testing.assert_close((p - value).norm(), step, rtol=0.05, atol=0)


def test_lars_trains_and_resumes(archive, tmp_path):
    flags = ("--optimizer", "lars", "--lr", "0.1", "--epochs", "2")
    config = small_config(archive, *flags, "--output_dir", str(tmp_path), "--run_name", "whole")
    whole = mammo.train(config)
    for limit in ("3", "0"):
        places = ("--output_dir", str(tmp_path), "--run_name", "parts", "--max_steps", limit)
        parts = mammo.train(small_config(archive, *flags, *places))
    states = [torch.load(run / "mammogram_byol_final.pth")["model_state_dict"] for run in (whole, parts)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    rates = [mammo.learning_rate(7, 70, 7, config, processes) for processes in (1, 4)]
    assert np.isclose(rates[1] / rates[0], 4)


def test_gradient_checkpointing_changes_nothing(archive, tmp_path):
    states = []
    for name, flags in (("plain", ()), ("checkpointed", ("--grad_checkpoint",))):
        run = open_run(archive, tmp_path, name, *flags)
        for step in range(3):
            mammo.train_step(run, run.train_ids[8 * step : 8 * step + 8])
        states.append(run.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_collapsed_run_stops_if_told_to(archive, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(mammo, "COLLAPSE_STD", 10.0)  # no network is that healthy
    places = ["--output_dir", str(tmp_path), "--epochs", "2"]
    with pytest.raises(mammo.MammoError, match="the run collapsed"):
        mammo.train(small_config(archive, *places, "--on_collapse", "stop"))
    assert "warning: collapse" in capfd.readouterr().err
    folder = mammo.train(small_config(archive, *places, "--run_name", "goes_on"))
    assert (folder / "mammogram_byol_final.pth").is_file()
