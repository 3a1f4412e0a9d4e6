"""Recipes: strict, frozen, and every refusal is one line that names the key and what is allowed."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import small_config
from pydantic import ValidationError

from lip_resnet import DOWNSAMPLING
from lip_resnet.commands.classification import regularisers
from lip_resnet.config import EFFECTS, Config, Effect, InputError
from lip_resnet.data.transforms import TrainTransform
from lip_resnet.models.registry import build_model
from lip_resnet.recipe import find_recipe, load_config, load_recipe, parse_config, parse_recipe
from lip_resnet.training.run_folder import check_same_recipe

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "studies")
DETECTORS = [path for path in SHIPPED if "task: detection" in path.read_text(encoding="utf-8")]
RECIPES = [path for path in SHIPPED if path not in DETECTORS]
MINIMAL = "model: {name: resnet50}\ndata: {root: x, batch_size: 8}\noptim: {lr: 0.1}\ntrain: {epochs: 2}\n"


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipe_loads_and_survives_its_own_dump(path):
    config = load_recipe(path)
    assert parse_recipe(yaml.safe_load(config.dump()), "dump") == config
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("# ")


def test_shipped_recipe_is_found_by_name(tmp_path, monkeypatch):
    """From any folder, with or without .yaml; a file of the working folder comes first, a folder does not."""
    monkeypatch.chdir(tmp_path)
    name = "imagenet/lip_resnet50_step90"
    shipped = ROOT / "configs" / f"{name}.yaml"
    for given in (name, f"{name}.yaml", f"configs/{name}", f"configs/{name}.yaml"):
        assert find_recipe(given).samefile(shipped)
        assert load_config(given) == load_config(shipped)
    with pytest.raises(InputError, match=rf"lip_resnt50.*No such file.*similar name: {name}, [^\n]*$"):
        load_config("imagenet/lip_resnt50_step90")
    with pytest.raises(InputError, match=r"^/data/mine\.yaml: cannot read the recipe: No such file or directory$"):
        load_config("/data/mine.yaml")
    Path(name).mkdir(parents=True)
    assert find_recipe(name).samefile(shipped)
    Path(f"{name}.yaml").write_text(MINIMAL)
    assert find_recipe(name) == find_recipe(f"{name}.yaml") == Path(f"{name}.yaml")
    assert load_config(name).model.name == "resnet50"


def baseline(path: Path) -> Path:
    """The recipe that a LIP recipe, or one of the zoo, is compared with."""
    if path.parent.name in ("zoo", "ablation"):
        return ROOT / "configs" / "imagenet" / "resnet50_step90.yaml"
    return path.with_name(re.sub(r"^lip_|_width\d+|_lip", "", path.name))


COMPARED = [path for path in SHIPPED if "lip_" in f"{path.stem}_" or path.parent.name == "zoo"]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_lip_and_baseline_differ_in_model_alone(path):
    ours, theirs = (yaml.safe_load(p.read_text(encoding="utf-8")) for p in (path, baseline(path)))
    assert ours.pop("model") != theirs.pop("model")
    assert ours == theirs


def test_recipes_of_the_zoo_name_layers():
    recipes = {path.stem.removeprefix("resnet50_") for path in RECIPES if path.parent.name == "zoo"}
    assert recipes < set(DOWNSAMPLING)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_its_model(path):
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config.model, **regularisers(config.train))
    assert model.num_classes == config.model.num_classes
    TrainTransform(config.data)


SECTIONS = {section: field.annotation for section, field in Config.model_fields.items()}
FREE = {
    Effect.EVALUATION: {"data.crop_mode", "data.eval_size", "data.eval_resize", "train.rules"},
    Effect.NOTHING: {
        *("model.weights", "data.root", "data.download", "data.classes", "data.eval_batch_size", "data.workers"),
        *("data.train", "data.val"),
        *("train.eval_every", "train.checkpoint_steps", "train.checkpoint_minutes", "train.keep"),
        *("train.on_write_error", "train.on_nonfinite", "train.nonfinite_limit", "train.hang_minutes"),
        *("train.log_every", "train.log_images", "train.profile", "train.device", "train.grad_checkpointing"),
        *("data.on_error", "model.convert"),
    },
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_says_what_it_changes(section):
    """Once; a new key without a declaration fails here. What is not named above changes the weights."""
    for key, field in SECTIONS[section].model_fields.items():
        declared = [each for each in field.metadata if isinstance(each, Effect)]
        expected = [effect for effect, keys in FREE.items() if f"{section}.{key}" in keys] or [Effect.WEIGHTS]
        assert declared == expected, f"{section}.{key}"
        assert EFFECTS[f"{section}.{key}"] is declared[0]


def test_resuming_takes_every_key_that_changes_no_weights():
    theirs = small_config()
    changed = {
        "data.crop_mode": "squash",
        "data.eval_size": 24,
        "data.eval_resize": 48,
        "train.rules": "ema",
        "train.max_steps": 9,
    }
    changed |= dict.fromkeys(FREE[Effect.NOTHING], 7)
    changed |= {
        "model.weights": "x",
        "data.root": "x",
        "data.download": False,
        "data.classes": None,
        "data.train": [],
        "data.val": [],
    }
    changed |= {"train.on_write_error": "continue", "train.on_nonfinite": "skip"}
    changed |= {"data.on_error": "skip", "model.convert": True, "train.device": "cpu"}
    changed |= {"train.grad_checkpointing": True}
    tree = theirs.model_dump()
    for name, value in changed.items():
        section, key = name.split(".")
        tree[section][key] = value
    tree["train"]["ema_decay"] = 0.9
    ours = parse_config(tree, "changed")
    with pytest.raises(InputError, match=r"with train.ema_decay=None, this recipe says 0.9; choose another --output"):
        check_same_recipe(ours, theirs, "it")
    check_same_recipe(ours, small_config(train__ema_decay=0.9), "it")


def test_config_is_frozen(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0


def test_scientific_notation_is_a_number(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["optim.weight_decay=1e-4", "optim.lr=5E-2"])
    assert (config.optim.weight_decay, config.optim.lr) == (1e-4, 0.05)


def test_overrides_reach_nested_keys(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["model.args.bottleneck_width=64", "data.crop_scale=[0.5, 1]"])
    assert config.model.args == {"bottleneck_width": 64}
    assert config.data.crop_scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            MINIMAL.replace("0.1", "0.1, accumulate: 2").replace(
                "epochs: 2}", "epochs: 2, compile: true, compile_mode: max-autotune}"
            ),
            ["compile_mode max-autotune with optim.accumulate 2", "default"],
        ),
        ("", ["an empty file", "model, data, optim, train"]),
        ("- a\n- b\n", ["a list"]),
        ("just words", ["a str"]),
        (b"\xff\xfe\x00\x01binary\x00", ["not a text file"]),
        ("a: [1, 2", ["line"]),
        ("a: !!python/object/apply:os.system ['true']", ["could not determine a constructor"]),
        (MINIMAL + "train: {epochs: 3}\n", ["duplicate key 'train'"]),
        (MINIMAL.replace("lr: 0.1", "lr: 0.1, lr: 0.2"), ["duplicate key 'lr'"]),
        (MINIMAL.replace("lr:", "lrr:"), ["optim.lrr: unknown key; did you mean optim.lr?; also optim.lr: missing"]),
        (MINIMAL.replace("train:", "training:"), ["training: unknown key; did you mean train?; also train: missing"]),
        (
            MINIMAL.replace("batch_size: 8", "batchsize: 8, lr: 1"),
            ["data.batch_size?", "optim.lr?", "miss"],
        ),
        (MINIMAL.replace("{lr: 0.1}", "null"), ["optim: given None (NoneType); write it as optim: {lr: ...}"]),
        (MINIMAL.replace("{lr: 0.1}", "{lr: 0.1, momentun: 0.9}"), ["optim.momentun: unknown key", "optim.momentum?"]),
        (MINIMAL + "modle: {}\n", ["modle: unknown key", "model?"]),
        (MINIMAL.replace("lr: 0.1", "lr: fast"), ["optim.lr", "'fast'", "number"]),
        (MINIMAL.replace("lr: 0.1", "lr: .nan"), ["optim.lr", "nan"]),
        (MINIMAL.replace("lr: 0.1", "lr: .inf"), ["optim.lr", "inf"]),
        (MINIMAL.replace("lr: 0.1", "lr: -1"), ["optim.lr", "-1", "greater than 0"]),
        (MINIMAL.replace("batch_size: 8", "batch_size: -8"), ["data.batch_size", "-8", "greater than 0"]),
        (MINIMAL.replace("batch_size: 8", "batch_size: 8.5"), ["data.batch_size", "8.5", "integer"]),
        (MINIMAL.replace("epochs: 2", "epochs: on"), ["train.epochs", "True", "integer"]),
        (MINIMAL.replace("root: x", "root: 3"), ["data.root", "3", "string"]),
        (MINIMAL.replace("root: x, ", ""), ["data: root is missing"]),
        (MINIMAL.replace("model: {name: resnet50}", "model: 3"), ["model", "3"]),
    ],
)
def test_bad_recipe(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert "recipe.yaml" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lr"], ["section.key=value"]),
        (["=3"], ["section.key=value"]),
        (["lr=3"], ["section.key=value"]),
        (["optim.lr.deep=3"], ["lr is not a section"]),
        (["optim.lr=[1"], ["override"]),
        (["optim.schedule=poly"], ["'poly'", "cosine"]),
        (["optim.schedule=step"], ["milestones"]),
        (["optim.schedule=step", "optim.milestones=[5]"], ["milestones are [5]", "below train.epochs 2"]),
        (["optim.schedule=step", "optim.milestones=[1, 1]"], ["must rise"]),
        (["optim.milestones=[1]"], ["schedule"]),
        (["optim.warmup_epochs=2"], ["warmup_epochs is 2", "below train.epochs 2"]),
        (["optim.nesterov=true", "optim.momentum=0"], ["nesterov"]),
        (["train.precision=float16", "optim.name=lamb"], ["float16", "lamb", "sgd or adamw"]),
        (["train.rules=ema"], ["ema_decay"]),
        (["optim.name=lionn"], ["recipe.yaml: optim.name: unknown optimizer 'lionn'; near names: lion, "]),
        (["optim.name=AdamW"], ["unknown optimizer 'AdamW'; near names: adamw, "]),
        (["optim.name=lookahead_sdg"], ["unknown optimizer 'lookahead_sdg'"]),
        (["optim.name=3"], ["optim.name: given 3 (int)"]),
        (["optim.name=adahessian"], ["adahessian needs second derivatives"]),
        (["optim.name=kronw"], ["kronw draws random numbers", "could not be resumed"]),
        (["optim.args={foreach: true}"], ["args are for timm's other optimizers; sgd has keys of its own"]),
        (["optim.name=lion", "optim.args={lr: 1}"], ["args: lr cannot be set there"]),
        (["optim.name=lion", "optim.betas=[0.9, 0.99]"], ["for lion write args: {betas: [0.9, 0.99]}"]),
        (["optim.layer_decay=0"], ["optim.layer_decay", "greater than 0"]),
        (["train.freeze_epochs=3", "model.weights=x"], ["freeze_epochs is 3; it must be at most train.epochs 2"]),
        (["train.freeze_epochs=1"], ["train.freeze_epochs needs model.weights"]),
        (["data.auto_augment=ra", "data.rand_augment=rand-m9"], ["auto_augment ra and rand_augment rand-m9", "one of"]),
        (["data.auto_augment=ra", "data.decode=gpu"], ["auto_augment needs decode: exact or fast"]),
        (["data.crop_scale=[0.9, 0.1]"], ["crop_scale"]),
        (["data.eval_size=300"], ["eval_size 300", "eval_resize 256"]),
        (["data.std=[0, 1, 1]"], ["std"]),
        (["data.mean=[123.7, 116.3, 103.5]"], ["mean is [123.7, 116.3, 103.5]", "[0, 1]", "by 255"]),
        (["data.std=[0.2, 57.1, 0.2]"], ["std is", "by 255"]),
        (["data.mean=[-0.1, 0, 0]"], ["mean is [-0.1, 0.0, 0.0]", "[0, 1]"]),
        (["optim.min_lr=1.0"], ["min_lr"]),
        (["data.flip=1.5"], ["data.flip", "1.5"]),
        (["data.mean=0.5"], ["data.mean: given 0.5 (float); write it as mean: [0.485, 0.456, 0.406]"]),
        (["data.mean=[0.5, 0.5]"], ["data.mean: given [0.5, 0.5] (list); write it as mean: [0.485"]),
        (["data.std=[1, 1, 1, 1]"], ["data.std: given [1, 1, 1, 1] (list); write it as std: [0.229"]),
        (["optim.betas=0.9"], ["write it as betas: [0.9, 0.999]"]),
        (["optim.milestones=30"], ["write it as milestones: [30, 60, 80]"]),
        (
            ["data.size_schedule=[[5]]"],
            ["data.size_schedule: given [5] (list); write it as size_schedule: [[0, 128]"],
        ),
        (
            ["model.downsampling=3"],
            ["model.downsampling: given 3", "it must be a layer, a preset, or a mapping such as"],
        ),
        (["model.args=64"], ["write it as args: {bottleneck_width: 64}"]),
        (["optim.clip_norm=None"], ["optim.clip_norm: given None", "write null"]),
        (["model.weights=None"], ["model.weights: given None", "write null"]),
        (["model.args.gate=None"], ["model.args.gate: given None", "write null"]),
        (["train.max_steps=none"], ["train.max_steps: given 'none'", "null"]),
        (["data.size_schedule=[[0, 64], [2, 96]]"], ["changes at epoch 2, which is never reached", "train.epochs 2"]),
    ],
)
def test_bad_override(tmp_path, overrides, words):
    message = refusal(tmp_path, MINIMAL, *overrides)
    for word in words:
        assert word in message


def test_a_schedule_in_a_checkpoint_is_not_checked_for_its_reach():
    """Runs of earlier versions may hold one that ends after the run."""
    tree = small_config().model_dump() | {"train": {"epochs": 2}}
    tree["data"]["size_schedule"] = [[5, 32]]
    assert parse_config(tree, "last.pt").data.size_at(5) == 32


def test_missing_recipe(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="directory"):
        load_config(tmp_path)


def test_deeply_nested_yaml_is_refused(tmp_path):
    refusal(tmp_path, "[" * 3000)


def test_defaults_are_finite():
    config = load_config(RECIPES[0])
    for section in config.model_dump().values():
        for value in section.values():
            assert not isinstance(value, float) or math.isfinite(value)
