"""Replace the downsampling layers of any convolutional network in place.

A pooling layer is replaced by a layer with the same window. A strided convolution runs at stride 1, with its weights
and keys, and a layer stands beside it (``placement.py``); with ``strided`` after it the network computes what it did
before.

Only modules are seen, not functional pooling in a ``forward`` method (``F.max_pool2d``). A module that is called
several times in a forward pass is kept, unless its replacement has no weights that the calls would share.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lip_resnet.layers.antialiasing import AdaptivePolyphase
from lip_resnet.layers.downsampling import LogitOptions, make_layer
from lip_resnet.layers.logits import BottleneckHead, BottleneckTrunk
from lip_resnet.layers.optimizer import move_parameters
from lip_resnet.layers.placement import (
    PLACEMENTS,
    PRESETS,
    BlockInput,
    Choice,
    DownsampledConv2d,
    PooledConv2d,
    Unstrided,
    WithBlockInput,
    parse_choices,
)
from lip_resnet.layers.pooling import LIP2d
from lip_resnet.layers.strided import (
    BRANCH,
    Calls,
    StridedLayer,
    describe,
    is_strided,
    reason_to_keep,
    site_of,
    trace,
    window_of,
)


@dataclass
class Replacements:
    """What ``replace_downsampling`` did, by module name."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Name -> its site, the old layer -> the new layer and its placement."""
    kept: dict[str, str] = field(default_factory=dict)
    """Name -> the reason why it was not replaced."""
    refused: dict[str, str] = field(default_factory=dict)
    """Those of ``kept`` for which a layer was chosen that cannot stand there."""
    unused: list[str] = field(default_factory=list)
    """Keys of a mapping or preset by which nothing was replaced."""

    @property
    def left(self) -> dict[str, str]:
        """An earlier name of ``kept``."""
        return self.kept

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} replaced, {len(self.kept)} kept"]
        lines += [f"  {name}: {change}" for name, change in self.swapped.items()]
        lines += [f"  {name}: kept, {reason}" for name, reason in self.kept.items()]
        lines += [f"  {key}: nothing was replaced by this choice" for key in self.unused]
        lines.append("  not seen: pooling that a forward method calls as a function, such as F.max_pool2d")
        return "\n".join(lines)


@dataclass
class _Plan:
    """Replacements that are built and not yet made."""

    modules: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    """(old, new)"""
    inputs: dict[str, tuple[nn.Module, BlockInput]] = field(default_factory=dict)
    """Name of a block -> the block, and what sees its input."""

    def apply(self, model: nn.Module) -> None:
        for old, new in self.modules:
            _set(model, old, new)
        for block, block_input in self.inputs.values():
            block_input.attach(block, "block_input")


