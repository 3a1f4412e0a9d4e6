"""Importance maps of networks whose logits are known."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lip_resnet.errors import InputError
from lip_resnet.insight import importance_maps, sites_of
from lip_resnet.insight.weights import WEIGHINGS
from lip_resnet.insight.windows import example_window
from lip_resnet.layers import make_layer, replace_downsampling
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.ops.lip import lip2d

PHOTOGRAPHS = torch.randint(256, (2, 3, 41, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Known(nn.Module):
    """Logits that are the first channel of the features times ``scale``."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x[:, :1].expand_as(x)


def pooled_by(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), layer)


def test_maps_of_known_logits():
    """Every window by hand, in float64 and plain loops."""
    torch.manual_seed(0)
    model = pooled_by(LIP2d(Known(0.8)))
    (maps,) = importance_maps(model, PHOTOGRAPHS, mean=(0, 0, 0), std=(1, 1, 1))
    with torch.no_grad():
        features = model[0](PHOTOGRAPHS / 255).double().numpy()
    logits = 0.8 * features[:, 0]
    height, width = logits.shape[1:]
    weight, entropy = np.zeros_like(logits), np.zeros((2, (height + 1) // 2, (width + 1) // 2))
    for image, i, j in np.ndindex(entropy.shape):
        rows = [r for r in range(2 * i - 1, 2 * i + 2) if 0 <= r < height]
        columns = [c for c in range(2 * j - 1, 2 * j + 2) if 0 <= c < width]
        values = np.exp(logits[image][np.ix_(rows, columns)])
        values /= values.sum()
        weight[image][np.ix_(rows, columns)] += values
        entropy[image, i, j] = -(values * np.log(values)).sum() / math.log(values.size)
    np.testing.assert_allclose(maps.weight[:, 0], weight, rtol=1e-4)
    np.testing.assert_allclose(maps.entropy[:, 0], entropy, rtol=1e-4)
    expected = np.exp(logits - logits.max((1, 2), keepdims=True))
    np.testing.assert_allclose(maps.importance[:, 0], expected, rtol=1e-4)
    assert maps.weight.sum() == pytest.approx(entropy.size, rel=1e-5)  # each window's weights sum to 1
    assert maps.logit_mean == pytest.approx(logits.mean(), rel=1e-4)
    assert maps.name == "1"
    equal = importance_maps(pooled_by(make_layer("average", 3)), PHOTOGRAPHS)[0].weight
    np.testing.assert_allclose(maps.relative_weight, maps.weight / equal, rtol=1e-5)


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (5, 3, 2)])
@pytest.mark.parametrize("name", WEIGHINGS)
def test_weights_of_compared_layers_are_the_jacobian_s(name, window):
    """By autograd through the layer itself: d sum(y) / d x, with SoftPool's own weights held fixed."""
    torch.manual_seed(0)
    model, layer = pooled_by(LIP2d(Known(0.8), *window)), make_layer(name, 3, *window)
    own, maps = importance_maps(model, PHOTOGRAPHS, compare=[name], channels=[0, 1, 2])
    features = (PHOTOGRAPHS / 255 - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) / torch.tensor(
        (0.229, 0.224, 0.225)
    ).view(3, 1, 1)
    features = model[0](features).detach().requires_grad_()
    y = lip2d(features, features.detach(), *window) if name == "softpool" else layer(features)
    (weight,) = torch.autograd.grad(y.sum(), features)
    np.testing.assert_allclose(maps.weight, weight, rtol=1e-4, atol=1e-6)
    assert (own.layer, maps.layer, own.name, maps.name) == ("lip", name, "1", "1")
    if name != "blur":
        assert np.nanmax(maps.relative_weight) <= window[0] ** 2 + 1e-4
    # The same as of a network that has the layer.
    model[1] = layer
    (installed,) = importance_maps(model, PHOTOGRAPHS, channels=[0, 1, 2])
    np.testing.assert_allclose(installed.weight, maps.weight, rtol=1e-5)
    np.testing.assert_allclose(installed.entropy, maps.entropy, rtol=1e-5)
    assert installed.layer == name


def test_entropy_of_blur_and_strided():
    """By hand: two independent draws of (1/4, 1/2, 1/4); one sure position."""
    binomial = -2 * (0.5 * math.log(0.25) + 0.5 * math.log(0.5)) / math.log(9)
    for name, entropy in (("blur", binomial), ("strided", 0.0)):
        (maps,) = importance_maps(pooled_by(make_layer(name, 3)), PHOTOGRAPHS)
        np.testing.assert_allclose(maps.entropy, entropy, atol=1e-6)
        assert np.isnan(maps.importance).all()
        assert math.isnan(maps.logit_mean)


def test_features_are_read_before_they_are_changed_in_place():
    torch.manual_seed(0)
    plain = pooled_by(make_layer("softpool", 3))

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = plain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            y = self.pool(x)
            x.zero_()
            return y

    (expected,), (maps,) = (importance_maps(model, PHOTOGRAPHS) for model in (plain, InPlace()))
    np.testing.assert_array_equal(maps.weight, expected.weight)
    assert maps.entropy.mean() < 1


