"""The published figures as data, the networks' sizes held against them, and the report.

Counting rules, both for one 224x224 image and in multiply-adds:

    macs    convolutions and linear layers (``models.count_macs``)
    flops   those, plus 2 per output of a batch norm, 1 per output of a ReLU and 1 per input of a plain pooling; nothing
            for instance norms, gates and LIP itself. So count the tools of 2019 (ptflops: github.com/sovrasov/
            flops-counter.pytorch), and so all six "FLOPs" that the reference prints come out, to its last digit.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import Field, ValidationError
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from lip_resnet import results, runlog
from lip_resnet.config import InputError, Section
from lip_resnet.models import registry

IMAGES_APART = 25
"""Of 50,000: how far kernels, image decoders and resizers of other versions may move a count of the same weights."""
RETRAINED_APART = 0.3
"""Percent: how far a network trained anew may be from the published one. Our choice: three times 0.1, what the seeds
of an ImageNet ResNet-50 commonly differ by."""
COMMAND = "torchrun --standalone --nproc_per_node=8 train.py --config {} data.root=DIR"
RULES = f"""\
- Parameters: every trainable number; equal to the reference's own (LIP) or torchvision's, and to the published millions
  as printed (0.05 M).
- MACs: multiply-adds of convolutions and linear layers for one 224x224 image; within 0.0005 G of those counted on the
  reference's networks.
- "FLOPs": MACs, plus 2 per output of a batch norm, 1 per output of a ReLU, 1 per input of a plain pooling; nothing for
  instance norms, gates and LIP. Within 0.005 G of the published figure, its last digit. The rule is inferred: it is
  that of counting tools of 2019, and gives all six published figures.
- Accuracy of given weights: within {IMAGES_APART} of 50,000 images. Of a network trained anew with the paper's recipe:
  within {RETRAINED_APART:.1f} points, a choice of this project (three times what seeds commonly differ by).
"""


class Figure(Section):
    """One number."""

    source: str
    value: float


class Counts(Section):
    """Correct predictions of ``Paper.images``."""

    source: str
    top1: int
    top5: int


class Published(Section):
    """What a table prints; percent, millions, 1e9 multiply-adds, milliseconds."""

    source: str
    top1: float
    top5: float | None = None
    params_millions: float | None = None
    flops: float | None = None
    titan_xp_ms: float | None = None


class Row(Section):
    """One network of the paper."""

    name: str
    label: str
    model: str
    args: dict[str, Any] = Field(default_factory=dict)
    recipe: str
    published: Published | None = None
    correct: Counts | None = None
    params: Figure
    macs: Figure


class Gain(Section):
    """A printed difference of two rows, and the right one where it is a misprint."""

    source: str
    row: str
    baseline: str
    top1: float
    top5: float
    correction: dict[str, float] = Field(default_factory=dict)


class Skipped(Section):
    """A published figure that is not checked."""

    figure: str
    source: str
    why: str


class Paper(Section):
    """The data file of figures."""

    sources: dict[str, str]
    images: int
    classes: int
    rows: list[Row]
    gains: list[Gain]
    out_of_scope: list[Skipped]

    def find(self, model: str, args: dict[str, Any]) -> Row | None:
        """The row of a network, or None where nothing is published."""
        network = (model, results.unpublished(args))
        return next((row for row in self.rows if (row.model, row.args) == network), None)

    def accuracies(self) -> dict[str, dict[str, float]]:
        """What ``results.build_table`` shows beside measured rows."""
        return {
            results.label(row.model, row.args): row.published.model_dump(include={"top1", "top5"}, exclude_none=True)
            for row in self.rows
            if row.published is not None
        }


def load_paper(path: Path) -> Paper:
    """Read the data file of figures.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        return Paper.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InputError(f"{path}: not the paper's figures: {error}") from None


def count_flops(model: nn.Module, size: int) -> int:
    """Multiply-adds of one ``size`` x ``size`` image by the rule ``flops`` at the top of this file."""
    total = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.BatchNorm2d):
            total += 2 * output.numel()
        elif isinstance(module, nn.ReLU) or any(isinstance(extra, nn.ReLU) for extra in inputs[1:]):
            total += output.numel()  # of its own, or taken along by the norm in front of it
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d | SelectAdaptivePool2d):
            total += inputs[0].numel()

    trial = copy.deepcopy(model).to("meta").eval()
    for module in trial.modules():
        module.register_forward_hook(add)
    with torch.no_grad():
        trial(torch.empty(1, 3, size, size, device="meta"))
    return total + registry.count_macs(model, size)


class Check(NamedTuple):
    """One comparison: ``found`` is right where it is at most ``tolerance`` from ``expected``."""

    what: str
    found: float
    expected: float
    tolerance: float
    source: str

    @property
    def ok(self) -> bool:
        """Half a printed digit is a tolerance: a hair of float64 must not decide it."""
        return abs(self.found - self.expected) <= self.tolerance * (1 + 1e-9)


def check_sizes(row: Row) -> dict[str, Check]:
    """Build the network of a row and count: parameters exactly, multiply-adds to the last digit of each figure."""
    with torch.device("meta"):  # counting needs shapes alone
        model = registry.create_model(row.model, **row.args)
    params = registry.count_parameters(model)
    checks = [
        Check("params", params, row.params.value, 0, row.params.source),
        Check("macs", registry.count_macs(model, 224) / 1e9, row.macs.value, 0.0005, row.macs.source),
    ]
    published = row.published
    if published is not None and published.params_millions is not None:
        checks.append(Check("params_millions", params / 1e6, published.params_millions, 0.05, published.source))
    if published is not None and published.flops is not None:
        checks.append(Check("flops", count_flops(model, 224) / 1e9, published.flops, 0.005, published.source))
    return {check.what: check for check in checks}


