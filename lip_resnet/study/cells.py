"""The cells of a study: each is trained by train.py and evaluated by eval.py, in processes that end with this one."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from lip_resnet.errors import EXIT_CODES, InputError, Stopped
from lip_resnet.files import to_json, write_text
from lip_resnet.study.design import Cell, Design

ROOT = Path(__file__).parents[2]
"""The checkout, which holds train.py and eval.py."""
_STOPPED, _REFUSED = EXIT_CODES[Stopped], EXIT_CODES[InputError]
# A child that runs a Python script and ends when this process does, even if that is killed outright.
_CHILD = (
    "import runpy, sys; from lip_resnet.lifeline import exit_with_parent; exit_with_parent({parent}); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
_TORCHRUN = (
    "import sys; from lip_resnet.lifeline import exit_with_parent; exit_with_parent({parent}); "
    "from torch.distributed.run import main; main(sys.argv[1:])"
)


def run_cells(design: Design, cells: Sequence[Cell], jobs: int) -> dict[str, str]:
    """Train and evaluate the cells that are not finished, ``jobs`` at a time, with a progress bar.

    A cell that was begun goes on from its last checkpoint; one that failed is tried again. A variant whose recipe or
    data a command refuses is not tried with further seeds. SIGTERM and SIGINT stop the running cells, which save first.
    With several GPUs, cells that run at the same time have GPUs of their own. Cells that another process runs are left
    to it.

    Returns:
        Failed cells -> the last line that each has printed.

    Raises:
        Stopped: after a signal.
    """
    todo = [cell for cell in cells if not cell.finished]
    for cell in todo:
        read_record(cell)  # refused now rather than hours later
    children = Children(threads=max(1, (os.cpu_count() or 1) // (jobs * design.study.processes)))
    free: SimpleQueue[str | None] = SimpleQueue()
    for gpus in assign_gpus(jobs, design.study.processes):
        free.put(gpus)
    failed: dict[str, str] = {}
    refused: set[str] = set()
    with (
        children.stopped_by_signals(),
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(todo), unit="cell", disable=None) as bar,
    ):
        waiting = {pool.submit(_run_cell, design, cell, children, free, refused): cell for cell in todo}
        while waiting:
            done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                _report(future, waiting.pop(future), failed, refused, bar)
            bar.refresh()  # the time left
        if children.stopping:
            raise Stopped("the study is saved; the same command goes on")
    return failed


def _report(future: Future[dict[str, Any]], cell: Cell, failed: dict[str, str], refused: set[str], bar: Any) -> None:
    """Show how a cell has ended."""
    record = future.result()
    if record["status"] == "stopped":
        return
    bar.update()
    if record["status"] == "failed":
        failed[str(cell)] = record["message"]
        others = f"; {cell.variant} is not tried with further seeds" if cell.variant in refused else ""
        bar.write(f"{cell}: failed: {record['message']} (see {cell.log}){others}", file=sys.stderr)
    elif record["status"] == "elsewhere":
        bar.write(f"{cell}: another process runs it, or has run it", file=sys.stderr)
    else:
        row = json.loads(cell.row.read_text(encoding="utf-8"))
        figure = f"AP {row['AP']:.2f}" if "AP" in row else f"top-1 {row['top1']:.2f}%"
        bar.write(f"{cell}: {figure}, {record['seconds'] / 60:.1f} min", file=sys.stderr)


def assign_gpus(jobs: int, processes: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of ``jobs`` cells of ``processes`` processes; None: as it is here.

    They share GPUs where there are too few of them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(torch.cuda.device_count())) if visible is None else visible.split(",")
    gpus = [name.strip() for name in names if name.strip()]
    groups = [gpus[first : first + processes] for first in range(0, len(gpus) - processes + 1, processes)]
    if jobs == 1 or len(groups) < 2:
        return [None] * jobs
    return [",".join(groups[job % len(groups)]) for job in range(jobs)]


def _run_cell(
    design: Design, cell: Cell, children: "Children", free: SimpleQueue[str | None], refused: set[str]
) -> dict[str, Any]:
    """Train and evaluate one cell on free GPUs, and write its record; its status is ``elsewhere``, without a record,
    if another process runs it or has finished it meanwhile."""
    gpus = free.get()
    try:
        with _lock(cell) as locked:
            if not locked or cell.finished:
                return {"status": "elsewhere"}
            if children.stopping or cell.variant in refused:
                return {"status": "stopped"}
            return _train_and_evaluate(design, cell, children, gpus, refused)
    finally:
        free.put(gpus)


@contextlib.contextmanager
def _lock(cell: Cell) -> Iterator[bool]:
    """Whether this process may run the cell; the kernel releases the lock of a process that is killed."""
    with open(cell.folder.with_name(f".{cell.folder.name}.lock"), "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _train_and_evaluate(
    design: Design, cell: Cell, children: "Children", gpus: str | None, refused: set[str]
) -> dict[str, Any]:
    before, printed = read_record(cell), cell.log.stat().st_size if cell.log.is_file() else 0
    started = time.monotonic()
    status, message = "stopped", ""
    recipe = cell.folder.with_name("recipe.yaml")
    train = ["train.py", "--config", recipe, "--output", cell.folder, "--resume", "auto", f"train.seed={cell.seed}"]
    flag = "--matches" if cell.detection else "--predictions"
    evaluate = ["eval.py", "--checkpoint", cell.folder, flag, cell.predictions]
    code = children.run(train, cell.log, design.study.processes, gpus)
    if code == 0 and not children.stopping:
        for leftover in (cell.predictions, cell.row):  # of an evaluation that was killed between the two
            leftover.unlink(missing_ok=True)
        code = children.run(evaluate, cell.log, design.study.processes, gpus)
    if cell.finished:
        status = "done"
    elif not children.stopping and code != _STOPPED:
        status, message = "failed", last_line(cell.log, printed) or f"exit code {code}"
    if code == _REFUSED:
        refused.add(cell.variant)
    record = {
        "variant": cell.variant,
        "seed": cell.seed,
        "status": status,
        "seconds": round(before.get("seconds", 0.0) + time.monotonic() - started, 1),
        "message": message,
    }
    write_text(cell.record, to_json(record) + "\n")
    return record


def read_record(cell: Cell) -> dict[str, Any]:
    """A cell's record: ``status`` done, failed or stopped, ``message``, ``seconds`` over all starts; or empty.

    Raises:
        InputError: it cannot be read.
    """
    try:
        record = json.loads(cell.record.read_text(encoding="utf-8"))
        seconds, message = float(record.get("seconds", 0)), str(record.get("message", ""))
        return {"status": record["status"], "seconds": seconds, "message": message}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{cell.record}: not the record of a cell; remove it and run the study again") from error


def last_line(log: Path, start: int = 0) -> str:
    """The last line that a command has printed, where an error stands; of the file from byte ``start`` on."""
    lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    errors = [line for line in lines if ": error: " in line]
    return (errors or [line for line in lines if line.strip()] or [""])[-1].strip()


class Children:
    """Running train.py and eval.py: they end with this process, even if it is killed outright."""

    def __init__(self, threads: int | None) -> None:
        """``threads``: OpenMP threads of each process, unless OMP_NUM_THREADS is set; None: torch's default."""
        self.environment = dict(os.environ)
        if threads is not None:
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.stopping = False
        self._running: set[subprocess.Popen] = set()

    def start(
        self, command: Sequence[object], output: BinaryIO, processes: int, gpus: str | None = None
    ) -> subprocess.Popen:
        """Start ``[script, *arguments]``, by torchrun if ``processes`` > 1; both streams go to ``output``.

        ``gpus``: CUDA_VISIBLE_DEVICES of the command; None: as it is here.
        """
        script, *arguments = map(str, command)
        line = [sys.executable, "-c", _CHILD.format(parent=os.getpid()), str(ROOT / script), *arguments]
        if processes > 1:
            launch = ["--standalone", f"--nproc_per_node={processes}", str(ROOT / script)]
            line = [sys.executable, "-c", _TORCHRUN.format(parent=os.getpid()), *launch, *arguments]
        # In a session of its own, so that Ctrl-C reaches this process alone, which then stops its cells by SIGTERM.
        environment = self.environment | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
        return subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)

    def run(self, command: Sequence[object], log: Path, processes: int, gpus: str | None) -> int:
        """``start`` a command with its output appended to ``log``, and wait; returns its exit code."""
        with open(log, "ab") as file:
            child = self.start(command, file, processes, gpus)
            self._running.add(child)
            if self.stopping:  # the signal came before
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            self._running.discard(child)
        return code

    def stop(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Ask every running command to save and end."""
        self.stopping = True
        for child in list(self._running):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """A context in which SIGTERM and SIGINT call ``stop``."""
        before = {each: signal.signal(each, self.stop) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` -> (i, n): the i-th of n parts, counted from 0.

    Raises:
        InputError: it has not this form.
    """
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise InputError(f"--shard {text!r}; it must be i/n with i from 0 to n - 1, such as 0/4")
    return int(first), int(second)
