"""Runs of train.py in this process."""

import pytest
from helpers import small_config
from helpers.training import run_train

from lip_resnet.training.checkpoints import Checkpoints


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``start(*arguments)`` runs train.py in this process on a recipe of 8 steps; it writes to ``start.folder``."""
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(small_config(data__batch_size=480).dump())

    def run_it(*arguments: str) -> None:
        run_train(monkeypatch, "--config", recipe, "--output", folder, *arguments)

    run_it.folder = folder
    return run_it


@pytest.fixture
def patient(monkeypatch):
    """Every checkpoint is written, or not, before training goes on."""
    save = Checkpoints.save

    def save_and_wait(self: Checkpoints, payload: dict, best: bool) -> None:
        save(self, payload, best)
        self._thread.join()

    monkeypatch.setattr(Checkpoints, "save", save_and_wait)
