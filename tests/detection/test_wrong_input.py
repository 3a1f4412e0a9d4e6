"""What a user can get wrong with detectors: one line, exit code 2 and nothing written, of every command."""

import json
from pathlib import Path

import predict
import probe
import pytest
import reproduce_paper
import show_detections
import torch
import verify_checkpoint
from helpers import small_config
from helpers.commands import call, refuse
from helpers.detection import small_detection
from PIL import Image

import eval as eval_command
import lip_resnet
import train
from lip_resnet import checkpoint
from lip_resnet.config import InputError
from lip_resnet.detection.models import build_body, build_detector
from lip_resnet.models import registry


def write_set(root: Path) -> None:
    """Two images of two classes in COCO's layout, to train and to evaluate."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 64, "height": 48} for number in (1, 2)]
    boxes = [
        {"id": number, "image_id": number, "category_id": number, "bbox": [4, 4, 20, 30], "area": 600}
        for number in (1, 2)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 2)]
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for image in images:
            Image.new("RGB", (64, 48)).save(root / split / image["file_name"])
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def save(path: Path, config, model: torch.nn.Module) -> Path:
    payload = {"model": model.state_dict(), "step": 1, "processes": [1], "config": config.model_dump(mode="json")}
    checkpoint.save(path, payload)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A set in COCO's layout, and a checkpoint of each task."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "coco").mkdir()
    write_set(folder / "coco")
    data = {"data__name": "coco", "data__root": str(folder / "coco"), "data__batch_size": 2}
    detection = small_detection(model__backbone={"name": "resnet10t"}, model__num_classes=2, **data)
    classification = small_config()
    (folder / "detector.yaml").write_text(detection.dump())
    model = build_detector(detection.model, build_body(detection.model.backbone))
    save(folder / "detector.pt", detection, model)
    save(folder / "classifier.pt", classification, registry.build_model(classification.model))
    torch.save(registry.build_model(classification.model).state_dict(), folder / "bare.pt")
    return {path.stem if path.suffix != ".yaml" else "recipe": path for path in folder.iterdir()}


def replaced(old: str, new: str):
    def alter(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return alter


BAD_SETS = {
    "has no annotations/": None,
    "not JSON, damaged or cut short": lambda text: text[: len(text) // 2],
    "annotations are captions, not boxes": replaced('"bbox": [4, 4, 20, 30]', '"caption": "a cat"'),
    "no categories;": replaced('"categories"', '"classes"'),
    "9.png: no such file; 1 of the 2 images listed": replaced("2.png", "9.png"),
    "boxes outside their images": replaced("[4, 4, 20, 30]", "[64, 4, 20, 30]"),
    "category_id 7 is none of its 2 categories": replaced('"category_id": 1', '"category_id": 7'),
}


@pytest.mark.parametrize("line", BAD_SETS)
def test_a_bad_set(files, tmp_path, capsys, monkeypatch, line):
    """Given to train.py and to eval.py."""
    write_set(tmp_path)
    for file in (tmp_path / "annotations").iterdir():
        if BAD_SETS[line] is None:
            file.unlink()
        else:
            file.write_text(BAD_SETS[line](file.read_text()))
    if BAD_SETS[line] is None:
        (tmp_path / "annotations").rmdir()
    before = set(tmp_path.iterdir())
    command = ("--config", files["recipe"], "--output", tmp_path / "run", f"data.root={tmp_path}")
    assert line in refuse(capsys, monkeypatch, train, *command)
    outputs = ("--output", tmp_path / "row.json", "--predictions", tmp_path / "b.json", "--matches", tmp_path / "m.npz")
    command = ("--checkpoint", files["detector"], "--data", tmp_path, *outputs)
    assert line in refuse(capsys, monkeypatch, eval_command, *command)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.num_classes=1", "model.num_classes is 1; the train images have 2 classes"),
        ("model.backbone.name=vit_tiny_patch16_224", "has features at 16; a detector needs a network with features at"),
        ("optim.accumulate=2 data.batch_size=3", "batch_size 3 does not divide by 1 process"),
        ("model.backbone.weights={classifier}", "classifier.pt"),
        ("model.backbone.weights={bare}", "bare.pt"),
        (
            "model.backbone.weights=none.pth",
            "model.backbone.weights: none.pth: no such file; scripts/fetch_released.py",
        ),
        ("model.backbone.weights={detector}", "detector.pt is of task: detection; a network starts from the weights"),
    ],
)
def test_a_recipe_that_does_not_fit(files, tmp_path, capsys, monkeypatch, override, line):
    overrides = override.format(**files).split()
    command = ("--config", files["recipe"], "--output", tmp_path / "run", *overrides)
    assert line in refuse(capsys, monkeypatch, train, *command)
    assert not any(tmp_path.iterdir())


def test_a_classifier_is_no_detector(files, tmp_path, capsys, monkeypatch):
    wanted = "is of task: classification; here it must be of task: detection"
    recipe, output = ("--config", files["recipe"]), ("--output", tmp_path / "out")
    for module, arguments, line in (
        (eval_command, ("--checkpoint", files["classifier"], *recipe, *output), wanted),
        (eval_command, ("--checkpoint", files["bare"], *recipe, *output), "bare.pt"),
        (show_detections, ("--checkpoint", files["classifier"], *output), wanted),
        (show_detections, ("--checkpoint", files["bare"], *output), "bare.pt has no recipe; add --config FILE"),
        (eval_command, ("--checkpoint", files["classifier"], "--matches", tmp_path / "m.npz"), "--matches is for"),
        (eval_command, ("--checkpoint", files["classifier"], "--intervals"), "--intervals is for detectors"),
        (
            eval_command,
            ("--checkpoint", files["classifier"], "--predictions", tmp_path / "p.json", *output),
            "the file is written as .csv",
        ),
    ):
        assert line in refuse(capsys, monkeypatch, module, *arguments), arguments
    assert not any(tmp_path.iterdir())


def test_a_detector_is_no_classifier(files, tmp_path, capsys, monkeypatch):
    wanted = "detector.pt is of task: detection; here it must be of task: classification"
    picture = files["coco"] / "val2017" / "1.png"
    named = f"lip_resnet50={files['detector']}"
    for module, arguments in (
        (eval_command, ("--checkpoint", files["detector"], "--config", "digits/resnet50")),
        (predict, (files["detector"], picture)),
        (probe, ("shift", files["detector"], "--output", tmp_path / "row.json")),
        (reproduce_paper, ("--checkpoints", named, "--data", files["coco"], "--output", tmp_path / "report")),
        (verify_checkpoint, (files["detector"], "--export", tmp_path / "exported")),
    ):
        code, _, printed = call(capsys, monkeypatch, module, *arguments)
        assert (code, len(printed.splitlines())) == (2, 1), printed
        assert wanted in printed
    with pytest.raises(InputError, match=wanted):
        lip_resnet.load_run(files["detector"])
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
