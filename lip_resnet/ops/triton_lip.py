"""``lip2d`` on GPUs, in Triton: one pass forward, one backward, no atomics, deterministic; as ``cpu/lip2d.cpp``.

Both kernels work on tiles of two dimensions, the inner one contiguous in memory. Programs are numbered in memory order:

    layout          outer                       inner                  elements from one position to the next
    channels-last   positions of one image      channels               C
    contiguous      planes (image, channel)     positions of a plane   1

The backward pass gathers. Input row i belongs to cell q = (i + padding) // stride at offset t = (i + padding) % stride,
and the windows that contain it start at cells q - d, d = 0 .. (kernel - 1 - t) // stride: all bounds but the borders
are compile-time constants. A program computes the stride x stride positions of every cell in its tile.

Saved for the backward pass are each window's largest logit and r = 1 / sum exp(logits - top), apart: in their sum, the
log-sum-exp, an error of |logit| * 2^-24 would be an error of the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 128  # per program; each has 16 bytes of every position and window that it visits
UNROLLED = tl.constexpr(3)  # windows up to this size are unrolled; above it rows of a window are a loop
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    rows, columns, planes, channels, outer_tiles, inner_tiles,
    CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """This program's tile -> row, column, image or plane, channel (contiguous: 0), and mask of its elements."""
    program = tl.program_id(0)
    outer = program // inner_tiles
    inner = program % inner_tiles * INNER + tl.arange(0, INNER)[None, :]
    if CHANNELS_LAST:
        position = outer % outer_tiles * OUTER + tl.arange(0, OUTER)[:, None]
        group = (outer // outer_tiles).to(tl.int64)
        channel = inner.to(INDEX)
        mask = (position < rows * columns) & (inner < channels)
    else:
        position = inner
        group = outer.to(tl.int64) * OUTER + tl.arange(0, OUTER)[:, None]
        channel = 0
        mask = (group < planes) & (position < rows * columns)
    return position // columns, position % columns, group, channel, mask


@triton.jit
def _inside(row, column, rows, columns, mask):
    return mask & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)


