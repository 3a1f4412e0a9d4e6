"""ImageNet's archives to folders or shards:  python scripts/prepare_imagenet.py --archives DIR --output DIR/imagenet

Reads ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as they were downloaded, each
once from front to back, and writes every image straight to its place. A killed run goes on with the same command.
With --effect FOLDER instead, it measures on the images there what --longest and --quality would do.
"""

import contextlib
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
from typing import Any, BinaryIO

from scipy.io import loadmat
from torchvision.datasets.imagenet import ARCHIVE_META
from tqdm import tqdm

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.data import reencoding
from lip_resnet.data.sources.index import write_index
from lip_resnet.files import write_atomically

_DATA = "ILSVRC2012_devkit_t12/data"
_PER_SHARD = 1000
_BYTES = {"train": 147_897_477_120, "val": 6_744_924_160}  # of the official archives
_CLASS, _TRAIN, _VAL = r"n\d{8}\.tar", r"n\d{8}_\d+\.JPEG", r"ILSVRC2012_val_(\d{8})\.JPEG"


class _Hashed(io.RawIOBase):
    """A file that is read once, front to back, hashed and shown on a progress bar as it goes."""

    def __init__(self, path: Path) -> None:
        self.file, self.md5 = open(path, "rb"), hashlib.md5()  # noqa: SIM115 (closed by close())
        self.bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.md5.update(data)
        self.bar.update(len(data))
        return data

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        super().close()


def read_archive(path: Path, visit: Callable[[tarfile.TarFile], None]) -> str:
    """Let ``visit`` read a tar file as a stream; the md5 of the whole file.

    Raises:
        InputError: it is not there, or not a tar file.
    """
    try:
        with _Hashed(path) as file:
            with tarfile.open(fileobj=file, mode="r|*" if path.suffix == ".gz" else "r|") as archive:
                visit(archive)
            while file.read(1 << 20):  # what tar does not need counts too
                pass
            return file.md5.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a whole tar archive: {error}") from error


def read_devkit(path: Path) -> tuple[str, list[str], list[str]]:
    """The devkit's md5, the classes (WordNet IDs) sorted, and the class of every validation image in order.

    Raises:
        InputError: it is not the devkit.
    """
    files: dict[str, bytes] = {}
    wanted = {f"{_DATA}/meta.mat", f"{_DATA}/ILSVRC2012_validation_ground_truth.txt"}

    def visit(archive: tarfile.TarFile) -> None:
        for member in archive:
            if member.name in wanted:
                files[member.name] = archive.extractfile(member).read()

    md5 = read_archive(path, visit)
    if set(files) != wanted:
        raise InputError(f"{path}: not ImageNet's devkit; it lacks {min(wanted - set(files))}")
    synsets = loadmat(io.BytesIO(files[f"{_DATA}/meta.mat"]), squeeze_me=True)["synsets"]
    # The leaves are the classes; the other synsets are the hierarchy above them.
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if not row["num_children"]}
    truth = files[f"{_DATA}/ILSVRC2012_validation_ground_truth.txt"].split()
    return md5, sorted(names.values()), [names[int(number)] for number in truth]


def train_images(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, str, BinaryIO, int]]:
    """(class, file name, its data, bytes) of the archive of archives."""
    for member in archive:
        if not re.fullmatch(_CLASS, member.name):
            raise InputError(f"{path}: not ImageNet's training archive; it holds {member.name!r}")
        with tarfile.open(fileobj=archive.extractfile(member), mode="r|") as inner:
            for image in inner:
                if not re.fullmatch(_TRAIN, image.name):
                    raise InputError(f"{path}: {member.name} holds {image.name!r}")
                yield member.name[:9], image.name, inner.extractfile(image), image.size


def val_images(archive: tarfile.TarFile, path: Path, truth: list[str]) -> Iterator[tuple[str, str, BinaryIO, int]]:
    """(class, file name, its data, bytes) of the flat archive; the classes are the devkit's."""
    for member in archive:
        found = re.fullmatch(_VAL, member.name)
        if found is None or not 1 <= int(found[1]) <= len(truth):
            raise InputError(f"{path}: not ImageNet's validation archive; it holds {member.name!r}")
        yield truth[int(found[1]) - 1], member.name, archive.extractfile(member), member.size


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A place to write a file, which gets its name when it is whole.

    Raises:
        InputError: it cannot be written; nothing of it stays.
    """
    part = path.with_suffix(".part")
    try:
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        again = "; what is written stays, and the same command goes on from there"
        raise InputError(f"--output: cannot write {path}: {error.strerror or error}{again}") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: cannot make {folder}: {error.strerror or error}") from error


class Writer:
    """Writes images beside each other in threads; an existing file is whole and is left as it is."""

    def __init__(self, folder: Path, longest: int | None, quality: int) -> None:
        self.folder, self.longest, self.quality = folder, longest, quality
        self.images, self.classes = 0, set()
        self.pending: deque[Future] = deque()

    def write_all(self, images: Iterator[tuple[str, str, BinaryIO, int]]) -> None:
        """Every image to folder/class/name."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for label, name, file, size in images:
                path = self.folder / label / name
                if label not in self.classes:
                    _make(path.parent)
                    self.classes.add(label)
                self.images += 1
                # A re-encoded file's size is not known, but only whole files ever get their name.
                if path.is_file() and (self.longest or path.stat().st_size == size):
                    continue
                self.pending.append(threads.submit(self._write, path, file.read()))
                while len(self.pending) > 256:
                    self.pending.popleft().result()
            while self.pending:
                self.pending.popleft().result()

    def _write(self, path: Path, data: bytes) -> None:
        if self.longest:
            data = reencoding.shrink(data, path.name, self.longest, self.quality)
        with _written(path) as part:
            part.write_bytes(data)


