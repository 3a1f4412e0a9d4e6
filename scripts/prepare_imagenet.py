"""ImageNet's archives to folders or shards:  python scripts/prepare_imagenet.py --archives DIR --output DIR/imagenet

Reads ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as they were downloaded, each
once, as a stream, without intermediate copies. The same command continues a run that was killed.
With --effect FOLDER it writes nothing, but measures what --longest and --quality do to the images there.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bench import reencoding
from torchvision.datasets.imagenet import ARCHIVE_META
from tqdm import tqdm

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.data.sources.index import write_index
from lip_resnet.files import to_json, write_text

_DATA = "ILSVRC2012_devkit_t12/data"
_PER_SHARD = 1000
_BYTES = {"train": 147_897_477_120, "val": 6_744_924_160}  # of the official archives
_CLASS, _TRAIN, _VAL = r"n\d{8}\.tar", r"n\d{8}_\d+\.JPEG", r"ILSVRC2012_val_(\d{8})\.JPEG"

Member = tuple[str, str, BinaryIO, int]
"""An image of an archive: class, file name, its data, bytes."""
Encode = Callable[[bytes, str], bytes]
"""(an image file's bytes, its name) -> the re-encoded file's bytes."""
T = TypeVar("T")


class _Hashed(io.RawIOBase):
    """A file that is read as a stream, with its md5 and a progress bar."""

    def __init__(self, path: Path) -> None:
        self.file, self.md5 = open(path, "rb"), hashlib.md5()  # noqa: SIM115 (closed by close())
        self.bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.md5.update(data)
        self.bar.update(len(data))
        return data

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        super().close()


def read_archive(path: Path, read: Callable[[tarfile.TarFile], T]) -> tuple[T, str]:
    """What ``read`` returns for a tar file, which it reads as a stream; and the md5 of the whole file.

    Raises:
        InputError: the file is missing, or not a whole tar file.
    """
    try:
        with _Hashed(path) as file:
            with tarfile.open(fileobj=file, mode="r|*" if path.suffix == ".gz" else "r|") as archive:
                value = read(archive)
            while file.read(1 << 20):  # the md5 covers the bytes after the archive's end too
                pass
            return value, file.md5.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a whole tar archive: {error}") from error


def read_devkit(path: Path) -> tuple[str, list[str], list[str]]:
    """The devkit's md5, the classes (WordNet IDs) sorted, and the class of every validation image in order.

    Raises:
        InputError: it is not the devkit, or scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f'the devkit needs scipy: pip install "lip-resnet[data]" ({error})') from error

    needed = {f"{_DATA}/meta.mat", f"{_DATA}/ILSVRC2012_validation_ground_truth.txt"}

    def read(archive: tarfile.TarFile) -> dict[str, bytes]:
        return {member.name: archive.extractfile(member).read() for member in archive if member.name in needed}

    files, md5 = read_archive(path, read)
    if set(files) != needed:
        raise InputError(f"{path}: not ImageNet's devkit; it lacks {min(needed - set(files))}")
    synsets = loadmat(io.BytesIO(files[f"{_DATA}/meta.mat"]), squeeze_me=True)["synsets"]
    # The leaves are the classes; the other synsets are the hierarchy above them.
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if not row["num_children"]}
    truth = files[f"{_DATA}/ILSVRC2012_validation_ground_truth.txt"].split()
    return md5, sorted(names.values()), [names[int(number)] for number in truth]


def train_images(archive: tarfile.TarFile, path: Path) -> Iterator[Member]:
    """The images of the archive of one archive a class."""
    for member in archive:
        if not re.fullmatch(_CLASS, member.name):
            raise InputError(f"{path}: not ImageNet's training archive; it holds {member.name!r}")
        with tarfile.open(fileobj=archive.extractfile(member), mode="r|") as inner:
            for image in inner:
                if not re.fullmatch(_TRAIN, image.name):
                    raise InputError(f"{path}: {member.name} holds {image.name!r}")
                yield member.name[:9], image.name, inner.extractfile(image), image.size


def val_images(archive: tarfile.TarFile, path: Path, truth: list[str]) -> Iterator[Member]:
    """The images of the flat archive, with the devkit's classes."""
    for member in archive:
        match = re.fullmatch(_VAL, member.name)
        if match is None or not 1 <= int(match[1]) <= len(truth):
            raise InputError(f"{path}: not ImageNet's validation archive; it holds {member.name!r}")
        yield truth[int(match[1]) - 1], member.name, archive.extractfile(member), member.size


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


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: cannot make {folder}: {error.strerror or error}") from error


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
                _make(path.parent)
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
    """Write tar shards in WebDataset layout, in the archive's order, with classes.txt and their index beside them; a
    shard that exists is whole, and is left as it is.

    Args:
        classes: every class, sorted: a label is an index in this list.

    Returns:
        The number of ``images`` and ``classes``.
    """
    _make(folder)
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


