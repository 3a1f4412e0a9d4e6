"""A set of images that a test may change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def root(image_folder, tmp_path) -> Path:
    """A copy of the shared folder."""
    shutil.copytree(image_folder, tmp_path / "set")
    return tmp_path / "set"
