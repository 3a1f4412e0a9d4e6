"""The Triton kernels as a GPU would get them, without one: the real launch, compiled, its machine code read.

Compared with ``test_triton.py``, which shows that the numbers are right, this shows what decides the speed.
"""

import pytest
import torch
from helpers.operator_cases import LAYOUTS

pytest.importorskip("triton", reason="Triton is published for Linux only")

from bench import compiled

from lip_resnet.ops import dispatch, triton_lip, triton_norm

# Registers a thread at most: of a multiprocessor's 65,536, so that 5 and 3 programs of 128 threads run at once, and 2
# and 1 of 512 threads.
CEILINGS = {"forward_kernel": 96, "backward_kernel": 136, "norm_forward_kernel": 64, "norm_backward_kernel": 128}


def narrow(row: compiled.Compiled) -> int:
    """Loads and stores of fewer than 16 bytes a thread."""
    return sum(count for opcode, count in row.memory.items() if not opcode.endswith(".128"))


def check(rows, parameters=0):
    """No spill, registers below the ceiling, 16 bytes a load but for ``parameters`` loads and stores per channel."""
    for row in rows:
        assert row.spilled == 0, row
        assert row.registers <= CEILINGS[row.name], row
        assert narrow(row) <= parameters, row
        assert row.memory.keys() & {"LDG.E.128", "LDG.E.EF.128"}, row


@pytest.mark.parametrize("capability", [80, 90])
def test_channels_last_in_bfloat16(capability):
    """What trains: 16 bytes a load and store, nothing spilled, a ceiling of registers, on an A100 and an H100."""
    with compiled.compile_only(capability) as rows:
        compiled.lip2d(triton_lip, (16, 64, 56, 56), torch.bfloat16, "channels_last", (3, 2, 1))
    check(rows)
    with compiled.compile_only(capability) as rows:
        compiled.instance_norm(triton_norm, (128, 64, 40, 40), torch.bfloat16, "channels_last", "gate")
    check(rows, parameters=6)


def test_contiguous_in_bfloat16():
    with compiled.compile_only(90) as rows:
        compiled.lip2d(triton_lip, (16, 64, 56, 56), torch.bfloat16, "contiguous", (3, 2, 1))
        compiled.instance_norm(triton_norm, (128, 64, 40, 40), torch.bfloat16, "contiguous", "gate")
    assert [row.spilled for row in rows] == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_site(capability, dtype):
    """Channels-last: the channels and sizes of LIP-ResNet-50's maps, with every activation."""
    for channels, size in ((64, 112), (128, 56), (256, 28), (1024, 14)):
        with compiled.compile_only(capability) as rows:
            compiled.lip2d(triton_lip, (2, channels, size, size), dtype, "channels_last", (3, 2, 1))
        check(rows)
        for batch in (1, 128):
            for activation in ("none", "relu", "gate"):
                with compiled.compile_only(capability) as rows:
                    shape = (batch, channels, size, size)
                    compiled.instance_norm(triton_norm, shape, dtype, "channels_last", activation)
                check(rows, parameters=8)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_window_compiles(layout):
    """Windows and strides up to the limits: code small enough to compile in seconds."""
    largest, furthest = dispatch.MAX_KERNEL_SIZE, dispatch.MAX_GPU_STRIDE
    pairs = [(1, furthest), (3, 1), (3, furthest), (4, 1), (5, 1), (5, 3), (7, 2), (7, 4), (largest, 1)]
    for kernel_size, stride in [*pairs, (largest, furthest)]:
        window = (kernel_size, stride, kernel_size // 2)
        with compiled.compile_only(90) as rows:
            compiled.lip2d(triton_lip, (2, 64, 24, 24), torch.bfloat16, layout, window)
        assert max(row.instructions for row in rows) < 10_000, (window, rows)
