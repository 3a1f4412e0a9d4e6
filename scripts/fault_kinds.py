"""For the fault harness: one function a kind of fault, which injects it into real runs and says what it did to them.

Each gives a line per injection. Several hit one run in turn; then it is let finish, and its end is compared with that
of the run that nothing happened to.
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_child import POINTS
from fault_runs import (
    INTERVAL,
    TOTAL,
    Broken,
    Inventory,
    Lane,
    Process,
    command,
    count_litter,
    find_phase,
    hash_state,
    lost_between,
    send,
    take_inventory,
)

Line = dict[str, Any]
SPARSE_LOG = "train.log_every=4"
DISK = 48 << 20
"""Bytes of the small disk: room for a run folder, which holds at most five checkpoints of 6 MB."""


@dataclass(frozen=True)
class References:
    """Ends of runs that nothing happened to, as ``hash_state`` gives them, and how long they took."""

    plain: str
    sparse: str
    """With a log line every 4 steps, so that checkpoints carry counts between two of them."""
    pair: str
    """Of two processes."""
    startup: float
    """Seconds before the first step."""
    step: float
    """Seconds of a step."""

    def life(self, done: int) -> float:
        """Seconds that a start from step ``done`` takes to the end."""
        return self.startup + self.step * (TOTAL - done)


def wait_at_random(
    lane: Lane, process: Process, folder: Path, references: References, done: int, rng: random.Random
) -> int | None:
    """Wait for a moment that is uniform over the life of a start from step ``done``; its return code if it ends first.

    Moments after the start-up count from its real end, which a busy machine puts off.
    """
    moment = rng.uniform(0, references.life(done))
    if moment < references.startup:
        return lane.wait(process, moment)
    code = lane.wait(process, until=lambda: find_phase(folder, process.started, process.pid) != "start-up")
    return lane.wait(process, moment - references.startup) if code is None else code


def fresh(lane: Lane) -> Path:
    """An empty place for a run."""
    folder = lane.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def describe(folder: Path, process: Process, before: Inventory, now: Inventory, phase: str | None = None) -> Line:
    """What a fault has done, in ``phase`` or where the traces say that ``process`` has ended."""
    phase = phase or find_phase(folder, process.started, process.pid)
    recomputed = 0 if phase == "start-up" else max(0, now.logged - now.newest)
    return {
        "step": now.newest if phase == "start-up" else now.logged,
        "phase": phase,
        "recomputed": recomputed,
        "lost": lost_between(before, now),
        "seconds": round(time.time() - process.started, 2),
        # A checkpoint counts once it is written, and one at most is on its way: the steps taken meanwhile are extra.
        "ok": recomputed <= 2 * INTERVAL,
    }


def close(lane: Lane, folder: Path, lines: list[Line], expected: str) -> list[Line]:
    """Let the run finish, and write into every line how that went."""
    why = None
    try:
        lane.finish(command(folder, *([SPARSE_LOG] if lines and lines[0]["fault"] == "SIGTERM" else [])))
    except Broken as error:
        why = str(error)
    return settle(lane, folder, lines, expected, why)


def settle(lane: Lane, folder: Path, lines: list[Line], expected: str, why: str | None = None) -> list[Line]:
    """Compare a finished run with the uninterrupted one, and write that into every line."""
    end = None
    try:
        end = hash_state(folder)
    except Broken as error:
        why = why or str(error)
    left, litter = lane.leftovers(), count_litter(folder)
    for line in lines:
        line |= {"sha256": end, "equal": end == expected, "left": left, "litter": litter}
        line["ok"] = line["ok"] and line["equal"] and not line["lost"] and not left and not litter and not why
        if why:
            line["why"] = why
    return lines


def kill(lane: Lane, references: References, seed: int, wanted: int) -> list[Line]:
    """SIGKILL, uniformly over the life of the process: start-up, training, evaluation, writing."""
    rng, folder, lines = random.Random(seed), fresh(lane), []
    now = take_inventory(folder)
    while len(lines) < wanted:
        process = lane.start(command(folder))
        if wait_at_random(lane, process, folder, references, now.newest, rng) is not None:
            break  # it was faster than expected; another run will be hit instead
        send(process.pid, signal.SIGKILL)
        process.handle.wait()
        before, now = now, take_inventory(folder)
        lines.append({"fault": "SIGKILL", **describe(folder, process, before, now)})
    return close(lane, folder, lines, references.plain)


def terminate(lane: Lane, references: References, seed: int, wanted: int) -> list[Line]:
    """SIGTERM at a random time: the step is finished, saved, `requeue` left, and the exit code is 75."""
    rng, folder, lines = random.Random(seed), fresh(lane), []
    now = take_inventory(folder)
    while len(lines) < wanted:
        process = lane.start(command(folder, SPARSE_LOG))
        if wait_at_random(lane, process, folder, references, now.newest, rng) is not None:
            break
        phase = find_phase(folder, process.started, process.pid)
        send(process.pid, signal.SIGTERM)
        code = lane.outcome(process)
        before, now = now, take_inventory(folder)
        line = {"fault": "SIGTERM", **describe(folder, process, before, now, phase), "code": code}
        stopped = re.search(r"stopped: SIGTERM at step (\d+)", process.printed())
        requeue = (folder / "requeue").exists()
        if code == 75:
            told = int(stopped[1]) if stopped else now.newest
            line |= {"step": told, "recomputed": told - now.newest}
            understood = stopped or "before the first step" in process.printed()
            line["ok"] &= requeue and line["recomputed"] == 0 and bool(understood)
        elif now.newest == TOTAL:
            # Too late to stop anything: all is on the disk. Only the interpreter was left to be ended, or not.
            line["ok"] &= code in (0, -signal.SIGTERM) and not requeue
        else:
            line["ok"] &= line["phase"] == "start-up" and code == -signal.SIGTERM  # there was nothing to save yet
        if not line["ok"]:
            line["why"] = f"exit code {code}, requeue {requeue}: {process.printed()[-300:]}"
        lines.append(line)
        if now.newest == TOTAL:
            break
    lines = close(lane, folder, lines, references.sparse)
    if (folder / "requeue").exists():
        for line in lines:
            line |= {"ok": False, "why": "requeue is still there at the end"}
    return lines


def kill_in_write(lane: Lane, references: References, seed: int, wanted: int) -> list[Line]:
    """SIGKILL between or within the calls that write a checkpoint."""
    rng, folder, lines = random.Random(seed), fresh(lane), []
    now = take_inventory(folder)
    points = rng.sample(POINTS["safe"], len(POINTS["safe"]))
    while len(lines) < wanted:
        point, number = points[len(lines) % len(points)], rng.randint(1, 3)
        process = lane.start(command(folder, child=("safe", point, str(number))))
        code = lane.outcome(process)
        if code == 0:
            break  # the rest of the run has no such call
        before, now = now, take_inventory(folder)
        line = {"fault": "SIGKILL in a write", **describe(folder, process, before, now, point)}
        if code != -signal.SIGKILL:
            line |= {"ok": False, "why": f"exit code {code}: {process.printed()[-300:]}"}
        lines.append(line)
    return close(lane, folder, lines, references.plain)


def contrast(lane: Lane, references: References, seed: int, wanted: int) -> list[Line]:
    """The same kills on a writer that overwrites last.pt in place: it must lose, or the harness does not bite."""
    rng, folder, lines = random.Random(seed), fresh(lane), []
    now = take_inventory(folder)
    while len(lines) < wanted:
        point = rng.choice(POINTS["naive"]) if rng.random() < 0.5 else "none"
        process = lane.start(command(folder, child=("naive", point, str(rng.randint(1, 3)))))
        fault = "contrast: SIGKILL in a write" if point != "none" else "contrast: SIGKILL"
        if point == "none":
            code = wait_at_random(lane, process, folder, references, now.newest, rng)
        else:
            code = lane.outcome(process)
        if code is None:
            send(process.pid, signal.SIGKILL)
            process.handle.wait()
        before, now = now, take_inventory(folder)
        if code == 0:
            folder, now = fresh(lane), take_inventory(folder.with_name("none"))
            continue
        line = {"fault": fault, **describe(folder, process, before, now, None if point == "none" else point)}
        if line["lost"]:  # does the command agree that the run is lost?
            line["recomputed"] = now.logged
            process = lane.start(command(folder))
            code = lane.outcome(process)
            line["resumed"] = code == 0
            folder, now = fresh(lane), take_inventory(folder.with_name("none"))
        lines.append(line)
    lane.leftovers()
    return lines


@contextlib.contextmanager
def small_disk(lane: Lane) -> Iterator[Path | None]:
    """A file system of its own with ``DISK`` bytes; None where this user may not mount one."""
    folder = lane.work / "disk"
    folder.mkdir(exist_ok=True)
    mounted = (
        not os.geteuid()
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    )
    try:
        yield folder if mounted else None
    finally:
        lane.end()
        if mounted:
            subprocess.run(["umount", folder], check=True)


def fill_disk(lane: Lane, references: References, seed: int, wanted: int) -> list[Line]:
    """The disk is full from a random moment on; later there is room again, and the run goes on or is started again."""
    rng, lines = random.Random(seed), []
    with small_disk(lane) as disk:
        folder = disk / "run" if disk else fresh(lane)
        now = take_inventory(folder)
        for number in range(wanted):
            policy = ("stop", "continue")[(seed + number) % 2]
            process = lane.start(command(folder, f"train.on_write_error={policy}"))
            lane.wait(process, until=lambda p=process: find_phase(folder, p.started, p.pid) != "start-up")
            if lane.wait(process, references.step * rng.uniform(0, 0.4 * (TOTAL - now.newest))) is not None:
                break
            phase, empty_again = find_phase(folder, process.started, process.pid), fill(disk, process)
            told = f"warning: .*{'No space left' if disk else 'File too large'}"
            log = re.compile(told)
            code = lane.wait(process, 120, until=lambda log=log, process=process: bool(log.search(process.printed())))
            empty_again()
            code = lane.outcome(process) if code is None else code
            before, now = now, take_inventory(folder)
            line = {
                "fault": "full disk",
                **describe(folder, process, before, now, phase),
                "code": code,
                "policy": policy,
            }
            line["how"] = "tmpfs" if disk else "RLIMIT_FSIZE"
            printed = process.printed()
            said = "No space left" in printed or "File too large" in printed
            ended = 2 if policy == "stop" else 0
            if code != ended or not said or "Traceback" in printed:
                line |= {"ok": False, "why": f"exit code {code}, policy {policy}: {printed[-600:]}"}
            lines.append(line)
            if code == 0:
                break
        return close(lane, folder, lines, references.plain)


def fill(disk: Path | None, process: Process) -> Callable[[], None]:
    """Take every free byte of the disk, or forbid the process files longer than 1 MB; returns what undoes it."""
    if disk is None:
        before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))

        def allow() -> None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)

        return allow
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return ballast.unlink


def kill_rank(lane: Lane, references: References, seed: int, wanted: int) -> list[Line]:
    """SIGKILL to one of torchrun's two ranks; torchrun starts both again, and they go on from the last checkpoint."""
    rng, folder, lines = random.Random(seed), fresh(lane), []
    process = lane.start(command(folder, processes=2))
    killed: set[int] = set()
    began, why = time.time(), None
    while len(lines) < wanted:
        ranks: list[int] = []
        while len(ranks) < 2:
            if lane.wait(process, 0.1) is not None:
                why = "torchrun has ended: " + process.printed()[-600:]
                break
            ranks = [pid for pid in children(process) if pid not in killed]
        if why:
            break
        killed |= set(ranks)
        process.started = time.time()  # of these ranks, not of torchrun
        if wait_at_random(lane, process, folder, references, take_inventory(folder).newest, rng) is not None:
            break  # ended before it was hit
        victim = rng.choice(ranks)
        send(victim, signal.SIGKILL)
        began = time.time()
        phase, now = find_phase(folder, process.started, ranks[0]), take_inventory(folder)
        lines.append({"fault": "rank death", **describe(folder, process, now, now, phase), "rank": ranks.index(victim)})
    if lane.wait(process, 300) != 0:
        why = why or f"torchrun, {time.time() - began:.0f} s after the last kill: {process.printed()[-600:]}"
        process.kill_all()
    return settle(lane, folder, lines, references.pair, why)


def children(process: Process) -> list[int]:
    """torchrun's workers, in the order of their ranks' start."""
    found = []
    for pid in process.members():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(fields[1]) == process.pid:
                found.append(pid)
    return sorted(found)
