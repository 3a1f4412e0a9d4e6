"""Images to uint8 pixels on the CPU, and uint8 batches to normalised floats on the device."""

import difflib
import functools
import math
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2

from lip_resnet import memory, seeding
from lip_resnet.config import DataConfig, EvalDataConfig, InputError
from lip_resnet.data.decode import JpegDecoder, decode_exact

_TIMM_POLICIES = ("original", "originalr", "v0", "v0r", "3a", "augmix-m5-w4-d2")
_TORCHVISION_POLICIES = {"ta_wide": v2.TrivialAugmentWide, "ra": v2.RandAugment, "augmix": v2.AugMix} | {
    policy.value: functools.partial(v2.AutoAugment, policy) for policy in v2.AutoAugmentPolicy
}
"""By the names of torchvision's training reference."""


class TrainTransform:
    """The reference's random resized crop and flip, and the recipe's further augmentations.

    Random numbers come from the CPU generators of torch, numpy and Python, which are seeded for each sample. Every
    ``data.decode`` draws the same numbers in the same order as torchvision's RandomResizedCrop and
    RandomHorizontalFlip.

    Raises:
        InputError: ``data.rand_augment`` or ``data.auto_augment`` names no policy.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.interpolation = InterpolationMode(config.interpolation)
        self.log_ratio = torch.log(torch.tensor(config.crop_ratio)).tolist()
        self.decoder = JpegDecoder()
        steps: list[Any] = []
        if config.rand_augment is not None or config.auto_augment is not None:
            steps.append(_build_policy(config))
        if config.color_jitter:
            steps.append(v2.ColorJitter(*(config.color_jitter,) * 3))
        self.on_pil = v2.Compose(steps) if steps else None
        self.erasing = v2.RandomErasing(config.random_erasing) if config.random_erasing else None

    def image(self, image: Image.Image, seed: int, out: Tensor) -> None:
        """A PIL image -> ``out`` (size, size, 3) uint8, by PIL."""
        seeding.reseed(seed)
        top, left, height, width = self.crop_box(image.height, image.width)
        size = list(out.shape[:2])
        image = v2.functional.resized_crop(image, top, left, height, width, size, self.interpolation)
        if torch.rand(1) < self.config.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        self._finish(image, out)

    def data(self, data: bytes, path: str, seed: int, out: Tensor) -> bool:
        """A file's bytes -> ``out`` (size, size, 3) uint8, as ``data.decode`` says.

        Returns:
            Whether PIL decoded it.

        Raises:
            BadImage: the file is damaged.
        """
        if self.config.decode != "exact" and self._fast(data, path, seed, out):
            return False
        self.image(decode_exact(data, path), seed, out)
        return True

    def draw(self, data: bytes, seed: int) -> tuple[tuple[int, int, int, int], bool] | None:
        """(crop box, flip) that the method ``data`` draws for a JPEG file; None for what PIL must decode."""
        size = self.decoder.read_size(data)
        if size is None:
            return None
        seeding.reseed(seed)
        return self.crop_box(*size), bool(torch.rand(1) < self.config.flip)

    def _fast(self, data: bytes, path: str, seed: int, out: Tensor) -> bool:
        shape = self.decoder.read_size(data)
        if shape is None:
            return False
        seeding.reseed(seed)
        top, left, height, width = self.crop_box(*shape)
        pixels = self.decoder.decode(data, path, shape, top + height)
        if pixels is None:
            return False
        pixels = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        # (1, 3, h, w) with channels-last strides, also in the dimension of 1, which torch's uint8 kernel requires.
        crop = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        mode, size = self.config.interpolation, tuple(out.shape[:2])
        resized = functional.interpolate(crop, size, mode=mode, align_corners=False, antialias=True)
        if torch.rand(1) < self.config.flip:
            resized = resized.flip(-1)
        out.copy_(resized[0].permute(1, 2, 0))
        if self.on_pil is not None or self.erasing is not None:
            self._finish(Image.fromarray(out.numpy()), out)
        return True

    def _finish(self, image: Image.Image, out: Tensor) -> None:
        if self.on_pil is not None:
            image = self.on_pil(image)
        pixels = v2.functional.pil_to_tensor(image)
        if self.erasing is not None:
            pixels = self.erasing(pixels)
        out.copy_(pixels.permute(1, 2, 0))

    def crop_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a random crop, with the draws of torchvision's ``RandomResizedCrop``."""
        scale, (lowest, highest) = self.config.crop_scale, self.config.crop_ratio
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*scale).item()
            ratio = torch.exp(torch.empty(1).uniform_(*self.log_ratio)).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = torch.randint(0, height - h + 1, size=(1,))
                left = torch.randint(0, width - w + 1, size=(1,))
                return int(top), int(left), h, w
        w, h = width, height
        if width / height < lowest:
            h = max(1, round(width / lowest))
        elif width / height > highest:
            w = max(1, round(height * highest))
        return (height - h) // 2, (width - w) // 2, h, w


