"""Accuracy by class:  python scripts/per_class.py ROW_OR_PREDICTIONS [--output DIR]

Prints the accuracy of every class, the worst first, and the most confused pairs. ROW_OR_PREDICTIONS is a file of
eval.py --predictions, a row of eval.py or a run folder. DIR gets classes.csv, confusions.csv (every pair) and, with at
most 50 classes, the confusion matrix as a picture, confusion.png.
"""

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from lip_resnet import checkpoint, cli
from lip_resnet.config import InputError
from lip_resnet.evaluation.compatibility import recorded_classes
from lip_resnet.evaluation.per_class import Confusions, count_confusions, name_classes, read_result
from lip_resnet.files import check_empty, make_folder, write_atomically, write_text

MOST_IN_PICTURE = 50


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="ROW_OR_PREDICTIONS")
    parser.add_argument("--predictions", type=Path, metavar="FILE.csv", help="of a row (default: the file it names)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--classes", type=int, default=20, help="classes to print, the worst (default 20; 0: all)")
    parser.add_argument("--pairs", type=int, default=10, help="confused pairs to print (default 10)")
    options = parser.parse_args()
    for flag in ("classes", "pairs"):
        if getattr(options, flag) < 0:
            raise InputError(f"--{flag} is {getattr(options, flag)}; it must be 0 or more")
    folder = options.output
    if folder is not None:
        check_empty(folder)
    predictions, row = read_result(options.path, options.predictions)
    confusions = count_confusions(predictions)
    names = name_classes(confusions.classes, predictions, classes_of(row))
    order = np.argsort(np.where(confusions.images > 0, confusions.accuracy, np.inf), kind="stable").tolist()
    order = [number for number in order if confusions.images[number]]

    right, images = int(predictions.right.sum()), len(predictions.images)
    print(f"{row['model'] if row else options.path}: top-1 {100 * right / images:.3f}%, {right:,} of {images:,} images")
    shown = order[: options.classes or None]
    worst = f", the worst {len(shown)} of {len(order)}" if len(shown) < len(order) else ""
    print(f"\naccuracy by class{worst}")
    print_table(["class", "top-1", "images"], [accuracy_line(confusions, names, number) for number in shown])
    print("\nmost confused")
    pairs = confusions.pairs(options.pairs)
    lines = [[names[a], names[b], f"{n:,}", f"{100 * n / confusions.images[a]:.1f}%"] for a, b, n in pairs]
    print_table(["class", "predicted as", "images", "of the class"], lines)
    if folder is not None:
        write_files(folder, confusions, names)


def classes_of(row: dict[str, Any] | None) -> list[str] | None:
    """The class names that the row's checkpoint holds, where it is still there; None for a set with other classes."""
    if row is None or not Path(row["checkpoint"]).exists():
        return None
    if (row.get("dataset") or {}).get("classes") != row["protocol"].get("classes"):
        return None
    return recorded_classes(checkpoint.load(checkpoint.resolve(row["checkpoint"])))


def accuracy_line(confusions: Confusions, names: list[str], number: int) -> list[str]:
    return [names[number], f"{confusions.accuracy[number]:.1f}%", f"{confusions.images[number]:,}"]


def print_table(header: list[str], lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_files(folder: Path, confusions: Confusions, names: list[str]) -> None:
    draws = len(names) <= MOST_IN_PICTURE
    picture = draw(confusions, names) if draws else b""
    make_folder(folder)
    correct = confusions.matrix.diagonal().tolist()
    lines = zip(confusions.classes, names, confusions.images.tolist(), correct, strict=True)
    write_csv(folder / "classes.csv", ["class", "name", "images", "correct"], lines)
    pairs = [(names[a], names[b], n) for a, b, n in confusions.pairs(confusions.matrix.size)]
    write_csv(folder / "confusions.csv", ["class", "predicted", "images"], pairs)
    if draws:
        write_atomically(folder / "confusion.png", lambda file: file.write(picture))
    else:
        print(f"\nno picture of the confusion matrix: {len(names)} classes, more than {MOST_IN_PICTURE}")
    print(f"\nwritten to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def write_csv(path: Path, header: list[str], lines: Any) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    write_text(path, text.getvalue())


def draw(confusions: Confusions, names: list[str]) -> bytes:
    """The confusion matrix as a PNG: the share of a class's images, and with at most 20 classes the counts."""
    try:
        from matplotlib.figure import Figure

        from lip_resnet.insight import figures
    except ImportError as error:
        raise InputError('the picture needs the package matplotlib: pip install "lip-resnet[insight]"') from error
    share = confusions.matrix / np.maximum(confusions.images, 1)[:, None]
    side, buffer = 2.4 + 0.32 * len(names), io.BytesIO()
    with figures.style():
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.grid(visible=False)
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("class")
        if len(names) <= 20:
            for (right, given), count in np.ndenumerate(confusions.matrix):
                colour = "white" if share[right, given] > 0.5 else "0.25"
                if count:
                    axes.text(given, right, str(count), ha="center", va="center", fontsize="x-small", color=colour)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class's images")
        figure.savefig(buffer, format="png", dpi=120, facecolor="white", transparent=False)
    return buffer.getvalue()


if __name__ == "__main__":
    cli.launch(main)
