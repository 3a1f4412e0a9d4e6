"""Decode every image of a data set:  python scripts/check_dataset.py DIR

Of class folders, shards, or COCO's layout (annotations/, whose boxes and image sizes are checked too).

Opens the set as training does, and so refuses what training refuses; prints the numbers of images and classes, and
lists the files that training and evaluation cannot decode or resize. If there are none, it writes DIR/fingerprint.json,
which runs and rows then record.
"""

import hashlib
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from lip_resnet import cli
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.decode import BadImage, check_scan, decode_exact, image_errors, one_line
from lip_resnet.data.fingerprint import FILE, digest, names_of
from lip_resnet.data.sources import build_sources
from lip_resnet.data.sources.base import Encoded
from lip_resnet.data.transforms import check_resize
from lip_resnet.evaluation import testsets
from lip_resnet.evaluation.location import layout
from lip_resnet.files import to_json, write_text

_IMAGENET = {"train": 1_281_167, "val": 50_000}

_source: Encoded  # in each worker process
_check: Callable[[Image.Image, int], None]


def _init_worker(source: Encoded, check: Callable[[Image.Image, int], None]) -> None:
    global _source, _check
    _source, _check = source, check
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one ends the others


def check_image(index: int) -> tuple[int, str, str | None]:
    """(bytes, sha256, error) of one image; (0, "", the line of the error) of one that a run would refuse."""
    path = _source.path(index)
    try:
        with image_errors(path, "load"):
            data = _source.read(index)
            image = decode_exact(data, path)
            check_scan(data, path)
            _check(image, index)
    except BadImage as error:
        return 0, "", str(error)
    return len(data), hashlib.sha256(data).hexdigest(), None


def open_splits(root: Path, splits: list[str]) -> list[Any]:
    """The class folders or shards of a directory, opened and checked as training opens them."""
    layouts = [layout(root / split) for split in splits]
    if layouts[0] != layouts[-1]:
        kinds = {"folder": "class folders", "shards": "tar shards"}
        raise InputError(f"{root}: train/ holds {kinds[layouts[0]]} and val/ {kinds[layouts[1]]}; a set has one kind")
    return build_sources(EvalDataConfig(name=layouts[0], root=str(root)), None, tuple(splits))


def check_nothing(image: Image.Image, index: int) -> None:
    """For training images, whose crops are resized."""


def check_evaluated(image: Image.Image, index: int) -> None:
    """That an evaluation can resize an image, with the default eval_resize."""
    check_resize(image, EvalDataConfig(name="digits"))


def open_coco(root: Path) -> dict[str, Any]:
    """The splits of a set in COCO's layout -> their sources: every annotations/instances_NAME.json, opened as training
    opens NAME if it begins with train, and as an evaluation the others."""
    from lip_resnet.config.detection import EvalDetectionDataConfig
    from lip_resnet.detection.coco import CocoSource

    names = sorted(path.stem.removeprefix("instances_") for path in (root / "annotations").glob("instances_*.json"))
    if not names:
        raise InputError(f"{root / 'annotations'} holds no instances_*.json, the boxes of a split")
    config = EvalDetectionDataConfig(root=str(root))
    kinds = {name: "train" if name.startswith("train") else "val" for name in names}
    sources = {
        name: CocoSource(config.model_copy(update={f"{kind}_split": name}), kind) for name, kind in kinds.items()
    }
    for name, source in sources.items():
        if (source.classes, source.category_ids) != (sources[names[0]].classes, sources[names[0]].category_ids):
            raise InputError(f"{root}: {name} has other categories than {names[0]}")
    return sources


def check_images(
    source: Encoded, workers: int, check: Callable[[Image.Image, int], None]
) -> list[tuple[int, str, str | None]]:
    """``check_image`` of every image, in processes.

    Raises:
        InputError: a process was killed.
    """
    with ProcessPoolExecutor(workers, initializer=_init_worker, initargs=(source, check)) as pool:
        try:
            results = pool.map(check_image, range(len(source)), chunksize=32)
            return list(tqdm(results, total=len(source), unit="image", desc=source.root.name, disable=None))
        except BrokenProcessPool as error:
            raise InputError(
                f"{source.root}: a process was killed, perhaps out of memory; try fewer --workers than {workers}"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_split(
    source: Encoded, workers: int, check: Callable[[Image.Image, int], None]
) -> tuple[dict[str, object], list[str]]:
    """One split -> (its entry of the fingerprint, errors of bad files); ``check`` is called with each image."""
    names, results = names_of(source), check_images(source, workers, check)
    bad = [error for _, _, error in results if error]
    lines = (
        b"%s %d %s" % (name, size, checksum.encode()) for name, (size, checksum, _) in zip(names, results, strict=True)
    )
    entry: dict[str, object] = {
        "images": len(source),
        "classes": len(source.classes),
        "class_order": digest(map(os.fsencode, source.classes)),
        "bytes": sum(size for size, _, _ in results),
        "names": digest(names),
        "content": digest(lines),
    }
    return entry, bad


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    layouts = "train/, val/ or both (class folders or shards), or COCO's annotations/"
    parser.add_argument("root", type=Path, help=f"the directory that holds {layouts}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--output", type=Path, help=f"file of the fingerprint (default: DIR/{FILE})")
    options = parser.parse_args()
    output = options.output or options.root / FILE
    if options.workers < 1:
        raise InputError(f"--workers is {options.workers}; it must be at least 1")
    if not output.resolve().parent.is_dir():
        raise InputError(f"--output {output}: {output.parent} is not a directory")
    splits = [split for split in ("train", "val") if (options.root / split).is_dir()]
    is_coco = any(options.root.glob("annotations/instances_*.json" if splits else "annotations"))
    coco = open_coco(options.root) if is_coco else {}
    if not splits and not coco:
        hint = "; give the directory above it" if options.root.resolve().name in ("train", "val") else ""
        raise InputError(f"{options.root} holds neither train/ nor val/ nor annotations/{hint}")
    entries, problems = {}, []
    checks = {"train": check_nothing, "val": check_evaluated}
    opened = {} if coco else dict(zip(splits, open_splits(options.root, splits), strict=True))
    todo = [(name, source.files, source.check_size) for name, source in coco.items()]
    todo += [(split, source, checks[split]) for split, source in opened.items()]
    for split, source, check in todo:
        entry, bad = check_split(source, options.workers, check)
        if split in coco:
            entry |= {key: coco[split].describe()[key] for key in ("boxes", "annotations")}
        entries[split] = entry
        print(f"{split}: {entry['images']} images, {entry['classes']} classes, {entry['bytes']} bytes, {len(bad)} bad")
        print(*(f"bad: {one_line(line)}\n" for line in bad), sep="", end="")
        if source.left_out.files:
            print(f"{split}: {source.left_out}")
        problems += bad
        if list(source.classes) == testsets.wnids():
            complete = entry["images"] == _IMAGENET[split]
            print(
                f"{split}: ImageNet has {_IMAGENET[split]} images" + ("" if complete else ", this set another number")
            )
    if len(splits) == 1:
        print(f"note: {options.root} has no {'val' if splits == ['train'] else 'train'}/, which training needs")
    if problems:
        raise InputError(f"{options.root}: {len(problems)} bad files, listed above; the first is {problems[0]}")
    write_text(output, to_json(entries, indent=2) + "\n")
    print(f"every image decodes; {output} written")


if __name__ == "__main__":
    cli.launch(main)
