"""The layers that are no weighted mean of a window, each against its equation written another way, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from torch import Tensor, nn

from lip_resnet.layers.downsampling import DOWNSAMPLING, make_layer
from lip_resnet.ops.lip import lip2d


def features(channels: int = 4, height: int = 13, width: int = 10) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)).double()


def layer_of(name: str, channels: int = 4, *window: int) -> nn.Module:
    """In float64 and evaluation mode, with random weights."""
    torch.manual_seed(0)
    layer = make_layer(name, channels, *window).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


def close(got: Tensor, want: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=rtol * want.std().item())


def test_max_blur_is_timms_blur_of_the_maximum_at_stride_1():
    x = features()
    want = BlurPool2d(4, 3, 2).double()(F.max_pool2d(x, 3, stride=1, padding=1))
    close(layer_of("max_blur")(x), want)


@pytest.mark.parametrize("p", [1.5, 2.0, 6.0])
def test_lp_is_torchs(p):
    """torch's lp_pool2d sums without padding; ours is a mean, at a p that is set."""
    x, layer = features() * 1e3, layer_of("lp", 4, 3, 2, 0)
    nn.init.constant_(layer.rho, math.log(math.expm1(p - 1)))
    close(layer(x), F.lp_pool2d(x.abs(), p, 3, 2) / 9 ** (1 / p), 1e-6)  # the layer computes in float32
    assert (1 + F.softplus(make_layer("lp", 4).rho)).flatten().tolist() == pytest.approx([2.0] * 4, rel=1e-4)


def test_ordinal_between_minimum_mean_and_maximum():
    x, layer = features(), layer_of("ordinal")
    windows = F.pad(x, (1,) * 4, mode="replicate").unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    nn.init.zeros_(layer.ranks)
    close(layer(x), windows.mean(-1))
    layer.ranks.data[:, -1] = 1e3
    close(layer(x), windows.amax(-1))
    close(layer(x), F.max_pool2d(x, 3, 2, 1))
    layer.ranks.data[:, 0] = 2e3
    close(layer(x), windows.amin(-1))


