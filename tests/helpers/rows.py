"""Rows of evaluations, and the table of them with the paper's figures beside it."""

from helpers import small_config
from lip_resnet.config import Config
from lip_resnet.evaluation import protocol, tables
from lip_resnet.evaluation.protocol import EvalConfig

PAPER = {"lip_resnet50": {"top1": 78.186, "top5": 93.964}}


def row(model: str, top1: float, seed: int | None = 0, **changes) -> dict:
    config = small_config(model__name=model, train__seed=seed or 0, **changes)
    return {
        **{"model": model, "args": {}, "checkpoint": f"{model}-{seed}", "weights": "model", "selected_on_val": False},
        **{"top1": top1, "top5": 99.0, "loss": 0.1, "images": 355, "params": 23_864_232, "macs": 5_299_830_784},
        **{"seed": seed, "protocol": described(config, protocol.describe_training(config, [2]))},
    }


def described(config: Config, training: dict | None) -> dict:
    return protocol.describe_protocol(EvalConfig.from_recipe(config), training)


def table(rows: list[dict], baseline: str | None = None) -> tuple[dict[str, dict[str, str]], list[str]]:
    header, lines, notes = tables.build_table(rows, PAPER, baseline)
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}, notes


def replaced(layer: str, top1: float, seed: int = 0) -> dict:
    """A row of a ResNet with other downsampling."""
    changes = {"model__downsampling": {"main": layer}}
    return {**row("resnet50", top1, seed, **changes), "downsampling": {"main": layer}}


def on(name: str, model: str, top1: float, **facts) -> dict:
    """A row of a test set."""
    measured = row(model, top1)
    measured["protocol"] |= {"test_set": name}
    return {**measured, "dataset": {"name": name, "whole": True, "names": name, "content": None}, **facts}
