"""The published figures (paper.yaml), measured ones compared with them, and the report."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError
from torch import nn

from lip_resnet.config import InputError, Section
from lip_resnet.environment import describe_environment
from lip_resnet.evaluation import cost, tables
from lip_resnet.evaluation.paper_detection import DetectorRow
from lip_resnet.evaluation.protocol import EvalConfig, describe_protocol, describe_training, difference
from lip_resnet.evaluation.render import render
from lip_resnet.recipe import load_config

PAPER_FILE = Path(__file__).with_name("paper.yaml")

COUNT_TOLERANCE = 25
"""Images of 50,000: how much a count of the same weights may change with other versions of kernels, image decoders and
resizers."""
RETRAINED_TOLERANCE = 0.3
"""Percentage points that a retrained network may differ from the published one. Our choice: three times 0.1, the common
difference between seeds of a ResNet-50 on ImageNet."""
COMMAND = "torchrun --standalone --nproc_per_node=8 train.py --config {} data.root=DIR"
RULES = f"""\
- Parameters: every trainable number; equal to the reference's own (LIP) or torchvision's, and to the published millions
  as printed (0.05 M).
- MACs: multiply-adds of convolutions and linear layers for one 224x224 image; within 0.0005 G of those counted on the
  reference's networks.
- "FLOPs": MACs, plus 2 per output of a batch norm, 1 per output of a ReLU, 1 per input of a plain pooling; nothing for
  instance norms, gates and LIP. Within 0.005 G of the published figure, its last digit. The rule is inferred: it is
  that of counting tools of 2019, and gives all six published figures.
- Accuracy of given weights: within {COUNT_TOLERANCE} of 50,000 images. Of a network retrained with the paper's recipe:
  within {RETRAINED_TOLERANCE:.1f} percentage points, this project's choice (three times a common difference of seeds).
"""


class Figure(Section):
    """One number and where it is from."""

    source: str
    value: float


class PublishedCounts(Section):
    """Numbers of correct predictions among ``Paper.images`` images."""

    source: str
    top1: int
    top5: int


class Published(Section):
    """A network's figures as printed: percent, millions of parameters, 1e9 multiply-adds, milliseconds."""

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
    correct: PublishedCounts | None = None
    params: Figure
    macs: Figure


class Gain(Section):
    """A printed difference of two rows, and the correct one where it is a misprint."""

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
    """The content of paper.yaml."""

    sources: dict[str, str]
    images: int
    classes: int
    rows: list[Row]
    gains: list[Gain]
    detection: list[DetectorRow]
    out_of_scope: list[Skipped]

    def find(self, model: str, args: dict[str, Any]) -> Row | None:
        """The row of a network, or None where it has none."""
        network = (model, tables.unpublished(args))
        return next((row for row in self.rows if (row.model, row.args) == network), None)

    def accuracies(self) -> dict[str, dict[str, float]]:
        """``tables.label`` of a network -> published figures: ``tables.build_table``'s ``paper``.

        Of detectors, ``DetectorRow.key``.
        """
        networks = {
            tables.label(row.model, row.args): row.published.model_dump(include={"top1", "top5"}, exclude_none=True)
            for row in self.rows
            if row.published is not None
        }
        detectors = {row.key: row.figures for row in self.detection if row.inferred is None or row.published.AP50}
        return networks | detectors


def load_paper(path: Path = PAPER_FILE) -> Paper:
    """Read the figures.

    Raises:
        InputError: the file cannot be read, or is not of this form.
    """
    try:
        return Paper.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InputError(f"{path}: not the paper's figures: {error}") from error


class Check(NamedTuple):
    """One comparison: ``measured`` agrees with ``expected`` within ``tolerance``."""

    what: str
    measured: float
    expected: float
    tolerance: float
    source: str

    @property
    def ok(self) -> bool:
        """Whether they agree; with 1e-9 for float64's rounding, as a tolerance can be exactly half a printed digit."""
        return abs(self.measured - self.expected) <= self.tolerance * (1 + 1e-9)


def check_sizes(row: Row, model: nn.Module) -> dict[str, Check]:
    """Compare a network's parameters and multiply-adds with its row's: exactly, and to each figure's last digit.

    Args:
        model: the network, on any device (``meta`` too).
    """
    params = cost.count_parameters(model)
    macs, flops = cost.count_operations(model, 224)
    checks = [
        Check("params", params, row.params.value, 0, row.params.source),
        Check("macs", macs / 1e9, row.macs.value, 0.0005, row.macs.source),
    ]
    published = row.published
    if published is not None and published.params_millions is not None:
        checks.append(Check("params_millions", params / 1e6, published.params_millions, 0.05, published.source))
    if published is not None and published.flops is not None:
        checks.append(Check("flops", flops / 1e9, published.flops, 0.005, published.source))
    return {check.what: check for check in checks}


def check_gain(gain: Gain, paper: Paper) -> list[Check]:
    """Compare the difference of two printed rows with the printed gain, or its correction, to its last digit."""
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


def compare_counts(result: dict[str, float], expected: PublishedCounts) -> str:
    """Compare measured with published counts: ``identical``, ``within 25 images`` or ``differs``."""
    differences = [abs(result["correct1"] - expected.top1), abs(result["correct5"] - expected.top5)]
    if not any(differences):
        return "identical"
    return f"within {COUNT_TOLERANCE} images" if max(differences) <= COUNT_TOLERANCE else "differs"


