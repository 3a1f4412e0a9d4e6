"""benchmark.py data: a small run, its figures recomputed."""

import json
import statistics
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from lip_resnet import distributed

sys.path.insert(0, str(ROOT / "scripts"))
import bench_data
import benchmark


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "data", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        distributed.launch(benchmark.main)
    return left.value.code


def test_figures_follow_from_the_rounds(monkeypatch, image_folder, tmp_path, capsys):
    output = tmp_path / "row.json"
    small = ("--images", 16, "--batch", 8, "--rounds", 3, "--workers", 1, "--gpu", 1000)
    assert run(monkeypatch, "--data", image_folder / "train", *small, "--output", output) == 0
    result = json.loads(output.read_text())
    rows = {row["loader"]: row for row in result["rows"]}
    assert set(rows) == {"ours, decode: fast", "ours, decode: exact", "timm, uint8", "torchvision, float32"}
    base = rows["timm, uint8"]["all"]
    for row in rows.values():
        assert len(row["all"]) == 3
        assert row["images_per_second"][1] == pytest.approx(statistics.median(row["all"]))
        ratios = [mine / theirs for mine, theirs in zip(row["all"], base, strict=True)]
        assert row["ratio"][1] == pytest.approx(statistics.median(ratios))
        assert row["cores_for_gpu"] * statistics.median(row["all"]) == pytest.approx(1000)
    assert 0 < result["pixels"]["mean"] <= result["pixels"]["worst_image"] < 1
    printed = capsys.readouterr().out
    assert "| timm, uint8 |" in printed
    assert "3 interleaved rounds of 16 images" in printed
    assert "Fast, two workers against one:" in printed
    assert result["environment"]["command"][2:5] == ["data", "--data", "DIR"]
    assert "| timm, uint8 |" in bench_data.section(output)
    assert bench_data.section(tmp_path / "none") == "not measured yet"
    assert run(monkeypatch, "--data", image_folder, "--output", output) == 2  # never overwritten
    assert run(monkeypatch, "--data", tmp_path / "none") == 2
    assert run(monkeypatch, "--images", 0) == 2


def test_made_photographs_are_like_imagenet_s(tmp_path):
    bench_data.make_photographs(tmp_path / "made", 4)
    files = sorted((tmp_path / "made").iterdir())
    assert {Image.open(path).size for path in files} == {(500, 375)}
    assert 95_000 < np.mean([path.stat().st_size for path in files]) < 125_000
