"""Rows: the results of eval.py, one JSON file for each set, written and read."""

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from lip_resnet import distributed
from lip_resnet.config import Config, DetectionConfig, InputError, ModelConfig
from lip_resnet.data import describe_source
from lip_resnet.environment import describe_environment
from lip_resnet.evaluation import cost, protocol
from lip_resnet.evaluation.average_precision import METRICS
from lip_resnet.evaluation.protocol import EvalConfig
from lip_resnet.evaluation.testsets import EvalSet
from lip_resnet.files import to_json, write_text
from lip_resnet.recipe import parse_section

_REQUIRED = ("model", "top1", "top5", "loss", "images", "params", "macs", "protocol")
_REQUIRED_OF_DETECTION = ("model", *METRICS, "images", "params", "macs", "protocol")


def row_path(
    checkpoint: str | None, output: str | None, test_set: str | None, several: bool, kind: str = "eval"
) -> Path | None:
    """The file of a set's row: ``output``, or in the run folder ``checkpoint``; None where it is not written.

    Args:
        test_set: the set, or the probe.
        kind: how the file's name in a run folder begins.
        several: whether ``output`` is the directory of several rows, not the file of one.

    Raises:
        InputError: the file exists, or its directory does not.
    """
    run, path = Path(checkpoint or "").expanduser(), Path(output) if output else None
    if (run / "last.pt").is_file() and run.absolute().name == "checkpoints":
        run = run.absolute().parent
    file = "eval.json" if test_set in (None, "imagenet") else f"{kind}-{test_set}.json"
    if path is not None and several:
        if not path.is_dir():
            raise InputError(f"--output {path} is not a directory; for several sets it must be one")
        path = path / file
    elif path is None and checkpoint and run.is_dir():
        path = run / file
    if path is not None and distributed.on_main(path.exists):
        raise InputError(f"{path} exists; choose another --output or remove it")
    if path is not None and not path.resolve().parent.is_dir():
        raise InputError(f"--output {path}: {path.parent} is not a directory")
    return path


def build_row(
    model: nn.Module,
    source: str,
    ema: bool,
    data: EvalSet,
    config: EvalConfig,
    result: dict[str, Any],
    payload: dict[str, Any],
    trained: Config | None,
) -> dict[str, Any]:
    """The row of one set.

    Args:
        source: where the weights of ``model`` come from: a path, or ``timm:NAME``.
        ema: whether they are the averaged ones.
        result: what ``evaluate_set`` returned.
        payload: the checkpoint; empty for timm's own weights.
        trained: the recipe of the training, where it is known.
    """
    weights, training = describe_weights(source, ema, payload, trained)
    return {
        "model": config.model.name,
        "args": config.model.args,
        "downsampling": config.model.downsampling,
        "circular_padding": config.model.circular_padding,
        **weights,
        **result,
        "params": cost.count_parameters(model),
        "macs": cost.count_macs(model, config.data.eval_size),
        "protocol": protocol.describe_protocol(config, training, data.protocol),
        "dataset": {"name": data.name, "whole": data.whole, **describe_source(data.source)},
        "environment": describe_environment(),
    }


def describe_weights(
    source: str, ema: bool, payload: dict[str, Any], trained: Config | DetectionConfig | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a row says of its weights, and ``describe_training`` of them; arguments as for ``build_row``."""
    training = None
    if trained:
        training = protocol.describe_training(
            trained, payload["processes"], payload.get("initial_weights"), payload.get("datasets")
        )
    weights = {
        "checkpoint": source,
        "weights": "ema" if ema else "model",
        "selected_on_val": Path(source).name == "best.pt",
        "seed": trained.train.seed if trained else None,
        "step": step if isinstance(step := payload.get("step"), int) else None,
    }
    return weights, training


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Write a row as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, to_json(row, indent=2) + "\n")


def is_detection(row: Any) -> bool:
    """Whether a row is of a detector."""
    return isinstance(row, dict) and "AP" in row


def read_rows(paths: list[str]) -> list[dict[str, Any]]:
    """Rows from JSON files, or from run folders: eval.json, and eval-NAME.json of other test sets.

    Raises:
        InputError: no such file, it is not a row of eval.py, or a figure is not finite.
    """
    rows = []
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        in_path = sorted(path.glob("eval.json")) + sorted(path.glob("eval-*.json")) if path.is_dir() else [path]
        if not in_path:
            raise InputError(f"{name} holds no eval.json; make it with: python eval.py --checkpoint {name}")
        files += in_path
    for path in files:
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot read: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{path}: not JSON") from error
        rows.append(check_row(row, str(path)))
    return rows


def check_row(row: Any, source: str) -> dict[str, Any]:
    """A row as this version writes it.

    Args:
        row: parsed JSON.
        source: its file, for messages.

    Raises:
        InputError: it is not a row of eval.py, or a figure is not finite.
    """
    detection = is_detection(row)
    required = _REQUIRED_OF_DETECTION if detection else _REQUIRED
    missing = [key for key in required if key not in row] if isinstance(row, dict) else list(required)
    if missing:
        raise InputError(f"{source}: not a row of eval.py; missing keys: {', '.join(missing)}")
    for key in (*required[1:-1], *({"mce", "mean_error"} & row.keys())):
        if key in METRICS and key != "AP" and row[key] is None:
            continue  # the set has no objects of this size
        if type(row[key]) not in (int, float) or not math.isfinite(row[key]):
            raise InputError(
                f"{source}: {key} is {row[key]!r}, not a finite number: the logits may not have been finite; "
                "evaluate the network again"
            )
    if not isinstance(row["protocol"], dict):
        raise InputError(f"{source}: not a row of eval.py; protocol is {row['protocol']!r}")
    network = {"name": row["model"], **{key: row[key] for key in ("args", "downsampling") if row.get(key)}}
    parse_section(network, f"{source}: model", ModelConfig)
    if row["protocol"].get("training"):
        task = "detection" if detection else "classification"
        row["protocol"]["training"] = protocol.update_training(row["protocol"]["training"], task)
    return row
