"""The training step as a GPU runs it, on tensors that have a device and a shape but no data.

Such tensors (of FakeTensorMode) exist without a GPU. An operation on two devices fails on them, and so
does whatever has to wait for a result. Kernels, their speed and their memory need a real one.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_network
import torch
from conftest import SMALL, small_config
from private_torch import (
    COMPILERS,
    COMPILES_BACKWARD_AT_ONCE,
    DataDependentOutputException,
    FakeTensorMode,
    TorchDispatchMode,
    backend_without,
    bf16_and_scaler_without_a_driver,
    tree_leaves,
    unset_fake_temporarily,
)

import train_byol_mammo as mammo

GPU = torch.device("cuda:0")
# As text, which pytest asks when a test is due: tests/gpu/run.py imports this file and forks, and
# a question to CUDA before a fork spoils it for all children.
needs_gpu = pytest.mark.skipif("not torch.cuda.is_available()", reason="no CUDA GPU here")


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
    try:
        with FakeTensorMode():
            _ = torch.empty(4, device=GPU)[1:]
    except RuntimeError:
        pytest.skip(f"PyTorch {torch.__version__} needs the driver for tensors without data too")
    bf16_and_scaler_without_a_driver(monkeypatch)

    def pinned_copy(array, device):
        return torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)

    monkeypatch.setattr(mammo.devices, "to_device", pinned_copy)


def target_objective(model, side):
    """BYOL with both heads, for views of `side` px and 38 mm."""
    sample = torch.rand(4, 1, side, side)
    specks = mammo.targets.SpeckHead(sample, small_network.WIDTH)
    masses = mammo.targets.StructureHead(sample, small_network.WIDTH, 38 / side)
    return mammo.TargetBYOL(model, mammo.Config(), [(specks, 1.0), (masses, 2.0)])


def gpu_run(folder, monkeypatch, *flags):
    """A Run whose tensors are on a GPU; call it inside FakeTensorMode."""
    flags = ("--device", "cuda", "--batch_size", "4", "--output_dir", str(folder), *flags)
    config = mammo.parse_args([*SMALL, *flags])
    model = mammo.MammogramBYOL(
        mammo.checkpoints.build_backbone(small_network.NAME), small_network.WIDTH, 64, 32
    )
    objective: mammo.Objective = mammo.BYOL(model, config)
    if config.freq_loss_weight:
        objective = target_objective(model, 32)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        without_data(objective).train()
        optimizer = mammo.build_optimizer(objective, config)
        image = {"offset": 0, "height": 360, "width": 360, "y0": 0, "x0": 0, "low": 0, "high": 1000}
        table = pd.DataFrame({"image": [0] * 8, "x": 113, "y": 113, "breast_ratio": 1.0})
        tiles = mammo.MammogramTiles(
            np.empty(90 * 90, np.uint16), pd.DataFrame([image]), table, 128, reduce=4
        )
        tiles.pixels = torch.empty(90 * 90, dtype=torch.int16, device=GPU)
        run = mammo.Run(
            config=config, folder=folder, tiles=tiles, train_ids=np.arange(8), monitor_ids=np.arange(8),
            probe=None, objective=objective, compute_loss=objective, optimizer=optimizer,
            scaler=torch.amp.GradScaler("cuda", enabled=False), device=GPU,
            autocast=lambda: torch.autocast("cuda", torch.bfloat16), steps_per_epoch=2, wandb_id="",
            ranks=mammo.processes.Ranks(), code={},
        )  # fmt: skip

    def backward(loss):
        assert loss.device == GPU
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return run, mode


@pytest.mark.parametrize(
    "flags", [(), ("--optimizer", "lars"), ("--freq_loss_weight", "1"), ("--vicreg_weight", "1")]
)
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(tmp_path, monkeypatch, no_gpu_is_asked, flags):
    run, mode = gpu_run(tmp_path, monkeypatch, *flags)
    with mode, NoCopyFromTheHost():
        found = [mammo.train_step(run, ids) for ids in (np.arange(4), np.arange(4, 8))]
    assert run.step == 2
    names = {"loss", "feature_std"}
    names |= {"freq_loss", "structure_loss"} if "--freq_loss_weight" in flags else set()
    names |= {"vicreg_loss"} if "--vicreg_weight" in flags else set()
    for metrics in found:
        tensors = {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor)}
        assert set(tensors) == names
        for value in tensors.values():
            assert (value.device, value.dtype, value.shape) == (GPU, torch.float32, ())


def test_pixels_beyond_the_gpus_memory_are_cut_by_the_host_and_seen_on_the_gpu(
    tmp_path, monkeypatch, no_gpu_is_asked
):
    run, mode = gpu_run(tmp_path, monkeypatch)
    run.tiles.pixels = torch.zeros(90 * 90, dtype=torch.int16)
    subset = mammo.MammogramTiles.subset

    def with_data(*words):
        with unset_fake_temporarily():
            cut = subset(*words)
            array = cut.pixels.numpy()
        cut.pixels = SimpleNamespace(numpy=lambda: array)
        return cut

    monkeypatch.setattr(mammo.MammogramTiles, "subset", with_data)
    with mode, NoCopyFromTheHost():
        steps = [mammo.train_step(run, ids, tiles) for ids, tiles in mammo.batches(run)]
        view = mammo.make_view(run.tiles, np.arange(4), mammo.VIEW_2, 32, device=GPU).image
    assert len(steps) == run.steps_per_epoch
    assert view.device == GPU


@pytest.mark.parametrize("flags", [(), ("--vicreg_weight", "1")])
def test_a_batch_of_more_tiles_takes_no_more_operators(archive, tmp_path, flags):
    """Each is a kernel or a few on a GPU, where a small network waits for their launches."""
    counts = []
    for batch in (8, 32):
        size = ("--batch_size", str(batch), "--device", "cpu")
        run = real_run(archive, tmp_path / str(batch), *size, *flags)
        ids = next(mammo.batches(run))[0]
        mammo.train_step(run, ids)  # the optimiser makes its state
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            mammo.train_step(run, ids)
        counts.append({e.key: e.count for e in profiler.key_averages() if e.key.startswith("aten::")})
    assert counts[0] == counts[1]
    assert counts[0]["aten::convolution"] > 10


def test_bf16_is_what_the_gpu_multiplies_in(tmp_path, monkeypatch, no_gpu_is_asked):
    run, mode = gpu_run(tmp_path, monkeypatch)
    with mode, run.autocast():
        view = mammo.make_views(run, run.tiles, np.arange(4), (0,))[0].image
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
        ("cuda", 7, None, r"does not run on this GPU \(sm_70\): .*no kernel image.*CUDA 12\.6"),
        ("cuda:4", 4, None, "cuda:0 to cuda:3"),
        ("mps", 4, None, "not supported"),
        ("gpu", 4, None, "not a device"),
    ],
)
def test_each_process_takes_a_gpu_that_it_can_see(monkeypatch, flag, gpus, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    # Seven GPUs stand for V100s here.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0) if gpus == 7 else (9, 0))

    def run_a_kernel(device):
        if gpus == 7:
            raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(mammo.devices, "run_a_kernel", run_a_kernel)
    if local_rank is not None:
        for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", local_rank)):
            monkeypatch.setenv(name, str(value))
    ranks = mammo.processes.find_ranks()
    if " " in expected:
        with pytest.raises(mammo.MammoError, match=expected):
            mammo.devices.choose_device(flag, ranks.local_rank)
    else:
        assert mammo.devices.choose_device(flag, ranks.local_rank) == torch.device(expected)


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


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(mammo.MammoError, match="nproc_per_node 2"):
        mammo.devices.choose_device("cuda")


def test_checkpoints_name_no_device(tmp_path):
    content = {"model_state_dict": {"a": torch.ones(2)}, "optimizer": {"state": [torch.zeros(1)]}}
    moved = mammo.checkpoints.on_cpu({"a": FakeGPUTensor(), "b": [FakeGPUTensor()], "c": (1, None, "x")})
    assert moved == {"a": "on the CPU", "b": ["on the CPU"], "c": [1, None, "x"]}
    mammo.checkpoints.write_checkpoint(tmp_path / "a.pth", content)
    assert torch.equal(torch.load(tmp_path / "a.pth")["model_state_dict"]["a"], torch.ones(2))


class FakeGPUTensor(torch.Tensor):
    def cpu(self):
        return "on the CPU"


def test_where_torch_compile_is_not_supported_the_step_runs_without(monkeypatch, capsys):
    def unsupported(*_):
        raise RuntimeError("torch.compile is not supported on Python 3.15+")

    monkeypatch.setattr(torch, "compile", unsupported)
    step = mammo.devices.compiled(len)
    assert step([1, 2]) == 2
    assert "going on without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "flags", "held"),
    [
        (18, (), True),
        (21, (), False),
        (21, ("--grad_checkpoint",), True),
        (21, ("--batch_size", "16"), True),
        (10, ("--precision", "fp32"), False),
    ],
)
def test_pixels_stay_on_the_gpu_where_a_step_has_room_beside_them(monkeypatch, gib, flags, held):
    """A GPU with 40 GiB free; a step of 32 tiles at 512 px in bf16 is taken to need 21 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * 2**30, 40 * 2**30))
    moved = []
    tiles = SimpleNamespace(pixels=SimpleNamespace(nbytes=gib * 2**30), to=moved.append)
    mammo.hold_on_device(tiles, GPU, mammo.parse_args(["--precision", "bf16", *flags]))
    assert moved == [GPU] * held


