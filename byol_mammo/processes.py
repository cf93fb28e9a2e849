"""Ranks of a run, signals, pools of processes, and who may write to a folder."""

from __future__ import annotations

import datetime
import errno
import multiprocessing
import multiprocessing.util
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from byol_mammo import files
from byol_mammo.settings import MammoError, StoppedError


def this_host() -> str:
    """Host name and boot: two machines, such as containers, may share the first but not the second."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}_{boot.read_text().strip() if boot.is_file() else ''}"


STOP_SIGNALS = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a request, obeyed where that leaves all in order.

    `requested` is the number of the signal that this process received, `agreed` of the one that all
    ranks stop for (0 = none): they compare at each read of the metrics, because all must leave the loop
    at the same step. Ctrl-C twice quits at once. The other signals don't: SLURM and launchers send the
    same one to a process and to its parent, which hands it on, and SIGKILL follows anyway.
    """

    def __init__(self) -> None:
        self.requested, self.agreed = 0, 0

    def __enter__(self) -> StopSignal:
        numbers = [getattr(signal, name) for name in STOP_SIGNALS]
        self.former = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def _request(self, number: int, frame: Any) -> None:
        if number == self.requested == signal.SIGINT:
            signal.signal(number, self.former[number])
            signal.raise_signal(number)
        if number == signal.SIGINT and not self.requested:
            with suppress(OSError, ValueError, RuntimeError):  # print may be what is interrupted
                print("stopping: saving what is done; Ctrl-C again quits at once", file=sys.stderr)
        self.requested = self.requested or number

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def obey(self) -> None:
        """Raise StoppedError where a signal has come."""
        if self.requested:
            raise StoppedError(self.requested)


def run_in_parallel(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    workers: int,
    bar: tqdm,
    done: Callable[[Any], None] = lambda result: None,
    threads: bool = False,
) -> None:
    """Call `function(*job)` for each job, in at most `workers` processes or threads, and move the bar.

    `done` gets each result, here. An error or a signal drops the jobs that have not begun; those at hand
    end first, and `done` gets their results too. Raises StoppedError after a signal.
    """
    workers = max(1, min(workers, available_cores(), len(jobs)))
    with bar, StopSignal() as stop:
        if workers == 1:
            for job in jobs:
                stop.obey()
                done(function(*job))
                bar.update()
            return
        with ThreadPoolExecutor(workers) if threads else process_pool(workers) as pool:
            ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
            running: set[Future[Any]] = set()
            try:
                for job in jobs:
                    running.add(future := pool.submit(function, *job))
                    future.add_done_callback(ended.put)
                while running:
                    stop.obey()
                    with suppress(queue.Empty):  # looks at the signals twice a second
                        future = ended.get(timeout=0.5)
                        running.discard(future)
                        done(future.result())
                        bar.update()
            except BaseException:
                begun = [future for future in running if not future.cancel()]
                for future in wait(begun).done:  # none of these is lost
                    if not future.exception():
                        with suppress(OSError):
                            done(future.result())
                raise


LIBRARIES = ("cv2", "pandas", "torchvision", "lightly.loss")


