"""Where layers stand, against networks built in another way: timm's, LIP-ResNet, and hand-written blocks."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lip_resnet
from lip_resnet.config import InputError, ModelConfig
from lip_resnet.layers import PRESETS, LogitOptions, make_layer, replace_downsampling
from lip_resnet.layers.placement import BlockInput, parse_choices
from lip_resnet.models.registry import build_model

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def same(a: nn.Module, b: nn.Module, rtol: float = 0.0) -> None:
    with torch.no_grad():
        one, other = a.eval()(IMAGES), b.eval()(IMAGES)
    torch.testing.assert_close(one, other, rtol=0, atol=rtol * one.std().item())


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" not in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def test_zhang_is_timms_resnetblur50():
    """timm has no blur on shortcuts; else its keys and its outputs are ours, with its weights and after a step."""
    ours, theirs = timm.create_model("resnet50"), timm.create_model("resnetblur50")
    layers = {site: PRESETS["zhang2019"][site] for site in ("stem", "main")}
    replace_downsampling(ours, layers)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs)
    whole = timm.create_model("resnet18")
    report = replace_downsampling(whole, "zhang2019")
    assert report.swapped["layer2.0.downsample.0"] == "shortcut, Conv2d 1/2 -> blur before_convolution"
    assert report.swapped["layer2.0.conv1"] == "main, Conv2d 3/2 -> blur after_activation"
    assert report.swapped["maxpool"] == "stem, MaxPool2d 3/2 -> max_blur"
    assert not report.unused


@pytest.mark.parametrize("options", [LogitOptions(), LogitOptions(width=64), LogitOptions("simplified")])
def test_lip_is_lip_resnet(options):
    ours = timm.create_model("resnet50", num_classes=7)
    keywords = {"bottleneck_width": options.width, "logit_module": options.module}
    theirs = timm.create_model("lip_resnet50", num_classes=7, **keywords)
    report = replace_downsampling(ours, "lip2019", options=options)
    assert report.swapped["layer3.0.conv2"] == "main, Conv2d 3/2 -> lip instead_of_convolution"
    randomize(theirs)
    names = [("maxpool.", "pool."), (".block_input.trunk.", ".trunk."), (".conv2.pool.layer.", ".pool.")]
    names += [(".conv2.pool.", ".pool."), (".downsample.0.pool.layer.", ".downsample.pool.")]
    names += [(".downsample.0.pool.", ".downsample.pool."), (".downsample.0.", ".downsample.conv.")]
    names += [(".downsample.1.", ".downsample.bn.")]
    weights = {}
    for key in ours.state_dict():
        other = key
        for old, new in names:
            other = other.replace(old, new) if old in other else other
        weights[key] = theirs.state_dict()[other]
    ours.load_state_dict(weights)
    assert len(set(weights)) == len(theirs.state_dict())
    same(ours, theirs, 1e-5)
    again = copy.deepcopy(ours)
    nn.init.zeros_(ours.layer2[0].get_submodule("downsample.0").weight)  # a copy has hooks and weights of its own
    same(again, theirs, 1e-5)


def test_flc_before_its_convolution_and_softpool_in_the_stem_alone():
    torch.manual_seed(0)
    model, plain = timm.create_model("resnet18"), timm.create_model("resnet18")
    replace_downsampling(model, "flc2022")
    block, flc = model.layer2[0], make_layer("flc", 64)
    x = torch.randn(1, 64, 16, 16)
    want = F.conv2d(flc(x), block.conv1.weight, padding=1)
    torch.testing.assert_close(block.conv1(x), want)
    torch.testing.assert_close(block.downsample[0](x), F.conv2d(flc(x), block.downsample[0].weight))
    replace_downsampling(plain, "softpool2021")
    assert tuple(plain.maxpool.window) == (2, 2, 0)
    assert plain.layer2[0].conv1.stride == (2, 2)


def test_sites_of_a_stage_and_patterns():
    def swapped(layers) -> dict[str, str]:
        report = replace_downsampling(timm.create_model("resnet18"), layers)
        return {name: what.split("-> ")[1] for name, what in report.swapped.items()}

    assert swapped({"stage3.main": "blur"}) == {"layer3.0.conv1": "blur"}
    both = swapped({"stage4.shortcut": "average", "main": "max"})
    assert both == {f"layer{stage}.0.conv1": "max" for stage in (2, 3, 4)} | {"layer4.0.downsample.0": "average"}
    assert swapped({"layer2.*": "lip", "stage2.main": "max", "layer4.0.conv?": "blur"}) == {
        "layer2.0.conv1": "lip",
        "layer2.0.downsample.0": "lip",
        "layer4.0.conv1": "blur",
    }
    assert replace_downsampling(timm.create_model("resnet18"), {"stage9.main": "max", "layer9.*": "max"}).unused == [
        "stage9.main",
        "layer9.*",
    ]


def test_aps_takes_one_grid_on_both_paths():
    """A residual network with circular padding and APS gives the same class scores for circularly shifted images."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    aps = {"layer": "aps", "placement": "after_activation"}
    layers = {"stem": "aps", "main": aps, "shortcut": aps | {"placement": "before_convolution"}, "image": "aps"}
    replace_downsampling(model, layers)
    lip_resnet.use_circular_padding(model)
    randomize(model)
    model.eval().double()
    # The stem's maximum is shift-equivariant at stride 1 only: APS replaces it.
    with torch.no_grad():
        scores = [model(IMAGES.double().roll(shift, (2, 3))) for shift in ((0, 0), (1, 0), (7, 13), (31, 2))]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-9, atol=1e-9)
    assert not any(module.features is not None for module in model.modules() if isinstance(module, BlockInput))
    strided = timm.create_model("resnet18", num_classes=5).eval().double()
    with torch.no_grad():
        assert (strided(IMAGES.double()) - strided(IMAGES.double().roll(1, 2))).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["lip", "blur", "average", "space_to_depth"])
