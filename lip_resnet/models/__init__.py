"""Networks: LIP-ResNet and LIP-DenseNet, registered with timm, and the loading of weights.

``build_model`` makes the network of a recipe, LIP or any of timm's; ``load_weights`` reads a checkpoint, whoever wrote
it. Built on ``layers``; knows no data and no training.
"""

from lip_resnet.models import densenet, resnet  # noqa: F401 (registers the networks with timm)
from lip_resnet.models.registry import build_model, create_model
from lip_resnet.models.weights import load_weights

__all__ = ["build_model", "create_model", "load_weights"]
