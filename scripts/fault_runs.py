"""For the fault harness: train.py as real processes that are started, watched and ended, and what a run folder holds.

What is said here about checkpoints is found by zipfile's checksums and torch.load, not by the code under test.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "faults" / "digits.yaml"
_TRAIN = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["train"]
INTERVAL = _TRAIN["checkpoint_steps"]
EPOCH = 15
"""Steps: 1,442 digits in batches of 96, the rest dropped."""
TOTAL = _TRAIN["epochs"] * EPOCH

STATE = ("model", "ema", "optimizer", "scaler", "window", "step", "best")
"""The entries of a checkpoint that must be equal."""
TIMES = ("train/images_per_second", "train/data_wait")
"""The only numbers of metrics.jsonl that may differ."""
HANGS = 300
"""Seconds after which a process that should have ended is said to hang; a whole run takes ten on a quiet machine."""
MARK = "LIP_FAULT_RUN"
"""An environment variable by which every descendant of a process is found, whatever session it moved to."""


class Aborted(Exception):
    """The harness was asked to stop."""


class Broken(Exception):
    """Something did not hold; the message says what."""


def command(folder: Path, *overrides: str, child: tuple[str, ...] = (), processes: int = 1) -> list[str]:
    """``train.py`` on the harness's recipe as a user would type it; ``child`` are fault_child.py's arguments."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--max-restarts=5"]
    script = ["scripts/fault_child.py", *child] if child else ["train.py"]
    return [*launcher, *script, "--config", str(RECIPE), "--output", str(folder), "--resume", "auto", *overrides]


