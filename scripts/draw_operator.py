"""Draw LIP beside average and max pooling on one 3x3 window:  python scripts/draw_operator.py --output FILE.svg

Weights and outputs are computed by ``lip2d``. The features and LIP's logits are an example, chosen by hand.
"""

from pathlib import Path

import torch
from torch import Tensor

from lip_resnet import cli, lip2d
from lip_resnet.files import write_text

FEATURES = [[1.0, 2.0, 1.0], [2.0, 5.0, 6.0], [9.0, 6.0, 5.0]]
LOGITS = [[0.1, 0.4, 0.2], [0.6, 2.6, 3.0], [0.3, 2.9, 2.4]]
SCALE = 100.0
"""Max pooling is LIP with the logits SCALE * x, for a large SCALE."""

WIDTH, HEIGHT = 860, 572
CELL_HEIGHT, FEATURES_AT, LOGITS_AT, WEIGHTS_AT, OUTPUT_AT = 34, 28, 300, 520, 764
ROWS_AT = (112, 278, 444)

ALT = (
    "The same nine features pooled three ways. Average pooling gives each the weight 0.11: output {:.1f}. Max pooling "
    "gives the largest the weight 1: output {:.1f}. In LIP a small trained network G computes a logit for each "
    "feature, a softmax over the window turns the logits into weights, and the output is {:.1f}."
)

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 15px system-ui, sans-serif }
  .cell { stroke: #8c959f } .feature { fill: #0969da } .weight { fill: #e16f24 } .logit { fill: #8250df }
  .arrow { stroke: #656d76; stroke-width: 1.5; fill: none } .tip { fill: #656d76 }
  .middle { text-anchor: middle } .small { font-size: 13px; fill: #57606a } .bold { font-weight: 600; font-size: 17px }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d } text { fill: #e6edf3 } .small { fill: #9da7b1 } .cell { stroke: #6e7681 }
    .feature { fill: #4493f8 } .weight { fill: #f0883e } .logit { fill: #ab7df8 }
    .arrow { stroke: #9198a1 } .tip { fill: #9198a1 }
  }"""


def pool(features: Tensor, logits: Tensor) -> tuple[Tensor, float]:
    """Features (3, 3) and logits (3, 3) of a window -> its weights (3, 3), which sum to 1, and its pooled value.

    A position's weight is the pooled value of a window that is 1 there and 0 elsewhere.
    """
    one_hot = torch.eye(9, dtype=features.dtype).reshape(9, 1, 3, 3)
    weights = lip2d(one_hot, logits.expand(9, 1, 3, 3).contiguous(), kernel_size=3, stride=1, padding=0)
    value = lip2d(features.reshape(1, 1, 3, 3), logits.reshape(1, 1, 3, 3), kernel_size=3, stride=1, padding=0)
    return weights.reshape(3, 3), value.item()


def draw() -> str:
    """The figure as SVG."""
    features, lip = (torch.tensor(values, dtype=torch.float64) for values in (FEATURES, LOGITS))
    rows = (
        ("Average pooling", "every feature counts the same", "0", "constant", torch.zeros_like(features)),
        ("Max pooling", "only the largest feature counts", "a x", f"a = {SCALE:g}", SCALE * features),
        ("LIP", "a small trained network G finds out which features count", "G(x)", "learnt", lip),
    )
    alt = ALT.format(*(pool(features, row[-1])[1] for row in rows))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{alt}">',
        f"<style>{STYLE}\n</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
    ]
    headings = ["features x", "logits", "weights", "output"]
    remarks = ["of one 3x3 window", "one per feature", "softmax of the logits", "weighted sum"]
    centers = [FEATURES_AT + 69, LOGITS_AT + 69, WEIGHTS_AT + 75, OUTPUT_AT + 34]
    for texts, y, style in ((headings, 34, "middle bold"), (remarks, 54, "middle small")):
        parts += [_text(x, y, text, style) for x, text in zip(centers, texts, strict=True)]
    middle = ROWS_AT[1] + 1.5 * CELL_HEIGHT
    parts += _grid(FEATURES_AT, ROWS_AT[1], 46, features, "feature", features / 9, "{:.0f}")
    for top, (name, remark, function, kind, logits) in zip(ROWS_AT, rows, strict=True):
        weights, value = pool(features, logits)
        center = top + 1.5 * CELL_HEIGHT
        parts += [
            f'<text x="{LOGITS_AT}" y="{top - 12}"><tspan class="bold">{name}</tspan>'
            f'<tspan class="small" dx="10">{remark}</tspan></text>',
            f'<path class="arrow" d="M {FEATURES_AT + 138 + 8} {middle} C 195 {middle} 180 {center} 206 {center}"/>',
            f'<rect class="cell" x="206" y="{center - 24}" width="64" height="48" rx="8" fill="none"/>',
            _text(238, center - 2, function, "middle"),
            _text(238, center + 15, kind, "middle small"),
            _arrow(270, LOGITS_AT - 4, center),
            *_grid(LOGITS_AT, top, 46, logits, "logit", logits / logits.max().clamp(min=1), "{:.{digits}f}"),
            _arrow(LOGITS_AT + 138 + 8, WEIGHTS_AT - 6, center),
            _text((LOGITS_AT + 138 + WEIGHTS_AT) / 2, center - 8, "softmax", "middle small"),
            *_grid(WEIGHTS_AT, top, 50, weights, "weight", weights.sqrt(), "{:.2f}"),
            _arrow(WEIGHTS_AT + 150 + 8, OUTPUT_AT - 6, center),
            _text((WEIGHTS_AT + 150 + OUTPUT_AT) / 2, center - 8, "sum of", "middle small"),
            _text((WEIGHTS_AT + 150 + OUTPUT_AT) / 2, center + 19, "weight &#215; x", "middle small"),
            _cell(OUTPUT_AT, center - 24, 68, 48, "feature", value / 9),
            _text(OUTPUT_AT + 34, center + 7, f"{value:.1f}", "middle bold"),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{text}</text>'


def _cell(x: float, y: float, width: float, height: float, style: str, strength: float) -> str:
    """A rectangle whose colour is as strong as ``strength`` in [0, 1]."""
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {shape} class="cell {style}" fill-opacity="{0.04 + 0.56 * max(0.0, strength):.2f}"/>'


def _grid(x: float, y: float, width: float, values: Tensor, style: str, strengths: Tensor, form: str) -> list[str]:
    """(3, 3) values as cells with their numbers."""
    digits = 0 if bool((values == values.round()).all()) else 1
    parts = []
    for index, (value, strength) in enumerate(zip(values.flatten(), strengths.flatten(), strict=True)):
        left, top = x + index % 3 * width, y + index // 3 * CELL_HEIGHT
        parts.append(_cell(left, top, width, CELL_HEIGHT, style, strength.item()))
        text = form.format(value.item(), digits=digits)
        parts.append(_text(left + width / 2, top + CELL_HEIGHT / 2 + 5, text, "middle"))
    return parts


def _arrow(start: float, end: float, y: float) -> str:
    line = f'<path class="arrow" d="M {start:g} {y:g} H {end - 6:g}"/>'
    return f'{line}<path class="tip" d="M {end:g} {y:g} l -8 -4 v 8 z"/>'


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the SVG file to write")
    options = parser.parse_args()
    write_text(options.output, draw())


if __name__ == "__main__":
    cli.launch(main)
