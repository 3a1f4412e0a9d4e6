"""The table of downsampling layers, ``DOWNSAMPLING``, and ``make_layer``, which builds them by name.

Every layer maps features (B, C, H, W) to (B, C, h, w), h = floor((H + 2 * padding - kernel_size) / stride) + 1. They
are in ``pooling`` (weighted windows, LIP among them), ``antialiasing``, ``statistics``, ``rearranging`` and
``convolutions``. docs/layers.md is generated from this table.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lip_resnet.layers.antialiasing import AdaptivePolyphase, Blur, ContentAwareBlur, FrequencyCrop, MaxBlur
from lip_resnet.layers.convolutions import ADown, SCDown
from lip_resnet.layers.logits import GATE, AttentionLogits, BottleneckLogits, ProjectionLogits, SimplifiedLogits
from lip_resnet.layers.pooling import DetailPreserving, LIP2d, SoftPool, Strided, StridedAverage
from lip_resnet.layers.rearranging import Haar, HaarConv, PatchMerge, SpaceToDepth
from lip_resnet.layers.statistics import AdaPool, LearntNorm, MaxAverage, Ordinal
from lip_resnet.layers.window import Window


@dataclass(frozen=True)
class LogitOptions:
    """Options of LIP's logit modules; the other layers ignore them.

    Raises:
        ValueError: unknown module, width below 1, coefficient not positive and finite.
    """

    module: str = "bottleneck"
    """What ``lip`` means: projection, simplified or bottleneck."""
    width: int = 128
    """Channels of the bottleneck's trunk (published: 128; ablations: 64 and 256)."""
    gate: float | None = GATE
    """Upper bound of the logits; None omits the gate."""

    def __post_init__(self) -> None:
        if f"lip_{self.module}" not in DOWNSAMPLING:
            raise ValueError(f"logit module {self.module!r}; it must be projection, simplified or bottleneck")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"bottleneck width {self.width!r}; it must be an integer of at least 1")
        if self.gate is not None and not (isinstance(self.gate, int | float) and 0 < self.gate < math.inf):
            raise ValueError(f"gate coefficient {self.gate!r}; it must be a positive, finite number")


class Layer(NamedTuple):
    """An entry of ``DOWNSAMPLING``."""

    build: Callable[..., nn.Module]
    """``build(channels, window, options, device=..., dtype=...)``."""
    summary: str
    source: str
    published: str = "-"
    """Top-1 on ImageNet unless it says otherwise, from what to what, and how it was measured."""
    pitfalls: str = "-"
    only_stride_2: bool = False
    smallest_kernel: int = 1


