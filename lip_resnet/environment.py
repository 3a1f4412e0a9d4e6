"""The environment of a measurement: versions, hardware, command and commit."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import lip_resnet
from lip_resnet import distributed


def describe_environment(device: str | None = None) -> dict[str, Any]:
    """Versions, hardware, command and commit, for env.json and rows.

    Args:
        device: "cuda", "mps" or "cpu", the one to describe; by default this process's.
    """
    device = device or distributed.device().type
    gpu = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        **_describe_commit(Path(__file__)),
        "hardware": torch.cuda.get_device_name() if gpu else _cpu_name() + (", MPS" if device == "mps" else ""),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "lip_resnet": lip_resnet.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda if gpu else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _describe_commit(source: Path) -> dict[str, Any]:
    """The commit of the repository that tracks ``source``, and whether its tracked files are modified.

    None if no repository tracks it: an installed package can be inside the folder of an unrelated repository.
    """

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=source.parent, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None:
        return {"git_commit": None, "git_dirty": False}
    dirty = git("status", "--porcelain", "--untracked-files=no")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(dirty)}
