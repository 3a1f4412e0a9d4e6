"""Rows of ``benchmark.py`` as Markdown: one measurement's, and the tables of the docs from ``results/*.jsonl``."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.quantities import GPUS, QUANTITIES, gpu_of, predictions
from bench.timing import Row
from lip_resnet.evaluation.render import render

FOLDER = Path(__file__).parents[2] / "results"


def read(path: Path) -> tuple[Row, list[Row]]:
    """(environment, rows) of a file that ``benchmark.py`` wrote."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return head["environment"], rows


def shorten(value: Any) -> Any:
    """Round the floats of a row, or of a value of a row, to four significant digits; NaN and infinity are None."""
    if isinstance(value, dict):
        return {key: shorten(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def markdown(rows: list[Row], environment: Row) -> str:
    """The environment as a list, then every column of every row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    facts = [f"- {key}: {' '.join(value) if isinstance(value, list) else value}" for key, value in environment.items()]
    return "\n".join([*facts, "", _table(keys, [[row.get(key) for key in keys] for row in rows])]) + "\n"


def show(value: Any) -> str:
    """A value for a table: three digits, a range for a list, "-" for None."""
    if isinstance(value, list):
        return " to ".join(map(show, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _table(header: list[str], rows: list[list[Any]]) -> str:
    return render(header, [[show(value) for value in row] for row in rows]).rstrip()


# ---- tables of the docs ----


def _operator(rows: list[Row]) -> str:
    """One line per site and layout: each form's speedup over the textbook form, or ``failed``."""
    by_key = {(row["layout"], row["site"], row.get("direction"), row["form"]): row for row in rows}
    sites = list(dict.fromkeys((row["layout"], row["site"]) for row in rows))
    both = "forward + backward"
    columns = (
        *((f"{form}, {direction}", form, direction, "speedup")
          for form in ("lip2d", "plain form") for direction in ("forward", both)),
        ("share of the copy bound", "lip2d", both, "share_of_copy_bound"),
        ("textbook, torch.compile", "textbook, torch.compile", both, "speedup"),
        ("avg_pool2d", "avg_pool2d", both, "speedup"),
    )  # fmt: skip

    def value(layout: str, site: str, form: str, direction: str, key: str) -> Any:
        row = by_key.get((layout, site, direction, form)) or by_key.get((layout, site, None, form), {})
        return "failed" if "failed" in row else row.get(key)

    header = ["site", "layout", f"textbook, {both} (ms)", *(column[0] for column in columns)]
    return _table(
        header,
        [
            [site, layout, value(layout, site, "textbook", both, "ms")]
            + [value(layout, site, *column[1:]) for column in columns]
            for layout, site in sites
        ],
    )


def _columns(*wanted: tuple[str, str]) -> Callable[[list[Row]], str]:
    """A function from rows to a table of these columns, (key, title), one line per row; failed rows say so."""

    def table(rows: list[Row]) -> str:
        columns = [(key, title) for key, title in wanted if any(key in row for row in rows)]
        cells = [
            ["failed" if "failed" in row and key not in row else row.get(key) for key, _ in columns] for row in rows
        ]
        return _table([title for _, title in columns], cells)

    return table


def _loaders(rows: list[Row]) -> str:
    """One line per loader, and below the table one per comparison."""
    loaders = [row for row in rows if "loader" in row]
    first, cells = loaders[0], []
    for row in loaders:
        low, middle, high = (f"{value:.2f}" for value in row["ratio"])
        rates = (f"{value:.0f}" for value in (row["images_per_second"][1], row["per_core"]))
        cells.append([row["loader"], *rates, middle, f"{low} to {high}", f"{row['cores_for_gpu']:.1f}"])
    header = ["loader", "images/s", "images/s a core", "against timm's", "quartiles", f"cores for {first['gpu']:.0f}/s"]
    lines = [
        _table(header, cells),
        "",
        f"{first['files']}, {first['bytes_per_file'] / 1000:.0f} KB each on average; {first['workers']} workers, batch "
        f"{first['batch']}, {first['rounds']} interleaved rounds of {first['images']} images.",
    ]
    for row in rows:
        if "ratio" in row and "comparison" in row:
            low, middle, high = row["ratio"]
            lines.append(f"{row['comparison'].capitalize()}: {middle:.2f} times ({low:.2f} to {high:.2f}).")
        elif "comparison" in row:
            worst = f"{row['worst_image']:.3f} in the worst image"
            lines.append(f"{row['comparison'].capitalize()}: {row['mean']:.3f} of 255 on average, {worst}.")
    return "\n".join(lines)


_NETWORK = (("model", "network"), ("batch", "batch"), ("images_per_second", "images/s"), ("ms", "median (ms)"))
_RATIOS = (("time / resnet50", "time / resnet50's"), ("time / floor", "time / convolution floor's"))
_INFERENCE = _columns(*_NETWORK, ("ms_p90", "90% (ms)"), ("ms_p99", "99% (ms)"), *_RATIOS)
_TRAINING = _columns(*_NETWORK, ("ms_q1", "quartile 1"), ("ms_q3", "quartile 3"), *_RATIOS)
_STEP = _columns(
    *(("step", "step"), ("images_per_second", "images/s"), ("ms", "median (ms)"), ("ms_q1", "quartile 1")),
    *(("ms_q3", "quartile 3"), ("time / bare", "time / forward, backward, update's")),
)
_MEMORY = _columns(
    *(("model", "network"), ("batch", "batch"), ("kept_mib", "kept for backward (MiB)")),
    *(("kept / resnet50", "/ resnet50's"), ("peak_mib", "peak (MiB)"), ("peak / resnet50", "peak / resnet50's")),
)
FLOOR_CAPTION = (
    "The convolution floor is LIP-ResNet-50 with all its convolutions, forward and backward, and without what LIP adds "
    "to them: average pooling replaces the operator, with its gradient for both features and logits, and the instance "
    "norms, ReLUs and gates of the logit modules are removed."
)
STEP_CAPTION = (
    "The first row, the reference, normalises the images and runs forward, backward and update; `train.py` does more: "
    "`as train.py` has the gradient norm, the counts and the guard against non-finite steps. Each row below it changes "
    "one option of the recipe."
)


class Part(NamedTuple):
    """The table of the rows in ``results/<name>.jsonl``."""

    name: str
    title: str
    table: Callable[[list[Row]], str]
    caption: str = ""


PARTS = (
    Part("op_cpu", "The operator on a CPU", _operator),
    Part("train_cpu", "Training steps on a CPU", _TRAINING, FLOOR_CAPTION),
    Part("train_cpu_bfloat16", "Training steps on a CPU in bfloat16", _TRAINING, FLOOR_CAPTION),
    Part("model_cpu", "Inference on a CPU", _INFERENCE, FLOOR_CAPTION),
    Part("train_plain", "Training steps on a CPU without a C++ compiler", _TRAINING, FLOOR_CAPTION),
    Part("step_cpu", "The parts of a training step, on a CPU", _STEP, STEP_CAPTION),
    Part("memory_cpu", "Memory of a training step", _MEMORY),
)
LOADERS = Part("data_cpu", "Loaders", _loaders)


def performance(folder: Path = FOLDER) -> str:
    """The tables of all measured parts, each with its command and machine, and the table of GPUs."""
    texts = [_measured(part, folder) for part in PARTS if (folder / f"{part.name}.jsonl").is_file()]
    return "\n\n".join([*texts, gpus(folder / "gpu")])


def gpus(folder: Path) -> str:
    """For every quantity and GPU the figure that ``benchmark_gpu.py fast`` has measured, or else the predicted one."""
    method, predicted = predictions()
    measured: dict[str, tuple[Row, list[Row]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        environment, rows = read(path)
        gpu = gpu_of(environment["hardware"])
        if environment["stage"] == "fast" and not environment["quick"] and gpu is not None:
            measured[gpu] = environment, rows
    lines = []
    for quantity in QUANTITIES:
        cells = []
        for gpu in GPUS:
            value = quantity.measure(measured[gpu][1]) if gpu in measured else None
            model = predicted.get((gpu, quantity.name))
            cells.append(show(value) if value is not None else f"{show(model)} (model)" if model is not None else "-")
        lines.append([quantity.name, quantity.target, *cells])
    text = f"**On GPUs**\n\n{_table(['quantity', 'target', *GPUS], lines)}\n\n(model): predicted. {method}"
    machines = [_made_by(environment) for environment, _ in measured.values()]
    return "\n\n".join([text, *machines])


def loaders(folder: Path = FOLDER) -> str:
    """The table of ``benchmark.py data``."""
    return _measured(LOADERS, folder)


def _measured(part: Part, folder: Path) -> str:
    environment, rows = read(folder / f"{part.name}.jsonl")
    keys = ("network", "batch", "size", "precision", "layout", "compile")
    values = {key: {str(row.get(key)) for row in rows} - {"None"} for key in keys}
    common = [f"{key} {min(given)}" for key, given in values.items() if len(given) == 1]
    text = f"**{part.title}**\n\n{part.table(rows)}\n\n{', '.join([*common, _made_by(environment)])}"
    return f"{text}\n\n{part.caption}" if part.caption else text


def _made_by(environment: Row) -> str:
    """Machine, versions and command of a measurement."""
    prefix = "LIP_KERNELS=plain " if environment.get("lip_kernels") == "plain" else ""
    command = prefix + shlex.join(environment["command"])
    machine = f"{environment['hardware']}, torch {environment['torch']}, {environment['threads']} threads"
    load = f", load {environment['load']} before the run" if "load" in environment else ""
    return f"{machine}{load}, {environment['date'][:10]}; `{command}`"
