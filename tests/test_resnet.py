"""LIP-ResNet against the recorded outputs of the reference."""

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lip_resnet import pooling

PUBLISHED = ["lip_resnet50", "lip_resnet101"]


@pytest.fixture(scope="module")
def filled50() -> nn.Module:
    return golden.filled_model("lip_resnet50")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == golden.GOLDEN[name]["params"]


def test_released_keys_map_one_to_one():
    released = golden.GOLDEN["lip_resnet101"]["state_dict"]
    with torch.device("meta"):
        model = timm.create_model("lip_resnet101")
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert model.checkpoint_filter_fn(released, model) == ours
    assert model.checkpoint_filter_fn(ours, model) == ours  # our own keys pass through


def test_golden_lip_resnet50(filled50):
    golden.check_logits(filled50, "lip_resnet50")
    golden.check_gradients(filled50, "lip_resnet50")


def test_golden_sgd_steps_lip_resnet50():
    golden.check_sgd_steps(golden.filled_model("lip_resnet50"), "lip_resnet50")


def test_golden_lip_resnet101():
    model = golden.filled_model("lip_resnet101")
    golden.check_logits(model, "lip_resnet101")
    golden.check_gradients(model, "lip_resnet101")


def test_a_wrong_network_fails_the_golden_checks():
    """The check can fail: a gate of 12.000001 in place of 12 is noticed."""
    model = golden.filled_model("lip_resnet50", gate_coefficient=12.000001)
    with pytest.raises(AssertionError, match="224x224"):
        golden.check_logits(model, "lip_resnet50")


def test_initialisation_of_the_reference():
    torch.manual_seed(0)
    golden.check_initial_std(timm.create_model("lip_resnet50"), "lip_resnet50")


def test_at_initialisation_lip_is_average_pooling(monkeypatch):
    """Zeroed logit convolutions: every LIP averages its window's real positions, here by PyTorch's own pooling."""
    torch.manual_seed(0)
    model = timm.create_model("lip_resnet50").double().eval()
    x = golden.images(1, 65, 64).double()
    with torch.no_grad():
        want = model(x)
        monkeypatch.setattr(
            pooling,
            "lip2d",
            lambda x, logits, kernel, stride, padding: F.avg_pool2d(
                x, kernel, stride, padding, count_include_pad=False
            ),
        )
        assert want.std() > 0
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12 * want.std().item())


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = timm.create_model("lip_resnet50").train()
    for block in model.modules():  # a last BN of zero weight would cut its block off at the first step
        if isinstance(block, nn.BatchNorm2d):
            nn.init.ones_(block.weight)
    for parameter in pooling.logit_parameters(model):
        nn.init.normal_(parameter, std=0.01)
    F.cross_entropy(model(golden.images(2, 64, 64)), torch.tensor([0, 1])).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
