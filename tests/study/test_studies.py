"""Studies: refusals of unfair designs, cells that go on, reports; with stand-ins for train.py and eval.py."""

import csv
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import yaml
from scipy import stats

from lip_resnet.config import InputError
from lip_resnet.errors import Stopped
from lip_resnet.study import cells, costs, design, details, export, probes, report, results, statistics

STUDY = {
    "base": "digits/resnet50",
    "variants": {
        "plain": {},
        "lip": {"model": {"name": "lip_resnet50"}},
        "average": {"model": {"downsampling": {"main": "average"}}},
    },
    "baseline": "plain",
    "primary": "lip",
    "seeds": [0, 1, 2],
}
TRAIN = """
import json, pathlib, sys, time
if "wait" in sys.argv[0]:
    time.sleep(60)
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("x")
if (folder.parent / "broken").exists() and folder.name == "seed1":
    sys.exit("train.py: error: optim.lr: too high")
lines = [{"step": 1, "epoch": e, "val/top1": 10.0 * e, "train/images_per_second": 50.0} for e in (0, 1)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
EVAL = """
import json, pathlib, random, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--checkpoint") + 1])
seed = int(folder.name.removeprefix("seed"))
draw = random.Random(f"{folder.parent.name}{seed}")
right = {"plain": 0.5, "lip": 0.7, "average": 0.5}[folder.parent.name]
lines, correct = ["image,label,top1,top5,margin,loss"], 0
for index in range(400):
    label = index % 4
    top1 = label if draw.random() < right else (label + 1) % 4
    correct += top1 == label
    lines.append(f"c{label}/{index}.png,{label},{top1},{top1} 0 1 2,0.5,1.0")
