"""Verify a released weight file:  python scripts/verify_checkpoint.py lip_resnet-50.pth --data DIR [--export DIR]

Identifies the network from the file's keys and shapes, loads it strictly, evaluates it by the reference's protocol and
compares the counts with the published ones: identical, within 25 images (exit code 0), or differs (1). torchrun makes
it faster and gives the same counts.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import PIL
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_commands import DATA_HELP, DATA_NAME_HELP
from lip_resnet import checkpoint, cli, distributed
from lip_resnet.config import Config, InputError
from lip_resnet.environment import describe_environment
from lip_resnet.evaluation import cost
from lip_resnet.evaluation.evaluate import evaluate_reference
from lip_resnet.evaluation.location import KINDS
from lip_resnet.evaluation.paper import PAPER_FILE, compare_counts, load_paper
from lip_resnet.evaluation.protocol import reference_protocol
from lip_resnet.files import sha256
from lip_resnet.models.identify import Network, check_finite, identify
from lip_resnet.models.weights import choose_weights, put_weights

FIGURES = PAPER_FILE


def say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a .pth, .pt or .safetensors file: released or ours; or a run folder")
    parser.add_argument("--data", help=f"ImageNet, or the network's other set: {DATA_HELP}")
    parser.add_argument("--data-name", choices=KINDS, metavar="NAME", help=DATA_NAME_HELP)
    parser.add_argument("--export", help="a new directory for model.safetensors and timm's config.json")
    parser.add_argument("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    parser.add_argument("--workers", type=int, default=8, help="loader processes of each process")
    options = parser.parse_args()
    if not verify(options):
        sys.exit(1)


def verify(options: Any, expected: str | None = None) -> bool:
    """Identify, load, evaluate and export a file, and print the results; False where counts differ.

    Args:
        options: of this command.
        expected: the model that the file must be of; None: any.

    Raises:
        InputError: the file is missing, damaged, or of another network.
    """
    path = checkpoint.resolve(options.file)
    export = Path(options.export).expanduser() if options.export else None
    if export is not None:
        distributed.on_main(lambda: check_new(export))

    payload = checkpoint.load(path)
    say(f"file      {path}")
    say(f"sha256    {sha256(path)}")
    say(f"holds     {describe(payload)}")
    trained = checkpoint.read_recipe(payload, str(path))
    kind = choose_weights(payload, str(path), options.weights, trained)
    ema = kind == "ema"
    network = identify(payload, str(path), ema)
    if expected not in (None, network.model):
        raise InputError(f"{path}: holds {network}, not {expected}: another file has been given this name")
    changes = describe_changes(trained)
    say(f"network   {network}{changes}, {network.num_classes} classes")
    model = network.build(trained)
    put_weights(model, payload, str(path), ema=ema)
    check_finite(model, str(path))
    averaged = ", averaged (EMA)" if ema else ""
    count = cost.count_parameters(model)
    say(f"mapped    {len(model.state_dict())} tensors, {count:,} parameters, all finite{averaged}")

    accepted = options.data is None or check_accuracy(model, network, payload, trained, options)
    if options.data is None:
        say("accuracy  NOT checked: give --data DIR; everything else agrees")
    if export is not None and accepted:
        description = describe_export(payload, network, kind)
        distributed.on_main(lambda: write(export, model, network, description, for_timm=not changes))
        by_timm = f"timm.create_model('local-dir:{export}', pretrained=True) loads it"
        by_us = f"timm cannot build this network; eval.py and load_weights read {export}/model.safetensors"
        say(f"exported  {export}: {by_us if changes else by_timm}")
    return accepted


def check_accuracy(
    model: nn.Module, network: Network, payload: dict[str, Any], trained: Config | None, options: Any
) -> bool:
    """Evaluate, compare with the published counts and print both; False where they differ."""
    paper = load_paper(FIGURES)
    of_paper = network.num_classes == paper.classes and not describe_changes(trained)
    row = paper.find(network.model, network.args) if of_paper else None
    published = row.correct if row else None
    images = paper.images if published else None
    config = reference_protocol(network.model, network.num_classes, trained)
    result = evaluate_reference(model, config, options.data, options.workers, images, options.data_name, payload)
    say(f"* Acc@1 {result['top1']:.3f} Acc@5 {result['top5']:.3f}")
    say(f"correct   top-1 {result['correct1']:,}, top-5 {result['correct5']:,} of {result['images']:,}")
    if published is None:
        say("verdict   none: no counts are published for this network")
        return True
    verdict = compare_counts(result, published)
    say(f"published top-1 {published.top1:,}, top-5 {published.top5:,} ({paper.sources[published.source]})")
    top1, top5 = result["correct1"] - published.top1, result["correct5"] - published.top5
    say(f"diff      top-1 {top1:+d}, top-5 {top5:+d} images")
    environment = describe_environment() | {"pillow": PIL.__version__}
    names = ("python", "torch", "torchvision", "timm", "pillow", "cuda", "hardware")
    say("versions  " + ", ".join(f"{name} {environment[name]}" for name in names if environment[name]))
    say(f"verdict   {verdict}")
    return verdict != "differs"


def describe_changes(trained: Config | None) -> str:
    """The keys of a recipe that change a network in a way that timm's keywords do not, for a line; or empty."""
    model = trained.model if trained else None
    changes = {key: getattr(model, key, None) for key in ("downsampling", "circular_padding")}
    return "".join(f", {key} {value}" for key, value in changes.items() if value)


