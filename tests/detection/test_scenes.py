"""Digit scenes: the same everywhere, boxes that hold digits, and COCO's form."""

import numpy as np
from pycocotools.coco import COCO

from lip_resnet.detection.scenes import Scenes


def test_a_scene_is_a_function_of_its_split_and_number():
    few, many = Scenes(True, 3), Scenes(True, 5)
    for index in range(3):
        assert np.array_equal(np.asarray(few[index]), np.asarray(many[index]))
        assert np.array_equal(few.annotations(index).boxes, many.annotations(index).boxes)
    assert few.describe()["content"] != many.describe()["content"] == Scenes(True, 5).describe()["content"]
    assert not np.array_equal(np.asarray(few[0]), np.asarray(Scenes(False, 3)[0]))


def test_boxes_hold_digits_of_coco_s_three_sizes(capsys):
    scenes = Scenes(False, 60)
    counts = np.zeros(3, int)
    for index in range(20):
        image = np.asarray(scenes[index]).astype(float).max(axis=2)
        assert image.shape == tuple(scenes.sizes[index])
        outside = np.ones(image.shape, bool)
        boxes, labels = scenes.annotations(index)
        assert labels.min() >= 0
        assert labels.max() <= 9
        for x1, y1, x2, y2 in boxes.astype(int):
            assert 0 <= x1 < x2 <= image.shape[1]
            assert 0 <= y1 < y2 <= image.shape[0]
            outside[y1:y2, x1:x2] = False
            assert np.percentile(image[y1:y2, x1:x2], 95) > 120
        assert np.percentile(image[outside], 95) < 130
    truth = COCO()
    truth.dataset = scenes.ground_truth()
    truth.createIndex()
    assert len(truth.getImgIds()) == 60
    for annotation in truth.loadAnns(truth.getAnnIds()):
        assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]
        counts[np.digitize(annotation["area"], [32**2, 96**2])] += 1
    assert counts.sum() == scenes.describe()["boxes"]
    assert counts.min() > 15, counts
