"""The window of a downsampling layer: its output size, and its positions one offset at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Window(NamedTuple):
    """A layer's window, in positions."""

    kernel_size: int
    stride: int
    padding: int

    def out(self, size: int) -> int:
        """Output size of an input of ``size`` positions."""
        return (size + 2 * self.padding - self.kernel_size) // self.stride + 1


class WindowLayer(nn.Module):
    """Keeps the window of a layer."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window


def window_slices(x: Tensor, window: Window, mode: str) -> Iterator[Tensor]:
    """The kernel_size^2 views (B, C, h, w) of padded x that hold one position of every window, row by row.

    Args:
        mode: of ``torch.nn.functional.pad``. Reflection of a map that is no larger than the padding is replication.
    """
    kernel_size, stride, padding = window
    h, w = map(window.out, x.shape[-2:])
    if padding:
        mode = "replicate" if mode == "reflect" and padding >= min(x.shape[-2:]) else mode
        x = F.pad(x, [padding] * 4, mode=mode)
    for i in range(kernel_size):
        for j in range(kernel_size):
            yield x[..., i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride]


def sampling_grids(x: Tensor, window: Window, mode: str) -> list[Tensor]:
    """The stride^2 sampling grids (B, C, h, w) of x, row by row: each has one position of every stride x stride block.

    Args:
        mode: of ``torch.nn.functional.pad``, for blocks that reach beyond the map.
    """
    stride = window.stride
    h, w = map(window.out, x.shape[-2:])
    # A constant padding, more than most sizes need: it exports with dynamic sizes.
    x = F.pad(x, (0, stride - 1, 0, stride - 1), mode=mode)
    return [x[..., i::stride, j::stride][..., :h, :w] for i in range(stride) for j in range(stride)]
