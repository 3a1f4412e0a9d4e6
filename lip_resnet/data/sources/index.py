"""The index of a directory of tar shards: where each image is. Read from the tar headers once, then kept in a file."""

import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lip_resnet.config import InputError
from lip_resnet.data.decode import readable_suffixes
from lip_resnet.data.sources.base import LeftOut
from lip_resnet.files import write_atomically

FILE = "index.npz"
"""The index's name beside the shards; numpy arrays, nothing pickled."""
_SEPARATOR = b"\0"  # which a name in a tar file cannot contain
_NOT_AN_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What ``zipfile`` raises for a damaged, compressed in an unknown way, or encrypted archive."""
_HIGHEST_LABEL = (1 << 31) - 1
_LONGEST_LABEL = 64  # bytes of a label that are read


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
    left_out: LeftOut | None
    """Members that no image is read from; None: an older version made the index, which does not tell."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        file = io.BytesIO()
        arrays: dict[str, Any] = {"stamps": self.stamps, "labels": self.labels, "places": self.places}
        if self.left_out is not None:
            arrays |= {"left_out": np.array(self.left_out.files), "left_out_first": _pack(self.left_out.first)}
        np.savez_compressed(file, shards=_pack(self.shards), keys=_pack(self.keys), **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> "Index":
        """The inverse of ``to_bytes``; ``path`` names the file in errors.

        Raises:
            InputError: it is no index.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                shards, keys, left_out = _unpack(arrays["shards"]), _unpack(arrays["keys"]), None
                stamps, labels, places = (arrays[name] for name in ("stamps", "labels", "places"))
                if "left_out" in arrays:
                    files = int(arrays["left_out"])
                    left_out = LeftOut(files, tuple(_unpack(arrays["left_out_first"])) if files else ())
        except (*_NOT_AN_ARCHIVE, OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
            raise InputError(f"{path}: not an index of shards: {error}") from error
        if not len(keys) == len(labels) == len(places) or len(stamps) != len(shards):
            raise InputError(f"{path}: not an index of shards: its arrays differ in length")
        integers = all(array.dtype == np.int64 for array in (stamps, labels, places))
        if not integers or (labels.ndim, places.shape[1:]) != (1, (3,)) or not len(keys):
            raise InputError(f"{path}: not an index of shards: its arrays have other types or shapes")
        number, offset, size = places.T
        if labels.min() < 0 or number.min() < 0 or number.max() >= len(shards) or size.min() < 0:
            raise InputError(f"{path}: not an index of shards: a label, shard or size is out of range")
        if offset.min() < tarfile.BLOCKSIZE:
            raise InputError(f"{path}: not an index of shards: an image begins before its header")
        return cls(shards, stamps, keys, labels, places, left_out)


def _pack(names: Iterable[str]) -> np.ndarray:
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
        if stored.shards == names and np.array_equal(stored.stamps, stamps) and stored.left_out is not None:
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
    paths = sorted(path for path in root.glob("*") if path.suffix.lower() == ".tar" and not path.name.startswith("."))
    if not paths:
        raise InputError(f"data.root: {root} holds no .tar shards")
    return paths


def _write(path: Path, index: Index) -> None:
    write_atomically(path, lambda file: file.write(index.to_bytes()))


def _make_index(paths: list[Path], stamps: np.ndarray) -> Index:
    scans = [_scan(str(path)) for path in paths]
    images = [(number, *image) for number, (members, _) in enumerate(scans) for image in members]
    places = np.array([(number, offset, size) for number, _, _, offset, size in images], np.int64)
    labels = np.array([label for _, _, label, _, _ in images], np.int64)
    left_out = LeftOut.sum(left_out for _, left_out in scans)
    return Index([path.name for path in paths], stamps, [key for _, key, *_ in images], labels, places, left_out)


def _stamps(paths: list[Path]) -> np.ndarray:
    try:
        states = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot read: {error.strerror}") from error
    return np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)


def _files(root: Path) -> list[Path]:
    """The files that may hold the index of these shards, in the order in which they are tried."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return [root / FILE, cache / "lip_resnet" / f"{digest}.npz"]


def _scan(path: str) -> tuple[list[tuple[str, int, int, int]], LeftOut]:
    """((key, label, offset, size) of a shard's images in its order, the members that are not read); hidden members,
    with a name or folder that begins with a dot, are ignored."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, bytes] = {}
    unread: list[str] = []
    suffixes = readable_suffixes()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if any(part.startswith(".") for part in member.name.split("/") if part not in (".", "..")):
                    continue
                folder, file = os.path.split(member.name)
                key, _, suffix = file.partition(".")
                key, suffix = os.path.join(folder, key), suffix.lower()
                if suffix != "cls" and f".{suffix}" not in suffixes:
                    if not member.isdir():
                        unread.append(member.name)
                    continue
                if not member.isreg() or member.issparse():
                    raise InputError(
                        f"{path}: {member.name!r} is {_kind(member)}; images and labels must be plain files: pack with "
                        "tar --dereference --hard-dereference"
                    )
                content = images if suffix != "cls" else labels
                if key in content:
                    raise InputError(f"{path}: two {'labels' if suffix == 'cls' else 'images'} have the key {key!r}")
                if suffix == "cls":
                    file_object = archive.extractfile(member)
                    assert file_object is not None  # a plain file
                    labels[key] = file_object.read(_LONGEST_LABEL).strip()
                else:
                    images[key] = (member.offset_data, member.size)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not a whole tar archive: {error}") from error
    if not images:
        raise InputError(f"{path}: it holds no image")
    samples = [(key, _label(path, key, labels), *place) for key, place in images.items()]
    unread += [f"{key}.cls" for key in labels if key not in images]
    return samples, LeftOut.of(f"{os.path.basename(path)}:{name}" for name in unread)


def _kind(member: tarfile.TarInfo) -> str:
    if member.islnk() or member.issym():
        return f"a {'hard' if member.islnk() else 'symbolic'} link to {member.linkname!r}"
    return "a directory" if member.isdir() else "a sparse file" if member.issparse() else "no file"


def _label(path: str, key: str, labels: dict[str, bytes]) -> int:
    if key not in labels:
        raise InputError(f"{path}: {key!r} has no label {key}.cls")
    content = labels[key]
    if not content.isdigit() or int(content) > _HIGHEST_LABEL:
        text = content.decode("utf-8", "backslashreplace")
        raise InputError(
            f"{path}: the label {key}.cls holds {text!r}; it must be the class's number, counted from 0 (classes.txt "
            "beside the shards names the classes)"
        )
    return int(content)
