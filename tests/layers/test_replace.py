"""Replacing the downsampling layers of timm's and torchvision's networks."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from lip_resnet import replace_downsampling
from lip_resnet.layers.downsampling import DOWNSAMPLING, LogitOptions
from lip_resnet.layers.placement import SITES
from lip_resnet.layers.pooling import LIP2d

NETWORKS = {
    # network: the layers with which it computes the same as before, and how many are replaced.
    "alexnet": ({"image": "strided", "main": "max"}, 4),
    "vgg11_bn": ({"main": "max"}, 5),
    "mobilenet_v3_small": ({"image": "strided", "main": "strided"}, 5),
    "timm:mobilenetv3_small_050": ({"image": "strided", "main": "strided"}, 5),
    "regnet_x_400mf": ({"image": "strided", "main": "strided", "shortcut": "strided"}, 9),
    "timm:regnetx_002": ({"image": "strided", "main": "strided", "shortcut": "strided"}, 9),
    "timm:efficientnet_b0": ({"image": "strided", "main": "strided"}, 5),
    "convnext_tiny": ({"image": "strided", "main": "strided"}, 4),
    "timm:convnext_atto": ({"image": "strided", "transition": "strided"}, 4),
    "resnet18": ({"image": "strided", "stem": "max", "main": "strided", "shortcut": "strided"}, 8),
    "timm:resnet18": ({"image": "strided", "stem": "max", "main": "strided", "shortcut": "strided"}, 8),
    "densenet121": ({"image": "strided", "stem": "max", "transition": "average"}, 5),
    "timm:densenet121": ({"image": "strided", "stem": "max", "transition": "average"}, 5),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"))
    if name == "vgg11_bn":  # without its classifier of 120 million weights, which would take most of the time
        with torch.device("meta"):
            features = torchvision.models.vgg11_bn().features
        for module in features.to_empty(device="cpu").modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    return torchvision.models.get_model(name, weights=None)


@pytest.mark.parametrize("name", NETWORKS)
def test_equivalent_layers_leave_the_outputs_unchanged(name):
    layers, count = NETWORKS[name]
    model = network(name).double().eval()
    keys, x = list(model.state_dict()), torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        report = replace_downsampling(model, layers)
        got = model(x)
    assert len(report.swapped) == count, str(report)
    assert not report.kept
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * want.std().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_lip_in_any_network(name):
    """The output shape and the weights do not change, and gradients reach every parameter of the new layers."""
    model = network(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = replace_downsampling(model, "lip")
    lips = [module for module in model.modules() if isinstance(module, LIP2d)]
    assert len(lips) == len(report.swapped) == NETWORKS[name][1] - ("image" in NETWORKS[name][0])
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    for module in model.modules():  # some networks initialise the last BN of a block to zero
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    y = model.train()(torch.randn(2, 3, 96, 96))
    assert y.shape == (2, 1000)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for lip in lips for p in lip.parameters())
    assert all(lip.logits.conv.weight.grad.any() for lip in lips)


def test_a_layer_for_every_site_of_resnet50():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    report = replace_downsampling(model, {"stem": "lip", "main": "lip", "shortcut": "average"})
    assert report.kept == {"conv1": "no layer was chosen for the site 'image'"}
    assert report.swapped == {
        "maxpool": "stem, MaxPool2d 3/2 -> lip_simplified",
        **{f"layer{i}.0.conv2": "main, Conv2d 3/2 -> lip" for i in (2, 3, 4)},
        **{f"layer{i}.0.downsample.0": "shortcut, Conv2d 1/2 -> average" for i in (2, 3, 4)},
    }
    assert isinstance(model.layer2[0].conv2.pool, LIP2d)
    assert isinstance(model.layer2[0].downsample[0].pool, nn.AvgPool2d)
    assert str(report).startswith("7 replaced, 1 kept\n  maxpool: stem, ")


@pytest.mark.parametrize("name", ["downsample", "shortcut", "proj", "skip"])
def test_site_of_a_branch_by_its_name(name):
    """Beside a strided layer of its block it is a shortcut; alone, a transition between stages."""

    class Block(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, stride, padding=1)
            setattr(self, name, nn.Conv2d(8, 8, 1, 2))

        def forward(self, x):
            return getattr(self, name)(x) + nn.functional.adaptive_avg_pool2d(self.conv(x), 16)

    for stride, site in ((2, "shortcut"), (1, "transition")):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(stride))
        report = replace_downsampling(model, "average", input_size=(3, 32, 32))
        assert report.swapped[f"1.{name}"].startswith(f"{site}, ")


@pytest.mark.parametrize("layer", DOWNSAMPLING)
def test_every_layer_in_resnet18(layer):
    model = network("timm:resnet18").eval()
    replace_downsampling(model, dict.fromkeys(SITES, layer))
    assert model(torch.randn(1, 3, 97, 64)).shape == (1, 1000)


def test_convolution_with_a_rectangular_kernel():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (3, 1), 2, padding=(1, 0)))
    x = torch.randn(1, 3, 32, 30)
    want = model(x)
    report = replace_downsampling(model, "strided", input_size=(3, 32, 32))
    assert report.swapped == {"1": "main, Conv2d (3, 1)/2 -> strided"}
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    "keywords",
    [{"dilation": 2}, {"groups": 4}, {"bias": False}, {"padding": 1, "padding_mode": "reflect"}, {"kernel_size": 5}],
    ids=str,
)
def test_the_convolution_keeps_its_arguments(keywords):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, stride=2, **{"kernel_size": 3, **keywords}))
    x = torch.randn(1, 3, 33, 30)
    want = model(x)
    assert replace_downsampling(model, "strided", input_size=(3, 32, 32)).swapped
    torch.testing.assert_close(model(x), want)


def test_options_reach_the_logits_behind_pools_and_convolutions():
    options = LogitOptions("simplified", gate=3.0)
    for downsampling in (nn.MaxPool2d(2), nn.Conv2d(8, 8, 2, 2)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), downsampling)
        replace_downsampling(model, "lip", input_size=(3, 32, 32), options=options)
        (lip,) = (module for module in model.modules() if isinstance(module, LIP2d))
        assert type(lip.logits).__name__ == "SimplifiedLogits"
        assert lip.logits.gate.coefficient == 3


def test_dtype_device_and_mode_are_the_models():
    model = network("timm:resnet18").bfloat16().eval()
    replace_downsampling(model)
    assert not any(module.training for module in model.modules())
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_kept_layers_have_a_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, 2)
            self.rectangle = nn.Conv2d(8, 8, 3, (2, 1))
            self.flat = nn.MaxPool2d((3, 2), 2)
            self.up = nn.MaxPool2d(2, 2, ceil_mode=True)
            self.dilated = nn.MaxPool2d(2, 2, dilation=2)
            self.unused = nn.MaxPool2d(2)
            self.wide = nn.MaxPool2d(2, 2, padding=1)

        def forward(self, x):
            return self.wide(self.dilated(self.up(self.flat(self.rectangle(self.first(x))))))

    model = Odd()
    reference = copy.deepcopy(model)
    report = replace_downsampling(model, "strided")
    assert not report.swapped
    for name, reason in {
        "first": "'image'", "rectangle": "not square", "flat": "not square", "up": "ceil_mode",
        "dilated": "dilated", "unused": "does not call", "wide": "do not fit",
    }.items():  # fmt: skip
        assert reason in report.kept[name], name
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), reference(x))
    tf = replace_downsampling(network("timm:tf_efficientnet_b0"), "lip")
    assert not tf.swapped
    assert tf.left == tf.kept  # an earlier name
    assert set(tf.kept.values()) == {"Conv2dSame is a subclass whose forward may do more than pool or convolve"}


class Tutorial(nn.Module):
    """One pool module for two calls, a fixed linear layer, one input channel: the CNN of many tutorials."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(channels * 7 * 7, 10)

    def forward(self, x):
        return self.fc(self.pool(self.conv2(self.pool(self.conv1(x)))).flatten(1))


