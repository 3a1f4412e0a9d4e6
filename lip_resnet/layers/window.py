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
