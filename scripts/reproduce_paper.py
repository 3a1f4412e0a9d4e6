"""Check the paper row by row:  python scripts/reproduce_paper.py [--checkpoints NAME=FILE ... --data DIR] [--rows ...]

Builds every network of the paper's table (lip_resnet/evaluation/paper.yaml), counts its parameters and multiply-adds,
and compares them with the published figures; also the accuracies of weight files (evaluated here) and of rows of
eval.py. For a network without either, the report gives the command that trains it. Exit code 1 if any figure differs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_commands import DATA_HELP, DATA_NAME_HELP
from lip_resnet import checkpoint, cli, distributed
from lip_resnet.config import DetectionConfig, InputError
from lip_resnet.evaluation import paper_detection, tables
from lip_resnet.evaluation.evaluate import evaluate_reference
from lip_resnet.evaluation.location import KINDS
from lip_resnet.evaluation.paper import (
    COUNT_TOLERANCE,
    PAPER_FILE,
    RETRAINED_TOLERANCE,
    Check,
    Paper,
    Row,
    build_report,
    check_sizes,
    compare_counts,
    load_paper,
    protocol_difference,
    render_report,
)
from lip_resnet.evaluation.paper_detection import render_section
from lip_resnet.evaluation.protocol import describe_training, difference, reference_protocol
from lip_resnet.evaluation.rows import is_detection, read_rows
from lip_resnet.files import make_folder, sha256, to_json, write_text
from lip_resnet.models import registry
from lip_resnet.models.identify import check_finite, identify
from lip_resnet.models.weights import put_weights
from lip_resnet.recipe import load_recipe, of_task

ROOT = Path(__file__).parents[1]
FIGURES = PAPER_FILE


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    files = {"nargs": "+", "metavar": "NAME=FILE", "default": []}
    parser.add_argument("--checkpoints", **files, help="released weights of rows")
    parser.add_argument("--weights", dest="checkpoints", **files, help=argparse.SUPPRESS)  # an earlier name
    parser.add_argument("--data", help=f"for --checkpoints, ImageNet: {DATA_HELP}")
    parser.add_argument("--data-name", choices=KINDS, metavar="NAME", help=DATA_NAME_HELP)
    parser.add_argument("--workers", type=int, default=8, help="for --checkpoints: loader processes of each process")
    parser.add_argument("--rows", nargs="+", default=[], help="JSON rows of eval.py, or run folders with an eval.json")
    parser.add_argument("--output", help="a directory for report.md and report.json")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    options = parser.parse_args()
    paper = load_paper(FIGURES)
    if bool(options.checkpoints) != bool(options.data):
        raise InputError("--checkpoints NAME=FILE and --data DIR belong together")
    folder = Path(options.output) if options.output else None
    if folder is not None:
        distributed.on_main(lambda: prepare(folder, options.force))
    rows = [(name, row) for name in options.rows for row in read_rows([name])]
    detectors = compare_detectors([(name, row) for name, row in rows if is_detection(row)], paper)
    accuracies = compare_rows([(name, row) for name, row in rows if not is_detection(row)], paper)
    accuracies += evaluate_checkpoints(options, paper)

    sizes = count_networks(paper)
    report = build_report(paper, sizes, accuracies)
    off = report["off"] + sum(each["ok"] is False for each in detectors)
    report |= {"detectors": detectors, "off": off, "ok": off == 0}
    markdown = render_report(paper, sizes, accuracies, report) + "\n" + render_section(paper.detection, detectors)
    if distributed.is_main():
        print(markdown, end="")
        if folder is not None:
            text = to_json(report, indent=2) + "\n"
            write_text(folder / "report.md", markdown)
            write_text(folder / "report.json", text)
    if not report["ok"]:
        sys.exit(1)


def count_networks(paper: Paper) -> dict[str, dict[str, Check]]:
    """Row -> ``check_sizes`` of its network, built without memory for its weights."""
    with torch.device("meta"):
        models = {row.name: registry.create_model(row.model, **row.args) for row in paper.rows}
    return {row.name: check_sizes(row, models[row.name]) for row in paper.rows}


def prepare(folder: Path, force: bool) -> None:
    for name in ("report.md", "report.json"):
        if (folder / name).exists() and not force:
            raise InputError(f"{folder / name} exists; choose another --output or add --force")
    make_folder(folder)


def accuracy(row: Row, result: dict[str, Any], images: int, retrained: bool, **facts: Any) -> dict[str, Any]:
    """A measured accuracy of a row and its checks; ``facts``: the file, and why it is not compared."""
    checks, published = [], row.published
    if "why_not" in facts or published is None:
        pass
    elif row.correct and not retrained and "correct1" in result:
        for key, expected in (("correct1", row.correct.top1), ("correct5", row.correct.top5)):
            checks.append(Check(key, result[key], expected, COUNT_TOLERANCE, row.correct.source))
    else:
        tolerance = RETRAINED_TOLERANCE if retrained else 100 * COUNT_TOLERANCE / images
        # A figure printed with two digits is rounded by up to 0.005.
        tolerance += 0 if row.correct else 0.005
        for key in ("top1", "top5"):
            expected = getattr(published, key)
            if expected is not None:
                checks.append(Check(key, result[key], expected, tolerance, published.source))
    keys = ("top1", "top5", "correct1", "correct5", "images")
    measured = {key: result[key] for key in keys if key in result}
    return {"row": row.name, "retrained": retrained, **facts, **measured, "checks": checks}


def compare_detectors(rows: list[tuple[str, dict[str, Any]]], paper: Paper) -> list[dict[str, Any]]:
    """Detectors of eval.py's rows; those with another protocol or other images are listed and not compared."""
    measured = []
    for path, result in rows:
        row = paper_detection.find(paper.detection, result)
        if row is None:
            name = tables.label(result["model"], tables.keywords_of(result), result["detector"])
            epochs = (result["protocol"].get("training") or {}).get("train.epochs")
            raise InputError(f"{path}: {name} of {epochs} epochs is not a detector of {FIGURES.name}")
        measured.append(paper_detection.compare(row, result, path, detection_difference(result, ROOT / row.recipe)))
    return measured


