"""The training step as a GPU runs it, on tensors that have a device and a shape but no data.

Such tensors (of FakeTensorMode) exist without a GPU. An operation on two devices fails on them, and so
does whatever has to wait for a result. Kernels, their speed and their memory need a real one.
"""

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_byol_mammo as mammo

GPU = torch.device("cuda:0")


class NoCopyFromTheHost(TorchDispatchMode):
    """Refuse copies between the host and the GPU: from memory that is not pinned they wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        assert len({t.device.type for t in tensors}) < 2 or "copy" not in str(func), f"{func} waits"
        return out


def without_data(module):
    """The module with parameters and buffers on the GPU that hold no data."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                empty = torch.empty_like(value, device=GPU)
                part._parameters[name] = torch.nn.Parameter(empty, value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty_like(value, device=GPU)
    return module


@pytest.fixture
def no_gpu_is_asked(monkeypatch):
    """Answer the questions that torch would put to a GPU's driver; give gradients without a backward."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)

    def pinned_copy(array, device):
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    monkeypatch.setattr(mammo, "to_device", pinned_copy)


def gpu_run(folder, monkeypatch, *flags):
    """A Run whose tensors are on a GPU; call it inside FakeTensorMode."""
    config = mammo.parse_args([*SMALL, "--device", "cuda", "--output_dir", str(folder), *flags])
    model = mammo.MammogramBYOL(mammo.build_backbone("resnet18"), 512, 64, 32)
    speck_head = torch.nn.Conv2d(512, mammo.SPECK_QUANTITIES, 1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        without_data(model).train()
        optimizer = mammo.build_optimizer(model, config)
        tiles = object.__new__(mammo.MammogramTiles)
        tiles.tile_size, tiles.reduce = 128, 4
        tiles.layout, tiles.centre = np.tile([0, 90, 90], (8, 1)), np.full((8, 2), 44.3)
        tiles.window = np.tile(np.float32([0, 1000]), (8, 1))
        tiles.pixels = torch.empty(90 * 90, dtype=torch.int16, device=GPU)
        run = mammo.Run(
            config, folder, tiles, np.arange(8), np.arange(8), model, optimizer,
            torch.amp.GradScaler("cuda", enabled=False), GPU,
            lambda: torch.autocast("cuda", torch.bfloat16), mammo.Objective(model), 4, "", mammo.World(),
        )  # fmt: skip
        if config.freq_loss_weight:
            run.speck_head = without_data(speck_head)
            run.speck_scale = torch.empty(2, 1, 3, 1, 1, device=GPU).unbind()
            run.loss_function = mammo.Objective(model, run.speck_head)
            optimizer.add_param_group({"params": list(run.speck_head.parameters())})

    def backward(loss):
        assert loss.device == GPU
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return run, mode


@pytest.mark.parametrize("flags", [(), ("--optimizer", "lars"), ("--freq_loss_weight", "1")])
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(tmp_path, monkeypatch, no_gpu_is_asked, flags):
    run, mode = gpu_run(tmp_path, monkeypatch, *flags)
    with mode, NoCopyFromTheHost():
        found = [mammo.train_step(run, ids) for ids in (np.arange(4), np.arange(4, 8))]
    assert run.step == 2
    for metrics in found:
        assert (metrics.device, metrics.dtype, metrics.shape) == (GPU, torch.float32, (3,))


def test_bf16_is_what_the_gpu_multiplies_in(tmp_path, monkeypatch, no_gpu_is_asked):
    run, mode = gpu_run(tmp_path, monkeypatch)
    with mode, run.autocast():
        view, _ = mammo.two_views(run, run.tiles, np.arange(4), (0,))
        assert (view.device, view.dtype) == (GPU, torch.float32)
        assert run.model.get_features(view).dtype == torch.bfloat16
        assert run.model.classify(view).dtype == torch.float32


@pytest.mark.parametrize(
    ("flag", "gpus", "local_rank", "expected"),
    [
        ("auto", 4, None, "cuda:0"),
        ("cuda", 4, None, "cuda:0"),
        ("cuda:2", 4, None, "cuda:2"),
        ("cuda:2", 4, 1, "cuda:2"),
        ("auto", 4, 3, "cuda:3"),
        ("cuda", 4, 3, "cuda:3"),
        ("auto", 1, 3, "cuda:0"),  # SLURM gave each task its own GPU
        ("cpu", 4, 3, "cpu"),
        ("auto", 0, 3, "cpu"),
        ("cuda", 0, None, "no CUDA GPU here"),
        ("cuda:4", 4, None, "cuda:0 to cuda:3"),
        ("mps", 4, None, "not supported"),
        ("gpu", 4, None, "not a device"),
    ],
)
def test_each_process_takes_a_gpu_that_it_can_see(monkeypatch, flag, gpus, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if local_rank is not None:
        for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", local_rank)):
            monkeypatch.setenv(name, str(value))
    config = mammo.parse_args(["--device", flag])
    if " " in expected:
        with pytest.raises(mammo.MammoError, match=expected):
            mammo.choose_device(config)
    else:
        assert mammo.choose_device(config) == torch.device(expected)


def waits_for_a_number(features):
    return features.new_tensor(float(features.sum()))


def mixes_devices(features):
    return features.sum() + torch.ones(3, device="cpu").sum()[None]


def copies_from_the_host(features):
    return features.sum() * torch.ones(3).to(GPU).sum()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (waits_for_a_number, DataDependentOutputException),
        (mixes_devices, RuntimeError),
        (copies_from_the_host, AssertionError),
    ],
)
def test_these_tensors_would_show_a_fault(tmp_path, monkeypatch, no_gpu_is_asked, fault, error):
    run, mode = gpu_run(tmp_path, monkeypatch)
    monkeypatch.setattr(mammo, "feature_std", fault)
    with mode, NoCopyFromTheHost(), pytest.raises(error):
        mammo.train_step(run, np.arange(4))
