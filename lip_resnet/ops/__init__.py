"""The operators: ``lip2d``, and the instance norm with its activation that logit modules use, with their gradients.

``lip.py`` and ``norm.py`` are what others call. Each operator has fused kernels, C++ for CPUs (``cpu/``) and Triton for
GPUs (``triton_*.py``), and a form in PyTorch's own calls (``reference*.py``); ``dispatch.py`` says which one runs.
This wing imports torch alone.
"""

from lip_resnet.ops.lip import lip2d
from lip_resnet.ops.norm import norm_act

__all__ = ["lip2d", "norm_act"]
