"""Start commands of this repository, wait for them with a time limit, and end everything that they started."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from lip_resnet.config import InputError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests" / "faults" / "recipe.yaml"
TIME_LIMIT = 300
"""Seconds after which a process that should have ended counts as hanging; a whole run takes ten on a quiet machine."""
MARK = "LIP_FAULT_RUN"
"""Environment variable that identifies every descendant of a process, whatever session it moved to."""
MADE_HERE = ".made-by-fault-tests"
"""Marks a working folder: only folders that hold it are worked in again."""

stopping = threading.Event()
"""Set by SIGINT and SIGTERM: every ``Process.wait`` then raises ``Interrupted``."""


class Interrupted(Exception):
    """The command was asked to stop."""


def stop_on_signals() -> None:
    """Let SIGINT and SIGTERM set ``stopping``."""

    def stop(*_: int | FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def open_work_folder(folder: Path) -> Path:
    """Make a working folder, or take one that an earlier call made; absolute.

    Raises:
        InputError: it is a file, or holds files that no earlier call has made.
    """
    folder = folder.resolve()
    try:
        if folder.exists() and not (folder / MADE_HERE).is_file() and any(folder.iterdir()):
            raise InputError(f"--work {folder} holds files that this command did not make; give a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MADE_HERE).touch()
    except OSError as error:
        raise InputError(f"--work {folder}: {error.strerror}; give a new or empty folder") from error
    return folder


def train_command(folder: Path, *overrides: str, kill_at: tuple[str, int] | None = None, ranks: int = 1) -> list[str]:
    """``train.py`` on the fault recipe as a user would type it; ``kill_at`` are the arguments of kill_in_write.py."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--max-restarts=5"]
    script = ["tests/faults/kill_in_write.py", kill_at[0], str(kill_at[1])] if kill_at else ["train.py"]
    return [*launcher, *script, "--config", str(RECIPE), "--output", str(folder), "--resume", "auto", *overrides]


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Process:
    """A started command and everything that descends from it: one thread, no GPU, a session of its own.

    Args:
        arguments: the command line; its working directory is the repository.
        log: the file that its output goes to.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        if stopping.is_set():
            raise Interrupted
        self.mark, self.log = f"{MARK}={uuid.uuid4().hex}", log
        search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": search}
        environment |= dict([self.mark.split("=")])
        with open(log, "wb") as file:
            self.handle = subprocess.Popen(
                *(arguments,), cwd=ROOT, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        self.pid, self.started = self.handle.pid, time.time()

    def members(self) -> list[int]:
        """Its living descendants and itself; zombies do not count."""
        pids = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    if self.mark.encode() in (folder / "environ").read_bytes():  # empty for a zombie
                        pids.append(int(folder.name))
        return pids

    def children(self) -> list[int]:
        """Its direct children in the order of their start: torchrun's workers by rank."""
        pids = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(fields[1]) == self.pid:
                    pids.append(pid)
        return sorted(pids)

    def wait(self, seconds: float = TIME_LIMIT, until: Callable[[], bool] = lambda: False) -> int | None:
        """The exit code; None when the time is up, or ``until`` holds, before the process has ended."""
        end = time.monotonic() + seconds
        while (remaining := end - time.monotonic()) > 0 and not until():
            if stopping.is_set():
                raise Interrupted
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.handle.wait(min(remaining, 0.05))
        return self.handle.poll()

    def exit_code(self, seconds: float = TIME_LIMIT) -> int | str:
        """The exit code, or "hangs" after so many seconds; then the process is killed."""
        code = self.wait(seconds)
        if code is None:
            self.kill_all()
        return "hangs" if code is None else code

    def kill_all(self) -> None:
        """SIGKILL to it and all of its descendants."""
        while members := self.members():
            for pid in members:
                send(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.handle.wait()

    def printed(self) -> str:
        """Its output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Worker:
    """A folder to work in and the processes that were started from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []
        folder.mkdir(exist_ok=True)

    def start(self, arguments: list[str]) -> Process:
        """Start a command."""
        process = Process(arguments, self.folder / "log.txt")
        self.started.append(process)
        return process

    def finish(self, arguments: list[str], seconds: float = TIME_LIMIT) -> Process:
        """Run a command to its end.

        Raises:
            RuntimeError: its exit code is not 0.
        """
        process = self.start(arguments)
        if (code := process.exit_code(seconds)) != 0:
            raise RuntimeError(f"exit code {code}: {process.printed()[-600:]}")
        return process

    def end(self, seconds: float = 0) -> int:
        """Give the processes so many seconds to end, kill the others, and return how many those were."""
        end = time.monotonic() + seconds
        while (alive := [pid for process in self.started for pid in process.members()]) and time.monotonic() < end:
            time.sleep(0.2)
        for process in self.started:
            process.kill_all()
        self.started.clear()
        return len(alive)
