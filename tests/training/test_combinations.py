"""Features of a step together, on one linear layer: every number by hand."""

import copy
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import small_config
from torch import Tensor, nn

from lip_resnet.data import Batch, normalize
from lip_resnet.training import engine, run
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import TrainState, TrainStep, build_state

CPU = torch.device("cpu")
CLASSES = 4
PLAIN = {"optim__momentum": 0.0, "optim__weight_decay": 0.0, "optim__lr": 1.0}


def noise(size: int, side: int = 2) -> tuple[Tensor, Tensor]:
    """images (size, 3, side, side) uint8 and labels (size,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    return images, torch.arange(size) % CLASSES


def small(**changes: object):
    return small_config(model__num_classes=CLASSES, **changes)


def take_step(parts: list[tuple[Tensor, Tensor]], size: int, **changes: object) -> tuple[TrainState, Tensor, dict]:
    """One step of SGD: the state after it, minus the change of the weights (with lr 1 the gradient), what is logged."""
    config = small(**PLAIN | changes)
    torch.manual_seed(0)
    state = build_state(nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), config, CPU, Classification(config, CPU))
    before = flat(state.model)
    step = TrainStep(state, config, [state.model[1].bias])
    extra = step(Batch(parts, size, 0), config.optim.lr)
    return state, before - flat(state.model), extra


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient(parts: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """By hand: of the cross entropy summed over all images of the parts, over ``size``."""
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), small()
    for images, labels in parts:
        x = normalize(images, torch.tensor(config.data.mean), torch.tensor(config.data.std))
        (F.cross_entropy(model(x), labels, reduction="sum") / size).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("clip", [0.01, 1000.0])
def test_gradients_are_clipped_at_their_true_norm(precision, clip):
    """Float16's are 65,536 times as large until they are unscaled: neither bound may see that factor."""
    images, labels = noise(6)
    parts = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    want = gradient(parts, 6)
    norm = want.norm().item()
    assert 0.01 < norm < 1000
    _, got, logged = take_step(parts, 6, train__precision=precision, optim__clip_norm=clip, optim__accumulate=2)
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}[precision]
    assert (got - want * min(1.0, clip / norm)).norm().item() <= tolerance * min(clip, norm)
    assert logged["train/grad_norm"].item() == pytest.approx(norm, rel=tolerance)
    without = want[: 12 * CLASSES].norm().item()
    assert logged["train/grad_norm_without_logits"].item() == pytest.approx(without, rel=tolerance)


def test_parts_of_unequal_size_and_skipped_images():
    """Every image counts 1 / size; the size includes images that did not decode."""
    images, labels = noise(6)
    parts = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    state, got, logged = take_step(parts, 8, optim__accumulate=2, train__ema_decay=0.75)
    torch.testing.assert_close(got, gradient(parts, 8), rtol=1e-5, atol=1e-7)
    assert logged == {}  # norms are logged with clipping alone
    torch.testing.assert_close(flat(state.ema.module), flat(state.model) + 0.75 * got)  # a step, not one a part
    assert state.window.reduce()["images"] == 6


def test_float16_keeps_gradients_that_are_too_small_for_it():
    """Of some 1e-8, below float16's smallest number: the loss is scaled before the backward."""
    images, labels = noise(6)
    want = gradient([(images, labels)], 10**8)
    got = take_step([(images, labels)], 10**8, train__precision="float16", optim__lr=1e8)[1] / 1e8
    assert want.abs().max() < 2**-24
    assert (got - want).norm() <= 1e-2 * want.norm()


