"""Replace the downsampling layers of any convolutional network in place.

A pooling layer is replaced by a layer with the same window. A strided convolution becomes the same convolution at
stride 1, with its weights and keys, followed by a layer; with ``strided`` the network computes what it did before.

Only modules are seen, not functional pooling in a ``forward`` method (``F.max_pool2d``). A module that is called
several times in a forward pass is kept, unless its replacement has no weights that the calls would share.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from timm.layers import BlurPool2d
from torch import Tensor, nn

from lip_resnet.layers.downsampling import LogitOptions, check_layer, make_layer
from lip_resnet.layers.pooling import LIP2d

SITES = ("image", "stem", "main", "shortcut", "transition")
"""image: the convolution that reads the image; stem: pooling in the stem; shortcut: on a block's shortcut;
transition: between stages; main: all other layers."""

StridedLayer = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | BlurPool2d | LIP2d


class DownsampledConv2d(nn.Conv2d):
    """``conv`` at stride 1 with its own weights, then ``pool``: (B, C, H, W) -> (B, C', h, w), keys unchanged."""

    def __init__(self, conv: nn.Conv2d, pool: nn.Module) -> None:
        same = ("in_channels", "out_channels", "kernel_size", "padding", "dilation", "groups", "padding_mode")
        keywords: dict[str, Any] = {name: getattr(conv, name) for name in same}
        super().__init__(**keywords, bias=conv.bias is not None, device="meta")
        self.weight = conv.weight
        self.bias = conv.bias
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(super().forward(x))


@dataclass
class Replacements:
    """What ``replace_downsampling`` did, by module name."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Name -> its site, the old layer -> the new layer."""
    kept: dict[str, str] = field(default_factory=dict)
    """Name -> the reason why it was not replaced."""

    @property
    def left(self) -> dict[str, str]:
        """An earlier name of ``kept``."""
        return self.kept

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} replaced, {len(self.kept)} kept"]
        lines += [f"  {name}: {change}" for name, change in self.swapped.items()]
        lines += [f"  {name}: kept, {reason}" for name, reason in self.kept.items()]
        lines.append("  not seen: pooling that a forward method calls as a function, such as F.max_pool2d")
        return "\n".join(lines)


def replace_downsampling(
    model: nn.Module,
    layers: str | Mapping[str, str] = "lip",
    *,
    input_size: tuple[int, int, int] | None = None,
    options: LogitOptions | None = None,
) -> Replacements:
    """Replace the downsampling layers of ``model`` in place: all of those chosen or, where it raises, none.

    Args:
        model: any timm or torchvision CNN.
        layers: a key of ``DOWNSAMPLING`` for every site but ``image``, or a mapping of ``SITES`` to keys; sites that
            are not in it keep their layers. New LIP layers start as average pooling; ``lip`` has simplified logits in
            the stem and ``options.module`` elsewhere.
        input_size: (channels, height, width) of an image that the model accepts, for a forward pass on the meta device
            that determines every layer's channels. Default: timm's configuration of the model, or (3, 224, 224).
        options: of the logit modules.

    Returns:
        What was replaced, and what was kept and why; ``print`` shows it.

    Raises:
        ValueError: unknown layer or site, or the model does not accept an image of ``input_size``, before or after the
            replacement; the model is unchanged.
    """
    chosen = dict.fromkeys(SITES[1:], layers) if isinstance(layers, str) else dict(layers)
    for site, name in chosen.items():
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; known: {', '.join(SITES)}")
        check_layer(name, site)
    options = options or LogitOptions()
    size = input_size or getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    like = next(model.parameters(), torch.empty(0))
    try:
        channels = _traced_channels(model, size, like.dtype)
    except Exception as error:  # whatever the model's own forward raises
        hint = "" if input_size else "; give input_size=(channels, height, width) of an image that it accepts"
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(model).__name__} does not accept an image of {tuple(size)}: {line}{hint}") from error
    strided = {name: module for name, module in model.named_modules() if _is_strided(module)}
    report = Replacements()
    new: dict[str, nn.Module] = {}
    for name, old in strided.items():
        reads_image = name == next(iter(channels), None) and getattr(old, "in_channels", None) == size[0]
        site = "image" if reads_image else _site(name, list(strided))
        reason: str | None = _reason_to_keep(old, name in channels) if name else "it is the model itself"
        if reason is None and site not in chosen:
            reason = f"no layer was chosen for the site {site!r}"
        if reason is not None:
            report.kept[name] = reason
            continue
        calls = channels[name]
        layer = "lip_simplified" if chosen[site] == "lip" and site == "stem" else chosen[site]
        try:
            module = _replacement(old, layer, calls[0], options, like)
        except ValueError as error:
            report.kept[name] = str(error)
            continue
        pool = module.pool if isinstance(module, DownsampledConv2d) else module
        if len(calls) > 1 and [*pool.parameters(), *pool.buffers()]:
            report.kept[name] = (
                f"the forward pass calls it {len(calls)} times, which would share one {layer}; give each call a module"
            )
            continue
        new[name] = module
        report.swapped[name] = f"{site}, {_describe(old)} -> {layer}"
    try:
        for name, module in new.items():
            _set(model, strided[name], module)
        _traced_channels(model, size, like.dtype)
    except Exception as error:
        for name, module in new.items():
            _set(model, module, strided[name])
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(model).__name__} does not run with the new layers, so it keeps its own: {line}"
        ) from error
    return report


