"""Which rows a table compares: deltas computed by hand, and none between different protocols, images or starts."""

import json
import math

import pytest
from helpers import small_config
from helpers.rows import described, on, replaced, row, table

from lip_resnet.config import InputError
from lip_resnet.evaluation import protocol, tables
from lip_resnet.evaluation.rows import read_rows


def tuned(model: str, top1: float, initial: dict | None, weights: str | None = None) -> dict:
    """A row of weights that were trained from others."""
    config = small_config(model__name=model, model__weights=weights or f"runs/{model}")
    training = protocol.describe_training(config, [2], initial)
    return {**row(model, top1), "protocol": described(config, training)}


def source(model: str, sha256: str, before: dict | None = None, **changes) -> dict:
    """``initial_weights`` of a run from another run's checkpoint."""
    changes |= {"model__weights": "before.pt"} if before else {}
    training = protocol.describe_training(small_config(model__name=model, **changes), [2], before)
    return {"training": {**training, "step": 46}, "sha256": sha256, "weights": "model"}


def no_delta(ours: dict, theirs: dict, words: str) -> None:
    """There is no delta, and one note says why."""
    lines, notes = table([ours, theirs])
    assert lines["lip_resnet50"]["delta top-1"] == "-"
    (note,) = notes
    assert words in note


def test_delta_and_seeds():
    ours, theirs = (row("lip_resnet50", 98.0, 0), row("lip_resnet50", 99.0, 1)), (row("resnet50", 97.0, 0),)
    lines, notes = table([*ours, *theirs, row("resnet50", 96.0, 1)])
    assert lines["lip_resnet50"]["top-1 (%)"] == f"98.50 ± {math.sqrt(0.5):.2f}"
    assert lines["lip_resnet50"]["delta top-1"] == "+2.00"
    assert lines["lip_resnet50"]["seeds"] == "2"
    assert lines["lip_resnet50"]["params (M)"] == "23.86"
    assert lines["lip_resnet50"]["MACs (G)"] == "5.300"
    assert lines["resnet50"]["delta top-1"] == "-"
    assert notes == []
    assert "paper top-1" not in lines["resnet50"]  # digits are not the paper's data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__epochs": 3}, "train.epochs"),
        ({"optim__lr": 0.2}, "optim.lr"),
        ({"data__eval_resize": 40}, "eval_resize"),
        ({"data__flip": 0.5}, "data.flip"),
        ({"data__batch_size": 32}, "data.batch_size"),
        ({"selected_on_val": True}, "selected_on_val"),
        ({"weights": "ema"}, "weights: model against ema"),
        ({"images": 100}, "images: 355 against 100"),
    ],
)
def test_no_delta_between_protocols_weights_or_images(changes, words):
    recipe = {key: value for key, value in changes.items() if "__" in key}
    facts = {key: value for key, value in changes.items() if "__" not in key}
    no_delta(row("lip_resnet50", 98.0), {**row("resnet50", 97.0, **recipe), **facts}, words)


def test_no_delta_between_batch_norms_of_other_sizes():
    theirs = row("resnet50", 97.0)
    theirs["protocol"] = described(small_config(), protocol.describe_training(small_config(), [1]))
    no_delta(row("lip_resnet50", 98.0), theirs, "images_per_batch_norm: 32 against 64")


def test_hardware_is_not_protocol():
    lines, _ = table([row("lip_resnet50", 98.0, data__workers=3), row("resnet50", 97.0, train__nonfinite_limit=9)])
    assert lines["lip_resnet50"]["delta top-1"] == "+1.00"


UNKNOWN = {"training": None, "sha256": "ab", "weights": "model"}


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (source("lip_resnet50", "ab"), source("resnet50", "cd"), None),
        (UNKNOWN, UNKNOWN, None),
        (source("lip_resnet50", "ab", UNKNOWN), source("resnet50", "cd", UNKNOWN), None),
        (
            *(source("lip_resnet50", "ab"), source("resnet50", "cd", optim__lr=0.2)),
            "model.weights: the weights started from differ in optim.lr: 0.05 against 0.2",
        ),
        (
            *(source("lip_resnet50", "ab", UNKNOWN), source("resnet50", "cd", {**UNKNOWN, "sha256": "ef"})),
            "the weights started from differ in model.weights: started from two different files whose training is",
        ),
        (UNKNOWN, {**UNKNOWN, "sha256": "ef"}, "model.weights: started from two different files whose training is"),
        (UNKNOWN, source("resnet50", "ab"), "started from a file of unknown training against weights of a known"),
        (None, None, "model.weights: started from runs/lip_resnet50 against runs/resnet50"),  # older checkpoints
    ],
)
def test_fine_tuned_weights_are_compared_by_what_they_started_from(ours, theirs, words):
    lines, notes = table([tuned("lip_resnet50", 98.0, ours), tuned("resnet50", 97.0, theirs)])
    assert lines["lip_resnet50"]["delta top-1"] == ("-" if words else "+1.00")
    assert len(notes) == bool(words)
    assert not words or words in notes[0]


