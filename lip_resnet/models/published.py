"""What the published LIP networks share: timm's description of them, and the renaming of the released keys."""

import re
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
    "paper_ids": "arXiv:1908.04156",
    "origin_url": "https://github.com/sebgao/LIP",
}


def rename_keys(state_dict: dict[str, Any], renames: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """A copy of a state dict with every (pattern, replacement) applied to its keys, in order."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
