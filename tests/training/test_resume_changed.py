"""Runs continued with other data, another evaluation or without their files: what is refused, and what is not."""

import json
import shutil

import pytest
import run_contents
import safetensors.torch
import torch
from helpers import small_config
from helpers.commands import call

import eval as eval_command
from lip_resnet import checkpoint, distributed
from lip_resnet.commands import classification
from lip_resnet.commands.initial_weights import load_initial_weights
from lip_resnet.config import InputError, ModelConfig
from lip_resnet.evaluation.protocol import describe_training, difference
from lip_resnet.models import registry
from lip_resnet.recipe import parse_config
from lip_resnet.training import run


def test_other_data_are_refused(start, monkeypatch):
    """The order of every epoch would be another, and so would the length of the schedule."""
    start("train.max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(classification, "describe_datasets", lambda *_: {"train": {"images": 12}})
        with pytest.raises(InputError, match="was trained with other data: images of train: 1442, here 12"):
            start("--resume", "auto")
    start("--resume", "auto")
    assert run_contents.take_inventory(start.folder).newest == 8


def test_a_process_with_other_files_is_refused(monkeypatch):
    """An incomplete copy of the data on one machine, while rank 0 sees all 1442 images."""
    described = {"train": {"images": 1442}, "val": {"images": 355}}
    monkeypatch.setattr(distributed, "on_main", lambda _: described)
    assert run.describe_datasets(range(1442), range(355)) == described
    with pytest.raises(InputError, match=r"data\.root: 354 val images here, 355 on rank 0"):
        run.describe_datasets(range(1442), range(354))


def test_selections_are_compared_by_their_images(start, image_folder, tmp_path):
    """A copy of the `data.classes` file elsewhere continues a run and gives a delta; another selection does not."""
    lists = {
        "first": "ant_0.JPEG\ncat_2.JPEG\n",
        "copy": "# the same\ncat/cat_2.JPEG\nant/ant_0.JPEG\n",
        "other": "ant_3.JPEG\ncat_5.JPEG\n",
    }
    for name, text in lists.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "classes.txt").write_text(text)
    data = ["data.name=folder", f"data.root={image_folder}", "data.batch_size=2", "model.num_classes=2"]

    def training(name: str, folder: str, *arguments: str) -> dict:
        start(*data, f"data.classes={tmp_path / name}/classes.txt", "--output", str(tmp_path / folder), *arguments)
        payload = checkpoint.load(tmp_path / folder / "checkpoints" / "last.pt")
        config = parse_config(payload["config"], name)
        assert describe_training(config, [1])["data.classes"] == f"{tmp_path / name}/classes.txt"  # older checkpoints
        return describe_training(config, payload["processes"], None, payload["datasets"])

    begun = training("first", "run", "train.max_steps=1")
    with pytest.raises(InputError, match="was trained with other data: names of train: sha256:"):
        training("other", "run", "--resume", "auto", "train.max_steps=2")
    resumed = training("copy", "run", "--resume", "auto", "train.max_steps=2")
    other = training("other", "another run", "train.max_steps=1")
    assert difference({"training": begun}, {"training": {**resumed, "train.max_steps": 1}}) is None
    assert difference({"training": begun}, {"training": other}).startswith("data.classes: sha256:")


def test_skipped_images_are_counted_across_starts(start, image_folder, tmp_path):
    """One of the pictures does not decode: each of two epochs meets it once, whatever stops in between."""
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    (root / "train" / "ant" / "ant_0.JPEG").write_bytes(b"no picture")
    data = ["data.name=folder", f"data.root={root}", "data.batch_size=23", "data.on_error=skip", "model.num_classes=3"]
    start(*data, "train.max_steps=1", "train.log_every=1")
    start(*data, "--resume", "auto", "train.max_steps=2", "train.log_every=1")
    lines = [line for line in run_contents.read_metrics(start.folder)[0] if "train/skipped" in line]
    assert [(line["step"], line["train/skipped"]) for line in lines] == [(1, 1), (2, 2)]


