"""Shared by all tests: a small image folder, a small recipe, Python in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lip_resnet.config import Config
from lip_resnet.recipe import parse_config

ROOT = Path(__file__).parents[1]

# Tests run side by side, a process a core: OpenMP threads that wait for each other would cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """root/{train,val}/{ant,bee,cat}: 23 and 11 photographs of coloured noise, of differing sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, images in (("train", 23), ("val", 11)):
        for index in range(images):
            label = index % 3
            folder = root / split / ("ant", "bee", "cat")[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 120, (40 + index, 60 - index, 3), dtype=np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(folder / f"{folder.name}_{index}.JPEG", quality=95)
    return root


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


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, with this package and the tests' folder on its path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: they are the longest, and must not be what everything else waits for at the end."""
    items.sort(key=lambda item: item.path.name != "test_runs.py")
