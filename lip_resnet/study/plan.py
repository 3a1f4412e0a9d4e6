"""What a study will cost and can show, before it runs."""

import json
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lip_resnet.errors import InputError
from lip_resnet.evaluation.render import render
from lip_resnet.study import statistics
from lip_resnet.study.cells import Children, last_line, read_record
from lip_resnet.study.design import CONFIRMATORY_SEEDS, Design

DEVIATIONS = (0.1, 0.2, 0.5, 1.0)
"""Assumed standard deviations of the paired differences, in points: of ImageNet about 0.1 to 0.2, of small sets
0.5 to 1."""
DISAGREEMENT = 0.15
"""Assumed share of the images about which exactly one of two runs is right."""
_STEPS = 4


@dataclass(frozen=True)
class Cost:
    """The cost of one cell, and its data."""

    seconds: float
    how: str
    """Where ``seconds`` is from: measured on finished cells, or computed from a measured training step."""
    images: int | None = None
    """Validation images."""


def describe(design: Design, jobs: int, measure: bool = True) -> str:
    """The plan of a study, as text.

    Args:
        jobs: cells that run at the same time.
        measure: take a few training steps of every variant that has no finished cell; they share nothing with the run.
    """
    costs = {name: cost for name in design.recipes if (cost := _cost(design, name, measure)) is not None}
    seeds, cells = len(design.study.seeds), design.cells()
    rows = []
    for name in design.recipes:
        finished = sum(cell.finished for cell in cells if cell.variant == name)
        cost = costs.get(name)
        minutes, how = (f"{cost.seconds / 60:.1f}", cost.how) if cost else ("-", "not measured")
        rows.append([name, str(seeds), str(finished), minutes, how])
    lines = [render(["variant", "seeds", "finished", "minutes a cell", "source"], rows).rstrip(), ""]
    if len(costs) == len(design.recipes):
        remaining = sum(costs[cell.variant].seconds for cell in cells if not cell.finished)
        lines.append(f"{len(cells)} cells; about {remaining / 3600 / jobs:.1f} hours remaining with --jobs {jobs}")
    else:
        lines.append(f"{len(cells)} cells")
    images = next((cost.images for cost in costs.values() if cost.images), None)
    return "\n".join([*lines, "", *_what_it_can_show(design, images)])


def _what_it_can_show(design: Design, images: int | None) -> list[str]:
    """Lines about the differences that this many seeds and images can show."""
    seeds, family = len(design.study.seeds), len(design.compared) - 1
    lines = [
        f"declared comparison: {design.study.primary} against {design.study.baseline}, paired t over {seeds} seeds"
    ]
    if seeds > 1:
        header = ["deviation of the paired differences (points)", *map(str, DEVIATIONS)]
        kinds = [("declared comparison shows, with 80% power", statistics.ALPHA)]
        kinds += [(f"first of {family} others under Holm", statistics.ALPHA / family)] * (family > 1)
        rows = [
            [what, *(f"{statistics.detectable_difference(each, seeds, p):.2f}" for each in DEVIATIONS)]
            for what, p in kinds
        ]
        lines += ["", *render(header, rows).rstrip().splitlines(), ""]
    if seeds <= statistics.EXACT_SEEDS:
        smallest = statistics.smallest_sign_flip(seeds)
        of_family = f"; first of {family} others under Holm: {min(1, family * smallest):.3g}" * (family > 1)
        lines.append(f"smallest p of the exact sign-flip test with {seeds} seeds: {smallest:.3g}{of_family}")
    if images and not design.detection:
        error = statistics.deviation_of_images(DISAGREEMENT, images)
        lines.append(
            f"{images:,} validation images: another choice of images moves a difference of two runs by up to "
            f"{1.96 * error:.2f} points (95%, if they disagree about {DISAGREEMENT:.0%} of the images)"
        )
    if seeds < CONFIRMATORY_SEEDS:
        lines.append(f"fewer than {CONFIRMATORY_SEEDS} seeds: every verdict will be marked exploratory")
    return lines


def _cost(design: Design, variant: str, measure: bool) -> Cost | None:
    """The cost of a cell, from the variant's finished cells or from a measured training step."""
    finished = [cell for cell in design.cells() if cell.variant == variant and cell.finished]
    seconds = [record["seconds"] for cell in finished if (record := read_record(cell)).get("status") == "done"]
    if seconds:
        images = json.loads(finished[0].row.read_text(encoding="utf-8"))["images"]
        return Cost(sum(seconds) / len(seconds), f"{len(seconds)} finished cells", images)
    return _measure(design, variant) if measure else None


def _measure(design: Design, variant: str) -> Cost:
    """Train a variant for a few steps in a temporary folder, then stop it; evaluation is counted as a third of a step.

    Raises:
        InputError: the training fails.
    """
    recipe = design.recipes[variant]
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "run", Path(temporary) / "log"
        path = Path(temporary) / "recipe.yaml"
        path.write_text(recipe.dump(), encoding="utf-8")
        epochs = max(recipe.train.epochs, 2 * _STEPS)  # of a set that is one step
        command = ["train.py", "--config", path, "--output", folder, f"train.log_every={_STEPS}"]
        command.append(f"train.epochs={epochs}")
        lines = _train_until_logged(command, folder / "metrics.jsonl", log, design.study.processes)
        if not lines:
            raise InputError(f"variant {variant}: a trial of a few steps failed: {last_line(log)}")
        datasets = json.loads((folder / "env.json").read_text(encoding="utf-8")).get("datasets") or {}
    rate = lines[-1]["train/images_per_second"]
    counts = {split: (datasets.get(split) or {}).get("images") for split in ("train", "val")}
    images = recipe.train.epochs * (counts["train"] or 0)
    evaluated = recipe.train.epochs / recipe.train.eval_every * (counts["val"] or 0)
    return Cost(
        (images + evaluated / 3) / rate, f"{rate:.0f} images/s in steps {_STEPS + 1} to {2 * _STEPS}", counts["val"]
    )


def _train_until_logged(command: list[Any], metrics: Path, log: Path, processes: int) -> list[dict[str, Any]]:
    """Run a training until it has logged twice, then stop it; its log lines, none if it has failed."""
    with open(log, "wb") as file:
        child = Children(threads=None).start(command, file, processes)
        try:
            while child.poll() is None:
                lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
                if len(lines) >= 2:
                    break
                time.sleep(0.1)
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    if not metrics.is_file():
        return []
    parsed = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [line for line in parsed if "train/images_per_second" in line]