def test_another_evaluation_chooses_best_afresh(start, patient):
    """A figure at 32 pixels says nothing about one at 24."""
    start("train.max_steps=4")
    before = checkpoint.load(start.folder / "checkpoints" / "best.pt")
    assert before["best"] > 0
    torch.save({**before, "best": 99.0}, start.folder / "checkpoints" / "last.pt")
    start("--resume", "auto", "data.eval_size=24", "data.eval_resize=24")
    after = checkpoint.load(start.folder / "checkpoints" / "best.pt")
    assert after["step"] == 8
    assert after["best"] < 99


def test_fine_tuning_records_its_start_and_resumes_without_the_file(start, patient):
    """Three runs in a row: each knows how the weights that it began from were trained, and where theirs began."""
    folders = [start.folder.with_name(name) for name in ("first", "second", "third")]
    start("--output", str(folders[0]), "train.max_steps=2")
    overrides = ["model.new_head=true", "optim.lr=0.01", "train.max_steps=2"]
    start("--output", str(folders[1]), f"model.weights={folders[0]}", *overrides)
    start("--output", str(folders[2]), f"model.weights={folders[1]}", *overrides)
    shutil.rmtree(folders[0])
    shutil.rmtree(folders[1])
    resume = ["--resume", "auto", "train.max_steps=4"]
    start("--output", str(folders[2]), f"model.weights={folders[1]}", *overrides, *resume)
    last = checkpoint.load(folders[2] / "checkpoints" / "last.pt")
    assert last["step"] == 4
    second = last["initial_weights"]["training"]
    assert (second["optim.lr"], second["step"], second["model.new_head"]) == (0.01, 2, True)
    assert (second["model.weights"]["optim.lr"], second["model.weights"]["model.weights"]) == (0.05, None)
    environment = json.loads((folders[2] / "env.json").read_text())
    assert environment["initial_weights"] == environment["earlier"][0]["initial_weights"] == last["initial_weights"]
    with pytest.raises(InputError, match="no such file"):
        start("--output", str(folders[0]), f"model.weights={folders[1]}", *overrides)


def test_a_selection_is_in_the_checkpoint(start, image_folder, tmp_path, monkeypatch, capsys):
    """The `data.classes` file is not needed to continue the run, here or elsewhere, nor to evaluate it."""
    selection = tmp_path / "classes.txt"
    selection.write_text("ant_0.JPEG\ncat_2.JPEG\n")
    data = ["data.name=folder", f"data.root={image_folder}", "data.batch_size=2", "model.num_classes=2"]
    data += [f"data.classes={selection}"]
    start(*data, "train.max_steps=1")
    selection.unlink()
    last, other = start.folder / "checkpoints" / "last.pt", tmp_path / "other"
    start(*data, "--resume", str(last), "--output", str(other))
    start(*data, "--resume", "auto")
    for folder in (start.folder, other):
        payload = checkpoint.load(folder / "checkpoints" / "last.pt")
        assert (payload["step"], payload["class_names"]) == (2, ["ant", "cat"])
    with pytest.raises(InputError, match=r"data.classes: cannot read .*classes.txt: No such file"):
        start(*data, "--output", str(tmp_path / "new"))
    code, out, err = call(capsys, monkeypatch, eval_command, "--checkpoint", other)
    assert (code, "* Acc@1" in out) == (0, True), err
    row = json.loads((other / "eval.json").read_text())
    assert (row["images"], row["dataset"]["classes"]) == (7, 2)


def test_a_bad_validation_image_costs_no_epoch(start, image_folder, tmp_path):
    """It ends the run in the evaluation; what was trained is saved. Once mended, the run goes on."""
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    bad = root / "val" / "ant" / "ant_0.JPEG"
    picture = bad.read_bytes()
    bad.write_bytes(b"no picture")
    data = ["data.name=folder", f"data.root={root}", "data.batch_size=23", "model.num_classes=3"]
    with pytest.raises(InputError, match=r"ant_0.JPEG"):
        start(*data)
    inventory = run_contents.take_inventory(start.folder)
    assert (inventory.newest, inventory.steps) == (1, {"last.pt": 1, "step-00000001.pt": 1})
    bad.write_bytes(picture)
    neutral = [  # keys that change no result
        "data.eval_batch_size=3",
        "train.eval_every=2",
        "data.on_error=skip",
        "train.on_nonfinite=skip",
    ]
    start(*data, "--resume", "auto", *neutral)
    lines = run_contents.read_metrics(start.folder)[0]
    assert [line["step"] for line in lines if "val/loss" in line] == [2]
    assert run_contents.take_inventory(start.folder).steps["best.pt"] == 2


