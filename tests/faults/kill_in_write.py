"""train.py that kills itself inside a checkpoint write:  kill_in_write.py POINT NUMBER train.py's arguments

POINT is a call of the write, one of POINTS; NUMBER says which of these calls is the last.
"""

import builtins
import io
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = ("open", "half written", "fsync", "rename", "fsync of the folder", "link", "unlink")


def wrap_calls(fatal: str, number: int) -> None:
    """Let the ``number``-th call ``fatal`` on a file in a folder ``checkpoints`` end this process by SIGKILL."""
    remaining = number
    original_open, original_fsync = builtins.open, os.fsync

    def is_fatal(point: str, path: Any) -> bool:
        nonlocal remaining
        if point == fatal and Path(os.fsdecode(path)).parent.name == "checkpoints":
            remaining -= 1
        return remaining == 0

    def check(point: str, path: Any) -> None:
        if is_fatal(point, path):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(point: str, function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            check(point, arguments[argument])
            return function(*arguments, **keywords)

        return wrapped

    def open_(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if mode == "wb" and not isinstance(path, int):
            check("open", path)
            if is_fatal("half written", path):
                return HalfWritten(path, mode)
        return original_open(path, mode, *arguments, **keywords)

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        check("fsync of the folder" if path.is_dir() else "fsync", path / "any" if path.is_dir() else path)
        original_fsync(descriptor)

    builtins.open, os.fsync = open_, fsync
    os.replace = before("rename", os.replace, 1)
    os.link = before("link", os.link, 1)
    os.unlink = before("unlink", os.unlink, 0)


class HalfWritten(io.FileIO):
    """A file whose first write stores half of its bytes and ends the process."""

    def write(self, data: Any) -> None:
        content = memoryview(data).cast("B")
        super().write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    point, number = sys.argv[1:3]
    sys.argv = ["train.py", *sys.argv[3:]]
    wrap_calls(point, int(number))
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
