"""Checks of whole training steps on any device: tests/gpu runs them on a GPU, test_device_checks.py on the CPU."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from bench.network import make_batch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity

from helpers import small_config
from helpers.training import same, whole_state
from lip_resnet import distributed
from lip_resnet.config import Config
from lip_resnet.data import Batch, prefetch
from lip_resnet.models import registry
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import TrainState, TrainStep, build_state, train_one_epoch

LIP = {"main": "lip_bottleneck"}
LAYOUT_KERNELS = ("nchwtonhwc", "nhwctonchw")
"""Parts of the names of cuDNN's kernels that change layouts, in lower case."""


class Noise:
    """A loader of ``steps`` batches of noise on the CPU, all different."""

    def __init__(self, config: Config, steps: int) -> None:
        self.config, self.steps = config, steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for step in range(first_step, self.steps):
            torch.manual_seed(step)
            yield make_batch(self.config, torch.device("cpu"))


def prepare(device: str, batch: int, side: int, **changes: object) -> tuple[Config, TrainState]:
    """A small LIP network with ten classes and what trains it, always from the same weights."""
    sizes = {"data__size": side, "data__eval_size": side, "data__eval_resize": side, "data__batch_size": batch}
    config = small_config(**{"model__downsampling": LIP, "optim__lr": 0.01, **sizes, **changes})
    torch.manual_seed(0)
    task = Classification(config, torch.device(device))
    return config, build_state(registry.build_model(config.model), config, torch.device(device), task)


def make_step(device: str, batch: int, side: int, **changes: object) -> tuple[TrainState, TrainStep, Batch]:
    """A network's state, its training step and a batch on the device."""
    config, state = prepare(device, batch, side, **changes)
    state.wrapped.train()
    torch.manual_seed(0)
    made = make_batch(config, torch.device(device))
    return state, TrainStep(state, config), made


def check_skipped_step(device: str, precision: str, batch: int = 2, side: int = 32, **changes: object) -> None:
    """A step with one NaN leaves every tensor that a step may change as it was, bit for bit."""
    state, step, data = make_step(
        device, batch, side, train__precision=precision, train__ema_decay=0.9, train__on_nonfinite="skip", **changes
    )
    if precision == "float16":
        state.scaler = torch.amp.GradScaler(device, init_scale=256.0)  # no step overflows
    reported: list[str] = []
    state.guard.warn = reported.append
    step(data, 0.01)
    before = whole_state(state)
    hook = state.model.fc.register_forward_hook(lambda module, inputs, output: output + math.nan)
    step(data, 0.01)
    state.guard.check_pending()
    hook.remove()
    same(before, whole_state(state))
    assert len(reported) == 1
    step(data, 0.01)
    state.guard.check_pending()
    assert len(reported) == 1
    assert not torch.equal(before["model.fc.weight"], state.model.fc.weight)


def check_no_synchronisation(device: str, precision: str, batch: int = 2, side: int = 32, **changes: object) -> None:
    """``train_one_epoch`` never waits for the GPU between two log steps, its copies of batches included.

    The first steps may: cuDNN and the allocator are set up. On the CPU there is nothing to wait for.
    """
    changes |= {"train__precision": precision, "train__ema_decay": 0.9, "train__epochs": 1, "optim__clip_norm": 1.0}
    config, state = prepare(device, batch, side, **changes)
    modes: list[str] = []

    def set_mode(phase: str) -> None:
        modes.append("default" if phase == "log" or state.step < 2 else "error")
        if state.guard.device.type == "cuda":
            torch.cuda.set_sync_debug_mode(modes[-1])

    loader, logged = Noise(config, steps=5), []
    try:
        train_one_epoch(state, loader, config, on_step=lambda: None, on_log=logged.append, on_phase=set_mode)
    finally:
        if state.guard.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert modes == ["default"] * 6 + ["error"] * 9 + ["default"]
    assert len(logged) == 1


