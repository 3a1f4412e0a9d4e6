"""ImageNet's three official archives, each read once, as a stream."""

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torchvision.datasets.imagenet import ARCHIVE_META
from tqdm import tqdm

from lip_resnet.config import InputError
from prepare.writing import Member

_DATA = "ILSVRC2012_devkit_t12/data"
_BYTES = {"train": 147_897_477_120, "val": 6_744_924_160}  # of the official archives
_CLASS, _TRAIN, _VAL = r"n\d{8}\.tar", r"n\d{8}_\d+\.JPEG", r"ILSVRC2012_val_(\d{8})\.JPEG"

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
