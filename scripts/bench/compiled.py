"""Triton kernels compiled for a GPU that need not be there: registers, spills, width of loads, instructions.

    PYTHONPATH=.:scripts python -m bench.compiled      prints the table of docs/performance.md as Markdown

The kernels are launched by the functions that run them on a GPU, under a driver that only says which GPU it is, so that
Triton specialises them as in a real launch (addresses and sizes divisible by 16, sizes of 1). ``ptxas`` and
``cuobjdump`` come with Triton.
"""

import collections
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench import previous_triton
from lip_resnet.ops import norm, triton_lip, triton_norm

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ISSUE_RATE = 132 * 4 * 1.7e9  # warp instructions per second of an H100: multiprocessors, schedulers, clock


@dataclass(frozen=True)
class Compiled:
    """What a launch compiled. ``spilled`` is in bytes a thread; ``memory`` counts SASS loads and stores by opcode."""

    name: str
    programs: int
    warps: int
    registers: int
    spilled: int
    instructions: int
    memory: dict[str, int]


class _Driver:
    """The part of Triton's driver that compiles: no device, no stream."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps the kernels of each device apart

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[Compiled]]:
    """Within, a launch compiles its kernel for this compute capability (80: A100, 90: H100) and runs nothing.

    Yields a list to which each launch appends.
    """
    compiled: list[Compiled] = []

    def launcher(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            result = kernel.warmup(*args, grid=grid, **options)
            compiled.append(_inspect(kernel.fn.__name__, grid, result))

        return launch

    original = JITFunction.__getitem__
    driver.set_active(_Driver(capability))
    JITFunction.__getitem__ = launcher
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = original
        driver.set_active(None)  # the next use looks for a GPU again


def _inspect(name: str, grid: tuple[int, ...], kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    counts = collections.Counter(opcode for opcode in opcodes if opcode != "NOP")
    memory = {opcode: count for opcode, count in sorted(counts.items()) if re.match("LDG|STG|LDL|STL", opcode)}
    programs = 1
    for size in grid:
        programs *= size
    spilled = usage["STACK"] + usage["LOCAL"]
    return Compiled(name, programs, kernel.metadata.num_warps, usage["REG"], spilled, counts.total(), memory)


def lip2d(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, window: tuple[int, int, int]) -> None:
    """Launch the forward and the backward kernel of ``triton_lip`` or ``previous_triton`` on tensors never filled."""
    x = torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout])
    h, w = ((size + 2 * window[2] - window[0]) // window[1] + 1 for size in shape[2:])
    y = torch.empty((*shape[:2], h, w), dtype=dtype, memory_format=LAYOUTS[layout])
    if kernels is previous_triton:
        saved: tuple[Tensor, ...] = (torch.empty_like(y, dtype=torch.float32),)
    else:
        saved = torch.empty_like(y), torch.empty_like(y, dtype=torch.float16 if dtype.itemsize == 2 else dtype)
    kernels.forward(x, torch.empty_like(x), y, *saved, window)
    dx, dl = torch.empty_like(x), torch.empty_like(x)
    kernels.backward(torch.empty_like(y), x, torch.empty_like(x), y, *saved, dx, dl, window)


def instance_norm(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, activation: str) -> None:
    """The same for ``triton_norm`` or ``previous_triton``."""
    z, out, dz = (torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout]) for _ in range(3))
    weight, bias = torch.empty(2, shape[1])
    mean, rstd, sum_g, sum_gz = torch.empty(4, *shape[:2])
    code = norm.ACTIVATIONS[activation]
    kernels.norm_forward(z, weight, bias, out, mean, rstd, code, 1e-5, 12.0)
    kernels.norm_backward(out, z, weight, bias, mean, rstd, dz, sum_g, sum_gz, code, 12.0)


def main() -> None:
    shape, dtype = (256, 64, 112, 112), torch.bfloat16  # the stem, at batch 256
    print("| kernel | layout | instructions | registers | spilled (B) | loads | issue time (ms) |")
    print("|---|---|--:|--:|--:|---|--:|")
    for layout in LAYOUTS:
        for prefix, kernels in (("previous ", previous_triton), ("", triton_lip), ("", triton_norm)):
            with compile_only(90) as compiled:
                if kernels is not triton_norm:
                    lip2d(kernels, shape, dtype, layout, (3, 2, 1))
                if kernels is not triton_lip:
                    instance_norm(kernels, shape, dtype, layout, "gate")
            for row in compiled:
                loads = ", ".join(f"{n} {opcode}" for opcode, n in row.memory.items() if opcode.startswith("LDG"))
                issue = row.instructions * row.warps * row.programs / ISSUE_RATE * 1e3
                issue_text = "" if row.name.startswith("norm") else f"{issue:.2f}"
                print(
                    f"| {prefix}{row.name.removesuffix('_kernel')} | {layout} | {row.instructions} | {row.registers} "
                    f"| {row.spilled} | {loads} | {issue_text} |"
                )


if __name__ == "__main__":
    main()
