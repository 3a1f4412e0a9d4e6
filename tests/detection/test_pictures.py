"""Right, false and missed ones among detections, by hand; and the pictures of TensorBoard."""

import numpy as np
import pytest
from helpers.detection import Pictures

pytest.importorskip("matplotlib")

from lip_resnet.detection.pictures import Judged, describe, draw, evenly, judge
from lip_resnet.detection.samples import Annotations
from lip_resnet.insight import figures


class Two(Pictures):
    """Two objects of class 0, of which one is large, and a small one of class 1."""

    def annotations(self, index: int) -> Annotations:
        boxes = [[0, 0, 97, 96], [0, 100, 40, 140], [200, 0, 232, 32]]
        return Annotations(np.array(boxes, dtype=np.float32), np.array([0, 0, 1]))


def test_each_detection_takes_the_free_object_that_it_covers_best():
    boxes = [
        [0, 0, 97, 96],  # right
        [0, 0, 97, 90],  # the object is taken
        [0, 100, 40, 140],  # of the other class
        [0, 100, 40, 119],  # less than half of it
        [200, 0, 232, 32],  # right
        [300, 0, 332, 32],  # nothing is there; 32 x 32 pixels are COCO's small
    ]
    labels, scores = np.array([0, 0, 1, 0, 1, 1]), np.linspace(0.9, 0.4, 6)
    judged = judge(np.array(boxes, dtype=np.float64), labels, scores, Two([(150, 350)]), 0)
    assert judged.right.tolist() == [True, False, False, False, True, False]
    assert judged.detected.tolist() == [True, False, True]
    assert judged.counts() == {"small": (1, 1, 2), "medium": (1, 0, 2), "large": (1, 1, 0)}
    assert describe(judged) == (
        "2 of 3 objects detected, 4 false (small 1/1 and 2 false, medium 0/1 and 2 false, large 1/1)"
    )


def test_of_two_free_objects_the_one_of_more_overlap():
    class Near(Pictures):
        def annotations(self, index: int) -> Annotations:
            return Annotations(np.array([[0, 0, 40, 40], [8, 0, 48, 40]], dtype=np.float32), np.array([0, 0]))

    boxes = np.array([[6.0, 0, 46, 40], [0, 0, 40, 40]])
    judged = judge(boxes, np.zeros(2, int), np.array([0.9, 0.8]), Near([(50, 50)]), 0)
    assert (judged.right.all(), judged.detected.all()) == (True, True)


@pytest.mark.parametrize("missed", [False, True])
def test_a_name_is_within_the_picture(missed):
    """Inside the box where it reaches the upper or lower edge."""
    boxes, none = np.array([[0.0, 0, 40, 40], [50, 60, 90, 100]]), np.zeros((0, 4))
    detections, objects = (none, boxes) if missed else (boxes, none)
    right, detected = np.ones(len(detections), bool), np.zeros(len(objects), bool)
    labels, object_labels = (np.zeros(len(each), int) for each in (detections, objects))
    judged = Judged(detections, labels, np.ones(len(detections)), right, objects, object_labels, detected)
    source = Pictures([(100, 100)])
    with figures.style():
        figure = draw(source[0], judged, source.classes, "a picture")
        figures.to_pixels(figure)  # lays it out
    (axes,) = figure.axes
    inside = axes.get_window_extent()
    assert len(axes.texts) == 2
    for text in axes.texts:
        box = text.get_window_extent()
        assert inside.y0 - 0.01 < box.y0 < box.y1 < inside.y1 + 0.01


def test_no_objects_and_no_detections():
    class Empty(Pictures):
        def annotations(self, index: int) -> Annotations:
            return Annotations(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))

    judged = judge(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), Empty([(50, 50)]), 0)
    assert isinstance(judged, Judged)
    assert describe(judged) == "0 of 0 objects detected, 0 false (none)"
    assert evenly(5, 9) == [0, 1, 2, 3, 4]
    assert evenly(100, 4) == [0, 25, 50, 75]
