"""``lip2d`` in PyTorch's own calls: for devices without a kernel, float64, and exported graphs (torch.export, ONNX).

Three forms of one function: ``stable`` holds for any finite logits, ``pool`` is faster where that is exact, ``double``
rounds as the reference code does. ``window`` is (kernel_size, stride, padding) throughout; ``lip_resnet.lip2d`` checks
the arguments.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lip_resnet.compat import functorch_is_active

# Bounds of the sums of exp(logits) within which the textbook form is used: no product overflows or underflows float32.
SAFE = (1e-12, 1e12)
LOG2_E = math.log2(math.e)


def pool(x: Tensor, logits: Tensor, window: tuple[int, int, int]) -> Tensor:
    """x, logits (B, C, H, W), both float32 or float64 -> y (B, C, h, w).

    On the CPU in eager mode the textbook form, the ratio of two average poolings, where its sums lie inside ``SAFE``;
    otherwise ``stable``.
    """
    if _is_eager_on_cpu(x):
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or logits.requires_grad)
        y = _Average.apply(x, logits, *window) if needs_grad else _average(x, logits, window, False)[0]
        if y is not None:
            return y
    return stable(x, logits, window)


def stable(x: Tensor, logits: Tensor, window: tuple[int, int, int]) -> Tensor:
    """As ``pool``, stable for any finite logits: a loop over the window's offsets, each a strided view of the input."""
    kernel_size, stride, padding = window
    # The maximum cancels in the ratio, so no gradient belongs to it.
    top = F.max_pool2d(logits.detach(), kernel_size, stride, padding)
    if padding:
        x = F.pad(x, (padding,) * 4)
        logits = F.pad(logits, (padding,) * 4, value=-torch.inf)
    # (B, C, h, w, kernel_size, kernel_size), views
    x, logits = (t.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride) for t in (x, logits))
    numerator = denominator = torch.zeros_like(top)
    for i in range(kernel_size):
        for j in range(kernel_size):
            weight = torch.exp(logits[..., i, j] - top)
            numerator = numerator + weight * x[..., i, j]
            denominator = denominator + weight
    return numerator / denominator


def double(x: Tensor, logits: Tensor, window: tuple[int, int, int]) -> Tensor:
    """As ``pool``, for float64, the precision of verification: bit for bit the reference code's arithmetic.

    Training amplifies a rounding error of 1e-16 to 1e-3 within five steps (measured on LIP-ResNet-50 with random
    weights), so a trajectory can be compared with the reference's only if every operation rounds as its own does.
    Where exp could overflow, ``stable`` is used.
    """
    safe = 300.0  # exp(+-300) times any sensible feature, and its gradient, are far from float64's limits
    importance = torch.exp(logits.clamp(-safe, safe))
    textbook = F.avg_pool2d(importance * x, *window) / F.avg_pool2d(importance, *window)
    unclamped = F.max_pool2d(logits.detach().abs(), *window) <= safe
    return torch.where(unclamped, textbook, stable(x, logits, window))


def _is_eager_on_cpu(x: Tensor) -> bool:
    """Whether x's values may be read: on the CPU (no device synchronisation), in eager mode, no functorch transform."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not functorch_is_active()
    )


def _average(
    x: Tensor, logits: Tensor, window: tuple[int, int, int], keep_weight: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """y, exp(logits) and their pooled sum; y is None if some sum lies outside ``SAFE``.

    Without ``keep_weight`` the returned exp(logits) is overwritten by its product with x.
    """
    channels_last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, logits = x.contiguous(memory_format=layout), logits.contiguous(memory_format=layout)
    # exp2 takes a quarter of exp's time where PyTorch uses MKL for exp; its relative error grows by at most 6e-8 |l|
    weight = (logits * LOG2_E).exp2_()
    total = F.avg_pool2d(weight, *window)
    # flattened in memory order: reducing the channels-last tensor itself is 15 times slower
    flat = (total.permute(0, 2, 3, 1) if channels_last else total).reshape(-1)
    if flat.numel() and not (flat.amin().item() >= SAFE[0] and flat.amax().item() <= SAFE[1]):
        return None, weight, total
    product = x * weight if keep_weight else weight.mul_(x)
    return F.avg_pool2d(product, *window).div_(total), weight, total


class _Average(torch.autograd.Function):
    """The textbook form, the ratio of two average poolings, with fewer passes over memory than autograd's gradient.

    With s = pool(exp(l)) and U(g) = the gradient of pool for g: dx = exp(l) U(dy / s) and
    dl = exp(l) (x U(dy / s) - U(y dy / s)). The result is None if some s lies outside ``SAFE``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor | None:
        window = (kernel_size, stride, padding)
        y, weight, total = _average(x, logits, window, True)
        if y is None:
            return None
        ctx.save_for_backward(x, logits, weight, total, y)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        x, logits, weight, total, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # for the second derivative
            return *gradients(dy, x, logits, ctx.window), None, None, None
        dy = dy / total
        dx = _unpool(dy, weight, ctx.window)
        dl = _unpool(dy.mul_(y).neg_(), weight, ctx.window).addcmul_(x, dx).mul_(weight)
        return dx.mul_(weight), dl, None, None, None


def _unpool(dy: Tensor, like: Tensor, window: tuple[int, int, int]) -> Tensor:
    kernel_size, stride, padding = ([size] * 2 for size in window)
    return torch.ops.aten.avg_pool2d_backward(dy, like, kernel_size, stride, padding, False, True, None)


def gradients(dy: Tensor, x: Tensor, logits: Tensor, window: tuple[int, int, int]) -> tuple[Tensor | None, ...]:
    """dx and dlogits as functions of dy, x and logits that can be differentiated again; None where not required."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = stable(x.to(dtype), logits.to(dtype), window).to(x.dtype)
    return differentiable_gradients(y, (x, logits), dy)


def differentiable_gradients(y: Tensor, inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of y by its inputs, with a graph of their own; None for inputs that require none."""
    required = [t for t in inputs if t.requires_grad]
    gradients = iter(torch.autograd.grad(y, required, dy, create_graph=True))
    return tuple(next(gradients) if t.requires_grad else None for t in inputs)
