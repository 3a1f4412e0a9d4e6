"""For the fault harness: the record of injections to the tables of docs/faults.md."""

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from fault_runs import INTERVAL

Line = dict[str, Any]
RUNS = ("SIGKILL", "SIGTERM", "SIGKILL in a write", "full disk", "rank death")
CONTRAST = ("contrast: SIGKILL", "contrast: SIGKILL in a write")
FILES = ("broken checkpoint", "fuzzed config")


def read_lines(path: Path) -> list[Line]:
    """The record's lines; none where there is no record yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _of(lines: list[Line], fault: str) -> list[Line]:
    return [line for line in lines if line.get("fault") == fault]


def rows_that_do_not_hold(lines: list[Line]) -> list[str]:
    """Faults of which one injection went wrong, and a contrast that lost nothing."""
    rows = [fault for fault in (*RUNS, *FILES) if not all(line["ok"] for line in _of(lines, fault))]
    for fault in CONTRAST[1:]:
        found = _of(lines, fault)
        if found and not any(line["lost"] for line in found):
            rows.append(f"{fault} (it lost nothing)")
    return rows


def _row(fault: str, found: list[Line]) -> str:
    phases = Counter(line["phase"] for line in found).most_common()
    steps = [line["recomputed"] for line in found]
    lost = sum(len(line["lost"]) for line in found)
    hit = ", ".join(f"{phase} {count}" for phase, count in phases)
    cells = [fault, len(found), hit, f"{statistics.median(steps):g}, {max(steps)}", lost]
    if fault in CONTRAST:
        gone = sum(bool(line["lost"]) for line in found)
        cells.append(f"{gone} of {len(found)} could not go on" if gone else "-")
    else:
        cells.append(f"{sum(line['equal'] for line in found)} of {len(found)}")
        cells.append("yes" if all(line["ok"] for line in found) else "**no**")
    return "| " + " | ".join(map(str, cells)) + " |"


def render(lines: list[Line]) -> str:
    """The tables, as Markdown."""
    head = lines[0]
    environment, references = head["environment"], head["references"]
    text = [
        f"{environment['hardware']}, torch {environment['torch']}, Python {environment['python']}; "
        f"commit {str(environment['git_commit'])[:12]}. A checkpoint every {INTERVAL} steps. "
        f"The uninterrupted run ends in `{references['plain'][:16]}`, with a log line every 4 steps in "
        f"`{references['sparse'][:16]}`, of two processes in `{references['pair'][:16]}`.",
        "",
        "| fault | times | when it hit | steps recomputed: median, most | files lost | same end (sha256) | holds |",
        "|---|--:|---|--:|--:|--:|---|",
        *(_row(fault, found) for fault in RUNS if (found := _of(lines, fault))),
        "",
        "| file | cases | what became of them | tracebacks or wrong loads | most memory | holds |",
        "|---|--:|---|--:|--:|---|",
        *(_file_row(fault, found) for fault in FILES if (found := _of(lines, fault))),
        "",
        "| the same kills on a plain in-place `torch.save` | times | when it hit | steps recomputed: median, most "
        "| files lost | runs lost |",
        "|---|--:|---|--:|--:|--:|",
        *(_row(fault, found) for fault in CONTRAST if (found := _of(lines, fault))),
    ]
    return "\n".join(text)


def _file_row(fault: str, found: list[Line]) -> str:
    became: Counter[str] = Counter()
    for line in found:
        became.update(line["became"])
    cases = sum(line["cases"] for line in found)
    failed = sum(len(line["failed"]) for line in found)
    cells = [fault, cases, ", ".join(f"{what} {count}" for what, count in became.most_common()), failed]
    cells.append(f"+{max(line['memory_mb'] for line in found)} MB")
    cells.append("yes" if all(line["ok"] for line in found) else "**no**")
    return "| " + " | ".join(map(str, cells)) + " |"
