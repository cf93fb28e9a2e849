"""The notebook: it defines nothing, runs with a phantom and with real images, and stays small."""

import ast
import os
import re

import cv2
import nbformat
import numpy as np
import pytest
from update_docs import NOTEBOOK, PICTURE, execute, pictures

import train_byol_mammo as mammo

FIGURES = 6


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_image(notebook, path):
    """The notebook as a user would change it: its one variable set to `path`."""
    first = code_cells(notebook)[0]
    assert first.source.startswith("IMAGE = None")
    first.source = first.source.replace("IMAGE = None", f"IMAGE = {str(path)!r}", 1)
    return notebook


def texts(notebook):
    return "".join(out.get("text", "") for cell in code_cells(notebook) for out in cell.outputs)


def numbers(notebook):
    return [float(number) for number in re.findall(r"[\d.]+", texts(notebook))]


def seen_from_afar(png):
    """A picture as 96 x 64 grey values: a font may change, axes may not."""
    grey = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    return cv2.resize(grey, (96, 64), interpolation=cv2.INTER_AREA).astype(float)


def test_it_is_short_and_defines_no_algorithm(notebook):
    assert len(notebook.cells) <= 10
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)), cell.source
            if isinstance(node, ast.Import):
                assert node.names[0].name.split(".")[0] in {
                    "dataclasses", "matplotlib", "numpy", "synthetic_mammograms", "tempfile",
                    "train_byol_mammo",
                }  # fmt: skip


def test_it_names_all_that_decides_about_a_tile(notebook):
    """Also what spares a tile a criterion."""
    told = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not [column for column in mammo.SCORES if f"`{column}`" not in told]


def test_committed_outputs_are_the_phantoms_and_small(notebook):
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert code_cells(notebook)[0].source.startswith("IMAGE = None")
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, 8))
    assert len(pictures(notebook)) == FIGURES
    assert "with the phantom's own mask" in texts(notebook)  # printed for a phantom alone


def test_the_readmes_picture_is_the_notebooks_last(notebook):
    assert PICTURE.read_bytes() == pictures(notebook)[-1]
    assert PICTURE.stat().st_size < 400_000


def test_it_runs_with_the_phantom_and_shows_the_same(notebook):
    """After a change of the algorithms or pictures: `make docs`, and look at them."""
    committed, shown = numbers(notebook), pictures(notebook)
    done = execute(notebook)
    assert len(pictures(done)) == FIGURES
    # Masks and counts may differ a little between versions of OpenCV.
    assert numbers(done) == pytest.approx(committed, rel=0.05, abs=2)
    for old, new in zip(shown, pictures(done), strict=True):  # lost axes differ by 30 to 70
        assert np.abs(seen_from_afar(new) - seen_from_afar(old)).mean() < 10


@pytest.mark.parametrize(
    "name", ["nyu16bit/1_L_CC.png", pytest.param("cdd_cesm/IM0010.png", marks=pytest.mark.slow)]
)
def test_it_runs_with_a_real_image_and_does_not_name_it(notebook, real, name):
    if not (real / name).is_file():
        pytest.skip(f"no {name}")
    done = execute(with_image(notebook, real / name))
    assert len(pictures(done)) == FIGURES
    assert os.path.basename(name) not in str([cell.outputs for cell in code_cells(done)])
    assert "phantom" not in texts(done)
