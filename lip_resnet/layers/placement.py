"""Where a downsampling layer stands: in front of a convolution, after it, after its activation, or in its stead.

    after_convolution       conv at stride 1 -> layer -> norm, activation           (the default)
    after_activation        conv at stride 1 -> norm, activation -> layer -> next conv    Zhang 2019
    before_convolution      layer -> conv at stride 1                                FLC, shortcuts of Zhang and LIP
    instead_of_convolution  layer -> new 1x1 conv                                    LIP's main path

A convolution keeps its name and its weights, except where a new one replaces it.
"""

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lip_resnet.layers.downsampling import LogitOptions, check_layer, make_layer

SITES = ("image", "stem", "main", "shortcut", "transition")
"""image: the convolution that reads the image; stem: pooling in the stem; shortcut: on a block's shortcut;
transition: between stages; main: all other layers."""
PLACEMENTS = ("after_convolution", "after_activation", "before_convolution", "instead_of_convolution")

PRESETS: dict[str, dict[str, Any]] = {
    "zhang2019": {
        "stem": "max_blur",
        "main": {"layer": "blur", "placement": "after_activation"},
        "shortcut": {"layer": "blur", "placement": "before_convolution"},
    },
    "flc2022": {
        "main": {"layer": "flc", "placement": "before_convolution"},
        "shortcut": {"layer": "flc", "placement": "before_convolution"},
    },
    "lip2019": {
        "stem": "lip",
        "main": {"layer": "lip", "placement": "instead_of_convolution"},
        "shortcut": {"layer": "lip", "placement": "before_convolution"},
    },
    "softpool2021": {"stem": {"layer": "softpool", "kernel_size": 2}},
}
"""The placements of published networks, by paper. Sources: adobe/antialiased-cnns, GeJulia/flc_pooling, sebgao/LIP,
alexandrosstergiou/SoftPool."""


@dataclass(frozen=True)
class Choice:
    """What stands at a site."""

    layer: str
    """A key of ``DOWNSAMPLING``."""
    placement: str = PLACEMENTS[0]
    """Beside a strided convolution; pooling layers are replaced where they are."""
    kernel_size: int | None = None
    """Of the window, with padding (kernel_size - 1) // 2; None: the old layer's window, or 2 * stride - 1."""

    def __str__(self) -> str:
        where = "" if self.placement == PLACEMENTS[0] else f" {self.placement}"
        return self.layer + where + (f" kernel_size {self.kernel_size}" if self.kernel_size else "")


@dataclass(frozen=True)
class Choices:
    """The choices of a network: the first of module pattern, stage and site, and site that matches a layer."""

    by_key: Mapping[str, Choice]

    def at(self, name: str, site: str, stage: int) -> tuple[str, Choice] | None:
        """The key and the choice for a layer; None where none was made.

        Args:
            name: of the module.
            site: one of ``SITES``.
            stage: log2 of the network's stride at the layer's output, less one: 1 at a stride of 4, 4 at 32.
        """
        patterns = [key for key in self.by_key if _is_pattern(key) and fnmatch.fnmatchcase(name, key)]
        for key in (*patterns, f"stage{stage}.{site}", site):
            if key in self.by_key:
                return key, self.by_key[key]
        return None


def _is_pattern(key: str) -> bool:
    return key not in SITES and not any(key == f"stage{number}.{site}" for number in range(1, 10) for site in SITES)


def parse_choices(layers: str | Mapping[str, Any]) -> Choices:
    """What is chosen: a layer for every site but ``image``, a preset, or a mapping.

    Args:
        layers: a key of ``DOWNSAMPLING`` or of ``PRESETS``; or a mapping of a site (``main``), a site of a stage
            (``stage3.main``) or a module's name or pattern (``layer3.*.conv2``) to a layer or to {layer, placement,
            kernel_size}.

    Raises:
        ValueError: an unknown layer, preset, site or key.
    """
    if isinstance(layers, str):
        if layers not in PRESETS:
            check_layer(layers, f"layer (or preset: {', '.join(PRESETS)})", PRESETS)
        layers = PRESETS.get(layers) or dict.fromkeys(SITES[1:], layers)
    if not isinstance(layers, Mapping):
        raise ValueError(f"downsampling {layers!r}; it must be a layer, a preset, or a mapping of sites to layers")
    choices = {}
    for key, value in layers.items():
        if not isinstance(key, str):
            raise ValueError(f"site {key!r}; it must be a name, such as main")
        stage, dot, site = key.rpartition(".")
        near = difflib.get_close_matches(site, SITES, n=1)
        misspelt = re.fullmatch(r"stage[1-9]", stage) and near
        if _is_pattern(key) and (misspelt or not any(letter in key for letter in ".*?[")):
            hint = f", did you mean {stage + dot + near[0]!r}?" if near else ";"
            known = f"{', '.join(SITES)}, stage3.main, or a module's name or pattern such as layer3.*.conv2"
            raise ValueError(f"unknown site {key!r}{hint} known: {known}")
        choices[key] = _parse(key, value)
    return Choices(choices)


