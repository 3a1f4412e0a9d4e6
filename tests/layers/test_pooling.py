"""The downsampling layers against PyTorch's own or an explicit formula, and what they have in common."""

import pytest
import torch
import torch.nn.functional as F

from lip_resnet.layers.downsampling import DOWNSAMPLING, LogitOptions, make_layer
from lip_resnet.layers.logits import Gate, InstanceNorm2d, ProjectionLogits
from lip_resnet.layers.pooling import LIP2d, logit_parameters
from lip_resnet.ops.lip import lip2d

WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 2, 0), (5, 2, 2), (7, 4, 3)]


def features(channels: int = 4, height: int = 13, width: int = 10) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)).double()


def close(got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=rtol * want.std().item())


def windows(x: torch.Tensor, kernel: int, stride: int, padding: int, outside: float) -> torch.Tensor:
    """(B, C, h, w, kernel * kernel): every window, with ``outside`` in the padding."""
    x = F.pad(x, (padding,) * 4, value=outside)
    return x.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)


# ------------------------------------------------------------------------------------------------------- the theory


@pytest.mark.parametrize("window", WINDOWS)
def test_constant_logits_are_average_pooling(window):
    x = features()
    close(lip2d(x, torch.full_like(x, -3.7), *window), F.avg_pool2d(x, *window, count_include_pad=False))


@pytest.mark.parametrize("window", WINDOWS)
def test_growing_scale_converges_to_max_pooling(window):
    x = features()
    errors = [(lip2d(x, a * x, *window) - F.max_pool2d(x, *window)).abs().max().item() for a in (1, 10, 100, 1e4, 1e6)]
    assert errors == sorted(errors, reverse=True)
    # A window's two largest values differ by d; the error is at most (k^2 - 1) * d * exp(-a * d) <= k^2 / (e * a).
    assert errors[-1] <= window[0] ** 2 / (2.718 * 1e6)


@pytest.mark.parametrize("window", [window for window in WINDOWS if window[0] < 2 * window[1]])  # one sample in each
def test_grid_importance_is_strided_sampling(window):
    x = features()
    layer = make_layer("strided", 4, *window)
    on_grid = torch.full_like(x, -800.0)  # exp(-800) = 0 in float64
    on_grid[..., layer.first :: window[1], layer.first :: window[1]] = 0
    close(lip2d(x, on_grid, *window), layer(x))


@pytest.mark.parametrize(
    ("kernel", "padding", "first"), [(1, 0, 0), (2, 0, 0), (3, 1, 0), (3, 0, 1), (4, 1, 0), (5, 1, 1)]
)
def test_strided_sampling_takes_the_upper_left_of_two_centres(kernel, padding, first):
    x = features()
    assert torch.equal(make_layer("strided", 4, kernel, 2, padding)(x)[..., 0, 0], x[..., first, first])


def test_strided_sampling_is_a_strided_convolution():
    x, weight = features(), torch.randn(5, 4, 3, 3).double()
    close(make_layer("strided", 5)(F.conv2d(x, weight, padding=1)), F.conv2d(x, weight, stride=2, padding=1))


@pytest.mark.parametrize("window", WINDOWS)
def test_softpool_is_lip_with_logits_x(window):
    x = features()
    importance = windows(x, *window, outside=-torch.inf).exp()
    want = (importance * windows(x, *window, outside=0.0)).sum(-1) / importance.sum(-1)
    close(make_layer("softpool", 4, *window)(x), want)
    close(make_layer("softpool", 4, *window)(x), lip2d(x, x, *window))


# ------------------------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("window", WINDOWS)
def test_max_and_averages(window):
    x = features()
    close(make_layer("max", 4, *window)(x), F.max_pool2d(x, *window))
    close(make_layer("average", 4, *window)(x), windows(x, *window, outside=torch.nan).nanmean(-1))
    stride = window[1]
    average = make_layer("strided_average", 4, *window)(x)
    close(average[..., 1, 1], x[..., stride : 2 * stride, stride : 2 * stride].mean((2, 3)))


def test_blur_is_the_binomial_filter():
    """[1, 2, 1] / 4 along each axis over a reflected border, every second position."""
    x = features()
    filtered = F.pad(x, (1, 1, 1, 1), mode="reflect")
    filtered = (filtered[:, :, :-2] + 2 * filtered[:, :, 1:-1] + filtered[:, :, 2:]) / 4
    filtered = (filtered[..., :-2] + 2 * filtered[..., 1:-1] + filtered[..., 2:]) / 4
    close(make_layer("blur", 4).double()(x), filtered[..., ::2, ::2])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["mixed", "gated"])
