"""The operator and its gradients as slow loops over windows and positions in float64: the oracle of the LIP tests."""

import math

import torch
from torch import Tensor


def slow_lip2d(
    x: Tensor, logits: Tensor, dy: Tensor | None, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x, logits (B, C, H, W) and dy (B, C, h, w; None: ones) -> y, dx, dlogits, contiguous and float64.

    Every window lists its positions without the padding, computes the softmax of their logits, and adds each position's
    share of the gradient to it. Shares no code and no formula with the operator: no views, no padding, no log-sum-exp,
    and ``dlogits`` from the softmax's Jacobian.
    """
    x, logits = x.detach().double(), logits.detach().double()
    batch, channels, height, width = x.shape
    h = (height + 2 * padding - kernel_size) // stride + 1
    w = (width + 2 * padding - kernel_size) // stride + 1
    dy = torch.ones(batch, channels, h, w, dtype=torch.float64) if dy is None else dy.detach().double()
    planes = []
    for xs, ls, gs in zip(*(t.reshape(batch * channels, *t.shape[-2:]).tolist() for t in (x, logits, dy)), strict=True):
        y = [[0.0] * w for _ in range(h)]
        dx = [[0.0] * width for _ in range(height)]
        dl = [[0.0] * width for _ in range(height)]
        for r in range(h):
            for c in range(w):
                rows = [i for i in range(r * stride - padding, r * stride - padding + kernel_size) if 0 <= i < height]
                columns = [j for j in range(c * stride - padding, c * stride - padding + kernel_size) if 0 <= j < width]
                window = [(i, j) for i in rows for j in columns]
                top = max(ls[i][j] for i, j in window)
                importance = [math.exp(ls[i][j] - top) for i, j in window]
                share = [value / math.fsum(importance) for value in importance]
                y[r][c] = math.fsum(s * xs[i][j] for s, (i, j) in zip(share, window, strict=True))
                for a, (i, j) in enumerate(window):
                    dx[i][j] += gs[r][c] * share[a]
                    # dy/dl_a = sum_b x_b * share_b * ([a == b] - share_a)
                    dl[i][j] += gs[r][c] * math.fsum(
                        xs[m][n] * share[b] * ((a == b) - share[a]) for b, (m, n) in enumerate(window)
                    )
        planes.append((y, dx, dl))
    y, dx, dl = (torch.tensor(values, dtype=torch.float64) for values in zip(*planes, strict=True))
    return y.reshape(batch, channels, h, w), dx.reshape(x.shape), dl.reshape(x.shape)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error divided by the norm of the true result, in float64; the latter must not be zero."""
    truth = truth.double()
    scale = truth.norm().item()
    assert scale > 0, "the true result is zero everywhere: its relative error is undefined"
    return (value.double() - truth).norm().item() / scale
