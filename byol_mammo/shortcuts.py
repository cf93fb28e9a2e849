"""What two views of a tile share without telling anything of its tissue: an easy way to a low loss.

Contrastive methods settle for colour histograms where views leave them alone (Chen et al. 2020, SimCLR,
section 3.2); on mammograms the share of air and the brightness are as easy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUISANCES = ("air", "brightness")  # of shared_facts; what features tell of them is no use to a reader
LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def shared_facts(grey: Tensor) -> dict[str, Tensor]:
    """By name what a glance tells of views (B, 1, S, S) with air at 0, each (B,).

    Share of air; mean and spread of the tissue; fine detail, the log of its Laplacian's mean square.
    """
    tissue = grey > 0
    area = tissue.sum((1, 2, 3)).clamp_min(1)
    mean = grey.sum((1, 2, 3)) / area
    spread = ((grey - mean.view(-1, 1, 1, 1)).square() * tissue).sum((1, 2, 3)) / area
    detail = F.conv2d(grey, torch.tensor(LAPLACIAN, device=grey.device)[None, None])
    # A place beside air has a steep side of its own.
    inner = F.max_pool2d((~tissue).to(grey.dtype), 3, stride=1) == 0
    detail = (detail.square() * inner).sum((1, 2, 3)) / inner.sum((1, 2, 3)).clamp_min(1)
    return {
        "air": 1 - area / grey[0].numel(),
        "brightness": mean,
        "spread": spread.sqrt(),
        "detail": (detail + 1e-9).log(),
    }


def correlations(first: Tensor, second: Tensor) -> dict[str, float]:
    """Of shared_facts between two views (B, 1, S, S) of the same tiles; NaN where one doesn't vary."""
    facts = [shared_facts(views) for views in (first, second)]
    pairs = {name: torch.stack([part[name] for part in facts]) for name in facts[0]}
    return {name: float(torch.corrcoef(pair)[0, 1]) for name, pair in pairs.items()}


def told_nuisances(features: np.ndarray, grey: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """R^2 with which features (N, D) tell the NUISANCES of N views (N, 1, S, S), named r2_*.

    Of ridge regression's predictions out of fold, groups (patients) whole. Without what is the same in
    all views, of which there is nothing to tell; empty where there are fewer than 3 groups.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    shared = shared_facts(grey)
    facts = {
        f"r2_{name}": shared[name].numpy() for name in NUISANCES if shared[name].unique().numel() > 1
    }
    if len(set(groups)) < 3 or not facts:
        return {}
    wanted = np.column_stack([*facts.values()])
    # All facts at once, since the decomposition of the features takes nearly all the time.
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 6), alpha_per_target=True))
    found = cross_val_predict(model, features, wanted, groups=groups, cv=GroupKFold(3))
    scores = r2_score(wanted, found.reshape(wanted.shape), multioutput="raw_values")
    return dict(zip(facts, scores.tolist(), strict=True))
