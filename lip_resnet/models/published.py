"""What the published LIP networks share: the authors' files, timm's description, and the renaming of released keys."""

import re
from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

RELEASED_FOLDER = "https://drive.google.com/drive/folders/1KCt22JTob1hHiPmpLOlgZo3fvTRc11SJ"
"""Where the authors' weights are (README of github.com/sebgao/LIP)."""
RELEASED = {
    "lip_resnet50": "lip_resnet-50.pth",
    "lip_resnet101": "lip_resnet-101.pth",
    "lip_densenet121": "lip_densenet_121.pth",
}
"""Network -> the authors' file of its weights."""

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


def explain_no_weights(name: str) -> str:
    """One line on where the weights of a LIP network are, for timm has none to download."""
    if name not in RELEASED:
        return f"no weights of {name} are released, only of {', '.join(RELEASED)}: {RELEASED_FOLDER}"
    return (
        f"timm has no weights of {name}; the authors' are {RELEASED[name]} of {RELEASED_FOLDER}: python "
        "scripts/fetch_released.py DIR downloads and verifies it, and lip_resnet.load_weights(model, FILE) loads it"
    )


def check_source(name: str, pretrained: bool, keywords: Mapping[str, Any]) -> None:
    """Check that ``pretrained=True`` names weights, as timm's ``local-dir:``, ``hf-hub:`` and overlays do.

    Raises:
        RuntimeError: it does not, as timm raises.
    """
    if pretrained and not keywords.get("pretrained_cfg") and not keywords.get("pretrained_cfg_overlay"):
        raise RuntimeError(explain_no_weights(name))


def rename_keys(state_dict: dict[str, Any], renames: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """A copy of a state dict with every (pattern, replacement) applied to its keys, in order."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
