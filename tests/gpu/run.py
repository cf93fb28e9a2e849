#!/usr/bin/env python3
"""Stages of tests/gpu/run.sh: each in a process of its own, with a time limit, within one budget.

    python tests/gpu/run.py OUT [--budget 420] [--stages versions,resnet50]
    python tests/gpu/run.py --dry_run OUT       # on the CPU at tiny sizes

What a stage prints goes to OUT/log.txt, its figures as lines of JSON to OUT/figures.jsonl, at once: a
run that is cut keeps what it has. Exit code 1 where a stage failed or ran out of time.

versions    card, driver, versions, commit
agreement   views and steps on the device against the host, precisions, compiled or not; how far runs are
            apart that are repeated, resumed, streamed, deterministic or not; how often a step waits
resnet50    benchmark.py step, loop, views and profile at 512 px, batch 32
resnet18    the same at 128 px, batch 256
memory      peak of a step against the batch
killed      a run that is killed in the middle and resumed, against one that is not
tests       tests/test_gpu_step.py, those that need a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

# Here, once: the stages are forks of a process that has imported everything and has not touched the GPU.
import conftest  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import small_network  # noqa: E402
import test_gpu_step  # noqa: E402
import torch  # noqa: E402

import benchmark  # noqa: E402
import train_byol_mammo as mammo  # noqa: E402

BUDGET = 420  # seconds of all stages
LIMITS = {  # seconds of each stage
    "versions": 20, "agreement": 70, "resnet50": 170, "resnet18": 80, "memory": 25, "killed": 50,
    "tests": 90,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Sizes of all stages."""

    device: str = "cuda"
    resnet50: str = "--backbone resnet50 --tile_size 512 --view_size 512 --batch_size 32 --steps 10"
    resnet18: str = "--backbone resnet18 --tile_size 128 --view_size 128 --batch_size 256 --steps 40"
    repeats: int = 2
    batches: tuple[int, ...] = (8, 16, 32, 64, 96, 128)  # of the memory stage
    killed: str = "--backbone resnet18 --batch_size 64"
    steps: int = 200  # of the run that is killed


TINY = f"--backbone {small_network.NAME} --tile_size 64 --view_size 32 --steps 1 --batch_size"
DRY = Plan(
    "cpu", f"{TINY} 2", f"{TINY} 4", 1, (2, 4), f"--backbone {small_network.NAME} --batch_size 4", 24
)


class Stage:
    """What a stage has: the plan, the folder of the results, and one that all stages share."""

    def __init__(self, name: str, plan: Plan, out: Path, scratch: Path) -> None:
        self.name, self.plan, self.out, self.scratch = name, plan, out, scratch

    @property
    def figures(self) -> Path:
        """The file of the figures."""
        return self.out / "figures.jsonl"

    def record(self, **figures: Any) -> None:
        """Print figures and add them to OUT/figures.jsonl as a line."""
        line = json.dumps({"stage": self.name, **figures})
        print(line)
        with self.figures.open("a") as file:
            file.write(line + "\n")

    def options(self, flags: str) -> argparse.Namespace:
        """Options of benchmark.py."""
        words = f"step --device {self.plan.device} --repeats {self.plan.repeats} {flags}"
        return benchmark.parse_options([*words.split(), "--figures", str(self.figures)])


def versions(stage: Stage) -> None:
    """Card, driver, versions, commit."""
    precision = mammo.devices.precision_name("auto", torch.device(stage.plan.device))
    found: dict[str, Any] = {**mammo.devices.environment(precision)}
    if stage.plan.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"free_bytes": free, "total_bytes": total, "cuda": str(torch.version.cuda)}
    stage.record(**found, date=time.strftime("%Y-%m-%d", time.gmtime()))
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)


