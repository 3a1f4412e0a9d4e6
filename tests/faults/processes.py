"""Start commands of this repository, wait for them with a time limit, and end everything that they started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests" / "faults" / "recipe.yaml"
TIME_LIMIT = 300
"""Seconds after which a process that should have ended counts as hanging; a whole run takes ten on a quiet machine."""


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


class Process(subprocess.Popen):
    """A command with one thread, no GPU and a session of its own.

    Args:
        arguments: the command line; its working directory is the repository.
        log: the file that its output goes to.
        mark: NAME=VALUE in its environment, which its descendants inherit.
    """

    def __init__(self, arguments: list[str], log: Path, mark: str) -> None:
        self.log, self.started = log, time.time()
        search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": search}
        environment |= dict([mark.split("=")])
        with open(log, "wb") as file:
            super().__init__(
                arguments, cwd=ROOT, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=file,
                stderr=file,
            )  # fmt: skip

    def wait_until(self, condition: Callable[[], bool] = lambda: False, seconds: float = TIME_LIMIT) -> int | None:
        """The exit code; None when the condition holds, or the time is up, before the process has ended."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end and not condition():
            time.sleep(0.02)
        return self.poll()

    def exit_code(self, seconds: float = TIME_LIMIT) -> int | str:
        """The exit code, or "hangs" after so many seconds; then the process is killed."""
        code = self.wait_until(seconds=seconds)
        if code is None:
            self.kill()
            self.wait()
            return "hangs"
        return code

    def children(self) -> list[int]:
        """Its direct children in the order of their start: torchrun's workers by rank."""
        command = ["ps", "--ppid", str(self.pid), "-o", "pid=,stat="]
        rows = [row.split() for row in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()]
        return sorted(int(pid) for pid, state in rows if not state.startswith("Z"))

    def printed(self) -> str:
        """Its output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Group:
    """The processes that were started here and all their descendants, whatever session those moved to.

    Args:
        folder: an existing folder for the run and for the log of the process started last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, f"LIP_FAULT_RUN={uuid.uuid4().hex}"
        self.started: list[Process] = []

    def start(self, arguments: list[str]) -> Process:
        """Start a command."""
        self.started.append(Process(arguments, self.folder / "log.txt", self.mark))
        return self.started[-1]

    def finish(self, arguments: list[str], seconds: float = TIME_LIMIT) -> Process:
        """Run a command to its end.

        Raises:
            RuntimeError: its exit code is not 0.
        """
        process = self.start(arguments)
        if (code := process.exit_code(seconds)) != 0:
            raise RuntimeError(f"exit code {code}: {process.printed()[-600:]}")
        return process

    def members(self) -> list[int]:
        """Those that live."""
        pids = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    if self.mark.encode() in (folder / "environ").read_bytes():  # empty for a zombie
                        pids.append(int(folder.name))
        return pids

    def end(self, seconds: float = 0) -> int:
        """Give the processes so many seconds to end, kill the others, and return how many those were."""
        end = time.monotonic() + seconds
        while (alive := self.members()) and time.monotonic() < end:
            time.sleep(0.2)
        while members := self.members():
            for pid in members:
                send(pid, signal.SIGKILL)
            time.sleep(0.02)
        for process in self.started:
            process.wait()
        self.started.clear()
        return len(alive)
