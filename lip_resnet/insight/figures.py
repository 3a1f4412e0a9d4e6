"""Figures of importance maps and of single windows, by matplotlib, which is an optional package.

One scale everywhere: the weight of a position in its windows over that of average pooling, from 1/3 to 3, logarithmic.
So colours mean the same at every site, of every network and on every photograph.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from lip_resnet.insight.importance import SiteMaps
from lip_resnet.insight.windows import ExampleWindow

STYLE = Path(__file__).parents[1] / "figures.mplstyle"
LIMIT = 3.0
"""Weights below 1 / LIMIT and above LIMIT times those of average pooling have the colours at the scale's ends."""
TINT = 0.75
"""Share of a map's colour over the grey photograph; the colour bar is drawn with it too."""
SCALE_LABEL = (
    "weight of a position in its windows, as a multiple of that under average pooling (red: more, blue: less)\n"
    "entropy of a window's weights: 1 where all are equal, 0 where one position has all; means over all channels"
)
NAMES = {"lip": "LIP", "softpool": "SoftPool", "detail_preserving": "detail-preserving"}
_GREYS = (0.25, 0.85)
"""Darkest and lightest grey of the photograph under a map: colours cannot be told apart on black and white."""


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of every figure of the project, readable on light and dark pages."""
    with matplotlib.rc_context(fname=STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # in the name of a file
        yield


def draw_maps(photograph: NDArray[np.uint8], maps: Sequence[SiteMaps], index: int, heading: str, note: str) -> Figure:
    """A photograph and the maps of all sites over it, with the scale; call it, and save its figure, within ``style``.

    Args:
        photograph: (H, W, 3), in any resolution.
        maps: of ``importance_maps`` for the mean over channels. Where a site has several layers, each layer is a row.
        index: of the photograph in the maps' batch.
        heading, note: the first line, and the one below it.
    """
    sites = list(dict.fromkeys(each.name for each in maps))
    layers = list(dict.fromkeys(each.layer for each in maps if [m.name for m in maps].count(each.name) > 1))
    grey = to_grey(photograph)
    if layers:
        rows, columns = len(maps) // len(sites), 1 + len(sites)
        order = [(row, 1 + sites.index(each.name)) for row, each in _rows(maps, sites)]
    else:
        rows = math.ceil((1 + len(sites)) / 4)
        columns = math.ceil((1 + len(sites)) / rows)
        order = [divmod(1 + number, columns) for number in range(len(maps))]
    side, labels = (1.25, 0.3) if layers else (1.8, 0.42)
    height = side * min(photograph.shape[0] / photograph.shape[1], 2.5)
    figure = Figure(figsize=(max(side * columns, 6.6), (height + labels) * rows + 1.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    extent = (0, photograph.shape[1], photograph.shape[0], 0)
    axes[0, 0].imshow(photograph, extent=extent)
    _label(axes[0, 0], "photograph", f"first row: {_shown(layers[0])}" if layers else "")
    for (row, column), each in zip(order, maps, strict=True):
        each_axes = axes[row, column]
        paint_map(each_axes, grey, each.relative_weight[index, 0], extent)
        title = _in_lines(each.name) if row == 0 or not layers else ""
        entropy = f"entropy {each.entropy[index].mean():.2f}"
        _label(each_axes, title, entropy if layers else f"{_shown(each.layer)}, {entropy}")
        if layers and column == 1 and row:
            each_axes.text(-0.05, 0.5, _shown(each.layer), ha="right", va="center", transform=each_axes.transAxes)
    draw_scale(figure, list(axes.flat), SCALE_LABEL)
    _head(figure, heading, note)
    return figure


def _rows(maps: Sequence[SiteMaps], sites: Sequence[str]) -> list[tuple[int, SiteMaps]]:
    """Every map with its row: the first of a site is the network's own, then come the layers compared with it."""
    seen = dict.fromkeys(sites, 0)
    rows = []
    for each in maps:
        rows.append((seen[each.name], each))
        seen[each.name] += 1
    return rows


