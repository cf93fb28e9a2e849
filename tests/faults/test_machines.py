"""File systems without locks, colleagues' caches, long TMPDIR, ranks that don't come."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import stages
from conftest import ROOT, assert_same_cache, small_config

import train_byol_mammo as mammo
from byol_mammo import processes, settings

# Locks --------------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def lockless(request, archive, tmp_path, monkeypatch):
    """The shared archive's images on a file system that has no locks: the Config of a run on them."""

    def refuse(handle, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", refuse)
    shutil.copytree(archive / "images", tmp_path / "images")
    return small_config(tmp_path)


def test_without_locks_the_first_of_two_builders_to_end_gives_the_cache(
    lockless, archive, tmp_path, monkeypatch, capsys
):
    extract, calls = mammo.extract_image, []

    def overtaken(*job):
        calls.append(job)
        if len(calls) == 2:  # one image is on record by then, or about to be
            mammo.build_cache(lockless)
        return extract(*job)

    monkeypatch.setattr(mammo, "extract_image", overtaken)
    monkeypatch.setattr("byol_mammo.extraction.SYNC_EVERY", 0.0)
    cache = mammo.build_cache(lockless)
    printed = capsys.readouterr().err
    assert printed.count("without locks") == 2
    assert "another process was the first to finish" in printed
    assert_same_cache(cache, mammo.build_cache(small_config(archive)))
    assert mammo.open_tiles(cache, 4).reduce == 4
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [cache.name]
    with processes.exclusive_run_folder(lockless.run_dir, resume=True):
        assert lockless.run_dir.is_dir()


@pytest.mark.parametrize("lockless", [errno.ENOLCK], indirect=True)
def test_without_locks_one_rank_of_a_node_builds(lockless, monkeypatch):
    calls = []
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def first_of_node(seconds):
        calls.append(seconds)
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "0")
            mammo.build_cache(lockless)

    monkeypatch.setattr("byol_mammo.cache.time.sleep", first_of_node)
    assert mammo.caches.is_finished(mammo.build_cache(lockless))
    assert len(calls) == 1


# A colleague's cache ------------------------------------------------------------------------------


