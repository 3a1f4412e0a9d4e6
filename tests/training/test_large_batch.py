"""The recipes of 32,768 images a step: their optimizers' steps, by hand and on noise."""

import math

import pytest
import timm
import torch
from helpers import ROOT
from torch import nn

from lip_resnet.data import TrainLoader, build_sources
from lip_resnet.models.registry import initialize
from lip_resnet.recipe import load_config
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import build_state, train_one_epoch
from lip_resnet.training.optim import build_optimizer

LARGE = sorted((ROOT / "configs" / "imagenet").glob("*32k.yaml"))


def test_every_large_recipe_is_here():
    names = {f"{model}_{name}32k" for model in ("resnet50", "lip_resnet50") for name in ("lamb", "lars")}
    assert {path.stem for path in LARGE} == names


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_recipe_takes_its_optimizer_s_steps(path):
    """Three steps of the recipe's optimizer, two parts each, on noise: what moves, and by how much.

    In the first step, LAMB moves a weight tensor by lr |w|, whatever its gradient; LARS by at most 0.001 lr |w|, and by
    nearly that where decay is small beside the gradient. Norms and biases take Adam's or SGD's own step.
    """
    small = ["data.name=synthetic", "data.batch_size=8", "data.images=24", "data.workers=0", "data.size=32"]
    small += ["data.eval_size=32", "data.eval_resize=32", "train.precision=float32", "train.log_every=1"]
    config = load_config(path, [*small, "model.num_classes=1000", "optim.warmup_epochs=1"])
    torch.manual_seed(0)
    model = timm.create_model(config.model.name)
    initialize(model)
    state = build_state(model, config, torch.device("cpu"), Classification(config, torch.device("cpu")))
    source, _ = build_sources(config.data, config.model.num_classes)
    loader = TrainLoader(source, config.data, config.optim.accumulate, 0)
    assert len(loader) == 3
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved: list[dict[str, float]] = []
    losses = []

    def on_step() -> bool:
        if not moved:
            moved.append({name: (p.detach() - before[name]).norm().item() for name, p in model.named_parameters()})
        return False

    train_one_epoch(state, loader, config, on_step=on_step, on_log=lambda values: losses.append(values["train/loss"]))
    assert len(losses) == 3
    assert all(0 < loss < 2 * math.log(1000) for loss in losses)
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    rate = config.optim.lr / 3  # of the first of three steps of warm-up
    weights = {name: value.norm().item() for name, value in before.items() if value.dim() >= 2}
    shares = [moved[0][name] / (rate * norm) for name, norm in weights.items() if norm]
    if config.optim.name == "lamb":
        assert shares == pytest.approx([1.0] * len(shares), rel=1e-3)
        for name, value in before.items():
            if value.dim() < 2:  # Adam's first step: the rate in every element whose gradient is not tiny
                assert moved[0][name] <= rate * math.sqrt(value.numel()) * 1.001
    else:
        assert max(shares) <= 0.001 * 1.001
        assert max(shares) >= 0.001 * 0.9
    decaying = [group for group in state.optimizer.param_groups if group["weight_decay"]]
    assert {p.dim() >= 2 for group in decaying for p in group["params"]} == {True}
    assert sum(len(group["params"]) for group in decaying) == len(weights)


def test_lars_step_by_hand():
    """timm's LARS as the recipe asks for it: v = ratio (g + decay w), w -= lr v; a bias takes plain momentum."""
    config = load_config(ROOT / "configs" / "imagenet" / "resnet50_lars32k.yaml").optim
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.fill_(2.0)
    optimizer = build_optimizer(layer, config)
    w, b, v, u = torch.tensor([[3.0, 4.0]], dtype=torch.float64), 2.0, 0.0, 0.0
    for gradient, bias in ((torch.tensor([[0.6, 0.8]], dtype=torch.float64), 0.5), (torch.tensor([[1.0, 0.0]]), -0.25)):
        layer.weight.grad, layer.bias.grad = gradient.float(), torch.tensor([bias])
        optimizer.step()
        ratio = 0.001 * w.norm() / (gradient.norm() + 1e-4 * w.norm())
        v = 0.9 * v + ratio * (gradient + 1e-4 * w)
        w = w - 29 * v
        u = 0.9 * u + bias
        b -= 29 * u
        torch.testing.assert_close(layer.weight.detach().double(), w.double(), rtol=1e-5, atol=0)
        assert layer.bias.item() == pytest.approx(b, rel=1e-5)
