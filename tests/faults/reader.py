"""Child process of the fuzzer: reads the files named on stdin, answers with a line of JSON for each.

Both scripts read every file as in a run: train_byol_mammo.py up to its tiles, prepare_dataset.py up to
the PNG that it writes. An answer gives what came of it, the CPU time and the peak of the memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

import mammogram_dicom  # noqa: E402, F401 - here, so that its memory is no file's
import prepare_dataset as prep  # noqa: E402
import train_byol_mammo as mammo  # noqa: E402

CONFIG = mammo.Config(tile_size=64, tile_stride=32, min_freq_energy=0)


def read_as_main(path: Path) -> str:
    """'kept', or 'skipped: reason'; 'not listed' for what the script doesn't take for an image."""
    if path.suffix.lower() not in mammo.images.IMAGE_SUFFIXES:
        return "not listed"
    try:
        record, pixels = mammo.extract_image(str(path), 0.3, CONFIG)
        image = mammo.read_mammogram(path)
    except mammo.ImageReadError as error:
        return f"skipped: {error.reason}" if error.reason else "FAILED: no reason"
    assert image.ndim == pixels.ndim == 2
    assert image.dtype in (np.uint8, np.uint16)
    assert np.isfinite(record["window"]).all()
    json.dumps(record)  # as it is stored
    return "kept"


def read_as_prepare(path: Path, out: Path) -> str:
    """'kept' with a PNG that can be read again, or 'skipped: reason'; leaves no file."""
    options = prep.Options([Path("none")], path.parent, out)
    (out / "training").mkdir(parents=True, exist_ok=True)
    row = {"source": path.name, "file": "training/a.png", "laterality": ""}
    try:
        item = prep.inspect(row, options, ours=True)
        outcome = prep.decode_item(item, options, write=True)
        if isinstance(outcome, prep.SkipImageError):
            raise outcome
        output = path if item.kind == ".png" else item.output
        height, width, _ = prep.read_png_header(output)
    except prep.SkipImageError as reason:
        return f"skipped: {reason}" if str(reason) else "FAILED: no reason"
    pixels = cv2.imdecode(np.fromfile(output, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels.shape[:2] == (height, width)
    item.output.unlink(missing_ok=True)
    return "kept"


def peak_megabytes() -> int:
    """The largest resident memory since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def answer(path: Path, out: Path) -> dict:
    """Read one file by both scripts."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    begin = time.process_time()
    found = {}
    for script, read in (("main", read_as_main), ("prepare", lambda path: read_as_prepare(path, out))):
        before = time.process_time()
        try:
            found[script] = read(path)
        except Exception as error:  # what a run would die of
            found[script] = f"FAILED: {type(error).__name__}: {error}"
        found[f"{script}_seconds"] = time.process_time() - before
    return {**found, "seconds": time.process_time() - begin, "megabytes": peak_megabytes()}


def main() -> None:
    """Answer until stdin ends."""
    cv2.setNumThreads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = Path(sys.argv[1])
    answers = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(Path(json.loads(line)), out)), file=answers, flush=True)


if __name__ == "__main__":
    main()
