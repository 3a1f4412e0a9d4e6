"""The checks of tests/gpu on the CPU: each passes, and fails on what it is for."""

import pytest
import torch
from helpers import device_operators, device_steps
from torch.nn.parallel import DistributedDataParallel

from lip_resnet import make_layer
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.ops import dispatch
from lip_resnet.training import ddp

fused = pytest.mark.skipif(not dispatch.available("cpu"), reason="no C++ compiler: no fused operator on the CPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operators(dtype, layout):
    device_operators.check_operator("cpu", dtype, layout, (2, 19, 7, 6), (3, 2, 1))
    device_operators.check_operator("cpu", dtype, layout, (1, 3, 4, 3), (1, 2, 0))
    device_operators.check_repeats("cpu", dtype, layout, (2, 5, 7, 6))
    device_operators.check_large("cpu", layout, (9, 4, 6, 6), dtype)
    if dtype == torch.float32:
        device_operators.check_norm("cpu", dtype, layout, "gate", (2, 16, 7, 5))
        device_operators.check_site("cpu", dtype, 2, 16, 14)


@fused
def test_an_element_that_is_not_written_is_seen(monkeypatch):
    backend = dispatch._backend("cpu")
    forward = backend.forward

    def partial(x, logits, y, r, window):
        before = y[-1, -1].clone()
        forward(x, logits, y, r, window)
        y[-1, -1, -1, -1] = before[-1, -1]

    monkeypatch.setattr(backend, "forward", partial)
    with pytest.raises(AssertionError, match="y: elements not written"):
        device_operators.check_operator("cpu", torch.float32, "channels_last", (2, 5, 7, 6), (3, 2, 1))


@fused
def test_compile_captures_the_operators(monkeypatch):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), make_layer("lip_bottleneck", 32))
    device_operators.check_capture("cpu", network, 8)
    monkeypatch.setattr(dispatch, "must_decompose", lambda: True)
    with pytest.raises(AssertionError, match="lip2d"):
        device_operators.check_capture("cpu", network, 8)


def test_steps():
    device_steps.check_skipped_step("cpu", "bfloat16")
    device_steps.check_no_synchronisation("cpu", "float32")
    device_steps.check_step_repeats("cpu", "float32")
    device_steps.check_prefetch("cpu")


@fused
def test_layout_copies(monkeypatch):
    device_steps.check_no_layout_copy("cpu", "float32")
    original = LIP2d._pool
    monkeypatch.setattr(LIP2d, "_pool", lambda self, x, source: original(self, x.contiguous(), source))
    with pytest.raises(AssertionError, match="aten::clone"):
        device_steps.check_no_layout_copy("cpu", "float32")


def test_ddp_strides(monkeypatch, tmp_path):
    device_steps.check_ddp_strides("cpu", tmp_path)

    class Late(DistributedDataParallel):  # the layout changes after DDP has made its buckets
        def __init__(self, module, **options):
            super().__init__(module.to(memory_format=torch.contiguous_format), **options)
            module.to(memory_format=torch.channels_last)

    monkeypatch.setattr(ddp, "DistributedDataParallel", Late)
    with pytest.raises((UserWarning, AssertionError)):
        device_steps.check_ddp_strides("cpu", tmp_path)
