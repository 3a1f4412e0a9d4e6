"""Memory: gradient checkpointing changes nothing but it, and a failed allocation ends in a line that says what fits."""

import contextlib
import re
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import small_config
from helpers.commands import call
from helpers.training import CPU, how, prepare, run
from torch import nn

import train
from lip_resnet import checkpoint, distributed, memory
from lip_resnet.errors import InputError, OutOfMemory
from lip_resnet.evaluation.evaluate import evaluate
from lip_resnet.models import registry
from lip_resnet.training import run_folder
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import build_state
from lip_resnet.training.out_of_memory import suggest

NETWORKS = {
    "lip_resnet18": {"drop_path_rate": 0.3},
    "lip_densenet121": {"block_config": [1, 2, 2, 1], "growth_rate": 8, "proj_drop_rate": 0.1},
    "test_resnet": {},
    "densenet121": {"block_config": [1, 2, 2, 1], "growth_rate": 8},
}
FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB, other allocations: 1.00 GB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


def limit(model: nn.Module, most: int, error: Exception = FAILURES[0], after: int = 0) -> list[int]:
    """Let a training forward of more than ``most`` images fail, after ``after`` forwards; returns the sizes seen."""
    seen: list[int] = []

    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            seen.append(len(inputs[0]))
            if len(inputs[0]) > most and len(seen) > after:
                raise error

    model.register_forward_pre_hook(check)
    return seen


