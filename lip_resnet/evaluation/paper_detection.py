"""The published figures of detectors on COCO, and measured ones compared with them."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from lip_resnet.config import Section
from lip_resnet.evaluation import tables
from lip_resnet.evaluation.average_precision import METRICS
from lip_resnet.evaluation.render import render

TOLERANCE = 0.5
"""Points of AP that a detector trained here may differ from the published one: our choice."""
IMAGES = 5000
COMMAND = "torchrun --standalone --nproc_per_node=8 train.py --config {} data.root=COCO"


class PublishedAP(Section):
    """A detector's figures as printed, in percent."""

    source: str
    AP: float
    AP50: float | None = None
    AP75: float | None = None
    APs: float | None = None
    APm: float | None = None
    APl: float | None = None


class DetectorRow(Section):
    """One detector."""

    name: str
    label: str
    model: str
    """Of the backbone."""
    args: dict[str, Any] = Field(default_factory=dict)
    detector: str = "faster_rcnn"
    epochs: int
    recipe: str
    published: PublishedAP
    inferred: str | None = None
    """What of it is a conclusion and not printed; such rows are not checked."""

    @property
    def figures(self) -> dict[str, float]:
        """The published keys of ``METRICS``."""
        return self.published.model_dump(exclude={"source"}, exclude_none=True)

    @property
    def key(self) -> str:
        """As ``tables`` look for it: network, detector and epochs."""
        return f"{tables.label(self.model, self.args, self.detector)}, {self.epochs} epochs"


def find(rows: Sequence[DetectorRow], result: dict[str, Any]) -> DetectorRow | None:
    """The published detector of a row of eval.py, by network and epochs; None where it has none."""
    training = result["protocol"].get("training") or {}
    keywords = tables.unpublished(tables.keywords_of(result))
    key = f"{tables.label(result['model'], keywords, result['detector'])}, {training.get('train.epochs')} epochs"
    return next((row for row in rows if row.key == key), None)


def compare(row: DetectorRow, result: dict[str, Any], file: str, why_not: str | None) -> dict[str, Any]:
    """A measured detector; ``ok`` is None where it is not compared.

    Args:
        why_not: why its figures and the published ones are of two experiments.
    """
    if why_not is None and result["images"] != IMAGES:
        why_not = f"images: {result['images']} against {IMAGES}"
    if why_not is None and row.inferred is not None:
        why_not = f"the published figure is inferred: {row.inferred}"
    figures = {name: result[name] for name in METRICS}
    ok = all(abs(figures[name] - value) <= TOLERANCE for name, value in row.figures.items())
    return {"row": row.name, "file": file, **figures, "why_not": why_not, "ok": ok if why_not is None else None}


def render_section(rows: Sequence[DetectorRow], measured: Sequence[dict[str, Any]]) -> str:
    """The report's part on COCO, in Markdown."""
    lines = []
    for row in rows:
        ours = [each for each in measured if each["row"] == row.name]
        shown = ", ".join(f"{each['AP']:.1f}" + " OFF" * (each["ok"] is False) for each in ours) or "not yet"
        published = [f"{row.figures[name]:.1f}" if name in row.figures else "-" for name in METRICS]
        lines.append([row.label, *published, row.published.source + " (inferred)" * bool(row.inferred), shown])
    text = ["## COCO", "", "Faster R-CNN, AP in percent on the 5,000 validation images, one scale:", ""]
    text += [render(["backbone", *(f"published {name}" for name in METRICS), "source", "AP with this code"], lines)]
    text.append(f"A detector trained here agrees within {TOLERANCE} points, this project's choice.")
    text += ["", *(f"- {row.label}: {row.inferred}" for row in rows if row.inferred)]
    for each in measured:
        why = f"not compared: {each['why_not']}" if each["why_not"] else "agrees" if each["ok"] else "OFF"
        text.append(f"- {each['row']}, {each['file']}: AP {each['AP']:.2f}; {why}")
    done = {each["row"] for each in measured}
    text += [f"- {row.name}: trained by `{COMMAND.format(row.recipe)}`" for row in rows if row.name not in done]
    return "\n".join(text) + "\n"
