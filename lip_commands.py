"""Entry points of the commands; not in the package, whose import loads PyTorch, so that --help answers at once."""

import argparse
import sys


def train_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Of train.py."""
    parser = kind(
        description="Train a recipe: torchrun --nproc_per_node=8 train.py --config configs/imagenet/NAME.yaml "
        "data.root=DIR. Every key of the recipe can be overridden as section.key=value."
    )
    parser.add_argument("--config", required=True, help="the recipe, a YAML file")
    parser.add_argument("--output", help="the run folder (default: runs/<folder of the recipe>/<its name>)")
    parser.add_argument("--resume", default="none", metavar="auto|none|PATH", help="continue a run (default: none)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def train() -> None:
    """train.py."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        train_parser().print_help()
        return
    from lip_resnet import cli
    from lip_resnet.commands import train as command

    cli.launch(lambda: command.main(train_parser(cli.ArgumentParser).parse_intermixed_args()))
