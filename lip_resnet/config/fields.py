"""What the sections of a recipe are made of: the base class, kinds of values, and the effect of a key.

A field is ``Trains[...]``, ``Evaluates[...]`` or ``Neutral[...]``, by what a change of its value affects (``Effect``).
"""

import enum
from typing import Annotated, Any, TypeGuard, TypeVar, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

T = TypeVar("T")


class Effect(enum.Enum):
    """What a change of a field's value affects; docs/recipes.md repeats these sentences."""

    WEIGHTS = "Changes the trained weights: part of the training protocol; it cannot change when a run is resumed."
    EVALUATION = "Changes how weights are evaluated, not the weights. Changed on resume, `best` is chosen afresh."
    NOTHING = "Changes neither weights nor figures; it may change when a run is resumed."


Trains = Annotated[T, Effect.WEIGHTS]
Evaluates = Annotated[T, Effect.EVALUATION]
Neutral = Annotated[T, Effect.NOTHING]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Colour = Annotated[tuple[float, float, float], Field(strict=False)]
Patterns = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(strict=False, examples=[["imagenet-train-{0000..1023}.tar"]]),
]
Range = Annotated[tuple[float, float], Field(strict=False)]


class Section(BaseModel):
    """A frozen group of keys: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field's annotation is a section; in Python 3.10 ``dict[str, int]`` is an instance of ``type`` too."""
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, Section)


def check_mean_and_std(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Check the keys ``mean`` and ``std`` of pixels.

    Raises:
        ValueError: a value is not in [0, 1], or a deviation is 0.
    """
    for key, values in (("mean", mean), ("std", std)):
        if min(values) < 0 or max(values) > 1:
            hint = "; divide values for pixels of 0 to 255 by 255" if max(values) > 1 else ""
            raise ValueError(f"{key} is {list(values)}; it is of pixels scaled to [0, 1]: each must be there{hint}")
    if min(std) == 0:
        raise ValueError(f"std is {list(std)}; each must be greater than 0")
