"""Where each image of a directory of tar shards lies: read from the tar headers once, then kept in a file."""

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
"""Lies beside the shards; numpy arrays, nothing pickled."""
_SEPARATOR = b"\0"  # no name in a tar file holds one


@dataclass(frozen=True)
class Index:
    """The images of a directory of shards, in the order of the shards' names and within a shard in its own."""

    shards: list[str]
    """File names, sorted."""
    stamps: np.ndarray
    """(shards, 2) int64: bytes, and time of the last change in ns, when the shards were read."""
    keys: list[str]
    """An image's name within its shard, without its suffix."""
    labels: np.ndarray
    """(images,) int64."""
    places: np.ndarray
    """(images, 3) int64: number of the shard, offset of the image's first byte, bytes."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        file = io.BytesIO()
        names = {"shards": _pack(self.shards), "keys": _pack(self.keys)}
        np.savez_compressed(file, **names, stamps=self.stamps, labels=self.labels, places=self.places)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> "Index":
        """What ``to_bytes`` gave; ``path`` names it in errors.

        Raises:
            InputError: it is something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                shards, keys = _unpack(arrays["shards"]), _unpack(arrays["keys"])
                index = cls(shards, arrays["stamps"], keys, arrays["labels"], arrays["places"])
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not an index of shards: {error}") from error
        if not len(index.keys) == len(index.labels) == len(index.places) or len(index.stamps) != len(index.shards):
            raise InputError(f"{path}: not an index of shards: its parts differ in length")
        return index


def _pack(names: list[str]) -> np.ndarray:
    return np.frombuffer(_SEPARATOR.join(map(os.fsencode, names)), np.uint8)


def _unpack(block: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in block.tobytes().split(_SEPARATOR)]


def read_index(root: Path) -> Index:
    """The index of local shards. A stored one serves if the shards have the names, sizes and times of change that it
    was made from; else they are read, and the result is stored: beside them, or where that cannot be, in the cache.

    Raises:
        InputError: there are no shards, or they are not as they should be.
    """
    paths = _shards(root)
    names, stamps = [path.name for path in paths], _stamps(paths)
    for place in _places(root):
        try:
            stored = Index.from_bytes(place.read_bytes(), str(place))
        except (OSError, InputError):  # none yet, or not ours: the shards themselves are the truth
            continue
        if stored.shards == names and np.array_equal(stored.stamps, stamps):
            return stored
    index = _make_index(paths, stamps)
    for place in _places(root):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, index)
            break
        except (OSError, InputError):  # a read-only disk; an index that is not stored is made again
            continue
    return index


def write_index(root: Path) -> Index:
    """Index local shards anew, into the file beside them.

    Raises:
        InputError: there are no shards, they are not as they should be, or the file cannot be written.
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


def _write(place: Path, index: Index) -> None:
    write_atomically(place, lambda file: file.write(index.to_bytes()))


def _make_index(paths: list[Path], stamps: np.ndarray) -> Index:
    images = [(number, *image) for number, path in enumerate(paths) for image in _scan(str(path))]
    places = np.array([(number, offset, size) for number, _, _, offset, size in images], np.int64)
    labels = np.array([label for _, _, label, _, _ in images], np.int64)
    return Index([path.name for path in paths], stamps, [key for _, key, *_ in images], labels, places)


def _stamps(paths: list[Path]) -> np.ndarray:
    found = [path.stat() for path in paths]
    return np.array([(state.st_size, state.st_mtime_ns) for state in found], np.int64)


def _places(root: Path) -> list[Path]:
    """Where an index of these shards may be kept."""
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
                    labels[key] = archive.extractfile(member).read().strip()
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
