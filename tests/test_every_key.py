"""Every key of a recipe, one by one: what training depends on is refused on resume and gives no delta between rows."""

import pytest
from helpers import small_config

from lip_resnet.config import EFFECTS, Config, Effect, EvalDataConfig, InputError
from lip_resnet.evaluation.protocol import EvalConfig, adapt, describe_protocol, describe_training, difference
from lip_resnet.evaluation.tables import build_table, group
from lip_resnet.recipe import parse_config
from lip_resnet.training.run_folder import check_same_recipe

WEIGHTS = {
    "model.name": "resnet18", "model.num_classes": 9, "model.args": {"width": 3}, "model.downsampling": {"stem": "max"},
    "model.new_head": True,
    "data.name": "synthetic", "data.label_column": "label", "data.images": 99, "data.interpolation": "bicubic",
    "data.mean": [0.5, 0.5, 0.5], "data.std": [0.5, 0.5, 0.5], "data.batch_size": 60, "data.last_batch": "drop",
    "data.repeats": 2, "data.size": 40, "data.size_schedule": [[1, 24]], "data.decode": "fast",
    "model.circular_padding": True, "data.crop_scale": [0.5, 1.0], "data.crop_ratio": [1.0, 1.0], "data.flip": 0.5,
    "data.color_jitter": 0.4, "data.rand_augment": "rand-m7", "data.random_erasing": 0.25,
    "optim.name": "lamb", "optim.lr": 0.2, "optim.momentum": 0.8, "optim.nesterov": True, "optim.betas": [0.8, 0.9],
    "optim.weight_decay": 0.2, "optim.decay": "matrices", "optim.schedule": "linear", "optim.milestones": [1],
    "optim.gamma": 0.2, "optim.min_lr": 0.01, "optim.warmup_epochs": 1.0, "optim.accumulate": 2, "optim.clip_norm": 1.0,
    "train.epochs": 3, "train.freeze_epochs": 1, "train.seed": 7, "train.max_steps": 5, "train.precision": "bfloat16",
    "train.channels_last": False, "train.compile": True, "train.compile_mode": "max-autotune",
    "train.gradient_compression": "bfloat16", "train.loss": "binary_cross_entropy", "train.target_threshold": 0.2,
    "train.label_smoothing": 0.1, "train.mixup": 0.2, "train.cutmix": 1.0, "train.drop_path": 0.1, "train.drop": 0.2,
    "train.ema_decay": 0.9, "train.sync_bn": True,
    "data.auto_augment": "ta_wide", "optim.args": {"betas": [0.8, 0.9]}, "optim.layer_decay": 0.5,
}  # fmt: skip
"""Every key that changes the weights, with a value that is not ``small_config``'s."""
NEEDED = {
    "data.label_column": {"data.name": "huggingface", "data.root": "x"},
    "optim.milestones": {"optim.schedule": "step"},
    "optim.args": {"optim.name": "lion"},
    "train.freeze_epochs": {"model.weights": "x"},
    "train.target_threshold": {"train.loss": "binary_cross_entropy"},
}
"""What must be set beside a key, in both recipes. A step schedule needs milestones: there another value is compared."""
EVALUATION = {
    "eval_size": 24, "eval_resize": 40, "crop_mode": "squash", "interpolation": "bicubic", "precision": "bfloat16",
}  # fmt: skip
"""What eval.py can change in a protocol."""


def recipe(*changes: dict) -> Config:
    tree = small_config().model_dump()
    for name, value in [pair for change in changes for pair in change.items()]:
        section, key = name.split(".")
        tree[section][key] = value
    return parse_config(tree, "test")


def two(key: str) -> tuple[Config, Config]:
    """Two recipes that differ in one key."""
    needed = NEEDED.get(key, {})
    first = {"optim.milestones": [1], "train.epochs": 3} if key == "optim.milestones" else {}
    return recipe(needed, first), recipe(needed, first, {key: [2] if first else WEIGHTS[key]})


def test_every_key_is_here():
    assert set(WEIGHTS) == {key for key, effect in EFFECTS.items() if effect is Effect.WEIGHTS}


@pytest.mark.parametrize("key", WEIGHTS)
def test_a_key_that_changes_the_weights(key):
    one, other = two(key)
    if key == "train.max_steps":
        check_same_recipe(other, one, "it")
    else:
        with pytest.raises(InputError, match=rf"was trained with {key}="):
            check_same_recipe(other, one, "it")
    ours, theirs = ({"training": describe_training(config, [2])} for config in (one, other))
    why = difference(ours, theirs)
    if (key.startswith("model.") and key != "model.new_head") or key == "train.seed":
        assert why is None  # what is compared, and a repetition
    else:
        assert why is not None
        assert why.startswith((f"{key}: ", "images_per_batch_norm: ")), why
        changed = {name for name, value in ours["training"].items() if value != theirs["training"][name]}
        assert changed <= {key, "images_per_batch_norm"}


def test_batch_norms_share_is_protocol():
    """By hand: batch 64, in 4 processes, or in 2 processes of 2 parts; sync_bn sees the parts of all processes."""
    for processes, changes, images in (
        ([4], {}, "16"),
        ([2], {"optim.accumulate": 2}, "16"),
        ([2, 4], {}, "32, then 16"),
        ([4], {"train.sync_bn": True, "optim.accumulate": 2}, "32"),
    ):
        assert describe_training(recipe(changes), processes)["images_per_batch_norm"] == images