def check_gain(gain: Gain, paper: Paper) -> list[Check]:
    """A printed gain, or its correction, against the difference of the printed rows, to its last digit."""
    rows = {row.name: row.published for row in paper.rows}
    return [
        Check(
            f"{gain.row} {key}",
            round(getattr(rows[gain.row], key) - getattr(rows[gain.baseline], key), 3),
            gain.correction.get(key, getattr(gain, key)),
            0.005,
            gain.source,
        )
        for key in ("top1", "top5")
    ]


def judge(result: dict[str, float], expected: Counts) -> str:
    """Two pairs of counts: ``identical``, ``within 25 images`` or ``differs``."""
    apart = [abs(result["correct1"] - expected.top1), abs(result["correct5"] - expected.top5)]
    if not any(apart):
        return "identical"
    return f"within {IMAGES_APART} images" if max(apart) <= IMAGES_APART else "differs"


def build_report(paper: Paper, sizes: dict[str, dict[str, Check]], accuracies: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything, as JSON."""

    def plain(checks: Any) -> list[dict[str, Any]]:
        return [{**check._asdict(), "ok": check.ok} for check in checks]

    rows = [
        {
            **row.model_dump(include={"name", "label", "model", "args", "published"}),
            "sizes": plain(sizes[row.name].values()),
            "accuracies": [
                {**found, "checks": plain(found["checks"])} for found in accuracies if found["row"] == row.name
            ],
            "train": COMMAND.format(row.recipe),
        }
        for row in paper.rows
    ]
    gains = [
        {**gain.model_dump(), "checks": plain(check_gain(gain, paper)), "misprint": bool(gain.correction)}
        for gain in paper.gains
    ]
    checks = [check for row in rows for check in row["sizes"]]
    checks += [check for row in rows for found in row["accuracies"] for check in found["checks"]]
    checks += [check for gain in gains for check in gain["checks"]]
    return {
        "ok": all(check["ok"] for check in checks),
        "off": sum(not check["ok"] for check in checks),
        "checks": len(checks),
        **{"rows": rows, "gains": gains, "sources": paper.sources},
        "out_of_scope": [skipped.model_dump() for skipped in paper.out_of_scope],
        "environment": runlog.describe_environment(),
    }


def render_table(paper: Paper, sizes: dict[str, dict[str, Check]], accuracies: list[dict[str, Any]]) -> str:
    """The Markdown table: each cell is what was found (what was expected), and OFF where they disagree."""

    def cell(check: Check | None, style: str) -> str:
        if check is None:
            return "-"
        return f"{check.found:{style}} ({check.expected:{style}})" + ("" if check.ok else " OFF")

    lines = []
    for row in paper.rows:
        found, published = sizes[row.name], row.published
        ours = [one for one in accuracies if one["row"] == row.name]
        off = any(not check.ok for one in ours for check in one["checks"])
        lines.append(
            [
                row.label,
                cell(found["params"], ",.0f"),
                cell(found["macs"], ".3f"),
                cell(found.get("flops"), ".2f"),
                "-" if published is None else " / ".join(f"{x:.2f}" for x in (published.top1, published.top5) if x),
                ", ".join(f"{one['top1']:.2f} / {one['top5']:.2f}" for one in ours) + " OFF" * off or "not yet",
            ]
        )
    header = ["network", "parameters", "MACs (G)", '"FLOPs" (G)', "published top-1 / top-5", "with this code"]
    return results.render(header, lines, [], "md")


def render_report(
    paper: Paper, sizes: dict[str, dict[str, Check]], accuracies: list[dict[str, Any]], report: dict[str, Any]
) -> str:
    """The Markdown report."""
    outcome = "everything agrees" if report["ok"] else f"{report['off']} are OFF"
    text = ["# The paper, row by row", "", f"{report['checks']} figures compared: {outcome}. Found (expected):", ""]
    text += [render_table(paper, sizes, accuracies), "## How figures are counted and compared", "", RULES]
    text += ["## Accuracies", ""]
    for row in paper.rows:
        ours = [found for found in accuracies if found["row"] == row.name]
        for found in ours:
            line = f"- {row.label}, {found['file']}: top-1 {found['top1']:.3f}, top-5 {found['top5']:.3f}; "
            if "why_not" in found:
                line += f"not compared, its protocol is not the paper's: {found['why_not']}"
            elif not found["checks"]:
                line += "nothing is published"
            else:
                line += "agrees" if all(check.ok for check in found["checks"]) else "OFF"
            text.append(line + (f" (counts: {found['verdict']})" if "verdict" in found else ""))
        if not ours:
            text.append(f"- {row.label}: no weights given; trained by `{COMMAND.format(row.recipe)}`")
    text += ["", "## Printed gains", ""]
    for gain in paper.gains:
        for key, check in zip(("top1", "top5"), check_gain(gain, paper), strict=True):
            printed = f"- {gain.row} over {gain.baseline}, {key}: printed {getattr(gain, key):+.2f}, "
            printed += f"by the printed rows {check.found:+.2f}"
            if key in gain.correction:
                printed += f": a misprint in the source, {gain.correction[key]:+.2f} is right"
            text.append(printed + ("" if check.ok else " OFF"))
    text += ["", "## Published, not checked here", ""]
    text += [f"- {skipped.figure} ({skipped.source}): {skipped.why}" for skipped in paper.out_of_scope]
    text += ["", "## Sources", "", *(f"- {name}: {source}" for name, source in paper.sources.items())]
    return "\n".join(text) + "\n"