def describe(payload: dict[str, Any]) -> str:
    """The kind of file, and the numbers and strings that it holds beside the weights."""
    if all(isinstance(value, Tensor) for value in payload.values()):
        return "a bare state dict"
    facts = []
    for key, value in payload.items():
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, str | int | float):
            facts.append(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}")
    return "a training checkpoint: " + (", ".join(facts) or "nothing but weights")


def check_new(folder: Path) -> None:
    """Check that an export overwrites nothing: ``folder`` does not exist or is empty.

    Raises:
        InputError: it is neither, or its parent is not a directory.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--export {folder} exists; choose another")
    if not folder.resolve().parent.is_dir():
        raise InputError(f"--export {folder}: {folder.parent} is not a directory")


def describe_export(payload: dict[str, Any], network: Network, kind: str) -> dict[str, Any]:
    """What an exported file holds beside its weights: the recipe, or without one the network; and their provenance.

    Args:
        kind: which weights it holds, "model" or "ema".
    """
    keys = ("config", "class_names", "step", "processes", "datasets", "initial_weights")
    description = {key: payload[key] for key in keys if key in payload} if "format" in payload else {}
    if "config" not in description:
        architecture = {"name": network.model, "args": network.args, "num_classes": network.num_classes}
        description["architecture"] = architecture
    return {**description, "weights": kind}


def write(
    folder: Path, model: nn.Module, network: Network, description: dict[str, Any], *, for_timm: bool = True
) -> None:
    """Write model.safetensors and config.json as timm's push_to_hf_hub does; all of the folder or nothing appears.

    Args:
        description: ``describe_export``'s.
        for_timm: write config.json, from which timm builds the network.
    """
    folder = folder.resolve()
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            # As timm's save_for_hf, which in old versions needs an old huggingface_hub.
            (temporary / "model.safetensors").write_bytes(checkpoint.to_safetensors(model.state_dict(), description))
            if for_timm:
                save_config_for_hf(model, temporary / "config.json", model_args=network.args)
            temporary.chmod(0o755)  # mkdtemp's mode is 0700
            os.rename(temporary, folder)  # replaces an empty directory, and nothing else
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(f"--export {folder}: cannot write: {error.strerror or error}") from error


if __name__ == "__main__":
    cli.launch(main)
