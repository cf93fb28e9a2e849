"""Images on the workers of a Dask cluster that the user has started: many nodes, not one's cores.

Scheduler, workers and this process share an environment, this project's folder and the folders of images
and results. That is checked, not taken on trust: see Terms. Only this module imports distributed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import pickle
import queue
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_mammo import files
from byol_mammo.settings import MammoError, StoppedError

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_LIMIT = 15.0  # s that a scheduler has to answer
AHEAD = 2  # images per worker that the scheduler holds: one is worked on, one is at hand when that ends
LAST_WAIT = 15.0  # s that images under way have after a signal; SLURM kills 30 s after its SIGTERM
NOTE_AFTER = 20.0  # s without a worker after which it is said
INSTALL = "pip install 'dask[distributed]'"
ROOT = Path(__file__).resolve().parent.parent
START = (
    f"start scheduler and workers in the environment of this process, after export PYTHONPATH={ROOT}; "
    "docs/running.md shows how"
)
KILLED = object()  # the result of a job at which worker after worker ended
ONE_AT_A_TIME = threading.Lock()


def code_digest() -> str:
    """SHA-256 of the project's source files."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("byol_mammo/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# Taken at the import: a worker that was started before an update goes on with the code of before.
CODE = code_digest()


@dataclass(frozen=True)
class Terms:
    """What a worker must have in common with this process, and the script that this process runs.

    `seen` are files and their sizes, of which the first was made a moment ago in the folder of the
    results: an equal path on another disk doesn't have it.
    """

    code: str
    versions: tuple[tuple[str, str], ...]
    seen: tuple[tuple[str, int], ...]
    script: str = ""


def versions() -> tuple[tuple[str, str], ...]:
    """Name and version of the libraries that decide on pixels. The scheduler, too, imports this module,
    and has no use for them."""
    from byol_mammo import cache as caches

    return tuple(caches.library_versions().items())


@functools.lru_cache(maxsize=8)
def unfit(terms: Terms) -> str:
    """Why this process may not work for those terms, '' where it may."""
    if terms.code != CODE:
        return f"has other code ({CODE[:8]} in {ROOT}, not {terms.code[:8]}): start the workers again"
    for (name, wanted), (_, here) in zip(terms.versions, versions(), strict=True):
        if wanted != here:
            return f"has {name} {here}, not {wanted}: {START}"
    for name, size in terms.seen:
        try:
            found = Path(name).stat().st_size
        except OSError as error:
            return f"does not see {name} ({error.strerror}): images and results must lie on shared disks"
        if found != size:
            return f"sees another {name} ({found} bytes, not {size})"
    try:
        tempfile.TemporaryFile(dir=Path(terms.seen[0][0]).parent).close()
    except OSError as error:
        return f"can't write to {Path(terms.seen[0][0]).parent} ({error.strerror})"
    return ""


class Loader(pickle.Unpickler):
    """Unpickles names of one module from another: a script is `__main__` only where the user runs it."""

    def __init__(self, data: bytes, former: str, name: str) -> None:
        super().__init__(io.BytesIO(data))
        self.former, self.name = former, name

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(self.name if module == self.former else module, name)


def perform(terms: Terms, work: bytes) -> bytes:
    """Do a pickled (function, arguments) on a worker; returns the pickled result.

    One at a time in a process, however many threads it has: decoders and OpenCV's settings are not made
    for more. Raises MammoError where the process is unfit.
    """
    import cv2

    with ONE_AT_A_TIME:
        if reason := unfit(terms):
            raise MammoError(f"worker on {socket.gethostname()} {reason}")
        cv2.setNumThreads(1)  # there is a worker for each core
        function, job = Loader(work, "__main__", terms.script).load()
        return pickle.dumps(function(*job))


def scheduler_address(dask: str) -> str:
    """The address that --dask gives, or that stands in the scheduler file which it names."""
    if "://" in dask or re.fullmatch(r"[^/:]+:\d+", dask):
        return dask
    try:
        return str(json.loads(Path(dask).read_text(encoding="utf-8"))["address"])
    except OSError as error:
        reason = f"no scheduler file ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        reason = "is no scheduler file, or not yet whole"
    raise MammoError(
        f"--dask {dask}: {reason}; `dask scheduler --scheduler-file {dask}` writes one, or give the "
        "scheduler's address, tcp://host:port"
    )


