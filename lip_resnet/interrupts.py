"""Signals and clocks: after which step all processes save, and after which they stop."""

import signal
import time
from types import FrameType

from lip_resnet import distributed

SAVE, STOP = 1, 2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupts:
    """A context in which SIGTERM, SIGINT and SIGUSR1 ask for a stop instead of ending the process.

    Schedulers send them before they take a machine away, and not to all processes in the same step: ``after_step``
    gives every process the same answer.

    Args:
        steps: ask for a save every so many steps; 0 never.
        minutes: ask for a save when so many minutes have passed since the last; 0 never.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.minutes = steps, minutes
        self.received: str | None = None
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
        self.received = signal.Signals(number).name

    def after_step(self, step: int) -> int:
        """0, SAVE or STOP: the same on every process, which all call it once after each of their steps."""
        action = 0
        late = self.minutes and distributed.is_main() and time.monotonic() - self._saved >= 60 * self.minutes
        if late or (self.steps and step % self.steps == 0):
            action = SAVE
            self._saved = time.monotonic()
        return self._agree(STOP if self.received else action)
