"""Break training runs in every way a cluster can, and show that each ends in the same bits:  make faults

Injects the faults of PLAN into train.py on a small LIP network, compares every end with that of a run that nothing
happened to, and renders the record into docs/faults.md. Finished injections are not repeated when it is started again.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import fault_kinds
import fault_table
import make_docs
from fault_kinds import SPARSE_LOG, References
from fault_runs import ROOT, TOTAL, Aborted, Lane, command, hash_state

from lip_resnet import checkpoint, distributed, runlog
from lip_resnet.config import InputError

Line = dict[str, Any]
LANES = 2
RECORD = ROOT / "benchmarks" / "faults.jsonl"
PAGE = ROOT / "docs" / "faults.md"


@dataclass(frozen=True)
class Kind:
    """A row of the plan."""

    times: int
    """Injections in a full run."""
    together: int
    """How many hit one run, or are made by one process."""
    inject: Callable[[Lane, References, int, int], list[Line]]
    """(lane, references, seed, how many) -> a line each; may give fewer where a run was faster than its fault."""


def made_by(script: str) -> Callable[[Lane, References, int, int], list[Line]]:
    """Injections that a script makes in a process of its own: it prints their lines."""

    def inject(lane: Lane, _: References, seed: int, wanted: int) -> list[Line]:
        lines = lane.work / "lines.txt"
        options = ["--seed", seed, "--count", wanted, "--work", lane.work / "files", "--output", lines]
        lane.finish([sys.executable, f"scripts/{script}", *map(str, options)], seconds=3600)
        lane.end()
        return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]

    return inject


PLAN = {
    "rank death": Kind(10, 2, fault_kinds.kill_rank),
    "full disk": Kind(10, 2, fault_kinds.fill_disk),
    "SIGKILL": Kind(100, 4, fault_kinds.kill),
    "SIGTERM": Kind(50, 4, fault_kinds.terminate),
    "SIGKILL in a write": Kind(20, 5, fault_kinds.kill_in_write),
    "contrast": Kind(40, 10, fault_kinds.contrast),
    "broken checkpoint": Kind(1000, 50, made_by("fault_files.py")),
    "fuzzed config": Kind(10000, 500, made_by("fault_recipes.py")),
}


class Record:
    """The lines so far, on disk after every episode, and what is still to do.

    Args:
        path: of the lines.
        scale: of the plan's numbers.
        kinds: of the plan that are wanted.
    """

    def __init__(self, path: Path, scale: float, kinds: list[str]) -> None:
        self.path = path
        self.wanted = {kind: max(1, round(PLAN[kind].times * scale)) for kind in kinds}
        self.lines = fault_table.read_lines(path)
        self.under_way: Counter[str] = Counter()
        self.seeds = Counter({line["kind"]: line["seed"] + 1 for line in self.lines if "kind" in line})
        self.lock = threading.Lock()

    def done(self, kind: str) -> int:
        """Injections of a kind so far."""
        return sum(line.get("cases", 1) for line in self.lines if line.get("kind") == kind)

    def take(self) -> tuple[str, int, int] | None:
        """The next episode, (kind, seed, injections); None when all are done or under way."""
        with self.lock:
            for kind, wanted in self.wanted.items():
                missing = min(wanted - self.done(kind) - self.under_way[kind], PLAN[kind].together)
                if missing > 0:
                    self.under_way[kind] += missing
                    self.seeds[kind] += 1
                    return kind, self.seeds[kind] - 1, missing
        return None

    def add(self, kind: str, seed: int, wanted: int, lane: int, lines: list[Line]) -> None:
        """An episode is over: all of its lines are written, or none."""
        with self.lock:
            self.under_way[kind] -= wanted
            self.lines += [{"kind": kind, "seed": seed, "lane": lane, **line} for line in lines]
            self.save()
            bad = [line for line in lines if not line["ok"] and not line.get("fault", "").startswith("contrast")]
            print(
                f"{time.strftime('%H:%M:%S')} lane {lane}: {kind} {self.done(kind)}/{self.wanted[kind]}"
                + "".join(f"\n  DOES NOT HOLD: {json.dumps(line)}" for line in bad),
                flush=True,
            )

    def save(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        checkpoint.write_atomically(self.path, lambda file: file.write(text.encode()))


def make_references(record: Record, lanes: list[Lane]) -> References:
    """The ends of three runs that nothing happens to; from the record where it has them.

    Raises:
        InputError: the record is of other code.
    """
    commit = runlog.describe_environment("cpu")["git_commit"]
    if record.lines:
        head = record.lines[0]
        if head["environment"]["git_commit"] != commit:
            raise InputError(f"{record.path} is of commit {head['environment']['git_commit']}; remove it to start anew")
        return References(**head["references"])

    def run(lane: Lane, *overrides: str, processes: int = 1) -> tuple[str, float, float]:
        folder = fault_kinds.fresh(lane)
        process = lane.finish(command(folder, *overrides, processes=processes))
        startup = (folder / "env.json").stat().st_mtime - process.started
        step = (time.time() - process.started - startup) / TOTAL
        lane.end()
        return hash_state(folder), startup, step

    plain, startup, step = run(lanes[0])
    shutil.copytree(lanes[0].work / "run", record.path.parent / "whole", dirs_exist_ok=True)
    references = References(plain, run(lanes[0], SPARSE_LOG)[0], run(lanes[0], processes=2)[0], startup, step)
    record.lines.append({"environment": runlog.describe_environment("cpu"), "references": asdict(references)})
    record.save()
    return references


def work_through(record: Record, lanes: list[Lane]) -> None:
    """Every lane takes episodes until none is left."""
    references = make_references(record, lanes)

    def work(lane: Lane) -> None:
        try:
            while (episode := record.take()) is not None:
                kind, seed, wanted = episode
                record.add(kind, seed, wanted, lane.number, PLAN[kind].inject(lane, references, seed, wanted))
        except Aborted:
            return
        except BaseException:
            lane.stopping.set()
            raise
        finally:
            lane.end()

    with ThreadPoolExecutor(len(lanes)) as pool:
        for future in [pool.submit(work, lane) for lane in lanes]:
            future.result()


def main() -> None:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of injections (default: 1)")
    parser.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN), metavar="KIND", help=", ".join(PLAN))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults", help="where to work and keep the record")
    parser.add_argument("--table", action="store_true", help=f"only render {PAGE.name} from the record in benchmarks/")
    options = parser.parse_args()
    if not options.table:
        inject(options)
        if options.scale < 1 or options.only != list(PLAN):
            return
    page = render(PAGE.read_text(encoding="utf-8"))
    checkpoint.write_atomically(PAGE, lambda file: file.write(page.encode()))


def render(page: str) -> str:
    """The page with its tables made anew from the record.

    Raises:
        InputError: there is no record.
    """
    lines = fault_table.read_lines(RECORD)
    if not lines:
        raise InputError(f"{RECORD} has no lines; make faults writes it")
    return make_docs.refresh(page, {"faults": lambda: fault_table.render(lines)})


def inject(options: Any) -> None:
    """Do what is still to do, print the table, and keep the record of a full run.

    Raises:
        InputError: a row does not hold.
    """
    work = options.work.resolve()
    stopping = threading.Event()
    lanes = [Lane(number, work / f"lane{number}", stopping) for number in range(LANES)]
    for lane in lanes:
        lane.work.mkdir(parents=True, exist_ok=True)
    record = Record(work / "faults.jsonl", options.scale, options.only)

    def stop(*_: int | FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    began = time.time()
    try:
        work_through(record, lanes)
    except Aborted:
        pass
    finally:
        for lane in lanes:
            lane.end()
    if stopping.is_set():
        raise distributed.Stopped("nothing is left running; the same command goes on")
    print(f"{(time.time() - began) / 60:.1f} minutes\n\n{fault_table.render(record.lines)}", flush=True)
    if broken := fault_table.rows_that_do_not_hold(record.lines):
        raise InputError(f"rows that do not hold: {', '.join(broken)}; see {record.path}")
    if options.scale >= 1 and options.only == list(PLAN):
        RECORD.parent.mkdir(exist_ok=True)
        shutil.copyfile(record.path, RECORD)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    distributed.launch(main)
