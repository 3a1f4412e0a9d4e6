"""``lip2d`` on GPUs, in Triton: one pass forward, one backward, no atomics, deterministic; as ``cpu/lip2d.cpp``.

Both kernels work on tiles of two dimensions, the inner one contiguous in memory:

    layout          outer                       inner                  elements from one position to the next
    channels-last   positions of all images     channels               C
    contiguous      planes (image, channel)     positions of a plane   1

The backward pass gathers. Input row i belongs to cell q = (i + padding) // stride at offset t = (i + padding) % stride,
and the windows that contain it start at cells q - d, d = 0 .. (kernel - 1 - t) // stride: all bounds but the borders
are compile-time constants. A tile of cells has the stride x stride offsets as a third dimension and visits each window
once for all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 128  # per program; a thread reads 16 bytes at once forward, 8 backward, where it has several positions
SUMS = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _grid(rows, columns, size, channels, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """This program's tile -> row, column, image or plane, innermost part of the address, and mask of its elements."""
    outer = tl.program_id(0).to(tl.int64) * OUTER + tl.arange(0, OUTER)[:, None]
    inner = tl.program_id(1) * INNER + tl.arange(0, INNER)[None, :]
    if CHANNELS_LAST:
        position, group, lane = (outer % (rows * columns)).to(tl.int32), outer // (rows * columns), inner
        mask = (outer < size) & (inner < channels)
    else:
        position, group, lane = inner, outer, 0
        mask = (outer < size) & (inner < rows * columns)
    return position // columns, position % columns, group, lane, mask