def _parse(key: str, value: Any) -> Choice:
    if isinstance(value, str):
        return Choice(check_layer(value, key))
    names = ("layer", "placement", "kernel_size")
    if not isinstance(value, Mapping) or "layer" not in value or value.keys() - set(names):
        raise ValueError(f"{key}: {value!r}; it must be a layer or a mapping of {', '.join(names)}, such as "
                         "{layer: blur, placement: after_activation}")  # fmt: skip
    choice = Choice(**value)
    check_layer(choice.layer, key)
    if choice.placement not in PLACEMENTS:
        near = difflib.get_close_matches(str(choice.placement), PLACEMENTS, n=1)
        hint = f", did you mean {near[0]}?" if near else ";"
        raise ValueError(f"{key}: unknown placement {choice.placement!r}{hint} known: {', '.join(PLACEMENTS)}")
    size = choice.kernel_size
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"{key}: kernel_size {size!r}; it must be an integer of at least 1")
    return choice


def aa_layer(name: str, options: LogitOptions | None = None) -> type[nn.Module]:
    """A layer as timm's ``aa_layer``: ``timm.create_model("resnet50", aa_layer=aa_layer("lip"))``.

    timm puts it after the activation of strided convolutions, and after a max pooling at stride 1 in the stem.

    Args:
        name: a key of ``DOWNSAMPLING``.
        options: of LIP's logit modules.

    Raises:
        ValueError: an unknown layer.
    """
    check_layer(name)

    class Layer(nn.Module):
        """timm calls it as ``Layer(channels=..., stride=...)``; what it returns is the layer itself."""

        def __new__(cls, channels: int, stride: int = 2, **factory_kwargs: Any) -> Any:
            return make_layer(name, channels, 2 * stride - 1, stride, options=options, **factory_kwargs)

    return Layer


def use_circular_padding(model: nn.Module) -> None:
    """Let every convolution pad circularly, in place: needed for exact invariance to circular shifts (``aps``)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and any(module.padding):
            module.padding_mode = "circular"


class Unstrided(nn.Conv2d):
    """A convolution at stride 1 with the weights of another; their keys are unchanged."""

    def __init__(self, conv: nn.Conv2d, pool: nn.Module | None = None) -> None:
        same = ("in_channels", "out_channels", "kernel_size", "padding", "dilation", "groups", "padding_mode")
        keywords: dict[str, Any] = {name: getattr(conv, name) for name in same}
        super().__init__(**keywords, bias=conv.bias is not None, device="meta")
        self.weight = conv.weight
        self.bias = conv.bias
        if pool is not None:
            self.pool = pool
        self.train(conv.training)


class DownsampledConv2d(Unstrided):
    """``conv`` at stride 1 with its own weights, then ``pool``: (B, C, H, W) -> (B, C', h, w), keys unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(super().forward(x))


class PooledConv2d(Unstrided):
    """``pool``, then ``conv`` at stride 1 with its own weights: (B, C, H, W) -> (B, C', h, w), keys unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pool(x))


class BlockInput(nn.Module):
    """The input of a residual block, or a trunk's features of it, for the layers in the block that need it.

    Registered as a block's forward pre-hook and forward hook: the features are kept during the block's forward alone.
    """

    def __init__(self, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.features: Tensor | None = None

    def attach(self, block: nn.Module, name: str) -> None:
        """Become the submodule ``name`` of ``block`` and see its input."""
        block.add_module(name, self)
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end)

    def _begin(self, _block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.features = inputs[0] if self.trunk is None else self.trunk(inputs[0])

    def _end(self, _block: nn.Module, _inputs: tuple[Any, ...], _out: Any) -> None:
        self.features = None


class WithBlockInput(nn.Module):
    """A layer that takes the features of a ``BlockInput`` beside what it pools."""

    def __init__(self, layer: nn.Module, block_input: BlockInput) -> None:
        super().__init__()
        self.layer = layer
        self._block_input = (block_input,)  # in a tuple: it is the block's submodule, not this one's

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self._block_input[0].features)
