"""Where images come from: each module opens one kind of source, and ``build_sources`` the one that a recipe names."""

from collections.abc import Sequence

from lip_resnet.config import DataConfig, EvalDataConfig, InputError
from lip_resnet.data.sources.base import Source
from lip_resnet.data.sources.embedded import Digits, Synthetic
from lip_resnet.data.sources.folder import folder_sources
from lip_resnet.data.sources.huggingface import table_sources
from lip_resnet.data.sources.named import NAMED, named_sources
from lip_resnet.data.sources.shards import shard_sources


def build_sources(
    config: EvalDataConfig, num_classes: int | None, splits: tuple[str, ...] = ("train", "val")
) -> list[Source]:
    """The sources of the splits asked for, ("train", "val") or ("val",); every process must call it.

    Args:
        config: for "train" a ``DataConfig``.
        num_classes: of the network; None for any number.

    Raises:
        InputError: the data is missing, damaged or incomplete, has another number of classes, or needs a package that
            is not installed.
    """
    sources: Sequence[Source]
    root = config.root or ""  # the config requires one for every kind that reads it
    if config.name == "digits":
        sources = [Digits(train=split == "train") for split in splits]
    elif config.name == "synthetic":
        assert num_classes is not None
        sources = [_synthetic(config, num_classes, split) for split in splits]
    elif config.name == "shards":
        sources = shard_sources(root, splits)
    elif config.name == "huggingface":
        sources = table_sources(root, config.label_column, splits)
    elif config.name in NAMED:
        sources = named_sources(config.name, root, config.download, splits)
    else:
        sources = folder_sources(root, config.classes, splits)
    classes = len(sources[0].classes)
    if num_classes is not None and classes != num_classes:
        raise InputError(f"model.num_classes is {num_classes}, but the data has {classes} classes")
    return list(sources)


def _synthetic(config: EvalDataConfig, num_classes: int, split: str) -> Synthetic:
    if split == "train":
        assert isinstance(config, DataConfig)
        return Synthetic(config.images, num_classes, config.sizes[-1])
    return Synthetic(max(1, config.images // 10), num_classes, config.eval_size)
