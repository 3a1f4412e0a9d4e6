"""train.py --dry-run: three steps of every size, the time of the whole recipe, and nothing written."""

import datetime
import os
import signal

import pytest
import torch
from helpers import small_config
from helpers.commands import call, refuse
from helpers.training import prepare

import train
from lip_resnet.errors import OutOfMemory
from lip_resnet.training import dry_run
from lip_resnet.training.run import Built, Provenance

SYNTHETIC = {"data__name": "synthetic", "data__images": 8, "data__batch_size": 4, "data__eval_batch_size": 4}


def built(**changes):
    """A recipe and what its command builds, with invented data sets."""
    config, state, loader, _ = prepare(**changes)
    datasets = {"train": {"images": 1000, "classes": 10}, "val": {"images": 300}}
    return config, Built(state.task, state.model, loader, Provenance([1]), None, lambda: datasets)


def test_time_of_a_recipe_by_hand(monkeypatch):
    """Two steps an epoch; 100 images/s at 32 pixels, 40 at 64: the first epoch is small, three and a half are large."""
    changes = {"data__size_schedule": [[1, 64]], "train__epochs": 9, "train__max_steps": 9, "train__eval_every": 2}
    config, parts = built(**SYNTHETIC, **changes, train__ema_decay=0.5)
    rates = {0: (100.0, 0.25), 1: (40.0, 0.5)}
    monkeypatch.setattr(dry_run, "_measure", lambda state, loader, steps_config, epoch: rates[epoch])
    lines = dry_run.describe_run(config, parts, torch.device("cpu"))
    assert "speed     100.0 images/s at 32 pixels: 0.040 s a step, 25% of it waiting for images" in lines
    assert "speed     40.0 images/s at 64 pixels: 0.100 s a step, 50% of it waiting for images" in lines
    seconds = (
        2 * 4 / 100 + 7 * 4 / 40 + 2 * 3 * 300 / 3 / 40
    )  # steps 1 and 2, 3 to 9; three evaluations of two networks
    clock = datetime.timedelta(seconds=round(seconds))
    assert lines[-1] == f"time      {seconds / 3600:.2f} hours ({clock}) for all steps and 6 evaluations"
    assert "data      1,000 training images and 300 validation images, 10 classes" in lines


def test_three_steps_of_every_size_and_only_the_first_is_not_timed(monkeypatch):
    """Of epochs of two steps: from the start of the epoch, and once more from it."""
    config, parts = built(**SYNTHETIC, data__size_schedule=[[1, 40]], train__epochs=3)
    sides, epoch = [], parts.loader.epoch
    monkeypatch.setattr(parts.loader, "epoch", lambda *given: sides.append(given) or epoch(*given))
    lines = dry_run.describe_run(config, parts, torch.device("cpu"))
    assert sides == [(0, 0), (0, 0), (1, 0), (1, 0)]
    assert len([line for line in lines if line.startswith("speed")]) == 2


def test_a_batch_that_does_not_fit_says_what_does(monkeypatch):
    config, parts = built(**SYNTHETIC)
    monkeypatch.setattr(dry_run, "suggest", lambda *given: "a smaller batch fits")
    monkeypatch.setattr(dry_run, "_measure", lambda *given: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemory, match="a smaller batch fits"):
        dry_run.describe_run(config, parts, torch.device("cpu"))


def test_the_command_writes_nothing_and_continues_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(small_config(**SYNTHETIC).dump())
    dry = ("--config", "recipe.yaml", "--dry-run")
    code, printed, error = call(capsys, monkeypatch, train, *dry)
    assert (code, error) == (0, "")
    names = [line.split()[0] for line in printed.splitlines()]
    assert names == ["network", "device", "data", "steps", "speed", "memory", "time"]
    for wrong, words in (
        (["--resume", "auto"], "--dry-run starts a recipe afresh and continues no run: leave out --resume auto"),
        (["--resume", "run/checkpoints/last.pt"], "leave out --resume run/checkpoints/last.pt"),
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["model.num_classes=7", "data.name=digits"], "the data has 10"),
        (["model.weights=none.pt"], "none.pt: no such file"),
        (["--output", "."], "exists and is not a run"),
    ):
        assert words in refuse(capsys, monkeypatch, train, *dry, *wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(small_config(**SYNTHETIC).dump())
    assert "already holds a run" in refuse(capsys, monkeypatch, train, *dry, "--output", "run")


def test_a_signal_leaves_no_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(small_config(**SYNTHETIC).dump())

    monkeypatch.setattr(dry_run, "_measure", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    code, _, error = call(capsys, monkeypatch, train, "--config", "recipe.yaml", "--dry-run")
    assert code == 75
    assert "SIGTERM before the first step" in error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
