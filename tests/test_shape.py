"""The form of the code: contents, settings, short functions, imports one way, guards that are there."""

import ast
import dataclasses
import graphlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SOURCES

import train_byol_mammo as mammo
import train_classifier as classifier

sys.path.insert(0, str(ROOT / "tests" / "faults"))

import remove_guards

TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
WITH_CONTENTS = [path for path in SOURCES if "\nContents\n" in (ast.get_docstring(TREES[path]) or "")]
SETTINGS = pytest.mark.parametrize(
    ("module", "settings"), [(mammo, mammo.Config), (classifier, classifier.Settings)]
)


LATE_LEAVES = [f"byol_mammo.{name}" for name in "cluster extraction labels lars pictures report".split()]


def test_the_scripts_have_contents():
    names = {path.name for path in WITH_CONTENTS}
    assert names >= {
        "train_byol_mammo.py", "train_classifier.py", "prepare_dataset.py", "mammogram_dicom.py"
    }  # fmt: skip


@pytest.mark.parametrize("path", WITH_CONTENTS, ids=lambda path: path.name)
def test_banners_equal_the_table_of_contents(path):
    listed = ast.get_docstring(TREES[path]).split("\nContents\n")[1].split("\n\n")[0]
    contents = [re.match(r" *(\d+ .+?)(?:  |$)", line)[1] for line in listed.splitlines()]
    banners = re.findall(r"^# (?:-+ )?(\d+ .+?) -{5,}$", path.read_text("utf-8"), flags=re.MULTILINE)
    assert banners == contents
    assert [int(banner.split()[0]) for banner in banners] == list(range(1, len(banners) + 1))
    assert len(banners) >= 4


@SETTINGS
def test_constants_and_fields_are_one(module, settings):
    """Each field has a constant of its name in capitals: its default, and as a comment its help."""
    comments = mammo.settings.setting_help(module.__file__)
    for field in dataclasses.fields(settings):
        assert field.default == getattr(module, field.name.upper())
        assert comments[field.name].strip()


@SETTINGS
def test_fields_and_flags_are_one(module, settings, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    flags = set(re.findall(r"^  --([a-z_]+)", capsys.readouterr().out, flags=re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(settings)}
    assert fields == {flag for flag in flags if not flag.startswith("no_")}
    switches = {f"no_{f.name}" for f in dataclasses.fields(settings) if isinstance(f.default, bool)}
    assert switches == flags - fields


def read_names():
    """Names that the code reads: attributes, and words of texts that are no docstrings."""
    names = set()
    for tree in TREES.values():
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= set() if id(node) in docstrings else set(re.findall(r"\w+", node.value))
    return names


def test_every_setting_is_read():
    names = read_names()
    for settings in (mammo.Config, classifier.Settings):
        assert {field.name for field in dataclasses.fields(settings)} <= names
    assert "no_such_setting" not in names


def test_functions_stay_short():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def imports(tree):
    """Modules that a file imports, inside functions too, as written with dots."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import tells its whole name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_run_one_way():
    """Scripts import the main script and the package; neither of these imports a script."""
    scripts = {path.stem for path in SOURCES if path.parent == ROOT}
    package = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): imports(tree)
        for path, tree in TREES.items()
        if path.parent != ROOT
    }
    main = imports(TREES[ROOT / "train_byol_mammo.py"])
    assert "torch" in main
    for names in (main, *package.values()):
        assert not scripts & names
    graph = {name: names & set(package) for name, names in package.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("script", "late"),
    [
        ("train_byol_mammo", {"wandb", "matplotlib", "sklearn", *LATE_LEAVES}),
        ("train_classifier", {"wandb", "matplotlib", "sklearn"}),
        ("prepare_dataset", {"torch", "pydicom", "gdcm", "byol_mammo.cluster"}),
    ],
)
def test_imports_are_silent_and_light(script, late):
    code = f"import sys, {script}; print(sorted({late!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("script", ["train_byol_mammo", "train_classifier", "prepare_dataset"])
def test_names_that_are_no_text_fit_into_tables_where_pyarrow_is_installed(script):
    """pyarrow is what pandas would take for text then, and it holds UTF-8 alone."""
    code = f"import {script}, pandas; print(pandas.get_option('mode.string_storage'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "python\n"


def test_every_guard_is_found_once():
    """Else change its line in tests/faults/remove_guards.py, and see its test fail without it."""
    assert len(remove_guards.GUARDS) >= 60
    for guard in remove_guards.GUARDS:
        remove_guards.find(guard)  # raises LookupError
        tests = ROOT / "tests" / "faults" / guard.test.split()[0]
        assert tests.is_file(), guard.name


def test_a_guard_is_found_as_syntax_and_missed_where_it_is_gone():
    function = ast.parse(
        "def f(x):\n"
        "    if x>1 : # too many\n"
        "        raise ValueError('no')\n"
        "    try: g( x )\n"
        "    except (OSError,\n"
        "            KeyError): pass\n"
        "    return f'{h(x)} and {h( y )}'\n"
    ).body[0]
    for code, count in {
        "if x > 1:": 1, "except (OSError, KeyError):": 1, "g(x)": 1, "h(y)": 1, "x > 1": 1,
        "if x > 1:\n    raise ValueError('no')": 1, "x > 2": 0, "except OSError:": 0, "h(z)": 0,
    }.items():  # fmt: skip
        assert len(remove_guards.matches(function, code)) == count, code
