"""Studies of detectors: designs, and the report from made rows and matches."""

import csv
import json

import numpy as np
import pytest
import yaml
from evaluation.test_average_precision import made
from scipy import stats

from lip_resnet.config import InputError
from lip_resnet.evaluation.average_precision import average_precision
from lip_resnet.evaluation.matching import match
from lip_resnet.study import design, detection, export, report, summary

STUDY = {
    "base": "digits/lip_resnet18_fpn",
    "variants": {"resnet18": {"model": {"backbone": {"name": "resnet18"}}}, "lip_resnet18": {}},
    "baseline": "resnet18",
    "primary": "lip_resnet18",
    "seeds": [0, 1, 2],
}


def load(tmp_path, **changes) -> design.Design:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return design.load_design(path, output=tmp_path / "run")


def finish(cell: design.Cell, images: int = 30, **changes) -> float:
    """Rows and matches as eval.py writes them: LIP's detections are the ground truth's boxes more often."""
    truth, detections = made(11, images)
    random = np.random.default_rng(cell.seed + 10 * (cell.variant == "resnet18"))
    keep = random.random(len(detections.scores)) < (0.95 if cell.variant == "lip_resnet18" else 0.7)
    matches = match(truth, type(detections)(*(column[keep] for column in detections)))
    figures = average_precision(matches)
    row = {"model": cell.variant, "detector": "faster_rcnn", **figures, "images": images, "params": 1e6, "macs": 2e9}
    row |= {"seed": cell.seed, "protocol": {"task": "detection", "data": "digit_scenes", "training": None}}
    row |= {"environment": {"hardware": "a CPU", "torch": "2", "torchvision": "3"}, **changes}
    cell.folder.mkdir(parents=True)
    cell.row.write_text(json.dumps(row))
    matches.write(cell.predictions)
    return figures["AP"]


def test_designs(tmp_path):
    study = load(tmp_path)
    assert study.detection
    assert study.cells()[0].predictions.name == "matches.npz"
    recipe = study.recipes["resnet18"]
    assert recipe.model.backbone.name == "resnet18"
    assert recipe.model.num_classes == study.recipes["lip_resnet18"].model.num_classes
    design.write_design(study)
    assert design.load_record(tmp_path / "run").recipes == study.recipes
    lip = STUDY["variants"]["resnet18"]
    for fragment, line in (
        ({"model": {"fpn_channels": 32}}, r"in model\.fpn_channels: 32 against \d+; only model\.backbone may differ"),
        ({"data": {"size": 64}}, r"in data\.size: 64 against \d+; all variants have the same images"),
        ({"model": {"backbone": {"nmae": "x"}}}, r"model\.backbone\.nmae: unknown key"),
        ({"optim": {"lr": 0.5}}, r"in optim\.lr: 0\.5 against"),
    ):
        with pytest.raises(InputError, match=line):
            load(tmp_path, variants={"resnet18": lip, "lip_resnet18": fragment})
    assert load(tmp_path, may_differ=["model.fpn_channels"]).detection
    with pytest.raises(InputError, match=r"may_differ: 'data\.max_size' is the same in every variant"):
        load(tmp_path, may_differ=["data.max_size"])


def test_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "SAMPLES", 200)
    study = load(tmp_path, question="Does LIP detect better?")
    design.write_design(study)
    with pytest.raises(InputError, match="no cell is finished yet"):
        report.write_report(study)
    aps = {(cell.variant, cell.seed): finish(cell) for cell in study.cells()}
    lines = report.write_report(design.load_record(tmp_path / "run"))
    differences = [aps["lip_resnet18", seed] - aps["resnet18", seed] for seed in range(3)]
    t = stats.ttest_1samp(differences, 0)
    low, high = t.confidence_interval()
    assert lines[0] == "Does LIP detect better?"
    assert f"{np.mean(differences):+.2f} AP, 95% interval {low:+.2f} to {high:+.2f}" in lines[1]
    with open(tmp_path / "run" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["variant"], row["figure"]) for row in rows} >= {("resnet18", "AP"), ("lip_resnet18", "APl")}
    ap = next(row for row in rows if (row["variant"], row["figure"]) == ("lip_resnet18", "AP"))
    assert float(ap["difference"]) == pytest.approx(np.mean(differences))
    assert float(ap["p_t"]) == pytest.approx(t.pvalue)
    assert ap["verdict"] == ("better" if t.pvalue < 0.05 else "not distinguishable")
    assert float(ap["bootstrap_low"]) < float(ap["difference"]) < float(ap["bootstrap_high"])
    small = next(row for row in rows if (row["variant"], row["figure"]) == ("lip_resnet18", "APs"))
    assert small["bootstrap_low"]
    assert small["verdict"] == ""
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert markdown.count("\n## ") == 4
    assert "**Exploratory**" in markdown
    assert "<table>" in (tmp_path / "run" / "report.html").read_text()


def test_one_seed_and_other_sets(tmp_path):
    study = load(tmp_path, seeds=[4])
    design.write_design(study)
    first, second = study.cells()
    ap = finish(first)
    assert ap == pytest.approx(detection.load_results(study)["resnet18"][4].row["AP"])
    assert "No verdict yet" in report.write_report(study)[0]
    finish(second, images=29)
    with pytest.raises(InputError, match="other images or objects"):
        detection.load_results(study)
    second.row.write_text(second.row.read_text().replace('"AP": ', '"AP": 1'))
    with pytest.raises(InputError, match=r"matches\.npz: not the matches of"):
        detection.load_results(study)


def test_an_export_reports_the_same(tmp_path, monkeypatch):
    """Of a half-finished study with a failed cell; and the page of results has its section."""
    monkeypatch.setattr(detection, "SAMPLES", 50)
    study = load(tmp_path)
    design.write_design(study)
    *done, failed = study.cells()
    for cell in done:
        finish(cell, images=10, checkpoint=f"{cell.folder}/last.pt")
        cell.record.write_text(json.dumps({"status": "done", "seconds": 90.0}))
    message = "out of memory"
    failed.record.write_text(json.dumps({"status": "failed", "seconds": 1.0, "message": message}))
    target = tmp_path / "exported" / study.folder.name
    assert f"{target}: 5 of 6 cells" in export.export(study, target)
    assert {path.name for path in target.iterdir()} == {"study.yaml", "cells.jsonl", "matches.npz"}
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in target.iterdir())
    text = []
    for folder in (study.folder, target):
        report.write_report(design.load_record(folder))
        text.append([(folder / f"report.{kind}").read_text() for kind in ("md", "html", "csv")])
    assert text[0] == text[1]
    assert all(part in text[1][0] for part in ("5 of 6 cells", f"lip_resnet18/seed2: {message}", "1.5"))
    page = summary.results_page([target], [], "figures/studies")
    assert page.startswith("## run\n\n**")
    assert page.count("\n### ") == 4
    assert not summary.draw_figures(target)
    before = (target / "matches.npz").read_bytes()
    export.export(design.load_record(target), tmp_path / "copy")
    assert (tmp_path / "copy" / "matches.npz").read_bytes() == before
    done[0].row.unlink()
    with pytest.raises(InputError, match=r"has resnet18/seed0, which .* does not have"):
        export.export(study, target)
    (target / "matches.npz").write_bytes((tmp_path / "copy" / "matches.npz").read_bytes()[:-30])
    with pytest.raises(InputError, match=r"matches\.npz: not matches"):
        detection.load_results(design.load_record(target))
