"""The operator of the paper: local importance-based pooling of a feature map by a map of logits.

Letters in the shapes: B images, C channels, H x W input positions, h x w output positions.
"""

import torch
from torch import Tensor

from lip_resnet.ops import dispatch, reference


def lip2d(x: Tensor, logits: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """Pool (B, C, H, W) to (B, C, h, w): the mean of every window, weighted by the softmax of its logits.

        y[p] = sum_{q in W(p)} exp(logits[q]) * x[q]  /  sum_{q in W(p)} exp(logits[q])

    The maximum of each window's logits is subtracted first, so the result is finite for any finite logits in
    any floating dtype. Positions in the padding have no weight. Constant logits give average pooling (over the
    window's real positions), growing logits ``a * x`` converge to max pooling, ``logits = x`` is SoftPool.

    Args:
        x: features, (B, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels-last.
        logits: log-importance, same shape and device as ``x``, and the same dtype. Under autocast the dtypes may
            differ (a norm may return float32 logits for bfloat16 features).
        kernel_size, stride, padding: of the window, in positions, as in ``avg_pool2d``; ``padding`` is at most
            ``kernel_size // 2``.

    Returns:
        (B, C, h, w) with h = floor((H + 2 * padding - kernel_size) / stride) + 1, in the dtype and the memory
        format of ``x``. Sums are accumulated in float32 at least. A NaN in a window's logits, or NaN or infinity in its
        features, makes that output NaN (or infinite) and no other.

    Raises:
        ValueError: shapes or devices differ, dtypes are not floating point or differ outside autocast, or the
            window is out of range or larger than the padded input.

    Source: Gao, Wang, Wu, "LIP: Local Importance-based Pooling", ICCV 2019, section 3; ``lip2d`` in the
    reference's ``imagenet/lip_resnet.py``, which divides two average poolings and overflows in float16.
    """
    _check(x, logits, kernel_size, stride, padding)
    window = (kernel_size, stride, padding)
    if x.dtype == torch.float64:
        return reference.double(x, logits.double(), window)
    if not dispatch.must_decompose() and dispatch.supports(x, logits, kernel_size, stride):
        return torch.ops.lip_resnet.lip2d(x, logits, *window)[0]
    return reference.pool(x.float(), logits.float(), window).to(x.dtype)


def _check(x: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"lip2d: x has shape {tuple(x.shape)}; it must be (batch, channels, height, width)")
    if x.shape != logits.shape:
        raise ValueError(f"lip2d: logits have shape {tuple(logits.shape)}, x has {tuple(x.shape)}; they must be equal")
    if x.device != logits.device:
        raise ValueError(f"lip2d: logits are on {logits.device}, x is on {x.device}; they must be on one device")
    if not x.dtype.is_floating_point or not logits.dtype.is_floating_point:
        raise ValueError(f"lip2d: x is {x.dtype} and logits are {logits.dtype}; both must be floating point")
    if x.dtype != logits.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"lip2d: logits are {logits.dtype}, x is {x.dtype}; outside autocast they must be equal")
    if kernel_size < 1 or stride < 1 or not 0 <= padding <= kernel_size // 2:
        raise ValueError(
            f"lip2d: kernel_size {kernel_size}, stride {stride}, padding {padding}; kernel_size and stride must be "
            "at least 1 and padding from 0 to kernel_size // 2"
        )
    if min(x.shape[-2:]) + 2 * padding < kernel_size:
        raise ValueError(
            f"lip2d: a window of {kernel_size} does not fit {x.shape[-2]}x{x.shape[-1]} with padding {padding}"
        )
