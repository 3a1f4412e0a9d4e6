"""train.py that kills itself inside a checkpoint write:  fault_child.py WRITER POINT NUMBER train.py's arguments

For the fault harness (scripts/faults.py). WRITER `safe` is the project's own; `naive` overwrites last.pt in place, as
many trainers do, and shows what the harness finds there. POINT `none` leaves the process alone.
"""

import builtins
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lip_resnet import checkpoint

POINTS = {
    "safe": ("open", "half written", "fsync", "rename", "fsync of the folder", "link", "unlink"),
    "naive": ("open", "half written", "close"),
}


class Killer:
    """Dies by SIGKILL when ``point`` is reached for the ``number``-th time in a folder called checkpoints."""

    def __init__(self, point: str, number: int) -> None:
        self.point, self.left = point, number

    def reach(self, point: str, path: Any) -> bool:
        """Whether to die now."""
        if point == self.point and Path(os.fsdecode(path)).parent.name == "checkpoints":
            self.left -= 1
        return self.left == 0

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at(self, point: str, path: Any) -> None:
        if self.reach(point, path):
            self.die()


class DyingFile:
    """A file whose fatal write puts down half of its bytes, and whose fatal close never comes."""

    def __init__(self, file: Any, killer: Killer, path: Any) -> None:
        self._file, self._killer, self._path = file, killer, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "DyingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._killer.at("close", self._path)
        self._file.close()

    def write(self, data: Any) -> int:
        if self._killer.reach("half written", self._path):
            self._file.write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
            self._file.flush()
            self._killer.die()
        return self._file.write(data)


def patch(killer: Killer) -> None:
    """Put the killer in front of every call that a checkpoint write is made of."""
    opened, fsync = builtins.open, os.fsync

    def dying_open(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        file = opened(path, mode, *arguments, **keywords)
        if mode != "wb" or isinstance(path, int):
            return file
        killer.at("open", path)
        return DyingFile(file, killer, path)

    def dying_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            killer.at("fsync of the folder", path / "any")
        else:
            killer.at("fsync", path)
        fsync(descriptor)

    def before(point: str, function: Callable[..., Any], which: int) -> Callable[..., Any]:
        def dying(*arguments: Any, **keywords: Any) -> Any:
            killer.at(point, arguments[which])
            return function(*arguments, **keywords)

        return dying

    builtins.open, os.fsync = dying_open, dying_fsync
    os.replace = before("rename", os.replace, 1)
    os.link = before("link", os.link, 1)
    os.unlink = before("unlink", os.unlink, 0)


def save_in_place(checkpoints: checkpoint.Checkpoints, payload: dict[str, Any], best: bool) -> None:
    """What the contrast does instead of ``Checkpoints.save``."""
    for name in ("last.pt", "best.pt")[: 1 + best]:
        with open(checkpoints.folder / name, "wb") as file:
            torch.save({"format": checkpoint.FORMAT, **payload}, file)


if __name__ == "__main__":
    writer, point, number = sys.argv[1:4]
    sys.argv = ["train.py", *sys.argv[4:]]
    if writer == "naive":
        checkpoint.Checkpoints.save = save_in_place
    if point != "none":
        patch(Killer(point, int(number)))
    runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
