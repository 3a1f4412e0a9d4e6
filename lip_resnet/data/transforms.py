"""PIL images to (3, H, W) uint8 on the CPU, and uint8 batches to normalised floats on the device."""

from typing import Any

from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lip_resnet.config import DataConfig, InputError


def train_transform(config: DataConfig) -> v2.Transform:
    """The reference's random resized crop and flip, and what the recipe adds; on PIL images."""
    interpolation = InterpolationMode(config.interpolation)
    steps: list[Any] = [
        v2.RandomResizedCrop(config.size, config.crop_scale, config.crop_ratio, interpolation=interpolation),
        v2.RandomHorizontalFlip(config.flip),
    ]
    if config.rand_augment:
        colour = tuple(round(255 * value) for value in config.mean)
        try:
            steps.append(rand_augment_transform(config.rand_augment, {"img_mean": colour}))
        except (AssertionError, ValueError, KeyError) as error:
            raise InputError(f"data.rand_augment: {config.rand_augment!r} is not a timm RandAugment: {error}") from None
    if config.color_jitter:
        steps.append(v2.ColorJitter(*(config.color_jitter,) * 3))
    steps.append(v2.PILToTensor())
    if config.random_erasing:
        steps.append(v2.RandomErasing(config.random_erasing))
    return v2.Compose(steps)


def eval_transform(config: DataConfig) -> v2.Transform:
    """The reference's protocol: the shorter side to ``eval_resize``, then the centre crop of ``eval_size``."""
    return v2.Compose(
        [
            v2.Resize(config.eval_resize, InterpolationMode(config.interpolation)),
            v2.CenterCrop(config.eval_size),
            v2.PILToTensor(),
        ]
    )


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 with ``mean`` and ``std`` (3,) of pixels in [0, 1], on the images' device."""
    shape = (1, -1, 1, 1)
    return (images.float() - 255 * mean.view(shape)).div_(255 * std.view(shape))
