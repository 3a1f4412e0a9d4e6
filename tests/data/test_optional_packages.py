"""Packages of the extras `data` and `gpu_decode`: imported where they are used; an error in one line if missing."""

import ast
import sys

import pytest
from helpers import ROOT
from helpers.sets import folder_config
from prepare import archives
from scipy.io import savemat
from torchvision.datasets import SVHN

from lip_resnet.config import InputError
from lip_resnet.data import build_sources

OPTIONAL = {"aiohttp", "captum", "datasets", "fsspec", "nvidia", "s3fs", "scipy", "sklearn"}


def test_no_module_imports_them_at_its_top():
    for path in (*(ROOT / "lip_resnet").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")):
        imported = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert not OPTIONAL & {name.split(".")[0] for name in imported if name}, path


@pytest.mark.parametrize(
    ("module", "root", "name", "package"),
    [
        ("sklearn.datasets", None, "digits", "scikit-learn"),
        ("datasets", "some/set", "huggingface", "the package datasets"),
        ("fsspec", "http://127.0.0.1:1/set", "shards", "http and s3"),
        ("s3fs", "s3://bucket/set", "shards", "http and s3"),
        ("scipy.io", "SVHN", "svhn", "scipy"),
    ],
)
def test_a_missing_package_is_one_line(monkeypatch, tmp_path, module, root, name, package):
    if name == "svhn":  # scipy is only imported for files that are there
        root = tmp_path
        monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
        savemat(tmp_path / "train_32x32.mat", {})
    monkeypatch.setitem(sys.modules, module, None)
    config = folder_config(root or tmp_path, name=name)
    with pytest.raises(InputError, match=rf"{package}.*pip install \"lip-resnet\[data\]\"") as caught:
        build_sources(config, 10, ("train",))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_the_devkit_needs_scipy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"scipy: pip install \"lip-resnet\[data\]\""):
        archives.read_devkit(tmp_path / "devkit.tar.gz")
