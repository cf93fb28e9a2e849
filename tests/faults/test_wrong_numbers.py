"""NaN, infinity, overflow: a step is skipped or the run stops and names the tiles; none is saved."""

from __future__ import annotations

import re

import pytest
import test_classifier
import torch
from conftest import small_config
from test_classifier import labelled  # noqa: F401
from test_training import open_run, weights_hash

import train_byol_mammo as mammo
import train_classifier as classifier

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
STEPS = 8  # of the runs below: two epochs of four


def train_with(archive, tmp_path, *flags):
    """Train on the archive's cache, results in tmp_path."""
    words = ["--output_dir", str(tmp_path / "runs"), "--epochs", "2", *flags]
    return mammo.train(small_config(archive, *words))


def named_tiles(message: str) -> list[int]:
    """The tile ids that a message names."""
    found = re.search(r"rows of tiles\.csv: \[([\d, ]+)\]", message)
    assert found, message
    return [int(number) for number in found[1].split(",")]


def all_finite(folder) -> int:
    """Assert that all checkpoints below are finite; how many there are."""
    paths = list(folder.rglob("*.pth"))
    for path in paths:
        assert mammo.checkpoints.all_finite(torch.load(path)), path
    return len(paths)


@pytest.fixture
def saved_at_the_end_of_epochs(monkeypatch):
    """A state of four steps is there when a later step is spoilt."""
    monkeypatch.setattr(mammo, "save_is_due", lambda run: run.step % run.steps_per_epoch == 0)


class Batches:
    """Remembers the tiles of every step, to compare with what a message names."""

    def __init__(self, monkeypatch, spoil):
        self.ids, real = {}, mammo.train_step

        def step(run, ids, tiles=None):
            self.ids[run.step + 1] = ids.tolist()
            return spoil(run, lambda: real(run, ids, tiles))

        monkeypatch.setattr(mammo, "train_step", step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [6, 8])
def test_a_number_that_is_none_in_a_batch_stops_the_run_and_names_its_tiles(
    archive, tmp_path, monkeypatch, saved_at_the_end_of_epochs, value, step
):
    """Losses are looked at every 4 steps: the tiles named are those of the bad one, not of the last."""
    real = mammo.BYOL.forward

    def spoil(run, train):
        def spoilt(objective, views):
            views[0].image[0, 0, 3, 3] = value
            return real(objective, views)

        with monkeypatch.context() as patch:
            if run.step + 1 == step:
                patch.setattr(mammo.BYOL, "forward", spoilt)
            return train()

    batches = Batches(monkeypatch, spoil)
    with pytest.raises(mammo.MammoError, match=f"the loss is not a number at step {step} ") as caught:
        train_with(archive, tmp_path, "--log_every", "4")
    assert named_tiles(str(caught.value)) == batches.ids[step]
    assert all_finite(tmp_path / "runs") >= 2  # of the first epoch
    assert torch.load(tmp_path / "runs" / "byol_slim" / "last.pth")["step"] == 4


@pytest.mark.parametrize("what", ["weight", "statistic", "moment"])
def test_a_state_spoilt_behind_a_sound_loss_is_never_saved(
    archive, tmp_path, monkeypatch, saved_at_the_end_of_epochs, what
):
    """The last step before a checkpoint spoils what its own loss cannot show."""

    def spoil(run, train):
        out = train()
        if run.step == STEPS:
            with torch.no_grad():
                if what == "weight":
                    run.model.backbone.conv1.weight[0, 0, 0, 0] = torch.nan
                elif what == "statistic":
                    run.model.backbone.bn1.running_var[0] = torch.inf
                else:
                    next(iter(run.optimizer.state.values()))["exp_avg_sq"].fill_(torch.inf)
        return out

    batches = Batches(monkeypatch, spoil)
    with pytest.raises(
        mammo.MammoError, match=f"network's state is not a number at step {STEPS}"
    ) as caught:
        train_with(archive, tmp_path, "--log_every", "1000")
    assert named_tiles(str(caught.value)) == batches.ids[STEPS]
    all_finite(tmp_path / "runs")
    assert torch.load(tmp_path / "runs" / "byol_slim" / "last.pth")["step"] == 4