def replace_downsampling(
    model: nn.Module,
    layers: str | Mapping[str, Any] = "lip",
    *,
    input_size: tuple[int, int, int] | None = None,
    options: LogitOptions | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Replacements:
    """Replace the downsampling layers of ``model`` in place: all of those chosen or, where it raises, none.

    Args:
        model: any timm or torchvision CNN.
        layers: a key of ``DOWNSAMPLING`` for every site but ``image``; a preset of ``PRESETS``; or a mapping of sites
            (``main``), sites of a stage (``stage3.main``) or module names and patterns (``layer3.*.conv2``) to a key or
            to {layer, placement, kernel_size}. What is not in it keeps its layers. New LIP layers start as average
            pooling; ``lip`` has simplified logits in the stem and ``options.module`` elsewhere.
        input_size: (channels, height, width) of an image that the model accepts, for a forward pass on the meta device
            that determines every layer's channels. Default: timm's configuration of the model, or (3, 224, 224).
        options: of the logit modules.
        optimizer: an optimizer of ``model``: new parameters join the groups of those whose place they take.

    Returns:
        What was replaced, and what was kept and why; ``print`` shows it.

    Raises:
        ValueError: unknown layer, site, placement or preset, or the model does not accept an image of ``input_size``,
            before or after the replacement; the model is unchanged.
    """
    choices = parse_choices(layers)
    size = input_size or getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    like = next(model.parameters(), torch.empty(0))
    try:
        calls = trace(model, size, like.dtype)
    except Exception as error:  # whatever the model's own forward raises
        hint = "" if input_size else "; give input_size=(channels, height, width) of an image that it accepts"
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(model).__name__} does not accept an image of {tuple(size)}: {line}{hint}") from error
    report, plan = Replacements(), _Plan()
    builder = _Builder(calls, plan, options or LogitOptions(), {"device": like.device, "dtype": like.dtype})
    strided = {name: module for name, module in model.named_modules() if is_strided(module)}
    first = next((name for name in calls if name in strided), None)
    used: set[str] = set()
    for name, old in sorted(strided.items(), key=lambda item: site_of(item[0], list(strided)) == "shortcut"):
        reads_image = name == first and getattr(old, "in_channels", None) == size[0]
        site = "image" if reads_image else site_of(name, list(strided))
        reason: str | None = reason_to_keep(old, name in calls) if name else "it is the model itself"
        choice = None
        if reason is None:
            stage = round(math.log2(size[1] / calls[name].outputs[0][-2])) - 1
            choice = choices.at(name, site, stage)
            reason = None if choice else f"no layer was chosen for the site {site!r}"
        if choice is None or reason is not None:
            report.kept[name] = reason or ""
            continue
        inputs = dict(plan.inputs)
        try:
            plan.modules += builder.build(name, old, site, choice[1])
        except ValueError as error:
            plan.inputs = inputs  # without a trunk that nothing would use
            report.kept[name] = report.refused[name] = str(error)
            continue
        used.add(choice[0])
        report.swapped[name] = f"{site}, {describe(old)} -> {builder.describe(old, site, choice[1])}"
    if not isinstance(layers, str) or layers in PRESETS:  # a layer alone is for every site that there is
        report.unused = [key for key in choices.by_key if key not in used]
    try:
        trial, trial_plan = copy.deepcopy((model, plan))
        trial_plan.apply(trial)
        trace(trial, size, like.dtype)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(model).__name__} does not run with the new layers, so it keeps its own: {line}"
        ) from error
    before = list(model.named_parameters())
    plan.apply(model)
    if optimizer is not None:
        move_parameters(optimizer, before, model)
    return report


