"""Train for minutes, killed every few seconds, and show that nothing grows:  make soak

Half of the time the run is killed (SIGKILL, now and then SIGTERM) and continued again and again; then one process
trains on alone. Memory, open files, threads, TensorBoard's files and the run folder must stay within the bounds that it
prints.
"""

import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from processes import Group, Process, train_command
from run_contents import count_temporary_files, logged_step, read_metrics

from lip_resnet import cli
from lip_resnet.config import InputError

EVERY = 10
"""Steps between log lines, and between samples."""
OVERRIDES = (f"train.log_every={EVERY}", "train.epochs=100000", "train.eval_every=10", "train.checkpoint_steps=50")
ALLOWED = {"memory": 32, "files": 2, "threads": 1}
"""What a process may gain; twice that from start to start."""


class Sample(NamedTuple):
    """A training process at one moment; without its loader process."""

    step: int
    memory: float
    """Resident, MB."""
    files: int
    """Open file descriptors."""
    threads: int


class Soak:
    """A run that is killed and continued.

    Attributes:
        starts: the samples of each start.
        steps: optimizer steps up to the last log line, those taken again included.
        temporary_files: most half-written files that a start has left for the next.
    """

    def __init__(self, folder: Path) -> None:
        self.group, self.folder = Group(folder), folder / "run"
        self.starts: list[list[Sample]] = []
        self.steps = self.temporary_files = 0

    def train(self, seconds: float, number: int) -> None:
        """Start, train for ``seconds`` beyond the start-up, and end by signal ``number``.

        Raises:
            InputError: the run did not go on, or did not end as it must.
        """
        first, until = logged_step(self.folder), None
        process, opened = self.group.start(train_command(self.folder, *OVERRIDES)), self.folder / "env.json"
        self.starts.append([])
        while until is None or time.monotonic() < until:
            if process.wait_until(seconds=0.2) is not None:
                raise InputError(f"start {len(self.starts)} has ended by itself: {process.printed()[-500:]}")
            if until is None and opened.exists() and opened.stat().st_mtime > process.started:
                first = min(first, logged_step(self.folder))  # the log was cut back to the checkpoint
                until = time.monotonic() + seconds
            if until is not None:
                self._sample(process)
        process.send_signal(number)
        code = process.exit_code()
        if code != {signal.SIGKILL: -9, signal.SIGTERM: 75}[number]:
            raise InputError(f"start {len(self.starts)} ended with {code} after signal {number}")
        self.steps += max(0, logged_step(self.folder) - first)
        self.temporary_files = max(self.temporary_files, count_temporary_files(self.folder))

    def _sample(self, process: Process) -> None:
        step, samples = logged_step(self.folder), self.starts[-1]
        if samples and step < samples[-1].step + EVERY:
            return
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            samples.append(Sample(step, int(fields["VmRSS"].split()[0]) / 1024, files, int(fields["Threads"])))
        except (OSError, KeyError):  # it is ending
            return


def check_bounds(soak: Soak, processes_left: int) -> list[tuple[str, float, float]]:
    """(what, figure, the most that it may be) for everything that must not grow."""
    # A start that was killed after a few steps had not grown to its size yet.
    starts = [samples for samples in soak.starts if len(samples) >= 5]
    if len(soak.starts[-1]) < 5:
        raise InputError("the last process took too few steps; give more --minutes")
    rows = []
    for name, allowed in ALLOWED.items():
        values = [getattr(sample, name) for sample in soak.starts[-1]]
        fifth = len(values) // 5
        early, late = statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])
        ends = [statistics.median(getattr(sample, name) for sample in samples[-3:]) for samples in starts]
        rows.append((f"{name}: late in one process, early in it {early:.0f}", late, early + allowed))
        rows.append((f"{name}: at the end of a start, least {min(ends):.0f}", max(ends), min(ends) + 2 * allowed))
    events = [path.stat().st_size for path in (soak.folder / "tensorboard").rglob("events.*")]
    lines, _ = read_metrics(soak.folder)
    # A number is an event of some 40 bytes, twice there if its step was taken again; a start writes its recipe.
    taken = max(1.0, soak.steps / max(1, logged_step(soak.folder)))
    budget = 60 * taken * sum(len(line) for line in lines) + 6_000 * len(soak.starts)
    trained = [line["step"] for line in lines if "train/loss" in line]
    return [
        *rows,
        ("TensorBoard files: one a start", len(events), len(soak.starts)),
        ("TensorBoard bytes", sum(events), budget),
        ("files in checkpoints/: last, best, two by step", len(list((soak.folder / "checkpoints").iterdir())), 4),
        ("half-written files after a kill", soak.temporary_files, 1),
        ("half-written files at the end", count_temporary_files(soak.folder), 0),
        ("steps logged twice, or out of order", sum(b <= a for a, b in itertools.pairwise(trained)), 0),
        ("processes left", processes_left, 0),
    ]


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="how long (default: 4)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the run too
    rng, began = random.Random(0), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        try:
            while time.monotonic() - began < 30 * options.minutes:
                soak.train(rng.uniform(1, 6), signal.SIGTERM if len(soak.starts) % 4 == 3 else signal.SIGKILL)
            soak.train(max(5.0, 60 * options.minutes - (time.monotonic() - began)), signal.SIGTERM)
            rows = check_bounds(soak, soak.group.end(seconds=20))
        finally:
            soak.group.end()
    print(f"{soak.steps} steps in {len(soak.starts)} starts")
    for what, figure, most in rows:
        print(f"{what}: {figure:,.0f}, at most {most:,.0f}", flush=True)
    if broken := [what for what, figure, most in rows if figure > most]:
        raise InputError(f"not bounded: {'; '.join(broken)}")


if __name__ == "__main__":
    cli.launch(main)
