"""The loops, in one process: what a step computes, what it does not wait for, and what it refuses."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import small_config
from helpers.training import how, prepare, run

from lip_resnet import distributed
from lip_resnet.data import EvalLoader, build_sources, normalize
from lip_resnet.evaluation.evaluate import evaluate
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import build_state


def test_steps_are_the_textbook_s():
    """Three steps by hand: plain SGD on the mean cross entropy of the same batches."""
    config, state, loader, _ = prepare(train__max_steps=3, train__label_smoothing=0.1)
    model = copy.deepcopy(state.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr, momentum=0.9, weight_decay=1e-4)
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    for step, batch in zip(range(3), loader.epoch(0), strict=False):
        images, labels = batch.parts[0]
        images = normalize(images, mean, std).contiguous(memory_format=torch.channels_last)
        progress = step / (len(loader) * config.train.epochs)
        optimizer.param_groups[0]["lr"] = config.optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.zero_grad()
        log_p = model(images).log_softmax(1)
        loss = -(0.9 * log_p.gather(1, labels[:, None]).mean() + 0.1 * log_p.mean())
        loss.backward()
        optimizer.step()
    run(config, state, loader)
    assert state.step == 3
    for (name, ours), theirs in zip(state.model.named_parameters(), model.parameters(), strict=True):
        assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs) + 1e-7, name


def test_accumulated_steps_are_whole_steps():
    """Without batch statistics, three parts of a batch give the gradient of the whole, also of a short last batch."""
    results = []
    for accumulate in (1, 3):
        # 1442 images in batches of 63: 22 whole ones and one of 56, which three parts share unevenly.
        config, state, loader, _ = prepare(
            model__name="test_efficientnet_ln", optim__accumulate=accumulate, data__batch_size=63, train__epochs=1
        )
        state.step = len(loader) - 1
        run(config, state, loader)
        results.append([parameter.detach() for parameter in state.model.parameters()])
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-6)


def test_loss_falls_and_numbers_are_logged():
    config, state, loader, val_loader = prepare(train__epochs=1, optim__lr=0.1)
    before = evaluate(state.model, val_loader, **how(config))
    logged = run(config, state, loader)
    after = evaluate(state.model, val_loader, **how(config))
    assert len(logged) == math.ceil(len(loader) / 5)
    assert set(logged[0]) == {f"train/{n}" for n in ("loss", "top1", "top5", "lr", "images_per_second", "data_wait")}
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]
    assert logged[-1]["train/top1"] > logged[0]["train/top1"] + 20
    assert after["images"] == before["images"] == 355
    assert after["loss"] != before["loss"]


def test_evaluation_counts_by_hand():
    config, state, _, val_loader = prepare()
    source = build_sources(config.data, 10, ("val",))[0]
    state.model.eval()
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    hits = hits5 = loss = 0
    for images, labels in EvalLoader(source, config.data):
        with torch.no_grad():
            logits = state.model(normalize(images, mean, std))
        order = logits.argsort(dim=1, descending=True)
        hits += sum(int(order[i, 0] == labels[i]) for i in range(len(labels)))
        hits5 += sum(int(labels[i] in order[i, :5]) for i in range(len(labels)))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    result = evaluate(state.model, val_loader, **how(config))
    assert (result["correct1"], result["correct5"]) == (hits, hits5)
    assert result["loss"] == pytest.approx(loss / 355, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_no_synchronisation_between_log_steps(precision):
    """A host that waits for a value calls aten::_local_scalar_dense: as often in six steps as in three."""
    counts = []
    for steps in (3, 6):
        config, state, loader, _ = prepare(
            data__name="synthetic",
            data__images=64 * steps,
            train__epochs=1,
            train__log_every=steps,
            train__precision=precision,
            train__ema_decay=0.9,
            optim__clip_norm=1.0,
        )
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            logged = run(config, state, loader)
        assert len(logged) == 1
        events = {event.key: event.count for event in trace.key_averages()}
        assert events["aten::addmm"] == steps  # the classifier: the trace did see the steps
        counts.append(events["aten::_local_scalar_dense"])
    assert counts[0] == counts[1]


def test_the_probe_sees_a_synchronisation():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.ones(3).sum().item()
    assert any(event.key == "aten::_local_scalar_dense" for event in trace.key_averages())


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_follows_float32(precision, tolerance):
    losses = []
    for name in ("float32", precision):
        config, state, loader, _ = prepare(train__max_steps=5, train__precision=name)
        losses.append(run(config, state, loader)[0]["train/loss"])
        assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[1] != losses[0]


def test_clipping_bounds_the_gradient_and_logs_both_norms():
    config, state, loader, _ = prepare(optim__clip_norm=0.01, train__log_every=1, train__max_steps=1)
    seen = []
    step = state.optimizer.step

    def spy(*arguments, **keywords):
        seen.append(torch.stack([p.grad.norm() for p in state.model.parameters()]).norm().item())
        return step(*arguments, **keywords)

    state.optimizer.step = spy
    norm_excludes = [state.model.fc.weight]
    logged = run(config, state, loader, norm_excludes)[0]
    assert seen[0] == pytest.approx(0.01, rel=1e-3)
    assert 0 < logged["train/grad_norm_without_logits"] < logged["train/grad_norm"]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixing_is_a_function_of_seed_and_step(mixup, cutmix):
    weights = []
    for _ in range(2):
        config, state, loader, _ = prepare(train__mixup=mixup, train__cutmix=cutmix, train__max_steps=2)
        torch.rand(7)  # what came before must not matter
        run(config, state, loader)
        weights.append(state.model.fc.weight.detach().clone())
    assert torch.equal(*weights)
    config, state, loader, _ = prepare(train__max_steps=2)
    run(config, state, loader)
    assert not torch.equal(weights[0], state.model.fc.weight)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_mixed_targets_are_pairs(monkeypatch, mixup, cutmix):
    """An image's target is shared by its own label and its neighbour's, in one proportion for the whole batch."""
    seen = []
    loss_of = F.cross_entropy

    def spy(logits, targets, **keywords):
        seen.append(targets)
        return loss_of(logits, targets, **keywords)

    monkeypatch.setattr(F, "cross_entropy", spy)
    config, state, loader, _ = prepare(train__mixup=mixup, train__cutmix=cutmix, train__max_steps=1)
    run(config, state, loader)
    labels = next(iter(loader.epoch(0))).parts[0][1]
    (targets,) = seen
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(64))
    other = labels.roll(1)
    alone = labels == other
    share = targets[range(64), labels][~alone]
    torch.testing.assert_close(share, share[:1].expand_as(share))
    torch.testing.assert_close(targets[range(64), other][~alone], 1 - share)
    assert 0 < share[0] < 1


def test_binary_cross_entropy_by_hand():
    config, state, loader, _ = prepare(
        train__loss="binary_cross_entropy", train__label_smoothing=0.1, train__max_steps=1, train__log_every=1
    )
    images, labels = next(iter(loader.epoch(0))).parts[0]
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    probability = copy.deepcopy(state.model).train()(normalize(images, mean, std)).sigmoid()
    target = torch.full((64, 10), 0.01)
    target[range(64), labels] = 0.91
    expected = -(target * probability.log() + (1 - target) * (1 - probability).log()).mean()
    assert run(config, state, loader)[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_ema_by_hand():
    config, state, loader, _ = prepare(train__ema_decay=0.75, train__max_steps=1)
    before = state.model.fc.weight.detach().clone()
    run(config, state, loader)
    expected = 0.75 * before + 0.25 * state.model.fc.weight
    torch.testing.assert_close(state.ema.module.fc.weight, expected)


def test_dropout_is_a_function_of_seed_and_step():
    weights = []
    for _ in range(2):
        config, state, loader, _ = prepare(train__drop=0.5, train__max_steps=1)
        torch.rand(5)
        run(config, state, loader)
        weights.append(state.model.fc.weight.detach().clone())
    assert torch.equal(*weights)


def test_a_loss_that_is_not_finite_stops_the_run():
    config, state, loader, _ = prepare()
    with torch.no_grad():
        state.model.fc.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"not finite at step 1, learning rate 0.05; rank 0: the output of fc"):
        run(config, state, loader)


@pytest.mark.parametrize(("compression", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_compressed_gradients_are_rounded_to_their_dtype(monkeypatch, compression, dtype):
    """DDP over a group of one process: what the exchange leaves is the gradient, rounded once."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)  # one process is wrapped in nothing
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        gradients = {}
        for name in ("none", compression):
            state = prepare(train__gradient_compression=name)[1]
            state.wrapped(images).square().sum().backward()
            gradients[name] = [parameter.grad for parameter in state.model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    for exact, rounded in zip(gradients["none"], gradients[compression], strict=True):
        assert torch.equal(rounded, exact.to(dtype).float())
    assert any(not torch.equal(*pair) for pair in zip(gradients["none"], gradients[compression], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is of GPUs")
def test_tf32_keeps_ten_bits(monkeypatch):
    """The forward's error against float64: some 2^-11 with TF32, some 2^-23 without."""
    images = torch.randn(8, 64, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(1)).cuda()
    exact = F.conv2d(images.double(), weight.double())
    errors = []
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        errors.append((torch.linalg.vector_norm(F.conv2d(images, weight) - exact) / exact.norm()).item())
    assert 2**-14 < errors[0] < 2**-10
    assert errors[1] < 2**-18


def test_sync_bn_needs_gpus():
    with pytest.raises(ValueError, match="sync_bn needs GPUs"):
        prepare(train__sync_bn=True)


@pytest.mark.slow
def test_compiled_steps_agree():
    losses = []
    for compiled in (False, True):
        config, state, loader, _ = prepare(train__compile=compiled, train__max_steps=3, train__log_every=3)
        losses.append(run(config, state, loader)[0]["train/loss"])
        assert not any(key.startswith("_orig_mod") for key in state.model.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@torch._dynamo.config.patch(recompile_limit=8)
def test_one_compiled_graph_for_each_shape(monkeypatch):
    """No graph has a dynamic shape, and no size of a long schedule falls back to eager mode."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        assert all(isinstance(value, torch.Tensor) for value in inputs)  # a dynamic shape is an input
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    sizes = (32, 34, 36)
    schedule = [[epoch, size] for epoch, size in enumerate(sizes)]
    config = small_config(train__compile=True, data__size_schedule=schedule, data__size=32)
    state = build_state(Linear(), config, torch.device("cpu"), Classification(config, torch.device("cpu")))
    shapes = [(batch, 3, size, size) for size in sizes for batch in (6, 5, 4)]  # two smaller parts of the last batch
    for _ in range(2):
        for shape in shapes:
            state.wrapped(torch.ones(shape)).sum().backward()
        with torch.inference_mode():
            state.model.eval()(torch.ones(6, 3, 60, 60))
            state.model(torch.ones(2, 3, 60, 60))
        state.wrapped.train()
    assert len(graphs) == len(shapes) + 2


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.on_main(lambda: 3) == 3
