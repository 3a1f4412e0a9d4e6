"""Show what a network's downsampling layers attend to:

    python scripts/show_importance.py --checkpoint RUN_OR_FILE --images FILES_OR_FOLDER --output DIR

DIR gets a picture of every photograph with the maps of all sites over it, a picture of one window (window.png), and
index.html with all of them. Without --checkpoint the network is untrained; without --images they are of the recipe's
validation set. An image that cannot be read is named and skipped.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_resnet import checkpoint, cli, distributed
from lip_resnet.commands.eval import build, choose_protocol
from lip_resnet.config import DetectionConfig, InputError, Recipe
from lip_resnet.data import build_sources
from lip_resnet.data.decode import BadImage
from lip_resnet.data.photographs import Photograph, find_photographs, read_photograph, sample_images
from lip_resnet.evaluation.compatibility import check_normalization
from lip_resnet.evaluation.protocol import EvalConfig
from lip_resnet.files import check_empty, write_text
from lip_resnet.insight import SiteMaps, importance_maps
from lip_resnet.insight.gallery import Picture, to_page, write_picture
from lip_resnet.insight.importance import choose_sites
from lip_resnet.insight.weights import WEIGHINGS
from lip_resnet.insight.windows import example_window
from lip_resnet.models import registry
from lip_resnet.models.weights import choose_weights

UNTRAINED = "lip_resnet50"
"""The network that is shown without --checkpoint, --model and --config."""


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="RUN_OR_FILE", help="a run folder, or a .pt, .pth or .safetensors file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help=f"the timm name of a bare file's network (untrained: default {UNTRAINED})")
    which.add_argument("--config", help="the recipe of a bare file, as for train.py")
    add("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    add("--images", nargs="+", default=[], metavar="FILE_OR_FOLDER", help="default: of the recipe's validation set")
    add("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--sites", nargs="+", metavar="NAME", help="modules to show (default: all)")
    add("--compare", nargs="+", default=[], choices=WEIGHINGS, metavar="LAYER", help=", ".join(WEIGHINGS))
    add("--limit", type=int, default=24, help="most images to show, evenly spaced (default 24)")
    add("--format", choices=("png", "svg"), default="png")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: CUDA, else the CPU")
    options = parser.parse_args()
    if options.limit < 1:
        raise InputError(f"--limit is {options.limit}; it must be at least 1")
    check_empty(options.output)
    return options


def main() -> None:
    options = parse()
    try:
        from lip_resnet.insight import figures
    except ImportError as error:
        raise InputError('pictures need the package matplotlib: pip install "lip-resnet[insight]"') from error
    model, config, title = load_network(options)
    sites = list(choose_sites(model, options.sites))
    compare = list(dict.fromkeys(options.compare))
    normalization = {"mean": config.data.mean, "std": config.data.std}
    pictures: list[Picture] = []
    maps_of_images: list[list[SiteMaps]] = []
    kind, files = options.format, set()
    for photograph in read_photographs(options, config):
        maps = importance_maps(model, photograph.pixels[None], sites=sites, compare=compare, **normalization)
        name = Path(photograph.name).name
        size, (_, height, width) = photograph.size, photograph.pixels.shape
        scaled = f"an image of {size[0]}x{size[1]} pixels, read by the network as {width}x{height}"
        with figures.style():
            if not pictures:
                example = example_window(model, photograph.pixels, sites[0], **normalization)
                if example is not None:
                    note = f"{name}, site {example.site}, channel {example.channel}: a window of typical entropy "
                    note += f"({example.entropy:.2f}; the site's mean is {example.mean_entropy:.2f}). {title}"
                    figure = figures.draw_window(photograph.shown, example, "One window and its nine weights", note)
                    pictures.append(
                        write_picture(options.output, f"window.{kind}", note, figures.to_bytes(figure, kind))
                    )
                    files.add("window")
            heading = name if options.checkpoint else f"{name}, by an untrained network"
            figure = figures.draw_maps(photograph.shown, maps, 0, heading, f"{scaled}. {title}")
            stem = unused_stem(photograph.name, files)
            text = f"{name}, {scaled}, and its maps at {', '.join(sites)}. {title}"
            pictures.append(write_picture(options.output, f"{stem}.{kind}", text, figures.to_bytes(figure, kind)))
        maps_of_images.append(maps)
        print(f"{options.output / stem}.{kind}: {scaled}", flush=True)
    page = to_page(title, EXPLANATION, entropies(maps_of_images), pictures)
    write_text(options.output / "index.html", page)
    print(options.output / "index.html")


EXPLANATION = (
    "A downsampling layer is a weighted mean of each of its windows. A map shows, for every position of the features "
    "that a layer reads, the sum of its weights in all windows that contain it, divided by that sum under average "
    "pooling: red counts more than under average pooling, blue less, grey as much. All maps have the same scale. A "
    "network's first site reads fine features, its last one coarse ones, where a position stands for a large part of "
    "the photograph.",
    "The table has the entropy of a window's weights, over that of equal weights: 1 for average pooling, 0 where one "
    "position has all the weight, as in max pooling. Maps and entropies are means over channels, the table's also "
    "over all photographs.",
)


def load_network(options: argparse.Namespace) -> tuple[nn.Module, EvalConfig, str]:
    """The network, how images are read for it, and a line that says what it is."""
    untrained = options.checkpoint is None
    if untrained and options.weights:
        raise InputError(f"--weights {options.weights} belongs to --checkpoint")
    if untrained and not options.model and not options.config:
        options.model = UNTRAINED
    device = distributed.choose_device(options.device)
    payload = {} if untrained else checkpoint.load(checkpoint.resolve(options.checkpoint))
    if not untrained and isinstance(checkpoint.read_recipe(payload, options.checkpoint, Recipe), DetectionConfig):
        raise InputError(
            f"{options.checkpoint} is a detector: scripts/show_detections.py --maps shows its importance maps"
        )
    trained = None if untrained else checkpoint.read_recipe(payload, options.checkpoint)
    config = choose_protocol(options.checkpoint, payload, trained, options.config, options.model)
    if untrained:
        torch.manual_seed(0)
        model = registry.build_model(config.model.model_copy(update={"weights": None}))
        title = f"{config.model.name}, UNTRAINED: its weights are random, and LIP starts as average pooling"
        print(f"note: without --checkpoint: {title}", file=sys.stderr)
    else:
        advice = "show it by its own recipe, without --config and --model"
        check_normalization(trained, config.data, options.checkpoint, advice)
        ema = choose_weights(payload, options.checkpoint, options.weights, trained) == "ema"
        model = build(config, payload, options.checkpoint, ema)
        step = f", step {payload['step']}" if isinstance(payload.get("step"), int) else ""
        short = Path(*Path(options.checkpoint).resolve().parts[-3:])
        title = f"{config.model.name} from {short}{step}{', averaged weights' if ema else ''}"
    registry.check_size(model, config.data.eval_resize)
    return model.to(device), config, title


def read_photographs(options: argparse.Namespace, config: EvalConfig) -> Iterator[Photograph]:
    """The images to show, one at a time; those that cannot be read are named and skipped.

    Raises:
        InputError: there are none, or none that can be read.
    """
    if not options.images:
        if config.data.name == "folder" and config.data.root in (None, "."):
            raise InputError("--images is missing: files or folders; only a run knows its validation images")
        (source,) = build_sources(config.data, config.model.num_classes, ("val",))
        yield from sample_images(source, config.data, options.limit)
        return
    files = find_photographs(options.images)
    count = min(options.limit, len(files))
    if count < len(files):
        print(f"note: {count} of {len(files):,} images, evenly spaced; --limit shows more", file=sys.stderr)
    skipped = []
    for path in (files[index * len(files) // count] for index in range(count)):
        try:
            photograph = read_photograph(path, config.data)
        except BadImage as error:
            if count == 1:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            skipped.append(path)
            continue
        yield photograph
    if len(skipped) == count:
        raise InputError(f"none of the {count} images can be read; the first is {skipped[0]}")


def unused_stem(name: str, used: set[str]) -> str:
    """A file name without suffix for a picture of the image ``name``, which joins those that are used."""
    stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:100].strip("-.") or "image"
    number = 1
    while (unused := stem if number == 1 else f"{stem}-{number}") in used:
        number += 1
    used.add(unused)
    return unused


def entropies(maps_of_images: Sequence[Sequence[SiteMaps]]) -> list[list[str]]:
    """A table: mean entropy over all images, a line a site and a column a layer."""
    values: dict[str, dict[str, list[float]]] = {}
    for number, maps in enumerate(zip(*maps_of_images, strict=True)):
        own = all(each.name != maps[0].name for each in maps_of_images[0][:number])
        column = "its own layer" if own else maps[0].layer
        values.setdefault(maps[0].name, {})[column] = [each.entropy.mean() for each in maps]
    columns = list(dict.fromkeys(column for line in values.values() for column in line))
    own_layers = {each.name: each.layer for each in reversed(maps_of_images[0])}
    header = ["site", "layer", *(f"entropy: {column}" for column in columns)]
    lines = [[site, own_layers[site], *(f"{np.mean(line[c]):.3f}" for c in columns)] for site, line in values.items()]
    return [header, *lines]


if __name__ == "__main__":
    cli.launch(main)