def test_a_step_compiles_into_one_graph_that_gives_the_same_numbers():
    model = mammo.MammogramBYOL(
        mammo.checkpoints.build_backbone(small_network.NAME), small_network.WIDTH, 64, 32
    )
    images = torch.randn(2, 4, 1, 64, 64)
    views = [mammo.View(spec.kind, x, x.sigmoid()) for spec, x in zip(mammo.VIEWS, images, strict=True)]
    spread = mammo.BYOL(model, mammo.Config(vicreg_weight=0.1))
    for objective in (mammo.BYOL(model, mammo.Config()), spread, target_objective(model, 64)):
        compiled = torch.compile(objective, backend="eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = compiled(views)
            expected, wanted = objective(views)
        assert torch.equal(loss, expected)
        assert metrics.keys() == wanted.keys()
        assert all(torch.equal(metrics[name], wanted[name]) for name in metrics)


@pytest.mark.parametrize("broken", COMPILERS)
def test_where_compiling_fails_the_plain_function_goes_on(monkeypatch, capsys, broken):
    def fail(*_):
        raise RuntimeError("out of shared memory")

    if broken == "bw_compiler" and not COMPILES_BACKWARD_AT_ONCE:
        pytest.skip(f"PyTorch {torch.__version__} compiles the backward pass at its first call")
    backend = backend_without(broken, fail)
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: plain_compile(function, backend=backend))
    torch.compiler.reset()
    layer = torch.nn.Linear(4, 4)
    compiled = mammo.devices.compiled(layer)
    for _ in range(2):
        compiled(torch.ones(3, 4)).sum().backward()
    assert layer.bias.grad.tolist() == [6.0] * 4
    assert capsys.readouterr().err.count("going on without") == 1


