"""COCO's recipes against the numbers of mmdetection's and torchvision's own."""

import pytest

from lip_resnet.recipe import load_recipe

STEPS = -(-117_266 // 16)
"""In an epoch: train2017 has 117,266 images with a box."""
# mmdetection: configs/faster_rcnn_r50_fpn_{1x,2x}.py of 2019; torchvision: references/detection/train.py.
SCHEDULES = {
    "1x": {"epochs": 12, "milestones": (8, 11), "warmup": 500, "clip": 35, "norm": "eval"},
    "2x": {"epochs": 24, "milestones": (16, 22), "warmup": 500, "clip": 35, "norm": "eval"},
    "26": {"epochs": 26, "milestones": (16, 22), "warmup": 1000, "clip": None, "norm": "frozen"},
}


@pytest.mark.parametrize("backbone", ["resnet50", "lip_resnet50", "resnet101", "lip_resnet101"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_protocols(backbone, schedule):
    recipe, own = load_recipe(f"coco/{backbone}_fpn_{schedule}"), SCHEDULES[schedule]
    model, data, optim, train = recipe.model, recipe.data, recipe.optim, recipe.train
    assert (train.epochs, optim.milestones, optim.gamma, optim.clip_norm) == (
        *(own["epochs"], own["milestones"]),
        *(0.1, own["clip"]),
    )
    assert round(optim.warmup_epochs * STEPS) == own["warmup"]
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.decay) == ("sgd", 0.02, 0.9, 1e-4, "all")
    assert (data.batch_size, data.size, data.max_size, data.flip, data.aspect_groups) == (16, 800, 1333, 0.5, 3)
    assert (model.name, model.num_classes, model.fpn_channels, model.head_channels) == ("faster_rcnn", 80, 256, 1024)
    assert (model.anchor_sizes, model.args) == ((32, 64, 128, 256, 512), {})
    assert (model.backbone.name, model.backbone.norm) == (backbone, own["norm"])
    assert model.backbone.frozen == ("stem", "stage1")
    assert not train.ema_decay
