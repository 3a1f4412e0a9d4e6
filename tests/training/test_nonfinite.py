"""Steps that are not finite: nothing of them remains, and what went wrong is named."""

import copy
import math

import pytest
import torch
from helpers import small_config
from helpers.training import prepare, run, same, whole_state

from lip_resnet import checkpoint
from lip_resnet.training import classification, nonfinite
from lip_resnet.training.engine import train_one_epoch

BAD = 3


@pytest.fixture
def nan_image(monkeypatch):
    """One image of step BAD has a NaN after normalisation."""
    original = classification.Classification.prepare

    def spoiled(self, images, labels, step, part):
        images, labels, targets = original(self, images, labels, step, part)
        if step + 1 == BAD and part == 0:
            images[5, 1, 2, 3] = math.nan
        return images, labels, targets

    monkeypatch.setattr(classification.Classification, "prepare", spoiled)


def watch(state, loader, config, seen: list, logged: list | None = None) -> None:
    """Train an epoch; ``seen`` gets the state after every step, ``logged`` the numbers."""
    log = [] if logged is None else logged
    train_one_epoch(state, loader, config, on_step=lambda: seen.append(whole_state(state)), on_log=log.append)


RECIPES = {
    "sgd": {},
    "nesterov": {"optim__nesterov": True, "optim__clip_norm": 1.0},
    "adamw": {"optim__name": "adamw", "optim__lr": 1e-3},
    "lamb": {"optim__name": "lamb", "optim__lr": 1e-3},
    "lars": {"optim__name": "lars"},
    "bfloat16": {"train__precision": "bfloat16"},
    "accumulated": {"optim__accumulate": 2, "train__mixup": 0.2},
    "binary": {"train__loss": "binary_cross_entropy", "train__drop": 0.2},
    "late": {},
}


@pytest.mark.parametrize("name", [*RECIPES, pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_skipped_step_never_happened(nan_image, name, tmp_path):
    """Bit for bit as before the step, and in the end as a run that left the step's update out."""
    common = {"train__ema_decay": 0.9, "train__max_steps": 5, "train__on_nonfinite": "skip"}
    common |= RECIPES.get(name, {"train__compile": True})
    ends, warnings = [], []
    for excluded in ((), (BAD,)):
        config, state, loader, _ = prepare(**common)
        state.excluded_steps = set(excluded)
        state.guard.warn, state.guard.folder = warnings.append, tmp_path / "nonfinite"
        state.guard.check_delay = 2 if name == "late" else 0
        seen, logged = [], []

        watch(state, loader, config, seen, logged)
        same(seen[BAD - 1], seen[BAD - 2])
        for good in (0, 2, 3):
            assert not torch.equal(seen[good]["model.fc.weight"], seen[good + 1]["model.fc.weight"])
        assert all(value.isfinite().all() for value in seen[-1].values() if value.is_floating_point())
        assert logged[0]["train/nonfinite"] == (0 if excluded else 1)
        ends.append(seen[-1])
    same(*ends)
    (line,) = warnings
    assert f"not finite at step {BAD}, learning rate" in line
    assert "rank 0: the images" in line
    saved = checkpoint.load(tmp_path / "nonfinite" / f"step-{BAD:08d}-rank0.pt")
    batch = list(loader.epoch(0))[BAD - 1]
    assert saved["step"] == BAD
    assert saved["skipped"] is True
    for part, (images, labels) in enumerate(batch.parts):
        assert torch.equal(saved["images"][part], images)
        assert torch.equal(saved["labels"][part], labels)


def test_the_very_first_step_can_be_skipped():
    """A momentum that has never been written is none."""
    for name in ("sgd", "adamw"):
        config, state, loader, _ = prepare(
            optim__name=name, train__ema_decay=0.9, train__max_steps=1, train__on_nonfinite="skip"
        )
        before = copy.deepcopy(state.model.state_dict())
        with torch.no_grad():
            state.model.fc.bias[0] = math.nan  # the network itself is at fault: every step is skipped
        run(config, state, loader)
        before["fc.bias"] = state.model.fc.bias.detach()
        for key, value in state.model.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
        moments = [value for tensors in state.optimizer.state.values() for value in tensors.values()]
        assert moments
        assert all((value == 0).all() for value in moments if torch.is_tensor(value))


def test_float16_overflow_is_no_error():
    """The scaler's own skips go on unreported; a loss that is not finite is reported, and undone too."""
    warnings = []
    config, state, loader, _ = prepare(train__precision="float16", train__max_steps=4, train__ema_decay=0.9)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    state.guard.warn = warnings.append
    before = state.model.fc.weight.detach().clone()
    run(config, state, loader)
    assert torch.equal(state.model.fc.weight, before)  # every step overflowed
    assert state.scaler.get_scale() == 2.0**36
    assert not warnings
    assert state.guard.counters.tolist() == [0, 0]


def test_float16_that_overflows_for_ever_is_one():
    """Gradients that are infinite at any scale under a finite loss: the run ends instead of learning nothing."""
    config, state, loader, _ = prepare(train__precision="float16", train__epochs=9, train__log_every=1)
    state.model.fc.weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))

    def epochs() -> None:
        for _ in range(9):
            run(config, state, loader)

    with pytest.raises(FloatingPointError, match=r"gradients overflow at step 31 at any loss scale, even 3.05e-05"):
        epochs()
    assert state.step == 31


