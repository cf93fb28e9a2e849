"""Device, precision, determinism, compilation and memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from byol_mammo import objectives, processes
from byol_mammo.settings import MammoError


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device; the copy waits for nothing that the GPU is still doing."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def statistics_frozen(module: nn.Module) -> Iterator[None]:
    """Batch norm with the batch's statistics that leaves the running ones as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(count)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Resolve --device to cpu or cuda:N. Raises MammoError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MammoError(f"--device {name}: not a device (auto, cpu, cuda, cuda:N)") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise MammoError(f"--device {name}: not supported (auto, cpu, cuda, cuda:N)")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise MammoError(f"--device {name}: no CUDA GPU here; --device cpu works, slowly")
    # A task that SLURM gave a GPU of its own (--gpus-per-task) sees that one alone, as number 0.
    index = local_rank % count if device.index is None else device.index
    if index >= count:
        raise MammoError(f"--device {name}: the GPUs here are cuda:0 to cuda:{count - 1}")
    if 1 < count < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise MammoError(f"{count} GPUs for more processes: give torchrun --nproc_per_node {count}")
    device = torch.device("cuda", index)
    try:
        run_a_kernel(device)
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(index)
        raise MammoError(
            f"PyTorch {torch.__version__} does not run on this GPU (sm_{major}{minor}): "
            f"{str(error).splitlines()[0]}. Install a build that has code for it (for a V100 one for "
            "CUDA 12.6), or give --device cpu"
        ) from error
    return device


def run_a_kernel(device: torch.device) -> None:
    """Raise RuntimeError on a GPU that this build of PyTorch has no code for."""
    torch.zeros(1, device=device).add_(1).item()


def note_idle_gpu(name: str, device: torch.device) -> None:
    """Say so where --device auto means the CPU although the node has a GPU."""
    if name == "auto" and device.type == "cpu" and any(Path("/dev").glob("nvidia[0-9]*")):
        print(
            f"note: PyTorch {torch.__version__} can't use the GPU of this node (its driver is too old, "
            "or the job asked for none): going on with the CPU, which is far slower",
            file=sys.stderr,
        )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 (some x86 since 2020; Linux lists it); emulated it is slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Resolve --precision: bf16 where the hardware has it, else fp16 on CUDA, fp32 on the CPU."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "fp16" and device.type == "cpu":
        raise MammoError("--precision fp16 needs a GPU; use fp32 or bf16 on the CPU")
    if precision != "auto":
        return names[precision]
    if device.type != "cuda":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    # Volta emulates bf16: is_bf16_supported(False) asks for the hardware.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def precision_name(precision: str, device: torch.device) -> str:
    """float32, bfloat16 or float16, as --precision resolves on a device."""
    return str(choose_precision(precision, device)).removeprefix("torch.")


def distribute(
    objective: objectives.Objective, device: torch.device, ranks: processes.Ranks
) -> nn.Module:
    """The objective with its gradients averaged over the ranks, where there are several."""
    if ranks.world_size == 1:
        return objective
    # Batch norm on the CPU can't be synchronised: its statistics are those of rank 0.
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, device_ids=devices)


# Bytes that a pixel of a view leaves for the backward pass in bf16: 235 MiB for 512 x 512 in a ResNet50.
BYTES_PER_PIXEL = 940


def leaves_room(
    nbytes: int, view_pixels: int, fp32: bool, grad_checkpoint: bool, device: torch.device
) -> bool:
    """Whether `nbytes` in the GPU's memory leave a training step on `view_pixels` what it needs."""
    free, _ = torch.cuda.mem_get_info(device)
    step = view_pixels * BYTES_PER_PIXEL * (2 if fp32 else 1) // (2 if grad_checkpoint else 1)
    return nbytes < free - 1.3 * step - 2 * 2**30  # weights, views, what convolutions want


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile; where compiling fails, a note and the plain function."""
    with suppress(ImportError):  # a private module: a torch without it compiles all the same
        from torch._functorch import config as lowering

        # Else the backward pass is compiled at its first call, out of the reach of `call`.
        if hasattr(lowering, "force_non_lazy_backward_lowering"):
            lowering.force_non_lazy_backward_lowering = True
    try:
        fast = torch.compile(function)
    except RuntimeError as error:  # as on a Python that it doesn't know yet
        print(f"note: no torch.compile, going on without ({error})", file=sys.stderr)
        return function

    def call(*args: Any) -> Any:
        nonlocal fast
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"note: torch.compile failed, going on without ({error})", file=sys.stderr)
            fast = function
            return fast(*args)

    return call


def git_commit() -> str:
    """The commit of this code; where it is installed, its version; or unknown."""
    here = Path(__file__).resolve()
    # The file too, for an environment may lie in the working tree of something else.
    command = ["git", "-C", str(here.parent), "rev-parse", "HEAD", f"HEAD:./{here.name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return installed_version()
    return installed_version() if done.returncode else done.stdout.split()[0]


def installed_version() -> str:
    """v and the version of the installed package that this file is of, or unknown."""
    try:
        package = metadata.distribution("byol-mammo")
    except metadata.PackageNotFoundError:
        return "unknown"
    own = Path(str(package.locate_file("byol_mammo/device.py"))).resolve() == Path(__file__).resolve()
    return f"v{package.version}" if own else "unknown"


def environment(precision: str) -> dict[str, str]:
    """Versions, device, precision and git commit, recorded beside each run's result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "precision": precision,
        "git_commit": git_commit(),
    }


def set_determinism(deterministic: bool, device: torch.device) -> None:
    """Bit-equal algorithms on CUDA if asked for, else the fastest convolutions for the run's shapes.

    In fp32 convolutions are fp32: by default they would have the 10 bits of TF32.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def describe_device(device: torch.device, precision: str) -> str:
    """Device, its memory or cores, and what --precision resolves to on it."""
    name = f"CPU, {processes.available_cores()} cores"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"
    return f"{name}, {precision_name(precision, device)}"