def check_no_layout_copy(device: str, precision: str, batch: int = 3, side: int = 64, **changes: object) -> None:
    """No operator or kernel of a channels-last training step changes the layout of features."""
    _, step, data = make_step(device, batch, side, train__precision=precision, **changes)
    for _ in range(2):  # cuDNN's search for algorithms tries other layouts
        step(data, 0.01)
    gpu = [ProfilerActivity.CUDA] if data.parts[0][0].is_cuda else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True) as profile:
        step(data, 0.01)
    names = {event.name for event in profile.events()}
    assert {"lip_resnet::lip2d", "lip_resnet::lip2d_backward"} <= names
    copies = [
        (event.name, event.input_shapes[0])
        for event in profile.events()
        if event.name in ("aten::copy_", "aten::clone", "aten::contiguous")
        and event.input_shapes
        and len(event.input_shapes[0]) == 4
        and event.input_shapes[0][0] == batch
        and event.input_shapes[0][1] != 3  # the images: uint8 to float32, and to the precision
    ]
    assert not copies
    if precision != "float32":  # cuDNN itself changes layouts for float32 convolutions without TF32
        assert not [name for name in names if any(part in name.lower() for part in LAYOUT_KERNELS)]


def check_prefetch(device: str, batches: int = 6, cycles: int = 10_000_000) -> None:
    """Batches arrive in order and unchanged, though the loader reuses its memory and each step is slow.

    The next batch is asked for once the step has been enqueued, so that its copy overlaps with the step.
    """
    images, events, sums = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), [], []

    def load() -> Iterator[Batch]:
        for number in range(batches):
            events.append(("load", number))
            images.fill_(number + 1)
            yield Batch([(images, torch.full((8,), number))], 8, 0)

    for batch in prefetch(load(), torch.device(device)):
        ((pixels, labels),) = batch.parts
        assert pixels.device.type == labels.device.type == torch.device(device).type
        events.append(("step", len(sums)))
        if pixels.is_cuda:
            torch.cuda._sleep(cycles)
        sums.append((pixels.float().mean(), labels.float().mean()))
    expected = [[("load", number), ("step", number)] for number in range(batches)]
    assert events == [event for pair in expected for event in pair]
    assert [[pixels.item(), label.item()] for pixels, label in sums] == [[n + 1, n] for n in range(batches)]


def check_step_repeats(device: str, precision: str, batch: int = 2, side: int = 32, **changes: object) -> None:
    """Two runs of two steps from the same weights end with the same bits, with cuDNN's deterministic algorithms."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        ends = []
        for _ in range(2):
            state, step, data = make_step(
                device, batch, side, train__precision=precision, train__ema_decay=0.9, **changes
            )
            for _ in range(2):
                step(data, 0.01)
            ends.append(whole_state(state))
    finally:
        torch.backends.cudnn.deterministic = before
    same(*ends)


def check_ddp_strides(device: str, folder: Path, batch: int = 2, side: int = 32, **changes: object) -> None:
    """DDP in a group of one process: channels-last gradients have their bucket's strides, and DDP does not warn."""
    here = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    gpu = {"device_id": here} if device == "cuda" else {}
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1, **gpu)
    try:
        with mock.patch.object(distributed, "world_size", return_value=2):  # one process is not wrapped
            state = prepare(str(here), batch, side, **changes)[1]
        assert isinstance(state.wrapped, DistributedDataParallel)
        images = torch.randn(batch, 3, side, side, device=here).to(memory_format=torch.channels_last)
        produced: dict[str, tuple[int, ...]] = {}
        for key, parameter in state.model.named_parameters():
            parameter.register_hook(lambda gradient, key=key: produced.update({key: gradient.stride()}))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Grad strides do not match bucket view strides")
            for _ in range(2):
                with torch.autocast(device, torch.bfloat16):
                    loss = state.wrapped(images).float().sum()
                loss.backward()
                buckets = {key: parameter.grad.stride() for key, parameter in state.model.named_parameters()}
                state.optimizer.zero_grad()
        expected = {key: parameter.stride() for key, parameter in state.model.named_parameters()}
        assert produced == expected
        assert buckets == expected
        kernels = [p.stride() for p in state.model.parameters() if p.dim() == 4 and p.shape[1] * p.shape[2] > 1]
        assert kernels
        assert all(stride[1] == 1 for stride in kernels)  # channels-last
    finally:
        dist.destroy_process_group()
