"""LIP, local importance-based pooling: the operator, its networks, and their honest measurement.

Importing the package registers ``lip_resnet18`` to ``152`` and ``lip_densenet121`` to ``201`` with timm.
"""

from lip_resnet import densenet, resnet
from lip_resnet.lip import lip2d
from lip_resnet.pooling import LAYERS, make_layer
from lip_resnet.replace import replace_downsampling
from lip_resnet.weights import load_weights

__all__ = ["LAYERS", "densenet", "lip2d", "load_weights", "make_layer", "replace_downsampling", "resnet"]
