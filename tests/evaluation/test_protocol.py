"""Evaluations: no rule of training applies to them, timm's protocol is timm's own, --data takes every kind of data."""

import json
import math
import socket
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers import small_config
from helpers.commands import call, refuse
from helpers.sets import cifar
from PIL import Image

import eval as eval_command
from lip_resnet import checkpoint
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.sources import named
from lip_resnet.data.transforms import eval_transform
from lip_resnet.evaluation.protocol import EvalConfig, adapt, timm_protocol
from lip_resnet.models import registry
from lip_resnet.models.identify import Network, crop_pct
from lip_resnet.recipe import load_config, shipped_recipes

RECIPES = [path for name, path in shipped_recipes().items() if "_fpn" not in name]


@pytest.fixture
def score(capsys, monkeypatch, tmp_path):
    """Run eval.py in this process: its row."""

    def score_it(*arguments: object) -> dict:
        output = tmp_path / "row.json"
        output.unlink(missing_ok=True)
        code, _, printed = call(capsys, monkeypatch, eval_command, *arguments, "--output", output)
        assert code == 0, printed
        return json.loads(output.read_text())

    return score_it


def save_run(path: Path, **changes: object) -> Path:
    """A checkpoint of a run that was trained by ``small_config`` with changes."""
    config = small_config(**changes)
    torch.manual_seed(0)
    state = timm.create_model(config.model.name, num_classes=config.model.num_classes).state_dict()
    tree = config.model_dump(mode="json")
    checkpoint.save(path, {"model": state, "ema": None, "step": 1, "processes": [1], "config": tree})
    return path


def test_constraints_of_training_do_not_apply_to_evaluation(score, tmp_path):
    """float16 training needs a fused optimizer; a float16 evaluation has no optimizer."""
    path = save_run(tmp_path / "run.pt", optim__name="lamb", data__name="synthetic", data__images=40)
    row = score("--checkpoint", path, "--precision", "float16")
    assert (row["protocol"]["precision"], row["images"]) == ("float16", 4)
    assert row["protocol"]["training"]["optim.name"] == "lamb"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_evaluated_in_every_way(path):
    recipe = EvalConfig.from_recipe(load_config(path))
    for precision in ("float32", "bfloat16", "float16"):
        config, split = adapt(recipe, precision=precision, eval_size=96, eval_resize=100, workers=0)
        assert (config.precision, config.data.eval_size, config.data.workers, split) == (precision, 96, 0, "val")
        assert (config.model, config.data.mean) == (recipe.model, recipe.data.mean)
    for size in (512, 64):  # alone: the crop keeps its share
        data = adapt(recipe, eval_size=size)[0].data
        assert data.eval_resize == math.floor(size * recipe.data.eval_resize / recipe.data.eval_size)
    with pytest.raises(InputError, match="eval_size 512 is larger than eval_resize 511"):
        adapt(recipe, eval_size=512, eval_resize=511)


def test_timm_protocol_is_timms():
    """Every model that timm has weights of: what timm resolves, or a refusal that names the model."""
    refused = {}
    for name in timm.list_pretrained():
        cfg = timm.models.get_pretrained_cfg(name).to_dict()
        resolved = timm.data.resolve_data_config({}, pretrained_cfg=cfg, use_test_size=True)
        try:
            data = timm_protocol(name, cfg).data
        except InputError as error:
            refused[name] = resolved, str(error)
            continue
        assert (3, data.eval_size, data.eval_size) == tuple(resolved["input_size"]), name
        assert data.eval_resize == math.floor(data.eval_size / resolved["crop_pct"]), name
        for key in ("crop_mode", "interpolation", "mean", "std"):
            assert getattr(data, key) == resolved[key], name
    for name, (resolved, message) in refused.items():
        assert message.startswith(f"--model {name}: ")
        assert "\n" not in message
        height, width = resolved["input_size"][1:]
        assert ("give a recipe with --config" in message) == (height != width or resolved["crop_pct"] > 1) is True, name
    # Known values of timm 1.0: a test size of its own, the longer side padded, both sides squashed.
    known = {"resnet50.a1_in1k": (288, 288, "center"), "vit_base_patch16_clip_224.openai": (224, 248, "center")}
    known |= {"eva_large_patch14_336.in22k_ft_in1k": (336, 336, "squash")}
    for name, expected in known.items():
        data = timm_protocol(name, timm.models.get_pretrained_cfg(name).to_dict()).data
        assert (data.eval_size, data.eval_resize, data.crop_mode) == expected


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "pct"), [(32, 1.0), (28, 0.875), (33, 0.9)])
def test_pixels_are_timms(mode, size, pct):
    for seed, shape in enumerate([(40, 60), (61, 37), (50, 50), (20, 90), (9, 7)]):
        pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        theirs = timm.data.create_transform(
            (3, size, size), use_prefetcher=True, crop_pct=pct, crop_mode=mode, interpolation="bicubic", mean=mean
        )
        keys = {"eval_size": size, "eval_resize": math.floor(size / pct), "crop_mode": mode, "mean": mean, "std": std}
        ours = eval_transform(EvalDataConfig(name="digits", interpolation="bicubic", **keys))
        image = Image.fromarray(pixels)
        assert torch.equal(ours(image), torch.as_tensor(theirs(image)))


