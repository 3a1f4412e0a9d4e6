"""`train.rules: ema` from training to the row, and what eval.py's options change in it; in this process."""

import json
from pathlib import Path

import pytest
import torch
from helpers import small_config
from helpers.commands import call
from helpers.training import run_train

import eval as eval_command


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run of two epochs, four steps each, whose average (of decay 0.9) is far behind the weights."""
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    changes = {
        "data__name": "synthetic",
        "data__images": 160,
        "data__batch_size": 40,
        "data__eval_resize": 36,
        "train__ema_decay": 0.9,
        "train__rules": "ema",
    }
    changes["train__seed"] = 3
    recipe.write_text(small_config(**changes).dump())
    run_train(monkeypatch, "--config", recipe, "--output", folder)
    return folder


def test_the_average_decides_from_training_to_the_row(trained, tmp_path, capsys, monkeypatch):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(4, 0), (4, 0), (5, 1), (8, 1), (8, 1)]
    first, last = (line for line in lines if "val/top1" in line)
    averages = [line["val_ema/top1"] for line in (first, last)]
    assert last["val/loss"] != last["val_ema/loss"]
    best, newest = (torch.load(trained / "checkpoints" / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    assert newest["best"] == max(averages)
    assert best["step"] == (8 if averages[1] > averages[0] else 4)

    def score(*arguments: object, source: Path = trained) -> dict:
        output = tmp_path / "row.json"
        output.unlink(missing_ok=True)
        code, printed, errors = call(
            capsys, monkeypatch, eval_command, "--checkpoint", source, "--output", output, *arguments
        )
        assert code == 0, errors
        row = json.loads(output.read_text())
        assert printed == f"* Acc@1 {row['top1']:.3f} Acc@5 {row['top5']:.3f}\n"
        return row

    row = score()
    assert (row["weights"], row["step"], row["seed"], row["selected_on_val"]) == ("ema", 8, 3, False)
    for key in ("top1", "top5", "loss"):
        assert row[key] == pytest.approx(last[f"val_ema/{key}"], rel=1e-5)
    assert score(source=trained / "checkpoints" / "best.pt")["selected_on_val"]
    plain = score("--weights", "model")
    assert (plain["weights"], plain["top1"]) == ("model", last["val/top1"])
    assert plain["loss"] == pytest.approx(last["val/loss"], rel=1e-5)

    options = {"interpolation": "bicubic", "crop_mode": "squash", "precision": "bfloat16"}
    numbers = {"eval_size": 24, "eval_resize": 40}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    smaller = score(*words, "--size=24", "--resize=40", "--batch-size=7")
    assert smaller["macs"] < 0.7 * row["macs"]
    other = smaller["protocol"]
    changed = {key for key in other if other[key] != row["protocol"][key]}
    assert {key: other[key] for key in changed} == options | numbers
