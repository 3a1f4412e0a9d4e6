"""``train.log_images``: what TensorBoard gets, and that training and resuming stay the same, bit for bit."""

import numpy as np
import pytest
import run_contents
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lip_resnet import checkpoint
from lip_resnet.commands import train
from lip_resnet.compat import tree_leaves
from lip_resnet.config import InputError
from lip_resnet.data import build_sources
from lip_resnet.data.photographs import sample_images
from lip_resnet.insight import importance_maps
from lip_resnet.insight.monitor import build_monitor
from lip_resnet.layers import make_layer
from lip_resnet.models import load_weights, registry

pytest.importorskip("matplotlib")
NETWORK = "model.downsampling={stem: lip}"
SMALL = ("data.name=synthetic", "data.images=96", "data.batch_size=24")


def tensorboard(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def content(folder):
    saved = run_contents.read_whole(folder / "checkpoints" / "last.pt")
    metrics = [
        {key: value for key, value in line.items() if key not in run_contents.TIMES}
        for line in train.runlog._read_lines(folder / "metrics.jsonl")
    ]
    return {key: saved[key] for key in run_contents.STATE}, metrics


def test_training_and_resuming_stay_the_same(start, tmp_path):
    """8 steps without, and with it: stopped after the first evaluation and resumed with another number of images."""
    changes = (NETWORK, *SMALL, "train.ema_decay=0.9", "train.rules=ema")
    start(*changes)
    plain, lines = content(start.folder)
    assert not [tag for tag in tensorboard(start.folder).Tags()["scalars"] if tag.startswith("lip/")]
    start.folder.rename(tmp_path / "plain")
    start("train.log_images=2", "train.max_steps=4", *changes)
    start("train.log_images=1", "--resume", "auto", *changes)
    observed, other_lines = content(start.folder)
    flat, flat_too = (tree_leaves(each) for each in (plain, observed))
    assert len(flat) == len(flat_too) > 20
    assert all(
        torch.equal(one, two) if torch.is_tensor(one) else one == two for one, two in zip(flat, flat_too, strict=True)
    )
    assert lines == other_lines

    events = tensorboard(start.folder)
    assert [event.step for event in events.Images("lip/maps/0")] == [4, 8]
    assert [event.step for event in events.Images("lip/maps/1")] == [4]
    names = {tag.rpartition("/")[0] for tag in events.Tags()["scalars"] if tag.startswith("lip/")}
    assert names == {"lip/entropy", "lip/logit_mean", "lip/logit_std"}
    # Of the averaged weights, which rules: ema evaluates.
    config = checkpoint.read_recipe(checkpoint.load(start.folder / "checkpoints" / "last.pt"), "it")
    model = registry.build_model(config.model)
    load_weights(model, start.folder, ema=True)
    (val,) = build_sources(config.data, 10, ("val",))
    (image,) = sample_images(val, config.data, 1)
    (maps,) = importance_maps(model, image.pixels[None], mean=config.data.mean, std=config.data.std)
    logged = [event.value for event in events.Scalars(f"lip/logit_std/{maps.name}") if event.step == 8]
    assert logged == [pytest.approx(maps.logit_std, rel=1e-5)]


def test_the_numbers_are_those_of_the_maps_of_all_images():
    torch.manual_seed(0)
    model = torch.nn.Sequential(make_layer("softpool", 3), make_layer("max", 3))
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    how = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    numbers, pictures = build_monitor(model, [(f"n{i}", each) for i, each in enumerate(images)], **how)(model)
    softpool, _ = importance_maps(model, images, **how)
    assert numbers == {
        "lip/entropy/0": pytest.approx(softpool.entropy.mean(), rel=1e-5),
        "lip/logit_mean/0": pytest.approx(softpool.logit_mean, rel=1e-5),
        "lip/logit_std/0": pytest.approx(softpool.logit_std, rel=1e-5),
        "lip/entropy/1": 0.0,
    }
    assert list(pictures) == ["lip/maps/0", "lip/maps/1", "lip/maps/2"]
    assert not np.array_equal(pictures["lip/maps/0"], pictures["lip/maps/1"])


def test_a_network_without_such_layers_is_refused_before_anything_is_written(start):
    with pytest.raises(InputError, match=r"no layer of local weights .*it downsamples by Conv2d"):
        start("train.log_images=1", "model.name=mobilenetv3_small_050")
    assert not start.folder.exists()
    with pytest.raises(
        InputError, match=r"train.log_images: given 65 \(int\); input should be less than or equal to 64"
    ):
        start("train.log_images=65")
