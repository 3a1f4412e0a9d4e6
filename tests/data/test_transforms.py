"""What a recipe's keys do to pixels, by hand."""

import numpy as np
import pytest
import torch
from helpers import photograph, small_config
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform
from torchvision.transforms import InterpolationMode, v2

from lip_resnet import seeding
from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import EvalLoader, build_sources
from lip_resnet.data.transforms import TrainTransform

MEAN = (0.9, 0.1, 0.2)


def augment(image: Image.Image, seed: int, **keys: object) -> np.ndarray:
    """(16, 16, 3) uint8."""
    transform = TrainTransform(DataConfig(name="digits", batch_size=2, size=16, mean=MEAN, **keys))
    out = torch.zeros(16, 16, 3, dtype=torch.uint8)
    transform.image(image, seed, out)
    return out.numpy()


def test_rand_augment_fills_with_the_mean_colour():
    """An image of that colour stays of one colour, wherever it is moved; filled with another it does not."""
    colour = tuple(round(255 * value) for value in MEAN)
    image = Image.new("RGB", (16, 16), colour)
    outputs = [augment(image, seed, rand_augment="rand-m9-n1", flip=0.0) for seed in range(40)]
    assert all((pixels == pixels[0, 0]).all() for pixels in outputs)
    black = Image.new("RGB", (16, 16))
    filled = [augment(black, seed, rand_augment="rand-m9-n1", flip=0.0) for seed in range(40)]
    assert sum((pixels != pixels[8, 8]).any() for pixels in filled) > 2  # what moves it does fill


def test_policies_are_the_libraries_own():
    """After the crop and the flip, torchvision's or timm's transform under the seed of the sample."""
    image, bilinear = photograph(40, 50), {"interpolation": InterpolationMode.BILINEAR}
    hparams = {"translate_const": 7, "img_mean": tuple(round(255 * value) for value in MEAN)}  # 0.45 of 16 pixels
    for name, policy in {
        "ta_wide": v2.TrivialAugmentWide(**bilinear),
        "ra": v2.RandAugment(**bilinear),
        "augmix": v2.AugMix(**bilinear),
        "imagenet": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, **bilinear),
        "cifar10": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, **bilinear),
        "svhn": v2.AutoAugment(v2.AutoAugmentPolicy.SVHN, **bilinear),
        "original-mstd0.5": auto_augment_transform("original-mstd0.5", dict(hparams)),
        "v0r": auto_augment_transform("v0r", dict(hparams)),
        "3a": auto_augment_transform("3a", dict(hparams)),
        "augmix-m5-w4-d2": augment_and_mix_transform("augmix-m5-w4-d2", dict(hparams)),
    }.items():
        outputs = []
        for seed in range(3):
            pixels = augment(image, seed, auto_augment=name)
            outputs.append(pixels)
            seeding.reseed(seed)
            crop, flip = v2.RandomResizedCrop(16, antialias=True), v2.RandomHorizontalFlip()
            assert np.array_equal(pixels, np.asarray(policy(flip(crop(image))))), name
            assert np.array_equal(pixels, augment(image, seed, auto_augment=name)), name
        assert not np.array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"auto_augment": "ta_wid"},
            "'ta_wid' is no policy of torchvision or timm; did you mean ta_wide? known: ta_wide,",
        ),
        ({"auto_augment": "Imagenet"}, "did you mean imagenet?"),
        ({"auto_augment": "trivial"}, "known: ta_wide, ra"),
        ({"auto_augment": ""}, "'' is no policy"),
        ({"auto_augment": "rand-m9"}, "is timm's RandAugment, which is written data.rand_augment: rand-m9"),
        ({"auto_augment": "original-mstd"}, "('mstd' is not a letter and a number)"),
        ({"auto_augment": "augmix-m5-z3"}, "(Unknown AugMix config section)"),
        ({"rand_augment": ""}, "'' is not a timm RandAugment"),
    ],
)
def test_policies_that_are_none(keys, words):
    with pytest.raises(InputError) as caught:
        TrainTransform(DataConfig(name="digits", batch_size=2, **keys))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flip", [0.0, 0.25, 1.0])
def test_flips_are_as_often_as_asked(flip):
    image = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    keys = {"flip": flip, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    flipped = [augment(image, seed, **keys)[0, 0, 0] > augment(image, seed, **keys)[0, 15, 0] for seed in range(200)]
    assert np.mean(flipped) == pytest.approx(flip, abs=0.08)


def test_erasing_and_jitter_are_as_asked():
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    changed = [(augment(image, seed, random_erasing=0.25) != (200, 100, 50)).any() for seed in range(200)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.08)
    outputs = np.array([augment(image, seed, color_jitter=0.2)[0, 0] for seed in range(100)], dtype=float)
    brightness = outputs.mean(1) / np.mean((200, 100, 50))
    assert 0.75 < brightness.min() < 0.9
    assert 1.1 < brightness.max() < 1.25


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_validation_resizes_as_the_recipe_says(image_folder, interpolation):
    """PIL's own resize of the shorter side, then the centre, for the loader that training's evaluation reads."""
    data = {"data__name": "folder", "data__root": str(image_folder), "data__eval_resize": 28, "data__eval_size": 24}
    config = small_config(model__num_classes=3, **data, data__interpolation=interpolation).data
    source = build_sources(config, 3, ("val",))[0]
    images, _ = next(iter(EvalLoader(source, config)))
    image, _ = source[0]
    width, height = (28, int(28 * image.height / image.width)) if image.width < image.height else (
        int(28 * image.width / image.height), 28
    )  # fmt: skip
    resized = image.resize((width, height), getattr(Image.Resampling, interpolation.upper()))
    left, top = round((width - 24) / 2), round((height - 24) / 2)
    want = np.asarray(resized.crop((left, top, left + 24, top + 24)))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), want)


@pytest.mark.parametrize(("scale", "side"), [(1.0, 16), (0.25, 8)])
def test_crops_have_the_area_that_the_recipe_says(scale, side):
    keys = {"crop_scale": (scale, scale), "crop_ratio": (1.0, 1.0)}
    transform = TrainTransform(DataConfig(name="digits", batch_size=2, **keys))
    assert {transform.crop_box(16, 16)[2:] for _ in range(9)} == {(side, side)}
