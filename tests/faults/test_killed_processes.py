"""SIGKILL at random moments of every stage, killed workers, Ctrl-C: the same command ends all the same.

Seven kills by default, 54 with -m slow (FAULTS_KILLS=50 sets about how many), FAULTS_SEED other moments.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pytest
import stages
import torch
from conftest import REPORTS, assert_same_cache, images_done, small_config, write_images
from test_classifier import TILES, labelled, settings_of  # noqa: F401
from test_full_disk import all_whole, arguments, same_result, whole  # noqa: F401
from test_prepare_runs import good_file, tree
from test_training import weights_hash

import byol_mammo.pictures
import train_byol_mammo as mammo
from byol_mammo import processes

SEED = int(os.environ.get("FAULTS_SEED", "0"))
KILLS = int(os.environ.get("FAULTS_KILLS", "50"))


@dataclass
class Stage:
    """A script with its flags for a folder, what must be the same in the end, and when it is killed."""

    script: str
    flags: Callable[[Path], list]
    compare: Callable[[Path, Path], None]
    truth: Path  # folder of a run that nothing disturbed
    seconds: float = 0.0  # its time
    moment: Callable[[Path], bool] | None = None  # what must be seen first
    code: int = 0

    def start(self, folder: Path):
        """A process of the stage in a folder."""
        folder.mkdir(exist_ok=True)
        return stages.start(self.script, self.flags(folder), folder / "log")

    def finish(self, folder: Path) -> None:
        """Run the stage to its end and compare."""
        folder.mkdir(exist_ok=True)
        code, printed = stages.finish(self.script, self.flags(folder), folder / "log")
        assert code == self.code, printed
        if folder != self.truth:
            self.compare(folder, self.truth)


def undisturbed(stage: Stage) -> Stage:
    """Run the stage in its own folder and take its time."""
    begin = time.monotonic()
    stage.finish(stage.truth)
    stage.seconds = time.monotonic() - begin
    return stage


def same_cache(folder: Path, truth: Path) -> None:
    """Both folders hold one finished cache of the same content."""
    caches = [next(place.glob("cache/[!.]*")) for place in (folder, truth)]
    assert caches[0].name == caches[1].name
    assert_same_cache(*caches)


def same_runs(folder: Path, truth: Path) -> None:
    """The same cache, weights and metrics; nothing half-written is left."""
    same_cache(folder, truth)
    same_result(folder / "runs" / "byol_slim", truth / "runs" / "byol_slim")
    assert not list((folder / "runs").rglob(f"{mammo.files.UNFINISHED}*"))


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """Laying 45 files of nine kinds out, in a process."""
    root = tmp_path_factory.mktemp("prepare")
    for number in range(45):
        good_file(root / f"in/p{number % 9}/i{number}", number)

    def flags(folder: Path) -> list:
        return [
            "--csv_path",
            "none",
            "--images_root",
            root / "in",
            "--output_dir",
            folder / "out",
            "--verify",
        ]

    def compare(folder: Path, truth: Path) -> None:
        assert tree(folder / "out") == tree(truth / "out")

    return undisturbed(Stage("prepare_dataset", flags, compare, root / "truth"))


@pytest.fixture(scope="module")
def extraction(whole, tmp_path_factory):  # noqa: F811
    """Building the cache of four images, then one step."""
    data = whole[0]
    root = tmp_path_factory.mktemp("extraction")

    def flags(folder: Path) -> list:
        return arguments(data, folder, "--max_steps", "1")

    return undisturbed(Stage("train_byol_mammo", flags, same_cache, root / "truth"))


@pytest.fixture(scope="module")
def training(whole, tmp_path_factory):  # noqa: F811
    """Two epochs that write last.pth after every step."""
    return training_stage(whole, tmp_path_factory)


@pytest.fixture(scope="module")
def pictures(whole, tmp_path_factory):  # noqa: F811
    """The same with its report: most of its time goes to pictures."""
    return training_stage(whole, tmp_path_factory, *REPORTS)


def training_stage(whole, tmp_path_factory, *more: str) -> Stage:  # noqa: F811
    """A training on the finished cache of `whole`, which it is compared with."""
    data, run = whole
    flags = lambda folder: arguments(data, folder, *more)  # noqa: E731
    stage = Stage("train_byol_mammo", flags, same_runs, run.parents[1])
    copy = tmp_path_factory.mktemp("training") / "copy"
    shutil.copytree(run.parents[1] / "cache", copy / "cache")
    begin = time.monotonic()
    stage.finish(copy)
    stage.seconds = time.monotonic() - begin
    return stage


@pytest.fixture(scope="module")
def checkpoint(training):
    """The same, killed while a checkpoint is being written."""

    def is_writing(folder: Path) -> bool:
        return bool(list((folder / "runs").rglob(f"{mammo.files.UNFINISHED}*.pth")))

    return Stage(training.script, training.flags, training.compare, training.truth, 0.05, is_writing)


@pytest.fixture(scope="module")
def classifier(labelled, tmp_path_factory):  # noqa: F811
    """Fine-tuning a classifier for two epochs."""
    root = tmp_path_factory.mktemp("classifier")
    words = ["--weights", "none", *TILES, "--epochs", 2, "--patience", 2, "--run_name", "tuned"]

    def compare(folder: Path, truth: Path) -> None:
        weights = [weights_hash(place / "tuned" / "classifier_best.pth") for place in (folder, truth)]
        assert weights[0] == weights[1]
        tables = [(place / "tuned" / "metrics.csv").read_bytes() for place in (folder, truth)]
        assert tables[0] == tables[1]
        assert not list(folder.rglob(f"{mammo.files.UNFINISHED}*"))

    def flags(folder: Path) -> list:
        return ["train", *settings_of(labelled, *words, out=folder)]

    return undisturbed(Stage("train_classifier", flags, compare, root / "truth"))


def check_files(folder: Path) -> None:
    """After a kill: whatever has its final name is whole."""
    all_whole(folder)
    for path in folder.rglob("classifier_*.pth"):
        torch.load(path)


def kill_at_random(stage: Stage, folder: Path, kills: int, rng: random.Random) -> int:
    """Kill the stage `kills` times at random moments, running on from where it stopped; then finish it.

    Where it ends before its moment, what it made is compared and the next kill finds an empty folder.
    Returns how often it ended first.
    """
    landed = ended = 0
    while landed < kills:
        process = stage.start(folder)
        while stage.moment and process.is_alive() and not stage.moment(folder):
            time.sleep(0.001)
        process.join(rng.uniform(0, stage.seconds))
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            landed += 1
            check_files(folder)
        else:
            ended += 1
            assert ended < 10 * kills + 10, "no moment of the stage could be hit"
            assert process.exitcode == stage.code, (folder / "log").read_text()
            stage.compare(folder, stage.truth)
            shutil.rmtree(folder)
    stage.finish(folder)
    return ended


NAMES = ["prepare", "extraction", "training", "checkpoint", "classifier"]


FEW = [pytest.param(name, 3 if name == "training" else 1, id=f"few-{name}") for name in NAMES]
MANY = [
    pytest.param(name, -(-KILLS // (len(NAMES) + 1)), id=f"many-{name}", marks=pytest.mark.slow)
    for name in (*NAMES, "pictures")
]


@pytest.mark.parametrize(("name", "kills"), FEW + MANY)
def test_killed_at_random_and_repeated_ends_the_same(name, kills, tmp_path, request):
    stage = request.getfixturevalue(name)
    ended = kill_at_random(stage, tmp_path / "killed", kills, random.Random(f"{SEED} {name}"))
    print(f"{name}: {kills} kills landed, {ended} times it ended first, nothing lost (seed {SEED})")


def test_a_run_killed_while_it_draws_its_last_pictures_is_finished_by_the_same_command(
    archive, tmp_path, monkeypatch
):
    class KilledError(BaseException):
        """Nothing catches it, like SIGKILL."""

    def killed(features, tiles, views, path):
        if json.loads(path.with_name("summary.json").read_text())["state"] == "finished":
            path.with_name(f"{mammo.files.UNFINISHED}{path.name}").touch()
            raise KilledError

    config = small_config(archive, "--output_dir", str(tmp_path), "--epochs", "1", *REPORTS)
    with monkeypatch.context() as patch:
        patch.setattr(byol_mammo.pictures, "draw_embedding", killed)
        with pytest.raises(KilledError):
            mammo.train(config)
    folder = mammo.train(config)
    assert (folder / "backbone.safetensors").is_file()
    assert (folder / "embedding.png").is_file()
    assert not list(folder.rglob(f"{mammo.files.UNFINISHED}*"))


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("of the last epoch")
    with pytest.raises(KeyboardInterrupt), mammo.files.atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("of half")
        assert path.read_text() == "of the last epoch"
        raise KeyboardInterrupt
    assert path.read_text() == "of the last epoch"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_moved_aside_has_no_half_of_a_file(tmp_path):
    folder = tmp_path / "tuned"
    folder.mkdir()
    for name in ("classifier_best.pth", f"{mammo.files.UNFINISHED}last.pth.0123.pth"):
        (folder / name).write_text("weights")
    mammo.files.move_aside(folder)
    assert [path.name for path in (tmp_path / "tuned_1").iterdir()] == ["classifier_best.pth"]
    assert not folder.exists()


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, by their command lines."""
    found, parents = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    level = {pid}
    while level := {child for child, parent in parents.items() if parent in level}:
        for child in level:
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def extraction_workers(pid: int) -> list[int]:
    """The extraction processes of a run: the children of its fork server."""
    below = descendants(pid)
    servers = [child for child, command in below.items() if "forkserver" in command]
    return sorted(set().union(*(descendants(server) for server in servers)) if servers else [])