def test_a_compiled_network_a_bfloat16_one_and_modes_of_modules():
    torch.manual_seed(0)
    model = pooled_by(LIP2d(Known(0.8)))
    (expected,) = importance_maps(model, PHOTOGRAPHS)
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        compiled(PHOTOGRAPHS / 255)  # its graph has no hooks, and fits what importance_maps calls
    (maps,) = importance_maps(compiled, PHOTOGRAPHS)
    np.testing.assert_array_equal(maps.weight, expected.weight)
    model.train()
    model[0].eval()  # as a frozen batch norm is
    (low,) = importance_maps(model.bfloat16(), PHOTOGRAPHS)
    np.testing.assert_allclose(low.weight, expected.weight, atol=0.05)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_an_example_window_is_one_of_the_network_s():
    """Its features and weights, read from the maps' own layer at the place that it names."""
    torch.manual_seed(0)
    model = pooled_by(LIP2d(Known(0.8)))
    example = example_window(model, PHOTOGRAPHS[0], "1", mean=(0, 0, 0), std=(1, 1, 1))
    with torch.no_grad():
        features = model[0](PHOTOGRAPHS[0] / 255)
    inside = (slice(example.top, example.top + 3), slice(example.left, example.left + 3))
    values = features[example.channel][inside]
    assert example.map_size == (41, 56)
    torch.testing.assert_close(example.features, values)
    logits = torch.exp(0.8 * features[0][inside])
    torch.testing.assert_close(example.weights["lip"], logits / logits.sum(), rtol=1e-4, atol=0)
    row, column = (example.top + 1) // 2, (example.left + 1) // 2
    assert example.output("lip") == pytest.approx(model(PHOTOGRAPHS[:1] / 255)[0, example.channel, row, column].item())
    outputs = {"average": values.mean(), "max": values.max(), "strided": values[1, 1]}
    for name, output in outputs.items():
        assert example.output(name) == pytest.approx(output.item(), rel=1e-5), name
    assert example.output("softpool") == pytest.approx((values.exp() * values).sum().item() / values.exp().sum().item())
    assert example.entropy == pytest.approx(example.mean_entropy, abs=1e-3)
    assert example_window(model, PHOTOGRAPHS[0, :, :2, :2], "1") is None


@pytest.mark.parametrize(("name", "entropy"), [("average", 1.0), ("max", 0.0)])
def test_entropy_of_average_and_max(name, entropy):
    (maps,) = importance_maps(pooled_by(make_layer(name, 3)), PHOTOGRAPHS)
    np.testing.assert_allclose(maps.entropy, entropy, atol=1e-6)
    assert maps.weight.sum() == pytest.approx(3 / 3 * maps.entropy.size, rel=1e-5)
    (softer,) = importance_maps(pooled_by(make_layer("softpool", 3)), PHOTOGRAPHS)
    assert 0 < softer.entropy.mean() < 1


@pytest.mark.parametrize("name", ["lip_resnet18", "resnet18"])
def test_networks_under_autocast_and_features_only(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    if name == "resnet18":
        replace_downsampling(model, {"main": "softpool", "shortcut": "detail_preserving"})
    for module in model.modules():
        if isinstance(module, LIP2d):
            nn.init.normal_(module.logits.get_submodule("conv").weight, std=0.1)
    before = [len(module._forward_hooks) for module in model.modules()]
    images = torch.randint(256, (1, 3, 96, 64), dtype=torch.uint8)
    maps = importance_maps(model.train(), images)
    assert [each.name for each in maps] == list(sites_of(model))
    assert model.training
    assert [len(module._forward_hooks) for module in model.modules()] == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = importance_maps(model, images)
    np.testing.assert_allclose(low[0].weight, maps[0].weight, atol=0.1)
    features = timm.create_model(name, features_only=True, num_classes=3)
    if name == "lip_resnet18":
        assert len(importance_maps(features, images)) == len(maps)


def test_channels_and_sites():
    model = timm.create_model("lip_resnet18", num_classes=3)
    (maps,) = importance_maps(model, PHOTOGRAPHS, sites=["pool"], channels=[0, 5])
    assert maps.importance.shape == (2, 2, 21, 28)
    assert maps.entropy.shape == (2, 2, 11, 14)
    with pytest.raises(InputError, match=r"no site 'pol'; this network has pool, layer2"):
        importance_maps(model, PHOTOGRAPHS, sites=["pol"])
    with pytest.raises(InputError, match=r"pool: channels \[64\]; it has 0 to 63"):
        importance_maps(model, PHOTOGRAPHS, sites=["pool"], channels=[64])


def test_networks_and_images_that_cannot_be_shown():
    strided = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2))
    with pytest.raises(InputError, match=r"Sequential has no layer of local weights.*it downsamples by Conv2d"):
        importance_maps(strided, PHOTOGRAPHS)
    for images in (PHOTOGRAPHS.float(), PHOTOGRAPHS[0], PHOTOGRAPHS[:, :1]):
        with pytest.raises(InputError, match=r"must be \(B, 3, H, W\) torch.uint8"):
            importance_maps(pooled_by(make_layer("max", 3)), images)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d((3, 2), 2),
        nn.MaxPool2d(2, 2, dilation=2),
        nn.AvgPool2d(3, 2, padding=1),  # counts the zeros of the padding
        timm.layers.BlurPool2d(3, pad_mode="constant"),
    ],
)
def test_windows_that_have_no_map_are_no_sites(layer):
    assert not sites_of(pooled_by(layer))
