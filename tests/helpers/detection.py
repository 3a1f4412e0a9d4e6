"""A small detection recipe, its parts, and images with boxes in memory."""

import numpy as np
from PIL import Image

from lip_resnet.config import DetectionConfig
from lip_resnet.detection.samples import Annotations
from lip_resnet.recipe import of_task, parse_recipe


def small_detection(**changes: object) -> DetectionConfig:
    """Faster R-CNN on LIP-ResNet-18 and digit scenes; ``model__backbone={...}`` adds to a section."""
    tree: dict = {
        "task": "detection",
        "model": {
            **{"num_classes": 10, "backbone": {"name": "lip_resnet18"}, "fpn_channels": 16, "head_channels": 16},
            "anchor_sizes": [8, 16, 32, 64, 96],
            "args": {"rpn_post_nms_top_n_train": 30, "rpn_post_nms_top_n_test": 30, "box_batch_size_per_image": 16},
        },
        "data": {
            **{"name": "digit_scenes", "images": 10, "size": 64, "max_size": 96, "batch_size": 4},
            **{"eval_batch_size": 4, "workers": 0},
        },
        "optim": {"lr": 0.01},
        "train": {"epochs": 2, "log_every": 2},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = {**tree[section][key], **value} if key == "backbone" else value
    return of_task(parse_recipe(tree, "test"), DetectionConfig, "test")


class Pictures:
    """Noise of given heights and widths, with one box each."""

    classes, category_ids = ["thing"], [1]

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = np.array(sizes)
        self.image_ids = list(range(1, len(sizes) + 1))

    def __len__(self) -> int:
        return len(self.sizes)

    def path(self, index: int) -> str:
        return f"picture {index}"

    def __getitem__(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(index).integers(0, 256, (*self.sizes[index], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def annotations(self, index: int) -> Annotations:
        height, width = self.sizes[index]
        return Annotations(np.array([[0, 0, width / 2, height / 4]], dtype=np.float32), np.array([0]))
