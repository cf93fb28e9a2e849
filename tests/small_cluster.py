"""A Dask cluster of processes that have imported everything, see stages.py, and jobs for it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import stages


def scheduler(arguments: list[str]) -> int:
    """`dask scheduler`."""
    from distributed.cli.dask_scheduler import main

    main(arguments, standalone_mode=False)
    return 0


def worker(arguments: list[str]) -> int:
    """`dask worker`."""
    from distributed.cli.dask_worker import main

    main(arguments, standalone_mode=False)
    return 0


class Cluster:
    """A scheduler and its workers, which `dask` finds: the file that --dask names."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dask = folder, folder / "scheduler.json"
        words = ["--scheduler-file", self.dask, "--port", "0"]
        self.scheduler = self.start(scheduler, *words, name="scheduler")
        self.workers: list[stages.multiprocessing.Process] = []

    def start(self, main, *words, name):
        options = ["--host", "127.0.0.1", "--no-dashboard", *words]
        return stages.start(main, options, self.folder / f"{name}.log")

    def add_workers(self, count: int, threads: int = 1) -> None:
        """Start workers and wait for them."""
        import distributed

        for _ in range(count):
            name = f"worker{len(self.workers)}"
            words = ["--scheduler-file", self.dask, "--nthreads", threads, "--no-nanny"]
            words += ["--memory-limit", "0", "--name", name, "--local-directory", self.folder / name]
            self.workers.append(self.start(worker, *words, name=name))
        with distributed.Client(scheduler_file=str(self.dask), timeout=180) as client:
            client.wait_for_workers(sum(one.is_alive() for one in self.workers), timeout=180)

    def kill_worker(self, number: int) -> None:
        self.workers[number].kill()
        self.workers[number].join()


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A cluster of two workers, one of them with two threads."""
    cluster = Cluster(folder)
    try:
        cluster.add_workers(1)
        cluster.add_workers(1, threads=2)
        yield cluster
    finally:
        for process in (*cluster.workers, cluster.scheduler):
            process.kill()
            process.join()


def double(number: int) -> int:
    """A job; that of number 3 ends its worker."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def die_at_third(index: int, path: str, *, folder: str) -> dict[str, object]:
    """An extraction of images without pixels; that of number 3 ends its worker."""
    return {"index": index, "error": str(double(index))}


def extract_and_die(arguments: list[str]) -> int:
    """The main script, killed once two images are on record."""
    import train_byol_mammo as mammo
    from byol_mammo import extraction

    add, added = extraction.Journal.add, []

    def add_two(journal, record):
        add(journal, record)
        added.append(record)
        if len(added) == 2:
            journal.close()
            os.kill(os.getpid(), signal.SIGKILL)

    extraction.Journal.add = add_two
    return mammo.main(arguments)
