"""The instance norm of the logit modules with its activation: in PyTorch's calls, fused, and in its layer."""

import pytest
import torch
from helpers.lip_oracle import relative_error

from lip_resnet.layers.logits import InstanceNorm2d
from lip_resnet.ops import norm


@pytest.mark.parametrize("backend", ["built", "reference"])
@pytest.mark.parametrize("activation", norm.ACTIVATIONS)
@pytest.mark.parametrize(("channels", "height", "width"), [(16, 2, 1), (48, 9, 11), (160, 13, 7)])
def test_both_cpu_backends(monkeypatch, backend, activation, channels, height, width):
    """Against PyTorch's instance norm and activation, with a mean far from zero, in float64 and float32."""
    monkeypatch.setattr(norm, "_is_built_for", lambda z: backend == "built")
    expected_activation = {"none": lambda t: t, "relu": torch.relu, "gate": lambda t: 12 * torch.sigmoid(t)}[activation]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64) + 5]
    values += [torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2)]
    dy = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)

    def results(function, dtype):
        inputs = [v.to(dtype) for v in values]
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)
        inputs = [v.requires_grad_() for v in inputs]
        y = function(*inputs)
        return y, *torch.autograd.grad(y, inputs, dy.to(dtype))

    truths = results(
        lambda z, w, b: expected_activation(torch.nn.functional.instance_norm(z, None, None, w, b)), torch.float64
    )
    for dtype in (torch.float64, torch.float32):
        outputs = results(lambda z, w, b: norm.norm_act(z, w, b, 1e-5, activation, 12.0), dtype)
        assert "lip_resnet_instance_norm" in outputs[0].grad_fn.name()
        for value, truth in zip(outputs, truths, strict=True):
            assert value.is_contiguous(
                memory_format=torch.channels_last if value.dim() == 4 else torch.contiguous_format
            )
            # float32: with 2 positions dz is a difference of nearly equal numbers
            if height * width > 2 or dtype == torch.float64:
                assert relative_error(value, truth) < (1e-10 if dtype == torch.float64 else 1e-5)


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
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert relative_error(value, expected) < tolerance


def test_opcheck_and_second_derivative():
    """PyTorch's own checks of an operator, and the gradient of the gradient."""
    z = torch.randn(2, 16, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.lip_resnet.instance_norm.default, (z, weight, bias, 1e-5, 2, 12.0))
    z = torch.randn(1, 16, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *a: norm.norm_act(*a, 1e-5, "gate", 12.0), (z, weight, bias))


def test_reference_form_elsewhere():
    """Contiguous features and autocast use PyTorch's own calls, with the same results."""
    weight, bias = torch.rand(20), torch.rand(20)
    z = torch.randn(2, 20, 5, 6).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.instance_norm(z, None, None, weight, bias).relu()
    for features in (z, z.contiguous()):
        torch.testing.assert_close(norm.norm_act(features, weight, bias, 1e-5, "relu"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = norm.norm_act(z.bfloat16(), weight, bias, 1e-5, "relu")
    torch.testing.assert_close(low.float(), expected, rtol=2e-2, atol=2e-2)