def test_no_checkpoint_of_numbers_that_are_none_is_written(archive, tmp_path):
    """Whoever calls: the file before it stays."""
    run = open_run(archive, "--output_dir", str(tmp_path), "--run_name", "guard")
    for name in ("last.pth", "mammogram_byol_best.pth"):
        mammo.save_checkpoint(run.folder / name, run, resumable=name == "last.pth")
    before = weights_hash(run.folder / "last.pth")
    with torch.no_grad():
        run.model.projection_head_momentum.layers[0].weight[0, 0] = torch.inf
    for name in ("last.pth", "mammogram_byol_best.pth", "new.pth"):
        with pytest.raises(mammo.MammoError, match="is not written"):
            mammo.save_checkpoint(run.folder / name, run, resumable=name == "last.pth")
    assert weights_hash(run.folder / "last.pth") == before
    assert sorted(path.name for path in run.folder.iterdir()) == ["last.pth", "mammogram_byol_best.pth"]


@pytest.mark.parametrize(
    "flags", [("--lr", "100"), ("--lr", "100", "--optimizer", "lars", "--momentum_base", "0")]
)
def test_an_exploding_run_ends_with_finite_checkpoints_or_a_message(archive, tmp_path, flags):
    try:
        train_with(archive, tmp_path, "--warmup_epochs", "0", *flags)
    except mammo.MammoError as error:
        assert "is not a number at step" in str(error)  # noqa: PT017
        assert named_tiles(str(error))  # noqa: PT017
    all_finite(tmp_path / "runs")


def test_a_gradient_that_overflows_skips_the_step_and_lowers_the_scale(archive, tmp_path):
    """The loop's own GradScaler, which PyTorch has for the CPU too, at a scale beyond float32."""
    run = open_run(archive, "--output_dir", str(tmp_path), "--run_name", "scaler")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    real = run.compute_loss

    def steep(*views):  # gradients of a million times the usual ones
        loss, *others = real(*views)
        return loss * 2.0**20, *others

    run.compute_loss = steep
    before = run.model.backbone.conv1.weight.detach().clone()
    ids, scales, moved = run.train_ids[:8], [], []
    for _ in range(4):
        loss = mammo.train_step(run, ids)["loss"]
        assert torch.isfinite(loss)
        scales.append(run.scaler.get_scale())
        moved.append(not torch.equal(run.model.backbone.conv1.weight, before))
    assert scales[0] == 2.0**87
    assert moved[0] is False  # skipped
    assert moved[-1] is True  # and on it goes
    mammo.save_checkpoint(run.folder / "last.pth", run, resumable=True)
    assert all_finite(run.folder) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_a_step_that_overflows_in_fp16_is_skipped_and_lowers_the_scale(archive, tmp_path, device):
    """Real fp16 arithmetic; on the CPU it is too slow to be offered as a flag."""
    places = ("--output_dir", str(tmp_path), "--run_name", "fp16", "--device", device)
    run = open_run(archive, *places)
    run.autocast = lambda: torch.autocast(device, torch.float16)
    run.scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-30)
    before = run.model.backbone.conv1.weight.detach().clone()
    moved = []
    for _ in range(2):
        mammo.train_step(run, run.train_ids[:8])
        moved.append(not torch.equal(run.model.backbone.conv1.weight, before))
    assert moved == [False, True]
    assert run.scaler.get_scale() == 2.0**10
    assert mammo.checkpoints.all_finite(run.model.state_dict())


def test_a_classifier_whose_loss_is_no_number_stops_and_names_its_tiles(
    labelled,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    real, calls = classifier.masked_bce, []

    def spoilt(logits, targets, weight):
        calls.append(1)
        return real(logits, targets, weight) * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(classifier, "masked_bce", spoilt)
    words = ["--weights", "none", *test_classifier.TILES, "--epochs", 2, "--run_name", "nan"]
    assert test_classifier.run_main("train", labelled, *words, out=tmp_path) == 2
    message = capsys.readouterr().err
    assert "the loss is not a number at step 2 " in message
    assert named_tiles(message)
    assert all_finite(tmp_path) == 2  # best and last, of the probe before the first epoch
