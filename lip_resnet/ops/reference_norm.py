"""Instance norm and a following activation in PyTorch's own calls, for channels-last on CPUs without a compiler.

The instance norm of one image is a batch norm of a batch of one, and PyTorch's batch norm is fast in channels-last; the
gradient of its group norm takes seven times as long (torch 2.14). One image at a time also stays in the cache.
"""

import torch
from torch import Tensor

_EVERYTHING = [True, True, True]


def instance_norm(tensors: list[Tensor | None], activation: int, eps: float, coefficient: float) -> None:
    """As ``cpu.instance_norm``: z, weight, bias, dout, out (or dz), mean, rstd, sum_g, sum_gz; no dout: forward."""
    z, weight, bias, dout, out, mean, rstd, sum_g, sum_gz = tensors
    for i in range(len(z)):
        image = slice(i, i + 1)
        if dout is None:
            results = (out[image], mean[i], rstd[i])
            torch.native_batch_norm(z[image], weight, bias, None, None, True, 0.0, eps, out=results)
            if activation == 1:
                out[image].relu_()
            elif activation == 2:
                out[image].sigmoid_().mul_(coefficient)
            continue
        g, gain = dout[image], weight
        if activation:  # recompute the norm's result
            t = torch.native_batch_norm(z[image], weight, bias, mean[i], rstd[i] ** -2, False, 0.0, 0.0)[0]
            if activation == 1:
                g = torch.ops.aten.threshold_backward(g, t, 0)
            else:  # everything below is linear in g, so the coefficient is applied to the small tensors instead
                g, gain = torch.ops.aten.sigmoid_backward(g, t.sigmoid_()), weight * coefficient
        statistics = (None, None, mean[i], rstd[i])
        out[image], sum_gz[i], sum_g[i] = torch.ops.aten.native_batch_norm_backward(
            g, z[image], gain, *statistics, True, eps, _EVERYTHING
        )
    if dout is not None and activation == 2:
        sum_g.mul_(coefficient)
        sum_gz.mul_(coefficient)