def test_pretrained_and_random_starts_have_no_delta():
    _, notes = table([tuned("lip_resnet50", 98.0, UNKNOWN), row("resnet50", 97.0)])
    assert "model.weights: started from a file of unknown training against random weights" in notes[0]


def test_rows_of_earlier_versions_compare_with_todays(tmp_path):
    """They list keys that change no weights, and know no keys that came later."""
    old, new = row("lip_resnet50", 98.0), row("resnet50", 97.0)
    old["protocol"]["training"] |= {"train.nonfinite_limit": 3, "train.on_nonfinite": "skip", "train.rules": "ema"}
    del old["protocol"]["training"]["data.images"]
    for name, each in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    lines, notes = table(read_rows([str(tmp_path / "old.json"), str(tmp_path / "new.json")]))
    assert lines["lip_resnet50"]["delta top-1"] == "+1.00"
    assert notes == []


def test_unknown_training_has_no_delta():
    ours, theirs = row("lip_resnet50", 98.0, None), row("resnet50", 97.0, None)
    for measured in (ours, theirs):
        measured["protocol"] = described(small_config(), None)
    no_delta(ours, theirs, "unknown training")


def test_any_row_can_be_the_baseline():
    rows = [replaced("lip", 98.0, 0), replaced("lip", 99.0, 1), replaced("max", 97.0), row("resnet50", 96.0)]
    lines, notes = table(rows)
    assert [line["delta top-1"] for line in lines.values()] == ["+2.50", "+1.00", "-"]
    assert notes == ["delta of resnet50 (main=lip) to resnet50: unequal numbers of seeds, 2 against 1"]
    lines, notes = table(rows, "resnet50 (main=max)")
    assert [line["delta top-1"] for line in lines.values()] == ["+1.50", "-", "-1.00"]
    assert notes == ["delta of resnet50 (main=lip) to resnet50 (main=max): unequal numbers of seeds, 2 against 1"]
    _, wide, _ = tables.build_wide(rows, "resnet50 (main=max)")
    assert [line[2] for line in wide] == ["98.50 ± 0.71 (+1.50)", "97.00", "96.00 (-1.00)"]
    lines, notes = table(rows[:3])
    assert [line["delta top-1"] for line in lines.values()] == ["-", "-"]
    words = "no delta for resnet50 (main={}): no row of resnet50; --baseline LABEL compares with another row"
    assert notes == [words.format("lip"), words.format("max")]
    lines, notes = table([*rows[:2], {**rows[2], "images": 100}], "resnet50 (main=max)")
    assert notes == [
        "no delta for resnet50 (main=lip), its protocol is not resnet50 (main=max)'s: images: 355 against 100"
    ]
    with pytest.raises(
        InputError, match=r"--baseline max: no row has .*; the labels are resnet50 \(main=lip\); resnet50"
    ):
        table(rows, "max")


def test_old_rows_were_centre_crops():
    """Rows from before the key ``crop_mode``: deltas and seeds as ever, and no delta to another crop."""
    old, seed = row("resnet50", 97.0, 0), row("resnet50", 96.0, 1)
    assert old["protocol"].pop("crop_mode") == "center"
    assert not {key for key in old["protocol"]["training"] if "crop_mode" in key}
    lines, notes = table([row("lip_resnet50", 98.0), old, seed])
    assert (lines["lip_resnet50"]["delta top-1"], lines["resnet50"]["seeds"]) == ("+1.50", "2")
    assert notes == ["delta of lip_resnet50 to resnet50: unequal numbers of seeds, 1 against 2"]
    no_delta(row("lip_resnet50", 98.0, data__crop_mode="squash"), old, "crop_mode: squash against center")


def test_images_per_batch_norm():
    config = small_config(optim__accumulate=4)
    assert protocol.describe_training(config, [2])["images_per_batch_norm"] == "8"
    assert protocol.describe_training(config, [2, 1])["images_per_batch_norm"] == "8, then 16"
    synced = small_config(optim__accumulate=4, train__sync_bn=True)
    assert protocol.describe_training(synced, [2])["images_per_batch_norm"] == "16"


def test_no_delta_between_other_images_of_one_name():
    """ImageNet-V2 has three variants of 10,000 images in the same layout."""
    other = on("imagenet-v2", "resnet50", 70.0)
    other["dataset"]["names"] = "top images"
    no_delta(on("imagenet-v2", "lip_resnet50", 66.0), other, "other images (dataset.names)")
