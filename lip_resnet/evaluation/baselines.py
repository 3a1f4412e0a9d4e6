"""Whether a baseline is healthy: the published top-1 of the shipped recipes (baselines.yaml) beside that of a run."""

import functools
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter

from lip_resnet.config import Config, Section
from lip_resnet.evaluation.protocol import EvalConfig, describe_protocol, describe_training
from lip_resnet.recipe import load_config, shipped_recipes

FILE = Path(__file__).with_name("baselines.yaml")

_WITHOUT_EFFECT = {
    *("train.precision", "train.compile", "train.compile_mode", "train.channels_last", "train.gradient_compression"),
    *("data.name", "data.images", "data.decode", "data.classes", "data.label_column", "images_per_batch_norm"),
}
"""Keys of ``describe_training`` that move the accuracy of a whole run by less than another seed does, or that say
where the images are."""


class Figure(Section):
    """A top-1, percent, and where it is from."""

    top1: float
    kind: Literal["published", "measured", "predicted"]
    source: str


class Baseline(Section):
    """What is known of the accuracy of one recipe's network."""

    images: int
    """In the validation set."""
    margin: float
    """Percentage points, on both sides."""
    figures: list[Figure]

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest top-1 of a healthy run, percent."""
        values = [figure.top1 for figure in self.figures]
        return min(values) - self.margin, max(values) + self.margin


@functools.cache
def load_baselines() -> dict[str, Baseline]:
    """Name of a shipped recipe, such as ``imagenet/resnet50_step90`` -> what its network reaches."""
    tree = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return TypeAdapter(dict[str, Baseline]).validate_python(tree)


def row_of(config: Config, images: int, top1: float) -> dict[str, Any]:
    """What ``judge`` reads of a row, for a run at its end: its recipe, and its own validation."""
    protocol = describe_protocol(EvalConfig.from_recipe(config), describe_training(config, [1]))
    network = {"args": config.model.args, "downsampling": config.model.downsampling}
    network |= {"circular_padding": config.model.circular_padding, "weights": config.train.rules}
    return {"model": config.model.name, **network, "images": images, "top1": top1, "protocol": protocol}


def judge(row: dict[str, Any]) -> str | None:
    """One line that says where the top-1 of a baseline lies; None of all that is no shipped recipe's baseline.

    Args:
        row: a row of eval.py, or ``row_of`` a run. Precision, decoder, kind of source and number of processes may be
            others than the recipe's; weights selected on the validation set are not judged.
    """
    if row.get("selected_on_val") or not row["protocol"].get("training"):
        return None
    shipped = shipped_recipes()
    names = [name for name, known in load_baselines().items() if known.images == row["images"] and name in shipped]
    name = next((name for name in names if _recipe_key(name) == _key(row)), None)
    if name is None:
        return None
    baseline = load_baselines()[name]
    low, high = baseline.range
    place = "below" if row["top1"] < low else "above" if row["top1"] > high else "within"
    kinds = " and ".join(dict.fromkeys(figure.kind for figure in baseline.figures))
    sources = "; ".join(f"{figure.top1:g} {figure.source}" for figure in baseline.figures)
    line = f"baseline {name}: top-1 {row['top1']:.2f} lies {place} {low:.2f} to {high:.2f}, the {kinds} figures "
    line += f"+- {baseline.margin:g} ({sources})"
    return line if place == "within" else f"{line}; look for the reason first: docs/recipes.md"


@functools.cache
def _recipe_key(name: str) -> tuple[Any, ...]:
    return _key(row_of(load_config(shipped_recipes()[name]), load_baselines()[name].images, 0.0))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal to a recipe's: network, kind of weights, classes, evaluation and training."""
    protocol = row["protocol"]
    evaluation = [protocol.get(key) for key in ("classes", "eval_size", "eval_resize", "crop_mode", "interpolation")]
    training = {key: value for key, value in protocol["training"].items() if key not in _WITHOUT_EFFECT}
    network = row["model"], row.get("args") or {}, row.get("downsampling") or {}, bool(row.get("circular_padding"))
    return (*network, row.get("weights"), protocol.get("test_set"), evaluation, training)
