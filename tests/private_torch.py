"""What the tests use of PyTorch that its releases may move: to be mended here alone."""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as lowering
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "COMPILERS",
    "COMPILES_BACKWARD_AT_ONCE",
    "DataDependentOutputException",
    "FakeTensorMode",
    "TorchDispatchMode",
    "backend_without",
    "bf16_and_scaler_without_a_driver",
    "tree_leaves",
    "unset_fake_temporarily",
]
COMPILERS = ("fw_compiler", "bw_compiler")
COMPILES_BACKWARD_AT_ONCE = hasattr(lowering, "force_non_lazy_backward_lowering")


def backend_without(broken, fail):
    """A backend of torch.compile that runs graphs as they are; its compiler `broken` is `fail`."""
    compilers = {name: lambda graph, _: make_boxed_func(graph.forward) for name in COMPILERS}
    return aot_autograd(**{**compilers, broken: fail})


def bf16_and_scaler_without_a_driver(monkeypatch):
    """Answer two questions that torch would put to a GPU's driver."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
