"""Importance maps of networks whose logits are known."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lip_resnet.errors import InputError
from lip_resnet.insight import importance_maps, sites_of
from lip_resnet.layers import make_layer, replace_downsampling
from lip_resnet.layers.pooling import LIP2d

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
    "layer", [nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d((3, 2), 2), nn.MaxPool2d(2, 2, dilation=2)]
)
def test_windows_that_have_no_map_are_no_sites(layer):
    assert not sites_of(pooled_by(layer))
