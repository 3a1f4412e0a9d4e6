"""The ``model`` section of a recipe."""

from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue

from lip_resnet.config.fields import Neutral, Positive, Section, Trains


def _check_downsampling(value: JsonValue) -> JsonValue:
    """A layer or preset; or a mapping of sites to layers or to mappings."""
    each = list(value.values()) if isinstance(value, dict) else [value]
    if not all(isinstance(item, str | dict if isinstance(value, dict) else str) for item in each):
        raise ValueError(
            f"given {value!r}; it must be a layer, a preset, or a mapping such as "
            "{stem: max_blur, main: {layer: blur, placement: after_activation}}"
        )
    return value


Downsampling = Annotated[JsonValue, AfterValidator(_check_downsampling)]


class NetworkConfig(Section):
    """A network by its name, its layers, and the weights that it starts from."""

    name: Trains[str]
    """A name registered with timm: lip_resnet50, lip_resnet101, or any of timm's own."""
    args: Trains[dict[str, JsonValue]] = Field(default_factory=dict, examples=[{"bottleneck_width": 64}])
    """Further keyword arguments of the model, such as bottleneck_width: 64."""
    downsampling: Trains[Downsampling] = Field(default_factory=dict)
    """Downsampling layers to replace, in any convolutional network: site (stem, main, shortcut, transition, image),
    site of a stage (stage3.main) or module pattern (layer3.*.conv2) -> layer, or {layer, placement, kernel_size}, such
    as {layer: blur, placement: after_activation}. Or one layer for every site, or a preset: zhang2019, flc2022,
    lip2019, softpool2021."""
    circular_padding: Trains[bool] = False
    """Every convolution pads circularly: with the layer aps, exactly invariant to circular shifts."""
    weights: Neutral[str | None] = None
    """Weights to start from: a checkpoint file, a run folder, or timm's by name, such as timm:resnet50.a1_in1k. They
    are loaded before `downsampling` is put in, whose LIP layers start as average pooling. Runs are compared by what it
    holds, not by its path."""
    convert: Neutral[bool] = False
    """Accept `weights` of a run whose network computes otherwise with the same weights (other layers without
    parameters), or whose normalisation is another; or of a run without `downsampling`, whose layers then keep their
    initial weights."""


class ModelConfig(NetworkConfig):
    """The network: the only section in which a LIP recipe and its baseline differ."""

    num_classes: Trains[Positive] = 1000
    """Outputs of the classifier; the data must have as many classes."""
    new_head: Trains[bool] = False
    """Do not load the classifier from `weights`; initialise it (fine-tuning)."""
