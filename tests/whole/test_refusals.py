"""What a user can get wrong with the commands: one clear line, exit code 2, no traceback, nothing overwritten."""

import json
import subprocess
import sys

import make_table
import pytest
import torch
from helpers import ROOT, small_config
from helpers.commands import call, refuse

import eval as eval_command
import train


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(small_config().dump())
    return path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=resnet5O"], "near names: resnet50"),
        (["model.args.width=3"], "does not take"),
        (["model.num_classes=7"], "num_classes is 7, but the data has 10"),
        (["model.weights=/nonexistent.pt"], "no such file"),
        (["data.name=folder", "data.root=/nonexistent"], "/nonexistent is not a directory"),
        (["optim.accumulate=3"], "does not divide"),
        (["train.epochs=0"], "greater than 0"),
        (["train.drop_path=0.5", "model.name=vgg11"], "drop_path_rate"),
        (["model.name=lip_resnet50", "data.size=16"], "too small for the network"),
        (["optim.lr=.nan"], "finite"),
        (["--nonsense"], "unrecognized arguments"),
        (["--resume", "/nonexistent.pt"], "no such checkpoint"),
    ],
)
def test_train_refuses(capsys, monkeypatch, recipe, tmp_path, overrides, words):
    output = tmp_path / "run"
    line = refuse(capsys, monkeypatch, train, "--config", recipe, "--output", output, *overrides)
    assert words in line
    assert not output.exists()


@pytest.mark.parametrize(
    "overrides",
    [["data.batch_size=1"], ["data.batch_size=2", "optim.accumulate=2"], ["data.batch_size=1", "data.last_batch=drop"]],
)
def test_batch_norm_of_one_value(capsys, monkeypatch, recipe, tmp_path, overrides):
    """At 32 pixels the last map is 1x1. At 64 it is 2x2, and one image will do."""
    line = refuse(capsys, monkeypatch, train, "--config", recipe, "--output", tmp_path / "run", *overrides)
    assert "one image of 32x32 in each part of a batch" in line
    assert "raise data.batch_size" in line
    larger = ("data.size=64", "data.name=synthetic", "data.images=8")
    code, _, printed = call(capsys, monkeypatch, train, "--config", recipe, "--dry-run", *larger, *overrides)
    assert (code, printed) == (0, "")


def test_train_needs_a_recipe(capsys, monkeypatch, tmp_path):
    assert "--config" in refuse(capsys, monkeypatch, train)
    assert "No such file" in refuse(capsys, monkeypatch, train, "--config", tmp_path / "none.yaml")


def test_a_foreign_folder_is_left_alone(capsys, monkeypatch, recipe, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    line = refuse(capsys, monkeypatch, train, "--config", recipe, "--output", tmp_path)
    assert "is not a run" in line
    assert (tmp_path / "precious.txt").read_text() == "mine"
    line = refuse(capsys, monkeypatch, train, "--config", recipe, "--output", tmp_path / "precious.txt")
    assert "is not a run" in line


def test_another_recipe_does_not_continue_a_run(capsys, monkeypatch, recipe, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(small_config(optim__lr=0.07).dump())
    line = refuse(capsys, monkeypatch, train, "--config", recipe, "--output", folder, "--resume", "auto")
    assert "optim.lr=0.07, this recipe says 0.05" in line


def test_a_broken_checkpoint_does_not_continue_a_run(capsys, monkeypatch, recipe, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(small_config().dump())
    for payload, words in (({"weights": torch.zeros(1)}, "not a training checkpoint"), (None, "not a checkpoint")):
        path = folder / "checkpoints" / "last.pt"
        path.write_bytes(b"nothing") if payload is None else torch.save(payload, path)
        line = refuse(capsys, monkeypatch, train, "--config", recipe, "--output", folder, "--resume", "auto")
        assert words in line


def test_eval_refuses(capsys, monkeypatch, recipe, tmp_path, image_folder):
    bare = tmp_path / "bare.pth"
    torch.save({"fc.weight": torch.zeros(3, 2)}, bare)

    def line(*arguments: object) -> str:
        return refuse(capsys, monkeypatch, eval_command, *arguments)

    assert "give --checkpoint PATH" in line()
    assert "--pretrained needs --model" in line("--pretrained")
    assert "no such file" in line("--checkpoint", tmp_path / "none.pth")
    assert "does not name its model" in line("--checkpoint", bare)
    assert "unknown model" in line("--checkpoint", bare, "--model", "lip_resnet5")
    assert "--data is missing" in line("--checkpoint", bare, "--model", "test_resnet")
    assert "not the weights of this" in line("--checkpoint", bare, "--model", "resnet18", "--data", image_folder)
    assert "is not a directory" in line("--checkpoint", bare, "--model", "resnet18", "--data", "/nonexistent")
    assert "invalid int value" in line("--checkpoint", bare, "--size", "big")
    assert "not allowed with" in line("--checkpoint", bare, "--model", "resnet18", "--config", recipe)
    row = tmp_path / "row.json"
    row.write_text("{}")
    assert "row.json exists" in line("--checkpoint", bare, "--model", "resnet18", "--output", row)
    assert row.read_text() == "{}"


def test_make_table_refuses(capsys, monkeypatch, tmp_path):
    (tmp_path / "row.json").write_text(json.dumps({"model": "x"}))
    assert "missing keys: top1" in refuse(capsys, monkeypatch, make_table, tmp_path / "row.json")
    (tmp_path / "table.md").write_text("mine")
    line = refuse(capsys, monkeypatch, make_table, tmp_path / "row.json", "--output", tmp_path / "table.md")
    assert "exists" in line
    assert (tmp_path / "table.md").read_text() == "mine"


def test_half_a_distributed_environment(capsys, monkeypatch, recipe):
    monkeypatch.setenv("RANK", "0")
    assert "but not LOCAL_RANK" in refuse(capsys, monkeypatch, train, "--config", recipe)


def test_the_cause_is_kept_and_shown(capsys, monkeypatch, recipe):
    """One line as a rule; with LIP_DEBUG=1 the traceback after it, down to the library's own error."""
    monkeypatch.setenv("LIP_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(recipe), "model.args.width=3"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train.py: error: model test_resnet does not take")
    assert lines[1] == "Traceback (most recent call last):"
    assert any(line.startswith("TypeError: ") and "width" in line for line in lines)


@pytest.mark.parametrize(("script", "words"), [("train.py", "--resume auto|none|PATH"), ("eval.py", "--pretrained")])
def test_help_needs_no_torch(script, words):
    """5 s and 870 MB otherwise."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert words in result.stdout
    assert "argparse" in result.stderr
    assert "torch" not in result.stderr
