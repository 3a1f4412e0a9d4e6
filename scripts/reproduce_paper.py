"""The paper, row by row:  python scripts/reproduce_paper.py [--weights NAME=FILE ... --data DIR] [--rows ROW ...]

Builds every network of scripts/paper.yaml, counts its parameters and multiply-adds, and compares them with the
published figures; accuracies too, of weight files (evaluated here) and of rows that eval.py wrote. Where there is
neither, the report gives the command that trains the network. Exit code 1 when anything is off.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_resnet import checkpoint, distributed, fidelity, results
from lip_resnet.config import InputError
from lip_resnet.models.weights import load_weights
from lip_resnet.paper import (
    IMAGES_APART,
    RETRAINED_APART,
    Check,
    Paper,
    Row,
    build_report,
    check_sizes,
    judge,
    load_paper,
    render_report,
)

ROOT = Path(__file__).parents[1]
FIGURES = Path(__file__).with_name("paper.yaml")


def main() -> None:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE", help="released weights of a row")
    parser.add_argument("--data", help="for --weights: the directory that holds ImageNet's val/, or that folder")
    parser.add_argument("--workers", type=int, default=8, help="for --weights: loader processes of each process")
    parser.add_argument("--rows", nargs="+", default=[], help="JSON rows of eval.py, or run folders with an eval.json")
    parser.add_argument("--output", help="a directory for report.md and report.json")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    options = parser.parse_args()
    paper = load_paper(FIGURES)
    if bool(options.weights) != bool(options.data):
        raise InputError("--weights NAME=FILE and --data DIR belong together")
    folder = Path(options.output) if options.output else None
    if folder is not None:
        distributed.on_main(lambda: prepare(folder, options.force))
    accuracies = compare_rows(options.rows, paper) + evaluate_weights(options, paper)

    sizes = {row.name: check_sizes(row) for row in paper.rows}
    report = build_report(paper, sizes, accuracies)
    markdown = render_report(paper, sizes, accuracies, report)
    if distributed.is_main():
        print(markdown, end="")
        files = {}
        if folder is not None:
            files[folder / "report.md"] = markdown
            files[folder / "report.json"] = json.dumps(report, indent=2) + "\n"
        for path, text in files.items():
            checkpoint.write_atomically(path, lambda file, text=text: file.write(text.encode()))
    if not report["ok"]:
        sys.exit(1)


def prepare(folder: Path, force: bool) -> None:
    for name in ("report.md", "report.json"):
        if (folder / name).exists() and not force:
            raise InputError(f"{folder / name} exists; choose another --output or add --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot make this directory: {error.strerror}") from None


def accuracy(row: Row, found: dict[str, Any], images: int, retrained: bool, **facts: Any) -> dict[str, Any]:
    """One measured accuracy of a row and its checks; ``facts`` say what was measured."""
    checks, published = [], row.published
    if "why_not" in facts or published is None:
        pass
    elif row.correct and not retrained and "correct1" in found:
        for key, expected in (("correct1", row.correct.top1), ("correct5", row.correct.top5)):
            checks.append(Check(key, found[key], expected, IMAGES_APART, row.correct.source))
    else:
        tolerance = RETRAINED_APART if retrained else 100 * IMAGES_APART / images
        # A figure printed with two digits stands for all that round to it.
        tolerance += 0 if row.correct else 0.005
        for key in ("top1", "top5"):
            expected = getattr(published, key)
            if expected is not None:
                checks.append(Check(key, found[key], expected, tolerance, published.source))
    keys = ("top1", "top5", "correct1", "correct5", "images")
    measured = {key: found[key] for key in keys if key in found}
    return {"row": row.name, "retrained": retrained, **facts, **measured, "checks": checks}


def compare_rows(paths: list[str], paper: Paper) -> list[dict[str, Any]]:
    """Rows of eval.py; those of another protocol, or of other images, are shown and not compared."""
    measured = []
    found_rows = [(path, found) for path in paths for found in results.read_rows([path])]
    for path, found in found_rows:
        keywords = results.keywords_of(found)
        row = paper.find(found["model"], keywords)
        if row is None:
            raise InputError(f"{path}: {results.label(found['model'], keywords)} is no row of {FIGURES.name}")
        why_not = fidelity.protocol_difference(found, ROOT / row.recipe)
        if found["images"] != paper.images:
            why_not = f"images: {found['images']} against {paper.images}"
        trained = found["protocol"].get("training") is not None
        facts = {"file": path} | ({"why_not": why_not} if why_not else {})
        measured.append(accuracy(row, found, paper.images, trained, **facts))
    return measured


def evaluate_weights(options: Any, paper: Paper) -> list[dict[str, Any]]:
    """Weight files by the reference's protocol; all are read and named before the first is evaluated."""
    rows, jobs = {row.name: row for row in paper.rows}, []
    for pair in options.weights:
        name, equals, path = pair.partition("=")
        if not equals or name not in rows:
            raise InputError(f"--weights {pair}: it must be NAME=FILE with a name of {', '.join(rows)}")
        network = fidelity.identify(checkpoint.load(path), path)
        if paper.find(network.model, network.args) is not rows[name] or network.num_classes != paper.classes:
            holds = f"{results.label(network.model, network.args)} of {network.num_classes} classes"
            raise InputError(f"--weights {pair}: the file holds {holds}")
        jobs.append((rows[name], network, path))
    measured = []
    for row, network, path in jobs:
        model = network.build()
        load_weights(model, path)
        fidelity.check_finite(model, path)
        found = fidelity.evaluate_reference(model, network, paper.images, options.data, options.workers)
        facts = {"file": path, "sha256": fidelity.sha256(Path(path))}
        if row.correct is not None:
            facts["verdict"] = judge(found, row.correct)
        measured.append(accuracy(row, found, paper.images, False, **facts))
    return measured


if __name__ == "__main__":
    distributed.launch(main)
