"""Instance norm and the activation after it: ``norm_act``, and the fused operator that it calls where one can run.

    norm_act -> torch.ops.lip_resnet.instance_norm -> cpu/norm.cpp      CPU, channels-last
                                                   -> reference_norm    the same without a C++ compiler
                                                   -> triton_norm       GPU, both layouts; not float64
             -> reference_norm.norm_act                                 all else; exported and traced graphs

The weights may be float32 beside bfloat16 or float16 features, as under autocast.
"""

from types import ModuleType

import torch
from torch import Tensor

from lip_resnet.ops import dispatch, reference, reference_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # on CPUs also float64
ACTIVATIONS = {"none": reference_norm.NONE, "relu": reference_norm.RELU, "gate": reference_norm.GATE}


def norm_act(z: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str, coefficient: float = 1.0) -> Tensor:
    """z (B, C, H, W) -> activation((z - mean) / sqrt(variance + eps) * weight + bias), same shape, layout and dtype.

    Mean and variance are over the positions of one channel of one image, in float32 at least.

    Args:
        weight, bias: (C,), in z's dtype, or float32 beside bfloat16 or float16 as under autocast.
        activation: "none", "relu", or "gate": coefficient * sigmoid.
    """
    if _is_fused(z, weight):
        return torch.ops.lip_resnet.instance_norm(z, weight, bias, eps, ACTIVATIONS[activation], coefficient)[0]
    return reference_norm.norm_act(z, weight, bias, eps, ACTIVATIONS[activation], coefficient)


def _is_fused(z: Tensor, weight: Tensor) -> bool:
    """Whether the fused operator runs on these tensors."""
    if dispatch.must_decompose():
        return False
    channels_last = z.is_contiguous(memory_format=torch.channels_last)
    low = z.dtype in DTYPES and weight.dtype in DTYPES
    if z.device.type == "cuda":
        return low and (channels_last or z.is_contiguous()) and dispatch.available("cuda")
    return (
        z.device.type == "cpu"
        and (low or z.dtype == weight.dtype == torch.float64)
        and channels_last
        and not z.is_contiguous()
        # torch.compile fuses PyTorch's calls itself
        and (dispatch.available("cpu") or not torch.compiler.is_compiling())
    )


def _backend(z: Tensor) -> ModuleType:
    """The module whose ``norm_forward`` and ``norm_backward`` run on z."""
    if z.device.type == "cpu":
        from lip_resnet.ops import cpu

        return cpu if dispatch.available("cpu") else reference_norm
    from lip_resnet.ops import triton_norm

    return triton_norm


def _empty_statistics(z: Tensor) -> Tensor:
    """A (B, C) tensor: one number for every channel of every image."""
    return z.new_empty(z.shape[:2], dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("lip_resnet::instance_norm", mutates_args=(), device_types=("cpu", "cuda"))
def instance_norm(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: int, coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, C, H, W) -> the result, in z's layout, and mean and rstd = 1 / sqrt(variance + eps), (B, C)."""
    out, mean, rstd = torch.empty_like(z), _empty_statistics(z), _empty_statistics(z)
    if z.numel():
        weight, bias = (t.to(mean.dtype).contiguous() for t in (weight, bias))
        _backend(z).norm_forward(z, weight, bias, out, mean, rstd, activation, eps, coefficient)
    return out, mean, rstd


@instance_norm.register_fake
def _(z, weight, bias, eps, activation, coefficient):
    return torch.empty_like(z), _empty_statistics(z), _empty_statistics(z)


@torch.library.custom_op("lip_resnet::instance_norm_backward", mutates_args=(), device_types=("cpu", "cuda"))
def instance_norm_backward(
    dout: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: int,
    coefficient: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout, z (B, C, H, W) -> dz (B, C, H, W) in z's dtype and layout, dweight and dbias (C,)."""
    dz, sum_g, sum_gz = torch.empty_like(z), _empty_statistics(z), _empty_statistics(z)
    if z.numel():
        dout = dout.contiguous(memory_format=dispatch.layout_of(z))
        gain, shift = (t.to(mean.dtype).contiguous() for t in (weight, bias))
        tensors = (dout, z, gain, shift, mean, rstd, dz, sum_g, sum_gz)
        _backend(z).norm_backward(*tensors, activation, coefficient)
    return dz, sum_gz.sum(0).to(weight.dtype), sum_g.sum(0).to(bias.dtype)


@instance_norm_backward.register_fake
def _(dout, z, weight, bias, mean, rstd, activation, coefficient):
    return torch.empty_like(z), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    z, weight, bias, *ctx.constants = inputs
    _, mean, rstd = output
    ctx.save_for_backward(z, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return None, None, None, None, None, None
    z, weight, bias, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # for the second derivative
        dtype = mean.dtype
        out = reference_norm.norm_act(z.to(dtype), weight.to(dtype), bias.to(dtype), *ctx.constants).to(z.dtype)
        return *reference.differentiable_gradients(out, (z, weight, bias), dout), None, None, None
    _, activation, coefficient = ctx.constants
    return *instance_norm_backward(dout, z, weight, bias, mean, rstd, activation, coefficient), None, None, None


instance_norm.register_autograd(_backward, setup_context=_setup_context)