def test_float16_loss(nan_image):
    config, state, loader, _ = prepare(
        train__precision="float16", train__max_steps=5, train__ema_decay=0.9, train__on_nonfinite="skip"
    )
    seen, warnings = [], []
    state.guard.warn = warnings.append
    watch(state, loader, config, seen)
    same(seen[BAD - 1], seen[BAD - 2])
    assert not torch.equal(seen[3]["model.fc.weight"], seen[4]["model.fc.weight"])
    assert len(warnings) == 1
    assert state.scaler.get_scale() == 2.0**16  # the loss was at fault, not the scale


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_nothing_changes_until_the_host_has_seen_it(nan_image, policy, lag):
    config, state, loader, _ = prepare(train__ema_decay=0.9, train__on_nonfinite=policy)
    state.guard.check_delay = lag
    seen = []
    kind = FloatingPointError if policy == "stop" else nonfinite.Rollback
    with pytest.raises(kind, match=rf"not finite at step {BAD}, .*rank 0: the images"):
        watch(state, loader, config, seen)
    assert len(seen) == BAD - 1 + lag
    same(whole_state(state), seen[BAD - 2])


def test_a_save_looks_first(nan_image):
    """However late the host looks, no checkpoint of a run that must stop is made after the step."""
    config, state, loader, _ = prepare()
    state.guard.check_delay = 100

    def save() -> None:
        if state.step == 4:
            state.state_dict()

    with pytest.raises(FloatingPointError, match=f"step {BAD}"):
        train_one_epoch(state, loader, config, on_step=save, on_log=lambda values: None)


def test_the_limit_of_steps_in_a_row():
    config, state, loader, _ = prepare(train__on_nonfinite="skip", train__nonfinite_limit=2)
    warnings = []
    state.guard.warn = warnings.append
    with torch.no_grad():
        state.model.fc.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        run(config, state, loader)
    assert len(warnings) == 2


@pytest.mark.parametrize("place", ["layer2.0.conv1", "fc", "layer1.0.conv2.weight"])
def test_the_first_thing_that_is_not_finite_is_named(monkeypatch, place):
    """A module in the middle; the last one; or, with a finite forward, a gradient."""
    config, state, loader, _ = prepare(train__drop=0.1)
    if place.endswith("weight"):
        state.model.get_parameter(place).register_hook(lambda gradient: gradient * math.inf)
        expected = f"the gradient of {place}"
    else:
        state.model.get_submodule(place).register_forward_hook(lambda module, inputs, output: output * math.nan)
        expected = f"the output of {place}"
    buffers = {name: value.clone() for name, value in state.model.named_buffers()}
    with pytest.raises(FloatingPointError) as caught:
        run(config, state, loader)
    assert f"rank 0: {expected};" in str(caught.value)
    for name, value in state.model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert not any(module._forward_hooks for name, module in state.model.named_modules() if name != place)


def test_saved_batches_are_few(tmp_path):
    config, state, loader, _ = prepare(train__on_nonfinite="skip", train__nonfinite_limit=100, train__max_steps=12)
    state.guard.folder, state.guard.warn = tmp_path / "nonfinite", lambda line: None
    with torch.no_grad():
        state.model.fc.bias[0] = math.nan
    run(config, state, loader)
    assert len(list(tmp_path.rglob("*.pt"))) == nonfinite.MAX_SAVED_BATCHES


def test_average_is_timm_s():
    """The same rule as ModelEmaV3's own, up to rounding."""
    _, state, _, _ = prepare(train__ema_decay=0.75)
    other = copy.deepcopy(state.ema)
    with torch.no_grad():
        for value in state.model.state_dict().values():
            value.add_(1)
    other.update(state.model)
    nonfinite.update_average(state.ema, state.model, torch.tensor(0.0))
    for ours, theirs in zip(state.ema.module.state_dict().values(), other.module.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_policies_are_keys():
    with pytest.raises(ValueError, match=r"train\.on_nonfinite"):
        small_config(train__on_nonfinite="ignore")
