"""The strided layers of a network: what they are, at which site they stand, and what a forward pass gives them."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from timm.layers import BlurPool2d
from torch import Tensor, nn

from lip_resnet.layers.placement import Unstrided
from lip_resnet.layers.pooling import LIP2d

StridedLayer = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | BlurPool2d | LIP2d
BRANCH = re.compile(r"(downsample|shortcut|proj|skip)")


@dataclass
class Calls:
    """The calls of one module in a forward pass."""

    module: nn.Module
    inputs: list[torch.Size] = field(default_factory=list)
    outputs: list[torch.Size] = field(default_factory=list)


def trace(model: nn.Module, input_size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Calls]:
    """Module name -> shapes of its calls with one tensor, in the order of first calls, by a pass on the meta device."""
    trial = copy.deepcopy(model).to("meta").eval()
    originals = dict(model.named_modules())
    calls: dict[str, Calls] = {}

    def hook_for(name: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(out, Tensor):
                entry = calls.setdefault(name, Calls(originals[name]))
                entry.inputs.append(inputs[0].shape)
                entry.outputs.append(out.shape)

        return record

    for name, module in trial.named_modules():
        module.register_forward_hook(hook_for(name))
    with torch.no_grad():
        trial(torch.empty(2, *input_size, device="meta", dtype=dtype))
    return calls


def is_strided(module: nn.Module) -> TypeGuard[StridedLayer]:
    """Whether a module is a pooling layer or convolution with a stride above 1."""
    if not isinstance(module, StridedLayer) or isinstance(module, Unstrided):
        return False
    strides = module.stride if isinstance(module.stride, tuple) else (module.stride,)
    return max(strides) > 1


def reason_to_keep(module: StridedLayer, was_called: bool) -> str | None:
    """Why a strided layer cannot be replaced; None if it can."""
    if isinstance(module, LIP2d):
        return "it is LIP already"
    if type(module) not in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d):
        return f"{type(module).__name__} is a subclass whose forward may do more than pool or convolve"
    if not was_called:
        return "the forward pass does not call it"
    if _square(module.stride) is None:
        return f"its stride {module.stride} is not square"
    if isinstance(module, nn.Conv2d):
        return "its padding grows with its stride" if isinstance(module.padding, str) else None
    if window_of(module) is None:
        return "its window is not square"
    if getattr(module, "ceil_mode", False):
        return "it rounds the output size up (ceil_mode)"
    if getattr(module, "dilation", 1) not in (1, (1, 1)):
        return "its window is dilated"
    return None


def site_of(name: str, names: list[str]) -> str:
    """The site of a layer, inferred from its name and the names of the other strided layers."""
    parts = name.split(".")
    if any(re.fullmatch(r"(stem.*|maxpool|pool0|conv_?stem)", part) for part in parts):
        return "stem"
    for depth, part in enumerate(parts):
        if BRANCH.fullmatch(part):
            block, branch = ".".join(parts[:depth]) + ".", ".".join(parts[: depth + 1])
            beside = any(other.startswith(block) and not other.startswith(branch) for other in names)
            return "shortcut" if beside else "transition"
        if part.startswith("transition"):
            return "transition"
    return "main"


def _square(value: int | Sequence[Any]) -> int | None:
    """The one value of a window's size, stride or padding; None where height and width differ."""
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else None


def window_of(module: StridedLayer) -> tuple[int, int, int] | None:
    """Kernel size, stride and padding of a pooling layer; None where height and width differ."""
    kernel_size, stride, padding = map(_square, (_kernel_size(module), module.stride, module.padding))
    if kernel_size is None or stride is None or padding is None:
        return None
    return kernel_size, stride, padding


def _kernel_size(module: StridedLayer) -> int | tuple[int, ...]:
    return module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size


def describe(module: StridedLayer) -> str:
    size = _kernel_size(module)
    return f"{type(module).__name__} {_square(size) or size}/{_square(module.stride)}"
