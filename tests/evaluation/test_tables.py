"""Tables of rows: their columns, labels and formats, and the paper's figures beside them."""

import copy
import csv
import io
import json
import math
import re

import pytest
from helpers.rows import PAPER, on, row, table

from lip_resnet.config import InputError
from lip_resnet.evaluation import paper_detection, tables
from lip_resnet.evaluation.paper import load_paper
from lip_resnet.evaluation.render import render
from lip_resnet.evaluation.rows import read_rows
from lip_resnet.evaluation.tables import build_table, build_wide


def test_paper_figures_are_shown_beside_imagenet():
    ours = row("lip_resnet50", 78.2)
    ours["images"], ours["protocol"]["classes"] = 50000, 1000
    lines, _ = table([ours])
    assert lines["lip_resnet50"]["paper top-1"] == "78.19"


def test_paper_figures_belong_to_a_network_with_its_keywords():
    rows = [row("lip_resnet50", top1) for top1 in (78.2, 77.0, 78.0)]
    for measured, width in zip(rows, (128, 64, 256), strict=True):
        measured["images"], measured["protocol"]["classes"], measured["args"] = 50000, 1000, {"bottleneck_width": width}
    paper = PAPER | {"lip_resnet50 (bottleneck_width=256)": {"top1": 78.15}}
    header, lines, _ = tables.build_table(rows, paper)
    assert [line[header.index("paper top-1")] for line in lines] == ["78.19", "-", "78.15"]


def test_best_and_ema_are_labelled():
    best, ema = row("resnet50", 97.0), row("resnet50", 97.5)
    best["selected_on_val"], ema["weights"] = True, "ema"
    lines, _ = table([best, ema])
    assert set(lines) == {"resnet50, best epoch (selected on val)", "resnet50, EMA"}


def test_formats():
    rows = [row("lip_resnet50", 98.0), row("resnet50", 97.0)]
    header, lines, notes = tables.build_table(rows, PAPER)
    text = render(header, lines, notes, "csv").splitlines()
    assert text[1:] == [
        "lip_resnet50,23.86,5.300,98.00,,99.00,,+1.00,1,355",
        "resnet50,23.86,5.300,97.00,,99.00,,,1,355",
    ]
    latex = render(header, lines, notes, "latex")
    assert r"lip\_resnet50 & 23.86 & 5.300 & 98.00 & 99.00 & +1.00 & 1 & 355 \\" in latex
    markdown = render(header, lines, notes, "md").splitlines()
    assert len({len(line) for line in markdown}) == 1
    assert markdown[0].split("|")[1].strip() == "model"


def test_the_rule_of_a_narrow_column_has_a_dash():
    """GitHub takes a line of `:` alone for text, and shows no table."""
    rule = render(["a", "p"], [["b", "-"]]).splitlines()[1]
    assert all(re.fullmatch(r"-+:?", cell.strip()) for cell in rule.strip("|").split("|"))


def test_numbers_are_columns_of_csv():
    """Mean, standard deviation, delta and seeds as numbers, in both tables."""
    rows = [row("lip_resnet50", 98.0, 0), row("lip_resnet50", 99.0, 1), row("resnet50", 97.0)]
    one, other = (
        list(csv.DictReader(io.StringIO(render(*build(), style="csv"))))
        for build in (lambda: tables.build_table(rows, PAPER), lambda: tables.build_wide(rows))
    )
    assert [one[0][key] for key in ("top-1 (%)", "top-1 std", "delta top-1", "seeds")] == [
        "98.50",
        "0.71",
        "+1.50",
        "2",
    ]
    keys = ("digits top-1 (%)", "digits top-1 std", "digits top-1 delta", "digits top-1 seeds")
    assert [other[0][key] for key in keys] == ["98.50", "0.71", "+1.50", "2"]
    assert [other[1][key] for key in keys] == ["97.00", "", "", "1"]
    for line in (*one, *other):
        assert all(not value or math.isfinite(float(value)) for key, value in line.items() if key != "model")


def test_circular_padding_is_part_of_the_network():
    """Not a mean over seeds with the plain network's rows, nor the published network, nor its baseline."""
    circular = [{**row("lip_resnet50", top1, seed), "circular_padding": True} for top1, seed in ((99.0, 0), (98.0, 1))]
    lines, _ = table([*circular, row("lip_resnet50", 97.0, 2), {**row("resnet50", 95.0), "circular_padding": False}])
    assert [line["top-1 (%)"] for line in lines.values()] == ["98.50 ± 0.71", "97.00", "95.00"]
    assert list(lines) == ["lip_resnet50 (circular_padding=True)", "lip_resnet50", "resnet50"]
    lines, _ = table([{**row("resnet50", 96.0), "circular_padding": True}, row("resnet50", 95.0)])
    assert [line["delta top-1"] for line in lines.values()] == ["+1.00", "-"]


