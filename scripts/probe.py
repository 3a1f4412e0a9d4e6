"""Robustness of trained networks:  python scripts/probe.py NAME STUDY_OR_RUN_OR_FILE [...]

    shift         share of images whose top-1 is the same for two random shifted crops (Zhang 2019)
    sizes         accuracy against test resolution
    objects       accuracy by object size, from a table of boxes
    deletion      the predicted class's probability as the most important parts of an image are removed first
    localisation  whether importance lies inside the objects' boxes
    robustness    shift, sizes, and objects where there are boxes

Rows go to RUN/probe-NAME.json, which a study's report shows. A study's folder means its finished cells; of several runs
those that have a row are left out, so that the same command goes on. torchrun gives the same counts, faster.
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
from lip_resnet.study import design

PROBES: dict[str, tuple[Callable[..., robustness.Measured], str]] = {
    "shift": (robustness.measure_shift, "seed"),
    "sizes": (robustness.measure_sizes, "sizes"),
    "objects": (robustness.measure_objects, "boxes"),
    "deletion": (functools.partial(attribution.measure_deletion, score=probes.deletion_curves), "every"),
    "localisation": (functools.partial(attribution.measure_localisation, score=probes.localisation_scores), "boxes"),
}
"""Name -> what measures it, and its option."""
GROUPS = {"robustness": ("shift", "sizes", "objects")}


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("probe", choices=[*PROBES, *GROUPS])
    what = "run folders, files of weights, or a study's folder: its finished cells"
    add("checkpoints", nargs="+", metavar="STUDY_OR_RUN_OR_FILE", help=what)
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
    options.names = GROUPS.get(options.probe, (options.probe,))
    for option in {option for _, option in PROBES.values()} - {PROBES[name][1] for name in options.names}:
        if getattr(options, option):
            first, *others = (name for name, (_, own) in PROBES.items() if own == option)
            also = f"; {others[0]} takes it too" if others else ""
            raise InputError(f"--{option} belongs to the probe {first}, not to {options.probe}{also}")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be at least 0")
    if options.output and len(options.names) > 1:
        raise InputError(f"--output {options.output} is for one row; {options.probe} writes several into run folders")
    return options


def main() -> None:
    options = parse()
    distributed.choose_device(options.device)
    paths = list(dict.fromkeys(path for given in options.checkpoints for path in _cells(given)))
    if options.output and (given := max(len(paths), len(options.checkpoints))) > 1:
        raise InputError(f"--output {options.output} is for one network; {given} are given")
    if options.probe in ("deletion", "localisation") and distributed.is_main() and not pixels.has_captum():
        print('note: without Grad-CAM: pip install "lip-resnet[insight]"', file=sys.stderr)
    one = len(options.names) == 1 and paths == options.checkpoints[:1]  # whose row must not exist
    todo = {name: paths if one else _without_row(name, paths) for name in options.names}
    outputs = {
        (name, path): rows.row_path(path, options.output, name, False, kind="probe")
        for name, without in todo.items()
        for path in without
    }
    for (name, path), output in outputs.items():
        probe(name, path, output, options)


def _cells(path: str) -> list[str]:
    """The run folders of the finished cells of a study's folder; any other path alone."""
    folder = Path(path).expanduser()
    if not (folder / "study.yaml").is_file():
        return [path]
    study = design.load_record(folder)
    if study.exported or study.detection:
        what = "an exported study, which has no weights" if study.exported else "a study of detectors"
        raise InputError(f"{path} is {what}; probe the run folders of classifiers")
    if finished := [str(cell.folder) for cell in study.cells() if cell.finished]:
        return finished
    raise InputError(f"{path}: no cell is finished yet; go on with: python scripts/study.py run STUDY.yaml")


def _without_row(name: str, paths: list[str]) -> list[str]:
    """Those of several runs, such as the cells of a study that is still growing, that have no row of a probe."""
    file = f"probe-{name}.json"
    done = [path for path in paths if distributed.on_main((Path(path).expanduser() / file).exists)]
    if done and distributed.is_main():
        print(f"note: {len(done)} of {len(paths)} runs have a {file} already", file=sys.stderr)
    return [path for path in paths if path not in done]


def probe(name: str, path: str, output: Path | None, options: argparse.Namespace) -> None:
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

    boxes = options.boxes or robustness.default_boxes(config)
    if name == "objects" and options.probe != name and not boxes.is_file():
        if distributed.is_main():
            print(f"note: {path}: without accuracy by object size, for there are no boxes: {boxes}", file=sys.stderr)
        return

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

    measure, option = PROBES[name]
    measured = measure(images, network, config, getattr(options, option))
    if not distributed.is_main():
        return
    facts = measured.data, measured.config, measured.result, payload, trained
    row = {"probe": name, **rows.build_row(measured.network, path, ema, *facts)}
    row["protocol"]["probe"] = measured.settings
    shown = ", ".join(f"{name} {value:.3f}%" for name, value in robustness.figures(row).items())
    print(f"{path}: {shown}", flush=True)
    if output is not None:
        rows.write_row(output, row)


if __name__ == "__main__":
    cli.launch(main)
