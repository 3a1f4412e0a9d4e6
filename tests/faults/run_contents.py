"""What a run folder holds, read by zipfile's checksums and torch.load and not by the code under test."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from processes import RECIPE

_TRAIN = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["train"]
INTERVAL = _TRAIN["checkpoint_steps"]
EPOCH = 15
"""Steps: 1,442 digits in batches of 96, the rest dropped."""
TOTAL = _TRAIN["epochs"] * EPOCH

STATE = ("model", "ema", "optimizer", "scaler", "window", "step", "best")
"""The entries of a checkpoint that must be equal."""
TIMES = ("train/images_per_second", "train/data_wait")
"""The only numbers of metrics.jsonl that may differ."""


def read_whole(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content if every checksum in it holds, else None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, EOFError):
        return None


@dataclass(frozen=True)
class Inventory:
    """The files of a run folder at one moment."""

    steps: dict[str, int]
    """Whole checkpoints: name -> step."""
    damaged: list[str]
    """Files under their final names that cannot be read."""
    logged: int
    """The last step in metrics.jsonl."""

    @property
    def newest(self) -> int:
        """The step from which the run can go on: last.pt's, or the newest other's where that is not whole."""
        return self.steps.get("last.pt", max(self.steps.values(), default=0))


def take_inventory(folder: Path) -> Inventory:
    """Read everything in a run folder."""
    steps, damaged, by_inode = {}, [], {}
    for path in sorted((folder / "checkpoints").glob("[!.]*.pt")):
        try:
            inode = path.stat().st_ino  # the names are links to one file
        except FileNotFoundError:  # a living process has just removed it
            continue
        if inode not in by_inode:
            by_inode[inode] = read_whole(path)
        if by_inode[inode] is None:
            damaged.append(path.name)
        else:
            steps[path.name] = by_inode[inode]["step"]
    for name, parse in (("config.yaml", yaml.safe_load), ("env.json", parse_json)):
        path = folder / name
        try:
            if path.exists() and not isinstance(parse(path.read_text(encoding="utf-8")), dict):
                damaged.append(name)
        except (ValueError, yaml.YAMLError):
            damaged.append(name)
    if read_metrics(folder)[1]:
        damaged.append("metrics.jsonl")
    return Inventory(steps, damaged, logged_step(folder))


def lost_between(before: Inventory, now: Inventory) -> list[str]:
    """Files that a fault has cost: damaged ones, and names that were there with nothing as new in their place."""
    lost = list(now.damaged)
    for name in ("last.pt", "best.pt"):
        if name in before.steps and now.steps.get(name, -1) < before.steps[name] and name not in lost:
            lost.append(name)
    if now.newest < before.newest:
        lost.append(f"step {before.newest}")
    return lost


def parse_json(text: str) -> Any:
    """Strict JSON: NaN and infinity are a ValueError."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of metrics.jsonl, and whether one before the last is damaged; the last can be half written."""
    path = folder / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(parse_json(text))
        except ValueError:
            return lines, number < len(texts)
    return lines, False


def logged_step(folder: Path, tag: str = "step") -> int:
    """The last step in metrics.jsonl, of the lines that hold ``tag``."""
    return max((line["step"] for line in read_metrics(folder)[0] if tag in line), default=0)


def count_temporary_files(folder: Path) -> int:
    """Half-written files that were not cleaned away."""
    return len(list(folder.rglob(".*.tmp")))


def find_phase(folder: Path, started: float, pid: int) -> str:
    """What a process does, or did when it ended, from the traces in its run folder.

    Args:
        started: when the process was started, in seconds since 1970.
        pid: the process that writes checkpoints.
    """
    opened = folder / "env.json"
    if not opened.exists() or opened.stat().st_mtime < started:
        return "start-up"
    if list((folder / "checkpoints").glob(f".*.{pid}.tmp")):
        return "writing"
    logged, evaluated = logged_step(folder), logged_step(folder, "val/loss")
    if logged >= TOTAL and evaluated >= TOTAL:
        return "ending"
    return "evaluation" if logged and logged % EPOCH == 0 and evaluated < logged else "training"


def hash_run(folder: Path) -> str:
    """sha256 of a run's end: the states in last.pt and best.pt, and every number of metrics.jsonl but times.

    Raises:
        RuntimeError: a checkpoint is not whole.
    """
    digest = hashlib.sha256()
    for name in ("last.pt", "best.pt"):
        state = read_whole(folder / "checkpoints" / name)
        if state is None:
            raise RuntimeError(f"{name} is not whole at the end")
        _update(digest, {key: state[key] for key in STATE})
    for line in read_metrics(folder)[0]:
        _update(digest, {key: value for key, value in line.items() if key not in TIMES})
    return digest.hexdigest()


def hash_value(value: Any) -> str:
    """sha256 of numbers, strings, tensors, and dicts and lists of them."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        digest.update(b"{")
        for key in sorted(value, key=str):
            digest.update(f"{key!r}:".encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode())
