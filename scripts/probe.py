"""Robustness of trained networks:  python scripts/probe.py NAME RUN_OR_FILE [...]

    shift         share of images whose top-1 is the same for two random shifted crops (Zhang 2019)
    sizes         accuracy against test resolution
    objects       accuracy by object size, from a table of boxes
    deletion      the predicted class's probability as the most important parts of an image are removed first
    localisation  whether importance lies inside the objects' boxes

Rows go to RUN/probe-NAME.json, which a study's report shows. torchrun gives the same counts, faster.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_commands import DATA_HELP, DATA_NAME_HELP
from lip_resnet import checkpoint, cli, distributed, memory
from lip_resnet.commands.eval import build, choose_protocol
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.evaluation import attribution, robustness, rows
from lip_resnet.evaluation.compatibility import check_normalization, check_set, recorded_classes
from lip_resnet.evaluation.location import KINDS
from lip_resnet.evaluation.protocol import adapt
from lip_resnet.evaluation.testsets import EvalSet, open_set
from lip_resnet.insight import pixels, probes
from lip_resnet.models import registry
from lip_resnet.models.weights import choose_weights

PROBES: dict[str, tuple[Callable[..., robustness.Measured], str]] = {
    "shift": (robustness.measure_shift, "seed"),
    "sizes": (robustness.measure_sizes, "sizes"),
    "objects": (robustness.measure_objects, "boxes"),
    "deletion": (functools.partial(attribution.measure_deletion, score=probes.deletion_curves), "every"),
    "localisation": (functools.partial(attribution.measure_localisation, score=probes.localisation_scores), "boxes"),
}
"""Name -> what measures it, and its option."""


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("probe", choices=PROBES)
    add("checkpoints", nargs="+", metavar="RUN_OR_FILE", help="run folders, or files of weights")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", help="the recipe of a bare file of weights, as for train.py")
    which.add_argument("--model", help="the timm name of its network; the protocol is timm's for that model")
    add("--data", help=f"{DATA_HELP} (default: the recipe's)")
    add("--data-name", choices=KINDS, metavar="NAME", help=DATA_NAME_HELP)
    add("--output", help="where the row goes, of one network (default for a run: RUN/probe-NAME.json)")
    add("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    add("--seed", type=int, default=0, help="shift: of the crops (default 0)")
    add("--sizes", type=int, nargs="+", default=[], help="sizes: pixels (default: 0.5 to 2 times its own)")
    add("--boxes", type=Path, help="objects, localisation: a table of file, x0, y0, x1, y1 (default: boxes.tsv)")
    add("--every", type=int, metavar="N", help="deletion: each Nth image (default: all)")
    add("--precision", choices=("float32", "bfloat16", "float16"))
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: CUDA, else the CPU")
    add("--batch-size", dest="eval_batch_size", type=int, help="images per batch and process")
    add("--workers", type=int, help="loader worker processes per process")
    options = parser.parse_intermixed_args()
    for option in {option for _, option in PROBES.values()} - {PROBES[options.probe][1]}:
        if getattr(options, option):
            first, *others = (name for name, (_, own) in PROBES.items() if own == option)
            also = f"; {others[0]} takes it too" if others else ""
            raise InputError(f"--{option} belongs to the probe {first}, not to {options.probe}{also}")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be at least 0")
    if options.output and len(options.checkpoints) > 1:
        raise InputError(f"--output {options.output} is for one network; {len(options.checkpoints)} are given")
    return options


def main() -> None:
    options = parse()
    distributed.choose_device(options.device)
    todo, file = list(dict.fromkeys(options.checkpoints)), f"probe-{options.probe}.json"
    if len(todo) > 1:  # such as the cells of a study that is still growing
        done = [path for path in todo if distributed.on_main((Path(path).expanduser() / file).exists)]
        todo = [path for path in todo if path not in done]
        if done and distributed.is_main():
            print(f"note: {len(done)} of {len(options.checkpoints)} runs have a {file} already", file=sys.stderr)
    if options.probe in ("deletion", "localisation") and distributed.is_main() and not pixels.has_captum():
        print('note: without Grad-CAM: pip install "lip-resnet[insight]"', file=sys.stderr)
    outputs = {path: rows.row_path(path, options.output, options.probe, False, kind="probe") for path in todo}
    for path, output in outputs.items():
        probe(path, output, options)


def probe(path: str, output: Path | None, options: argparse.Namespace) -> None:
    """Measure one network, print its figures and write its row."""
    payload = checkpoint.load(checkpoint.resolve(path))
    trained = checkpoint.read_recipe(payload, path)
    ema = choose_weights(payload, path, options.weights, trained) == "ema"
    recipe = choose_protocol(path, payload, trained, options.config, options.model)
    if options.model and not options.data:
        raise InputError("--data is missing: the directory that holds val/")
    check_normalization(trained, recipe.data, path, "probe it by its own recipe, without --config and --model")
    classes = recorded_classes(payload) if trained and trained.data.classes == recipe.data.classes else None
    changes = {key: getattr(options, key) for key in ("precision", "eval_batch_size", "workers")}
    config, split = adapt(recipe, None, options.data, kind=options.data_name, **changes)

    def images(data: EvalDataConfig) -> EvalSet:
        opened = open_set(None, data, split, config.model.num_classes, classes=classes)
        check_set(payload, opened, path)
        return opened

    def network(sizes: Sequence[int]) -> torch.nn.Module:
        model = build(recipe, payload, path, ema)
        for size in sizes:
            registry.check_size(model, size)
        model.to(distributed.device())
        return model.to(memory_format=memory.layout(recipe.channels_last, distributed.device()))

    measure, option = PROBES[options.probe]
    measured = measure(images, network, config, getattr(options, option))
    if not distributed.is_main():
        return
    facts = measured.data, measured.config, measured.result, payload, trained
    row = {"probe": options.probe, **rows.build_row(measured.network, path, ema, *facts)}
    row["protocol"]["probe"] = measured.settings
    shown = ", ".join(f"{name} {value:.3f}%" for name, value in robustness.figures(row).items())
    print(f"{path}: {shown}", flush=True)
    if output is not None:
        rows.write_row(output, row)


if __name__ == "__main__":
    cli.launch(main)
