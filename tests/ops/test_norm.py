"""The instance norm of the logit modules with its activation: in PyTorch's calls, fused, and in its layer."""

import pytest
import torch
from helpers.lip_oracle import relative_error
from helpers.operator_cases import TOLERANCES

from lip_resnet.layers.logits import InstanceNorm2d
from lip_resnet.ops import cpu, norm, reference_norm

EXPECTED = {"none": lambda t: t, "relu": torch.relu, "gate": lambda t: 12 * torch.sigmoid(t)}


def results(function, z, weight, bias, dy):
    """The function's result and its gradients by z, weight and bias."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (z, weight, bias)]
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, dy)


def formula(activation, *inputs):
    """PyTorch's instance norm and activation in float64."""
    return results(
        lambda z, w, b: EXPECTED[activation](torch.nn.functional.instance_norm(z, None, None, w, b)),
        *(t.double().contiguous() for t in inputs),
    )


@pytest.mark.parametrize("backend", [cpu, reference_norm])
@pytest.mark.parametrize("activation", EXPECTED)
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(16, 2, 1), (5, 3, 2), (48, 9, 11), (37, 6, 7), (160, 13, 7), (203, 5, 5)]
)
def test_both_cpu_backends(monkeypatch, backend, activation, channels, height, width):
    """Against PyTorch's norm in float64, with a mean far from zero, in every dtype, also beside float32 weights."""
    monkeypatch.setattr(norm, "_backend", lambda z: backend)
    generator = torch.Generator().manual_seed(0)
    z, dy = (torch.randn(3, channels, height, width, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    for dtype, weight_dtype in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ):
        inputs = [t.to(dtype).to(memory_format=torch.channels_last) for t in (z + 5, dy)]
        inputs[1:1] = weight.to(weight_dtype), bias.to(weight_dtype)
        with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
            outputs = results(lambda *a: norm.norm_act(*a, 1e-5, activation, 12.0), *inputs)
        assert "lip_resnet_instance_norm" in outputs[0].grad_fn.name(), dtype
        truths = formula(activation, *inputs)
        for value, truth, like in zip(outputs, truths, inputs[:1] + inputs[:3], strict=True):
            assert value.dtype == like.dtype
            assert value.stride() == like.stride()
            # with 2 positions dz is a difference of nearly equal numbers
            if height * width > 2 or dtype == torch.float64:
                assert relative_error(value, truth) < (1e-10 if dtype == torch.float64 else TOLERANCES[dtype]), dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [16, 20])
def test_every_path_of_the_layer(dtype, batch, channels):
    """Channels-last output and gradients, against autograd's gradients of the formula."""
    layer = InstanceNorm2d(channels).to(dtype)
    torch.nn.init.normal_(layer.weight)
    z = torch.randn(batch, channels, 5, 4, dtype=torch.float64).to(dtype).to(memory_format=torch.channels_last)
    dy = torch.randn(z.shape, dtype=torch.float64).to(dtype).to(memory_format=torch.channels_last)

    def formula(z, weight, bias):
        centred = z - z.mean((2, 3), keepdim=True)
        scale = (centred.square().mean((2, 3), keepdim=True) + 1e-5).rsqrt()
        return centred * scale * weight[:, None, None] + bias[:, None, None]

    inputs = [t.detach().double().requires_grad_() for t in (z, layer.weight, layer.bias)]
    truth = formula(*inputs)
    y = layer(z.requires_grad_())
    values = y, *torch.autograd.grad(y, (z, layer.weight, layer.bias), dy)
    truths = truth, *torch.autograd.grad(truth, inputs, dy.double())
    for value, expected in zip(values, truths, strict=True):
        assert relative_error(value, expected) < (1e-12 if dtype == torch.float64 else TOLERANCES[dtype])


def test_opcheck_and_second_derivative():
    """PyTorch's own checks of an operator, and the gradient of the gradient."""
    z = torch.randn(2, 16, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.lip_resnet.instance_norm.default, (z, weight, bias, 1e-5, 2, 12.0))
    z = torch.randn(1, 16, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *a: norm.norm_act(*a, 1e-5, "gate", 12.0), (z, weight, bias))


@pytest.mark.parametrize("activation", EXPECTED)
def test_reference_form_elsewhere(activation):
    """Contiguous features use PyTorch's own calls, under autocast too, with the same results."""
    z, dy = torch.randn(2, 20, 5, 6) + 1, torch.randn(2, 20, 5, 6)
    weight, bias = torch.rand(20), torch.rand(20)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = z.to(dtype), weight, bias, dy.to(dtype)
        with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
            outputs = results(lambda *a: norm.norm_act(*a, 1e-5, activation, 12.0), *inputs)
        for value, truth in zip(outputs, formula(activation, *inputs), strict=True):
            assert relative_error(value, truth) < TOLERANCES[dtype], dtype
