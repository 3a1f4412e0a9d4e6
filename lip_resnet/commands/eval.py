"""``eval.py``: reads weights and their protocol, evaluates each set, prints its result and writes its row."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lip_resnet import checkpoint, distributed, memory
from lip_resnet.config import Config, InputError
from lip_resnet.data import EvalLoader
from lip_resnet.evaluation import rows, testsets
from lip_resnet.evaluation.compatibility import check_normalization, check_set, recorded_classes
from lip_resnet.evaluation.evaluate import evaluate_set, print_notes, print_result
from lip_resnet.evaluation.predictions import PredictionLog, check_new_file
from lip_resnet.evaluation.protocol import EvalConfig, adapt, timm_protocol
from lip_resnet.models import registry
from lip_resnet.models.weights import choose_weights, extract_weights, put_weights
from lip_resnet.recipe import load_config, read_tree, task_of


def main(options: Namespace) -> None:
    """Evaluate; ``options`` are those of ``lip_commands.eval_parser``."""
    if bool(options.checkpoint) == options.pretrained:
        raise InputError("give --checkpoint PATH or --pretrained with --model NAME, and not both")
    if options.pretrained and not options.model:
        raise InputError("--pretrained needs --model NAME")
    device = distributed.choose_device(options.device)
    payload = checkpoint.load(checkpoint.resolve(options.checkpoint)) if options.checkpoint else {}
    if is_detection(options, payload):
        from lip_resnet.commands import eval_detection  # needs torchvision's operators

        eval_detection.main(options, payload)
        return
    if options.matches or options.intervals:
        raise InputError(f"--{'matches' if options.matches else 'intervals'} is for detectors")
    names = testsets.choose(options.dataset, options.partial)
    several = len(names) > 1
    if options.predictions:
        check_new_file(Path(options.predictions), several)
    outputs = [rows.row_path(options.checkpoint, options.output, name, several) for name in names]

    source = options.checkpoint or f"timm:{options.model}"
    trained = checkpoint.read_recipe(payload, source)
    ema = choose_weights(payload, source, options.weights, trained) == "ema"
    recipe = choose_protocol(source, payload, trained, options.config, options.model)
    if options.model and not options.data:
        raise InputError(f"--data is missing: the directory that holds {(options.dataset or ['val/'])[0]}")
    check_normalization(trained, recipe.data, source, "evaluate it by its own recipe, without --config and --model")
    same_classes = trained is not None and trained.data.classes == recipe.data.classes
    classes = recorded_classes(payload) if same_classes else None
    keys = ("precision", "eval_size", "eval_resize", "crop_mode", "interpolation", "eval_batch_size", "workers")
    changes = {key: getattr(options, key) for key in keys}
    plans = [adapt(recipe, name, options.data, several=several, kind=options.data_name, **changes) for name in names]
    configs = [config for config, _ in plans]
    sets = [
        testsets.open_set(name, config.data, split, config.model.num_classes, options.partial, classes)
        for name, (config, split) in zip(names, plans, strict=True)
    ]
    for data in sets:
        check_set(payload, data, source)
    if distributed.is_main():
        print_notes(configs, sets, trained, bool(options.dataset), bool(options.eval_size and not options.eval_resize))
    # Before the network: the loader's workers are forked before other threads start.
    loader = EvalLoader(testsets.Joined(sets), configs[0].data)
    model = registry.create_pretrained(recipe.model.name) if options.pretrained else build(recipe, payload, source, ema)
    for config in configs:
        registry.check_size(model, config.data.eval_size)
    model.to(device).to(memory_format=memory.layout(recipe.channels_last, device))
    start = 0
    for data, config, output in zip(sets, configs, outputs, strict=True):
        predictions = PredictionLog() if options.predictions else None
        result = evaluate_set(model, data, loader, config, start, predictions)
        if predictions is not None:
            predictions.write(Path(options.predictions), data.source)
        start += len(data.source)
        if distributed.is_main():
            print_result(data, result, with_name=bool(options.dataset))
        if distributed.is_main() and output is not None:
            row = rows.build_row(model, source, ema, data, config, result, payload, trained)
            named = {"predictions": options.predictions} if options.predictions else {}
            rows.write_row(output, row | named)


def is_detection(options: Namespace, payload: dict[str, Any]) -> bool:
    """Whether the recipe of ``--config``, or of the checkpoint, is of ``task: detection``."""
    tree = read_tree(options.config)[0] if options.config else payload.get("config")
    return task_of(tree) == "detection"


def choose_protocol(
    source: str, payload: dict[str, Any], trained: Config | None, config: str | None, model: str | None
) -> EvalConfig:
    """The protocol of the recipe ``config``, timm's for ``model``, or the run's; with as many classes as the weights.

    Raises:
        InputError: nothing names the model of the checkpoint ``source``, or there is no such recipe or model.
    """
    if config:
        protocol = EvalConfig.from_recipe(load_config(config))
    elif model:
        protocol = timm_protocol(model, registry.pretrained_cfg(model))
    elif trained is not None:
        return EvalConfig.from_recipe(trained)
    else:
        raise InputError(f"{source} does not name its model; add --model NAME or --config FILE")
    head = registry.pretrained_cfg(protocol.model.name).get("classifier")
    weight = extract_weights(payload, source).get(f"{head}.weight") if payload else None
    if weight is None:
        return protocol
    return protocol.model_copy(update={"model": protocol.model.model_copy(update={"num_classes": len(weight)})})


def build(config: EvalConfig, payload: dict[str, Any], source: str, ema: bool) -> torch.nn.Module:
    """The network with the weights of a checkpoint; ``source`` names it in errors."""
    model = registry.build_model(config.model.model_copy(update={"weights": None}))
    put_weights(model, payload, source, ema=ema)
    return model