@contextmanager
def process_pool(
    workers: int, modules: Sequence[str] = LIBRARIES, begin: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Processes that import `modules` once, call `begin` at their start and end with this one.

    Plain fork can hang once torch has started threads; a fork server can't.
    """
    shorten_socket_names()
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(list(modules))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, start_worker, (begin,)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            # They ignore the pool's SIGTERM, and may wait for ever for a lock that the dead one holds.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


SOCKET_NAME = 107  # bytes that the name of a Unix socket may have (man 7 unix)


def shorten_socket_names() -> None:
    """Let multiprocessing put its sockets into /tmp where names in TMPDIR are longer than a socket's.

    Raises MammoError where /tmp can't be written either.
    """
    former = tempfile.gettempdir()
    if len(os.fsencode(former)) + len("/pymp-xxxxxxxx/listener-xxxxxxxx") <= SOCKET_NAME:
        return
    tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # it stays with the folder that it makes at its first call
    except OSError as error:
        raise MammoError(
            f"TMPDIR {former} is too long for the sockets of processes, and /tmp can't be written "
            f"({error.strerror}): export TMPDIR=a shorter folder"
        ) from error
    finally:
        tempfile.tempdir = former


def start_worker(begin: Callable[[], None] | None = None) -> None:
    """Let a process of process_pool leave signals to its parent and end with it; then call `begin`.

    Ctrl-C and SLURM reach all processes of a job, but the image at hand shall be finished. A killed run
    must not leave processes behind that write into what the next one builds.
    """
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if begin:
        begin()


STEP_TIMEOUT = 60  # minutes that a process waits for the others, as at the end of an epoch
NOTE_AFTER = 20.0  # s of waiting for the other ranks to start, after which it is said


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run: the only one without torchrun or srun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0


def find_ranks() -> Ranks:
    """Read the place that torchrun, or srun with several tasks, has given this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    known = {"LOCAL_RANK": "0"} | os.environ  # a launcher of one process a node may leave it out
    if "RANK" not in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    try:
        rank, size, local_rank = (int(known[name]) for name in names)
    except (KeyError, ValueError):
        return Ranks()
    # In an interactive allocation of several tasks, a plain `python` is no task of a step.
    if "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
        return Ranks()
    return Ranks(rank, size, local_rank)


def join_ranks(ranks: Ranks, backend: str, peer_timeout: float) -> None:
    """Connect with the other ranks by nccl or gloo, within `peer_timeout` minutes.

    Raises MammoError where they can't be found or don't come.
    """
    if ranks.world_size == 1:
        return
    from torch import distributed  # here: prepare_dataset.py has no use for torch

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise MammoError(
            f"{ranks.world_size} processes but no {' and '.join(missing)}: start by torchrun or "
            "submit_byol.sh"
        )
    store = await_ranks(ranks, peer_timeout)
    limit = datetime.timedelta(minutes=STEP_TIMEOUT)
    store.set_timeout(limit)
    try:
        distributed.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=limit
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise MammoError(f"rank {ranks.rank} can't connect with the others ({reason})") from error


def await_ranks(ranks: Ranks, peer_timeout: float) -> Any:
    """The torch.distributed.Store of all ranks, once each of them has reached it. Raises MammoError.

    torch's own rendezvous waits in one piece: it says nothing and leaves Ctrl-C unanswered.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16 or not 0 <= ranks.rank < ranks.world_size:
        raise MammoError(
            f"rank {ranks.rank} of {ranks.world_size} at {host}:{port}: ranks go from 0 to "
            f"{ranks.world_size - 1}, MASTER_PORT from 1 to 65535; start by torchrun or submit_byol.sh"
        )
    begun, said, store = time.monotonic(), False, None
    while True:
        absent = ranks.world_size - 1  # as far as is known before a store answers
        try:
            if store := store or open_store(ranks, host, int(port)):
                absent = sum(not store.check([str(rank)]) for rank in range(ranks.world_size))
        except RuntimeError:  # rank 0 came and went
            store = None
        if not absent:
            return store
        waits = f"rank {ranks.rank} waits for {absent} of {ranks.world_size} ranks at {host}:{port}"
        waits += "" if store else ", where nothing answers"
        waited = time.monotonic() - begun
        if waited > 60 * peer_timeout:
            raise MammoError(
                f"{waits}, since --peer_timeout {peer_timeout:g} minutes: see the logs of the others, "
                "give more minutes, or unset RANK and WORLD_SIZE to run as one process"
            )
        if waited > NOTE_AFTER and not said:
            print(f"note: {waits}", file=sys.stderr)
            said = True
        time.sleep(0.2)


def open_store(ranks: Ranks, host: str, port: int) -> Any:
    """The store at an address, with this rank in it, or None where it doesn't answer yet.

    Rank 0 serves it, unless torchrun does. Raises MammoError where it can't.
    """
    from torch import distributed

    serves = ranks.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:  # torch would warn at length for each attempt that fails
            socket.create_connection((host, port), timeout=1).close()
        short = datetime.timedelta(seconds=5)
        store = distributed.TCPStore(
            host, port, ranks.world_size, serves, short, wait_for_workers=False, multi_tenant=True
        )
    except (OSError, RuntimeError) as error:
        if not serves:
            return None
        reason = " ".join(str(error).split())[:200]
        raise MammoError(
            f"rank 0 can't serve the others at {host}:{port} ({reason}); give MASTER_ADDR this "
            "machine's name and MASTER_PORT a free port"
        ) from error
    # Each start of torchrun's has names of its own in the store, which outlives them.
    own = distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    own.set(str(ranks.rank), "")
    return own


def available_cores() -> int:
    """Cores that this process may use (SLURM and cpusets give fewer than the node has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def this_job() -> str:
    """What SLURM's requeues and torchrun's restarts of a job have in common."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name, "none") != "none":  # as torchrun says without --rdzv_id
            return os.environ[name]
    return f"{socket.gethostname()} {os.getppid()}"  # torchrun, which stays the same process


def is_restarted() -> bool:
    """Whether SLURM or torchrun starts this job again, with the flags of its first start."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


# What a lock raises on a file system that has none, as some mounts of Lustre, NFS and FUSE have.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def take_lock(path: Path, timeout: float = -1) -> AbstractContextManager[Any] | None:
    """A lock that is held until the context ends, or None on a file system without locks.

    Raises filelock.Timeout where another process holds it for `timeout` s; -1 waits for ever.
    """
    try:
        # No soft lock instead: where a process is killed, its file keeps others away for ever.
        return FileLock(path, fallback_to_soft=False).acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


@contextmanager
def exclusive_run_folder(folder: Path, resume: bool) -> Iterator[None]:
    """Make the run's folder and hold it: two runs that write to one would mix their results.

    A run that is not to be resumed, or can't be for want of last.pth, is moved aside first; a job that
    is started again goes on with the run that it began, --no_resume or not. Raises MammoError where
    another run holds the folder.
    """
    mark = folder / ".job"
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # a folder that can't be written is known by now
    try:
        lock = take_lock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    except Timeout as error:
        raise MammoError(f"another run is writing to {folder}; give --run_name NAME") from error
    except OSError:
        lock = None  # the folder of all runs can't be written, this one can
    with lock or nullcontext():
        own = is_restarted() and mark.is_file() and mark.read_text(encoding="utf-8") == this_job()
        left = not (folder / "last.pth").is_file() and any(folder.glob("mammogram_byol_*.pth"))
        if left or not (resume or own or all(path == mark for path in folder.iterdir())):
            files.move_aside(folder)
            folder.mkdir()
        if not resume:
            files.write_atomic(mark, this_job())
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
