"""Tar shards in WebDataset layout, on a disk or behind a URL, their images in any order."""

import tarfile
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from lip_resnet import distributed
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.decode import BadImage
from lip_resnet.data.sources.encoded import Encoded
from lip_resnet.data.sources.index import FILE, Index, read_index
from lip_resnet.data.sources.remote import MissingFile, Remote, is_url

_NAMES = "classes.txt"


def parse_names(data: bytes, path: str) -> list[str]:
    """The lines of a list of names in UTF-8, with or without byte order mark, carriage returns and blank last lines.

    Args:
        path: names the list in errors.

    Raises:
        InputError: it is not UTF-8, or a line between names is blank, which would shift all labels behind it.
    """
    try:
        names = [line.strip() for line in data.decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the list as UTF-8") from error
    if "" in names:
        raise InputError(f"{path}: line {names.index('') + 1} is blank; each line must name one class, in label order")
    return names


class _Indexed(Encoded):
    """Images at known places of tar files: KEY.jpg (or another image) and KEY.cls, its label as text, side by side.

    Args:
        root: what an image's name begins with.
        index: where the images lie.
        class_names: the content of classes.txt, a name for each label; None where there is none.
    """

    def __init__(self, root: Path | str, index: Index, class_names: bytes | None) -> None:
        self.shards = index.shards
        self._places = torch.from_numpy(index.places).share_memory_()
        count = 1 + int(index.labels.max())
        path = f"{root}/{_NAMES}"
        classes = [str(label) for label in range(count)] if class_names is None else parse_names(class_names, path)
        if len(classes) < count:
            raise InputError(f"{path}: {len(classes)} names, but the shards hold label {count - 1}")
        places, labels = index.places[:, 0].tolist(), index.labels.tolist()
        named = zip(places, index.keys, labels, strict=True)
        super().__init__(root, classes, [(f"{root}/{self.shards[shard]}:{key}", label) for shard, key, label in named])


class Shards(_Indexed):
    """Local shards, root/NAME.tar."""

    def __init__(self, root: Path) -> None:
        names = root / _NAMES
        try:
            class_names = names.read_bytes() if names.is_file() else None
        except OSError as error:
            raise InputError(f"{names}: cannot read: {error.strerror}") from error
        super().__init__(root, read_index(root), class_names)

    def read(self, index: int) -> bytes:
        """An image's bytes, from the middle of its shard."""
        shard, offset, size = self._places[index].tolist()
        try:
            with open(self.root / self.shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadImage(f"{self.path(index)}: cannot read this image: {error.strerror}") from error
        if len(data) != size or not size:
            raise BadImage(f"{self.path(index)}: cannot read this image: {len(data)} bytes, the shard says {size}")
        return data


class RemoteShards(_Indexed):
    """Shards behind a URL, with the index that was made where they lay on a disk.

    An image is one range request; those of a batch are in flight together while the first images are decoded. The tar
    header is read with the image: a shard that is not the one indexed cannot pass for it.

    Raises:
        InputError: there is no index.
    """

    def __init__(self, url: str) -> None:
        self.remote = Remote(url)
        self._requests: dict[int, Future[bytes]] = {}
        url = self.remote.url
        try:
            index = Index.from_bytes(self.remote.read(FILE), f"{url}/{FILE}")
        except MissingFile as error:
            raise InputError(
                f"{error}; make it where the shards lie on a disk (python scripts/index_shards.py DIR), "
                "and put it beside them"
            ) from error
        try:
            class_names = self.remote.read(_NAMES)
        except MissingFile:
            class_names = None
        super().__init__(url, index, class_names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_requests": {}}  # another process makes its own

    def prefetch(self, indices: Sequence[int]) -> None:
        """Request the images of a batch, in place of those of the batch before."""
        self._requests = {index: self.remote.read_async(*self._range(index)) for index in dict.fromkeys(indices)}

    def _range(self, index: int) -> tuple[str, int, int]:
        shard, offset, size = self._places[index].tolist()
        return self.shards[shard], offset - tarfile.BLOCKSIZE, offset + size

    def read(self, index: int) -> bytes:
        """An image's bytes.

        Raises:
            InputError: the server fails, or what it has is not what was indexed. That is no bad image, which a run may
                skip: it always stops.
        """
        request = self._requests.get(index)
        data = self.remote.read(*self._range(index)) if request is None else request.result()
        size = len(data) - tarfile.BLOCKSIZE
        try:
            header = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.size != size or not header.isreg():
            raise InputError(f"{self.path(index)}: not at its place; the shard is not the one that was indexed")
        if not size:
            raise BadImage(f"{self.path(index)}: cannot read this image: the shard says 0 bytes")
        return data[tarfile.BLOCKSIZE :]


def shard_sources(config: EvalDataConfig, splits: tuple[str, ...]) -> list[Shards] | list[RemoteShards]:
    """The shards of some splits, at ``data.root``.

    Raises:
        InputError: they are not there or not right, or differ in their classes.
    """
    if is_url(config.root):
        sources = [RemoteShards(f"{config.root.rstrip('/')}/{split}") for split in splits]
    else:
        roots = [Path(config.root).expanduser() / split for split in splits]
        distributed.on_main(lambda: [read_index(root) for root in roots] and None)  # the others find it stored
        sources = [Shards(root) for root in roots]
    if any(source.classes != sources[0].classes for source in sources):
        raise InputError(f"data.root: the shards of {' and '.join(splits)} in {config.root} differ in their classes")
    return sources
