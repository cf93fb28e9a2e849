#!/usr/bin/env python3
"""Write what tests/gpu/run.sh measured into the table of GPUs in docs/measured.md.

    python tests/gpu/table.py OUT [--page docs/measured.md]

Every cell is computed from OUT/figures.jsonl; where that has no figure, it says so. A row for the same
card (named in its first cell, as A100) and setting is replaced, else one is added.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measured.md"
TABLE = re.compile(r"(?<=<!-- gpu -->\n).*?(?=<!-- /gpu -->)", flags=re.DOTALL)
MISSING = "not measured yet"
EPOCH, EPOCHS = 11_000, 100  # tiles of the default epoch, epochs of the default run
LONG_STEPS = 508_400  # of 32 tiles: a long run, 16 million tiles


def hours(tiles: int, found: dict[str, Any]) -> str:
    """Hours for so many tiles at the loop's speed."""
    return f"{tiles * found['seconds']['whole'] / found['batch_size'] / 3600:.1f}"


def per_second(side: str) -> Callable[[dict[str, Any]], str]:
    """A column of tiles per second."""
    return lambda found: f"{found['batch_size'] / found['seconds'][side]:.0f}"


def ratio(side: str, other: str, digits: int = 2) -> Callable[[dict[str, Any]], str]:
    """A column of one side's time over another's."""
    return lambda found: f"{found['seconds'][side] / found['seconds'][other]:.{digits}f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "bare step, tiles/s": per_second("bare"),
    "loop, tiles/s": per_second("whole"),
    "bare step / loop": ratio("bare", "whole", 3),
    "views / loop": ratio("views", "whole", 3),
    "kornia / views": ratio("kornia", "views", 1),
    "a plain lightly loop / ours": ratio("lightly", "whole"),
    "no kernel runs, share": lambda found: f"{found['profile']['gaps']:.3f}",
    "peak memory, GiB": lambda found: f"{found['peak_bytes'] / 2**30:.1f}",
    f"{EPOCHS} epochs of {EPOCH:,} tiles, h": lambda found: hours(EPOCHS * EPOCH, found),
    f"{LONG_STEPS:,} steps of 32 tiles, h": lambda found: hours(32 * LONG_STEPS, found),
}


def cell(column: Callable[[dict[str, Any]], str], found: dict[str, Any]) -> str:
    """A figure, or MISSING where the run did not get that far."""
    try:
        return column(found)
    except KeyError:
        return MISSING


def read_figures(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """What `versions` recorded, the last figures of each setting, the stages that did not end well."""
    lines = [json.loads(line) for line in (out / "figures.jsonl").read_text("utf-8").splitlines()]
    versions: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    endings = {line["name"]: line["ending"] for line in lines if line["stage"] == "ended"}
    for line in lines:
        if line["stage"] == "versions":
            versions = line
        elif line["stage"] == "training":
            name = f"{line['backbone']}, {line['view_size']} px, batch {line['batch_size']}"
            settings[name] = line
    return versions, settings, [name for name, ending in endings.items() if ending != "ok"]


def update(text: str, out: Path) -> str:
    """The page with the rows of OUT. Raises SystemExit where these are no figures of a GPU."""
    versions, settings, failed = read_figures(out)
    card = versions.get("gpu", "none")
    if card == "none" or not settings:
        raise SystemExit(f"{out}: no figures of a GPU")
    head, rule, *rows = (TABLE.search(text) or [""])[0].splitlines()
    about = f"{card}, {versions['date']}, torch {versions['torch']}"
    for setting, found in settings.items():
        figures = [cell(column, found) for column in COLUMNS.values()]
        checks = "all passed" if not failed else "failed: " + ", ".join(failed)
        cells = [about, f"{setting}, {found['precision']}", *figures, checks]
        same = [i for i, row in enumerate(rows) if is_same(row, card, setting)]
        place = slice(same[0], same[0] + 1) if same else slice(len(rows), None)
        rows[place] = [f"| {' | '.join(cells)} |"]
    return TABLE.sub(lambda _: "\n".join([head, rule, *rows]) + "\n", text)


def is_same(row: str, card: str, setting: str) -> bool:
    """Whether a row is of this card and setting."""
    _, its_card, its_setting, *_ = (part.strip() for part in row.split("|"))
    return its_card.split(",")[0] in card and its_setting.split(", ")[:3] == setting.split(", ")


def main(argv: list[str] | None = None) -> int:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    options.page.write_text(update(options.page.read_text("utf-8"), options.out), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