@contextlib.contextmanager
def one_process_group(monkeypatch):
    """DDP over a group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)  # one process is wrapped in nothing
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """It takes a second among the tests' modules; tensors must be released without it."""
    monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: None))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("lip_resnet18", "float32"),
        ("lip_densenet121", "float32"),
        ("lip_densenet121", "bfloat16"),
        ("test_resnet", "float32"),
        ("densenet121", "bfloat16"),
    ],
)
def test_checkpointing_changes_no_bit(name, precision):
    """Weights, averages and statistics after a step of two parts; the blocks do run twice."""
    states, forwards = [], []
    for enable in (False, True):
        config, state, loader, _ = prepare(
            model__name=name,
            model__args=NETWORKS[name],
            data__batch_size=8,
            data__last_batch="drop",
            optim__accumulate=2,
            optim__clip_norm=1.0,
            train__max_steps=1,
            train__precision=precision,
            train__ema_decay=0.9,
            train__drop=0.2,
            train__grad_checkpointing=enable,
        )
        ran = []
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        run(config, state, loader)
        forwards.append(len(ran))
        saved = state.state_dict()
        states.append(saved["model"] | {f"ema.{key}": value for key, value in saved["ema"].items()})
    assert forwards[1] > forwards[0]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_checkpointing_under_ddp(monkeypatch):
    states = []
    with one_process_group(monkeypatch):
        for enable in (False, True):
            network = {"model__name": "lip_densenet121", "model__args": NETWORKS["lip_densenet121"]}
            _, state, _, _ = prepare(**network, train__grad_checkpointing=enable)
            torch.manual_seed(0)
            for images in torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)):
                state.wrapped(images).square().sum().backward()
            states.append([parameter.grad for parameter in state.model.parameters()])
    for plain, checkpointed in zip(*states, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_model_without_checkpointing_is_refused():
    config = small_config(train__grad_checkpointing=True)
    model = registry.build_model(config.model)
    model.set_grad_checkpointing = lambda enable=True: (_ for _ in ()).throw(AssertionError("not supported"))
    with pytest.raises(InputError, match=r"train\.grad_checkpointing: ResNet does not have it"):
        build_state(model, config, CPU, Classification(config, CPU))
    with pytest.raises(InputError, match=r"train\.grad_checkpointing: Linear does not have it"):
        build_state(nn.Linear(2, 2), config, CPU, Classification(config, CPU))


@pytest.mark.slow
def test_compiled_checkpointing_agrees():
    states = []
    for compiled in (False, True):
        config, state, loader, _ = prepare(
            model__name="lip_resnet18",
            data__batch_size=8,
            train__compile=compiled,
            train__max_steps=2,
            train__grad_checkpointing=True,
        )
        run(config, state, loader)
        states.append(state.model.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: f"{type(error).__name__} {str(error)[:12]}")
def test_failed_allocations_are_recognised(error):
    def fail() -> None:
        raise error

    assert not memory.fits(fail)
    with pytest.raises(OutOfMemory, match="the line"), memory.explained(lambda: "the line"):
        fail()


def test_other_errors_pass():
    def fail() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"), memory.explained(lambda: "the line"):
        fail()
    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.fits(fail)


def test_tensors_of_a_failed_step_are_released_before_the_next_try():
    alive = []

    def step() -> None:
        activations = torch.zeros(4)
        alive.append(weakref.ref(activations))
        raise FAILURES[0]

    with pytest.raises(OutOfMemory, match="released"), memory.explained(lambda: "" if alive[0]() else "released"):
        step()


@pytest.mark.parametrize(
    ("keys", "most", "advice"),
    [
        (
            {},
            16,
            "optim.accumulate=4 keeps data.batch_size=64 and takes 16 images at a time, .*; or data.batch_size=16;",
        ),
        ({"optim__accumulate": 2}, 10, "optim.accumulate=8 keeps .* takes 8 images .*; or data.batch_size=14;"),
        ({"data__batch_size": 63}, 16, "optim.accumulate=7 keeps .* takes 9 images .*; or data.batch_size=15;"),
        ({"data__batch_size": 63, "data__repeats": 3}, 31, "optim.accumulate=3 .* takes 21 .*; or data.batch_size=30;"),
        # 1442 images: the last batch must hold 2 for each part.
        ({"data__batch_size": 62}, 3, "what fits: data.batch_size=3;"),
        ({"data__batch_size": 62, "data__last_batch": "drop"}, 3, "optim.accumulate=31 .*; or data.batch_size=3;"),
        (
            {"data__batch_size": 64, "optim__accumulate": 2},
            4,
            "what fits: optim.accumulate=16 [^;]*;$",
        ),
        ({}, 1, "not even 2 images fit: a smaller data.size might"),
    ],
)
def test_what_fits_is_computed(keys, most, advice):
    """The line names numbers that were tried; with checkpointing, which here needs as much, nothing more fits."""
    config, state, loader, _ = prepare(**keys)
    seen = limit(state.model, most)
    line = suggest(state, config, len(loader.source))
    images = config.data.batch_size // config.optim.accumulate
    assert line.startswith(f"out of memory on cpu with {images} images at a time, {config.data.batch_size} in a step, ")
    assert re.search(advice, line + ";"), line
    assert "grad_checkpointing" not in line
    assert all(2 <= size <= images for size in seen)


def test_checkpointing_is_advised_where_it_fits():
    config, state, _, _ = prepare()
    state.model.register_forward_pre_hook(
        lambda module, inputs: (_ for _ in ()).throw(FAILURES[0]) if not module.grad_checkpointing else None
    )
    assert suggest(state, config, 1442).endswith("what fits: train.grad_checkpointing=true, also with --resume auto")


def test_a_run_out_of_memory_ends_in_one_line_and_keeps_its_checkpoint(capsys, monkeypatch, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    config = small_config(train__checkpoint_steps=2, train__log_every=2)
    recipe.write_text(config.dump(), encoding="utf-8")
    build = registry.build_model

    def build_limited(*arguments, **keywords):
        model = build(*arguments, **keywords)
        limit(model, 20, after=5)  # one forward is the check of the image size
        return model

    monkeypatch.setattr(registry, "build_model", build_limited)
    code, _, printed = call(capsys, monkeypatch, train, "--config", recipe, "--output", tmp_path / "run")
    run_folder._locks.pop().close()  # as the end of the process does
    for thread in threading.enumerate():  # as the end of the process does
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    *logged, line = printed.splitlines()
    assert code == 1
    assert line.startswith("train.py: error: out of memory on cpu with 64 images at a time, 64 in a step, peak ")
    assert "optim.accumulate=4 keeps data.batch_size=64" in line
    assert "epoch 1 step 4/" in logged[-1]
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 4
    assert not (tmp_path / "run" / "requeue").exists()


def test_an_evaluation_out_of_memory_names_the_batch_that_fits():
    config, state, _, val_loader = prepare()

    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 20:
            raise FAILURES[0]

    state.model.register_forward_pre_hook(check)
    advice = r"evaluation with 50 images a batch, .*; 12 fit: data.eval_batch_size=12 \(eval.py --batch-size 12\)"
    with pytest.raises(OutOfMemory, match=advice):
        evaluate(state.model, val_loader, **how(config))


def test_the_peak_of_a_gpu_is_logged_and_of_the_cpu_is_said(monkeypatch):
    assert memory.peak(CPU) == {}
    assert memory.describe_peak(CPU).startswith("peak resident memory ")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert memory.peak(torch.device("cuda", 0)) == {"train/peak_memory_gib": 1.5}
