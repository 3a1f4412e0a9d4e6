"""Signals and intervals: after which step all processes save a checkpoint, and after which they stop."""

import os
import signal
import time
from types import FrameType

from lip_resnet import distributed
from lip_resnet.errors import Stopped

REPORT, SAVE, STOP = 1, 2, 3
"""Report a checkpoint write that failed; save; save and stop. A save reports the write before it too."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupts:
    """A context in which SIGTERM, SIGINT and SIGUSR1 ask for a stop instead of ending the process.

    Schedulers send them before they preempt a machine, and not to all processes during the same step: ``after_step``
    returns the same action on every process. Before ``begin`` there is nothing to save, and a signal raises ``Stopped``
    at once.

    Args:
        steps: save every so many steps; 0 is off.
        minutes: save when so many minutes have passed since the last save of this kind or of ``steps``; 0 is off.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.minutes = steps, minutes
        self.received: str | None = None
        self._training = False
        self._process = os.getpid()
        self._maximum = distributed.DelayedMaximum()
        self._saved = time.monotonic()

    def __enter__(self) -> "Interrupts":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._maximum.flush()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # in a loader worker that has just been forked: it ends with its parent
            return
        first, self.received = self.received is None, signal.Signals(number).name
        if first and not self._training:
            self._stop()

    def _stop(self) -> None:
        raise Stopped(f"{self.received} before the first step; there was nothing to save")

    def begin(self) -> None:
        """Training begins: from now on a signal lets the current step finish and be saved.

        Raises:
            Stopped: a signal came earlier, and a library caught the ``Stopped`` that it raised.
        """
        self._training = True
        if self.received:
            self._stop()

    def after_step(self, step: int, failed: bool = False) -> int:
        """0, REPORT, SAVE or STOP, the same on every process. A collective: each calls it once after every step.

        Signals and clocks are local to a process: with several processes they act one step later, by a non-blocking
        all-reduce. The number of steps is the same on every process and acts at once.

        ``failed`` says that this process could not write a checkpoint.
        """
        by_steps = self.steps and step % self.steps == 0
        by_minutes = self.minutes and distributed.is_main() and time.monotonic() - self._saved >= 60 * self.minutes
        if by_steps or by_minutes:
            self._saved = time.monotonic()
        own = STOP if self.received else SAVE if by_minutes and not by_steps else REPORT if failed else 0
        return max(SAVE if by_steps else 0, self._maximum(own))

    def synchronize(self) -> int:
        """Between steps: the action that is still pending on any process. Waits for all processes."""
        previous = self._maximum(STOP if self.received else 0)
        return max(previous, self._maximum.flush())
