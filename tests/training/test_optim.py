"""Learning rates against hand-listed values, and who decays."""

import copy
import io
import math

import pytest
import timm
import torch
from helpers import small_config
from helpers.training import prepare, run
from timm.optim import list_optimizers

import lip_resnet  # noqa: F401
from lip_resnet.config import InputError, OptimConfig
from lip_resnet.config.optim import OWN_OPTIMIZERS
from lip_resnet.training.checkpoints import check_entries
from lip_resnet.training.optim import build_optimizer, lr_at


def test_step_schedule_is_the_paper_s():
    config = OptimConfig(lr=0.1, schedule="step", milestones=(30, 60, 80))
    expected = {0: 0.1, 30 * 5005 - 1: 0.1, 30 * 5005: 0.01, 60 * 5005: 0.001, 80 * 5005: 0.0001, 90 * 5005 - 1: 0.0001}
    for step, lr in expected.items():
        assert lr_at(step, config, 5005, 90) == pytest.approx(lr, rel=1e-12)


def test_cosine_with_warmup():
    config = OptimConfig(lr=0.4, schedule="cosine", warmup_epochs=2, min_lr=0.1)
    # 4 steps an epoch, 6 epochs: 8 steps of warm-up, 16 of cosine.
    expected = {0: 0.05, 3: 0.2, 7: 0.4, 8: 0.4, 16: 0.25, 24: 0.1, 30: 0.1}
    for step, lr in expected.items():
        assert lr_at(step, config, 4, 6) == pytest.approx(lr, rel=1e-12)


def test_warmup_before_steps():
    config = OptimConfig(lr=1.0, schedule="step", milestones=(2,), warmup_epochs=0.5)
    assert [lr_at(step, config, 4, 3) for step in (0, 1, 2, 7, 8)] == pytest.approx([0.5, 1, 1, 1, 0.1])


@pytest.mark.parametrize("name", ["lip_resnet50", "resnet50"])
def test_decay_goes_by_tensor_rank(name):
    model = timm.create_model(name)
    everything = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.01))
    assert [group["weight_decay"] for group in everything.param_groups] == [0.01]
    groups = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.01, decay="matrices")).param_groups
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {id(p) for p in model.parameters() if p.dim() >= 2}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_every_optimizer_steps(name):
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimConfig(name=name, lr=0.1))
    layer(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_sgd_is_the_textbook_s():
    """Two steps by hand: v = 0.9 v + (g + wd * w), w = w - lr * v; Nesterov looks ahead."""
    for nesterov in (False, True):
        weight = torch.nn.Parameter(torch.tensor([[2.0]]))
        model = torch.nn.Module()
        model.weight = weight
        config = OptimConfig(lr=0.1, weight_decay=0.01, nesterov=nesterov)
        optimizer = build_optimizer(model, config)
        w, v = 2.0, 0.0
        for gradient in (1.0, -3.0):
            weight.grad = torch.tensor([[gradient]])
            optimizer.step()
            g = gradient + 0.01 * w
            v = 0.9 * v + g
            w -= 0.1 * (g + 0.9 * v if nesterov else v)
            assert weight.item() == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_betas_are_the_textbook_s(name):
    """Two steps by hand, with betas that are not the defaults: m, v and their bias corrections.

    AdamW: w -= lr (m / (sqrt(v) + 1e-8) + wd w). LAMB: the same with 1e-6, and lr scaled by |w| / |update|.
    """
    first, second = 0.5, 0.75
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([[2.0]]))
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.01, betas=(first, second)))
    w, m, v = 2.0, 0.0, 0.0
    for step, gradient in ((1, 1.0), (2, -3.0)):
        model.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        m = first * m + (1 - first) * gradient
        v = second * v + (1 - second) * gradient**2
        epsilon = 1e-8 if name == "adamw" else 1e-6
        update = m / (1 - first**step) / (math.sqrt(v / (1 - second**step)) + epsilon) + 0.01 * w
        w -= 0.1 * update * (abs(w / update) if name == "lamb" else 1)
        assert model.weight.item() == pytest.approx(w, rel=1e-5)


def test_linear_with_warmup():
    config = OptimConfig(lr=1.0, schedule="linear", warmup_epochs=1, min_lr=0.2)
    # 4 steps an epoch, 5 epochs: 4 steps of warm-up, 16 down the line.
    expected = {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.8, 12: 0.6, 20: 0.2}
    for step, lr in expected.items():
        assert lr_at(step, config, 4, 5) == pytest.approx(lr, rel=1e-12)


def test_lamb_clips_nothing_by_itself():
    """Two steps by hand: one whose gradient has norm 5 must count five times as much as one of norm 1."""
    config = OptimConfig(name="lamb", lr=0.1, weight_decay=0.01, betas=(0.5, 0.75))
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([[2.0, 1.0]]))
    optimizer = build_optimizer(model, config)
    w = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    m = v = torch.zeros_like(w)
    for step, gradient in ((1, [[0.6, 0.8]]), (2, [[4.0, -3.0]])):
        g = torch.tensor(gradient, dtype=torch.float64)
        model.weight.grad = g.float()
        optimizer.step()
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g**2
        update = m / (1 - 0.5**step) / ((v / (1 - 0.75**step)).sqrt() + 1e-6) + 0.01 * w
        w = w - 0.1 * update * w.norm() / update.norm()
        torch.testing.assert_close(model.weight.detach().double(), w, rtol=1e-5, atol=0)


