"""The source of images with boxes that a recipe names."""

from lip_resnet.config import InputError
from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.detection.coco import CocoSource
from lip_resnet.detection.samples import DetectionSource
from lip_resnet.detection.scenes import Scenes


def build_sources(
    config: EvalDetectionDataConfig, num_classes: int | None, splits: tuple[str, ...] = ("train", "val")
) -> list[DetectionSource]:
    """The sources of the splits asked for, ("train", "val") or ("val",).

    Args:
        config: for "train" a ``DetectionDataConfig``.
        num_classes: of the detector; None for any number.

    Raises:
        InputError: the data is missing or damaged, its classes are not those asked for or differ between the splits, or
            it needs a package that is not installed.
    """
    sources = [_open(config, split) for split in splits]
    for source, split in zip(sources, splits, strict=True):
        if num_classes is not None and len(source.classes) != num_classes:
            raise InputError(
                f"model.num_classes is {num_classes}; the {split} images have {len(source.classes)} classes: "
                f"{', '.join(source.classes[:5])}{', ...' if len(source.classes) > 5 else ''}"
            )
        if (source.classes, source.category_ids) != (sources[0].classes, sources[0].category_ids):
            raise InputError(f"data.root: the {split} images have other categories than the {splits[0]} images")
    return sources


def _open(config: EvalDetectionDataConfig, split: str) -> DetectionSource:
    if config.name == "digit_scenes":
        return Scenes(split == "train", config.images if split == "train" else max(1, config.images // 5))
    return CocoSource(config, split)
