"""Layers: LIP's logit modules, the table of downsampling layers, and their placement in any convolutional network.

``make_layer`` builds a layer by its name in ``DOWNSAMPLING``; ``replace_downsampling`` replaces a network's layers.
Built on ``ops`` and timm's layers; independent of networks and training.
"""

from lip_resnet.layers.downsampling import DOWNSAMPLING, LogitOptions, make_layer
from lip_resnet.layers.placement import PLACEMENTS, PRESETS, SITES, aa_layer, use_circular_padding
from lip_resnet.layers.pooling import LIP2d, logit_parameters
from lip_resnet.layers.replace import Replacements, replace_downsampling

__all__ = [
    "DOWNSAMPLING",
    "PLACEMENTS",
    "PRESETS",
    "SITES",
    "LIP2d",
    "LogitOptions",
    "Replacements",
    "aa_layer",
    "logit_parameters",
    "make_layer",
    "replace_downsampling",
    "use_circular_padding",
]