# ---- With a GPU ------------------------------------------------------------------------------------


def real_run(archive, folder, *flags):
    """A Run of the small archive on the GPU."""
    flags = ("--device", "cuda", "--output_dir", str(folder), *flags)
    config = small_config(archive, *flags)
    mammo.devices.set_determinism(config.deterministic, mammo.devices.choose_device(config.device))
    torch.manual_seed(config.seed)
    backbone = mammo.checkpoints.build_backbone(config.backbone)
    config = mammo.match_input_dim(config, backbone)
    return mammo.prepare_run(config, backbone, mammo.build_cache(config), mammo.processes.find_ranks())


def state_after(run, steps):
    """The model's state on the host after some steps of training."""
    batches = mammo.batches(run)
    for _ in range(steps):
        mammo.train_step(run, *next(batches))
    return [value.cpu() for value in run.model.state_dict().values()]


@pytest.fixture
def default_modes():
    """Take back what a test sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize(
    "flags", [(), ("--no_compile",), ("--freq_loss_weight", "1", "--structure_loss_weight", "1")]
)
def test_a_step_never_waits_for_the_gpu(archive, tmp_path, default_modes, flags):
    run = real_run(archive, tmp_path, *flags)
    batches = mammo.batches(run)
    for step in range(4):
        if step == 2:  # the first ones compile and choose algorithms
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        metrics = mammo.train_step(run, *next(batches))
    torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(float(value)) for value in metrics.values())


@needs_gpu
def test_views_are_the_same_on_the_gpu(archive, tmp_path, default_modes):
    run = real_run(archive, tmp_path, "--no_compile")
    host = mammo.open_tiles(run.tiles.cache, run.tiles.reduce)
    ids = np.arange(16)
    for spec in (mammo.PLAIN_VIEW, mammo.VIEW_1, mammo.VIEW_2):
        expected = mammo.make_view(host, ids, spec, 32, (1, 2)).image
        found = mammo.make_view(run.tiles, ids, spec, 32, (1, 2)).image.cpu()
        assert (found - expected).abs().max() < 1e-3 / mammo.GREY_STD


@needs_gpu
def test_runs_are_bit_equal_if_asked_for_wherever_the_pixels_are(
    archive, tmp_path, monkeypatch, default_modes
):
    flags = ("--deterministic", "--no_compile")
    resident = state_after(real_run(archive, tmp_path / "a", *flags), 4)
    again = state_after(real_run(archive, tmp_path / "b", *flags), 4)
    monkeypatch.setattr(mammo, "hold_on_device", lambda *_: None)
    streamed = state_after(real_run(archive, tmp_path / "c", *flags), 4)
    for first, second, third in zip(resident, again, streamed, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
