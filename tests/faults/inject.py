"""Inject faults into training runs, and compare each result with that of an undisturbed run:  make faults

Injects the faults of PLAN into train.py on a small LIP network and renders results/faults.json into docs/faults.md.
Every finished group of injections is kept below --work: the same command goes on after an interruption.
"""

import json
import os
import queue
import random
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import processes
import summary
from attacks import ATTACKS, SPARSE_LOG, Reference
from processes import ROOT, Interrupted, Worker, train_command
from run_contents import TOTAL, hash_run

from lip_resnet import cli, errors
from lip_resnet.config import InputError
from lip_resnet.environment import describe_environment
from lip_resnet.files import write_atomically

Line = dict[str, Any]
WORKERS = 2
RECORD = ROOT / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
SCRIPTS = {"broken checkpoint": "broken_checkpoints.py", "fuzzed config": "fuzz_recipes.py"}
"""Faults in files: the script of this folder that examines them and prints the outcomes as lines of JSON."""
PLAN = {
    "rank death": (10, 2),
    "full disk": (10, 2),
    "SIGKILL": (100, 4),
    "SIGTERM": (50, 4),
    "SIGKILL in a write": (20, 5),
    "broken checkpoint": (1000, 50),
    "fuzzed config": (10000, 500),
}
"""Fault -> injections in a full run, and in one group: made by one process, or into one run where it lasts."""


def make_reference(worker: Worker) -> Reference:
    """Train the undisturbed runs."""
    folder = worker.folder / "reference"
    shutil.rmtree(folder, ignore_errors=True)  # half of it, by an earlier call, would give wrong times

    def run(name: str, *overrides: str, ranks: int = 1) -> tuple[str, float, float]:
        process = worker.finish(train_command(folder / name, *overrides, ranks=ranks))
        startup = (folder / name / "env.json").stat().st_mtime - process.started
        return hash_run(folder / name), startup, (time.time() - process.started - startup) / TOTAL

    plain, startup, step = run("plain")
    return Reference(plain, run("sparse", SPARSE_LOG)[0], run("pair", ranks=2)[0], startup, step)


def load_reference(path: Path, worker: Worker) -> dict[str, Any]:
    """``environment`` and ``reference``, from an earlier call or made now.

    Raises:
        InputError: they are of another commit.
    """
    environment = describe_environment("cpu")
    if not path.is_file():
        write_json(path, {"environment": environment, "reference": asdict(make_reference(worker))})
    head = json.loads(path.read_text(encoding="utf-8"))
    commit = head["environment"]["git_commit"]
    if commit != environment["git_commit"]:
        raise InputError(f"--work {path.parent} holds results of commit {commit}; give another folder or remove it")
    return head


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def inject(fault: str, first: int, count: int, worker: Worker, reference: Reference) -> list[Line]:
    """Inject the faults ``first`` to ``first + count`` of one kind; a line each, or for many files one."""
    if fault in SCRIPTS:
        folder = worker.folder / "files"
        folder.mkdir(exist_ok=True)
        script = [sys.executable, f"tests/faults/{SCRIPTS[fault]}", str(folder), str(first), str(count)]
        printed = worker.finish(script, seconds=3600).printed()
        outcomes = [json.loads(text) for text in printed.splitlines() if text.startswith("{")]
        if sum(line["cases"] for line in outcomes) != count:
            raise RuntimeError(f"{SCRIPTS[fault]} did not examine {count} files: {printed[-600:]}")
        return outcomes
    lines, rng = [], random.Random(f"{fault} {first}")
    while len(lines) < count:
        lines += ATTACKS[fault](worker, reference, rng, count - len(lines))
    return lines


def inject_all(work: Path, times: dict[str, int]) -> dict[str, Any]:
    """Inject what earlier calls in ``work`` have not, so many times each; the record of all of it."""
    workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for number in range(WORKERS):
        workers.put(Worker(work / f"worker{number}"))
    worker = workers.get()
    try:
        head = load_reference(work / "reference.json", worker)
    finally:
        worker.end()
        workers.put(worker)
    reference, lock = Reference(**head["reference"]), threading.Lock()
    lines: dict[str, list[Line]] = {fault: [] for fault in times}

    def make_group(fault: str, first: int, count: int) -> None:
        path, worker = work / f"{fault}-{first}-{count}.json", workers.get()
        try:
            if not path.is_file():
                write_json(path, inject(fault, first, count, worker, reference))
            with lock:
                group = json.loads(path.read_text(encoding="utf-8"))
                lines[fault] += group
                done = sum(line.get("cases", 1) for line in lines[fault])
                print(f"{time.strftime('%H:%M:%S')} {fault} {done}/{times[fault]}", flush=True)
                for line in group:
                    if not line["ok"]:
                        print(f"  does not hold: {json.dumps(line)}", flush=True)
        except BaseException:
            processes.stopping.set()
            raise
        finally:
            worker.end()
            workers.put(worker)

    with ThreadPoolExecutor(WORKERS) as pool:
        groups = [
            pool.submit(make_group, fault, first, min(PLAN[fault][1], number - first))
            for fault, number in times.items()
            for first in range(0, number, PLAN[fault][1])
        ]
    errors = [error for group in groups if (error := group.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):
        raise error
    return {**head, "faults": summary.summarize(lines)}


def render(page: str) -> str:
    """The page with its tables made anew from the record.

    Raises:
        InputError: the page has no place for them.
    """
    marked = re.compile(r"(<!-- faults:begin -->\n).*(<!-- faults:end -->)", re.DOTALL)
    if not marked.search(page):
        raise InputError(f"{PAGE} has no lines <!-- faults:begin --> and <!-- faults:end -->")
    table = summary.render(json.loads(RECORD.read_text(encoding="utf-8")))
    return marked.sub(lambda match: f"{match[1]}{table}\n{match[2]}", page)


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, help="at most so many injections of each fault, and no record is kept")
    parser.add_argument("--only", nargs="+", choices=PLAN, metavar="FAULT", help=f"of {', '.join(PLAN)}; no record")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults", help="new, empty, or of an earlier call")
    parser.add_argument("--table", action="store_true", help=f"only render {PAGE.name} from {RECORD.name}")
    options = parser.parse_args()
    if options.times is not None and options.times < 1:
        raise InputError(f"--times {options.times}; it must be at least 1")
    if not options.table:
        times = {fault: min(PLAN[fault][0], options.times or PLAN[fault][0]) for fault in options.only or PLAN}
        began = time.time()
        processes.stop_on_signals()
        try:
            record = inject_all(processes.open_work_folder(options.work), times)
        except Interrupted as error:
            raise errors.Stopped("nothing is left running; the same command goes on") from error
        print(f"{(time.time() - began) / 60:.1f} minutes\n\n{summary.render(record)}", flush=True)
        if broken := [fault for fault, row in record["faults"].items() if not row["holds"]]:
            raise InputError(f"faults that were not survived: {', '.join(broken)}; see the files in {options.work}")
        if options.times or options.only:
            return
        write_json(RECORD, {"command": "make faults", **record})
    page = render(PAGE.read_text(encoding="utf-8"))
    write_atomically(PAGE, lambda file: file.write(page.encode()))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    cli.launch(main)
