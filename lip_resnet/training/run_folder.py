"""The run folder: who may write it, and from which of its checkpoints a run goes on."""

import fcntl
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lip_resnet import checkpoint
from lip_resnet.config import Config, Effect, InputError
from lip_resnet.recipe import load_config
from lip_resnet.training.checkpoints import Checkpoints

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""Names that ``checkpoint.write_atomically`` gives to half-written files; no other file is removed."""


def check_same_recipe(config: Config, other: Config, where: str) -> None:
    """Refuse to continue a run under a recipe that trains other weights.

    Of the keys that change the weights only ``train.max_steps`` may differ: it says where a run stops, not how it
    gets there.

    Raises:
        InputError: the first key that differs.
    """
    ours, theirs = config.values(Effect.WEIGHTS), other.values(Effect.WEIGHTS)
    for key, value in ours.items():
        if key != "train.max_steps" and value != theirs[key]:
            raise InputError(
                f"{where} was trained with {key}={theirs[key]}, this recipe says {value}; choose another --output"
            )


@dataclass(frozen=True)
class Opened:
    """A run folder that this run may write."""

    source: Path | None
    """The checkpoint to continue from; None for a fresh start."""
    notes: list[str]
    """What the user should know: checkpoints that were skipped."""


def will_continue(folder: Path, resume: str) -> bool:
    """Whether ``open_run`` will return a checkpoint to continue from, if it does not refuse."""
    checkpoints = folder / "checkpoints"
    present = (checkpoints / "last.pt").exists() or any(checkpoints.glob("step-*.pt"))
    return present if resume == "auto" else resume != "none"


def open_run(folder: Path, config: Config, resume: str) -> Opened:
    """Decide where a run writes and from which checkpoint it continues; nothing is ever overwritten.

    Args:
        folder: the run folder, new or empty unless ``resume`` continues the run in it.
        resume: "none" starts; "auto" continues the run in ``folder``, if there is one, from its newest checkpoint that
            is whole; else a checkpoint's path.

    Raises:
        InputError: the folder holds another run or other files, another process writes it, or there is nothing to
            continue from.
    """
    recipe, checkpoints = folder / "config.yaml", folder / "checkpoints"
    occupied = _is_occupied(folder)
    source = None if resume in ("none", "auto") else checkpoint.resolve(resume)
    continues = resume == "auto" or (source is not None and source.parent.resolve() == checkpoints.resolve())
    if occupied and not recipe.is_file():
        raise InputError(f"--output {folder} exists and is not a run; choose another")
    if occupied and not continues:
        raise InputError(f"--output {folder} already holds a run; continue it with --resume auto or choose another")
    if occupied:
        check_same_recipe(config, load_config(recipe), str(folder))
    if source is not None and not source.is_file():
        raise InputError(f"--resume {resume}: no such checkpoint")
    notes: list[str] = []
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _locks.append(_lock(folder))
        for written in (folder, checkpoints, folder / "nonfinite"):
            for path in written.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):  # of a process that was killed: the lock says that it has ended
                    path.unlink()
        (folder / "requeue").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot write there: {error.strerror}") from error
    try:
        found = Checkpoints(checkpoints, keep=1)
        if source is None:
            source, skipped = found.newest_whole()
            notes = [f"skipped {line}" for line in skipped]
            if skipped:
                notes.append(f"continuing from {source}")
        elif continues and (newer := found.newer_than(source)) is not None:
            raise InputError(
                f"--resume {resume}: this run has gone on to {newer}; continue with --resume auto, or go back to it "
                "in another --output"
            )
    except InputError:
        _locks.pop().close()
        raise
    return Opened(source, notes)


def _is_occupied(folder: Path) -> bool:
    """Whether there are files of a run or of others; what a start leaves that ended early is nobody's."""
    nobodys = re.compile(rf"\.lock|requeue|{_TEMPORARY.pattern}")
    try:
        files = folder.rglob("*") if folder.is_dir() else [folder] if folder.exists() else []
        return any(not path.is_dir() and not nobodys.fullmatch(path.name) for path in files)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}") from error


def request_requeue(folder: Path) -> None:
    """Leave a file ``requeue``, which tells launch files that there is more to do; the next start removes it.

    A run that was stopped before it opened its folder does so too, unless another process or other files are there.
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


LOCK_SECONDS = 15  # longer than orphaned processes live
_locks: list[TextIO] = []  # held until the process ends, however it ends


def _lock(folder: Path) -> TextIO:
    """Hold the folder until this process ends. torchrun may restart a run while its old processes still die."""
    file = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    patience = time.monotonic() + (LOCK_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() >= patience:
                file.close()
                raise InputError(f"--output {folder} is being written by another process") from error
            time.sleep(0.2)
