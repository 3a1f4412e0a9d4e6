"""LIP-DenseNet against the recorded outputs of the reference, and its keywords."""

import pytest
import timm
import torch
from helpers import golden
from torch import nn

from lip_resnet.layers.pooling import LIP2d


def test_golden_lip_densenet121():
    model = golden.filled_model("lip_densenet121")
    assert sum(p.numel() for p in model.parameters()) == golden.GOLDEN["lip_densenet121"]["params"]
    golden.check_logits(model, "lip_densenet121")
    golden.check_gradients(model, "lip_densenet121")


def test_golden_sgd_steps_lip_densenet121():
    golden.check_sgd_steps(golden.filled_model("lip_densenet121"), "lip_densenet121")


def test_initialisation_of_the_reference():
    torch.manual_seed(0)
    golden.check_initial_std(timm.create_model("lip_densenet121"), "lip_densenet121")


def test_zero_initialisation_is_average_pooling():
    model = timm.create_model("lip_densenet121", init="zero")
    lips = [module for module in model.modules() if isinstance(module, LIP2d)]
    assert len(lips) == 4
    assert not any(lip.logits.conv.weight.any() for lip in lips)
    assert isinstance(model.features.pool0.logits.conv, nn.Conv2d)


@pytest.mark.parametrize(("name", "baseline"), [(f"lip_densenet{d}", f"densenet{d}") for d in (121, 161, 169, 201)])
def test_parameter_count(name, baseline):
    """timm's network plus the logit modules, counted by hand.

    Stem 9 c^2 + 2 c; a transition of c channels: 128 c + 9 * 128^2 + 128 c + 4 * 128 + 2 c.
    """
    with torch.device("meta"):
        model, without_lip = timm.create_model(name), timm.create_model(baseline)
    stem = model.features.conv0.out_channels
    pooled = [getattr(model.features, f"transition{i}").conv.out_channels for i in (1, 2, 3)]
    extra = 9 * stem**2 + 2 * stem + sum(258 * c + 9 * 128**2 + 512 for c in pooled)
    count = {m: sum(p.numel() for p in m.parameters()) for m in (model, without_lip)}
    assert count[model] == count[without_lip] + extra


def test_sites_and_windows():
    with torch.device("meta"):
        model = timm.create_model("lip_densenet121", stem="max", transition="softpool", kernel_size=3)
    assert isinstance(model.features.pool0, nn.MaxPool2d)
    assert model.features.transition2.pool.window == (3, 2, 1)
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"init": "ones"}, "init 'ones'"),
        ({"transition": "lap"}, "transition: unknown downsampling layer 'lap'"),
        ({"drop_rate": 1.5}, "drop_rate 1.5"),
        ({"proj_drop_rate": -0.1}, "proj_drop_rate -0.1"),
        ({"drop_path_rate": 0.1}, "no residual branch"),
    ],
)
def test_keywords_out_of_range(keywords, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        timm.create_model("lip_densenet121", **keywords)
