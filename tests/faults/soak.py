#!/usr/bin/env python3
"""Train for an hour on the CPU and watch memory, open files, threads and throughput: all must stay flat.

    python tests/faults/soak.py                    # 60 minutes
    python tests/faults/soak.py --minutes 2        # a try

A small run on synthetic images is sampled every few seconds. For each quantity a line is fitted to the
samples after the start. Flat means: over the whole run the line rises by less than TOLERANCE of its
mean, or by less than its 95 % interval. Throughput counts tiles per second of CPU time, so that other
programs on the machine do not matter. At the end Ctrl-C must stop the run within 5 s, its state saved.
Exit code 0: flat, 1: not.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import REPORTS, RESNET18, ROOT, SMALL, write_images

TOLERANCE = {"memory_mb": 0.02, "open_files": 0.0, "threads": 0.0, "tiles_per_cpu_s": 0.05}
WARM_UP = 0.15  # share of the samples left out at the start, until caches and allocators are filled


def sample(pid: int, metrics: Path) -> dict[str, float]:
    """One look at the process and at its metrics file."""
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if ":" in line
    )
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    steps = pd.read_csv(metrics)["step"].max() if metrics.is_file() else 0
    return {
        "minutes": time.monotonic() / 60,
        "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "cpu_s": sum(map(int, times)) / os.sysconf("SC_CLK_TCK"),
        "tiles": 8 * float(0 if np.isnan(steps) else steps),
    }


def rise(minutes: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """By how much a fitted line rises over the run, and the half width of its 95 % interval.

    Neighbouring samples are alike, so the interval is that of twelve means, not of all samples.
    """
    groups = [part for part in np.array_split(np.arange(len(values)), 12) if len(part)]
    x = np.array([minutes[part].mean() for part in groups])
    y = np.array([values[part].mean() for part in groups])
    slope, offset = np.polyfit(x, y, 1)
    residuals = y - (slope * x + offset)
    error = np.sqrt((residuals**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    span = minutes[-1] - minutes[0]
    return slope * span, 2.23 * error * span  # Student's t for 10 degrees of freedom


def judge(table: pd.DataFrame) -> bool:
    """Print one line for each quantity; whether all are flat."""
    table = table[int(WARM_UP * len(table)) :].reset_index(drop=True)
    change = table[["tiles", "cpu_s"]].diff()
    window = max(1, len(table) // 60)  # rows of metrics come now and then
    speed = change["tiles"].rolling(window).sum() / change["cpu_s"].rolling(window).sum()
    table = table.assign(tiles_per_cpu_s=speed).dropna()
    flat = True
    for name, tolerance in TOLERANCE.items():
        values = table[name].to_numpy()
        change, interval = rise(table["minutes"].to_numpy(), values)
        harmful = -change if name == "tiles_per_cpu_s" else change
        good = harmful <= max(tolerance * values.mean(), interval)
        flat &= good
        ends = f"{values[:5].mean():9.2f} to {values[-5:].mean():9.2f}"
        verdict = "flat" if good else "NOT FLAT"
        print(f"{name:<16} from {ends}, line rises {change:+.3f} +- {interval:.3f}: {verdict}")
    return flat


def stop(process: subprocess.Popen, run: Path) -> bool:
    """Ctrl-C: whether the run ends within 5 s with its state saved."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    code = process.wait(60)
    seconds = time.monotonic() - begin
    state = torch.load(run / "last.pth", weights_only=True)
    print(
        f"Ctrl-C           ended after {seconds:.1f} s with code {code}, state of step {state['step']}"
    )
    return code == 130 and seconds < 5


def main() -> int:
    """Run, sample, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images", 8, bits=12)
        command = [sys.executable, ROOT / "train_byol_mammo.py", "--data_dir", folder / "images"]
        command += ["--output_dir", folder / "runs", "--cache_dir", folder / "cache", *SMALL]
        command += [*RESNET18, *REPORTS]
        command += [
            "--epochs",
            "1000000",
            "--checkpoint_every",
            "0",
            "--save_every",
            "1",
            "--log_every",
            "10",
        ]
        run, rows = folder / "runs" / "byol_resnet18", []
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        while not (run / "metrics.csv").is_file() and process.poll() is None:
            time.sleep(0.2)
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end and process.poll() is None:
            time.sleep(options.every)
            rows.append(sample(process.pid, run / "metrics.csv"))
        if process.poll() is not None:
            print((folder / "log").read_text()[-2000:])
            return 1
        steps = f"{rows[-1]['tiles'] / 8:,.0f} steps of 8 tiles"
        print(f"{len(rows)} samples in {options.minutes:g} min, {steps}")
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
        stopped = stop(process, run)
        return 0 if judge(pd.DataFrame(rows)) and stopped else 1


if __name__ == "__main__":
    sys.exit(main())
