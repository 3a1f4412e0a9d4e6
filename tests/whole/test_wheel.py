"""The wheel: built from the source archive, installed outside the repository, complete and usable from any folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

import lip_resnet

BUILD = """
import os, shutil, sys
from setuptools import build_meta
folder = sys.argv[1]
archive = build_meta.build_sdist(folder)
shutil.unpack_archive(os.path.join(folder, archive), folder)
os.chdir(os.path.join(folder, archive.removesuffix(".tar.gz")))
build_meta.build_wheel(folder)
"""
POOL = """
import lip_resnet, torch
from lip_resnet.ops.dispatch import available
x = torch.rand(2, 3, 9, 8)
averages = torch.nn.functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
torch.testing.assert_close(lip_resnet.lip2d(x, torch.zeros_like(x)), averages)
print(lip_resnet.__file__, lip_resnet.__version__, available("cpu"))
"""
SMALL = (
    *("data.name=synthetic", "data.batch_size=8", "data.eval_batch_size=8", "data.workers=0"),
    *("data.images=160", "train.max_steps=2", "train.epochs=1", "train.log_every=1", "optim.warmup_epochs=0"),
)


def run(*command: object, cwd: Path) -> str:
    """Run a command that sees neither the repository nor the user's packages; return its standard output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE", "lip_commands.py"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "lip_resnet"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-c", BUILD, built, cwd=source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; its dependencies are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # a path in a .pth file is searched last, and .pth files in it, such as that of an editable install, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_wheel_is_complete(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.cpp", "*.h", "*.yaml", "*.mplstyle", "py.typed")
    package = {str(path.relative_to(ROOT)) for kind in kinds for path in (ROOT / "lip_resnet").rglob(kind)}
    recipes = {f"lip_resnet/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert names == {"lip_commands.py"} | package | recipes
    assert wheel.name.startswith(f"lip_resnet-{lip_resnet.__version__}-")


def test_version_is_the_cited_one():
    assert f"\nversion: {lip_resnet.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_installed_package_pools(environment, tmp_path):
    file, version, compiled = run(environment / "bin" / "python", "-c", POOL, cwd=tmp_path).split()
    assert Path(file).is_relative_to(environment)
    assert version == lip_resnet.__version__
    assert compiled == "True"


@pytest.mark.slow
def test_installed_commands(environment, tmp_path):
    run(environment / "bin" / "lip-train", "--config", "cifar10/lip_resnet18", *SMALL, cwd=tmp_path)
    folder = tmp_path / "runs" / "cifar10" / "lip_resnet18"
    printed = run(environment / "bin" / "lip-eval", "--checkpoint", folder, cwd=tmp_path)
    assert "* Acc@1 " in printed
    assert json.loads((folder / "eval.json").read_text())["images"] == 16
