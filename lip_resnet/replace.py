"""Another downsampling in any convolutional network: pooling layers and strided convolutions are swapped in place.

A pooling layer is replaced by a layer of the same window. A strided convolution becomes the same convolution at stride
1, keeping its weights and their keys, followed by a layer; with ``strided`` the network computes what it did before.
Only modules can be found: pooling that a forward method calls as a function stays as it is.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import BlurPool2d
from torch import Tensor, nn

from lip_resnet.pooling import LIP2d, LogitOptions, check_layer, make_layer

SITES = ("image", "stem", "main", "shortcut", "transition")
"""image: the convolution that reads the image; stem: pooling in the stem; shortcut: beside a block's main path;
transition: between stages; main: everything else."""


class DownsampledConv2d(nn.Conv2d):
    """``conv`` at stride 1 with its own weights, then ``pool``: (B, C, H, W) -> (B, C', h, w), keys unchanged."""

    def __init__(self, conv: nn.Conv2d, pool: nn.Module) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        self.weight = conv.weight
        self.bias = conv.bias
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(super().forward(x))


@dataclass
class Replacements:
    """What ``replace_downsampling`` did, by module name."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Name -> site, what stood there and what stands there now."""
    left: dict[str, str] = field(default_factory=dict)
    """Name -> why it stayed."""

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left alone"]
        lines += [f"  {name}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def replace_downsampling(
    model: nn.Module,
    layers: str | Mapping[str, str] = "lip",
    *,
    input_size: tuple[int, int, int] | None = None,
    options: LogitOptions | None = None,
) -> Replacements:
    """Swap the downsampling layers of ``model`` in place.

    Args:
        model: any timm or torchvision CNN.
        layers: a name of ``pooling.LAYERS`` for every site but ``image``, or a mapping of ``SITES`` to names; sites
            that it lacks stay. New LIP layers start as average pooling; ``lip`` has simplified logits in the stem and
            ``options.module`` elsewhere.
        input_size: (channels, height, width) of an image the model takes, to learn what each layer sees (no
            arithmetic is done); by default timm's configuration of the model, or (3, 224, 224).
        options: of the logit modules.

    Returns:
        What was swapped, and what was left alone and why. ``print`` it.

    Raises:
        ValueError: unknown layer or site; nothing is swapped then.
    """
    chosen = dict.fromkeys(SITES[1:], layers) if isinstance(layers, str) else dict(layers)
    for site, name in chosen.items():
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; known: {', '.join(SITES)}")
        check_layer(name, site)
    options = options or LogitOptions()
    if input_size is None:
        input_size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))

    channels = _traced_channels(model, input_size)
    names = [name for name, module in model.named_modules() if _is_strided(module)]
    report, new = Replacements(), {}
    for name in names:
        old = model.get_submodule(name)
        first = name == next(iter(channels), None) and getattr(old, "in_channels", None) == input_size[0]
        site = _site(name, names, first)
        reason = _reason_to_stay(old, name in channels)
        if reason is None and site not in chosen:
            reason = f"no layer was chosen for the site {site!r}"
        if reason is not None:
            report.left[name] = reason
            continue
        layer = "lip_simplified" if chosen[site] == "lip" and site == "stem" else chosen[site]
        try:
            new[name] = _replacement(old, layer, channels[name], options, next(model.parameters()))
        except ValueError as error:
            report.left[name] = str(error)
            continue
        report.swapped[name] = f"{site}, {_describe(old)} -> {layer}"
    for name, module in new.items():
        _set(model, model.get_submodule(name), module)
    return report


def _replacement(old: nn.Module, layer: str, channels: int, options: LogitOptions, like: Tensor) -> nn.Module:
    """What takes the place of ``old``, on the device, in the dtype and in the mode of the model."""
    dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    if isinstance(old, nn.Conv2d):
        # The smallest window, centred on the sample, in which every position counts: 3 for stride 2.
        stride = old.stride[0]
        pool = make_layer(layer, old.out_channels, 2 * stride - 1, stride, stride - 1, options, **dd)
        return DownsampledConv2d(old, pool).train(old.training)
    return make_layer(layer, channels, *_window(old), options, **dd).train(old.training)


def _traced_channels(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Channels that every strided layer yields, in the order of the forward pass, from a copy without storage."""
    trial = copy.deepcopy(model).to("meta").eval()
    found: dict[str, int] = {}
    names = {module: name for name, module in trial.named_modules() if _is_strided(module)}

    def note(module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        found.setdefault(names[module], out.shape[1])

    for module in names:
        module.register_forward_hook(note)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        trial(torch.empty(2, *input_size, device="meta", dtype=dtype))
    return found


def _is_strided(module: nn.Module) -> bool:
    """A pooling layer or a convolution that takes bigger steps than 1."""
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d, LIP2d)
    if not isinstance(module, kinds) or isinstance(module, DownsampledConv2d):
        return False
    steps = module.stride if isinstance(module.stride, tuple) else (module.stride,)
    return max(steps) > 1


def _reason_to_stay(module: nn.Module, was_called: bool) -> str | None:
    """Why a strided layer cannot be swapped; None if it can."""
    if isinstance(module, LIP2d):
        return "it is LIP already"
    if type(module) not in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d):
        return f"{type(module).__name__} is a kind of its own"
    if not was_called:
        return "the forward pass does not call it"
    if _square(module.stride) is None:
        return f"its stride {module.stride} is not square"
    if isinstance(module, nn.Conv2d):
        return "its padding grows with its stride" if isinstance(module.padding, str) else None
    if None in _window(module):
        return "its window is not square"
    if getattr(module, "ceil_mode", False):
        return "it rounds the output size up (ceil_mode)"
    if getattr(module, "dilation", 1) not in (1, (1, 1)):
        return "its window is dilated"
    return None


def _site(name: str, names: list[str], first: bool) -> str:
    """The site of a layer, told from its name and its neighbours'."""
    if first:
        return "image"
    parts = name.split(".")
    if any(re.fullmatch(r"(stem.*|maxpool|pool0|conv_?stem)", part) for part in parts):
        return "stem"
    for depth, part in enumerate(parts):
        if re.fullmatch(r"(downsample|shortcut|proj|skip)", part):
            block, branch = ".".join(parts[:depth]) + ".", ".".join(parts[: depth + 1])
            beside = any(other.startswith(block) and not other.startswith(branch) for other in names)
            return "shortcut" if beside else "transition"
        if part.startswith("transition"):
            return "transition"
    return "main"


def _square(value: int | tuple[int, ...] | list[int]) -> int | None:
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else None


def _window(module: nn.Module) -> tuple[int | None, int | None, int | None]:
    """Kernel size, stride and padding; None where a number differs between height and width."""
    size = module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size
    return _square(size), _square(module.stride), _square(module.padding)


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__} {_window(module)[0]}/{_window(module)[1]}"


def _set(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands: a module may be shared."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
