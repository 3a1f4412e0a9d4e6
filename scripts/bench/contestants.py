"""What ``benchmark.py`` compares: implementations of the operator, and networks, which are checked when built."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lip_resnet  # noqa: F401 (registers the networks)
from bench import previous
from bench.timing import WrongResult
from lip_resnet import lip2d
from lip_resnet.layers.logits import BottleneckTrunk, Gate, InstanceNorm2d
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.ops import reference

WINDOW = (3, 2, 1)
# Channels, and height = width, of the inputs of LIP-ResNet-50's pooling layers at 224x224: the stem, then main path and
# shortcut of stages 2 to 4.
SITES = {
    f"{channels}x{size}": (channels, size)
    for channels, size in ((64, 112), (128, 56), (256, 56), (256, 28), (512, 28), (512, 14), (1024, 14))
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
FLOOR = "lip_resnet50, convolution floor"
REFERENCE = "lip_resnet50, textbook"
PREVIOUS = "previous kernels"
GPU_ONLY = {PREVIOUS, f"lip_resnet50, {PREVIOUS}"}
"""Contestants that need a GPU; Triton's kernels before today's."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error over norm of the truth, of tensors of any shape."""
    return ((value.double().cpu() - truth.double().cpu()).norm() / truth.double().norm().cpu()).item()


def textbook(x: Tensor, logits: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """The operator as in the reference code; overflows for large logits, and in float16."""
    weight = logits.exp()
    return F.avg_pool2d(x * weight, kernel_size, stride, padding) / F.avg_pool2d(weight, kernel_size, stride, padding)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(textbook, dynamic=False)


def reset_compile() -> None:
    """Compile for the next shape alone, as in a network of fixed sizes, and not for dynamic shapes."""
    torch.compiler.reset()
    _compiled.cache_clear()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 in convolutions and matrix products."""
    modules = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.allow_tf32 = value


# Each maps x and logits (B, C, H, W) to (B, C, h, w).
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "textbook": textbook,
    "lip2d": lip2d,
    "plain form": lambda x, logits: reference.pool(x.float(), logits.float(), WINDOW).to(x.dtype),
    "textbook, torch.compile": lambda x, logits: _compiled()(x, logits),
    "avg_pool2d": lambda x, logits: F.avg_pool2d(x, *WINDOW),
    PREVIOUS: previous.pool,
}


class TextbookLIP(LIP2d):
    """A LIP layer with the textbook operator."""

    def _pool(self, x: Tensor, source: Tensor) -> Tensor:
        return textbook(x, self.logits(source), self.kernel_size, self.stride, self.padding)


class TextbookNorm(nn.InstanceNorm2d):
    """PyTorch's instance norm followed by the activation."""

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        x = super().forward(x)
        return x if activation is None else activation(x)


@torch.library.custom_op("lip_benchmark::floor_pool", mutates_args=())
def floor_pool(x: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """x and logits (B, C, H, W) -> (B, C, h, w): average pooling of x, with a gradient for both.

    Replaces ``lip2d`` in the convolution floor. A custom operator, as ``lip2d`` is, so that torch.compile keeps the
    logits. Backward computes one tensor, average pooling's gradient in the layout of x, for both x and logits.
    """
    return F.avg_pool2d(x, kernel_size, stride, padding)


@floor_pool.register_fake
def _(x: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    return F.avg_pool2d(x, kernel_size, stride, padding)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, _, *ctx.window = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    window = [[side, side] for side in ctx.window]
    gradient = torch.ops.aten.avg_pool2d_backward(dy, *ctx.saved_tensors, *window, False, True, None)
    return gradient, gradient, None, None, None


floor_pool.register_autograd(_backward, setup_context=_setup_context)


class FloorLIP(LIP2d):
    """A LIP layer with ``floor_pool`` in place of the operator."""

    def _pool(self, x: Tensor, source: Tensor) -> Tensor:
        return floor_pool(x, self.logits(source), self.kernel_size, self.stride, self.padding)


class Skip(nn.Identity):
    """Identity in place of a norm and of the activation that is passed to it."""

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        return x


def variant(name: str, layer: type[LIP2d], norm: type[nn.Module], **norm_options: bool) -> nn.Module:
    """A LIP network with another LIP layer and another instance norm, both with the same weights."""
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, LIP2d):
                setattr(parent, key, layer(child.logits, child.kernel_size, child.stride, child.padding))
            elif isinstance(child, InstanceNorm2d):
                setattr(parent, key, norm(child.num_features, **norm_options))
    return model


def textbook_network(name: str) -> nn.Module:
    """A LIP network as in the reference code: textbook operator and PyTorch's instance norm."""
    return variant(name, TextbookLIP, TextbookNorm, affine=True)


def floor_network(name: str) -> nn.Module:
    """The convolution floor: LIP-ResNet with all its convolutions, forward and backward, and none of LIP's other work.

    Average pooling with ``floor_pool``'s gradient replaces the operator; the instance norms, ReLUs and gates of the
    logit modules are removed. LIP-ResNet's time above the floor is the operator's, less an average pooling's, and the
    logit modules' elementwise work.
    """
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, LIP2d):
                setattr(parent, key, FloorLIP(child.logits, child.kernel_size, child.stride, child.padding))
            elif isinstance(child, (InstanceNorm2d, Gate)) or (
                isinstance(parent, BottleneckTrunk) and isinstance(child, nn.ReLU)
            ):
                setattr(parent, key, Skip())
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "resnetblur50": lambda: timm.create_model("resnetblur50"),
    "lip_resnet50": lambda: timm.create_model("lip_resnet50"),
    REFERENCE: lambda: textbook_network("lip_resnet50"),
    FLOOR: lambda: floor_network("lip_resnet50"),
    "lip_resnet50, logits recomputed": lambda: timm.create_model("lip_resnet50", recompute_logits=True),
    f"lip_resnet50, {PREVIOUS}": lambda: variant("lip_resnet50", previous.PreviousLIP, previous.PreviousNorm),
}
DEFAULT_NETWORKS = tuple(NETWORKS)
NETWORKS |= {
    name: functools.partial(timm.create_model, name)
    for name in ("resnet101", "lip_resnet101", "densenet121", "lip_densenet121")
}