def test_mixed_and_gated_by_their_formula(name, window):
    x = features()
    layer = make_layer(name, 4, *window).double()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    logit = layer.mix
    if name == "gated":
        logit = logit + (windows(x, *window, outside=0.0) * layer.mask.flatten()).sum(-1)
    share = 1 / (1 + torch.exp(-logit))
    mean = windows(x, *window, outside=torch.nan).nanmean(-1)
    close(layer(x), share * windows(x, *window, outside=-torch.inf).amax(-1) + (1 - share) * mean)


def test_detail_preserving_by_its_formula():
    x = features()
    layer = make_layer("detail_preserving", 4).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.log_alpha)
    torch.nn.init.normal_(layer.log_lambda)
    detail = x - windows(x, 3, 1, 1, outside=torch.nan).nanmean(-1)
    importance = layer.log_alpha.exp() + (detail**2 + 1e-6).sqrt() ** layer.log_lambda.exp()
    values, weight = windows(x, 3, 2, 1, outside=0.0), windows(importance, 3, 2, 1, outside=0.0)
    close(layer(x), (values * weight).sum(-1) / weight.sum(-1))


@pytest.mark.parametrize("name", DOWNSAMPLING)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_layer_has_one_shape_and_gradients(name, window):
    torch.manual_seed(0)
    if DOWNSAMPLING[name].only_stride_2 and window[1] != 2:
        with pytest.raises(ValueError, match=f"{name}: stride 4; it must be 2"):
            make_layer(name, 4, *window)
        return
    layer = make_layer(name, 4, *window)
    for parameter in layer.parameters():  # zero weights would stop the gradients of earlier parameters
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    x = features().float().requires_grad_()
    y = layer(x)
    assert y.shape == F.avg_pool2d(x, *window).shape
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("name", [name for name in DOWNSAMPLING if name.startswith("lip")])
@pytest.mark.parametrize("window", WINDOWS)
def test_lip_layers_start_as_average_pooling(name, window):
    x = features()
    close(make_layer(name, 4, *window).double()(x), F.avg_pool2d(x, *window, count_include_pad=False))


@pytest.mark.parametrize("name", DOWNSAMPLING)
def test_bfloat16_and_float16(name):
    """Against float32 on the same values: three rounding errors (2^-8, 2^-11) of the largest value."""
    torch.manual_seed(0)
    layer = make_layer(name, 4)
    if isinstance(layer, LIP2d):
        torch.nn.init.normal_(layer.logits.conv.weight, std=0.1)
    for dtype, epsilon in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        low, x = make_layer(name, 4).to(dtype), features().to(dtype)
        low.load_state_dict(layer.state_dict())
        full = make_layer(name, 4)
        full.load_state_dict(low.state_dict())
        y = low(x)
        assert y.dtype == dtype
        # LIP's logits are rounded too: an error of up to 12 * epsilon in the exponent of the weights.
        bound = (3 + 12 * isinstance(layer, LIP2d)) * epsilon * x.abs().max().item()
        assert (y.float() - full(x.float())).abs().max().item() <= bound


# ----------------------------------------------------------------------------------------- logit modules, bad input