def test_exported_crop_gives_the_resize_back():
    sizes = [(size, resize) for size in range(32, 400, 7) for resize in range(size, size + 130)]
    assert all(math.floor(size / crop_pct(size, resize)) == resize for size, resize in sizes)
    assert math.floor(224 / (224 / 354)) == 353  # the plain quotient does not
    config = small_config(data__crop_mode="squash", data__eval_resize=36)
    cfg = Network("resnet50", {}, 5).build(config).pretrained_cfg
    assert (cfg["crop_mode"], math.floor(32 / cfg["crop_pct"])) == ("squash", 36)


def test_crops_of_imagenet_c_are_not_cropped_again(tmp_path):
    recipe = timm_protocol("x", {"num_classes": 1000, "input_size": (3, 336, 336), "crop_mode": "squash"})
    assert recipe.data.crop_mode == "squash"
    data = adapt(recipe, "imagenet-c", str(tmp_path))[0].data
    assert (data.eval_size, data.eval_resize, data.crop_mode) == (224, 224, "center")
    data = adapt(recipe, "imagenet-c", str(tmp_path), eval_size=64)[0].data
    assert (data.eval_size, data.eval_resize) == (64, 64)


THREE = {"model__num_classes": 3, "data__eval_resize": 40}


def test_a_table_is_evaluated_elsewhere(score, image_folder, parquet, tmp_path):
    """The same images as class folders and as Parquet files: of a run on tables or on folders, and the other way."""
    changes = {**THREE, "data__root": "/nonexistent"}
    of_tables = save_run(tmp_path / "tables.pt", data__name="huggingface", data__label_column="label", **changes)
    of_folders = save_run(tmp_path / "folders.pt", data__name="folder", **changes)
    expected = score("--checkpoint", of_folders, "--data", image_folder, "--workers", 0)
    assert (expected["images"], expected["protocol"]["data"]) == (11, "folder")
    for arguments in (
        (of_tables, "--data", parquet),
        (of_folders, "--data", parquet),
        (of_tables, "--data", image_folder, "--data-name", "folder"),
    ):
        row = score("--checkpoint", *arguments, "--workers", 0)
        assert all(row[key] == expected[key] for key in ("images", "correct1", "loss"))


