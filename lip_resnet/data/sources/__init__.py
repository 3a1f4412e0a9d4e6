"""Where images come from.

A *source* is a torchvision-style dataset: ``source[i]`` is (PIL image, label), ``source.classes`` the class names.
"""

from typing import Any

from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.sources.embedded import Digits, Synthetic
from lip_resnet.data.sources.folder import folder_sources
from lip_resnet.data.sources.huggingface import table_sources
from lip_resnet.data.sources.named import NAMED, named_sources
from lip_resnet.data.sources.shards import shard_sources


def build_sources(config: EvalDataConfig, num_classes: int, splits: tuple[str, ...] = ("train", "val")) -> list[Any]:
    """The datasets of the splits asked for, ("train", "val") or ("val",); every process must call it.

    Args:
        config: for "train" a ``DataConfig``.

    Raises:
        InputError: they are not there, not as they should be, or hold another number of classes.
    """
    if config.name == "digits":
        sources = [Digits(train=split == "train") for split in splits]
    elif config.name == "synthetic":
        sources = [
            Synthetic(config.images, num_classes, config.sizes[-1])
            if split == "train"
            else Synthetic(max(1, config.images // 10), num_classes, config.eval_size)
            for split in splits
        ]
    elif config.name == "shards":
        sources = shard_sources(config, splits)
    elif config.name == "huggingface":
        sources = table_sources(config, splits)
    elif config.name in NAMED:
        sources = named_sources(config, splits)
    else:
        sources = folder_sources(config, splits)
    found = len(sources[0].classes)
    if found != num_classes:
        raise InputError(f"model.num_classes is {num_classes}, but the data has {found} classes")
    return sources
