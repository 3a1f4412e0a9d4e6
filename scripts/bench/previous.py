"""The previous Triton kernels as an operator and as layers, to be measured beside today's; on GPUs, not compiled."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lip_resnet.layers.logits import Gate, InstanceNorm2d
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.ops import dispatch, norm


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, logits: Tensor, *window: int) -> Tensor:
        from bench import previous_triton  # Triton is published for Linux only

        ctx.window, ctx.layout = window, dispatch.layout_of(x)
        h, w = ((size + 2 * window[2] - window[0]) // window[1] + 1 for size in x.shape[-2:])
        x, logits = x.contiguous(memory_format=ctx.layout), logits.contiguous(memory_format=ctx.layout)
        y = torch.empty((*x.shape[:2], h, w), dtype=x.dtype, device=x.device, memory_format=ctx.layout)
        r = torch.empty_like(y, dtype=torch.float32)
        previous_triton.forward(x, logits, y, r, window)
        ctx.save_for_backward(x, logits, y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        from bench import previous_triton

        saved = ctx.saved_tensors
        dx, dl = torch.empty_like(saved[0]), torch.empty_like(saved[1])
        previous_triton.backward(dy.contiguous(memory_format=ctx.layout), *saved, dx, dl, ctx.window)
        return dx, dl, None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: int, coefficient: float):
        from bench import previous_triton

        ctx.constants, ctx.layout = (activation, coefficient), dispatch.layout_of(z)
        out = torch.empty_like(z)
        mean, rstd = (torch.empty(z.shape[:2], device=z.device) for _ in range(2))
        previous_triton.norm_forward(z, weight, bias, out, mean, rstd, activation, eps, coefficient)
        ctx.save_for_backward(z, weight, bias, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        from bench import previous_triton

        z, *_ = saved = ctx.saved_tensors
        dz, sums = torch.empty_like(z), [torch.empty(z.shape[:2], device=z.device) for _ in range(2)]
        previous_triton.norm_backward(dout.contiguous(memory_format=ctx.layout), *saved, dz, *sums, *ctx.constants)
        return dz, sums[1].sum(0), sums[0].sum(0), None, None, None


def pool(x: Tensor, logits: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """As ``lip_resnet.lip2d``."""
    return _Pool.apply(x, logits, kernel_size, stride, padding)


class PreviousLIP(LIP2d):
    """A LIP layer with the previous operator."""

    def _pool(self, x: Tensor, source: Tensor) -> Tensor:
        return pool(x, self.logits(source), self.kernel_size, self.stride, self.padding)


class PreviousNorm(InstanceNorm2d):
    """The instance norm with the previous kernels."""

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        name = {nn.ReLU: "relu", Gate: "gate"}.get(type(activation), "none")
        coefficient = activation.coefficient if isinstance(activation, Gate) else 1.0
        return _Norm.apply(x, self.weight, self.bias, self.eps, norm.ACTIVATIONS[name], coefficient)
