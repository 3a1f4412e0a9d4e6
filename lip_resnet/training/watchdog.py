"""Ends a run that hangs: the stacks of every process in the run folder, and one line that names rank and place."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from lip_resnet import distributed
from lip_resnet.compat import stack_frames
from lip_resnet.errors import InputError
from lip_resnet.files import to_json, write_atomically

EXIT_CODE = 124
"""As of ``timeout``."""
FAULTHANDLER_SECONDS = 60.0
"""If the watchdog's thread cannot run, faulthandler ends the process this long after the limit."""
PHASES = ("loading", "forward", "backward", "update", "log")
"""The phases of a step, in order."""


class Watchdog:
    """A context in which a step that takes too long ends the process.

    A thread watches the main thread. It writes ``hang-rankN.txt``: a line of JSON, then the stacks of all threads. The
    lowest rank that still responds prints which ranks are behind the others. If native code holds the interpreter lock,
    so that the thread cannot run, Python's faulthandler prints the stacks a minute later and ends the process.

    The clock runs from ``step`` to ``pause``: evaluations, checkpoints and compilations are not timed.

    Args:
        folder: the run folder, which all processes share.
        minutes: the longest time that a step may take; 0 disables the watchdog.
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
        """Restart the clock: optimizer step ``step`` (from 1) begins."""
        self._step, self._phase, self._since = step, 0, time.monotonic()

    def set_phase(self, phase: str) -> None:
        """The step has entered a phase, one of ``PHASES``."""
        self._phase = PHASES.index(phase)

    def pause(self) -> None:
        """Stop the clock until the next ``step``."""
        self._since = None

    def _watch(self) -> None:
        # This thread keeps postponing faulthandler's timer, which fires only if the thread cannot run.
        try:
            while not self._closed.wait(self._poll):
                since = self._since
                if since is None:
                    faulthandler.cancel_dump_traceback_later()
                    continue
                faulthandler.dump_traceback_later(self.limit + FAULTHANDLER_SECONDS, exit=True)
                if time.monotonic() - since > self.limit:
                    try:
                        self._report(time.monotonic() - since)
                    finally:  # the process ends even if the report fails
                        os._exit(EXIT_CODE)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _report(self, seconds: float) -> None:
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        frame = traceback.extract_stack(stack_frames()[main_thread])[-1]
        report = {
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
            file.write(to_json(report).encode() + b"\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

        try:
            write_atomically(self.folder / f"hang-rank{distributed.rank()}.txt", write)
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
        time.sleep(2 * self._poll + 1)  # the other ranks' watchdogs expire a little later
        reports = {**_read_reports(self.folder, self._launch), distributed.rank(): report}
        if distributed.rank() == min(reports):
            print(self._summarize(reports), file=sys.stderr, flush=True)
        else:
            time.sleep(self._poll + 1)  # torchrun kills all ranks when one exits: let that rank print first

    def _summarize(self, reports: dict[int, dict[str, Any]]) -> str:
        silent = [rank for rank in range(distributed.world_size()) if rank not in reports]
        progress = {rank: (report["step"], PHASES.index(report["phase"])) for rank, report in reports.items()}
        behind = sorted(rank for rank, reached in progress.items() if reached == min(progress.values()))
        # Among ranks in the same phase, those inside a collective wait for the others.
        behind = [rank for rank in behind if not reports[rank]["waits"]] or behind
        text = f"error: no step has ended for {self.limit:g} s; "
        if silent:
            text += f"rank {', '.join(map(str, silent))} does not answer; "
        elif len(behind) < len(reports) or len(reports) == 1:
            text += f"rank {', '.join(map(str, behind))} hangs; "
        else:
            text += "no rank is behind the others; "
        for rank in behind[:4]:
            report = reports[rank]
            text += (
                f"rank {rank} ({report['host']}) is at step {report['step']}, {report['phase']}, in {report['where']}; "
            )
        return text + f"stacks: {self.folder}/hang-rank*.txt"


def _read_reports(folder: Path, launch: float) -> dict[int, dict[str, Any]]:
    """The first lines of this launch's hang files, by rank."""
    reports = {}
    for path in folder.glob("hang-rank*.txt"):
        with open(path, encoding="utf-8") as file:
            report = json.loads(file.readline())
        if report["launch"] == launch:
            reports[report["rank"]] = report
    return reports
