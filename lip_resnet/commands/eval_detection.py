"""``eval.py`` for ``task: detection``: reads weights and their protocol, evaluates, and writes the row."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lip_resnet import checkpoint, distributed, memory
from lip_resnet.config import DetectionConfig, Effect, InputError
from lip_resnet.detection import rows
from lip_resnet.detection.evaluate import coco_metrics, detect, write_results
from lip_resnet.detection.loaders import DetectionEvalLoader
from lip_resnet.detection.models import build_body, build_detector
from lip_resnet.detection.rows import DetectionEvalConfig
from lip_resnet.detection.samples import DetectionSource
from lip_resnet.detection.sources import build_sources
from lip_resnet.evaluation.average_precision import METRICS, bootstrap, interval
from lip_resnet.evaluation.compatibility import check_class_names, check_normalization, recorded_classes
from lip_resnet.evaluation.matching import Detections, match
from lip_resnet.evaluation.predictions import check_new_file
from lip_resnet.evaluation.rows import row_path, write_row
from lip_resnet.models.weights import choose_weights, put_weights
from lip_resnet.recipe import load_recipe, of_task, parse_section

_OF_CLASSIFICATION = ("pretrained", "model", "data_name", "dataset", "partial", "eval_resize", "crop_mode")
SAMPLES = 1000
"""Bootstrap samples of ``--intervals``."""


def main(options: Namespace, payload: dict[str, Any]) -> None:
    """Evaluate the weights in ``payload``; ``options`` are those of ``lip_commands.eval_parser``."""
    for name in (*_OF_CLASSIFICATION, "interpolation"):
        if getattr(options, name):
            flag = {"eval_resize": "--resize"}.get(name, f"--{name.replace('_', '-')}")
            raise InputError(f"{flag} is for classification, and {options.checkpoint} is evaluated as a detector")
    output = row_path(options.checkpoint, options.output, None, several=False)
    for flag, suffix in (("--predictions", ".json"), ("--matches", ".npz")):
        if path := getattr(options, flag[2:]):
            check_new_file(Path(path), several=False, flag=flag, suffix=suffix)
    trained = checkpoint.read_recipe(payload, options.checkpoint, DetectionConfig)
    ema = choose_weights(payload, options.checkpoint, options.weights, trained) == "ema"
    config = choose_protocol(options, trained)
    check_normalization(trained, config.data, options.checkpoint, "evaluate it by its own recipe, without --config")
    (source,) = build_sources(config.data, config.model.num_classes, ("val",))
    advice = "evaluate it on the classes that it was trained on"
    check_class_names(recorded_classes(payload), source.classes, options.checkpoint, advice)
    # Before the network: the loader's workers are forked before other threads start.
    loader = DetectionEvalLoader(source, config.data)
    model = load_detector(config, payload, options.checkpoint, ema)
    detections = detect_set(model, loader, config)
    if options.predictions and distributed.is_main():
        write_results(Path(options.predictions), detections)
    result = distributed.on_main(lambda: summarize(source, detections, options))
    if distributed.is_main():
        print("* " + " ".join(f"{name} {result[name]:.3f}" for name in METRICS), flush=True)
        for name, (low, high) in result.get("intervals", {}).items():
            print(f"{name}: 95% interval {low:.3f} to {high:.3f} over images ({SAMPLES:,} bootstrap samples)")
        if output is not None:
            result["images"] = len(source)
            write_row(output, rows.build_row(model, options.checkpoint, ema, source, config, result, payload, trained))


def choose_protocol(options: Namespace, trained: DetectionConfig | None) -> DetectionEvalConfig:
    """The evaluation of ``--config``, or the run's, with the changes of the command line."""
    recipe = trained
    if options.config:
        overrides = [f"data.root={options.data}"] if options.data else []
        recipe = of_task(load_recipe(options.config, overrides), DetectionConfig, options.config)
    if recipe is None:
        raise InputError(f"{options.checkpoint} has no recipe; add --config FILE")
    if trained is not None:
        theirs, ours = trained.values(Effect.WEIGHTS), recipe.values(Effect.WEIGHTS)
        for key in ours:
            if key.startswith("model.") and ours[key] != theirs[key]:
                what = f"{options.checkpoint} was trained with {key}={theirs[key]}, {options.config} has {ours[key]}"
                raise InputError(f"{what}; evaluate it by its own recipe, without --config")
    tree = DetectionEvalConfig.from_recipe(recipe).model_dump()
    data = tree["data"]
    if options.data and data["name"] != "coco":
        raise InputError(f"--data {options.data}: the recipe's data.name is {data['name']}, which reads no directory")
    if options.eval_size is not None:
        data |= {"size": options.eval_size, "max_size": round(data["max_size"] * options.eval_size / data["size"])}
    changes = {"root": options.data, "eval_batch_size": options.eval_batch_size, "workers": options.workers}
    data |= {key: value for key, value in changes.items() if value is not None}
    tree["precision"] = options.precision or tree["precision"]
    return parse_section(tree, "evaluation", DetectionEvalConfig)


def load_detector(config: DetectionEvalConfig, payload: dict[str, Any], source: str, ema: bool) -> torch.nn.Module:
    """The detector with the weights of a checkpoint, on this process's device."""
    model = build_detector(config.model, build_body(config.model.backbone))
    put_weights(model, payload, source, ema=ema)
    device = distributed.device()
    return model.to(device).to(memory_format=memory.layout(config.channels_last, device))


def detect_set(model: torch.nn.Module, loader: DetectionEvalLoader, config: DetectionEvalConfig) -> Detections:
    """``detect`` by a protocol, without TF32, whose 10 bits would move boxes and scores."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    mean, std = config.data.mean, config.data.std
    return detect(model, loader, precision=config.precision, channels_last=config.channels_last, mean=mean, std=std)


def summarize(source: DetectionSource, detections: Detections, options: Namespace) -> dict[str, Any]:
    """The figures; writes ``--matches``."""
    result: dict[str, Any] = coco_metrics(source.ground_truth(), detections)
    if options.matches or options.intervals:
        matches = match(source.ground_truth(), detections)
        if options.matches:
            matches.write(Path(options.matches))
        if options.intervals:
            values = bootstrap([matches], samples=SAMPLES)
            intervals = {name: interval(each[0], result[name]) for name, each in values.items()}
            result["intervals"] = {name: each for name, each in intervals.items() if each is not None}
    return result