@triton.jit
def _window_top(logits, base, first_row, first_column, mask, H, W, step, KERNEL: tl.constexpr, SUM: tl.constexpr):
    """The largest logit of each window, over its real positions."""
    top = tl.full(mask.shape, -float("inf"), SUM)
    for a in tl.static_range(KERNEL):
        for b in tl.static_range(KERNEL):
            i = first_row + a
            j = first_column + b
            inside = mask & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            value = tl.load(logits + base + (i * W + j) * step, inside, other=-float("inf")).to(SUM)
            top = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def forward_kernel(
    x, logits, y, r, size, C, H, W, h, w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of output positions: y and r = 1 / sum exp(logits - top)."""
    row, column, group, lane, mask = _grid(h, w, size, C, CHANNELS_LAST, OUTER, INNER)
    step = C if CHANNELS_LAST else 1
    base = group * H * W * step + lane
    first_row = row * STRIDE - PADDING
    first_column = column * STRIDE - PADDING
    top = _window_top(logits, base, first_row, first_column, mask, H, W, step, KERNEL, SUM)
    top = tl.where(mask, top, 0.0)
    weights = tl.zeros(mask.shape, SUM)
    total = tl.zeros(mask.shape, SUM)
    for a in tl.static_range(KERNEL):
        for b in tl.static_range(KERNEL):
            i = first_row + a
            j = first_column + b
            inside = mask & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            at = base + (i * W + j) * step
            # the second read of the logits comes from the L1 cache
            weight = tl.exp(tl.load(logits + at, inside, other=-float("inf")).to(SUM) - top)
            weights += weight
            total += weight * tl.load(x + at, inside, other=0.0).to(SUM)
    out = group * h * w * step + lane + (row * w + column) * step
    inverse = 1.0 / weights
    tl.store(y + out, (total * inverse).to(y.dtype.element_ty), mask)
    tl.store(r + out, inverse, mask)


@triton.jit
def backward_kernel(
    dy, x, logits, y, r, dx, dl, size, C, H, W, h, w, cell_rows, cell_columns,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """A tile of cells: dx and dlogits of their positions. OFFSETS: stride * stride, rounded up to a power of 2."""
    row, column, group, lane, mask = _grid(cell_rows, cell_columns, size, C, CHANNELS_LAST, OUTER, INNER)
    step = C if CHANNELS_LAST else 1
    base = group * H * W * step + lane
    offset = tl.arange(0, OFFSETS)[:, None, None]
    t_row = offset // STRIDE
    t_column = offset % STRIDE
    i = row[None] * STRIDE + t_row - PADDING
    j = column[None] * STRIDE + t_column - PADDING
    inside = mask[None] & (t_row < STRIDE) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    at = base[None] + (i * W + j) * step
    logit = tl.load(logits + at, inside, other=0.0).to(SUM)
    gathered_u = tl.zeros(inside.shape, SUM)
    gathered_v = tl.zeros(inside.shape, SUM)
    for a in tl.static_range((KERNEL - 1) // STRIDE + 1):
        for b in tl.static_range((KERNEL - 1) // STRIDE + 1):
            o_row = row - a
            o_column = column - b
            exists = mask & (o_row >= 0) & (o_row < h) & (o_column >= 0) & (o_column < w)
            first_row = o_row * STRIDE - PADDING
            first_column = o_column * STRIDE - PADDING
            top = _window_top(logits, base, first_row, first_column, exists, H, W, step, KERNEL, SUM)
            out = group * h * w * step + lane + (o_row * w + o_column) * step
            u = tl.load(r + out, exists, other=0.0) * tl.load(dy + out, exists, other=0.0).to(SUM)
            v = u * tl.load(y + out, exists, other=0.0).to(SUM)
            covered = exists[None] & (t_row + a * STRIDE < KERNEL) & (t_column + b * STRIDE < KERNEL)
            weight = tl.exp(tl.where(covered, logit - top[None], -float("inf")))
            gathered_u += weight * u[None]
            gathered_v += weight * v[None]
    value = tl.load(x + at, inside, other=0.0).to(SUM)
    tl.store(dx + at, gathered_u.to(dx.dtype.element_ty), inside)
    tl.store(dl + at, (value * gathered_u - gathered_v).to(dl.dtype.element_ty), inside)


def tile(inner: int, elements: int) -> tuple[int, int]:
    """Sizes (outer, inner) of a tile of ``elements`` over a contiguous dimension of size ``inner``."""
    width = min(triton.next_power_of_2(inner), 128)
    return max(elements // width, 1), width


def forward(x: Tensor, logits: Tensor, y: Tensor, r: Tensor, window: tuple[int, int, int]) -> None:
    """Fill ``y`` and ``r`` (B, C, h, w); all four tensors dense and in one layout (see ``dispatch.lip2d``)."""
    elements = THREADS * 16 // x.element_size()
    _launch(forward_kernel, (x, logits, y, r), x, y, r, window, tuple(y.shape[-2:]), (), elements)


def backward(
    dy: Tensor, x: Tensor, logits: Tensor, y: Tensor, r: Tensor, dx: Tensor, dl: Tensor, window: tuple[int, int, int]
) -> None:
    """Fill ``dx`` and ``dl`` (B, C, H, W); all seven tensors dense and in one layout."""
    _, stride, padding = window
    cells = tuple((size - 1 + padding) // stride + 1 for size in x.shape[-2:])
    offsets = triton.next_power_of_2(stride * stride)
    elements = THREADS * 8 // x.element_size()
    _launch(backward_kernel, (dy, x, logits, y, r, dx, dl), x, y, r, window, cells, cells, elements, OFFSETS=offsets)


def _launch(kernel, tensors, x, y, r, window, extent, extra, elements, **constants) -> None:
    """Cover an ``extent`` (rows, columns) of every image with tiles of ``elements``."""
    batch, channels, height, width = x.shape
    channels_last = not x.is_contiguous()
    rows, columns = extent
    outer_size, inner_size = (batch * rows * columns, channels) if channels_last else (batch * channels, rows * columns)
    outer, inner = tile(inner_size, elements)
    grid = (triton.cdiv(outer_size, outer), triton.cdiv(inner_size, inner))
    with torch.cuda.device_of(x):
        kernel[grid](
            *tensors, outer_size, channels, height, width, *y.shape[-2:], *extra,
            KERNEL=window[0], STRIDE=window[1], PADDING=window[2], CHANNELS_LAST=channels_last,
            SUM=SUMS[r.dtype], OUTER=outer, INNER=inner, num_warps=THREADS // 32, **constants,
        )  # fmt: skip
