"""Tar shards in WebDataset layout, on a disk or behind a URL, read in any order."""

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from lip_resnet import distributed
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.decode import BadImage
from lip_resnet.data.sources.base import Encoded, LeftOut
from lip_resnet.data.sources.index import FILE, Index, cached_index, index_file, read_index
from lip_resnet.data.sources.patterns import shard_names, summarise
from lip_resnet.data.sources.remote import MissingFile, Remote, is_url

_NAMES = "classes.txt"


def parse_names(data: bytes, path: str) -> list[str]:
    """The lines of a UTF-8 file of class names; a byte order mark, carriage returns and blank last lines are dropped.

    Args:
        path: names the file in errors.

    Raises:
        InputError: it is not UTF-8, or a line between names is blank, which would shift all later labels.
    """
    try:
        names = [line.strip() for line in data.decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    if "" in names:
        raise InputError(f"{path}: line {names.index('') + 1} is blank; each line must name one class, in label order")
    return names


class _Indexed(Encoded):
    """Images of tar files, KEY.jpg (or another suffix) beside KEY.cls, the label as text; found through an index.

    Args:
        root: with which the images' names begin.
        index: shard, offset and size of each image.
        class_names: the content of classes.txt, a name for each label; None if there is no such file, which leaves
            ``classes`` empty.

    Raises:
        InputError: the names are not UTF-8, or there are fewer than labels.
    """

    def __init__(self, root: Path | str, index: Index, class_names: bytes | None) -> None:
        self.shards = index.shards
        self._places = torch.from_numpy(index.places).share_memory_()
        path = f"{root}/{_NAMES}"
        classes = [] if class_names is None else parse_names(class_names, path)
        places, labels = index.places[:, 0].tolist(), index.labels.tolist()
        named = zip(places, index.keys, labels, strict=True)
        samples = [(f"{root}/{self.shards[shard]}:{key}", label) for shard, key, label in named]
        name, highest = samples[int(index.labels.argmax())]
        if classes and len(classes) <= highest:
            raise InputError(f"{path}: {len(classes)} names, but the shards hold label {highest}, the first in {name}")
        super().__init__(root, classes, samples)
        self.left_out = index.left_out or LeftOut()


class Shards(_Indexed):
    """Local shards, root/NAME.tar: all in the directory, or those named.

    Raises:
        InputError: there are no shards, or one is damaged or lacks a label.
    """

    def __init__(self, root: Path, names: Sequence[str] | None = None) -> None:
        self._folder, path = root, root / _NAMES
        try:
            class_names = path.read_bytes() if os.path.lexists(path) else None
        except OSError as error:
            raise InputError(f"{path}: cannot read: {error.strerror}") from error
        super().__init__(root, read_index(root, names), class_names)
        if names is not None:  # the other files may be another split's
            return
        beside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        used = {FILE, _NAMES, *self.shards}
        loose = [f"{path.name}/" if path.is_dir() else path.name for path in beside if path.name not in used]
        self.left_out = LeftOut.sum([LeftOut.of(loose), self.left_out])

    def read(self, index: int) -> bytes:
        """An image's bytes.

        Raises:
            BadImage: the shard cannot be read, or is shorter than the index says.
        """
        shard, offset, size = self._places[index].tolist()
        try:
            with open(self._folder / self.shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadImage(f"{self.path(index)}: cannot read this image: {error.strerror}") from error
        if len(data) != size or not size:
            raise BadImage(f"{self.path(index)}: cannot read this image: {len(data)} bytes, the shard says {size}")
        return data


class RemoteShards(_Indexed):
    """Shards behind a URL, with an index beside them or in the local cache.

    Each image is one range request; the requests of a batch are concurrent with each other and with decoding. The tar
    header is read with the image, to detect a shard that is not the one that was indexed.

    Raises:
        InputError: there is no index.
    """

    def __init__(self, url: str, names: Sequence[str] | None = None) -> None:
        self.remote = Remote(url)
        self._requests: dict[int, Future[bytes]] = {}
        url = self.remote.url
        try:
            index = Index.from_bytes(self.remote.read(index_file(names)), f"{url}/{index_file(names)}")
        except MissingFile as error:
            cached = cached_index(url, names)
            if not cached.is_file():
                shards = url if names is None else f"'{url}/{summarise(names)}'"
                raise InputError(f"{error}, the index; make it: python scripts/index_shards.py {shards}") from error
            index = Index.from_bytes(cached.read_bytes(), str(cached))
        try:
            class_names: bytes | None = self.remote.read(_NAMES)
        except MissingFile:
            class_names = None
        super().__init__(url, index, class_names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_requests": {}}  # another process makes its own

    def prefetch(self, indices: Sequence[int]) -> None:
        """Request the images of a batch; requests of an earlier batch are forgotten."""
        self._requests = {index: self.remote.read_async(*self._range(index)) for index in dict.fromkeys(indices)}

    def _range(self, index: int) -> tuple[str, int, int]:
        shard, offset, size = self._places[index].tolist()
        return self.shards[shard], offset - tarfile.BLOCKSIZE, offset + size

    def read(self, index: int) -> bytes:
        """An image's bytes.

        Raises:
            BadImage: the image is empty.
            InputError: the server fails, or the shard is not the one that was indexed: unlike a bad image,
                ``data.on_error: skip`` does not skip it.
        """
        request = self._requests.get(index)
        data = self.remote.read(*self._range(index)) if request is None else request.result()
        size = len(data) - tarfile.BLOCKSIZE
        try:
            header = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            matches = header.size == size and header.isreg()
        except tarfile.HeaderError:
            matches = False
        if not matches:
            raise InputError(
                f"{self.path(index)}: its tar header is another; the shard is not the one that was indexed"
            )
        if not size:
            raise BadImage(f"{self.path(index)}: cannot read this image: the shard says 0 bytes")
        return data[tarfile.BLOCKSIZE :]


def shard_sources(config: EvalDataConfig, splits: tuple[str, ...]) -> list[Shards] | list[RemoteShards]:
    """The shards of some splits: those that the recipe names below ``data.root``, a directory or URL, or root/split.

    Raises:
        InputError: they are missing or damaged.
    """
    assert config.root is not None  # the config requires it
    names = [shard_names(config, split) for split in splits]
    if is_url(config.root):
        url = config.root.rstrip("/")
        return [
            RemoteShards(f"{url}/{split}" if own is None else url, own)
            for split, own in zip(splits, names, strict=True)
        ]
    root = Path(config.root).expanduser()
    roots = [root / split if own is None else root for split, own in zip(splits, names, strict=True)]
    flat = next((folder for folder in roots if not folder.is_dir()), None)
    if flat is not None and (tars := [path.name for path in root.glob("*.tar")]):
        raise InputError(
            f"data.root: {root} has no {flat.name}/; name its shards by data.train and data.val: {summarise(tars)}"
        )

    def index_all() -> None:
        for folder, own in zip(roots, names, strict=True):
            read_index(folder, own)

    distributed.on_main(index_all)  # the other ranks then read the stored index
    return [Shards(folder, own) for folder, own in zip(roots, names, strict=True)]
