"""The wheel: what it holds, the three commands that it gives, and what tells which code ran."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from conftest import ROOT, SMALL, SOURCES, write_images
from packaging.requirements import Requirement

import train_byol_mammo as mammo
from byol_mammo import device, settings

COMMANDS = {command: script.removesuffix(".py") for script, command in settings.INSTALLED.items()}


@functools.cache
def ours():
    """Names of the project's modules at the top of the tree, and of the package."""
    return {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES}


@functools.cache
def imported_by(module):
    """Own modules that a script imports, in functions too, and itself."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        paths = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else (ROOT / name).glob("*.py")
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                waiting += {name.split(".")[0] for name in names} & ours()
    return found


def test_what_the_commands_import_is_packed():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    packed = project["tool"]["setuptools"]
    assert project["project"]["scripts"] == {name: f"{code}:main" for name, code in COMMANDS.items()}
    needed = set.union(*map(imported_by, COMMANDS.values()))
    assert needed == {*packed["packages"], *packed["py-modules"]}
    assert "mammogram_dicom" in needed
    # All of the package is in it: there are no folders below, and no files but code.
    files = subprocess.run(
        ["git", "ls-files", "byol_mammo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(re.fullmatch(r"byol_mammo/\w+\.py", name) for name in files)


def test_what_comes_next_is_named_as_this_was_started(monkeypatch):
    for start, named in {
        "/x/bin/byol-mammo-prepare": "byol-mammo-train",
        "prepare_dataset.py": "",
    }.items():
        monkeypatch.setattr(sys, "argv", [start])
        assert settings.command_of("train_byol_mammo.py") == (named or "python train_byol_mammo.py")


class Installed:
    """A distribution whose files lie in `folder`."""

    version = "9.8.7"

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, name):
        return self.folder / name


def test_the_commit_is_that_of_this_code_or_none(tmp_path, monkeypatch):
    """Not of the working tree that an environment happens to lie in."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    file = tmp_path / "site-packages" / "byol_mammo" / "device.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    (tmp_path / "other.txt").write_text("")
    for words in (["init", "-q"], ["add", "other.txt"], ["commit", "-qm", "other"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(device, "__file__", str(file))
    folder = tmp_path / "elsewhere"
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed(folder))
    assert device.git_commit() == "unknown"  # what is installed is another copy
    folder = tmp_path / "site-packages"
    assert device.git_commit() == "v9.8.7"
    for words in (["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert device.git_commit() == head.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel of the files that git knows is installed, alone."""
    folder = tmp_path_factory.mktemp("installed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    python = [sys.executable, "-m"]
    build = [
        *python,
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    flags = ["--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([*python, "pip", "install", "-q", *flags], check=True)
    return folder / "site"


def start(installed, folder, name, *words):
    """A command of the wheel, with nothing of this tree to be found; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [str(installed / "bin" / name)] if name != "python" else [sys.executable]
    done = subprocess.run(
        [*command, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_works_alone(installed, tmp_path):
    for name in COMMANDS:
        assert "--dry_run" in start(installed, tmp_path, name, "--help")
    write_images(tmp_path / "raw")
    words = "--csv_path none --images_root raw --output_dir split".split()
    said = start(installed, tmp_path, "byol-mammo-prepare", *words)
    assert "Next: byol-mammo-train --data_dir split/training" in said
    data = ["--data_dir", "split/training", "--extract_only", "--num_workers", "2"]
    small = [word if word != "slim" else "resnet18" for word in SMALL]
    start(installed, tmp_path, "byol-mammo-train", *small, *data)
    (cache,) = tmp_path.glob("cache/*/cache.json")
    made = json.loads(cache.read_text())
    assert made["finished"]
    assert made["inputs"]["code"] == settings.code_version(mammo.PIXEL_CODE)
    code = "import train_byol_mammo as m; print(m.__file__, m.devices.git_commit(), "
    code += "m.settings.code_version(m.TRAINING_CODE))"
    file, commit, training = start(installed, tmp_path, "python", "-c", code).split()
    assert file.startswith(str(installed))
    assert commit == "v0.1.0"
    assert training == settings.code_version(mammo.TRAINING_CODE)


@pytest.mark.slow
def test_the_wheel_asks_for_what_requirements_txt_asks_for(installed):
    (package,) = metadata.distributions(path=[str(installed)])
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [Requirement(line.partition("#")[0]) for line in lines if not line.startswith("#")]
    asked = map(Requirement, package.requires)
    assert {need for need in asked if "extra" not in str(need.marker)} == {*listed}