def _build_policy(config: DataConfig) -> Any:
    """PIL image -> PIL image: ``data.rand_augment`` or ``data.auto_augment``, drawn from the CPU generators."""
    colour = tuple(round(255 * value) for value in config.mean)
    name, build = config.auto_augment or "", auto_augment_transform
    if config.rand_augment is not None:
        try:
            return rand_augment_transform(config.rand_augment, {"img_mean": colour})
        except (AssertionError, ValueError, KeyError) as error:
            reason = str(error) or "not in timm's form"
            raise InputError(
                f"data.rand_augment: {config.rand_augment!r} is not a timm RandAugment: {reason}; give one such as "
                "rand-m7-mstd0.5-inc1"
            ) from error
    if name in _TORCHVISION_POLICIES:
        return _TORCHVISION_POLICIES[name](interpolation=InterpolationMode(config.interpolation))
    policy, *options = name.split("-")
    if policy == "rand":
        raise InputError(f"data.auto_augment: {name} is timm's RandAugment, which is written data.rand_augment: {name}")
    if policy == "augmix":
        build = augment_and_mix_transform
    try:
        if wrong := [option for option in options if not re.fullmatch(r"[a-z]+\d+(\.\d+)?", option)]:
            raise ValueError(f"{wrong[0]!r} is not a letter and a number")  # timm would ignore it
        return build(name, {"translate_const": int(0.45 * config.size), "img_mean": colour})
    except (AssertionError, ValueError, KeyError) as error:
        known = [*_TORCHVISION_POLICIES, *_TIMM_POLICIES]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near and near[0] != name else ""
        reason = f" ({error})" if policy in {each.split("-")[0] for each in known} else ""
        raise InputError(
            f"data.auto_augment: {name!r} is no policy of torchvision or timm{reason}; {hint}known: {', '.join(known)}"
        ) from error


def check_resize(image: Image.Image, config: EvalDataConfig) -> Image.Image:
    """Check an image before ``eval_transform`` resizes it; returned unchanged.

    Raises:
        ValueError: resized, a side would be 0 or there would be more pixels than PIL decodes.
    """
    if config.crop_mode != "squash":
        scale = config.eval_resize / (min if config.crop_mode == "center" else max)(image.size)
        width, height = (round(side * scale) for side in image.size)
        largest = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        if not 0 < width * height <= largest:
            raise ValueError(
                f"its {image.width}x{image.height} pixels would be resized to {width}x{height} (data.eval_resize "
                f"{config.eval_resize}); 1 to {largest:,} pixels are allowed"
            )
    return image


def eval_transform(config: EvalDataConfig) -> v2.Transform:
    """PIL image -> (3, eval_size, eval_size) uint8: resized as ``crop_mode`` says, then cropped at the centre.

    The modes are those of timm's ``transforms_imagenet_eval``; ``center`` is the reference's protocol. It raises what
    ``check_resize`` does.
    """
    side, interpolation = config.eval_resize, InterpolationMode(config.interpolation)
    crop: Any = v2.CenterCrop(config.eval_size)
    if config.crop_mode == "center":
        resize: Any = v2.Resize(side, interpolation)
    elif config.crop_mode == "squash":
        resize = v2.Resize((side, side), interpolation)
    else:
        resize = ResizeKeepRatio(side, longest=1.0, interpolation=config.interpolation)
        red, green, blue = (round(255 * value) for value in config.mean)
        crop = CenterCropOrPad(config.eval_size, fill=(red, green, blue))
    return v2.Compose([functools.partial(check_resize, config=config), resize, crop, v2.PILToTensor()])


def to_device(tensor: Tensor, device: torch.device, channels_last: bool = False) -> Tensor:
    """Images (B, 3, H, W) of any dtype, or labels, on ``device``; images in ``memory.layout``.

    To CUDA they are copied without blocking. MPS would read the source after it has been freed.
    """
    tensor = tensor.to(device, non_blocking=device.type == "cuda")
    return tensor.contiguous(memory_format=memory.layout(channels_last, device))


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 with ``mean`` and ``std`` (3,) of pixels in [0, 1], on the images' device."""
    shape = (1, -1, 1, 1)
    return (images.float() - 255 * mean.view(shape)).div_(255 * std.view(shape))
