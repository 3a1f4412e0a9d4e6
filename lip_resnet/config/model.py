"""The ``model`` section of a recipe."""

from pydantic import Field, JsonValue

from lip_resnet.config.fields import Neutral, Positive, Section, Trains


class ModelConfig(Section):
    """The network: the only section in which a LIP recipe and its baseline differ."""

    name: Trains[str]
    """A name registered with timm: lip_resnet50, lip_resnet101, or any of timm's own."""
    num_classes: Trains[Positive] = 1000
    """Outputs of the classifier; the data must have as many classes."""
    args: Trains[dict[str, JsonValue]] = Field(default_factory=dict)
    """Further keyword arguments of the model, such as bottleneck_width: 64."""
    downsampling: Trains[dict[str, str]] = Field(default_factory=dict)
    """Downsampling layers to replace, in any convolutional network: placement (stem, main, shortcut, transition, image)
    -> layer, such as {stem: blur, main: blur, shortcut: average}."""
    weights: Neutral[str | None] = None
    """A checkpoint file or run folder to start from. Runs are compared by what it holds, not by its path."""
    new_head: Trains[bool] = False
    """Do not load the classifier from `weights`; initialise it (fine-tuning)."""
    convert: Neutral[bool] = False
    """Accept `weights` of a run whose network computes otherwise with the same weights (other layers without
    parameters), or whose normalisation is another."""
