"""Where images come from: each module opens one kind of source, and ``build_sources`` the one that a recipe names."""

from collections.abc import Sequence
from typing import Any

from lip_resnet.config import DataConfig, EvalDataConfig
from lip_resnet.data.sources.base import Source, say_left_out
from lip_resnet.data.sources.classes import settle_classes
from lip_resnet.data.sources.embedded import Digits, Synthetic
from lip_resnet.data.sources.folder import folder_sources
from lip_resnet.data.sources.huggingface import table_sources
from lip_resnet.data.sources.named import NAMED, named_sources
from lip_resnet.data.sources.shards import shard_sources


def build_sources(
    config: EvalDataConfig,
    num_classes: int | None,
    splits: tuple[str, ...] = ("train", "val"),
    selection: str | None = None,
    names: Sequence[str] | None = None,
) -> list[Source]:
    """The sources of the splits asked for, ("train", "val") or ("val",); every process must call it.

    All have the same ``classes``. What is left out, and classes without images, is printed.

    Args:
        config: for "train" a ``DataConfig``.
        num_classes: of the network; None for any number.
        selection: the content of the file ``data.classes``, where it has been read; None: it is read here.
        names: in an evaluation, of the classes that the network was trained on: class folders that are among them get
            their labels by these names, and sets that name no classes have them. None: the classes of the data.

    Raises:
        InputError: the data is missing, damaged or incomplete, its classes are not those asked for or differ between
            the splits, or it needs a package that is not installed.
    """
    sources: Sequence[Any]
    root = config.root or ""  # the config requires one for every kind that reads it
    if config.name == "digits":
        sources = [Digits(train=split == "train") for split in splits]
    elif config.name == "synthetic":
        assert num_classes is not None
        return [_synthetic(config, num_classes, split) for split in splits]
    elif config.name == "shards":
        sources = shard_sources(config, splits)
    elif config.name == "huggingface":
        sources = table_sources(root, config.label_column, splits)
    elif config.name in NAMED:
        sources = named_sources(config.name, root, config.download, splits)
    else:
        sources = folder_sources(root, config.classes, splits, selection, names)
    for source in sources:
        say_left_out(source)
    settle_classes(sources, splits, num_classes, names)
    return list(sources)


def _synthetic(config: EvalDataConfig, num_classes: int, split: str) -> Synthetic:
    if split == "train":
        assert isinstance(config, DataConfig)
        return Synthetic(config.images, num_classes, config.sizes[-1])
    return Synthetic(max(1, config.images // 10), num_classes, config.eval_size)
