"""Processes that do not outlive the one that started them, whatever ended it."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time

SECONDS = 1.0


def end_with(parent: int) -> None:
    """End this process within seconds of the end of process ``parent``, which has started it.

    A process that is killed outright can tell nobody. torchrun's processes would train on without it, and loader
    processes would wait for ever for room in a pipe that nobody reads.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS)
        # Loader processes need not tell; and whoever read our errors may be gone too.
        with contextlib.suppress(OSError, ValueError):
            if multiprocessing.parent_process() is None:
                print(f"process {os.getpid()}: its parent {parent} is gone; it ends", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
