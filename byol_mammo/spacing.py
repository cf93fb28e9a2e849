"""Pixel spacing as tables and headers write it: read, and judged whether it can be a mammogram's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# mm per pixel at a detector (0.05-0.1) or in scanned film (0.04-0.2), and some more for averaged copies;
# what says more or less is a placeholder (1\1), dots per inch, or metres.
DETECTOR_SPACING = (0.02, 0.5)
TOLERANCE = 0.01  # relative difference between two spacings from which it is said

NOTHING = ("", "nan", "na", "n/a", "none", "null", "unknown")


def spacing_values(text: str) -> list[float]:
    """Row and column spacing (mm) of a table's cell, or its one number; [] where it says nothing.

    Read are 0.07, 0,07 (a decimal comma), 0.07\\0.07, [0.07, 0.07] and 0.07 x 0.07, in mm, or in um
    where that stands there. Raises ValueError for anything else, and where a comma may mean two things.
    """
    bare = text.strip().lower().strip("[]()")
    if bare in NOTHING:
        return []
    number = re.sub(r"\s*[muµμ]m\b", "", bare)
    scale = 0.001 if re.search("[uµμ]m", bare) else 1
    # A comma beside a point, or with a space behind it, stands between two numbers, else in one.
    between = r"[\\x;\s]|,\s|,$" + ("|," if "." in number else "")
    parts = [part.strip("'\"").replace(",", ".") for part in re.split(between, number) if part]
    try:
        values = [float(part) * scale for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(map(math.isfinite, values)):
        raise ValueError(f"{text[:100]!r} is no pixel spacing in mm")
    return values


def parse_spacing(text: str) -> float | None:
    """mm per pixel of a table's cell, the mean of rows and columns; None where it says nothing.

    Raises ValueError as spacing_values does.
    """
    values = spacing_values(text)
    return math.fsum(values) / len(values) if values else None


def differ(first: float, second: float) -> bool:
    """Whether two spacings are more than rounding apart."""
    return max(first, second) > (1 + TOLERANCE) * min(first, second)


def judge_spacing(values: Sequence[float]) -> tuple[float | None, str]:
    """mm per pixel, None where it can't be a mammogram's, and what is doubtful about it, '' if nothing.

    `values` (mm) are of rows and columns, or one for both.
    """
    if not values:
        return None, ""
    shown = " x ".join(f"{value:g}" for value in values)
    if not all(DETECTOR_SPACING[0] <= value <= DETECTOR_SPACING[1] for value in values):
        return None, f"{shown} mm cannot be a mammogram's: unknown"
    mean = math.fsum(values) / len(values)
    if differ(min(values), max(values)):
        return mean, f"{shown} mm: rows and columns differ, their mean {mean:.4g} is taken"
    return mean, ""
