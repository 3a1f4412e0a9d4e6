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
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from processes import ROOT, Interrupted, Process, Worker, open_work_folder, send, stop_on_signals, train_command
from run_contents import count_temporary_files, logged_step, read_metrics

from lip_resnet import cli, errors
from lip_resnet.config import InputError
from lip_resnet.files import write_atomically

EVERY = 10
"""Steps between log lines, and between samples."""
OVERRIDES = (f"train.log_every={EVERY}", "train.epochs=100000", "train.eval_every=10", "train.checkpoint_steps=50")


@dataclass(frozen=True)
class Sample:
    """A training process at one moment; without its loader process."""

    start: int
    """Number of the start, from 1."""
    step: int
    memory: float
    """Resident, MB."""
    files: int
    """Open file descriptors."""
    threads: int


@dataclass
class Soak:
    """A run that is killed and continued."""

    worker: Worker
    folder: Path
    samples: list[Sample] = field(default_factory=list)
    starts: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    """Optimizer steps up to the last log line, those taken again included."""
    temporary_files: int = 0
    """Most half-written files that a start has left for the next."""

    def train(self, seconds: float, number: int) -> None:
        """Start, train for ``seconds`` beyond the start-up, and end by signal ``number``.

        Raises:
            InputError: the run did not go on, or did not end as it must.
        """
        first, until = logged_step(self.folder), None
        process, opened = self.worker.start(train_command(self.folder, *OVERRIDES)), self.folder / "env.json"
        self.starts += 1
        while until is None or time.monotonic() < until:
            if process.wait(0.2) is not None:
                raise InputError(f"start {self.starts} has ended by itself: {process.printed()[-500:]}")
            if until is None and opened.exists() and opened.stat().st_mtime > process.started:
                first = min(first, logged_step(self.folder))  # the log was cut back to the checkpoint
                until = time.monotonic() + seconds
            if until is not None:
                self._sample(process)
        send(process.pid, number)
        code, name = process.exit_code(), signal.Signals(number).name
        if code != {signal.SIGKILL: -9, signal.SIGTERM: 75}[number]:
            raise InputError(f"start {self.starts} ended with {code} after {name}")
        self.kills[name] += 1
        self.steps += max(0, logged_step(self.folder) - first)
        self.temporary_files = max(self.temporary_files, count_temporary_files(self.folder))

    def _sample(self, process: Process) -> None:
        step = logged_step(self.folder)
        if self.samples and self.samples[-1].start == self.starts and step < self.samples[-1].step + EVERY:
            return
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            memory = int(fields["VmRSS"].split()[0]) / 1024
        except (OSError, KeyError):  # it is ending
            return
        self.samples.append(Sample(self.starts, step, memory, files, int(fields["Threads"])))


def check_bounds(soak: Soak, processes_left: int) -> list[tuple[str, str, str, bool]]:
    """(what, figure, bound, whether it holds) for everything that must not grow."""
    rows = []
    starts: dict[int, list[Sample]] = {}
    for sample in soak.samples:
        starts.setdefault(sample.start, []).append(sample)
    # A start that was killed after a few steps had not grown to its size yet.
    starts = {start: samples for start, samples in starts.items() if len(samples) >= 5}
    if soak.starts not in starts:
        raise InputError("the last process took too few steps; give more --minutes")
    for name, what, allowed in (("memory", "memory, MB", 32), ("files", "open files", 2), ("threads", "threads", 1)):
        values = [getattr(sample, name) for sample in starts[soak.starts]]
        fifth = len(values) // 5
        early, late = statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])
        ends = [statistics.median(getattr(sample, name) for sample in samples[-3:]) for samples in starts.values()]
        for when, low, high, bound in (
            ("early and late in one process", early, late, allowed),
            ("least and most at the end of a start", min(ends), max(ends), 2 * allowed),
        ):
            rows.append((f"{what}: {when}", f"{low:.0f}, {high:.0f}", f"+{bound}", high <= low + bound))
    events = [path.stat().st_size for path in (soak.folder / "tensorboard").rglob("events.*")]
    lines, _ = read_metrics(soak.folder)
    # A number is an event of some 40 bytes, twice there if its step was taken again; a start writes its recipe.
    taken = max(1, soak.steps) / max(1, logged_step(soak.folder))
    budget = round(60 * sum(len(line) for line in lines) * max(1.0, taken)) + 6_000 * soak.starts
    checkpoints = len(list((soak.folder / "checkpoints").iterdir()))
    trained = [line["step"] for line in lines if "train/loss" in line]
    repeated, temporary = len(trained) - len(set(trained)), count_temporary_files(soak.folder)
    return [
        *rows,
        ("TensorBoard files", f"{len(events)}", f"{soak.starts}: one a start", len(events) <= soak.starts),
        ("TensorBoard bytes", f"{sum(events):,}", f"{budget:,}", sum(events) <= budget),
        ("files in checkpoints/", f"{checkpoints}", "4: last, best, two by step", checkpoints <= 4),
        ("half-written files after a kill", f"{soak.temporary_files}", "1", soak.temporary_files <= 1),
        ("half-written files at the end", f"{temporary}", "0", temporary == 0),
        ("steps logged twice", f"{repeated}", "0", trained == sorted(set(trained))),
        ("processes left", f"{processes_left}", "0", processes_left == 0),
    ]


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="how long (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak", help="new, empty, or of an earlier call")
    options = parser.parse_args()
    work, rng = open_work_folder(options.work), random.Random(options.seed)
    shutil.rmtree(work / "run", ignore_errors=True)
    stop_on_signals()
    soak, began = Soak(Worker(work), work / "run"), time.monotonic()
    try:
        while time.monotonic() - began < 30 * options.minutes:
            soak.train(rng.uniform(1, 6), signal.SIGTERM if soak.starts % 4 == 3 else signal.SIGKILL)
        soak.train(max(5.0, 60 * options.minutes - (time.monotonic() - began)), signal.SIGTERM)
        processes_left = soak.worker.end(seconds=20)
    except Interrupted as error:
        raise errors.Stopped("nothing is left running") from error
    finally:
        soak.worker.end()
    rows = check_bounds(soak, processes_left)
    kills = ", ".join(f"{count} {name}" for name, count in soak.kills.items())
    print(f"{soak.steps} steps in {soak.starts} starts, ended by {kills}; step {logged_step(soak.folder)}\n")
    print("| what | figure | bound | holds |\n|---|--:|---|---|")
    for what, figure, bound, holds in rows:
        print(f"| {what} | {figure} | {bound} | {'yes' if holds else '**no**'} |", flush=True)
    record = {"steps": soak.steps, "starts": soak.starts, "kills": soak.kills, "rows": rows}
    record["samples"] = [vars(sample) for sample in soak.samples]
    write_atomically(work / "soak.json", lambda file: file.write(json.dumps(record).encode()))
    if broken := [what for what, *_, holds in rows if not holds]:
        raise InputError(f"not bounded: {'; '.join(broken)}")


if __name__ == "__main__":
    cli.launch(main)
