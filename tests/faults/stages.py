"""The scripts as processes that start at once: a fork server has imported everything beforehand.

`start` gives a process that runs one script's main() in a process group of its own and writes what it
prints to a file; killing it is killing the program in the middle of its work instead of its imports.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

SCRIPTS = ("train_byol_mammo", "train_classifier", "prepare_dataset")
HEAVY = (*SCRIPTS, "matplotlib.backends.backend_agg", "sklearn.linear_model", "sklearn.model_selection")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


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


def run(script: str, arguments: list[str], output: str) -> None:
    """Body of the process: main() of a script with its output in a file."""
    preload()  # done in the server, whose imports fail in silence; the number of threads must be one
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = open(output, "a", buffering=1)  # noqa: SIM115
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    importlib.import_module("train_byol_mammo").SYNC_EVERY = 0.0  # a kill finds images on record
    sys.exit(importlib.import_module(script).main(arguments))


def start(script: str, arguments: list[str], output: Path) -> multiprocessing.Process:
    """A started process; `exitcode` is main()'s, or minus the number of the signal that ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stages"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (HERE, ROOT)))):
        forkserver.ensure_running()  # it is not told this sys.path
    process = context.Process(target=run, args=(script, list(map(str, arguments)), str(output)))
    process.start()
    return process


def finish(script: str, arguments: list[str], output: Path, timeout: float = 300) -> tuple[int, str]:
    """Run a script to its end: exit code and what it printed."""
    output.write_text("")
    process = start(script, arguments, output)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{script} did not end: {output.read_text()[-2000:]}")
    return process.exitcode, output.read_text()
