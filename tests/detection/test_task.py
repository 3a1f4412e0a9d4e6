"""What torchvision samples in a step: a function of seed, step, process and part."""

import itertools
from types import SimpleNamespace

import torch
from helpers.detection import small_detection
from helpers.sets import as_rank

from lip_resnet.detection.task import Detection

CPU = torch.device("cpu")


def sampled(monkeypatch, rank: int, step: int, part: int, seed: int = 0) -> float:
    """What a network draws from the global generator."""
    as_rank(monkeypatch, rank, 2)
    task = Detection(small_detection(train__seed=seed), SimpleNamespace(loss_names=("loss",)), CPU)
    images, targets = task.blank(1, largest=False)
    return task.forward(lambda *_: {"loss": torch.rand(())}, images, targets, step, part)[0].item()


def test_every_step_process_and_part_has_a_sample_of_its_own(monkeypatch):
    keys = list(itertools.product(range(2), range(3), range(2)))
    first = [sampled(monkeypatch, *key) for key in keys]
    assert len({*first, sampled(monkeypatch, *keys[0], seed=1)}) == len(keys) + 1
    torch.manual_seed(5)
    assert [sampled(monkeypatch, *key) for key in reversed(keys)] == first[::-1]