@pytest.fixture
def shared(archive):
    """A folder that every user may enter, with the archive's images and cache in it."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    shutil.copytree(archive, folder / "of")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in folder.glob("of/cache/*/pixels_reduced*"):
        path.unlink()
    yield folder / "of"
    shutil.rmtree(folder)


def open_as_stranger(words):
    """Body of a process of another user: open the tiles of a cache, averaged."""
    if os.getuid() == 0:  # whom no permission binds
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    def job():
        config = small_config(Path(words[0]))
        with processes.exclusive_run_folder(Path(words[1]) / "run", resume=True):
            tiles = mammo.open_tiles(mammo.build_cache(config), 4)
        print("mean", tiles.pixels.float().mean().item())

    return settings.exit_code(job, "")


COPY = "its averaged copy"
COLLEAGUES = {  # mode of the folder of caches, of the cache, of its pixels; exit code; what is said
    "cache not writable": (0o777, 0o755, 0o644, 0, f"{COPY} is "),
    "neither writable": (0o755, 0o755, 0o644, 0, f"{COPY} goes to a temporary file"),
    "pixels not readable": (0o777, 0o755, 0o600, 2, "chmod -R a+rX"),
    "cache not readable": (0o777, 0o700, 0o644, 2, "chmod -R a+rX"),
    "no such cache": (0o755, None, 0o644, 2, "give a --cache_dir of your own"),
}


@pytest.mark.parametrize("name", sorted(COLLEAGUES))
def test_a_colleagues_cache_is_trained_from_or_the_remedy_is_named(shared, name):
    above, mode, pixels, expected, message = COLLEAGUES[name]
    cache = mammo.build_cache(small_config(shared))
    truth = mammo.open_tiles(cache, 4).pixels.float().mean().item()
    for path in cache.glob("pixels_reduced*"):
        path.unlink()
    (cache / "pixels.npy").chmod(pixels)
    cache.chmod(mode) if mode else shutil.rmtree(cache)
    cache.parent.chmod(above)
    own = shared.parent / "own"
    own.mkdir()
    own.chmod(0o777)
    before = set(cache.parent.rglob("*"))
    log = shared.parent / "log"
    log.touch()
    code = stages.end(stages.start(open_as_stranger, [shared, own], log), log)
    printed = log.read_text()
    assert (code, message in printed) == (expected, True), printed
    assert "Traceback" not in printed
    assert not (own / "run").exists()
    new = {path.name for path in set(cache.parent.rglob("*")) - before} - {f".{cache.name}.reduced"}
    assert {Path(name).suffix for name in new} <= ({".npy", ".lock"} if "is " in message else set())
    if code == 0:
        np.testing.assert_allclose(float(printed.rsplit("mean ")[-1]), truth, rtol=1e-6)


# Sockets ------------------------------------------------------------------------------------------


def test_processes_start_where_the_name_of_tmpdir_is_too_long_for_a_socket(tmp_path):
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    code = (
        "from byol_mammo.processes import process_pool\n"
        "with process_pool(1, modules=()) as pool: print(list(pool.map(abs, [-1, -2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(long)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 2]\n", "")


def test_a_long_tmpdir_without_another_is_named(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/{'x' * 100}")
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", full)
    with pytest.raises(mammo.MammoError, match=r"TMPDIR .*xxx is too long .* export TMPDIR="):
        processes.shorten_socket_names()


# Ranks --------------------------------------------------------------------------------------------


@pytest.fixture
def port(monkeypatch):
    """A free port, which is MASTER_PORT of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


@pytest.mark.parametrize(("rank", "where"), [(0, ""), (2, ", where nothing answers")])
def test_ranks_that_do_not_come_are_counted_and_given_up(port, monkeypatch, capsys, rank, where):
    monkeypatch.setattr(processes, "NOTE_AFTER", 0.1)
    waits = f"rank {rank} waits for 2 of 3 ranks at 127.0.0.1:{port}{where}"
    with pytest.raises(mammo.MammoError, match=f"{waits}.*--peer_timeout 0.01 minutes.*unset RANK"):
        processes.join_ranks(processes.Ranks(rank, 3, rank), "gloo", 0.01)
    assert capsys.readouterr().err == f"note: {waits}\n"


@pytest.mark.parametrize(
    ("changed", "rank", "message"),
    [
        ({"MASTER_PORT": "many"}, 0, "MASTER_PORT from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, 0, "MASTER_PORT from 1 to 65535"),
        ({}, 3, "ranks go from 0 to 1"),
        ({"MASTER_PORT": "taken"}, 0, "can't serve the others.*a free port"),
    ],
)
def test_addresses_that_cannot_be_are_refused(port, monkeypatch, changed, rank, message):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        for name, value in changed.items():
            value = value.replace("taken", str(taken.getsockname()[1]))
            monkeypatch.setenv(name, value)
        with pytest.raises(mammo.MammoError, match=message):
            processes.join_ranks(processes.Ranks(rank, 2, rank), "gloo", 0.01)


def wait_alone(words):
    """Body of a process that waits for another rank."""
    processes.NOTE_AFTER = 0.0
    return settings.exit_code(lambda: processes.join_ranks(processes.Ranks(0, 2, 0), "gloo", 5), "")


def test_ctrl_c_is_answered_while_ranks_are_waited_for(port, tmp_path):
    log = tmp_path / "log"
    log.touch()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = stages.start(wait_alone, [], log, environment=address)
    until = time.monotonic() + 60
    while "waits for 1 of 2" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert stages.end(process, log, 5) == 128 + signal.SIGINT, log.read_text()
    assert "interrupted" in log.read_text()