@dataclass
class _Builder:
    """Builds what replaces a strided layer."""

    calls: dict[str, Calls]
    plan: _Plan
    options: LogitOptions
    factory_kwargs: dict[str, Any]

    def describe(self, old: StridedLayer, site: str, choice: Choice) -> str:
        """The choice in words, with what ``lip`` means at the site; pooling is replaced where it is."""
        choice = dataclasses.replace(choice, layer=self._layer(site, choice))
        return str(choice if isinstance(old, nn.Conv2d) else dataclasses.replace(choice, placement=PLACEMENTS[0]))

    def _layer(self, site: str, choice: Choice) -> str:
        return "lip_simplified" if choice.layer == "lip" and site == "stem" else choice.layer

    def build(self, name: str, old: StridedLayer, site: str, choice: Choice) -> list[tuple[nn.Module, nn.Module]]:
        """(old, new) modules.

        Raises:
            ValueError: the layer cannot stand there; the message is the reason.
        """
        calls, layer = self.calls[name], self._layer(site, choice)
        if isinstance(old, nn.Conv2d):
            # The smallest centred window that covers every position: 3 for stride 2.
            size, stride = choice.kernel_size or 2 * old.stride[0] - 1, old.stride[0]
            window = (size, stride, (size - 1) // 2)
            if choice.placement == "after_convolution":
                pool = self._pool(name, layer, old.out_channels, window)
                new: list[tuple[nn.Module, nn.Module]] = [(old, DownsampledConv2d(old, pool))]
            else:
                new, pool = self._elsewhere(name, old, layer, choice.placement, window)
        else:
            own = window_of(old)
            assert own is not None, "reason_to_keep excludes windows that are not square"
            window = own
            if choice.kernel_size:
                window = (choice.kernel_size, window[1], (choice.kernel_size - 1) // 2)
            pool = make_layer(layer, calls.outputs[0][1], *window, self.options, **self.factory_kwargs)
            new = [(old, pool.train(old.training))]
        if len(calls.outputs) > 1 and [*pool.parameters(), *pool.buffers()]:
            raise ValueError(
                f"the forward pass calls it {len(calls.outputs)} times, which would share one {layer}; give each call "
                "a module"
            )
        return new

    def _elsewhere(
        self, name: str, old: nn.Conv2d, layer: str, placement: str, window: tuple[int, int, int]
    ) -> tuple[list[tuple[nn.Module, nn.Module]], nn.Module]:
        """What replaces a convolution whose layer does not follow it directly, and the layer."""
        keeps_size = all(
            2 * padding == dilation * (side - 1)
            for side, padding, dilation in zip(old.kernel_size, old.padding, old.dilation, strict=True)
            if isinstance(padding, int)
        )
        if not keeps_size:
            raise ValueError(f"at stride 1 its padding {old.padding} changes the size, so the layer must follow it")
        if placement == "before_convolution":
            pool = self._pool(name, layer, old.in_channels, window)
            return [(old, PooledConv2d(old, pool))], pool
        if placement == "instead_of_convolution":
            pool = self._pool(name, layer, old.in_channels, window, instead=True)
            bias = old.bias is not None
            new = nn.Conv2d(old.in_channels, old.out_channels, 1, bias=bias, **self.factory_kwargs).train(old.training)
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            return [(old, PooledConv2d(new, pool))], pool
        following = self._next(name)
        pool = self._pool(name, layer, old.out_channels, window)
        return [(old, Unstrided(old)), (following, PooledConv2d(following, pool))], pool

    def _next(self, name: str) -> nn.Conv2d:
        """The convolution that reads a convolution's activations: the next one in its block that reads its shape."""
        block, names = name.rpartition(".")[0], list(self.calls)
        for other in names[names.index(name) + 1 :]:
            module = self.calls[other].module
            reads = self.calls[other].inputs[0] == self.calls[name].outputs[0]
            beside = other.rpartition(".")[0] == block
            if type(module) is nn.Conv2d and module.stride == (1, 1) and beside and reads:
                return module
        raise ValueError("no convolution at stride 1 in its block reads its activations")

    def _pool(
        self, name: str, layer: str, channels: int, window: tuple[int, int, int], instead: bool = False
    ) -> nn.Module:
        """A layer beside a convolution; with the block's input, where both paths of a block must agree.

        LIP's published main path and its shortcut read their logits from one trunk on the block's input; adaptive
        polyphase sampling takes the grid of the block's input on both paths.
        """
        block = self._block(name)
        if layer == "lip" and self.options.module == "bottleneck" and block is not None:
            width = self.options.width
            if instead and block not in self.plan.inputs:
                trunk = BottleneckTrunk(self.calls[block].inputs[0][1], width, **self.factory_kwargs)
                self.plan.inputs[block] = (self.calls[block].module, BlockInput(trunk))
            if block in self.plan.inputs and self.plan.inputs[block][1].trunk is not None:
                head = BottleneckHead(width, channels, self.options.gate, **self.factory_kwargs)
                return WithBlockInput(LIP2d(head, *window), self.plan.inputs[block][1])
        pool = make_layer(layer, channels, *window, self.options, **self.factory_kwargs)
        if isinstance(pool, AdaptivePolyphase) and block is not None:
            _, block_input = self.plan.inputs.setdefault(block, (self.calls[block].module, BlockInput()))
            return WithBlockInput(pool, block_input)
        return pool

    def _block(self, name: str) -> str | None:
        """The residual block of a layer: the module around it, or around its branch; None where there is none."""
        parts = name.split(".")[:-1]
        branch = next((depth for depth, part in enumerate(parts) if BRANCH.fullmatch(part)), None)
        block = ".".join(parts if branch is None else parts[:branch])
        return block if block in self.calls and self.calls[block].inputs else None


def _set(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` under all of its names: a module may be shared."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)