pathlib.Path(sys.argv[sys.argv.index("--predictions") + 1]).write_text("\\n".join(lines) + "\\n")
row = {"model": folder.parent.name, "top1": correct / 4, "top5": 100.0, "loss": 1.0, "images": 400, "params": 10**6}
row |= {"macs": 10**9, "correct1": correct, "seed": seed, "step": 10, "protocol": {"data": "digits", "training": None}}
row["environment"] = {"hardware": "a CPU", "torch": "2", "timm": "1", "command": sys.argv}
row["checkpoint"] = str(folder.resolve())
(folder / "eval.json").write_text(json.dumps(row))
"""


def write(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def make_stand_ins(folder, monkeypatch):
    root = folder / "checkout"
    root.mkdir()
    (root / "train.py").write_text(TRAIN)
    (root / "eval.py").write_text(EVAL)
    monkeypatch.setattr(cells, "ROOT", root)
    plain = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    monkeypatch.setattr(cells, "_CHILD", plain)
    return root


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """train.py and eval.py that answer at once, started without PyTorch."""
    return make_stand_ins(tmp_path, monkeypatch)


REFUSED = {
    "unknown key": ({"seedz": [1]}, r"seedz: unknown key; did you mean seeds"),
    "baseline": ({"baseline": "plane"}, r"baseline 'plane' is not a variant; did you mean plain\?"),
    "itself": ({"primary": "plain"}, r"baseline and primary are both 'plain'"),
    "seed twice": ({"seeds": [0, 1, 0]}, r"seeds \[0, 1, 0\]: 0 is there twice"),
    "other data": (
        {"variants": {**STUDY["variants"], "lip": {"data": {"name": "synthetic"}}}},
        r"variant lip differs from plain in data.name: synthetic against digits; all variants have the same images",
    ),
    "other classes": (
        {"variants": {**STUDY["variants"], "lip": {"model": {"num_classes": 20}}}},
        r"model.num_classes: 20 against 10",
    ),
    "other recipe": (
        {"variants": {**STUDY["variants"], "lip": {"optim": {"lr": 0.1}}}},
        r"variant lip differs from plain in optim.lr: 0.1 against 0.05; only model may differ",
    ),
    "same recipe": ({"variants": {**STUDY["variants"], "lip": {}}}, r"variants plain and lip have the same recipe"),
    "no folder": ({"variants": {**STUDY["variants"], "../lip": {}}}, r"'../lip' names a folder"),
    "unknown model key": (
        {"variants": {**STUDY["variants"], "lip": {"model": {"nmae": "x"}}}},
        r"variant lip of .*resnet50.yaml: model.nmae: unknown key",
    ),
    "may_differ": ({"may_differ": ["train.epoch"]}, r"may_differ: 'train.epoch' is not a key.*train.epochs"),
    "may_differ in data": ({"may_differ": ["data.root"]}, r"may_differ: 'data.root' is the same in every variant"),
    "another evaluation": ({"may_differ": ["data.eval_size"]}, r"may_differ: 'data.eval_size' is the same in every"),
    "no seeds": ({"seeds": []}, r"seeds: given \[\]"),
    "a list of variants": ({"variants": ["plain"]}, r"variants: given \['plain'\]"),
}


@pytest.mark.parametrize(("changes", "line"), REFUSED.values(), ids=REFUSED)
def test_unfair_designs_are_refused(tmp_path, changes, line):
    with pytest.raises(InputError, match=line) as refused:
        design.load_design(write(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_a_design_is_resolved(tmp_path):
    longer = {**STUDY["variants"], "long": {"train": {"epochs": 11}}}
    path = write(tmp_path, variants=longer, may_differ=["train.epochs"], recipe={"train": {"eval_every": 3}})
    study = design.load_design(path, ["optim.lr=0.2", "study.seeds=[4, 5]"], tmp_path / "out")
    assert {recipe.optim.lr for recipe in study.recipes.values()} == {0.2}
    assert {recipe.train.eval_every for recipe in study.recipes.values()} == {3}
    assert study.recipes["long"].train.epochs == 11
    assert study.compared == ["lip", "average", "long"]
    assert [str(cell) for cell in study.cells()][:5] == [
        *("plain/seed4", "lip/seed4", "average/seed4", "long/seed4", "plain/seed5"),
    ]


def test_cells_go_on_and_are_never_repeated(tmp_path, stand_ins):
    folder = tmp_path / "out"
    study = design.load_design(write(tmp_path), output=folder)
    design.write_design(study)
    (folder / "lip" / "broken").touch()
    failed = cells.run_cells(study, study.cells()[:4], jobs=2)  # one shard of it
    failed |= cells.run_cells(study, study.cells(), jobs=2)
    assert failed == {"lip/seed1": "train.py: error: optim.lr: too high"}
    assert json.loads((folder / "lip" / "seed1.json").read_text())["status"] == "failed"
    assert not cells.run_cells(study, [], jobs=1)
    (folder / "lip" / "broken").unlink()
    # An evaluation that was killed between its predictions and its row.
    (folder / "plain" / "seed2" / "eval.json").unlink()
    assert not cells.run_cells(study, study.cells(), jobs=1)
    assert all(cell.finished for cell in study.cells())
    starts = {str(cell): len((cell.folder / "starts").read_text()) for cell in study.cells()}
    # The failed cell is tried again; train.py itself says that plain/seed2 is trained already.
    assert starts.pop("lip/seed1") >= 2
    assert starts.pop("plain/seed2") == 2
    assert set(starts.values()) == {1}
    assert cells.read_record(study.cells()[0])["seconds"] > 0


def test_cells_that_run_together_have_gpus_of_their_own(tmp_path, stand_ins, monkeypatch):
    """By the environment of the started processes; the first waits for the second, the third takes what is free."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5")
    (stand_ins / "train.py").write_text(
        "import os, pathlib, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r}) / 'gpus'\n"
        "(folder / str(os.getpid())).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while len(list(folder.iterdir())) < 2: time.sleep(0.01)\n"
    )
    (stand_ins / "eval.py").write_text("")
    (tmp_path / "gpus").mkdir()
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    cells.run_cells(study, study.cells()[:3], jobs=2)
    used = [path.read_text() for path in (tmp_path / "gpus").iterdir()]
    assert len(used) == 3
    assert set(used) == {"4", "5"}


def test_gpus_of_jobs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-2,3,4")
    assert cells.assign_gpus(3, 2) == ["0,1", "GPU-2,3", "0,1"]  # shared, for there are too few
    assert cells.assign_gpus(1, 2) == cells.assign_gpus(1, 1) == [None]
    assert cells.assign_gpus(2, 4) == [None, None]  # one group
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cells.assign_gpus(2, 1) == [None, None]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(cells.torch.cuda, "device_count", lambda: 3)
    assert cells.assign_gpus(4, 1) == ["0", "1", "2", "0"]


