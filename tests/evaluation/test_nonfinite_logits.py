"""Logits that are not finite: no accuracy, the number of images, and the first module at fault."""

import json
import math

import pytest
import timm
import torch
from helpers import small_config
from helpers.commands import RECIPE, call
from helpers.sets import as_rank
from helpers.training import how, prepare, run_train
from torch import nn

import eval as eval_command
from lip_resnet import checkpoint, distributed
from lip_resnet.data import EvalLoader
from lip_resnet.evaluation import metrics
from lip_resnet.evaluation.evaluate import evaluate
from lip_resnet.evaluation.nonfinite import FirstNonFinite
from lip_resnet.files import to_json
from lip_resnet.training import classification, runlog

IMAGES = 355
"""Of the validation split of the digits."""


def spoil(state: dict[str, torch.Tensor], fault: str) -> None:
    """Plant a fault into the weights of test_resnet."""
    if fault == "NaN weight":
        state["layer2.0.conv1.weight"][0, 0] = math.nan
    elif fault == "negative variance":
        state["layer1.0.bn2.running_var"][1] = -1
    elif fault == "NaN classifier":
        state["fc.bias"][3] = math.nan
    else:
        state["layer3.0.bn1.weight"] *= 1e6  # above float16's 65,504 in the next convolution


FAULTS = {
    "NaN weight": ("float32", "layer2.0.conv1, whose weight is not finite"),
    "negative variance": ("float32", "layer1.0.bn2, whose running_var has negative values"),
    "NaN classifier": ("float32", "fc, whose bias is not finite"),
    "float16": ("float16", "layer3.0.*"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_module_is_named(fault):
    config, state, _, loader = prepare(data__eval_batch_size=20)
    loader.choose(range(30))
    spoil(state.model.state_dict(), fault)
    precision, module = FAULTS[fault]
    words = rf"the logits of 30 of 30 images are not finite, in {precision}; the first that .*: the output of {module}$"
    with pytest.raises(FloatingPointError, match=words):
        evaluate(state.model, loader, **{**how(config), "precision": precision})
    if fault == "float16":
        assert evaluate(state.model, loader, **how(config))["images"] == 30


def test_no_row_of_logits_that_are_not_finite(capsys, monkeypatch, tmp_path):
    config = small_config()
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    spoil(state, "negative variance")
    tree = config.model_dump(mode="json")
    path, row = tmp_path / "run.pt", tmp_path / "row.json"
    checkpoint.save(path, {"model": state, "ema": None, "step": 1, "processes": [1], "config": tree})
    code, out, err = call(capsys, monkeypatch, eval_command, "--checkpoint", path, "--output", row, "--workers", 0)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert f"the logits of {IMAGES} of {IMAGES} images are not finite, in float32; the first that" in err
    assert not row.exists()


class NanForSome(nn.Module):
    """NaN logits for the images whose first pixel is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale = nn.Identity(), nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.stem(images)[:, 0, 16, 16, None]
        return self.scale * torch.where(pixels < 0, math.nan, pixels).expand(-1, 10)


def test_every_image_is_counted_on_any_number_of_processes(monkeypatch):
    config, _, _, loader = prepare(data__eval_batch_size=50)
    expected = sum(int((images[:, 0, 16, 16] < 0.485 * 255).sum()) for images, _ in loader)
    assert 0 < expected < IMAGES
    monkeypatch.setattr("lip_resnet.evaluation.evaluate.distribute_bn", lambda *arguments, **keywords: None)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [None, value])
    for world in (1, 3):
        counted = []
        for rank in range(world):
            as_rank(monkeypatch, rank, world)
            share, model = EvalLoader(loader.source, config.data), NanForSome().train()
            batches = list(share.batches)
            with pytest.raises(
                FloatingPointError, match="the first that is not finite: the output of the network"
            ) as e:
                evaluate(model, share, **how(config))
            counted.append(int(str(e.value).split()[3]))
            assert (share.batches, model.training) == (batches, True)
        assert sum(counted) == expected


def test_finite_logits_have_a_finite_loss():
    """Logits farther apart than float32 reaches."""
    logits = torch.tensor([[3e38, -3e38], [0.0, 0.0]])
    loss = metrics.cross_entropy(logits.double(), torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((2 * float(logits[0, 0]) + math.log(2)) / 2)
    config, _, _, loader = prepare()
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    nn.init.zeros_(model[2].weight)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([3e38] + [-3e38] * 9))
    result = evaluate(model, loader, **how(config))
    assert 1e38 < result["loss"] < 1e39


def test_the_first_module_is_named_also_of_a_compiled_network(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()).eval()
    model[1].running_var.fill_(-1)
    stances = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: stances.append(stance) or torch.no_grad())
    for compiled in (False, True):
        if compiled:
            model.compile(backend="eager")
        with FirstNonFinite(model) as first:
            model.forward(torch.ones(1, 2))
            model[1](model[0](torch.ones(1, 2)))
        assert first.name == "the output of 1, whose running_var has negative values"
        assert not any(module._forward_hooks for module in model.modules())
    assert stances == ["force_eager"]


def test_a_validation_that_is_not_finite_does_not_end_a_run(capsys, monkeypatch, tmp_path):
    """It is saved, reported and not best; metrics.jsonl is strict JSON."""
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)

    def spoiled(network, *arguments, **keywords):
        network.fc.bias.data[0] += math.nan
        try:
            return evaluate(network, *arguments, **keywords)
        finally:
            network.fc.bias.data[0] = 0.0

    monkeypatch.setattr(classification, "evaluate", spoiled)
    overrides = ("train.max_steps=1", "data.workers=0", "train.rules=ema")
    run_train(monkeypatch, "--config", recipe, "--output", folder, *overrides)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning: val at step 1" in line]
    assert f"the logits of {IMAGES} of {IMAGES} images are not finite" in line
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["last.pt", "step-00000001.pt"]
    lines = [
        json.loads(text, parse_constant=pytest.fail) for text in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["val/top1"] is lines[-1]["val_ema/top1"] is lines[-1]["val/loss"] is None


def test_json_is_strict(tmp_path):
    """A NaN is an error, and null where an earlier version wrote one into metrics.jsonl."""
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json({"loss": [number]})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val/loss": NaN}\n{"step": 2, "val/loss": -Infinity}\n{"st')
    lines = runlog._read_lines(tmp_path / "metrics.jsonl")
    assert lines == [{"step": 1, "val/loss": None}, {"step": 2, "val/loss": None}]
