"""Figures of maps and windows, read back from their pixels and their text."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lip_resnet.insight import importance_maps
from lip_resnet.insight.gallery import Picture, to_page
from lip_resnet.insight.windows import example_window
from lip_resnet.layers import make_layer

pytest.importorskip("matplotlib")
from lip_resnet.insight import figures

GREY = np.full((48, 48, 3), 128, dtype=np.uint8)
"""The grey that the colour bar stands on."""
COARSE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
IMAGES = torch.from_numpy(np.array(COARSE.resize((48, 48), Image.Resampling.BICUBIC))).permute(2, 0, 1)[None]


def network(*names: str) -> nn.Module:
    return nn.Sequential(*(make_layer(name, 3) for name in names))


def colours(figure, axes) -> np.ndarray:
    """The pixels (h, w, 3) of a pair of axes, as drawn."""
    pixels = figures.to_pixels(figure)
    box = axes.get_window_extent()
    top, bottom = len(pixels) - box.y1, len(pixels) - box.y0
    return pixels[round(top) + 1 : round(bottom) - 1, round(box.x0) + 1 : round(box.x1) - 1].astype(int)


def test_a_map_has_the_colours_of_the_scale_beside_it():
    """Strided sampling in average pooling's units is 9 on one position in four, else 0; average pooling is 1."""
    maps = importance_maps(network("strided"), IMAGES[..., :16, :16], compare=["average"])
    with figures.style():
        figure = figures.draw_maps(GREY, maps, 0, "$a photograph$.jpg", "a note")
        *panels, bar = figure.axes
        shown, scale = colours(figure, panels[1]), colours(figure, bar)[3]
        average = colours(figure, panels[3])
    width = len(scale)
    cell = len(shown) / 16
    at = [round((position + 0.5) * cell) for position in (8, 9)]
    for place, end in ((at[0], width - 1), (at[1], 0)):
        assert np.abs(shown[place, place] - scale[end]).max() <= 6, end
    assert np.abs(average[at[0], at[0]] - scale[width // 2]).max() <= 6
    assert np.abs(scale[0] - scale[-1]).max() > 60
    assert figure.get_suptitle() == "$a photograph$.jpg"
    assert "average pooling" in bar.get_xlabel()
    texts = [text.get_text() for panel in panels for text in panel.texts]
    assert {"entropy 0.00", "entropy 1.00", "average"} <= set(texts)


def test_every_site_has_a_panel_with_its_name_and_nothing_is_cut_off():
    maps = importance_maps(network("softpool", "max", "average", "blur", "strided"), IMAGES)
    with figures.style():
        figure = figures.draw_maps(GREY[:, :20], maps, 0, "portrait", "")
        pixels = figures.to_pixels(figure)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:6] == ["photograph", "0", "1", "2", "3", "4"]
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_a_window_shows_its_numbers():
    example = example_window(network("softpool"), IMAGES[0], "0")
    with figures.style():
        figure = figures.draw_window(GREY, example, "a window", "")
    grids = {axes.get_title(): axes for axes in figure.axes[:-1]}
    assert list(grids) == [
        *("the window", "features", "weights: SoftPool", "weights: average", "weights: max", "weights: strided")
    ]
    for layer, weights in example.weights.items():
        *numbers, output = [text.get_text() for text in grids[f"weights: {figures.NAMES.get(layer, layer)}"].texts]
        assert numbers == [f"{value:.2f}" for value in weights.flatten().tolist()]
        assert output == f"output {example.output(layer):.2f}"
    (outline, frame) = grids["the window"].patches
    assert frame.get_bbox().bounds == pytest.approx((example.left - 0.5, example.top - 0.5, 3, 3))
    assert outline.get_bbox().bounds == frame.get_bbox().bounds


def test_a_page_holds_its_pictures():
    pictures = [Picture("a.png", "a < b & c", b"PNG"), Picture("b.svg", "two", b"<svg/>")]
    page = to_page("<title>", ["A & B"], [["site"], ["pool"]], pictures)
    assert "data:image/png;base64,UE5H" in page
    assert "data:image/svg+xml;base64,PHN2Zy8+" in page
    assert 'alt="a &lt; b &amp; c"' in page
    assert "<h1>&lt;title&gt;</h1>" in page
    assert "<th>site</th>" in page
    assert "<td>pool</td>" in page
    assert "http" not in page
