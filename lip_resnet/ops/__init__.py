"""The operators: ``lip2d``, and the instance norm with its activation that logit modules use, with their gradients.

Each has a reference form in PyTorch's own calls and fused kernels: C++ for CPUs (``cpu/``), Triton for GPUs.
``dispatch`` decides which one runs. This wing imports torch alone.
"""

from lip_resnet.ops.lip import lip2d
from lip_resnet.ops.norm import norm_act

__all__ = ["lip2d", "norm_act"]
