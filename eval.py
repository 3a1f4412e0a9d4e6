"""Evaluate weights exactly:  python eval.py --checkpoint RUN_OR_FILE --data DIR

Under torchrun it is faster and counts the same. A run folder and our own checkpoints know their
model and protocol; for bare files add --model NAME or --config FILE.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch

from lip_resnet import checkpoint, distributed, models, replace_downsampling, results, runlog
from lip_resnet.config import Config, InputError
from lip_resnet.data import EvalLoader, build_sources, describe_source
from lip_resnet.engine import evaluate
from lip_resnet.recipe import load_config, parse_config


def parse() -> Any:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run folder, or a .pt, .pth or .safetensors file")
    parser.add_argument("--pretrained", action="store_true", help="timm's own weights of --model, downloaded")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", help="the recipe of the checkpoint")
    which.add_argument("--model", help="the timm name of the checkpoint's model; its protocol is timm's for that model")
    parser.add_argument("--data", help="the directory that holds val/, or that folder (default: the recipe's)")
    parser.add_argument("--output", help="where to write the row (default for a run folder: RUN/eval.json)")
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
    output = choose_output(options)

    payload = checkpoint.load(checkpoint.resolve(options.checkpoint)) if options.checkpoint else {}
    trained = parse_config(payload["config"], options.checkpoint) if "config" in payload else None
    config, split = with_flags(describe(options, payload, trained), options)
    ema = (options.weights or (trained.train.rules if trained else "model")) == "ema"
    source = build_sources(config.data, config.model.num_classes, (split,))[0]
    loader = EvalLoader(source, config.data)  # first: its workers are forked before other threads start
    model = build(config, options, payload, ema)

    device = distributed.device()
    # TF32 rounds to 10 bits: counts would not be the float32 counts.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    models.check_size(model, config.data.eval_size)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    result = evaluate(model, loader, config)

    if distributed.is_main():
        print(f"* Acc@1 {result['top1']:.3f} Acc@5 {result['top5']:.3f}", flush=True)
        row = {
            "model": config.model.name,
            "args": config.model.args,
            "downsampling": config.model.downsampling,
            "checkpoint": options.checkpoint or f"timm:{config.model.name}",
            "weights": "ema" if ema else "model",
            "selected_on_val": Path(options.checkpoint or "").name == "best.pt",
            **result,
            "params": models.count_parameters(model),
            "macs": models.count_macs(model, config.data.eval_size),
            "seed": trained.train.seed if trained else None,
            "step": payload.get("step"),
            "protocol": results.describe_protocol(
                config, results.describe_training(trained, payload["processes"]) if trained else None
            ),
            "dataset": describe_source(source),
            "environment": runlog.describe_environment(),
        }
        if output is not None:
            text = json.dumps(row, indent=2) + "\n"
            checkpoint.write_atomically(output, lambda file: file.write(text.encode()))


def choose_output(options: Any) -> Path | None:
    """Where the row goes; an existing file is never overwritten."""
    run = Path(options.checkpoint or "")
    path = Path(options.output) if options.output else None
    if path is None and options.checkpoint and run.is_dir():
        path = run / "eval.json"
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
        weight = checkpoint.extract_weights(payload, options.checkpoint).get(f"{head}.weight")
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


def with_flags(config: Config, options: Any) -> tuple[Config, str]:
    """The recipe with the command line's data and protocol, and the name of the folder to evaluate."""
    tree, split = config.model_dump(), "val"
    if options.data:
        root = Path(options.data).expanduser()
        if not root.is_dir():
            raise InputError(f"--data {root} is not a directory; it must hold val/, or be that folder")
        if not (root / "val").is_dir():
            root, split = root.resolve().parent, root.resolve().name
        tree["data"] |= {"name": "folder", "root": str(root)}
    elif options.model:
        raise InputError("--data is missing: the directory that holds val/")
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


def build(config: Config, options: Any, payload: dict[str, Any], ema: bool) -> torch.nn.Module:
    """The network with the weights to evaluate."""
    if options.pretrained:
        return models.create_model(config.model.name, pretrained=True)
    model = models.build_model(config.model.model_copy(update={"weights": None}), replace_downsampling)
    checkpoint.put_weights(model, payload, options.checkpoint, ema=ema)
    return model


if __name__ == "__main__":
    distributed.launch(main)
