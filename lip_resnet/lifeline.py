"""Processes that end when the process that started them ends, even if it was killed outright."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time

SECONDS = 1.0
"""Between two checks of the parent."""


def exit_with_parent(parent_pid: int | None = None) -> None:
    """End this process within seconds of the end of the process that started it.

    A process killed by SIGKILL cannot end its children: torchrun's ranks would train on without it, and loader workers
    would block on a full pipe for ever.

    For a child of ``multiprocessing``, the parent is the process that called ``Process.start()``. Under ``forkserver``
    the operating system's parent is the fork server instead, which lives as long as any of its children.

    Args:
        parent_pid: of the process that started this one, which may have ended before this call; by default the present
            parent.
    """
    parent, started_by = multiprocessing.parent_process(), parent_pid or os.getppid()

    def watch() -> None:
        # Under fork, a sibling can inherit the pipe behind is_alive() and keep it open: so getppid() is checked too.
        while os.getppid() == started_by and (parent is None or parent.is_alive()):
            time.sleep(SECONDS)
        with contextlib.suppress(OSError, ValueError):  # the reader of stderr may have ended too
            if parent is None:
                print(f"process {os.getpid()}: its parent {started_by} is gone; exiting", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
