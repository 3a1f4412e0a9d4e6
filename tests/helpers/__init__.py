"""What several test files share: a small recipe, a picture, and Python in a process of its own."""

import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lip_resnet.config import Config
from lip_resnet.recipe import parse_config

ROOT = Path(__file__).parents[2]


def _version(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package; (0, 0) if it is not installed."""
    try:
        return tuple(map(int, metadata.version(package).split(".")[:2]))
    except metadata.PackageNotFoundError:
        return 0, 0


OLD_EXPORT = _version("torch") < (2, 12)
"""torch.export of 2.11 guards a dynamic size by the sample's remainder in every division by a stride."""

old_interpreter = pytest.mark.skipif(
    _version("triton") < (3, 8) and _version("numpy") >= (2, 5),
    reason="Triton's interpreter before 3.8 takes int() of arrays of one element, which numpy 2.5 refuses",
)
"""For tests that run a kernel whose loops have bounds from arguments in Triton's interpreter."""


def small_config(**changes: object) -> Config:
    """A tiny timm network on the digits; ``optim__lr=0.1`` changes optim.lr."""
    tree: dict = {
        "model": {"name": "test_resnet", "num_classes": 10},
        "data": {
            **{"name": "digits", "batch_size": 64, "eval_batch_size": 50, "workers": 0},
            **{"size": 32, "eval_size": 32, "eval_resize": 32, "flip": 0.0},
        },
        "optim": {"lr": 0.05},
        "train": {"epochs": 2, "log_every": 5},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return parse_config(tree, "test")


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and a little grain: what JPEG is made for."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[:, width // 3 :] = 255 - pixels[:, width // 3 :]
    return Image.fromarray(np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, with this package and the tests' folder on its path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