@pytest.mark.parametrize("channels", [16, 8])
def test_a_layer_with_weights_is_not_shared_by_several_calls(channels):
    """Neither where their channels differ, which a forward pass would show, nor where they agree."""
    model, x = Tutorial(channels), torch.randn(2, 1, 28, 28)
    want = model(x)
    report = replace_downsampling(model, "lip", input_size=(1, 28, 28))
    assert not report.swapped
    assert "calls it 2 times" in report.kept["pool"]
    assert torch.equal(model(x), want)
    report = replace_downsampling(model, "average", input_size=(1, 28, 28))
    assert report.swapped == {"pool": "main, MaxPool2d 2/2 -> average"}
    assert model(x).shape == (2, 10)


def test_a_filter_for_other_channels_is_not_shared():
    """Blur has no weights to learn, but one filter for each channel."""
    assert "calls it 2 times" in replace_downsampling(Tutorial(), "blur", input_size=(1, 28, 28)).kept["pool"]


def test_a_layer_under_several_names():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), pool, nn.Sequential(nn.Conv2d(8, 8, 3), pool))
    report = replace_downsampling(model, "lip_projection", input_size=(3, 32, 32))
    assert "calls it 2 times" in report.kept["1"]
    replace_downsampling(model, "softpool", input_size=(3, 32, 32))
    assert type(model[1]).__name__ == "SoftPool"
    assert model[1] is model[2][1]