def wait_until(true: Callable[[], object], seconds: float = 120) -> None:
    """Wait for something that must come."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)


def test_killed_workers_are_named_and_a_killed_run_leaves_none(tmp_path):
    data = write_images(tmp_path / "images", 24, bits=12)
    flags = arguments(data, tmp_path, "--max_steps", "1", "--num_workers", "2")
    process = stages.start("train_byol_mammo", flags, tmp_path / "log")
    wait_until(lambda: images_done(tmp_path))
    os.kill(extraction_workers(process.pid)[-1], signal.SIGKILL)
    process.join(60)
    printed = (tmp_path / "log").read_text()
    assert process.exitcode == 2, printed
    assert "an extraction process was killed at one of" in printed
    assert str(data) in printed.split("killed at one of")[1]
    assert "--num_workers" in printed
    before = images_done(tmp_path)
    assert 1 <= before < 24

    process = stages.start("train_byol_mammo", flags, tmp_path / "log")
    wait_until(lambda: images_done(tmp_path) > before)
    workers = extraction_workers(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert workers
    wait_until(lambda: not [pid for pid in workers if is_running(pid)], 20)
    assert images_done(tmp_path) < 24
    code, printed = stages.finish("train_byol_mammo", flags, tmp_path / "log")
    assert code == 0, printed
    assert not list(tmp_path.rglob(f"{mammo.files.UNFINISHED}*"))


def kill_workers_that_wait(arguments: list[str]) -> int:
    """Body of a process: of four workers that wait for work, three are killed."""
    with contextlib.suppress(BrokenProcessPool), processes.process_pool(4) as pool:
        list(pool.map(time.sleep, [0.1] * 4))
        time.sleep(0.1)
        for worker in multiprocessing.active_children()[:3]:
            os.kill(worker.pid, signal.SIGKILL)
        while True:  # until the pool knows
            pool.submit(os.getpid).result()
    return 0


def test_a_worker_killed_while_it_waits_for_work_does_not_hang_the_others(tmp_path):
    """They wait for the lock that one of them held; more than one pool, as it may be the one left."""
    for _ in range(3):
        process = stages.start(kill_workers_that_wait, [], tmp_path / "log")
        assert stages.end(process, tmp_path / "log", 60) == 0, (tmp_path / "log").read_text()


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def interrupt(stage: Stage, folder: Path, ready: Callable[[], object]) -> str:
    """Ctrl-C once the stage is at work; it must end within 5 s, those aside in which it got no CPU."""
    process = stage.start(folder)
    wait_until(lambda: ready() or not process.is_alive())
    begin, delays = time.monotonic(), [without_cpu(process.pid)]
    os.killpg(process.pid, signal.SIGINT)
    while process.exitcode is None and time.monotonic() < begin + 60:
        with contextlib.suppress(OSError):
            delays.append(without_cpu(process.pid))
        process.join(0.05)
    seconds = time.monotonic() - begin - (delays[-1] - delays[0])
    printed = (folder / "log").read_text()
    print(f"{stage.script}: ended {seconds:.1f} s after Ctrl-C")
    assert process.exitcode == (3 if stage.script == "prepare_dataset" else 130), printed
    assert "Traceback" not in printed
    assert seconds < 5
    return printed


def without_cpu(pid: int) -> float:
    """Seconds in which a process could have run but others had the CPU."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def test_ctrl_c_in_training_saves_the_state_within_five_seconds(training, tmp_path):
    folder = tmp_path / "stopped"
    shutil.copytree(training.truth / "cache", folder / "cache")
    last = folder / "runs" / "byol_slim" / "last.pth"
    printed = interrupt(training, folder, last.exists)
    assert "the same command goes on from" in printed
    assert torch.load(last)["step"] >= 1
    training.finish(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "extraction", "classifier"])
