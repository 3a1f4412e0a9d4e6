"""The CPU kernels ``lip2d.cpp`` and ``norm.cpp``: built by the machine's C++ compiler on first use, called by ctypes.

The library is cached in ``$LIP_KERNELS_CACHE`` (default ``$XDG_CACHE_HOME/lip_resnet``, else ``~/.cache/lip_resnet``)
under a hash of everything it depends on: source, flags, compiler, CPU, PyTorch. Processes that start together may each
build it; each renames its finished file into place, so none reads a partly written one.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lip_resnet.ops.dispatch import KernelUnavailable

SOURCES = [Path(__file__).with_name(name) for name in ("lip2d.cpp", "norm.cpp", "rows.h", "vectors.h")]
# The OpenMP runtime is the one that PyTorch has already loaded, so both share one thread pool.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, built first if the cache has none.

    Raises:
        KernelUnavailable: no compiler, a failed build, or no folder to write to.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise KernelUnavailable("no C++ compiler was found (c++, g++, clang++ or $CXX)")
    machine = platform.machine()
    command = [compiler, *FLAGS, "-march=native" if machine in ("x86_64", "AMD64") else "-mcpu=native"]
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(
            b"\0".join(
                [
                    *(source.read_bytes() for source in SOURCES),
                    " ".join(command).encode(),
                    version,
                    _cpu(),
                    torch.__version__.encode(),
                ]
            )
        )
        path = _cache() / f"lip2d-{machine}-{key.hexdigest()[:20]}.so"
        if not path.exists():
            _build(command, path)
        loaded = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        raise KernelUnavailable(f"{compiler} failed: {reason[0] if reason else error}") from error
    except OSError as error:
        raise KernelUnavailable(str(error)) from error
    # ctypes would pass pointers as 32-bit integers
    pointer, int64s, ints = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int)
    loaded.lip2d_forward.argtypes = (*[pointer] * 4, int64s, ints, ctypes.c_int)
    loaded.lip2d_backward.argtypes = (*[pointer] * 7, int64s, ints, ctypes.c_int)
    double, integer = ctypes.c_double, ctypes.c_int
    loaded.instance_norm.argtypes = (*[pointer] * 9, int64s, double, double, integer, integer)
    loaded.lip2d_forward.restype = loaded.lip2d_backward.restype = loaded.instance_norm.restype = None
    return loaded


def _cpu() -> bytes:
    """The CPU's model and features, which -march=native depends on: machines may share a home directory."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor().encode()
    first = info.read_bytes().split(b"\n\n")[0].splitlines()
    return b"\n".join(line for line in first if line.startswith((b"model name", b"flags", b"Features", b"CPU part")))


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lip_resnet"
    path = Path(os.environ.get("LIP_KERNELS_CACHE") or default)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _build(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, *map(str, SOURCES[:2]), "-o", str(built)], capture_output=True, check=True)
        os.replace(built, path)


def forward(x: Tensor, logits: Tensor, y: Tensor, r: Tensor, window: tuple[int, int, int]) -> None:
    """Fill ``y`` and ``r`` (B, C, h, w); all four tensors dense and in one layout (see ``dispatch.lip2d``)."""
    pointers = [t.data_ptr() for t in (x, logits, y, r)]
    library().lip2d_forward(*pointers, *_description(x, logits, y, r, window), torch.get_num_threads())


def backward(
    dy: Tensor, x: Tensor, logits: Tensor, y: Tensor, r: Tensor, dx: Tensor, dl: Tensor, window: tuple[int, int, int]
) -> None:
    """Fill ``dx`` and ``dl`` (B, C, H, W); all seven tensors dense and in one layout."""
    pointers = [t.data_ptr() for t in (dy, x, logits, y, r, dx, dl)]
    library().lip2d_backward(*pointers, *_description(x, logits, y, r, window), torch.get_num_threads())


def _description(
    x: Tensor, logits: Tensor, y: Tensor, r: Tensor, window: tuple[int, int, int]
) -> tuple[ctypes.Array[Any], ctypes.Array[Any]]:
    """Shape and dtypes, as ``lip2d.cpp`` takes them."""
    channels_last = not x.is_contiguous()
    shape = (ctypes.c_int64 * 10)(*x.shape, *y.shape[-2:], *window, channels_last)
    return shape, (ctypes.c_int * 3)(*(DTYPES[t.dtype] for t in (x, logits, r)))


def norm_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: int,
    eps: float,
    coefficient: float,
) -> None:
    """Fill ``out`` (B, C, H, W), ``mean`` and ``rstd`` (B, C); z channels-last, weight and bias in rstd's dtype."""
    _instance_norm((z, weight, bias, None, out, mean, rstd, None, None), z, activation, eps, coefficient)


def norm_backward(
    dout: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dz: Tensor,
    sum_g: Tensor,
    sum_gz: Tensor,
    activation: int,
    coefficient: float,
) -> None:
    """Fill ``dz`` (B, C, H, W), and ``sum_g`` and ``sum_gz`` (B, C): the parts of dbias and dweight of every image."""
    _instance_norm((z, weight, bias, dout, dz, mean, rstd, sum_g, sum_gz), z, activation, 0.0, coefficient)


def _instance_norm(
    tensors: tuple[Tensor | None, ...], z: Tensor, activation: int, eps: float, coefficient: float
) -> None:
    shape = (ctypes.c_int64 * 4)(*z.shape[:2], z.shape[2] * z.shape[3], activation)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    library().instance_norm(*pointers, shape, eps, coefficient, DTYPES[z.dtype], torch.get_num_threads())
