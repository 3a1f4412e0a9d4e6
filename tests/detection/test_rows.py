"""A trained detector in eval.py, tables and pictures: rows, detections, matches, and one line for wrong input."""

import json
import re

import compare_detections
import make_table
import numpy as np
import per_class
import pytest
import show_detections
import show_importance
import torch
from helpers.commands import call, refuse
from helpers.training import run_train
from PIL import Image

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
    assert "is a row of a detector" in refuse(capsys, monkeypatch, per_class, tmp_path / "row.json")
    code, out, _ = call(capsys, monkeypatch, compare_detections, tmp_path / "matches.npz", tmp_path / "matches.npz")
    assert code == 0
    assert "+0.00" in out


def test_wrong_input_is_one_line(run, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "boxes.json"
    taken.touch()
    for arguments, line in (
        (("--dataset", "imagenet-v2"), "--dataset is for classification"),
        (("--resize", 99), "--resize is for classification"),
        (("--data", tmp_path), r"the recipe's data.name is digit_scenes, which reads no directory"),
        (("--predictions", taken), "exists; choose another --predictions"),
        (("--predictions", tmp_path / "boxes.csv"), r"the file is written as \.json; give a name that ends so"),
        (("--matches", tmp_path / "no" / "m.npz"), "--matches .* is not a directory"),
        (("--config", "digits/resnet50"), "is of task: detection; here it must be of task: classification"),
        (("--config", "digits/lip_resnet18_fpn"), r"was trained with model\.\S+=.*evaluate it by its own recipe"),
        (("--size", 0), "data.size"),
    ):
        assert re.search(line, refuse(capsys, monkeypatch, eval_command, "--checkpoint", run, *arguments)), arguments
    assert not (run / "eval.json").exists()


def test_weights_without_a_recipe(run, tmp_path, capsys, monkeypatch):
    """A bare file is evaluated by --config, and needs one; the weights of a classifier are named."""
    trained = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]
    bare, backbone = tmp_path / "bare.pt", tmp_path / "backbone.pt"
    torch.save(trained, bare)
    body = "backbone.body."
    torch.save({key.removeprefix(body): value for key, value in trained.items() if key.startswith(body)}, backbone)
    recipe = ("--config", run.parent / "recipe.yaml", "--output", tmp_path / "row.json")
    assert "--config" in refuse(capsys, monkeypatch, eval_command, "--checkpoint", bare)
    line = refuse(capsys, monkeypatch, eval_command, "--checkpoint", backbone, *recipe)
    assert "backbone.pt" in line
    assert not (tmp_path / "row.json").exists()
    assert call(capsys, monkeypatch, eval_command, "--checkpoint", bare, *recipe)[0] == 0
    call(capsys, monkeypatch, eval_command, "--checkpoint", run, "--output", tmp_path / "own.json")
    rows = [json.loads((tmp_path / name).read_text()) for name in ("row.json", "own.json")]
    assert [rows[0][name] for name in METRICS] == [rows[1][name] for name in METRICS]


def test_pictures(run, tmp_path, capsys, monkeypatch):
    """One of the image and, with --maps, one of the backbone's maps; the counts by size add up."""
    pytest.importorskip("matplotlib")
    output = tmp_path / "shown"
    arguments = ("--checkpoint", run, "--output", output, "--score", 0, "--limit", 1, "--maps")
    code, out, err = call(capsys, monkeypatch, show_detections, *arguments)
    assert (code, err) == (0, "note: 1 of 4 images, evenly spaced; --limit shows more\n")
    pictures = sorted(output.glob("*.png"))
    assert len(pictures) == 2
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    page = (output / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<th>([^<]*)</th>", page) == ["size", "objects", "detected", "missed", "false detections"]
    table = np.array([line.split("</td>") for line in page.split("<tr>")[2:]])[:, :5]
    numbers = np.array([[int(cell.rpartition(">")[2]) for cell in line[1:]] for line in table])
    assert (numbers[:3].sum(axis=0) == numbers[3]).all()
    assert (numbers[:, 0] == numbers[:, 1] + numbers[:, 2]).all()
    printed = [re.search(r": (\d+) of (\d+) objects detected, (\d+) false", line) for line in out.splitlines()[:1]]
    assert [sum(int(line[group]) for line in printed if line) for group in (2, 1, 3)] == numbers[3][[0, 1, 3]].tolist()
    line = refuse(capsys, monkeypatch, show_detections, "--checkpoint", run, "--output", output)
    assert "exists and is not an empty folder" in line
    line = refuse(capsys, monkeypatch, show_importance, "--checkpoint", run, "--output", tmp_path / "maps")
    assert "is a detector: scripts/show_detections.py --maps shows its importance maps" in line
    assert not (tmp_path / "maps").exists()
