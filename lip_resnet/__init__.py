"""LIP, local importance-based pooling: the operator, downsampling layers, networks, and their training and evaluation.

Importing the package registers ``lip_resnet18`` to ``152`` and ``lip_densenet121`` to ``201`` with timm.
"""

from typing import TYPE_CHECKING, Any

from lip_resnet.layers import DOWNSAMPLING, aa_layer, make_layer, replace_downsampling, use_circular_padding
from lip_resnet.models import load_weights
from lip_resnet.ops import lip2d

if TYPE_CHECKING:
    from lip_resnet.commands.loaded_run import load_run

__version__ = "0.1.0"

LAYERS = DOWNSAMPLING
"""An earlier name of ``DOWNSAMPLING``."""

__all__ = [
    "DOWNSAMPLING",
    "LAYERS",
    "aa_layer",
    "lip2d",
    "load_run",
    "load_weights",
    "make_layer",
    "replace_downsampling",
    "use_circular_padding",
]


def __getattr__(name: str) -> Any:
    """``load_run``, imported when it is first used: it needs the parts of the package that read data."""
    if name == "load_run":
        from lip_resnet.commands.loaded_run import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
