"""What is used of lightly, imported without timm.

lightly imports timm wherever it is installed, for parts that nobody asks for here, and timm imports
wandb: a second of every start, and more on a cluster's file system. While lightly is imported there is
no timm; afterwards --backbone timm:NAME finds it.
"""

from __future__ import annotations

import sys

missing = "timm" not in sys.modules
if missing:
    sys.modules["timm"] = None  # type: ignore[assignment] # import then raises ImportError
try:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.loss.vicreg_loss import VICRegLoss, invariance_loss, variance_loss
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import (
        deactivate_requires_grad,
        get_weight_decay_parameters,
        update_momentum,
    )
    from lightly.utils.dist import gather
    from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule
finally:
    if missing:
        del sys.modules["timm"]

__all__ = [
    "BYOLPredictionHead",
    "BYOLProjectionHead",
    "NegativeCosineSimilarity",
    "VICRegLoss",
    "cosine_schedule",
    "cosine_warmup_schedule",
    "deactivate_requires_grad",
    "gather",
    "get_weight_decay_parameters",
    "invariance_loss",
    "update_momentum",
    "variance_loss",
]
