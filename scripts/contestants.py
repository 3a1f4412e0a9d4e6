"""What ``benchmark.py`` sets against each other: forms of the operator and networks, checked before they are timed."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lip_resnet  # noqa: F401 (registers the networks)
from lip_resnet import lip2d
from lip_resnet.layers.logits import BottleneckHead, Gate, InstanceNorm2d
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.ops import reference

WINDOW = (3, 2, 1)
# Channels and height = width of the features that LIP-ResNet-50 pools at 224x224: the stem, then main path and shortcut
# of stages 2 to 4.
SITES = {
    f"{channels}x{size}": (channels, size)
    for channels, size in ((64, 112), (128, 56), (256, 56), (256, 28), (512, 28), (512, 14), (1024, 14))
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
REFERENCE = "lip_resnet50, textbook"
FLOOR = "lip_resnet50, convolution floor"


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error over norm of the truth; any shape."""
    return ((value.double().cpu() - truth.double().cpu()).norm() / truth.double().norm().cpu()).item()


def textbook(x: Tensor, logits: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """The operator as the reference writes it; overflows for large logits and in float16."""
    weight = logits.exp()
    return F.avg_pool2d(x * weight, kernel_size, stride, padding) / F.avg_pool2d(weight, kernel_size, stride, padding)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(textbook, dynamic=False)


def compile_anew() -> None:
    """For every shape its own code, as a network of fixed sizes has it; torch would make the second one generic."""
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
}


class TextbookLIP(LIP2d):
    """A LIP layer with the textbook operator."""

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        logits = self.logits(trunk if isinstance(self.logits, BottleneckHead) else x)
        return textbook(x, logits, self.kernel_size, self.stride, self.padding)


class FloorLIP(LIP2d):
    """Average pooling in LIP's place; the logit branch still runs, forward and backward."""

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        logits = self.logits(trunk if isinstance(self.logits, BottleneckHead) else x)
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding) + 0 * logits[:, :, :1, :1].mean()


def textbook_network(name: str) -> nn.Module:
    """LIP-ResNet as the reference runs it: textbook operator, PyTorch's instance norm, the same weights."""
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, LIP2d):
                setattr(parent, key, TextbookLIP(child.logits, child.kernel_size, child.stride, child.padding))
            elif isinstance(child, InstanceNorm2d):
                setattr(parent, key, nn.InstanceNorm2d(child.num_features, affine=True))
    return model


def floor_network(name: str) -> nn.Module:
    """The convolution floor: every convolution of LIP-ResNet, identity for its instance norms and gates, no weights in
    the pooling. What LIP-ResNet costs above it is not the convolutions' arithmetic."""
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, LIP2d):
                setattr(parent, key, FloorLIP(child.logits, child.kernel_size, child.stride, child.padding))
            elif isinstance(child, (InstanceNorm2d, Gate)):
                setattr(parent, key, nn.Identity())
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "resnetblur50": lambda: timm.create_model("resnetblur50"),
    "lip_resnet50": lambda: timm.create_model("lip_resnet50"),
    REFERENCE: lambda: textbook_network("lip_resnet50"),
    FLOOR: lambda: floor_network("lip_resnet50"),
    "lip_resnet50, logits recomputed": lambda: timm.create_model("lip_resnet50", recompute_logits=True),
}


def build_networks(
    names: list[str], device: str, memory_format: torch.memory_format
) -> dict[str, tuple[nn.Module, str | None]]:
    """The networks on their device, LIP's all with the same weights, and what is wrong with each (None: nothing).

    A LIP network must agree with the textbook network in float64 and, as the floor must, have its multiply-adds.
    """
    torch.manual_seed(0)
    truth_network = NETWORKS[REFERENCE]()
    for module in truth_network.modules():  # not the average pooling that LIP starts as
        if isinstance(module, LIP2d):
            nn.init.normal_(module.logits.conv.weight, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    weights = truth_network.state_dict()
    images = torch.randn(1, 3, 96, 96)
    truth, operations = _run(truth_network.double(), images.double())
    found = {}
    for name in names:
        model, wrong = NETWORKS[name](), None
        if name.startswith("lip_"):
            model.load_state_dict(weights, strict=name != FLOOR)  # the floor has no norms
        model.to(device, memory_format=memory_format)
        with full_float32():
            output, own = _run(model, images.to(device, memory_format=memory_format))
        if name.startswith("lip_"):
            error = 0.0 if name == FLOOR else relative_error(output, truth)
            if not error < 1e-3 or own != operations:
                wrong = f"relative error {error:.1e}, {own} operations for {operations}"
        found[name] = model, wrong
    return found


def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model.eval()(images)
    return output, counter.get_total_flops()