def test_haar_bands_keep_the_energy():
    x = features(4, 8, 6)
    low = layer_of("haar")(x)
    close(low, (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 2)
    layer = layer_of("haar_conv")
    layer.conv = layer.bn = nn.Identity()
    bands = torch.cat([layer(x), layer(-x)], 1)  # ReLU keeps the positive part of each
    assert bands.square().sum().item() == pytest.approx(x.square().sum().item())
    close(layer(x.abs())[:, ::4], layer_of("haar")(x.abs()))


def test_space_to_depth_and_patch_merge_drop_nothing():
    x = features(3, 8, 6)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    layer = layer_of("space_to_depth", 3)
    want = torch.einsum("bkhw,ck->bchw", blocks, layer.conv.weight.flatten(1))
    close(layer(x), want)
    layer = layer_of("patch_merge", 3)
    mean, variance = blocks.mean(1, keepdim=True), blocks.var(1, keepdim=True, unbiased=False)
    normed = (blocks - mean) / (variance + layer.norm.eps).sqrt()
    normed = normed * layer.norm.weight.view(-1, 1, 1) + layer.norm.bias.view(-1, 1, 1)
    close(layer(x), torch.einsum("bkhw,ck->bchw", normed, layer.conv.weight.flatten(1)))


def test_flc_keeps_low_frequencies_and_removes_high_ones():
    rows, columns = torch.arange(16.0).view(-1, 1), torch.arange(24.0).view(1, -1)

    def wave(down: int, across: int) -> Tensor:
        phase = 2 * math.pi * (down * rows / 16 + across * columns / 24)
        return (1 + torch.cos(phase + 0.3)).reshape(1, 1, 16, 24)

    layer = make_layer("flc", 1)
    for down, across in ((0, 0), (3, 0), (2, 5), (3, -5)):
        torch.testing.assert_close(layer(wave(down, across)), wave(down, across)[..., ::2, ::2], rtol=0, atol=1e-5)
    for down, across in ((5, 0), (0, 7), (7, 11)):
        torch.testing.assert_close(layer(wave(down, across)), torch.ones(1, 1, 8, 12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (3, 5), (2, 4)])
def test_aps_moves_with_its_input(shift):
    """A circular shift of the input shifts the output; the layer's output is one of the grids."""
    x, layer = features(4, 8, 12), layer_of("aps", 4)
    y, moved = layer(x), layer(x.roll(shift, (2, 3)))
    grids = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    norms = torch.stack([grid.square().sum((1, 2, 3)) for grid in grids], 1)
    for image in range(2):
        assert torch.equal(y[image], grids[norms[image].argmax()][image])
        shifts = [(a, b) for a in range(4) for b in range(6)]
        assert any(torch.equal(moved[image], y[image].roll(each, (1, 2))) for each in shifts)
    # The shortcut takes the grid of the main path.
    other = features(3, 8, 12).flip(0)
    chosen = layer(other, reference=x)
    for image in range(2):
        index = int(norms[image].argmax())
        assert torch.equal(chosen[image], other[image, :, index // 2 :: 2, index % 2 :: 2])


def test_pasa_by_unfolding():
    x, layer = features(8), layer_of("pasa", 8)
    layer.groups = 8  # made for 8 channels: one each
    weights = layer.bn(layer.conv(x))
    batch, _, h, w = weights.shape
    weights = weights.reshape(batch, 8, 9, h, w).softmax(2)
    windows = F.pad(x, (1,) * 4, mode="reflect").unfold(2, 3, 2).unfold(3, 3, 2).flatten(4).permute(0, 1, 4, 2, 3)
    close(layer(x), (weights * windows).sum(2), 1e-6)  # the layer's softmax is in float32
    assert make_layer("pasa", 64).conv.weight.numel() == 648 * 64


def test_self_attentive_by_torchs_attention():
    """Maps that patches of 4x4 fill exactly, and one image row of patches, where upsampling is known."""
    x, layer = features(6, 12, 8), layer_of("self_attentive", 6)
    logits = layer.logits
    attention = nn.MultiheadAttention(128, 4, bias=False, batch_first=True).double()
    attention.in_proj_weight.data = logits.qkv.weight.flatten(1)
    nn.init.eye_(attention.out_proj.weight)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2)
    tokens = patches @ logits.embed.weight.flatten(1).T + logits.embed.bias
    mixed = attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(2, 128, 3, 2)
    restored = F.conv2d(F.interpolate(mixed, size=(12, 8), mode="bilinear"), logits.conv.weight, logits.conv.bias)
    close(logits(x), restored.sigmoid(), 1e-9)
    close(layer(x), lip2d(x, restored.sigmoid(), 3, 2, 1), 1e-9)
    assert logits(features(6, 13, 9)).shape == (2, 6, 13, 9)


def test_adapool_by_unfolding():
    x, layer = features(), layer_of("adapool")
    windows = F.pad(x, (1,) * 4, value=math.nan).unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)
    mean = windows.nanmean(-1, keepdim=True)
    weights = (2 * (windows * mean).abs() / (windows**2 + mean**2)).exp()
    similar = (weights * windows).nansum(-1) / weights.nansum(-1)
    soft = (windows.exp() * windows).nansum(-1) / windows.exp().nansum(-1)
    b = layer.mix.sigmoid()
    close(layer(x), b * similar + (1 - b) * soft, 1e-6)  # the layer computes in float32
    assert torch.equal(layer(torch.zeros_like(x)), torch.zeros_like(soft))


def test_adown_and_scdown_by_hand():
    x = features(6, 9, 8)

    def conv(block: nn.Sequential, features: Tensor, **keywords) -> Tensor:
        y = F.conv2d(features, block[0].weight, **keywords)
        return F.batch_norm(y, block[1].running_mean, block[1].running_var, block[1].weight, block[1].bias)

    layer = layer_of("adown", 6)
    mean = (F.pad(x, (0, 1, 0, 1), mode="replicate").unfold(2, 2, 1).unfold(3, 2, 1)).mean((-1, -2))
    strided = F.silu(conv(layer.strided, mean[:, :3], stride=2, padding=1))
    pointwise = F.silu(conv(layer.pointwise, F.max_pool2d(mean[:, 3:], 3, 2, 1)))
    close(layer(x), torch.cat([strided, pointwise], 1))
    layer = layer_of("scdown", 6)
    close(layer(x), conv(layer[2], F.silu(conv(layer[0], x)), stride=2, padding=1, groups=6))


@pytest.mark.parametrize("name", DOWNSAMPLING)
def test_layouts_and_odd_sizes(name):
    """Channels-last in, channels-last out, the same values; sizes of either parity, and maps of 2x2."""
    layer = layer_of(name, 16).float()
    for height, width in ((13, 10), (8, 9), (2, 2)):
        x = features(16, height, width).float()
        y = layer(x)
        assert y.shape == F.avg_pool2d(x, 3, 2, 1).shape
        last = layer(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, y, rtol=1e-4, atol=1e-4)
        assert last.is_contiguous(memory_format=torch.channels_last if height > 2 else torch.contiguous_format)
        assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)  # no view of something larger