def test_layers_as_timms_aa_layer(name):
    model = timm.create_model("resnet18", aa_layer=lip_resnet.aa_layer(name), num_classes=3)
    assert model(IMAGES).shape == (2, 3)
    if name == "blur":
        theirs = timm.create_model("resnet18", aa_layer=timm.layers.BlurPool2d, num_classes=3)
        theirs.load_state_dict(model.state_dict())
        same(model, theirs)


def test_a_preset_on_another_kind_of_network():
    """Without a stem's pooling and shortcuts; pooling is replaced where it is, whatever the placement."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    report = replace_downsampling(model, "zhang2019", input_size=(3, 16, 16))
    assert report.unused == ["stem", "shortcut"]
    assert report.swapped == {"1": "main, MaxPool2d 2/2 -> blur"}
    assert "\n  stem: nothing was replaced by this choice\n" in str(report)
    with pytest.raises(InputError, match=r"test_efficientnet has nothing to replace at stem, shortcut$"):
        build_model(ModelConfig(name="test_efficientnet", num_classes=2, downsampling="zhang2019"))


def test_optimizer_gets_new_parameters_in_the_old_groups():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    old = model.layer2[0].conv1.weight
    gone = model.layer3[0].conv1.weight
    layers = {"stage2.main": "lip", "stage3.main": {"layer": "max", "placement": "instead_of_convolution"}}
    replace_downsampling(model, layers, optimizer=optimizer)
    inside = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert inside.keys() == {id(parameter) for parameter in model.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(inside)
    for parameter in model.parameters():
        assert inside[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0)
    assert old in optimizer.state
    assert gone not in optimizer.state
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    model(IMAGES).square().sum().backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"layer3.0.conv1.weight", "layer2.0.conv1.weight", "layer2.0.conv1.pool.logits.conv.0.weight"} & changed


def test_optimizer_with_a_group_for_each_stage():
    """That of the parameter of its name; else of its kind and block: rates and weight decay stay a stage's own."""
    model = timm.create_model("resnet18", num_classes=3)
    kinds = [(stage, matrices) for stage in ("layer1", "layer2", "layer3", "layer4", "") for matrices in (True, False)]
    groups = {kind: [] for kind in kinds}
    for name, parameter in model.named_parameters():
        stage = name.split(".")[0] if name.startswith("layer") else ""
        groups[stage, parameter.dim() > 1].append((name, parameter))
    optimizer = torch.optim.AdamW([{"params": groups[kind], "lr": 0.1 + number} for number, kind in enumerate(kinds)])
    swapped = {"main": {"layer": "lip", "placement": "instead_of_convolution"}, "shortcut": "lip"}
    report = replace_downsampling(model, swapped, optimizer=optimizer)
    assert len(report.swapped) == 6
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        stage = name.split(".")[0] if name.startswith("layer") else ""
        assert rates[id(parameter)] == 0.1 + kinds.index((stage, parameter.dim() > 1)), name
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert all(named[name] is each for name, each in zip(group["param_names"], group["params"], strict=True))


