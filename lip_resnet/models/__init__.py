"""Networks: LIP-ResNet and LIP-DenseNet, registered with timm, and the loading of weights.

``registry`` builds a network from its name (``build_model``: the network of a recipe), ``weights`` loads a checkpoint
of any origin into a network (``load_weights``), ``identify`` tells which network a checkpoint is of. Built on
``layers``; independent of data and training.
"""

from lip_resnet.models import densenet, resnet  # noqa: F401 (registers the networks with timm)
from lip_resnet.models.registry import build_model, create_model
from lip_resnet.models.weights import load_weights

__all__ = ["build_model", "create_model", "load_weights"]