@functools.cache
def _truth(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
    """Weights of a LIP network with varying logits, images, the textbook network's float64 output, and its FLOPs."""
    torch.manual_seed(0)
    model = textbook_network(name)
    for module in model.modules():  # at initialisation LIP is average pooling
        if isinstance(module, LIP2d):
            nn.init.normal_(module.logits.conv.weight, std=0.01)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    weights, images = copy.deepcopy(model.state_dict()), torch.randn(1, 3, 96, 96)
    return weights, images, *_run(model.double(), images.double())


def build_network(name: str, device: str, memory_format: torch.memory_format) -> nn.Module:
    """A network of ``NETWORKS`` on its device, all LIP networks with the same weights.

    Raises:
        WrongResult: a LIP network's output (not the floor's) or multiply-adds differ from the textbook network's.
    """
    model = NETWORKS[name]().to(device, memory_format=memory_format)
    if not name.startswith("lip_"):
        return model
    weights, images, truth, expected_flops = _truth(name.partition(",")[0])
    model.load_state_dict(weights, strict=name != FLOOR)  # the floor has no norms
    with full_float32():
        output, flops = _run(model, images.to(device, memory_format=memory_format))
    error = 0.0 if name == FLOOR else relative_error(output, truth)
    if not error < 1e-3 or flops != expected_flops:
        raise WrongResult(f"relative error {error:.1e}, {flops} operations for {expected_flops}")
    return model


def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model.eval()(images)
    return output, counter.get_total_flops()
