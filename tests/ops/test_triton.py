"""The Triton kernels on a machine without a GPU: run by Triton's interpreter, and compiled for GPUs."""

import pytest
import torch
from helpers import old_interpreter, run_python
from helpers.operator_cases import LAYOUTS
from torch._subclasses.fake_tensor import FakeTensorMode

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
    """Both Triton kernels, run on the CPU by Triton's interpreter, against the slow loops.

    Not in bfloat16: the interpreter truncates where a GPU rounds, which at least doubles the error.
    """
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    code = """
        import warnings
        import torch
        from helpers.lip_oracle import relative_error, slow_lip2d
        from helpers.operator_cases import LAYOUTS, make
        from lip_resnet.ops import triton_lip
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, on masked values
        tolerances = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3}
        cases = [
            ((1, 20, 7, 6), (3, 2, 1), 0, 12), ((1, 3, 4, 5), (2, 2, 0), 0, 12), ((1, 5, 5, 4), (3, 1, 1), -80, 80),
            ((1, 3, 11, 8), (5, 3, 2), 0, 12), ((1, 3, 8, 7), (3, 4, 1), 6, 6), ((2, 3, 1, 1), (3, 2, 1), 0, 12),
        ]
        for layout, memory_format in LAYOUTS.items():
            for number, (shape, window, low, high) in enumerate(cases):
                for dtype, tolerance in list(tolerances.items())[: 3 if number == 0 else 1]:
                    x, logits = (t.detach() for t in make(shape, dtype, layout, low, high))
                    h, w = ((size + 2 * window[2] - window[0]) // window[1] + 1 for size in shape[2:])
                    y = torch.empty((*shape[:2], h, w), dtype=dtype, memory_format=memory_format)
                    r = torch.empty_like(y, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                    dy, dx, dl = torch.randn_like(y), torch.empty_like(x), torch.empty_like(logits)
                    triton_lip.forward(x, logits, y, r, window)
                    triton_lip.backward(dy, x, logits, y, r, dx, dl, window)
                    for value, truth in zip((y, dx, dl), slow_lip2d(x, logits, dy, *window), strict=True):
                        if truth.norm() > 1e-9:
                            assert relative_error(value, truth) < tolerance, (layout, shape, window, dtype)
                        else:
                            assert value.abs().max() < 1e-9
    """
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def compile_ahead(kernel, constants, types, default, capability):
    """Compile a Triton kernel for a GPU of this compute capability; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, default) for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_operator_compiles_for_a_gpu(name, channels_last, capability):
    """Machine code for an A100 and an H100."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from lip_resnet.ops import triton_lip

    outer, inner = triton_lip.tile(64, 512)
    constants = {
        "KERNEL": 3,
        "STRIDE": 2,
        "PADDING": 1,
        "CHANNELS_LAST": channels_last,
        "SUM": triton_lip.SUMS[torch.float32],
    }
    constants |= {"OUTER": outer, "INNER": inner} | ({"OFFSETS": 4} if name == "backward_kernel" else {})
    types = dict.fromkeys(("x", "logits", "y", "dy", "dx", "dl"), "*bf16") | {"r": "*fp32"}
    compile_ahead(getattr(triton_lip, name), constants, types, "i32", capability)


@old_interpreter
def test_instance_norm_in_the_interpreter():
    """Forward and backward, run by Triton's interpreter, against PyTorch's instance norm in float64 and autograd.

    Not in bfloat16, which the interpreter truncates where a GPU rounds.
    """
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    code = """
        import itertools
        import torch
        from helpers.lip_oracle import relative_error
        from helpers.operator_cases import LAYOUTS
        from lip_resnet.ops import norm, triton_norm
        triton_norm.ELEMENTS = 256  # several tiles of positions, and of channels
        after = {"none": lambda t: t, "relu": torch.relu, "gate": lambda t: 12 * torch.sigmoid(t)}
        types = [(torch.float64, torch.float64, 1e-10), (torch.float32, torch.float32, 1e-5)]
        types += [(torch.float16, torch.float32, 1e-3)]
        for layout, activation, (dtype, own, tolerance), shape in itertools.product(
            LAYOUTS.values(), norm.ACTIVATIONS, types, [(2, 20, 7, 5), (1, 35, 1, 2), (2, 3, 20, 20)]
        ):
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
            out, dz = torch.empty_like(z), torch.empty_like(z)
            mean, rstd, sum_g, sum_gz = (norm._empty_statistics(z) for _ in range(4))
            code = norm.ACTIVATIONS[activation]
            triton_norm.norm_forward(z, weight, bias, out, mean, rstd, code, 1e-5, 12.0)
            triton_norm.norm_backward(dy, z, weight, bias, mean, rstd, dz, sum_g, sum_gz, code, 12.0)
            for value, truth in zip((out, dz, sum_gz.sum(0), sum_g.sum(0)), truths, strict=True):
                assert relative_error(value, truth) < tolerance, (layout, activation, dtype, shape)
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


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["norm_forward_kernel", "norm_backward_kernel"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_instance_norm_compiles_for_a_gpu(name, channels_last, capability):
    """Machine code for an A100 and an H100, with bfloat16 features and float32 weights."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from lip_resnet.ops import triton_lip, triton_norm

    positions, channels = triton_norm.tile(256, 128, 784, channels_last)
    constants = {"ACTIVATION": 2, "CHANNELS_LAST": channels_last, "SUM": triton_lip.SUMS[torch.float32]}
    constants |= {"POSITIONS": positions, "CHANNELS": channels}
    types = dict.fromkeys(("z", "out", "dout", "dz"), "*bf16") | dict.fromkeys(("C", "area"), "i32")
    constants |= {"COEFFICIENT": 12.0} | ({"EPS": 1e-5} if name == "norm_forward_kernel" else {})
    compile_ahead(getattr(triton_norm, name), constants, types, "*fp32", capability)
