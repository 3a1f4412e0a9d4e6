"""Networks by name: errors, initialisation and exact counts."""

import hashlib

import pytest
import timm
import torch
from helpers import small_config

from lip_resnet.commands import initial_weights
from lip_resnet.commands.initial_weights import load_initial_weights
from lip_resnet.config import InputError, ModelConfig
from lip_resnet.evaluation import cost
from lip_resnet.layers import pooling
from lip_resnet.models import registry
from lip_resnet.models.weights import hash_weights


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [  # the reference's own counts, and timm's for the baselines
        ("lip_resnet50", 23_864_232, 5.300e9),
        ("lip_resnet101", 42_856_360, 9.012e9),
        ("resnet50", 25_557_032, 4.089e9),
        ("resnet101", 44_549_160, 7.801e9),
    ],
)
def test_counts(name, params, macs):
    model = registry.create_model(name)
    assert cost.count_parameters(model) == params
    assert cost.count_macs(model, 224) == pytest.approx(macs, rel=2e-4)


@pytest.mark.parametrize("name", ["lip_resnet50", "resnet50"])
def test_initialisation_is_the_same_for_both(name):
    model = registry.build_model(ModelConfig(name=name))
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not model.fc.bias.any()
    last = [block.bn3.weight for stage in (model.layer1, model.layer4) for block in stage]
    assert not any(weight.any() for weight in last)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.03)  # fan out


def test_unknown_names_and_keywords():
    with pytest.raises(InputError, match="near names: lip_resnet50"):
        registry.create_model("lip_resnet5O")
    with pytest.raises(InputError, match="colour"):
        registry.create_model("resnet50", colour="red")


def test_defects_keep_their_own_error(monkeypatch):
    """A missing package is an InputError; a failure without keywords too, or at the default image size too, is not."""

    def network(*_, **__):
        raise failure

    monkeypatch.setattr(timm, "create_model", network)
    failure = ModuleNotFoundError("No module named 'flash'")
    with pytest.raises(
        InputError, match=r"resnet18 needs a package that is not installed here: No module named 'flash'"
    ):
        registry.create_model("resnet18")
    failure = RuntimeError("shapes of our own making")
    with pytest.raises(RuntimeError, match="shapes of our own making"):
        registry.create_model("resnet18", num_classes=3)
    monkeypatch.undo()
    model = registry.create_model("test_resnet")
    model.bn1.forward = network
    with pytest.raises(RuntimeError, match="shapes of our own making"):
        registry.check_size(model, 64)


def test_drop_path_reaches_the_model():
    model = registry.build_model(ModelConfig(name="lip_resnet50"), drop_path_rate=0.1)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.1)
    with pytest.raises(InputError, match="drop_path_rate"):
        registry.build_model(ModelConfig(name="vgg11"), drop_path_rate=0.1)


def test_too_small_images():
    model = registry.create_model("lip_resnet50")
    registry.check_size(model, 32)
    with pytest.raises(InputError, match=r"16x16.*too small"):
        registry.check_size(model, 16)
    assert not any(p.is_meta for p in model.parameters())


def test_fine_tuning_starts_from_the_weights(tmp_path):
    torch.save(registry.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "seven.pth")
    config = ModelConfig(name="test_resnet", num_classes=10, weights=str(tmp_path / "seven.pth"), new_head=True)
    model = registry.build_model(config)
    record = load_initial_weights(model, config)
    assert record["training"] is None
    assert record["sha256"] == hashlib.sha256((tmp_path / "seven.pth").read_bytes()).hexdigest()
    state = torch.load(tmp_path / "seven.pth", weights_only=True)
    assert torch.equal(model.conv1[0].weight, state["conv1.0.weight"])
    assert model.fc.out_features == 10