def _replacement(old: StridedLayer, layer: str, channels: int, options: LogitOptions, like: Tensor) -> nn.Module:
    """The module that replaces ``old``: device and dtype of ``like``, a parameter of the model; ``old``'s mode."""
    factory_kwargs: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    if isinstance(old, nn.Conv2d):
        # The smallest centred window that covers every position: 3 for stride 2.
        stride = old.stride[0]
        pool = make_layer(layer, old.out_channels, 2 * stride - 1, stride, stride - 1, options, **factory_kwargs)
        return DownsampledConv2d(old, pool).train(old.training)
    window = _window(old)
    assert window is not None, "_reason_to_keep excludes windows that are not square"
    return make_layer(layer, channels, *window, options, **factory_kwargs).train(old.training)


def _traced_channels(model: nn.Module, input_size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, list[int]]:
    """Output channels at every call of every strided layer, by name in the order of first calls.

    A forward pass of a copy on the meta device.
    """
    trial = copy.deepcopy(model).to("meta").eval()
    channels: dict[str, list[int]] = {}
    names: dict[nn.Module, str] = {module: name for name, module in trial.named_modules() if _is_strided(module)}

    def record(module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        channels.setdefault(names[module], []).append(out.shape[1])

    for module in names:
        module.register_forward_hook(record)
    with torch.no_grad():
        trial(torch.empty(2, *input_size, device="meta", dtype=dtype))
    return channels


def _is_strided(module: nn.Module) -> TypeGuard[StridedLayer]:
    """Whether a module is a pooling layer or convolution with a stride above 1."""
    if not isinstance(module, StridedLayer) or isinstance(module, DownsampledConv2d):
        return False
    strides = module.stride if isinstance(module.stride, tuple) else (module.stride,)
    return max(strides) > 1


def _reason_to_keep(module: StridedLayer, was_called: bool) -> str | None:
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
    if _window(module) is None:
        return "its window is not square"
    if getattr(module, "ceil_mode", False):
        return "it rounds the output size up (ceil_mode)"
    if getattr(module, "dilation", 1) not in (1, (1, 1)):
        return "its window is dilated"
    return None


def _site(name: str, names: list[str]) -> str:
    """The site of a layer, inferred from its name and the names of the other strided layers."""
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


def _square(value: int | Sequence[Any]) -> int | None:
    """The one value of a window's size, stride or padding; None where height and width differ."""
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else None


def _window(module: StridedLayer) -> tuple[int, int, int] | None:
    """Kernel size, stride and padding of a pooling layer; None where height and width differ."""
    kernel_size, stride, padding = map(_square, (_kernel_size(module), module.stride, module.padding))
    if kernel_size is None or stride is None or padding is None:
        return None
    return kernel_size, stride, padding


def _kernel_size(module: StridedLayer) -> int | tuple[int, ...]:
    return module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size


def _describe(module: StridedLayer) -> str:
    size = _kernel_size(module)
    return f"{type(module).__name__} {_square(size) or size}/{_square(module.stride)}"


def _set(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` under all of its names: a module may be shared."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)
