"""The lines of all injections to the summary in results/faults.json, and that to the tables of docs/faults.md."""

import statistics
from collections import Counter
from typing import Any

from run_contents import INTERVAL

Line = dict[str, Any]
RUNS = ("SIGKILL", "SIGTERM", "SIGKILL in a write", "full disk", "rank death")
FILES = ("broken checkpoint", "fuzzed config")


def summarize(lines: dict[str, list[Line]]) -> dict[str, Line]:
    """Fault -> what its injections did, of those that have any."""
    rows: dict[str, Line] = {}
    for fault in (name for name in RUNS if lines.get(name)):
        each = lines[fault]
        recomputed = [line["recomputed"] for line in each]
        rows[fault] = {
            "times": len(each),
            "phases": dict(Counter(line["phase"] for line in each).most_common()),
            "recomputed": {"median": statistics.median(recomputed), "most": max(recomputed)},
            "lost": sum(len(line["lost"]) for line in each),
            "equal": sum(line["equal"] for line in each),
            "holds": all(line["ok"] for line in each),
        }
    for fault in (name for name in FILES if lines.get(name)):
        each = lines[fault]
        became: Counter[str] = Counter()
        for line in each:
            became.update(line["became"])
        rows[fault] = {
            "cases": sum(line["cases"] for line in each),
            "became": dict(became.most_common()),
            "failed": sum(len(line["failed"]) for line in each),
            "memory_mb": max(line["memory_mb"] for line in each),
            "holds": all(line["ok"] for line in each),
        }
    return rows


def render(record: dict[str, Any]) -> str:
    """Markdown of a record: ``environment``, ``reference`` (hashes of undisturbed runs), ``faults`` (a summary)."""
    environment, reference, rows = record["environment"], record["reference"], record["faults"]

    def counts(values: dict[str, int]) -> str:
        return ", ".join(f"{name} {count}" for name, count in values.items())

    def line(*cells: object, holds: bool) -> str:
        return "| " + " | ".join(map(str, (*cells, "yes" if holds else "**no**"))) + " |"

    text = [
        f"{environment['hardware']}, torch {environment['torch']}, Python {environment['python']}; "
        f"commit {str(environment['git_commit'])[:12]}. A checkpoint every {INTERVAL} steps. "
        f"The uninterrupted run ends in `{reference['plain'][:16]}`, with a log line every 4 steps in "
        f"`{reference['sparse'][:16]}`, of two processes in `{reference['pair'][:16]}`.",
        "",
        "| fault | times | when it hit | steps recomputed: median, most | files lost | same end (sha256) | holds |",
        "|---|--:|---|--:|--:|--:|---|",
    ]
    for fault, row in ((name, rows[name]) for name in RUNS if name in rows):
        recomputed, equal = row["recomputed"], f"{row['equal']} of {row['times']}"
        steps = f"{recomputed['median']:g}, {recomputed['most']}"
        text.append(line(fault, row["times"], counts(row["phases"]), steps, row["lost"], equal, holds=row["holds"]))
    text += [
        "",
        "| file | cases | what became of them | tracebacks or wrong loads | most memory | holds |",
        "|---|--:|---|--:|--:|---|",
    ]
    for fault, row in ((name, rows[name]) for name in FILES if name in rows):
        memory = f"+{row['memory_mb']} MB"
        text.append(line(fault, row["cases"], counts(row["became"]), row["failed"], memory, holds=row["holds"]))
    return "\n".join(text)
