"""The Triton kernels on a machine without a GPU: run by Triton's interpreter, and chosen for fake GPU tensors."""

import numpy
import pytest
import torch
from helpers import old_interpreter, run_python
from helpers.operator_cases import LAYOUTS
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from lip_resnet import lip2d
from lip_resnet.layers.logits import Gate, InstanceNorm2d
from lip_resnet.ops import dispatch, norm


def test_reference_form_where_triton_does_not_start(monkeypatch):
    """Triton is installed, but no compiler for its driver: a one-line warning, not a traceback in the forward pass."""

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    triton = pytest.importorskip("triton.runtime", reason="Triton is published for Linux only")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "driver", Driver())
    dispatch._available.cache_clear()
    with pytest.warns(UserWarning, match=r"reference form, .*: Triton does not start: Failed to find C"):
        assert dispatch.available("cuda") is False
    dispatch._available.cache_clear()


def test_operator_in_the_interpreter():
    """Both Triton kernels, run on the CPU by Triton's interpreter, against the slow loops: every window, every dtype.

    Outputs start as NaN, so that a position that is not written fails. The interpreter truncates to bfloat16 where a
    GPU rounds; so bfloat16's outputs are computed in float32 and rounded by PyTorch.
    """
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    code = """
        import warnings
        import torch
        from helpers.lip_oracle import relative_error, slow_lip2d
        from helpers.operator_cases import LAYOUTS, TOLERANCES, WINDOWS, make
        from lip_resnet.ops import triton_lip
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, on masked values

        def check(shape, window, dtype, layout, low=0, high=12, logits_dtype=None):
            x, logits = (t.detach() for t in make(shape, dtype, layout, low, high))
            logits = logits.to(logits_dtype or dtype)
            h, w = ((size + 2 * window[2] - window[0]) // window[1] + 1 for size in shape[2:])
            empty = torch.empty((*shape[:2], h, w), dtype=dtype).to(memory_format=LAYOUTS[layout])
            computed = torch.float32 if dtype == torch.bfloat16 else dtype
            sixteen = x.dtype.itemsize == logits.dtype.itemsize == 2
            r_dtype = torch.float16 if sixteen else max(dtype, torch.float32, key=lambda d: d.itemsize)
            y, top, r = (torch.full_like(empty, torch.nan, dtype=d) for d in (computed, logits.dtype, r_dtype))
            dx, dl = (torch.full_like(t, torch.nan, dtype=computed) for t in (x, logits))
            dy = torch.randn_like(empty)
            triton_lip.forward(x, logits, y, top, r, window)
            y = y.to(dtype)
            triton_lip.backward(dy, x, logits, y, top, r, dx, dl, window)
            tolerance = max(TOLERANCES[dtype], TOLERANCES[logits.dtype])
            for value, truth in zip((y, dx, dl), slow_lip2d(x, logits, dy, *window), strict=True):
                if truth.norm() > 1e-9:
                    assert relative_error(value.to(dtype), truth) < tolerance, (layout, shape, window, dtype, low, high)
                else:
                    assert value.abs().max() < 1e-9

        for layout in LAYOUTS:
            for *window, height, width in WINDOWS:
                check((1, 3, height, width), tuple(window), torch.float64, layout)
            check((1, 20, 7, 6), (3, 2, 1), torch.float64, layout)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for low, high in ((0, 12), (-80, 80), (6, 6)):
                    check((1, 5, 9, 8), (3, 2, 1), dtype, layout, low, high)
            for low, high in ((1e4, 1e4 + 12), (-3e38, -3e38)):
                check((1, 3, 7, 6), (3, 2, 1), torch.float32, layout, low, high)
            check((1, 3, 7, 6), (3, 2, 1), torch.bfloat16, layout, logits_dtype=torch.float32)
            check((1, 3, 7, 6), (3, 2, 1), torch.float32, layout, logits_dtype=torch.bfloat16)
    """
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_windows_that_compile_for_minutes_use_the_plain_form(monkeypatch):
    """On a GPU alone: a cell has a piece of code for each of its stride x stride positions."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    monkeypatch.setenv("LIP_KERNELS", "auto")
    dispatch._available.cache_clear()
    with FakeTensorMode():
        for device in ("cuda", "cpu"):
            x = torch.empty(1, 2, 40, 40, device=device)
            assert dispatch.supports(x, x, 8, 8)
            assert not dispatch.supports(x, x, 9, 2)
            assert dispatch.supports(x, x, 3, 9) == (device == "cpu")
            name = type(lip2d(x.requires_grad_(), x, 3, 9, 1).grad_fn).__name__
            assert ("lip_resnet" in name) == (device == "cpu")
    dispatch._available.cache_clear()


@old_interpreter
def test_instance_norm_in_the_interpreter():
    """Forward and backward, run by Triton's interpreter, against PyTorch's instance norm in float64 and autograd.

    Not in bfloat16, which the interpreter truncates where a GPU rounds.
    """
    triton = pytest.importorskip("triton", reason="Triton is published for Linux only")
    if triton.__version__.startswith("3.6.") and Version(numpy.__version__) >= Version("2.5"):
        pytest.skip("the interpreter of Triton 3.6 makes numbers of arrays of one element, which numpy 2.5 refuses")
    code = """
        import itertools
        import torch
        from helpers.lip_oracle import relative_error
        from helpers.operator_cases import LAYOUTS
        from lip_resnet.ops import norm, triton_norm
        tile = triton_norm.tile
        after = {"none": lambda t: t, "relu": torch.relu, "gate": lambda t: 12 * torch.sigmoid(t)}
        types = [(torch.float64, torch.float64, 1e-10), (torch.float32, torch.float32, 1e-5)]
        types += [(torch.float16, torch.float32, 1e-3)]
        for layout, activation, (dtype, own, tolerance), shape in itertools.product(
            LAYOUTS.values(), norm.ACTIVATIONS, types, [(2, 20, 7, 5), (1, 35, 1, 2), (1, 3, 40, 33)]
        ):
            # several tiles of positions, the last one partly outside, and several blocks of channels
            triton_norm.tile = (lambda *_: (16, 8, 4)) if shape == (2, 20, 7, 5) else tile
            if shape != (2, 20, 7, 5) and (dtype != torch.float64 or activation != "gate"):
                continue  # with two positions dz is a difference of nearly equal numbers: float64 only
            generator = torch.Generator().manual_seed(0)
            z = torch.randn(shape, generator=generator, dtype=torch.float64) + 5
            z = z.to(dtype).contiguous(memory_format=layout)
            weight, bias = (torch.randn(shape[1], generator=generator, dtype=own) for _ in range(2))
            # contiguous: PyTorch's gradient of one channels-last image is wrong
            inputs = [t.double().contiguous().requires_grad_() for t in (z, weight, bias)]
            y = after[activation](torch.nn.functional.instance_norm(inputs[0], None, None, *inputs[1:]))
            dy = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
            truths = y, *torch.autograd.grad(y, inputs, dy.double().contiguous())
            out, dz = (torch.full_like(z, torch.nan) for _ in range(2))
            mean, rstd, sum_g, sum_gz = (norm._empty_statistics(z) for _ in range(4))
            code = norm.ACTIVATIONS[activation]
            triton_norm.norm_forward(z, weight, bias, out, mean, rstd, code, 1e-5, 12.0)
            triton_norm.norm_backward(dy, z, weight, bias, mean, rstd, dz, sum_g, sum_gz, code, 12.0)
            for value, truth in zip((out, dz, sum_gz.sum(0), sum_g.sum(0)), truths, strict=True):
                assert relative_error(value, truth) < tolerance, (layout, activation, dtype, shape)
            if dtype == torch.float32:  # an infinity is NaN in its whole map, as in PyTorch, and nowhere else
                before, z = out.clone(), z.detach().clone(memory_format=torch.preserve_format)
                z[0, 1, -1, -1] = torch.inf
                triton_norm.norm_forward(z, weight, bias, out, mean, rstd, code, 1e-5, 12.0)
                assert out[0, 1].isnan().all(), (layout, activation)
                assert torch.equal(out[0, 2:], before[0, 2:]) and torch.equal(out[1:], before[1:])
    """
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instance_norm_on_fake_gpu_tensors(monkeypatch, dtype, layout):
    """The layer calls the operator, which keeps dtype and layout in the forward and backward pass."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    monkeypatch.setenv("LIP_KERNELS", "auto")
    dispatch._available.cache_clear()
    with FakeTensorMode():
        layer = InstanceNorm2d(20, device="cuda")
        z = torch.empty(2, 20, 8, 6, dtype=dtype, device="cuda").contiguous(memory_format=LAYOUTS[layout])
        y = layer(z.requires_grad_(), Gate())
        assert "lip_resnet_instance_norm" in y.grad_fn.name()
        statistics = [torch.empty(2, 20, device="cuda") for _ in range(2)]
        dz, dweight, _ = norm.instance_norm_backward(y, z, layer.weight, layer.bias, *statistics, 2, 12.0)
        for t in (y, dz):
            assert t.dtype == dtype
            assert t.is_contiguous(memory_format=LAYOUTS[layout])
        assert dweight.dtype == torch.float32
    dispatch._available.cache_clear()
