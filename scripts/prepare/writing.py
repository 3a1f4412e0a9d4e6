"""Images to class folders or tar shards; a file that exists is whole, and is left as it is."""

import contextlib
import io
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from lip_resnet.config import InputError
from lip_resnet.data.sources.index import write_index
from lip_resnet.files import make_folder, write_text

_PER_SHARD = 1000

Member = tuple[str, str, BinaryIO, int]
"""An image: class, file name, its data, bytes."""
Encode = Callable[[bytes, str], bytes]
"""(an image file's bytes, its name) -> the re-encoded file's bytes."""


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """The path of a temporary file that is renamed to ``path`` at the end, or removed if it cannot be written."""
    part = path.with_suffix(".part")
    try:
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"--output: cannot write {path}: {error.strerror or error}; what is written stays, and the same command "
            "continues from there"
        ) from error


def write_folder(images: Iterator[Member], folder: Path, encode: Encode | None) -> dict[str, int]:
    """Write every image to folder/class/name; a file that exists is whole, and is left as it is.

    Returns:
        The number of ``images`` and ``classes``.
    """
    classes: set[str] = set()
    pending: deque[Future] = deque()
    count = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for label, name, file, size in images:
            count += 1
            path = folder / label / name
            if label not in classes:
                make_folder(path.parent)
                classes.add(label)
            # A re-encoded file's size is not known, but only whole files ever get their name.
            if path.is_file() and (encode or path.stat().st_size == size):
                continue
            pending.append(threads.submit(_write_image, path, file.read(), encode))
            if len(pending) > 256:
                pending.popleft().result()
        for write in pending:
            write.result()
    return {"images": count, "classes": len(classes)}


def _write_image(path: Path, data: bytes, encode: Encode | None) -> None:
    data = encode(data, path.name) if encode else data
    with _written(path) as part:
        part.write_bytes(data)


def write_shards(images: Iterator[Member], folder: Path, encode: Encode | None, classes: list[str]) -> dict[str, int]:
    """Write tar shards in WebDataset layout, in the order of the images, with classes.txt and their index beside them.

    A shard that exists is whole, and is left as it is.

    Args:
        classes: every class, sorted: a label is an index in this list.

    Returns:
        The number of ``images`` and ``classes``.
    """
    make_folder(folder)
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in classes))
    labels = {name: label for label, name in enumerate(classes)}
    batch: list[tuple[str, int, Future[bytes]]] = []
    present: set[str] = set()
    count = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for label, name, file, _ in images:
            path = folder / f"{count // _PER_SHARD:06}.tar"
            count += 1
            present.add(label)
            if not path.is_file():
                data = file.read()
                encoded = threads.submit(encode, data, name) if encode else threads.submit(bytes, data)
                batch.append((name, labels[label], encoded))
            if batch and count % _PER_SHARD == 0:
                _write_shard(path, batch)
                batch = []
        if batch:
            _write_shard(path, batch)
    write_index(folder)
    return {"images": count, "classes": len(present)}


def _write_shard(path: Path, images: list[tuple[str, int, Future[bytes]]]) -> None:
    with _written(path) as part, tarfile.open(part, "w") as archive:
        for name, label, encoded in images:
            key = name.removesuffix(".JPEG")
            for suffix, data in (("jpg", encoded.result()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
