"""Memory of a device: layout of images, gradient checkpointing, the peak, and what fits where an allocation failed."""

import contextlib
import functools
import gc
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_resnet.errors import InputError, OutOfMemory

_GIB = 2**30
# Of CUDA and MPS, of the CPU's allocator on Windows and on Unix, of cuDNN and cuBLAS.
_FAILURES = re.compile(r"out of memory|not enough memory|can't allocate memory|STATUS_ALLOC_FAILED", re.IGNORECASE)


def layout(channels_last: bool, device: torch.device) -> torch.memory_format:
    """Memory format of images and weights: contiguous on MPS, where channels-last batch norm has failed in training."""
    return torch.channels_last if channels_last and device.type != "mps" else torch.contiguous_format


def enable_grad_checkpointing(model: nn.Module) -> None:
    """Let a timm model compute activations again in the backward instead of keeping them; its forward updates batch
    norm's statistics each time, which the caller must undo.

    Raises:
        InputError: this model has no gradient checkpointing.
    """
    try:
        set_grad_checkpointing: Any = model.set_grad_checkpointing
        set_grad_checkpointing()
    # timm's models without it have no such method, assert that it is not asked for, or raise NotImplementedError.
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"train.grad_checkpointing: {type(model).__name__} does not have it; leave it out") from error


def peak(device: torch.device) -> dict[str, float]:
    """``train/peak_memory_gib``: peak memory so far of this process's tensors on a CUDA GPU, GiB; empty elsewhere.

    A counter of PyTorch's allocator, read without a synchronisation. MPS has no such counter. The resident memory of a
    CPU process also holds its libraries and data, and no two runs log the same: ``describe_peak`` has it.
    """
    if device.type != "cuda":
        return {}
    return {"train/peak_memory_gib": torch.cuda.max_memory_allocated(device) / _GIB}


def describe_peak(device: torch.device) -> str:
    """The peak in words: "peak memory 23.12 of 24.00 GiB"; on MPS what the process has now; empty if unknown.

    On the CPU the resident memory of this process, without loader workers; known on Linux.
    """
    if device.type == "mps":
        now, most = torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
        return f"allocated memory {now / _GIB:.2f} of {most / _GIB:.2f} GiB"
    for value in peak(device).values():
        return f"peak memory {value:.2f} of {torch.cuda.get_device_properties(device).total_memory / _GIB:.2f} GiB"
    status = Path("/proc/self/status")
    kib = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    return f"peak resident memory {int(kib[1]) / 2**20:.2f} GiB" if kib else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _FAILURES.search(str(error)) is not None


@contextlib.contextmanager
def explained(explain: Callable[[], str]) -> Iterator[None]:
    """Raise a failed allocation in the body as ``OutOfMemory`` with the line that ``explain`` returns.

    ``explain`` is called when the tensors of all functions that the body called are released, so that it can try what
    fits.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _release(error)
        raise OutOfMemory(explain()) from error


def fits(attempt: Callable[[], object]) -> bool:
    """Whether ``attempt`` returns without a failed allocation."""
    try:
        attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _release(error)
        return False
    return True


def largest_that_fits(images: int, attempt: Callable[[int], object], least: int = 1) -> int:
    """The first of ``images``, half of it, a quarter, ... for which ``attempt`` fits; 0 if none from ``least`` on."""
    while images >= least:
        if fits(functools.partial(attempt, images)):
            return images
        images //= 2
    return 0


def _release(error: BaseException) -> None:
    """Release the tensors that the frames of a caught error hold, and the device memory that is cached for them."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