def test_instance_norm_by_its_formula():
    torch.manual_seed(0)
    x, norm = features().float(), InstanceNorm2d(4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
    want = (x - mean) / (variance + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    close(norm(x), want, 1e-6)
    close(norm.double()(x.double()), want.double(), 1e-6)
    last = x.contiguous(memory_format=torch.channels_last)
    assert norm.float()(last).is_contiguous(memory_format=torch.channels_last)
    for activation in (torch.nn.ReLU(), Gate(5.0), torch.nn.SiLU(), torch.nn.Identity()):
        close(norm(x, activation), activation(want), 1e-6)


def test_gate_bounds_the_logits():
    z = torch.tensor([-100.0, 0.0, 100.0])
    assert Gate(5.0)(z).tolist() == [0.0, 2.5, 5.0]
    assert not any(isinstance(m, Gate) for m in make_layer("lip", 4, options=LogitOptions(gate=None)).modules())


@pytest.mark.parametrize("name", ["lip_simplified", "lip_bottleneck"])
def test_options_of_the_logits(name):
    """The gate's bound, and the width between the convolutions; `logit_parameters` are the last convolution's."""
    layer = make_layer(name, 4, options=LogitOptions(width=16, gate=3.0))
    assert [module.coefficient for module in layer.modules() if isinstance(module, Gate)] == [3.0]
    convolutions = [module for module in layer.modules() if isinstance(module, torch.nn.Conv2d)]
    channels = [(conv.in_channels, conv.out_channels) for conv in convolutions]
    assert channels == ([(4, 4)] if name == "lip_simplified" else [(4, 16), (16, 16), (16, 4)])
    assert list(logit_parameters(torch.nn.Sequential(layer))) == [convolutions[-1].weight]
    default = make_layer(name, 4)
    assert [module.coefficient for module in default.modules() if isinstance(module, Gate)] == [12.0]  # published


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_logits_are_computed_again_in_the_backward_alone(recompute):
    layer, calls = make_layer("lip_projection", 4), []
    layer.recompute = recompute
    layer.logits.register_forward_hook(lambda *_: calls.append(1))
    x = features().float().requires_grad_()
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1
    y = layer(x)
    assert len(calls) == 2
    y.sum().backward()
    assert len(calls) == 2 + recompute


def test_bottleneck_by_its_formula():
    """gate(norm(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x)))))))))"""
    torch.manual_seed(0)
    x, logits = features(), make_layer("lip_bottleneck", 4, options=LogitOptions(width=3, gate=5.0)).logits.double()
    for parameter in logits.parameters():
        torch.nn.init.normal_(parameter)

    def norm(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=1e-5)

    y = norm(F.conv2d(x, logits.conv1.weight), logits.norm1).relu()
    y = norm(F.conv2d(y, logits.conv2.weight, padding=1), logits.norm2).relu()
    close(logits(x), 5 * norm(F.conv2d(y, logits.conv.weight), logits.norm).sigmoid())


def test_feature_map_of_one_position():
    with pytest.raises(ValueError, match=r"1x1 feature map.*too small"):
        make_layer("lip", 4)(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "lipp"}, "'lipp', did you mean lip"),
        ({"name": "lip_"}, "known: lip, lip_projection"),
        ({"name": "max", "kernel_size": 2, "padding": 2}, "kernel_size 2, stride 2, padding 2 do not fit"),
        ({"name": "strided", "kernel_size": 2, "padding": 1}, "do not fit"),
        ({"name": "blur", "kernel_size": 1, "padding": 0}, "do not fit"),
        ({"name": "lip", "kernel_size": 0}, "do not fit"),
        ({"name": "lip", "stride": 0}, "do not fit"),
        ({"name": "lip", "kernel_size": 2.0}, "integers, not 2.0"),
    ],
)
def test_layer_arguments_out_of_range(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_layer(channels=4, **keywords)


@pytest.mark.parametrize("name", [name for name in DOWNSAMPLING if name.startswith("lip")])
def test_lip_sees_every_position(name):
    """The paper's criterion; PyTorch's own layers and ``lip2d`` follow avg_pool2d, which allows gaps."""
    with pytest.raises(ValueError, match="kernel_size 2 is smaller than stride 3"):
        make_layer(name, 4, 2, 3)
    x = features()
    assert make_layer("average", 4, 2, 3)(x).shape == lip2d(x, x, 2, 3, 0).shape


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (7, 3)])
def test_default_padding_by_hand(kernel, padding):
    """Half of what the window has beside its centre, rounded down: an even window leans to the right."""
    x = features()
    want = F.avg_pool2d(x, kernel, 1, padding, count_include_pad=False)
    for layer in (make_layer("average", 4, kernel, 1), LIP2d(ProjectionLogits(4).double(), kernel, 1)):
        close(layer(x), want)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"module": "conv"}, "logit module 'conv'"),
        ({"width": 0}, "bottleneck width 0"),
        ({"width": 64.0}, "bottleneck width 64.0"),
        ({"gate": -1.0}, "gate coefficient -1.0"),
        ({"gate": float("inf")}, "gate coefficient inf"),
        ({"gate": "12"}, "gate coefficient '12'"),
    ],
)
def test_logit_options_out_of_range(keywords, message):
    with pytest.raises(ValueError, match=message):
        LogitOptions(**keywords)
