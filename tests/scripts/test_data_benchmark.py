"""benchmark.py data: a small run, its figures recomputed."""

import functools
import statistics

import benchmark
import numpy as np
import pytest
from bench import tables
from bench.data import make_photographs
from helpers.commands import call
from PIL import Image


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, benchmark, "data", *arguments)[0]


def test_figures_follow_from_the_rounds(run, image_folder, tmp_path):
    output = tmp_path / "rows.jsonl"
    small = ("--images", 16, "--batch", 8, "--rounds", 3, "--workers", 1, "--gpu", 1000)
    assert run("--data", image_folder / "train", *small, "--output", output) == 0
    environment, rows = tables.read(output)
    loaders = {row["loader"]: row for row in rows if "loader" in row}
    assert set(loaders) == {"ours, decode: fast", "ours, decode: exact", "timm, uint8", "torchvision, float32"}
    base = loaders["timm, uint8"]["all"]
    near = functools.partial(pytest.approx, rel=2e-3)  # of numbers of four digits
    for row in loaders.values():
        assert len(row["all"]) == 3
        assert row["images_per_second"][1] == near(statistics.median(row["all"]))
        ratios = [mine / theirs for mine, theirs in zip(row["all"], base, strict=True)]
        assert row["ratio"][1] == near(statistics.median(ratios))
        assert row["cores_for_gpu"] * statistics.median(row["all"]) == near(1000)
    workers, pixels = (row for row in rows if "comparison" in row)
    assert workers["comparison"] == "two workers against one, fast"
    assert 0 < pixels["mean"] <= pixels["worst_image"] < 1
    assert environment["command"][2:5] == ["data", "--data", "DIR"]
    table = tables.LOADERS.table(rows)
    assert "| timm, uint8 " in table
    assert "3 interleaved rounds of 16 images" in table
    assert "Two workers against one, fast: " in table
    assert run("--data", image_folder, "--output", output) == 2  # never overwritten
    assert run("--data", tmp_path / "none") == 2
    assert run("--images", 0) == 2


def test_made_photographs_have_imagenet_s_sizes(tmp_path):
    make_photographs(tmp_path / "made", 4)
    files = sorted((tmp_path / "made").iterdir())
    assert {Image.open(path).size for path in files} == {(500, 375)}
    assert 95_000 < np.mean([path.stat().st_size for path in files]) < 125_000