def check(path: Path, md5: str, any_archive: bool) -> None:
    """Compare with the published checksum.

    Raises:
        InputError: it differs.
    """
    official = dict(ARCHIVE_META.values())[path.name]
    if md5 != official and not any_archive:
        raise InputError(
            f"{path}: its md5 is {md5}, the official archive's {official}: it is damaged, or another one; do not use "
            "what was written of it (--any-archive accepts it)"
        )


def check_there(paths: dict[str, Path], any_archive: bool) -> None:
    """Check that all archives exist and have the official sizes, before hours of reading.

    Raises:
        InputError: one is missing, or has another size.
    """
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise InputError(f"--archives: there is no {', no '.join(missing)}")
    for key, official in _BYTES.items():
        size = paths[key].stat().st_size
        if size != official and not any_archive:
            raise InputError(
                f"{paths[key]} has {size:,} bytes, the official archive {official:,}: is its download complete? "
                "(--any-archive accepts it)"
            )


def parse() -> Any:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archives", type=Path, help="the directory of the three archives")
    parser.add_argument("--output", type=Path, help="where train/ and val/ are written")
    parser.add_argument("--format", choices=("folder", "shards"), default="folder", help="class folders or tar shards")
    parser.add_argument("--longest", type=int, help="re-encode: the longest side is at most this, pixels, such as 500")
    parser.add_argument("--quality", type=int, default=90, help="of re-encoded JPEG files (default: 90)")
    parser.add_argument("--any-archive", action="store_true", help="accept archives with other checksums")
    parser.add_argument(
        "--effect", type=Path, metavar="FOLDER", help="write nothing; measure re-encoding (to 500) on the images there"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of the timing of --effect (default: 9)")
    options = parser.parse_args()
    for key, low, high in (("longest", 1, None), ("quality", 1, 95), ("rounds", 2, None)):
        value = getattr(options, key)
        if value is not None and (value < low or (high and value > high)):
            raise InputError(f"--{key} is {value}; it must be {f'{low} to {high}' if high else f'at least {low}'}")
    if bool(options.archives and options.output) == bool(options.effect):
        raise InputError("give --archives DIR and --output DIR, or --effect FOLDER")
    return options


def main() -> None:
    options = parse()
    if options.effect:
        print(reencoding.effect(options.effect, options.longest or 500, options.quality, options.rounds))
        return
    shrink = functools.partial(reencoding.shrink, longest=options.longest, quality=options.quality)
    encode = shrink if options.longest else None
    paths = {key: options.archives / name for key, (name, _) in ARCHIVE_META.items()}
    check_there(paths, options.any_archive)
    quality = options.quality if options.longest else None
    encoding = {"format": options.format, "longest": options.longest, "quality": quality}
    record = options.output / "prepared.json"
    done = _begun(record) or {"encoding": encoding}
    if done["encoding"] != encoding:
        raise InputError(
            f"--output {options.output} holds images written with {done['encoding']}, not {encoding}; choose another"
        )
    _make(options.output)
    write_text(record, to_json(done, indent=2) + "\n")

    md5, classes, truth = read_devkit(paths["devkit"])
    check(paths["devkit"], md5, options.any_archive)
    images = {
        "val": functools.partial(val_images, path=paths["val"], truth=truth),
        "train": functools.partial(train_images, path=paths["train"]),
    }
    write = functools.partial(write_shards, classes=classes) if options.format == "shards" else write_folder
    for split, members in images.items():
        if split in done:
            print(f"{split}: {done[split]['images']} images, already done")
            continue
        to = options.output / split
        counts, md5 = read_archive(paths[split], lambda archive, read=members, to=to: write(read(archive), to, encode))
        check(paths[split], md5, options.any_archive)
        done[split] = {**counts, "md5": md5}
        write_text(record, to_json(done, indent=2) + "\n")
        print(f"{split}: {counts['images']} images of {counts['classes']} classes")


def _begun(record: Path) -> dict[str, Any] | None:
    """The record of an earlier call; None if there is none."""
    try:
        done = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if done is None or isinstance(done["encoding"], dict):
            return done
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{record}: damaged; remove it: the same command then reads the archives again, and keeps the files written"
    )


if __name__ == "__main__":
    cli.launch(main)
