"""Five steps of training give the weights that they gave when this file was written.

A change that is meant to change no number, such as a move of code, must leave them as they are; after
one that is meant to, `python tests/test_golden_step.py`, and say in the changelog what has changed.
Other CPUs add in another order, so that the record is compared with a tolerance; two runs here are equal
to the bit. Under a version of PyTorch without a record only that is tested; test_training.py compares
the step with a plain loop under every version.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import RESNET18, small_config, write_images
from test_training import open_run

import train_byol_mammo as mammo

RECORD = Path(__file__).with_name("golden_step.json")
STEPS = 5
VERSION = ".".join(torch.__version__.split(".")[:2])
FLAGS = {
    "slim": ("--precision", "fp32"),
    "resnet18": (*RESNET18, "--precision", "fp32"),
    "frequency target": ("--precision", "fp32", "--freq_loss_weight", "1"),
    "structure target": ("--precision", "fp32", "--structure_loss_weight", "2"),
    "lars": ("--precision", "fp32", "--optimizer", "lars", "--lr", "0.025"),
}


def take_steps(archive, folder, name, *more):
    """Losses of five steps in one thread, and what they changed in each floating-point value."""
    assert torch.get_num_threads() == 1
    run = open_run(archive, *FLAGS[name], *more, "--output_dir", str(folder), "--run_name", "golden")
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    batches, losses = mammo.batches(run), []
    for step in range(STEPS):
        if step and step % run.steps_per_epoch == 0:
            batches = mammo.batches(run)
        losses.append(float(mammo.train_step(run, *next(batches))["loss"]))
    after = run.model.state_dict()
    return losses, {k: v - before[k] for k, v in after.items() if v.is_floating_point()}


def figures(losses, changes):
    """What is recorded: the losses, and the mean square of the change in each part of the model.

    Statistics of batch norm, which change a hundred times as much as weights, are parts of their own.
    """
    parts = {}
    for name, value in changes.items():
        kind = " statistics" if ".running_" in name else ""
        parts.setdefault(name.split(".")[0] + kind, []).append(value.double().flatten())
    return {"losses": losses, **{k: float(torch.cat(v).square().mean()) for k, v in parts.items()}}


def differing(found, expected):
    """The recorded figures that are others."""
    assert set(found) == set(expected)
    limits = {"losses": {"abs": 5e-4}}
    return [
        part
        for part, value in expected.items()
        if found[part] != pytest.approx(value, **limits.get(part, {"rel": 5e-3, "abs": 1e-15}))
    ]


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_five_steps_give_the_recorded_weights(archive, tmp_path, name):
    first = take_steps(archive, tmp_path / "a", name)
    second = take_steps(archive, tmp_path / "b", name)
    assert first[0] == second[0]
    for key, value in first[1].items():
        assert torch.equal(value, second[1][key]), key
    recorded = json.loads(RECORD.read_text())
    if VERSION not in recorded:
        pytest.skip(f"no record for PyTorch {VERSION}: python tests/test_golden_step.py adds it")
    assert differing(figures(*first), recorded[VERSION][name]) == []


@pytest.mark.parametrize("change", [("--lr", "0.00195"), ("--momentum_base", "0.3"), ("--seed", "1")])
def test_other_steps_are_told_from_the_recorded(archive, tmp_path, change):
    """The tolerance is far below what a step does that is wrong by little."""
    right = figures(*take_steps(archive, tmp_path / "right", "slim"))
    wrong = figures(*take_steps(archive, tmp_path / "wrong", "slim", *change))
    assert differing(wrong, right)


def record():
    """Write the figures of this version of PyTorch."""
    content = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    with tempfile.TemporaryDirectory() as place:
        archive = Path(place)
        write_images(archive / "images", bits=12)
        mammo.build_cache(small_config(archive))
        content[VERSION] = {name: figures(*take_steps(archive, archive / name, name)) for name in FLAGS}
    RECORD.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(record())