def test_momentum_and_decay_reach_every_optimizer():
    """Two steps of equal gradients: a momentum of 0 repeats the first, and weight decay pulls a weight without one."""
    for name in ("sgd", "lars"):
        moved = []
        for momentum in (0.0, 0.5):
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(torch.ones(2, 2))
            optimizer = build_optimizer(layer, OptimConfig(name=name, lr=0.01, momentum=momentum, weight_decay=0.0))
            steps = []
            for _ in range(2):
                before = layer.weight.detach().clone()
                layer.weight.grad = torch.full((2, 2), 1e-3)
                optimizer.step()
                steps.append((before - layer.weight.detach()).norm().item())
            moved.append(steps[1] / steps[0])
        assert moved == pytest.approx([1.0, 1.5], rel=2e-2), name
    for name in ("sgd", "adamw", "lamb"):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = build_optimizer(layer, OptimConfig(name=name, lr=0.1, weight_decay=0.25))
        layer.weight.grad = torch.zeros(2, 2)
        optimizer.step()
        shrunk = 0.1 if name == "lamb" else 0.1 * 0.25  # LAMB's trust ratio makes any update as long as the weight
        torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), 1 - shrunk))


def _train(layer, optimizer, steps):
    for step in steps:
        images = torch.randn(6, 20, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(images).square().mean().backward()
        optimizer.step()


REFUSED = ("kron", "adahessian", "bnb", "fused")
"""The last two of other packages, which need CUDA."""


def test_every_other_optimizer_of_timm_steps_and_resumes():
    """Two steps, its state through a file, two more: bit for bit the four steps in one go. Others end in one line."""
    for name in [*(set(list_optimizers()) - {*OWN_OPTIMIZERS}), "lookahead_adamw"]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(20, 24)  # large enough for averages that are factored
        config = OptimConfig(name=name, lr=0.01)
        if name.startswith(REFUSED):
            with pytest.raises(InputError, match=r"^optim.name: [^\n]*$"):
                build_optimizer(layer, config)
            continue
        optimizer = build_optimizer(layer, config)
        before = copy.deepcopy(layer)
        _train(layer, optimizer, (0, 1))
        assert not torch.equal(layer.weight, before.weight), name
        file = io.BytesIO()
        torch.save({"weights": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
        _train(layer, optimizer, (2, 3))
        file.seek(0)
        payload = torch.load(file, weights_only=True)
        other = torch.nn.Linear(20, 24)
        other.load_state_dict(payload["weights"])
        optimizer = build_optimizer(other, config)
        entries = {"step": 2, "processes": [1], "window": torch.zeros(1, 4), "best": 0.0}
        check_entries(payload | entries, {}, optimizer, torch.zeros(4))
        optimizer.load_state_dict(payload["optimizer"])
        _train(other, optimizer, (2, 3))
        assert torch.equal(other.weight, layer.weight), name


def test_keywords_of_other_optimizers():
    """Lion by hand: the sign of b1 m + (1 - b1) g, then m = b2 m + (1 - b2) g; with the decay of AdamW."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.tensor([[2.0]]))
    config = OptimConfig(name="lion", lr=0.1, weight_decay=0.01, args={"betas": [0.5, 0.75]})
    optimizer, w, m = build_optimizer(layer, config), 2.0, 0.0
    for gradient in (1.0, -0.1, -0.5):  # with timm's betas the second sign is another
        layer.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        w = w * (1 - 0.1 * 0.01) - 0.1 * math.copysign(1, 0.5 * m + 0.5 * gradient)
        m = 0.75 * m + 0.25 * gradient
        assert layer.weight.item() == pytest.approx(w, rel=1e-6)
    with pytest.raises(InputError, match=r"^optim.name: lion with optim.args {'beta': 1}: [^\n]*'beta'"):
        build_optimizer(layer, OptimConfig(name="lion", lr=0.1, args={"beta": 1}))
    moved = [
        build_optimizer(layer, OptimConfig(name="rmsprop", lr=0.1, momentum=m)).defaults["momentum"] for m in (0, 0.5)
    ]
    assert moved == [0, 0.5]


def test_layer_decay_by_hand():
    """LIP-ResNet-18: the stem, four stages of two blocks, the classifier; a logit module goes with its block."""
    model = timm.create_model("lip_resnet18", num_classes=3)
    layers = ["", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1", "fc"]
    for decay in ("all", "matrices"):
        config = OptimConfig(lr=0.1, weight_decay=0.01, layer_decay=0.5, decay=decay)
        groups = build_optimizer(model, config).param_groups
        of = {id(parameter): group for group in groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            depth = max(index for index, layer in enumerate(layers) if name.startswith(layer))
            assert of[id(parameter)]["lr_scale"] == 0.5 ** (9 - depth), name
            decays = decay == "all" or parameter.dim() >= 2
            assert of[id(parameter)]["weight_decay"] == (0.01 if decays else 0), name
    assert "lr_scale" not in build_optimizer(model, OptimConfig(lr=0.1)).param_groups[0]


def test_layer_decay_scales_every_step_s_rate():
    config, state, loader, _ = prepare(optim__layer_decay=0.5, train__max_steps=2, optim__warmup_epochs=1.0)
    run(config, state, loader)
    rate = lr_at(1, config.optim, len(loader), 2)
    rates = {group["lr"] for group in state.optimizer.param_groups}
    assert rates == {rate * group["lr_scale"] for group in state.optimizer.param_groups}
    assert len(rates) > 3
    assert max(rates) == rate < small_config().optim.lr
