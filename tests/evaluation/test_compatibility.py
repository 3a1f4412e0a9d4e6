"""eval.py: weights are evaluated as they were trained, by the description in their file, or not at all."""

import functools
import json
from typing import Any

import pytest
import torch
from helpers import small_config
from helpers.commands import call, refuse
from timm.data import ImageNetInfo

import eval as eval_command
from lip_resnet import checkpoint
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data import class_names
from lip_resnet.data.sources.base import Files
from lip_resnet.evaluation.compatibility import check_set
from lip_resnet.evaluation.evaluate import evaluate_reference
from lip_resnet.evaluation.protocol import reference_protocol
from lip_resnet.evaluation.testsets import EvalSet, wnids
from lip_resnet.models import registry

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def evaluate(capsys, monkeypatch):
    return functools.partial(call, capsys, monkeypatch, eval_command)


@pytest.fixture
def run(tmp_path, image_folder):
    """``run(classes, **changes)``: a run folder of the recipe, trained on these classes."""

    def write(classes: list[str] | None = None, **changes: Any) -> Any:
        changes = {"data__name": "folder", "data__root": str(image_folder), "model__num_classes": 3, **changes}
        config = small_config(**changes)
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        payload = {"model": registry.build_model(config.model).state_dict(), "ema": None, "step": 1, "processes": [1]}
        payload |= {"config": config.model_dump(mode="json")} | ({"class_names": classes} if classes else {})
        checkpoint.save(tmp_path / "run" / "checkpoints" / "last.pt", payload)
        return tmp_path / "run"

    return write


def test_another_network_or_normalisation_is_refused(run, evaluate, capsys, monkeypatch, tmp_path, image_folder):
    folder = run(NAMES, model__downsampling={"main": "blur"}, data__mean=[0.5, 0.5, 0.5])
    recipe = tmp_path / "plain.yaml"
    changes = {"data__name": "folder", "data__root": str(image_folder), "model__num_classes": 3}
    for mean, words in (
        ([0.5, 0.5, 0.5], "trained as another network, test_resnet, model.downsampling={'main': 'blur'}: "),
        ([0.4, 0.5, 0.5], "was trained with data.mean=[0.5, 0.5, 0.5], here it is [0.4, 0.5, 0.5]; evaluate it by"),
    ):
        recipe.write_text(small_config(**changes, data__mean=mean).dump())
        output = ("--output", tmp_path / "row.json")
        line = refuse(capsys, monkeypatch, eval_command, "--config", recipe, "--checkpoint", folder, *output)
        assert words in line
    line = refuse(
        capsys, monkeypatch, eval_command, "--model", "test_resnet", "--checkpoint", folder, "--data", image_folder
    )
    assert "was trained with data.std=" in line
    code, out, err = evaluate("--checkpoint", folder)
    assert (code, "* Acc@1" in out) == (0, True), err
    assert json.loads((folder / "eval.json").read_text())["downsampling"] == {"main": "blur"}


def test_other_classes_are_refused(run, evaluate, capsys, monkeypatch, image_folder, parquet):
    folder = run(["ant", "cow", "dog"], data__mean=[0.5, 0.5, 0.5])
    for data in (image_folder, parquet):
        line = refuse(capsys, monkeypatch, eval_command, "--checkpoint", folder, "--data", data)
        assert "was trained on other classes: 2 of 3 differ, such as 'cow' there and 'bee' in these data" in line
    payload = checkpoint.load(folder / "checkpoints" / "last.pt")
    config = reference_protocol("test_resnet", 3, checkpoint.read_recipe(payload, "it"))
    assert config.data.mean == (0.5, 0.5, 0.5)  # not ImageNet's
    model = registry.build_model(config.model)
    with pytest.raises(InputError, match="2 of 3 differ"):
        evaluate_reference(model, config, str(image_folder), 0, payload=payload)
    for classes in (NAMES, None):  # as are those of older checkpoints, which have no names
        run(classes)
        code, _, err = evaluate("--checkpoint", folder, "--data", image_folder, "--output", folder / f"{classes}.json")
        assert code == 0, err


def test_names_that_are_numbers_or_words(tmp_path):
    """ImageNet-V2's folders are numbers, shards may have no names, and tables have ImageNet's classes in words."""
    known, config = wnids(), EvalDataConfig(root=".")
    words, numbers = ImageNetInfo().label_descriptions(), [str(label) for label in range(1000)]

    def check(
        trained: list[str], name: str, classes: list[str], indices: list[int] | None = None, kind: str = "folder"
    ):
        source = Files(tmp_path, classes, [])
        check_set(
            {"class_names": trained}, EvalSet(name, source, config.model_copy(update={"name": kind}), {}, indices), "it"
        )

    check(known, "imagenet-v2", numbers)
    check(known, "shards", numbers, kind="shards")
    check(words, "imagenet", known)
    check(known, "huggingface", words, kind="huggingface")
    check(known, "imagenet-a", known[3:9], list(range(3, 9)))
    for trained, name, classes in (
        (numbers, "imagenet-v2", numbers),  # a run on another set whose classes are numbers
        (known, "folder", numbers),
        (known[1:] + known[:1], "imagenet", known),
        (words[1:] + words[:1], "imagenet", known),
    ):
        with pytest.raises(InputError, match="it was trained on other classes"):
            check(trained, name, classes)
    with pytest.raises(InputError, match="6 of 6 differ"):
        check(known, "imagenet-a", known[3:9], list(range(4, 10)))
    digits = Files(tmp_path, numbers[:10], [])
    assert class_names(digits, "digits") == numbers[:10]  # the digits' names are numbers
    assert class_names(digits, "shards") is None


def test_only_averaged_weights(run, evaluate, capsys, monkeypatch):
    folder = run(NAMES)
    path = folder / "average.pth"
    torch.save({"state_dict_ema": checkpoint.load(folder / "checkpoints" / "last.pt")["model"]}, path)
    recipe = folder / "config.yaml"
    recipe.write_text(small_config(model__num_classes=3).model_copy().dump())
    line = refuse(capsys, monkeypatch, eval_command, "--config", recipe, "--checkpoint", path, "--weights", "model")
    assert "holds only averaged (EMA) weights" in line
