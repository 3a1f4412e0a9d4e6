"""Counts against hand-listed predictions."""

import math

import pytest
import torch

from lip_resnet.evaluation.metrics import AccuracyCounts, cross_entropy


def test_counts_by_hand():
    counts = AccuracyCounts(torch.device("cpu"))
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 0]])
    counts.add(logits, torch.tensor([0, 1, 5]), torch.tensor(2.0))  # first; fifth; sixth place
    counts.add(logits[:1], torch.tensor([1]), torch.tensor(6.0))  # second place
    result = counts.reduce()
    assert (result["correct1"], result["correct5"], result["images"]) == (1, 3, 4)
    assert result["top1"] == 25
    assert result["top5"] == 75
    assert result["loss"] == pytest.approx((3 * 2.0 + 6.0) / 4)


def test_top5_of_three_classes_is_top3():
    counts = AccuracyCounts(torch.device("cpu"))
    counts.add(torch.tensor([[3.0, 2, 1], [1, 2, 3]]), torch.tensor([2, 2]), torch.tensor(0.0))
    result = counts.reduce()
    assert (result["top1"], result["top5"]) == (50, 100)


def test_large_counts_stay_exact():
    counts = AccuracyCounts(torch.device("cpu"))
    counts.sums[3] = 2.0**24
    counts.add(torch.tensor([[1.0, 0]]), torch.tensor([0]), torch.tensor(0.0))
    assert counts.reduce()["images"] == 2**24 + 1


def test_any_of_several_labels_is_right():
    """By hand: labels padded with -1; the loss is -log of the right classes' summed probability."""
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    labels = torch.tensor([[1, 0], [2, -1], [1, 0]])
    counts = AccuracyCounts(torch.device("cpu"))
    loss = cross_entropy(logits, labels)
    counts.add(logits, labels, loss)
    result = counts.reduce()
    assert (result["correct1"], result["correct5"], result["images"]) == (1, 3, 3)
    shares = [(math.e**3 + math.e**2) / (math.e**3 + math.e**2 + math.e), math.e / (math.e**3 + math.e**2 + math.e)]
    shares.append(2 / (2 + math.e**9))
    assert result["loss"] == pytest.approx(-sum(map(math.log, shares)) / 3, rel=1e-5)


def test_one_label_is_cross_entropy():
    logits, labels = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(cross_entropy(logits, labels), expected, rtol=0, atol=0)
    torch.testing.assert_close(cross_entropy(logits, labels[:, None]), expected, rtol=1e-6, atol=0)
