#!/usr/bin/env python3
"""submit_byol.sh on a real SLURM on this machine alone; README.md beside this file says how and what."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--tile_size 128 --tile_stride 64 --min_freq_energy 0 --backbone resnet18 --weights none "
    "--view_size 64 --hidden_dim 64 --proj_dim 32 --batch_size 8 --tiles_per_epoch 160 "
    "--monitor_tiles 32 --num_workers 1 --log_every 2 --device cpu --wandb_mode disabled"
).split()
PHANTOMS = (
    "synthetic_mammograms.py --output_dir raw --studies 4 --height 880 --width 700",
    "prepare_dataset.py --csv_path raw/breast-level_annotations.csv --images_root raw/images_png",
)
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")


def call(*words: str | Path, cwd: Path = ROOT, check: bool = True) -> str:
    """Run a command; its output. A failure ends the script and shows what was said."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def until(ready: Callable[[], bool], seconds: float, complaint: str) -> None:
    """Wait for ready() to be true."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise SystemExit(f"error: {complaint} after {seconds:.0f} s")
        time.sleep(2)


def install() -> None:
    """Install SLURM and munge where they are missing."""
    if os.geteuid() != 0:
        raise SystemExit("error: root is needed, to install and to run slurmd")
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        print("installing slurm-wlm and munge by apt-get", flush=True)
        os.environ["DEBIAN_FRONTEND"] = "noninteractive"
        call("apt-get", "update")
        call("apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge")


def configure(folder: Path) -> None:
    """Write slurm.conf and the munge key, and let SLURM's commands find them."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # free; its successor most likely is free as well
    host = socket.gethostname().partition(".")[0]
    values = {"folder": folder, "host": host, "port": port, "next_port": port + 1}
    conf = Path(__file__).with_name("slurm.conf.in").read_text().format(**values)
    (folder / "slurm.conf").write_text(conf)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Munge, controller and node as children of this script; they end with it."""
    configure(folder)
    # --force: only warnings where munge finds root or the folder unsafe
    munged = ["munged", "--foreground", "--force"]
    for name in ("key-file", "socket", "pid-file", "log-file", "seed-file"):
        munged.append(f"--{name}={folder}/munge.{name[:3]}")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.out", "w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(2)
        until(lambda: "idle" in call("sinfo", "--format=%T", check=False), 60, "no idle node")
        try:
            yield
        finally:
            call("scancel", "--user=root")
            until(lambda: not call("squeue", "--noheader"), 90, "jobs have not ended")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def weights_hash(path: Path) -> str:
    """SHA-256 over the names and values of a checkpoint's model; '' without a checkpoint."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    for name, value in torch.load(path, map_location="cpu")["model_state_dict"].items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def show(job: str) -> dict[str, str]:
    """What SLURM knows about a job."""
    pairs = (word.partition("=") for word in call("scontrol", "show", "job", "-o", job).split())
    return {name: value for name, _, value in pairs}


class Suite:
    """The cases, their folder and their verdicts."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder, self.failures = folder, 0
        places = ["--data_dir", f"{folder}/split_images/training", "--output_dir", f"{folder}/runs"]
        self.flags = [*places, "--cache_dir", f"{folder}/cache", *FLAGS, "--epochs", str(epochs)]

    def check(self, what: str, good: bool) -> None:
        """Print and count a verdict."""
        print(f"{'PASS' if good else 'FAIL'} {what}", flush=True)
        self.failures += not good

    def submit(self, name: str, *options: str) -> str:
        """sbatch submit_byol.sh for a run of this name, on a cluster without GPUs; the job's id."""
        output = f"--output={self.folder}/{name}.log"
        script = ["submit_byol.sh", *self.flags, "--run_name", name]
        return call("sbatch", "--parsable", "--gres=none", output, *options, *script)

    def finish(self, name: str, job: str) -> tuple[int, str]:
        """Wait for a job's end; its restarts and the hash of its weights."""
        start = time.monotonic()
        until(lambda: show(job)["JobState"] in ENDED, 3600, f"job {name} has not ended")
        state, restarts = show(job)["JobState"], int(show(job)["Restarts"])
        digest = weights_hash(self.folder / "runs" / name / "mammogram_byol_final.pth")
        print(f"{name}: {state}, {restarts} restarts, {time.monotonic() - start:.0f} s, sha256 {digest}")
        log = (self.folder / f"{name}.log").read_text().replace("\r", "\n").splitlines()
        words = ("training ", "stopped", "requeue", "error", "finished", "srun", "slurmstepd")
        print("".join(f"    {line}\n" for line in log if line.startswith(words)), end="", flush=True)
        return restarts, digest

    def pair(self, name: str, limits: dict[str, list[str]], *options: str) -> None:
        """A run without a limit in the way, and runs that limits interrupt."""
        restarts, expected = self.finish(name, self.submit(name, *options))
        self.check(f"{name}: finished at the first go", restarts == 0 and expected != "")
        for limited, limit in limits.items():
            restarts, digest = self.finish(limited, self.submit(limited, *options, *limit))
            hint = "" if restarts else ", never: raise --epochs"
            self.check(f"{limited}: requeued{hint}", restarts > 0)
            self.check(f"{limited}: the weights of {name}", digest == expected != "")

    def cancel(self) -> None:
        """scancel of a training job."""
        job, metrics = self.submit("cancel"), self.folder / "runs/cancel/metrics.csv"
        until(metrics.is_file, 600, "cancel has not started")
        call("scancel", job)
        self.finish("cancel", job)
        time.sleep(15)
        self.check("cancel: saved", (self.folder / "runs/cancel/last.pth").is_file())
        self.check("cancel: not requeued", show(job)["JobState"] == "CANCELLED")


def main() -> int:
    """Run the cases; 0 where all pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=1, help="time limit of the limited jobs")
    parser.add_argument("--epochs", type=int, default=12, help="enough for the limit to strike")
    parser.add_argument("--cases", nargs="+", default=["one", "cancel", "two"], help="one, cancel, two")
    options = parser.parse_args()
    install()
    os.environ |= {"VENV": sys.prefix if sys.prefix != sys.base_prefix else "", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up then too
    # SLURM sends a signal up to a minute early; SIGCONT has no effect and leaves SIGTERM to the limit.
    usr1, term = ([f"--time={options.minutes}", f"--signal=B:{name}@1"] for name in ("USR1", "CONT"))
    with tempfile.TemporaryDirectory(prefix="byol-slurm-") as name, cluster(Path(name)):
        print(call("sinfo", "--version"), flush=True)
        for command in PHANTOMS:
            script, *flags = command.split()
            call(sys.executable, ROOT / script, *flags, cwd=Path(name))
        suite = Suite(Path(name), options.epochs)
        if "one" in options.cases:
            suite.pair("whole", {"limit": usr1, "term": term})
        if "cancel" in options.cases:
            suite.cancel()
        if "two" in options.cases:
            suite.pair("two", {"two-limit": usr1}, "--ntasks-per-node=2")
    return min(suite.failures, 1)


if __name__ == "__main__":
    sys.exit(main())