def test_advice_fits_the_call(start, tmp_path):
    """--output cannot help where it is another one already."""
    start("train.max_steps=1")
    with pytest.raises(
        InputError, match=r"recipe says 0.1; choose another --output, or continue it with optim.lr=0.05$"
    ):
        start("--resume", "auto", "optim.lr=0.1")
    last = start.folder / "checkpoints" / "last.pt"
    with pytest.raises(
        InputError, match=r"says 0.1; start from its weights with model.weights=\S*last.pt, or continue it"
    ):
        start("--resume", str(last), "--output", str(tmp_path / "other"), "optim.lr=0.1")


@pytest.fixture
def trained_on_animals(tmp_path):
    """A file that says how it was trained, on three classes with pixels of mean 0.5."""
    config = small_config(model__num_classes=3, data__mean=[0.5, 0.5, 0.5])
    payload = {"model": registry.build_model(config.model).state_dict(), "ema": None, "step": 1, "processes": [1]}
    payload |= {"config": config.model_dump(mode="json"), "class_names": ["ant", "bee", "cat"]}
    checkpoint.save(tmp_path / "animals.pt", payload)
    return tmp_path / "animals.pt"


def test_starting_weights_of_other_classes_or_another_normalisation(trained_on_animals, image_folder):
    """Refused, unless the recipe says that it fine-tunes or converts."""
    config = ModelConfig(name="test_resnet", num_classes=3, weights=str(trained_on_animals))
    data = small_config(data__mean=[0.5, 0.5, 0.5]).data

    def load(data, classes, **changes):
        return load_initial_weights(registry.build_model(config), config.model_copy(update=changes), data, classes)

    assert load(data, ["ant", "bee", "cat"])["training"]["step"] == 1
    load(data, None)
    with pytest.raises(
        InputError, match=r"other classes: 2 of 3 differ, such as 'bee' there and 'cow' .*new_head: true"
    ):
        load(data, ["ant", "cow", "dog"])
    load(data, ["ant", "cow", "dog"], new_head=True)
    other = small_config().data
    with pytest.raises(InputError, match=r"data.mean=\[0.5, 0.5, 0.5\], here it is \[0.485, .*model.convert: true"):
        load(other, ["ant", "bee", "cat"])
    load(other, ["ant", "bee", "cat"], convert=True)


def test_fine_tuning_is_compared_by_the_weights_not_by_their_file(trained_on_animals, tmp_path):
    """The same tensors in any file give a delta; other weights of unknown training do not."""
    payload = checkpoint.load(trained_on_animals)
    plain, exported, other = tmp_path / "plain.pth", tmp_path / "copy" / "weights.bin", tmp_path / "other.pth"
    exported.parent.mkdir()
    torch.save({"state_dict": {f"module.{key}": value for key, value in payload["model"].items()}}, plain)
    safetensors.torch.save_file(payload["model"], exported)
    torch.save({key: value + 1 for key, value in payload["model"].items()}, other)

    def training(path):
        config = ModelConfig(name="test_resnet", num_classes=3, weights=str(path))
        record = load_initial_weights(registry.build_model(config), config)
        recipe = small_config(model__num_classes=3, model__weights=str(path))
        return {"training": describe_training(recipe, [1], record)}

    described = [training(path) for path in (trained_on_animals, plain, exported)]
    assert [difference(described[0], each) for each in described] == [None] * 3
    assert "two different files" in difference(described[1], training(other))
    of_two_starts = [
        {"training": {**described[0]["training"], "model.weights": each["training"]}} for each in described
    ]
    assert difference(of_two_starts[0], of_two_starts[2]) is None  # the start of the start
