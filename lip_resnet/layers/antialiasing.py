"""Layers that low-pass a map before they sample it, or choose the grid by content, so that shifts change less.

Each maps (B, C, H, W) to (B, C, h, w) with the output size of its ``Window``.
"""

import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from timm.models import register_notrace_module
from torch import Tensor, nn

from lip_resnet.layers.window import Window, WindowLayer, sampling_grids, window_slices
from lip_resnet.ops.dispatch import layout_of


class Blur(BlurPool2d):
    """timm's ``BlurPool2d`` (binomial filter, reflection padding) with the window's own kernel size and padding."""

    def __init__(self, channels: int, window: Window, device=None, dtype=None) -> None:
        super().__init__(channels, window.kernel_size, window.stride, device=device, dtype=dtype)
        self.padding = [window.padding] * 4


class MaxBlur(nn.Module):
    """blur(max of every k x k positions at stride 1): Zhang's max pooling, whose maximum is taken before it samples.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019, section 3.
    """

    def __init__(self, channels: int, window: Window, device=None, dtype=None) -> None:
        super().__init__()
        self.kernel_size = window.kernel_size
        self.blur = Blur(channels, window, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        largest = F.max_pool2d(x, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return self.blur(largest[..., :h, :w])


@register_notrace_module
class FrequencyCrop(WindowLayer):
    """IFFT of the lowest frequencies of FFT(x): an ideal low-pass filter (FLC pooling); the mean stays.

    Float32 inside. Source: Grabinski et al., "FrequencyLowCut Pooling", ECCV 2022, section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        top, left = x.shape[-2] // 2 - h // 2, x.shape[-1] // 2 - w // 2
        spectrum = torch.fft.fftshift(torch.fft.fft2(x.float(), norm="forward"), dim=(-2, -1))
        spectrum = spectrum[..., top : top + h, left : left + w]
        y = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward").real
        return y.to(x.dtype).contiguous(memory_format=layout_of(x))


@register_notrace_module
class AdaptivePolyphase(WindowLayer):
    """The one of the stride x stride sampling grids on which x has the largest l2 norm, for each image (APS).

    With circular convolutions and sizes that divide by the stride, a circular shift of x shifts the result and changes
    nothing else. Paths that are added must choose the same grid: give the layers of both paths one ``reference``.
    Source: Chaman, Dokmanic, "Truly Shift-Invariant Convolutional Neural Networks", CVPR 2021, section 3.
    """

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """Sample ``x``; the grid is chosen by ``reference`` (B, any, H, W), by default x itself."""
        grids = torch.stack(sampling_grids(x, self.window, "circular"), dim=1)  # (B, stride^2, C, h, w)
        source = grids
        if reference is not None:
            source = torch.stack(sampling_grids(reference, self.window, "circular"), dim=1)
        norms = source.float().square().sum(dim=(2, 3, 4))  # (B, stride^2)
        choice = norms.argmax(1)
        y = grids.gather(1, choice.view(-1, 1, 1, 1, 1).expand(-1, 1, *grids.shape[2:])).squeeze(1)
        return y.contiguous(memory_format=layout_of(x))


class ContentAwareBlur(nn.Module):
    """sum over q of softmax_q(BN(conv(x)))[p, q] x[q]: a low-pass filter of its own for every window, in groups (PASA).

    Its relative is LIP: there a position has one importance for all its windows, here every window weighs it anew, and
    the channels of a group share the weights. Filters are computed only where they are used, at the layer's stride.
    Source: Zou et al., "Delving Deeper into Anti-aliasing in ConvNets", BMVC 2020, section 3.

    Args:
        groups: of channels with one filter each; fewer if the channels do not divide by 8.
    """

    def __init__(self, channels: int, window: Window, groups: int = 8, device=None, dtype=None) -> None:
        super().__init__()
        self.window = window
        self.groups = next(count for count in range(min(groups, channels), 0, -1) if channels % count == 0)
        filters = self.groups * window.kernel_size**2
        self.conv = nn.Conv2d(
            channels, filters, window.kernel_size, window.stride, window.padding, bias=False, device=device, dtype=dtype
        )
        self.bn = nn.BatchNorm2d(filters, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.bn(self.conv(x))
        batch, _, h, w = weights.shape
        weights = weights.reshape(batch, self.groups, 1, -1, h, w).float().softmax(dim=3).to(x.dtype)
        y: Tensor | int = 0
        for number, part in enumerate(window_slices(x, self.window, "reflect")):
            y = y + weights[:, :, :, number] * part.reshape(batch, self.groups, -1, h, w)
        assert isinstance(y, Tensor)
        return y.reshape(batch, -1, h, w).contiguous(memory_format=layout_of(x))
