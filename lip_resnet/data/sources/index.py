"""The index of a directory of tar shards: where each image is. Read from the tar headers once, then kept in a file."""

import hashlib
import io
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lip_resnet.config import InputError
from lip_resnet.data.decode import readable_suffixes
from lip_resnet.data.sources.base import LeftOut
from lip_resnet.data.sources.patterns import summarise
from lip_resnet.data.sources.remote import MAX_REQUESTS, Remote
from lip_resnet.files import make_folder, write_atomically

FILE = "index.npz"
"""The index's name beside the shards; numpy arrays, nothing pickled."""
_SEPARATOR = b"\0"  # which a name in a tar file cannot contain
_NOT_AN_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What ``zipfile`` raises for a damaged, compressed in an unknown way, or encrypted archive."""
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|test)")
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


def index_file(names: Sequence[str] | None) -> str:
    """The name of the index beside shards: of those named, or of all in their folder."""
    return FILE if names is None else f"index-{_digest(*names)[:12]}.npz"


def read_index(root: Path, names: Sequence[str] | None = None) -> Index:
    """The index of local shards, all or those named.

    The stored one if the shards still have the names, sizes and modification times that it was made from; else a new
    one, which is stored beside them, or in the cache where they cannot be written to.

    Raises:
        InputError: there are no shards, or one is damaged or lacks a label.
    """
    shards = _shards(root, names)
    stamps = _stamps(root, shards)
    for file in _files(root, names):
        try:
            stored = Index.from_bytes(file.read_bytes(), str(file))
        except (OSError, InputError):  # missing or damaged: it is made again from the shards
            continue
        if stored.shards == shards and np.array_equal(stored.stamps, stamps) and stored.left_out is not None:
            return stored
    index = _make_index(shards, stamps, [_scan(f"{root}/{name}") for name in shards])
    for file in _files(root, names):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, index)
            break
        except (OSError, InputError):  # a read-only disk; an index that is not stored is made again
            continue
    return index


def write_index(root: Path, names: Sequence[str] | None = None) -> Index:
    """Index local shards, all or those named, again and write the file beside them.

    Raises:
        InputError: there are no shards, one is damaged or lacks a label, or the file cannot be written.
    """
    shards = _shards(root, names)
    index = _make_index(shards, _stamps(root, shards), [_scan(f"{root}/{name}") for name in shards])
    _write(root / index_file(names), index)
    return index


def index_remote(remote: Remote, names: Sequence[str] | None = None) -> tuple[Index, str]:
    """Index shards behind a URL, all in its directory or those named; each is read once.

    Returns:
        The index and where it is stored: beside the shards, or where that is not allowed in the local cache.

    Raises:
        InputError: there are no shards, one is damaged or cannot be read, or the index cannot be written.
    """
    shards = sorted(names or (name for name in remote.list() if name.lower().endswith(".tar")))
    if not shards:
        raise InputError(f"{remote.url} holds no .tar shards")
    if names is None:
        _check_one_split(remote.url, shards)

    def scan(name: str) -> _Scan:
        with remote.open(name) as file:
            return _scan(f"{remote.url}/{name}", file)

    stamps = np.array([(remote.size(name), 0) for name in shards], np.int64)
    with ThreadPoolExecutor(MAX_REQUESTS) as threads:
        index = _make_index(shards, stamps, list(threads.map(scan, shards)))
    try:
        remote.write(index_file(names), index.to_bytes())
        return index, f"{remote.url}/{index_file(names)}"
    except InputError as error:
        path = cached_index(remote.url, names)
        print(f"note: {error}; the index goes to the local cache", file=sys.stderr)
        make_folder(path.parent)
        _write(path, index)
        return index, str(path)


def cached_index(root: str, names: Sequence[str] | None = None) -> Path:
    """The file of the local cache (XDG_CACHE_HOME) that may hold the index of shards; ``root``: a URL or full path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "lip_resnet" / f"{_digest(root, *(names or ()))[:32]}.npz"


def _digest(*names: str) -> str:
    return hashlib.sha256(_SEPARATOR.join(map(os.fsencode, names))).hexdigest()


def _shards(root: Path, names: Sequence[str] | None) -> list[str]:
    """The names of the shards, sorted; those asked for must exist."""
    present = sorted(path.name for path in root.glob("*") if path.suffix.lower() == ".tar" and path.name[0] != ".")
    if names is None:
        if not present:
            raise InputError(f"data.root: {root} holds no .tar shards")
        _check_one_split(root, present)
        return present
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise InputError(
            f"data.root: {len(missing):,} of the {len(names):,} shards that are named are missing in {root}, the "
            f"first is {missing[0]}; it holds {summarise(present)}"
        )
    return sorted(names)


def _check_one_split(root: Path | str, shards: list[str]) -> None:
    if len({word[0] for name in shards if (word := _SPLIT_WORD.search(name))}) > 1:
        raise InputError(
            f"data.root: {root} holds shards of several splits: {summarise(shards)}; name those of each by data.train "
            "and data.val (in an evaluation: --data DIR/PATTERN)"
        )


def _write(path: Path, index: Index) -> None:
    write_atomically(path, lambda file: file.write(index.to_bytes()))


_Scan = tuple[list[tuple[str, int, int, int]], LeftOut]
"""Of a shard: (key, label, offset, size) of its images, and what is left out."""


def _make_index(shards: list[str], stamps: np.ndarray, scans: list[_Scan]) -> Index:
    images = [(number, *image) for number, (members, _) in enumerate(scans) for image in members]
    places = np.array([(number, offset, size) for number, _, _, offset, size in images], np.int64)
    labels = np.array([label for _, _, label, _, _ in images], np.int64)
    left_out = LeftOut.sum(left_out for _, left_out in scans)
    return Index(shards, stamps, [key for _, key, *_ in images], labels, places, left_out)


def _stamps(root: Path, shards: list[str]) -> np.ndarray:
    try:
        states = [(root / name).stat() for name in shards]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot read: {error.strerror}") from error
    return np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)


def _files(root: Path, names: Sequence[str] | None) -> list[Path]:
    """The files that may hold the index of these shards, in the order in which they are tried."""
    return [root / index_file(names), cached_index(str(root.resolve()), names)]


def _scan(path: str, opened: BinaryIO | None = None) -> _Scan:
    """((key, label, offset, size) of a shard's images in its order, the members that are not read); hidden members,
    with a name or folder that begins with a dot, are ignored."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, bytes] = {}
    unread: list[str] = []
    suffixes = readable_suffixes()
    try:
        with tarfile.open(path, "r:", opened) as archive:
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