def apart(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest difference between two states, as from test_gpu_step.state_after."""
    pairs = zip(first, second, strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def small_run(stage: Stage, name: str, *flags: str) -> mammo.Run:
    """A run of a small network on a small archive; the same `name` goes on where the other saved."""
    torch.use_deterministic_algorithms(False)  # what a run before has left
    folder = stage.scratch / "small"
    if not folder.is_dir():
        conftest.write_images(folder / "images", bits=12)
    return test_gpu_step.real_run(folder, folder / name, "--device", stage.plan.device, *flags)


def loss_after(run: mammo.Run, steps: int = 4) -> float:
    """The loss of the last of some steps."""
    batches = mammo.batches(run)
    return [float(mammo.train_step(run, *next(batches))["loss"]) for _ in range(steps)][-1]


def resumed(stage: Stage, name: str, *flags: str) -> list[torch.Tensor]:
    """The state after two steps, a save, and two steps of a run that begins with it."""
    run = small_run(stage, name, *flags)
    test_gpu_step.state_after(run, 2)
    run.folder.mkdir(parents=True)
    mammo.save_state(run)
    return test_gpu_step.state_after(small_run(stage, name, *flags), 2)


def waits(run: mammo.Run) -> int:
    """How often two steps wait for the GPU, once two have compiled and chosen algorithms."""
    batches = mammo.batches(run)
    steps = [next(batches) for _ in range(4)]
    for step in steps[:2]:
        mammo.train_step(run, *step)
    if run.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in steps[2:]:
            mammo.train_step(run, *step)
    torch.cuda.set_sync_debug_mode("default")
    for warning in found:
        print(warning.message, warning.filename, warning.lineno)
    return sum("synchroniz" in str(warning.message) for warning in found)


def views_apart(run: mammo.Run) -> float:
    """The largest difference of a grey value between views made on the device and on the host."""
    host, ids = mammo.open_tiles(run.tiles.cache, run.tiles.reduce), np.arange(16)
    return max(
        float((a.image.cpu() - b.image).abs().max())
        for spec in (mammo.PLAIN_VIEW, *mammo.VIEWS)
        for a, b in [[mammo.make_view(tiles, ids, spec, 32, (1, 2)) for tiles in (run.tiles, host)]]
    )


def streamed(stage: Stage, name: str, *flags: str) -> list[torch.Tensor]:
    """The state after four steps on tiles that the host cuts out."""
    run = small_run(stage, name, *flags)
    whole = mammo.open_tiles(run.tiles.cache, run.tiles.reduce)
    for ids, _ in mammo.batches(run):
        part = whole.subset(ids)
        part.pixels = mammo.devices.to_device(part.pixels.numpy(), run.device)
        mammo.train_step(run, ids, part)
    return [value.cpu() for value in run.model.state_dict().values()]


def agreement(stage: Stage) -> None:
    """What must be equal, or nearly, and how far apart it is."""
    fast, exact = ("--no_compile",), ("--no_compile", "--deterministic")
    on_gpu = stage.plan.device == "cuda"
    after = test_gpu_step.state_after
    found: dict[str, Any] = {"views_apart": views_apart(small_run(stage, "views", *fast))}
    for precision in ("fp32", "bf16", *(["fp16"] if on_gpu else [])):
        run = small_run(stage, precision, "--precision", precision, *fast)
        found[f"loss_{precision}"] = loss_after(run)
    start = time.perf_counter()
    found["loss_compiled"] = loss_after(small_run(stage, "compiled", "--precision", "fp32"))
    found["compiled_s"] = time.perf_counter() - start  # and four steps
    for kind, flags in (("free", fast), ("exact", exact)):
        reference = after(small_run(stage, f"{kind}1", *flags), 4)
        found[f"{kind}_repeated_apart"] = apart(
            reference, after(small_run(stage, f"{kind}2", *flags), 4)
        )
        found[f"{kind}_resumed_apart"] = apart(reference, resumed(stage, f"{kind}3", *flags))
        found[f"{kind}_streamed_apart"] = apart(reference, streamed(stage, f"{kind}4", *flags))
    objectives = ("--vicreg_weight 1", "--freq_loss_weight 1 --structure_loss_weight 1")
    for number, words in enumerate(("", *objectives, *(["--precision fp16"] if on_gpu else []))):
        run = small_run(stage, f"waits{number}", *fast, *words.split())
        found[f"waits {words}".strip()] = waits(run)
    stage.record(**found)
    losses = [value for name, value in found.items() if name.startswith("loss")]
    assert found["views_apart"] < 1e-3 / mammo.GREY_STD
    assert np.ptp(losses) < 0.1, "the loss depends on precision or compilation"
    wrong = [n for n, v in found.items() if n.startswith(("exact", "waits")) and v]
    assert not wrong, f"not 0: {', '.join(wrong)}"


def train_and_measure(stage: Stage) -> None:
    """benchmark.py step, loop, views and profile of the setting that has the stage's name."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # conftest.py's, for runs to the bit
    options = stage.options(getattr(stage.plan, stage.name))
    benchmark.benchmark_training(options, stage.scratch, ["step", "loop", "views", "profile"])


def memory(stage: Stage) -> None:
    """Peak memory of two steps of the first setting for each batch, until one does not fit."""
    options = stage.options(stage.plan.resnet50)
    for batch in stage.plan.batches:
        options.batch_size = batch
        try:
            run = benchmark.open_run(options, stage.scratch, options.tile_size)
            run.compute_loss = run.objective  # each batch would be compiled anew
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            loss_after(run, 2)
        except torch.OutOfMemoryError:
            stage.record(batch=batch, peak_bytes="more than there is")
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if run.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            del run
            torch.cuda.empty_cache()
        stage.record(batch=batch, peak_bytes=peak)


def start_training(stage: Stage, name: str) -> Any:
    """A process that trains to the plan's number of steps."""
    tiles = f"--tile_size 128 --tile_stride 64 --pixel_spacing_mm {benchmark.TRAIN_SPACING}"
    flags = f"--weights none --min_freq_energy 0 --monitor_tiles 8 --max_steps {stage.plan.steps}"
    quiet = "--log_every 2 --save_every 0.01 --report_every 0 --progress none --wandb_mode disabled"
    places = {
        "data_dir": benchmark.training_images(stage.scratch, ""),
        "cache_dir": stage.scratch / "cache",
        "output_dir": stage.scratch / "runs",
        "run_name": name,
        "device": stage.plan.device,
    }
    words = f"{stage.plan.killed} {tiles} {flags} {quiet} --deterministic --no_compile".split()
    words += [word for flag, value in places.items() for word in (f"--{flag}", str(value))]
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(mammo.main(words)))
    process.start()
    return process