def test_layers_are_named_in_one_form():
    choice = {"kernel_size": 2, "placement": "after_activation", "layer": "max"}
    rows = [{**row("resnet50", 90.0), "downsampling": downsampling} for downsampling in ({"main": choice}, "zhang2019")]
    assert list(table(rows)[0]) == [
        "resnet50 (main=max after_activation kernel_size 2)",
        "resnet50 (downsampling=zhang2019)",
    ]


def test_letters_that_a_format_reads_as_its_own():
    header, rows = ["model"], [[r"a|b {c: $1}~^\d"]]
    assert render(header, rows) == "| model            |\n| ---------------- |\n" + r"| a\|b {c: $1}~^\d |" + "\n"
    latex = r"a|b \{c: \$1\}\textasciitilde{}\textasciicircum{}\textbackslash{}d \\"
    assert latex in render(header, rows, style="latex").splitlines()
    assert list(csv.reader(io.StringIO(render(header, rows, style="csv")))) == [header, *rows]


def test_rows_of_other_training_have_labels_of_their_own():
    rows = [
        row("resnet50", 97.0),
        row("resnet50", 98.0, train__epochs=3),
        row("resnet50", 99.0, train__epochs=3, optim__lr=1.0),
    ]
    values = ((0.05, 2), (0.05, 3), (1.0, 3))
    labels = [f"resnet50 [optim.lr={lr}, train.epochs={epochs}]" for lr, epochs in values]
    for build in (lambda rows: tables.build_table(rows, PAPER), tables.build_wide):
        assert sorted(line[0] for line in build(rows)[1]) == sorted(labels)
    lines, _ = table(rows, labels[0])
    assert set(lines) == set(labels)
    bare = [row("resnet50", 97.0, None), {**row("resnet50", 98.0, None), "checkpoint": "other.pth"}]
    assert set(table(bare)[0]) == {"resnet50 [resnet50-None]", "resnet50 [other.pth]"}


def test_bad_rows(tmp_path):
    good = row("resnet50", 97.0)
    with pytest.raises(InputError, match="same seed"):
        tables.build_table([good, copy.deepcopy(good)], PAPER)
    bare = row("resnet50", 97.0, None)
    with pytest.raises(InputError, match="two rows of resnet50-None"):
        tables.build_table([bare, copy.deepcopy(bare)], PAPER)
    for name, text, words in (
        ("a.json", "no json", "not JSON"),
        ("b.json", "[1]", "not a row"),
        ("c.json", json.dumps({"model": "x"}), "missing keys: top1"),
        ("d.json", json.dumps({**good, "protocol": None}), "not a row of eval.py; protocol is None"),
        ("e.json", json.dumps({**good, "model": 3}), "model: name: given 3"),
        ("f.json", json.dumps({**good, "downsampling": {"main": 3}}), "downsampling: given {'main': 3}; it must be"),
        *(
            (f"{key}-{value}.json", json.dumps({**good, key: value}), f"{key} is {value!r}, not a finite number")
            for key, value in (("top1", math.nan), ("loss", math.inf), ("loss", None), ("top5", "x"), ("mce", math.nan))
        ),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words) as refused:
            read_rows([str(tmp_path / name)])
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(InputError, match="No such file"):
        read_rows([str(tmp_path / "none.json")])
    with pytest.raises(InputError, match=r"holds no eval\.json"):
        read_rows([str(tmp_path)])


def test_rows_of_other_images_are_not_seeds_of_each_other():
    lines, _ = table([row("resnet50", 98.0, 0), {**row("resnet50", 97.0, 1), "images": 100}])
    assert {name: line["seeds"] for name, line in lines.items()} == {
        "resnet50 [images=355]": "1",
        "resnet50 [images=100]": "1",
    }


ROWS = [
    *(row("lip_resnet50", 98.0), row("resnet50", 97.0)),
    *(on("imagenet-v2", "lip_resnet50", 66.0), on("imagenet-v2", "resnet50", 63.0)),
    on("imagenet-a", "lip_resnet50", 9.0),
    *(on("imagenet-c", "lip_resnet50", 40.0, mce=75.0), on("imagenet-c", "resnet50", 39.0, mce=76.7)),
]
NO_ROW = "no delta for lip_resnet50 on imagenet-a: no row of resnet50; --baseline LABEL compares with another row"


def test_test_sets_are_compared_separately():
    """A delta is to the baseline on the same set; where the baseline is missing there is none."""
    header, lines, notes = tables.build_table(ROWS, PAPER)
    cells = {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}
    deltas = {"digits": "+1.00", "imagenet-v2": "+3.00", "imagenet-c": "+1.00"}
    assert {name: cells["lip_resnet50", name]["delta top-1"] for name in deltas} == deltas
    assert cells["lip_resnet50", "imagenet-a"]["delta top-1"] == "-"
    assert cells["lip_resnet50", "imagenet-c"]["mCE (%)"] == "75.00"
    assert cells["lip_resnet50", "digits"]["mCE (%)"] == "-"
    assert notes == [NO_ROW]


