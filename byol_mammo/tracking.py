"""Progress, metrics.csv, wandb, and losses that are no numbers."""

from __future__ import annotations

import io
import math
import netrc
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from byol_mammo import files
from byol_mammo.settings import MammoError

LINE_EVERY = 60.0  # s between lines of progress in a log file
BAR = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {unit}s, {remaining} left{postfix}"


class LogLines(tqdm):
    """Progress in whole lines, every LINE_EVERY seconds and at the end: log files have no cursor."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.shown = time.monotonic()
        text = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"
        super().__init__(*args, **(options | {"bar_format": text}))

    def refresh(self, *args: Any, **options: Any) -> None:
        """Print a line where one is due."""
        if not self.disable and time.monotonic() - self.shown >= LINE_EVERY:
            self.shown = time.monotonic()
            self.display()

    def display(self, *args: Any, **options: Any) -> None:
        """Print the present state as a line."""
        print(self, file=self.fp, flush=True)

    def clear(self, *args: Any, **options: Any) -> None:
        """Leave what was printed."""

    def close(self) -> None:
        """Print the last line."""
        if not self.disable:
            self.display()
            self.delay = math.inf  # tqdm's own last line is not wanted
        super().close()


def progress(items: Any = None, mode: str = "auto", **options: Any) -> tqdm:
    """Show how far a loop is, as --progress says: a bar, whole lines, or nothing."""
    if mode == "none":
        options["disable"] = True
    if mode == "lines" or (mode == "auto" and not sys.stderr.isatty()):
        return LogLines(items, **options)
    return tqdm(items, mininterval=0.2, dynamic_ncols=True, bar_format=BAR, **options)


class MetricsFile:
    """metrics.csv, one row every LOG_EVERY steps. A resumed run drops rows of steps it repeats, and on
    another number of processes counts the others anew by their epoch."""

    def __init__(
        self, path: Path, columns: list[str], step: int, steps_per_epoch: int, enabled: bool = True
    ) -> None:
        self.path, self.columns, self.enabled = path, columns, enabled
        if not enabled:
            return
        kept = pd.DataFrame(columns=columns)
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.is_file() else ""
        if whole and step:  # without the last row, which a full disk cuts
            kept = pd.read_csv(io.StringIO(whole)).reindex(columns=columns)
            counted = (kept["epoch"] * steps_per_epoch).fillna(kept["step"])
            kept = kept.assign(step=counted.round().astype(int))
            kept = kept[kept["step"] <= step]
        files.write_atomic(path, kept.to_csv(index=False))

    def write(self, row: dict[str, float]) -> None:
        """Append one row; absent metrics stay empty."""
        if not self.enabled:
            return
        with files.name_file_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            digits = {"step": 12, "epoch": 12}  # a resumption counts by them
            cells = [f"{row[k]:.{digits.get(k, 6)}g}" if k in row else "" for k in self.columns]
            file.write(",".join(cells) + "\n")


class Tracker:
    """wandb in a thread of its own: training never waits for it, and its errors stay there.

    `auto` is online only where a login is found, otherwise offline; nothing leaves the machine unless
    asked. wandb is imported at the first row, so that it delays no first step, and never if disabled.
    """

    def __init__(
        self,
        run_id: str,
        folder: Path,
        mode: str,
        project: str,
        settings: dict[str, Any],
        enabled: bool = True,
    ) -> None:
        """`mode` as in WANDB_MODE; `settings` are recorded with the run, which has its folder's name."""
        self.items: queue.Queue[tuple[dict[str, Any], bool] | None] = queue.Queue()
        self.run_id, self.folder, self.mode = run_id, folder, wandb_mode(mode)
        self.project, self.settings = project, settings
        self.enabled = enabled and self.mode != "disabled"
        self.thread = threading.Thread(target=self._work, daemon=True)

    def log(self, row: dict[str, Any], summary: bool = False) -> None:
        """Queue metrics, a Path being sent as an image; with `summary` for the run as a whole."""
        if not self.enabled:
            return
        if self.thread.ident is None:
            self.thread.start()
        self.items.put((row, summary))

    def finish(self, timeout: float = 30) -> None:
        """Let the thread write what is queued, for at most `timeout` seconds; say how to upload it."""
        if self.thread.ident is None:
            return
        self.items.put(None)
        self.thread.join(timeout)
        if self.enabled and self.mode == "offline":
            runs = shlex.quote(str(self.folder / "wandb")) + f"/offline-run-*-{self.run_id}"
            print(f"tracking  wandb was offline; to upload this run: wandb sync {runs}", flush=True)

    def _work(self) -> None:
        # Otherwise wandb's own telemetry calls its makers, even offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            for text in map(str, (self.folder.absolute(), *self.settings.values())):
                if not files.is_text(text):  # wandb prints a page about them, and stops
                    raise ValueError(f"it takes no name that is not UTF-8, as {text}")
            import wandb

            run = wandb.init(
                project=self.project,
                name=self.folder.name,
                id=self.run_id,
                resume="allow",
                mode=self.mode,  # type: ignore[arg-type]
                dir=str(self.folder),
                config=self.settings,
                settings=wandb.Settings(console="off", silent=True),
            )
            while (item := self.items.get()) is not None:
                row, summary = item
                if summary:
                    run.summary.update(row)
                    continue
                pictures = {k: wandb.Image(str(v)) for k, v in row.items() if isinstance(v, Path)}
                run.log({**row, **pictures}, step=row.get("step"))
            run.finish()
        except Exception as error:  # tracking must never end a run
            self.enabled = False
            print(f"note: wandb stopped ({type(error).__name__}: {error})", file=sys.stderr)


def wandb_mode(mode: str) -> str:
    """Resolve --wandb_mode auto without touching the network."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        login = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        login = None
    return "online" if os.environ.get("WANDB_API_KEY") or login else "offline"


def describe_row(row: dict[str, float], monitor: dict[str, float]) -> str:
    """What the progress bar says, the most telling first: a narrow terminal cuts the end."""
    rank = f" RankMe {monitor['rankme']:.1f}" if monitor else ""
    momentum = f" momentum {row['momentum']:.5f}" if "momentum" in row else ""
    return (
        f"loss {row['loss']:.4f} std {row['feature_std']:.3f}{rank} {row['tiles_per_s']:.1f} tiles/s "
        f"lr {row['lr']:.2e}{momentum}"
    )


def check_finite(
    step: int,
    means: dict[str, float],
    pending: Sequence[Mapping[str, Any]],
    recent: list[np.ndarray],
    state_is_finite: bool,
) -> None:
    """Raise MammoError, naming the tiles, where a loss or a weight about to be saved is not a number.

    `pending` and `recent`: metrics and tiles of the steps since the last look, the last of them `step`.
    If all losses are finite but a weight is not, the last step did it: an earlier bad weight would have
    made a later loss NaN.
    """
    what, index = "loss", len(recent) - 1
    if not all(map(math.isfinite, means.values())):
        sound = [all(math.isfinite(float(value)) for value in row.values()) for row in pending]
        index = sound.index(False) if False in sound else index  # else it was another process's
    elif not state_is_finite:
        what = "network's state"
    else:
        return
    step += index + 1 - len(recent)
    raise MammoError(
        f"the {what} is not a number at step {step} (rows of tiles.csv: {recent[index].tolist()}); "
        "lower --lr or use --precision fp32, then start again: the run resumes from last.pth, which is "
        "from before it"
    )
