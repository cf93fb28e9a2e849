"""The optimiser LARS."""

from __future__ import annotations

from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum, each tensor's step in proportion to its norm (You et al. 2017, 1708.03888).

    A group may say whether it `adapts`; else it does where it decays: biases and norms don't, as in
    BYOL. The formula is that of lightly's LARS, which asks the device for two norms per tensor; here
    nothing waits for the device.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            steps: Any = [p.grad for p in params]
            decay = group["weight_decay"]
            if params and group.get("adapts", decay > 0):
                norms = zip(torch._foreach_norm(params), torch._foreach_norm(steps), strict=True)
                scales, decays = [], []
                for of_weight, of_grad in norms:
                    usable = (of_weight > 0) & (of_grad > 0)
                    scale = group["trust"] * of_weight / (of_grad + decay * of_weight + 1e-8)
                    scales.append(torch.where(usable, scale, 1.0))
                    decays.append(torch.where(usable, scale * decay, 0.0))
                steps = torch._foreach_mul(steps, scales)
                torch._foreach_add_(steps, torch._foreach_mul(params, decays))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