def to_grey(photograph: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W, 3) -> the luminance (H, W) between ``_GREYS``."""
    return np.interp(photograph @ np.array([0.299, 0.587, 0.114]), (0, 255), _GREYS)


def paint_map(axes: Axes, grey: NDArray, values: NDArray, extent: tuple[float, float, float, float]) -> None:
    """Relative weights (h, w) as colours over a grey photograph (H, W) in [0, 1], one rectangle a position."""
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
    clipped = np.clip(values, 1 / LIMIT, LIMIT)  # a weight of 0 has no logarithm
    axes.imshow(clipped, cmap="coolwarm", norm=_norm(), extent=extent, alpha=TINT, interpolation="nearest")


def _norm() -> LogNorm:
    return LogNorm(1 / LIMIT, LIMIT)


def _shown(layer: str) -> str:
    return NAMES.get(layer, layer)


def _in_lines(site: str) -> str:
    """A module's name, after its second part on a new line: layer2.0.downsample.pool is wider than its map."""
    parts = site.split(".")
    return site if len(site) < 16 else f"{'.'.join(parts[:2])}.\n{'.'.join(parts[2:])}"


def _label(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, fontsize="small", pad=3)
    axes.text(0.5, -0.03, below, ha="center", va="top", fontsize="x-small", transform=axes.transAxes)


def _head(figure: Figure, heading: str, note: str) -> None:
    figure.set_layout_engine("constrained", h_pad=0.08)
    figure.suptitle(heading, fontsize="medium", fontweight="bold", parse_math=False)
    figure.supxlabel(note, fontsize="x-small", parse_math=False)


def draw_scale(figure: Figure, axes: Sequence[Axes], label: str, tint: float = TINT) -> None:
    """The colour bar, in the colours that the maps have over a medium grey."""
    colours = matplotlib.colormaps["coolwarm"](np.linspace(0, 1, 256))
    colours[:, :3] = tint * colours[:, :3] + (1 - tint) * np.mean(_GREYS)
    shown = ScalarMappable(_norm(), ListedColormap(colours))
    bar = figure.colorbar(shown, ax=list(axes), location="bottom", shrink=0.7, aspect=45, pad=0.04, extend="both")
    bar.set_ticks([1 / 3, 1 / 2, 1, 2, 3], labels=["1/3", "1/2", "1", "2", "3"], fontsize="small")
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize="x-small", labelpad=6)


def draw_window(photograph: NDArray[np.uint8], example: ExampleWindow, heading: str, note: str) -> Figure:
    """A window: where it is, its features, and the weights and the output of every layer, as numbers and colours.

    Call it, and save its figure, within ``style``; arguments as for ``draw_maps``.
    """
    columns = 2 + len(example.weights)
    figure = Figure(figsize=(1.3 * columns, 2.75), layout="constrained")
    axes = figure.subplots(1, columns)
    for each in axes:
        each.set_axis_off()
    height, width = photograph.shape[:2]
    rows, steps = example.map_size
    size, (down, right) = example.window.kernel_size, (height / rows, width / steps)
    axes[0].imshow(photograph)
    corner = (example.left * right - 0.5, example.top * down - 0.5)
    for colour, line in (("white", 2.6), ("C1", 1.4)):
        axes[0].add_patch(Rectangle(corner, size * right, size * down, fill=False, ec=colour, lw=line, clip_on=False))
    _label(axes[0], "the window", "")
    _grid(axes[1], example.features, None, "features")
    for each, (layer, weights) in zip(axes[2:], example.weights.items(), strict=True):
        _grid(each, weights, weights * size**2, f"weights: {_shown(layer)}")
        _label(each, each.get_title(), f"output {example.output(layer):.2f}")
    draw_scale(figure, axes, f"weight, as a multiple of 1/{size**2}, that of average pooling", tint=1.0)
    _head(figure, heading, note)
    return figure


def _grid(axes: Axes, values: Tensor, relative: Tensor | None, title: str) -> None:
    """(k, k) values as numbers in cells, which have the colours of the scale, or none."""
    size = len(values)
    shown = np.ones((size, size)) if relative is None else np.clip(relative.numpy(), 1 / LIMIT, LIMIT)
    axes.imshow(shown, cmap="coolwarm", norm=_norm(), alpha=0.0 if relative is None else 1.0)
    for (row, column), value in np.ndenumerate(values.numpy()):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="0.6", lw=0.6))
        colour = None if relative is None else "black" if 0.5 < shown[row, column] < 2.4 else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
    axes.set_title(title, fontsize="small", pad=3)


def to_bytes(figure: Figure, kind: str, dpi: int = 200) -> bytes:
    """A figure as a png or svg file, the same bytes every time."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def to_pixels(figure: Figure, dpi: int = 100) -> NDArray[np.uint8]:
    """A figure on white as (H, W, 3) uint8."""
    figure.set_dpi(dpi)
    figure.set_facecolor("white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