class ShardWriter(Writer):
    """Writes tar shards in WebDataset layout, in the archive's order; an existing shard is whole and is left as it is.

    Args:
        classes: every class, sorted: a label is a place among them.
    """

    def __init__(self, folder: Path, longest: int | None, quality: int, classes: list[str]) -> None:
        super().__init__(folder, longest, quality)
        self.labels = {name: label for label, name in enumerate(classes)}

    def write_all(self, images: Iterator[tuple[str, str, BinaryIO, int]]) -> None:
        """Every image to folder/NNNNNN.tar, _PER_SHARD in each, and where each lies to the index beside them."""
        _make(self.folder)
        names = "".join(f"{name}\n" for name in self.labels).encode()
        write_atomically(self.folder / "classes.txt", lambda file: file.write(names))
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            batch: list[tuple[str, str, Future]] = []
            for label, name, file, _ in images:
                path = self._shard(self.images)
                self.images += 1
                self.classes.add(label)
                if not path.is_file():
                    batch.append((label, name, threads.submit(self._encode, file.read(), name)))
                if batch and self.images % _PER_SHARD == 0:
                    self._close(path, batch)
            if batch:
                self._close(path, batch)
        write_index(self.folder)

    def _shard(self, image: int) -> Path:
        return self.folder / f"{image // _PER_SHARD:06}.tar"

    def _encode(self, data: bytes, name: str) -> bytes:
        return reencoding.shrink(data, name, self.longest, self.quality) if self.longest else data

    def _close(self, path: Path, batch: list[tuple[str, str, Future]]) -> None:
        with _written(path) as part, tarfile.open(part, "w") as archive:
            for label, name, encoded in batch:
                key = name.removesuffix(".JPEG")
                for suffix, data in (("jpg", encoded.result()), ("cls", str(self.labels[label]).encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        batch.clear()


def check(path: Path, md5: str, any_archive: bool) -> None:
    """Compare with the published checksum.

    Raises:
        InputError: it differs.
    """
    official = dict(ARCHIVE_META.values())[path.name]
    if md5 != official and not any_archive:
        raise InputError(
            f"{path}: its md5 is {md5}, the official archive's {official}: it is damaged, or another; what was written "
            "of it cannot be trusted (--any-archive accepts it)"
        )


def check_there(paths: dict[str, Path], any_archive: bool) -> None:
    """All archives are there, and as long as the official ones: that takes no reading.

    Raises:
        InputError: one is not.
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
        "--effect", type=Path, metavar="FOLDER", help="write nothing: measure re-encoding (of 500) on the images there"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of --effect's timing (default: 9)")
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
        longest = options.longest or 500
        result = reencoding.measure(options.effect, longest, options.quality, options.rounds)
        print(reencoding.render(result, longest, options.quality))
        return
    paths = {key: options.archives / name for key, (name, _) in ARCHIVE_META.items()}
    check_there(paths, options.any_archive)
    encoding = {
        "format": options.format,
        "longest": options.longest,
        "quality": options.quality if options.longest else None,
    }
    record = options.output / "prepared.json"
    done = _begun(record) or {"encoding": encoding}
    if done["encoding"] != encoding:
        raise InputError(f"--output {options.output} was begun with {done['encoding']}; choose another")
    _make(options.output)
    _save(record, done)

    md5, classes, truth = read_devkit(paths["devkit"])
    check(paths["devkit"], md5, options.any_archive)
    for split in ("val", "train"):
        if split in done:
            print(f"{split}: {done[split]['images']} images, already done")
            continue
        path, arguments = paths[split], (options.output / split, options.longest, options.quality)
        writer = ShardWriter(*arguments, classes) if options.format == "shards" else Writer(*arguments)

        def visit(archive: tarfile.TarFile, split: str = split, path: Path = path, writer: Writer = writer) -> None:
            images = train_images(archive, path) if split == "train" else val_images(archive, path, truth)
            writer.write_all(images)

        md5 = read_archive(path, visit)
        check(path, md5, options.any_archive)
        done[split] = {"images": writer.images, "classes": len(writer.classes), "md5": md5}
        _save(record, done)
        print(f"{split}: {writer.images} images of {len(writer.classes)} classes")


def _begun(record: Path) -> dict[str, Any] | None:
    """What an earlier call has done, None for nothing."""
    try:
        done = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if done is None or isinstance(done["encoding"], dict):
            return done
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{record}: damaged; remove it, and the same command reads the archives again, leaving whole files"
    )


def _save(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    cli.launch(main)