def test_an_image_that_the_model_does_not_accept():
    model = Tutorial()
    with pytest.raises(ValueError, match=r"Tutorial does not accept an image of \(3, 224, 224\): .*; give input_size="):
        replace_downsampling(model)
    with pytest.raises(ValueError, match=r"an image of \(1, 32, 32\): [^;]*$"):
        replace_downsampling(model, input_size=(1, 32, 32))
    assert type(model.pool) is nn.MaxPool2d


def test_a_model_that_does_not_run_with_the_new_layers_is_unchanged():
    class Reads(nn.Module):
        """Reads an attribute of its second pool, which the new layer does not have."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.MaxPool2d(2)

        def forward(self, x):
            return self.two(self.one(self.stem(x))) * (2 if self.two.ceil_mode else 1)

    model = Reads()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"Reads does not run with the new layers, so it keeps its own: .*ceil_mode"):
        replace_downsampling(model, "lip_projection", input_size=(3, 32, 32))
    assert dict(model.named_modules()) == before


def test_the_report_says_what_cannot_be_seen():
    model = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
    assert "not seen: pooling that a forward method calls as a function" in str(replace_downsampling(model, "max"))


@pytest.mark.parametrize(("stride", "window"), [(2, (3, 2, 1)), (3, (5, 3, 2)), (4, (7, 4, 3))])
def test_window_behind_a_strided_convolution(stride, window):
    """The smallest centred window without a gap."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, stride, stride))
    replace_downsampling(model, "lip_projection", input_size=(3, 32, 32))
    pool = model[1].pool
    assert (pool.kernel_size, pool.stride, pool.padding) == window


def test_a_window_smaller_than_its_stride_keeps_its_layer():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, 3))
    report = replace_downsampling(model, "lip", input_size=(3, 32, 32))
    assert "kernel_size 2 is smaller than stride 3" in report.kept["1"]
    assert replace_downsampling(model, "average", input_size=(3, 32, 32)).swapped


def test_a_kept_layer_leaves_no_trunk_behind():
    model = timm.create_model("resnet26")
    before = model.state_dict().keys()
    lip = {"layer": "lip", "placement": "instead_of_convolution", "kernel_size": 1}
    report = replace_downsampling(model, {"main": lip})
    assert "kernel_size 1 is smaller than stride 2" in report.kept["layer2.0.conv2"]
    assert model.state_dict().keys() == before


def test_models_without_parameters():
    assert replace_downsampling(nn.MaxPool2d(2)).kept == {"": "it is the model itself"}
    model = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
    replace_downsampling(model, "average")
    assert isinstance(model[0], nn.AvgPool2d)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("lipp", "unknown downsampling layer 'lipp', did you mean lip"),
        ({"neck": "lip"}, "unknown site 'neck'; known: image, stem, main, shortcut, transition"),
        ({"stem": "maks"}, "stem: unknown downsampling layer 'maks'"),
    ],
)
def test_unknown_layer_or_site(layers, message):
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(ValueError, match=message):
        replace_downsampling(model, layers)
    assert isinstance(model.maxpool, nn.MaxPool2d)
