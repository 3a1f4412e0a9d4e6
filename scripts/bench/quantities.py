"""The quantities that ``benchmark_gpu.py fast`` measures, with their targets and a model's predictions."""

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.contestants import FLOOR, PREVIOUS
from bench.timing import Row

PREDICTED = Path(__file__).parents[2] / "results" / "predicted_gpu.jsonl"
GPUS = ("H100", "H200")
LARGEST_SITES = ("64x112", "128x56", "256x56", "512x28")


class Quantity(NamedTuple):
    """A number to be read from the rows of a stage."""

    name: str
    measure: Callable[[list[Row]], float | None]
    """None: not among the rows."""
    target: str = "-"


def _pick(rows: list[Row], key: str, **where: Any) -> float | None:
    """The value of the first row that has it."""
    for row in rows:
        if key in row and all(row.get(name) == value for name, value in where.items()):
            return row[key]
    return None


def _share(form: str, rows: list[Row]) -> float | None:
    """The smallest share of the copy bound at the four largest sites."""
    where = {"part": "op", "form": form, "direction": "forward + backward"}
    shares = [_pick(rows, "share_of_copy_bound", site=site, **where) for site in LARGEST_SITES]
    return None if None in shares else min(share for share in shares if share is not None)


def _quotient(part: str, key: str, model: str, other: str, rows: list[Row]) -> float | None:
    top, bottom = (_pick(rows, key, part=part, model=name) for name in (model, other))
    return top / bottom if top and bottom else None


def _train_py(rows: list[Row]) -> float | None:
    """Images/s of ``train.py`` after its first log line, over those of the bare step."""
    logged = [
        row["train/images_per_second"] for row in rows if row["part"] == "train.py lip_resnet50" and "train/loss" in row
    ]
    bare = _pick(rows, "images_per_second", part="train", model="lip_resnet50")
    return statistics.median(logged[1:]) / bare if logged[1:] and bare else None


def _steps(part: str, word: str, resnet_target: str, floor_target: str) -> list[Quantity]:
    """Times and ratios of training steps."""
    lip = "lip_resnet50"
    names = {"resnet50": "resnet50", "convolution floor": FLOOR, lip: lip}
    return [
        *(
            Quantity(f"training step, {word}: {label} (ms)", functools.partial(_pick, key="ms", part=part, model=model))
            for label, model in names.items()
        ),
        *(
            Quantity(
                f"training step, {word}: {lip} / {label}",
                functools.partial(_pick, key=key, part=part, model=lip),
                target,
            )
            for label, key, target in (
                ("resnet50", "time / resnet50", resnet_target),
                ("convolution floor", "time / floor", floor_target),
            )
        ),
    ]


def _previous(rows: list[Row]) -> float | None:
    return _pick(rows, "time / resnet50", part="train", model=f"lip_resnet50, {PREVIOUS}")


def _inference(depth: str, paper: str) -> Quantity:
    measure = functools.partial(_quotient, "inference", "ms", f"lip_{depth}", depth)
    return Quantity(f"inference, float32, batch 32: lip_{depth} / {depth}", measure, f"{paper} (paper, Titan XP)")


QUANTITIES = [
    Quantity(
        "lip2d, smallest share of the copy bound at the four largest sites",
        functools.partial(_share, "lip2d"),
        "at least 0.85",
    ),
    Quantity("the same, previous kernels", functools.partial(_share, PREVIOUS)),
    *_steps("train", "eager", "at most 1.28", "at most 1.10"),
    Quantity("training step, eager: lip_resnet50 with the previous kernels / resnet50", _previous),
    *_steps("train compiled", "compiled", "at most 1.33", "at most 1.12"),
    Quantity(
        "peak memory of a step: lip_resnet50 / resnet50",
        functools.partial(_pick, key="peak / resnet50", part="memory", model="lip_resnet50"),
        "at most 1.20",
    ),
    Quantity("train.py on synthetic data / bare step (images/s)", _train_py, "at least 0.98"),
    *(_inference(*pair) for pair in (("resnet50", "1.33"), ("resnet101", "1.21"), ("densenet121", "1.21"))),
]


def predictions(path: Path = PREDICTED) -> tuple[str, dict[tuple[str, str], Any]]:
    """(how they were made, (GPU, quantity) -> a number or a range [low, high])."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return head["environment"]["method"], {(row["gpu"], row["quantity"]): row["predicted"] for row in rows}


def gpu_of(hardware: str) -> str | None:
    """The GPU of ``GPUS`` whose name stands in a description of hardware."""
    return next((gpu for gpu in GPUS if gpu in hardware), None)