@dataclass
class Process:
    """A started command and everything that descends from it."""

    handle: subprocess.Popen
    mark: str
    log: Path
    started: float = field(default_factory=time.time)

    @property
    def pid(self) -> int:
        return self.handle.pid

    def members(self) -> list[int]:
        """The living processes that carry this one's mark."""
        return [pid for pid, environment in _processes() if f"{MARK}={self.mark}".encode() in environment]

    def kill_all(self) -> None:
        """SIGKILL to whatever is left of it."""
        while members := self.members():
            for pid in members:
                send(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.handle.wait()

    def printed(self) -> str:
        """What it wrote to the terminal."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def send(pid: int, number: int) -> None:
    """A signal, to a process that may have ended already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _processes() -> Iterator[tuple[int, bytes]]:
    """(pid, environment) of every process of ours that is not a zombie."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), (folder / "environ").read_bytes()  # empty for a zombie
            except OSError:  # it is gone, or not ours
                continue


@dataclass
class Lane:
    """One of the harness's two lines of work: a folder, and the processes that it started."""

    number: int
    work: Path
    stopping: threading.Event
    seconds: float = 20.0
    """What the lane's last whole run took, which random delays are drawn from."""
    live: list[Process] = field(default_factory=list)

    def start(self, arguments: list[str], log: Path | None = None) -> Process:
        """Start a command of the repository: one thread, no GPU, a session of its own, output to a file."""
        if self.stopping.is_set():
            raise Aborted
        mark = uuid.uuid4().hex
        log = log or self.work / "log.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: mark}
        with open(log, "wb") as file:
            handle = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        process = Process(handle, mark, log)
        self.live.append(process)
        return process

    def wait(
        self, process: Process, seconds: float = 600, until: Callable[[], bool] = lambda: False, tick: float = 0.05
    ) -> int | None:
        """The return code; None when the time is up, or ``until`` holds, before the process has ended."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not until():
            if self.stopping.is_set():
                raise Aborted
            try:
                return process.handle.wait(min(left, tick))
            except subprocess.TimeoutExpired:
                continue
        return process.handle.poll()

    def outcome(self, process: Process, seconds: float = HANGS) -> int | str:
        """The return code; "hangs" when there is none in so many seconds, and then the process is killed."""
        code = self.wait(process, seconds)
        if code is None:
            process.kill_all()
        return "hangs" if code is None else code

    def finish(self, arguments: list[str], seconds: float = HANGS) -> Process:
        """Run a command to its end.

        Raises:
            Broken: it did not end well.
        """
        process = self.start(arguments)
        code = self.outcome(process, seconds)
        if code != 0:
            raise Broken(f"exit code {code}: {process.printed()[-600:]}")
        return process

    def leftovers(self, seconds: float = 20) -> int:
        """Processes that outlive what started them by more than ``seconds``; ends them, and forgets all."""
        end = time.monotonic() + seconds
        while (left := [pid for process in self.live for pid in process.members()]) and time.monotonic() < end:
            time.sleep(0.2)
        self.end()
        return len(left)

    def end(self) -> None:
        """End whatever this lane has started."""
        for process in self.live:
            process.kill_all()
        self.live.clear()


# --- what a run folder holds


def read_whole(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content, if every checksum in it holds; else None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, EOFError):
        return None


@dataclass(frozen=True)
class Inventory:
    """The files of a run folder at one moment."""

    steps: dict[str, int]
    """Whole checkpoints: name -> step."""
    torn: list[str]
    """Files under their final names that cannot be read."""
    logged: int
    """The last step in metrics.jsonl."""

    @property
    def newest(self) -> int:
        """The step from which the run can go on: last.pt's, and if that is not whole the newest other's."""
        return self.steps.get("last.pt", max(self.steps.values(), default=0))


def take_inventory(folder: Path) -> Inventory:
    """Read everything in a run folder."""
    steps, torn, seen = {}, [], {}
    for path in sorted((folder / "checkpoints").glob("[!.]*.pt")):
        try:
            inode = path.stat().st_ino  # the names are links to one file
        except FileNotFoundError:  # a living process has just removed it
            continue
        if inode not in seen:
            seen[inode] = read_whole(path)
        if seen[inode] is None:
            torn.append(path.name)
        else:
            steps[path.name] = seen[inode]["step"]
    for name, parse in (("config.yaml", yaml.safe_load), ("env.json", json.loads)):
        path = folder / name
        try:
            if path.exists() and not isinstance(parse(path.read_text(encoding="utf-8")), dict):
                torn.append(name)
        except (ValueError, yaml.YAMLError):
            torn.append(name)
    if read_metrics(folder)[1]:
        torn.append("metrics.jsonl")
    return Inventory(steps, torn, logged_step(folder))


def logged_step(folder: Path, tag: str = "step") -> int:
    """The last step in metrics.jsonl, of the lines that hold ``tag``."""
    return max((line["step"] for line in read_metrics(folder)[0] if tag in line), default=0)


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of metrics.jsonl, and whether one before the last is damaged; the last can be half written."""
    path = folder / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            return lines, number < len(texts)
    return lines, False


def lost_between(before: Inventory, now: Inventory) -> list[str]:
    """Files that a fault has cost: torn ones, and names that were there, with nothing as new in their place."""
    lost = list(now.torn)
    for name in ("last.pt", "best.pt"):
        if name in before.steps and now.steps.get(name, -1) < before.steps[name] and name not in lost:
            lost.append(name)
    if now.newest < before.newest:
        lost.append(f"step {before.newest}")
    return lost


def find_phase(folder: Path, started: float, pid: int) -> str:
    """What a process is doing, or was doing when it ended, from the traces in its run folder.

    Args:
        started: when the process was started, in seconds since 1970.
        pid: of the one that writes.
    """
    opened = folder / "env.json"
    if not opened.exists() or opened.stat().st_mtime < started:
        return "start-up"
    if list((folder / "checkpoints").glob(f".*.{pid}.tmp")):
        return "writing"
    logged, evaluated = logged_step(folder), logged_step(folder, "val/loss")
    if logged >= TOTAL and evaluated >= TOTAL:
        return "ending"
    return "evaluation" if logged and logged % EPOCH == 0 and evaluated < logged else "training"


def hash_state(folder: Path) -> str:
    """sha256 of where a run has ended: last.pt's and best.pt's states, and every number of metrics.jsonl but times.

    Raises:
        Broken: there is no such end.
    """
    digest = hashlib.sha256()
    for name in ("last.pt", "best.pt"):
        payload = read_whole(folder / "checkpoints" / name)
        if payload is None:
            raise Broken(f"{name} is not whole at the end")
        _feed(digest, {key: payload[key] for key in STATE})
    for line in read_metrics(folder)[0]:
        _feed(digest, {key: value for key, value in line.items() if key not in TIMES})
    return digest.hexdigest()


def hash_value(value: Any) -> str:
    """sha256 of numbers, strings, tensors, and dicts and lists of them."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        digest.update(b"{")
        for key in sorted(value, key=str):
            digest.update(f"{key!r}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def count_litter(folder: Path) -> int:
    """Half-written temporary files that nobody has cleaned away."""
    return len(list(folder.rglob(".*.tmp")))
