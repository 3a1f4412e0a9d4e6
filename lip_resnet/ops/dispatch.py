"""Which implementation computes ``lip2d``, and the fused operator ``torch.ops.lip_resnet.lip2d`` with its gradient.

    lip.lip2d    checks its arguments, then asks ``supports`` and ``must_decompose``
      -> torch.ops.lip_resnet.lip2d (here)    float32, bfloat16, float16, where a kernel runs
           -> cpu (C++), or triton_lip on GPUs: ``forward``, ``backward``
      -> reference.py    float64; graphs that are exported or traced; other devices; no kernel; windows above 8x8;
                         on GPUs also strides above 8

The fused operator takes one pass over x and the logits forward and one backward, and saves x, logits, y and one number
per window, on GPUs two. A kernel is built or loaded when the first tensor of its device needs it; if that fails, one
warning says why. The environment variable LIP_KERNELS=auto|plain chooses; with ``plain`` only ``reference.py`` is used.

Triton compiles a kernel for each window, when it is first used: 1 to 3 s for 3x3/2, at most half a minute within the
limits, but two minutes for a stride of 16, as each of the stride^2 positions of a cell has code of its own.
"""

import functools
import importlib.util
import os
import subprocess
import warnings
from types import ModuleType

import torch
from torch import Tensor

from lip_resnet.compat import functorch_is_active, is_exporting
from lip_resnet.ops import reference


class KernelUnavailable(Exception):
    """A kernel cannot be built or loaded on this machine; the message says why, in one line."""


CHOICES = ("auto", "plain")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_KERNEL_SIZE = 8
MAX_GPU_STRIDE = 8


@torch.compiler.assume_constant_result
def available(device_type: str) -> bool:
    """Whether a fused kernel runs on this type of device; if one should but cannot, warn once with the reason.

    Raises:
        ValueError: LIP_KERNELS has an unknown value.
    """
    return _available(device_type)


@functools.cache
def _available(device_type: str) -> bool:
    choice = os.environ.get("LIP_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"environment variable LIP_KERNELS is {choice!r}; it must be one of {', '.join(CHOICES)}")
    if choice == "plain":
        return False
    if device_type == "cpu":
        try:
            _backend("cpu").library()
        except KernelUnavailable as error:
            _warn(str(error))
            return False
        return True
    if device_type == "cuda" and (reason := _triton_problem()):
        _warn(reason)
        return False
    if device_type == "mps":
        _warn("there is none for MPS")
    return device_type == "cuda"


def _triton_problem() -> str | None:
    """Why Triton cannot run on this machine; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        from triton.runtime import driver

        try:
            driver.active.utils  # noqa: B018 (built by a C compiler on first use)
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            return f"Triton does not start: {' '.join(str(error).split())[:200]}"
    return None


def _warn(reason: str) -> None:
    warnings.warn(f"lip2d runs in its reference form, slower than the fused kernel: {reason}", stacklevel=2)


def _backend(device_type: str) -> ModuleType:
    return importlib.import_module(f"lip_resnet.ops.{'cpu' if device_type == 'cpu' else 'triton_lip'}")


def supports(x: Tensor, logits: Tensor, kernel_size: int, stride: int = 1) -> bool:
    """Whether the fused operator runs on these tensors: their dtypes, device and window."""
    return (
        x.dtype in DTYPES
        and logits.dtype in DTYPES
        and (torch.float64 not in (x.dtype, logits.dtype) or x.dtype == logits.dtype)
        and kernel_size <= MAX_KERNEL_SIZE
        and (stride <= MAX_GPU_STRIDE or x.device.type == "cpu")
        and available(x.device.type)
    )


def must_decompose() -> bool:
    """Whether a graph is exported or traced, or a functorch transform runs: these need PyTorch's own calls."""
    return is_exporting() or torch.jit.is_tracing() or functorch_is_active()


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory format of the results: channels-last if x, or the tensor it is a view of, is; else contiguous."""
    # A map of one position is contiguous in both formats.
    positions = x.shape[2] * x.shape[3]
    channels_last = positions > 1 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty_outputs(
    x: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    h, w = ((size + 2 * padding - kernel_size) // stride + 1 for size in x.shape[-2:])
    y = torch.empty((*x.shape[:2], h, w), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type == "cpu":
        return y, logits.new_empty((0, 0, 0, 0)), torch.empty_like(y, dtype=dtype)
    if x.dtype.itemsize == logits.dtype.itemsize == 2:
        dtype = torch.float16
    return y, torch.empty_like(y, dtype=logits.dtype), torch.empty_like(y, dtype=dtype)


@torch.library.custom_op("lip_resnet::lip2d", mutates_args=(), device_types=("cpu", "cuda"))
def lip2d(x: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, logits (B, C, H, W) -> y (B, C, h, w), and what the backward pass needs of every window: top and r.

    ``y`` has the dtype and layout of x. ``top`` is the largest logit, in their dtype; on the CPU, where the kernel
    finds it again, it is empty. ``r`` = 1 / sum exp(logits - top) is float32 (float64 beside float64), on GPUs float16
    where x and logits have 16 bits: it lies between 1/64 and 1, so it is rounded at most as much as y.
    See ``lip_resnet.lip2d``, which checks the arguments.
    """
    y, top, r = _empty_outputs(x, logits, kernel_size, stride, padding)
    if y.numel():
        layout = layout_of(x)
        x, logits = x.contiguous(memory_format=layout), logits.contiguous(memory_format=layout)
        saved = (r,) if x.device.type == "cpu" else (top, r)
        _backend(x.device.type).forward(x, logits, y, *saved, (kernel_size, stride, padding))
    return y, top, r


@lip2d.register_fake
def _(x, logits, kernel_size, stride, padding):
    return _empty_outputs(x, logits, kernel_size, stride, padding)


@torch.library.custom_op("lip_resnet::lip2d_backward", mutates_args=(), device_types=("cpu", "cuda"))
def lip2d_backward(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    y: Tensor,
    top: Tensor,
    r: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """dy, y, top, r (B, C, h, w); x, logits (B, C, H, W) -> dx in x's dtype, dlogits in theirs, both in x's layout."""
    dx, dl = _empty_gradients(x, logits)
    if x.numel():
        layout = layout_of(x)
        dy, x, logits, y, top, r = (t.contiguous(memory_format=layout) for t in (dy, x, logits, y, top, r))
        saved = (r,) if x.device.type == "cpu" else (top, r)
        _backend(x.device.type).backward(dy, x, logits, y, *saved, dx, dl, (kernel_size, stride, padding))
    return dx, dl


def _empty_gradients(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    layout = layout_of(x)
    return torch.empty_like(x, memory_format=layout), torch.empty_like(logits, memory_format=layout)


@lip2d_backward.register_fake
def _(dy, x, logits, y, top, r, kernel_size, stride, padding):
    return _empty_gradients(x, logits)


def _setup_context(ctx, inputs, output):
    x, logits, *ctx.window = inputs
    y, top, r = output
    ctx.save_for_backward(x, logits, y, top, r)
    ctx.mark_non_differentiable(top, r)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return None, None, None, None, None
    if torch.is_grad_enabled():  # for the second derivative
        x, logits = ctx.saved_tensors[:2]
        return *reference.gradients(dy, x, logits, tuple(ctx.window)), None, None, None
    return *lip2d_backward(dy, *ctx.saved_tensors, *ctx.window), None, None, None


lip2d.register_autograd(_backward, setup_context=_setup_context)
