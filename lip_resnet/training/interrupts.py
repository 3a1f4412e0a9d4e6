"""Signals and clocks: after which step all processes save, and after which they stop."""

import os
import signal
import time
from types import FrameType

from lip_resnet import distributed
from lip_resnet.errors import Stopped

SETTLE, SAVE, STOP = 1, 2, 3
"""Look at a write that has failed; save; save and stop. A save looks at the write before it anyway."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupts:
    """A context in which SIGTERM, SIGINT and SIGUSR1 ask for a stop instead of ending the process.

    Schedulers send them before they take a machine away, and not to all processes in the same step: ``after_step``
    gives every process the same answer. Before ``begin`` there is nothing to save, and they stop the command where
    it is, with ``Stopped``.

    Args:
        steps: ask for a save every so many steps; 0 never.
        minutes: ask for a save when so many minutes have passed since the last; 0 never.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.minutes = steps, minutes
        self.received: str | None = None
        self._training = False
        self._process = os.getpid()
        self._agree = distributed.Agreement()
        self._saved = time.monotonic()

    def __enter__(self) -> "Interrupts":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._agree.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader process that has just been forked: it follows its parent
            return
        again, self.received = self.received is not None, signal.Signals(number).name
        if not self._training and not again:
            self._stop()

    def _stop(self) -> None:
        raise Stopped(f"{self.received} before the first step; there was nothing to save")

    def begin(self) -> None:
        """From here on a step that has begun is finished and saved.

        Raises:
            Stopped: a signal has come, and the library that was at work has swallowed what it raised.
        """
        self._training = True
        if self.received:
            self._stop()

    def after_step(self, step: int, failed: bool = False) -> int:
        """0, SETTLE, SAVE or STOP: the same on every process, which all call it once after each of their steps.

        Signals and clocks are each process's own: with several processes their answer comes one step later, so that
        nobody waits for the others. A number of steps is known to all, and needs no agreement.

        ``failed`` says that this process could not write a checkpoint.
        """
        due = self.steps and step % self.steps == 0
        late = self.minutes and distributed.is_main() and time.monotonic() - self._saved >= 60 * self.minutes
        if due or late:
            self._saved = time.monotonic()
        mine = STOP if self.received else SAVE if late and not due else SETTLE if failed else 0
        return max(SAVE if due else 0, self._agree(mine))

    def now(self) -> int:
        """As ``after_step``, between steps: what its answer leaves open; all processes wait for each other."""
        late = self._agree(STOP if self.received else 0)
        return max(late, self._agree.close())
