"""Head first: what moves while the trunk is frozen, and what a resumed run makes of it."""

import copy

import pytest
import torch
from helpers.training import CPU, prepare, run, same, whole_state
from torch import nn

from lip_resnet.config import InputError
from lip_resnet.data import normalize
from lip_resnet.models import registry
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import build_state
from lip_resnet.training.optim import lr_at

FROZEN = {
    **{"model__weights": "x", "train__freeze_epochs": 1, "train__ema_decay": 0.9},
    **{"data__name": "synthetic", "data__images": 48, "data__batch_size": 16},
}  # fmt: skip
"""Three steps an epoch."""


def test_frozen_epochs_train_a_linear_classifier_on_the_features():
    """The oracle: logistic regression on the features of the network in evaluation mode, by SGD with momentum."""
    config, state, loader, _ = prepare(**FROZEN)
    before = copy.deepcopy(state.model.state_dict())
    features = copy.deepcopy(state.model).eval()
    head = nn.Linear(features.num_features, 10)
    head.load_state_dict(features.fc.state_dict())
    optimizer = torch.optim.SGD(head.parameters(), 0.05, momentum=0.9, weight_decay=config.optim.weight_decay)
    for step, batch in enumerate(loader.epoch(0)):
        ((images, labels),) = batch.parts
        images = normalize(images, torch.tensor(config.data.mean), torch.tensor(config.data.std))
        optimizer.param_groups[0]["lr"] = lr_at(step, config.optim, len(loader), 2)
        optimizer.zero_grad()
        with torch.no_grad():
            x = features.forward_head(features.forward_features(images), pre_logits=True)
        nn.functional.cross_entropy(head(x), labels).backward()
        optimizer.step()
    run(config, state, loader)
    after = state.model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["fc.weight", "fc.bias"]
    torch.testing.assert_close(after["fc.weight"], head.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after["fc.bias"], head.bias.detach(), rtol=1e-4, atol=1e-6)


def test_after_the_frozen_epochs_everything_trains_and_a_resumed_run_is_the_same():
    """Three epochs, one of them frozen: stopped in the first, and in the second, and continued."""
    config, state, loader, _ = prepare(**FROZEN, train__epochs=3)
    steps = len(loader)
    run(config, state, loader)
    before = copy.deepcopy(state.model.state_dict())
    stops = {1, steps + 1}
    run(config, state, loader)
    moved = [key for key in before if torch.equal(before[key], state.model.state_dict()[key])]
    assert moved == []
    for stop in stops:
        parts = prepare(**FROZEN, train__epochs=3, train__max_steps=stop)
        while parts[1].step < stop:
            run(parts[0], parts[1], parts[2])
        saved = {**parts[1].state_dict(), "processes": [1]}
        config, other, loader, _ = prepare(**FROZEN, train__epochs=3)
        other.load_state_dict(copy.deepcopy(saved), "it")
        while other.step < 2 * steps:
            run(config, other, loader)
        same(whole_state(other), whole_state(state))


def test_a_network_without_a_classifier_is_refused():
    config, _, _, _ = prepare()
    config = prepare(**FROZEN)[0]
    model = registry.build_model(config.model)
    model.default_cfg = {**model.default_cfg, "classifier": None}
    with pytest.raises(InputError, match=r"train\.freeze_epochs: timm names no classifier of ResNet"):
        build_state(model, config, CPU, Classification(config, CPU))
