"""What a detector sees:  python scripts/show_detections.py --checkpoint RUN --output DIR

Draws the detections of a run on validation images: right and false ones with their scores, and the objects that were
missed. DIR/index.html has all pictures and a table by the size of the objects. --maps adds the importance maps of the
backbone's downsampling layers with the boxes over them.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lip_resnet import checkpoint, cli, distributed
from lip_resnet.commands.eval_detection import choose_protocol, load_detector
from lip_resnet.config import DetectionConfig, InputError
from lip_resnet.detection.canvas import canvas, resize, resized
from lip_resnet.detection.rows import DetectionEvalConfig
from lip_resnet.detection.sources import build_sources
from lip_resnet.files import check_empty, write_text
from lip_resnet.insight.gallery import Picture, to_page, write_picture
from lip_resnet.insight.importance import importance_maps
from lip_resnet.models.weights import choose_weights

try:
    from lip_resnet.detection import pictures
    from lip_resnet.insight import figures
except ImportError:
    pictures = None  # type: ignore[assignment]


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN_OR_FILE", help="a run folder or checkpoint of a detector")
    add("--config", help="the recipe of a bare file, as for train.py")
    add("--data", metavar="DIR", help="the set in COCO's layout (default: the recipe's)")
    add("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    add("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--limit", type=int, default=24, help="most images to show, evenly spaced (default 24)")
    add("--score", type=float, default=0.5, help="least score of a detection that is shown (default 0.5)")
    add("--maps", action="store_true", help="importance maps of the backbone too, with the boxes over them")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: CUDA, else the CPU")
    options = parser.parse_args()
    if options.limit < 1:
        raise InputError(f"--limit is {options.limit}; it must be at least 1")
    if not 0 <= options.score <= 1:
        raise InputError(f"--score is {options.score}; it must be between 0 and 1")
    check_empty(options.output)
    return options


def main() -> None:
    options = parse()
    if pictures is None:
        raise InputError('pictures need the package matplotlib: pip install "lip-resnet[insight]"')
    distributed.choose_device(options.device)
    payload = checkpoint.load(checkpoint.resolve(options.checkpoint))
    trained = checkpoint.read_recipe(payload, options.checkpoint, DetectionConfig)
    unchanged = dict.fromkeys(("eval_size", "eval_batch_size", "workers", "precision"))
    config = choose_protocol(argparse.Namespace(**vars(options), **unchanged), trained)
    ema = choose_weights(payload, options.checkpoint, options.weights, trained) == "ema"
    (source,) = build_sources(config.data, config.model.num_classes, ("val",))
    model = load_detector(config, payload, options.checkpoint, ema)
    chosen = pictures.evenly(len(source), options.limit)
    if len(chosen) < len(source):
        print(f"note: {len(chosen)} of {len(source):,} images, evenly spaced; --limit shows more", file=sys.stderr)
    shown: list[Picture] = []
    judged = []
    for index in chosen:
        image, name = source[index], Path(source.path(index)).name
        boxes, labels, scores = pictures.detect_image(model, image, config.data, config.channels_last)
        keep = scores >= options.score
        judged.append(pictures.judge(boxes[keep], labels[keep], scores[keep], source, index))
        stem = f"{index:05}-" + (re.sub(r"[^\w.-]+", "-", Path(name).stem).strip("-.") or "image")[:80]
        text = f"{name}, {image.width}x{image.height} pixels: {pictures.describe(judged[-1])}"
        with figures.style():
            figure = pictures.draw(image, judged[-1], source.classes, name)
            shown.append(write_picture(options.output, f"{stem}.png", text, figures.to_bytes(figure, "png", dpi=120)))
            if options.maps:
                figure = draw_maps(model, np.asarray(image), judged[-1], config, name)
                content = figures.to_bytes(figure, "png", dpi=120)
                shown.append(write_picture(options.output, f"{stem}-maps.png", f"{name}: {MAPS}", content))
        print(f"{options.output / stem}.png: {pictures.describe(judged[-1])}", flush=True)
    if not any(len(each.boxes) for each in judged):
        print(f"note: no score is at least {options.score:g}; --score shows lower ones", file=sys.stderr)
    title = f"{config.model.name} on {config.model.backbone.name}: detections with scores from {options.score:g}"
    step = f", step {payload['step']}" if isinstance(payload.get("step"), int) else ""
    weights = f"Weights: {Path(*Path(options.checkpoint).resolve().parts[-3:])}{step}{', averaged' * ema}."
    page = to_page(title, (weights, *EXPLANATION), by_size(judged), shown)
    write_text(options.output / "index.html", page)
    print(options.output / "index.html")


EXPLANATION = (
    "A detection is right if it is of the class of an object and covers it with an intersection over union of at least "
    "0.5, and no detection of a higher score has taken that object. Crowd regions are not shown.",
    "Sizes are COCO's, by the area of boxes: small up to 32x32 pixels, large above 96x96.",
)
BOXES = "boxes: green right, red false, blue missed"
MAPS = f"importance maps of the backbone's downsampling layers, with {BOXES}"


def draw_maps(
    model: nn.Module, image: np.ndarray, judged: "pictures.Judged", config: DetectionEvalConfig, name: str
) -> "figures.Figure":
    """The importance maps of the backbone's sites for an image (H, W, 3) as the detector reads it, with the boxes."""
    from PIL import Image

    data = config.data
    height, width = resized(*image.shape[:2], data.size, data.max_size)
    sides = canvas(height, width)
    padded = np.empty((*sides, 3), dtype=np.uint8)
    padded[:] = np.round(255 * np.array(data.mean))  # zero after the normalisation, as the detector's padding
    padded[:height, :width] = resize(Image.fromarray(image), height, width)
    pixels = torch.from_numpy(padded).permute(2, 0, 1)[None]
    body: nn.Module = model.get_submodule("backbone.body")
    maps = importance_maps(body, pixels, mean=data.mean, std=data.std)
    note = f"read by the detector as {width}x{height} on a canvas of {sides[1]}x{sides[0]} pixels; {BOXES}"
    figure = figures.draw_maps(padded, maps, 0, name, note)
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    scaled = pictures.Judged(**{**vars(judged), "boxes": judged.boxes * scale, "objects": judged.objects * scale})
    for axes in figure.axes:
        if axes.images:
            pictures.add_boxes(axes, scaled, (), width=1.0)
    return figure


def by_size(judged: Sequence["pictures.Judged"]) -> list[list[str]]:
    """A table: objects, detected, missed and false detections by size, over all images shown."""
    table = [["size", "objects", "detected", "missed", "false detections"]]
    for size in pictures.SIZES:
        objects, detected, false = np.sum([each.counts()[size] for each in judged], axis=0).tolist()
        table.append([size, str(objects), str(detected), str(objects - detected), str(false)])
    sums = [sum(int(line[column]) for line in table[1:]) for column in range(1, 5)]
    return [*table, ["all", *map(str, sums)]]


if __name__ == "__main__":
    cli.launch(main)