def test_ctrl_c_elsewhere_ends_within_five_seconds(name, tmp_path, request):
    stage, folder = request.getfixturevalue(name), tmp_path / "stopped"
    signs = {
        "prepare": "out/.prepare_dataset.journal.jsonl",
        "extraction": "cache/.*.building/extracted/*/records.jsonl",
        "classifier": "tuned/last.pth",
    }
    printed = interrupt(stage, folder, lambda: list(folder.glob(signs[name])))
    assert "same command" in printed
    stage.finish(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_of_a_time_limit_end_an_extraction_in_order(tmp_path, number):
    data = write_images(tmp_path / "images", 24, bits=12)
    flags = arguments(data, tmp_path / "run", "--max_steps", "1", "--num_workers", "2")
    (tmp_path / "run").mkdir()
    process = stages.start("train_byol_mammo", flags, tmp_path / "log")
    wait_until(lambda: images_done(tmp_path / "run"))
    os.kill(process.pid, number)
    os.kill(process.pid, number)  # the job's shell hands on what SLURM sends as well
    process.join(60)
    assert process.exitcode == 128 + number, (tmp_path / "log").read_text()
    assert "the same command goes on where it stopped" in (tmp_path / "log").read_text()
    assert images_done(tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_reaches_extraction_processes_and_all_end(tmp_path):
    """A terminal sends it to the whole group: parent, fork server and workers."""
    data = write_images(tmp_path / "images", 24, bits=12)
    flags = lambda folder: arguments(data, folder, "--max_steps", "1", "--num_workers", "2")  # noqa: E731
    stage = Stage("train_byol_mammo", flags, lambda *_: None, tmp_path / "none")
    printed = interrupt(stage, tmp_path / "run", lambda: images_done(tmp_path))
    assert "stopped by SIGINT; the same command goes on where it stopped" in printed
    stage.finish(tmp_path / "run")