def trained(model):
    """Every batch norm scales: at the start the last of a block has weight 0, which hides what the block computes."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    return model


def test_conversion_puts_lip_into_trained_weights(tmp_path):
    """New LIP layers start as average pooling: the network answers as the same weights with average pooling."""
    torch.manual_seed(0)
    file = tmp_path / "plain.pth"
    torch.save(trained(registry.create_model("test_resnet", num_classes=10)).state_dict(), file)

    def build(layer, **changes):
        layers = {"main": layer}
        config = ModelConfig(name="test_resnet", num_classes=10, downsampling=layers, weights=str(file), **changes)
        model = registry.build_model(config).eval()
        return model, load_initial_weights(model, config)

    lip, record = build("lip", convert=True)
    average, other = build("average", convert=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(lip(images), average(images), rtol=1e-4, atol=1e-5)
    assert record == other
    torch.testing.assert_close(build("lip")[0](images), lip(images))  # a file without a recipe needs no `convert`
    torch.save(lip.state_dict(), file)
    with torch.no_grad():
        lip.fc.weight.add_(1)
    torch.testing.assert_close(build("lip", convert=True)[0].state_dict()["fc.weight"], lip.fc.weight - 1)
    torch.save({key: value for key, value in average.state_dict().items() if key != "fc.bias"}, file)
    with pytest.raises(InputError, match=r"1 keys missing \(fc\.bias\)"):
        build("lip", convert=True)


def test_weights_by_their_name_in_timm(monkeypatch):
    """Loaded before `downsampling` is put in; a name that timm lacks and weights of another network end in a line."""
    torch.manual_seed(0)
    theirs = trained(registry.create_model("test_resnet"))
    monkeypatch.setattr(initial_weights, "create_pretrained", lambda name: theirs)

    def build(name="test_resnet", weights="timm:test_resnet.r160_in1k", data=None, **changes):
        config = ModelConfig(name=name, weights=weights, **changes)
        model = registry.build_model(config).eval()
        return model, load_initial_weights(model, config, data)

    model, record = build()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), theirs.eval()(images))
    assert record["content"] == hash_weights(theirs.state_dict())
    lip, average = (build(downsampling={"main": layer})[0] for layer in ("lip", "average"))
    torch.testing.assert_close(lip(images), average(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(lip(images), model(images), rtol=1e-2)
    few, _ = build(num_classes=5, new_head=True, downsampling={"main": "lip"})
    assert torch.equal(few.conv1[0].weight, theirs.conv1[0].weight)
    assert few.fc.out_features == 5
    data, own = small_config().data, small_config(data__mean=[0.5] * 3, data__std=[0.5] * 3).data
    for changes, words in (
        ({"weights": "timm:resnet50.a9_in1k"}, r"no weights 'resnet50\.a9_in1k'; near names: .*resnet50\.a1_in1k"),
        ({"weights": "timm:resnet5"}, r"no weights 'resnet5'; near names: .*resnet"),
        ({"weights": "timm:"}, r"no weights ''; near names: none"),
        ({"weights": "timm:lip_resnet50"}, r"no weights 'lip_resnet50'; LIP's are files"),
        ({"num_classes": 5}, "for another number of classes set model.new_head: true"),
        ({"name": "resnet18"}, r"^timm:test_resnet\.r160_in1k: not .* weights of model\.name: test_resnet$"),
        (
            {"name": "lip_resnet18"},
            r"model\.name: test_resnet, into which model\.downsampling: {main: lip, .* puts LIP$",
        ),
        ({"data": data}, r"was trained with data\.mean=\[0\.5, .*\], here it is \[0\.485, .*model\.convert: true"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            build(**changes)
        assert "\n" not in str(caught.value)
    build(data=data, convert=True)
    build(data=own)


def test_downsampling_of_a_recipe():
    config = ModelConfig(name="resnet50", downsampling={"stem": "lip", "main": "softpool"})
    model = registry.build_model(config)
    assert isinstance(model.maxpool, pooling.LIP2d)
    assert isinstance(model.layer2[0].conv2.pool, pooling.SoftPool)
    assert model.layer2[0].downsample[0].stride == (2, 2)
    for sites, words in (
        ({"stern": "lip"}, "unknown site"),
        ({"stem": "lipp"}, "did you mean lip"),
        ({"transition": "lip"}, "nothing"),
    ):
        with pytest.raises(InputError, match=words):
            registry.build_model(ModelConfig(name="resnet50", downsampling=sites))
    with pytest.raises(InputError, match=r"does not accept an image of \(3, 224, 224\): [^;]*$"):  # no Python advice
        registry.build_model(ModelConfig(name="resnet18", args={"in_chans": 1}, downsampling={"stem": "max"}))


def test_placements_of_a_recipe():
    """Today's mapping of sites to layers, the long form, a preset, and circular padding."""

    def built(**keywords):
        return registry.build_model(ModelConfig(name="resnet18", num_classes=3, **keywords))

    short, long = ({"main": layer} for layer in ("blur", {"layer": "blur", "placement": "after_convolution"}))
    assert str(built(downsampling=short)) == str(built(downsampling=long))
    assert "MaxBlur" in str(built(downsampling="max_blur"))
    assert str(built(downsampling="zhang2019")) != str(built(downsampling=short))
    padded = [module for module in built(circular_padding=True).modules() if isinstance(module, torch.nn.Conv2d)]
    assert {module.padding_mode for module in padded if any(module.padding)} == {"circular"}
    for downsampling, line in (
        ({"stage7.main": "max"}, "has nothing to replace at stage7.main"),
        ({"transition": "max"}, "has nothing to replace at transition"),
        (
            {"stem": "max", "main": {"layer": "lip", "kernel_size": 1}},
            "main; layer2.0.conv1: LIP: kernel_size 1 ",
        ),
        ("zhang2018", "unknown downsampling layer 'zhang2018'"),
    ):
        with pytest.raises(InputError, match=line):
            built(downsampling=downsampling)
    for downsampling in (3, ["blur"], {"main": 3}):
        with pytest.raises(ValueError, match=r"it must be a layer, a preset, or a mapping such as"):
            ModelConfig(name="resnet18", downsampling=downsampling)
