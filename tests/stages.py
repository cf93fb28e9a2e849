"""The scripts as processes that start at once: a fork server has imported everything beforehand.

`start` gives a process that runs one script's main() in a process group of its own and writes what it
prints to files; killing it is killing the program in the middle of its work instead of its imports, and
a start costs no seconds of them. `run_script` of conftest.py starts a script as a user does.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

SCRIPTS = ("train_byol_mammo", "train_classifier", "prepare_dataset")
HEAVY = (
    *SCRIPTS, "mammogram_dicom", "matplotlib.backends.backend_agg", "matplotlib.figure",
    "sklearn.linear_model",
    "sklearn.model_selection", "small_network",
)  # fmt: skip
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def preload() -> None:
    """Import in the server what the scripts import late, so that no moment is lost there."""
    for name in HEAVY:
        importlib.import_module(name)
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


if multiprocessing.current_process().name == "MainProcess" and "pytest" not in sys.modules:
    preload()  # here the server imports this module


def run(
    script: str | Callable[[list[str]], int],
    arguments: list[str],
    outputs: tuple[str, str],
    environment: Mapping[str, str],
    folder: str,
) -> None:
    """Body of the process: main() of a script, or a function, with stdout and stderr in files."""
    preload()  # done in the server, whose imports fail in silence; the number of threads must be one
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(outputs, 1):
        with open(name, "a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    module = importlib.import_module("byol_mammo.extraction")
    assert hasattr(module, "SYNC_EVERY")
    module.SYNC_EVERY = 0.0  # a kill finds images on record
    main = importlib.import_module(script).main if isinstance(script, str) else script
    sys.exit(main(arguments))


def serve() -> multiprocessing.context.ForkServerContext:
    """Have the server run; only where it has not run for an extraction before does it import all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stages"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (HERE, ROOT)))):
        forkserver.ensure_running()  # it is not told this sys.path
    return context


def start(
    script: str | Callable[[list[str]], int],
    arguments: Sequence[object],
    output: Path,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> multiprocessing.Process:
    """A started process; `exitcode` is main()'s, or minus the number of the signal that ended it."""
    context = serve()
    outputs = (str(output), str(errors or output))
    words = (script, list(map(str, arguments)), outputs, dict(environment or {}), str(folder))
    process = context.Process(target=run, args=words)
    process.start()
    return process


def end(process: multiprocessing.Process, output: Path, timeout: float = 300) -> int:
    """Wait for a process and return its exit code; one that does not end is killed, an error."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"the process did not end: {output.read_text()[-2000:]}")
    return process.exitcode


def finish(
    script: str, arguments: Sequence[object], output: Path, timeout: float = 300
) -> tuple[int, str]:
    """Run a script to its end: exit code and what it printed."""
    output.write_text("")
    code = end(start(script, arguments, output), output, timeout)
    return code, output.read_text()


def complete(
    script: str, arguments: Sequence[object], folder: Path, timeout: float = 300, **options: object
) -> subprocess.CompletedProcess[str]:
    """As finish, what it printed to stdout and to stderr apart; `folder` gets the two files."""
    files = folder / ".stdout", folder / ".stderr"
    for file in files:
        file.write_text("")
    code = end(start(script, arguments, *files, **options), files[1], timeout)
    out, errors = (file.read_bytes().decode() for file in files)  # "\r" stays
    return subprocess.CompletedProcess([script, *map(str, arguments)], code, out, errors)
