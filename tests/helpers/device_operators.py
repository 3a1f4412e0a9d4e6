"""Checks of the fused operators on any device: tests/gpu runs them on a GPU, test_device_checks.py on the CPU."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from bench.op import check_form
from torch import Tensor, nn

from helpers.lip_oracle import relative_error, slow_lip2d
from helpers.operator_cases import LAYOUTS, TOLERANCES, make
from lip_resnet import lip2d
from lip_resnet.layers.logits import InstanceNorm2d
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.ops import dispatch, norm, reference_norm

WINDOW = (3, 2, 1)
AFTER = {"none": lambda t: t, "relu": torch.relu, "gate": lambda t: 12 * torch.sigmoid(t)}


@contextlib.contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """torch.empty and its kin return NaN: an element that a kernel does not write stays NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pool(x: Tensor, logits: Tensor, window: tuple[int, int, int] = WINDOW, seed: int = 0) -> tuple[Tensor, ...]:
    """dy and lip2d's y, dx, dlogits, computed by the fused operator wherever it is available."""
    torch.manual_seed(seed)
    y = lip2d(x, logits, *window)
    assert not dispatch.available(x.device.type) or "lip_resnet_lip2d" in y.grad_fn.name()
    dy = torch.randn_like(y)
    return dy, y.detach(), *torch.autograd.grad(y, (x, logits), dy)


def check_operator(
    device: str,
    dtype: torch.dtype,
    layout: str,
    shape: tuple[int, ...],
    window: tuple[int, int, int],
    logits_range: tuple[float, float] = (0.0, 12.0),
) -> None:
    """lip2d and its gradients against slow loops in float64: values, dtype and layout; every element is written."""
    x, logits = (t.detach().to(device).requires_grad_() for t in make(shape, dtype, layout, *logits_range))
    with uninitialized_is_nan():
        dy, *results = pool(x, logits, window)
    truths = slow_lip2d(x.cpu(), logits.cpu(), dy.cpu(), *window)
    for name, value, truth in zip(("y", "dx", "dlogits"), results, truths, strict=True):
        assert value.dtype == dtype, name
        assert value.is_contiguous(memory_format=LAYOUTS[layout]), name
        assert value.isfinite().all(), f"{name}: elements not written"
        if truth.norm() > 1e-9:
            assert relative_error(value.cpu(), truth) < TOLERANCES[dtype], name
        else:  # windows of one position: the logits' gradient is zero
            assert value.abs().max() < 1e-6, name


def normalise(z: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, ...]:
    """dout and norm_act's out, dz, dweight, dbias, computed by the fused operator."""
    torch.manual_seed(0)
    out = norm.norm_act(z, weight, bias, 1e-5, activation, 12.0)
    dout = torch.randn_like(out)
    return dout, out.detach(), *torch.autograd.grad(out, (z, weight, bias), dout)


