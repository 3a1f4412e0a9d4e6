"""Classify photographs:  python scripts/predict.py RUN_OR_FILE IMAGES_OR_FOLDERS...

Prints the most probable classes of every image, as a table or as JSON lines (--format jsonl). Images are read exactly
as eval.py reads them. One that cannot be read is named on stderr, and the exit code is then 2.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import lip_resnet
from lip_resnet import cli, distributed
from lip_resnet.config import Config, InputError
from lip_resnet.data.decode import BadImage, check_scan, decode_exact, image_errors, one_line, read_file
from lip_resnet.data.photographs import find_photographs
from lip_resnet.data.sources.base import readable
from lip_resnet.evaluation.render import render
from lip_resnet.evaluation.testsets import wnids
from lip_resnet.files import to_json

_ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright."""


class _Images(Dataset):
    """Index -> ((3, H, W) float32, whether its EXIF orientation is not upright), or the line of an error."""

    def __init__(self, files: list[Path], transform: Any, upright: bool) -> None:
        self.files, self.transform, self.upright = files, transform, upright

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, bool] | str:
        name = str(self.files[index])
        try:
            data = read_file(name)
            image = decode_exact(data, name)
            check_scan(data, name)
            with image_errors(name, "load"):
                rotated = image.getexif().get(_ORIENTATION, 1) != 1
                upright: Image.Image = ImageOps.exif_transpose(image) if self.upright else image
                return self.transform(upright), rotated and not self.upright
        except BadImage as error:
            return str(error)


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN_OR_FILE", help="a run folder, a checkpoint, an exported file or a released one")
    add("images", nargs="+", metavar="IMAGES", help="image files, and folders of them")
    add("--top", type=int, default=3, help="classes an image (default: 3)")
    add("--format", choices=("table", "jsonl"), default="table")
    add("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    add("--upright", action="store_true", help="turn images as their EXIF orientation says, which evaluations ignore")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: CUDA, else the CPU")
    add("--batch-size", type=int, default=32, help="images at a time (default: 32)")
    add("--workers", type=int, help="loader processes (default: up to 4, for more than one batch)")
    options = parser.parse_args()
    for key, low in (("top", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(options, key)
        if value is not None and value < low:
            raise InputError(f"--{key.replace('_', '-')} is {value}; it must be at least {low}")
    return options


def main() -> None:
    options = parse()
    files = find_photographs(options.images)
    device = distributed.choose_device(options.device)
    run = lip_resnet.load_run(options.run, weights=options.weights, device=device)
    words = dict(ImageNetInfo().label_descriptions(as_dict=True)) if list(run.classes) == wnids() else {}
    table: list[list[str]] = []
    errors = rotated = 0
    for file, result in predictions(run, files, device, options):
        if isinstance(result, str):
            if len(files) == 1:
                raise BadImage(result)
            tqdm.write(f"not read: {one_line(result)}", file=sys.stderr)
            errors += 1
            continue
        probabilities, turned = result
        rotated += turned
        top = probabilities.topk(min(options.top, len(probabilities)))
        best = [
            {"class": readable(run.classes[label]), "probability": round(value, 6)}
            | ({"words": words[run.classes[label]]} if words else {})
            for value, label in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        if options.format == "jsonl":
            print(to_json({"image": readable(str(file)), "predictions": best}), flush=True)
        else:
            cells = [f"{each.get('words', each['class']).split(',')[0]} {each['probability']:.1%}" for each in best]
            table.append([readable(str(file)), *cells])
    if table:
        print(render(["image", *(str(rank) for rank in range(1, len(table[0])))], table), end="")
    if rotated:
        line = f"{rotated} of {len(files)} images have an EXIF orientation, which evaluations ignore"
        print(f"note: {line}; --upright turns them", file=sys.stderr)
    if errors:
        raise InputError(f"{errors} of {len(files)} images cannot be read; they are named above")


@torch.inference_mode()
def predictions(
    run: Any, files: list[Path], device: torch.device, options: argparse.Namespace
) -> Iterator[tuple[Path, tuple[Tensor, bool] | str]]:
    """Every file with its probabilities (classes,) and whether it is not upright, or with the line of an error.

    The probabilities are a softmax, or each class's own sigmoid where the network was trained by that.

    Raises:
        FloatingPointError: logits of an image are not finite.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    size = options.batch_size
    workers = options.workers
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if len(files) > size else 0
    images = _Images(files, run.transform, options.upright)
    loader: DataLoader = DataLoader(images, batch_size=size, num_workers=workers, collate_fn=list)
    own = isinstance(run.config, Config) and run.config.train.loss == "binary_cross_entropy"
    for number, batch in enumerate(tqdm(loader, unit="batch", disable=None, leave=False)):
        names = files[number * size :]
        pixels = [item[0] for item in batch if not isinstance(item, str)]
        logits = run.model(torch.stack(pixels).to(device)).float().cpu() if pixels else torch.empty(0, 1)
        rows = iter(logits.sigmoid() if own else logits.softmax(dim=1))
        for name, item in zip(names, batch, strict=False):
            if isinstance(item, str):
                yield name, item
                continue
            probabilities = next(rows)
            if not probabilities.isfinite().all():
                raise FloatingPointError(f"{name}: the logits of this image are not finite")
            yield name, (probabilities, item[1])


if __name__ == "__main__":
    cli.launch(main)