def _without_options(layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``build`` of a layer that takes channels and a window."""
    return lambda channels, window, options, **factory_kwargs: layer(channels, window, **factory_kwargs)


def _without_parameters(layer: Callable[[Window], nn.Module]) -> Callable[..., nn.Module]:
    """``build`` of a layer that takes a window alone."""
    return lambda channels, window, options, **factory_kwargs: layer(window)


def _lip(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> nn.Module:
    return DOWNSAMPLING[f"lip_{options.module}"].build(channels, window, options, **factory_kwargs)


def _projection(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> LIP2d:
    return LIP2d(ProjectionLogits(channels, **factory_kwargs), *window)


def _simplified(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> LIP2d:
    return LIP2d(SimplifiedLogits(channels, options.gate, **factory_kwargs), *window)


def _bottleneck(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> LIP2d:
    return LIP2d(BottleneckLogits(channels, options.width, options.gate, **factory_kwargs), *window)


def _self_attentive(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> LIP2d:
    return LIP2d(AttentionLogits(channels, options.width, **factory_kwargs), *window)


def _adapool(channels: int, window: Window, **factory_kwargs: Any) -> AdaPool:
    return AdaPool(window, **factory_kwargs)


def _average(window: Window) -> nn.Module:
    return nn.AvgPool2d(*window, count_include_pad=False)


def _mixed(channels: int, window: Window, **factory_kwargs: Any) -> MaxAverage:
    return MaxAverage(window, False, **factory_kwargs)


def _gated(channels: int, window: Window, **factory_kwargs: Any) -> MaxAverage:
    return MaxAverage(window, True, **factory_kwargs)


_GAO = "Gao, Wang, Wu, ICCV 2019"
_LEE = "Lee, Gallagher, Tu, AISTATS 2016"
_LIP_GAIN = "ResNet-50 76.40 to 78.19, ResNet-101 77.98 to 79.33 (from scratch, one run each)"

DOWNSAMPLING: dict[str, Layer] = {
    "lip": Layer(
        _lip, "learnt importance, with the site's published logit module (or the one asked for)", _GAO, _LIP_GAIN
    ),
    "lip_projection": Layer(
        _projection, "learnt importance, logits from a 1x1 convolution", _GAO, "-", "no norm, no gate"
    ),
    "lip_simplified": Layer(
        _simplified, "learnt importance, logits from a 3x3 convolution, norm and gate", _GAO, "-", "9 C^2 parameters"
    ),
    "lip_bottleneck": Layer(
        _bottleneck, "learnt importance, logits from a bottleneck of three convolutions", _GAO, _LIP_GAIN
    ),
    "average": Layer(
        _without_parameters(_average), "importance 1: the window's mean", "classical", "-", "weighs all content alike"
    ),
    "max": Layer(
        _without_parameters(lambda window: nn.MaxPool2d(*window)),
        "the window's maximum, LIP's limit for a * x",
        "classical",
        "-",
        "a gradient for one position of a window; aliases",
    ),
    "strided": Layer(
        _without_parameters(Strided),
        "the window's centre, as in a strided convolution",
        "classical",
        "-",
        "drops three of four positions; aliases",
    ),
    "strided_average": Layer(
        _without_parameters(StridedAverage),
        "stride x stride mean (ResNet-D)",
        "He et al., CVPR 2019",
        "-",
        "windows do not overlap",
    ),
    "blur": Layer(
        _without_options(Blur),
        "binomial low-pass filter, then sampling",
        "Zhang, ICML 2019",
        "ResNet-50 76.16 to 77.04, ResNet-18 69.74 to 71.69 (zhang2019's placement, from scratch, best epoch)",
        "reflection fails where the padding is as large as the map",
        smallest_kernel=2,
    ),
    "max_blur": Layer(
        _without_options(MaxBlur),
        "maximum at stride 1, then blur",
        "Zhang, ICML 2019",
        "part of blur's figures: their stem",
        "as blur",
        smallest_kernel=2,
    ),
    "softpool": Layer(
        _without_parameters(SoftPool),
        "importance exp(x): G(x) = x",
        "Stergiou, Poppe, Kalliatakis, ICCV 2021",
        "-",
        "its networks use it in the stem alone; the scale of x decides between mean and maximum",
    ),
    "detail_preserving": Layer(
        _without_options(DetailPreserving),
        "importance grows with the distance from the local mean",
        "Saeedan, Weber, Goesele, Roth, CVPR 2018",
        "-",
        "two further numbers a channel",
    ),
    "mixed": Layer(_without_options(_mixed), "learnt mixture of maximum and mean", _LEE),
    "gated": Layer(_without_options(_gated), "mixture that depends on the window", _LEE),
    "lp": Layer(
        _without_options(LearntNorm),
        "(mean of |x|^p)^(1/p), p learnt for each channel",
        "Gulcehre, Cho, Pascanu, Bengio, ECML 2014",
        "-",
        "loses the sign: put it after a ReLU",
    ),
    "ordinal": Layer(
        _without_options(Ordinal),
        "the window's values sorted, weighted by rank; one set of weights a channel",
        "Deliege et al., BMVC 2019",
        "-",
        "sorts every window: slow",
    ),
    "haar": Layer(
        _without_parameters(Haar),
        "low band of the Haar wavelet: half the sum of 2x2",
        "Li, Shen, Guo, Lai, CVPR 2020",
        "-",
        "doubles the scale; windows do not overlap",
        only_stride_2=True,
    ),
    "haar_conv": Layer(
        _without_options(HaarConv),
        "the four Haar bands, 1x1 convolution, batch norm, ReLU",
        "Xu et al., Pattern Recognition 2023",
        "segmentation only",
        "its result is not negative: after a convolution a second ReLU changes nothing",
        only_stride_2=True,
    ),
    "space_to_depth": Layer(
        _without_options(SpaceToDepth),
        "blocks of stride x stride as channels, then a 1x1 convolution",
        "Sunkara, Luo, ECML PKDD 2022",
        "ResNet-18 on Tiny-ImageNet 64.52 (with a 3x3 convolution; one run)",
        "odd sizes are filled up",
    ),
    "patch_merge": Layer(
        _without_options(PatchMerge),
        "blocks of stride x stride as channels, layer norm, then a 1x1 convolution",
        "Liu et al., ICCV 2021",
        "-",
        "odd sizes are filled up",
    ),
    "flc": Layer(
        _without_parameters(FrequencyCrop),
        "the lowest frequencies of a Fourier transform: an ideal low-pass filter",
        "Grabinski, Jung, Keuper, Keuper, ECCV 2022",
        "robustness only",
        "rings; float32 inside; not exported to ONNX",
    ),
    "aps": Layer(
        _without_parameters(AdaptivePolyphase),
        "the sampling grid with the largest norm, chosen for each image",
        "Chaman, Dokmanic, CVPR 2021",
        "consistency under circular shifts 100%, by construction",
        "both paths of a block need the same grid, and convolutions circular padding",
    ),
    "pasa": Layer(
        _without_options(ContentAwareBlur),
        "a low-pass filter for every window, from a convolution, shared by groups of channels",
        "Zou, Xiao, Yu, Lee, BMVC 2020",
        "ResNet-101 79.0, consistency 91.8% (from scratch, one run)",
        "9 weights for every output position and group",
        smallest_kernel=2,
    ),
    "self_attentive": Layer(
        _self_attentive,
        "LIP with logits from self-attention over patches of 4x4",
        "Chen, Datta, Kundu, Beerel, WACV 2023",
        "MobileNetV2 variants +1.2 on average over other poolings",
        "attention over all patches: memory grows with the square of the map",
    ),
    "adapool": Layer(
        _without_options(_adapool),
        "learnt mixture of SoftPool and weights by the similarity to the window's mean",
        "Stergiou, Poppe, IEEE TIP 2023",
        "-",
        "keeps nine copies of the map; as softpool",
    ),
    "adown": Layer(
        _without_options(ADown),
        "mean of 2x2, then one half by a strided convolution, one by maximum and a 1x1 convolution",
        "Wang, Yeh, Liao, ECCV 2024 (YOLOv9)",
        "detectors only",
        "batch norm and SiLU inside",
    ),
    "scdown": Layer(
        _without_options(SCDown),
        "1x1 convolution, then a strided depthwise one",
        "Wang et al., NeurIPS 2024 (YOLOv10)",
        "detectors only",
        "batch norm and SiLU inside",
    ),
}


def check_layer(name: str, site: str = "layer", presets: Iterable[str] = ()) -> str:
    """Return ``name`` if it is a key of ``DOWNSAMPLING``.

    Raises:
        ValueError: it is not; the message names the nearest key, or one of ``presets``, and all keys.
    """
    if not isinstance(name, str) or name not in DOWNSAMPLING:
        near = difflib.get_close_matches(str(name), [*DOWNSAMPLING, *presets], n=1)
        hint = f", did you mean {near[0]}?" if near else ";"
        raise ValueError(f"{site}: unknown downsampling layer {name!r}{hint} known: {', '.join(DOWNSAMPLING)}")
    return name


def make_layer(
    name: str,
    channels: int,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int | None = None,
    options: LogitOptions | None = None,
    **factory_kwargs: Any,
) -> nn.Module:
    """Build a layer of ``DOWNSAMPLING``: (B, channels, H, W) -> (B, channels, h, w).

    Args:
        name: a key of ``DOWNSAMPLING``.
        channels: number of channels of the features.
        kernel_size, stride, padding: of the window, in positions; the default padding is (kernel_size - 1) // 2.
        options: of LIP's logit module.
        factory_kwargs: ``device`` and ``dtype`` of the parameters.

    Raises:
        ValueError: unknown name, or a window that the layer does not support.
    """
    check_layer(name)
    for value in (channels, kernel_size, stride, padding or 0):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}: channels, kernel_size, stride and padding are integers, not {value!r}")
    window = Window(kernel_size, stride, (kernel_size - 1) // 2 if padding is None else padding)
    # strided and strided_average read fixed positions, which must lie inside the feature map.
    fixed = name in {"strided", "strided_average"}
    smallest, most_padding = DOWNSAMPLING[name].smallest_kernel, (kernel_size - fixed) // 2
    if DOWNSAMPLING[name].only_stride_2 and stride != 2:
        raise ValueError(f"{name}: stride {stride}; it must be 2")
    if kernel_size < smallest or stride < 1 or not 0 <= window.padding <= most_padding:
        raise ValueError(
            f"{name}: kernel_size {kernel_size}, stride {stride}, padding {window.padding} do not fit; kernel_size "
            f"must be at least {smallest}, stride at least 1, and padding from 0 to {max(most_padding, 0)}"
        )
    return DOWNSAMPLING[name].build(channels, window, options or LogitOptions(), **factory_kwargs)