def test_the_message_of_a_failure_is_of_the_last_start(tmp_path, stand_ins):
    (stand_ins / "train.py").write_text("import sys; sys.exit('RuntimeError: a bug')")
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    cell = study.cells()[0]
    cell.log.write_text("train.py: error: of an earlier start\n")
    assert cells.run_cells(study, [cell], jobs=1) == {"plain/seed0": "RuntimeError: a bug"}


def test_a_signal_stops_the_cells(tmp_path, stand_ins):
    (stand_ins / "train.py").write_text("import time; time.sleep(60)")
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        cells.run_cells(study, study.cells(), jobs=2)
    assert time.monotonic() - started < 30
    assert json.loads((tmp_path / "out" / "plain" / "seed0.json").read_text())["status"] == "stopped"


def test_another_study_is_not_continued(tmp_path):
    folder = tmp_path / "out"
    design.write_design(design.load_design(write(tmp_path), output=folder))
    design.write_design(design.load_design(write(tmp_path, seeds=[0, 1, 2, 3, 4, 5]), output=folder))  # more seeds
    before = (folder / "study.yaml").read_bytes()
    with pytest.raises(InputError, match="its primary is lip, here average"):
        design.write_design(design.load_design(write(tmp_path, primary="average"), output=folder))
    with pytest.raises(InputError, match=r"optim\.lr=0\.05 there, 0\.2 here"):
        design.write_design(design.load_design(write(tmp_path), ["optim.lr=0.2"], folder))
    assert (folder / "study.yaml").read_bytes() == before
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.txt").touch()
    with pytest.raises(InputError, match="exists and is not a study"):
        design.write_design(design.load_design(write(tmp_path), output=tmp_path / "files"))