def detection_difference(row: dict[str, Any], recipe: Path) -> str | None:
    """The first key in which a detector's row differs from its recipe on 8 processes, but for the initial weights."""
    from lip_resnet.detection.rows import DetectionEvalConfig, describe_protocol  # needs torchvision's operators

    config = of_task(load_recipe(recipe, ["data.root=."]), DetectionConfig, str(recipe))
    training = describe_training(config, [8]) | {"model.weights": row["protocol"]["training"]["model.weights"]}
    return difference(row["protocol"], describe_protocol(DetectionEvalConfig.from_recipe(config), training))


def compare_rows(rows: list[tuple[str, dict[str, Any]]], paper: Paper) -> list[dict[str, Any]]:
    """Accuracies of eval.py's rows; those with another protocol or other images are listed and not compared."""
    measured = []
    for path, result in rows:
        keywords = tables.keywords_of(result)
        row = paper.find(result["model"], keywords)
        if row is None:
            raise InputError(f"{path}: {tables.label(result['model'], keywords)} is not a row of {FIGURES.name}")
        why_not = protocol_difference(result, ROOT / row.recipe)
        images = (result.get("dataset") or {}).get("name", "imagenet")
        if images != "imagenet":
            why_not = f"dataset: {images} against imagenet"
        if result["images"] != paper.images:
            why_not = f"images: {result['images']} against {paper.images}"
        trained = result["protocol"].get("training") is not None
        facts = {"file": path} | ({"why_not": why_not} if why_not else {})
        measured.append(accuracy(row, result, paper.images, trained, **facts))
    return measured


def evaluate_checkpoints(options: Any, paper: Paper) -> list[dict[str, Any]]:
    """Accuracies of weight files by the reference's protocol; all are identified before the first is evaluated."""
    rows, jobs = {row.name: row for row in paper.rows}, []
    for pair in options.checkpoints:
        name, equals, path = pair.partition("=")
        if not equals or name not in rows:
            raise InputError(f"--checkpoints {pair}: it must be NAME=FILE with a name of {', '.join(rows)}")
        payload = checkpoint.load(path)
        trained, network = checkpoint.read_recipe(payload, path), identify(payload, path)
        if paper.find(network.model, network.args) is not rows[name] or network.num_classes != paper.classes:
            raise InputError(f"--checkpoints {pair}: the file holds {network} of {network.num_classes} classes")
        jobs.append((rows[name], network, trained, path))
    measured = []
    for row, network, trained, path in jobs:
        model, payload = network.build(), checkpoint.load(path)
        put_weights(model, payload, path)
        check_finite(model, path)
        config = reference_protocol(network.model, network.num_classes, trained)
        arguments = (options.data, options.workers, paper.images, options.data_name, payload)
        result = evaluate_reference(model, config, *arguments)
        facts = {"file": path, "sha256": sha256(Path(path))}
        if row.correct is not None:
            facts["verdict"] = compare_counts(result, row.correct)
        measured.append(accuracy(row, result, paper.images, False, **facts))
    return measured


if __name__ == "__main__":
    cli.launch(main)
