"""Constants, Config fields, flags and their documentation are one and the same."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

import train_byol_mammo as mammo

SOURCE = (ROOT / "train_byol_mammo.py").read_text()
FIELDS = {field.name: field for field in dataclasses.fields(mammo.Config)}


def flags_of(text):
    return set(re.findall(r"^  --([a-z_]+)", text, flags=re.MULTILINE))


def test_constants_fields_and_flags_agree():
    section = SOURCE.split("# ---- 1 Configuration")[1].split("CHOICES = ")[0]
    constants = re.findall(r"^([A-Z_]+) = ", section, flags=re.MULTILINE)
    assert [name.lower() for name in constants] == list(FIELDS)
    for name, field in FIELDS.items():
        assert field.default == getattr(mammo, name.upper())
    shown = flags_of(run_script(ROOT / "train_byol_mammo.py", "--help").stdout)
    assert set(FIELDS) == {flag for flag in shown if not flag.startswith("no_")}


def test_every_setting_has_a_help_line_and_is_read():
    assert set(mammo.setting_help()) >= set(FIELDS)
    code = SOURCE.split("# ---- 2 Image")[1]
    for name in FIELDS:
        assert re.search(rf"\b{name}\b", code) or name in ("output_dir", "run_name", "view_size"), name


def test_contract_defaults():
    config = mammo.Config()
    expected = {
        "data_dir": "./split_images/training", "tile_size": 512, "tile_stride": 256,
        "min_breast_ratio": 0.15, "min_freq_energy": 0.03, "min_tile_intensity": 40,
        "min_non_zero_pixels": 0.7, "batch_size": 32, "num_workers": 16, "lr": 2e-3,
        "warmup_epochs": 10, "epochs": 100, "momentum_base": 0.996, "input_dim": 2048,
        "hidden_dim": 4096, "proj_dim": 256, "tiles_per_epoch": 11_000, "max_tiles": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_dashes_equal_underscores():
    assert mammo.parse_args(["--tile-size", "256"]) == mammo.parse_args(["--tile_size=256"])
    assert mammo.parse_args(["--no-compile"]).compile is False
    assert mammo.parse_args(["--data_dir", "a-b"]).data_dir == "a-b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile_sise", "256"], "did you mean --tile_size"),
        (["--batch", "8"], "unknown argument --batch"),
        (["--batch_size", "x"], "invalid int value"),
        (["--batch_size", "1"], "between 2 and"),
        (["--backbone", "resnet5"], "choose one of resnet18"),
        (["--min_breast_ratio", "nan"], "between 0 and 1"),
        (["leftover"], "unknown argument leftover"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(words, message):
    with pytest.raises(mammo.MammoError, match=message):
        mammo.parse_args(words)


def test_import_is_silent_and_light():
    code = (
        "import train_byol_mammo, sys; "
        "bad = {'wandb', 'matplotlib'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_banners_equal_the_table_of_contents():
    banners = re.findall(r"^# ---- (\d+ [A-Z][a-z ]+?) -+$", SOURCE, flags=re.MULTILINE)
    contents = re.findall(r"^    (\d+ [A-Z][a-z ]+?)  ", mammo.__doc__, flags=re.MULTILINE)
    assert banners == contents
    assert len(banners) == 12


def test_functions_stay_short():
    for script in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{script.name}: {node.name} has {length} lines"
