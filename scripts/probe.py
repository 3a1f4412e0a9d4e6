"""Robustness of trained networks:  python scripts/probe.py shift|sizes|objects RUN_OR_FILE [RUN_OR_FILE ...]

    shift     share of images whose top-1 is the same for two random shifted crops (Zhang 2019)
    sizes     accuracy against test resolution
    objects   accuracy by object size, from a table of boxes

A probe of a run folder is written to RUN/probe-NAME.json, which a study's report shows. torchrun makes it faster and
gives the same counts. Corruptions: eval.py --dataset imagenet-c.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_commands import DATA_HELP, DATA_NAME_HELP
from lip_resnet import checkpoint, cli, distributed
from lip_resnet.commands.eval import build, choose_protocol
from lip_resnet.config import InputError
from lip_resnet.evaluation import robustness, rows
from lip_resnet.evaluation.location import KINDS
from lip_resnet.evaluation.protocol import EvalConfig, adapt
from lip_resnet.evaluation.robustness import Build, Measured
from lip_resnet.models import registry
from lip_resnet.recipe import parse_config

Probe = Callable[[Build, EvalConfig, str, argparse.Namespace], Measured]

PROBES: dict[str, Probe] = {
    "shift": lambda network, config, split, options: robustness.measure_shift(network, config, split, options.seed),
    "sizes": lambda network, config, split, options: robustness.measure_sizes(network, config, split, options.sizes),
    "objects": lambda network, config, split, options: robustness.measure_objects(
        network, config, split, options.boxes
    ),
}
"""Name -> what measures it."""


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("checkpoints", nargs="+", metavar="RUN_OR_FILE", help="run folders, or files of weights")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", help="the recipe of a bare file of weights, as for train.py")
    which.add_argument("--model", help="the timm name of its network; the protocol is timm's for that model")
    parser.add_argument("--data", help=f"{DATA_HELP} (default: the recipe's)")
    parser.add_argument("--data-name", choices=KINDS, metavar="NAME", help=DATA_NAME_HELP)
    parser.add_argument("--output", help="where the row goes, of one network (default for a run: RUN/probe-NAME.json)")
    parser.add_argument("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    parser.add_argument("--seed", type=int, default=0, help="shift: of the crops (default 0)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[], help="sizes: pixels (default: 0.5 to 2 times its own)"
    )
    columns = ", ".join(robustness.BOX_COLUMNS)
    parser.add_argument("--boxes", type=Path, help=f"objects: a table of {columns} (default: boxes.tsv of the data)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch-size", dest="eval_batch_size", type=int, help="images per batch and process")
    parser.add_argument("--workers", type=int, help="loader worker processes per process")
    options = parser.parse_intermixed_args()
    for name, probe in (("sizes", "sizes"), ("boxes", "objects"), ("seed", "shift")):
        if getattr(options, name) and options.probe != probe:
            raise InputError(f"--{name} belongs to the probe {probe}, not to {options.probe}")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be at least 0")
    if options.output and len(options.checkpoints) > 1:
        raise InputError(f"--output {options.output} is for one network; {len(options.checkpoints)} are given")
    return options


def main() -> None:
    options = parse()
    todo = list(dict.fromkeys(options.checkpoints))
    if len(todo) > 1:  # such as the cells of a study that is still growing
        file = f"probe-{options.probe}.json"
        done = [path for path in todo if distributed.on_main((Path(path).expanduser() / file).exists)]
        todo = [path for path in todo if path not in done]
        if done and distributed.is_main():
            print(f"note: {len(done)} of {len(done) + len(todo)} have a {file} already", file=sys.stderr)
    outputs = [rows.row_path(path, options.output, options.probe, False, kind="probe") for path in todo]
    for path, output in zip(todo, outputs, strict=True):
        probe(path, output, options)


def probe(path: str, output: Path | None, options: argparse.Namespace) -> None:
    """Measure one network, print its figures and write its row."""
    options = argparse.Namespace(**vars(options) | {"checkpoint": path, "pretrained": False, "dataset": None})
    payload = checkpoint.load(checkpoint.resolve(path))
    trained = parse_config(payload["config"], path) if "config" in payload else None
    ema = (options.weights or (trained.train.rules if trained else "model")) == "ema"
    recipe = choose_protocol(options, payload, trained)
    changes = {key: getattr(options, key) for key in ("precision", "eval_batch_size", "workers")}
    config, split = adapt(recipe, None, options.data, kind=options.data_name, **changes)

    def network(sizes: Sequence[int]) -> torch.nn.Module:
        model = build(recipe, options, payload, ema)
        for size in sizes:
            registry.check_size(model, size)
        model.to(distributed.device())
        return model.to(memory_format=torch.channels_last) if recipe.channels_last else model

    measured = PROBES[options.probe](network, config, split, options)
    if not distributed.is_main():
        return
    row = rows.build_row(measured.network, path, ema, measured.data, measured.config, measured.result, payload, trained)
    row["protocol"]["probe"] = measured.settings
    shown = ", ".join(f"{name} {value:.3f}%" for name, value in robustness.figures(row).items())
    print(f"{path}: {shown}", flush=True)
    if output is not None:
        rows.write_row(output, {"probe": options.probe, **row})


if __name__ == "__main__":
    cli.launch(main)
