"""ImageNet to folders or shards:  python scripts/prepare_imagenet.py (--archives DIR | --kaggle DIR) --output DIR

--archives: the folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as they were
downloaded; each is read once, as a stream, without intermediate copies. --kaggle: the folder that holds Kaggle's
ILSVRC/ and LOC_val_solution.csv; its images are linked, not copied, unless --format shards or --longest is given.
The same command continues a run that was killed.
With --effect FOLDER it writes nothing, but measures what --longest and --quality do to the images there.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import reencoding
from prepare import archives, kaggle
from prepare.writing import Member, write_folder, write_shards
from torchvision.datasets.imagenet import ARCHIVE_META

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.files import make_folder, to_json, write_text


def parse() -> Any:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archives", type=Path, metavar="DIR", help="the directory of the three archives")
    parser.add_argument("--kaggle", type=Path, metavar="DIR", help="the directory that holds Kaggle's ILSVRC/")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where train/ and val/ are written")
    parser.add_argument("--format", choices=("folder", "shards"), default="folder", help="class folders or tar shards")
    parser.add_argument("--longest", type=int, help="re-encode: the longest side is at most this, pixels, such as 500")
    parser.add_argument("--quality", type=int, default=90, help="of re-encoded JPEG files (default: 90)")
    parser.add_argument("--any-archive", action="store_true", help="accept other checksums, counts and labels")
    parser.add_argument(
        "--effect", type=Path, metavar="FOLDER", help="write nothing; measure re-encoding (to 500) on the images there"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of the timing of --effect (default: 9)")
    options = parser.parse_args()
    for key, low, high in (("longest", 1, None), ("quality", 1, 95), ("rounds", 2, None)):
        value = getattr(options, key)
        if value is not None and (value < low or (high and value > high)):
            raise InputError(f"--{key} is {value}; it must be {f'{low} to {high}' if high else f'at least {low}'}")
    given = [key for key in ("archives", "kaggle", "effect") if getattr(options, key)]
    if len(given) != 1 or bool(options.output) == bool(options.effect):
        raise InputError("give --archives DIR or --kaggle DIR, with --output DIR; or --effect FOLDER")
    return options


Job = Callable[[Path], dict[str, Any]]
"""The folder of a split -> what prepared.json says of it, when its images are there."""


def main() -> None:
    options = parse()
    if options.effect:
        print(reencoding.effect(options.effect, options.longest or 500, options.quality, options.rounds))
        return
    if options.archives:
        paths = {key: options.archives / name for key, (name, _) in ARCHIVE_META.items()}
        archives.check_there(paths, options.any_archive)
    else:
        images = kaggle.open_kaggle(options.kaggle, options.any_archive)
        if options.output.resolve().is_relative_to(images.images):
            raise InputError(f"--output {options.output} is in {images.images}; choose another")
    links = options.kaggle is not None and options.format == "folder" and not options.longest
    quality = options.quality if options.longest else None
    encoding = {"format": "links" if links else options.format, "longest": options.longest, "quality": quality}
    record = options.output / "prepared.json"
    done = _begun(record) or {"encoding": encoding}
    if done["encoding"] != encoding:
        raise InputError(
            f"--output {options.output} holds images written with {done['encoding']}, not {encoding}; choose another"
        )
    make_folder(options.output)
    write_text(record, to_json(done, indent=2) + "\n")
    if links:
        jobs: dict[str, Job] = {"val": images.link_val, "train": images.link_train}
    else:
        jobs = archive_jobs(paths, options) if options.archives else kaggle_jobs(images, options)
    for split, job in jobs.items():
        if split in done:
            print(f"{split}: {done[split]['images']} images, already done")
            continue
        done[split] = job(options.output / split)
        write_text(record, to_json(done, indent=2) + "\n")
        print(f"{split}: {done[split]['images']} images of {done[split]['classes']} classes")


def archive_jobs(paths: dict[str, Path], options: Any) -> dict[str, Job]:
    """What writes each split from its archive, and checks the archive."""
    md5, classes, truth = archives.read_devkit(paths["devkit"])
    archives.check(paths["devkit"], md5, options.any_archive)
    images = {
        "val": functools.partial(archives.val_images, path=paths["val"], truth=truth),
        "train": functools.partial(archives.train_images, path=paths["train"]),
    }

    def write(split: str, to: Path) -> dict[str, Any]:
        def read(archive: Any) -> dict[str, int]:
            return write_images(images[split](archive), to, classes, options)

        counts, md5 = archives.read_archive(paths[split], read)
        archives.check(paths[split], md5, options.any_archive)
        return {**counts, "md5": md5}

    return {split: functools.partial(write, split) for split in images}


def kaggle_jobs(images: kaggle.Kaggle, options: Any) -> dict[str, Job]:
    """What writes each split from Kaggle's files."""
    return {
        "val": lambda to: write_images(images.val_images(), to, images.classes, options),
        "train": lambda to: write_images(images.train_images(), to, images.classes, options),
    }


def write_images(images: Iterator[Member], to: Path, classes: list[str], options: Any) -> dict[str, int]:
    """The images as --format, --longest and --quality say: the number of ``images`` and ``classes`` written."""
    shrink = functools.partial(reencoding.shrink, longest=options.longest, quality=options.quality)
    encode = shrink if options.longest else None
    if options.format == "shards":
        return write_shards(images, to, encode, classes)
    return write_folder(images, to, encode)


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
