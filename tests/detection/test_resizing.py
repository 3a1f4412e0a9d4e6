"""What is resized: boxes of training follow their pixels by each side's own factor, and a valid area is rounded up."""

import numpy as np
import torch
from helpers.detection import Pictures, small_detection
from torch import nn

from lip_resnet.detection.loaders import DetectionTrainLoader
from lip_resnet.detection.samples import Annotations
from lip_resnet.layers.logits import InstanceNorm2d


class Whole(Pictures):
    """A box around the whole picture."""

    def annotations(self, index: int) -> Annotations:
        height, width = self.sizes[index]
        return Annotations(np.array([[0, 0, width, height]], dtype=np.float32), np.array([0]))


def test_a_box_around_the_picture_stays_around_it():
    """Sides are rounded to whole pixels, so that their factors differ."""
    source = Whole([(150, 97), (99, 131), (640, 427), (7, 200)])
    config = small_detection(data__batch_size=4, data__aspect_groups=0).data
    (batch,) = DetectionTrainLoader(source, config, 1, 0).epoch(0)
    ((_, targets),) = batch.parts
    for (height, width), boxes in zip(targets["sizes"], targets["boxes"], strict=True):
        torch.testing.assert_close(boxes, torch.tensor([[0.0, 0, width, height]]), rtol=0, atol=1e-4)
    assert set(targets["sizes"]) == {(96, 62), (64, 85), (96, 64), (3, 96)}


def test_an_area_that_the_stride_does_not_divide():
    """Two convolutions of stride 2 make 10 rows of 37, and 9 columns of 33."""
    image = torch.randn(1, 4, 37, 33)
    half = nn.Conv2d(4, 4, 3, stride=2, padding=1)
    alone = half(half(image)).detach()
    norm = InstanceNorm2d(4)
    padded = torch.randn(1, 4, 16, 16)
    padded[:, :, : alone.shape[2], : alone.shape[3]] = alone
    norm.valid_area = (64, [(37, 33)])
    together = norm(padded).detach()
    norm.valid_area = None
    torch.testing.assert_close(together[:, :, : alone.shape[2], : alone.shape[3]], norm(alone).detach())
    assert not together[:, :, alone.shape[2] :].any()
    assert not together[:, :, :, alone.shape[3] :].any()
