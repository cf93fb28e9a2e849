"""Rewrite what is generated: the notebook's outputs, README's picture and the table of settings.

    python tests/update_docs.py            # or make docs; a minute
    python tests/update_docs.py --table    # docs/settings.md alone

The notebook runs with a phantom, never with a real image.
"""

import base64
import re
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_byol_mammo as mammo  # noqa: E402

NOTEBOOK = ROOT / "breast_segmentation_tiling.ipynb"
PICTURE = ROOT / "docs" / "overview.png"
SETTINGS = ROOT / "docs" / "settings.md"
TABLE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", flags=re.DOTALL)


def settings_table() -> str:
    """Markdown table of the main script's settings: flag, default and the constant's comment."""
    meanings = mammo.settings.setting_help(mammo.__file__)
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for field in fields(mammo.Config):
        default = f"`{field.default}`" if field.default != "" else "empty"
        meaning = meanings[field.name].replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `--{field.name}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in the project's folder and keep their outputs without progress bars."""
    place = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(notebook, timeout=600, startup_timeout=300, resources=place)
    client.record_timing = False  # no dates in the file
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """All PNG outputs in order."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return [
        base64.b64decode(out["data"]["image/png"])
        for out in outputs
        if "image/png" in out.get("data", {})
    ]


def main() -> None:
    """Rewrite the files in place."""
    mammo.files.write_atomic(SETTINGS, TABLE.sub(lambda _: settings_table(), SETTINGS.read_text()))
    if "--table" in sys.argv[1:]:
        return
    notebook = execute(nbformat.read(NOTEBOOK, as_version=4))
    mammo.files.write_atomic(NOTEBOOK, nbformat.writes(notebook) + "\n")
    PICTURE.parent.mkdir(exist_ok=True)
    with mammo.files.atomic_path(PICTURE) as temporary:
        temporary.write_bytes(pictures(notebook)[-1])


if __name__ == "__main__":
    main()
