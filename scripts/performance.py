"""Rows of ``benchmark.py`` as text: JSON, Markdown, and the README's performance section from ``benchmarks/*.json``."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "benchmarks"
Row = dict[str, Any]


def to_json(rows: list[Row], environment: Row) -> str:
    """One object, a line a row, numbers of four digits."""
    lines = [json.dumps({key: _short(value) for key, value in row.items()}) for row in rows]
    return f'{{"environment": {json.dumps(environment)},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def markdown(rows: list[Row], environment: Row) -> str:
    """All that is known: the environment as a list, then every column of every row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    facts = [f"- {key}: {' '.join(value) if isinstance(value, list) else value}" for key, value in environment.items()]
    return "\n".join([*facts, "", *_table(keys, [[row.get(key) for key in keys] for row in rows])]) + "\n"


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _table(header: list[str], lines: list[list[Any]]) -> list[str]:
    cells = [header, *([_show(value) for value in line] for line in lines)]
    rows = ["| " + " | ".join(row) + " |" for row in cells]
    return [rows[0], "|" + "---|" * len(header), *rows[1:]]


# ---- the README's section ----


def _operator(rows: list[Row]) -> list[str]:
    """A line a site and layout; a form's speedup over the textbook form, failed where it failed."""
    found = {(row["layout"], row["site"], row.get("direction"), row["form"]): row for row in rows}
    places = list(dict.fromkeys((row["layout"], row["site"]) for row in rows))
    columns = (
        *((f"{form}, {direction}", form, direction, "speedup")
          for form in ("lip2d", "plain form") for direction in ("forward", "forward + backward")),
        ("share of the copy bound", "lip2d", "forward + backward", "share_of_copy_bound"),
        ("textbook, torch.compile", "textbook, torch.compile", "forward + backward", "speedup"),
        ("avg_pool2d", "avg_pool2d", "forward + backward", "speedup"),
    )  # fmt: skip

    def value(layout: str, site: str, form: str, direction: str, key: str) -> Any:
        row = found.get((layout, site, direction, form))
        return "failed" if row is None and (layout, site, None, form) in found else (row or {}).get(key)

    header = ["site", "layout", "textbook, forward + backward (ms)", *(column[0] for column in columns)]
    lines = [
        [site, layout, value(layout, site, "textbook", "forward + backward", "ms")]
        + [value(layout, site, *column[1:]) for column in columns]
        for layout, site in places
    ]
    return _table(header, lines)


def _columns(*wanted: tuple[str, str]) -> Callable[[list[Row]], list[str]]:
    """A table of these columns, (key, title), a line a row; what failed says so."""

    def table(rows: list[Row]) -> list[str]:
        columns = [(key, title) for key, title in wanted if any(key in row for row in rows)]
        lines = [
            ["failed" if "failed" in row and key not in row else row.get(key) for key, _ in columns] for row in rows
        ]
        return _table([title for _, title in columns], lines)

    return table


_NETWORK = (("model", "network"), ("batch", "batch"), ("images_per_second", "images/s"), ("ms", "median (ms)"))
_RATIOS = (("time / resnet50", "time / resnet50's"), ("time / floor", "time / convolution floor's"))
_INFERENCE = _columns(*_NETWORK, ("ms_p90", "90% (ms)"), ("ms_p99", "99% (ms)"), *_RATIOS)
_TRAINING = _columns(*_NETWORK, ("ms_q1", "quartile 1"), ("ms_q3", "quartile 3"), *_RATIOS)
_STEP = _columns(
    *(("step", "a step"), ("images_per_second", "images/s"), ("ms", "median (ms)"), ("ms_q1", "quartile 1")),
    *(("ms_q3", "quartile 3"), ("time / as train.py", "time / as train.py's")),
)
_MEMORY = _columns(
    *(("model", "network"), ("batch", "batch"), ("kept_mib", "kept for backward (MiB)")),
    *(("kept / resnet50", "/ resnet50's"), ("peak_mib", "peak (MiB)"), ("peak / resnet50", "peak / resnet50's")),
)


class Part(NamedTuple):
    """One table: the rows in ``benchmarks/<name>.json``, made by ``command``."""

    name: str
    title: str
    table: Callable[[list[Row]], list[str]]
    command: str


_PAIR = '"lip_resnet50" "lip_resnet50, convolution floor"'
PARTS = (
    Part("op_cpu", "The operator on a CPU", _operator, "op --device cpu --layout contiguous channels_last --rounds 7"),
    Part("train_cpu", "Training steps on a CPU", _TRAINING, "train --device cpu"),
    Part("model_cpu", "Inference on a CPU", _INFERENCE, "model --device cpu"),
    Part("train_plain", "Training steps on a CPU, no compiler at hand", _TRAINING,
         f"train --device cpu --contestants {_PAIR}"),
    Part("model_plain", "Inference on a CPU, no compiler at hand", _INFERENCE,
         f"model --device cpu --batch 8 --contestants {_PAIR}"),
    Part("step_cpu", "What pays in a training step, on a CPU", _STEP, "step --device cpu"),
    Part("memory_cpu", "Memory of a training step", _MEMORY, "memory --device cpu"),
    Part("op_gpu_bfloat16", "The operator on a GPU, bfloat16", _operator,
         "op --device cuda --layout contiguous channels_last --precision bfloat16"),
    Part("op_gpu_float32", "The operator on a GPU, float32", _operator,
         "op --device cuda --layout contiguous channels_last"),
    Part("train_gpu", "Training steps on a GPU", _TRAINING, "train --device cuda --precision bfloat16"),
    Part("train_gpu_compiled", "Training steps on a GPU, torch.compile", _TRAINING,
         "train --device cuda --precision bfloat16 --compile"),
    Part("step_gpu", "What pays in a training step, on a GPU", _STEP, "step --device cuda --precision bfloat16"),
    Part("model_gpu", "Inference on a GPU", _INFERENCE, "model --device cuda --precision bfloat16"),
    Part("memory_gpu", "Peak memory on a GPU", _MEMORY, "memory --device cuda --precision bfloat16"),
)  # fmt: skip


def command_line(part: Part) -> str:
    """What a user types to measure a part."""
    prefix = "LIP_KERNELS=plain " if part.name.endswith("_plain") else ""
    return f"{prefix}python scripts/benchmark.py {part.command} --output benchmarks/{part.name}.json"


def section(folder: Path = FOLDER) -> str:
    """Every part's table with the command and the machine behind it, or that it was not measured yet."""
    lines: list[str] = []
    for part in PARTS:
        path = folder / f"{part.name}.json"
        lines += ["", f"**{part.title}**", ""]
        if not path.is_file():
            lines.append(f"not measured yet: `{command_line(part)}`")
            continue
        kept = json.loads(path.read_text(encoding="utf-8"))
        facts, rows = kept["environment"], kept["rows"]
        keys = ("network", "batch", "size", "precision", "layout", "compile")
        shared = [key for key in keys if len({row.get(key) for row in rows}) == 1]
        told = [f"{key} {rows[0][key]}" for key in shared if rows[0].get(key) is not None]
        lines += [*part.table(rows), "", ", ".join([*told, made_by(facts)])]
    return "\n".join(lines[1:])


def made_by(facts: Row) -> str:
    """Where and how rows were measured."""
    command = ("" if facts["lip_kernels"] == "auto" else "LIP_KERNELS=plain ") + shlex.join(facts["command"])
    machine = f"{facts['hardware']}, torch {facts['torch']}, {facts['threads']} threads"
    return f"{machine}, load {facts['load']} before the run, {facts['date'][:10]}; `{command}`"
