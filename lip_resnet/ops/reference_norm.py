"""Instance norm and the activation after it in PyTorch's own calls: ``norm_act`` for every device and for exported
graphs; ``norm_forward`` and ``norm_backward`` for channels-last tensors on CPUs without a C++ compiler.

The instance norm of one image is a batch norm of a batch of one, and PyTorch's batch norm is fast in channels-last; the
gradient of its group norm takes seven times as long (torch 2.14). One image at a time also stays in the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, RELU, GATE = 0, 1, 2  # activations, as in norm.cpp and triton_norm.py

_ALL_GRADIENTS = [True, True, True]


def norm_act(z: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: int, coefficient: float) -> Tensor:
    """As ``norm.norm_act``; differentiable any number of times."""
    # A group norm with C groups keeps channels-last on the CPU; F.instance_norm does not.
    t = F.group_norm(z, z.shape[1], weight, bias, eps)
    if activation == GATE:
        return torch.sigmoid(t) * coefficient
    return F.relu(t) if activation == RELU else t


def norm_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: int,
    eps: float,
    coefficient: float,
) -> None:
    """Fill ``out`` (B, C, H, W), ``mean`` and ``rstd`` (B, C)."""
    for i in range(len(z)):
        image = slice(i, i + 1)
        results = (out[image], mean[i], rstd[i])
        torch.native_batch_norm(z[image], weight, bias, None, None, True, 0.0, eps, out=results)
        if activation == RELU:
            out[image].relu_()
        elif activation == GATE:
            out[image].sigmoid_().mul_(coefficient)


def norm_backward(
    dout: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dz: Tensor,
    sum_g: Tensor,
    sum_gz: Tensor,
    activation: int,
    coefficient: float,
) -> None:
    """Fill ``dz`` (B, C, H, W), and ``sum_g`` and ``sum_gz`` (B, C): the parts of dbias and dweight of every image."""
    for i in range(len(z)):
        image = slice(i, i + 1)
        g, gain = dout[image], weight
        if activation != NONE:  # recompute the norm's result
            t = torch.native_batch_norm(z[image], weight, bias, mean[i], rstd[i] ** -2, False, 0.0, 0.0)[0]
            if activation == RELU:
                g = torch.ops.aten.threshold_backward(g, t, 0)
            else:  # everything below is linear in g, so the coefficient is applied to the small tensors instead
                g, gain = torch.ops.aten.sigmoid_backward(g, t.sigmoid_()), weight * coefficient
        # eps is in rstd already
        dz[image], sum_gz[i], sum_g[i] = torch.ops.aten.native_batch_norm_backward(
            g, z[image], gain, None, None, mean[i], rstd[i], True, 0.0, _ALL_GRADIENTS
        )
    if activation == GATE:
        sum_g.mul_(coefficient)
        sum_gz.mul_(coefficient)
