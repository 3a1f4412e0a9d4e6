"""Evaluate weights exactly:  python eval.py --checkpoint RUN_OR_FILE --data DIR [--dataset imagenet-v2 imagenet-a ...]

Under torchrun it is faster and counts the same. A run folder and our own checkpoints know their
model and protocol; for bare files add --model NAME or --config FILE.
"""

import json
from typing import Any

import torch

from lip_resnet import checkpoint, distributed, rows
from lip_resnet.config import Config, InputError
from lip_resnet.data import EvalLoader, testsets
from lip_resnet.data.location import DATA_HELP, DATA_NAME_HELP, KINDS
from lip_resnet.evaluate import evaluate_set, print_result
from lip_resnet.models import registry
from lip_resnet.models.weights import extract_weights, put_weights
from lip_resnet.protocol import EvalConfig, adapt, timm_protocol
from lip_resnet.recipe import load_config, parse_config


def parse() -> Any:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", help="a run folder, or a .pt, .pth or .safetensors file")
    add("--pretrained", action="store_true", help="timm's own weights of --model, downloaded")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", help="the recipe of the checkpoint")
    which.add_argument("--model", help="the timm name of the checkpoint's model; its protocol is timm's for that model")
    add("--data", help=f"{DATA_HELP}; for a test set its folder, or what holds it by its name (default: the recipe's)")
    add("--data-name", choices=KINDS, metavar="NAME", help=DATA_NAME_HELP)
    sets = f"test sets: {', '.join(testsets.IMAGES)}, or all of them (default: the recipe's validation set)"
    add("--dataset", nargs="+", choices=(*testsets.IMAGES, "all"), metavar="NAME", help=sets)
    add("--partial", action="store_true", help="take imagenet-c without some of its folders: no mCE")
    where = "where to write the row (default for a run: RUN/eval.json, or RUN/eval-NAME.json with --dataset)"
    add("--output", help=f"{where}; for several sets a directory, for rows of those names")
    add("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    add("--size", dest="eval_size", type=int, help="side of the centre crop, pixels")
    add("--resize", dest="eval_resize", type=int, help="the side before the crop, pixels (which side: data.crop_mode)")
    add("--crop-mode", choices=("center", "squash", "border"), help="how images are resized before the crop, as timm's")
    add("--interpolation", choices=("bilinear", "bicubic"))
    add("--precision", choices=("float32", "bfloat16", "float16"))
    add("--batch-size", dest="eval_batch_size", type=int, help="images per batch of one process")
    add("--workers", type=int, help="loader processes of each process")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if bool(options.checkpoint) == options.pretrained:
        raise InputError("give --checkpoint PATH, or --pretrained with --model NAME; one of the two")
    if options.pretrained and not options.model:
        raise InputError("--pretrained needs --model NAME")
    names = testsets.choose(options.dataset, options.partial)
    outputs = [rows.row_path(options.checkpoint, options.output, name, alone=len(names) == 1) for name in names]

    payload = checkpoint.load(checkpoint.resolve(options.checkpoint)) if options.checkpoint else {}
    trained = parse_config(payload["config"], options.checkpoint) if "config" in payload else None
    ema = (options.weights or (trained.train.rules if trained else "model")) == "ema"
    recipe = choose_protocol(options, payload, trained)
    keys = ("precision", "eval_size", "eval_resize", "crop_mode", "interpolation", "eval_batch_size", "workers")
    changes, alone = {key: getattr(options, key) for key in keys}, len(names) == 1
    plans = [adapt(recipe, name, options.data, alone=alone, kind=options.data_name, **changes) for name in names]
    configs = [config for config, _ in plans]
    sets = [
        testsets.open_set(name, config.data, split, config.model.num_classes, options.partial)
        for name, (config, split) in zip(names, plans, strict=True)
    ]
    # First: its workers are forked before other threads start.
    loader = EvalLoader(testsets.Joined(sets), configs[0].data)
    model = build(recipe, options, payload, ema)

    # TF32 rounds to 10 bits: counts would not be the float32 counts.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for config in configs:
        registry.check_size(model, config.data.eval_size)
    model.to(distributed.device(), memory_format=torch.channels_last if recipe.channels_last else None)
    start = 0
    for data, config, output in zip(sets, configs, outputs, strict=True):
        result = evaluate_set(model, data, loader, config, start)
        start += len(data.source)
        if distributed.is_main():
            print_result(data, result, with_name=bool(options.dataset))
        if distributed.is_main() and output is not None:
            source = options.checkpoint or f"timm:{recipe.model.name}"
            row = rows.build_row(model, source, ema, data, config, result, payload, trained)
            text = json.dumps(row, indent=2) + "\n"
            checkpoint.write_atomically(output, lambda file, text=text: file.write(text.encode()))


def choose_protocol(options: Any, payload: dict[str, Any], trained: Config | None) -> EvalConfig:
    """The evaluation of ``--config``, of timm for ``--model``, or of the run; with as many classes as the weights."""
    if options.config:
        config = EvalConfig.from_recipe(load_config(options.config))
    elif options.model:
        config = timm_protocol(options.model, registry.pretrained_cfg(options.model))
        if not options.data:
            raise InputError(f"--data is missing: the directory that holds {(options.dataset or ['val/'])[0]}")
    elif trained is not None:
        return EvalConfig.from_recipe(trained)
    else:
        raise InputError(f"{options.checkpoint} does not name its model; add --model NAME or --config FILE")
    head = registry.pretrained_cfg(config.model.name).get("classifier")
    weight = extract_weights(payload, options.checkpoint).get(f"{head}.weight") if payload else None
    if weight is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"num_classes": len(weight)})})


def build(config: EvalConfig, options: Any, payload: dict[str, Any], ema: bool) -> torch.nn.Module:
    """The network with the weights to evaluate."""
    if options.pretrained:
        return registry.create_model(config.model.name, pretrained=True)
    model = registry.build_model(config.model.model_copy(update={"weights": None}))
    put_weights(model, payload, options.checkpoint, ema=ema)
    return model


if __name__ == "__main__":
    distributed.launch(main)
