"""``torch.ops.lip_resnet.instance_norm``: instance norm and the activation behind it in one operator.

Backends: ``cpu/norm.cpp`` on CPUs (channels-last, float32 or float64), ``reference_norm.py`` without a compiler,
``triton_norm.py`` on GPUs (both layouts; float32, bfloat16 and float16, also with float32 weights, as under autocast).
``norm_act`` uses PyTorch's own calls for everything else.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lip_resnet.ops import dispatch

ACTIVATIONS = {"none": 0, "relu": 1, "gate": 2}  # as in norm.cpp and triton_norm.py
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_act(z: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str, coefficient: float = 1.0) -> Tensor:
    """z (B, C, H, W) -> activation((z - mean) / sqrt(variance + eps) * weight + bias), same shape, layout and dtype.

    Mean and variance are over the positions of one channel of one image, in float32 at least.

    Args:
        weight, bias: (C,), in z's dtype (autocast apart).
        activation: "none"; "relu"; "gate", coefficient * sigmoid.
    """
    if _fits(z, weight):
        return torch.ops.lip_resnet.instance_norm(z, weight, bias, eps, ACTIVATIONS[activation], coefficient)[0]
    return _plain(z, weight, bias, eps, ACTIVATIONS[activation], coefficient)


def _plain(z: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: int, coefficient: float) -> Tensor:
    # A group norm with C groups keeps channels-last on the CPU; F.instance_norm does not.
    t = F.group_norm(z, z.shape[1], weight, bias, eps)
    if activation == ACTIVATIONS["gate"]:
        return torch.sigmoid(t) * coefficient
    return F.relu(t) if activation == ACTIVATIONS["relu"] else t


def _fits(z: Tensor, weight: Tensor) -> bool:
    if dispatch.recorded():
        return False
    channels_last = z.is_contiguous(memory_format=torch.channels_last)
    if z.device.type == "cuda":
        dense = channels_last or z.is_contiguous()
        return dense and z.dtype in GPU_DTYPES and weight.dtype in GPU_DTYPES and dispatch.available("cuda")
    return (
        z.device.type == "cpu"
        and z.dtype == weight.dtype
        and z.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and channels_last
        and not z.is_contiguous()
        and (_is_built_for(z) or not torch.compiler.is_compiling())  # torch.compile fuses PyTorch's calls itself
    )


def _is_built_for(z: Tensor) -> bool:
    """Whether ``norm.cpp`` supports z: a multiple of 16 channels, and a compiler was found."""
    return z.shape[1] % 16 == 0 and dispatch.available("cpu")


def _backend(z: Tensor) -> Callable[[list[Tensor | None], int, float, float], None]:
    if z.device.type == "cpu":
        from lip_resnet.ops import cpu, reference_norm

        return cpu.instance_norm if _is_built_for(z) else reference_norm.instance_norm
    from lip_resnet.ops import triton_norm

    return triton_norm.instance_norm


def _like_statistics(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[:2], dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("lip_resnet::instance_norm", mutates_args=(), device_types=("cpu", "cuda"))
def instance_norm(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: int, coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, C, H, W) -> the result, in z's layout, and mean and 1 / sqrt(variance + eps), (B, C)."""
    out, mean, rstd = torch.empty_like(z), _like_statistics(z), _like_statistics(z)
    if z.numel():
        tensors = [z, weight.contiguous(), bias.contiguous(), None, out, mean, rstd, None, None]
        _backend(z)(tensors, activation, eps, coefficient)
    return out, mean, rstd


@instance_norm.register_fake
def _(z, weight, bias, eps, activation, coefficient):
    return torch.empty_like(z), _like_statistics(z), _like_statistics(z)


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
    """-> dz (B, C, H, W) in z's layout, dweight and dbias (C,)."""
    dz, sum_g, sum_gz = torch.empty_like(z), _like_statistics(z), _like_statistics(z)
    if z.numel():
        dout = dout.contiguous(memory_format=dispatch.layout_of(z))
        tensors = [z, weight.contiguous(), bias.contiguous(), dout, dz, mean, rstd, sum_g, sum_gz]
        _backend(z)(tensors, activation, 0.0, coefficient)
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
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted
        wanted = [t for t in (z, weight, bias) if t.requires_grad]
        dtype = mean.dtype
        out = _plain(z.to(dtype), weight.to(dtype), bias.to(dtype), *ctx.constants).to(z.dtype)
        found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
        return *(next(found) if t.requires_grad else None for t in (z, weight, bias)), None, None, None
    _, activation, coefficient = ctx.constants
    return *instance_norm_backward(dout, z, weight, bias, mean, rstd, activation, coefficient), None, None, None


instance_norm.register_autograd(_backward, setup_context=_setup_context)