def test_a_set_of_torchvision_is_evaluated_elsewhere(score, monkeypatch, tmp_path):
    files = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
    cifar(tmp_path / "moved", 3, "cifar-10-batches-py", files, "labels")
    monkeypatch.setattr(named.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setitem(named.NAMED["cifar10"].images, "val", 4)
    monkeypatch.setattr(named.datasets.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", list("abc")))
    path = save_run(tmp_path / "run.pt", data__name="cifar10", data__root="/nonexistent", **THREE)
    row = score("--checkpoint", path, "--data", tmp_path / "moved", "--workers", 0)
    assert (row["images"], row["protocol"]["data"]) == (4, "cifar10")


def test_shards_behind_a_url_are_evaluated(score, image_folder, served, tmp_path):
    _, url = served
    path = save_run(tmp_path / "run.pt", data__name="folder", data__root="/nonexistent", **THREE)
    expected = score("--checkpoint", path, "--data", image_folder, "--workers", 0)
    for data in (url, f"{url}/val/"):
        row = score("--checkpoint", path, "--data", data, "--workers", 0)
        assert [row[key] for key in ("images", "correct1", "loss")] == [11, expected["correct1"], expected["loss"]]
        assert row["protocol"]["data"] == "shards"


def test_a_size_alone_keeps_the_crops_share(capsys, monkeypatch, tmp_path):
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    save_run(run / "last.pt", data__name="synthetic", data__images=40, data__eval_resize=36)
    code, _, printed = call(capsys, monkeypatch, eval_command, "--checkpoint", run, "--size", 288, "--workers", 0)
    assert (code, printed) == (0, "note: --size 288 keeps the crop's share of the image: --resize 324\n")
    row = json.loads((tmp_path / "run" / "eval.json").read_text())  # RUN/checkpoints is RUN
    assert [row["protocol"][key] for key in ("eval_size", "eval_resize")] == [288, 324]


def test_pretrained_weights_without_a_network(capsys, monkeypatch, image_folder, tmp_path):
    """One line without retries; weights in the cache need no network."""

    def no_network(*arguments, **keywords):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a retry"))
    repository = timm.models.get_pretrained_cfg("test_resnet").hf_hub_id
    options = ("--pretrained", "--model", "test_resnet", "--data", image_folder, "--workers", 0)
    monkeypatch.setattr(registry, "pretrained_cfg", lambda name: {"hf_hub_id": repository, "num_classes": 3})
    line = refuse(capsys, monkeypatch, eval_command, *options)
    assert "model test_resnet: its pretrained weights are neither in the local cache nor to be downloaded" in line
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    state = timm.create_model("test_resnet").state_dict()
    safetensors.torch.save_file(state, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    model = registry.create_pretrained("test_resnet")
    assert torch.equal(model.fc.weight, state["fc.weight"])
    monkeypatch.setattr(registry, "pretrained_cfg", lambda name: {"url": ""})
    with pytest.raises(
        InputError, match=r"no weights of lip_resnet50; .*drive\.google\.com.*; give a file: --checkpoint"
    ):
        registry.create_pretrained("lip_resnet50")


def test_refusals(capsys, monkeypatch, image_folder, tmp_path):
    digits = save_run(tmp_path / "digits.pt")

    def line(*arguments: object) -> str:
        return refuse(capsys, monkeypatch, eval_command, "--checkpoint", digits, *arguments)

    assert "the recipe's data.name is digits, which is not read from a directory" in line("--data", image_folder)
    rootless = small_config(data__name="synthetic", data__root=None, model__num_classes=1000)
    for name in ("imagenet", "imagenet-real", "imagenet-a"):
        with pytest.raises(InputError, match=f"--data is missing: the directory that holds {name}"):
            adapt(EvalConfig.from_recipe(rootless), name)
    assert "--data-name folder belongs to --data DIR" in line("--data-name", "folder")
    assert "imagenet-a must be a local folder" in line("--dataset", "imagenet-a", "--data", "http://127.0.0.1:9/x")
    assert "eval_size 64 is larger than eval_resize 32" in line("--size", 64, "--resize", 32)
    for split in ("train", "validation"):
        (tmp_path / "named" / split / "ant").mkdir(parents=True)
    folder, given = tmp_path / "named", ("--data-name", "folder", "--data")
    assert (
        f"{folder} has no val/ but train/, validation/: give one of these, such as --data {folder}/validation"
        in line(*given, folder)
    )
    (folder / "validation").rename(folder / "Val")
    assert f"{folder} has no val/ but Val/, train/: give one of these, such as --data {folder}/Val" in line(
        *given, folder
    )
    square = line("--model", "vit_base_patch16_sapiens2.fb", "--data", image_folder)
    assert "vit_base_patch16_sapiens2.fb: timm evaluates it on 1024x768 images of 3 channels" in square