def test_a_study_that_is_killed_while_it_begins_goes_on(tmp_path, monkeypatch):
    study, write_text = design.load_design(write(tmp_path), output=tmp_path / "out"), design.write_text

    def write_one(path, text):
        monkeypatch.setattr(design, "write_text", stop)
        write_text(path, text)

    def stop(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(design, "write_text", write_one)
    with pytest.raises(KeyboardInterrupt):
        design.write_design(study)
    monkeypatch.setattr(design, "write_text", write_text)
    design.write_design(study)
    assert all((study.folder / name / "recipe.yaml").is_file() for name in study.recipes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    study = design.load_design(write(folder), output=folder / "out")
    design.write_design(study)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_stand_ins(folder, monkeypatch)
        assert not cells.run_cells(study, study.cells(), jobs=2)
    return study.folder


@pytest.fixture
def finished(tmp_path, trained):
    """A finished study, the test's own copy."""
    shutil.copytree(trained, tmp_path / "out")
    return design.load_record(tmp_path / "out")


def test_report(finished):
    pytest.importorskip("matplotlib")
    write_costs(finished.folder, {"plain": 1.0, "lip": 1.25})  # before the variant average was added
    metrics = finished.cells()[0].folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val/top1": 0.0', '"val/top1": null'))  # logits were not finite
    printed = report.write_report(design.load_record(finished.folder))
    assert "lip is better than plain" in printed[0]
    assert "Exploratory" in printed[1]  # three seeds
    folder = finished.folder
    rows = {row["variant"]: row for row in csv.DictReader((folder / "report.csv").open())}
    top1 = {name: [json.loads(cell.row.read_text())["top1"] for cell in finished.cells() if cell.variant == name]
            for name in finished.recipes}  # fmt: skip
    assert float(rows["lip"]["difference"]) == pytest.approx(np.mean(top1["lip"]) - np.mean(top1["plain"]))
    assert rows["average"]["verdict"] == "not distinguishable"
    page = (folder / "report.html").read_text()
    costs = (folder / "report.md").read_text().split("## Cost")[1].split("##")[0]
    cells = [line.split("|") for line in costs.splitlines() if "|" in line]
    # 640 images at 2 ms, in minutes.
    shown = [[row[column].strip() for column in (4, 6)] for row in cells][2:]
    assert shown == [["2.00 (1.00)", "0.0 (1.00)"], ["2.50 (1.25)", "0.0 (1.25)"], ["-", "-"]]
    assert page.count("<svg") == 7
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace('xlink:href="#', '"#'))
    first = page.encode(), (folder / "report.md").read_bytes()
    report.write_report(finished)
    assert ((folder / "report.html").read_bytes(), (folder / "report.md").read_bytes()) == first


def write_costs(folder, ratios):
    times = {name: {"ms": 2 * ratio, "ratio": ratio} for name, ratio in ratios.items()}
    (folder / "costs.json").write_text(json.dumps({"training": times, "inference": times}))


def write_probe(cell, value, **changes):
    row = {
        "probe": "shift",
        "consistency": value,
        "seed": cell.seed,
        "step": 10,
        "protocol": {"eval_size": 32, "training": None},
    }
    (cell.folder / "probe-shift.json").write_text(json.dumps(row | changes))


def test_probes_are_shown_with_paired_differences(finished):
    pytest.importorskip("matplotlib")
    values = {"plain": [80.0, 82.0, 84.0], "lip": [81.0, 84.0, 87.0], "average": [70.0]}
    for cell in finished.cells():
        if cell.seed < len(values[cell.variant]):
            write_probe(cell, values[cell.variant][cell.seed])
    loaded = results.load_results(finished)
    section = probes.robustness_section(finished, loaded)
    low, high = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95)
    assert section.table[1] == [
        ["shift consistency", "plain", "3", "82.00 ± 2.00", "-", "-"],
        ["shift consistency", "lip", "3", "84.00 ± 3.00", "+2.00", f"{low:+.2f} to {high:+.2f}"],
        ["shift consistency", "average", "1", "70.00", "-10.00", "-"],
    ]
    titles = [each.title for each in report.build_sections(finished, loaded, results.compare(finished, loaded))]
    assert "Robustness" in titles
    for changes, line in (
        ({"seed": 9}, "of seed 9, the cell's row of 0; remove the file and probe again"),
        ({"step": 9}, "of step 9, the cell's row of 10"),
        ({"protocol": {"eval_size": 64}}, "cannot be compared: eval_size: 64 against 32; probe all cells alike"),
        ({"dataset": {"names": "x"}}, "cannot be compared: other images"),
    ):
        write_probe(finished.cells()[1], 81.0, **changes)
        with pytest.raises(InputError, match=line):
            probes.load_probes(results.load_results(finished))


def read_report(folder):
    report.write_report(design.load_record(folder))
    return [(folder / f"report.{kind}").read_bytes() for kind in ("md", "html", "csv")]


