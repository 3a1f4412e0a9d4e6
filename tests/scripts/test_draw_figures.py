"""The figures of the docs: made of what is committed, and of what they say."""

import json

import draw_figures
import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.commands import RECIPE, call
from PIL import Image

from lip_resnet.recipe import load_config


@pytest.mark.parametrize("drawing", draw_figures.DRAWINGS, ids=lambda drawing: drawing.file)
def test_figures_are_current(drawing):
    """Without drawing them: a digest of the data, the style and the script is in every file; `make figures` renews."""
    assert drawing.is_current(), f"docs/figures/{drawing.file} is stale: make figures"
    content = drawing.path.read_bytes()
    assert len(content) <= 200_000
    assert drawing.alt.encode() in content
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert f"(figures/{drawing.file})" in page


def test_stale_figures_are_drawn_again(tmp_path, monkeypatch, capsys):
    data = tmp_path / "step.jsonl"
    data.write_text("1")
    drawing = draw_figures.Drawing("a.svg", "What is shown", (data,), lambda: b'<?xml?><svg width="1">x</svg>')
    monkeypatch.setattr(draw_figures, "FOLDER", tmp_path)
    monkeypatch.setattr(draw_figures, "DRAWINGS", [drawing])
    for shown in ("drawn", "up to date"):
        assert f"a.svg: {shown}" in call(capsys, monkeypatch, draw_figures)[1]
    first = drawing.path.read_bytes()
    assert first.startswith(b'<svg role="img" aria-label="What is shown" data-source="')
    data.write_text("2")
    assert not drawing.is_current()
    assert "drawn" in call(capsys, monkeypatch, draw_figures)[1]
    assert drawing.path.read_bytes() != first


def test_the_killed_run_is_the_undisturbed_one():
    """Every loss that the killed starts wrote is the undisturbed run's of that step."""
    whole, killed, starts = draw_figures.resumed()
    np.testing.assert_array_equal(whole, killed)
    assert len(starts) == 11
    losses = dict(whole.tolist())
    for start in starts:
        assert all(losses[step] == loss for step, loss in start.tolist())


def test_maps_of_a_photograph(tmp_path):
    """Of a network whose sites all average: 1 everywhere, at the sizes of the sites' inputs."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("test_resnet", "lip_resnet18"))
    config = load_config(tmp_path / "r.yaml")
    model = draw_figures.build_model(config.model)
    payload = {"model": model.state_dict(), "config": config.model_dump(mode="json"), "step": 3, "format": 1}
    torch.save(payload, tmp_path / "w.pt")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    draw_figures.compute_maps(str(tmp_path / "w.pt"), tmp_path / "p.png")
    maps = np.load(tmp_path / "p.npz")
    assert json.loads(str(maps["about"]))["model"] == "lip_resnet18"
    sides = {name: maps[name].shape[0] for name in maps.files if name != "about"}
    assert sides == {"pool": 80, "layer2.0.pool": 40, "layer3.0.pool": 20, "all sites": 160}
    for name in sides:
        np.testing.assert_allclose(maps[name], 1, atol=2e-3)
