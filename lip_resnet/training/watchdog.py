"""Runs that hang: every process's stacks in the run folder, one line that says which rank and where, and an end."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import BinaryIO

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.files import write_atomically

EXIT = 124
NATIVE = 60.0
"""Seconds after which faulthandler takes over."""
PHASES = ("loading", "forward", "backward", "update", "log")
"""Of a step, in order."""


class Watchdog:
    """A context in which a step that takes too long ends the process.

    A thread watches the main one. It writes ``hang-rankN.txt``: a line of JSON, then the stacks of all threads. The
    lowest rank that can still speak prints who is behind the others. Where even that thread cannot run, because native
    code holds the interpreter, Python's own faulthandler prints the stacks a minute later and ends the process.

    It watches from ``step`` to ``rest``: evaluations, checkpoints and compilations take their time.

    Args:
        folder: the run folder, which all processes share.
        minutes: the longest time for a step; 0 watches nothing.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.limit = folder, 60 * minutes
        self._poll = min(5.0, self.limit / 10)
        self._launch = distributed.broadcast_object(time.time())
        self._step = self._phase = 0
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.limit:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self.limit:
            self._thread.join()

    def step(self, step: int) -> None:
        """Optimizer step ``step`` begins, or the one before has ended: the clock starts again."""
        self._step, self._phase, self._since = step, 0, time.monotonic()

    def note(self, phase: str) -> None:
        """The step has come to one of ``PHASES``."""
        self._phase = PHASES.index(phase)

    def rest(self) -> None:
        """Watch nothing until the next ``step``."""
        self._since = None

    def _watch(self) -> None:
        # faulthandler's timer must lie with a thread that beats: while it does, the timer never fires.
        try:
            while not self._closed.wait(self._poll):
                since = self._since
                if since is None:
                    faulthandler.cancel_dump_traceback_later()
                    continue
                faulthandler.dump_traceback_later(self.limit + NATIVE, exit=True)
                if time.monotonic() - since > self.limit:
                    try:
                        self._end(time.monotonic() - since)
                    finally:  # whatever could not be told
                        os._exit(EXIT)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, seconds: float) -> None:
        frame = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])[-1]
        mine = {
            "rank": distributed.rank(),
            "step": self._step,
            "phase": PHASES[self._phase],
            "where": f"{frame.name} ({frame.filename}:{frame.lineno})",
            "waits": "distributed" in Path(frame.filename).as_posix().rpartition("/torch/")[2],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "seconds": round(seconds, 1),
            "launch": self._launch,
        }

        def write(file: BinaryIO) -> None:
            file.write(json.dumps(mine).encode() + b"\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

        try:
            write_atomically(self.folder / f"hang-rank{distributed.rank()}.txt", write)
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
        time.sleep(2 * self._poll + 1)  # the others' clocks end a little later
        told = {**_told(self.folder, self._launch), distributed.rank(): mine}
        if distributed.rank() == min(told):
            print(self._line(told), file=sys.stderr, flush=True)
        else:
            time.sleep(self._poll + 1)  # the launcher ends the others once one has left

    def _line(self, told: dict[int, dict]) -> str:
        silent = [rank for rank in range(distributed.world_size()) if rank not in told]
        places = {rank: (each["step"], PHASES.index(each["phase"])) for rank, each in told.items()}
        behind = sorted(rank for rank, place in places.items() if place == min(places.values()))
        # Side by side in one phase: those that are inside a collective wait for those that are not.
        behind = [rank for rank in behind if not told[rank]["waits"]] or behind
        text = f"error: no step has ended for {self.limit:g} s; "
        if silent:
            text += f"rank {', '.join(map(str, silent))} does not answer; "
        elif len(behind) < len(told) or len(told) == 1:
            text += f"rank {', '.join(map(str, behind))} hangs; "
        else:
            text += "no rank is behind the others; "
        for rank in behind[:4]:
            each = told[rank]
            text += f"rank {rank} ({each['host']}) is at step {each['step']}, {each['phase']}, in {each['where']}; "
        return text + f"stacks: {self.folder}/hang-rank*.txt"


def _told(folder: Path, launch: float) -> dict[int, dict]:
    """What the ranks of this launch have written, by rank."""
    found = {}
    for path in folder.glob("hang-rank*.txt"):
        with open(path, encoding="utf-8") as file:
            each = json.loads(file.readline())
        if each["launch"] == launch:
            found[each["rank"]] = each
    return found
