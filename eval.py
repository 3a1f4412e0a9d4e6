"""Evaluate weights exactly:  python eval.py --checkpoint RUN_OR_FILE --data DIR [--dataset imagenet-v2 imagenet-a ...]

Under torchrun it is faster and counts the same. A run folder and our own checkpoints know their
model and protocol; for bare files add --model NAME or --config FILE.
"""

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from lip_resnet import checkpoint, distributed, metrics, models, replace_downsampling, results, runlog
from lip_resnet.config import Config, InputError
from lip_resnet.data import EvalLoader, describe_source, testsets
from lip_resnet.engine import evaluate
from lip_resnet.recipe import load_config, parse_config
from lip_resnet.weights import extract_weights, put_weights


def parse() -> Any:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run folder, or a .pt, .pth or .safetensors file")
    parser.add_argument("--pretrained", action="store_true", help="timm's own weights of --model, downloaded")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", help="the recipe of the checkpoint")
    which.add_argument("--model", help="the timm name of the checkpoint's model; its protocol is timm's for that model")
    parser.add_argument(
        "--data",
        help="the directory that holds val/, or that folder: class folders or tar shards (default: the recipe's); for "
        "a test set its folder; for several the directory that holds each by its name",
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        choices=(*testsets.IMAGES, "all"),
        metavar="NAME",
        help=f"test sets: {', '.join(testsets.IMAGES)}, or all of them (default: the recipe's validation set)",
    )
    parser.add_argument("--partial", action="store_true", help="take imagenet-c without some of its folders: no mCE")
    parser.add_argument(
        "--output",
        help="where to write the row (default for a run folder: RUN/eval.json, or RUN/eval-NAME.json with --dataset); "
        "for several sets a directory, for rows of those names",
    )
    parser.add_argument("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    parser.add_argument("--size", type=int, help="side of the centre crop, pixels")
    parser.add_argument("--resize", type=int, help="the shorter side before the crop, pixels")
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"))
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch-size", type=int, help="images per batch of one process")
    parser.add_argument("--workers", type=int, help="loader processes of each process")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if bool(options.checkpoint) == options.pretrained:
        raise InputError("give --checkpoint PATH, or --pretrained with --model NAME; one of the two")
    if options.pretrained and not options.model:
        raise InputError("--pretrained needs --model NAME")
    names = choose_sets(options)
    outputs = [choose_output(options, name, len(names)) for name in names]

    payload = checkpoint.load(checkpoint.resolve(options.checkpoint)) if options.checkpoint else {}
    trained = parse_config(payload["config"], options.checkpoint) if "config" in payload else None
    recipe = describe(options, payload, trained)
    placed = [with_flags(recipe, options, name, len(names)) for name in names]
    configs = [config for config, _ in placed]
    sets = [
        testsets.open_set(name, config.data, split, config.model.num_classes, options.partial)
        for name, (config, split) in zip(names, placed, strict=True)
    ]
    # First: its workers are forked before other threads start.
    loader = EvalLoader(testsets.Joined(sets), configs[0].data)
    model = build(recipe, options, payload, wants_ema(options, trained))

    # TF32 rounds to 10 bits: counts would not be the float32 counts.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for config in configs:
        models.check_size(model, config.data.eval_size)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    model.to(distributed.device(), memory_format=layout)
    start = 0
    for data, config, output in zip(sets, configs, outputs, strict=True):
        result = score(model, data, loader, config, start)
        start += len(data.source)
        if not distributed.is_main():
            continue
        report(data, result, bool(options.dataset))
        if output is not None:
            row = {
                **identify(options, recipe, trained),
                **result,
                "params": models.count_parameters(model),
                "macs": models.count_macs(model, config.data.eval_size),
                "seed": trained.train.seed if trained else None,
                "step": payload.get("step"),
                "protocol": results.describe_protocol(
                    config,
                    results.describe_training(trained, payload["processes"], payload.get("initial_weights"))
                    if trained
                    else None,
                    data.protocol,
                ),
                "dataset": {"name": data.name, "whole": data.whole, **describe_source(data.source)},
                "environment": runlog.describe_environment(),
            }
            text = json.dumps(row, indent=2) + "\n"
            checkpoint.write_atomically(output, lambda file, text=text: file.write(text.encode()))


def choose_sets(options: Any) -> list[str | None]:
    """The test sets asked for, each once; None is the recipe's validation set."""
    if not options.dataset:
        return [None]
    names = list(testsets.IMAGES) if "all" in options.dataset else list(dict.fromkeys(options.dataset))
    if options.partial and "imagenet-c" not in names:
        raise InputError("--partial belongs to --dataset imagenet-c")
    return names


def choose_output(options: Any, name: str | None, count: int) -> Path | None:
    """Where a set's row goes; an existing file is never overwritten."""
    run, path = Path(options.checkpoint or ""), Path(options.output) if options.output else None
    file = "eval.json" if name in (None, "imagenet") else f"eval-{name}.json"
    if path is not None and count > 1:
        if not path.is_dir():
            raise InputError(f"--output {path} is not a directory; for several sets it must be one")
        path = path / file
    elif path is None and options.checkpoint and run.is_dir():
        path = run / file
    if path is not None and distributed.on_main(path.exists):
        raise InputError(f"{path} exists; choose another --output or remove it")
    if path is not None and not path.resolve().parent.is_dir():
        raise InputError(f"--output {path}: {path.parent} is not a directory")
    return path


def describe(options: Any, payload: dict[str, Any], trained: Config | None) -> Config:
    """The recipe to evaluate by: ``--config``, else the one that the weights were trained with, else timm's."""
    if options.config:
        config = load_config(options.config)
    elif trained is not None and not options.model:
        return trained
    elif options.model:
        config = timm_protocol(options.model, options.data or ".")
    else:
        raise InputError(f"{options.checkpoint} does not name its model; add --model NAME or --config FILE")
    classes = models.create_model(config.model.name).num_classes if options.pretrained else None
    if payload:
        head = models.create_model(config.model.name).default_cfg["classifier"]
        weight = extract_weights(payload, options.checkpoint).get(f"{head}.weight")
        classes = None if weight is None else len(weight)
    if classes is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"num_classes": classes})})


