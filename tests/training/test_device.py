"""The device of a process: its choice, and what MPS, which no test runs on, must not be asked for."""

import pytest
import torch
from helpers import small_config
from helpers.training import how, prepare, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lip_resnet import distributed, memory, seeding
from lip_resnet.data import to_device
from lip_resnet.errors import InputError
from lip_resnet.evaluation.evaluate import evaluate
from lip_resnet.evaluation.metrics import AccuracyCounts
from lip_resnet.ops import dispatch
from lip_resnet.training.optim import build_optimizer

MPS = torch.device("mps")


@pytest.fixture(autouse=True)
def chosen_before(monkeypatch):
    monkeypatch.setattr(distributed, "_device", None)


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "device"),
    [
        (False, False, "auto", "cpu"),
        (False, True, "auto", "cpu"),
        (True, False, "auto", "cuda:0"),
        (True, False, "cuda", "cuda:0"),
        (True, True, "cpu", "cpu"),
        (False, True, "mps", "mps"),
    ],
)
def test_device_by_name(monkeypatch, cuda, mps, name, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert distributed.choose_device(name) == distributed.device() == torch.device(device)


def test_an_unavailable_device_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name, line in (("cuda", "can use no CUDA GPU here; choose auto or cpu"), ("mps", "no Apple GPU here; choose")):
        with pytest.raises(InputError, match=f"device {name}: .*{line}"):
            distributed.choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match="one process, not 2"):
        distributed.choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes on this machine but 1 GPUs"):
        distributed.choose_device("cuda")
    assert distributed.choose_device("cpu").type == "cpu"


class Float64(TorchDispatchMode):
    """Records the operators that return float64, which MPS does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            self.operators.add(str(func))
        return result


def test_training_and_evaluation_have_no_float64_but_the_counts(monkeypatch):
    monkeypatch.setattr(AccuracyCounts, "__init__", lambda counts, device: setattr(counts, "sums", torch.zeros(4)))
    monkeypatch.setattr(dispatch, "available", lambda device_type: False)
    config, state, loader, val_loader = prepare(
        model__name="lip_densenet121",
        model__args={"block_config": [1, 1, 1, 1], "growth_rate": 8},
        data__name="synthetic",
        data__images=100,
        data__batch_size=8,
        optim__clip_norm=1.0,
        train__max_steps=2,
        train__ema_decay=0.9,
        train__mixup=0.2,
        train__cutmix=1.0,
    )
    with Float64() as seen:
        run(config, state, loader)
        evaluate(state.ema.module, val_loader, **how(config))
    assert seen.operators == set()
    state.load_state_dict(state.state_dict() | {"processes": [1]}, "itself")  # counts go by float64 in checkpoints
    assert state.state_dict()["window"].dtype == torch.float64


def test_what_mps_is_not_asked_for(monkeypatch):
    """float64 counts, channels-last, copies that do not block, a fused kernel; and its generator is seeded."""
    dtypes, seeds, copies = [], [], []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: dtypes.append(dtype) or zeros(*size, dtype=dtype))
    counts = AccuracyCounts(MPS)
    monkeypatch.undo()
    counts.add(torch.eye(5), torch.arange(5), torch.tensor(0.5))
    assert dtypes == [torch.float32]
    assert counts.reduce() | {"loss": 0.5} == counts.reduce()

    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: copies.append(non_blocking) or tensor)
    to_device(torch.ones(1), MPS)
    to_device(torch.ones(1), torch.device("cuda"))
    monkeypatch.undo()
    assert copies == [False, True]

    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    seeding.reseed_device(MPS, 7)
    assert seeds == [7]
    assert memory.layout(True, MPS) == memory.layout(False, MPS) == torch.contiguous_format
    assert memory.layout(True, torch.device("cpu")) == torch.channels_last
    dispatch._available.cache_clear()
    with pytest.warns(UserWarning, match="reference form, slower than the fused kernel: there is none for MPS"):
        assert not dispatch.available("mps")
    with torch.autocast("mps", torch.float32, enabled=False), torch.autocast("mps", torch.bfloat16):
        pass


def test_optimizers_on_mps_are_not_fused(monkeypatch):
    optim, model = small_config().optim, torch.nn.Linear(2, 2)
    assert build_optimizer(model, optim).defaults["fused"]
    monkeypatch.setattr(torch.nn.Parameter, "device", MPS, raising=False)
    assert not build_optimizer(model, optim).defaults["fused"]