@triton.jit
def forward_kernel(
    x, logits, y, top, r, planes, C, H, W, h, w, outer_tiles, inner_tiles,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, INDEX: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of output positions: y, top = the largest logit, and r = 1 / sum exp(logits - top)."""
    row, column, group, channel, mask = _tile(
        h, w, planes, C, outer_tiles, inner_tiles, CHANNELS_LAST, OUTER, INNER, INDEX
    )
    step = C.to(INDEX) if CHANNELS_LAST else 1
    i = row * STRIDE - PADDING
    j = column * STRIDE - PADDING
    first = group * H * W * step + (channel + (i * W + j) * step)
    largest = tl.full(mask.shape, -float("inf"), SUM)
    for a in tl.range(KERNEL, loop_unroll_factor=KERNEL if KERNEL <= UNROLLED else 1):
        for b in tl.static_range(KERNEL):
            inside = _inside(i + a, j + b, H, W, mask)
            logit = tl.load(logits + first + (a * W + b) * step, inside, other=-float("inf")).to(SUM)
            largest = tl.maximum(largest, logit, propagate_nan=tl.PropagateNan.ALL)
    weights = tl.zeros(mask.shape, SUM)
    total = tl.zeros(mask.shape, SUM)
    for a in tl.range(KERNEL, loop_unroll_factor=KERNEL if KERNEL <= UNROLLED else 1):
        for b in tl.static_range(KERNEL):
            inside = _inside(i + a, j + b, H, W, mask)
            # unrolled, the compiler keeps the logits of the loop above in registers
            logit = tl.load(logits + first + (a * W + b) * step, inside, other=-float("inf")).to(SUM)
            weight = tl.exp2((logit - largest) * LOG2_E)
            weights += weight
            total += weight * tl.load(x + first + (a * W + b) * step, inside, other=0.0).to(SUM)
    out = group * h * w * step + (channel + (row * w + column) * step)
    inverse = 1.0 / weights
    tl.store(y + out, (total * inverse).to(y.dtype.element_ty), mask)
    tl.store(top + out, largest.to(top.dtype.element_ty), mask)
    tl.store(r + out, inverse.to(r.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dy, x, logits, y, top, r, dx, dl, planes, C, H, W, h, w, cell_rows, cell_columns, outer_tiles, inner_tiles,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, INDEX: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of cells: dx and dlogits of their positions."""
    row, column, group, channel, mask = _tile(
        cell_rows, cell_columns, planes, C, outer_tiles, inner_tiles, CHANNELS_LAST, OUTER, INNER, INDEX
    )
    step = C.to(INDEX) if CHANNELS_LAST else 1
    i = row * STRIDE - PADDING
    j = column * STRIDE - PADDING
    first = group * H * W * step + (channel + (i * W + j) * step)
    own = group * h * w * step + (channel + (row * w + column) * step)
    for t in tl.static_range(STRIDE):
        # stored after the loop: between stores, the compiler loads each window once for all positions
        gradients = ()
        for s in tl.static_range(STRIDE):
            at = first + (t * W + s) * step
            inside = _inside(i + t, j + s, H, W, mask)
            logit = tl.load(logits + at, inside, other=0.0).to(SUM)
            gathered_u = tl.zeros(mask.shape, SUM)
            gathered_v = tl.zeros(mask.shape, SUM)
            for a in tl.range(
                (KERNEL - 1 - t) // STRIDE + 1,
                loop_unroll_factor=(KERNEL - 1 - t) // STRIDE + 1 if KERNEL <= UNROLLED else 1,
            ):
                for b in tl.static_range((KERNEL - 1 - s) // STRIDE + 1):
                    exists = _inside(row - a, column - b, h, w, mask)
                    out = own - (a * w + b) * step
                    u = tl.load(dy + out, exists, other=0.0).to(SUM) * tl.load(r + out, exists, other=0.0).to(SUM)
                    v = u * tl.load(y + out, exists, other=0.0).to(SUM)
                    weight = tl.exp2((logit - tl.load(top + out, exists, other=float("inf")).to(SUM)) * LOG2_E)
                    gathered_u += weight * u
                    gathered_v += weight * v
            value = tl.load(x + at, inside, other=0.0).to(SUM)
            dl_value = value * gathered_u - gathered_v
            gradients += (gathered_u.to(dx.dtype.element_ty), dl_value.to(dl.dtype.element_ty))  # type: ignore[assignment]
        for s in tl.static_range(STRIDE):
            at = first + (t * W + s) * step
            inside = _inside(i + t, j + s, H, W, mask)
            tl.store(dx + at, gradients[2 * s], inside)
            tl.store(dl + at, gradients[2 * s + 1], inside)


def forward(x: Tensor, logits: Tensor, y: Tensor, top: Tensor, r: Tensor, window: tuple[int, int, int]) -> None:
    """Fill ``y``, ``top`` and ``r`` (B, C, h, w); all tensors dense and in one layout (see ``dispatch.lip2d``)."""
    _launch(forward_kernel, (x, logits, y, top, r), x, y, window, tuple(y.shape[-2:]), ())


def backward(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    y: Tensor,
    top: Tensor,
    r: Tensor,
    dx: Tensor,
    dl: Tensor,
    window: tuple[int, int, int],
) -> None:
    """Fill ``dx`` and ``dl`` (B, C, H, W); all tensors dense and in one layout."""
    _, stride, padding = window
    cells = tuple((size - 1 + padding) // stride + 1 for size in x.shape[-2:])
    _launch(backward_kernel, (dy, x, logits, y, top, r, dx, dl), x, y, window, cells, cells)


def _launch(kernel, tensors, x: Tensor, y: Tensor, window, extent: tuple[int, ...], extra: tuple[int, ...]) -> None:
    """Cover an ``extent`` (rows, columns) of every image with tiles."""
    batch, channels, height, width = x.shape
    channels_last = not x.is_contiguous()
    positions = extent[0] * extent[1]
    outer_size, inner_size = (positions, channels) if channels_last else (batch * channels, positions)
    # a contiguous tile loads its elements one by one: half as many keep it in registers
    elements = THREADS * 16 // x.element_size() // (1 if channels_last else 2)
    inner = min(triton.next_power_of_2(inner_size), 128)
    outer = max(elements // inner, 1)
    tiles = triton.cdiv(outer_size, outer), triton.cdiv(inner_size, inner)
    in_32_bits = height * width * (channels if channels_last else 1) < 2**31
    with torch.cuda.device_of(x):
        kernel[((batch if channels_last else 1) * tiles[0] * tiles[1],)](
            *tensors, batch * channels, channels, height, width, *y.shape[-2:], *extra, *tiles,
            KERNEL=window[0], STRIDE=window[1], PADDING=window[2], CHANNELS_LAST=channels_last,
            SUM=tl.float64 if x.dtype == torch.float64 else tl.float32, INDEX=tl.int32 if in_32_bits else tl.int64,
            OUTER=outer, INNER=inner, num_warps=THREADS // 32,
        )  # fmt: skip