def killed(stage: Stage) -> None:
    """A run that is killed past its middle and resumed ends as one that was not."""
    for name in ("whole", "killed", "killed"):
        process = start_training(stage, name)
        folder = stage.scratch / "runs" / name
        half = f"\n{stage.plan.steps // 2},"
        while name == "killed" and process.is_alive() and not (folder / "killed").exists():
            rows = (folder / "metrics.csv").read_text() if (folder / "metrics.csv").exists() else ""
            if half in rows and (folder / "last.pth").exists():
                process.kill()
                (folder / "killed").touch()
            time.sleep(0.002)
        process.join()
        was_killed = process.exitcode == -signal.SIGKILL
        assert process.exitcode == 0 or was_killed, f"{name} ended with {process.exitcode}"
    assert (stage.scratch / "runs" / "killed" / "killed").exists(), "it ended before it could be killed"
    ends = [
        torch.load(stage.scratch / "runs" / name / "mammogram_byol_final.pth", weights_only=True)
        for name in ("whole", "killed")
    ]
    states = [list(end["model_state_dict"].values()) for end in ends]
    stage.record(steps=ends[1]["step"], resumed_apart=apart(*states))
    assert apart(*states) == 0


def run_tests(_: Stage) -> None:
    """The tests that need a GPU; without one they are skipped."""
    names = "never_waits or same_on_the_gpu or bit_equal_if_asked"
    words = ["-n", "0", "-q", "-W", "default", "-p", "no:cacheprovider", "-k", names]
    assert pytest.main([*words, str(HERE.parent / "test_gpu_step.py")]) == 0


STAGES: dict[str, Callable[[Stage], None]] = {
    "versions": versions, "agreement": agreement, "resnet50": train_and_measure,
    "resnet18": train_and_measure, "memory": memory, "killed": killed, "tests": run_tests,
}  # fmt: skip


def make_small() -> None:
    """Sizes of a dry run for what is no option of benchmark.py."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # no extraction processes
    benchmark.TRAIN_PHANTOMS, benchmark.TRAIN_SIZE, benchmark.TRAIN_SPACING = 2, (448, 352), 0.68
    benchmark.WARM_UP, benchmark.PROFILED = 1, 1
    benchmark.PRODUCT_SIDES = dict.fromkeys(benchmark.PRODUCT_SIDES, 128)


def body(stage: Stage) -> None:
    """Body of a stage's process, which leads a group of its own."""
    os.setsid()
    with (stage.out / "log.txt").open("a", buffering=1) as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout = sys.stderr = log
        print(f"\n==== {stage.name}", flush=True)
        torch.set_num_threads(mammo.processes.available_cores())  # conftest.py has set one
        if stage.plan is DRY:
            make_small()
        try:
            STAGES[stage.name](stage)
        except BaseException:
            traceback.print_exc()
            log.flush()
            os._exit(1)


def run_stage(stage: Stage, seconds: float) -> str:
    """Run a stage for at most `seconds`; how it ended."""
    process = multiprocessing.get_context("fork").Process(target=body, args=(stage,))
    process.start()
    process.join(seconds)
    ending = {None: "out of time", 0: "ok"}.get(process.exitcode, "failed")
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # what it has started
    process.join()
    return ending


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 1 where one did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all stages")
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    out, plan, endings = options.out.resolve(), DRY if options.dry_run else Plan(), []
    slack = 10 if options.dry_run else 1  # a busy machine's rehearsal is no measurement
    end = time.monotonic() + options.budget * slack
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.stages.split(","):
            stage, start = Stage(name, plan, out, Path(scratch)), time.monotonic()
            ending = run_stage(stage, min(LIMITS[name] * slack, max(1.0, end - start)))
            endings.append(ending)
            with stage.figures.open("a") as file:
                seconds = round(time.monotonic() - start, 1)
                line = {"stage": "ended", "name": name, "ending": ending, "seconds": seconds}
                file.write(json.dumps(line) + "\n")
            print(f"{name:10s} {ending:12s} {seconds:6.1f} s", flush=True)
    return int(set(endings) != {"ok"})


if __name__ == "__main__":
    sys.exit(main())
