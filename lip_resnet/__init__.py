"""LIP, local importance-based pooling: the operator, its networks, and their honest measurement.

Importing the package registers ``lip_resnet50`` and ``lip_resnet101`` with timm.
"""

from lip_resnet import resnet
from lip_resnet.lip import lip2d

__all__ = ["lip2d", "resnet"]
