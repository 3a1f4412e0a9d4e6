"""The faults that hit a running training: each function injects one kind into a real run and returns a line for each.

A run is hit several times in turn, then finished and compared with the run that nothing happened to. A function may
return fewer lines than it was asked for, where a run ended before the next fault.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kill_in_write as child
from processes import Group, Process, send, train_command
from run_contents import INTERVAL, TOTAL, count_temporary_files, find_phase, hash_run, lost_between, take_inventory

Line = dict[str, Any]
SPARSE_LOG = "train.log_every=4"
"""So that a checkpoint holds counts between two log lines."""
FULL = re.compile("(warning|error): .*No space left")
"""What a run prints when its disk is full."""
DISK = 48 << 20
"""Bytes of the small disk: room for a run folder, which holds at most five checkpoints of 6 MB."""


@dataclass(frozen=True)
class Reference:
    """Undisturbed runs: how they ended, as ``hash_run`` gives it, and how long they took."""

    plain: str
    sparse: str
    """With ``SPARSE_LOG``."""
    pair: str
    """Of two ranks."""
    startup: float
    """Seconds before the first step."""
    step: float
    """Seconds of a step."""


class Run:
    """A run under attack.

    Args:
        folder: its run folder; one of an earlier attack is removed.
        overrides: of its recipe.
    """

    def __init__(self, group: Group, folder: Path, reference: Reference, *overrides: str) -> None:
        self.group, self.folder, self.reference, self.overrides = group, folder, reference, overrides
        self.lines: list[Line] = []
        shutil.rmtree(folder, ignore_errors=True)
        self.contents = take_inventory(folder)

    def start(self, *overrides: str, **options: Any) -> Process:
        """Start or continue it."""
        return self.group.start(train_command(self.folder, *self.overrides, *overrides, **options))

    def wait_at_random(self, process: Process, rng: random.Random) -> int | None:
        """Wait for a moment uniform over the rest of the run; the exit code if the process ends before.

        Moments after the start-up count from its real end, which a busy machine delays.
        """
        startup, step = self.reference.startup, self.reference.step
        moment = rng.uniform(0, startup + step * (TOTAL - self.contents.newest))
        if moment < startup:
            return process.wait_until(seconds=moment)
        self.wait_for_training(process)
        return process.wait_until(seconds=moment - startup)

    def wait_for_training(self, process: Process) -> None:
        """Wait until the start-up is over, or the process has ended."""
        process.wait_until(lambda: self.phase(process) != "start-up")

    def phase(self, process: Process) -> str:
        """What the process does now."""
        return find_phase(self.folder, process.started, process.pid)

    def add(self, process: Process, phase: str | None = None, **facts: Any) -> Line:
        """Note what a fault has done, in ``phase`` or where the traces say that the process has ended."""
        before, self.contents = self.contents, take_inventory(self.folder)
        phase = phase or self.phase(process)
        recomputed = 0 if phase == "start-up" else max(0, self.contents.logged - self.contents.newest)
        # A checkpoint counts once it is written, and one at most is on its way: the steps taken meanwhile are extra.
        line = {"phase": phase, "recomputed": recomputed, "lost": lost_between(before, self.contents), **facts}
        self.lines.append(line | {"ok": recomputed <= 2 * INTERVAL})
        return self.lines[-1]

    def finish(self) -> str:
        """Continue it to its end; what went wrong, if anything."""
        process = self.start()
        code = process.exit_code()
        return "" if code == 0 else f"exit code {code}: {process.printed()[-600:]}"

    def compare(self, expected: str, why: str) -> list[Line]:
        """Compare the end with ``expected``; the lines with the result in each. ``why``: what went wrong, if anything.

        Raises:
            RuntimeError: the run failed before it was hit.
        """
        end = None
        try:
            end = hash_run(self.folder)
        except RuntimeError as error:
            why = why or str(error)
        if why and not self.lines:
            raise RuntimeError(why)
        facts = {"equal": end == expected, "processes": self.group.end(seconds=20)}
        facts["temporary_files"] = count_temporary_files(self.folder)
        holds = facts == {"equal": True, "processes": 0, "temporary_files": 0} and not why
        for line in self.lines:
            line |= facts | {"ok": line["ok"] and holds and not line["lost"]} | ({"why": why} if why else {})
        return self.lines


def kill(group: Group, reference: Reference, rng: random.Random, count: int) -> list[Line]:
    """SIGKILL, uniformly over the life of the process: start-up, training, evaluation, writing."""
    run = Run(group, group.folder / "run", reference)
    while len(run.lines) < count:
        process = run.start()
        if run.wait_at_random(process, rng) is not None:
            break
        process.kill()
        process.wait()
        run.add(process)
    return run.compare(reference.plain, run.finish())


def terminate(group: Group, reference: Reference, rng: random.Random, count: int) -> list[Line]:
    """SIGTERM at a random time: the step is finished, saved, `requeue` left, and the exit code is 75."""
    run = Run(group, group.folder / "run", reference, SPARSE_LOG)
    requeue = run.folder / "requeue"
    while len(run.lines) < count and run.contents.newest < TOTAL:
        process = run.start()
        if run.wait_at_random(process, rng) is not None:
            break
        phase = run.phase(process)
        process.terminate()
        code = process.exit_code()
        line, printed = run.add(process, phase, code=code), process.printed()
        if code == 75:
            stopped = re.search(r"stopped: SIGTERM at step (\d+)", printed)
            line["recomputed"] = int(stopped[1]) - run.contents.newest if stopped else 0
            saved = line["recomputed"] == 0 and (stopped or "before the first step" in printed)
            line["ok"] = bool(saved) and requeue.exists()
        elif run.contents.newest == TOTAL:  # all was on the disk, and only the interpreter was left to be ended
            line["ok"] &= code in (0, -signal.SIGTERM) and not requeue.exists()
        else:  # there was nothing to save yet
            line["ok"] &= line["phase"] == "start-up" and code == -signal.SIGTERM
        if not line["ok"]:
            line["why"] = f"exit code {code}, requeue {requeue.exists()}: {printed[-300:]}"
    why = run.finish()
    return run.compare(reference.sparse, why or ("requeue is still there at the end" if requeue.exists() else ""))


def kill_in_write(group: Group, reference: Reference, rng: random.Random, count: int) -> list[Line]:
    """SIGKILL between or within the calls that write a checkpoint."""
    run = Run(group, group.folder / "run", reference)
    points = rng.sample(child.POINTS, len(child.POINTS))
    while len(run.lines) < count:
        point = points[len(run.lines) % len(points)]
        process = run.start(kill_at=(point, rng.randint(1, 3)))
        code = process.exit_code()
        if code == 0:
            break  # the rest of the run has no such call
        line = run.add(process, point)
        if code != -signal.SIGKILL:
            line |= {"ok": False, "why": f"exit code {code}: {process.printed()[-300:]}"}
    return run.compare(reference.plain, run.finish())


@contextlib.contextmanager
def small_disk(group: Group) -> Iterator[Path]:
    """A file system of its own with ``DISK`` bytes, mounted by root or by sudo without a password."""
    folder = group.folder / "disk"
    folder.mkdir(exist_ok=True)
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", f"size={DISK},mode=1777", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        group.end()
        subprocess.run([*sudo, "umount", folder], check=True)


def fill_disk(group: Group, reference: Reference, rng: random.Random, count: int) -> list[Line]:
    """The disk is full from a random moment on; later there is room again, and the run goes on or is started again."""
    first = rng.randrange(2)
    with small_disk(group) as disk:
        run = Run(group, disk / "run", reference)
        while len(run.lines) < count:
            policy = ("stop", "continue")[(first + len(run.lines)) % 2]
            process = run.start(f"train.on_write_error={policy}")
            run.wait_for_training(process)
            seconds = reference.step * rng.uniform(0, 0.4 * (TOTAL - run.contents.newest))
            if process.wait_until(seconds=seconds) is not None:
                break
            phase, ballast = run.phase(process), disk / "ballast"
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            pass
            process.wait_until(lambda printed=process.printed: bool(FULL.search(printed())), seconds=120)
            ballast.unlink()
            code, printed = process.exit_code(), process.printed()
            line = run.add(process, phase, code=code, policy=policy)
            if code != {"stop": 2, "continue": 0}[policy] or not FULL.search(printed) or "Traceback" in printed:
                line |= {"ok": False, "why": f"exit code {code}, policy {policy}: {printed[-600:]}"}
            if code == 0:
                break
        return run.compare(reference.plain, run.finish())


def kill_rank(group: Group, reference: Reference, rng: random.Random, count: int) -> list[Line]:
    """SIGKILL to one of torchrun's two ranks; torchrun starts both again, and they go on from the last checkpoint."""
    run = Run(group, group.folder / "run", reference)
    process, killed = run.start(ranks=2), set()
    while len(run.lines) < count:
        ranks: list[int] = []
        while len(ranks) < 2 and process.wait_until(seconds=0.1) is None:
            ranks = [pid for pid in process.children() if pid not in killed]
        killed |= set(ranks)
        process.started, run.contents = time.time(), take_inventory(run.folder)  # of these ranks, not of torchrun
        if run.wait_at_random(process, rng) is not None:
            break
        victim = rng.choice(ranks)
        send(victim, signal.SIGKILL)
        run.add(process, find_phase(run.folder, process.started, ranks[0]), rank=ranks.index(victim))
    code = process.exit_code()
    return run.compare(reference.pair, "" if code == 0 else f"torchrun: exit code {code}: {process.printed()[-600:]}")


ATTACKS = {
    "rank death": kill_rank,
    "full disk": fill_disk,
    "SIGKILL": kill,
    "SIGTERM": terminate,
    "SIGKILL in a write": kill_in_write,
}
