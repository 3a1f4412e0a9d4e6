"""scripts/show_importance.py: its pictures and page, and what it refuses."""

import base64
import re

import pytest
import show_importance
import torch
from helpers import photograph, small_config
from helpers.commands import call, refuse
from PIL import Image

from lip_resnet.models import registry

pytest.importorskip("matplotlib")
CONFIG = small_config(model__name="lip_resnet18")


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    for number, name in enumerate(("a/cat.png", "b/cat.jpg")):
        (folder / name).parent.mkdir(parents=True)
        photograph(40, 60, seed=number).save(folder / name)
    (folder / "broken.jpg").write_text("no image")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A file of weights that knows its recipe."""
    torch.manual_seed(0)
    model = registry.build_model(CONFIG.model)
    for name, parameter in model.named_parameters():
        if name.endswith("logits.conv.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "weights.pt"
    torch.save({"model": model.state_dict(), "config": CONFIG.model_dump(mode="json"), "processes": [1]}, path)
    return path


def test_a_picture_of_every_photograph_and_a_page(capsys, monkeypatch, tmp_path, photographs, checkpoint):
    output = tmp_path / "new" / "shown"
    arguments = ("--checkpoint", checkpoint, "--images", photographs, "--output", output, "--sites", "pool")
    code, out, err = call(capsys, monkeypatch, show_importance, *arguments, "--compare", "max", "average", "max")
    assert code == 0
    assert sorted(path.name for path in output.iterdir()) == ["cat-2.png", "cat.png", "index.html", "window.png"]
    assert f"{output}/cat.png: an image of 60x40 pixels, read by the network as 48x32" in out
    assert err == f"skipped: {photographs}/broken.jpg: cannot decode this image: PIL knows no such format\n"
    page = (output / "index.html").read_text(encoding="utf-8")
    inside = [base64.b64decode(text) for text in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert inside == [(output / name).read_bytes() for name in ("window.png", "cat.png", "cat-2.png")]
    assert "http" not in page
    header = re.findall(r"<th>([^<]*)</th>", page)
    assert header == ["site", "layer", "entropy: its own layer", "entropy: max", "entropy: average"]
    site, layer, own, maximum, average = re.findall(r"<td>([^<]*)</td>", page)
    assert (site, layer, maximum, average) == ("pool", "lip", "0.000", "1.000")
    assert 0 < float(own) < 1
    with Image.open(output / "cat.png") as picture:
        assert picture.width > 1000  # 6.6 inches at 200 dots
    line = refuse(capsys, monkeypatch, show_importance, *arguments)
    assert f"--output {output} exists and is not an empty folder" in line


def test_an_untrained_network_is_called_so(capsys, monkeypatch, tmp_path):
    """LIP's logits start at zero: entropy 1. Without --images they are of the recipe's validation set."""
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "shown"
    recipe.write_text(CONFIG.dump())
    arguments = ("--config", recipe, "--output", output, "--limit", 1, "--format", "svg", "--sites", "pool")
    code, _, err = call(capsys, monkeypatch, show_importance, *arguments)
    assert code == 0
    assert err.startswith("note: without --checkpoint: lip_resnet18, UNTRAINED: its weights are random, and LIP starts")
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "<td>1.000</td>" in page
    picture = (output / "val-0.svg").read_text(encoding="utf-8")
    assert "val[0], by an untrained network" in picture
    assert "entropy 1.00" in picture


def test_refusals(capsys, monkeypatch, tmp_path, photographs, checkpoint):
    output, recipe = tmp_path / "shown", tmp_path / "recipe.yaml"
    recipe.write_text(small_config(model__name="mobilenetv3_small_050").dump())
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").touch()
    cases = (
        (("--checkpoint", checkpoint, "--sites", "pol"), "no site 'pol'; this network has pool, layer2.0.pool"),
        (("--config", recipe), "no layer of local weights"),
        (("--checkpoint", checkpoint, "--output", used), "exists and is not an empty folder"),
        (("--checkpoint", checkpoint, "--compare", "maximum"), "invalid choice: 'maximum'"),
        (("--checkpoint", checkpoint, "--limit", "0"), "--limit is 0; it must be at least 1"),
        (("--checkpoint", checkpoint, "--model", "resnet18"), "not the weights of this ResNet"),
        (("--checkpoint", tmp_path / "none.pt"), "no such"),
        (("--weights", "ema"), "--weights ema belongs to --checkpoint"),
        (("--checkpoint", checkpoint, "--images", photographs / "broken.jpg"), "PIL knows no such format"),
        (("--checkpoint", checkpoint, "--images", tmp_path / "none"), "no such file or folder"),
    )
    for arguments, words in cases:
        given = ("--output", output, "--images", photographs, *arguments)
        code, out, err = call(capsys, monkeypatch, show_importance, *given)
        assert (code, out) == (2, ""), (arguments, err)
        *_, line = err.splitlines()
        assert words in line, (arguments, line)
        assert not output.exists()
    assert [path.name for path in used.iterdir()] == ["thesis.tex"]
