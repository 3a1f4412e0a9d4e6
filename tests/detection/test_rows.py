"""eval.py and the tables on a trained detector: rows, detections, matches, intervals, and one line for wrong input."""

import json
import re

import compare_detections
import make_table
import numpy as np
import pytest
from helpers.commands import call, refuse
from helpers.training import run_train

import eval as eval_command
from lip_resnet.evaluation.average_precision import METRICS, average_precision
from lip_resnet.evaluation.matching import read_matches
from lip_resnet.evaluation.rows import read_rows

RECIPE = """
task: detection
model:
  num_classes: 10
  backbone: {name: resnet10t}
  fpn_channels: 16
  head_channels: 16
  anchor_sizes: [8, 16, 32, 48, 64]
  args: {box_score_thresh: 0.0, rpn_post_nms_top_n_test: 20}
data: {name: digit_scenes, images: 20, size: 64, max_size: 96, batch_size: 4, workers: 0}
optim: {lr: 0.01}
train: {epochs: 1, max_steps: 2, log_every: 1}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    (folder / "recipe.yaml").write_text(RECIPE)
    patch = pytest.MonkeyPatch()
    run_train(patch, "--config", folder / "recipe.yaml", "--output", folder / "run")
    patch.undo()
    return folder / "run"


def test_a_run_is_evaluated(run, tmp_path, capsys, monkeypatch):
    files = ("--output", tmp_path / "row.json", "--predictions", tmp_path / "boxes.json")
    files = (*files, "--matches", tmp_path / "matches.npz", "--intervals")
    code, out, err = call(capsys, monkeypatch, eval_command, "--checkpoint", run, *files)
    assert (code, err) == (0, "")
    (row,) = read_rows([str(tmp_path / "row.json")])
    assert out.splitlines()[0] == "* " + " ".join(f"{name} {row[name]:.3f}" for name in METRICS)
    assert row["model"] == "resnet10t"
    assert row["detector"] == "faster_rcnn"
    assert (row["images"], row["seed"], row["step"], row["dataset"]["images"]) == (4, 0, 2, 4)
    assert row["protocol"]["eval_size"] == 64
    assert row["protocol"]["training"]["images_per_batch_norm"] == "4"
    assert row["params"] > 0 < row["macs"]
    matches = read_matches(tmp_path / "matches.npz")
    np.testing.assert_allclose([row[name] for name in METRICS], list(average_precision(matches).values()), atol=1e-9)
    assert row["intervals"].keys() <= {"AP", "APs"}
    assert json.loads((tmp_path / "boxes.json").read_text())[0].keys() == {"image_id", "category_id", "bbox", "score"}
    validated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line["val/AP"] for line in validated if "val/AP" in line) == pytest.approx(row["AP"], abs=1e-6)
    # Another size, from the recipe of a file.
    recipe = ("--config", run.parent / "recipe.yaml", "--checkpoint", run / "checkpoints" / "last.pt")
    call(capsys, monkeypatch, eval_command, *recipe, "--size", 96, "--output", tmp_path / "larger.json")
    larger = json.loads((tmp_path / "larger.json").read_text())
    assert (larger["protocol"]["eval_size"], larger["protocol"]["max_size"]) == (96, 144)
    code, out, _ = call(capsys, monkeypatch, make_table, tmp_path / "row.json")
    assert code == 0
    assert out.splitlines()[0].split("|")[4:11] == [
        *(f" {name} (%) " for name in METRICS),
        " delta AP ",
    ]
    code, out, _ = call(capsys, monkeypatch, compare_detections, tmp_path / "matches.npz", tmp_path / "matches.npz")
    assert code == 0
    assert "+0.00" in out


def test_wrong_input_is_one_line(run, tmp_path, capsys, monkeypatch):
    for arguments, line in (
        (("--dataset", "imagenet-v2"), "--dataset is for classification"),
        (("--resize", 99), "--resize is for classification"),
        (("--data", tmp_path), r"the recipe's data.name is digit_scenes, which reads no directory"),
        (("--predictions", run / "config.yaml"), "exists; choose another --predictions"),
        (("--matches", tmp_path / "no" / "m.npz"), "--matches"),
        (("--config", "digits/resnet50"), "is of task: detection; here it must be of task: classification"),
        (("--config", "digits/lip_resnet18_fpn"), r"was trained with model\.\S+=.*evaluate it by its own recipe"),
        (("--size", 0), "data.size"),
    ):
        assert re.search(line, refuse(capsys, monkeypatch, eval_command, "--checkpoint", run, *arguments)), arguments
    assert not (run / "eval.json").exists()
