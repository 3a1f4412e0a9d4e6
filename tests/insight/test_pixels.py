"""Maps of the pixels and their scores, on networks whose importance is known."""

import functools
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lip_resnet.errors import InputError
from lip_resnet.insight import pixels, probes
from lip_resnet.layers import replace_downsampling
from lip_resnet.layers.pooling import LIP2d

NO_SCALING = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class Brightness(nn.Module):
    """Logits that are a multiple of the features."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.conv = scale, nn.Conv2d(1, 1, 1)  # which LIP2d initialises

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


class Chain(nn.Module):
    """Pools ``depth`` times; the logits of its classes are the colours of what remains."""

    feature_info = ({"module": "layers.0"},)

    def __init__(self, scale: float, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(LIP2d(Brightness(scale)) for _ in range(depth)))
        self.device = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * self.layers(x).mean((2, 3)) + self.device


def dots(count: int, side: int) -> tuple[torch.Tensor, np.ndarray]:
    """Grey images with one white pixel, and its mask."""
    random = np.random.default_rng(0)
    images = torch.full((count, 3, side, side), 10, dtype=torch.uint8)
    masks = np.zeros((count, side, side), dtype=bool)
    for index in range(count):
        row, column = random.integers(0, side, 2)
        images[index, 0, row, column] = 255
        images[index, 1:, row, column] = 250
        masks[index, row, column] = True
    return images, masks


def test_importance_is_the_gradient_of_the_average():
    """With the logits held fixed, a pixel's weight in the mean output is its derivative; average pooling's likewise."""
    images = torch.randint(256, (2, 3, 37, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = Chain(3.0, 3)
    features = (images[:, :1] / 255).double().requires_grad_()
    pooled, averaged = features, features
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1, count_include_pad=False)
    for _ in range(3):
        importance = torch.exp(3 * pooled.detach())
        pooled, averaged = average(pooled * importance) / average(importance), average(averaged)
    (ours,) = torch.autograd.grad(pooled.mean((1, 2, 3)).sum(), features)
    (equal,) = torch.autograd.grad(averaged.mean((1, 2, 3)).sum(), features)
    same = images[:, :1].expand(2, 3, 37, 30).contiguous()
    maps = pixels.pixel_importance(pixels.site_weights(model, same, *NO_SCALING), (37, 30))
    np.testing.assert_allclose(maps, (ours / equal)[:, 0], rtol=1e-4)


def test_known_importance_is_localised():
    """Every window takes the white pixel alone: all of the map is in its box. Gradients of edges surround it."""
    images, masks = dots(6, 32)
    with torch.no_grad():
        scores = probes.localisation_scores(Chain(60.0, 5), images, torch.zeros(6).long(), masks, *NO_SCALING)
    np.testing.assert_allclose(scores["importance"], 1, rtol=1e-4)
    np.testing.assert_allclose(scores["chance"], 1 / 32**2)
    assert scores["edges"].max() < 0.5
    assert scores["site layers.0"][:, 1].max() < 0.2  # outside the dot's windows the first site has weights too
    with torch.no_grad():
        scores = probes.localisation_scores(Chain(0.0, 5), images, torch.zeros(6).long(), masks, *NO_SCALING)
    np.testing.assert_allclose(scores["importance"], scores["chance"], rtol=1e-3)


def test_random_maps_are_chance():
    random = np.random.default_rng(0)
    maps, masks = random.random((4000, 8, 8)), np.zeros((4000, 8, 8), dtype=bool)
    masks[:, 2:6, 1:4] = True
    scores = probes.localise(maps, masks)
    for column in scores.T:
        assert column.mean() == pytest.approx(12 / 64, abs=4 * column.std() / 4000**0.5)
    flat = probes.localise(np.zeros((1, 8, 8)), masks[:1])
    np.testing.assert_allclose(flat, 12 / 64)


def test_deletion_removes_what_counts_first():
    """One white pixel decides: its cell is the first to go, so that the class falls to chance after one step."""
    images, _ = dots(40, 32)
    images[:, 1:] = images[:, 1:].clamp(max=125)
    model = Chain(60.0, 5).eval()
    curves = probes.deletion_curves(model, images, torch.zeros(40).long(), range(40), *NO_SCALING)
    assert curves["importance"].shape == (40, probes.STEPS + 1)
    assert curves["importance"][:, 0].min() > 0.99
    np.testing.assert_allclose(curves["importance"][:, 1:], curves["importance"][:, -1:].repeat(8, 1), atol=0.05)
    # A random order keeps the white pixel's cell for half of the way, on average.
    left = (curves["random"] > 0.9).mean(0)
    np.testing.assert_allclose(left, np.linspace(1, 0, probes.STEPS + 1), atol=4 * 0.5 / 40**0.5)
    constant = probes.deletion_curves(Chain(0.0, 5).eval(), images, torch.zeros(40).long(), range(40), *NO_SCALING)
    np.testing.assert_array_equal(constant["importance"], constant["random"])
    halves = [probes.deletion_curves(model, images[part], None, range(40)[part], *NO_SCALING)["random"]
              for part in (slice(0, 7), slice(7, 40))]  # fmt: skip
    np.testing.assert_allclose(np.concatenate(halves), curves["random"], rtol=1e-5)  # no batch has a part in it


def test_edges():
    images = torch.zeros(1, 3, 5, 6, dtype=torch.uint8)
    images[..., 3:] = 100
    expected = np.zeros((1, 5, 6))
    expected[..., 2:4] = 400
    np.testing.assert_allclose(pixels.edge_strength(images), expected, rtol=1e-5)


def test_networks():
    """Sites in parallel, a network with strided convolutions between its sites, and one without any."""
    images = torch.randint(256, (2, 3, 70, 64), dtype=torch.uint8)
    for name in ("lip_resnet18", "resnet18"):
        model = timm.create_model(name, num_classes=3)
        sites = pixels.site_weights(model, images, *NO_SCALING)
        maps = pixels.pixel_importance(sites, (70, 64))
        assert maps.shape == (2, 70, 64)
        assert maps.min() >= 0
        assert all(not module._forward_hooks for module in model.modules())
        if name == "lip_resnet18":  # logits of an untrained network are equal
            np.testing.assert_allclose(maps, 1, rtol=1e-4)
    replace_downsampling(model, {"stem": "blur"})
    with pytest.raises(InputError, match=r"ResNet has no layer that weighs by content .*; it has blur"):
        pixels.site_weights(model, images, *NO_SCALING)


def test_grad_cam_of_a_linear_network():
    """Of one convolution and the mean of its channels as classes: the channel itself over the number of positions."""
    pytest.importorskip("captum")

    class Linear(nn.Module):
        feature_info = ({"module": "conv"}, {"module": "pool"})

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pool(self.conv(x)).flatten(1)

    model, inputs = Linear(), torch.randn(2, 3, 6, 6)
    classes = torch.tensor([1, 0])
    maps = pixels.grad_cam(model, inputs, classes)
    channel = model.conv(inputs)[torch.arange(2), classes].detach().numpy()
    np.testing.assert_allclose(maps, channel.clip(0) / 36, rtol=1e-4, atol=1e-7)


def test_grad_cam_is_left_out_without_captum(monkeypatch):
    images, masks = dots(1, 32)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    scores = probes.localisation_scores(Chain(1.0, 2), images, torch.zeros(1).long(), masks, *NO_SCALING)
    assert {name for name in scores if not name.startswith("site ")} == {"importance", "edges", "mirrored", "chance"}
