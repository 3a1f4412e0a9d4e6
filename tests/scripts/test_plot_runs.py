"""Learning curves of runs, against means and deviations by hand."""

import json
import shutil

import numpy as np
import plot_runs
import pytest
from helpers.commands import RECIPE, call, refuse

from lip_resnet.evaluation.render import Measured, render

DETECTION = """
task: detection
model: {num_classes: 10, backbone: {name: resnet18}, anchor_sizes: [8, 16, 32, 64, 96]}
data: {name: digit_scenes, images: 1280, size: 64, max_size: 96, batch_size: 64}
optim: {lr: 0.01}
train: {epochs: 2, log_every: 10}
"""


def write_run(folder, seed, top1, recipe=RECIPE, name="val/top1", speed=64.0):
    """A run of two epochs of 20 steps of 64 images each, at ``speed`` images a second."""
    folder.mkdir()
    text = recipe.replace("train: {epochs: 2", f"train: {{seed: {seed}, epochs: 2")
    (folder / "config.yaml").write_text(text)
    lines = []
    for epoch, value in enumerate(top1):
        for step in (10, 20):
            lines.append(
                {"step": 20 * epoch + step, "epoch": epoch, "train/loss": 1.0, "train/images_per_second": speed}
            )
        lines.append({"step": 20 * epoch + 20, "epoch": epoch, name: value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 50, "epo')
    return folder


@pytest.fixture
def curves(monkeypatch):
    """The lines and bands that a figure gets: label -> (x, mean), and the bands."""
    from matplotlib.axes import Axes

    lines, bands = {}, []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *a, **k: lines.update({k["label"]: (list(x), list(y))}) or plot(self, x, y, *a, **k),
    )
    monkeypatch.setattr(
        Axes,
        "fill_between",
        lambda self, x, low, high, **k: bands.append((list(low), list(high))) or fill(self, x, low, high, **k),
    )
    return lines, bands


def test_mean_and_band_over_seeds(tmp_path, capsys, monkeypatch, curves):
    lines, bands = curves
    runs = [write_run(tmp_path / "a", 0, [10.0, 30.0]), write_run(tmp_path / "b", 1, [20.0, 34.0], speed=32.0)]
    other = write_run(tmp_path / "c", 0, [5.0, 6.0], RECIPE.replace("lr: 0.05", "lr: 0.1"))
    code, out, error = call(capsys, monkeypatch, plot_runs, *runs, other, runs[0], "--output", tmp_path / "f.svg")
    assert code == 0, error
    assert lines["test_resnet, optim.lr=0.05 (2 seeds)"] == ([1, 2], [15, 32])
    assert lines["test_resnet, optim.lr=0.1 (seed 0)"] == ([1, 2], [5, 6])
    ((low, high),) = bands
    assert low == pytest.approx([15 - 50**0.5, 32 - 8**0.5])
    assert high == pytest.approx([15 + 50**0.5, 32 + 8**0.5])
    assert "test_resnet, optim.lr=0.05: 2 runs, seed 0, 1" in out
    first = (tmp_path / "f.svg").read_bytes()
    call(capsys, monkeypatch, plot_runs, *runs, other, "--output", tmp_path / "f.svg", "--force")
    assert (tmp_path / "f.svg").read_bytes() == first
    call(capsys, monkeypatch, plot_runs, *runs, "--x", "minutes", "--output", tmp_path / "f.pdf")
    assert lines["test_resnet (2 seeds)"][0] == pytest.approx([(20 + 40) / 2 / 60, (40 + 80) / 2 / 60])
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")
    assert b"/Type3" not in (tmp_path / "f.pdf").read_bytes()
    call(capsys, monkeypatch, plot_runs, *runs, "--metric", "train/loss", "--output", tmp_path / "loss.png")
    assert lines["test_resnet (2 seeds)"][0] == [0.5, 1, 1.5, 2]


def test_runs_of_detection(tmp_path, capsys, monkeypatch, curves):
    lines, _ = curves
    recipes = {"a": DETECTION, "b": DETECTION.replace("resnet18", "lip_resnet18")}
    runs = [write_run(tmp_path / name, 0, [10.0, 30.0], recipe, "val/AP") for name, recipe in recipes.items()]
    code, _, error = call(capsys, monkeypatch, plot_runs, *runs, "--x", "minutes", "--output", tmp_path / "f.svg")
    assert code == 0, error
    x, y = lines["faster_rcnn, model.backbone.name=lip_resnet18 (seed 0)"]
    assert (x, y) == ([pytest.approx(20 / 60), pytest.approx(40 / 60)], [10, 30])
    assert "validation AP (%)" in (tmp_path / "f.svg").read_text()


def test_bad_input(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "a", 0, [10.0, 30.0])
    twin = shutil.copytree(run, tmp_path / "twin")
    detection = write_run(tmp_path / "d", 1, [1.0], DETECTION, "val/AP")
    young = write_run(tmp_path / "young", 2, [])
    (tmp_path / "empty").mkdir()
    new = ("--output", tmp_path / "f.svg")
    for arguments, line in (
        ((run, "--output", tmp_path / "f.jpg"), "f.jpg: the file's name must end in .pdf, .svg or .png"),
        ((run, "--output", run / "config.yaml"), "must end in"),
        ((run, "--output", tmp_path / "no" / "f.svg"), "is not a directory"),
        ((tmp_path / "empty", *new), "empty: not a run folder of train.py: it holds no config.yaml"),
        ((run, twin, *new), "are runs of one recipe and seed 0; give one of them"),
        ((run, detection, *new), f"{run} has val/top1 and {detection} has val/AP: one figure shows one metric"),
        (
            (run, detection, *new, "--metric", "val/AP"),
            f"{run} has no val/AP; it has train/images_per_second, train/loss",
        ),
        ((young, *new), f"{young} has no evaluation yet; --metric train/loss"),
        ((young, *new, "--metric", "train/loss"), "young has no train/loss; it has no numbers yet"),
    ):
        assert line in refuse(capsys, monkeypatch, plot_runs, *arguments), arguments
    assert not (tmp_path / "f.svg").exists()
    (tmp_path / "f.svg").write_text("mine")
    assert "exists; choose another --output or add --force" in refuse(capsys, monkeypatch, plot_runs, run, *new)
    assert (tmp_path / "f.svg").read_text() == "mine"


def test_latex_aligns_numbers():
    rows = [["a_b", "21.84", Measured(98.4, 0.59), "-"], ["c", "0.108", Measured(7.28, None), "-1.12"]]
    lines = render(["network", "MACs (G)", "top-1 (%)", "delta"], rows, ["note"], "latex").splitlines()
    assert lines == [
        r"\begin{tabular}{lr@{}lr@{}lr}",
        r"\toprule",
        r"network & \multicolumn{2}{c}{MACs (G)} & \multicolumn{2}{c}{top-1 (\%)} & delta \\",
        r"\midrule",
        r"a\_b & 21 & .84 & 98 & .40 $\pm$ 0.59 & - \\",
        r"c & 0 & .108 & 7 & .28 & $-$1.12 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"% \usepackage{booktabs}",
        "% note",
    ]
    assert np.char.count(lines[4:6], "&").tolist() == [5, 5]
