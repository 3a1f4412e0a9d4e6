"""The index of a directory of tar shards: where each image is. Read from the tar headers once, then kept in a file."""

import hashlib
import io
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from lip_resnet.config import InputError
from lip_resnet.files import write_atomically

FILE = "index.npz"
"""The index's name beside the shards; numpy arrays, nothing pickled."""
_SEPARATOR = b"\0"  # which a name in a tar file cannot contain


@dataclass(frozen=True)
class Index:
    """The images of a directory of shards: shards in the order of their names, images in the order of their shard."""

    shards: list[str]
    """File names, sorted."""
    stamps: np.ndarray
    """(shards, 2) int64: size in bytes and modification time in ns of each shard when it was read."""
    keys: list[str]
    """Each image's name in its shard, without its suffix."""
    labels: np.ndarray
    """(images,) int64."""
    places: np.ndarray
    """(images, 3) int64: index of the shard, offset of the image's first byte, size in bytes."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        file = io.BytesIO()
        shards, keys = _pack(self.shards), _pack(self.keys)
        np.savez_compressed(file, shards=shards, keys=keys, stamps=self.stamps, labels=self.labels, places=self.places)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> "Index":
        """The inverse of ``to_bytes``; ``path`` names the file in errors.

        Raises:
            InputError: it is no index.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                shards, keys = _unpack(arrays["shards"]), _unpack(arrays["keys"])
                index = cls(shards, arrays["stamps"], keys, arrays["labels"], arrays["places"])
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not an index of shards: {error}") from error
        if not len(index.keys) == len(index.labels) == len(index.places) or len(index.stamps) != len(index.shards):
            raise InputError(f"{path}: not an index of shards: its arrays differ in length")
        return index


def _pack(names: list[str]) -> np.ndarray:
    return np.frombuffer(_SEPARATOR.join(map(os.fsencode, names)), np.uint8)


def _unpack(block: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in block.tobytes().split(_SEPARATOR)]


def read_index(root: Path) -> Index:
    """The index of local shards: the stored one if the shards still have the names, sizes and modification times that
    it was made from; else a new one, which is stored beside them, or in the cache where they cannot be written to.

    Raises:
        InputError: there are no shards, or one is damaged or lacks a label.
    """
    paths = _shards(root)
    names, stamps = [path.name for path in paths], _stamps(paths)
    for file in _files(root):
        try:
            stored = Index.from_bytes(file.read_bytes(), str(file))
        except (OSError, InputError):  # missing or damaged: it is made again from the shards
            continue
        if stored.shards == names and np.array_equal(stored.stamps, stamps):
            return stored
    index = _make_index(paths, stamps)
    for file in _files(root):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, index)
            break
        except (OSError, InputError):  # a read-only disk; an index that is not stored is made again
            continue
    return index


def write_index(root: Path) -> Index:
    """Index local shards again and write the file beside them.

    Raises:
        InputError: there are no shards, one is damaged or lacks a label, or the file cannot be written.
    """
    paths = _shards(root)
    index = _make_index(paths, _stamps(paths))
    _write(root / FILE, index)
    return index


def _shards(root: Path) -> list[Path]:
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise InputError(f"data.root: {root} holds no .tar shards")
    return paths


def _write(path: Path, index: Index) -> None:
    write_atomically(path, lambda file: file.write(index.to_bytes()))


def _make_index(paths: list[Path], stamps: np.ndarray) -> Index:
    images = [(number, *image) for number, path in enumerate(paths) for image in _scan(str(path))]
    places = np.array([(number, offset, size) for number, _, _, offset, size in images], np.int64)
    labels = np.array([label for _, _, label, _, _ in images], np.int64)
    return Index([path.name for path in paths], stamps, [key for _, key, *_ in images], labels, places)


def _stamps(paths: list[Path]) -> np.ndarray:
    states = [path.stat() for path in paths]
    return np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)


def _files(root: Path) -> list[Path]:
    """The files that may hold the index of these shards, in the order in which they are tried."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return [root / FILE, cache / "lip_resnet" / f"{digest}.npz"]


def _scan(path: str) -> list[tuple[str, int, int, int]]:
    """(key, label, offset, size) of a shard's images in its order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, file = os.path.split(member.name)
                key, _, suffix = file.partition(".")
                key = os.path.join(folder, key)
                if f".{suffix.lower()}" in IMG_EXTENSIONS:
                    if key in images:
                        raise InputError(f"{path}: two images have the key {key!r}")
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    content = archive.extractfile(member)  # None if the member is no file
                    labels[key] = content.read().strip() if content else b""
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise InputError(f"{path}: not a whole tar archive: {error}") from error
    wrong = next((key for key in images if not labels.get(key, b"").isdigit()), None)
    if wrong is not None or not images:
        raise InputError(
            f"{path}: " + ("it holds no image" if wrong is None else f"{wrong!r} has no label {wrong}.cls")
        )
    return [(key, int(labels[key]), *place) for key, place in images.items()]
