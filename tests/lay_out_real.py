#!/usr/bin/env python3
"""Lay the mass films of CBIS-DDSM in a folder of real mammograms out, for study.py.

    python tests/lay_out_real.py REAL/cbis_mass OUTPUT_DIR

REAL/cbis_mass holds labels.csv (image, patient, view, laterality, malignant, density), boxes.csv (image,
xmin, ymin, xmax, ymax) and the images. Of the patients 3 of 10 are test, by a hash of their names.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_dataset as prep  # noqa: E402

COLUMNS = "image=image,study=patient,patient=patient,laterality=laterality,view=view,split=split,"
COLUMNS += "cancer=malignant,density=density,spacing=spacing_mm"
SPACING_MM = 0.27  # of the films as they are stored there


def split_of(patient: str) -> str:
    """training or test, by a hash of the name."""
    number = int(hashlib.sha256(patient.encode()).hexdigest(), 16)
    return "test" if number % 10 < 3 else "training"


def main(source: Path, output_dir: Path) -> int:
    """Write the two tables that prepare_dataset.py reads, and run it; its exit code."""
    table = pd.read_csv(source / "labels.csv", dtype=str)
    table = table.assign(split=table["patient"].map(split_of), spacing_mm=SPACING_MM)
    boxes = pd.read_csv(source / "boxes.csv").merge(table[["image", "patient"]], on="image")
    boxes = boxes.assign(
        study_id=boxes["patient"],
        image_id=boxes["image"].map(lambda name: prep.safe_name(str(Path(name).with_suffix("")))),
        finding_categories="['Mass']",
    )
    with tempfile.TemporaryDirectory() as folder:
        table.to_csv(Path(folder) / "films.csv", index=False)
        boxes.to_csv(Path(folder) / "findings.csv", index=False)
        words = ["--csv_path", f"{folder}/films.csv", "--findings_csv", f"{folder}/findings.csv"]
        words += ["--images_root", str(source), "--output_dir", str(output_dir), "--columns", COLUMNS]
        return prep.main(words)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
