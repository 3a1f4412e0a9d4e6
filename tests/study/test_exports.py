"""Exports of studies: they report the same, overwrite nothing else, and say what is wrong with them."""

import csv
import gzip
import json
import shutil

import pytest
from helpers.studies import write, write_costs, write_probe

from lip_resnet.config import InputError
from lip_resnet.study import cells, design, export, report, results


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
    with pytest.raises(InputError, match=r"has plain/seed0, which .* does not have"):
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
