"""Order and augmentation of training images: functions of seed, epoch, index and repeat, and of each of them."""

import itertools
import random

import numpy as np
import pytest
import torch
from helpers import photograph, small_config
from torch import Tensor

from lip_resnet import seeding
from lip_resnet.config import InputError
from lip_resnet.data import TrainLoader


class OneImage:
    """As many samples as asked for, all the same picture."""

    def __init__(self, count: int) -> None:
        self.count, self.image = count, photograph(40, 50)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.image, 0


def loader(count: int = 24, seed: int = 0, accumulate: int = 1, **changes: object) -> TrainLoader:
    config = small_config(**{"data__batch_size": 8, "data__size": 16, **changes}).data
    return TrainLoader(OneImage(count), config, accumulate, seed)


def order(epoch: int, seed: int = 0, **changes: object) -> list[int]:
    sampler = loader(seed=seed, **changes).sampler
    sampler.epoch = epoch
    return [index for keys in sampler for _, index, _ in keys]


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [order(epoch, seed) for epoch, seed in itertools.product(range(3), range(3))]
    assert all(sorted(each) == list(range(24)) for each in orders)
    assert len({tuple(each) for each in orders}) == 9
    assert order(2, 1) == orders[7]


def test_an_augmentation_differs_with_each_of_its_numbers():
    def augmented(seed: int, *key: int) -> Tensor:
        return loader(seed=seed).loader.dataset.__getitems__((None, [key])).images

    keys = list(itertools.product(range(2), repeat=4))  # seed, epoch, index, repeat
    pixels = {key: augmented(*key) for key in keys}
    assert len({tensor.numpy().tobytes() for tensor in pixels.values()}) == 16
    assert all((augmented(*key) == tensor).all() for key, tensor in pixels.items())


def test_seeds_never_change():
    """Old runs are resumed, and their orders repeated. Purpose, numbers and their count all matter."""
    assert seeding.derive("order", 0, 0) == 8771211632386139786
    names = [("order",), ("order", 0), ("order", 0, 0), ("order", 1, 0), ("order", 0, 1), ("augment", 0, 0)]
    seeds = [seeding.derive(*name) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("remainder", "accumulate", "refused"), [(1, 1, True), (2, 1, False), (3, 2, True), (4, 2, False)]
)
def test_each_part_of_the_last_batch_needs_two_images(remainder, accumulate, refused):
    if refused:
        with pytest.raises(InputError, match=f"the last batch has {remainder} images for {accumulate} parts"):
            loader(16 + remainder, accumulate=accumulate)
        assert len(loader(16 + remainder, accumulate=accumulate, data__last_batch="drop")) == 2
    else:
        assert len(loader(16 + remainder, accumulate=accumulate)) == 3


def test_every_generator_is_seeded():
    """RandAugment draws from Python's and numpy's too."""

    def drawn() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    draws = []
    for seed in (1, 1, 2):
        seeding.reseed(seed)
        draws.append(drawn())
    assert draws[0] == draws[1]
    assert all(one != other for one, other in zip(draws[0], draws[2], strict=True))