def row(config: EvalConfig, model: str, top1: float, test_set: dict | None = None) -> dict:
    training = describe_training(small_config(), [1])
    protocol = describe_protocol(config, training, test_set)
    facts = {"top1": top1, "top5": 99.0, "loss": 1.0, "images": 355, "params": 1, "macs": 1, "seed": 0}
    return {"model": model, "weights": "model", "selected_on_val": False, "protocol": protocol, **facts}


def test_a_protocol_holds_what_an_evaluation_depends_on():
    """eval_batch_size, workers and the memory's layout change nothing; training's keys are in `training`."""
    protocol = describe_protocol(EvalConfig.from_recipe(small_config()), None)
    evaluation = {"eval_size", "eval_resize", "crop_mode", "interpolation", "mean", "std", "precision"}
    assert set(protocol) == evaluation | {"data", "classes", "decode", "views", "training"}


@pytest.mark.parametrize("key", [*EVALUATION, "mean", "std", "classes", "test_set"])
def test_no_delta_between_evaluations_that_differ(key):
    base = EvalConfig.from_recipe(recipe({"data.eval_resize": 36}))
    if key in EVALUATION:
        other = adapt(base, **{"eval_resize": base.data.eval_resize, key: EVALUATION[key]})[0]
    elif key == "classes":
        other = base.model_copy(update={"model": base.model.model_copy(update={"num_classes": 9})})
    else:
        other = base.model_copy(update={"data": base.data.model_copy(update={key: (0.5, 0.5, 0.5)})})
    ours = row(base, "lip_resnet50", 60.0, {"scoring": "any"} if key == "test_set" else None)
    header, lines, notes = build_table([ours, row(other, "resnet50", 50.0)], {})
    delta = header.index("delta top-1")
    assert lines[0][delta] == "-"
    assert f": {'scoring' if key == 'test_set' else key}: " in notes[0]
    _, lines, notes = build_table([row(base, "lip_resnet50", 60.0), row(base, "resnet50", 50.0)], {})
    assert (lines[0][delta], notes) == ("+10.00", [])


@pytest.mark.parametrize("key", EVALUATION)
def test_a_recipe_s_evaluation_is_taken_and_the_command_line_changes_it(key):
    precision = {"train.precision": "float32"}
    config = recipe(precision if key == "precision" else {"data.eval_resize": 40, f"data.{key}": EVALUATION[key]})
    taken = EvalConfig.from_recipe(config)
    where = taken if key == "precision" else taken.data
    assert getattr(where, key) == ("float32" if key == "precision" else EVALUATION[key])
    changed = adapt(EvalConfig.from_recipe(recipe({"data.eval_resize": 36})), **{key: EVALUATION[key]})[0]
    assert getattr(changed if key == "precision" else changed.data, key) == EVALUATION[key]


def test_every_key_of_the_evaluation_is_taken_from_the_recipe():
    changes = {"data.eval_batch_size": 3, "data.workers": 1, "data.mean": [0.1] * 3, "data.std": [0.2] * 3}
    config = recipe(changes, {"data.eval_size": 16, "data.eval_resize": 20, "train.channels_last": False})
    taken = EvalConfig.from_recipe(config)
    assert not taken.channels_last
    for key in EvalDataConfig.model_fields:
        assert getattr(taken.data, key) == getattr(config.data, key), key


FACTS = {
    "model": "resnet18", "args": {"width": 3}, "downsampling": {"stem": "max"}, "weights": "ema",
    "selected_on_val": True, "images": 9, "dataset": {"names": "sha256:a"}, "protocol": None,
}  # fmt: skip


@pytest.mark.parametrize("fact", FACTS)
def test_rows_are_seeds_of_one_entry_only_where_all_else_is_equal(fact):
    config = EvalConfig.from_recipe(recipe({"data.eval_resize": 36}))
    one, other = row(config, "resnet50", 50.0), row(config, "resnet50", 60.0) | {"seed": 1}
    assert [(entry.mean("top1"), len(entry.rows)) for entry in group([one, other])] == [(55.0, 2)]
    value = FACTS[fact] or row(adapt(config, eval_size=24)[0], "resnet50", 1.0)["protocol"]
    assert [entry.mean("top1") for entry in group([one, other | {fact: value}])] == [50.0, 60.0]


def test_a_baseline_is_the_network_with_its_own_layers():
    config = EvalConfig.from_recipe(small_config())
    swapped = row(config, "resnet50", 55.0) | {"downsampling": {"stem": "max"}}
    rows = [swapped, row(config, "lip_resnet50", 60.0), row(config, "resnet50", 50.0)]
    header, lines, notes = build_table(rows, {})
    assert [line[header.index("delta top-1")] for line in lines] == ["+5.00", "+10.00", "-"]
    assert notes == []
    assert build_table(rows[:2], {})[1][1][header.index("delta top-1")] == "-"


def test_published_figures_stand_beside_all_of_imagenet_alone():
    """1,000 classes and 50,000 images of no other test set."""
    thousand = EvalConfig.from_recipe(recipe({"model.num_classes": 1000}))
    paper = {"lip_resnet50": {"top1": 78.19, "top5": 93.96}}
    whole = row(thousand, "lip_resnet50", 70.0) | {"images": 50000}
    sketch = row(thousand, "lip_resnet50", 70.0, {"test_set": "imagenet-sketch"}) | {"images": 50000}
    ten = row(EvalConfig.from_recipe(small_config()), "lip_resnet50", 70.0) | {"images": 50000}
    assert "paper top-1" in build_table([whole], paper)[0]
    for other in (whole | {"images": 49999}, sketch, ten):
        assert "paper top-1" not in build_table([other], paper)[0]