def protocol_difference(row: dict[str, Any], recipe: Path) -> str | None:
    """The first key in which a row of eval.py differs from the paper's experiment on 8 processes; None if in none.

    Where the row's training is unknown, only the evaluation is compared.
    """
    config = load_config(recipe)
    training = describe_training(config, [8]) if row["protocol"].get("training") is not None else None
    return difference(row["protocol"], describe_protocol(EvalConfig.from_recipe(config), training))


def build_report(paper: Paper, sizes: dict[str, dict[str, Check]], accuracies: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of report.json."""

    def as_json(checks: Any) -> list[dict[str, Any]]:
        return [{**check._asdict(), "ok": check.ok} for check in checks]

    rows = [
        {
            **row.model_dump(include={"name", "label", "model", "args", "published"}),
            "sizes": as_json(sizes[row.name].values()),
            "accuracies": [
                {**accuracy, "checks": as_json(accuracy["checks"])}
                for accuracy in accuracies
                if accuracy["row"] == row.name
            ],
            "train": COMMAND.format(row.recipe),
        }
        for row in paper.rows
    ]
    gains = [
        {**gain.model_dump(), "checks": as_json(check_gain(gain, paper)), "misprint": bool(gain.correction)}
        for gain in paper.gains
    ]
    checks = [check for row in rows for check in row["sizes"]]
    checks += [check for row in rows for accuracy in row["accuracies"] for check in accuracy["checks"]]
    checks += [check for gain in gains for check in gain["checks"]]
    return {
        "ok": all(check["ok"] for check in checks),
        "off": sum(not check["ok"] for check in checks),
        "checks": len(checks),
        **{"rows": rows, "gains": gains, "sources": paper.sources},
        "out_of_scope": [skipped.model_dump() for skipped in paper.out_of_scope],
        "environment": describe_environment(),
    }


def render_table(paper: Paper, sizes: dict[str, dict[str, Check]], accuracies: list[dict[str, Any]]) -> str:
    """The Markdown table: each cell is ``measured (expected)``, with OFF where they disagree."""

    def cell(check: Check | None, style: str) -> str:
        if check is None:
            return "-"
        return f"{check.measured:{style}} ({check.expected:{style}})" + ("" if check.ok else " OFF")

    lines = []
    for row in paper.rows:
        counted, published = sizes[row.name], row.published
        ours = [accuracy for accuracy in accuracies if accuracy["row"] == row.name]
        off = any(not check.ok for accuracy in ours for check in accuracy["checks"])
        lines.append(
            [
                row.label,
                cell(counted["params"], ",.0f"),
                cell(counted["macs"], ".3f"),
                cell(counted.get("flops"), ".2f"),
                "-" if published is None else " / ".join(f"{x:.2f}" for x in (published.top1, published.top5) if x),
                ", ".join(f"{each['top1']:.2f} / {each['top5']:.2f}" for each in ours) + " OFF" * off or "not yet",
            ]
        )
    header = ["network", "parameters", "MACs (G)", '"FLOPs" (G)', "published top-1 / top-5", "with this code"]
    return render(header, lines)


def render_report(
    paper: Paper, sizes: dict[str, dict[str, Check]], accuracies: list[dict[str, Any]], report: dict[str, Any]
) -> str:
    """The Markdown report."""
    outcome = "everything agrees" if report["ok"] else f"{report['off']} are OFF"
    text = ["# The paper, row by row", "", f"{report['checks']} figures compared: {outcome}. Measured (expected):", ""]
    text += [render_table(paper, sizes, accuracies), "## How figures are counted and compared", "", RULES]
    text += ["## Accuracies", ""]
    for row in paper.rows:
        ours = [accuracy for accuracy in accuracies if accuracy["row"] == row.name]
        for accuracy in ours:
            line = f"- {row.label}, {accuracy['file']}: top-1 {accuracy['top1']:.3f}, top-5 {accuracy['top5']:.3f}; "
            if "why_not" in accuracy:
                line += f"not compared, its protocol is not the paper's: {accuracy['why_not']}"
            elif not accuracy["checks"]:
                line += "nothing is published"
            else:
                line += "agrees" if all(check.ok for check in accuracy["checks"]) else "OFF"
            text.append(line + (f" (counts: {accuracy['verdict']})" if "verdict" in accuracy else ""))
        if not ours:
            text.append(f"- {row.label}: no weights given; trained by `{COMMAND.format(row.recipe)}`")
    text += ["", "## Printed gains", ""]
    for gain in paper.gains:
        for key, check in zip(("top1", "top5"), check_gain(gain, paper), strict=True):
            printed = f"- {gain.row} over {gain.baseline}, {key}: printed {getattr(gain, key):+.2f}, "
            printed += f"by the printed rows {check.measured:+.2f}"
            if key in gain.correction:
                printed += f": a misprint in the source, {gain.correction[key]:+.2f} is right"
            text.append(printed + ("" if check.ok else " OFF"))
    text += ["", "## Published, not checked here", ""]
    text += [f"- {skipped.figure} ({skipped.source}): {skipped.why}" for skipped in paper.out_of_scope]
    text += ["", "## Sources", "", *(f"- {name}: {source}" for name, source in paper.sources.items())]
    return "\n".join(text) + "\n"
