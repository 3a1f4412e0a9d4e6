"""Train for minutes, killed every few seconds, and show that nothing grows:  make soak

Half of the time the run is killed (SIGKILL, now and then SIGTERM) and continued again and again; then one process
trains on alone. Memory, open files, threads, TensorBoard's files and the run folder must stay within the bounds that it
prints.
"""

import json
import os
import random
import shutil
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fault_runs import ROOT, Aborted, Lane, Process, command, count_litter, logged_step, read_metrics, send

from lip_resnet import checkpoint, distributed
from lip_resnet.config import InputError

EVERY = 10
"""Steps between log lines, and between samples."""
OVERRIDES = (f"train.log_every={EVERY}", "train.epochs=100000", "train.eval_every=10", "train.checkpoint_steps=50")


@dataclass(frozen=True)
class Sample:
    """A training process at one moment; without its loader process."""

    start: int
    """Which start of the run this was."""
    step: int
    rss_mb: float
    files: int
    """Open file descriptors."""
    threads: int


@dataclass
class Soak:
    """A run that is killed and continued."""

    lane: Lane
    folder: Path
    rng: random.Random
    samples: list[Sample] = field(default_factory=list)
    starts: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    """Optimizer steps that were taken, those taken again included; to the last log line."""
    litter: int = 0
    """Most half-written files that a start has left for the next."""

    def live(self, seconds: float, number: int) -> None:
        """Start, train for ``seconds`` beyond the start-up, and end by a signal.

        Raises:
            InputError: the run did not go on, or not as it must.
        """
        began = logged_step(self.folder)
        process = self.lane.start(command(self.folder, *OVERRIDES))
        self.starts += 1
        # The first line beyond those of the last start, which were cut to its checkpoint.
        opened, until = self.folder / "env.json", None
        while until is None or time.monotonic() < until:
            if self.lane.wait(process, 0.2) is not None:
                raise InputError(f"start {self.starts} has ended by itself: {process.printed()[-500:]}")
            if until is None and opened.exists() and opened.stat().st_mtime > process.started:
                began = min(began, logged_step(self.folder))
                until = time.monotonic() + seconds
            if until is not None:
                self._sample(process)
        send(process.pid, number)
        code = self.lane.outcome(process)
        if code != {signal.SIGKILL: -9, signal.SIGTERM: 75}[number]:
            raise InputError(f"start {self.starts} ended with {code} after {signal.Signals(number).name}")
        name = signal.Signals(number).name
        self.kills[name] = self.kills.get(name, 0) + 1
        self.steps += max(0, logged_step(self.folder) - began)
        self.litter = max(self.litter, count_litter(self.folder))

    def _sample(self, process: Process) -> None:
        step = logged_step(self.folder)
        if self.samples and self.samples[-1].start == self.starts and step < self.samples[-1].step + EVERY:
            return
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            rss = int(fields["VmRSS"].split()[0]) / 1024
        except (OSError, KeyError):  # it is ending
            return
        self.samples.append(Sample(self.starts, step, rss, files, int(fields["Threads"])))


def judge(soak: Soak, left: int) -> list[tuple[str, str, str, bool]]:
    """(what, figure, bound, whether it holds) for everything that must not grow."""
    rows = []
    starts: dict[int, list[Sample]] = {}
    for sample in soak.samples:
        starts.setdefault(sample.start, []).append(sample)
    # A start that was killed after a few steps had not grown to its size yet.
    starts = {start: samples for start, samples in starts.items() if len(samples) >= 5}
    for name, what, allowed in (("rss_mb", "memory, MB", 32), ("files", "open files", 2), ("threads", "threads", 1)):
        values = [getattr(sample, name) for sample in starts.get(soak.starts, [])]
        if not values:
            raise InputError("the last process took too few steps; give more --minutes")
        fifth = len(values) // 5
        early, late = statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])
        figure = f"{early:.0f}, {late:.0f}"
        rows.append((f"{what}: early and late in one process", figure, f"+{allowed}", late <= early + allowed))
        ends = [statistics.median(getattr(sample, name) for sample in samples[-3:]) for samples in starts.values()]
        low, high = min(ends), max(ends)
        figure = f"{low:.0f}, {high:.0f}"
        rows.append(
            (f"{what}: least and most at the end of a start", figure, f"+{2 * allowed}", high <= low + 2 * allowed)
        )

    folder = soak.folder
    events = [path.stat().st_size for path in (folder / "tensorboard").rglob("events.*")]
    lines, _ = read_metrics(folder)
    # A number is an event of some 40 bytes, twice there if its step was taken again; a start writes its recipe.
    taken = max(1, soak.steps) / max(1, logged_step(folder))
    budget = round(60 * sum(len(line) for line in lines) * max(1.0, taken)) + 6_000 * soak.starts
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    trained = [line["step"] for line in lines if "train/loss" in line]
    twice, litter = len(trained) - len(set(trained)), count_litter(folder)
    rows += [
        ("TensorBoard files", f"{len(events)}", f"{soak.starts}: one a start", len(events) <= soak.starts),
        ("TensorBoard bytes", f"{sum(events):,}", f"{budget:,}", sum(events) <= budget),
        ("files in checkpoints/", f"{len(names)}", "4: last, best, two by step", len(names) <= 4),
        ("half-written files after a kill", f"{soak.litter}", "1", soak.litter <= 1),
        ("half-written files at the end", f"{litter}", "0", litter == 0),
        ("steps logged twice", f"{twice}", "0", trained == sorted(set(trained))),
        ("processes left", f"{left}", "0", left == 0),
    ]
    return rows


def main() -> None:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="how long (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak", help="made anew")
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    stopping = threading.Event()

    def stop(*_: int | FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    soak = Soak(Lane(0, work, stopping), work / "run", random.Random(options.seed))
    began = time.monotonic()
    try:
        while time.monotonic() - began < 30 * options.minutes:
            soak.live(soak.rng.uniform(1, 6), signal.SIGTERM if soak.starts % 4 == 3 else signal.SIGKILL)
        soak.live(max(5.0, 60 * options.minutes - (time.monotonic() - began)), signal.SIGTERM)
        left = soak.lane.leftovers()
    except Aborted:
        raise distributed.Stopped("nothing is left running") from None
    finally:
        soak.lane.end()

    rows = judge(soak, left)
    text = ["| what | figure | bound | holds |", "|---|--:|---|---|"]
    text += [f"| {what} | {figure} | {bound} | {'yes' if holds else '**no**'} |" for what, figure, bound, holds in rows]
    kills = ", ".join(f"{count} {name}" for name, count in soak.kills.items())
    print(f"{soak.steps} steps in {soak.starts} starts, ended by {kills}; step {logged_step(soak.folder)}\n")
    print("\n".join(text), flush=True)
    record = {"steps": soak.steps, "starts": soak.starts, "kills": soak.kills, "rows": rows}
    record["samples"] = [vars(sample) for sample in soak.samples]
    checkpoint.write_atomically(work / "soak.json", lambda file: file.write(json.dumps(record).encode()))
    if broken := [what for what, *_, holds in rows if not holds]:
        raise InputError(f"not bounded: {'; '.join(broken)}")


if __name__ == "__main__":
    distributed.launch(main)
