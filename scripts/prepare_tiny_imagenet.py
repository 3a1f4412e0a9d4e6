"""Tiny-ImageNet as it is released, to class folders:  python scripts/prepare_tiny_imagenet.py DIR --output DIR

Copies train/<wnid>/images/ to train/<wnid>/, and val/images/ to val/<wnid>/ as val_annotations.txt sorts them. Writes
boxes.tsv, the object's box in every image, for scripts/probe.py objects.
"""

import csv
import shutil
from pathlib import Path

from tqdm import tqdm

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.evaluation.robustness import BOX_COLUMNS
from lip_resnet.files import write_text


def read_annotations(path: Path) -> list[list[str]]:
    """The tab-separated lines of a file of annotations.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.reader(file, delimiter="\t"))
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}; DIR must be Tiny-ImageNet as released") from error


def read_images(source: Path) -> list[tuple[Path, str, list[str]]]:
    """(file, its name below the new root, its box) of every image."""
    images = []
    folders = sorted(path for path in (source / "train").glob("*") if path.is_dir())
    if not folders:
        raise InputError(f"{source} has no class folders in train/; DIR must be Tiny-ImageNet as released")
    for folder in folders:
        for name, *box in read_annotations(folder / f"{folder.name}_boxes.txt"):
            images.append((folder / "images" / name, f"train/{folder.name}/{name}", box))
    for name, wnid, *box in read_annotations(source / "val" / "val_annotations.txt"):
        images.append((source / "val" / "images" / name, f"val/{wnid}/{name}", box))
    return images


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the released directory, tiny-imagenet-200")
    parser.add_argument("--output", type=Path, required=True, help="a new directory, or that of an earlier call")
    options = parser.parse_args()
    if options.output.resolve().is_relative_to(options.source.resolve()):
        raise InputError(f"--output {options.output} is in {options.source}; choose another")
    images, table = read_images(options.source), options.output / "boxes.tsv"
    try:
        for file, name, _ in tqdm(images, unit="image", disable=None):
            target = options.output / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_file() or target.stat().st_size != file.stat().st_size:
                shutil.copyfile(file, target)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    rows = [BOX_COLUMNS, *([name, *box] for _, name, box in images)]
    write_text(table, "".join("\t".join(row) + "\n" for row in rows))
    print(f"{options.output}: {len(images):,} images, and their boxes in {table}")


if __name__ == "__main__":
    cli.launch(main)
