"""The operator against the slow loops and closed forms; its dtypes, layouts and errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers.lip_oracle import relative_error, slow_lip2d
from helpers.operator_cases import LAYOUTS, TOLERANCES, WINDOWS, make

from lip_resnet import lip2d


def run(x, logits, window, seed=1):
    """y, dx, dlogits of the operator and of the slow loops, for one random dy."""
    y = lip2d(x, logits, *window)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    dx, dl = torch.autograd.grad(y, (x, logits), dy)
    return (y, dx, dl), slow_lip2d(x, logits, dy, *window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel_size", "stride", "padding", "height", "width"), WINDOWS)
def test_slow_loops(kernel_size, stride, padding, height, width, layout):
    x, logits = make((2, 3, height, width), layout=layout)
    # In a window of one position the share is 1 whatever the logit: the gradient is exactly zero.
    for value, truth in zip(*run(x, logits, (kernel_size, stride, padding)), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)
        if truth.norm() > 1e-9:
            assert relative_error(value, truth) < TOLERANCES[torch.float64]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("low", "high"), [(0.0, 12.0), (-80.0, 80.0), (6.0, 6.0)])
def test_accuracy(dtype, layout, low, high):
    """Each result has its own relative error, so that a large one does not hide a small one."""
    x, logits = make((2, 5, 9, 8), dtype, layout, low, high)
    for value, truth in zip(*run(x, logits, (3, 2, 1)), strict=True):
        assert value.dtype == dtype
        assert relative_error(value, truth) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_kept(dtype, layout):
    x, logits = make((2, 6, 8, 10), dtype, layout)
    y = lip2d(x, logits)
    dx, dl = torch.autograd.grad(y, (x, logits), torch.ones_like(y))
    # float64 uses the reference's calls, whose gradients have the layout that autograd chooses
    for tensor in (y, dx, dl) if dtype != torch.float64 else (y,):
        assert tensor.is_contiguous(memory_format=LAYOUTS[layout])


def test_mixed_layouts_and_views():
    """Logits in another layout than x, and tensors that are views with gaps, give the same numbers."""
    x, logits = make((2, 4, 7, 8))
    expected = slow_lip2d(x, logits, None, 3, 2, 1)
    wide = torch.randn(2, 8, 7, 16, dtype=torch.float64)
    wide[:, ::2, :, ::2] = x.detach()
    for features, importance in [
        (x.detach().to(memory_format=torch.channels_last), logits.detach()),
        (x.detach(), logits.detach().to(memory_format=torch.channels_last)),
        (wide[:, ::2, :, ::2], logits.detach()),
        (x.detach(), logits.detach().transpose(2, 3).contiguous().transpose(2, 3)),
    ]:
        features, importance = features.requires_grad_(), importance.requires_grad_()
        y = lip2d(features, importance)
        # sum() passes an expanded gradient
        dx, dl = torch.autograd.grad(y.sum(), (features, importance))
        for value, truth in zip((y, dx, dl), expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(window, layout):
    x, logits = make((2, 2, 4, 5), layout=layout, low=-2, high=2)
    assert torch.autograd.gradcheck(lambda a, b: lip2d(a, b, *window), (x, logits), eps=1e-6, atol=1e-8, rtol=1e-5)


def test_second_derivative():
    x, logits = make((1, 2, 4, 5), low=-2, high=2)
    assert torch.autograd.gradgradcheck(lip2d, (x, logits), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradient_of_one_input():
    x, logits = make((1, 2, 6, 6))
    _, dx, dl = slow_lip2d(x, logits, None, 3, 2, 1)
    torch.testing.assert_close(torch.autograd.grad(lip2d(x, logits.detach()).sum(), x)[0], dx)
    torch.testing.assert_close(torch.autograd.grad(lip2d(x.detach(), logits).sum(), logits)[0], dl)
    both = (x + 0).detach().requires_grad_()  # SoftPool: x is its own logits
    y, dx, dl = slow_lip2d(both, both, None, 3, 2, 1)
    torch.testing.assert_close(lip2d(both, both), y)
    torch.testing.assert_close(torch.autograd.grad(lip2d(both, both).sum(), both)[0], dx + dl)


@pytest.mark.parametrize(("kernel_size", "stride", "padding", "height", "width"), WINDOWS)
@pytest.mark.parametrize("value", [0.0, 6.0, -1e30, 1e30])
def test_constant_logits_are_average_pooling(kernel_size, stride, padding, height, width, value):
    x, _ = make((2, 3, height, width), torch.float32)
    y = lip2d(x, torch.full_like(x, value), kernel_size, stride, padding)
    average = F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)
    torch.testing.assert_close(y, average, rtol=1e-6, atol=1e-6)


def test_growing_logits_are_max_pooling_and_strided_sampling():
    x, _ = make((2, 3, 8, 8), torch.float32)
    torch.testing.assert_close(lip2d(x, x * 1e4), F.max_pool2d(x, 3, 2, 1))
    grid = torch.full_like(x, -1e4)
    grid[:, :, ::2, ::2] = 1e4  # the centre of every 3x3/2 window
    torch.testing.assert_close(lip2d(x, grid), x[:, :, ::2, ::2])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [12.0, 1e4, None])
def test_huge_logits_stay_finite(dtype, size):
    """Up to the dtype's largest number, of both signs: y is finite and in its window's range, gradients are finite."""
    size = torch.finfo(dtype).max if size is None else size
    x, _ = make((2, 3, 8, 9), dtype)
    logits = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(3)).to(dtype) * size
    logits.requires_grad_()
    y = lip2d(x, logits)
    slack = 1 + 4 * torch.finfo(dtype).eps
    assert (y.abs() <= F.max_pool2d(x.abs().double(), 3, 2, 1) * slack).all()
    for gradient in torch.autograd.grad(y.sum(), (x, logits)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift_invariance(layout):
    x, logits = make((2, 3, 7, 8), torch.float64, layout)
    torch.testing.assert_close(lip2d(x, logits + 1000), lip2d(x, logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_windows(layout, bad):
    x, logits = make((1, 5, 8, 8), torch.float32, layout)
    clean = lip2d(x, logits).detach()
    features = x.detach().clone(memory_format=torch.preserve_format)
    features[0, 2, 3, 3] = bad  # in the windows of rows 1 and 2, columns 1 and 2
    reached = torch.zeros_like(clean, dtype=torch.bool)
    reached[0, 2, 1:3, 1:3] = True
    y = lip2d(features, logits)
    assert not y[reached].isfinite().any()
    torch.testing.assert_close(y[~reached], clean[~reached])
    importance = logits.detach().clone(memory_format=torch.preserve_format)
    importance[0, 2, 3, 3] = float("nan")
    y = lip2d(x, importance)
    assert y[reached].isnan().all()
    torch.testing.assert_close(y[~reached], clean[~reached])


def test_empty_batch_and_deterministic():
    x, logits = make((0, 3, 8, 8), torch.float32)
    y = lip2d(x, logits)
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4)
    assert x.grad.shape == x.shape
    x, logits = make((3, 17, 15, 14), torch.float32)
    first = run(x, logits, (3, 2, 1))[0]
    for _ in range(3):
        y = lip2d(x, logits)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
        for a, b in zip(first, (y, *torch.autograd.grad(y, (x, logits), dy)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("x", "logits", "window", "message"),
    [
        (torch.ones(3, 8, 8), torch.ones(3, 8, 8), (3, 2, 1), r"x has shape \(3, 8, 8\)"),
        (torch.ones(1, 3, 8, 8), torch.ones(1, 1, 8, 8), (3, 2, 1), "must be equal"),
        (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8).double(), (3, 2, 1), "outside autocast"),
        (torch.ones(1, 3, 8, 8).long(), torch.ones(1, 3, 8, 8).long(), (3, 2, 1), "floating point"),
        (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8, device="meta"), (3, 2, 1), "on one device"),
        (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), (0, 2, 0), "kernel_size 0"),
        (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), (3, 0, 1), "stride 0"),
        (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), (3, 2, 2), "padding 2"),
        (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), (3, 2, -1), "padding -1"),
        (torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8), (3, 2, 0), "a window of 3 does not fit 2x8"),
    ],
)
def test_errors(x, logits, window, message):
    with pytest.raises(ValueError, match=message):
        lip2d(x, logits, *window)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout):
    """bfloat16 features with float32 logits, as a norm returns them: y and dx in bfloat16, dlogits in float32."""
    x, logits = make((2, 4, 8, 8), torch.float32, layout)
    features = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = lip2d(features, logits)
    dx, dl = torch.autograd.grad(y.sum(), (features, logits))
    assert (y.dtype, dx.dtype, dl.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for value, truth in zip((y, dx, dl), slow_lip2d(features, logits, None, 3, 2, 1), strict=True):
        # dlogits is computed from the saved y, which is rounded to bfloat16
        assert relative_error(value, truth) < TOLERANCES[torch.bfloat16]