def test_an_exported_study_reports_the_same(finished, stand_ins, tmp_path):
    """From a half-finished study, with a failed cell, probes and costs."""
    pytest.importorskip("matplotlib")
    failed = finished.cells()[-1]
    failed.row.unlink()
    failed.record.write_text(json.dumps({"status": "failed", "seconds": 1.0, "message": f"{tmp_path}/x.png: no image"}))
    metrics = finished.cells()[0].folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val/top1": 0.0', '"val/top1": null'))
    write_costs(finished.folder, {"plain": 1.0, "lip": 1.25, "average": 1.5})
    write_probe(finished.cells()[0], 80.0)
    target = tmp_path / "results" / finished.folder.name
    assert export.export(finished, target) == f"{target}: 8 of 9 cells, {size_of(target) / 1000:.0f} kB"
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert set(before) == {"study.yaml", "cells.jsonl", "predictions.csv.gz", "costs.json"}
    text = b"".join(before.values()) + gzip.decompress(before["predictions.csv.gz"])
    assert str(tmp_path.parent).encode() not in text
    assert b"command" not in text
    # The same figures, but for the folder in the message of the failed cell.
    expected = [text.replace(f"{tmp_path}/".encode(), b"") for text in read_report(finished.folder)]
    assert read_report(target) == expected
    table = list(csv.reader(gzip.decompress(before["predictions.csv.gz"]).decode().splitlines()))
    for cell in finished.cells()[:-1]:
        lines = list(csv.reader(cell.predictions.open()))
        column = table[0].index(str(cell))
        assert [[*line[:2], line[column]] for line in table[1:]] == [line[:3] for line in lines[1:]]
    # Again, and once more from there, with the last cell finished; a measurement that the study has not stays.
    export.export(design.load_record(target), tmp_path / "copy")
    assert not cells.run_cells(finished, [failed], jobs=1)
    (finished.folder / "costs.json").unlink()
    assert "9 of 9 cells" in export.export(finished, target)
    assert (target / "costs.json").read_bytes() == before["costs.json"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == before


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_an_export_overwrites_nothing_else(finished, tmp_path):
    target = tmp_path / "results"
    export.export(finished, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    other = design.load_design(write(tmp_path, primary="average"), output=tmp_path / "other")
    design.write_design(other)
    with pytest.raises(InputError, match="no cell is finished"):
        export.export(other, target)
    for name in finished.recipes:
        (other.folder / name).rmdir() if not any((other.folder / name).iterdir()) else shutil.rmtree(
            other.folder / name
        )
        shutil.copytree(finished.folder / name, other.folder / name)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.txt").touch()
    for study, folder, line in (
        (other, target, "holds another study: its primary is lip, here average; choose another folder"),
        (finished, finished.folder, "is the study's own folder"),
        (finished, tmp_path / "files", r"is not an exported study: it holds thesis\.txt"),
        (finished, other.folder, "is not an exported study: it holds average"),
        (finished, tmp_path / "study.yaml", "is a file"),
    ):
        with pytest.raises(InputError, match=line):
            export.export(study, folder)
    finished.cells()[0].row.unlink()
    with pytest.raises(InputError, match=r"has plain/seed0, which .* lacks"):
        export.export(finished, target)
    with pytest.raises(InputError, match="is an exported study, which has no run folders"):
        design.write_design(design.load_design(write(tmp_path), output=target))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_damaged_export_is_one_line(finished, tmp_path):
    export.export(finished, tmp_path / "results")
    for name, change, line in (
        ("cells.jsonl", lambda data: data[:-9], "not the cells of an exported study"),
        ("cells.jsonl", lambda data: data.replace(b'"lip"', b'"lap"'), "lap/seed0 is no cell of study.yaml"),
        ("cells.jsonl", lambda data: data.replace(b'"done"', b'"won"'), "status 'won'"),
        ("cells.jsonl", lambda data: data.replace(b'"curve"', b'"curf"'), "plain/seed0: not a cell .*'curve'"),
        ("cells.jsonl", lambda data: data.replace(b'"top5"', b'"top6"'), "plain/seed0: not a row .*top5"),
        ("predictions.csv.gz", lambda data: data[:-9], "not the predictions of an exported study"),
        ("predictions.csv.gz", lambda data: b"image,label", "cannot read: Not a gzipped file"),
        ("predictions.csv.gz", lambda data: gzip.compress(b"image,label\na,0\n"), "lacks plain/seed0"),
    ):
        path = tmp_path / "results" / name
        before = path.read_bytes()
        path.write_bytes(change(before))
        with pytest.raises(InputError, match=line) as refused:
            results.load_results(design.load_record(tmp_path / "results"))
        assert "\n" not in str(refused.value)
        path.write_bytes(before)


def test_damaged_costs_are_one_line(finished):
    for text, line in (
        ("{", "costs.json: not a measurement of study.py measure"),
        ("[]", "not a measurement"),
        ('{"training": {}}', "no training time of the baseline plain"),
        ('{"training": {"plain": {"ms": 1.0, "ratio": 1}}}', "lacks 'inference'"),
        ('{"training": {"plain": {"ms": NaN, "ratio": 1}}}', "training plain: ms is nan"),
        ('{"training": {"plain": {"ms": 1.0}}}', "lacks 'ratio'.*measure again, or remove it"),
    ):
        (finished.folder / "costs.json").write_text(text)
        with pytest.raises(InputError, match=line) as refused:
            costs.cost_table(finished, {})
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=line):
        report.write_report(finished)
    assert not (finished.folder / "report.md").exists()


def test_one_seed_has_no_figure_of_differences(tmp_path, stand_ins):
    pytest.importorskip("matplotlib")
    study = design.load_design(write(tmp_path, seeds=[0]), output=tmp_path / "out")
    design.write_design(study)
    assert not cells.run_cells(study, study.cells(), jobs=2)
    printed = report.write_report(study)
    assert "too few seeds to say" in printed[0]
    line = "No figure of differences: intervals need two finished seeds of plain and a variant, there is one."
    assert line in printed
    assert line in (study.folder / "report.md").read_text()
    assert not (study.folder / "figures" / "differences.svg").exists()


def test_variants_at_equal_cost(finished):
    loaded = results.load_results(finished)
    write_costs(finished.folder, {"plain": 1.0, "lip": 1.4, "average": 1.45})
    for result in loaded["lip"].values():
        result.row["macs"] = 2 * 10**9  # no other is within 25%
    top1 = {name: np.array([of_seeds[seed].row["top1"] for seed in range(3)]) for name, of_seeds in loaded.items()}
    gain = top1["lip"] - top1["average"]
    low, high = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    section = costs.equal_costs(finished, loaded)
    at_time = ["average", "1.04", "3", f"{gain.mean():+.2f}", f"{low:+.2f} to {high:+.2f}"]
    assert section.table[1] == [["inference", *at_time], ["training", *at_time]]
    fronts = {row[0]: row[-1] for row in costs.cost_table(finished, loaded)[1]}
    assert fronts["lip"] == "multiply-adds, inference, training"
    assert "inference" not in fronts["average"]  # lip is quicker and better


def test_gains_by_class_are_counted(finished):
    pytest.importorskip("matplotlib")
    loaded = results.load_results(finished)
    section = details.classes_section(finished, loaded, results.compare(finished, loaded)[0])
    for row in section.table[1]:
        correct = {"plain": 0, "lip": 0}
        for cell in finished.cells():
            if cell.variant in correct:
                lines = [line for line in csv.DictReader(cell.predictions.open()) if line["image"].startswith(row[0])]
                correct[cell.variant] += sum(line["label"] == line["top1"] for line in lines)
        gain = (correct["lip"] - correct["plain"]) / 3
        assert row[1:] == ["100", str(correct["plain"]), str(correct["lip"]), f"{gain:+.1f}"]
    assert {row[0] for row in section.table[1]} == {"c0", "c1", "c2", "c3"}


def test_the_minutes_of_a_curve(tmp_path):
    """Steps of 64 images at 32 and 16 images/s: 2 and 4 seconds."""
    log = [{"step": 5, "epoch": 0, "train/images_per_second": 32.0}, {"step": 5, "epoch": 0, "val/top1": 1.0}]
    log += [{"step": 20, "epoch": 1, "train/images_per_second": 16.0}, {"step": 20, "epoch": 1, "val/top1": None}]
    (tmp_path / "m").write_text("".join(json.dumps(line) + "\n" for line in log))
    curve, speed = results._read_log(tmp_path / "m", 64)
    assert curve[0] == (0, 1.0, round(10 / 60, 3))
    assert curve[1].minutes == pytest.approx(70 / 60, abs=1e-3)
    assert np.isnan(curve[1].top1)
    assert speed == 24.0
    (tmp_path / "m").write_text("{")
    with pytest.raises(InputError, match="not the log of a training"):
        results._read_log(tmp_path / "m", 64)


def test_disagreeing_tests_are_named():
    """Three seeds far from zero: the t test rejects, the sign-flip test cannot; of a family by adjusted p."""
    paired = statistics.compare_paired([3.0, 3.1, 3.2])
    for name, p, p_sign_flip, named in (("a", 0.001, 0.25, True), ("b", 0.2, 0.25, False), ("c", 0.01, 0.03, False)):
        each = results.Comparison(name, [0, 1, 2], paired, p, p_sign_flip, None, [], "better")
        assert any(f"for {name} (" in note for note in report._accuracy_notes([each])) == named


def test_family_is_adjusted_and_the_declared_comparison_is_not(finished):
    compared = results.compare(finished, results.load_results(finished))
    assert [each.variant for each in compared] == ["lip", "average"]
    assert compared[0].p_sign_flip == compared[0].paired.p_sign_flip == 0.25
    assert compared[0].p == compared[0].paired.p_t
    only, theirs, _ = compared[0].mcnemar[0]
    assert only - theirs == pytest.approx(4 * compared[0].paired.differences[0])


def test_results_that_do_not_belong_together_are_refused(finished):
    one, other = finished.cells()[:2]
    good_row, good = one.row.read_text(), one.predictions.read_text()
    lines = good.splitlines()
    swapped = "\n".join([lines[0], *lines[:0:-1]]) + "\n"
    renamed = good.replace("c0/0.png", "c0/zero.png")
    bad_row = json.dumps(json.loads(good_row) | {"seed": 7})
    mixed = json.loads(other.row.read_text())
    mixed["protocol"]["eval_size"] = 64
    for cell, predictions, row, line in (
        (one, swapped, good_row, "the same images in another order"),
        (one, renamed, good_row, "other images"),
        (one, good.replace("0.png,0,0", "0.png,0,3"), good_row, "not the predictions of"),
        (one, "image,label\n", good_row, "not predictions of eval.py"),
        (one, good, bad_row, "a row of seed 7"),
        (other, other.predictions.read_text(), json.dumps(mixed), "different protocols: eval_size"),
    ):
        before = cell.predictions.read_text(), cell.row.read_text()
        cell.predictions.write_text(predictions)
        cell.row.write_text(row)
        with pytest.raises(InputError, match=line):
            results.load_results(finished)
        cell.predictions.write_text(before[0])
        cell.row.write_text(before[1])


def test_a_study_file_in_its_own_output_is_not_overwritten(tmp_path):
    path = write(tmp_path)
    before = path.read_text()
    study = design.load_design(path, output=tmp_path)
    with pytest.raises(InputError, match="is not the record of a study that was run"):
        design.write_design(study)
    assert path.read_text() == before


def test_a_base_without_its_sections(tmp_path):
    (tmp_path / "base.yaml").write_text("model:\n")
    with pytest.raises(InputError, match="data: missing; this key is required"):
        design.load_design(write(tmp_path, base=str(tmp_path / "base.yaml"), recipe={"model": {"num_classes": 10}}))


def test_nothing_finished(tmp_path):
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    with pytest.raises(InputError, match="holds no study"):
        design.load_record(tmp_path / "out")
    design.write_design(study)
    with pytest.raises(InputError, match="no cell is finished"):
        report.write_report(design.load_record(tmp_path / "out"))


@pytest.mark.parametrize("text", ["4", "a/b", "4/4", "1/0", "-1/4"])
def test_shards(text):
    with pytest.raises(InputError, match="--shard"):
        cells.parse_shard(text)
    assert cells.parse_shard("1/4") == (1, 4)


@pytest.mark.slow
def test_a_killed_study_takes_its_cells_along(tmp_path):
    """SIGKILL of the study ends train.py within seconds; the same command then finishes the study."""
    folder = tmp_path / "out"
    path = write(tmp_path, seeds=[0, 1], variants={name: STUDY["variants"][name] for name in ("plain", "lip")})
    command = [sys.executable, "scripts/study.py", "run", str(path), "--output", str(folder), "train.max_steps=6"]
    command += ["train.log_every=1", "train.checkpoint_steps=1"]
    study = subprocess.Popen(command)
    while not (folder / "plain" / "seed0" / "metrics.jsonl").exists():
        time.sleep(0.1)
    study.kill()
    study.wait()
    deadline = time.monotonic() + 10
    while _alive(str(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive(str(folder))
    assert subprocess.run(command, check=False).returncode == 0
    assert all((folder / name / f"seed{k}" / "predictions.csv").is_file() for name in ("plain", "lip") for k in (0, 1))


def _alive(text: str) -> bool:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return any(text in line and "train.py" in line for line in listed.splitlines())


def test_shipped_studies_are_valid():
    paths = sorted((cells.ROOT / "configs" / "studies").glob("*.yaml"))
    assert len(paths) >= 8
    for path in paths:
        study = design.load_design(path)
        assert len(study.study.seeds) >= design.CONFIRMATORY_SEEDS
