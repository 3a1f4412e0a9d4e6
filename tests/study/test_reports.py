"""Reports of studies that stand-ins have run: figures, tables, and results that do not belong together."""

import csv
import json
import re

import numpy as np
import probe
import pytest
from helpers.commands import call, refuse
from helpers.studies import write, write_costs, write_probe
from scipy import stats

from lip_resnet.config import InputError
from lip_resnet.study import (
    cells,
    costs,
    design,
    details,
    export,
    figures,
    probes,
    report,
    results,
    statistics,
    summary,
)


def test_report(finished):
    pytest.importorskip("matplotlib")
    write_costs(finished.folder, {"plain": 1.0, "lip": 1.25})  # before the variant average was added
    metrics = finished.cells()[0].folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val/top1": 0.0', '"val/top1": null'))  # logits were not finite
    printed = report.write_report(design.load_record(finished.folder))
    assert "lip is better than plain" in printed[0]
    assert "fewer than 5 seeds. A difference" in printed[1]  # three seeds
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


def test_nothing_finished(tmp_path):
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    with pytest.raises(InputError, match="holds no study"):
        design.load_record(tmp_path / "out")
    design.write_design(study)
    line = "no cell is finished yet; go on with: python scripts/study.py run STUDY.yaml"
    with pytest.raises(InputError, match=f"{line}$"):
        report.write_report(design.load_record(tmp_path / "out"))
    study.cells()[1].record.write_text(json.dumps({"status": "failed", "seconds": 2.0, "message": "loss is nan"}))
    with pytest.raises(InputError, match=f"{line}; failed: lip/seed0: loss is nan$"):
        report.write_report(design.load_record(tmp_path / "out"))


def test_a_report_without_the_baseline_or_without_the_primary(finished):
    """Whatever is not finished: no verdict, and what there is is shown."""
    pytest.importorskip("matplotlib")
    line = "**No verdict yet**: no seed of both lip and plain is finished."
    loaded = results.load_results(finished)
    assert line in report.verdict_lines(finished, loaded | {"lip": {}}, [])
    for cell in finished.cells():
        if cell.variant == "plain":
            cell.row.unlink()
    assert line in report.write_report(design.load_record(finished.folder))
    page = (finished.folder / "report.md").read_text()
    assert "| average " in page
    assert "\n| plain " not in page


def test_what_limits_a_verdict_names_its_variants(finished):
    lines = results.state_lines(finished, {"lip": 6, "average": 3}, 8, {"average/seed3": "loss is nan"})
    assert lines[0].startswith("**Exploratory**: fewer than 5 seeds of average. ")
    assert lines[1].startswith("**Not complete**: 8 of 9 cells are finished")
    assert lines[2] == "**Failed cells**, which no figure includes: average/seed3: loss is nan."
    assert results.state_lines(finished, {"lip": 6, "average": 6}, 9, {}) == []
    assert "fewer than 5 seeds. " in results.state_lines(finished, {}, 9, {})[0]


def test_equal_differences_have_a_figure_and_no_interval(finished):
    pytest.importorskip("matplotlib")
    loaded = results.load_results(finished)
    for seed in range(3):
        loaded["lip"][seed].row["top1"] = loaded["plain"][seed].row["top1"] + 5
    comparisons = results.compare(finished, loaded)
    sections = report.build_sections(finished, loaded, comparisons)
    assert "not distinguishable**: +5.00 points top-1 in each of 3 seeds, so no interval" in sections[0].text[0]
    assert next(each for each in sections if each.title == "Differences").figures
    assert report.to_csv(finished, loaded, comparisons).splitlines()[2].split(",")[5:7] == ["", ""]


def test_names_of_classes_are_no_formulas():
    pytest.importorskip("matplotlib")
    assert "a$\\frac$" in figures.classes(["a$\\frac$", "b"], [1.0, -1.0], "lip", "plain")


def test_the_page_of_results_has_the_probes(finished, tmp_path):
    pytest.importorskip("matplotlib")
    for cell in finished.cells():
        write_probe(cell, 80.0 + cell.seed)
    export.export(finished, tmp_path / "digits")
    page = summary.results_page([tmp_path / "digits"], [], "figures")
    assert "| shift consistency |   plain |     3 | 81.00 ± 1.00 |" in page


def test_probes_of_a_whole_study(finished, tmp_path, capsys, monkeypatch):
    """Every finished cell, by every probe of robustness, once."""
    measured = []

    def measure(name, path, output, options):
        measured.append((name, str(output)))
        output.write_text('{"consistency": 80.0, "protocol": {}}')

    monkeypatch.setattr(probe, "probe", measure)
    unfinished = finished.cells()[-1]
    unfinished.row.unlink()
    (finished.cells()[0].folder / "probe-shift.json").write_text('{"consistency": 80.0, "protocol": {}}')
    code, _, note = call(capsys, monkeypatch, probe, "robustness", finished.folder)
    assert (code, note) == (0, "note: 1 of 8 runs have a probe-shift.json already\n")
    names = ("shift", "sizes", "objects")
    every = [(name, str(cell.folder / f"probe-{name}.json")) for name in names for cell in finished.cells()[:-1]]
    assert measured == every[1:]
    call(capsys, monkeypatch, probe, "robustness", finished.folder)
    assert len(measured) == len(every) - 1
    call(capsys, monkeypatch, probe, "robustness", finished.cells()[0].folder)  # one run, of which all rows are there
    assert len(measured) == len(every) - 1
    assert "exists" in refuse(capsys, monkeypatch, probe, "shift", finished.cells()[0].folder)
    export.export(finished, tmp_path / "exported")
    for cell in finished.cells():
        cell.row.unlink(missing_ok=True)
    for arguments, line in (
        (("shift", tmp_path / "exported"), "is an exported study, which has no weights"),
        (("shift", finished.folder), "no cell is finished yet"),
        (("robustness", finished.folder, "--output", "x"), "is for one row; robustness writes several"),
        (("robustness", finished.folder, "--every", "3"), "--every belongs to the probe deletion"),
    ):
        assert line in refuse(capsys, monkeypatch, probe, *arguments)
