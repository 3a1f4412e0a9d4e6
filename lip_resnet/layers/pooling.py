"""LIP and the other layers that weigh a window's positions.

Each maps features (B, C, H, W) to (B, C, h, w) with the output size of its ``Window``, and is the mean of a window
weighted by an importance F(x) > 0, given by its logarithm, the logits:

    y[p] = sum_{q in W(p)} F(x)[q] * x[q]  /  sum_{q in W(p)} F(x)[q]  =  lip2d(x, log F(x))

LIP learns the logits (``logits.py``). Source: paper, section 3.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lip_resnet.layers.logits import BottleneckHead
from lip_resnet.layers.window import Window, WindowLayer
from lip_resnet.ops.dispatch import layout_of
from lip_resnet.ops.lip import lip2d

# torch.fx cannot trace shape checks, so the operator and the modules registered below are leaves of a traced graph.
register_notrace_function(lip2d)


class LIP2d(nn.Module):
    """x (B, C, H, W) -> (B, C, h, w): ``lip2d(x, G(x))`` with a learnt logit module G.

    Args:
        logits: the logit module G. Its last convolution must be called ``conv``; it is initialised to zero, so that
            LIP starts as average pooling.
        kernel_size, stride, padding: of the window, in positions; the default padding is (kernel_size - 1) // 2.

    Raises:
        ValueError: kernel_size below stride. The windows must cover every position (paper, section 3); ``lip2d`` itself
            allows gaps, as avg_pool2d does.
    """

    def __init__(self, logits: nn.Module, kernel_size: int = 3, stride: int = 2, padding: int | None = None) -> None:
        super().__init__()
        if kernel_size < stride:
            raise ValueError(
                f"LIP: kernel_size {kernel_size} is smaller than stride {stride}, so no window sees the positions in "
                f"between; kernel_size must be at least {stride}"
            )
        self.logits = logits
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = (kernel_size - 1) // 2 if padding is None else padding
        self.recompute = False
        """Recompute the logits in the backward pass instead of saving them: less memory, a second forward of G."""
        self.zero_logits()

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        """Pool ``x``; a ``BottleneckHead`` computes the logits from ``trunk`` (B, width, H, W), others from ``x``."""
        source = x
        if isinstance(self.logits, BottleneckHead):
            assert trunk is not None, "a BottleneckHead needs the trunk's features"
            source = trunk
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._pool, x, source, use_reentrant=False)
        return self._pool(x, source)

    def _pool(self, x: Tensor, source: Tensor) -> Tensor:
        return lip2d(x, self.logits(source), self.kernel_size, self.stride, self.padding)

    def zero_logits(self) -> None:
        """Zero the logit module's last convolution: the logits become constant, so LIP becomes average pooling."""
        for parameter in self.logits.get_submodule("conv").parameters():
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def logit_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the last convolution of every logit module; empty for a network without LIP.

    They start at zero, so the instance norm after them has zero variance and multiplies their gradient by
    1 / sqrt(eps) = 316 at step 0. Gradient norms are therefore logged with and without them.
    """
    for module in model.modules():
        if isinstance(module, LIP2d):
            yield from module.logits.get_submodule("conv").parameters()


class SoftPool(WindowLayer):
    """lip2d(x, x): every position weighted by exp(x), G(x) = x."""

    def forward(self, x: Tensor) -> Tensor:
        return lip2d(x, x, *self.window)


@register_notrace_module
class Strided(WindowLayer):
    """x at the centre of every window (of two centres the upper left): importance 1 on a grid, 0 off it."""

    def __init__(self, window: Window) -> None:
        super().__init__(window)
        self.first = (window.kernel_size - 1) // 2 - window.padding

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        y = x[..., self.first :: self.window.stride, self.first :: self.window.stride][..., :h, :w]
        return y.contiguous(memory_format=layout_of(x))  # a view would keep all of x in memory


@register_notrace_module
class StridedAverage(WindowLayer):
    """The mean of stride x stride positions without overlap or padding; the kernel size sets only the output size."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        y = F.avg_pool2d(x, self.window.stride, ceil_mode=True, count_include_pad=False)[..., :h, :w]
        return y.contiguous(memory_format=layout_of(x))


class DetailPreserving(WindowLayer):
    """Importance alpha + (d^2 + eps^2)^(lambda / 2), d = x - mean of x in 3x3, eps = 1e-3.

    alpha and lambda are positive, learnt per channel and start at 1. This is the symmetric "lite" form (mean by a box
    filter), with the mean around the input position q instead of the output position p: so the layer is a weighted
    mean of its window. Source: Saeedan et al., "Detail-Preserving Pooling in Deep Networks", CVPR 2018.
    """

    def __init__(self, channels: int, window: Window, device=None, dtype=None) -> None:
        super().__init__(window)
        self.log_alpha = nn.Parameter(torch.zeros(channels, 1, 1, device=device, dtype=dtype))
        self.log_lambda = nn.Parameter(torch.zeros(channels, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return lip2d(x, self.compute_logits(x), *self.window)

    def compute_logits(self, x: Tensor) -> Tensor:
        """The logarithm of the importance, in x's shape and dtype."""
        detail = x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        reward = torch.pow(detail * detail + 1e-6, torch.exp(self.log_lambda) / 2)
        return torch.log(torch.exp(self.log_alpha) + reward).to(x.dtype)