REFUSED = {
    "layer": ({"main": "blurr"}, "main: unknown downsampling layer 'blurr', did you mean blur"),
    "site": ({"mian": "blur"}, "unknown site 'mian', did you mean 'main'"),
    "site of a stage": ({"stage3.mian": "blur"}, "unknown site 'stage3.mian', did you mean 'stage3.main'"),
    "placement": (
        {"main": {"layer": "blur", "placement": "after_activaton"}},
        "unknown placement 'after_activaton', did you mean after_activation",
    ),
    "key": ({"main": {"layer": "blur", "place": "x"}}, "must be a layer or a mapping of layer, placement, kernel_size"),
    "no layer": ({"main": {"placement": "after_activation"}}, "must be a layer or a mapping"),
    "kernel": ({"main": {"layer": "blur", "kernel_size": 0}}, "kernel_size 0; it must be an integer of at least 1"),
    "preset": ("zhang2018", r"preset: zhang2019.* unknown downsampling layer 'zhang2018', did you mean zhang2019\?"),
    "type": ({"main": 3}, "must be a layer or a mapping"),
    "type of a layer": ({"main": {"layer": ["blur"]}}, r"main: unknown downsampling layer \['blur'\]"),
    "type of a site": ({3: "blur"}, "site 3; it must be a name, such as main"),
    "no choice": (None, "downsampling None; it must be a layer, a preset, or a mapping of sites to layers"),
    "a list": (["blur"], r"downsampling \['blur'\]; it must be"),
}


@pytest.mark.parametrize(("layers", "line"), REFUSED.values(), ids=REFUSED)
def test_bad_choices(layers, line):
    model = timm.create_model("resnet18")
    before = str(model)
    with pytest.raises(ValueError, match=line):
        replace_downsampling(model, layers)
    assert str(model) == before


def test_where_a_layer_cannot_stand():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Conv2d(3, 8, 3, padding=1)
            self.patches = nn.Conv2d(8, 8, 2, stride=2)
            self.last = nn.Conv2d(8, 8, 3, stride=2, padding=1)

        def forward(self, x):
            return self.last(self.patches(self.image(x)))

    model = Net()
    report = replace_downsampling(model, {"main": {"layer": "blur", "placement": "after_activation"}})
    assert report.kept == {
        "patches": "at stride 1 its padding (0, 0) changes the size, so the layer must follow it",
        "last": "no convolution at stride 1 in its block reads its activations",
    }


def test_choices_by_precedence():
    choices = parse_choices({"main": "max", "stage3.main": "average", "layer3.1.*": "blur"})
    assert choices.at("layer3.1.conv1", "main", 3)[1].layer == "blur"
    assert choices.at("layer3.0.conv1", "main", 3)[1].layer == "average"
    assert choices.at("layer2.0.conv1", "main", 2)[1].layer == "max"
    assert choices.at("layer2.0.downsample.0", "shortcut", 2) is None