def timm_protocol(name: str, root: str) -> Config:
    """How timm evaluates a model: size, crop, interpolation and normalisation of its ``pretrained_cfg``."""
    model = models.create_model(name)
    protocol = timm.data.resolve_model_data_config(model)
    size = protocol["input_size"][-1]
    tree = {
        "model": {"name": name, "num_classes": max(1, model.num_classes)},
        "data": {
            "root": root,
            "batch_size": 256,
            "eval_size": size,
            "eval_resize": int(size / protocol["crop_pct"]),
            **{key: protocol[key] for key in ("interpolation", "mean", "std")},
        },
        "optim": {"lr": 0.1},
        "train": {"epochs": 1},
    }
    return parse_config(tree, f"--model {name}")


def with_flags(config: Config, options: Any, name: str | None, count: int) -> tuple[Config, str]:
    """The recipe with a set's data, the command line's protocol, and the folder to evaluate below the data's root."""
    tree, split = config.model_dump(), "val"
    if options.data:
        place, split = testsets.locate(options.data, name, alone=count == 1)
        tree["data"] |= place
    elif options.model or (name is not None and not (config.data.root and name in ("imagenet", "imagenet-real"))):
        raise InputError(f"--data is missing: the directory that holds {name or 'val/'}")
    if name == "imagenet-c":
        side = options.size or testsets.SIDE_OF_C
        tree["data"] |= {"eval_size": side, "eval_resize": side}
    for key, value in (
        ("eval_size", options.size),
        ("eval_resize", options.resize),
        ("interpolation", options.interpolation),
        ("eval_batch_size", options.batch_size),
        ("workers", options.workers),
    ):
        if value is not None:
            tree["data"][key] = value
    tree["train"] |= {"precision": options.precision or "float32", "rules": "model", "ema_decay": None}
    return parse_config(tree, "eval.py"), split


def wants_ema(options: Any, trained: Config | None) -> bool:
    """Whether the averaged weights are evaluated."""
    return (options.weights or (trained.train.rules if trained else "model")) == "ema"


def build(config: Config, options: Any, payload: dict[str, Any], ema: bool) -> torch.nn.Module:
    """The network with the weights to evaluate."""
    if options.pretrained:
        return models.create_model(config.model.name, pretrained=True)
    model = models.build_model(config.model.model_copy(update={"weights": None}), replace_downsampling)
    put_weights(model, payload, options.checkpoint, ema=ema)
    return model


def score(
    model: torch.nn.Module, data: testsets.EvalSet, loader: EvalLoader, config: Config, start: int
) -> dict[str, Any]:
    """A set's figures; its images begin at ``start`` of the loader's."""
    if data.classes is not None:
        model = metrics.ClassLogits(model, data.classes)
    found = {}
    for part, images in data.parts.items():
        loader.choose(range(start + images.start, start + images.stop))
        found[part] = evaluate(model, loader, config)
        if len(data.parts) > 1 and distributed.is_main():
            print(f"{data.name} {part}: Acc@1 {found[part]['top1']:.3f} Acc@5 {found[part]['top5']:.3f}", flush=True)
    return found[""] if "" in found else metrics.corruption_errors(found, testsets.corruptions()[0])


def report(data: testsets.EvalSet, result: dict[str, Any], named: bool) -> None:
    """Print a set's line."""
    line = f"* Acc@1 {result['top1']:.3f} Acc@5 {result['top5']:.3f}" + (f" {data.name}" if named else "")
    if "mean_error" in result:
        line += f", mean error {result['mean_error']:.3f}"
        line += (
            f", mCE {result['mce']:.3f}" if "mce" in result else f", no mCE: {len(data.protocol['lacks'])} parts lack"
        )
    print(line, flush=True)
    if named and not data.whole:
        each = " each" if len(data.parts) > 1 else ""
        images = len(next(iter(data.parts.values())))
        released = f"{testsets.IMAGES[data.name]:,}"
        print(f"note: {images:,} images{each}; the released {data.name} has {released}{each}", file=sys.stderr)


def identify(options: Any, recipe: Config, trained: Config | None) -> dict[str, Any]:
    """Which weights of which network they are, for a row."""
    return {
        "model": recipe.model.name,
        "args": recipe.model.args,
        "downsampling": recipe.model.downsampling,
        "checkpoint": options.checkpoint or f"timm:{recipe.model.name}",
        "weights": "ema" if wants_ema(options, trained) else "model",
        "selected_on_val": Path(options.checkpoint or "").name == "best.pt",
    }


if __name__ == "__main__":
    distributed.launch(main)