class Clock:
    """A clock that stands still, but for 3 s before each batch and 1 s in each step; and the loader of 5 batches."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(engine.time, "perf_counter", lambda: self.now)

    def __len__(self) -> int:
        return 5

    def epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        images, labels = noise(6)
        for _ in range(first, 5):
            self.now += 3
            yield Batch([(images, labels)], 6, 0)

    def phase(self, name: str) -> None:
        self.now += name == "update"


def test_logged_numbers_by_hand(monkeypatch):
    """Steps 1 to 2, 3 to 4 and the epoch's last: speed, share of waiting, and the last step's learning rate."""
    clock, logged = Clock(monkeypatch), []
    config = small(**PLAIN, train__log_every=2, train__epochs=2, optim__schedule="linear")
    state = build_state(nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), config, CPU, Classification(config, CPU))
    losses: list[float] = []
    add = state.window.add

    def spy(logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        losses.append(loss.item())
        add(logits, labels, loss)

    state.window.add = spy
    engine.train_one_epoch(state, clock, config, on_step=lambda: None, on_log=logged.append, on_phase=clock.phase)
    assert state.step == 5
    assert [values["train/images_per_second"] for values in logged] == pytest.approx([12 / 8, 12 / 8, 6 / 4])
    assert [values["train/data_wait"] for values in logged] == pytest.approx([0.75] * 3)
    assert [values["train/lr"] for values in logged] == pytest.approx([0.9, 0.7, 0.6])
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [values["train/loss"] for values in logged] == pytest.approx(means)


def prepared(step: int = 3, part: int = 0, **changes: object) -> tuple[Tensor, Tensor, Classification]:
    """images and targets of a part of a step, and the task."""
    task = Classification(small(**changes), CPU)
    images, _, targets = task.prepare(*noise(8, side=8), step, part)
    return images, targets, task


MIXING = [{"train__mixup": 0.8}, {"train__cutmix": 1.0}]


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_mixed_targets_are_smoothed_once(mixing, loss):
    mixed = prepared(**mixing)[1]
    _, targets, task = prepared(**mixing, train__label_smoothing=0.2, train__loss=loss)
    torch.testing.assert_close(targets, 0.8 * mixed + 0.2 / CLASSES)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(1))
    want = -(targets * logits.log_softmax(1)).sum(1).mean()
    if loss == "binary_cross_entropy":
        want = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(task.loss(logits, targets), want)


@pytest.mark.parametrize("mixing", MIXING)
def test_images_are_mixed_by_the_share_of_their_targets(mixing):
    """An image's neighbour has another label here, so that its own label's target is the share of its own pixels."""
    images, targets, _ = prepared(**mixing)
    plain = prepared()[0]
    share = targets[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(targets[range(8), torch.arange(8) % CLASSES], share.expand(8))
    if "train__mixup" in mixing:
        torch.testing.assert_close(images, share * plain + (1 - share) * plain.roll(1, 0))
    else:
        own = (images == plain).all(1)
        assert ((images == plain.roll(1, 0)).all(1) | own).all()
        assert own.float().mean((1, 2)).tolist() == pytest.approx([share.item()] * 8)


def test_a_step_mixes_in_one_way_and_steps_differ():
    mixing = {"train__mixup": 0.8, "train__cutmix": 1.0}
    shares = [prepared(step, part, **mixing)[1][0, 0].item() for step in range(12) for part in (0, 1)]
    assert shares[::2] == shares[1::2]
    assert len(set(shares)) > 6
    plain = prepared()[0]
    cuts = [(prepared(step, **mixing)[0] == plain).all(1).any().item() for step in range(12)]
    assert {True, False} == set(cuts)  # both kinds are used


@pytest.mark.parametrize(("kind", "highest"), [("mixup", 0.6), ("cutmix", 0.95)])
def test_shares_are_drawn_with_the_recipe_s_alpha(kind, highest):
    """Beta(alpha, alpha) is about a half for a large alpha; an image's edge can cut a part of cutmix's box off."""
    shares = [prepared(step, **{f"train__{kind}": 1000.0})[1][0, 0].item() for step in range(20)]
    assert min(shares) > 0.4
    assert max(shares) < highest


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_layout_is_the_recipe_s(channels_last):
    images = prepared(train__channels_last=channels_last)[0]
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert images.is_contiguous() != channels_last


def test_randomness_of_the_forward_differs_between_steps_and_parts(monkeypatch):
    def drawn(step: int, part: int, seed: int = 0) -> float:
        prepared(step, part, train__seed=seed)
        return torch.rand(1).item()

    draws = [drawn(0, 0), drawn(1, 0), drawn(0, 1), drawn(0, 0, seed=1)]
    monkeypatch.setattr("lip_resnet.distributed.rank", lambda: 1)
    assert len({*draws, drawn(0, 0)}) == 5


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("mixing", MIXING)
def test_target_threshold_comes_after_mixing(mixing, threshold):
    changes = {"train__loss": "binary_cross_entropy", "train__label_smoothing": 0.6, **mixing}
    soft = prepared(**changes)[1]
    hard = prepared(**changes, train__target_threshold=threshold)[1]
    assert hard.tolist() == [[float(value > threshold) for value in row] for row in soft.tolist()]


def test_target_threshold_is_exclusive():
    """Smoothing gives 0.025 to the wrong classes: at that threshold they are 0, below it 1."""
    changes = {"train__loss": "binary_cross_entropy", "train__label_smoothing": 0.1}
    own = F.one_hot(torch.arange(8) % CLASSES, CLASSES).float()
    assert torch.equal(prepared(**changes, train__target_threshold=0.025)[1], own)
    assert torch.equal(prepared(**changes, train__target_threshold=0.02)[1], torch.ones(8, CLASSES))


def evaluate_in_turn(monkeypatch, rules: str, accuracies: list[float]) -> tuple[list[bool], list[tuple], run.Run]:
    """A run of four steps an epoch that reaches these accuracies; which were saved as the best, what was logged."""
    saved: list[bool] = []
    logged: list[tuple] = []
    other = "val" if rules == "ema" else "val_ema"
    values = iter(
        {f"{name}/{key}": value for name, value in (("val_ema" if rules == "ema" else "val", top1), (other, -top1))
         for key, value in (("top1", value), ("top5", 99.0), ("loss", 1.0))}
        for top1 in accuracies
    )  # fmt: skip
    monkeypatch.setattr(run.Run, "validate", lambda self: next(values))
    monkeypatch.setattr(run.Run, "save", lambda self, best=False: saved.append(best))
    log = types.SimpleNamespace(log=lambda *given: logged.append(given), finish=lambda *given: logged.append(given))
    task = types.SimpleNamespace(best="top1", remark=lambda best: None)
    state = types.SimpleNamespace(task=task, step=0, evaluated=0, best=-torch.inf)
    config = small_config(train__epochs=len(accuracies), train__rules=rules, train__ema_decay=0.9)
    one = run.Run(config, state, range(4), None, log, 4 * len(accuracies), run.Provenance([1]), [])
    for epoch in range(len(accuracies)):
        state.step = 4 * (epoch + 1)
        one._evaluate(types.SimpleNamespace(synchronize=lambda: 0))
    return saved, logged, one


@pytest.mark.parametrize("rules", ["model", "ema"])
def test_best_is_the_first_of_equals_by_the_weights_that_decide(monkeypatch, rules):
    saved, logged, one = evaluate_in_turn(monkeypatch, rules, [50.0, 40.0, 50.0, 60.0, 60.0])
    assert saved == [True, False, False, True, False]
    assert (one.state.best, one.state.evaluated) == (60.0, 20)
    evaluations, (final,) = logged[:5], logged[5:]
    assert (final, one.last) == ((), 60.0)
    assert [given[:2] for given in evaluations] == [(4, 0), (8, 1), (12, 2), (16, 3), (20, 4)]  # step, epoch
    tag = "val_ema/best_top1" if rules == "ema" else "val/best_top1"
    assert [given[3][tag] for given in evaluations] == [50.0, 50.0, 50.0, 60.0, 60.0]


def test_the_state_of_an_average_is_not_the_model_s():
    images, labels = noise(4)
    state = take_step([(images, labels)], 4, train__ema_decay=0.5)[0]
    payload = copy.deepcopy(state.state_dict())
    assert not torch.equal(payload["ema"]["1.weight"], payload["model"]["1.weight"])
    torch.testing.assert_close(payload["ema"]["1.weight"], state.ema.module[1].weight.detach())
