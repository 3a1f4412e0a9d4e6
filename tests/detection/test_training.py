"""A detector trained by train.py: its run folder, a resumed run's bits, and what is refused."""

import json
import re

import pytest
import torch
from helpers import small_config
from helpers.detection import small_detection
from helpers.training import run_train, same

from lip_resnet import checkpoint
from lip_resnet.config import InputError
from lip_resnet.detection.models import build_body, build_detector
from lip_resnet.detection.task import Detection
from lip_resnet.recipe import load_config, load_recipe
from lip_resnet.training import engine
from lip_resnet.training.out_of_memory import suggest

SMALL = {"model__backbone": {"name": "resnet10t"}, "data__size": 32, "data__max_size": 64}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LOSSES = ("loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``start(*arguments, output="run", **changes)`` trains the small recipe, 6 steps; returns the run folder."""

    def run_it(*arguments: str, output: str = "run", **changes: object):
        recipe = tmp_path / f"{output}.yaml"
        recipe.write_text(small_detection(**{**SMALL, **changes}).dump())
        run_train(monkeypatch, "--config", recipe, "--output", tmp_path / output, *arguments)
        return tmp_path / output

    return run_it


def entries(folder) -> dict[str, torch.Tensor]:
    payload = checkpoint.load(folder / "checkpoints" / "last.pt")
    optimizer = payload["optimizer"]["state"].items()
    return {
        **{f"model.{key}": value for key, value in payload["model"].items()},
        **{f"ema.{key}": value for key, value in payload["ema"].items()},
        **{f"optimizer.{key}": value["momentum_buffer"] for key, value in optimizer},
        **{key: torch.tensor(payload[key]) for key in ("step", "evaluated", "best")},
        "window": payload["window"],
    }


def lines(folder) -> list[dict]:
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    times = ("train/images_per_second", "train/data_wait")
    return [{key: value for key, value in line.items() if key not in times} for line in read]


def test_a_run_and_the_same_run_stopped_in_between(start, monkeypatch):
    """Loss parts and AP under their tags; killed within the second epoch and resumed it ends in the same bits."""
    changes = {"optim__accumulate": 2, "train__ema_decay": 0.9, "optim__clip_norm": 10.0, "train__checkpoint_steps": 2}
    changes |= {"data__workers": 1}  # without, loading would seed this process's generator for every image
    whole = start(**changes)
    logged = lines(whole)
    assert [line["step"] for line in logged] == [2, 3, 3, 4, 6, 6]
    for line in logged:
        if "train/lr" in line:
            assert {f"train/{name}" for name in LOSSES} < line.keys()
            assert sum(line[f"train/{name}"] for name in LOSSES[1:]) == pytest.approx(line["train/loss"])
        else:
            assert {f"{kind}/{name}" for kind in ("val", "val_ema") for name in METRICS} <= line.keys()
            assert 0 <= line["val/AP"] <= 100
    assert (whole / "config.yaml").read_text().startswith("task: detection\n")
    assert load_recipe(whole / "config.yaml").data.name == "digit_scenes"
    assert checkpoint.load(whole / "checkpoints" / "last.pt")["datasets"]["train"]["boxes"] > 20

    step, calls = engine.TrainStep.__call__, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine.TrainStep, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            start(output="again", **changes)
    torch.manual_seed(99)
    again = start("--resume", "auto", output="again", **changes)
    assert len(calls) == 6
    same(entries(whole), entries(again))
    assert logged == lines(again)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(start, monkeypatch, capsys):
    """As in classification: skipped, with what was not finite, and its batch saved."""
    forward = Detection.forward

    def spoiled(self, network, images, targets, step, part):
        if step == 1:
            targets = {**targets, "boxes": [boxes * torch.nan for boxes in targets["boxes"]]}
        return forward(self, network, images, targets, step, part)

    monkeypatch.setattr(Detection, "forward", spoiled)
    folder = start("train.on_nonfinite=skip", "train.max_steps=3")
    assert "not finite at step 2" in capsys.readouterr().err
    saved = checkpoint.load(folder / "nonfinite" / "step-00000002-rank0.pt")
    assert saved["images"][0].dtype == torch.uint8
    assert set(saved["labels"][0]) == {"sizes", "boxes", "labels"}
    assert all(value.isfinite().all() for value in entries_without_average(folder).values())


def entries_without_average(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / "last.pt")["model"]


def test_a_checkpoint_of_the_other_task(start, tmp_path, monkeypatch):
    """Named on every way in: as a run to continue, as weights to start from, as weights to evaluate."""
    classifier = tmp_path / "classifier"
    recipe = tmp_path / "classifier.yaml"
    recipe.write_text(small_config(data__batch_size=480).dump())
    run_train(monkeypatch, "--config", recipe, "--output", classifier, "train.max_steps=1")
    detector = start("train.max_steps=1", output="detector")
    last = {folder: folder / "checkpoints" / "last.pt" for folder in (classifier, detector)}
    for folder, path in last.items():
        before = path.read_bytes()
        other = recipe if folder is detector else tmp_path / "detector.yaml"
        task, wanted = ("detection", "classification") if folder is detector else ("classification", "detection")
        line = f"is of task: {task}; here it must be of task: {wanted}"
        for arguments in (["--output", folder, "--resume", "auto"], ["--output", tmp_path / "new", "--resume", path]):
            with pytest.raises(InputError, match=line):
                run_train(monkeypatch, "--config", other, *arguments)
        assert path.read_bytes() == before
    with pytest.raises(InputError, match="is of task: detection; a network starts from the weights of a classif"):
        run_train(monkeypatch, "--config", recipe, "--output", tmp_path / "x", f"model.weights={detector}")
    with pytest.raises(InputError, match="is of task: detection; here it must be of task: classification"):
        load_config(tmp_path / "detector.yaml")


def test_out_of_memory_one_image_at_a_time_is_advised():
    """Not two, as in classification: batch norm has statistics of one image's features."""
    config = small_detection(**SMALL, data__batch_size=2)
    torch.manual_seed(0)
    model = build_detector(config.model, build_body(config.model.backbone))
    state = engine.build_state(model, config, torch.device("cpu"), Detection(config, model, torch.device("cpu")))

    def check(module: torch.nn.Module, inputs: tuple) -> None:
        if len(inputs[0]) > 1:
            raise MemoryError

    model.register_forward_pre_hook(check)
    assert "optim.accumulate=2 keeps data.batch_size=2 and takes 1 images at a time" in suggest(state, config, 10)


def test_a_dry_run_trains_and_writes_nothing(start, capsys):
    assert not start("--dry-run", "model.backbone.downsampling={main: lip_simplified}").exists()
    assert re.search(r"^network   faster_rcnn on resnet10t, [\d,]+ parameters, downsampling: ", capsys.readouterr().out)
    with pytest.raises(InputError, match=r"model.num_classes is 7; the train images have 10 classes: 0, 1, 2"):
        start("--dry-run", "model.num_classes=7")