def test_one_column_per_test_set():
    header, lines, notes = tables.build_wide(ROWS)
    assert header == [
        *("model", "params (M)", "imagenet-v2 top-1 (%)", "imagenet-a top-1 (%)", "imagenet-c mCE (%)"),
        *("digits top-1 (%)", "seeds"),
    ]
    assert lines == [
        ["lip_resnet50", "23.86", "66.00 (+3.00)", "9.00", "75.00 (-1.70)", "98.00 (+1.00)", "1"],
        ["resnet50", "23.86", "63.00", "-", "76.70", "97.00", "1"],
    ]
    assert notes == [NO_ROW]
    part = on("imagenet-a", "resnet50", 1.0, dataset={"name": "imagenet-a", "whole": False, "names": "imagenet-a"})
    _, _, notes = tables.build_wide([*ROWS, part])
    assert notes == ["imagenet-a: 355 images, which is not all of it"]
    twice = on("imagenet-a", "lip_resnet50", 9.5)
    twice["protocol"]["eval_size"] = 288
    with pytest.raises(InputError, match=r"lip_resnet50 has two figures on imagenet-a.*eval_size: 288 against 32"):
        tables.build_wide([*ROWS, twice])


def test_the_papers_figures_are_not_those_of_sketch():
    ours = on("imagenet-sketch", "lip_resnet50", 25.0, images=50000)
    ours["protocol"]["classes"] = 1000
    header, _, _ = tables.build_table([ours], PAPER)
    assert "paper top-1" not in header


def test_a_run_folder_holds_a_row_for_each_set(tmp_path):
    for name, content in (("eval", ROWS[0]), ("eval-imagenet-v2", ROWS[2])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert read_rows([str(tmp_path)]) == [ROWS[0], ROWS[2]]


def detector_row(model: str, seed: int, ap: float, **changes) -> dict:
    training = {"train.epochs": 24, "model.weights": None}
    row = {"model": model, "detector": "faster_rcnn", "AP": ap, "AP50": ap + 20, "AP75": ap, "APs": None, "APm": ap}
    row |= {"APl": ap, "images": 5000, "params": 4e7, "macs": 2e11, "seed": seed, "weights": "model", **changes}
    coco = {"task": "detection", "data": "coco", "split": "val2017", "classes": 80, "training": training}
    return {**row, "protocol": {**coco, **changes.get("protocol", {})}, "dataset": {"name": "val2017", "names": "a"}}


def test_rows_of_detectors():
    rows = [detector_row("lip_resnet101", seed, 41.0 + seed) for seed in (0, 1)]
    rows += [detector_row("resnet101", seed, 39.0) for seed in (0, 1)]
    header, lines, notes = build_table(rows, load_paper().accuracies())
    first, second = (dict(zip(header, line, strict=True)) for line in lines)
    assert not notes
    assert first["model"] == "lip_resnet101, faster_rcnn"
    assert (first["AP (%)"], first["AP50 (%)"], first["APs (%)"]) == ("41.50 ± 0.71", "61.50 ± 0.71", "-")
    assert (first["delta AP"], second["delta AP"]) == ("+2.50", "-")
    assert (first["paper AP"], first["paper APs"], second["paper AP"]) == ("41.70", "25.20", "39.40")
    header, lines, _ = build_wide(rows)
    assert header[2] == "val2017 AP (%)"
    assert lines[0][2] == "41.50 ± 0.71 (+2.50)"
    shorter = {"training": {"train.epochs": 12, "model.weights": None}}
    other = [rows[0], detector_row("resnet101", 0, 39.0, protocol=shorter)]
    header, lines, notes = build_table(other, load_paper().accuracies())
    assert "train.epochs: 24 against 12" in notes[0]
    assert dict(zip(header, lines[1], strict=True))["paper AP"] == "38.60"
    with pytest.raises(InputError, match="a classifier and a detector; make a table of each"):
        build_table([rows[0], ROWS[0]], {})


def test_detectors_beside_the_paper():
    detectors = load_paper().detection
    row = detector_row("resnet101", 0, 39.6)
    published = paper_detection.find(detectors, row)
    assert published.name == "resnet101_fpn_2x"
    assert paper_detection.compare(published, row, "row.json", None)["ok"] is True
    assert paper_detection.compare(published, {**row, "AP": 38.8}, "row.json", None)["ok"] is False
    few = paper_detection.compare(published, {**row, "images": 80}, "row.json", None)
    assert (few["ok"], few["why_not"]) == (None, "images: 80 against 5000")
    inferred = paper_detection.find(detectors, detector_row("lip_resnet50", 0, 39.0))
    assert "is inferred: not printed" in paper_detection.compare(inferred, row, "row.json", None)["why_not"]
    assert paper_detection.find(detectors, detector_row("resnet34", 0, 30.0)) is None