def check_norm(device: str, dtype: torch.dtype, layout: str, activation: str, shape: tuple[int, ...]) -> None:
    """norm_act with float32 weights and its gradients against PyTorch's instance norm in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator) + 1
    z = z.to(device, dtype, memory_format=LAYOUTS[layout]).requires_grad_()
    weight, bias = (torch.randn(shape[1], generator=generator).to(device).requires_grad_() for _ in range(2))
    with uninitialized_is_nan():
        dout, *results = normalise(z, weight, bias, activation)
    inputs = [t.detach().cpu().double().contiguous().requires_grad_() for t in (z, weight, bias)]
    out = AFTER[activation](nn.functional.instance_norm(inputs[0], None, None, *inputs[1:], eps=1e-5))
    truths = out, *torch.autograd.grad(out, inputs, dout.cpu().double().contiguous())
    for name, value, truth in zip(("out", "dz", "dweight", "dbias"), results, truths, strict=True):
        assert value.isfinite().all(), f"{name}: elements not written"
        assert relative_error(value.cpu(), truth) < TOLERANCES[dtype], name
    for value in results[:2]:
        assert value.dtype == dtype
        assert value.is_contiguous(memory_format=LAYOUTS[layout])


def check_site(device: str, dtype: torch.dtype, batch: int, channels: int, size: int) -> None:
    """The operator and the gated norm at a site of LIP-ResNet, channels-last, against float64 on the device."""
    torch.manual_seed(0)
    x, logits = (torch.randn(batch, channels, size, size, device=device) for _ in range(2))
    x = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    logits = (6 + 2 * logits).to(dtype, memory_format=torch.channels_last).requires_grad_()
    dy, *results = pool(x, logits)
    assert check_form(tuple(results), x, logits, dy) < TOLERANCES[dtype]
    weight, bias = (torch.randn(channels, device=device).requires_grad_() for _ in range(2))
    dout, *results = normalise(x, weight, bias, "gate")
    inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    out = reference_norm.norm_act(*inputs, 1e-5, reference_norm.GATE, 12.0)
    truths = out, *torch.autograd.grad(out, inputs, dout.double())
    for value, truth in zip(results, truths, strict=True):
        assert relative_error(value, truth) < TOLERANCES[dtype]


def check_large(device: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    """Tensors of many elements or images: the first and last image have the results that they have alone."""
    torch.manual_seed(0)
    x, logits = (torch.rand(shape, device=device, dtype=dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    ends = [torch.cat([t[:1], t[-1:]]).contiguous(memory_format=LAYOUTS[layout]) for t in (x, logits)]
    dy, *results = pool(x.requires_grad_(), logits.mul_(12).requires_grad_())
    ends = [ends[0].requires_grad_(), ends[1].mul_(12).requires_grad_()]
    y = lip2d(*ends, *WINDOW)
    truths = y.detach(), *torch.autograd.grad(y, ends, torch.cat([dy[:1], dy[-1:]]))
    for name, value, truth in zip(("y", "dx", "dlogits"), results, truths, strict=True):
        assert relative_error(torch.cat([value[:1], value[-1:]]), truth) < TOLERANCES[dtype], name
    del dy, results, logits
    weight, bias = (torch.ones(shape[1], device=device).requires_grad_() for _ in range(2))
    dout, *results = normalise(x, weight, bias, "gate")
    out = norm.norm_act(ends[0], weight, bias, 1e-5, "gate", 12.0)
    (dz,) = torch.autograd.grad(out, ends[0], torch.cat([dout[:1], dout[-1:]]))
    for value, truth in zip(results[:2], (out.detach(), dz), strict=True):
        assert relative_error(torch.cat([value[:1], value[-1:]]), truth) < TOLERANCES[dtype]


def check_repeats(device: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    """The same call gives the same bits, forward and backward, of the operator and the norm."""
    x, logits = (t.detach().to(device).requires_grad_() for t in make(shape, dtype, layout))
    weight, bias = (torch.ones(shape[1], device=device).requires_grad_() for _ in range(2))
    first, *others = [(*pool(x, logits), *normalise(x, weight, bias, "gate")) for _ in range(3)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def captured_operators(network: nn.Module, images: Tensor) -> dict[str, int]:
    """How often each operator of this package stands in the graphs that torch.compile captures."""
    counts: Counter = Counter()

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        targets = [str(node.target) for node in graph.graph.nodes]
        counts.update(target.split(".")[1] for target in targets if target.startswith("lip_resnet."))
        return graph.forward

    torch.compiler.reset()
    torch.compile(network, backend=count, dynamic=False)(images)
    return dict(counts)


def check_capture(device: str, network: nn.Module, size: int) -> None:
    """torch.compile keeps every lip2d and every instance norm of the network as fused operators."""
    network = network.to(device, memory_format=torch.channels_last).train()
    modules = list(network.modules())
    images = torch.randn(2, 3, size, size, device=device).to(memory_format=torch.channels_last)
    assert captured_operators(network, images) == {
        "lip2d": sum(isinstance(module, LIP2d) for module in modules),
        "instance_norm": sum(isinstance(module, InstanceNorm2d) for module in modules),
    }