@contextlib.contextmanager
def connect(dask: str) -> Iterator[Client]:
    """A client of the scheduler. Raises MammoError where none answers, or distributed isn't there."""
    try:
        import distributed
    except ImportError as error:
        raise MammoError(f"--dask needs the package distributed: {INSTALL}") from error
    address = scheduler_address(dask)
    # What goes wrong is said here, once; the traceback of each attempt to connect is not.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        await_greeting(address)
        client = distributed.Client(address, timeout=CONNECT_LIMIT, set_as_default=False)
    # On 3.10 that of asyncio is no OSError; TLS without certificates; a program that is no scheduler.
    except (OSError, asyncio.TimeoutError, ValueError, ImportError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MammoError(
            f"--dask {dask}: no Dask scheduler answers at {address} within {CONNECT_LIMIT:g} s "
            f"({reason}); {START}"
        ) from error
    with client:
        yield client


def await_greeting(address: str) -> None:
    """Raise OSError or ValueError where no scheduler answers in time.

    A Client waits for ever, whatever its timeout, for a program that takes the connection and says
    nothing, as a web server does. A scheduler speaks first, but by TLS.
    """
    from distributed.comm import get_address_host_port

    with socket.create_connection(get_address_host_port(address), timeout=CONNECT_LIMIT) as probe:
        if not address.startswith("tls://") and not probe.recv(1):
            raise ConnectionError("the connection was closed")


def count_workers(dask: str) -> int:
    """How many worker processes the cluster has. Raises MammoError where no scheduler answers."""
    with connect(dask) as client:
        return len(client.nthreads())


def results(
    dask: str,
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    folder: Path,
    inputs: Sequence[Path],
    obey: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Any]]:
    """Call `function(*job)` on the workers; yield the number of each job and its result as they end.

    Paths in jobs must be absolute. `folder`: of results, `inputs`: some files that are read; the workers
    must see both. The result is KILLED where Dask gives a job up because its workers end at it, more
    often than the scheduler's `allowed-failures`. `obey` is called twice a second; where it raises
    StoppedError, or at Ctrl-C, the images under way end first. Raises what `function` raises, and
    MammoError for unfit workers and a scheduler that is lost.
    """
    with connect(dask) as client, sign_in(folder) as sign:
        seen = tuple((str(path.absolute()), path.stat().st_size) for path in (sign, *inputs))
        terms = Terms(CODE, versions(), seen, running_script())
        check_workers(client, terms)
        run = Run(client, terms, function, jobs)
        try:
            while run.submit():
                obey()
                yield from run.ended(0.5)
        except (KeyboardInterrupt, StoppedError):
            limit = time.monotonic() + LAST_WAIT
            while run.under_way and time.monotonic() < limit:
                yield from run.ended(0.5)
            raise


@contextlib.contextmanager
def sign_in(folder: Path) -> Iterator[Path]:
    """An empty file in a folder, of a name that no other folder has it by."""
    sign = files.unfinished_name(folder / "dask")
    sign.touch()
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


def running_script() -> str:
    """The name by which workers import the script that runs here, '' where it is none of the project."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return Path(path).stem if path and Path(path).resolve().parent == ROOT else ""


def check_workers(client: Client, terms: Terms) -> None:
    """Raise MammoError where a worker is unfit; those that come later are judged at their first job."""
    threads = client.nthreads()
    if any(count > 1 for count in threads.values()):
        print(
            "note: Dask workers of several threads take one image at a time each; give every core a "
            "worker of its own: --nworkers N --nthreads 1, or processes=cores in dask-jobqueue",
            file=sys.stderr,
        )
    answers = client.run(unfit, terms, on_error="return")
    reasons = [
        f"{address} can't import the project ({answer}): {START}"
        if isinstance(answer, ImportError)
        else f"{address} {answer}"
        for address, answer in answers.items()
        if isinstance(answer, ImportError) or (isinstance(answer, str) and answer)
    ]
    if reasons:
        raise MammoError(f"{len(reasons)} of {len(answers)} Dask workers can't be used: {reasons[0]}")


class Run:
    """The jobs of `results`: some with the scheduler, the rest still here.

    A scheduler that held a million jobs would need gigabytes for them; it gets AHEAD per worker.
    """

    def __init__(
        self, client: Client, terms: Terms, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]
    ) -> None:
        self.client, self.terms, self.function = client, terms, function
        self.left = iter(enumerate(jobs))
        self.under_way: dict[Any, tuple[int, Future]] = {}
        self.done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.room, self.next_look, self.worked = 0, 0.0, time.monotonic()

    def submit(self) -> bool:
        """Give the scheduler what its workers have room for; False once all jobs have ended."""
        if time.monotonic() >= self.next_look:  # workers come and go
            self.look()
        for number, job in itertools.islice(self.left, max(0, self.room - len(self.under_way))):
            work = pickle.dumps((self.function, job))
            future = self.client.submit(perform, self.terms, work, pure=False)
            self.under_way[future.key] = number, future
            future.add_done_callback(self.done.put)
        return bool(self.under_way)

    def look(self) -> None:
        """Count the workers, and say so once where there have been none for long."""
        try:
            workers = len(self.client.nthreads())
        except (OSError, CancelledError) as error:
            raise self.lost() from error
        now = time.monotonic()
        if workers:
            self.worked = now
        elif now - self.worked > NOTE_AFTER:
            print("note: the Dask cluster has no workers; waiting for some to come", file=sys.stderr)
            self.worked = float("inf")
        self.room, self.next_look = max(1, AHEAD * workers), now + 1

    def ended(self, timeout: float) -> Iterator[tuple[int, Any]]:
        """The next job to end and its result; none where that takes longer than `timeout` s."""
        try:
            future = self.done.get(timeout=timeout)
        except queue.Empty:
            return
        number, _ = self.under_way.pop(future.key)
        yield number, self.result_of(future)

    def result_of(self, future: Future) -> Any:
        """What a job that ended has given. Raises what it raised, or MammoError."""
        import distributed

        try:
            return Loader(future.result(), self.terms.script, "__main__").load()
        except distributed.KilledWorker:
            return KILLED
        except (CancelledError, distributed.comm.CommClosedError) as error:
            raise self.lost() from error
        except (ImportError, RuntimeError) as error:
            # What the scheduler says where it can't unpickle a job, and what a worker does.
            if isinstance(error, RuntimeError) and "deserialization of the task graph" not in str(error):
                raise
            reason = error.__cause__ or error
            raise MammoError(
                f"scheduler or workers can't import the project ({reason}): {START}"
            ) from error

    def lost(self) -> MammoError:
        address = self.client.scheduler.address if self.client.scheduler else "the scheduler"
        return MammoError(
            f"the Dask scheduler at {address} was lost; what is finished is kept: start it and its "
            "workers again, and the same command goes on"
        )
