"""The run folder: which process may write it, and from which of its checkpoints a run continues."""

import fcntl
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lip_resnet import checkpoint
from lip_resnet.config import Effect, Recipe
from lip_resnet.data.sources import folder as folder_set
from lip_resnet.errors import InputError
from lip_resnet.recipe import load_recipe, of_task
from lip_resnet.training.checkpoints import Checkpoints

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""Names of the temporary files of ``files.write_atomically``; no other file is ever removed."""


def check_same_recipe(config: Recipe, other: Recipe, where: str, advice: str = "choose another --output") -> None:
    """Refuse to continue a run with a recipe that would train other weights.

    ``train.max_steps``, which only says where a run stops, is the one key with an effect on weights that may differ.

    Args:
        config: this start's recipe.
        other: the recipe of the run.
        where: names the run in errors.
        advice: what to do, other than to continue with the run's value.

    Raises:
        InputError: a key differs, and the message names the first; or it is of another task.
    """
    of_task(other, type(config), where)
    ours, theirs = config.values(Effect.WEIGHTS), other.values(Effect.WEIGHTS)
    for key, value in ours.items():
        if key != "train.max_steps" and value != theirs[key]:
            raise InputError(
                f"{where} was trained with {key}={theirs[key]}, this recipe says {value}; {advice}, or continue "
                f"it with {key}={json.dumps(theirs[key])}"
            )


@dataclass(frozen=True)
class Opened:
    """A run folder that this run may write."""

    source: Path | None
    """The checkpoint to continue from; None for a fresh start."""
    notes: list[str]
    """Lines for the user: which damaged checkpoints were skipped."""


def will_continue(folder: Path, resume: str) -> bool:
    """Whether ``open_run`` would return a checkpoint to continue from, unless it raises."""
    checkpoints = folder / "checkpoints"
    present = (checkpoints / "last.pt").exists() or any(checkpoints.glob("step-*.pt"))
    return present if resume == "auto" else resume != "none"


def read_selection(path: str, folder: Path, resume: str) -> str:
    """The content of the file ``data.classes``; where it is gone, the content in the checkpoint to continue from.

    Raises:
        InputError: there is neither.
    """
    if not Path(path).is_file() and will_continue(folder, resume):
        source = checkpoint.resolve(resume)
        if resume == "auto":
            source = Checkpoints(folder / "checkpoints", keep=1).newest_whole()[0] or source
        recorded = checkpoint.load(source).get("selection")
        if isinstance(recorded, str):
            return recorded
    return folder_set.read_selection(path)


def check_vacant(folder: Path) -> None:
    """Check that a new run can be written to ``folder``.

    Raises:
        InputError: it holds a run or other files.
    """
    if _is_occupied(folder):
        if not (folder / "config.yaml").is_file():
            raise InputError(f"--output {folder} exists and is not a run; choose another")
        raise InputError(f"--output {folder} already holds a run; continue it with --resume auto or choose another")


def open_run(folder: Path, config: Recipe, resume: str) -> Opened:
    """Lock and prepare a run folder, and choose the checkpoint to continue from; no run is ever overwritten.

    Args:
        folder: the run folder, new or empty unless ``resume`` continues the run in it.
        resume: "none": start a new run; "auto": continue the run in ``folder``, if there is one, from its newest intact
            checkpoint; else the path of a checkpoint to continue from.

    Raises:
        InputError: the folder holds another run or other files, another process writes it, or the checkpoint to
            continue from is missing or damaged.
    """
    recipe, checkpoints = folder / "config.yaml", folder / "checkpoints"
    occupied = _is_occupied(folder)
    source = None if resume in ("none", "auto") else checkpoint.resolve(resume)
    continues = resume == "auto" or (source is not None and source.parent.resolve() == checkpoints.resolve())
    if not continues or not recipe.is_file():
        check_vacant(folder)
    if occupied:
        check_same_recipe(config, load_recipe(recipe), str(folder))
    if source is not None and not source.is_file():
        raise InputError(f"--resume {resume}: no such checkpoint")
    notes: list[str] = []
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _locks.append(_lock(folder))
        for written in (folder, checkpoints, folder / "nonfinite"):
            for path in written.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):  # left by a killed process; none is alive, since we hold the lock
                    path.unlink()
        (folder / "requeue").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot write there: {error.strerror}") from error
    try:
        existing = Checkpoints(checkpoints, keep=1)
        if source is None:
            source, skipped = existing.newest_whole()
            notes = [f"skipped {line}" for line in skipped]
            if skipped:
                notes.append(f"continuing from {source}")
        elif continues and (newer := existing.newer_than(source)) is not None:
            raise InputError(
                f"--resume {resume}: this run has gone on to {newer}; continue with --resume auto, or go back to it "
                "in another --output"
            )
    except InputError:
        _locks.pop().close()
        raise
    return Opened(source, notes)


def _is_occupied(folder: Path) -> bool:
    """Whether the folder holds files other than those that a start leaves when it ends before its first step."""
    leftover = re.compile(rf"\.lock|requeue|{_TEMPORARY.pattern}")
    try:
        files = folder.rglob("*") if folder.is_dir() else [folder] if folder.exists() else []
        return any(not path.is_dir() and not leftover.fullmatch(path.name) for path in files)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}") from error


def request_requeue(folder: Path) -> None:
    """Create the file ``requeue``, which tells a launch script to start the command again; the next start removes it.

    If the run was stopped before ``open_run``, this locks the folder first, and creates nothing if another process has
    locked it or if it holds files that are not a run's.
    """
    try:
        if not _locks:
            if _is_occupied(folder) and not (folder / "config.yaml").is_file():
                return
            folder.mkdir(parents=True, exist_ok=True)
            _locks.append(_lock(folder))
        (folder / "requeue").touch()
    except (InputError, OSError) as error:
        print(f"warning: {folder / 'requeue'}: cannot write: {error}", file=sys.stderr)


LOCK_SECONDS = 15
"""How long a process of torchrun waits for the lock: longer than the processes of an earlier start outlive it."""
_locks: list[TextIO] = []  # open until the process ends: the kernel then releases the locks


def _lock(folder: Path) -> TextIO:
    """Lock the folder until this process ends. torchrun may restart a run while its old processes are still exiting."""
    file = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    deadline = time.monotonic() + (LOCK_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                file.close()
                raise InputError(f"--output {folder} is being written by another process") from error
            time.sleep(0.2)
