"""Entry points of the commands. Outside the package, whose import loads PyTorch, so that --help answers at once."""

import argparse
import sys
from collections.abc import Sequence

TEST_SETS = (
    *("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-real", "imagenet-c"),
    "all",
)
DATA_HELP = (
    "the directory that holds val/, or val/ itself: class folders or tar shards; shards also at a URL, or as a quoted "
    "pattern, DIR/imagenet-val-{00..63}.tar; or a folder of Parquet files; for a recipe with another data.name, its "
    "data.root"
)
DATA_NAME_HELP = "the kind of --data, as a recipe's data.name (default: the recipe's, or recognised by the files)"


def train_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The arguments of train.py."""
    parser = kind(
        description="Train a recipe: torchrun --nproc_per_node=8 train.py --config configs/imagenet/NAME.yaml "
        "data.root=DIR. Every key of the recipe can be overridden as section.key=value."
    )
    parser.add_argument("--config", required=True, help="the recipe: a YAML file, or a shipped one by name")
    parser.add_argument("--output", help="the run folder (default: runs/<folder of the recipe>/<its name>)")
    parser.add_argument("--resume", default="none", metavar="auto|none|PATH", help="continue a run (default: none)")
    dry_run = "build everything, take three steps, print speed, memory and hours of the recipe; write nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def train() -> None:
    """The command train.py."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        train_parser().print_help()
        return
    from lip_resnet import cli
    from lip_resnet.commands import train as command

    cli.launch(lambda: command.main(train_parser(cli.ArgumentParser).parse_intermixed_args()))


def eval_parser(
    kind: type[argparse.ArgumentParser] = argparse.ArgumentParser, data_names: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """The arguments of eval.py; ``data_names`` are the choices of --data-name."""
    parser = kind(
        description="Evaluate weights exactly: eval.py --checkpoint RUN_OR_FILE --data DIR. A run folder knows its "
        "model and protocol; for a bare file add --model NAME or --config FILE. torchrun makes it faster and gives the "
        "same counts."
    )
    add = parser.add_argument
    add("--checkpoint", help="a run folder, or a .pt, .pth or .safetensors file")
    add("--pretrained", action="store_true", help="timm's own weights of --model, downloaded")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", help="the recipe of the checkpoint, as for train.py")
    which.add_argument("--model", help="the timm name of the checkpoint's model; its protocol is timm's for that model")
    add(
        "--data", help=f"{DATA_HELP}; for a test set its folder, or the directory that holds it (default: the recipe's)"
    )
    add("--data-name", choices=data_names, metavar="NAME", help=DATA_NAME_HELP)
    sets = f"test sets: {', '.join(TEST_SETS[:-1])}, or all of them (default: the recipe's validation set)"
    add("--dataset", nargs="+", choices=TEST_SETS, metavar="NAME", help=sets)
    add("--partial", action="store_true", help="accept imagenet-c with missing folders: no mCE")
    where = "where to write the row (default for a run: RUN/eval.json, or RUN/eval-NAME.json with --dataset)"
    add("--output", help=f"{where}; for several sets a directory, for rows of those names")
    predictions = (
        "write the prediction of every image, with its loss and margin, as .csv; of a detector as .json in COCO's form"
    )
    add("--predictions", metavar="FILE", help=predictions)
    add("--matches", metavar="FILE.npz", help="of a detector: write its matches, for scripts/compare_detections.py")
    add("--intervals", action="store_true", help="of a detector: 95%% bootstrap intervals of AP and APs over images")
    add("--weights", choices=("model", "ema"), help="default: what the recipe's train.rules says")
    size = "side of the centre crop, pixels; alone it scales --resize too; for a detector the images' shorter side"
    add("--size", dest="eval_size", type=int, help=size)
    add(
        "--resize",
        dest="eval_resize",
        type=int,
        help="side before the crop, pixels (which side: --crop-mode)",
    )
    add("--crop-mode", choices=("center", "squash", "border"), help="how images are resized before the crop, as timm's")
    add("--interpolation", choices=("bilinear", "bicubic"))
    add("--precision", choices=("float32", "bfloat16", "float16"))
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: CUDA, else the CPU")
    add("--batch-size", dest="eval_batch_size", type=int, help="images per batch and process")
    add("--workers", type=int, help="loader worker processes per process")
    return parser


def evaluate() -> None:
    """The command eval.py."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        eval_parser().print_help()
        return
    from lip_resnet import cli
    from lip_resnet.commands import eval as command
    from lip_resnet.evaluation.location import KINDS

    cli.launch(lambda: command.main(eval_parser(cli.ArgumentParser, KINDS).parse_args()))
