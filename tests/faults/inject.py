"""Inject faults into training runs, and compare each result with that of an undisturbed run:  make faults

Injects the faults of PLAN into train.py on a small LIP network and writes the summary to results/faults.json.
"""

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attacks import ATTACKS, SPARSE_LOG, Line, Reference
from processes import ROOT, Group, train_command
from run_contents import TOTAL, hash_run

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.environment import describe_environment
from lip_resnet.files import to_json, write_text

RECORD = ROOT / "results" / "faults.json"
PLAN = {
    "rank death": (10, 2),
    "full disk": (10, 2),
    "SIGKILL": (100, 4),
    "SIGTERM": (50, 4),
    "SIGKILL in a write": (20, 5),
    "broken checkpoint": (1000, "broken_checkpoints.py"),
    "fuzzed config": (10000, "fuzz_recipes.py"),
}
"""Fault -> injections, and how many of them hit one run, or the script of this folder that examines so many files."""


def make_reference(group: Group) -> Reference:
    """Train the undisturbed runs."""

    def run(name: str, *overrides: str, ranks: int = 1) -> tuple[str, float, float]:
        folder = group.folder / name
        process = group.finish(train_command(folder, *overrides, ranks=ranks))
        startup = (folder / "env.json").stat().st_mtime - process.started
        return hash_run(folder), startup, (time.time() - process.started - startup) / TOTAL

    plain, startup, step = run("plain")
    return Reference(plain, run("sparse", SPARSE_LOG)[0], run("pair", ranks=2)[0], startup, step)


def inject(fault: str, times: int, group: Group, reference: Reference) -> dict[str, Any]:
    """Inject one kind of fault so many times; the summary of what became of them. Prints each that does not hold."""
    how = PLAN[fault][1]
    if isinstance(how, str):
        script = [sys.executable, f"tests/faults/{how}", str(group.folder), str(times)]
        row = json.loads(group.finish(script, seconds=7200).printed().splitlines()[-1])
        print(*row["failed"], sep="\n", end="\n" * bool(row["failed"]))
        return row | {"failed": len(row["failed"]), "holds": not row["failed"] and row["cases"] == times}
    lines: list[Line] = []
    while len(lines) < times:
        rng = random.Random(f"{fault} {len(lines)}")
        new = ATTACKS[fault](group, reference, rng, min(how, times - len(lines)))
        print(*(f"does not hold: {json.dumps(line)}\n" for line in new if not line["ok"]), sep="", end="", flush=True)
        lines += new
    return summarize(lines)


def summarize(lines: list[Line]) -> dict[str, Any]:
    """What the injections of one kind into runs did."""
    recomputed = [line["recomputed"] for line in lines]
    return {
        "times": len(lines),
        "phases": dict(Counter(line["phase"] for line in lines).most_common()),
        "recomputed": {"median": statistics.median(recomputed), "most": max(recomputed)},
        "lost": sum(len(line["lost"]) for line in lines),
        "equal": sum(line["equal"] for line in lines),
        "holds": all(line["ok"] for line in lines),
    }


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, help="at most so many injections of each fault, and no record is kept")
    parser.add_argument("--only", nargs="+", choices=PLAN, metavar="FAULT", help=f"of {', '.join(PLAN)}; no record")
    options = parser.parse_args()
    if options.times is not None and options.times < 1:
        raise InputError(f"--times {options.times}; it must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the runs too
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        group = Group(Path(folder))
        try:
            environment, reference = describe_environment("cpu"), make_reference(group)
            for fault in options.only or PLAN:
                rows[fault] = inject(fault, min(PLAN[fault][0], options.times or PLAN[fault][0]), group, reference)
                print(f"{time.strftime('%H:%M:%S')} {fault}: {json.dumps(rows[fault])}", flush=True)
        finally:
            group.end()
    if broken := [fault for fault, row in rows.items() if not row["holds"]]:
        raise InputError(f"faults that were not survived: {', '.join(broken)}")
    if not (options.times or options.only):
        record = {"environment": environment, "reference": asdict(reference), "faults": rows}
        write_text(RECORD, to_json(record, indent=1) + "\n")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    cli.launch(main)
